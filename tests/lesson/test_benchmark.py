"""The command line finds each experiment, keeps its rows, and ends with tables."""

import argparse

import pytest
from rows import run

import benchmark
from experiments import bookkeeping
from experiments.results import read

TINY = "bookkeeping --repeats 1 --steps 2 --running 4 --waiting 0 --requests 2"


def test_without_a_name_it_is_the_comparison_of_speed():
    assert benchmark.parse_args([]).command == "speed"
    args = benchmark.parse_args(["--batches", "1", "4"])
    assert (args.command, args.batches, args.out) == ("speed", [1, 4], "benchmark_results.csv")
    assert benchmark.parse_args(["kernels", "--layers", "3"]).layers == 3


def test_an_unknown_experiment_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse_args(["rods"])
    assert stopped.value.code == 2 and "'speed', 'memory'" in capsys.readouterr().err


@pytest.mark.parametrize("name", benchmark.EXPERIMENTS)
def test_each_experiment_exists_and_explains_every_flag(name):
    experiment, parser = benchmark.EXPERIMENTS[name], argparse.ArgumentParser()
    module = experiment.load()
    getattr(module, experiment.add_arguments)(parser)
    assert [action.dest for action in parser._actions if not action.help] == []
    assert callable(getattr(module, experiment.run))


def test_verify_says_how_many_rows_are_whole_or_names_the_line_and_the_reason(tmp_path, capsys):
    run(tmp_path, TINY)
    path = tmp_path / "rows.csv"
    benchmark.main(["verify", str(path)])
    assert capsys.readouterr().out.endswith("rows.csv: 5 rows, whole\n")
    path.write_text(path.read_text().replace(",ms,", ",ms,0,"))
    with pytest.raises(SystemExit, match="rows.csv, line 2: 25 cells, 24 columns"):
        benchmark.main(["verify", str(path)])


def test_an_interrupted_experiment_keeps_its_rows_and_shows_them(tmp_path, monkeypatch, capsys):
    whole = bookkeeping.run

    def interrupted(args):
        rows = whole(args)
        yield next(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(bookkeeping, "run", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, TINY)
    assert stopped.value.code == 130
    assert len(read(tmp_path / "rows.csv")) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("bookkeeping: running=4") and "1 rows appended" in printed


def test_the_tables_fit_a_terminal_of_100_columns(tmp_path, capsys):
    run(tmp_path, TINY)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "bookkeeping: running=4 waiting=0, 1 thread" in lines
    assert any(line.startswith("schedule() +") for line in lines)
