"""A decode step while another process keeps one core busy, and on the idle machine.

With N threads on N cores all parts of a product wait for the thread that shares its core. Three
ways to choose the threads run on the idle machine and beside a busy process, in turn:

    one thread fewer   leaves the neighbour a core: N - 1 threads
    all threads        N threads at every step
    adapted            N threads, or fewer while that is faster (speedups/adapt_threads.py)

A round's figure is the mean of its steps: the worst steps are those that wait for a turn of the
neighbour, and a median would leave them out. Each round begins with a new choice of threads, so
the steps that find the neighbour count. The neighbour starts before its round, on the last core.

    python benchmark.py neighbour
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch

from engine import Forward
from experiments.ceilings import in_turn
from experiments.results import Measurement, device_name
from experiments.speed import model_columns, threads_for
from kv_cache import Batch, Row, make_batch
from llm import LLM
from sampling import draw_tokens
from speedups.adapt_threads import adapt_threads

BLOCK_SIZE = 16
FEWER = "one thread fewer"
ALL = "all threads"
ADAPTED = "adapted"
IDLE = "idle"
BUSY = "neighbour"
BUSY_LOOP = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
while True:
    pass
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add = parser.add_argument
    add("--model", default="random:gpt2", help="as generate.py takes it")
    add("--dtype", default="float32", help="of the model")
    add("--batches", type=int, nargs="+", default=[1, 8, 32], help="sequences of a step")
    add("--context", type=int, default=256, help="tokens of each sequence")
    add("--steps", type=int, default=60, help="of a round")
    add("--rounds", type=int, default=5, help="rounds, each times every way")
    add("--threads", type=int, help="of the CPU, at least 2; default: all")


@contextmanager
def neighbour() -> Iterator[None]:
    """Another process that never waits, on the last core where a process can choose."""
    process = subprocess.Popen([sys.executable, "-c", BUSY_LOOP])
    try:
        time.sleep(0.5)  # until Python has started
        yield
    finally:
        process.kill()
        process.wait()


@torch.inference_mode()
def time_round(
    forward: Forward, batch: Batch, way: str, is_busy: bool, num_steps: int, threads: int
) -> float:
    """Milliseconds of a step, the mean of a round."""
    chosen = adapt_threads(forward, draw_tokens)[0] if way == ADAPTED else forward
    torch.set_num_threads(threads - 1 if way == FEWER else threads)
    with neighbour() if is_busy else nullcontext():
        begun = time.perf_counter()
        for _ in range(num_steps):
            chosen(batch)
        return (time.perf_counter() - begun) * 1e3 / num_steps


def rows_of_batch(
    llm: LLM, num_sequences: int, args: argparse.Namespace, threads: int
) -> Iterator[Measurement]:
    """The six times of a batch size, and two comparisons."""
    blocks_each = -(-args.context // BLOCK_SIZE)
    tables = torch.arange(num_sequences * blocks_each).view(num_sequences, -1).tolist()
    entries = [Row([1] * args.context, args.context - 1, 1, table, 1) for table in tables]
    batch = make_batch(entries, BLOCK_SIZE, llm.engine.cache.scratch_block)
    timers = {
        f"{way}, {state}": partial(
            time_round, llm.engine.forward, batch, way, state == BUSY, args.steps, threads
        )
        for state in (IDLE, BUSY)
        for way in (FEWER, ALL, ADAPTED)
    }
    times = in_turn(timers, args.rounds)
    columns = {
        "experiment": "neighbour",
        "workload": f"decode batch={num_sequences} context={args.context} steps={args.steps}",
        "backend": llm.backend,
        "dtype": str(llm.dtype)[6:],
        "threads": threads,
        "device": device_name("cpu"),
        **model_columns(args.model),
    }
    for name, ms in times.items():
        yield Measurement.of(ms, contender=name, metric="time a step", unit="ms", **columns)
    for name, base in (
        (f"{ALL}, {BUSY}", f"{FEWER}, {IDLE}"),
        (f"{ADAPTED}, {BUSY}", f"{FEWER}, {IDLE}"),
        (f"{ADAPTED}, {IDLE}", f"{ALL}, {IDLE}"),
    ):
        against = {"contender": name, "metric": f"speed against {base}", "unit": "x"}
        yield Measurement.ratio_of(times[base], times[name], **against, **columns)


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    threads = threads_for(args.model, args.threads)
    if threads < 2:
        raise ValueError(f"{threads} thread waits for no other one: give --threads 2 or more")
    if threads > (os.cpu_count() or 1):
        raise ValueError(f"{threads} threads, {os.cpu_count()} cores: they need no neighbour")
    num_blocks = max(args.batches) * -(-args.context // BLOCK_SIZE)
    llm = LLM(
        args.model,
        device="cpu",
        dtype=args.dtype,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        enable_prefix_caching=False,
        adapt_threads=False,
    )
    threads_before = torch.get_num_threads()
    try:
        for num_sequences in args.batches:
            yield from rows_of_batch(llm, num_sequences, args, threads)
    finally:
        torch.set_num_threads(threads_before)
