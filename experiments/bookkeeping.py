"""How fast the books are kept: blocks allocated and freed a second, milliseconds to plan a step.

Neither touches a tensor, so both are pure Python, and both stand beside every step that the model
takes: with 256 running sequences a decode step allocates 16 blocks and plans 256 tokens. What must
hold is that the cost is small beside a forward and does not grow with the number of those who wait.

    allocator  500 cycles x 16 sequences x 8 blocks, a block counted once per allocate-and-free
    scheduler  schedule() and update() of one decode step, 256 running, 0 or 100,000 waiting

The allocator's own experiment, with a storm and a full pool, is allocator.py; here its speed stands
beside the scheduler's. Several repeats, as the machine may be busy with something else: the best of
them, which a goal is held against, is the row's max (blocks a second) or its min (milliseconds).
Run: python -m experiments.bookkeeping
"""

import argparse
import time
from collections.abc import Iterator

from block_allocator import BlockAllocator
from experiments.allocator import time_cycles
from experiments.results import Measurement, device_name, run_alone
from scheduler import Scheduler
from sequence import Continuation, Request, Sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement")
    parser.add_argument("--running", type=int, default=256, help="sequences in a step")
    parser.add_argument(
        "--waiting", type=int, nargs="+", default=[0, 100_000], help="sequences in the queue"
    )


def time_scheduler(running: int, waiting: int, repeats: int) -> list[float]:
    """Milliseconds of schedule() plus update() in a decode step, with a stub for the model.

    A value is the mean of 16 steps, in which each sequence takes one new block.
    """
    scheduler = Scheduler(
        BlockAllocator(num_blocks=running * 64, block_size=16),
        max_num_seqs=running,
        max_num_batched_tokens=8192,
        max_seq_len=1024,
    )
    for arrival in range(running + waiting):
        request = Request(str(arrival), [0] * 20, arrival)
        request.sequences = [Sequence(request, 0, [0] * 20, 20, max_tokens=900)]
        scheduler.add(request)
    times_ms = []
    for step in range(3 + 16 * repeats):  # 16 steps: each sequence takes one new block
        started = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        continuations = [Continuation(seq, [7]) for seq in plan.sampled]  # the sampler's work
        resumed = time.perf_counter()
        scheduler.update(plan, continuations)
        if step >= 3:  # all prompts are in
            assert len(plan.scheduled) == running
            times_ms.append((planned - started + time.perf_counter() - resumed) * 1e3)
    return [sum(times_ms[i : i + 16]) / 16 for i in range(0, len(times_ms), 16)]


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    common = {"experiment": "bookkeeping", "backend": "none", "dtype": "none", "threads": 1}
    common |= {"device": device_name()}
    rates = [time_cycles(BlockAllocator(1024, block_size=16)) for _ in range(args.repeats)]
    allocator = {"contender": "allocator", "workload": "500 cycles x 16 sequences x 8 blocks"}
    metric = {"metric": "allocated and freed", "unit": "blocks/s"}
    yield Measurement.of(rates, **allocator, **metric, **common)
    for waiting in args.waiting:
        times_ms = time_scheduler(args.running, waiting, args.repeats)
        scheduler = {"contender": "schedule() + update()", "metric": "time a step", "unit": "ms"}
        workload = f"running={args.running} waiting={waiting}"
        yield Measurement.of(times_ms, workload=workload, **scheduler, **common)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    run_alone(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    main()
