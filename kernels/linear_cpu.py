"""A linear layer on a CPU that loads the next weights while it multiplies with the current ones.

A decode step of 32 sequences reads GPT-2's 124 million weights and multiplies each of them 32
times. Loading them takes about as long as multiplying, so the two have to overlap. A library's
product first copies the weights into its own order, at every step. Here they are copied once, into
panels of 48 outputs in the order of their use, and 8 rows of x at a time meet a panel (4 rows with
AVX2, which has half as many registers of half the size):

    a panel: 48 outputs of every input    ███ ███ ███ ███ ..   768 inputs are 147 KB of float32
    8 rows of x:  x[0]  x[1]  x[2]  ..  ───┴───┴───┴──> 384 sums in 8 x 3 vector registers;
                                          each turn of the loop prefetches lines of the next panel

Rows 0 to 7, then rows 8 to 15 and so on use the same panel while it is in the L2 cache, and each
such tile of rows prefetches its share of the next panel. A step of up to 8 sequences has a single
tile. It reads the panels in one stream, and the processor itself reads ahead in it; prefetching the
next panel would be a second stream. And one row gets a loop for one row: together the two made
GPT-2's products of one sequence 1.3 times as fast (AMD EPYC, two threads). Measured on one AVX-512
core with six layers of 768 x 3072 in float32 (57 MB): 8 rows take 2.1 ms, 27 GB/s of weights, and
32 rows 4.2 ms; PyTorch's `nn.Linear` takes 6.1 and 12.7 ms. The panels lie in huge pages: in pages
of 4 KB a step of one sequence takes 4% longer.

In bfloat16 a word of a panel holds two inputs. Most processors have to widen them to float32. With
AVX512-BF16, `vdpbf16ps` takes a word of x and a word of weights, and adds both products to a sum in
float32, in 16 lanes at once. AMD's processors do that in the time of one float32 product.

Each sum adds its inputs in one order, with one rounding for each, whatever else is in the batch. So
a row's result is the same bits alone and in any batch, on any number of threads. (A library may add
in another order for another number of rows, and then a text changes with the batch.) Of a word's
two inputs the second comes first, because `vdpbf16ps` adds them so. GPT-2's activation follows at
once, while its inputs are still in a cache.

Checked by tests/kernels/test_linear_cpu.py: against the product in float64, and each bit of the
sums against the same sums in NumPy.
Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication", ACM TOMS 34(3).
Run: python -m kernels.linear_cpu
"""

import contextlib
import functools
import math
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.device_memory import preallocate
from kernels.numba_tools import (
    CACHE_LINE_BYTES,
    HAS_NUMBA,
    as_numpy,
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

if HAS_NUMBA:
    from llvmlite import binding, ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic, overload


def processor_name() -> str:
    """The processor's generation by LLVM's name, such as "znver5"; empty without Numba."""
    return binding.get_host_cpu_name() if HAS_NUMBA else ""


# AVX-512 has 32 registers of 16 floats: 8 x 3 sums, 3 of weights and one of x are 28.
# AVX2 has 16 registers of 8 floats: 4 x 3 sums, 3 of weights and one of x are 16.
HAS_AVX512 = "avx512f" in processor_features()
LANES, VECTORS, ROWS = (16, 3, 8) if HAS_AVX512 else (8, 3, 4)
PANEL = VECTORS * LANES  # outputs
# A word is 4 bytes of one output's weights: one float32, or two inputs in bfloat16.
TILE_SIZES = (1, ROWS // 2, ROWS)  # rows of the loops: the smallest that is enough runs
WORDS_AT_ONCE = 768  # per output: this piece of a panel and the next one fit into the L2 cache
TURN = 4  # words per turn of the innermost loop; divides WORDS_AT_ONCE
LINES = TURN * PANEL * 4 // CACHE_LINE_BYTES  # cache lines that hold the words of a turn
TILES_AT_ONCE = 64 // ROWS  # 64 rows use a piece of a panel before the next piece is loaded
WORDS_AHEAD = 4096  # 16 KB: what a single tile prefetches before it needs it
L2_CACHE = 2  # its number in a prefetch instruction


# ---- ROWS rows of x times a piece of a panel, in vector registers --------------------------------
def multiply_tile(
    x, x_at, x_stride, w, w_at, num_words, bias, bias_at, starts_with_bias, out, out_at, out_stride,
    num_rows, fetch_at, num_fetched,
):  # fmt: skip
    """out[r, 0:PANEL] = (bias or out[r]) + the products of x[r] with a piece of a panel.

    x, w, bias and out are flat arrays, and `*_at` is the element of each to begin at. There are
    `num_rows` rows (1 to ROWS), `x_stride` and `out_stride` elements apart. The piece has
    `num_words` words per output, a multiple of TURN. The sums start with the bias for the first
    piece of a panel, and with the values in out for the others. Each turn prefetches `num_fetched`
    cache lines (at most LINES), from w[fetch_at] on.

    It is written in LLVM's own language. A plain loop takes 7 times as long (32 rows, 768 x 3072),
    because LLVM stores the 24 vectors of sums and loads them again for each input.
    """


def store_rounded(sums, sum_at, out, out_at):
    """out[out_at:][:PANEL] = sums[sum_at:][:PANEL], float32 rounded to bfloat16. Both are flat.

    As a loop over slices, whose length LLVM does not know, it takes 20 ns a panel in place of 4.
    """


if HAS_NUMBA:
    I32 = ir.IntType(32)
    I64 = ir.IntType(64)
    BYTES = ir.IntType(8).as_pointer()
    VECTOR, WORDS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(I32, LANES)
    PREFETCH = ir.FunctionType(ir.VoidType(), [BYTES, I32, I32, I32])

    def vector_addresses(builder, array, at, kind=VECTOR):
        """The addresses of VECTORS vectors of LANES numbers, from array[at] on."""
        first = builder.bitcast(builder.gep(array, [at]), kind.as_pointer())
        return [builder.gep(first, [I64(i)]) for i in range(VECTORS)]

    def for_each_size(builder, num_rows, write, sizes=TILE_SIZES):
        """The code of a tile for each of the sizes; the smallest with `num_rows` rows runs.

        A decode step of one sequence has one row. The sums of 8 would take longer than the loading.
        """
        size, *larger = sizes
        if not larger:
            write(size)
            return
        with builder.if_else(builder.icmp_signed("<=", num_rows, I64(size))) as (fits, others):
            with fits:
                write(size)
            with others:
                for_each_size(builder, num_rows, write, larger)

    def rows_of_tile(builder, num_rows, tile_rows):
        """The numbers of a tile's rows. With fewer rows the last one is computed several times."""
        last = builder.sub(num_rows, I64(1))
        rows = map(I64, range(tile_rows))
        return [builder.select(builder.icmp_signed("<", r, last), r, last) for r in rows]

    def prefetch_turn(builder, w, fetch_at, turn, num_fetched):
        """Prefetch this turn's `num_fetched` cache lines (at most LINES) from w[fetch_at] on.

        if (0 < num_fetched) { line 0; if (1 < num_fetched) { line 1; .. } }
        """
        prefetch = cgutils.get_or_insert_function(builder.module, PREFETCH, "llvm.prefetch.p0")
        fetched = builder.bitcast(builder.gep(w, [fetch_at]), BYTES)
        turn_bytes = builder.mul(num_fetched, I64(CACHE_LINE_BYTES))
        line = builder.gep(fetched, [builder.mul(turn, turn_bytes)])
        with contextlib.ExitStack() as nested:
            for i in range(LINES):
                nested.enter_context(builder.if_then(builder.icmp_signed("<", I64(i), num_fetched)))
                address = builder.gep(line, [I64(i * CACHE_LINE_BYTES)])
                builder.call(prefetch, [address, I32(0), I32(L2_CACHE), I32(1)])

    def opaque(builder, index):
        """The same index, but LLVM cannot know it: it loads from there again.

        Otherwise LLVM would keep the loaded words in registers, and all 16 of AVX2 are in use.
        """
        return builder.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [index], side_effect=False)

    def widen_half(builder, words, j):
        """Input j (0 or 1) of each word of two bfloat16, as a vector of float32."""
        if j == 0:  # the lower half
            widened = builder.shl(words, WORDS([16] * LANES))
        else:
            widened = builder.and_(words, WORDS([0xFFFF0000] * LANES))
        return builder.bitcast(widened, VECTOR)

    @intrinsic
    def multiply_tile(  # noqa: F811, D103
        typingctx, x, x_at, x_stride, w, w_at, num_words, bias, bias_at, starts_with_bias,
        out, out_at, out_stride, num_rows, fetch_at, num_fetched,
    ):  # fmt: skip
        i64 = types.int64
        signature = types.void(
            x, i64, i64, w, i64, i64, bias, i64, types.boolean, out, i64, i64, i64, i64, i64
        )
        return signature, generate_tile

    def generate_tile(context, builder, signature, args):
        """Write the code of `multiply_tile`; `args` are its arguments as LLVM's values."""
        values = data_of_arrays(context, builder, signature, args)
        x, w = signature.args[0].dtype, signature.args[3].dtype
        write = functools.partial(write_tile, builder, values, w == types.uint32, x == types.uint32)
        *_, num_rows, _, _ = values
        for_each_size(builder, num_rows, write)
        return context.get_dummy_value()

    def write_tile(builder, values, has_halves, has_pairs, tile_rows):
        """The code for up to `tile_rows` rows; `values` are the arguments, arrays as addresses.

        `has_halves`: a word of w holds two bfloat16. `has_pairs`: a word of x does too.
        """
        (
            x, x_at, x_stride, w, w_at, num_words, bias, bias_at, starts_with_bias,
            out, out_at, out_stride, num_rows, fetch_at, num_fetched,
        ) = values  # fmt: skip
        read = functools.partial(builder.load, align=4)  # rows begin at any multiple of 4 bytes
        if has_pairs:
            name, kinds = f"llvm.x86.avx512bf16.dpbf16ps.{LANES * 32}", [VECTOR, WORDS, WORDS]
        else:
            name, kinds = f"llvm.fma.v{LANES}f32", [VECTOR] * 3
        function = ir.FunctionType(VECTOR, kinds)
        product = cgutils.get_or_insert_function(builder.module, function, name)
        x_per_word = 2 if has_halves and not has_pairs else 1

        x_rows, out_rows = [], []
        for row in rows_of_tile(builder, num_rows, tile_rows):
            x_row = builder.add(x_at, builder.mul(row, x_stride))
            x_rows.append(builder.gep(x, [x_row]))
            out_row = builder.add(out_at, builder.mul(row, out_stride))
            out_rows.append(vector_addresses(builder, out, out_row))

        # Variables that are only loaded and stored: LLVM keeps these in registers.
        sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(VECTORS)] for _ in x_rows]
        biases = vector_addresses(builder, bias, bias_at)
        for r in range(tile_rows):
            for i in range(VECTORS):
                start = builder.select(starts_with_bias, biases[i], out_rows[r][i])
                builder.store(read(start), sums[r][i])

        num_turns = builder.sdiv(num_words, I64(TURN))
        with cgutils.for_range(builder, num_turns, intp=I64) as loop:
            prefetch_turn(builder, w, fetch_at, loop.index, num_fetched)

            # sums[r][v] += the products of x[r] and w[v], for the inputs of TURN words
            word = builder.mul(loop.index, I64(TURN))
            for i in range(TURN):
                at = builder.add(word, I64(i))
                at = builder.add(w_at, builder.mul(at, I64(PANEL)))
                for j in reversed(range(x_per_word)):  # the second input first, as vdpbf16ps does
                    if (x_per_word, j) == (2, 0) and not HAS_AVX512:
                        at = opaque(builder, at)
                    kind = WORDS if has_halves else VECTOR
                    weights = [read(address) for address in vector_addresses(builder, w, at, kind)]
                    if x_per_word == 2:
                        weights = [widen_half(builder, words, j) for words in weights]
                    input_at = builder.mul(word, I64(x_per_word))
                    input_at = builder.add(input_at, I64(i * x_per_word + j))
                    for r in range(tile_rows):
                        number = read(builder.gep(x_rows[r], [input_at]))
                        number = in_all_lanes(builder, number, LANES)
                        for v in range(VECTORS):
                            total, factors = read(sums[r][v]), [number, weights[v]]
                            args = [total, *factors] if has_pairs else [*factors, total]
                            builder.store(builder.call(product, args), sums[r][v])

        for r in range(tile_rows):
            for i in range(VECTORS):
                builder.store(read(sums[r][i]), out_rows[r][i], align=4)

    @intrinsic
    def store_rounded(typingctx, sums, sum_at, out, out_at):  # noqa: F811, D103
        signature = types.void(sums, types.int64, out, types.int64)

        def generate(context, builder, signature, args):
            sums, sum_at, out, out_at = data_of_arrays(context, builder, signature, args)
            halves = ir.VectorType(ir.IntType(16), LANES)
            targets = vector_addresses(builder, out, out_at, halves)
            sources = vector_addresses(builder, sums, sum_at)
            for source, target in zip(sources, targets, strict=True):
                builder.store(rounded(builder, builder.load(source, align=4)), target, align=2)
            return context.get_dummy_value()

        def rounded(builder, numbers):
            """A vector of float32 as 16 bits each; `narrow` of numba_tools.py says the same."""
            bits, sixteen = builder.bitcast(numbers, WORDS), WORDS([16] * LANES)
            last_digit = builder.and_(builder.lshr(bits, sixteen), WORDS([1] * LANES))
            half = builder.add(last_digit, WORDS([0x7FFF] * LANES))
            upper = builder.lshr(builder.add(bits, half), sixteen)
            is_nan = builder.fcmp_unordered("uno", numbers, numbers)
            upper = builder.select(is_nan, WORDS([0x7FC0] * LANES), upper)
            return builder.trunc(upper, ir.VectorType(ir.IntType(16), LANES))

        return signature, generate


# ---- a layer -------------------------------------------------------------------------------------
@compiled
def gelu_new_row(row):
    """`F.gelu(row, approximate="tanh")` in place, (C,) in float32.

    x (1 + tanh u) / 2 = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    """
    cube = np.float32(0.044715)
    scale = np.float32(-2 * math.sqrt(2 / math.pi) / math.log(2))  # e^-2u = 2^(scale (..))
    largest = np.float32(126)  # 2^128 would be infinite
    one = np.float32(1)
    for j in range(len(row)):
        a = row[j]
        exponent = (a + a * a * a * cube) * scale
        exponent = largest if exponent > largest else exponent  # NaN stays NaN
        row[j] = a / (one + power_of_two(exponent))


def sums_for(out):
    """Where a task's sums are added: out, or 64 rows of float32 if out has bfloat16."""
    return out


if HAS_NUMBA:

    @overload(sums_for)
    def _sums_for(out):
        if out.dtype == types.uint16:
            return lambda out: np.empty((TILES_AT_ONCE * ROWS, PANEL), np.float32)
        return lambda out: out


@compiled_parallel
def multiply(x, w, bias, must_activate, out):
    """out = x w + bias, all contiguous, followed by GPT-2's activation if `must_activate`.

    w (panels, words, PANEL) holds words: float32, or uint32 for two inputs in bfloat16. The number
    of words is a multiple of TURN. x (N, inputs) is float32, or (N, words) uint32 like w; its rows
    may be padded at the end. bias (panels * PANEL,) is float32. out (N, panels * PANEL) is float32,
    or uint16 for bfloat16.
    """
    num_rows, x_length = x.shape
    num_panels, num_words, _ = w.shape
    x_per_word = x_length // num_words
    num_tiles = (num_rows + ROWS - 1) // ROWS
    num_bundles = (num_tiles + TILES_AT_ONCE - 1) // TILES_AT_ONCE
    for task in prange(num_bundles * num_panels):  # a task: up to 64 rows and one panel
        first_tile = task // num_panels * TILES_AT_ONCE
        last_tile = min(first_tile + TILES_AT_ONCE, num_tiles)
        tiles = last_tile - first_tile
        first_output = task % num_panels * PANEL
        sums = sums_for(out)  # out itself, or a task's own rows
        is_own = out.itemsize == 2
        # The next piece of the panel, or the next panel, follows this piece in memory: LINES cache
        # lines per turn. Each tile prefetches its share of it, evenly over its turns: 8 tiles and
        # 12 lines -> 2 lines a turn. (Many prefetches in a row would fill the queue of loads.)
        num_fetched = (LINES + tiles - 1) // tiles
        for begin in range(0, num_words, WORDS_AT_ONCE):
            words = min(WORDS_AT_ONCE, num_words - begin)
            w_at = first_output * num_words + begin * PANEL
            words_fetched = num_fetched * (words // TURN) * CACHE_LINE_BYTES // 4  # by each tile
            for tile in range(first_tile, last_tile):
                row = tile * ROWS
                rows = min(ROWS, num_rows - row)
                fetch_at = w_at + words * PANEL + (tile - first_tile) * words_fetched
                if tiles == 1:  # one stream
                    fetch_at = w_at + WORDS_AHEAD
                first_sum = row - first_tile * ROWS if is_own else row
                column = 0 if is_own else first_output
                multiply_tile(
                    x,
                    row * x_length + begin * x_per_word,
                    x_length,
                    w,
                    w_at,
                    words,
                    bias,
                    first_output,
                    begin == 0,
                    sums,
                    first_sum * sums.shape[1] + column,
                    sums.shape[1],
                    rows,
                    fetch_at,
                    num_fetched,
                )
                if begin + words < num_words:
                    continue
                if must_activate:  # its sums are complete
                    for r in range(rows):
                        gelu_new_row(sums[first_sum + r, column : column + PANEL])
                if is_own:
                    for r in range(rows):
                        out_at = (row + r) * out.shape[1] + first_output
                        store_rounded(sums, (first_sum + r) * PANEL, out, out_at)


class PanelLinear(nn.Module):
    """`nn.Linear` with its weights in panels, optionally followed by GPT-2's activation.

    (N, in) -> (N, out) in host memory, for inference. The result may be a view of a wider tensor.
    Raises ValueError for another activation, and `forward` for an x of another shape or dtype.
    """

    def __init__(self, linear: nn.Linear, activation: str | None = None):
        super().__init__()
        if activation not in (None, "gelu_new"):
            raise ValueError(f"activation is {activation!r}: panels compute gelu_new or none")
        self.activation = activation
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, self.dtype = linear.weight.detach(), linear.weight.dtype  # (out, in)
        per_word = 4 // self.dtype.itemsize
        num_panels = -(-self.out_features // PANEL)
        num_words = -(-max(1, self.in_features) // (per_word * TURN)) * TURN
        # Zeros up to whole turns of inputs and whole panels of outputs.
        self.padding_in = num_words * per_word - self.in_features
        self.padding_out = num_panels * PANEL - self.out_features
        padded = F.pad(weight, (0, self.padding_in, 0, self.padding_out))
        in_order = padded.view(num_panels, PANEL, num_words, per_word).transpose(1, 2)
        panels = preallocate(in_order.shape, self.dtype).copy_(in_order)
        self.weight = nn.Parameter(panels, requires_grad=False)
        self.bias = linear.bias
        bias = weight.new_zeros(len(weight)) if self.bias is None else self.bias.detach()
        # The same memory as the compiled loop takes it, and the bias in float32.
        word = torch.float32 if per_word == 1 else torch.uint32
        self.words = panels.view(word).view(num_panels, num_words, PANEL).numpy()
        self.has_pairs = per_word == 2 and can_multiply_pairs()
        self.padded_bias = F.pad(bias.float(), (0, self.padding_out)).numpy()
        self.arrays = self.words, self.padded_bias

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out), in x's dtype."""
        # Few lines: a product's weights have evicted the interpreter from the caches, and each
        # line of Python takes about 10 us.
        if x.shape[1:] != (self.in_features,) or x.dtype != self.dtype:
            want = f"(N, {self.in_features}) of {self.dtype}"
            raise ValueError(f"x is {tuple(x.shape)} of {x.dtype}: this layer takes {want}")
        out = torch.empty(len(x), len(self.padded_bias), dtype=self.dtype)
        use_openmp_threads(torch.get_num_threads())
        must_activate = self.activation is not None
        multiply(self.rows_of(x), self.words, self.padded_bias, must_activate, as_numpy(out))
        return out[:, : self.out_features] if self.padding_out else out

    def rows_of(self, x: Tensor) -> np.ndarray:
        """x as `multiply` takes it: (N, inputs) float32, or (N, words) of two bfloat16."""
        rows = (x if self.has_pairs else x.float()).contiguous()
        if self.padding_in:
            rows = F.pad(rows, (0, self.padding_in))
        # NumPy has no bfloat16. (A view in PyTorch would refuse a tensor that begins at an odd
        # number of its memory.)
        return as_numpy(rows).view(np.uint32) if self.has_pairs else rows.numpy()


@functools.cache
def can_multiply_pairs() -> bool:
    """Whether `vdpbf16ps` is faster here than to widen: on AMD's processors that have it.

    On Intel's it took twice the time of a float32 product.
    """
    return "avx512bf16" in processor_features() and processor_name().startswith("znver")


@functools.cache
def can_use_panels(dtype: torch.dtype) -> bool:
    """Whether this machine can use panels for a dtype, and has nothing that is faster.

    It needs Numba, AVX-512 or AVX2, and OpenMP's threads. For bfloat16 a matrix unit (AMX) is
    faster, and PyTorch uses it.
    """
    if not HAS_NUMBA or dtype not in (torch.float32, torch.bfloat16):
        return False
    features = processor_features()
    has_matrix_unit = dtype == torch.bfloat16 and "amx-bf16" in features
    has_registers = "avx512f" in features or {"avx2", "fma"} <= features
    return has_registers and not has_matrix_unit and has_openmp_threads()


# --------------------------------------------------------------------------------------------------
def demo():
    """8, 32 and 200 rows through six layers: the library's product and this one, timed."""
    if not can_use_panels(torch.float32):
        print("ok: nothing to show, panels need AVX2, numba and OpenMP")
        return
    torch.manual_seed(0)
    plain = [nn.Linear(768, 3072) for _ in range(6)]
    panels = [PanelLinear(linear) for linear in plain]
    x = torch.randn(200, 768)
    results, gigabytes = [], sum(linear.weight.nbytes for linear in plain) / 1e9
    print(f"{gigabytes * 1e3:.0f} MB of weights, {torch.get_num_threads()} threads, float32")
    print("rows  library ms  panels ms          weights  arithmetic")
    for num_rows in (8, 32, 200):
        seconds = {id(layers): [] for layers in (plain, panels)}
        for _ in range(9):
            for layers in (plain, panels):
                begun = time.perf_counter()
                made = [layer(x[:num_rows]) for layer in layers]
                seconds[id(layers)].append(time.perf_counter() - begun)
        library, ours = (statistics.median(taken) for taken in seconds.values())
        speed = f"{gigabytes / ours:6.1f} GB/s {gigabytes / 2 * num_rows / ours:5.0f} GFLOP/s"
        print(f"{num_rows:4} {library * 1e3:11.2f} {ours * 1e3:10.2f}   {speed}")
        torch.testing.assert_close(made[0], plain[0](x[:num_rows]))
        results.append(made[0][:8])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    print("ok: 8 rows have the same bits alone and among 200")


if __name__ == "__main__":
    with torch.inference_mode():
        demo()
