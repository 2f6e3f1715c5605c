"""Turn a checkpoint into a model: rename, transpose, and refuse what does not fit.

A GPT-2 checkpoint is a config and a set of named tensors. Our model uses Hugging Face's names, so
four small rules are enough, instead of a table of 148 entries (for the 124M model):

    transformer.h.0.attn.c_attn.weight  (768, 2304)     in the file: GPT-2's "Conv1D" is (in, out)
                h.0.attn.c_attn.weight  (2304, 768)     in the model: nn.Linear is (out, in)
    └ 1. drop the prefixes              └ 2. transpose these four, where the file has (in, out)
    3. skip `h.N.attn.bias`: the causal mask, which old files store as if it were a weight
    4. skip `lm_head.weight` if it is the same as the embedding, to which the head is tied

The same rules read nanoGPT's `ckpt.pt`. A checkpoint that does not fit is refused with a ValueError
that names the file and the tensor, because a model that is loaded in part writes plausible
nonsense. The tests compare tensors bit by bit, and logits with transformers.

Radford et al. 2019 (GPT-2); its names and layout: github.com/huggingface/transformers.
Run: python -m checkpoints.load NAME     (what is in a folder, a ckpt.pt, or a model on the hub?)
"""

import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.hub import find_folder
from checkpoints.untrusted import call, read_json, shown
from checkpoints.weight_files import Stored, catalogue, read
from kernels.device_memory import free_memory_bytes
from kernels.padded_head import pad_vocabulary
from model import GPT, GPTConfig, attend_one_sequence

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")  # these endings do not match `.c_attn.bias`
HEAD, EMBEDDING = "lm_head.weight", "wte.weight"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # int8 needs scales too
LARGEST_SIZE = 10_000_000  # far above every GPT-2; a product of two still fits in 64 bits
END_OF_TEXT_ID = 50256  # in GPT-2's vocabulary, which nanoGPT uses too

RANDOM_SHAPES = {  # name: (n_layer, n_head, n_embd)
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}

# Name in config.json -> field of GPTConfig: the same names but for one. What is not listed, such as
# dropout rates, does not change inference.
CONFIG_FIELDS = {
    "n_positions" if field.name == "max_seq_len" else field.name: field
    for field in dataclasses.fields(GPTConfig)
    if field.name != "dropout"
}
SECOND_NAMES = {  # transformers' names of these fields in all its models
    **{"n_positions": "max_position_embeddings", "n_layer": "num_hidden_layers"},
    **{"n_head": "num_attention_heads", "n_embd": "hidden_size"},
}
GELUS = {  # transformers' other names -> ours: the tanh approximation, or the exact function
    **{f"gelu_{name}": "gelu_new" for name in ("fast", "accurate", "pytorch_tanh", "python_tanh")},
    "gelu_python": "gelu",
}


def weights_kind(name: str) -> str:
    """Return "random weights" or "trained weights", to be printed beside every measured figure."""
    return "random weights" if name.startswith("random:") else "trained weights"


def load_model(
    name: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> GPT:
    """Load a folder in Hugging Face's GPT-2 layout, a nanoGPT `ckpt.pt`, or a name on the hub.

    `random:gpt2` has the real shape and random weights. Each tensor is cast as it is read, so
    memory peaks at one copy of the model plus its largest tensor. Raises ValueError, naming the
    file and the field or tensor, if any is missing, left over, misshapen, or not finite.
    """
    name = str(name)
    if name.startswith("random:"):
        return random_model(name.removeprefix("random:"), dtype, device)
    # The config and the tensors' shapes come first. Numbers are read only if the two agree.
    stored, model_args = catalogue(find_folder(name))
    file = stored[0].path
    config = read_config(file.parent) if model_args is None else nanogpt_config(model_args, file)
    if config.n_layer > len(stored):  # before ten million layers are built
        raise ValueError(f"{file}: {len(stored)} tensors are too few for n_layer {config.n_layer}")
    with torch.device("meta"):  # a model of shapes without memory
        model = GPT(config)
    needed, free = dtype.itemsize * model.num_parameters(), free_memory_bytes(device)
    if needed > free:
        sizes = f"{needed / 1e9:.1f} GB as {dtype}, and {free / 1e9:.1f} GB are free on {device}"
        raise ValueError(f"{file}: the weights take {sizes}")
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state = read_tensors(place(stored, wanted), wanted, config, dtype, device)
    if model_args and model_args.get("bias") is False:  # biases of zero change nothing
        biases = [key for key in wanted if key.endswith(".bias") and key not in state]
        state |= {k: torch.zeros(wanted[k], dtype=dtype, device=device) for k in biases}
    if missing := [key for key in wanted if key not in state]:
        raise ValueError(f"{file}: {len(missing)} tensors are missing, the first is {missing[0]!r}")
    model.load_state_dict(state, assign=True)  # each name gets a parameter of its own
    if state[HEAD] is state[EMBEDDING]:
        model.lm_head.weight = model.wte.weight
    else:  # the file's head differs from its embedding
        model.config = dataclasses.replace(config, tie_word_embeddings=False)
    return finish(model)


def finish(model: GPT) -> GPT:
    """Make a model with weights ready to serve."""
    model.requires_grad_(False).eval()
    return pad_vocabulary(model) if model.wte.weight.is_cuda else model


def random_model(shape: str, dtype: torch.dtype, device: str | torch.device) -> GPT:
    """Build a GPT-2 of a known shape with GPT-2's initialisation, the same weights each time."""
    if shape not in RANDOM_SHAPES:
        raise ValueError(f"no shape {shape!r}: choose one of {', '.join(RANDOM_SHAPES)}")
    sizes = dict(zip(("n_layer", "n_head", "n_embd"), RANDOM_SHAPES[shape], strict=True))
    model = GPT(GPTConfig(**sizes, eos_token_id=END_OF_TEXT_ID))
    return finish(model.init_weights().to(device=device, dtype=dtype))


# ---- the config ----------------------------------------------------------------------------------
def read_config(folder: Path) -> GPTConfig:
    """Read `config.json`. Raises ValueError that names the field which is not supported."""
    path = folder / "config.json"
    fields = read_json(path)
    is_gpt2 = {"n_layer", "n_head", "n_embd"} <= fields.keys()  # configs of 2019 do not say it
    if (kind := fields.get("model_type")) != "gpt2" and not (kind is None and is_gpt2):
        raise ValueError(f"{path}: model_type is {shown(kind)}, only 'gpt2' is served")
    for name in ("add_cross_attention", "quantization_config"):  # they change inference
        if fields.get(name):
            raise ValueError(f"{path}: {name} is set, which is not served")
    for name, second in SECOND_NAMES.items():
        value, other = fields.get(name), fields.get(second)
        if None not in (value, other) and value != other:
            values = f"{name} is {shown(value)} and {second} is {shown(other)}"
            raise ValueError(f"{path}: {values}, two names of one field")
        fields[name] = other if value is None else value
    return to_config(fields, path)


def nanogpt_config(args: dict, path: Path) -> GPTConfig:
    """The config in the `model_args` of a nanoGPT checkpoint. Source: its `model.py`.

    Its GELU was the tanh approximation until June 2023. Until January 2023 `model_args` had no
    `bias`; what was saved between is taken for exact, so its logits are off by about a thousandth.
    """
    for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        if args.get(name) is None:
            raise ValueError(f"{path}: model_args has no {name}")
    fields = args | {"n_positions": args["block_size"], "eos_token_id": END_OF_TEXT_ID}
    fields["activation_function"] = "gelu" if "bias" in args else "gelu_new"
    return to_config(fields, path)


def to_config(fields: dict, path: Path) -> GPTConfig:
    """Turn Hugging Face's fields into a GPTConfig and check their types; errors name `path`."""
    ends = fields.get("eos_token_id")
    if isinstance(ends, list):  # the engine is told of all: `read_eos_ids`
        fields = fields | {"eos_token_id": ends[0] if ends else None}
    known = {}
    for name, field in CONFIG_FIELDS.items():
        value, kind = fields.get(name), field.type
        if value is None:
            continue
        # In Python a bool is an int too. An epsilon written as an integer is accepted.
        kinds = (int, float) if kind is float else kind
        if not isinstance(value, kinds) or isinstance(value, bool) != (kind is bool):
            expected = str(getattr(kind, "__name__", kind)).removesuffix(" | None")
            raise ValueError(f"{path}: {name} is {shown(value)}, not of type {expected}")
        if kind is not str and abs(value) > LARGEST_SIZE:
            raise ValueError(f"{path}: {name} is {shown(value)}, at most {LARGEST_SIZE} is read")
        known[field.name] = GELUS.get(value, value)
    # Small test models keep GPT-2's end-of-text id, which they can never draw: it is dropped.
    if not 0 <= known.get("eos_token_id", 0) < known.get("vocab_size", GPTConfig.vocab_size):
        known.pop("eos_token_id", None)  # absent if vocab_size is 0, which GPTConfig refuses below
    return call(path, GPTConfig, **known)


# ---- the tensors ---------------------------------------------------------------------------------
def plain_name(stored: str) -> str:
    """A tensor's name without the prefixes of modules that were wrapped around the model."""
    name = stored.replace("_orig_mod.", "")  # torch.compile adds it, to a model or to a layer
    return name.removeprefix("module.").removeprefix("transformer.")  # DataParallel adds "module."


def place(stored: list[Stored], wanted: dict[str, tuple[int, ...]]) -> dict[Stored, str]:
    """The model's name of each stored tensor. Masks are left out, the head is last.

    Raises ValueError if a stored tensor belongs nowhere, or if two belong to one name.
    """
    placed: dict[str, Stored] = {}
    for tensor in stored:
        name = plain_name(tensor.name)
        if name.endswith(MASK_BUFFERS) and len(tensor.shape) in (0, 4):  # (1, 1, T, T)
            continue
        if name not in wanted or name in placed:  # unknown, or stored with and without a prefix
            subject = f"{tensor.path}: tensor {shown(tensor.name)}"
            raise ValueError(f"{subject} has no place in this model")
        placed[name] = tensor
    return {placed[name]: name for name in sorted(placed, key=lambda name: name == HEAD)}


def read_tensors(
    placed: dict[Stored, str],
    wanted: dict[str, tuple[int, ...]],
    config: GPTConfig,
    dtype: torch.dtype,
    device: str | torch.device,
) -> dict[str, Tensor]:
    """Read the weights: transposed, cast to `dtype`, moved to `device`, checked to be finite.

    Returns a dict from the model's names to tensors. A tied head is the embedding itself, unless
    the file has both and they differ: then transformers does not tie them either.
    """
    # c_attn is never square, so its shape tells whether the file stores (out, in) or (in, out).
    fused = "h.0.attn.c_attn.weight"  # (3C, C) in the model
    is_linear = any(name == fused and one.shape == wanted[name] for one, name in placed.items())
    is_tied = config.tie_word_embeddings
    state: dict[str, Tensor] = {}
    for stored, tensor in read(list(placed)):
        name = placed[stored]
        subject = f"{stored.path}: tensor {shown(stored.name)}"
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{subject} holds {tensor.dtype}, not floats")
        if name.endswith(CONV1D) and tensor.ndim == 2 and not is_linear:
            tensor = tensor.t()
        if tuple(tensor.shape) != wanted[name]:
            found = tuple(tensor.shape) if tensor.ndim <= 4 else f"{tensor.ndim} dimensions"
            raise ValueError(f"{subject} has shape {found}, its config asks for {wanted[name]}")
        if name == HEAD and is_tied and EMBEDDING in state and is_copy(tensor, state[EMBEDDING]):
            continue
        # Always a copy: `tensor` is a view of the mapped file, which somebody may rewrite.
        tensor = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        # aminmax() returns NaN if there is one. The cast to float16 makes 65520 infinity.
        low, high = tensor.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(f"{subject} holds NaN or infinity as {dtype}")
        state[name] = tensor.to(device)
    for name, other in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
        if is_tied and other in state:  # a file may hold either of the two names
            state.setdefault(name, state[other])
    return state


def is_copy(tensor: Tensor, other: Tensor) -> bool:
    """Whether two matrices hold the same numbers, once both have the type of `other`."""
    rows = zip(tensor.split(1024), other.split(1024), strict=True)  # casts 1,024 rows at a time
    return all(torch.equal(part.to(own), own) for part, own in rows)


# ---- described -----------------------------------------------------------------------------------
def describe(name: str) -> None:
    """Print what a checkpoint holds, and whether transformers computes the same logits from it."""
    model = load_model(name)
    print(f"{name}: {weights_kind(name)}, {model.num_parameters():,} parameters")
    print(f"shape          {model.config}")
    print(f"KV of a token  {model.config.kv_bytes_per_token(torch.float16):,} bytes in 16 bits")
    if weights_kind(name) == "trained weights":
        stored, model_args = catalogue(find_folder(name))
        print(f"files          {len(stored)} tensors, the first in {stored[0].path}")
        reads_none = "not compared: transformers reads no nanoGPT checkpoints"
        print(f"transformers   {reads_none if model_args else compare(stored, model)}")


def transformers_name(name: str) -> str:
    """A tensor's name in Hugging Face's layout: the head stands outside of `transformer`."""
    return name if name == HEAD else "transformer." + name


def transformers_fields(config: GPTConfig) -> dict:
    """The fields of a config under the names of transformers."""
    return {name: getattr(config, field.name) for name, field in CONFIG_FIELDS.items()}


def compare(stored: list[Stored], model: GPT) -> str:
    """Compare our logits with transformers' on the same tensors; return the result as one line.

    transformers gets tensors and our config, since a stranger's config.json may name code on the
    hub. Raises ValueError if the logits differ by more than a thousandth of the largest one.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        return "not installed, so not compared (pip install transformers)"

    disable_progress_bar()
    config = GPT2Config(**transformers_fields(model.config), bos_token_id=None)
    named = {transformers_name(plain_name(one.name)): t.clone() for one, t in read(stored)}
    try:
        theirs = GPT2LMHeadModel.from_pretrained(
            None, config=config, state_dict=named, dtype=torch.float32, attn_implementation="eager"
        )
    except RuntimeError:  # matrices in the layout of nn.Linear
        return "not compared: transformers does not know this layout"
    length = min(64, model.config.max_seq_len)
    ids = torch.arange(length) * 7919 % model.config.vocab_size  # tokens from everywhere in it
    with torch.inference_mode():
        want = theirs.eval()(ids[None]).logits[0]  # (T, V)
        got = model.logits(model(ids, torch.arange(length), attend_one_sequence))
    error, size = (got - want).abs().max().item(), want.abs().max().item()
    if not error <= 1e-3 * size:  # `not <=` also catches NaN
        problem = f"logits differ from transformers' by {error:.1e} of {size:.1f}"
        raise ValueError(f"{stored[0].path}: {problem}")
    return f"the same logits for {length} tokens, to {error:.1e} (the largest is {size:.1f})"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m checkpoints.load NAME: a folder, a file or a hub id")
    try:
        describe(sys.argv[1])
    except ValueError as error:
        raise SystemExit(f"checkpoints/load.py: {error}") from None
