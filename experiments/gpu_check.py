"""One command on a machine with a GPU: are the kernels right there, and how fast is all of it?

Without a GPU the Triton kernels are interpreted, one program after another, and compiled but never
run. Only the device shows a race, a driver's limit or a speed. Time on a GPU is short, so one run
of at most 570 seconds does everything, the most important first, and nothing is installed for it:

    stage          limit   decides
    environment     30 s   versions, clocks; refuses interpreted kernels; warms the GPU
    engine tests    60 s   does the engine write the right tokens there
    latency         95 s   the defaults: joined steps, small linears, planning ahead, token budget
    tests          150 s   is every kernel right there
    tests alone     40 s   counts of memory, launches and waits, beside no other test
    ceilings        35 s   what the machine can do at most
    kernels         30 s   which way to attend is fastest
    transformers   130 s   how much faster the engine is

On one H200 the tests took 36, 111 and 32 s, latency 68 and kernels 12 s.

It needs python3, torch, triton, numpy, psutil and pytest, and for the engine safetensors and tqdm;
no network, no git, no virtual environment. Tests run in parallel if pytest-xdist is there, and
transformers is timed if it is there. Without git the variable PAGEDGPT_COMMIT names the commit.

Each stage is a process. Over its limit it is interrupted (SIGINT), and killed 10 seconds later. If
one fails or is stopped, the table names it, the other stages still run, and the exit code is 1. A
skipped test counts as a failure: a test that does not run here runs nowhere. Rows and outcomes of
tests are written as they come into OUT (default results/<device>), at most 8 files, so a run that
ends early keeps what it has found. What the stages print is in OUT/log.txt. The last lines printed
are a table and the defaults that its figures recommend (gpu_summary.py).

How it is checked: `--rehearse` runs every stage on a CPU, with few numbers and without the tests.

Run: python -m experiments.gpu_check
     OUT=/tmp/run PAGEDGPT_COMMIT=abc1234 python3 -m experiments.gpu_check
     python3 -m experiments.gpu_check --only kernels "tests alone"    to repeat what failed
     PAGEDGPT_SEED=<the seed that a failed run printed> python3 -m experiments.gpu_check
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, NamedTuple

import torch

from experiments import gpu_summary
from experiments.gpu_tests import Outcomes, begin_stage, read_outcomes
from experiments.results import commit, provenance
from watch.files import replacing

ROOT = Path(__file__).resolve().parent.parent
ENGINE_TESTS = ["tests/speedups/test_gpu_engine.py"]
# The other files with tests that only a GPU can answer. Of those marked `device` every test runs.
TESTS = [
    "tests/speedups/test_cuda_graphs.py",
    "tests/speedups/test_plan_ahead.py",
    "tests/kernels/test_triton_fused_decode.py",
    "tests/kernels/test_triton_small_linear.py",
    "tests/kernels/test_triton_fused.py",
    "tests/kernels/test_triton_sampling.py",
    "tests/kernels/test_triton_decode.py",
    "tests/kernels/test_triton_prefill.py",
    "tests/kernels/test_triton_int8.py",
    "tests/lesson/test_paged_attention_triton.py",
    "tests/watch/test_roofline.py",
    "tests/watch/test_explain.py",
]
KERNEL_FILES = ["kernels.triton_prefill", "kernels.triton_decode", "kernels.triton_sampling"]
KERNEL_FILES += ["kernels.triton_fused_decode", "kernels.triton_small_linear"]
KERNEL_FILES += ["kernels.triton_fused", "paged_attention_triton", "experiments.ceilings"]
MOST_FILES = 8
MOST_NAMES = 4  # of failed tests in the table, for each stage
MOST_SECONDS = 570
OUTCOMES = "tests.jsonl"
TABLE_S = 5  # of them, for the table after the last stage
UNKNOWN_AGE_S = 20.0  # of a process whose beginning is not known
GRACE_S = 10  # between SIGINT and SIGKILL
LEAST_S = 5  # a stage with less time left is not begun
COLLECT = "--collect-only"
HANGING_S = 30  # a test that takes longer has its stack printed into the log
NO_DEVICE = "PyTorch sees no GPU here, and this checks kernels on one (--rehearse needs none)"


# ---- the stages ----------------------------------------------------------------------------------
class Stage(NamedTuple):
    """A process to run, and how long it may take."""

    name: str
    command: list[str]  # the arguments of the interpreter
    limit_s: float
    has_tests: bool = False


# What each stage is given beside its file, on a GPU and in a rehearsal.
SHAPES = "1x128 256x512 1x512 256x128 2x128 4x128 8x128 16x128"
FLAGS = {
    "latency": "latency --contenders recorded fused small contiguous ahead fused-ahead small-ahead "
    f"--shapes {SHAPES} --steps 24 --rounds 3 --requests 256 --prefill 16x512",
    "ceilings": "ceilings",
    "kernels": "kernels --only tiles chunks contiguous --shapes 1x1024 16x1024 64x512 256x512 "
    "--prefill",
    "transformers": "latency --contenders ahead fused-ahead transformers generate compiled "
    "continuous --shapes 1x128 --steps 24 --rounds 1 --requests 256 --prefill",
    "sweep": "sweep",
}
FEW = "--device cpu --threads 1"
SMALL_ENGINE = f"{FEW} --model assets/tiny-gpt2 --shapes 1x40 2x40 --steps 2 --rounds 1"
SMALL_ENGINE += " --requests 3 --lengths 2 5"
SMALL = {
    "latency": f"{SMALL_ENGINE} --prefill 2x7",
    "ceilings": f"{FEW} --read-mb 8 --rows 1 2 --layers 2 --repeats 2",
    "kernels": f"{FEW} --only blocks --shapes 2x40 --fit 2x40 4x40 --pool-mb 1 --read-mb 8 "
    "--repeats 2",
    "transformers": SMALL_ENGINE,
    "sweep": "",
}


def stages(out: Path, on_gpu: bool = True) -> list[Stage]:
    """All stages, the most important first; those of a rehearsal if `on_gpu` is false.

    The tests spend most of their time in Triton, which compiles some hundred kernels.
    """

    def rows(name: str, file: str, limit_s: float, *more: str) -> Stage:
        words = FLAGS[name] if on_gpu else f"{FLAGS[name]} {SMALL[name]}"
        command = ["benchmark.py", *words.split(), *more, "--out", str(out / file)]
        return Stage(name, command, limit_s)

    def tests(name: str, files: list[str], marks: str, limit_s: float, is_parallel: bool) -> Stage:
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "experiments.gpu_tests"]
        command += ["--outcomes", str(out / OUTCOMES), "-m", marks, *files]
        command += ["-o", f"faulthandler_timeout={HANGING_S}"]
        if is_parallel and on_gpu and importlib.util.find_spec("xdist") is not None:
            # One test at a time to each worker, so that they keep their order.
            workers = max(2, min(8, (os.cpu_count() or 2) // 2))
            command += ["-n", str(workers), "--maxschedchunk", "1"]
        return Stage(name, command if on_gpu else [*command, COLLECT], limit_s, True)

    environment = ["-m", "experiments.gpu_check", "--environment", str(out / "environment.json")]
    profile = ["--profile", str(out / "profile.txt")] if on_gpu else []
    beside = "(gpu or device) and not alone"
    return [
        Stage("environment", environment, 30),
        tests("engine tests", ENGINE_TESTS, "gpu and not alone", 60, is_parallel=True),
        rows("latency", "engine.csv", 95, *profile),
        tests("tests", TESTS, beside, 150, is_parallel=True),
        tests("tests alone", ENGINE_TESTS + TESTS, "gpu and alone", 40, is_parallel=False),
        rows("ceilings", "ceilings.csv", 35),
        rows("kernels", "kernels.csv", 30),
        rows("transformers", "engine.csv", 130),
        rows("sweep", "sweep.csv", 400),
    ]


def slug(name: str) -> str:
    """A device's name as a folder's: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "gpu"


def default_out(is_rehearsal: bool) -> Path:
    """Where the results go: a new temporary folder for a rehearsal, else the device's own."""
    if is_rehearsal:
        return Path(tempfile.mkdtemp(prefix="gpu-rehearsal-"))
    return ROOT / "results" / slug(torch.cuda.get_device_name(0))


# ---- to run one ----------------------------------------------------------------------------------
def send(process: subprocess.Popen, number: signal.Signals) -> None:
    """Send a signal to a process and to all that it started; its group may be gone already."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def has_ended(process: subprocess.Popen, within_s: float) -> bool:
    """Whether a process ends within so many seconds."""
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def run_stage(stage: Stage, env: dict[str, str], log: IO, limit_s: float) -> str | None:
    """Run a stage to its end or its limit. Returns None, or the failure in one sentence."""
    command = [sys.executable, *stage.command]
    # A session of its own, so that a signal reaches all processes that it started.
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        if has_ended(process, limit_s):
            code = process.returncode
            return f"{stage.name} failed with exit code {code}" if code else None
        send(process, signal.SIGINT)  # a program of Python's ends with what it has
        how = "interrupted" if has_ended(process, GRACE_S) else "killed"
        return f"{stage.name} ran over its {limit_s:.0f} s and was {how}"
    finally:
        send(process, signal.SIGKILL)  # whatever is left of it, after Ctrl-C too
        process.wait()


def drop_half_lines(out: Path) -> None:
    """Cut off what a killed stage left of a row, so that the next stage can append to the file."""
    for path in out.glob("*.csv"):
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


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
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"


def write_facts(path: Path, facts: dict) -> None:
    """Write what is known to a file, in place of what was known before."""
    with replacing(path) as (part,):
        part.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def write_environment(path: Path) -> None:
    """Write versions and device to a file, warm up the GPU, and refuse interpreted kernels."""
    from experiments.ceilings import warm_up

    facts = provenance() | {"date": datetime.now(UTC).isoformat("T", "seconds")}
    facts |= {"seed": os.environ.get("PAGEDGPT_SEED"), "cpus": os.cpu_count()}
    if torch.cuda.is_available():
        warm_up(torch.device("cuda"), seconds=3)  # an idle GPU runs at a fifth of its clock
        properties = torch.cuda.get_device_properties(0)
        facts |= {"device": properties.name, "cuda": torch.version.cuda}
        facts |= {"memory_bytes": properties.total_memory, "smi_warm": nvidia_smi()}
        facts |= {"processors": properties.multi_processor_count}
        facts |= {"capability": f"{properties.major}.{properties.minor}"}
    # Before the kernels: what is known is written even if one of them cannot be imported.
    write_facts(path, facts)
    kernels = kernels_of([importlib.import_module(name) for name in KERNEL_FILES])
    facts |= {"kernels": kernels}
    write_facts(path, facts)
    refuse_interpreted(kernels)


# ---- all of it -----------------------------------------------------------------------------------
def judge_tests(found: list[Stage], out: Path) -> tuple[list[str], list[str]]:
    """Lines about the tests of all stages, and what is wrong with them."""
    lines, wrong = [], []
    outcomes = read_outcomes(out / OUTCOMES)
    for stage in found:
        if stage.has_tests:
            ended = outcomes.get(stage.name, Outcomes())
            lines.append(f"{stage.name}: {ended}")
            lines += [f"    failed: {name}" for name in ended.failed[:MOST_NAMES]]
            reason = ended.wrong(must_run=COLLECT not in stage.command)
            wrong += [f"{stage.name}: {reason}"] if reason else []
    return lines, wrong


def age_s() -> float:
    """Seconds since this process began. On a new machine the import of torch may take 20."""
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # after the boot
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - began_s
    except (OSError, AttributeError):  # no Linux
        return UNKNOWN_AGE_S
    return age if 0 <= age < 60 else UNKNOWN_AGE_S  # some sandboxes have no such clock


def run_all(found: list[Stage], out: Path, env: dict[str, str]) -> int:
    """Run the stages, print the table, return the exit code."""
    ends_at = time.monotonic() - age_s() + MOST_SECONDS - TABLE_S
    date = datetime.now(UTC).isoformat("T", "seconds")
    out.mkdir(parents=True, exist_ok=True)
    (out / OUTCOMES).unlink(missing_ok=True)  # of an earlier run
    wrong = [] if commit() != "unknown" else ["no commit is known: set PAGEDGPT_COMMIT"]
    spent = []
    with (out / "log.txt").open("w", encoding="utf-8") as log:
        for stage in found:
            started = time.monotonic()
            limit_s = min(stage.limit_s, ends_at - started - GRACE_S)
            if limit_s < LEAST_S:
                wrong.append(f"{stage.name} did not run: no time was left")
                continue
            print(f"---- {stage.name}, at most {limit_s:.0f} s", flush=True)
            print(f"\n==== {stage.name}", file=log, flush=True)
            if stage.has_tests:
                begin_stage(out / OUTCOMES, stage.name)
            try:
                reason = run_stage(stage, env, log, limit_s)
            except KeyboardInterrupt:
                wrong.append(f"interrupted during {stage.name}")
                break
            drop_half_lines(out)
            wrong += [reason] if reason else []
            spent.append(f"{stage.name} {time.monotonic() - started:.0f} s")
    test_lines, failures = judge_tests(found, out)
    head = [f"commit {commit()}, seed {env['PAGEDGPT_SEED']}", ", ".join(spent)]
    lines = gpu_summary.table(out, date, head, test_lines, wrong + failures)
    with replacing(out / "summary.txt") as (part,):
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\n---- {out}\n" + "\n".join(lines))
    return 1 if wrong + failures else 0


def chosen(found: list[Stage], names: list[str] | None) -> list[Stage]:
    """The stages that are named; else all but the sweep, and transformers if it is installed."""
    if names is None:
        has_peers = importlib.util.find_spec("transformers") is not None
        left_out = {"sweep"} if has_peers else {"sweep", "transformers"}
        names = [stage.name for stage in found if stage.name not in left_out]
    return [stage for stage in found if stage.name in names]


def main(argv: list[str] | None = None) -> None:
    """Check that there is a GPU, then run all stages; exit code 1 if anything fails."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    names = [stage.name for stage in stages(ROOT)]
    add = parser.add_argument
    add("--only", nargs="+", choices=names, metavar="STAGE", help=f"some of: {', '.join(names)}")
    add("--rehearse", action="store_true", help="every stage small, on a CPU, without the tests")
    add("--environment", type=Path, help=argparse.SUPPRESS)  # a stage of its own
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    try:
        if args.environment:
            return write_environment(args.environment)
        if not (on_gpu or args.rehearse):
            raise ValueError(NO_DEVICE)
        # In a background job SIGINT may be ignored, and the stages would inherit that.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"PAGEDGPT_SEED": os.environ.get("PAGEDGPT_SEED") or str(secrets.randbelow(2**31))}
        env |= {"PAGEDGPT_COMMIT": commit(), "PYTHONUNBUFFERED": "1"}
        env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # no stage waits for a network
        out = Path(os.environ.get("OUT") or default_out(args.rehearse)).resolve()
        found = chosen(stages(out, on_gpu=not args.rehearse), args.only)
        raise SystemExit(run_all(found, out, env))
    except (ValueError, ImportError) as error:
        raise SystemExit(f"experiments/gpu_check.py: {error}") from None


if __name__ == "__main__":
    main()
