"""KV memory step by step: the figures by which projects of this kind argue, from our own books."""

import argparse

import pytest
from rows import pick, run

from experiments import memory
from scheduler import Scheduler
from sequence import Continuation

TINY = "--batch 2 --prompt-tokens 3 --new-tokens 5 --block-size 4 --max-seq-len 16 --pool 8"
TINY += " --steps 1 2 5 --pool-steps 1 14 --reuse-batch 0"


def arguments(words=""):
    parser = argparse.ArgumentParser()
    memory.add_arguments(parser)
    return parser.parse_args(words.split())


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """All rows of the default run."""
    return run(tmp_path_factory.mktemp("memory"), "memory")


def value(rows, contender, metric, workload_ends):
    (row,) = [
        row
        for row in pick(rows, contender=contender, metric=metric)
        if row["workload"].endswith(workload_ends)
    ]
    assert row["min"] == row["median"] == row["max"]
    return row["median"]


@pytest.mark.parametrize(
    "metric, ends, reserved, paged",
    [
        ("KV memory a sequence", " step=1", 18_874_368, 589_824),  # 18.87 and 0.59 MB
        ("KV memory", " step=50", 603_979_776, 75_497_472),  # 603.98 and 75.50 MB
        ("sequences in a GB", " step=50", 53, 424),
        ("sequences at once", "prompt=8 step=1", 16, 512),
        ("sequences at once", "prompt=8 step=9", 16, 512),
        ("sequences at once", "prompt=8 step=10", 16, 256),
        ("sequences at once", "prompt=8 step=50", 16, 128),
    ],
)
def test_the_figures_with_which_projects_of_this_kind_argue(rows, metric, ends, reserved, paged):
    assert round(value(rows, memory.MAXIMUM, metric, ends)) == reserved
    assert round(value(rows, memory.PAGED, metric, ends)) == paged


def test_the_advantage_falls_from_32_times_to_nothing_as_sequences_grow(rows):
    curve = pick(rows, unit="x")
    assert {row["contender"] for row in curve} == {memory.PAGED}
    times = [row["median"] for row in curve]
    assert (times[0], times[-1]) == (32, 1)  # 1: at 512 tokens all that was plan_of_memoryd is used
    assert times == sorted(times, reverse=True)


def test_the_scheduler_runs_as_many_at_once_as_the_pool_is_said_to_hold():
    # 512 prompts of 8 tokens in 512 blocks: the last in line are preempted as the others grow.
    args = arguments("--batch 512")
    plan_of_memory = memory.PLANS[memory.PAGED]
    allocator = plan_of_memory.allocator(args.pool, args.block_size)
    scheduler = Scheduler(allocator, 512, 512 * 512, 512)
    for number in range(512):
        scheduler.add(memory.make_sequence(number, args, 8, 504).request)
    running = []
    for _ in range(50):
        plan = scheduler.schedule()
        running.append(len(plan.scheduled))
        scheduler.update(plan, [Continuation(seq, [0]) for seq in plan.sampled])
    assert [running[step - 1] for step in (1, 9, 10, 25, 50)] == [512, 512, 256, 256, 128]


# ---- step by step --------------------------------------------------------------------------------
def test_reserved_memory_is_flat_and_paged_memory_is_a_staircase():
    args = arguments("--batch 1 --prompt-tokens 3 --new-tokens 7 --block-size 4 --max-seq-len 32")
    held = {name: memory.held_each_step(plan, args) for name, plan in memory.PLANS.items()}
    assert held == {
        "reserve the maximum": [8] * 7,  # 32 tokens
        "reserve a power of two": [4] * 7,  # 3 + 8 = 11 tokens are 3 blocks, a region of 4
        "reserve the exact length": [4] * 7,  # 3 + 7 = 10 tokens: the same
        "paged": [1, 1, 2, 2, 2, 2, 3],  # 3, 4, 5, .. 9 tokens
    }


def test_what_is_held_is_shared_out_in_bytes_and_percent(tmp_path):
    rows = run(tmp_path, f"memory {TINY}")
    # Two sequences of 3 + 1 tokens at step 2: a block of 4 each, and full.
    assert value(rows, memory.PAGED, "KV memory", " step=2") == 2 * 4 * 36_864
    assert value(rows, memory.PAGED, "KV memory a sequence", " step=2") == 4 * 36_864
    assert value(rows, memory.PAGED, "share filled with tokens", " step=2") == 100
    assert value(rows, memory.MAXIMUM, "share filled with tokens", " step=2") == 25  # of 16
    assert value(rows, memory.PAGED, "share filled with tokens", " step=5") == 87.5  # 7 of 8


# ---- the same blocks again -----------------------------------------------------------------------
def test_a_second_batch_gets_the_blocks_of_the_first(rows):
    (workload,) = {row["workload"] for row in rows if row["workload"].startswith("two batches")}
    # 20 + 24 tokens are 3 blocks of 16, for 4 sequences; the pool has twice as many.
    assert workload == "two batches batch=4 prompt=20 new=24 block_size=16 num_blocks=24"
    found = {row["metric"]: row["median"] for row in pick(rows, workload=workload)}
    assert found == {
        "blocks of the first batch": 12,
        "blocks of the second batch": 12,
        "share of the second's blocks that the first one had": 100,
        "KV memory that the second batch adds": 0,
    }


def test_blocks_that_are_not_given_back_are_seen(monkeypatch):
    args = arguments("--reuse-batch 2")
    monkeypatch.setattr(memory.BlockAllocator, "free", lambda self, block_ids: None)
    rows = list(memory.rows_of_reuse(args, memory_common()))
    found = {row.metric: row.median for row in rows}
    assert found["share of the second's blocks that the first one had"] == 0
    assert found["KV memory that the second batch adds"] == 6 * 16 * 12_288  # the shipped model's


def memory_common():
    return {"experiment": "memory", "backend": "none", "dtype": "none", "threads": 1, "device": "x"}


# ---- a caller's mistakes -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batch 0", "batch is 0: it must be at least 1"),
        ("--new-tokens 505", "513 tokens, max_seq_len is 512: write fewer"),
        ("--steps 1 101", "--steps from 1 to 101: there are 1 to 100"),
        ("--steps 0", "--steps from 0 to 0: there are 1 to 100"),
        ("--pool-steps 506", "--pool-steps from 506 to 506: there are 1 to 505"),
        ("--pool 31", "a pool of 31 blocks of 16 cannot hold max_seq_len = 512: enlarge it"),
    ],
)
def test_sizes_of_which_no_run_can_be_made_are_refused(tmp_path, words, message):
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, f"memory {words}")
