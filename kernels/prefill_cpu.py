"""The same function on the CPU for many queries: blocks laid out once, then a BLAS; the KV write.

A decoding sequence brings one query, and reading its context is all the work there is. A prompt of
300 tokens brings 300, and each number that is read meets all of them: there the processor is the
limit, the matrix product decides, and the fastest one is in the library. It wants K and V of a
head as one matrix, so the blocks are copied once, in one pass, into the order of the positions:

    table [ 5, 0, 7 ]   block 5 | block 0 | block 7      (H_kv, block_size, D) each
                           └─────────┼─────────┘
                        head 0: positions 0 1 2 .. 40    head 1: ..     (H_kv, context, D)

The copy costs as much as reading the context once more; the products it makes possible are worth it
from about ten queries on. The write of new K and V into their slots is here as well: row n of the
step goes to slot_mapping[n], head by head. What a production engine does beyond this: it multiplies
tile by tile straight from the blocks, with matrix instructions.

Dao et al. 2022, "FlashAttention", arXiv:2205.14135: what the library's kernel does.
Run: python -m kernels.prefill_cpu
Try: set MANY_QUERIES in kernels/attention_cpu.py to 2 or to 1000, and time a prompt.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.numba_tools import HAS_NUMBA, compiled, flat, widen
from kv_cache import KVCache, Row, make_batch, write_kv
from paged_attention import paged_attention

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def check(name: str, *tensors: Tensor) -> None:
    """RuntimeError without Numba, TypeError for a dtype and ValueError for strides it has not."""
    if not HAS_NUMBA:
        raise RuntimeError(f"{name} needs numba: pip install numba, or use backend='torch'")
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            dtype = str(tensor.dtype)[6:]
            raise TypeError(f"{name} has float64, float32 and bfloat16, not {dtype}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}: strides are {tensor.stride()}, the last one must be 1")


# ---- a prompt ------------------------------------------------------------------------------------
@compiled
def lay_out(cache, shape, table, start, stop, out):
    """Copy positions [start, stop) of a sequence into out (H_kv, stop - start, D), in one pass."""
    H_kv, block_size, block_stride, head_stride, token_stride = shape
    D = np.uint64(out.shape[2])
    for p in range(start, stop):
        block = np.int64(table[p // block_size]) * block_stride
        for h in range(H_kv):
            offset = p % block_size * token_stride
            row = np.uint64(block + h * head_stride + offset)
            for d in range(D):
                out[h, p - start, d] = widen(cache[row + d])


def attend_prompt(q, k, v, shape, table, context_len: int, start: int, scale: float, out) -> None:
    """Many queries of one sequence, q (T, H, D): its blocks laid out once, then PyTorch's kernel.

    Writes out (T, H, D), of q's dtype, but for the rows of queries that may read nothing.
    """
    T, H, D = q.shape
    idle = max(0, start - (context_len - T))  # queries at positions before `start`
    if idle >= T:
        return
    k_dense, v_dense = torch.empty((2, shape[0], context_len - start, D), dtype=q.dtype)
    lay_out(k, shape, table, start, context_len, k_dense.numpy())
    lay_out(v, shape, table, start, context_len, v_dense.numpy())
    past = context_len - start - (T - idle)  # readable tokens before the first of these queries
    mask = torch.ones(T - idle, context_len - start, dtype=torch.bool).tril(past) if past else None
    out[idle:] = F.scaled_dot_product_attention(
        q[idle:].transpose(0, 1)[None],
        k_dense[None],
        v_dense[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=H != shape[0],
    )[0].transpose(0, 1)


# ---- the write -----------------------------------------------------------------------------------
@compiled
def copy_rows(source, source_strides, target, target_strides, block_size, slots, H_kv, D):
    """source (N, H_kv, D) to the slots of target, both flat with their strides beside them."""
    for n in range(len(slots)):
        block_id, offset = slots[n] // block_size, slots[n] % block_size
        for h in range(H_kv):
            begin = n * source_strides[0] + h * source_strides[1]
            to = block_id * target_strides[0] + h * target_strides[1] + offset * target_strides[2]
            a, b = np.uint64(begin), np.uint64(to)
            for d in range(np.uint64(D)):
                target[b + d] = source[a + d]


@compiled
def copy_both(
    k, k_strides, k_cache, k_cache_strides, v, v_strides, v_cache, v_cache_strides, *sizes
):
    """`copy_rows` of k and of v, in one call from Python."""
    copy_rows(k, k_strides, k_cache, k_cache_strides, *sizes)
    copy_rows(v, v_strides, v_cache, v_cache_strides, *sizes)


def write_kv_cpu(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Put each token's k and v (N, H_kv, D) into its slot of one layer's caches, in place."""
    k, v = k.to(k_cache.dtype), v.to(v_cache.dtype)
    check("write_kv_cpu", k_cache, v_cache, k, v)
    from_k = flat(k), k.stride(), flat(k_cache), k_cache.stride()
    from_v = flat(v), v.stride(), flat(v_cache), v_cache.stride()
    copy_both(*from_k, *from_v, k_cache.shape[2], slot_mapping.numpy(), *k.shape[1:])


# --------------------------------------------------------------------------------------------------
def demo():
    """A prompt of 40 tokens and a chunk of 17 after 24 cached ones: written, laid out, attended."""
    if not HAS_NUMBA:
        print("ok: nothing to run without numba")
        return
    torch.manual_seed(0)
    cache, by_torch = (KVCache(1, 12, 16, 2, 8, torch.float64) for _ in range(2))
    tables = {"prompt of 40": [5, 0, 7], "17 after 24": [2, 9, 4]}
    firsts, counts = [0, 24], [40, 17]
    rows = [
        Row(list(range(first + n)), first, n, table, 1)
        for first, n, table in zip(firsts, counts, tables.values(), strict=True)
    ]
    past = torch.randn(2, 24, 2, 8, dtype=torch.float64)
    batch = make_batch(rows, 16, cache.scratch_block)
    early = make_batch([Row(list(range(24)), 0, 24, tables["17 after 24"], 1)], 16, 12)
    q, k, v = torch.randn(3, 57, 2, 8, dtype=torch.float64)
    for target, write in ((cache, write_kv_cpu), (by_torch, write_kv)):
        write(*past, *target.layer(0), early.slot_mapping)
        write(k, v, *target.layer(0), batch.slot_mapping)
    print(f"57 rows in slots {batch.slot_mapping[:3].tolist()} .. {batch.slot_mapping[-1].item()}")
    assert torch.equal(cache.pool, by_torch.pool)

    k_cache, v_cache = cache.layer(0)
    where = batch.block_tables, batch.query_start_locs, batch.context_lens
    want = paged_attention(q, k_cache, v_cache, *where, 8**-0.5, 40, 41)
    shape = (*k_cache.shape[1:3], *k_cache.stride()[:3])
    begin = 0
    for (name, table), first, n in zip(tables.items(), firsts, counts, strict=True):
        rows = slice(begin, begin + n)
        pools, table = (flat(k_cache), flat(v_cache)), torch.tensor(table).numpy()
        got = torch.zeros(n, 2, 8, dtype=torch.float64)
        attend_prompt(q[rows], *pools, shape, table, first + n, 0, 8**-0.5, got)
        error = (got - want[rows]).abs().max().item()
        print(f"{name:12}: blocks {table.tolist()} laid out once, {error:.1e} from the oracle")
        assert error < 1e-12
        begin += n
    print("ok: every row in its slot, every prompt attended")


if __name__ == "__main__":
    demo()
