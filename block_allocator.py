"""Memory in equal blocks cannot fragment: a free list and reference counts are the whole allocator.

A contiguous cache must reserve a sequence's longest possible length before its first token: the
124M GPT-2 needs 37.7 MB for 1,024 tokens, although a chat turn of 60 tokens fills 6% of that.
Measured servers of that kind held tokens in 20 to 38% of their KV memory. Cut memory into blocks of
`block_size` tokens instead, hand them out one at a time, and all that is wasted is the unfilled
tail of each sequence's last block.

    pool      |AAAA|BBBB|AA..|BBB.|    |CCCC|    |C...|      8 blocks of 4 tokens
    A's block_table = [0, 2]     B's = [1, 3]     C's = [5, 7]
    free list = [4, 6]           any free block is as good as any other: no holes, no fitting

A block may have several holders (sequences that share a prefix, beams that share a past), so each
has a reference count and goes back to the free list when the last holder lets go. The allocator
knows no sequence and no tensor; it deals in integers. What a production engine does beyond this:
keeps freed blocks with their contents for the next equal prompt, and evicts the least recently
used.

Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP, arXiv:2309.06180, section 4.2.
Run: python block_allocator.py
Try: block_size = 1 in the demo (no waste at all; what does it cost?), or take blocks from the other
end of the free list, `self._free[:n]`, and watch the holes move.
"""

from collections import Counter
from collections.abc import Iterable


class NoFreeBlocks(Exception):
    """The pool cannot hand out that many blocks now; somebody has to wait or be preempted."""


class BlockAllocator:
    """Hands out the ids of `num_blocks` equal blocks, each of `block_size` tokens.

    Invariant: a block is on the free list exactly when its reference count is zero.
    """

    def __init__(self, num_blocks: int, block_size: int = 16):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"num_blocks is {num_blocks}, block_size is {block_size}: both must be at least 1"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack, next block on top (at the end). The most recently freed block is handed out
        # first: its memory is the likeliest to be in a cache still.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._ref_counts = [0] * num_blocks

    def blocks_needed(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens: the ceiling of num_tokens / block_size."""
        return -(-num_tokens // self.block_size)  # 17 tokens, block_size 16 -> 2 blocks

    @property
    def num_free(self) -> int:
        """How many blocks `allocate` could hand out now."""
        return len(self._free)

    @property
    def num_evicted(self) -> int:
        """Cached blocks thrown out so far to make room; an allocator without a memory has none."""
        return 0

    def allocate(self, n: int) -> list[int]:
        """Take `n` blocks, each with reference count 1. All or nothing: else NoFreeBlocks."""
        if n > len(self._free):
            raise NoFreeBlocks(f"{n} blocks asked for, {len(self._free)} of {self.num_blocks} free")
        split = len(self._free) - n
        block_ids = self._free[split:]
        del self._free[split:]
        block_ids.reverse()  # in the order in which popping one at a time would give them
        ref_counts = self._ref_counts
        for block_id in block_ids:
            ref_counts[block_id] = 1
        return block_ids

    def fork(self, block_ids: list[int]) -> None:
        """Add one holder to each block. Raises ValueError if one of them is free."""
        self._check_held(block_ids)
        for block_id in block_ids:
            self._ref_counts[block_id] += 1

    def free(self, block_ids: list[int]) -> None:
        """Remove one holder from each block, last block first; the last holder's leave frees it.

        Last first puts a sequence's first block on top of the stack, so the next sequence
        gets the same blocks in the same order. Freeing a free block raises ValueError, and
        nothing is changed.
        """
        ref_counts, free, num_blocks = self._ref_counts, self._free, self.num_blocks
        last_first = reversed(block_ids)
        for block_id in last_first:
            count = ref_counts[block_id] if 0 <= block_id < num_blocks else 0
            if count == 1:
                ref_counts[block_id] = 0
                free.append(block_id)
            elif count > 1:
                ref_counts[block_id] = count - 1
            else:
                not_yet = len(list(last_first)) + 1
                self._take_back(block_ids[not_yet:])
                raise ValueError(f"block {block_id} is freed twice: nobody holds it")

    def ref_count(self, block_id: int) -> int:
        """How many holders a block has; 0 means free."""
        return self._ref_counts[block_id]

    def match_prefix(self, token_ids: list[int], salt: object = None) -> list[int]:
        """Blocks that already hold the start of `token_ids`, with references taken.

        This allocator remembers nothing, so: none. An allocator with a memory answers otherwise.
        """
        return []

    def publish(
        self, block_table: list[int], token_ids: list[int], num_computed_tokens: int
    ) -> None:
        """Told after each forward which tokens a table's blocks now hold. Here: forgotten."""

    def check_integrity(self, block_tables: Iterable[list[int]]) -> None:
        """Assert that the books are right: each count equals the tables that name the block.

        `block_tables` are the tables of all sequences that hold blocks. Costs a walk over all
        blocks: for tests and demos, after every step.
        """
        held = Counter(block_id for table in block_tables for block_id in table)
        for block_id, count in enumerate(self._ref_counts):
            tables = held.pop(block_id, 0)
            assert count == tables, f"block {block_id}: ref_count {count}, {tables} tables name it"
        assert not held, f"tables name blocks {sorted(held)}, the pool has {self.num_blocks}"
        free = set(self._free)
        assert len(free) == len(self._free), "a block is on the free list twice"
        zero = {block_id for block_id, count in enumerate(self._ref_counts) if count == 0}
        assert free == zero, f"free list and reference counts disagree on {sorted(free ^ zero)}"

    def _check_held(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            if not 0 <= block_id < self.num_blocks or self._ref_counts[block_id] == 0:
                raise ValueError(f"block {block_id} is not held by anyone")

    def _take_back(self, block_ids: list[int]) -> None:
        """Undo what `free` did to these blocks, in the reverse order."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                self._free.pop()  # `free` pushed it last
            self._ref_counts[block_id] += 1


def draw_pool(owners: dict[str, tuple[list[int], int]], num_blocks: int, block_size: int) -> str:
    """The pool as a strip, one cell a block: `|AAAA|AA..|    |`.

    `owners` maps a one-letter name to (block_table, number of tokens); `.` is an unfilled place.
    Example: {"A": ([2, 0], 6)}, 3, 4 -> "|AA..|    |AAAA|".
    """
    cells = [" " * block_size] * num_blocks
    for name, (table, num_tokens) in owners.items():
        for i, block_id in enumerate(table):
            filled = min(max(num_tokens - i * block_size, 0), block_size)
            cells[block_id] = name * filled + "." * (block_size - filled)
    return "|" + "|".join(cells) + "|"


# --------------------------------------------------------------------------------------------------
def demo():
    """Sequences come, grow and leave; the last fits only because blocks need not be adjacent."""
    allocator = BlockAllocator(num_blocks=8, block_size=4)
    owners: dict[str, tuple[list[int], int]] = {}

    def resize(name: str, num_tokens: int):
        table, _ = owners.get(name, ([], 0))
        # A comparison of sizes, never a modulo: how many blocks more than those it has?
        table += allocator.allocate(allocator.blocks_needed(num_tokens) - len(table))
        owners[name] = (table, num_tokens)

    def show(event: str):
        allocator.check_integrity(table for table, _ in owners.values())
        print(f"{event:20} {draw_pool(owners, 8, 4)}  {allocator.num_free} free")

    print(" " * 22 + "    ".join(str(block_id) for block_id in range(8)))
    for name, num_tokens in (("A", 6), ("B", 10), ("C", 3)):
        resize(name, num_tokens)
        show(f"{name} arrives: {num_tokens} tokens")
    resize("A", 9)
    show("A grows by 3")
    allocator.free(owners.pop("B")[0])
    show("B finishes")
    resize("D", 15)
    show("D arrives: 15 tokens")
    table = owners["D"][0]
    print(f"D's block_table = {table}: no 4 adjacent blocks were free, and none were needed")

    tokens = sum(num_tokens for _, num_tokens in owners.values())
    held = sum(len(blocks) for blocks, _ in owners.values())
    print(
        f"\n{tokens} tokens in {held} blocks of 4: {tokens / (held * 4):.0%} of the memory is used"
    )
    print(f"reserving 16 tokens for each of A, C and D would use {tokens / (3 * 16):.0%}")
    try:
        allocator.allocate(2)
    except NoFreeBlocks as error:
        print(f"one more of 5 tokens: {error}")
    assert table == [2, 3, 4, 7]
    for blocks, _ in owners.values():
        allocator.free(blocks)
    allocator.check_integrity([])
    print("ok: everything was given back, 8 of 8 blocks free")


if __name__ == "__main__":
    demo()
