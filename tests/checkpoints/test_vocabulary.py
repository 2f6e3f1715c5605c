"""The files of a vocabulary: every layout gives the ids of transformers, and a damaged one none.

The oracle is transformers' AutoTokenizer, reading the same folder. What it would read in another
way than `vocabulary.py` can is refused, and what is no vocabulary at all is refused by name.
"""

import json
import random
from pathlib import Path

import pytest
from fuzz_checkpoints import damage_blindly, damage_json
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken as HuggingFaceAddedToken
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from checkpoints.tokenizer import load_tokenizer, save_vocabulary
from checkpoints.vocabulary import (
    BYTE_TO_CHAR,
    END_OF_TEXT,
    read_vocabulary,
)

MERGES = [(b" ", b"\xf0"), (b" \xf0", b"\x9f"), (b"a", b"b"), (b"ab", b"ab"), (b"S", b"T")]
MERGES += [(b"O", b"P"), (b"E", b"P")]  # 256 to 262, and <|endoftext|> is 263

LINES = [
    "There was once a hen who lived with her three chicks beside the old mill. She'd say to them",
    "every morning: don't go near the water, it's deep, and you're small; I'll call you.",
    "“Who are you?” asked the fox. — “I am the cat 🐈, and this is my kin 🐈‍⬛; we've no fear.”",
    "猫は椅子の上で寝ています。 naïve café, Ångström, straße, Жили-были дед.  \n\n\t 12 365",
] * 3

# They overlap in every way: one begins with another, ends with what begins another, lies within
# another, holds blanks, is a token already, is a word of two bytes a letter.
SPECIAL = [END_OF_TEXT, "[PAD]", "<s>", "<s><s>"]
WORDS = ["<a>", "<a><b>", "b><c", "D]<", "x[PAD]y", "cat", "cats", " the", "für", "🐈", "e"]
PIECES = [*SPECIAL, *WORDS, "<", ">", "b", "c", "x", "y", "the", "s", " ", "\n", "ü", "\u0301", "1"]
TEXTS = [
    "",
    "the hen",
    "<|endoftext|>the hen<|endoftext|><|endoftext|> and <|endoftex|>",
    "<a><b><c> <a><a><b> <<a>>",
    "[PAD]<s> x[PAD]y [PAD[PAD]]",
    "<s><s><s> <s> <s>s<s>",
    "cats cat scat\ncatss  the the  the",
    "für fürs 🐈🐈 naïve u\u0308",
    " <|endoftext|> \t[PAD]\n\n",
]


# ---- The same vocabulary as six programs write it ------------------------------------------------
@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict:
    """A trained vocabulary with all that was added: {"vocab", "merges", "added"}."""
    theirs = HuggingFaceTokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator(LINES, trainer)
    theirs.add_special_tokens(SPECIAL)
    theirs.add_tokens([HuggingFaceAddedToken(word) for word in WORDS])
    whole = json.loads(theirs.to_str())
    vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
    assert len(vocab) == 400 and len(whole["added_tokens"]) == len(SPECIAL) + len(WORDS)
    assert vocab["e"] == theirs.token_to_id("e")  # added, but it was a token before
    vocab[END_OF_TEXT] = 400  # in GPT-2's files it stands in the vocabulary too
    return {"vocab": vocab, "merges": merges, "added": whole["added_tokens"], "whole": whole}


def write(folder: Path, **files) -> Path:
    """Write each value as JSON: `write(folder, config={})` writes config.json."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_slow(folder: Path, facts: dict, **files) -> Path:
    """vocab.json and merges.txt, and whatever else."""
    write(folder, config={"model_type": "gpt2"}, vocab=facts["vocab"], **files)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in facts["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def behind(facts: dict) -> dict[str, int]:
    """added_tokens.json: what stands behind the vocabulary, in no order, and the one in it."""
    ids = {token["content"]: token["id"] for token in reversed(facts["added"])}
    return {text: ids[text] for text in ids if text != END_OF_TEXT}


def as_dicts(facts: dict) -> dict[str, dict]:
    """added_tokens_decoder: everything by its id."""
    return {
        str(token["id"]): {key: token[key] for key in token if key != "id"}
        for token in facts["added"]
    }


NAMED = {"pad_token": "[PAD]", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
NAMED |= {"sep_token": "<s>", "cls_token": "<s><s>"}


def transformers_3(folder, facts):
    """Before there was a class for the flags of a token: a map of roles and a list of ids."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    end = {"content": END_OF_TEXT} | flags
    roles = NAMED | {"bos_token": end, "eos_token": end, "unk_token": end}
    return write_slow(folder, facts, added_tokens=behind(facts), special_tokens_map=roles)


def transformers_4_slow(folder, facts):
    config = NAMED | {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    config |= {"added_tokens_decoder": as_dicts(facts), "add_bos_token": False}
    files = {"tokenizer_config": config, "special_tokens_map": NAMED}
    return write_slow(folder, facts, added_tokens=behind(facts), **files)


def transformers_4_fast(folder, facts):
    """All the files at once: tokenizer.json beside all those that it replaces."""
    config = NAMED | {"tokenizer_class": "GPT2TokenizerFast", "clean_up_tokenization_spaces": True}
    config |= {"added_tokens_decoder": as_dicts(facts), "model_max_length": 1024}
    whole = facts["whole"] | {"truncation": {"max_length": 3, "strategy": "LongestFirst"}}
    whole["truncation"] |= {"stride": 0, "direction": "Right"}
    files = {"tokenizer_config": config, "special_tokens_map": NAMED, "tokenizer": whole}
    return write_slow(folder, facts, added_tokens=behind(facts), **files)


def transformers_5(folder, facts):
    """What AutoTokenizer itself writes."""
    source = transformers_4_slow(folder.with_name(folder.name + "_source"), facts)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return write(folder, config={"model_type": "gpt2"})


def any_tokenizer(folder, facts):
    """A tokenizer.json wrapped in transformers' general class, and saved."""
    write(folder, config={"model_type": "gpt2"}, tokenizer=facts["whole"])
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **NAMED)
    theirs.save_pretrained(folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] in (
        "PreTrainedTokenizerFast",
        "TokenizersBackend",
    )
    return folder


def tokenizers_2020(folder, facts):
    """As in GPT-2's own folder: merges as strings, no "type" of the model, empty affixes."""
    model = {"dropout": None, "unk_token": None, "fuse_unk": False, "vocab": facts["vocab"]}
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    model |= {"merges": [" ".join(pair) for pair in facts["merges"]]}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    whole = facts["whole"] | {"model": model, "pre_tokenizer": level, "decoder": level}
    whole |= {"post_processor": {"type": "ByteLevel", "add_prefix_space": True}}
    whole["post_processor"] |= {"trim_offsets": False}
    files = {"tokenizer": whole, "tokenizer_config": {"model_max_length": 1024}}
    return write(folder, config={"model_type": "gpt2"}, **files)


LAYOUTS = [transformers_3, transformers_4_slow, transformers_4_fast, transformers_5]
LAYOUTS += [any_tokenizer, tokenizers_2020]


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: layout.__name__)
def pair(request, facts, tmp_path_factory):
    """transformers' tokenizer and ours, from one folder."""
    folder = request.param(tmp_path_factory.mktemp("layouts") / request.param.__name__, facts)
    return AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)


def test_each_layout_has_the_same_ids_as_in_transformers(pair):
    theirs, ours = pair
    assert len(theirs) == ours.vocab_size == 400 + len(SPECIAL) + len(WORDS) - 1
    assert theirs.eos_token_id == ours.eos_token_id == 400
    for text in [*TEXTS, *LINES]:
        assert ours.encode(text) == theirs.encode(text), text


@given(text=st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@settings(max_examples=150, deadline=None)
def test_any_text_of_added_tokens_and_their_pieces_has_the_same_ids(pair, text):
    theirs, ours = pair
    assert ours.encode(text) == theirs.encode(text)


def test_a_special_token_leaves_no_text_and_an_added_word_does(pair):
    theirs, ours = pair
    ids = ours.encode("the<s> cats[PAD]<a><b> 🐈<|endoftext|>!")
    assert ours.decode(ids) == "the cats<a><b> 🐈!"
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    # Hugging Face takes its letters for characters that stand for bytes, and loses "ü".
    assert ours.decode(ours.encode("für")) == "für"


# ---- Added tokens, one rule at a time ------------------------------------------------------------
def added(content: str, token_id: int, special: bool = True, **flags) -> dict:
    """One entry of tokenizer.json's added_tokens, as tokenizers writes it."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": token_id, "content": content, "special": special} | plain | flags


def whole_file(*more: dict, **fields) -> dict:
    """A tokenizer.json of MERGES, <|endoftext|> as 263, and more added tokens from 264 on."""
    pairs = [["".join(BYTE_TO_CHAR[byte] for byte in part) for part in merge] for merge in MERGES]
    written = [*BYTE_TO_CHAR.values(), *("".join(pair) for pair in pairs), END_OF_TEXT]
    vocab = {token: token_id for token_id, token in enumerate(written)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    whole = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None}
    whole |= {"pre_tokenizer": level | {"use_regex": True}, "post_processor": None}
    tokens = sorted([added(END_OF_TEXT, 263), *more], key=lambda token: token["id"])
    whole |= {"decoder": level, "added_tokens": tokens}
    return whole | {"model": {"type": "BPE", "vocab": vocab, "merges": pairs}} | fields


def tokenizer_of(folder: Path, *more: dict, **files):
    """Ours and transformers', for MERGES and these added tokens."""
    write(folder, tokenizer=whole_file(*more), config={"model_type": "gpt2"}, **files)
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


FOUND = {  # added tokens from id 264 on, a text, its ids
    "of two that begin together the longer": (
        [added("<a>", 264), added("<a><b>", 265)], "<a><b><a>", [265, 264],
    ),
    "the same, in the other order": (
        [added("<a><b>", 264), added("<a>", 265)], "<a><b><a>", [264, 265],
    ),
    "of two that overlap the one further left": (
        [added("STO", 264), added("TOPS", 265)], "STOPS", [264, 47, 50],  # STO, P, S
    ),
    "a normalized one only in what the others leave": (
        [added("TO", 264), added("STOP", 265, special=False)], "STOP", [50, 264, 47],  # S, TO, P
    ),
    "a special one may be normalized": (
        [added("TO", 264, normalized=True), added("STOP", 265)], "STOP TO", [265, 220, 264],
    ),
    "no merge crosses one": ([added("||", 264)], "S||T ST", [50, 264, 51, 220, 260]),
    "one that the merges make keeps its id and is found first": (
        [added("ab", 258, special=False)], "abab", [258, 258],  # 259 without it
    ),
    "one may have the bytes of two merged tokens": (
        [added(" ST", 264, special=False)], "ST ST", [260, 264],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_added_tokens_are_found_as_transformers_finds_them(tmp_path, case):
    tokens, text, ids = FOUND[case]
    ours, theirs = tokenizer_of(tmp_path, *tokens)
    assert ours.encode(text) == theirs.encode(text) == ids
    assert any(token["special"] for token in tokens) or ours.decode(ids) == text


def test_a_role_changes_nothing_about_when_a_listed_token_is_looked_for(tmp_path):
    more = [added("TO", 264, normalized=True), added("OPS", 265)]
    roles = {"tokenizer_class": "GPT2Tokenizer", "pad_token": "TO"}
    ours, theirs = tokenizer_of(tmp_path, *more, tokenizer_config=roles)
    assert ours.encode("TOPS TO") == theirs.encode("TOPS TO") == [51, 265, 220, 264]


def test_an_added_token_may_not_take_the_id_of_another(tmp_path):
    """The files write the byte E9 as "é": transformers takes é for it, and then decodes U+FFFD."""
    theirs = whole_file()["model"]["vocab"]["é"]
    write(tmp_path, tokenizer=whole_file(added("é", theirs)))
    with pytest.raises(ValueError, match="tokenizer.json: the added token 'é' has the id of anoth"):
        load_tokenizer(tmp_path)


# ---- What ends a text ----------------------------------------------------------------------------
STRINGS = {"eos_token": "<end>"}
OBJECT = {"content": "<end>", "single_word": False, "lstrip": False, "rstrip": False}
ENDINGS = [
    ({}, "<|endoftext|>"),
    ({"tokenizer_config": STRINGS}, "<end>"),
    ({"tokenizer_config": {"eos_token": OBJECT | {"__type": "AddedToken"}}}, "<end>"),
    ({"special_tokens_map": {"eos_token": OBJECT}}, "<end>"),
    ({"special_tokens_map": STRINGS, "tokenizer_config": {"eos_token": END_OF_TEXT}}, "<end>"),
    ({"special_tokens_map": {"bos_token": "<end>"}}, "<|endoftext|>"),
    ({"tokenizer_config": {"eos_token": None, "pad_token": "ab"}}, None),
    (
        {
            "special_tokens_map": {"eos_token": "ab"},  # a relic beside the list
            "tokenizer_config": STRINGS
            | {"added_tokens_decoder": {"263": added(END_OF_TEXT, 263), "264": OBJECT}},
        },
        "<end>",
    ),
]


@pytest.mark.parametrize("files, ends", ENDINGS)
def test_the_token_that_ends_a_text_is_the_one_that_transformers_takes(tmp_path, files, ends):
    save_vocabulary(tmp_path, MERGES)
    for entry in files.get("tokenizer_config", {}).get("added_tokens_decoder", {}).values():
        entry.pop("id", None)
    write(tmp_path, config={"model_type": "gpt2"}, added_tokens={"<end>": 264}, **files)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_token_id == theirs.eos_token_id == {"<end>": 264, None: None}.get(ends, 263)
    text = "abab<end>ab<|endoftext|>"
    assert ours.encode(text) == theirs.encode(text)
    ids = ours.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_only_gpt2s_own_class_knows_end_of_text_without_being_told(tmp_path, name):
    """Other classes read the token that nothing makes as letters, so that no text would use it."""
    write(tmp_path, tokenizer=whole_file(added_tokens=[]), config={"model_type": "gpt2"})
    assert load_tokenizer(tmp_path).eos_token_id == 263
    assert AutoTokenizer.from_pretrained(tmp_path).encode(END_OF_TEXT) == [263]
    write(tmp_path, tokenizer_config={"tokenizer_class": name})
    assert len(AutoTokenizer.from_pretrained(tmp_path).encode(END_OF_TEXT)) == 13
    with pytest.raises(ValueError, match=r"1 tokens are .* the first is '<\|endoftext\|>'"):
        load_tokenizer(tmp_path)
    write(tmp_path, tokenizer=whole_file())
    assert load_tokenizer(tmp_path).eos_token_id == 263


@pytest.mark.parametrize(
    "field, value",
    [
        ("additional_special_tokens", ["<end>"]),
        ("extra_special_tokens", [OBJECT | {"normalized": False}]),
        ("extra_special_tokens", {"end": "<end>"}),
        ("image_token", "<end>"),
    ],
)
def test_a_token_in_a_list_of_roles_or_in_a_role_of_another_name_is_special(tmp_path, field, value):
    save_vocabulary(tmp_path, MERGES)
    write(tmp_path, added_tokens={"<end>": 264}, tokenizer_config={field: value, "other": 1})
    assert load_tokenizer(tmp_path).decode([258, 264]) == "ab"
    write(tmp_path, tokenizer_config={field: None})
    assert load_tokenizer(tmp_path).decode([258, 264]) == "ab<end>"


def test_end_of_text_may_be_the_first_id(tmp_path):
    """Where Hugging Face's trainer puts it when it is told of it."""
    save_vocabulary(tmp_path, MERGES)
    edit_vocab(tmp_path, lambda vocab: vocab.update({t: (i + 1) % 264 for t, i in vocab.items()}))
    tok = load_tokenizer(tmp_path)
    assert tok.eos_token_id == 0 and tok.encode("abab<|endoftext|>") == [260, 0]


# ---- What reads a text in another way is refused -------------------------------------------------
def edit_vocab(folder: Path, change) -> None:
    """Let `change` alter the dictionary in vocab.json."""
    path = folder / "vocab.json"
    vocab = json.loads(path.read_text(encoding="utf-8"))
    change(vocab)
    path.write_text(json.dumps(vocab), encoding="utf-8")


def put(whole: dict, name: str, value: object) -> dict:
    """A copy of nested fields with one of them changed: `put(whole, "model.type", "Unigram")`."""
    key, _, rest = name.partition(".")
    return whole | {key: put(whole.get(key) or {}, rest, value) if rest else value}


TEMPLATE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]}
TEMPLATE |= {"pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}
ENDS = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [263], "tokens": ["<|endoftext|>"]}}
WITH_END = TEMPLATE | {"special_tokens": ENDS}
WITH_END["single"] = [*TEMPLATE["single"], {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}]


@pytest.mark.parametrize(
    "field, value",
    [
        ("normalizer", {"type": "Lowercase"}),
        ("pre_tokenizer.add_prefix_space", True),
        ("pre_tokenizer.use_regex", False),
        ("pre_tokenizer", None),
        ("post_processor", WITH_END),
        ("post_processor", TEMPLATE | {"single": TEMPLATE["single"] * 2}),
        ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}),
        ("model.dropout", 0.5),
        ("model.continuing_subword_prefix", "##"),
        ("model.end_of_word_suffix", "</w>"),
        ("model.byte_fallback", True),
        ("model.ignore_merges", True),
        ("model.type", "WordPiece"),
    ],
)
def test_a_field_of_tokenizer_json_that_would_change_the_ids_is_refused_by_name(
    tmp_path, field, value
):
    write(tmp_path, tokenizer=put(whole_file(), field, value))
    name = field.split(".")[0]
    with pytest.raises(
        ValueError, match=rf"tokenizer.json: {name}[\w.]* is .*, only .* gives GPT-2"
    ):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize(
    "field, value",
    [
        ("truncation", {"max_length": 2, "strategy": "LongestFirst", "stride": 0}),
        ("padding", {"strategy": {"Fixed": 9}, "pad_id": 0, "pad_token": "!"}),
        ("post_processor", TEMPLATE),
        ("post_processor", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}),
        ("pre_tokenizer.trim_offsets", False),
        ("decoder.add_prefix_space", True),
        ("model.dropout", 0.0),
        ("model.continuing_subword_prefix", ""),
        ("model.type", None),
        ("new_field", {"anything": 1}),
    ],
)
def test_a_field_that_changes_no_id_is_no_reason_to_refuse(tmp_path, field, value):
    write(tmp_path, tokenizer=put(whole_file(), field, value))
    assert load_tokenizer(tmp_path).encode("STOP it<|endoftext|>")[:2] == [260, 261]
    assert read_vocabulary(tmp_path) == read_vocabulary(write(tmp_path, tokenizer=whole_file()))


@pytest.mark.parametrize(
    "field, value",
    [
        ("tokenizer_class", "BertTokenizer"),
        ("tokenizer_class", ["GPT2Tokenizer"]),
        ("add_prefix_space", True),
        ("add_bos_token", True),
        ("add_eos_token", True),
        ("split_special_tokens", True),
    ],
)
def test_a_field_of_tokenizer_config_that_would_change_the_ids_is_refused_by_name(
    tmp_path, field, value
):
    save_vocabulary(tmp_path, MERGES)
    write(tmp_path, tokenizer_config={field: value})
    with pytest.raises(
        ValueError, match=rf"tokenizer_config.json: {field} is .*, only .* gives GP"
    ):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip"])
def test_an_added_token_that_looks_at_its_neighbours_is_refused(tmp_path, flag):
    complaint = f"{flag} is set for '<m>', only false is served"
    write(tmp_path, tokenizer=whole_file(added("<m>", 264, **{flag: True})))
    with pytest.raises(ValueError, match=f"tokenizer.json: {complaint}"):
        read_vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    save_vocabulary(tmp_path, MERGES)
    write(tmp_path, special_tokens_map={"mask_token": added("<m>", 264, **{flag: True})})
    with pytest.raises(ValueError, match=f"special_tokens_map.json, mask_token: {complaint}"):
        read_vocabulary(tmp_path)


# ---- Files that contradict each other or themselves ----------------------------------------------
def test_tokenizer_json_is_believed_before_vocab_json_as_in_transformers(tmp_path):
    save_vocabulary(tmp_path, [(b"x", b"y")])
    ours, theirs = tokenizer_of(tmp_path)
    assert ours.encode("abxy") == theirs.encode("abxy") == [258, 87, 88]


MORE = [added("<a>", 264), added("<b>", 265)]
SAME = [added(END_OF_TEXT, 263), *MORE]
LISTS = {
    "the ids of two are exchanged": [SAME[0], added("<b>", 264), added("<a>", 265)],
    "one is missing in a list of all": SAME[:2],
    "one is too many": [*SAME, added("<c>", 266)],
    "a flag differs": [SAME[0], added("<a>", 264, special=False), SAME[2]],
}


@pytest.mark.parametrize("case", LISTS)
def test_two_lists_of_added_tokens_have_to_agree(tmp_path, case):
    write(tmp_path, tokenizer=whole_file(*MORE))
    write_decoder(tmp_path, LISTS[case])
    odd = "'<[abc]>' (is not the same elsewhere|has the id 264, but its place is 265)"
    with pytest.raises(ValueError, match=rf"tokenizer_config.json: the added token {odd}"):
        read_vocabulary(tmp_path)
    write_decoder(tmp_path, SAME)
    assert len(read_vocabulary(tmp_path).added) == 3


def write_decoder(folder, entries):
    decoder = {str(entry["id"]): entry for entry in entries}
    write(folder, tokenizer_config={"added_tokens_decoder": decoder})


def test_added_tokens_json_may_not_know_more_than_the_other_lists(tmp_path):
    write(tmp_path, tokenizer=whole_file(*MORE), added_tokens={"<a>": 264, "<b>": 265, "<c>": 266})
    with pytest.raises(ValueError, match="added_tokens.json: the added token '<c>' is not the sa"):
        read_vocabulary(tmp_path)
    write(tmp_path, added_tokens={"<a>": 264, "<b>": 265})
    assert len(read_vocabulary(tmp_path).added) == 3


@pytest.mark.parametrize(
    "ids, complaint",
    [
        ({"<a>": 265}, "'<a>' has the id 265, but its place is 264"),
        ({"<a>": 264, "<b>": 266}, "'<b>' has the id 266, but its place is 265"),
        ({"<a>": 0}, "'<a>' has the id 0, but its place is 264"),
        ({"<a>": 10**12}, "'<a>' has the id 1000000000000, but its place is 264"),
        ({"ab": 264}, "'ab' has the id 264, but its place is 258"),
        ({"<|endoftext|>": 264}, "'<|endoftext|>' has the id 264, but its place is 263"),
    ],
)
def test_the_id_of_an_added_token_is_the_next_or_the_one_it_has(tmp_path, ids, complaint):
    save_vocabulary(tmp_path, MERGES)
    for name, content in {
        "added_tokens": ids,
        "tokenizer_config": {"added_tokens_decoder": {str(ids[t]): added(t, 0) for t in ids}},
        "tokenizer": whole_file(added_tokens=[added(t, ids[t]) for t in ids]),
    }.items():
        write(tmp_path, **{name: content})
        with pytest.raises(ValueError) as error:
            read_vocabulary(tmp_path)
        assert str(error.value) == f"{tmp_path / name}.json: the added token {complaint}"
        (tmp_path / f"{name}.json").unlink()


def test_added_tokens_out_of_order_are_refused(tmp_path):
    """transformers' general class counts them in the order of the file, whatever it says."""
    tokens = [added("<b>", 265), added("<a>", 264), added(END_OF_TEXT, 263)]
    write(tmp_path, tokenizer=whole_file(added_tokens=tokens))
    with pytest.raises(ValueError, match="tokenizer.json: added_tokens is not in the order of the"):
        read_vocabulary(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs.encode("<a><b>") == [265, 264]


def test_an_added_token_listed_twice_is_refused(tmp_path):
    write(tmp_path, tokenizer=whole_file(added("<a>", 264), added("<a>", 264)))
    with pytest.raises(ValueError, match="tokenizer.json lists an added token twice"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map"])
def test_a_role_for_a_token_that_the_vocabulary_does_not_have_is_refused(tmp_path, name):
    """transformers would invent an id for it, for which the model has no row."""
    save_vocabulary(tmp_path, MERGES)
    write(tmp_path, **{name: {"pad_token": "[PAD]"}})
    with pytest.raises(ValueError, match=r"has no token '\[PAD\]', but that is the pad_token"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize(
    "entry, complaint",
    [
        (5, "5 is no token"),
        ({"id": 264}, "a dict is no token"),
        (added("", 264), "'' is no token"),
        (added(7, 264), "7 is no token"),
        (added("<a>", None), "the id of '<a>' is None, no integer"),
        (added("<a>", True), "the id of '<a>' is True, no integer"),
        (added("<a>", 264, special="no"), "special or normalized of '<a>' is no boolean"),
        (added("<a>", 264, normalized=[]), "special or normalized of '<a>' is no boolean"),
        (added("a\ud83d", 264), r"'a\\ud83d' holds half of a surrogate pair"),
    ],
)
def test_an_entry_that_is_no_token_is_refused(tmp_path, entry, complaint):
    write(tmp_path, tokenizer=whole_file(added_tokens=[entry]))
    with pytest.raises(ValueError, match=f"tokenizer.json: {complaint}"):
        read_vocabulary(tmp_path)


OTHER_SHAPES = [  # file, its content, what is said
    ("tokenizer_config", [], "tokenizer_config.json holds a list, not one object"),
    ("tokenizer_config", {"eos_token": 5}, "tokenizer_config.json, eos_token: 5 is no token"),
    ("tokenizer_config", {"added_tokens_decoder": []}, "is not an object with ids for keys"),
    ("tokenizer_config", {"added_tokens_decoder": {"x": {}}}, "object with ids for keys"),
    # Python reads no integer of more than 4300 digits.
    ("tokenizer_config", {"added_tokens_decoder": {"9" * 5000: added("<a>", 0)}},
     "tokenizer_config.json: the added token '<a>' has the id 999999999999999, but"),
    ("tokenizer_config", {"extra_special_tokens": "ab"}, "extra_special_tokens is 'ab', not"),
    ("special_tokens_map", {"eos_token": {}}, "map.json, eos_token: a dict is no token"),
    ("added_tokens", ["<a>"], "added_tokens.json holds a list, not one object"),
    ("added_tokens", {"<a>": None}, "added_tokens.json: the id of '<a>' is None"),
    ("added_tokens", {"": 264}, "added_tokens.json: '' is no token"),
    ("tokenizer", whole_file(added_tokens={}), "added_tokens is a dict, not a list"),
    ("tokenizer", whole_file(model=[]), "tokenizer.json: the vocabulary is not one object"),
    ("tokenizer", put(whole_file(), "model.merges", {}), "model.merges is a dict, not a list"),
    ("tokenizer", put(whole_file(), "model.merges", [7]), "merge 1: 7 is not two tokens"),
    ("tokenizer", put(whole_file(), "model.merges", [["a", 7]]), "merge 1: a list is not two"),
    ("tokenizer", put(whole_file(), "model.merges", []), "7 tokens are neither bytes nor merg"),
]  # fmt: skip


@pytest.mark.parametrize("file, content, complaint", OTHER_SHAPES)
def test_a_file_of_another_shape_is_refused_by_name(tmp_path, file, content, complaint):
    save_vocabulary(tmp_path, MERGES)
    write(tmp_path, **{file: content})
    with pytest.raises(ValueError) as error:
        read_vocabulary(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and complaint in str(error.value)


# ---- vocab.json and merges.txt -------------------------------------------------------------------
def test_a_space_is_written_with_another_character_in_the_files():
    assert BYTE_TO_CHAR[ord(" ")] == "Ġ" and BYTE_TO_CHAR[ord("\n")] == "Ċ"
    assert BYTE_TO_CHAR[ord("a")] == "a"
    assert set(BYTE_TO_CHAR.values()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_a_folder_without_tokenizer_files_has_no_vocabulary(tmp_path):
    assert read_vocabulary(tmp_path) is None
    assert read_vocabulary(str(tmp_path / "absent")) is None
    write(tmp_path, tokenizer_config={}, special_tokens_map={}, config={})  # they hold no tokens
    assert read_vocabulary(tmp_path) is None


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_one_file_without_the_other_is_an_error(tmp_path, name):
    save_vocabulary(tmp_path, MERGES)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing: a tokenizer is vocab.json and merg"):
        read_vocabulary(tmp_path)


ROTTEN = [
    (b"", "is not JSON"),
    (b"[" * 100_000, "is not JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),  # Python reads integers of 4300 digits
    (b"\xff\xfe\x00\x01", "cannot be read as UTF-8 text"),
    (b'["a", "b"]', "holds a list, not one object"),
]


@pytest.mark.parametrize("name", ["tokenizer", "vocab", "tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize("content, complaint", ROTTEN)
def test_a_file_that_is_no_object_is_refused_by_name(tmp_path, name, content, complaint):
    save_vocabulary(tmp_path, MERGES)
    (tmp_path / f"{name}.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_vocabulary(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / name}.json {complaint}")


@pytest.mark.parametrize(
    "vocab, complaint",
    [
        ({"a": "0"}, "the vocabulary is not one object of tokens and their ids"),
        ({"a": True}, "the vocabulary is not one object of tokens and their ids"),
        ({"a": 0, "b": 0}, "the ids of its 2 tokens are not 0, 1, 2 and so on"),
        ({"a": 10**12}, "the ids of its 1 tokens are not 0, 1, 2 and so on"),
        ({"!": 0}, "no token for the byte 0x22"),
    ],
)
def test_a_vocabulary_with_holes_is_refused_by_name(tmp_path, vocab, complaint):
    save_vocabulary(tmp_path, MERGES)
    both = {"vocab": vocab, "tokenizer": put(whole_file(), "model.vocab", vocab)}
    for name, content in both.items():
        write(tmp_path, **{name: content})
        with pytest.raises(ValueError) as error:
            read_vocabulary(tmp_path)
        assert str(error.value).startswith(f"{tmp_path / name}.json: {complaint}")


MERGE_FAULTS = [  # line 2 behind "S T"
    ("O P E", "is not two tokens with one space between them"),
    ("ST OP", "joins a token that is neither a byte nor made further up"),
    ("X Y", "makes a token that the vocabulary does not have"),
    ("S T", "makes id 260 after id 260: ids have to rise"),
]


@pytest.mark.parametrize("line, complaint", MERGE_FAULTS)
def test_damaged_merges_are_refused_with_file_and_place(tmp_path, line, complaint):
    save_vocabulary(tmp_path, MERGES)
    (tmp_path / "merges.txt").write_text(f"S T\n{line}", encoding="utf-8")
    with pytest.raises(ValueError, match=f"merges.txt, line 2: '{line}' {complaint}"):
        read_vocabulary(tmp_path)
    for merges in (["S T", line], [["S", "T"], line.split(" ")]):
        write(tmp_path, tokenizer=put(whole_file(), "model.merges", merges))
        with pytest.raises(ValueError, match=f"tokenizer.json, merge 2: '{line}' {complaint}"):
            read_vocabulary(tmp_path)


def test_a_token_that_nothing_makes_and_no_file_adds_is_refused(tmp_path):
    save_vocabulary(tmp_path, MERGES)
    edit_vocab(tmp_path, lambda vocab: vocab.update({"<|im_start|>": 264}))
    with pytest.raises(ValueError, match=r"vocab.json: 1 tokens .* the first is '<\|im_start\|>'"):
        read_vocabulary(tmp_path)
    write(tmp_path, tokenizer_config={"bos_token": "<|im_start|>"})
    assert load_tokenizer(tmp_path).encode("<|im_start|>ab") == [264, 258]


def test_a_merge_of_number_signs_is_no_comment_and_windows_line_ends_do_no_harm(tmp_path):
    save_vocabulary(tmp_path, [(b"#", b"#"), (b"##", b"#")])
    assert load_tokenizer(tmp_path).encode("###") == [257]
    path = tmp_path / "merges.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_tokenizer(tmp_path).encode("###") == [257]
    path.write_bytes(b"# #\n## #\n")  # without the line that names the version
    assert load_tokenizer(tmp_path).encode("###") == [257]


# ---- Anything at all -----------------------------------------------------------------------------
NAMES = ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"]
NAMES += ["vocab.json", "merges.txt"]


def fuzz(folder: Path, facts: dict, rounds: int) -> tuple[int, int]:
    """Damage one file at a time: (refused, read). A tokenizer that loads must encode a text."""
    rng = random.Random(0)
    folders = [layout(folder / layout.__name__, facts) for layout in LAYOUTS]
    counts = [0, 0]
    for _ in range(rounds):
        at = rng.choice(folders)
        path = at / rng.choice([name for name in NAMES if (at / name).exists()])
        good = path.read_bytes()
        is_blind = path.suffix == ".txt" or rng.random() < 0.5
        path.write_bytes((damage_blindly if is_blind else damage_json)(good, rng))
        try:
            tokenizer = load_tokenizer(at)
        except ValueError as error:
            counts[0] += 1
            assert str(error).startswith(str(at)), error
            assert len(str(error)) < 600
        else:
            counts[1] += 1
            if tokenizer is not None:
                assert tokenizer.vocab_size <= 420
                assert tokenizer.decode(tokenizer.encode("the hen")) == "the hen"
        path.write_bytes(good)
    return tuple(counts)


@pytest.mark.parametrize("rounds", [500, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_damaged_file_is_refused_or_read_and_nothing_else(tmp_path, facts, rounds):
    refused, read = fuzz(tmp_path, facts, rounds)
    assert refused > rounds * 0.4 and read > rounds * 0.04
