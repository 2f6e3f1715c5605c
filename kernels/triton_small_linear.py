"""A linear layer for a handful of rows: each weight is read once, in one launch that does the rest.

With one row to multiply, the time of a product is the time to read its weights. But a product made
for many rows gives a program 64 outputs or more: the 768 of a projection are 12 programs then, on a
chip with 132 processors. (A library may cut the sums instead, and adds their parts up in a second
launch.) Here a program owns 4 to 16 outputs, and all of their sums:

    x (N, in) ──┬─> program 0     outputs [0, 4)       reads weights (4, in), side by side
       ^        ├─> program 1     outputs [4, 8)       sums, + bias, GELU, + residual: while they
    LayerNorm   │      ..                              are in registers, written once
                └─> program 191   outputs [764, 768)

So nothing is left to be added up, and whatever stands before or behind the product costs no launch
of its own: behind it the activation or the residual, in front of it the LayerNorm, which every
program computes again for itself. That is little work for one or two rows, and too much for 16.
What a production engine does beyond this: reads the first weights of a launch while the one before
still runs, weights in 8 or 4 bits.

Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", arXiv:1606.08415, section 2 (the tanh
form); Ba et al. 2016, "Layer Normalization", arXiv:1607.06450, equation 3.
Run: python -m kernels.triton_small_linear
Try: `while TILE_OUT > 1` in `linear_tiles` (how many programs?); or let `row_statistics` take the
mean of the squares minus the square of the mean, and give it rows around 1,000.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, just below

from kernels.triton_prefill import INTERPRETED, can_launch, check_launch, tl, triton

# A tensor core's product has 16 rows. More of them are a matter for a library: its programs read
# each row of x for 64 outputs, these for 4.
MOST_ROWS = 16
# All programs normalise all rows. Of 16 that would be more arithmetic than the products are, with
# more numbers at hand than a thread has registers for.
MOST_NORM_ROWS = 2

Norm = tuple[Tensor, Tensor, float]  # a LayerNorm: weight (C,), bias (C,) and eps


# ---- parts of a kernel ---------------------------------------------------------------------------
@triton.jit
def row_statistics(values, inside, LENGTH: tl.constexpr, EPS: tl.constexpr):
    """Mean and 1 / standard deviation of rows (R, TILE), zero where not `inside`: two of (R,).

    Two passes over registers: a mean of squares minus a squared mean would cancel to nothing where
    the mean is large.
    """
    mean = tl.sum(values, 1) / LENGTH
    centered = tl.where(inside, values - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centered * centered, 1) / LENGTH + EPS)


@triton.jit
def gelu_tanh(z):
    """`gelu_new` of model.py: z (1 + tanh u) / 2, which is z / (1 + e^(-2u))."""
    u = 0.7978845608028654 * (z + 0.044715 * z * z * z)  # sqrt(2 / pi)
    return z / (1.0 + tl.exp(-2.0 * u))


@triton.jit
def multiply_and_sum(
    x_row, row_inside,  # (ROWS,): pointers to the rows of x, and whether each exists
    weight_row, out_inside,  # (TILE_OUT,): the same of the weights
    norm_weight, norm_bias, EPS: tl.constexpr,  # of a LayerNorm in front, or None
    IN: tl.constexpr, ROWS: tl.constexpr, TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr,
    TILE_ROW: tl.constexpr,  # IN rounded up to a power of two
):  # fmt: skip
    """x W^T (ROWS, TILE_OUT) for one or two rows, or for wide types: no tensor core.

    A tensor core would multiply 16 rows, most of them zeros, and want the normalised numbers
    rounded to 16 bits.
    """
    wide = tl.float64 if x_row.dtype.element_ty == tl.float64 else tl.float32
    if norm_weight is not None:
        whole = tl.arange(0, TILE_ROW)[None, :]
        exists = row_inside[:, None] & (whole < IN)
        numbers = tl.load(x_row[:, None] + whole, exists, other=0.0).to(wide)
        mean, rstd = row_statistics(numbers, exists, IN, EPS)
    # Three axes: rows, outputs, inputs. Threads add up inputs of their own, and meet at the end.
    sums = tl.zeros([ROWS, TILE_OUT, TILE_IN], wide)
    # In a loop without tl.dot nothing is fetched ahead unless the range says so.
    for start in tl.range(0, IN, TILE_IN, num_stages=4):
        column = start + tl.arange(0, TILE_IN)[None, None, :]
        inside = column < IN
        at = weight_row[None, :, None] + column
        weights = tl.load(at, out_inside[None, :, None] & inside, other=0.0).to(wide)
        at = x_row[:, None, None] + column
        values = tl.load(at, row_inside[:, None, None] & inside, other=0.0).to(wide)
        if norm_weight is not None:
            gain = tl.load(norm_weight + column, inside, other=0.0).to(wide)
            shift = tl.load(norm_bias + column, inside, other=0.0).to(wide)
            values = (values - mean[:, None, None]) * rstd[:, None, None] * gain + shift
        sums += values * weights
    return tl.sum(sums, 2)


@triton.jit
def dot_products(
    x_row, row_inside, weight_row, out_inside,  # as above
    IN: tl.constexpr, ROWS: tl.constexpr, TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr,
    UPCAST: tl.constexpr,  # compute in 32 bits what the interpreter can't in 16
):  # fmt: skip
    """x W^T (ROWS, TILE_OUT) for 4 to 16 rows of 16-bit numbers, on tensor cores.

    16 multiplications for each weight that was read would take longer than reading it.
    """
    sums = tl.zeros([ROWS, TILE_OUT], tl.float32)
    for start in tl.range(0, IN, TILE_IN, num_stages=4):
        column = start + tl.arange(0, TILE_IN)[None, :]
        inside = column < IN
        at = weight_row[:, None] + column
        weights = tl.load(at, out_inside[:, None] & inside, other=0.0)
        values = tl.load(x_row[:, None] + column, row_inside[:, None] & inside, other=0.0)
        if UPCAST:
            weights, values = weights.to(tl.float32), values.to(tl.float32)
        sums = tl.dot(values, tl.trans(weights), sums)
    return sums


# How many rows there are must make no new variant, beside the ROWS that they are rounded up to.
@triton.jit(do_not_specialize=["num_rows"])
def small_linear_kernel(
    x, weight, bias, norm_weight, norm_bias, residual, y,  # `small_linear`'s, some of them None
    num_rows, stride_x, stride_weight, stride_residual,  # N, and elements from row to row
    EPS: tl.constexpr,  # 64 bits, where a number given at run time would have 32
    IN: tl.constexpr, OUT: tl.constexpr, GELU: tl.constexpr,
    DOT: tl.constexpr, UPCAST: tl.constexpr,  # which products, see above
    ROWS: tl.constexpr, TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr, TILE_ROW: tl.constexpr,
):  # fmt: skip
    """One program: TILE_OUT outputs of all rows."""
    row, out = tl.arange(0, ROWS), tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    row_inside, out_inside = row < num_rows, out < OUT
    x_row, weight_row = x + row * stride_x, weight + out * stride_weight
    if DOT:
        sums = dot_products(
            x_row, row_inside, weight_row, out_inside, IN, ROWS, TILE_OUT, TILE_IN, UPCAST
        )
    else:
        sums = multiply_and_sum(
            x_row, row_inside, weight_row, out_inside, norm_weight, norm_bias, EPS,
            IN, ROWS, TILE_OUT, TILE_IN, TILE_ROW,
        )  # fmt: skip
    # What follows works on sums of 32 or 64 bits: they are rounded once, when they are stored.
    sums += tl.load(bias + out, out_inside, other=0.0).to(sums.dtype)[None, :]
    if GELU:
        sums = gelu_tanh(sums)
    row, out = row[:, None], out[None, :]
    inside = row_inside[:, None] & out_inside[None, :]
    if residual is not None:
        at = residual + row * stride_residual + out
        sums += tl.load(at, inside, other=0.0).to(sums.dtype)
    tl.store(y + row * OUT + out, sums.to(y.dtype.element_ty), inside)


# ---- what is called ------------------------------------------------------------------------------
def linear_tiles(
    num_rows: int, in_features: int, out_features: int, dtype: torch.dtype
) -> dict[str, int]:
    """Outputs a program, inputs at a time, and by which of the two products.

    A GPU's 132 processors want at least one program each, and few outputs a program still
    read long stretches: 4 x 3,072 or 16 x 768 weights of 16 bits are 24 KB. They come in pieces of
    8 KB, three of which are on their way at a time.
    """
    ROWS, TILE_OUT = triton.next_power_of_2(num_rows), 16
    while TILE_OUT > 4 and triton.cdiv(out_features, TILE_OUT) < 128:
        TILE_OUT //= 2
    DOT = ROWS > 2 and dtype.itemsize == 2  # of 32-bit numbers a tensor core drops bits
    piece = 8192 // (TILE_OUT * dtype.itemsize)
    if DOT:
        at_most = 16384 // (ROWS * dtype.itemsize)  # of x no more than 16 KB a piece
    else:  # 32 KB of sums are 64 registers of each thread, of the 255 that it may have
        at_most = 32768 // (ROWS * TILE_OUT * max(4, dtype.itemsize))
    whole = triton.next_power_of_2(in_features)
    TILE_IN = max(16, min(piece, at_most, whole))
    tiles = {"ROWS": ROWS, "TILE_OUT": TILE_OUT, "TILE_IN": TILE_IN, "TILE_ROW": whole}
    return tiles | {"DOT": DOT, "num_warps": 4}


def check_sizes(
    x: Tensor, weight: Tensor, bias: Tensor, norm: Norm | None, residual: Tensor | None
) -> None:
    """Raise ValueError for sizes that do not belong together, or for more rows than are few."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        shapes = f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}: they must be (rows, in) and (out, in)")
    N, (OUT, IN) = len(x), weight.shape
    wanted = {"bias": (bias, (OUT,)), "residual": (residual, (N, OUT))}
    for i, name in enumerate(("norm weight", "norm bias")):
        wanted[name] = (norm[i] if norm else None, (IN,))
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}: it must be {shape}")
    most = MOST_NORM_ROWS if norm else MOST_ROWS
    if N > most:
        what = " with a norm in front" if norm else ""
        raise ValueError(f"x has {N} rows, at most {most} are few{what}: use F.linear")


def small_linear(
    # (N, in), rows may lie apart; (out, in) and (out,), as nn.Linear has them
    x: Tensor, weight: Tensor, bias: Tensor,
    # weight (in,), bias (in,) and eps; then (N, out)
    *, norm: Norm | None = None, gelu: bool = False, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual + gelu(linear(layer_norm(x))) (N, out) in one launch; all three around it optional.

    For up to 16 rows, with a norm up to 2. Products are summed in 32 bits (64 for 64-bit numbers)
    and the result is rounded once. Raises ValueError for more rows, and for sizes or types that do
    not belong together. Plain twin: `plain_small_linear`.
    """
    check_sizes(x, weight, bias, norm, residual)
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    optional = {"norm_weight": norm_weight, "norm_bias": norm_bias, "residual": residual}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    check_launch(x=x, weight=weight, bias=bias, **given)
    N, (OUT, IN) = len(x), weight.shape
    y = torch.empty(N, OUT, dtype=x.dtype, device=x.device)
    if N == 0:
        return y
    tiles = linear_tiles(N, IN, OUT, x.dtype)
    strides = (x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0))
    small_linear_kernel[(triton.cdiv(OUT, tiles["TILE_OUT"]),)](
        x, weight, bias, norm_weight, norm_bias, residual, y, N, *strides, EPS=eps, IN=IN, OUT=OUT,
        GELU=gelu, UPCAST=INTERPRETED and x.dtype == torch.bfloat16, **tiles,
    )  # fmt: skip
    return y


def plain_small_linear(
    x: Tensor, weight: Tensor, bias: Tensor,
    *, norm: Norm | None = None, gelu: bool = False, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same in PyTorch's operations: up to four launches, each of which rounds."""
    if norm is not None:
        norm_weight, norm_bias, eps = norm
        x = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    y = F.linear(x, weight, bias)
    y = F.gelu(y, approximate="tanh") if gelu else y
    return y if residual is None else residual + y


# --------------------------------------------------------------------------------------------------
def demo():
    """The four linear layers of GPT-2's shape: who reads which weights; then the same numbers."""
    if not can_launch():
        return
    C, dtype = 768, torch.bfloat16
    print(f"a layer of GPT-2, {C} wide, in 16 bits: what one launch reads\n")
    print("product           outputs  programs  outputs each  KB of weights each  inputs at a time")
    shapes = {"q, k, v": (C, 3 * C), "projection": (C, C), "MLP, up": (C, 4 * C)}
    shapes["MLP, down"] = (4 * C, C)
    for name, (IN, OUT) in shapes.items():
        tiles = linear_tiles(1, IN, OUT, dtype)
        TILE_OUT, kb = tiles["TILE_OUT"], tiles["TILE_OUT"] * IN * dtype.itemsize / 1024
        programs = triton.cdiv(OUT, TILE_OUT)
        print(f"{name:14}{OUT:11,}{programs:10}{TILE_OUT:14}{kb:20.0f}{tiles['TILE_IN']:18}")

    torch.manual_seed(0)
    with torch.device("cpu" if INTERPRETED else "cuda"):
        weight, bias, residual = torch.randn(72, 48) / 7, torch.randn(72), torch.randn(16, 72)
        norm = (torch.randn(48), torch.randn(48), 1e-5)
        x = torch.randn(16, 48)
    print(f"\n48 inputs, 72 outputs, {'interpreted' if INTERPRETED else 'compiled'}:")
    print("rows  options             distance from PyTorch's")
    worst = 0.0
    for rows, names in ((1, "norm"), (2, "norm gelu"), (2, "residual"), (5, "gelu"), (16, "")):
        given = {"norm": norm, "gelu": True, "residual": residual[:rows]}
        options = {name: given[name] for name in names.split()}
        got = small_linear(x[:rows], weight, bias, **options)
        error = (got - plain_small_linear(x[:rows], weight, bias, **options)).abs().max().item()
        print(f"{rows:4}  {names or '-':20}{error:.1e}")
        worst = max(worst, error)
    assert worst < 1e-5
    print("ok: one launch, whatever stands before and behind the product")


if __name__ == "__main__":
    demo()
