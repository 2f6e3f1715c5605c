"""Tokens to text: characters, stop strings, and what a client sees while it waits.

The decoder's oracles decode all tokens at once, and look for stop strings in the whole text after
each token. The tests of whole outputs use the real engine with a stand-in for the model, which
writes given bytes, one token each: every character of more than one byte arrives in pieces.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot

from block_allocator import BlockAllocator
from engine import InferenceEngine
from kv_cache import KVCache
from outputs import StreamDecoder
from sampling import Logprob, SamplingParams
from scheduler import Scheduler
from sequence import Continuation

WITHOUT_DEADLINE = settings(deadline=None)
# Characters are cut into tokens as GPT-2 cuts them. "ab" is a token like its letters, so that
# a stop string may begin and end inside a token and between two.
MERGED = [b" \xf0\x9f", b"\xe7\x8c", b"\xf0\x9f", b"ab", b"abab", b"\xabb", b"a\xe7"]
MERGED += [b"ST", b"OP", b"EP"]
TOKENS = [bytes([byte]) for byte in range(256)] + MERGED
EOS = len(TOKENS)  # special: it adds no text


class PieceTokenizer:
    """A vocabulary of `TOKENS` and an end of text. (The real ones are in `checkpoints/`.)"""

    def encode(self, text):
        return list(text.encode())  # no merges: every byte is a token

    def token_bytes(self, token_id):
        return TOKENS[token_id] if 0 <= token_id < len(TOKENS) else b""

    def token_text(self, token_id):
        return "<|endoftext|>" if token_id == EOS else self.decode([token_id])

    def decode(self, ids):
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")


TOKENIZER = PieceTokenizer()


def ids_of(*pieces):
    """The ids of tokens named by their bytes."""
    return [TOKENS.index(piece) for piece in pieces]


def pushed(decoder, ids):
    """What each push returns, and last what `finish` does."""
    return [*(decoder.push(token_id) for token_id in ids), decoder.finish()]


# ---- a character is sent by the token that completes it ------------------------------------------
CAT = [b"\xe7\x8c", b"\xab", b" \xf0\x9f", b"\x90", b"\x88"]  # "猫 🐈" as tokens
STREAMS = {
    "a space goes before its cat": (CAT, ["", "猫", " ", "", "🐈", ""]),
    "an emoji comes first": ([b"\xf0\x9f", b"\x90", b"\x88", b"a"], ["", "", "🐈", "a", ""]),
    "the end within a character": (CAT[:4], ["", "猫", " ", "", "\ufffd"]),
    "it can no longer be completed": (
        [b"\xf0\x9f", b"a", b"\xff", b"b"],
        ["", "\ufffda", "\ufffd", "b", ""],
    ),
    "an accent follows its letter": ([b"e", b"\xcc", b"\x81"], ["e", "", "\u0301", ""]),
}


@pytest.mark.parametrize("pieces, sent", STREAMS.values(), ids=STREAMS)
def test_a_character_is_sent_by_the_token_that_completes_it(pieces, sent):
    decoder = StreamDecoder(TOKENIZER)
    assert pushed(decoder, ids_of(*pieces)) == sent
    assert decoder.text == "".join(sent)


def check_stream(decoder, ids):
    """What was sent is always a beginning of the text that decoding all tokens at once gives."""
    whole, so_far = TOKENIZER.decode(ids), ""
    for piece in pushed(decoder, ids):
        so_far += piece
        assert whole.startswith(so_far)  # so it has no U+FFFD that the whole text does not have
    assert so_far == decoder.text == whole


@given(text=st.text())
@WITHOUT_DEADLINE
def test_a_stream_is_the_text_for_any_text(text):
    check_stream(StreamDecoder(TOKENIZER), TOKENIZER.encode(text))


# Bytes that make and break UTF-8: pieces of 猫 and 🐈, an overlong C0 80, a surrogate's ED A0, "A";
# tokens of several bytes; and ids that are special or unknown.
BYTES = [0xE7, 0x8C, 0xAB, 0xF0, 0x9F, 0x90, 0x88, 0xC0, 0x80, 0xED, 0xA0, 0xF4, 0xF5, 0xFF, 65]


@given(ids=st.lists(st.sampled_from([*BYTES, *range(256, EOS + 2), -1])))
@example(ids=list(b"\xf0\x9f\x90\xf0\x9f\x90\x88\xe7\x8c"))
@WITHOUT_DEADLINE
def test_a_stream_is_the_text_for_any_ids_broken_bytes_and_unknown_tokens_too(ids):
    check_stream(StreamDecoder(TOKENIZER), ids)


# ---- stop strings --------------------------------------------------------------------------------
TWICE = [b"ST", b"OP", b"ST", b"OP"]
STOPS = {  # stop strings, min_tokens, tokens -> what each push returns, the stop string found
    "across tokens": (["STOP"], 0, [b"ab", b"ST", b"OP", b"!"], ["ab", "", "", "", ""], "STOP"),
    "it only looked like one": (["STOP"], 0, [b"ST", b"EP", b"S"], ["", "STEP", "", "S"], None),
    "inside tokens": (["P S"], 0, [b"EP", b" ", b"ST"], ["E", "", "", ""], "P S"),
    "its last character has many tokens": ([" 🐈"], 0, CAT, ["", "猫", "", "", "", ""], " 🐈"),
    "the earliest wins": (["ba", "ab"], 0, [b"abab", b"EP"], ["", "", ""], "ab"),
    "then the first listed": (["abab", "ab"], 0, [b"abab", b"EP"], ["", "", ""], "abab"),
    "one string instead of a list": ("TO", 0, [b"ST", b"a"], ["S", "Ta", ""], None),
    "it began within min_tokens": (["STOP"], 1, TWICE, ["", "", "", "", ""], "STOP"),
    "it ended within min_tokens": (["STOP"], 2, TWICE, ["", "STOP", "", "", ""], "STOP"),
}


@pytest.mark.parametrize("stop, min_tokens, pieces, sent, stopped", STOPS.values(), ids=STOPS)
def test_a_stop_string_is_held_back_found_and_cut(stop, min_tokens, pieces, sent, stopped):
    decoder = StreamDecoder(TOKENIZER, stop, min_tokens)
    assert pushed(decoder, ids_of(*pieces)) == sent
    assert (decoder.text, decoder.stopped) == ("".join(sent), stopped)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="a stop string is empty"):
        StreamDecoder(TOKENIZER, stop=["a", ""])


def settled_text(ids):
    """The text of these ids without the character that may still be incomplete at their end."""
    data = b"".join(map(TOKENIZER.token_bytes, ids))
    for length in (3, 2, 1):  # of a character of four bytes at most three are there
        try:
            data[-length:].decode("utf-8")
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return data[:-length].decode("utf-8", errors="replace")
    return data.decode("utf-8", errors="replace")


def stop_oracle(ids, stop, min_tokens):
    """After each token decode all of them and look everywhere: (text, stop string, tokens used)."""
    begin = len(settled_text(ids[:min_tokens]))
    texts = [settled_text(ids[:n]) for n in range(len(ids) + 1)]
    whole = TOKENIZER.decode(ids)  # at the end of the generation nothing is incomplete any more
    for used, text in [*enumerate(texts), (len(ids), whole)]:
        starts = [(text.find(s, max(0, begin - len(s) + 1)), n) for n, s in enumerate(stop)]
        found = [(start, n) for start, n in starts if start >= 0]
        if found and used > min_tokens:
            start, n = min(found)
            return text[:start], stop[n], used
    return whole, None, len(ids)


def check_stops(decoder, ids, stop, min_tokens):
    """Equal to the oracle, at the same token, and nothing sent that is not in the final text."""
    text, stopped, used = stop_oracle(ids, stop, min_tokens)
    longest = max(map(len, stop), default=1)
    for n, token_id in enumerate(ids, start=1):
        assert decoder.stopped is None or n > used
        decoder.push(token_id)
        assert text.startswith(decoder.text)
        waiting = len(settled_text(ids[:n])) - len(decoder.text)
        assert waiting < longest or decoder.stopped  # only what may be a stop string is held
    decoder.finish()
    assert (decoder.text, decoder.stopped) == (text, stopped)


# Few letters, so that stop strings are found, nearly found, and found in one another.
PIECES = [b"a", b"b", b"ab", b"abab", b"\xe7\x8c", b"\xab", b"\xabb", b"a\xe7"]


@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=20),
    stop=st.lists(st.text(alphabet="ab猫\ufffd", min_size=1, max_size=5), max_size=3),
    min_tokens=st.integers(min_value=0, max_value=4),
)
@settings(max_examples=500, deadline=None)
def test_stop_strings_are_found_where_looking_at_everything_finds_them(pieces, stop, min_tokens):
    ids = ids_of(*pieces)
    check_stops(StreamDecoder(TOKENIZER, stop, min_tokens), ids, stop, min_tokens)


# ---- through the engine --------------------------------------------------------------------------
def engine_that_writes(*texts, tokenizer=TOKENIZER, num_blocks=100, max_num_batched_tokens=1_000):
    """An engine whose model writes the bytes `texts[i]`, then the end of text, for the prompt [i].

    The stand-in for the model keeps i in the pool, as a model keeps K and V: it writes each token's
    id into the token's slot, and finds the first one through the block table.
    """
    cache = KVCache(1, num_blocks, 4, 1, 1)
    scheduler = Scheduler(BlockAllocator(num_blocks, 4), 64, max_num_batched_tokens, 400)
    memory = cache.pool[0, :, 0, 0, :, 0]  # (num_blocks + 1, 4): a number in each slot
    scripts = torch.full((len(texts), 400), EOS)
    for script, text in zip(scripts, texts, strict=True):
        script[: len(text)] = torch.tensor(list(text))

    def forward(batch):
        memory[batch.slot_mapping // 4, batch.slot_mapping % 4] = batch.input_ids.float()
        first_ids = memory[batch.block_tables[:, 0].long(), 0].long()  # (B,)
        ends = batch.query_start_locs[1:].long()
        sequence = torch.searchsorted(ends, batch.sample_rows, right=True)  # (M,)
        next_ids = scripts[first_ids[sequence], batch.positions[batch.sample_rows]]
        return 9.0 * one_hot(next_ids, EOS + 1)

    return InferenceEngine(forward, cache, scheduler, EOS + 1, tokenizer, eos_token_ids=[EOS])


def stream(engine, prompt=(0,), **params):
    """The texts that the steps report for one request, by sequence; and its final output."""
    params = {"temperature": 0, "max_tokens": 300} | params
    engine.add_request(list(prompt), SamplingParams(**params))
    pieces = {}
    while engine.has_unfinished():
        step = engine.step()
        engine.scheduler.check_integrity()
        for delta in step.deltas:
            pieces.setdefault(delta.index, []).append(delta.text)
    (output,) = step.finished
    for completion in output.outputs:
        assert "".join(pieces[completion.index]) == completion.text
    return pieces, output


TEXTS = {
    "one emoji": "🐉".encode(),
    "a family of emoji": "👩\u200d👩\u200d👧\u200d👦!".encode(),
    "combining marks": "e\u0301 n\u0303 o\u0302\u0323".encode(),
    "a real replacement character": "a \ufffd b".encode(),
    "a lead byte alone": b"a\xf0b",
    "an emoji that breaks off": b"a\xf0\x9f\x90",
    "half a surrogate pair": b"a\xed\xa0\x80b",
    "all of it": "x🐉".encode() + b"\x80\xe7\x8c" + "猫e\u0301".encode() + b"\xf0\x9f",
    "a zero and a line end": b"a\x00b\r\nc",
    "nothing at all": b"",
}


def test_an_unfinished_character_of_the_prompt_is_not_continued_in_the_text():
    """The prompt ends with the first byte of an emoji; that is the prompt's text."""
    engine = engine_that_writes(b"", "\x9f\x90\x89!".encode("latin-1"))
    _, output = stream(engine, prompt=[1, 0xF0], max_tokens=3)
    # The model goes on at position 1: bytes 0x90 and 0x89 alone are no characters.
    assert output.outputs[0].text == "\ufffd\ufffd!"


def test_streamed_texts_are_those_decoded_at_once_and_do_not_mix():
    """All texts at once, in a pool that is too small for all."""
    texts = list(TEXTS.values())
    engine = engine_that_writes(*texts, num_blocks=14)
    params = SamplingParams(temperature=0, max_tokens=40)
    ids = [engine.add_request([i], params) for i in range(len(texts))]
    streams = {request_id: [] for request_id in ids}
    while engine.has_unfinished():
        for delta in engine.step().deltas:
            streams[delta.request_id].append(delta.text)
    for request_id, written in zip(ids, texts, strict=True):
        want = written.decode("utf-8", errors="replace")
        assert "".join(streams[request_id]) == want
        assert len(streams[request_id]) == len(written) + 1  # one a token, and the end of text
    assert engine.scheduler.num_preemptions > 0


def test_without_a_tokenizer_the_text_is_empty():
    pieces, output = stream(engine_that_writes(b"abc", tokenizer=None))
    assert pieces == {0: [""] * 4}
    assert output.outputs[0].token_ids == [*b"abc", EOS]


@pytest.mark.parametrize("params", [{}, {"stop": "猫"}, {"n": 3, "temperature": 1, "stop": "🐉!"}])
@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_delta_gives_the_same_text_read_at_once_late_twice_or_never(times, params):
    """`times`: how often each is read in its own step; at the end all are read again."""
    engine = engine_that_writes("a猫🐉ab 猫🐉!".encode())
    params = {"temperature": 0, "max_tokens": 40} | params
    engine.add_request([0], SamplingParams(**params))
    steps, early = [], []
    while engine.has_unfinished():
        steps.append(engine.step())
        for _ in range(times):
            early.append([delta.text for delta in steps[-1].deltas])
    late = [[delta.text for delta in step.deltas] for step in steps]
    assert early == [texts for texts in late for _ in range(times)]
    for completion in steps[-1].finished[0].outputs:
        pieces = [d.text for step in steps for d in step.deltas if d.index == completion.index]
        assert "".join(pieces) == completion.text
        assert completion.text == ("a" if params.get("stop") == "猫" else completion.text) != ""


# ---- a stop string ends a sequence ---------------------------------------------------------------
ENDS = {  # what is written, params -> text, finish_reason, stop_reason, number of tokens
    "a stop string": (b"one END two", {"stop": "END"}, "one ", "stop", "END", 7),
    "at the very start": (b"END", {"stop": "END"}, "", "stop", "END", 3),
    "the earliest of several": (b"a bc d", {"stop": ["d", "bc"]}, "a ", "stop", "bc", 4),
    "EOS within a stop string": (b"a STO", {"stop": "STOP"}, "a STO", "stop", None, 6),
    "length within one": (b"a STO", {"stop": "STOP", "max_tokens": 4}, "a ST", "length", None, 4),
    "in the last token": (b"a END", {"stop": "END", "max_tokens": 5}, "a ", "stop", "END", 5),
    "not within min_tokens": (
        b"END END",
        {"stop": "END", "min_tokens": 4},
        "END ",
        "stop",
        "END",
        7,
    ),
    "length within a character": (b"a\xf0\x9f", {"max_tokens": 3}, "a\ufffd", "length", None, 3),
    "a stop token": (b"abc", {"stop_token_ids": [98]}, "a", "stop", 98, 2),
}


@pytest.mark.parametrize("written, params, text, finish, stop, length", ENDS.values(), ids=ENDS)
def test_a_text_ends_with_its_reasons(written, params, text, finish, stop, length):
    _, output = stream(engine_that_writes(written), **params)  # the pieces make up the text
    (final,) = output.outputs
    assert (final.text, final.finish_reason, final.stop_reason) == (text, finish, stop)
    assert len(final.token_ids) == length


def test_a_stop_string_frees_the_blocks_in_the_same_step():
    engine = engine_that_writes(b"abcdefgh END", b"x" * 50)
    engine.add_request([0], SamplingParams(temperature=0, stop="END", max_tokens=100))
    engine.add_request([1], SamplingParams(temperature=0, max_tokens=100))
    ended = False
    while not ended:
        step = engine.step()
        ended = bool(step.finished)
        held = [seq.request.request_id for seq in engine.scheduler.running]
        assert held == (["1"] if ended else ["0", "1"])
    assert step.blocks.freed == 3  # 12 of its 13 tokens were computed
    assert engine.scheduler.allocator.num_free == 100 - 3


def test_one_text_of_several_stops_and_the_others_go_on():
    """Four texts of one request, drawn at random. Each ends before its first blank."""
    engine = engine_that_writes(b"")

    def forward(batch):  # all letters from a to d and the blank are equally likely
        logits = torch.full((len(batch.sample_rows), EOS + 1), -30.0)
        logits[:, list(b"abcd ")] = 0.0
        return logits

    engine.forward = forward
    _, output = stream(engine, n=4, temperature=1.0, seed=864, stop=" ", max_tokens=100)
    final = output.outputs
    assert all(o.stop_reason == " " and " " not in o.text for o in final)
    assert [len(o.token_ids) for o in final] == [len(o.text) + 1 for o in final]
    assert len({len(o.text) for o in final}) > 1


def test_a_stop_string_that_begins_before_a_fork_is_found_in_both_texts():
    """At "EN" the text forks: the parent completes "END", the child goes on, and meets it later."""
    engine = engine_that_writes(b"x EN? END")

    def strategy(sequences, logits):
        likeliest = logits.argmax(-1).tolist()
        continuations = [Continuation(s, [i]) for s, i in zip(sequences, likeliest, strict=True)]
        if sequences[0].num_generated == 4 and len(sequences) == 1:
            parent = sequences[0]  # two tokens at once: the second is cut off
            return [Continuation(parent, [*b"D!"]), Continuation(parent, [*b"? "], seed=7)]
        return continuations

    params = SamplingParams(temperature=0, max_tokens=40, stop="END")
    engine.add_request([0], params, strategy=strategy)
    texts = {}
    while engine.has_unfinished():
        step = engine.step()
        for delta in step.deltas:
            texts[delta.index] = texts.get(delta.index, "") + delta.text
    parent, child = step.finished[0].outputs
    assert (parent.text, bytes(parent.token_ids), parent.stop_reason) == ("x ", b"x END", "END")
    assert (child.text, bytes(child.token_ids), child.stop_reason) == (
        "x EN? ",
        b"x EN? END",
        "END",
    )
    # A fork is new to a client: its first delta has its whole text. The parent had sent "x " too.
    assert texts == {0: "x ", 1: "x EN? "}


# ---- what an output holds ------------------------------------------------------------------------
def test_an_output_can_be_asked_for_at_any_time_and_is_not_changed_by_later_steps():
    engine = engine_that_writes(b"abcdef")
    request_id = engine.add_request([0], SamplingParams(temperature=0, logprobs=1, max_tokens=99))
    outputs = []
    while engine.has_unfinished():
        request = engine.requests[request_id]
        finished = engine.step().finished
        outputs.append(engine.output_processor.request_output(request))
    assert [o.outputs[0].text for o in outputs] == ["abcdef"[:n] for n in range(1, 7)] + ["abcdef"]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 2, 3, 4, 5, 6, 7]
    assert [len(o.outputs[0].logprobs) for o in outputs] == [1, 2, 3, 4, 5, 6, 7]
    assert [o.outputs[0].finish_reason for o in outputs] == [None] * 6 + ["stop"]
    assert [o.finished for o in outputs] == [False] * 6 + [True]
    assert finished == outputs[-1:]


def test_the_logprobs_of_a_token_carry_its_text():
    engine = engine_that_writes("h🐉".encode())
    _, final = stream(engine, prompt=[0, ord("h")], logprobs=0, prompt_logprobs=0)
    names = [entry.decoded_token for step in final.outputs[0].logprobs for entry in step.values()]
    # The script goes on at the prompt's second token: the four bytes of the emoji, then the end.
    assert names == ["\ufffd"] * 4 + ["<|endoftext|>"]
    assert final.prompt_logprobs[0] is None
    assert [entry.decoded_token for entry in final.prompt_logprobs[1].values()] == ["h"]


def test_each_of_several_tokens_of_one_step_is_named_in_the_logprobs():
    """An accepted draft has more than one token, and each gets its decoded_token."""
    engine = engine_that_writes(b"")
    drafts = iter([b"a", b"bcd", b"ef"])

    def strategy(sequences, logits):
        draft = next(drafts)
        return [Continuation(sequences[0], [*draft], [{i: Logprob(-0.5, 1)} for i in draft])]

    params = SamplingParams(temperature=0, logprobs=0, max_tokens=6)
    engine.add_request([0], params, strategy=strategy)
    while engine.has_unfinished():
        step = engine.step()
    (completion,) = step.finished[0].outputs
    names = [entry.decoded_token for step in completion.logprobs for entry in step.values()]
    assert "".join(names) == completion.text == "abcdef"
    assert completion.cumulative_logprob == -0.5 * 6


# ---- times ---------------------------------------------------------------------------------------
def test_the_times_of_a_request_are_in_order():
    """A prompt of 10 tokens in chunks of 4: its first token comes after three steps."""
    engine = engine_that_writes(b"x" * 12, max_num_batched_tokens=4)
    engine.add_request([0] * 10, SamplingParams(temperature=0, max_tokens=2))
    steps = []
    while engine.has_unfinished():
        steps.append(engine.step())
    assert [len(step.deltas) for step in steps] == [0, 0, 1, 1]
    times = steps[-1].finished[0].metrics
    assert times.arrival_time <= times.first_scheduled_time
    waited_ms = (times.first_token_time - times.first_scheduled_time) * 1e3
    assert waited_ms >= steps[0].timings.total + steps[1].timings.total
    assert times.first_token_time < times.finished_time


def test_preemptions_are_counted_for_their_request():
    engine = engine_that_writes(*[b"x" * 12] * 3, num_blocks=6)
    ids = [engine.add_request([i], SamplingParams(temperature=0)) for i in range(3)]
    metrics = {}
    while engine.has_unfinished():
        metrics |= {o.request_id: o.metrics for o in engine.step().finished}
    counts = [metrics[request_id].num_preemptions for request_id in ids]
    assert counts[0] == 0 and sum(counts) == engine.scheduler.num_preemptions > 0
