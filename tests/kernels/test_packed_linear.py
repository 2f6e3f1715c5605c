"""packed_linear.py: the same results from reordered weights, used only where they are faster."""

import gc
import platform
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baselines import attend_without_cache
from kernels import linear_cpu, packed_linear
from kernels.linear_cpu import PanelLinear, can_use_panels
from kernels.packed_linear import FUSED, PAYS_FROM, PackedLinear, can_pack, is_packed, pack
from llm import LLM, SamplingParams
from model import ACTIVATIONS, GPT, GPTConfig

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # of the largest number; bfloat16 has 8 bits

needs_onednn = pytest.mark.skipif(
    not can_pack("cpu", torch.float32), reason="PyTorch packs no weights on this machine"
)
EACH_DTYPE = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            dtype,
            marks=pytest.mark.skipif(
                not can_pack("cpu", dtype), reason=f"PyTorch packs no {dtype} on this machine"
            ),
        )
        for dtype in BOUNDS
    ],
)


def wide_gpt(dtype=torch.float32, **options):
    """A small model of the smallest width that is packed in float32."""
    config = GPTConfig(vocab_size=97, max_seq_len=64, n_layer=2, n_inner=40, **options)
    return GPT(config).init_weights(std=0.2).eval().to(dtype)


@torch.inference_mode()
def logits_of(model, rows=7):
    ids = torch.arange(rows) * 11 % 97
    attend = attend_without_cache([0], [rows])
    return model.logits(model(ids, torch.arange(rows), attend)).double()


def without_panels(monkeypatch):
    """Make panels impossible, as without Numba or with a matrix unit for bfloat16."""
    monkeypatch.setattr(linear_cpu, "can_use_panels", lambda dtype: False)


@pytest.fixture(params=[PanelLinear, PackedLinear])
def kind(request, monkeypatch):
    """Runs a test with each kind of layer, and makes `pack` choose that kind."""
    dtype = request.node.callspec.params.get("dtype", torch.float32)
    dtype = dtype if dtype in PAYS_FROM else torch.float32
    if request.param is PackedLinear:
        without_panels(monkeypatch)
        if not can_pack("cpu", dtype):
            pytest.skip("PyTorch packs no weights on this machine")
    elif not can_use_panels(dtype):
        pytest.skip(f"no panels of {dtype} on this machine")
    return request.param


def linear_layers(model):
    """A model's linear layers, by name."""
    return {
        name: module for name, module in model.named_modules() if hasattr(module, "in_features")
    }


# ---- one layer -----------------------------------------------------------------------------------
@EACH_DTYPE
@pytest.mark.parametrize("rows", [0, 1, pytest.param(3, marks=pytest.mark.oracle), 17, 300])
@pytest.mark.parametrize("activation", [None, *FUSED])
@torch.inference_mode()
def test_a_packed_layer_computes_what_the_plain_one_and_its_activation_do(activation, dtype, rows):
    torch.manual_seed(rows)
    linear = nn.Linear(48, 80, dtype=dtype)
    x = torch.randn(rows, 48).to(dtype)
    want = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    want = ACTIVATIONS[activation](want) if activation else want
    got = PackedLinear(linear, activation)(x)
    assert got.dtype == dtype and got.shape == (rows, 80)
    largest = max(1.0, want.abs().max().item()) if rows else 1.0
    torch.testing.assert_close(got.double(), want, atol=BOUNDS[dtype] * largest, rtol=0)


# ---- a model -------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_packed_model_gives_the_same_logits(kind, dtype, activation, tied):
    options = {"activation_function": activation, "tie_word_embeddings": tied}
    plain, packed = wide_gpt(dtype, **options), wide_gpt(dtype, **options)
    assert pack(packed) is packed and is_packed(packed) and not is_packed(plain)
    assert {type(layer) for layer in linear_layers(packed).values()} == {kind}
    want, got = logits_of(plain), logits_of(packed)
    # Two layers multiply each other's errors.
    assert (got - want).abs().max() <= 3 * BOUNDS[dtype] * want.abs().max()
    assert len(set(want.argmax(-1).tolist())) > 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_packing_changes_neither_the_number_of_parameters_nor_any_layers_sizes(kind, dtype, tied):
    model = wide_gpt(dtype, tie_word_embeddings=tied)
    number, layers = model.num_parameters(), linear_layers(model)
    sizes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    assert number == sum(parameter.numel() for parameter in model.parameters())
    pack(model)
    assert is_packed(model) and model.num_parameters() == number
    layers = linear_layers(model).items()
    assert {name: (layer.in_features, layer.out_features) for name, layer in layers} == sizes
    assert len(sizes) == 2 * 4 + 1
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_embedding_keeps_its_memory_and_the_plain_weights_are_freed(kind):
    model = wide_gpt()
    embedding, tied = model.wte.weight.data_ptr(), model.lm_head.weight
    gone = [weakref.ref(p) for name, p in model.named_parameters() if name.endswith("c_fc.weight")]
    assert tied is model.wte.weight
    pack(model)
    gc.collect()
    assert model.wte.weight.data_ptr() == embedding
    assert len(gone) == 2 and all(reference() is None for reference in gone)


# ---- where it is faster --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dtype", "n_embd", "is_to_be_packed"),
    [
        (torch.float32, 768, True),
        (torch.float32, 64, False),  # a call takes longer than it saves
        (torch.bfloat16, 64, True),
        (torch.float64, 768, False),
        (torch.float16, 768, False),
    ],
)
def test_packed_where_it_was_measured_to_pay(kind, dtype, n_embd, is_to_be_packed):
    config = GPTConfig(vocab_size=97, n_layer=1, n_head=1, n_embd=n_embd, n_inner=16)
    assert is_packed(pack(GPT(config).to(dtype))) == is_to_be_packed


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64")
    or not torch.backends.mkldnn.is_available(),
    reason="PyTorch brings no oneDNN for this machine",
)
def test_where_pytorch_has_onednn_it_is_used():
    """Otherwise a mistake in PackedLinear would only switch packing off."""
    assert can_pack("cpu", torch.float32)


def test_nothing_is_packed_on_a_gpu_in_float64_or_on_another_kind_of_processor(monkeypatch):
    assert not can_pack("cpu", torch.float64)
    assert not can_pack("cuda", torch.float32)
    can_pack.cache_clear()
    monkeypatch.setattr(packed_linear.platform, "machine", lambda: "arm64")
    assert not can_pack("cpu", torch.float32)
    can_pack.cache_clear()


def test_a_model_that_is_not_in_host_memory_is_not_packed():
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=1))
    assert not is_packed(pack(model))


@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_a_pytorch_without_these_operators_keeps_its_plain_layers(monkeypatch, error):
    def missing(self, *args):
        raise error("no such operator")

    can_pack.cache_clear()
    without_panels(monkeypatch)
    monkeypatch.setattr(PackedLinear, "__init__", missing)
    model = wide_gpt()
    assert not is_packed(pack(model))
    can_pack.cache_clear()
    assert logits_of(model).isfinite().all()


@needs_onednn
def test_a_library_that_computes_something_else_is_not_used(monkeypatch):
    can_pack.cache_clear()
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: torch.zeros(len(x), 64))
    assert not can_pack("cpu", torch.float32)
    can_pack.cache_clear()


# ---- in the engine -------------------------------------------------------------------------------
def test_an_llm_packs_the_model_that_it_loads_and_writes_the_same_tokens(kind, tmp_path):
    from checkpoints.train_tiny import save_model

    save_model(wide_gpt(), tmp_path, torch.float32)
    prompts, params = [[5, 6, 7], [9] * 20], SamplingParams(temperature=0, max_tokens=12)
    texts = []
    for llm in (LLM(tmp_path, kv_cache_mb=4), LLM(wide_gpt(), kv_cache_mb=4)):
        assert is_packed(llm.model) == (not texts)  # a GPT that is passed in stays as it is
        outputs = llm.generate(prompts, params)
        texts.append([output.outputs[0].token_ids for output in outputs])
    assert texts[0] == texts[1]
    assert len({token for text in texts[0] for token in text}) > 2


@pytest.mark.parametrize("dtype", BOUNDS)
def test_in_panels_a_requests_probabilities_are_the_same_bits_alone_and_among_others(
    dtype, tmp_path
):
    """Attention and panels add each row in an order that does not depend on the batch.

    (In float32 neither the plain product nor oneDNN's of 3,072 inputs passes this.)
    """
    from checkpoints.train_tiny import save_model

    if not can_use_panels(dtype):
        pytest.skip(f"no panels of {dtype} on this machine")
    config = GPTConfig(vocab_size=97, max_seq_len=64, n_layer=2)  # as wide as GPT-2
    save_model(GPT(config).init_weights(), tmp_path, torch.float32)
    # Without a prefix cache: the attention of a whole prompt adds in another order than of its end.
    options = {"max_num_seqs": 16, "kv_cache_mb": 8, "enable_prefix_caching": False}
    llm = LLM(tmp_path, dtype=str(dtype)[6:], **options)
    prompts = [[5 + i * 7 % 90] * n for i, n in enumerate((1, 2, 3, 8, 9, 17, 30, 33, 40, 4, 5))]
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=3)
    together = llm.generate(prompts, params)
    for prompt, among_others in zip(prompts, together, strict=True):
        (alone,) = llm.generate([prompt], params)
        assert alone.outputs[0].token_ids == among_others.outputs[0].token_ids
        assert alone.outputs[0].logprobs == among_others.outputs[0].logprobs
