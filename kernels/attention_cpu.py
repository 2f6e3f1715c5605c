"""Decode attention on a CPU: the plain Numba loop, then the form that the engine uses.

Decode attention is limited by memory. A step of 32 sequences of 1,000 tokens reads 2.4 GB of keys
and values of GPT-2 in float32 and computes little with each number. Copying the blocks into one
contiguous tensor first would move these bytes three times, so both loops read them in place.

`attend_per_head` is the loop that one writes first: one (sequence, head) at a time. It visits each
block 12 times and reads 8 KB of it each time. In the pool, K and V of all heads of a block are
adjacent, so `paged_attention_cpu` reads all 98 KB of a block in one pass and then goes to the next:

    table [ 5, 0, 7 ]    block 5: K head 0 1 2 .. 11 | V head 0 1 2 .. 11     then block 0, block 7
                                  └─ scores ─┐            └─ weighted sum
                                             └─ 2^(score - m) ─┘       m, l, acc stay in cache

A context is cut into chunks of 256 tokens, and the threads share the chunks; if there are few, of
float32, they share the heads too. Each chunk yields its own m, l and acc, and `merge_chunks`
combines them by the same three equations. So one sequence keeps all threads busy, and a result
depends neither on the number of threads nor on the batch. Sequences with 10 or more new tokens go
to `prompt_cpu.py`. Measured for 32 sequences of 300 tokens in float32 on one AVX-512 core: 21 GB/s
of K and V, twice the speed of the plain loop and 1.4 times that of the library's attention on
contiguous memory.

Checked by tests/kernels/test_attention_cpu.py against dense attention in float64.
Dao et al. 2023, "Flash-Decoding for long-context inference" (chunks and merge).
Run: python -m kernels.attention_cpu
"""

import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.numba_tools import (
    HAS_NUMBA,
    compiled,
    compiled_in_order,
    compiled_parallel,
    flat_memory,
    inlined,
    power_of_two,
    prange,
    prefetch,
    prefetch_line,
    token_scale,
    use_openmp_threads,
    widen,
    worker_threads,
)
from kernels.prefill_cpu import (
    attend_prompt,
    check_pool,
    check_tensors,
    scale_index,
    write_kv_cpu,
)
from kernels.prompt_cpu import attend_prompts, can_attend_prompts
from paged_attention import paged_attention

__all__ = ["attend_per_head", "paged_attention_cpu", "write_kv_cpu"]

CHUNK_LEN = 256  # tokens; with GPT-2 in float32 a chunk is 1.6 MB of one layer's K and V
FEW_CHUNKS = 8  # a thread: with fewer chunks of float32 the threads share the heads as well
MANY_QUERIES = 10  # a sequence with so many new tokens is a prompt: prompt_cpu.py is faster
TOKENS_AT_ONCE = 16  # scores that are raised to powers together; a multiple of 4
HEADS_AHEAD = 2  # the kernel prefetches the K and V that it reads two heads later
MUST_PREFETCH = True  # False only to measure what prefetching saves
LOG2_E = math.log2(math.e)  # e^x = 2^(x log2(e)): the scale includes it, powers of two are cheaper


# ---- the plain form: one (sequence, head) at a time ----------------------------------------------
@compiled_parallel
def loop_per_head(q, k, v, strides, block_size, block_tables, context_lens, scale, out):
    """Decode attention as one writes it first. q and out are (B, H, D), k and v the flat pool.

    Each (sequence, head) walks its context block by block and keeps a running maximum m, a running
    sum l and a weighted sum acc, by the three equations of `paged_attention.py`.
    """
    B, H, D = q.shape
    block_stride, head_stride, token_stride = strides
    for pair in prange(B * H):
        i, h = pair // H, pair % H
        query = q[i, h]
        m, l = np.float32(-np.inf), np.float32(0)
        acc = np.zeros(D, np.float32)
        scores = np.empty(block_size, np.float32)
        for start in range(0, context_lens[i], block_size):
            block_id = np.int64(block_tables[i, start // block_size])  # int64, as below
            first_row = block_id * block_stride + h * head_stride
            num_tokens = min(block_size, context_lens[i] - start)  # the last block may not be full

            # s = q . k for each token of the block, and the new maximum m'
            m_new = m
            for t in range(num_tokens):
                begin = first_row + t * token_stride
                key = k[begin : begin + D]  # a slice: the compiler sees that it is contiguous
                score = np.float32(0)
                for d in range(D):
                    score += query[d] * widen(key[d])
                scores[t] = score * scale
                m_new = max(m_new, scores[t])

            # l' = l e^(m - m') + sum e^(s - m'),  acc' = acc e^(m - m') + sum e^(s - m') v
            shrink = np.exp(m - m_new)  # 0 at the first block, where m is -inf
            m = m_new
            l *= shrink
            acc *= shrink
            for t in range(num_tokens):
                begin = first_row + t * token_stride
                value = v[begin : begin + D]
                weight = np.exp(scores[t] - m)
                l += weight
                for d in range(D):
                    acc[d] += weight * widen(value[d])
        for d in range(D):
            out[i, h, d] = acc[d] / l if l > 0 else 0


def attend_per_head(
    q: Tensor,  # (B, H, D): exactly one query a sequence
    k_cache: Tensor,  # (num_blocks + 1, H, block_size, D), float32 or bfloat16
    v_cache: Tensor,  # the same, with the same strides
    block_tables: Tensor,  # (B, max_blocks) int32
    context_lens: Tensor,  # (B,) int32
    scale: float,
) -> Tensor:  # (B, H, D)
    """The readable first form of this kernel: decode only, as many heads of K as of Q.

    A block holds all heads one after another. This loop visits each block once for every head: with
    GPT-2's 12 heads it reads 12 short pieces of 8 KB (float32) at 12 different times, where the
    fast form below reads one piece of 98 KB. The benchmark `kernels` compares the two.
    """
    result = torch.empty(q.shape, dtype=torch.float32)
    loop_per_head(
        q.float().contiguous().numpy(),
        flat_memory(k_cache),
        flat_memory(v_cache),
        k_cache.stride()[:3],
        k_cache.shape[2],
        block_tables.numpy(),
        context_lens.numpy(),
        np.float32(scale),
        result.numpy(),
    )
    return result.to(q.dtype)


# ---- the fast form: one chunk of one sequence, all heads of a block ------------------------------
@inlined
def score_tokens(
    D, query, k, begin, num_tokens, stride, scale_at, must_fetch, fetch_at, scores
):  # fmt: skip
    """scores[t] = query . k for up to TOKENS_AT_ONCE tokens of one head; returns the largest.

    query is (D,), k the flat pool, `begin` the index of the first token's row in it and `stride`
    the distance from one row to the next. In a pool of int8 `scale_at` is the index of the first
    token's scale. Entries of `scores` (TOKENS_AT_ONCE,) without a token become -inf. With
    `must_fetch` the same number of rows is prefetched from k[fetch_at] on.
    """
    last = num_tokens - 1
    top = scores.dtype.type(-np.inf)
    for t in range(0, num_tokens, 4):
        if must_fetch:
            prefetch(k, fetch_at + t * stride)
        # Four tokens at a time: query[d] is loaded once for four products. Where fewer are left
        # the last row is read again, which does not change the maximum. The indices are unsigned,
        # because Numba would test signed ones for negative values, as in k[-1].
        t1 = min(t + 1, last)
        t2 = min(t + 2, last)
        t3 = min(t + 3, last)
        row0 = np.uint64(begin + t * stride)
        row1 = np.uint64(begin + t1 * stride)
        row2 = np.uint64(begin + t2 * stride)
        row3 = np.uint64(begin + t3 * stride)
        s0 = s1 = s2 = s3 = scores.dtype.type(0)
        for d in range(np.uint64(D)):
            x = query[d]
            s0 += x * widen(k[row0 + d])
            s1 += x * widen(k[row1 + d])
            s2 += x * widen(k[row2 + d])
            s3 += x * widen(k[row3 + d])
        s0 *= token_scale(k, scale_at + 2 * t)
        s1 *= token_scale(k, scale_at + 2 * t1)
        s2 *= token_scale(k, scale_at + 2 * t2)
        s3 *= token_scale(k, scale_at + 2 * t3)
        top = max(top, max(max(s0, s1), max(s2, s3)))
        scores[t] = s0
        scores[t + 1] = s1
        scores[t + 2] = s2
        scores[t + 3] = s3
    for t in range(num_tokens, len(scores)):  # entries without a token get the weight 0
        scores[t] = -np.inf
    return top


@inlined
def add_values(D, weights, v, begin, num_tokens, stride, must_fetch, fetch_at, acc):
    """acc (D,) += weights[t] * v of each token; the other arguments are those of `score_tokens`."""
    last = begin + (num_tokens - 1) * stride
    for t in range(0, num_tokens, 4):
        if must_fetch:
            prefetch(v, fetch_at + t * stride)
        row0 = np.uint64(begin + t * stride)
        row1 = np.uint64(min(begin + (t + 1) * stride, last))
        row2 = np.uint64(min(begin + (t + 2) * stride, last))
        row3 = np.uint64(min(begin + (t + 3) * stride, last))
        w0 = weights[t]
        w1 = weights[t + 1]
        w2 = weights[t + 2]
        w3 = weights[t + 3]
        for d in range(np.uint64(D)):  # acc[d] is loaded and stored once for four products
            total = acc[d] + w0 * widen(v[row0 + d])
            total += w1 * widen(v[row1 + d])
            total += w2 * widen(v[row2 + d])
            acc[d] = total + w3 * widen(v[row3 + d])


@inlined
def fold_tokens(
    D, query, k, v, begin, num_tokens, stride, scale_at, must_fetch, fetch_at, m, l, acc, scores
):  # fmt: skip
    """`paged_attention.fold_block` for one query, one head and up to TOKENS_AT_ONCE tokens.

    Adds to acc (D,) in place and returns the new m and l.
    """
    top = score_tokens(
        D, query, k, begin, num_tokens, stride, scale_at, must_fetch, fetch_at, scores
    )  # fmt: skip
    m_new = max(m, top)

    # l' = l 2^(m - m') + sum 2^(s - m'): before the first token m is -inf, l and acc are 0.
    shrink = power_of_two(m - m_new)
    added = scores.dtype.type(0)
    for t in range(len(scores)):  # the length is not a constant, so LLVM vectorises the loop
        weight = power_of_two(scores[t] - m_new)
        scores[t] = weight
        added += weight
    for t in range(num_tokens):  # the scale of a value belongs to its weight: once, not D times
        scores[t] *= token_scale(v, scale_at + 2 * t)

    # acc' = acc 2^(m - m') + sum 2^(s - m') v
    for d in range(np.uint64(D)):
        acc[d] *= shrink
    add_values(D, scores, v, begin, num_tokens, stride, must_fetch, fetch_at, acc)
    return m_new, l * shrink + added


@compiled
def walk_chunk(queries, H, k, v, layout, heads, table, start, stop, position, m, l, acc, scores):
    """Fold the tokens [start, stop) of one sequence into m, l (T * H,) and acc (T * H, D).

    Only for the heads [heads[0], heads[1]) of K and V, and the queries that read them.

    queries are (T * H, D), the H heads of each of T new tokens; the first one is at `position` of
    the sequence. All queries that read a head of a block do so while it is in the cache. `layout`
    describes the pool: (H_kv, block_size, block_stride, head_stride, token_stride), in elements.
    """
    H_kv, block_size, block_stride, head_stride, token_stride = layout
    first_head, last_head = heads
    D = queries.shape[1]
    num_queries = len(queries) // H
    group = H // H_kv  # query heads that share one head of K and V
    last_block = (stop - 1) // block_size
    for b in range(start // block_size, last_block + 1):
        # The chunk contains the offsets [begin, end) of block b.
        begin = max(start - b * block_size, 0)
        end = min(stop - b * block_size, block_size)
        block = np.int64(table[b]) * block_stride  # int64: a pool has more than 2^31 elements
        next_block = np.int64(table[min(b + 1, last_block)]) * block_stride
        if MUST_PREFETCH:
            # One line of the next block's K and of its V, early: a TLB miss takes longest.
            prefetch_line(k, next_block)
            prefetch_line(v, next_block)
        for h_kv in range(first_head, last_head):
            head = block + h_kv * head_stride
            ahead = h_kv + HEADS_AHEAD
            head_ahead = block + ahead * head_stride
            if ahead >= last_head:  # the first heads of the next block
                ahead = first_head + (ahead - last_head) % (last_head - first_head)
                head_ahead = next_block + ahead * head_stride
            for t in range(num_queries):
                # The query at position p reads tokens up to p: causality is a shorter loop.
                readable = min(end, position + t + 1 - b * block_size) - begin
                for h in range(t * H + h_kv * group, t * H + (h_kv + 1) * group):
                    must_fetch = MUST_PREFETCH and h == h_kv * group  # the first reader alone
                    for i in range(0, readable, TOKENS_AT_ONCE):
                        first = head + (begin + i) * token_stride
                        num_tokens = min(readable - i, TOKENS_AT_ONCE)
                        fetch_at = head_ahead + i * token_stride
                        scale_at = scale_index(head, block_size, D, begin + i)
                        # GPT-2's D is 64: with a constant, LLVM unrolls the loops over d.
                        if D == 64:
                            m[h], l[h] = fold_tokens(
                                64, queries[h], k, v, first, num_tokens, token_stride,
                                scale_at, must_fetch, fetch_at, m[h], l[h], acc[h], scores,
                            )  # fmt: skip
                        else:
                            m[h], l[h] = fold_tokens(
                                D, queries[h], k, v, first, num_tokens, token_stride,
                                scale_at, must_fetch, fetch_at, m[h], l[h], acc[h], scores,
                            )  # fmt: skip


@compiled
def walk_chunks(chunks, locs, queries, k, v, layout, heads, tables, context_lens, m, l, acc):
    """`walk_chunk` for each row of `chunks`: what one thread does. The results go into m, l, acc.

    queries are (N, H, D), m and l (rows, H), acc (rows, H, D); `locs` are the query_start_locs.
    """
    scores = np.empty(TOKENS_AT_ONCE, queries.dtype)
    _, H, D = queries.shape
    for i, start, stop, row in chunks:
        T = locs[i + 1] - locs[i]
        walk_chunk(
            queries[locs[i] : locs[i + 1]].reshape(-1, D),
            H,
            k,
            v,
            layout,
            heads,
            tables[i],
            start,
            stop,
            context_lens[i] - T,  # 17 tokens may be read, 2 of them new -> the first is at 15
            m[row : row + T].reshape(-1),
            l[row : row + T].reshape(-1),
            acc[row : row + T].reshape(-1, D),
            scores,
        )


@compiled_in_order
def merge_chunks(chunks, chunk_locs, locs, m, l, acc, out):
    """Combine the partial results of each sequence's chunks in out (N, H, D).

    Sequence i has the chunks [chunk_locs[i], chunk_locs[i + 1]) and the queries
    [locs[i], locs[i + 1]). A partial result was summed under its own maximum m, so its weight is
    2^(m - the largest m). The weights overwrite l. Rows without a chunk are not changed.
    """
    _, H, D = out.shape
    for i in range(len(chunk_locs) - 1):
        if chunk_locs[i] == chunk_locs[i + 1]:
            continue
        for n in range(locs[i], locs[i + 1]):
            rows = chunks[chunk_locs[i] : chunk_locs[i + 1], 3] + (n - locs[i])
            for h in range(H):
                top = m[rows[0], h]
                for row in rows:
                    top = max(top, m[row, h])
                total = m.dtype.type(0)
                for row in rows:
                    if l[row, h] != 0:  # 0: the query is before this chunk and has read nothing
                        weight = power_of_two(m[row, h] - top)
                        total += weight * l[row, h]
                        l[row, h] = weight
                if total != 0:
                    for row in rows:
                        weight = l[row, h] / total
                        for d in range(D):
                            out[n, h, d] += weight * acc[row, h, d]


# ---- the work list and the threads ---------------------------------------------------------------
@compiled
def scale_queries(q, strides, scale, queries):
    """queries (N, H, D) = q * scale, in the type of the sums. q is flat, with its strides."""
    N, H, D = queries.shape
    for n in range(N):
        for h in range(H):
            begin = np.uint64(n * strides[0] + h * strides[1])
            for d in range(np.uint64(D)):
                queries[n, h, d] = widen(q[begin + d]) * scale


@compiled
def cut_into_chunks(locs, context_lens, context_starts):
    """Returns the work list (num_chunks, 4), where each sequence's chunks begin, the partial rows.

    A row of the list is: sequence, first token, last token + 1, its first row of m, l and acc.
    Each chunk has one such row for each query of its sequence. Sequences without queries, and those
    with MANY_QUERIES or more, have no chunks. Chunks are cut at multiples of CHUNK_LEN, whatever
    else is in the batch, so that a sequence's result does not depend on the batch.
    """
    B = len(context_lens)
    chunks = np.empty((context_lens.sum() // CHUNK_LEN + B, 4), np.int64)
    chunk_locs = np.zeros(B + 1, np.int64)
    num_chunks = 0
    num_rows = 0
    for i in range(B):
        num_queries = locs[i + 1] - locs[i]
        if 0 < num_queries < MANY_QUERIES:
            # context_starts 70, context_lens 600 -> [70, 256), [256, 512), [512, 600)
            for begin in range(0, context_lens[i], CHUNK_LEN):
                start = max(begin, context_starts[i])
                stop = min(begin + CHUNK_LEN, context_lens[i])
                if start < stop:
                    chunks[num_chunks] = i, start, stop, num_rows
                    num_chunks += 1
                    num_rows += num_queries
        chunk_locs[i + 1] = num_chunks
    return chunks[:num_chunks], chunk_locs, num_rows


@compiled
def prepare(q, q_strides, scale, queries, locs, context_lens, context_starts, out):
    """All that precedes the walk, in one call from Python.

    Fills queries (N, H, D), sets out (N, H, D) to zero, and returns the work list, where each
    sequence's chunks begin in it, and m, l (rows, H) and acc (rows, H, D) as they are before the
    first token.
    """
    scale_queries(q, q_strides, scale, queries)
    out[:] = 0
    chunks, chunk_locs, num_rows = cut_into_chunks(locs, context_lens, context_starts)
    _, H, D = queries.shape
    m = np.full((num_rows, H), -np.inf, queries.dtype)
    l = np.zeros((num_rows, H), queries.dtype)
    acc = np.zeros((num_rows, H, D), queries.dtype)
    return chunks, chunk_locs, m, l, acc


@compiled_parallel
def attend_on_openmp(
    num_groups, chunks, chunk_locs, locs,
    queries, k, v, layout, tables, context_lens, m, l, acc, out,
):  # fmt: skip
    """OpenMP's threads share the chunks, and then the sequences whose chunks are merged.

    With several groups of heads, each thread takes a group and walks all chunks for its heads.
    """
    H_kv = layout[0]
    for task in prange(num_groups * len(chunks)):
        g, c = task // len(chunks), task % len(chunks)
        heads = H_kv * g // num_groups, H_kv * (g + 1) // num_groups
        walk_chunks(
            chunks[c : c + 1], locs, queries, k, v, layout, heads, tables, context_lens, m, l, acc
        )  # fmt: skip
    for i in prange(len(chunk_locs) - 1):
        merge_chunks(chunks, chunk_locs[i : i + 2], locs[i : i + 2], m, l, acc, out)


@compiled
def count_head_groups(num_threads, num_chunks, H_kv, itemsize):
    """Into how many groups of heads `attend_on_openmp` cuts each chunk.

    A sequence of 288 tokens has a chunk of 256 and one of 32. While there are so few that threads
    would wait for each other, they share the heads too: in float32 that takes a third less time
    for this sequence. In bfloat16 a share of a block is too short, and takes a tenth more.
    """
    if num_chunks < FEW_CHUNKS * num_threads and itemsize >= 4:
        return min(num_threads, H_kv)
    return 1


def attend_chunks(
    num_threads, chunks, chunk_locs, locs,
    queries, k, v, layout, tables, context_lens, m, l, acc, out,
):  # fmt: skip
    """Walk and merge all chunks on `num_threads` threads; any number of them gives the same bits.

    The threads are OpenMP's where it is there, and Python's own otherwise.
    """
    H_kv = layout[0]
    num_groups = count_head_groups(num_threads, len(chunks), H_kv, k.itemsize)
    num_tasks = num_groups * len(chunks)
    if min(num_threads, num_tasks) > 1 and use_openmp_threads(min(num_threads, num_tasks)):
        attend_on_openmp(
            num_groups, chunks, chunk_locs, locs,
            queries, k, v, layout, tables, context_lens, m, l, acc, out,
        )  # fmt: skip
        return
    num_threads = max(1, min(num_threads, len(chunks)))
    heads = 0, H_kv
    others = []
    for w in range(1, num_threads):
        share = chunks[len(chunks) * w // num_threads : len(chunks) * (w + 1) // num_threads]
        others.append(
            worker_threads(os.getpid(), num_threads).submit(
                walk_chunks,
                share,
                locs,
                queries,
                k,
                v,
                layout,
                heads,
                tables,
                context_lens,
                m,
                l,
                acc,
            )  # fmt: skip
        )
    share = chunks[: len(chunks) // num_threads]  # this thread's own
    walk_chunks(share, locs, queries, k, v, layout, heads, tables, context_lens, m, l, acc)
    for other in others:
        other.result()
    merge_chunks(chunks, chunk_locs, locs, m, l, acc, out)


# ---- the common signature ------------------------------------------------------------------------
def paged_attention_cpu(
    q: Tensor,  # (N, H, D)
    k_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D), one layer's view of the pool
    v_cache: Tensor,  # the same
    block_tables: Tensor,  # (B, max_blocks) int32
    query_start_locs: Tensor,  # (B + 1,) int32
    context_lens: Tensor,  # (B,) int32
    scale: float,
    max_query_len: int,
    max_context_len: int,
    context_starts: Tensor | None = None,  # (B,) int32
    out: Tensor | None = None,  # (N, H, D)
) -> Tensor:
    """`paged_attention.paged_attention` for pools in host memory, but not for float16.

    A pool is float64, float32 or bfloat16, or int8 in the layout of speedups/quantized_kv.py.
    It runs on as many threads as PyTorch does (`torch.set_num_threads`), and several threads may
    call it at the same time. Raises TypeError for another dtype, and ValueError where the last
    dimension is not contiguous or the strides of K and V differ.
    """
    check_tensors("paged_attention_cpu", q)
    check_pool("paged_attention_cpu", k_cache, v_cache)
    if k_cache.stride() != v_cache.stride():
        strides = f"{k_cache.stride()} and {v_cache.stride()}"
        raise ValueError(f"paged_attention_cpu: strides of k and v are {strides}: make them equal")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype)
    # Sums are float32 or float64; a bfloat16 result is rounded once, by the last line.
    wide = q if k_cache.dtype == torch.int8 else k_cache
    dtype = torch.float64 if wide.dtype == torch.float64 else torch.float32
    is_in_place = out.dtype == dtype and out.is_contiguous()
    result = out if is_in_place else torch.empty(q.shape, dtype=dtype)

    # Few calls from Python: a layer's K and V have evicted the interpreter's code and data from the
    # caches, and each line takes about 10 us.
    k, v = flat_memory(k_cache), flat_memory(v_cache)
    layout = (*k_cache.shape[1:3], *k_cache.stride()[:3])
    tables = block_tables.numpy()
    locs = query_start_locs.numpy()
    lens = context_lens.numpy()
    starts = np.zeros(len(lens), np.int32) if context_starts is None else context_starts.numpy()
    target = result.numpy()
    queries = np.empty(q.shape, target.dtype)
    chunks, chunk_locs, m, l, acc = prepare(
        flat_memory(q), q.stride(), scale * LOG2_E, queries, locs, lens, starts, target
    )
    num_threads = torch.get_num_threads()
    attend_chunks(
        num_threads, chunks, chunk_locs, locs,
        queries, k, v, layout, tables, lens, m, l, acc, target,
    )  # fmt: skip

    if max_query_len >= MANY_QUERIES:
        if target.dtype == np.float32 and can_attend_prompts():
            attend_prompts(
                num_threads, MANY_QUERIES, queries, k, v, layout, tables, locs, lens, starts, target
            )
        else:
            for i in np.flatnonzero(np.diff(locs) >= MANY_QUERIES).tolist():
                rows = slice(locs[i], locs[i + 1])
                prompt = q[rows].detach().to(dtype)
                length, start = int(lens[i]), int(starts[i])
                attend_prompt(prompt, k, v, layout, tables[i], length, start, scale, result[rows])
    return out if is_in_place else out.copy_(result)


# --------------------------------------------------------------------------------------------------
def demo():
    """GPT-2's heads, 8 sequences of 256 tokens: the oracle, gather then dense, blocks in place."""
    if not HAS_NUMBA:
        print("ok: nothing to run without numba")
        return
    generator = torch.Generator().manual_seed(0)
    B = 8
    length = 256
    block_size = 16
    H = 12
    D = 64
    num_blocks = B * length // block_size
    pool = torch.randn(4, num_blocks + 1, 2, H, block_size, D, generator=generator)
    tables = torch.randperm(num_blocks, generator=generator).view(B, -1).int()
    q = torch.randn(B, H, D, generator=generator)
    where = tables, torch.arange(B + 1).int(), torch.full((B,), length).int()

    def gather_then_dense(q, k_cache, v_cache, tables, *_, **__):
        k, v = (cache[tables.long()].transpose(1, 2).flatten(2, 3) for cache in (k_cache, v_cache))
        return F.scaled_dot_product_attention(q[:, :, None], k, v)[:, :, 0]

    kernels = {
        "the oracle, block by block in PyTorch": paged_attention,
        "gather, then the library's kernel": gather_then_dense,
        "blocks in place": paged_attention_cpu,
    }
    print(f"one decode step of {B} sequences of {length} tokens, {num_blocks} shuffled blocks")
    results, megabytes = [], 2 * B * length * H * D * 4 / 1e6
    for name, kernel in kernels.items():
        seconds = []
        for i in range(12):  # layer after layer, as in a model
            layer = pool[i % 4]
            begun = time.perf_counter()
            result = kernel(q, layer[:, 0], layer[:, 1], *where, D**-0.5, 1, length)
            seconds.append(time.perf_counter() - begun)
        results.append(result)
        ms = sorted(seconds)[6] * 1e3
        print(f"{name:38} {ms:7.2f} ms, {megabytes / ms:5.1f} GB/s of K and V")
    error = max((result - results[0]).abs().max().item() for result in results)
    print(f"largest difference between the three: {error:.1e}")
    assert error < 1e-5
    print("ok: the same attention, from the blocks where they lie")


if __name__ == "__main__":
    demo()
