"""What a recorded run shows: who held which block when, and where the memory went.

The text of 116 steps in a pool of 60 blocks is 7,000 cells; as a picture it is one look. Each
picture here is two functions, one that turns a recording into numbers and one that draws them, so
that the numbers can be tested without looking:

    stretches  ─> draw_pool       a block's steps to the right, a colour a request
                  draw_table      one step: a block table, and arrows to where its blocks lie
    shares     ─> draw_memory     used, used later, never used, free: under four plans of memory
    places     ─> draw_batching   who sits in which place of the batch: static and continuous

The first two draw any recording. For the others the same requests must run under several plans, so
they are run here, by the real scheduler over the real allocators. Only the model is a stand-in,
since memory is a matter of lengths, and a step is a step. What a production engine does beyond
this: it charts such counts from its own metrics, live.

Kwon et al. 2023, "PagedAttention", SOSP, arXiv:2309.06180, figure 2 (where memory goes); Yu et al.
2022, "Orca", OSDI, figure 3 (the places of a static batch).
Run: python -m plots.pictures
Try: written = (16, 32) in `random_lengths` (short texts: which plan loses most?), or num_blocks=64.
"""

import random
import tempfile
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch

from block_allocator import BlockAllocator
from engine import InferenceEngine
from experiments.reservations import (
    BuddyAllocator,
    reserve_maximum,
    reserve_oracle,
    reserve_power_of_two,
)
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
from scheduler import Scheduler, reserve_now
from watch.recorder import Recorder, holders, read_recording, strips

Recording = tuple[dict, list[dict]]  # header and steps, as `read_recording` gives them


# ---- the pool over time --------------------------------------------------------------------------
class Stretch(NamedTuple):
    """A block held by the sequences of the same requests in steps [first, end)."""

    block_id: int
    first: int
    end: int
    requests: tuple[str, ...]


def stretches(header: dict, steps: list[dict]) -> list[Stretch]:
    """Who holds which block when: each block's steps, cut where its holders change."""
    columns = zip(*(holders(header, step) for step in steps), strict=True)
    found = []
    for block_id, column in enumerate(columns):
        for requests, group in groupby(enumerate(column, 1), key=lambda pair: tuple(pair[1])):
            numbers = [number for number, _ in group]
            if requests:
                found.append(Stretch(block_id, numbers[0], numbers[-1] + 1, requests))
    return found


def draw_pool(header: dict, steps: list[dict]) -> Figure:
    """Steps to the right, blocks upwards, a colour a request; below, how many run and wait."""
    lives, parts = strips(steps), stretches(header, steps)
    requests = list(dict.fromkeys(request for request, _ in lives))
    num_blocks, end = header["num_blocks"], len(steps) + 0.5
    words = (
        f"{num_blocks} blocks of {header['block_size']} tokens. A request grows block by block and "
        "gives all of them back when it ends. When the\npool is dry, the newest is preempted "
        "(its blocks end with a cross) and comes back later."
    )
    figure = card(6.6, f"{len(requests)} requests share one pool: any free block will do", words)
    for i, request in enumerate(requests[:26]):
        chip = {"facecolor": colour_of(request), "edgecolor": "none", "boxstyle": "round,pad=0.25"}
        style = {"color": text_on(colour_of(request)), "bbox": chip, "weight": "bold"}
        figure.text((0.85 + 0.28 * i) / 9, 5.42 / 6.6, letter_of(request), ha="center", **style)
    ax = axes_on(figure, 0.75, 1.5, 0.3, 3.75, xlim=(0.5, end), ylim=(0, num_blocks), xticks=[])
    ax.set(ylabel="block", facecolor=EMPTY)
    ax.barh(
        [part.block_id + 0.5 for part in parts],
        [part.end - part.first for part in parts],
        left=[part.first - 0.5 for part in parts],  # step t is drawn from t - 0.5 to t + 0.5
        height=1,
        color=[colour_of(part.requests[0]) for part in parts],  # shared: the first holder's
        hatch=["////" if len(part.requests) > 1 else "" for part in parts],
        edgecolor=CARD,
        linewidth=0.4,
    )
    # What a preemption in step t took was held up to t - 1, so its stretch ends at t.
    lost = {(request, step["step"]) for step in steps for request, _ in step["preempted"]}
    cut = [part for part in parts if any((name, part.end) in lost for name in part.requests)]
    crosses = [part.end - 0.5 for part in cut], [part.block_id + 0.5 for part in cut]
    ax.plot(*crosses, "x", color=INK, markersize=3.5, markeredgewidth=0.9)

    below = axes_on(figure, 0.75, 0.5, 0.3, 0.85, xlim=(0.5, end), xlabel="step", ylabel="requests")
    edges = [number + 0.5 for number in range(len(steps) + 1)]
    running = [sum(life[i] in "Pd" for life in lives.values()) for i in range(len(steps))]
    both = [step["num_waiting"] + number for step, number in zip(steps, running, strict=True)]
    below.stairs(both, edges, fill=True, color=LIGHT, label="waiting")
    below.stairs(running, edges, fill=True, color=FAINT, label="running")
    below.legend(loc="upper right", ncols=2)
    return figure


# ---- a block table -------------------------------------------------------------------------------
def draw_table(header: dict, steps: list[dict]) -> Figure:
    """Two sequences' block tables in the middle of a run, and arrows to where the blocks lie.

    Raises ValueError for a run so short that nobody holds a block behind any of its steps.
    """
    busy = [step for step in steps if any(seq["block_table"] for seq in step["sequences"])]
    if not busy:
        raise ValueError("nobody holds a block behind any step of this recording: run for longer")
    step, size, num_blocks = busy[len(busy) // 2], header["block_size"], header["num_blocks"]
    held = [sequence for sequence in step["sequences"] if sequence["block_table"]]
    # The shortest of those whose blocks are not in order: few enough arrows to follow.
    mixed = [seq for seq in held if seq["block_table"] != sorted(seq["block_table"])] or held
    shown = sorted(mixed, key=lambda seq: len(seq["block_table"]))[:2]
    token = shown[0]["num_computed_tokens"] - 1
    logical, offset = divmod(token, size)
    block_id, name = shown[0]["block_table"][logical], letter_of(shown[0]["request"])
    words = (
        f"Step {step['step']} of the run. Where is token {token} of {name}? In its logical block "
        f"{token} // {size} = {logical}, which its table says is block {block_id}:\nin slot "
        f"{block_id} x {size} + {token} % {size} = {block_id * size + offset}. Neighbours in the "
        "text need not be neighbours in memory."
    )
    figure = card(3.5, "A block table turns a position in the text into a place in the pool", words)
    ax = axes_on(figure, 0.3, 0.3, 0.3, 2.2, xlim=(0, num_blocks), ylim=(0, 1))
    ax.axis("off")  # one unit to the right is one block of the pool; upwards, from 0 to 1
    owner = [requests[0] if requests else None for requests in holders(header, step)]
    for i in range(num_blocks):
        _cell(ax, i, 0.11, 1, owner[i], i, size=5)
    ax.text(0, 0.0, f"the pool, {num_blocks} blocks of {size} tokens; grey is free", color=FAINT)
    for left, seq in zip((0, num_blocks * 0.54), shown, strict=False):
        table, request = seq["block_table"], seq["request"]
        width = min(num_blocks / 26, num_blocks * 0.46 / len(table))
        label = f"{letter_of(request)}'s block_table: {seq['num_computed_tokens']} tokens"
        ax.text(left, 0.99, label, va="top", weight="bold")
        for i, block_id in enumerate(table):
            middle = left + (i + 0.5) * width
            ax.text(middle, 0.84, i, ha="center", size=6.5, color=FAINT)
            _cell(ax, left + i * width, 0.68, width, request, block_id, size=7.5)
            ends = (middle, 0.67), (block_id + 0.5, 0.265)
            arrow = {"arrowstyle": "-|>", "mutation_scale": 7, "color": colour_of(request)}
            arrow["linewidth"] = 2.2 if seq is shown[0] and i == logical else 1.0
            ax.add_artist(ConnectionPatch(*ends, "data", shrinkA=0, shrinkB=0, **arrow))
    return figure


def _cell(ax: Axes, x: float, y: float, width: float, request, text, size: float) -> None:
    """A block as a box with a number in it."""
    colour = EMPTY if request is None else colour_of(request)
    ax.bar(x, 0.14, width, y, align="edge", color=colour, edgecolor=CARD, linewidth=0.8)
    style = {"ha": "center", "va": "center", "color": text_on(colour)}
    ax.text(x + width / 2, y + 0.066, text, size=size, **style)


# ---- runs with a stand-in for the model ----------------------------------------------------------
def record(scheduler: Scheduler, batches: list[list[tuple[int, int]]]) -> Recording:
    """Run requests of (prompt, written) tokens; a batch of them is sent when the last has ended."""

    def forward(batch: Batch) -> torch.Tensor:
        return torch.zeros(len(batch.sample_rows), 2)  # always token 0: only lengths are drawn

    allocator = scheduler.allocator
    cache = KVCache(1, allocator.num_blocks, allocator.block_size, num_kv_heads=1, head_dim=1)
    engine = InferenceEngine(forward, cache, scheduler, vocab_size=2)
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(engine, Path(folder) / "recording.jsonl", model="a stand-in")
        for batch in batches:
            for prompt, new in batch:
                recorder.add_request([1] * prompt, SamplingParams(temperature=0, max_tokens=new))
            while recorder.has_unfinished():
                recorder.step()
        return read_recording(recorder.path)


def random_lengths(number: int, seed: int = 0) -> list[tuple[int, int]]:
    """Tokens of prompt and answer as in a chat of short turns: 16 to 64, and 16 to 256."""
    prompt, written = (16, 64), (16, 256)
    draw = random.Random(seed).randint
    return [(draw(*prompt), draw(*written)) for _ in range(number)]


# ---- where memory goes ---------------------------------------------------------------------------
def four_plans(lengths: list[tuple[int, int]], num_blocks: int = 256) -> dict[str, Recording]:
    """The same requests and the same memory under the paper's three reservations, and paged."""
    max_seq_len, found = 512, {}
    plans = {"the maximum": reserve_maximum(max_seq_len)}
    plans["a power of two"] = reserve_power_of_two(max_seq_len)
    plans["the true length"] = reserve_oracle(max_seq_len)
    for name, reserve in (plans | {"paged": reserve_now}).items():
        # A slab is one piece of memory, so its plans need an allocator of adjacent blocks.
        kind = BlockAllocator if name == "paged" else BuddyAllocator
        scheduler = Scheduler(kind(num_blocks, 16), 256, 2048, max_seq_len, reserve)
        found[name] = record(scheduler, [lengths])
    return found


def shares(header: dict, steps: list[dict]) -> dict[str, float]:
    """Where a pool's memory is, in percent, averaged over the steps after which somebody waits.

    "used" holds a token; "later" will, before its sequence ends; "never" will not; "free" is in
    nobody's table, though somebody waits: too small a hole, or lost when a slab was rounded up to
    a power of two. "running" is how many sequences hold memory at once. Raises ValueError for a
    run in which nobody ever waits: then memory was not what it lacked.
    """
    # A plan sees no further than now; a recording knows how many tokens each one came to.
    final: dict[tuple[str, int], int] = {}
    for seq in (seq for step in steps for seq in step["sequences"]):
        key = seq["request"], seq["index"]
        final[key] = max(final.get(key, 0), seq["num_computed_tokens"])
    busy = [step for step in steps if step["num_waiting"]]
    if not busy:
        raise ValueError("nobody waits in this recording: send more requests or take less memory")
    size = header["block_size"]
    pool = header["num_blocks"] * size * len(busy)
    used = later = room = running = 0
    for seq in (seq for step in busy for seq in step["sequences"] if seq["block_table"]):
        held = len(seq["block_table"]) * size
        used += seq["num_computed_tokens"]
        later += min(final[seq["request"], seq["index"]], held) - seq["num_computed_tokens"]
        room += held
        running += 1
    # All four are places of tokens in all these steps together, and so is `pool`.
    parts = {"used": used, "later": later, "never": room - used - later, "free": pool - room}
    return {name: 100 * n / pool for name, n in parts.items()} | {"running": running / len(busy)}


def draw_memory(recordings: dict[str, Recording]) -> Figure:
    """A bar for each plan of memory: what of the pool was used, and what was not."""
    found = {name: shares(*recording) for name, recording in recordings.items()}
    first, last = list(found.values())[0], list(found.values())[-1]
    shares_used = f"{first['used']:.0f}% of the memory with tokens, paging {last['used']:.0f}%"
    title = f"Reserving {list(found)[0]} fills {shares_used}"
    words = (
        "The same requests (prompts of 16 to 64 tokens, answers of 16 to 256, no more than 512) in "
        "the same memory.\nOn the left: what each reserves when it starts. Averages over the steps "
        "in which somebody waits for memory."
    )
    figure = card(3.45, title, words)
    ax = axes_on(figure, 1.35, 0.85, 2.2, 1.5, xlim=(0, 100), xlabel="% of the pool")
    looks = {"used": "#0072b2", "later": "#56b4e9", "never": "#e69f00", "free": LIGHT}
    words = ("holds a token", "used later", "reserved, never used", "lost to rounding and holes")
    names, left = list(found)[::-1], [0.0] * len(found)
    for (part, colour), label in zip(looks.items(), words, strict=True):
        widths = [found[name][part] for name in names]
        ax.barh(names, widths, 0.72, left, color=colour, edgecolor=CARD, label=label)
        left = [x + width for x, width in zip(left, widths, strict=True)]
    for y, name in enumerate(names):
        ax.text(1, y, f"{found[name]['used']:.1f}%", color="#ffffff", weight="bold", va="center")
        end = len(recordings[name][1])
        ax.text(102, y, f"{found[name]['running']:.1f} run at once, {end:,} steps", va="center")
    ax.legend(loc="upper center", bbox_to_anchor=(0.55, -0.28), ncols=4, columnspacing=1.2)
    return figure


# ---- static and continuous batching --------------------------------------------------------------
class Stay(NamedTuple):
    """A request's place in the batch: it runs in steps [first, end) and keeps it up to `left`."""

    place: int
    request: str
    first: int
    end: int
    left: int


def places(steps: list[dict]) -> list[Stay]:
    """Give each request the lowest place that is free when it starts, in a run without preemption.

    In order of arrival, which is the order in which they start: first come, first served.
    """
    stays: list[Stay] = []
    for (request, _), life in strips(steps).items():
        # "..Pddd  ": it runs in steps [3, 7), for a strip's first letter is step 1.
        first, end = len(life) - len(life.lstrip(" .")) + 1, len(life.rstrip()) + 1
        taken = {stay.place for stay in stays if stay.left > first}
        place = min(set(range(len(taken) + 1)) - taken)
        stays.append(Stay(place, request, first, end, end))
    return stays


def two_batchings(lengths: list[tuple[int, int]], size: int) -> tuple[list[Stay], list[Stay]]:
    """The same requests in `size` places: one batch after the other, and whoever is next."""

    def scheduler() -> Scheduler:
        # Blocks for all: here places are scarce, not memory.
        return Scheduler(BlockAllocator(1024, 16), size, 2048, max_seq_len=1024)

    batches = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    static = places(record(scheduler(), batches)[1])
    ends = [max(stay.end for stay in static[i : i + size]) for i in range(0, len(lengths), size)]
    # A static batch gives no place away before all of it is done.
    static = [stay._replace(left=ends[i // size]) for i, stay in enumerate(static)]
    return static, places(record(scheduler(), [lengths])[1])


def draw_batching(static: list[Stay], continuous: list[Stay]) -> Figure:
    """The places of a batch over time, twice; a hatched place is kept and does nothing."""
    ends = [max(stay.left for stay in stays) - 1 for stays in (static, continuous)]
    number = max(stay.place for stay in static) + 1
    title = f"Continuous batching: {len(static)} requests in {ends[1]} steps instead of {ends[0]}"
    words = (
        f"The same requests, {number} at once. A static batch starts together and ends with its "
        "longest; who is done keeps its place (hatched).\nContinuous batching chooses in every "
        "step who runs. The number behind a letter: steps that the request takes."
    )
    figure = card(4.15, title, words)
    for bottom, name, stays in ((1.95, "static", static), (0.5, "continuous", continuous)):
        ax = axes_on(figure, 0.75, bottom, 0.3, 1.0, xlim=(0.5, max(ends) + 0.5), title=name)
        for stay in stays:
            colour, start = colour_of(stay.request), stay.first - 0.5
            ax.barh(stay.place, stay.end - stay.first, 0.9, start, color=colour)
            idle = {"color": "none", "edgecolor": FAINT, "hatch": "/////", "linewidth": 0}
            ax.barh(stay.place, stay.left - stay.end, 0.9, stay.end - 0.5, **idle)
            label = f"{letter_of(stay.request)} {stay.end - stay.first}"
            style = {"color": text_on(colour), "weight": "bold", "size": 7}
            ax.text(start + 1, stay.place, label, va="center", **style)
        ax.set(ylim=(number - 0.4, -0.6), yticks=range(number), ylabel="place")
        ax.set_xticks([] if name == "static" else range(50, max(ends) + 1, 50))
    ax.set_xlabel("step")
    return figure


# --------------------------------------------------------------------------------------------------
def demo():
    """The same requests in the same memory under four plans: who runs, where the memory goes."""
    recordings = four_plans(random_lengths(20), num_blocks=64)
    found = {name: shares(*recording) for name, recording in recordings.items()}
    print("20 requests, 64 blocks of 16 tokens, averages of the steps in which somebody waits\n")
    print("reserved           used   later   never    free  running   steps")
    for name, share in found.items():
        cells = "".join(f"{share[part]:7.1f}%" for part in ("used", "later", "never", "free"))
        print(f"{name:15}{cells} {share['running']:8.1f} {len(recordings[name][1]):7}")
    static, continuous = two_batchings(random_lengths(12), 4)
    steps = [max(stay.left for stay in stays) - 1 for stays in (static, continuous)]
    print(f"\n12 requests in 4 places: {steps[0]} steps in static batches, {steps[1]} otherwise")
    used = [share["used"] for share in found.values()]
    assert used == sorted(used) and steps[0] > steps[1]
    header, record_of_steps = recordings["paged"]
    held = sum(part.end - part.first for part in stretches(header, record_of_steps))
    assert held == sum(header["num_blocks"] - step["num_free"] for step in record_of_steps)
    print("ok: what is not reserved is used, and every held block of every step is in the picture")


if __name__ == "__main__":
    demo()
