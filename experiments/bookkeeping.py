"""The host's work in a step: scheduler and engine, with a model that costs nothing.

A GPU computes a decode step of the 124M GPT-2 in 0.5 to 2 ms. In that time Python must schedule,
allocate blocks, fill tables, read tokens and apply them, or the GPU waits. Here the forward and the
draw return the same tensors in every step, so only the host's work is left. The inputs that a GPU's
sampler would need are made too. Three things are timed:

    schedule() + update()   of one decode step, with 0 or 100,000 requests waiting: the time must
                            not grow with the number waiting
    a step of the engine    1, 64 and 256 sequences decode; the plain engine, and the one that plans
                            a step ahead (speedups/plan_ahead.py), in turn
    a whole run             256 requests, prompts and texts of 64 to 512 tokens: tokens a second

Each is repeated, because the machine may be busy. The best repeat is the max of a row of rates and
the min of a row of times. A goal is compared with the best repeat.
"""

import argparse
import random
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from block_allocator import BlockAllocator
from engine import InferenceEngine
from experiments.allocator import counted_columns
from experiments.results import Measurement
from kernels.triton_sampling import row_tensors
from kv_cache import Batch, KVCache
from sampling import SampleRows, SamplingParams
from scheduler import Scheduler
from sequence import Continuation, Request, Sequence
from speedups.plan_ahead import AheadEngine

ENGINES = {"the plain engine": InferenceEngine, "one step ahead": AheadEngine}
VOCAB_SIZE = 8
BLOCK_SIZE = 16
MAX_SEQ_LEN = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `bookkeeping`."""
    add = parser.add_argument
    add("--repeats", type=int, default=5, help="of each measurement")
    add("--steps", type=int, default=48, help="steps of the engine in a repeat")
    add("--running", type=int, nargs="+", default=[1, 64, 256], help="sequences in a step")
    add("--waiting", type=int, nargs="+", default=[0, 100_000], help="sequences in the queue")
    add("--requests", type=int, default=256, help="of the whole run")


# ---- schedule() and update() ---------------------------------------------------------------------
def time_scheduler(running: int, waiting: int, repeats: int) -> list[float]:
    """Milliseconds of schedule() plus update() in a decode step.

    Each value is the mean of 16 steps: in 16 steps each sequence takes one new block.
    """
    allocator = BlockAllocator(running * MAX_SEQ_LEN // BLOCK_SIZE, BLOCK_SIZE)
    scheduler = Scheduler(allocator, running, 8192, MAX_SEQ_LEN)
    for arrival in range(running + waiting):
        request = Request(str(arrival), [0] * 20, arrival)
        request.sequences = [Sequence(request, 0, [0] * 20, 20, max_tokens=900)]
        scheduler.add(request)
    times_ms = []
    for step in range(3 + BLOCK_SIZE * repeats):
        started = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        continuations = [Continuation(seq, [7]) for seq in plan.sampled]  # not timed
        resumed = time.perf_counter()
        scheduler.update(plan, continuations)
        if step >= 3:  # all prompts are computed
            assert len(plan.scheduled) == running
            times_ms.append((planned - started + time.perf_counter() - resumed) * 1e3)
    repeats_ms = [times_ms[i : i + BLOCK_SIZE] for i in range(0, len(times_ms), BLOCK_SIZE)]
    return [sum(times) / BLOCK_SIZE for times in repeats_ms]


# ---- the engine ----------------------------------------------------------------------------------
def build_engine(kind: type[InferenceEngine], max_num_seqs: int) -> InferenceEngine:
    """An engine over a pool for `max_num_seqs` whole sequences, without a model."""
    num_blocks = max_num_seqs * MAX_SEQ_LEN // BLOCK_SIZE
    cache = KVCache(1, num_blocks, BLOCK_SIZE, num_kv_heads=1, head_dim=1)
    allocator = BlockAllocator(num_blocks, BLOCK_SIZE)
    scheduler = Scheduler(allocator, max_num_seqs, 8192, MAX_SEQ_LEN)
    logits = torch.zeros(max_num_seqs, VOCAB_SIZE)
    token_ids = torch.full((max_num_seqs,), 3)
    peaks = torch.zeros(max_num_seqs)
    cpu = torch.device("cpu")

    def forward(batch: Batch) -> Tensor:
        return logits[: len(batch.sample_rows)]

    def draw(logits: Tensor, rows: SampleRows) -> tuple[Tensor, Tensor]:
        row_tensors(rows, VOCAB_SIZE, cpu)  # what the sampler of a GPU is given
        return token_ids[: len(rows)], peaks[: len(rows)]

    return kind(forward, cache, scheduler, VOCAB_SIZE, draw=draw)


def time_steps(engine: InferenceEngine, num_steps: int) -> float:
    """Milliseconds a decode step, mean of `num_steps`."""
    started = time.perf_counter()
    for _ in range(num_steps):
        engine.step()
    return (time.perf_counter() - started) * 1e3 / num_steps


def decoding_engine(kind: type[InferenceEngine], running: int) -> InferenceEngine:
    """An engine in which `running` sequences decode and never end by themselves."""
    engine = build_engine(kind, running)
    for _ in range(running):
        engine.add_request([1] * 20, SamplingParams(max_tokens=None))
    while len(engine.step().plan.sampled) < running:
        pass
    return engine


def time_run(kind: type[InferenceEngine], num_requests: int) -> float:
    """Generated tokens a second of a whole run, on the clock from the first request to the end."""
    engine = build_engine(kind, min(num_requests, 256))
    lengths = random.Random(0)
    num_tokens = 0
    started = time.perf_counter()
    for _ in range(num_requests):
        max_tokens = lengths.randint(64, 512)
        num_tokens += max_tokens
        engine.add_request([1] * lengths.randint(64, 512), SamplingParams(max_tokens=max_tokens))
    written = 0
    while engine.has_unfinished():
        written += sum(len(o.outputs[0].token_ids) for o in engine.step().finished)
    seconds = time.perf_counter() - started
    assert written == num_tokens, "a text was cut"
    return num_tokens / seconds


# ---- rows ----------------------------------------------------------------------------------------
def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of `bookkeeping`."""
    common = counted_columns("bookkeeping")
    # Longer contexts than the model's would end the sequences.
    if not 1 <= args.steps * args.repeats <= MAX_SEQ_LEN - 100:
        raise ValueError(f"{args.steps} steps x {args.repeats} repeats: 1 to 924 in all are needed")

    def row(contender: str, workload: str, metric: str, unit: str, values: list) -> Measurement:
        columns = {"contender": contender, "workload": workload, "metric": metric, "unit": unit}
        return Measurement.of(values, **(common | columns))

    for waiting in args.waiting:
        most = max(args.running)
        times_ms = time_scheduler(most, waiting, args.repeats)
        workload = f"running={most} waiting={waiting}"
        yield row("schedule() + update()", workload, "time a step", "ms", times_ms)
    for running in args.running:
        engines = {name: decoding_engine(kind, running) for name, kind in ENGINES.items()}
        step_ms: dict[str, list[float]] = {name: [] for name in ENGINES}
        for _ in range(args.repeats):
            for name, engine in engines.items():
                step_ms[name].append(time_steps(engine, args.steps))
        for name, times_ms in step_ms.items():
            yield row(name, f"running={running}", "time a step", "ms", times_ms)
    rates: dict[str, list[float]] = {name: [] for name in ENGINES}
    for _ in range(args.repeats):
        for name, kind in ENGINES.items():
            rates[name].append(time_run(kind, args.requests))
    for name, values in rates.items():
        workload = f"{args.requests} requests, 64 to 512 tokens in and out"
        yield row(name, workload, "tokens of all texts", "tokens/s", values)
