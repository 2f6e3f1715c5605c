"""Run an experiment in this process, and find the rows that it wrote."""

import benchmark
from experiments.results import read


def run(tmp_path, words):
    """`python benchmark.py words`; returns the rows that were appended."""
    out = tmp_path / "rows.csv"
    benchmark.main([*words.split(), "--out", str(out)])
    return read(out)


def pick(rows, **values):
    """The rows whose columns have these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]
