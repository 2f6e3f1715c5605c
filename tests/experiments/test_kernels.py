"""Kernels, sweep and ceilings: a contender that computes another result is never timed."""

import pytest
import torch
from rows import pick, run

from experiments import ceilings, kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY_KERNELS = "--heads 2 --head-dim 16 --layers 2 --pool-mb 1 --read-mb 8 --repeats 2 --threads 1"


# ---- ceilings ------------------------------------------------------------------------------------
def test_ceilings_reads_copies_and_multiplies(tmp_path, monkeypatch):
    assert ceilings.ROWS == [1, 2, 8, 64, 256]
    monkeypatch.setattr(ceilings, "PRODUCTS", {"QKV": (16, 48), "logits of 100": (16, 100)})
    rows = run(tmp_path, "ceilings --read-mb 8 --rows 1 4 --layers 2 --repeats 2 --threads 1")
    names = {row["contender"] for row in pick(rows, metric="bandwidth")}
    assert {"read, torch", "copy, torch"} <= names
    dtypes = {row["dtype"] for row in pick(rows, contender="QKV, 4 rows")}
    assert dtypes == ({"bfloat16"} if DEVICE.type == "cuda" else {"float32", "bfloat16"})


def test_a_layers_products_have_a_bias_and_the_logits_have_none(tmp_path, monkeypatch):
    given = []

    def linear(x, weight, bias=None):
        given.append((*weight.shape, None if bias is None else tuple(bias.shape)))
        return x.new_zeros(len(x), len(weight))

    monkeypatch.setattr(ceilings.F, "linear", linear)
    monkeypatch.setattr(ceilings, "PRODUCTS", {"QKV": (16, 48), "logits of 100": (16, 100)})
    run(tmp_path, "ceilings --read-mb 8 --rows 2 --dtypes float32 --layers 2 --repeats 1")
    assert set(given) == {(48, 16, (48,)), (100, 16, None)}


def test_contenders_run_in_turn_and_the_first_round_is_not_counted():
    order = []

    def contender(name):
        return lambda: order.append(name) or float(len(order))

    times = ceilings.in_turn({"a": contender("a"), "b": contender("b")}, repeats=2)
    assert order == ["a", "b"] * 3
    assert times == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


# ---- the kernel ladder ---------------------------------------------------------------------------
def world(B=3, T=21, num_queries=1, dtype=torch.float32, block_size=4, min_bytes=0):
    sizes = {"H": 2, "D": 16, "num_layers": 2, "seed": 0, "device": DEVICE, "dtype": dtype}
    setting = kernels.Setting(B, T, num_queries, block_size, **sizes)
    return kernels.World(setting, min_bytes)


def decode_contenders():
    return kernels.decode_contenders(DEVICE, chunk_len=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [4, 5, 64])
def test_every_contender_equals_the_oracle(dtype, block_size):
    shuffled = world(dtype=dtype, block_size=block_size, min_bytes=40_000)
    for name, (_, call) in decode_contenders().items():
        shuffled.check(name, lambda i, call=call: call(shuffled, i))
    prompts = world(num_queries=21, dtype=dtype, block_size=block_size)
    for name, (_, call) in kernels.prefill_contenders(DEVICE).items():
        prompts.check(name, lambda i, call=call: call(prompts, i))


@pytest.mark.parametrize("name", decode_contenders())
def test_a_contender_that_reads_a_wrong_block_fails_the_check(name):
    spoiled = world(min_bytes=40_000)
    _, call = decode_contenders()[name]
    last = len(spoiled.parts) - 1
    layer, number = spoiled.parts[last]

    def wrong(i):
        # One number of the memory that the call reads is another for as long as it runs.
        order = spoiled.tables_in_order if "in order" in name else spoiled.tables
        memory = spoiled.slabs[layer, 1, number, 0, 0, 0]
        if name != kernels.CONTIGUOUS:
            memory = spoiled.pool[layer, int(order[number, 0, 0]), 1, 0, 0]
        kept = memory.clone()
        memory += 1
        result = call(spoiled, i)
        memory.copy_(kept)
        return result

    with pytest.raises(ValueError, match="is wrong by"):
        spoiled.check(name, wrong)


def test_calls_go_through_more_memory_than_the_caches_hold():
    large = world(min_bytes=10**6)
    # 3 sequences x 21 tokens x 2 heads x 16 x 2 x 4 bytes = 16,128 bytes a call.
    assert large.setting.kv_bytes == 16_128
    assert len(large.parts) * large.setting.kv_bytes >= 10**6
    assert len(set(large.parts)) == len(large.parts) == 2 * large.num_sets
    ids = large.tables.flatten().tolist()
    assert sorted(ids) == list(range(len(ids))) and ids != sorted(ids)  # shuffled, none shared
    assert large.slabs.data_ptr() != large.pool.data_ptr()
    assert large.slabs[0, 0].numel() * 4 * 2 * 2 >= 10**6  # and so do the contiguous contender's


def test_the_ladder_has_all_contenders_with_their_figures(tmp_path):
    words = f"kernels --shapes 2x20 1x33 --prefill 2x19 --dtypes float32 --fit {TINY_KERNELS}"
    rows = run(tmp_path, words)
    expected = set(decode_contenders()) | {"gather alone"}
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
        assert ratios == expected - {kernels.CONTIGUOUS, "gather alone"}
    prompts = pick(rows, workload="prefill batch=2 context=19 block_size=16")
    assert {row["contender"] for row in prompts} == set(kernels.prefill_contenders(DEVICE))
    writes = pick(rows, metric="scatter bandwidth")
    assert {row["contender"] for row in writes} == set(kernels.writers(DEVICE))


def test_a_wrong_contender_stops_the_run_before_it_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "contiguous", lambda world, i: torch.zeros_like(world.q))
    with pytest.raises(SystemExit, match="contiguous library kernel is wrong by"):
        run(tmp_path, f"kernels --shapes 2x20 --prefill --dtypes float32 --fit {TINY_KERNELS}")


def test_a_writer_that_forgets_a_row_stops_the_run(tmp_path, monkeypatch):
    def forgets(k, v, k_cache, v_cache, slots):
        kernels.write_kv(k[1:], v[1:], k_cache, v_cache, slots[1:])

    monkeypatch.setattr(kernels, "writers", lambda device: {"write, torch": ("torch", forgets)})
    with pytest.raises(SystemExit, match="write, torch does not write what it is given"):
        run(tmp_path, f"kernels --shapes --prefill 1x8 --dtypes float32 --fit {TINY_KERNELS}")


def test_a_line_through_sizes_gives_what_a_call_and_a_byte_cost():
    # 10 us and 1000 GB/s: 100 MB take 0.11 ms.
    t0_us, bandwidth = kernels.fit_line([100_000_000, 300_000_000, 500_000_000], [0.11, 0.31, 0.51])
    assert (t0_us, bandwidth) == (pytest.approx(10), pytest.approx(1000))


@pytest.mark.parametrize("shape", ["32", "32x", "x256", "0x4", "32*256", "1x2x3"])
def test_what_is_no_shape_is_refused(tmp_path, shape):
    with pytest.raises(SystemExit, match="is no shape: write sequences x tokens"):
        run(tmp_path, f"kernels --shapes {shape} --prefill {TINY_KERNELS}")


def test_the_plain_triton_read_reads_all():
    pytest.importorskip("triton")
    numbers = torch.arange(64, dtype=torch.int32, device=DEVICE)
    sums = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    ceilings.sum_triton(numbers, sums)
    assert sums.tolist() == [120, 376, 632, 888]


def test_the_plain_numba_read_reads_all():
    pytest.importorskip("numba")
    from experiments.ceilings import sum_numba

    numbers = torch.zeros((1 << 18) * 2 + 3)
    numbers[[0, 1 << 18, -1]] = torch.tensor([1.0, 2.0, 4.0])
    assert sum_numba(numbers.numpy()) == 7.0


def test_a_contender_that_gives_nan_fails_the_check():
    some = world()
    with pytest.raises(ValueError, match="is wrong by nan"):
        some.check("nothing", lambda i: torch.full_like(some.q, torch.nan))
