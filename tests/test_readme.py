"""The README: what it shows is what the code prints, and what it links is there."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from experiments.results import read

README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = json.loads((ROOT / "assets/tiny-gpt2/training.json").read_text(encoding="utf-8"))
CARD = (ROOT / "assets/tiny-gpt2/README.md").read_text(encoding="utf-8")


def test_the_readme_stays_under_250_lines():
    assert README.count("\n") < 250


def test_every_link_to_a_file_leads_to_one():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 30
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert missing == []


def test_the_reading_table_names_every_top_level_file_once():
    rows = re.findall(r"^\| \[(\w+\.py)\]", README, flags=re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in ROOT.glob("*.py"))
    assert len(rows) == len(set(rows))


def test_the_files_marked_with_a_star_import_no_torch():
    starred = re.findall(r"^\| \[(\w+)\.py\]\([\w.]+\)\*", README, flags=re.MULTILINE)
    assert "block_allocator" in starred and "scheduler" in starred
    check = f"import sys, {', '.join(starred)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_the_demo_that_is_printed_in_full_is_what_the_file_prints():
    shown = re.search(r"\$ python block_allocator.py\n(.*?)```", README, flags=re.DOTALL)
    command = [sys.executable, "block_allocator.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown is not None and shown.group(1) == printed.stdout


def test_the_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([\w-]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize(
    "name, digits",
    [
        ("nats_per_character", 3),
        ("nats_per_token_at_0_to_255", 2),
        ("nats_per_token_at_512_to_1023", 2),
    ],
)
def test_the_losses_in_the_readme_are_those_that_the_training_wrote(name, digits):
    assert f"{TRAINING[name]:.{digits}f}" in README
    assert f"{TRAINING[name]:.3f}" in CARD


def test_the_shipped_model_reaches_what_it_was_trained_for():
    assert TRAINING["nats_per_character"] <= 1.10
    assert TRAINING["nats_per_token_at_512_to_1023"] <= TRAINING["nats_per_token_at_0_to_255"]
    files = [path for path in (ROOT / "assets/tiny-gpt2").iterdir()]
    assert sum(path.stat().st_size for path in files) <= 12e6


# ---- figures -------------------------------------------------------------------------------------
SETTINGS = [(dtype, threads) for dtype in ("float32", "bfloat16") for threads in (1, 2)]
LADDER = {  # as the README calls it: as the CSV does
    "gather the blocks, then the library's kernel": "gather, then dense",
    "block by block in PyTorch": "block by block in PyTorch",
    "one program per (sequence, head)": "one program per (sequence, head)",
    "whole blocks, all heads (`kernels/attention_cpu.py`)": "whole blocks, all heads",
    "a contiguous slab, the library's kernel": "contiguous library kernel",
    "PyTorch's sum, which only reads": "read",
}
WORK = {
    "decode, batch 1": "decode batch=1 ",
    "decode, batch 8": "decode batch=8 ",
    "decode, batch 32": "decode batch=32 ",
    "prefill, 8 x 256 tokens": "prefill batch=8 ",
}


def last_row(rows, contender, metric, workload, dtype, threads):
    """The newest row of a figure; contender and workload by their beginning."""
    found = [
        row
        for row in rows
        if row["contender"].startswith(contender)
        and row["metric"].endswith(metric)
        and row["workload"].startswith(workload)
        and (row["dtype"], row["threads"]) == (dtype, threads)
    ]
    return found[-1]


def ladder_line(name, contender):
    rows = read(ROOT / "results/cpu/kernels.csv")
    what = contender, "bandwidth", "batch=32 context=256 "
    cells = [f"{last_row(rows, *what, *setting)['median']:.1f}" for setting in SETTINGS]
    return f"| {name} | {' | '.join(cells)} |"


def peers_line(name, workload):
    rows = read(ROOT / "results/cpu/peers.csv")
    what = "paged engine", "speed against transformers DynamicCache", workload
    cells = [f"{last_row(rows, *what, *setting)['median']:.2f}" for setting in SETTINGS]
    return f"| {name} | {' | '.join(cells)} |"


def against_the_slab(workload):
    """Our kernel's speed against the library's on a slab, in the order of the tables' columns."""
    rows = read(ROOT / "results/cpu/kernels.csv")
    what = "whole blocks, all heads", "speed against contiguous", workload
    return ", ".join(f"{last_row(rows, *what, *setting)['median']:.2f}" for setting in SETTINGS)


@pytest.mark.parametrize("name", LADDER)
def test_the_kernel_ladder_in_the_readme_is_the_newest_in_its_csv(name):
    assert ladder_line(name, LADDER[name]) in README


@pytest.mark.parametrize("name", WORK)
def test_the_comparison_with_transformers_is_the_newest_in_its_csv(name):
    assert peers_line(name, WORK[name]) in README


@pytest.mark.parametrize("context", ["8x256", "32x256", "32x1000"])
def test_the_speed_against_a_slab_is_the_newest_in_its_csv(context):
    batch, length = context.split("x")
    line = against_the_slab(f"batch={batch} context={length} ")
    assert f"{batch} x {length}: {line}" in " ".join(README.split())


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("*.csv")), ids=lambda p: p.name)
def test_the_committed_rows_are_whole_and_of_a_commit_that_is_known(path):
    for row in read(path):
        assert row["commit"] not in ("unknown", "none") and not row["commit"].endswith("-dirty")


PLANS = {
    "nothing ahead: paged": "paged",
    "its true length, in a buddy allocator": "oracle, buddies",
    "the next power of two, in a buddy allocator": "power of two, buddies",
    "the maximum": "maximum, buddies",
    "the maximum, in static batches": "static batches",
}


@pytest.mark.parametrize("name", PLANS)
def test_what_runs_at_once_in_equal_memory_is_the_newest_in_its_csv(name):
    figures = {}
    for row in read(ROOT / "results/cpu/concurrency.csv"):
        if row["contender"] == PLANS[name] and "Azure" in row["workload"]:
            if row["workload"].endswith("all at once"):
                figures[row["metric"]] = row["median"]
    at_once, used = figures["running at once, mean"], figures["share of the pool: used"]
    assert f"| {name} | {at_once:.0f} | {used:.1f}% |" in README
    assert figures["pool"] == 4096 * 16 * 36_864  # the same bytes for all


def test_what_a_cache_is_worth_is_the_newest_in_its_csv():
    rows = [row for row in read(ROOT / "results/cpu/speed.csv") if row["model"] == "random:gpt2"]
    what = "speed against no cache", "batch=1 prompt=64 new=500", "float32", 2
    paged, slab = (last_row(rows, name, *what)["median"] for name in ("paged", "contiguous"))
    said = f"{paged:.1f} times as fast as without a cache, a contiguous slab {slab:.1f}."
    assert said in " ".join(README.split()) and paged >= 10


def test_the_most_that_is_possible_is_the_newest_in_its_csv():
    rows = read(ROOT / "results/cpu/anatomy.csv")
    what = "at most: products and one read of KV", "speed against transformers DynamicCache"
    most = [last_row(rows, *what, "decode batch=32", *setting)["median"] for setting in SETTINGS]
    said = "at most {:.2f} and {:.2f} times as fast in float32 (1 thread, 2), {:.2f} and {:.2f} in"
    assert said.format(*most) in " ".join(README.split())


def test_what_a_processor_without_avx512_reaches_is_the_newest_in_its_csv():
    folder = ROOT / "results/cpu-avx2"
    peers, kernels = read(folder / "peers.csv"), read(folder / "kernels.csv")

    def both(rows, *what, dtype="float32", digits=2):
        one, two = (last_row(rows, *what, dtype, threads)["median"] for threads in (1, 2))
        return f"{one:.{digits}f} and {two:.{digits}f}"

    against = "speed against transformers DynamicCache"
    engine, decode = ("paged engine", against), "decode batch=32 "
    slab = "whole blocks, all heads", "speed against contiguous", "batch=32 context=256 "
    text = " ".join(README.split())
    assert f"batch 32 {both(peers, *engine, decode)} times as fast over 64" in text
    alone = "products and attention alone", against, decode
    assert f"attention alone would be {both(read(folder / 'anatomy.csv'), *alone)}; " in text
    without = both(peers, *engine, decode, dtype="bfloat16", digits=0)
    assert f"nothing fast there, {without} over 16)" in text
    assert f"prefill {both(peers, *engine, 'prefill batch=8 ')}, decode attention" in text
    assert f"32 x 256 tokens {both(kernels, *slab)} times the slab's" in text
    assert f"({both(kernels, *slab, dtype='bfloat16')} in bfloat16)." in text
