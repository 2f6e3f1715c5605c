"""Draw the pictures in docs/ from recorded runs and measured rows; no number is typed in by hand.

Each picture is drawn by one command, from a file in this repository or from a run of a few seconds:

    architecture        the parts of the engine           plots/pictures.py
    pool, block_table   results/recordings/demo.jsonl     python generate.py --record FILE
    batching            a run of the real scheduler       plots/pictures.py
    prefix_tree         results/recordings/prefixes.jsonl   python generate.py .. --record FILE
    beam_tree, copies   beams.jsonl, forks.jsonl          see RECORDED
    softmax             paged_attention.fold_block        this file
    memory              results/cpu/concurrency.csv       python benchmark.py concurrency --simulate
    kernels, load       results/cpu/kernels.csv, peers.csv   python benchmark.py kernels --out FILE
    scale               results/cpu/scale.csv             python benchmark.py scale --out FILE
    engines             results/cpu/engines.csv           python benchmark.py engines --out FILE
    gpu                 results/nvidia-h200/engine.csv    python benchmark.py latency --out FILE

If the data of a picture are missing, the program names the command that makes them. The same data
give the same bytes, so a test draws all pictures again and compares them with those in docs/.

Run: python -m plots.draw
     python -m plots.draw pool --recording steps.jsonl --out pool.svg
     python -m plots.draw kernels --results results/my-machine --out kernels.png
"""

import argparse
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.results import read
from paged_attention import fold_block
from plots import gpu
from plots.palette import CARD, FAINT, INK, LIGHT, PALETTE, axes_on, card, save
from plots.pictures import (
    draw_architecture,
    draw_batching,
    draw_pool,
    draw_table,
    two_batchings,
)
from plots.trees import draw_copies, draw_tree
from watch.files import replacing
from watch.recorder import read_recording

ROOT = Path(__file__).resolve().parent.parent
# (prompt tokens, new tokens) of twelve requests like those of generate.py's demonstration.
TALES = [(14, 90), (11, 60), (8, 40), (7, 110), (3, 30), (10, 70)]
TALES += [(20, 80), (3, 100), (16, 50), (8, 60), (5, 45), (18, 75)]
# Recordings of sequences that share blocks: name -> the arguments of generate.py that made it.
KING = "Once upon a time there was a king who had"
SMALL = "--block-size 4 --num-blocks 40 --max-tokens 16"
RECORDED = {
    "prefixes": f'"{KING} three sons" "{KING} a daughter" "{KING[:28]} poor miller" {SMALL}',
    "forks": f'"{KING}" --n 4 --temperature 0.7 --seed 1 {SMALL}',
    "beams": f'"{KING}" --beam-width 4 {SMALL}',
}


class Missing(Exception):
    """The data of a picture are missing. The message names them and the command that makes them."""


# ---- the online softmax --------------------------------------------------------------------------
class Fold(NamedTuple):
    """One block of an online softmax: its scores, and the state after it."""

    scores: list[float]
    m: float  # the running maximum
    l: float  # the denominator
    kept: float  # the part of l that comes from earlier blocks, scaled to the new maximum
    error: float  # largest distance of acc / l from attention over the whole context


def softmax_folds(num_blocks: int = 8, block_size: int = 4, head_dim: int = 16) -> list[Fold]:
    """One query over a context of random keys and values, block by block, in float64."""
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    q = torch.randn(head_dim, **options)
    k, v = torch.randn(2, num_blocks, block_size, head_dim, **options)
    scores = k @ q * head_dim**-0.5  # (num_blocks, block_size)
    dense = scores.flatten().softmax(0) @ v.flatten(0, 1)  # all at once: (head_dim,)
    # The loop of paged_attention.py for one row of queries, and its state after each block.
    m = torch.tensor([-math.inf]).double()
    l = torch.zeros(1)
    acc = torch.zeros(1, head_dim)
    folds = []
    for block, values in zip(scores, v, strict=True):
        is_first = not folds
        m, l, acc = fold_block(m, l, acc, block[None], values)
        # l is the kept part plus this block's own sum. The first block keeps nothing.
        kept = 0.0 if is_first else (l - (block - m).exp().sum()).clamp(min=0).item()
        error = (acc / l[:, None] - dense).abs().max().item()
        folds.append(Fold(block.tolist(), m.item(), l.item(), kept, error))
    return folds


def draw_softmax(folds: list[Fold]) -> Figure:
    """Three rows over the blocks: scores and their maximum, the denominator, the error."""
    title = "The online softmax: block by block, and exact after the last one"
    words = (
        "One query reads its context block by block. If a block has a larger score, everything "
        "summed so far is multiplied by e^(m - m'), and\nthe sum goes on. The scores are never "
        "needed all at once, so the blocks may lie anywhere in memory."
    )
    figure = card(5.3, title, words)
    numbers = list(range(1, len(folds) + 1))
    common = {"xlim": (0.4, len(folds) + 0.6)}
    top = axes_on(figure, 0.7, 3.15, 0.3, 0.85, xticks=[], title="the scores of a block", **common)
    for number, fold in zip(numbers, folds, strict=True):
        top.plot([number] * len(fold.scores), fold.scores, "o", color=PALETTE[0], markersize=4)
    edges = [number - 0.5 for number in [*numbers, len(folds) + 1]]
    style = {"color": PALETTE[5], "linewidth": 1.6, "label": "running maximum m"}
    top.stairs([fold.m for fold in folds], edges, baseline=None, **style)
    middle = axes_on(figure, 0.7, 1.85, 0.3, 0.85, xticks=[], title="denominator l", **common)
    kept = [fold.kept for fold in folds]
    added = [fold.l - fold.kept for fold in folds]
    middle.bar(numbers, kept, 0.7, color=LIGHT, label="kept, smaller where m rose")
    middle.bar(numbers, added, 0.7, kept, color=PALETTE[0], label="added by this block")
    words = "error: distance of acc / l from attention over the whole context at once"
    below = axes_on(figure, 0.7, 0.55, 0.3, 0.85, xlabel="blocks read", title=words, **common)
    below.bar(numbers, [fold.error for fold in folds], 0.7, color=PALETTE[1])
    below.set_xticks(numbers)
    below.text(len(folds), 0, "0", ha="center", va="bottom", color=FAINT)
    for ax in (top, middle):
        ax.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, borderpad=0)
    return figure


# ---- where memory goes ---------------------------------------------------------------------------
PLANS = {  # contender in the rows -> what a request reserves when it starts
    "maximum, buddies": "the maximum",
    "power of two, buddies": "a power of two",
    "oracle, buddies": "the true length",
    "paged": "paged",
}
SHARES = {  # share of the pool in the rows -> what it means, colour
    "used": ("holds a token", PALETTE[0]),
    "tail": ("unfilled end of a block", PALETTE[4]),
    "later": ("filled later", PALETTE[2]),
    "never": ("reserved, never filled", PALETTE[1]),
    "free": ("free, in too small holes", LIGHT),
}


def memory_shares(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """Plan -> metric -> row, of the file's first workload where all requests come at once."""
    found: dict[str, dict[str, dict]] = {}
    atonce = [row for row in rows if row["workload"].endswith(", all at once")]
    chosen = [row for row in atonce if row["workload"] == atonce[0]["workload"]]
    for row in newest(chosen, "contender", "metric").values():
        if row["contender"] in PLANS:
            found.setdefault(PLANS[row["contender"]], {})[row["metric"]] = row
    if len(found) < len(PLANS):
        raise Missing("not all plans of memory: python benchmark.py concurrency measures them")
    return {plan: found[plan] for plan in PLANS.values()}


def workload_in_words(workload: str) -> str:
    """Example: "chats, filter 1024, requests=8, blocks=64" -> "8 requests ... in 64 blocks."."""
    trace, longest, num_requests, num_blocks = re.match(
        r"(.*), filter (\d+), requests=(\d+), blocks=(\d+)", workload
    ).groups()
    requests = f"{int(num_requests):,} requests of at most {int(longest):,} tokens ({trace})"
    return f"{requests}, all there at once, in {int(num_blocks):,} blocks."


def draw_memory(rows: list[dict]) -> Figure:
    """A bar for each plan of memory: which share of the pool holds tokens, and what the rest is."""
    found = memory_shares(rows)
    used = [plan["share of the pool: used"]["median"] for plan in found.values()]
    title = f"Reserving the maximum fills {used[0]:.0f}% of the memory with tokens, "
    title += f"paging {used[-1]:.0f}%"
    workload = found["paged"]["share of the pool: used"]["workload"]
    words = (
        f"{workload_in_words(workload)}\nOn the left: what a request reserves when it starts. "
        "Averages over the steps in which a request waits."
    )
    figure = card(3.45, title, words)
    ax = axes_on(figure, 1.35, 0.85, 1.6, 1.5, xlim=(0, 100), xlabel="% of the pool")
    plans = list(found)[::-1]  # the first one is drawn on top
    left = [0.0] * len(plans)
    for share, (label, colour) in SHARES.items():
        widths = [found[plan][f"share of the pool: {share}"]["median"] for plan in plans]
        ax.barh(plans, widths, 0.72, left, color=colour, edgecolor=CARD, label=label)
        left = [x + width for x, width in zip(left, widths, strict=True)]
    for y, plan in enumerate(plans):
        share = found[plan]["share of the pool: used"]["median"]
        ax.text(1, y, f"{share:.1f}%", color="#ffffff", weight="bold", va="center")
        running = found[plan]["running at once, mean"]["median"]
        ax.text(102, y, f"{running:.0f} run at once", va="center")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=5, columnspacing=1.0)
    return figure


# ---- measured rows -------------------------------------------------------------------------------
def newest(rows: Iterable[dict], *keys: str) -> dict[tuple, dict]:
    """The last row for each combination of values in these columns."""
    # In a dict a repeated key keeps its first position and takes the last value.
    return {tuple(row[key] for key in keys): row for row in rows}


def ladder(rows: list[dict], workload: str) -> dict[tuple[str, str, int], dict]:
    """The newest bandwidth of each (contender, dtype, threads) in a workload."""
    metrics = ("KV bandwidth", "bandwidth")
    chosen = [row for row in rows if row["metric"] in metrics and row["workload"] == workload]
    found = newest(chosen, "contender", "dtype", "threads")
    if not found:
        raise Missing(f"no bandwidth of {workload!r}: python benchmark.py kernels measures it")
    return found


def draw_kernels(rows: list[dict], workload: str) -> Figure:
    """GB/s of each kernel: a panel for each dtype, a bar for each number of threads."""
    found = ladder(rows, workload)
    dtypes = sorted({dtype for _, dtype, _ in found}, reverse=True)  # float32 before bfloat16
    threads = sorted({number for _, _, number in found})
    # Kernels are ordered by their speed in the first dtype, with its first number of threads.
    setting = next(key[1:] for key in found if key[1] == dtypes[0])
    speeds = {key[0]: row["median"] for key, row in found.items() if key[1:] == setting}
    contenders = sorted({key[0] for key in found}, key=lambda name: speeds.get(name, 0))
    kernels = [speed for name, speed in speeds.items() if not name.startswith("read")] or [0.0]
    title = f"Decode attention of one layer: {min(kernels):.1f} to {max(kernels):.1f} GB/s, "
    title += f"{setting[0]}, {setting[1]} thread{'s' * (setting[1] > 1)}"
    device = next(iter(found.values()))["device"]
    words = f"Keys and values that each kernel reads a second: {workload},\n{device}. "
    words += "Medians; the thin lines go from the slowest repeat to the fastest."
    figure = card(1.85 + 0.36 * len(contenders), title, words)
    width = 5.9 / len(dtypes)
    for column, dtype in enumerate(dtypes):
        right = 0.3 + (len(dtypes) - 1 - column) * (width + 0.15)
        left = 9 - right - width
        ax = axes_on(figure, left, 0.55, right, 0.36 * len(contenders), title=dtype, xlabel="GB/s")
        for i, number in enumerate(threads):
            keys = [(name, dtype, number) for name in contenders]
            measured_keys = [(y, found[key]) for y, key in enumerate(keys) if key in found]
            height = 0.8 / len(threads)
            ys = [y + 0.4 - height * (i + 0.5) for y, _ in measured_keys]
            medians, errors = spread([row for _, row in measured_keys])
            colour = (PALETTE[0], PALETTE[4])[i % 2]
            style = {"color": colour, "label": f"{number} thread{'s' * (number > 1)}"}
            whiskers = {"ecolor": INK, "elinewidth": 0.8, "capsize": 1.5}
            ax.barh(ys, medians, height, xerr=errors, error_kw=whiskers, **style)
        ax.set_yticks(range(len(contenders)), contenders if column == 0 else [""] * len(contenders))
        ax.tick_params(axis="y", length=0)
    ax.legend(loc="lower right", facecolor=CARD, frameon=True, edgecolor="none", framealpha=0.8)
    return figure


def spread(rows: list[dict]) -> tuple[list[float], tuple[list[float], list[float]]]:
    """The medians, and for each its distance to the minimum and to the maximum."""
    medians = [row["median"] for row in rows]
    below = [row["median"] - row["min"] for row in rows]
    above = [row["max"] - row["median"] for row in rows]
    return medians, (below, above)


def load_curves(rows: list[dict], metric: str) -> dict[str, list[tuple[int, dict]]]:
    """For each contender: (batch size, newest row) of a metric of decoding, float32, one thread."""
    found: dict[str, list[tuple[int, dict]]] = {}
    setting = (metric, "float32", 1)
    chosen = [row for row in rows if (row["metric"], row["dtype"], row["threads"]) == setting]
    for row in newest(chosen, "contender", "workload").values():
        if match := re.match(r"decode batch=(\d+) ", row["workload"]):
            found.setdefault(row["contender"], []).append((int(match[1]), row))
    if not found:
        raise Missing(f"no {metric!r} of decoding: python benchmark.py peers measures it")
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}


def draw_load(rows: list[dict]) -> Figure:
    """Tokens a second and milliseconds a step, against the number of sequences at once."""
    panels = {"generated tokens": "tokens/s", "time a step": "ms a step"}
    curves = {metric: load_curves(rows, metric) for metric in panels}
    rate, time = (next(iter(curves[metric].values())) for metric in panels)
    gains = [points[-1][1]["median"] / points[0][1]["median"] for points in (rate, time)]
    title = f"{rate[-1][0]} sequences at once: {gains[0]:.1f} times the tokens a second, "
    title += f"in steps {gains[1]:.1f} times as long"
    words = (
        f"Decoding, float32, one thread, {rows[-1]['model']}, {rows[-1]['device']}. The title's "
        f"figures are those of: {next(iter(curves['time a step']))}.\n"
        "Medians; the thin lines go from the smallest repeat to the largest."
    )
    figure = card(3.6, title, words)
    for left, right, (metric, label) in zip((0.95, 5.3), (4.65, 0.3), panels.items(), strict=True):
        ax = axes_on(figure, left, 0.55, right, 1.85, xlabel="sequences at once", title=label)
        for colour, (name, points) in zip(PALETTE, curves[metric].items()):
            medians, spreads = spread([row for _, row in points])
            batches = [batch for batch, _ in points]
            style = {"marker": "o", "markersize": 4, "capsize": 3, "color": colour, "label": name}
            ax.errorbar(batches, medians, spreads, **style)
        ax.set_xscale("log", base=2)
        ax.set_xticks(batches, batches)
        ax.set_ylim(bottom=0)
    figure.axes[0].legend(loc="upper left")
    return figure


ROUTER_COLOURS = {"random": 1, "round-robin": 3, "least-loaded": 2, "prefix": 0}  # of PALETTE


def cluster_curves(rows: list[dict], metric: str) -> dict[str, list[tuple[int, float]]]:
    """For each router: (replicas, figure) of the recorded trace, else of the conversations."""
    chosen = [row for row in rows if row["metric"] == metric and "replicas=" in row["workload"]]
    chosen = [row for row in chosen if row["workload"].startswith("trace")] or chosen
    found: dict[str, list[tuple[int, float]]] = {}
    for row in newest(chosen, "contender", "workload").values():
        point = int(row["workload"].rsplit("=", 1)[1]), row["median"]
        found.setdefault(row["contender"], []).append(point)
    if not found.keys() >= ROUTER_COLOURS.keys():
        raise Missing(f"not all routers have {metric!r}: python benchmark.py scale measures them")
    return {router: sorted(found[router]) for router in ROUTER_COLOURS}


def draw_scale(rows: list[dict]) -> Figure:
    """What is found again, and how long the last of a hundred waits, against the replicas."""
    found = cluster_curves(rows, "prompt tokens found")
    waits = cluster_curves(rows, "time to first token, 99th percentile")
    count, share = found["prefix"][-1]
    title = f"{count:,} replicas: prefix routing finds {share:.0f}% of the prompts again, "
    title += f"random routing {found['random'][-1][1]:.0f}%"
    row = next(row for row in rows if "replicas=" in row["workload"])
    words = (
        f"Simulated replicas, a line for each router; the traffic is the same for any number of "
        f"them. {row['model']}.\nThe recorded trace of 12,031 requests where there is one, else "
        "conversations that are made up."
    )
    figure = card(3.6, title, words)
    panels = ((0.75, 4.75, found, "% of the prompts' tokens found"),
              (5.15, 0.3, waits, "s to the first token, 99th percentile"))  # fmt: skip
    for left, right, curves, label in panels:
        ax = axes_on(figure, left, 0.55, right, 1.85, xlabel="replicas", title=label, xscale="log")
        for router, colour in ROUTER_COLOURS.items():
            style = {"marker": "o", "markersize": 4, "color": PALETTE[colour], "label": router}
            ax.plot(*zip(*curves[router], strict=True), **style)
        counts = [number for number, _ in curves["random"]]
        ax.set_xticks(counts, [f"{number:,}" for number in counts])
        ax.minorticks_off()
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[1].set_yscale("log")
    figure.axes[1].legend(loc="upper right")
    return figure


def engine_rates(rows: list[dict], threads: int) -> dict[tuple[str, int, str], dict]:
    """The newest decode rate of each (dtype, sequences, engine)."""
    chosen = [row for row in rows if row["metric"] == "generated tokens"]
    return {
        (row["dtype"], int(re.search(r"batch=(\d+)", row["workload"])[1]), row["contender"]): row
        for row in chosen
        if row["threads"] == threads
    }


def draw_engines(rows: list[dict]) -> Figure:
    """Decode rates of all engines: a column for each dtype, a row for each number of sequences."""
    threads = max((row["threads"] for row in rows), default=0)
    found = engine_rates(rows, threads)
    if not found:
        raise Missing("no rates of engines: python benchmark.py engines measures them")
    dtypes = [name for name in ("float32", "bfloat16", "int8") if any(name in key for key in found)]
    batches = sorted({batch for _, batch, _ in found})
    contenders = list(dict.fromkeys(name for _, _, name in found))[::-1]  # the first one on top
    last = rows[-1]
    title = f"Tokens a second beside other engines, {threads} thread{'s' * (threads > 1)}"
    prompts = re.search(r"prompt=(\d+)", last["workload"])[1]
    words = (
        f"Decode, all sequences together: {last['model']}, prompts of {prompts} tokens, "
        f"{last['device']}.\n"
        "Medians of rounds in turn; the thin lines go from the slowest round to the fastest."
    )
    height = 0.17 * len(contenders)
    figure = card(1.05 + (height + 0.4) * len(batches), title, words)
    width = 7.4 / len(dtypes)
    for row_number, batch in enumerate(reversed(batches)):
        for column, dtype in enumerate(dtypes):
            left = 1.2 + column * (width + 0.1)
            bottom = 0.25 + row_number * (height + 0.4)
            ax = axes_on(figure, left, bottom, 9 - left - width + 0.1, height)
            ax.set_title(f"{batch} sequence{'s' * (batch > 1)}, {dtype}", pad=3)
            rates = {name: found.get((dtype, batch, name)) for name in contenders}
            draw_rates(ax, rates, lambda name: name == "PagedGPT")
            if column:
                ax.set_yticklabels([])
    return figure


def draw_rates(ax: Axes, rates: dict[str, dict | None], is_ours: Callable[[str], bool]) -> None:
    """A bar for each engine with its rate beside it; ours has a colour of its own."""
    ax.set_ylim(-0.6, len(rates) - 0.4)
    ax.set_xlim(0, 1.25 * max((row["max"] for row in rates.values() if row), default=1))
    for y, (name, row) in enumerate(rates.items()):
        if row is None:
            ax.text(0, y, " -", va="center", color=FAINT, size=7)
            continue
        medians, errors = spread([row])
        whiskers = {"ecolor": INK, "elinewidth": 0.8, "capsize": 1.5}
        colour = PALETTE[0] if is_ours(name) else LIGHT
        ax.barh([y], medians, 0.8, xerr=errors, error_kw=whiskers, color=colour)
        ax.text(row["max"], y, f"  {row['median']:,.0f}", va="center", size=7)
    ax.set_yticks(range(len(rates)), list(rates), size=7.5)
    ax.set_xticks([])
    ax.tick_params(axis="y", length=0)


GPU_BARS = {gpu.FLOOR: LIGHT, gpu.RECORDED: PALETTE[1], gpu.FUSED: PALETTE[0]}
GPU_BARS |= {gpu.SMALL: PALETTE[2]}


def draw_gpu(rows: list[dict]) -> Figure:
    """A decode step of the fewest and the most sequences by ways, and requests in tokens/s."""
    rows = gpu.chosen(rows)
    found = gpu.Steps(rows)
    # Of batches between only small linears are of interest: the table shows them.
    ends = {batch for shape in (found.shapes[:1], found.shapes[-1:]) for batch, _ in shape}
    shapes = [shape for shape in found.shapes if shape[0] in ends][::-1]  # the first one on top
    served = {row["contender"]: row for row in rows if row["metric"] == "output tokens"}
    if not served or not any(found.share_of_floor(shape) for shape in shapes):
        raise Missing("no steps beside their floor: python benchmark.py latency measures them")
    title = f"{rows[-1]['device']}: the bytes alone are "
    parts = [(found.share_of_floor(shape), shape[0]) for shape in (shapes[0], shapes[-1])]
    title += " and ".join(f"{part:.0f}% of a step of {batch}" for part, batch in parts if part)
    words = (
        f"{rows[-1]['model']} in {rows[-1]['dtype']}. Left: the forward of a decode step, from a "
        "CUDA graph. Byte floor: weights, K and V at the speed of a plain\nread. Right: 256 mixed "
        "requests. Medians; the thin lines go from the smallest repeat to the largest."
    )
    figure = card(1.55 + 0.62 * len(shapes), title, words)
    height = 0.62 * len(shapes)
    left = axes_on(figure, 1.4, 0.5, 4.1, height, xlabel="ms on the device")
    draw_steps(left, found, shapes)
    right = axes_on(figure, 7.05, 0.5, 0.3, height, xlabel="output tokens/s")
    draw_rates(right, dict(reversed(served.items())), lambda name: not name.startswith(gpu.PEER))
    return figure


def draw_steps(ax: Axes, found: gpu.Steps, shapes: list[gpu.Shape]) -> None:
    """For each shape a bar for its floor and for each way; a mark where the next token comes."""
    for i, (name, colour) in enumerate(GPU_BARS.items()):
        times = [(y, found.get(name, gpu.STEP, shape)) for y, shape in enumerate(shapes)]
        known = [(y + 0.4 - 0.2 * (i + 0.5), t) for y, t in times if t is not None]
        label = gpu.WAYS.get(name, name)
        ax.barh([y for y, _ in known], [t for _, t in known], 0.2, color=colour, label=label)
    for y, shape in enumerate(shapes):
        if best := found.fastest(shape, gpu.TOKEN, gpu.AHEAD.values()):
            label = "token to token, ahead" if y == 0 else None
            ax.plot([best[0]] * 2, [y - 0.4, y + 0.4], color=INK, linewidth=1.2, label=label)
    ax.set_yticks(range(len(shapes)), [f"{B} x {T} tokens" for B, T in shapes])
    ax.tick_params(axis="y", length=0)
    ax.legend(loc="upper right", borderpad=0)


# ---- all of them ---------------------------------------------------------------------------------
def recording(args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """The recording that --recording names. Raises Missing if it holds no step."""
    header, steps = load(read_recording, args.recording, "python generate.py --record")
    if not steps:
        raise Missing(f"{args.recording} holds no step: record a run that takes one")
    return header, steps


def recorded(name: str) -> tuple[dict, list[dict]]:
    """A recording of RECORDED."""
    path = ROOT / "results/recordings" / f"{name}.jsonl"
    return load(read_recording, path, f"python generate.py {RECORDED[name]} --record")


def measured(args: argparse.Namespace, name: str, path: Path | None = None) -> list[dict]:
    """An experiment's rows: from the folder that --results names, else from `path` or the CPU's."""
    if args.results is not None or path is None:
        path = (args.results or ROOT / "results/cpu") / (path.name if path else f"{name}.csv")
    return load(read, path, f"python benchmark.py {name} --out")


def load(reader: Callable, path: Path, command: str):
    """Read a file. Raises Missing with the command that makes the file if that fails."""
    try:
        return reader(path)
    except ValueError as error:
        raise Missing(f"{error} (made by: {command} {path})") from None


PICTURES: dict[str, Callable[[argparse.Namespace], Figure]] = {
    "architecture": lambda args: draw_architecture(),
    "pool": lambda args: draw_pool(*recording(args)),
    "block_table": lambda args: draw_table(*recording(args)),
    "memory": lambda args: draw_memory(measured(args, "concurrency")),
    "batching": lambda args: draw_batching(*two_batchings(TALES, 4)),
    "prefix_tree": lambda args: draw_tree(*recorded("prefixes"), "prompts"),
    "beam_tree": lambda args: draw_tree(*recorded("beams"), "beams"),
    "copies": lambda args: draw_copies(*recorded("forks")),
    "softmax": lambda args: draw_softmax(softmax_folds()),
    "kernels": lambda args: draw_kernels(measured(args, "kernels"), args.workload),
    "engines": lambda args: draw_engines(measured(args, "engines")),
    "load": lambda args: draw_load(measured(args, "peers")),
    "scale": lambda args: draw_scale(measured(args, "scale")),
    "gpu": lambda args: draw_gpu(measured(args, "latency", gpu.FOLDER / "engine.csv")),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    add = parser.add_argument
    add("picture", nargs="?", choices=list(PICTURES), help="which picture; default: all")
    add("--out", type=Path, help="file of this one picture; default: docs/PICTURE.svg")
    default = ROOT / "results/recordings/demo.jsonl"
    add("--recording", type=Path, default=default, help="a file written by generate.py --record")
    add("--results", type=Path, help="folder of measured rows (default: the repository's)")
    workload = "batch=32 context=256 block_size=16"
    add("--workload", default=workload, help=f"workload of the kernels (default {workload})")
    args = parser.parse_args(argv)
    if args.out is not None and args.picture is None:
        parser.error("--out is the file of one picture: name the picture")
    return args


def main(argv: list[str] | None = None) -> None:
    """Draw one picture or all. A picture without data is an error if it was asked for by name."""
    args = parse_args(argv)
    names = list(PICTURES) if args.picture is None else [args.picture]
    paths = [args.out or ROOT / "docs" / f"{name}.svg" for name in names]
    drawn = []
    with replacing(*paths) as parts:
        for name, path, part in zip(names, paths, parts, strict=True):
            try:
                save(lambda name=name: PICTURES[name](args), part)
                drawn.append(path)
            except Missing as error:
                if args.picture is not None:
                    raise SystemExit(f"plots/draw.py: {error}") from None
                print(f"{name} is left out: {error}")
            except (ValueError, OSError) as error:  # an unknown ending, a folder, a full disk
                raise SystemExit(f"plots/draw.py: {path}: {error}") from None
    for path in drawn:
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
