"""A linear layer for up to 16 rows: one launch reads each weight once and does the work around it.

A product of one row takes as long as reading its weights. A library's kernel is made for many rows
and computes 64 outputs or more in a program. The 768 outputs of a projection are then 12 programs,
on a chip with 132 processors. (A library may split the sums over more programs instead, but then a
second launch adds them up.) Here a program owns 4 to 16 outputs and computes their whole sums:

    x (N, in) ──┬─> program 0     outputs [0, 4)       reads weights (4, in), contiguous rows
       ^        ├─> program 1     outputs [4, 8)       sums, + bias, GELU, + residual in
    LayerNorm   │      ..                              registers, then one store
                └─> program 191   outputs [764, 768)

No sums are left to add up, and the operations before and after the product need no launch of their
own. After it come the bias and the GELU or the residual. Before it comes the LayerNorm, which every
program computes again for itself. That is little work for one or two rows, and too much for 16.

How it is checked: against the same sums in float64, with an error bound for each type
(tests/kernels/test_triton_small_linear.py). A production engine also loads the first weights of a
launch while the launch before it still runs, and keeps weights in 8 or 4 bits.

Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", arXiv:1606.08415, section 2 (the tanh
form); Ba et al. 2016, "Layer Normalization", arXiv:1607.06450, equation 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.triton_prefill import INTERPRETED, check_launch, tl, triton

# A tensor core multiplies 16 rows at a time. For more rows a library is faster: its programs read
# each row of x for 64 outputs, these programs for 4.
MOST_ROWS = 16
# Each program normalises all rows. With 16 rows that would be more arithmetic than the product, and
# the numbers would not fit into a thread's registers.
MOST_NORM_ROWS = 2

Norm = tuple[Tensor, Tensor, float]  # a LayerNorm: weight (C,), bias (C,) and eps


# ---- parts of a kernel ---------------------------------------------------------------------------
@triton.jit
def row_statistics(
    values,  # (R, TILE) rows of LENGTH numbers, zero where not `inside`
    inside,  # (R, TILE) bool
    LENGTH: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of each row: two of (R,).

    The variance is the mean of (x - mean)^2, in a second pass over registers. Mean of x^2 minus
    mean^2 needs one pass, but where the mean is large it subtracts two nearly equal numbers.
    """
    mean = tl.sum(values, 1) / LENGTH
    centered = tl.where(inside, values - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centered * centered, 1) / LENGTH + EPS)


@triton.jit
def gelu_tanh(z):
    """`gelu_new` of model.py: z (1 + tanh u) / 2, which equals z / (1 + e^(-2u))."""
    u = 0.7978845608028654 * (z + 0.044715 * z * z * z)  # sqrt(2 / pi)
    return z / (1.0 + tl.exp(-2.0 * u))


@triton.jit
def multiply_and_sum(
    x_row, row_inside,  # (ROWS,) pointers to the rows of x, and whether each row exists
    weight_row, out_inside,  # (TILE_OUT,) pointers to rows of the weights, and whether each exists
    norm_weight, norm_bias, EPS: tl.constexpr,  # a LayerNorm before the product, or None
    IN: tl.constexpr, ROWS: tl.constexpr, TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr,
    TILE_ROW: tl.constexpr,  # IN rounded up to a power of two
):  # fmt: skip
    """x W^T (ROWS, TILE_OUT) without tensor cores: for one or two rows, and for wide types.

    For one row a tensor core would multiply 15 rows of zeros, and the normalised numbers would have
    to be rounded to 16 bits for it.
    """
    wide = tl.float64 if x_row.dtype.element_ty == tl.float64 else tl.float32
    if norm_weight is not None:
        whole = tl.arange(0, TILE_ROW)[None, :]
        exists = row_inside[:, None] & (whole < IN)  # (ROWS, TILE_ROW)
        numbers = tl.load(x_row[:, None] + whole, exists, other=0.0).to(wide)
        mean, rstd = row_statistics(numbers, exists, IN, EPS)
    # Each thread sums its own inputs; the sums of all threads are added once, after the loop.
    sums = tl.zeros([ROWS, TILE_OUT, TILE_IN], wide)
    # Triton prefetches in a loop without tl.dot only where tl.range names the number of stages.
    for start in tl.range(0, IN, TILE_IN, num_stages=4):
        column = start + tl.arange(0, TILE_IN)[None, None, :]
        inside = column < IN
        at = weight_row[None, :, None] + column  # (1, TILE_OUT, TILE_IN)
        weights = tl.load(at, out_inside[None, :, None] & inside, other=0.0).to(wide)
        at = x_row[:, None, None] + column  # (ROWS, 1, TILE_IN)
        values = tl.load(at, row_inside[:, None, None] & inside, other=0.0).to(wide)
        if norm_weight is not None:
            gain = tl.load(norm_weight + column, inside, other=0.0).to(wide)
            shift = tl.load(norm_bias + column, inside, other=0.0).to(wide)
            values = (values - mean[:, None, None]) * rstd[:, None, None] * gain + shift
        sums += values * weights
    return tl.sum(sums, 2)


@triton.jit
def dot_products(
    x_row, row_inside, weight_row, out_inside,  # as in `multiply_and_sum`
    IN: tl.constexpr, ROWS: tl.constexpr, TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr,
    UPCAST: tl.constexpr,  # True: the interpreter can't multiply bfloat16, so compute in 32 bits
):  # fmt: skip
    """x W^T (ROWS, TILE_OUT) on tensor cores: for 3 to 16 rows of 16-bit numbers.

    With so many rows, multiplying without tensor cores takes longer than reading the weights.
    """
    sums = tl.zeros([ROWS, TILE_OUT], tl.float32)
    for start in tl.range(0, IN, TILE_IN, num_stages=4):
        column = start + tl.arange(0, TILE_IN)[None, :]
        inside = column < IN
        at = weight_row[:, None] + column
        weights = tl.load(at, out_inside[:, None] & inside, other=0.0)  # (TILE_OUT, TILE_IN)
        values = tl.load(x_row[:, None] + column, row_inside[:, None] & inside, other=0.0)
        if UPCAST:
            weights, values = weights.to(tl.float32), values.to(tl.float32)
        sums = tl.dot(values, tl.trans(weights), sums)
    return sums


# Triton compiles a kernel again for an integer argument that is 1 or divisible by 16. The number of
# rows changes from step to step, so it is excluded: only ROWS, a power of two, makes variants.
@triton.jit(do_not_specialize=["num_rows"])
def small_linear_kernel(
    x, weight, bias, norm_weight, norm_bias, residual, y,  # those of `small_linear`; some are None
    num_rows, stride_x, stride_weight, stride_residual,  # N, and elements from row to row
    EPS: tl.constexpr,  # a constant has 64 bits; an argument at run time would have 32
    IN: tl.constexpr, OUT: tl.constexpr, GELU: tl.constexpr,
    DOT: tl.constexpr, UPCAST: tl.constexpr,  # True: `dot_products`, False: `multiply_and_sum`
    ROWS: tl.constexpr, TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr, TILE_ROW: tl.constexpr,
):  # fmt: skip
    """One program: TILE_OUT outputs of all rows."""
    row = tl.arange(0, ROWS)
    out = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    row_inside = row < num_rows
    out_inside = out < OUT
    x_row = x + row * stride_x
    weight_row = weight + out * stride_weight
    if DOT:
        sums = dot_products(
            x_row, row_inside, weight_row, out_inside, IN, ROWS, TILE_OUT, TILE_IN, UPCAST
        )
    else:
        sums = multiply_and_sum(
            x_row, row_inside, weight_row, out_inside, norm_weight, norm_bias, EPS,
            IN, ROWS, TILE_OUT, TILE_IN, TILE_ROW,
        )  # fmt: skip
    # From here on all is in 32 bits, or in 64. The result is rounded once, by the store.
    sums += tl.load(bias + out, out_inside, other=0.0).to(sums.dtype)[None, :]
    if GELU:
        sums = gelu_tanh(sums)
    row, out = row[:, None], out[None, :]
    inside = row_inside[:, None] & out_inside[None, :]  # (ROWS, TILE_OUT)
    if residual is not None:
        at = residual + row * stride_residual + out
        sums += tl.load(at, inside, other=0.0).to(sums.dtype)
    tl.store(y + row * OUT + out, sums.to(y.dtype.element_ty), inside)


# ---- what is called ------------------------------------------------------------------------------
def linear_tiles(
    num_rows: int, in_features: int, out_features: int, dtype: torch.dtype
) -> dict[str, int]:
    """The tile sizes for a product: outputs a program, inputs at a time, and whether by tl.dot.

    A GPU's 132 processors need at least one program each. Few outputs a program still mean long
    contiguous reads: 4 x 3,072 or 16 x 768 weights of 16 bits are 24 KB. They are read in pieces of
    up to 8 KB, three of them in progress at a time. 768 inputs are three pieces at least: of one
    piece nothing could be fetched ahead.
    Example: 768 inputs, 2,304 outputs, 16 bits -> 16 outputs a program (144 programs), 256 inputs.
    """
    ROWS = triton.next_power_of_2(num_rows)
    TILE_OUT = 16
    while TILE_OUT > 4 and triton.cdiv(out_features, TILE_OUT) < 128:
        TILE_OUT //= 2
    DOT = ROWS > 2 and dtype.itemsize == 2  # a tensor core would round 32-bit numbers to fewer bits
    piece = 8192 // (TILE_OUT * dtype.itemsize)
    if DOT:
        at_most = 16384 // (ROWS * dtype.itemsize)  # at most 16 KB of x in a piece
    else:  # at most 32 KB of sums: 64 registers of each thread, of the 255 that it may have
        at_most = 32768 // (ROWS * TILE_OUT * max(4, dtype.itemsize))
    TILE_ROW = triton.next_power_of_2(in_features)
    at_most = min(at_most, TILE_ROW // 4)  # 768 inputs: 256; 3,072 inputs: 1,024
    return {
        "ROWS": ROWS,
        "TILE_OUT": TILE_OUT,
        "TILE_IN": max(16, min(piece, at_most)),
        "TILE_ROW": TILE_ROW,
        "DOT": DOT,
        "num_warps": 4,
    }


def check_sizes(
    x: Tensor, weight: Tensor, bias: Tensor, norm: Norm | None, residual: Tensor | None
) -> None:
    """Raise ValueError for sizes that contradict each other, and for too many rows."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        shapes = f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}: they must be (rows, in) and (out, in)")
    N = len(x)
    OUT, IN = weight.shape
    expected = {
        "bias": (bias, (OUT,)),
        "residual": (residual, (N, OUT)),
        "norm weight": (norm[0] if norm else None, (IN,)),
        "norm bias": (norm[1] if norm else None, (IN,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}: it must be {shape}")
    most = MOST_NORM_ROWS if norm else MOST_ROWS
    if N > most:
        condition = " with a norm in front" if norm else ""
        raise ValueError(f"x has {N} rows, at most {most} are few{condition}: use F.linear")


def small_linear(
    x: Tensor,  # (N, in); its rows need not be adjacent
    weight: Tensor,  # (out, in), as in nn.Linear
    bias: Tensor,  # (out,)
    *,
    norm: Norm | None = None,  # a LayerNorm of x: weight (in,), bias (in,) and eps
    gelu: bool = False,  # the tanh GELU after the product
    residual: Tensor | None = None,  # (N, out), added last
) -> Tensor:
    """residual + gelu(linear(layer_norm(x))) (N, out) in one launch; norm, gelu, residual optional.

    For up to 16 rows, or 2 with a norm. Products are summed in 32 bits (64-bit numbers in 64) and
    the result is rounded once. The same in PyTorch is `plain_small_linear`. Raises ValueError for
    more rows, and for sizes or types that contradict each other; RuntimeError as `check_launch`.
    """
    check_sizes(x, weight, bias, norm, residual)
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    optional = {"norm_weight": norm_weight, "norm_bias": norm_bias, "residual": residual}
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    check_launch(x=x, weight=weight, bias=bias, **given)
    N = len(x)
    OUT, IN = weight.shape
    y = torch.empty(N, OUT, dtype=x.dtype, device=x.device)
    if N == 0:
        return y
    tiles = linear_tiles(N, IN, OUT, x.dtype)
    small_linear_kernel[(triton.cdiv(OUT, tiles["TILE_OUT"]),)](
        x,
        weight,
        bias,
        norm_weight,
        norm_bias,
        residual,
        y,
        N,
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        EPS=eps,
        IN=IN,
        OUT=OUT,
        GELU=gelu,
        UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
        **tiles,
    )
    return y


def plain_small_linear(
    x: Tensor,  # (N, in)
    weight: Tensor,  # (out, in)
    bias: Tensor,  # (out,)
    *,
    norm: Norm | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,  # (N, out)
) -> Tensor:
    """`small_linear` in PyTorch, for the tests: up to four launches, each of which rounds."""
    if norm is not None:
        norm_weight, norm_bias, eps = norm
        x = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    y = F.linear(x, weight, bias)
    y = F.gelu(y, approximate="tanh") if gelu else y
    return y if residual is None else residual + y
