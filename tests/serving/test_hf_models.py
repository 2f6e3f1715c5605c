"""PagedCache beside transformers' DynamicCache: every method, many models, three versions.

DynamicCache is the oracle. Both caches get the same calls, and both drive the same models, in
float64, where another order of additions changes no token.
"""

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

import transformers
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from block_allocator import BlockAllocator
from kv_cache import KVCache
from serving.hf_paged_cache import PagedCache

VOCAB = 97


def build(config, dtype=torch.float64, auto=AutoModelForCausalLM):
    """A model with random weights of std 0.2: with 0.02 it would repeat one token."""
    model = auto.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.2, generator=generator)
    return model.to(dtype)


def config_of(name, **sizes):
    """The configuration of an architecture, small; `sizes` are its other fields."""
    tokens = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    return getattr(transformers, f"{name}Config")(**(tokens | sizes))


GQA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
GQA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
MHA = {name: size for name, size in GQA.items() if name != "num_key_value_heads"}


# ---- every method of Cache -----------------------------------------------------------------------
CONFIG = config_of("Llama", **GQA)
LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 16


def kv(seed, num_tokens, batch=3):
    """K and V (batch, heads, num_tokens, head_dim) of one update."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, KV_HEADS, num_tokens, HEAD_DIM, generator=generator).unbind()


def update(cache, seed, num_tokens, batch=3):
    """What an update of all layers returns."""
    return [cache.update(*kv(seed + layer, num_tokens, batch), layer) for layer in range(LAYERS)]


FLOAT32, CPU = torch.float32, torch.device("cpu")
CALLS = {  # each public name of a cache: functions of a cache
    "update": [
        lambda cache: update(cache, 10, 1),
        lambda cache: update(cache, 20, 7),
        lambda cache: cache.update(*kv(0, 1), 9),  # there is no such layer
        lambda cache: cache.update(*kv(0, 1, batch=2), 0),  # another batch
    ],
    "get_seq_length": [
        lambda cache: cache.get_seq_length(),
        lambda cache: cache.get_seq_length(1),
        lambda cache: cache.get_seq_length(7),
    ],
    "get_mask_sizes": [
        lambda cache: cache.get_mask_sizes(3, 0),
        lambda cache: cache.get_mask_sizes(1, layer_idx=1),
        lambda cache: cache.get_mask_sizes(1, 9),
    ],
    "get_query_offset": [lambda cache: cache.get_query_offset(1)],
    "get_max_length": [
        lambda cache: cache.get_max_length(),
        lambda cache: cache.get_max_length(1),
        lambda cache: cache.get_max_length(9),
    ],
    "get_max_cache_shape": [
        lambda cache: cache.get_max_cache_shape(),
        lambda cache: cache.get_max_cache_shape(9),
    ],
    "crop": [
        lambda cache: cache.crop(-2),
        lambda cache: cache.crop(-6),
        lambda cache: cache.crop(0),
        lambda cache: cache.crop(4),
    ],
    "reorder_cache": [
        lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
        lambda cache: cache.reorder_cache(torch.tensor([0, 1, 2])),
        lambda cache: cache.reorder_cache(torch.tensor([1])),
    ],
    "batch_repeat_interleave": [
        lambda cache: cache.batch_repeat_interleave(1),
        lambda cache: cache.batch_repeat_interleave(3),
    ],
    "batch_select_indices": [
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.batch_select_indices(torch.tensor([2, 0, 2, 2])),
        lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
    ],
    "reset": [lambda cache: cache.reset()],
    "early_initialization": [
        lambda cache: cache.early_initialization(3, KV_HEADS, HEAD_DIM, FLOAT32, CPU),
        lambda cache: cache.early_initialization(3, [KV_HEADS], HEAD_DIM, FLOAT32, CPU),
    ],
    "activate_past_recording": [lambda cache: cache.activate_past_recording()],
    "is_recording_past": [lambda cache: cache.is_recording_past(0)],
    # Of state-space layers and of indexed ones: there are none, and both caches say so.
    "get_conv_state": [lambda cache: cache.get_conv_state(0)],
    "update_conv_state": [lambda cache: cache.update_conv_state(torch.zeros(1), 0)],
    "get_recurrent_state": [lambda cache: cache.get_recurrent_state(0)],
    "update_recurrent_state": [lambda cache: cache.update_recurrent_state(torch.zeros(1), 0)],
    "update_indexer": [lambda cache: cache.update_indexer(torch.zeros(1), 0)],
    "has_previous_state": [
        lambda cache: cache.has_previous_state(),
        lambda cache: cache.has_previous_state(1),
        lambda cache: cache.has_previous_state(9),
    ],
    "batch_size": [lambda cache: cache.batch_size],
    "max_batch_size": [lambda cache: cache.max_batch_size],
    "max_cache_len": [lambda cache: cache.max_cache_len],
    "is_compileable": [lambda cache: cache.is_compileable],
    "is_croppable": [lambda cache: cache.is_croppable],
    "is_dummy": [lambda cache: cache.is_dummy],
    "is_initialized": [lambda cache: cache.is_initialized],
    "is_linear": [lambda cache: cache.is_linear],
    "is_sliding": [lambda cache: cache.is_sliding],
    "layers": [lambda cache: len(cache.layers)],
    "layer_class_to_replicate": [lambda cache: cache.layer_class_to_replicate],
    "offloading": [lambda cache: cache.offloading],
    "offload": [lambda cache: cache.offload(0)],
    "prefetch": [lambda cache: cache.prefetch(0)],
    "__iter__": [lambda cache: list(cache)],
    "__len__": [lambda cache: len(cache)],
    "__repr__": [lambda cache: repr(cache).replace("Paged", "Dynamic")],
}
OLD = "max_length" in inspect.signature(DynamicLayer.crop).parameters  # before 5.13
# What is deliberately another thing: (name, number of the call) -> why.
DIFFERENCES = {
    ("update", 3): "its error says both batch sizes: a ValueError, PyTorch's is a RuntimeError",
    ("offload", 0): "a pool lies on one device: an error with a sentence",
}
if OLD:
    DIFFERENCES |= {("crop", 2): "0 tokens are removed, as in newer versions, not all of them"}
else:
    DIFFERENCES |= {("crop", 3): "4 tokens stay, as in older versions, and no error"}
STATES = {  # how the caches come to hold what they hold, before the call
    "fresh": lambda cache: None,
    "filled": lambda cache: (update(cache, 1, 5), update(cache, 3, 1)),
    "emptied": lambda cache: (update(cache, 1, 5), cache.reset()),
}


def dynamic_cache():
    return DynamicCache(config=CONFIG)


def paged_cache(num_blocks=64):
    allocator = BlockAllocator(num_blocks, 4)
    pool = KVCache(LAYERS, num_blocks, 4, KV_HEADS, HEAD_DIM)
    return PagedCache(pool, allocator, CONFIG), allocator


def plain(value):
    """A result as plain values that `==` compares: tensors are lists with their shape."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def outcome(call, cache):
    """What a call returns, or the kind of its error."""
    try:
        return plain(call(cache))
    except Exception as error:
        return type(error)


def content(cache, batch):
    """All that the cache holds: what the next update of each layer returns."""
    return plain(update(cache, 90, 1, batch))


def test_the_table_has_every_public_name_of_a_cache():
    """A new version has a new one? Decide what PagedCache does, and add a line."""
    cache = dynamic_cache()
    names = {name for name in dir(cache) if not name.startswith("_")}
    names |= {name for name in ("__iter__", "__len__", "__repr__") if name in dir(cache)}
    assert names <= set(CALLS)
    assert len(names) >= 20


CASES = [
    (name, number, state)
    for name, calls in CALLS.items()
    for number in range(len(calls))
    for state in STATES
    if hasattr(DynamicCache, name) or hasattr(dynamic_cache(), name)
]


def differs(name, number, state):
    """Whether this is a deliberate difference, or a fault of an old DynamicCache.

    An old one keeps its length in reset() and forgets its tokens in early_initialization(), and
    crop() of an empty one raises TypeError.
    """
    faulty = {("reset", "filled"), ("early_initialization", "filled"), ("crop", "fresh")}
    is_faulty = OLD and (state == "emptied" or (name, state) in faulty)
    return (name, number) in DIFFERENCES or is_faulty


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _, _ in CASES))
def test_a_method_of_cache_does_what_it_does_in_a_dynamic_cache(name):
    for case in (case for case in CASES if case[0] == name):
        _, number, state = case
        call, dynamic = CALLS[name][number], dynamic_cache()
        paged, allocator = paged_cache()
        for cache in (dynamic, paged):
            STATES[state](cache)
        expected, found = outcome(call, dynamic), outcome(call, paged)
        if not differs(*case):
            assert found == expected, case
            held = dynamic.layers[0].keys
            batch = 3 if held is None or held.numel() == 0 else len(held)
            assert content(paged, batch) == content(dynamic, batch), case
        paged.release()
        assert allocator.num_free == allocator.num_blocks, case


@pytest.mark.parametrize("name, number", DIFFERENCES)
def test_what_is_deliberately_different_is_so_now(name, number):
    dynamic, (paged, _) = dynamic_cache(), paged_cache()
    for cache in (dynamic, paged):
        STATES["filled"](cache)
    call = CALLS[name][number]
    assert outcome(call, dynamic) != outcome(call, paged) or content(dynamic, 3) != content(
        paged, 3
    )


def random_call(generator, length, batch):
    """A name and its arguments that suit a cache of so many tokens and rows."""

    def below(n):
        return int(torch.randint(n, (), generator=generator))

    kind = below(8)
    if kind == 0 and length:
        return "crop", (-1 - below(length),)
    if kind == 1 and batch < 6:
        return "batch_repeat_interleave", (1 + below(3),)
    if kind == 2:
        indices = torch.randint(batch, (1 + below(batch),), generator=generator)
        return "batch_select_indices", (indices,)
    if kind in (3, 4):
        return "reorder_cache", (torch.randint(batch, (batch,), generator=generator),)
    if kind == 5 and below(4) == 0 and not OLD:
        return "reset", ()
    return "update", (below(1000), 1 + below(2 + 6 * below(2)), batch)


def test_any_sequence_of_calls_leaves_what_it_leaves_in_a_dynamic_cache():
    """Shared blocks, partial ones, and blocks that others wrote before: the bits are the same."""
    generator = torch.Generator().manual_seed(0)
    paged, allocator = paged_cache(400)
    paged.kv_cache.pool.fill_(torch.nan)
    used = set()
    for _ in range(25):
        dynamic = dynamic_cache()
        batch = 3
        for _ in range(20):
            held = dynamic.layers[0].keys
            if held is not None and held.numel():
                batch = len(held)
            name, arguments = random_call(generator, dynamic.get_seq_length(), batch)
            used.add(name)
            if name == "update":
                found, expected = update(paged, *arguments), update(dynamic, *arguments)
                assert plain(found) == plain(expected)
            else:
                assert getattr(paged, name)(*arguments) is None
                getattr(dynamic, name)(*arguments)
            assert paged.get_seq_length() == dynamic.get_seq_length()
            assert allocator.num_blocks - allocator.num_free == paged.num_blocks_held
        paged.reset()
        assert allocator.num_free == allocator.num_blocks
    assert len(used) == 6 - OLD
    paged.release()


# ---- architectures -------------------------------------------------------------------------------
GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 128}
OPT = MHA | {"ffn_dim": 96, "word_embed_proj_dim": 64}
GEMMA = GQA | {"head_dim": 16, "tie_word_embeddings": False}
SLIDING = {"sliding_window": 6}
CAP = {"attn_logit_softcapping": 2.0}
NAMES = {  # architecture -> its configuration; which kinds of attention run in the mode "paged"
    "gpt2": ("GPT2", GPT2, "paged"),
    "llama": ("Llama", GQA, "paged"),
    "qwen2": ("Qwen2", GQA, "paged"),
    "qwen3": ("Qwen3", GQA | {"head_dim": 32}, "paged"),
    "mistral": ("Mistral", GQA | {"sliding_window": None}, "paged"),
    "mistral, sliding window": ("Mistral", GQA | SLIDING, "gather"),
    "gpt_neox": ("GPTNeoX", MHA, "paged"),
    "opt": ("OPT", OPT, "paged"),
    "phi": ("Phi", MHA | {"partial_rotary_factor": 0.5}, "paged"),
    "gemma": ("Gemma", GEMMA, "paged"),
    "gemma2, soft cap": ("Gemma2", GEMMA | SLIDING | CAP, "gather"),
    "granite, a scale of its own": ("Granite", GQA | {"attention_multiplier": 0.5}, "paged"),
    "starcoder2": ("Starcoder2", GQA, "paged"),
}
# Attention of the mode "gather", and of DynamicCache. No soft cap is in PyTorch's function.
ATTENTION = dict.fromkeys(NAMES, "sdpa") | {"gemma2, soft cap": "eager"}
BATCHES = {name: 1 + i % 8 for i, name in enumerate(NAMES)}  # 1 to 8
SIZES = {"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": -1}  # no token ends a text
WAYS: dict[str, dict] = {  # how the tokens are chosen
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
    "assisted": {"assistant_model": "gpt2", "do_sample": False},
}
ALONE = {"prompt lookup", "assisted"}  # transformers does these for one prompt at a time

models = {}


def model_of(name):
    """A model, built once."""
    if name not in models:
        architecture, sizes, _ = NAMES[name]
        # In float64 transformers' own soft caps make NaN of a padded row.
        dtype = torch.float32 if ATTENTION[name] == "eager" else torch.float64
        models[name] = build(config_of(architecture, **sizes), dtype)
    return models[name]


def prompts_of(batch):
    """Token ids and mask (batch, 11): of row i the first i % 5 are padding."""
    ids = torch.randint(2, VOCAB, (batch, 11), generator=torch.Generator().manual_seed(batch))
    ids[:, 6:9] = ids[:, 1:4]  # something to look up
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : row % 5] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model, cache, way, batch):
    """The token ids (rows, T) and the logits (T, rows, V) of a run."""
    options = SIZES | WAYS[way]
    if "assistant_model" in options:
        options["assistant_model"] = model_of(options["assistant_model"])
    torch.manual_seed(7)
    outputs = {"return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**prompts_of(batch), **options, **outputs, past_key_values=cache)
    return found.sequences, torch.stack(found.logits)


@pytest.mark.parametrize("mode", ["paged", "gather"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_writes_the_tokens_that_it_writes_with_a_dynamic_cache(name, mode):
    model, usual = model_of(name), ATTENTION[name]
    ran = NAMES[name][2] if mode == "paged" else "gather"
    written = set()
    for way in WAYS:
        if way in ALONE and OLD and "sliding" in str(NAMES[name]):
            continue  # an old DynamicCache cannot take tokens back behind its window
        batch = 1 if way in ALONE else BATCHES[name]
        model.set_attn_implementation(usual)
        expected, logits = generate(model, DynamicCache(config=model.config), way, batch)
        model.set_attn_implementation("paged" if mode == "paged" else usual)
        with PagedCache.for_model(model, num_blocks=200, block_size=4) as cache:
            found, own_logits = generate(model, cache, way, batch)
            assert {kind for kind, calls in cache.counts.items() if calls} == {ran}, way
        assert found.tolist() == expected.tolist(), way
        torch.testing.assert_close(own_logits, logits, rtol=0, atol=1e-9)
        # A sliding DynamicCache keeps fewer tokens, and sums them in another order.
        assert mode == "paged" or "sliding" in str(NAMES[name]) or own_logits.equal(logits), way
        written |= set(found[:, 11:].flatten().tolist())
    model.set_attn_implementation(usual)
    assert len(written) >= 8


# ---- what it does not do -------------------------------------------------------------------------
SMALL = {"d_model": 32, "vocab_size": VOCAB, "pad_token_id": 0}
T5 = SMALL | {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = SMALL | {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 32}
BART |= {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}
MAMBA = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "vocab_size": VOCAB}
JAMBA = GQA | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
JAMBA |= {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False, "vocab_size": VOCAB}
REFUSED = {  # architecture -> its configuration, and what the sentence says
    "T5": (T5, AutoModelForSeq2SeqLM, "encoder"),
    "Bart": (BART, AutoModelForSeq2SeqLM, "encoder"),
    "Mamba": (MAMBA, AutoModelForCausalLM, "layers that keep more"),
    "Jamba": (JAMBA, AutoModelForCausalLM, "layers that keep more"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_encoder_decoders_and_state_space_models_are_refused(name):
    sizes, auto, reason = REFUSED[name]
    model = auto.from_config(getattr(transformers, f"{name}Config")(**sizes))
    with pytest.raises(ValueError, match=rf"{name}Config.*{reason}"):
        PagedCache.for_model(model, num_blocks=8, block_size=4)
    allocator, pool = BlockAllocator(8, 4), KVCache(2, 8, 4, num_kv_heads=4, head_dim=8)
    with pytest.raises(ValueError, match=reason):
        PagedCache(pool, allocator, model.config)


# ---- other versions of transformers --------------------------------------------------------------
FOLDER = os.environ.get("PAGEDGPT_OTHER_TRANSFORMERS")
VERSIONS = sorted(path.name for path in Path(FOLDER).iterdir()) if FOLDER else []
SOME = "method or any_sequence or public_name or refused or writes and (gpt2 or llama or soft)"
CHILD = """
import sys, pytest, transformers
print("transformers", transformers.__version__)
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("version", VERSIONS or [None])
def test_another_version_of_transformers_passes_these_tests(version):
    if version is None:
        pytest.skip("PAGEDGPT_OTHER_TRANSFORMERS is not set: a folder with a folder a version")
    paths = [str(Path(FOLDER) / version), os.environ["PYTHONPATH"]]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    del env["PAGEDGPT_OTHER_TRANSFORMERS"]
    flags = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", SOME, __file__]
    command = [sys.executable, "-c", CHILD, *flags]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert run.stdout.startswith(f"transformers {version}\n")
    assert version != transformers.__version__
