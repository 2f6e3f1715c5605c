"""One rung of the kernel ladder for a GPU: a plain kernel, one program per (sequence, head).

It is `paged_attention.py` written down again in Triton, and nothing more: a program waits for a
block's entry in the table, then for its K, then for its V, folds it in, and goes on. A block of 16
tokens is 2 KB of K and 2 KB of V in 16 bits, while a large GPU needs some 30 KB in flight per
multiprocessor to be busy. So the next rung takes tiles that span several blocks, and the one after
it several programs for one long context.

And beside it the two kernels that any other is measured against: one that only reads, and one that
does nothing at all. This file needs triton, and is imported only where it is there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def per_head_kernel(
    out,  # (B, H, D), contiguous
    q,  # (B, H, D)
    k_cache,  # (num_blocks + 1, H_kv, BLOCK_SIZE, D)
    v_cache,  # the same strides
    block_tables,  # (B, max_blocks) int32
    context_lens,  # (B,) int32
    scale,
    q_stride_row,
    q_stride_head,
    kv_stride_block,
    kv_stride_head,
    kv_stride_slot,
    table_stride,
    H: tl.constexpr,
    GROUP: tl.constexpr,  # query heads to one head of K and V
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_D: tl.constexpr,  # D and BLOCK_SIZE, rounded up to powers of two: Triton knows no others
    TILE_T: tl.constexpr,
):
    """Program (h, i) is query head h of sequence i."""
    h, i = tl.program_id(0), tl.program_id(1)
    t, d = tl.arange(0, TILE_T), tl.arange(0, TILE_D)
    row = tl.load(q + i * q_stride_row + h * q_stride_head + d, mask=d < D, other=0.0)
    row = row.to(tl.float32) * scale
    context_len = tl.load(context_lens + i)
    m, l = float("-inf"), 0.0
    acc = tl.zeros([TILE_D], tl.float32)
    for start in range(0, context_len, BLOCK_SIZE):
        # int64 before the product with a stride: a pool of a few GB passes 2**31 elements.
        block_id = tl.load(block_tables + i * table_stride + start // BLOCK_SIZE).to(tl.int64)
        base = block_id * kv_stride_block + (h // GROUP) * kv_stride_head
        where = base + t[:, None] * kv_stride_slot + d[None, :]
        readable = (t < BLOCK_SIZE) & (start + t < context_len)
        mask = readable[:, None] & (d < D)[None, :]
        k = tl.load(k_cache + where, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_cache + where, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(readable, tl.sum(row[None, :] * k, 1), float("-inf"))
        # The three equations of paged_attention.py, for one row. A block has at least one token.
        m_new = tl.maximum(m, tl.max(scores, 0))
        shrink, p = tl.exp(m - m_new), tl.exp(scores - m_new)
        l = l * shrink + tl.sum(p, 0)
        acc = acc * shrink + tl.sum(p[:, None] * v, 0)
        m = m_new
    result = acc / tl.where(l == 0, 1.0, l)
    tl.store(out + (i * H + h) * D + d, result.to(out.dtype.element_ty), mask=d < D)


def per_head_triton(
    q: Tensor,  # (B, H, D): exactly one query a sequence, unlike the common signature
    k_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    v_cache: Tensor,
    block_tables: Tensor,  # (B, max_blocks) int32
    context_lens: Tensor,  # (B,) int32
    scale: float,
) -> Tensor:
    """Decode attention, (B, H, D), one (sequence, head) a program."""
    B, H, D = q.shape
    block_size = k_cache.shape[2]
    assert k_cache.stride() == v_cache.stride() and k_cache.stride(3) == q.stride(2) == 1
    out = torch.empty((B, H, D), dtype=q.dtype, device=q.device)
    per_head_kernel[(H, B)](
        out,
        q,
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        scale,
        q.stride(0),
        q.stride(1),
        *k_cache.stride()[:3],
        block_tables.stride(0),
        H=H,
        GROUP=H // k_cache.shape[1],
        D=D,
        BLOCK_SIZE=block_size,
        TILE_D=triton.next_power_of_2(D),
        TILE_T=triton.next_power_of_2(block_size),
    )
    return out
