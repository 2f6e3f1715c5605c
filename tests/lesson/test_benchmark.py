"""Each experiment, run small from the command line: rows are whole, contenders do equal work.

What is timed is checked before: a rung of the kernel ladder against the oracle, roads and peers
against each other's tokens and logits. So here each of those checks must also fail when it should.
"""

import argparse
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from rows import pick, run
from torch import nn

import benchmark
from checkpoints.load import load_model
from experiments import (
    anatomy,
    ceilings,
    continuous,
    kernels,
    peers,
    rungs,
    speed,
    transformers_loop,
)
from experiments.results import read
from experiments.transformers_loop import Theirs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY_KERNELS = "--heads 2 --head-dim 16 --layers 2 --pool-mb 1 --read-mb 8 --repeats 2 --threads 1"


# ---- the command line ----------------------------------------------------------------------------
def test_without_a_name_it_is_the_comparison_of_speed():
    assert benchmark.parse_args([]).command == "speed"
    args = benchmark.parse_args(["--batches", "1", "4"])
    assert (args.command, args.batches, args.out) == ("speed", [1, 4], "benchmark_results.csv")
    assert benchmark.parse_args(["kernels", "--layers", "3"]).layers == 3


def test_an_unknown_experiment_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse_args(["rods"])
    assert stopped.value.code == 2 and "'speed', 'memory'" in capsys.readouterr().err


@pytest.mark.parametrize("name", benchmark.EXPERIMENTS)
def test_help_explains_every_flag(name):
    parser = argparse.ArgumentParser()
    benchmark.EXPERIMENTS[name].add_arguments(parser)
    assert [action.dest for action in parser._actions if not action.help] == []


# The others: test_gpu_check.py.
@pytest.mark.parametrize("name", ["speed", "memory", "peers"])
def test_an_experiment_also_runs_by_itself(name):
    command = [sys.executable, "-m", f"experiments.{name}", "--help"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
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


@pytest.mark.slow
def test_an_interrupted_experiment_keeps_its_rows_and_shows_them(tmp_path, monkeypatch, capsys):
    whole = speed.run

    def interrupted(args):
        rows = whole(args)
        yield next(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "run", interrupted)
    tiny = "--batches 1 --prompt-tokens 3 --new-tokens 2 --repeats 1 --roads contiguous paged"
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, f"speed {tiny}")
    assert stopped.value.code == 130
    assert len(read(tmp_path / "rows.csv")) == 1
    assert "1 rows appended" in capsys.readouterr().out


# ---- books ---------------------------------------------------------------------------------------
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
    whole = transformers_loop.as_transformers

    def spoiled(model):
        theirs = whole(model)
        theirs.transformer.h[3].mlp.c_proj.bias.data[0] += 1
        return theirs

    monkeypatch.setattr(transformers_loop, "as_transformers", spoiled)
    with pytest.raises(SystemExit, match="the logits differ by"):
        run(tmp_path, f"peers --model {shipped_model_folder} --batches 2 {TINY_PEERS}")


def test_peers_refuses_what_the_model_has_no_positions_for(tmp_path, shipped_model_folder):
    pytest.importorskip("transformers")
    words = f"peers --model {shipped_model_folder} --prompt-tokens 1020 --steps 9"
    with pytest.raises(SystemExit, match="1020 prompt tokens and 9 steps: the model has 1024"):
        run(tmp_path, words)


def test_theirs_goes_on_from_a_copy_of_our_prompts_as_from_its_own(shipped_model_folder):
    pytest.importorskip("transformers")
    model = load_model(shipped_model_folder)
    args = benchmark.parse_args(["peers", "--prompt-tokens", "9", "--block-size", "4"])
    prompts, other = peers.random_prompts(model, 3, args), torch.tensor([[5, 6], [7, 8]])
    ours, theirs = peers.build(model, 3, 3, args), Theirs(transformers_loop.as_transformers(model))

    def written(prompts):
        theirs.start(prompts)
        scores = [theirs.next_ids, *(theirs.logits(theirs.next_ids) for _ in range(2))]
        theirs.finish()
        return scores

    alone = [written(prompts), written(other)]
    theirs.take_over(ours, prompts)
    assert not ours.llm.engine.has_unfinished()
    rows = []  # of tokens that went through their model
    theirs.model.register_forward_hook(lambda *call: rows.append(call[2].logits.shape[0]))
    # Twice, since a round must not change what the next one begins with.
    together = [written(prompts), written(prompts), written(other)]
    assert rows == [3, 3, 3, 3, 2, 2, 2], "the copied prompts were computed again"
    torch.testing.assert_close(together, [alone[0], *alone], atol=1e-3, rtol=0)


@pytest.mark.parametrize("experiment", ["peers", "anatomy"])
def test_without_transformers_its_peers_say_so(experiment, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="transformers is not installed"):
        run(tmp_path, experiment)


# ---- anatomy -------------------------------------------------------------------------------------
def anatomy_args(words):
    return benchmark.parse_args(["anatomy", *words.split()])


def test_anatomy_times_a_step_its_parts_and_what_is_possible(tmp_path, shipped_model_folder):
    pytest.importorskip("transformers")
    sizes = "--batches 2 --prompt-tokens 9 --steps 4 --rounds 2 --read-mb 8 --dtypes float32"
    rows = run(tmp_path, f"anatomy --model {shipped_model_folder} {sizes}")
    assert {row["workload"] for row in rows} == {"decode batch=2 context=9..13 block_size=16"}
    ms = {row["contender"]: row["median"] for row in pick(rows, unit="ms")}
    parts = ["products", "attention", "small operations", "forward", "KV read once"]
    assert list(ms) == [peers.OURS, peers.THEIRS, *parts]
    shares = {row["contender"]: row["median"] for row in pick(rows, unit="%")}
    assert shares == {part: pytest.approx(100 * ms[part] / ms[peers.OURS]) for part in parts}
    (alone,) = pick(rows, contender="at most: the products alone")
    assert alone["median"] == pytest.approx(ms[peers.THEIRS] / ms["products"])
    (with_read,) = pick(rows, contender="at most: products and one read of KV")
    assert with_read["median"] < alone["median"]
    (as_it_is,) = pick(rows, contender="products and attention alone")
    both = ms["products"] + ms["attention"]
    assert as_it_is["median"] == pytest.approx(ms[peers.THEIRS] / both)


def test_the_blocks_that_anatomy_reads_are_those_of_one_step_half_way(shipped_model_folder):
    args = anatomy_args("--batches 3 --prompt-tokens 30 --steps 8 --block-size 4")
    ours = peers.build(load_model(shipped_model_folder), 3, 9, args)
    batch = anatomy.middle_batch(ours, 3, args)
    assert batch.context_lens.tolist() == [34, 34, 34]  # 30 of the prompt, 4 of 8 steps
    assert batch.positions.tolist() == [33, 33, 33]
    tables = batch.block_tables.tolist()
    assert [len(table) for table in tables] == [9, 9, 9]  # 34 tokens, 4 a block
    assert len({block_id for table in tables for block_id in table}) == 27
    assert max(map(max, tables)) < ours.llm.config.num_blocks


def test_the_products_of_anatomy_are_all_of_the_models_matrices(shipped_model_folder):
    model = load_model(shipped_model_folder)
    args = anatomy_args("--batches 2 --prompt-tokens 9 --steps 2")
    ours = peers.build(model, 2, 3, args)
    parts = anatomy.parts_of(ours, anatomy.middle_batch(ours, 2, args))
    rows_through = {}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in linears:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: rows_through.setdefault(name, len(args[0]))
        )
    with torch.inference_mode():
        parts["products"](0)
    assert rows_through == dict.fromkeys(linears, 2)


# ---- transformers' other ways --------------------------------------------------------------------
def other_peers(shipped_model_folder, words):
    return f"peers --model {shipped_model_folder} --prefill 0 {TINY_PEERS} {words}"


def test_static_and_continuous_run_in_the_same_rounds_if_they_are_asked_for(
    tmp_path, shipped_model_folder
):
    pytest.importorskip("transformers")
    words = other_peers(shipped_model_folder, "--batches 3 --also static continuous")
    rows = run(tmp_path, words)
    assert {row["workload"] for row in rows} == {"decode batch=3 context=9..11 block_size=16"}
    names = [peers.OURS, peers.THEIRS, peers.STATIC, peers.CONTINUOUS]
    steps = pick(rows, metric="time a step")
    # 2 rounds of 2 steps each: the same number of tokens for all.
    assert [(row["contender"], row["repeats"]) for row in steps] == [(name, 4) for name in names]
    ratios = pick(rows, unit="x")
    assert {row["contender"] for row in ratios} == {peers.OURS}
    assert [row["metric"] for row in ratios] == [f"speed against {name}" for name in names[1:]]
    (resolved,) = {row["backend"] for row in pick(rows, contender=peers.CONTINUOUS)}
    # 3 sequences of 9 + 2 + 1 tokens: a block each, twice, and one; 36 tokens in a step.
    assert resolved.startswith("torch, sdpa, page_size=16, num_blocks=7, max_batch_tokens=36, ")


def test_a_static_cache_holds_what_is_needed_and_the_other_one_grows(shipped_model_folder):
    pytest.importorskip("transformers")
    model = transformers_loop.as_transformers(load_model(shipped_model_folder))
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10]])
    dynamic, static = Theirs(model), Theirs(model, length=5)
    for theirs in (dynamic, static):
        theirs.start(prompts)
        theirs.step()
    assert dynamic.cache.layers[0].keys.shape == (2, 4, 4, 64)  # 3 of the prompt and 1 more
    assert static.cache.layers[0].keys.shape == (2, 4, 5, 64)
    assert dynamic.next_ids.tolist() == static.next_ids.tolist()


def test_continuous_batching_with_other_weights_is_refused(
    tmp_path, monkeypatch, shipped_model_folder
):
    pytest.importorskip("transformers")
    whole, made = transformers_loop.as_transformers, []

    def second_is_spoiled(model):
        made.append(whole(model))
        if len(made) == 2:  # the manager's; the first is the one that both are checked against
            made[1].transformer.ln_f.bias.data += torch.linspace(-9, 9, model.config.n_embd)
        return made[-1]

    monkeypatch.setattr(transformers_loop, "as_transformers", second_is_spoiled)
    with pytest.raises(SystemExit, match="continuous batching chose a token of which the score is"):
        run(tmp_path, other_peers(shipped_model_folder, "--batches 2 --also continuous"))


def test_all_prompts_of_continuous_batching_start_in_one_step(shipped_model_folder, monkeypatch):
    pytest.importorskip("transformers")
    model = transformers_loop.as_transformers(load_model(shipped_model_folder))
    prompts = torch.randint(512, (4, 9), generator=torch.Generator().manual_seed(0))
    with continuous.Continuous(model, batch=4, length=16, block_size=4) as manager:
        add = manager.manager.add_request

        def slow(*arguments, **options):
            time.sleep(0.2)  # long enough for the first to be served before the last has come
            return add(*arguments, **options)

        monkeypatch.setattr(manager.manager, "add_request", slow)
        outputs = manager.generate(prompts, 6)
        again = manager.generate(prompts, 6)  # the manager lives on
        assert len(manager.time_steps(prompts, 3)) == 3
        # Or the second round would find its prompts computed.
        assert manager.manager.continuous_batching_config.allow_block_sharing is False
    assert [len(output.generated_tokens) for output in outputs] == [6] * 4
    assert [output.generated_tokens for output in again] == [o.generated_tokens for o in outputs]
    # The first tokens of all come before the second token of any.
    firsts, seconds = zip(*(output.timestamps[:2] for output in outputs), strict=True)
    assert max(firsts) < min(seconds)
    assert not manager.manager.is_running()


def test_the_number_of_threads_is_what_was_asked_for():
    # In a process of its own: numba's first call starts its threads and changes PyTorch's number.
    code = "from experiments.ceilings import set_threads; import torch\n"
    code += "set_threads(1); print(torch.get_num_threads()); set_threads(2)\n"
    code += "print(torch.get_num_threads()); set_threads(1); print(torch.get_num_threads())"
    command = [sys.executable, "-c", code]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert found.stdout.split() == ["1", "2", "1"], found.stderr
