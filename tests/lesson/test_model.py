"""The model against transformers' GPT-2, and what its one socket promises.

Weights are random with std 0.2, biases and gains of the LayerNorms included: with GPT-2's own 0.02
and biases of zero a forgotten bias or a wrong scale hides in the tolerance. In float64 the bound
is 1e-9 and the shapes are arbitrary. In float32 it is 1e-4 and the shapes are narrow: the scores
of a wide random model reach the hundreds, where the softmax multiplies the last bits of any two
implementations.
"""

import copy
import dataclasses
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from checkpoints.load import load_model
from checkpoints.train_tiny import save_model
from model import GPT, GPTConfig, attend_one_sequence

BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-9}


def fill(model, std=0.2, seed=0):
    """Random numbers in all parameters of either kind of model, biases and gains as well."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std, generator=generator)
            if ".ln_" in name and name.endswith("weight"):
                parameter += 1.0
    return model


def transformers_gpt2(dtype, std=0.2, **fields):
    """A GPT-2 as transformers builds it; attention written out, as in the paper."""
    small = {"vocab_size": 61, "n_positions": 32, "bos_token_id": 60, "eos_token_id": 60}
    config = GPT2Config(**(small | fields), attn_implementation="eager")
    return fill(GPT2LMHeadModel(config), std).to(dtype).eval()


def random_ids(num_tokens, vocab_size, seed=1):
    return torch.randint(vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def logits(model, ids, attend=attend_one_sequence):
    """All logits (T, V) of one sequence."""
    return model.logits(model(ids, torch.arange(len(ids)), attend))


@torch.inference_mode()
def largest_difference(ours, theirs, num_tokens=32):
    """The largest difference of the logits over all positions and the whole vocabulary."""
    ids = random_ids(num_tokens, ours.config.vocab_size)
    return (logits(ours, ids) - theirs(ids[None]).logits[0]).abs().max().item()


# ---- transformers' GPT-2 is the oracle -----------------------------------------------------------
SMALL = {"n_layer": 2, "n_head": 3, "n_embd": 48}
SHAPES = {  # what `test_any_shape` draws no extremes of
    "three heads of 16": SMALL,
    "seven heads of 17": {"n_layer": 1, "n_head": 7, "n_embd": 119},
    "a narrow MLP": SMALL | {"n_inner": 17},
    "the exact gelu": SMALL | {"activation_function": "gelu"},
    "relu": SMALL | {"activation_function": "relu"},
    "scores scaled by layer": SMALL | {"n_layer": 4, "scale_attn_by_inverse_layer_idx": True},
    "scores not scaled": SMALL | {"scale_attn_weights": False},
    "a large epsilon": SMALL | {"layer_norm_epsilon": 0.3},
    "a head of its own": SMALL | {"tie_word_embeddings": False},
    "scores upcast": SMALL | {"reorder_and_upcast_attn": True},
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_that_transformers_wrote_has_transformers_logits(name, tmp_path):
    theirs = transformers_gpt2(torch.float32, **SHAPES[name])
    theirs.save_pretrained(tmp_path)
    assert largest_difference(load_model(tmp_path), theirs) < BOUNDS[torch.float32]
    if name != "scores upcast":  # transformers casts these to float32 even in a float64 model
        ours = load_model(tmp_path, dtype=torch.float64)
        assert largest_difference(ours, theirs.double()) < BOUNDS[torch.float64]


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    n_layer=st.integers(1, 4),
    n_head=st.integers(1, 5),
    head_dim=st.integers(16, 96),
    n_inner=st.none() | st.integers(1, 300),
    activation_function=st.sampled_from(["gelu_new", "gelu", "relu"]),
    layer_norm_epsilon=st.sampled_from([1e-12, 1e-5, 1e-2]),
    scale_attn_weights=st.booleans(),
    scale_attn_by_inverse_layer_idx=st.booleans(),
    tie_word_embeddings=st.booleans(),
)
def test_any_shape_has_transformers_logits_in_float64(tmp_path_factory, head_dim, **fields):
    fields["n_embd"] = fields["n_head"] * head_dim
    theirs = transformers_gpt2(torch.float64, **fields)
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    ours = load_model(folder, dtype=torch.float64)
    assert largest_difference(ours, theirs) < BOUNDS[torch.float64]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", ["three heads of 16", "a narrow MLP", "scores scaled by layer"])
def test_transformers_reads_what_we_write(name, dtype, tmp_path):
    config = GPTConfig(vocab_size=61, max_seq_len=32, **SHAPES[name], eos_token_id=60)
    ours = fill(GPT(config)).to(dtype).eval()
    save_model(ours, tmp_path, dtype)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=dtype).eval()
    assert largest_difference(ours, theirs) < BOUNDS[dtype]


@pytest.mark.slow
def test_the_124m_shape_has_transformers_logits(tmp_path):
    """Weights have std 0.02 here, as GPT-2's: at this width 0.2 means scores in the thousands."""
    shape = {"vocab_size": 50257, "n_positions": 1024, "eos_token_id": 50256}
    theirs = transformers_gpt2(torch.float32, std=0.02, **shape)  # its other defaults are the 124M
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.config == GPTConfig(eos_token_id=50256)
    assert ours.num_parameters() == 124_439_808
    assert largest_difference(ours, theirs) < BOUNDS[torch.float32]
    ours = load_model(tmp_path, dtype=torch.float64)
    assert largest_difference(ours, theirs.double()) < BOUNDS[torch.float64]


def test_the_shipped_model_has_transformers_logits_to_its_last_position(shipped_model_folder):
    theirs = GPT2LMHeadModel.from_pretrained(shipped_model_folder, dtype=torch.float32).eval()
    ours = load_model(shipped_model_folder)
    assert ours.config.max_seq_len == 1024
    assert largest_difference(ours, theirs, num_tokens=1024) < BOUNDS[torch.float32]


# ---- the socket ----------------------------------------------------------------------------------
def attend_several(lengths):
    """Sequences of these lengths lie end to end; each attends to itself, one after another."""

    def attend(layer, q, k, v):
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([attend_one_sequence(layer, *part) for part in parts])

    return attend


def test_sequences_laid_end_to_end_have_the_logits_of_each_alone(tiny_gpt):
    model = tiny_gpt(dtype=torch.float64)
    lengths = [7, 1, 12, 3]
    sequences = [random_ids(n, 97, seed=n) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.inference_mode():
        hidden = model(torch.cat(sequences), positions, attend_several(lengths))
        together = model.logits(hidden).split(lengths)
    for ids, rows in zip(sequences, together, strict=True):
        torch.testing.assert_close(rows, logits(model, ids), rtol=0, atol=1e-12)


def test_a_wrong_boundary_between_two_sequences_shows_in_the_logits(tiny_gpt):
    """The mutation of the test above: without it a socket that ignores lengths might pass."""
    model = tiny_gpt(dtype=torch.float64)
    ids = random_ids(8, 97)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    with torch.inference_mode():
        right = model(ids, positions, attend_several([4, 4]))
        wrong = model(ids, positions, attend_several([3, 5]))
    assert torch.equal(right[:3], wrong[:3])
    assert (right[3:] - wrong[3:]).abs().amax(dim=1).gt(1e-3).all()


def test_the_socket_is_asked_once_a_layer_in_order(tiny_gpt):
    calls = []

    def attend(layer, q, k, v):
        calls.append((layer, *(tuple(x.shape) for x in (q, k, v))))
        return attend_one_sequence(layer, q, k, v)

    logits(tiny_gpt(n_layer=3), random_ids(5, 97), attend)
    per_head = (5, 4, 16)  # N tokens, H heads, D numbers
    assert calls == [(layer, per_head, per_head, per_head) for layer in range(3)]


def test_q_k_and_v_are_views_of_one_product_with_only_the_last_dimension_contiguous(tiny_gpt):
    """Kernels are given these strides, so none may assume that a token's heads follow its N."""
    seen = []

    def attend(layer, q, k, v):
        seen.append((q, k, v))
        return attend_one_sequence(layer, q, k, v)

    logits(tiny_gpt(n_layer=1), random_ids(5, 97), attend)
    [(q, k, v)] = seen
    assert q.stride() == k.stride() == v.stride() == (192, 16, 1)  # a row holds 3 x 64 numbers
    assert not q.is_contiguous()
    assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert (q.storage_offset(), k.storage_offset(), v.storage_offset()) == (0, 64, 128)


@pytest.mark.parametrize(
    ("fields", "factors"),
    [
        ({}, [1.0, 1.0, 1.0]),
        ({"scale_attn_weights": False}, [4.0, 4.0, 4.0]),  # undoes the socket's 1 / sqrt(16)
        ({"scale_attn_by_inverse_layer_idx": True}, [1.0, 1 / 2, 1 / 3]),
    ],
)
def test_a_layers_own_scale_is_multiplied_into_q_so_the_socket_never_learns_of_it(fields, factors):
    model = GPT(GPTConfig(61, 32, n_layer=3, n_head=3, n_embd=48, **fields))
    assert [layer.attn.q_scale for layer in model.h] == pytest.approx(factors)


def test_the_model_keeps_nothing_between_two_calls(tiny_gpt):
    model, ids = tiny_gpt(), random_ids(20, 97)
    before = copy.deepcopy(model.state_dict())
    first = logits(model, ids)
    logits(model, random_ids(33, 97, seed=2))
    assert torch.equal(logits(model, ids), first)
    assert list(model.buffers()) == []  # no mask, no cache
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("rows", [[8], [0, 3, 8], [5, 5, 2], [], slice(None), slice(7, 9)])
def test_chosen_rows_have_the_hidden_states_that_they_have_among_all(rows, tiny_gpt):
    model, ids = tiny_gpt(), torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5])
    rows = torch.tensor(rows, dtype=torch.int64) if isinstance(rows, list) else rows
    everything = model(ids, torch.arange(9), attend_one_sequence)
    chosen = model(ids, torch.arange(9), attend_one_sequence, rows)
    torch.testing.assert_close(chosen, everything[rows], rtol=1e-5, atol=1e-5)
    assert chosen.shape == everything[rows].shape


def test_behind_the_last_attention_only_chosen_rows_are_computed(tiny_gpt):
    model, widths = tiny_gpt(), []
    for layer in model.h:
        layer.mlp.register_forward_hook(lambda _, args, out: widths.append(len(args[0])))
    model(torch.arange(9), torch.arange(9), attend_one_sequence, torch.tensor([8]))
    assert widths == [9] * (len(model.h) - 1) + [1]


def test_logits_are_computed_for_the_rows_that_are_asked_for(tiny_gpt):
    model, ids = tiny_gpt(dtype=torch.float64), random_ids(10, 97)
    with torch.inference_mode():
        hidden = model(ids, torch.arange(10), attend_one_sequence)
        assert hidden.shape == (10, 64)
        rows = model.logits(hidden[[9, 2]])
    assert rows.shape == (2, 97)
    torch.testing.assert_close(rows, logits(model, ids)[[9, 2]], rtol=0, atol=1e-12)


# ---- what a token may see ------------------------------------------------------------------------
@pytest.mark.parametrize("changed", [0, 1, 7, 15])
def test_a_token_changes_no_logits_before_it_and_all_from_it_on(tiny_gpt, changed):
    model, ids = tiny_gpt(dtype=torch.float64), random_ids(16, 97)
    other = ids.clone()
    other[changed] = (ids[changed] + 1) % 97
    moved = (logits(model, ids) - logits(model, other)).abs().amax(dim=1)  # (16,)
    assert (moved[:changed] < 1e-12).all()
    assert (moved[changed:] > 1e-6).all()


def test_attend_one_sequence_is_the_causal_softmax_written_out():
    q, k, v = torch.randn(3, 6, 2, 8, generator=torch.Generator().manual_seed(0)).double()
    out = attend_one_sequence(0, q, k, v)
    for t in range(6):
        for head in range(2):
            scores = k[: t + 1, head] @ q[t, head] / math.sqrt(8)
            expected = scores.softmax(0) @ v[: t + 1, head]
            torch.testing.assert_close(out[t, head], expected, rtol=0, atol=1e-12)


def test_a_position_beyond_max_seq_len_is_an_error_not_a_wrong_answer(tiny_gpt):
    model = tiny_gpt()  # max_seq_len 64
    with pytest.raises(IndexError):
        model(torch.tensor([5]), torch.tensor([64]), attend_one_sequence)


def test_the_models_of_these_tests_write_more_than_one_token(tiny_gpt):
    """With std 0.02 this is a set of one token, and tests of token equality prove nothing."""
    model, ids = tiny_gpt(), random_ids(4, 97)
    for _ in range(30):
        ids = torch.cat([ids, logits(model, ids)[-1:].argmax(dim=-1)])
    assert len(set(ids[4:].tolist())) >= 5


# ---- the configuration ---------------------------------------------------------------------------
def test_the_defaults_are_the_124m_model():
    with torch.device("meta"):
        model = GPT(GPTConfig())
        untied = GPT(GPTConfig(tie_word_embeddings=False))
    assert model.num_parameters() == 124_439_808  # the tied head is counted once
    assert untied.num_parameters() == 124_439_808 + 50_257 * 768
    assert GPTConfig().head_dim == 64


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "dtype", "expected"),
    [
        (12, 12, 768, torch.bfloat16, 36_864),
        (12, 12, 768, torch.float32, 73_728),
        (12, 8, 768, torch.float16, 36_864),  # the number of heads changes nothing
        (48, 25, 1600, torch.float16, 307_200),
    ],
)
def test_kv_bytes_of_a_token(n_layer, n_head, n_embd, dtype, expected):
    config = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    assert config.kv_bytes_per_token(dtype) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0: it must be at least 1"),
        ({"max_seq_len": 0}, "max_seq_len is 0: it must be at least 1"),
        ({"n_layer": 0}, "n_layer is 0: it must be at least 1"),
        ({"n_head": 0}, "n_head is 0: it must be at least 1"),
        ({"n_embd": -768}, "n_embd is -768: it must be at least 1"),
        ({"n_inner": 0}, "n_inner is 0: it must be at least 1, or None"),
        ({"n_head": 7}, "n_embd 768 is not a multiple of n_head 7: heads would differ"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon is -1e-05: it must be finite"),
        ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon is nan: it must be finite"),
        (
            {"activation_function": "swish"},
            "activation_function is 'swish': choose one of gelu_new, gelu, relu",
        ),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_name_and_number(fields, message):
    with pytest.raises(ValueError, match="^" + message):
        GPTConfig(**fields)


def test_a_configuration_cannot_be_changed_after_the_fact():
    config = GPTConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_layer = 24


# ---- weights and training ------------------------------------------------------------------------
def test_initial_weights_have_gpt2s_spread():
    model = GPT(GPTConfig(vocab_size=1000, max_seq_len=256, n_layer=8, n_head=4, n_embd=256))
    model.init_weights()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.eq(0).all(), name
        elif parameter.ndim == 1:
            assert parameter.eq(1).all(), name
        else:  # 0.02 / sqrt(2 * 8 layers) where a product is added to the residual stream
            expected = 0.005 if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(parameter.mean().item()) < 0.1 * expected, name


def test_initial_weights_are_a_function_of_the_seed(tiny_gpt):
    shape = GPTConfig(97, 64, 2, 4, 64)
    torch.manual_seed(0)  # the generator that everybody shares has no say in it
    first = GPT(shape).init_weights(std=0.2, seed=3).state_dict()
    torch.manual_seed(1)
    again = GPT(shape).init_weights(std=0.2, seed=3).state_dict()
    other = GPT(shape).init_weights(std=0.2, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["wte.weight"], other["wte.weight"])


def test_the_output_head_is_the_input_embedding_unless_it_has_weights_of_its_own():
    tied = GPT(GPTConfig(97, 64, 2, 4, 64))
    untied = GPT(GPTConfig(97, 64, 2, 4, 64, tie_word_embeddings=False))
    assert tied.lm_head.weight is tied.wte.weight
    assert untied.lm_head.weight is not untied.wte.weight


def test_dropout_does_nothing_in_eval_mode_and_something_in_training(tiny_gpt):
    ids = random_ids(20, 97)
    with_dropout = copy.deepcopy(tiny_gpt(dropout=0.5))
    assert torch.equal(logits(with_dropout, ids), logits(tiny_gpt(), ids))
    with_dropout.train()
    torch.manual_seed(0)
    runs = [logits(with_dropout, ids) for _ in range(3)]
    assert all((a - b).abs().max() > 0.1 for a, b in pairwise(runs))


def test_gradients_reach_every_weight():
    model = GPT(GPTConfig(97, 64, 2, 4, 64)).init_weights(std=0.2)
    ids = random_ids(65, 97)
    hidden = model(ids[:-1], torch.arange(64), attend_one_sequence)
    F.cross_entropy(model.logits(hidden), ids[1:]).backward()
    silent = [name for name, p in model.named_parameters() if not p.grad.abs().sum() > 0]
    assert silent == []
