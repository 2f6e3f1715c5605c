"""What a machine can do at most, read, multiply and launch, and so how long work takes at least.

A decode step of 30 ms: is that fast? The 124M GPT-2 reads 495 MB of weights in 32 bits a step, and
where memory delivers 20 GB/s that takes 25 ms, whatever the code. So before timing, count. What has
to be done, divided by the most that the machine was seen to do, is a floor:

    bytes of weights, of K and V  / a plain read of memory  ┐
    operations                    / a large product         ├─> the largest of them is
    launches                      x an empty kernel         │   what the step is bound by
    the host's own time             as it was measured      ┘

A share of a datasheet's figure says little: nobody reads that fast. So the ceilings are measured,
with the same threads and in the same minute. Times on a GPU come from a recorded graph of many
calls between two events: no call waits for Python, and the gap between two launches counts, as it
does in a recorded step. What a production engine does beyond this: asks the hardware's counters
which of its units each kernel kept busy.

Williams, Waterman and Patterson 2009, "Roofline: An Insightful Visual Performance Model for
Multicore Architectures", CACM 52(4).
Run: python -m watch.roofline
Try: torch.bfloat16 in the demo (half of the bytes; has this processor products for it?), or 2
threads (do both ceilings rise?).
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

LEAST_READ_BYTES, MOST_READ_BYTES = 2**20, 2**28
SMALLEST_PRODUCT, LARGEST_PRODUCT = 256, 4096  # rows and columns
LONG_MS = 10.0  # a product that takes so long is large enough to show its rate


class Ceilings(NamedTuple):
    """The most that was seen of a device."""

    bytes_per_ms: float  # a plain read: 10**6 are 1 GB/s
    operations_per_ms: float  # additions and multiplications of a product: 10**6 are 1 GFLOP/s
    launch_ms: float | None  # of an empty kernel in a recorded chain; a CPU launches nothing


class Work(NamedTuple):
    """What a step has to do at least: counted, but for the host's part, which is timed."""

    weight_bytes: int
    kv_bytes: int
    operations: int
    launches: int | None = None  # None: nobody counted them
    host_ms: float = 0.0


def floors_ms(work: Work, ceilings: Ceilings) -> dict[str, float]:
    """How long each kind of work takes at least, in milliseconds; without launches if unknown.

    Weights, K and V come through one memory, so "memory" is the sum of the two before it. All
    others may go on side by side: the step takes at least as long as the largest.
    """
    weights, kv = (n / ceilings.bytes_per_ms for n in (work.weight_bytes, work.kv_bytes))
    floors = {"weights": weights, "KV": kv, "memory": weights + kv}
    floors["operations"] = work.operations / ceilings.operations_per_ms
    if work.launches is not None and ceilings.launch_ms is not None:
        floors["launches"] = work.launches * ceilings.launch_ms
    return floors | {"host": work.host_ms}


def bound_by(floors: dict[str, float]) -> str:
    """The largest of the floors; of memory the larger part, "weights" or "KV"."""
    largest = max(floors, key=floors.get)
    return max("weights", "KV", key=floors.get) if largest == "memory" else largest


# ---- how to time ---------------------------------------------------------------------------------
def timer(
    call: Callable[[int], object], num_calls: int, device: torch.device
) -> Callable[[], float]:
    """A function that makes call(0) to call(num_calls - 1) and returns milliseconds a call.

    The first of them is made once beforehand: whatever compiles, compiles now. On a GPU all are
    recorded, and the function replays them.
    """
    if device.type == "cpu":
        call(0)

        def measure() -> float:
            started = time.perf_counter()
            for i in range(num_calls):
                call(i)
            return (time.perf_counter() - started) * 1e3 / num_calls

        return measure

    aside = torch.cuda.Stream()  # what runs before a capture must run on another stream
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            call(0)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_calls):
            call(i)
    graph.replay()  # the first replay uploads the graph

    def replay() -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / num_calls

    return replay


def warm_up(device: torch.device, seconds: float = 1.0) -> None:
    """Keep a GPU busy until its clock is up; an idle one runs at a fifth of it."""
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

    The buffer is as large as what the step reads, within bounds. A small model's weights stay in a
    cache from one step to the next and come faster than memory delivers, and so does the buffer.
    """
    size = min(max(num_bytes, LEAST_READ_BYTES), MOST_READ_BYTES) // 4
    numbers = torch.ones(size, device=device)  # written, or no memory is behind it
    measure = timer(lambda i: numbers.sum(), 1 if device.type == "cpu" else 20, device)
    return numbers.nbytes / min(measure() for _ in range(7))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a millisecond of a square product, the best of ever larger ones.

    They grow until one takes LONG_MS: a second at most where no vector unit knows the type.
    """
    best, size = 0.0, SMALLEST_PRODUCT
    while size <= LARGEST_PRODUCT:
        # Random numbers: a GPU that multiplies zeros takes less power, and so runs faster.
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        measure = timer(lambda i: a @ b, 1, device)
        time_ms = min(measure() for _ in range(3))
        best = max(best, 2 * size**3 / time_ms)  # a multiplication and an addition each
        if time_ms > LONG_MS:
            break
        size *= 2
    return best


def launch_time_ms(device: torch.device) -> float | None:
    """Milliseconds of a kernel that does nothing, in a recorded chain of 1,000; None on a CPU."""
    if device.type == "cpu":
        return None
    # PyTorch's kernel that waits so many cycles: with 0 of them what is left is the launch.
    measure = timer(lambda i: torch.cuda._sleep(0), 1000, device)
    return min(measure() for _ in range(5))


def measure_ceilings(device: torch.device, dtype: torch.dtype, num_bytes: int) -> Ceilings:
    """All three, in about a second, for a step that reads `num_bytes` and multiplies in `dtype`.

    The fastest of several tries each: a floor is what no try goes below.
    """
    warm_up(device, seconds=0.3)
    rates = read_rate(device, num_bytes), product_rate(device, dtype)
    return Ceilings(*rates, launch_time_ms(device))


# --------------------------------------------------------------------------------------------------
def demo():
    """Steps of a 124M GPT-2 on this machine, none of them run: how long each must take at least."""
    # Weights that each token meets, and those for the last token of each sequence: the head, and
    # the last layer behind its attention. The other tokens predict nothing new.
    every, last, width, num_layers = 79_700_000, 43_900_000, 768, 12
    dtype = torch.float32
    weight_bytes = (every + last) * dtype.itemsize
    torch.set_num_threads(1)
    ceilings = measure_ceilings(torch.device("cpu"), dtype, weight_bytes)
    print(f"one thread reads {ceilings.bytes_per_ms / 1e6:.1f} GB/s", end=" and multiplies ")
    print(f"{ceilings.operations_per_ms / 1e6:.0f} GFLOP/s in {str(dtype)[6:]}\n")
    print("step                   rows   weights ms       KV ms  operations ms   bound by")
    found = []
    # (what, sequences, new tokens of each, tokens of each that are read)
    for what, B, T, context in (
        ("one sequence", 1, 1, 512),
        ("8 sequences", 8, 1, 512),
        ("64 sequences", 64, 1, 1000),
        ("a prompt of 512", 1, 512, 512),
    ):
        kv_bytes = B * context * 2 * num_layers * width * dtype.itemsize
        # Each query is multiplied with each K that it may read, and each weight with a V.
        pairs = B * context if T == 1 else T * (T + 1) // 2
        operations = 2 * (every * B * T + last * B) + 4 * num_layers * width * pairs
        floors = floors_ms(Work(weight_bytes, kv_bytes, operations), ceilings)
        found.append(bound_by(floors))
        cells = f"{floors['weights']:12.1f}{floors['KV']:12.1f}{floors['operations']:15.1f}"
        print(f"{what:20} {B * T:6} {cells}   {found[-1]}")
    # One row: 2 operations for 4 bytes. A prompt: 1,024. No processor lies outside of these.
    assert found[0] == "weights" and found[-1] == "operations"
    print("ok: one sequence waits for the weights, a prompt for the products")


if __name__ == "__main__":
    demo()
