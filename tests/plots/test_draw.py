"""The pictures in docs/: each is what draw.py draws from the files that the repository holds."""

import contextlib
import io
import math
import re
from xml.etree import ElementTree

import pytest
import torch
from conftest import ROOT
from matplotlib.colors import to_hex

from plots import draw
from plots.draw import (
    PICTURES,
    Missing,
    draw_engines,
    draw_gpu,
    draw_kernels,
    draw_load,
    draw_memory,
    ladder,
    load_curves,
    main,
    softmax_folds,
)
from plots.palette import INK, LIGHT, PALETTE

DECODE = "batch=32 context=256 block_size=16"


def run_main(*args):
    """What main printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([str(arg) for arg in args])
    return out.getvalue()


def row(contender, median, workload=DECODE, metric="KV bandwidth", dtype="float32", threads=1):
    """A measured row by hand: from a tenth less to a fifth more."""
    figures = {"median": median, "min": 0.9 * median, "max": 1.2 * median}
    names = {"contender": contender, "workload": workload, "metric": metric}
    return figures | names | {"dtype": dtype, "threads": threads, "device": "a CPU", "model": "m"}


# ---- all of them ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """All pictures, drawn anew into a folder: name -> file."""
    folder = tmp_path_factory.mktemp("docs")
    for name in PICTURES:
        run_main(name, "--out", folder / f"{name}.svg")
    return {name: folder / f"{name}.svg" for name in PICTURES}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_in_docs_is_what_its_data_give_now(drawn, name):
    """A recording, a row or the code has changed since? Draw it, look, and commit."""
    committed = ROOT / "docs" / f"{name}.svg"
    assert committed.read_bytes() == drawn[name].read_bytes()


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_small_and_needs_no_font_no_network_and_no_script(drawn, name):
    text = drawn[name].read_text()
    assert len(text) < 200_000 and str(ROOT) not in text
    tags = {element.tag.split("}")[1] for element in ElementTree.fromstring(text).iter()}
    assert tags.isdisjoint({"text", "image", "script", "foreignObject", "date"})
    links = re.findall(r'href="([^"]*)"', text)
    assert links and all(link.startswith("#") for link in links)


# ---- the online softmax --------------------------------------------------------------------------
def test_the_folds_are_those_of_a_softmax_over_all_that_was_read():
    folds = softmax_folds()
    read_so_far = []
    for i, fold in enumerate(folds):
        read_so_far += fold.scores
        scores = torch.tensor(read_so_far, dtype=torch.float64)
        assert fold.m == max(read_so_far)
        assert fold.l == pytest.approx((scores - fold.m).exp().sum().item())
        if i:
            shrink = math.exp(folds[i - 1].m - fold.m)
            assert fold.kept == pytest.approx(folds[i - 1].l * shrink)
    assert folds[0].kept == 0 and len(read_so_far) == 32

    # Exact after the last block only, and the maximum rises three times.
    assert folds[-1].error < 1e-12 and all(fold.error > 0.05 for fold in folds[:-1])
    assert len({fold.m for fold in folds}) == 4


# ---- where memory goes ---------------------------------------------------------------------------
SIMULATED = "chats, filter 1024, requests=8134, blocks=4096 block_size=16 cost=1, all at once"


def shares(used, workload=SIMULATED):
    """Rows of the four plans: `used` percent hold tokens, a tenth to four tenths of the rest."""
    plans = ("paged", "oracle, buddies", "power of two, buddies", "maximum, buddies")
    for plan, percent in zip(plans, used, strict=True):
        rest = (100 - percent) / 10
        parts = {"used": percent, "tail": rest, "later": 2 * rest, "never": 3 * rest}
        for share, number in (parts | {"free": 4 * rest}).items():
            yield row(plan, number, workload, f"share of the pool: {share}")
        yield row(plan, 2 * percent, workload, "running at once, mean")


def test_the_bars_of_memory_are_the_shares_of_the_first_workload_and_the_newest_rows():
    rows = [*shares([1, 2, 3, 4]), *shares([90, 60, 50, 40]), *shares([5, 6, 7, 8], "short chats")]
    figure = draw_memory([*rows, row("static", 1.0, SIMULATED, "share of the pool: used")])
    bars = figure.axes[0].containers
    assert [bar.get_width() for bar in bars[0]] == [90, 60, 50, 40]  # from below
    assert [bar.get_width() for bar in bars[3]] == [3, 12, 15, 18]
    assert [bar.get_x() + bar.get_width() for bar in bars[-1]] == pytest.approx([100] * 4)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[:2] == ["90.0%", "180 run at once"]
    title, words = (text.get_text() for text in figure.texts)
    assert title == "Reserving the maximum fills 40% of the memory with tokens, paging 90%"
    start = "8,134 requests of at most 1,024 tokens (chats), all there at once, in 4,096 blocks."
    assert words.startswith(start)


def test_rows_that_were_not_measured_are_missing():
    rows = [each for each in shares([90, 60, 50, 40]) if each["contender"] != "oracle, buddies"]
    with pytest.raises(Missing, match="benchmark.py concurrency"):
        draw_memory(rows)
    with pytest.raises(Missing, match="no bandwidth of 'batch=1'"):
        ladder([row("ours", 3.0)], "batch=1")
    with pytest.raises(Missing, match="benchmark.py peers"):
        draw_load([row("ours", 3.0)])


# ---- measured rows -------------------------------------------------------------------------------
def test_the_ladder_is_of_one_workload_and_the_newest_row_counts():
    rows = [row("ours", 3.0), row("ours", 9.0, "batch=8"), row("theirs", 4.0), row("ours", 5.0)]
    rows += [row("ours", 7.0, metric="time a call"), row("ours", 2.0, dtype="bfloat16", threads=2)]
    found = {key: entry["median"] for key, entry in ladder(rows, DECODE).items()}
    assert found == {
        ("ours", "float32", 1): 5.0,
        ("theirs", "float32", 1): 4.0,
        ("ours", "bfloat16", 2): 2.0,
    }


def bars_of(ax):
    """label on the axis -> lengths of its bars, from the top."""
    names = [label.get_text() for label in ax.get_yticklabels()]
    found = {name: [] for name in names}
    for bar in sorted(ax.patches, key=lambda bar: -bar.get_y()):
        found[names[round(bar.get_y() + bar.get_height() / 2)]].append(bar.get_width())
    return found


def test_the_bars_of_the_kernels_stand_in_the_order_of_their_speed():
    rows = [row("slow", 2.0), row("read, torch", 20.0, metric="bandwidth"), row("fast", 9.0)]
    rows += [row("slow", 3.0, threads=2), row("fast", 8.0, threads=2)]
    figure = draw_kernels(rows, DECODE)
    (ax,) = figure.axes
    assert bars_of(ax) == {"slow": [2.0, 3.0], "fast": [9.0, 8.0], "read, torch": [20.0]}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["slow", "fast", "read, torch"]
    title = "Decode attention of one layer: 2.0 to 9.0 GB/s, float32, 1 thread"
    assert figure.texts[0].get_text() == title
    (lines,) = [collection.get_segments() for collection in ax.collections][:1]
    assert lines[0][:, 0].tolist() == pytest.approx([1.8, 2.4])  # from the least to the most


def peers():
    rows = []
    for batch, rate, time in ((32, 80.0, 400.0), (1, 10.0, 100.0), (8, 40.0, 200.0)):
        workload = f"decode batch={batch} context=256..320 block_size=16"
        rows.append(row("ours", rate, workload, "generated tokens"))
        rows.append(row("ours", time, workload, "time a step"))
    rows.append(row("ours", 999.0, "prefill batch=8", "time a step"))
    rows.append(row("ours", 999.0, workload, "time a step", threads=2))
    return rows


def test_the_load_has_a_point_for_each_batch_of_decoding_with_one_thread():
    points = load_curves(peers(), "time a step")["ours"]
    assert [(batch, r["median"]) for batch, r in points] == [(1, 100.0), (8, 200.0), (32, 400.0)]
    figure = draw_load(peers())
    assert figure.texts[0].get_text() == (
        "32 sequences at once: 8.0 times the tokens a second, in steps 4.0 times as long"
    )
    rates, times = figure.axes
    assert list(rates.lines[0].get_ydata()) == [10.0, 40.0, 80.0]
    assert list(times.lines[0].get_ydata()) == [100.0, 200.0, 400.0]
    assert to_hex(rates.lines[0].get_color()) == PALETTE[0] != INK


def test_the_engines_have_a_panel_for_each_batch_and_dtype_with_the_most_threads():
    rates = {  # dtype, sequences, engine, threads
        ("float32", 1, "PagedGPT", 2): 40.0,
        ("float32", 1, "OpenVINO", 2): 50.0,
        ("float32", 1, "OpenVINO", 1): 999.0,
        ("float32", 8, "PagedGPT", 2): 300.0,
        ("int8", 8, "OpenVINO", 2): 400.0,
    }
    figure = draw_engines(
        [
            row(
                engine, rate, f"batch={batch} prompt=256 new=32", "generated tokens", dtype, threads
            )
            for (dtype, batch, engine, threads), rate in rates.items()
        ]
    )
    panels = {
        ax.get_title(): {
            label.get_text(): bar.get_width()
            for label, bar in zip(ax.get_yticklabels(), ax.patches, strict=False)
        }
        for ax in figure.axes
    }
    assert list(panels) == ["8 sequences, float32", "8 sequences, int8", "1 sequence, float32",
                            "1 sequence, int8"]  # fmt: skip
    # The first engine is on top, so it is drawn last.
    assert panels["1 sequence, float32"] == {"OpenVINO": 50.0, "PagedGPT": 40.0}
    ours = figure.axes[2].patches[1]
    assert (to_hex(ours.get_facecolor()), ours.get_width()) == (PALETTE[0], 40.0)


def test_a_gpus_step_has_a_bar_for_its_floor_and_each_way_and_a_mark_for_the_next_token():
    steps = {"byte floor": 1.0, "recorded": 4.0, "recorded, fused": 2.0}
    rows = [
        row(name, factor * ms, f"decode batch={batch} context=128 block_size=16", "time a step")
        for batch, factor in ((1, 1.0), (16, 2.0), (256, 3.0))
        for name, ms in steps.items()
    ]
    rows.append(row("recorded, fused, ahead", 9.0, rows[-1]["workload"], "token to token"))
    served = {"serial": 100.0, "one step ahead": 150.0, "transformers continuous batching": 50.0}
    rows += [row(name, rate, "requests=3", "output tokens") for name, rate in served.items()]
    figure = draw_gpu([each | {"repeats": 3} for each in rows])
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == [
        "256 x 128 tokens", "1 x 128 tokens",
    ]  # fmt: skip
    found = {bars.get_label(): [bar.get_width() for bar in bars] for bars in left.containers}
    assert found == {"byte floor": [3.0, 1.0], "recorded": [12.0, 4.0], "fused": [6.0, 2.0],
                     "small linears": []}  # fmt: skip
    assert [list(line.get_xdata()) for line in left.lines] == [[9.0, 9.0]]
    title = "a CPU: the bytes alone are 50% of a step of 256 and 50% of a step of 1"
    assert figure.texts[0].get_text() == title
    assert bars_of(right) == {name: [rate] for name, rate in served.items()}
    bars = [container[0] for container in right.containers if hasattr(container[0], "get_width")]
    assert [to_hex(bar.get_facecolor()) for bar in bars] == [LIGHT, PALETTE[0], PALETTE[0]]
    with pytest.raises(Missing, match="benchmark.py latency"):
        draw_gpu([each | {"repeats": 3} for each in rows if "floor" not in each["contender"]])


# ---- the command ---------------------------------------------------------------------------------
def test_a_picture_without_data_is_left_out_of_all_with_the_command_that_makes_them(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(draw, "ROOT", tmp_path)
    wanted = {name: PICTURES[name] for name in ("pool", "softmax", "kernels")}
    monkeypatch.setattr(draw, "PICTURES", wanted)
    lines = run_main("--recording", tmp_path / "no.jsonl", "--results", tmp_path).splitlines()
    assert lines[0].startswith("pool is left out: ") and "generate.py --record" in lines[0]
    assert lines[1].startswith("kernels is left out: ") and "benchmark.py kernels --out" in lines[1]
    assert lines[2].startswith(f"{tmp_path}/docs/softmax.svg: ")
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["softmax.svg"]


@pytest.mark.parametrize(
    "args, words",
    [
        (["pool", "--recording", "{folder}/no.jsonl"], "cannot be read"),
        (["pool", "--recording", "{folder}/header.jsonl"], "holds no step"),
        (["kernels", "--results", "{folder}"], "there is no such file"),
        (["kernels", "--workload", "batch=7"], "no bandwidth of 'batch=7'"),
        (["softmax", "--out", "{folder}/x.xyz"], "xyz"),
        (["softmax", "--out", "{folder}"], "no ending"),
    ],
)
def test_a_callers_mistake_is_one_sentence(tmp_path, args, words):
    recording = (ROOT / "results/recordings/demo.jsonl").read_text()
    (tmp_path / "header.jsonl").write_text(recording.split("\n")[0] + "\n")
    with pytest.raises(SystemExit) as error:
        run_main(*(arg.format(folder=tmp_path) for arg in args))
    message = str(error.value.code)
    assert message.startswith("plots/draw.py: ") and "\n" not in message
    assert words.format(folder=tmp_path) in message


def test_a_recording_of_ones_own_can_be_drawn_as_a_bitmap_too(tmp_path):
    recording = ROOT / "results/recordings/demo.jsonl"
    run_main("pool", "--recording", recording, "--out", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
