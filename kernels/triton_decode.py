"""The same attention on the GPU for one query a sequence: the context cut in chunks, then merged.

A decode step asks one question per sequence and reads its whole context for the answer: of GPT-2
36,864 bytes a token, for 18,432 multiplications. So the time is the time to read, and a GPU reads
at full speed only while all its parts have loads under way. A long batch brings enough programs,
one for each sequence and head; a single sequence of 8,000 tokens brings 12, to a chip with room for
800. Then its context is cut in chunks of fixed length, a program each, that end with three partial
results instead of one. They merge by the equations that they were made by:

    chunk 0 |tokens 0..255  | m0 l0 acc0 \\     m = max(m0, m1, ..)
    chunk 1 |tokens 256..511| m1 l1 acc1  >    l = sum(l_c e^(m_c - m))
    chunk 2 |tokens 512..599| m2 l2 acc2 /   acc = sum(acc_c e^(m_c - m)), out = acc / l

The query heads that share a head of K and V are rows of one small matrix product, so the shared
head is read once. The end of the file is the dispatch between this kernel and the one for many
queries: what an engine calls. (`triton_fused_decode.py` writes the new key and value and merges in
the same launch.) What a production engine does beyond this: 8-bit keys and values.

Dao et al. 2023, "Flash-Decoding for long-context inference"; Milakov and Gimelshein 2018,
arXiv:1805.02867, section 3.1: the merge is associative.
Run: python -m kernels.triton_decode
Try: in the demo, a chunk_len of 7, or of 1; or give an absent chunk m = 0 instead of -inf.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, just below

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

CHUNK_LEN = 256  # tokens: 4 tiles, long enough that the merge costs little beside the reading


@triton.jit
def zero_if_unowned(row, query_start_locs, num_seqs, num_rows, to, inside):
    """Rows of out behind the last sequence belong to nobody: zero this one if it is such a row."""
    if (row >= tl.load(query_start_locs + num_seqs)) & (row < num_rows):
        tl.store(to, tl.zeros(to.shape, to.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["num_seqs", "num_rows", "chunk_len", "stride_table"])
def decode_kernel(
    q, k_cache, v_cache, out,  # as in `paged_decode_triton`; `out` is written where SPLIT is False
    partial_m, partial_l, partial_acc,  # of `decode_chunks`: written where it is True, else None
    block_tables, query_start_locs, context_lens, context_starts,
    factor, num_seqs, num_rows,  # scale x log2(e), B and N
    chunk_len,  # tokens a chunk, where SPLIT is True
    stride_table, stride_q_row, stride_q_head,  # strides in elements: from one row of a table, ..
    stride_block, stride_head, stride_token,  # of k_cache, and of v_cache too
    stride_out_row, stride_out_head,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,  # H_kv, and H // H_kv heads that share one
    TILE_G: tl.constexpr,  # rows of the product: GROUP rounded up to a power of two, at most 16
    HEAD_DIM: tl.constexpr, TILE_D: tl.constexpr,  # the latter rounded up to a power of two
    BLOCK_SIZE: tl.constexpr, TILE_K: tl.constexpr,  # tokens a block, tokens a tile
    SPLIT: tl.constexpr,  # True: this program reads one chunk and leaves partial results
    UPCAST: tl.constexpr,  # compute in 32 bits what the interpreter can't in 16
):  # fmt: skip
    """One program: the one query of a sequence, the heads that share a head of K and V, a chunk."""
    GROUP_TILES: tl.constexpr = (GROUP + TILE_G - 1) // TILE_G  # 1, unless more than 16 heads share
    # Neighbours are the heads of one sequence, whose K and V lie in the same blocks.
    kv_head = tl.program_id(0) // GROUP_TILES % NUM_KV_HEADS
    i = (tl.program_id(0) // (NUM_KV_HEADS * GROUP_TILES)).to(tl.int64)
    group = tl.program_id(0) % GROUP_TILES * TILE_G + tl.arange(0, TILE_G)[:, None]
    head, dim = kv_head * GROUP + group, tl.arange(0, TILE_D)[None, :]
    inside = (group < GROUP) & (dim < HEAD_DIM)
    to = out + head * stride_out_head + dim
    if not SPLIT:
        at = to + i * stride_out_row
        zero_if_unowned(i, query_start_locs, num_seqs, num_rows, at, inside)
    if i >= num_seqs:
        return
    row = tl.load(query_start_locs + i).to(tl.int64)
    if tl.load(query_start_locs + i + 1) - row != 1:  # nothing to do, or too much for this kernel
        return
    first, end = 0, tl.load(context_lens + i)
    if context_starts is not None:
        first = tl.load(context_starts + i)
    if SPLIT:
        first += tl.program_id(1) * chunk_len
        end = tl.minimum(end, first + chunk_len)
        if first >= end:  # the context ends before this chunk, and the merge knows it
            return

    queries = tl.load(q + row * stride_q_row + head * stride_q_head + dim, inside, other=0.0)
    queries = queries.to(tl.float32) if UPCAST else queries
    last = tl.full([TILE_G], 0, tl.int32) + end - 1  # all heads ask the same query
    full = first + tl.maximum(end - first, 0) // TILE_K * TILE_K
    table, k_head = block_tables + i * stride_table, kv_head * stride_head
    kv = (table, k_cache + k_head, v_cache + k_head, stride_block, stride_token)
    m, l, acc = walk(queries, last, factor, first, full, end, kv, HEAD_DIM, BLOCK_SIZE, TILE_K)
    if SPLIT:
        place = (i * NUM_KV_HEADS * GROUP + head) * tl.num_programs(1) + tl.program_id(1)
        tl.store(partial_m + place, m[:, None], group < GROUP)
        tl.store(partial_l + place, l[:, None], group < GROUP)
        tl.store(partial_acc + place * HEAD_DIM + dim, acc, inside)
    else:
        result = acc / tl.where(l == 0, 1.0, l)[:, None]
        tl.store(to + row * stride_out_row, result.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["num_seqs", "num_rows", "chunk_len", "num_chunks"])
def merge_kernel(
    out,  # (N, H, D)
    partial_m, partial_l, partial_acc,  # of `decode_chunks`
    query_start_locs, context_lens, context_starts,
    num_seqs, num_rows, chunk_len,  # B, N, tokens a chunk
    num_chunks,  # that the partial results have room for
    stride_out_row, stride_out_head,  # in elements
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_D: tl.constexpr,  # HEAD_DIM rounded up
    TILE_C: tl.constexpr,  # chunks folded at a time
):  # fmt: skip
    """One program: one sequence and one query head. The fold again, of chunks and not of tokens."""
    head, i = tl.program_id(0) % NUM_HEADS, (tl.program_id(0) // NUM_HEADS).to(tl.int64)
    dim = tl.arange(0, TILE_D)
    to = out + head * stride_out_head + dim
    at = to + i * stride_out_row
    zero_if_unowned(i, query_start_locs, num_seqs, num_rows, at, dim < HEAD_DIM)
    if i >= num_seqs:
        return
    row = tl.load(query_start_locs + i).to(tl.int64)
    if tl.load(query_start_locs + i + 1) - row != 1:
        return
    length = tl.load(context_lens + i)
    if context_starts is not None:
        length -= tl.load(context_starts + i)
    # Chunks behind the end were never written: their places hold whatever lay there before.
    present = tl.cdiv(tl.maximum(length, 0), chunk_len)

    m = tl.full([1], float("-inf"), partial_m.dtype.element_ty)
    l = tl.zeros_like(m)
    acc = tl.zeros([TILE_D], m.dtype)
    for first_chunk in range(0, present, TILE_C):
        chunk = first_chunk + tl.arange(0, TILE_C)
        place, inside = (i * NUM_HEADS + head) * num_chunks + chunk, chunk < present
        chunk_m = tl.load(partial_m + place, inside, other=float("-inf"))
        chunk_l = tl.load(partial_l + place, inside, other=0.0)
        sums = partial_acc + place[:, None] * HEAD_DIM + dim
        chunk_acc = tl.load(sums, inside[:, None] & (dim < HEAD_DIM), other=0.0)
        m_new = tl.maximum(m, tl.max(chunk_m, 0))  # finite: a chunk that is present read a token
        shrink, weight = tl.exp2(m - m_new), tl.exp2(chunk_m - m_new)
        l = l * shrink + tl.sum(chunk_l * weight, 0)
        acc = acc * shrink + tl.sum(chunk_acc * weight[:, None], 0)
        m = m_new
    result = acc / tl.where(l == 0, 1.0, l)
    tl.store(to + row * stride_out_row, result.to(out.dtype.element_ty), dim < HEAD_DIM)


def choose_chunk_len(num_seqs: int, num_kv_heads: int, max_context_len: int) -> int:
    """Tokens a chunk, or 0: one program walks the whole context.

    From 128 programs on a chip is busy without chunks, and every chunk costs a write and a read of
    its partial results. vLLM's kernel draws the line at the same 128. It is a constant, no question
    to the device, so that the same call does the same sums everywhere.
    """
    enough_programs = num_seqs * num_kv_heads >= 128
    return 0 if enough_programs or max_context_len <= CHUNK_LEN else CHUNK_LEN


def decode_tiles(dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """Tokens a tile, and how many threads and copies work on it.

    To read at full speed each of a GPU's processors wants about 48 KB under way. A tile of 8 KB of
    K and 8 KB of V (64 tokens of GPT-2), the next one copied while one is multiplied, leaves room
    for at least three programs on each. `num_stages` counts the read of the table as one more.
    """
    row_bytes = tile_d(head_dim) * dtype.itemsize
    TILE_K = min(64, max(16, 8192 // row_bytes))
    # 64-bit heads of 256: the least tile is 32 KB, too much for the registers of 4 warps.
    return {"TILE_K": TILE_K, "num_warps": 4 if row_bytes <= 1024 else 8, "num_stages": 3}


def decode_chunks(
    # (N, H, D), and twice (num_blocks + 1, H_kv, block_size, D)
    q: Tensor, k_cache: Tensor, v_cache: Tensor,
    # (B, max_blocks), (B + 1,), (B,) and (B,), all int32
    block_tables: Tensor, query_start_locs: Tensor, context_lens: Tensor,
    context_starts: Tensor | None, scale: float, out: Tensor,
    num_programs: int,  # sequences, or more where rows of nobody are to be zeroed
    num_chunks: int, chunk_len: int,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """Launch the decode kernel. With chunks of 0 tokens it writes `out` and there is no more to do.

    Otherwise returns what `merge_chunks` wants: m and l (num_programs, H, num_chunks) and acc
    (num_programs, H, num_chunks, D), unwritten where a sequence has no such chunk.
    """
    (N, H, D), (_, H_kv, block_size, _), B = q.shape, k_cache.shape, block_tables.shape[0]
    partials = None
    if chunk_len:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        sizes = [(num_programs, H, num_chunks, *rest) for rest in ((), (), (D,))]
        partials = tuple(torch.empty(size, dtype=dtype, device=q.device) for size in sizes)
    q, factor = scale_to_exp2(q, scale)
    # A tensor core multiplies 16 rows or fewer at one price; more would crowd out the registers.
    TILE_G = min(16, triton.next_power_of_2(H // H_kv))
    rows = num_programs * H_kv * triton.cdiv(H // H_kv, TILE_G)
    where = (block_tables, query_start_locs, context_lens, context_starts)
    strides = (block_tables.stride(0), *q.stride()[:2], *k_cache.stride()[:3], *out.stride()[:2])
    # Axis 0 may be as long as 2^31, axis 1 only 65,535: that many chunks of one context.
    decode_kernel[(rows, num_chunks)](
        q, k_cache, v_cache, out, *(partials or (None, None, None)), *where, factor, B, N,
        chunk_len, *strides, NUM_KV_HEADS=H_kv, GROUP=H // H_kv, TILE_G=TILE_G, HEAD_DIM=D,
        TILE_D=tile_d(D), BLOCK_SIZE=block_size, SPLIT=chunk_len > 0,
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16, **decode_tiles(q.dtype, D),
    )  # fmt: skip
    return partials


def merge_chunks(
    partials: tuple[Tensor, Tensor, Tensor],
    # (B + 1,), (B,) and (B,) int32, and (N, H, D)
    query_start_locs: Tensor, context_lens: Tensor, context_starts: Tensor | None, out: Tensor,
    chunk_len: int,
) -> None:  # fmt: skip
    """Launch the merge kernel: what the chunks of each sequence hold becomes its row of `out`."""
    (N, H, D), (num_programs, _, num_chunks) = out.shape, partials[0].shape
    sizes = (len(context_lens), N, chunk_len, num_chunks)
    # 1,024 partial sums are 32 a thread of one warp: too little work to be worth a barrier.
    merge_kernel[(num_programs * H,)](
        out, *partials, query_start_locs, context_lens, context_starts, *sizes, *out.stride()[:2],
        NUM_HEADS=H, HEAD_DIM=D, TILE_D=tile_d(D), TILE_C=max(1, 1024 // tile_d(D)), num_warps=1,
    )  # fmt: skip


def paged_decode_triton(
    # (N, H, D), and twice (num_blocks + 1, H_kv, block_size, D)
    q: Tensor, k_cache: Tensor, v_cache: Tensor,
    # (B, max_blocks), (B + 1,) and (B,), all int32
    block_tables: Tensor, query_start_locs: Tensor, context_lens: Tensor,
    scale: float, max_query_len: int, max_context_len: int,
    # (B,) int32 and (N, H, D)
    context_starts: Tensor | None = None, out: Tensor | None = None, chunk_len: int | None = None,
) -> Tensor:  # fmt: skip
    """The rows of all sequences with exactly one query; other sequences' rows are left as they are.

    `chunk_len` None picks. A positive number forces chunks of that many tokens: a sequence's result
    is then bit for bit the same whatever batch it is in. 0 never splits.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    check_launch(q=q, k_cache=k_cache, v_cache=v_cache, out=out)
    N, B, H_kv = q.shape[0], block_tables.shape[0], k_cache.shape[1]
    if chunk_len is None:
        chunk_len = choose_chunk_len(B, H_kv, max_context_len)
    num_chunks = max(1, triton.cdiv(max_context_len, chunk_len)) if chunk_len else 1
    # Program i answers sequence i, and zeroes row i of out if that belongs to nobody. Where there
    # are longer queries too, the prefill kernel zeroes them.
    num_programs = max(N, B) if max_query_len <= 1 else B
    if N == 0 or num_programs == 0:
        return out
    where = (query_start_locs, context_lens, context_starts)
    sizes = (num_programs, num_chunks, chunk_len)
    partials = decode_chunks(q, k_cache, v_cache, block_tables, *where, scale, out, *sizes)
    if partials:
        merge_chunks(partials, *where, out, chunk_len)
    return out


def paged_attention_triton(
    # (N, H, D), and twice (num_blocks + 1, H_kv, block_size, D)
    q: Tensor, k_cache: Tensor, v_cache: Tensor,
    # (B, max_blocks), (B + 1,) and (B,), all int32
    block_tables: Tensor, query_start_locs: Tensor, context_lens: Tensor,
    scale: float, max_query_len: int, max_context_len: int,
    # (B,) int32 and (N, H, D)
    context_starts: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`paged_attention` of paged_attention.py on the GPU, for any batch; returns (N, H, D).

    A tile of 64 queries with one real query in it would multiply 63 rows of nothing, so a batch of
    prompts and decoding sequences is two launches, each of which leaves the other's rows alone. No
    value is read from the device: it is `max_query_len`, known to the host, that decides.
    """
    arguments = (q, k_cache, v_cache, block_tables, query_start_locs, context_lens, scale)
    arguments += (max_query_len, max_context_len, context_starts)
    out = paged_decode_triton(*arguments, out)
    if max_query_len <= 1:
        return out
    return paged_prefill_triton(*arguments, out, skip_decode=True)


# --------------------------------------------------------------------------------------------------
def demo():
    """Two contexts in chunks: what each chunk knows, and that any chunks merge to one result."""
    if not can_launch():
        return
    context_lens, H, D = [600, 100], 2, 16
    torch.manual_seed(0)
    with torch.device("cpu" if INTERPRETED else "cuda"):
        k_cache, v_cache = torch.randn(2, 46, 1, 16, D)
        tables = torch.randperm(46, dtype=torch.int32).expand(2, 46)  # b shares a's first blocks
        lens = torch.tensor(context_lens, dtype=torch.int32)
        q = torch.randn(6, H, D)
        locs = torch.tensor([[0, 1, 2], [0, 1, 6]], dtype=torch.int32)
    decode = (q[:2], k_cache, v_cache, tables, locs[0], lens)
    mixed = (q, k_cache, v_cache, tables, locs[1], lens)  # one query of a, a chunk of b's prompt
    out = torch.empty_like(q[:2])
    partials = decode_chunks(*decode, None, D**-0.5, out, 2, 3, CHUNK_LEN)
    merge_chunks(partials, locs[0], lens, None, out, CHUNK_LEN)
    print(f"contexts of {context_lens} tokens in chunks of {CHUNK_LEN}, one query each, head 0\n")
    print("sequence  tokens        m (log2)       l   share of the result")
    for i, length in enumerate(context_lens):
        starts = range(0, length, CHUNK_LEN)  # chunks from here to the third are not there
        m, l = (x[i, 0, : len(starts)].tolist() for x in partials[:2])
        weights = [b * 2 ** (a - max(m)) for a, b in zip(m, l, strict=True)]
        for start, a, b, weight in zip(starts, m, l, weights, strict=True):
            tokens = f"[{start}, {min(length, start + CHUNK_LEN)})"
            print(f"{'ab'[i]:^8}  {tokens:12} {a:9.3f} {b:7.2f} {weight / sum(weights):12.0%}")
    rest = (D**-0.5, 1, max(context_lens))
    want = paged_attention(*decode, *rest)
    results = {
        f"chunk_len {n}": paged_decode_triton(*decode, *rest, chunk_len=n) for n in (0, 7, 100)
    }
    errors = {name: result - want for name, result in ({"merged": out} | results).items()}
    rest = (D**-0.5, 5, max(context_lens))
    errors["two launches"] = paged_attention_triton(*mixed, *rest) - paged_attention(*mixed, *rest)
    print(f"\ndistance from the oracle, {'interpreted' if INTERPRETED else 'compiled'}:")
    for name, error in errors.items():
        print(f"  {name:14} {error.abs().max().item():.1e}")
    assert all(error.abs().max() < 1e-5 for error in errors.values())
    print("ok: a context may be cut anywhere, its parts merge to the same attention")


if __name__ == "__main__":
    demo()
