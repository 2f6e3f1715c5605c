"""The shape of the house: one concept a file, read from the top, and each of them runs.

A file imports only files above it, so whoever reads in this order never meets a name that was not
explained before. A new file has to take a place in the order, or these tests fail.
"""

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LADDER = [
    "model",
    "untrusted",
    "weight_files",
    "hub",
    "checkpoint",
    "vocabulary",
    "tokenizer",
    "block_allocator",
    "kv_cache",
    "paged_attention",
    "compiled_cpu",
    "vector_cpu",
    "paged_prefill_cpu",
    "paged_attention_cpu",
    "paged_prefill_triton",
    "paged_attention_triton",
    "fused_decode_triton",
    "small_linear_triton",
    "backends",
    "baselines",
    "sampling",
    "sampling_triton",
    "policies",
    "sequence",
    "scheduler",
    "outputs",
    "engine",
    "linear_cpu",
    "packed_linear",
    "fused_triton",
    "cuda_graphs",
    "plan_ahead",
    "recorder",
    "llm",
    "roofline",
    "explain",
    "terminal",
    "generate",
    "results",
    "simulate",
    "palette",
    "pictures",
]
# Beside the ladder stand programs that nobody imports: one trains the shipped model, saves it and
# lets it write; two measure, through the files of experiments/.
BESIDE = {
    "train_tiny": ["model", "checkpoint", "llm"],
    "benchmark": ["results"],
    "draw": ["paged_attention", "recorder", "results", "palette", "pictures"],
    "gpu_check": ["results"],
}
FILES = [*LADDER, *BESIDE]
PROGRAMS = ["generate", *BESIDE]  # they have arguments and a main() instead of a demo()
DEMOS = [name for name in FILES if name not in PROGRAMS]

MOST_CODE_LINES = 250
MOST_DOCSTRING_LINES = 30
MOST_DEMO_LINES = 25


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def parse(name):
    return ast.parse(source(name))


def nodes_of(tree, *kinds):
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def imported_by(name):
    """Every module that a file imports, at its top or anywhere else."""
    tree = parse(name)
    modules = {node.module for node in nodes_of(tree, ast.ImportFrom)}
    modules |= {alias.name for node in nodes_of(tree, ast.Import) for alias in node.names}
    return {module.split(".")[0] for module in modules if module}


def docstring_lines(tree):
    """The line numbers of all docstrings: of the module, its classes and its functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documented = [node for node in nodes_of(tree, *kinds) if ast.get_docstring(node)]
    spans = [(node.body[0].lineno, node.body[0].end_lineno) for node in documented]
    return {number for first, last in spans for number in range(first, last + 1)}


def code_lines(text):
    """How many lines hold code: no blank lines, no comments, no docstrings."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    silent |= {tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = set()
    for token in tokens:
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(ast.parse(text)))


# ---- the reading order ---------------------------------------------------------------------------
def test_every_file_has_its_place_in_the_reading_order():
    assert {path.stem for path in ROOT.glob("*.py")} == set(FILES)
    assert len(FILES) == len(set(FILES))


def test_the_house_is_flat():
    packages = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    assert packages == []


@pytest.mark.parametrize("name", LADDER)
def test_a_file_imports_only_files_the_reader_has_already_met(name):
    above = LADDER[: LADDER.index(name)]
    assert imported_by(name) & set(FILES) <= set(above)


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_the_ladder_imports_only_what_it_needs(name):
    assert imported_by(name) & set(FILES) <= set(BESIDE[name])


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_the_house_imports_a_test(name):
    assert not imported_by(name) & {"tests", "conftest", "pytest", "hypothesis"}


# ---- what a file looks like ----------------------------------------------------------------------
@pytest.mark.parametrize("name", FILES)
def test_a_file_begins_with_its_concept_in_one_sentence(name):
    docstring = ast.get_docstring(parse(name))
    assert docstring, "no docstring"
    first, *rest = docstring.splitlines()
    assert first.endswith(".") and len(first.split()) >= 5, first
    assert rest and rest[0] == "", "the sentence is followed by a blank line"
    assert len(docstring.splitlines()) <= MOST_DOCSTRING_LINES


@pytest.mark.parametrize("name", FILES)
def test_a_docstring_says_how_the_file_is_run(name):
    assert f"Run: python {name}.py" in ast.get_docstring(parse(name))


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_at_most_250_lines_of_code(name):
    assert code_lines(source(name)) <= MOST_CODE_LINES


EIGHT_LINES_OF_CODE = '''"""A docstring

of three lines."""

# a comment
x = 1  # one line


def f():  # two
    """A docstring."""
    y = """three

five"""
    return (  # six

        y  # seven
    )  # eight
'''


def test_lines_of_code_are_neither_blank_nor_comments_nor_docstrings():
    assert code_lines(EIGHT_LINES_OF_CODE) == 8


@pytest.mark.parametrize("name", FILES)
def test_public_functions_and_classes_have_a_docstring(name):
    public = [
        node
        for node in parse(name).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("name", FILES)
def test_public_methods_of_more_than_one_line_have_a_docstring(name):
    # Of a torch module `forward` is what its class says.
    silent = [
        f"{cls.name}.{method.name}"
        for cls in nodes_of(parse(name), ast.ClassDef)
        for method in cls.body
        if isinstance(method, ast.FunctionDef)
        and not method.name.startswith("_")
        and method.name != "forward"
        and len(method.body) > 1
        and not ast.get_docstring(method)
    ]
    assert silent == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_ends_with_its_demo_or_its_main(name):
    tree = parse(name)
    entry = "main" if name in PROGRAMS else "demo"
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    (function,) = [node for node in functions if node.name == entry]
    if entry == "demo":
        assert not ast.unparse(function.args), "a demo has no arguments"
    assert ast.unparse(tree.body[-1].test) == "__name__ == '__main__'"


@pytest.mark.parametrize("name", FILES)
def test_there_are_no_mutable_globals(name):
    assert nodes_of(parse(name), ast.Global) == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "word",
    [
        pytest.param(r"\bpage_table\b", id="say block_table"),
        pytest.param(r"\bpage_ids?\b", id="say block_id"),
        pytest.param(r"class Block\(nn\.Module", id="a transformer layer is a Layer"),
    ],
)
def test_one_word_means_one_thing(name, word):
    assert re.findall(word, source(name)) == []


# ---- every file runs -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_prints_a_screenful_and_ends_with_ok(name):
    # One thread: on a machine that is busy with other things, two wait for each other.
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, f"{name}.py"]
    run = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8", timeout=120
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[-1].startswith("ok:"), run.stdout
    assert len(lines) <= MOST_DEMO_LINES
