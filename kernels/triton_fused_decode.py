"""A decode step's write, attention and merge in one launch: the last program to arrive merges.

For each layer a step of the 124M GPT-2 asks the GPU to write the new keys and values, to attend,
and for few sequences to merge the chunks: 36 launches in 12 layers, of about 150 in all, and none
begins before the one before it has ended. The data ask for less. The program that owns a sequence's
last chunk may take the new token's k and v as the product left them: it stores them, and folds the
token in from registers. And a merge waits for its own few chunks, not for those of all sequences:

    one sequence, one head, chunk_len 256, context 600; its programs in the order they were done:
    chunk 0  reads [0, 256)                             m l acc -> memory   counter 0 -> 1
    chunk 2  reads [512, 599), takes and writes 599     m l acc -> memory   counter 1 -> 2
    chunk 1  reads [256, 512)                           m l acc -> memory   counter 2 -> 3
             found a 2, so all three are there: folds chunks 0, 1, 2, writes the row of out,
             and sets the counter to 0 for the next launch

To read the new slot in the launch that writes it would mean to wait for its writer: nobody reads
it. Which program comes last differs from run to run; what it computes does not, to the last bit.
The plain twin is `fused_decode`, two lines of PyTorch. What a production engine does beyond this:
in the same launch it rotates q and k (GPT-2 has nothing to rotate) and rounds K and V to 8 bits.

NVIDIA, CUDA C++ Programming Guide, "Memory Fence Functions": a sum that whoever is last completes.
Run: python -m kernels.triton_fused_decode
Try: in the demo, a chunk_len of 1; or arrived[0] = 1 before the first step (it is a's: at which
step does it matter?).
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, just below

from kernels.triton_decode import choose_chunk_len, decode_tiles
from kernels.triton_prefill import (
    INTERPRETED,
    can_launch,
    check_launch,
    scale_to_exp2,
    tile_d,
    tl,
    triton,
    walk,
)
from kv_cache import write_kv
from paged_attention import paged_attention

MOST_GROUP_ROWS = 16  # heads in one product: as many as a tensor core multiplies at one price


@triton.jit
def fold_new_token(m, l, acc, q, k, v, factor):
    """`fold_block` of paged_attention.py for one token that is in registers: the new m, l and acc.

    q (R, TILE_D), k and v (1, TILE_D). Its own sum, not a product of tiles: a tile of one token
    would be 15 rows of nothing.
    """
    scores = tl.sum(q.to(m.dtype) * k.to(m.dtype), 1) * factor
    # Finite, if the model's numbers are. If they are not, NaN is the answer that says so.
    m_new = tl.maximum(m, scores)
    shrink, p = tl.exp2(m - m_new), tl.exp2(scores - m_new)  # nothing read yet: 2^-inf is 0
    return m_new, l * shrink + p, acc * shrink[:, None] + p[:, None] * v.to(m.dtype)


@triton.jit
def arrive(counter):
    """Say that this program's partial results are in memory; returns how many said so before.

    The barrier ends when all threads have stored. Then one of them counts, "released": whoever
    sees the new count sees the stores too; and "acquired": what others had stored before they
    counted is visible from here on, to all threads, which wait for the count.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


@triton.jit
def fold_chunks(
    partial_m, partial_l, partial_acc,
    row,  # (R,), where each head's chunk 0 lies; its other chunks follow
    dim,  # (1, TILE_D)
    num_present,  # chunks to fold
    HEAD_DIM: tl.constexpr, TILE_C: tl.constexpr,  # the latter: chunks folded at a time
):  # fmt: skip
    """The fold of chunks, not of tokens, from the first to the last: returns l (R,) and acc.

    Always in this order, so the sums round the same way whoever arrived last. Reading all chunks at
    once, not one by one, waits for memory once.
    """
    m = tl.full([row.shape[0]], float("-inf"), partial_m.dtype.element_ty)
    l = tl.zeros_like(m)
    acc = tl.zeros([row.shape[0], dim.shape[1]], m.dtype)
    for first_chunk in range(0, num_present, TILE_C):
        chunk = first_chunk + tl.arange(0, TILE_C)[:, None]
        at, present = row[None, :] + chunk, chunk < num_present  # (TILE_C, R), (TILE_C, 1)
        # ".cg": from the cache that all processors share. The nearest one is not told of others'
        # stores, and may still hold what lay here before.
        chunk_m = tl.load(partial_m + at, present, other=float("-inf"), cache_modifier=".cg")
        chunk_l = tl.load(partial_l + at, present, other=0.0, cache_modifier=".cg")
        sums = partial_acc + at[:, :, None] * HEAD_DIM + dim[None, :, :]
        inside = present[:, :, None] & (dim < HEAD_DIM)[None, :, :]
        chunk_acc = tl.load(sums, inside, other=0.0, cache_modifier=".cg")  # (TILE_C, R, TILE_D)
        m_new = tl.maximum(m, tl.max(chunk_m, 0))  # finite: a chunk that is present has a token
        shrink, weight = tl.exp2(m - m_new), tl.exp2(chunk_m - m_new[None, :])
        l = l * shrink + tl.sum(chunk_l * weight, 0)
        acc = acc * shrink[:, None] + tl.sum(chunk_acc * weight[:, :, None], 0)
        m = m_new
    return l, acc


@triton.jit(do_not_specialize=["chunk_len", "stride_table"])
def fused_decode_kernel(
    q, k, v, k_cache, v_cache, out,  # as in `fused_decode_triton`, and so are the next three
    slot_mapping, block_tables, context_lens,
    # (N, H, num_chunks) twice, (N, H, num_chunks, D) and a counter for each program of axis 0:
    partial_m, partial_l, partial_acc, arrived,  # used where SPLIT is True, else None
    factor, chunk_len,  # scale x log2(e), and tokens a chunk, where SPLIT is True
    stride_table, stride_q_row, stride_q_head,  # strides in elements: from one row of a table, ..
    stride_k_row, stride_k_head, stride_v_row, stride_v_head,
    stride_block, stride_head, stride_token,  # of k_cache, and of v_cache too
    stride_out_row, stride_out_head,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,  # H_kv, and H // H_kv heads that share one
    TILE_G: tl.constexpr,  # rows of the product: GROUP rounded up to a power of two, at most 16
    HEAD_DIM: tl.constexpr, TILE_D: tl.constexpr,  # the latter rounded up to a power of two
    BLOCK_SIZE: tl.constexpr, TILE_K: tl.constexpr,  # tokens a block, tokens a tile
    TILE_C: tl.constexpr,  # chunks merged at a time
    SPLIT: tl.constexpr,  # True: this program reads one chunk, and perhaps merges them all
    UPCAST: tl.constexpr,  # compute in 32 bits what the interpreter can't in 16
):  # fmt: skip
    """One program: the one query of a sequence, the heads that share a head of K and V, a chunk."""
    GROUP_TILES: tl.constexpr = (GROUP + TILE_G - 1) // TILE_G  # 1, unless more than 16 heads share
    # Neighbours are the heads of one sequence, whose K and V lie in the same blocks.
    kv_head = tl.program_id(0) // GROUP_TILES % NUM_KV_HEADS
    i = (tl.program_id(0) // (NUM_KV_HEADS * GROUP_TILES)).to(tl.int64)
    group = tl.program_id(0) % GROUP_TILES * TILE_G + tl.arange(0, TILE_G)
    head, dim = kv_head * GROUP + group, tl.arange(0, TILE_D)[None, :]
    inside = (group < GROUP)[:, None] & (dim < HEAD_DIM)
    to = out + i * stride_out_row + head[:, None] * stride_out_head + dim
    context_len = tl.load(context_lens + i)
    if context_len <= 0:  # a padded row reads nothing, and nobody will read its k and v
        zeros = tl.zeros([TILE_G, TILE_D], out.dtype.element_ty)
        tl.store(to, zeros, inside & (tl.program_id(1) == 0))
        return
    first, stop = 0, context_len
    if SPLIT:
        first += tl.program_id(1) * chunk_len
        stop = tl.minimum(stop, first + chunk_len)
        if first >= stop:  # the context ends before this chunk: it is not waited for
            return

    # The new token is the last of the context. Its k and v are asked for now, to be there when the
    # walk is done; rounded to the pool's type, so that they count for what later steps will read.
    owns_new = stop == context_len
    new = owns_new & (dim < HEAD_DIM)
    new_k = tl.load(k + i * stride_k_row + kv_head * stride_k_head + dim, new, other=0.0)
    new_v = tl.load(v + i * stride_v_row + kv_head * stride_v_head + dim, new, other=0.0)
    new_k, new_v = new_k.to(k_cache.dtype.element_ty), new_v.to(v_cache.dtype.element_ty)
    slot, k_head = tl.load(slot_mapping + i).to(tl.int64), kv_head * stride_head
    at = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_token + k_head + dim
    # Where a group is several programs the first of them writes, and all have it in registers.
    first_of_group = tl.program_id(0) % GROUP_TILES == 0
    tl.store(k_cache + at, new_k, new & first_of_group)
    tl.store(v_cache + at, new_v, new & first_of_group)

    queries = tl.load(q + i * stride_q_row + head[:, None] * stride_q_head + dim, inside, other=0.0)
    queries = queries.to(tl.float32) if UPCAST else queries
    end = tl.minimum(stop, context_len - 1)  # what is read ends before the slot just written
    last = tl.full([TILE_G], 0, tl.int32) + end - 1  # all heads ask the same query
    full = first + (end - first) // TILE_K * TILE_K
    table = block_tables + i * stride_table
    kv = (table, k_cache + k_head, v_cache + k_head, stride_block, stride_token)
    m, l, acc = walk(queries, last, factor, first, full, end, kv, HEAD_DIM, BLOCK_SIZE, TILE_K)
    if owns_new:
        m, l, acc = fold_new_token(m, l, acc, queries, new_k, new_v, factor)
    if SPLIT:
        num_present = tl.cdiv(context_len, chunk_len)
        if num_present > 1:  # a context of one chunk is merged already
            # The tile's rows behind the group repeat its last head: finite, and never stored.
            among_heads = kv_head * GROUP + tl.minimum(group, GROUP - 1)
            row = (i * NUM_KV_HEADS * GROUP + among_heads) * tl.num_programs(1)
            place = row + tl.program_id(1)
            tl.store(partial_m + place, m, group < GROUP)
            tl.store(partial_l + place, l, group < GROUP)
            tl.store(partial_acc + place[:, None] * HEAD_DIM + dim, acc, inside)
            if arrive(arrived + tl.program_id(0)) < num_present - 1:
                return
            tl.store(arrived + tl.program_id(0), 0)  # all have counted, nobody looks again
            l, acc = fold_chunks(
                partial_m, partial_l, partial_acc, row, dim, num_present, HEAD_DIM, TILE_C
            )
    tl.store(to, (acc / l[:, None]).to(out.dtype.element_ty), inside)


def num_arrivals(num_seqs: int, num_heads: int, num_kv_heads: int) -> int:
    """How many counters `fused_decode_triton` wants for a batch of so many sequences.

    One for each of them and each head of K and V: (8, 12, 12) -> 96. Where more than 16 query
    heads share one, they are several programs with a counter each: (8, 40, 2) -> 32.
    """
    group = num_heads // num_kv_heads
    return num_seqs * num_kv_heads * -(-group // MOST_GROUP_ROWS)


def check_step(
    # (N, H, D), twice (N, H_kv, D), and twice (num_blocks + 1, H_kv, block_size, D)
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor,
    # (N,), (N, max_blocks) and (N,), at least `num_arrivals(..)` counters, (N, H, D)
    slot_mapping: Tensor, block_tables: Tensor, context_lens: Tensor, arrived: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Raise ValueError where the shapes contradict each other. The values stay on the device."""
    (N, H, D), (H_kv, block_size) = q.shape, k_cache.shape[1:3]
    if len(block_tables) != N:
        given = f"{N} queries for {len(block_tables)} sequences"
        raise ValueError(f"{given}: this is for one each, use paged_attention_triton for others")
    if H % H_kv:
        raise ValueError(f"{H} query heads share {H_kv} of K and V: H must be a multiple of H_kv")
    cache = (len(k_cache), H_kv, block_size, D)
    shapes = {
        "k": (k, (N, H_kv, D)),
        "v": (v, (N, H_kv, D)),
        "k_cache": (k_cache, cache),
        "v_cache": (v_cache, cache),
        "slot_mapping": (slot_mapping, (N,)),
        "context_lens": (context_lens, (N,)),
        "out": (out, (N, H, D)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}: beside the others it must be {shape}"
            )
    needed = num_arrivals(N, H, H_kv)
    if arrived.dtype != torch.int32 or not arrived.is_contiguous() or arrived.numel() < needed:
        given = f"arrived is {arrived.dtype} {tuple(arrived.shape)}, strides {arrived.stride()}"
        raise ValueError(f"{given}: it must be int32, contiguous, {needed} zeros or more")


def fused_decode_triton(
    # (N, H, D), and twice (N, H_kv, D), only D needs to be contiguous: slices of the QKV product
    q: Tensor, k: Tensor, v: Tensor,
    # (num_blocks + 1, H_kv, block_size, D) both
    k_cache: Tensor, v_cache: Tensor,
    # (N,) int64, (N, max_blocks) int32 and (N,) int32
    slot_mapping: Tensor, block_tables: Tensor, context_lens: Tensor,
    scale: float, max_context_len: int,
    arrived: Tensor,  # (num_arrivals(N, H, H_kv),) int32 or more
    # (N, H, D)
    out: Tensor | None = None, chunk_len: int | None = None,
) -> Tensor:  # fmt: skip
    """Write each sequence's one new token to its slot and attend for it; returns (N, H, D).

    Row i is sequence i: a pure decode step. `context_lens` count the new token, `max_context_len`
    is an upper bound known to the host. A padded row has a context of 0 tokens: its row of the
    result is zero, and its k and v are written nowhere. `chunk_len` is `paged_decode_triton`'s: a
    positive number makes a sequence's result bit for bit the same in any batch, 0 never splits.

    `arrived` are zeros before the first call, and each call leaves zeros. Calls one after another,
    of all layers and steps, may share them; calls on two streams at a time may not. A recorded
    step must find them where they are, so whoever builds it allocates them. Raises ValueError for
    shapes that contradict each other and for too few counters, RuntimeError where there is no GPU.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    check_launch(q=q, k_cache=k_cache, v_cache=v_cache, out=out)
    check_launch(k=k, v=v)  # perhaps of another type
    where = (slot_mapping, block_tables, context_lens)
    check_step(q, k, v, k_cache, v_cache, *where, arrived, out)
    (N, H, D), (_, H_kv, block_size, _) = q.shape, k_cache.shape
    if N == 0:
        return out
    if chunk_len is None:
        chunk_len = choose_chunk_len(N, H_kv, max_context_len)
    num_chunks = max(1, triton.cdiv(max_context_len, chunk_len)) if chunk_len else 1
    merge = (None, None, None, None)
    if chunk_len:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        sizes = [(N, H, num_chunks, *rest) for rest in ((), (), (D,))]
        merge = (*(torch.empty(size, dtype=dtype, device=q.device) for size in sizes), arrived)
    q, factor = scale_to_exp2(q, scale)
    TILE_G = min(MOST_GROUP_ROWS, triton.next_power_of_2(H // H_kv))
    strides = (block_tables.stride(0), *(n for x in (q, k, v) for n in x.stride()[:2]))
    strides += (*k_cache.stride()[:3], *out.stride()[:2])
    # Axis 0 may be as long as 2^31, axis 1 only 65,535: that many chunks of one context.
    fused_decode_kernel[(num_arrivals(N, H, H_kv), num_chunks)](
        q, k, v, k_cache, v_cache, out, *where, *merge, factor, chunk_len, *strides,
        NUM_KV_HEADS=H_kv, GROUP=H // H_kv, TILE_G=TILE_G, HEAD_DIM=D, TILE_D=tile_d(D),
        BLOCK_SIZE=block_size, TILE_C=max(1, 2048 // (TILE_G * tile_d(D))), SPLIT=chunk_len > 0,
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16, **decode_tiles(q.dtype, D),
    )  # fmt: skip
    return out


def fused_decode(
    # (N, H, D), twice (N, H_kv, D), and twice (num_blocks + 1, H_kv, block_size, D)
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor,
    # (N,) int64, (N, max_blocks) int32 and (N,) int32
    slot_mapping: Tensor, block_tables: Tensor, context_lens: Tensor,
    scale: float, max_context_len: int,
) -> Tensor:  # fmt: skip
    """The plain twin of `fused_decode_triton`: write, then attend; returns (N, H, D)."""
    write_kv(k, v, k_cache, v_cache, slot_mapping)
    locs = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)  # one query a sequence
    where = (block_tables, locs, context_lens)
    return paged_attention(q, k_cache, v_cache, *where, scale, 1, max_context_len)


# --------------------------------------------------------------------------------------------------
def demo():
    """Two sequences grow over the end of a chunk, beside a padded row: one launch for each step."""
    if not can_launch():
        return
    H, D, block_size, chunk_len, prompts = 2, 16, 4, 8, [5, 14]
    torch.manual_seed(0)
    with torch.device("cpu" if INTERPRETED else "cuda"):
        pool = torch.full((13, 2, H, block_size, D), math.nan)  # block 12 is scratch
        tables = torch.cat([torch.randperm(12).view(2, 6), torch.full((1, 6), 12)]).int()
        for table, n in zip(tables, prompts):
            slots = (table[:, None].long() * block_size + torch.arange(block_size)).flatten()[:n]
            write_kv(*torch.randn(2, n, H, D), pool[:, 0], pool[:, 1], slots)
        arrived = torch.zeros(num_arrivals(3, H, H), dtype=torch.int32)
        steps = torch.randn(5, 3, 3, H, D)  # of each step q, k and v
    print(
        f"block_size {block_size}, chunk_len {chunk_len}, {H} heads; sequences a, b, a padded row"
    )
    print("\nstep  contexts     slots      chunks     counted   distance from write, then attend")
    for step, (q, k, v) in enumerate(steps, 1):
        lens = [n + step for n in prompts] + [0]
        slots = [tables[i, (n - 1) // 4].item() * 4 + (n - 1) % 4 for i, n in enumerate(lens[:2])]
        where = (torch.tensor([*slots, 48]), tables, torch.tensor(lens, dtype=torch.int32))
        where = tuple(x.to(q.device) for x in where)
        plain = pool.clone()
        rest = (*where, D**-0.5, max(lens))
        got = fused_decode_triton(q, k, v, pool[:, 0], pool[:, 1], *rest, arrived, None, chunk_len)
        want = fused_decode(q, k, v, plain[:, 0], plain[:, 1], *rest)
        error = (got - want).abs().max().item()
        chunks = [-(-n // chunk_len) for n in lens]
        counted = H * sum(n for n in chunks if n > 1)  # a context of one chunk counts nothing
        print(f"{step:4}  {lens!s:13}{slots!s:11}{chunks!s:11}{counted:7}   {error:.1e}")
        assert error < 1e-5 and got[2].abs().max() == 0
        # The same slots were written; for the padded row not even scratch.
        assert torch.equal(pool[:12].nan_to_num(99.0), plain[:12].nan_to_num(99.0))
        assert pool[12].isnan().all()
    print(f"counters: {arrived.tolist()}")
    assert not arrived.any()
    print("ok: written, attended and merged by one launch a step")


if __name__ == "__main__":
    demo()
