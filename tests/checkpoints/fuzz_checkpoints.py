"""Damage thousands of small checkpoints and load them: finite weights or a ValueError, only that.

The damage is a function of one number, its seed: changes anywhere in a file, and changes that know
the format (JSON values, the opcodes of a pickle, the entries of a zip).
A failure names its seed; `fuzz(first=1234, count=1)` repeats it.
"""

import io
import json
import os
import pickletools
import random
import struct
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import samples
import torch

from model import GPT, GPTConfig

BATCH = 500  # loads in one child


# ---- what is damaged -----------------------------------------------------------------------------
def write_checkpoints(base: Path) -> list[Path]:
    """The same small model in each kind of file, in a folder each; returns the folders."""
    shape = {"vocab_size": 11, "n_layer": 1, "n_head": 1, "n_embd": 8}
    tensors = samples.in_the_file(GPT(GPTConfig(**shape, max_seq_len=8)).init_weights(std=0.2))
    fields = {"model_type": "gpt2", "n_positions": 8}
    folders = [samples.write(base / layout, config=fields | shape) for layout in samples.LAYOUTS]
    for folder, write_layout in zip(folders, samples.LAYOUTS.values(), strict=True):
        write_layout(tensors, folder)
    nanogpt = samples.write(base / "nanogpt")
    args = shape | {"block_size": 8, "bias": True}
    samples.write_nanogpt(samples.as_linear(tensors), args, nanogpt)
    return [*folders, nanogpt]


# ---- damage --------------------------------------------------------------------------------------
def damage_blindly(data: bytes, rng: random.Random) -> bytes:
    """A changed bit; or a run that is cut out, overwritten, put in, or taken from elsewhere."""
    bad = bytearray(data or b"\0")
    at, source = rng.randrange(len(bad)), rng.randrange(len(bad))
    if rng.random() < 0.25:
        bad[at] ^= 1 << rng.randrange(8)
        return bytes(bad)
    length = rng.choice([1, 1, 2, 4, 8, 64])
    runs = [b"", bytes(length), b"\xff" * length, rng.randbytes(length), data[source:][:length]]
    end = rng.choice([at, at + length, at + length, at + length, len(bad)])
    bad[at:end] = rng.choice(runs)
    return bytes(bad)


ODD_VALUES = (
    *(None, True, False, -1, 0, 1, 2, 7, 8, 88, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(10**7, 10**9, 2**31, 2**63, 10**400, [], {}, [8], [8, 8], [0, 256], [2**62, 2**62], ["8"]),
    *("", "x", "../x", "/etc/passwd", ".", "gpt2", "gelu", "relu", "F16", "BF16", "I64", "BOOL"),
    *("F8_E4M3", "F6_E2M3", "F4", "model-00001-of-00002.safetensors", "config.json", "x" * 5000),
)


def slots(value: object) -> list[tuple]:
    """Every (container, key) in a JSON value."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    return [(value, key) for key in keys] + [p for key in keys for p in slots(value[key])]


def damage_json(data: bytes, rng: random.Random) -> bytes:
    """Another value, one from elsewhere, a field less, a field renamed."""
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not (found := slots(value)):
            break
        (container, key), (other, other_key) = rng.choice(found), rng.choice(found)
        kind = rng.choice(["odd", "odd", "copy", "remove", "rename"])
        if kind == "odd":
            container[key] = rng.choice(ODD_VALUES)
        elif kind == "copy" or isinstance(container, list):
            container[key] = json.loads(json.dumps(other[other_key]))
        else:
            held = container.pop(key)
            if kind == "rename":
                container[rng.choice(["", "x", "n_layer", "h.0.attn.bias", key + "x"])] = held
    return json.dumps(value).encode()


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header changed as JSON, and its length made right again, mostly."""
    length = struct.unpack("<Q", data[:8])[0]
    header = damage_json(data[8 : 8 + length], rng)
    said = len(header) if rng.random() < 0.9 else rng.choice([0, 1, length, 2**31, 2**63, 10**11])
    return struct.pack("<Q", said) + header + data[8 + length :]


MARK = "executed"  # a file that appears where a pickle's code has run
RUN_CODE = f"cposix\nsystem\n(X{chr(len(MARK) + 6)}\0\0\0touch {MARK}tR".encode()
NAMES = "builtins eval,builtins bytearray,builtins set,collections Counter,torch Size,torch x,"
NAMES += "torch HalfStorage,torch int8,torch FloatTensor,torch._tensor Tensor,"
NAMES += "torch._utils _rebuild_sparse_tensor,torch._utils _rebuild_meta_tensor_no_storage,"
NAMES += "torch._utils _rebuild_parameter"
ODD_OPCODES = (
    *(RUN_CODE, *(b"c%b\n" % name.replace(" ", "\n").encode() for name in NAMES.split(","))),
    *(b"R", b"b", b"\x81", b"Q", b"t", b"\x85", b"\x86", b"\x87", b"(", b"]", b"}", b")", b"\x8f"),
    *(b"N", b"\x88", b"\x89", b"0", b"2", b"1", b"a", b"e", b"s", b"u", b".", b"h\x00", b"h\x04"),
    *(b"K\x00", b"K\x08", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 8),
    *(b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"X\x01\x00\x00\x00x", b"X\xff\xff\xff\xff", b"B"),
    *(b"G\x7f\xf8" + bytes(6), b"\x8b\xff\xff\xff\x7f", b"\x80\x05", b"\x93", b"\x94", b"i", b"o"),
)


def damage_pickle(data: bytes, rng: random.Random) -> bytes:
    """Opcodes less, put in, or another one in their place."""
    starts = [position for _, _, position in pickletools.genops(data)]
    ops = [data[a:b] for a, b in zip(starts, [*starts[1:], starts[-1] + 1], strict=True)]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(ops))
        odd, own = rng.choice(ODD_OPCODES), rng.choice(ops)
        ops[at : at + rng.choice([0, 1, 1])] = [rng.choice([odd, odd, b"", ops[at], own])]
    return b"".join(ops) + data[starts[-1] + 1 :]


def damage_legacy(data: bytes, rng: random.Random) -> bytes:
    """One of the five pickles that begin an old file: three headers, the tensors, their keys."""
    stream, ends = io.BytesIO(data), [0]
    for _ in range(5):
        for _ in pickletools.genops(stream):
            pass
        ends.append(stream.tell())
    which = rng.choice([0, 1, 2, 3, 3, 3, 3, 4])
    start, end = ends[which], ends[which + 1]
    return data[:start] + damage_pickle(data[start:end], rng) + data[end:]


def damage_zip(data: bytes, rng: random.Random) -> bytes:
    """The pickle inside changed, or an entry lost, cut, doubled, compressed or renamed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    programs = [i for i, (name, _) in enumerate(entries) if name.endswith("/data.pkl")]
    at, is_packed = rng.randrange(len(entries)), rng.random() < 0.1
    if rng.random() < 0.5:
        at = programs[0]
        changed = [(entries[at][0], damage_pickle(entries[at][1], rng))]
    else:
        name, held = entries[at]
        other = rng.choice(["../x", "/x", "x", "data.pkl", name + "x"])
        cut, more = held[: rng.randrange(len(held) + 1)], held + rng.randbytes(4096)
        contents = [cut, more, damage_blindly(held, rng)]
        both = [(name, rng.choice(entries)[1]), (name, held)]
        changed = rng.choice([[], both, [(other, held)], [(name, rng.choice(contents))]])
    entries[at : at + 1] = changed
    return samples.write_zip(entries, at if is_packed else None)


def damage(path: Path, data: bytes, rng: random.Random) -> bytes:
    """The bytes of a file after one kind of damage, blind or not."""
    if rng.random() < 0.35:
        for _ in range(rng.choice([1, 1, 2, 8])):
            data = damage_blindly(data, rng)
        return data
    known = {".json": damage_json, ".safetensors": damage_safetensors}
    by_content = damage_zip if data.startswith(b"PK") else damage_legacy
    return known.get(path.suffix, by_content)(data, rng)


# ---- thousands of them ---------------------------------------------------------------------------
def try_seed(seed: int, folders: list[Path]) -> tuple[str, str]:
    """Damage one file of one folder, load the folder, mend it. Returns (which file, verdict)."""
    rng = random.Random(seed)
    folder = folders[seed % len(folders)]
    os.chdir(folder)  # code that runs leaves its mark here
    files = sorted(folder.iterdir())
    weights = [path for path in files if path.name != "config.json"]
    path = rng.choice(files + weights * 2)  # mostly weights
    whole = path.read_bytes()
    path.unlink()  # a new file: what is still mapped of the old one does not change
    path.write_bytes(damage(path, whole, rng))
    said = samples.verdict(folder)
    if (folder / MARK).exists():
        said = "raised nothing, and code in a pickle was run"
    path.unlink()
    path.write_bytes(whole)
    return f"{folder.name}/{path.name}", said.split(":")[0] if said.startswith("refused") else said


def fuzz(first: int, count: int) -> Counter:
    """Try `count` seeds from `first` on; returns how often each (file, verdict) came.

    Raises AssertionError with the seed over which a child died, or which took much memory.
    """
    counts: Counter = Counter()
    with tempfile.TemporaryDirectory() as name:
        folders = write_checkpoints(Path(name))
        for folder in folders:  # what is imported at the first load is no fault of a file's
            assert samples.verdict(folder) == "loaded", samples.verdict(folder)
        for start in range(first, first + count, BATCH):
            seeds = range(start, min(start + BATCH, first + count))
            work = partial(try_seeds, seeds, folders)
            outcome = samples.in_a_child(work, samples.SECONDS)
            counts.update(outcome.said)
            assert outcome.end == "", f"seed {start + len(outcome.said)}: {outcome.end}"
            assert outcome.peak_mb < 500, f"seeds from {start} on took {outcome.peak_mb} MB"
    return counts


def try_seeds(seeds: range, folders: list[Path], say: Callable) -> None:
    """The work of one child."""
    for kind in (torch.nn.Linear, torch.nn.Embedding):
        kind.reset_parameters = lambda layer: None  # no weight is drawn: all are loaded
    for seed in seeds:
        file, said = try_seed(seed, folders)
        say((file, said if said in ("loaded", "refused") else f"seed {seed}: {said}"))
