"""quantized_weights.py: integers with a scale, the same bits from each form, and what they cost."""

import gc
import math
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from baselines import attend_without_cache
from kernels import int8_linear_cpu
from kernels.int8_linear_cpu import Int8PanelLinear, can_multiply_bytes, has_vnni
from llm import LLM, SamplingParams
from model import ACTIVATIONS, GPT, GPTConfig, attend_one_sequence
from speedups import quantized_weights
from speedups.quantized_weights import Int8Linear, WeightOnlyLinear, quantize, quantize_rows

needs_vnni = pytest.mark.skipif(not can_multiply_bytes(), reason="no VNNI, Numba or OpenMP here")
FORMS = [Int8Linear, pytest.param(Int8PanelLinear, marks=needs_vnni)]
EACH_FORM = pytest.mark.parametrize("form", FORMS)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def random_layer(inputs, outputs, bias=True, seed=0):
    """The arguments of a layer in eight bits, and nn.Linear with the same weights."""
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias=bias)
    return (*quantize_rows(linear.weight), linear.bias), linear


def sums_by_hand(x, integers, scales, bias):
    """The definition: exact sums of integers, times both scales, plus the bias, in this order."""
    x_integers, row_scales = quantize_rows(x)
    sums = (x_integers[:, None].long() * integers[None].long()).sum(-1)
    out = sums.float() * (row_scales[:, None] * scales)
    return out if bias is None else out + bias


# ---- integers ------------------------------------------------------------------------------------
def test_a_row_becomes_integers_and_a_scale():
    integers, scales = quantize_rows(torch.tensor([[0.30, -0.12, 0.05, -0.60], [0, 0, 0, 0]]))
    assert integers.tolist() == [[64, -25, 11, -127], [0, 0, 0, 0]]  # 0.30 / 0.60 * 127 = 63.5
    assert integers.dtype == torch.int8
    assert scales.tolist() == [pytest.approx(0.60 / 127), 0]


def test_each_row_has_the_scale_of_its_own_largest_number():
    x = torch.tensor([[1.0, -0.5], [1000.0, -0.5]])
    integers, scales = quantize_rows(x)
    assert integers.tolist() == [[127, -64], [127, 0]]  # 63.5 is rounded to the even 64
    assert (integers * scales[:, None] - x).abs().amax(1).tolist() <= (scales / 2).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_has_the_scale_nan_and_no_other_row_has(bad):
    integers, scales = quantize_rows(torch.tensor([[1.0, bad, 3.0], [1.0, 2.0, 3.0]]))
    assert integers[0].tolist() == [0, 0, 0] and scales[0].isnan()
    assert integers[1].tolist() == [42, 85, 127] and scales[1].item() == pytest.approx(3 / 127)


# ---- a layer -------------------------------------------------------------------------------------
@EACH_FORM
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 80),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 130),
    bias=st.booleans(),
    seed=st.integers(0, 100),
)
@example(rows=3, inputs=1, outputs=2, bias=True, seed=0)  # where PyTorch's `_int_mm` is wrong
def test_any_size_has_the_bits_of_the_definition(form, rows, inputs, outputs, bias, seed):
    made_of, linear = random_layer(inputs, outputs, bias, seed)
    x = torch.randn(rows, inputs) * torch.logspace(-20, 20, rows)[:, None]
    got = form(*made_of)(x)
    assert got.shape == (rows, outputs)
    assert torch.equal(got, sums_by_hand(x, *made_of))


@EACH_FORM
@pytest.mark.parametrize("inputs", [768, 3072, 6400])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_integers_are_added_exactly(form, inputs, sign, monkeypatch):
    """In 16 bits two such products would be cut off at 32,767; a float32 ends at 2^24."""
    integers = torch.full((50, inputs), 127 * sign, dtype=torch.int8)
    integers[:, 0] = 1  # an odd sum
    layer, x = form(integers, torch.full((50,), 1 / 128), None), torch.full((3, inputs), 127.0)
    want = torch.full((3, 50), (127 * 127 * (inputs - 1) * sign + 127) / 128)
    assert torch.equal(layer(x), want)
    monkeypatch.setattr(quantized_weights, "multiplies_integers_exactly", lambda: False)
    assert torch.equal(layer(x), want)


@EACH_FORM
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(form, dtype, threads, set_threads):
    set_threads(threads)
    # PyTorch's own activation rounds the last few numbers of a tensor differently.
    activation = None if form is Int8Linear else "gelu_new"
    layer, x = form(*random_layer(768, 145)[0], activation), torch.randn(67, 768).to(dtype)
    x[5] *= 1000  # its scale is no other row's
    together = layer(x)
    assert together.dtype == dtype
    for row in (0, 4, 5, 7, 8, 63, 64, 66):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])
    for num_rows in (2, 7, 8, 9, 65):
        assert torch.equal(layer(x[:num_rows]), together[:num_rows])


@EACH_FORM
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_own_row(form, bad):
    layer, x = form(*random_layer(48, 50)[0]), torch.randn(20, 48)
    want = layer(x)
    x[3, 0] = x[19, 47] = bad
    got = layer(x)
    is_bad = torch.tensor([row in (3, 19) for row in range(20)])
    assert got[is_bad].isnan().all()
    assert torch.equal(got[~is_bad], want[~is_bad])


@needs_vnni
def test_the_panels_own_rows_of_integers_are_the_plain_ones():
    """Numbers of every size, the largest exactly at 127, and a row with an infinity."""
    x = torch.randn(7, 301) * torch.logspace(-44, 38, 7)[:, None]
    x[6, 0], x[5, 9], x[2] = 3e38, -math.inf, 0
    integers = torch.empty(7, 301, dtype=torch.uint8)
    scales = [
        int8_linear_cpu.quantize_row(row.numpy(), into.numpy())
        for row, into in zip(x, integers, strict=True)
    ]
    want, want_scales = quantize_rows(x)
    assert torch.equal(integers.int() - 128, want.int())
    assert want_scales.isnan().tolist() == [row == 5 for row in range(7)]
    assert torch.tensor(scales).view(torch.int32).tolist() == want_scales.view(torch.int32).tolist()


@EACH_FORM
def test_the_activation_follows(form):
    made_of, x = random_layer(47, 50)[0], torch.randn(9, 47) * 8
    want = ACTIVATIONS["gelu_new"](form(*made_of)(x))
    torch.testing.assert_close(form(*made_of, "gelu_new")(x), want, atol=1e-6, rtol=1e-5)


@needs_vnni
def test_a_view_is_multiplied_and_another_width_is_refused():
    made_of = random_layer(47, 50)[0]
    wide = torch.full((30, 3 * 47), math.nan)
    wide[::3, 47:94] = torch.randn(10, 47)
    part, layer = wide[::3, 47:94], Int8PanelLinear(*made_of)
    assert torch.equal(layer(part), sums_by_hand(part, *made_of))
    with pytest.raises(ValueError, match=r"x is \(4, 46\): this layer takes \(N, 47\)"):
        layer(torch.zeros(4, 46))


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_only_the_weights_are_in_eight_bits(dtype):
    (integers, scales, bias), _ = random_layer(64, 40)
    x = torch.randn(9, 64).to(dtype)
    got = WeightOnlyLinear(integers, scales, bias.to(dtype), "gelu_new")(x)
    want = F.linear(x.double(), integers.double() * scales[:, None].double(), bias.double())
    bound = 1e-5 if dtype == torch.float32 else 0.02
    assert got.dtype == dtype
    want = F.gelu(want, approximate="tanh")
    torch.testing.assert_close(got.double(), want, atol=bound, rtol=bound)


# ---- a model -------------------------------------------------------------------------------------
def small_gpt(**options):
    config = GPTConfig(vocab_size=97, max_seq_len=64, n_layer=2, n_head=4, n_embd=64, **options)
    return GPT(config).init_weights(std=0.2).eval().requires_grad_(False)


def logits_of(model, rows=40):
    ids = torch.arange(rows) * 11 % 97
    return model.logits(model(ids, torch.arange(rows), attend_without_cache([0], [rows])))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_models_layers_are_replaced_and_its_embedding_is_not(is_tied, activation):
    model = small_gpt(tie_word_embeddings=is_tied, activation_function=activation)
    want, embedding = logits_of(model), model.wte.weight.clone()
    number, name = model.num_parameters(), model.wte.weight.data_ptr()
    assert quantize(model) is model
    assert not [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert model.wte.weight.data_ptr() == name and torch.equal(model.wte.weight, embedding)
    assert model.num_parameters() == number
    error = (logits_of(model) - want).abs().max() / want.abs().max()
    assert 0 < error < 0.05
    with pytest.raises(ValueError, match="replaced already: load it again"):
        quantize(model)


def test_the_float_weights_are_gone_and_the_integers_are_a_quarter():
    model = GPT(GPTConfig(vocab_size=960, max_seq_len=8, n_layer=1, n_head=1, n_embd=768))
    layers = [parameter for name, parameter in model.named_parameters() if ".c_" in name]
    gone = [weakref.ref(weight) for weight in layers if weight.ndim == 2]
    float_bytes = sum(weight.nbytes for weight in layers if weight.ndim == 2)
    assert float_bytes == 12 * 768 * 768 * 4
    del layers
    quantize(model)
    gc.collect()
    assert len(gone) == 4 and all(reference() is None for reference in gone)
    held = {p.data_ptr(): p.nbytes for p in model.parameters() if p.dtype == torch.int8}
    assert sum(held.values()) == float_bytes // 4 + 960 * 768  # all widths are whole panels
    floats = [name for name, p in model.named_parameters() if p.is_floating_point() and p.ndim == 2]
    assert floats == ["wte.weight", "wpe.weight"]


def test_without_vnni_it_is_said_once_and_the_bits_are_the_same(monkeypatch):
    want = logits_of(quantize(small_gpt(activation_function="relu")))
    monkeypatch.setattr(int8_linear_cpu, "can_multiply_bytes", lambda: False)
    quantized_weights.warn_of_slow_products.cache_clear()
    with pytest.warns(UserWarning, match="VNNI.*'int8' saves memory here, and little or no time"):
        model = quantize(small_gpt(activation_function="relu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(small_gpt())
    assert {type(layer) for layer in (model.lm_head, model.h[0].mlp.c_fc)} == {Int8Linear}
    assert torch.equal(logits_of(model), want)
    monkeypatch.setattr(quantized_weights, "multiplies_integers_exactly", lambda: False)
    assert torch.equal(logits_of(model), want)


@pytest.mark.parametrize(
    ("features", "want"),
    [
        ({"avx512f", "avx512vnni"}, True),
        ({"avx512f", "avx2", "fma"}, False),
        ({"avx512f", "avxvnni", "avx2", "fma"}, False),  # its registers are not the longest ones
        ({"avx2", "fma", "avxvnni"}, True),
        ({"avx2", "fma"}, False),
        (set(), False),
    ],
)
def test_processors_that_multiply_bytes(features, want):
    assert has_vnni(features) == want


# ---- the engine ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def shipped():
    """The shipped model in float32 and with int8 weights."""
    options = {"threads": 1, "num_blocks": 200, "device": "cpu"}
    return LLM(**options), LLM(weights="int8", **options)


def test_the_text_that_float32_writes_is_as_likely_in_eight_bits(shipped):
    """The goal is 0.01 nats a character. Text drawn from float32 weighs all tokens by chance."""
    plain, eight = shipped
    params = SamplingParams(max_tokens=150, seed=3, ignore_eos=True)
    prompts = ["Once upon a time", "The wolf said", "In the forest", "A king had"]
    losses, num_characters = {plain: 0.0, eight: 0.0}, 0
    for output in plain.generate(prompts, params, use_tqdm=False):
        ids = torch.tensor(output.prompt_token_ids + output.outputs[0].token_ids)
        num_characters += len(plain.tokenizer.decode(ids[1:].tolist()))
        for llm in shipped:
            hidden = llm.model(ids, torch.arange(len(ids)), attend_one_sequence)
            logits = llm.model.logits(hidden[:-1]).double()
            losses[llm] += F.cross_entropy(logits, ids[1:], reduction="sum").item()
    assert num_characters > 1500
    difference = (losses[eight] - losses[plain]) / num_characters
    assert 0 < abs(difference) < 0.003  # 0 would mean that nothing was quantised


def test_greedy_texts_are_the_same_alone_and_in_a_batch(shipped):
    eight = shipped[1]
    params = SamplingParams(temperature=0, max_tokens=30, logprobs=1, ignore_eos=True)
    prompts = ["Once upon a time there was", "The wolf", "A Fox once saw", "Far out at sea, the"]
    together = [output.outputs[0] for output in eight.generate(prompts, params, use_tqdm=False)]
    assert len({token for output in together for token in output.token_ids}) > 20
    for prompt, output in zip(prompts, together, strict=True):
        alone = eight.generate(prompt, params, use_tqdm=False)[0].outputs[0]
        assert (alone.token_ids, alone.logprobs) == (output.token_ids, output.logprobs)


def test_choices_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="weights is 'int4': choose float or int8"):
        LLM(weights="int4")
    with pytest.raises(ValueError, match="quantized_weights.quantize.model. first"):
        LLM(small_gpt(), weights="int8")
    for other in ("fused", "tensor_parallel"):
        with pytest.raises(ValueError, match="neither with fused nor with tensor_parallel"):
            LLM(weights="int8", **{other: True})
    model = quantize(small_gpt())
    params = SamplingParams(temperature=0, max_tokens=3)
    assert len(LLM(model, num_blocks=9).generate([[5, 6]], params)[0].outputs[0].token_ids) == 3
