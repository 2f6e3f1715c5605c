"""A decode step's KV write, attention and merge in one launch: the last program to finish merges.

For each layer a decode step of the 124M GPT-2 launches one kernel that writes the new keys and
values, one for attention and, for few sequences, one that merges the chunks: 36 launches in 12
layers, of about 150 in all. A launch begins only when the one before it has ended. But nothing
needs such a barrier over all sequences:

- The program that owns a sequence's last chunk can read the new token's k and v from the QKV
  product. It stores them in the pool and folds the token into its sums from registers.
- A merge needs the chunks of its own sequence only. Each program writes its partial results, then
  adds 1 to a counter. The program that finds the counter at num_chunks - 1 is the last, and merges:

    one sequence, one head, chunk_len 256, context 600; its programs in the order they finished:
    chunk 0  reads [0, 256)                             m l acc -> memory   counter 0 -> 1
    chunk 2  reads [512, 599), writes and folds 599     m l acc -> memory   counter 1 -> 2
    chunk 1  reads [256, 512)                           m l acc -> memory   counter 2 -> 3
             found 2 = num_chunks - 1, so it folds chunks 0, 1, 2, writes the row of out,
             and sets the counter to 0 for the next launch

No program reads the new slot in this launch, because a read would have to wait for the write. Which
program finishes last differs from run to run. The result does not, to the last bit, because chunks
are folded in the order of their numbers.

How it is checked: against dense attention in float64 and against `fused_decode` below, the same in
PyTorch (tests/kernels/test_triton_fused_decode.py). A production engine also rotates q and k in
this launch, which GPT-2 does not need.

NVIDIA, CUDA C++ Programming Guide, "Memory Fence Functions": a sum that the last block completes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.triton_decode import (
    MAX_GROUP_ROWS,
    choose_chunk_len,
    decode_tiles,
    empty_partials,
)
from kernels.triton_prefill import (
    INTERPRETED,
    check_launch,
    scale_to_exp2,
    tile_d,
    tl,
    triton,
    walk,
)
from kv_cache import write_kv
from paged_attention import paged_attention


# ---- parts of the kernel -------------------------------------------------------------------------
@triton.jit
def write_new_token(
    k_row, v_row,  # pointers to the new token's k and v of one head
    k_cache, v_cache, head_offset,  # the latter in elements: where the head is in block 0
    slot_mapping,  # pointer to the token's slot
    stride_block, stride_token,  # in elements
    dim,  # (1, TILE_D)
    is_read, is_written,  # (1, TILE_D) bool
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Copy the new token's k and v to its slot; returns both, (1, TILE_D), in the pool's type.

    They are rounded to that type so that this step computes with the numbers that later steps read.
    """
    new_k = tl.load(k_row + dim, is_read, other=0.0).to(k_cache.dtype.element_ty)
    new_v = tl.load(v_row + dim, is_read, other=0.0).to(v_cache.dtype.element_ty)
    slot = tl.load(slot_mapping).to(tl.int64)
    at = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_token + head_offset + dim
    tl.store(k_cache + at, new_k, is_written)
    tl.store(v_cache + at, new_v, is_written)
    return new_k, new_v


@triton.jit
def fold_new_token(
    m, l, acc,  # (R,), (R,), (R, TILE_D)
    q,  # (R, TILE_D)
    k, v,  # (1, TILE_D) both
    factor,
):  # fmt: skip
    """`fold_block` of paged_attention.py for one token in registers: the new m, l and acc.

    Plain sums instead of tl.dot: a product of tiles has at least 16 columns, and 15 of them would
    be padding.
    """
    scores = tl.sum(q.to(m.dtype) * k.to(m.dtype), 1) * factor  # (R,)
    # `fold_tile` guards against m_new = -inf. Here every row reads the new token, so m_new is -inf
    # or NaN only if the model's own numbers are broken, and then the result is to be NaN.
    m_new = tl.maximum(m, scores)
    shrink = tl.exp2(m - m_new)  # 0 if nothing was read before: 2^-inf
    p = tl.exp2(scores - m_new)
    return m_new, l * shrink + p, acc * shrink[:, None] + p[:, None] * v.to(m.dtype)


@triton.jit
def arrive(counter):
    """Announce that this program's partial results are in memory; returns how many did so before.

    The barrier waits until all threads of this program have stored their parts. Then one thread
    adds 1 to the counter. "acq_rel" means two things. Release: a program that reads the new count
    also sees the stores made before it. Acquire: from here on this program sees the parts that
    other programs stored before they added 1. All threads wait for the result of the addition.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


@triton.jit
def fold_chunks(
    partial_m, partial_l, partial_acc,  # (N, H, num_chunks) twice, (N, H, num_chunks, D)
    row,  # (R,), where each head's chunk 0 is in partial_m; its other chunks follow
    dim,  # (1, TILE_D)
    num_present,  # chunks to fold
    HEAD_DIM: tl.constexpr, TILE_C: tl.constexpr,  # TILE_C: chunks folded at a time
):  # fmt: skip
    """Merge the partial results of a sequence's chunks: returns l (R,) and acc (R, TILE_D).

    Chunks are folded from the first to the last, so sums round the same way in every run. TILE_C
    chunks are loaded at once, so that the program waits for memory once and not TILE_C times.
    """
    m = tl.full([row.shape[0]], float("-inf"), partial_m.dtype.element_ty)
    l = tl.zeros_like(m)
    acc = tl.zeros([row.shape[0], dim.shape[1]], m.dtype)
    for first_chunk in range(0, num_present, TILE_C):
        chunk = first_chunk + tl.arange(0, TILE_C)[:, None]  # (TILE_C, 1)
        at = row[None, :] + chunk  # (TILE_C, R)
        present = chunk < num_present
        # ".cg" reads from the L2 cache, which all processors share. A processor's L1 cache does not
        # see the stores of others and may still hold older values.
        chunk_m = tl.load(partial_m + at, present, other=float("-inf"), cache_modifier=".cg")
        chunk_l = tl.load(partial_l + at, present, other=0.0, cache_modifier=".cg")
        sums = partial_acc + at[:, :, None] * HEAD_DIM + dim[None, :, :]
        inside = present[:, :, None] & (dim < HEAD_DIM)[None, :, :]
        chunk_acc = tl.load(sums, inside, other=0.0, cache_modifier=".cg")  # (TILE_C, R, TILE_D)
        m_new = tl.maximum(m, tl.max(chunk_m, 0))  # not -inf: each chunk that is present has tokens
        shrink = tl.exp2(m - m_new)
        weight = tl.exp2(chunk_m - m_new[None, :])  # 2^(m_c - m)
        l = l * shrink + tl.sum(chunk_l * weight, 0)
        acc = acc * shrink[:, None] + tl.sum(chunk_acc * weight[:, :, None], 0)
        m = m_new
    return l, acc


# ---- the kernel ----------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["chunk_len", "stride_table"])
def fused_decode_kernel(
    q, k, v, k_cache, v_cache, out,  # those of `fused_decode_triton`, as are the next three
    slot_mapping, block_tables, context_lens,
    partial_m, partial_l, partial_acc,  # as in `fold_chunks`; None where SPLIT is False
    arrived,  # a counter for each program of axis 0; None where SPLIT is False
    factor, chunk_len,  # scale * log2(e), and tokens a chunk, where SPLIT is True
    stride_table, stride_q_row, stride_q_head,  # strides in elements: from row to row of tables, ..
    stride_k_row, stride_k_head, stride_v_row, stride_v_head,
    stride_block, stride_head, stride_token,  # of k_cache, and of v_cache too
    stride_out_row, stride_out_head,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,  # H_kv, and H // H_kv heads that share one
    TILE_G: tl.constexpr,  # rows of the product: GROUP rounded up to a power of two, at most 16
    HEAD_DIM: tl.constexpr, TILE_D: tl.constexpr,  # D, and D rounded up to a power of two
    BLOCK_SIZE: tl.constexpr, TILE_K: tl.constexpr,  # tokens a block, tokens a tile
    TILE_C: tl.constexpr,  # chunks merged at a time
    SPLIT: tl.constexpr,  # True: this program reads one chunk, and the last one merges them all
    UPCAST: tl.constexpr,  # True: the interpreter can't multiply bfloat16, so compute in 32 bits
):  # fmt: skip
    """One program: the query of one sequence, up to 16 heads that share K and V, one chunk."""
    GROUP_TILES: tl.constexpr = (GROUP + TILE_G - 1) // TILE_G  # 1, unless more than 16 heads share
    # Programs with neighbouring ids work on heads of one sequence, so they read the same blocks.
    kv_head = tl.program_id(0) // GROUP_TILES % NUM_KV_HEADS
    i = (tl.program_id(0) // (NUM_KV_HEADS * GROUP_TILES)).to(tl.int64)  # the sequence
    group = tl.program_id(0) % GROUP_TILES * TILE_G + tl.arange(0, TILE_G)
    head = kv_head * GROUP + group  # (TILE_G,)
    dim = tl.arange(0, TILE_D)[None, :]
    inside = (group < GROUP)[:, None] & (dim < HEAD_DIM)  # (TILE_G, TILE_D)
    to = out + i * stride_out_row + head[:, None] * stride_out_head + dim
    context_len = tl.load(context_lens + i)
    if context_len <= 0:  # a padded row: nothing is read or written but zeros in out
        zeros = tl.zeros([TILE_G, TILE_D], out.dtype.element_ty)
        tl.store(to, zeros, inside & (tl.program_id(1) == 0))
        return
    first = 0
    stop = context_len
    if SPLIT:
        first += tl.program_id(1) * chunk_len
        stop = tl.minimum(stop, first + chunk_len)
        if first >= stop:  # the sequence has no such chunk; the counter does not wait for it
            return

    # The new token is the last of the context. Its k and v are loaded before the walk, so that they
    # have arrived when the walk is done.
    owns_new = stop == context_len
    is_new = owns_new & (dim < HEAD_DIM)
    k_row = k + i * stride_k_row + kv_head * stride_k_head
    v_row = v + i * stride_v_row + kv_head * stride_v_head
    head_offset = kv_head * stride_head
    # With more than 16 heads several programs own the same new token: the first of them writes it.
    is_written = is_new & (tl.program_id(0) % GROUP_TILES == 0)
    new_k, new_v = write_new_token(
        k_row, v_row, k_cache, v_cache, head_offset, slot_mapping + i, stride_block, stride_token,
        dim, is_new, is_written, BLOCK_SIZE,
    )  # fmt: skip

    query = q + i * stride_q_row + head[:, None] * stride_q_head + dim
    queries = tl.load(query, inside, other=0.0)
    queries = queries.to(tl.float32) if UPCAST else queries
    end = tl.minimum(stop, context_len - 1)  # the walk ends before the slot that was just written
    last = tl.full([TILE_G], 0, tl.int32) + end - 1  # all rows are heads of the same query
    full = first + (end - first) // TILE_K * TILE_K  # [first, full): whole tiles
    table = block_tables + i * stride_table
    kv = (table, k_cache + head_offset, v_cache + head_offset, stride_block, stride_token)
    m, l, acc = walk(queries, last, factor, first, full, end, kv, HEAD_DIM, BLOCK_SIZE, TILE_K)
    if owns_new:
        m, l, acc = fold_new_token(m, l, acc, queries, new_k, new_v, factor)
    if SPLIT:
        num_present = tl.cdiv(context_len, chunk_len)
        if num_present > 1:  # a context of one chunk needs no merge and no counter
            # Rows of the tile beyond the group repeat its last head: finite values, never stored.
            a_head = kv_head * GROUP + tl.minimum(group, GROUP - 1)
            row = (i * NUM_KV_HEADS * GROUP + a_head) * tl.num_programs(1)
            index = row + tl.program_id(1)
            tl.store(partial_m + index, m, group < GROUP)
            tl.store(partial_l + index, l, group < GROUP)
            tl.store(partial_acc + index[:, None] * HEAD_DIM + dim, acc, inside)
            if arrive(arrived + tl.program_id(0)) < num_present - 1:
                return
            tl.store(arrived + tl.program_id(0), 0)  # all have counted: ready for the next launch
            l, acc = fold_chunks(
                partial_m, partial_l, partial_acc, row, dim, num_present, HEAD_DIM, TILE_C
            )
    tl.store(to, (acc / l[:, None]).to(out.dtype.element_ty), inside)


# ---- what is called ------------------------------------------------------------------------------
def num_arrivals(num_seqs: int, num_heads: int, num_kv_heads: int) -> int:
    """How many counters `fused_decode_triton` needs for a batch of so many sequences.

    One for each sequence and head of K and V: (8, 12, 12) -> 96. Where more than 16 query heads
    share a head of K and V they are several programs with a counter each: (8, 40, 2) -> 32.
    """
    group = num_heads // num_kv_heads
    return num_seqs * num_kv_heads * -(-group // MAX_GROUP_ROWS)


def check_step(
    q: Tensor,  # (N, H, D)
    k: Tensor,  # (N, H_kv, D)
    v: Tensor,  # (N, H_kv, D)
    k_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    v_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    slot_mapping: Tensor,  # (N,)
    block_tables: Tensor,  # (N, max_blocks)
    context_lens: Tensor,  # (N,)
    arrived: Tensor,  # (num_arrivals(N, H, H_kv),) or longer
    out: Tensor,  # (N, H, D)
) -> None:
    """Raise ValueError where the shapes contradict each other. No value is read from the device."""
    N, H, D = q.shape
    H_kv, block_size = k_cache.shape[1:3]
    if k_cache.dtype == torch.int8:
        raise ValueError("k_cache is int8: this kernel rounds nothing, use write_kv_triton")
    if len(block_tables) != N:
        given = f"{N} queries for {len(block_tables)} sequences"
        raise ValueError(f"{given}: this is for one each, use paged_attention_triton for others")
    if H % H_kv:
        raise ValueError(f"{H} query heads share {H_kv} of K and V: H must be a multiple of H_kv")
    cache = (len(k_cache), H_kv, block_size, D)
    expected = {
        "k": (k, (N, H_kv, D)),
        "v": (v, (N, H_kv, D)),
        "k_cache": (k_cache, cache),
        "v_cache": (v_cache, cache),
        "slot_mapping": (slot_mapping, (N,)),
        "context_lens": (context_lens, (N,)),
        "out": (out, (N, H, D)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}: beside the others it must be {shape}"
            )
    needed = num_arrivals(N, H, H_kv)
    if arrived.dtype != torch.int32 or not arrived.is_contiguous() or arrived.numel() < needed:
        given = f"arrived is {arrived.dtype} {tuple(arrived.shape)}, strides {arrived.stride()}"
        raise ValueError(f"{given}: it must be int32, contiguous, {needed} zeros or more")


def fused_decode_triton(
    q: Tensor,  # (N, H, D); of q, k and v only D must be contiguous: slices of the QKV product
    k: Tensor,  # (N, H_kv, D)
    v: Tensor,  # (N, H_kv, D)
    k_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    v_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    slot_mapping: Tensor,  # (N,) int64
    block_tables: Tensor,  # (N, max_blocks) int32
    context_lens: Tensor,  # (N,) int32
    scale: float,
    max_context_len: int,
    arrived: Tensor,  # (num_arrivals(N, H, H_kv),) int32, or longer
    out: Tensor | None = None,  # (N, H, D)
    chunk_len: int | None = None,
) -> Tensor:
    """Write each sequence's new token to its slot and attend for it; returns (N, H, D).

    Row i is sequence i, which has one query: a pure decode step. `context_lens` include the new
    token, `max_context_len` is an upper bound that the host knows. A padded row has a context of 0
    tokens: its row of the result is zero, and its k and v are not written. `chunk_len` means what
    it means in `paged_decode_triton`: a positive number gives a sequence the same bits in any
    batch, 0 never splits.

    `arrived` must be zeros before the first call, and each call leaves zeros. Calls that follow
    each other on one stream may share it; two streams may not. A captured graph reads it at the
    address that it had during capture, so the caller allocates it and keeps it.

    Raises ValueError for shapes that contradict each other and for too few counters, RuntimeError
    where no kernel can run.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    check_launch(q=q, k_cache=k_cache, v_cache=v_cache, out=out)
    check_launch(k=k, v=v)  # their dtype may differ from the pool's
    check_step(q, k, v, k_cache, v_cache, slot_mapping, block_tables, context_lens, arrived, out)
    N, H, D = q.shape
    _, H_kv, block_size, _ = k_cache.shape
    if N == 0:
        return out
    if chunk_len is None:
        chunk_len = choose_chunk_len(N, H_kv, max_context_len)
    num_chunks = max(1, triton.cdiv(max_context_len, chunk_len)) if chunk_len else 1
    if chunk_len:
        merge_arguments = (*empty_partials(N, num_chunks, q), arrived)
    else:
        merge_arguments = (None, None, None, None)
    q, factor = scale_to_exp2(q, scale)
    TILE_G = min(MAX_GROUP_ROWS, triton.next_power_of_2(H // H_kv))
    # Axis 0 of a grid may have 2^31 - 1 programs, axis 1 only 65,535: the chunks of one context.
    fused_decode_kernel[(num_arrivals(N, H, H_kv), num_chunks)](
        q, k, v, k_cache, v_cache, out,
        slot_mapping, block_tables, context_lens,
        *merge_arguments,  # m, l, acc and the counters
        factor, chunk_len,
        block_tables.stride(0), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *k_cache.stride()[:3], *out.stride()[:2],
        NUM_KV_HEADS=H_kv, GROUP=H // H_kv, TILE_G=TILE_G,
        HEAD_DIM=D, TILE_D=tile_d(D), BLOCK_SIZE=block_size,
        TILE_C=max(1, 2048 // (TILE_G * tile_d(D))),
        SPLIT=chunk_len > 0,
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
        **decode_tiles(q.dtype, D),
    )  # fmt: skip
    return out


def fused_decode(
    q: Tensor,  # (N, H, D)
    k: Tensor,  # (N, H_kv, D)
    v: Tensor,  # (N, H_kv, D)
    k_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    v_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    slot_mapping: Tensor,  # (N,) int64
    block_tables: Tensor,  # (N, max_blocks) int32
    context_lens: Tensor,  # (N,) int32
    scale: float,
    max_context_len: int,
) -> Tensor:
    """The same in PyTorch, for the tests: write, then attend; returns (N, H, D)."""
    write_kv(k, v, k_cache, v_cache, slot_mapping)
    locs = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)  # one query a sequence
    return paged_attention(
        q, k_cache, v_cache, block_tables, locs, context_lens, scale, 1, max_context_len
    )
