"""The joined decode step against the plain forward: the same logits, the same pool, fewer launches.

The oracle is `eager_forward` of engine.py over model.py. In float64 the two differ by the order of
sums alone. As in `test_triton_decode.py` the kernels are compiled where there is a GPU and
interpreted where not; attention is a plain stand-in of the same signature in most tests, since here
it is everything around it that is tested.
"""

import copy
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from attention_rules import check_compiled
from test_triton_small_linear import beside_nan, launched_by
from worlds import DEVICE, DTYPES, EACH_DTYPE, ON_GPU, SEED, needs_gpu, needs_triton, some

from block_allocator import BlockAllocator
from engine import InferenceEngine, eager_forward
from kernels import triton_fused as module
from kernels.triton_fused import (
    Arrivals,
    add_norm,
    can_fuse,
    fused_forward,
    linear_gelu,
    plain_add_norm,
    plain_linear_gelu,
)
from kernels.triton_fused_decode import fused_decode, fused_decode_triton
from kernels.triton_prefill import HAS_TRITON, INTERPRETED
from kv_cache import KVCache, Row, make_batch
from model import GPT, GPTConfig
from sampling import SamplingParams
from scheduler import Scheduler
from speedups.cuda_graphs import Calls, GraphForward, Graphs

pytestmark = needs_triton(HAS_TRITON)
SHAPE = {"max_seq_len": 64, "n_layer": 2, "n_head": 2, "n_embd": 16, "tie_word_embeddings": False}
BLOCK_SIZE = 4
# In 64 bits the order of sums is all that differs; a GPU's library may take a coarser tanh.
BOUND = 1e-4 if ON_GPU else 1e-10
LENGTHS = [3, 9, 6, 12, 1, 30, 4, 8, 17, 16, 15, 2, 5, 0, 7, 11, 20]  # tokens in the cache


def numbers(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


# ---- a sum and its LayerNorm ---------------------------------------------------------------------
class Sums:
    """Random inputs of `add_norm`, drawn on the CPU; what lies beside their rows is NaN."""

    def __init__(self, N, C, dtype, seed=0, offset=0.0):
        generator = torch.Generator().manual_seed(1000 * SEED + seed)
        values = torch.randn(2, N, C, generator=generator, dtype=torch.float64) + offset
        self.x, self.y = beside_nan(values[0], dtype, 5), beside_nan(values[1], dtype, 8)
        parameters = torch.randn(2, C, generator=generator, dtype=torch.float64)
        self.weight, self.bias = parameters.to(dtype).to(DEVICE)

    def run(self, function=add_norm):
        return function(self.x, self.y, self.weight, self.bias, 1e-5)

    def check(self):
        """The sum to the last bit, and the norm of that very sum within a bound.

        u is half the distance from 1 to the next number in 32 bits (or 64, for such inputs). A mean
        adds up pairwise, about 11 roundings for 1,600 numbers; the deviation, its inverse and the
        last line are a few more, each at most u of the largest number that takes part. At last the
        result is rounded to its type: half an eps, or, where bfloat16 is interpreted, a whole one,
        since the interpreter cuts the bits off.
        """
        total, normed = self.run()
        dtype, cut = self.x.dtype, INTERPRETED and self.x.dtype == torch.bfloat16
        assert total.dtype == normed.dtype == dtype
        if cut:
            exact = self.x.double() + self.y.double()
            assert ((total - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()
        else:
            assert torch.equal(total, self.x + self.y)
        values, gain, shift = total.double(), self.weight.double(), self.bias.double()
        want = F.layer_norm(values, gain.shape, gain, shift, 1e-5)
        mean = values.mean(1, keepdim=True)
        rstd = (values.var(1, keepdim=True, correction=0) + 1e-5) ** -0.5
        u = 2.0**-53 if dtype == torch.float64 else 2.0**-24
        bound = 24 * u * (gain.abs() * (values.abs() + mean.abs()) * rstd + shift.abs())
        bound += (1 + cut) * torch.finfo(dtype).eps / 2 * (want.abs() + bound)
        error = (normed.double() - want).abs()
        assert (error <= bound).all(), f"error {error.max():.2e}, bound {bound.max():.2e}"
        return total, normed


def test_the_sum_is_rounded_before_it_is_normalised():
    """From 2,048 on there are only even numbers in 16 bits: 2,049 becomes 2,048, 2,051 2,052."""
    x, y = numbers([2048, 2046, 2044, 2050], dtype=torch.float16), numbers([1, 1, 1, 1])
    ones, zeros = torch.ones_like(y[0]).half(), torch.zeros_like(y[0]).half()
    total, normed = add_norm(x, y.half(), ones, zeros, 0.0)
    assert total.tolist() == [[2048.0, 2047.0, 2045.0, 2052.0]]
    # Mean 2048; of 2049, 2047, 2045, 2051 it would be the same, and the first number 0.447.
    want = [0.0, -1.0, -3.0, 4.0]
    deviation = math.sqrt(26 / 4)
    assert normed[0].tolist() == pytest.approx([x / deviation for x in want], abs=2e-3)


@pytest.mark.parametrize(
    "N, C, dtype",
    some(
        100 if ON_GPU else 24,
        [1, 2, 7, 16, 256 if ON_GPU else 40],
        [1, 5, 48, 64, 768, 1600],
        DTYPES,
    ),
    ids=str,
)
def test_the_sum_is_pytorchs_and_the_norm_is_right(N, C, dtype):
    Sums(N, C, dtype, seed=C).check()


@pytest.mark.oracle
def test_two_rows_of_48_numbers():
    Sums(2, 48, torch.float32).check()


def test_rows_far_from_zero_keep_their_digits():
    """Around 1,000 the squares are a million, and the variance is 2: 32 bits hold 7 digits."""
    sums = Sums(2, 768, torch.float32, offset=500.0)
    total, normed = sums.run()
    want = F.layer_norm(total.double(), (768,), sums.weight.double(), sums.bias.double(), 1e-5)
    assert (normed - want).abs().max() < 1e-3 and want.abs().max() > 1


@EACH_DTYPE
def test_the_plain_sum_and_norm_agree(dtype):
    sums = Sums(5, 64, dtype)
    for got, twin in zip(sums.run(), sums.run(plain_add_norm), strict=True):
        assert (got - twin).abs().max() <= 4 * torch.finfo(dtype).eps * twin.abs().max()


def test_its_inputs_are_only_read_and_nothing_is_written_after_the_results(monkeypatch):
    sums, beyond = Sums(3, 48, torch.float32), []
    inputs = [x.clone() for x in (sums.x, sums.y, sums.weight, sums.bias)]

    def empty(rows, columns, **kwargs):
        around = torch.full((rows + 9, columns), math.nan, **kwargs)
        beyond.append(around[rows:])
        return around[:rows]

    monkeypatch.setattr(module.torch, "empty", empty)
    sums.check()
    assert len(beyond) == 2 and all(memory.isnan().all() for memory in beyond)
    for old, new in zip(inputs, (sums.x, sums.y, sums.weight, sums.bias), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 8), (1, 8), (8,), (8,)],
        [(2, 8), (2, 7), (8,), (8,)],
        [(2, 8), (2, 8), (7,), (8,)],
        [(2, 8), (2, 8), (8,), (2,)],
        [(8,), (8,), (8,), (8,)],
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(shapes):
    with pytest.raises(ValueError, match=r"they must be \(N, C\) and \(C,\), twice"):
        add_norm(*(torch.ones(shape, device=DEVICE) for shape in shapes), 1e-5)


# ---- a product and its GELU ----------------------------------------------------------------------
def test_the_gelu_after_a_product_is_the_tanh_form():
    x, weight, bias = numbers([1]), numbers([1], [-1], [0]), numbers(0, 0, 0)
    want = [0.8411920, -0.1588080, 0.0]  # erf's would be 0.8413447 and -0.1586553
    # A GPU's library may take a coarser tanh.
    assert linear_gelu(x, weight, bias)[0].tolist() == pytest.approx(want, abs=5e-5)
    assert plain_linear_gelu(x, weight, bias)[0].tolist() == pytest.approx(want, abs=2e-6)


# ---- what can be joined --------------------------------------------------------------------------
def tiny(tiny_gpt, dtype=torch.float64, **changes):
    """A small model on the device; the shared ones stay on the CPU."""
    return copy.deepcopy(tiny_gpt(seed=5, dtype=dtype, **(SHAPE | changes))).to(DEVICE)


@pytest.fixture(scope="module")
def model(tiny_gpt):
    return tiny(tiny_gpt)


def small(**changes):
    return GPT(GPTConfig(**(SHAPE | {"vocab_size": 97} | changes))).to(DEVICE).eval()


def test_a_gpt2_in_every_type_can_be_joined():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert can_fuse(small().to(dtype)) is None
    assert can_fuse(small().train()) is None  # nothing drops out at 0.0
    assert can_fuse(small(dropout=0.1)) is None  # nor in eval mode


def other_linear(model):
    model.h[1].attn.c_attn = torch.nn.Identity()
    return model


REASONS = {
    "activation": (lambda: small(activation_function="gelu"), "its activation, gelu"),
    "relu": (lambda: small(activation_function="relu"), "its activation, relu"),
    "dropout": (lambda: small(dropout=0.1).train(), "call model.eval()"),
    "dtype": (lambda: small().to(torch.float8_e5m2), "no kernels for torch.float8_e5m2"),
    "packed": (lambda: other_linear(small()), "its weights are packed for a CPU"),
    "device": (lambda: small().to("meta"), "the model is on meta"),
}


@pytest.mark.parametrize("build, reason", REASONS.values(), ids=REASONS)
def test_a_model_that_cannot_be_joined_is_refused_with_the_reason(build, reason):
    built = build()
    assert reason in can_fuse(built)
    with pytest.raises(ValueError, match="this model's steps can't be joined: ") as error:
        fused_forward(built, None, None)
    assert reason in str(error.value)


def test_without_triton_nothing_can_be_joined(monkeypatch):
    monkeypatch.setattr(module, "HAS_TRITON", False)
    assert can_fuse(small()) == "triton is not installed (it exists for Linux only)"


def test_compiled_kernels_want_a_model_on_a_gpu(monkeypatch):
    monkeypatch.setattr(module, "INTERPRETED", False)
    reason = can_fuse(small().to("cpu"))
    assert reason == "Triton's kernels run on cuda here, the model is on cpu"


def test_few_rows_are_16_at_most(model):
    cache = KVCache(2, 4, 4, 2, 8, torch.float64, DEVICE)
    for few_rows in (-1, 17):
        with pytest.raises(ValueError, match=f"few_rows is {few_rows}: it must be from 0 to 16"):
            fused_forward(model, cache, None, few_rows)


# ---- one step ------------------------------------------------------------------------------------
def write_then_attend(q, k, v, *rest):
    """The plain stand-in for `fused_decode_triton`; the last argument are its counters."""
    return fused_decode(q, k, v, *rest[:-1])


class Twins:
    """Sequences that lie in two poisoned pools alike, one for each of two forwards.

    Sequence i has `lengths[i]` tokens in the cache and one that is not computed yet; its blocks
    are anywhere. What no sequence wrote is NaN.
    """

    def __init__(self, model, lengths, few_rows=0, attend=write_then_attend):
        config, weight = model.config, model.wte.weight
        choose = random.Random(SEED)
        needed = [length // BLOCK_SIZE + 1 for length in lengths]
        num_blocks = sum(needed) + 3
        shape = (config.n_layer, num_blocks, BLOCK_SIZE, config.n_head, config.head_dim)
        self.caches = [KVCache(*shape, weight.dtype, weight.device) for _ in range(2)]
        free = iter(choose.sample(range(num_blocks), num_blocks))
        texts = [[choose.randrange(config.vocab_size) for _ in range(n + 1)] for n in lengths]
        tables = [[next(free) for _ in range(n)] for n in needed]
        self.rows = [Row(text, len(text) - 1, 1, table, 1) for text, table in zip(texts, tables)]
        self.eager = eager_forward(model, self.caches[0])
        self.otherwise: list = []  # batches that the joined forward handed on

        def otherwise(batch):
            self.otherwise.append(batch)
            return eager_forward(model, self.caches[1])(batch)

        self.fused = fused_forward(model, self.caches[1], otherwise, few_rows, attend)
        prompts = [Row(text, 0, len(text) - 1, table, 0) for text, table in zip(texts, tables)]
        self.caches[0].pool.fill_(math.nan)
        with torch.inference_mode():
            self.eager(self.batch([prompt for prompt in prompts if prompt.num_new_tokens]))
        self.caches[1].pool.copy_(self.caches[0].pool)

    def batch(self, rows=None):
        scratch = self.caches[0].scratch_block
        return make_batch(self.rows if rows is None else rows, BLOCK_SIZE, scratch)

    @torch.inference_mode()
    def check(self, rows=None, bound=BOUND):
        """Run a batch through both; the logits and the pools are the same."""
        batch = self.batch(rows)
        want, got = self.eager(batch), self.fused(batch)
        assert got.shape == want.shape and got.dtype == want.dtype
        assert (got - want).abs().max() <= bound * max(1.0, want.abs().max().item())
        self.check_pools(bound)
        return got

    def check_pools(self, bound=BOUND):
        """Slots that were never written are NaN in both; the scratch block is left out."""
        want, got = (cache.pool[:, : cache.scratch_block] for cache in self.caches)
        torch.testing.assert_close(got, want, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.parametrize(
    "num_seqs, few_rows",
    [pytest.param(2, 16, marks=pytest.mark.oracle), (1, 0), (1, 16), (2, 0), (5, 0), (5, 16)],
)
def test_logits_and_pool_are_those_of_the_plain_forward(model, num_seqs, few_rows):
    """With writing and merging inside of attention."""
    twins = Twins(model, LENGTHS[:num_seqs], few_rows, fused_decode_triton)
    got = twins.check()
    assert got.shape == (num_seqs, 97) and len(got.unique(dim=0)) == num_seqs
    assert twins.otherwise == []


# Two of them scale attention by a factor of the layer's own.
SHAPES = [
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    {"n_inner": 40},
    {"n_layer": 1},
    {"n_embd": 20},
    {"tie_word_embeddings": True},
]


@pytest.mark.parametrize("few_rows", [0, 16])
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_other_shapes_of_model(tiny_gpt, changes, few_rows):
    other = tiny(tiny_gpt, **changes)
    scales = {layer.attn.q_scale for layer in other.h}
    assert (scales != {1.0}) == any(name.startswith("scale") for name in changes)
    Twins(other, [9, 6], few_rows).check()


def test_biases_and_gains_take_part(tiny_gpt):
    """A fresh model's biases are 0 and its gains 1, so a mix-up of them would not be seen."""
    other = small().double()
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(0.2 * values + (parameter.ndim == 1))
    for few_rows in (0, 2, 16):
        for lengths in ([9, 6], [9, 6, 3]):
            Twins(other.requires_grad_(False), lengths, few_rows).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("few_rows", [0, 16])
def test_in_fewer_bits_the_logits_are_as_near_as_their_rounding(tiny_gpt, dtype, few_rows):
    """Each of 2 layers rounds its stream, its norms and its products: 20 eps of the largest."""
    other = tiny(tiny_gpt, dtype)
    for num_seqs in (1, 5):
        twins = Twins(other, LENGTHS[:num_seqs], few_rows)
        twins.check(bound=20 * torch.finfo(dtype).eps)


# ---- which steps ---------------------------------------------------------------------------------
def row(num_cached, num_new, num_sample_rows, table):
    return Row(
        [1 + i for i in range(num_cached + num_new)], num_cached, num_new, table, num_sample_rows
    )


OTHERS = {
    "a prompt": [row(0, 5, 1, [0, 1])],
    "a decode beside a chunk": [row(0, 1, 1, [0]), row(0, 3, 0, [1])],
    "several rows of one sequence": [row(0, 3, 3, [0])],
    "one token of one, none of the other": [row(0, 1, 1, [0]), row(0, 0, 0, [1])],
    "two tokens of one, none of the other": [row(0, 2, 2, [0]), row(0, 0, 0, [1])],
}


@pytest.mark.parametrize("rows", OTHERS.values(), ids=OTHERS)
def test_a_batch_that_is_no_decode_goes_elsewhere_as_it_is(model, rows):
    twins = Twins(model, [9], 16)
    twins.caches[0].pool.copy_(twins.caches[1].pool)
    batch = twins.batch(rows)
    with torch.inference_mode():
        want, got = twins.eager(batch), twins.fused(batch)
    (seen,) = twins.otherwise
    assert seen is batch and torch.equal(want, got)
    twins.check_pools()


def test_rows_that_want_no_logits_get_none(model):
    """The last token of a prompt's chunk alone in a step is a decode's row without a sample."""
    for few_rows in (0, 16):
        twins = Twins(model, [9, 6, 3], few_rows)
        first, second, third = twins.rows
        got = twins.check([first, second._replace(num_sample_rows=0), third])
        assert got.shape == (2, 97) and twins.otherwise == []


@pytest.mark.parametrize(
    "few_rows, want",
    [(0, "77777"), (1, "57777"), (2, "55777"), (3, "55s77"), (4, "55ss7"), (16, "55sss")],
)
def test_one_and_two_rows_take_five_launches_and_others_seven(model, monkeypatch, few_rows, want):
    taken = []

    def seven(model, batch, attend, *products):
        taken.append("s" if products and products[0] is module.small_linear else "7")
        return torch.zeros(len(batch.input_ids), 16, dtype=torch.float64, device=DEVICE)

    def five(model, batch, attend):
        taken.append("5")
        return torch.zeros(len(batch.input_ids), 16, dtype=torch.float64, device=DEVICE)

    twins = Twins(model, LENGTHS[:5], few_rows)
    monkeypatch.setattr(module, "seven_launches", seven)
    monkeypatch.setattr(module, "five_launches", five)
    for num_seqs in range(1, 6):
        assert twins.fused(twins.batch(twins.rows[:num_seqs])).shape == (num_seqs, 97)
    assert "".join(taken) == want


# ---- counters ------------------------------------------------------------------------------------
def test_counters_are_made_for_the_largest_batch_so_far_and_those_before_are_kept():
    arrivals = Arrivals(12, 12, torch.device(DEVICE))
    first = arrivals.for_rows(3)
    assert first.dtype == torch.int32 and len(first) == 2 * 36 and not first.any()
    assert arrivals.for_rows(1) is first and arrivals.for_rows(6) is first
    second = arrivals.for_rows(7)
    assert len(second) == 2 * 84 and arrivals.for_rows(2) is second
    assert arrivals.counters[0] is first, "a recorded step may still use them"


def test_no_counters_are_made_while_a_step_is_recorded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    arrivals = Arrivals(2, 2, SimpleNamespace(type="cuda"))
    with pytest.raises(AssertionError, match="run the step first"):
        arrivals.for_rows(1)
    arrivals.counters.append(torch.zeros(4, dtype=torch.int32))
    assert arrivals.for_rows(2) is arrivals.counters[0]


# ---- recorded, and under the engine --------------------------------------------------------------
@pytest.mark.parametrize("few_rows", [0, 16])
@pytest.mark.parametrize("attend", [write_then_attend, fused_decode_triton])
def test_padded_rows_of_a_recorded_step_harm_no_other(model, attend, few_rows):
    for num_seqs, size in ((1, 2), (3, 4), (5, 8)):
        twins = Twins(model, LENGTHS[:num_seqs], few_rows, attend)
        # The plain stand-in asks the device for values, which a graph does not allow.
        launcher = Graphs() if ON_GPU and attend is fused_decode_triton else Calls()
        recorded = GraphForward(twins.caches[1], twins.fused, [size], 64, launcher)
        twins.fused = recorded
        assert recorded.recorded_size(twins.batch()) == size
        assert twins.check().isfinite().all()
        assert twins.otherwise == []


def serve(model, few_rows=None, recorded=False):
    """Texts of 5 requests that join and leave; few_rows None is the plain forward."""
    cache = KVCache(2, 64, BLOCK_SIZE, 2, 8, torch.float64, DEVICE)
    cache.pool.fill_(math.nan)
    forward = plain = eager_forward(model, cache)
    if few_rows is not None:
        forward = fused_forward(model, cache, plain, few_rows)
    if recorded:
        forward = GraphForward(cache, forward, [1, 2, 4], 64, Graphs() if ON_GPU else Calls())
    scheduler = Scheduler(BlockAllocator(64, BLOCK_SIZE), 4, 12, 64)
    engine = InferenceEngine(forward, cache, scheduler, 97)
    choose, texts = random.Random(4), {}
    wanted = [(choose.randint(1, 6), choose.randint(2, 5)) for _ in range(5)]
    while wanted or engine.has_unfinished():
        if wanted:  # one comes in each step, and four may run
            length, most = wanted.pop()
            prompt = [choose.randrange(97) for _ in range(length)]
            engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=most))
        for output in engine.step().finished:
            texts[output.request_id] = output.outputs[0].token_ids
    return texts


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("few_rows", [0, 4])
def test_an_engine_writes_the_same_texts(model, few_rows, recorded):
    want = serve(model)
    assert serve(model, few_rows, recorded) == want
    assert len(want) == 5 and len({token for text in want.values() for token in text}) > 4


# ---- only a GPU can say --------------------------------------------------------------------------
GPT2 = {"vocab_size": 1000, "max_seq_len": 1024, "n_layer": 2, "n_head": 12, "n_embd": 768}


def gpt2(dtype=torch.bfloat16, **changes):
    built = GPT(GPTConfig(**(GPT2 | changes))).init_weights(std=0.2).to(dtype).to(DEVICE)
    return built.requires_grad_(False).eval()


@needs_gpu
def test_the_kernel_is_compiled_not_interpreted():
    check_compiled(module, "add_norm_kernel")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("N, C", some(8, [1, 2, 16, 64, 256], [64, 768, 1600]))
def test_a_products_own_gelu_is_the_tanh_form_in_gpt2s_shapes(N, C, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    generator = torch.Generator().manual_seed(N)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)
        for shape in ((N, C), (4 * C, C), (4 * C,))
    )
    weight /= math.sqrt(C)
    want = plain_linear_gelu(x.double(), weight.double(), bias.double())
    error = (linear_gelu(x, weight, bias).double() - want).abs()
    # erf's GELU is up to 5e-4 away. 16 bits may round the sum before the GELU and again after it.
    half_eps = torch.finfo(dtype).eps / 2
    assert (error <= 1e-4 + 4 * half_eps * (1 + want.abs())).all(), error.max()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("few_rows", [0, 16])
@pytest.mark.parametrize("num_seqs", [1, 2, 3, 8, 17])
def test_gpt2s_shape_captured_and_eager(num_seqs, few_rows, dtype, monkeypatch):
    """Logits as near to float64's as three times the plain forward's, eagerly and replayed.

    In 32 bits that is nearer than the library's GELU may be: it gets 1e-4 more.
    """
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model, lengths = gpt2(dtype), [1, 15, 16, 17, 200, 255, 256, 257, 700, 1000, *range(3, 10)]
    twins = Twins(model, lengths[:num_seqs], few_rows, fused_decode_triton)
    exact = Twins(gpt2(dtype).double(), lengths[:num_seqs])
    batch = twins.batch()
    with torch.inference_mode():
        want, plain = exact.eager(exact.batch()), twins.eager(batch)
        got = twins.fused(batch)
        size = 2 * num_seqs
        recorded = GraphForward(twins.caches[1], twins.fused, [num_seqs, size], 1024, Graphs())
        replayed = recorded(batch).clone()
        again = recorded(batch).clone()
    allowed = 3 * (plain.double() - want).abs().max() + 1e-4 * (1 + want.abs().max())
    for logits in (got, replayed):
        assert logits.isfinite().all() and (logits.double() - want).abs().max() <= allowed
    assert torch.equal(replayed, again) and twins.otherwise == []


@needs_gpu
@pytest.mark.parametrize("few_rows, num_seqs", [(0, 1), (0, 8), (2, 2), (16, 8)])
def test_a_thousand_replays_give_the_same_bits_and_zero_counters(few_rows, num_seqs):
    seen = set()

    def attend(*args):
        seen.add(args[-1])
        return fused_decode_triton(*args)

    twins = Twins(gpt2(), [900, 300, 64, 17, 256, 700, 5, 1000][:num_seqs], few_rows, attend)
    recorded = GraphForward(twins.caches[1], twins.fused, [num_seqs], 1024, Graphs())
    batch, same = twins.batch(), torch.ones((), dtype=torch.bool, device=DEVICE)
    first = recorded(batch).clone()
    for _ in range(1000):
        same.logical_and_((recorded(batch) == first).all())
    assert same.item() and not any(counters.any() for counters in seen)


@needs_gpu
def test_a_batch_larger_than_the_recorded_ones_leaves_their_counters_alone():
    """It needs more counters. Those that the recording names by address must not be given back."""
    twins = Twins(gpt2(), [900, 300, *[64] * 30], 0, fused_decode_triton)
    recorded = GraphForward(twins.caches[1], twins.fused, [2], 1024, Graphs())
    two = twins.batch(twins.rows[:2])
    first = recorded(two).clone()
    for _ in range(3):
        recorded(twins.batch())  # 32 rows: not recorded
        garbage = [torch.full((n,), 7, dtype=torch.int32, device=DEVICE) for n in (48, 96, 192)]
        assert torch.equal(recorded(two), first)
        del garbage


@pytest.mark.alone
@needs_gpu
@pytest.mark.parametrize("few_rows, num_seqs, a_layer, more", [(0, 8, 7, 4), (2, 2, 5, 5)])
def test_the_profiler_counts_as_many_launches_as_were_promised(few_rows, num_seqs, a_layer, more):
    """Kernels of the library that add up parts of a product are its own choice, and not counted."""
    n_layer = 12
    twins = Twins(gpt2(n_layer=n_layer), [64] * num_seqs, few_rows, fused_decode_triton)
    batch = twins.batch().to(DEVICE)
    batch.sample_rows = slice(None)
    with torch.inference_mode():
        names = launched_by(lambda: twins.fused(batch))
    counted = [name for name in names if "splitK" not in name]
    assert counted and len(counted) <= a_layer * n_layer + more, names
