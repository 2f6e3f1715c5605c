"""From a checkpoint to the model: names, transposes, refusals.

A GPT-2 checkpoint is a shape and a set of named tensors. Our model uses Hugging Face's names, so
loading is four small rules instead of a table of 148 entries (the 124M model):

    transformer.h.0.attn.c_attn.weight  (768, 2304)     the file: GPT-2's "Conv1D" stores (in, out)
                h.0.attn.c_attn.weight  (2304, 768)     the model: nn.Linear stores (out, in)
    └ 1. drop the prefixes              └ 2. transpose these four, where the file has (in, out)
    3. skip `h.N.attn.bias`: the causal mask, which old files store as if it were a weight
    4. skip `lm_head.weight` where the head is the embedding

The same rules read what transformers writes and wrote, what torch.compile wraps (`_orig_mod.`) and
nanoGPT's own `ckpt.pt`. Whatever does not fit is refused with the file and the tensor named, before
anything is returned: a model that is half loaded writes plausible nonsense. `random:gpt2` (-medium,
-large, -xl) builds the real shapes with random weights, to measure speed without a download;
whoever prints such a figure has to say so (`weights_kind`). What a production engine does beyond
this: dozens of architectures, quantised files, loading straight to a GPU.

Radford et al. 2019 (GPT-2); its names and layout: github.com/huggingface/transformers.
Run: python -m checkpoints.load [a folder, a ckpt.pt, or a name on the hub: what is in it]
Try: delete one name from CONV1D and read the refusal; or describe `random:gpt2-xl`.
"""

import importlib.util
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.hub import find_folder
from checkpoints.untrusted import MOST_SHOWN, read_json, shown
from checkpoints.weight_files import Stored, catalogue, model_args, read
from model import GPT, GPTConfig, attend_one_sequence

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")  # the leading dot spares `.attn.c_attn.bias`
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # an int8 file has scales
LARGEST_SIZE = 10_000_000  # far above every GPT-2, and any two of them multiplied fit in 64 bits
LEAST_TENSORS_A_LAYER = 6  # two LayerNorms and four matrices; GPT-2 has biases too, 12 in all
END_OF_TEXT_ID = 50256  # in GPT-2's vocabulary, which a nanoGPT checkpoint of that size has too

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
REFUSED_FIELDS = ("add_cross_attention", "quantization_config")  # what changes inference, not here
# What nanoGPT calls them in its `model_args`.
NANOGPT_FIELDS = {"n_positions": "block_size"} | {
    name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")
}


def weights_kind(name: str) -> str:
    """Say "random weights" of the built-in shapes, else "trained weights": beside every figure."""
    return "random weights" if name.startswith("random:") else "trained weights"


def load_model(
    name: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> GPT:
    """Load a folder in Hugging Face's GPT-2 layout, a nanoGPT `ckpt.pt`, or a name on the hub.

    `random:gpt2` and its larger sisters are built here. The weights are cast to `dtype` whatever
    the file holds, tensor by tensor: memory peaks at one copy of the model and its largest tensor.
    Raises ValueError, naming the file and the field or tensor, for anything that is missing, left
    over, of another shape, not finite, or not a GPT-2.
    """
    name = str(name)
    if name.startswith("random:"):
        return random_model(name.removeprefix("random:"), dtype, device)
    path = find_folder(name)
    # First the shape, then what the files claim to hold, and the numbers only if the two agree.
    config = read_config(path / "config.json") if (path / "config.json").exists() else None
    stored = catalogue(path)
    has_biases = True
    if config is None:
        config, has_biases = read_nanogpt_config(stored[0].path)
    if config.n_layer * LEAST_TENSORS_A_LAYER > len(stored):
        layers = f"n_layer is {config.n_layer}, and the {len(stored)} tensors are too few for that"
        raise ValueError(f"{stored[0].path}: {layers}")
    with torch.device("meta"):  # shapes without memory: each weight exists once, in its dtype
        model = GPT(config)
    state = read_tensors(place(stored, model), model, dtype, device)
    wanted = model.state_dict()
    if not has_biases:  # nanoGPT with bias=False: adding zero is the same
        biases = [key for key in wanted if key.endswith(".bias") and key not in state]
        state |= {k: torch.zeros(wanted[k].shape, dtype=dtype, device=device) for k in biases}
    if missing := [key for key in wanted if key not in state]:
        first = f"{len(missing)} tensors are missing, the first is {missing[0]!r}"
        raise ValueError(f"{stored[0].path}: {first}")
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.wte.weight  # assign=True replaced the one both shared
    return model.requires_grad_(False).eval()


def random_model(shape: str, dtype: torch.dtype, device: str | torch.device) -> GPT:
    """A GPT-2 of a known shape with weights of GPT-2's own initialisation, always the same ones."""
    if shape not in RANDOM_SHAPES:
        known = ", ".join(RANDOM_SHAPES)
        raise ValueError(f"no shape {shape!r} to fill at random: choose one of {known}")
    sizes = dict(zip(("n_layer", "n_head", "n_embd"), RANDOM_SHAPES[shape], strict=True))
    model = GPT(GPTConfig(**sizes, eos_token_id=END_OF_TEXT_ID))
    return model.init_weights().to(device=device, dtype=dtype).requires_grad_(False).eval()


def read_config(path: Path) -> GPTConfig:
    """`config.json` to GPTConfig. Raises ValueError naming the field that we cannot run."""
    fields = read_json(path)
    if (kind := fields.get("model_type")) != "gpt2":
        raise ValueError(f"{path}: model_type is {shown(kind)}, only 'gpt2' is served")
    for name in REFUSED_FIELDS:
        if fields.get(name):
            raise ValueError(f"{path}: {name} is set, which is not served")
    return to_config(fields, path)


def read_nanogpt_config(path: Path) -> tuple[GPTConfig, bool]:
    """The shape in a nanoGPT checkpoint, and whether it has biases. Source: its `model.py`."""
    args = model_args(path)
    if args is None:
        raise ValueError(f"{path.parent / 'config.json'} is missing: it says the model's shape")
    fields = {ours: args.get(theirs) for ours, theirs in NANOGPT_FIELDS.items()}
    if absent := [NANOGPT_FIELDS[name] for name, value in fields.items() if value is None]:
        raise ValueError(f"{path}: model_args has no {absent[0]}")
    fields["activation_function"] = "gelu"  # the exact one, where OpenAI took the tanh
    fields["eos_token_id"] = END_OF_TEXT_ID  # unless its vocabulary is a smaller one
    return to_config(fields, path), args.get("bias") is not False


def to_config(fields: dict, path: Path) -> GPTConfig:
    """Hugging Face's fields to ours, each of its type; `path` is for the refusal."""
    known = {}
    for theirs, (ours, kind) in CONFIG_FIELDS.items():
        value = fields.get(theirs)
        if value is None:
            continue
        # bool is a subclass of int in Python; an integer epsilon is a legitimate float.
        kinds = (int, float) if kind is float else kind
        if not isinstance(value, kinds) or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{path}: {theirs} is {shown(value)}, not of type {kind.__name__}")
        if kind is not str and abs(value) > LARGEST_SIZE:
            found = f"{shown(value)}, at most {LARGEST_SIZE} is accepted"
            raise ValueError(f"{path}: {theirs} is {found}")
        known[ours] = value
    # Small test models keep GPT-2's id, beyond their own: what is never drawn ends nothing.
    if not 0 <= known.get("eos_token_id", 0) < known.get("vocab_size", GPTConfig.vocab_size):
        known.pop("eos_token_id", None)  # (a vocabulary of 0 tokens comes here without one)
    try:
        return GPTConfig(**known)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error)[:MOST_SHOWN]}") from None


def plain_name(stored: str) -> str:
    """A tensor's name without what was wrapped around the model when it was saved."""
    name = stored.replace("_orig_mod.", "")  # torch.compile, around the whole or around a part
    return name.removeprefix("module.").removeprefix("transformer.")  # module.: data parallel


def place(stored: list[Stored], model: GPT) -> dict[str, Stored]:
    """Which stored tensor becomes which of the model's. Masks and a tied head are left out."""
    wanted = model.state_dict()
    tied = model.config.tie_word_embeddings
    placed: dict[str, Stored] = {}
    for tensor in stored:
        name = plain_name(tensor.name)
        if name.endswith(MASK_BUFFERS) or (name == "lm_head.weight" and tied):
            continue
        if name not in wanted or name in placed:  # unknown, or there under two of its names
            raise ValueError(
                f"{tensor.path}: tensor {shown(tensor.name)} has no place in this model"
            )
        placed[name] = tensor
    return placed


def read_tensors(
    placed: dict[str, Stored], model: GPT, dtype: torch.dtype, device: str | torch.device
) -> dict[str, Tensor]:
    """The weights by the model's names: transposed, cast, moved, and each of them finite."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Three times as wide as high or the other way round: it tells how all matrices are stored.
    fused = "h.0.attn.c_attn.weight"
    is_linear = fused in placed and placed[fused].shape == wanted[fused]
    names = {tensor: name for name, tensor in placed.items()}
    state: dict[str, Tensor] = {}
    for stored, tensor in read(list(names)):
        name, where = names[stored], f"{stored.path}: tensor {shown(stored.name)}"
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{where} holds {tensor.dtype}, not floats")
        if name.endswith(CONV1D) and tensor.ndim == 2 and not is_linear:
            tensor = tensor.t()
        if tuple(tensor.shape) != wanted[name]:
            found = tuple(tensor.shape) if tensor.ndim <= 4 else f"{tensor.ndim} dimensions"
            raise ValueError(f"{where} has shape {found}, its config asks for {wanted[name]}")
        # A copy: the file is only mapped, and whoever rewrites it would change our weights.
        tensor = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        low, high = tensor.aminmax()  # NaN passes through both; isfinite() would build a mask
        if not (low.isfinite() and high.isfinite()):  # after the cast: float16 ends at 65504
            raise ValueError(f"{where} holds NaN or infinity as {dtype}")
        state[name] = tensor.to(device)
    if model.config.tie_word_embeddings and "wte.weight" in state:
        state["lm_head.weight"] = state["wte.weight"]
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
    fields |= {"bos_token_id": model.config.eos_token_id, "dtype": str(dtype)[len("torch.") :]}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def describe(name: str) -> None:
    """Print what a checkpoint holds, and whether transformers computes the same with it."""
    model = load_model(name)
    config, count = model.config, model.num_parameters()
    kv_bytes, longest = config.kv_bytes_per_token(torch.float16), config.max_seq_len
    print(f"{name}: {weights_kind(name)}")
    heads = f"{config.n_layer} layers, {config.n_head} heads of {config.head_dim}"
    print(f"shape          {heads}, {config.vocab_size:,} tokens, {longest:,} positions")
    print(f"parameters     {count:,}: {2 * count:,} bytes in 16 bits, {4 * count:,} in 32")
    print(f"KV of a token  {kv_bytes:,} bytes in 16 bits, {2 * kv_bytes:,} in 32")
    fit = 1e9 / kv_bytes / longest
    print(f"1 GB of KV     {fit:.1f} sequences of {longest:,} tokens, in 16 bits")
    if weights_kind(name) == "trained weights":
        stored = catalogue(path := find_folder(name))
        files = ", ".join(sorted({tensor.path.name for tensor in stored}))
        print(f"files          {len(stored)} tensors in {files}, in {stored[0].path.parent}")
        print(f"transformers   {compare(path, model)}")


def compare(path: Path, model: GPT) -> str:
    """One line: how far our logits are from those of transformers' own loader."""
    if not (path / "config.json").exists():
        return "not asked: it reads no nanoGPT checkpoints"
    if importlib.util.find_spec("transformers") is None:
        return "not installed, so not compared (pip install transformers)"
    from transformers import GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    theirs = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()
    length = min(64, model.config.max_seq_len)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (length,), generator=generator)
    with torch.inference_mode():
        want = theirs(ids[None]).logits[0]  # (T, V)
        got = model.logits(model(ids, torch.arange(length), attend_one_sequence))
    error, size = (got - want).abs().max().item(), want.abs().max().item()
    if not error <= 1e-3 * size:  # NaN too
        raise ValueError(f"{path}: logits differ from transformers' by {error:.1e} of {size:.1f}")
    return f"the same logits for {length} tokens, to {error:.1e} (the largest is {size:.1f})"


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
        for stored in [entry for entry in catalogue(folder) if ".h.1" not in entry.name][:14]:
            ours = plain_name(stored.name)
            ours_shape = tuple(model.state_dict()[ours].shape)
            print(f"{stored.name:34} {stored.shape!s:>10}   {ours:26} {ours_shape!s:>10}")
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
    if sys.argv[1:]:
        try:
            describe(sys.argv[1])
        except ValueError as error:
            raise SystemExit(f"checkpoints/load.py: {error}") from None
    else:
        demo()
