"""The table at the end of `gpu_check`, and the defaults that its figures recommend.

The table has fewer than 60 lines, because the end of a run's output may be all that is kept of it.
It reads the files of rows that the stages wrote, so a run that was stopped has a table too.

A default is changed for a gain of more than 2%: two runs of the same code may differ by as much.

    fused           joined decode steps    on if no shape is slower and one is faster
    few_rows        small linears          the largest batch up to which all batches are faster
    plan_ahead      one step ahead         on if requests are served faster, and no token is later
    token budget    of a step              8,192 if it serves requests faster than 2,048
    FEWEST_ROWS     of a recorded step     2 unless a layer's products are as fast with 1 row

How it is checked: rows with known figures give known defaults (tests/experiments).
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.ceilings import LOGITS
from experiments.names import (
    AHEAD,
    AHEAD_FUSED,
    AHEAD_OF,
    CONTIGUOUS,
    FEW,
    FEW_STEP_TOKENS,
    FUSED,
    RECORDED,
    SERIAL,
    SMALL,
    STEP_TOKENS,
)
from experiments.results import read

MOST_LINES = 59
GAIN = 1.02  # how many times as fast a way must be to be recommended
# These units are written after a figure; the title of a table names all others.
MARKS = ("%", "x", "GB/s", "TFLOP/s")
STEP, TOKEN = "time a step", "token to token"


# ---- rows ----------------------------------------------------------------------------------------
def rows_since(path: Path, date: str) -> list[dict]:
    """The rows of this run, each figure once. A file may also hold those of earlier runs."""
    rows = [row for row in read(path) if row["date"] >= date] if path.exists() else []
    first: dict[tuple, dict] = {}
    for row in rows:  # a stage may measure anew what an earlier one has measured
        first.setdefault((row["contender"], row["workload"], row["metric"], row["dtype"]), row)
    return list(first.values())


def shape_of(row: dict) -> str:
    """A workload's short name: "decode batch=64 context=512 block_size=16" -> "64x512"."""
    found = re.match(r"(?:\w+ )*batch=(\d+) (?:context|prompt)=(\d+)", row["workload"])
    return f"{found[1]}x{found[2]}" if found else row["workload"]


def batch_of(row: dict) -> int:
    """The sequences of a row's shape."""
    return int(shape_of(row).split("x")[0])


def figure(row: dict) -> str:
    """A median as text: 4 digits, and the unit if it is a short one."""
    unit = row["unit"] if row["unit"] in MARKS else ""
    median = row["median"]
    return f"{median:,.0f}{unit}" if median >= 10_000 else f"{median:.4g}{unit}"


# ---- parts of the table --------------------------------------------------------------------------
def pivot(title: str, rows: list[dict], line: Callable, column: Callable) -> list[str]:
    """A title and a table: `line(row)` and `column(row)` name a row's place. [] without rows."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        texts = cells.setdefault(line(row), {})
        texts[column(row)] = f"{texts.get(column(row), '')} {figure(row)}".lstrip()
    width = {
        name: max(len(name), *(len(texts.get(name, "")) for texts in cells.values()))
        for name in dict.fromkeys(column(row) for row in rows)
    }
    first = max(map(len, cells), default=0)
    lines = ["  ".join([" " * first, *(f"{name:>{width[name]}}" for name in width)])]
    for name, texts in cells.items():
        found = [f"{texts.get(column, ''):>{width[column]}}" for column in width]
        lines.append("  ".join([f"{name:{first}}", *found]).rstrip())
    return [title, *lines] if rows else []


def in_a_line(title: str, rows: list[dict]) -> list[str]:
    """All figures of a few rows in one line. [] without rows."""
    texts = "; ".join(f"{short(row)} {figure(row)}" for row in rows)
    return [f"{title}: {texts}"] if rows else []


def short(row: dict) -> str:
    """A contender's name without what most of them begin with; small linears are fused, too."""
    name = row["contender"].replace(SMALL, f"{RECORDED}, small linears")
    return re.sub(r"^(recorded, |transformers )", "", name)


def of_metric(rows: list[dict], *metrics: str) -> list[dict]:
    """The rows of some metrics."""
    return [row for row in rows if row["metric"] in metrics]


# ---- the table -----------------------------------------------------------------------------------
def engine_lines(rows: list[dict]) -> list[str]:
    """Steps beside their floor, whole workloads, a step's profile, and transformers."""
    steps = [row for row in rows if row["workload"].startswith("decode ")]
    if not steps:
        return []
    # Batches between are measured for `few_rows` alone: its line shows them.
    ends = {min(map(batch_of, steps)), max(map(batch_of, steps))}
    shown = [row for row in steps if batch_of(row) in ends]
    lines = pivot("a decode step, ms on the device", of_metric(shown, STEP), shape_of, short)
    lines += pivot("token to token, ms by wall clock", of_metric(shown, TOKEN), shape_of, short)
    against = [row for row in shown if row["metric"] == f"speed against {CONTIGUOUS}"]
    lines += in_a_line(
        "blocks against slabs", [row | {"contender": shape_of(row)} for row in against]
    )
    first = [row for row in shown if shape_of(row) == shape_of(shown[0])]
    lines += in_a_line("launches of a forward", of_metric(first, "launches a step"))
    lines += in_a_line("recording, MB", of_metric(rows, "memory taken"))
    lines += in_a_line("recording, s", of_metric(rows, "recording"))
    for metric in dict.fromkeys(row["metric"] for row in rows if row["unit"] == "tokens/s"):
        lines += in_a_line(f"{metric} a second", of_metric(rows, metric))
    profiled = [row for row in rows if row["workload"].startswith("profile ")]
    title = "a step of the engine: kernels, copies to the device, waits, allocations, device idle"
    lines += pivot(title, profiled, short, shape_of)
    prefix = "speed against transformers "
    peers = [row for row in rows if row["metric"].startswith(prefix)]
    peer = "speed against transformers'"
    return lines + pivot(peer, peers, short, lambda row: row["metric"].removeprefix(prefix))


def ceilings_lines(rows: list[dict]) -> list[str]:
    """The ceilings. Products have a column for each number of rows."""
    lines = in_a_line("ceilings", [row for row in rows if row["workload"] != "products"])
    # A contender is "QKV, 8 rows".
    name, num_rows = (lambda row, i=i: row["contender"].rsplit(", ", 1)[i] for i in (0, 1))
    return lines + pivot("products, ms a call", products_of(rows), name, num_rows)


def products_of(rows: list[dict]) -> list[dict]:
    """The times of linear layers and logits among the ceilings."""
    return of_metric([row for row in rows if row["workload"] == "products"], "time a call")


def kernels_lines(rows: list[dict]) -> list[str]:
    """Ways to attend, and the straight line through five sizes."""
    decode = [row for row in rows if row["workload"].startswith("batch=")]
    found = of_metric(decode, "time a call", "share of the read")
    title = "decode attention, ms a call and share of the plain read"
    lines = pivot(title, found, lambda row: row["contender"], shape_of)
    fit = [row | {"contender": row["metric"]} for row in rows if row["workload"].startswith("t0")]
    return lines + in_a_line("decode kernel, us and GB/s", fit)


# ---- the defaults --------------------------------------------------------------------------------
class Figures:
    """The engine's rows, to be asked for single figures and for ratios of them."""

    def __init__(self, rows: list[dict]):
        decode = [row for row in rows if row["workload"].startswith("decode ")]
        self.shapes = list(dict.fromkeys(map(shape_of, decode)))
        self.times = {(r["contender"], r["metric"], shape_of(r)): r["median"] for r in decode}
        # The way to serve requests -> tokens a second.
        self.rates = {r["contender"]: r["median"] for r in of_metric(rows, "output tokens")}

    def speeds(self, name: str, other: str, metric: str) -> dict[str, float]:
        """How many times as fast as another contender one is, by shape; of those that have both."""
        found = {}
        for shape in self.shapes:
            slow, fast = (self.times.get((one, metric, shape)) for one in (other, name))
            if slow is not None and fast is not None:
                found[shape] = slow / fast
        return found

    def gain(self, name: str, other: str) -> dict[str, float]:
        """How many times as many tokens a second one way serves as another, named "requests"."""
        both = name in self.rates and other in self.rates
        return {"requests": self.rates[name] / self.rates[other]} if both else {}


class Advice(NamedTuple):
    """What a default should be; None if too little was measured."""

    value: bool | int | None
    speeds: dict[str, float]  # that say so, by what they were measured on

    def __str__(self) -> str:
        if self.value is None:
            return "not measured"
        value = ("off", "on")[self.value] if isinstance(self.value, bool) else f"{self.value:,}"
        return f"{value} ({', '.join(f'{x:.2f}x {name}' for name, x in self.speeds.items())})"


def is_worth_it(speeds: dict[str, float]) -> bool:
    """Faster somewhere and slower nowhere."""
    return max(speeds.values()) > GAIN and min(speeds.values()) > 1 / GAIN


def advise_fused(figures: Figures) -> Advice:
    """Whether decode steps should be joined."""
    speeds = figures.speeds(FUSED, RECORDED, STEP)
    return Advice(is_worth_it(speeds) if speeds else None, speeds)


def advise_few_rows(figures: Figures) -> Advice:
    """Up to how many rows small linears should multiply; 0 is never."""
    slowest: dict[int, float] = {}  # batch -> the lowest speed at any context
    for shape, speed in figures.speeds(SMALL, FUSED, STEP).items():
        batch = int(shape.split("x")[0])
        slowest[batch] = min(speed, slowest.get(batch, speed))
    few_rows = 0
    for batch in sorted(slowest):
        if slowest[batch] <= GAIN:
            break
        few_rows = batch
    named = {f"{batch} rows": slowest[batch] for batch in sorted(slowest)}
    return Advice(few_rows if slowest else None, named)


def advise_ahead(figures: Figures) -> Advice:
    """Whether steps should be planned ahead: requests faster, and no token later."""
    requests = figures.gain(AHEAD, SERIAL)
    tokens = {}
    for name, ahead in AHEAD_OF.items():
        for shape, speed in figures.speeds(ahead, name, TOKEN).items():
            tokens[shape] = min(speed, tokens.get(shape, speed))
    speeds = requests | tokens
    is_enough = requests and tokens
    return Advice(
        is_worth_it(speeds) and requests["requests"] > GAIN if is_enough else None, speeds
    )


def advise_budget(figures: Figures) -> Advice:
    """Tokens of a step: with few of them, running sequences wait less for a prompt."""
    way = AHEAD_FUSED if AHEAD_FUSED in figures.rates else AHEAD
    gain = figures.gain(way, way + FEW)
    if not gain:
        return Advice(None, gain)
    return Advice(STEP_TOKENS if gain["requests"] > GAIN else FEW_STEP_TOKENS, gain)


def advise_fewest_rows(products: list[dict]) -> Advice:
    """The fewest rows of a recorded step: 2 unless a layer's products of one row are as fast."""
    times = {
        num_rows: [row["median"] for row in products if row["contender"].endswith(f", {num_rows}")]
        for num_rows in ("1 rows", "2 rows")
    }
    one, two = (sum(found) for found in times.values())
    if not one or not two:
        return Advice(None, {})
    return Advice(2 if one > two else 1, {"2 rows": one / two})


def default_lines(engine: list[dict], ceilings: list[dict]) -> list[str]:
    """A line for each default, with the speeds that speak for it or against it."""
    figures = Figures(engine)
    products = [row for row in products_of(ceilings) if not row["contender"].startswith(LOGITS)]
    advice = {
        "plan_ahead": advise_ahead(figures),
        "fused": advise_fused(figures),
        "few_rows": advise_few_rows(figures),
        "max_num_batched_tokens": advise_budget(figures),
        "FEWEST_ROWS": advise_fewest_rows(products),
    }
    return ["defaults:", *(f"    {name}: {one}" for name, one in advice.items())]


# ---- all of it -----------------------------------------------------------------------------------
def table(
    out: Path, date: str, head: list[str], test_lines: list[str], wrong: list[str]
) -> list[str]:
    """The table of a run that began at `date`, from the files of rows in a folder."""
    engine = rows_since(out / "engine.csv", date)
    figures = engine_lines(engine)
    ceilings = rows_since(out / "ceilings.csv", date)
    figures += ceilings_lines(ceilings)
    figures += kernels_lines(rows_since(out / "kernels.csv", date))
    last = [*test_lines, *([f"WRONG: {reason}" for reason in wrong] or ["all is well"])]
    last += default_lines(engine, ceilings)
    room = MOST_LINES - len(head) - len(last) - 1
    left_out = [f"({len(figures) - room} lines more: see the files of rows)"]
    return [*head, *figures[:room], *(left_out if len(figures) > room else []), *last]
