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


def fold_block(
    m: Tensor,  # (..., R) running maximum of the R rows' scores
    l: Tensor,  # (..., R) running denominator
    acc: Tensor,  # (..., R, D) running weighted sum of values
    scores: Tensor,  # (..., R, block_size), -inf where a row may not read
    v: Tensor,  # (..., block_size, D)
) -> tuple[Tensor, Tensor, Tensor]:
    """The three equations above for one block: returns the new m, l and acc."""
    m_new = torch.maximum(m, scores.amax(-1))
    m_safe = m_new.masked_fill(m_new == -math.inf, 0)  # nothing read yet: -inf - -inf is NaN
    shrink, p = (m - m_safe).exp(), (scores - m_safe[..., None]).exp()
    return m_new, l * shrink + p.sum(-1), acc * shrink[..., None] + p @ v


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

    Query t of a sequence with T queries sits at position context_len - T + t and reads positions
    [context_start, its own + 1). A query that may read nothing, and a row that belongs to no
    sequence, is zero. H may be a multiple of H_kv. 16-bit inputs are accumulated in 32 bits.
    """
    N, H, D = q.shape
    B, H_kv, block_size = block_tables.shape[0], k_cache.shape[1], k_cache.shape[2]
    out = torch.empty((N, H, D), dtype=q.dtype, device=q.device) if out is None else out
    if N == 0 or B == 0 or max_query_len == 0:
        return out.zero_()
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    T, G = max_query_len, H // H_kv
    starts, lens = query_start_locs[:-1].long(), query_start_locs.diff().long()
    first = torch.zeros_like(lens) if context_starts is None else context_starts.long()

    # Lay the queries out as (B, T): shorter sequences get rows that nobody will look at. The G
    # heads that share a head of K and V become rows too: R = G * T rows read the same blocks.
    t = torch.arange(T, device=q.device)
    rows = (starts[:, None] + t).clamp(max=N - 1)
    queries = q[rows].to(dtype).unflatten(2, (H_kv, G)).permute(0, 2, 3, 1, 4)
    queries = queries.reshape(B, H_kv, G * T, D) * scale
    last = (context_lens - lens)[:, None] + t  # (B, T): the last position that each query may read

    m = torch.full((B, H_kv, G * T), -math.inf, dtype=dtype, device=q.device)
    l, acc = torch.zeros_like(m), torch.zeros_like(queries)
    for i in range(min(-(-max_context_len // block_size), block_tables.shape[1])):
        block_ids = block_tables[:, i].long()
        k, v = k_cache[block_ids].to(dtype), v_cache[block_ids].to(dtype)  # (B, H_kv, block, D)
        position = i * block_size + torch.arange(block_size, device=q.device)
        # A mask on the scores is not enough: 0 * NaN is NaN, and an unwritten slot may hold one.
        unread = (position < first[:, None]) | (position >= context_lens[:, None])
        v = v.masked_fill(unread[:, None, :, None], 0)
        hidden = (position < first[:, None, None]) | (position > last[:, :, None])  # (B, T, block)
        scores = (queries @ k.mT).masked_fill(hidden.repeat(1, G, 1)[:, None], -math.inf)
        m, l, acc = fold_block(m, l, acc, scores, v)

    result = acc / l.masked_fill(l == 0, 1)[..., None]
    result = result.view(B, H_kv, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)
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

    def attend(query: Tensor) -> Tensor:
        def int32(*values):
            return torch.tensor(values, dtype=torch.int32)

        where = int32(*table)[None], int32(0, len(query)), int32(context_len)
        sizes = len(query), context_len
        return paged_attention(query, k_cache, v_cache, *where, 8**-0.5, *sizes)

    print(f"one query, {context_len} tokens in blocks {table} of 4\n")
    print("block   running max m   denominator l   distance from the dense result")
    m, l, acc = torch.tensor([-math.inf], dtype=torch.float64), torch.zeros(1), torch.zeros(1, 8)
    for i, block_id in enumerate(table):
        scores = q[0] @ k_cache[block_id, 0].T * 8**-0.5
        scores[0, max(0, context_len - 4 * i) :] = -math.inf  # the tail of the last block
        m, l, acc = fold_block(m, l, acc, scores, v_cache[block_id, 0])
        distance = (acc / l[:, None] - dense).abs().max()
        print(f"{block_id:5} {m.item():15.4f} {l.item():15.4f} {distance:16.1e}")

    v_cache[0, :, 2:] = math.nan  # positions 18 and 19 were never written: nobody may read them
    chunk = torch.randn(6, 1, 8, generator=generator, dtype=torch.float64)  # six queries at once
    want = F.scaled_dot_product_attention(
        chunk.transpose(0, 1),
        k[None],
        v[None],
        attn_mask=torch.arange(18) <= torch.arange(12, 18)[:, None],
    )
    error = (attend(chunk) - want.transpose(0, 1)).abs().max()
    print(f"\na chunk of 6 queries over the same blocks, one slot poisoned: error {error:.1e}")
    assert distance < 1e-12 and (attend(q)[0] - dense).abs().max() < 1e-12 and error < 1e-12
    print("ok: block by block, in any order of memory, it is the same attention")


if __name__ == "__main__":
    demo()
