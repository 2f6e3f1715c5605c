"""A run as a terminal shows it: whose each block of the pool is, and a line of figures.

A pool of 60 blocks fits into one line, a cell each, and a step changes two or three of them. Drawn
over and over in one place it shows what no figure does: who holds much, who waits, whose blocks
fill up and go back all at once.

    |AAAaBBbCCCCc··DDd·EEe···|     a letter a request: capital is a full block, small the one
    step   12     96 tokens ..     that is being filled, a dot is free

Everything is counted from outside, from what each step returns and from the scheduler's queues, so
an engine runs the same whether somebody watches or not. Where the output is no terminal there are
plain lines, one a second. What a production engine does beyond this: the same figures as a page of
metrics, read every few seconds by whoever draws the curves.

Run: python -m watch.terminal
Try: block_size=1 in the demo (longer strips, nearly no small letters), or num_blocks=6.
"""

import time
from typing import TextIO

from llm import LLM
from outputs import StepOutput
from sampling import SamplingParams
from scheduler import Scheduler

COLOURS = [31, 32, 33, 34, 35, 36, 91, 92, 93, 94, 95, 96]  # of a terminal, one a request
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letter_of(request_id: str) -> str:
    """The letter that stands for a request in the strip and before its text."""
    return LETTERS[int(request_id) % len(LETTERS)]


class Meter:
    """Counts what steps did, from outside: tokens, time, blocks, utilisation, preemptions."""

    def __init__(self, llm: LLM):
        self.llm, self.scheduler, self.started = llm, llm.engine.scheduler, time.monotonic()
        # The last two are sums over all steps.
        self.steps = self.generated = self.peak_blocks = self.tokens_held = self.places_held = 0

    def add(self, step: StepOutput) -> None:
        """Take one step into account."""
        allocator = self.scheduler.allocator
        self.steps += 1
        self.generated += len(step.plan.sampled)
        held = allocator.num_blocks - allocator.num_free
        # Those who ended in this step have given their blocks back, but held them until then.
        ended = [seq for seq, _, _ in step.plan.scheduled if not seq.block_table]
        given_back = sum(allocator.blocks_needed(seq.num_computed_tokens) for seq in ended)
        self.peak_blocks = max(self.peak_blocks, held + given_back)
        self.places_held += held * allocator.block_size
        self.tokens_held += sum(seq.num_computed_tokens for seq in self.scheduler.running)

    @property
    def tokens_per_s(self) -> float:
        return self.generated / max(time.monotonic() - self.started, 1e-9)

    def line(self) -> str:
        """One line for a terminal that waits."""
        used = 1 - self.scheduler.allocator.num_free / self.scheduler.allocator.num_blocks
        speed = f"{self.generated:6} tokens  {self.tokens_per_s:7.1f} tokens/s"
        queues = f"running {len(self.scheduler.running):3}  waiting {self.scheduler.num_waiting:3}"
        return f"step {self.steps:4}  {speed}  {queues}  pool {used:4.0%}"

    def summary(self) -> str:
        """What the run came to."""
        llm, scheduler, seconds = self.llm, self.scheduler, time.monotonic() - self.started
        return (
            f"{self.generated} tokens in {seconds:.1f} s: {self.tokens_per_s:.1f} tokens/s "
            f"({llm.weights}, {llm.backend}, {str(llm.model.wte.weight.dtype)[6:]})\n"
            f"peak {self.peak_blocks} of {scheduler.allocator.num_blocks} blocks, utilisation "
            f"{self.tokens_held / max(self.places_held, 1):.1%}, {scheduler.num_preemptions} "
            f"preemptions, {scheduler.num_recomputed_tokens} tokens computed again"
        )


def pool_strip(scheduler: Scheduler, colour: bool, width: int = 96) -> list[str]:
    """The pool, one cell a block: whose it is, capital when full; lines of `width` cells."""
    allocator, cells = scheduler.allocator, ["·"] * scheduler.allocator.num_blocks
    for seq in scheduler.running:
        letter = letter_of(seq.request.request_id)
        code = COLOURS[LETTERS.index(letter) % len(COLOURS)]
        for i, block_id in enumerate(seq.block_table):
            full = (i + 1) * allocator.block_size <= seq.num_computed_tokens
            cell = letter if full else letter.lower()
            cells[block_id] = f"\033[{code}m{cell}\033[0m" if colour else cell
    return [f"|{''.join(cells[i : i + width])}|" for i in range(0, len(cells), width)]


class Screen:
    """Shows the progress on a terminal in place, elsewhere as plain lines now and then."""

    def __init__(self, meter: Meter, strip: bool, stream: TextIO):
        self.meter, self.strip, self.stream = meter, strip, stream
        self.is_terminal, self.lines_up, self.shown_at = stream.isatty(), 0, float("-inf")

    def show(self, last: bool = False) -> None:
        """Draw the state after a step; a terminal is redrawn at most 20 times a second."""
        if time.monotonic() - self.shown_at < (0.05 if self.is_terminal else 1.0) and not last:
            return
        self.shown_at = time.monotonic()
        lines = pool_strip(self.meter.scheduler, self.is_terminal) if self.strip else []
        lines.append(self.meter.line())
        # On a terminal over the lines of the last time: up to the first of them, and erase each.
        up = f"\033[{self.lines_up}A" if self.is_terminal and self.lines_up else ""
        erase = "\r\033[K" if self.is_terminal else ""
        print(up + "\n".join(erase + line for line in lines), file=self.stream, flush=True)
        self.lines_up = len(lines)


# --------------------------------------------------------------------------------------------------
def demo():
    """Four tales of the shipped model in a pool that is too small for them, every fourth step."""
    llm = LLM(block_size=4, num_blocks=20, threads=1)
    meter, openings = Meter(llm), ["The wind", "Once upon a time", "A Fox once saw", "The princess"]
    for opening, num in zip(openings, (16, 30, 24, 40)):
        params = SamplingParams(temperature=0.7, seed=1, max_tokens=num, ignore_eos=True)
        llm.engine.add_request(opening, params)
    scheduler, seen = llm.engine.scheduler, set()
    while llm.engine.has_unfinished():
        meter.add(llm.engine.step())
        strip = pool_strip(scheduler, colour=False)
        seen |= set("".join(strip))
        if meter.steps % 4 == 1:
            held = sum(len(seq.block_table) for seq in scheduler.running)
            print(f"{strip[0]}  {meter.steps:3} steps, {meter.generated:3} tokens, {held:2} blocks")
    assert {"A", "a", "D", "·"} <= seen and strip == [f"|{'·' * 20}|"]
    assert meter.generated == 16 + 30 + 24 + 40 and scheduler.num_preemptions > 0
    print(f"at most {meter.peak_blocks} of 20 blocks; preemptions: {scheduler.num_preemptions}")
    print("ok: every request had its letter, and in the end no cell has one")


if __name__ == "__main__":
    demo()
