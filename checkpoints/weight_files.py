"""List the tensors of a checkpoint, whatever files it came in, then read them one by one.

The same weights may be one safetensors file, shards with an index, a pickle of PyTorch's, or a part
of nanoGPT's `ckpt.pt`, which also holds an optimizer of twice their size.

    model.safetensors                         ┐
    model.safetensors.index.json -> shards    │   catalogue: name, shape, file   (no numbers read)
    pytorch_model.bin, its index -> shards    ├─>     │ the caller chooses
    ckpt.pt (nanoGPT)                         ┘   read: one tensor after the other

`safetensors` and `torch.load(weights_only=True)` read the files. PyTorch's reader runs no code from
a pickle, but a pickle of a hundred bytes may still ask it for any amount of memory or time.

A tensor is a view of the memory-mapped file. The mapping is closed after every 32 MiB, or the
pages that were read would stay in memory beside their copies: 1 GB for a model of 0.5 GB. Pickles
from before PyTorch 1.6 cannot be mapped and are read whole.

Formats: github.com/huggingface/safetensors; docs.pytorch.org, `torch.load`; nanoGPT's `train.py`.
"""

import math
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from itertools import accumulate, groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from checkpoints.untrusted import call, name_of, opened, read_json, shown
from kernels.device_memory import free_memory_bytes

# If a folder holds several of these, they are copies of the same weights: the first is read. The
# order is that of trust: a safetensors file holds nothing but numbers.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "ckpt.pt",
)
SAVE = "weights: save the model with PyTorch first"
OTHER_WEIGHTS = {  # a name, and what such a file is
    "adapter_config.json": "a PEFT adapter: save the whole model, after `merge_and_unload()`",
    "*.gguf": "llama.cpp's weights: give a folder in Hugging Face's layout",
    **{"*.h5": f"TensorFlow's {SAVE}", "*.ckpt.index": f"TensorFlow's {SAVE}"},
    "*.msgpack": f"Flax's {SAVE}",
}
PLAIN_NAME = re.compile(r"\w[\w.-]{,200}")  # a file name without a folder or ".."
MAPPED_BYTES = 32 << 20  # read through one mapping before it is closed, or one larger tensor
MOST_PROGRAM_BYTES = 4 << 20  # of a pickle without its numbers; GPT-2 XL's has 0.1 MB


class Stored(NamedTuple):
    """One tensor in a file, not read yet."""

    path: Path
    name: str  # as it stands in the file
    shape: tuple[int, ...]
    is_mapped: bool  # or else its file has to be read whole
    stamp: tuple[int, ...]  # which file this was: its bytes, its number, its time


# The tensors of a file by name, nanoGPT's `model_args`, and whether they view the mapped file.
Views = tuple[dict[str, Tensor], dict | None, bool]


# ---- the files of a folder -----------------------------------------------------------------------
def catalogue(path: Path) -> tuple[list[Stored], dict | None]:
    """List the tensors of a folder or a file of weights, and nanoGPT's `model_args`, or None.

    Raises ValueError, naming the file, if one is missing, damaged, or holds more than tensors.
    """
    stored: dict[str, Stored] = {}
    for file, indexed in files_of(path).items():
        with opened(file) as open_file:
            tensors, model_args, is_mapped = views_of(file, open_file)
            stamp = stamp_of(open_file)
        if missing := indexed - tensors.keys():
            raise ValueError(f"{file}: tensor {shown(min(missing))} of its index is not there")
        for name, tensor in tensors.items():
            if name in stored:
                raise ValueError(f"{file}: tensor {shown(name)} is in {stored[name].path.name} too")
            stored[name] = Stored(file, name, tuple(tensor.shape), is_mapped, stamp)
    if not stored:
        raise ValueError(f"{file} holds no tensors")
    return list(stored.values()), model_args


def files_of(path: Path) -> dict[Path, set[str]]:
    """The files of a folder's weights, each with the tensors that an index says it holds.

    `path` may be one file of weights too. A shard stands for all that its index names; what has no
    index promises no tensor: {path: set()}.
    """
    if path.is_dir():
        others = other_weights(os.listdir(path))
        found = next((path / name for name in WEIGHT_FILES if os.path.lexists(path / name)), None)
        # What transformers makes of an adapter beside a model depends on what is installed.
        if found is None or "PEFT" in others:
            looked_for = f"no weights: {', '.join(WEIGHT_FILES)} are looked for"
            raise ValueError(f"{path} holds {others or looked_for}")
        path = found
    elif other := other_weights([path.name]):
        raise ValueError(f"{path}: {other}")
    # model-00001-of-00002.safetensors -> model.safetensors.index.json
    index = path.with_name(re.sub(r"-\d+-of-\d+(\.\w+)$", r"\1.index.json", path.name))
    if index.suffix == ".json" and os.path.lexists(index):
        return read_index(index)
    return {path: set()}


def other_weights(names: Iterable[str]) -> str:
    """What these files are, if one of them is a kind of weights that is not read; else ""."""
    kinds = (kind for name in names for one, kind in OTHER_WEIGHTS.items() if fnmatch(name, one))
    return min(kinds, default="")


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
        # "../x" and "/etc/x" would leave the folder. A link may: the hub's cache consists of them.
        is_plain = isinstance(name, str) and PLAIN_NAME.fullmatch(name) and name.endswith(ending)
        if not is_plain:
            problem = f"lies in {shown(name)}, which is not the name of a {ending} file beside it"
            raise ValueError(f"{index}: tensor {shown(tensor)} {problem}")
        indexed.setdefault(index.parent / name, set()).add(tensor)
    return indexed


# ---- one file ------------------------------------------------------------------------------------
def stamp_of(file: BinaryIO) -> tuple[int, ...]:
    """Which file this is, and which version of it; its size comes first."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_dev, status.st_ino, status.st_mtime_ns


def views_of(path: Path, file: BinaryIO) -> Views:
    """What an open file holds, by its ending. Raises ValueError, naming it, if it is damaged."""
    reader = read_safetensors if path.suffix == ".safetensors" else read_pickle
    return call(f"{path} is refused, or damaged", reader, path, file)


def read_safetensors(path: Path, file: BinaryIO) -> Views:
    """The tensors of a `.safetensors` file by name."""
    with safe_open(name_of(file, path), framework="pt") as held:
        return {name: held.get_tensor(name) for name in held.keys()}, None, True


def read_pickle(path: Path, file: BinaryIO) -> Views:
    """The tensors of a `.bin` or `.pt` file by name, and nanoGPT's `model_args` if it has them."""
    is_zip = file.read(4) == b"PK\x03\x04"  # since PyTorch 1.6
    size = stamp_of(file)[0]
    if is_zip:
        check_archive(file)
    elif size > (free := free_memory_bytes("cpu")):
        raise ValueError(f"it has {size:,} bytes, and {free:,} bytes of memory are free")
    name = name_of(file, path)  # PyTorch maps a file only by its name
    held = torch.load(name, map_location="cpu", weights_only=True, mmap=is_zip)
    model_args = held.get("model_args") if isinstance(held, dict) else None
    if model_args is not None:  # nanoGPT stores the optimizer's state and more beside the model
        held = held.get("model")
    if not (isinstance(held, dict) and isinstance(model_args, dict | None)):
        raise ValueError("it holds no dictionary of tensors, or model_args that are none")
    check_tensors(held, size)
    return held, model_args, is_zip


def check_archive(file: BinaryIO) -> None:
    """Refuse a zip that PyTorch would not write."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    is_packed = any(record.compress_type or record.flag_bits & 1 for record in records)
    # PyTorch looks a record up without regard to case; Python ends a name at a NUL.
    names = [record.orig_filename.casefold() for record in records]
    if is_packed or len(set(names)) < len(names) or "\0" in "".join(names):
        raise ValueError("a record is compressed, encrypted, there twice, or has a NUL in its name")
    (program,) = [record for record in records if record.filename.split("/")[1:] == ["data.pkl"]]
    if program.file_size > MOST_PROGRAM_BYTES:
        raise ValueError(f"data.pkl is larger than the {MOST_PROGRAM_BYTES:,} bytes that are read")


def check_tensors(held: dict, size: int) -> None:
    """Refuse what is no plain tensor, or larger than the file of `size` bytes."""
    num_bytes = 0  # of copies
    storages: dict[int, int] = {}  # its place in memory, and its bytes
    for name, tensor in held.items():
        is_tensor = isinstance(name, str) and isinstance(tensor, Tensor)
        is_dense = is_tensor and tensor.layout == torch.strided and not tensor.is_quantized
        if not is_dense or tensor.device.type != "cpu":  # the "meta" device has no numbers
            raise ValueError(f"entry {shown(name)} is no tensor, or sparse, quantised or empty")
        num_bytes += tensor.numel() * tensor.itemsize
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    # A pickle may ask for any memory, or repeat one number. A tied head may be wte's bytes again.
    if sum(storages.values()) > size or num_bytes > 2 * size:
        raise ValueError("its tensors are larger than the file")


# ---- the numbers ---------------------------------------------------------------------------------
def read(stored: list[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """Yield each tensor as a view of its file, to be copied. Raises ValueError if that changed."""
    for path, of_file in groupby(stored, key=lambda one: one.path):
        left = list(of_file)
        while left:
            ends = accumulate(4 * math.prod(one.shape) for one in left)
            count = sum(end <= MAPPED_BYTES for end in ends) or 1
            batch = left[:count] if left[0].is_mapped else left
            left = left[len(batch) :]
            with opened(path) as file:
                if stamp_of(file) != batch[0].stamp:
                    raise ValueError(f"{path} was changed while it was read: load it again")
                tensors, *_ = views_of(path, file)
            for one in batch:
                yield one, tensors[one.name]
            del tensors  # the mapping is closed when nothing views it any more
