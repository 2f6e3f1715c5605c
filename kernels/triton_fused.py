"""The small operations around attention, joined so that they move their bytes once.

The GELU of one token of GPT-2 reads and writes 12 KB: 3 ns for a memory of 4 TB/s. As a kernel of
its own it waits for the one before it to end, is launched, and ends in turn: over 1,000 ns on an
H100 (see below) if it does nothing at all. With few sequences a decode step is made of such waits,
and what can be computed while its numbers are in registers anyway should not be a launch. `|`
stands between two launches:

    as written   LayerNorm | q k v | write | attend | merge | project | + |
                 LayerNorm | up | GELU | down | +                                 12 a layer
    joined       q k v | write, attend, merge | project | +, LayerNorm |
                 up, GELU | down | +, LayerNorm (the next layer's)                 7
    1 or 2 rows  LayerNorm, q k v | write, attend, merge | project, + |
                 LayerNorm, up, GELU | down, +                                     5

For the 12 layers of GPT-2 these are 88 and 65 launches instead of about 150. The model's file stays
as it is, the one that is read and tested; this is a second forward over the same weights, for
decode steps alone. A batch with a prompt in it goes to the forward that was there before: its
products take so long that the rest does not count. What a production engine does beyond this:
a compiler finds what can be joined, and lets a launch begin before the one before it has ended.

Dao et al. 2022, "FlashAttention", arXiv:2205.14135, section 2.1 (operations bound by memory);
Hazy Research 2025, "Look Ma, No Bubbles" (a launch in a recorded chain: 1.3 us on an H100).
Run: python -m kernels.triton_fused
Try: in the demo, few_rows=0 (which steps change?), or drop `.to(total.dtype.element_ty)` from
`add_norm_kernel` and run the tests: the norm then sees digits that are not stored.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, just below

from kernels.triton_fused_decode import fused_decode_triton, num_arrivals
from kernels.triton_prefill import (
    DTYPES,
    HAS_TRITON,
    INTERPRETED,
    can_launch,
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
from kv_cache import Batch, KVCache, Row, make_batch
from model import GPT, Attention, GPTConfig

Forward = Callable[[Batch], Tensor]  # of engine.py: -> logits (M, V) of batch.sample_rows
Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # x (N, in), weight, bias -> (N, out)
QkvPlug = Callable[[Attention, Tensor], Tensor]  # a layer's q, k and v (N, 3 C) -> (N, C)


# ---- a sum and its LayerNorm ---------------------------------------------------------------------
@triton.jit
def add_norm_kernel(
    x, y, weight, bias, total, normed,  # (N, C) both, (C,) both, and the results (N, C)
    stride_x, stride_y,  # elements from row to row
    EPS: tl.constexpr, C: tl.constexpr, TILE_C: tl.constexpr,  # the latter: C rounded up
):  # fmt: skip
    """One program: one row."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, TILE_C)[None, :]
    inside = column < C
    wide = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    left = tl.load(x + row * stride_x + column, inside, other=0.0).to(wide)
    right = tl.load(y + row * stride_y + column, inside, other=0.0).to(wide)
    # Rounded first: what is normalised is the sum that goes on, as if it had been read again.
    rounded = (left + right).to(total.dtype.element_ty)
    tl.store(total + row * C + column, rounded, inside)
    values = rounded.to(wide)
    mean, rstd = row_statistics(values, inside, C, EPS)
    gain = tl.load(weight + column, inside, other=0.0).to(wide)
    shift = tl.load(bias + column, inside, other=0.0).to(wide)
    result = (values - mean[:, None]) * rstd[:, None] * gain + shift
    tl.store(normed + row * C + column, result.to(normed.dtype.element_ty), inside)


def add_norm(
    # (N, C) both, rows may lie apart; (C,) both
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x + y and its LayerNorm, (N, C) both, in one launch.

    The sum is rounded to x's type before it is normalised, the statistics are of 32 bits (64 for
    64-bit numbers). Raises ValueError for other shapes, and for tensors of several types. Plain
    twin: `plain_add_norm`.
    """
    if x.ndim != 2 or y.shape != x.shape or not weight.shape == bias.shape == x.shape[1:]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, y, weight, bias))
        raise ValueError(f"x, y, weight, bias are {shapes}: they must be (N, C) and (C,), twice")
    check_launch(x=x, y=y, weight=weight, bias=bias)
    N, C = x.shape
    total, normed = (torch.empty(N, C, dtype=x.dtype, device=x.device) for _ in range(2))
    if N == 0:
        return total, normed
    TILE_C = triton.next_power_of_2(C)
    # 8 numbers a thread are one load of 16 bytes in 16 bits: 4 warps for a row of 768.
    add_norm_kernel[(N,)](
        x, y, weight, bias, total, normed, x.stride(0), y.stride(0), EPS=eps, C=C, TILE_C=TILE_C,
        num_warps=min(8, max(1, TILE_C // 256)),
    )  # fmt: skip
    return total, normed


def plain_add_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The same in PyTorch's operations: two launches."""
    total = x + y
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


# ---- a product and its GELU ----------------------------------------------------------------------
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """tanh GELU of a linear layer: x (N, in), weight (out, in), bias (out,) -> (N, out).

    On a GPU the product's own kernel does it, before it stores: one launch. The operator is one
    that PyTorch's transformer layers call; no page of its manual promises it. On a CPU the same
    operator is the GELU with erf, another function, so there it is not asked.
    """
    if x.is_cuda:
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return plain_linear_gelu(x, weight, bias)


def plain_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same in two operations."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


# ---- a step --------------------------------------------------------------------------------------
class Arrivals:
    """The counters of `fused_decode_triton`: zero before each launch, and zero again after it."""

    def __init__(self, num_heads: int, num_kv_heads: int, device: torch.device):
        self.heads, self.device = (num_heads, num_kv_heads), device
        # The newest are used. A recorded step goes on using those that it was recorded with, by
        # their address, so those that have become too few are kept.
        self.made: list[Tensor] = []

    def for_rows(self, num_rows: int) -> Tensor:
        """At least as many as that many rows want, (n,) int32."""
        needed = num_arrivals(num_rows, *self.heads)
        if not self.made or len(self.made[-1]) < needed:
            on_gpu = self.device.type == "cuda"
            # Memory that a recording takes belongs to it, and each replay would clear it anew.
            assert not (on_gpu and torch.cuda.is_current_stream_capturing()), "run the step first"
            twice = 2 * needed  # so that a batch that grows row by row seldom comes here
            self.made.append(torch.zeros(twice, dtype=torch.int32, device=self.device))
        return self.made[-1]


def plug_for(
    cache: KVCache, batch: Batch, arrived: Tensor, attend: Callable[..., Tensor]
) -> QkvPlug:
    """What stands in `KVCache.attend`'s place: the same socket, but behind an undivided product."""

    def plug(layer: Attention, qkv: Tensor) -> Tensor:
        # (N, H, D) each, views. H is the same for all three: GPT-2 groups no heads.
        q, k, v = (part.unflatten(1, (layer.n_head, -1)) for part in qkv.chunk(3, dim=1))
        if layer.q_scale != 1.0:
            q = q * layer.q_scale  # a launch more, for models that no longer divide by sqrt(D)
        where = (batch.slot_mapping, batch.block_tables, batch.context_lens)
        limits = (q.shape[-1] ** -0.5, batch.max_context_len)
        return attend(q, k, v, *cache.layer(layer.layer), *where, *limits, arrived).flatten(1)

    return plug


def norm_of(norm: nn.LayerNorm) -> Norm:
    """A LayerNorm as its numbers."""
    return norm.weight, norm.bias, norm.eps


def weights_of(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """A linear layer as its numbers."""
    return linear.weight, linear.bias


def seven_launches(
    model: GPT,
    batch: Batch,
    plug: QkvPlug,
    linear: Product = F.linear,
    up: Product = linear_gelu,
    join: Callable[..., tuple[Tensor, Tensor]] = add_norm,
) -> Tensor:
    """Hidden states (N, C) of a decode step after the last LayerNorm: 7 launches a layer.

    A sum is always followed by a LayerNorm, be it the next layer's, so the two are one launch:
    between layers x goes on twice, as it is and normalised.
    """
    # The embeddings' sum is followed by the first one: no launch stands outside but two look-ups.
    tokens, places = model.wte(batch.input_ids), model.wpe(batch.positions)
    x, normed = join(tokens, places, *norm_of(model.h[0].ln_1))
    next_norms = [*(layer.ln_1 for layer in model.h[1:]), model.ln_f]
    for layer, next_norm in zip(model.h, next_norms, strict=True):
        heads = plug(layer.attn, linear(normed, *weights_of(layer.attn.c_attn)))
        added = linear(heads, *weights_of(layer.attn.c_proj))
        x, normed = join(x, added, *norm_of(layer.ln_2))
        inner = up(normed, *weights_of(layer.mlp.c_fc))
        added = linear(inner, *weights_of(layer.mlp.c_proj))
        x, normed = join(x, added, *norm_of(next_norm))
    return normed


def five_launches(
    model: GPT, batch: Batch, plug: QkvPlug, linear: Callable[..., Tensor] = small_linear
) -> Tensor:
    """The same for one or two rows, whose products do what stands around them: 5 a layer."""
    x = model.wte(batch.input_ids) + model.wpe(batch.positions)
    for layer in model.h:
        qkv = linear(x, *weights_of(layer.attn.c_attn), norm=norm_of(layer.ln_1))
        x = linear(plug(layer.attn, qkv), *weights_of(layer.attn.c_proj), residual=x)
        inner = linear(x, *weights_of(layer.mlp.c_fc), norm=norm_of(layer.ln_2), gelu=True)
        x = linear(inner, *weights_of(layer.mlp.c_proj), residual=x)
    return model.ln_f(x)


# ---- what is called ------------------------------------------------------------------------------
def can_fuse(model: GPT) -> str | None:
    """Why a model's decode steps can't be joined here, in a few words; None if they can."""
    config, weight = model.config, model.wte.weight
    home = "cpu" if INTERPRETED else "cuda"
    linears = (layer.attn.c_attn for layer in model.h)
    if not HAS_TRITON:
        return "triton is not installed (it exists for Linux only)"
    if weight.device.type != home:
        return f"Triton's kernels run on {home} here, the model is on {weight.device.type}"
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
    """Whether every sequence adds exactly one token: one at most, and as many rows as sequences."""
    return batch.max_query_len == 1 and len(batch.input_ids) == len(batch.context_lens)


def fused_forward(
    model: GPT,
    cache: KVCache,
    otherwise: Forward,
    few_rows: int = 0,
    attend: Callable[..., Tensor] = fused_decode_triton,
) -> Forward:
    """A forward (see `engine.py`) that joins a decode step's operations; others go to `otherwise`.

    Batches of up to `few_rows` rows, 16 at most, multiply by `small_linear`; 0 is never, since
    whether that is faster depends on the GPU's own library. `attend` is of the signature of
    `fused_decode_triton`. What it returns reads nothing back from the device, so it can be
    recorded, if it has run with as many rows before. Raises ValueError where `can_fuse` objects,
    and for a `few_rows` outside [0, 16].
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
        batch, num_rows = batch.to(device), len(batch.input_ids)
        plug = plug_for(cache, batch, arrivals.for_rows(num_rows), attend)
        if num_rows > few_rows:
            hidden = seven_launches(model, batch, plug)
        elif num_rows > MOST_NORM_ROWS:
            up = partial(small_linear, gelu=True)
            hidden = seven_launches(model, batch, plug, small_linear, up)
        else:
            hidden = five_launches(model, batch, plug)
        # In decode a row that wants no logits is rare: all go through the last layer.
        return model.logits(hidden[batch.sample_rows])

    return forward


# --------------------------------------------------------------------------------------------------
@torch.inference_mode()
def demo():
    """Five sequences, decode steps of some of them: what is called for a layer; the same logits."""
    from engine import eager_forward  # for the demo alone: a step needs no engine

    if not can_launch():
        return
    device = torch.device("cpu" if INTERPRETED else "cuda")
    model = GPT(GPTConfig(vocab_size=97, max_seq_len=64, n_layer=2, n_head=2, n_embd=16))
    model.init_weights(std=0.2).to(device).requires_grad_(False).eval()
    tables = [list(range(i, 40, 5)) for i in range(5)]  # 8 blocks of 4 each
    texts = [list(range(7 * i + 1, 9 * i + 5)) for i in range(5)]
    caches = [KVCache(2, 40, 4, 2, 8, device=device) for _ in range(2)]
    written, otherwise = (eager_forward(model, cache) for cache in caches)
    fused = fused_forward(model, caches[1], otherwise, few_rows=2)
    called: list[str] = []

    def told(function, name=None):
        def call(*args, **kwargs):
            called.append(", ".join([name or function.__name__, *kwargs]))
            return function(*args, **kwargs)

        return call

    def batch_of(rows):
        return make_batch(rows, block_size=4, scratch_block=40)

    prompts = batch_of([Row(t, 0, len(t) - 1, table, 0) for t, table in zip(texts, tables)])
    for forward in (written, fused):  # many tokens each: the second hands them on
        forward(prompts)
    rows = [Row(text, len(text) - 1, 1, table, 1) for text, table in zip(texts, tables)]
    arrived = torch.zeros(num_arrivals(5, 2, 2), dtype=torch.int32, device=device)

    print("rows  what is called for the first layer")
    batch = batch_of(rows).to(device)
    plug = told(plug_for(caches[1], batch, arrived, fused_decode_triton), "attend")
    seven_launches(model, batch, plug, told(F.linear), told(linear_gelu), told(add_norm))
    print(f"   5  {' | '.join(called[1:8])}")  # the first call is for the embeddings
    called.clear()
    batch = batch_of(rows[:2]).to(device)
    plug = told(plug_for(caches[1], batch, arrived, fused_decode_triton), "attend")
    five_launches(model, batch, plug, told(small_linear, "linear"))
    print(f"   2  {' | '.join(called[:5])}")

    print("\nrows  largest logit   distance from model.py's")
    worst = 0.0
    for num_rows in (1, 2, 3, 5):
        batch = batch_of(rows[:num_rows])
        want, got = written(batch), fused(batch)  # (B, 97) both
        error = (want - got).abs().max().item()
        print(f"{num_rows:4}  {want.abs().max().item():13.2f}   {error:.1e}")
        worst = max(worst, error)
    assert worst < 1e-4
    print("ok: fewer launches, the same logits")


if __name__ == "__main__":
    demo()
