"""The shape of the house: the lesson at the root, everything else in seven wings.

A lesson imports only lessons above it, so a reader who goes in order never meets an unexplained
name. A wing may be left closed: no lesson imports it. `llm.py`, `generate.py` and `benchmark.py`
put the parts together and may import anything.
"""

import ast
import importlib
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

LESSONS = """model block_allocator kv_cache paged_attention paged_attention_triton sampling sequence
policies scheduler outputs engine baselines prefix_cache beam_search swap llm generate
benchmark""".split()
COMING = {"swap"}  # lessons that are not written yet
COMPOSERS = {"llm", "generate", "benchmark"}
MAY_IMPORT = {  # beside lessons and the wing itself
    "kernels": set(),
    "checkpoints": {"kernels.device_memory", "kernels.padded_head"},
    "speedups": {"kernels"},
    "watch": set(),
    "serving": {"llm", "generate", "watch", "kernels"},
    "plots": {"watch", "experiments.results"},
    "experiments": {"kernels", "checkpoints", "speedups", "watch", "serving", "plots", *COMPOSERS}
    | {"experiments.peer_engines.protocol"},
}
WINGS = [wing for wing in MAY_IMPORT if (ROOT / wing).is_dir()]
PROGRAMS = {"generate", "benchmark"}  # they have arguments and a main() instead of a demo()
DEMOS = [name for name in LESSONS if name not in PROGRAMS | COMING]


def tree_of(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imported_by(path):
    """Every module that a file imports, at its top or inside a function, as a dotted name."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            # `from kernels import backends` names a module, `from model import GPT` does not
            is_wing = node.module in MAY_IMPORT
            yield from (f"{node.module}.{name}" for name in names) if is_wing else [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def listed_in(wing):
    """The files that a wing's `__init__.py` lists, in reading order."""
    docstring = ast.get_docstring(tree_of(f"{wing}/__init__.py"))
    return re.findall(r"(?m)^    (\w+)  ", docstring)


# ---- the lesson ----------------------------------------------------------------------------------
def test_the_root_is_the_lesson_and_nothing_else():
    assert {path.stem for path in ROOT.glob("*.py")} | COMING == set(LESSONS)


@pytest.mark.parametrize("name", [name for name in DEMOS if name not in COMPOSERS])
def test_a_lesson_imports_only_lessons_above_it_and_no_wing(name):
    tops = {module.split(".")[0] for module in imported_by(f"{name}.py")}
    above = set(LESSONS[: LESSONS.index(name)])
    assert tops & (set(LESSONS) | set(MAY_IMPORT)) <= above


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_prints_a_screenful_and_ends_with_ok(name):
    # One thread: on a machine that is busy with other things, two wait for each other.
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, f"{name}.py"]
    options = {"cwd": ROOT, "env": env, "capture_output": True, "encoding": "utf-8"}
    run = subprocess.run(command, timeout=120, **options)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith("ok:")
    assert len(run.stdout.splitlines()) <= 25


# ---- the wings -----------------------------------------------------------------------------------
@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_is_a_package_whose_docstring_lists_its_files(wing):
    body = tree_of(f"{wing}/__init__.py").body
    assert len(body) == 1, "one docstring, no code"
    files = {path.stem for path in (ROOT / wing).glob("*.py")} - {"__init__"}
    assert sorted(listed_in(wing)) == sorted(files)


FILES = [(wing, name) for wing in WINGS for name in listed_in(wing)]


@pytest.mark.parametrize("wing, name", FILES)
def test_a_wing_file_imports_lessons_its_wing_above_it_and_what_its_wing_may(wing, name):
    order = listed_in(wing)
    above = {f"{wing}.{other}" for other in order[: order.index(name)]}
    allowed = MAY_IMPORT[wing]
    for module in imported_by(f"{wing}/{name}.py"):
        top = module.split(".")[0]
        if top in MAY_IMPORT or top in COMPOSERS:
            assert module in above or {top, module} & allowed, f"imports {module}"


@pytest.mark.parametrize("wing, name", FILES)
def test_a_demo_of_a_wing_file_ends_with_ok(wing, name, capsys):
    if name == "replicas":
        pytest.importorskip("ray")
    module = importlib.import_module(f"{wing}.{name}")
    if not hasattr(module, "demo"):
        pytest.skip("this file has no demo")
    module.demo()
    assert capsys.readouterr().out.splitlines()[-1].startswith("ok:")


# ---- the engines of others -----------------------------------------------------------------------
PEER_ENGINES = "experiments/peer_engines"


def test_the_folder_of_the_engines_lists_its_files():
    files = {path.stem for path in (ROOT / PEER_ENGINES).glob("*.py")} - {"__init__"}
    assert sorted(listed_in(PEER_ENGINES)) == sorted(files)


@pytest.mark.parametrize("name", listed_in(PEER_ENGINES))
def test_a_script_that_runs_in_an_engines_own_environment_imports_nothing_of_ours(name):
    if name == "run_ours":  # our own engine, in our own environment
        return
    imports = set(imported_by(f"{PEER_ENGINES}/{name}.py"))
    assert {module.split(".")[0] for module in imports} & (set(LESSONS) | set(MAY_IMPORT)) == set()
    # Beside its engine and what reads weights, only the standard library and the protocol.
    at_the_top = {
        module
        for node in tree_of(f"{PEER_ENGINES}/{name}.py").body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in ([node.module] if isinstance(node, ast.ImportFrom) else [node.names[0].name])
    }
    assert {module.split(".")[0] for module in at_the_top} <= sys.stdlib_module_names | {"protocol"}


# ---- all files -----------------------------------------------------------------------------------
ALL = [f"{name}.py" for name in LESSONS if name not in COMING]
ALL += [f"{wing}/{name}.py" for wing, name in FILES]
ALL += [f"{PEER_ENGINES}/{name}.py" for name in listed_in(PEER_ENGINES)]


@pytest.mark.parametrize("path", ALL)
def test_a_file_imports_no_test_and_never_edits_the_search_path(path):
    assert not set(imported_by(path)) & {"pytest", "conftest", "hypothesis"}
    assert "sys.path" not in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", ALL)
def test_one_word_means_one_thing(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert re.findall(r"\bpage_(?:table|ids?)\b|class Block\(nn\.Module", text) == []
