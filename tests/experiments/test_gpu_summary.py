"""The table of a run on a GPU from made-up rows, and the defaults that known figures recommend."""

import pytest

from experiments import gpu_summary
from experiments.gpu_summary import Advice, Figures
from experiments.results import Measurement, append

COMMON = {"backend": "triton", "dtype": "bfloat16", "threads": 16, "device": "a GPU"}
RECORDED, FUSED, SMALL = "recorded", "recorded, fused", "recorded, fused, small linears"
PLAIN = [RECORDED, FUSED, SMALL, "recorded, contiguous"]
PEERS = ["DynamicCache", "generate", "StaticCache, compiled"]
FEW_ROWS = ["2x128", "4x128", "8x128", "16x128"]
ENDS = ["1x128", "256x512", "1x512", "256x128"]
REQUESTS = "requests=256 prompts and texts of 64..512 tokens"


def row(experiment, contender, workload, metric, unit, value):
    what = {"experiment": experiment, "contender": contender, "workload": workload} | COMMON
    return Measurement.of([value], metric=metric, unit=unit, **what)


def latency(contender, workload, metric, unit, value):
    if "x" in workload and " " not in workload:
        B, T = workload.split("x")
        workload = f"decode batch={B} context={T} block_size=16"
    return row("latency", contender, workload, metric, unit, value)


def engine_rows():
    """Rows as latency.py makes them on a GPU with everything installed."""
    for name in [*PLAIN, *(f"{name}, ahead" for name in PLAIN[:3])]:
        sizes = f"recording sizes=1..{16 if 'small' in name else 256}"
        yield latency(name, sizes, "recording", "s", 4.25)
        yield latency(name, sizes, "memory taken", "MB", 301.0)
    for shape in ENDS + FEW_ROWS:
        yield latency("byte floor", shape, "time a step", "ms", 0.0593)
        for name in PLAIN:
            if "small" not in name or int(shape.split("x")[0]) <= 16:
                yield latency(name, shape, "time a step", "ms", 0.4567)
                yield latency(name, shape, "share of the byte floor", "%", 12.34)
                yield latency(name, shape, "token to token", "ms", 0.5123)
                yield latency(name, shape, "launches a step", "launches", 138)
                if "contiguous" not in name:
                    yield latency(f"{name}, ahead", shape, "token to token", "ms", 0.4711)
        yield latency(RECORDED, shape, "speed against recorded, contiguous", "x", 0.987)
    ways = ["serial", "one step ahead", "one step ahead, fused"]
    for way in [*ways, f"{ways[2]}, budget=2048"]:
        yield latency(way, REQUESTS, "output tokens", "tokens/s", 1e5)
    yield latency("serial", "prefill batch=16 prompt=512", "prompt tokens", "tokens/s", 1_654_321.0)
    for way in ways:
        for B in (1, 256):
            workload = f"profile batch={B} context=128"
            for metric, unit in (("kernels a step", "launches"), ("waits a step", "waits")):
                yield latency(way, workload, metric, unit, 88.0)
            yield latency(way, workload, "device idle", "%", 5.5)
    for name in ("recorded, ahead", "recorded, fused, ahead"):
        for peer in PEERS:
            yield latency(f"transformers {peer}", "1x128", "token to token", "ms", 7.089)
            against = f"speed against transformers {peer}"
            yield latency(name, "1x128", against, "x", 15.5)
    peer = "transformers continuous batching"
    yield latency(peer, REQUESTS, "output tokens", "tokens/s", 4.5e3)
    yield latency(ways[2], REQUESTS, f"speed against {peer}", "x", 22.5)


def ceilings_rows(one_row=2.0, two_rows=1.0):
    for way in ("read, torch", "read, triton", "copy, torch"):
        yield row("ceilings", way, "memory MB=8192", "bandwidth", "GB/s", 4321.0)
    yield row("ceilings", "empty kernel", "calls=1000", "time a launch", "us", 1.3)
    names = ["QKV", "attention projection", "MLP up", "MLP down"]
    for name in [*names, "logits of 50257", "logits of 50304"]:
        for M, value in ((1, one_row), (2, two_rows), (8, 3.0), (64, 4.0), (256, 5.0)):
            value = 77.0 if "logits" in name else value
            yield row("ceilings", f"{name}, {M} rows", "products", "time a call", "ms", value)


def kernels_rows():
    names = ["tiles over blocks", "tiles, blocks in order", "chunks and merge", "contiguous"]
    for B, T in ((1, 1024), (16, 1024), (64, 512), (256, 512)):
        workload = f"batch={B} context={T} block_size=16"
        for name in names:
            yield row("kernels", name, workload, "time a call", "ms", 0.0123)
            yield row("kernels", name, workload, "share of the read", "%", 91.5)
            yield row("kernels", name, workload, "KV bandwidth", "GB/s", 4000.0)
    for metric, unit in (("t0", "us"), ("bandwidth", "GB/s"), ("share of the read", "%")):
        fit = "t0 + bytes / bandwidth over 32x512,64x512 block_size=16"
        yield row("kernels", names[0], fit, metric, unit, 3.5)


def write(folder, **files):
    for name, rows in files.items():
        list(append(folder / f"{name}.csv", rows))


def table(folder, date="2020", tests=(), wrong=()):
    return gpu_summary.table(folder, date, ["commit abc", "stages"], list(tests), list(wrong))


# ---- the table -----------------------------------------------------------------------------------
def test_the_table_of_a_whole_run_has_under_60_lines_and_ends_with_the_defaults(tmp_path):
    write(tmp_path, engine=engine_rows(), ceilings=ceilings_rows(), kernels=kernels_rows())
    tests = ["engine tests: 20 passed", "tests: 300 passed", "tests alone: 9 passed"]
    lines = table(tmp_path, tests=tests, wrong=["a stage", "another one"])
    assert len(lines) < 60 and max(map(len, lines)) < 200
    assert not any("lines more" in line for line in lines)
    at = lines.index("a decode step, ms on the device")
    heads, first, *_ = lines[at + 1 : at + 6]
    names = ["byte", "floor", "recorded", "fused", "small", "linears", "contiguous"]
    assert heads.split() == names
    assert first.split() == ["1x128", "0.0593", "0.4567", "0.4567", "0.4567", "0.4567"]
    shapes = [line.split()[0] for line in lines[at + 2 : at + 6]]
    assert shapes == ENDS  # those between are for few_rows alone
    at = lines.index("token to token, ms by wall clock")
    assert len(lines[at + 2].split()) == 1 + 4 + 3 + 3  # ours, three of them ahead, three peers
    text = "\n".join(lines)
    for part in (
        "blocks against slabs: 1x128 0.987x; 256x512 0.987x",
        "one step ahead, fused 100,000; one step ahead, fused, budget=2048 100,000; continuous",
        "prompt tokens a second: serial 1,654,321",
        "ceilings: read, torch 4321GB/s; read, triton 4321GB/s; copy, torch 4321GB/s; empty kernel",
        "decode kernel, us and GB/s: t0 3.5; bandwidth 3.5GB/s; share of the read 3.5%",
        "WRONG: a stage\nWRONG: another one\ndefaults:",
    ):
        assert part in text
    assert [line.split(":")[0].strip() for line in lines[-5:]] == [
        "plan_ahead", "fused", "few_rows", "max_num_batched_tokens", "FEWEST_ROWS"
    ]  # fmt: skip


def test_what_does_not_fit_is_left_out_of_the_middle(tmp_path):
    write(tmp_path, engine=engine_rows(), ceilings=ceilings_rows(), kernels=kernels_rows())
    lines = table(tmp_path, tests=[f"test {i}" for i in range(20)])
    assert len(lines) == 59 and lines[:2] == ["commit abc", "stages"]
    (said,) = [i for i, line in enumerate(lines) if "lines more: see the files of rows" in line]
    assert lines[said + 1] == "test 0" and lines[-6] == "defaults:"


def test_a_run_that_ended_early_shows_what_there_is_and_no_earlier_runs_rows(tmp_path):
    """Rows come one by one, and the machine may go after any of them."""
    rows = list(engine_rows())
    for number in range(0, len(rows) + 1, 7):
        folder = tmp_path / str(number)
        write(folder, engine=rows[:number])
        lines = table(folder)
        assert lines[-6] == "defaults:" and len(lines) >= 9
        assert len(table(folder, date="2999")) == 9  # the head, that all is well, the defaults


def test_of_a_figure_that_two_stages_measure_the_first_is_shown(tmp_path):
    rows = [latency(RECORDED, "1x128", "time a step", "ms", value) for value in (0.5, 0.7)]
    write(tmp_path, engine=rows)
    assert [line for line in table(tmp_path) if line.startswith("1x128")] == ["1x128       0.5"]


# ---- the defaults --------------------------------------------------------------------------------
def figures(**times):
    """Figures of "way: {shape: ms}"; a rate where the name is that of a way to serve."""
    names = {"recorded": RECORDED, "fused": FUSED, "small": SMALL}
    rows = []
    for name, by_shape in times.items():
        kind, ahead = name.removesuffix("_ahead"), name.endswith("_ahead")
        for shape, ms in by_shape.items():
            metrics = ["token to token"] if ahead else ["time a step", "token to token"]
            contender = names[kind] + ", ahead" * ahead
            rows += [latency(contender, shape, metric, "ms", ms) for metric in metrics]
    return rows


def rates(**by_way):
    names = {"serial": "serial", "ahead": "one step ahead", "fused": "one step ahead, fused"}
    names["few"] = "one step ahead, fused, budget=2048"
    of = {names[name]: rate for name, rate in by_way.items()}
    return [latency(name, REQUESTS, "output tokens", "tokens/s", of[name]) for name in of]


def advice(function, folder, *rows):
    write(folder, engine=[row for some in rows for row in some])
    return function(Figures(gpu_summary.rows_since(folder / "engine.csv", "2020")))


@pytest.mark.parametrize(
    "fused, value",
    [
        ({"1x128": 0.8, "256x512": 1.0}, True),
        ({"1x128": 0.8, "256x512": 1.01}, True),  # within 2%: no difference
        ({"1x128": 0.8, "256x512": 1.03}, False),
        ({"1x128": 0.99, "256x512": 1.0}, False),
        ({"64x64": 0.5}, None),
    ],
)
def test_steps_are_joined_if_one_is_faster_and_none_is_slower(tmp_path, fused, value):
    plain = figures(recorded={"1x128": 1.0, "256x512": 1.0})
    assert advice(gpu_summary.advise_fused, tmp_path, plain, figures(fused=fused)).value is value


@pytest.mark.parametrize(
    "small, value",
    [
        ({"1x128": 0.5, "2x128": 0.6, "4x128": 0.9, "8x128": 1.2, "16x128": 0.5}, 4),
        ({"1x128": 0.5, "1x512": 1.0, "2x128": 0.6}, 0),  # not at every context
        ({"1x128": 0.5, "16x128": 0.7}, 16),
        ({"256x512": 1.1}, 0),
        ({}, None),
    ],
)
def test_small_linears_serve_as_many_rows_as_they_are_faster_for_without_a_gap(
    tmp_path, small, value
):
    shapes = ["1x128", "1x512", "2x128", "4x128", "8x128", "16x128", "256x512"]
    found = figures(fused=dict.fromkeys(shapes, 1.0), small=small)
    assert advice(gpu_summary.advise_few_rows, tmp_path, found).value == value


@pytest.mark.parametrize(
    "served, ahead, value",
    [
        ({"serial": 100.0, "ahead": 150.0}, {"1x128": 0.7, "256x512": 1.01}, True),
        ({"serial": 100.0, "ahead": 101.0}, {"1x128": 0.7, "256x512": 0.7}, False),
        ({"serial": 100.0, "ahead": 150.0}, {"1x128": 0.7, "256x512": 1.05}, False),
        ({"serial": 100.0}, {"1x128": 0.7}, None),
        ({"serial": 100.0, "ahead": 150.0}, {}, None),
    ],
)
def test_steps_are_planned_ahead_if_requests_are_served_faster_and_no_token_is_later(
    tmp_path, served, ahead, value
):
    plain = figures(recorded={"1x128": 1.0, "256x512": 1.0}, recorded_ahead=ahead)
    assert advice(gpu_summary.advise_ahead, tmp_path, plain, rates(**served)).value is value


def test_the_small_budget_is_kept_unless_the_large_one_serves_faster(tmp_path):
    for number, (few, value) in enumerate([(95.0, 8192), (99.0, 2048), (120.0, 2048)]):
        served = rates(serial=50.0, ahead=80.0, fused=100.0, few=few)
        assert advice(gpu_summary.advise_budget, tmp_path / str(number), served).value == value
    assert advice(gpu_summary.advise_budget, tmp_path, rates(serial=50.0)).value is None


@pytest.mark.parametrize("one_row, two_rows, value", [(2.0, 1.0, 2), (1.0, 1.0, 1), (0.9, 1.0, 1)])
def test_one_sequence_is_two_rows_unless_a_layers_products_of_one_row_are_as_fast(
    tmp_path, one_row, two_rows, value
):
    write(tmp_path, ceilings=ceilings_rows(one_row, two_rows))
    (line,) = [line for line in table(tmp_path) if "FEWEST_ROWS" in line]
    assert line == f"    FEWEST_ROWS: {value} ({one_row / two_rows:.2f}x 2 rows)"


def test_advice_is_read_with_the_figures_that_speak_for_it():
    assert str(Advice(True, {"1x128": 1.3, "256x512": 1.004})) == "on (1.30x 1x128, 1.00x 256x512)"
    assert str(Advice(False, {"requests": 0.5})) == "off (0.50x requests)"
    assert str(Advice(8192, {"requests": 1.1})) == "8,192 (1.10x requests)"
    assert str(Advice(0, {"1 rows": 0.9})) == "0 (0.90x 1 rows)"
    assert str(Advice(None, {})) == "not measured"
