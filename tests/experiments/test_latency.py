"""What times a decode step, run small: rows are whole, contenders do equal work, nobody is lost.

A contender that writes nothing or computes something else must stop the run before it is timed.
What only a GPU can do stands behind fakes here: which calls are made between two events, what the
events of a profile add up to. The figures themselves are nobody's to test.
"""

import argparse
import math
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rows import pick
from rows import run as run_experiment

from engine import eager_forward
from experiments import latency, peers, transformers_engines, workloads
from experiments.latency import (
    COMPILED,
    CONTIGUOUS,
    DYNAMIC,
    EAGER,
    FUSED,
    OURS,
    RECORDED,
    SMALL,
    check_equal,
    choose,
    fill_and_step,
)
from experiments.results import read
from experiments.speed import Trial
from experiments.transformers_engines import Compiled, Theirs
from experiments.workloads import MARK, Event, busy_us, count
from kv_cache import write_kv
from llm import SHIPPED_MODEL
from model import attend_one_sequence
from speedups.cuda_graphs import GraphForward
from speedups.plan_ahead import AheadEngine

TINY = "--device cpu --shapes 1x9 3x9 --steps 2 --rounds 3 --block-size 4 --threads 1"
PLAIN = "--contenders eager recorded contiguous"


@pytest.fixture
def tiny(tiny_gpt, monkeypatch):
    """The experiment loads a model of 2 layers, 97 tokens and 64 positions, whatever the name."""
    model = tiny_gpt(seed=5)
    monkeypatch.setattr(latency, "load_model", lambda name, dtype, device: model)
    return model


def run(tmp_path, words):
    """`python benchmark.py latency words`; returns the rows that were appended."""
    return run_experiment(tmp_path, f"latency {words}")


def parse(words=TINY):
    parser = argparse.ArgumentParser()
    latency.add_arguments(parser)
    return parser.parse_args(words.split())


def complete(words=TINY):
    return latency.complete(parse(words))


# ---- the rows ------------------------------------------------------------------------------------
def test_each_contender_has_its_times_beside_the_floor(tmp_path, tiny):
    rows = run(tmp_path, f"{TINY} {PLAIN}")
    assert {row["experiment"] for row in rows} == {"latency"}
    for B in (1, 3):
        found = pick(rows, workload=f"decode batch={B} context=9 block_size=4")
        (floor,) = pick(found, contender="byte floor")
        assert (floor["metric"], floor["unit"]) == ("time a step", "ms")
        for name in (EAGER, RECORDED, CONTIGUOUS):
            (step,) = pick(found, contender=name, metric="time a step")
            (share,) = pick(found, contender=name, metric="share of the byte floor")
            (token,) = pick(found, contender=name, metric="token to token")
            (tail,) = pick(found, contender=name, metric="token to token p99")
            assert share["median"] == pytest.approx(100 * floor["median"] / step["median"])
            assert step["repeats"] == token["repeats"] == tail["repeats"] == 3
            assert 0 < token["median"] <= tail["max"]
        (ratio,) = pick(found, unit="x")
        assert ratio["contender"] == RECORDED
        assert ratio["metric"] == "speed against recorded, contiguous"
        medians = (
            pick(found, contender=n, metric="time a step")[0] for n in (CONTIGUOUS, RECORDED)
        )
        slabs, blocks = (row["median"] for row in medians)
        assert ratio["median"] == pytest.approx(slabs / blocks)
    # Nothing is recorded on a CPU, nothing launched, and no requests were asked for.
    assert {row["unit"] for row in rows} == {"ms", "%", "x"}


def test_small_linears_serve_up_to_16_rows_and_joined_steps_all(tmp_path, tiny, monkeypatch):
    asked = []

    def fused_forward(model, cache, otherwise, few_rows):
        asked.append(few_rows)
        return otherwise

    monkeypatch.setattr(latency, "fused_forward", fused_forward)
    monkeypatch.setattr(latency, "can_fuse", lambda model: None)
    rows = run(tmp_path, f"{TINY} --shapes 2x9 17x9 --contenders eager fused small")
    assert asked == [0, 16]
    for B, names in ((2, {EAGER, FUSED, SMALL}), (17, {EAGER, FUSED})):
        found = pick(rows, workload=f"decode batch={B} context=9 block_size=4")
        assert {row["contender"] for row in found} == names | {"byte floor"}


def test_requests_are_served_in_each_way_and_prompts_alone(tmp_path, tiny):
    words = "--requests 5 --lengths 2 9 --prefill 2x7 3x1"
    rows = run(tmp_path, f"{TINY} --contenders eager {words}")
    found = pick(rows, workload="requests=5 prompts and texts of 2..9 tokens")
    of = {row["contender"]: row for row in pick(found, metric="output tokens")}
    assert list(of) == ["serial", "one step ahead", "one step ahead, budget=2048"]
    ratio, _ = pick(found, unit="x")
    assert (ratio["contender"], ratio["metric"]) == ("one step ahead", "speed against serial")
    assert ratio["median"] == pytest.approx(of["one step ahead"]["median"] / of["serial"]["median"])
    for workload in ("prefill batch=2 prompt=7", "prefill batch=3 prompt=1"):
        (row,) = pick(rows, workload=workload)
        assert (row["metric"], row["unit"], row["repeats"]) == ("prompt tokens", "tokens/s", 3)


def test_of_requests_the_written_tokens_are_counted_and_of_prompts_their_own(
    tmp_path, tiny, monkeypatch
):
    def serve(llm, requests):
        seconds = 1.0 if llm.config.plan_ahead else 4.0
        seconds /= 1 + (llm.config.max_num_batched_tokens == 2048)
        return Trial([[7] * n for _, n in requests], seconds)

    def time_ms(work, device):
        work()
        return 4.0

    monkeypatch.setattr(workloads, "serve", serve)
    args = complete(f"{TINY} --requests 5 --lengths 2 9 --prefill 2x7")
    common = {"experiment": "latency", "backend": "numba", "dtype": "float32", "threads": 1}
    common |= {"device": "a CPU"}
    written = sum(n for _, n in workloads.mixed_requests(97, args))
    rows = list(workloads.throughput(tiny, args, common))
    assert [row.median for row in rows] == [written / 4, written, 2 * written, 4.0, 8.0]
    monkeypatch.setattr(peers, "time_ms", time_ms)
    (row,) = workloads.prefill(tiny, args, common)
    assert row.median == 2 * 7 * 1000 / 4.0


def test_a_prompt_joins_running_sequences_and_the_budget_decides_how_long_they_wait(
    tmp_path, tiny, monkeypatch
):
    steps, whole = [], workloads.LLM

    class Watched(whole):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            step, budget = self.engine.step, options["max_num_batched_tokens"]

            def watched():
                output = step()
                steps.append((budget, [n for _, _, n in output.plan.scheduled]))
                return output

            self.engine.step = watched

    monkeypatch.setattr(workloads, "LLM", Watched)
    words = f"{TINY} --contenders eager --budgets 8 64 --join 20"
    rows = pick(run(tmp_path, words), workload="joining batch=3 context=9 prompt=20")
    assert [(row["contender"], row["metric"]) for row in rows] == [
        (f"budget={budget}", metric)
        for budget in (8, 64)
        for metric in (
            "largest gap between tokens",
            "gap before the prompt joins",
            "time to first token",
        )
    ]
    assert {row["repeats"] for row in rows} == {3}
    # Beside three tokens of the running sequences: 5 of the prompt in each of 4 steps, or all 20.
    # A warm-up and 3 rounds.
    assert steps.count((8, [1, 1, 1, 5])) == 4 * 4 and steps.count((64, [1, 1, 1, 20])) == 4
    with pytest.raises(SystemExit, match="a budget of 3 tokens, 3 sequences: raise --budgets"):
        run(tmp_path, words.replace("--budgets 8", "--budgets 3"))


# ---- what is asked for ---------------------------------------------------------------------------
def test_what_is_not_given_depends_on_the_device():
    args = complete("--device cpu")
    assert (args.shapes, args.steps) == ([(1, 128), (8, 128)], 8)
    assert (args.requests, args.prefill, args.profile) == (0, [], None)
    assert args.model == str(SHIPPED_MODEL) and args.threads == 1
    assert args.contenders == [*OURS]
    on_gpu = latency.DEFAULTS["cuda"]
    assert on_gpu["contenders"] == [*OURS, "transformers", "generate", "compiled", "continuous"]
    assert on_gpu["shapes"][0] == "1x128" and len(on_gpu["shapes"]) == 12
    assert (on_gpu["requests"], on_gpu["prefill"]) == (256, ["16x512"])
    assert on_gpu.keys() == latency.DEFAULTS["cpu"].keys()


@pytest.mark.parametrize(
    "words, reason",
    [
        ("--profile x.txt", "a profile is of what a GPU does, the device is cpu"),
        ("--shapes 1x9 1x7", "a context of 7 tokens, 2 steps that lead to it and 4 that are not"),
        ("--shapes 0x9", "'0x9' is no shape"),
        ("--rounds 0", "must all be at least 1"),
        ("--requests 2 --lengths 9 5", "2 requests of 9..5 tokens: impossible"),
        ("--shapes 1x65", "65 tokens in a sequence: the model has 64 positions"),
        ("--prefill 1x64", "65 tokens in a sequence: the model has 64 positions"),
        ("--requests 1 --lengths 1 33", "66 tokens in a sequence: the model has 64 positions"),
        ("--prefill 7", "'7' is no shape: write sequences x tokens"),
        ("--contenders compiled", "compiled: none of ours is among them and runs here"),
        ("--contenders small --shapes 17x9", "small linears serve 16 rows, a batch has 17"),
    ],
)
def test_what_no_run_could_do_is_refused_in_one_sentence(
    tmp_path, tiny, monkeypatch, words, reason
):
    monkeypatch.setattr(latency, "can_fuse", lambda model: None)
    with pytest.raises(SystemExit, match=reason):
        run(tmp_path, f"{TINY} {words}")
    assert not (tmp_path / "rows.csv").exists()


def test_who_cannot_run_here_is_left_out_and_it_is_said_why(tiny, monkeypatch, capsys):
    monkeypatch.setattr(latency, "can_fuse", lambda model: "there is no GPU")
    args = complete(f"{TINY} --contenders eager fused small compiled")
    assert choose(args, tiny) == ([EAGER], [])
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [f"{name} is left out: there is no GPU" for name in (FUSED, SMALL)]
    assert said[2].startswith(f"{COMPILED} is left out: ")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert choose(complete(f"{TINY} --contenders recorded transformers"), tiny) == ([RECORDED], [])
    assert capsys.readouterr().err == f"{DYNAMIC} is left out: transformers is not installed\n"


# ---- equal work ----------------------------------------------------------------------------------
def contenders(model, *names, words=TINY):
    args = complete(words)
    pools = latency.make_pools(model, args)
    return {name: latency.build(name, model, pools[name == CONTIGUOUS], args) for name in names}


def ids(B, T, vocab_size=97):
    generator = torch.Generator().manual_seed(B)
    return torch.randint(vocab_size, (B, T), generator=generator).tolist()


def test_the_step_reads_just_the_context_in_shuffled_blocks_and_all_else_is_nan(tiny):
    (eager,) = contenders(tiny, EAGER).values()
    batch, logits = fill_and_step(eager.engine, ids(3, 9), seed=1)
    assert batch.context_lens.tolist() == [9, 9, 9] and batch.positions.tolist() == [8, 8, 8]
    blocks = batch.block_tables.flatten().tolist()
    assert len(set(blocks)) == 9 == len(blocks)  # 9 tokens are 3 blocks of 4, for 3 sequences
    assert blocks != sorted(blocks)
    pool = eager.engine.cache.pool
    written = pool[0, blocks, 0, 0, :, 0].isfinite().view(3, 12)
    assert written.tolist() == [[True] * 9 + [False] * 3] * 3
    assert pool[:, -1].isnan().all() and pool.isfinite().sum() == 3 * 9 * 2 * 2 * 64
    assert logits.shape == (3, 97) and len(logits.unique(dim=0)) == 3


def test_slabs_are_one_block_a_sequence_and_the_same_step(tiny):
    found = contenders(tiny, RECORDED, CONTIGUOUS)
    outcomes = {name: fill_and_step(c.engine, ids(3, 9), seed=1) for name, c in found.items()}
    assert found[CONTIGUOUS].engine.cache.block_size == 64  # the longest that a sequence gets
    assert outcomes[CONTIGUOUS][0].block_tables.shape == (3, 1)
    assert found[CONTIGUOUS].engine.cache.pool.shape[1] == 3 + 1
    exact = latency.exact_logits(tiny, ids(3, 9))
    check_equal({name: logits for name, (_, logits) in outcomes.items()}, exact)
    assert all(isinstance(c.engine.forward, GraphForward) for c in found.values())


def forgetful(forgets):
    """An eager forward whose KV write forgets tokens of some batches."""

    def build(model, cache, attention, write):
        def write_most(k, v, k_cache, v_cache, slots):
            if not forgets(len(slots)):
                write_kv(k, v, k_cache, v_cache, slots)

        return eager_forward(model, cache, attention, write_most)

    return build


@pytest.mark.parametrize(
    "forgets", [lambda n: n == 3, lambda n: n > 3], ids=["the step", "prompts"]
)
def test_who_writes_nothing_does_not_find_what_another_one_wrote(tiny, monkeypatch, forgets):
    found = contenders(tiny, EAGER)
    monkeypatch.setattr(latency, "eager_forward", forgetful(forgets))
    args = complete()
    spoiled = latency.build(RECORDED, tiny, found[EAGER].engine.cache, args)  # the same pool
    logits = {
        name: fill_and_step(c.engine, ids(3, 9), seed=1)[1]
        for name, c in (found | {RECORDED: spoiled}).items()
    }
    with pytest.raises(ValueError, match="the logits of 'recorded' are not all numbers"):
        check_equal(logits, latency.exact_logits(tiny, ids(3, 9)))


def test_a_wrong_contender_stops_the_run_before_it_is_timed(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(latency, "eager_forward", forgetful(lambda n: n == 3))
    with pytest.raises(
        SystemExit, match="of 'eager' are not all numbers: decode batch=3 context=9"
    ):
        run(tmp_path, f"{TINY} --shapes 3x9 --contenders eager")
    assert not (tmp_path / "rows.csv").exists()


def test_another_wrong_contender_is_left_out_and_the_run_fails_at_its_end(
    tmp_path, tiny, monkeypatch, capsys
):
    """On a GPU all that is right is measured, whatever is wrong beside it."""
    whole = latency.build

    def build(name, *arguments):
        if name == CONTIGUOUS:
            raise RuntimeError("out of shared memory")
        with monkeypatch.context() as patched:
            if name == RECORDED:
                patched.setattr(latency, "eager_forward", forgetful(lambda n: n == 3))
            return whole(name, *arguments)

    monkeypatch.setattr(latency, "build", build)
    reason = "wrong and left out, for the reasons above: recorded; recorded, contiguous"
    with pytest.raises(SystemExit, match=reason):
        run(tmp_path, f"{TINY} {PLAIN} --prefill 2x7")
    rows = read(tmp_path / "rows.csv")
    timed = {(row["contender"], row["workload"][7:14]) for row in pick(rows, unit="ms")}
    assert timed - {("byte floor", "batch=1"), ("byte floor", "batch=3")} == {
        (EAGER, "batch=1"), (RECORDED, "batch=1"), (EAGER, "batch=3")
    }  # fmt: skip
    assert pick(rows, metric="prompt tokens")  # what comes after them
    said = capsys.readouterr().err
    assert "recorded, contiguous is left out: RuntimeError: out of shared memory" in said
    assert "recorded is left out: the logits of 'recorded' are not all numbers" in said


def off(first, other=0.0, row=0, dtype=torch.bfloat16):
    """`check_equal` of two contenders so far from float64 in one row of three; 2 are exact."""
    exact = torch.tensor([[0.0, -8.0]] * 3, dtype=torch.float64)
    logits = {"a": exact.clone(), "b": exact.clone()}
    logits["a"][row, 0] += first
    logits["b"][row, 0] -= other
    check_equal({name: value.to(dtype) for name, value in logits.items()}, exact[:2])


@pytest.mark.parametrize(
    "dtype, bound",
    [(torch.float64, 1e-9), (torch.float32, 1e-3), (torch.bfloat16, 0.24), (torch.float16, 0.24)],
    ids=str,
)
def test_the_first_contender_is_near_float64_and_others_three_times_as_far(dtype, bound):
    """In 16 bits within 3% of 8. Another one has three times the first one's error, and a bit."""
    off(0.9 * bound, dtype=dtype)
    with pytest.raises(ValueError, match="the logits of 'a' differ from float64 by"):
        off(1.1 * bound, dtype=dtype)
    off(0.1 * bound, 0.53 * bound, dtype=dtype)
    off(0.2 * bound, 0.8 * bound, dtype=dtype)
    for other in (0.6, -0.6):
        with pytest.raises(ValueError, match="the logits of 'b' differ from float64 by"):
            off(0.1 * bound, other * bound, dtype=dtype)


def test_rows_that_are_not_computed_in_float64_are_compared_with_the_first_contenders():
    off(0.0, 0.115, row=2)  # a half of 0.24
    with pytest.raises(ValueError, match="the logits of 'b' differ from those of 'a' by"):
        off(0.0, 0.125, row=2)


def test_the_exact_logits_are_those_of_the_same_weights(tiny):
    texts = ids(2, 9)
    with torch.inference_mode():
        hidden = tiny(torch.tensor(texts[1]), torch.arange(9), attend_one_sequence)
        want = tiny.logits(hidden[-1])
    found = latency.exact_logits(tiny, texts)
    assert found.dtype == torch.float64 and tiny.wte.weight.dtype == torch.float32
    torch.testing.assert_close(found[1].float(), want, atol=1e-4, rtol=0)


def test_a_way_to_serve_that_writes_other_tokens_is_refused(tmp_path, tiny, monkeypatch):
    serve = workloads.serve

    def spoil(llm, requests):
        trial = serve(llm, requests)
        if llm.config.plan_ahead:
            trial.token_ids = [[token + 1 for token in text] for text in trial.token_ids]
        return trial

    monkeypatch.setattr(workloads, "serve", spoil)
    with pytest.raises(SystemExit, match="one step ahead wrote 0% as the first way did"):
        run(tmp_path, f"{TINY} --contenders eager --requests 3 --lengths 2 5")


def test_requests_are_of_mixed_lengths_and_the_same_for_a_seed():
    args = complete(f"{TINY} --requests 200 --lengths 2 6")
    requests = workloads.mixed_requests(97, args)
    assert requests == workloads.mixed_requests(97, args) and len(requests) == 200
    assert {len(prompt) for prompt, _ in requests} == {n for _, n in requests} == {2, 3, 4, 5, 6}
    assert len({(len(prompt), n) for prompt, n in requests}) == 25  # each with each
    assert len({token for prompt, _ in requests for token in prompt}) > 90
    args.seed = 1
    assert requests != workloads.mixed_requests(97, args)


# ---- the clocks ----------------------------------------------------------------------------------
def test_contenders_run_in_turn_and_the_first_round_is_not_counted(monkeypatch):
    order = []

    def time_tokens(loop, prompts, steps):
        order.append(loop)
        return float(len(order)), [float(len(order))] * steps

    monkeypatch.setattr(latency, "time_tokens", time_tokens)
    timers = {"a": lambda: order.append("step") or 0.5}
    args = SimpleNamespace(rounds=2, steps=3)
    times = latency.time_in_turn(timers, {"a": "loop a", "b": "loop b"}, None, args)
    assert order == ["step", "loop a", "loop b"] * 3
    assert times["a"].step_ms == [0.5, 0.5] and times["b"].step_ms == []
    assert times["a"].token_ms == [5.0, 8.0] and times["b"].token_ms == [6.0, 9.0]
    assert times["a"].gaps_ms == [[5.0] * 3, [8.0] * 3]


class Clock:
    """A loop whose steps take 3 ms of the host, and 7 ms of a device that is waited for at last."""

    def __init__(self, *_):
        self.now_s, self.num_steps, self.is_busy = 50.0, 0, False

    def start(self, prompts):
        self.now_s += 100.0

    def step(self):
        self.now_s += 3e-3 if self.num_steps != 4 else 9e-3  # the third timed one takes longer
        self.num_steps, self.is_busy = self.num_steps + 1, True

    def synchronize(self):
        self.now_s += 7e-3 if self.is_busy else 0
        self.is_busy = False

    def finish(self):
        assert self.num_steps == 2 + 4 + 2


def test_from_token_to_token_is_wall_clock_over_many_steps_without_the_first_and_last(monkeypatch):
    def timed(kind):
        clock = kind()
        monkeypatch.setattr(time, "perf_counter", lambda: clock.now_s)
        monkeypatch.setattr(torch.cuda, "synchronize", clock.synchronize)
        return latency.time_tokens(clock, SimpleNamespace(device=torch.device("cuda")), 4)

    class OurClock(Clock, peers.Ours):
        pass

    mean_ms, gaps_ms = timed(OurClock)  # its tokens are read: nothing is waited for
    assert mean_ms == pytest.approx((3 * 3 + 9) / 4)
    assert gaps_ms == pytest.approx([3, 3, 9, 3])
    mean_ms, gaps_ms = timed(Clock)
    assert mean_ms == pytest.approx((3 * 3 + 9 + 7) / 4) and gaps_ms == []


@pytest.mark.parametrize("draws_on_gpu", [False, True], ids=["host draws", "the draw is recorded"])
def test_an_engine_that_is_ahead_is_so_in_every_timed_step_and_is_timed_by_tokens_alone(
    tmp_path, tiny, monkeypatch, draws_on_gpu
):
    if draws_on_gpu:  # here the kernel that draws is interpreted
        pytest.importorskip("triton")
        monkeypatch.setattr(latency, "can_record", lambda backend, device: True)
    in_flight, step = [], AheadEngine.step

    def watched(engine):
        assert (engine.forward.sampler is not None) is draws_on_gpu
        output = step(engine)
        in_flight.append((output.plan.num_tokens, engine._flight is not None))
        return output

    monkeypatch.setattr(AheadEngine, "step", watched)
    rows = run(tmp_path, f"{TINY} --shapes 3x12 --rounds 1 --contenders recorded ahead")
    # The step of the prompts, 2 + 2 + 2 of one token each; none follows the last one. At the end
    # each sequence has all of its three blocks.
    assert in_flight == ([(3 * 5, True)] + [(3, True)] * 5 + [(3, False)]) * 2
    found = {(row["contender"], row["metric"]) for row in pick(rows, unit="ms")}
    assert found >= {(RECORDED, "time a step"), ("recorded, ahead", "token to token")}
    assert ("recorded, ahead", "time a step") not in found


def test_the_engines_steps_lead_up_to_the_context_that_the_row_names(tiny, monkeypatch):
    args, contexts = complete(f"{TINY} --rounds 1"), []
    found = contenders(tiny, EAGER)
    forward = found[EAGER].engine.forward

    def watched(batch):
        contexts.append(batch.context_lens.tolist())
        return forward(batch)

    found[EAGER].engine.forward = watched
    latency.time_shape(tiny, found, {}, 1, 9, args)
    # Prompts into the pool, the step that is compared; then in each of two rounds the device's two
    # steps, a prompt of 9 - 1 - 6 tokens, and the engine's: two, the two that are timed, and two.
    assert contexts == [[8], [9]] + [[9], [9], *[[n] for n in range(2, 9)]] * 2


class FakeEvent:
    """Between two of them a millisecond has gone by for each call that was counted."""

    calls = 0

    def __init__(self, enable_timing):
        self.at = None

    def record(self):
        self.at = FakeEvent.calls

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return float(later.at - self.at)


@pytest.mark.parametrize("name", [EAGER, RECORDED])
def test_on_a_gpu_replays_are_timed_and_what_was_not_recorded_is_called(tiny, monkeypatch, name):
    (contender,) = contenders(tiny, name).values()
    engine, filled = contender.engine, []
    batch, _ = fill_and_step(engine, ids(3, 9), seed=1)
    FakeEvent.calls = 0

    def called(*arguments):
        FakeEvent.calls += 1

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(type(batch), "to", lambda self, device: self)
    if name == EAGER:
        engine.forward = called
    else:
        forward = engine.forward
        recorded = {size: replace(step, replay=called) for size, step in forward.steps.items()}
        monkeypatch.setattr(forward, "steps", recorded)
        monkeypatch.setattr(GraphForward, "__call__", lambda self, batch: filled.append(batch))
    measure = latency.step_timer(engine, batch, 5, torch.device("cuda"))
    assert measure() == 1.0 and FakeEvent.calls == 5  # 5 ms, a fifth of it each
    measure()  # the engine's own steps wrote over the inputs: they are laid out anew
    assert len(filled) == (2 if name == RECORDED else 0)


@pytest.mark.slow
def test_a_compiled_peer_keeps_one_cache_for_each_number_of_sequences(
    shipped_model_folder, monkeypatch
):
    pytest.importorskip("transformers")
    from checkpoints.load import load_model

    compiled = []

    def compile_nothing(model, mode):
        assert mode == "reduce-overhead"

        def call(input_ids, **options):
            compiled.append(tuple(input_ids.shape))
            return model(input_ids, **options)

        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    model = transformers_engines.as_transformers(load_model(shipped_model_folder))
    plain, static = Theirs(model), Compiled(model, length=9)
    places = {}
    for B in (2, 3, 2):
        prompts = torch.tensor(ids(B, 6, 3072))
        for loop in (plain, static):
            peers.time_ms(lambda loop=loop: loop.start(prompts), torch.device("cpu"))
            peers.time_ms(loop.step, torch.device("cpu"))
            peers.time_ms(loop.step, torch.device("cpu"))
        assert static.next_ids.tolist() == plain.next_ids.tolist()
        keys = static.cache.layers[0].keys
        assert keys.shape == (B, 4, 9, 64)
        assert places.setdefault(B, keys.data_ptr()) == keys.data_ptr()
        plain.finish(), static.finish()
    assert compiled == [(2, 1)] * 2 + [(3, 1)] * 2 + [(2, 1)] * 2  # a prompt is never compiled


def test_generate_and_continuous_batching_are_peers_of_the_engine(tmp_path, shipped_model_folder):
    pytest.importorskip("transformers")
    words = f"--model {shipped_model_folder} --contenders ahead generate continuous"
    rows = run(tmp_path, f"{TINY} {words} --shapes 2x9 --rounds 1 --requests 3 --lengths 2 5")
    of = {(row["contender"], row["metric"]): row for row in rows}
    ours, theirs = "recorded, ahead", "transformers generate"
    ratio = of[ours, f"speed against {theirs}"]["median"]
    times = [of[name, "token to token"]["median"] for name in (theirs, ours)]
    assert ratio == pytest.approx(times[0] / times[1]) and 0 < ratio
    served = {row["contender"]: row for row in pick(rows, metric="output tokens")}
    assert list(served) == ["one step ahead", peers.CONTINUOUS]
    assert served[peers.CONTINUOUS]["backend"].startswith("torch, sdpa, page_size=4, num_blocks=")
    (against,) = pick(rows, metric=f"speed against {peers.CONTINUOUS}")
    rates = [served[name]["median"] for name in served]
    assert against["median"] == pytest.approx(rates[0] / rates[1])


def test_generate_writes_the_tokens_of_the_loop(shipped_model_folder):
    pytest.importorskip("transformers")
    from checkpoints.load import load_model

    model = transformers_engines.as_transformers(load_model(shipped_model_folder))
    written, prompts = [], torch.tensor(ids(2, 6, 3072))
    whole = model.generate

    def watched(*arguments, **options):
        written.append(whole(*arguments, **options))
        return written[-1]

    model.generate = watched
    transformers_engines.Generate(model).ms_a_token(prompts, 3)
    loop = Theirs(model)
    loop.start(prompts)
    tokens = [prompts, loop.next_ids]
    for _ in range(3):
        loop.step()
        tokens.append(loop.next_ids)
    assert torch.equal(written[0], torch.cat(tokens, 1))
    assert torch.equal(written[1], torch.cat(tokens[:2], 1))


def test_the_compiled_peer_has_rows_of_its_own_for_the_first_shape(
    tmp_path, shipped_model_folder, monkeypatch
):
    pytest.importorskip("transformers")
    monkeypatch.setattr(torch, "compile", lambda model, mode: model)
    monkeypatch.setattr(latency, "why_not", lambda name, model, device: None)
    words = f"--model {shipped_model_folder} --contenders recorded compiled"
    rows = run(tmp_path, f"{TINY} {words}")
    assert {row["workload"] for row in pick(rows, contender=COMPILED)} == {
        "decode batch=1 context=9 block_size=4"
    }
    (ratio,) = pick(rows, unit="x")
    assert (ratio["contender"], ratio["metric"]) == (RECORDED, f"speed against {COMPILED}")
    times = pick(rows, contender=RECORDED, metric="time a step")
    assert len(times) == 2  # one for each batch: measuring beside a peer gives no second row


def test_what_recording_took_is_a_row_where_it_took_something():
    common = {"experiment": "latency", "backend": "triton", "dtype": "bfloat16", "threads": 1}
    common |= {"device": "a GPU"}
    found = {
        EAGER: latency.Contender(None, 256, None),
        SMALL: latency.Contender(None, 16, (1.5, 250.0)),
    }
    rows = list(latency.rows_of_recording(found, common))
    assert [(row.contender, row.metric, row.median, row.unit, row.workload) for row in rows] == [
        (SMALL, "recording", 1.5, "s", "recording sizes=1..16"),
        (SMALL, "memory taken", 250.0, "MB", "recording sizes=1..16"),
    ]


# ---- profiles ------------------------------------------------------------------------------------
EVENTS = [
    Event("cudaDeviceSynchronize", False, 1, 2),  # before the steps
    Event(MARK, False, 10, 110),
    Event("cudaMemcpyAsync", False, 12, 14),
    Event("cudaGraphLaunch", False, 15, 20),
    Event("cudaMalloc", False, 21, 22),
    Event("cudaStreamSynchronize", False, 25, 50),
    Event("cudaGraphLaunch", False, 60, 65),
    Event("cudaEventSynchronize", False, 70, 100),
    Event("cudaEventQuery", False, 101, 102),
    Event("cudaDeviceSynchronize", False, 120, 130),  # behind them
    Event(MARK, True, 20, 120),  # the profiler shows the mark on the device too
    Event("Memcpy HtoD (Pinned -> Device)", True, 20, 25),
    Event("gemm", True, 25, 45),
    Event("attend", True, 40, 50),  # beside the product for a while
    Event("Memset (Device)", True, 60, 61),
    Event("gemm", True, 80, 100),
    Event("Memcpy DtoH (Device -> Pinned)", True, 100, 120),
]


def test_what_lies_within_the_mark_is_counted_by_step():
    profile = count(EVENTS, num_steps=2)
    assert profile.kernels == 1.5 and profile.graphs == 1.0
    assert (profile.copies_to_device, profile.copies_to_host) == (0.5, 0.5)
    assert profile.waits == 1.0 and profile.allocations == 0.5
    assert profile.step_us == 50.0  # from 20 to 120, two steps
    assert profile.idle_percent == pytest.approx(29.0)  # [50, 60) and [61, 80) of 100
    assert profile.longest == [(20.0, 1.0, "gemm"), (5.0, 0.5, "attend")]


def test_time_is_busy_once_however_many_kernels_run():
    spans = [(20, 21), (0, 5), (3, 8), (4, 6), (7, 9)]
    assert busy_us([Event("k", True, a, b) for a, b in spans]) == 10
    assert busy_us([]) == 0


@pytest.mark.parametrize(
    "events, reason",
    [
        ([event for event in EVENTS if event.name != MARK], "0 marks, 6 events of a device"),
        ([event for event in EVENTS if not event.on_device], "1 marks, 0 events of a device"),
    ],
)
def test_a_profile_without_steps_or_without_a_device_is_refused(events, reason):
    with pytest.raises(ValueError, match=reason):
        count(events, 2)


def test_the_profiler_marks_the_steps_that_it_sees(monkeypatch):
    """Without a GPU it finds the mark and the calls, and nothing that a device did."""
    called = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: called.append("wait"))
    with pytest.raises(ValueError, match="1 marks, 0 events of a device"):
        workloads.profile_steps(lambda: called.append(torch.ones(3).sum()), 4)
    assert len(called) == 6 and called[0] == called[-1] == "wait"


def test_profiles_are_of_decode_steps_alone_and_leave_the_engine_empty(tmp_path, tiny, monkeypatch):
    args = complete(f"{TINY} --shapes 1x40 3x40 --block-size 16")
    args.profile, seen = str(tmp_path / "profile.txt"), []

    def profile_steps(step, num_steps):
        llm = step.__self__.llm
        for _ in range(num_steps):
            step()
        running, is_ahead = llm.engine.scheduler.running, llm.config.plan_ahead
        assert not is_ahead or llm.engine._flight is not None, "too few free blocks to go ahead"
        seen.append((llm, len(running), {len(seq.token_ids) for seq in running}))
        return count(EVENTS, num_steps=2)

    monkeypatch.setattr(workloads, "profile_steps", profile_steps)
    common = {"experiment": "latency", "backend": "numba", "dtype": "float32", "threads": 1}
    rows = list(workloads.profiles(tiny, args, common | {"device": "a CPU"}))
    assert [(llm.config.plan_ahead, n) for llm, n, _ in seen] == [
        (False, 1), (False, 3), (True, 1), (True, 3),
    ]  # fmt: skip
    for llm, _, lengths in seen:
        assert lengths == {12 + 1 + 4 + 20}  # a prompt of 40 - 28, and a token a step: at most 40
        assert not llm.engine.has_unfinished()
        assert llm.engine.scheduler.allocator.num_free == llm.config.num_blocks
    text = (tmp_path / "profile.txt").read_text()
    assert text.count("kernels\n") == 4 and "one step ahead, profile batch=3 context=40" in text
    of = {row.metric: row for row in rows if row.workload == "profile batch=3 context=40"}
    assert {metric: row.median for metric, row in of.items()} == {
        "kernels a step": 1.5,
        "copies to the device a step": 0.5,
        "waits a step": 1.0,
        "device allocations a step": 0.5,
        "device idle": pytest.approx(29.0),
    }


def test_the_floor_is_all_weights_and_all_contexts_at_the_speed_of_a_read(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(latency, "read_rate", lambda device, n: asked.append(n) or 1e6)
    args = complete()
    small, large = (latency.floor_ms(tiny, 3, T, args) for T in (8, 9))
    # A token's K and V: 2 layers x 2 x 64 numbers of 4 bytes, in each of 3 sequences.
    assert asked[1] - asked[0] == 3 * 2 * 2 * 64 * 4
    assert large == asked[1] / 1e6 and math.isclose(large - small, 3072 / 1e6)
    weights = sum(p.numel() for name, p in tiny.named_parameters() if not name.startswith("wpe"))
    looked_up = 2 * 3 * 64
    assert asked[0] == 4 * (weights + looked_up) + 8 * 3 * 1024


def test_a_peer_that_takes_five_times_as_long_makes_ours_five_times_as_fast():
    common = {"experiment": "latency", "workload": "x", "backend": "numba", "dtype": "float32"}
    common |= {"threads": 1, "device": "a CPU"}
    times = {
        RECORDED: latency.Times([1.0] * 3, [2.0, 9.0, 2.0], []),
        DYNAMIC: latency.Times([], [10.0, 10.0, 10.0], []),
    }
    (row,) = latency.rows_against(DYNAMIC, times, common)
    assert (row.contender, row.median, row.unit) == (RECORDED, 5.0, "x")
