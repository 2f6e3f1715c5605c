"""Nothing breaks the loop: interrupts, exceptions at any line, guilty requests, other threads.

A client sees five promises kept, whatever happens. Each request ends once, by an abort that
returned True or by one output. Its tokens, texts and log-probabilities are those of its lone run.
All blocks are free in the end. A call that raised has done nothing. One request's fault ends one
request. The traffic, the stand-in for the model and the checks are in tests/traffic.py.
"""

import _thread
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections import Counter, deque

import pytest
import torch
from conftest import ROOT
from tqdm import tqdm
from traffic import (
    AHEAD,
    ENGINES,
    EOS,
    SPECS,
    TABLE,
    VOCAB_SIZE,
    Ledger,
    add,
    alone,
    build,
    check_nothing_is_left,
    content,
    draw_engine,
    draw_traffic,
    fork_once,
    next_row,
    spec,
)

from engine import InferenceEngine, sample_next
from llm import LLM
from prefix_cache import PrefixCache
from sampling import Logprob, SampleRow, SamplingParams, child_seed, sample
from scheduler import Scheduler
from sequence import Continuation
from speedups.plan_ahead import AheadEngine

BOTH = pytest.mark.parametrize("kind", ENGINES, ids=["plain", "ahead"])


def test_a_lone_run_is_what_a_loop_without_an_engine_writes():
    """The oracle of this file, checked by sampling from the function of the tokens itself."""
    for index, request in enumerate(AHEAD):
        engine = build()
        prompt = engine._encode(request.prompt, request.params)
        for i, completion in enumerate(alone(index)[2]):
            seed, ids = child_seed(request.params.seed or 0, i), list(prompt)
            for _ in completion["token_ids"]:
                row = SampleRow(request.params, seed, len(ids), ids, len(prompt), EOS)
                ids.append(sample(TABLE[[next_row(ids)]], [row])[0].item())
            assert ids[len(prompt) :] == completion["token_ids"]


@BOTH
def test_random_traffic_writes_what_each_request_writes_alone(kind):
    num_preemptions = num_hits = num_evicted = 0
    for seed in range(40):
        ledger = Ledger(draw_engine(kind, seed))
        ledger.play(draw_traffic(seed))
        ledger.check()
        num_preemptions += ledger.engine.scheduler.num_preemptions
        num_hits += ledger.engine.scheduler.num_blocks_hit
        num_evicted += ledger.engine.scheduler.allocator.num_evicted
    assert num_preemptions > 20 and num_hits > 30 and num_evicted > 50


# ---- signals -------------------------------------------------------------------------------------
class Shots:
    """Real signals at random moments, whose handler raises KeyboardInterrupt inside `call`.

    They come from a timer of the operating system, or from another thread. With `in_pairs` a
    second one follows within a tenth of a millisecond, which often meets the repair.
    """

    def __init__(self, seed):
        self.numbers = random.Random(seed)
        self.left = self.numbers.randint(1, 5)
        self.in_pairs = self.numbers.random() < 0.3
        self.by_thread = self.numbers.random() < 0.3
        self.is_second = False  # the next shot is the second of a pair
        self.is_open = False
        self.hits = Counter()  # names of the functions that a signal met

    def __enter__(self):
        self.before = [signal.signal(s, self.handle) for s in (signal.SIGALRM, signal.SIGINT)]
        # An exception out of a callback of the garbage collector goes here. pytest's own function
        # is Python code: a signal that meets it would fail the test.
        self.hook_before, sys.unraisablehook = sys.unraisablehook, deque(maxlen=0).append
        self.arm(self.numbers.uniform(0, 0.02))
        return self

    def __exit__(self, *error):
        self.left = 0
        signal.setitimer(signal.ITIMER_REAL, 0)
        time.sleep(0.004 if self.by_thread else 0)  # its thread may be about to send one
        for number, handler in zip((signal.SIGALRM, signal.SIGINT), self.before):
            signal.signal(number, handler)
        sys.unraisablehook = self.hook_before

    def arm(self, seconds):
        if self.by_thread and seconds > 0.001:
            send = self.numbers.choice(
                [
                    _thread.interrupt_main,
                    lambda: signal.raise_signal(signal.SIGINT),
                    lambda: os.kill(os.getpid(), signal.SIGINT),
                ]
            )
            threading.Thread(target=lambda: (time.sleep(min(seconds, 0.003)), send())).start()
        else:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))

    def handle(self, number, frame):
        if not self.left:
            return
        if not self.is_open:  # the test's own code runs
            self.arm(20e-6)
            return
        self.left -= 1
        while frame is not None and not self.is_of_the_engine(frame):
            frame = frame.f_back
        self.hits[frame.f_code.co_name if frame else "elsewhere"] += 1
        self.is_second = self.in_pairs and not self.is_second
        if self.left:
            shortly, later = (5e-6, 1e-4), (0.001, 0.008)
            self.arm(self.numbers.uniform(*(shortly if self.is_second else later)))
        raise KeyboardInterrupt

    def is_of_the_engine(self, frame):
        return frame.f_code.co_filename in FILES.values()

    def call(self, function):
        """The function's value; it is called again after each interruption.

        Python looks for signals at calls and jumps. There is none between a return and the next
        store, so no output is lost here.
        """
        while True:
            self.is_open = True
            try:
                result = function()
                self.is_open = False
                return result
            except KeyboardInterrupt:
                self.is_open = False


FILES = {
    name: str(ROOT / name)
    for name in [
        "engine.py",
        "scheduler.py",
        "outputs.py",
        "sequence.py",
        "block_allocator.py",
        "prefix_cache.py",
        "kv_cache.py",
        "beam_search.py",
        "speedups/plan_ahead.py",
    ]
}


def interrupt_runs(kind, seeds):
    """Runs under signals; returns which functions were met, how often."""
    hits = Counter()
    for seed in seeds:
        with Shots(seed) as shots:
            ledger = Ledger(draw_engine(kind, seed), shots.call)
            ledger.play(draw_traffic(seed))
        ledger.check()
        hits += shots.hits
    return hits


@BOTH
def test_signals_at_random_moments_lose_nothing(kind):
    hits = interrupt_runs(kind, range(25))
    if hits.total() <= 40:  # a fast machine ends a run before many signals reach it
        hits += interrupt_runs(kind, range(25, 75))
    assert hits.total() > 40 and len(hits) > 8, hits


@pytest.mark.slow
@BOTH
def test_signals_at_many_random_moments_lose_nothing(kind):
    seed, num_runs = int(os.environ.get("SEED", 1000)), int(os.environ.get("RUNS", 150))
    hits = interrupt_runs(kind, range(seed, seed + num_runs))
    print(f"\n{num_runs} runs, {hits.total()} signals, in {len(hits)} functions: {hits}")
    assert hits["_repair"] + hits["rebuild"] > 0 or num_runs < 100


# ---- LLM.generate --------------------------------------------------------------------------------
def llm_around(engine):
    """An LLM whose engine is this one: `generate` uses nothing else of it."""
    llm = LLM.__new__(LLM)
    llm.engine = engine
    return llm


WITHOUT_STRATEGY = [i for i, request in enumerate(SPECS) if request.strategy is None]


def interrupt_generate(kind, seeds):
    """`generate` under signals, until it returns; returns which functions were met, how often."""
    hits = Counter()
    for seed in seeds:
        engine = draw_engine(kind, seed)
        indices = random.Random(seed).choices(WITHOUT_STRATEGY, k=5)
        prompts = [SPECS[i].prompt for i in indices]
        params = [SPECS[i].params for i in indices]
        with Shots(seed) as shots:
            while True:
                shots.is_open = True
                try:
                    outputs = llm_around(engine).generate(prompts, params)
                    shots.is_open = False
                    break
                except KeyboardInterrupt:
                    shots.is_open = False
                    check_nothing_is_left(engine)
        assert [content(output) for output in outputs] == [alone(i) for i in indices]
        check_nothing_is_left(engine)
        hits += shots.hits
    return hits


@BOTH
def test_signals_inside_generate_leave_no_request_behind(kind):
    hits = interrupt_generate(kind, range(25))
    assert hits.total() > 25, hits


@pytest.mark.slow
@BOTH
def test_many_signals_inside_generate_leave_no_request_behind(kind):
    seed, num_runs = int(os.environ.get("SEED", 1000)), int(os.environ.get("RUNS", 150))
    hits = interrupt_generate(kind, range(seed, seed + num_runs))
    print(f"\n{num_runs} runs, {hits.total()} signals, in {len(hits)} functions: {hits}")


@pytest.mark.parametrize("use_tqdm", [False, True])
def test_generate_does_not_wait_for_a_lock_that_an_interrupted_progress_bar_left(use_tqdm):
    """Ctrl-C between the two locks that tqdm takes leaves the first one taken."""
    llm, outputs = llm_around(build()), []
    release, lock = threading.Event(), tqdm.get_lock()

    def hold():
        lock.acquire()
        held.set()
        release.wait()
        lock.release()

    def serve():
        outputs.extend(llm.generate([[1, 2], [3]], use_tqdm=use_tqdm))

    held = threading.Event()
    threads = [threading.Thread(target=function, daemon=True) for function in (hold, serve)]
    threads[0].start()
    held.wait()
    threads[1].start()
    threads[1].join(timeout=10)
    is_done = len(outputs)
    release.set()
    threads[0].join()
    assert is_done == 2


# ---- an exception at every line ------------------------------------------------------------------
SENTENCE = "injected by the test"
# Two runs that reach nearly all lines: (before which step, "add", index) as in tests/traffic.py.
# In the first the overlapping engine plans ahead, and others come later; both engines preempt.
MIXED = [
    *((0, "add", index) for index in (1, 2, 3)),
    (0, "abort", 2),  # before its first step
    *((1, "add", index) for index in (5, 8)),
    (3, "abort", 3),
    *((10, "add", index) for index in (10, 11, 12, 14, 15, 16, 17, 19, 20, 22)),
    *((12, "abort", 8), (12, "abort", 0)),
]


class Lines:
    """A tracer that counts each line of the loop's files, and raises once at one of them."""

    def __init__(self, target=None, at_hit=1, error=None):
        self.target, self.at_hit, self.error = target, at_hit, error  # (file, line)
        self.hits = Counter()
        self.function = None  # in which it raised
        self.codes = {}  # does this code hold the target?

    def __enter__(self):
        if self.function is None:
            sys.settrace(self.enter_function)

    def __exit__(self, *error):
        sys.settrace(None)

    def enter_function(self, frame, event, arg):
        code = frame.f_code
        if code not in self.codes:
            lines = {line for _, _, line in code.co_lines()}
            wanted = self.target is None or self.target[1] in lines
            of_target = self.target is None or code.co_filename == self.target[0]
            is_watched = code.co_filename in FILES.values() and wanted and of_target
            self.codes[code] = is_watched and not code.co_name.startswith("__")
        return self.enter_line if self.codes[code] else None

    def enter_line(self, frame, event, arg):
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            if self.target in (None, line):
                self.hits[line] += 1
                if self.target and self.hits[line] == self.at_hit:
                    sys.settrace(None)
                    self.function = frame.f_code.co_name
                    raise self.error(SENTENCE)
        return self.enter_line


def play_with_lines(kind, lines):
    """The mixed traffic under a tracer. The forward is interrupted twice: the repair is traced too.

    Returns the ledger.
    """
    engine = build(kind, num_blocks=12, max_num_seqs=4, budget=8, allocator=PrefixCache)
    forward, num_calls = engine.forward, itertools.count(1)

    def interrupted(batch):
        if next(num_calls) in (6, 17):
            raise KeyboardInterrupt(SENTENCE)
        return forward(batch)

    engine.forward = interrupted
    if kind is AheadEngine:
        engine.decode = lambda batch, rows: engine.sampler.draw(engine.forward(batch), rows)

    def call(function):
        while True:
            before = set(engine.requests), {i: dict(r.end) for i, r in engine.requests.items()}
            try:
                with lines:
                    return function()
            except (KeyboardInterrupt, RuntimeError, ValueError) as error:
                if SENTENCE not in f"{error} {error.__cause__}":
                    raise
            if function != engine.step:  # what raised has done nothing
                assert set(engine.requests) == before[0]
                assert {i: dict(r.end) for i, r in engine.requests.items()} == before[1]
            elif engine._is_whole:  # otherwise the repair was interrupted, and is still to be done
                engine.scheduler.check_integrity()

    ledger = Ledger(engine, call)
    ledger.play(MIXED)
    return ledger


# What keeps the promises is tried at each of its lines: near the end of the run, and in its middle
# where the line is rare.
GUARDS = [InferenceEngine.step, InferenceEngine.abort, InferenceEngine.add_request]
GUARDS += [InferenceEngine._commit, AheadEngine._queue, Scheduler._end, Scheduler._fork]


def check_lines(kind, share, seed):
    """Raise at the guards' lines and at a share of all others; returns how many were tried."""
    numbers = random.Random(seed)
    reached = Lines()
    play_with_lines(kind, reached).check()
    codes = [function.__code__ for function in GUARDS]
    guards = {(code.co_filename, line) for code in codes for _, _, line in code.co_lines()}
    runs = []
    for line, num_hits in sorted(reached.hits.items()):
        if line in guards:
            hits = {num_hits - num_hits // 5, (num_hits + 1) // 2 if num_hits < 30 else num_hits}
            runs += [(line, at_hit, KeyboardInterrupt) for at_hit in hits]
        for error in (KeyboardInterrupt, RuntimeError):
            hits = {1, numbers.randint(1, num_hits)}
            runs += [(line, at_hit, error) for at_hit in hits if numbers.random() < share]
    for run in runs:
        check_line(kind, Lines(*run))
    return len(runs)


def check_line(kind, lines):
    try:
        ledger = play_with_lines(kind, lines)
        guilty = set()
        if lines.error is RuntimeError:  # a strategy, or a reserve function, may have raised it
            finished = ledger.finished().items()
            guilty = {i for i, o in finished if any(SENTENCE in (c.error or "") for c in o.outputs)}
            assert len(guilty) < 4
        # An exception between taking a watcher and calling it: no signal comes there.
        ledger.check(guilty, watchers=lines.function != "_call_watchers")
    except (AssertionError, KeyboardInterrupt, Exception) as failure:
        name = lines.error.__name__
        where = f"{name} at {lines.target[0]}:{lines.target[1]}, hit {lines.at_hit}"
        raise AssertionError(f"{where}, in {lines.function}: {failure!r}") from failure
    assert lines.function is not None, f"{lines.target} was not reached a second time"


@BOTH
def test_an_exception_at_any_line_loses_nothing(kind):
    assert check_lines(kind, share=0.01, seed=3) > 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*it no longer watches")
@BOTH
def test_an_exception_at_every_line_loses_nothing(kind):
    share, seed = float(os.environ.get("SHARE", 0.1)), int(os.environ.get("SEED", 5))
    print(f"\n{check_lines(kind, share, seed)} runs, each with an exception at another line")


# ---- one request's fault is its own --------------------------------------------------------------
INNOCENT = [0, 1, 2, 3, 5, 8, 10, 11, 14, 17]  # ten requests of SPECS


def serve_beside(kind, guilty, innocent=INNOCENT, **options):
    """Serve guilty requests among innocent ones; the guilty ones' outputs.

    The innocent ones get what they get alone.
    """
    engine = build(kind, **({"num_blocks": 24, "budget": 12} | options))
    ledger = Ledger(engine)
    for index in innocent[:5]:
        ledger.add(index)
    ids = [add(engine, request) for request in guilty]
    for index in innocent[5:]:
        ledger.add(index)
    for request_id in ids:
        ledger.index[request_id] = None
    ledger.play([])
    ledger.check(guilty=ids)
    return [ledger.finished()[i].outputs for i in ids if i not in ledger.aborted]


def assert_error(outputs, word):
    """All texts of a request ended with an error, which a sentence of one line explains."""
    assert outputs
    for output in outputs:
        assert output.finish_reason == "error"
        assert word in output.error and "\n" not in output.error, output.error


@BOTH
@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"n": 2, "logprobs": 1}], ids=str)
def test_rows_of_nan_and_infinity_end_their_two_requests_only(kind, params):
    guilty = [spec([9, 9], max_tokens=8, **params), spec([6, 9, 1], max_tokens=8, **params)]
    poison = {9: float("nan"), 6: float("inf")}
    innocent = [i for i in INNOCENT if SPECS[i].prompt[0] not in poison]
    for outputs in serve_beside(kind, guilty, innocent, poison=poison):
        assert_error(outputs, "the logits are NaN, +inf or all -inf")


@BOTH
def test_a_prompt_of_nan_rows_that_is_scored_in_chunks_ends_alone(kind):
    guilty = spec([9] * 14, prompt_logprobs=2, max_tokens=5)
    (outputs,) = serve_beside(kind, [guilty], budget=5, poison={9: float("nan")})
    assert_error(outputs, "NaN")


def returns(make):
    """A strategy that returns, after two steps, what `make(sequence)` gives for each sequence."""

    def strategy(sequences, logits):
        if sequences[0].num_generated < 2:
            return sample_next(sequences, logits)
        return [make(seq) for seq in sequences]

    return strategy


def raising(sequences, logits):
    raise ZeroDivisionError("what a strategy may do")


MISBEHAVIOURS = {  # the strategy, a word of the sentence
    "raises": (raising, "ZeroDivisionError: what a strategy may do"),
    "returns None": (lambda sequences, logits: None, "NoneType"),
    "returns []": (lambda sequences, logits: [], "no continuation for any sequence"),
    "returns a number": (lambda sequences, logits: 7, "int"),
    "returns no Continuation": (returns(lambda s: (s, [1])), "no Continuation"),
    "no tokens": (returns(lambda s: Continuation(s, [])), "at least one id"),
    "tokens None": (returns(lambda s: Continuation(s, None)), "at least one id"),
    "a tuple of tokens": (returns(lambda s: Continuation(s, (1,))), "at least one id"),
    "token -1": (returns(lambda s: Continuation(s, [1, -1])), "token id -1"),
    "token V": (returns(lambda s: Continuation(s, [VOCAB_SIZE])), f"token id {VOCAB_SIZE}"),
    **{
        f"token {wrong!r}": (returns(lambda s, w=wrong: Continuation(s, [w])), "token id")
        for wrong in (None, "a", 1.5, True, torch.tensor(3), torch.ones(3).numpy().argmax())
    },
    "a parent that is no sequence": (
        returns(lambda s: Continuation(object(), [1])),
        "no Continuation",
    ),
    "too few logprobs": (
        returns(lambda s: Continuation(s, [1, 2], [{1: Logprob(0, 1)}])),
        "logprobs",
    ),
    **{
        f"logprobs {wrong!r}": (returns(lambda s, w=wrong: Continuation(s, [1], w)), "logprobs")
        for wrong in (5, "x", {0: 1}, [None], [{}], [{1: 0.5}], [{2: Logprob(0, 1)}])
    },
    **{
        f"seed {wrong!r}": (returns(lambda s, w=wrong: Continuation(s, [1], seed=w)), "seed")
        for wrong in ("x", 1.5, -1, 2**63, True)
    },
    "a stop string": (returns(lambda s: Continuation(s, [1], stop_string="b")), "stop_string"),
    "error is no text": (returns(lambda s: Continuation(s, [], error=[5])), "error is [5]"),
    "an error of its own": (returns(lambda s: Continuation(s, [], error="no more")), "no more"),
}


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_a_strategy_that_misbehaves_ends_its_own_request(name):
    strategy, word = MISBEHAVIOURS[name]
    (outputs,) = serve_beside(
        AheadEngine, [spec([9, 9], strategy, n=2, max_tokens=8, ignore_eos=True)]
    )
    assert_error(outputs, word)


def test_a_strategy_that_takes_a_sequence_of_another_request_ends_its_own():
    seen = []

    def innocent(sequences, logits):
        seen[:] = sequences
        return sample_next(sequences, logits)

    def thief(sequences, logits):
        return [Continuation((seen or sequences)[0], [1])]

    params = {"max_tokens": 8, "ignore_eos": True}
    guilty = [spec([9, 9], innocent, **params), spec([9, 8], thief, **params)]
    robbed, robber = serve_beside(InferenceEngine, guilty)
    assert robbed[0].finish_reason == "length" and len(robbed[0].token_ids) == 8
    assert_error(robber, "no Continuation of one of its sequences")


def test_a_strategy_that_writes_into_its_arguments_harms_no_other():
    def vandal(sequences, logits):
        continuations = sample_next(sequences, logits)
        logits.fill_(float("nan"))
        sequences.clear()
        return continuations

    request = spec([9, 9], vandal, seed=3, max_tokens=8, ignore_eos=True)
    (outputs,) = serve_beside(InferenceEngine, [request])
    assert outputs[0].finish_reason == "length" and len(outputs[0].token_ids) == 8


@BOTH
def test_a_strategy_may_abort_its_own_request_or_another(kind):
    engine = build(kind)
    ledger = Ledger(engine)

    def suicide(sequences, logits):
        ledger.abort(sequences[0].request.request_id)
        return sample_next(sequences, logits)

    def murder(sequences, logits):
        ledger.abort("1")
        return fork_once(sequences, logits)

    for index in (0, 1, 2, 3, 14):
        ledger.add(index)
    ledger.index[add(engine, spec([9], suicide))] = None
    ledger.index[engine.add_request(SPECS[14].prompt, SPECS[14].params, strategy=murder)] = 14
    ledger.play([])
    ledger.check()
    assert ledger.aborted == {"1", "5"}


class Unhashable:
    __hash__ = None

    def __call__(self, sequences, logits):
        return []


class RefusesToHash(Unhashable):
    def __hash__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    "strategy",
    [5, "sample", Unhashable(), RefusesToHash(), [fork_once]],
    ids=["a number", "a word", "no hash", "a hash that raises", "a list"],
)
def test_a_strategy_that_cannot_be_called_or_hashed_is_refused(strategy):
    engine = build()
    with pytest.raises(ValueError, match="it must be callable and hashable"):
        engine.add_request([3], strategy=strategy)
    check_nothing_is_left(engine)


def test_a_strategy_that_counts_as_false_is_asked_nevertheless():
    class Empty:
        calls = 0

        def __len__(self):
            return 0

        def __call__(self, sequences, logits):
            self.calls += 1
            return sample_next(sequences, logits)

    strategy = Empty()
    serve_beside(InferenceEngine, [spec([9, 9], strategy, max_tokens=4, ignore_eos=True)])
    assert strategy.calls == 4


# ---- the scheduler's two functions ---------------------------------------------------------------
def explode(seq):
    raise ZeroDivisionError


def returning(value):
    return lambda seq: value


WRONG_KEYS = [returning(v) for v in (None, float("nan"), (1, None), [1], {1}, 1j, object())]
WRONG_RESERVES = [returning(v) for v in (None, float("nan"), 5.0, "a", True, 10**9)]


@pytest.mark.parametrize(
    "scheduling",
    [{"policy": f} for f in [explode, *WRONG_KEYS]]
    + [{"reserve": f} for f in [explode, *WRONG_RESERVES]],
)
def test_a_policy_or_reserve_that_fails_at_once_refuses_the_request(scheduling):
    engine = build(scheduling=scheduling)
    with pytest.raises(ValueError):
        add(engine, SPECS[0])
    check_nothing_is_left(engine)


def later(function, good, num_good):
    """A policy or `reserve` that is good for the first calls, and then another one."""
    calls = itertools.count()
    return lambda seq: (good if next(calls) < num_good else function)(seq)


def serve_through_refusals(kind, scheduling):
    """Add all kinds of requests; those that are not refused get their text, or an error alone."""
    ledger = Ledger(build(kind, num_blocks=16, scheduling=scheduling))
    for index in (0, 14, 1, 2, 10, 15, 5, 8):
        try:
            ledger.add(index)
        except ValueError:
            pass
    ledger.play([])
    errors = {i for i, o in ledger.finished().items() if any(c.error for c in o.outputs)}
    ledger.check(guilty=errors)
    return len(ledger.index), len(errors)


@BOTH
@pytest.mark.parametrize("num_good", [1, 3, 8, 12])
def test_a_policy_that_fails_later_ends_the_sequences_it_is_asked_for(kind, num_good):
    for wrong in [explode, *WRONG_KEYS, returning("a"), returning((1, "a"))]:
        policy = later(wrong, lambda seq: (seq.request.arrival, seq.index), num_good)
        num_added, num_errors = serve_through_refusals(kind, {"policy": policy})
        assert num_added >= 1 and num_errors <= 2  # the forks of two requests


@BOTH
@pytest.mark.parametrize("num_good", [1, 3, 12, 20])
def test_a_reserve_that_fails_later_ends_the_sequences_it_is_asked_for(kind, num_good):
    for wrong in [explode, *WRONG_RESERVES]:
        reserve = later(wrong, lambda seq: len(seq.token_ids), num_good)
        num_added, _ = serve_through_refusals(kind, {"reserve": reserve})
        assert num_added >= 1


@BOTH
def test_random_keys_and_reservations_change_no_token(kind):
    for seed in range(12):
        numbers = random.Random(seed)
        policy = {"policy": lambda seq: numbers.choice([numbers.random(), 10**30, -1])}
        reserve = {"reserve": lambda seq: numbers.randint(-3, 50)}
        for scheduling in (policy, reserve, policy | reserve):
            num_added, num_errors = serve_through_refusals(kind, scheduling)
            assert num_added > 0 and num_errors == 0


# ---- all or nothing ------------------------------------------------------------------------------
BAD_ARGUMENTS = {
    "no prompt": lambda e: e.add_request(None),
    "an empty prompt": lambda e: e.add_request([]),
    "an empty text": lambda e: e.add_request(""),
    "a text that the tokenizer does not know": lambda e: e.add_request("xyz"),
    "half of a pair of surrogates": lambda e: e.add_request("\ud800"),
    "a tensor": lambda e: e.add_request(torch.tensor([1, 2])),
    "ids of NumPy": lambda e: e.add_request(list(torch.tensor([1, 2]).numpy())),
    "an id of text": lambda e: e.add_request([1, "a"]),
    "an id of the vocabulary's size": lambda e: e.add_request([VOCAB_SIZE]),
    "params of a dict": lambda e: e.add_request([1], {"n": 1}),
    "a prompt as long as the context": lambda e: e.add_request([1] * 48),
    "more than the pool": lambda e: e.add_request([1] * 30, SamplingParams(max_tokens=15)),
    "a thousand million texts": lambda e: e.add_request([1], SamplingParams(n=10**9)),
    "an unknown stop token": lambda e: e.add_request([1], SamplingParams(stop_token_ids=[99])),
    "a strategy of another type": lambda e: e.add_request([1], strategy=3),
    "an unknown argument": lambda e: e.add_request([1], colour="red"),
    "a priority of None": lambda e: e.add_request([1], priority=None),
    "a priority of text": lambda e: e.add_request([1], priority="high"),
    "a priority of NaN": lambda e: e.add_request([1], priority=float("nan")),
}


@BOTH
@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_a_request_that_is_refused_leaves_nothing(kind, name):
    by_priority = {"policy": lambda seq: (seq.request.priority, seq.request.arrival)}
    ledger = Ledger(build(kind, num_blocks=12, scheduling=by_priority))

    def refuse():
        started = time.monotonic()
        with pytest.raises((ValueError, TypeError)):
            BAD_ARGUMENTS[name](ledger.engine)
        assert time.monotonic() - started < 1

    if "text" not in name:  # text is a priority like any other for the first request
        refuse()
    ledger.add(0)
    refuse()  # before the first one is queued, while it runs, and after its end
    ledger.step()
    refuse()
    ledger.add(1)
    ledger.play([])
    refuse()
    ledger.check()


# ---- other threads -------------------------------------------------------------------------------
@pytest.fixture
def quick_switches():
    """Python changes threads after 10 microseconds instead of 5,000: races are found sooner."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def add_and_abort(engine, seed, num_operations, known, aborted):
    """What one of the threads does. `known` and `aborted` are lists that all of them share."""
    numbers = random.Random(seed)
    for _ in range(num_operations // 2):
        index = numbers.choice((0, 3, 4, 6))
        known.append((add(engine, SPECS[index]), index))
        request_id, _ = known[-numbers.randint(1, min(len(known), 12))]
        if engine.abort(request_id):
            aborted.append(request_id)
        while len(engine.requests) > 100:
            time.sleep(0.001)


def step_among_threads(kind, num_operations):
    """Eight threads add and abort while this one steps: each request ends exactly once."""
    engine = build(kind, num_blocks=60, max_num_seqs=24, budget=64)
    known, aborted, finished = [], [], []
    threads = [
        threading.Thread(
            target=add_and_abort, args=(engine, seed, num_operations // 8, known, aborted)
        )
        for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or engine.has_unfinished():
        finished += engine.step().finished
        engine.scheduler.check_integrity()
    check_nothing_is_left(engine)
    ids = [request_id for request_id, _ in known]
    assert len(set(ids)) == len(ids) == num_operations // 2
    ends = Counter(aborted + [output.request_id for output in finished])
    assert ends == dict.fromkeys(ids, 1), "a request ended twice, or never"
    index_of = dict(known)
    assert all(content(output) == alone(index_of[output.request_id]) for output in finished)
    assert len(aborted) > len(ids) // 10 and len(finished) > len(ids) // 10


@BOTH
def test_eight_threads_add_and_abort_while_one_steps(kind, quick_switches):
    step_among_threads(kind, 1600)


@pytest.mark.slow
@BOTH
def test_eight_threads_add_and_abort_20000_times_while_one_steps(kind, quick_switches):
    step_among_threads(kind, 20_000)


def test_of_many_aborts_at_once_one_returns_true(quick_switches):
    engine = build()
    for _ in range(200):
        request_id = add(engine, SPECS[0])
        answers, barrier = [], threading.Barrier(4)

        def abort():
            barrier.wait()
            answers.append(engine.abort(request_id))

        threads = [threading.Thread(target=abort) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answers) == [False, False, False, True]
    engine.step()
    check_nothing_is_left(engine)


def test_an_abort_in_the_middle_of_an_abort_wins_or_loses():
    """A signal handler may abort the request that the interrupted code is aborting."""
    for at_line in range(1, 30):
        engine = build()
        request_id, answers = add(engine, SPECS[0]), []

        def trace(frame, event, arg):
            of_abort = frame.f_code.co_name == "abort"
            if of_abort and frame.f_lineno == frame.f_code.co_firstlineno + at_line:
                sys.settrace(None)
                answers.append(engine.abort(request_id))
            return trace if of_abort else None

        sys.settrace(trace)
        answers.append(engine.abort(request_id))
        sys.settrace(None)
        assert answers.count(True) == 1
        engine.step()
        check_nothing_is_left(engine)


@BOTH
def test_aborts_from_a_watcher_and_from_a_signal_handler(kind):
    num_aborted = 0
    for seed in range(12):
        numbers = random.Random(seed)
        ledger = Ledger(draw_engine(kind, seed))

        def abort_one(*args):
            if ledger.index:
                ledger.abort(numbers.choice(list(ledger.index)))

        ledger.engine.watchers.append(
            lambda output: abort_one() if numbers.random() < 0.1 else None
        )
        before = signal.signal(signal.SIGALRM, abort_one)
        signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.005)
        try:
            ledger.play(draw_traffic(seed))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        ledger.check()
        num_aborted += len(ledger.aborted)
    assert num_aborted > 10


def test_two_engines_in_two_threads_write_what_they_write_alone(quick_switches):
    failures = []

    def serve(kind):
        try:
            for seed in range(12):
                ledger = Ledger(draw_engine(kind, seed))
                ledger.play(draw_traffic(seed))
                ledger.check()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=serve, args=(kind,)) for kind in ENGINES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# ---- watchers ------------------------------------------------------------------------------------
@BOTH
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_watcher_that_raises_harms_no_request_and_no_other_watcher(kind, error):
    for at_output in (1, 2, 5, 9):
        seen, last = [], []

        def fails(output):
            seen.append(output)
            if len(seen) == at_output:
                raise error

        def call(function):
            while True:
                try:
                    return function()
                except KeyboardInterrupt:
                    assert error is KeyboardInterrupt

        ledger = Ledger(build(kind, num_blocks=14), call)
        ledger.engine.watchers += [fails, last.append]
        if error is ZeroDivisionError:
            with pytest.warns(UserWarning, match="it no longer watches"):
                ledger.play([(0, "add", index) for index in (1, 2, 3)])
            assert len(seen) == at_output
        else:
            ledger.play([(0, "add", index) for index in (1, 2, 3)])
            assert len(seen) == len(ledger.outputs)
        ledger.check()
        assert all(a is b for a, b in zip(last, ledger.outputs, strict=True))


def test_a_watcher_that_leaves_and_then_raises_harms_nothing():
    ledger = Ledger(build())

    def leaves(output):
        ledger.engine.watchers.remove(leaves)
        raise ZeroDivisionError

    ledger.engine.watchers.append(leaves)
    with pytest.warns(UserWarning, match="it no longer watches"):
        ledger.play([(0, "add", 1)])
    ledger.check()


@pytest.mark.parametrize("plan_ahead", [False, True])
def test_signals_inside_a_real_model_change_no_text(tiny_gpt, plan_ahead):
    """The kernels of a CPU are Numba's, which wraps a KeyboardInterrupt in an error of its own."""
    model = tiny_gpt(dtype=torch.float64)
    llm = LLM(model, block_size=4, num_blocks=16, plan_ahead=plan_ahead)
    prompts = [[1, 2, 3], [5] * 20, [7, 8, 9, 10, 11]]
    params = [SamplingParams(seed=seed, max_tokens=16) for seed in range(3)]
    want = [content(output) for output in llm.generate(prompts, params)]
    num_signals = 0
    for seed in range(8):
        with Shots(seed) as shots:
            outputs = shots.call(lambda: llm.generate(prompts, params))
        assert [content(output) for output in outputs] == want
        check_nothing_is_left(llm.engine)
        num_signals += shots.hits.total()
    assert num_signals > 5


def test_a_ctrl_c_that_numba_has_wrapped_twice_is_a_keyboard_interrupt_again():
    """Seen: "CPUDispatcher(...) returned a result with an exception set", around another such."""
    engine = build()
    add(engine, SPECS[0])
    forward = engine.forward

    def interrupted(batch):
        engine.forward = forward
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as ctrl_c:
                raise SystemError("the inner function") from ctrl_c
        except SystemError as inner:
            raise SystemError("the dispatcher") from inner

    engine.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert engine.step().plan.scheduled
