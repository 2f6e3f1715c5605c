"""One command on a machine with a GPU: are the kernels right there, and how fast are they.

Without a GPU the Triton kernels are interpreted, one program after another, and compiled but never
run. What that cannot show, a race, a driver's limit, a speed, only the device shows. Whoever has
one for half an hour should not spend it on installing: this needs python3, torch, triton, numpy and
pytest, no network, no git, no virtual environment, and ends within 8 minutes:

    environment ─> tests ─> ceilings ─> kernels ─> table        or, with --sweep, to tune:
     versions,     fresh    copy, read,  the ladder,
     clocks,       random   launch,      t0 and           environment ─> sweep ─> table
     compiled?     inputs   products     bandwidth

Each stage is a process with a time limit of its own. One that fails, or runs over and is killed, is
named, the others still run, and the exit code says so. A test that was skipped is a failure here:
it is exactly what nobody would miss. Rows are written as they are measured, into OUT (default
results/<device>): whatever ends this early, what was measured is kept.

Run: python gpu_check.py
     OUT=/tmp/run PAGEDGPT_COMMIT=abc1234 python3 gpu_check.py --sweep
Try: PAGEDGPT_SEED=<the seed that a failed run printed>, for the same inputs again.
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
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from results import commit, provenance, read

ROOT = Path(__file__).resolve().parent
TESTS = ["tests/test_paged_prefill_triton.py", "tests/test_paged_attention_triton.py"]
KERNEL_FILES = ["paged_prefill_triton", "paged_attention_triton", "experiments.rungs_triton"]
MOST_FILES, MOST_SECONDS, MOST_LINES = 8, 480, 60


class Stage(NamedTuple):
    """A process to run, and how long it may take."""

    name: str
    command: list[str]  # behind the interpreter
    limit_s: int


def stages(out: Path, sweep: bool) -> list[Stage]:
    """In the order of what matters most, should the machine be taken away; 8 minutes in all.

    Nearly all of the tests' time is Triton's, compiling some 380 kernels one after another.
    """
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out / 'tests.xml'}"]
    environment = ["gpu_check.py", "--environment", str(out / "environment.json")]
    first = Stage("environment", environment, 40)
    if sweep:
        return [
            first,
            Stage("sweep", ["experiments/sweep.py", "--out", str(out / "sweep.csv")], 400),
        ]
    return [
        first,
        Stage("tests", [*pytest, *TESTS], 230),
        Stage("ceilings", ["experiments/ceilings.py", "--out", str(out / "ceilings.csv")], 50),
        Stage("kernels", ["experiments/kernels.py", "--out", str(out / "kernels.csv")], 140),
    ]


def slug(name: str) -> str:
    """A device's name as a folder's: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "gpu"


def run_stage(stage: Stage, env: dict[str, str]) -> str | None:
    """Run it to its end or its limit. Returns None, or what went wrong in one sentence."""
    print(f"\n---- {stage.name}, at most {stage.limit_s} s", flush=True)
    # A session of its own, so that a kill reaches whatever the process started.
    process = subprocess.Popen(
        [sys.executable, *stage.command], cwd=ROOT, env=env, start_new_session=True
    )
    try:
        code = process.wait(timeout=stage.limit_s)
    except subprocess.TimeoutExpired:
        return f"{stage.name} ran over its {stage.limit_s} s and was killed"
    finally:
        if process.poll() is None:  # over its limit, or Ctrl-C here
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"{stage.name} failed with exit code {code}" if code else None


# ---- the environment -----------------------------------------------------------------------------
def kernels_of(modules: list) -> dict[str, str]:
    """The Triton kernels of some modules, "module.name" -> the class of their objects.

    A class is told by its name, so that this also works where triton can't be imported.
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


def write_environment(path: Path) -> None:
    """Say where this runs, warm the chip, and refuse kernels that are not compiled."""
    from experiments.ceilings import warm_up

    kernels = kernels_of([importlib.import_module(name) for name in KERNEL_FILES])
    refuse_interpreted(kernels)
    warm_up(torch.device("cuda"), seconds=3)  # a cold one idles at a fifth of its clock
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
    """What to print about the tests, and what is wrong with them, if anything."""
    if not path.exists() or path.stat().st_mtime < since:  # or it is an earlier run's
        return "no test ended", "the tests left no result"
    counts = count_tests(path)
    line = f"{counts['ran']} GPU tests ran, {counts['failed']} failed, {counts['skipped']} skipped"
    if counts["failed"]:
        return line, f"{counts['failed']} GPU tests failed"
    if counts["skipped"]:
        return line, f"{counts['skipped']} GPU tests were skipped"
    return line, None if counts["ran"] else "no GPU test ran"


# ---- the table -----------------------------------------------------------------------------------
def rows_since(path: Path, date: str) -> list[dict]:
    """The rows of this run, of a file that may hold those of earlier ones."""
    return [row for row in read(path) if row["date"] >= date] if path.exists() else []


def pivot(rows: list[dict], metrics: list[str]) -> list[str]:
    """A contender a line, a workload a column; a cell holds the medians of the metrics."""
    rows = [row for row in rows if row["metric"] in metrics]
    columns = list(dict.fromkeys(shape_of(row) for row in rows))
    width = max((len(name) for name in columns), default=0)
    cells: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        unit = "" if row["unit"] in ("ms", "us") else row["unit"]
        line = cells.setdefault(row["contender"], {})
        line.setdefault(shape_of(row), []).append(f"{row['median']:.4g}{unit}")
    texts = {name: {k: " ".join(v) for k, v in line.items()} for name, line in cells.items()}
    width = max([width, *(len(text) for line in texts.values() for text in line.values())])
    lines = [f"{'':34}" + "  ".join(f"{name:>{width}}" for name in columns)]
    for name, line in texts.items():
        lines.append(f"{name:34}" + "  ".join(f"{line.get(c, ''):>{width}}" for c in columns))
    return [line.rstrip() for line in lines]


def shape_of(row: dict) -> str:
    """The head of a row's column: "batch=64 context=512 block_size=16" -> "64x512"."""
    found = re.match(r"(prefill |write prefill )?batch=(\d+) context=(\d+)", row["workload"])
    return f"{found[2]}x{found[3]}" if found else row["workload"]


def summarise(out: Path, date: str) -> list[str]:
    """The figures of this run in under 50 lines."""
    ceilings, kernels = (rows_since(out / f"{name}.csv", date) for name in ("ceilings", "kernels"))
    lines = []
    for row in ceilings:
        if row["workload"] != "products":
            lines.append(f"{row['contender']:34}{row['median']:.4g} {row['unit']}")
    products = [row for row in ceilings if row["workload"] == "products"]
    for row in products:  # a column for each number of rows
        row["contender"], row["workload"] = row["contender"].rsplit(", ", 1)
    if products:
        lines += ["", "products, ms a call", *pivot(products, ["time a call"])]
    decode = [row for row in kernels if row["workload"].startswith("batch=")]
    if decode:
        lines += ["", "decode attention, ms a call and share of the plain read"]
        lines += pivot(decode, ["time a call", "share of the read"])
        lines += ["", "the same, speed against the contiguous library kernel"]
        lines += pivot(decode, ["speed against contiguous"])
    rest = ("time a call", "operations", "scatter bandwidth", "speed against contiguous")
    prompts = [row for row in kernels if "prefill" in row["workload"]]
    if prompts:
        lines += ["", "prompts, ms a call", *pivot(prompts, list(rest))]
    for row in kernels:
        if row["workload"].startswith("t0"):
            lines.append(f"decode kernel, {row['metric']}: {row['median']:.4g} {row['unit']}")
    return lines


# ---- all of it -----------------------------------------------------------------------------------
def run_all(found: list[Stage], out: Path, env: dict[str, str]) -> int:
    """Run the stages, print the table, return the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    since, date = time.time(), datetime.now(UTC).isoformat("T", "seconds")
    wrong, spent_s = [], {}
    for stage in found:
        started = time.monotonic()
        wrong.append(run_stage(stage, env))
        spent_s[stage.name] = time.monotonic() - started
    line, failure = "no tests in this run", None
    if "tests" in spent_s:
        line, failure = judge_tests(out / "tests.xml", since)
    reasons = [reason for reason in (*wrong, failure) if reason]
    head = f"commit {commit()}, seed {env['PAGEDGPT_SEED']}, " + ", ".join(
        f"{name} {seconds:.0f} s" for name, seconds in spent_s.items()
    )
    lines = [head, *summarise(out, date), "", line]
    lines += [f"WRONG: {reason}" for reason in reasons] or ["all is well"]
    (out / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\n---- {out}\n" + "\n".join(lines))
    return 1 if reasons else 0


def main(argv: list[str] | None = None) -> None:
    """Check the GPU, then run everything; exit code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", action="store_true", help="only try tiles of the decode kernel")
    parser.add_argument("--environment", type=Path, help=argparse.SUPPRESS)  # a stage of its own
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("gpu_check.py: PyTorch sees no GPU here, and this checks kernels on one")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PAGEDGPT_SEED": os.environ.get("PAGEDGPT_SEED") or str(secrets.randbelow(2**31))}
    try:
        if args.environment:
            write_environment(args.environment)
            return
        out = Path(os.environ.get("OUT") or ROOT / "results" / slug(torch.cuda.get_device_name(0)))
        raise SystemExit(run_all(stages(out.resolve(), args.sweep), out.resolve(), env))
    except (ValueError, ImportError) as error:
        raise SystemExit(f"gpu_check.py: {error}") from None


if __name__ == "__main__":
    main()
