"""neighbour.py: each way ran on its own threads, beside a process that ran only when it should."""

import os
import subprocess

import pytest
import torch
from rows import pick, run

from experiments import neighbour

SMALL = "neighbour --model assets/tiny-gpt2 --batches 2 --context 20 --steps 3 --rounds 1"
WAYS = {  # contender: threads of its first step, and whether the neighbour ran
    "one thread fewer, idle": (1, False),
    "all threads, idle": (2, False),
    "adapted, idle": (2, False),
    "one thread fewer, neighbour": (1, True),
    "all threads, neighbour": (2, True),
    "adapted, neighbour": (2, True),
}

needs_two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has no neighbour")


@needs_two_cores
def test_each_way_has_its_threads_and_its_neighbour(tmp_path, monkeypatch):
    processes, seen = [], []

    class Process(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            processes.append(self)

    def time_round(forward, batch, *args):
        def recorded(inputs):
            runs = sum(process.poll() is None for process in processes)
            seen.append((torch.get_num_threads(), runs))
            return forward(inputs)

        return measured(recorded, batch, *args)

    measured = neighbour.time_round
    monkeypatch.setattr(neighbour.subprocess, "Popen", Process)
    monkeypatch.setattr(neighbour, "time_round", time_round)
    before = torch.get_num_threads()
    rows = run(tmp_path, f"{SMALL} --threads 2")
    assert torch.get_num_threads() == before
    assert all(process.poll() is not None for process in processes)
    # 3 steps of each way, in the round that warms up and in the one that counts
    assert seen[::3] == 2 * list(WAYS.values())
    times = {row["contender"]: row["median"] for row in pick(rows, metric="time a step")}
    assert list(times) == list(WAYS)
    for contender, base in (
        ("all threads, neighbour", "one thread fewer, idle"),
        ("adapted, neighbour", "one thread fewer, idle"),
        ("adapted, idle", "all threads, idle"),
    ):
        (row,) = pick(rows, contender=contender, metric=f"speed against {base}")
        assert row["median"] == pytest.approx(times[base] / times[contender])


@pytest.mark.parametrize("threads", [1, 1000])
def test_numbers_of_threads_that_show_nothing_are_refused(tmp_path, threads):
    with pytest.raises(SystemExit, match=f"benchmark.py: {threads} thread"):
        run(tmp_path, f"{SMALL} --threads {threads}")
