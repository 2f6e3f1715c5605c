"""A plugin of pytest for `gpu_check`: which tests come first, and a line for each that has ended.

Time on a GPU is short, so a run of tests may be killed before its end, without pytest's summary. So
each test's outcome goes to a file as soon as it is known, one JSON object a line:

    {"stage": "engine tests"}
    {"collected": 31}
    {"test": "tests/speedups/test_gpu_engine.py::test_bits[bfloat16]", "outcome": "passed", ...}

Tests in 16 bits come first, because the engine runs in them, then those in 32 and 64. A parameter
of a test says its type; a test without one comes first.

After an error such as an illegal access the driver refuses all further calls of the process, and
every later test would fail. With xdist the worker ends and another one takes its place; without it
the run stops there.

Run: python -m pytest -p experiments.gpu_tests --outcomes FILE ...
"""

import json
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

# Messages of errors after which the driver refuses all calls. Too little memory is none of them.
POISON = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "device-side assert",
)
POISON += ("unspecified launch failure", "an illegal", "hardware stack error", "launch timed out")


# ---- what pytest calls ---------------------------------------------------------------------------
def pytest_addoption(parser):
    """The flag --outcomes."""
    parser.addoption(
        "--outcomes", type=Path, help="append a line here for each test that has ended"
    )


def pytest_configure(config):
    """Begin to watch, if a file is given."""
    if config.getoption("outcomes"):
        config.pluginmanager.register(Watcher(config.getoption("outcomes"), config))


def pytest_collection_modifyitems(items):
    """16 bits first, then 32, then 64; tests of one kind keep their order."""
    items.sort(key=num_bytes)


def num_bytes(item) -> int:
    """Bytes of the widest number type among a test's parameters; 0 if there is none."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    # torch.dtype by its name: this file needs no torch.
    return max((p.itemsize for p in parameters if type(p).__name__ == "dtype"), default=0)


class Watcher:
    """Writes outcomes down. With xdist there is one in each worker too, which writes none."""

    def __init__(self, path: Path, config):
        self.path = path
        # "gw0", or None. (Not from the environment: this run may itself be a worker's child.)
        self.worker = getattr(config, "workerinput", {}).get("workerid")
        self.session = None
        self.is_poisoned = False

    def _write(self, **facts) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    def pytest_sessionstart(self, session):
        """Keep the session, to stop it."""
        self.session = session

    def pytest_collection_finish(self, session):
        """Write how many tests there are; all workers find the same ones."""
        if self.worker in (None, "gw0"):
            self._write(collected=len(session.items))

    def pytest_runtest_logreport(self, report):
        """Write a test's outcome. Setup and teardown matter only if they did not pass."""
        self.is_poisoned |= report.failed and any(text in report.longreprtext for text in POISON)
        if self.worker is None and (report.when == "call" or report.outcome != "passed"):
            seconds = round(getattr(report, "duration", 0.0), 2)
            self._write(test=report.nodeid, outcome=report.outcome, seconds=seconds)

    def pytest_runtest_logfinish(self):
        """After a test that poisoned the process: run no other one in it."""
        if self.is_poisoned and self.worker is not None:
            os._exit(1)  # no clean-up: it would call the driver
        if self.is_poisoned and not self._has_workers():
            self.session.shouldstop = "the GPU refuses all further calls of this process"

    def _has_workers(self) -> bool:
        return bool(getattr(self.session.config.option, "numprocesses", None))


# ---- what gpu_check reads ------------------------------------------------------------------------
class Outcomes:
    """The tests of one stage."""

    def __init__(self):
        self.of: dict[str, str] = {}  # test -> outcome
        self.num_collected = 0

    def add(self, line: dict) -> None:
        """Take a line that the plugin wrote."""
        self.num_collected = line.get("collected", self.num_collected)
        if "test" in line:
            self.of[line["test"]] = line["outcome"]  # a teardown that fails comes after its test

    @property
    def counts(self) -> Counter:
        """How many tests passed, failed and were skipped."""
        return Counter(self.of.values())

    @property
    def num_unfinished(self) -> int:
        """Tests that were found and have not ended."""
        return max(0, self.num_collected - len(self.of))

    @property
    def failed(self) -> list[str]:
        """The names of the tests that failed, without the folder."""
        failed = (name for name, outcome in self.of.items() if outcome == "failed")
        return [name.rsplit("/", 1)[-1] for name in failed]

    def __str__(self) -> str:
        """Like "29 passed, 1 failed, 0 skipped, 1 not finished"."""
        parts = [f"{self.counts[name]} {name}" for name in ("passed", "failed", "skipped")]
        return ", ".join([*parts, f"{self.num_unfinished} not finished"])

    def wrong(self, must_run: bool = True) -> str | None:
        """What is wrong, in a few words. A test that is skipped here runs nowhere.

        In a rehearsal tests need not run: they are only found.
        """
        if not (self.of or self.num_collected):
            return "no test was found"
        numbers = {"failed": self.counts["failed"], "skipped": self.counts["skipped"]}
        numbers["not finished"] = self.num_unfinished
        texts = [f"{number} {name}" for name, number in numbers.items() if number]
        return ", ".join(texts) or None if must_run else None


def begin_stage(path: Path, name: str) -> None:
    """Write that the lines from here on are those of another stage."""
    with path.open("a", encoding="utf-8") as file:
        # A new line first: a process that was killed may have left half of one.
        file.write("\n" + json.dumps({"stage": name}) + "\n")


def read_outcomes(path: Path) -> dict[str, Outcomes]:
    """The outcomes of each stage so far. What a killed process left of a line is passed over."""
    stages: dict[str, Outcomes] = {}
    current = Outcomes()
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            line = json.loads(text)
            if "stage" in line:
                current = stages.setdefault(line["stage"], Outcomes())
            current.add(line)
    return stages
