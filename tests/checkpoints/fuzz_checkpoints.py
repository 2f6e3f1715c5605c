"""Small checkpoints and damage to them, for tests that load thousands of damaged ones.

The damage is a function of its seed: changes anywhere in a file, and changes that know JSON, alone
or as the header of safetensors. A failure names its seed; `try_seed(1234, folders)` repeats it.
"""

import json
import random
import struct
from pathlib import Path

import samples

from model import GPT, GPTConfig


def write_checkpoints(base: Path) -> list[Path]:
    """The same small model in each kind of file, in a folder each; returns the folders."""
    shape = {"vocab_size": 11, "n_layer": 1, "n_head": 1, "n_embd": 8}
    tensors = samples.in_the_file(GPT(GPTConfig(**shape, max_seq_len=8)).init_weights(std=0.2))
    config = {"model_type": "gpt2", "n_positions": 8} | shape
    for layout, write_layout in samples.LAYOUTS.items():
        write_layout(tensors, samples.write(base / layout, config=config))
    args = shape | {"block_size": 8, "bias": True}
    samples.write_nanogpt(samples.as_linear(tensors), args, samples.write(base / "nanogpt"))
    return sorted(base.iterdir())


# ---- damage --------------------------------------------------------------------------------------
def damage_blindly(data: bytes, rng: random.Random) -> bytes:
    """A changed bit; or a run that is cut out, overwritten, put in, or taken from elsewhere."""
    at, source = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    if rng.random() < 0.25:
        return data[:at] + bytes(x ^ 1 << rng.randrange(8) for x in data[at:][:1]) + data[at + 1 :]
    length = rng.choice([1, 1, 2, 4, 8, 64])
    runs = [b"", bytes(length), b"\xff" * length, rng.randbytes(length), data[source:][:length]]
    end = rng.choice([at, at + length, at + length, len(data)])
    return data[:at] + rng.choice(runs) + data[end:]


ODD_VALUES = (
    *(None, True, -1, 0, 1, 2, 7, 8, 0.5, 1e308, float("nan"), 10**7, 2**31, 2**63, 10**400),
    *([], {}, [8], [0, 256], [2**62, 2**62], "", "../x", "/etc/passwd", "gelu", "x" * 5000),
    *("F16", "I64", "F8_E4M3", "F4", "model-00001-of-00002.safetensors", "config.json"),
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
    (container, key), (other, other_key) = rng.choices(slots(value), k=2)
    if isinstance(container, dict) and rng.random() < 0.4:
        container[rng.choice(["", "n_layer", "h.0.attn.bias", key + "x"])] = container.pop(key)
    else:
        copied = json.loads(json.dumps(other[other_key]))
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
    ways = {".json": damage_json, ".safetensors": damage_safetensors}
    if path.suffix in ways and rng.random() < 0.65:
        return ways[path.suffix](data, rng)
    end = rng.choice([4000, len(data)])  # headers and pickles stand before the numbers
    for _ in range(rng.choice([1, 1, 2, 8])):
        data = damage_blindly(data[:end], rng) + data[end:]
    return data


def try_seed(seed: int, folders: list[Path]) -> tuple[str, str]:
    """Damage one file of one folder, load the folder, mend it. Returns (which folder, verdict)."""
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
    word = said.split(":")[0]
    return folder.name, word if word in ("loaded", "refused") else f"seed {seed}: {said}"
