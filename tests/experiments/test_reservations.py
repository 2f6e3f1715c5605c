"""Contiguous memory under the real scheduler and engine: who gets which region, and who waits.

First the three reservations and the buddies, in numbers that can be checked by hand. Then random
calls against a model that only knows which block belongs to which allocation. Then the scheduler
and the engine, whose tokens must be those of one slab per sequence.
"""

import copy
import math
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baselines import generate_contiguous
from block_allocator import BlockAllocator, NoFreeBlocks
from engine import InferenceEngine, eager_forward
from experiments.reservations import (
    BuddyAllocator,
    reserve_maximum,
    reserve_oracle,
    reserve_power_of_two,
)
from kv_cache import KVCache
from paged_attention import paged_attention
from sampling import SamplingParams
from scheduler import Scheduler, reserve_now
from sequence import Continuation, Request, Sequence

RESERVATIONS = [reserve_maximum, reserve_power_of_two, reserve_oracle]


# ---- how much is reserved ------------------------------------------------------------------------
def a_sequence(num_prompt_tokens, max_tokens, num_generated=0):
    token_ids = [0] * (num_prompt_tokens + num_generated)
    return SimpleNamespace(
        num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens, token_ids=token_ids
    )


def test_the_three_reservations_for_10_tokens_of_a_prompt_and_15_more():
    seq = a_sequence(10, 15)
    assert reserve_maximum(64)(seq) == 64
    assert reserve_power_of_two(64)(seq) == 26, "10 and 16"
    assert reserve_oracle(64)(seq) == 25
    assert reserve_now(seq) == 10, "paged"


@pytest.mark.parametrize("reserve", RESERVATIONS)
def test_a_reservation_is_the_same_all_along_and_never_too_small(reserve):
    for prompt, more in ((1, 1), (3, 60), (31, 1), (31, 2), (63, 9)):
        reserved = {reserve(64)(a_sequence(prompt, more, n)) for n in range(min(more, 64 - prompt))}
        assert len(reserved) == 1 and reserved.pop() >= min(prompt + more, 64)


# ---- buddies -------------------------------------------------------------------------------------
def regions(allocator):
    """The free regions as (first block, size), seen from outside: by taking the largest each time.

    Which of two equally large ones comes first is not said, so they come sorted.
    """
    twin = copy.deepcopy(allocator)
    found = []
    while twin.num_free:
        block_ids = twin.allocate(twin.num_free)
        found.append((block_ids[0], len(block_ids)))
    return sorted(found)


def books(allocator):
    counts = [allocator.ref_count(block_id) for block_id in range(allocator.num_blocks)]
    return counts, regions(allocator), allocator.num_reserved


def test_the_tightest_region_is_taken_first():
    allocator = BuddyAllocator(8)
    allocator.allocate(1)
    assert allocator.allocate(2) == [2, 3]
    assert allocator.allocate(1) == [1]
    assert allocator.allocate(4) == [4, 5, 6, 7]
    assert allocator.num_free == 0 and allocator.num_reserved == 8


def test_the_pool_can_have_enough_free_blocks_and_still_refuse():
    """External fragmentation, the disease that equal blocks cannot have."""
    buddies, paged = BuddyAllocator(8), BlockAllocator(8)
    for allocator in (buddies, paged):
        pairs = [allocator.allocate(2) for _ in range(4)]
        allocator.free(pairs[0])
        allocator.free(pairs[2])
    before = books(buddies)
    assert buddies.num_blocks - buddies.num_reserved == 4 and buddies.num_free == 2
    with pytest.raises(NoFreeBlocks, match="3 adjacent blocks asked for: 4 of 8 are free, 2 adj"):
        buddies.allocate(3)
    assert books(buddies) == before, "all or nothing"
    assert len(paged.allocate(3)) == 3


def test_what_no_region_can_ever_hold_needs_more_blocks_than_there_are():
    """Or a request for 9 adjacent of 12 blocks would be accepted and wait for ever."""
    allocator = BuddyAllocator(num_blocks=12, block_size=4)
    assert [allocator.blocks_needed(n) for n in (0, 1, 4, 5, 32)] == [0, 1, 1, 2, 8]
    assert allocator.blocks_needed(33) == 16
    assert allocator.blocks_needed(48) == 16
    scheduler = Scheduler(allocator, 4, 16, max_seq_len=64, reserve=reserve_oracle(64))
    with pytest.raises(ValueError, match="need 16 blocks of 4, the pool has 12"):
        scheduler.add(make_request(0, 30, 3))
    scheduler.add(make_request(1, 30, 2))
    run(scheduler)


# ---- holders -------------------------------------------------------------------------------------
BAD_LISTS = {
    "its first block": [0],
    "all but its last": [0, 1],
    "all but its first": [1, 2],
    "another order": [2, 1, 0],
    "with the block that was lost to rounding": [0, 1, 2, 3],
    "whole, and then a part of another": [0, 1, 2, 4],
    "a free block": [6],
    "a block that does not exist": [8],
    "a negative block": [-1],
    "twice in one list": [0, 1, 2, 0, 1, 2],
}


@pytest.mark.parametrize("block_ids", BAD_LISTS.values(), ids=BAD_LISTS)
def test_freeing_or_forking_a_part_or_a_free_block_raises_and_changes_nothing(block_ids):
    allocator = BuddyAllocator(8)
    tables = [allocator.allocate(3), allocator.allocate(2)]
    assert tables == [[0, 1, 2], [4, 5]]
    before = books(allocator)
    with pytest.raises(ValueError):
        allocator.free(block_ids)
    if block_ids != [0, 1, 2] * 2:  # two more holders are no mistake
        with pytest.raises(ValueError, match="are not what allocate returned"):
            allocator.fork(block_ids)
    assert books(allocator) == before
    allocator.check_integrity(tables)


# ---- check_integrity notices ---------------------------------------------------------------------
CORRUPTIONS = {  # of an allocator with blocks 0-2 (3 is lost) and 4-5 taken, and 6-7 free
    "counted once more": lambda a, tables: a._ref_counts.__setitem__(1, 2),
    "counted once less": lambda a, tables: a._ref_counts.__setitem__(2, 0),
    "a free block is counted": lambda a, tables: a._ref_counts.__setitem__(6, 1),
    "a table names another block": lambda a, tables: tables[0].__setitem__(2, 3),
    "a table names a block outside": lambda a, tables: tables[0].append(8),
    "a table is missing": lambda a, tables: tables.pop(),
    "an allocation is forgotten": lambda a, tables: a._held.pop(4),
    "an allocation is longer": lambda a, tables: a._held.update({4: 3}),
    "an allocation claims the lost block": lambda a, tables: a._held.update({0: 4}),
    "an allocation is shorter": lambda a, tables: a._held.update({0: 2}),
    "a free region is lost": lambda a, tables: a._free_regions.clear(),
    "a free region is larger": lambda a, tables: a._free_regions.update({6: 4}),
    "a free region lies elsewhere": lambda a, tables: setattr(a, "_free_regions", {4: 2}),
    "a free region overlaps": lambda a, tables: a._free_regions.update({5: 1}),
    "free buddies stay apart": lambda a, tables: setattr(a, "_free_regions", {6: 1, 7: 1}),
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_every_corruption_is_noticed(corrupt):
    allocator = BuddyAllocator(8)
    tables = [allocator.allocate(3), allocator.allocate(2)]
    allocator.check_integrity(iter(tables))
    corrupt(allocator, tables)
    with pytest.raises(AssertionError):
        allocator.check_integrity(tables)


# ---- random games against a model that only knows which block belongs to whom --------------------
class Buddies(RuleBasedStateMachine):
    """The model: one cell a block, which holds the number of its allocation, or None."""

    @initialize(num_blocks=st.integers(1, 40))
    def start(self, num_blocks):
        self.allocator = BuddyAllocator(num_blocks, 4)
        self.cells = [None] * num_blocks
        self.tables = {}  # allocation -> (block ids, holders)
        self.num_allocations = 0

    def largest_free(self):
        """The longest free run that is a power of two and starts at a multiple of its size."""
        best, size = 0, 1
        while size <= len(self.cells):
            for first in range(0, len(self.cells) - size + 1, size):
                if all(cell is None for cell in self.cells[first : first + size]):
                    best = size
            size *= 2
        return best

    @rule(n=st.integers(1, 12))
    def allocate(self, n):
        size = 1
        while size < n:
            size *= 2
        if size > self.largest_free():
            with pytest.raises(NoFreeBlocks):
                self.allocator.allocate(n)
            return
        table = self.allocator.allocate(n)
        first = table[0]
        assert table == list(range(first, first + n)), "adjacent and ascending"
        assert first % size == 0, "aligned"
        assert self.cells[first : first + size] == [None] * size, "they were free"
        self.num_allocations += 1
        self.cells[first : first + size] = [self.num_allocations] * size
        self.tables[self.num_allocations] = (table, 1)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data):
        number = data.draw(st.sampled_from(sorted(self.tables)))
        table, holders = self.tables[number]
        self.allocator.fork(table)
        self.tables[number] = (table, holders + 1)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data):
        self.release(data.draw(st.sampled_from(sorted(self.tables))))

    def release(self, number):
        table, holders = self.tables[number]
        self.allocator.free(table)
        if holders > 1:
            self.tables[number] = (table, holders - 1)
            return
        del self.tables[number]
        self.cells = [None if cell == number else cell for cell in self.cells]

    @precondition(lambda self: any(len(table) > 1 for table, _ in self.tables.values()))
    @rule(data=st.data())
    def free_a_part(self, data):
        several = [table for table, _ in self.tables.values() if len(table) > 1]
        table = data.draw(st.sampled_from(several))
        with pytest.raises(ValueError):
            self.allocator.free(table[: data.draw(st.integers(1, len(table) - 1))])

    @invariant()
    def books_agree(self):
        if not hasattr(self, "cells"):
            return
        self.allocator.check_integrity(
            [table for table, holders in self.tables.values() for _ in range(holders)]
        )
        assert self.allocator.num_free == self.largest_free()
        assert self.allocator.num_reserved == sum(cell is not None for cell in self.cells)

    def teardown(self):
        if hasattr(self, "cells"):
            while self.tables:
                self.release(next(iter(self.tables)))
            self.books_agree()
            assert regions(self.allocator) == regions(BuddyAllocator(len(self.cells)))


TestBuddies = Buddies.TestCase
TestBuddies.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# ---- under the real scheduler --------------------------------------------------------------------
def make_request(arrival, num_prompt_tokens, max_tokens, stop_token_ids=frozenset()):
    prompt = [2] * num_prompt_tokens
    request = Request(str(arrival), prompt, arrival)
    seq = Sequence(request, 0, list(prompt), num_prompt_tokens, max_tokens)
    seq.stop_token_ids = stop_token_ids
    request.sequences = [seq]
    return request


def run(scheduler, rng=None):
    """Steps to the end, the books checked after each; the most that ran and waited at once."""
    most_running = most_waiting = 0
    while scheduler.has_unfinished():
        plan = scheduler.schedule()
        scheduler.check_integrity()
        assert plan.scheduled, "a step without work would go on for ever"
        most_running = max(most_running, len(scheduler.running))
        most_waiting = max(most_waiting, scheduler.num_waiting)
        tokens = [0 if rng is None or rng.random() > 0.05 else 1 for _ in plan.sampled]
        chosen = zip(plan.sampled, tokens, strict=True)
        scheduler.update(plan, [Continuation(seq, [token_id]) for seq, token_id in chosen])
        scheduler.check_integrity()
    return most_running, most_waiting


@pytest.mark.parametrize("num_blocks", [32, 44])
@pytest.mark.parametrize("reserve", RESERVATIONS)
def test_50_random_requests_run_to_the_end_without_preemption(reserve, num_blocks):
    rng = random.Random(7)
    allocator = BuddyAllocator(num_blocks, block_size=4)
    scheduler = Scheduler(allocator, 16, 24, max_seq_len=64, reserve=reserve(64))
    sizes = [(rng.randint(1, 40), rng.randint(1, 40)) for _ in range(50)]
    requests = [make_request(i, *size, frozenset({1})) for i, size in enumerate(sizes)]
    for request in requests:
        scheduler.add(request)
    most_running, most_waiting = run(scheduler, rng)
    assert scheduler.num_preemptions == 0 and scheduler.num_recomputed_tokens == 0
    assert 2 <= most_running < 16 and most_waiting > 20, "memory was what they waited for"
    reasons = {}
    for request, (prompt, more) in zip(requests, sizes, strict=True):
        seq = request.sequences[0]
        reasons[seq.finish_reason] = reasons.get(seq.finish_reason, 0) + 1
        if seq.finish_reason == "length":
            assert len(seq.token_ids) == min(prompt + more, 64)
    assert reasons["stop"] > 5 and reasons["length"] > 5
    assert allocator.num_reserved == 0
    assert regions(allocator) == regions(BuddyAllocator(num_blocks))


# ---- under the real engine -----------------------------------------------------------------------
@pytest.mark.parametrize("reserve", RESERVATIONS)
def test_the_engine_on_contiguous_memory_writes_the_tokens_of_one_slab_each(tiny_gpt, reserve):
    """The same engine and kernel; only the memory is planned as before paging."""
    model = tiny_gpt(dtype=torch.float64)  # 2 layers, 4 heads of 16, max_seq_len 64
    block_size, num_blocks = 4, 44  # the longest sequence takes 16 of them
    rng = random.Random(0)
    lengths = [5, 1, 14, 2, 30, 7, 22, 44]
    prompts = [[rng.randrange(97) for _ in range(length)] for length in lengths]
    cache = KVCache(2, num_blocks, block_size, 4, 16, torch.float64)
    cache.pool.fill_(math.nan)
    allocator = BuddyAllocator(num_blocks, block_size)
    scheduler = Scheduler(allocator, 16, 20, max_seq_len=64, reserve=reserve(64))
    forward = eager_forward(model, cache, paged_attention)
    engine = InferenceEngine(forward, cache, scheduler, vocab_size=97)
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=24))

    done = {}
    most_running = 0
    while engine.has_unfinished():
        output = engine.step()
        scheduler.check_integrity()
        most_running = max(most_running, len(scheduler.running))
        for seq in scheduler.running:
            assert seq.block_table == list(range(seq.block_table[0], seq.block_table[-1] + 1))
        done |= {o.request_id: o.outputs[0].token_ids for o in output.finished}

    expected = generate_contiguous(model, prompts, 24)
    assert [done[str(i)] for i in range(8)] == expected
    assert [len(token_ids) for token_ids in expected] == [24, 24, 24, 24, 24, 24, 24, 20]
    assert len(set(sum(expected, []))) >= 5
    assert 2 <= most_running < 8, "some had to wait for memory"
    assert scheduler.num_preemptions == 0
    assert allocator.num_reserved == 0


def test_a_region_at_a_crooked_address_is_noticed():
    """Blocks 1-2 as one region of two: it tiles the pool, but its buddy would be wrong."""
    allocator = BuddyAllocator(4)
    tables = [allocator.allocate(1)]
    allocator._free_regions = {1: 2, 3: 1}
    with pytest.raises(AssertionError, match="a region of 2 blocks starts at block 1"):
        allocator.check_integrity(tables)
