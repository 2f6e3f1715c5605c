"""A linear layer on a CPU with weights in eight bits: four products in one instruction.

A decode step of one sequence takes as long as reading the weights. In eight bits they are a quarter
of float32. (`speedups/quantized_weights.py` says how numbers become integers with a scale.) The
products are faster too, where the processor has VNNI. Its instruction `vpdpbusd` takes two words of
four eight-bit numbers each, and adds all four products to a sum in 32 bits, in 16 lanes at once:

    a word of x       x[0]  x[1]  x[2]  x[3]      0 to 255: the integer of x, plus 128
    a word of w       w[0]  w[1]  w[2]  w[3]      -127 to 127: four inputs of one output
    sum += x[0] w[0] + x[1] w[1] + x[2] w[2] + x[3] w[3]

The panels and their prefetch are those of `linear_cpu.py`, with words of four inputs. The 128 too
many of each x are known beforehand: a sum starts with -128 times the sum of its weights. While the
sums are still in registers, they become float32: times the scales of the row and of the output,
plus the bias.

Sums of integers are exact in any order. So a row's result is the same bits alone and in any batch,
on any number of threads. Before the activation it equals the plain layer's, bit by bit.

Checked by tests/speedups/test_quantized_weights.py, bit by bit.
Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR, arXiv:1712.05877, section 2.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.device_memory import preallocate
from kernels.linear_cpu import (
    LANES,
    LINES,
    PANEL,
    ROWS,
    TILES_AT_ONCE,
    TURN,
    VECTORS,
    WORDS_AHEAD,
    gelu_new_row,
    store_rounded,
    sums_for,
)
from kernels.numba_tools import (
    CACHE_LINE_BYTES,
    HAS_NUMBA,
    as_numpy,
    compiled,
    compiled_in_order,
    data_of_arrays,
    has_openmp_threads,
    in_all_lanes,
    prange,
    processor_features,
    use_openmp_threads,
    widen,
)

if HAS_NUMBA:
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic, overload

    from kernels.linear_cpu import (
        I64,
        VECTOR,
        WORDS,
        for_each_size,
        prefetch_turn,
        rows_of_tile,
        vector_addresses,
    )

INPUTS_PER_WORD = 4
OFFSET = 128  # added to the integers of x: the instruction takes x without a sign
SMALLEST = np.float32(1e-30)  # a row with no larger number counts as zeros: 127 / x is finite


# ---- a row of x in eight bits --------------------------------------------------------------------
@compiled_in_order
def quantize_row(row, integers):
    """Write a row's integers plus 128 to `integers` (C,) uint8; return the row's scale.

    The scale is NaN, and then all results of the row are, if a number is not finite.
    """
    bits = row.view(np.int32)
    largest_bits = np.int32(0)
    for j in range(np.uint64(len(row))):
        # The bits of |x| are ordered as the numbers are, and NaN comes after infinity.
        magnitude = np.int32(bits[j] & np.int32(0x7FFFFFFF))
        largest_bits = magnitude if magnitude > largest_bits else largest_bits
    found = np.int32(largest_bits)
    largest = found.view(np.float32)
    is_finite = largest < np.float32(np.inf)
    factor = np.float32(127) / largest if is_finite and largest > SMALLEST else np.float32(0)
    for j in range(np.uint64(len(row))):
        number = row[j] if is_finite else np.float32(0)
        integers[j] = np.uint8(np.int32(np.rint(number * factor)) + np.int32(OFFSET))
    return largest / np.float32(127) if is_finite else np.float32(np.nan)


# ---- a tile of rows times a panel ----------------------------------------------------------------
def multiply_tile(
    x, x_at, x_stride, w, w_at, num_words, starts, scales, bias, output, row_scales, row,
    out, out_at, out_stride, num_rows, fetch_at, num_fetched,
):  # fmt: skip
    """out[r, 0:PANEL] = the products of x[r] with a panel, times the scales, plus the bias.

    As in `linear_cpu.multiply_tile`, with words of four integers. `starts`, `scales` and `bias`
    begin at their element `output`, and the rows' own scales at row_scales[row].
    """


if HAS_NUMBA:
    DOT = ir.FunctionType(WORDS, [WORDS] * 3)

    @intrinsic
    def multiply_tile(  # noqa: F811, D103
        typingctx, x, x_at, x_stride, w, w_at, num_words, starts, scales, bias, output,
        row_scales, row, out, out_at, out_stride, num_rows, fetch_at, num_fetched,
    ):  # fmt: skip
        i64 = types.int64
        signature = types.void(
            x, i64, i64, w, i64, i64, starts, scales, bias, i64,
            row_scales, i64, out, i64, i64, i64, i64, i64,
        )  # fmt: skip
        return signature, generate_tile

    def generate_tile(context, builder, signature, args):
        """Write the code of `multiply_tile`; `args` are its arguments as LLVM's values."""
        values = data_of_arrays(context, builder, signature, args)
        *_, num_rows, _, _ = values
        for_each_size(builder, num_rows, functools.partial(write_tile, builder, values))
        return context.get_dummy_value()

    def write_tile(builder, values, tile_rows):
        """The code for up to `tile_rows` rows; `values` are the arguments, arrays as addresses."""
        (
            x, x_at, x_stride, w, w_at, num_words, starts, scales, bias, output,
            row_scales, first_row, out, out_at, out_stride, num_rows, fetch_at, num_fetched,
        ) = values  # fmt: skip
        read = functools.partial(builder.load, align=4)
        name = f"llvm.x86.avx512.vpdpbusd.{LANES * 32}"
        dot = cgutils.get_or_insert_function(builder.module, DOT, name)
        rows = rows_of_tile(builder, num_rows, tile_rows)
        x_rows = [builder.gep(x, [builder.add(x_at, builder.mul(r, x_stride))]) for r in rows]

        # sums[r][v] starts with -128 times the sum of each output's weights
        sums = [[cgutils.alloca_once(builder, WORDS) for _ in range(VECTORS)] for _ in rows]
        for r in range(tile_rows):
            for v, address in enumerate(vector_addresses(builder, starts, output, WORDS)):
                builder.store(read(address), sums[r][v])

        # sums[r][v] += the four products of x[r, word] and w[word, v], for TURN words
        num_turns = builder.sdiv(num_words, I64(TURN))
        with cgutils.for_range(builder, num_turns, intp=I64) as loop:
            prefetch_turn(builder, w, fetch_at, loop.index, num_fetched)
            for i in range(TURN):
                word = builder.add(builder.mul(loop.index, I64(TURN)), I64(i))
                at = builder.add(w_at, builder.mul(word, I64(PANEL)))
                weights = [read(a) for a in vector_addresses(builder, w, at, WORDS)]
                for r in range(tile_rows):
                    inputs = in_all_lanes(builder, read(builder.gep(x_rows[r], [word])), LANES)
                    for v in range(VECTORS):
                        total = builder.call(dot, [read(sums[r][v]), inputs, weights[v]])
                        builder.store(total, sums[r][v])

        # out = sum * (scale of the row * scale of the output) + bias
        of_output = [read(a) for a in vector_addresses(builder, scales, output)]
        biases = [read(a) for a in vector_addresses(builder, bias, output)]
        for r in range(tile_rows):
            at = builder.gep(row_scales, [builder.add(first_row, rows[r])])
            of_row = in_all_lanes(builder, read(at), LANES)
            at = builder.add(out_at, builder.mul(rows[r], out_stride))
            for v, address in enumerate(vector_addresses(builder, out, at)):
                total = builder.sitofp(read(sums[r][v]), VECTOR)
                total = builder.fmul(total, builder.fmul(of_row, of_output[v]))
                builder.store(builder.fadd(total, biases[v]), address, align=4)


# ---- a layer -------------------------------------------------------------------------------------
def widened(row):
    """A row (C,) in float32; bfloat16 comes as uint16."""
    return row


if HAS_NUMBA:

    @overload(widened)
    def _widened(row):
        if row.dtype != types.uint16:
            return lambda row: row

        def widen_each(row):
            out = np.empty(len(row), np.float32)
            for j in range(np.uint64(len(row))):
                out[j] = widen(row[j])
            return out

        return widen_each


# In order: otherwise LLVM would multiply a sum by one scale and then by the other, which rounds it
# differently than the product of both.
@functools.partial(compiled, parallel=True, fastmath=False)
def multiply(x, w, starts, scales, bias, must_activate, out):
    """out = x w + bias, all contiguous, followed by GPT-2's activation if `must_activate`.

    x (N, inputs) and out (N, panels * PANEL) are float32, or uint16 for bfloat16; rows of x may be
    longer, with zeros at the end. w (panels, words, PANEL) holds words of four integers, `starts`
    (int32), `scales` and `bias` (float32) are (panels * PANEL,). The number of words is a multiple
    of TURN.
    """
    num_panels, num_words, _ = w.shape
    num_rows, num_inputs = len(x), min(x.shape[1], num_words * INPUTS_PER_WORD)
    integers = np.empty((num_rows, num_words * INPUTS_PER_WORD), np.uint8)
    row_scales = np.empty(num_rows, np.float32)
    for row in prange(num_rows):
        row_scales[row] = quantize_row(widened(x[row, :num_inputs]), integers[row, :num_inputs])
    words = integers.view(np.uint32)
    num_tiles = (num_rows + ROWS - 1) // ROWS
    num_bundles = (num_tiles + TILES_AT_ONCE - 1) // TILES_AT_ONCE
    for task in prange(num_bundles * num_panels):  # a task: up to 64 rows and one panel
        first_tile = task // num_panels * TILES_AT_ONCE
        last_tile = min(first_tile + TILES_AT_ONCE, num_tiles)
        first_output = task % num_panels * PANEL
        w_at = first_output * num_words
        sums = sums_for(out)  # out itself, or a task's own rows
        is_own = out.itemsize == 2
        # Each tile prefetches its share of the next panel; a single one, what it needs soon.
        num_fetched = (LINES + last_tile - first_tile - 1) // (last_tile - first_tile)
        words_fetched = num_fetched * (num_words // TURN) * CACHE_LINE_BYTES // 4
        for tile in range(first_tile, last_tile):
            row = tile * ROWS
            rows = min(ROWS, num_rows - row)
            fetch_at = w_at + num_words * PANEL + (tile - first_tile) * words_fetched
            if last_tile - first_tile == 1:
                fetch_at = w_at + WORDS_AHEAD
            first_sum = row - first_tile * ROWS if is_own else row
            column = 0 if is_own else first_output
            multiply_tile(
                words,
                row * num_words,
                num_words,
                w,
                w_at,
                num_words,
                starts,
                scales,
                bias,
                first_output,
                row_scales,
                row,
                sums,
                first_sum * sums.shape[1] + column,
                sums.shape[1],
                rows,
                fetch_at,
                num_fetched,
            )
            if must_activate:
                for r in range(rows):
                    gelu_new_row(sums[first_sum + r, column : column + PANEL])
            if is_own:
                for r in range(rows):
                    out_at = (row + r) * out.shape[1] + first_output
                    store_rounded(sums, (first_sum + r) * PANEL, out, out_at)


class Int8PanelLinear(nn.Module):
    """A linear layer of integers (out, in) int8 and one scale an output, for VNNI.

    (N, in) -> (N, out) in host memory, in x's dtype; the sums and scales are in 32 bits. The result
    may be a view of a wider tensor.
    """

    def __init__(
        self,
        integers: Tensor,  # (out, in) int8
        scales: Tensor,  # (out,) float32
        bias: Tensor | None,  # (out,)
        activation: str | None = None,  # None or "gelu_new"
    ):
        super().__init__()
        self.out_features, self.in_features = integers.shape
        self.activation = activation
        num_panels = -(-self.out_features // PANEL)
        num_words = -(-self.in_features // (INPUTS_PER_WORD * TURN)) * TURN
        padding_in = num_words * INPUTS_PER_WORD - self.in_features
        padding_out = num_panels * PANEL - self.out_features
        # Zeros up to whole turns of inputs and whole panels of outputs.
        padded = F.pad(integers, (0, padding_in, 0, padding_out))
        in_order = padded.view(num_panels, PANEL, num_words, INPUTS_PER_WORD).transpose(1, 2)
        panels = preallocate(in_order.shape, torch.int8).copy_(in_order)
        self.weight = nn.Parameter(panels, requires_grad=False)
        self.bias = bias
        bias = torch.zeros(len(scales)) if bias is None else bias.detach().float()
        self.padded_bias = F.pad(bias, (0, padding_out)).numpy()
        self.padded_scales = F.pad(scales, (0, padding_out)).numpy()
        self.starts = (-OFFSET * padded.sum(1, dtype=torch.int32)).numpy()
        self.words = self.weight.view(torch.uint32)[..., 0].numpy()  # the same memory
        self.arrays = self.words, self.starts, self.padded_scales, self.padded_bias

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out), in x's dtype."""
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x is {tuple(x.shape)}: this layer takes (N, {self.in_features})")
        rows = x if x.dtype in (torch.float32, torch.bfloat16) else x.float()
        out = torch.empty(len(x), len(self.padded_bias), dtype=rows.dtype)
        use_openmp_threads(torch.get_num_threads())
        is_activated = self.activation is not None
        multiply(as_numpy(rows.contiguous()), *self.arrays, is_activated, as_numpy(out))
        if len(self.padded_bias) > self.out_features:
            out = out[:, : self.out_features]
        return out.to(x.dtype)


@functools.cache
def can_multiply_bytes() -> bool:
    """Whether this machine has VNNI, Numba and OpenMP's threads."""
    return HAS_NUMBA and has_vnni(processor_features()) and has_openmp_threads()


def has_vnni(features: set[str]) -> bool:
    """Whether a processor with these features has `vpdpbusd` for its longest registers."""
    if "avx512f" in features:
        return "avx512vnni" in features
    return {"avx2", "fma", "avxvnni"} <= features
