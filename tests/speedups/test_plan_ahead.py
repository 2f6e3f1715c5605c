"""speedups/plan_ahead.py against the engine that waits: the same texts, and which waits there are.

The stand-in for a model (`Reader`) finds every token of a sequence through its block table, and its
logits are a function of all of them. A token in the wrong slot, a block that was given away too
early or a placeholder that went into a forward changes the text. What each request's text is, its
reasons and its probabilities, is known from serving it alone, one step after the other.

After every step of every test (`Served.check`): the books balance, no sequence holds a token that
is not its text's, no plan names a sequence that had ended, no delta skips or repeats a token.
"""

import functools
import math
import random
import tempfile
from bisect import bisect_right
from collections import Counter
from pathlib import Path

import pytest
import torch
from interrupts import interrupted_at
from torch import Tensor
from vocabularies import save_vocabulary
from worlds import DEVICE, SEED, needs_gpu

from block_allocator import BlockAllocator
from checkpoints.tokenizer import load_tokenizer
from engine import InferenceEngine, eager_forward, sample_next
from kernels.triton_decode import INTERPRETED, paged_attention_triton
from kernels.triton_prefill import write_kv_triton
from kernels.triton_sampling import draw_tokens_triton, sample_triton
from kv_cache import KVCache, write_kv
from sampling import SamplingParams, draw_tokens
from scheduler import Scheduler, reserve_now
from sequence import FINISHED, RUNNING, WAITING, Continuation
from speedups.cuda_graphs import Calls, GraphForward, recorded_sizes
from speedups.plan_ahead import AheadEngine

UNLIMITED = 10_000  # tokens in a step: more than any test has
MAX_SEQ_LEN = 64
VOCAB, EOS = 257, 256  # the bytes and the end of text
LETTERS = range(64, 72)  # "a" to "h" among them: what the stand-in writes


@functools.cache
def byte_tokenizer():
    with tempfile.TemporaryDirectory() as folder:
        save_vocabulary(Path(folder), merges=[])
        tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("abcdefgh") == list(LETTERS)
    return tokenizer


# ---- a stand-in for a model ----------------------------------------------------------------------
@functools.cache
def logits_of(context: tuple[int, ...]) -> Tensor:
    """Logits (VOCAB,) after these tokens: a letter, or now and then the end of text."""
    numbers = random.Random(repr(context))
    logits = torch.full((VOCAB,), -30.0)
    for token_id in (*LETTERS, EOS):
        logits[token_id] = numbers.gauss(0, 1.5)
    logits[EOS] -= 1
    return logits


class Reader:
    """Writes each token's id into its slot, and reads the whole context back through the table.

    It keeps the input ids of each of its calls. `faults` are what happens in some of them, by
    number from 1 on: an exception, or "nan" for the last row of the logits.
    """

    def __init__(self, cache: KVCache, log: list, faults: dict):
        self.cache, self.log, self.faults, self.calls = cache, log, faults, []
        self.num_nan = 0

    def __call__(self, batch) -> Tensor:
        ids = unwatched(batch.input_ids).clone()
        self.calls.append(ids)
        self.log.append(("launch", len(self.calls)))
        fault = self.faults.get(len(self.calls))
        if isinstance(fault, BaseException):
            raise fault
        written = ids[:, None, None].to(self.cache.pool.dtype)
        write_kv(written, written, *self.cache.layer(0), batch.slot_mapping)
        rows = torch.arange(len(ids))[batch.sample_rows].tolist()
        logits = torch.empty(len(rows), VOCAB)
        for i, row in enumerate(rows):
            logits[i] = logits_of(self.context(batch, row))
        if fault == "nan":
            logits[-1:] = math.nan
            self.num_nan += 1
        return logits

    def context(self, batch, row: int) -> tuple[int, ...]:
        """The tokens in the pool up to that of a row."""
        i = bisect_right(batch.query_start_locs.tolist(), row) - 1
        length = int(batch.positions[row]) + 1
        assert batch.context_lens[i] >= length or batch.context_lens[i] == 0  # 0: a padded row
        table = batch.block_tables[i, : -(-length // self.cache.block_size)].long()
        found = self.cache.layer(0)[0][table].flatten()[:length]
        assert found.isfinite().all(), "a slot was read that was never written"
        return tuple(found.long().tolist())


class Ledger(BlockAllocator):
    """An allocator that checks what is published: the tokens that some blocks hold from now on."""

    def publish(self, block_table, token_ids, num_computed_tokens, salt=None):
        assert num_computed_tokens <= len(token_ids)
        held = block_table[: self.blocks_needed(num_computed_tokens)]
        assert all(self.ref_count(block_id) for block_id in held), "published after it was freed"


# ---- what waits for the device -------------------------------------------------------------------
# What a host does with a tensor to know its numbers: on a GPU it waits for the device.
READS = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__index__", "__float__"}
READS |= {"__array__", "__iter__", "__contains__", "equal", "is_nonzero", "allclose"}


def is_blocking_copy(function, args, kwargs) -> bool:
    """Whether a call of `to` waits until the numbers are in host memory."""
    targets = [x for x in (*args[1:2], kwargs.get("device")) if isinstance(x, str | torch.device)]
    to_host = any(torch.device(x).type == "cpu" for x in targets)
    return function.__name__ == "to" and to_host and not kwargs.get("non_blocking")


def unwatched(tensor: Tensor) -> Tensor:
    """The same numbers in a plain tensor, whose reads are not recorded."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


class Watched(Tensor):
    """A tensor that writes down when its numbers are read, as does all that is computed from it.

    `number` is the launch that it came from, `fault` an exception that its first reader meets.
    """

    log: list
    number: int
    fault: BaseException | None = None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in READS or is_blocking_copy(function, args, kwargs or {}):
            cls.log.append(("read", cls.number))
            if cls.fault is not None:
                raise cls.fault
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        return result.as_subclass(cls) if isinstance(result, Tensor) else result


def watched_draw(model: Reader, drawn: dict, faults: dict):
    """A `draw` of watched tensors. `drawn` gets the token ids of each launch."""

    def draw(logits, rows):
        number = len(model.calls)
        token_ids, peaks = draw_tokens(logits, rows)
        drawn[number] = token_ids.tolist()
        fields = {"log": model.log, "number": number, "fault": faults.get(number)}
        kind = type("Watched", (Watched,), fields)
        return token_ids.as_subclass(kind), peaks.as_subclass(kind)

    return draw


# ---- engines -------------------------------------------------------------------------------------
class Served:
    """An engine around the stand-in, its requests, and in `log` the order of what happened."""

    def __init__(
        self,
        engine_class=AheadEngine,
        num_blocks=64,
        block_size=4,
        max_num_seqs=8,
        budget=UNLIMITED,
        reserve=reserve_now,
        faults=None,
        sizes=None,
        **options,
    ):
        self.log, self.requests, self.wanted, self.finished = [], {}, {}, {}
        self.aborted, self.streams = set(), {}
        self.num_held = self.num_ahead = 0
        self.preempts_next = False  # set by a test: the next plan preempts the last in line
        cache = KVCache(1, num_blocks, block_size, 1, 1, torch.float64)
        cache.pool.fill_(math.nan)
        self.allocator = Ledger(num_blocks, block_size)
        self.scheduler = Scheduler(self.allocator, max_num_seqs, budget, MAX_SEQ_LEN, reserve)
        self.model = forward = Reader(cache, self.log, faults or {})
        if sizes is not None:
            options |= {"draw": draw_tokens_triton}
            forward = GraphForward(
                cache, self.model, sizes, MAX_SEQ_LEN, SameMemory(), sampler=sample_triton
            )
            if engine_class is AheadEngine:
                options |= {"decode": forward.decode}
            self.model.calls.clear()  # those that were recorded
            self.log.clear()
        if "watch" in options:
            drawn, read_faults = options.pop("watch")
            options["draw"] = watched_draw(self.model, drawn, read_faults)
        common = cache, self.scheduler, VOCAB, byte_tokenizer(), [EOS]
        self.engine = engine_class(forward, *common, **options)
        self.listen()

    def listen(self) -> None:
        """Note at each landing whether the next step was planned by then."""
        update, preempt = self.scheduler.update, self.scheduler.preempt
        continue_running = self.scheduler._continue_running

        def update_and_note(plan, continuations):
            # A sequence's count advances with each plan: here beyond what this one computed.
            later = [e.seq.num_computed_tokens > e.start + e.num_new_tokens for e in plan.scheduled]
            self.num_ahead += any(later)
            self.log.append(("land", any(later)))
            update(plan, continuations)

        def preempt_and_note(seq):
            self.log.append(("preempt", seq.request.request_id))
            preempt(seq)

        def preempt_first(plan, *args):
            if self.preempts_next and self.scheduler.running:
                self.preempts_next = False
                self.scheduler._preempt_last(plan)
            return continue_running(plan, *args)

        self.scheduler.update, self.scheduler.preempt = update_and_note, preempt_and_note
        self.scheduler._continue_running = preempt_first

    def add(self, prompt, strategy=None, **params) -> str:
        """Queue a request; sampled ones bring a seed, so that they draw the same alone."""
        own = {} if strategy is None else {"strategy": strategy}
        request_id = self.engine.add_request(list(prompt), SamplingParams(**params), **own)
        self.wanted[request_id] = (tuple(prompt), strategy, params)
        self.requests[request_id] = self.engine.requests[request_id]
        return request_id

    def abort(self, request_id: str) -> None:
        assert self.engine.abort(request_id) and not self.engine.abort(request_id)
        self.aborted.add(request_id)
        self.scheduler.check_integrity()

    def sequences(self):
        return [seq for request in self.requests.values() for seq in request.sequences]

    def step(self):
        """One step, and everything that must hold after it."""
        ended = {seq for seq in self.sequences() if seq.status == FINISHED}
        try:
            step = self.engine.step()
        finally:
            self.check_sequences()
        self.check(step, ended)
        return step

    def check_sequences(self) -> None:
        self.scheduler.check_integrity()
        for seq in self.scheduler.running:
            assert seq.status == RUNNING and seq.num_computed_tokens <= len(seq.token_ids)
        for request_id, request in self.requests.items():
            prompt, strategy, params = self.wanted[request_id]
            if strategy is None:
                texts = alone(prompt, strategy, params).outputs
                assert len(request.sequences) in (1, len(texts))  # one until its prompt is computed
                for seq, text in zip(request.sequences, texts):
                    whole = [*prompt, *text.token_ids]
                    assert seq.token_ids == whole[: len(seq.token_ids)], "no token of its text"

    def check(self, step, ended, was_interrupted=False) -> None:
        plan = step.plan
        assert not ended & {seq for seq, _, _ in plan.scheduled}
        assert not ended & {*plan.sampled, *plan.preempted}
        reported = {delta.request_id for delta in step.deltas}
        assert reported == {seq.request.request_id for seq in plan.sampled}
        assert not reported & (self.aborted | self.finished.keys())
        for delta in step.deltas:
            ids, texts = self.streams.setdefault((delta.request_id, delta.index), ([], []))
            own = self.wanted[delta.request_id][1]
            assert own or len(delta.token_ids) == 1 or delta.finish_reason == "error"
            ids += delta.token_ids
            texts.append(delta.text)
            assert ids == delta.seq.token_ids[delta.seq.num_prompt_tokens :], "skipped or repeated"
        for output in step.finished:
            self.finished[output.request_id] = output
            for o in output.outputs:
                assert "".join(self.streams[output.request_id, o.index][1]) == o.text
        self.num_held += step.blocks.taken - step.blocks.freed
        if not was_interrupted:  # a kept output counts the blocks before the repair freed them
            assert self.num_held == self.allocator.num_blocks - self.allocator.num_free
        assert step.timings.total > 0

    def run(self, between_steps=lambda step: None) -> "Served":
        """Step until all is done, and compare each text with that of the request alone."""
        for _ in range(20_000):
            if not self.engine.has_unfinished():
                break
            between_steps(self.step())
        else:
            pytest.fail("20,000 steps, and no end: a livelock")
        assert self.allocator.num_free == self.allocator.num_blocks
        assert self.finished.keys() == self.wanted.keys() - self.aborted
        for request_id, output in self.finished.items():
            if request_id not in self.failed:
                assert report_of(output) == report_of(alone(*self.wanted[request_id]))
        assert not self.failed or self.model.num_nan
        return self

    @property
    def failed(self) -> set[str]:
        """The requests of which a text ended with an error."""
        reasons = {i: [o.finish_reason for o in out.outputs] for i, out in self.finished.items()}
        return {request_id for request_id, found in reasons.items() if "error" in found}

    @property
    def num_rows(self) -> int:
        """Tokens that the model was asked for, in all of its calls."""
        return sum(map(len, self.model.calls))

    @property
    def landings(self) -> list[bool]:
        """Of each step that has landed: was the next one planned before?"""
        return [value for what, value in self.log if what == "land"]


def report_of(output) -> tuple:
    """All that a client learns of a request, but for the times."""
    texts = [
        (o.index, o.token_ids, o.text, o.finish_reason, o.stop_reason, o.logprobs)
        for o in output.outputs
    ]
    return output.prompt_token_ids, texts, output.prompt_logprobs


ALONE = {}


def alone(prompt, strategy, params):
    """The output of a request that is served alone, by the engine that plans a step at a time."""
    key = (prompt, strategy, repr(sorted(params.items())))
    if key not in ALONE:
        served = Served(InferenceEngine, num_blocks=3 * MAX_SEQ_LEN)
        served.add(prompt, strategy, **params)
        while served.engine.has_unfinished():
            finished = served.engine.step().finished
        (ALONE[key],) = finished
    return ALONE[key]


def some_prompts(lengths, seed=1):
    numbers = random.Random(seed)
    return [[numbers.choice(LETTERS) for _ in range(length)] for length in lengths]


GREEDY = {"temperature": 0, "ignore_eos": True}  # runs to max_tokens
PLAIN = [
    {"temperature": 0},
    {"seed": 1},
    {"seed": 2, "temperature": 0.7, "top_k": 3},
    {"seed": 3, "top_p": 0.8},
    {"seed": 4, "min_p": 0.1, "ignore_eos": True},
    {"seed": 5, "stop": ["ab", "h"]},
    {"seed": 6, "stop_token_ids": [70]},
    {"seed": 7, "n": 3},
]
CAREFUL = [
    {"temperature": 0, "presence_penalty": 1.0},
    {"temperature": 0, "frequency_penalty": 0.5},
    {"seed": 8, "repetition_penalty": 1.3},
    {"seed": 9, "logit_bias": {64: 2.0}},
    {"seed": 10, "min_tokens": 3},
    {"seed": 11, "logprobs": 2},
    {"temperature": 0, "logprobs": 0},
    {"seed": 12, "prompt_logprobs": 1},
]


def two_children(sequences, logits):
    """A strategy: each sequence goes on as two after its second token."""
    if not logits.isfinite().all():
        raise ValueError("a strategy refuses what is no number itself")
    futures = []
    for seq, (best, second) in zip(sequences, logits.topk(2).indices.tolist(), strict=True):
        futures.append(Continuation(seq, [best]))
        if seq.num_generated == 1 and seq.index == 0:
            futures.append(Continuation(seq, [second]))
    return futures


def own_strategy(sequences, logits):
    """The default strategy as another function: the engine cannot know that it is the same."""
    return sample_next(sequences, logits)


# ---- a step ahead --------------------------------------------------------------------------------
def watched(faults=None, **options):
    """Three requests of 8 tokens, watched; and the tokens that each launch drew."""
    drawn = {}
    served = Served(watch=(drawn, faults or {}), **options)
    for prompt in some_prompts([3, 6, 2]):
        served.add(prompt, max_tokens=8, **GREEDY)
    return served, drawn


def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_read():
    """And not more than one, and its inputs are the tokens that the one before drew."""
    served, drawn = watched()
    served.run()
    log, calls = served.log, served.model.calls
    assert [number for what, number in log if what == "launch"] == list(range(1, 9))
    assert served.landings == [True] * 7 + [False]
    first_read = {}
    for index, (what, number) in enumerate(log):
        if what == "read":
            first_read.setdefault(number, index)
    assert list(first_read) == list(range(1, 9))  # each is read, in this order
    in_flight = 0
    for what, _ in log:
        in_flight += {"launch": 1, "land": -1}.get(what, 0)
        assert 0 <= in_flight <= 2
    assert [len(ids) for ids in calls] == [3 + 6 + 2] + [3] * 7
    for number in range(1, 8):
        assert log.index(("launch", number + 1)) < first_read[number]
        assert calls[number].tolist() == drawn[number]
    assert len({token_id for ids in drawn.values() for token_id in ids}) > 4


def test_a_step_returns_what_the_serial_engine_returns():
    """Step by step: which sequences ran, which positions, which were sampled, what was new."""

    def seen(engine_class):
        served, steps = Served(engine_class), []
        for prompt, max_tokens in zip(some_prompts([3, 6, 2, 9]), (8, 5, 7, 1), strict=True):
            served.add(prompt, max_tokens=max_tokens, **GREEDY)

        def keep(step):
            plan = step.plan
            spans = [(e.seq.request.request_id, e.start, e.num_new_tokens) for e in plan.scheduled]
            sampled = [seq.request.request_id for seq in plan.sampled]
            deltas = [(d.request_id, d.token_ids, d.text, d.finish_reason) for d in step.deltas]
            finished = [report_of(output) for output in step.finished]
            steps.append((spans, sampled, deltas, finished, step.blocks.copied))

        served.run(keep)
        return steps, served.landings

    (serial, never), (ahead, landings) = seen(InferenceEngine), seen(AheadEngine)
    assert ahead == serial and len(serial) == 8
    assert not any(never) and landings == [True] * 7 + [False]


@pytest.mark.parametrize("params", PLAIN, ids=str)
def test_plain_requests_are_planned_ahead_and_write_the_same(params):
    served = Served()
    for prompt in some_prompts([3, 6, 2]):
        served.add(prompt, max_tokens=9, **params)
    served.run()
    assert served.num_ahead >= 3


# ---- when it does not pay ------------------------------------------------------------------------
@pytest.mark.parametrize(
    "params, strategy",
    [*((params, None) for params in CAREFUL), (GREEDY, own_strategy), (GREEDY, two_children)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_beside_a_careful_request_the_engine_plans_a_step_at_a_time(params, strategy):
    """Its next token depends on tokens that the host has to know first, or on the logits."""
    served = Served()
    for prompt in some_prompts([3, 6]):
        served.add(prompt, max_tokens=9, **GREEDY)
    params = params | {"max_tokens": 4, "ignore_eos": True}
    careful = served.add(some_prompts([4])[0], strategy, **params)
    while careful not in served.finished:
        served.step()
        assert served.num_ahead == 0
    served.run()
    assert served.num_ahead >= 3
    if strategy is not two_children:  # which is two rows from its third token on
        assert [len(ids) for ids in served.model.calls] == [13, 3, 3, 3, 2, 2, 2, 2, 2]


def test_once_a_careful_request_is_aborted_steps_are_planned_ahead_again():
    served = Served()
    served.add(some_prompts([3])[0], max_tokens=9, **GREEDY)
    careful = served.add(some_prompts([4])[0], max_tokens=9, logprobs=1, **GREEDY)
    served.step()
    served.step()
    assert served.num_ahead == 0
    served.abort(careful)
    served.run()
    assert served.landings == [False, False] + [True] * 6 + [False]


def test_the_pieces_of_a_prompt_are_planned_ahead_too():
    """Ten tokens under a budget of 4: pieces of 4, 4 and 2, and only the last has a token."""
    served = Served(budget=4)
    served.add(some_prompts([10])[0], max_tokens=4, **GREEDY)
    served.run()
    assert [len(ids) for ids in served.model.calls] == [4, 4, 2, 1, 1, 1]
    assert served.landings == [True] * 5 + [False]


def test_with_fewer_free_blocks_than_sequences_the_engine_plans_a_step_at_a_time():
    """A plan made ahead then never preempts a sequence in flight."""
    served = Served(num_blocks=5)  # of 4 tokens: two prompts of 5 take 4, and 1 is free
    for prompt in some_prompts([5, 5]):
        served.add(prompt, max_tokens=3, **GREEDY)
    served.run()
    assert served.num_ahead == 0
    served = Served(num_blocks=6)
    for prompt in some_prompts([5, 5]):
        served.add(prompt, max_tokens=3, **GREEDY)
    served.run()
    assert served.landings == [True, True, False]


# ---- how sequences end ---------------------------------------------------------------------------
def test_an_end_by_length_is_known_beforehand_and_wastes_nothing():
    calls = []
    for engine_class in (InferenceEngine, AheadEngine):
        served = Served(engine_class)
        for prompt, max_tokens in zip(some_prompts([3, 6, 2, 60]), (1, 8, 5, None), strict=True):
            served.add(prompt, max_tokens=max_tokens, **GREEDY)
        served.run()
        calls.append([len(ids) for ids in served.model.calls])
    # The prompt of 60 reaches the context's 64 tokens with its fourth.
    assert calls[0] == calls[1] == [71, 3, 3, 3, 2, 1, 1, 1]
    assert served.landings == [True] * 7 + [False]
    assert served.engine.num_wasted_tokens == 0


@functools.cache
def ends_with_eos() -> tuple[list[int], list[int]]:
    """A prompt and its greedy text: 4 different letters or more, then the end of text."""
    for seed in range(1000):
        (prompt,) = some_prompts([3], seed)
        output = alone(tuple(prompt), None, {"temperature": 0, "max_tokens": 20}).outputs[0]
        text = output.token_ids
        if output.finish_reason == "stop" and 5 <= len(text) <= 8 and len(set(text[:4])) == 4:
            return prompt, output.token_ids
    raise AssertionError("no such prompt")


def ending(kind: str) -> tuple[list[int], dict, int]:
    """A prompt, parameters under which its text is stopped, and the tokens that it has then."""
    prompt, text = ends_with_eos()
    if kind == "end of text":
        return prompt, {"temperature": 0}, len(text)
    if kind == "stop token":
        return prompt, {"temperature": 0, "stop_token_ids": [text[3]]}, 4
    return prompt, {"temperature": 0, "stop": [byte_tokenizer().decode(text[2:4])]}, 4


EACH_END = pytest.mark.parametrize("kind", ["end of text", "stop token", "stop string"])


@EACH_END
def test_a_text_that_is_stopped_wastes_the_row_that_is_in_flight(kind):
    """The host learns of it when the next step runs already: one token is dropped."""
    prompt, params, num_tokens = ending(kind)
    served = Served()
    stopped = served.add(prompt, max_tokens=20, **params)
    other = served.add(some_prompts([6])[0], max_tokens=14, **GREEDY)
    steps = []

    def look(step):
        steps.append([seq.request.request_id for seq, _, _ in step.plan.scheduled])
        if len(steps) == num_tokens:
            assert stopped in served.finished
            # Its blocks are free at once. The other's hold the tokens of the step in flight too.
            held = -(-(6 + num_tokens) // 4)
            assert served.allocator.num_free == served.allocator.num_blocks - held
            assert served.engine.num_wasted_tokens == 1

    served.run(look)
    assert served.finished[stopped].outputs[0].finish_reason == "stop"
    both, rest = [stopped, other], 14 - num_tokens
    assert steps == [both] * num_tokens + [[other]] * rest
    assert [len(ids) for ids in served.model.calls] == (
        [3 + 6] + [2] * (num_tokens - 1) + [2] + [1] * (rest - 1)
    )
    assert served.engine.num_wasted_tokens == 1


@pytest.mark.parametrize("options", [{}, {"budget": 12}, {"max_num_seqs": 2}], ids=str)
def test_the_model_is_asked_for_the_wasted_rows_more_and_nothing_else(options):
    rows = []
    for engine_class in (InferenceEngine, AheadEngine):
        served = Served(engine_class, num_blocks=200, **options)
        numbers = random.Random(4)
        for i in range(30):
            (prompt,) = some_prompts([numbers.randint(1, 12)], seed=i)
            served.add(prompt, max_tokens=numbers.randint(1, 12), **numbers.choice(PLAIN))
        served.run()
        rows.append(served.num_rows)
        assert served.scheduler.num_preemptions == 0
    assert served.num_ahead > 10
    assert rows[1] - rows[0] == served.engine.num_wasted_tokens > 3


# ---- joins, leaves, preemptions ------------------------------------------------------------------


def doubling(seq) -> int:
    """A reservation that grows by leaps: room for 8 tokens, from 8 on for 16, then for 32."""
    return 1 << len(seq.token_ids).bit_length()


def test_a_step_planned_ahead_may_preempt_who_is_in_flight_and_changes_no_text():
    """Two hold 4 of 10 blocks each. For its 17th token the first wants 4 more, and 2 are free."""
    served = Served(num_blocks=10, reserve=doubling)
    for prompt in some_prompts([6, 6]):
        served.add(prompt, max_tokens=14, **GREEDY)
    served.run()
    events = [what for what, _ in served.log]
    in_flight = [
        events[:i].count("launch") - events[:i].count("land")
        for i, what in enumerate(events)
        if what == "preempt"
    ]
    assert in_flight == [1]


def state_of(seq) -> str | None:
    """In which state a sequence is aborted."""
    if seq.status == WAITING:
        return "preempted" if seq.num_preemptions else "waiting"
    return "decoding" if seq.num_generated else "mid-prompt"


# ---- interruptions -------------------------------------------------------------------------------
def run_with_interruptions(served, kinds):
    """Run to the end; returns at which steps it was interrupted, and how."""
    interruptions = []
    for number in range(1, 2000):
        if not served.engine.has_unfinished():
            return interruptions
        try:
            served.step()
        except kinds as error:
            interruptions.append((number, error))
    pytest.fail("no end: a livelock")


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("call", [1, 3, 8])
@pytest.mark.parametrize("options", [{}, {"budget": 5}, {"num_blocks": 9}], ids=str)
def test_an_exception_in_the_forward_loses_nothing(options, call, error):
    """In the first, and in one that is launched while the tokens of another are on their way."""
    served = Served(faults={call: error}, **options)
    for prompt, params in zip(some_prompts([3, 6, 2, 4]), PLAIN, strict=False):
        served.add(prompt, max_tokens=8, **(params | {"ignore_eos": True}))
    met = run_with_interruptions(served, type(error))
    assert [raised for _, raised in met] == [error]
    served.run()
    assert served.num_ahead > 0 or options


@pytest.mark.parametrize("another_joins", [False, True])
@pytest.mark.parametrize("launch", [1, 2, 4, 8])
def test_an_interrupt_while_the_host_waits_for_tokens_loses_nothing(launch, another_joins):
    """Where Ctrl-C is met most often: two steps are in flight then.

    A request that has just joined is in the younger one only.
    """
    error = KeyboardInterrupt()
    served, _ = watched({launch: error})
    if another_joins:
        for _ in range(launch - 1):
            served.step()
        served.add(some_prompts([5])[0], max_tokens=6, **GREEDY)
    met = run_with_interruptions(served, KeyboardInterrupt)
    assert [raised for _, raised in met] == [error]
    served.run()
    assert ("read", launch) in served.log


@pytest.mark.parametrize("call", [1, 2, 5])
def test_logits_that_are_not_numbers_end_their_own_sequence_in_the_step_that_reads_them(call):
    """As in the serial engine; the others go on, and the row that is in flight is dropped."""
    texts = []
    for engine_class in (InferenceEngine, AheadEngine):
        served = Served(engine_class, faults={call: "nan"})
        for prompt in some_prompts([3, 6, 2]):
            served.add(prompt, max_tokens=8, **GREEDY)
        served.run()
        texts.append([report_of(output) for _, output in sorted(served.finished.items())])
        assert served.failed == {"2"}
    assert texts[0] == texts[1]
    ((_, token_ids, _, reason, _, _),) = texts[1][2][1]
    assert (len(token_ids), reason) == (call - 1, "error")
    assert served.engine.num_wasted_tokens == 1


LOOP = ("engine.py", "plan_ahead.py", "scheduler.py", "outputs.py", "block_allocator.py")


def interrupted_run(line: int) -> tuple[int, int]:
    """Serve four requests and interrupt one line of the loop; returns the lines, the exceptions."""
    served, counter, met = Served(num_blocks=14, budget=12), [0], 0
    params = [{"temperature": 0}, {"seed": 7, "n": 3}, {"seed": 5, "stop": ["ab", "h"]}]
    for prompt, own in zip(some_prompts([9, 6, 3]), params, strict=True):
        served.add(prompt, max_tokens=8, **own)
    was_interrupted = False
    while served.engine.has_unfinished():
        ended = {seq for seq in served.sequences() if seq.status == FINISHED}
        try:
            with interrupted_at(line, LOOP, counter):
                step = served.engine.step()
        except KeyboardInterrupt:
            met, was_interrupted = met + 1, True
            continue
        served.check_sequences()
        # After an interruption behind the update, the output is of the step before.
        served.check(step, set() if was_interrupted else ended, was_interrupted)
        was_interrupted = False
    served.run()
    assert served.num_ahead > 0
    return counter[0], met


def test_ctrl_c_at_any_line_of_a_step_loses_no_token_and_reports_none_twice():
    interrupted_run(-1)  # makes what is made once
    num_lines, met = interrupted_run(-1)
    assert met == 0 and num_lines > 2000
    for line in random.Random(SEED).sample(range(1, num_lines), 60):
        _, met = interrupted_run(line)
        assert met == 1, line


@pytest.mark.regression
@pytest.mark.parametrize("leaves", ["aborted", "preempted", "ended"])
def test_logits_that_are_not_numbers_of_a_sequence_that_has_left_stop_no_other(leaves):
    """Its row was launched before it left. The last row of that call is NaN, and it is its row."""
    prompt, params, num_tokens = ending("end of text")
    call = num_tokens + 1 if leaves == "ended" else 2
    served = Served(faults={call: "nan"})
    served.add(some_prompts([6])[0], max_tokens=14, **GREEDY)
    last = served.add(prompt, max_tokens=20, **params)
    if leaves != "ended":
        served.step()  # launches the second call
        if leaves == "aborted":
            served.abort(last)
        else:
            served.preempts_next = True
    served.run()
    assert len(served.model.calls[call - 1]) == 2, "the row that left was in that call"


# ---- random traffic ------------------------------------------------------------------------------
def random_request(numbers: random.Random, careful: float) -> tuple[list[int], object, dict]:
    """A prompt, perhaps a strategy, and parameters; a share `careful` is not plain."""
    prompt = [numbers.choice(LETTERS) for _ in range(numbers.randint(1, 14))]
    params, strategy = dict(numbers.choice(PLAIN)), None
    if numbers.random() < careful:
        params = dict(numbers.choice(CAREFUL))
        strategy = numbers.choice([None, None, own_strategy, two_children])
    if strategy is two_children:
        params = {"temperature": 0}  # it reports no probabilities
    if "seed" in params:
        params["seed"] = numbers.randrange(100)
    params["max_tokens"] = numbers.randint(params.get("min_tokens", 1), 12)
    return prompt, strategy, params


def random_faults(numbers: random.Random) -> dict:
    """In a few of the first 150 calls."""
    kinds = [RuntimeError("out of memory"), KeyboardInterrupt(), "nan", "nan"]
    return {numbers.randint(1, 150): numbers.choice(kinds) for _ in range(4)}


def serve_traffic(seed: int, num_requests: int = 30) -> Counter:
    """Requests come, are aborted and preempted, calls fail; counts what happened."""
    numbers = random.Random(seed)
    block_size = numbers.choice([1, 2, 4, 7])
    longest = -(-26 // block_size)  # blocks of a sequence: up to 14 tokens, and 12 more
    served = Served(
        num_blocks=longest + numbers.choice([0, 3, 50]),
        block_size=block_size,
        max_num_seqs=numbers.choice([1, 2, 4, 16]),
        budget=numbers.choice([3, 8, UNLIMITED, UNLIMITED]),
        reserve=numbers.choice([reserve_now, reserve_now, doubling]),
        faults=random_faults(numbers) if numbers.random() < 0.5 else {},
    )
    careful, happened = numbers.choice([0, 0, 0.1, 0.5]), Counter()

    def unfinished():
        sequences = [seq for seq in served.sequences() if seq.status != FINISHED]
        return [seq for seq in sequences if seq.request.request_id not in served.aborted]

    def abort_one():
        states = sorted(set(map(state_of, unfinished())))
        if states:
            state = numbers.choice(states)  # first, for some states are rare
            candidates = [seq for seq in unfinished() if state_of(seq) == state]
            served.abort(numbers.choice(candidates).request.request_id)
            happened[state] += 1

    while len(served.wanted) < num_requests or served.engine.has_unfinished():
        for _ in range(numbers.choice([0, 0, 1, 3])):
            if len(served.wanted) < num_requests:
                prompt, strategy, params = random_request(numbers, careful)
                served.add(prompt, strategy, **params)
        try:
            served.step()
        except (RuntimeError, KeyboardInterrupt):
            happened["interrupted"] += 1
        if numbers.random() < (0.3 if "preempted" in map(state_of, unfinished()) else 0.1):
            abort_one()
        served.preempts_next |= numbers.random() < 0.1
        happened["steps"] += 1
        assert happened["steps"] < 5000, "a livelock"
    served.run()
    happened["ahead"], happened["wasted"] = served.num_ahead, served.engine.num_wasted_tokens
    happened["preemptions"] = served.scheduler.num_preemptions
    happened["finished"], happened["failed"] = len(served.finished), len(served.failed)
    return happened


def assert_everything_happened(happened: Counter, times: int) -> None:
    counted = ["ahead", "wasted", "preemptions", "interrupted", "finished", "failed"]
    counted += ["waiting", "mid-prompt", "decoding", "preempted"]
    assert all(happened[name] >= times for name in counted), happened
    assert happened["ahead"] < happened["steps"] - times, "some steps were planned alone"


@pytest.mark.parametrize(
    "seeds, times", [(range(10), 3), pytest.param(range(100, 200), 20, marks=pytest.mark.slow)]
)
def test_random_traffic_writes_what_each_request_writes_alone(seeds, times):
    happened = Counter()
    for seed in seeds:
        happened += serve_traffic(1000 * SEED + seed)
    assert_everything_happened(happened, times)


# ---- through recorded steps ----------------------------------------------------------------------
class SameMemory(Calls):
    """The CPU's stand-in for graphs, as strict: a replay's results always lie in the same place."""

    def record(self, function):
        kept = []

        def replay():
            results = function()
            several = results if isinstance(results, tuple) else (results,)
            if not kept:
                kept.extend(torch.empty_like(result) for result in several)
            for place, result in zip(kept, several, strict=True):
                place.copy_(result)
            return type(results)(kept) if isinstance(results, tuple) else kept[0]

        return replay


interpreted = pytest.mark.skipif(not INTERPRETED, reason="a GPU has a test of its own, below")


@interpreted
def test_recorded_steps_draw_the_same_while_the_batch_grows_and_shrinks():
    """Recorded for 1, 2 and 4 rows, of which some are padded; a request more before each step."""
    served = Served(sizes=[1, 2, 4])
    params = [{"temperature": 0}, {"seed": 1}, {"seed": 2, "top_k": 3}, {"seed": 3, "top_p": 0.8}]
    to_come = list(zip(some_prompts([1, 1, 5, 1]), params, (9, 7, 5, 2), strict=True))

    def one_more(step):
        if to_come:
            prompt, own, max_tokens = to_come.pop(0)
            served.add(prompt, max_tokens=max_tokens, ignore_eos=True, **own)

    one_more(None)
    served.run(one_more)
    sizes = [len(ids) for ids in served.model.calls]
    assert set(sizes) >= {1, 2, 4} and served.num_ahead >= 6
    assert served.engine.num_wasted_tokens == 0


@interpreted
@pytest.mark.parametrize("engine_class", [InferenceEngine, AheadEngine])
def test_a_prompt_that_forks_does_so_beside_and_between_recorded_steps(engine_class):
    """A prompt of one token is one row, like a decode step, but three tokens are drawn from it.

    The texts share a block of 4 tokens, and copy it in the step after that: a recorded one.
    """
    served = Served(engine_class, sizes=[1, 2, 4])
    to_come = some_prompts([1, 5])

    def one_more(step):
        if to_come:
            served.add(to_come.pop(0), seed=7, n=3, max_tokens=8, ignore_eos=True)

    one_more(None)
    copied = []
    served.run(lambda step: (one_more(step), copied.append(step.blocks.copied)))
    assert sum(copied) == 4 and served.model.num_nan == 0
    assert len(served.model.calls[0]) == 1 and {len(ids) for ids in served.model.calls} >= {4}
    # The last of 8 tokens is not computed. Padded rows count too: 6 texts run in a step of 6 rows.
    assert served.num_rows >= 1 + 5 + 6 * 7


# ---- only a GPU can say --------------------------------------------------------------------------
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("num_blocks", [400, 24])
def test_the_shipped_model_writes_the_same_through_graphs(shipped_model_folder, num_blocks, dtype):
    """In float64, so that the shape of a batch decides no token; the sampler gets 32 bits."""
    from checkpoints.load import load_model

    model = load_model(shipped_model_folder, dtype, DEVICE)
    tokenizer, config = load_tokenizer(shipped_model_folder), model.config
    words = "Once upon a time there lived in a great forest an old woman and her goats".split()
    numbers = random.Random(SEED)
    requests = []
    for i in range(24):
        kinds = [{"temperature": 0}, {"seed": i}, {"seed": i, "top_k": 40, "top_p": 0.9}]
        kinds += [{"seed": i, "stop": ["the", "."]}]
        text = " ".join(words[numbers.randrange(8) :][: numbers.randint(1, 9)])
        requests.append((text, {**kinds[i % 4], "max_tokens": numbers.randint(4, 60)}))

    def serve(engine_class):
        shape = (config.n_layer, num_blocks, 16, config.n_head, config.head_dim)
        cache = KVCache(*shape, dtype, DEVICE)
        eager = eager_forward(model, cache, paged_attention_triton, write_kv_triton)
        scheduler = Scheduler(BlockAllocator(num_blocks, 16), 12, 512, 256)

        def forward(batch):
            return eager(batch).float()

        options = {"draw": draw_tokens_triton}
        if engine_class is AheadEngine:
            sizes = recorded_sizes(12)
            forward = GraphForward(cache, forward, sizes, 256, sampler=sample_triton)
            options |= {"decode": forward.decode}
        eos = [tokenizer.eos_token_id]
        engine = engine_class(
            forward, cache, scheduler, config.vocab_size, tokenizer, eos, **options
        )
        to_come, finished = list(requests), {}
        while to_come or engine.has_unfinished():
            for text, params in to_come[:2]:
                engine.add_request(text, SamplingParams(**params))
            del to_come[:2]
            for output in engine.step().finished:
                finished[output.request_id] = output
            scheduler.check_integrity()
        assert scheduler.allocator.num_free == num_blocks
        return {request_id: report_of(output) for request_id, output in finished.items()}, engine

    (want, _), (got, engine) = serve(InferenceEngine), serve(AheadEngine)
    assert got == want
    assert (engine.num_wasted_tokens > 0) or num_blocks == 24
    assert (engine.scheduler.num_preemptions > 0) == (num_blocks == 24)
    assert len({token_id for _, texts, _ in want.values() for token_id in texts[0][1]}) > 100
