"""A transformer layer on a CPU in two compiled calls, one before its attention and one after it.

A decode step of one GPT-2 sequence in bfloat16 reads 250 MB of weights in 4 to 5 ms. Between the
products Python runs: 150 calls of modules, small operators, tensors that become arrays. With its
code in the caches that takes 1.4 ms, and it takes longer after each product, whose weights have
just replaced that code. So what lies between two products is compiled together with them:

    x ─> ln_1 ─> c_attn ─┐                                             one call
                         └─> attend(layer, q, k, v) ─┐                 the socket
    ┌────────────────────────────────────────────────┘
    └─> c_proj ─> + x ─> ln_2 ─> c_fc ─> gelu ─> c_proj ─> + y         one call; y = c_proj + x

One sequence then takes 6.8 in place of 8.0 ms a step (AMD EPYC, two threads that share a path to
memory). The socket stays: a layer knows neither the pool nor the batch. The engine compiles its own
steps as a whole, from the same functions (`step_cpu.py`). Sums are float32. A row's LayerNorm adds
its numbers in one order, so the row has the same bits alone and in any batch. In bfloat16 the
inputs of each product are rounded, and so is each sum with the residual stream.

Checked by tests/kernels/test_layer_cpu.py, against the layer's own modules in float64.
Ba et al. 2016, "Layer Normalization", arXiv:1607.06450.
"""

import threading

import numpy as np
import torch
from torch import Tensor, nn

from kernels.int8_linear_cpu import Int8PanelLinear
from kernels.int8_linear_cpu import multiply as int8_multiply
from kernels.linear_cpu import PanelLinear, multiply
from kernels.numba_tools import (
    HAS_NUMBA,
    as_numpy,
    compiled,
    compiled_parallel,
    narrow,
    prange,
    use_openmp_threads,
    widen,
)
from model import ALL_ROWS, Attend, Layer

if HAS_NUMBA:
    from numba.extending import overload

Arrays = tuple[np.ndarray, ...]


def product(x, weights, must_activate, out):
    """out = x w + bias: `multiply` of linear_cpu.py, or of int8_linear_cpu.py.

    x (N, inputs) is float32, or uint16 for bfloat16; weights are the `arrays` of a `PanelLinear` or
    an `Int8PanelLinear`. out may have more than N rows.
    """


if HAS_NUMBA:

    @overload(product)
    def _product(x, weights, must_activate, out):
        def multiply_panels(x, weights, must_activate, out):
            w, bias = weights
            multiply(x.view(w.dtype), w, bias, must_activate, out)

        def multiply_integers(x, weights, must_activate, out):
            w, starts, scales, bias = weights
            int8_multiply(x, w, starts, scales, bias, must_activate, out)

        return multiply_panels if len(weights) == 2 else multiply_integers


@compiled
def normalize_row(x, gain, shift, eps, out):
    """out = LayerNorm(x) for one row (C,). gain and shift are (C,) float32."""
    count = np.float32(len(x))
    total = np.float32(0)
    for j in range(len(x)):
        total += widen(x[j])
    mean = total / count
    squares = np.float32(0)
    for j in range(len(x)):
        distance = widen(x[j]) - mean
        squares += distance * distance
    factor = np.float32(1) / np.sqrt(squares / count + eps)
    for j in range(len(x)):
        out[j] = narrow((widen(x[j]) - mean) * factor * gain[j] + shift[j], out)


@compiled_parallel
def normalize_and_multiply(x, before, scratch, out):
    """out = LayerNorm(x) w + bias. x (N, C) is float32, or uint16 for bfloat16.

    `before` holds a LayerNorm's `numbers_of` and a product's `arrays`; scratch is `Scratch.rows`.
    """
    (gain, shift, eps), weights = before
    normal = scratch[1][: len(x)]
    for row in prange(len(x)):
        normalize_row(x[row], gain, shift, eps, normal[row])
    product(normal, weights, False, out)


@compiled_parallel
def finish_layer(attended, x, after, scratch, out):
    """out (M, C) = y + MLP(LayerNorm(y)), where y = x + c_proj(attended).

    attended, x and out are (M, C) float32, or uint16 for bfloat16. `after` holds the `arrays` of
    attention's c_proj, the numbers of ln_2, and the arrays of the MLP's c_fc and c_proj. The
    activation is GPT-2's.
    """
    c_proj, (gain, shift, eps), c_fc, mlp_proj = after
    sums, normal, wide = scratch
    normal, wide = normal[: len(x)], wide[: len(x)]
    product(attended, c_proj, False, sums)
    for row in prange(len(x)):
        add_row(x[row], sums[row], out[row])  # out holds y until the last line
        normalize_row(out[row], gain, shift, eps, normal[row])
    product(normal, c_fc, True, wide)
    product(wide, mlp_proj, False, sums)
    for row in prange(len(x)):
        add_row(out[row], sums[row], out[row])


@compiled
def add_row(x, added, out):
    """out = x + added for one row; x and out (C,), `added` is float32 and may be longer."""
    for j in range(len(x)):
        out[j] = narrow(widen(x[j]) + added[j], out)


# ---- the layer -----------------------------------------------------------------------------------
class Scratch(threading.local):
    """Arrays for results that no other call reads; each thread of Python has its own.

    They are kept. Otherwise the system takes back and clears their 22 MB (2,048 rows of GPT-2 in
    bfloat16) at every layer: a prompt step of 8 x 256 tokens took 0.62 in place of 0.54 s.
    """

    def __init__(self):
        self.arrays = {}

    def rows(self, num_rows: int, widths: tuple[int, int, int], dtype: np.dtype) -> Arrays:
        """Sums (rows, widths[0]) in float32, and two arrays of the other widths and the dtype.

        They have `num_rows` rows or more.
        """
        kept = self.arrays.get((widths, dtype))
        if kept is None or len(kept[0]) < num_rows:
            kinds = np.float32, dtype, dtype
            kept = tuple(np.empty((num_rows, w), kind) for w, kind in zip(widths, kinds))
            self.arrays[widths, dtype] = kept
        return kept


scratch = Scratch()


class PanelLayer(Layer):
    """A layer with the modules and weights of another one, whose products are `PanelLinear`."""

    def __init__(self, layer: Layer):
        nn.Module.__init__(self)
        self.training = layer.training
        for name, module in layer.named_children():
            self.add_module(name, module)
        self.before, self.after = arrays_of(layer)
        self.widths = scratch_widths(layer)

    def forward(self, x: Tensor, attend: Attend, rows: Tensor | slice) -> Tensor:
        """(N, C) -> (M, C): the hidden states of `rows` after this layer."""
        attn = self.attn
        # With tensor parallelism each c_proj is followed by a sum over the processes.
        if type(attn.c_proj) is not PanelLinear or self.training:
            return super().forward(x, attend, rows)
        use_openmp_threads(torch.get_num_threads())
        qkv = torch.empty(len(x), len(attn.c_attn.padded_bias), dtype=x.dtype)
        numbers = as_numpy(x)
        own = scratch.rows(len(x), self.widths, numbers.dtype)
        normalize_and_multiply(numbers, self.before, own, as_numpy(qkv))
        qkv = qkv[:, : attn.c_attn.out_features].view(len(x), 3, attn.n_head, -1)
        q, k, v = qkv.unbind(1)  # (N, H, D) each
        if attn.q_scale != 1.0:
            q = q * attn.q_scale
        attended = attend(attn.layer, q, k, v).flatten(1).contiguous()
        if rows is not ALL_ROWS:
            attended, x = attended[rows], x[rows]
            numbers = as_numpy(x)
        out = torch.empty_like(x)
        use_openmp_threads(torch.get_num_threads())  # attention may have used fewer
        finish_layer(as_numpy(attended), numbers, self.after, own, as_numpy(out))
        return out


def numbers_of(norm: nn.LayerNorm) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """The gain and the shift of a LayerNorm, (C,) float32 each, and its epsilon."""
    return (
        norm.weight.detach().float().numpy(),
        norm.bias.detach().float().numpy(),
        np.float32(norm.eps),
    )


def arrays_of(layer: Layer) -> tuple[tuple, tuple]:
    """What the compiled functions read of a layer, before its attention and after it."""
    attn, mlp = layer.attn, layer.mlp
    before = numbers_of(layer.ln_1), attn.c_attn.arrays
    return before, (attn.c_proj.arrays, numbers_of(layer.ln_2), mlp.c_fc.arrays, mlp.c_proj.arrays)


def scratch_widths(layer: Layer) -> tuple[int, int, int]:
    """The widths that `Scratch.rows` takes for a layer."""
    attn, mlp = layer.attn, layer.mlp
    return len(attn.c_proj.padded_bias), attn.c_proj.out_features, len(mlp.c_fc.padded_bias)


def can_compile_layer(layer: Layer) -> bool:
    """Whether all products of a layer are panels of one kind, whose inputs need no padding.

    Its activation must be GPT-2's. In bfloat16 the processor must multiply pairs: otherwise a
    product takes its inputs in float32. (Panels of integers round any input, and pad it.)
    """
    products = layer.attn.c_attn, layer.attn.c_proj, layer.mlp.c_fc, layer.mlp.c_proj
    kinds = {type(one) for one in products}
    if kinds == {PanelLinear}:
        takes_its_dtype = products[0].dtype == torch.float32 or products[0].has_pairs
        if any(one.padding_in for one in products) or not takes_its_dtype:
            return False
    return kinds <= {PanelLinear, Int8PanelLinear} and layer.mlp.c_fc.activation == "gelu_new"
