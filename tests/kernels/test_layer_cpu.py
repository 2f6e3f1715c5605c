"""layer_cpu.py: the modules in float64 are the oracle, and a row is the same in any batch."""

import copy
import math

import pytest
import torch
from parallel import in_threads
from torch import nn

from kernels import layer_cpu
from kernels.layer_cpu import PanelLayer, can_compile_layer
from kernels.linear_cpu import PanelLinear, can_multiply_pairs, can_use_panels
from kernels.numba_tools import use_openmp_threads
from kernels.packed_linear import pack
from model import ALL_ROWS, GPT, GPTConfig, Layer

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # of the largest number
EACH_DTYPE = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(
                not can_multiply_pairs(), reason="the processor does not multiply pairs"
            ),
        ),
    ],
    ids=["fp32", "bf16"],
)
numba = pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(
    not can_use_panels(torch.float32), reason="panels need AVX2, numba and OpenMP's threads"
)


def two_layers(dtype=torch.float32, **options):
    """A layer with random numbers in all its parameters, and the compiled layer of a copy."""
    options = {"n_embd": 96, "n_head": 4, "n_inner": 200, "vocab_size": 5} | options
    model = GPT(GPTConfig(**options, n_layer=1)).init_weights(std=0.2).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.h[0].parameters():
        if parameter.ndim == 1:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    plain = model.to(dtype).requires_grad_(False).h[0]
    layer = copy.deepcopy(plain)
    for module, name in ((layer.attn, "c_attn"), (layer.attn, "c_proj"), (layer.mlp, "c_proj")):
        setattr(module, name, PanelLinear(getattr(module, name)))
    layer.mlp.c_fc = PanelLinear(layer.mlp.c_fc, "gelu_new")
    layer.mlp.activation = nn.Identity()
    assert can_compile_layer(layer)
    return plain, PanelLayer(layer)


def random_x(rows, dtype, width=96, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator) * 3 + 1).to(dtype)


def mixed(number, q, k, v):
    """A function for the socket with which each of q, k and v matters, row by row."""
    assert number == 0
    return q * 0.3 + k.flip(1) * 0.5 - v


@EACH_DTYPE
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 70])
@pytest.mark.parametrize("width", [96, 104])  # outputs that fill panels of 48, and that do not
@torch.inference_mode()
def test_a_compiled_layer_computes_what_its_modules_do(dtype, rows, width):
    plain, layer = two_layers(dtype, n_embd=width)
    x = random_x(rows, dtype, width)
    got = layer(x, mixed, ALL_ROWS)
    want = plain.double()(x.double(), mixed, ALL_ROWS)
    assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
    assert (got.double() - want).abs().max() <= BOUNDS[dtype] * want.abs().max()


@EACH_DTYPE
@torch.inference_mode()
def test_only_chosen_rows_are_finished_and_the_scale_of_q_counts(dtype):
    options = {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}
    plain, layer = two_layers(dtype, **options)
    assert layer.attn.q_scale != 1
    x, rows = random_x(9, dtype), torch.tensor([7, 2])
    got, want = layer(x, mixed, rows), plain.double()(x.double(), mixed, rows)
    assert got.shape == (2, 96)
    assert (got.double() - want).abs().max() <= BOUNDS[dtype] * want.abs().max()


@EACH_DTYPE
@torch.inference_mode()
def test_a_row_has_the_same_bits_alone_in_any_batch_and_on_any_number_of_threads(
    dtype, set_threads
):
    _, layer = two_layers(dtype)
    x = random_x(70, dtype)
    set_threads(1)
    whole = layer(x, mixed, ALL_ROWS)
    for threads in (1, 2):
        set_threads(threads)
        assert torch.equal(layer(x, mixed, ALL_ROWS), whole)
        for first, last in ((0, 1), (5, 7), (3, 12), (6, 70)):
            assert torch.equal(layer(x[first:last], mixed, ALL_ROWS), whole[first:last])


@EACH_DTYPE
@torch.inference_mode()
def test_equal_and_huge_numbers_are_normalized_and_nan_stays_in_its_row(dtype):
    plain, layer = two_layers(dtype)
    x = random_x(6, dtype)
    x[1] = 7  # all alike: the variance is 0
    x[2] += 1000  # a mean far above the differences
    x[3, 5] = math.nan
    x[4, 0] = math.inf
    got, want = layer(x, mixed, ALL_ROWS), plain.double()(x.double(), mixed, ALL_ROWS)
    assert got[3:5].isnan().all() and want[3:5].isnan().all()
    finite = [0, 1, 2, 5]
    error = (got - want)[finite].abs().amax(1)
    assert (error <= BOUNDS[dtype] * want[finite].abs().amax(1)).all()


@torch.inference_mode()
def test_a_product_that_was_replaced_or_dropout_uses_the_modules():
    plain, layer = two_layers()
    x = random_x(3, torch.float32)
    want = layer(x, mixed, ALL_ROWS)
    layer.attn.c_proj = nn.Sequential(layer.attn.c_proj, nn.Tanh())  # as the sum over processes
    assert not torch.equal(layer(x, mixed, ALL_ROWS), want)
    plain.attn.c_proj = nn.Sequential(plain.attn.c_proj, nn.Tanh())
    torch.testing.assert_close(layer(x, mixed, ALL_ROWS), plain(x, mixed, ALL_ROWS))
    _, layer = two_layers(dropout=0.5)
    before = layer(x, mixed, ALL_ROWS)
    assert not torch.equal(layer.train()(x, mixed, ALL_ROWS), before)
    assert torch.equal(layer.eval()(x, mixed, ALL_ROWS), before)


@torch.inference_mode()
def test_both_calls_use_all_threads_after_attention_that_used_fewer(set_threads, monkeypatch):
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one core")
    set_threads(2)
    _, layer = two_layers()
    counts = []
    for name in ("normalize_and_multiply", "finish_layer"):
        note = lambda *_: counts.append(numba.get_num_threads())  # noqa: E731
        monkeypatch.setattr(layer_cpu, name, note)

    def attend(number, q, k, v):
        use_openmp_threads(1)
        return q

    layer(layer(random_x(1, torch.float32), attend, ALL_ROWS), attend, ALL_ROWS)
    assert counts == [2, 2, 2, 2]


def test_several_threads_compute_at_once(set_threads):
    set_threads(2)
    _, layer = two_layers()

    def work(seed):
        x = random_x(20, torch.float32, seed=seed)
        want = layer(x, mixed, ALL_ROWS)

        def run():
            torch.set_num_threads(2)
            for _ in range(30):
                assert torch.equal(layer(x, mixed, ALL_ROWS), want)

        return run

    in_threads(work(1), work(2))


@pytest.mark.parametrize(
    ("options", "is_compiled"),
    [
        ({}, True),
        ({"n_embd": 776, "n_head": 8}, True),
        ({"n_embd": 770, "n_head": 10}, False),  # its inputs are padded
        ({"activation_function": "relu"}, False),
        ({"activation_function": "gelu"}, False),
    ],
)
def test_pack_compiles_a_layer_of_panels_without_padding(options, is_compiled):
    config = GPTConfig(vocab_size=97, max_seq_len=8, n_layer=2, n_inner=40, **options)
    model = pack(GPT(config).eval())
    kind = PanelLayer if is_compiled else Layer
    assert [type(layer) for layer in model.h] == [kind] * 2
    assert not any(layer.training for layer in model.h)
    names = [name for name, _ in GPT(config).named_parameters()]
    assert [name for name, _ in model.named_parameters() if name != "lm_head.weight"] == names


@pytest.mark.skipif(can_multiply_pairs(), reason="the processor multiplies pairs")
def test_without_products_of_pairs_a_layer_in_bfloat16_keeps_its_modules():
    model = pack(GPT(GPTConfig(vocab_size=97, max_seq_len=8, n_layer=1)).bfloat16().eval())
    assert type(model.h[0]) is Layer
