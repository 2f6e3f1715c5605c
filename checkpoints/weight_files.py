"""List the tensors of a checkpoint, whatever files it came in, then read them one by one.

The same weights may be one safetensors file, shards with an index, a pickle of PyTorch's, or a part
of nanoGPT's `ckpt.pt`, which also holds an optimizer of twice their size. All of them become one
list of names and shapes; the caller chooses from it before any number is read.

    model.safetensors                         ┐
    model.safetensors.index.json -> shards    │   catalogue: name, shape, file   (no numbers read)
    pytorch_model.bin, its index -> shards    ├─>     │ the caller chooses
    ckpt.pt (nanoGPT)                         ┘   read: one tensor after the other

Files may come from strangers, so nothing in them is believed. Refused are: an index that points
outside its folder, a tensor that stands in two files, and a tensor whose stride of 0 turns one
number into a million. (safetensors' library checks its own headers; `untrusted.py` checks pickles.)
The tests load damaged and hostile files and expect a ValueError for each.

A tensor is a view of the memory-mapped file. The mapping is closed after every 32 MiB. If it stayed
open, the pages that were read would stay in memory beside the copies made from them: 1 GB for a
model of 0.5 GB.

Formats: github.com/huggingface/safetensors; docs.pytorch.org, `torch.load`; nanoGPT's `train.py`.
"""

import math
import os
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints.untrusted import read_json, require_file, shown, unpickle

# If a folder holds several of these, they are copies of the same weights: the first is read. The
# order is that of trust: a safetensors file cannot run code.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "ckpt.pt",
)
PLAIN_NAME = re.compile(r"\w[\w.-]{,200}")  # a file name without a folder or ".."
MAPPED_BYTES = 32 << 20  # read through one mapping before it is closed


class Stored(NamedTuple):
    """One tensor in a file, not read yet."""

    path: Path
    name: str  # as it stands in the file
    shape: tuple[int, ...]


def catalogue(path: Path) -> list[Stored]:
    """List the tensors of a folder, or of a single file of weights, without reading the numbers.

    Raises ValueError, naming the file, if a file is missing or damaged, would run code, or holds
    anything other than plain tensors.
    """
    if path.is_dir():
        found = [name for name in WEIGHT_FILES if os.path.lexists(path / name)]
        if not found:
            raise ValueError(f"{path} holds no weights: {', '.join(WEIGHT_FILES)} are looked for")
        path = path / found[0]
    # file -> tensors that the index says it holds; a single file needs no index
    indexed = read_index(path) if path.suffix == ".json" else {path: set()}
    stored: dict[str, Stored] = {}
    for file, names in indexed.items():
        shapes = dict(names_and_shapes(file))
        if missing := names - shapes.keys():
            raise ValueError(
                f"{file}: tensor {shown(min(missing))} is not there, {path.name} says it is"
            )
        if duplicates := stored.keys() & shapes.keys():
            name = min(duplicates)
            raise ValueError(f"{file}: tensor {shown(name)} is in {stored[name].path.name} too")
        stored |= {name: Stored(file, name, shape) for name, shape in shapes.items()}
    if not stored:
        raise ValueError(f"{path} holds no tensors")
    return list(stored.values())


def read_index(index: Path) -> dict[Path, set[str]]:
    """Read an index: each file that it names, and the tensors that it says this file holds.

    Raises ValueError unless all files lie beside the index and have its kind of ending.
    """
    weight_map = read_json(index).get("weight_map")  # tensor name -> file name
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is no object of tensors and their files")
    ending = Path(index.stem).with_suffix("").suffix  # model.safetensors.index.json -> .safetensors
    indexed: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        # Only a bare file name: "../x" and "/etc/x" would leave the folder. Links are allowed,
        # since the hub's cache consists of links.
        if not (isinstance(name, str) and PLAIN_NAME.fullmatch(name)):
            problem = f"lies in {shown(name)}, which is not the name of a file beside it"
            raise ValueError(f"{index}: tensor {shown(tensor)} {problem}")
        if not name.endswith(ending):
            problem = f"lies in {shown(name)}, no {ending} file"
            raise ValueError(f"{index}: tensor {shown(tensor)} {problem}")
        indexed.setdefault(index.parent / name, set()).add(tensor)
    return indexed


def names_and_shapes(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """The name and shape of each tensor in one file."""
    if path.suffix != ".safetensors":
        return [(name, tuple(tensor.shape)) for name, tensor in tensors_of(path).items()]
    require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return [(name, tuple(file.get_slice(name).get_shape())) for name in file.keys()]
    except (SafetensorError, OSError) as error:
        reason = str(error)[:200]  # the message may quote a name of a megabyte
        raise ValueError(f"{path} is not a whole safetensors file: {reason}") from None


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, by name. Raises ValueError if it holds anything else."""
    content = unpickle(path)
    if "model_args" in content:  # nanoGPT stores the optimizer's state and more beside the model
        content = content.get("model")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dictionary of tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            kinds = f"{type(name).__name__} to {type(tensor).__name__}"
            raise ValueError(f"{path}: entry {shown(name)} maps {kinds}, not name to tensor")
        is_plain = tensor.layout == torch.strided and not tensor.is_quantized
        if not is_plain or tensor.device.type != "cpu":  # the "meta" device has no numbers
            problem = "is sparse, quantised or without numbers"
            raise ValueError(f"{path}: tensor {shown(name)} {problem}")
        # With a stride of 0, one stored number is repeated a million times.
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: tensor {shown(name)} has more numbers than the file holds")
    return content


def model_args(path: Path) -> dict | None:
    """The `model_args` of a nanoGPT checkpoint: the model's shape. None for any other file."""
    if path.suffix == ".safetensors":
        return None
    content = unpickle(path)
    args = content.get("model_args")
    if "model_args" in content and not isinstance(args, dict):
        raise ValueError(f"{path}: model_args is a {type(args).__name__}, not fields")
    return args


# ---- the numbers ---------------------------------------------------------------------------------
def read(stored: list[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """Yield each tensor with its numbers, as a view of the mapped file: the caller copies it.

    A file is mapped anew for every `MAPPED_BYTES`. Raises ValueError if tensors share their bytes
    so often that copies of them would be far larger than the file.
    """
    for path, group in groupby(stored, key=lambda tensor: tensor.path):
        read_batch = read_safetensors if path.suffix == ".safetensors" else read_pickle
        # Twice the file: torch.save may store a tied head as a second name of wte's bytes.
        bytes_left = 2 * path.stat().st_size
        for batch in batches(list(group)):
            for one, tensor in read_batch(path, batch):
                bytes_left -= tensor.numel() * tensor.itemsize
                if bytes_left < 0:
                    name = shown(one.name)
                    raise ValueError(f"{path}: its tensors are larger than the file, at {name}")
                yield one, tensor


def read_pickle(path: Path, batch: list[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """Yield some tensors of one pickle. Its mapping is closed when the last of them is deleted."""
    tensors = tensors_of(path)
    for one in batch:
        yield one, tensors[one.name]


def read_safetensors(path: Path, batch: list[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """Yield some tensors of one safetensors file, which is mapped until the last of them."""
    with safe_open(path, framework="pt") as file:
        for one in batch:
            try:
                tensor = file.get_tensor(one.name)
            except SafetensorError as error:  # a type that PyTorch lacks: 6 or 4 bits
                raise ValueError(f"{path}: tensor {shown(one.name)}: {str(error)[:200]}") from None
            yield one, tensor


def batches(stored: list[Stored]) -> Iterator[list[Stored]]:
    """Cut a list of tensors into runs of about `MAPPED_BYTES`, counted as 4 bytes a number."""
    batch: list[Stored] = []
    batch_bytes = 0
    for tensor in stored:
        batch.append(tensor)
        batch_bytes += 4 * math.prod(tensor.shape)
        if batch_bytes >= MAPPED_BYTES:
            yield batch
            batch = []
            batch_bytes = 0
    if batch:
        yield batch
