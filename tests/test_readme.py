"""README and docs/: what they show is what the code prints, what they link is there, and every
number comes from a row."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from experiments.gpu_check import slug
from experiments.results import read
from plots import gpu, tables

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*tables.pages(), ROOT / "CONTRIBUTING.md"]
TRAINING = json.loads((ROOT / "assets/tiny-gpt2/training.json").read_text(encoding="utf-8"))


# ---- the pages -----------------------------------------------------------------------------------
def test_the_readme_has_under_150_lines_of_at_most_100_columns():
    lines = README.splitlines()
    assert len(lines) < 150
    assert [line for line in lines if len(line) > 100 and not line.startswith(("|", "!["))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_its_heading(page):
    text = page.read_text(encoding="utf-8")
    for target, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", text):
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{target} is linked and not there"
        if heading:
            titles = re.findall(r"(?m)^#+ (.+)$", path.read_text(encoding="utf-8"))
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, f"{target} has no heading {heading}"


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_the_tables_are_those_of_the_code_and_the_rows(page):
    """They differ? `python -m plots.tables` writes them anew."""
    text = page.read_text(encoding="utf-8")
    assert tables.rewritten(text) == text


def test_the_lessons_table_names_every_root_file_in_reading_order():
    assert sorted(tables.LESSON) == sorted(path.name for path in ROOT.glob("*.py"))
    from test_structure import LESSONS

    stems = [name.removesuffix(".py") for name in tables.LESSON]
    assert stems == [name for name in LESSONS if name in stems]


def test_the_allocator_comes_second_and_the_engine_within_85_minutes():
    names = list(tables.LESSON)
    assert names[1] == "block_allocator.py"
    before = names[: names.index("engine.py")]
    assert sum(map(tables.minutes, before)) <= 85


def test_the_files_marked_with_a_star_import_no_torch():
    names = ", ".join(name.removesuffix(".py") for name in tables.NO_TORCH)
    check = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_the_demo_that_is_printed_in_full_is_what_the_file_prints():
    shown = re.search(r"lesson prints:\n\n```\n(.*?)```", README, re.DOTALL)
    command = [sys.executable, "block_allocator.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown is not None and shown.group(1) == printed.stdout


def test_the_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {name for page in PAGES for name in re.findall(r"make ([a-z-]+)", page.read_text())}
    for target in named & {"demo", "serve", "test", "check", "bench", "notebook", "gpu-check"}:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    assert {"demo", "test", "check", "notebook", "gpu-check"} <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_that_a_page_runs_exists(page):
    text = page.read_text(encoding="utf-8")
    for module in re.findall(
        r"python3? -m ((?:kernels|checkpoints|plots|experiments|watch|serving)\.\w+)", text
    ):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    import benchmark

    for name in re.findall(r"python benchmark.py ([a-z][\w-]*)", text):
        assert name in benchmark.EXPERIMENTS, name


# ---- the numbers ---------------------------------------------------------------------------------
def test_the_figures_in_the_readmes_prose_are_those_of_the_rows():
    text = " ".join(README.split())
    decode = tables.newest(
        "cpu/peers.csv", "paged engine", tables.DYNAMIC_CACHE, "decode batch=32 "
    )
    assert f"32 sequences decode {decode:.2f} times as fast as with transformers" in text
    figures = tables.equal_memory_figures()
    at_once = {name: row["running at once, mean"] for name, row in figures.items()}
    ratio = at_once["paged"] / at_once["maximum, buddies"]
    assert f"In the same memory {ratio:.2f} times as many requests run at once" in text


def test_the_gpus_figures_in_the_readme_are_those_of_the_rows():
    rows = gpu.rows_of("engine.csv")
    found, rate = gpu.Steps(rows), gpu.rate_of(rows, gpu.BEST_WAY)
    large, small = (found.share_of_floor(shape) for shape in ((256, 512), (1, 128)))
    words = f"On an NVIDIA H200 256 requests get {rate:,.0f} output tokens/s; the reading of "
    words += f"weights, K and V is {large:.0f}% of a step of 256 x 512 tokens and {small:.0f}% of "
    assert f"{words}one of 1 x 128." in " ".join(README.split())


def test_the_rows_in_the_gpus_folder_are_that_gpus_and_none_is_faster_than_memory():
    """A kernel that prefetches may be a little faster than the plain read, not a lot."""
    files = sorted(gpu.FOLDER.glob("*.csv"))
    assert files
    for path in files:
        for row in read(path):
            assert slug(row["device"]) == gpu.FOLDER.name, path
            if row["metric"].startswith("share of the"):
                assert row["max"] < 110, f"{path.name}: {row['contender']}, {row['workload']}"


def test_equal_memory_is_the_same_bytes_for_all():
    pools = {row["pool"] for row in tables.equal_memory_figures().values()}
    assert pools == {4096 * 16 * 36_864}


def test_a_cache_is_worth_at_least_ten_times():
    of = "cpu/speed.csv", "paged", "speed against no cache", "batch=1 prompt=64 new=500 "
    assert tables.newest(*of, threads=2, model="random:gpt2") >= 10


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("*.csv")), ids=lambda p: p.name)
def test_the_committed_rows_are_whole_and_of_a_commit_that_is_known(path):
    for row in read(path):
        assert row["commit"] not in ("unknown", "none") and not row["commit"].endswith("-dirty")


def test_a_figure_without_a_row_is_refused():
    with pytest.raises(ValueError, match="has no row 'paged engine', 'no such metric'"):
        tables.newest("cpu/peers.csv", "paged engine", "no such metric", "decode")


def test_the_shipped_model_reaches_what_it_was_trained_for():
    card = (ROOT / "assets/tiny-gpt2/README.md").read_text(encoding="utf-8")
    assert f"{TRAINING['nats_per_character']:.3f}" in card
    assert TRAINING["nats_per_character"] <= 1.10
    assert TRAINING["nats_per_token_at_512_to_1023"] <= TRAINING["nats_per_token_at_0_to_255"]
    files = list((ROOT / "assets/tiny-gpt2").iterdir())
    assert sum(path.stat().st_size for path in files) <= 12e6
