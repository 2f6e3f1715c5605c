"""linear_cpu.py: the float64 product, the exact order of a sum, and no access outside the arrays.

A sum adds its inputs in one order, with one rounding for each. That determines every bit of a
result, so `sums_in_order` adds in NumPy in the same way, and the tests compare bit for bit. Where
the processor multiplies pairs of bfloat16, they compare both ways to multiply them.
"""

import itertools
import math
import platform

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel import in_new_process, in_threads
from torch import nn

from kernels import linear_cpu
from kernels.linear_cpu import (
    PANEL,
    ROWS,
    TURN,
    WORDS_AT_ONCE,
    PanelLinear,
    can_multiply_pairs,
    can_use_panels,
    gelu_new_row,
    multiply,
)
from kernels.numba_tools import HAS_NUMBA, as_numpy, processor_features

DTYPES = [torch.float32, torch.bfloat16]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
ROW_COUNTS = [0, 1, 3, 4, 5, 7, 8, 9, 64, 65, 200]
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # of the largest number
SENTINEL = 1234.5

needs_panels = pytest.mark.skipif(
    not can_use_panels(torch.float32), reason="panels need AVX2, numba and OpenMP's threads"
)
needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="the processor is asked through numba")


# ---- inputs and their oracles --------------------------------------------------------------------
def plain_layer(inputs, outputs, dtype, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


def random_x(rows, inputs, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inputs, generator=generator).to(dtype)


def product(x, linear):
    """The product in float64, from the same rounded numbers that the layer gets."""
    want = x.double() @ linear.weight.double().t()
    return want if linear.bias is None else want + linear.bias.double()


def check(got, want, dtype):
    """Assert the shape, the dtype, and the distance from the float64 product `want`."""
    assert got.dtype == dtype and got.shape == want.shape
    assert not got.requires_grad
    if want.numel() == 0:
        return
    largest, error = want.abs().max(), (got.double() - want).abs()
    assert error.max() <= BOUNDS[dtype] * largest
    if dtype == torch.bfloat16:
        # The sum is in float32 and is rounded to bfloat16 once.
        one_place = torch.finfo(torch.bfloat16).eps * want.abs()
        assert (error <= one_place + BOUNDS[torch.float32] * largest).all()


def rounded_once(products, sums):
    """float32(products + sums) from float64 products and float32 sums, rounded only at the end.

    A sum in float64 rounds once and the cast to float32 a second time. To avoid an error by both,
    the first rounding is "to odd": where the float64 sum is not exact its last bit is made odd, and
    then it is never halfway between two float32.
    """
    exact = products + sums
    back = exact - products
    remainder = (products - (exact - back)) + (sums - back)
    is_even = exact.view(np.int64) % 2 == 0
    beside = np.nextafter(exact, np.copysign(np.inf, remainder))
    return np.where((remainder != 0) & is_even, beside, exact).astype(np.float32)


def sums_in_order(x, linear):
    """The sums in float32: the bias, then input after input, with one rounding for each.

    In bfloat16 the second input comes before the first, the fourth before the third, and so on.
    """
    outputs = len(linear.weight)
    start = torch.zeros(outputs) if linear.bias is None else linear.bias.float()
    sums = start.expand(len(x), outputs).numpy().astype(np.float64)
    columns = list(zip(x.double().t().numpy(), linear.weight.double().t().numpy(), strict=True))
    if x.dtype == torch.bfloat16:
        columns = [one for i in range(0, len(columns), 2) for one in reversed(columns[i : i + 2])]
    for numbers, weights in columns:
        sums = rounded_once(np.outer(numbers, weights), sums).astype(np.float64)
    return torch.from_numpy(sums).float()


def sums_of(layer, x):
    """The compiled loop's sums in float32, before they are rounded to bfloat16."""
    found = []
    for rows in each_form(layer, x):
        out = np.full((len(x), len(layer.padded_bias)), math.nan, np.float32)
        multiply(rows, layer.words, layer.padded_bias, False, out)
        found.append(torch.from_numpy(out[:, : layer.out_features]))
    assert all(torch.equal(one, found[0]) for one in found)
    return found[0]


def each_form(layer, x):
    """x as the compiled loop takes it: in float32, and in pairs of bfloat16 where it can."""
    padded = F.pad(x, (0, layer.padding_in))
    forms = [padded.float().numpy()]
    if x.dtype == torch.bfloat16 and "avx512bf16" in processor_features():
        forms.append(as_numpy(padded).view(np.uint32))
    return forms


# ---- it is a product -----------------------------------------------------------------------------


@needs_panels
@pytest.mark.oracle
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 150),
    inputs=st.integers(1, 1700),
    outputs=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_size_is_the_float64_product(rows, inputs, outputs, dtype, bias, seed):
    linear, x = plain_layer(inputs, outputs, dtype, bias, seed), random_x(rows, inputs, dtype, seed)
    check(PanelLinear(linear)(x), product(x, linear), dtype)


@needs_panels
@EACH_DTYPE
def test_a_view_of_a_wider_tensor_is_multiplied_and_only_read(dtype):
    linear = plain_layer(47, 50, dtype)
    wide = torch.full((30, 3 * 47), math.nan, dtype=dtype)
    wide[::3, 47:94] = random_x(10, 47, dtype)
    part, before = wide[::3, 47:94], wide.clone()
    assert not part.is_contiguous()
    check(PanelLinear(linear)(part), product(part, linear), dtype)
    transposed = random_x(47, 10, dtype).t()
    check(PanelLinear(linear)(transposed), product(transposed, linear), dtype)
    repeated = random_x(1, 47, dtype).expand(9, 47)
    check(PanelLinear(linear)(repeated), product(repeated, linear), dtype)
    assert torch.equal(wide.nan_to_num(99.0), before.nan_to_num(99.0))
    for inputs in (47, 48):
        odd = random_x(1, 10 * inputs + 1, dtype)[0, 1:].view(10, inputs)  # begins inside a word
        linear = plain_layer(inputs, 50, dtype)
        check(PanelLinear(linear)(odd), product(odd, linear), dtype)


@needs_panels
@EACH_DTYPE
@pytest.mark.parametrize("rows", [0, 1, 9, 64])
@pytest.mark.parametrize("outputs", [1, 15, 16, 24, 50, 96])
@pytest.mark.parametrize("inputs", [47, 1601])  # one piece of a panel and more
def test_the_activation_after_it_is_gpt2s_and_rounded_once(inputs, outputs, rows, dtype):
    linear, x = plain_layer(inputs, outputs, dtype), random_x(rows, inputs, dtype) * 8
    want = F.gelu(product(x, linear), approximate="tanh")
    check(PanelLinear(linear, "gelu_new")(x), want, dtype)


@needs_panels
def test_an_activation_that_panels_do_not_compute_is_refused():
    with pytest.raises(ValueError, match="'relu': panels compute gelu_new or none"):
        PanelLinear(plain_layer(4, 4, torch.float32), "relu")


@needs_panels
def test_the_activation_of_any_number():
    some = torch.linspace(-30, 30, 60_001)
    far = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1e4, -1e4, 3e38, -1e30, math.inf])
    x = torch.cat([some, far])
    want, got = F.gelu(x.double(), approximate="tanh"), x.clone()
    gelu_new_row(got.numpy())
    torch.testing.assert_close(got.double(), want, atol=1e-7, rtol=1e-6)
    not_a_number = torch.full((3,), math.nan)
    gelu_new_row(not_a_number.numpy())
    assert not_a_number.isnan().all()


# ---- a sum's order -------------------------------------------------------------------------------
@needs_panels
@EACH_DTYPE
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("inputs", [1, 2, 3, 769, 1537, 3075])
def test_a_sum_takes_its_inputs_one_after_the_other_with_one_rounding_each(
    inputs, bias, dtype, set_threads
):
    """So the bits depend neither on the other rows nor on the number of threads."""
    linear, x = plain_layer(inputs, 50, dtype, bias), random_x(70, inputs, dtype)
    layer, want = PanelLinear(linear), sums_in_order(x, linear)
    for threads, rows in itertools.product((1, 2), (1, 9, 70)):
        set_threads(threads)
        assert torch.equal(sums_of(layer, x[:rows]), want[:rows])
        assert torch.equal(layer(x[:rows]), want[:rows].to(dtype))


@needs_panels
@pytest.mark.parametrize("rows", [1, 9])
def test_sums_are_rounded_to_bfloat16_as_pytorch_rounds_them(rows):
    """Any bits as the bias: with an x of zeros they are the sums."""
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    ties = np.arange(2**16, dtype=np.uint32) << 16 | 0x8000  # between two of bfloat16's numbers
    sums = torch.from_numpy(np.concatenate([bits, ties]).view(np.float32))
    layer = PanelLinear(plain_layer(8, len(sums), torch.bfloat16))
    layer.padded_bias[: len(sums)] = sums
    got, want = layer(torch.zeros(rows, 8, dtype=torch.bfloat16)), sums.bfloat16()
    is_tiny = sums.abs() < 2**-126  # `vdpbf16ps` takes such a number for 0
    assert torch.equal(got.isnan(), want.isnan().expand_as(got))
    as_they_are = ~(want.isnan() | is_tiny)
    assert torch.equal(got[:, as_they_are], want[as_they_are].expand(rows, -1))


@needs_panels
def test_it_uses_as_many_threads_as_pytorch_does(set_threads):
    import numba

    layer, x = PanelLinear(plain_layer(8, 100, torch.float32)), random_x(3, 8, torch.float32)
    for threads in (1, 2, 64):
        set_threads(threads)
        layer(x)
        assert numba.get_num_threads() == min(threads, numba.config.NUMBA_NUM_THREADS)
        assert torch.get_num_threads() == threads


# ---- nothing leaks -------------------------------------------------------------------------------
@needs_panels
@EACH_DTYPE
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("inputs", [3, 48, 769])
def test_what_is_not_finite_stays_in_its_own_row(inputs, bad, dtype):
    layer, x = PanelLinear(plain_layer(inputs, 50, dtype)), random_x(70, inputs, dtype)
    want = layer(x)
    assert want.isfinite().all()
    x[0, 0] = x[9, inputs // 2] = x[64, -1] = x[69] = bad
    is_bad = torch.tensor([row in (0, 9, 64, 69) for row in range(70)])
    got = layer(x)
    assert torch.equal(got[~is_bad], want[~is_bad])
    assert (got[is_bad].isnan() if math.isnan(bad) else ~got[is_bad].isfinite()).all()


def between_guards(values, guard, behind=2):
    """A contiguous copy of an array with `behind` rows full of `guard` before and after it."""
    around = np.full((len(values) + 2 * behind, *values.shape[1:]), guard, values.dtype)
    around[behind : len(values) + behind] = values
    return around, around[behind : len(values) + behind]


@needs_panels
@EACH_DTYPE
@pytest.mark.parametrize("num_words", [4, 20, 768, 772, 1540])
@pytest.mark.parametrize("rows", [0, 1, 2, 4, 5, 7, 8, 9, 15, 64, 65, 71, 130])
def test_only_the_results_rows_are_written_and_nothing_outside_the_inputs_is_read(
    rows, num_words, dtype
):
    """NaN surrounds x, the panels and the bias; a number that must not change, the result."""
    per_word = 4 // dtype.itemsize
    linear = plain_layer(num_words * per_word, 2 * PANEL, dtype)
    layer, x = PanelLinear(linear), random_x(rows, num_words * per_word, dtype)
    nan = math.nan if per_word == 1 else 0x7FC07FC0  # two of bfloat16's
    _, words = between_guards(layer.words, nan)
    _, padded_bias = between_guards(layer.padded_bias, math.nan, 3 * PANEL)
    for form in each_form(layer, x):
        _, numbers = between_guards(form, nan if form.dtype == np.uint32 else math.nan, 20)
        around, out = between_guards(np.full((rows, 2 * PANEL), SENTINEL, np.float32), SENTINEL, 20)
        multiply(numbers, words, padded_bias, False, out)
        assert torch.equal(torch.from_numpy(out).to(dtype), layer(x))
        check(torch.from_numpy(out).to(dtype), product(x, linear), dtype)
        assert (around[:20] == SENTINEL).all() and (around[20 + rows :] == SENTINEL).all()


@needs_panels
@EACH_DTYPE
@pytest.mark.parametrize("num_words", [4, 768, 772, 1540])
@pytest.mark.parametrize("rows", [0, 1, 8, 9, 64, 65, 130])
def test_rows_meet_each_piece_of_each_panel_once_and_in_order(rows, num_words, dtype, monkeypatch):
    """On one thread a piece that is multiplied twice is not seen; on two it is a data race."""
    calls, per_word = [], 4 // dtype.itemsize
    monkeypatch.setattr(linear_cpu, "multiply_tile", lambda *args: calls.append(args))
    x, w = np.empty((rows, num_words * per_word)), np.empty((3, num_words, PANEL))
    multiply.py_func(x, w, np.empty(3 * PANEL), False, np.empty((rows, 3 * PANEL)))
    met = []
    for _, x_at, _, _, w_at, *_ in calls:
        row, number = divmod(x_at, num_words * per_word)
        met.append((row, w_at // (num_words * PANEL), number // per_word))
    pieces = range(0, num_words, WORDS_AT_ONCE)
    want = list(itertools.product(range(0, rows, ROWS), range(3), pieces))
    assert sorted(met) == want
    assert sorted(met, key=lambda one: one[:2]) == want  # sorted by row and panel only


# ---- arguments -----------------------------------------------------------------------------------
F32, BF16 = torch.float32, torch.bfloat16


@needs_panels
@pytest.mark.parametrize(
    ("dtype", "shape", "other"),
    [(F32, shape, F32) for shape in [(4, 46), (4, 48), (47, 4), (), (47,), (47, 47, 47)]]
    + [(F32, (4, 47), other) for other in (BF16, torch.float64, torch.int64)]
    + [(BF16, (4, 47), other) for other in (F32, torch.float16)],
)
def test_an_x_of_another_shape_or_dtype_is_refused_with_both(dtype, shape, other):
    layer = PanelLinear(plain_layer(47, 50, dtype))
    with pytest.raises(ValueError) as error:
        layer(torch.zeros(shape, dtype=other))
    assert f"{shape} of {other}" in str(error.value) and f"(N, 47) of {dtype}" in str(error.value)


# ---- a module ------------------------------------------------------------------------------------


@needs_panels
@EACH_DTYPE
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (47, 49), (48, 48), (769, 97)])
def test_the_panels_hold_the_weights_once_and_zeros_for_padding(inputs, outputs, dtype):
    linear = plain_layer(inputs, outputs, dtype)
    layer, per_word = PanelLinear(linear), 4 // dtype.itemsize
    panels, words = math.ceil(outputs / PANEL), math.ceil(inputs / per_word / TURN) * TURN
    assert layer.weight.shape == (panels, words, PANEL, per_word) and layer.weight.dtype == dtype
    assert not layer.weight.requires_grad and layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (inputs, outputs)
    assert layer.words.ctypes.data == layer.weight.data_ptr()
    assert layer.words.nbytes == layer.weight.nbytes
    in_rows = layer.weight.transpose(1, 2).reshape(panels * PANEL, words * per_word)
    assert torch.equal(in_rows[:outputs, :inputs], linear.weight)
    assert in_rows.count_nonzero() == linear.weight.count_nonzero()


@needs_panels
def test_several_threads_multiply_at_once(set_threads):
    set_threads(2)
    kinds = [(769, 145, torch.float32), (96, 300, torch.bfloat16), (47, 50, torch.float32)]
    layers = [PanelLinear(plain_layer(*kind)) for kind in kinds]

    def many_times(rows):
        xs = [random_x(rows, inputs, dtype, seed=rows) for inputs, _, dtype in kinds]
        want = [layer(x) for layer, x in zip(layers, xs, strict=True)]

        def work():
            torch.set_num_threads(2)
            for _ in range(30):
                for layer, x, right in zip(layers, xs, want, strict=True):
                    assert torch.equal(layer(x), right)

        return work

    in_threads(many_times(33), many_times(9))


# ---- other processors ----------------------------------------------------------------------------
INNERMOST_LOOP = """
import re, sys
import llvmlite.binding
llvmlite.binding.get_host_cpu_features = lambda: dict.fromkeys(sys.argv[1:], True)
from numba import boolean, float32, uint32
from kernels.linear_cpu import ROWS, TURN, VECTORS, gelu_new_row, multiply
gelu_new_row.compile((float32[::1],))
code = gelu_new_row.inspect_asm(gelu_new_row.signatures[-1])
assert "vdivps" in code, "the activation of one number at a time"
forms = [(float32, float32, "vfmadd", 1), (float32, uint32, "vfmadd", 2)]
if "avx512bf16" in sys.argv:
    forms.append((uint32, uint32, "vdpbf16ps", 1))
for x, word, product, per_word in forms:
    multiply.compile((x[:, ::1], word[:, :, ::1], float32[::1], boolean, float32[:, ::1]))
    code = multiply.inspect_asm(multiply.signatures[-1])
    loop = max(re.split(r"^\\S+:$", code, flags=re.M), key=lambda part: part.count(product))
    assert loop.count(product) == ROWS * VECTORS * TURN * per_word, "products in one turn"
    until_last = loop[: loop.rindex(product)]  # the sums are stored after it
    stored = re.findall(r"vmov\\w+\\s+%[yz]mm\\d+, .*\\(.*", until_last)
    assert len(stored) <= 2, "sums that are stored and loaded again"
print(ROWS, "rows", "zmm" in loop)
"""


@needs_panels
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="about x86 alone")
@pytest.mark.parametrize(
    ("processor", "features", "said"),
    [
        ("haswell", ["avx2", "fma"], "4 rows False"),
        ("skylake-avx512", ["avx2", "fma", "avx512f"], "8 rows True"),
        ("znver4", ["avx2", "fma", "avx512f", "avx512bf16"], "8 rows True"),
    ],
)
def test_sums_stay_in_registers_and_the_activation_takes_a_register_at_once(
    processor, features, said, tmp_path
):
    env = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    assert in_new_process(INNERMOST_LOOP, *features, **env) == said + "\n"


SHORTER = """
import sys
import llvmlite.binding
llvmlite.binding.get_host_cpu_features = lambda: {"avx2": True, "fma": True}
import pytest
sys.exit(pytest.main([*sys.argv[1:], "-q", "-n", "0", "-p", "no:cacheprovider"]))
"""


@needs_panels
@pytest.mark.slow
@pytest.mark.skipif(linear_cpu.LANES == 8, reason="this processor's registers are the shorter ones")
def test_on_a_processor_with_shorter_registers(tmp_path):
    env = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    which = "one_rounding_each or nothing_outside or own_row"
    printed = in_new_process(SHORTER, "tests/kernels/test_linear_cpu.py", "-k", which, **env)
    assert "passed" in printed and "skipped" not in printed


# ---- where it is used ----------------------------------------------------------------------------
@needs_numba
@pytest.mark.parametrize(
    ("name", "has_instruction", "want"),
    [
        ("znver4", True, True),
        ("znver5", True, True),
        ("znver3", False, False),
        ("cooperlake", True, False),  # it multiplies pairs at half of the speed
        ("sapphirerapids", True, False),
    ],
)
def test_pairs_are_multiplied_where_that_takes_no_longer(name, has_instruction, want, monkeypatch):
    features = {"avx512f": True, "avx512bf16": has_instruction}
    present = {name for name, is_present in features.items() if is_present}
    monkeypatch.setattr(linear_cpu, "processor_features", lambda: present)
    monkeypatch.setattr(linear_cpu, "processor_name", lambda: name)
    assert can_multiply_pairs.__wrapped__() == want


@needs_numba
@pytest.mark.parametrize(
    ("features", "has_openmp", "float32", "bfloat16"),
    [
        ({"avx512f": True, "avx512bw": True}, True, True, True),
        ({"sse2": True, "avx2": True, "fma": True}, True, True, True),
        ({"avx512f": True}, False, False, False),
        ({"avx512f": True, "amx-bf16": True}, True, True, False),  # the matrix unit is faster
        ({"avx512f": True, "amx-bf16": False}, True, True, True),
        ({"avx512f": False}, True, False, False),
        ({"avx2": True}, True, False, False),
        ({"fma": True}, True, False, False),
        ({"neon": True}, True, False, False),
        ({}, True, False, False),
    ],
)
def test_panels_need_long_registers_and_openmp(
    features, has_openmp, float32, bfloat16, monkeypatch
):
    present = {name for name, is_present in features.items() if is_present}
    monkeypatch.setattr(linear_cpu, "processor_features", lambda: present)
    monkeypatch.setattr(linear_cpu, "has_openmp_threads", lambda: has_openmp)
    wants = {torch.float32: float32, torch.bfloat16: bfloat16}
    wants |= dict.fromkeys((torch.float64, torch.float16, torch.int8), False)
    for dtype, want in wants.items():
        assert can_use_panels.__wrapped__(dtype) == want
    monkeypatch.setattr(linear_cpu, "HAS_NUMBA", False)
    assert not can_use_panels.__wrapped__(torch.float32)
