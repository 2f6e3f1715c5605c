"""What this machine can do at most: read, copy, multiply, launch. Kernels are judged against it.

A share of a datasheet's bandwidth says little: nobody reads that fast. So the ceilings are measured
in the same run: a loop that reads memory once and adds, a copy, GPT-2's four products of a layer
and its logits at several numbers of rows, and on a GPU an empty kernel in a recorded chain. Decode
attention is at its end where it is as fast as the read (a loop that fetches early can be a little
faster than this one); a decode step can't be faster than all its launches.

How a call is timed stands in roofline.py. On a GPU many calls over different memory are recorded,
so that no cache is flushed by hand, whose write-back would fall into the time.

Run: python -m experiments.ceilings
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.results import Measurement, device_name, run_alone
from kernels.device_memory import preallocate
from kernels.numba_tools import HAS_NUMBA
from watch.roofline import timer, warm_up

# name: (rows in, columns out) of a layer's products and of the logits, in GPT-2's 124M shape
PRODUCTS = {
    "QKV": (768, 2304),
    "attention projection": (768, 768),
    "MLP up": (768, 3072),
    "MLP down": (3072, 768),
    "logits": (768, 50257),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add = parser.add_argument
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    add("--read-mb", type=int, help="buffer to read, in MB; default 1024, on a GPU 8192")
    add("--rows", type=int, nargs="*", default=[1, 8, 64, 256], help="of the products; none: skip")
    add("--dtypes", nargs="+", help="of the products; default bfloat16, on a CPU float32 too")
    add("--layers", type=int, default=12, help="weights to take in turn")
    add("--threads", type=int, help="of the CPU; default: all")
    add("--repeats", type=int, default=7, help="of each, in turn")


def resolve(device: str) -> torch.device:
    """ "auto" is the GPU where there is one."""
    chosen = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(chosen if device == "auto" else device)


# ---- contenders in turn --------------------------------------------------------------------------
def in_turn(timers: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each contender in each round: A B A B, so that all share the machine's luck.

    One round before them warms up and is not counted.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in timers}
    for repeat in range(repeats + 1):
        for name, measure in timers.items():
            time_ms = measure()
            if repeat:
                times_ms[name].append(time_ms)
    return times_ms


# ---- what to time --------------------------------------------------------------------------------
def readers(device: torch.device, read_mb: int | None) -> tuple[dict[str, Callable], int]:
    """Ways to read one buffer once, name -> call(i), and its bytes: far beyond the caches."""
    num_bytes = (read_mb or (8192 if device.type == "cuda" else 1024)) << 20
    # Memory of the pool's kind, and written, or nothing is behind it.
    numbers = preallocate((num_bytes // 4,), torch.float32, device).fill_(1)
    found = {"read, torch": lambda i: numbers.sum()}
    if device.type == "cuda":
        from experiments.rungs_triton import sum_triton

        sums = torch.zeros(numbers.numel() // 8192, dtype=torch.int32, device=device)
        found["read, triton"] = lambda i: sum_triton(numbers.view(torch.int32), sums)
    elif HAS_NUMBA:
        from experiments.rungs_numba import sum_numba

        found["read, numba"] = lambda i: sum_numba(numbers.numpy())
    return found, num_bytes


def set_threads(threads: int) -> None:
    """How many threads PyTorch and Numba take.

    Numba first: its first call starts its threads, and with OpenMP that sets PyTorch's number too.
    """
    if HAS_NUMBA:
        import numba

        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(threads)


class Reader(NamedTuple):
    """The fastest way to read memory here: what a share of the bandwidth is a share of."""

    name: str  # "read, numba"
    measure: Callable[[], float]  # reads the buffer once, returns milliseconds
    num_bytes: int

    @property
    def backend(self) -> str:
        return self.name.split(", ")[1]


def best_reader(device: torch.device, read_mb: int | None) -> Reader:
    """Try all ways to read three times and keep the fastest."""
    found, num_bytes = readers(device, read_mb)
    timers = {name: timer(call, 1, device) for name, call in found.items()}
    times_ms = in_turn(timers, 3)
    name = min(timers, key=lambda name: min(times_ms[name]))
    return Reader(name, timers[name], num_bytes)


def time_memory(args: argparse.Namespace, device: torch.device, common: dict) -> Iterator:
    """Rows of the reads and of a copy: GB/s, where a copy moves each byte twice."""
    found, num_bytes = readers(device, args.read_mb)
    half = num_bytes // 2
    source, target = (torch.ones(half, dtype=torch.uint8, device=device) for _ in range(2))
    calls = {**found, "copy, torch": lambda i: target.copy_(source)}
    timers = {name: timer(call, 1, device) for name, call in calls.items()}
    # A copy moves each byte of one half twice: out of memory and into the other half.
    for name, times_ms in in_turn(timers, args.repeats).items():
        rates = [num_bytes / time_ms / 1e6 for time_ms in times_ms]
        what = {"workload": f"memory MB={num_bytes >> 20}", "dtype": "none"} | common
        what |= {"contender": name, "backend": name.split(", ")[1]}
        yield Measurement.of(rates, metric="bandwidth", unit="GB/s", **what)


def time_empty_kernel(args: argparse.Namespace, device: torch.device, common: dict) -> Iterator:
    """The row of a launch in a recorded chain of 1,000."""
    from experiments.rungs_triton import empty_kernel

    x = torch.zeros(1, device=device)
    measure = timer(lambda i: empty_kernel[(1,)](x), 1000, device)
    times_us = [measure() * 1e3 for _ in range(args.repeats)]
    what = {"workload": "calls=1000", "dtype": "none"} | common | {"backend": "triton"}
    yield Measurement.of(
        times_us, contender="empty kernel", metric="time a launch", unit="us", **what
    )


def product(weights: list[Tensor], x: Tensor, i: int) -> Tensor:
    """Call i of a chain of products: another layer's weights each time."""
    return x @ weights[i % len(weights)].T


def time_products(args: argparse.Namespace, device: torch.device, common: dict) -> Iterator:
    """Rows of a layer's four products and the logits: ms, operations, bytes of weights."""
    default = ["bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"]
    for dtype_name in args.dtypes or default:
        dtype = getattr(torch, dtype_name)
        for name, (rows_in, columns) in PRODUCTS.items():
            num_weights = 1 if name == "logits" else args.layers
            weights = [
                torch.full((columns, rows_in), 0.01, dtype=dtype, device=device).normal_()
                for _ in range(num_weights)
            ]
            num_calls = num_weights * (10 if device.type == "cuda" else 1)
            timers = {}
            for M in args.rows:
                x = torch.randn(M, rows_in, device=device).to(dtype)
                timers[M] = timer(partial(product, weights, x), num_calls, device)
            for M, times_ms in in_turn(timers, args.repeats).items():
                what = {"contender": f"{name}, {M} rows", "workload": "products"}
                what |= {"dtype": dtype_name} | common
                rates = [2 * M * rows_in * columns / t / 1e9 for t in times_ms]
                reads = [weights[0].nbytes / t / 1e6 for t in times_ms]
                yield Measurement.of(times_ms, metric="time a call", unit="ms", **what)
                yield Measurement.of(rates, metric="operations", unit="TFLOP/s", **what)
                yield Measurement.of(reads, metric="weight bandwidth", unit="GB/s", **what)


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    device = resolve(args.device)
    before = torch.get_num_threads()
    set_threads(args.threads or before)
    common = {"experiment": "ceilings", "backend": "torch", "device": device_name(device)}
    common |= {"threads": torch.get_num_threads()}
    try:
        warm_up(device)
        yield from time_memory(args, device, common)
        if device.type == "cuda":
            yield from time_empty_kernel(args, device, common)
        yield from time_products(args, device, common)
    finally:
        set_threads(before)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    run_alone(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    main()
