"""Paged attention on a GPU in its simplest form: one program for each query and head.

The PyTorch version launches about 30 operations for each block: 2,000 in every layer for 1,024
tokens. This kernel keeps m, l and acc in registers, reads the block table, and is one launch.

    program (head h, sequence i)       block_table of sequence i = [6, 1, 4]
      q row in registers               ┌────────────┬────────────┬────────────┐
      m, l, acc in registers  <─reads─ │ block 6, h │ block 1, h │ block 4, h │  one after another
      one row of out                   └────────────┴────────────┴────────────┘

Each query of a prompt reads the context again; `kernels/triton_prefill.py` reads it once for 64.
Kwon et al. 2023, "PagedAttention", arXiv:2309.06180, section 5.1.
Run: python paged_attention_triton.py
Try: BLOCK_SIZE = 1 above the demo (each block is one token, the result is the same). Or delete
`(position <= last) &` in the kernel (it reads slots of NaN, and the assert on the distance fails).
"""

from __future__ import annotations  # so `tl.constexpr` is not evaluated where Triton is missing

import os

import torch
from torch import Tensor

from kv_cache import KVCache, Row, make_batch
from paged_attention import paged_attention

# Without a GPU, Triton can interpret kernels in Python on the CPU: slow, but the same arithmetic.
if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # Triton exists for Linux only; this file can be imported everywhere
    HAS_TRITON = False


def jit(function):
    """`triton.jit` where there is Triton; elsewhere the function as it is, which nothing calls."""
    return triton.jit(function) if HAS_TRITON else function


@jit
def simple_attention_kernel(
    q, k_cache, v_cache, out,  # pointers; shapes as in `paged_attention_triton_simple`
    block_tables, query_start_locs, context_lens, context_starts,
    scale: tl.constexpr,  # a Python float that is no constant would arrive in 32 bits
    stride_q_row, stride_q_head, stride_table, stride_out_row, stride_out_head,  # in elements
    stride_block, stride_kv_head, stride_token,  # of k_cache, and of v_cache too
    GROUP: tl.constexpr,  # H // H_kv: the query heads that share one head of K and V
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_D: tl.constexpr, TILE_T: tl.constexpr,
):  # fmt: skip
    """Program (h, i, t) computes head h of query t of sequence i. In a decode step t is 0."""
    h, i = tl.program_id(0), tl.program_id(1)
    t = tl.program_id(2)
    first_row = tl.load(query_start_locs + i)
    num_queries = tl.load(query_start_locs + i + 1) - first_row
    if t >= num_queries:  # the grid has max_query_len programs for every sequence
        return
    # Its own position, the last that it reads. 6 queries, context of 18 tokens: query 0 is at 12.
    last = tl.load(context_lens + i) - num_queries + t
    start = 0 if context_starts is None else tl.load(context_starts + i)
    # TILE_D and TILE_T are HEAD_DIM and BLOCK_SIZE rounded up to powers of two; masks cut the rest.
    dim, offset = tl.arange(0, TILE_D), tl.arange(0, TILE_T)
    row = (first_row + t).to(tl.int64)
    query = tl.load(q + row * stride_q_row + h * stride_q_head + dim, mask=dim < HEAD_DIM, other=0)
    wide = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32  # sums are never 16 bits
    query = query.to(wide) * scale

    m = tl.full([1], -1e30, wide)  # running maximum; finite, because -inf - -inf is NaN
    l = tl.zeros([1], wide)  # running denominator
    acc = tl.zeros([TILE_D], wide)  # running weighted sum of values
    for first in range(start // BLOCK_SIZE * BLOCK_SIZE, last + 1, BLOCK_SIZE):
        # int64 before the product with a stride: a pool of a few GB has more than 2**31 elements.
        block_id = tl.load(block_tables + i * stride_table + first // BLOCK_SIZE).to(tl.int64)
        kv_start = block_id * stride_block + h // GROUP * stride_kv_head
        at = kv_start + offset[:, None] * stride_token + dim[None, :]  # (TILE_T, TILE_D)
        position = first + offset
        readable = (position <= last) & (position >= start) & (offset < BLOCK_SIZE)
        # An unreadable slot may hold NaN, and 0 * NaN is NaN: the load puts 0 in its place.
        mask = readable[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_cache + at, mask=mask, other=0).to(wide)
        v = tl.load(v_cache + at, mask=mask, other=0).to(wide)
        # The three equations of paged_attention.py for one query.
        scores = tl.where(readable, tl.sum(query[None, :] * k, 1), float("-inf"))  # (TILE_T,)
        m_new = tl.maximum(m, tl.max(scores, 0))
        shrink, p = tl.exp(m - m_new), tl.exp(scores - m_new)
        l = l * shrink + tl.sum(p, 0)
        acc = acc * shrink + tl.sum(p[:, None] * v, 0)
        m = m_new
    result = acc / tl.where(l == 0, 1.0, l)  # a query that read nothing gives 0
    to = out + row * stride_out_row + h * stride_out_head + dim
    tl.store(to, result.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


@jit
def simple_write_kernel(
    k, v, k_cache, v_cache, slot_mapping,  # pointers; shapes as in `write_kv_triton_simple`
    stride_k_row, stride_k_head, stride_v_row, stride_v_head,
    stride_block, stride_kv_head, stride_token,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Program (n, h) copies head h of token n's key and value to the token's slot."""
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_mapping + n)  # int64 already: slot 23, BLOCK_SIZE 4 -> block 5, offset 3
    at = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_token
    dim = tl.arange(0, TILE_D)
    at += h * stride_kv_head + dim
    mask = dim < HEAD_DIM
    new_k = tl.load(k + n * stride_k_row + h * stride_k_head + dim, mask=mask)
    new_v = tl.load(v + n * stride_v_row + h * stride_v_head + dim, mask=mask)
    tl.store(k_cache + at, new_k.to(k_cache.dtype.element_ty), mask=mask)
    tl.store(v_cache + at, new_v.to(v_cache.dtype.element_ty), mask=mask)


def check_tensors(**tensors: Tensor) -> None:
    """Raise RuntimeError without Triton, ValueError for strides that the kernels would misread."""
    if not HAS_TRITON:
        raise RuntimeError("triton is not installed (it exists for Linux only): use another kernel")
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} has strides {tensor.stride()}: the last one must be 1")
    if tensors["k_cache"].stride() != tensors["v_cache"].stride():
        raise ValueError("k_cache and v_cache have different strides: take both from one pool")


def paged_attention_triton_simple(
    q: Tensor,  # (N, H, D), a view is fine
    k_cache: Tensor, v_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D), views of the pool
    block_tables: Tensor,  # (B, max_blocks) int32
    query_start_locs: Tensor, context_lens: Tensor,  # (B + 1,) and (B,) int32
    scale: float, max_query_len: int, max_context_len: int,  # the last one is not used here
    context_starts: Tensor | None = None,  # (B,) int32
    out: Tensor | None = None,  # (N, H, D)
) -> Tensor:  # fmt: skip
    """`paged_attention` in one launch: (N, H, D). B and max_query_len may be at most 65,535."""
    out = q.new_zeros(q.shape) if out is None else out.zero_()  # rows of no sequence stay zero
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache, out=out)
    H, D = q.shape[1:]
    if len(block_tables) > 0 and max_query_len > 0:
        simple_attention_kernel[(H, len(block_tables), max_query_len)](
            q, k_cache, v_cache, out,
            block_tables, query_start_locs, context_lens, context_starts, scale,
            *q.stride()[:2], block_tables.stride(0), *out.stride()[:2], *k_cache.stride()[:3],
            GROUP=H // k_cache.shape[1], HEAD_DIM=D, BLOCK_SIZE=k_cache.shape[2],
            TILE_D=triton.next_power_of_2(D), TILE_T=triton.next_power_of_2(k_cache.shape[2]),
        )  # fmt: skip
    return out


def write_kv_triton_simple(
    k: Tensor, v: Tensor,  # (N, H_kv, D), views are fine
    k_cache: Tensor, v_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    slot_mapping: Tensor,  # (N,) int64
) -> None:  # fmt: skip
    """`write_kv` in one launch: each token's k and v into its slot, in place."""
    check_tensors(k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    N, H_kv, D = k.shape
    if N > 0:
        simple_write_kernel[(N, H_kv)](
            k, v, k_cache, v_cache, slot_mapping,
            *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3],
            HEAD_DIM=D, BLOCK_SIZE=k_cache.shape[2], TILE_D=triton.next_power_of_2(D),
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------
BLOCK_SIZE = 4


def demo():
    """Two steps of three sequences through both pairs of kernels, each with a cache of its own."""
    if not HAS_TRITON:
        return print("ok: Triton is not installed (it exists for Linux only), nothing was checked")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tables = torch.randperm(60).view(3, 20).tolist()  # 20 blocks each, more than they need
    cache, oracle = (KVCache(1, 60, BLOCK_SIZE, 2, 16, device=device) for _ in range(2))
    cache.pool[:] = oracle.pool[:] = float("nan")  # what no token overwrites stays NaN
    # (tokens before the step, new tokens): two prompts; then a decode, a chunk, a third prompt
    for counts in [(0, 17), (0, 9), (0, 0)], [(17, 1), (9, 4), (0, 7)]:
        rows = [Row([0] * (n + new), n, new, ids, 1) for (n, new), ids in zip(counts, tables)]
        batch = make_batch(rows, BLOCK_SIZE, cache.scratch_block).to(device)
        N = len(batch.input_ids)
        q, (k, v) = torch.randn(N, 4, 16, device=device), torch.randn(2, N, 2, 16, device=device)
        ours = cache.attend(batch, paged_attention_triton_simple, write_kv_triton_simple)
        expected = oracle.attend(batch, paged_attention)(0, q, k, v)
        distance = (ours(0, q, k, v) - expected).abs().max()
        print(f"{N:2} tokens, {4 * N:3} programs: {distance:.0e} from the oracle")
        assert torch.equal(cache.pool.nan_to_num(), oracle.pool.nan_to_num()), "other slots"
        assert distance < 1e-5, f"distance from the oracle: {distance}"
    print("ok: the kernels write where write_kv writes and return what the oracle returns")


if __name__ == "__main__":
    demo()
