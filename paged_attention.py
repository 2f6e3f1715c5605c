"""The online softmax: attention reads its context block by block, wherever the blocks lie.

A softmax seems to need all scores at once: it divides by the sum of their exponentials, and to
avoid overflow it first subtracts their maximum. Both can be corrected later. Keep a running maximum
m, a running denominator l and a running weighted sum of values acc. A new block has scores s and
values V, and updates the three. The factor e^(m - m') corrects the sums made with the old maximum:

    m' = max(m, max(s))   l' = l e^(m - m') + sum(e^(s - m'))   acc' = acc e^(m - m') + e^(s - m') V

After the last block acc / l is the attention output, and the order of the blocks does not matter.
So K and V may lie in any blocks of the pool. Gathering a context into one piece before reading it
would move every byte three times instead of once: a read, a write and a second read.

This file is plain PyTorch, and the oracle of all kernels, which have the same signature. A sequence
may have any number of queries, so a prompt, a chunk of a prompt, a decode step and a mixture of
them are one call. (The picture docs/softmax.svg shows m, l and acc after each block.)

Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867,
algorithm 3; Dao et al. 2022, "FlashAttention", arXiv:2205.14135, section 3.1.
Run: python paged_attention.py
Try: WALK = -1 above the demo (from the last block to the first: m and l differ on the way, the
result does not), or START_M = 0.0 and SHIFT = -1000.0: every e^(s - m) is then 0 in floating point,
acc / l is 0 / 0, and the assert on the distance from the dense result fails.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def fold_block(
    m: Tensor,  # (..., R) running maximum of the R rows' scores
    l: Tensor,  # (..., R) running denominator
    acc: Tensor,  # (..., R, D) running weighted sum of values
    scores: Tensor,  # (..., R, block_size), -inf where a row may not read
    v: Tensor,  # (..., block_size, D)
) -> tuple[Tensor, Tensor, Tensor]:
    """The three equations above for one block: returns the new m, l and acc."""
    m_new = torch.maximum(m, scores.amax(-1))
    # A row that has read nothing yet has m = -inf, and -inf - -inf is NaN. With 0 in its place both
    # exponentials are e^-inf = 0.
    m_safe = m_new.masked_fill(m_new == -math.inf, 0)
    shrink = (m - m_safe).exp()  # e^(m - m'), (..., R)
    p = (scores - m_safe[..., None]).exp()  # e^(s - m'), (..., R, block_size)
    return m_new, l * shrink + p.sum(-1), acc * shrink[..., None] + p @ v


def paged_attention(
    q: Tensor,  # (N, H, D), queries of all sequences end to end; only D needs to be contiguous
    k_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D), one layer's view of the pool
    v_cache: Tensor,  # the same
    block_tables: Tensor,  # (B, max_blocks) int32
    query_start_locs: Tensor,  # (B + 1,) int32: sequence i's rows are [locs[i], locs[i + 1])
    context_lens: Tensor,  # (B,) int32: tokens that its last query may read, itself included
    scale: float,
    max_query_len: int,  # upper bounds, as Python ints: reading a value from a GPU waits for it
    max_context_len: int,
    context_starts: Tensor | None = None,  # (B,) int32: first position that may be read; None: 0
    out: Tensor | None = None,  # (N, H, D)
) -> Tensor:
    """Causal attention of each query over its sequence's blocks; returns (N, H, D) in q's dtype.

    Query t of a sequence with T queries sits at position context_len - T + t and reads positions
    [context_start, its own + 1). A query without a position to read, and a row that belongs to no
    sequence, are zero. H may be a multiple of H_kv. 16-bit inputs are summed in 32 bits.
    """
    N, H, D = q.shape
    B = block_tables.shape[0]
    H_kv, block_size = k_cache.shape[1:3]
    out = torch.empty((N, H, D), dtype=q.dtype, device=q.device) if out is None else out
    if N == 0 or B == 0 or max_query_len == 0:
        return out.zero_()
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    T = max_query_len
    G = H // H_kv  # query heads that share one head of K and V
    query_lens = query_start_locs.diff().long()  # (B,): locs [0, 6, 10] -> 6, 4
    starts = torch.zeros_like(query_lens) if context_starts is None else context_starts.long()

    queries = unflatten_queries(q.to(dtype), query_start_locs.long(), T, H_kv) * scale
    t = torch.arange(T, device=q.device)
    last = (context_lens - query_lens)[:, None] + t  # (B, T): the last position each query may read

    # The R = G * T rows of fold_block: these queries all read the same head of K and V.
    m = torch.full((B, H_kv, G * T), -math.inf, dtype=dtype, device=q.device)
    l = torch.zeros_like(m)
    acc = torch.zeros_like(queries)
    # 18 tokens, block_size 4 -> 5 blocks of each sequence, never more than the tables have
    num_blocks = min(-(-max_context_len // block_size), block_tables.shape[1])
    for i in range(num_blocks):
        block_ids = block_tables[:, i].long()
        k = k_cache[block_ids].to(dtype)  # (B, H_kv, block_size, D)
        v = v_cache[block_ids].to(dtype)
        position = i * block_size + torch.arange(block_size, device=q.device)
        # An unwritten slot may hold NaN. A weight of 0 does not hide it, since 0 * NaN is NaN, so
        # the value itself is replaced by 0.
        unread = (position < starts[:, None]) | (position >= context_lens[:, None])
        v = v.masked_fill(unread[:, None, :, None], 0)
        # (B, T, block_size): positions before the start, and after the query's own (causality)
        hidden = (position < starts[:, None, None]) | (position > last[:, :, None])
        scores = (queries @ k.mT).masked_fill(hidden.repeat(1, G, 1)[:, None], -math.inf)
        m, l, acc = fold_block(m, l, acc, scores, v)

    result = acc / l.masked_fill(l == 0, 1)[..., None]  # a row that read nothing: 0 / 1
    result = result.view(B, H_kv, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)
    return out.copy_(flatten_queries(result, query_start_locs.long(), num_rows=N))


def unflatten_queries(q: Tensor, query_start_locs: Tensor, T: int, H_kv: int) -> Tensor:
    """(N, H, D) -> (B, H_kv, G * T, D): row g * T + t of a sequence is its query t in head g.

    H = H_kv * G, and query head h reads K and V of head h // G. A sequence with fewer than T
    queries also gets rows of other sequences; `flatten_queries` drops their results.
    """
    t = torch.arange(T, device=q.device)
    rows = (query_start_locs[:-1, None] + t).clamp(max=len(q) - 1)  # (B, T)
    by_head = q[rows].unflatten(2, (H_kv, -1)).permute(0, 2, 3, 1, 4)  # (B, H_kv, G, T, D)
    return by_head.flatten(2, 3)


def flatten_queries(result: Tensor, query_start_locs: Tensor, num_rows: int) -> Tensor:
    """(B, T, H, D) -> (N, H, D): query t of sequence i goes to row query_start_locs[i] + t.

    Rows that belong to no sequence are zero.
    """
    B, T = result.shape[:2]
    n = torch.arange(num_rows, device=result.device)
    # The first sequence that ends after row n: query_start_locs [0, 6, 10], row 6 -> sequence 1.
    sequence = torch.searchsorted(query_start_locs[1:], n, right=True)
    has_sequence = sequence < B
    sequence = sequence.clamp(max=B - 1)
    t = (n - query_start_locs[sequence]).clamp(max=T - 1)
    return result[sequence, t].masked_fill(~has_sequence[:, None, None], 0)


# --------------------------------------------------------------------------------------------------
WALK = 1  # -1: from the last block to the first
# What m is before the first block, and what is added to every score (a softmax ignores it).
START_M = -math.inf
SHIFT = 0.0


def demo():
    """One query walks a shuffled table: m, l and the error after each block. Then six queries."""
    torch.manual_seed(0)
    k_cache, v_cache = torch.randn(2, 9, 1, 4, 8, dtype=torch.float64)
    table = [6, 1, 4, 3, 0]
    context_len = 18
    scale = 8**-0.5
    q = torch.randn(1, 1, 8, dtype=torch.float64)
    # The context in reading order, and the attention that needs all scores at once.
    k, v = (cache[table].transpose(1, 2).flatten(0, 1)[:18, 0] for cache in (k_cache, v_cache))
    dense = (q[0] @ k.T * scale).softmax(-1) @ v

    print(f"one query, {context_len} tokens in blocks {table} of 4\n")
    print("block   running max m   denominator l   distance from the dense result")
    m = torch.tensor([START_M], dtype=torch.float64)
    l = torch.zeros(1, dtype=torch.float64)
    acc = torch.zeros(1, 8, dtype=torch.float64)
    for i in range(len(table))[::WALK]:
        scores = q[0] @ k_cache[table[i], 0].T * scale + SHIFT
        scores[0, max(0, context_len - 4 * i) :] = -math.inf  # the last block has only 2 tokens
        m, l, acc = fold_block(m, l, acc, scores, v_cache[table[i], 0])
        distance = (acc / l[:, None] - dense).abs().max().item()
        print(f"{table[i]:5} {m.item():15.4f} {l.item():15.4f} {distance:16.1e}")
    assert distance < 1e-12, f"distance from the dense result: {distance}"

    v_cache[0, :, 2:] = math.nan  # positions 18 and 19 were never written, and must not be read
    chunk = torch.randn(6, 1, 8, dtype=torch.float64)  # queries at positions 12 to 17
    result = paged_attention(
        chunk,
        k_cache,
        v_cache,
        block_tables=torch.tensor([table], dtype=torch.int32),
        query_start_locs=torch.tensor([0, 6], dtype=torch.int32),
        context_lens=torch.tensor([context_len], dtype=torch.int32),
        scale=scale,
        max_query_len=6,
        max_context_len=context_len,
    )
    causal = torch.arange(18) <= torch.arange(12, 18)[:, None]  # (6, 18)
    heads_first = chunk.transpose(0, 1)
    expected = F.scaled_dot_product_attention(heads_first, k[None], v[None], attn_mask=causal)
    error = (result - expected.transpose(0, 1)).abs().max().item()
    print(f"\na chunk of 6 queries, NaN in the two unwritten slots: error {error:.1e}")
    assert error < 1e-12, f"error of the chunk: {error}"
    print("ok: reading block by block gives the same result as reading all tokens at once")


if __name__ == "__main__":
    demo()
