"""Text to ids and back, from every kind of folder; the oracle is transformers on the same folder.

What transformers reads in another way, or not at all, is named where it is tested. Streams are
compared with decoding everything at once.
"""

import functools
import itertools
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import tokenizers
from conftest import ROOT
from fuzz_checkpoints import damage_blindly, damage_json
from samples import write
from tokenizers import decoders, models, normalizers, processors, trainers
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import AutoTokenizer
from vocabularies import save_vocabulary

from checkpoints.tokenizer import (
    BYTE_TO_CHAR,
    END_OF_TEXT,
    Unreadable,
    gpt2_tokenizer,
    load_tokenizer,
)
from llm import find_tokenizer
from outputs import StreamDecoder

# 256 to 266, and <|endoftext|> is 267. Characters are cut as GPT-2 cuts them, and "ab" is a token
# beside its letters, so that a stop string meets every kind of seam.
MERGES = [(b" ", b"\xf0"), (b" \xf0", b"\x9f"), (b"\xe7", b"\x8c"), (b"\xf0", b"\x9f")]
MERGES += [(b"a", b"b"), (b"ab", b"ab"), (b"\xab", b"b"), (b"a", b"\xe7"), (b"S", b"T")]
MERGES += [(b"O", b"P"), (b"#", b"#")]  # no comment

LINES = [
    "There was once a hen who lived with her three chicks beside the old mill. She'd say to them",
    "“Who are you?” asked the fox. — “I am the cat 🐈, and this is my kin 🐈‍⬛; we've no fear.”",
    "猫は椅子の上で寝ています。 naïve café, Ångström, straße, Жили-были дед.  \n\n\t 12 365",
    "  indented\n\n\n    more indented\t\ttabs   and trailing blanks   \n",
] * 4
# Added tokens that overlap in every way: one begins with another, ends with what begins another,
# lies within another, holds blanks, is a token already, is a word of two bytes a letter.
SPECIAL = [END_OF_TEXT, "[PAD]", "<s>", "<s><s>"]
WORDS = ["<a>", "<a><b>", "b><c", "D]<", "x[PAD]y", "cat", "cats", " the", "für", "🐈", "e"]
PIECES = [*SPECIAL, *WORDS, *"<>bcxyüs \n\u03011\t\u3000\x00\xad猫²", "the", "  ", "'s", "THE"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """256 bytes, the merges above, and <|endoftext|> as id 267."""
    folder = tmp_path_factory.mktemp("by_hand")
    save_vocabulary(folder, MERGES)
    return load_tokenizer(folder)


# ---- the same vocabulary as six programs write it ------------------------------------------------
@functools.cache
def learnt() -> str:
    """The tokenizer.json of a vocabulary like GPT-2's, learnt from LINES, and what is added."""
    tok = tokenizers.ByteLevelBPETokenizer()
    tok.train_from_iterator(LINES, 400, show_progress=False)
    tok.add_special_tokens(SPECIAL)
    tok.add_tokens([tokenizers.AddedToken(word) for word in WORDS])
    whole = json.loads(tok.to_str())
    whole["model"]["vocab"][END_OF_TEXT] = 400  # in GPT-2's files it stands in the vocabulary too
    return json.dumps(whole)


def facts() -> dict:
    return json.loads(learnt())


NAMED = {"pad_token": "[PAD]", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
NAMED |= {"sep_token": "<s>", "cls_token": "<s><s>"}
SWITCH = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
GENERAL = {"tokenizer_class": "PreTrainedTokenizerFast"}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def write_slow(folder: Path, **files) -> None:
    """vocab.json and merges.txt, a list of ids in no order, and whatever else."""
    ids = {token["content"]: token["id"] for token in reversed(facts()["added_tokens"])}
    del ids[END_OF_TEXT]
    write(folder, added_tokens=ids, **files)
    tokenizers.Tokenizer.from_str(learnt()).model.save(str(folder))


def transformers_3(folder):
    """Before there was a class for the flags of a token: a map of roles and a list of ids."""
    end = {"content": END_OF_TEXT} | FLAGS | {"normalized": True}
    roles = NAMED | {"bos_token": end, "eos_token": end, "unk_token": end}
    write_slow(folder, special_tokens_map=roles)


def transformers_4(folder, **files):
    decoder = {str(token.pop("id")): token for token in facts()["added_tokens"]}
    config = NAMED | SWITCH | {"added_tokens_decoder": decoder, "add_bos_token": False}
    write_slow(folder, tokenizer_config=config, special_tokens_map=NAMED, **files)


def transformers_4_fast(folder):
    """All the files at once: tokenizer.json beside all those that it replaces."""
    cut = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    transformers_4(folder, tokenizer=facts() | {"truncation": cut})


def tokenizers_2020(folder):
    """As in GPT-2's own folder: merges as strings, no "type" of the model; and a dropout."""
    model = facts()["model"] | {"dropout": 0.5, "unk_token": None}
    del model["type"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    whole = facts() | {"model": model, "pre_tokenizer": level, "decoder": level}
    write(folder, tokenizer=whole, tokenizer_config={"model_max_length": 1024})


# ---- other vocabularies --------------------------------------------------------------------------
def save_model(folder):
    """ByteLevelBPETokenizer.save_model: special tokens stand in vocab.json, and a map of roles."""
    tok = tokenizers.ByteLevelBPETokenizer()
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tok.train_from_iterator(LINES, 400, special_tokens=names, show_progress=False)
    tok.save_model(str(folder))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    mask = {"content": "<mask>"} | FLAGS | {"lstrip": True}
    write(folder, special_tokens_map=roles | {"mask_token": mask})


def switched(folder, **switches):
    """GPT-2's class with switches of its config."""
    save_vocabulary(folder, MERGES)
    write(folder, tokenizer_config=SWITCH | switches)


def bert(folder):
    """A Chinese GPT-2 has this: vocab.txt and the name of a class."""
    tok = BertWordPieceTokenizer()
    tok.train_from_iterator(LINES, 200, min_frequency=1, show_progress=False)
    tok.save_model(str(folder))
    write(folder, tokenizer_config={"tokenizer_class": "BertTokenizer"})


def saved_again(folder, layout, **switches):
    """What is advised for a folder without tokenizer.json: AutoTokenizer reads it and saves one."""
    source = write(folder.parent / "source", config={"model_type": "gpt2"})
    layout(source, **switches)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def general(folder, tok, **roles):
    """Any tokenizer of the library, in the general class."""
    tok.save(str(folder / "tokenizer.json"))
    write(folder, tokenizer_config=GENERAL | roles)


def with_rules(folder, **rules):
    """Added tokens with flags, and other rules."""
    added = [{"id": 400, "content": END_OF_TEXT, "special": True, "rstrip": True}]
    added += [{"id": 401, "content": "cat", "special": False, "single_word": True}]
    changes = {"added_tokens": [FLAGS | token for token in added]}
    tok = tokenizers.Tokenizer.from_str(json.dumps(facts() | changes))
    for name, rule in rules.items():
        setattr(tok, name, rule)
    general(folder, tok, eos_token=END_OF_TEXT)


def byte_fallback(folder):
    """As in Llama: bytes have tokens <0xE7> of their own."""
    tok = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    blank = normalizers.Replace(" ", "▁")
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tok.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=names, show_progress=False)
    tok.train_from_iterator(["the hen and the cats"] * 3, trainer)
    whole = json.loads(tok.to_str())
    whole["added_tokens"] = whole["added_tokens"][:2]  # the bytes are ordinary tokens
    general(folder, tokenizers.Tokenizer.from_str(json.dumps(whole)), eos_token="</s>")


def ending(folder, **files):
    """Another token may end a text: GPT-2's class has three roles without being told."""
    save_vocabulary(folder, MERGES)
    write(folder, added_tokens={"<end>": 268}, **files)


def edited(folder: Path, change=dict, **files):
    """The tokenizer of vocab.json as `change` alters it, and other files."""
    save_vocabulary(folder, MERGES)
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    return load_tokenizer(write(folder, vocab=change(vocab), **files))


OBJECT = {"content": "<end>", "single_word": False, "lstrip": False, "rstrip": False}
DECODER = {"267": OBJECT | {"content": END_OF_TEXT}, "268": OBJECT}
LISTED = {"eos_token": "<end>", "added_tokens_decoder": DECODER}
ENDINGS = [  # files, the token that ends a text
    ({"tokenizer_config": {"eos_token": "<end>"}}, 268),
    ({"special_tokens_map": {"eos_token": OBJECT}}, 268),
    ({"special_tokens_map": {"eos_token": "<end>"}, "tokenizer_config": {"eos_token": "ab"}}, 268),
    ({"special_tokens_map": {"bos_token": "<end>"}}, 267),
    ({"tokenizer_config": {"eos_token": None, "pad_token": "ab"}}, None),
    ({"tokenizer_config": {"extra_special_tokens": ["<end>"]}}, 267),
    # a relic beside the list
    ({"special_tokens_map": {"eos_token": "ab"}, "tokenizer_config": LISTED}, 268),
]
AROUND = processors.TemplateProcessing(
    single=f"{END_OF_TEXT} $A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, 400)]
)
BLANK_END = SWITCH | {"added_tokens_decoder": {"267": {"content": END_OF_TEXT, "lstrip": True}}}
KINDS = {
    "transformers 3": transformers_3,
    "transformers 4, slow": transformers_4,
    "transformers 4, fast": transformers_4_fast,
    "transformers 5": partial(saved_again, layout=transformers_4),
    "two files and no more": switched,
    "tokenizers of 2020": tokenizers_2020,
    "save_model": save_model,
    "byte fallback": byte_fallback,
    "a blank that only the config has": lambda folder: write(
        folder, tokenizer=facts(), tokenizer_config=SWITCH | {"add_prefix_space": True} | NAMED
    ),
    "a blank before the text": partial(switched, add_prefix_space=True),
    "a token before the text": partial(saved_again, layout=switched, add_bos_token=True),
    "special tokens are split": partial(switched, split_special_tokens=True),
    "flags of added tokens": with_rules,
    "a normalizer": partial(with_rules, normalizer=normalizers.Lowercase()),
    "no decoder": partial(with_rules, decoder=None),
    "a template": partial(with_rules, post_processor=AROUND),
    "bert": partial(saved_again, layout=bert),
    # two files that are not tiktoken's
    "a flag": partial(edited, tokenizer_config=BLANK_END),
    "an order": partial(
        edited, change=lambda v: {t: 523 - v[t] if 255 < v[t] < 267 else v[t] for t in v}
    ),
    "no bytes": partial(edited, change=lambda v: v | {"猫": 268}),
    **{f"it ends with {end}: {files}": partial(ending, **files) for files, end in ENDINGS},
}


@functools.cache
def texts() -> list[str]:
    rng = random.Random(0)
    mixed = ["".join(rng.choices(PIECES, k=rng.randrange(12))) for _ in range(150)]
    return [*LINES[:5], *(text for text in mixed if END_OF_TEXT not in text), "", "<s> THE cat"]


def stream(decoder: StreamDecoder, ids: list[int]) -> list[str]:
    """What each push returns, and last what `finish` does."""
    return [*(decoder.push(token_id) for token_id in ids), decoder.finish()]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_texts_and_streams_are_those_of_transformers(kind, tmp_path):
    folder = write(tmp_path / "folder", config={"model_type": "gpt2"})
    KINDS[kind](folder)
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert theirs.eos_token_id == ours.eos_token_id
    if kind.startswith("it ends with "):
        assert kind.startswith(f"it ends with {ours.eos_token_id}: ")
        ids = theirs.encode("abab<end>ab<|endoftext|>")
        assert ids == ours.encode("abab<end>ab<|endoftext|>")
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours._encoding is not None) == (kind == "two files and no more")
    begun = ours.encode("the hen")
    for text in texts():
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        if "f" not in text or "ü" not in text:  # the library loses the ü of an added "für"
            whole = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert ours.decode(ids) == whole
        written = "".join(stream(StreamDecoder(ours), ids))
        assert ours.decode([*begun, *ids]) == ours.decode(begun) + written
    if theirs.convert_tokens_to_ids(END_OF_TEXT) == ours.eos_token_id:
        text = f"{END_OF_TEXT}the hen{END_OF_TEXT}  and <|endoftex|>"
        assert ours.encode(text) == theirs.encode(text)


# ---- text to ids and back ------------------------------------------------------------------------
def test_a_text_becomes_ids_and_the_ids_become_the_text(tokenizer, shipped_model_folder):
    assert tokenizer.encode("abab!") == [261, 0]  # "!" is the first printable byte: id 0
    assert tokenizer.encode("STOP 🐈") == [264, 265, 257, 238, 230]  # ST, OP, 20 F0 9F, 90, 88
    assert tokenizer.decode([264, 265, 257, 238, 230]) == "STOP 🐈"
    with pytest.raises(ValueError, match=r"'\\ud83d' in position 2: surrogates not allowed"):
        tokenizer.encode("ab\ud83d")
    shipped = load_tokenizer(shipped_model_folder)
    ids = [2872, 1797, 220, 172, 253, 238, 118, 3071]
    assert shipped.encode("Little wolf 🐺<|endoftext|>") == ids
    assert (shipped.vocab_size, shipped.eos_token_id) == (3072, 3071)


TOKENS = {  # an id, its bytes in a stream, and what a table shows
    257: (b" \xf0\x9f", " \ufffd"),  # a piece of a character alone
    267: (b"", "<|endoftext|>"),
    # Tables are padded to round sizes, so a model can draw an id that no vocabulary has.
    **dict.fromkeys((268, 50304, -1), (b"", "")),
}


def test_a_special_or_unknown_id_leaves_no_text(tokenizer):
    assert {i: (tokenizer.token_bytes(i), tokenizer.token_text(i)) for i in TOKENS} == TOKENS
    assert (tokenizer.eos_token_id, tokenizer.vocab_size) == (267, 268)
    assert tokenizer.encode("a<|endoftext|>b") == [64, 267, 65]
    assert tokenizer.decode([64, 267, 268, 50304, -1, 65]) == "ab"


def test_names_are_what_the_vocabulary_says_of_them(tmp_path):
    """Where <|endoftext|> is absent transformers would give it an id without a row."""
    tok = edited(tmp_path, lambda v: {t: v[t] for t in v if t != END_OF_TEXT})
    assert tok.eos_token_id is None and tok.vocab_size == 267
    assert tok.decode(tok.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    # Hugging Face's trainer makes it the first id when it is told of it.
    tok = edited(tmp_path, lambda v: {t: (v[t] + 1) % 268 for t in v})
    assert tok.eos_token_id == 0 and tok.encode("abab<|endoftext|>") == [262, 0]
    # Ten of 27 real folders have <s>, <pad>, </s>, <unk> and <mask> there alone.
    tok = edited(tmp_path, lambda v: v | {"<pad>": 268, "<ünk>": 269})
    assert tok.encode("<pad>") == [27, 79, 64, 67, 29]  # five letters
    assert tok.decode([64, 268, 65]) == "a<pad>b" and tok.token_text(268) == "<pad>"
    assert (tok.vocab_size, tok.num_ordinary) == (270, 269)
    tok = edited(tmp_path, added_tokens={"STOP": 268, "für": 269})
    decoder = StreamDecoder(tok, stop=["OPS"])  # a stop string that begins in an added word
    assert stream(decoder, [64, 268, 50, 64]) == ["a", "ST", "", "", ""]
    assert (decoder.text, decoder.stopped) == ("aST", "OPS")
    assert tok.encode("für") == [269] and tok.decode([269]) == "für"


def test_a_text_that_needs_a_byte_which_the_vocabulary_lacks_is_refused_and_no_other(tmp_path):
    lacking = {BYTE_TO_CHAR[0x0A], BYTE_TO_CHAR[0xE7], *"çĮ", BYTE_TO_CHAR[0xE7] + "Į"}
    save_vocabulary(tmp_path, MERGES)
    (tmp_path / "merges.txt").write_text("a b\r\nab ab", encoding="utf-8")  # as Windows writes it
    vocab = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    write(tmp_path, vocab={t: vocab[t] for t in vocab if not lacking & {*t, t}})
    tok = load_tokenizer(tmp_path)
    assert tok.encode("abab") == [261]
    for text, lacks in {"ab\nab": r"'\\n'", "a 猫": "'猫'"}.items():
        with pytest.raises(ValueError, match=f"cannot be written .* has none for {lacks}"):
            tok.encode(text)


# ---- tiktoken, where a vocabulary is plain -------------------------------------------------------
def test_tiktoken_gives_the_ids_of_the_merges_or_is_not_asked(tmp_path):
    """No training writes "ab c" before "b c" and then "a bc": such merges lead to no "abc"."""
    pairs = [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"a", b"bc"), (b"abc", b"a")]
    words = " ".join(map("".join, itertools.product("abc", repeat=5)))
    asked = Counter()
    for merges in itertools.permutations(pairs, 4):
        save_vocabulary(tmp_path, merges)
        try:
            tok = load_tokenizer(tmp_path)
        except ValueError:  # a merge before the tokens that it joins
            continue
        assert tok.encode(words) == tok._tokenizer.encode(words).ids, merges
        asked[tok._encoding is not None] += 1
    assert asked == {True: 24, False: 48}
    assert edited(tmp_path, lambda v: v | {"z": v["y"]})._encoding is None  # two of one id


def test_a_million_blanks_are_refused_by_their_number(tokenizer):
    """tiktoken's regular expression fails at 999,999; older ones panic."""
    assert tokenizer.encode("a" + " " * 899_999 + "a") == [64, *[220] * 899_999, 64]
    with pytest.raises(ValueError, match="in tokens: 900,000 blanks or more in a row"):
        tokenizer.encode("a" + "\n" * 999_999 + "a")


# ---- what is not read ----------------------------------------------------------------------------
def char_bpe(folder):
    """As in GPT-1: whether "the</w>" writes a blank depends on what follows."""
    tok = tokenizers.CharBPETokenizer()
    tok.train_from_iterator(LINES, 200, show_progress=False)
    general(folder, tok)


OTHERS = {
    "vocab.txt": lambda f: (f / "vocab.txt").touch(),
    "spiece.model": lambda f: (f / "spiece.model").touch(),
    "tokenizer.model": lambda f: (f / "tokenizer.model").touch(),
    "T5Tokenizer": lambda f: write(f, tokenizer_config={"tokenizer_class": "T5Tokenizer"}),
    "MyTokenizer": lambda f: write(f, config={"tokenizer_class": "MyTokenizer"}),
    "BPEDecoder": char_bpe,
    "BertTokenizer": bert,
    "add_bos_token": partial(switched, add_bos_token=True),
    "add_eos_token": partial(switched, add_eos_token=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_tokenizer_of_another_family_is_named_and_never_replaced_by_gpt2s(
    tmp_path, name, monkeypatch
):
    monkeypatch.setattr("llm.gpt2_tokenizer", lambda: pytest.fail("GPT-2's ids would be nonsense"))
    OTHERS[name](tmp_path)
    with pytest.raises(Unreadable, match=f"{tmp_path}.*{name}"):
        load_tokenizer(tmp_path)
    with pytest.warns(UserWarning, match=f"{name}.*: prompts and outputs are token ids"):
        assert find_tokenizer(tmp_path, 50257) is None


def test_a_folder_without_tokenizer_files_has_none(tmp_path):
    assert load_tokenizer(tmp_path) is load_tokenizer(tmp_path / "absent") is None
    config = {"tokenizer_class": "GPT2Tokenizer"}
    write(tmp_path, tokenizer_config=config, special_tokens_map={}, config={})  # without tokens
    assert load_tokenizer(tmp_path) is None


UNIGRAM = {"type": "Unigram", "vocab": [[f"{i:09999d}", -1.0] for i in range(500)]}


@pytest.mark.parametrize(
    "content", [{"added_tokens": [{"content": "x" * 500_000}]}, {"model": UNIGRAM}], ids=list
)
def test_texts_that_would_take_gigabytes_when_compiled_are_refused_before(tmp_path, content):
    """50 MB in one added token took 14.7 GB."""
    write(tmp_path, tokenizer=facts() | content)
    with pytest.raises(ValueError, match="tokenizer.json has texts that are too long: at most 10"):
        load_tokenizer(tmp_path)


def test_a_panic_of_the_library_is_a_sentence(tmp_path):
    """It is a BaseException; here a pattern needs 2**40 tries."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated"}
    write(tmp_path, tokenizer=facts() | {"pre_tokenizer": split | {"invert": False}})
    with pytest.raises(ValueError, match="the text cannot be written in tokens: .*retry-limit"):
        load_tokenizer(tmp_path).encode("a" * 40)
    strip = {"type": "Strip", "content": "!", "start": 0, "stop": 2}  # of a token of one letter
    write(tmp_path, tokenizer=facts() | {"decoder": strip}, tokenizer_config=GENERAL)
    with pytest.raises(ValueError, match="tokenizer.json: .*index out of bounds"):
        load_tokenizer(tmp_path)


def test_a_file_with_any_damage_is_refused_by_name_or_read_and_nothing_else(tmp_path):
    rng = random.Random(0)
    layouts = [transformers_3, transformers_4, transformers_4_fast, tokenizers_2020, bert]
    for i, layout in enumerate(layouts):
        layout(write(tmp_path / str(i)))
    paths, refused = sorted(tmp_path.glob("*/*")), Counter()
    for _ in range(400):
        path = rng.choice(paths)
        good = path.read_bytes()
        is_json = path.suffix == ".json"
        ways = [damage_blindly, damage_json] if is_json else [damage_blindly]
        path.write_bytes(rng.choice(ways)(good, rng))
        if rng.random() < 0.05:
            path.unlink()
        try:
            tok = load_tokenizer(path.parent)
            if tok or path.exists():  # without tokenizer.json there may be none
                tok.encode("the hen")
        except ValueError as error:
            refused[path.name] += 1
            is_named = str(error).startswith((str(path.parent), "the text cannot be written"))
            assert is_named and len(str(error)) < 600 and str(error).isprintable()
        path.write_bytes(good)
    assert min(refused.values()) > 0 and len(refused) == 7 and refused.total() < 350, refused


# ---- GPT-2's own, from tiktoken's cache ----------------------------------------------------------
# The names of GPT-2's two files there: the SHA-1 of where they were fetched.
CACHED = {
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of tiktoken's."""
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(write(tmp_path / "cache")))
    return tmp_path / "cache"


def test_gpt2_is_none_where_tiktoken_has_not_fetched_it(cache, monkeypatch):
    assert gpt2_tokenizer() is None
    (cache / CACHED["vocab.bpe"]).write_bytes(b"one of the two")
    assert gpt2_tokenizer() is None
    (cache / CACHED["encoder.json"]).write_bytes(b"{}")
    with pytest.raises(ValueError, match="ffe6 is not GPT-2's whole file: delete it$"):
        gpt2_tokenizer()
    assert (cache / CACHED["encoder.json"]).read_bytes() == b"{}"
    # An empty name means: keep nothing. It is not the folder that happens to be the current one.
    monkeypatch.chdir(cache)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    assert gpt2_tokenizer() is None


@pytest.mark.parametrize("place", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "the default"])
def test_gpt2_from_tiktokens_cache_or_its_own_files_gives_the_published_ids(
    cache, data_folder, monkeypatch, tmp_path, place
):
    data = data_folder / "tokenizer"
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv(place, str(cache))
    folder = write(tmp_path / "temporary" / "data-gym-cache") if place == "the default" else cache
    for (name, cached), plain in zip(CACHED.items(), ["vocab.json", "merges.txt"], strict=True):
        shutil.copy(data / name, folder / cached)
        shutil.copy(data / name, tmp_path / plain)
    vectors = json.loads((data / "gpt2_token_vectors.json").read_text(encoding="utf-8"))
    assert len(vectors) > 30
    for tok in (gpt2_tokenizer(), load_tokenizer(tmp_path)):
        assert tok._encoding is not None
        assert (tok.vocab_size, tok.num_ordinary, tok.eos_token_id) == (50257, 50256, 50256)
        assert tok.encode("hello 👋 world 🌍") == [31373, 50169, 233, 995, 12520, 234, 235]
        for vector in vectors:
            assert tok.encode(vector["text"] + END_OF_TEXT) == [*vector["ids"], 50256], vector
            assert tok.decode(vector["ids"]) == vector["text"], vector
    rng = random.Random(0)  # the library's ids of any text
    for _ in range(3000):
        text = "".join(rng.choices([*PIECES, *LINES[0].split(), chr(rng.randrange(0xD800))], k=9))
        assert tok.encode(text) == tok._tokenizer.encode(text).ids, text


def test_no_library_is_imported_before_it_is_needed():
    code = "import sys, checkpoints.tokenizer as t; assert not {*sys.modules} & {'tokenizers',"
    code += "'tiktoken', 'huggingface_hub'}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
