"""The Triton kernels compile for an A100, an H100 and a B200 and stay within their limits.

`compile_kernels.py` compiles what an engine would launch. What can be known without a GPU is
asserted here: everything compiles, nothing spills, everything fits, products run on tensor cores,
and keys and values are copied 16 bytes at a time.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="there is nothing to compile without triton")
import compile_kernels
import triton
from compile_kernels import DTYPES, FULL, QUICK, SHARED_LIMIT_BYTES, Report, known_targets, problems

from speedups.quantized_kv import int8_kernels

SCRIPT = Path(compile_kernels.__file__)
GPT2_IN_16 = ("bfloat16", 64)


def compile_in_a_process_of_its_own(*flags, env=None):
    """Exit status, reports and stderr. A process that interprets kernels cannot compile them."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--json", *flags]
    run = subprocess.run(
        command, env=inherited | (env or {}), capture_output=True, encoding="utf-8"
    )
    return run.returncode, [json.loads(line) for line in run.stdout.splitlines()], run.stderr


@pytest.fixture(scope="module")
def quick():
    status, reports, errors = compile_in_a_process_of_its_own()
    assert status == 0, errors + "\n".join(str(r) for r in reports if r["problems"])
    return reports


def check(reports, cases, needed=frozenset({80, 90})):
    """What holds for every kernel, compiled for the `needed` targets at least."""
    # Chunks are two kernels, decode and merge. A fused decode is called twice, without chunks and
    # with them. Every other case is one kernel.
    twice = ("chunks", "fused_decode")
    expected = sum(2 if case.kernel in twice else 1 for case in dict.fromkeys(cases))
    targets = {r["target"] for r in reports}
    assert needed <= targets <= SHARED_LIMIT_BYTES.keys()
    assert len(reports) == expected * len(targets)
    over = [r for r in reports if r["problems"] or r["stack_bytes"] > 64]
    assert over == []
    for r in reports:
        if r["kernel"] not in ("decode_kernel", "fused_decode_kernel", "prefill_kernel"):
            continue
        assert r["shared_bytes"] <= SHARED_LIMIT_BYTES[r["target"]]
        if r["dtype"] in ("float16", "bfloat16"):
            assert r["tensor_core_products"] >= 8, r
            # Rows of 128 bytes, 8 threads each; a table entry has 4 bytes.
            if r["head_dim"] == 64 and not r["int8"]:
                assert r["copies"]["16"] >= 16 and r["copies"].keys() <= {"4", "16"}, r


# ---- what ships ----------------------------------------------------------------------------------
def test_the_kernels_compile_for_every_target_and_stay_within_their_limits(quick):
    check(quick, QUICK)
    assert {r["target"] for r in quick} == set(known_targets())


def test_every_kernel_was_compiled(quick):
    names = {"decode_kernel", "merge_kernel", "prefill_kernel", "write_kv_kernel", "sample_kernel"}
    names |= {"fused_decode_kernel", "small_linear_kernel", "add_norm_kernel"}
    names |= {"simple_attention_kernel", "simple_write_kernel"}
    assert {r["kernel"] for r in quick} == names
    assert {r["dtype"] for r in quick} == {"float16", "bfloat16", "float32", "float64"}


def test_a_pool_of_int8_was_compiled_for_every_type_that_an_engine_takes(quick, monkeypatch):
    monkeypatch.setattr("speedups.quantized_kv.INTERPRETED", False)
    taken = set()
    for dtype in DTYPES:
        with suppress(ValueError):
            int8_kernels("triton", getattr(torch, dtype))
            taken.add(dtype)
    assert "bfloat16" in taken
    for kernel in ("decode_kernel", "prefill_kernel", "write_kv_kernel"):
        assert {r["dtype"] for r in quick if r["int8"] and r["kernel"] == kernel} == taken


def test_an_h100_multiplies_tiles_of_queries_with_the_instructions_made_for_it(quick):
    """wgmma multiplies 64 rows at a time, so the same tile takes fewer instructions than mma."""
    products = {
        r["target"]: r["tensor_core_products"]
        for r in quick
        if (r["call"], r["dtype"], r["head_dim"]) == ("prefill", "bfloat16", 64) and not r["int8"]
    }
    assert products[90] < products[80] / 4


def test_six_decode_programs_of_gpt2_fit_on_one_processor_of_the_gpu(quick):
    """65,536 registers for 128 threads a program, and 16 KB or so of shared memory each.

    Four programs over a pool in int8 fit: they widen its integers in registers.
    """
    decodes = ("decode", "fused_decode")
    rows = [r for r in quick if r["call"] in decodes and (r["dtype"], r["head_dim"]) == GPT2_IN_16]
    assert {r["int8"] for r in rows} == {False, True}
    for r in rows:
        programs = 4 if r["int8"] else 6
        assert programs * 128 * r["registers"] <= 65_536
        assert programs * r["shared_bytes"] <= SHARED_LIMIT_BYTES[r["target"]]


def test_two_sampling_programs_of_256_threads_find_registers_on_one_processor(quick):
    """A processor has 65,536: 264 rows of GPT-2's vocabulary are drawn at once on 132."""
    rows = [r for r in quick if r["kernel"] == "sample_kernel" and r["vocab_size"] > 50_000]
    assert {(r["target"], r["vocab_size"]) for r in rows} >= {(80, 50_257), (90, 50_257)}
    for r in rows:
        assert 2 * 256 * r["registers"] <= 65_536


def test_small_products_fetch_weights_ahead_16_bytes_at_a_time(quick):
    """And two programs have room on one processor: 132 of them share up to 200."""
    rows = [r for r in quick if r["call"] == "small_linear"]
    assert {r["rows"] for r in rows} == {1, 2, 8, 16}
    for r in rows:
        assert r["copies"]["16"] >= 8, r
        assert 2 * 128 * r["registers"] <= 65_536
        assert 2 * r["shared_bytes"] <= SHARED_LIMIT_BYTES[r["target"]]


def test_small_products_of_16_bits_and_many_rows_are_on_tensor_cores(quick):
    on = {
        (r["dtype"], r["rows"]): r["tensor_core_products"] > 0
        for r in quick
        if r["call"] == "small_linear"
    }
    assert on == {
        ("bfloat16", 1): False,
        ("bfloat16", 2): False,
        ("bfloat16", 8): True,
        ("float16", 16): True,
        ("float32", 16): False,
        ("float64", 2): False,
    }


@pytest.fixture
def other_triton():
    folder = os.environ.get("PAGEDGPT_OTHER_TRITON")
    if not folder:
        pytest.skip("PAGEDGPT_OTHER_TRITON is not set: it names a folder with another triton in it")
    if not (Path(folder) / "triton").is_dir():
        pytest.fail(f"PAGEDGPT_OTHER_TRITON is {folder}, which holds no triton")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}"}


def test_another_triton_compiles_the_same_kernels_within_the_same_limits(other_triton):
    status, reports, errors = compile_in_a_process_of_its_own(env=other_triton)
    assert status == 0, errors
    check(reports, QUICK)
    assert {r["triton"] for r in reports} != {triton.__version__}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["installed", "another"])
def test_all_head_sizes_types_and_block_sizes_compile_and_fit(which, request):
    env = request.getfixturevalue("other_triton") if which == "another" else None
    # Of a B200 the quick choice is enough, of another Triton the GPU with the least shared memory.
    targets = {80} if which == "another" else {80, 90}
    flags = ("--all", "--targets", *map(str, sorted(targets)))
    status, reports, errors = compile_in_a_process_of_its_own(*flags, env=env)
    assert status == 0, errors
    check(reports, FULL + QUICK, needed=targets)


# ---- the check can fail --------------------------------------------------------------------------
def test_a_tile_that_is_too_large_spills_and_is_reported():
    flags = ("--kernels", "prefill", "--head-sizes", "256", "--targets", "80")
    status, (report,), _ = compile_in_a_process_of_its_own(
        *flags, "--prefill-tiles", "64", "64", "4", "3"
    )
    assert status == 1
    assert report["stack_bytes"] > 64
    assert report["problems"] == [f"spills {report['stack_bytes']} bytes, at most 64 are harmless"]


@pytest.mark.parametrize(
    "target, stack_bytes, shared_bytes, found",
    [
        (90, 64, 232_448, []),
        (80, 0, 166_912, []),
        (90, 72, 0, ["spills 72 bytes, at most 64 are harmless"]),
        (90, 0, 232_449, ["wants 232449 bytes of shared memory, there are 232448"]),
        (80, 0, 166_913, ["wants 166913 bytes of shared memory, there are 166912"]),
    ],
)
def test_a_kernel_over_a_limit_is_a_problem(target, stack_bytes, shared_bytes, found):
    report = Report(
        *("decode_kernel", "decode", target, "bfloat16", 64, 16, 1),
        *(72, stack_bytes, shared_bytes, 32, {16: 32}, "3.7.1"),
    )
    assert problems(report) == found
