"""What these tests share: a small model, the folders that hold it, and children to load them in.

A file from a stranger may end a process in ways that no `except` sees: a crash in a library, a loop
without end, all of the machine's memory. So whatever may do that is loaded in a forked child with a
clock and a count of its memory. A fork takes 0.1 s, so one child loads many folders.
"""

import functools
import io
import json
import multiprocessing
import re
import resource
import signal
import sys
import warnings
import zipfile
from collections.abc import Callable
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

SECONDS = 20  # for one load, on a machine that is busy with other things
SHAPE = {"vocab_size": 61, "max_seq_len": 32, "n_layer": 2, "n_head": 3, "n_embd": 48}
FIELDS = {"model_type": "gpt2", "vocab_size": 61, "n_positions": 32, "eos_token_id": 60}
FIELDS |= {"n_layer": 2, "n_head": 3, "n_embd": 48}
ARGS = {"n_layer": 2, "n_head": 3, "n_embd": 48, "block_size": 32, "bias": True, "vocab_size": 61}
INDEX = "model.safetensors.index.json"


# ---- what is written -----------------------------------------------------------------------------
@functools.cache
def small_model() -> GPT:
    """Every number differs from every default: no bias is zero, no gain is one."""
    model = GPT(GPTConfig(**SHAPE, eos_token_id=60)).eval().requires_grad_(False)
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


def write_zip(entries: list[tuple[str, bytes]], packed: int | None = None) -> bytes:
    """A zip of these entries, one of them compressed."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")  # two entries of one name: that is what was asked for
        for i, (name, held) in enumerate(entries):
            method = zipfile.ZIP_DEFLATED if i == packed else zipfile.ZIP_STORED
            archive.writestr(name, held, method)
    return out.getvalue()


# ---- what is said of it --------------------------------------------------------------------------
def refusal(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """The sentence of the ValueError that loading the folder raises.

    It is also that of `LLM(folder)`, and of `python -m checkpoints.load FOLDER`, which is float32.
    """
    said = set()
    for load in (load_model, LLM, describe)[: 3 if dtype == torch.float32 else 2]:
        name = str(dtype).removeprefix("torch.")
        options = {load_model: {"dtype": dtype}, LLM: {"dtype": name, "device": "cpu"}}
        with pytest.raises(ValueError) as raised:
            load(str(folder), **options.get(load, {}))
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


def assert_refused(parent: Path, cases: dict[str, Callable[[Path], str]], most_mb=300) -> None:
    """Each case writes weights into a folder with a good config, and returns what is said of it.

    That is a pattern, which follows "FOLDER/". The folders are loaded in a child, which they may
    hang or crash.
    """
    folders = {case: write(parent / case, config=FIELDS) for case in cases}
    start = re.escape(f"refused: {parent}/")
    words = {case: start + re.escape(case) + "/" + cases[case](folders[case]) for case in cases}
    outcome = in_a_child(lambda say: [say(verdict(f)) for f in folders.values()], SECONDS)
    said = dict(zip(folders, outcome.said))
    wrong = {case: said[case] for case in said if not re.match(words[case], said[case])}
    assert not wrong, wrong
    assert outcome.end == "", (outcome.end, [*folders][len(said)])
    assert outcome.peak_mb < most_mb


# ---- a child to die in place of this process -----------------------------------------------------
class Outcome(NamedTuple):
    """What became of a child: what it said, and what it took."""

    said: list  # one entry a call of `say`
    end: str  # "" if it came to its end, else the signal that ended it or how long it hung
    peak_mb: float  # of memory, above what it had when it began


def peak_mb() -> float:
    """The most memory that this process has had so far; a child begins with what it has then."""
    unit = 1024 if sys.platform == "linux" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def in_a_child(work: Callable[[Callable[[object], None]], object], seconds: float) -> Outcome:
    """Call `work(say)` in a forked child. `seconds` is how long it may be silent."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=work_and_tell, args=(work, writer), daemon=True)
    child.start()
    writer.close()
    said, end = [], ""
    try:
        while reader.poll(seconds):
            said.append(reader.recv())
        end = f"silent for {seconds} s"
        child.kill()
    except (EOFError, OSError):  # the pipe was closed: this is the end, one way or the other
        pass
    child.join()
    if not end and (code := child.exitcode):
        end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"status {code}"
    most_mb = said.pop() if said and isinstance(said[-1], float) else 0.0
    return Outcome(said, end, most_mb)


def work_and_tell(work: Callable, writer: Connection) -> None:
    """The child's life: work, and at last the most memory that it took."""
    most = 16 << 30  # whatever is loaded here, the machine is not to run out of memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    before = peak_mb()
    work(writer.send)
    writer.send(peak_mb() - before)
