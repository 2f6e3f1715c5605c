"""Random sequences in a poisoned pool of int8, and what attention over the rounded ones must give.

    Int8World([6, 1], [6, 9]).check(paged_attention_cpu)

It is a world of tests/worlds.py. Its keys and values are rounded to the pool's numbers, and the
oracle attends densely over the rounded ones. Where no sequence may read, the scales are NaN.
"""

from dataclasses import dataclass, fields

import torch
from worlds import World

from speedups.quantized_kv import QuantizedKVCache, dequantize, quantize, scales_of

POISON = -1  # the bytes 0xff: an integer -1, and a bfloat16 that is NaN


def in_int8(world: World) -> "Int8World":
    """The same world over a pool of int8."""
    return Int8World(**{f.name: getattr(world, f.name) for f in fields(world) if f.init})


@dataclass
class Int8World(World):
    """A world whose K and V are kept in eight bits; `dtype` is that of q and of the result."""

    def __post_init__(self):
        super().__post_init__()
        self.use_pool_of(self.scratch)
        # What a reader finds: exact in float32, and the oracle computes in 64 bits.
        self.kv = [dequantize(*quantize(kv)) for kv in self.kv]
        self.write()

    def use_pool_of(self, num_blocks: int, num_layers: int = 2) -> None:
        """Take a poisoned pool of so many blocks."""
        cache = QuantizedKVCache(
            num_layers,
            num_blocks,
            self.block_size,
            self.num_kv_heads,
            self.head_dim,
            device=self.device,
        )
        self.pool = cache.pool.fill_(POISON)
        self.k_cache, self.v_cache = cache.layer(num_layers - 1)

    def write(self) -> None:
        """Put `kv` where the tables say: values and scales."""
        if self.k_cache.dtype != torch.int8:  # the plain world writes to its own pool first
            return
        for pair, table, start in zip(self.kv, self.tables, self.starts(), strict=True):
            position = torch.arange(min(start, pair.shape[1]), pair.shape[1], device=self.device)
            block_ids = torch.tensor(table, dtype=torch.long, device=self.device)
            block_ids, offsets = block_ids[position // self.block_size], position % self.block_size
            for rows, cache in zip(pair, (self.k_cache, self.v_cache), strict=True):
                values, scales = quantize(rows[position])
                cache[block_ids, :, offsets] = values
                scales_of(cache)[block_ids, :, offsets] = scales

    def bound(self, of_result: int = 1, of_weights: int = 0) -> float | torch.Tensor:
        """1e-6 in 32 bits; else as in any world."""
        return 1e-6 if self.dtype == torch.float32 else super().bound(of_result, of_weights)
