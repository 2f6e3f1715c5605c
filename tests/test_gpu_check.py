"""gpu_check.py without a GPU: its pieces with stand-ins, and that it refuses to run.

What it must never do is say that all is well when nothing was checked: a test skipped, a kernel
interpreted, a stage killed, an earlier run's file taken for this one's.
"""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import gpu_check
from gpu_check import Stage, count_tests, judge_tests, run_all, run_stage, stages
from results import Measurement, append

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
    command = [sys.executable, "gpu_check.py"]
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert found.returncode == 1 and found.stdout == ""
    sentence = "gpu_check.py: PyTorch sees no GPU here, and this checks kernels on one\n"
    assert found.stderr == sentence


def test_it_needs_nothing_but_torch_triton_numpy_and_pytest():
    """All modules of a virtual environment's own that its stages import, tests' modules too."""
    code = """
import sys
known = {"torch", "triton", "numpy", "pytest", "_pytest", "pluggy", "iniconfig", "packaging"}
absent = ["hypothesis", "tqdm", "safetensors", "tiktoken", "tokenizers", "transformers", "numba"]
sys.modules.update(dict.fromkeys(absent))  # importing one of them is an ImportError
sys.path[:0] = [".", "tests"]
import gpu_check, experiments.ceilings, experiments.kernels, experiments.sweep, conftest
import paged_prefill_triton, paged_attention_triton
import test_paged_prefill_triton, test_paged_attention_triton
"""
    if not all((ROOT / name).exists() for name in gpu_check.TESTS):
        pytest.fail(f"{gpu_check.TESTS} are named and not there")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert found.returncode == 0, found.stderr.decode()


# ---- the stages ----------------------------------------------------------------------------------
@pytest.mark.parametrize("sweep", [False, True])
def test_the_limits_sum_to_under_8_minutes_and_the_files_to_at_most_8(tmp_path, sweep):
    found = stages(tmp_path, sweep)
    after = ["sweep"] if sweep else ["tests", "ceilings", "kernels"]
    assert [stage.name for stage in found] == ["environment", *after]
    # Beside the stages there are the imports of the parent, and a kill.
    assert sum(stage.limit_s for stage in found) <= gpu_check.MOST_SECONDS - 20
    written = [word for stage in found for word in stage.command if str(tmp_path) in word]
    assert len(written) + 1 <= gpu_check.MOST_FILES  # and summary.txt


def test_the_tests_it_runs_exist():
    assert all((ROOT / name).is_file() for name in gpu_check.TESTS)


@pytest.mark.parametrize("name", ["ceilings", "kernels", "sweep"])
def test_a_stage_accepts_the_flags_it_is_given(name, tmp_path):
    (stage,) = [stage for stage in stages(tmp_path, name == "sweep") if stage.name == name]
    command = [sys.executable, *stage.command, "--help"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


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


@pytest.mark.parametrize(
    "name, folder", [("NVIDIA H200", "nvidia-h200"), ("Tesla T4 (16/GB)", "tesla-t4-16-gb")]
)
def test_a_device_gives_its_folder_a_name(name, folder):
    assert gpu_check.slug(name) == folder


# ---- the tests' result ---------------------------------------------------------------------------
def test_tests_are_counted_from_the_xml(tmp_path):
    path = xml(tmp_path / "tests.xml", tests=9, failures=2, errors=1, skipped=3)
    assert count_tests(path) == {"ran": 6, "failed": 3, "skipped": 3}


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


@pytest.mark.parametrize("value, kind", [("1", "InterpretedFunction"), (None, "JITFunction")])
def test_the_kernels_of_this_project_are_seen_as_what_they_are(value, kind):
    pytest.importorskip("triton")
    code = """
import importlib, gpu_check
kernels = gpu_check.kernels_of([importlib.import_module(name) for name in gpu_check.KERNEL_FILES])
print(len(kernels), *sorted(set(kernels.values())))
"""
    env = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_INTERPRET": value} if value else {}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    count, *kinds = found.stdout.split()
    assert int(count) >= 6 and kinds == [kind]


# ---- all of it -----------------------------------------------------------------------------------
def test_a_run_goes_on_after_a_failure_names_it_and_fails(tmp_path, capsys):
    source = xml(tmp_path / "source.xml")
    copy = f"import shutil; shutil.copyfile({str(source)!r}, {str(tmp_path / 'out/tests.xml')!r})"
    found = [python("first", "raise SystemExit(1)"), python("tests", copy)]
    found.append(python("last", "import time; time.sleep(60)", limit_s=1))
    assert run_all(found, tmp_path / "out", ENV) == 1
    printed = capsys.readouterr().out
    assert "9 GPU tests ran, 0 failed, 0 skipped" in printed and "seed 5" in printed
    assert "WRONG: first failed with exit code 1" in printed
    assert "WRONG: last ran over its 1 s and was killed" in printed
    assert (tmp_path / "out" / "summary.txt").read_text() in printed
    assert run_all(found[1:2], tmp_path / "out", ENV) == 0
    assert "all is well" in capsys.readouterr().out


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
    for name in ("QKV", "attention projection", "MLP up", "MLP down", "logits"):
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
