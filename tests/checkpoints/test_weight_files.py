"""Files of weights that strangers wrote: what is in them is read, or refused; nothing of it is run.

Every hostile file stands beside a good config.json, and the whole folder is loaded. Each refusal
is a ValueError of one sentence that names the file and, where there is one, the tensor. A load that
may hang, crash or fill the memory runs in a child process with a clock and a count of its memory.
At the end thousands of small checkpoints are damaged at random.
"""

import json
import os
import re
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
from fuzz_checkpoints import SECONDS, fuzz, in_a_child, verdict, write_shards, write_zip
from safetensors.torch import load_file, save, save_file

from checkpoints import weight_files
from checkpoints.load import CONV1D, load_model
from checkpoints.train_tiny import save_model
from checkpoints.weight_files import catalogue, read
from model import GPT, GPTConfig

SHAPE = {"vocab_size": 61, "max_seq_len": 32, "n_layer": 2, "n_head": 3, "n_embd": 48}
MATRIX = "transformer.h.1.attn.c_attn.weight"  # (48, 144)
GAIN = "transformer.ln_f.weight"  # (48,)
SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
ARGS = {"n_layer": 2, "n_head": 3, "n_embd": 48, "block_size": 32, "bias": True, "vocab_size": 61}


@pytest.fixture(scope="module")
def tensors():
    """A small model's tensors under Hugging Face's names, in its layout."""
    model = GPT(GPTConfig(**SHAPE)).init_weights(std=0.2).requires_grad_(False)
    named = {"transformer." + name: t for name, t in model.state_dict().items()}
    named.pop("transformer.lm_head.weight")
    return {n: (t.t() if n.endswith(CONV1D) else t).contiguous() for n, t in named.items()}


@pytest.fixture(params=[False, True], ids=["zip", "legacy"])
def save_pickle(request, folder):
    """A function that saves a value as the folder's weights, in either format; returns the path."""

    def save(value):
        path = folder / "pytorch_model.bin"
        torch.save(value, path, _use_new_zipfile_serialization=not request.param)
        return path

    save.is_legacy = request.param
    return save


@pytest.fixture
def folder(tmp_path):
    """A good config.json, and no weights yet."""
    save_model(GPT(GPTConfig(**SHAPE)), tmp_path, torch.float32)
    (tmp_path / "model.safetensors").unlink()
    return tmp_path


def refusal(folder):
    """The sentence of the ValueError that loading the folder raises."""
    with pytest.raises(ValueError) as raised:
        load_model(folder)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 1500, message[:3000]
    return message


def refusal_in_a_child(folder, most_mb=300):
    """The same, where loading may hang, crash or take all the memory: none of it happens."""
    outcome = in_a_child(lambda say: say(verdict(folder)), SECONDS)
    assert outcome.end == ""
    assert outcome.peak_mb < most_mb  # the first load in a process imports 150 MB of PyTorch
    (said,) = outcome.said
    assert said.startswith("refused: ") and "\n" not in said and len(said) < 1500, said[:3000]
    return said.removeprefix("refused: ")


# ---- what a folder holds -------------------------------------------------------------------------
ORDER = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "ckpt.pt",
]


@pytest.mark.parametrize("best", range(5), ids=ORDER)
def test_of_several_copies_the_most_trusted_is_read(best, tmp_path):
    """Each copy holds another tensor name, so that the names say which file was read."""
    for at, kind in list(enumerate(ORDER))[best:]:
        named = {f"copy_{at}": torch.full((2, 3), float(at))}
        if kind == "model.safetensors":
            save_file(named, tmp_path / kind)
        elif kind == "model.safetensors.index.json":
            write_shards(tmp_path, "model", ".safetensors", named, save_file)
        elif kind == "pytorch_model.bin.index.json":
            write_shards(tmp_path, "pytorch_model", ".bin", named, torch.save)
        else:
            torch.save({"model": named, "model_args": {}} if best == 4 else named, tmp_path / kind)
    stored, _ = catalogue(tmp_path)
    assert [(s.name, s.shape) for s in stored] == [(f"copy_{best}", (2, 3))]
    ((_, tensor),) = [(one, tensor.clone()) for one, tensor in read(stored)]
    assert tensor.tolist() == [[best] * 3] * 2


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", INDEX, "model.safetensors"])
def test_a_file_of_weights_is_served_from_its_folder(name, tensors, folder):
    write_shards(folder, "model", ".safetensors", tensors, save_file)
    if name == "model.safetensors":
        (folder / INDEX).unlink()
        save_file(tensors, folder / name)
    loaded = load_model(folder / name)
    assert loaded.config.n_layer == 2
    assert torch.equal(loaded.h[1].attn.c_attn.weight, tensors[MATRIX].t())


OTHER_WEIGHTS = {  # the names in a folder, and what is said of it
    "adapter_model.safetensors adapter_config.json": "holds a PEFT adapter: save the whole model",
    "model.safetensors adapter_config.json": "holds a PEFT adapter: save the whole model",
    "gpt2.Q4_K_M.gguf": "holds llama.cpp's weights: give a folder in Hugging Face's layout",
    "tf_model.h5": "holds TensorFlow's weights: save the model with PyTorch",
    "model.ckpt.index model.ckpt.meta": "holds TensorFlow's weights: save the model with PyTorch",
    "flax_model.msgpack": "holds Flax's weights: save the model with PyTorch",
    "README.md": "holds no weights: model.safetensors, ",
}


@pytest.mark.parametrize("names", OTHER_WEIGHTS)
def test_weights_of_another_kind_are_refused_by_what_they_are(names, folder):
    for name in names.split():
        (folder / name).write_bytes(b"GGUF")
    assert refusal(folder).startswith(f"{folder} {OTHER_WEIGHTS[names]}")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_git_lfs_pointer_is_known_by_its_first_bytes(name, tensors, folder):
    save = torch.save if name == "pytorch_model.bin" else save_file
    save(tensors, folder / ("model.safetensors" if name == "config.json" else name))
    assert load_model(folder).config.n_layer == 2
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"
    (folder / name).write_text(pointer)
    said = "is a Git LFS pointer, not the file itself: run `git lfs pull`"
    assert refusal(folder) == f"{folder / name} {said}"


# ---- code in a pickle ----------------------------------------------------------------------------
class Call:
    """Unpickled, it would be what `function(*arguments)` returns."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE_VALUES = {
    "os.system": lambda mark: Call(os.system, f"touch {mark}"),
    "open": lambda mark: Call(open, mark, "w"),
    "eval in a list": lambda mark: {"a": [Call(eval, f"open({mark!r}, 'w')")]},
    "torch.hub": lambda mark: Call(torch.hub.load, mark, "x"),
}


@pytest.mark.parametrize("value", HOSTILE_VALUES)
def test_a_pickle_with_code_is_refused_and_the_code_does_not_run(
    value, tensors, folder, save_pickle, tmp_path
):
    mark = tmp_path / "mark"
    path = save_pickle({**tensors, "z": HOSTILE_VALUES[value](str(mark))})
    assert refusal(folder).startswith(f"{path} ")
    assert not mark.exists()


def test_pytorch_is_always_asked_for_weights_only(tensors, folder, save_pickle, monkeypatch):
    """And to map the file where it can be mapped."""
    asked, real = set(), torch.load

    def load(*args, **options):
        asked.add((options["weights_only"], options["mmap"]))
        return real(*args, **options)

    save_pickle(tensors)
    monkeypatch.setattr(torch, "load", load)
    assert load_model(folder).config.n_layer == 2
    assert asked == {(True, not save_pickle.is_legacy)}


# ---- pickles that hold something else than plain tensors -----------------------------------------
def made_of(count, offset, shape, strides):
    """A tensor that claims more of its storage of `count` numbers than is there."""
    storage = torch.zeros(count)._typed_storage()
    rebuild = torch._utils._rebuild_tensor_v2
    return Call(rebuild, storage, offset, shape, strides, False, OrderedDict())


NO_PLAIN_TENSORS = {
    "one number, the right shape": lambda: torch.zeros(1).expand(48, 144),
    "more than its storage": lambda: made_of(1, 0, (48, 144), (144, 1)),
    "negative strides": lambda: made_of(48 * 144, 0, (48, 144), (-144, 1)),
    "an offset past the end": lambda: made_of(48 * 144, 48 * 144, (48, 144), (144, 1)),
    "no numbers in the file": lambda: Call(torch.FloatTensor, 48, 144),
    "sparse": lambda: torch.eye(48, 144).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(48, 144), 0.1, 0, torch.qint8),
    "meta": lambda: torch.zeros(48, 144, device="meta"),
    "integers": lambda: torch.zeros(48, 144, dtype=torch.int64),
    "a dictionary": lambda: {"weight": torch.zeros(48, 144)},
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, about sparse rows and storages
@pytest.mark.parametrize("kind", NO_PLAIN_TENSORS)
def test_what_is_no_plain_tensor_of_numbers_in_the_file_is_refused(
    kind, tensors, folder, save_pickle
):
    path = save_pickle({**tensors, MATRIX: NO_PLAIN_TENSORS[kind]()})
    message = refusal_in_a_child(folder)
    assert message.startswith(f"{path}")
    if ": tensor " in message or ": entry " in message:
        assert repr(MATRIX) in message


def test_a_storage_that_many_tensors_share_is_not_copied_for_each(folder, save_pickle):
    """200 layers that are all one matrix: 0.4 MB of file, and 85 MB of memory as weights."""
    shape = {"n_layer": 200, "n_head": 3, "n_embd": 96, "vocab_size": 61, "n_positions": 32}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | shape))
    small = GPT(GPTConfig(**SHAPE | {"n_layer": 1, "n_embd": 96})).init_weights().state_dict()
    named = {name: small[name] for name in small if not name.startswith(("h.", "lm_head"))}
    for name in small.keys() - named.keys() - {"lm_head.weight"}:
        tensor = small[name].t() if name.endswith(CONV1D) else small[name]
        named |= {f"h.{layer}.{name[4:]}": tensor for layer in range(200)}
    path = save_pickle(named)
    assert path.stat().st_size < 2 << 20
    assert refusal_in_a_child(folder).startswith(f"{path}: ")


@pytest.mark.parametrize("value", [[1, 2], None, torch.zeros(2), {}, {1: torch.zeros(2)}], ids=str)
def test_a_pickle_of_something_else_is_refused(value, folder, save_pickle):
    path = save_pickle(value)
    assert refusal(folder).startswith(str(path))


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


@pytest.mark.parametrize("fault", NANOGPT_FAULTS)
def test_a_nanogpt_checkpoint_of_another_form_is_refused(fault, tensors, tmp_path):
    linear = {name: t.t() if name.endswith(CONV1D) else t for name, t in tensors.items()}
    good = {"model": linear, "model_args": ARGS, "iter_num": 5}
    torch.save(good, tmp_path / "ckpt.pt")
    assert load_model(tmp_path).config.n_layer == 2
    torch.save(good | NANOGPT_FAULTS[fault], tmp_path / "ckpt.pt")
    assert refusal_in_a_child(tmp_path).startswith(str(tmp_path / "ckpt.pt"))


# ---- pickles that are damaged --------------------------------------------------------------------
def test_a_pickle_that_was_cut_off_anywhere_is_refused(tensors, folder, save_pickle):
    path = save_pickle(tensors)
    whole = path.read_bytes()
    size = len(whole)
    for kept in [*range(12), 63, 64, 65, *range(0, size, size // 40), size - 22, size - 1]:
        path.write_bytes(whole[:kept])
        assert refusal(folder).startswith(str(path)), kept


def repack(path, edits=None, without=(), extra=(), packed=None):
    """Write a zipped pickle again, by Python's own zip, with some of its entries changed."""
    with zipfile.ZipFile(path) as archive:
        held = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    top = held[0][0].split("/")[0]
    held = [(name, (edits or {}).get(name[len(top) + 1 :], data)) for name, data in held]
    held = [(name, data) for name, data in held if name[len(top) + 1 :] not in without]
    held += [(name.replace("TOP", top), data) for name, data in extra]
    names = [name[len(top) + 1 :] for name, _ in held]
    path.write_bytes(write_zip(held, names.index(packed) if packed else None))


ZIP_FAULTS = {
    "numbers compressed": {"packed": "data/0"},
    "a bomb": {"edits": {"data.pkl": b"\x80\x02}" + bytes(1 << 28) + b"."}, "packed": "data.pkl"},
    "two pickles": {"extra": [("TOP/data.pkl", b"\x80\x02}.")]},
    "no pickle": {"without": ["data.pkl"]},
    "numbers of more than is claimed": {"edits": {"data/0": bytes(48 * 144 * 4 + 4)}},
    "numbers of another tensor": {"edits": {"data/0": b""}},
    "a strange byte order": {"edits": {"byteorder": b"\xff\xfe"}},
    "names that climb out": {"extra": [("../../evil", b"x"), ("/tmp/evil", b"x")]},
    "two names that differ in case": {"extra": [("TOP/DATA.PKL", b"\x80\x02}.")]},
    "a program of 5 MB": {"edits": {"data.pkl": b"\x80\x02" + b"N0" * (5 << 19) + b"}."}},
}


@pytest.mark.regression
@pytest.mark.parametrize("fault", ZIP_FAULTS)
def test_a_zip_that_torch_would_not_write_is_refused(fault, tensors, folder):
    path = folder / "pytorch_model.bin"
    torch.save({MATRIX: tensors[MATRIX], **tensors}, path)
    repack(path)
    assert load_model(folder).config.n_layer == 2  # as such a zip is as good as torch's own
    repack(path, **ZIP_FAULTS[fault])
    assert refusal_in_a_child(folder).startswith(str(path))
    assert not (folder.parent / "evil").exists() and not (folder.parent.parent / "evil").exists()


def test_a_zip_with_a_nul_in_a_name_is_refused(tensors, folder):
    """To Python the second name is `.../data/0`, to other readers it has two more bytes."""
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path)
    repack(path, extra=[("TOP/extra/0-1", b"x")])
    assert load_model(folder).config.n_layer == 2
    path.write_bytes(path.read_bytes().replace(b"extra/0-1", b"extra/0\x001"))
    assert "a name with a NUL" in refusal(folder)


@pytest.mark.parametrize("count", [48 * 144 + 1, 2**31 - 1, -1])
def test_a_storage_of_another_size_than_is_claimed_is_refused(count, tensors, folder, save_pickle):
    """The program says how many numbers the first storage has: 48 * 144, which is 0x1b00."""
    path = save_pickle({MATRIX: tensors[MATRIX], **tensors})
    old, new = b"M\x00\x1b", b"J" + struct.pack("<i", count)
    if save_pickle.is_legacy:
        path.write_bytes(path.read_bytes().replace(old + b"N", new + b"N", 1))
    else:
        with zipfile.ZipFile(path) as archive:
            program = archive.read(f"{path.stem}/data.pkl")
        repack(path, {"data.pkl": program.replace(old + b"t", new + b"t", 1)})
    assert new in path.read_bytes()
    assert refusal_in_a_child(folder).startswith(str(path))


ODD_FILES = {
    "empty": lambda path: path.write_bytes(b""),
    "a page": lambda path: path.write_text("<!DOCTYPE html><title>404</title>"),
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "endless zeros": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": lambda path: os.mkfifo(path),
    "3 GB of nothing": lambda path: (path.touch(), os.truncate(path, 3 << 30)),
}


@pytest.mark.parametrize("odd", ODD_FILES)
@pytest.mark.parametrize("name", ["config.json", *ORDER])
def test_what_is_no_file_of_its_kind_is_refused_at_once(name, odd, tensors, folder):
    save_file(tensors, folder / "good.safetensors")
    if name == "config.json":
        (folder / "good.safetensors").rename(folder / "model.safetensors")
        (folder / name).unlink()
    ODD_FILES[odd](folder / name)
    message = refusal_in_a_child(folder)
    # A broken link is reported as the missing file that it is.
    assert message.startswith(str(folder / name)), message


def test_forty_gigabytes_of_nothing_are_refused_before_they_fill_the_memory(tensors, folder):
    """A sparse file takes no room on the disk. Its config agrees with it."""
    header, at = {}, 0
    for name in tensors:
        shape = [10_000_000, 1000] if name.endswith("wte.weight") else [1000, 1000]
        end = at + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    write_safetensors(folder, header)
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size + at)
    shape = {"n_layer": 2, "n_head": 1, "n_embd": 1000, "vocab_size": 10_000_000}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | shape))
    message = refusal_in_a_child(folder)  # where no more than 16 GB can be mapped
    assert re.match(f"{path}( is not a whole .*memory|: the weights take 40.1 GB)", message)


def test_an_old_pickle_larger_than_the_free_memory_is_refused(tensors, folder, monkeypatch):
    """It cannot be mapped: PyTorch reads it whole."""
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    size = path.stat().st_size
    monkeypatch.setattr(weight_files, "free_memory_bytes", lambda device: size)
    assert load_model(folder).config.n_layer == 2
    monkeypatch.setattr(weight_files, "free_memory_bytes", lambda device: size - 1)
    assert f"it has {size:,} bytes, and {size - 1:,} bytes of memory are free" in refusal(folder)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="Linux can open an open file again")
@pytest.mark.parametrize("other", ["a pipe", "another model"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_link_that_leads_elsewhere_after_the_check_is_not_followed_again(
    name, other, tensors, folder, monkeypatch
):
    """Each time a library opens a file, the link has changed sides since the check."""
    save = save_file if name == "model.safetensors" else torch.save
    save(tensors, folder / "good")
    if other == "a pipe":
        os.mkfifo(folder / other)
    else:
        save({n: tensor + 1 for n, tensor in tensors.items()}, folder / other)
    sides = ["good", other]

    def flip(function):
        def flipped(*args, **options):
            sides.reverse()
            (folder / name).unlink()
            (folder / name).symlink_to(sides[0])
            return function(*args, **options)

        return flipped

    (folder / name).symlink_to("good")
    monkeypatch.setattr(weight_files, "safe_open", flip(weight_files.safe_open))
    monkeypatch.setattr(torch, "load", flip(torch.load))
    end = (
        "is no regular file"
        if other == "a pipe"
        else "was changed while it was read: load it again"
    )
    assert refusal_in_a_child(folder) == f"{folder / name} {end}"  # where it is opened again


# ---- the index of a checkpoint in shards ---------------------------------------------------------
@pytest.fixture
def sharded(tensors, folder):
    write_shards(folder, "model", ".safetensors", tensors, save_file)
    assert load_model(folder).config.n_layer == 2
    return folder


def edit_index(folder, edit):
    path = folder / INDEX
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "home",
    ["../" + SHARD, "/etc/x.safetensors", "", ".", "C:\\x.safetensors", "x\0.safetensors",
     "pytorch_model.bin", "nul\n.safetensors", 7, [SHARD], "x" * 5000 + ".safetensors"],
    ids=repr,
)  # fmt: skip
def test_an_index_that_names_anything_but_a_file_beside_it_is_refused(home, sharded):
    edit_index(sharded, lambda fields: fields["weight_map"].update({MATRIX: home}))
    assert refusal(sharded).startswith(f"{sharded / INDEX}: tensor {MATRIX!r}")


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}'],
)  # fmt: skip
def test_an_index_that_is_none_is_refused(text, sharded):
    (sharded / INDEX).write_bytes(text)
    assert refusal(sharded).startswith(str(sharded / INDEX))


def test_a_shard_or_a_tensor_that_is_not_there_or_twice_is_named(tensors, sharded):
    held = load_file(sharded / SHARD)
    lost, other = sorted(held)[0], sorted(tensors.keys() - held.keys())[0]
    save_file({name: held[name] for name in held if name != lost}, sharded / SHARD)
    assert refusal(sharded).startswith(f"{sharded / SHARD}: tensor {lost!r} is not there")
    save_file({**held, other: tensors[other]}, sharded / SHARD)
    assert re.search(rf"00002.safetensors: tensor {other!r} is in {SHARD} too", refusal(sharded))
    (sharded / SHARD).unlink()
    assert refusal(sharded) == f"{sharded / SHARD} is missing"


def test_a_tensor_that_the_index_forgets_is_read_or_named(tensors, sharded):
    """The shard has it, so nothing is lost; old exporters left the tied head out of the index."""
    edit_index(sharded, lambda fields: fields["weight_map"].pop(MATRIX))
    assert torch.equal(load_model(sharded).h[1].attn.c_attn.weight, tensors[MATRIX].t())


# ---- safetensors by hand -------------------------------------------------------------------------
def write_safetensors(folder, header, numbers=b""):
    """A file with this header and these numbers."""
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + numbers)


ENTRIES = {  # the library's own checks, and the types that PyTorch or the model has not
    "past the end": {"data_offsets": [0, 10**12]},
    "2^124 numbers": {"shape": [2**62, 2**62]},
    "100,000 dimensions": {"shape": [1] * 100_000 + [48]},
    "4-bit floats": {"dtype": "F4", "shape": [384]},
    "complex numbers": {"dtype": "C64", "shape": [24]},
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_that_is_not_what_the_model_needs_is_refused(entry, tensors, folder):
    data = save(tensors)
    (length,) = struct.unpack("<Q", data[:8])
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    write_safetensors(folder, header, numbers)
    assert load_model(folder).config.n_layer == 2
    header[GAIN] |= ENTRIES[entry]
    write_safetensors(folder, header, numbers)
    message = refusal(folder)
    path = folder / "model.safetensors"
    assert message.startswith((f"{path} is not a whole", f"{path}: tensor {GAIN!r}")), message


@pytest.mark.parametrize("name", ["", "x" * 10**6, "\x1b[31m", "\u202e"])
def test_a_tensor_too_many_is_named_in_a_message_that_can_be_read(name, tensors, folder):
    save_file({**tensors, name: torch.zeros(2)}, folder / "model.safetensors")
    message = refusal(folder)
    assert message.startswith(f"{folder / 'model.safetensors'}: tensor ")
    assert message.isprintable()


# ---- config.json that asks for the impossible ----------------------------------------------------
ABSURD = [
    {"n_layer": 10_000_000},
    {"n_embd": 9_999_999, "n_inner": 10_000_000, "vocab_size": 10_000_000},
    {"model_type": "x" * 10**6},
    {"layer_norm_epsilon": 10**400},
]


@pytest.mark.parametrize("changes", ABSURD, ids=lambda changes: list(changes)[0])
def test_a_config_of_absurd_numbers_is_refused_at_once(changes, tensors, folder):
    save_file(tensors, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    message = refusal_in_a_child(folder)
    assert message.startswith((str(path), str(folder / "model.safetensors")))


# ---- damaged at random ---------------------------------------------------------------------------
def check_fuzz(first, count):
    counts, faults, peak_mb = fuzz(first, count)
    assert faults == []
    assert counts.total() == count
    assert peak_mb < 500
    for kind in {file for file, _ in counts}:  # both happen, or the damage has lost its teeth
        assert counts[kind, "refused"] > 0.2 * count / len(counts), kind
    loaded = sum(counts[file, "loaded"] for file, _ in counts)
    assert loaded > count / 20


def test_a_damaged_checkpoint_loads_with_finite_weights_or_is_refused_with_a_value_error():
    check_fuzz(0, 300)


@pytest.mark.slow
def test_ten_thousand_damaged_checkpoints_load_with_finite_weights_or_are_refused():
    check_fuzz(300, 10_000)
