"""Files of weights that strangers wrote: what is in them is read, or refused; nothing of it is run.

Every hostile file stands beside a good config.json, and the whole folder is loaded. Each refusal
names the file and, where there is one, the tensor. At the end thousands are damaged at random.
"""

import json
import os
import re
import struct
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import samples
import torch
from fuzz_checkpoints import try_seed, write_checkpoints
from safetensors.torch import load_file, save_file
from samples import FIELDS, INDEX, LAYOUTS, edit_config, in_the_file, refusal, small_model, write

from checkpoints import weight_files
from checkpoints.load import load_model
from checkpoints.weight_files import catalogue, read
from model import GPT, GPTConfig

TENSORS = in_the_file(small_model())
MATRIX = "transformer.h.1.attn.c_attn.weight"  # (48, 144)
SHARD = "model-00001-of-00002.safetensors"
SAVES = {"zip": torch.save, "legacy": samples.save_legacy}
BIN, SAFE = "pytorch_model.bin", "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A good config.json, and no weights yet."""
    return write(tmp_path / "model", config=FIELDS)


def assert_loads(folder):
    assert torch.equal(load_model(folder).h[1].attn.c_attn.weight, TENSORS[MATRIX].t())


# ---- what is read -------------------------------------------------------------------------
ORDER = {
    SAFE: LAYOUTS["safetensors"],
    INDEX: LAYOUTS["safetensors in shards"],
    BIN: LAYOUTS["zip"],
    "pytorch_model.bin.index.json": LAYOUTS["zip in shards"],
    "ckpt.pt": lambda t, f: torch.save({"model": t, "model_args": {}}, f / "ckpt.pt"),
}


def test_of_several_copies_the_most_trusted_is_read(tmp_path):
    """Each copy holds another tensor name, so that the names say which file was read."""
    for name in reversed(ORDER):
        ORDER[name]({f"copy in {name}": torch.ones(2, 3)}, tmp_path)
        stored, _ = catalogue(tmp_path)
        assert [(one.name, one.shape) for one in stored] == [(f"copy in {name}", (2, 3))]
        assert [tensor.tolist() for _, tensor in read(stored)] == [[[1, 1, 1], [1, 1, 1]]]


# ---- what is refused -----------------------------------------------------------------------------
# A case is a function that writes weights into a folder with a good config, and returns what is
# said of them after "FOLDER/". Most are made by `partial` of the functions between the tables.
OTHER_WEIGHTS = {  # the names in a folder, and what is said of it
    "adapter_model.safetensors adapter_config.json": "a PEFT adapter: save the whole model",
    "model.safetensors adapter_config.json": "a PEFT adapter: save the whole model",
    "gpt2.Q4_K_M.gguf": "llama.cpp's weights: give a folder in Hugging Face's layout",
    "tf_model.h5": "TensorFlow's weights: save the model with PyTorch",
    "model.ckpt.index model.ckpt.meta": "TensorFlow's weights: save the model with PyTorch",
    "flax_model.msgpack": "Flax's weights: save the model with PyTorch",
    "README.md": "no weights: model.safetensors, ",
}


class Call:
    """Unpickled, it would be what `function(*arguments)` returns."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


QUANTISED = Call(torch.quantize_per_tensor, torch.zeros(48, 144), 0.1, 0, torch.qint8)
BAD = " is refused, or damaged: "
NO_NUMBERS = f"{BAD}entry {MATRIX!r} is no tensor, or sparse, quantised or empty"
HOSTILE_VALUES = {  # beside or in place of good tensors, or instead of them all; what is said
    "os.system": (TENSORS | {"z": Call(os.system, "touch mark")}, " is refused"),
    "eval in a list": (TENSORS | {"z": {"a": [Call(eval, "open('mark', 'w')")]}}, " is refused"),
    "no numbers in the file": (TENSORS | {MATRIX: Call(torch.FloatTensor, 48, 144)}, " is refused"),
    "sparse": (TENSORS | {MATRIX: torch.eye(48, 144).to_sparse()}, NO_NUMBERS),
    "quantised": (TENSORS | {MATRIX: QUANTISED}, " is refused"),
    "meta": (TENSORS | {MATRIX: torch.zeros(48, 144, device="meta")}, NO_NUMBERS),
    "a dictionary": (TENSORS | {MATRIX: {"w": torch.zeros(2)}}, NO_NUMBERS),
    "a name that is a number": (TENSORS | {1: torch.zeros(2)}, f"{BAD}entry 1 is no tensor, or "),
    "a list": ([1, 2], f"{BAD}it holds no dictionary"),
    "no tensors": ({}, " holds no tensors"),
}


def pickled(folder, value, said="", save=torch.save, name=BIN):
    save(value, folder / name)
    return name + said


NANOGPT = {"model": samples.as_linear(TENSORS), "model_args": samples.ARGS, "iter_num": 5}
NANOGPT_FAULTS = {
    "model_args is a list": {"model_args": [1]},
    "model_args is empty": {"model_args": {}},
    "n_layer is a tensor": {"model_args": samples.ARGS | {"n_layer": torch.tensor(2)}},
}


def repacked(folder, edits={}, extra=(), packed="-", nul=None, said=""):
    """A zipped pickle written again, by Python's own zip, with some entries changed."""
    path = folder / BIN
    torch.save({MATRIX: TENSORS[MATRIX], **TENSORS}, path)
    with zipfile.ZipFile(path) as archive:
        held = {one.filename.split("/", 1)[1]: archive.read(one) for one in archive.infolist()}
    entries = [(f"pytorch_model/{n}", edits.get(n, data)) for n, data in held.items()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in [*entries, *extra]:
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if name.endswith(packed) else None)
    if nul:
        assert_loads(folder)
        path.write_bytes(path.read_bytes().replace(nul, nul.replace(b"-", b"\0")))
    return BIN + said


LONG = {"data.pkl": b"\x80\x02" + b"N0" * (5 << 19) + b"}."}
BOMB = {"data.pkl": b"\x80\x02}" + bytes(1 << 26) + b"."}
ODD = BAD + "a record is compressed, encrypted, there twice, or has a NUL in its name"
ZIP_FAULTS = {
    "numbers compressed": {"packed": "data/0", "said": ODD},
    "a bomb": {"edits": BOMB, "packed": "data.pkl", "said": ODD},
    "two pickles": {"extra": [("pytorch_model/data.pkl", b"\x80\x02}.")], "said": ODD},
    "names that climb out": {"extra": [("../../evil", b"x"), ("/tmp/evil", b"x")]},
    "names that differ in case": {"extra": [("pytorch_model/DATA.PKL", b"x")], "said": ODD},
    "a program of 5 MB": {"edits": LONG, "said": f"{BAD}data.pkl is larger than the 4,194,304 byt"},
    # To Python the second name is `.../data/0`, to other readers it has two more bytes.
    "a NUL": {"extra": [("pytorch_model/extra/0-1", b"x")], "nul": b"extra/0-1", "said": ODD},
}

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
POINTER = " is a Git LFS pointer, not the file: run `git lfs pull`$"
ODD_FILES = {  # and what is said: a broken link is reported as the missing file that it is
    "empty": (lambda path: path.write_bytes(b""), ""),
    "an LFS pointer": (lambda path: path.write_bytes(LFS), POINTER),
    "a folder": (lambda path: path.mkdir(), " is no regular file"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), ""),
    "endless zeros": (lambda path: path.symlink_to("/dev/zero"), " is no regular file"),
    "a pipe": (lambda path: os.mkfifo(path), " is no regular file"),
    "3 GB of nothing": (lambda path: (path.touch(), os.truncate(path, 3 << 30)), ""),
}


def odd_file(folder, name, make, said):
    if name == "config.json":
        save_file(TENSORS, folder / SAFE)
        (folder / name).unlink()
    make(folder / name)
    return name + said


def forty_gigabytes_of_nothing(folder):
    """A sparse file takes no room on the disk. Its config agrees with it."""
    header, end = {}, 0
    for name in TENSORS:
        shape = [10_000_000, 1000] if name.endswith("wte.weight") else [1000, 1000]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end]}
        end += 4 * shape[0] * shape[1]
        header[name]["data_offsets"] += [end]
    text = json.dumps(header).encode()
    (folder / SAFE).write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(folder / SAFE, 8 + len(text) + end)
    edit_config(folder, n_head=1, n_embd=1000, vocab_size=10_000_000, n_positions=1024)
    # the first: where no more than 16 GB can be mapped
    return f"{SAFE}({BAD}.*memory|: the weights take 40.1 GB)"


def layers_of_one_matrix(folder, save):
    """200 layers that share their bytes: 0.4 MB of file, and 85 MB of memory as weights."""
    edit_config(folder, n_layer=200, n_embd=96)
    small = in_the_file(GPT(GPTConfig(61, 32, n_layer=1, n_head=3, n_embd=96)).init_weights())
    layer = {name: small.pop(name) for name in [*small] if ".h." in name}
    many = {n.replace(".0.", f".{i}.", 1): t for i in range(200) for n, t in layer.items()}
    save(small | many, folder / BIN)
    assert (folder / BIN).stat().st_size < 2 << 20
    return f"{BIN}{BAD}its tensors are larger than the file"


def with_config(folder, said, **changes):
    """Other numbers in the config of good weights."""
    save_file(TENSORS, folder / SAFE)
    edit_config(folder, **changes)
    return f"{SAFE}: {said}"


WIDE = {"n_embd": 9_999_999, "n_inner": 10_000_000, "vocab_size": 10_000_000}
LAYERS = {"said": "28 tensors are too few for n_layer 1000", "n_layer": 10**7}
HOMES = ["../" + SHARD, "/etc/x.safetensors", "", "x\0.safetensors", 7, BIN, "nul\n.safetensors"]
HOMES += [[SHARD], "x" * 5000 + ".safetensors"]
NO_INDEX = [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b'{"weight_map": []}', b'{"weight_map": {}}']


def indexed(folder, index):
    """Good shards under another index: its bytes, or where it says that MATRIX lies."""
    LAYOUTS["safetensors in shards"](TENSORS, folder)
    if isinstance(index, bytes):
        (folder / INDEX).write_bytes(index)
        return INDEX
    fields = json.loads((folder / INDEX).read_text())
    changed = fields | {"weight_map": fields["weight_map"] | {MATRIX: index}}
    (folder / INDEX).write_text(json.dumps(changed))
    return f"{INDEX}: tensor {MATRIX!r} lies in "


REFUSED = {
    "pickles": {
        f"{case}, {kind}": partial(pickled, value=value, said=said, save=save)
        for kind, save in SAVES.items()
        for case, (value, said) in HOSTILE_VALUES.items()
    },
    "zips": {case: partial(repacked, **fault) for case, fault in ZIP_FAULTS.items()},
    "nanoGPT": {
        case: partial(pickled, value=NANOGPT | fault, name="ckpt.pt")
        for case, fault in NANOGPT_FAULTS.items()
    },
    "odd files": {
        f"{odd}, {name}": partial(odd_file, name=name, make=make, said=said)
        for name in ["config.json", *ORDER]
        for odd, (make, said) in ODD_FILES.items()
    },
    "the impossible": {
        "40 GB": forty_gigabytes_of_nothing,
        **{kind: partial(layers_of_one_matrix, save=save) for kind, save in SAVES.items()},
        "ten million layers": partial(with_config, **LAYERS),
        "wide": partial(with_config, said="the weights take 5200001.3 GB", **WIDE),
    },
    "indices": {str(i): partial(indexed, index=x) for i, x in enumerate(HOMES + NO_INDEX)},
}
GOOD = {"zips": repacked, "nanoGPT": partial(pickled, value=NANOGPT, name="ckpt.pt")}


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, about sparse rows and storages
@pytest.mark.regression
@pytest.mark.parametrize("group", REFUSED)
def test_a_hostile_folder_is_refused_in_one_sentence_and_no_code_runs(group, tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "here"))
    if group in GOOD:  # what is made by hand is as good as the library's own
        GOOD[group](write(tmp_path / "good", config=FIELDS))
        assert_loads(tmp_path / "good")
    cases = REFUSED[group]
    folders = {case: write(tmp_path / "cases" / case, config=FIELDS) for case in cases}
    words = {case: make(folders[case]) for case, make in cases.items()}
    outcome = samples.in_a_child(samples.verdict, folders.values())
    said = dict(zip(cases, outcome.said))
    starts = {case: re.escape(f"refused: {folders[case]}/") + words[case] for case in said}
    assert {case: said[case] for case in said if not re.match(starts[case], said[case])} == {}
    assert outcome.end == "", (outcome.end, [*cases][len(said)])
    assert outcome.peak_mb < 300
    assert [*(tmp_path / "here").iterdir()] == []
    assert "evil" not in [path.name for parent in tmp_path.parents for path in parent.glob("e*")]


@pytest.mark.parametrize("names", OTHER_WEIGHTS)
def test_weights_of_another_kind_are_refused_by_what_they_are(names, folder):
    for name in names.split():
        (folder / name).write_bytes(b"GGUF")
    assert refusal(folder).startswith(f"{folder} holds {OTHER_WEIGHTS[names]}")
    if name.endswith(("gguf", "h5", "msgpack")):
        assert refusal(folder / name).startswith(f"{folder / name}: {OTHER_WEIGHTS[names]}")


def test_a_shard_or_a_tensor_that_is_not_there_or_twice_is_named(folder):
    LAYOUTS["safetensors in shards"](TENSORS, folder)
    assert_loads(folder / SHARD)  # one of the files is served with all the others
    assert_loads(folder / INDEX)
    index = json.loads((folder / INDEX).read_text())
    # A tensor that it forgets is in the shard all the same: old exporters left out the tied head.
    homes = {name: home for name, home in index["weight_map"].items() if name != MATRIX}
    write(folder, **{Path(INDEX).stem: index | {"weight_map": homes}})
    assert_loads(folder)
    held = load_file(folder / SHARD)
    lost, other = sorted(held)[0], sorted(TENSORS.keys() - held.keys())[0]
    save_file({name: held[name] for name in held if name != lost}, folder / SHARD)
    assert refusal(folder).startswith(f"{folder / SHARD}: tensor {lost!r} of its index")
    save_file({**held, other: TENSORS[other]}, folder / SHARD)
    assert re.search(rf"00002.safetensors: tensor {other!r} is in {SHARD} too", refusal(folder))
    (folder / SHARD).unlink()
    assert refusal(folder) == f"{folder / SHARD} is missing"


def test_an_old_pickle_larger_than_the_free_memory_is_refused(folder, monkeypatch):
    """It cannot be mapped: PyTorch reads it whole."""
    samples.save_legacy(TENSORS, folder / BIN)
    size = (folder / BIN).stat().st_size
    monkeypatch.setattr(weight_files, "free_memory_bytes", lambda device: size)
    assert_loads(folder)
    monkeypatch.setattr(weight_files, "free_memory_bytes", lambda device: size - 1)
    assert f"it has {size:,} bytes, and {size - 1:,} bytes of memory are free" in refusal(folder)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="Linux can open an open file again")
@pytest.mark.parametrize("name, save", [(SAFE, save_file), (BIN, torch.save)])
def test_a_link_that_leads_elsewhere_after_the_check_is_not_followed_again(
    name, save, folder, monkeypatch
):
    """Each time a library opens a file, the link has changed sides since the check."""
    link, sides = folder / name, ["good", "other"]
    save(TENSORS, folder / "good")
    save({n: tensor + 1 for n, tensor in TENSORS.items()}, folder / "other")
    link.symlink_to("good")

    def flip(function):
        def flipped(*args, **options):
            sides.reverse()
            link.unlink()
            link.symlink_to(sides[0])
            return function(*args, **options)

        return flipped

    monkeypatch.setattr(weight_files, "safe_open", flip(weight_files.safe_open))
    monkeypatch.setattr(torch, "load", flip(torch.load))
    assert refusal(folder).startswith(f"{link} was changed while it was read")


# ---- damaged at random ---------------------------------------------------------------------------
TEN_THOUSAND = pytest.param(300, 10_000, marks=pytest.mark.slow)


@pytest.mark.parametrize("first, count", [(0, 300), TEN_THOUSAND])
def test_a_damaged_checkpoint_loads_with_finite_weights_or_is_refused(first, count, tmp_path):
    folders, counts = write_checkpoints(tmp_path), Counter()
    assert {samples.verdict(folder) for folder in folders} == {"loaded"}
    for start in range(first, first + count, 500):
        seeds = range(start, min(start + 500, first + count))
        outcome = samples.in_a_child(partial(try_seed, folders=folders), seeds)
        assert outcome.end == "", f"seed {start + len(outcome.said)}: {outcome.end}"
        assert outcome.peak_mb < 500, f"seeds from {start} on took {outcome.peak_mb} MB"
        counts.update(outcome.said)
    assert {said for _, said in counts} == {"loaded", "refused"}
    assert counts.total() == count
    for folder in folders:
        loaded, refused = counts[folder.name, "loaded"], counts[folder.name, "refused"]
        assert loaded > 0 and refused > 0.3 * (loaded + refused), folder  # the damage has its teeth
