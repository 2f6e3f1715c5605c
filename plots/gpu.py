"""What `make gpu-check` has measured on one GPU, as tables and sentences of docs/results.md.

The figures are those of the files in results/nvidia-h200. They come and go with each run, so what
is shown depends on the rows alone: a contender without a row is a "-" in its table, a table
without a row is the command that measures it, and a sentence without its rows is left out.

    engine.csv      a decode step, whole requests, a profile, transformers' ways
    kernels.csv     attention of one layer beside a plain read
    ceilings.csv    reads, a copy, an empty kernel, products

A shape is (sequences, tokens of each). A figure that a run has measured twice is the one with more
repeats.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from experiments.results import read

FOLDER = Path(__file__).resolve().parent.parent / "results/nvidia-h200"
COMMAND = "python -m experiments.gpu_check"

STEP, TOKEN = "time a step", "token to token"
FLOOR, RECORDED, SLABS = "byte floor", "recorded", "recorded, contiguous"
FUSED, SMALL = "recorded, fused", "recorded, fused, small linears"
WAYS = {RECORDED: "recorded", FUSED: "fused", SMALL: "small linears"}  # how the page says it
AHEAD = {name: f"{name}, ahead" for name in WAYS}
SERIAL, BEST_WAY = "serial", "one step ahead, fused"  # to serve requests
PEER, AGAINST = "transformers ", "speed against transformers "

LAYER_WEIGHTS = 12 * 12 * 768**2  # of the products of GPT-2's 12 layers
DATASHEET_TFLOPS = 989  # of an H200 in bfloat16, without sparsity: NVIDIA's datasheet

Shape = tuple[int, int]
Cells = tuple[str, list[str]]  # the head and the rows of a table, with "|" between their cells


# ---- finding a figure ----------------------------------------------------------------------------
def chosen(rows: Iterable[dict]) -> list[dict]:
    """Each figure once: of several rows those with the most repeats, of these the newest."""
    best: dict[tuple, dict] = {}
    for row in rows:
        key = tuple(row[name] for name in ("contender", "workload", "metric", "dtype"))
        if key not in best or row["repeats"] >= best[key]["repeats"]:
            best[key] = row
    return list(best.values())


def rows_of(file: str) -> list[dict]:
    """The rows of a file in FOLDER; none where there is no such file."""
    path = FOLDER / file
    return chosen(read(path)) if path.exists() else []


def shape_of(workload: str) -> Shape | None:
    """ "decode batch=64 context=512 block_size=16" -> (64, 512); None for other workloads."""
    found = re.match(r"(?:decode )?batch=(\d+) context=(\d+)", workload)
    return (int(found[1]), int(found[2])) if found else None


def in_words(shape: Shape) -> str:
    """ "256 sequences of 512 tokens" """
    return f"{shape[0]} sequence{'s' * (shape[0] > 1)} of {shape[1]:,} tokens"


class Steps:
    """The medians of decode steps, by (contender, metric, shape)."""

    def __init__(self, rows: list[dict]):
        shapes = {row["workload"]: shape_of(row["workload"]) for row in rows}
        steps = [row for row in rows if shapes[row["workload"]]]
        self.shapes: list[Shape] = sorted({shapes[row["workload"]] for row in steps})
        self.medians = {
            (row["contender"], row["metric"], shapes[row["workload"]]): row["median"]
            for row in steps
        }

    def get(self, contender: str, metric: str, shape: Shape) -> float | None:
        """The figure, or None."""
        return self.medians.get((contender, metric, shape))

    def fastest(self, shape: Shape, metric: str, ways: Iterable[str]) -> tuple[float, str] | None:
        """(milliseconds, contender) of the fastest of these ways; None if none was measured."""
        times = [(self.get(name, metric, shape), name) for name in ways]
        return min(((t, name) for t, name in times if t is not None), default=None)

    def share_of_floor(self, shape: Shape) -> float | None:
        """The byte floor / the fastest step over blocks, in percent."""
        floor, best = self.get(FLOOR, STEP, shape), self.fastest(shape, STEP, WAYS)
        return 100 * floor / best[0] if floor is not None and best else None

    def share_of_device(self, shape: Shape) -> float | None:
        """How much of the shortest time from token to token its forward takes, in percent."""
        best = self.fastest(shape, TOKEN, AHEAD.values())
        forward = self.get(best[1].removesuffix(", ahead"), STEP, shape) if best else None
        return 100 * forward / best[0] if best and forward is not None else None


def cell(value: float | None, form: str) -> str:
    """A figure as a cell; `form` as in "{:.2f}". "-" for None."""
    return "-" if value is None else form.format(value)


def cells(values: Iterable[float | None], form: str = "{:.3f}") -> str:
    """Figures as cells of a table."""
    return " | ".join(cell(value, form) for value in values)


def rate_of(rows: list[dict], way: str) -> float | None:
    """Output tokens a second of the requests that are served in this way."""
    found = [row for row in rows if (row["contender"], row["metric"]) == (way, "output tokens")]
    return found[0]["median"] if found else None


def median_of(rows: list[dict], contender: str, metric: str, workload: str = "") -> float | None:
    """The figure of the one contender and metric in a workload that begins so, or None."""
    found = [
        row["median"]
        for row in rows
        if (row["contender"], row["metric"]) == (contender, metric)
        and row["workload"].startswith(workload)
    ]
    return found[0] if found else None


# ---- the engine ----------------------------------------------------------------------------------
def steps(rows: list[dict]) -> Cells:
    """A decode step on the device by ways, beside its floor, and blocks against slabs."""
    found, lines = Steps(rows), []
    for shape in found.shapes:
        times = cells(found.get(name, STEP, shape) for name in (FLOOR, *WAYS, SLABS))
        share = cell(found.share_of_floor(shape), "{:.0f}%")
        paging = cell(found.get(RECORDED, f"speed against {SLABS}", shape), "{:.3f}")
        lines.append(f"{in_words(shape)} | {times} | {share} | {paging}")
    head = f"ms on the device | byte floor | {' | '.join(WAYS.values())} | recorded, slabs"
    return f"{head} | floor / fastest | speed: blocks / slabs", lines


def tokens(rows: list[dict]) -> Cells:
    """From token to token by the host's clock, serially and one step ahead."""
    found, lines = Steps(rows), []
    for shape in found.shapes:
        times = cells(found.get(name, TOKEN, shape) for name in (*WAYS, *AHEAD.values()))
        lines.append(
            f"{in_words(shape)} | {times} | {cell(found.share_of_device(shape), '{:.0f}%')}"
        )
    serially = " | ".join(WAYS.values())
    ahead = " | ".join(f"{name}, ahead" for name in WAYS.values())
    return f"ms from token to token | {serially} | {ahead} | the forward's part", lines


def requests(rows: list[dict]) -> Cells:
    """Whole workloads in tokens a second: mixed requests, and prompts alone."""
    lines = []
    for row in rows:
        if row["unit"] != "tokens/s":
            continue
        way, times = row["contender"], "-"
        if row["metric"] == "prompt tokens":
            B, T = re.findall(r"=(\d+)", row["workload"])
            way += f", {B} prompts of {T} tokens alone"
        elif not way.startswith(PEER):
            speed = median_of(rows, way, f"speed against {SERIAL}", row["workload"])
            times = "1.00" if way == SERIAL else cell(speed, "{:.2f}")
        figures = " | ".join(f"{row[name]:,.0f}" for name in ("median", "min", "max"))
        lines.append(f"{way} | {figures} | {times}")
    return "served | tokens/s | slowest round | fastest round | times serial", lines


PROFILED = {
    "kernels": "kernels a step",
    "copies to the device": "copies to the device a step",
    "waits": "waits a step",
    "allocations": "device allocations a step",
}


def profile(rows: list[dict]) -> Cells:
    """What a step of the whole engine does, counted under a profiler."""
    rows = [row for row in rows if row["workload"].startswith("profile ")]
    lines = []
    for way, workload in dict.fromkeys((row["contender"], row["workload"]) for row in rows):
        counts = cells((median_of(rows, way, name, workload) for name in PROFILED.values()), "{:g}")
        idle = cell(median_of(rows, way, "device idle", workload), "{:.0f}%")
        shape = shape_of(workload.removeprefix("profile "))
        lines.append(f"{in_words(shape)}, {way} | {counts} | {idle}")
    return f"a step | {' | '.join(PROFILED)} | device idle", lines


def transformers(rows: list[dict]) -> Cells:
    """The engine beside transformers' ways to decode and to serve, each pair of one run."""
    lines = []
    for row in rows:
        if not row["metric"].startswith(AGAINST):
            continue
        peer = PEER + row["metric"].removeprefix(AGAINST)
        shape = shape_of(row["workload"])
        metric, form = (TOKEN, "{:.3f} ms") if shape else ("output tokens", "{:,.0f} tokens/s")
        theirs = median_of(rows, peer, metric, row["workload"])
        if theirs is None:
            continue
        # Of the run in which both took turns: another one may have timed ours with more repeats.
        ours = theirs / row["median"] if shape else theirs * row["median"]
        work = in_words(shape) if shape else "256 requests"
        names = f"{peer.removeprefix(PEER)} | {row['contender']} | {work}"
        lines.append(f"{names} | {form.format(theirs)} | {form.format(ours)} | {row['median']:.1f}")
    return "transformers | PagedGPT | work | transformers' | PagedGPT's | times as fast", lines


# ---- kernels and ceilings ------------------------------------------------------------------------
def kernels(rows: list[dict]) -> Cells:
    """Decode attention of one layer: microseconds, and the share of a plain read's speed."""
    found = Steps(rows)
    names = dict.fromkeys(row["contender"] for row in rows if row["metric"] == "share of the read"
                          and shape_of(row["workload"]))  # fmt: skip
    lines = []
    for shape in found.shapes:
        times = []
        for name in names:
            ms = found.get(name, "time a call", shape)
            share = found.get(name, "share of the read", shape)
            is_whole = ms is not None and share is not None
            times.append(f"{ms * 1e3:.1f} us, {share:.0f}%" if is_whole else "-")
        lines.append(f"{in_words(shape)} | {' | '.join(times)}")
    return f"a call, share of a plain read | {' | '.join(names)}", lines


def fit(rows: list[dict]) -> Cells:
    """The decode kernel as a straight line through several sizes."""
    fits = [row for row in rows if row["workload"].startswith("t0 + bytes / bandwidth")]
    lines = []
    for name, workload in dict.fromkeys((row["contender"], row["workload"]) for row in fits):
        shapes = re.sub(r".* over | block_size.*", "", workload).replace(",", ", ")
        figures = [
            cell(median_of(fits, name, metric, workload), form)
            for metric, form in (("t0", "{:.1f} us"), ("bandwidth", "{:,.0f} GB/s"),
                                 ("share of the read", "{:.0f}%"))
        ]  # fmt: skip
        lines.append(f"{name}, {shapes} | {' | '.join(figures)}")
    return "time = t0 + bytes / bandwidth | t0 | bandwidth | share of a plain read", lines


def ceilings(rows: list[dict]) -> Cells:
    """What the device does at most, apart from products."""
    metrics = {"bandwidth": "{:,.0f} GB/s", "time a launch": "{:.2f} us"}
    lines = [
        f"{row['contender']} | {metrics[row['metric']].format(row['median'])}"
        for row in rows
        if row["metric"] in metrics
    ]
    return "at most | ", lines


def products(rows: list[dict]) -> Cells:
    """Linear layers and logits, by their number of rows."""
    of_products = [row for row in rows if row["workload"] == "products"]
    # A contender is "QKV, 8 rows".
    pairs = [tuple(row["contender"].rsplit(", ", 1)) for row in of_products]
    names, sizes = (list(dict.fromkeys(pair[i] for pair in pairs)) for i in (0, 1))
    lines = []
    for name in names:
        times = [median_of(of_products, f"{name}, {size}", "time a call") for size in sizes]
        most = median_of(of_products, f"{name}, {sizes[-1]}", "operations")
        us = cells((t if t is None else 1e3 * t for t in times), "{:.1f}")
        lines.append(f"{name} | {us} | {cell(most, '{:.0f}')}")
    last = sizes[-1] if sizes else ""
    head = " | ".join("1 row" if size == "1 rows" else size for size in sizes)
    return f"us a product | {head} | TFLOP/s, {last}", lines


# ---- sentences -----------------------------------------------------------------------------------
def runs() -> list[str]:
    """What ran, on what and when: a sentence for each file of rows."""
    lines = []
    for file in ("engine.csv", "kernels.csv", "ceilings.csv"):
        rows = rows_of(file)
        if rows:
            commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
            last = rows[-1]
            versions = f"PyTorch {last['torch']}, Triton {last['triton']}"
            date = last["date"][:10]
            lines.append(
                f"- [{file}](../results/{FOLDER.name}/{file}): one {last['device']}, {versions}, "
                f"{last['threads']} CPU cores; commit {commits}, {date}."
            )
    return lines


def listed(numbers: list[int]) -> str:
    """[1, 2, 4] -> "1, 2 and 4" """
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


Finding = tuple[bool, str]  # whether it speaks for the engine, and a sentence


def findings_of_steps(found: Steps) -> Iterator[Finding]:
    """The largest and the smallest step, paging, small linears, and who waits for whom."""
    for shape in dict.fromkeys([*found.shapes[-1:], *found.shapes[:1]]):
        share, time = found.share_of_floor(shape), found.fastest(shape, STEP, WAYS)
        if share is not None and time is not None:
            words = f"The fastest step of {in_words(shape)} takes {time[0]:.3f} ms on the device. "
            yield share >= 50, f"{words}To read its bytes alone takes {share:.0f}% of that."
    speeds = [found.get(RECORDED, f"speed against {SLABS}", shape) for shape in found.shapes]
    if known := [speed for speed in speeds if speed is not None]:
        words = f"The speed of a step over blocks is {min(known):.3f} to {max(known):.3f} times"
        yield min(known) > 0.98, f"{words} that over slabs."
    speed_of = {
        shape: fused / small
        for shape in found.shapes
        if (fused := found.get(FUSED, STEP, shape)) and (small := found.get(SMALL, STEP, shape))
    }
    batches = sorted({B for B, _ in speed_of})
    faster = [n for n in batches if all(x > 1 for (B, _), x in speed_of.items() if B == n)]
    slower = [n for n in batches if n not in faster]
    for is_faster, some in ((True, faster), (False, slower)):
        if some:
            than = "faster" if is_faster else "slower"
            yield is_faster, f"With small linears a step is {than} for a batch of {listed(some)}."
    shares = [(found.share_of_device(shape), shape) for shape in found.shapes]
    if waits := [(share, shape) for share, shape in shares if share is not None]:
        share, shape = min(waits)
        time_ms, name = found.fastest(shape, TOKEN, AHEAD.values())
        forward_ms = found.get(name.removesuffix(", ahead"), STEP, shape)
        words = f"At worst ({in_words(shape)}) the time from token to token is {time_ms:.3f} ms, of"
        yield share > 90, f"{words} which the device needs {forward_ms:.3f} for the forward."


def findings_of_requests(rows: list[dict]) -> Iterator[Finding]:
    """Whole requests, prompts, and transformers."""
    serial, best = rate_of(rows, SERIAL), rate_of(rows, BEST_WAY)
    if serial is not None and best is not None:
        words = f"One step ahead and fused, 256 requests get {best:,.0f} output tokens/s."
        yield best > serial, f"{words} Serially they get {serial:,.0f}."
    for row in rows:
        if row["metric"] == "prompt tokens":
            B, T = map(int, re.findall(r"=(\d+)", row["workload"]))
            rate = row["median"]
            tflops = 2 * LAYER_WEIGHTS * rate / 1e12
            words = f"{B} prompts of {T} tokens take {1e3 * B * T / rate:.1f} ms. The products of"
            words += f" the layers are {tflops:.0f} TFLOP/s; the datasheet has {DATASHEET_TFLOPS}."
            yield tflops > DATASHEET_TFLOPS / 2, words
        if row["metric"].startswith(AGAINST) and row["contender"] in (AHEAD[FUSED], BEST_WAY):
            shape, peer = shape_of(row["workload"]), row["metric"].removeprefix(AGAINST)
            work = in_words(shape) if shape else "256 requests"
            words = f"{work}: {row['median']:.1f} times as fast as transformers' {peer}."
            yield row["median"] > 1, words


def findings() -> list[str]:
    """What the engine's rows say, without the tables' detail: a list of two parts."""
    rows = rows_of("engine.csv")
    said = [*findings_of_requests(rows), *findings_of_steps(Steps(rows))]
    lines = []
    for title, is_ahead in (("Ahead:", True), ("Behind, or to be gained:", False)):
        words = [f"- {words}" for speaks_for, words in said if speaks_for is is_ahead]
        lines += [title, "", *words, ""] if words else []
    return lines[:-1]


# ---- all of them ---------------------------------------------------------------------------------
TABLES: dict[str, tuple[Callable[[list[dict]], Cells], str, str]] = {  # how, of which file, stage
    "gpu-steps": (steps, "engine.csv", "latency"),
    "gpu-tokens": (tokens, "engine.csv", "latency"),
    "gpu-requests": (requests, "engine.csv", "latency"),
    "gpu-profile": (profile, "engine.csv", "latency"),
    "gpu-transformers": (transformers, "engine.csv", "transformers"),
    "gpu-kernels": (kernels, "kernels.csv", "kernels"),
    "gpu-fit": (fit, "kernels.csv", "kernels"),
    "gpu-ceilings": (ceilings, "ceilings.csv", "ceilings"),
    "gpu-products": (products, "ceilings.csv", "ceilings"),
}
