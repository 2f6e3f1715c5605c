"""The small operations around attention, joined: a decode step with 7 or 5 launches a layer.

The GELU of one token of GPT-2 reads and writes 12 KB, which takes a memory of 4 TB/s 3 ns. But as a
kernel of its own it costs over 1,000 ns on an H100 (source below), even if it computes nothing: it
waits for the kernel before it to end, is launched, and ends. With few sequences a decode step
consists mostly of such costs. So an operation whose numbers are in registers anyway should not be a
launch of its own. `|` stands between two launches:

    model.py     LayerNorm | q k v | write | attend | merge | project | + |
                 LayerNorm | up | GELU | down | +                                 12 a layer
    joined       q k v | write, attend, merge | project | +, LayerNorm |
                 up, GELU | down | +, LayerNorm (the next layer's)                 7
    1 or 2 rows  LayerNorm, q k v | write, attend, merge | project, + |
                 LayerNorm, up, GELU | down, +                                     5

For the 12 layers of GPT-2 these are 88 and 65 launches instead of about 150. model.py stays as it
is. This file is a second forward over the same weights, for decode steps only. A batch with a
prompt in it goes to the forward of model.py: its products take so long that a few launches more
cost little.

How it is checked: logits and pool against the forward of model.py, and the number of launches is
counted (tests/kernels/test_triton_fused.py). In a production engine a compiler finds the operations
that can be joined, and a launch can begin before the one before it has ended.

Dao et al. 2022, "FlashAttention", arXiv:2205.14135, section 2.1 (operations bound by memory);
Hazy Research 2025, "Look Ma, No Bubbles" (a launch in a recorded chain: 1.3 us on an H100).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.triton_fused_decode import fused_decode_triton, num_arrivals
from kernels.triton_prefill import (
    DTYPES,
    HAS_TRITON,
    INTERPRETED,
    check_launch,
    tl,
    triton,
)
from kernels.triton_small_linear import (
    MOST_NORM_ROWS,
    MOST_ROWS,
    Norm,
    row_statistics,
    small_linear,
)
from kv_cache import Batch, KVCache
from model import GPT, Attention

Forward = Callable[[Batch], Tensor]  # -> logits (M, V) of batch.sample_rows, as in engine.py
Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # x (N, in), weight, bias -> (N, out)
AttendQKV = Callable[[Attention, Tensor], Tensor]  # a layer's q, k and v (N, 3 C) -> (N, C)


# ---- a sum and its LayerNorm ---------------------------------------------------------------------
@triton.jit
def add_norm_kernel(
    x, y,  # (N, C) both
    weight, bias,  # (C,) both
    total, normed,  # (N, C) both, the results
    stride_x, stride_y,  # elements from row to row
    EPS: tl.constexpr, C: tl.constexpr,
    TILE_C: tl.constexpr,  # C rounded up to a power of two
):  # fmt: skip
    """One program: the sum of one row of x and y, and its LayerNorm."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE_C)[None, :]
    inside = column < C
    wide = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    left = tl.load(x + row * stride_x + column, inside, other=0.0).to(wide)
    right = tl.load(y + row * stride_y + column, inside, other=0.0).to(wide)
    # The sum is rounded before it is normalised: the norm sees the numbers that are stored.
    rounded = (left + right).to(total.dtype.element_ty)
    tl.store(total + row * C + column, rounded, inside)
    values = rounded.to(wide)
    mean, rstd = row_statistics(values, inside, C, EPS)
    gain = tl.load(weight + column, inside, other=0.0).to(wide)
    shift = tl.load(bias + column, inside, other=0.0).to(wide)
    result = (values - mean[:, None]) * rstd[:, None] * gain + shift
    tl.store(normed + row * C + column, result.to(normed.dtype.element_ty), inside)


def add_norm(
    x: Tensor,  # (N, C); its rows need not be adjacent
    y: Tensor,  # (N, C), the same
    weight: Tensor,  # (C,)
    bias: Tensor,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x + y and its LayerNorm, (N, C) both, in one launch.

    The sum is rounded to x's type before it is normalised. Mean and deviation are computed in 32
    bits (64 for 64-bit numbers). Raises ValueError for other shapes and for tensors of several
    types, RuntimeError as `check_launch`. The same in PyTorch is `plain_add_norm`.
    """
    if x.ndim != 2 or y.shape != x.shape or not weight.shape == bias.shape == x.shape[1:]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, y, weight, bias))
        raise ValueError(f"x, y, weight, bias are {shapes}: they must be (N, C) and (C,), twice")
    check_launch(x=x, y=y, weight=weight, bias=bias)
    N, C = x.shape
    total = torch.empty(N, C, dtype=x.dtype, device=x.device)
    normed = torch.empty(N, C, dtype=x.dtype, device=x.device)
    if N == 0:
        return total, normed
    TILE_C = triton.next_power_of_2(C)
    # 8 numbers of 16 bits are one load of 16 bytes a thread: a row of 768 takes 4 warps.
    num_warps = min(8, max(1, TILE_C // 256))
    add_norm_kernel[(N,)](
        x,
        y,
        weight,
        bias,
        total,
        normed,
        x.stride(0),
        y.stride(0),
        EPS=eps,
        C=C,
        TILE_C=TILE_C,
        num_warps=num_warps,
    )
    return total, normed


def plain_add_norm(
    x: Tensor,  # (N, C)
    y: Tensor,  # (N, C)
    weight: Tensor,  # (C,)
    bias: Tensor,  # (C,)
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`add_norm` in PyTorch, for the tests: two launches."""
    total = x + y
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


# ---- a product and its GELU ----------------------------------------------------------------------
def linear_gelu(
    x: Tensor,  # (N, in)
    weight: Tensor,  # (out, in)
    bias: Tensor,  # (out,)
) -> Tensor:
    """The tanh GELU of a linear layer, (N, out).

    On a GPU cuBLAS computes the GELU in the product's kernel, before the store: one launch. PyTorch
    does not document this operator, but its own transformer layers call it. On a CPU the same
    operator computes another GELU, the one with erf, so there two operations are called.
    """
    if x.is_cuda:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return plain_linear_gelu(x, weight, bias)


def plain_linear_gelu(
    x: Tensor,  # (N, in)
    weight: Tensor,  # (out, in)
    bias: Tensor,  # (out,)
) -> Tensor:
    """`linear_gelu` in two operations."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


# ---- a step --------------------------------------------------------------------------------------
class Arrivals:
    """The counters of `fused_decode_triton`: zero before each launch, and zero again after it."""

    def __init__(self, num_heads: int, num_kv_heads: int, device: torch.device):
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.device = device
        # The last tensor is the largest, and new steps use it. A captured graph reads the counters
        # at the address that they had during capture, so the smaller tensors are kept alive.
        self.counters: list[Tensor] = []

    def for_rows(self, num_rows: int) -> Tensor:
        """Counters for at least `num_rows` rows, (n,) int32."""
        needed = num_arrivals(num_rows, self.num_heads, self.num_kv_heads)
        if not self.counters or len(self.counters[-1]) < needed:
            on_gpu = self.device.type == "cuda"
            # Memory allocated during a capture belongs to the graph, and each replay would zero it.
            assert not (on_gpu and torch.cuda.is_current_stream_capturing()), "run the step first"
            # Twice as many as needed: a batch that grows row by row allocates only a few times.
            new = torch.zeros(2 * needed, dtype=torch.int32, device=self.device)
            self.counters.append(new)
        return self.counters[-1]


def attend_undivided(
    cache: KVCache,
    batch: Batch,
    arrived: Tensor,  # (num_arrivals(N, H, H_kv),) int32, or longer
    attend: Callable[..., Tensor],
) -> AttendQKV:
    """A function like `KVCache.attend`'s, which takes q, k and v as one tensor (N, 3 C)."""

    def attend_qkv(layer: Attention, qkv: Tensor) -> Tensor:  # (N, 3 C) -> (N, C)
        # (N, H, D) each, views. All three have H heads: GPT-2 does not group them.
        q, k, v = (part.unflatten(1, (layer.n_head, -1)) for part in qkv.chunk(3, dim=1))
        if layer.q_scale != 1.0:
            q = q * layer.q_scale  # one launch more, for models that do not divide by sqrt(D)
        return attend(
            q,
            k,
            v,
            *cache.layer(layer.layer),  # k_cache and v_cache
            batch.slot_mapping,
            batch.block_tables,
            batch.context_lens,
            q.shape[-1] ** -0.5,
            batch.max_context_len,
            arrived,
        ).flatten(1)

    return attend_qkv


def norm_of(norm: nn.LayerNorm) -> Norm:
    """A LayerNorm's weight (C,), bias (C,) and eps."""
    return norm.weight, norm.bias, norm.eps


def weights_of(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """A linear layer's weight (out, in) and bias (out,)."""
    return linear.weight, linear.bias


def seven_launches(
    model: GPT,
    batch: Batch,
    attend: AttendQKV,
    linear: Product = F.linear,
    linear_up: Product = linear_gelu,
    add_and_norm: Callable[..., tuple[Tensor, Tensor]] = add_norm,
) -> Tensor:
    """Hidden states (N, C) of a decode step after the last LayerNorm: 7 launches a layer.

    Each residual sum is followed by a LayerNorm, its own layer's or the next one's, so the two are
    one launch. Between layers there are two tensors: x, and x normalised.
    """
    # The sum of the two embeddings is followed by the first layer's LayerNorm.
    tokens = model.wte(batch.input_ids)
    positions = model.wpe(batch.positions)
    x, normed = add_and_norm(tokens, positions, *norm_of(model.h[0].ln_1))
    next_norms = [*(layer.ln_1 for layer in model.h[1:]), model.ln_f]
    for layer, next_norm in zip(model.h, next_norms, strict=True):
        heads = attend(layer.attn, linear(normed, *weights_of(layer.attn.c_attn)))
        projected = linear(heads, *weights_of(layer.attn.c_proj))
        x, normed = add_and_norm(x, projected, *norm_of(layer.ln_2))
        inner = linear_up(normed, *weights_of(layer.mlp.c_fc))  # (N, 4 C)
        projected = linear(inner, *weights_of(layer.mlp.c_proj))
        x, normed = add_and_norm(x, projected, *norm_of(next_norm))
    return normed


def five_launches(
    model: GPT, batch: Batch, attend: AttendQKV, linear: Callable[..., Tensor] = small_linear
) -> Tensor:
    """The same for one or two rows: `small_linear` does the norms, sums and GELUs. 5 a layer."""
    x = model.wte(batch.input_ids) + model.wpe(batch.positions)
    for layer in model.h:
        qkv = linear(x, *weights_of(layer.attn.c_attn), norm=norm_of(layer.ln_1))
        x = linear(attend(layer.attn, qkv), *weights_of(layer.attn.c_proj), residual=x)
        inner = linear(x, *weights_of(layer.mlp.c_fc), norm=norm_of(layer.ln_2), gelu=True)
        x = linear(inner, *weights_of(layer.mlp.c_proj), residual=x)
    return model.ln_f(x)


# ---- what is called ------------------------------------------------------------------------------
def can_fuse(model: GPT) -> str | None:
    """Why a model's decode steps can't be joined here, in a few words; None if they can."""
    config = model.config
    weight = model.wte.weight
    needed_device = "cpu" if INTERPRETED else "cuda"
    linears = (layer.attn.c_attn for layer in model.h)
    if not HAS_TRITON:
        return "triton is not installed (it exists for Linux only)"
    if weight.device.type != needed_device:
        return f"Triton's kernels run on {needed_device} here, the model is on {weight.device.type}"
    if weight.dtype not in DTYPES:
        return f"there are no kernels for {weight.dtype}"
    if config.activation_function != "gelu_new":
        return f"no product ends with its activation, {config.activation_function}"
    if model.training and config.dropout:
        return "it drops out at random while it trains: call model.eval()"
    if not all(isinstance(linear, nn.Linear) for linear in linears):
        return "its weights are packed for a CPU"
    return None


def is_decode(batch: Batch) -> bool:
    """Whether every sequence adds exactly one token."""
    # No sequence adds more than one, and there are as many tokens as sequences.
    return batch.max_query_len == 1 and len(batch.input_ids) == len(batch.context_lens)


def fused_forward(
    model: GPT,
    cache: KVCache,
    otherwise: Forward,
    few_rows: int = 0,
    attend: Callable[..., Tensor] = fused_decode_triton,
) -> Forward:
    """A forward (see engine.py) that joins the operations of decode steps.

    Other batches go to `otherwise`. Batches of up to `few_rows` rows (16 at most) multiply by
    `small_linear`. The default is 0, never: whether it is faster depends on the GPU's library.
    `attend` has the signature of `fused_decode_triton`.

    The forward reads nothing back from the device, so it can be captured as a graph once it has run
    with as many rows. Raises ValueError where `can_fuse` gives a reason, and for a `few_rows`
    outside [0, 16].
    """
    if reason := can_fuse(model):
        raise ValueError(f"this model's steps can't be joined: {reason}")
    if not 0 <= few_rows <= MOST_ROWS:
        raise ValueError(f"few_rows is {few_rows}: it must be from 0 to {MOST_ROWS}")
    device = cache.pool.device
    arrivals = Arrivals(model.config.n_head, cache.pool.shape[3], device)

    def forward(batch: Batch) -> Tensor:
        if not is_decode(batch):
            return otherwise(batch)
        batch = batch.to(device)
        num_rows = len(batch.input_ids)
        attend_qkv = attend_undivided(cache, batch, arrivals.for_rows(num_rows), attend)
        if num_rows > few_rows:
            hidden = seven_launches(model, batch, attend_qkv)
        elif num_rows > MOST_NORM_ROWS:
            small_gelu = partial(small_linear, gelu=True)
            hidden = seven_launches(model, batch, attend_qkv, small_linear, small_gelu)
        else:
            hidden = five_launches(model, batch, attend_qkv)
        # Nearly every row of a decode step wants logits, so all rows pass through the last layer.
        return model.logits(hidden[batch.sample_rows])

    return forward
