"""A linear layer for few rows against the same in float64: every option, every size of GPT-2.

As in `test_triton_prefill.py` the kernel is compiled where there is a GPU and interpreted
where not. The memory beside the inputs is NaN, and the memory after the result must stay NaN.
"""

import math

import pytest
import torch
from attention_rules import check_compiled
from worlds import DEVICE, DTYPES, EACH_DTYPE, ON_GPU, SEED, needs_gpu, needs_triton, some

from kernels import triton_small_linear as module
from kernels.triton_prefill import HAS_TRITON, INTERPRETED
from kernels.triton_small_linear import linear_tiles, plain_small_linear, small_linear

pytestmark = needs_triton(HAS_TRITON)
OPTIONS = ["", "norm", "gelu", "residual", "norm gelu", "norm residual", "gelu residual"]
OPTIONS += ["norm gelu residual"]


# ---- inputs and their oracle ---------------------------------------------------------------------
def beside_nan(values, dtype, columns=3):
    """The values on the device, in the upper left of a larger tensor full of NaN."""
    N, C = values.shape
    around = torch.full((N + 2, C + columns), math.nan, dtype=dtype, device=DEVICE)
    around[:N, :C] = values.to(dtype)
    return around[:N, :C]


class Call:
    """Random inputs of one call, drawn on the CPU, so that a seed means the same everywhere."""

    def __init__(self, rows, IN, OUT, dtype, names="", seed=0, offset=0.0):
        generator = torch.Generator().manual_seed(1000 * SEED + seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.x = beside_nan(normal(rows, IN) + offset, dtype)
        self.weight = beside_nan(normal(OUT, IN) / math.sqrt(IN), dtype)
        self.bias = normal(OUT).to(dtype).to(DEVICE)
        norm = normal(IN).to(dtype).to(DEVICE), normal(IN).to(dtype).to(DEVICE), 1e-5
        options = {"norm": norm, "gelu": True, "residual": beside_nan(normal(rows, OUT), dtype)}
        self.options = {name: options[name] for name in names.split()}

    def run(self, function=small_linear):
        return function(self.x, self.weight, self.bias, **self.options)

    def expected(self):
        """(rows, out) in float64, from the very numbers that the kernel gets; and a bound.

        u is half the distance from 1 to the next number in 32 bits (or 64, for such inputs). A sum
        of K products makes K roundings, each at most u of the sum of their absolute values; of
        random sign they add up like sqrt(K), and four times that is not seen. A norm is right to a
        few u of each number that goes into it, and so is a GELU, whose slope is at most 1.13. At
        last the result is rounded to its type: half an eps, or, where bfloat16 is interpreted, a
        whole one, since the interpreter cuts the bits off.
        """
        u = 2.0**-53 if self.x.dtype == torch.float64 else 2.0**-24
        x, weight, bias = self.x.double(), self.weight.double(), self.bias.double()
        options = dict(self.options)
        magnitude = x.abs()
        if "norm" in options:
            gain, shift, eps = options["norm"]
            gain, shift = gain.double(), shift.double()
            options["norm"] = gain, shift, eps
            mean, rstd = (
                x.mean(1, keepdim=True),
                (x.var(1, keepdim=True, correction=0) + eps) ** -0.5,
            )
            magnitude = gain.abs() * (x.abs() + mean.abs()) * rstd + shift.abs()
        K = x.shape[1]
        bound = (4 * math.sqrt(K) + 16) * u * (magnitude @ weight.abs().t() + bias.abs())
        if "gelu" in options:
            z = plain_small_linear(x, weight, bias, norm=options.get("norm"))
            bound = 1.13 * bound + 16 * u * (1 + z.abs())
        if "residual" in options:
            options["residual"] = options["residual"].double()
        want = plain_small_linear(x, weight, bias, **options)
        cut = INTERPRETED and self.x.dtype == torch.bfloat16
        half_eps = torch.finfo(self.x.dtype).eps / 2
        return want, bound + (1 + cut) * half_eps * (want.abs() + bound)

    def check(self):
        got, (want, bound) = self.run(), self.expected()
        assert got.dtype == self.x.dtype and got.shape == want.shape and got.is_contiguous()
        error = (got.double() - want).abs()
        assert (error <= bound).all(), f"error {error.max():.2e}, bound {bound.max():.2e}"
        return got


@pytest.fixture
def watched(monkeypatch):
    """Results lie in the first rows of larger memory full of NaN; returns the rest of it."""
    beyond = []

    def empty(rows, columns, **kwargs):
        around = torch.full((rows + 17, columns), math.nan, **kwargs)
        beyond.append(around[rows:])
        return around[:rows]

    monkeypatch.setattr(module.torch, "empty", empty)
    return beyond


# ---- by hand -------------------------------------------------------------------------------------
def numbers(*values):
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


# e^(-2u) of -30 is more than 32 bits hold: infinity, and the GELU 0, which it is.
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_gelu_is_the_tanh_form_and_comes_before_the_residual():
    x, weight, bias = numbers([1]), numbers([1], [-1], [0], [30], [-30]), numbers(0, 0, 0, 0, 0)
    want = [0.8411920, -0.1588080, 0.0, 30.0, 0.0]  # erf's would be 0.8413447 and -0.1586553
    assert small_linear(x, weight, bias, gelu=True)[0].tolist() == pytest.approx(want, abs=2e-6)
    residual = numbers([1, 1, 1, 1, 1])
    got = small_linear(x, weight, bias, gelu=True, residual=residual)
    assert got[0].tolist() == pytest.approx([value + 1 for value in want], abs=2e-6)


# ---- every option, size and type -----------------------------------------------------------------
@pytest.mark.oracle
def test_two_rows_with_all_options():
    Call(2, 48, 72, torch.float32, OPTIONS[-1]).check()


@pytest.mark.parametrize("names", OPTIONS, ids=lambda names: names or "plain")
@EACH_DTYPE
def test_two_rows_with_every_combination_of_options(names, dtype):
    Call(2, 48, 72, dtype, names, seed=len(names)).check()


@pytest.mark.parametrize("rows, dtype", some(64 if ON_GPU else 24, range(1, 17), DTYPES), ids=str)
def test_every_number_of_rows(rows, dtype, watched):
    Call(rows, 64, 37, dtype, "gelu residual", seed=rows).check()
    assert all(rest.isnan().all() for rest in watched) and len(watched) == 1


@pytest.mark.parametrize(
    "rows, IN, dtype",
    some(12 if not ON_GPU else 80, [1, 2, 7, 16], [48, 64, 768, 1600, 3072], DTYPES),
    ids=str,
)
def test_as_many_inputs_as_a_layer_has_in_any_gpt2(rows, IN, dtype):
    """As many outputs too where they are few: the interpreter takes its programs one by one."""
    names = "norm gelu" if rows <= 2 else "gelu residual"
    Call(rows, IN, 4 * IN if ON_GPU or IN < 64 else 20, dtype, names).check()


@pytest.mark.parametrize(
    "rows, IN, OUT, dtype",
    some(16 if not ON_GPU else 60, [1, 2, 3, 9], [1, 5, 17, 100, 257], [1, 3, 50, 97], DTYPES),
    ids=str,
)
def test_odd_sizes(rows, IN, OUT, dtype, watched):
    names = "norm gelu residual" if rows <= 2 else "gelu residual"
    Call(rows, IN, OUT, dtype, names).check()
    assert watched[0].isnan().all()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_norm_of_rows_far_from_zero_keeps_its_digits(rows):
    """Around 1,000 the squares are a million, and the variance is 1: 32 bits hold 7 digits.

    The mean is right to a step or two of 32-bit numbers there, 6e-5. That moves all inputs alike,
    and an output by so much times a sum of weights, a few at most.
    """
    call = Call(rows, 768, 8, torch.float32, "norm", offset=1000.0)
    want, _ = call.expected()
    assert (call.run() - want).abs().max() < 1e-3 and want.abs().max() > 0.5


@EACH_DTYPE
def test_no_rows_are_an_empty_result(dtype):
    for names in ("", "norm gelu", "residual"):
        got = Call(0, 48, 72, dtype, names).run()
        assert got.shape == (0, 72) and got.dtype == dtype


# ---- rows do not meet ----------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_gives_the_same_bits_in_any_batch_of_its_size(dtype):
    """9 to 16 rows are one tile: the other rows in it make no difference."""
    call = Call(16, 64, 24, dtype, "gelu")
    together = call.run()
    order = torch.arange(16).flip(0)
    turned = small_linear(call.x[order.to(DEVICE)], call.weight, call.bias, gelu=True)
    assert torch.equal(turned.flip(0), together)
    nine = small_linear(call.x[:9], call.weight, call.bias, gelu=True)
    assert torch.equal(nine, together[:9])


@EACH_DTYPE
@pytest.mark.parametrize("rows, names", [(2, "norm"), (5, "gelu")])
def test_a_nan_in_one_row_stays_there(rows, names, dtype):
    call = Call(rows, 48, 24, dtype, names)
    before = call.run()
    call.x[1, 7] = math.nan
    after = call.run()
    assert after[1].isnan().all()
    others = [row for row in range(rows) if row != 1]
    assert torch.equal(after[others], before[others]) and not before.isnan().any()


def test_more_rows_than_few_are_refused():
    call = Call(17, 8, 4, torch.float32)
    with pytest.raises(ValueError, match="x has 17 rows, at most 16 are few: use F.linear"):
        call.run()
    call = Call(3, 8, 4, torch.float32, "norm")
    with pytest.raises(ValueError, match="x has 3 rows, at most 2 are few with a norm in front"):
        call.run()


# ---- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": (2, 7)}, r"x is \(2, 7\) and weight \(4, 8\): they must be \(rows, in\)"),
        ({"x": (8,)}, r"x is \(8,\) and weight"),
        ({"weight": (4, 8, 1)}, r"weight \(4, 8, 1\)"),
        ({"bias": (8,)}, r"bias is \(8,\): it must be \(4,\)"),
        ({"residual": (1, 4)}, r"residual is \(1, 4\): it must be \(2, 4\)"),
        ({"norm": (4,)}, r"norm weight is \(4,\): it must be \(8,\)"),
    ],
)
def test_sizes_that_do_not_belong_together_are_refused(changes, message):
    shapes = {"x": (2, 8), "weight": (4, 8), "bias": (4,)} | changes
    given = {name: torch.ones(shape, device=DEVICE) for name, shape in shapes.items()}
    if "norm" in given:
        given["norm"] = given["norm"], torch.ones(8, device=DEVICE), 1e-5
    with pytest.raises(ValueError, match=message):
        small_linear(**given)


# ---- how the work is cut -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_rows_makes_five_variants_and_three_rows_of_16_bits_use_tensor_cores(dtype):
    tiles = [linear_tiles(rows, 768, 2304, dtype) for rows in range(1, 17)]
    different = [new for old, new in zip([None, *tiles], tiles) if new != old]
    assert [new["ROWS"] for new in different] == [1, 2, 4, 8, 16]
    assert [new["DOT"] for new in tiles] == [False] * 2 + [dtype.itemsize == 2] * 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_tiles_are_powers_of_two_three_pieces_at_least_and_their_sums_fit_into_registers(dtype):
    for rows in range(1, 17):
        for IN, OUT in ((1, 1), (48, 96), (768, 768), (1600, 6400), (6400, 1600)):
            tiles = linear_tiles(rows, IN, OUT, dtype)
            sizes = [tiles[name] for name in ("ROWS", "TILE_OUT", "TILE_IN", "TILE_ROW")]
            assert all(size & (size - 1) == 0 for size in sizes) and tiles["TILE_ROW"] >= IN
            assert tiles["ROWS"] >= rows and tiles["TILE_IN"] >= 16
            if IN >= 48:  # while one piece of the weights is multiplied, two are on their way
                assert -(-IN // tiles["TILE_IN"]) >= 3
            if not tiles["DOT"]:
                each = tiles["ROWS"] * tiles["TILE_OUT"] * tiles["TILE_IN"] // 128
                assert each * max(1, dtype.itemsize // 4) <= 64  # registers of 32 bits


# ---- only a GPU can say --------------------------------------------------------------------------
@needs_gpu
def test_the_kernel_is_compiled_not_interpreted():
    check_compiled(module, "small_linear_kernel")


@needs_gpu
@pytest.mark.parametrize(
    "C, dtype", [(768, torch.bfloat16), (768, torch.float16), (1600, torch.bfloat16)], ids=str
)
def test_every_number_of_rows_in_gpt2s_shapes(C, dtype):
    for rows in range(1, 17):
        norm = "norm" if rows <= 2 else ""
        Call(rows, C, 3 * C, dtype, norm, seed=rows).check()
        Call(rows, C, C, dtype, "residual", seed=rows).check()
        Call(rows, C, 4 * C, dtype, f"{norm} gelu", seed=rows).check()
        Call(rows, 4 * C, C, dtype, "residual", seed=rows).check()


@needs_gpu
@pytest.mark.parametrize("rows", [1, 2, 4, 16])
def test_a_thousand_runs_give_the_same_bits(rows):
    call = Call(rows, 768, 3072, torch.bfloat16, "norm gelu" if rows <= 2 else "gelu")
    first, same = call.check(), torch.ones((), dtype=torch.bool, device=DEVICE)
    for _ in range(1000):
        same.logical_and_((call.run() == first).all())
    assert same.item()


@needs_gpu
def test_another_number_of_rows_compiles_nothing_new():
    """5 to 8 rows are one variant, though Triton makes others for multiples of 16, and for 1."""
    call, caches = Call(16, 768, 768, torch.bfloat16), module.small_linear_kernel.device_caches

    def variants(counts):
        for rows in counts:
            small_linear(call.x[:rows], call.weight, call.bias)
        return sum(len(kernels[0]) for kernels in caches.values())

    assert variants([5]) == variants([6, 7, 8]) < variants([9]) == variants([10, 15, 16])


def launched_by(call):
    """Names of what a GPU is asked to do in one call, copies included."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):  # whatever compiles, compiles now
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return [event.name for event in profiler.events() if event.device_type == on_gpu]


@pytest.mark.alone
@needs_gpu
def test_a_call_is_one_launch():
    call = Call(2, 768, 3072, torch.bfloat16, "norm gelu residual")
    assert len(launched_by(call.run)) == 1
