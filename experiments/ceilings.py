"""What this machine can do at most: read, copy, multiply, launch. Kernels are compared with it.

A datasheet's bandwidth is never reached, so the ceilings are measured in the same run: a loop that
reads memory once and adds, a copy, GPT-2's four linear layers and its logits at several numbers of
rows, and on a GPU an empty kernel in a recorded chain. Decode attention reads every byte of K and V
once, so it cannot be much faster than the plain read. (A kernel that prefetches can be a little
faster than this loop.) A decode step takes at least as long as all its launches.

The products are called as the model calls them, the layers' with a bias. So the times at 1 row and
at 2 say whether one row loses the fused bias (FEWEST_ROWS in speedups/cuda_graphs.py). The logits
are computed for both vocabularies: 50,257 rows of weights, and padded to a multiple of 64.

How a call is timed: see watch/roofline.py. On a GPU many calls over different memory are recorded
as one graph. Flushing a cache between calls is then unnecessary, and so is timing its write-back.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.results import Measurement, device_name
from kernels.device_memory import preallocate
from kernels.numba_tools import HAS_NUMBA, compiled_parallel
from watch.roofline import timer, warm_up

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_NUMBA:
    import numba
    import numpy as np
if HAS_TRITON:
    import triton
    import triton.language as tl

LOGITS = "logits"  # the names of products without a bias begin with this
# name: (columns in, columns out) of a layer's products and of the logits, in GPT-2's 124M shape
PRODUCTS = {
    "QKV": (768, 2304),
    "attention projection": (768, 768),
    "MLP up": (768, 3072),
    "MLP down": (3072, 768),
    f"{LOGITS} of 50257": (768, 50257),
    f"{LOGITS} of 50304": (768, 50304),
}
ROWS = [1, 2, 8, 64, 256]  # of the products


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add = parser.add_argument
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    add("--read-mb", type=int, help="buffer to read, in MB; default 1024, on a GPU 8192")
    add("--rows", type=int, nargs="*", default=ROWS, help="of the products; none: skip")
    add("--dtypes", nargs="+", help="of the products; default bfloat16, on a CPU float32 too")
    add("--layers", type=int, default=12, help="weights to take in turn")
    add("--threads", type=int, help="of the CPU; default: all")
    add("--repeats", type=int, default=7, help="of each, in turn")


def resolve(device: str) -> torch.device:
    """The device that a flag names; "auto" is the GPU if there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def set_threads(threads: int) -> None:
    """Set the number of threads of PyTorch and of Numba.

    Numba comes first: its first call starts its threads, and with OpenMP that call also changes
    PyTorch's number.
    """
    if HAS_NUMBA:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(threads)


# ---- contenders in turn --------------------------------------------------------------------------
def in_turn(timers: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each contender in each round, in the order A B A B.

    A slow moment of the machine then hits all contenders. One round before them warms up and is
    not counted.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in timers}
    for repeat in range(repeats + 1):
        for name, measure in timers.items():
            time_ms = measure()
            if repeat > 0:
                times_ms[name].append(time_ms)
    return times_ms


# ---- plain reads and an empty kernel -------------------------------------------------------------
if HAS_NUMBA:

    @compiled_parallel
    def sum_numba(x):
        """The sum of a flat float32 array: one addition for every four bytes read."""
        part = 1 << 18  # numbers: 1 MB is long enough to stream, and gives every thread some parts
        sums = np.zeros(-(-x.size // part), np.float32)
        for i in numba.prange(sums.size):
            total = np.float32(0)
            for j in range(i * part, min((i + 1) * part, x.size)):
                total += x[j]
            sums[i] = total
        return sums.sum()


if HAS_TRITON:

    @triton.jit
    def read_kernel(x, sums, TILE: tl.constexpr):
        """Load one tile of a flat int32 tensor, and store the sum of its numbers."""
        i = tl.program_id(0)
        values = tl.load(x + i.to(tl.int64) * TILE + tl.arange(0, TILE))
        tl.store(sums + i, tl.sum(values, 0))

    @triton.jit
    def empty_kernel(x):
        """Do nothing: the time of a call is the time of a launch."""
        return

    def sum_triton(x: Tensor, sums: Tensor) -> None:
        """Read a flat int32 tensor once: each of its `sums.numel()` equal tiles gets its sum."""
        tile = x.numel() // sums.numel()
        assert tile * sums.numel() == x.numel()
        read_kernel[(sums.numel(),)](x, sums, TILE=tile, num_warps=8)


def readers(device: torch.device, read_mb: int | None) -> tuple[dict[str, Callable], int]:
    """All ways to read one buffer once, name -> call(i), and the buffer's bytes.

    The buffer is much larger than the caches.
    """
    num_bytes = (read_mb or (8192 if device.type == "cuda" else 1024)) << 20
    # The same kind of memory as the pool. Written once: the kernel maps a page at its first write.
    numbers = preallocate((num_bytes // 4,), torch.float32, device).fill_(1)
    ways: dict[str, Callable] = {"read, torch": lambda i: numbers.sum()}
    if device.type == "cuda":
        sums = torch.zeros(numbers.numel() // 8192, dtype=torch.int32, device=device)
        ways["read, triton"] = lambda i: sum_triton(numbers.view(torch.int32), sums)
    elif HAS_NUMBA:
        ways["read, numba"] = lambda i: sum_numba(numbers.numpy())
    return ways, num_bytes


class Reader(NamedTuple):
    """The fastest way to read memory here. Bandwidths are compared with this reader's."""

    name: str  # "read, numba"
    measure: Callable[[], float]  # reads the buffer once, returns milliseconds
    num_bytes: int

    @property
    def backend(self) -> str:
        """The library that reads: "read, numba" -> "numba"."""
        return self.name.split(", ")[1]


def best_reader(device: torch.device, read_mb: int | None) -> Reader:
    """Time each way to read three times and keep the fastest."""
    ways, num_bytes = readers(device, read_mb)
    timers = {name: timer(call, 1, device) for name, call in ways.items()}
    times_ms = in_turn(timers, 3)
    name = min(timers, key=lambda name: min(times_ms[name]))
    return Reader(name, timers[name], num_bytes)


# ---- rows ----------------------------------------------------------------------------------------
Columns = dict[str, Any]  # columns that several rows share: experiment, device, dtype, ...


def time_memory(
    args: argparse.Namespace, device: torch.device, common: Columns
) -> Iterator[Measurement]:
    """Rows of the reads and of a copy, in GB/s."""
    calls, num_bytes = readers(device, args.read_mb)
    half = num_bytes // 2
    source, target = (torch.ones(half, dtype=torch.uint8, device=device) for _ in range(2))
    calls["copy, torch"] = lambda i: target.copy_(source)
    timers = {name: timer(call, 1, device) for name, call in calls.items()}
    # A copy reads half of the bytes and writes half of them, so it moves as many as a read.
    for name, times_ms in in_turn(timers, args.repeats).items():
        rates = [num_bytes / time_ms / 1e6 for time_ms in times_ms]
        columns = common | {"workload": f"memory MB={num_bytes >> 20}", "dtype": "none"}
        columns |= {"contender": name, "backend": name.split(", ")[1]}
        yield Measurement.of(rates, metric="bandwidth", unit="GB/s", **columns)


def time_empty_kernel(
    args: argparse.Namespace, device: torch.device, common: Columns
) -> Iterator[Measurement]:
    """The row of one launch, from a recorded chain of 1,000."""
    x = torch.zeros(1, device=device)
    measure = timer(lambda i: empty_kernel[(1,)](x), 1000, device)
    times_us = [measure() * 1e3 for _ in range(args.repeats)]
    columns = common | {"workload": "calls=1000", "dtype": "none", "backend": "triton"}
    columns |= {"contender": "empty kernel", "metric": "time a launch", "unit": "us"}
    yield Measurement.of(times_us, **columns)


def product(weights: list[Tensor], bias: Tensor | None, x: Tensor, i: int) -> Tensor:
    """Product number i of a chain: x (rows, in), the weight (out, in) of the next layer."""
    return F.linear(x, weights[i % len(weights)], bias)


def time_products(
    args: argparse.Namespace, device: torch.device, common: Columns
) -> Iterator[Measurement]:
    """Rows of a layer's four products and of the logits: time, operations, bytes of weights."""
    default = ["bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"]
    for dtype_name in args.dtypes or default:
        for name, (num_in, num_out) in PRODUCTS.items():
            is_head = name.startswith(LOGITS)
            num_weights = 1 if is_head else args.layers
            weights = [
                torch.randn(num_out, num_in, dtype=getattr(torch, dtype_name), device=device)
                for _ in range(num_weights)
            ]
            bias = None if is_head else torch.randn_like(weights[0][:, 0])
            num_calls = num_weights * (10 if device.type == "cuda" else 1)
            timers = {}
            for M in args.rows:
                x = torch.randn(M, num_in, device=device).to(weights[0].dtype)
                timers[M] = timer(partial(product, weights, bias, x), num_calls, device)
            for M, times_ms in in_turn(timers, args.repeats).items():
                columns = {"contender": f"{name}, {M} rows", "workload": "products"}
                columns |= {"dtype": dtype_name} | common
                tflops = [2 * M * num_in * num_out / t / 1e9 for t in times_ms]
                gb_per_s = [weights[0].nbytes / t / 1e6 for t in times_ms]
                yield Measurement.of(times_ms, metric="time a call", unit="ms", **columns)
                yield Measurement.of(tflops, metric="operations", unit="TFLOP/s", **columns)
                yield Measurement.of(gb_per_s, metric="weight bandwidth", unit="GB/s", **columns)


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    device = resolve(args.device)
    threads_before = torch.get_num_threads()
    set_threads(args.threads or threads_before)
    common = {"experiment": "ceilings", "backend": "torch", "device": device_name(device)}
    common |= {"threads": torch.get_num_threads()}
    try:
        warm_up(device)
        yield from time_memory(args, device, common)
        if device.type == "cuda":
            yield from time_empty_kernel(args, device, common)
        yield from time_products(args, device, common)
    finally:
        set_threads(threads_before)
