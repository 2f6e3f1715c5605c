"""Pictures of the engine and of what happens in a run: parts, blocks, block tables, batches.

The text of 116 steps in a pool of 60 blocks is 7,000 cells; as a picture it is seen at once. Most
pictures need two functions: one turns a recording into numbers, the other draws them. So the
tests can check the numbers without looking at a picture.

                     draw_architecture   the parts of the engine and what flows between them
    find_holdings ─> draw_pool           who holds which block in which step
                     draw_table          one step: a block table with arrows to its blocks
    find_rows     ─> draw_batching       who runs in which row of the batch: static and continuous

`draw_pool` and `draw_table` draw any recording of `watch/recorder.py`. For `draw_batching` the same
requests are run twice, here, by the real scheduler. The model is replaced by a function that always
answers with token 0, because only the number of tokens matters.

Yu et al. 2022, "Orca", OSDI, figure 3 (the rows of a static batch).
"""

import tempfile
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, FancyBboxPatch

from block_allocator import BlockAllocator
from engine import InferenceEngine
from kv_cache import Batch, KVCache
from plots.palette import (
    CARD,
    EMPTY,
    FAINT,
    INK,
    LIGHT,
    axes_on,
    card,
    colour_of,
    letter_of,
    text_on,
)
from sampling import SamplingParams
from scheduler import Scheduler
from watch.recorder import Recorder, holders, read_recording, strips

Recording = tuple[dict, list[dict]]  # header and steps, as `read_recording` returns them


# ---- the parts of the engine ---------------------------------------------------------------------
class Part(NamedTuple):
    """One half of a box: a name, its files, and what it does."""

    name: str
    files: str
    work: str


class Box(NamedTuple):
    """Two parts that work together, and what flows between them and the engine."""

    upper: Part
    lower: Part
    given: str  # by the engine
    returned: str  # to the engine
    inside: str  # what flows between the two parts
    is_upwards: bool  # from the lower part to the upper one


BOXES = (
    Box(
        Part("scheduler", "scheduler.py, policies.py", "who runs in this step,\nhow many tokens"),
        Part("block allocator", "block_allocator.py", "free list and\nreference counts"),
        given="requests,\ncontinuations",
        returned="plan",
        inside="block ids",
        is_upwards=True,
    ),
    Box(
        Part("batch", "kv_cache.py", "all tokens of the step,\nend to end"),
        Part("KV cache", "kv_cache.py", "one tensor of blocks\nof keys and values"),
        given="plan",
        returned="batch",
        inside="block tables, slots",
        is_upwards=False,
    ),
    Box(
        Part("model", "model.py", "GPT-2 with one socket:\nattend(layer, q, k, v)"),
        Part("attention", "paged_attention.py, kernels/", "reads K and V through\nblock tables"),
        given="batch",
        returned="logits",
        inside="q, k, v",
        is_upwards=False,
    ),
    Box(
        Part("sampling", "sampling.py", "one token from each\nrow of logits"),
        Part("outputs", "outputs.py", "token ids to text,\nstop strings"),
        given="logits",
        returned="continuations,\ntext",
        inside="token ids",
        is_upwards=False,
    ),
)
BOX_WIDTH = 1.76  # inches; four boxes and three gaps are 8.4 inches wide
BOX_HEIGHT = 2.2
GAP = 0.45


def draw_architecture() -> Figure:
    """The engine above the four boxes that it calls in each step, with arrows for what flows."""
    words = (
        "The engine calls the four boxes in turn. An arrow down is what it hands over, an arrow up "
        "is what it gets back.\nContinuations are the new tokens of each sequence: the scheduler "
        "gets them, and the next step begins. llm.py builds it all."
    )
    figure = card(5.05, "One step: schedule, build the batch, forward, sample, update", words)
    ax = axes_on(figure, 0.3, 0.25, 0.3, 3.75, xlim=(0, 8.4), ylim=(0, 3.75))
    ax.axis("off")  # one unit is one inch
    bottom = 3.2  # of the engine
    left = 0.6
    right = 7.8
    middle = bottom + 0.22
    draw_box(ax, left, bottom, right - left, 0.44, INK, "none")
    style = {"ha": "center", "va": "center", "color": CARD, "weight": "bold"}
    ax.text(4.2, middle, "engine.py: the loop that takes one step after another", **style)
    draw_arrow(ax, (0, middle), (left, middle))
    draw_arrow(ax, (right, middle), (8.4, middle))
    ax.text(left / 2, middle + 0.07, "prompt", ha="center", va="bottom")
    ax.text((right + 8.4) / 2, middle + 0.07, "text", ha="center", va="bottom")
    for number, box in enumerate(BOXES):
        x = number * (BOX_WIDTH + GAP)
        draw_parts(ax, x, box)
        # The engine ends inside the outer boxes, so their arrows stand further inside.
        given_x = x + (0.72 if number == 0 else 0.2)
        returned_x = x + (1.64, 0.95, 0.95, 0.88)[number]
        draw_arrow(ax, (given_x, bottom), (given_x, BOX_HEIGHT))
        draw_arrow(ax, (returned_x, BOX_HEIGHT), (returned_x, bottom))
        ax.text(given_x + 0.07, 2.7, box.given, va="center", size=8)
        ax.text(returned_x + 0.07, 2.7, box.returned, va="center", size=8)
    cache_right = 2 * BOX_WIDTH + GAP
    draw_arrow(ax, (cache_right, 0.56), (cache_right + GAP, 0.56))
    ax.text(cache_right + GAP / 2, 0.62, "K, V", ha="center", va="bottom", size=8)
    return figure


def draw_parts(ax: Axes, x: float, box: Box) -> None:
    """One box from the left edge `x` on: its two parts, and what flows between them."""
    draw_box(ax, x, 0, BOX_WIDTH, BOX_HEIGHT, "#ffffff", FAINT)
    middle = x + BOX_WIDTH / 2
    for part, top in ((box.upper, BOX_HEIGHT), (box.lower, BOX_HEIGHT / 2 - 0.12)):
        ax.text(middle, top - 0.18, part.name, ha="center", va="center", weight="bold")
        ax.text(middle, top - 0.38, part.files, ha="center", va="center", size=7, color=FAINT)
        ax.text(middle, top - 0.7, part.work, ha="center", va="center", size=8)
    ends = [(x + 0.3, 1.24), (x + 0.3, 0.98)]
    draw_arrow(ax, *(ends[::-1] if box.is_upwards else ends))
    ax.text(x + 0.4, 1.11, box.inside, va="center", size=8)


def draw_box(
    ax: Axes, x: float, y: float, width: float, height: float, colour: str, edge: str
) -> None:
    """A filled box with round corners."""
    corners = "round,pad=0,rounding_size=0.08"
    style = {"boxstyle": corners, "fc": colour, "ec": edge, "clip_on": False}
    ax.add_patch(FancyBboxPatch((x, y), width, height, **style))


def draw_arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow between two points."""
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "color": INK, "linewidth": 1.2}
    ax.add_artist(ConnectionPatch(start, end, "data", shrinkA=0, shrinkB=0, **style))


# ---- the pool over time --------------------------------------------------------------------------
class Holding(NamedTuple):
    """A block that the same requests hold in steps [first, end)."""

    block_id: int
    first: int
    end: int
    requests: tuple[str, ...]


def find_holdings(header: dict, steps: list[dict]) -> list[Holding]:
    """List the holders of each block; a holding ends in the step where the holders change."""
    # One column a block: the holders of this block in each step.
    columns = zip(*(holders(header, step) for step in steps), strict=True)
    found = []
    for block_id, column in enumerate(columns):
        for requests, group in groupby(enumerate(column, 1), key=lambda pair: tuple(pair[1])):
            numbers = [number for number, _ in group]
            if requests:
                found.append(Holding(block_id, numbers[0], numbers[-1] + 1, requests))
    return found


def draw_pool(header: dict, steps: list[dict]) -> Figure:
    """Steps to the right, blocks upwards, a colour a request; below, how many run and wait."""
    lives = strips(steps)
    holdings = find_holdings(header, steps)
    requests = list(dict.fromkeys(request for request, _ in lives))
    num_blocks = header["num_blocks"]
    end = len(steps) + 0.5
    words = (
        f"{num_blocks} blocks of {header['block_size']} tokens. A request takes block after block, "
        "any that is free, and returns all of them when it ends.\nWhen no block is free, the "
        "newest request is preempted: its blocks end with a cross, and it comes back later."
    )
    figure = card(6.6, f"{len(requests)} requests share one pool of {num_blocks} blocks", words)
    for i, request in enumerate(requests[:26]):
        chip = {"facecolor": colour_of(request), "edgecolor": "none", "boxstyle": "round,pad=0.25"}
        style = {"color": text_on(colour_of(request)), "bbox": chip, "weight": "bold"}
        figure.text((0.85 + 0.28 * i) / 9, 5.42 / 6.6, letter_of(request), ha="center", **style)
    ax = axes_on(figure, 0.75, 1.5, 0.3, 3.75, xlim=(0.5, end), ylim=(0, num_blocks), xticks=[])
    ax.set(ylabel="block", facecolor=EMPTY)
    ax.barh(
        [holding.block_id + 0.5 for holding in holdings],
        [holding.end - holding.first for holding in holdings],
        left=[holding.first - 0.5 for holding in holdings],  # step t is drawn in [t - 0.5, t + 0.5)
        height=1,
        color=[colour_of(holding.requests[0]) for holding in holdings],  # of the first holder
        hatch=["////" if len(holding.requests) > 1 else "" for holding in holdings],  # shared
        edgecolor=CARD,
        linewidth=0.4,
    )
    # A block that is lost to a preemption in step t was held until step t - 1: its end is t.
    lost = {(request, step["step"]) for step in steps for request, _ in step["preempted"]}
    cut = [each for each in holdings if any((name, each.end) in lost for name in each.requests)]
    ends = [each.end - 0.5 for each in cut]
    heights = [each.block_id + 0.5 for each in cut]
    ax.plot(ends, heights, "x", color=INK, markersize=3.5, markeredgewidth=0.9)

    below = axes_on(figure, 0.75, 0.5, 0.3, 0.85, xlim=(0.5, end), xlabel="step", ylabel="requests")
    edges = [number + 0.5 for number in range(len(steps) + 1)]
    running = [sum(life[i] in "Pd" for life in lives.values()) for i in range(len(steps))]
    total = [step["num_waiting"] + number for step, number in zip(steps, running, strict=True)]
    below.stairs(total, edges, fill=True, color=LIGHT, label="waiting")
    below.stairs(running, edges, fill=True, color=FAINT, label="running")
    below.legend(loc="upper right", ncols=2)
    return figure


# ---- a block table -------------------------------------------------------------------------------
def draw_table(header: dict, steps: list[dict]) -> Figure:
    """Two sequences' block tables in the middle of a run, with arrows to their blocks.

    Raises ValueError if no request holds a block after any step: then the run was too short.
    """
    busy = [step for step in steps if any(seq["block_table"] for seq in step["sequences"])]
    if not busy:
        raise ValueError("no request holds a block after a step of this recording: run for longer")
    step = busy[len(busy) // 2]
    block_size = header["block_size"]
    num_blocks = header["num_blocks"]
    chosen = two_to_draw(step)
    token = chosen[0]["num_computed_tokens"] - 1
    logical, offset = divmod(token, block_size)
    block_id = chosen[0]["block_table"][logical]
    slot = block_id * block_size + offset
    words = (
        f"Step {step['step']} of the run. Where is token {token} of "
        f"{letter_of(chosen[0]['request'])}? In its logical block {token} // {block_size} = "
        f"{logical}, which its table says is block {block_id}:\nin slot {block_id} x {block_size} "
        f"+ {token} % {block_size} = {slot}. Neighbours in the text need not be neighbours in "
        "memory."
    )
    figure = card(3.5, "A block table turns a position in the text into a slot in the pool", words)
    ax = axes_on(figure, 0.3, 0.3, 0.3, 2.2, xlim=(0, num_blocks), ylim=(0, 1))
    ax.axis("off")  # one unit to the right is one block of the pool; upwards, from 0 to 1
    for i, requests in enumerate(holders(header, step)):
        draw_cell(ax, i, 0.11, 1, requests[0] if requests else None, i, size=5)
    pool = f"the pool, {num_blocks} blocks of {block_size} tokens; grey is free"
    ax.text(0, 0.0, pool, color=FAINT)
    for left, seq in zip((0, num_blocks * 0.54), chosen, strict=False):
        draw_one_table(ax, left, seq, logical if seq is chosen[0] else None, num_blocks)
    return figure


def two_to_draw(step: dict) -> list[dict]:
    """Two sequences with short tables (few arrows), whose blocks are not in order if possible."""
    held = [seq for seq in step["sequences"] if seq["block_table"]]
    mixed = [seq for seq in held if seq["block_table"] != sorted(seq["block_table"])]
    return sorted(mixed or held, key=lambda seq: len(seq["block_table"]))[:2]


def draw_one_table(ax: Axes, left: float, seq: dict, bold: int | None, num_blocks: int) -> None:
    """One sequence's block table and its arrows; the arrow of logical block `bold` is thicker."""
    table = seq["block_table"]
    request = seq["request"]
    width = min(num_blocks / 26, num_blocks * 0.46 / len(table))
    label = f"{letter_of(request)}'s block_table: {seq['num_computed_tokens']} tokens"
    ax.text(left, 0.99, label, va="top", weight="bold")
    for i, block_id in enumerate(table):
        middle = left + (i + 0.5) * width
        ax.text(middle, 0.84, i, ha="center", size=6.5, color=FAINT)
        draw_cell(ax, left + i * width, 0.68, width, request, block_id, size=7.5)
        ends = (middle, 0.67), (block_id + 0.5, 0.265)
        arrow = {"arrowstyle": "-|>", "mutation_scale": 7, "color": colour_of(request)}
        arrow["linewidth"] = 2.2 if i == bold else 1.0
        ax.add_artist(ConnectionPatch(*ends, "data", shrinkA=0, shrinkB=0, **arrow))


def draw_cell(
    ax: Axes, x: float, y: float, width: float, request: str | None, number: int, size: float
) -> None:
    """A block as a box with a number in it, in its holder's colour; `request` None is free."""
    colour = EMPTY if request is None else colour_of(request)
    ax.bar(x, 0.14, width, y, align="edge", color=colour, edgecolor=CARD, linewidth=0.8)
    style = {"ha": "center", "va": "center", "color": text_on(colour)}
    ax.text(x + width / 2, y + 0.066, number, size=size, **style)


# ---- static and continuous batching --------------------------------------------------------------
class RowUse(NamedTuple):
    """A request's row of the batch: it runs in steps [first, end) and keeps the row to `released`.

    In continuous batching `released` is `end`. In a static batch it is the end of the whole batch.
    """

    row: int
    request: str
    first: int
    end: int
    released: int


def find_rows(steps: list[dict]) -> list[RowUse]:
    """Give each request the lowest row that is free when it starts, in a run without preemption.

    Requests start in the order of arrival, and rows are given in this order.
    """
    uses: list[RowUse] = []
    for (request, _), life in strips(steps).items():
        # The life "..Pddd  " runs in steps [3, 7): its first letter is step 1.
        first = len(life) - len(life.lstrip(" .")) + 1
        end = len(life.rstrip()) + 1
        taken = {use.row for use in uses if use.released > first}
        row = min(set(range(len(taken) + 1)) - taken)
        uses.append(RowUse(row, request, first, end, released=end))
    return uses


def two_batchings(
    lengths: list[tuple[int, int]], batch_size: int
) -> tuple[list[RowUse], list[RowUse]]:
    """Run the same requests in static batches and in continuous batching.

    `lengths` are (prompt tokens, new tokens) of each request.
    """

    def scheduler() -> Scheduler:
        # Blocks for all requests: here rows of the batch are scarce, not memory.
        return Scheduler(BlockAllocator(1024, 16), batch_size, 2048, max_seq_len=1024)

    batches = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    static = find_rows(record(scheduler(), batches)[1])
    # A static batch releases its rows when its longest request has ended.
    released = [
        max(use.end for use in static[i : i + batch_size])
        for i in range(0, len(lengths), batch_size)
    ]
    static = [use._replace(released=released[i // batch_size]) for i, use in enumerate(static)]
    return static, find_rows(record(scheduler(), [lengths])[1])


def record(scheduler: Scheduler, batches: list[list[tuple[int, int]]]) -> Recording:
    """Run requests of (prompt tokens, new tokens). A batch is sent when the last one has ended."""

    def forward(batch: Batch) -> torch.Tensor:
        return torch.zeros(len(batch.sample_rows), 2)  # always token 0: only lengths are drawn

    allocator = scheduler.allocator
    cache = KVCache(1, allocator.num_blocks, allocator.block_size, num_kv_heads=1, head_dim=1)
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(scheduler, Path(folder) / "recording.jsonl", model="a stand-in")
        engine = InferenceEngine(forward, cache, scheduler, vocab_size=2, watchers=[recorder])
        for batch in batches:
            for prompt, new in batch:
                engine.add_request([1] * prompt, SamplingParams(temperature=0, max_tokens=new))
            while engine.has_unfinished():
                engine.step()
        return read_recording(recorder.path)


def draw_batching(static: list[RowUse], continuous: list[RowUse]) -> Figure:
    """The rows of a batch over time, static and continuous; a hatched row is kept and idle."""
    ends = [max(use.released for use in uses) - 1 for uses in (static, continuous)]
    num_rows = max(use.row for use in static) + 1
    title = f"Continuous batching: {len(static)} requests in {ends[1]} steps instead of {ends[0]}"
    words = (
        f"The same requests, {num_rows} at once. A static batch ends with its longest request; the "
        "others keep their rows until then (hatched).\nContinuous batching gives a free row to the "
        "next request at once. The number after a letter: steps of the request."
    )
    figure = card(4.15, title, words)
    for bottom, name, uses in ((1.95, "static", static), (0.5, "continuous", continuous)):
        ax = axes_on(figure, 0.75, bottom, 0.3, 1.0, xlim=(0.5, max(ends) + 0.5), title=name)
        for use in uses:
            colour = colour_of(use.request)
            start = use.first - 0.5
            ax.barh(use.row, use.end - use.first, 0.9, start, color=colour)
            idle = {"color": "none", "edgecolor": FAINT, "hatch": "/////", "linewidth": 0}
            ax.barh(use.row, use.released - use.end, 0.9, use.end - 0.5, **idle)
            label = f"{letter_of(use.request)} {use.end - use.first}"
            style = {"color": text_on(colour), "weight": "bold", "size": 7}
            ax.text(start + 1, use.row, label, va="center", **style)
        ax.set(ylim=(num_rows - 0.4, -0.6), yticks=range(num_rows), ylabel="row")
        ax.set_xticks([] if name == "static" else range(50, max(ends) + 1, 50))
    ax.set_xlabel("step")
    return figure
