"""Damage thousands of small checkpoints and load them: finite weights or a ValueError, only that.

A file from a stranger may end a process in ways that no `except` sees: a crash in a library, a loop
without end, all of the machine's memory. So every load happens in a forked child with a clock and a
count of its memory. The damage is a function of one number, its seed: changes anywhere in a file,
and changes that know the format (JSON values, the opcodes of a pickle, the entries of a zip).

A failure names its seed; `fuzz(first=1234, count=1)` repeats it.
"""

import io
import json
import multiprocessing
import os
import pickletools
import random
import resource
import shutil
import signal
import struct
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from checkpoints.load import load_model
from checkpoints.train_tiny import save_model
from model import GPT, GPTConfig

SECONDS = 20  # for one load, on a machine that is busy with other things
BATCH = 50  # loads in one child; after a crash the next child goes on behind the seed that did it


# ---- a child to die in place of this process -----------------------------------------------------
class Outcome(NamedTuple):
    """What became of a child: what it said, and what it took."""

    said: list  # one entry a call of `say`
    end: str  # "" if it came to its end, else the signal that ended it or how long it hung
    peak_mb: float  # of memory, above what it had when it began; 0 where the system cannot tell


def memory_mb(field: str) -> float:
    """A line of Linux's account of this process (VmRSS: now, VmHWM: at most), in MB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # another system
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def in_a_child(work: Callable[[Callable[[str], None]], None], seconds: float) -> Outcome:
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
    peak_mb = said.pop() if said and isinstance(said[-1], float) else 0.0
    return Outcome(said, end, peak_mb)


def work_and_tell(work: Callable[[Callable[[str], None]], None], writer: Connection) -> None:
    """The child's life: work, and at last the most memory that it took."""
    most = 16 << 30  # whatever is loaded here, the machine is not to run out of memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # VmHWM begins at what is there now
    before = memory_mb("VmRSS")
    work(writer.send)
    writer.send(memory_mb("VmHWM") - before)


def verdict(folder: Path, **options) -> str:
    """Load a folder: "loaded", "refused: ..." or, what should never be, "raised ..."."""
    try:
        model = load_model(folder, **options)
    except ValueError as error:
        return f"refused: {error}"
    except BaseException as error:
        return f"raised {type(error).__name__}: {str(error)[:300]}"
    weights = model.state_dict()
    sizes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in GPT(model.config).state_dict().items()}
    if sizes != wanted:
        return "raised nothing, and a tensor has another shape than the config says"
    bad = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    return f"raised nothing, and {bad[0]} is not finite" if bad else "loaded"


def fault_of(outcome: str, folder: Path) -> str | None:
    """What is wrong with a verdict; None for a load or for one sentence that names the file."""
    if outcome == "loaded":
        return None
    if not outcome.startswith("refused: "):
        return outcome
    if str(folder) not in outcome or "\n" in outcome or len(outcome) > 1500:
        return f"not one sentence that names a file: {outcome[:300]!r}"
    return None


# ---- what is damaged -----------------------------------------------------------------------------
def write_checkpoints(base: Path) -> list[Path]:
    """The same small model in each kind of file, in a folder each; returns the folders."""
    config = GPTConfig(vocab_size=11, max_seq_len=8, n_layer=1, n_head=1, n_embd=8)
    model = GPT(config).init_weights(std=0.2)
    folders = [base / kind for kind in ("safetensors", "shards", "zip", "zip_shards", "legacy")]
    for folder in folders:
        save_model(model, folder, torch.float32)
    tensors = load_file(folders[0] / "model.safetensors")
    for folder in folders[1:]:
        (folder / "model.safetensors").unlink()
    write_shards(folders[1], "model", ".safetensors", tensors, save_file)
    torch.save(tensors, folders[2] / "pytorch_model.bin")
    write_shards(folders[3], "pytorch_model", ".bin", tensors, torch.save)
    old = {"_use_new_zipfile_serialization": False}
    torch.save(tensors, folders[4] / "pytorch_model.bin", **old)
    args = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "bias": True, "vocab_size": 11}
    state = {f"transformer.{name}": tensor for name, tensor in model.state_dict().items()}
    moments = {"state": {0: {"exp_avg": torch.ones(11, 8)}}, "param_groups": [{"lr": 6e-4}]}
    nanogpt = base / "nanogpt"
    nanogpt.mkdir()
    torch.save({"model": state, "optimizer": moments, "model_args": args}, nanogpt / "ckpt.pt")
    return [*folders, nanogpt]


def write_shards(folder: Path, stem: str, suffix: str, tensors: dict, save: Callable) -> None:
    """Two files and their index, as transformers writes what is too large for one."""
    names = sorted(tensors)
    homes = {name: f"{stem}-0000{i % 2 + 1}-of-00002{suffix}" for i, name in enumerate(names)}
    for home in sorted(set(homes.values())):
        save({name: tensors[name] for name in names if homes[name] == home}, folder / home)
    index = {"metadata": {"total_size": 1}, "weight_map": homes}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


# ---- damage that knows nothing -------------------------------------------------------------------
def damage_blindly(data: bytes, rng: random.Random) -> bytes:
    """A changed bit, a changed run, a cut, a hole, something put in, a piece from elsewhere."""
    bad = bytearray(data)
    at, length = rng.randrange(len(bad) + 1), rng.choice([1, 1, 2, 4, 8, 64])
    kind = rng.choice(["bit", "bit", "byte", "run", "cut", "hole", "insert", "splice", "tail"])
    if kind == "bit" and at < len(bad):
        bad[at] ^= 1 << rng.randrange(8)
    elif kind == "byte" and at < len(bad):
        bad[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, *b'."[]{}0', rng.randrange(256)])
    elif kind == "run":
        bad[at : at + length] = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])
    elif kind == "cut":
        del bad[at:]
    elif kind == "hole":
        del bad[at : at + length]
    elif kind == "insert":
        bad[at:at] = rng.randbytes(length)
    elif kind == "splice":
        source = rng.randrange(len(data) + 1)
        bad[at : at + length] = data[source : source + length * rng.choice([1, 1, 8])]
    else:
        bad += rng.randbytes(length)
    return bytes(bad)


# ---- damage that knows JSON ----------------------------------------------------------------------
ODD_VALUES = (
    *(None, True, False, -1, 0, 1, 2, 7, 8, 88, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(10**7, 10**9, 2**31, 2**63, 10**400, [], {}, [8], [8, 8], [0, 256], [2**62, 2**62], ["8"]),
    *("", "x", "../x", "/etc/passwd", ".", "gpt2", "gelu", "relu", "F16", "BF16", "I64", "BOOL"),
    *("F8_E4M3", "F6_E2M3", "F4", "model-00001-of-00002.safetensors", "config.json", "x" * 5000),
)


def slots(value) -> list[tuple]:
    """Every (container, key) in a JSON value."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    return [(value, key) for key in keys] + [p for key in keys for p in slots(value[key])]


def damage_json(data: bytes, rng: random.Random) -> bytes:
    """Another value, a field less, a field renamed, two fields exchanged."""
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not (found := slots(value)):
            break
        (container, key), (other, other_key) = rng.choice(found), rng.choice(found)
        kind = rng.choice(["value", "value", "remove", "rename", "exchange", "copy"])
        if kind == "value":
            container[key] = rng.choice(ODD_VALUES)
        elif kind == "remove":
            del container[key]
        elif kind == "rename" and isinstance(container, dict):
            container[rng.choice(["", "x", "n_layer", "h.0.attn.bias", key + "x"])] = container[key]
        elif kind == "exchange" and container is other:
            container[key], container[other_key] = container[other_key], container[key]
        else:
            container[key] = json.loads(json.dumps(other[other_key]))
    return json.dumps(value).encode()


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header changed as JSON, and its length made right again, mostly."""
    length = struct.unpack("<Q", data[:8])[0]
    header = damage_json(data[8 : 8 + length], rng)
    said = len(header) if rng.random() < 0.9 else rng.choice([0, 1, length, 2**31, 2**63, 10**11])
    return struct.pack("<Q", said) + header + data[8 + length :]


# ---- damage that knows pickles and zips ----------------------------------------------------------
MARK = "executed"  # a file that appears where a pickle's code has run
RUN_CODE = f"cposix\nsystem\n(X{chr(len(MARK) + 6)}\0\0\0touch {MARK}tR".encode()
ODD_OPCODES = (
    *(RUN_CODE, b"cbuiltins\neval\n", b"cbuiltins\nbytearray\n", b"ctorch\nSize\n", b"ctorch\nx\n"),
    *(b"cbuiltins\nset\n", b"ccollections\nCounter\n", b"ctorch\nHalfStorage\n", b"ctorch\nint8\n"),
    b"ctorch._utils\n_rebuild_sparse_tensor\n",
    b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n",
    *(
        b"ctorch._utils\n_rebuild_parameter\n",
        b"ctorch\nFloatTensor\n",
        b"ctorch._tensor\nTensor\n",
    ),
    *(b"R", b"b", b"\x81", b"Q", b"t", b"\x85", b"\x86", b"\x87", b"(", b"]", b"}", b")", b"\x8f"),
    *(b"N", b"\x88", b"\x89", b"0", b"2", b"1", b"a", b"e", b"s", b"u", b".", b"h\x00", b"h\x04"),
    *(b"K\x00", b"K\x08", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 8),
    *(b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"X\x01\x00\x00\x00x", b"X\xff\xff\xff\xff", b"B"),
    *(b"G\x7f\xf8" + bytes(6), b"\x8b\xff\xff\xff\x7f", b"\x80\x05", b"\x93", b"\x94", b"i", b"o"),
)


def damage_pickle(data: bytes, rng: random.Random) -> bytes:
    """An opcode less, twice, moved, or another one in its place."""
    starts = [position for _, _, position in pickletools.genops(data)]
    ops = [data[a:b] for a, b in zip(starts, [*starts[1:], starts[-1] + 1], strict=True)]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at, other = rng.randrange(len(ops)), rng.randrange(len(ops))
        kind = rng.choice(["odd", "odd", "insert", "remove", "twice", "exchange", "copy"])
        if kind == "odd":
            ops[at] = rng.choice(ODD_OPCODES)
        elif kind == "insert":
            ops.insert(at, rng.choice(ODD_OPCODES))
        elif kind == "remove" and len(ops) > 1:
            del ops[at]
        elif kind == "twice":
            ops.insert(at, ops[at])
        elif kind == "exchange":
            ops[at], ops[other] = ops[other], ops[at]
        else:
            ops[at] = ops[other]
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
    at, packed = rng.randrange(len(entries)), None
    name, held = entries[at]
    kind = rng.choice([*["pickle"] * 6, "lose", "cut", "blind", "double", "pack", "rename", "grow"])
    if kind == "pickle":
        at = next(i for i, (name, _) in enumerate(entries) if name.endswith("/data.pkl"))
        entries[at] = (entries[at][0], damage_pickle(entries[at][1], rng))
    elif kind == "lose":
        del entries[at]
    elif kind == "cut":
        entries[at] = (name, held[: rng.randrange(len(held) + 1)])
    elif kind == "blind" and held:
        entries[at] = (name, damage_blindly(held, rng))
    elif kind == "double":
        entries.insert(rng.randrange(len(entries)), (name, rng.choice(entries)[1]))
    elif kind == "pack":
        packed = at
    elif kind == "rename":
        entries[at] = (rng.choice(["../x", "/x", "x", "data.pkl", name + "x"]), held)
    else:
        entries[at] = (name, held + rng.randbytes(rng.choice([1, 64, 4096])))
    return write_zip(entries, packed)


def write_zip(entries: list[tuple[str, bytes]], packed: int | None = None) -> bytes:
    """A zip of these entries, one of them compressed."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")  # two entries of one name: that is what was asked for
        for i, (name, held) in enumerate(entries):
            method = zipfile.ZIP_DEFLATED if i == packed else zipfile.ZIP_STORED
            archive.writestr(name, held, method)
    return out.getvalue()


def damage(path: Path, rng: random.Random) -> bytes:
    """The bytes of a file after one kind of damage, blind or not."""
    data = path.read_bytes()
    if rng.random() < 0.35:
        for _ in range(rng.choice([1, 1, 2, 8])):
            data = damage_blindly(data, rng) or b"\0"
        return data
    if path.suffix == ".json":
        return damage_json(data, rng)
    if path.suffix == ".safetensors":
        return damage_safetensors(data, rng)
    return damage_zip(data, rng) if data.startswith(b"PK") else damage_legacy(data, rng)


# ---- thousands of them ---------------------------------------------------------------------------
def try_seed(seed: int, folders: list[Path]) -> tuple[str, str]:
    """Damage one file of one folder, load the folder, mend it. Returns (which file, verdict)."""
    rng = random.Random(seed)
    folder = folders[seed % len(folders)]
    files = sorted(path for path in folder.iterdir() if path.is_file())
    weights = [path for path in files if path.name != "config.json"]
    path = rng.choice(files + weights * 2)  # mostly weights
    whole = path.read_bytes()
    bad = damage(path, rng)
    path.unlink()  # a new file: what is still mapped of the old one does not change
    path.write_bytes(bad)
    outcome = verdict(folder)
    if (folder / MARK).exists():
        outcome = "raised nothing, and code in a pickle was run"
    path.unlink()
    path.write_bytes(whole)
    return f"{folder.name}/{path.name}", fault_of(outcome, folder) or outcome.split(":")[0]


def fuzz(first: int, count: int) -> tuple[Counter, list[str], float]:
    """Try `count` seeds from `first` on, `BATCH` in a child.

    Returns how often each (file, "loaded" or "refused") came, the faults with their seeds, and the
    most memory that a batch took, in MB.
    """
    counts: Counter = Counter()
    faults: list[str] = []
    peak_mb, seed = 0.0, first
    with tempfile.TemporaryDirectory() as name:
        folders = write_checkpoints(Path(name))
        for folder in folders:  # what is imported at the first load is no fault of a file's
            assert verdict(folder) == "loaded", verdict(folder)
        while seed < first + count:
            last = min(seed + BATCH, first + count)
            outcome = in_a_child(partial(try_seeds, range(seed, last), folders), SECONDS)
            peak_mb = max(peak_mb, outcome.peak_mb)
            for line in outcome.said:
                seed, file, said = line
                if said in ("loaded", "refused"):
                    counts[file, said] += 1
                elif said != "begun":
                    faults.append(f"seed {seed}, {file}: {said}")
            if outcome.end:  # the child died over the last seed that it named
                faults.append(f"seed {seed}: {outcome.end}")
                shutil.rmtree(name)
                folders = write_checkpoints(Path(name))  # one of them is still damaged
            seed += 1
    return counts, faults, peak_mb


def try_seeds(seeds: range, folders: list[Path], say: Callable[[str], None]) -> None:
    """The work of one child."""
    os.chdir(folders[0].parent)
    for seed in seeds:
        say((seed, "", "begun"))
        os.chdir(folders[seed % len(folders)])  # code that runs leaves its mark here
        say((seed, *try_seed(seed, folders)))
