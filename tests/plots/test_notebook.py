"""The notebook: it draws what the CSV files say, and its outputs are those of the committed ones.

Run as a program, it executes the notebook in place: `make notebook`.
"""

import argparse
import base64
import csv
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
import numpy
import PIL.Image
import pytest
from conftest import ROOT
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer, ErrorbarContainer
from nbclient import NotebookClient

import benchmark
import generate
from experiments import block_size, concurrency, hf, kernels, memory, scale, sharing, speed, trace
from experiments.results import COLUMNS, append, read
from plots.draw import Missing
from plots.palette import PALETTE, card
from watch.files import replacing

NOTEBOOK = ROOT / "benchmark_results_viz.ipynb"
COMMANDS = {  # chart -> the command that its cell names
    **dict.fromkeys(["runtime", "speedup", "throughput", "latency"], "python benchmark.py speed"),
    **dict.fromkeys(["memory", "multiplier"], "python benchmark.py memory"),
    "waste": "python benchmark.py concurrency --simulate",
    "blocks": "python benchmark.py block-size",
    "trace": "python benchmark.py trace --simulate --policies paged 'maximum, buddies'",
    "scale": "python benchmark.py scale",
    **dict.fromkeys(["reuse", "saved"], "python benchmark.py sharing"),
    "caches": "python benchmark.py hf",
    "kernels": "python benchmark.py kernels",
    "gpu": "python benchmark.py latency",
    "pool": "python generate.py --record results/recordings/demo.jsonl",
}


def execute(path):
    """Run all cells in a fresh kernel, in the file's folder, and write their outputs into it.

    What would be another each time is left out: when a cell ran, and the kernel's version.
    """
    book = nbformat.read(path, as_version=4)
    options = {"timeout": 300, "kernel_name": "python3", "record_timing": False}
    options |= {"resources": {"metadata": {"path": str(path.parent)}}}
    options |= {"extra_arguments": ["--log-level=ERROR"]}
    # A folder of its own, so that no start-up file of the user's changes what the cells do.
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(book, **options).execute(env=os.environ | {"IPYTHONDIR": folder})
    del book.metadata["language_info"]
    with replacing(path) as (part,):
        nbformat.write(book, part)
    return book


def cells(book):
    return {cell.id: cell for cell in book.cells if cell.cell_type == "code"}


def text_of(cell):
    """What a cell printed; that an output is of no other kind is asserted."""
    printed = [output for output in cell.outputs if output.output_type == "stream"]
    assert all(output.name == "stdout" for output in printed)
    others = [output for output in cell.outputs if output not in printed]
    assert all(set(output.data) == {"image/png", "text/plain"} for output in others)
    return "".join(output.text for output in printed)


def picture_of(cell):
    """(its title, its pixels) of the chart in a cell, or None."""
    charts = [output for output in cell.outputs if output.output_type == "display_data"]
    assert len(charts) <= 1
    for output in charts:
        picture = PIL.Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
        pixels = numpy.asarray(picture.convert("RGBA"), dtype=int)
        return output.metadata["image/png"]["alt"], pixels
    return None


def no_rows(name):
    """What a cell says instead of its chart."""
    return f"there are no rows for this chart: {COMMANDS[name]} makes them\n"


# ---- as it is committed --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def book():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_every_cell_was_run_in_order_and_shows_a_chart_or_says_that_rows_are_missing(book):
    nbformat.validate(book)
    found = cells(book)
    assert list(found) == ["load", "helpers", *COMMANDS]
    assert [cell.execution_count for cell in found.values()] == list(range(1, len(found) + 1))
    for name in COMMANDS:
        assert (picture_of(found[name]) is None) == (text_of(found[name]) == no_rows(name)), name


def test_its_outputs_are_of_the_rows_that_are_committed_now(book):
    """Rows were added since? `make notebook`. It read rows of your own? Move these away before."""
    lines = text_of(cells(book)["load"]).splitlines()
    files = sorted((ROOT / "results/cpu").glob("*.csv"))
    assert [line.partition(" rows of ")[0] for line in lines] == [
        f"results/cpu/{path.name}: {len(read(path)):,}" for path in files
    ]


def test_nothing_in_it_is_another_each_time_or_of_the_machine_that_ran_it(book):
    assert set(book.metadata) == {"kernelspec"}
    assert all(cell.metadata == {} for cell in book.cells)
    texts = [cell.source for cell in book.cells]
    texts += [text_of(cell) for cell in cells(book).values()]
    assert not re.search(r"(^|[\s\"'(=])(~|[A-Za-z]:\\|/)[\w.]", "\n".join(texts))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_that_a_chart_names_is_one(book, name):
    assert f'"{COMMANDS[name]}")' in cells(book)[name].source
    python, program, *arguments = shlex.split(COMMANDS[name])
    assert python == "python"
    {"benchmark.py": benchmark, "generate.py": generate}[program].parse_args(arguments)


# ---- what the cells do, on rows by hand ----------------------------------------------------------
def row(experiment, contender, metric, workload, median, **more):
    """A row as `append` writes it: from a tenth less to a fifth more."""
    found = dict.fromkeys(COLUMNS, "none") | {"date": "2026-01-31T10:00:00+00:00", "commit": "new"}
    found |= {"experiment": experiment, "contender": contender, "metric": metric, "unit": "u"}
    found |= {"workload": workload, "repeats": 3, "threads": 1, "seed": 0, "device": "a CPU"}
    return found | {"median": median, "min": 0.9 * median, "max": 1.2 * median} | more


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def run_cells(book, tmp_path, monkeypatch, capsys):
    """A function: the cells' names after the first two have run, and a chart's too, on some rows.

    `show` hands back what the chart's cell would draw, so that the figure can be looked into.
    """

    def run(rows, chart=None, name="benchmark_results.csv"):
        write(tmp_path / name, rows)
        monkeypatch.chdir(tmp_path)
        names = {}
        for cell in ("load", "helpers"):
            exec(cells(book)[cell].source, names)
        names["printed"] = capsys.readouterr().out
        if chart is None:
            return names
        names["show"] = lambda draw, command: names.update(drawn=draw)
        exec(cells(book)[chart].source, names)
        return names["drawn"]()

    return run


def lines_of(ax):
    """label -> points (x, median, min, max) of each line with its spread; plain lines: (x, y)."""
    found = {}
    for container in ax.containers:
        if isinstance(container, ErrorbarContainer):
            line, _, (segments, *_) = *container[:2], container[2] or (None,)
            points = list(zip(*line.get_data(), strict=True))
            if segments is not None:
                ends = [tuple(part[:, 1]) for part in segments.get_segments()]
                points = [(*point, *end) for point, end in zip(points, ends, strict=True)]
            found[container.get_label()] = [tuple(map(float, point)) for point in points]
    return found


def bars_of(ax):
    """label -> (left or middle, length) of each bar."""
    found = {}
    for container in ax.containers:
        assert isinstance(container, BarContainer)
        found[container.get_label()] = [
            (round(float(bar.get_x() + bar.get_width() / 2), 3), float(bar.get_height()))
            for bar in container
        ]
    return found


def test_the_users_own_rows_come_first_and_then_those_of_the_repository(run_cells):
    measured = [row("memory", "paged", "KV memory", "step=1", 5.0)] * 2
    names = run_cells(measured, name="results/cpu/memory.csv")
    assert names["printed"] == "results/cpu/memory.csv: 2 rows of memory; commit new\n"
    names = run_cells([*measured, row("speed", "paged", "x", "y", 1.0, commit="old")])
    assert names["printed"] == ("benchmark_results.csv: 3 rows of memory, speed; commit new, old\n")


def test_without_any_row_the_first_cell_says_what_makes_some(run_cells):
    assert run_cells([])["printed"] == (
        "neither benchmark_results.csv nor results/cpu has rows: "
        "python benchmark.py makes the first ones\n"
    )


def test_the_newest_row_of_a_figure_wins_wherever_it_stands_and_in_whatever_time_zone(run_cells):
    dates = ["2026-01-31T09:00:00+00:00", "2026-01-31T10:00:00+02:00", "2026-01-31T08:30:00+00:00"]
    rows = [row("e", "c", "m", "a step=1", i, date=date) for i, date in enumerate(dates)]
    (found,) = run_cells(rows)["pick"]("e", ["m"], r"(a) step=(?P<step>\d+)")
    assert found[["median", "step"]].values.tolist() == [[0.0, 1.0]]


def test_a_series_is_of_one_machine_one_model_and_one_commit(run_cells):
    names = run_cells([
        row("e", "c", "m", "a step=1", 1.0, device="another"),
        row("e", "c", "m", "a step=2", 2.0, commit="old"),
        row("e", "c", "m", "a step=3", 3.0, dtype="bfloat16"),
        row("e", "c", "m", "a step=4", 4.0, threads=2),
        row("e", "c", "m", "a step=5", 5.0, model="m"),
        row("e", "c", "m", "a step=6", 6.0, weights="w"),
        row("e", "c", "other", "a step=7", 7.0),
        row("e", "c", "m", "b step=8", 8.0),
        row("f", "c", "m", "a step=9", 9.0),
        row("e", "c", "m", "a step=10", 10.0),
        row("e", "d", "m", "a step=10", 11.0),
    ])  # fmt: skip
    (rows,) = names["pick"]("e", ["m"], r"(\w) step=(?P<step>\d+)")
    assert rows["median"].tolist() == [10.0, 11.0]
    both = names["pick"]("e", ["m"], r"(\w) step=(?P<step>\d+)", most=2)
    assert [part["median"].tolist() for part in both] == [[8.0], [10.0, 11.0]]


def test_a_chart_of_which_a_metric_was_never_measured_is_missing(run_cells):
    names = run_cells([row("e", "c", "m", "a", 1.0)])
    for asked in (("e", ["m", "n"], "(a)"), ("e", ["m"], "(b)"), ("f", ["m"], "(a)")):
        with pytest.raises(Missing):
            names["pick"](*asked)


def test_an_older_run_with_more_trials_leaves_none_of_them(run_cells):
    def one(trial, median):
        return row("speed", "paged", "generation time", f"batch=8 x trial={trial}", median)

    names = run_cells([one(1, 1.0), one(2, 2.0), one(3, 3.0), one(1, 4.0), one(2, 5.0)])
    assert names["trials"]("generation time")["median"].tolist() == [4.0, 5.0]


def test_a_chart_is_shown_with_its_title_and_one_without_rows_is_a_sentence(run_cells, capsys):
    names, shown = run_cells([]), []
    names["display"] = shown.append

    def missing():
        raise Missing

    names["show"](missing, "python benchmark.py speed")
    assert capsys.readouterr().out == no_rows("runtime") and not shown
    names["show"](lambda: card(2.0, "Its title", "more"), "")
    assert shown[0].alt == "Its title" and shown[0].data.startswith(b"\x89PNG")


def speed_row(contender, batch, new, median, blocks=16, size=16, prompt=64, **more):
    workload = f"batch={batch} prompt={prompt} new={new} block_size={size} num_blocks={blocks}"
    return row("speed", contender, more.pop("metric", "generation time"), workload, median, **more)


def test_the_runtime_is_of_the_usual_blocks_and_the_largest_pool(run_cells):
    figure = run_cells(
        [
            speed_row("paged", 8, 64, 2.0, blocks=64),
            speed_row("paged", 8, 64, 9.0, blocks=32),  # a tight pool
            speed_row("paged", 8, 64, 7.0, size=1, blocks=1024),
            speed_row("paged", 8, 64, 8.0, blocks=80, prompt=256),
            speed_row("paged", 32, 64, 6.0, blocks=256),
            speed_row("paged", 8, 256, 4.0, blocks=160),
            speed_row("paged", 1, 64, 1.0, blocks=8),
            speed_row("paged", 1, 500, 10.0, blocks=36),
            speed_row("no cache", 1, 500, 90.0, blocks=36),
            speed_row("contiguous", 8, 500, 700.0, blocks=288),
        ],
        "runtime",
    )
    one, eight = figure.axes
    assert (one.get_title(), eight.get_title()) == ("batch 1", "batch 8")
    assert lines_of(one) == {
        "paged": [(64, 1.0, 0.9, 1.2), (500, 10.0, 9.0, 12.0)],
        "no cache": [(500, 90.0, 81.0, 108.0)],
    }
    assert lines_of(eight)["paged"] == [(64, 2.0, 1.8, 2.4), (256, 4.0, 3.6, 4.8)]
    title = "Seconds for 500 tokens, batch 1: paged 10.00; no cache 90.00"
    assert figure.texts[0].get_text() == title
    assert (
        figure.texts[1].get_text().endswith("\nbenchmark_results.csv, commit new: a CPU, 1 thread")
    )


def trial_rows():
    for trial, times in ((1, (0.5, 4.0)), (2, (1.0, 8.0))):
        workload = f"batch=2 prompt=8 new=4 block_size=16 num_blocks=2 trial={trial}"
        for name, time in zip(("paged", "no cache"), times, strict=True):
            yield row("speed", name, "generation time", workload, time)
        yield row("speed", "paged", "speed against no cache", workload, 7.0 + trial)


def test_the_speed_up_and_the_throughput_have_a_bar_for_each_trial(run_cells):
    figure = run_cells(trial_rows(), "speedup")
    assert bars_of(figure.axes[0]) == {"paged": [(1.0, 8.0), (2.0, 9.0)]}
    assert figure.texts[0].get_text().startswith("With a cache 8.0 to 9.0 times as fast")
    figure = run_cells(trial_rows(), "throughput")  # batch 2, 4 new tokens: 8 tokens
    bars = {"paged": [(0.8, 16.0), (1.8, 8.0)], "no cache": [(1.2, 2.0), (2.2, 1.0)]}
    assert bars_of(figure.axes[0]) == bars
    assert figure.texts[0].get_text() == "Tokens a second: no cache 1.50; paged 12.00"


def test_the_latency_has_three_points_for_each_contender_and_batch(run_cells):
    figures = {"p50": 10.0, "p90": 15.0, "p99": 40.0}
    rows = [
        speed_row(name, batch, 64, batch * ms, metric=f"step latency {p}", blocks=batch)
        for name in ("paged", "contiguous")
        for batch in (8, 1)
        for p, ms in figures.items()
    ]
    for more in ({"new": 256}, {"size": 1}, {"blocks": 0}):  # other lengths, blocks, a tight pool
        for p in figures:
            what = {"new": 64, "blocks": 9, "metric": f"step latency {p}"} | more
            rows.append(speed_row("paged", 8, median=1.0, **what))
    figure = run_cells(rows, "latency")
    one, eight = figure.axes
    assert [label.get_text() for label in one.get_yticklabels()] == ["contiguous", "paged"]
    found = [(list(line.get_xdata()), list(line.get_ydata())) for line in eight.lines]
    assert ([80.0, 120.0, 320.0], ["contiguous"] * 3) in found
    assert ([320.0], ["paged"]) in found and len(found) == 8
    assert figure.texts[0].get_text() == (
        "The slowest step of a hundred: 4.0 to 4.0 times the median"
    )


ENGINES = ["maximum, buddies", "power of two, buddies", "oracle, buddies", "paged"]


def waste_rows(used, lengths="chats"):
    for engine, share in zip(ENGINES, used, strict=True):
        rest = (100 - share) / 10
        shares = {"used": share, "tail": rest, "later": 2 * rest, "never": 3 * rest}
        for name, percent in (shares | {"free": 4 * rest}).items():
            metric = f"share of the pool: {name}"
            workload = f"{lengths}, filter 9, all at once"
            yield row("concurrency", engine, metric, workload, percent)


def test_our_waste_stands_beside_the_papers_bars_and_adds_up(run_cells):
    figure = run_cells(waste_rows([20.0, 30.0, 40.0, 90.0]), "waste")
    paper, ours = figure.axes
    assert [text.get_text() for text in paper.texts] == ["20.4", "26.8", "38.2", "96.3"]
    assert [label.get_text() for label in paper.get_yticklabels()] == ENGINES
    assert all(ax.get_ylim() == (3.5, -0.5) for ax in figure.axes)  # the first one on top
    assert [bar.get_width() for bar in paper.containers[1]] == [20.4, 26.8, 38.2, 96.3]
    parts = {part.get_label(): part for part in ours.containers[1:]}
    assert list(parts) == ["used", "tail", "later", "never", "free"]
    assert [bar.get_width() for bar in parts["used"]] == [20.0, 30.0, 40.0, 90.0]
    assert {to_hex(bar.get_facecolor()) for bar in parts["used"]} == {PALETTE[0]}
    # Of the first engine: 20 used, then 8, 16, 24 and 32 one behind the other.
    first = [(part[0].get_x(), part[0].get_width()) for part in parts.values()]
    assert first == [(0.0, 20.0), (20.0, 8.0), (28.0, 16.0), (44.0, 24.0), (68.0, 32.0)]
    title = "Paged, 90.0% of the memory holds tokens; in the paper 96.3%"
    assert figure.texts[0].get_text() == title
    assert "The order is the paper's" in figure.texts[1].get_text()
    figure = run_cells(waste_rows([30.0, 20.0, 40.0, 90.0]), "waste")
    assert "The order is not the paper's" in figure.texts[1].get_text()


def test_the_block_sizes_are_those_of_the_contenders(run_cells):
    rows = []
    for size in (16, 2, 128):
        name = f"block_size={size}"
        rows.append(row("block_size", name, "generated tokens", "speed batch=8", 100.0 + size))
        for data, share in (("ShareGPT", 110.0), ("Alpaca", 100.0)):
            metric, workload = "share of held memory filled", f"memory {data} requests=9"
            rows.append(row("block_size", name, metric, workload, share - size / 2))
            metric, workload = "bytes copied, GPT-2 124M in 16 bits", f"copies {data} requests=9"
            rows.append(row("block_size", name, metric, workload, 1e6 * size))
    figure = run_cells(rows, "blocks")
    rate, filled, copied = map(lines_of, figure.axes)
    assert [point[:2] for point in rate["speed"]] == [(2, 102.0), (16, 116.0), (128, 228.0)]
    assert [point[1] for point in filled["Alpaca"]] == [99.0, 92.0, 36.0]
    assert [point[:2] for point in copied["ShareGPT"]] == [(2, 2.0), (16, 16.0), (128, 128.0)]
    title = "The emptiest blocks: block_size=128, 36% full with the lengths of Alpaca"
    assert figure.texts[0].get_text() == title
    for ax in figure.axes:  # what the paper found
        spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]
        assert spans == [(16, 128), (16, 32)]


def test_the_trace_is_in_milliseconds_over_the_rate(run_cells):
    metric, rate = "normalised latency, mean", "poisson factor={f} rate={f}/s, blocks=9"
    rows = [
        row("trace", name, metric, f"{lengths}, {rate.format(f=f)}", s)
        for lengths in ("short", "chats, filter 9, requests=9")
        for f in ("32", "1e+03")
        for name, s in (("paged", 0.002 * float(f)), ("maximum, buddies", 0.004 * float(f)))
    ]
    figure = run_cells(rows, "trace")
    assert [ax.get_title() for ax in figure.axes] == ["short", "chats, filter 9"]
    found = lines_of(figure.axes[1])
    assert [point[:2] for point in found["paged"]] == [(32, 64.0), (1000, 2000.0)]
    title = "ms a token at 1000 requests/s: paged 2,000; maximum, buddies 4,000"
    assert figure.texts[0].get_text() == title


def sharing_row(contender, metric, workload, median):
    return row("sharing", contender, metric, workload, median)


def test_the_first_tokens_are_those_of_a_common_prefix_and_of_a_chat(run_cells):
    metric = "time to first token"
    rows = [
        sharing_row(name, metric, f"{part}={x}{end}", x * factor + 10.0)
        for name, factor in (("prefix cache", 0.1), ("no prefix cache", 1.0))
        for part, end in (("prefix shared", " own=20"), ("chat random turn", " answer=5"))
        for x in (0, 90)
    ]
    prefix, chat = run_cells(rows, "reuse").axes
    assert [point[:2] for point in lines_of(prefix)["prefix cache"]] == [(0, 10.0), (90, 19.0)]
    assert [point[:2] for point in lines_of(chat)["no prefix cache"]] == [(0, 10.0), (90, 100.0)]
    title = "90 known tokens: the first token comes 5.3 times as soon"
    assert prefix.figure.texts[0].get_text() == title


def test_the_blocks_saved_stand_beside_the_papers(run_cells):
    rows = [
        sharing_row(name, "blocks saved", f"blocks {data} random requests=2 width={width}", percent)
        for name, data, percent in (("texts", "Alpaca", 5.0), ("beams", "Alpaca", 50.0),
                                    ("texts", "ShareGPT", 20.0), ("beams", "ShareGPT", 60.0))
        for width in (2, 4)
    ]  # fmt: skip
    texts, beams = run_cells(rows, "saved").axes
    assert [point[:2] for point in lines_of(texts)["Alpaca"]] == [(2, 5.0), (4, 5.0)]
    assert [point[:2] for point in lines_of(beams)["ShareGPT"]] == [(2, 60.0), (4, 60.0)]
    paper = beams.lines[-1]
    assert list(paper.get_xdata()) == [2, 4, 6] and list(paper.get_ydata()) == [37.56, 53.13, 55.16]
    assert texts.figure.texts[0].get_text() == (
        "Sharing saves up to 60% of the blocks: 2 beams, lengths of ShareGPT"
    )


def test_the_caches_of_transformers_grow_search_and_are_padded(run_cells):
    megabyte = 1e6
    two = {"DynamicCache": 8, "PagedCache, paged": 5}
    three = two | {"StaticCache": 10}
    padded = three | {"PagedCache, one cache a text": 4, "the tokens' own": 3}
    workloads = {f"grow tokens={n} batch=8 block_size=16": three for n in (1, 64)}
    workloads |= {f"beams step={n} beams=4 block_size=16": two for n in (1, 2)}
    workloads["ragged batch=8 tokens=1..8 block_size=16"] = padded
    rows = [
        row("hf", name, "KV memory", workload, size * megabyte)
        for workload, held in workloads.items()
        for name, size in held.items()
    ]
    grow, beams, ragged = run_cells(rows, "caches").axes
    assert [point[:2] for point in lines_of(grow)["DynamicCache"]] == [(1, 8.0), (64, 8.0)]
    assert [point[:2] for point in lines_of(beams)["PagedCache, paged"]] == [(1, 5.0), (2, 5.0)]
    heights = {name: bar[0][1] for name, bar in bars_of(ragged).items()}
    assert heights == {name: size for name, size in padded.items() if "own" not in name}
    assert list(ragged.lines[-1].get_ydata()) == [3.0, 3.0]
    title = "MB of a beam search after 2 tokens: PagedCache 5.0; DynamicCache 8.0"
    assert grow.figure.texts[0].get_text() == title
    assert "Dotted: the tokens' own" in grow.figure.texts[1].get_text()


def gpu_rows(device="a GPU"):
    workload = "decode batch=4 context=128 block_size=16"
    for name, ms in (("byte floor", 1.0), ("recorded", 4.0), ("recorded, fused", 2.0)):
        yield row("latency", name, "time a step", workload, ms, device=device)
    for name, rate in (("serial", 100.0), ("one step ahead", 150.0)):
        yield row("latency", name, "output tokens", "requests=3", rate, device=device)


def test_the_step_on_a_gpu_is_of_ones_own_where_there_is_one(run_cells, tmp_path, capsys):
    figure = run_cells(gpu_rows(), "gpu")
    assert capsys.readouterr().out.startswith("benchmark_results.csv, commit new: a GPU")
    assert figure.texts[0].get_text().startswith("a GPU: the bytes alone are 50% of a step of 4")
    write(tmp_path / "results/nvidia-h200/engine.csv", gpu_rows("an H200"))
    joining = row("latency", "budget=64", "time to first token", "joining batch=8", 1.0)
    figure = run_cells([joining], "gpu")
    assert capsys.readouterr().out.startswith("results/nvidia-h200/engine.csv, commit new: an H200")
    assert figure.texts[0].get_text().startswith("an H200: ")


def test_the_pool_is_the_recorded_one(run_cells, tmp_path, capsys):
    shutil.copytree(ROOT / "results/recordings", tmp_path / "results/recordings")
    figure = run_cells([], "pool")
    assert capsys.readouterr().out == "results/recordings/demo.jsonl: 116 steps\n"
    assert figure.axes[0].get_xlim() == (0.5, 116.5)


# ---- in a kernel ---------------------------------------------------------------------------------
@pytest.fixture
def copy(tmp_path):
    """A copy of the notebook beside all that it imports, without rows and without outputs."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    book = nbformat.read(NOTEBOOK, as_version=4)
    for cell in cells(book).values():
        cell.outputs, cell.execution_count = [], None
    nbformat.write(book, tmp_path / NOTEBOOK.name)
    return tmp_path / NOTEBOOK.name


@pytest.mark.slow
def test_the_committed_outputs_are_those_of_the_committed_rows(copy, book):
    """Other rows, or another chart? `make notebook`, look, and commit."""
    shutil.copytree(ROOT / "results", copy.parent / "results")
    again = execute(copy)
    for name, cell in cells(again).items():
        committed = cells(book)[name]
        assert text_of(cell) == text_of(committed), name
        new, old = picture_of(cell), picture_of(committed)
        if new is None or old is None:
            assert new is old, name
            continue
        assert new[0] == old[0] and new[1].shape == old[1].shape, name
        # A changed figure is hundreds of pixels; another version of a library may blur an edge.
        assert (abs(new[1] - old[1]).max(axis=-1) > 64).sum() < 50, name
    text = copy.read_text(encoding="utf-8")
    assert execute(copy) and copy.read_text(encoding="utf-8") == text  # the same bytes each time


def measure(path, module, arguments):
    """The rows of an experiment, appended to a file."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert list(append(path, module.run(parser.parse_args(arguments.split()))))


@pytest.mark.slow
def test_every_chart_is_drawn_from_what_the_experiments_write(copy):
    own = copy.parent / "benchmark_results.csv"
    measure(
        own,
        speed,
        "--roads contiguous paged no-cache --batches 2 1 --prompt-tokens 4 --new-tokens 4 8 "
        "--block-sizes 4 --pools 100 --long-tokens 16 --repeats 2",
    )
    measure(own, memory, "--reuse-batch 0 --steps 1 50 --pool-steps 1 50 505")
    measure(own, concurrency, "--simulate --requests 40 --blocks 256 --loads")
    measure(own, trace, "--simulate --requests 40 --blocks 256 --factors 8 64")
    measure(own, block_size, "--block-sizes 16 64 --batch 1 --prompt-tokens 8 --new-tokens 4 "
            "--rounds 1 --requests 8")  # fmt: skip
    measure(own, sharing, "--parts prefix chat blocks --shared 0 40 --turns 2 --answer 4 "
            "--rounds 1 --requests 2 --widths 2")  # fmt: skip
    measure(own, kernels, "--shapes 2x32 --prefill --dtypes float32 --threads 1 --repeats 2 "
            "--layers 2 --pool-mb 1 --read-mb 1")  # fmt: skip
    measure(own, scale, "--conversations 5 --turns 2 --replicas 1 3")
    measure(own, hf, "--parts memory --grow 1 64 --texts 2 --beams 2 --beam-tokens 3 --context 33 "
            "--steps 1 --model assets/tiny-gpt2 --dtypes float32")  # fmt: skip
    (copy.parent / "results").mkdir()
    for folder in ("recordings", "nvidia-h200"):  # a CPU replays no CUDA graph
        shutil.copytree(ROOT / "results" / folder, copy.parent / "results" / folder)
    found = cells(execute(copy))
    assert text_of(found["load"]).startswith(f"benchmark_results.csv: {len(read(own)):,} rows of")
    titles = {name: picture_of(found[name])[0] for name in COMMANDS}
    assert titles["memory"] == "MB at step 50: paged 75.50; reserve the maximum 603.98"
    assert titles["multiplier"].startswith("32 times as many sequences at the start, 8 at step 50")
    assert titles["runtime"].startswith("Seconds for 16 tokens, batch 1: ")
    for name in COMMANDS:
        pixels = picture_of(found[name])[1]
        # The corners are clear, so that a page shows through, and the card behind them is not.
        assert max(pixels[0, 0, 3], pixels[-1, -1, 3]) < 9 and pixels[40, 10, 3] > 246, name
        assert pixels.shape[1] == 1350 and len(numpy.unique(pixels.reshape(-1, 4), axis=0)) > 20


@pytest.mark.slow
def test_without_rows_every_chart_says_which_command_makes_them(copy):
    found = cells(execute(copy))
    assert "python benchmark.py makes the first ones" in text_of(found["load"])
    assert all(text_of(found[name]) == no_rows(name) for name in COMMANDS)


if __name__ == "__main__":
    execute(ROOT / NOTEBOOK if len(sys.argv) < 2 else Path(sys.argv[1]).resolve())
