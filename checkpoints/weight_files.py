"""The tensors of a checkpoint, whatever files it came in: first what there is, then one by one.

The same weights come as one safetensors file, as shards with an index, as a pickle of PyTorch's, or
inside nanoGPT's `ckpt.pt`, beside an optimizer twice their size. They become one list of names and
shapes, from which the caller picks before a number is read. Nothing is believed: an index that
points outside its folder, two files with one tensor, a stride of 0 that makes a million numbers of
one are refused (safetensors' library refuses what does not add up; pickles: `untrusted.py`).

    model.safetensors                         ┐
    model.safetensors.index.json -> shards    │   catalogue: name, shape, file   (no numbers read)
    pytorch_model.bin, its index -> shards    ├─>     │ the caller picks what it wants
    ckpt.pt (nanoGPT)                         ┘   read: one tensor after the other

Tensors are views of the mapped file, and a mapping is given back every 32 MiB. Otherwise its pages
would stand in memory beside the copies that are made of them: 1 GB for a model of 0.5. What a
production engine does beyond this: reads straight into a GPU's memory, several files at once.

Formats: github.com/huggingface/safetensors; docs.pytorch.org, `torch.load`; nanoGPT's `train.py`.
Run: python -m checkpoints.weight_files
Try: save one tensor into both shards of the demo; or count what `MAPPED_BYTES = 1 << 40` costs in
memory (`/usr/bin/time -v python -m checkpoints.load FOLDER`).
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.untrusted import read_json, require_file, shown, unpickle

# In the order of trust: where a folder holds several, they are copies of the same weights.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "ckpt.pt",
)
PLAIN_NAME = re.compile(r"\w[\w.-]{,200}")  # of a file: no folder, no "..", nothing unprintable
MAPPED_BYTES = 32 << 20  # what may be read through one mapping before it is given back


class Stored(NamedTuple):
    """One tensor in a file, not read yet."""

    path: Path
    name: str  # as the file has it
    shape: tuple[int, ...]


def catalogue(path: Path) -> list[Stored]:
    """What a folder, or a single file of weights, holds, without reading the numbers.

    Raises ValueError, naming the file, for one that is missing, damaged, would run code, or holds
    something other than plain tensors.
    """
    if path.is_dir():
        found = [name for name in WEIGHT_FILES if os.path.lexists(path / name)]
        if not found:
            raise ValueError(f"{path} holds no weights: {', '.join(WEIGHT_FILES)} are looked for")
        path = path / found[0]
    promised = read_index(path) if path.suffix == ".json" else {path: set()}
    stored: dict[str, Stored] = {}
    for file, names in promised.items():
        held = dict(names_and_shapes(file))
        if lost := names - held.keys():
            raise ValueError(
                f"{file}: tensor {shown(min(lost))} is not there, {path.name} says it is"
            )
        if twice := stored.keys() & held.keys():
            other = stored[min(twice)].path.name
            raise ValueError(f"{file}: tensor {shown(min(twice))} is in {other} too")
        stored |= {name: Stored(file, name, shape) for name, shape in held.items()}
    if not stored:
        raise ValueError(f"{path} holds no tensors")
    return list(stored.values())


def read_index(index: Path) -> dict[Path, set[str]]:
    """The files that an index names, and which tensors it says that each of them holds.

    They have to lie beside it and be of its kind.
    """
    homes = read_json(index).get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise ValueError(f"{index}: weight_map is no object of tensors and their files")
    kind = Path(index.stem).with_suffix("").suffix  # model.safetensors.index.json -> .safetensors
    promised: dict[Path, set[str]] = {}
    for tensor, name in homes.items():
        # A name alone: "../x" and "/etc/x" would leave the folder. A link inside it is no danger,
        # the hub's own cache consists of links.
        if not (isinstance(name, str) and PLAIN_NAME.fullmatch(name)):
            where = f"lies in {shown(name)}, which is not the name of a file beside it"
            raise ValueError(f"{index}: tensor {shown(tensor)} {where}")
        if not name.endswith(kind):
            raise ValueError(
                f"{index}: tensor {shown(tensor)} lies in {shown(name)}, no {kind} file"
            )
        promised.setdefault(index.parent / name, set()).add(tensor)
    return promised


def names_and_shapes(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Every tensor of one file, by name and shape."""
    if path.suffix != ".safetensors":
        return [(name, tuple(tensor.shape)) for name, tensor in tensors_of(path).items()]
    require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return [(name, tuple(file.get_slice(name).get_shape())) for name in file.keys()]
    except (SafetensorError, OSError) as error:
        reason = str(error)[:200]  # it may quote a name of a megabyte
        raise ValueError(f"{path} is not a whole safetensors file: {reason}") from None


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle. Raises ValueError for anything else that it holds."""
    held = unpickle(path)
    if "model_args" in held:  # nanoGPT: the optimizer's state and more stand beside the model
        held = held.get("model")
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds no dictionary of tensors")
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            kinds = f"{type(name).__name__} to {type(tensor).__name__}"
            raise ValueError(f"{path}: entry {shown(name)} maps {kinds}, not name to tensor")
        plain = tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or tensor.device.type != "cpu":
            raise ValueError(
                f"{path}: tensor {shown(name)} is sparse, quantised or without numbers"
            )
        # A stride of 0 makes a million numbers of one.
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: tensor {shown(name)} has more numbers than the file holds")
    return held


def model_args(path: Path) -> dict | None:
    """The shape of the model in a nanoGPT checkpoint; None for a file that is none."""
    if path.suffix == ".safetensors":
        return None
    held = unpickle(path)
    if "model_args" in held and not isinstance(held["model_args"], dict):
        raise ValueError(f"{path}: model_args is a {type(held['model_args']).__name__}, not fields")
    return held.get("model_args")


# ---- the numbers ---------------------------------------------------------------------------------
def read(stored: list[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """The tensors, one after the other, in the file's dtype: views of it, to be copied at once.

    A file is entered once for every `MAPPED_BYTES`. Raises ValueError where tensors share their
    bytes so often that the copies would be far larger than the file.
    """
    for path, group in groupby(stored, key=lambda tensor: tensor.path):
        pickled = path.suffix != ".safetensors"
        budget = path.stat().st_size * 2  # twice: a head may be stored as another name of wte
        for batch in batches(list(group)):
            if not pickled:
                yield from read_safetensors(path, batch)
                continue
            tensors = tensors_of(path)
            for one in batch:
                tensor = tensors[one.name]
                budget -= tensor.numel() * tensor.itemsize
                if budget < 0:
                    raise ValueError(
                        f"{path}: its tensors are larger than the file, at {shown(one.name)}"
                    )
                yield one, tensor
                del tensor


def read_safetensors(path: Path, batch: list[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """Some tensors of one file, which is mapped meanwhile."""
    with safe_open(path, framework="pt") as file:
        for one in batch:
            try:
                tensor = file.get_tensor(one.name)
            except SafetensorError as error:  # an element type that PyTorch lacks, of 6 bits or 4
                raise ValueError(f"{path}: tensor {shown(one.name)}: {str(error)[:200]}") from None
            yield one, tensor


def batches(stored: list[Stored]) -> Iterator[list[Stored]]:
    """Runs of tensors of about `MAPPED_BYTES` (4 bytes a number)."""
    batch: list[Stored] = []
    size = 0
    for tensor in stored:
        batch.append(tensor)
        size += 4 * math.prod(tensor.shape)
        if size >= MAPPED_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --------------------------------------------------------------------------------------------------
def demo():
    """The same weights in four kinds of file; then an index that means harm, and is refused."""
    weights = {f"h.{layer}.weight": torch.full((3, 2), float(layer)) for layer in range(4)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def show(what: str) -> None:
            stored = catalogue(folder)
            read_back = {one.name: tensor.clone() for one, tensor in read(stored)}
            assert all(torch.equal(read_back[key], weights[key]) for key in weights)
            files = ", ".join(sorted({one.path.name for one in stored}))
            print(f"{what:24} {len(stored)} tensors in {files}")

        torch.save({"model": weights, "model_args": {}, "iter_num": 7}, folder / "ckpt.pt")
        show("nanoGPT's checkpoint")
        torch.save(weights, folder / "pytorch_model.bin")
        show("a pickle")
        names = list(weights)
        homes = {key: f"model-{i // 2 + 1}-of-2.safetensors" for i, key in enumerate(names)}
        for home in set(homes.values()):
            save_file({k: weights[k] for k in names if homes[k] == home}, folder / home)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": homes}))
        show("shards and their index")
        save_file(weights, folder / "model.safetensors")
        show("one safetensors file")

        (folder / "model.safetensors").unlink()
        refusals = []
        for key, home in (("h.0.weight", "../../etc/passwd"), ("h.9.weight", homes[names[0]])):
            index.write_text(json.dumps({"weight_map": homes | {key: home}}))
            try:
                catalogue(folder)
            except ValueError as error:
                refusals.append(str(error).replace(name, "FOLDER"))
                print(f"\n  {refusals[-1]}")
    assert "not the name" in refusals[0] and "is not there" in refusals[1]
    print("ok: four kinds of file, the same tensors; an index that lies is refused")


if __name__ == "__main__":
    demo()
