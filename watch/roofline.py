"""What a machine can do at most, and so how long work takes at least.

Is a decode step of 30 ms fast? The 124M GPT-2 in float32 reads 495 MB of weights a step. If the
memory delivers 20 GB/s, that alone takes 25 ms, in any program. So the work is counted first. Each
count, divided by the most that the machine can do, is a floor: a time that no program goes below.

    bytes of weights, of K and V  / a plain read of memory  ┐
    operations                    / a large product         ├─> the largest of them is
    launches                      x an empty kernel         │   what the step is bound by
    the host's own time             as it was measured      ┘

The rates are measured here, with the same threads and in the same minute as the step, because no
program reaches the rates of a datasheet. On a GPU the calls are recorded as a CUDA graph and timed
between two events. Python is then not part of the time, and the gaps between launches are, as in a
recorded step. The tests replace the clock and check each rate by hand.

Williams, Waterman and Patterson 2009, "Roofline: An Insightful Visual Performance Model for
Multicore Architectures", CACM 52(4).
Run: python -m watch.roofline
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

LEAST_READ_BYTES, MOST_READ_BYTES = 2**20, 2**28
SMALLEST_PRODUCT, LARGEST_PRODUCT = 256, 4096  # rows and columns
LONG_MS = 10.0  # a product that takes this long is large enough to reach the full rate


class Ceilings(NamedTuple):
    """The highest rates that were measured on a device."""

    bytes_per_ms: float  # a plain read: 10**6 bytes/ms are 1 GB/s
    operations_per_ms: float  # additions and multiplications of a product: 10**6 are 1 GFLOP/s
    launch_ms: float | None  # time of an empty kernel in a recorded chain; None on a CPU


class Work(NamedTuple):
    """The work of a step. The host's part is a measured time; everything else is a count."""

    weight_bytes: int  # bytes of weights that are read
    kv_bytes: int  # bytes of K and V that are read
    operations: int  # additions and multiplications
    launches: int | None = None  # kernels of the forward; None: not counted
    host_ms: float = 0.0


def floors_ms(work: Work, ceilings: Ceilings) -> dict[str, float]:
    """The shortest time of each kind of work, in milliseconds; no launches if they are unknown.

    "memory" is the sum of "weights" and "KV", because both come through the same memory. The other
    kinds can overlap, so a step takes at least as long as the largest floor.
    """
    weights_ms = work.weight_bytes / ceilings.bytes_per_ms
    kv_ms = work.kv_bytes / ceilings.bytes_per_ms
    floors = {"weights": weights_ms, "KV": kv_ms, "memory": weights_ms + kv_ms}
    floors["operations"] = work.operations / ceilings.operations_per_ms
    if work.launches is not None and ceilings.launch_ms is not None:
        floors["launches"] = work.launches * ceilings.launch_ms
    floors["host"] = work.host_ms
    return floors


def bound_by(floors: dict[str, float]) -> str:
    """The name of the largest floor; for "memory" the larger part of it, "weights" or "KV"."""
    largest = max(floors, key=lambda name: floors[name])
    if largest == "memory":
        return "weights" if floors["weights"] >= floors["KV"] else "KV"
    return largest


# ---- how to time ---------------------------------------------------------------------------------
def timer(
    call: Callable[[int], object], num_calls: int, device: torch.device
) -> Callable[[], float]:
    """A function that makes call(0) to call(num_calls - 1) and returns milliseconds a call.

    call(0) is made before that, so that no compilation is timed. On a GPU all calls are recorded
    as a CUDA graph here, and the function replays it. A graph holds addresses and no tensors, so
    the function keeps `call`, and with it the tensors that `call` holds.
    """
    return _gpu_timer(call, num_calls) if device.type == "cuda" else _cpu_timer(call, num_calls)


def _cpu_timer(call: Callable[[int], object], num_calls: int) -> Callable[[], float]:
    call(0)

    def measure() -> float:
        started = time.perf_counter()
        for i in range(num_calls):
            call(i)
        return (time.perf_counter() - started) * 1e3 / num_calls

    return measure


def _gpu_timer(call: Callable[[int], object], num_calls: int) -> Callable[[], float]:
    # Calls before a capture must run on another stream than the default one.
    warm_up_stream = torch.cuda.Stream()
    warm_up_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up_stream):
        for _ in range(2):
            call(0)
    torch.cuda.current_stream().wait_stream(warm_up_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_calls):
            call(i)
    graph.replay()  # the first replay also copies the graph to the GPU

    def replay(_kept: object = call) -> float:
        first = torch.cuda.Event(enable_timing=True)
        last = torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / num_calls

    return replay


def warm_up(device: torch.device, seconds: float = 1.0) -> None:
    """Keep a GPU busy until its clock is at full speed; an idle GPU runs at a fifth of it."""
    if device.type == "cuda":
        a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for _ in range(20):
                a @ a
            torch.cuda.synchronize()


# ---- the ceilings --------------------------------------------------------------------------------
def read_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes a millisecond of a plain read: one sum over a buffer, the fastest of seven.

    The buffer has `num_bytes`, the bytes that a step reads, but at least 1 MiB and at most 256 MiB.
    A small model's weights stay in the processor's cache from step to step and come faster than
    from memory. A buffer of the same size comes from the cache too.
    """
    num_floats = min(max(num_bytes, LEAST_READ_BYTES), MOST_READ_BYTES) // 4
    # Ones, because an empty tensor has no pages of memory until it is written.
    numbers = torch.ones(num_floats, device=device)
    measure = timer(lambda i: numbers.sum(), 1 if device.type == "cpu" else 20, device)
    return numbers.nbytes / min(measure() for _ in range(7))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a millisecond of a square product: the best of several sizes.

    The size doubles until a product takes LONG_MS. (On a CPU without vector instructions for this
    dtype the last product takes up to a second.)
    """
    best = 0.0
    size = SMALLEST_PRODUCT
    while size <= LARGEST_PRODUCT:
        # Random numbers: a GPU that multiplies zeros takes less power, and so runs faster.
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        measure = timer(lambda i: a @ b, 1, device)
        time_ms = min(measure() for _ in range(3))
        # size**2 results, each the sum of `size` products
        best = max(best, 2 * size**3 / time_ms)
        if time_ms > LONG_MS:
            break
        size *= 2
    return best


def launch_time_ms(device: torch.device) -> float | None:
    """Milliseconds of a kernel that does nothing, in a recorded chain of 1,000; None on a CPU."""
    if device.type == "cpu":
        return None
    # _sleep is a kernel that waits for a number of cycles; with 0 cycles only its launch is left.
    measure = timer(lambda i: torch.cuda._sleep(0), 1000, device)
    return min(measure() for _ in range(5))


def measure_ceilings(device: torch.device, dtype: torch.dtype, num_bytes: int) -> Ceilings:
    """All three rates for a step that reads `num_bytes` and computes in `dtype`.

    It takes about a second. Each is the fastest of several measurements.
    """
    warm_up(device, seconds=0.3)
    return Ceilings(
        bytes_per_ms=read_rate(device, num_bytes),
        operations_per_ms=product_rate(device, dtype),
        launch_ms=launch_time_ms(device),
    )


# --------------------------------------------------------------------------------------------------
# (what a step does, sequences, new tokens of each, tokens that each new token reads)
STEPS = (
    ("one sequence", 1, 1, 512),
    ("8 sequences", 8, 1, 512),
    ("64 sequences", 64, 1, 1000),
    ("a prompt of 512", 1, 512, 512),
)


def demo():
    """The floors of four steps of the 124M GPT-2 on this machine. No step is run."""
    every_token = 79_700_000  # weights that each token is multiplied with
    # The logits are computed for the last token of a sequence only. So only that token goes through
    # the rest of the last layer after its K and V, and through the head.
    last_token = 43_900_000
    width = 768
    num_layers = 12
    dtype = torch.float32
    weight_bytes = (every_token + last_token) * dtype.itemsize
    torch.set_num_threads(1)
    ceilings = measure_ceilings(torch.device("cpu"), dtype, weight_bytes)
    print(f"one thread reads {ceilings.bytes_per_ms / 1e6:.1f} GB/s", end=" and multiplies ")
    print(f"{ceilings.operations_per_ms / 1e6:.0f} GFLOP/s in {str(dtype)[6:]}\n")
    print("step                   rows   weights ms       KV ms  operations ms   bound by")
    found = []
    for title, B, T, context_len in STEPS:
        kv_bytes = B * context_len * 2 * num_layers * width * dtype.itemsize
        # Pairs of a query and a position that it reads: 1 + 2 + .. + T in a prompt. Each pair is
        # two multiply-adds a dimension, one with K and one with V.
        pairs = B * context_len if T == 1 else T * (T + 1) // 2
        products = every_token * B * T + last_token * B
        operations = 2 * products + 4 * num_layers * width * pairs
        floors = floors_ms(Work(weight_bytes, kv_bytes, operations), ceilings)
        found.append(bound_by(floors))
        cells = f"{floors['weights']:12.1f}{floors['KV']:12.1f}{floors['operations']:15.1f}"
        print(f"{title:20} {B * T:6} {cells}   {found[-1]}")
    # One row does 2 operations for 4 bytes of weights, a prompt of 512 tokens does 1,024.
    assert found[0] == "weights" and found[-1] == "operations"
    print("ok: a step of one sequence is bound by reading weights, a prompt by its operations")


if __name__ == "__main__":
    demo()
