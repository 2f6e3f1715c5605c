"""Memory in equal blocks cannot fragment: a free list and reference counts are the whole allocator.

A contiguous cache reserves room for the longest possible text before the first token arrives. GPT-2
(124M) needs 37.7 MB for 1,024 tokens, and a chat turn of 60 tokens fills 6% of it. Servers of that
kind held tokens in only 20 to 38% of their KV memory. Here memory is cut into blocks of
`block_size` tokens, and a sequence takes one block at a time. Only the unfilled part of each
sequence's last block is wasted.

    pool      |AAAA|BBBB|AA..|BBB.|    |CCCC|    |C...|      8 blocks of 4 tokens
    A's block_table = [0, 2]     B's = [1, 3]     C's = [5, 7]
    free list = [4, 6]           all blocks are equal, so any free block will do

Several sequences may hold the same block: those with an equal prefix, or the beams of a search. A
reference count says how many do. A block returns to the free list when its last holder frees it.
The allocator knows no sequences and no tensors, only block ids. prefix_cache.py also keeps the
contents of freed blocks for later prompts, and evicts the least recently used ones.

Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP, arXiv:2309.06180, section 4.2 (and section 3.1 for the 20 to 38%).
Run: python block_allocator.py
Try: BLOCK_SIZE = 1 above the demo (100% of the memory is used, but D's block table has 15 entries).
Or let `allocate` take the other end of the free list, `slice(0, n)`: D gets the blocks that were
freed longest ago, and the picture changes.
"""

from collections import Counter
from collections.abc import Iterable


class NoFreeBlocks(Exception):
    """Fewer blocks are free than were asked for: a sequence has to wait or be preempted."""


class BlockAllocator:
    """Hands out the ids of `num_blocks` equal blocks, each of `block_size` tokens.

    Invariant: a block is on the free list exactly when its reference count is zero.
    """

    keeps_contents = False  # whether `match_prefix` may find what `publish` was told

    def __init__(self, num_blocks: int, block_size: int = 16):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"num_blocks is {num_blocks}, block_size is {block_size}: both must be at least 1"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reset()

    def reset(self) -> None:
        """Free all blocks. The block tables of all sequences are invalid after it."""
        # Two lists of integers are the whole state. The memory itself belongs to kv_cache.py, and
        # the block tables belong to the sequences.
        # A stack whose top is the end of the list. The block that was freed last is taken first,
        # because its memory is the most likely one to be in a CPU cache.
        self._free = list(range(self.num_blocks - 1, -1, -1))  # 4 blocks -> [3, 2, 1, 0]: 0 first
        self._ref_counts = [0] * self.num_blocks  # entry i: how many tables name block i

    def blocks_needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens: the ceiling of num_tokens / block_size."""
        return -(-num_tokens // self.block_size)  # 17 tokens, block_size 16 -> 2 blocks

    @property
    def num_free(self) -> int:
        """How many blocks `allocate` could hand out now."""
        return len(self._free)

    @property
    def num_evicted(self) -> int:
        """Cached blocks evicted so far; this allocator caches none (a prefix cache does)."""
        return 0

    @property
    def unused_cached_blocks(self) -> list[int]:
        """Blocks that have no holder and keep their contents. They count as free."""
        return []

    def allocate(self, n: int) -> list[int]:
        """Take `n` free blocks, each with reference count 1.

        Raises NoFreeBlocks, and takes none, if fewer than `n` are free.
        """
        if n > len(self._free):  # nothing was taken yet, so the caller has nothing to give back
            raise NoFreeBlocks(f"{n} blocks asked for, {len(self._free)} of {self.num_blocks} free")
        # The n entries at the top. `-n` would be wrong for n = 0: [-0:] is the whole list.
        taken = slice(len(self._free) - n, None)  # 5 free, n = 2 -> entries [3, 5)
        block_ids = self._free[taken]
        del self._free[taken]
        block_ids.reverse()  # [.., 1, 0] -> [0, 1]: the order of n single pops
        ref_counts = self._ref_counts  # a local name is faster in the loop
        for block_id in block_ids:
            ref_counts[block_id] = 1
        return block_ids

    def fork(self, block_ids: list[int]) -> None:
        """Add one holder to each block. Raises ValueError, and adds none, if one of them is free.

        No memory is copied: two block tables now name the same blocks.
        """
        self._check_held(block_ids)  # all are checked before the first count changes
        for block_id in block_ids:
            self._ref_counts[block_id] += 1

    def free(self, block_ids: list[int]) -> None:
        """Remove one holder from each block; a block without holders goes to the free list.

        The last block goes first, so that the sequence's first block ends on top of the stack and
        the next sequence gets the same blocks in the same order. Raises ValueError, and changes
        nothing, if a block is free already.
        """
        ref_counts = self._ref_counts
        last_first = reversed(block_ids)  # an iterator: it remembers which entries are left
        for block_id in last_first:
            # -1 would be a valid index of a Python list, so the range is checked too.
            count = ref_counts[block_id] if 0 <= block_id < self.num_blocks else 0
            if count == 1:
                ref_counts[block_id] = 0
                self._free.append(block_id)
            elif count > 1:  # another sequence still reads this block, so it stays allocated
                ref_counts[block_id] = count - 1
            else:
                num_before = len(list(last_first))  # entries before this one, not reached yet
                # [4, 9, 6, 7] with 9 wrong: 7 and 6 were freed, 1 entry is left -> undo [6, 7]
                self._undo_free(block_ids[num_before + 1 :])
                raise ValueError(f"block {block_id} is freed twice: it has no holder")

    def ref_count(self, block_id: int) -> int:
        """How many holders a block has; 0 means free."""
        return self._ref_counts[block_id]

    def match_prefix(self, token_ids: list[int], salt: str | None = None) -> list[int]:
        """Blocks that already hold the start of `token_ids`, each with one more holder.

        This allocator keeps no contents, so there are none. A prefix cache returns some.
        """
        return []

    def publish(
        self,
        block_table: list[int],
        token_ids: list[int],
        num_computed_tokens: int,
        salt: str | None = None,
    ) -> None:
        """Learn after a forward which tokens a table's blocks now hold. This allocator ignores it.

        A prefix cache remembers it, and `match_prefix` then finds these blocks.
        """

    def check_integrity(self, block_tables: Iterable[list[int]]) -> None:
        """Assert that each reference count equals the number of tables that name the block.

        `block_tables` are the tables of all sequences that hold blocks. It visits every block, so
        tests and demos call it after every step, and an engine does not.
        """
        # Count every entry of every table, and compare with the counts that were kept.
        held = Counter(block_id for table in block_tables for block_id in table)
        for block_id, count in enumerate(self._ref_counts):
            tables = held.pop(block_id, 0)
            # More counts than tables: the block is never freed. Fewer: it is freed while in use.
            assert count == tables, f"block {block_id}: ref_count {count}, {tables} tables name it"
        # The loop popped every id of the pool. What is left is no block of the pool.
        assert not held, f"tables name blocks {sorted(held)}, the pool has {self.num_blocks}"
        listed = self._without_holder()
        free = set(listed)
        assert len(free) == len(listed), "a block is on the free list twice"
        zero = {block_id for block_id, count in enumerate(self._ref_counts) if count == 0}
        assert free == zero, f"free list and reference counts disagree on {sorted(free ^ zero)}"

    def _without_holder(self) -> list[int]:
        return self._free

    def _check_held(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            if not 0 <= block_id < self.num_blocks or self._ref_counts[block_id] == 0:
                raise ValueError(f"block {block_id} is free or unknown: it has no holder")

    def _undo_free(self, block_ids: list[int]) -> None:
        # `free` went from last to first. This goes from first to last, so the block whose count is
        # zero is always on top of the stack, and `pop` removes exactly this block.
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                self._free.pop()
            self._ref_counts[block_id] += 1


def draw_pool(owners: dict[str, tuple[list[int], int]], num_blocks: int, block_size: int) -> str:
    """The pool as a strip, one cell a block: `|AAAA|AA..|    |`.

    `owners` maps a one-letter name to (block_table, number of tokens). A dot is room for one more
    token. Example: {"A": ([2, 0], 6)}, 3, 4 -> "|AA..|    |AAAA|".
    """
    cells = [" " * block_size] * num_blocks
    for name, (table, num_tokens) in owners.items():
        for i, block_id in enumerate(table):
            # Logical block i holds tokens [i * block_size, (i + 1) * block_size) of the sequence:
            # 6 tokens, block_size 4 -> 4 in block 0, 2 in block 1, 0 in any further block.
            filled = min(max(num_tokens - i * block_size, 0), block_size)
            cells[block_id] = name * filled + "." * (block_size - filled)
    return "|" + "|".join(cells) + "|"


# --------------------------------------------------------------------------------------------------
POOL_TOKENS = 32
BLOCK_SIZE = 4


def demo():
    """Sequences arrive, grow and leave. D fits only because its blocks need not be adjacent."""
    num_blocks = POOL_TOKENS // BLOCK_SIZE
    allocator = BlockAllocator(num_blocks, BLOCK_SIZE)
    owners: dict[str, tuple[list[int], int]] = {}  # name -> (block table, number of tokens)

    def resize(name: str, num_tokens: int):
        table, _ = owners.get(name, ([], 0))
        # Compare sizes, the blocks it needs and the blocks it has. No modulo is needed.
        table += allocator.allocate(allocator.blocks_needed(num_tokens) - len(table))
        owners[name] = (table, num_tokens)

    def print_pool(event: str):
        allocator.check_integrity(table for table, _ in owners.values())
        print(f"{event:20} {draw_pool(owners, num_blocks, BLOCK_SIZE)}  {allocator.num_free} free")

    header = "".join(f"{block_id:<{BLOCK_SIZE + 1}}" for block_id in range(num_blocks))
    print(" " * 22 + header.rstrip())
    for name, num_tokens in (("A", 6), ("B", 10), ("C", 3)):
        resize(name, num_tokens)
        print_pool(f"{name} arrives: {num_tokens} tokens")
    resize("A", 9)
    print_pool("A grows by 3")
    allocator.free(owners.pop("B")[0])
    print_pool("B finishes")
    resize("D", 15)
    print_pool("D arrives: 15 tokens")
    table = owners["D"][0]
    adjacent = f"no {len(table)} adjacent blocks were free, and none were needed"
    print(f"D's block_table = {table}: {adjacent}")

    # B is gone: A has 9 tokens in 3 blocks, C 3 in 1, D 15 in 4.
    num_tokens = sum(num_tokens for _, num_tokens in owners.values())
    held = sum(len(blocks) for blocks, _ in owners.values())
    used = num_tokens / (held * BLOCK_SIZE)
    print(
        f"\n{num_tokens} tokens in {held} blocks of {BLOCK_SIZE}: {used:.0%} of the memory is used"
    )
    print(f"reserving 16 tokens for each of A, C and D would use {num_tokens / (3 * 16):.0%}")
    try:
        allocator.free(allocator.allocate(allocator.blocks_needed(5)))
        print("another sequence of 5 tokens: it would fit")
    except NoFreeBlocks as error:
        print(f"another sequence of 5 tokens: {error}")
    assert table != list(range(table[0], table[0] + len(table))), "D's blocks are adjacent"
    for blocks, _ in owners.values():
        allocator.free(blocks)
    allocator.check_integrity([])
    print(f"ok: every block was freed, {allocator.num_free} of {num_blocks} are free")


if __name__ == "__main__":
    demo()
