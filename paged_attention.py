"""Attention does not care in which order memory lies: the online softmax, block by block.

A softmax seems to need all scores at once: its denominator is their sum, and to be safe from
overflow one subtracts their maximum first. But both can be corrected afterwards. Keep a running
maximum m, a running denominator l and a running weighted sum of values acc; a new block of scores s
with values V updates them, and whatever was summed under the old maximum shrinks by the same
factor:

    m' = max(m, max(s))   l' = l e^(m - m') + sum(e^(s - m'))   acc' = acc e^(m - m') + e^(s - m') V

After the last block acc / l is the attention output, whatever the order of the blocks. So K and V
may lie in any blocks of the pool: look a block up in the table, read it, update, go on. Gathering a
whole context into one piece first would move every byte three times instead of once.

This file says it in plain PyTorch and is the oracle of the compiled kernels, which share its
signature: queries of any length per sequence, so that a prompt, a chunk of one, a decode step and
any mixture of them are one call. What a production engine does beyond this: that is what the
kernels are for.

Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867,
algorithm 3; Dao et al. 2022, "FlashAttention", arXiv:2205.14135, section 3.1.
Run: python paged_attention.py
Try: in the demo, walk the blocks in reverse (the same result), or start m at 0 instead of -inf and
make all scores very negative (what divides by zero?).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def paged_attention(
    q: Tensor,  # (N, H, D), queries of all sequences end to end; only D needs to be contiguous
    k_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D), one layer's view of the pool
    v_cache: Tensor,  # the same
    block_tables: Tensor,  # (B, max_blocks) int32
    query_start_locs: Tensor,  # (B + 1,) int32: sequence i's rows are [locs[i], locs[i + 1])
    context_lens: Tensor,  # (B,) int32: tokens that its last query may read, itself included
    scale: float,
    max_query_len: int,  # upper bounds, known to the host: nothing here asks the device for a value
    max_context_len: int,
    context_starts: Tensor | None = None,  # (B,) int32: first position that may be read, else 0
    out: Tensor | None = None,  # (N, H, D)
) -> Tensor:
    """Causal attention of each query over its sequence's blocks; returns (N, H, D) in q's dtype.

    Query t of a sequence with T queries sits at position context_len - T + t and reads the
    positions [context_start, its own]. A query that may read nothing, and a row that belongs to
    no sequence, is zero. H may be a multiple of H_kv. 16-bit inputs are accumulated in 32 bits.
    """
    N, H, D = q.shape
    B, H_kv, block_size = block_tables.shape[0], k_cache.shape[1], k_cache.shape[2]
    out = torch.empty((N, H, D), dtype=q.dtype, device=q.device) if out is None else out
    if N == 0 or B == 0:
        return out.zero_()
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    T, G = max_query_len, H // H_kv
    starts, lens = query_start_locs[:-1].long(), query_start_locs.diff().long()

    # Lay the queries out as (B, T): sequences shorter than T get rows that nobody will look at.
    t = torch.arange(T, device=q.device)
    rows = (starts[:, None] + t).clamp(max=N - 1)
    queries = q[rows].to(dtype).unflatten(2, (H_kv, G))  # (B, T, H_kv, G, D)
    queries = queries.permute(0, 2, 3, 1, 4).reshape(B, H_kv, G * T, D) * scale
    last = (context_lens - lens)[:, None] + t  # (B, T): the last position that each query may read
    first = torch.zeros_like(lens) if context_starts is None else context_starts.long()

    m = torch.full((B, H_kv, G, T), -math.inf, dtype=dtype, device=q.device)
    l = torch.zeros_like(m)
    acc = torch.zeros((B, H_kv, G, T, D), dtype=dtype, device=q.device)
    for i in range(-(-max_context_len // block_size)):
        block_ids = block_tables[:, i].long()
        k, v = (
            k_cache[block_ids].to(dtype),
            v_cache[block_ids].to(dtype),
        )  # (B, H_kv, block_size, D)
        position = i * block_size + torch.arange(block_size, device=q.device)
        readable = (position >= first[:, None, None]) & (position <= last[:, :, None])
        # A mask on the scores is not enough: 0 * NaN is NaN, and an unwritten slot may hold one.
        v = v.masked_fill((position >= context_lens[:, None])[:, None, :, None], 0)
        v = v.masked_fill((position < first[:, None])[:, None, :, None], 0)
        scores = (queries @ k.mT).view(B, H_kv, G, T, block_size)
        scores = scores.masked_fill(~readable[:, None, None], -math.inf)

        m_new = torch.maximum(m, scores.amax(-1))
        m_safe = m_new.masked_fill(m_new == -math.inf, 0)  # nothing read yet: -inf - -inf is NaN
        shrink, p = (m - m_safe).exp(), (scores - m_safe[..., None]).exp()
        l = l * shrink + p.sum(-1)
        weighted = (p.flatten(2, 3) @ v).view(B, H_kv, G, T, D)
        acc = acc * shrink[..., None] + weighted
        m = m_new

    result = acc / l.masked_fill(l == 0, 1)[..., None]
    result = result.permute(0, 3, 1, 2, 4).reshape(B, T, H, D)
    # Back to flat rows: row n is query n - starts[i] of the sequence i whose rows it lies in.
    n = torch.arange(N, device=q.device)
    sequence = torch.searchsorted(query_start_locs[1:].long(), n, right=True)
    owned = sequence < B
    sequence = sequence.clamp(max=B - 1)
    flat = result[sequence, (n - starts[sequence]).clamp(max=T - 1)]
    return out.copy_(flat.masked_fill(~owned[:, None, None], 0))


# --------------------------------------------------------------------------------------------------
def demo():
    """One query walks a shuffled table: m, l and the error after each block; then a chunk."""
    generator = torch.Generator().manual_seed(0)
    k_cache, v_cache = torch.randn(2, 9, 1, 4, 8, generator=generator, dtype=torch.float64)
    table, context_len = [6, 1, 4, 3, 0], 18
    q = torch.randn(1, 1, 8, generator=generator, dtype=torch.float64)
    k, v = (cache[table].transpose(1, 2).flatten(0, 1)[:18, 0] for cache in (k_cache, v_cache))
    dense = (q[0] @ k.T * 8**-0.5).softmax(-1) @ v

    def attend(length: int, query: Tensor = q) -> Tensor:
        def int32(*values):
            return torch.tensor(values, dtype=torch.int32)

        where = int32(*table)[None], int32(0, len(query)), int32(length)
        return paged_attention(query, k_cache, v_cache, *where, 8**-0.5, len(query), length)

    print(f"one query, {context_len} tokens in blocks {table} of 4\n")
    print("blocks read   running max m   denominator l   distance from the dense result")
    for read in (4, 8, 12, 16, 18):
        scores = q[0] @ k[:read].T * 8**-0.5
        denominator = (scores - scores.max()).exp().sum()
        distance = (attend(read)[0] - dense).abs().max()
        print(f"{-(-read // 4):11} {scores.max():15.4f} {denominator:15.4f} {distance:16.1e}")

    v_cache[0, :, 2:] = math.nan  # positions 18 and 19 were never written: nobody may read them
    chunk = torch.randn(6, 1, 8, generator=generator, dtype=torch.float64)  # six queries at once
    want = F.scaled_dot_product_attention(
        chunk.transpose(0, 1),
        k[None],
        v[None],
        attn_mask=torch.arange(18) <= torch.arange(12, 18)[:, None],
    )
    error = (attend(18, chunk) - want.transpose(0, 1)).abs().max()
    print(f"\na chunk of 6 queries over the same blocks, one slot poisoned: error {error:.1e}")
    assert (attend(18)[0] - dense).abs().max() < 1e-12 and error < 1e-12
    print("ok: block by block, in any order of memory, it is the same attention")


if __name__ == "__main__":
    demo()
