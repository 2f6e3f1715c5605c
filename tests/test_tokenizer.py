"""Text to ids and back; then back again token by token, with whole characters and stop strings.

The oracles: Hugging Face's `tokenizers` for the ids, decoding everything at once for the stream,
and decoding everything again after each token for the stop strings.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

import tokenizer as tokenizer_file
from tokenizer import (
    BYTE_TO_CHAR,
    END_OF_TEXT,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    save_vocabulary,
)

WITHOUT_DEADLINE = settings(deadline=None)  # a busy machine is no reason to fail
DATA = Path(os.environ.get("PAGEDGPT_DATA", "no such folder")) / "tokenizer"

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
def tokenizer(tmp_path_factory) -> Tokenizer:
    """256 bytes, the merges above, and <|endoftext|> as id 267."""
    folder = tmp_path_factory.mktemp("by_hand")
    save_vocabulary(folder, MERGES)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[HuggingFaceTokenizer, Tokenizer]:
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


def ids_of(tokenizer: Tokenizer, *pieces: bytes) -> list[int]:
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


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_every_text_comes_back_whole(tokenizer, trained, text):
    for tok in (tokenizer, trained[1]):
        assert tok.decode(tok.encode(text)) == text


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


def test_a_trained_vocabulary_does_merge(trained):
    """If no merge were applied, the equality with Hugging Face would be one of single bytes."""
    ids = trained[1].encode(" the hen")
    assert [trained[1].token_bytes(i) for i in ids] == [b" the", b" hen"]


def is_piece(data: bytes) -> bool:
    """Whether these bytes are not whole characters."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False


@pytest.mark.skipif(
    not DATA.is_dir(), reason="PAGEDGPT_DATA names no folder with GPT-2's own tokenizer files"
)
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
    assert sum(is_piece(gpt2.token_bytes(i)) for i in range(50256)) == 344  # tokenizer.py says so


# ---- Special, unknown and broken -----------------------------------------------------------------
def test_end_of_text_is_one_token_and_leaves_no_text(tokenizer):
    assert tokenizer.eos_token_id == 267 and tokenizer.vocab_size == 268
    assert tokenizer.encode("a<|endoftext|>b") == [64, 267, 65]
    assert tokenizer.decode([64, 267, 65]) == "ab"
    assert tokenizer.token_bytes(267) == b""
    assert tokenizer.token_text(267) == "<|endoftext|>"


def test_end_of_text_is_special_for_hugging_face_in_the_same_places(trained):
    theirs, ours = trained
    text = "the hen<|endoftext|> <|endoftext|><|endoftext|>the fox <|endoftex|>"
    assert ours.encode(text) == theirs.encode(text).ids
    assert ours.encode(text).count(ours.eos_token_id) == 3
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text).ids)


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
    edit_vocab(tmp_path, lambda vocab: vocab.pop(END_OF_TEXT))
    tok = load_tokenizer(tmp_path)
    assert tok.eos_token_id is None and tok.vocab_size == 267
    assert tok.decode(tok.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


# ---- One token at a time -------------------------------------------------------------------------
CAT = [b"\xe7\x8c", b"\xab", b" \xf0\x9f", b"\x90", b"\x88"]  # "猫 🐈" as tokens


def test_a_character_is_sent_by_the_token_that_completes_it(tokenizer):
    assert stream(StreamDecoder(tokenizer), ids_of(tokenizer, *CAT)) == [
        "",
        "猫",
        " ",
        "",
        "🐈",
        "",
    ]


def test_an_emoji_may_be_the_first_thing_in_a_stream(tokenizer):
    ids = ids_of(tokenizer, b"\xf0\x9f", b"\x90", b"\x88", b"a")
    assert stream(StreamDecoder(tokenizer), ids) == ["", "", "🐈", "a", ""]


def test_a_stream_that_ends_within_a_character_shows_one_replacement_mark(tokenizer):
    decoder = StreamDecoder(tokenizer)
    assert stream(decoder, ids_of(tokenizer, *CAT[:4])) == ["", "猫", " ", "", "\ufffd"]
    assert decoder.text == "猫 \ufffd"


def test_a_character_that_can_no_longer_be_completed_does_not_wait_for_the_end(tokenizer):
    ids = ids_of(tokenizer, b"\xf0\x9f", b"a", b"\xff", b"b")
    assert stream(StreamDecoder(tokenizer), ids) == ["", "\ufffda", "\ufffd", "b", ""]


def test_an_accent_follows_its_letter_and_a_family_comes_person_by_person(tokenizer):
    """What is whole is a code point. A reader's character may be several, and none is the last."""
    accented = stream(StreamDecoder(tokenizer), tokenizer.encode("e\u0301"))
    assert [text for text in accented if text] == ["e", "\u0301"]
    family = stream(StreamDecoder(tokenizer), tokenizer.encode("👩‍👧"))
    assert [text for text in family if text] == ["👩", "\u200d", "👧"]


class NaiveDecoder(StreamDecoder):
    """What most people write first: decode each token when it comes."""

    def push(self, token_id: int) -> str:
        return self._send(self._tokenizer.decode([token_id]))


def check_stream(decoder: StreamDecoder, tokenizer: Tokenizer, ids: list[int]) -> None:
    """The whole promise: what was sent is always a beginning of what decoding at once gives."""
    whole, so_far = tokenizer.decode(ids), ""
    for piece in stream(decoder, ids):
        so_far += piece
        assert whole.startswith(so_far)  # so no U+FFFD in it that the text does not have
    assert so_far == decoder.text == whole


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_a_stream_is_the_text_for_emoji_cjk_and_accents(tokenizer, trained, text):
    for tok in (tokenizer, trained[1]):
        check_stream(StreamDecoder(tok), tok, tok.encode(text))


@given(text=st.text())
@WITHOUT_DEADLINE
def test_a_stream_is_the_text_for_any_text(tokenizer, text):
    check_stream(StreamDecoder(tokenizer), tokenizer, tokenizer.encode(text))


# Bytes that make and break UTF-8: pieces of 猫 and 🐈, an overlong C0 80, a surrogate's ED A0, "A".
FRAGMENTS = st.sampled_from(
    [0xE7, 0x8C, 0xAB, 0xF0, 0x9F, 0x90, 0x88, 0xC0, 0x80, 0xED, 0xA0, 0xFF, 65]
)


@given(data=st.lists(FRAGMENTS).map(bytes))
@example(data=b"\xf0\x9f\x90\xf0\x9f\x90\x88\xe7\x8c")
@WITHOUT_DEADLINE
def test_a_stream_is_the_text_for_bytes_that_are_no_text(tokenizer, data):
    ids = ids_of(tokenizer, *(bytes([byte]) for byte in data))
    assert tokenizer.decode(ids) == data.decode("utf-8", errors="replace")
    check_stream(StreamDecoder(tokenizer), tokenizer, ids)


@given(ids=st.lists(st.integers(min_value=-1, max_value=270)))
@WITHOUT_DEADLINE
def test_a_stream_is_the_text_for_any_ids_special_and_unknown_ones_too(tokenizer, ids):
    check_stream(StreamDecoder(tokenizer), tokenizer, ids)


def test_decoding_each_token_alone_breaks_that_promise(tokenizer):
    """The check above can fail: a decoder that keeps no bytes does not pass it."""
    ids = ids_of(tokenizer, *CAT)
    assert "".join(stream(NaiveDecoder(tokenizer), ids)) == "\ufffd\ufffd \ufffd\ufffd\ufffd"
    with pytest.raises(AssertionError):
        check_stream(NaiveDecoder(tokenizer), tokenizer, ids)


# ---- Stop strings --------------------------------------------------------------------------------
def test_the_text_ends_before_a_stop_string_that_straddles_tokens(tokenizer):
    decoder = StreamDecoder(tokenizer, stop=["STOP"])
    ids = ids_of(tokenizer, b"ab", b" ", b"ST", b"OP", b"!")
    assert stream(decoder, ids) == ["ab", " ", "", "", "", ""]
    assert (decoder.text, decoder.stopped) == ("ab ", "STOP")


def test_what_only_looked_like_a_stop_string_is_sent_after_all(tokenizer):
    decoder = StreamDecoder(tokenizer, stop=["STOP"])
    assert stream(decoder, ids_of(tokenizer, b"ST", b"EP", b"S")) == ["", "STEP", "", "S"]
    assert (decoder.text, decoder.stopped) == ("STEPS", None)


def test_the_beginning_of_a_stop_string_inside_a_failed_one_is_kept(tokenizer):
    decoder = StreamDecoder(tokenizer, stop=["ababa"])
    ids = ids_of(tokenizer, b"abab", b"b", b"abab", b"abab")
    assert stream(decoder, ids) == ["", "ababb", "", "", ""]
    assert (decoder.text, decoder.stopped) == ("ababb", "ababa")


def test_a_stop_string_may_begin_and_end_within_tokens(tokenizer):
    decoder = StreamDecoder(tokenizer, stop=["P S"])
    assert stream(decoder, ids_of(tokenizer, b"EP", b" ", b"ST")) == ["E", "", "", ""]
    assert (decoder.text, decoder.stopped) == ("E", "P S")


def test_a_stop_string_may_end_with_a_character_of_many_tokens(tokenizer):
    decoder = StreamDecoder(tokenizer, stop=[" 🐈"])
    assert stream(decoder, ids_of(tokenizer, *CAT)) == ["", "猫", "", "", "", ""]
    assert (decoder.text, decoder.stopped) == ("猫", " 🐈")


def test_the_earliest_of_several_stop_strings_wins_and_then_the_first_listed(tokenizer):
    def first_stop(*stop: str) -> tuple[str, str | None]:
        decoder = StreamDecoder(tokenizer, stop=stop)
        stream(decoder, ids_of(tokenizer, b"ST", b"abab", b"EP"))
        return decoder.text, decoder.stopped

    assert first_stop("ba", "ab") == ("ST", "ab")
    assert first_stop("abab", "ab") == ("ST", "abab")
    assert first_stop("ab", "abab") == ("ST", "ab")


def test_generation_ends_at_the_first_complete_stop_string_though_a_longer_began_before(tokenizer):
    """When "b" comes, "ab" is there, and "STabab" may never be."""
    decoder = StreamDecoder(tokenizer, stop=["STabab", "ab"])
    assert stream(decoder, ids_of(tokenizer, b"ST", b"a", b"b", b"ab")) == ["", "", "ST", "", ""]
    assert (decoder.text, decoder.stopped) == ("ST", "ab")


def test_nothing_follows_a_stop(tokenizer):
    decoder = StreamDecoder(tokenizer, stop=["!"])
    assert stream(decoder, tokenizer.encode("ab!ab!")) == ["ab", "", "", "", ""]
    assert decoder.finish() == "" and decoder.text == "ab"


def test_the_replacement_mark_itself_can_be_a_stop_string(tokenizer):
    decoder = StreamDecoder(tokenizer, stop=["\ufffd"])
    assert stream(decoder, ids_of(tokenizer, b"a", b"\xe7\x8c")) == ["a", "", ""]
    assert (decoder.text, decoder.stopped) == ("a", "\ufffd")


def test_a_single_string_is_one_stop_string_and_an_empty_one_is_refused(tokenizer):
    assert stream(StreamDecoder(tokenizer, stop="TO"), ids_of(tokenizer, b"ST", b"a"))[0] == "S"
    with pytest.raises(ValueError, match="a stop string is empty"):
        StreamDecoder(tokenizer, stop=["a", ""])


def test_stop_strings_in_the_text_of_the_first_min_tokens_do_not_count(tokenizer):
    ids = ids_of(tokenizer, b"ab", b"ab", b" ", b"ab", b" ")
    decoder = StreamDecoder(tokenizer, stop=["ab"], min_tokens=1)
    assert stream(decoder, ids) == ["ab", "", "", "", "", ""]
    decoder = StreamDecoder(tokenizer, stop=["ab"], min_tokens=2)
    assert stream(decoder, ids) == ["ab", "ab", " ", "", "", ""]
    decoder = StreamDecoder(tokenizer, stop=["ab"], min_tokens=9)
    assert "".join(stream(decoder, ids)) == "abab ab " and decoder.stopped is None


def test_a_stop_string_may_begin_within_the_first_min_tokens_but_has_to_end_after(tokenizer):
    ids = ids_of(tokenizer, b"ST", b"OP", b"ST", b"OP")
    decoder = StreamDecoder(tokenizer, stop=["STOP"], min_tokens=1)
    assert stream(decoder, ids) == ["", "", "", "", ""]
    assert (decoder.text, decoder.stopped) == ("", "STOP")
    decoder = StreamDecoder(tokenizer, stop=["STOP"], min_tokens=2)
    assert stream(decoder, ids) == ["", "STOP", "", "", ""]
    assert (decoder.text, decoder.stopped) == ("STOP", "STOP")


def settled_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of these ids without the character that may still be unfinished at their end."""
    data = b"".join(tokenizer.token_bytes(token_id) for token_id in ids)
    for length in (3, 2, 1):  # bytes of a character of four, at most three of them are there
        try:
            data[-length:].decode("utf-8")
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return data[:-length].decode("utf-8", errors="replace")
    return data.decode("utf-8", errors="replace")


def stop_oracle(
    tokenizer: Tokenizer, ids: list[int], stop: list[str], min_tokens: int
) -> tuple[str, str | None, int]:
    """After each token decode all of them and look everywhere: (text, stop string, tokens used)."""
    begin = len(settled_text(tokenizer, ids[:min_tokens]))
    texts = [settled_text(tokenizer, ids[:n]) for n in range(len(ids) + 1)]
    whole = tokenizer.decode(ids)  # at the end of the generation nothing is unfinished any more
    for used, text in [*enumerate(texts), (len(ids), whole)]:
        places = [(text.find(s, max(0, begin - len(s) + 1)), n) for n, s in enumerate(stop)]
        found = [(at, n) for at, n in places if at >= 0]
        if found and used > min_tokens:
            at, n = min(found)
            return text[:at], stop[n], used
    return whole, None, len(ids)


def check_stops(decoder: StreamDecoder, tokenizer, ids, stop, min_tokens) -> None:
    """Equal to the oracle, at the same token, and nothing sent that is not in the final text."""
    text, stopped, used = stop_oracle(tokenizer, ids, stop, min_tokens)
    pieces, longest = [], max(map(len, stop), default=1)
    for n, token_id in enumerate(ids, start=1):
        assert decoder.stopped is None or n > used
        pieces.append(decoder.push(token_id))
        assert text.startswith(decoder.text)
        waiting = len(settled_text(tokenizer, ids[:n])) - len(decoder.text)
        assert waiting < longest or decoder.stopped  # only what may be a stop string is held
    pieces.append(decoder.finish())
    assert "".join(pieces) == decoder.text == text
    assert decoder.stopped == stopped


# Few letters, so that stop strings are found, nearly found, and found in one another.
STREAMS = st.lists(
    st.sampled_from([b"a", b"b", b"ab", b"abab", b"\xe7\x8c", b"\xab", b"\xabb", b"a\xe7"]),
    max_size=20,
)
STOPS = st.lists(st.text(alphabet="ab猫\ufffd", min_size=1, max_size=5), max_size=3)


@given(pieces=STREAMS, stop=STOPS, min_tokens=st.integers(min_value=0, max_value=4))
@settings(max_examples=1000, deadline=None)
def test_stop_strings_are_found_where_looking_at_everything_finds_them(
    tokenizer, pieces, stop, min_tokens
):
    ids = ids_of(tokenizer, *pieces)
    decoder = StreamDecoder(tokenizer, stop, min_tokens)
    check_stops(decoder, tokenizer, ids, stop, min_tokens)


class EagerDecoder(StreamDecoder):
    """Sends all whole characters at once, and so looks for stop strings within single tokens."""

    def _first_possible_start(self, window: str) -> int:
        return len(window)


class TimidDecoder(StreamDecoder):
    """Never sends what was held back once, though it turned out to be no stop string."""

    def _first_possible_start(self, window: str) -> int:
        return 0 if self._held else super()._first_possible_start(window)


@pytest.mark.parametrize("broken", [EagerDecoder, TimidDecoder])
def test_a_decoder_that_holds_back_too_little_or_too_much_is_caught(tokenizer, broken):
    ids, stop = ids_of(tokenizer, b"ST", b"EP", b"ST", b"OP"), ["STOP"]
    check_stops(StreamDecoder(tokenizer, stop), tokenizer, ids, stop, 0)
    with pytest.raises(AssertionError):
        check_stops(broken(tokenizer, stop), tokenizer, ids, stop, 0)


# ---- The files -----------------------------------------------------------------------------------
def edit_vocab(folder: Path, change) -> None:
    """Let `change` alter the dictionary in vocab.json."""
    path = folder / "vocab.json"
    vocab = json.loads(path.read_text(encoding="utf-8"))
    change(vocab)
    path.write_text(json.dumps(vocab), encoding="utf-8")


def test_a_space_is_written_with_another_character_in_the_files():
    assert BYTE_TO_CHAR[ord(" ")] == "Ġ" and BYTE_TO_CHAR[ord("\n")] == "Ċ"
    assert BYTE_TO_CHAR[ord("a")] == "a"
    assert set(BYTE_TO_CHAR.values()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_a_folder_without_tokenizer_files_has_no_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None
    assert load_tokenizer(str(tmp_path / "absent")) is None


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_one_file_without_the_other_is_an_error(tmp_path, name):
    save_vocabulary(tmp_path, MERGES)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing: a tokenizer is vocab.json and merg"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "is not JSON"),
        (b'{"!": 0, "a": ', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe\x00\x01", "is not UTF-8 text"),
        (b'["a", "b"]', "is not one object of tokens and their ids"),
        (b'{"a": "0"}', "is not one object of tokens and their ids"),
        (b'{"a": true}', "is not one object of tokens and their ids"),
        (b'{"a": 0, "b": 0}', "the ids of its 2 tokens are not 0, 1, 2 and so on"),
        (b'{"a": 999999999999}', "the ids of its 1 tokens are not 0, 1, 2 and so on"),
        (b'{"!": 0}', "no token for the byte 0x22"),
    ],
)
def test_a_damaged_vocabulary_is_refused_by_name(tmp_path, content, complaint):
    save_vocabulary(tmp_path, MERGES)
    (tmp_path / "vocab.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "vocab.json"))
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"\xff\xfe\x00\x01", " is not UTF-8 text"),
        (b"#version: 0.2\nS T\nO P\nE", ", line 4: 'E' is not two tokens with one space"),
        (b"S T\nO P E", ", line 2: 'O P E' is not two tokens with one space between them"),
        (b"S T\nST OP", ", line 2: 'ST OP' joins a token that is neither a byte nor made furth"),
        (b"S T\nX Y", ", line 2: 'X Y' makes a token that vocab.json does not have"),
        (b"O P\nS T", ", line 2: 'S T' makes id 264 after id 265: ids have to rise"),
        (b"S T\nS T", ", line 2: 'S T' makes id 264 after id 264: ids have to rise"),
    ],
)
def test_damaged_merges_are_refused_with_file_and_line(tmp_path, content, complaint):
    save_vocabulary(tmp_path, MERGES)
    (tmp_path / "merges.txt").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "merges.txt") + complaint)


def test_merges_that_were_cut_off_leave_tokens_that_nothing_makes(tmp_path):
    save_vocabulary(tmp_path, MERGES)
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "merges.txt").write_text("\n".join(lines[:-2]), encoding="utf-8")
    with pytest.raises(ValueError, match="2 tokens are neither bytes nor made by merges.txt, .*OP"):
        load_tokenizer(tmp_path)


def test_a_special_token_that_we_do_not_know_is_refused(tmp_path):
    save_vocabulary(tmp_path, MERGES)
    edit_vocab(tmp_path, lambda vocab: vocab.update({"<|im_start|>": 268}))
    with pytest.raises(ValueError, match=r"vocab.json: 1 tokens .* the first is '<\|im_start\|>'"):
        load_tokenizer(tmp_path)


def test_a_merge_of_number_signs_is_no_comment_and_windows_line_ends_do_no_harm(tmp_path):
    save_vocabulary(tmp_path, [(b"#", b"#"), (b"##", b"#")])
    assert load_tokenizer(tmp_path).encode("###") == [257]
    path = tmp_path / "merges.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_tokenizer(tmp_path).encode("###") == [257]
    path.write_bytes(b"# #\n## #\n")  # without the line that names the version
    assert load_tokenizer(tmp_path).encode("###") == [257]


def test_end_of_text_may_be_the_first_id(tmp_path):
    """Where Hugging Face's trainer puts it when it is told of it."""
    save_vocabulary(tmp_path, MERGES)
    edit_vocab(tmp_path, lambda vocab: vocab.update({t: (i + 1) % 268 for t, i in vocab.items()}))
    tok = load_tokenizer(tmp_path)
    assert tok.eos_token_id == 0 and tok.encode("abab<|endoftext|>") == [262, 0]


def test_the_demo_ends_with_ok(capsys):
    tokenizer_file.demo()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("ok:") and len(lines) <= 25
