"""From a Hugging Face folder to the model: names, transposes, refusals.

A GPT-2 checkpoint is a `config.json` and a file of named tensors. Our model uses the same names, so
loading is three small rules instead of a table of 148 entries (the 124M model):

    transformer.h.0.attn.c_attn.weight  (768, 2304)     the file: GPT-2's "Conv1D" stores (in, out)
                h.0.attn.c_attn.weight  (2304, 768)     the model: nn.Linear stores (out, in)
    └ 1. drop the prefix                └ 2. transpose these four, and only these
    3. skip `h.N.attn.bias`: the causal mask, which old files store as if it were a weight

Whatever does not fit is refused with the file and the tensor named, before anything is returned: a
model that is half loaded writes plausible nonsense. `random:gpt2` (-medium, -large, -xl) builds the
real shapes with random weights, to measure speed without a download; whoever prints such a figure
has to say so (`weights_kind`). What a production engine does beyond this: dozens of architectures,
sharded and quantised files, loading straight to a GPU.

File format: safetensors, an 8-byte length, a JSON header, the bytes
(github.com/huggingface/safetensors).
Run: python checkpoint.py
Try: delete one name from CONV1D and read the refusal; or `load_model("random:gpt2-xl")` and count
its gigabytes.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import GPT, GPTConfig, attend_one_sequence

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")  # the leading dot spares `.attn.c_attn.bias`
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # an int8 file has scales
LARGEST_SIZE = 10_000_000  # far above every GPT-2, and any two of them multiplied fit in 64 bits
WHOLE = "a checkpoint folder has config.json and model.safetensors"

RANDOM_SHAPES = {  # name: (n_layer, n_head, n_embd)
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}

# config.json's name -> (ours, type). What is not listed (dropout rates, initialiser) does not
# change inference.
CONFIG_FIELDS = {
    "vocab_size": ("vocab_size", int),
    "n_positions": ("max_seq_len", int),
    "n_layer": ("n_layer", int),
    "n_head": ("n_head", int),
    "n_embd": ("n_embd", int),
    "n_inner": ("n_inner", int),
    "activation_function": ("activation_function", str),
    "layer_norm_epsilon": ("layer_norm_epsilon", float),
    "scale_attn_weights": ("scale_attn_weights", bool),
    "scale_attn_by_inverse_layer_idx": ("scale_attn_by_inverse_layer_idx", bool),
    "tie_word_embeddings": ("tie_word_embeddings", bool),
    "eos_token_id": ("eos_token_id", int),
}


def weights_kind(name: str) -> str:
    """Say "random weights" of the built-in shapes, else "trained weights": beside every figure."""
    return "random weights" if name.startswith("random:") else "trained weights"


def load_model(
    name: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> GPT:
    """Load a folder in Hugging Face's GPT-2 layout, or build `random:gpt2` and its larger sisters.

    The weights are cast to `dtype` whatever the file holds. Raises ValueError, naming the file and
    the field or tensor, for anything that is missing, left over, of another shape, not finite, or
    not a GPT-2.
    """
    name = str(name)
    if name.startswith("random:"):
        return random_model(name.removeprefix("random:"), dtype, device)
    folder = Path(name)
    if not folder.is_dir():
        known = ", ".join(f"random:{shape}" for shape in RANDOM_SHAPES)
        raise ValueError(f"no folder {name!r}: {WHOLE}; without one, take one of {known}")
    config = read_config(folder / "config.json")
    with torch.device("meta"):  # shapes without memory: each weight exists once, in its dtype
        model = GPT(config)
    tensors = read_tensors(folder / "model.safetensors", model, dtype, device)
    model.load_state_dict(tensors, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.wte.weight  # assign=True replaced the one both shared
    return model.requires_grad_(False).eval()


def random_model(shape: str, dtype: torch.dtype, device: str | torch.device) -> GPT:
    """A GPT-2 of a known shape with weights of GPT-2's own initialisation, always the same ones."""
    if shape not in RANDOM_SHAPES:
        known = ", ".join(RANDOM_SHAPES)
        raise ValueError(f"no shape {shape!r} to fill at random: choose one of {known}")
    n_layer, n_head, n_embd = RANDOM_SHAPES[shape]
    model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, eos_token_id=50256))
    return model.init_weights().to(device=device, dtype=dtype).requires_grad_(False).eval()


def read_config(path: Path) -> GPTConfig:
    """`config.json` to GPTConfig. Raises ValueError naming the field that we cannot run."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {WHOLE}") from None
    except (OSError, ValueError, RecursionError) as error:  # a folder, not UTF-8, nested too deep
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not an object of fields")
    if raw.get("model_type") != "gpt2":
        raise ValueError(f"{path}: model_type is {raw.get('model_type')!r}, only 'gpt2' is served")
    if raw.get("add_cross_attention"):
        raise ValueError(f"{path}: add_cross_attention is set, no encoder-decoder is served")
    fields = {}
    for theirs, (ours, kind) in CONFIG_FIELDS.items():
        value = raw.get(theirs)
        if value is None:
            continue
        # bool is a subclass of int in Python; an integer epsilon is a legitimate float.
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not fits and not (kind is float and type(value) is int):
            raise ValueError(f"{path}: {theirs} is {value!r}, not of type {kind.__name__}")
        if kind is int and abs(value) > LARGEST_SIZE:
            raise ValueError(f"{path}: {theirs} is {value}, at most {LARGEST_SIZE} is accepted")
        fields[ours] = value
    try:
        return GPTConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_tensors(
    path: Path, model: GPT, dtype: torch.dtype, device: str | torch.device
) -> dict[str, Tensor]:
    """All of the model's weights from one safetensors file, renamed, transposed, cast, moved."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = model.config.tie_word_embeddings
    state: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():
                name = stored.removeprefix("transformer.")
                if name.endswith(MASK_BUFFERS) or (name == "lm_head.weight" and tied):
                    continue
                if name not in wanted or name in state:  # unknown, or there under both its names
                    raise ValueError(f"{path}: tensor {stored!r} has no place in this model")
                tensor = file.get_tensor(stored)
                if tensor.dtype not in FLOATS:
                    raise ValueError(f"{path}: tensor {stored!r} holds {tensor.dtype}, not floats")
                if name.endswith(CONV1D) and tensor.ndim == 2:
                    tensor = tensor.t()
                if tuple(tensor.shape) != wanted[name]:
                    found = f"{tuple(tensor.shape)}, config.json asks for {wanted[name]}"
                    raise ValueError(f"{path}: tensor {stored!r} has shape {found}")
                # A copy: the file is only mapped, and whoever rewrites it would change our weights.
                tensor = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
                if not tensor.isfinite().all():  # after the cast: 1e5 is infinite in float16
                    raise ValueError(f"{path}: {stored!r} holds NaN or infinity as {dtype}")
                state[name] = tensor.to(device)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {WHOLE}") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    if tied and "wte.weight" in state:
        state["lm_head.weight"] = state["wte.weight"]
    missing = [name for name in wanted if name not in state]
    if missing:
        raise ValueError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]!r}")
    return state


def save_model(model: GPT, folder: Path, dtype: torch.dtype) -> None:
    """Write `config.json` and `model.safetensors` as transformers does, weights in `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # one tensor under two names is refused by safetensors
        stored = name if name == "lm_head.weight" else "transformer." + name  # the head is outside
        tensor = tensor.detach().to(dtype)
        tensors[stored] = (tensor.t() if name.endswith(CONV1D) else tensor).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {theirs: getattr(model.config, ours) for theirs, (ours, _) in CONFIG_FIELDS.items()}
    fields |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    fields |= {"bos_token_id": model.config.eos_token_id}
    fields |= {"dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------
def demo():
    """Write a small model as Hugging Face would, read it back, compare; then break the file."""
    shape = {"vocab_size": 61, "max_seq_len": 32, "n_layer": 2, "n_head": 3, "n_embd": 48}
    config = GPTConfig(**shape, eos_token_id=60)
    model = GPT(config).init_weights(std=0.2).eval()
    ids, positions = torch.arange(20), torch.arange(20)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(model, folder, torch.float32)
        print(f"{'in the file':34} {'shape':>10}   {'in the model':26} {'shape':>10}")
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            for stored in [key for key in file.keys() if ".h.1" not in key][:14]:
                ours = stored.removeprefix("transformer.")
                theirs_shape = tuple(file.get_slice(stored).get_shape())
                ours_shape = tuple(model.state_dict()[ours].shape)
                print(f"{stored:34} {theirs_shape!s:>10}   {ours:26} {ours_shape!s:>10}")
        loaded = load_model(folder)
        with torch.inference_mode():
            want, got = (m.logits(m(ids, positions, attend_one_sequence)) for m in (model, loaded))
        assert torch.equal(want, got) and loaded.config == config

        save_model(GPT(replace(config, n_embd=24)).init_weights(), folder / "other", torch.float32)
        (folder / "other" / "model.safetensors").replace(folder / "model.safetensors")
        try:
            load_model(folder)
            refusal = ""
        except ValueError as error:
            refusal = str(error).replace(name, "FOLDER")
    print(f"\na file of another shape is refused:\n  {refusal}")
    assert "has shape" in refusal
    print("ok: written, read back, and the logits are the same bits")


if __name__ == "__main__":
    demo()
