"""What a client sees while it waits: text that only grows, its end, its reasons, its times.

The model is a stand-in that writes given bytes, one token each, through the real engine: every
character of more than one byte arrives in pieces. The oracle is Python's own decoder on all bytes
at once.
"""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot

from block_allocator import BlockAllocator
from checkpoints.tokenizer import BYTE_TO_CHAR, load_tokenizer, save_vocabulary
from engine import InferenceEngine
from kv_cache import KVCache
from outputs import CompletionOutput, RequestOutput
from sampling import SamplingParams
from scheduler import Scheduler

BYTE_IDS = {byte: token_id for token_id, byte in enumerate(BYTE_TO_CHAR)}  # of a plain vocabulary
EOS = 256  # behind the 256 bytes


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    """256 bytes and <|endoftext|>, no merges."""
    folder = tmp_path_factory.mktemp("bytes")
    save_vocabulary(folder, merges=[])
    return load_tokenizer(folder)


def engine_that_writes(*texts, tokenizer=None, num_blocks=100, max_num_batched_tokens=1_000):
    """An engine whose model writes the bytes `texts[i]`, then the end of text, for the prompt [i].

    The model remembers i where a model remembers anything: in the pool. It writes each token's id
    into the token's slot and finds the first one through the block table.
    """
    cache = KVCache(1, num_blocks, 4, 1, 1)
    scheduler = Scheduler(BlockAllocator(num_blocks, 4), 64, max_num_batched_tokens, 400)
    memory = cache.pool[0, :, 0, 0, :, 0]  # (num_blocks + 1, 4): a number in each slot
    scripts = torch.full((len(texts), 400), EOS)
    for script, text in zip(scripts, texts, strict=True):
        script[: len(text)] = torch.tensor([BYTE_IDS[byte] for byte in text])

    def forward(batch):
        memory[batch.slot_mapping // 4, batch.slot_mapping % 4] = batch.input_ids.float()
        first_ids = memory[batch.block_tables[:, 0].long(), 0].long()  # (B,)
        ends = batch.query_start_locs[1:].long()
        sequence = torch.searchsorted(ends, batch.sample_rows, right=True)  # (M,)
        next_ids = scripts[first_ids[sequence], batch.positions[batch.sample_rows]]
        return 9.0 * one_hot(next_ids, 257)

    return InferenceEngine(forward, cache, scheduler, 257, tokenizer, eos_token_id=EOS)


def stream(engine, prompt=(0,), **params):
    """All outputs of one request, one a step."""
    params = {"temperature": 0, "max_tokens": 300} | params
    request_id = engine.add_request(list(prompt), SamplingParams(**params))
    outputs = []
    while engine.has_unfinished():
        step = engine.step()
        engine.scheduler.check_integrity()
        for output in step.outputs:
            assert output.request_id == request_id
            outputs.append(output)
    return outputs


def deltas(texts):
    """What is new in each text; every text must begin with the one before."""
    before = ""
    new = []
    for text in texts:
        assert text.startswith(before), (before, text)
        new.append(text[len(before) :])
        before = text
    return new


# ---- text, a token at a time ---------------------------------------------------------------------
TEXTS = {
    "plain letters": b"a plain text",
    "one emoji": "🐉".encode(),
    "an emoji in a text": "before 🐉 after".encode(),
    "a family of emoji": "👩\u200d👩\u200d👧\u200d👦!".encode(),
    "flags and skin": "🇫🇷🇯🇵 👍🏽".encode(),
    "Chinese, Japanese, Korean": "猫 ねこ 고양이".encode(),
    "combining marks": "e\u0301 n\u0303 o\u0302\u0323".encode(),
    "Arabic and Devanagari": "مرحبا नमस्ते".encode(),
    "a real replacement character": "a \ufffd b".encode(),
    "a lone continuation byte": b"a\x80b",
    "a lead byte alone": b"a\xf0b",
    "an emoji that breaks off": b"a\xf0\x9f\x90",
    "three bytes of four, then a letter": b"a\xf0\x9f\x90b",
    "an overlong zero": b"a\xc0\x80b",
    "half a surrogate pair": b"a\xed\xa0\x80b",
    "beyond the last code point": b"\xf5\x90\x80\x80 \xf4\x90\x80\x80",
    "bytes that never occur": b"\xfe\xff\xfe\xff",
    "all of it": "x🐉".encode() + b"\x80\xe7\x8c" + "猫e\u0301".encode() + b"\xf0\x9f",
    "a zero and a line end": b"a\x00b\r\nc",
    "nothing at all": b"",
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_streamed_text_is_the_text_decoded_at_once(byte_tokenizer, name):
    written = TEXTS[name]
    want = written.decode("utf-8", errors="replace")
    outputs = stream(engine_that_writes(written, tokenizer=byte_tokenizer))
    texts = [output.outputs[0].text for output in outputs]
    assert "".join(deltas(texts)) == texts[-1] == want
    assert len(outputs) == len(written) + 1  # one output a token, the end of text included
    assert texts[-1] == byte_tokenizer.decode(outputs[-1].outputs[0].token_ids)


@pytest.mark.parametrize("name", TEXTS)
def test_no_replacement_character_appears_that_is_not_in_the_final_text(byte_tokenizer, name):
    written = TEXTS[name]
    outputs = stream(engine_that_writes(written, tokenizer=byte_tokenizer))
    final = outputs[-1].outputs[0].text
    for output in outputs:  # a prefix, to the character, of what it will be
        assert final.startswith(output.outputs[0].text)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(written=st.binary(max_size=24), max_tokens=st.integers(1, 24))
def test_any_bytes_cut_at_any_token_stream_as_they_decode(byte_tokenizer, written, max_tokens):
    engine = engine_that_writes(written, tokenizer=byte_tokenizer)
    outputs = stream(engine, max_tokens=max_tokens)
    texts = [output.outputs[0].text for output in outputs]
    assert "".join(deltas(texts)) == written[:max_tokens].decode("utf-8", errors="replace")


def test_a_character_appears_with_its_last_byte(byte_tokenizer):
    outputs = stream(engine_that_writes("a🐉b".encode(), tokenizer=byte_tokenizer))
    texts = [output.outputs[0].text for output in outputs]
    assert texts == ["a", "a", "a", "a", "a🐉", "a🐉b", "a🐉b"]


def test_the_prompt_s_unfinished_character_does_not_leak_into_the_text(byte_tokenizer):
    """The prompt ends with the first byte of an emoji; that is the prompt's text."""
    engine = engine_that_writes(b"", "\x9f\x90\x89!".encode("latin-1"), tokenizer=byte_tokenizer)
    outputs = stream(engine, prompt=[1, BYTE_IDS[0xF0]], max_tokens=3)
    # The model goes on at position 1: bytes 0x90 and 0x89 alone are no characters.
    assert outputs[-1].outputs[0].text == "\ufffd\ufffd!"


def test_the_prompt_of_an_output_is_the_text_that_was_given(byte_tokenizer):
    engine = engine_that_writes(b"xyz", tokenizer=byte_tokenizer)
    (zero,) = [chr(byte) for byte, token_id in BYTE_IDS.items() if token_id == 0]
    engine.add_request(zero, SamplingParams(temperature=0))
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step().outputs
    assert {output.prompt for output in outputs} == {zero}
    assert outputs[-1].prompt_token_ids == [0]
    assert outputs[-1].outputs[0].text == "xyz"  # not the prompt and the text


def test_many_streams_at_once_do_not_mix_their_pieces(byte_tokenizer):
    """Each has half a character held back while the others go on; the pool is too small as well."""
    texts = list(TEXTS.values())
    engine = engine_that_writes(*texts, tokenizer=byte_tokenizer, num_blocks=25)
    params = SamplingParams(temperature=0, max_tokens=60)
    ids = [engine.add_request([i], params) for i in range(len(texts))]
    streams = {request_id: [] for request_id in ids}
    while engine.has_unfinished():
        for output in engine.step().outputs:
            streams[output.request_id].append(output.outputs[0].text)
    for request_id, written in zip(ids, texts, strict=True):
        want = written.decode("utf-8", errors="replace")
        assert "".join(deltas(streams[request_id])) == want
    assert engine.scheduler.num_preemptions > 0


def test_the_texts_of_one_request_do_not_mix_either(byte_tokenizer):
    engine = engine_that_writes("🐉 and 猫".encode(), tokenizer=byte_tokenizer)
    outputs = stream(engine, n=3, temperature=0.01)  # so cold that all three write the same
    for index in range(3):
        assert "".join(deltas([o.outputs[index].text for o in outputs])) == "🐉 and 猫"


def test_without_a_tokenizer_the_text_is_empty():
    outputs = stream(engine_that_writes(b"abc"))
    assert [output.outputs[0].text for output in outputs] == [""] * 4
    assert outputs[-1].outputs[0].token_ids == [*(BYTE_IDS[b] for b in b"abc"), EOS]


# ---- stop strings --------------------------------------------------------------------------------
STOPS = {  # what is written, stop -> text, stop_reason, tokens up to the one that completed it
    "across tokens": (b"one two END three", "END", "one two ", "END", 11),
    "at the very start": (b"END", "END", "", "END", 3),
    "the earliest of several": (b"a bc d", ["d", "bc"], "a ", "bc", 4),
    "the longer one that began earlier": (b"a xyz", ["yz", "xyz"], "a ", "xyz", 5),
    "after a false start": (b"ST STO STOP", "STOP", "ST STO ", "STOP", 11),
    "overlapping itself": (b"aabaabaac", "aabaac", "aab", "aabaac", 9),
    "a blank at its end": (b"word and", "word ", "", "word ", 5),
    "a line end": (b"line\nnext", "\n", "line", "\n", 5),
    "an emoji": ("a🐉b".encode(), "🐉", "a", "🐉", 5),
    "half of a combined letter": ("e\u0301!".encode(), "\u0301", "e", "\u0301", 3),
    "a replacement character": (b"a\x80b", "\ufffd", "a", "\ufffd", 2),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_stop_string_is_cut_exactly_and_named(byte_tokenizer, name):
    written, stop, text, reason, num_tokens = STOPS[name]
    outputs = stream(engine_that_writes(written, tokenizer=byte_tokenizer), stop=stop)
    final = outputs[-1].outputs[0]
    assert (final.text, final.finish_reason, final.stop_reason) == (text, "stop", reason)
    assert len(final.token_ids) == num_tokens
    assert "".join(deltas([output.outputs[0].text for output in outputs])) == text


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_certain(byte_tokenizer):
    engine = engine_that_writes(b"a STEP STOP", tokenizer=byte_tokenizer)
    texts = [output.outputs[0].text for output in stream(engine, stop="STOP")]
    assert texts[:6] == ["a", "a ", "a ", "a ", "a STE", "a STEP"]
    assert texts[-1] == "a STEP "


def test_a_text_that_ends_within_a_stop_string_keeps_what_was_held_back(byte_tokenizer):
    engine = engine_that_writes(b"a STO", tokenizer=byte_tokenizer)
    final = stream(engine, stop="STOP")[-1].outputs[0]
    assert (final.text, final.finish_reason, final.stop_reason) == ("a STO", "stop", None)
    final = stream(engine, stop="STOP", max_tokens=4)[-1].outputs[0]
    assert (final.text, final.finish_reason, final.stop_reason) == ("a ST", "length", None)


def test_a_stop_string_in_the_last_token_wins_over_length(byte_tokenizer):
    engine = engine_that_writes(b"a END", tokenizer=byte_tokenizer)
    final = stream(engine, stop="END", max_tokens=5)[-1].outputs[0]
    assert (final.text, final.finish_reason, final.stop_reason) == ("a ", "stop", "END")


def test_before_min_tokens_a_stop_string_ends_nothing(byte_tokenizer):
    engine = engine_that_writes(b"a END b END c", tokenizer=byte_tokenizer)
    final = stream(engine, stop="END", min_tokens=6)[-1].outputs[0]
    assert (final.text, final.stop_reason) == ("a END b ", "END")


def test_a_stop_string_in_the_prompt_ends_nothing(byte_tokenizer):
    number = BYTE_IDS[ord("x")]
    engine = engine_that_writes(*[b"abc"] * (number + 1), tokenizer=byte_tokenizer)
    final = stream(engine, prompt=[number], stop="x")[-1].outputs[0]
    assert (final.text, final.finish_reason) == ("abc", "stop")


@pytest.mark.parametrize("others", [0, 3])
def test_a_stop_string_frees_the_blocks_in_the_same_step(byte_tokenizer, others):
    engine = engine_that_writes(b"abcdefgh END", *[b"x" * 50] * 3, tokenizer=byte_tokenizer)
    engine.add_request([0], SamplingParams(temperature=0, stop="END", max_tokens=100))
    for i in range(others):
        engine.add_request([1 + i], SamplingParams(temperature=0, max_tokens=100))
    ended = False
    while not ended:
        step = engine.step()
        ended = any(o.request_id == "0" and o.finished for o in step.outputs)
        freed = step.blocks_freed
        held = [seq.request.request_id for seq in engine.scheduler.running]
        assert ("0" in held) != ended
    assert freed == 3  # 12 of its 13 tokens were computed
    assert engine.scheduler.allocator.num_free == 100 - 3 * others
    assert engine.has_unfinished() == (others > 0)


def test_one_text_of_several_stops_and_the_others_go_on(byte_tokenizer):
    """Two texts of one request part at random; each is cut at its own first blank."""
    numbers = random.Random(0)
    engine = engine_that_writes(b"", tokenizer=byte_tokenizer)

    def forward(batch):  # all letters from a to d and the blank are equally likely
        logits = torch.full((len(batch.sample_rows), 257), -30.0)
        logits[:, [BYTE_IDS[byte] for byte in b"abcd "]] = 0.0
        return logits

    engine.forward = forward
    seed = numbers.randrange(1_000)
    outputs = stream(engine, n=4, temperature=1.0, seed=seed, stop=" ", max_tokens=100)
    final = outputs[-1].outputs
    assert all(o.stop_reason == " " and " " not in o.text for o in final)
    assert [len(o.token_ids) for o in final] == [len(o.text) + 1 for o in final]
    assert len({len(o.text) for o in final}) > 1
    for index in range(4):
        deltas([output.outputs[index].text for output in outputs])


# ---- what an output holds ------------------------------------------------------------------------
def test_the_fields_are_those_of_vllm():
    assert list(RequestOutput.__dataclass_fields__) == [
        "request_id",
        "prompt",
        "prompt_token_ids",
        "outputs",
        "prompt_logprobs",
        "metrics",
        "finished",
    ]
    assert list(CompletionOutput.__dataclass_fields__) == [
        "index",
        "text",
        "token_ids",
        "logprobs",
        "cumulative_logprob",
        "finish_reason",
        "stop_reason",
    ]


def test_an_output_is_not_changed_by_later_steps(byte_tokenizer):
    engine = engine_that_writes(b"abcdef", tokenizer=byte_tokenizer)
    outputs = stream(engine, logprobs=1)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 2, 3, 4, 5, 6, 7]
    assert [len(o.outputs[0].logprobs) for o in outputs] == [1, 2, 3, 4, 5, 6, 7]
    assert [o.outputs[0].finish_reason for o in outputs] == [None] * 6 + ["stop"]
    assert [o.finished for o in outputs] == [False] * 6 + [True]


def test_the_logprobs_of_a_token_carry_its_text(byte_tokenizer):
    engine = engine_that_writes("h🐉".encode(), tokenizer=byte_tokenizer)
    final = stream(engine, prompt=[0, BYTE_IDS[ord("h")]], logprobs=0, prompt_logprobs=0)[-1]
    names = [entry.decoded_token for step in final.outputs[0].logprobs for entry in step.values()]
    # The script goes on at the prompt's second token: the four bytes of the emoji, then the end.
    assert names == ["\ufffd"] * 4 + ["<|endoftext|>"]
    assert final.prompt_logprobs[0] is None
    assert [entry.decoded_token for entry in final.prompt_logprobs[1].values()] == ["h"]


def test_the_cumulative_logprob_is_the_sum_over_the_tokens(byte_tokenizer):
    engine = engine_that_writes(b"abc", tokenizer=byte_tokenizer)
    for output in stream(engine, logprobs=2):
        (completion,) = output.outputs
        pairs = zip(completion.logprobs, completion.token_ids, strict=True)
        total = sum(entry[token_id].logprob for entry, token_id in pairs)
        assert completion.cumulative_logprob == pytest.approx(total)


# ---- times ---------------------------------------------------------------------------------------
def test_the_times_of_a_request_are_in_order(byte_tokenizer):
    engine = engine_that_writes(b"abc", b"defg", tokenizer=byte_tokenizer)
    for i in range(2):
        engine.add_request([i], SamplingParams(temperature=0))
    ended = []
    while engine.has_unfinished():
        ended += [output.metrics for output in engine.step().outputs if output.finished]
    for times in ended:
        assert (
            times.arrival_time
            <= times.first_scheduled_time
            <= times.first_token_time
            < times.finished_time
        )
    assert ended[0].finished_time < ended[1].finished_time
    assert [times.num_preemptions for times in ended] == [0, 0]


def test_the_first_token_of_a_long_prompt_comes_after_several_steps(byte_tokenizer):
    engine = engine_that_writes(b"x" * 60, tokenizer=byte_tokenizer, max_num_batched_tokens=4)
    engine.add_request([0] * 10, SamplingParams(temperature=0, max_tokens=1))
    steps = [engine.step() for _ in range(3)]
    assert [len(step.outputs) for step in steps] == [0, 0, 1]  # 4, 4 and 2 tokens of the prompt
    times = steps[-1].outputs[0].metrics
    waited_ms = (times.first_token_time - times.first_scheduled_time) * 1e3
    assert waited_ms >= steps[0].milliseconds + steps[1].milliseconds


def test_preemptions_are_counted_for_the_request_that_suffered_them(byte_tokenizer):
    engine = engine_that_writes(*[b"x" * 12] * 3, tokenizer=byte_tokenizer, num_blocks=6)
    ids = [engine.add_request([i], SamplingParams(temperature=0)) for i in range(3)]
    metrics = {}
    while engine.has_unfinished():
        metrics |= {o.request_id: o.metrics for o in engine.step().outputs if o.finished}
    counts = [metrics[request_id].num_preemptions for request_id in ids]
    assert counts[0] == 0 and sum(counts) == engine.scheduler.num_preemptions > 0
