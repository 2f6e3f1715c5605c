"""List the tensors of a checkpoint, whatever files it came in, then read them one by one.

The same weights may be one safetensors file, shards with an index, a pickle of PyTorch's, or a part
of nanoGPT's `ckpt.pt`, which also holds an optimizer of twice their size. All of them become one
list of names and shapes; the caller chooses from it before any number is read.

    model.safetensors                         ┐
    model.safetensors.index.json -> shards    │   catalogue: name, shape, file   (no numbers read)
    pytorch_model.bin, its index -> shards    ├─>     │ the caller chooses
    ckpt.pt (nanoGPT)                         ┘   read: one tensor after the other

`safetensors` and `torch.load(weights_only=True)` read the files. PyTorch's reader runs no code from
a pickle, but a pickle of a hundred bytes may still ask it for any amount of memory or time. Refused
here are: an index that points outside its folder, a tensor that stands in two files, a tensor with
more numbers than its file, and an archive whose records two readers could take for each other.

A tensor is a view of the memory-mapped file. The mapping is closed after every 32 MiB. If it stayed
open, the pages that were read would stay in memory beside the copies made from them: 1 GB for a
model of 0.5 GB. Pickles from before PyTorch 1.6 cannot be mapped and are read whole.

Formats: github.com/huggingface/safetensors; docs.pytorch.org, `torch.load`; nanoGPT's `train.py`.
"""

import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from itertools import accumulate, groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints.untrusted import MOST_SHOWN, name_of, opened, read_json, shown
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
MAPPED_BYTES = 32 << 20  # read through one mapping before it is closed
MOST_PROGRAM_BYTES = 4 << 20  # of a pickle without its numbers; GPT-2 XL's has 0.1 MB


class Stored(NamedTuple):
    """One tensor in a file, not read yet."""

    path: Path
    name: str  # as it stands in the file
    shape: tuple[int, ...]
    is_mapped: bool  # or else its file has to be read whole
    stamp: tuple[int, ...]  # which file this was: its bytes, its number, its time


class Views(NamedTuple):
    """What a file of weights holds, as views of the mapped file."""

    tensors: dict[str, Tensor]
    model_args: dict | None = None  # the shape of nanoGPT's model; None in any other file
    is_mapped: bool = True


def catalogue(path: Path) -> tuple[list[Stored], dict | None]:
    """List the tensors of a folder, or of a single file of weights, without reading the numbers.

    Returns them and the `model_args` of a nanoGPT checkpoint; None for any other. Raises
    ValueError, naming the file, if one is missing, damaged, or holds more than plain tensors.
    """
    path = find_weights(path)
    # file -> tensors that the index says it holds; a single file needs no index
    indexed = read_index(path) if path.suffix == ".json" else {path: set()}
    stored: dict[str, Stored] = {}
    for file, names in indexed.items():
        with opened(file) as open_file:
            tensors, model_args, is_mapped = views_of(file, open_file)
            stamp = stamp_of(open_file)
        found = {
            name: Stored(file, name, tuple(tensor.shape), is_mapped, stamp)
            for name, tensor in tensors.items()
        }
        if missing := names - found.keys():
            problem = f"tensor {shown(min(missing))} is not there, {path.name} says it is"
            raise ValueError(f"{file}: {problem}")
        if duplicates := stored.keys() & found.keys():
            name = min(duplicates)
            raise ValueError(f"{file}: tensor {shown(name)} is in {stored[name].path.name} too")
        stored |= found
    if not stored:
        raise ValueError(f"{path} holds no tensors")
    return list(stored.values()), model_args


def find_weights(path: Path) -> Path:
    """The file or index with the weights of a folder; of a shard, the index that names it."""
    others = other_weights(os.listdir(path) if path.is_dir() else [path.name])
    if path.is_dir():
        found = next((path / name for name in WEIGHT_FILES if os.path.lexists(path / name)), None)
        # What transformers makes of an adapter beside a model depends on what is installed.
        if found is None or "PEFT" in others:
            looked_for = f"no weights: {', '.join(WEIGHT_FILES)} are looked for"
            raise ValueError(f"{path} holds {others or looked_for}")
        return found
    if others:
        raise ValueError(f"{path}: {others}")
    for index in path.parent.glob("*.index.json"):
        if re.search(r"-\d+-of-\d+\.", path.name) and path in read_index(index):
            return index
    return path


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
        # Only a bare file name: "../x" and "/etc/x" would leave the folder. Links are allowed,
        # since the hub's cache consists of links.
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
    if path.suffix != ".safetensors":
        return read_pickle(path, file)
    try:
        with safe_open(name_of(file, path), framework="pt") as held:
            return Views({name: held.get_tensor(name) for name in held.keys()})
    # PyTorch lacks types of 4 and 6 bits; the last two: a file of this size cannot be mapped.
    except (SafetensorError, OSError, RuntimeError, MemoryError) as error:
        reason = str(error)[:200]  # the message may quote a name of a megabyte
        raise ValueError(f"{path} is not a whole safetensors file: {reason}") from None


def read_pickle(path: Path, file: BinaryIO) -> Views:
    """The tensors of a `.bin` or `.pt` file by name, and nanoGPT's `model_args` if it has them."""
    is_zip = file.read(4) == b"PK\x03\x04"  # since PyTorch 1.6
    size, records = stamp_of(file)[0], None
    try:
        if is_zip:
            records = check_archive(file)
        elif size > (free := free_memory_bytes("cpu")):
            raise ValueError(f"it has {size:,} bytes, and {free:,} bytes of memory are free")
        name = name_of(file, path)  # PyTorch maps a file only by its name
        held = torch.load(name, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged file makes the readers stumble over anything
        reason = str(error).split("WeightsUnpickler error:")[-1].strip()
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        reason = f"{kind}{reason}".split("\n")[0][:MOST_SHOWN]
        raise ValueError(f"{path} is refused, or damaged: {reason}") from None
    model_args = held.get("model_args") if isinstance(held, dict) else None
    if model_args is not None:  # nanoGPT stores the optimizer's state and more beside the model
        held = held.get("model")
    if not (isinstance(held, dict) and isinstance(model_args, dict | None)):
        raise ValueError(f"{path} holds no dictionary of tensors, or model_args that are none")
    check_tensors(path, held, size, records)
    return Views(held, model_args, is_zip)


def check_archive(file: BinaryIO) -> Counter[int]:
    """Refuse a zip that PyTorch would not write; return the sizes of its records of numbers."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    if any(record.compress_type or record.flag_bits & 1 for record in records):
        raise ValueError("its records are compressed or encrypted, PyTorch writes none such")
    # PyTorch looks a record up without regard to case; Python ends a name at a NUL.
    names = [record.orig_filename.casefold() for record in records]
    if len(set(names)) < len(names) or any("\0" in name for name in names):
        raise ValueError("two of its records have the same name, or one has a name with a NUL")
    (program,) = [record for record in records if record.filename.split("/")[1:] == ["data.pkl"]]
    if program.file_size > MOST_PROGRAM_BYTES:
        problem = f"its data.pkl has {program.file_size:,} bytes"
        raise ValueError(f"{problem}, at most {MOST_PROGRAM_BYTES:,} are read")
    return Counter(r.file_size for r in records if r.filename.split("/")[1:2] == ["data"])


def check_tensors(path: Path, held: dict, size: int, records: Counter[int] | None) -> None:
    """Refuse what is no plain tensor, or no tensor in the file's records."""
    storages: dict[int, int] = {}  # its place in memory, and its bytes
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            kinds = f"{type(name).__name__} to {type(tensor).__name__}"
            raise ValueError(f"{path}: entry {shown(name)} maps {kinds}, not name to tensor")
        is_plain = tensor.layout == torch.strided and not tensor.is_quantized
        if not is_plain or tensor.device.type != "cpu":  # the "meta" device has no numbers
            problem = "is sparse, quantised or without numbers"
            raise ValueError(f"{path}: tensor {shown(name)} {problem}")
        storage = tensor.untyped_storage()
        # With a stride of 0, one stored number is repeated a million times.
        if tensor.numel() * tensor.itemsize > storage.nbytes():
            raise ValueError(f"{path}: tensor {shown(name)} has more numbers than the file holds")
        storages[storage.data_ptr()] = storage.nbytes()
    # A pickle may ask for memory that no file fills. And PyTorch believes its word for the length
    # of a record: what comes after the record is mapped too.
    sizes = Counter(storages.values())
    if sum(storages.values()) > size or (records is not None and sizes - records):
        raise ValueError(f"{path} is refused, or damaged: some numbers are in none of its records")


# ---- the numbers ---------------------------------------------------------------------------------
def read(stored: list[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """Yield each tensor with its numbers, as a view of the mapped file: the caller copies it.

    A file is mapped anew for every `MAPPED_BYTES`. Raises ValueError if it was replaced since it
    was listed, or if tensors share bytes so often that copies of them would be far larger than it.
    """
    # The batch of each tensor: its file, and how many times 32 MiB lie before its end.
    ends = accumulate(4 * math.prod(one.shape) for one in stored)
    batches = [(one.path, one.is_mapped and end // MAPPED_BYTES) for one, end in zip(stored, ends)]
    # Twice the file: torch.save may store a tied head as a second name of wte's bytes.
    bytes_left = {one.path: 2 * one.stamp[0] for one in stored}
    for (path, _), pairs in groupby(zip(batches, stored), key=lambda pair: pair[0]):
        batch = [one for _, one in pairs]
        with opened(path) as file:
            if stamp_of(file) != batch[0].stamp:
                raise ValueError(f"{path} was changed while it was read: load it again")
            tensors = views_of(path, file).tensors
        for one in batch:
            tensor = tensors[one.name]
            bytes_left[path] -= tensor.numel() * tensor.itemsize
            if bytes_left[path] < 0:
                name = shown(one.name)
                raise ValueError(f"{path}: its tensors are larger than the file, at {name}")
            yield one, tensor
        del tensor, tensors  # the mapping is closed when nothing views it any more
