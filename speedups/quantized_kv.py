"""A pool in eight bits: twice the sequences in the same memory, and half the bytes to read.

A decode step reads the keys and values of all its sequences, so their bytes decide how many
sequences fit and how long a step takes. This pool keeps each number of K and V as an integer from
-127 to 127. Each (token, head) of K and of V has a scale, a bfloat16, that turns them back:

    k = [ 0.31, -1.27,  0.02, .. ]    largest |k| 1.27, scale = 1.27 / 127 = 0.01
        [   31,  -127,     2, .. ]    round(k / scale), 8 bits each

    a block, one head:  | block_size x D integers | block_size scales |     then the next head

A token of a head of 64 takes 66 bytes; in bfloat16 it takes 128. So a GB holds 1.94 times as many
tokens. The scales lie behind the integers of their own head, inside the block. The pool remains one
tensor whose second index is the block id, so a copied, shared or forked block brings its scales
along, and neither the allocator nor the scheduler knows that there are any. Nor does the signature
of the kernels change: the views of K and V tell where the scales are.

A token is rounded once, when it is written, and by itself. So its bytes depend on its own numbers,
not on the batch or on how a prompt was cut, and prefix hits, forks and preemption change no token.
The kernels multiply integers as they are: a score is multiplied by its key's scale once, a weight
by its value's scale once, and nothing is ever written in 16 or 32 bits.

What it costs: a number is off by at most half a step, about 1/254 of the largest in its row. Three
rules keep that true. The scale is rounded first, and the numbers are divided by the rounded one. A
bfloat16 has the range of a float32, so no model's scale overflows (65,504 in float16), and its 8
digits are at most one part in 256 low: 127 becomes 127.498, which rounds to 127 and needs no clip.
A row of zeros, or of numbers below 1e-36, has the scale 0. A row with an infinity or a NaN has the
scale NaN: it comes back as NaN, so that an overflow of the model shows. What it costs a text is in
docs/results.md.

fp8 would take as many bytes. A number of its format e4m3 has 4 binary digits, so it is off by up to
1/16 of itself. It would be a second format with larger errors, so it is not offered.

Checked by tests/speedups/test_quantized_kv.py: against dense attention over the rounded keys and
values. Hooper et al. 2024, "KVQuant", arXiv:2401.18079 (fewer bits, and scales along channels).
Run: python -m speedups.quantized_kv
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.backends import BACKENDS, INTERPRETED, Kernels
from kv_cache import KVCache, write_kv
from paged_attention import paged_attention

SMALLEST_SCALE = 2.0**-126  # below it a bfloat16 has fewer than 8 digits


# ---- a row of D numbers --------------------------------------------------------------------------
def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., D) as int8 (..., D) and a bfloat16 scale for each (...,).

    It computes in float32, whatever the rows are, so that every backend stores the same bits.
    """
    rows = rows.float()
    largest = rows.abs().amax(-1)  # NaN where a row has a NaN
    scales = (largest * (1 / 127)).bfloat16()
    scales = scales.masked_fill(scales < SMALLEST_SCALE, 0)
    scales = scales.masked_fill(~largest.isfinite(), torch.nan)
    inverses = torch.where(scales > 0, 1 / scales.float(), 0)  # 0 for NaN too
    # `round` takes the even one of two equally near integers. NaN, from 0 * infinity, becomes 0.
    values = (rows * inverses[..., None]).round().nan_to_num(0).to(torch.int8)
    return values, scales


def dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """int8 (..., D) times their scales (...,): exact in float32, 7 digits times 8."""
    return values.to(dtype) * scales.to(dtype)[..., None]


# ---- the pool ------------------------------------------------------------------------------------
def values_bytes(block_size: int, head_dim: int) -> int:
    """Bytes of one head's integers in a block; even, since the scales behind them have 2 bytes."""
    return block_size * head_dim + block_size * head_dim % 2


def head_bytes(block_size: int, head_dim: int) -> int:
    """Bytes of one head's K, or V, in a block: 16 tokens of 64 numbers -> 1,024 + 32."""
    return values_bytes(block_size, head_dim) + 2 * block_size


def scales_of(cache: Tensor) -> Tensor:
    """The scales (num_blocks + 1, H_kv, block_size) behind the values of a view of the pool.

    `cache` is one layer's K or V, as `QuantizedKVCache.layer` returns it. Nothing is copied.
    """
    num_blocks, H_kv, block_size, D = cache.shape
    # The pool again, as numbers of 16 bits: all strides in bytes are even.
    pool = torch.empty(0, dtype=torch.bfloat16, device=cache.device).set_(cache.untyped_storage())
    begin = cache.storage_offset() + values_bytes(block_size, D)
    strides = (cache.stride(0) // 2, cache.stride(1) // 2, 1)
    return pool.as_strided((num_blocks, H_kv, block_size), strides, begin // 2)


class QuantizedKVCache(KVCache):
    """A pool of int8 values, each head's scales behind them."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        device: str | torch.device = "cpu",
        allocate: Callable[..., Tensor] = torch.empty,
    ):
        """The arguments are those of `KVCache`, without a dtype."""
        self.block_size = block_size
        self.scratch_block = num_blocks
        each = head_bytes(block_size, head_dim)
        shape = (num_layers, num_blocks + 1, 2, num_kv_heads, each)
        self.pool = allocate(shape, dtype=torch.int8, device=device).zero_()
        # The values, without the scales. Kernels find these by the stride from head to head, and
        # `view` would choose another one where there is only one head.
        values = self.pool.as_strided(
            (num_layers, num_blocks + 1, 2, num_kv_heads, block_size, head_dim),
            (*self.pool.stride()[:4], head_dim, 1),
        )
        self._layers = [(layer[:, 0], layer[:, 1]) for layer in values]

    def gather(self, layer: int, block_table: list[int], num_tokens: int) -> tuple[Tensor, Tensor]:
        """A sequence's K and V in reading order, (T, H_kv, D) each, in float32."""
        k, v = (
            dequantize(cache[block_table], scales_of(cache)[block_table])
            .transpose(1, 2)
            .flatten(0, 1)[:num_tokens]
            for cache in self.layer(layer)
        )
        return k, v


# ---- the oracle's two functions ------------------------------------------------------------------
def write_kv_int8(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """`write_kv` of kv_cache.py for views of this pool: values and scales to the same slots."""
    (k_values, k_scales), (v_values, v_scales) = quantize(k), quantize(v)
    write_kv(k_values, v_values, k_cache, v_cache, slot_mapping)
    scales = (scales_of(cache)[..., None] for cache in (k_cache, v_cache))
    write_kv(k_scales[..., None], v_scales[..., None], *scales, slot_mapping)


def paged_attention_int8(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, *rest, **options
) -> Tensor:
    """`paged_attention` of paged_attention.py over the blocks of the tables, dequantised first."""
    # Blocks [7, 2] of the pool become blocks [1, 0] of a small one.
    block_ids, tables = block_tables.long().unique(return_inverse=True)
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (
        dequantize(cache[block_ids], scales_of(cache)[block_ids], dtype)
        for cache in (k_cache, v_cache)
    )
    return paged_attention(q, k, v, tables.int(), *rest, **options)


def int8_kernels(backend: str, dtype: torch.dtype) -> Kernels:
    """The two functions of a backend for this pool and q in `dtype`; ValueError if it has none."""
    if backend == "triton-simple":
        raise ValueError("backend 'triton-simple' reads no pool in int8: choose triton")
    # Triton (3.7) fails to compile a product in 64 bits of numbers that were loaded as int8.
    if backend == "triton" and dtype == torch.float64 and not INTERPRETED:
        raise ValueError("backend 'triton' reads no pool in int8 in float64: choose float32")
    if backend == "torch":
        return Kernels(paged_attention_int8, write_kv_int8)
    return BACKENDS[backend].load()


# --------------------------------------------------------------------------------------------------
def demo():
    """A row and its integers; then attention over 40 tokens, and what the rounding moved."""
    torch.manual_seed(0)
    row = torch.tensor([0.31, -1.27, 0.02, 0.604])
    values, scale = quantize(row)
    print(f"k        {[round(x, 4) for x in row.tolist()]}")
    print(f"integers {values.tolist()}, scale {scale.item():.5f}")
    print(f"read as  {[round(x, 4) for x in dequantize(values, scale).tolist()]}\n")

    H = 2
    D = 64
    T = 40
    plain = KVCache(1, 4, 16, H, D)
    small = QuantizedKVCache(1, 4, 16, H, D)
    k, v = torch.randn(2, T, H, D)
    slots = torch.arange(T)
    write_kv(k, v, *plain.layer(0), slots)
    write_kv_int8(k, v, *small.layer(0), slots)
    int32 = {"dtype": torch.int32}
    tables = torch.tensor([[0, 1, 2]], **int32)
    batch = (tables, torch.tensor([0, 1], **int32), torch.tensor([T], **int32), D**-0.5, 1, T)
    q = torch.randn(1, H, D)
    results = [
        paged_attention(q, *plain.layer(0), *batch),
        paged_attention_int8(q, *small.layer(0), *batch),
    ]
    moved = (results[1] - results[0]).abs().max().item()
    half_a_step = k.abs().amax(-1) / 254 * 1.004  # the scale is rounded by up to 1/256
    error = ((small.gather(0, [0, 1, 2], T)[0] - k).abs().amax(-1) / half_a_step).max().item()
    ratio = 2 * D * 16 / head_bytes(16, D)
    print(f"{T} tokens: the largest error of a key is {error:.2f} of half a step")
    print(f"the result of attention moved by {moved:.4f}, its numbers are about 0.2")
    print(f"tokens in the same memory: {ratio:.2f} times as many as in bfloat16")
    assert error <= 1 and moved < 0.01 and ratio > 1.9
    print("ok: each number is within half a step of its row")


if __name__ == "__main__":
    demo()
