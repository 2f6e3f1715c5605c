"""Files from strangers are looked through before they are believed, and nothing in them is run.

A model from a hub is a handful of files by somebody unknown. A text in its JSON can be a megabyte
long, a file can be a pipe that never ends. The older weights (`.bin`, `.pt`) are worse: Python
pickles, programs for a small machine, whose instructions include "call this function". PyTorch's
weights-only reader calls only what it knows, and that still includes `bytearray(2**33)`: 500 bytes
of file that fill 8 GB. So the program is read first, and simulated without doing anything:

    GLOBAL 'torch._utils _rebuild_tensor_v2'   a name: is it one of the few that weights need?
    BINPERSID                                  a storage: which bytes of the file
    TUPLE, BINGET, TUPLE, BINGET, ...          how many values would this be, were none shared?
    REDUCE                                     a call: of one of four functions?

Only then does PyTorch load it, as views of the mapped file. What a production engine does beyond
this: it refuses pickles altogether, since safetensors exists.

The machine: Python's `pickletools`; the danger: docs.python.org/3/library/pickle.html.
Run: python -m checkpoints.untrusted
Try: write "__builtin__ bytearray" into CALLED too, and 2**30 for the demo's 2**40 (what is its peak
memory then?); or lower MOST_VALUES until an honest file of weights is refused.
"""

import json
import pickle
import pickletools
import tempfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

MOST_TEXT_BYTES = 128 << 20  # the largest tokenizer.json has 30 MB
MOST_VALUES = 10_000_000  # in one pickle; GPT-2 XL with its optimizer has some 50,000
MOST_SHOWN = 120  # characters of a value in an error message

# All that a file of weights calls; and all else that it names, storages: the bytes of a number.
CALLED = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
}
STORAGES = {
    **{"torch DoubleStorage": ("float64", 8), "torch LongStorage": ("int64", 8)},
    **{"torch FloatStorage": ("float32", 4), "torch IntStorage": ("int32", 4)},
    **{"torch HalfStorage": ("float16", 2), "torch BFloat16Storage": ("bfloat16", 2)},
    **{"torch ShortStorage": ("int16", 2), "torch CharStorage": ("int8", 1)},
    **{"torch ByteStorage": ("uint8", 1), "torch BoolStorage": ("bool", 1)},
}
# Other ways to reach a function or a class. torch.save uses none of them.
FORBIDDEN = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}


def shown(value: object) -> str:
    """A value for an error message: short, and only its type where it may be nested."""
    if isinstance(value, dict | list | tuple | set):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def require_file(path: Path, most_bytes: int | None = None) -> None:
    """Refuse what is no file: reading a pipe or a device out of an unpacked archive never ends.

    Links are followed, the cache of the hub consists of them.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing")
    if not path.is_file():
        raise ValueError(f"{path} is no regular file")
    if most_bytes is not None and (size := path.stat().st_size) > most_bytes:
        raise ValueError(f"{path} has {size:,} bytes, at most {most_bytes:,} are read")


def read_text(path: Path) -> str:
    """A file's text; Windows line ends become plain ones. Raises ValueError if it is not UTF-8."""
    require_file(path, MOST_TEXT_BYTES)
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from None


def read_json(path: Path) -> dict:
    """A file that holds one JSON object. Raises ValueError, naming it, if it does not."""
    text = read_text(path)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds {shown(fields)}, not one object")
    return fields


# ---- the program in a pickle ---------------------------------------------------------------------
class Value(NamedTuple):
    """What the simulation knows of a value on the stack."""

    count: int = 1  # of values in it, were none used twice
    content: object = None  # of a text, a number, a name; of a tuple those of its parts


def check_program(file: BinaryIO) -> dict[str, int]:
    """Go through one pickle, up to its STOP: the bytes that it claims for each storage.

    Raises ValueError for what weights don't need. A value may be used many times, and "a pair of
    the last value, twice", sixty times over, is a tuple that takes years to compare. So what is
    limited is the number of values that there would be if each use were a copy.
    """
    stack: list[Value | None] = []  # None is the MARK below a tuple's parts
    memo: dict[int, Value | None] = {}
    claims: dict[str, int] = {}
    num_filed = 0  # values put into dictionaries: a key is gone through each time it is filed
    for opcode, arg, _ in pickletools.genops(file):
        name, taken, below = opcode.name, [], len(opcode.stack_before)
        if pickletools.markobject in opcode.stack_before:  # all down to the mark, and what is below
            below = opcode.stack_before.index(pickletools.markobject)
            while (top := stack.pop()) is not None:
                taken.append(top)
        taken = [stack.pop() for _ in range(below)][::-1] + taken[::-1]
        value = Value(1 + sum(part.count for part in taken if part), arg)
        if name in FORBIDDEN or (name == "REDUCE" and taken[0].content not in CALLED):
            raise ValueError(f"the instruction {name} is used as in no file of weights")
        if name == "GLOBAL" and arg not in CALLED and arg not in STORAGES:
            named = shown(arg.replace(" ", "."))
            raise ValueError(f"it names {named}: weights need no such thing, and it may run code")
        if name.startswith("TUPLE"):
            value = value._replace(content=tuple(part.content for part in taken[:6]))
        elif name == "BINPERSID":
            _, kind, key, _, numbers = taken[0].content[
                :5
            ]  # "storage", its type, "0", "cpu", 2359296
            claims[key] = numbers * STORAGES[kind][1]
        elif name.startswith("SETITEM"):
            value = value._replace(content=taken[0].content)  # still the same dictionary
        elif name == "REDUCE":
            value = value._replace(content=(taken[0].content,))
        elif name == "BUILD" and taken[0].content != ("collections OrderedDict",):
            raise ValueError("the instruction BUILD is used as in no file of weights")
        elif "GET" in name:
            value = memo[arg]
        num_filed += value.count if name.startswith("SETITEM") else 0
        if max(value.count, num_filed) > MOST_VALUES:
            raise ValueError(f"it stands for more than {MOST_VALUES:,} values")
        stack += [None if one is pickletools.markobject else value for one in opcode.stack_after]
        if "PUT" in name or name == "MEMOIZE":
            memo[len(memo) if arg is None else arg] = stack[-1]
    return claims


def check_archive(path: Path) -> None:
    """Look through a zip of PyTorch's: plain records, one program, each storage of its length.

    PyTorch itself believes what the program says of a length, and reads on into the next record.
    """
    with zipfile.ZipFile(path) as archive:
        sizes = {record.filename: record.file_size for record in archive.infolist()}
        if any(r.compress_type or r.flag_bits & 1 for r in archive.infolist()):
            raise ValueError("its records are compressed or encrypted, PyTorch writes none such")
        if len(sizes) < len(archive.infolist()):
            raise ValueError("two of its records have the same name")
        (program,) = [name for name in sizes if name.split("/")[1:] == ["data.pkl"]]
        with archive.open(program) as file:
            claims = check_program(file)
    for key, claimed in claims.items():
        size = sizes.get(program.replace("data.pkl", f"data/{key}"))
        if size != claimed:
            raise ValueError(f"its record {shown(key)} has {size} bytes, and {claimed} are claimed")


def is_zip(path: Path) -> bool:
    """Whether a pickle is of the kind since PyTorch 1.6, whose tensors can be mapped."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


class OldReader(pickle.Unpickler):
    """Python's own reader, kept to CALLED, for a pickle that `check_program` has gone through.

    `storages`: the bytes of each, by key, as slices of the mapped file.
    """

    def __init__(self, file: BinaryIO, storages: dict[str, Any]):
        super().__init__(file, encoding="utf-8")
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """A function of CALLED; of a storage its name alone."""
        if (full := f"{module} {name}") in STORAGES:
            return full
        if full not in CALLED:
            raise ValueError(f"it names {shown(full)}")
        return super().find_class(module, name)

    def persistent_load(self, pid: tuple) -> Any:
        """The storage of a tensor, typed as PyTorch's rebuilding functions want it."""
        import torch

        _, kind, key, _, _, view = pid
        if view is not None:
            raise ValueError("a storage is a part of another one")
        dtype = getattr(torch, STORAGES[kind][0])
        return torch.storage.TypedStorage(
            wrap_storage=self._storages[key], dtype=dtype, _internal=True
        )


def load_old(path: Path) -> Any:
    """A file from before PyTorch 1.6: five pickles, then the storages, each behind its length.

    PyTorch itself reads such a file whole; here it is mapped like the new ones.
    """
    import torch

    with path.open("rb") as file:
        starts, claims = [], {}
        for _ in range(5):  # a magic number, a version, the machine, the weights, their storages
            starts.append(file.tell())
            claims |= check_program(file)
        place = file.tell()
        file.seek(starts[4])
        keys = OldReader(file, {}).load()
        mapped = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        storages = {}
        for key in keys:
            file.seek(place)
            numbers, start = int.from_bytes(file.read(8), "little"), place + 8
            place = start + claims[key]
            if not numbers or claims[key] % numbers or place > mapped.nbytes():
                raise ValueError(f"its storage {shown(key)} is not of the length that is claimed")
            storages[key] = mapped[start:place]
        file.seek(starts[3])
        return OldReader(file, storages).load()


def unpickle(path: Path) -> dict[Any, Any]:
    """The dictionary in a `.bin` or `.pt` file: tensors and plain values, no code is run.

    The tensors are views of the mapped file. Raises ValueError, naming the file, for anything else.
    """
    import torch  # whoever only reads JSON does without

    require_file(path)
    try:
        if is_zip(path):
            check_archive(path)
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            held = load_old(path)
    except Exception as error:  # a damaged file makes the readers stumble over anything
        reason = str(error).split("WeightsUnpickler error:")[-1].strip()
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        reason = f"{kind}{reason}".split("\n")[0][:MOST_SHOWN]
        raise ValueError(f"{path} is refused, or damaged: {reason}") from None
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds a {type(held).__name__}, not a dictionary of tensors")
    return held


# --------------------------------------------------------------------------------------------------
class Call:
    """What a hostile pickle holds: not a value, but "call this function with these arguments"."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def demo():
    """An honest file of weights, its program, and four files that mean harm."""
    import torch

    nested: tuple = ()
    for _ in range(60):
        nested = (nested, nested)
    hostile = {
        "a call of print": Call(print, "THIS CODE CAME OUT OF A FILE OF WEIGHTS"),
        "a terabyte in one call": Call(bytearray, 2**40),
        "2**60 empty tuples": nested,
        "a call of a storage": Call(torch.FloatStorage, 2**40),
    }
    refusals = {}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "pytorch_model.bin"
        torch.save({"ln_f.bias": torch.arange(3.0)}, path)
        with zipfile.ZipFile(path) as archive:
            program = next(r for r in archive.namelist() if r.endswith("data.pkl"))
            for opcode, arg, _ in pickletools.genops(archive.read(program)):
                if opcode.name in ("GLOBAL", "BINPERSID", "REDUCE"):
                    print(f"  {opcode.name:10} {arg or ''}")
        print(f"loads as {unpickle(path)}\n")
        for what, value in hostile.items():
            torch.save({"ln_f.bias": value}, path)
            try:
                unpickle(path)
            except ValueError as error:
                refusals[what] = str(error).removeprefix(f"{path} ")
                print(f"{what:24} {path.stat().st_size} bytes: {refusals[what]}")
    assert list(refusals) == list(hostile)
    print("ok: the weights were loaded, the other four refused, and nothing was run")


if __name__ == "__main__":
    demo()
