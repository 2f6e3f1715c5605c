"""Text to ids and back, from every kind of folder; the oracle is transformers on the same folder.

What transformers reads in another way, or not at all, is named where it is tested. Streams are
compared with decoding everything at once.
"""

import functools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from conftest import ROOT
from fuzz_checkpoints import damage_blindly, damage_json
from hypothesis import example, given, settings
from hypothesis import strategies as st
from samples import write
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.implementations import BertWordPieceTokenizer, SentencePieceUnigramTokenizer
from transformers import AutoTokenizer
from vocabularies import save_vocabulary

from checkpoints.tokenizer import (
    BYTE_TO_CHAR,
    END_OF_TEXT,
    Unreadable,
    gpt2_tokenizer,
    load_tokenizer,
    read_eos_ids,
)
from llm import find_tokenizer
from outputs import StreamDecoder

DATA = Path(os.environ.get("PAGEDGPT_DATA", "no such folder")) / "tokenizer"
NEEDS_DATA = pytest.mark.skipif(
    not DATA.is_dir(), reason="PAGEDGPT_DATA names no folder with GPT-2's own tokenizer files"
)

# 256 to 266, and <|endoftext|> is 267. Characters are cut as GPT-2 cuts them, and "ab" is a token
# beside its letters, so that a stop string meets every kind of seam.
MERGES = [(b" ", b"\xf0"), (b" \xf0", b"\x9f"), (b"\xe7", b"\x8c"), (b"\xf0", b"\x9f")]
MERGES += [(b"a", b"b"), (b"ab", b"ab"), (b"\xab", b"b"), (b"a", b"\xe7"), (b"S", b"T")]
MERGES += [(b"O", b"P"), (b"E", b"P")]

LINES = [
    "There was once a hen who lived with her three chicks beside the old mill. She'd say to them",
    "every morning: don't go near the water, it's deep, and you're small; I'll call you.",
    "“Who are you?” asked the fox. — “I am the cat 🐈, and this is my kin 🐈‍⬛; we've no fear.”",
    "猫は椅子の上で寝ています。 naïve café, Ångström, straße, Жили-были дед.  \n\n\t 12 365",
    "  indented\n\n\n    more indented\t\ttabs   and trailing blanks   \n",
] * 3
# Added tokens that overlap in every way: one begins with another, ends with what begins another,
# lies within another, holds blanks, is a token already, is a word of two bytes a letter.
SPECIAL = [END_OF_TEXT, "[PAD]", "<s>", "<s><s>"]
WORDS = ["<a>", "<a><b>", "b><c", "D]<", "x[PAD]y", "cat", "cats", " the", "für", "🐈", "e"]
PIECES = [*SPECIAL, *WORDS, "<", ">", "b", "c", "x", "y", "the", "s", " ", "\n", "ü", "\u0301", "1"]
PIECES += ["  ", "\t", "\u3000", "\x00", "\xad", "猫", "'s", "THE", "<mask>", "²", "[SEP]"]


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
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(LINES, trainer)
    tok.add_special_tokens(SPECIAL)
    tok.add_tokens([AddedToken(word) for word in WORDS])
    whole = json.loads(tok.to_str())
    whole["model"]["vocab"][END_OF_TEXT] = 400  # in GPT-2's files it stands in the vocabulary too
    return json.dumps(whole)


def facts() -> dict:
    return json.loads(learnt())


NAMED = {"pad_token": "[PAD]", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
NAMED |= {"sep_token": "<s>", "cls_token": "<s><s>"}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def write_slow(folder: Path, **files) -> None:
    """vocab.json and merges.txt, a list of ids in no order, and whatever else."""
    whole = facts()
    ids = {token["content"]: token["id"] for token in reversed(whole["added_tokens"])}
    del ids[END_OF_TEXT]
    write(folder, vocab=whole["model"]["vocab"], added_tokens=ids, **files)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in whole["model"]["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def transformers_3(folder):
    """Before there was a class for the flags of a token: a map of roles and a list of ids."""
    end = {"content": END_OF_TEXT} | FLAGS | {"normalized": True}
    roles = NAMED | {"bos_token": end, "eos_token": end, "unk_token": end}
    write_slow(folder, special_tokens_map=roles)


def transformers_4_slow(folder):
    decoder = {str(token.pop("id")): token for token in facts()["added_tokens"]}
    config = NAMED | {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    config |= {"added_tokens_decoder": decoder, "add_bos_token": False}
    write_slow(folder, tokenizer_config=config, special_tokens_map=NAMED)


def transformers_4_fast(folder):
    """All the files at once: tokenizer.json beside all those that it replaces."""
    transformers_4_slow(folder)
    cut = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    write(folder, tokenizer=facts() | {"truncation": cut})


def transformers_5(folder):
    """What AutoTokenizer itself writes."""
    source = write(folder.parent / "source", config={"model_type": "gpt2"})
    transformers_4_slow(source)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def tokenizers_2020(folder):
    """As in GPT-2's own folder: merges as strings, no "type" of the model; and a dropout."""
    model = facts()["model"] | {"dropout": 0.5, "unk_token": None}
    del model["type"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    whole = facts() | {"model": model, "pre_tokenizer": level, "decoder": level}
    whole["post_processor"] = level | {"add_prefix_space": True, "trim_offsets": False}
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


def switched(**switches):
    """GPT-2's class with switches of its config."""

    def layout(folder):
        save_vocabulary(folder, MERGES)
        write(folder, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"} | switches)

    return layout


def overruled(folder):
    """A tokenizer.json of GPT-2's class: tokenizer_config.json has the last word."""
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True} | NAMED
    write(folder, tokenizer=facts(), tokenizer_config=config)


GENERAL = {"tokenizer_class": "PreTrainedTokenizerFast"}


def with_rules(**rules):
    """A tokenizer.json with other rules, in the general class."""
    added = [{"id": 400, "content": END_OF_TEXT, "special": True, "rstrip": True}]
    added += [{"id": 401, "content": "cat", "special": False, "single_word": True}]
    changes = {"added_tokens": [FLAGS | token for token in added]} | rules
    config = GENERAL | {"eos_token": END_OF_TEXT}
    return lambda folder: write(folder, tokenizer=facts() | changes, tokenizer_config=config)


PIECE_A = {"Sequence": {"id": "A", "type_id": 0}}
PIECE_END = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
TEMPLATE = {"type": "TemplateProcessing", "single": [PIECE_END, PIECE_A, PIECE_END], "pair": []}
ENDS = {"id": END_OF_TEXT, "ids": [400], "tokens": [END_OF_TEXT]}
TEMPLATE |= {"special_tokens": {END_OF_TEXT: ENDS}}


def bert(**options):
    """A Chinese GPT-2 has this: vocab.txt and the name of a class."""

    def layout(folder):
        tok = BertWordPieceTokenizer()
        tok.train_from_iterator(LINES, 200, min_frequency=1, show_progress=False)
        tok.save_model(str(folder))
        write(folder, tokenizer_config={"tokenizer_class": "BertTokenizer"} | options)

    return layout


def saved_again(layout):
    """What is advised for a folder without tokenizer.json: AutoTokenizer reads it and saves one."""

    def again(folder):
        source = write(folder.parent / "source", config={"model_type": "gpt2"})
        layout(source)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)

    return again


def general(folder, tok, **roles):
    """Any tokenizer of the library, in the general class."""
    tok.save(str(folder / "tokenizer.json"))
    write(folder, tokenizer_config=GENERAL | roles)


def unigram(folder):
    """As in T5."""
    tok = SentencePieceUnigramTokenizer()
    named = {"special_tokens": ["<unk>", "</s>"], "unk_token": "<unk>"}
    tok.train_from_iterator(LINES, 150, show_progress=False, **named)
    general(folder, tok, eos_token="</s>", unk_token="<unk>")


def byte_fallback(folder):
    """As in Llama: bytes have tokens <0xE7> of their own."""
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    blank = normalizers.Replace(" ", "▁")
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tok.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=names, show_progress=False)
    tok.train_from_iterator(["the hen and the cats"] * 3, trainer)
    whole = json.loads(tok.to_str())
    whole["added_tokens"] = whole["added_tokens"][:2]  # the bytes are ordinary tokens
    general(folder, Tokenizer.from_str(json.dumps(whole)), eos_token="</s>")


def word_level(folder):
    """Without a decoder the library puts a blank between two words."""
    tok = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False)
    tok.train_from_iterator(LINES, trainer)
    general(folder, tok)


KINDS = {
    "transformers 3": transformers_3,
    "transformers 4, slow": transformers_4_slow,
    "transformers 4, fast": transformers_4_fast,
    "transformers 5": transformers_5,
    "tokenizers of 2020": tokenizers_2020,
    "save_model": save_model,
    "unigram": unigram,
    "byte fallback": byte_fallback,
    "word level": word_level,
    "a blank that only the config has": overruled,
    "a blank before the text": switched(add_prefix_space=True),
    "a token before the text": saved_again(switched(add_bos_token=True)),
    "a token behind the text": saved_again(switched(add_eos_token=True)),
    "special tokens are split": switched(split_special_tokens=True),
    "flags of added tokens": with_rules(),
    "a normalizer": with_rules(normalizer={"type": "Lowercase"}),
    "a template": with_rules(post_processor=TEMPLATE),
    "bert": saved_again(bert()),
    "bert, cased": saved_again(
        bert(do_lower_case=False, tokenize_chinese_chars=False, eos_token="[SEP]")
    ),
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
def test_a_text_becomes_ids_and_the_ids_become_the_text(tokenizer):
    assert tokenizer.encode("abab!") == [261, 0]  # "!" is the first printable byte: id 0
    assert tokenizer.encode("STOP 🐈") == [264, 265, 257, 238, 230]  # ST, OP, 20 F0 9F, 90, 88
    assert tokenizer.decode([264, 265, 257, 238, 230]) == "STOP 🐈"
    with pytest.raises(ValueError, match=r"'\\ud83d' in position 2: surrogates not allowed"):
        tokenizer.encode("ab\ud83d")


def test_the_shipped_model_reads_a_text_as_ever(shipped_model_folder):
    shipped = load_tokenizer(shipped_model_folder)
    ids = [2872, 1797, 220, 172, 253, 238, 118, 3071]
    assert shipped.encode("Little wolf 🐺<|endoftext|>") == ids
    assert (shipped.vocab_size, shipped.eos_token_id) == (3072, 3071)


@given(text=st.text())
@example(text="a<|endoftext|>b")
@settings(deadline=None)  # a busy machine is no reason to fail
def test_any_text_at_all_comes_back_whole_but_for_end_of_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace(END_OF_TEXT, "")


TOKENS = {  # an id, its bytes in a stream, and what a table shows
    257: (b" \xf0\x9f", " \ufffd"),  # a piece of a character alone
    261: (b"abab", "abab"),
    267: (b"", "<|endoftext|>"),
    # Tables are padded to round sizes, so a model can draw an id that no vocabulary has.
    **dict.fromkeys((268, 50304, -1), (b"", "")),
}


def test_a_special_or_unknown_id_leaves_no_text(tokenizer):
    shown = {i: (tokenizer.token_bytes(i), tokenizer.token_text(i)) for i in TOKENS}
    assert shown == TOKENS
    assert (tokenizer.eos_token_id, tokenizer.vocab_size) == (267, 268)
    assert tokenizer.encode("a<|endoftext|>b") == [64, 267, 65]
    for nothing in (267, 268, 50304, -1):
        assert tokenizer.decode([64, nothing, 65]) == "ab"


def edit_vocab(folder: Path, change) -> Path:
    """Let `change` alter the dictionary in vocab.json."""
    save_vocabulary(folder, MERGES)
    return write(folder, vocab=change(json.loads((folder / "vocab.json").read_text("utf-8"))))


def test_end_of_text_is_what_the_vocabulary_says_of_it(tmp_path):
    """Where it is absent transformers would give it an id for which the model has no row."""
    tok = load_tokenizer(edit_vocab(tmp_path, lambda v: {t: v[t] for t in v if t != END_OF_TEXT}))
    assert tok.eos_token_id is None and tok.vocab_size == 267
    assert tok.decode(tok.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    # Hugging Face's trainer makes it the first id when it is told of it.
    tok = load_tokenizer(edit_vocab(tmp_path, lambda v: {t: (v[t] + 1) % 268 for t in v}))
    assert tok.eos_token_id == 0 and tok.encode("abab<|endoftext|>") == [262, 0]


def test_a_name_that_stands_in_vocab_json_alone_is_given_by_no_text_and_is_shown(tmp_path):
    """Ten of 27 real folders have <s>, <pad>, </s>, <unk> and <mask> there."""
    tok = load_tokenizer(edit_vocab(tmp_path, lambda v: v | {"<pad>": 268, "<ünk>": 269}))
    assert tok.encode("<pad>") == [27, 79, 64, 67, 29]  # five letters
    assert tok.decode([64, 268, 65]) == "a<pad>b" and tok.token_text(268) == "<pad>"
    assert (tok.vocab_size, tok.num_ordinary) == (270, 269)


def test_a_text_that_needs_a_byte_which_the_vocabulary_lacks_is_refused_and_no_other(tmp_path):
    lacking = {BYTE_TO_CHAR[0x0A], BYTE_TO_CHAR[0xE7], *"çĮ", BYTE_TO_CHAR[0xE7] + "Į"}
    folder = edit_vocab(tmp_path, lambda v: {t: v[t] for t in v if not lacking & {*t, t}})
    (folder / "merges.txt").write_text("a b\r\nab ab", encoding="utf-8")  # as Windows writes it
    tok = load_tokenizer(folder)
    assert tok.encode("abab") == [261]
    with pytest.raises(ValueError, match=r"cannot be written .* has none for '\\n'"):
        tok.encode("ab\nab")
    with pytest.raises(ValueError, match="has none for '猫'"):
        tok.encode("a 猫")
    write(folder, config={"model_type": "gpt2"})
    assert AutoTokenizer.from_pretrained(folder).encode("ab\nab") == [260, 260]  # silently less


def test_a_merge_may_look_like_a_comment_and_an_added_word_may_end_a_stop_string(tmp_path):
    save_vocabulary(tmp_path, [*MERGES, (b"#", b"#")])
    write(tmp_path, added_tokens={"STOP": 269, "für": 270})
    tok = load_tokenizer(tmp_path)
    assert tok.encode("##") == [267]
    decoder = StreamDecoder(tok, stop=["OPS"])
    assert stream(decoder, [64, 269, 50, 64]) == ["a", "ST", "", "", ""]
    assert (decoder.text, decoder.stopped) == ("aST", "OPS")
    assert tok.encode("für") == [270] and tok.decode([270]) == "für"


# ---- what ends a text ----------------------------------------------------------------------------
OBJECT = {"content": "<end>", "single_word": False, "lstrip": False, "rstrip": False}
DECODER = {"267": OBJECT | {"content": END_OF_TEXT}, "268": OBJECT}
LISTED = {"eos_token": "<end>", "added_tokens_decoder": DECODER}
ENDINGS = [  # files, the token that ends a text
    ({}, 267),
    ({"tokenizer_config": {"eos_token": "<end>"}}, 268),
    ({"tokenizer_config": {"eos_token": OBJECT | {"__type": "AddedToken"}}}, 268),
    ({"special_tokens_map": {"eos_token": OBJECT}}, 268),
    ({"special_tokens_map": {"eos_token": "<end>"}, "tokenizer_config": {"eos_token": "ab"}}, 268),
    ({"special_tokens_map": {"bos_token": "<end>"}}, 267),
    ({"tokenizer_config": {"eos_token": None, "pad_token": "ab"}}, None),
    ({"tokenizer_config": {"extra_special_tokens": ["<end>"]}}, 267),
    ({"tokenizer_config": {"tokenizer_class": "TokenizersBackend"}}, None),
    # a relic beside the list
    ({"special_tokens_map": {"eos_token": "ab"}, "tokenizer_config": LISTED}, 268),
]


@pytest.mark.parametrize("files, ends", ENDINGS)
def test_the_token_that_ends_a_text_is_the_one_that_transformers_takes(tmp_path, files, ends):
    save_vocabulary(tmp_path, MERGES)
    write(tmp_path, config={"model_type": "gpt2"}, added_tokens={"<end>": 268}, **files)
    ours = load_tokenizer(tmp_path)
    assert ours.eos_token_id == ends
    if files.get("tokenizer_config", {}).get("tokenizer_class") is None:
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        ids = theirs.encode("abab<end>ab<|endoftext|>")
        assert (theirs.eos_token_id, ids) == (ends, ours.encode("abab<end>ab<|endoftext|>"))
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


# of config.json, of generation_config.json, and all of them
EOS_IDS = [(5, [6, 7], {5, 6, 7}), ([5, 6], None, {5, 6}), (None, 7, {7}), (None, [], set())]


def test_the_ids_that_end_a_text_are_those_of_both_configs(tmp_path):
    assert read_eos_ids(tmp_path) == set()
    for config, generation, ids in EOS_IDS:
        files = {"config": {"eos_token_id": config}}
        write(tmp_path, **files, generation_config={"eos_token_id": generation})
        assert read_eos_ids(tmp_path) == ids
    write(tmp_path, generation_config={"eos_token_id": [7, "8"]})
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id is neither an int"):
        read_eos_ids(tmp_path)


# ---- what is not read ----------------------------------------------------------------------------
def char_bpe(folder):
    """As in GPT-1: whether "the</w>" writes a blank depends on what follows."""
    tok = tokenizers.CharBPETokenizer()
    tok.train_from_iterator(LINES, 200, show_progress=False)
    general(folder, tok)


OTHERS = {
    "vocab.txt": lambda folder: (folder / "vocab.txt").touch(),
    "spiece.model": lambda folder: (folder / "spiece.model").touch(),
    "tokenizer.model": lambda folder: (folder / "tokenizer.model").touch(),
    "T5Tokenizer": lambda folder: write(
        folder, tokenizer_config={"tokenizer_class": "T5Tokenizer"}
    ),
    "MyTokenizer": lambda folder: write(folder, config={"tokenizer_class": "MyTokenizer"}),
    "BPEDecoder": char_bpe,
    "BertTokenizer": bert(),
    "add_bos_token": switched(add_bos_token=True),
    "add_eos_token": switched(add_eos_token=True),
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


def added(content: str, token_id: int = 400) -> dict:
    return {"id": token_id, "content": content, "special": True} | FLAGS


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 20_000}
UNIGRAM = {"type": "Unigram", "vocab": [[f"{i:09999d}", -1.0] for i in range(500)]}
TOO_LONG = {  # what a file says
    "one added token": ("tokenizer", {"added_tokens": [added("x" * 500_000)]}),
    "many": ("tokenizer", {"added_tokens": [added(f"{i:0999d}", 400 + i) for i in range(4_100)]}),
    "a rule": ("tokenizer", {"normalizer": REPLACE}),
    "a vocabulary": ("tokenizer", {"model": UNIGRAM}),
    "an old list": ("added_tokens", {"x" * 20_000: 500}),
}


@pytest.mark.parametrize("case", TOO_LONG)
def test_texts_that_would_take_gigabytes_when_compiled_are_refused_before(tmp_path, case):
    """50 MB in one added token took 14.7 GB."""
    name, content = TOO_LONG[case]
    write_slow(tmp_path)
    write(tmp_path, **{name: facts() | content if name == "tokenizer" else content})
    with pytest.raises(ValueError, match=f"{name}.json has texts that are too long: at most 10"):
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


ADDED = "its added tokens cannot be read: "
DAMAGED = [  # file, what it holds (None: it is not there), what is said
    ("tokenizer.json", b"", "tokenizer.json is not JSON"),
    ("tokenizer.json", b"[" * 100_000, "tokenizer.json is not JSON"),
    ("tokenizer.json", b"\xff\xfe\x00\x01", "tokenizer.json is no UTF-8 text"),
    ("tokenizer.json", b'["a"]', "tokenizer.json holds a list, not one object"),
    ("tokenizer.json", b"{}", "tokenizer.json cannot be read: "),
    ("tokenizer_config.json", b"[]", "tokenizer_config.json holds a list"),
    ("tokenizer_config.json", b'{"eos_token": 5}', ADDED),
    ("tokenizer_config.json", b'{"eos_token": {"content": "a", "lstrip": 5}}', ADDED),
    ("tokenizer_config.json", b'{"eos_token": "\\ud83d"}', ADDED),
    ("tokenizer_config.json", b'{"extra_special_tokens": 5}', ADDED),
    ("tokenizer_config.json", b'{"added_tokens_decoder": [7]}', ADDED),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": "a"}}', ADDED),
    ("added_tokens.json", b'{"<a>": null, "b": 0}', ADDED),
    ("vocab.json", b'{"a": 0, "b": -1}', "vocab.json and merges.txt: "),
    ("merges.txt", b"a b\nO P E\n", "vocab.json and merges.txt: "),
    ("merges.txt", b"a b\nX Y\n", "vocab.json and merges.txt: "),
    ("vocab.json", None, "vocab.json is missing"),
    ("merges.txt", None, "merges.txt is missing"),
]


@pytest.mark.parametrize("name, content, complaint", DAMAGED)
def test_a_damaged_file_is_refused_by_name(tmp_path, name, content, complaint):
    save_vocabulary(tmp_path, MERGES)
    (tmp_path / name).write_bytes(content or b"")
    if content is None:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and complaint in str(error.value)


NAMES = ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"]
NAMES += ["vocab.json", "merges.txt", "vocab.txt"]


def test_a_file_with_any_damage_is_refused_or_read_and_nothing_else(tmp_path):
    rng = random.Random(0)
    layouts = [transformers_3, transformers_4_slow, transformers_4_fast, tokenizers_2020, bert()]
    folders = [write(tmp_path / str(i)) for i in range(len(layouts))]
    for folder, layout in zip(folders, layouts, strict=True):
        layout(folder)
    refused = 0
    for _ in range(300):
        at = rng.choice(folders)
        path = at / rng.choice([name for name in NAMES if (at / name).exists()])
        good = path.read_bytes()
        is_blind = path.suffix == ".txt" or rng.random() < 0.5
        path.write_bytes((damage_blindly if is_blind else damage_json)(good, rng))
        try:
            tok = load_tokenizer(at)
            tok.decode(tok.encode("the hen"))
        except ValueError as error:
            refused += 1
            assert len(str(error)) < 600
        path.write_bytes(good)
    assert 75 < refused < 260


# ---- GPT-2's own, from tiktoken's cache ----------------------------------------------------------
# The names of GPT-2's two files there: the SHA-1 of where they were fetched.
CACHED = {
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of tiktoken's, on a machine without a network."""

    def refuse(*args, **kwargs):
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(write(tmp_path / "cache")))
    return tmp_path / "cache"


def test_gpt2_is_none_where_tiktoken_has_not_fetched_it(cache, monkeypatch):
    assert gpt2_tokenizer() is None
    (cache / CACHED["vocab.bpe"]).write_bytes(b"one of the two")
    assert gpt2_tokenizer() is None
    (cache / CACHED["encoder.json"]).mkdir()
    assert gpt2_tokenizer() is None
    (cache / CACHED["encoder.json"]).rmdir()
    (cache / CACHED["encoder.json"]).write_bytes(b"{}")
    with pytest.raises(ValueError, match="ffe6 is not GPT-2's whole file: delete it$"):
        gpt2_tokenizer()
    assert (cache / CACHED["encoder.json"]).read_bytes() == b"{}"
    # An empty name means: keep nothing. It is not the folder that happens to be the current one.
    monkeypatch.chdir(cache)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    assert gpt2_tokenizer() is None
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    assert gpt2_tokenizer() is None


@NEEDS_DATA
@pytest.mark.parametrize("place", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "the default"])
def test_gpt2_from_tiktokens_cache_or_its_own_files_gives_the_published_ids(
    cache, monkeypatch, tmp_path, place
):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    folder = cache
    if place == "the default":
        folder = write(tmp_path / "temporary" / "data-gym-cache")
    else:
        monkeypatch.setenv(place, str(cache))
    for name in CACHED:
        shutil.copy(DATA / name, folder / CACHED[name])
    shutil.copy(DATA / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(DATA / "vocab.bpe", tmp_path / "merges.txt")
    ours, from_files = gpt2_tokenizer(), load_tokenizer(tmp_path)
    assert (ours.vocab_size, ours.num_ordinary, ours.eos_token_id) == (50257, 50256, 50256)
    for name in ("vocab_size", "num_ordinary", "eos_token_id", "names"):
        assert getattr(ours, name) == getattr(from_files, name)
    ids = range(-1, 50300)
    assert [*map(ours.token_bytes, ids)] == [*map(from_files.token_bytes, ids)]
    vectors = json.loads((DATA / "gpt2_token_vectors.json").read_text(encoding="utf-8"))
    assert len(vectors) > 30
    for tok in (ours, from_files):
        assert tok.encode("hello 👋 world 🌍") == [31373, 50169, 233, 995, 12520, 234, 235]
        for vector in vectors:
            assert tok.encode(vector["text"] + END_OF_TEXT) == [*vector["ids"], 50256], vector
            assert tok.decode(vector["ids"]) == vector["text"], vector
    merges = folder / CACHED["vocab.bpe"]
    merges.write_bytes(merges.read_bytes().replace(b"\xc4\xa0 t", b"\xc4\xa0 s", 1))  # as long
    with pytest.raises(ValueError, match="3aee is not GPT-2's whole file: delete it$"):
        gpt2_tokenizer()


def test_a_million_blanks_in_a_row_are_tokens_like_others(tokenizer):
    """tiktoken's regular expression ends in a panic there, which no `except Exception` sees."""
    assert tokenizer.encode(" " * 999_999 + "a") == [220] * 999_999 + [64]


def test_neither_library_is_imported_before_it_is_needed():
    code = (
        "import sys, checkpoints.tokenizer; assert not {*sys.modules} & {'tiktoken', 'tokenizers'}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
