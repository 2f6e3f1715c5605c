"""The ways to the same tokens: each does what it says, none is timed that wrote something else."""

import pytest
import torch
from rows import pick, run

import benchmark
from baselines import generate_contiguous, generate_no_cache
from checkpoints.load import load_model
from experiments import speed, transformers_engines
from experiments.transformers_engines import Theirs
from llm import LLM, SHIPPED_MODEL

TINY = "--prompt-tokens 5 --new-tokens 4 --block-sizes 4 --pools 100 --long-tokens 0 --repeats 2"
THREE = "--roads contiguous paged no-cache"
PROMPTS = [[7, 30, 9, 100, 4], [20, 21, 22, 23, 24], [5, 5, 6, 6, 5]]


@pytest.fixture(scope="module")
def model():
    return load_model(SHIPPED_MODEL)


def arguments(words=""):
    return speed.complete(benchmark.parse_args(["speed", *words.split()]))


# ---- the ways ------------------------------------------------------------------------------------
def test_every_way_writes_the_same_tokens(model):
    llm = LLM(model, num_blocks=32, block_size=4)
    expected = generate_contiguous(model, PROMPTS, 9)
    assert generate_no_cache(model, PROMPTS, 9) == expected
    assert len({token_id for token_ids in expected for token_id in token_ids}) > 5
    found = {
        "paged": speed.paged_way(llm),
        "contiguous": speed.contiguous_way(model, 3),
        "no cache": speed.static_way(model, None),
    }
    trials = {name: speed.time_trial(way, PROMPTS, 9) for name, way in found.items()}
    assert {name: trial.token_ids for name, trial in trials.items()} == dict.fromkeys(
        found, expected
    )
    # 3 prompts of 5 tokens; then 8 times one each, or all: 3 x (5 + 6 + .. + 13).
    computed = {name: trial.computed for name, trial in trials.items()}
    assert computed == {"paged": 39, "contiguous": 39, "no cache": 243}
    # 13 tokens are 4 blocks of 4; a slab is for 1,024; 6 layers x 2 x 256 x 4 bytes a token.
    held = {name: trial.kv_bytes for name, trial in trials.items()}
    assert held == {"paged": 3 * 16 * 12_288, "contiguous": 3 * 1024 * 12_288, "no cache": 0}


def test_the_way_of_transformers_writes_them_too(model):
    pytest.importorskip("transformers")
    way = speed.transformers_way(Theirs(transformers_engines.as_transformers(model)), 100)
    trial = speed.time_trial(way, PROMPTS, 9)
    assert trial.token_ids == generate_contiguous(model, PROMPTS, 9)
    assert (trial.computed, trial.kv_bytes) == (39, 3 * 13 * 100)  # the newest is not in the cache


def test_a_pool_that_is_too_small_preempts_and_writes_the_same(model):
    llm = LLM(model, num_blocks=7, block_size=4)  # three want 4 each
    trial = speed.time_trial(speed.paged_way(llm), PROMPTS, 9)
    assert trial.token_ids == generate_contiguous(model, PROMPTS, 9)
    assert trial.preempted > 0 and trial.computed > 39
    assert trial.kv_bytes <= 7 * 4 * model.config.kv_bytes_per_token(torch.float32)


def test_a_trial_counts_from_token_to_token(monkeypatch):
    times = iter([10.0, 10.5, 10.6, 10.8, 11.0])  # before, and at each step
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(times))

    def way(prompts, new_tokens):
        yield speed.Step({0: 7}, 5, 100)
        yield speed.Step({0: 8, 1: 3}, 4, 300)  # the second prompt had to wait
        yield speed.Step({1: 4}, 1, 300, preempted=1)
        yield speed.Step({}, 0, 0)

    trial = speed.time_trial(way, [[1], [2]], 2)
    assert trial.token_ids == [[7, 8], [3, 4]]
    assert trial.first_ms == [pytest.approx(500), pytest.approx(600)]
    assert trial.step_ms == [pytest.approx(100), pytest.approx(200), pytest.approx(200)]
    assert (trial.seconds, trial.computed, trial.kv_bytes, trial.preempted) == (1.0, 10, 300, 1)


# ---- equal work ----------------------------------------------------------------------------------
def test_in_16_bits_a_late_difference_is_no_fault_an_early_one_is():
    first = speed.Trial([list(range(20))])
    late = speed.Trial([[*range(6), *range(50, 64)]])
    assert speed.check_equal_work("paged", late, first, itemsize=2) == 30
    with pytest.raises(ValueError, match="paged wrote 30% as the first way did, 90% are needed"):
        speed.check_equal_work("paged", late, first, itemsize=4)
    early = speed.Trial([[0, *range(50, 69)]])  # only what the prompt itself gave is right
    with pytest.raises(ValueError, match="paged wrote 25% as the first way did, 40% are needed"):
        speed.check_equal_work("paged", early, first, itemsize=2)


def test_a_way_that_writes_other_tokens_fails_the_run(tmp_path, monkeypatch):
    def wrong(llm):
        def way(prompts, new_tokens):
            for _ in range(new_tokens):
                yield speed.Step({number: 1 for number in range(len(prompts))}, 0, 0)

        return way

    monkeypatch.setattr(speed, "paged_way", wrong)
    with pytest.raises(SystemExit, match="paged wrote 0% as the first way did, 90% are needed"):
        run(tmp_path, f"speed --batches 1 {TINY} --roads contiguous paged")


# ---- what is run ---------------------------------------------------------------------------------
def test_each_value_is_tried_with_the_first_ones_of_all_other_lists():
    words = "--batches 8 1 --prompt-tokens 64 --new-tokens 32 --block-sizes 16 1 --pools 100 50"
    todo = speed.plan(arguments(f"{words} --long-tokens 0 {THREE}"))
    assert [str(workload) for workload in todo] == [
        "batch=8 prompt=64 new=32 block_size=16 num_blocks=48",
        "batch=1 prompt=64 new=32 block_size=16 num_blocks=6",
        "batch=8 prompt=64 new=32 block_size=1 num_blocks=768",
        "batch=8 prompt=64 new=32 block_size=16 num_blocks=24",
    ]
    both, all_three = ["contiguous", "paged"], ["contiguous", "paged", "no cache"]
    assert list(todo.values()) == [all_three, all_three, both, both]


def test_without_a_cache_the_rows_of_all_steps_are_counted():
    # 3 x (5 + 6 + 7 + 8)
    assert speed.make_workload(3, 5, 4, 16, 100).rows_without_cache == 78
    limited = arguments(f"--batches 3 {TINY} {THREE} --no-cache-rows 77")
    assert [*speed.plan(limited).values()] == [["contiguous", "paged"]]
    enough = arguments(f"--batches 3 {TINY} {THREE} --no-cache-rows 78")
    assert [*speed.plan(enough).values()] == [["contiguous", "paged", "no cache"]]


# ---- rows ----------------------------------------------------------------------------------------
def test_speed_measures_all_ways_on_the_shipped_model(tmp_path):
    rows = run(tmp_path, f"speed --batches 3 {TINY} {THREE}")
    workload = "batch=3 prompt=5 new=4 block_size=4 num_blocks=9"
    found = pick(rows, workload=workload)
    names = ["contiguous", "paged", "no cache"]
    for name in names:
        figures = {row["metric"]: row for row in pick(found, contender=name)}
        assert {row["repeats"] for row in figures.values()} == {1, 2}
        time, rate = figures["generation time"], figures["generated tokens"]
        assert rate["max"] == pytest.approx(12 / time["min"])
        p50, p90, p99 = (figures[f"step latency p{p}"]["median"] for p in (50, 90, 99))
        assert 0 < p50 <= p90 <= p99
        assert 0 < figures["time to first token"]["median"] < time["max"] * 1e3
        assert figures["tokens written"]["median"] == 12
        assert figures["tokens equal to the first road's"]["median"] == 100
        assert (time["model"], time["weights"]) == ("tiny-gpt2", "trained weights")
    counted = {name: pick(found, contender=name, metric="tokens computed")[0] for name in names}
    assert [row["median"] for row in counted.values()] == [24, 24, 78]
    ratios = {(row["contender"], row["metric"][14:]) for row in pick(found, unit="x")}
    assert ratios == {
        ("paged", "contiguous"),
        ("no cache", "contiguous"),
        ("contiguous", "no cache"),
        ("paged", "no cache"),
    }


def test_each_trial_of_the_first_workload_is_a_row(tmp_path):
    rows = run(tmp_path, f"speed --batches 2 1 {TINY} {THREE}")
    trials = [row for row in rows if " trial=" in row["workload"]]
    assert {row["workload"] for row in trials} == {
        f"batch=2 prompt=5 new=4 block_size=4 num_blocks=6 trial={number}" for number in (1, 2)
    }
    seconds = [row["median"] for row in pick(trials, contender="paged", unit="s")]
    (both,) = pick(rows, workload=trials[0]["workload"][:-8], contender="paged", unit="s")
    assert sorted(seconds) == [both["min"], both["max"]]
    ratios = pick(trials, contender="paged", metric="speed against no cache")
    assert len(ratios) == 2 and {row["repeats"] for row in ratios} == {1}
    without = [row["median"] for row in pick(trials, contender="no cache", unit="s")]
    expected = [slow / fast for slow, fast in zip(without, seconds, strict=True)]
    assert [row["median"] for row in ratios] == pytest.approx(expected)


def test_three_rounds_are_enough_where_a_trial_takes_long(monkeypatch):
    monkeypatch.setattr(speed, "LONG_S", 0)

    def way(prompts, new_tokens):
        for _ in range(new_tokens):
            yield speed.Step({0: 1}, 1, 0)

    workload = speed.make_workload(1, 1, 2, 4, 100)
    trials = speed.time_rounds({"a": (way, "torch"), "b": (way, "torch")}, workload, [[1]], 5)
    assert [len(ts) for ts in trials.values()] == [3, 3]
    monkeypatch.setattr(speed, "LONG_S", 60)
    trials = speed.time_rounds({"a": (way, "torch")}, workload, [[1]], 5)
    assert [len(ts) for ts in trials.values()] == [5]


def test_the_number_of_threads_is_what_it_was_before(tmp_path):
    before = torch.get_num_threads()
    run(tmp_path, f"speed --threads {before + 1} --batches 1 {TINY} --roads contiguous")
    assert torch.get_num_threads() == before


# ---- a caller's mistakes -------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words, reason",
    [
        ("--batches 1 --prompt-tokens 1020 --new-tokens 9", "the model has 1024 positions"),
        ("--batches 0", "batch=0, .*: each must be at least 1"),
    ],
)
def test_sizes_that_cannot_run_are_refused(tmp_path, words, reason):
    with pytest.raises(SystemExit, match=reason):
        run(tmp_path, f"speed {TINY} {words} --roads paged")


def test_transformers_is_left_out_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    assert arguments().ways == ["contiguous", "paged", "no cache"]
    with pytest.raises(ValueError, match="transformers is not installed"):
        next(speed.run(benchmark.parse_args(["speed", "--roads", "transformers"])))


def test_the_long_sequence_runs_without_a_cache_whatever_it_takes():
    for words, new_tokens in (("", 256), ("--full", 500)):
        args = arguments(f"{words} {THREE} --no-cache-rows 10")
        workload, names = [*speed.plan(args).items()][-1]
        assert (workload.batch, workload.new_tokens) == (1, new_tokens)
        assert names == ["contiguous", "paged", "no cache"]
