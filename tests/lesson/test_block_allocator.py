"""The allocator: equal blocks, a free list, reference counts, and books that notice every error.

It deals in integers, so every value here can be checked by hand. The last part plays random games
against the dumbest model that is right: a list for the free blocks, a dict for the holders.
"""

import copy
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from block_allocator import BlockAllocator, NoFreeBlocks, draw_pool


def books(allocator):
    """All that can be seen of an allocator: each block's holders, and in which order it goes on."""
    twin = copy.deepcopy(allocator)
    counts = [allocator.ref_count(block_id) for block_id in range(allocator.num_blocks)]
    return counts, twin.allocate(twin.num_free)


# ---- blocks in, blocks out -----------------------------------------------------------------------
def test_a_sequence_of_17_tokens_needs_2_blocks_of_16():
    allocator = BlockAllocator(num_blocks=8, block_size=16)
    lengths = [0, 1, 15, 16, 17, 31, 32, 33]
    assert [allocator.blocks_needed(n) for n in lengths] == [0, 1, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7, 16])
def test_blocks_needed_is_the_ceiling_for_every_length_up_to_three_blocks_and_one(block_size):
    allocator = BlockAllocator(num_blocks=8, block_size=block_size)
    for n in range(3 * block_size + 2):
        needed = allocator.blocks_needed(n)
        assert needed * block_size >= n, "the tokens fit"
        assert (needed - 1) * block_size < n or n == 0, "and one block less would not do"


def test_a_new_pool_hands_out_its_blocks_in_order():
    allocator = BlockAllocator(num_blocks=8, block_size=4)
    assert allocator.num_free == 8
    assert allocator.allocate(3) == [0, 1, 2]
    assert allocator.allocate(1) == [3]
    assert allocator.num_free == 4
    assert [allocator.ref_count(block_id) for block_id in range(8)] == [1, 1, 1, 1, 0, 0, 0, 0]


def test_allocating_is_all_or_nothing():
    allocator = BlockAllocator(num_blocks=4, block_size=4)
    allocator.allocate(2)
    before = books(allocator)
    with pytest.raises(NoFreeBlocks, match="3 blocks asked for, 2 of 4 free"):
        allocator.allocate(3)
    assert books(allocator) == before
    assert allocator.allocate(2) == [2, 3]


def test_memory_in_equal_blocks_cannot_fragment():
    allocator = BlockAllocator(num_blocks=8)
    allocator.allocate(8)
    for block_id in (1, 3, 5, 7):
        allocator.free([block_id])
    assert sorted(allocator.allocate(4)) == [1, 3, 5, 7]  # no two are adjacent, and none need be


def test_the_next_sequence_gets_the_freed_blocks_in_the_same_order():
    allocator = BlockAllocator(num_blocks=8)
    allocator.allocate(8)
    allocator.free([5, 2, 7])  # last block first: 7, 2, 5, and 5 lies on top
    assert allocator.allocate(3) == [5, 2, 7]


def test_the_most_recently_freed_blocks_are_handed_out_first():
    allocator = BlockAllocator(num_blocks=8)
    first, second = allocator.allocate(2), allocator.allocate(2)
    allocator.free(first)
    allocator.free(second)
    assert allocator.allocate(5) == [2, 3, 0, 1, 4]


def test_a_pool_without_blocks_or_blocks_without_tokens_are_refused():
    with pytest.raises(ValueError, match="num_blocks is 0, block_size is 16"):
        BlockAllocator(num_blocks=0)
    with pytest.raises(ValueError, match="num_blocks is 8, block_size is 0"):
        BlockAllocator(num_blocks=8, block_size=0)


# ---- several holders -----------------------------------------------------------------------------
def test_a_shared_block_is_free_when_its_last_holder_leaves():
    allocator = BlockAllocator(num_blocks=4)
    table = allocator.allocate(2)
    allocator.fork(table)
    allocator.fork(table[:1])
    assert [allocator.ref_count(block_id) for block_id in range(4)] == [3, 2, 0, 0]
    assert allocator.num_free == 2
    allocator.free(table)
    assert [allocator.ref_count(block_id) for block_id in range(4)] == [2, 1, 0, 0]
    assert allocator.num_free == 2
    allocator.free(table)
    assert [allocator.ref_count(block_id) for block_id in range(4)] == [1, 0, 0, 0]
    assert allocator.num_free == 3
    allocator.free([0])
    assert allocator.num_free == 4


def test_one_call_may_free_a_block_as_often_as_it_has_holders():
    allocator = BlockAllocator(num_blocks=4)
    (block_id,) = allocator.allocate(1)
    allocator.fork([block_id, block_id])
    allocator.free([block_id, block_id, block_id])
    assert allocator.num_free == 4
    allocator.check_integrity([])


@pytest.mark.parametrize("block_ids", [[3], [0, 3], [3, 0], [8], [0, 8], [-1], [0, -8]], ids=str)
def test_forking_a_free_or_unknown_block_raises_and_changes_nothing(block_ids):
    allocator = BlockAllocator(num_blocks=8)
    allocator.allocate(2)
    before = books(allocator)
    with pytest.raises(ValueError, match="is free or unknown: it has no holder"):
        allocator.fork(block_ids)
    assert books(allocator) == before


@pytest.mark.parametrize(
    "block_ids",
    [
        pytest.param([3], id="freed before"),
        pytest.param([0, 1, 2, 3], id="the last was freed before"),
        pytest.param([3, 2, 1, 0], id="the first was freed before"),
        pytest.param([0, 1, 0], id="one block named twice"),
        pytest.param([2, 2, 2], id="two holders, named three times"),
        pytest.param([5], id="never handed out"),
        pytest.param([0, 8], id="unknown"),
        pytest.param([8, 0], id="unknown first"),
        pytest.param([-1], id="negative"),
        pytest.param([0, -8, 1], id="negative, and in range from the end"),
    ],
)
def test_freeing_a_block_without_a_holder_raises_and_changes_nothing(block_ids):
    allocator = BlockAllocator(num_blocks=8)
    allocator.allocate(4)  # 0, 1, 2, 3
    allocator.fork([2])
    allocator.free([3])
    before = books(allocator)
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free(block_ids)
    assert books(allocator) == before
    allocator.check_integrity([[0, 1, 2], [2]])


# ---- an allocator without a memory ---------------------------------------------------------------
def test_this_allocator_remembers_no_prefix():
    allocator = BlockAllocator(num_blocks=4, block_size=2)
    table = allocator.allocate(2)
    before = books(allocator)
    allocator.publish(table, [7, 8, 9, 10], 4)
    assert allocator.match_prefix([7, 8, 9, 10]) == []
    assert allocator.match_prefix([7, 8, 9, 10], salt="tenant") == []
    assert books(allocator) == before
    assert allocator.num_evicted == 0


def test_the_allocator_and_the_scheduler_start_without_torch():
    code = (
        "import sys, block_allocator, policies, sequence, scheduler; print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


# ---- the pool as a strip -------------------------------------------------------------------------
def test_the_pool_is_drawn_one_cell_a_block():
    assert draw_pool({}, 2, 4) == "|    |    |"
    assert draw_pool({"A": ([2, 0], 6)}, 3, 4) == "|AA..|    |AAAA|"
    owners = {"A": ([0, 2], 6), "B": ([1, 3], 7), "C": ([5, 7], 5)}
    assert draw_pool(owners, 8, 4) == "|AAAA|BBBB|AA..|BBB.|    |CCCC|    |C...|"


def test_a_reserved_block_without_tokens_is_drawn_empty():
    assert draw_pool({"A": ([1, 0, 2], 3)}, 4, 3) == "|...|AAA|...|   |"
    assert draw_pool({"A": ([0], 0)}, 1, 1) == "|.|"


# ---- the books -----------------------------------------------------------------------------------
def two_tables():
    """A pool of 8 with two sequences that share block 0; [0, 1, 2] and [0, 3]."""
    allocator = BlockAllocator(num_blocks=8, block_size=4)
    first = allocator.allocate(3)
    allocator.fork(first[:1])
    second = first[:1] + allocator.allocate(1)
    allocator.check_integrity([first, second])
    return allocator, first, second


CORRUPTIONS = {  # of the allocator, of the table [0, 1, 2] and of the table [0, 3]
    "a count too high": lambda a, first, second: a._ref_counts.__setitem__(1, 2),
    "a count too low": lambda a, first, second: a._ref_counts.__setitem__(0, 1),
    "a count of a free block": lambda a, first, second: a._ref_counts.__setitem__(6, 1),
    "a count of zero, not on the free list": lambda a, first, second: (
        a._ref_counts.__setitem__(1, 0),
        first.remove(1),
    ),
    "a block lost from the free list": lambda a, first, second: a._free.remove(6),
    "a block twice on the free list": lambda a, first, second: a._free.append(6),
    "one twice on the free list, one lost": lambda a, first, second: a._free.__setitem__(0, 6),
    "a held block on the free list": lambda a, first, second: a._free.append(2),
    "a table names a free block": lambda a, first, second: second.append(6),
    "a table names an unknown block": lambda a, first, second: second.append(8),
    "a table names another held block": lambda a, first, second: second.__setitem__(1, 2),
    "a table names a block twice": lambda a, first, second: second.append(3),
    "a table has lost a block": lambda a, first, second: first.pop(),
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_the_books_notice_every_single_corruption(corrupt):
    allocator, first, second = two_tables()
    assert (first, second) == ([0, 1, 2], [0, 3])
    corrupt(allocator, first, second)
    with pytest.raises(AssertionError):
        allocator.check_integrity([first, second])


def test_a_table_too_many_and_a_table_too_few_are_noticed():
    allocator, first, second = two_tables()
    with pytest.raises(AssertionError, match="block 0: ref_count 2, 1 tables name it"):
        allocator.check_integrity([first])
    with pytest.raises(AssertionError, match="block 0: ref_count 2, 3 tables name it"):
        allocator.check_integrity([first, second, second])


class AllocatorGame(RuleBasedStateMachine):
    """Random allocate, grow, fork and free against a list, a dict and two lines for each rule."""

    NUM_BLOCKS = 9

    def __init__(self):
        super().__init__()
        self.allocator = BlockAllocator(self.NUM_BLOCKS, block_size=2)
        self.free_list = list(reversed(range(self.NUM_BLOCKS)))  # the next block is the last
        self.holders = dict.fromkeys(range(self.NUM_BLOCKS), 0)
        self.tables = []

    def take(self, n):
        """What the model hands out: one block at a time, from the end of the list."""
        taken = [self.free_list.pop() for _ in range(n)]
        self.holders |= dict.fromkeys(taken, 1)
        return taken

    def let_go(self, block_ids):
        for block_id in reversed(block_ids):
            self.holders[block_id] -= 1
            if self.holders[block_id] == 0:
                self.free_list.append(block_id)

    def allocate_in_both(self, n):
        if n > len(self.free_list):
            with pytest.raises(NoFreeBlocks):
                self.allocator.allocate(n)
            return []
        block_ids = self.allocator.allocate(n)
        assert block_ids == self.take(n)
        return block_ids

    @rule(n=st.integers(0, 5))
    def a_sequence_arrives(self, n):
        self.tables.append(self.allocate_in_both(n))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), n=st.integers(0, 2))
    def a_sequence_grows(self, data, n):
        data.draw(st.sampled_from(self.tables)).extend(self.allocate_in_both(n))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def a_sequence_forks(self, data):
        table = data.draw(st.sampled_from(self.tables))
        shared = table[: data.draw(st.integers(0, len(table)))]
        self.allocator.fork(shared)
        for block_id in shared:
            self.holders[block_id] += 1
        self.tables.append(list(shared))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def a_sequence_leaves(self, data):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.allocator.free(table)
        self.let_go(table)

    @rule(block_ids=st.lists(st.integers(-2, 10), min_size=1, max_size=4), data=st.data())
    def a_block_is_freed_too_often(self, block_ids, data):
        counts = {i: block_ids.count(i) for i in block_ids}
        if all(n <= self.holders.get(i, 0) for i, n in counts.items()):
            block_ids.append(99)  # all of them are held: name one that cannot be
        with pytest.raises(ValueError):
            self.allocator.free(data.draw(st.permutations(block_ids)))

    @invariant()
    def the_books_agree(self):
        self.allocator.check_integrity(self.tables)
        counts, next_blocks = books(self.allocator)
        assert counts == list(self.holders.values())
        assert next_blocks == self.free_list[::-1]
        assert self.allocator.num_free == len(self.free_list)


TestAllocatorGame = AllocatorGame.TestCase
TestAllocatorGame.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
