"""One rung of the kernel ladder for a CPU: a plain kernel, one program per (sequence, head).

It is the loop that one writes first, and what a GPU's kernel looks like: each program owns one
query head and walks that head's rows of all blocks. Nothing is gathered. But in the pool a block
holds all heads one after another, so 12 programs come by the same 96 KB (12 heads, 16 tokens,
64 numbers of K and of V in fp32) at 12 different times and take 8 KB each: twelve short streams
where the memory would like one long one. The kernel that the engine uses takes the whole block when
it is there.

And beside it the loop that any kernel is measured against: read memory once, and do next to
nothing. This file needs numba, and is imported only where it is there.
"""

import numba
import numpy as np
import torch
from torch import Tensor

from kernels.numba_tools import FASTMATH, flat_memory, widen


@numba.njit(parallel=True, fastmath=FASTMATH, cache=True)
def _per_head(q, k_flat, v_flat, strides, block_size, block_tables, context_lens, scale, out):
    B, H, D = q.shape
    for program in numba.prange(B * H):
        i, h = program // H, program % H
        m, l, acc = np.float32(-1e30), np.float32(0), np.zeros(D, np.float32)
        scores, row = np.empty(block_size, np.float32), q[i, h]
        for start in range(0, context_lens[i], block_size):
            base = block_tables[i, start // block_size] * strides[0] + h * strides[1]
            n = min(block_size, context_lens[i] - start)  # the last block has a tail
            m_new = m
            for t in range(n):
                # A slice of a flat array: the compiler sees that its numbers are adjacent.
                k = k_flat[base + t * strides[2] : base + t * strides[2] + D]
                score = np.float32(0)
                for d in range(D):
                    score += row[d] * widen(k[d])
                scores[t] = score * scale
                m_new = max(m_new, scores[t])
            # The three equations of paged_attention.py, for one row.
            shrink = np.exp(m - m_new)
            m, l, acc = m_new, l * shrink, acc * shrink
            for t in range(n):
                v = v_flat[base + t * strides[2] : base + t * strides[2] + D]
                p = np.exp(scores[t] - m)
                l += p
                for d in range(D):
                    acc[d] += p * widen(v[d])
        for d in range(D):
            out[i, h, d] = acc[d] / l if l > 0 else 0


def per_head_numba(
    q: Tensor,  # (B, H, D): exactly one query a sequence, unlike the common signature
    k_cache: Tensor,  # (num_blocks + 1, H, block_size, D), fp32 or bf16
    v_cache: Tensor,
    block_tables: Tensor,  # (B, max_blocks) int32
    context_lens: Tensor,  # (B,) int32
    scale: float,
) -> Tensor:
    """Decode attention, (B, H, D), one (sequence, head) after another; as many K heads as Q's."""
    assert k_cache.shape[1] == q.shape[1] and k_cache.stride() == v_cache.stride()
    out = torch.empty(q.shape, dtype=torch.float32)
    strides = np.array(k_cache.stride(), dtype=np.int64)  # a product with int32 ids is int64 too
    caches = flat_memory(k_cache), flat_memory(v_cache), strides, k_cache.shape[2]
    places = block_tables.numpy(), context_lens.numpy()
    queries = q.float().contiguous().numpy()
    _per_head(queries, *caches, *places, np.float32(scale), out.numpy())
    return out.to(q.dtype)
