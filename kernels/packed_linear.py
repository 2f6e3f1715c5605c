"""Weights laid out once in the order in which the processor multiplies them.

Two thirds of a decode step on a CPU are matrix products, and a library's product begins by laying
out its operands: 64 outputs side by side, because so many sums fit into vector registers. With the
2,048 rows of a prompt that is soon paid for. A step that adds one token to each of 8 sequences has
8 rows, and laying out 124 million weights costs as much as multiplying them; the next step does it
again. Weights do not change while text is written, so here they are laid out once, at the start:

    (out, in)    a a a a a ..          packed   a b c ..  a b c ..  a b c ..   (64 outputs wide)
                 b b b b b ..                   one stream, read in the order in which it lies
                 c c c c c ..

Where the processor has AVX-512 or AVX2 the products are `linear_cpu.py`'s, which fetches early what
it is about to multiply: with 8 to 32 rows 1.2 to 1.5 times as fast as oneDNN, and in bfloat16 on a
processor without AVX-512, for which oneDNN has no such products, several times as fast as PyTorch's
own. Where a matrix unit takes bfloat16, or without Numba, they are oneDNN's, the library that
PyTorch brings along. Both compute the activation while its numbers are near: oneDNN any, panels
GPT-2's. In bfloat16 packing always pays, in float32 from 3 rows on (8 are up to twice as fast, one
is a tenth slower) and for models as wide as GPT-2.
An output head that shares its weights with the embedding becomes a copy, since the embedding looks
rows up where they are. What a production engine does beyond this: weights in 8 or 4 bits.

Georganas et al. 2020, "Harnessing deep learning via a single building block", IPDPS (products over
packed weights).
Run: python -m kernels.packed_linear
Try: 1 or 256 rows in the demo; or make `can_use_panels` say no, and compare.
"""

import functools
import platform
import statistics
import time

import torch
from torch import Tensor, nn

from kernels.linear_cpu import PanelLinear, can_use_panels
from model import GPT, GPTConfig, attend_one_sequence

# From which n_embd and from how many rows on it was measured to pay. In float32 a call costs
# 0.07 ms more than a plain product: little at a width of 768, more than is saved at 256.
PAYS_FROM = {torch.float32: (768, 3), torch.bfloat16: (1, 1)}
ROWS_IN_MIND = 16  # the library chooses the layout for about as many rows: a decode step's

# oneDNN's names of what it can do to a tile before it is stored: the operation and its algorithm.
FUSED = {"gelu_new": ("gelu", "tanh"), "gelu": ("gelu", "none"), "relu": ("relu", "")}


class PackedLinear(nn.Module):
    """`nn.Linear` from packed weights and, if one is named, the activation behind it.

    (N, in) -> (N, out), for inference only. The weights are there, but in oneDNN's own order.
    """

    def __init__(self, linear: nn.Linear, activation: str | None = None):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS_IN_MIND)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias
        self.operation, self.algorithm = FUSED.get(activation, ("none", ""))

    def forward(self, x: Tensor) -> Tensor:
        how = self.operation, [], self.algorithm
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *how)


@functools.cache
def can_pack(device_type: str, dtype: torch.dtype) -> bool:
    """Whether weights of this kind can be packed here: asked once, by packing some.

    PyTorch's own compiler calls these operators, but no page of its manual promises them; where
    they are missing, or the processor is one they were never measured on, nothing is packed.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if device_type != "cpu" or dtype not in PAYS_FROM or not is_x86:
        return False
    try:
        plain = nn.Linear(64, 64, dtype=dtype)
        x = torch.ones(3, 64, dtype=dtype)
        with torch.inference_mode():
            return torch.allclose(PackedLinear(plain)(x), plain(x), atol=0.05)
    except (AttributeError, RuntimeError):
        return False


def is_packed(model: GPT) -> bool:
    """Whether a model's linear layers were replaced."""
    return isinstance(model.lm_head, (PackedLinear, PanelLinear))


def pack(model: GPT, decode_rows: int) -> GPT:
    """Replace the linear layers of a GPT by packed ones, in place, where that can be done and pays.

    `decode_rows` is how many sequences are to run at once, at most. Returns the same object. Each
    layer's plain weights go as their packed ones come, so that there is never much more than one
    of both; a tied head is one copy more.
    """
    device, dtype = model.wte.weight.device.type, model.wte.weight.dtype
    in_panels = device == "cpu" and can_use_panels(dtype)
    if is_packed(model) or not (in_panels or can_pack(device, dtype)):
        return model
    least_width, least_rows = PAYS_FROM[dtype]
    if model.config.n_embd < least_width or decode_rows < least_rows:
        return model
    packed, fused = (PanelLinear, ["gelu_new"]) if in_panels else (PackedLinear, FUSED)
    activation = model.config.activation_function
    activation = activation if activation in fused else None
    for layer in model.h:
        layer.attn.c_attn, layer.attn.c_proj = packed(layer.attn.c_attn), packed(layer.attn.c_proj)
        layer.mlp.c_fc = packed(layer.mlp.c_fc, activation)
        if activation:
            layer.mlp.activation = nn.Identity()  # it is computed in the line above now
        layer.mlp.c_proj = packed(layer.mlp.c_proj)
    model.lm_head = packed(model.lm_head)
    return model.requires_grad_(False)


# --------------------------------------------------------------------------------------------------
def demo():
    """Two layers of GPT-2's size, 1, 8 and 32 rows: the same logits, and what a step takes."""
    config = GPTConfig(vocab_size=8192, n_layer=2)
    plain, packed = (GPT(config).init_weights(std=0.2).eval() for _ in range(2))
    if not is_packed(pack(packed, 32)):
        print("ok: nothing is packed on this machine, the plain layers stay")
        return

    @torch.inference_mode()
    def step(model: GPT, rows: int) -> tuple[float, Tensor]:
        ids = torch.arange(rows)
        started = time.perf_counter()
        logits = model.logits(model(ids, ids, attend_one_sequence))  # (rows, V)
        return (time.perf_counter() - started) * 1e3, logits

    print(f"{config.n_layer} layers of {config.n_embd}, {torch.get_num_threads()} threads, float32")
    shapes = [tuple(model.h[0].attn.c_attn.weight.shape) for model in (plain, packed)]
    print(f"first weight: {shapes[0]} in a {type(plain.lm_head).__name__}", end=" -> ")
    print(f"{shapes[1]} in a {type(packed.lm_head).__name__}\n\nrows   plain ms  packed ms")
    for rows in (1, 8, 32):
        taken = [[step(model, rows) for model in (plain, packed)] for _ in range(12)]
        plain_ms, packed_ms = (statistics.median(pair[i][0] for pair in taken) for i in (0, 1))
        print(f"{rows:4} {plain_ms:10.2f} {packed_ms:10.2f}   {plain_ms / packed_ms:.2f}x")
        (_, want), (_, got) = taken[-1]
        error = ((got - want).abs().max() / want.abs().max()).item()
        assert error < 1e-4, error
    print(f"largest difference of the logits: {error:.1e} of the largest one")
    print("ok: the same products from weights that lie in the order of their use")


if __name__ == "__main__":
    demo()
