"""A run of experiments/gpu_check.py on one screen: under 60 lines from the rows of its CSV files.

A figure alone says little, so each stands beside what it is to be held against: kernels beside the
plain read and the contiguous library kernel, steps beside their byte floor and the peers.
"""

import re
from pathlib import Path

from experiments.results import read

MARKS = ("%", "x", "GB/s", "TFLOP/s")  # units that stand behind a figure; its title says others


def rows_since(path: Path, date: str) -> list[dict]:
    """The rows of this run, of a file that may hold those of earlier ones."""
    return [row for row in read(path) if row["date"] >= date] if path.exists() else []


def shape_of(row: dict) -> str:
    """The head of a row's column: "batch=64 context=512 block_size=16" -> "64x512"."""
    kinds = "decode |prefill |write prefill |profile "
    found = re.match(rf"(?:{kinds})?batch=(\d+) context=(\d+)", row["workload"])
    return f"{found[1]}x{found[2]}" if found else row["workload"]


def pivot(rows: list[dict], metrics: list[str]) -> list[str]:
    """A contender a line, a workload a column; a cell holds the medians of the metrics."""
    rows = [row for row in rows if row["metric"] in metrics]
    columns = list(dict.fromkeys(shape_of(row) for row in rows))
    width = max((len(name) for name in columns), default=0)
    cells: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        unit = row["unit"] if row["unit"] in MARKS else ""
        line = cells.setdefault(row["contender"], {})
        line.setdefault(shape_of(row), []).append(f"{row['median']:.4g}{unit}")
    texts = {name: {k: " ".join(v) for k, v in line.items()} for name, line in cells.items()}
    width = max([width, *(len(text) for line in texts.values() for text in line.values())])
    first = max((len(name) for name in texts), default=0) + 2
    lines = [" " * first + "  ".join(f"{name:>{width}}" for name in columns)]
    for name, line in texts.items():
        cells_of = "  ".join(f"{line.get(column, ''):>{width}}" for column in columns)
        lines.append(f"{name:{first}}{cells_of}")
    return [line.rstrip() for line in lines]


def section(title: str, rows: list[dict], *metrics: str) -> list[str]:
    """A title and a table of some metrics; nothing where no row has them."""
    found = [row for row in rows if row["metric"] in metrics]
    return [title, *pivot(found, list(metrics))] if found else []


# ---- kernels -------------------------------------------------------------------------------------
def ceilings_lines(rows: list[dict]) -> list[str]:
    """What the machine can do at most; of products a column for each number of rows."""
    alone = [row for row in rows if row["workload"] != "products"]
    lines = [f"{row['contender']:34}{row['median']:.4g} {row['unit']}" for row in alone]
    pairs = [(row, row["contender"].rsplit(", ", 1)) for row in rows if row not in alone]
    products = [row | {"contender": name, "workload": M} for row, (name, M) in pairs]
    return lines + section("products, ms a call", products, "time a call")


def kernels_lines(rows: list[dict]) -> list[str]:
    """The ladder, prompts, and the straight line through five sizes."""
    decode = [row for row in rows if row["workload"].startswith("batch=")]
    title = "decode attention, ms a call and share of the plain read"
    lines = section(title, decode, "time a call", "share of the read")
    title = "the same, speed against the contiguous library kernel"
    lines += section(title, decode, "speed against contiguous")
    rest = ("time a call", "operations", "scatter bandwidth", "speed against contiguous")
    prompts = [row for row in rows if "prefill" in row["workload"]]
    lines += section("prompts, ms a call", prompts, *rest)
    for row in rows:
        if row["workload"].startswith("t0"):
            lines.append(f"decode kernel, {row['metric']}: {row['median']:.4g} {row['unit']}")
    return lines


# ---- the engine ----------------------------------------------------------------------------------
def turned(rows: list[dict]) -> list[dict]:
    """The same figures with a shape a line and a contender a column, by its last words.

    "recorded, fused" is called "fused", "transformers DynamicCache" "DynamicCache".
    """
    last = [re.split(", |transformers ", row["contender"])[-1] for row in rows]
    pairs = zip(rows, last, strict=True)
    return [row | {"contender": shape_of(row), "workload": name} for row, name in pairs]


def steps_lines(rows: list[dict]) -> list[str]:
    """Decode steps beside their floor; launches of the first context, peers of the first shape."""
    if not rows:
        return []
    first = shape_of(rows[0])
    title = "a decode step: ms on the device, share of the byte floor, ms token to token"
    metrics = "time a step", "share of the byte floor", "token to token"
    lines = section(f"{title} (a peer: this alone)", turned(rows), *metrics)
    lines += section("paged against slabs", rows, "speed against recorded, contiguous")
    short = [row for row in rows if shape_of(row).split("x")[1] == first.split("x")[1]]
    lines += section("launches of its forward, copies included", short, "launches a step")
    words = "speed against transformers "
    against = [row for row in rows if shape_of(row) == first and row["metric"].startswith(words)]
    metrics = [row["metric"] for row in against]
    named = [row | {"workload": row["metric"].removeprefix(words)} for row in against]
    return lines + section(f"{first}, speed against transformers", named, *metrics)


def engine_lines(rows: list[dict]) -> list[str]:
    """Steps, what recording them takes, a step's profile, whole workloads."""
    lines = steps_lines([row for row in rows if row["workload"].startswith("decode ")])
    recorded = [row for row in rows if row["workload"].startswith("recording ")]
    lines += section("recording, s and MB", recorded, "recording", "memory taken")
    profiled = [row for row in rows if row["workload"].startswith("profile ")]
    title = "a step of the engine: kernels, copies to the device, waits, allocations, device idle"
    lines += section(title, profiled, *[row["metric"] for row in profiled])
    for row in rows:
        if row["unit"] == "tokens/s":
            words = f"{row['workload']}, {row['contender']}"
            lines.append(f"{words}: {row['median']:,.0f} {row['metric']} a second")
    return lines


def summarise(out: Path, date: str) -> list[str]:
    """The figures of this run from the files of rows in a folder."""
    parts = [
        of_rows(rows_since(out / f"{name}.csv", date))
        for name, of_rows in (
            ("ceilings", ceilings_lines),
            ("kernels", kernels_lines),
            ("engine", engine_lines),
        )
    ]
    return [line for part in parts if part for line in (*part, "")][:-1]
