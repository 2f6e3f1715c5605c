"""Damage thousands of small checkpoints and load them: finite weights or a ValueError, only that.

The damage is a function of one number, its seed: changes anywhere in a file, and changes that know
JSON, alone or as the header of safetensors. PyTorch reads pickles, so that what is changed in one
are bytes. A failure names its seed; `fuzz(first=1234, count=1)` repeats it.
"""

import json
import random
import struct
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import samples
import torch

from model import GPT, GPTConfig

BATCH = 500  # loads in one child


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
    bad[at : rng.choice([at, at + length, at + length, len(bad)])] = rng.choice(runs)
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
    """Another value, one from elsewhere, or a field under another name."""
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if found := slots(value):
            (container, key), (other, other_key) = rng.choice(found), rng.choice(found)
            copied = json.loads(json.dumps(other[other_key]))
            if isinstance(container, dict) and rng.random() < 0.4:
                container[rng.choice(["", "n_layer", "h.0.attn.bias", key + "x"])] = container[key]
                del container[key]
            else:
                container[key] = rng.choice([rng.choice(ODD_VALUES), copied])
    return json.dumps(value).encode()


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header changed as JSON, and its length made right again, mostly."""
    length = struct.unpack("<Q", data[:8])[0]
    header = damage_json(data[8 : 8 + length], rng)
    said = len(header) if rng.random() < 0.9 else rng.choice([0, 1, length, 2**31, 2**63, 10**11])
    return struct.pack("<Q", said) + header + data[8 + length :]


def damage(path: Path, data: bytes, rng: random.Random) -> bytes:
    """The bytes of a file after one kind of damage, blind or not."""
    if rng.random() < 0.35:
        for _ in range(rng.choice([1, 1, 2, 8])):
            data = damage_blindly(data, rng)
        return data
    if path.suffix in (".json", ".safetensors"):
        return (damage_json if path.suffix == ".json" else damage_safetensors)(data, rng)
    return damage_blindly(data[:4000], rng) + data[4000:]  # pickles stand before the numbers


# ---- thousands of them ---------------------------------------------------------------------------
def try_seed(seed: int, folders: list[Path]) -> tuple[str, str]:
    """Damage one file of one folder, load the folder, mend it. Returns (which file, verdict)."""
    rng = random.Random(seed)
    folder = folders[seed % len(folders)]
    files = sorted(folder.iterdir())
    path = rng.choice(files + [one for one in files if one.name != "config.json"] * 2)
    whole = path.read_bytes()
    path.unlink()  # a new file: what is still mapped of the old one does not change
    path.write_bytes(damage(path, whole, rng))
    said = samples.verdict(folder)
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
            outcome = samples.in_a_child(partial(try_seeds, seeds, folders), samples.SECONDS)
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
