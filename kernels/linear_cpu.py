"""A linear layer on a CPU: weights stream in once, and while they come the processor multiplies.

A decode step of 32 sequences reads 124 million weights and multiplies each of them 32 times. The
reading takes about as long as the arithmetic, so what counts is that both go on at the same time.
The weights lie in panels of 48 outputs, in the order of their use, and rows of x meet a panel eight
at a time (24 and four on a processor whose registers are half as long and half as many):

    a panel: 48 outputs of every input    ███ ███ ███ ███ ..   768 inputs are 147 KB of float32
    8 rows of x:  x[0]  x[1]  x[2]  ..  ───┴───┴───┴──> 8 x 3 vector registers hold the 384 sums,
                                          and each turn asks for lines of the panel that is next

The first 8 rows, the next 8 and so on walk the same panel, which the second cache still holds, and
each of them fetches its share of the next one. So memory delivers while there is work to do: 8 rows
take hardly longer than reading the weights, and 32 less than reading and multiplying in turn.

A sum takes its inputs one after the other, with one rounding each, whatever else is in the batch: a
row's result depends neither on the rows beside it nor on the number of threads. (A library may add
in another order for another number of rows: a text then changes with the batch it is written in.)
GPT-2's activation can follow at once, while its numbers are still in a cache.

What a production engine does beyond this: weights in 8 or 4 bits, matrix instructions where there
are any, and layers cut by their inputs too, where 16 panels are too few for all threads.

Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication", ACM TOMS 34(3).
Run: python -m kernels.linear_cpu
Try: `each = 0` in `multiply` (nothing is fetched early), ROWS = 4, or WORDS_AT_ONCE = 3072.
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

from kernels.numba_tools import (
    CACHE_LINE,
    HAS_NUMBA,
    compiled_parallel,
    has_openmp_team,
    prange,
    use_openmp_team,
)
from kernels.vector_cpu import at_most, call, in_all_lanes, lanes, load, power_of_two, store

if HAS_NUMBA:
    from llvmlite import binding, ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic


def processor_features() -> set[str]:
    """What the processor has, as LLVM calls it; nothing without Numba."""
    found = binding.get_host_cpu_features() if HAS_NUMBA else {}
    return {name for name, is_there in found.items() if is_there}


# 24 sums, 3 of the weights and one of x are 28 of AVX-512's 32 registers of 16 numbers; 12, 3 and
# one are all of AVX2's, which hold 8.
HAS_AVX512 = "avx512f" in processor_features()
LANES, VECTORS, ROWS = (16, 3, 8) if HAS_AVX512 else (8, 3, 4)
PANEL = VECTORS * LANES  # outputs
WORDS_AT_ONCE = 768  # of each output: these and the next fit into the second cache; see TURN
TURN = 4  # words in one turn of the innermost loop, since counting takes time; divides the above
LINES = TURN * PANEL * 4 // CACHE_LINE  # of memory that hold the words of a turn
TILES_AT_ONCE = 64 // ROWS  # 64 rows meet a piece of a panel before it is the next one's turn
SECOND_CACHE = 2  # what a prefetch calls it


# ---- a few rows, a panel's outputs ---------------------------------------------------------------
def multiply_tile(x, w, bias, out, where, strides, size):
    """Add to ROWS rows of out what rows of x make of a piece of a panel, in vector registers.

    `where` says at which element of x, w, bias and out to begin, and from which of w to fetch; with
    a negative one of bias the sums go on that out holds. `strides` are those of the rows of x and
    of out; `size` is how many rows there are, at most ROWS, how many words of w for each output (a
    multiple of TURN), and how many lines of w to fetch in each turn, at most LINES.
    """


if HAS_NUMBA:
    I32, I64, BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
    VECTOR, WORDS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(I32, LANES)
    PREFETCH = ir.FunctionType(ir.VoidType(), [BYTES, I32, I32, I32])

    def vectors(builder, array, at):
        """The addresses of VECTORS times LANES numbers of an array."""
        first = builder.bitcast(builder.gep(array, [at]), VECTOR.as_pointer())
        return [builder.gep(first, [I64(i)]) for i in range(VECTORS)]

    def once_more(builder, index):
        """The same index, which the compiler can't know: what lies there is loaded once more."""
        return builder.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [index], side_effect=False)

    def half(builder, vector, which):
        """The lower (0) or the upper (1) of each lane's two bfloat16, as float32."""
        pairs = builder.bitcast(vector, WORDS)
        upper = builder.and_(pairs, WORDS([0xFFFF0000] * LANES))
        lower = builder.shl(pairs, WORDS([16] * LANES))
        return builder.bitcast(upper if which else lower, VECTOR)

    @intrinsic
    def multiply_tile(typingctx, x, w, bias, out, where, strides, size):  # noqa: F811
        def generate(context, builder, signature, args):
            read = functools.partial(builder.load, align=4)  # numbers begin anywhere
            add, multiply, declare = builder.add, builder.mul, cgutils.get_or_insert_function
            prefetch = declare(builder.module, PREFETCH, "llvm.prefetch.p0")
            arrays = zip(signature.args[:4], args[:4], strict=True)
            x, w, bias, out = (context.make_array(t)(context, builder, a).data for t, a in arrays)
            unpacked = (cgutils.unpack_tuple(builder, arg) for arg in args[4:])
            (x_at, w_at, bias_at, out_at, ahead), (x_stride, out_stride), size = unpacked
            num_rows, num_words, each = size
            per_word = 2 if signature.args[1].dtype == types.uint32 else 1  # else float32

            # For rows that are not there the last one is computed again, and stored where it is.
            last, xs, outs = builder.sub(num_rows, I64(1)), [], []
            for r in map(I64, range(ROWS)):
                row = builder.select(builder.icmp_signed("<", r, last), r, last)
                xs.append(builder.gep(x, [add(x_at, multiply(row, x_stride))]))
                outs.append(vectors(builder, out, add(out_at, multiply(row, out_stride))))

            # Variables that only loads and stores touch: the compiler keeps them in registers.
            sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(VECTORS)] for _ in xs]
            from_bias = builder.icmp_signed(">=", bias_at, I64(0))
            starts = vectors(builder, bias, bias_at)
            for r in range(ROWS):
                for v in range(VECTORS):
                    start = builder.select(from_bias, starts[v], outs[r][v])
                    builder.store(read(start), sums[r][v])

            fetched = builder.bitcast(builder.gep(w, [ahead]), BYTES)
            with cgutils.for_range(builder, builder.sdiv(num_words, I64(TURN)), intp=I64) as loop:
                word = multiply(loop.index, I64(TURN))
                line = builder.gep(fetched, [multiply(loop.index, multiply(each, I64(CACHE_LINE)))])
                with contextlib.ExitStack() as inside:
                    for i in range(LINES):
                        is_some = builder.icmp_signed("<", I64(i), each)
                        inside.enter_context(builder.if_then(is_some))
                        address = builder.gep(line, [I64(i * CACHE_LINE)])
                        builder.call(prefetch, [address, I32(0), I32(SECOND_CACHE), I32(1)])
                for i in range(TURN):
                    at = add(w_at, multiply(add(word, I64(i)), I64(PANEL)))
                    for j in range(per_word):
                        if j == 1 and not HAS_AVX512:  # a kept word would take a sum's register
                            at = once_more(builder, at)
                        words = [read(address) for address in vectors(builder, w, at)]
                        parts = [half(builder, one, j) if per_word == 2 else one for one in words]
                        x_at = add(multiply(word, I64(per_word)), I64(i * per_word + j))
                        for r in range(ROWS):
                            number = read(builder.gep(xs[r], [x_at]))
                            number = in_all_lanes(builder, number, LANES)
                            for v in range(VECTORS):
                                total = call(builder, "fma", number, parts[v], read(sums[r][v]))
                                builder.store(total, sums[r][v])
            for r in range(ROWS):
                for v in range(VECTORS):
                    builder.store(read(sums[r][v]), outs[r][v], align=4)
            return context.get_dummy_value()

        return types.void(x, w, bias, out, where, strides, size), generate


# ---- a layer -------------------------------------------------------------------------------------
@compiled_parallel
def multiply(x, w, bias, out):
    """out = x w + bias: x (N, inputs), w (panels, words, PANEL), bias (panels * PANEL,), out (N,
    panels * PANEL), without gaps. A word is a float32 or, as a uint32, two inputs in bfloat16;
    their number is a multiple of TURN.
    """
    (num_rows, num_inputs), (num_panels, num_words, _) = x.shape, w.shape
    num_tiles = (num_rows + ROWS - 1) // ROWS
    num_bundles = (num_tiles + TILES_AT_ONCE - 1) // TILES_AT_ONCE
    for task in prange(num_bundles * num_panels):
        first, at = task // num_panels * TILES_AT_ONCE, task % num_panels * PANEL
        last = min(first + TILES_AT_ONCE, num_tiles)
        for begin in range(0, num_words, WORDS_AT_ONCE):
            words = min(WORDS_AT_ONCE, num_words - begin)
            w_at = at * num_words + begin * PANEL
            # What is needed next lies right behind, LINES for each turn. Every tile fetches its
            # share, a little in each turn: in a burst, memory is late and registers wait.
            tiles = last - first
            each = (LINES + tiles - 1) // tiles
            for tile in range(first, last):
                row = tile * ROWS
                share = each * (words // TURN) * CACHE_LINE // 4  # words of w
                ahead = w_at + words * PANEL + (tile - first) * share
                x_at = row * num_inputs + begin * (num_inputs // num_words)
                where = x_at, w_at, at if begin == 0 else -1, row * out.shape[1] + at, ahead
                size = min(ROWS, num_rows - row), words, each
                multiply_tile(x, w, bias, out, where, (num_inputs, out.shape[1]), size)


@compiled_parallel
def gelu_new(x):
    """`F.gelu(x, approximate="tanh")` in place, x (N, C) in float32, with an exponential for tanh.

    x (1 + tanh u) / 2 = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    """
    cube, most, one = np.float32(0.044715), np.float32(126), np.float32(1)  # 2^127 is the largest
    scale = np.float32(-2 * math.sqrt(2 / math.pi) / math.log(2))  # to powers of two
    for i in prange(len(x)):
        row = x[i]
        for j in range(0, len(row), lanes(row)):
            a = load(row, j, len(row) - j)
            power = power_of_two(at_most((a + a * a * a * cube) * scale, most))
            store(row, j, len(row) - j, a / (power + one))


class PanelLinear(nn.Module):
    """`nn.Linear` from weights in panels and, if it is named, GPT-2's activation behind it.

    (N, in) -> (N, out), for inference in host memory. The result's rows may lie further apart than
    they are long. Raises ValueError for an x of another shape or dtype, and another activation.
    """

    def __init__(self, linear: nn.Linear, activation: str | None = None):
        super().__init__()
        if activation not in (None, "gelu_new"):
            raise ValueError(f"activation is {activation!r}: panels compute gelu_new or none")
        self.activation = activation
        self.in_features, self.out_features = linear.in_features, linear.out_features
        rows, self.dtype = linear.weight.detach(), linear.weight.dtype
        per_word = 4 // self.dtype.itemsize
        num_panels = -(-self.out_features // PANEL)
        num_words = -(-max(1, self.in_features) // (per_word * TURN)) * TURN
        self.room_in = num_words * per_word - self.in_features
        self.room_out = num_panels * PANEL - self.out_features
        padded = F.pad(rows, (0, self.room_in, 0, self.room_out))
        panels = padded.view(num_panels, PANEL, num_words, per_word).transpose(1, 2).contiguous()
        self.weight, self.bias = nn.Parameter(panels, requires_grad=False), linear.bias
        bias = rows.new_zeros(len(rows)) if self.bias is None else self.bias.detach()
        # As the compiled loop takes them.
        word = torch.float32 if per_word == 1 else torch.uint32
        self.words = panels.view(word).view(num_panels, num_words, PANEL).numpy()
        self.first_sums = F.pad(bias.float(), (0, self.room_out)).numpy()

    def forward(self, x: Tensor) -> Tensor:
        # Between two products the caches are full of weights, and each line of Python takes 10 us.
        if x.shape[1:] != (self.in_features,) or x.dtype != self.dtype:
            want = f"(N, {self.in_features}) of {self.dtype}"
            raise ValueError(f"x is {tuple(x.shape)} of {x.dtype}: this layer takes {want}")
        rows = x.float().contiguous()
        rows = F.pad(rows, (0, self.room_in)) if self.room_in else rows
        out = torch.empty(len(x), len(self.first_sums), dtype=torch.float32)
        use_openmp_team(torch.get_num_threads())
        multiply(rows.numpy(), self.words, self.first_sums, out.numpy())
        if self.activation:
            gelu_new(out.numpy())
        out = out[:, : self.out_features] if self.room_out else out
        return out if self.dtype == torch.float32 else out.to(self.dtype)


@functools.cache
def can_use_panels(dtype: torch.dtype) -> bool:
    """Whether this machine has the registers for it, and nothing that beats them.

    AVX-512 or AVX2, and OpenMP's threads; but products in bfloat16 are the matrix unit's where
    there is one.
    """
    if not HAS_NUMBA or dtype not in (torch.float32, torch.bfloat16):
        return False
    features = processor_features()
    has_matrix_unit = dtype == torch.bfloat16 and "amx-bf16" in features
    has_registers = "avx512f" in features or {"avx2", "fma"} <= features
    return has_registers and not has_matrix_unit and has_openmp_team()


# --------------------------------------------------------------------------------------------------
def demo():
    """8, 32 and 200 rows through six layers: the library's product and this one, bit for bit."""
    if not can_use_panels(torch.float32):
        print("ok: nothing to multiply without AVX2, numba and OpenMP")
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
    print("ok: the same 8 rows, alone and among 200: the same numbers, bit for bit")


if __name__ == "__main__":
    with torch.inference_mode():
        demo()
