"""Attention for the prompts of a step on a CPU, from the blocks where their K and V lie.

A decoding sequence has one query, and reading its context takes all the time. A prompt of 300
tokens has 300 queries, and each number that is read is multiplied 300 times. There the arithmetic
is the limit, so the sums have to stay in vector registers. 64 queries of one head stand side by
side, one in each lane of four registers (16 queries in two registers with AVX2), and 64 keys at a
time come to them. A tile is 6 rows of sums for the 64 columns, 24 vectors:

      scores (keys, queries) = K (keys, D) Q^T (D, queries)     acc (D, queries) += V^T weights

                          64 queries                                 64 queries
                        ┌────────────┐                             ┌────────────┐
       6 keys: K[j, :] ─┤  24 sums   │     6 numbers of D: V[:, d] ─┤  24 sums   │
                        └────────────┘                             └────────────┘

Both products have the same form: a step adds one number of each row times a vector of columns
(`add_products`). As a query is a column, the softmax takes the maximum, the sum and the powers of
64 queries at once, with operations on whole vectors. Only Q and the result are transposed, once for
all keys. K and V of 64 keys are copied to a small dense matrix first, which widens bfloat16 and
integers once for 64 queries.

No column depends on another one. Its keys come in groups of 64, counted from the first position
that may be read, and each sum adds them in the order of the positions. So a query's result has the
same bits whatever else is in the batch, wherever its prompt is cut into chunks of MANY_QUERIES or
more, and on any number of threads. A key that a query may not read gets the score -inf, and its V
is not added: 0 times NaN would be NaN.

Measured on an AMD EPYC (Zen 5, AVX-512) with two threads and GPT-2's heads in float32: a layer's
attention over 8 prompts of 256 tokens takes 4.1 ms, and over one of 1,024 tokens 5.0 ms. A copy of
the contexts and PyTorch's attention take 11.3 and 13.8 ms.

Checked by tests/kernels/test_prompt_cpu.py and tests/kernels/test_attention_cpu.py.
Dao et al. 2022, "FlashAttention", arXiv:2205.14135 (groups of queries meet groups of keys).
"""

import functools

import numpy as np

from kernels.numba_tools import (
    HAS_NUMBA,
    compiled,
    compiled_parallel,
    data_of_arrays,
    has_openmp_threads,
    in_all_lanes,
    power_of_two,
    prange,
    processor_features,
    use_openmp_threads,
)
from kernels.prefill_cpu import copy_head

if HAS_NUMBA:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic


# AVX-512 has 32 registers of 16 floats: 6 x 4 sums, 4 factors and one number are 29.
# AVX2 has 16 registers of 8 floats: 6 x 2 sums, 2 factors and one number are 15.
LANES, VECTORS = (16, 4) if "avx512f" in processor_features() else (8, 2)
ROWS = 6
PANEL = VECTORS * LANES  # queries that are computed together
KEYS = 64  # keys that meet them at a time; a multiple of 4


# ---- in vector registers ------------------------------------------------------------------------
def add_products(
    a, a_at, row_stride, step_stride, num_steps, factors, factors_at, is_new, shrink,
    out, out_at, num_rows, num_vectors, must_mask, first_key, limits,
):  # fmt: skip
    """out[r] = (0 if is_new else out[r] * shrink) + the sum of a[r, step] * factors[step].

    All arrays are flat, and `*_at` is the element to begin at. out has 1 to ROWS rows, `num_rows`,
    and factors one for each of `num_steps` steps. Their rows are PANEL numbers apart, and
    `num_vectors` * LANES columns of them are computed. a[r, step] is number r * row_stride + step *
    step_stride of a. With `must_mask`, column c adds only the steps before limits[c] - first_key.

    It is written in LLVM's own language, for the reason of `linear_cpu.multiply_tile`: LLVM does
    not keep the sums of a plain loop in registers.
    """


def transpose_square(source, source_at, source_stride, target, target_at, target_stride):
    """target[j, i] = source[i, j] for LANES rows and columns of two flat arrays.

    Row i of the source begins at source[source_at + i * source_stride]; the target is alike. LLVM
    makes scattered stores of a plain loop, one number at a time.
    """


if HAS_NUMBA:
    I32, I64 = ir.IntType(32), ir.IntType(64)
    VECTOR, INTEGERS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(I32, LANES)

    @intrinsic
    def add_products(  # noqa: F811, D103
        typingctx, a, a_at, row_stride, step_stride, num_steps, factors, factors_at, is_new,
        shrink, out, out_at, num_rows, num_vectors, must_mask, first_key, limits,
    ):  # fmt: skip
        i64, boolean = types.int64, types.boolean
        signature = types.void(
            a, i64, i64, i64, i64, factors, i64, boolean, shrink,
            out, i64, i64, i64, boolean, i64, limits,
        )  # fmt: skip
        return signature, generate_products

    def generate_products(context, builder, signature, args):
        """Write the code of `add_products`: a loop for each number of vectors, masked and not."""
        values = data_of_arrays(context, builder, signature, args)
        num_vectors, must_mask = values[12:14]
        with builder.if_else(must_mask) as branches:
            for is_masked, branch in zip((True, False), branches, strict=True):
                with branch:
                    for size in range(1, VECTORS + 1):
                        with builder.if_then(builder.icmp_signed("==", num_vectors, I64(size))):
                            write_tile(builder, values, size, is_masked)
        return context.get_dummy_value()

    def write_tile(builder, values, num_vectors, is_masked):
        """The code for `num_vectors` vectors of columns; `values` are the arguments."""
        (
            a, a_at, row_stride, step_stride, num_steps, factors, factors_at, is_new, shrink,
            out, out_at, num_rows, _, _, first_key, limits,
        ) = values  # fmt: skip
        columns = range(num_vectors)

        def addresses(array, at, kind=VECTOR):
            first = builder.bitcast(builder.gep(array, [at]), kind.as_pointer())
            return [builder.gep(first, [I64(v)]) for v in columns]

        def read(address):
            return builder.load(address, align=4)

        fma = ir.FunctionType(VECTOR, [VECTOR] * 3)
        fma = cgutils.get_or_insert_function(builder.module, fma, f"llvm.fma.v{LANES}f32")
        last = builder.sub(num_rows, I64(1))
        rows, out_rows, sums = [], [], []
        shrinks = [read(address) for address in addresses(shrink, I64(0))]
        for i in range(ROWS):  # with fewer rows the last one is computed several times
            row = builder.select(builder.icmp_signed("<", I64(i), last), I64(i), last)
            rows.append(builder.gep(a, [builder.add(a_at, builder.mul(row, row_stride))]))
            out_row = builder.add(out_at, builder.mul(row, I64(PANEL)))
            out_rows.append(addresses(out, out_row))
            # Variables that are only loaded and stored: LLVM keeps these in registers.
            sums.append([cgutils.alloca_once(builder, VECTOR) for _ in columns])
            for v in columns:
                old = builder.fmul(read(out_rows[i][v]), shrinks[v])
                builder.store(builder.select(is_new, VECTOR([0.0] * LANES), old), sums[i][v])

        with cgutils.for_range(builder, num_steps, intp=I64) as loop:
            step = builder.mul(loop.index, step_stride)
            at = builder.add(factors_at, builder.mul(loop.index, I64(PANEL)))
            factor = [read(address) for address in addresses(factors, at)]
            if is_masked:
                key = builder.trunc(builder.add(first_key, loop.index), I32)
                key = in_all_lanes(builder, key, LANES)
                reads = [read(address) for address in addresses(limits, I64(0), INTEGERS)]
                reads = [builder.icmp_signed("<", key, limit) for limit in reads]
            for i in range(ROWS):
                number = in_all_lanes(builder, read(builder.gep(rows[i], [step])), LANES)
                for v in columns:
                    old = builder.load(sums[i][v])
                    new = builder.call(fma, [number, factor[v], old])
                    new = builder.select(reads[v], new, old) if is_masked else new
                    builder.store(new, sums[i][v])

        for i in range(ROWS):
            for v in columns:
                builder.store(builder.load(sums[i][v]), out_rows[i][v], align=4)

    @intrinsic
    def transpose_square(  # noqa: F811, D103
        typingctx, source, source_at, source_stride, target, target_at, target_stride
    ):
        i64 = types.int64
        return types.void(source, i64, i64, target, i64, i64), generate_transposition

    def generate_transposition(context, builder, signature, args):
        """Interleave the first half of the rows with the second one, log2(LANES) times."""
        values = data_of_arrays(context, builder, signature, args)
        source, source_at, source_stride, target, target_at, target_stride = values

        def address(array, at, stride, i):
            at = builder.add(at, builder.mul(I64(i), stride))
            return builder.bitcast(builder.gep(array, [at]), VECTOR.as_pointer())

        half = LANES // 2
        rows = [address(source, source_at, source_stride, i) for i in range(LANES)]
        rows = [builder.load(row, align=4) for row in rows]
        # Lanes 0, 16, 1, 17 .. of two rows, and 8, 24, 9, 25 ..: lane i of the second is 16 + i.
        orders = [[i // 2 + i % 2 * LANES + first for i in range(LANES)] for first in (0, half)]
        for _ in range(half.bit_length()):
            pairs = zip(rows[:half], rows[half:], strict=True)
            rows = [
                builder.shuffle_vector(*pair, INTEGERS(order)) for pair in pairs for order in orders
            ]
        for i in range(LANES):
            builder.store(rows[i], address(target, target_at, target_stride, i), align=4)
        return context.get_dummy_value()


# ---- 64 queries of one head ----------------------------------------------------------------------
# "contract" alone: the sums keep the order of the loops.
compiled_exactly = functools.partial(compiled, fastmath={"contract"})


@compiled_exactly
def transpose(source, source_stride, num_rows, num_columns, target, target_stride):
    """target[j, i] = source[i, j], both flat, with the distances from one row to the next."""
    for i in range(0, num_rows, LANES):
        for j in range(0, num_columns, LANES):
            if i + LANES <= num_rows and j + LANES <= num_columns:
                transpose_square(
                    source, i * source_stride + j, source_stride,
                    target, j * target_stride + i, target_stride,
                )  # fmt: skip
                continue
            for row in range(i, min(i + LANES, num_rows)):
                for column in range(j, min(j + LANES, num_columns)):
                    target[column * target_stride + row] = source[row * source_stride + column]


@compiled_exactly
def fold_scores(scores, first_key, num_keys, limits, width, m, l, shrink):
    """Turn scores (KEYS, PANEL) into weights 2^(s - m) in place, with the new m and l (PANEL,).

    shrink (PANEL,) becomes 2^(old m - new m). Column c reads the keys before limits[c]; the weights
    of the others are 0. Four keys at a time, in the `width` first columns.
    """
    nothing = np.float32(-np.inf)
    for c in range(np.uint64(width)):
        shrink[c] = m[c]
    for j in range(0, num_keys, 4):
        key = np.int32(first_key + j)
        row = np.uint64(j * PANEL)
        for c in range(np.uint64(width)):
            limit = np.int32(limits[c] - key)
            s0 = scores[row + c] if 0 < limit else nothing
            s1 = scores[row + np.uint64(PANEL) + c] if 1 < limit else nothing
            s2 = scores[row + np.uint64(2 * PANEL) + c] if 2 < limit else nothing
            s3 = scores[row + np.uint64(3 * PANEL) + c] if 3 < limit else nothing
            top = m[c]
            top = s0 if s0 > top else top  # a NaN is no maximum, but its weight is NaN
            top = s1 if s1 > top else top
            top = s2 if s2 > top else top
            m[c] = s3 if s3 > top else top
            scores[row + c] = s0
            scores[row + np.uint64(PANEL) + c] = s1
            scores[row + np.uint64(2 * PANEL) + c] = s2
            scores[row + np.uint64(3 * PANEL) + c] = s3
    for c in range(np.uint64(width)):
        shrink[c] = power_of_two(shrink[c] - m[c])
        l[c] *= shrink[c]
    for j in range(0, num_keys, 4):
        row = np.uint64(j * PANEL)
        for c in range(np.uint64(width)):
            w0 = power_of_two(scores[row + c] - m[c])
            w1 = power_of_two(scores[row + np.uint64(PANEL) + c] - m[c])
            w2 = power_of_two(scores[row + np.uint64(2 * PANEL) + c] - m[c])
            w3 = power_of_two(scores[row + np.uint64(3 * PANEL) + c] - m[c])
            scores[row + c] = w0
            scores[row + np.uint64(PANEL) + c] = w1
            scores[row + np.uint64(2 * PANEL) + c] = w2
            scores[row + np.uint64(3 * PANEL) + c] = w3
            l[c] += (w0 + w1) + (w2 + w3)


@compiled_exactly
def attend_panel(queries, k, v, layout, table, h_kv, column, before, start, scratch, out):
    """Attention of up to PANEL queries of one sequence that share a head of K and V.

    queries and out are (T, H, D), all of the sequence. A column is one of the `group` query heads
    that read head `h_kv`, of one token: column c of the panel is head (column + c) % group of token
    (column + c) // group. Token t reads before + t + 1 positions from `start` on, or none.
    """
    T, H, D = queries.shape
    group = H // layout[0]
    num_columns = min(PANEL, T * group - column)
    num_vectors = (num_columns + LANES - 1) // LANES
    width = num_vectors * LANES
    limits, rows, q, acc, keys, values, scores, m, l, shrink = scratch
    m[:] = -np.inf
    l[:] = 0
    acc[:] = 0
    for c in range(width):
        at = column + min(c, num_columns - 1)  # columns behind the last one repeat it
        t = at // group
        limits[c] = before + t + 1
        for d in range(np.uint64(D)):
            rows[c, d] = queries[t, h_kv * group + at % group, d]
    transpose(rows.reshape(-1), D, width, D, q, PANEL)

    end = np.int64(limits[width - 1])
    for begin in range(0, end, KEYS):
        num_keys = min(KEYS, end - begin)
        copy_head(k, layout, table, h_kv, start + begin, start + begin + num_keys, keys)
        copy_head(v, layout, table, h_kv, start + begin, start + begin + num_keys, values)
        for j in range(0, num_keys, ROWS):
            # The columns before the first query that reads key j are left out, in whole vectors.
            skipped = max(0, (begin + j - before) * group - column) // LANES
            add_products(
                keys.reshape(-1), j * D, D, 1, D, q, skipped * LANES, True, shrink,
                scores, j * PANEL + skipped * LANES, min(ROWS, num_keys - j),
                num_vectors - skipped, False, 0, limits,
            )  # fmt: skip
        fold_scores(scores, begin, num_keys, limits, width, m, l, shrink)
        must_mask = limits[0] < begin + num_keys  # some column does not read all these keys
        for d in range(0, D, ROWS):
            add_products(
                values.reshape(-1), d, 1, D, num_keys, scores, 0, False, shrink,
                acc, d * PANEL, min(ROWS, D - d), num_vectors, must_mask, begin, limits,
            )  # fmt: skip

    transpose(acc, PANEL, D, width, rows.reshape(-1), D)
    for c in range(num_columns):
        if limits[c] > 0:
            at = column + c
            inverse = np.float32(1) / l[c]
            for d in range(np.uint64(D)):
                out[at // group, h_kv * group + at % group, d] = rows[c, d] * inverse


# ---- all prompts of a step -----------------------------------------------------------------------
@compiled
def aligned(length):
    """New float32 numbers whose first one begins a cache line."""
    memory = np.empty(length + 16, np.float32)
    begin = -memory.ctypes.data // 4 % 16
    return memory[begin : begin + length]


@compiled_parallel
def attend_panels(
    num_threads, min_queries, queries, k, v, layout, tables, locs, context_lens, context_starts, out
):
    """`attend_prompts` on the threads of OpenMP that the caller has asked for."""
    _, H, D = queries.shape
    H_kv = layout[0]
    for thread in prange(num_threads):
        scratch = (  # `attend_panel` names its parts
            np.empty(PANEL, np.int32),
            aligned(PANEL * D).reshape(PANEL, D),
            aligned(D * PANEL),
            aligned(D * PANEL),
            aligned(KEYS * D).reshape(KEYS, D),
            aligned(KEYS * D).reshape(KEYS, D),
            aligned(KEYS * PANEL),
            aligned(PANEL),
            aligned(PANEL),
            aligned(PANEL),
        )
        for i in range(len(context_lens)):
            T = locs[i + 1] - locs[i]
            if T < min_queries:
                continue
            num_panels = (T * (H // H_kv) + PANEL - 1) // PANEL
            start = context_starts[i]
            for h_kv in range(H_kv):
                # A later panel reads more keys than an earlier one. So the threads take turns, and
                # another one begins with the next head. Each thread computes its panels of a head
                # one after another, while K and V of that head are in a cache.
                for panel in range(num_panels):
                    if (panel + i * H_kv + h_kv) % num_threads == thread:
                        attend_panel(
                            queries[locs[i] : locs[i + 1]],
                            k,
                            v,
                            layout,
                            tables[i],
                            h_kv,
                            panel * PANEL,
                            context_lens[i] - T - start,
                            start,
                            scratch,
                            out[locs[i] : locs[i + 1]],
                        )


def attend_prompts(
    num_threads: int,
    min_queries: int,
    queries: np.ndarray,  # (N, H, D) float32, times the scale and log2(e)
    k: np.ndarray,  # the flat pool from the layer's K on
    v: np.ndarray,  # the same from its V on
    layout: tuple[int, ...],  # H_kv, block_size, and the strides of a block, a head and a token
    tables: np.ndarray,  # (B, max_blocks) int32
    locs: np.ndarray,  # (B + 1,) int32
    context_lens: np.ndarray,  # (B,) int32
    context_starts: np.ndarray,  # (B,) int32
    out: np.ndarray,  # (N, H, D) float32
) -> None:
    """Write the attention of each sequence with `min_queries` or more new tokens to its rows.

    The other rows of out are not written, nor those of queries that may read nothing. Several
    threads may call it at the same time. Call it only where `can_attend_prompts`.
    """
    use_openmp_threads(num_threads)
    attend_panels(
        num_threads, min_queries, queries, k, v, layout,
        tables, locs, context_lens, context_starts, out,
    )  # fmt: skip


@functools.cache
def can_attend_prompts() -> bool:
    """Whether this machine can run `attend_prompts`: Numba, AVX-512 or AVX2, OpenMP's threads."""
    features = processor_features()
    has_registers = "avx512f" in features or {"avx2", "fma"} <= features
    return has_registers and has_openmp_threads()
