"""What the allocator's experiment measures, and that a block which is lost does show."""

import argparse

import pytest
from rows import pick, run

from block_allocator import BlockAllocator, NoFreeBlocks
from experiments import allocator
from experiments.reservations import BuddyAllocator

SMALL = "--repeats 2 --cycles 3 --sequences 2 --blocks 4 --num-blocks 16 --operations 400"
SMALL += " --check-every 7"


def storm_args(operations, check_every=1):
    return argparse.Namespace(operations=operations, check_every=check_every, seed=0)


class Leaky(BlockAllocator):
    """Keeps the last block of each list that it is given back."""

    def free(self, block_ids):
        super().free(block_ids)
        if len(block_ids) > 1 and self.ref_count(block_ids[-1]) == 0:
            self._free.remove(block_ids[-1])


class Partial(BlockAllocator):
    """Hands out what it has before it refuses: not all or nothing."""

    def allocate(self, n):
        if n > self.num_free:
            super().allocate(self.num_free)
            raise NoFreeBlocks("too late")
        return super().allocate(n)


class Forgiving(BlockAllocator):
    """Accepts a double free, and has the block twice from then on."""

    def free(self, block_ids):
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] = max(self._ref_counts[block_id] - 1, 0)
            if self._ref_counts[block_id] == 0:
                self._free.append(block_id)


def test_all_three_trials_end_with_no_block_lost(tmp_path):
    rows = run(tmp_path, f"allocator {SMALL}")
    cycles, storm, full = (
        "3 cycles x 2 sequences x 4 blocks",
        "storm operations=400 num_blocks=16",
        "full num_blocks=16",
    )
    assert [row["workload"] for row in rows] == [cycles] * 4 + [storm] * 8 + [full] * 6
    lost = pick(rows, metric="blocks lost")
    assert [(row["contender"], row["max"]) for row in lost] == [
        ("free list", 0),
        ("buddies", 0),
    ] * 3
    for row in pick(rows, unit="blocks/s"):
        assert row["repeats"] == 2 and row["min"] > 0
    for name in ("free list", "buddies"):
        found = {row["metric"]: row["median"] for row in pick(rows, contender=name)}
        assert found["blocks to be had"] == 16
        assert found["refused of 3 that ask for more"] == 3
        assert found["refused, the pool was empty"] > 0 and found["double frees refused"] > 0


def test_a_block_counts_once_for_both_ways(monkeypatch):
    times = iter([1.0, 3.0])
    monkeypatch.setattr(allocator.time, "perf_counter", lambda: next(times))
    assert (
        allocator.time_cycles(BlockAllocator(64), cycles=5, sequences=4, blocks=8) == 80
    )  # in 2 s


@pytest.mark.parametrize("make", [BlockAllocator, BuddyAllocator])
def test_a_storm_tries_refusals_mistakes_and_shared_blocks_and_leaves_an_empty_pool(
    make, monkeypatch
):
    step, most_holders = allocator.Storm.step, []

    def watched(storm):
        step(storm)
        most_holders.append(max(map(storm.allocator.ref_count, range(32))))

    monkeypatch.setattr(allocator.Storm, "step", watched)
    pool = make(32)
    storm, rate = allocator.time_storm(pool, storm_args(3003, check_every=100))
    assert rate > 0 and storm.tables == [] and allocator.lost(pool) == 0
    assert storm.refused > 20 and storm.mistakes > 20 and max(most_holders) > 2
    assert len(most_holders) == 3003  # also the last 3, after the last check


@pytest.mark.parametrize("broken", [Leaky, Partial, Forgiving])
def test_a_storm_finds_a_leak_a_partial_refusal_and_a_double_free(broken):
    with pytest.raises(AssertionError):
        allocator.time_storm(broken(16), storm_args(300))


def test_cycles_find_a_leak_too():
    with pytest.raises(AssertionError):
        allocator.time_cycles(Leaky(1024), cycles=2)


@pytest.mark.parametrize("words", ["--num-blocks 64", "--num-blocks 1000", "--blocks 0"])
def test_a_pool_that_cannot_hold_a_cycle_is_refused(tmp_path, words):
    with pytest.raises(SystemExit, match="the pool must be a power of two that holds them all"):
        run(tmp_path, f"allocator {words}")
