"""Measured rows with their provenance, appended to a CSV file and shown as tables.

"1.4 times as fast" means nothing a week later unless the commit, the kernel, the number of threads
and the number of repeats stand beside it. And one reading proves nothing: on a shared machine the
same loop may take twice as long a minute later. So each figure is one line of a CSV file with the
median, the minimum and the maximum of its repeats, and with 20 more columns of provenance:

    run(args) ─> Measurement ─> append ─> experiment,contender,metric,unit,median,min,max,..
    (yields)     + commit, date           kernels,tiles over blocks,time a call,ms,0.51,0.50,0.56,..
                 + versions               kernels,contiguous,time a call,ms,0.72,0.70,0.81,..

A row is written as soon as it is measured, so an interrupted run keeps all its rows. Times compare
only inside one run, so a comparison is a row of its own: the ratio of the medians, with the
smallest and the largest ratio of any round. Contenders run in turn (A B A B), so a busy moment of
the machine slows both.

How it is checked: every kind of spoiled file is refused with its line and the reason, and a process
killed between two rows leaves a whole file.

Hoefler and Belli 2015, "Scientific Benchmarking of Parallel Computing Systems", SC15.
"""

import csv
import importlib.metadata
import importlib.util
import io
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numba", "transformers", "numpy")
TABLE_WIDTH = 100  # columns of a terminal


@dataclass(frozen=True)
class Measurement:
    """One figure: what was measured, in which unit, over how many repeats. No text is empty."""

    experiment: str  # "kernels"
    contender: str  # what was measured: a kernel, an engine
    metric: str  # which quantity of it: "time a call"
    unit: str  # ms, GB/s, tokens/s, %, or x: how many times what the metric names
    median: float
    min: float
    max: float
    repeats: int  # how many values the three come from
    workload: str  # "batch=32 context=256 block_size=16"
    backend: str  # which kernels ran: numba, triton, torch
    dtype: str
    threads: int  # of the CPU
    device: str  # its model's name
    model: str = "none"
    weights: str = "none"  # or "trained weights" or "random weights"
    seed: int = 0

    @classmethod
    def of(cls, values: Iterable[float], **columns: Any) -> "Measurement":
        """The row of all repeats of one figure; `columns` are the other fields."""
        values = list(values)
        median, smallest, largest = summary(values)
        return cls(median=median, min=smallest, max=largest, repeats=len(values), **columns)

    @classmethod
    def ratio_of(
        cls, ours: list[float], theirs: list[float], scale: float = 1.0, **columns: Any
    ) -> "Measurement":
        """The row of a comparison, see `ratio`; `scale` is 100 for a share in percent."""
        median, smallest, largest = (scale * figure for figure in ratio(ours, theirs))
        return cls(median=median, min=smallest, max=largest, repeats=len(ours), **columns)


# Who measured a row, when, and with which versions: added to each row as it is written.
PROVENANCE = ("commit", "date", "python", *PACKAGES)
COLUMNS = (*(field.name for field in fields(Measurement)), *PROVENANCE)
NUMBERS: dict[str, type] = {name: float for name in ("median", "min", "max")}
NUMBERS |= {name: int for name in ("repeats", "threads", "seed")}


# ---- figures -------------------------------------------------------------------------------------
def summary(values: list[float]) -> tuple[float, float, float]:
    """Median, minimum and maximum of at least one value."""
    return statistics.median(values), min(values), max(values)


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Ratio of the medians of two contenders, with the smallest and largest ratio of any round.

    Value i of both comes from round i, where they ran one after the other. If every round's ratio
    is at least r, so is the ratio of the medians: the first number lies between the other two.
    """
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ours) / statistics.median(theirs), min(rounds), max(rounds)


def percentile(values: list[float], percent: float) -> float:
    """The nearest rank: the smallest value that at least `percent` of all values do not exceed.

    Of 1, 2, .., 100 the 90th percentile is 90.
    """
    # Multiply first: 7 / 100 * 100 is a little more than 7, and its ceiling is 8.
    rank = max(math.ceil(len(values) * percent / 100), 1)
    return sorted(values)[rank - 1]


# ---- provenance ----------------------------------------------------------------------------------
def commit() -> str:
    """The commit that is checked out, with "-dirty" if a file has changed since, or "unknown".

    The variable PAGEDGPT_COMMIT comes first: a copy of the files without git is given its commit
    there. Changes under results/ do not count, so two runs of the same code name the same commit.
    """
    from_environment = os.environ.get("PAGEDGPT_COMMIT")
    if from_environment:
        return from_environment

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        )
        return run.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown"  # the files lie inside another project's repository
        changed = git("status", "--porcelain", "--", ".", ":!results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def version(package: str) -> str:
    """A package's version without importing it (transformers takes seconds), or "none"."""
    if package == "torch":
        return torch.__version__  # with "+cpu" or "+cu130", which the metadata may lack
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@cache
def provenance() -> dict[str, str]:
    """The commit and the versions, the same for all rows of this process. A row adds its date."""
    versions = {package: version(package) for package in PACKAGES}
    return {"commit": commit(), "python": platform.python_version()} | versions


@cache
def device_name(device: str | torch.device = "cpu") -> str:
    """The model of the GPU, or of the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:  # Linux; platform.processor() is empty there
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine() or "unknown"


# ---- the file ------------------------------------------------------------------------------------
def append(path: str | Path, measurements: Iterable[Measurement]) -> Iterator[Measurement]:
    """Append each row to the file as soon as it is measured, and yield it.

    The file and its folder are created if they do not exist. Raises ValueError, before anything is
    measured, if the file has other columns or ends with half a line.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_end(path)
    for row in measurements:
        cells = asdict(row) | provenance() | {"date": datetime.now(UTC).isoformat("T", "seconds")}
        _check(cells)
        if not path.exists():
            _create(path)
        # The file is opened and closed for each row: minutes may pass until the next row, and
        # whatever happens until then, this one is on disk.
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if file.tell() == 0:  # an empty file that somebody made, or no hard links here
                writer.writeheader()
            writer.writerow(cells)
        yield row


def _create(path: Path) -> None:
    """Create the file with its header, unless another process does so in the same moment.

    A file that is opened first and filled then is empty for a moment, and the other process would
    write a second header. So the header is written to a file of this process, which then gets the
    name in one step; the step fails if the name is taken.
    """
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        whole.write_text(",".join(COLUMNS) + "\n", encoding="utf-8", newline="")
        with suppress(OSError):  # the name is taken, or this file system has no hard links
            os.link(whole, path)
    finally:
        whole.unlink(missing_ok=True)


def _check_end(path: Path) -> None:
    """Raise ValueError if the file has other columns, or if its last line is cut off."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text:
        return
    header = text.split("\n")[0]
    wanted = ",".join(COLUMNS)
    if header != wanted:
        if header.removeprefix("\ufeff").replace(";", ",") == wanted:  # as Excel writes it
            found = "semicolons between the columns" if ";" in header else "a byte-order mark"
            raise ValueError(f"{path}, line 1: the file has {found}: save it as plain CSV in UTF-8")
        columns = f"its columns are {header[:200]}; results have {wanted}"
        raise ValueError(f"{path}, line 1: another kind of file: {columns}")
    if not text.endswith("\n"):
        line = text.count("\n") + 1
        raise ValueError(f"{path}, line {line}: the last line is cut off: delete it first")


def _check(cells: dict) -> None:
    """Raise ValueError with the reason if a cell of a row, given as text or number, is wrong."""
    for name, value in cells.items():
        # splitlines: "\r" and other characters end a line too
        if str(value).strip() == "" or str(value).splitlines() != [str(value)]:
            raise ValueError(f"{name} is {str(value)!r}: a text of one line is needed")
    for name, kind in NUMBERS.items():
        try:
            number = kind(cells[name])
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise ValueError(f"{name} is {cells[name]!r}: it must be {expected}") from None
        if not math.isfinite(number):
            raise ValueError(f"{name} is {number}: it must be finite")
    for name, minimum in (("repeats", 1), ("threads", 0)):
        if int(cells[name]) < minimum:
            raise ValueError(f"{name} is {cells[name]}: it must be at least {minimum}")
    median, low, high = (float(cells[name]) for name in ("median", "min", "max"))
    if not low <= median <= high:
        raise ValueError(f"the median {median:g} is not between min {low:g} and max {high:g}")
    try:
        datetime.fromisoformat(cells["date"])
    except ValueError:
        raise ValueError(f"date is {cells['date']!r}: as in 2026-01-31T23:59:59+00:00") from None


def read(path: str | Path) -> list[dict]:
    """All rows of a file as dicts, with numbers as int and float.

    Raises ValueError with the file, the line and the reason for anything that `append` would not
    have written.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not text:
        raise ValueError(f"{path}, line 1: the file is empty, not even a header")
    _check_end(path)
    rows = []
    # Given as a file, not as a list of lines: a line break within quotes is a part of its cell.
    lines = csv.reader(io.StringIO(text), strict=True)
    try:
        next(lines)  # the header
        for cells in lines:
            if len(cells) != len(COLUMNS):
                raise ValueError(f"{len(cells)} cells, {len(COLUMNS)} columns")
            row = dict(zip(COLUMNS, cells, strict=True))
            _check(row)
            rows.append(row | {name: kind(row[name]) for name, kind in NUMBERS.items()})
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {lines.line_num}: {error}") from None
    return rows


# ---- for a terminal ------------------------------------------------------------------------------
def figure(row: Measurement) -> tuple[str, str]:
    """The median and the spread as texts: ("0.512", "0.501..0.563"). No spread is "".

    1,000 and more have no decimals: ("1,234", "1,208..1,301").
    """
    figures = row.median, row.min, row.max
    median, low, high = (f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}" for x in figures)
    return median, "" if low == high else f"{low}..{high}"


def print_tables(measurements: Iterable[Measurement]) -> None:
    """Print a table for each workload: a line for each contender, a column for each metric.

    A table is at most 100 columns wide. Metrics that do not fit go into a second table of the same
    contenders. The tables are drawn by `rich`; without it the rows are only in the file.
    """
    if importlib.util.find_spec("rich") is None:
        print("tables need rich: pip install rich")
        return
    groups: dict[tuple, list[Measurement]] = {}
    for row in measurements:
        setting = row.experiment, row.workload, row.dtype, row.threads, row.model
        groups.setdefault(setting, []).append(row)
    for (experiment, workload, dtype, threads, _), rows in groups.items():
        parts = [workload, dtype if dtype != "none" else "", f"{threads} thread"]
        title = ", ".join(part for part in parts if part) + "s" * (threads != 1)
        _print_table(f"{experiment}: {title}", rows)


def _print_table(title: str, rows: list[Measurement]) -> None:
    """Print the rows of one workload as one or more tables of at most TABLE_WIDTH columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    contenders = list(dict.fromkeys(row.contender for row in rows))
    cells: dict[str, dict[str, str]] = {}  # header -> contender -> text
    for row in rows:
        header = f"{row.metric}, {row.unit}"
        cells.setdefault(header, {})[row.contender] = "\n".join(figure(row)).rstrip()
    # A long name takes two lines, as a median and its spread do.
    longest_word = max(len(word) for name in contenders for word in name.split())
    first_width = min(max(map(len, contenders)), max(18, longest_word))
    # No style anywhere, so no escape codes: the text is the same in a terminal and in a file.
    console = Console(width=TABLE_WIDTH, color_system=None, highlight=False)
    console.print(Text(title))
    for headers in _pages(cells, TABLE_WIDTH - first_width):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
        table.add_column("", width=first_width, overflow="fold")
        for header in headers:
            width = _column_width(header, cells[header])
            table.add_column(Text(header), width=width, justify="right", overflow="fold")
        for name in contenders:
            table.add_row(Text(name), *(Text(cells[header].get(name, "")) for header in headers))
        console.print(table)
        console.print()


def _column_width(header: str, texts: dict[str, str]) -> int:
    """Wide enough for every cell and for each word of the header, which may take several lines."""
    lines = [line for text in texts.values() for line in text.split("\n")]
    return max(8, *map(len, lines), *map(len, header.split()))


def _pages(cells: dict[str, dict[str, str]], width: int) -> Iterator[list[str]]:
    """Share the columns out among tables: as many to each as fit into `width`, at least one."""
    headers: list[str] = []
    used = 0
    for header, texts in cells.items():
        needed = _column_width(header, texts) + 3  # with the space between two columns
        if headers and used + needed > width:
            yield headers
            headers, used = [], 0
        headers.append(header)
        used += needed
    yield headers


def show(
    measurements: Iterable[Measurement],
    path: str | Path,
    is_shown: Callable[[Measurement], bool] = lambda row: True,
) -> None:
    """Measure: print and append each row as it comes, then print the tables of `is_shown` rows.

    An interrupted run prints the tables of the rows that it has measured.
    """
    rows: list[Measurement] = []
    try:
        for row in append(path, measurements):
            rows.append(row)
            median, spread = figure(row)
            value = f"{median} {row.unit}" + (f" ({spread})" if spread else "")
            line = f"{row.workload}: {row.contender}, {row.metric}: {value}"
            print(line, file=sys.stderr, flush=True)
    finally:
        print_tables(filter(is_shown, rows))
        print("medians of the repeats, below them minimum..maximum; x: times as fast, or as many")
        print(f"{len(rows)} rows appended to {path}")
