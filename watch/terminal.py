"""A run as text in a terminal: the owner of each block of the pool, and a line of figures.

A pool of 60 blocks fits into one line, one character a block, and a step changes two or three of
them. Drawn again after each step in the same place, the line shows which requests hold many blocks
and how blocks fill up and are freed. `generate.py` draws it:

    |AAAaBBbCCCCc··DDd·EEe···|     a letter is a request: a capital is a full block, a small letter
    step   12     96 tokens ..     is a block that is not full yet, a dot is a free block

A `Meter` and a `Screen` are watchers of an engine: the meter counts each step, the screen draws.
All figures come from what a step returns and from the scheduler's queues, so an engine does the
same with and without them. If the output is no terminal, or one that cannot move its cursor
(TERM=dumb), a plain line is printed once a second. NO_COLOR is respected (no-color.org).
The tests compare the strip with one drawn by hand.
"""

import os
import time
from typing import TextIO

from outputs import StepOutput
from scheduler import Scheduler

COLOURS = [31, 32, 33, 34, 35, 36, 91, 92, 93, 94, 95, 96]  # a terminal's codes, one a request
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SECONDS_BETWEEN_DRAWINGS = 0.05  # on a terminal
SECONDS_BETWEEN_LINES = 1.0  # in a file or a pipe
STRIP_WIDTH = 96  # blocks in a line; fewer on a narrow terminal


def letter_of(request_id: str) -> str:
    """The letter of a request in the strip and before its text; request 26 is A again."""
    return LETTERS[int(request_id) % len(LETTERS)]


class Meter:
    """A watcher that counts what the steps did: tokens, time, blocks, utilisation, preemptions.

    `about` stands in the summary: for example the weights, the backend and the dtype.
    """

    def __init__(self, scheduler: Scheduler, about: str):
        self.scheduler = scheduler
        self.about = about
        self.started = time.monotonic()
        self.num_steps = 0
        self.num_tokens = 0  # that were written
        self.peak_blocks = 0
        # Two sums over all steps; utilisation is the first divided by the second.
        self.sum_of_tokens_held = 0
        self.sum_of_slots_held = 0

    def __call__(self, output: StepOutput) -> None:
        """Count one step, right after it has run."""
        allocator = self.scheduler.allocator
        self.num_steps += 1
        self.num_tokens += len(output.plan.sampled)
        num_held = allocator.num_blocks - allocator.num_free
        # A sequence that ended in this step held its blocks until the end of the step.
        ended = [entry.seq for entry in output.plan.scheduled if not entry.seq.block_table]
        num_freed = sum(allocator.blocks_needed(seq.num_computed_tokens) for seq in ended)
        num_freed = min(num_freed, output.blocks.freed)  # a block that another shares is not free
        self.peak_blocks = max(self.peak_blocks, num_held + num_freed)
        self.sum_of_tokens_held += num_tokens_held(self.scheduler)
        self.sum_of_slots_held += num_held * allocator.block_size

    @property
    def utilisation(self) -> float:
        """The share of the slots in held blocks that hold a token, over all steps."""
        return self.sum_of_tokens_held / max(self.sum_of_slots_held, 1)

    @property
    def tokens_per_s(self) -> float:
        """Tokens that were written, for each second since the meter was made."""
        return self.num_tokens / max(time.monotonic() - self.started, 1e-9)

    def line(self) -> str:
        """The state after the last step in one line."""
        allocator = self.scheduler.allocator
        share_held = 1 - allocator.num_free / allocator.num_blocks
        speed = f"{self.num_tokens:6} tokens  {self.tokens_per_s:7.1f} tokens/s"
        queues = f"running {len(self.scheduler.running):3}  waiting {self.scheduler.num_waiting:3}"
        return f"step {self.num_steps:4}  {speed}  {queues}  pool {share_held:4.0%}"

    def summary(self) -> str:
        """The figures of the whole run, in two lines; in three if blocks were found again."""
        scheduler = self.scheduler
        seconds = time.monotonic() - self.started
        speed = f"{self.num_tokens} tokens in {seconds:.1f} s: {self.tokens_per_s:.1f} tokens/s"
        blocks = f"peak {self.peak_blocks} of {scheduler.allocator.num_blocks} blocks"
        again = f"{scheduler.num_recomputed_tokens} tokens computed again"
        num_hits, allocator = scheduler.num_blocks_hit, scheduler.allocator
        found = f"{num_hits * allocator.block_size} tokens in {num_hits} blocks were not computed"
        cache = f"\nprefix cache: {found}, {allocator.num_evicted} blocks evicted"
        return (
            f"{speed} ({self.about})\n{blocks}, utilisation {self.utilisation:.1%}, "
            f"{scheduler.num_preemptions} preemptions, {again}{cache if num_hits else ''}"
        )


def num_tokens_held(scheduler: Scheduler) -> int:
    """The tokens whose K and V are stored; those in a block that sequences share count once."""
    tables = [seq.block_table for seq in scheduler.running]
    block_size = scheduler.allocator.block_size
    if len(set().union(*tables)) == sum(map(len, tables)):  # nothing is shared
        return sum(seq.num_computed_tokens for seq in scheduler.running)
    filled: dict[int, int] = {}  # block id -> its tokens
    for seq in scheduler.running:
        for i, block_id in enumerate(seq.block_table):
            num_tokens = min(block_size, max(0, seq.num_computed_tokens - i * block_size))
            filled[block_id] = max(num_tokens, filled.get(block_id, 0))
    return sum(filled.values())


def pool_strip(scheduler: Scheduler, in_colour: bool, width: int = STRIP_WIDTH) -> list[str]:
    """The pool with one character a block, in lines of `width` blocks.

    Example: request 0 has a full block and one that is not full, request 1 has a full block:
    `["|AaB····|"]`.
    """
    allocator = scheduler.allocator
    cells = ["·"] * allocator.num_blocks
    for seq in scheduler.running:
        letter = letter_of(seq.request.request_id)
        code = COLOURS[LETTERS.index(letter) % len(COLOURS)]
        for i, block_id in enumerate(seq.block_table):
            # block 1 holds positions [16, 32) if block_size is 16: full from 32 tokens on
            is_full = (i + 1) * allocator.block_size <= seq.num_computed_tokens
            cell = letter if is_full else letter.lower()
            cells[block_id] = f"\033[{code}m{cell}\033[0m" if in_colour else cell
    return [f"|{''.join(cells[i : i + width])}|" for i in range(0, len(cells), width)]


def columns_of(stream: TextIO) -> int:
    """The columns of the terminal that a stream writes to; room for a whole strip if unknown."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # no terminal, or one that does not know its size
        columns = 0
    return columns or STRIP_WIDTH + 3


def can_hold(stream: TextIO, text: str) -> bool:
    """Whether a stream's encoding has all characters of a text: ASCII has no "·"."""
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


class Screen:
    """A watcher that draws: on a terminal always in the same place, elsewhere as plain lines.

    It draws what its meter has counted, so the meter comes before it in the engine's list.
    """

    def __init__(self, meter: Meter, has_strip: bool, stream: TextIO):
        self.meter = meter
        self.has_strip = has_strip
        self.stream = stream
        self.is_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self.in_colour = self.is_terminal and not os.environ.get("NO_COLOR")
        self.free_block = "·" if can_hold(stream, "·") else "."
        self.num_lines_drawn = 0
        self.last_drawn = float("-inf")  # on the clock of time.monotonic

    def __call__(self, output: StepOutput) -> None:
        """Draw the state after a step, unless requests are left and it was drawn a moment ago."""
        scheduler = self.meter.scheduler
        interval = SECONDS_BETWEEN_DRAWINGS if self.is_terminal else SECONDS_BETWEEN_LINES
        if time.monotonic() - self.last_drawn < interval and scheduler.has_unfinished():
            return
        self.last_drawn = time.monotonic()
        # A line that fills the last column makes some terminals begin a new line. The next drawing
        # would then begin one line too low.
        widest = columns_of(self.stream) - 1 if self.is_terminal else STRIP_WIDTH + 2
        strip_width = max(1, min(STRIP_WIDTH, widest - 2))  # without the two bars
        lines = pool_strip(scheduler, self.in_colour, strip_width) if self.has_strip else []
        lines = [line.replace("·", self.free_block) for line in lines]
        line = self.meter.line()
        lines.append(line[:widest] if self.is_terminal else line)
        text = "\n".join(lines)
        if self.is_terminal:
            # "\033[2A" moves the cursor two lines up, "\r\033[K" erases the line that it is in.
            up = f"\033[{self.num_lines_drawn}A" if self.num_lines_drawn else ""
            text = up + "\n".join(f"\r\033[K{line}" for line in lines)
        print(text, file=self.stream, flush=True)
        self.num_lines_drawn = len(lines)
