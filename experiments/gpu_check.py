"""One command on a machine with a GPU: are the kernels right there, and how fast are they?

Without a GPU the Triton kernels are interpreted, one program after another, and compiled but never
run. Only the device shows a race, a driver's limit or a speed. Time on a GPU is short, so nothing
is installed: the check needs python3, torch, triton, numpy and pytest, no network, no git, no
virtual environment, and it ends within 8 minutes. There are three runs:

                environment ─> tests ─> ceilings ─> kernels ─> table     are the kernels right?
    --sweep     environment ─> sweep ─> table                            which tiles are fastest?
    --engine    environment ─> engine tests ─> latency ─> table          how good is the engine?
                 versions,      random          steps, requests,
                 compiled?      inputs          a profile

The last run also needs the engine's own imports: safetensors, tiktoken and tqdm. If transformers is
installed, it is timed as well.

Each stage is a process with its own time limit. If one fails, or exceeds its limit and is killed,
the table names it, the other stages still run, and the exit code is 1. A skipped test counts as a
failure: a test that does not run here runs nowhere. Rows are written as they are measured into OUT
(default results/<device>), so a run that ends early keeps what it has measured.

Run: python -m experiments.gpu_check
     OUT=/tmp/run PAGEDGPT_COMMIT=abc1234 python3 -m experiments.gpu_check --engine
     PAGEDGPT_SEED=<the seed that a failed run printed> python3 -m experiments.gpu_check
"""

import argparse
import importlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from experiments.results import commit, provenance, read

ROOT = Path(__file__).resolve().parent.parent
CHECK = "check"  # the runs
SWEEP = "sweep"
ENGINE = "engine"
TESTS = ["tests/kernels/test_triton_prefill.py", "tests/kernels/test_triton_decode.py"]
# Of these files only the tests marked `gpu` run: the others need no GPU.
ENGINE_TESTS = [
    "tests/speedups/test_cuda_graphs.py",
    "tests/kernels/test_triton_sampling.py",
    "tests/speedups/test_gpu_engine.py",
    "tests/kernels/test_triton_fused_decode.py",
    "tests/kernels/test_triton_small_linear.py",
    "tests/kernels/test_triton_fused.py",
    "tests/speedups/test_plan_ahead.py",
]
KERNEL_FILES = ["kernels.triton_prefill", "kernels.triton_decode", "kernels.triton_sampling"]
KERNEL_FILES += ["kernels.triton_fused_decode", "kernels.triton_small_linear"]
KERNEL_FILES += ["paged_attention_triton", "experiments.ceilings"]
ENGINE_KERNEL_FILES = ["kernels.triton_fused"]  # imports the engine
MOST_FILES = 8
MOST_SECONDS = 480
MOST_LINES = 60  # of the table
# These units are written after a figure; the title of a table names all others.
MARKS = ("%", "x", "GB/s", "TFLOP/s")


class Stage(NamedTuple):
    """A process to run, and how long it may take."""

    name: str
    command: list[str]  # the arguments of the interpreter
    limit_s: int


def stages(out: Path, run: str) -> list[Stage]:
    """The stages of a run, the most important first; together at most 8 minutes.

    The tests spend nearly all of their time in Triton, which compiles about 380 kernels.
    """
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out / 'tests.xml'}"]
    environment = ["-m", "experiments.gpu_check", "--environment", str(out / "environment.json")]

    def rows(name: str, file: str) -> list[str]:
        return ["benchmark.py", name, "--out", str(out / file)]

    if run == SWEEP:
        return [
            Stage("environment", environment, 40),
            Stage("sweep", rows("sweep", "sweep.csv"), 400),
        ]
    if run == ENGINE:
        latency = [*rows("latency", "engine.csv"), "--rounds", "3"]
        return [
            Stage("environment", [*environment, "--engine"], 40),
            Stage("engine tests", [*pytest, "-m", "gpu", *ENGINE_TESTS], 190),
            Stage("latency", [*latency, "--profile", str(out / "profile.txt")], 230),
        ]
    return [
        Stage("environment", environment, 40),
        Stage("tests", [*pytest, *TESTS], 230),
        Stage("ceilings", rows("ceilings", "ceilings.csv"), 50),
        Stage("kernels", rows("kernels", "kernels.csv"), 140),
    ]


def slug(name: str) -> str:
    """A device's name as a folder's: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "gpu"


def run_stage(stage: Stage, env: dict[str, str]) -> str | None:
    """Run a stage to its end or its limit. Returns None, or the failure in one sentence."""
    print(f"\n---- {stage.name}, at most {stage.limit_s} s", flush=True)
    # A session of its own, so that the kill reaches all processes that it started.
    process = subprocess.Popen(
        [sys.executable, *stage.command], cwd=ROOT, env=env, start_new_session=True
    )
    try:
        code = process.wait(timeout=stage.limit_s)
    except subprocess.TimeoutExpired:
        return f"{stage.name} ran over its {stage.limit_s} s and was killed"
    finally:
        if process.poll() is None:  # over its limit, or Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"{stage.name} failed with exit code {code}" if code else None


# ---- the environment -----------------------------------------------------------------------------
def kernels_of(modules: list) -> dict[str, str]:
    """The Triton kernels of some modules, "module.name" -> the class of their objects.

    Classes are compared by name, so this works without triton too.
    """
    kinds = ("JITFunction", "InterpretedFunction", "Autotuner", "Heuristics")
    return {
        f"{module.__name__}.{name}": type(value).__name__
        for module in modules
        for name, value in vars(module).items()
        if type(value).__name__ in kinds
    }


def refuse_interpreted(kernels: dict[str, str]) -> None:
    """Raise ValueError unless there are kernels and all of them are compiled ones."""
    if not kernels:
        raise ValueError("no Triton kernel was found: is triton installed?")
    interpreted = [name for name, kind in kernels.items() if kind == "InterpretedFunction"]
    if interpreted:
        raise ValueError(f"{interpreted[0]} is interpreted, not compiled: unset TRITON_INTERPRET")


def nvidia_smi() -> str:
    """Driver, clocks, power and temperature in a line, or why there is none."""
    if not shutil.which("nvidia-smi"):
        return "no nvidia-smi"
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"


def write_environment(path: Path, kernel_files: list[str]) -> None:
    """Write versions and device to a file, warm up the GPU, and refuse interpreted kernels."""
    from experiments.ceilings import warm_up

    kernels = kernels_of([importlib.import_module(name) for name in kernel_files])
    refuse_interpreted(kernels)
    warm_up(torch.device("cuda"), seconds=3)  # an idle GPU runs at a fifth of its clock
    properties = torch.cuda.get_device_properties(0)
    facts = provenance() | {"device": properties.name, "kernels": kernels}
    facts |= {
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
    }
    facts |= {"capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
    facts |= {"nvidia_smi_warm": nvidia_smi(), "seed": os.environ.get("PAGEDGPT_SEED")}
    facts |= {"date": datetime.now(UTC).isoformat("T", "seconds")}
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print("\n".join(f"{name}: {value}" for name, value in facts.items() if name != "kernels"))
    print(f"{len(kernels)} kernels, all compiled")


# ---- the tests -----------------------------------------------------------------------------------
def count_tests(path: Path) -> dict[str, int]:
    """How many tests ran, failed and were skipped, from pytest's XML; an error is a failure."""
    counts = {"ran": 0, "failed": 0, "skipped": 0}
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        total, failures, errors, skipped = (
            int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
        )
        counts["ran"] += total - skipped
        counts["failed"] += failures + errors
        counts["skipped"] += skipped
    return counts


def judge_tests(path: Path, since: float) -> tuple[str, str | None]:
    """A line about the tests, and their failure in one sentence, or None."""
    if not path.exists() or path.stat().st_mtime < since:  # the file of an earlier run
        return "no test ended", "the tests left no result"
    counts = count_tests(path)
    line = f"{counts['ran']} GPU tests ran, {counts['failed']} failed, {counts['skipped']} skipped"
    if counts["failed"]:
        return line, f"{counts['failed']} GPU tests failed"
    if counts["skipped"]:
        return line, f"{counts['skipped']} GPU tests were skipped"
    return line, None if counts["ran"] else "no GPU test ran"


# ---- the table of a run, under 60 lines ----------------------------------------------------------
def rows_since(path: Path, date: str) -> list[dict]:
    """The rows of this run. A file may also hold those of earlier runs."""
    return [row for row in read(path) if row["date"] >= date] if path.exists() else []


def shape_of(row: dict) -> str:
    """The header of a workload's column: "batch=64 context=512 block_size=16" -> "64x512"."""
    kinds = "decode |prefill |write prefill |profile "
    found = re.match(rf"(?:{kinds})?batch=(\d+) context=(\d+)", row["workload"])
    return f"{found[1]}x{found[2]}" if found else row["workload"]


def pivot(rows: list[dict], metrics: list[str]) -> list[str]:
    """A line for each contender, a column for each workload; cells hold the metrics' medians."""
    rows = [row for row in rows if row["metric"] in metrics]
    columns = list(dict.fromkeys(shape_of(row) for row in rows))
    width = max((len(name) for name in columns), default=0)
    cells: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        unit = row["unit"] if row["unit"] in MARKS else ""
        line = cells.setdefault(row["contender"], {})
        line.setdefault(shape_of(row), []).append(f"{row['median']:.4g}{unit}")
    texts = {name: {k: " ".join(v) for k, v in line.items()} for name, line in cells.items()}
    width = max([width, *(len(text) for line in texts.values() for text in line.values())])
    first = max((len(name) for name in texts), default=0) + 2
    lines = [" " * first + "  ".join(f"{name:>{width}}" for name in columns)]
    for name, line in texts.items():
        cells_of = "  ".join(f"{line.get(column, ''):>{width}}" for column in columns)
        lines.append(f"{name:{first}}{cells_of}")
    return [line.rstrip() for line in lines]


def section(title: str, rows: list[dict], *metrics: str) -> list[str]:
    """A title and a table of some metrics; nothing if no row has them."""
    found = [row for row in rows if row["metric"] in metrics]
    return [title, *pivot(found, list(metrics))] if found else []


# ---- kernels -------------------------------------------------------------------------------------
def ceilings_lines(rows: list[dict]) -> list[str]:
    """The ceilings. Products have a column for each number of rows."""
    lines, products = [], []
    for row in rows:
        if row["workload"] != "products":
            lines.append(f"{row['contender']:34}{row['median']:.4g} {row['unit']}")
        else:  # "QKV, 8 rows"
            name, num_rows = row["contender"].rsplit(", ", 1)
            products.append(row | {"contender": name, "workload": num_rows})
    return lines + section("products, ms a call", products, "time a call")


def kernels_lines(rows: list[dict]) -> list[str]:
    """Decode kernels, prompts, and the straight line through five sizes."""
    decode = [row for row in rows if row["workload"].startswith("batch=")]
    title = "decode attention, ms a call and share of the plain read"
    lines = section(title, decode, "time a call", "share of the read")
    title = "the same, speed against the contiguous library kernel"
    lines += section(title, decode, "speed against contiguous")
    metrics = ("time a call", "operations", "scatter bandwidth", "speed against contiguous")
    prompts = [row for row in rows if "prefill" in row["workload"]]
    lines += section("prompts, ms a call", prompts, *metrics)
    for row in rows:
        if row["workload"].startswith("t0"):
            lines.append(f"decode kernel, {row['metric']}: {row['median']:.4g} {row['unit']}")
    return lines


def transposed(rows: list[dict]) -> list[dict]:
    """The same figures with a line for each shape and a column for each contender.

    A contender is named by its last words: "recorded, fused" is "fused".
    """
    found = []
    for row in rows:
        last_words = re.split(", |transformers ", row["contender"])[-1]
        found.append(row | {"contender": shape_of(row), "workload": last_words})
    return found


def steps_lines(rows: list[dict]) -> list[str]:
    """Decode steps beside their floor; launches and transformers for the first shape alone."""
    if not rows:
        return []
    first = shape_of(rows[0])
    title = "a decode step: ms on the device, share of the byte floor, ms token to token"
    metrics = "time a step", "share of the byte floor", "token to token"
    lines = section(f"{title} (transformers: this alone)", transposed(rows), *metrics)
    lines += section("paged against slabs", rows, "speed against recorded, contiguous")
    short = [row for row in rows if shape_of(row).split("x")[1] == first.split("x")[1]]
    lines += section("launches of its forward, copies included", short, "launches a step")
    prefix = "speed against transformers "
    against = [row for row in rows if shape_of(row) == first and row["metric"].startswith(prefix)]
    names = [row["metric"] for row in against]
    named = [row | {"workload": row["metric"].removeprefix(prefix)} for row in against]
    return lines + section(f"{first}, speed against transformers", named, *names)


def engine_lines(rows: list[dict]) -> list[str]:
    """Steps, the cost of recording them, a step's profile, whole workloads."""
    lines = steps_lines([row for row in rows if row["workload"].startswith("decode ")])
    recorded = [row for row in rows if row["workload"].startswith("recording ")]
    lines += section("recording, s and MB", recorded, "recording", "memory taken")
    profiled = [row for row in rows if row["workload"].startswith("profile ")]
    title = "a step of the engine: kernels, copies to the device, waits, allocations, device idle"
    lines += section(title, profiled, *[row["metric"] for row in profiled])
    for row in rows:
        if row["unit"] == "tokens/s":
            name = f"{row['workload']}, {row['contender']}"
            lines.append(f"{name}: {row['median']:,.0f} {row['metric']} a second")
    return lines


def summarise(out: Path, date: str) -> list[str]:
    """The figures of this run from the files of rows in a folder."""
    lines_of: dict[str, Callable[[list[dict]], list[str]]] = {
        "ceilings": ceilings_lines,
        "kernels": kernels_lines,
        "engine": engine_lines,
    }
    lines: list[str] = []
    for name, function in lines_of.items():
        part = function(rows_since(out / f"{name}.csv", date))
        lines += ["", *part] if lines and part else part
    return lines


# ---- all of it -----------------------------------------------------------------------------------
def run_all(found: list[Stage], out: Path, env: dict[str, str]) -> int:
    """Run the stages, print the table, return the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    since, date = time.time(), datetime.now(UTC).isoformat("T", "seconds")
    failures: list[str | None] = []
    spent_s: dict[str, float] = {}
    for stage in found:
        started = time.monotonic()
        failures.append(run_stage(stage, env))
        spent_s[stage.name] = time.monotonic() - started
    tests_line, tests_failure = "no tests in this run", None
    if any(name.endswith("tests") for name in spent_s):
        tests_line, tests_failure = judge_tests(out / "tests.xml", since)
    reasons = [reason for reason in (*failures, tests_failure) if reason]
    head = f"commit {commit()}, seed {env['PAGEDGPT_SEED']}, " + ", ".join(
        f"{name} {seconds:.0f} s" for name, seconds in spent_s.items()
    )
    lines = [head, *summarise(out, date), "", tests_line]
    lines += [f"WRONG: {reason}" for reason in reasons] or ["all is well"]
    (out / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\n---- {out}\n" + "\n".join(lines))
    return 1 if reasons else 0


def main(argv: list[str] | None = None) -> None:
    """Check that there is a GPU, then run all stages; exit code 1 if anything fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs = parser.add_mutually_exclusive_group()
    options = {"action": "store_const", "dest": "run", "default": CHECK}
    runs.add_argument("--sweep", const=SWEEP, **options, help="try tiles of the decode kernel")
    runs.add_argument("--engine", const=ENGINE, **options, help="check and time the whole engine")
    parser.add_argument("--environment", type=Path, help=argparse.SUPPRESS)  # a stage of its own
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit(
            "experiments/gpu_check.py: PyTorch sees no GPU here, and this checks kernels on one"
        )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PAGEDGPT_SEED": os.environ.get("PAGEDGPT_SEED") or str(secrets.randbelow(2**31))}
    try:
        if args.environment:
            more = ENGINE_KERNEL_FILES if args.run == ENGINE else []
            write_environment(args.environment, KERNEL_FILES + more)
            return
        out = Path(os.environ.get("OUT") or ROOT / "results" / slug(torch.cuda.get_device_name(0)))
        raise SystemExit(run_all(stages(out.resolve(), args.run), out.resolve(), env))
    except (ValueError, ImportError) as error:
        raise SystemExit(f"experiments/gpu_check.py: {error}") from None


if __name__ == "__main__":
    main()
