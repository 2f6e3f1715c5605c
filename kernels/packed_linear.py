"""Replace a model's linear layers by layers whose weights are laid out once, at the start.

Two thirds of a decode step on a CPU are matrix products. A library's product first copies its
operands into the order in which vector registers use them: 64 outputs side by side. For the 2,048
rows of a prompt the copy takes little of the time. A decode step of 8 sequences has 8 rows, and
there the copy of 124 million weights takes as long as the product, at every step. The weights do
not change during generation, so `pack` copies them once:

    (out, in)    a a a a a ..          packed   a b c ..  a b c ..  a b c ..   (64 outputs wide)
                 b b b b b ..                   read from the first number to the last
                 c c c c c ..

There are two kinds of packed layers. `PanelLinear` (linear_cpu.py) needs AVX-512 or AVX2; with 8 to
32 rows it is 1.2 to 1.5 times as fast as oneDNN. `PackedLinear` is oneDNN's, the library that
PyTorch includes; it is used without Numba, and for bfloat16 where the processor has a matrix unit.
Both compute the activation with the product: oneDNN any of the model's, panels GPT-2's. A layer of
panels is compiled as a whole (layer_cpu.py). In float32 packing is used for models as wide as
GPT-2, in bfloat16 always. 8 rows are up to twice as fast. One row is a tenth slower on an Intel
Xeon, and on an AMD EPYC, where MKL's product of one row gains nothing from a second thread, 1.5
times as fast with one thread and 2.1 times with two. An output head that shares its weights with
the embedding becomes a copy, because the embedding needs its rows in the plain order.

Checked by tests/kernels/test_packed_linear.py: a packed model gives the plain model's logits.
Georganas et al. 2020, "Harnessing deep learning via a single building block", IPDPS (products over
packed weights).
"""

import functools
import platform

import torch
from torch import Tensor, nn

from model import GPT

# The smallest n_embd for which packing was measured to be faster. A call of a packed float32 layer
# takes 0.07 ms longer than a plain one: little for a width of 768, but more than the product saves
# for 256.
PAYS_FROM = {torch.float32: 768, torch.bfloat16: 1}
EXPECTED_ROWS = 16  # oneDNN chooses the order of the weights for about this many rows

# oneDNN's name of the activation that follows a product, and of its variant.
FUSED = {"gelu_new": ("gelu", "tanh"), "gelu": ("gelu", "none"), "relu": ("relu", "")}


class PackedLinear(nn.Module):
    """`nn.Linear` with oneDNN's packed weights, optionally followed by an activation.

    (N, in) -> (N, out), for inference only.
    """

    def __init__(self, linear: nn.Linear, activation: str | None = None):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), EXPECTED_ROWS)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias
        self.operation, self.algorithm = FUSED.get(activation, ("none", ""))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        return torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, self.operation, [], self.algorithm
        )


@functools.cache
def can_pack(device_type: str, dtype: torch.dtype) -> bool:
    """Whether `PackedLinear` works here: tried once, with a small layer.

    The two operators are not documented; PyTorch's own compiler calls them. On other processors
    than x86 packing was never measured, so there the answer is no.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if device_type != "cpu" or dtype not in PAYS_FROM or not is_x86:
        return False
    try:
        plain = nn.Linear(64, 64, dtype=dtype)
        x = torch.ones(3, 64, dtype=dtype)
        with torch.inference_mode():
            return torch.allclose(PackedLinear(plain)(x), plain(x), atol=0.05)
    except (AttributeError, RuntimeError):  # this PyTorch has no such operator
        return False


def is_packed(model: GPT) -> bool:
    """Whether `pack` has replaced a model's linear layers."""
    return not isinstance(model.lm_head, nn.Linear)


def pack(model: GPT) -> GPT:
    """Replace the linear layers of a GPT by packed ones, in place, where packing is faster.

    Returns the same model. Each layer's plain weights are freed when its packed ones exist, so the
    peak is the model and one layer more; a tied head becomes one copy more of the embedding.
    """
    device, dtype = model.wte.weight.device.type, model.wte.weight.dtype
    if is_packed(model) or device != "cpu" or dtype not in PAYS_FROM:
        return model
    if model.config.n_embd < PAYS_FROM[dtype]:
        return model
    # Imported here: the shipped model is too narrow, and a reader's first run loads a file less.
    from kernels.layer_cpu import PanelLayer, can_compile_layer
    from kernels.linear_cpu import PanelLinear, can_use_panels

    uses_panels = can_use_panels(dtype)
    if not (uses_panels or can_pack(device, dtype)):
        return model
    packed = PanelLinear if uses_panels else PackedLinear
    fusable = ["gelu_new"] if uses_panels else list(FUSED)
    activation = model.config.activation_function
    activation = activation if activation in fusable else None
    for i, layer in enumerate(model.h):
        layer.attn.c_attn = packed(layer.attn.c_attn)
        layer.attn.c_proj = packed(layer.attn.c_proj)
        layer.mlp.c_fc = packed(layer.mlp.c_fc, activation)
        if activation:
            layer.mlp.activation = nn.Identity()  # c_fc computes it now
        layer.mlp.c_proj = packed(layer.mlp.c_proj)
        if uses_panels and can_compile_layer(layer):
            model.h[i] = PanelLayer(layer)
    model.lm_head = packed(model.lm_head)
    return model.requires_grad_(False)
