"""Every `Try:` of a lesson works: the edit is made in a copy of the file, and the copy is run.

An experiment either ends with `ok:` or stops at the assert that its docstring names.
"""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

OK = "ok:"
# (file, what the docstring says word for word, text to replace, replacement, how it must end)
EXPERIMENTS = [
    ("sequence.py", "CHUNK = 5", "CHUNK = 8", "CHUNK = 5", OK),
    ("sequence.py", "CHUNK = 12", "CHUNK = 8", "CHUNK = 12", OK),
    (
        "policies.py",
        "`return -seq.request.arrival, seq.index`",
        "return seq.request.arrival, seq.index",
        "return -seq.request.arrival, seq.index",
        "the newest gives way",
    ),
    (
        "policies.py",
        "`return len(seq.request.prompt_token_ids), seq.index`",
        "return seq.request.arrival, seq.index",
        "return len(seq.request.prompt_token_ids), seq.index",
        "the newest gives way",
    ),
    (
        "scheduler.py",
        "MAX_NUM_BATCHED_TOKENS = 4",
        "MAX_NUM_BATCHED_TOKENS = 16",
        "MAX_NUM_BATCHED_TOKENS = 4",
        OK,
    ),
    ("scheduler.py", "NUM_BLOCKS = 12", "NUM_BLOCKS = 8", "NUM_BLOCKS = 12", "one preemption"),
    ("outputs.py", 'STOP = "paged "', 'STOP = "END"', 'STOP = "paged "', OK),
    (
        "outputs.py",
        "`keep = len(window)` in `_advance`",
        "keep = self._first_possible_start(window)",
        "keep = len(window)",
        "the text ends before the stop string",
    ),
    (
        "engine.py",
        "MAX_NUM_BATCHED_TOKENS = 4",
        "MAX_NUM_BATCHED_TOKENS = 12",
        "MAX_NUM_BATCHED_TOKENS = 4",
        OK,
    ),
    ("engine.py", "NUM_BLOCKS = 7", "NUM_BLOCKS = 9", "NUM_BLOCKS = 7", OK),
    ("baselines.py", "MAX_TOKENS = 40", "MAX_TOKENS = 20", "MAX_TOKENS = 40", OK),
    ("baselines.py", "SLAB_LEN = 16", "SLAB_LEN = 64", "SLAB_LEN = 16", "the same tokens"),
    ("model.py", "NUM_HEADS = 8 above the demo", "NUM_HEADS = 4", "NUM_HEADS = 8", OK),
    ("model.py", "or OLDEST = 1", "OLDEST = 0", "OLDEST = 1", "the logits differ"),
    ("block_allocator.py", "BLOCK_SIZE = 1 above the demo", "BLOCK_SIZE = 4", "BLOCK_SIZE = 1", OK),
    (
        "block_allocator.py",
        "take the other end of the free list, `slice(0, n)`",
        "slice(len(self._free) - n, None)",
        "slice(0, n)",
        OK,
    ),
    ("kv_cache.py", "BLOCK_SIZE = 1 above the demo", "BLOCK_SIZE = 4", "BLOCK_SIZE = 1", OK),
    (
        "kv_cache.py",
        "TABLE_WHEN_READ = [0, 5, 7]",
        "TABLE_WHEN_READ = None",
        "TABLE_WHEN_READ = [0, 5, 7]",
        "A's keys came back in another order",
    ),
    ("paged_attention.py", "WALK = -1 above the demo", "WALK = 1 ", "WALK = -1 ", OK),
    (
        "paged_attention.py",
        "START_M = 0.0 and SHIFT = -1000.0",
        "START_M = -math.inf\nSHIFT = 0.0",
        "START_M = 0.0\nSHIFT = -1000.0",
        "distance from the dense result: nan",
    ),
    (
        "paged_attention_triton.py",
        "BLOCK_SIZE = 1 above the demo",
        "BLOCK_SIZE = 4",
        "BLOCK_SIZE = 1",
        OK,
    ),
    (
        "paged_attention_triton.py",
        "Or delete `(position <= last) &` in the kernel",
        "(position <= last) & ",
        "",
        "distance from the oracle",
    ),
    ("sampling.py", 'EXTRA = {"min_p": 0.3}', "Any] = {}", 'Any] = {"min_p": 0.3}', OK),
    ("sampling.py", "or TOP_P = 0.6", "TOP_P = 0.8", "TOP_P = 0.6", OK),
    ("prefix_cache.py", "NUM_BLOCKS = 15", "NUM_BLOCKS = 9", "NUM_BLOCKS = 15", "C evicts"),
    (
        "prefix_cache.py",
        "`reversed(freed)` in `free`",
        "for block_id in freed:",
        "for block_id in reversed(freed):",
        "a parent is evicted before its child",
    ),
    (
        "beam_search.py",
        "BEAM_WIDTH = 1 in the demo",
        "BEAM_WIDTH = 3",
        "BEAM_WIDTH = 1",
        "the best of all texts",
    ),
    ("beam_search.py", "BLOCK_SIZE = 1: nothing", "BLOCK_SIZE = 2", "BLOCK_SIZE = 1", OK),
    ("llm.py", "BLOCK_SIZE = 1", "BLOCK_SIZE = 16", "BLOCK_SIZE = 1", OK),
    (
        "llm.py",
        "TIGHT_POOL_TOKENS = 16",
        "TIGHT_POOL_TOKENS = 64",
        "TIGHT_POOL_TOKENS = 16",
        "the pool has 1",
    ),
]


@pytest.mark.parametrize("name, said, old, new, end", EXPERIMENTS)
def test_an_experiment_that_a_docstring_names_can_be_made(name, said, old, new, end, tmp_path):
    source = (ROOT / name).read_text(encoding="utf-8")
    docstring = source.split('"""')[1]
    assert " ".join(said.split()) in " ".join(docstring.split()), "the docstring says otherwise"
    code = source.replace(docstring, "", 1)
    assert code.count(old) == 1, f"{old!r} occurs {code.count(old)} times"
    (tmp_path / "assets").symlink_to(ROOT / "assets")  # the shipped model lies beside llm.py
    (tmp_path / name).write_text(code.replace(old, new), encoding="utf-8")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env |= {"PYTHONIOENCODING": "utf-8"}
    options = {"cwd": ROOT, "env": env, "capture_output": True, "encoding": "utf-8"}
    # The copy's folder comes first in the search path: the copy is what runs.
    run = subprocess.run([sys.executable, str(tmp_path / name)], timeout=120, **options)
    if end == OK:
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines()[-1].startswith(OK)
    else:
        assert run.returncode == 1 and end in run.stderr, run.stdout + run.stderr
