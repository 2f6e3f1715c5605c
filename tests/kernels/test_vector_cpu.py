"""vector_cpu.py: each word against NumPy, all lanes and some, and the memory around untouched.

Small integers have sums that are exact in any order, so there every bit is compared.
"""

import ctypes
import math
import mmap
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from kernels import vector_cpu
from kernels.numba_tools import FASTMATH, HAS_NUMBA, bits
from kernels.vector_cpu import (
    at_most,
    first,
    lanes,
    largest,
    load,
    power_of_two,
    store,
    store_totals,
    total,
    zeros,
)

here = pytest.mark.skipif(not HAS_NUMBA, reason="nothing is compiled without numba")
F32, F64, BITS = np.float32, np.float64, np.uint16
EACH_WIDTH = pytest.mark.parametrize(("dtype", "W"), [(F32, 16), (F64, 8)], ids=["fp32", "fp64"])
EACH_MOVE = pytest.mark.parametrize(
    ("source", "target", "W"),
    [(F32, F32, 16), (F64, F64, 8), (BITS, F32, 16), (F32, BITS, 16)],
    ids=["fp32", "fp64", "bf16 to fp32", "fp32 to bf16"],
)
SENTINEL = 77.0


# ---- loops and numbers ---------------------------------------------------------------------------
def fresh(function):
    """`compiled`, but not kept on disk: a change of vector_cpu.py would not renew it there."""
    if not HAS_NUMBA:
        return function
    import numba

    return numba.njit(fastmath=FASTMATH)(function)


@fresh
def move(source, at, count, target, to, to_count):
    store(target, to, to_count, load(source, at, count))
    return lanes(source)


@fresh
def move_fewer_and_fewer(source, target):
    for count in range(lanes(source), 1, -1):
        store(target, 0, lanes(source), load(source, 0, count))


@fresh
def join(source, count, beginning, sums, at):
    W = lanes(source)
    a, b, c = load(source, 0, W), load(source, W, W), load(source, 2 * W, W)
    store_totals(sums, at, a, b, c, load(source, 3 * W, W))
    store(beginning, 0, W, first(a, count))
    return total(a), largest(a), largest(first(a, count))


@fresh
def limit(x, most):
    store(x, 0, lanes(x), at_most(load(x, 0, lanes(x)), most))


@fresh
def one_power_each(x, out):
    for i in range(len(x)):
        out[i] = power_of_two(x[i])


@fresh
def compute(x, y, number, out, at):
    W = lanes(x)
    a, b, s, n = load(x, 0, W), load(y, 0, W), zeros(x), number
    s += a
    t = s
    s += n
    sums = (a + b, a - b, a * b, a + n, n + a, a - n, n - a, a * n, n * a, s, t, zeros(x))
    for result in (*sums, a * b + n, n * a + b, a / b, a / n, n / a):
        store(out, at, W, result)
        at += W
    return total(a * n), total(n + a), total(a / b), total(s), largest(n - a)


def row_of(numbers, dtype):
    """An array of this type; of bfloat16's bits as torch rounds to them."""
    if dtype != BITS:
        return np.asarray(numbers, dtype)
    return bits(torch.from_numpy(np.asarray(numbers, F32)).bfloat16())


def raised(power, x):
    out = np.full_like(x, SENTINEL)
    power(x, out)
    return out


def random_numbers(dtype, *shape):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def ends_at_a_wall(numbers):
    """A copy of an array behind whose last number no byte may be read or written."""
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), mmap.PAGESIZE, 0) == 0
    page = np.frombuffer(memory, numbers.dtype, mmap.PAGESIZE // numbers.itemsize)
    page[len(page) - len(numbers) :] = numbers
    return page[len(page) - len(numbers) :]


# ---- from memory and back ------------------------------------------------------------------------
@here
@EACH_MOVE
def test_a_load_takes_count_numbers_from_anywhere_and_zeros_behind(source, target, W):
    for at in (0, 1, 2, 3, 7, 16, 21):
        for count in (*range(-2, W + 3), -(2**40), 2**31, 2**40):
            some = min(max(count, 0), W)
            numbers, out = np.full(at + 2 * W, math.nan), np.full(W, row_of(SENTINEL, target))
            numbers[at : at + some] = np.arange(some) - 3.5
            assert move(row_of(numbers, source), at, count, out, 0, W) == W
            want = row_of([*(np.arange(some) - 3.5), *[0] * (W - some)], target)
            assert out.tobytes() == want.tobytes()  # and no zero is -0


@here
@EACH_MOVE
def test_no_number_is_left_from_an_earlier_load(source, target, W):
    out = np.full(16, row_of(SENTINEL, target))
    move_fewer_and_fewer(row_of(np.arange(16) + 1, source), out)
    assert (out[:W] == row_of([1, 2, *[0] * (W - 2)], target)).all()


@here
@EACH_MOVE
def test_a_store_puts_count_numbers_anywhere_and_no_more(source, target, W):
    numbers = row_of(np.arange(W) - 3.5, source)
    for to in (0, 1, 2, 3, 7, 16, 21):
        for count in (*range(-2, W + 3), -(2**40), 2**31, 2**40):
            some = min(max(count, 0), W)
            want = np.full(to + 2 * W, row_of(SENTINEL, target))
            out, want[to : to + some] = want.copy(), row_of(np.arange(some) - 3.5, target)
            move(numbers, 0, W, out, to, count)
            assert out.tobytes() == want.tobytes()


@here
@pytest.mark.skipif(sys.platform != "linux", reason="the wall is built by Linux")
@EACH_MOVE
def test_nothing_behind_the_count_is_touched_even_if_it_would_not_matter(source, target, W):
    for count in (0, 1, 5, W - 1, W):
        numbers = ends_at_a_wall(row_of(np.arange(count) + 1, source))
        out = ends_at_a_wall(np.zeros(count, target))
        move(numbers, 0, count, out, 0, count)
        assert (out == row_of(np.arange(count) + 1, target)).all()


@here
def test_each_bfloat16_is_widened_exactly():
    every = np.arange(2**16, dtype=BITS)
    out = np.empty(2**16, F32)
    for i in range(0, len(every), 16):
        move(every, i, 16, out, i, 16)
    assert (out.view(np.uint32) == every.astype(np.uint32) << 16).all()


@here
def test_float32_is_rounded_to_bfloat16_as_torch_does_it():
    """Each upper half with each kind of lower one: ties, infinities, subnormals and all others."""
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    each = (np.arange(2**16, dtype=np.uint32)[:, None] << 16 | lower).ravel()
    some = np.random.default_rng(0).integers(0, 2**32, 500_000, np.uint32)
    numbers = np.concatenate([each, some]).view(F32)
    out, is_nan = np.zeros(len(numbers), BITS), np.isnan(numbers)
    for i in range(0, len(numbers), 16):
        move(numbers, i, 16, out, i, 16)
    assert (out == row_of(numbers, BITS))[~is_nan].all()
    assert torch.from_numpy(out.view(np.int16)).view(torch.bfloat16).isnan().numpy()[is_nan].all()
    assert (out >> 15 == numbers.view(np.uint32) >> 31).all()  # each sign, a NaN's too


# ---- lanes joined --------------------------------------------------------------------------------
@here
@EACH_WIDTH
def test_sums_and_the_largest_of_small_integers_are_exact(dtype, W):
    generator = np.random.default_rng(0)
    for at in range(6):
        numbers, beginning = generator.integers(-999, 999, (4, W)).astype(dtype), np.empty(W, dtype)
        out = np.full(12, SENTINEL, dtype)
        got = join(numbers.ravel(), W, beginning, out, at)
        assert got == (numbers[0].sum(), numbers[0].max(), numbers[0].max())
        assert out[at : at + 4].tolist() == numbers.sum(1).tolist()
        assert (np.delete(out, range(at, at + 4)) == SENTINEL).all()


@here
@EACH_WIDTH
def test_at_most_limits_each_number_and_keeps_what_is_none(dtype, W):
    x = np.arange(W, dtype=dtype)
    x[1], x[2], x[3] = math.nan, math.inf, -math.inf
    want = np.where(np.isnan(x), x, np.minimum(x, dtype(5.5)))
    limit(x, dtype(5.5))
    np.testing.assert_array_equal(x, want)


@here
@EACH_WIDTH
def test_first_keeps_so_many_and_minus_infinity_behind(dtype, W):
    numbers, beginning, out = random_numbers(dtype, 4 * W), np.empty(W, dtype), np.empty(4, dtype)
    numbers[0] = -9
    for count in range(W + 1):
        top = join(numbers, count, beginning, out, 0)[2]
        want = [*numbers[:count].tolist(), *[-math.inf] * (W - count)]
        assert beginning.tolist() == want and top == max(want)
    numbers[: 2 * W] = math.nan  # what is left out may be anything
    join(numbers, 0, beginning, out, 0)
    assert (beginning == -math.inf).all()


# ---- powers --------------------------------------------------------------------------------------
@here
@EACH_WIDTH
@pytest.mark.parametrize("power", [vector_cpu.powers, one_power_each], ids=["registers", "numbers"])
class TestPowers:
    def test_they_are_right_to_the_last_place(self, power, dtype, W):
        halves = np.arange(-200, 1, dtype=dtype) / 2
        beside = [np.nextafter(halves, dtype(to)) for to in (-math.inf, 0)]
        x = np.concatenate([np.linspace(-125.9, 126, 20_003, dtype=dtype), halves, *beside])
        want = np.exp2(x.astype(np.longdouble))
        assert (np.abs(raised(power, x) / want - 1) < 1.5 * np.finfo(dtype).eps).all()

    def test_whole_numbers_are_exact(self, power, dtype, W):
        whole = np.arange(np.finfo(dtype).minexp, 1)
        got = raised(power, np.append(whole, -0.0).astype(dtype))
        assert (got == np.ldexp(dtype(1), np.append(whole, 0))).all() and (got[-2:] == 1).all()

    def test_the_ends_of_the_range(self, power, dtype, W):
        smallest, bottom = np.finfo(dtype).tiny, np.finfo(dtype).minexp
        lower = [-math.inf, np.finfo(dtype).min, -5000, bottom - 1, bottom - 0.25, bottom]
        x = np.array([*lower, math.nan, -1, -math.nan, 0], dtype)
        got = raised(power, x)
        assert (got[:6] == smallest).all() and got[[7, 9]].tolist() == [0.5, 1]
        assert np.isnan(got[[6, 8]]).all()

    def test_a_number_gives_the_same_alone_and_in_any_lane(self, power, dtype, W):
        x = -20 * random_numbers(dtype, W) ** 2
        want = raised(power, x)
        for i in range(W):
            assert (raised(power, np.roll(x, i)) == np.roll(want, i)).all()
            for others in (0, -math.inf, math.nan):
                crowd = np.full(W, others, dtype)
                crowd[i] = x[0]
                assert raised(power, crowd)[i] == want[0]


# ---- arithmetic ----------------------------------------------------------------------------------
@here
@EACH_WIDTH
def test_registers_and_numbers_are_computed_with_in_their_own_type(dtype, W):
    (x, y), n = random_numbers(dtype, 2, W), dtype(0.1)
    out, eps = np.full((17, W), math.nan, dtype), np.finfo(dtype).eps
    compute(x, y, 0.1, out.ravel(), 0)  # 0.1 is a float64
    exact = [x + y, x - y, x * y, x + n, n + x, x - n, n - x, x * n, n * x, x + n, x, 0 * x]
    assert (out[:12] == exact).all()
    for got, (a, b, c) in zip(out[12:14], [(x, y, n), (n, x, y)], strict=True):
        a, b, c = (number.astype(np.longdouble) for number in (a, b, c))
        assert (np.abs(got - (a * b + c)) <= eps * (np.abs(a * b) + np.abs(c))).all()
    np.testing.assert_allclose(out[14:], [x / y, x / n, n / x], rtol=1.5 * eps)
    returned = compute.nopython_signatures[-1].return_type
    assert {str(kind) for kind in returned} == {np.dtype(dtype).name}


@here
@EACH_WIDTH
def test_no_lane_depends_on_another(dtype, W):
    x, y = random_numbers(dtype, 2, W)
    want, got = np.empty((2, 17, W), dtype)
    compute(x, y, 0.1, want.ravel(), 0)
    for i in range(W):
        compute(np.roll(x, i), np.roll(y, i), 0.1, got.ravel(), 0)
        assert (got == np.roll(want, i, 1)).all()
        compute(*(np.where(np.arange(W) == i, z, math.nan) for z in (x, y)), 0.1, got.ravel(), 0)
        assert (got[:, i] == want[:, i]).all()


# ---- other machines ------------------------------------------------------------------------------
def run(code, **env):
    options = {"env": os.environ | env, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@here
@pytest.mark.parametrize("x", [math.nan, -math.inf, -1.0, 0.0])
def test_a_power_that_is_known_while_compiling_is_the_same(x):
    number = np.array([x])
    assert str(fresh(lambda: power_of_two(x))()) == str(fresh(lambda a: power_of_two(a[0]))(number))


@here
@pytest.mark.parametrize(
    "array", [np.ones(64, F32)[::2], np.ones(64, np.float16), np.ones(64, int)]
)
def test_a_register_refuses_what_it_cannot_read(array):
    with pytest.raises(vector_cpu.TypingError, match="numbers of its own side by side"):
        fresh(lambda a: total(load(a, 0, 4)))(array)


@here
@pytest.mark.parametrize(("source", "target"), [(F32, F64), (F64, F32), (F64, BITS), (BITS, F64)])
def test_a_register_goes_only_where_its_numbers_belong(source, target):
    with pytest.raises(vector_cpu.TypingError, match="does not go into"):
        move(np.ones(16, source), 0, 16, np.ones(16, target), 0, 16)


def test_without_numba_the_file_imports_and_its_demo_says_what_is_missing():
    block = "import sys; sys.modules['numba'] = sys.modules['llvmlite'] = None\n"
    said = run(block + "import vector_cpu; vector_cpu.demo()")
    assert said.startswith("ok:") and "numba" in said


@here
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="about x86 alone")
def test_on_a_processor_with_shorter_registers(tmp_path):
    code = "import vector_cpu as v; v.demo(); text = ''.join(v.dot.inspect_asm().values())"
    code += "; print('ymm' in text, 'zmm' in text)"
    env = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    said = run(code, **env).splitlines()
    assert said[-2].startswith("ok:") and said[-1] == "True False"
