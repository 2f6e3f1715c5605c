"""Paged attention on a GPU for many queries a sequence: tiles of queries read tiles of the context.

A prompt of 512 tokens has 512 queries that read the same keys and values. Answered one by one they
read 131,328 positions (1 + 2 + .. + 512). A program of this kernel takes 64 queries of one head and
reads each tile of the context once for all of them: 2,304 positions. Its products are of two
64 x 64 tiles, the shape that tensor cores multiply. Whole prompts, chunks of prompts and batches of
them, of any lengths, are one launch:

    rows of q, TILE_Q 4    |aaaa aa|bb|cccc cccc c|..|    sequences a, b, c; then 2 padded rows
    program (of each head)  0    1  2  4    5    6 7      program 3 finds nothing to do
    each program finds its sequence by binary search in query_start_locs

A tile of the context is not a block: its 64 tokens lie in as many blocks as needed, and the block
of each position is looked up in the block table.

A pool may be int8 (speedups/quantized_kv.py). Its integers are multiplied as they are, in q's type:
a score is then multiplied by its key's scale, and a weight by its value's.

The decode kernels import three parts from here: `fold_tile` (`fold_block` of paged_attention.py in
Triton), `walk` (the loop over it), and the checks before a launch. The kernel that writes new keys
and values to their slots is here too.

How it is checked: against dense attention in float64 over pools full of NaN
(tests/kernels/test_triton_prefill.py). FlashAttention-3 goes further: copies and products are
pipelined by hand for each GPU.

Dao 2023, "FlashAttention-2", arXiv:2307.08691, sections 3.1 and 3.2.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # there is no Triton for macOS and Windows, but this file must import there
    HAS_TRITON = False

    class _Missing:
        """Stands for `triton` and `tl`: each attribute and each call returns the object itself.

        So `@triton.jit` and `tl.constexpr` raise nothing at import; `check_launch` raises later.
        """

        def __call__(self, *args, **kwargs) -> _Missing:
            return self

        __getattr__ = __call__

    triton = tl = _Missing()

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@triton.jit
def scales_behind(head, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Pointers to the first scale of a head of a block in a pool of int8.

    `head` points to the values of the same head; speedups/quantized_kv.py has the layout.
    """
    VALUES: tl.constexpr = BLOCK_SIZE * HEAD_DIM + BLOCK_SIZE * HEAD_DIM % 2  # bytes, even
    return (head + VALUES).to(tl.pointer_type(tl.bfloat16), bitcast=True)


@triton.jit
def fold_tile(
    m,  # (R,) the running maximum of each row's scores, in units of log2
    l,  # (R,) the running sum of its weights
    acc,  # (R, TILE_D) the running sum of its weighted values
    q,  # (R, TILE_D) the queries
    last,  # (R,) the last position that each row may read
    factor,  # scale * log2(e): e^(scale s) = 2^(factor s), and a GPU has an instruction for 2^x
    first, end,  # the tile is positions [first, first + TILE_K), of which [.., end) may be read
    kv,  # pointers to the sequence's row of block_tables and to this head's K and V in block 0,
    # then two strides in elements: from one block to the next, and from one token to the next
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_K: tl.constexpr,  # TILE_K: tokens a tile
    MASKED: tl.constexpr,  # False: the caller knows that every row may read the whole tile
):  # fmt: skip
    """Fold one tile of the context into m, l and acc; returns the three new ones.

    The equations are those of `fold_block` in paged_attention.py.
    """
    table, k_head, v_head, stride_block, stride_token = kv
    position = first + tl.arange(0, TILE_K)
    dim = tl.arange(0, q.shape[1])[None, :]
    inside = dim < HEAD_DIM  # TILE_D is HEAD_DIM rounded up to a power of two
    if MASKED:
        inside = inside & (position < end)[:, None]
        block_id = tl.load(table + position // BLOCK_SIZE, mask=position < end, other=0)
    else:
        block_id = tl.load(table + position // BLOCK_SIZE)
    # int64 before the product: one layer of a large pool has more than 2^31 elements.
    rows = block_id.to(tl.int64) * stride_block + position % BLOCK_SIZE * stride_token  # (TILE_K,)
    at = rows[:, None] + dim  # (TILE_K, TILE_D)
    # Positions outside are loaded as 0. Masking the scores alone is not enough: memory that was
    # never written may hold NaN, and a weight of 0 times NaN is NaN.
    # `.to` changes nothing, except when the interpreter computes bfloat16 in 32 bits.
    # int8 has 7 digits, so each 16-bit type holds its values exactly.
    k = tl.load(k_head + at, mask=inside, other=0).to(q.dtype)
    v = tl.load(v_head + at, mask=inside, other=0).to(q.dtype)
    # "ieee": by default 32-bit inputs are rounded to a mantissa of 10 bits (TF32).
    # scores (R, TILE_K) = q k^T * factor
    scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=acc.dtype) * factor
    if k_head.dtype.element_ty == tl.int8:
        block = block_id.to(tl.int64) * stride_block
        offset = position % BLOCK_SIZE
        k_scales = scales_behind(k_head + block, HEAD_DIM, BLOCK_SIZE) + offset  # (TILE_K,)
        v_scales = scales_behind(v_head + block, HEAD_DIM, BLOCK_SIZE) + offset
        k_scale = tl.load(k_scales, mask=position < end, other=0.0).to(tl.float32)
        v_scale = tl.load(v_scales, mask=position < end, other=0.0).to(tl.float32)
        scores = scores * k_scale[None, :]
    if MASKED:
        scores = tl.where(position[None, :] <= last[:, None], scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1))
    # A row that may not read anything yet has m_new = -inf, and -inf - -inf is NaN: subtract 0.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    shrink = tl.exp2(m - m_safe)  # what was summed before, relative to the new maximum
    p = tl.exp2(scores - m_safe[:, None])  # (R, TILE_K) weights before the division by l
    l = l * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    if k_head.dtype.element_ty == tl.int8:
        p = p * v_scale[None, :]  # after the sum: the scale belongs to V, not to the weight
    # Tensor cores multiply two tiles of one type, so p is rounded to V's type. The sum l is not.
    return m_new, l, tl.dot(p.to(v.dtype), v, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def walk(
    q,  # (R, TILE_D)
    last,  # (R,)
    factor,
    first, full, end,  # every row may read [first, full), which is whole tiles; no row reads `end`
    kv, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Fold the positions [first, end) of a context, tile by tile: returns m (R,), l (R,) and acc.

    The parameters are those of `fold_tile`. There are two loops because nearly all tiles need no
    mask. They are `for` loops because Triton prefetches the next tiles of a `for` loop only.
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
    """Which sequence i a program works for, and for which tile t of its queries: returns i and t.

    Tile t of sequence i belongs to program `query_start_locs[i] // TILE_Q + i + t`. Without `+ i`
    two sequences could have the same first program; with it the last tile of each sequence, which
    may be partly filled, has a program of its own. Padded rows count as sequence `num_seqs`, which
    has no context.
    """
    low = 0
    high = num_seqs
    for _ in range(search_steps):  # each step halves the num_seqs + 1 candidates [low, high]
        middle = (low + high + 1) // 2
        starts_before = tl.load(query_start_locs + middle) // TILE_Q + middle <= program
        low = tl.where(starts_before, middle, low)
        high = tl.where(starts_before, high, middle - 1)
    return low, program - (tl.load(query_start_locs + low) // TILE_Q + low)


# Triton compiles a kernel again for an integer argument that is 1 and for one that is divisible by
# 16. These arguments change from step to step, so they are excluded from that.
@triton.jit(do_not_specialize=["num_seqs", "num_rows", "search_steps", "stride_table"])
def prefill_kernel(
    q, k_cache, v_cache, out,  # (N, H, D), twice (num_blocks + 1, H_kv, block_size, D), (N, H, D)
    block_tables, query_start_locs,  # (B, max_blocks), (B + 1,)
    context_lens, context_starts,  # (B,) and (B,) or None
    factor, num_seqs, num_rows,  # scale * log2(e), B and N
    search_steps,  # steps of the binary search over B + 1 sequences
    stride_table, stride_q_row, stride_q_head,  # strides in elements: from row to row of tables, ..
    stride_block, stride_head, stride_token,  # of k_cache, and of v_cache too
    stride_out_row, stride_out_head,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr,  # H, and H // H_kv heads that share K and V
    HEAD_DIM: tl.constexpr, TILE_D: tl.constexpr,  # D, and D rounded up to a power of two
    BLOCK_SIZE: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,  # queries, tokens a tile
    SKIP_DECODE: tl.constexpr,  # True: the decode kernel writes sequences with exactly one query
    UPCAST: tl.constexpr,  # True: the interpreter can't multiply bfloat16, so compute in 32 bits
):  # fmt: skip
    """One program: TILE_Q queries of one sequence and one head, over all that they may read.

    The heads of a group share K and V, but each has programs of its own. These programs are
    neighbours in the grid, so they find K and V in the L2 cache.
    """
    head = tl.program_id(0) % NUM_HEADS
    program = tl.program_id(0) // NUM_HEADS
    i, tile = find_sequence(program, query_start_locs, num_seqs, search_steps, TILE_Q)
    owned = i < num_seqs  # False for padded rows: they get a context of 0 tokens, and so zeros
    begin = tl.load(query_start_locs + i)
    stop = tl.load(query_start_locs + i + 1, mask=owned, other=num_rows)
    first_row = begin + tile * TILE_Q
    if first_row >= stop:  # this sequence needed no further tile
        return
    if SKIP_DECODE & owned & (stop - begin == 1):
        return
    context_len = tl.load(context_lens + i, mask=owned, other=0)
    start = 0
    if context_starts is not None:
        start = tl.load(context_starts + i, mask=owned, other=0)

    rows = first_row + tl.arange(0, TILE_Q)
    row = rows.to(tl.int64)[:, None]
    dim = tl.arange(0, TILE_D)[None, :]
    inside = (row < stop) & (dim < HEAD_DIM)  # (TILE_Q, TILE_D)
    queries = tl.load(q + row * stride_q_row + head * stride_q_head + dim, inside, other=0.0)
    queries = queries.to(tl.float32) if UPCAST else queries
    # The sequence's last query, row stop - 1, is at position context_len - 1.
    last = context_len - stop + rows  # (TILE_Q,) each query's own position
    end = context_len - stop + tl.minimum(first_row + TILE_Q, stop)
    # The tile's first query reads the fewest positions, and all others read those as well.
    common = tl.maximum(context_len - stop + first_row + 1 - start, 0)
    full = start + common // TILE_K * TILE_K
    table = block_tables + i.to(tl.int64) * stride_table
    kv_head = head // GROUP * stride_head
    kv = (table, k_cache + kv_head, v_cache + kv_head, stride_block, stride_token)
    m, l, acc = walk(queries, last, factor, start, full, end, kv, HEAD_DIM, BLOCK_SIZE, TILE_K)
    # A row that read nothing has l = 0 and acc = 0: divide by 1, the result is 0.
    result = (acc / tl.where(l == 0, 1.0, l)[:, None]).to(out.dtype.element_ty)
    tl.store(out + row * stride_out_row + head * stride_out_head + dim, result, inside)


@triton.jit
def quantize(rows):
    """Rows (TILE_H, TILE_D) as int8, and their scales (TILE_H, 1) as bfloat16.

    The rule is that of `quantize` in speedups/quantized_kv.py, and so are the bits.
    """
    rows = rows.to(tl.float32)
    # Positive floats have the order of their bits, with infinity and NaN at the end.
    largest = tl.max(rows.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)[:, None]
    bits = (largest.to(tl.float32, bitcast=True) * (1 / 127)).to(tl.int32, bitcast=True)
    # Round to nearest, ties to even: 0x3f808000 is a tie, and becomes 0x3f80.
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    bits = tl.where(bits < 0x0080, 0, bits)  # below 2^-126 a scale would have few digits
    is_number = (largest < 0x7F800000) & (bits > 0)
    scale = tl.where(is_number, bits << 16, 0x3F800000).to(tl.float32, bitcast=True)
    # The sum's last digit is 1, so it rounds x to an integer, which is its low byte.
    x = rows * tl.div_rn(1.0, scale) + 12582912.0  # 1.5 * 2^23
    values = tl.where(is_number, x.to(tl.int32, bitcast=True), 0).to(tl.int8)
    bits = tl.where(largest < 0x7F800000, bits, 0x7FC0)  # 0x7fc0 is a NaN
    return values, bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def write_kv_kernel(
    k, v,  # (N, H_kv, D) both
    k_cache, v_cache, slot_mapping,  # twice (num_blocks + 1, H_kv, block_size, D), and (N,)
    stride_k_row, stride_k_head, stride_v_row, stride_v_head,  # strides in elements
    stride_block, stride_head, stride_token,  # of k_cache, and of v_cache too
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE_H: tl.constexpr, TILE_D: tl.constexpr,  # heads a program; D rounded up to a power of two
):  # fmt: skip
    """One program: copy TILE_H heads of one token's k and v to the token's slot.

    In a pool of int8 it rounds them, and writes a scale for each head.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)[:, None]
    dim = tl.arange(0, TILE_D)[None, :]
    inside = (head < NUM_KV_HEADS) & (dim < HEAD_DIM)
    slot = tl.load(slot_mapping + row).to(tl.int64)
    block_id = slot // BLOCK_SIZE  # slot 35, BLOCK_SIZE 16 -> block 2, offset 3
    offset = slot % BLOCK_SIZE
    new_k = tl.load(k + row * stride_k_row + head * stride_k_head + dim, inside, other=0.0)
    new_v = tl.load(v + row * stride_v_row + head * stride_v_head + dim, inside, other=0.0)
    to = block_id * stride_block + offset * stride_token + head * stride_head + dim
    if k_cache.dtype.element_ty == tl.int8:
        new_k, k_scale = quantize(new_k)
        new_v, v_scale = quantize(new_v)
        block = block_id * stride_block + head * stride_head  # (TILE_H, 1)
        k_scales = scales_behind(k_cache + block, HEAD_DIM, BLOCK_SIZE)
        v_scales = scales_behind(v_cache + block, HEAD_DIM, BLOCK_SIZE)
        tl.store(k_scales + offset, k_scale, head < NUM_KV_HEADS)
        tl.store(v_scales + offset, v_scale, head < NUM_KV_HEADS)
    tl.store(k_cache + to, new_k.to(k_cache.dtype.element_ty), inside)
    tl.store(v_cache + to, new_v.to(v_cache.dtype.element_ty), inside)


# Triton reads TRITON_INTERPRET when it is imported. `@triton.jit` then makes an object of another
# class, which runs the kernel in Python, one program after another.
INTERPRETED = HAS_TRITON and not isinstance(prefill_kernel, triton.runtime.JITFunction)


def check_int8(k_cache: Tensor | None = None, v_cache: Tensor | None = None, **others) -> None:
    """Raise ValueError for views of int8 without room for the scales behind a head's values."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache is None or cache.dtype != torch.int8:
            continue
        block_size, D = cache.shape[2:]
        if cache.stride(2) != D or cache.stride(1) < block_size * (D + 2):
            strides = f"{name} is int8 with strides {cache.stride()}"
            raise ValueError(f"{strides}: scales must follow each head's values")


def check_launch(**tensors: Tensor) -> None:
    """Raise RuntimeError where no kernel can run, ValueError for tensors that no kernel can read.

    The tensors must have one dtype, but for a pool of int8, and their last dimension must be
    contiguous.
    """
    if not HAS_TRITON:
        raise RuntimeError("triton is not installed (it exists for Linux only): use another kernel")
    check_int8(**tensors)
    names = ", ".join(tensors)
    dtypes = [
        t.dtype for name, t in tensors.items() if "cache" not in name or t.dtype != torch.int8
    ]
    if len(set(dtypes)) > 1 or not set(dtypes) <= set(DTYPES):
        raise ValueError(f"{names} are {dtypes}: they must all be of one type of {DTYPES}")
    for name, tensor in tensors.items():
        if tensor.device.type == "cpu" and not INTERPRETED:
            hint = "or TRITON_INTERPRET=1, set before triton is imported"
            raise RuntimeError(f"{name} is on the CPU, and Triton needs a GPU, {hint}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name} has strides {tensor.stride()}: the last one must be 1")
    if "k_cache" in tensors and tensors["k_cache"].stride() != tensors["v_cache"].stride():
        raise ValueError("k_cache and v_cache have different strides: take both from one pool")


def can_launch() -> bool:
    """Whether a demo can launch kernels in this process; if not, prints why, and an `ok:` line."""
    reason = None if HAS_TRITON else "triton is not installed: it exists for Linux only"
    if INTERPRETED and triton.__version__[:3] == "3.6" and np.__version__ >= "2.4":
        reason = "Triton 3.6 can't interpret a loop with numpy 2.4 or newer: upgrade triton"
    if reason:
        print(f"{reason}\nok: nothing to run here")
    return reason is None


def scale_to_exp2(
    q: Tensor,  # (N, H, D)
    scale: float,
) -> tuple[Tensor, float]:
    """q and a factor such that 2^(factor q k) = e^(scale q k).

    Triton passes a Python float to a kernel as 32 bits. For float64, which only tests use, that is
    not precise enough, so q itself is multiplied and the factor is 1.
    """
    factor = scale * math.log2(math.e)
    return (q * factor, 1.0) if q.dtype == torch.float64 else (q, factor)


def tile_d(head_dim: int) -> int:
    """The width of a tile: head_dim rounded up to a power of two, at least 16.

    16 is the shortest sum that a tensor core computes. Example: 64 -> 64, 80 -> 128, 5 -> 16.
    """
    return max(16, triton.next_power_of_2(head_dim))


def prefill_tiles(
    dtype: torch.dtype, head_dim: int, pool_dtype: torch.dtype | None = None
) -> dict[str, int]:
    """The largest tiles whose sums fit into registers and whose copies fit into shared memory.

    acc (TILE_Q, TILE_D) is spread over the registers of all threads; a warp is 32 threads. With
    `num_stages` 3 Triton has three tiles in progress: the table entries of one are being read, K
    and V of another, and the third is multiplied. To try others, run
    tests/kernels/compile_kernels.py --prefill-tiles.
    """
    width = tile_d(head_dim)
    TILE_Q = 128 // dtype.itemsize  # 64 queries of 16 bits, 32 of 32 bits, 16 of 64 bits
    if pool_dtype == torch.int8 and dtype == torch.float32:
        TILE_Q = 16  # integers that become floats, and scales, take registers too
    TILE_K = max(16, TILE_Q // 2) if width * dtype.itemsize > 256 else TILE_Q
    num_warps = 4 if width <= 64 else 8
    return {"TILE_Q": TILE_Q, "TILE_K": TILE_K, "num_warps": num_warps, "num_stages": 3}


def paged_prefill_triton(
    q: Tensor,  # (N, H, D)
    k_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    v_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    block_tables: Tensor,  # (B, max_blocks) int32
    query_start_locs: Tensor,  # (B + 1,) int32
    context_lens: Tensor,  # (B,) int32
    scale: float,
    max_query_len: int,
    max_context_len: int,
    context_starts: Tensor | None = None,  # (B,) int32
    out: Tensor | None = None,  # (N, H, D)
    skip_decode: bool = False,
) -> Tensor:
    """`paged_attention` of paged_attention.py for any batch, in one launch; returns (N, H, D).

    With `skip_decode` it does not write the rows of sequences that have exactly one query: the
    decode kernel of kernels/triton_decode.py writes them. Raises as `check_launch` does.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    check_launch(q=q, k_cache=k_cache, v_cache=v_cache, out=out)
    N, H, D = q.shape
    _, H_kv, block_size, _ = k_cache.shape
    B = block_tables.shape[0]
    if N == 0:
        return out
    q, factor = scale_to_exp2(q, scale)
    tiles = prefill_tiles(q.dtype, D, k_cache.dtype)
    # The most tiles that B sequences and padded rows can need for N rows. The host knows N and B;
    # the exact number would have to be read from the GPU.
    num_tiles = N // tiles["TILE_Q"] + B + 1
    # All programs are along axis 0, the only axis of a grid that may be longer than 65,535.
    prefill_kernel[(num_tiles * H,)](
        q, k_cache, v_cache, out,
        block_tables, query_start_locs, context_lens, context_starts,
        factor, B, N,
        max(1, B.bit_length()),  # search_steps: B + 1 candidates are halved so often
        block_tables.stride(0), *q.stride()[:2], *k_cache.stride()[:3], *out.stride()[:2],
        NUM_HEADS=H, GROUP=H // H_kv, HEAD_DIM=D, TILE_D=tile_d(D), BLOCK_SIZE=block_size,
        SKIP_DECODE=skip_decode,
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
        **tiles,
    )  # fmt: skip
    return out


def write_kv_triton(
    k: Tensor,  # (N, H_kv, D); only D must be contiguous, so a slice of the QKV product will do
    v: Tensor,  # (N, H_kv, D)
    k_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    v_cache: Tensor,  # (num_blocks + 1, H_kv, block_size, D)
    slot_mapping: Tensor,  # (N,) int64
) -> None:
    """`write_kv` of kv_cache.py in one launch: copy each token's k and v to its slot, in place."""
    check_launch(k=k, v=v)
    check_launch(k_cache=k_cache, v_cache=v_cache)  # the pool's dtype may be another one
    N, H_kv, D = k.shape
    if N == 0:
        return
    # 1,024 elements a program are 8 a thread, 16 bytes each of k and v. GPT-2's 12 heads fit.
    TILE_H = min(triton.next_power_of_2(H_kv), max(1, 1024 // tile_d(D)))
    write_kv_kernel[(N, triton.cdiv(H_kv, TILE_H))](
        k, v, k_cache, v_cache, slot_mapping,
        *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3],
        NUM_KV_HEADS=H_kv, HEAD_DIM=D, BLOCK_SIZE=k_cache.shape[2],
        TILE_H=TILE_H, TILE_D=tile_d(D),
        enable_fp_fusion=False,  # a product that is fused with its sum is rounded once, not twice
    )  # fmt: skip
