"""Paged attention on a GPU for one query a sequence: the context is cut in chunks, then merged.

This is the fast form of the lesson paged_attention_triton.py, which runs one program for each
(sequence, head). A decode step reads the whole context of each sequence for one query: in GPT-2
36,864 bytes a token for 18,432 multiplications. So its time is the time to read, and a GPU reads at
full speed only while all of its processors have loads in progress. A batch of 64 sequences has 768
programs, which is enough. 16 sequences have 192, and 132 processors read with one or two each. One
sequence of 8,000 tokens has 12. So with few sequences a long context is cut in chunks of fixed
length with a program for each. A program writes three partial results for its chunk, and the
equations of the online softmax merge them:

    chunk 0 |tokens 0..255  | m0 l0 acc0 \\     m = max(m0, m1, ..)
    chunk 1 |tokens 256..511| m1 l1 acc1  >    l = sum(l_c e^(m_c - m))
    chunk 2 |tokens 512..599| m2 l2 acc2 /   acc = sum(acc_c e^(m_c - m)), out = acc / l

The query heads that share a head of K and V are the rows of one matrix product, so the shared head
is read once. At the end of the file stands `paged_attention_triton`, which the engine calls: it
launches this kernel, the one for many queries, or both. (kernels/triton_fused_decode.py goes
further: it writes the new key and value and merges in the same launch.)

How it is checked: against dense attention in float64 over pools full of NaN
(tests/kernels/test_triton_decode.py).

Dao et al. 2023, "Flash-Decoding for long-context inference"; Milakov and Gimelshein 2018,
arXiv:1805.02867, section 3.1: the merge is associative.
Run: python -m kernels.triton_decode
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported, below

from kernels.triton_prefill import (
    INTERPRETED,
    can_launch,
    check_launch,
    paged_prefill_triton,
    scale_to_exp2,
    tile_d,
    tl,
    triton,
    walk,
)
from paged_attention import paged_attention

CHUNK_LEN = 256  # tokens, 4 tiles: reading them takes much longer than merging them
LONG_CONTEXT = 1024  # tokens: as long as GPT-2's
# A GPU reads at full speed only with about 48 KB of loads in progress on each of its processors.
# One program has a tile of 16 KB in progress, and a large GPU has 132 processors (an H200) or 148.
ENOUGH_PROGRAMS = 450
MAX_GROUP_ROWS = 16  # heads in one product: a tensor core takes the same time for 1 row and for 16


@triton.jit
def zero_if_padded(row, query_start_locs, num_seqs, num_rows, to, inside):
    """Zero this row of out if it is padding, that is, after the last query of the last sequence."""
    if (row >= tl.load(query_start_locs + num_seqs)) & (row < num_rows):
        tl.store(to, tl.zeros(to.shape, to.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["num_seqs", "num_rows", "chunk_len", "stride_table"])
def decode_kernel(
    q, k_cache, v_cache, out,  # (N, H, D), twice (num_blocks + 1, H_kv, block_size, D), (N, H, D)
    partial_m, partial_l, partial_acc,  # those of `decode_chunks`; None where SPLIT is False
    block_tables, query_start_locs,  # (B, max_blocks), (B + 1,)
    context_lens, context_starts,  # (B,) and (B,) or None
    factor, num_seqs, num_rows, chunk_len,  # scale * log2(e), B, N, tokens a chunk where SPLIT
    stride_table, stride_q_row, stride_q_head,  # strides in elements: from row to row of tables, ..
    stride_block, stride_head, stride_token, stride_out_row, stride_out_head,  # of both caches, out
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,  # H_kv, and H // H_kv heads that share one
    TILE_G: tl.constexpr,  # rows of the product: GROUP rounded up to a power of two, at most 16
    HEAD_DIM: tl.constexpr, TILE_D: tl.constexpr,  # D, and D rounded up to a power of two
    BLOCK_SIZE: tl.constexpr, TILE_K: tl.constexpr,  # tokens a block, tokens a tile
    SPLIT: tl.constexpr,  # True: one chunk, partial results are written; False: out is written
    UPCAST: tl.constexpr,  # True: the interpreter can't multiply bfloat16, so compute in 32 bits
):  # fmt: skip
    """One program: the query of one sequence, up to 16 heads that share K and V, one chunk."""
    GROUP_TILES: tl.constexpr = (GROUP + TILE_G - 1) // TILE_G  # 1, unless more than 16 heads share
    # Programs with neighbouring ids work on heads of one sequence, so they read the same blocks.
    kv_head = tl.program_id(0) // GROUP_TILES % NUM_KV_HEADS
    i = (tl.program_id(0) // (NUM_KV_HEADS * GROUP_TILES)).to(tl.int64)  # the sequence
    group = tl.program_id(0) % GROUP_TILES * TILE_G + tl.arange(0, TILE_G)[:, None]
    head = kv_head * GROUP + group  # (TILE_G, 1)
    dim = tl.arange(0, TILE_D)[None, :]
    inside = (group < GROUP) & (dim < HEAD_DIM)  # (TILE_G, TILE_D)
    to = out + head * stride_out_head + dim
    if not SPLIT:
        own_row = to + i * stride_out_row
        zero_if_padded(i, query_start_locs, num_seqs, num_rows, own_row, inside)
    if i >= num_seqs:
        return
    row = tl.load(query_start_locs + i).to(tl.int64)
    if tl.load(query_start_locs + i + 1) - row != 1:  # no query, or a prompt for the other kernel
        return
    first = 0
    end = tl.load(context_lens + i)
    if context_starts is not None:
        first = tl.load(context_starts + i)
    if SPLIT:
        first += tl.program_id(1) * chunk_len
        end = tl.minimum(end, first + chunk_len)
        if first >= end:  # the sequence has no such chunk, and the merge does not read it
            return

    queries = tl.load(q + row * stride_q_row + head * stride_q_head + dim, inside, other=0.0)
    queries = queries.to(tl.float32) if UPCAST else queries
    last = tl.full([TILE_G], 0, tl.int32) + end - 1  # all rows are heads of the same query
    full = first + tl.maximum(end - first, 0) // TILE_K * TILE_K  # [first, full): whole tiles
    table = block_tables + i * stride_table
    k_head = kv_head * stride_head
    kv = (table, k_cache + k_head, v_cache + k_head, stride_block, stride_token)
    m, l, acc = walk(queries, last, factor, first, full, end, kv, HEAD_DIM, BLOCK_SIZE, TILE_K)
    if SPLIT:
        # Partial results are (num_programs, H, num_chunks) and (.., D), without padding.
        index = (i * NUM_KV_HEADS * GROUP + head) * tl.num_programs(1) + tl.program_id(1)
        tl.store(partial_m + index, m[:, None], group < GROUP)
        tl.store(partial_l + index, l[:, None], group < GROUP)
        tl.store(partial_acc + index * HEAD_DIM + dim, acc, inside)
    else:
        result = acc / tl.where(l == 0, 1.0, l)[:, None]  # an empty context: 0 / 1
        tl.store(to + row * stride_out_row, result.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["num_seqs", "num_rows", "chunk_len", "num_chunks"])
def merge_kernel(
    out,  # (N, H, D)
    partial_m, partial_l, partial_acc,  # those of `decode_chunks`
    query_start_locs, context_lens, context_starts,  # (B + 1,), (B,) and (B,) or None
    num_seqs, num_rows, chunk_len,  # B, N, tokens a chunk
    num_chunks,  # the third size of the partial results
    stride_out_row, stride_out_head,  # in elements
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILE_D: tl.constexpr,  # HEAD_DIM rounded up to a power of two
    TILE_C: tl.constexpr,  # chunks folded at a time
):  # fmt: skip
    """One program: merge the chunks of one sequence and one query head into a row of out."""
    head = tl.program_id(0) % NUM_HEADS
    i = (tl.program_id(0) // NUM_HEADS).to(tl.int64)
    dim = tl.arange(0, TILE_D)
    to = out + head * stride_out_head + dim
    own_row = to + i * stride_out_row
    zero_if_padded(i, query_start_locs, num_seqs, num_rows, own_row, dim < HEAD_DIM)
    if i >= num_seqs:
        return
    row = tl.load(query_start_locs + i).to(tl.int64)
    if tl.load(query_start_locs + i + 1) - row != 1:
        return
    length = tl.load(context_lens + i)
    if context_starts is not None:
        length -= tl.load(context_starts + i)
    # Chunks from here on were never written: that memory still holds older values.
    num_present = tl.cdiv(tl.maximum(length, 0), chunk_len)

    m = tl.full([1], float("-inf"), partial_m.dtype.element_ty)
    l = tl.zeros_like(m)
    acc = tl.zeros([TILE_D], m.dtype)
    for first_chunk in range(0, num_present, TILE_C):
        chunk = first_chunk + tl.arange(0, TILE_C)
        inside = chunk < num_present  # (TILE_C,)
        index = (i * NUM_HEADS + head) * num_chunks + chunk
        chunk_m = tl.load(partial_m + index, inside, other=float("-inf"))
        chunk_l = tl.load(partial_l + index, inside, other=0.0)
        sums = partial_acc + index[:, None] * HEAD_DIM + dim  # (TILE_C, TILE_D)
        chunk_acc = tl.load(sums, inside[:, None] & (dim < HEAD_DIM), other=0.0)
        m_new = tl.maximum(m, tl.max(chunk_m, 0))  # not -inf: each chunk that is present has tokens
        shrink = tl.exp2(m - m_new)
        weight = tl.exp2(chunk_m - m_new)  # 2^(m_c - m)
        l = l * shrink + tl.sum(chunk_l * weight, 0)
        acc = acc * shrink + tl.sum(chunk_acc * weight[:, None], 0)
        m = m_new
    result = acc / tl.where(l == 0, 1.0, l)
    tl.store(to + row * stride_out_row, result.to(out.dtype.element_ty), dim < HEAD_DIM)


def choose_chunk_len(num_seqs: int, num_kv_heads: int, max_context_len: int) -> int:
    """Tokens a chunk, or 0: one program reads the whole context.

    With so few sequences that chunks of CHUNK_LEN would still be too few programs, even for a long
    context, chunks are half as long. Beside `max_context_len` the lengths of the contexts have no
    part in it, so a recorded step has one chunk length, and a context is cut in the same places
    whatever the others are. (Where `max_context_len` is one chunk, the result has the same bits
    without chunks.) Nor does the device: the same call computes the same sums on every GPU.
    Example: 12 heads, up to 1,024 tokens: 9 sequences -> 128, 37 sequences -> 256, 38 -> 0.
    """
    whole_contexts = num_seqs * num_kv_heads  # programs, if none is cut
    if whole_contexts >= ENOUGH_PROGRAMS:
        return 0
    too_few = whole_contexts * LONG_CONTEXT // CHUNK_LEN < ENOUGH_PROGRAMS
    chunk_len = CHUNK_LEN // 2 if too_few else CHUNK_LEN
    return 0 if max_context_len <= chunk_len else chunk_len


def decode_tiles(dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """Tokens a tile, warps a program and tiles in progress.

    To read at full speed each of a GPU's processors needs about 48 KB of loads in progress. A tile
    is 8 KB of K and 8 KB of V: 64 tokens of GPT-2 in 16 bits. While one tile is multiplied the next
    one is copied, and at least three such programs fit on a processor. `num_stages` is 3 because
    reading the block table is a stage too.
    """
    row_bytes = tile_d(head_dim) * dtype.itemsize
    TILE_K = min(64, max(16, 8192 // row_bytes))
    # 64-bit heads of size 256: the smallest tile is 32 KB, too much for the registers of 4 warps.
    return {"TILE_K": TILE_K, "num_warps": 4 if row_bytes <= 1024 else 8, "num_stages": 3}


def empty_partials(
    num_programs: int,
    num_chunks: int,
    q: Tensor,  # (N, H, D)
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for m and l (num_programs, H, num_chunks) and acc (num_programs, H, num_chunks, D)."""
    _, H, D = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    m = torch.empty(num_programs, H, num_chunks, dtype=dtype, device=q.device)
    acc = torch.empty(num_programs, H, num_chunks, D, dtype=dtype, device=q.device)
    return m, torch.empty_like(m), acc


def decode_chunks(
    q: Tensor,  # (N, H, D)
    k_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    v_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    block_tables: Tensor,  # (B, max_blocks) int32
    query_start_locs: Tensor,  # (B + 1,) int32
    context_lens: Tensor,  # (B,) int32
    context_starts: Tensor | None,  # (B,) int32
    scale: float,
    out: Tensor,  # (N, H, D)
    num_programs: int,  # B, or more: program i >= B zeroes row i if it is a padded row
    num_chunks: int,
    chunk_len: int,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Launch the decode kernel. With a `chunk_len` of 0 it writes `out` and returns None.

    Otherwise returns what `merge_chunks` reads: m and l (num_programs, H, num_chunks) and acc
    (num_programs, H, num_chunks, D), not written where a sequence has no such chunk.
    """
    N, H, D = q.shape
    _, H_kv, block_size, _ = k_cache.shape
    B = block_tables.shape[0]
    partials = empty_partials(num_programs, num_chunks, q) if chunk_len else None
    q, factor = scale_to_exp2(q, scale)
    TILE_G = min(MAX_GROUP_ROWS, triton.next_power_of_2(H // H_kv))
    rows = num_programs * H_kv * triton.cdiv(H // H_kv, TILE_G)
    # Axis 0 of a grid may have 2^31 - 1 programs, axis 1 only 65,535: the chunks of one context.
    decode_kernel[(rows, num_chunks)](
        q, k_cache, v_cache, out,
        *(partials or (None, None, None)),
        block_tables, query_start_locs, context_lens, context_starts,
        factor, B, N, chunk_len,
        block_tables.stride(0), *q.stride()[:2], *k_cache.stride()[:3], *out.stride()[:2],
        NUM_KV_HEADS=H_kv, GROUP=H // H_kv, TILE_G=TILE_G,
        HEAD_DIM=D, TILE_D=tile_d(D), BLOCK_SIZE=block_size,
        SPLIT=chunk_len > 0,
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
        **decode_tiles(q.dtype, D),
    )  # fmt: skip
    return partials


def merge_chunks(
    partials: tuple[Tensor, Tensor, Tensor],  # m, l and acc of `decode_chunks`
    query_start_locs: Tensor,  # (B + 1,) int32
    context_lens: Tensor,  # (B,) int32
    context_starts: Tensor | None,  # (B,) int32
    out: Tensor,  # (N, H, D)
    chunk_len: int,
) -> None:
    """Launch the merge kernel: merge the chunks of each sequence into its row of `out`."""
    N, H, D = out.shape
    num_programs, _, num_chunks = partials[0].shape
    # One warp. It folds 1,024 sums at a time, 32 a thread; more warps would need a barrier.
    merge_kernel[(num_programs * H,)](
        out,
        *partials,
        query_start_locs,
        context_lens,
        context_starts,
        len(context_lens),
        N,
        chunk_len,
        num_chunks,
        *out.stride()[:2],
        NUM_HEADS=H,
        HEAD_DIM=D,
        TILE_D=tile_d(D),
        TILE_C=max(1, 1024 // tile_d(D)),
        num_warps=1,
    )


def paged_decode_triton(
    q: Tensor,  # (N, H, D)
    k_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    v_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    block_tables: Tensor,  # (B, max_blocks) int32
    query_start_locs: Tensor,  # (B + 1,) int32
    context_lens: Tensor,  # (B,) int32
    scale: float,
    max_query_len: int,
    max_context_len: int,
    context_starts: Tensor | None = None,  # (B,) int32
    out: Tensor | None = None,  # (N, H, D)
    chunk_len: int | None = None,
) -> Tensor:
    """Attention of all sequences with exactly one query; other sequences' rows are not written.

    `chunk_len` is the tokens a chunk; None lets `choose_chunk_len` choose, 0 never splits. With a
    fixed number the result of a sequence has the same bits in any batch. Raises as `check_launch`.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    check_launch(q=q, k_cache=k_cache, v_cache=v_cache, out=out)
    N = q.shape[0]
    B = block_tables.shape[0]
    if chunk_len is None:
        chunk_len = choose_chunk_len(B, k_cache.shape[1], max_context_len)
    num_chunks = max(1, triton.cdiv(max_context_len, chunk_len)) if chunk_len else 1
    # Program i computes sequence i, and zeroes row i of out if that is a padded row. A batch with
    # longer queries goes to the prefill kernel too, which zeroes the padded rows.
    num_programs = max(N, B) if max_query_len <= 1 else B
    if N == 0 or num_programs == 0:
        return out
    partials = decode_chunks(
        q,
        k_cache,
        v_cache,
        block_tables,
        query_start_locs,
        context_lens,
        context_starts,
        scale,
        out,
        num_programs,
        num_chunks,
        chunk_len,
    )
    if partials:
        merge_chunks(partials, query_start_locs, context_lens, context_starts, out, chunk_len)
    return out


def paged_attention_triton(
    q: Tensor,  # (N, H, D)
    k_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    v_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    block_tables: Tensor,  # (B, max_blocks) int32
    query_start_locs: Tensor,  # (B + 1,) int32
    context_lens: Tensor,  # (B,) int32
    scale: float,
    max_query_len: int,
    max_context_len: int,
    context_starts: Tensor | None = None,  # (B,) int32
    out: Tensor | None = None,  # (N, H, D)
) -> Tensor:
    """`paged_attention` of paged_attention.py on the GPU, for any batch; returns (N, H, D).

    A batch of prompts and decoding sequences is two launches: the prefill kernel would multiply a
    tile of 64 queries for each decoding sequence, 63 of them padding. Each kernel writes only its
    own rows. The host decides by `max_query_len`, so no value is read from the device.
    """
    arguments = (
        q,
        k_cache,
        v_cache,
        block_tables,
        query_start_locs,
        context_lens,
        scale,
        max_query_len,
        max_context_len,
        context_starts,
    )
    out = paged_decode_triton(*arguments, out)
    if max_query_len <= 1:
        return out
    return paged_prefill_triton(*arguments, out, skip_decode=True)


# --------------------------------------------------------------------------------------------------
def demo():
    """Two contexts in chunks: the partial results of each chunk, and what they merge to."""
    if not can_launch():
        return
    lengths = [600, 100]
    H, D = 2, 16
    scale = D**-0.5
    torch.manual_seed(0)
    with torch.device("cpu" if INTERPRETED else "cuda"):
        k_cache, v_cache = torch.randn(2, 46, 1, 16, D)
        tables = torch.randperm(46, dtype=torch.int32).expand(2, 46)  # b shares a's first blocks
        context_lens = torch.tensor(lengths, dtype=torch.int32)
        locs = torch.tensor([0, 1, 2], dtype=torch.int32)
        q = torch.randn(2, H, D)
    batch = (q, k_cache, v_cache, tables, locs, context_lens)
    out = torch.empty_like(q)
    partials = decode_chunks(*batch, None, scale, out, 2, 3, CHUNK_LEN)
    merge_chunks(partials, locs, context_lens, None, out, CHUNK_LEN)
    print(f"contexts of {lengths} tokens in chunks of {CHUNK_LEN}, one query each, head 0\n")
    print("sequence  tokens        m (log2)       l   share of the result")
    for i, length in enumerate(lengths):
        starts = range(0, length, CHUNK_LEN)  # b has one chunk; the other two are not written
        m, l = (partial[i, 0, : len(starts)] for partial in partials[:2])
        shares = l * torch.exp2(m - m.max())
        shares /= shares.sum()
        for chunk, start in enumerate(starts):
            tokens = f"[{start}, {min(length, start + CHUNK_LEN)})"
            numbers = f"{m[chunk]:9.3f} {l[chunk]:7.2f} {shares[chunk]:12.0%}"
            print(f"{'ab'[i]:^8}  {tokens:12} {numbers}")
    want = paged_attention(*batch, scale, 1, max(lengths))
    errors = {"merged": out - want}
    for chunk_len in (0, 7, 100):
        result = paged_decode_triton(*batch, scale, 1, max(lengths), chunk_len=chunk_len)
        errors[f"chunk_len {chunk_len}"] = result - want
    print(f"\ndistance from the oracle, {'interpreted' if INTERPRETED else 'compiled'}:")
    for name, error in errors.items():
        print(f"  {name:14} {error.abs().max().item():.1e}")
    assert all(error.abs().max() < 1e-5 for error in errors.values())
    print("ok: chunks of any length merge to the same attention")


if __name__ == "__main__":
    demo()
