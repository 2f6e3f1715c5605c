"""Rows with their provenance: what is written comes back, what was spoiled is refused by line."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import results
from experiments.results import COLUMNS, Measurement, append, read

ROW = Measurement(
    experiment="kernels",
    contender="tiles over blocks",
    metric="time a call",
    unit="ms",
    median=0.5,
    min=0.25,
    max=0.75,
    repeats=7,
    workload="batch=8 context=256 block_size=16",
    backend="triton",
    dtype="bfloat16",
    threads=2,
    device="a device, with a comma",
)


def write(path, *rows):
    return list(append(path, rows))


# ---- figures -------------------------------------------------------------------------------------
def test_a_ratio_is_of_the_medians_and_its_spread_that_of_the_rounds():
    # The third round was slow for both: its ratio is like the others'.
    assert results.ratio([4.0, 6.0, 30.0], [2.0, 2.0, 10.0]) == (3.0, 2.0, 3.0)
    with pytest.raises(ValueError):  # contenders that ran in other numbers of rounds
        results.ratio([1.0, 2.0], [1.0])


def test_the_ratio_of_the_medians_always_lies_within_its_spread():
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 40):
        ours, theirs = (torch.rand(2, n, generator=generator) + 0.1).tolist()
        middle, least, most = results.ratio(ours, theirs)
        assert least <= middle <= most


def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed():
    ordered, values = range(1, 101), list(range(100, 0, -1))
    found = [results.percentile(values, p) for p in (0, *ordered)]
    assert found == [1, *ordered] and results.percentile([7.0], 99) == 7.0


def test_a_row_is_made_of_its_repeats():
    what = {name: getattr(ROW, name) for name in COLUMNS[:4] + ("workload", "backend", "dtype")}
    row = Measurement.of(iter([3.0, 1.0, 2.0]), **what, threads=1, device="x")
    assert (row.median, row.min, row.max, row.repeats) == (2.0, 1.0, 3.0, 3)
    share = Measurement.ratio_of([1.0, 3.0], [4.0, 4.0], 100, **what, threads=1, device="x")
    assert (share.median, share.min, share.max, share.repeats) == (50.0, 25.0, 75.0, 2)


# ---- writing and reading -------------------------------------------------------------------------
def test_what_is_appended_comes_back_with_its_provenance(tmp_path):
    path = tmp_path / "deep" / "down" / "rows.csv"
    write(path, ROW)
    write(path, replace(ROW, seed=1), replace(ROW, seed=2))
    assert path.read_text().count("experiment,") == 1
    row, *later = read(path)
    assert [each["seed"] for each in later] == [1, 2]
    assert (row["median"], row["repeats"], row["threads"]) == (0.5, 7, 2)
    assert row["device"] == "a device, with a comma"
    assert row["torch"] == torch.__version__ and row["python"].startswith("3.")
    assert row["commit"] == results.commit() and row["date"][:2] == "20"
    assert list(row) == list(COLUMNS)


def test_a_run_killed_between_two_rows_leaves_a_whole_file(tmp_path):
    path = tmp_path / "rows.csv"
    code = f"""
import os
from experiments.results import Measurement, append
names = ["experiment", "contender", "metric", "unit", "workload", "backend", "dtype"]
row = dict.fromkeys(names, "a text")
def measure():
    for _ in range(3):
        yield Measurement.of([1.0], threads=1, device="x", **row)
    os._exit(9)  # no buffer is flushed, no file is closed
list(append({str(path)!r}, measure()))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert len(read(path)) == 3


def test_of_processes_that_start_one_file_at_once_exactly_one_writes_its_header(
    tmp_path, monkeypatch
):
    """The other process comes in between the look for the file and the first write."""
    path = tmp_path / "rows.csv"
    whole = Path.exists

    def looked_then_the_other_came(self):
        monkeypatch.setattr(Path, "exists", whole)
        answer = self.exists()
        write(path, replace(ROW, seed=1))
        return answer

    def measure():
        monkeypatch.setattr(Path, "exists", looked_then_the_other_came)
        yield replace(ROW, seed=2)

    list(append(path, measure()))
    assert [row["seed"] for row in read(path)] == [1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.csv"]


def test_the_header_is_there_from_the_moment_at_which_the_file_is(tmp_path, monkeypatch):
    """A file that was opened, and is not written to yet, is one without a header."""
    path = tmp_path / "rows.csv"
    sizes = []
    whole = Path.open

    def look(self, *args, **kwargs):
        file = whole(self, *args, **kwargs)
        sizes.append(path.stat().st_size if path.exists() else None)
        return file

    monkeypatch.setattr(Path, "open", look)
    write(path, ROW)
    assert sizes and 0 not in sizes


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda text: "\ufeff" + text, "the file has a byte-order mark: save it as plain CSV"),
        (lambda text: text.replace(",", ";"), "the file has semicolons between the columns"),
    ],
)
def test_a_file_that_excel_has_saved_is_refused_by_what_it_did(tmp_path, spoil, words):
    path = tmp_path / "rows.csv"
    write(path, ROW)
    path.write_text(spoil(path.read_text()), encoding="utf-8")
    for use in (read, lambda path: write(path, ROW)):
        with pytest.raises(ValueError, match=f"rows.csv, line 1: {words}"):
            use(path)


def test_a_file_of_other_columns_is_refused_with_both_headers_before_anything_is_measured(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("model,loss\ngpt2,3.1\n")

    def measure():
        pytest.fail("measured for nothing")
        yield ROW

    with pytest.raises(ValueError, match="model,loss.*experiment,contender,metric"):
        list(append(path, measure()))
    assert path.read_text() == "model,loss\ngpt2,3.1\n"


def test_nothing_is_appended_behind_half_a_line(tmp_path):
    path = tmp_path / "rows.csv"
    write(path, ROW, ROW)
    path.write_text(path.read_text()[:-10])
    with pytest.raises(ValueError, match="line 3: the last line is cut off"):
        write(path, ROW)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"median": math.nan}, "median is nan: it must be finite"),
        ({"max": math.inf}, "max is inf: it must be finite"),
        ({"median": 0.8}, "the median 0.8 is not between min 0.25 and max 0.75"),
        ({"repeats": 0}, "repeats is 0: it must be at least 1"),
        ({"contender": " "}, "contender is ' ': a text of one line is needed"),
        ({"workload": "two\nlines"}, "workload is 'two.nlines'"),
        ({"device": "a name\r"}, "device is 'a name.r': a text of one line is needed"),
        ({"device": "two\u2028lines"}, "device is 'two.u2028lines': a text of one line"),
    ],
)
def test_a_row_that_cannot_be_is_not_written(tmp_path, changes, reason):
    path = tmp_path / "rows.csv"
    with pytest.raises(ValueError, match=reason):
        write(path, ROW, replace(ROW, **changes))
    assert len(read(path)) == 1


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda s: s.replace(",7,", ",seven,"), "line 3: repeats is 'seven': it must be a whole"),
        (lambda s: s.replace("0.25", "fast"), "line 3: min is 'fast': it must be a number"),
        (lambda s: s.replace(",ms,", ",,"), "line 3: unit is '': a text"),
        (lambda s: s.replace(",ms,", ",ms,1.0,"), "line 3: 25 cells, 24 columns"),
        (lambda s: s.replace("T", " at "), "line 3: date is"),
        (lambda s: s.replace('a comma"', "a comma"), "line 3: unexpected end of data"),
        (lambda s: s.rstrip("\n"), "line 3: the last line is cut off"),
        (
            lambda s: s.replace("a device", "a\ndevice"),
            "line 4: device is 'a.ndevice, with a comma'",
        ),
        (lambda s: "\n" + s, "line 3: 0 cells, 24 columns"),
    ],
)
def test_a_spoiled_line_is_named_with_its_reason(tmp_path, spoil, reason):
    path = tmp_path / "rows.csv"
    write(path, ROW, ROW)
    *good, last = path.read_text().splitlines(keepends=True)
    path.write_text("".join(good) + spoil(last))
    with pytest.raises(ValueError, match=f"rows.csv, {reason}"):
        read(path)


def test_a_file_that_is_missing_empty_or_not_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        read(tmp_path / "none.csv")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match="line 1: the file is empty"):
        read(tmp_path / "empty.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "bytes.csv")


# ---- provenance ----------------------------------------------------------------------------------
def test_the_commit_comes_from_the_variable_else_from_git_else_it_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PAGEDGPT_COMMIT", "abc1234")
    assert results.commit() == "abc1234"
    monkeypatch.delenv("PAGEDGPT_COMMIT")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert results.commit() == "unknown"  # no repository
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]

    def git(*arguments):
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init", "-q")
    (tmp_path / "kernel.py").write_text("x = 1\n")
    git("add", "kernel.py")
    git("commit", "-qm", "x")
    head = git("rev-parse", "--short=12", "HEAD").stdout.strip()
    assert results.commit() == head
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "rows.csv").write_text("measured\n")
    assert results.commit() == head  # rows are no change of the code
    (tmp_path / "kernel.py").write_text("x = 2\n")
    assert results.commit() == f"{head}-dirty"
    (tmp_path / "sub").mkdir()
    monkeypatch.setattr(results, "ROOT", tmp_path / "sub")
    assert results.commit() == "unknown"  # somebody else's repository around us


# ---- for a terminal ------------------------------------------------------------------------------
def table_of(capsys, rows):
    results.print_tables(rows)
    return capsys.readouterr().out


def test_the_table_has_a_contender_a_line_and_a_figure_a_column_with_its_spread(capsys):
    share = replace(ROW, metric="share of the read", unit="%", median=53.1, min=53.1, max=53.1)
    other = replace(ROW, contender="contiguous", median=1234.5, min=1.0, max=2000.0)
    lines = table_of(capsys, [ROW, share, other]).splitlines()
    assert lines[0] == "kernels: batch=8 context=256 block_size=16, bfloat16, 2 threads"
    (ours,) = [line for line in lines if line.startswith("tiles over blocks")]
    assert ours.split()[-2:] == ["0.5", "53.1"]
    assert lines[lines.index(ours) + 1].split() == ["0.25..0.75"]
    (theirs,) = [line for line in lines if line.startswith("contiguous")]
    assert theirs.split() == ["contiguous", "1,234"]  # it has no share


def test_a_table_is_at_most_100_columns_wide_and_loses_no_figure(capsys):
    metrics = [f"quantity number {i}" for i in range(20)]
    rows = [
        replace(ROW, contender=name, metric=metric)
        for name in ("short", "a name that is longer than a column of this table can be")
        for metric in metrics
    ]
    lines = table_of(capsys, rows).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.count("0.25..0.75") for line in lines) == 40
    assert sum(line.startswith("short") for line in lines) > 1  # several tables


def test_without_rich_the_rows_are_kept_and_no_table_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results.importlib.util, "find_spec", lambda name: None)
    results.show([ROW], tmp_path / "rows.csv")
    assert "tables need rich" in capsys.readouterr().out and len(read(tmp_path / "rows.csv")) == 1
