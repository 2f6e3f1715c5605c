"""Paged attention on a GPU in its simplest form: one program for each sequence and head.

The PyTorch version starts about 30 small operations for each block of a context. For 1,024 tokens
in blocks of 16 these are 2,000 launches in every layer, and each launch costs a few microseconds. A
Triton kernel keeps m, l and acc in registers, reads the block table itself, and is one launch. A
second kernel writes the new keys and values to their slots.

    program (head h, sequence i)       block_table of sequence i = [6, 1, 4]
      q row in registers               ┌────────────┬────────────┬────────────┐
      m, l, acc in registers  <─reads─ │ block 6, h │ block 1, h │ block 4, h │  one after another
      one row of out                   └────────────┴────────────┴────────────┘

A decode step has one query for each sequence. Each query of a prompt gets a program of its own,
which reads the context again; `kernels/triton_prefill.py` reads it once for 64 queries.
`--backend triton-simple` runs an engine on this file.

Kwon et al. 2023, "PagedAttention", arXiv:2309.06180, section 5.1. Tillet et al. 2019, "Triton: an
intermediate language and compiler for tiled neural network computations", MAPL.
Run: python paged_attention_triton.py
Try: BLOCK_SIZE = 1 above the demo (each block is one token, the result is the same). Or delete
`(position <= last) &` in the kernel: it then reads slots that hold NaN, and the assert on the
distance from the oracle fails.
"""

from __future__ import annotations  # so `tl.constexpr` is not evaluated where Triton is missing

import math
import os

import numpy as np
import torch
from torch import Tensor

from kv_cache import Row, make_batch, write_kv
from paged_attention import paged_attention

# Without a GPU, Triton can interpret kernels in Python on the CPU: slow, but the same arithmetic.
# Triton reads this variable when it is imported, so the demo has to set it here.
if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

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
    block_tables, query_start_locs, context_lens,
    context_starts,  # or None
    scale,
    stride_q_row, stride_q_head,  # a stride is the step in elements from one index to the next
    stride_block, stride_kv_head, stride_token,  # of k_cache, and of v_cache too
    stride_table, stride_out_row, stride_out_head,
    GROUP: tl.constexpr,  # H // H_kv: the query heads that share one head of K and V
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE_D: tl.constexpr, TILE_T: tl.constexpr,  # HEAD_DIM and BLOCK_SIZE, up to powers of two
):  # fmt: skip
    """Program (h, i, t) computes head h of query t of sequence i. In a decode step t is 0."""
    h, i, t = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row = tl.load(query_start_locs + i)
    num_queries = tl.load(query_start_locs + i + 1) - first_row
    if t >= num_queries:  # the grid has max_query_len programs for every sequence
        return
    # Causal: the query reads positions [start, last + 1), and `last` is its own position.
    # A chunk of 6 queries that ends a context of 18 tokens: query 0 sits at position 12.
    last = tl.load(context_lens + i) - num_queries + t
    start = 0
    if context_starts is not None:
        start = tl.load(context_starts + i)

    dim = tl.arange(0, TILE_D)  # a tile's size must be a power of two: the mask cuts the rest off
    offset = tl.arange(0, TILE_T)
    row = (first_row + t).to(tl.int64)
    query = tl.load(q + row * stride_q_row + h * stride_q_head + dim, mask=dim < HEAD_DIM, other=0)
    wide = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32  # sums are never 16 bits
    query = query.to(wide) * scale

    m = tl.full([1], float("-inf"), wide)  # running maximum of the scores
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
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing read yet: -inf - -inf = NaN
        shrink = tl.exp(m - m_safe)
        p = tl.exp(scores - m_safe)
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
    dim = tl.arange(0, TILE_D)
    mask = dim < HEAD_DIM
    new_k = tl.load(k + n * stride_k_row + h * stride_k_head + dim, mask=mask)
    new_v = tl.load(v + n * stride_v_row + h * stride_v_head + dim, mask=mask)
    at = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_token
    at += h * stride_kv_head + dim
    tl.store(k_cache + at, new_k.to(k_cache.dtype.element_ty), mask=mask)
    tl.store(v_cache + at, new_v.to(v_cache.dtype.element_ty), mask=mask)


def check_tensors(**tensors: Tensor) -> None:
    """Raise RuntimeError without Triton, ValueError for tensors that the kernels would misread.

    Both kernels assume that the D numbers of a head are adjacent, and use k_cache's strides for
    v_cache too.
    """
    if not HAS_TRITON:
        raise RuntimeError("triton is not installed (it exists for Linux only): use another kernel")
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} has strides {tensor.stride()}: the last one must be 1")
    if tensors["k_cache"].stride() != tensors["v_cache"].stride():
        raise ValueError("k_cache and v_cache have different strides: take both from one pool")


def paged_attention_triton_simple(
    q: Tensor,  # (N, H, D), a view is fine
    k_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D), one layer's view of the pool
    v_cache: Tensor,  # the same
    block_tables: Tensor,  # (B, max_blocks) int32
    query_start_locs: Tensor,  # (B + 1,) int32
    context_lens: Tensor,  # (B,) int32
    scale: float,
    max_query_len: int,
    max_context_len: int,  # part of the common signature; this kernel reads `context_lens` instead
    context_starts: Tensor | None = None,  # (B,) int32
    out: Tensor | None = None,  # (N, H, D)
) -> Tensor:
    """`paged_attention` of paged_attention.py in one launch; returns (N, H, D).

    H, B and `max_query_len` are the three axes of the grid: the last two may be at most 65,535.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache, out=out)
    out.zero_()  # rows that belong to no sequence stay zero
    _, H, D = q.shape
    _, H_kv, block_size, _ = k_cache.shape
    B = len(block_tables)
    if q.dtype == torch.float64:  # Triton passes a Python float in 32 bits: too few here
        q, scale = q * scale, 1.0
    if B > 0 and max_query_len > 0:
        simple_attention_kernel[(H, B, max_query_len)](
            q, k_cache, v_cache, out,
            block_tables, query_start_locs, context_lens, context_starts, scale,
            *q.stride()[:2], *k_cache.stride()[:3], block_tables.stride(0), *out.stride()[:2],
            GROUP=H // H_kv, HEAD_DIM=D, BLOCK_SIZE=block_size,
            TILE_D=triton.next_power_of_2(D), TILE_T=triton.next_power_of_2(block_size),
        )  # fmt: skip
    return out


def write_kv_triton_simple(
    k: Tensor,  # (N, H_kv, D), a view is fine
    v: Tensor,  # (N, H_kv, D)
    k_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    v_cache: Tensor,  # the same
    slot_mapping: Tensor,  # (N,) int64
) -> None:
    """`write_kv` of kv_cache.py in one launch: each token's k and v into its slot, in place."""
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


def is_interpreted() -> bool:
    """Whether Triton interprets the kernels in this process, instead of compiling them."""
    return not isinstance(simple_attention_kernel, triton.JITFunction)


def why_nothing_can_run() -> str | None:
    """The reason why this process cannot run the kernels, or None if it can."""
    if not HAS_TRITON:
        return "Triton is not installed (it exists for Linux only), so no kernel can run here."
    if is_interpreted() and triton.__version__.startswith("3.6") and np.__version__ >= "2.4":
        return "Triton 3.6 cannot interpret a loop with numpy 2.4 or newer: upgrade triton."
    return None


def demo():
    """A prompt, a chunk of a prompt and a decode in one launch, compared with the oracle."""
    reason = why_nothing_can_run()
    if reason:
        print(f"{reason}\nok: nothing was run, and nothing was checked")
        return
    device = "cpu" if is_interpreted() else "cuda"
    torch.manual_seed(0)
    H, H_kv, D = 4, 2, 16
    work = {"a prompt": (7, 7), "a chunk": (4, 13), "a decode": (1, 18)}  # queries, context_len
    shuffled = iter(torch.randperm(40).tolist())
    rows = []
    for num_queries, context_len in work.values():
        table = [next(shuffled) for _ in range(math.ceil(context_len / BLOCK_SIZE))]
        token_ids = list(range(context_len))
        rows.append(Row(token_ids, context_len - num_queries, num_queries, table, 1))
    batch = make_batch(rows, BLOCK_SIZE, scratch_block=40).to(device)
    whole = [row._replace(start=0, num_new_tokens=len(row.token_ids)) for row in rows]
    slots = make_batch(whole, BLOCK_SIZE, scratch_block=40).slot_mapping.to(device)  # of 38 tokens

    # All other slots hold NaN, and no query may read them.
    pools = torch.full((2, 41, 2, H_kv, BLOCK_SIZE, D), math.nan, device=device)
    k, v = torch.randn(2, 38, H_kv, D, device=device)
    write_kv_triton_simple(k, v, pools[0, :, 0], pools[0, :, 1], slots)
    write_kv(k, v, pools[1, :, 0], pools[1, :, 1], slots)
    assert torch.equal(pools[0].nan_to_num(), pools[1].nan_to_num()), "written to other slots"

    q = torch.randn(12, H, D, device=device)
    result, expected = (
        function(
            q,
            pools[0, :, 0],
            pools[0, :, 1],
            batch.block_tables,
            batch.query_start_locs,
            batch.context_lens,
            scale=D**-0.5,
            max_query_len=batch.max_query_len,
            max_context_len=batch.max_context_len,
        )
        for function in (paged_attention_triton_simple, paged_attention)
    )
    errors = (result - expected).abs()
    errors = errors.split([row.num_new_tokens for row in rows])

    print(f"the kernels are {'interpreted' if device == 'cpu' else 'compiled for this GPU'}")
    print(f"write: {38 * H_kv} programs put 38 tokens into the slots that write_kv chose\n")
    print("sequence   queries  tokens  programs  distance from the oracle  block_table")
    for name, row, error in zip(work, rows, errors, strict=True):
        counts = f"{row.num_new_tokens:7} {len(row.token_ids):7} {row.num_new_tokens * H:9}"
        print(f"{name:10} {counts} {error.max():25.1e}  {row.block_table}")
    distance = torch.cat(errors).max().item()
    assert distance < 1e-5, f"distance from the oracle: {distance}"
    print("ok: one launch for all three, and the result is the oracle's")


if __name__ == "__main__":
    demo()
