"""Text to ids and back; then back again token by token, with whole characters and stop strings.

The oracles: Hugging Face's `tokenizers` for the ids, decoding everything at once for the stream,
and decoding everything again after each token for the stop strings. Which files make a tokenizer is
tested in test_vocabulary.py.
"""

import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import gpt2
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from checkpoints.tokenizer import (
    GPT2_FILES,
    BPETokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    save_vocabulary,
)
from checkpoints.vocabulary import END_OF_TEXT, AddedToken, Vocabulary
from outputs import StreamDecoder

WITHOUT_DEADLINE = settings(deadline=None)  # a busy machine is no reason to fail
DATA = Path(os.environ.get("PAGEDGPT_DATA", "no such folder")) / "tokenizer"
NEEDS_DATA = pytest.mark.skipif(
    not DATA.is_dir(), reason="PAGEDGPT_DATA names no folder with GPT-2's own tokenizer files"
)

# Characters are cut as GPT-2 cuts them, and "ab" is a token beside its letters, so that a stop
# string meets every kind of seam.
MERGES = [(b" ", b"\xf0"), (b" \xf0", b"\x9f"), (b"\xe7", b"\x8c"), (b"\xf0", b"\x9f")]
MERGES += [(b"a", b"b"), (b"ab", b"ab"), (b"\xab", b"b"), (b"a", b"\xe7"), (b"S", b"T")]
MERGES += [(b"O", b"P"), (b"E", b"P")]

PARAGRAPHS = [
    "There was once a hen who lived with her three chicks beside the old mill. She'd say to them",
    "every morning: don't go near the water, it's deep, and you're small; I'll call you.",
    "In 1812 they counted 365 days and 12 months. The hen couldn't count beyond 33, nor the fox.",
    "“Who are you?” asked the fox. — “I am the cat 🐈, and this is my kin 🐈‍⬛; we've no fear.”",
    "  indented\n\n\n    more indented\t\ttabs   and trailing blanks   \n",
    "猫は椅子の上で寝ています。猫が起きました。我想在家工作。你好，世界。서울에서 만나요.",
    "naïve café, cafe\u0301, Ångström, A\u030angstro\u0308m, straße, Жили-были дед да баба.",
] * 3

HARD_TEXTS = [
    "",
    "The hen's chicks: they'd, we'll, I'm, you've, it's, who're, THEY'D, 's't're",
    "  two  three   four    \n\n\n\t\t \r\n end   ",
    "\u00a0\u2003\u3000 blanks that are not a space \u2028 and a line mark \x85",
    "0 12 345 6789 1234567890 3.14 ½ ² ٣ 四",
    "🐈 🐈‍⬛ 👩‍🚀 👨‍👩‍👧‍👦 🇯🇵 👍🏽 ☺️ 😶‍🌫️",
    "猫猫 我想在 apple 工作 서울에서 ประเทศไทย ខ្មែរ",
    "e\u0301 a\u030a o\u0308\u0304\u0323 Z\u0351\u036b\u0343 न्दी",
    "def f(x):\n    return x**2  # a_b-c!?... <|im_start|> \x00\x01\x7f\xad",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> BPETokenizer:
    """256 bytes, the merges above, and <|endoftext|> as id 267."""
    folder = tmp_path_factory.mktemp("by_hand")
    save_vocabulary(folder, MERGES)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[HuggingFaceTokenizer, BPETokenizer]:
    """Hugging Face's tokenizer, trained on the paragraphs, and ours, read from its files."""
    theirs = HuggingFaceTokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator(PARAGRAPHS, trainer)
    theirs.add_special_tokens([END_OF_TEXT])
    folder = tmp_path_factory.mktemp("trained")
    theirs.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocab[END_OF_TEXT] = theirs.token_to_id(END_OF_TEXT)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    return theirs, load_tokenizer(folder)


def ids_of(tokenizer: BPETokenizer, *pieces: bytes) -> list[int]:
    """The ids of tokens named by their bytes, where a test has to say which seams there are."""
    known = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return [known[piece] for piece in pieces]


def stream(decoder: StreamDecoder, ids: list[int]) -> list[str]:
    """What each push returns, and last what `finish` does."""
    return [*(decoder.push(token_id) for token_id in ids), decoder.finish()]


# ---- Text to ids and back ------------------------------------------------------------------------
def test_a_text_becomes_ids_and_the_ids_become_the_text(tokenizer):
    assert tokenizer.encode("abab!") == [261, 0]  # "!" is the first printable byte: id 0
    assert tokenizer.encode("STOP 🐈") == [264, 265, 257, 238, 230]  # ST, OP, 20 F0 9F, 90, 88
    assert tokenizer.decode([264, 265, 257, 238, 230]) == "STOP 🐈"


@given(text=st.text())
@WITHOUT_DEADLINE
def test_any_text_at_all_comes_back_whole(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", [*PARAGRAPHS[: len(PARAGRAPHS) // 3], *HARD_TEXTS])
def test_the_ids_are_those_of_hugging_face(trained, text):
    theirs, ours = trained
    assert ours.encode(text) == theirs.encode(text).ids


@given(
    text=st.lists(st.sampled_from([*" \n\t\r'sedtl1٣½aé猫.-", "🐈", "\u0301", "\u3000"])).map(
        "".join
    )
)
@settings(max_examples=300, deadline=None)
def test_the_ids_are_those_of_hugging_face_wherever_words_begin_and_end(trained, text):
    theirs, ours = trained
    assert ours.encode(text) == theirs.encode(text).ids


@NEEDS_DATA
def test_the_files_of_gpt2_give_the_published_ids(tmp_path):
    shutil.copy(DATA / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(DATA / "vocab.bpe", tmp_path / "merges.txt")
    gpt2 = load_tokenizer(tmp_path)
    assert (gpt2.vocab_size, gpt2.eos_token_id) == (50257, 50256)
    assert gpt2.encode("hello 👋 world 🌍") == [31373, 50169, 233, 995, 12520, 234, 235]
    vectors = json.loads((DATA / "gpt2_token_vectors.json").read_text(encoding="utf-8"))
    assert len(vectors) > 30
    for vector in vectors:
        assert gpt2.encode(vector["text"]) == vector["ids"], vector
        assert gpt2.decode(vector["ids"]) == vector["text"], vector


# ---- Special, unknown and broken -----------------------------------------------------------------
def test_end_of_text_is_one_token_and_leaves_no_text(tokenizer):
    assert tokenizer.eos_token_id == 267 and tokenizer.vocab_size == 268
    assert tokenizer.encode("a<|endoftext|>b") == [64, 267, 65]
    assert tokenizer.decode([64, 267, 65]) == "ab"
    assert tokenizer.token_bytes(267) == b""
    assert tokenizer.token_text(267) == "<|endoftext|>"


def test_an_id_without_a_token_leaves_no_text(tokenizer):
    """Tables are padded to round sizes, so a model can draw an id that no vocabulary has."""
    for unknown in (268, 50304, -1):
        assert tokenizer.token_bytes(unknown) == b""
        assert tokenizer.token_text(unknown) == ""
        assert tokenizer.decode([64, unknown, 65]) == "ab"
        assert "".join(stream(StreamDecoder(tokenizer), [64, unknown, 65])) == "ab"


def test_a_piece_of_a_character_alone_is_shown_as_the_replacement_mark(tokenizer):
    assert tokenizer.token_bytes(257) == b" \xf0\x9f"
    assert tokenizer.token_text(257) == " \ufffd"
    assert tokenizer.token_text(261) == "abab"


def test_half_of_a_surrogate_pair_is_refused_and_not_replaced(tokenizer):
    with pytest.raises(ValueError, match=r"character 2 of the text is U\+D83D, half of a"):
        tokenizer.encode("ab\ud83d")


def test_a_vocabulary_without_end_of_text_reads_it_as_letters(tmp_path):
    save_vocabulary(tmp_path, MERGES)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    del vocab[END_OF_TEXT]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    tok = load_tokenizer(tmp_path)
    assert tok.eos_token_id is None and tok.vocab_size == 267
    assert tok.decode(tok.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


def with_added(tokenizer: BPETokenizer, *added: AddedToken) -> BPETokenizer:
    """The fixture's 267 bytes and merges, and these tokens after them."""
    ranks = {tokenizer.token_bytes(i): i for i in range(267)}
    return BPETokenizer(Vocabulary(ranks, added, added[0].content))


def test_an_added_word_may_end_or_begin_a_stop_string(tokenizer):
    tok = with_added(tokenizer, AddedToken("STOP", 267, False, True))
    decoder = StreamDecoder(tok, stop=["OPS"])
    assert stream(decoder, [64, 267, 50, 64]) == ["a", "ST", "", "", ""]
    assert (decoder.text, decoder.stopped) == ("aST", "OPS")


def test_a_text_that_is_itself_an_added_word_is_searched_for_special_tokens_first(tokenizer):
    """The whole text is a word of the second round, and a token of the first lies within it."""
    word = AddedToken("a[x]b", 268, special=False, normalized=True)
    tok = with_added(tokenizer, AddedToken("[x]", 267, special=True, normalized=False), word)
    assert tok.encode("a[x]b") == [64, 267, 65]
    tok = with_added(tokenizer, AddedToken("[x]", 267, special=True, normalized=True), word)
    assert tok.encode("a[x]b") == [268]  # in the same round the one further left


def test_characters_that_mean_something_in_a_pattern_are_only_characters(tokenizer):
    names = ["(.*)", "a|b", "[x]", "\\d+", "$", "^"]
    tok = with_added(tokenizer, *(AddedToken(n, 267 + i, True, False) for i, n in enumerate(names)))
    assert tok.encode("".join(names)) == [267, 268, 269, 270, 271, 272]
    assert tok.encode("ab1") == [260, 16]


# ---- Where a tokenizer comes from ----------------------------------------------------------------


# The names of GPT-2's two files in tiktoken's cache: the SHA-1 of where they were fetched.
CACHED = {
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
}


@pytest.fixture
def no_network(monkeypatch):
    """Any lookup of an address and any connection raises an AssertionError."""

    def refuse(*args, **kwargs):
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def cache(tmp_path, monkeypatch, no_network) -> Path:
    """An empty cache of tiktoken's."""
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    return folder


def test_gpt2_is_none_where_tiktoken_has_not_fetched_it(cache, monkeypatch, tmp_path):
    assert gpt2_tokenizer() is None
    (cache / CACHED["vocab.bpe"]).write_bytes(b"one of the two")
    assert gpt2_tokenizer() is None
    (cache / CACHED["encoder.json"]).mkdir()
    assert gpt2_tokenizer() is None
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "other"))  # the third place it looks in
    assert gpt2_tokenizer() is None


def test_gpt2_is_none_where_tiktoken_is_told_to_keep_nothing(cache, monkeypatch):
    """An empty name is that order, and not the folder that happens to be the current one."""
    for name in CACHED.values():
        (cache / name).write_bytes(b"not looked at")
    monkeypatch.chdir(cache)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    assert gpt2_tokenizer() is None


def test_a_damaged_file_in_the_cache_is_refused_and_left_alone(cache):
    for name in CACHED:
        (cache / CACHED[name]).write_bytes(b"{}")
    with pytest.raises(ValueError) as error:
        gpt2_tokenizer()
    path = cache / CACHED["encoder.json"]
    assert str(error.value) == f"{path} is not GPT-2's whole encoder.json: delete it"
    assert path.read_bytes() == b"{}"


@NEEDS_DATA
@pytest.mark.parametrize("place", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "the default"])
def test_gpt2_from_tiktokens_cache_is_the_gpt2_of_its_files(cache, monkeypatch, tmp_path, place):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    folder = cache
    if place == "the default":
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        folder = tmp_path / "data-gym-cache"
        folder.mkdir()
    else:
        monkeypatch.setenv(place, str(cache))
    for name in CACHED:
        shutil.copy(DATA / name, folder / CACHED[name])
    shutil.copy(DATA / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(DATA / "vocab.bpe", tmp_path / "merges.txt")
    ours, from_files = gpt2_tokenizer(), load_tokenizer(tmp_path)
    assert (ours.vocab_size, ours.eos_token_id) == (50257, 50256)
    vectors = json.loads((DATA / "gpt2_token_vectors.json").read_text(encoding="utf-8"))
    texts = [vector["text"] + END_OF_TEXT for vector in vectors]
    assert [ours.encode(text) for text in texts] == [from_files.encode(text) for text in texts]
    assert ours.encode(texts[0]) == [*vectors[0]["ids"], 50256]


@NEEDS_DATA
@pytest.mark.parametrize("name", CACHED)
def test_one_byte_of_difference_in_the_cache_is_seen(cache, name):
    """Some such files are whole vocabularies, with two ids exchanged."""
    for other in CACHED:
        data = (DATA / other).read_bytes()
        assert hashlib.sha256(data).hexdigest() == GPT2_FILES[other]
        (cache / CACHED[other]).write_bytes(data + b"\n" * (other == name))
    with pytest.raises(ValueError, match=f"is not GPT-2's whole {name}: delete it"):
        gpt2_tokenizer()


@NEEDS_DATA
def test_tiktoken_itself_finds_gpt2_under_these_names(cache):
    """So the names are right: without a network it reads the files that were put there."""
    for name in CACHED:
        shutil.copy(DATA / name, cache / CACHED[name])
    facts = gpt2()
    assert len(facts["mergeable_ranks"]) == 50256
    text = "hello 👋 world 🌍"
    assert gpt2_tokenizer().encode(text) == tiktoken.Encoding(**facts).encode(text)
