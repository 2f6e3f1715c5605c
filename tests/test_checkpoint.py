"""Every layout of a GPT-2 checkpoint that is found in the wild loads; whatever else is refused.

A folder is `config.json` and `model.safetensors`. The tests write one small model in each layout
and compare all its tensors bit by bit with the model it came from; then they break the folder, one
thing at a time, and read the refusal, which names the file and the field or the tensor. A refusal
is a ValueError whatever was wrong: bytes on a disk are never a reason for another exception.
"""

import json
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, GPT2Model

import checkpoint
from checkpoint import load_model, save_model, weights_kind
from model import GPT, GPTConfig, attend_one_sequence

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


# ---- what loads ----------------------------------------------------------------------------------
def test_what_is_written_is_read_back_bit_by_bit(folder, model):
    loaded = load_model(folder)
    assert_same_weights(loaded, model)
    assert loaded.config == model.config
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_loaded_model_is_ready_to_serve(folder):
    loaded = load_model(str(folder))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert all(parameter.is_contiguous() for parameter in loaded.parameters())
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}


def test_names_without_the_prefix_load_as_openais_own_file_has_them(folder, model):
    def drop_prefix(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        assert "h.1.mlp.c_fc.weight" in tensors

    edit_tensors(folder, drop_prefix)
    assert_same_weights(load_model(folder), model)


def test_the_causal_mask_that_old_files_store_is_skipped(folder, model):
    def add_masks(tensors):
        for layer in range(2):
            mask = torch.ones(32, 32, dtype=torch.uint8).tril().view(1, 1, 32, 32)
            tensors[f"transformer.h.{layer}.attn.bias"] = mask
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
            assert f"transformer.h.{layer}.attn.c_attn.bias" in tensors  # a weight, not a mask

    edit_tensors(folder, add_masks)
    assert_same_weights(load_model(folder), model)


def test_a_tied_head_that_is_stored_a_second_time_is_skipped(folder, model):
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 0.0}))
    assert_same_weights(load_model(folder), model)


def test_a_head_of_its_own_is_read(folder, model):
    head = torch.randn(61, 48, generator=torch.Generator().manual_seed(1))
    edit_config(folder, tie_word_embeddings=False)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": head}))
    loaded = load_model(folder)
    assert torch.equal(loaded.lm_head.weight, head)
    assert torch.equal(loaded.wte.weight, model.wte.weight)


def test_the_layouts_that_transformers_writes_load(folder, model):
    """GPT2LMHeadModel writes the prefix, GPT2Model none: the two styles found on the hub."""
    theirs = GPT2LMHeadModel.from_pretrained(folder)
    theirs.save_pretrained(folder / "with prefix")
    theirs.transformer.save_pretrained(folder / "without")
    assert "transformer.wte.weight" in load_file(folder / "with prefix" / "model.safetensors")
    assert "wte.weight" in load_file(folder / "without" / "model.safetensors")
    assert_same_weights(load_model(folder / "with prefix"), model)
    assert_same_weights(load_model(folder / "without"), model)


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


def test_the_four_transposed_matrices_stand_as_in_and_out_in_the_file(folder):
    tensors = load_file(folder / "model.safetensors")
    shapes = {name: tuple(tensors["transformer." + name].shape) for name in (
        "wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight",
        "h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight",
    )}  # fmt: skip
    assert shapes == {
        "wte.weight": (61, 48),
        "wpe.weight": (32, 48),
        "h.0.attn.c_attn.weight": (48, 144),
        "h.0.attn.c_proj.weight": (48, 48),
        "h.0.mlp.c_fc.weight": (48, 192),
        "h.0.mlp.c_proj.weight": (192, 48),
    }


def test_a_square_matrix_is_transposed_too(folder, model):
    """attn.c_proj is (C, C): its shape fits either way, so only its numbers can tell."""
    stored = load_file(folder / "model.safetensors")["transformer.h.0.attn.c_proj.weight"]
    assert torch.equal(stored.t(), load_model(folder).h[0].attn.c_proj.weight)
    assert not torch.equal(stored, stored.t())


def test_fields_that_are_missing_or_null_have_gpt2s_defaults(folder):
    optional = ("n_inner", "activation_function", "layer_norm_epsilon", "scale_attn_weights")
    edit_config(folder, **dict.fromkeys(optional, ...))
    assert load_model(folder).config == CONFIG
    edit_config(folder, **dict.fromkeys(optional))
    assert load_model(folder).config == CONFIG


def test_fields_that_do_not_change_inference_are_ignored(folder):
    edit_config(folder, resid_pdrop=0.5, n_ctx=7, torch_dtype="float16", summary_type="cls_index")
    assert load_model(folder).config == CONFIG


def test_an_epsilon_written_as_an_integer_is_a_number(folder):
    edit_config(folder, layer_norm_epsilon=1)
    assert load_model(folder).config.layer_norm_epsilon == 1


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


def test_two_loads_share_no_memory(folder, model):
    first, second = load_model(folder), load_model(folder)
    first.wte.weight.zero_()
    assert_same_weights(second, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_loaded_model_does_not_change_when_its_file_is_rewritten(dtype, folder, model):
    """safetensors maps the file into memory: a tensor that is not copied follows the file."""
    loaded = load_model(folder, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:  # in place; a shorter file would kill the process
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


# ---- random weights ------------------------------------------------------------------------------
def test_random_weights_are_always_the_same_and_called_random(monkeypatch):
    monkeypatch.setitem(checkpoint.RANDOM_SHAPES, "small", (1, 2, 16))
    torch.manual_seed(0)
    first = load_model("random:small")
    torch.manual_seed(1)
    assert_same_weights(load_model("random:small"), first)
    shape = GPTConfig(n_layer=1, n_head=2, n_embd=16, eos_token_id=50256)
    assert first.config == shape
    assert not first.training
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_random_weights_come_in_the_dtype_asked_for(monkeypatch):
    monkeypatch.setitem(checkpoint.RANDOM_SHAPES, "small", (1, 2, 16))
    loaded = load_model("random:small", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.lm_head.weight is loaded.wte.weight


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
    n_layer, n_head, n_embd = checkpoint.RANDOM_SHAPES[name]
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert model.num_parameters() == num_parameters
    assert model.config.head_dim == 64


def test_the_real_gpt2_shape_is_built_without_a_download():
    model = load_model("random:gpt2", dtype=torch.bfloat16)
    assert model.num_parameters() == 124_439_808
    assert (model.config.vocab_size, model.config.max_seq_len) == (50257, 1024)
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("random:gpt2", "random weights"),
        ("random:gpt2-xl", "random weights"),
        ("assets/tiny-gpt2", "trained weights"),
        ("/models/random", "trained weights"),
    ],
)
def test_whoever_prints_a_figure_can_say_what_the_weights_were(name, kind):
    assert weights_kind(name) == kind


def test_an_unknown_random_shape_is_refused():
    with pytest.raises(ValueError, match="no shape 'gpt3' .* gpt2, gpt2-medium, gpt2-large"):
        load_model("random:gpt3")


# ---- refusals: config.json -----------------------------------------------------------------------
def refusal(folder, **options):
    """The text of the ValueError that loading the folder raises."""
    with pytest.raises(ValueError) as raised:
        load_model(folder, **options)
    return str(raised.value)


def test_a_folder_that_does_not_exist_is_refused_with_what_one_holds(tmp_path):
    message = refusal(tmp_path / "nowhere")
    assert message.startswith(f"no folder '{tmp_path / 'nowhere'}': ")
    assert "config.json and model.safetensors" in message
    assert "random:gpt2" in message


def test_a_file_in_place_of_a_folder_is_refused(folder):
    assert refusal(folder / "config.json").startswith("no folder ")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_one_of_its_two_files_is_refused(name, folder):
    (folder / name).unlink()
    assert refusal(folder).startswith(f"{folder / name} is missing: ")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_in_place_of_one_of_the_files_is_refused(name, folder):
    (folder / name).unlink()
    (folder / name).mkdir()
    assert refusal(folder).startswith(f"{folder / name} is not ")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"GPT-2",
        b'{"n_layer": 2,}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"n_layer": ' + b"1" * 5000 + b"}",
    ],
    ids=["empty", "cut off", "prose", "comma", "not UTF-8", "too deep", "too many digits"],
)
def test_a_config_that_is_not_json_is_refused(text, folder):
    (folder / "config.json").write_bytes(text)
    assert refusal(folder).startswith(f"{folder / 'config.json'} is not JSON: ")


@pytest.mark.parametrize(
    ("text", "kind"), [("[]", "list"), ('"gpt2"', "str"), ("null", "NoneType")]
)
def test_json_that_is_not_an_object_is_refused(text, kind, folder):
    (folder / "config.json").write_text(text)
    assert f"config.json holds a {kind}, not an object of fields" in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("model_type", "llama", "model_type is 'llama', only 'gpt2' is served"),
        ("model_type", ..., "model_type is None, only 'gpt2' is served"),
        ("add_cross_attention", True, "add_cross_attention is set"),
        ("activation_function", "swish", "activation_function is 'swish': choose one of gelu_new"),
        ("activation_function", ["gelu"], "activation_function is ['gelu'], not of type str"),
        ("n_layer", "2", "n_layer is '2', not of type int"),
        ("n_layer", 2.0, "n_layer is 2.0, not of type int"),
        ("n_layer", True, "n_layer is True, not of type int"),
        ("n_layer", [2], "n_layer is [2], not of type int"),
        ("n_layer", 0, "n_layer is 0: it must be at least 1"),
        ("n_layer", 10**9, "n_layer is 1000000000, at most 10000000 is accepted"),
        ("vocab_size", 10**30, f"vocab_size is {10**30}, at most 10000000 is accepted"),
        ("n_positions", -1, "max_seq_len is -1: it must be at least 1"),
        ("n_embd", 50, "n_embd 50 is not a multiple of n_head 3"),
        ("n_inner", 0, "n_inner is 0: it must be at least 1"),
        ("layer_norm_epsilon", "1e-5", "layer_norm_epsilon is '1e-5', not of type float"),
        ("layer_norm_epsilon", False, "layer_norm_epsilon is False, not of type float"),
        ("layer_norm_epsilon", float("nan"), "layer_norm_epsilon is nan: it must be finite"),
        ("scale_attn_weights", 1, "scale_attn_weights is 1, not of type bool"),
        ("scale_attn_by_inverse_layer_idx", "no", "scale_attn_by_inverse_layer_idx is 'no', not"),
        ("tie_word_embeddings", 0, "tie_word_embeddings is 0, not of type bool"),
        ("eos_token_id", [60], "eos_token_id is [60], not of type int"),
    ],
)
def test_a_config_of_another_model_is_refused_with_the_field_named(field, value, reason, folder):
    edit_config(folder, **{field: value})
    assert refusal(folder).startswith(f"{folder / 'config.json'}: {reason}")


# ---- refusals: model.safetensors -----------------------------------------------------------------
def put(name, value):
    """An edit that replaces or adds one tensor; a value of None removes it."""

    def edit(tensors):
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return edit


MATRIX = "transformer.h.1.attn.c_attn.weight"  # (48, 144) in the file


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (
            put("transformer.h.1.ln_2.bias", None),
            ": 1 tensors are missing, the first is 'h.1.ln_2.bias'",
        ),
        (
            put("transformer.wte.weight", None),
            ": 2 tensors are missing, the first is 'wte.weight'",
        ),
        (
            put("transformer.h.2.ln_1.bias", torch.zeros(48)),
            ": tensor 'transformer.h.2.ln_1.bias' has no place in this model",
        ),
        (
            put("score.weight", torch.zeros(2, 48)),
            ": tensor 'score.weight' has no place in this model",
        ),
        (
            put("wpe.weight", torch.zeros(32, 48)),  # there already, under its longer name
            "wpe.weight' has no place in this model",
        ),
        (
            put("transformer.wpe.weight", torch.zeros(16, 48)),
            ": tensor 'transformer.wpe.weight' has shape (16, 48), config.json asks for (32, 48)",
        ),
        (
            put(MATRIX, torch.zeros(144, 48)),  # as nanoGPT stores it
            f": tensor '{MATRIX}' has shape (48, 144), config.json asks for (144, 48)",
        ),
        (
            put(MATRIX, torch.zeros(1, 48, 144)),
            f": tensor '{MATRIX}' has shape (1, 48, 144), config.json asks for (144, 48)",
        ),
        (
            put(MATRIX, torch.tensor(1.0)),
            f": tensor '{MATRIX}' has shape (), config.json asks for (144, 48)",
        ),
        (
            put(MATRIX, torch.full((48, 144), torch.nan)),
            f": '{MATRIX}' holds NaN or infinity as torch.float32",
        ),
        (
            put("transformer.ln_f.bias", torch.full((48,), -torch.inf)),
            ": 'transformer.ln_f.bias' holds NaN or infinity as torch.float32",
        ),
        (
            put("transformer.ln_f.bias", torch.full((48,), 1e300, dtype=torch.float64)),
            ": 'transformer.ln_f.bias' holds NaN or infinity as torch.float32",
        ),
        (
            put(MATRIX, torch.zeros(48, 144, dtype=torch.int8)),
            f": tensor '{MATRIX}' holds torch.int8, not floats",
        ),
        (
            put(MATRIX, torch.zeros(48, 144).to(torch.float8_e4m3fn)),
            f": tensor '{MATRIX}' holds torch.float8_e4m3fn, not floats",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(edit, reason, folder):
    edit_tensors(folder, edit)
    message = refusal(folder)
    assert message.startswith(str(folder / "model.safetensors"))
    assert message.endswith(reason)


def test_one_nan_among_all_weights_is_found(folder):
    def spoil(tensors):
        tensors[MATRIX][17, 5] = torch.nan

    edit_tensors(folder, spoil)
    assert f"'{MATRIX}' holds NaN" in refusal(folder)


def test_a_weight_too_large_for_the_dtype_asked_for_is_refused(folder):
    """1e5 is a number in float32 and infinity in float16, whose largest is 65,504."""
    edit_tensors(folder, put("transformer.ln_f.bias", torch.full((48,), 1e5)))
    assert load_model(folder).ln_f.bias[0].item() == 1e5
    message = refusal(folder, dtype=torch.float16)
    assert message.endswith("'transformer.ln_f.bias' holds NaN or infinity as torch.float16")


def test_a_head_of_its_own_that_is_not_in_the_file_is_refused(folder):
    edit_config(folder, tie_word_embeddings=False)
    assert refusal(folder).endswith("1 tensors are missing, the first is 'lm_head.weight'")


def test_a_config_of_another_size_is_refused_at_the_first_tensor_that_differs(folder):
    edit_config(folder, n_layer=3)
    assert "12 tensors are missing, the first is 'h.2.ln_1.weight'" in refusal(folder)
    edit_config(folder, n_layer=1)
    assert "'transformer.h.1." in refusal(folder)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 0.5, 0.99, -1])
def test_a_file_that_was_cut_off_is_refused(kept, folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    assert refusal(folder).startswith(f"{path} is not a whole safetensors file: ")


def test_a_pickle_under_this_name_is_refused_and_not_executed(folder):
    path = folder / "model.safetensors"
    torch.save({"wte.weight": torch.zeros(61, 48)}, path)
    assert refusal(folder).startswith(f"{path} is not a whole safetensors file: ")


# ---- refusals: any bytes -------------------------------------------------------------------------
def corrupt(whole, header_bytes, rng):
    """One way in which a file goes bad: a changed byte, a cut, a hole, something at the end."""
    bad = bytearray(whole)
    at = rng.randrange(len(bad))
    in_header = rng.randrange(min(header_bytes, len(bad)))
    match rng.choice(["byte", "bit", "header", "header", "header", "cut", "hole", "tail"]):
        case "byte":
            bad[at] = rng.randrange(256)
        case "bit":
            bad[at] ^= 1 << rng.randrange(8)
        case "header":
            bad[in_header] = rng.choice(b'0123456789"{}[],:FBIU \x00\xff')
        case "cut":
            del bad[at:]
        case "hole":
            del bad[at : at + rng.randint(1, 64)]
        case "tail":
            bad += rng.randbytes(rng.randint(1, 64))
    return bytes(bad)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_corrupt_file_loads_with_finite_weights_or_is_refused_with_a_value_error(name, tmp_path):
    small = GPT(GPTConfig(vocab_size=11, max_seq_len=8, n_layer=1, n_head=1, n_embd=8))
    save_model(small.init_weights(std=0.2), tmp_path, torch.float32)
    path, rng = tmp_path / name, random.Random(0)
    whole = path.read_bytes()
    is_json = name == "config.json"
    header_bytes = len(whole) if is_json else 8 + struct.unpack("<Q", whole[:8])[0]
    loaded = refused = 0
    for _ in range(300):
        bad = corrupt(whole, header_bytes, rng)
        path.write_bytes(bad)
        try:
            weights = load_model(tmp_path).state_dict().values()
        except ValueError as error:
            assert str(path) in str(error) or is_json  # another size is refused at the tensors
            refused += 1
        else:
            assert all(tensor.isfinite().all() for tensor in weights), bad
            loaded += 1
    assert loaded > 20 and refused > 100  # both happen, or this test has lost its teeth


def test_a_file_whose_header_claims_more_than_it_holds_is_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 1, 2**31, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + whole[8:])
        assert refusal(folder).startswith(f"{path} is not a whole safetensors file: ")


def test_saving_makes_the_folders_on_the_way(model, tmp_path):
    save_model(model, tmp_path / "a" / "b", torch.float32)
    assert_same_weights(load_model(tmp_path / "a" / "b"), model)


def test_transformers_own_base_model_reads_the_folder_too(folder):
    assert GPT2Model.from_pretrained(folder).config.n_embd == 48
