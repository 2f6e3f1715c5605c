"""Every layout of a GPT-2 checkpoint in use loads; anything else is refused.

The tests write one small model in each layout and compare all its tensors bit by bit with the model
it came from, and its logits with those of transformers or of a nanoGPT written out below. Then they
break the folder, one thing at a time, and read the ValueError, which names the file and the field
or the tensor (test_weight_files.py has the hostile files).
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from fuzz_checkpoints import in_a_child, write_shards
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from checkpoints import load, train_tiny
from checkpoints.load import CONV1D, load_model, weights_kind
from checkpoints.train_tiny import save_model
from model import GPT, GPTConfig, attend_one_sequence

SAFETENSORS = "model.safetensors"
SHAPE = {"vocab_size": 61, "max_seq_len": 32, "n_layer": 2, "n_head": 3, "n_embd": 48}
CONFIG = GPTConfig(**SHAPE, eos_token_id=60)


@pytest.fixture(scope="module")
def model():
    """A model in which every number differs from every default: no zero biases, no gains of one."""
    model = GPT(CONFIG).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model.requires_grad_(False)


@pytest.fixture
def folder(model, tmp_path):
    """That model in a folder of its own, to be broken."""
    save_model(model, tmp_path, torch.float32)
    return tmp_path


def edit_config(folder, **changes):
    """Change fields of config.json; a change to `...` removes the field."""
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


def edit_tensors(folder, edit):
    """Rewrite model.safetensors after `edit(tensors)` has changed the dictionary."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def assert_same_weights(loaded, model):
    want, got = model.state_dict(), loaded.state_dict()
    assert list(want) == list(got)
    assert [name for name in want if not torch.equal(want[name], got[name])] == []


@torch.inference_mode()
def logits_of(model, ids):
    """(T,) ids -> (T, V)"""
    return model.logits(model(ids, torch.arange(len(ids)), attend_one_sequence))


# ---- what loads ----------------------------------------------------------------------------------
def test_what_is_written_is_read_back_bit_by_bit_and_ready_to_serve(model, tmp_path):
    folder = tmp_path / "new" / "folder"
    save_model(model, folder, torch.float32)
    loaded = load_model(str(folder))
    assert_same_weights(loaded, model)
    assert loaded.config == model.config
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert all(parameter.is_contiguous() for parameter in loaded.parameters())
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_finds_every_tensor_that_we_write(tied, tmp_path):
    ours = GPT(GPTConfig(**SHAPE, eos_token_id=60, tie_word_embeddings=tied))
    save_model(ours.init_weights(std=0.2).eval(), tmp_path, torch.float32)
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())  # nothing missing, unexpected or misshapen
    heads = [name for name in load_file(tmp_path / "model.safetensors") if "lm_head" in name]
    assert heads == ([] if tied else ["lm_head.weight"])  # it stands outside the prefix
    ids = torch.arange(32)
    with torch.inference_mode():
        expected = theirs.eval()(ids[None]).logits[0]
        logits = ours.logits(ours(ids, ids, attend_one_sequence))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert theirs.config.eos_token_id == 60
    assert_same_weights(load_model(tmp_path), ours)


def test_fields_that_are_missing_or_change_no_inference_are_gpt2s_defaults(folder):
    optional = ("n_inner", "activation_function", "layer_norm_epsilon", "scale_attn_weights")
    edit_config(folder, **dict.fromkeys(optional, ...))
    assert load_model(folder).config == CONFIG
    edit_config(folder, **dict.fromkeys(optional), resid_pdrop=0.5, n_ctx=7, torch_dtype="float16")
    assert load_model(folder).config == CONFIG
    edit_config(folder, layer_norm_epsilon=1)  # an integer is a number
    assert load_model(folder).config.layer_norm_epsilon == 1


# ---- every layout --------------------------------------------------------------------------------
def in_the_file(model):
    """The tensors under Hugging Face's names, in its (in, out) layout, without the tied head."""
    named = {name: t.detach() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    return {
        "transformer." + name: (t.t() if name.endswith(CONV1D) else t).contiguous()
        for name, t in named.items()
    }


def renamed(tensors, prefix):
    return {name.replace("transformer.", prefix, 1): tensor for name, tensor in tensors.items()}


def save_legacy(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def with_masks(tensors, dtype):
    """As transformers wrote it until 2023: the causal mask of each layer among the weights."""
    mask = torch.ones(32, 32).tril().to(dtype).view(1, 1, 32, 32)
    masks = {f"transformer.h.{i}.attn.bias": mask.clone() for i in range(2)}
    masks |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    return tensors | masks


def with_the_head(tensors):
    """The embedding under a second name, one storage: what torch.save writes of a tied model."""
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}


def in_one_storage(tensors):
    """All tensors as views of one flat vector, each with its own offset."""
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    pieces = flat.split([tensor.numel() for tensor in tensors.values()])
    return {n: p.view(t.shape) for (n, t), p in zip(tensors.items(), pieces, strict=True)}


def as_views(tensors):
    """The four matrices as transposed views, which no file needs to hold contiguously."""
    return {n: t.t().contiguous().t() if n.endswith(CONV1D) else t for n, t in tensors.items()}


def as_linear(tensors):
    """(out, in), as nn.Linear has it, under Hugging Face's names."""
    return {n: t.t().contiguous() if n.endswith(CONV1D) else t for n, t in tensors.items()}


def by_transformers(tensors, folder):
    """Its state dict is an OrderedDict that carries a version of each module."""
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_layer=2, n_head=3,
                                        n_embd=48))  # fmt: skip
    theirs.load_state_dict(with_the_head(tensors))
    assert theirs.state_dict()._metadata
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")


def in_shards_by_transformers(tensors, folder):
    FILES["safetensors"](tensors, folder)
    theirs = GPT2LMHeadModel.from_pretrained(folder)
    theirs.save_pretrained(folder, max_shard_size="40KB")  # 245 KB in all
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) >= 5


FILES = {  # each writes tensors into a folder
    "safetensors": lambda t, f: save_file({n: x.clone() for n, x in t.items()}, f / SAFETENSORS),
    "zip": lambda t, f: torch.save(t, f / "pytorch_model.bin"),
    "legacy": lambda t, f: save_legacy(t, f / "pytorch_model.bin"),
    "safetensors in shards": lambda t, f: write_shards(f, "model", ".safetensors", t, save_file),
    "zip in shards": lambda t, f: write_shards(f, "pytorch_model", ".bin", t, torch.save),
    "legacy in shards": lambda t, f: write_shards(f, "pytorch_model", ".bin", t, save_legacy),
}
WRAPPERS = ["module._orig_mod.transformer.", "_orig_mod.module.transformer.", "_orig_mod.",
            "transformer._orig_mod.", "module."]  # fmt: skip
CHANGED = {  # a kind of file, and what is done to the tensors before
    "safetensors, no prefix": lambda t: renamed(t, ""),
    "safetensors, nn.Linear": as_linear,
    "zip, masks": lambda t: with_masks(t, torch.bool),
    "zip, parameters": lambda t: {name: torch.nn.Parameter(tensor) for name, tensor in t.items()},
    "zip, views": as_views,
    "zip, one storage": in_one_storage,
    "zip, nn.Linear": as_linear,
    "legacy, masks and head": lambda t: with_the_head(with_masks(t, torch.uint8)),
    "legacy, one storage": lambda t: in_one_storage(as_views(t)),
    "zip, layers compiled one by one": lambda t: {
        re.sub(r"(h\.\d+\.)", r"\1_orig_mod.", name): tensor for name, tensor in t.items()
    },
    **{f"zip, {name}": lambda t, name=name: renamed(with_the_head(t), name) for name in WRAPPERS},
}


def write_layout(layout, tensors, folder):
    """Write tensors in one of the layouts, into a folder without weights."""
    (folder / SAFETENSORS).unlink(missing_ok=True)
    if layout in BY_TRANSFORMERS:
        return BY_TRANSFORMERS[layout](tensors, folder)
    FILES[layout.split(",")[0]](CHANGED.get(layout, dict)(tensors), folder)


BY_TRANSFORMERS = {
    "zip by transformers": by_transformers,
    "shards by transformers": in_shards_by_transformers,
}
LAYOUTS = [*FILES, *CHANGED, *BY_TRANSFORMERS]


@torch.inference_mode()
def their_logits_of(folder, dtype=torch.float32):
    """What transformers computes from a folder: (32, 61)."""
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return theirs.eval()(torch.arange(32)[None]).logits[0]


@pytest.fixture(scope="module")
def their_logits(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    save_model(model, folder, torch.float32)
    return their_logits_of(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors_and_logits(layout, model, their_logits, folder):
    write_layout(layout, in_the_file(model), folder)
    loaded = load_model(folder)
    assert_same_weights(loaded, model)
    assert all(parameter.is_contiguous() for parameter in loaded.parameters())
    torch.testing.assert_close(logits_of(loaded, torch.arange(32)), their_logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["safetensors", "zip", "legacy", "zip in shards"])
@pytest.mark.parametrize("tied", [False, True, ...], ids=["not tied", "tied", "not said"])
def test_a_stored_head_that_differs_is_used_whatever_the_config_says(tied, layout, model, folder):
    """As in transformers, which reads the same folder."""
    edit_config(folder, tie_word_embeddings=tied)
    head = torch.randn(61, 48, generator=torch.Generator().manual_seed(1))
    write_layout(layout, in_the_file(model) | {"lm_head.weight": head}, folder)
    loaded = load_model(folder)
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.lm_head.weight, head)
    assert torch.equal(loaded.wte.weight, model.wte.weight)
    assert torch.equal(load_model(folder, torch.bfloat16).lm_head.weight, head.bfloat16())
    want = their_logits_of(folder)
    torch.testing.assert_close(logits_of(loaded, torch.arange(32)), want, rtol=0, atol=1e-4)


def test_a_tied_model_may_be_stored_under_the_name_of_its_head(model, folder):
    """safetensors' own `save_model` keeps the first name in alphabetical order."""
    name = "transformer.wte.weight"
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop(name)}))
    assert_same_weights(load_model(folder), model)
    want = their_logits_of(folder)
    got = logits_of(load_model(folder), torch.arange(32))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_a_bias_under_the_name_of_a_mask_is_no_mask(model, folder):
    edit_tensors(folder, lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(144)}))
    assert refusal(folder).endswith("'transformer.h.0.attn.bias' has no place in this model")


def test_a_folder_that_mixes_the_two_layouts_is_refused(model, folder):
    """The first layer's c_attn says nn.Linear, the second's has the other shape."""
    name = "transformer.h.0.attn.c_attn.weight"
    edit_tensors(folder, lambda t: t.update({name: t[name].t().contiguous()}))
    message = refusal(folder)
    assert message.startswith(f"{folder / 'model.safetensors'}: tensor 'transformer.h.")
    assert " has shape " in message


# ---- nanoGPT -------------------------------------------------------------------------------------
def nanogpt_state(model, bias):
    """As its model.state_dict() has it: nn.Linear, both heads, and no biases with bias=False."""
    state = {"transformer." + name: tensor.detach() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state.pop("transformer.lm_head.weight")
    return {name: t for name, t in state.items() if bias or not name.endswith(".bias")}


def save_nanogpt(state, args, path):
    """What its train.py saves: the weights, AdamW's two moments of each, and where it was."""
    weights = [torch.nn.Parameter(tensor.clone()) for tensor in state.values()]
    optimizer = torch.optim.AdamW(weights, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    whole = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(3.29),
        "config": {"out_dir": "out", "dataset": "openwebtext", "compile": True, "init_from": "x"},
    }
    torch.save(whole, path)


def nanogpt_args(config, bias):
    shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    more = {"block_size": config.max_seq_len, "bias": bias, "vocab_size": config.vocab_size}
    return shape | more | {"dropout": 0.0}


def nanogpt_logits(state, args, ids, gelu="none"):
    """nanoGPT's forward, from its model.py: exact GELU, LayerNorm and Linear with or without bias.

    `state` has its own names, `ids` (T,); computed in float64, returns (T, V).
    """
    state = {name: tensor.double() for name, tensor in state.items()}

    def linear(x, name):
        return F.linear(x, state[name + ".weight"], state.get(name + ".bias"))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state.get(name + ".bias"))

    heads, T = args["n_head"], len(ids)
    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][:T]
    for layer in range(args["n_layer"]):
        h = f"transformer.h.{layer}"
        parts = linear(norm(x, h + ".ln_1"), h + ".attn.c_attn").chunk(3, dim=-1)
        q, k, v = (part.view(T, heads, -1).transpose(0, 1) for part in parts)
        scores = q @ k.transpose(1, 2) / (q.shape[-1] ** 0.5)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1)
        x = x + linear(mixed, h + ".attn.c_proj")
        inner = F.gelu(linear(norm(x, h + ".ln_2"), h + ".mlp.c_fc"), approximate=gelu)
        x = x + linear(inner, h + ".mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].t()


@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
def test_nanogpts_checkpoint_computes_what_nanogpt_does(bias, prefix, model, tmp_path):
    state, args = nanogpt_state(model, bias), nanogpt_args(CONFIG, bias)
    path = tmp_path / "ckpt.pt"
    save_nanogpt({prefix + name: tensor for name, tensor in state.items()}, args, path)
    ids = torch.arange(32)
    for name in (tmp_path, path, str(path)):
        loaded = load_model(name, dtype=torch.float64)
        want = nanogpt_logits(state, args, ids)
        torch.testing.assert_close(logits_of(loaded, ids), want, rtol=0, atol=1e-9)
        assert loaded.config.activation_function == "gelu"
        assert loaded.lm_head.weight is loaded.wte.weight
    biases = {n: t for n, t in loaded.state_dict().items() if n.endswith(".bias")}
    assert len(biases) == 2 * 6 + 1
    assert all((tensor == 0).all() for tensor in biases.values()) == (not bias)


def test_nanogpt_of_2022_has_a_separate_head_and_the_tanh_gelu(model, tmp_path):
    """Its `model_args` had no `bias` yet, and its head was not tied."""
    state, args = nanogpt_state(model, True), nanogpt_args(CONFIG, True)
    state["lm_head.weight"] = torch.randn(61, 48, generator=torch.Generator().manual_seed(1))
    del args["bias"]
    save_nanogpt(state, args, tmp_path / "ckpt.pt")
    want = nanogpt_logits(state, args, torch.arange(32), gelu="tanh")
    exact = nanogpt_logits(state, args, torch.arange(32))
    got = logits_of(load_model(tmp_path, dtype=torch.float64), torch.arange(32))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    assert (want - exact).abs().max() > 1e-4


def test_nanogpts_padded_vocabulary_stays_padded(tmp_path):
    config = GPTConfig(vocab_size=50304, max_seq_len=16, n_layer=1, n_head=2, n_embd=16)
    padded = GPT(config).init_weights(std=0.2).requires_grad_(False)
    save_nanogpt(nanogpt_state(padded, True), nanogpt_args(config, True), tmp_path / "ckpt.pt")
    loaded = load_model(tmp_path)
    assert loaded.wte.weight.shape == (50304, 16)
    assert loaded.config.eos_token_id == 50256  # <|endoftext|>; 50257 to 50303 were never trained
    assert torch.equal(loaded.lm_head.weight, padded.wte.weight)


def test_nanogpts_masks_of_an_old_pytorch_are_skipped(model, tmp_path):
    """Without flash attention it keeps its causal mask as a buffer, `attn.bias`."""
    state = nanogpt_state(model, False)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
    save_nanogpt(state | masks, nanogpt_args(CONFIG, False), tmp_path / "ckpt.pt")
    want = nanogpt_logits(state, nanogpt_args(CONFIG, False), torch.arange(32))
    got = logits_of(load_model(tmp_path, dtype=torch.float64), torch.arange(32))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_a_nanogpt_checkpoint_that_promises_biases_and_has_none_is_refused(model, tmp_path):
    save_nanogpt(nanogpt_state(model, False), nanogpt_args(CONFIG, True), tmp_path / "ckpt.pt")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'ckpt.pt'}: 13 tensors are missing")


# ---- the config is honoured ----------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_inner": 100},
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
        {"layer_norm_epsilon": 0.1},
        {"n_positions": 48, "vocab_size": 50, "n_layer": 3, "n_head": 6},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_a_config_means_what_it_means_in_transformers(changes, tmp_path):
    shape = {"vocab_size": 61, "n_positions": 32, "n_layer": 2, "n_head": 3, "n_embd": 48}
    theirs = GPT2LMHeadModel(GPT2Config(**shape | changes, attn_implementation="eager"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2, generator=generator)
    theirs.save_pretrained(tmp_path)
    # The "upcast" attention of transformers runs in float32 only.
    upcast = "reorder_and_upcast_attn" in changes
    dtype, atol = (torch.float32, 1e-3) if upcast else (torch.float64, 1e-9)
    ids = torch.arange(32)
    with torch.inference_mode():
        want = theirs.to(dtype).eval()(ids[None]).logits[0]
    got = logits_of(load_model(tmp_path, dtype=dtype), ids)
    torch.testing.assert_close(got, want, rtol=0, atol=atol)
    assert want.abs().max() > 1


WRITTEN_OTHERWISE = [  # changes to the config of the small model
    {"n_embd": ..., "hidden_size": 48},
    {"n_head": ..., "num_attention_heads": 3},
    {"n_layer": ..., "num_hidden_layers": 2},
    {"n_positions": ..., "max_position_embeddings": 32},
    {"n_embd": 48, "hidden_size": 48},
    {"model_type": ..., "architectures": ...},
    *[{"activation_function": f"gelu_{x}"} for x in ("fast", "accurate", "python", "pytorch_tanh")],
    {"activation_function": "gelu_python_tanh"},
]


@pytest.mark.parametrize("changes", WRITTEN_OTHERWISE, ids=str)
def test_other_names_of_the_same_thing_mean_what_they_mean_in_transformers(changes, folder):
    edit_config(folder, **changes)
    want = their_logits_of(folder, torch.float64)
    got = logits_of(load_model(folder, dtype=torch.float64), torch.arange(32))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


# ---- the 124M shape, and the memory it takes -----------------------------------------------------
def as_nanogpt_at_124m(tensors, folder):
    (folder / "config.json").unlink()
    args = nanogpt_args(GPTConfig(), True)
    save_nanogpt(as_linear(with_the_head(tensors)), args, folder / "ckpt.pt")


REAL_LAYOUTS = {
    name: FILES[name]
    for name in ("safetensors", "safetensors in shards", "zip in shards", "legacy")
} | {
    "zip": lambda t, f: FILES["zip"](with_the_head(t), f),
    "nanoGPT": as_nanogpt_at_124m,
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the memory")
@pytest.mark.parametrize("layout", REAL_LAYOUTS)
def test_a_load_peaks_near_one_copy_of_the_model(layout, tmp_path):
    """At most 1.3 times the weights in the target dtype, and the largest tensor as the file has it.

    Pages of a mapped file count too. PyTorch cannot map a file from before 1.6, and reads it whole.
    """
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "eos_token_id": 50256}')

    def write(say):  # in a child, so that this process never holds the model
        REAL_LAYOUTS[layout](in_the_file(load_model("random:gpt2")), tmp_path)

    assert in_a_child(write, 300).end == ""
    for dtype in (torch.float32, torch.bfloat16):
        weights_mb = 124_439_808 * dtype.itemsize / 2**20
        largest_mb = (124_439_808 if layout == "legacy" else 50257 * 768) * 4 / 2**20
        outcome = in_a_child(lambda say, dtype=dtype: load_model(tmp_path, dtype), 300)
        assert outcome.end == ""
        assert 0.8 * weights_mb < outcome.peak_mb < 1.3 * weights_mb + largest_mb, dtype
    for path in tmp_path.iterdir():
        path.unlink()  # 0.5 GB, of nanoGPT 1.5 GB


# ---- python -m checkpoints.load NAME -------------------------------------------------------------
def describe(name, *flags):
    command = [sys.executable, *flags, "-m", "checkpoints.load", str(name)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120, env=env
    )


def test_the_shipped_model_is_described_and_agrees_with_transformers(shipped_model_folder):
    run = describe(shipped_model_folder)
    assert run.returncode == 0, run.stderr
    model = load_model(shipped_model_folder)
    assert str(shipped_model_folder) in run.stdout
    assert f"{model.num_parameters():,}" in run.stdout
    assert f"{model.config.kv_bytes_per_token(torch.float16):,}" in run.stdout
    assert f"{model.config.kv_bytes_per_token(torch.float32):,}" in run.stdout
    assert re.search(r"transformers\s+the same logits", run.stdout)


def test_the_numbers_of_a_description_can_be_checked_by_hand(folder, model, monkeypatch, capsys):
    """61 x 48 + 32 x 48 + 2 x 28,272 + 96 parameters; 2 x 2 x 48 numbers of K and V a token."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    load.describe(str(folder))
    out = capsys.readouterr().out
    assert "not installed" in out
    assert "61,104" in out  # parameters
    assert "122,208" in out and "244,416" in out  # bytes in 16 and 32 bits
    assert "384" in out and "768" in out  # of K and V a token
    assert "81380.2" in out.replace(",", "")  # 10 ** 9 / 384 / 32 sequences
    save_nanogpt(nanogpt_state(model, True), nanogpt_args(CONFIG, True), folder / "ckpt.pt")
    load.describe(str(folder / "ckpt.pt"))
    assert "transformers reads no nanoGPT checkpoints" in capsys.readouterr().out


LAYOUTS_TO_COMPARE = {
    "zip, module._orig_mod.transformer.": "the same logits for 32 tokens",
    "safetensors, no prefix": "the same logits for 32 tokens",
    "legacy, masks and head": "the same logits for 32 tokens",
    "safetensors, nn.Linear": "not compared: transformers does not know this layout",
}


@pytest.mark.parametrize("layout", LAYOUTS_TO_COMPARE)
def test_what_loads_agrees_with_transformers_or_is_no_layout_of_its(layout, model, folder, capsys):
    write_layout(layout, in_the_file(model), folder)
    load.describe(str(folder))
    assert re.search(rf"transformers +{LAYOUTS_TO_COMPARE[layout]}", capsys.readouterr().out)


def test_nothing_of_a_strangers_config_reaches_transformers(folder, monkeypatch, capsys):
    """Its code would build 100 million labels, and look for somebody's attention on the hub."""
    edit_config(folder, num_labels=10**8, _attn_implementation="someone/kernel")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    (folder / "generation_config.json").write_text("no JSON")
    load.describe(str(folder / "model.safetensors"))
    assert "the same logits for 32 tokens" in capsys.readouterr().out


def test_logits_that_differ_from_transformers_are_an_error(folder, monkeypatch, capsys):
    spoiled = copy.deepcopy(load_model(folder))
    spoiled.h[1].mlp.c_proj.weight.mul_(1.1)
    monkeypatch.setattr(load, "load_model", lambda *args, **kwargs: spoiled)
    with pytest.raises(ValueError, match="differ from transformers"):
        load.describe(str(folder))


def test_what_is_refused_is_one_sentence_on_the_command_line_too(tmp_path):
    run = describe(tmp_path)
    assert run.returncode == 1 and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("checkpoints/load.py: ") and str(tmp_path) in line


# ---- dtypes and copies ---------------------------------------------------------------------------
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_weights_are_cast_to_the_dtype_asked_for_whatever_the_file_holds(
    stored, dtype, model, tmp_path
):
    save_model(model, tmp_path, stored)
    loaded = load_model(tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(stored).to(dtype)), name
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(stored)[6:]


def test_the_tied_head_and_the_embedding_are_one_tensor(folder):
    loaded = load_model(folder, dtype=torch.bfloat16)
    assert loaded.lm_head.weight is loaded.wte.weight
    names = [name for name, _ in loaded.named_parameters()]
    assert len(names) == len(set(names)) == 2 + 2 * 12 + 2  # tables, layers, the last LayerNorm
    assert loaded.num_parameters() == (61 + 32) * 48 + 2 * 28_272 + 2 * 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_loaded_model_does_not_change_when_its_file_is_rewritten(dtype, folder, model):
    """safetensors maps the file into memory: a tensor that is not copied follows the file."""
    loaded = load_model(folder, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:  # in place; a shorter file would kill the process
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


def test_a_save_that_is_stopped_leaves_the_old_model_or_none(folder, tiny_gpt, monkeypatch):
    """Never the config or the tokenizer of one model and the weights of another."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_tiny, "save_file", stopped)
        save_model(tiny_gpt(), folder, torch.float32)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", stopped)
        save_model(tiny_gpt(), folder, torch.float32)
    assert refusal(folder).startswith(f"{folder} holds no weights")


# ---- random weights ------------------------------------------------------------------------------
def test_random_weights_are_always_the_same_and_called_random(monkeypatch):
    monkeypatch.setitem(load.RANDOM_SHAPES, "small", (1, 2, 16))
    torch.manual_seed(0)
    first = load_model("random:small")
    torch.manual_seed(1)
    assert_same_weights(load_model("random:small"), first)
    shape = GPTConfig(n_layer=1, n_head=2, n_embd=16, eos_token_id=50256)
    assert first.config == shape
    assert not first.training
    assert not any(parameter.requires_grad for parameter in first.parameters())
    loaded = load_model("random:small", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.lm_head.weight is loaded.wte.weight
    assert weights_kind("random:gpt2-xl") == "random weights"
    assert weights_kind("/models/random") == "trained weights"
    with pytest.raises(ValueError, match="no shape 'gpt3' .* gpt2, gpt2-medium, gpt2-large"):
        load_model("random:gpt3")


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_the_random_shapes_are_those_of_the_four_gpt2s(name, num_parameters):
    n_layer, n_head, n_embd = load.RANDOM_SHAPES[name]
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert model.num_parameters() == num_parameters
    assert model.config.head_dim == 64


# ---- refusals: config.json -----------------------------------------------------------------------
def refusal(folder, **options):
    """The text of the ValueError that loading the folder raises."""
    with pytest.raises(ValueError) as raised:
        load_model(folder, **options)
    return str(raised.value)


def test_a_config_that_does_not_say_its_type_has_to_have_gpt2s_fields(folder):
    edit_config(folder, model_type=..., n_embd=..., hidden_size=48)
    message = refusal(folder)
    assert message.endswith("config.json: model_type is None, only 'gpt2' is served")


def test_weights_larger_than_the_free_memory_are_refused_before_they_are_read(folder, monkeypatch):
    monkeypatch.setattr(load, "free_memory_bytes", lambda device: 244_415)
    message = refusal(folder)  # 61,104 parameters, of 4 bytes each in float32
    assert "the weights take 0.0 GB as torch.float32, and 0.0 GB are free on cpu" in message
    assert load_model(folder, dtype=torch.float16).num_parameters() == 61_104


def test_a_folder_that_does_not_exist_or_has_no_config_is_refused(folder):
    message = refusal(folder / "nowhere")
    assert message.startswith("no folder") and repr(str(folder / "nowhere")) in message
    assert refusal(folder / "config.json").startswith(str(folder / "config.json"))
    (folder / "config.json").unlink()
    assert refusal(folder) == f"{folder / 'config.json'} is missing"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("model_type", "llama", "model_type is 'llama', only 'gpt2' is served"),
        ("num_attention_heads", 4, "n_head is 3 and num_attention_heads is 4, two names of one"),
        ("hidden_size", 64, "n_embd is 48 and hidden_size is 64, two names of one field"),
        ("add_cross_attention", True, "add_cross_attention is set"),
        ("activation_function", "swish", "activation_function is 'swish': choose one of gelu_new"),
        ("n_layer", "2", "n_layer is '2', not of type int"),
        ("n_layer", True, "n_layer is True, not of type int"),
        ("n_layer", [2], "n_layer is a list, not of type int"),
        ("n_layer", 0, "n_layer is 0: it must be at least 1"),
        ("vocab_size", 0, "vocab_size is 0: it must be at least 1"),
        ("vocab_size", 10**30, f"vocab_size is {10**30}, at most 10000000 is accepted"),
        ("n_positions", -1, "max_seq_len is -1: it must be at least 1"),
        ("n_embd", 50, "n_embd 50 is not a multiple of n_head 3"),
        ("layer_norm_epsilon", "1e-5", "layer_norm_epsilon is '1e-5', not of type float"),
        ("layer_norm_epsilon", float("nan"), "layer_norm_epsilon is nan: it must be finite"),
        ("scale_attn_weights", 1, "scale_attn_weights is 1, not of type bool"),
        ("quantization_config", {"bits": 4}, "quantization_config is set"),
        ("eos_token_id", ["60"], "eos_token_id is '60', not of type int"),
    ],
)
def test_a_config_of_another_model_is_refused_with_the_field_named(field, value, reason, folder):
    edit_config(folder, **{field: value})
    assert refusal(folder).startswith(f"{folder / 'config.json'}: {reason}")


# ---- refusals: model.safetensors -----------------------------------------------------------------
MATRIX = "transformer.h.1.attn.c_attn.weight"  # (48, 144) in the file
BIAS = "transformer.ln_f.bias"
NOT_FINITE = "holds NaN or infinity as torch.float32"


def one_in_zeros(number):
    """A matrix of zeros and this one number: every element has to be looked at."""
    matrix = torch.zeros(48, 144)
    matrix[17, 5] = number
    return matrix


TENSOR_FAULTS = [  # the tensor, what stands in its place (None: nothing), what is said
    ("transformer.h.1.ln_2.bias", None, "1 tensors are missing, the first is 'h.1.ln_2.bias'"),
    ("transformer.wte.weight", None, "2 tensors are missing, the first is 'wte.weight'"),
    ("transformer.h.2.ln_1.bias", torch.zeros(48), "has no place in this model"),
    ("wpe.weight", torch.zeros(32, 48), "wpe.weight' has no place in this model"),  # twice
    ("transformer.wpe.weight", torch.zeros(16, 48), "(16, 48), its config asks for (32, 48)"),
    (MATRIX, torch.zeros(144, 48), "(48, 144), its config asks for (144, 48)"),  # nanoGPT's layout
    (MATRIX, torch.tensor(1.0), "has shape (), its config asks for (144, 48)"),
    (MATRIX, one_in_zeros(torch.nan), NOT_FINITE),
    (MATRIX, one_in_zeros(torch.inf), NOT_FINITE),
    (BIAS, torch.full((48,), 1e300, dtype=torch.float64), NOT_FINITE),
    (MATRIX, torch.zeros(48, 144, dtype=torch.int8), "holds torch.int8, not floats"),
]


def put(name, value):
    """An edit that replaces, adds or removes one tensor."""

    def edit(tensors):
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return edit


@pytest.mark.parametrize(("name", "value", "reason"), TENSOR_FAULTS)
def test_a_tensor_that_does_not_fit_is_refused_by_name(name, value, reason, folder):
    edit_tensors(folder, put(name, value))
    message = refusal(folder)
    assert message.startswith(f"{folder / 'model.safetensors'}: ") and message.endswith(reason)
    assert "missing" in reason or name.split(".", 1)[1] in message


def test_a_weight_too_large_for_the_dtype_asked_for_is_refused(folder):
    """1e5 is a number in float32 and infinity in float16, whose largest is 65,504."""
    edit_tensors(folder, put("transformer.ln_f.bias", torch.full((48,), 1e5)))
    assert load_model(folder).ln_f.bias[0].item() == 1e5
    message = refusal(folder, dtype=torch.float16)
    assert message.endswith("'transformer.ln_f.bias' holds NaN or infinity as torch.float16")


def test_a_config_of_another_size_is_refused_at_the_first_tensor_that_differs(folder):
    edit_config(folder, n_layer=3)
    assert "12 tensors are missing, the first is 'h.2.ln_1.weight'" in refusal(folder)
    edit_config(folder, n_layer=1)
    assert "'transformer.h.1." in refusal(folder)
    edit_config(folder, n_layer=2, tie_word_embeddings=False)
    assert refusal(folder).endswith("1 tensors are missing, the first is 'lm_head.weight'")


def test_a_pickle_under_this_name_is_refused_and_not_executed(folder):
    path = folder / "model.safetensors"
    torch.save({"wte.weight": torch.zeros(61, 48)}, path)
    assert refusal(folder).startswith(f"{path} is not a whole safetensors file: ")
