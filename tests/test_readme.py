"""The README: what it shows is what the code prints, and what it links is there."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

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
    for target in re.findall(r"(?:^|`)make (\w+)", README, flags=re.MULTILINE):
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
