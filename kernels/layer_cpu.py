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
memory). The socket stays: a layer knows neither the pool nor the batch. Sums are float32. A row's
LayerNorm adds its numbers in one order, so the row has the same bits alone and in any batch. In
bfloat16 the inputs of each product are rounded, and so is each sum with the residual stream.

Checked by tests/kernels/test_layer_cpu.py, against the layer's own modules in float64.
Ba et al. 2016, "Layer Normalization", arXiv:1607.06450.
"""

import numpy as np
import torch
from torch import Tensor, nn

from kernels.linear_cpu import PanelLinear, multiply
from kernels.numba_tools import (
    as_numpy,
    compiled,
    compiled_parallel,
    prange,
    store_row,
    use_openmp_threads,
    widen,
)
from model import ALL_ROWS, Attend, Layer


@compiled
def normalize_row(x, gain, shift, eps, scratch, out):
    """out = LayerNorm(x) for one row (C,); gain, shift and scratch (C,) are float32."""
    count = np.float32(len(scratch))
    total = np.float32(0)
    for j in range(len(scratch)):
        total += widen(x[j])
    mean = total / count
    squares = np.float32(0)
    for j in range(len(scratch)):
        distance = widen(x[j]) - mean
        squares += distance * distance
    factor = np.float32(1) / np.sqrt(squares / count + eps)
    for j in range(len(scratch)):
        scratch[j] = (widen(x[j]) - mean) * factor * gain[j] + shift[j]
    store_row(scratch, out)


@compiled_parallel
def normalize_and_multiply(x, gain, shift, eps, w, bias, out):
    """out = LayerNorm(x) w + bias. x (N, C) is float32, or uint16 for bfloat16; as `multiply`."""
    N, C = x.shape
    normal = np.empty((N, C), x.dtype)
    for row in prange(N):
        normalize_row(x[row], gain, shift, eps, np.empty(C, np.float32), normal[row])
    multiply(normal.view(w.dtype), w, bias, False, out)


@compiled_parallel
def finish_layer(attended, x, w_o, bias_o, gain, shift, eps, w_fc, bias_fc, w_p, bias_p, out):
    """out (M, C) = y + MLP(LayerNorm(y)), where y = x + c_proj(attended).

    attended, x and out are (M, C) float32, or uint16 for bfloat16. `*_o` belong to attention's
    c_proj, `*_fc` and `*_p` to the MLP's c_fc and c_proj. Its activation is GPT-2's.
    """
    M, C = x.shape
    added = np.empty((M, len(bias_o)), np.float32)
    normal = np.empty((M, C), x.dtype)
    wide = np.empty((M, len(bias_fc)), x.dtype)
    multiply(attended.view(w_o.dtype), w_o, bias_o, False, added)
    for row in prange(M):
        add_row(x[row], added[row], out[row])  # out holds y until the last line
        normalize_row(out[row], gain, shift, eps, added[row, :C], normal[row])
    multiply(normal.view(w_fc.dtype), w_fc, bias_fc, True, wide)
    multiply(wide.view(w_p.dtype), w_p, bias_p, False, added)
    for row in prange(M):
        add_row(out[row], added[row], out[row])


@compiled
def add_row(x, added, out):
    """out = x + added for one row; x and out (C,), `added` is float32 and may be longer."""
    for j in range(len(x)):
        added[j] += widen(x[j])
    store_row(added[: len(x)], out)


class PanelLayer(Layer):
    """A layer with the modules and weights of another one, whose products are `PanelLinear`."""

    def __init__(self, layer: Layer):
        nn.Module.__init__(self)
        self.training = layer.training
        for name, module in layer.named_children():
            self.add_module(name, module)
        attn, mlp = layer.attn, layer.mlp
        self.before = (*numbers_of(layer.ln_1), attn.c_attn.words, attn.c_attn.padded_bias)
        self.after = (
            attn.c_proj.words,
            attn.c_proj.padded_bias,
            *numbers_of(layer.ln_2),
            mlp.c_fc.words,
            mlp.c_fc.padded_bias,
            mlp.c_proj.words,
            mlp.c_proj.padded_bias,
        )

    def forward(self, x: Tensor, attend: Attend, rows: Tensor | slice) -> Tensor:
        """(N, C) -> (M, C): the hidden states of `rows` after this layer."""
        attn = self.attn
        # With tensor parallelism each c_proj is followed by a sum over the processes.
        if type(attn.c_proj) is not PanelLinear or self.training:
            return super().forward(x, attend, rows)
        use_openmp_threads(torch.get_num_threads())
        qkv = torch.empty(len(x), len(attn.c_attn.padded_bias), dtype=x.dtype)
        normalize_and_multiply(as_numpy(x), *self.before, as_numpy(qkv))
        qkv = qkv[:, : attn.c_attn.out_features].view(len(x), 3, attn.n_head, -1)
        q, k, v = qkv.unbind(1)  # (N, H, D) each
        if attn.q_scale != 1.0:
            q = q * attn.q_scale
        attended = attend(attn.layer, q, k, v).flatten(1).contiguous()
        if rows is not ALL_ROWS:
            attended, x = attended[rows], x[rows]
        out = torch.empty_like(x)
        finish_layer(as_numpy(attended), as_numpy(x), *self.after, as_numpy(out))
        return out


def numbers_of(norm: nn.LayerNorm) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """The gain and the shift of a LayerNorm, (C,) float32 each, and its epsilon."""
    return (
        norm.weight.detach().float().numpy(),
        norm.bias.detach().float().numpy(),
        np.float32(norm.eps),
    )


def can_compile_layer(layer: Layer) -> bool:
    """Whether all products of a layer are panels, which need no padding of their inputs.

    Its activation must be GPT-2's. In bfloat16 the processor must multiply pairs: otherwise a
    product takes its inputs in float32.
    """
    products = layer.attn.c_attn, layer.attn.c_proj, layer.mlp.c_fc, layer.mlp.c_proj
    if not all(isinstance(one, PanelLinear) and not one.padding_in for one in products):
        return False
    takes_its_dtype = products[0].dtype == torch.float32 or products[0].has_pairs
    return takes_its_dtype and layer.mlp.c_fc.activation == "gelu_new"
