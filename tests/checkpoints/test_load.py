"""Every layout of a GPT-2 checkpoint in use loads; anything else is refused.

The tests write one small model in each layout and compare its tensors with those it came from, bit
by bit, and its logits with transformers'. Then they break the folder, one thing at a time, and read
the ValueError (test_weight_files.py has the hostile files).
"""

import copy
import re
import runpy
import sys

import pytest
import samples
import torch
from safetensors.torch import save_file
from samples import FIELDS, LAYOUTS, edit_config, in_the_file, refusal, small_model, write
from transformers import GPT2Config, GPT2LMHeadModel

from checkpoints import load
from checkpoints.load import load_model, nanogpt_config, weights_kind
from model import GPT, GPTConfig, attend_one_sequence

TENSORS = in_the_file(small_model())
SAFE = "model.safetensors"
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
OTHER_HEAD = torch.randn(61, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path):
    """The small model in a folder of its own, to be broken."""
    save_file(TENSORS, write(tmp_path / "model", config=FIELDS) / SAFE)
    return tmp_path / "model"


def edit_tensors(folder, **changes):
    """Put tensors beside those of the small model, or in place of them; None removes one."""
    tensors = {name: t for name, t in (TENSORS | changes).items() if t is not None}
    save_file(tensors, folder / SAFE)


def assert_same_weights(loaded, model=None):
    want, got = (model or small_model()).state_dict(), loaded.state_dict()
    assert list(want) == list(got)
    assert [name for name in want if not torch.equal(want[name], got[name])] == []


@torch.inference_mode()
def logits_of(name, dtype=torch.float32):
    """(32, 61): what we compute for the ids 0 to 31."""
    model, ids = load_model(name, dtype=dtype), torch.arange(32)
    return model.logits(model(ids, ids, attend_one_sequence))


@torch.inference_mode()
def their_logits_of(folder, dtype=torch.float32):
    """(32, 61): what transformers computes from the same folder."""
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return theirs.eval()(torch.arange(32)[None]).logits[0]


# ---- every layout --------------------------------------------------------------------------------
def with_masks(tensors, dtype):
    """As transformers wrote it until 2023: the causal mask of each layer among the weights."""
    mask = torch.ones(32, 32).tril().to(dtype).view(1, 1, 32, 32)
    masks = {f"transformer.h.{i}.attn.bias": mask.clone() for i in range(2)}
    masks |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    return tensors | masks


def with_the_head(tensors):
    """The embedding under a second name, one storage: what torch.save writes of a tied model."""
    return tensors | {HEAD: tensors[WTE]}


WRAPPERS = ["module._orig_mod.transformer.", "_orig_mod.module.transformer.", "_orig_mod.",
            "transformer._orig_mod.", "module.", ""]  # fmt: skip


def renamed(prefix):
    """Other modules around the model than `transformer`, and a head of the same name."""
    return lambda t: {n.replace("transformer.", prefix, 1): x for n, x in with_the_head(t).items()}


CHANGED = {  # a kind of file, and what is done to the tensors before
    **dict.fromkeys(LAYOUTS, dict),
    "safetensors, no prefix": lambda t: {n.removeprefix("transformer."): x for n, x in t.items()},
    "safetensors, nn.Linear": samples.as_linear,
    "safetensors, only the head": lambda t: {HEAD if n == WTE else n: t[n] for n in t},
    "zip, masks": lambda t: with_masks(t, torch.bool),
    "zip, parameters": lambda t: {name: torch.nn.Parameter(tensor) for name, tensor in t.items()},
    "zip, nn.Linear": lambda t: small_model().state_dict(),  # an OrderedDict, with the tied head
    "legacy, masks and head": lambda t: with_the_head(with_masks(t, torch.uint8)),
    "zip, layers compiled one by one": lambda t: {
        re.sub(r"(h\.\d+\.)", r"\1_orig_mod.", name): tensor for name, tensor in t.items()
    },
    **{f"zip, {prefix}": renamed(prefix) for prefix in WRAPPERS},
}


def write_layout(layout, tensors, folder):
    """Write tensors in one of these layouts, in place of model.safetensors."""
    (folder / SAFE).unlink(missing_ok=True)
    LAYOUTS[layout.split(",")[0]](CHANGED[layout](tensors), folder)


@pytest.mark.parametrize("layout", CHANGED)
def test_every_layout_gives_the_same_tensors(layout, folder):
    write_layout(layout, TENSORS, folder)
    loaded = load_model(folder)
    assert_same_weights(loaded)
    assert loaded.config == small_model().config
    assert loaded.lm_head.weight is loaded.wte.weight
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert all(parameter.is_contiguous() for parameter in loaded.parameters())


@pytest.mark.parametrize("layout", ["safetensors", "zip", "legacy", "zip in shards"])
@pytest.mark.parametrize("tied", [False, True, ...], ids=["not tied", "tied", "not said"])
def test_a_stored_head_that_differs_is_used_whatever_the_config_says(tied, layout, folder):
    """As in transformers, which reads the same folder."""
    edit_config(folder, tie_word_embeddings=tied)
    write_layout(layout, TENSORS | {HEAD: OTHER_HEAD}, folder)
    loaded = load_model(folder, torch.bfloat16)
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.lm_head.weight, OTHER_HEAD.bfloat16())
    assert torch.equal(loaded.wte.weight, TENSORS[WTE].bfloat16())
    want = their_logits_of(folder)
    torch.testing.assert_close(logits_of(folder), want, rtol=0, atol=1e-4)


def test_a_head_that_differs_in_its_last_row_alone_differs(folder):
    edit_config(folder, vocab_size=2050)
    wte = torch.randn(2050, 48)
    edit_tensors(folder, **{WTE: wte, HEAD: wte + (torch.arange(2050) == 2049)[:, None]})
    loaded = load_model(folder)
    assert (loaded.lm_head.weight - loaded.wte.weight).any(1).nonzero().tolist() == [[2049]]


# ---- nanoGPT -------------------------------------------------------------------------------------
OLD_ARGS = {k: v for k, v in samples.ARGS.items() if k != "bias"}  # until January 2023
MASKS = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
NANOGPTS = {  # model_args, tensors beside or in place of the small model's, a prefix, its GELU
    "biases": (samples.ARGS, {}, "", "gelu"),
    "no biases": (samples.ARGS | {"bias": False}, {}, "", "gelu"),
    "compiled, on two GPUs": (samples.ARGS, {}, "module._orig_mod.", "gelu"),
    "masks of an old PyTorch": (samples.ARGS | {"bias": False}, MASKS, "", "gelu"),
    "of 2022": (OLD_ARGS, {HEAD: OTHER_HEAD}, "", "gelu_new"),  # its head was not tied
}


@pytest.mark.parametrize("kind", NANOGPTS)
def test_nanogpts_checkpoint_computes_what_a_gpt2_of_its_weights_does(kind, tmp_path):
    """The GPT-2 is transformers': nn.Linear turned, biases of zero in place of none."""
    args, more, prefix, gelu = NANOGPTS[kind]
    has_biases = args.get("bias", True)
    gpt2 = {n: t * 0 if n.endswith("bias") and not has_biases else t for n, t in TENSORS.items()}
    theirs = write(tmp_path / "theirs", config=FIELDS | {"activation_function": gelu})
    save_file(gpt2 | (more if HEAD in more else {}), theirs / SAFE)
    state = samples.as_linear(with_the_head(TENSORS))
    state = {n: t for n, t in state.items() if has_biases or not n.endswith("bias")} | more
    samples.write_nanogpt(state, args, tmp_path, prefix)
    want = their_logits_of(theirs, torch.float64)
    for name in (tmp_path, str(tmp_path / "ckpt.pt")):
        torch.testing.assert_close(logits_of(name, torch.float64), want, rtol=0, atol=1e-9)
    loaded = load_model(tmp_path)
    assert (loaded.lm_head.weight is loaded.wte.weight) == (HEAD not in more)
    padded = {"vocab_size": 50304, "block_size": 32, "n_layer": 2, "n_head": 3, "n_embd": 48}
    assert nanogpt_config(padded, tmp_path).eos_token_id == 50256  # <|endoftext|>
    if not has_biases:  # and its file may not promise them
        samples.write_nanogpt(state, samples.ARGS, tmp_path)
        assert refusal(tmp_path).startswith(f"{tmp_path / 'ckpt.pt'}: 13 tensors are missing")


# ---- the config is honoured ----------------------------------------------------------------------
SECOND_NAMES = {"n_embd": ..., "hidden_size": 48, "n_head": ..., "num_attention_heads": 3}
SECOND_NAMES |= {"n_layer": ..., "num_hidden_layers": 2}
SECOND_NAMES |= {"n_positions": ..., "max_position_embeddings": 32}
CONFIGS = [  # fields of a model that transformers builds, and changes to what it wrote of them
    ({"n_inner": 100, "activation_function": "gelu", "layer_norm_epsilon": 0.1}, {}),
    ({"activation_function": "relu"}, {}),
    ({"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}, {}),
    ({"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}, {}),
    ({"n_positions": 48, "vocab_size": 50, "n_layer": 3, "n_head": 6}, {}),
    ({"tie_word_embeddings": False}, {}),
    ({}, SECOND_NAMES),
    ({}, {"n_embd": 48, "hidden_size": 48}),
    ({}, {"model_type": ..., "architectures": ...}),
    ({}, {"n_inner": ..., "activation_function": ..., "layer_norm_epsilon": ...}),
    ({}, {"resid_pdrop": 0.5, "n_ctx": 7, "torch_dtype": "float16", "scale_attn_weights": ...}),
    ({"activation_function": "gelu"}, {"activation_function": "gelu_python"}),
    *[({}, {"activation_function": f"gelu_{x}"}) for x in ("fast", "accurate", "pytorch_tanh")],
    ({}, {"activation_function": "gelu_python_tanh"}),
]


@pytest.mark.parametrize("built, changes", CONFIGS, ids=str)
def test_a_config_means_what_it_means_in_transformers(built, changes, tmp_path):
    theirs = GPT2LMHeadModel(GPT2Config(**FIELDS | built))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2, generator=generator)
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    # The "upcast" attention of transformers runs in float32 only.
    upcast = "reorder_and_upcast_attn" in built
    dtype, atol = (torch.float32, 1e-3) if upcast else (torch.float64, 1e-9)
    want = their_logits_of(tmp_path, dtype)
    torch.testing.assert_close(logits_of(tmp_path, dtype), want, rtol=0, atol=atol)
    assert want.abs().max() > 1


def test_an_integer_is_a_number_and_a_byte_order_mark_is_none(folder):
    edit_config(folder, layer_norm_epsilon=1, eos_token_id=[7, 60])
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text, encoding="utf-8-sig")
    config = load_model(folder).config
    assert config.layer_norm_epsilon == 1
    assert config.eos_token_id == 7  # the engine is told of all
    (folder / "config.json").write_text(text)
    edit_config(folder, eos_token_id=50256)  # small models keep GPT-2's, which they can't draw
    assert load_model(folder).config.eos_token_id is None


# ---- memory, dtypes and copies -------------------------------------------------------------------
BIG_LAYOUTS = ["safetensors", "safetensors in shards", "zip", "zip in shards", "legacy", "nanoGPT"]
BIG = {"vocab_size": 20_000, "n_layer": 5, "n_head": 8, "n_embd": 512}


@pytest.mark.skipif(sys.platform != "linux", reason="others count mapped files in another way")
@pytest.mark.parametrize("layout", BIG_LAYOUTS)
def test_a_load_peaks_near_one_copy_of_the_model(layout, folder, tmp_path):
    """One copy in the dtype asked for, and of the file its largest tensor or 32 MiB; 25 MB more.

    Pages of a mapped file count too. PyTorch cannot map a file from before 1.6, and reads it whole.
    """
    load_model(folder)  # imports what it needs

    def write_big(layout):  # in a child too: what this process has freed would not be counted
        tensors = in_the_file(GPT(GPTConfig(**BIG, max_seq_len=64)).init_weights())
        if layout == "nanoGPT":
            args = BIG | {"block_size": 64, "bias": True}
            return samples.write_nanogpt(samples.as_linear(with_the_head(tensors)), args, tmp_path)
        write(tmp_path, config=FIELDS | BIG | {"n_positions": 64})
        LAYOUTS[layout](with_the_head(tensors) if "zip" in layout else tensors, tmp_path)

    def load_big(dtype):
        load_model(tmp_path, dtype)

    assert samples.in_a_child(write_big, [layout]).end == ""
    file_mb = (26_034_176 if "legacy" in layout else 20_000 * 512) * 4 / 2**20
    for dtype in (torch.float32, torch.bfloat16):
        weights_mb = 26_034_176 * dtype.itemsize / 2**20
        outcome = samples.in_a_child(load_big, [dtype])
        assert outcome.end == ""
        # Memory that the parent had freed is used again, and is not counted.
        assert 0.25 * weights_mb < outcome.peak_mb < weights_mb + file_mb + 25, dtype


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_weights_are_cast_to_the_dtype_asked_for_whatever_the_file_holds(stored, folder):
    """And they are copies: safetensors maps the file, and a view of it follows the file."""
    edit_tensors(folder, **{name: tensor.to(stored) for name, tensor in TENSORS.items()})
    loaded = [load_model(folder, dtype=dtype) for dtype in DTYPES]
    path = folder / SAFE
    with open(path, "r+b") as file:  # in place; a shorter file would kill the process
        file.write(bytes(path.stat().st_size))
    for model, dtype in zip(loaded, DTYPES, strict=True):
        for name, tensor in small_model().state_dict().items():
            assert model.state_dict()[name].dtype == dtype
            assert torch.equal(model.state_dict()[name], tensor.to(stored).to(dtype)), name


# ---- random weights ------------------------------------------------------------------------------
PARAMETERS = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080}
PARAMETERS["gpt2-xl"] = 1_557_611_200


def test_random_weights_are_always_the_same_and_of_the_four_gpt2s_shapes(monkeypatch):
    for name, (n_layer, n_head, n_embd) in load.RANDOM_SHAPES.items():
        with torch.device("meta"):
            model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
        assert (model.num_parameters(), n_embd) == (PARAMETERS[name], 64 * n_head)
    monkeypatch.setitem(load.RANDOM_SHAPES, "small", (1, 2, 16))
    torch.manual_seed(0)
    first = load_model("random:small")
    torch.manual_seed(1)
    assert_same_weights(load_model("random:small"), first)
    assert first.config == GPTConfig(n_layer=1, n_head=2, n_embd=16, eos_token_id=50256)
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    loaded = load_model("random:small", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.lm_head.weight is loaded.wte.weight
    assert weights_kind("random:gpt2-xl") == "random weights"
    assert weights_kind("/models/random") == "trained weights"
    with pytest.raises(ValueError, match="no shape 'gpt3': .* gpt2, gpt2-medium, gpt2-large"):
        load_model("random:gpt3")


# ---- refusals ------------------------------------------------------------------------------------
MATRIX = "transformer.h.1.attn.c_attn.weight"  # (48, 144) in the file
BIAS = "transformer.ln_f.bias"
NOT_FINITE = "holds NaN or infinity as torch.float32"


def one_in_zeros(number):
    """A matrix of zeros and this one number: every element has to be looked at."""
    matrix = torch.zeros(48, 144)
    matrix[17, 5] = number
    return matrix


CONFIG_FAULTS = [  # a change to config.json, and what is said of it
    ({"model_type": "llama"}, "model_type is 'llama', only 'gpt2' is served"),
    ({"model_type": ..., "n_embd": ..., "hidden_size": 48}, "model_type is None, only 'gpt2' is"),
    ({"num_attention_heads": 4}, "n_head is 3 and num_attention_heads is 4, two names of one"),
    ({"add_cross_attention": True}, "add_cross_attention is set"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
    ({"activation_function": "swish"}, "activation_function is 'swish': choose one of gelu_new"),
    ({"n_layer": True}, "n_layer is True, not of type int"),
    ({"vocab_size": 0}, "vocab_size is 0: it must be at least 1"),
    ({"vocab_size": 10**30}, f"vocab_size is {10**30}, at most 10000000 is read"),
    ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan: it must be finite"),
    ({"scale_attn_weights": 1}, "scale_attn_weights is 1, not of type bool"),
    ({"tie_word_embeddings": False}, "1 tensors are missing, the first is 'lm_head.weight'"),
    ({"eos_token_id": ["60"]}, "eos_token_id is '60', not of type int"),
]
TENSOR_FAULTS = [  # the tensor, what stands in its place (None: nothing), what is said
    ("transformer.h.1.ln_2.bias", None, "1 tensors are missing, the first is 'h.1.ln_2.bias'"),
    (WTE, None, "2 tensors are missing, the first is 'wte.weight'"),
    ("transformer.h.2.ln_1.bias", torch.zeros(48), "'{}' has no place in this model"),
    ("wpe.weight", torch.zeros(32, 48), "wpe.weight' has no place in this model"),  # twice
    # a bias under the name of a mask; a matrix in nanoGPT's layout beside one in GPT-2's
    ("transformer.h.0.attn.bias", torch.ones(144), "'{}' has no place in this model"),
    (MATRIX, torch.zeros(144, 48), "'{}' has shape (48, 144), its config asks for (144, 48)"),
    (MATRIX, torch.tensor(1.0), "'{}' has shape (), its config asks for (144, 48)"),
    (MATRIX, one_in_zeros(torch.nan), "'{}' " + NOT_FINITE),
    (MATRIX, one_in_zeros(torch.inf), "'{}' " + NOT_FINITE),
    (BIAS, torch.full((48,), 1e300, dtype=torch.float64), "'{}' " + NOT_FINITE),
    (MATRIX, torch.zeros(48, 144, dtype=torch.int8), "'{}' holds torch.int8, not floats"),
    ("x" * 10**5, torch.zeros(1), "xxx... has no place in this model"),
    ("\x1b[31m", torch.zeros(1), r"'\x1b[31m' has no place in this model"),
]


@pytest.mark.parametrize("changes, reason", CONFIG_FAULTS, ids=str)
def test_a_config_of_another_model_is_refused_with_the_field_named(changes, reason, folder):
    edit_config(folder, **changes)
    file = SAFE if "missing" in reason else "config.json"
    assert refusal(folder).startswith(f"{folder / file}: {reason}")


@pytest.mark.parametrize("name, value, reason", TENSOR_FAULTS, ids=range(len(TENSOR_FAULTS)))
def test_a_tensor_that_does_not_fit_is_refused_by_name(name, value, reason, folder):
    edit_tensors(folder, **{name: value})
    message = refusal(folder)
    assert message.startswith(f"{folder / SAFE}: ") and message.endswith(reason.format(name))


def test_what_is_no_folder_of_a_model_is_refused(folder):
    message = refusal(folder / "nowhere")
    assert message.startswith(f"{str(folder / 'nowhere')!r} is no folder here and no hub id: ")
    assert refusal(folder / "config.json").startswith(str(folder / "config.json"))
    torch.save(TENSORS, folder / SAFE)  # a pickle under this name is not executed
    assert refusal(folder).startswith(f"{folder / SAFE} is refused, or damaged: Safet")


# ---- python -m checkpoints.load NAME -------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_program_describes_the_shipped_model_and_refuses_in_one_sentence(
    shipped_model_folder, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["load.py", str(shipped_model_folder)])
    runpy.run_module("checkpoints.load", run_name="__main__")
    out = capsys.readouterr().out
    assert str(shipped_model_folder) in out
    assert re.search(r"transformers\s+the same logits for 64 tokens, to \d\.\de-0[5-9]", out)
    monkeypatch.setattr(sys, "argv", ["load.py", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("checkpoints.load", run_name="__main__")
    assert end.value.code.startswith(f"checkpoints/load.py: {tmp_path} holds no weights")
    assert "\n" not in end.value.code and capsys.readouterr().out == ""
    monkeypatch.setitem(sys.modules, "transformers", None)
    load.describe(str(folder))
    out = capsys.readouterr().out
    assert "not installed" in out and "max_seq_len=32, n_layer=2, n_head=3," in out
    assert "61,104 parameters" in out  # 61 x 48 + 32 x 48 + 2 x 28,272 + 96
    assert "384 bytes in 16 bits" in out  # 2 x 2 x 48 numbers of K and V a token
    samples.write_nanogpt(samples.as_linear(with_the_head(TENSORS)), samples.ARGS, folder)
    load.describe(str(folder / "ckpt.pt"))
    assert "transformers reads no nanoGPT checkpoints" in capsys.readouterr().out


VERDICTS = {
    "zip, module._orig_mod.transformer.": "the same logits for 32 tokens",
    "safetensors, no prefix": "the same logits for 32 tokens",
    "legacy, masks and head": "the same logits for 32 tokens",
    "safetensors, nn.Linear": "not compared: transformers does not know this layout",
}


@pytest.mark.parametrize("layout", VERDICTS)
def test_what_loads_agrees_with_transformers_or_is_no_layout_of_its(
    layout, folder, monkeypatch, capsys
):
    """Its code would build 100 million labels, and look for somebody's attention on the hub."""
    write_layout(layout, TENSORS, folder)
    edit_config(folder, num_labels=10**8, _attn_implementation="someone/kernel")
    (folder / "generation_config.json").write_text("no JSON")
    if (folder / SAFE).exists():  # as a file it is served though an adapter lies beside it
        write(folder, adapter_config={"base_model_name_or_path": "someone/else"})
        folder = folder / SAFE
    load.describe(str(folder))
    assert re.search(rf"transformers +{VERDICTS[layout]}", capsys.readouterr().out)
    spoiled = copy.deepcopy(load_model(folder))
    spoiled.h[1].mlp.c_proj.weight.mul_(1.1)
    monkeypatch.setattr(load, "load_model", lambda name: spoiled)
    if "same" in VERDICTS[layout]:
        with pytest.raises(ValueError, match="logits differ from transformers"):
            load.describe(str(folder))
