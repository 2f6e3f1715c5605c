"""What these tests share: a small model, the folders that hold it, and children to load them in.

A file from a stranger may crash a library, loop without end or take all memory, which no `except`
sees. Such files are loaded in a forked child with a clock and a count of its memory.
"""

import functools
import json
import multiprocessing
import resource
import sys
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.load import CONV1D, describe, load_model
from llm import LLM
from model import GPT, GPTConfig

SECONDS = 60  # for one load, on a machine that is busy with other things
SIZES = {"vocab_size": 61, "n_layer": 2, "n_head": 3, "n_embd": 48}
FIELDS = SIZES | {"model_type": "gpt2", "n_positions": 32, "eos_token_id": 60}
ARGS = SIZES | {"block_size": 32, "bias": True}
INDEX = "model.safetensors.index.json"


# ---- what is written -----------------------------------------------------------------------------
@functools.cache
def small_model() -> GPT:
    """Every number differs from every default: no bias is zero, no gain is one."""
    model = GPT(GPTConfig(**SIZES, max_seq_len=32, eos_token_id=60)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.2, generator=generator)
    return model


def in_the_file(model: GPT) -> dict[str, Tensor]:
    """The tensors under Hugging Face's names, in its (in, out) layout, without the tied head."""
    return {
        "transformer." + name: (t.t() if name.endswith(CONV1D) else t).detach().clone().contiguous()
        for name, t in model.state_dict().items()
        if name != "lm_head.weight"
    }


def as_linear(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """(out, in), as nn.Linear has it, under Hugging Face's names; and back."""
    return {n: t.t().contiguous() if n.endswith(CONV1D) else t for n, t in tensors.items()}


def write(folder: Path, **files: object) -> Path:
    """Write each value as JSON: `write(folder, config={})` writes config.json."""
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    """Change fields of config.json; a change to `...` removes the field."""
    fields = json.loads((folder / "config.json").read_text()) | changes
    write(folder, config={name: value for name, value in fields.items() if value is not ...})


def save_legacy(value: object, path: Path) -> None:
    """As PyTorch wrote it before 1.6."""
    torch.save(value, path, _use_new_zipfile_serialization=False)


def write_shards(tensors: dict, folder: Path, stem: str, suffix: str, save: Callable) -> None:
    """Two files and their index, as transformers writes what is too large for one."""
    homes = {n: f"{stem}-0000{i % 2 + 1}-of-00002{suffix}" for i, n in enumerate(sorted(tensors))}
    for home in sorted(set(homes.values())):
        save({name: tensors[name] for name in homes if homes[name] == home}, folder / home)
    index = {"metadata": {"total_size": 1}, "weight_map": homes}
    write(folder, **{f"{stem}{suffix}.index": index})


LAYOUTS = {  # each writes tensors into a folder
    "safetensors": lambda t, f: save_file(t, f / "model.safetensors"),
    "safetensors in shards": lambda t, f: write_shards(t, f, "model", ".safetensors", save_file),
    "zip": lambda t, f: torch.save(t, f / "pytorch_model.bin"),
    "zip in shards": lambda t, f: write_shards(t, f, "pytorch_model", ".bin", torch.save),
    "legacy": lambda t, f: save_legacy(t, f / "pytorch_model.bin"),
    "legacy in shards": lambda t, f: write_shards(t, f, "pytorch_model", ".bin", save_legacy),
}


def write_nanogpt(state: dict, args: object, folder: Path, prefix: str = "") -> None:
    """What nanoGPT's train.py saves: the weights, AdamW's two moments of each, and where it was."""
    moments = {i: {"exp_avg": t, "exp_avg_sq": t * t} for i, t in enumerate(state.values())}
    optimizer = {"state": moments, "param_groups": [{"lr": 6e-4, "betas": (0.9, 0.95)}]}
    whole = {"model": {prefix + name: t for name, t in state.items()}, "optimizer": optimizer}
    whole |= {"model_args": args, "iter_num": 2000, "best_val_loss": torch.tensor(3.29)}
    torch.save(whole | {"config": {"out_dir": "out", "compile": True}}, folder / "ckpt.pt")


# ---- what is said of it --------------------------------------------------------------------------
def refusal(folder: Path) -> str:
    """The sentence of the ValueError that loading the folder raises, in each of three ways."""
    said = set()
    for load in (load_model, describe, partial(LLM, dtype="float32", device="cpu")):
        with pytest.raises(ValueError) as raised:
            load(str(folder))
        said.add(str(raised.value))
    (message,) = said
    assert message.isprintable() and len(message) < 1500, message[:3000]
    return message


def verdict(folder: Path) -> str:
    """Load a folder: "loaded", "refused: ..." or, what should never be, "raised ..."."""
    try:
        model = load_model(folder)
    except ValueError as error:
        said = f"refused: {error}"
        is_sentence = "\n" not in said and len(said) < 1500 and str(folder) in said
        return said if is_sentence else f"raised {said[:1500]!r}, not a sentence that names a file"
    except BaseException as error:
        return f"raised {type(error).__name__}: {str(error)[:300]}"
    bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    return f"raised nothing, and {bad[0]} is not finite" if bad else "loaded"


# ---- a child to die in place of this process -----------------------------------------------------
class Outcome(NamedTuple):
    """What became of a child: what it said, and what it took."""

    said: list  # what the function returned for each value
    end: str  # "" if it came to its end, else its exit code: -11 is a crash, -9 a kill
    peak_mb: float  # of memory, above what it had when it began


def peak_mb() -> float:
    """The most memory that this process has had so far; a child begins with what it has then."""
    unit = 1024 if sys.platform == "linux" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def in_a_child(function: Callable, values: Iterable) -> Outcome:
    """Call `function` with each value in a forked child, which is ended when it hangs."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    work = (function, values, writer)
    child = context.Process(target=work_and_tell, args=work, daemon=True)
    child.start()
    writer.close()
    said = []
    try:
        while reader.poll(SECONDS):
            said.append(reader.recv())
        child.kill()  # it hangs: exit code -9
    except (EOFError, OSError):  # the pipe was closed: this is the end, one way or the other
        pass
    child.join()
    end = f"exit code {code}, perhaps after {SECONDS} s" if (code := child.exitcode) else ""
    most_mb = said.pop() if said and isinstance(said[-1], float) else 0.0
    return Outcome(said, end, most_mb)


def work_and_tell(function: Callable, values: Iterable, writer: Connection) -> None:
    """The child's life: work, and at last the most memory that it took."""
    most = 16 << 30  # whatever is loaded here, the machine is not to run out of memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    before = peak_mb()
    for value in values:
        writer.send(function(value))
    writer.send(peak_mb() - before)
