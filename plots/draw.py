"""Draw the pictures in docs/ from recorded runs and measured rows: no figure is typed in by hand.

A picture that nobody can draw again is a claim. Each of these is made by one command from a file
that the repository holds, or from a run of a few seconds, and a test draws them all anew:

    pool, block_table   results/recordings/demo.jsonl     python generate.py --record FILE
    memory, batching    a run of the real scheduler       plots/pictures.py
    softmax             paged_attention.fold_block        here
    kernels, load       results/cpu/kernels.csv, peers.csv   python benchmark.py kernels --out FILE

A picture whose data are missing is left out, with the command that makes them. Colours, cards and
why they have a ground of their own: plots/palette.py. The same data give the same bytes.

Run: python -m plots.draw
     python -m plots.draw pool --recording steps.jsonl --out pool.svg
     python -m plots.draw kernels --results results/my-machine --out kernels.png
Try: python generate.py --block-size 2 --record steps.jsonl, and draw that pool (what has become of
the holes?).
"""

import argparse
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure

from experiments.results import read
from paged_attention import fold_block
from plots.palette import CARD, FAINT, INK, LIGHT, PALETTE, axes_on, card, save
from plots.pictures import (
    draw_batching,
    draw_memory,
    draw_pool,
    draw_table,
    four_plans,
    random_lengths,
    two_batchings,
)
from watch.recorder import read_recording

ROOT = Path(__file__).resolve().parent.parent
# Prompt and answer of twelve requests, about as long as the twelve tales of generate.py.
TALES = [(14, 90), (11, 60), (8, 40), (7, 110), (3, 30), (10, 70)]
TALES += [(20, 80), (3, 100), (16, 50), (8, 60), (5, 45), (18, 75)]


class Missing(Exception):
    """There are no data for a picture; the message says which, and what makes them."""


# ---- the online softmax --------------------------------------------------------------------------
class Fold(NamedTuple):
    """One block of an online softmax: its scores, and what m, l and the result are behind it."""

    scores: list[float]
    m: float
    l: float
    kept: float  # of l: what was summed before, shrunken to the new maximum
    error: float  # largest distance of acc / l from attention over the whole context


def softmax_folds(num_blocks: int = 8, block_size: int = 4, head_dim: int = 16) -> list[Fold]:
    """One query over a context of random keys and values, block by block, in float64."""
    generator = torch.Generator().manual_seed(0)
    shape = num_blocks, block_size, head_dim
    options = {"generator": generator, "dtype": torch.float64}
    q, k, v = torch.randn(head_dim, **options), *torch.randn(2, *shape, **options)
    scores = k @ q * head_dim**-0.5  # (num_blocks, block_size)
    dense = scores.flatten().softmax(0) @ v.flatten(0, 1)  # all at once, (head_dim,)
    # The loop of paged_attention.py for one row, and its state after each block.
    m, l, acc = torch.tensor([-math.inf]).double(), torch.zeros(1), torch.zeros(1, head_dim)
    folds = []
    for block, values in zip(scores, v, strict=True):
        before, (m, l, acc) = l, fold_block(m, l, acc, block[None], values)
        # l is what was kept plus this block's own sum: the difference is what was kept.
        kept = (l - (block - m).exp().sum()).clamp(min=0) if before else before
        error = (acc / l[:, None] - dense).abs().max().item()
        folds.append(Fold(block.tolist(), m.item(), l.item(), kept.item(), error))
    return folds


def draw_softmax(folds: list[Fold]) -> Figure:
    """Three rows over the blocks: scores and their maximum, the denominator, the error."""
    title = "The online softmax: one block at a time, and exact behind the last"
    words = (
        "One query reads its context block by block. When a block brings a larger score, what was "
        "summed before shrinks by e^(m - m'), and\nthe denominator goes on from there. Nothing "
        "needs all scores at once, so the blocks may lie anywhere."
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
    middle.bar(numbers, kept, 0.7, color=LIGHT, label="kept, shrunken where m rose")
    middle.bar(numbers, added, 0.7, kept, color=PALETTE[0], label="added by this block")
    words = "error: how far acc / l is from attention over the whole context at once"
    below = axes_on(figure, 0.7, 0.55, 0.3, 0.85, xlabel="blocks read", title=words, **common)
    below.bar(numbers, [fold.error for fold in folds], 0.7, color=PALETTE[1])
    below.set_xticks(numbers)
    below.text(len(folds), 0, "0", ha="center", va="bottom", color=FAINT)
    for ax in (top, middle):
        ax.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, borderpad=0)
    return figure


# ---- measured rows -------------------------------------------------------------------------------
def newest(rows: Iterable[dict], *keys: str) -> dict[tuple, dict]:
    """Of rows with the same values in these columns the last one, in the order of the first."""
    # A dict keeps a key where it first stood, and the value that came last.
    return {tuple(row[key] for key in keys): row for row in rows}


def ladder(rows: list[dict], workload: str) -> dict[tuple[str, str, int], dict]:
    """The newest bandwidth of each (contender, dtype, threads) in a workload."""
    chosen = [r for r in rows if r["metric"] in ("KV bandwidth", "bandwidth")]
    found = newest(
        (row for row in chosen if row["workload"] == workload), "contender", "dtype", "threads"
    )
    if not found:
        raise Missing(f"no bandwidth of {workload!r}: python benchmark.py kernels measures it")
    return found


def draw_kernels(rows: list[dict], workload: str) -> Figure:
    """GB/s of each way to attend, a panel a dtype, a bar for each number of threads."""
    found = ladder(rows, workload)
    dtypes, threads = (sorted({key[i] for key in found}) for i in (1, 2))
    dtypes.reverse()  # float32 before bfloat16
    # The rungs in the order of their speed in the first setting.
    setting = next(key[1:] for key in found if key[1] == dtypes[0])
    speeds = {key[0]: row["median"] for key, row in found.items() if key[1:] == setting}
    contenders = sorted({key[0] for key in found}, key=lambda name: speeds.get(name, 0))
    kernels = [speed for name, speed in speeds.items() if not name.startswith("read")] or [0.0]
    title = f"Decode attention, a layer: from {min(kernels):.1f} to {max(kernels):.1f} GB/s"
    device = next(iter(found.values()))["device"]
    words = f"Keys and values that each way to attend reads a second: {workload},\n{device}. "
    words += "Medians; the lines go from the slowest repeat to the fastest."
    figure = card(1.85 + 0.36 * len(contenders), title, words)
    width = 5.9 / len(dtypes)
    for column, dtype in enumerate(dtypes):
        right = 0.3 + (len(dtypes) - 1 - column) * (width + 0.15)
        left = 9 - right - width
        ax = axes_on(figure, left, 0.55, right, 0.36 * len(contenders), title=dtype, xlabel="GB/s")
        for i, number in enumerate(threads):
            keys = [(name, dtype, number) for name in contenders]
            there = [(y, found[key]) for y, key in enumerate(keys) if key in found]
            height = 0.8 / len(threads)
            ys = [y + 0.4 - height * (i + 0.5) for y, _ in there]
            bars = spread([row for _, row in there])
            colour = (PALETTE[0], PALETTE[4])[i % 2]
            look = {"color": colour, "label": f"{number} thread{'s' * (number > 1)}"}
            whiskers = {"ecolor": INK, "elinewidth": 0.8, "capsize": 1.5}
            ax.barh(ys, bars[0], height, xerr=bars[1], error_kw=whiskers, **look)
        ax.set_yticks(range(len(contenders)), contenders if column == 0 else [""] * len(contenders))
        ax.tick_params(axis="y", length=0)
    ax.legend(loc="lower right", facecolor=CARD, frameon=True, edgecolor="none", framealpha=0.8)
    return figure


def spread(rows: list[dict]) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Medians, and how far the least lies below and the most above each."""
    medians = [row["median"] for row in rows]
    below = [row["median"] - row["min"] for row in rows]
    return medians, (below, [row["max"] - row["median"] for row in rows])


def load_curves(rows: list[dict], metric: str) -> dict[str, list[tuple[int, dict]]]:
    """Of each contender (batch, newest row) of a metric of decoding, float32, one thread."""
    found: dict[str, list[tuple[int, dict]]] = {}
    chosen = (r for r in rows if (r["metric"], r["dtype"], r["threads"]) == (metric, "float32", 1))
    for row in newest(chosen, "contender", "workload").values():
        if match := re.match(r"decode batch=(\d+) ", row["workload"]):
            found.setdefault(row["contender"], []).append((int(match[1]), row))
    if not found:
        raise Missing(f"no {metric!r} of decoding: python benchmark.py peers measures it")
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}


def draw_load(rows: list[dict]) -> Figure:
    """Tokens a second and milliseconds a step, over how many sequences decode at once."""
    panels = {"generated tokens": "tokens/s", "time a step": "ms a step"}
    curves = {metric: load_curves(rows, metric) for metric in panels}
    rate, time = (next(iter(curves[metric].values())) for metric in panels)
    gains = [points[-1][1]["median"] / points[0][1]["median"] for points in (rate, time)]
    title = f"{rate[-1][0]} sequences at once: {gains[0]:.1f} times the tokens a second, "
    title += f"in steps {gains[1]:.1f} times as long"
    words = (
        f"Decoding, float32, one thread, {rows[-1]['model']}, {rows[-1]['device']}. The title's "
        f"figures are of: {next(iter(curves['time a step']))}.\n"
        "Medians; the lines go from the least to the most of all repeats."
    )
    figure = card(3.6, title, words)
    for left, right, (metric, label) in zip((0.95, 5.3), (4.65, 0.3), panels.items(), strict=True):
        ax = axes_on(figure, left, 0.55, right, 1.85, xlabel="sequences at once", title=label)
        for colour, (name, points) in zip(PALETTE, curves[metric].items()):
            medians, spreads = spread([row for _, row in points])
            where = [batch for batch, _ in points]
            style = {"marker": "o", "markersize": 4, "capsize": 3, "color": colour, "label": name}
            ax.errorbar(where, medians, spreads, **style)
        ax.set_xscale("log", base=2)
        ax.set_xticks(where, where)
        ax.set_ylim(bottom=0)
    ax.legend(loc="upper left")
    return figure


# ---- all of them ---------------------------------------------------------------------------------
def recording(args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """What --recording names."""
    header, steps = load(read_recording, args.recording, "python generate.py --record")
    if not steps:
        raise Missing(f"{args.recording} holds no step: record a run that takes one")
    return header, steps


def measured(args: argparse.Namespace, name: str) -> list[dict]:
    """The rows of an experiment in the folder that --results names."""
    path = args.results / f"{name}.csv"
    return load(read, path, f"python benchmark.py {name} --out")


def load(reader: Callable, path: Path, command: str):
    """What a reader finds in a file, else Missing, with the command that makes the file."""
    try:
        return reader(path)
    except ValueError as error:
        raise Missing(f"{error} (made by: {command} {path})") from None


PICTURES: dict[str, Callable[[argparse.Namespace], Figure]] = {
    "pool": lambda args: draw_pool(*recording(args)),
    "block_table": lambda args: draw_table(*recording(args)),
    "memory": lambda args: draw_memory(four_plans(random_lengths(96))),
    "batching": lambda args: draw_batching(*two_batchings(TALES, 4)),
    "softmax": lambda args: draw_softmax(softmax_folds()),
    "kernels": lambda args: draw_kernels(measured(args, "kernels"), args.workload),
    "load": lambda args: draw_load(measured(args, "peers")),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    add = parser.add_argument
    add("picture", nargs="?", choices=list(PICTURES), help="which one; none: all of them")
    add("--out", type=Path, help="the file of the one picture; default: docs/PICTURE.svg")
    default = ROOT / "results/recordings/demo.jsonl"
    add("--recording", type=Path, default=default, help="what generate.py --record wrote")
    add("--results", type=Path, default=ROOT / "results/cpu", help="folder of measured rows")
    workload = "batch=32 context=256 block_size=16"
    add("--workload", default=workload, help=f"of the kernels (default {workload})")
    args = parser.parse_args(argv)
    if args.out is not None and args.picture is None:
        parser.error("--out is the file of one picture: name the picture")
    return args


def main(argv: list[str] | None = None) -> None:
    """Draw one picture or all; without its data one is a refusal, of all it is left out."""
    args = parse_args(argv)
    for name in PICTURES if args.picture is None else [args.picture]:
        path = args.out or ROOT / "docs" / f"{name}.svg"
        try:
            save(lambda name=name: PICTURES[name](args), path)
            print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
        except Missing as error:
            if args.picture is not None:
                raise SystemExit(f"plots/draw.py: {error}") from None
            print(f"{name} is left out: {error}")
        except (ValueError, OSError) as error:  # an unknown kind of file, a folder, a full disk
            raise SystemExit(f"plots/draw.py: {path}: {error}") from None


if __name__ == "__main__":
    main()
