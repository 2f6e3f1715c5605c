"""Ceilings and floors: what is measured, how it is timed, and which floor is the largest.

No test can know how fast this machine is. So the clock is replaced where a rate is computed, and
the real clock is only compared with bounds that hold on any machine.
"""

import time
import weakref
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch
from worlds import needs_gpu

from watch import roofline
from watch.roofline import Ceilings, Work, bound_by, floors_ms, timer

CPU = torch.device("cpu")


class Clock:
    """Stands in for `timer`: it makes each call once, and takes the time that the test says."""

    def __init__(self, monkeypatch, times_ms):
        self.results, self.times_ms = [], times_ms
        monkeypatch.setattr(roofline, "timer", self)

    def __call__(self, call, num_calls, device):
        self.results.append(call(0))
        times = self.times_ms(self.results[-1])
        return lambda: next(times)


def always(time_ms):
    """An endless row of the same time."""
    return iter(lambda: time_ms, None)


# ---- floors --------------------------------------------------------------------------------------
def test_each_floor_is_the_work_divided_by_the_ceiling():
    work = Work(weight_bytes=6000, kv_bytes=2000, operations=9000, launches=10, host_ms=0.5)
    ceilings = Ceilings(bytes_per_ms=1000.0, operations_per_ms=3000.0, launch_ms=0.25)
    assert floors_ms(work, ceilings) == {
        "weights": 6.0,
        "KV": 2.0,
        "memory": 8.0,  # both come through it
        "operations": 3.0,
        "launches": 2.5,
        "host": 0.5,
    }
    assert "launches" not in floors_ms(work._replace(launches=None), ceilings)
    assert "launches" not in floors_ms(work, ceilings._replace(launch_ms=None))


@pytest.mark.parametrize(
    "work, largest",
    [
        (Work(5000, 4000, 8000), "weights"),  # 5 + 4 ms of memory against 8 of products
        (Work(4000, 5000, 8000), "KV"),
        (Work(5000, 2000, 8000), "operations"),  # 5 + 2 ms against 8
        (Work(5000, 0, 0), "weights"),
        (Work(100, 100, 100, launches=30), "launches"),
        (Work(100, 100, 100, launches=30, host_ms=4.0), "host"),
    ],
)
def test_the_largest_floor_names_what_a_step_is_bound_by(work, largest):
    assert bound_by(floors_ms(work, Ceilings(1000.0, 1000.0, 0.1))) == largest


# ---- how calls are timed -------------------------------------------------------------------------
def test_a_timer_makes_each_call_in_order_and_the_first_once_beforehand():
    made = []
    measure = timer(made.append, 3, CPU)
    assert made == [0]
    measure()
    assert made == [0, 0, 1, 2]


@pytest.mark.parametrize("device", [CPU, torch.device("cuda")], ids=str)
def test_a_timer_keeps_the_tensors_that_it_reads(device, monkeypatch):
    """A graph would read an address whose memory belongs to another tensor by then."""
    monkeypatch.setattr(roofline.torch, "cuda", MagicMock())  # its graphs hold nothing
    numbers = torch.ones(2)
    alive = weakref.ref(numbers)
    measure = timer(partial(torch.select, numbers, 0), 2, device)
    del numbers
    assert alive() is not None
    del measure
    assert alive() is None


# ---- ceilings ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "num_bytes, expected", [(5, 2**20), (3_000_000, 3_000_000), (10**12, 2**22)]
)
def test_the_buffer_is_as_large_as_what_the_step_reads_within_bounds(
    monkeypatch, num_bytes, expected
):
    """Its sum says how large it is: it is full of ones."""
    monkeypatch.setattr(roofline, "MOST_READ_BYTES", 2**22)
    clock = Clock(monkeypatch, lambda result: always(2.0))
    assert roofline.read_rate(CPU, num_bytes) == expected / 2.0
    assert [result.item() for result in clock.results] == [expected / 4]


def test_products_grow_until_one_takes_long(monkeypatch):
    times_ms = {256: 1.0, 512: 5.0, 1024: 11.0}
    clock = Clock(monkeypatch, lambda result: always(times_ms[len(result)]))
    assert roofline.product_rate(CPU, torch.bfloat16) == 2 * 1024**3 / 11.0
    assert {result.dtype for result in clock.results} == {torch.bfloat16}
    assert [tuple(result.shape) for result in clock.results] == [(n, n) for n in times_ms]


def test_the_fastest_try_of_the_best_size_is_the_ceiling(monkeypatch):
    times_ms = {256: iter([3.0, 1.0, 2.0]), 512: iter([99.0, 98.0, 99.0])}
    Clock(monkeypatch, lambda result: times_ms[len(result)])
    assert roofline.product_rate(CPU, torch.float32) == 2 * 256**3 / 1.0
    Clock(monkeypatch, lambda result: iter([5.0, 4.0, 8.0, 2.0, 8.0, 8.0, 8.0]))
    assert roofline.read_rate(CPU, 2**20) == 2**20 / 2.0


def test_the_ceilings_of_a_cpu_take_less_than_two_seconds_and_have_no_launches():
    started = time.perf_counter()
    ceilings = roofline.measure_ceilings(CPU, torch.float32, 100_000_000)
    assert time.perf_counter() - started < 2
    assert ceilings.launch_ms is None
    # 10 MB/s to 10 TB/s, 0.1 GFLOP/s to 1 PFLOP/s
    assert 1e4 < ceilings.bytes_per_ms < 1e10
    assert 1e5 < ceilings.operations_per_ms < 1e12


@needs_gpu
def test_an_empty_kernel_on_a_gpu_takes_about_a_microsecond():
    assert 0.2e-3 < roofline.launch_time_ms(torch.device("cuda")) < 20e-3
