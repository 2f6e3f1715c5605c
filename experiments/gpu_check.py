"""One command on a machine with a GPU: are the kernels right there, and how fast are they.

Without a GPU the Triton kernels are interpreted, one program after another, and compiled but never
run. What that cannot show, a race, a driver's limit, a speed, only the device shows. Whoever has
one for half an hour should not spend it on installing: this needs python3, torch, triton, numpy and
pytest, no network, no git, no virtual environment, and ends within 8 minutes. There are three runs:

                environment ─> tests ─> ceilings ─> kernels ─> table     are the kernels right?
    --sweep     environment ─> sweep ─> table                            which tiles are fastest?
    --engine    environment ─> engine tests ─> latency ─> table          how good is the engine?
                 versions,      fresh           steps, requests,
                 compiled?      inputs          a profile

The last one needs what the engine imports too: safetensors, tiktoken and tqdm; with transformers
the peers run as well.

Each stage is a process with a time limit of its own. One that fails, or runs over and is killed, is
named, the others still run, and the exit code says so. A test that was skipped is a failure here:
it is exactly what nobody would miss. Rows are written as they are measured, into OUT (default
results/<device>): whatever ends this early, what was measured is kept.

Run: python -m experiments.gpu_check
     OUT=/tmp/run PAGEDGPT_COMMIT=abc1234 python3 -m experiments.gpu_check --engine
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

from experiments.results import commit, provenance
from experiments.summary import summarise

ROOT = Path(__file__).resolve().parent.parent
CHECK, SWEEP, ENGINE = "check", "sweep", "engine"  # the runs
TESTS = ["tests/kernels/test_triton_prefill.py", "tests/kernels/test_triton_decode.py"]
# Of these only what nothing but a GPU can show: the rest runs without one.
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
KERNEL_FILES += ["experiments.rungs_triton"]
ENGINE_KERNEL_FILES = ["kernels.triton_fused"]  # imports the engine
MOST_FILES, MOST_SECONDS, MOST_LINES = 8, 480, 60


class Stage(NamedTuple):
    """A process to run, and how long it may take."""

    name: str
    command: list[str]  # behind the interpreter
    limit_s: int


def stages(out: Path, run: str) -> list[Stage]:
    """In the order of what matters most, should the machine be taken away; 8 minutes in all.

    Nearly all of the tests' time is Triton's, compiling some 380 kernels one after another.
    """
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out / 'tests.xml'}"]
    environment = ["-m", "experiments.gpu_check", "--environment", str(out / "environment.json")]

    def rows(name: str, file: str) -> list[str]:
        return ["-m", f"experiments.{name}", "--out", str(out / file)]

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


def write_environment(path: Path, kernel_files: list[str]) -> None:
    """Say where this runs, warm the chip, and refuse kernels that are not compiled."""
    from experiments.ceilings import warm_up

    kernels = kernels_of([importlib.import_module(name) for name in kernel_files])
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
    if any(name.endswith("tests") for name in spent_s):
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
            engine = ENGINE_KERNEL_FILES if args.run == ENGINE else []
            write_environment(args.environment, KERNEL_FILES + engine)
            return
        out = Path(os.environ.get("OUT") or ROOT / "results" / slug(torch.cuda.get_device_name(0)))
        raise SystemExit(run_all(stages(out.resolve(), args.run), out.resolve(), env))
    except (ValueError, ImportError) as error:
        raise SystemExit(f"experiments/gpu_check.py: {error}") from None


if __name__ == "__main__":
    main()
