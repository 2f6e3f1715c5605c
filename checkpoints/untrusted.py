"""Files from strangers are opened once, and what was opened is checked before it is read.

A text in a stranger's JSON can be a megabyte long, a file can be a pipe that never ends, and a link
can lead somewhere else a moment after it was checked. So a path is opened without waiting, the open
file is looked at, and libraries that want a name get the name of the open file.
"""

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MOST_TEXT_BYTES = 128 << 20  # the largest tokenizer.json has 30 MB
MOST_SHOWN = 120  # characters of a value in an error message
MOST_SAID = 400  # characters of a library's message in ours
GIT_LFS = b"version https://git-lfs"  # the first bytes of a pointer that stands for a large file


class Unreadable(ValueError):
    """A folder has a tokenizer that is not read here. Its model runs on token ids alone."""


def shown(value: object) -> str:
    """A value for an error message: short, and only its type where it may be nested."""
    if isinstance(value, dict | list | tuple | set):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def call(problem: object, function: Callable, *args, **options) -> Any:
    """Call a library; what it raises becomes a ValueError of one line, which begins so."""
    try:
        return function(*args, **options)
    except BaseException as error:  # a panic of Rust is no Exception, and neither is Ctrl-C
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        kind = Unreadable if isinstance(error, Unreadable) else ValueError
        name = "" if type(error) is kind else f"{type(error).__name__}: "
        said = "".join(filter(str.isprintable, " ".join(str(error).split())))[:MOST_SAID]
        raise kind(f"{problem}: {name}{said}") from None


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file, through links. Raises ValueError for all else and Git LFS pointers."""
    # Without O_NONBLOCK, opening a pipe waits for somebody who writes to it. O_BINARY is Windows'.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if not os.path.lexists(path):
        raise ValueError(f"{path} is missing")
    number = call(f"{path} cannot be opened", os.open, path, flags)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise ValueError(f"{path} is no regular file")
    with os.fdopen(number, "rb") as file:
        if file.read(len(GIT_LFS)) == GIT_LFS:
            raise ValueError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull`")
        file.seek(0)
        yield file


def name_of(file: BinaryIO, path: Path) -> str:
    """A name of an open file for a library that opens it by name; `path` where there is none."""
    name = f"/proc/self/fd/{file.fileno()}"  # Linux: the same file, wherever `path` leads by now
    return name if os.path.exists(name) else str(path)


def read_text(path: Path) -> str:
    """A file's text; Windows line ends become plain ones. Raises ValueError if it is not UTF-8."""
    with opened(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > MOST_TEXT_BYTES:
            raise ValueError(f"{path} has {size:,} bytes, at most {MOST_TEXT_BYTES:,} are read")
        data = call(f"{path} cannot be read", file.read, MOST_TEXT_BYTES)
    text = call(f"{path} is no UTF-8 text", data.decode, "utf-8-sig")  # -sig: a byte-order mark
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> dict:
    """A file that holds one JSON object. Raises ValueError, naming it, if it does not."""
    fields = call(f"{path} is not JSON", json.loads, read_text(path))
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds {shown(fields)}, not one object")
    return fields
