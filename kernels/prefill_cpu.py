"""The write of new K and V into their slots on a CPU, and a prompt's attention by PyTorch.

`write_kv_cpu` writes row n of the step's K and V to slot slot_mapping[n]. In a pool of int8 (see
speedups/quantized_kv.py) it rounds each head's D numbers to integers from -127 to 127 and writes
their scale behind the integers of the block's head.

`attend_prompt` is for sums in float64, and for machines on which `prompt_cpu.py` does not run. The
library's attention needs K and V of a head as one matrix, so `copy_context` copies the sequence's
blocks once, in the order of the positions:

    table [ 5, 0, 7 ]   block 5 | block 0 | block 7      (H_kv, block_size, D) each
                           └─────────┼─────────┘
                        head 0: positions 0 1 2 .. 40    head 1: ..     (H_kv, context, D)

The copy takes as long as reading the context twice. From about 10 queries on (MANY_QUERIES in
`attention_cpu.py`) the faster products gain more than that.

Checked by tests/kernels/test_attention_cpu.py against dense attention and `kv_cache.write_kv`, and
for int8 by tests/speedups/test_quantized_kv.py.
Dao et al. 2022, "FlashAttention", arXiv:2205.14135 (the library's kernel).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.numba_tools import (
    HAS_NUMBA,
    compiled,
    compiled_in_order,
    flat_memory,
    inlined,
    token_scale,
    widen,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def check_tensors(function_name: str, *tensors: Tensor) -> None:
    """Raise RuntimeError without Numba, TypeError for a dtype and ValueError for strides."""
    if not HAS_NUMBA:
        raise RuntimeError(f"{function_name} needs numba: pip install numba, or backend='torch'")
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise TypeError(f"{function_name} has float64, float32 and bfloat16, not {dtype}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            strides = tensor.stride()
            raise ValueError(f"{function_name}: strides are {strides}, the last one must be 1")


def check_pool(function_name: str, *caches: Tensor) -> None:
    """`check_tensors` for views of a pool, which may also be one of int8."""
    for cache in caches:
        if cache.dtype != torch.int8:
            check_tensors(function_name, cache)
            continue
        check_tensors(function_name)
        block_size, D = cache.shape[2:]
        if cache.stride(2) != D or cache.stride(1) < block_size * (D + 2):
            strides = f"strides of an int8 cache are {cache.stride()}"
            raise ValueError(f"{function_name}: {strides}: scales must follow each head's values")


@inlined
def scale_index(head, block_size, D, offset):
    """Where in a flat pool of int8 the scale of a token lies: a head's scales follow its values.

    The head begins at index `head`, the token is number `offset` of its block. A scale has 2 bytes
    and an even index. Example: head 0, block_size 16, D 64, offset 3 -> 1024 + 6.
    """
    return head + block_size * D + block_size * D % 2 + 2 * offset


# ---- a prompt ------------------------------------------------------------------------------------
@compiled
def copy_head(cache, layout, table, h, start, stop, out):
    """Copy positions [start, stop) of one head from the flat pool to out[: stop - start] (.., D).

    `layout` is (H_kv, block_size, block_stride, head_stride, token_stride), in elements.
    """
    _, block_size, block_stride, head_stride, token_stride = layout
    D = out.shape[1]
    for b in range(start // block_size, (stop - 1) // block_size + 1):
        head = np.int64(table[b]) * block_stride + h * head_stride  # int64: beyond 2^31
        first = b * block_size
        for offset in range(max(start - first, 0), min(stop - first, block_size)):
            row = np.uint64(head + offset * token_stride)
            scale = token_scale(cache, scale_index(head, block_size, D, offset))
            target = np.uint64(first + offset - start)
            for d in range(np.uint64(D)):
                out[target, d] = widen(cache[row + d]) * scale


@compiled
def copy_context(cache, layout, table, start, stop, out):
    """`copy_head` for each head; out is (H_kv, stop - start, D)."""
    for h in range(len(out)):
        copy_head(cache, layout, table, h, start, stop, out[h])


def attend_prompt(
    q: Tensor,  # (T, H, D): the T newest tokens of one sequence
    k: np.ndarray,  # the flat pool from the layer's K on
    v: np.ndarray,  # the same from its V on
    layout: tuple[int, ...],
    table: np.ndarray,  # (max_blocks,) int32
    context_len: int,
    start: int,  # the first position that may be read
    scale: float,
    out: Tensor,  # (T, H, D), of q's dtype
) -> None:
    """Copy one sequence's context, then call PyTorch's attention. Writes out (T, H, D).

    The rows of queries that may read nothing are not written.
    """
    T, H, D = q.shape
    H_kv = layout[0]
    num_idle = max(0, start - (context_len - T))  # queries at positions before `start`
    if num_idle >= T:
        return
    k_dense, v_dense = torch.empty((2, H_kv, context_len - start, D), dtype=q.dtype)
    copy_context(k, layout, table, start, context_len, k_dense.numpy())
    copy_context(v, layout, table, start, context_len, v_dense.numpy())
    num_active = T - num_idle
    # Tokens before the first active query. 0: a whole prompt, `is_causal` is enough. Otherwise
    # query t reads the tokens 0 .. num_past + t, a lower triangle that is moved to the right.
    num_past = context_len - start - num_active
    mask = None
    if num_past > 0:
        mask = torch.ones(num_active, context_len - start, dtype=torch.bool).tril(num_past)
    out[num_idle:] = F.scaled_dot_product_attention(
        q[num_idle:].transpose(0, 1)[None],
        k_dense[None],
        v_dense[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=H != H_kv,
    )[0].transpose(0, 1)


# ---- the write -----------------------------------------------------------------------------------
@compiled
def write_rows(rows, row_strides, cache, cache_strides, block_size, slots, H_kv, D):
    """Copy rows (N, H_kv, D) to their slots of a cache; both are flat, with their strides."""
    for n in range(len(slots)):
        block_id = slots[n] // block_size  # slot 37, block_size 16 -> block 2, offset 5
        offset = slots[n] % block_size
        for h in range(H_kv):
            source = np.uint64(n * row_strides[0] + h * row_strides[1])
            target = np.uint64(
                block_id * cache_strides[0] + h * cache_strides[1] + offset * cache_strides[2]
            )
            for d in range(np.uint64(D)):
                cache[target + d] = rows[source + d]


@compiled
def write_k_and_v(
    k, k_strides, k_cache, k_cache_strides, v, v_strides, v_cache, v_cache_strides,
    block_size, slots, H_kv, D,
):  # fmt: skip
    """`write_rows` for k and for v, in one call from Python."""
    write_rows(k, k_strides, k_cache, k_cache_strides, block_size, slots, H_kv, D)
    write_rows(v, v_strides, v_cache, v_cache_strides, block_size, slots, H_kv, D)


# 1 / 127 as float32: the largest number of a row becomes 127 or -127.
STEP = np.float32(1 / 127)
INFINITY_BITS = np.int32(0x7F800000)  # the bits of larger integers are those of NaNs
NAN_BITS = np.int32(0x7FC0)  # a NaN in bfloat16
SMALLEST_BITS = np.int32(0x0080)  # 2^-126 in bfloat16: below it a scale would have few digits
ROUNDER = np.float32(1.5 * 2**23)  # a float32 of this size has no digits behind the point


@compiled_in_order
def scale_bits(largest):
    """The scale of a row as the 16 bits of a bfloat16; `largest` are the bits of its largest |x|.

    It is largest / 127, rounded to 8 digits: at most one part in 256 smaller, so no number of the
    row becomes more than 127 * (1 + 1/255) = 127.498, which rounds to 127.
    """
    if largest >= INFINITY_BITS:
        return NAN_BITS
    bits = np.float32(np.int32(largest).view(np.float32) * STEP).view(np.int32)
    # Round to nearest, ties to even: 0x3f808000 is a tie, and becomes 0x3f80.
    bits = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)
    return bits if bits >= SMALLEST_BITS else np.int32(0)


# In order: a sum that is rearranged or fused would round other numbers up than PyTorch does.
@compiled_in_order
def quantize_rows(rows, row_strides, cache, cache_strides, block_size, slots, H_kv, D):
    """`write_rows` for a cache of int8: each row (D,) as integers, and its scale."""
    for n in range(len(slots)):
        block_id = slots[n] // block_size
        offset = slots[n] % block_size
        for h in range(H_kv):
            source = np.uint64(n * row_strides[0] + h * row_strides[1])
            head = block_id * cache_strides[0] + h * cache_strides[1]
            target = np.uint64(head + offset * cache_strides[2])
            # As integers, the bits of positive floats have the order of the floats; NaN is last.
            largest = np.int32(0)
            for d in range(np.uint64(D)):
                bits = np.float32(widen(rows[source + d])).view(np.int32)
                largest = max(largest, np.int32(bits & np.int32(0x7FFFFFFF)))
            scale = scale_bits(largest)
            at = np.uint64(scale_index(head, block_size, D, offset))
            cache[at] = np.int8(scale & np.int32(0xFF))
            cache[at + np.uint64(1)] = np.int8(scale >> np.int32(8))
            if scale == 0 or scale == NAN_BITS:
                for d in range(np.uint64(D)):
                    cache[target + d] = 0
                continue
            inverse = np.float32(1) / np.int32(scale << np.int32(16)).view(np.float32)
            for d in range(np.uint64(D)):
                # The sum's last digit is 1, so it rounds x to an integer, which is its low byte.
                x = np.float32(widen(rows[source + d])) * inverse + ROUNDER
                cache[target + d] = np.int8(np.float32(x).view(np.int32) & np.int32(0xFF))


@compiled
def quantize_k_and_v(
    k, k_strides, k_cache, k_cache_strides, v, v_strides, v_cache, v_cache_strides,
    block_size, slots, H_kv, D,
):  # fmt: skip
    """`quantize_rows` for k and for v, in one call from Python."""
    quantize_rows(k, k_strides, k_cache, k_cache_strides, block_size, slots, H_kv, D)
    quantize_rows(v, v_strides, v_cache, v_cache_strides, block_size, slots, H_kv, D)


def write_kv_cpu(
    k: Tensor,  # (N, H_kv, D)
    v: Tensor,  # (N, H_kv, D)
    k_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D), one layer's view of the pool
    v_cache: Tensor,  # the same
    slot_mapping: Tensor,  # (N,) int64
) -> None:
    """Write each new token's k and v into its slot of one layer's caches, in place.

    Values are rounded to the dtype of the cache; in int8 each row gets its scale. Raises as
    `check_tensors` does.
    """
    write = quantize_k_and_v
    if k_cache.dtype != torch.int8:
        write = write_k_and_v
        k, v = k.to(k_cache.dtype), v.to(v_cache.dtype)
    check_pool("write_kv_cpu", k_cache, v_cache)
    check_tensors("write_kv_cpu", k, v)
    _, H_kv, D = k.shape
    write(
        flat_memory(k), k.stride(), flat_memory(k_cache), k_cache.stride(),
        flat_memory(v), v.stride(), flat_memory(v_cache), v_cache.stride(),
        k_cache.shape[2], slot_mapping.numpy(), H_kv, D,
    )  # fmt: skip
