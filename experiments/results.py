"""A figure that can be believed says where it comes from: rows with their provenance, appended.

"1.4 times as fast" means nothing a week later, when nobody knows which commit, which kernel, how
many threads and how many repeats it was. And one reading proves nothing: on a shared machine the
same loop may take twice as long a minute later. So each figure is one line of a CSV file with the
median, the smallest and the largest of its repeats, and 21 more columns that say of what and where:

    run(args) ─> Measurement ─> append ─> experiment,contender,metric,unit,median,min,max,..
    (yields)     what, of what            kernels,tiles over blocks,time a call,ms,0.51,0.50,0.56,..
                 + provenance()           kernels,contiguous,time a call,ms,0.72,0.70,0.81,..
                                               └ commit, date, versions

A row is written when it is measured: whoever interrupts a run keeps all rows before. Times compare
only inside one run, so a comparison is a row too: `ratio` of the medians, with the smallest and
the largest that any round gave. Half of a contender's luck is the machine's, and rounds in turn
(A B A B) share it. What a production engine does beyond this: the same rows, in a database, for
every commit, with an alarm when one grows.

Hoefler and Belli 2015, "Scientific Benchmarking of Parallel Computing Systems", SC15.
Run: python -m experiments.results
Try: in the demo, append a row whose median lies above its maximum, or cut the file's last line in
two with an editor's eye (`path.read_text()[:-9]`) and append again.
"""

import argparse
import csv
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numba", "transformers", "numpy")


@dataclass(frozen=True)
class Measurement:
    """One figure: of what, in which unit, and of how many repeats. Texts are never empty."""

    experiment: str  # the file in experiments/ that measured it
    contender: str  # what was measured: a kernel, an engine
    metric: str  # which quantity of it, "time a call"
    unit: str  # ms, GB/s, tokens/s, %, or x: times as much as what the metric names
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
    def of(cls, values: Iterable[float], **what) -> "Measurement":
        """The row of some repeats of one figure; `what` are the other fields."""
        values = list(values)
        median, least, most = summary(values)
        return cls(median=median, min=least, max=most, repeats=len(values), **what)

    @classmethod
    def ratio_of(cls, ours: list[float], theirs: list[float], scale=1.0, **what) -> "Measurement":
        """The row of a comparison, see `ratio`; `scale` is 100 for a share in percent."""
        median, least, most = (scale * figure for figure in ratio(ours, theirs))
        return cls(median=median, min=least, max=most, repeats=len(ours), **what)


# Who measured it, when, and with what: added to each row as it is written.
PROVENANCE = ("commit", "date", "python", *PACKAGES)
COLUMNS = (*(field.name for field in fields(Measurement)), *PROVENANCE)
NUMBERS = {field.name: field.type for field in fields(Measurement) if field.type in (int, float)}


# ---- figures -------------------------------------------------------------------------------------
def summary(values: list[float]) -> tuple[float, float, float]:
    """Median, smallest and largest of at least one value."""
    return statistics.median(values), min(values), max(values)


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Ratio of the medians of two contenders, with the smallest and largest of any round.

    Value i of both comes from round i, where they ran one after the other. If every round's ratio
    is at least r, so is that of the medians: the first number always lies between the others.
    """
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ours) / statistics.median(theirs), min(rounds), max(rounds)


# ---- provenance ----------------------------------------------------------------------------------
def commit() -> str:
    """The commit that runs, "-dirty" behind it where a file was changed since, or "unknown".

    A copy of the files without git says it in PAGEDGPT_COMMIT, which is believed before git.
    Measured rows themselves are no change: a second run of the same code is of the same commit.
    """
    if named := os.environ.get("PAGEDGPT_COMMIT"):
        return named

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True, "timeout": 30}
        return subprocess.run(command, **options).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown"  # the files lie in somebody else's repository
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
    """Commit and versions of this process. The date is each row's own."""
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
    """Write each row behind the file's last as it arrives, and hand it on.

    The file and its folder are made where they are not there. Raises ValueError, before anything
    is measured, for a file with other columns or with half a line at its end.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_end(path)
    for row in measurements:
        cells = asdict(row) | provenance() | {"date": datetime.now(UTC).isoformat("T", "seconds")}
        _check(cells)
        # Opened for each row and closed behind it: what is finished is in the file, whatever
        # happens next, and the experiment may take hours between two rows.
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(cells)
        yield row


def _check_end(path: Path) -> None:
    """Raise ValueError if rows of these columns cannot be appended to a file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text:
        return
    header = text.splitlines()[0].split(",")
    if header != list(COLUMNS):
        both = f"its columns are {','.join(header)}; results have {','.join(COLUMNS)}"
        raise ValueError(f"{path}, line 1: another kind of file: {both}")
    if not text.endswith("\n"):
        line = text.count("\n") + 1
        raise ValueError(f"{path}, line {line}: the last line is cut off: delete it first")


def _check(cells: dict) -> None:
    """Raise ValueError with the reason if the cells of one row, as texts or numbers, are wrong."""
    for name, value in cells.items():
        if str(value).strip() == "" or "\n" in str(value):
            raise ValueError(f"{name} is {str(value)!r}: a text of one line is needed")
    for name, kind in NUMBERS.items():
        try:
            number = kind(cells[name])
        except ValueError:
            words = "a whole number" if kind is int else "a number"
            raise ValueError(f"{name} is {cells[name]!r}: it must be {words}") from None
        if not math.isfinite(number):
            raise ValueError(f"{name} is {number}: it must be finite")
    for name, least in (("repeats", 1), ("threads", 0)):
        if int(cells[name]) < least:
            raise ValueError(f"{name} is {cells[name]}: it must be at least {least}")
    median, least, most = (float(cells[name]) for name in ("median", "min", "max"))
    if not least <= median <= most:
        raise ValueError(f"the median {median:g} is not between min {least:g} and max {most:g}")
    try:
        datetime.fromisoformat(cells["date"])
    except ValueError:
        raise ValueError(f"date is {cells['date']!r}: as in 2026-01-31T23:59:59+00:00") from None


def read(path: str | Path) -> list[dict]:
    """All rows of a file as dicts, numbers as numbers.

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
    lines = csv.reader(text.split("\n")[1:-1], strict=True)
    try:
        for cells in lines:
            if len(cells) != len(COLUMNS):
                raise ValueError(f"{len(cells)} cells, {len(COLUMNS)} columns")
            row = dict(zip(COLUMNS, cells, strict=True))
            _check(row)
            rows.append(row | {name: kind(row[name]) for name, kind in NUMBERS.items()})
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {lines.line_num + 1}: {error}") from None
    return rows


# ---- for a terminal ------------------------------------------------------------------------------
def cell(row: Measurement, spread: bool, named: bool = False) -> str:
    """A figure as text: "0.512 ms (0.501 to 0.563)", "1.41 x contiguous (1.38 to 1.45)".

    `named` says the metric too: "0.6 ms step latency p99".
    """
    figures = row.median, row.min, row.max
    middle, least, most = (f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}" for x in figures)
    # Of a share and a ratio a reader asks: of what? The metric's last words say it.
    of_what = {"x": "speed against ", "%": "share "}.get(row.unit)
    words = f" {row.metric.removeprefix(of_what or '')}" if of_what or named else ""
    return f"{middle} {row.unit}{words}" + (f" ({least} to {most})" if spread else "")


def table(measurements: Iterable[Measurement]) -> list[str]:
    """Lines for a terminal: a head for each workload, then a contender a line, its figures beside.

    The first figure and all ratios show their spread; what was computed from the first one, as
    GB/s are from milliseconds, would only repeat it.
    """
    groups: dict[tuple, dict[str, list[Measurement]]] = {}
    for row in measurements:
        key = row.experiment, row.workload, row.dtype, row.threads, row.model
        groups.setdefault(key, {}).setdefault(row.contender, []).append(row)
    lines = []
    for (experiment, workload, dtype, threads, _), contenders in groups.items():
        setting = ", ".join(word for word in (workload, dtype) if word != "none")
        lines.append(f"{experiment}: {setting}, {threads} thread{'s' * (threads != 1)}")
        for name, rows in contenders.items():
            first = rows[0].metric
            units = [row.unit for row in rows]  # of several milliseconds a reader asks: which?
            cells = [
                cell(row, row.unit == "x" or row.metric == first, units.count(row.unit) > 1)
                for row in rows
            ]
            lines.append(f"  {name:34} {'  '.join(cells)}")
    return lines


def show(measurements: Iterable[Measurement], path: str | Path | None = None) -> None:
    """Measure: each row is said and appended to the file, if any, as it comes; then the table.

    The table comes even if the run was interrupted, of what was measured until then.
    """
    rows: list[Measurement] = []
    try:
        for row in measurements if path is None else append(path, measurements):
            rows.append(row)
            progress = f"{row.workload}: {row.contender}, {row.metric}: {cell(row, spread=True)}"
            print(progress, file=sys.stderr, flush=True)
    finally:
        print("\n".join(table(rows)))
        print("median (min to max) of the repeats; x: times, in the same rounds")
        if path is not None:
            print(f"{len(rows)} rows appended to {path}")


def run_alone(doc: str, add_arguments: Callable, run: Callable, argv: list[str] | None) -> None:
    """What an experiment's own main() does; without --out it keeps nothing.

    A caller's mistake is one sentence and exit code 1, as in benchmark.py.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--out", help="append the rows to this CSV file")
    args = parser.parse_args(argv)
    try:
        show(run(args), args.out)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


# --------------------------------------------------------------------------------------------------
def demo():
    """Two contenders in turn, five rounds; their rows in a file, read back, then spoiled."""
    here = {"experiment": "demo", "workload": "n=10", "backend": "none", "dtype": "none"}
    here |= {"threads": 1, "device": device_name()}
    loop = [4.0, 4.1, 9.0, 4.2, 4.0]  # milliseconds; in round 3 the machine did something else
    builtin = [2.0, 2.1, 4.4, 2.0, 2.0]  # and in all of them so did it for the other one
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.csv"
        rows = [
            Measurement.of(loop, contender="loop", metric="time a call", unit="ms", **here),
            Measurement.of(builtin, contender="sum()", metric="time a call", unit="ms", **here),
            Measurement.ratio_of(
                loop, builtin, contender="sum()", metric="speed against loop", unit="x", **here
            ),
        ]
        for row in append(path, rows):
            print(f"written: {row.contender:6} {cell(row, spread=True)}")
        print(f"\nwhat every row carries besides, {len(COLUMNS)} columns in all:")
        found = read(path)
        for name in ("device", "commit", "torch", "numba"):
            print(f"  {name:10} {found[0][name]}")
        print("\nas a table:")
        print("\n".join(table(rows)))
        path.write_text(path.read_text().replace("2.0,4.4,5", "2.0,1.5,5"))
        try:
            read(path)
            refusal = ""
        except ValueError as error:
            refusal = str(error).replace(folder, "FOLDER")
    print(f"\na figure was changed by hand:\n  {refusal}")
    assert [row["median"] for row in found] == [4.1, 2.0, 2.05] and "line 3" in refusal
    print("ok: one slow round moves neither a median nor a ratio of rounds in turn by much")


if __name__ == "__main__":
    demo()
