"""Weights in eight bits: a quarter of the memory, and a decode step reads a quarter of the bytes.

A decode step of one sequence reads every weight once and multiplies it once, so it takes as long as
reading 497 MB of GPT-2's weights in float32. Eight bits hold the integers from -127 to 127. A
weight becomes such an integer times a scale that it shares with others:

    weights of one output     0.30  -0.12   0.05   -0.60      largest 0.60: scale 0.60 / 127
    their integers              64    -25     11    -127      0.30 / scale = 63.5 -> 64

One scale for a whole matrix would be too coarse: an output whose weights are all small would keep
two or three different integers. So each output has a scale of its own. Its sum is multiplied by the
scale once, after all inputs have been added.

The inputs become integers too, because one instruction multiplies four times as many integers of
eight bits as numbers of float32. Their scale must be known before the product, so it comes from the
largest of the numbers that are being multiplied: of one row of x. With one scale for all rows a
sequence's text would depend on which others run beside it, and a token with a large number (GPT-2
has some that are 100 times the others) would make all of them coarse. Sums of integers are exact,
so a row has the same bits in every batch. An output is

    sum of (integer of x) * (integer of w)  *  (scale of the row * scale of the output)  +  bias

What it costs: each number is rounded by up to half a scale, 0.4% of the largest beside it. The
shipped model's loss on tales that it has not seen rises by 0.0002 nats a character
(docs/results.md). The head is in eight bits too, but the embedding is not: a lookup reads only a
few rows of it, and they stay exact. LayerNorms, attention and the pool compute in the model's own
dtype.

On a processor with VNNI `kernels/int8_linear_cpu.py` makes the products. Elsewhere the plain layer
below does, more slowly, with PyTorch's product of integers. Both give the same bits. Only GPT-2's
activation, which the kernel computes itself, differs in the last ones. On a GPU only the weights
are in eight bits: each layer turns them back into numbers before its product. That saves memory for
the pool and costs time.

Checked by tests/speedups/test_quantized_weights.py.
Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", NeurIPS,
arXiv:2208.07339, section 2 (scales of rows and outputs, and the large numbers).
Run: python -m speedups.quantized_weights
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import ACTIVATIONS, GPT

LARGEST = 127  # -128 is not used: with it the integers would not be symmetric
OUTPUTS_AT_ONCE = 4096  # of a layer's weights: each piece needs copies in float32
SMALLEST = 1e-30  # a row with no larger number counts as zeros: 127 / x is finite


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x (N, C) as integers (N, C) int8 and a scale (N,) float32.

    A number is about its integer times the scale of its row. A row with NaN or infinity gets the
    scale NaN, so that all its results are NaN.
    """
    x = x.float()
    largest = x.abs().amax(1) if x.numel() else x.new_zeros(len(x))
    is_finite = largest.isfinite()
    # Divided once: for `LARGEST / largest` PyTorch multiplies by a rounded reciprocal.
    factor = torch.full_like(largest, LARGEST) / largest
    factor = torch.where(is_finite & (largest > SMALLEST), factor, 0)
    x = torch.where(is_finite[:, None], x, 0)
    scales = torch.where(is_finite, largest / LARGEST, torch.nan)
    return (x * factor[:, None]).round().to(torch.int8), scales


class Int8Linear(nn.Module):
    """A linear layer whose weights are integers (out, in) int8, with one scale an output (out,).

    (N, in) -> (N, out), in x's dtype. This is the plain form. Others for a CPU must give its bits,
    except in the last places of an activation. (PyTorch's GELU itself rounds a number differently
    where it is among the last few of a tensor.)
    """

    def __init__(
        self, integers: Tensor, scales: Tensor, bias: Tensor | None, activation: str | None = None
    ):
        super().__init__()
        self.out_features, self.in_features = integers.shape
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.register_buffer("scales", scales)
        self.bias = bias
        self.activation = ACTIVATIONS[activation] if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out), in x's dtype."""
        integers, row_scales = quantize_rows(x)
        out = self.sums(integers).float() * (row_scales[:, None] * self.scales)
        if self.bias is not None:
            out = out + self.bias.float()
        return self.activation(out).to(x.dtype)

    def sums(self, integers: Tensor) -> Tensor:
        """The sums of products of integers, (N, in) int8 -> (N, out), exact."""
        # With one input `_int_mm` of PyTorch 2.13 reads a wrong memory layout.
        if integers.shape[0] and self.in_features > 1 and multiplies_integers_exactly():
            return torch._int_mm(integers, self.weight.t())
        return F.linear(integers.double(), self.weight.double())


class WeightOnlyLinear(Int8Linear):
    """The layer for a GPU: x keeps its dtype, and the weights are made from their integers."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out), in x's dtype."""
        weight = self.weight.to(x.dtype) * self.scales[:, None].to(x.dtype)
        return self.activation(F.linear(x, weight, self.bias))


@functools.cache
def multiplies_integers_exactly() -> bool:
    """Whether PyTorch's product of integers is exact here: tried once, with the largest ones.

    On an x86 processor without VNNI two products are added in 16 bits first, and cut off at 32,767.
    """
    largest = torch.full((20, 64), LARGEST, dtype=torch.int8)
    try:
        return bool((torch._int_mm(largest, largest.t()) == 64 * LARGEST**2).all())
    except (AttributeError, RuntimeError):  # this PyTorch has no such operator
        return False


def choose_layer(device: torch.device) -> type[nn.Module]:
    """The layer class that is fastest on a device, with a warning where that is not fast."""
    if device.type != "cpu":
        return WeightOnlyLinear
    from kernels.int8_linear_cpu import Int8PanelLinear, can_multiply_bytes

    if can_multiply_bytes():
        return Int8PanelLinear
    warn_of_slow_products()
    return Int8Linear


@functools.cache  # said once
def warn_of_slow_products() -> None:
    """Say that this processor gains memory and no time."""
    needs = "fast products of eight bits need a processor with VNNI, Numba and OpenMP"
    warnings.warn(f"{needs}: weights='int8' saves memory here, and little or no time", stacklevel=4)


def quantize(model: GPT) -> GPT:
    """Replace the linear layers of a GPT by layers in eight bits, in place.

    Returns the same model. A layer's plain weights are freed when its integers exist. A head that
    shares the embedding's weights gets integers of its own, and the embedding stays as it is.
    Raises ValueError for a model whose layers have been replaced already.
    """
    if not isinstance(model.h[0].attn.c_attn, nn.Linear):
        raise ValueError("the model's linear layers have been replaced already: load it again")
    layer_class = choose_layer(model.wte.weight.device)
    activation = model.config.activation_function

    def in_eight_bits(linear: nn.Linear, activation: str | None = None) -> nn.Module:
        pieces = [quantize_rows(rows) for rows in linear.weight.detach().split(OUTPUTS_AT_ONCE)]
        integers, scales = map(torch.cat, zip(*pieces, strict=True))
        return layer_class(integers, scales, linear.bias, activation)

    # GPT-2's activation is computed with the product.
    fused = activation if activation == "gelu_new" else None
    for layer in model.h:
        layer.attn.c_attn = in_eight_bits(layer.attn.c_attn)
        layer.attn.c_proj = in_eight_bits(layer.attn.c_proj)
        layer.mlp.c_fc = in_eight_bits(layer.mlp.c_fc, fused)
        if fused:
            layer.mlp.activation = nn.Identity()
        layer.mlp.c_proj = in_eight_bits(layer.mlp.c_proj)
    model.lm_head = in_eight_bits(model.lm_head)
    return model.requires_grad_(False)


# --------------------------------------------------------------------------------------------------
def demo():
    """One output's weights as integers; the error of one scale an output and of one for all."""
    torch.manual_seed(0)
    integers, scales = quantize_rows(torch.tensor([[0.30, -0.12, 0.05, -0.60]]))
    print("weights   0.30  -0.12   0.05  -0.60")
    print("integers " + "".join(f"{i:5}  " for i in integers[0].tolist()), f"scale {scales[0]:.6f}")

    linear = nn.Linear(768, 768)
    linear.weight.data *= torch.logspace(-2, 0, 768)[:, None]  # outputs of different sizes
    x = torch.randn(64, 768)
    x[7, 100] = 100.0  # one row with one large number
    exact = F.linear(x, linear.weight)
    step = linear.weight.abs().max() / LARGEST
    one_scale = F.linear(x, (linear.weight / step).round() * step)
    each_output = Int8Linear(*quantize_rows(linear.weight), None)(x)

    def error(got: Tensor) -> Tensor:
        """The largest error of each row, as a part of the largest result of the same output."""
        return ((got - exact).abs() / exact.abs().amax(0)).amax(1)

    others = [i for i in range(64) if i != 7]
    print(f"one scale for all weights   error {error(one_scale)[others].max():7.1%}")
    print(f"one for each output and row error {error(each_output)[others].max():7.1%}")
    print(f"  the row with a large number    {error(each_output)[7]:7.1%}")
    alone = Int8Linear(*quantize_rows(linear.weight), None)(x[8:9])
    assert torch.equal(alone[0], each_output[8])
    assert error(each_output)[others].max() < error(one_scale)[others].max() / 3
    print("ok: a row has the same bits alone and beside a row with a large number")


if __name__ == "__main__":
    with torch.inference_mode():
        demo()
