"""What a step asks of a GPU, counted from PyTorch's profiler: believed by nobody before it is seen.

A step that should be one launch, one copy and one wait may copy seven times and wait three times,
and its tokens are right all the same. The profiler lists everything that the host called and that
the device did, with its begin and end:

    host     |mark .................................................|   calls within the mark count:
                 copy  launch        wait                               copies, launches, waits
    device           [copy][kernel][kernel]  .  [kernel]  .  [copy]     the gaps are idle time

Kernels inside of a recorded graph are listed one by one. latency.py writes the text to a file;
tests assert the counts.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch

MARK = "the steps that are counted"
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
ALLOCATIONS = ("cudaMalloc", "cudaMallocAsync", "cudaFree", "cudaFreeAsync")
NUM_LONGEST = 10


class Event(NamedTuple):
    """Something that the host called or the device did."""

    name: str
    on_device: bool
    start_us: float
    end_us: float


class Profile(NamedTuple):
    """Of some steps: all counts and times are of one step."""

    kernels: float
    graphs: float  # launched whole
    copies_to_device: float
    copies_to_host: float
    waits: float
    allocations: float  # asked of the driver: memory taken, or given back
    step_us: float  # of the device's time, from its first work to its last
    idle_percent: float  # of that time
    longest: list[tuple[float, float, str]]  # microseconds a step, times a step, kernel


# ---- counting ------------------------------------------------------------------------------------
def busy_us(events: list[Event]) -> float:
    """How long at least one of the events was going on: (0, 5), (3, 8), (20, 21) are 9."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start_us):
        total += max(0.0, event.end_us - max(event.start_us, until))
        until = max(until, event.end_us)
    return total


def count(events: list[Event], num_steps: int) -> Profile:
    """What lies within the mark. Raises ValueError where there is no mark, or no device's work."""
    marks = [event for event in events if event.name == MARK and not event.on_device]
    done = [event for event in events if event.on_device and event.name != MARK]
    if not marks or not done:
        raise ValueError(f"{len(marks)} marks, {len(done)} events of a device: nothing to count")
    begin, end = marks[0].start_us, marks[0].end_us
    called = [e.name for e in events if not e.on_device and begin <= e.start_us <= end]
    kernels = [e for e in done if not e.name.startswith(("Memcpy", "Memset"))]

    def per_step(names: list[str], *starts: str) -> float:
        return sum(name.startswith(starts) for name in names) / num_steps

    by_name: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        by_name[event.name].append(event.end_us - event.start_us)
    longest = [(sum(t) / num_steps, len(t) / num_steps, name) for name, t in by_name.items()]
    span_us = max(e.end_us for e in done) - min(e.start_us for e in done)
    names = [event.name for event in done]
    return Profile(
        kernels=len(kernels) / num_steps,
        graphs=per_step(called, "cudaGraphLaunch"),
        copies_to_device=per_step(names, "Memcpy HtoD"),
        copies_to_host=per_step(names, "Memcpy DtoH"),
        waits=sum(name in WAITS for name in called) / num_steps,
        allocations=sum(name in ALLOCATIONS for name in called) / num_steps,
        step_us=span_us / num_steps,
        idle_percent=100 * (1 - busy_us(done) / span_us) if span_us else 0.0,
        longest=sorted(longest, reverse=True)[:NUM_LONGEST],
    )


def lines_of(title: str, profile: Profile) -> list[str]:
    """A profile as text, one screen."""
    counts = [
        ("kernels", profile.kernels),
        ("graphs launched", profile.graphs),
        ("copies to the device", profile.copies_to_device),
        ("copies to the host", profile.copies_to_host),
        ("waits of the host", profile.waits),
        ("device allocations", profile.allocations),
        ("us of the device", profile.step_us),
        ("% of them idle", profile.idle_percent),
    ]
    lines = [title, *(f"  {number:10.2f}  {name}" for name, number in counts)]
    lines.append("     us a step   times   kernel")
    for time_us, times, name in profile.longest:
        lines.append(f"  {time_us:10.2f}  {times:7.2f}   {name[:76]}")
    return lines


# ---- looking -------------------------------------------------------------------------------------
def profile_steps(step: Callable[[], object], num_steps: int) -> Profile:
    """Call a step so many times under the profiler; needs a GPU."""
    kinds = torch.profiler.ProfilerActivity
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profiler:
        with torch.profiler.record_function(MARK):
            for _ in range(num_steps):
                step()
        torch.cuda.synchronize()  # outside of the mark: it is not the step's
    on_gpu = torch.autograd.DeviceType.CUDA
    events = [
        Event(e.name, e.device_type == on_gpu, e.time_range.start, e.time_range.end)
        for e in profiler.events()
    ]
    return count(events, num_steps)
