"""Fewer threads for the next steps while other processes take this machine's cores.

A product on two threads ends when the slower one has done its half. If another process keeps one of
two cores busy, the operating system gives that core to the thread and to the process in turns of
some milliseconds, and the other thread waits. A decode step of GPT-2 has 49 products and 12
attentions, each far shorter than a turn:

    core 0   product ░░░░░░░░░░░░░ product  product ░░░░░░░░░░░ ..    ░ waits for the other half
    core 1   product  the neighbour product product  the neighbour

So a step on two threads takes about three times as long as on one thread, which stays on the free
core. How many cores the threads had follows from two clocks. A thread that waits for another one
does so in a loop that keeps its core, so on an idle machine N threads use N times as much CPU time
as passes; with a neighbour the process gets less.

Two steps in a row that miss a part of a core (MISSING) are followed by one with as many threads as
had a core. Unless that one is slower, the next steps go on so; then all threads are tried again. An
idle machine only reads the two clocks, and where a thread has merely slept one step is lost.

The draw of the tokens uses as many threads as the forward will. A second thread that helps it for
0.1 ms would keep waiting in a loop for its next task, on the core that the step has left.

It is for models whose products are Numba's: these have the same bits on any number of threads. A
library's product may add in another order, and a text must not depend on a neighbour. The number of
threads that the user has set is back after each step.

Checked by tests/speedups/test_adapt_threads.py; measured by `python benchmark.py neighbour`.
"""

import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor

from engine import Draw, Forward
from kv_cache import Batch
from model import GPT
from sampling import SampleRows

# Of GPT-2's decode steps on two cores, idle ones had 1.55 cores (int8, 4 sequences) to 2.2, and all
# but a few with a busy neighbour 1.05 to 1.57. Two in a row must have fewer than 1.55.
MISSING = 0.45  # cores
# On trial, fewer threads may take so much longer. With a neighbour one step in five on all threads
# takes twice to four times as long as the others, and the trial follows any of them.
TOLERANCE = 1.15
FIRST_PAUSE, LONGEST_PAUSE = 32, 128  # steps until all threads are tried again


class Step(NamedTuple):
    """What one step took."""

    num_tokens: int
    seconds: float
    cpu_seconds: float  # of all threads together


class ThreadChoice:
    """How many threads the next step should use, from the times of the steps before."""

    def __init__(self) -> None:
        self.fewer: int | None = None  # threads of the next steps; None: all
        self.full: Step | None = None  # the last step with all threads, while fewer are on trial
        self.is_suspect = False  # whether the last step on all threads has missed a core
        self.steps_left = 0  # until the choice may change
        self.pause = FIRST_PAUSE

    def choose(self, num_threads: int) -> int:
        """The number of threads for the next step, of `num_threads` that the user allows."""
        return num_threads if self.fewer is None else min(self.fewer, num_threads)

    def observe(self, num_threads: int, step: Step) -> None:
        """Take in the step that ran on `choose(num_threads)` threads."""
        self.steps_left -= 1
        if self.full is not None:
            self._judge_trial(self.full, step)
        elif self.steps_left > 0:
            return
        elif self.fewer is not None:
            self.fewer = None
        else:
            self._count_cores(num_threads, step)

    def _count_cores(self, num_threads: int, step: Step) -> None:
        """After a step with all threads: try fewer if a core was missing."""
        cores = step.cpu_seconds / step.seconds
        if cores >= num_threads - MISSING:
            self.pause = FIRST_PAUSE
            self.is_suspect = False
            return
        if not self.is_suspect:
            self.is_suspect = True  # a moment's work of another process: wait for a second step
            return
        # 2 threads that had 1.3 cores -> 1; 8 threads that had 7.5 -> 7
        self.fewer = max(1, int(cores + MISSING))
        self.full = step

    def _judge_trial(self, full: Step, step: Step) -> None:
        """After the first step with fewer threads: go on so if it was not slower."""
        self.full = None
        if step.num_tokens != full.num_tokens:  # they do not compare
            self.fewer = None
            return
        if step.seconds > TOLERANCE * full.seconds:
            self.fewer = None
        self.steps_left = self.pause
        self.pause = min(2 * self.pause, LONGEST_PAUSE)


def has_own_products(model: GPT) -> bool:
    """Whether a model's products are Numba's, with the same bits on any number of threads."""
    from kernels.int8_linear_cpu import Int8PanelLinear
    from kernels.linear_cpu import PanelLinear

    return isinstance(model.lm_head, PanelLinear | Int8PanelLinear)


def adapt_threads(forward: Forward, draw: Draw) -> tuple[Forward, Draw]:
    """The same two functions on the number of threads that a `ThreadChoice` finds, for a CPU.

    Returns them as they are on Windows, whose clock of CPU time advances in steps of 16 ms.
    """
    if sys.platform == "win32":
        return forward, draw
    choice = ThreadChoice()

    def adapted_forward(batch: Batch) -> Tensor:
        num_threads = torch.get_num_threads()
        if num_threads == 1:
            return forward(batch)
        begun, cpu_begun = time.perf_counter(), time.process_time()
        try:
            torch.set_num_threads(choice.choose(num_threads))  # the kernels follow this number
            logits = forward(batch)
        finally:
            torch.set_num_threads(num_threads)
        seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu_begun
        choice.observe(num_threads, Step(len(batch.input_ids), seconds, cpu_seconds))
        return logits

    def adapted_draw(logits: Tensor, rows: SampleRows) -> tuple[Tensor, Tensor]:
        num_threads = torch.get_num_threads()
        try:
            torch.set_num_threads(choice.choose(num_threads))
            return draw(logits, rows)
        finally:
            torch.set_num_threads(num_threads)

    return adapted_forward, adapted_draw
