"""experiments/gpu_check.py without a GPU: its pieces with stand-ins, and that it refuses to run.

What it must never do is say that all is well when nothing was checked: a test skipped, a kernel
interpreted, a stage killed, an earlier run's file taken for this one's.
"""

import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from experiments import gpu_check
from experiments.gpu_check import (
    CHECK,
    ENGINE,
    SWEEP,
    Stage,
    count_tests,
    judge_tests,
    run_all,
    run_stage,
    stages,
)
from experiments.results import Measurement, append

XML = """<?xml version="1.0"?><testsuites><testsuite name="pytest" errors="{errors}"
failures="{failures}" skipped="{skipped}" tests="{tests}"><testcase name="x"/></testsuite>
</testsuites>"""
ENV = dict(os.environ) | {"PAGEDGPT_SEED": "5"}


def xml(path, tests=9, failures=0, errors=0, skipped=0):
    path.write_text(XML.format(tests=tests, failures=failures, errors=errors, skipped=skipped))
    return path


def python(name, code, limit_s=60):
    return Stage(name, ["-c", code], limit_s)


# ---- where there is no GPU -----------------------------------------------------------------------
def test_without_a_gpu_it_fails_with_one_sentence():
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "experiments.gpu_check"]
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert found.returncode == 1 and found.stdout == ""
    sentence = (
        "experiments/gpu_check.py: PyTorch sees no GPU here, and this checks kernels on one\n"
    )
    assert found.stderr == sentence


KERNELS_ALONE = """
import benchmark, experiments.kernels, conftest, importlib
from experiments import gpu_check
import test_triton_prefill, test_triton_decode
for name in gpu_check.KERNEL_FILES: importlib.import_module(name)
"""
WHOLE_ENGINE = """
import benchmark, experiments.latency, conftest, importlib
from experiments import gpu_check
import test_cuda_graphs, test_triton_sampling, test_gpu_engine
for name in gpu_check.ENGINE_KERNEL_FILES: importlib.import_module(name)
"""
# What an engine is made of, beside torch, triton, numpy and pytest.
OF_AN_ENGINE = {"safetensors", "tiktoken", "tiktoken_ext", "tqdm"}


@pytest.mark.slow
@pytest.mark.parametrize("code, more", [(KERNELS_ALONE, set()), (WHOLE_ENGINE, OF_AN_ENGINE)])
def test_it_needs_nothing_but_torch_triton_numpy_and_pytest(code, more):
    """All modules of a virtual environment's own that its stages import, tests' modules too."""
    absent = {"hypothesis", "tokenizers", "transformers", "numba", "huggingface_hub", "matplotlib"}
    absent |= {"rich"}
    absent |= OF_AN_ENGINE - more
    # Importing one of them is an ImportError.
    code = f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n" + code
    folders = [".", "tests", "tests/kernels", "tests/speedups"]
    if not all((ROOT / name).exists() for name in gpu_check.TESTS):
        pytest.fail(f"{gpu_check.TESTS} are named and not there")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(folders)}
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert found.returncode == 0, found.stderr.decode()


# ---- the stages ----------------------------------------------------------------------------------
AFTER = {
    CHECK: ["tests", "ceilings", "kernels"],
    SWEEP: ["sweep"],
    ENGINE: ["engine tests", "latency"],
}


@pytest.mark.parametrize("run", AFTER)
def test_the_limits_sum_to_under_8_minutes_and_the_files_to_at_most_8(tmp_path, run):
    found = stages(tmp_path, run)
    assert [stage.name for stage in found] == ["environment", *AFTER[run]]
    # Beside the stages there are the imports of the parent, and a kill.
    assert sum(stage.limit_s for stage in found) <= gpu_check.MOST_SECONDS - 20
    written = [word for stage in found for word in stage.command if str(tmp_path) in word]
    assert len(set(written)) == len(written)
    assert len(written) + 1 <= gpu_check.MOST_FILES  # and summary.txt


def test_the_tests_it_runs_exist():
    named = gpu_check.TESTS + gpu_check.ENGINE_TESTS
    assert [name for name in named if not (ROOT / name).is_file()] == []
    assert len(set(named)) == len(named) == 9


@pytest.mark.slow
def test_of_the_engine_only_tests_for_a_gpu_are_run_and_every_file_has_some(tmp_path):
    """They are collected, not run; what would be skipped on a GPU is told by its marks' reasons."""
    (stage,) = [stage for stage in stages(tmp_path, ENGINE) if stage.name == "engine tests"]
    command = [sys.executable, *stage.command, "--collect-only"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert stage.command[stage.command.index("-m", 1) + 1] == "gpu"
    ids = [line for line in found.stdout.splitlines() if "::" in line]
    assert {line.split("::")[0] for line in ids} == set(gpu_check.ENGINE_TESTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "run, name",
    [(CHECK, "ceilings"), (CHECK, "kernels"), (SWEEP, "sweep"), (ENGINE, "latency")],
)
def test_a_stage_accepts_the_flags_it_is_given(run, name, tmp_path):
    (stage,) = [stage for stage in stages(tmp_path, run) if stage.name == name]
    command = [sys.executable, *stage.command, "--help"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def test_each_run_looks_at_the_kernels_that_it_launches(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "write_environment", lambda path, files: seen.append(files))
    for run in (CHECK, ENGINE):
        environment = stages(tmp_path, run)[0]
        gpu_check.main(environment.command[2:])
    assert seen == [
        gpu_check.KERNEL_FILES, gpu_check.KERNEL_FILES + gpu_check.ENGINE_KERNEL_FILES
    ]  # fmt: skip
    # Each file of Triton kernels is looked at.
    files = [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("experiments/*.py")]
    is_kernel = re.compile(r"^\s*@(triton\.)?jit$", re.MULTILINE)
    holders = [path for path in files if is_kernel.search(path.read_text("utf-8"))]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in holders}
    assert names == set(seen[1])


def test_a_stage_that_ends_well_says_nothing_and_one_that_fails_its_code():
    assert run_stage(python("good", "pass"), ENV) is None
    assert run_stage(python("bad", "raise SystemExit(3)"), ENV) == "bad failed with exit code 3"


def test_a_stage_over_its_limit_is_killed_with_all_it_started(tmp_path):
    pid_file = tmp_path / "pid"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(pid_file)!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    started = time.monotonic()
    reason = run_stage(python("slow", code, limit_s=2), ENV)
    assert reason == "slow ran over its 2 s and was killed"
    assert time.monotonic() - started < 10
    child = int(pid_file.read_text())
    for _ in range(50):  # until init has collected it
        state = f"/proc/{child}/stat"
        if not os.path.exists(state) or open(state).read().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the stage's own child still runs")


# ---- the tests' result ---------------------------------------------------------------------------
def test_pytest_writes_what_is_counted(tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert 0\n"
        "def test_c(): pytest.skip('x')\n"
    )
    path = tmp_path / "tests.xml"
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={path}"]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert count_tests(path) == {"ran": 2, "failed": 1, "skipped": 1}


@pytest.mark.parametrize(
    "counts, line, reason",
    [
        ({}, "9 GPU tests ran, 0 failed, 0 skipped", None),
        ({"skipped": 1}, "8 GPU tests ran, 0 failed, 1 skipped", "1 GPU tests were skipped"),
        ({"failures": 2}, "9 GPU tests ran, 2 failed, 0 skipped", "2 GPU tests failed"),
        ({"errors": 1}, "9 GPU tests ran, 1 failed, 0 skipped", "1 GPU tests failed"),
        ({"tests": 0}, "0 GPU tests ran, 0 failed, 0 skipped", "no GPU test ran"),
    ],
)
def test_a_skipped_a_failed_and_a_missing_test_are_wrong(tmp_path, counts, line, reason):
    assert judge_tests(xml(tmp_path / "tests.xml", **counts), since=0) == (line, reason)


def test_an_earlier_runs_result_is_not_taken_for_this_ones(tmp_path):
    path = xml(tmp_path / "tests.xml")
    assert judge_tests(path, time.time() + 60)[1] == "the tests left no result"
    assert judge_tests(tmp_path / "none.xml", 0)[1] == "the tests left no result"


# ---- compiled, not interpreted -------------------------------------------------------------------
class JITFunction:
    pass


class InterpretedFunction:
    pass


def test_an_interpreted_kernel_is_refused():
    module = SimpleNamespace(__name__="kernels", attend=JITFunction(), write=JITFunction(), D=64)
    found = gpu_check.kernels_of([module])
    assert found == {"kernels.attend": "JITFunction", "kernels.write": "JITFunction"}
    gpu_check.refuse_interpreted(found)
    module.write = InterpretedFunction()
    with pytest.raises(ValueError, match="kernels.write is interpreted, not compiled"):
        gpu_check.refuse_interpreted(gpu_check.kernels_of([module]))
    with pytest.raises(ValueError, match="no Triton kernel was found"):
        gpu_check.refuse_interpreted({})


@pytest.mark.slow
@pytest.mark.parametrize("value, kind", [("1", "InterpretedFunction"), (None, "JITFunction")])
def test_the_kernels_of_this_project_are_seen_as_what_they_are(value, kind):
    pytest.importorskip("triton")
    code = """
import importlib
from experiments import gpu_check
names = gpu_check.KERNEL_FILES + gpu_check.ENGINE_KERNEL_FILES
kernels = gpu_check.kernels_of([importlib.import_module(name) for name in names])
print(len(kernels), *sorted(set(kernels.values())))
"""
    env = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_INTERPRET": value} if value else {}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    count, *kinds = found.stdout.split()
    assert int(count) >= 10 and kinds == [kind]


# ---- all of it -----------------------------------------------------------------------------------
def test_a_run_goes_on_after_a_failure_names_it_and_fails(tmp_path, capsys):
    source = xml(tmp_path / "source.xml")
    copy = f"import shutil; shutil.copyfile({str(source)!r}, {str(tmp_path / 'out/tests.xml')!r})"
    found = [python("first", "raise SystemExit(1)"), python("engine tests", copy)]
    found.append(python("last", "import time; time.sleep(60)", limit_s=1))
    assert run_all(found, tmp_path / "out", ENV) == 1
    printed = capsys.readouterr().out
    assert "9 GPU tests ran, 0 failed, 0 skipped" in printed and "seed 5" in printed
    assert "WRONG: first failed with exit code 1" in printed
    assert "WRONG: last ran over its 1 s and was killed" in printed
    assert (tmp_path / "out" / "summary.txt").read_text() in printed
    assert run_all(found[1:2], tmp_path / "out", ENV) == 0
    assert "all is well" in capsys.readouterr().out
    assert run_all([python("latency", "pass")], tmp_path / "other", ENV) == 0
    assert "no tests in this run" in capsys.readouterr().out


def test_no_stage_sees_the_interpreter_and_each_run_has_a_seed_of_its_own(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "run_all", lambda found, out, env: seen.append((out, env)) or 0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.delenv("PAGEDGPT_SEED", raising=False)
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            gpu_check.main([])
        assert stopped.value.code == 0
    monkeypatch.setenv("PAGEDGPT_SEED", "7")
    with pytest.raises(SystemExit):
        gpu_check.main([])
    seeds = [env["PAGEDGPT_SEED"] for _, env in seen]
    assert seeds[0] != seeds[1] and seeds[2] == "7"
    assert all(out == tmp_path and "TRITON_INTERPRET" not in env for out, env in seen)


def test_the_table_of_a_whole_run_has_under_60_lines(tmp_path):
    common = {"backend": "triton", "dtype": "bfloat16", "threads": 16, "device": "a GPU"}

    def row(experiment, contender, workload, metric, unit):
        what = {"experiment": experiment, "contender": contender, "workload": workload} | common
        return Measurement.of([1234.5, 0.0123], metric=metric, unit=unit, **what)

    ceilings = [row("ceilings", f"read {i}", "memory", "bandwidth", "GB/s") for i in range(4)]
    for name in ("QKV", "attention projection", "MLP up", "MLP down", "logits of 50257"):
        for M in (1, 8, 64, 256):
            product = f"{name}, {M} rows", "products", "time a call", "ms"
            ceilings.append(row("ceilings", *product))
    kernels = []
    for shape in ("1x1024", "8x512", "64x512", "64x1024", "256x512"):
        B, T = shape.split("x")
        workload = f"batch={B} context={T} block_size=16"
        for rung in range(9):
            for metric, unit in (
                ("time a call", "ms"),
                ("share of the read", "%"),
                ("speed against contiguous", "x"),
            ):
                kernels.append(row("kernels", f"rung {rung}", workload, metric, unit))
    for what in ("prefill", "write prefill"):
        workload = f"{what} batch=16 context=512 block_size=16"
        for number in range(2):
            kernels.append(row("kernels", f"{what} {number}", workload, "time a call", "ms"))
    kernels.append(row("kernels", "tiles over blocks", "t0 + bytes / bandwidth", "t0", "us"))
    list(append(tmp_path / "ceilings.csv", ceilings))
    list(append(tmp_path / "kernels.csv", kernels))
    lines = gpu_check.summarise(tmp_path, "2020")
    assert len(lines) + 8 < gpu_check.MOST_LINES
    text = "\n".join(lines)
    for word in ("read 3", "MLP down", "256 rows", "rung 8", "256x512", "write prefill 1", "t0"):
        assert word in text
    assert gpu_check.summarise(tmp_path, "2999") == []  # rows of earlier runs are not this one's


# ---- the engine's table --------------------------------------------------------------------------
def engine_rows(batches=(1, 8, 64, 256), contexts=(128, 512, 1024)):
    """Rows as latency.py makes them on a GPU with everything installed; figures are made up."""
    common = {"experiment": "latency", "backend": "triton", "dtype": "bfloat16", "threads": 16}
    common |= {"device": "a GPU"}
    rows = []

    def add(contender, workload, metric, unit, value):
        what = {"contender": contender, "workload": workload, "metric": metric, "unit": unit}
        rows.append(Measurement.of([value], **what, **common))

    ours = ["eager", "recorded", "recorded, fused", "recorded, fused, small linears"]
    ours.append("recorded, contiguous")
    peers = "transformers DynamicCache", "transformers StaticCache, compiled"
    for name in ours[1:]:
        sizes = f"recording sizes=1..{16 if 'small' in name else 256}"
        add(name, sizes, "recording", "s", 4.25)
        add(name, sizes, "memory taken", "MB", 301.0)
    for B in batches:
        for T in contexts:
            workload = f"decode batch={B} context={T} block_size=16"
            add("byte floor", workload, "time a step", "ms", 0.0593)
            for name in ours if B <= 16 else [ours[0], *ours[1:3], ours[4]]:
                add(name, workload, "time a step", "ms", 0.4567)
                add(name, workload, "share of the byte floor", "%", 12.34)
                add(name, workload, "token to token", "ms", 0.5123)
                add(name, workload, "token to token p99", "ms", 0.7)
                add(name, workload, "launches a step", "launches", 138)
                add(name, workload, f"speed against {peers[0]}", "x", 15.5)
            add(peers[0], workload, "token to token", "ms", 7.089)
            add("recorded", workload, "speed against recorded, contiguous", "x", 0.987)
    for way in ("serial", "one step ahead", "one step ahead, fused"):
        add(
            way,
            "requests=256 prompts and texts of 64..512 tokens",
            "output tokens",
            "tokens/s",
            1e5,
        )
        for B in (1, 256):
            workload = f"profile batch={B} context=128"
            for metric, unit in (("kernels a step", "launches"), ("waits a step", "waits")):
                add(way, workload, metric, unit, 88.0)
            add(way, workload, "device idle", "%", 5.5)
    add("serial", "prefill batch=16 prompt=512", "prompt tokens", "tokens/s", 1_654_321.0)
    first = f"decode batch={batches[0]} context={contexts[0]} block_size=16"
    add(peers[1], first, "token to token", "ms", 0.888)
    for name in ours:
        add(name, first, f"speed against {peers[1]}", "x", 1.75)
    return rows


def test_the_table_of_an_engines_run_has_under_60_lines_and_each_time_beside_its_floor(tmp_path):
    list(append(tmp_path / "engine.csv", engine_rows()))
    lines = gpu_check.summarise(tmp_path, "2020")
    assert len(lines) + 8 < gpu_check.MOST_LINES
    heads = lines[1].split()
    assert heads[:2] == ["byte", "floor"] and heads[2:] == [
        "eager", "recorded", "fused", "small", "linears", "contiguous", "DynamicCache", "compiled",
    ]  # fmt: skip
    (first,) = [line for line in lines if line.startswith("1x128 ")]
    five = ["0.4567", "12.34%", "0.5123"] * 5
    assert first.split() == ["1x128", "0.0593", *five, "7.089", "0.888"]
    (last,) = [line for line in lines if line.startswith("256x1024 ")]
    assert last.split() == ["256x1024", "0.0593", *five[:12], "7.089"]  # and no small linears
    text = "\n".join(lines)
    assert "one step ahead, fused: 100,000 output tokens a second" in text
    assert "prefill batch=16 prompt=512, serial: 1,654,321 prompt tokens a second" in text
    recorded = [line.split() for line in lines if line.startswith("recorded  ")]
    assert recorded[0] == ["recorded", *["0.987x"] * 12]
    assert recorded[1] == ["recorded", *["138"] * 4]  # of one context: the others are recorded too
    assert recorded[2] == ["recorded", "15.5x", "1.75x"]
    assert recorded[3] == ["recorded", "4.25", "301"]
    serial = [line.split() for line in lines if line.startswith("serial ")]
    assert serial == [["serial", "88", "88", "5.5%", "88", "88", "5.5%"]]
    assert max(map(len, lines)) <= 210
    assert gpu_check.summarise(tmp_path, "2999") == []  # rows of earlier runs are not this one's


def test_a_run_of_the_engine_that_ended_early_shows_what_there_is(tmp_path):
    """Rows come one by one, and the machine may go after any of them."""
    rows = engine_rows(batches=(1, 64), contexts=(128,))
    for number in range(len(rows) + 1):
        folder = tmp_path / str(number)
        list(append(folder / "engine.csv", rows[:number]))
        lines = gpu_check.summarise(folder, "2020")
        assert bool(lines) is bool(number)
    assert gpu_check.steps_lines([]) == []
