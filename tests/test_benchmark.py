"""Each experiment, run small from the command line: rows are whole, contenders do equal work.

What is timed is checked before: a rung of the kernel ladder against the oracle, roads and peers
against each other's tokens and logits. So here each of those checks must also fail when it should.
"""

import argparse
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import benchmark
from experiments import ceilings, kernels, peers, roads, rungs
from results import read

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY_KERNELS = "--heads 2 --head-dim 16 --layers 2 --pool-mb 1 --read-mb 8 --repeats 2 --threads 1"


def run(tmp_path, words):
    """`python benchmark.py words`; returns the rows that were appended."""
    out = tmp_path / "rows.csv"
    benchmark.main([*words.split(), "--out", str(out)])
    return read(out)


def pick(rows, **values):
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


# ---- the command line ----------------------------------------------------------------------------
def test_without_a_name_it_is_the_comparison_of_roads():
    assert benchmark.parse_args([]).command == "roads"
    args = benchmark.parse_args(["--batches", "1", "4"])
    assert (args.command, args.batches, args.out) == ("roads", [1, 4], "benchmark_results.csv")
    assert benchmark.parse_args(["kernels", "--layers", "3"]).layers == 3


def test_an_unknown_experiment_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse_args(["rods"])
    assert stopped.value.code == 2 and "'roads', 'kernels'" in capsys.readouterr().err


@pytest.mark.parametrize("name", benchmark.EXPERIMENTS)
def test_help_explains_every_flag(name):
    parser = argparse.ArgumentParser()
    benchmark.EXPERIMENTS[name].add_arguments(parser)
    assert [action.dest for action in parser._actions if not action.help] == []


@pytest.mark.parametrize("name", ["roads", "peers"])  # the others: test_gpu_check.py
def test_an_experiment_also_runs_by_itself(name):
    command = [sys.executable, ROOT / "experiments" / f"{name}.py", "--help"]
    found = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert found.returncode == 0 and "--out" in found.stdout, found.stderr


def test_verify_says_how_many_rows_are_whole(tmp_path, capsys):
    run(tmp_path, "bookkeeping --repeats 1 --running 4 --waiting 0")
    capsys.readouterr()
    benchmark.main(["verify", str(tmp_path / "rows.csv")])
    assert capsys.readouterr().out.endswith("rows.csv: 2 rows, whole\n")


def test_verify_names_the_line_and_the_reason(tmp_path):
    run(tmp_path, "bookkeeping --repeats 1 --running 4 --waiting 0")
    path = tmp_path / "rows.csv"
    path.write_text(path.read_text().replace(",ms,", ",ms,0,"))
    with pytest.raises(SystemExit, match="rows.csv, line 3: 25 cells, 24 columns"):
        benchmark.main(["verify", str(path)])


def test_an_interrupted_experiment_keeps_its_rows_and_shows_them(tmp_path, monkeypatch, capsys):
    whole = roads.run

    def interrupted(args):
        rows = whole(args)
        yield next(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(roads, "run", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "roads --batches 1 --prompt-tokens 3 --new-tokens 2 --repeats 1")
    assert stopped.value.code == 130
    assert len(read(tmp_path / "rows.csv")) == 1
    assert "1 rows appended" in capsys.readouterr().out


# ---- roads and books -----------------------------------------------------------------------------
def test_roads_compares_three_of_them_on_the_shipped_model(tmp_path):
    words = "--batches 1 3 --no-cache-up-to 1 --prompt-tokens 5 --new-tokens 4 --repeats 2"
    rows = run(tmp_path, words)
    assert len(rows) == 5 + 3
    for batch, names in ((1, {"contiguous", "paged", "no cache"}), (3, {"contiguous", "paged"})):
        workload = f"batch={batch} prompt=5 new=4 block_size=16"
        found = pick(rows, workload=workload, metric="generated tokens")
        assert {row["contender"] for row in found} == names
        for row in found:
            assert row["min"] > 0 and row["repeats"] == 2
            assert (row["model"], row["weights"]) == ("tiny-gpt2", "trained weights")
        ratios = pick(rows, workload=workload, unit="x")
        assert {row["contender"] for row in ratios} == names - {"contiguous"}


def test_a_road_that_writes_other_tokens_fails_the_run(tmp_path, monkeypatch):
    wrong = [[1, 2]]
    monkeypatch.setattr(roads, "generate_paged", lambda llm, prompts, max_tokens: wrong)
    with pytest.raises(SystemExit, match="paged wrote 1 of 1 differently"):
        run(tmp_path, "roads --batches 1 --prompt-tokens 3 --new-tokens 2 --repeats 1")


def test_the_number_of_threads_is_what_it_was_before(tmp_path):
    before = torch.get_num_threads()
    run(tmp_path, "--threads 2 --batches 1 --prompt-tokens 3 --new-tokens 2 --repeats 1")
    assert torch.get_num_threads() == before


def test_bookkeeping_times_the_allocator_and_the_scheduler(tmp_path):
    rows = run(tmp_path, "bookkeeping --repeats 2 --running 4 --waiting 0 9")
    assert [row["workload"] for row in rows[1:]] == ["running=4 waiting=0", "running=4 waiting=9"]
    assert (rows[0]["unit"], rows[0]["repeats"], rows[1]["repeats"]) == ("blocks/s", 2, 2)


# ---- ceilings ------------------------------------------------------------------------------------
def test_ceilings_reads_copies_and_multiplies(tmp_path, monkeypatch):
    monkeypatch.setattr(ceilings, "PRODUCTS", {"QKV": (16, 48), "logits": (16, 100)})
    rows = run(tmp_path, "ceilings --read-mb 8 --rows 1 4 --layers 2 --repeats 2 --threads 1")
    names = {row["contender"] for row in pick(rows, metric="bandwidth")}
    assert {"read, torch", "copy, torch"} <= names
    dtypes = {row["dtype"] for row in pick(rows, contender="QKV, 4 rows")}
    assert dtypes == ({"bfloat16"} if DEVICE.type == "cuda" else {"float32", "bfloat16"})


def test_contenders_run_in_turn_and_the_first_round_is_not_counted():
    order = []

    def contender(name):
        return lambda: order.append(name) or float(len(order))

    times = ceilings.in_turn({"a": contender("a"), "b": contender("b")}, repeats=2)
    assert order == ["a", "b"] * 3
    assert times == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


# ---- the kernel ladder ---------------------------------------------------------------------------
def world(B=3, T=21, num_queries=1, dtype=torch.float32, block_size=4, least_bytes=0):
    sizes = {"H": 2, "D": 16, "num_layers": 2, "seed": 0, "device": DEVICE, "dtype": dtype}
    setting = rungs.Setting(B, T, num_queries, block_size, **sizes)
    return rungs.World(setting, least_bytes)


def decode_rungs():
    return rungs.decode_rungs(DEVICE, chunk_len=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [4, 5, 64])
def test_every_rung_equals_the_oracle(dtype, block_size):
    shuffled = world(dtype=dtype, block_size=block_size, least_bytes=40_000)
    for name, (_, call) in decode_rungs().items():
        shuffled.check(name, lambda i, call=call: call(shuffled, i))
    prompts = world(num_queries=21, dtype=dtype, block_size=block_size)
    for name, (_, call) in rungs.prefill_rungs(DEVICE).items():
        prompts.check(name, lambda i, call=call: call(prompts, i))


@pytest.mark.parametrize("name", decode_rungs())
def test_a_rung_that_reads_a_wrong_block_fails_the_check(name):
    spoiled = world(least_bytes=40_000)
    _, call = decode_rungs()[name]
    last = len(spoiled.places) - 1
    layer, number = spoiled.places[last]

    def wrong(i):
        # One number of the memory that the call reads is another for as long as it runs.
        order = spoiled.tables_in_order if "in order" in name else spoiled.tables
        memory = spoiled.slabs[layer, 1, number, 0, 0, 0]
        if name != rungs.CONTIGUOUS:
            memory = spoiled.pool[layer, int(order[number, 0, 0]), 1, 0, 0]
        kept = memory.clone()
        memory += 1
        result = call(spoiled, i)
        memory.copy_(kept)
        return result

    with pytest.raises(ValueError, match="is wrong by"):
        spoiled.check(name, wrong)


def test_a_rung_that_gives_nan_fails_the_check():
    some = world()
    with pytest.raises(ValueError, match="is wrong by nan"):
        some.check("nothing", lambda i: torch.full_like(some.q, torch.nan))


def test_calls_go_through_more_memory_than_the_caches_hold():
    large = world(least_bytes=10**6)
    # 3 sequences x 21 tokens x 2 heads x 16 x 2 x 4 bytes = 16,128 bytes a call.
    assert large.setting.kv_bytes == 16_128
    assert len(large.places) * large.setting.kv_bytes >= 10**6
    assert len(set(large.places)) == len(large.places) == 2 * large.num_sets
    ids = large.tables.flatten().tolist()
    assert sorted(ids) == list(range(len(ids))) and ids != sorted(ids)  # shuffled, none shared
    assert large.slabs.data_ptr() != large.pool.data_ptr()
    assert large.slabs[0, 0].numel() * 4 * 2 * 2 >= 10**6  # and so do the contiguous contender's


def test_the_ladder_has_all_its_rungs_with_their_figures(tmp_path):
    words = f"kernels --shapes 2x20 1x33 --prefill 2x19 --dtypes float32 --fit {TINY_KERNELS}"
    rows = run(tmp_path, words)
    expected = set(decode_rungs()) | {"gather alone"}
    for workload in ("batch=2 context=20 block_size=16", "batch=1 context=33 block_size=16"):
        found = pick(rows, workload=workload)
        (reading,) = pick(found, metric="bandwidth")
        assert reading["contender"].startswith("read, ")
        timed = pick(found, metric="time a call")
        assert {row["contender"] for row in timed} == expected
        for row in timed:
            (rate,) = pick(found, contender=row["contender"], metric="KV bandwidth")
            (share,) = pick(found, contender=row["contender"], metric="share of the read")
            B, T = (2, 20) if "batch=2" in workload else (1, 33)
            assert rate["max"] == pytest.approx(2 * B * T * 2 * 16 * 4 / row["min"] / 1e6)
            assert share["median"] == pytest.approx(100 * rate["median"] / reading["median"])
        ratios = {row["contender"] for row in pick(found, unit="x")}
        assert ratios == expected - {rungs.CONTIGUOUS, "gather alone"}
    prompts = pick(rows, workload="prefill batch=2 context=19 block_size=16")
    assert {row["contender"] for row in prompts} == set(rungs.prefill_rungs(DEVICE))
    writes = pick(rows, metric="scatter bandwidth")
    assert {row["contender"] for row in writes} == set(rungs.writers(DEVICE))


def test_a_wrong_rung_stops_the_run_before_it_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(rungs, "contiguous", lambda world, i: torch.zeros_like(world.q))
    with pytest.raises(SystemExit, match="contiguous library kernel is wrong by"):
        run(tmp_path, f"kernels --shapes 2x20 --prefill --dtypes float32 --fit {TINY_KERNELS}")


def test_a_writer_that_forgets_a_row_stops_the_run(tmp_path, monkeypatch):
    def forgets(k, v, k_cache, v_cache, slots):
        rungs.write_kv(k[1:], v[1:], k_cache, v_cache, slots[1:])

    monkeypatch.setattr(kernels, "writers", lambda device: {"write, torch": ("torch", forgets)})
    with pytest.raises(SystemExit, match="write, torch does not write what it is given"):
        run(tmp_path, f"kernels --shapes --prefill 1x8 --dtypes float32 --fit {TINY_KERNELS}")


def test_a_line_through_sizes_gives_what_a_call_and_a_byte_cost():
    # 10 us and 1000 GB/s: 100 MB take 0.11 ms.
    t0_us, bandwidth = kernels.fit_line([100_000_000, 300_000_000, 500_000_000], [0.11, 0.31, 0.51])
    assert (t0_us, bandwidth) == (pytest.approx(10), pytest.approx(1000))


def test_the_fit_is_a_row(tmp_path):
    words = f"kernels --shapes --prefill --fit 1x16 2x64 --dtypes float32 {TINY_KERNELS}"
    if rungs.BEST[DEVICE.type] not in decode_rungs():
        pytest.skip("no compiled kernel on this machine")
    metrics = [row["metric"] for row in run(tmp_path, words)]
    assert metrics == ["t0", "bandwidth", "share of the read"]


@pytest.mark.parametrize("shape", ["32", "32x", "x256", "0x4", "32*256", "1x2x3"])
def test_what_is_no_shape_is_refused(tmp_path, shape):
    with pytest.raises(SystemExit, match="is no shape: write sequences x tokens"):
        run(tmp_path, f"kernels --shapes {shape} --prefill {TINY_KERNELS}")


def test_the_plain_triton_rung_equals_the_oracle_and_the_read_kernel_reads_all():
    pytest.importorskip("triton")
    from experiments.rungs_triton import per_head_triton, sum_triton

    for block_size in (3, 16):
        some = world(B=2, T=9, block_size=block_size)
        for i in range(len(some.places)):
            result = per_head_triton(some.q, *some.caches(i), some.lens, some.setting.scale)
            torch.testing.assert_close(result.double(), some.expected(i, False), atol=1e-5, rtol=0)
    numbers = torch.arange(64, dtype=torch.int32, device=DEVICE)
    sums = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    sum_triton(numbers, sums)
    assert sums.tolist() == [120, 376, 632, 888]


def test_the_plain_numba_read_reads_all():
    pytest.importorskip("numba")
    from experiments.rungs_numba import sum_numba

    numbers = torch.zeros((1 << 18) * 2 + 3)
    numbers[[0, 1 << 18, -1]] = torch.tensor([1.0, 2.0, 4.0])
    assert sum_numba(numbers.numpy()) == 7.0


def test_the_plain_triton_rungs_compile_for_gpus_that_are_not_here():
    pytest.importorskip("triton")
    code = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from experiments.rungs_triton import empty_kernel, per_head_triton, sum_triton

class NoGPU:  # all that a launch which only compiles asks of a driver
    def __init__(self, target): self.target = target
    def get_current_target(self): return self.target
    def get_current_device(self): return self.target.arch
    def get_current_stream(self, device=None): return 0

compiled = []
JITFunction.__getitem__ = lambda kernel, grid: lambda *arguments, **options: compiled.append(
    kernel.warmup(*arguments, grid=grid, **options))
def empty(*shape, dtype=torch.bfloat16): return torch.empty(shape, dtype=dtype, device="meta")
int32 = {"dtype": torch.int32}
for capability in (80, 90):
    triton.runtime.driver.set_active(NoGPU(GPUTarget("cuda", capability, 32)))
    pool = empty(9, 2, 12, 16, 64)
    tables, lens = empty(4, 8, **int32), empty(4, **int32)
    per_head_triton(empty(4, 12, 64), pool[:, 0], pool[:, 1], tables, lens, 0.125)
    sum_triton(empty(1 << 20, **int32), empty(128, **int32))
    empty_kernel[(1,)](empty(1))
print([kernel.metadata.name for kernel in compiled if kernel.asm["cubin"]])
"""
    env = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    names = ["per_head_kernel", "read_kernel", "empty_kernel"]
    assert found.stdout == f"{names * 2}\n", found.stderr


# ---- peers ---------------------------------------------------------------------------------------
TINY_PEERS = "--dtypes float32 --prompt-tokens 9 --steps 2 --rounds 2 --repeats 2"


def test_peers_times_the_engine_and_transformers_on_equal_work(tmp_path, shipped_model_folder):
    pytest.importorskip("transformers")
    words = f"peers --model {shipped_model_folder} --batches 1 3 --prefill 2 {TINY_PEERS}"
    rows = run(tmp_path, words)
    for workload in ("decode batch=1 context=9..11", "decode batch=3 context=9..11"):
        found = pick(rows, workload=f"{workload} block_size=16", metric="time a step")
        assert [(row["contender"], row["repeats"]) for row in found] == [
            (peers.OURS, 2 * 2),
            (peers.THEIRS, 2 * 2),
        ]
    assert len(pick(rows, unit="x", contender=peers.OURS)) == 3
    (ours, theirs) = pick(rows, workload="prefill batch=2 prompt=9 block_size=16", unit="ms")
    (ratio,) = pick(rows, workload="prefill batch=2 prompt=9 block_size=16", unit="x")
    assert ratio["median"] == pytest.approx(theirs["median"] / ours["median"])


def test_peers_with_other_weights_are_refused(tmp_path, monkeypatch, shipped_model_folder):
    pytest.importorskip("transformers")
    whole = peers.as_transformers

    def spoiled(model):
        theirs = whole(model)
        theirs.transformer.h[3].mlp.c_proj.bias.data[0] += 1
        return theirs

    monkeypatch.setattr(peers, "as_transformers", spoiled)
    with pytest.raises(SystemExit, match="the logits differ by"):
        run(tmp_path, f"peers --model {shipped_model_folder} --batches 2 {TINY_PEERS}")


def test_peers_refuses_what_the_model_has_no_positions_for(tmp_path, shipped_model_folder):
    pytest.importorskip("transformers")
    words = f"peers --model {shipped_model_folder} --prompt-tokens 1020 --steps 9"
    with pytest.raises(SystemExit, match="1020 prompt tokens and 9 steps: the model has 1024"):
        run(tmp_path, words)


def test_without_transformers_peers_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="transformers is not installed"):
        run(tmp_path, "peers")
