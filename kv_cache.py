"""One preallocated tensor; a block table turns a token's position into a slot.

The keys and values of all sequences lie in one pool, cut into blocks of `block_size` tokens. A
sequence's block table lists its block ids in the order of its tokens. (The page table of an
operating system does the same for the memory of a process.) For GPT-2 (124M) in 16 bits a token
takes 36,864 bytes and a block of 16 takes 589,824. A pool of 1 GB holds 27,126 tokens.

    position of a token      0 1 2 3   4 5 6 7   8 9          block_size 4
    logical block            0         1         2
    block_table            [ 5,        0,        7 ]
    slot = block_id * 4 + offset:  20 21 22 23   0 1 2 3   28 29

So a sequence can grow without being moved, and two sequences can share blocks. The pool's shape is
`(num_layers, num_blocks + 1, 2, H_kv, block_size, D)`: K and V of one block are neighbours in
memory, so a kernel reads a block as one stream. The extra block is scratch. Padded table entries
point to it, padded rows write to it, and no sequence owns it. A caller may choose where the pool's
memory comes from: `allocate` is `torch.empty` unless `llm.py` passes another function.

Kwon et al. 2023, "PagedAttention", SOSP, arXiv:2309.06180, section 4.2 and figure 6.
Run: python kv_cache.py
Try: BLOCK_SIZE = 1 above the demo (A's block table gets 10 entries), or swap two entries of A's
table after the write, with TABLE_WHEN_READ = [0, 5, 7]: the assert "A's keys came back in another
order" fails.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import Attend


class Row(NamedTuple):
    """What one sequence does in a step, in plain Python values."""

    token_ids: list[int]  # all its tokens, prompt and generated
    start: int  # the first position computed in this step; K and V before it are in the cache
    num_new_tokens: int  # positions [start, start + num_new_tokens) are computed in this step
    block_table: list[int]
    num_sample_rows: int  # how many of its last tokens get logits: 0 in the middle of a prompt


def to_device(x: Tensor, device: str | torch.device) -> Tensor:
    """The tensor on `device`: itself if it is there already, otherwise a copy."""
    if torch.device(device).type != "cuda" or x.is_cuda:
        return x.to(device)
    # A copy from pageable memory blocks until the GPU is idle; a copy from pinned memory does not.
    return x.pin_memory().to(device, non_blocking=True)


@dataclass
class Batch:
    """One step's inputs: the new tokens of all sequences laid end to end.

    N tokens, B sequences, M rows that get logits. `make_batch` builds the tensors in host memory,
    and the forward copies them to the model's device with `to`. (A step that is planned ahead takes
    its `input_ids` from the step before, and these are on the device already.)
    """

    input_ids: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64, each token's index in its own sequence
    slot_mapping: Tensor  # (N,) int64, where each token's K and V are written
    block_tables: Tensor  # (B, max_blocks) int32, the scratch block past a sequence's end
    query_start_locs: Tensor  # (B + 1,) int32: sequence i's tokens are rows [locs[i], locs[i + 1])
    context_lens: Tensor  # (B,) int32: tokens that its last query may read, itself included
    sample_rows: Tensor  # (M,) int64, rows of the N that get logits
    max_query_len: int  # Python ints, so that no kernel has to wait for a value from the device
    max_context_len: int

    def to(self, device: str | torch.device) -> "Batch":
        """The batch with its tensors on `device`: itself if they are there already."""
        if self.positions.device == torch.device(device):
            return self
        fields: dict[str, Any] = {
            name: to_device(value, device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Batch(**fields)


def make_batch(rows: list[Row], block_size: int, scratch_block: int) -> Batch:
    """Lay the new tokens of all rows end to end and turn their positions into slots.

    The tensors are in host memory.
    """
    starts = np.array([row.start for row in rows], dtype=np.int64)  # (B,)
    counts = np.array([row.num_new_tokens for row in rows], dtype=np.int64)
    context_lens = starts + counts
    # Rows [locs[i], locs[i + 1]) belong to sequence i: counts 6, 4, 1 -> locs 0, 6, 10, 11.
    locs = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(counts, out=locs[1:])
    num_tokens = int(locs[-1])

    new_ids = (row.token_ids[row.start : row.start + row.num_new_tokens] for row in rows)
    input_ids = np.fromiter(chain.from_iterable(new_ids), dtype=np.int64, count=num_tokens)
    # Row n of sequence i has position n - locs[i] + starts[i].
    positions = np.arange(num_tokens) - np.repeat(locs[:-1] - starts, counts)

    tables = pad_tables([row.block_table for row in rows], scratch_block)
    sequence = np.repeat(np.arange(len(rows)), counts)  # (N,), which sequence a row belongs to
    # int64 first: in a pool of a few GB a slot times the numbers of one token is above 2**31.
    block_ids = tables[sequence, positions // block_size].astype(np.int64)
    slots = block_ids * block_size + positions % block_size

    return Batch(
        input_ids=to_tensor(input_ids, np.int64),
        positions=to_tensor(positions, np.int64),
        slot_mapping=to_tensor(slots, np.int64),
        block_tables=to_tensor(tables, np.int32),
        query_start_locs=to_tensor(locs, np.int32),
        context_lens=to_tensor(context_lens, np.int32),
        sample_rows=to_tensor(last_rows(locs, [row.num_sample_rows for row in rows]), np.int64),
        max_query_len=int(counts.max()),
        max_context_len=int(context_lens.max()),
    )


def advance(
    batch: Batch,
    token_ids: list[int] | None,
    block_tables: list[list[int]],
    block_size: int,
    scratch_block: int,
) -> None:
    """Turn the batch of a decode step into that of the next one, in place.

    The same B sequences decode one more token each, `token_ids`; None keeps the old ones. Only a
    sequence that begins a new block gets a new table entry. The batch must be in host memory, and
    no copy to the device may still be reading it.
    """
    positions, tables = batch.positions.numpy(), batch.block_tables.numpy()
    positions += 1
    columns, offsets = positions // block_size, positions % block_size  # 33 -> column 2, offset 1
    if columns.max() == tables.shape[1]:
        tables = np.pad(tables, ((0, 0), (0, 4)), constant_values=scratch_block)  # rare: 4 more
        batch.block_tables = torch.from_numpy(tables)
    for i in np.flatnonzero(offsets == 0):  # position 32, block_size 16 -> entry 2
        tables[i, columns[i]] = block_tables[i][columns[i]]
    block_ids = tables[np.arange(len(tables)), columns].astype(np.int64)
    batch.slot_mapping.numpy()[:] = block_ids * block_size + offsets
    batch.context_lens.numpy()[:] += 1
    batch.max_context_len += 1
    if token_ids is not None:
        batch.input_ids.numpy()[:] = token_ids


def pad_tables(block_tables: list[list[int]], scratch_block: int) -> np.ndarray:
    """All tables as one (B, max_blocks) int32; short ones are filled up with the scratch block."""
    max_blocks = max(map(len, block_tables))
    padded = np.full((len(block_tables), max_blocks), scratch_block, dtype=np.int32)
    for padded_row, table in zip(padded, block_tables, strict=True):
        padded_row[: len(table)] = table
    return padded


def last_rows(locs: np.ndarray, counts: list[int]) -> np.ndarray:
    """The last counts[i] rows of each sequence i, whose rows are [locs[i], locs[i + 1]).

    Example: locs [0, 6, 10, 11], counts [1, 0, 1] -> [5, 10].
    """
    num_rows = np.array(counts, dtype=np.int64)
    # Sequence i's part of the result ends before index ends[i], and its rows end before row
    # locs[i + 1]. So the difference of the two turns an index of the result into a row.
    ends = np.cumsum(num_rows)
    return np.arange(num_rows.sum()) + np.repeat(locs[1:] - ends, num_rows)


def to_tensor(array: np.ndarray, dtype: type) -> Tensor:
    """A tensor that shares the array's memory, or a copy if the array has another dtype."""
    return torch.from_numpy(array.astype(dtype, copy=False))


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Put each token's k and v (N, H_kv, D) into its slot of one layer's caches, in place.

    The caches are (num_blocks + 1, H_kv, block_size, D), `slot_mapping` is (N,) int64.
    """
    block_size = k_cache.shape[2]
    # slot 23, block_size 4 -> block 5, offset 3
    block_ids, offsets = slot_mapping // block_size, slot_mapping % block_size
    k_cache[block_ids, :, offsets] = k.to(k_cache.dtype)
    v_cache[block_ids, :, offsets] = v.to(v_cache.dtype)


class KVCache:
    """The pool and the views of it that a layer reads and writes. It knows no sequences.

    The allocator decides which block belongs to which sequence (`block_allocator.py`).
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        allocate: Callable[..., Tensor] = torch.empty,
    ):
        """`allocate(shape, dtype=, device=)` returns the pool's memory, which is then set to 0."""
        self.block_size = block_size
        self.scratch_block = num_blocks  # ids [0, num_blocks) are the allocator's
        shape = (num_layers, num_blocks + 1, 2, num_kv_heads, block_size, head_dim)
        # The first write to memory makes the operating system provide it. Writing zeros now moves
        # that cost from the first requests to the start.
        self.pool = allocate(shape, dtype=dtype, device=device).zero_()
        # Making a view takes microseconds and every step needs all layers' views: make them once.
        self._layers = [(layer[:, 0], layer[:, 1]) for layer in self.pool]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """One layer's K and V: two views (num_blocks + 1, H_kv, block_size, D) of the pool."""
        return self._layers[layer]

    def attend(
        self,
        batch: Batch,
        paged_attention: Callable[..., Tensor],
        write_kv: Callable[..., None] = write_kv,
    ) -> Attend:
        """The function for the model's socket in one step: write new K and V, then read the tables.

        `paged_attention` has the signature of the function in `paged_attention.py`, `write_kv` that
        of the one in this file. A backend provides both.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k_cache, v_cache = self.layer(layer)
            # Write first: the newest token attends to itself too.
            write_kv(k, v, k_cache, v_cache, batch.slot_mapping)
            return paged_attention(
                q,
                k_cache,
                v_cache,
                batch.block_tables,
                batch.query_start_locs,
                batch.context_lens,
                scale=q.shape[-1] ** -0.5,
                max_query_len=batch.max_query_len,
                max_context_len=batch.max_context_len,
            )

        return attend

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks in all layers, for (source, destination) pairs of block ids.

        It is one call for all pairs, and the host does not wait for a GPU. All sources are read
        before any destination is written.
        """
        if copies:
            pairs = to_device(torch.tensor(copies), self.pool.device)  # (number of copies, 2)
            sources, destinations = pairs.unbind(1)
            # A tensor as an index makes a copy of the sources, which is then written.
            self.pool[:, destinations] = self.pool[:, sources]

    def gather(self, layer: int, block_table: list[int], num_tokens: int) -> tuple[Tensor, Tensor]:
        """A sequence's K and V in reading order, (T, H_kv, D) each: copies for demos and tests."""
        # (blocks of the table, H_kv, block_size, D) -> (tokens, H_kv, D)
        k, v = (cache[block_table].transpose(1, 2).flatten(0, 1) for cache in self.layer(layer))
        return k[:num_tokens], v[:num_tokens]


# --------------------------------------------------------------------------------------------------
BLOCK_SIZE = 4
TABLE_WHEN_READ = None  # None: read A through the table that it was written through


def demo():
    """Write two sequences into one pool, print the slot of each token, and read them back."""
    torch.manual_seed(0)
    num_blocks = 32 // BLOCK_SIZE
    cache = KVCache(2, num_blocks, BLOCK_SIZE, num_kv_heads=2, head_dim=3)  # 2 layers
    lengths = {"A": 10, "B": 6}
    num_blocks_of = {name: -(-length // BLOCK_SIZE) for name, length in lengths.items()}
    # In a real engine the allocator hands out the ids.
    ids = [5, 0, 7, 2, 3] if BLOCK_SIZE == 4 else torch.randperm(num_blocks).tolist()
    tables = {"A": ids[: num_blocks_of["A"]], "B": ids[num_blocks_of["A"] :][: num_blocks_of["B"]]}
    rows = [Row(list(range(n)), 0, n, tables[name], 1) for name, n in lengths.items()]
    batch = make_batch(rows, BLOCK_SIZE, cache.scratch_block)

    print(f"A's block_table = {tables['A']}, B's = {tables['B']}, block_size {BLOCK_SIZE}\n")
    names = [name for name, n in lengths.items() for _ in range(n)]
    columns = {
        "sequence": names,
        "position": batch.positions.tolist(),
        "block": (batch.slot_mapping // BLOCK_SIZE).tolist(),
        "offset": (batch.slot_mapping % BLOCK_SIZE).tolist(),
        "slot": batch.slot_mapping.tolist(),
    }
    for title, values in columns.items():
        print(f"{title:9}" + "".join(f"{value:>4}" for value in values))
    print(f"\nrows that get logits: {batch.sample_rows.tolist()}, the last token of each sequence")

    k, v = torch.randn(16, 2, 3), torch.randn(16, 2, 3)
    write_kv(k, v, *cache.layer(1), batch.slot_mapping)
    a_k, a_v = cache.gather(1, TABLE_WHEN_READ or tables["A"], num_tokens=10)
    b_k, b_v = cache.gather(1, tables["B"], num_tokens=6)
    assert torch.equal(a_k, k[:10]) and torch.equal(a_v, v[:10]), (
        "A's keys came back in another order"
    )
    assert torch.equal(b_k, k[10:]) and torch.equal(b_v, v[10:])
    assert cache.layer(0)[0].abs().sum() == 0, "layer 0 was written too"

    block_bytes = cache.pool[:, 0].nbytes
    num_held = sum(num_blocks_of.values())
    slab_bytes = 16 * block_bytes // BLOCK_SIZE  # 16 tokens of one sequence, reserved at once
    print(f"A and B hold {num_held} blocks of {block_bytes} bytes: {num_held * block_bytes} bytes")
    print(f"two contiguous slabs of 16 tokens would hold {2 * slab_bytes} bytes")
    print("ok: every token came back from its slot, in order")


if __name__ == "__main__":
    demo()
