"""What the allocator's experiment measures, and that a block which is lost does show."""

import argparse
import random

import pytest
from rows import pick, run

from block_allocator import BlockAllocator, NoFreeBlocks
from experiments import allocator
from experiments.reservations import BuddyAllocator

SMALL = "--repeats 2 --cycles 3 --sequences 2 --blocks 4 --num-blocks 16 --operations 400"
SMALL += " --check-every 7"
BOTH = pytest.mark.parametrize("make", [BlockAllocator, BuddyAllocator])


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


# ---- the experiment ------------------------------------------------------------------------------
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


@BOTH
def test_a_storm_leaves_an_empty_pool_behind(make):
    pool = make(32)
    storm, rate = allocator.time_storm(pool, storm_args(3000, check_every=100))
    assert rate > 0 and storm.tables == []
    assert allocator.lost(pool) == 0
    # All that was to be tried was tried.
    assert storm.refused > 20 and storm.mistakes > 20


def test_the_storm_shares_blocks():
    storm = allocator.Storm(BlockAllocator(64), random.Random(0))
    most = 0
    for _ in range(500):
        storm.step()
        most = max(most, *map(storm.allocator.ref_count, range(64)))
    assert most > 2


@pytest.mark.parametrize("count", [1, 6, 7, 8, 20])
def test_the_last_operations_are_done_whatever_the_checks_divide(count, monkeypatch):
    done = []
    monkeypatch.setattr(allocator.Storm, "step", lambda storm: done.append(1))
    allocator.time_storm(BlockAllocator(4), storm_args(count, check_every=7))
    assert len(done) == count


# ---- what it would find --------------------------------------------------------------------------
def test_a_leak_is_found_by_each_trial():
    with pytest.raises(AssertionError):
        allocator.time_cycles(Leaky(1024), cycles=2)
    with pytest.raises(AssertionError):
        allocator.time_storm(Leaky(64), storm_args(300))
    pool = Leaky(8)
    pool.free(pool.allocate(5))
    assert allocator.lost(pool) == 1


def test_a_refusal_that_changes_the_books_is_found():
    with pytest.raises(AssertionError):
        allocator.time_storm(Partial(16), storm_args(300))


def test_a_double_free_that_is_accepted_is_found():
    with pytest.raises(AssertionError):
        allocator.time_storm(Forgiving(16), storm_args(300))


@BOTH
def test_a_full_pool_refuses_and_gets_all_back(make):
    pool = make(16)
    assert allocator.exhaust(pool) == (16, 3)
    assert pool.num_free == 16


# ---- bookkeeping ---------------------------------------------------------------------------------
def test_bookkeeping_times_the_allocator_and_the_scheduler(tmp_path):
    rows = run(tmp_path, "bookkeeping --repeats 2 --running 4 --waiting 0 9")
    assert [row["workload"] for row in rows[1:]] == ["running=4 waiting=0", "running=4 waiting=9"]
    assert (rows[0]["unit"], rows[0]["repeats"], rows[1]["repeats"]) == ("blocks/s", 2, 2)


# ---- a caller's mistakes -------------------------------------------------------------------------
@pytest.mark.parametrize("words", ["--num-blocks 64", "--num-blocks 1000", "--blocks 0"])
def test_a_pool_that_cannot_hold_a_cycle_is_refused(tmp_path, words):
    with pytest.raises(SystemExit, match="the pool must be a power of two that holds them all"):
        run(tmp_path, f"allocator {words}")
