"""Attention for a prompt on a CPU, and the write of new K and V into their slots.

A decoding sequence has one query, and reading its context takes all the time. A prompt of 300
tokens has 300 queries, and each number that is read is multiplied 300 times. There the processor is
the limit, and the fastest matrix product is the library's. It needs K and V of a head as one
matrix, so `copy_context` copies the sequence's blocks once, in the order of the positions:

    table [ 5, 0, 7 ]   block 5 | block 0 | block 7      (H_kv, block_size, D) each
                           └─────────┼─────────┘
                        head 0: positions 0 1 2 .. 40    head 1: ..     (H_kv, context, D)

The copy takes as long as reading the context twice. From about 10 queries on (MANY_QUERIES in
`attention_cpu.py`) the faster products gain more than that: a layer's attention over a prompt of
256 tokens takes 2.5 ms, where the decode kernel takes 3.7 ms (GPT-2, float32, one AVX-512 core).

`write_kv_cpu` writes row n of the step's K and V to slot slot_mapping[n].

Checked by tests/kernels/test_attention_cpu.py against dense attention and `kv_cache.write_kv`.
Dao et al. 2022, "FlashAttention", arXiv:2205.14135 (the library's kernel).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.numba_tools import HAS_NUMBA, compiled, flat_memory, widen

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


# ---- a prompt ------------------------------------------------------------------------------------
@compiled
def copy_context(cache, layout, table, start, stop, out):
    """Copy positions [start, stop) of a sequence from the flat pool to out (H_kv, stop - start, D).

    `layout` is (H_kv, block_size, block_stride, head_stride, token_stride), in elements.
    """
    H_kv, block_size, block_stride, head_stride, token_stride = layout
    D = np.uint64(out.shape[2])
    for position in range(start, stop):
        block = np.int64(table[position // block_size]) * block_stride  # int64: beyond 2^31
        offset = position % block_size * token_stride
        for h in range(H_kv):
            row = np.uint64(block + h * head_stride + offset)
            for d in range(D):
                out[h, position - start, d] = widen(cache[row + d])


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


def write_kv_cpu(
    k: Tensor,  # (N, H_kv, D)
    v: Tensor,  # (N, H_kv, D)
    k_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D), one layer's view of the pool
    v_cache: Tensor,  # the same
    slot_mapping: Tensor,  # (N,) int64
) -> None:
    """Write each new token's k and v into its slot of one layer's caches, in place.

    Values are rounded to the dtype of the cache. Raises as `check_tensors` does.
    """
    k, v = k.to(k_cache.dtype), v.to(v_cache.dtype)
    check_tensors("write_kv_cpu", k_cache, v_cache, k, v)
    _, H_kv, D = k.shape
    write_k_and_v(
        flat_memory(k), k.stride(), flat_memory(k_cache), k_cache.stride(),
        flat_memory(v), v.stride(), flat_memory(v_cache), v_cache.stride(),
        k_cache.shape[2], slot_mapping.numpy(), H_kv, D,
    )  # fmt: skip
