"""One preallocated tensor; a block table turns a token's position into a slot.

The keys and values of all sequences live in one pool, cut into blocks of `block_size` tokens. Which
blocks a sequence owns is written in its block table, a list of block ids in reading order, exactly
as an operating system's table maps a process's memory to whatever frames were free:

    position of a token      0 1 2 3   4 5 6 7   8 9          block_size 4
    logical block            0         1         2
    block_table            [ 5,        0,        7 ]
    slot = block_id * 4 + offset:  20 21 22 23   0 1 2 3   28 29

So a sequence may lie anywhere, grow without moving, and share blocks. For the 124M GPT-2 in 16 bits
a token is 36,864 bytes and a block of 16 is 589,824: 1 GB holds 27,126 tokens, whoever they belong
to. The pool is `(num_layers, num_blocks + 1, 2, H_kv, block_size, D)`: a layer's K and V of one
block lie side by side, so that reading a block is one stream of memory. The extra block is scratch:
padded entries point to it and padded rows write to it, no sequence ever owns it. What a production
engine does beyond this: 8-bit keys and values, pools for several kinds of layers.

Kwon et al. 2023, "PagedAttention", SOSP, arXiv:2309.06180, section 4.2 and figure 6.
Run: python kv_cache.py
Try: block_size=1 in the demo (the table is as long as the text), or swap two entries of a table
after writing and see which positions come back wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import Attend


class Row(NamedTuple):
    """What one sequence does in a step, in plain values."""

    token_ids: list[int]  # all its tokens, prompt and generated
    start: int  # the first position computed now; all before it are in the cache
    num_new_tokens: int  # positions [start, start + num_new_tokens) are computed now
    block_table: list[int]
    num_sample_rows: int  # how many of its last rows want logits: 0 in the middle of a prompt


def to_device(x: Tensor, device: str | torch.device) -> Tensor:
    """The same tensor on a device; itself where it lies there. A GPU is not waited for."""
    if torch.device(device).type != "cuda" or x.is_cuda:
        return x.to(device)
    # From memory that may be swapped out, PyTorch would wait until the GPU has done all before.
    return x.pin_memory().to(device, non_blocking=True)


@dataclass
class Batch:
    """One step's inputs: the new tokens of all sequences laid end to end, and where they live.

    N tokens, B sequences, M rows that want logits. All tensors are on one device: in host memory
    when an engine has built it, and it is the forward that takes it to where the model is. (Token
    ids that a step before has drawn may be there already.)
    """

    input_ids: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64, each token's index in its own sequence
    slot_mapping: Tensor  # (N,) int64, where each token's K and V are written
    block_tables: Tensor  # (B, max_blocks) int32, the scratch block past a sequence's end
    query_start_locs: Tensor  # (B + 1,) int32: sequence i's tokens are rows [locs[i], locs[i + 1])
    context_lens: Tensor  # (B,) int32: tokens that its last query may read, itself included
    sample_rows: Tensor  # (M,) int64, rows of the N whose logits are wanted
    max_query_len: int  # known to the host, so that no kernel has to ask the device
    max_context_len: int

    def to(self, device: str | torch.device) -> "Batch":
        """The same step with its tensors on a device; itself where they lie there already."""
        if self.positions.device == torch.device(device):
            return self
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **{name: to_device(x, device) for name, x in tensors.items()})


def make_batch(rows: list[Row], block_size: int, scratch_block: int) -> Batch:
    """Lay the new tokens of all rows end to end and translate their positions into slots.

    The tensors are in host memory: `Batch.to` takes them further.
    """
    starts = np.array([row.start for row in rows], dtype=np.int64)
    counts = np.array([row.num_new_tokens for row in rows], dtype=np.int64)
    samples = np.array([row.num_sample_rows for row in rows], dtype=np.int64)
    locs = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(counts, out=locs[1:])
    num_tokens = int(locs[-1])
    new_ids = (row.token_ids[row.start : row.start + row.num_new_tokens] for row in rows)
    input_ids = np.fromiter(chain.from_iterable(new_ids), dtype=np.int64, count=num_tokens)
    # Row n belongs to sequence[n]; its position is its distance from the sequence's first new row.
    sequence = np.repeat(np.arange(len(rows)), counts)
    positions = np.arange(num_tokens) - np.repeat(locs[:-1] - starts, counts)

    max_blocks = max(len(row.block_table) for row in rows)
    tables = np.full((len(rows), max_blocks), scratch_block, dtype=np.int32)
    for table, row in zip(tables, rows, strict=True):
        table[: len(row.block_table)] = row.block_table
    # int64 before the product: a slot times a row's size passes 2**31 in a pool of a few GB.
    block_ids = tables[sequence, positions // block_size].astype(np.int64)
    slots = block_ids * block_size + positions % block_size

    # The last `samples[i]` of a sequence's rows: they end where the next sequence's rows begin.
    ends = np.cumsum(samples)
    sample_rows = np.arange(samples.sum()) + np.repeat(locs[1:] - ends, samples)

    def tensor(array: np.ndarray, dtype=np.int64) -> Tensor:
        return torch.from_numpy(array.astype(dtype, copy=False))

    return Batch(
        input_ids=tensor(input_ids),
        positions=tensor(positions),
        slot_mapping=tensor(slots),
        block_tables=tensor(tables, np.int32),
        query_start_locs=tensor(locs, np.int32),
        context_lens=tensor(starts + counts, np.int32),
        sample_rows=tensor(sample_rows),
        max_query_len=int(counts.max()),
        max_context_len=int((starts + counts).max()),
    )


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Put each token's k and v (N, H_kv, D) into its slot of one layer's caches, in place."""
    block_size = k_cache.shape[2]
    block_ids, offsets = slot_mapping // block_size, slot_mapping % block_size
    k_cache[block_ids, :, offsets] = k.to(k_cache.dtype)
    v_cache[block_ids, :, offsets] = v.to(v_cache.dtype)


class KVCache:
    """The pool, its views, and the plug for the model's socket. It owns bytes, never block ids."""

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
        """`allocate(shape, dtype=, device=)` gives the pool's memory; what it holds is erased."""
        self.block_size = block_size
        self.scratch_block = num_blocks  # the extra one
        shape = (num_layers, num_blocks + 1, 2, num_kv_heads, block_size, head_dim)
        self.pool = allocate(shape, dtype=dtype, device=device).zero_()  # and so all of it is there
        self._layers = [(layer[:, 0], layer[:, 1]) for layer in self.pool]  # a step asks for each

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """One layer's K and V: two views (num_blocks + 1, H_kv, block_size, D) of the pool."""
        return self._layers[layer]

    def attend(
        self,
        batch: Batch,
        paged_attention: Callable[..., Tensor],
        write_kv: Callable[..., None] = write_kv,
    ) -> Attend:
        """The plug for one step: write new K and V to their slots, read through the tables.

        `paged_attention` is any function of the common signature (see `paged_attention.py`), and
        `write_kv` any of this file's: a kernel for one kind of device brings both.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k_cache, v_cache = self.layer(layer)
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
        """Copy whole blocks, all layers at once, for (source, destination) pairs of block ids."""
        if copies:
            sources, destinations = (list(ids) for ids in zip(*copies, strict=True))
            self.pool[:, destinations] = self.pool[:, sources]

    def gather(self, layer: int, block_table: list[int], num_tokens: int) -> tuple[Tensor, Tensor]:
        """A sequence's K and V in reading order, (T, H_kv, D) each: copies, to look at and test."""
        k, v = (cache[block_table].transpose(1, 2).flatten(0, 1) for cache in self.layer(layer))
        return k[:num_tokens], v[:num_tokens]


# --------------------------------------------------------------------------------------------------
def demo():
    """Two sequences in one pool: where each token lies, and that it comes back in order."""
    torch.manual_seed(0)
    cache = KVCache(num_layers=2, num_blocks=8, block_size=4, num_kv_heads=2, head_dim=3)
    tables = {"A": [5, 0, 7], "B": [2, 3]}
    lengths = {"A": 10, "B": 6}
    rows = [Row(list(range(n)), 0, n, tables[name], 1) for name, n in lengths.items()]
    batch = make_batch(rows, cache.block_size, cache.scratch_block)

    print(f"A's block_table = {tables['A']}, B's = {tables['B']}, block_size 4\n")
    names = [name for name, n in lengths.items() for _ in range(n)]
    facts = {
        "sequence": names,
        "position": batch.positions.tolist(),
        "block": [tables[n][p // 4] for n, p in zip(names, batch.positions.tolist(), strict=True)],
        "offset": (batch.positions % 4).tolist(),
        "slot": batch.slot_mapping.tolist(),
    }
    for title, values in facts.items():
        print(f"{title:9}" + "".join(f"{value:>4}" for value in values))
    print(f"\nrows that want logits: {batch.sample_rows.tolist()}, the last token of each sequence")

    k, v = torch.randn(16, 2, 3), torch.randn(16, 2, 3)
    write_kv(k, v, *cache.layer(1), batch.slot_mapping)
    for name, rows_of in (("A", slice(0, 10)), ("B", slice(10, 16))):
        got_k, got_v = cache.gather(1, tables[name], lengths[name])
        assert torch.equal(got_k, k[rows_of]) and torch.equal(got_v, v[rows_of])
    assert cache.layer(0)[0].abs().sum() == 0, "layer 0 was not written"

    block_bytes = cache.pool[:, 0].nbytes
    slab = 16 * block_bytes // 4  # one sequence's slab of 16 tokens
    print(f"one block holds {block_bytes} bytes in all layers; A and B hold 5: {5 * block_bytes}")
    print(f"two slabs of 16 tokens would hold {2 * slab} bytes, for the same 16 tokens")
    print("ok: every token came back from its slot, in order")


if __name__ == "__main__":
    demo()
