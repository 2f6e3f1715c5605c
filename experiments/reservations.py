"""Contiguous memory under the paged engine: a buddy allocator and three reservations.

Before paging each sequence got one piece of adjacent memory. Such a piece cannot grow, so its size
is fixed before the first token is written. The paper compares paging with three ways to choose that
size: room for the longest sequence, a guess within a factor of two, and the true length, which no
server knows. Here they run under the same scheduler, engine and kernel as paging, so the memory
plan is the only difference:

    reserve(seq)       how many tokens a sequence needs room for, given to the `Scheduler`
    BuddyAllocator     hands out adjacent blocks only, given to the `Scheduler` as its allocator

    contiguous  |AAAAAA..|BBB.|  ..      slabs of 8 and 4; C needs 4 adjacent, and 2 are left
    paged       |AAAA|BBB.|AA..|CCCC|    a block when one is full, wherever it lies

Checked in tests/experiments/test_reservations.py against a model that only knows which block
belongs to which allocation, and in the engine against `baselines.generate_contiguous`.

Kwon et al. 2023, "PagedAttention", SOSP, arXiv:2309.06180, section 6.1 (the three reservations);
Knowlton 1965, "A fast storage allocator", CACM 8(10) (buddies).
Run: python -m experiments.reservations
"""

from collections import Counter
from collections.abc import Callable, Iterable
from types import SimpleNamespace

from block_allocator import BlockAllocator, NoFreeBlocks, draw_pool


# ---- how many tokens to reserve ------------------------------------------------------------------
def reserve_maximum(max_seq_len: int) -> Callable[..., int]:
    """The final length is unknown, so each sequence gets room for the longest."""
    return lambda seq: max_seq_len


def reserve_power_of_two(max_seq_len: int) -> Callable[..., int]:
    """A guess of the output that is right within a factor of two: 25 tokens -> room for 32."""
    return lambda seq: min(seq.num_prompt_tokens + power_of_two(seq.max_tokens), max_seq_len)


def reserve_oracle(max_seq_len: int) -> Callable[..., int]:
    """Exactly what a sequence fills if it writes all its `max_tokens`: no server can know."""
    return lambda seq: min(seq.num_prompt_tokens + seq.max_tokens, max_seq_len)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`, for n from 1 up: 5 -> 8, 8 -> 8."""
    return 1 << (n - 1).bit_length()


# ---- adjacent blocks only ------------------------------------------------------------------------
class BuddyAllocator(BlockAllocator):
    """The interface of `BlockAllocator` for contiguous memory: it hands out adjacent blocks only.

    A region has a power of two of blocks and starts at a multiple of its size. A region that is too
    large is halved until it fits. The two halves are buddies, and merge again when both are free.
    A request is rounded up to a whole region; the blocks that were not asked for are lost until the
    region is freed. Only whole allocations can be freed or forked, so a forked sequence cannot copy
    just the block that it writes into. Reference counts are those of `BlockAllocator`.
    """

    def reset(self) -> None:
        """Take back all blocks: the regions of a new pool."""
        super().reset()
        self._held: dict[int, int] = {}  # first block of an allocation -> blocks asked for
        self._free_regions: dict[int, int] = {}  # first block of a free region -> its size
        for block_id in range(self.num_blocks):
            self._release(block_id, 1)  # they merge: 12 blocks are a region of 8 and one of 4

    def blocks_needed(self, num_tokens: int) -> int:
        """Adjacent blocks that hold `num_tokens` tokens: the ceiling of num_tokens / block_size.

        If no region of this pool is that large, the size of the region that would be needed: 9 of
        12 blocks -> 16. That is more than the pool has, so the scheduler refuses the request.
        """
        n = super().blocks_needed(num_tokens)
        return n if power_of_two(max(n, 1)) <= self.num_blocks else power_of_two(n)

    @property
    def num_free(self) -> int:
        """How many blocks one `allocate` could hand out now: the size of the largest free region.

        `num_blocks - num_reserved - num_free` is the external fragmentation: blocks that are free,
        but not adjacent to that region.
        """
        return max(self._free_regions.values(), default=0)

    @property
    def num_reserved(self) -> int:
        """Blocks of all regions handed out, including those lost to rounding."""
        return self.num_blocks - sum(self._free_regions.values())

    def allocate(self, n: int) -> list[int]:
        """Take `n` adjacent blocks, in ascending order. All or nothing: else NoFreeBlocks."""
        if n < 1:
            return []
        wanted = power_of_two(n)
        fitting = [(size, first) for first, size in self._free_regions.items() if size >= wanted]
        if not fitting:
            free = f"{self.num_blocks - self.num_reserved} of {self.num_blocks} are free"
            raise NoFreeBlocks(f"{n} adjacent blocks asked for: {free}, {self.num_free} adjacent")
        size, first = min(fitting)  # the tightest fit leaves large regions whole
        del self._free_regions[first]
        while size > wanted:
            size //= 2
            self._free_regions[first + size] = size  # the upper half stays free
        self._held[first] = n
        self._ref_counts[first : first + n] = [1] * n
        return list(range(first, first + n))

    def fork(self, block_ids: list[int]) -> None:
        """Add one holder to whole allocations. Raises ValueError for anything else."""
        self._allocations(block_ids)
        super().fork(block_ids)

    def free(self, block_ids: list[int]) -> None:
        """Remove one holder from whole allocations; a region without holders is free again.

        `block_ids` is what `allocate` returned, or several such lists one after another. A part of
        an allocation, or one that has no more holders, raises ValueError, and nothing is changed.
        """
        for first, times in Counter(self._allocations(block_ids)).items():
            if times > self._ref_counts[first]:
                raise ValueError(f"block {first} is freed more often than it is held")
        for block_id in block_ids:
            self._ref_counts[block_id] -= 1
        for first in self._held.keys() & set(block_ids):
            if self._ref_counts[first] == 0:
                self._release(first, power_of_two(self._held.pop(first)))

    def check_integrity(self, block_tables: Iterable[list[int]]) -> None:
        """Assert that reference counts equal the tables, and that regions fill the pool exactly."""
        named = Counter(block_id for table in block_tables for block_id in table)
        counts = Counter(dict(enumerate(self._ref_counts)))
        over, under = dict(counts - named), dict(named - counts)
        assert not over and not under, f"counted, not named: {over}; named, not counted: {under}"
        held = {i for first, n in self._held.items() for i in range(first, first + n)}
        assert held == set(named), f"allocations and tables disagree on {sorted(held ^ set(named))}"
        end = 0
        regions = [(first, power_of_two(n)) for first, n in self._held.items()]
        for first, size in sorted([*regions, *self._free_regions.items()]):
            assert first == end, f"a region starts at block {first}, the one before ends at {end}"
            assert first % size == 0, f"a region of {size} blocks starts at block {first}"
            end += size
        assert end == self.num_blocks, f"the regions end at block {end}, not {self.num_blocks}"
        apart = [
            first
            for first, size in self._free_regions.items()
            if self._free_regions.get(first ^ size) == size
        ]
        assert not apart, f"the free regions at {apart} are buddies and were not merged"

    def _allocations(self, block_ids: list[int]) -> list[int]:
        """The first blocks of the allocations that a list is made of, or ValueError."""
        firsts = [block_id for block_id in block_ids if block_id in self._held]
        if block_ids != [i for first in firsts for i in range(first, first + self._held[first])]:
            raise ValueError(f"blocks {block_ids} are not what allocate returned, or are free")
        return firsts

    def _release(self, first: int, size: int) -> None:
        """Enter a region as free, and merge it with its buddy while that is free too."""
        # Buddies differ in one bit of their first block: of size 4, those at 8 and 12.
        while self._free_regions.get(first ^ size) == size:
            del self._free_regions[first ^ size]
            first = min(first, first ^ size)
            size *= 2
        self._free_regions[first] = size


# --------------------------------------------------------------------------------------------------
def start_sequences(allocator: BlockAllocator, reserve: Callable[..., int]) -> dict:
    """Start sequences in order until one does not fit: name -> (block_table, tokens it has now)."""
    # name: tokens of the prompt, tokens that it will write, tokens that it has now
    wanted = {"A": (5, 6, 8), "B": (7, 3, 9), "C": (4, 2, 5), "D": (3, 8, 6)}
    wanted |= {"E": (8, 7, 10), "F": (2, 9, 3), "G": (6, 1, 7), "H": (3, 5, 4)}
    owners: dict[str, tuple[list[int], int]] = {}
    for name, (prompt, written, now) in wanted.items():
        seq = SimpleNamespace(num_prompt_tokens=prompt, max_tokens=written, token_ids=[0] * now)
        needed = allocator.blocks_needed(reserve(seq))
        if needed > allocator.num_free:
            break
        owners[name] = (allocator.allocate(needed), now)
    return owners


def demo():
    """Four ways to plan the memory of one pool of 16 blocks."""
    used: dict[str, int] = {}

    def show(plan: str, owners: dict, lost: list[int]):
        used[plan] = sum(num_tokens for _, num_tokens in owners.values())
        strip = draw_pool(owners | {"-": (lost, 4 * len(lost))}, 16, 4)
        print(f"{plan:11}{len(owners)} {used[plan] / 64:4.0%} {strip}")

    print("16 blocks of 4 and max_seq_len 32: sequences that run, memory used, who holds it")
    plans = reserve_maximum, reserve_power_of_two, reserve_oracle
    for name, reserve in zip(("maximum", "power of 2", "oracle"), plans, strict=True):
        owners = start_sequences(BuddyAllocator(16, 4), reserve(max_seq_len=32))
        # 3 blocks from block 4 on are a region of 4 blocks: block 7 is lost.
        lost: list[int] = []
        for table, _ in owners.values():
            lost += range(table[-1] + 1, table[0] + power_of_two(len(table)))
        show(name, owners, lost)
    show("paged", start_sequences(BlockAllocator(16, 4), lambda seq: len(seq.token_ids)), [])
    print("'.' is reserved and not filled, '----' is lost to rounding slabs up to 2, 4, 8 blocks")
    assert used["maximum"] < used["power of 2"] <= used["oracle"] < used["paged"]
    print("ok: only paging fills its memory with tokens")


if __name__ == "__main__":
    demo()
