"""The same attention, compiled for the CPU: every block is read once, in place, all heads in turn.

Decoding is bound by memory: a step of 32 sequences at 1,000 tokens reads 2.4 GB of keys and values
in float32 and does little with each number. Gathering the blocks into one piece first would move
those bytes three times. In the pool a block's K and V, all heads of both, lie side by side, so a
compiled loop over the table reads 98 KB in a row, jumps, and reads the next 98 KB. A prefetch two
heads ahead hides the jump; a line of K and one of V, a block ahead, have their page looked up:

    table [ 5, 0, 7 ]    block 5: K head 0 1 2 .. 11 | V head 0 1 2 .. 11     then block 0, block 7
                                  └─ scores ─┐            └─ weighted sum
                                             └─ 2^(score - m) ─┘       m, l, acc: a few KB in cache

The contexts are cut into chunks of 256 tokens, and a chunk is the unit of work for a thread. Each
chunk yields its own m, l and acc, and these merge by the same three equations: one long sequence
feeds all threads, and a result depends neither on their number nor on the rest of the batch. A
prompt has the arithmetic to pay for a copy: its blocks are laid out once and a BLAS does the rest.

Numba compiles this at the first call, in seconds, and keeps it on disk; what is in a register is
said in the words of vector_cpu.py. What a production engine does beyond this: vector code for each
kind of processor, and one thread team a socket.

Dao et al. 2023, "Flash-Decoding for long-context inference" (chunks and merge).
Run: python -m kernels.attention_cpu
Try: PREFETCH = False, or CHUNK_LEN = 16, and time experiments/kernels.py again.
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
    bits,
    compiled,
    compiled_parallel,
    flat,
    inlined,
    prange,
    prefetch,
    touch,
    use_openmp_team,
    widen,
    workers,
)
from kernels.prefill_cpu import attend_prompt, check, write_kv_cpu
from kernels.vector_cpu import (
    first,
    lanes,
    largest,
    load,
    power_of_two,
    store,
    store_totals,
    total,
    zeros,
)
from paged_attention import paged_attention

__all__ = ["attend_per_head", "paged_attention_cpu", "write_kv_cpu"]

CHUNK_LEN = 256  # tokens of context that one thread walks: 1.6 MB of GPT-2's K and V in float32
MANY_QUERIES = 10  # from here on a sequence's new tokens are a prompt: worth one copy and a BLAS
PREFETCH, AHEAD = True, 2  # so many heads ahead of what is read now
ROUNDED_ONCE = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
]  # sums and results
LOG2_E = math.log2(math.e)  # e^x = 2^(x log2(e)), and powers of two are cheaper


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
            block_id = np.int64(block_tables[i, start // block_size])  # int64: a pool has > 2^31
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
        flat(k_cache),
        flat(v_cache),
        k_cache.stride()[:3],
        k_cache.shape[2],
        block_tables.numpy(),
        context_lens.numpy(),
        np.float32(scale),
        result.numpy(),
    )
    return result.to(q.dtype)


# ---- the walk ------------------------------------------------------------------------------------
@inlined
def fold_block(D, q, k, v, where, so_far, acc, scores):
    """`paged_attention.fold_block` for one query and one head of a block; returns the new m, l.

    q and acc are (D,), k and v the whole pool as flat arrays. `where` says which element of them
    begins the first token, how many tokens there are (as many as a register has lanes, at most),
    the stride from one to the next, and where to fetch ahead (negative: nowhere). Tokens go four
    at a time: q is loaded once for four products, acc once for four sums. Where fewer are left the
    last one is taken again, and its score does not count.
    """
    row, num_tokens, stride, ahead = where
    m, l = so_far
    W, last = lanes(acc), row + (num_tokens - 1) * stride
    # q . k for each token, and the new maximum m'.
    for t in range(0, num_tokens, 4):
        if ahead >= 0:
            prefetch(k, ahead + t * stride)
        r0 = row + t * stride
        r1, r2, r3 = min(r0 + stride, last), min(r0 + 2 * stride, last), min(r0 + 3 * stride, last)
        s0 = s1 = s2 = s3 = zeros(acc)
        for d in range(0, D, W):
            x = load(q, d, D - d)
            s0 += x * load(k, r0 + d, D - d)
            s1 += x * load(k, r1 + d, D - d)
            s2 += x * load(k, r2 + d, D - d)
            s3 += x * load(k, r3 + d, D - d)
        store_totals(scores, t, s0, s1, s2, s3)
    s = first(load(scores, 0, W), num_tokens)
    top = max(m, largest(s))

    # l' = l 2^(m - m') + sum(2^(s - m')): before the first token m is -inf, and l and acc are 0.
    shrink, p = power_of_two(m - top), power_of_two(s - top)
    store(scores, 0, W, p)
    for d in range(0, D, W):
        store(acc, d, D - d, load(acc, d, D - d) * shrink)

    # acc' = acc 2^(m - m') + 2^(s - m') V
    for t in range(0, num_tokens, 4):
        if ahead >= 0:
            prefetch(v, ahead + t * stride)
        r0 = row + t * stride
        r1, r2, r3 = min(r0 + stride, last), min(r0 + 2 * stride, last), min(r0 + 3 * stride, last)
        p0, p1, p2, p3 = scores[t], scores[t + 1], scores[t + 2], scores[t + 3]
        for d in range(0, D, W):
            a = load(acc, d, D - d) + p0 * load(v, r0 + d, D - d)
            a += p1 * load(v, r1 + d, D - d)
            a += p2 * load(v, r2 + d, D - d)
            store(acc, d, D - d, a + p3 * load(v, r3 + d, D - d))
    return top, l * shrink + total(p)


@compiled
def walk_chunk(q, H, k, v, shape, table, start, stop, last, m, l, acc, scores):
    """Fold the tokens [start, stop) of one sequence into m, l (T * H,) and acc (T * H, D).

    q is (T * H, D); its query t sits at position `last` + t, the last one that it may read. A
    block's heads are read in the order in which they lie, and all queries that read a head do so
    while it is in the cache.
    """
    H_kv, block_size, block_stride, head_stride, token_stride = shape
    T, G, D, W = len(q) // H, H // H_kv, q.shape[1], lanes(q)
    final = (stop - 1) // block_size
    for b in range(start // block_size, final + 1):
        # Offsets [begin, end) of block b: a chunk may begin and end inside one.
        begin = max(start - b * block_size, 0)
        end = min(stop - b * block_size, block_size)
        block = np.int64(table[b]) * block_stride  # int64: a pool has more than 2^31 elements
        next_block = np.int64(table[min(b + 1, final)]) * block_stride
        if PREFETCH:  # where the next block lies takes longest to find out
            touch(k, next_block)
            touch(v, next_block)
        for h_kv in range(H_kv):
            tile = block + h_kv * head_stride
            later = h_kv + AHEAD  # in the order of reading
            ahead = (block if later < H_kv else next_block) + later % H_kv * head_stride
            for t in range(T):
                # Causality is a shorter loop, not a mask: nothing behind it is even loaded.
                readable = min(end, last + t + 1 - b * block_size) - begin
                if readable <= 0:
                    continue
                for h in range(t * H + h_kv * G, t * H + h_kv * G + G):
                    for i in range(0, readable, W):
                        fetch = ahead + i * token_stride if PREFETCH and h == h_kv * G else -1
                        begins = tile + (begin + i) * token_stride
                        where = begins, min(readable - i, W), token_stride, fetch
                        so_far = m[h], l[h]
                        if D == 64:  # GPT-2 in all its sizes: loops of a known length have no ends
                            m[h], l[h] = fold_block(64, q[h], k, v, where, so_far, acc[h], scores)
                        else:
                            m[h], l[h] = fold_block(D, q[h], k, v, where, so_far, acc[h], scores)


@compiled
def cut_into_chunks(locs, context_lens, context_starts, few, q, strides, scale, queries, out):
    """The work list (num_chunks, 4): sequence, first token, last token + 1, first partial row; and
    where in it each sequence's chunks begin (B + 1,), the last number being its end.

    Also puts q, flat, times `scale` into queries (N, H, D), zeros into out (N, H, D), and returns
    room for the partial results, m, l (rows, H) and acc (rows, H, D): each chunk has one row for
    each query of its sequence. Sequences of no queries, or of `few` and more, are left out. Chunks
    are cut at multiples of CHUNK_LEN whatever else runs: no result depends on the batch.
    """
    out[:], (N, H, D), dtype = 0, queries.shape, queries.dtype
    for n in range(N):
        for h in range(H):
            at = np.uint64(n * strides[0] + h * strides[1])
            for d in range(np.uint64(D)):
                queries[n, h, d] = dtype.type(widen(q[at + d])) * dtype.type(scale)
    most = context_lens.sum() // CHUNK_LEN + len(context_lens)
    chunks, begins, n, row = np.empty((most, 4), np.int64), np.zeros(len(locs), np.int64), 0, 0
    for i in range(len(context_lens)):
        num_queries = locs[i + 1] - locs[i]
        if 0 < num_queries < few:
            for begin in range(0, context_lens[i], CHUNK_LEN):
                start = max(begin, context_starts[i])
                stop = min(begin + CHUNK_LEN, context_lens[i])
                if start < stop:
                    chunks[n] = i, start, stop, row
                    n, row = n + 1, row + num_queries
        begins[i + 1] = n
    m, l = np.full((row, H), -np.inf, dtype), np.zeros((row, H), dtype)
    return chunks[:n], begins, m, l, np.zeros((row, H, D), dtype)


@compiled
def walk_chunks(chunks, locs, q, k, v, shape, tables, context_lens, m, l, acc):
    """One thread's share of the work list; m, l (rows, H) and acc (rows, H, D) are its results."""
    scores, (_, H, D) = np.empty(lanes(q), q.dtype), q.shape
    for i, start, stop, row in chunks:
        begin, T = locs[i], locs[i + 1] - locs[i]
        sizes = shape, tables[i], start, stop, context_lens[i] - T
        queries, sums = q[begin : begin + T].reshape(-1, D), acc[row : row + T].reshape(-1, D)
        m_rows, l_rows = m[row : row + T].reshape(-1), l[row : row + T].reshape(-1)
        walk_chunk(queries, H, k, v, *sizes, m_rows, l_rows, sums, scores)


@compiled
def merge_chunks(chunks, begins, locs, m, l, acc, out):
    """Put some sequences' partial results together in out (N, H, D): the same equations once more.

    A partial result summed under its own maximum m counts 2^(m - the largest m); this takes the
    place of its l. `begins` and `locs` are those of the sequences that are meant; rows of no chunk
    stay as they are.
    """
    (_, H, D), W = out.shape, lanes(acc)
    for i in range(len(begins) - 1):
        for t in range(locs[i + 1] - locs[i] if begins[i] < begins[i + 1] else 0):
            rows = chunks[begins[i] : begins[i + 1], 3] + t
            for h in range(H):
                top, total = m[rows[0], h], m.dtype.type(0)
                for row in rows:
                    top = max(top, m[row, h])
                for row in rows:
                    if l[row, h] != 0:  # else this query sits before the chunk and read nothing
                        weight = power_of_two(m[row, h] - top)
                        total += weight * l[row, h]
                        l[row, h] = weight
                if total != 0:
                    for d in range(0, D, W):
                        s = zeros(acc)
                        for row in rows:
                            s += l[row, h] * load(acc[row, h], d, D - d)
                        store(out[locs[i] + t, h], d, D - d, s / total)


@compiled_parallel
def attend_on_team(chunks, begins, locs, q, k, v, shape, tables, context_lens, m, l, acc, out):
    """`walk_chunks` with a thread for each part of the list, then `merge_chunks` for each part of
    the sequences."""
    for c in prange(len(chunks)):
        walk_chunks(chunks[c : c + 1], locs, q, k, v, shape, tables, context_lens, m, l, acc)
    for i in prange(len(begins) - 1):
        merge_chunks(chunks, begins[i : i + 2], locs[i : i + 2], m, l, acc, out)


def attend_chunks(num_threads, chunks, begins, locs, inputs, partials, out):
    """Share the work out among threads. No result depends on who computed it, so any number of
    threads gives the same bits."""
    num_threads = max(1, min(num_threads, len(chunks)))
    if num_threads > 1 and use_openmp_team(num_threads):
        attend_on_team(chunks, begins, locs, *inputs, *partials, out)
        return
    cuts = [len(chunks) * w // num_threads for w in range(num_threads + 1)]
    mine, *shares = (chunks[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True))
    others = [
        workers(os.getpid(), num_threads).submit(walk_chunks, share, locs, *inputs, *partials)
        for share in shares
    ]
    walk_chunks(mine, locs, *inputs, *partials)
    for other in others:
        other.result()
    merge_chunks(chunks, begins, locs, *partials, out)


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
    """`paged_attention.paged_attention` for float64, float32 and bfloat16 pools in host memory.

    Runs on as many threads as PyTorch does (`torch.set_num_threads`), and may be called from
    several threads at once. Raises TypeError for another dtype, ValueError where the last
    dimension is not contiguous or K and V are laid out differently.
    """
    check("paged_attention_cpu", q, k_cache, v_cache)
    if k_cache.stride() != v_cache.stride():
        strides = f"{k_cache.stride()} and {v_cache.stride()}"
        raise ValueError(f"paged_attention_cpu: strides of k and v are {strides}: make them equal")
    out = torch.empty(q.shape, dtype=q.dtype) if out is None else out
    dtype = torch.float64 if k_cache.dtype == torch.float64 else torch.float32
    # Sums are 32 bits or 64: a bfloat16 result is rounded once, at the end.
    in_place = out.is_contiguous() and (dtype, out.dtype) in ROUNDED_ONCE
    result = out if in_place else torch.empty(q.shape, dtype=dtype)
    shape = (*k_cache.shape[1:3], *k_cache.stride()[:3])
    k, v, tables = flat(k_cache), flat(v_cache), block_tables.numpy()
    locs, lens = query_start_locs.numpy(), context_lens.numpy()
    starts = np.zeros(len(lens), np.int32) if context_starts is None else context_starts.numpy()

    # Few steps: after so much reading the caches hold nothing of Python, and each line takes 10 us.
    queries = np.empty(q.shape, np.float64 if dtype == torch.float64 else np.float32)
    scaled, target = (flat(q), q.stride(), scale * LOG2_E, queries), bits(result)
    chunks, begins, *partials = cut_into_chunks(locs, lens, starts, MANY_QUERIES, *scaled, target)
    inputs = queries, k, v, shape, tables, lens
    attend_chunks(torch.get_num_threads(), chunks, begins, locs, inputs, partials, target)

    if max_query_len >= MANY_QUERIES:
        for i in np.flatnonzero(np.diff(locs) >= MANY_QUERIES).tolist():
            rows = slice(locs[i], locs[i + 1])
            where = shape, tables[i], int(lens[i]), int(starts[i])
            attend_prompt(q[rows].detach().to(dtype), k, v, *where, scale, result[rows])
    return out if in_place else out.copy_(result)


# --------------------------------------------------------------------------------------------------
def demo():
    """GPT-2's heads, 8 sequences of 256 tokens: the oracle, gather then dense, blocks in place."""
    if not HAS_NUMBA:
        print("ok: nothing to run without numba")
        return
    generator = torch.Generator().manual_seed(0)
    B, length, block_size, H, D = 8, 256, 16, 12, 64
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
