"""experiments/gpu_check.py without a GPU: its stages with stand-ins, and a rehearsal of all.

What it must never do is to say that all is well when something was not checked: a test skipped, a
kernel interpreted, a stage stopped, an earlier run's file taken for this one's. And whatever a
stage does, the run ends in time, with what was measured until then.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import benchmark
from experiments import gpu_check
from experiments.gpu_check import Stage, chosen, run_all, stages
from experiments.gpu_tests import read_outcomes
from experiments.results import Measurement, append

ENV = dict(os.environ) | {"PAGEDGPT_SEED": "5", "PAGEDGPT_COMMIT": "abc1234"}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Half a second from SIGINT to SIGKILL, a process that has just begun, and a known commit.

    And SIGINT as in the foreground: in a background job a stage would inherit that it is ignored.
    """
    monkeypatch.setattr(gpu_check, "age_s", lambda: 0.0)
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.5)
    monkeypatch.setattr(gpu_check, "LEAST_S", 0.2)
    monkeypatch.setenv("PAGEDGPT_COMMIT", "abc1234")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def python(name, code, limit_s=20.0, has_tests=False):
    return Stage(name, ["-c", f"import os, signal, sys, time\n{code}"], limit_s, has_tests)


def run(tmp_path, capsys, *found):
    """The exit code of a run of stand-ins, the lines of its table, and the seconds it took."""
    started = time.monotonic()
    code = run_all(list(found), tmp_path, ENV)
    taken_s = time.monotonic() - started
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert capsys.readouterr().out.endswith("\n".join(lines) + "\n")
    return code, lines, taken_s


def wrong(lines):
    return [line.removeprefix("WRONG: ") for line in lines if line.startswith("WRONG: ")]


# ---- what it runs --------------------------------------------------------------------------------
def test_every_file_with_a_test_for_a_gpu_is_run_there():
    """A test is marked `device` or `gpu`, or `needs_gpu` marks it."""
    marked = re.compile(r"^(@needs_gpu|@pytest\.mark\.(gpu|device)|pytestmark = .*\.device)", re.M)
    files = (
        path for path in (ROOT / "tests").rglob("test_*.py") if marked.search(path.read_text())
    )
    there = sorted(gpu_check.ENGINE_TESTS + gpu_check.TESTS)
    assert sorted(str(path.relative_to(ROOT)) for path in files) == there


# ---- where there is no GPU -----------------------------------------------------------------------
def test_without_a_gpu_it_fails_with_one_sentence():
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "experiments.gpu_check"]
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert found.returncode == 1 and found.stdout == ""
    assert found.stderr == f"experiments/gpu_check.py: {gpu_check.NO_DEVICE}\n"


KERNELS_ALONE = """
import benchmark, experiments.kernels, conftest, importlib
import test_triton_prefill, test_triton_decode
for name in set(gpu_check.KERNEL_FILES) - {"kernels.triton_fused"}: importlib.import_module(name)
"""
WHOLE_ENGINE = """
import benchmark, experiments.latency, conftest, kernels.triton_fused
import test_cuda_graphs, test_triton_sampling, test_gpu_engine, test_triton_fused
"""
# What an engine is made of, beside torch, triton, numpy and pytest.
OF_AN_ENGINE = {"safetensors", "tqdm"}


@pytest.mark.slow
@pytest.mark.parametrize("code, more", [(KERNELS_ALONE, set()), (WHOLE_ENGINE, OF_AN_ENGINE)])
def test_it_needs_nothing_but_torch_triton_numpy_and_pytest(code, more):
    """All modules of a virtual environment's own that its stages import, tests' modules too."""
    absent = {"hypothesis", "tokenizers", "transformers", "numba", "huggingface_hub", "matplotlib"}
    absent |= {"rich", "xdist", "tiktoken", *OF_AN_ENGINE - more}
    # Importing one of them is an ImportError.
    code = f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n" + code
    code = code.replace("import benchmark", "from experiments import gpu_check\nimport benchmark")
    folders = [".", "tests", "tests/kernels", "tests/speedups"]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(folders)}
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert found.returncode == 0, found.stderr.decode()


# ---- the stages ----------------------------------------------------------------------------------
def test_the_most_important_stage_comes_first_and_their_limits_are_570_seconds(tmp_path):
    found = chosen(stages(tmp_path), None)
    assert [(stage.name, stage.limit_s) for stage in found] == [
        ("environment", 30), ("engine tests", 60), ("latency", 95), ("tests", 150),
        ("tests alone", 40), ("ceilings", 35), ("kernels", 30), ("transformers", 130),
    ]  # fmt: skip
    assert sum(stage.limit_s for stage in found) == gpu_check.MOST_SECONDS
    written = {word for stage in found for word in stage.command if str(tmp_path) in word}
    assert len(written) + 2 == gpu_check.MOST_FILES  # with log.txt and summary.txt
    for stage in stages(tmp_path):  # their flags exist
        if stage.command[0] == "benchmark.py":
            benchmark.parse_args(stage.command[1:])


def test_what_is_named_is_run_and_transformers_only_where_it_is_installed(tmp_path, monkeypatch):
    found = stages(tmp_path)
    names = [stage.name for stage in chosen(found, ["sweep", "tests alone"])]
    assert names == ["tests alone", "sweep"]
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    assert [stage.name for stage in chosen(found, None)][-1] == "kernels"
    assert "-n" not in stages(tmp_path)[1].command  # nor xdist


def test_each_file_of_triton_kernels_is_looked_at():
    files = [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("experiments/*.py")]
    is_kernel = re.compile(r"^\s*@(triton\.)?jit$", re.MULTILINE)
    holders = [path for path in files if is_kernel.search(path.read_text("utf-8"))]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in holders}
    assert names == set(gpu_check.KERNEL_FILES)


@pytest.mark.slow
def test_a_rehearsal_runs_every_stage_in_time_and_leaves_what_a_run_leaves(tmp_path, monkeypatch):
    """The commands are those of a GPU, with smaller sizes; tests are collected and not run."""
    env = {name: text for name, text in ENV.items() if name != "TRITON_INTERPRET"}
    env |= {"OUT": str(tmp_path)}
    command = [sys.executable, "-m", "experiments.gpu_check", "--rehearse"]
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    log = (tmp_path / "log.txt").read_text()
    assert found.returncode == 0, found.stdout + found.stderr + log
    lines = found.stdout.splitlines()
    table = lines[lines.index(f"---- {tmp_path}") + 1 :]
    assert table == (tmp_path / "summary.txt").read_text().splitlines() and len(table) < 60
    assert "all is well" in table and table[-6] == "defaults:"
    outcomes = read_outcomes(tmp_path / "tests.jsonl")
    assert outcomes["engine tests"].num_collected > 15 and outcomes["tests alone"].num_collected > 5
    assert outcomes["tests"].num_collected > 300
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert set(facts["kernels"].values()) == {"JITFunction"} and facts["commit"] == "abc1234"
    for name in ("engine", "ceilings", "kernels"):
        text = (tmp_path / f"{name}.csv").read_text().splitlines()
        assert len(text) > 5 and all("abc1234" in line for line in text[1:])
    assert len(list(tmp_path.iterdir())) == gpu_check.MOST_FILES - 1  # no profile on a CPU


# ---- stages that fail, hang and ignore -----------------------------------------------------------
def row_code(tmp_path):
    """Code that writes half a row into a file of rows."""
    row = Measurement.of(
        [2.0], experiment="ceilings", contender="read, torch", metric="bandwidth", unit="GB/s",
        workload="memory MB=8", backend="torch", dtype="none", threads=1, device="a GPU",
    )  # fmt: skip
    list(append(tmp_path / "ceilings.csv", [row]))
    return f"open({str(tmp_path / 'ceilings.csv')!r}, 'a').write('ceilings,read')\n"


def test_whatever_a_stage_does_the_others_run_and_the_table_says_what_happened(tmp_path, capsys):
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    found = [
        python("fails", "raise SystemExit(3)"),
        python("hangs", "time.sleep(60)", limit_s=1),
        python("ignores", f"{ignore}time.sleep(60)", limit_s=2),
        python("tidies", "try: time.sleep(60)\nexcept KeyboardInterrupt: print('tidy')", limit_s=2),
        python("cut", row_code(tmp_path) + "os.kill(os.getpid(), 9)"),
        python("good", "print('good')"),
    ]
    code, lines, _ = run(tmp_path, capsys, *found)
    assert code == 1 and wrong(lines) == [
        "fails failed with exit code 3",
        "hangs ran over its 1 s and was interrupted",
        "ignores ran over its 2 s and was killed",
        "tidies ran over its 2 s and was interrupted",
        "cut failed with exit code -9",
    ]
    assert "ceilings: read, torch 2GB/s" in lines  # the whole row stays, half a row goes
    log = (tmp_path / "log.txt").read_text()
    assert log.index("==== tidies\ntidy\n") < log.index("==== good\ngood\n")
    assert lines[0] == "commit abc1234, seed 5" and lines[1].startswith("fails ")


def test_a_run_without_faults_says_so_unless_it_does_not_know_its_commit(
    tmp_path, capsys, monkeypatch
):
    code, lines, _ = run(tmp_path, capsys, python("good", "pass"))
    assert code == 0 and "all is well" in lines
    monkeypatch.setattr(gpu_check, "commit", lambda: "unknown")
    code, lines, _ = run(tmp_path, capsys, python("good", "pass"))
    assert code == 1 and wrong(lines) == ["no commit is known: set PAGEDGPT_COMMIT"]


@pytest.fixture
def ignored_sigint():
    """As in a background job of a shell; what this process starts ignores it too."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_stages_that_all_run_over_leave_no_time_for_the_last_and_the_run_ends_in_time(
    tmp_path, capsys, monkeypatch, ignored_sigint
):
    monkeypatch.setattr(gpu_check, "TABLE_S", 0.5)
    monkeypatch.setattr(gpu_check, "MOST_SECONDS", 7.0)
    monkeypatch.setattr(gpu_check, "age_s", lambda: 2.0)  # of the imports
    found = [python(f"stage {i}", "time.sleep(60)", limit_s=1.0) for i in range(5)]
    code, lines, taken_s = run(tmp_path, capsys, *found)
    # Each takes 1.5 s: the third has what is left, and the others are not begun.
    assert wrong(lines)[:2] == [f"stage {i} ran over its 1 s and was killed" for i in (0, 1)]
    assert wrong(lines)[3:] == [f"stage {i} did not run: no time was left" for i in (3, 4)]
    assert code == 1 and taken_s < 5


def test_the_time_that_the_imports_took_is_known():
    code = "import time\ntime.sleep(1.5)\nfrom experiments.gpu_check import age_s\n"
    code += "first = age_s()\ntime.sleep(1)\nprint(first, age_s())"
    command = [sys.executable, "-c", code]
    started = time.monotonic()
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    taken_s = time.monotonic() - started
    first, second = map(float, found.stdout.split())
    assert 1.5 < first and 1.0 <= second - first < second < taken_s + 0.1


def test_a_stage_is_stopped_with_all_it_started(tmp_path, capsys):
    """Also what it leaves running when it ends well: it would disturb the next one."""
    pid_file = tmp_path / "pids"
    child = "import subprocess\ncode = 'import signal, time\\n"
    child += "signal.signal(signal.SIGINT, signal.SIG_IGN)\\ntime.sleep(60)'\n"
    child += "child = subprocess.Popen([sys.executable, '-c', code])\n"
    child += f"open({str(pid_file)!r}, 'a').write(f'{{child.pid}}\\n')\n"
    run(tmp_path, capsys, python("over", f"{child}time.sleep(60)", 1), python("ends", child))
    pids = pid_file.read_text().split()
    assert len(pids) == 2

    def runs(pid):
        state = f"/proc/{pid}/stat"
        return os.path.exists(state) and open(state).read().split()[2] != "Z"

    until = time.monotonic() + 5
    while any(map(runs, pids)) and time.monotonic() < until:  # until init has collected them
        time.sleep(0.1)
    assert not any(map(runs, pids))


INTERRUPTED = """
import os, signal, sys, threading
from experiments import gpu_check
stage = gpu_check.Stage("first", ["-c", "import time; time.sleep(60)"], 60)
found = [stage, stage._replace(name="second")]
if sys.argv[2] == "sent":
    threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM)).start()
else:
    gpu_check.LEAST_S, found = 0.5, [stage._replace(limit_s=1)]
gpu_check.chosen = lambda *_: found
os.environ["OUT"] = sys.argv[1]
gpu_check.main(["--rehearse"])
"""


@pytest.mark.parametrize(
    "how, reason",
    [("sent", "interrupted during first"), ("over", "first ran over its 1 s and was interrupted")],
)
def test_a_signal_ends_a_stage_or_the_run_even_where_sigint_was_ignored(
    tmp_path, ignored_sigint, how, reason
):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path), how]
    found = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert wrong(found.stdout.splitlines()) == [reason]
    assert found.returncode == 1 and "---- second" not in found.stdout


# ---- tests in a stage ----------------------------------------------------------------------------
TESTS = """
import os, time, pytest
class dtype:
    def __init__(self, itemsize): self.itemsize = itemsize
@pytest.mark.parametrize("kind", [dtype(8), dtype(4), dtype(2)], ids=["8", "4", "2"])
def test_width(kind): pass
def test_good(): pass
"""
ENDS = """
def test_bad(): assert 0
def test_no(): pytest.skip("no GPU")
@pytest.fixture
def after():
    yield
    assert 0
def test_teardown(after): pass
@pytest.fixture
def before(): assert 0
def test_setup(before): pass
"""
HANGS = """
def test_hangs():
    while True:
        try: time.sleep(60)
        except BaseException: pass
"""
POISONS = """
def test_poisons(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_later(): pass
"""
WORKER = "-n", "1", "--maxschedchunk", "1"


def stage_of(tmp_path, text, *more, limit_s=60.0):
    """A stage that runs tests of its own, as `stages` does."""
    (tmp_path / "test_it.py").write_text(TESTS + text)
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "experiments.gpu_tests"]
    command += ["--outcomes", str(tmp_path / "out/tests.jsonl"), "-c", os.devnull]
    command += ["--rootdir", str(tmp_path), *more, str(tmp_path / "test_it.py")]
    return Stage("tests", command, limit_s, has_tests=True)


def run_tests(tmp_path, capsys, *arguments, **options):
    """The outcome of each test by its name, in the order in which they ended, and the table."""
    code, lines, _ = run(tmp_path / "out", capsys, stage_of(tmp_path, *arguments, **options))
    assert code == bool(wrong(lines))
    found = read_outcomes(tmp_path / "out/tests.jsonl").get("tests")
    return {name.split("::")[1]: outcome for name, outcome in found.of.items()}, lines


WIDTHS = {f"test_width[{n}]": "passed" for n in (2, 4, 8)}


def test_16_bits_come_first_and_failed_and_skipped_tests_are_wrong(tmp_path, capsys):
    found, lines = run_tests(tmp_path, capsys, ENDS)
    first = {"test_good": "passed", "test_bad": "failed", "test_no": "skipped"}
    first |= {"test_teardown": "failed", "test_setup": "failed"}
    assert list(found.items()) == list((first | WIDTHS).items())
    at = lines.index("tests: 4 passed, 3 failed, 1 skipped, 0 not finished")
    assert lines[at + 1 : at + 4] == [
        f"    failed: test_it.py::test_{name}" for name in ("bad", "teardown", "setup")
    ]
    assert wrong(lines) == ["tests failed with exit code 1", "tests: 3 failed, 1 skipped"]


def test_no_test_is_wrong_and_an_earlier_runs_outcomes_are_not_taken_for_this_ones(
    tmp_path, capsys
):
    found, lines = run_tests(tmp_path, capsys, "")
    assert found == {"test_good": "passed"} | WIDTHS and "all is well" in lines
    code, lines, _ = run(tmp_path / "out", capsys, python("tests", "pass", has_tests=True))
    assert code == 1 and wrong(lines) == ["tests: no test was found"]


@pytest.mark.parametrize("workers", [(), WORKER], ids=["one process", "a worker"])
def test_of_a_stage_that_is_killed_the_finished_tests_are_known(tmp_path, capsys, workers):
    # schemathesis, which the server's tests use, costs every pytest process a part of the 4 s.
    slow = ("-o", "faulthandler_timeout=1", "-p", "no:schemathesis")
    found, lines = run_tests(tmp_path, capsys, HANGS, *workers, *slow, limit_s=4.0)
    assert found == {"test_good": "passed"}
    assert "tests: 1 passed, 0 failed, 0 skipped, 4 not finished" in lines
    assert wrong(lines) == ["tests ran over its 4 s and was killed", "tests: 4 not finished"]
    assert "in test_hangs" in (tmp_path / "out/log.txt").read_text()  # where it hangs


def test_after_an_error_that_spoils_the_process_no_other_test_runs_in_it(tmp_path, capsys):
    found, lines = run_tests(tmp_path, capsys, POISONS)
    assert found == {"test_good": "passed", "test_poisons": "failed"}
    assert "tests: 1 failed, 4 not finished" in wrong(lines)
    found, _ = run_tests(tmp_path, capsys, POISONS, *WORKER)  # another worker takes its place
    assert found.pop("test_poisons") == "failed"
    assert found == {"test_good": "passed", "test_later": "passed"} | WIDTHS


# ---- the environment -----------------------------------------------------------------------------
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
def test_the_environment_stage_writes_what_it_knows_and_refuses_this_projects_interpreted_kernels(
    tmp_path,
):
    pytest.importorskip("triton")
    path = tmp_path / "environment.json"
    command = [sys.executable, "-m", "experiments.gpu_check", "--environment", str(path)]
    env = ENV | {"TRITON_INTERPRET": "1"}
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert found.returncode == 1 and "is interpreted, not compiled" in found.stderr
    facts = json.loads(path.read_text())
    assert len(facts["kernels"]) >= 10 and facts["torch"] == torch.__version__


def test_no_stage_sees_the_interpreter_and_each_run_has_a_seed_of_its_own(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(gpu_check, "run_all", lambda found, out, env: seen.append((out, env)) or 0)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.delenv("PAGEDGPT_SEED", raising=False)
    for seed in (None, None, "7"):
        if seed:
            monkeypatch.setenv("PAGEDGPT_SEED", seed)
        with pytest.raises(SystemExit) as stopped:
            gpu_check.main(["--rehearse"])
        assert stopped.value.code == 0
    seeds = [env["PAGEDGPT_SEED"] for _, env in seen]
    assert seeds[0] != seeds[1] and seeds[2] == "7"
    assert all(out == tmp_path and "TRITON_INTERPRET" not in env for out, env in seen)
    assert {env["PAGEDGPT_COMMIT"] for _, env in seen} == {"abc1234"}
