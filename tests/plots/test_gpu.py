"""The GPU's tables: known rows give known cells, and what is not measured leaves a mark."""

from experiments import latency, names, peers
from plots import gpu, tables

REQUESTS = "requests=256 prompts and texts of 64..512 tokens"
DYNAMIC, CONTINUOUS = "transformers DynamicCache", "transformers continuous batching"


def row(contender, metric, workload, median, unit="ms", repeats=3):
    found = {"contender": contender, "metric": metric, "workload": workload, "median": median}
    found |= {"min": 0.5 * median, "max": 2 * median, "unit": unit, "repeats": repeats}
    return found | {"dtype": "bfloat16", "device": "a GPU", "model": "m"}


def decode(contender, metric, B, T, median, **more):
    return row(contender, metric, f"decode batch={B} context={T} block_size=16", median, **more)


def engine_rows():
    """A step of 1 row, of which small linears are the fastest way, and one of 256."""
    steps = {
        (256, 512): {"byte floor": 1.5, "recorded": 3.0, "recorded, fused": 2.0},
        (1, 128): {"byte floor": 0.1, "recorded": 0.8, "recorded, fused": 0.5,
                   "recorded, fused, small linears": 0.4, "recorded, contiguous": 0.7},
    }  # fmt: skip
    rows = [
        decode(name, "time a step", B, T, ms)
        for (B, T), times in steps.items()
        for name, ms in times.items()
    ]
    rows += [
        decode("recorded", "speed against recorded, contiguous", 1, 128, 0.875, unit="x"),
        decode("recorded", "token to token", 1, 128, 1.0),
        decode("recorded, fused, ahead", "token to token", 1, 128, 0.625),
        decode("recorded, fused, ahead", "token to token", 256, 512, 4.0),
    ]
    return rows


def served_rows():
    more = {"unit": "tokens/s"}
    against = {"unit": "x", "workload": REQUESTS, "metric": "speed against serial"}
    return [
        row("serial", "output tokens", REQUESTS, 2000.0, **more),
        row("one step ahead, fused", "output tokens", REQUESTS, 3000.0, **more),
        row("one step ahead, fused", median=1.5, **against),
        row("serial", "prompt tokens", "prefill batch=16 prompt=512", 8.192e6, **more),
    ]


def peer_rows():
    """Ours beside transformers', of a run in which ours was timed once."""
    more = {"unit": "x", "repeats": 1}
    ours = "recorded, fused, ahead"
    return [
        decode(ours, "token to token", 1, 128, 0.9, repeats=1),
        decode(DYNAMIC, "token to token", 1, 128, 9.0, repeats=1),
        decode(ours, f"speed against {DYNAMIC}", 1, 128, 10.0, **more),
        row(CONTINUOUS, "output tokens", REQUESTS, 500.0, unit="tokens/s", repeats=1),
        row("one step ahead, fused", f"speed against {CONTINUOUS}", REQUESTS, 5.0, **more),
    ]


# ---- which figure --------------------------------------------------------------------------------
def test_of_a_figure_the_rows_with_more_repeats_count_and_of_these_the_newest():
    rows = [
        decode("recorded", "time a step", 1, 128, ms, repeats=repeats)
        for ms, repeats in ((1.0, 3), (2.0, 3), (3.0, 1))
    ]
    (found,) = gpu.chosen(rows)
    assert found["median"] == 2.0
    assert len(gpu.chosen([*rows, decode("recorded", "time a step", 2, 128, 1.0)])) == 2


def test_a_shape_is_that_of_a_decode_and_of_attention_and_of_no_other_workload():
    assert gpu.shape_of("decode batch=64 context=512 block_size=16") == (64, 512)
    assert gpu.shape_of("batch=1 context=1024 block_size=16") == (1, 1024)
    for workload in ("profile batch=1 context=128", "prefill batch=16 prompt=512", REQUESTS):
        assert gpu.shape_of(workload) is None


def test_the_contenders_are_those_of_the_experiments():
    assert (gpu.RECORDED, gpu.FUSED, gpu.SMALL) == (names.RECORDED, names.FUSED, names.SMALL)
    assert names.AHEAD_OF == gpu.AHEAD and names.CONTIGUOUS == gpu.SLABS
    assert (gpu.SERIAL, gpu.BEST_WAY) == (names.SERIAL, names.AHEAD_FUSED)
    assert latency.FLOOR == gpu.FLOOR
    theirs = [latency.DYNAMIC, latency.GENERATE, latency.COMPILED, peers.CONTINUOUS]
    assert all(name.startswith(gpu.PEER) for name in theirs)


# ---- the engine's tables -------------------------------------------------------------------------
def test_a_step_stands_beside_its_floor_and_a_way_without_a_row_is_a_dash():
    head, lines = gpu.steps(engine_rows())
    assert head.count("|") == lines[0].count("|") == 7
    assert lines == [
        "1 sequence of 128 tokens | 0.100 | 0.800 | 0.500 | 0.400 | 0.700 | 25% | 0.875",
        "256 sequences of 512 tokens | 1.500 | 3.000 | 2.000 | - | - | 75% | -",
    ]


def test_the_forwards_part_is_of_the_way_with_the_shortest_time_from_token_to_token():
    head, lines = gpu.tokens(engine_rows())
    assert head.count("|") == lines[0].count("|")
    # One sequence: fused, ahead is the shortest. Its forward takes 0.5 of 0.625 ms.
    assert lines == [
        "1 sequence of 128 tokens | 1.000 | - | - | - | 0.625 | - | 80%",
        "256 sequences of 512 tokens | - | - | - | - | 4.000 | - | 50%",
    ]


def test_requests_have_the_spread_of_their_rounds_and_prompts_no_ratio():
    _, lines = gpu.requests([*served_rows(), *peer_rows()])
    assert lines == [
        "serial | 2,000 | 1,000 | 4,000 | 1.00",
        "one step ahead, fused | 3,000 | 1,500 | 6,000 | 1.50",
        "serial, 16 prompts of 512 tokens alone | 8,192,000 | 4,096,000 | 16,384,000 | -",
        "transformers continuous batching | 500 | 250 | 1,000 | -",
    ]


def test_transformers_stand_beside_ours_of_the_same_run():
    _, lines = gpu.transformers([*engine_rows(), *served_rows(), *peer_rows()])
    assert lines == [
        "DynamicCache | recorded, fused, ahead | 1 sequence of 128 tokens | 9.000 ms | 0.900 ms "
        "| 10.0",
        "continuous batching | one step ahead, fused | 256 requests | 500 tokens/s "
        "| 2,500 tokens/s | 5.0",
    ]


def test_a_profile_has_a_line_for_each_way_and_shape():
    profile = "profile batch=256 context=128"
    rows = [
        row("serial", "kernels a step", profile, 138.0),
        row("serial", "waits a step", profile, 1.0),
        row("serial", "device idle", profile, 56.9),
        row("one step ahead", "waits a step", profile, 0.5),
    ]
    _, lines = gpu.profile([*rows, *engine_rows()])
    assert lines == [
        "256 sequences of 128 tokens, serial | 138 | - | 1 | - | 57%",
        "256 sequences of 128 tokens, one step ahead | - | - | 0.5 | - | -",
    ]


# ---- kernels and ceilings ------------------------------------------------------------------------
def test_attention_is_shown_with_its_share_of_the_read_and_its_line_through_the_sizes():
    at = "batch=64 context=512 block_size=16"
    line = "t0 + bytes / bandwidth over 32x512,64x512 block_size=16"
    rows = [row("read, triton", "bandwidth", at, 4600.0)]
    for name, ms, share in (("tiles over blocks", 0.025, 87.4), ("contiguous", 0.02, 99.6)):
        rows += [row(name, "time a call", at, ms), row(name, "share of the read", at, share)]
    for metric, value in (("t0", 3.46), ("bandwidth", 4123.0), ("share of the read", 89.6)):
        rows.append(row("tiles over blocks", metric, line, value))
    head, lines = gpu.kernels(rows)
    assert head == "a call, share of a plain read | tiles over blocks | contiguous"
    assert lines == ["64 sequences of 512 tokens | 25.0 us, 87% | 20.0 us, 100%"]
    _, lines = gpu.fit(rows)
    assert lines == ["tiles over blocks, 32x512, 64x512 | 3.5 us | 4,123 GB/s | 90%"]


def test_ceilings_are_rates_and_a_launch_and_products_by_rows():
    rows = [row("read, torch", "bandwidth", "memory MB=8192", 4321.0, unit="GB/s"),
            row("empty kernel", "time a launch", "calls=1000", 1.256, unit="us")]  # fmt: skip
    for size, ms in ((1, 0.004), (256, 0.008)):
        rows.append(row(f"QKV, {size} rows", "time a call", "products", ms))
        rows.append(row(f"QKV, {size} rows", "operations", "products", 100.0 * size))
        rows.append(row(f"QKV, {size} rows", "weight bandwidth", "products", 99.0))
    assert gpu.ceilings(rows)[1] == ["read, torch | 4,321 GB/s", "empty kernel | 1.26 us"]
    head, lines = gpu.products(rows)
    assert head == "us a product | 1 row | 256 rows | TFLOP/s, 256 rows"
    assert lines == ["QKV | 4.0 | 8.0 | 25600"]


def test_a_table_without_rows_names_the_command_that_measures_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    for name, (_, _, stage) in gpu.TABLES.items():
        (line,) = tables.of_gpu(name)
        assert line == f"Not measured yet: `python -m experiments.gpu_check --only {stage}`."
    assert gpu.findings() == [] and gpu.runs() == []


# ---- sentences -----------------------------------------------------------------------------------
def test_what_is_ahead_and_what_is_behind():
    rows = [*engine_rows(), *served_rows(), *peer_rows()]
    rows.append(decode("recorded, fused, small linears", "time a step", 4, 128, 0.6))
    rows.append(decode("recorded, fused", "time a step", 4, 128, 0.5))
    rows = gpu.chosen(rows)
    said = [*gpu.findings_of_requests(rows), *gpu.findings_of_steps(gpu.Steps(rows))]
    words = {
        part: [words for is_ahead, words in said if is_ahead is part] for part in (True, False)
    }
    assert words[True] == [
        "One step ahead and fused, 256 requests get 3,000 output tokens/s. Serially they get "
        "2,000.",
        "16 prompts of 512 tokens take 1.0 ms. The products of the layers are 1392 TFLOP/s; the "
        "datasheet has 989.",
        "1 sequence of 128 tokens: 10.0 times as fast as transformers' DynamicCache.",
        "256 requests: 5.0 times as fast as transformers' continuous batching.",
        "The fastest step of 256 sequences of 512 tokens takes 2.000 ms on the device. To read "
        "its bytes alone takes 75% of that.",
        "With small linears a step is faster for a batch of 1.",
    ]
    assert words[False] == [
        "The fastest step of 1 sequence of 128 tokens takes 0.400 ms on the device. To read its "
        "bytes alone takes 25% of that.",
        "The speed of a step over blocks is 0.875 to 0.875 times that over slabs.",
        "With small linears a step is slower for a batch of 4.",
        "At worst (256 sequences of 512 tokens) the time from token to token is 4.000 ms, of "
        "which the device needs 2.000 for the forward.",
    ]
