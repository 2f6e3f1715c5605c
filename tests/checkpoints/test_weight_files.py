"""Files of weights that strangers wrote: what is in them is read, or refused; nothing of it is run.

Every hostile file stands beside a good config.json, and the whole folder is loaded. Each refusal
is a ValueError of one sentence that names the file and, where there is one, the tensor. At the end
thousands of small checkpoints are damaged at random.
"""

import json
import os
import re
import struct
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from fuzz_checkpoints import fuzz
from safetensors.torch import load_file, save, save_file
from samples import (
    ARGS,
    FIELDS,
    INDEX,
    LAYOUTS,
    SHAPE,
    as_linear,
    assert_refused,
    edit_config,
    in_the_file,
    refusal,
    save_legacy,
    small_model,
    write,
    write_zip,
)

from checkpoints import weight_files
from checkpoints.load import load_model
from checkpoints.weight_files import catalogue, read
from model import GPT, GPTConfig

TENSORS = in_the_file(small_model())
MATRIX = "transformer.h.1.attn.c_attn.weight"  # (48, 144)
GAIN = "transformer.ln_f.weight"  # (48,)
SHARD = "model-00001-of-00002.safetensors"
SAVES = {"zip": torch.save, "legacy": save_legacy}
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


@pytest.mark.parametrize("best", ORDER)
def test_of_several_copies_the_most_trusted_is_read(best, tmp_path):
    """Each copy holds another tensor name, so that the names say which file was read."""
    for name in [*ORDER][[*ORDER].index(best) :]:
        ORDER[name]({f"copy in {name}": torch.ones(2, 3)}, tmp_path)
    stored, _ = catalogue(tmp_path)
    assert [(one.name, one.shape) for one in stored] == [(f"copy in {best}", (2, 3))]
    assert [tensor.tolist() for _, tensor in read(stored)] == [[[1, 1, 1], [1, 1, 1]]]


@pytest.mark.parametrize("name", [SHARD, INDEX, SAFE])
def test_a_file_of_weights_is_served_from_its_folder(name, folder):
    LAYOUTS["safetensors" if name == SAFE else "safetensors in shards"](TENSORS, folder)
    assert_loads(folder / name)


@pytest.mark.parametrize("kind", SAVES)
def test_pytorch_is_always_asked_for_weights_only_and_to_map_what_it_can(kind, folder, monkeypatch):
    asked, real = set(), torch.load

    def load(*args, **options):
        asked.add((options["weights_only"], options["mmap"]))
        return real(*args, **options)

    SAVES[kind](TENSORS, folder / BIN)
    monkeypatch.setattr(torch, "load", load)
    assert_loads(folder)
    assert asked == {(True, kind == "zip")}


# ---- what is refused -----------------------------------------------------------------------------
# A case is a function that writes weights into a folder with a good config, and returns what is
# said of them after "FOLDER/". Cases are made by the functions between the tables.
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
POINTER = " is a Git LFS pointer, not the file: run `git lfs pull`$"
OTHER_WEIGHTS = {  # the names in a folder, and what is said of it
    "adapter_model.safetensors adapter_config.json": "a PEFT adapter: save the whole model",
    "model.safetensors adapter_config.json": "a PEFT adapter: save the whole model",
    "gpt2.Q4_K_M.gguf": "llama.cpp's weights: give a folder in Hugging Face's layout",
    "tf_model.h5": "TensorFlow's weights: save the model with PyTorch",
    "model.ckpt.index model.ckpt.meta": "TensorFlow's weights: save the model with PyTorch",
    "flax_model.msgpack": "Flax's weights: save the model with PyTorch",
    "README.md": "no weights: model.safetensors, ",
}


def holding(name, content, said):
    """Good weights of the lowest trust, and one file."""

    def make(folder):
        LAYOUTS["zip"](TENSORS, folder)
        (folder / name).write_bytes(content)
        return said

    return make


class Call:
    """Unpickled, it would be what `function(*arguments)` returns."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def made_of(count, offset, shape, strides):
    """A tensor that claims more of its storage of `count` numbers than is there."""
    storage = torch.zeros(count)._typed_storage()
    rebuild = torch._utils._rebuild_tensor_v2
    return Call(rebuild, storage, offset, shape, strides, False, OrderedDict())


QUANTISED = Call(torch.quantize_per_tensor, torch.zeros(48, 144), 0.1, 0, torch.qint8)
BAD = " is refused, or damaged: "
NO_NUMBERS = f"{BAD}entry {MATRIX!r} is no tensor, or sparse, quantised or empty"
HOSTILE_VALUES = {  # beside or in place of good tensors, or instead of them all; what is said
    "os.system": ({"z": Call(os.system, "touch mark")}, " is refused"),
    "open": ({"z": Call(open, "mark", "w")}, " is refused"),
    "eval in a list": ({"z": {"a": [Call(eval, "open('mark', 'w')")]}}, " is refused"),
    "torch.hub": ({"z": Call(torch.hub.load, "mark", "x")}, " is refused"),
    "more than its storage": ({MATRIX: made_of(1, 0, (48, 144), (144, 1))}, " is refused"),
    "negative strides": ({MATRIX: made_of(6912, 0, (48, 144), (-144, 1))}, " is refused"),
    "an offset past the end": ({MATRIX: made_of(6912, 6912, (48, 144), (144, 1))}, " is refused"),
    "no numbers in the file": ({MATRIX: Call(torch.FloatTensor, 48, 144)}, " is refused"),
    "sparse": ({MATRIX: torch.eye(48, 144).to_sparse()}, NO_NUMBERS),
    "quantised": ({MATRIX: QUANTISED}, " is refused"),
    "meta": ({MATRIX: torch.zeros(48, 144, device="meta")}, NO_NUMBERS),
    "integers": ({MATRIX: torch.zeros(48, 144).long()}, f": tensor {MATRIX!r} holds torch.int64"),
    "a dictionary": ({MATRIX: {"w": torch.zeros(2)}}, NO_NUMBERS),
    "a name that is a number": ({1: torch.zeros(2)}, f"{BAD}entry 1 is no tensor, or "),
    "a list": ([1, 2], f"{BAD}it holds no dictionary"),
    "nothing": (None, f"{BAD}it holds no dictionary"),
    "a tensor": (torch.zeros(2), f"{BAD}it holds no dictionary"),
    "no tensors": ({}, " holds no tensors"),
}


def pickled(value, said, save):
    whole = TENSORS | value if isinstance(value, dict) and value else value
    return lambda folder: save(whole, folder / BIN) or BIN + said


NANOGPT_FAULTS = {
    "model is no dictionary": {"model": [1]},
    "model_args is a list": {"model_args": [1]},
    "model_args is empty": {"model_args": {}},
    "n_layer is text": {"model_args": ARGS | {"n_layer": "2"}},
    "n_layer is a tensor": {"model_args": ARGS | {"n_layer": torch.tensor(2)}},
    "n_layer is 3": {"model_args": ARGS | {"n_layer": 3}},
    "n_layer is 2 ** 200": {"model_args": ARGS | {"n_layer": 2**200}},
    "vocab_size is another": {"model_args": ARGS | {"vocab_size": 62}},
    "block_size is missing": {"model_args": {k: v for k, v in ARGS.items() if k != "block_size"}},
}


def nanogpt(changes):
    good = {"model": as_linear(TENSORS), "model_args": ARGS, "iter_num": 5}
    return lambda folder: torch.save(good | changes, folder / "ckpt.pt") or "ckpt.pt"


def repacked(edits=None, without=(), extra=(), packed=None, nul=None, said=""):
    """A case: a zipped pickle written again, by Python's own zip, with some entries changed."""

    def make(folder):
        path = folder / BIN
        torch.save({MATRIX: TENSORS[MATRIX], **TENSORS}, path)
        with zipfile.ZipFile(path) as archive:
            held = {one.filename.split("/", 1)[1]: archive.read(one) for one in archive.infolist()}
        held = {name: (edits or {}).get(name, data) for name, data in held.items()}
        entries = [(f"pytorch_model/{n}", data) for n, data in held.items() if n not in without]
        entries += extra
        path.write_bytes(write_zip(entries, [*held].index(packed) if packed else None))
        if nul:
            assert_loads(folder)
            path.write_bytes(path.read_bytes().replace(nul, nul.replace(b"-", b"\0")))
        return BIN + said

    return make


NO_TENSORS = b"\x80\x02}."
LONG = {"data.pkl": b"\x80\x02" + b"N0" * (5 << 19) + b"}."}
REFUSED_AS = " is refused, or damaged: "
ODD = REFUSED_AS + "a record is compressed, encrypted, there twice, or has a NUL in its name"
ZIP_FAULTS = {
    "numbers compressed": repacked(packed="data/0", said=ODD),
    "a bomb": repacked({"data.pkl": b"\x80\x02}" + bytes(1 << 26) + b"."}, packed="data.pkl"),
    "two pickles": repacked(extra=[("pytorch_model/data.pkl", NO_TENSORS)], said=ODD),
    "no pickle": repacked(without=["data.pkl"]),
    "numbers of another tensor": repacked({"data/0": b""}),
    "a strange byte order": repacked({"byteorder": b"\xff\xfe"}),
    "names that climb out": repacked(extra=[("../../evil", b"x"), ("/tmp/evil", b"x")]),
    "names that differ in case": repacked(extra=[("pytorch_model/DATA.PKL", b"x")], said=ODD),
    "a program of 5 MB": repacked(
        LONG, said=f"{REFUSED_AS}data.pkl is larger than the 4,194,304 bytes"
    ),
    # To Python the second name is `.../data/0`, to other readers it has two more bytes.
    "a name with a NUL": repacked(
        extra=[("pytorch_model/extra/0-1", b"x")], nul=b"extra/0-1", said=ODD
    ),
}


def claiming(count, save):
    """The program says how many numbers the first storage has: 48 * 144, which is 0x1b00."""

    def make(folder):
        save({MATRIX: TENSORS[MATRIX], **TENSORS}, folder / BIN)
        after = b"N" if save is save_legacy else b"t"
        old, new = b"M\x00\x1b" + after, b"J" + struct.pack("<i", count) + after
        if save is save_legacy:
            data = (folder / BIN).read_bytes().replace(old, new, 1)
            (folder / BIN).write_bytes(data)
        else:
            with zipfile.ZipFile(folder / BIN) as archive:
                program = archive.read("pytorch_model/data.pkl")
            repacked({"data.pkl": program.replace(old, new, 1)})(folder)
        assert new in (folder / BIN).read_bytes()
        return BIN

    return make


ODD_FILES = {
    "empty": lambda path: path.write_bytes(b""),
    "a page": lambda path: path.write_text("<!DOCTYPE html><title>404</title>"),
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "endless zeros": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": lambda path: os.mkfifo(path),
    "3 GB of nothing": lambda path: (path.touch(), os.truncate(path, 3 << 30)),
}


def odd_file(name, make):
    def case(folder):
        if name == "config.json":
            save_file(TENSORS, folder / SAFE)
            (folder / name).unlink()
        make(folder / name)
        return name  # a broken link is reported as the missing file that it is

    return case


def forty_gigabytes_of_nothing(folder):
    """A sparse file takes no room on the disk. Its config agrees with it."""
    header, end = {}, 0
    for name in TENSORS:
        shape = [10_000_000, 1000] if name.endswith("wte.weight") else [1000, 1000]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end]}
        end += 4 * shape[0] * shape[1]
        header[name]["data_offsets"] += [end]
    write_safetensors(folder, header)
    os.truncate(folder / SAFE, (folder / SAFE).stat().st_size + end)
    edit_config(folder, n_head=1, n_embd=1000, vocab_size=10_000_000, n_positions=1024)
    # the first: where no more than 16 GB can be mapped
    return f"{SAFE}({BAD}.*memory|: the weights take 40.1 GB)"


def layers_of_one_matrix(save):
    """200 layers that share their bytes: 0.4 MB of file, and 85 MB of memory as weights."""

    def make(folder):
        edit_config(folder, n_layer=200, n_embd=96)
        small = in_the_file(GPT(GPTConfig(**SHAPE | {"n_layer": 1, "n_embd": 96})).init_weights())
        layer = {name: small.pop(name) for name in [*small] if ".h." in name}
        many = {n.replace(".0.", f".{i}.", 1): t for i in range(200) for n, t in layer.items()}
        save(small | many, folder / BIN)
        assert (folder / BIN).stat().st_size < 2 << 20
        return f"{BIN}{BAD}its tensors are larger than the file"

    return make


def config_of(said, **changes):
    """A config of absurd numbers beside good weights."""

    def make(folder):
        save_file(TENSORS, folder / SAFE)
        edit_config(folder, **changes)
        return said

    return make


WIDE = {"n_embd": 9_999_999, "n_inner": 10_000_000, "vocab_size": 10_000_000}
IMPOSSIBLE = {
    "40 GB": forty_gigabytes_of_nothing,
    **{f"shared bytes, {kind}": layers_of_one_matrix(save) for kind, save in SAVES.items()},
    "many layers": config_of(f"{SAFE}: 28 tensors are too few for n_layer 1000", n_layer=10**7),
    "wide": config_of(f"{SAFE}: the weights take 5200001.3 GB", **WIDE),
    "a long name": config_of("config.json: model_type is 'xxx", model_type="x" * 10**6),
    "10 ** 400": config_of("config.json: layer_norm_epsilon is 100", layer_norm_epsilon=10**400),
}


HOMES = ["../" + SHARD, "/etc/x.safetensors", "", ".", "C:\\x.safetensors", "x\0.safetensors", 7]
HOMES += [BIN, "nul\n.safetensors", [SHARD], "x" * 5000 + ".safetensors"]
NO_INDEX = [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"{}", b'{"weight_map": []}']
NO_INDEX += [b'{"weight_map": {}}']


def indexed(index):
    """Good shards under another index: its bytes, or where it says that MATRIX lies."""

    def make(folder):
        LAYOUTS["safetensors in shards"](TENSORS, folder)
        fields = json.loads((folder / INDEX).read_text())
        if isinstance(index, bytes):
            (folder / INDEX).write_bytes(index)
            return INDEX
        changed = fields | {"weight_map": fields["weight_map"] | {MATRIX: index}}
        (folder / INDEX).write_text(json.dumps(changed))
        return f"{INDEX}: tensor {MATRIX!r} lies in "

    return make


def write_safetensors(folder, header, numbers=b""):
    """A file with this header and these numbers."""
    text = json.dumps(header).encode()
    (folder / SAFE).write_bytes(struct.pack("<Q", len(text)) + text + numbers)


ENTRIES = {  # a name, what is changed in its entry, what is said: first the library's own checks
    "past the end": (GAIN, {"data_offsets": [0, 10**12]}, BAD),
    "2^124 numbers": (GAIN, {"shape": [2**62, 2**62]}, BAD),
    "4-bit": (GAIN, {"dtype": "F4", "shape": [384]}, f": tensor {GAIN!r} holds torch.float4"),
    "100,000 dimensions": (GAIN, {"shape": [1] * 100_000 + [48]}, f": tensor {GAIN!r} has shape"),
    "complex": (GAIN, {"dtype": "C64", "shape": [24]}, f": tensor {GAIN!r} holds torch.complex64"),
    "no name": ("", {}, ": tensor '' has no place"),
    "a megabyte": ("x" * 10**6, {}, ": tensor 'xxx"),
    "escape": ("\x1b[31m", {}, r": tensor '\\x1b\[31m' has no place"),
    "from right to left": ("\u202e", {}, r": tensor '\\u202e' has no place"),
}


def entry(name, changes, said):
    """model.safetensors by hand, with another entry in place of GAIN's."""
    data = save(TENSORS)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    changed = {k: v for k, v in header.items() if k != GAIN} | {name: header[GAIN] | changes}
    return lambda folder: write_safetensors(folder, changed, data[8 + length :]) or SAFE + said


def both(make, cases):
    """These cases in both kinds of pickle."""
    return {
        f"{case}, {kind}": make(*(value if isinstance(value, tuple) else (value,)), save)
        for kind, save in SAVES.items()
        for case, value in cases.items()
    }


NAMES = ["config.json", *ORDER]
REFUSED = {
    "LFS pointers": {
        name: holding(name, LFS, name + POINTER) for name in (SAFE, BIN, "config.json")
    },
    "pickles": both(pickled, HOSTILE_VALUES),
    "storages": both(claiming, {str(n): n for n in (2**31 - 1, -1)}),
    "zips": ZIP_FAULTS,
    "nanoGPT": {fault: nanogpt(changes) for fault, changes in NANOGPT_FAULTS.items()},
    "odd files": {
        f"{odd}, {n}": odd_file(n, make) for n in NAMES for odd, make in ODD_FILES.items()
    },
    "the impossible": IMPOSSIBLE,
    "indices": {str(i): indexed(index) for i, index in enumerate(HOMES + NO_INDEX)},
    "entries": {case: entry(*fault) for case, fault in ENTRIES.items()},
}
GOOD = {"zips": repacked(), "nanoGPT": nanogpt({}), "entries": entry(GAIN, {}, "")}


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, about sparse rows and storages
@pytest.mark.regression
@pytest.mark.parametrize("group", REFUSED)
def test_a_hostile_folder_is_refused_in_one_sentence_and_no_code_runs(group, tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "here"))
    if group in GOOD:  # what is made by hand is as good as the library's own
        GOOD[group](write(tmp_path / "good", config=FIELDS))
        assert_loads(tmp_path / "good")
    assert_refused(tmp_path / "cases", REFUSED[group])
    assert [*(tmp_path / "here").iterdir()] == []
    assert "evil" not in [path.name for parent in tmp_path.parents for path in parent.glob("e*")]


@pytest.mark.parametrize("names", OTHER_WEIGHTS)
def test_weights_of_another_kind_are_refused_by_what_they_are(names, folder):
    for name in names.split():
        (folder / name).write_bytes(b"GGUF")
    assert refusal(folder).startswith(f"{folder} holds {OTHER_WEIGHTS[names]}")
    if name.endswith(("gguf", "h5", "msgpack")):
        assert refusal(folder / name).startswith(f"{folder / name}: {OTHER_WEIGHTS[names]}")


@pytest.mark.parametrize("kind", SAVES)
def test_a_pickle_that_was_cut_off_anywhere_is_refused(kind, folder):
    path = folder / BIN
    SAVES[kind](TENSORS, path)
    whole = path.read_bytes()
    size = len(whole)
    for kept in [*range(12), 63, 64, 65, *range(0, size, size // 20), size - 22, size - 1]:
        path.write_bytes(whole[:kept])
        assert refusal(folder).startswith(str(path)), kept


def test_a_shard_or_a_tensor_that_is_not_there_or_twice_is_named(folder):
    LAYOUTS["safetensors in shards"](TENSORS, folder)
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
    save_legacy(TENSORS, folder / BIN)
    size = (folder / BIN).stat().st_size
    monkeypatch.setattr(weight_files, "free_memory_bytes", lambda device: size)
    assert_loads(folder)
    monkeypatch.setattr(weight_files, "free_memory_bytes", lambda device: size - 1)
    assert f"it has {size:,} bytes, and {size - 1:,} bytes of memory are free" in refusal(folder)


FLIPPED = {"a pipe": "is no regular file", "another model": "was changed while it was read"}


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="Linux can open an open file again")
@pytest.mark.parametrize("name", [SAFE, BIN])
@pytest.mark.parametrize("other", FLIPPED)
def test_a_link_that_leads_elsewhere_after_the_check_is_not_followed_again(
    other, name, tmp_path, monkeypatch
):
    """Each time a library opens a file, the link has changed sides since the check."""
    link, sides = tmp_path / "case" / name, ["good", other]

    def make(folder):
        save = save_file if name == SAFE else torch.save
        save(TENSORS, folder / "good")
        if other == "a pipe":
            os.mkfifo(folder / other)
        else:
            save({n: tensor + 1 for n, tensor in TENSORS.items()}, folder / other)
        link.symlink_to("good")
        return f"{name} {FLIPPED[other]}"  # where it is opened again

    def flip(function):
        def flipped(*args, **options):
            sides.reverse()
            link.unlink()
            link.symlink_to(sides[0])
            return function(*args, **options)

        return flipped

    monkeypatch.setattr(weight_files, "safe_open", flip(weight_files.safe_open))
    monkeypatch.setattr(torch, "load", flip(torch.load))
    assert_refused(tmp_path, {"case": make})


# ---- damaged at random ---------------------------------------------------------------------------
TEN_THOUSAND = pytest.param(300, 10_000, marks=pytest.mark.slow)


@pytest.mark.parametrize("first, count", [(0, 300), TEN_THOUSAND])
def test_a_damaged_checkpoint_loads_with_finite_weights_or_is_refused(first, count):
    counts = fuzz(first, count)
    assert {said for _, said in counts} == {"loaded", "refused"}
    assert counts.total() == count
    for layout in {file.split("/")[0] for file, _ in counts}:
        found = Counter(said for file, said in counts.elements() if file.startswith(f"{layout}/"))
        assert min(found["loaded"], found["refused"]) > 0, layout  # the damage has its teeth
        assert found["refused"] > 0.3 * found.total(), layout
