"""The same attention on the GPU for many queries: tiles of queries walk tiles of the context.

A prompt of 512 tokens asks 512 questions about the same keys and values. Answered one by one they
would read the context 512 times. A program of this kernel takes 64 queries of one head at once,
reads each piece of the context once for all of them, and multiplies two 64 x 64 tiles where the
oracle multiplied a row and a block: that is the shape that tensor cores want. Prompts, chunks of
prompts and whole batches of them, of any lengths, are one launch:

    rows of q, TILE_Q 4    |aaaa aa|bb|cccc cccc c|..|    sequences a, b, c; two rows of nobody
    program (of each head)  0    1  2  4    5    6 7      3 was room for a second tile of b
    each finds its sequence by binary search in query_start_locs: no list of work is built

Two further things are here because the next file needs them too: `fold_tile`, which is `fold_block`
of paged_attention.py said in Triton, and the kernel that writes new keys and values to their slots.
A tile of the context is no block: its 64 tokens span as many blocks as they must, and each
position looks its block up in the table. What a production engine does beyond this: pipelines of
copies and products written by hand for each GPU (FlashAttention-3), 8-bit keys and values.

Dao 2023, "FlashAttention-2", arXiv:2307.08691, sections 3.1 and 3.2.
Run: python -m kernels.triton_prefill
Try: a TILE_Q of 8 in `prefill_tiles` (how many programs, how many tokens read?), or drop the `+ i`
in `find_sequence` and see whose rows are lost.
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from torch import Tensor

# A script without a GPU still has something to show: Triton then interprets the kernels in Python.
# It reads this variable when it is imported, so the line stands above the import.
if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # macOS and Windows have none: the file must import there all the same
    HAS_TRITON = False

    class _Missing:
        """Whatever is asked of it is itself: decorators pass, and `check_launch` refuses to run."""

        def __call__(self, *args, **kwargs) -> _Missing:
            return self

        __getattr__ = __call__

    triton = tl = _Missing()

from paged_attention import paged_attention

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@triton.jit
def fold_tile(
    m, l, acc,  # (R,), (R,), (R, TILE_D): running maximum of R rows in units of log2, l and acc
    q,  # (R, TILE_D), the queries
    last,  # (R,), the last position that each row may read
    factor,  # scale x log2(e): e^(scale s) = 2^(factor s), and a GPU has an instruction for 2^x
    first, end,  # the tile is positions [first, first + TILE_K); no row reads any from `end` on
    kv,  # pointers to the sequence's row of block_tables and to this head's K and V in block 0,
    # then the strides in elements from one block and from one token to the next
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_K: tl.constexpr,  # tokens a tile
    MASKED: tl.constexpr,  # False: the caller knows that every row may read the whole tile
):  # fmt: skip
    """`fold_block` of paged_attention.py for one tile: returns the new m, l and acc."""
    table, k_head, v_head, stride_block, stride_token = kv
    position = first + tl.arange(0, TILE_K)
    dim = tl.arange(0, q.shape[1])[None, :]
    inside = dim < HEAD_DIM  # a tile is as wide as the next power of two
    if MASKED:
        inside = inside & (position < end)[:, None]
        block_id = tl.load(table + position // BLOCK_SIZE, mask=position < end, other=0)
    else:
        block_id = tl.load(table + position // BLOCK_SIZE)
    # 64 bits before the product: one layer of a large pool has more than 2^31 elements.
    rows = block_id.to(tl.int64) * stride_block + position % BLOCK_SIZE * stride_token
    at = rows[:, None] + dim
    # Zeros, for a mask on the scores is not enough: such a V has weight 0, and 0 * NaN is NaN.
    # The type is q's already, unless the interpreter computes bfloat16 in 32 bits.
    k = tl.load(k_head + at, mask=inside, other=0.0).to(q.dtype)
    v = tl.load(v_head + at, mask=inside, other=0.0).to(q.dtype)
    # "ieee": the default would round 32-bit inputs to 10 bits of mantissa (TF32).
    scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=acc.dtype) * factor
    if MASKED:
        scores = tl.where(position[None, :] <= last[:, None], scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing read yet: -inf - -inf is NaN
    shrink, p = tl.exp2(m - m_safe), tl.exp2(scores - m_safe[:, None])
    l = l * shrink + tl.sum(p, 1)
    # Tensor cores multiply two tiles of one type, so p is rounded to V's; its sum l is not.
    p, acc = p.to(v.dtype), acc * shrink[:, None]
    return m_new, l, tl.dot(p, v, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def walk(
    q, last, factor,
    first, full, end,  # every row reads [first, full), whole tiles; some row reads up to `end`
    kv, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Fold the positions [first, end) of a context, tile by tile: returns m, l and acc.

    The parameters are those of `fold_tile`. Two loops, because nearly all tiles need no mask; and
    `for`, because that is the loop whose next tiles the compiler fetches ahead.
    """
    m = tl.full([q.shape[0]], float("-inf"), tl.float64 if q.dtype == tl.float64 else tl.float32)
    l = tl.zeros_like(m)
    acc = tl.zeros([q.shape[0], q.shape[1]], m.dtype)
    for tile in range(first, full, TILE_K):
        m, l, acc = fold_tile(
            m, l, acc, q, last, factor, tile, end, kv, HEAD_DIM, BLOCK_SIZE, TILE_K, False
        )
    for tile in range(full, end, TILE_K):
        m, l, acc = fold_tile(
            m, l, acc, q, last, factor, tile, end, kv, HEAD_DIM, BLOCK_SIZE, TILE_K, True
        )
    return m, l, acc


@triton.jit
def find_sequence(program, query_start_locs, num_seqs, search_steps, TILE_Q: tl.constexpr):
    """The sequence that a tile of queries belongs to, and which of its tiles it is.

    Tile t of sequence i is program `query_start_locs[i] // TILE_Q + i + t`. The `+ i` leaves room
    for each sequence's last, partly filled tile and makes the starts strictly rising, so that a
    sequence without queries is never found with a tile of another. The rows behind the last
    sequence are those of a sequence `num_seqs` that may read nothing.
    """
    low, high = 0, num_seqs
    for _ in range(search_steps):  # as many as halve num_seqs + 1 candidates to one
        middle = (low + high + 1) // 2
        starts_before = tl.load(query_start_locs + middle) // TILE_Q + middle <= program
        low, high = tl.where(starts_before, middle, low), tl.where(starts_before, high, middle - 1)
    return low, program - (tl.load(query_start_locs + low) // TILE_Q + low)


# What differs from step to step must not make a new variant: Triton would compile one for an
# integer that is 1 and one for those divisible by 16.
@triton.jit(do_not_specialize=["num_seqs", "num_rows", "search_steps", "stride_table"])
def prefill_kernel(
    q, k_cache, v_cache, out,  # as in `paged_prefill_triton`, and so are the next four
    block_tables, query_start_locs, context_lens, context_starts,
    factor, num_seqs, num_rows,  # scale x log2(e), B and N
    search_steps,  # halvings that find one of B + 1 sequences
    stride_table, stride_q_row, stride_q_head,  # strides in elements: from one row of a table, ..
    stride_block, stride_head, stride_token,  # of k_cache, and of v_cache too
    stride_out_row, stride_out_head,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr,  # H, and H // H_kv that share a head of K and V
    HEAD_DIM: tl.constexpr, TILE_D: tl.constexpr,  # the latter rounded up to a power of two
    BLOCK_SIZE: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,  # queries and tokens
    SKIP_DECODE: tl.constexpr,  # leave sequences with exactly one query to the decode kernel
    UPCAST: tl.constexpr,  # compute in 32 bits what the interpreter can't in 16
):  # fmt: skip
    """One program: TILE_Q queries of one sequence and one head, over all that they may read.

    One query head, although a group shares its K and V: the heads of a group are neighbours in the
    grid, so they find it in the cache, and a tile that is all one head wastes less on the diagonal.
    """
    head, program = tl.program_id(0) % NUM_HEADS, tl.program_id(0) // NUM_HEADS
    i, tile = find_sequence(program, query_start_locs, num_seqs, search_steps, TILE_Q)
    owned = i < num_seqs
    begin = tl.load(query_start_locs + i)
    stop = tl.load(query_start_locs + i + 1, mask=owned, other=num_rows)
    first_row = begin + tile * TILE_Q
    if first_row >= stop:  # the room for a last tile that was not needed
        return
    if SKIP_DECODE & owned & (stop - begin == 1):
        return
    context_len, start = tl.load(context_lens + i, mask=owned, other=0), 0
    if context_starts is not None:
        start = tl.load(context_starts + i, mask=owned, other=0)

    rows = first_row + tl.arange(0, TILE_Q)
    row, dim = rows.to(tl.int64)[:, None], tl.arange(0, TILE_D)[None, :]
    inside = (row < stop) & (dim < HEAD_DIM)
    queries = tl.load(q + row * stride_q_row + head * stride_q_head + dim, inside, other=0.0)
    queries = queries.to(tl.float32) if UPCAST else queries
    last = context_len - stop + rows  # the sequence's last query sits at context_len - 1
    end = context_len - stop + tl.minimum(first_row + TILE_Q, stop)
    common = tl.maximum(context_len - stop + first_row + 1 - start, 0)  # so many all rows read
    full = start + common // TILE_K * TILE_K
    table, kv_head = block_tables + i.to(tl.int64) * stride_table, head // GROUP * stride_head
    kv = (table, k_cache + kv_head, v_cache + kv_head, stride_block, stride_token)
    m, l, acc = walk(queries, last, factor, start, full, end, kv, HEAD_DIM, BLOCK_SIZE, TILE_K)
    result = (acc / tl.where(l == 0, 1.0, l)[:, None]).to(out.dtype.element_ty)
    tl.store(out + row * stride_out_row + head * stride_out_head + dim, result, inside)


@triton.jit
def write_kv_kernel(
    k, v, k_cache, v_cache, slot_mapping,  # as in `write_kv_triton`
    stride_k_row, stride_k_head, stride_v_row, stride_v_head,  # strides in elements
    stride_block, stride_head, stride_token,  # of k_cache, and of v_cache too
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_D: tl.constexpr,  # heads a program; HEAD_DIM rounded up
):  # fmt: skip
    """One program: TILE_H heads of one token's K and V, moved to the token's slot."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)[:, None]
    dim = tl.arange(0, TILE_D)[None, :]
    inside = (head < NUM_KV_HEADS) & (dim < HEAD_DIM)
    slot = tl.load(slot_mapping + row).to(tl.int64)
    block_id, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    new_k = tl.load(k + row * stride_k_row + head * stride_k_head + dim, inside)
    new_v = tl.load(v + row * stride_v_row + head * stride_v_head + dim, inside)
    to = block_id * stride_block + offset * stride_token + head * stride_head + dim
    tl.store(k_cache + to, new_k.to(k_cache.dtype.element_ty), inside)
    tl.store(v_cache + to, new_v.to(v_cache.dtype.element_ty), inside)


# Whether this process interprets its kernels was decided when they were made.
INTERPRETED = HAS_TRITON and not isinstance(prefill_kernel, triton.runtime.JITFunction)


def check_launch(**tensors: Tensor) -> None:
    """Refuse what no kernel here can do: RuntimeError for the machine, ValueError for the tensors.

    All of them must be of one type, and the kernels step over their last dimension one by one.
    """
    if not HAS_TRITON:
        raise RuntimeError("triton is not installed (it exists for Linux only): use another kernel")
    names, dtypes = ", ".join(tensors), [tensor.dtype for tensor in tensors.values()]
    if len(set(dtypes)) > 1 or dtypes[0] not in DTYPES:
        raise ValueError(f"{names} are {dtypes}: they must all be of one type of {DTYPES}")
    for name, tensor in tensors.items():
        if tensor.device.type == "cpu" and not INTERPRETED:
            hint = "or TRITON_INTERPRET=1, set before triton is imported"
            raise RuntimeError(f"{name} is on the CPU, and Triton needs a GPU, {hint}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} has strides {tensor.stride()}: the last one must be 1")
    if "k_cache" in tensors and tensors["k_cache"].stride() != tensors["v_cache"].stride():
        raise ValueError("k_cache and v_cache have different strides: take both from one pool")


def scale_to_exp2(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """q and the factor of its scores, in units of log2.

    Triton hands a Python float to a kernel in 32 bits. Where that is too few, in 64-bit tests, the
    factor goes into q beforehand.
    """
    factor = scale * math.log2(math.e)
    return (q * factor, 1.0) if q.dtype == torch.float64 else (q, factor)


def tile_d(head_dim: int) -> int:
    """A tile's width: a power of two, and at least 16, the least that tensor cores sum over."""
    return max(16, triton.next_power_of_2(head_dim))


def prefill_tiles(dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """The largest tiles whose sums stay in registers and whose copies fit into shared memory.

    A warp is 32 threads; acc, TILE_Q x TILE_D sums, is spread over the registers of all of them.
    `num_stages` are reading the table, reading K and V, and multiplying: three tiles are under way.
    Wider types take smaller tiles. (tests/compile_kernels.py says what other choices would take.)
    """
    width = tile_d(head_dim)
    TILE_Q = 128 // dtype.itemsize  # 64, 32 or 16
    TILE_K = max(16, TILE_Q // 2) if width * dtype.itemsize > 256 else TILE_Q
    num_warps = 4 if width <= 64 else 8
    return {"TILE_Q": TILE_Q, "TILE_K": TILE_K, "num_warps": num_warps, "num_stages": 3}


def paged_prefill_triton(
    # (N, H, D), and twice (num_blocks + 1, H_kv, block_size, D)
    q: Tensor, k_cache: Tensor, v_cache: Tensor,
    # (B, max_blocks), (B + 1,) and (B,), all int32
    block_tables: Tensor, query_start_locs: Tensor, context_lens: Tensor,
    scale: float, max_query_len: int, max_context_len: int,
    # (B,) int32 and (N, H, D)
    context_starts: Tensor | None = None, out: Tensor | None = None, skip_decode: bool = False,
) -> Tensor:  # fmt: skip
    """`paged_attention` of paged_attention.py for any batch, one launch; returns (N, H, D).

    With `skip_decode` the rows of sequences with exactly one query are left as they are: the
    decode kernel of kernels/triton_decode.py writes them.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    check_launch(q=q, k_cache=k_cache, v_cache=v_cache, out=out)
    (N, H, D), (_, H_kv, block_size, _), B = q.shape, k_cache.shape, block_tables.shape[0]
    if N == 0:
        return out
    q, factor = scale_to_exp2(q, scale)
    tiles = prefill_tiles(q.dtype, D)
    # The most tiles that N rows of B sequences and nobody can make, known without asking the GPU.
    # All programs lie along axis 0, the only one that may be longer than 65,535.
    num_tiles = N // tiles["TILE_Q"] + B + 1
    where = (block_tables, query_start_locs, context_lens, context_starts)
    strides = (block_tables.stride(0), *q.stride()[:2], *k_cache.stride()[:3], *out.stride()[:2])
    prefill_kernel[(num_tiles * H,)](
        q, k_cache, v_cache, out, *where, factor, B, N, max(1, B.bit_length()), *strides,
        NUM_HEADS=H, GROUP=H // H_kv, HEAD_DIM=D, BLOCK_SIZE=block_size, TILE_D=tile_d(D),
        SKIP_DECODE=skip_decode, UPCAST=INTERPRETED and q.dtype == torch.bfloat16, **tiles,
    )  # fmt: skip
    return out


def write_kv_triton(
    # (N, H_kv, D) both, only D needs to be contiguous: they are slices of the QKV product.
    # (num_blocks + 1, H_kv, block_size, D) both, and (N,) int64
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
) -> None:  # fmt: skip
    """`write_kv` of kv_cache.py in one launch: each token's k and v into its slot, in place."""
    check_launch(k=k, v=v)
    check_launch(k_cache=k_cache, v_cache=v_cache)  # perhaps of another type
    N, H_kv, D = k.shape
    if N == 0:
        return
    # 1,024 elements a program are 8 a thread, 16 bytes each of K and V: GPT-2's heads at once.
    TILE_H = min(triton.next_power_of_2(H_kv), max(1, 1024 // tile_d(D)))
    strides = (*k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3])
    write_kv_kernel[(N, triton.cdiv(H_kv, TILE_H))](
        k, v, k_cache, v_cache, slot_mapping, *strides, NUM_KV_HEADS=H_kv, HEAD_DIM=D,
        BLOCK_SIZE=k_cache.shape[2], TILE_H=TILE_H, TILE_D=tile_d(D),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
def can_launch() -> bool:
    """Whether a demo can launch kernels in this process; if not, says why and ends as demos end."""
    reason = None if HAS_TRITON else "triton is not installed: it exists for Linux only"
    if INTERPRETED and triton.__version__[:3] == "3.6" and np.__version__ >= "2.4":
        reason = "Triton 3.6 can't interpret a loop with numpy 2.4 or newer: upgrade triton"
    if reason:
        print(f"{reason}\nok: nothing to run here")
    return reason is None


@triton.jit
def map_kernel(found, query_start_locs, num_seqs, search_steps, TILE_Q: tl.constexpr):
    """For the demo: each program writes down which sequence it found, and which tile of it."""
    at = tl.program_id(0)
    i, tile = find_sequence(at, query_start_locs, num_seqs, search_steps, TILE_Q)
    tl.store(found + 2 * at + tl.arange(0, 2), tl.join(i, tile))


def demo():
    """A ragged batch: which program takes which rows, what that saves, and that it is right."""
    if not can_launch():
        return
    query_lens, context_lens, D = [40, 1, 0, 70, 3], [40, 50, 9, 270, 21], 16
    B, N = len(query_lens), sum(query_lens) + 5  # 5 rows of nobody
    torch.manual_seed(0)
    with torch.device("cpu" if INTERPRETED else "cuda"):
        k_cache, v_cache = torch.full((2, B * 17 + 1, 1, 16, D), math.nan)
        tables = torch.randperm(B * 17, dtype=torch.int32).view(B, 17)
        for table, n in zip(tables, context_lens, strict=True):
            slots = (table[:, None].long() * 16 + torch.arange(16)).flatten()[:n]
            write_kv_triton(*torch.randn(2, n, 1, D), k_cache, v_cache, slots)
        q, lens = torch.randn(N, 2, D), torch.tensor(context_lens, dtype=torch.int32)
        locs = torch.tensor([0, *query_lens]).cumsum(0).int()
        TILE_Q = prefill_tiles(q.dtype, D)["TILE_Q"]
        found = torch.zeros(N // TILE_Q + B + 1, 2).int()
    map_kernel[(len(found),)](found, locs, B, B.bit_length(), TILE_Q)
    print(f"queries {query_lens} and 5 rows of nobody, TILE_Q {TILE_Q}")
    print("\nprogram  sequence  tile  rows of q   positions read")
    ends, covered, read = [*locs.tolist(), N], [], 0
    for program, (i, tile) in enumerate(found.tolist()):
        rows = range(ends[i] + tile * TILE_Q, min(ends[i] + (tile + 1) * TILE_Q, ends[i + 1]))
        end = context_lens[i] - ends[i + 1] + rows.stop if i < B and rows else 0
        what = f"[0, {end})" if rows else "not needed"
        print(f"{program:7}  {'abcde-'[i]:^8}  {tile:4}  [{rows.start:3}, {rows.stop:3})  {what}")
        covered, read = covered + [*rows], read + end
    single = sum(sum(range(n + 1 - T, n + 1)) for T, n in zip(query_lens, context_lens))
    print(f"\ntokens of context read for one head: {single} query by query, {read} in tiles")
    arguments = (q, k_cache, v_cache, tables, locs, lens, D**-0.5, 70, 270)
    error = (paged_prefill_triton(*arguments) - paged_attention(*arguments)).abs().max().item()
    print(f"{'interpreted' if INTERPRETED else 'compiled'}, distance from the oracle {error:.1e}")
    assert covered == list(range(N)) and error < 1e-5
    print("ok: every row belongs to one program, and the result is the oracle's")


if __name__ == "__main__":
    demo()
