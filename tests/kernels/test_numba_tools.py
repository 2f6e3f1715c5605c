"""numba_tools.py: bfloat16 widened and rounded, powers of two, prefetches that change nothing."""

import math

import numpy as np
import pytest
import torch
from parallel import in_new_process

from kernels.numba_tools import (
    FASTMATH,
    HAS_NUMBA,
    arrays_at,
    as_numpy,
    compiled,
    compiled_parallel,
    flat_memory,
    narrow,
    power_of_two,
    prefetch,
    prefetch_line,
    warn_of_no_cache,
    widen,
)

needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="nothing is compiled without numba")


def fresh(function):
    """`compiled` without the cache on disk, which an edit of numba_tools.py would not renew."""
    if not HAS_NUMBA:
        return function
    import numba

    return numba.njit(fastmath=FASTMATH)(function)


@fresh
def widen_each(x, out):
    for i in range(len(x)):
        out[i] = widen(x[i])


@fresh
def raise_each(x, out):
    for i in range(len(x)):
        out[i] = power_of_two(x[i])


@fresh
def prefetch_at(x, index):
    prefetch(x, index)
    prefetch_line(x, index)


@needs_numba
def test_each_bfloat16_is_widened_exactly():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    out = np.empty(2**16, np.float32)
    widen_each(as_numpy(every), out)
    assert np.array_equal(out, every.float().numpy(), equal_nan=True)


@fresh
def narrow_each(row, out):
    for i in range(len(row)):
        out[i] = narrow(row[i], out)


@needs_numba
def test_a_row_is_stored_as_it_is_or_rounded_to_bfloat16_as_pytorch_rounds_it():
    bits = np.random.default_rng(0).integers(0, 2**32, 40_000, dtype=np.uint32)
    ties = np.arange(2**16, dtype=np.uint32) << 16 | 0x8000  # between two of bfloat16's numbers
    for row in (bits.view(np.float32), ties.view(np.float32)):
        as_it_is, rounded = np.empty_like(row), np.empty(len(row), np.uint16)
        narrow_each(row, as_it_is)
        narrow_each(row, rounded)
        assert np.array_equal(as_it_is.view(np.uint32), row.view(np.uint32))
        want = torch.from_numpy(row.copy()).bfloat16()
        got = torch.from_numpy(rounded.view(np.int16)).view(torch.bfloat16)
        assert torch.equal(got.isnan(), want.isnan())
        is_number = ~want.isnan()
        assert torch.equal(got[is_number].view(torch.int16), want[is_number].view(torch.int16))


@needs_numba
@pytest.mark.parametrize(("dtype", "lowest"), [(np.float32, -126), (np.float64, -1000)])
def test_a_power_of_two_is_within_two_units_of_its_last_place(dtype, lowest):
    x = np.concatenate(
        [np.linspace(lowest, 126, 200_003), np.linspace(-1, 1, 100_001), np.arange(-126, 127)]
    ).astype(dtype)
    out = np.empty_like(x)
    raise_each(x, out)
    want = np.exp2(x.astype(np.longdouble))
    assert (np.abs(out / want - 1) < 2 * np.finfo(dtype).eps).all()


@needs_numba
def test_where_nothing_can_be_written_a_function_is_compiled_without_a_cache_and_it_is_said_once():
    """Numba finds no folder for a function that stands in no file."""
    space = {}
    exec("def twice(x):\n    return 2 * x\ndef thrice(x):\n    return 3 * x", space)
    warn_of_no_cache.cache_clear()
    with pytest.warns(UserWarning, match="set NUMBA_CACHE_DIR to a folder") as said:
        twice, thrice = compiled(space["twice"]), compiled_parallel(space["thrice"])
    assert (twice(21), thrice(14), len(said)) == (42, 42, 1)
    assert twice.signatures and thrice.targetoptions["parallel"] and twice.targetoptions["nogil"]


@needs_numba
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_minus_infinity_gives_zero_and_nan_stays_nan(dtype):
    # Softmax needs both: the weight of an entry without a token, and an overflow that is seen.
    x = np.array([-math.inf, -1e30, -5000, math.nan, 0, 1] * 9, dtype)  # whole vectors and a rest
    out = np.empty_like(x)
    raise_each(x, out)
    assert np.array_equal(out, np.array([0, 0, 0, math.nan, 1, 2] * 9, dtype), equal_nan=True)


@needs_numba
def test_a_prefetch_of_any_address_changes_nothing():
    x = np.arange(100, dtype=np.float32)
    for index in (0, 99, -1, 10**6, -(10**9), 2**40):
        prefetch_at(x, index)
    assert np.array_equal(x, np.arange(100))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_flat_memory_begins_at_a_views_first_element_and_is_the_same_memory(dtype):
    tensor = torch.arange(24, dtype=dtype).view(2, 3, 4)
    flat = flat_memory(tensor[1, :, 1:])  # its first element is number 13
    assert len(flat) == 24 - 13
    flat[0] = as_numpy(torch.tensor([7], dtype=dtype))[0]
    assert tensor[1, 0, 1] == 7


@fresh
def sums_at(arrays, addresses):
    (first, factor), second = arrays_at(arrays, addresses)
    return first.sum() * factor, second.sum(), second[1, 0]


@needs_numba
def test_arrays_of_the_same_shapes_are_found_by_their_addresses():
    ones, twos = np.ones(3, np.float32), np.full((2, 2), 2, np.int64)
    other, table = np.arange(3, dtype=np.float32), np.arange(4).reshape(2, 2)
    addresses = np.array([other.ctypes.data, table.ctypes.data])
    assert sums_at(((ones, 10.0), twos), addresses) == (30, 6, 2)


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = sys.modules["llvmlite"] = None
import torch
from kernels import attention_cpu, linear_cpu, packed_linear, prefill_cpu, step_cpu
from worlds import World
attention_cpu.demo()
linear_cpu.demo()
world, kv = World([1], [3]), torch.zeros(2, 1, 2, 8).double()
for call in (
    lambda: world.run(attention_cpu.paged_attention_cpu),
    lambda: prefill_cpu.write_kv_cpu(*kv, world.k_cache, world.v_cache, torch.tensor([0])),
):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""


def test_without_numba_the_files_import_and_a_call_says_what_is_missing():
    lines = in_new_process(WITHOUT_NUMBA).splitlines()
    assert len(lines) == 4
    assert all(line.startswith("ok:") for line in lines[:2])
    assert all("needs numba" in line for line in lines[2:])
