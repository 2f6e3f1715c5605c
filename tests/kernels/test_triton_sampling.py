"""The sampler in one GPU kernel against sampling.py: the same u, the same cut, the same tokens.

As in `test_triton_decode.py` the kernel is compiled where there is a GPU and interpreted
where not, and `PAGEDGPT_SEED` chooses other random rows. sampling.py on the CPU is the oracle, and
the kernel is held to the cases of `draws.py` that sampling.py is held to. Only the exponentials of
the two differ, in their last bits. Whether these could decide about a token is computed for each
row (`is_settled`): where they could not, the tokens are equal, and where the tokens differ, they
could.
"""

import math
import random
from dataclasses import replace

import pytest
import torch
from attention_rules import check_compiled
from draws import (
    BELOW_1,
    EACH_CUT,
    EACH_LINE,
    keeping,
    random_pairs,
    row,
    rows_at_many_u,
    rows_of,
)
from worlds import DEVICE, ON_GPU, SEED, needs_gpu, needs_triton

from kernels import triton_sampling as module
from kernels.triton_prefill import HAS_TRITON, tl, triton
from kernels.triton_sampling import (
    TILE,
    cut_and_draw,
    draw_tokens_triton,
    find_peak,
    group_len,
    random_u,
    read_keys,
    row_sizes,
    row_tensors,
    sample_triton,
    weights_of,
)
from sampling import (
    SampleRow,
    SampleRows,
    SamplingParams,
    draw_tokens,
    draw_weights,
    uniform,
)

pytestmark = needs_triton(HAS_TRITON)
GPT2_VOCAB = 50_257
# A weight e^z is right to about |z| / 2**23 of itself here, and to 2**-23 there. Where |z| is large
# there is little weight: no sum of weights, as a share of all, is off by more than this.
BOUND = 2**-19


# ---- rows and their oracle -----------------------------------------------------------------------
def normal(num_rows: int, vocab_size: int, seed: int = 0, size: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * SEED + seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * size


def draw(logits: torch.Tensor, rows: SampleRows | list[SampleRow]) -> list[int]:
    """The kernel's tokens; `logits` is (M, V), or (1, V) for all rows."""
    logits = logits.to(DEVICE).expand(len(rows), -1)
    return draw_tokens_triton(logits, rows)[0].tolist()


def drawn_at_many_u(logits: torch.Tensor, num: int, **params) -> str:
    """The tokens that u = 0.5/num, 1.5/num ... lead to, as one string of digits."""
    return "".join(map(str, draw(logits, rows_at_many_u(num, **params))))


def relative_gap(values: torch.Tensor, at: torch.Tensor) -> float:
    """How near the nearest of the other values is, as a share; ties with `at` are no others."""
    others = values[values != at]
    return ((others - at).abs() / at).min().item() if len(others) and at > 0 else math.inf


def line_of(logits: torch.Tensor, one: SampleRow) -> tuple[torch.Tensor, float]:
    """Where the tokens of a row (V,) end on a line of length 1, and how certain the cut is.

    The exponents are those that both samplers compute, the rest is float64. The second number is
    the distance, as a share, of the nearest weight to min_p, to the k-th weight and to the last one
    in top_p, and of the nearest sum to p: how little would have to be otherwise for another cut.
    """
    p, V = one.params, len(logits)
    scores = logits.float()
    weights = ((scores - scores.max()) / torch.tensor(p.temperature)).double().exp()
    gaps = [math.inf]
    if p.min_p > 0:
        min_p = torch.tensor(p.min_p).double()
        below_1 = weights[weights < 1]  # the most likely token's is exactly 1 on both
        gaps += ((below_1 - min_p).abs() / min_p).tolist()
        weights = weights.where(weights >= min_p, 0)
    ordered, ids = weights.sort(descending=True, stable=True)
    if 0 < p.top_k < V:
        gaps.append(relative_gap(weights, ordered[p.top_k - 1]))
        ordered[p.top_k :] = 0
    if p.top_p < 1:
        sums = ordered.cumsum(0)
        gaps += ((sums[:-1] / sums[-1] - p.top_p).abs()).tolist()
        count = max(1, ((sums - ordered) < p.top_p * sums[-1]).sum().item())
        gaps.append(relative_gap(weights, ordered[count - 1]))
        ordered[count:] = 0
    ends = torch.zeros_like(weights).scatter(0, ids, ordered).cumsum(0)
    return ends / ends[-1], min(gaps)


def u_of(one: SampleRow) -> float:
    return uniform(torch.tensor([one.seed]), torch.tensor([one.position])).item()


def is_settled(logits: torch.Tensor, one: SampleRow) -> bool:
    """Whether no difference within BOUND can lead to another token."""
    if one.params.greedy:
        return True
    ends, gap = line_of(logits, one)
    return min([gap, *(ends[:-1] - u_of(one)).abs().tolist()]) > BOUND


def check(logits: torch.Tensor, rows: list[SampleRow]) -> int:
    """Tokens equal, or proven to be a matter of the last bits. Returns how many of the latter."""
    every = logits.cpu().expand(len(rows), -1)
    there, here = draw_tokens(every, rows)[0].tolist(), draw(logits, rows)
    differ = [i for i in range(len(rows)) if here[i] != there[i]]
    for i in differ:
        assert not is_settled(every[i], rows[i]), (rows[i], here[i], there[i])
        ends, gap = line_of(every[i], rows[i])
        if gap > BOUND:  # the cut is certain: then both are tokens that u nearly lies in
            near = torch.tensor([u_of(rows[i]) - BOUND, u_of(rows[i]) + BOUND], dtype=ends.dtype)
            first, last = torch.searchsorted(ends, near, right=True).tolist()
            assert first <= here[i] <= last and first <= there[i] <= last, (rows[i], here[i])
    return len(differ)


@triton.jit
def u_kernel(seeds, positions, out, NUM: tl.constexpr):
    """NUM numbers of `random_u`."""
    at = tl.program_id(0) * NUM + tl.arange(0, NUM)
    tl.store(out + at, random_u(tl.load(seeds + at), tl.load(positions + at)))


@triton.jit
def weights_kernel(
    logits, temperatures, top_ks, top_ps, min_ps, lists, out,
    vocab_size, SEGMENT_LEN: tl.constexpr,
):  # fmt: skip
    """What the draw goes by: the weights of a row, 0 for the tokens that were cut."""
    i = tl.program_id(0)
    logits, out = logits + i * vocab_size, out + i * vocab_size
    peak, _, peaks, best = find_peak(logits, vocab_size, 1)
    row = (logits, vocab_size, peak, tl.load(temperatures + i), tl.load(min_ps + i), 1)
    top_k, top_p = tl.load(top_ks + i), tl.load(top_ps + i)
    u = tl.full([], 0.5, tl.float32)
    level, _ = cut_and_draw(row, peaks, best, lists + i * TILE, top_k, top_p, u, SEGMENT_LEN)
    for start in range(0, vocab_size, TILE):
        ids = start + tl.arange(0, TILE)
        keys = read_keys(row, ids)
        tl.store(out + ids, tl.where(keys >= level, weights_of(keys), 0.0), ids < vocab_size)


def kernel_weights(logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """`draw_weights` of sampling.py from the kernel's parts: (M, V) on the CPU."""
    logits = logits.to(DEVICE).expand(len(rows), -1).contiguous()
    V, out = logits.shape[1], torch.empty(logits.shape, device=DEVICE)
    _, _, *params = row_tensors(rows, V, logits.device)
    lists = torch.empty(len(rows), TILE.value, dtype=torch.int64, device=DEVICE)
    weights_kernel[(len(rows),)](logits, *params, lists, out, **row_sizes(V), num_warps=8)
    return out.cpu()


def check_weights(logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """The same tokens are kept, with the same weights but for their last bits."""
    here, there = kernel_weights(logits, rows), draw_weights(logits.expand(len(rows), -1), rows)
    tiny = 1e-37  # below, a GPU may say 0
    assert ((here > tiny) == (there > tiny)).all()
    torch.testing.assert_close(here, there, rtol=2e-5, atol=tiny)
    return here


def kept(logits: torch.Tensor, **params) -> list[int]:
    """The tokens that the kernel leaves a weight, the same as sampling.py does."""
    return keeping(check_weights(logits, [row(**params)]))[0]


# ---- u -------------------------------------------------------------------------------------------
NUM_PAIRS = 10_240
EVEN = 64  # tokens of a row in the test of the tokens below


def some_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """NUM_PAIRS seeds and positions, int64, the smallest and the largest among them."""
    seeds, positions = torch.from_numpy(random_pairs(NUM_PAIRS, SEED))
    seeds[:3], positions[:3] = torch.tensor([0, 2**63 - 1, 0]), torch.tensor([0, 2**63 - 1, 1])
    return seeds, positions


def test_u_is_sampling_pys_to_the_last_bit_for_10_000_seeds_and_positions():
    seeds, positions = some_pairs()
    out = torch.empty(NUM_PAIRS, device=DEVICE)
    u_kernel[(10,)](seeds.to(DEVICE), positions.to(DEVICE), out, 1024)
    assert out.cpu().numpy().tobytes() == uniform(seeds, positions).numpy().tobytes()
    assert len(out.unique()) > 10_000


def check_even_rows(num: int) -> None:
    """Of rows whose tokens are equal or impossible no number is rounded: all tokens are the same.

    Weights are 1 or 0, their sums are exact, and so is a u of 24 bits times a sum of 7 bits.
    """
    # Mostly plain ones: a cut takes the interpreter ten times as long as a draw.
    cuts = [{"top_k": 23}, {"top_k": 40, "top_p": 0.375, "min_p": 1}]
    params = [SamplingParams(**some) for some in ({}, {}, {}, {}, cuts[0], {}, {}, {}, {}, cuts[1])]
    seeds, positions = (x[:num].tolist() for x in some_pairs())
    rows = [
        SampleRow(params[i % len(params)], seed, position, [0], 1)
        for i, (seed, position) in enumerate(zip(seeds, positions, strict=True))
    ]
    generator = torch.Generator().manual_seed(SEED)
    logits = torch.full((num, EVEN), 1.5)
    gone = torch.rand(num, EVEN, generator=generator) < 0.25
    logits[1::2][gone[1::2]] = -math.inf
    there, peaks = draw_tokens(logits, rows)
    here, kernel_peaks = draw_tokens_triton(logits.to(DEVICE), rows)
    assert peaks.isfinite().all() and torch.equal(kernel_peaks.cpu(), peaks)
    assert torch.equal(here.cpu(), there)
    # Plain rows of 64 equal tokens: the token is the first 6 bits of u.
    plain = slice(0, num, 10)
    u = uniform(torch.tensor(seeds[plain]), torch.tensor(positions[plain]))
    assert here.cpu()[plain].tolist() == (u * EVEN).long().tolist()
    assert len(there.unique()) > min(num, EVEN) // 2


# All of them on a GPU; interpreted, a row takes hundredths of a second.
MOST = pytest.param(NUM_PAIRS if ON_GPU else 500, marks=[pytest.mark.slow, pytest.mark.gpu])


@pytest.mark.parametrize("num", [40, MOST])
def test_tokens_of_even_rows_are_sampling_pys_whatever_seed_and_position(num):
    check_even_rows(num)


# ---- the draw ------------------------------------------------------------------------------------
@needs_gpu
def test_the_kernels_are_compiled_not_interpreted():
    check_compiled(module, "sample_kernel")


@EACH_LINE
def test_u_leads_along_the_line(line):
    assert drawn_at_many_u(line.logits.float(), len(line.tokens), **line.params) == line.tokens


def test_of_equal_logits_greedy_takes_the_lowest_id():
    assert draw(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), [row(temperature=0)]) == [1]
    tile = TILE.value
    logits = torch.full((3, 3 * tile), -5.0)  # the same lane of several tiles, and other lanes
    logits[0, [7 + tile, 7 + 2 * tile, 8]] = 1.0
    logits[1, [2 * tile, tile + 1, tile + 5]] = 1.0
    assert draw(logits, [row(temperature=0)] * 3) == [8, tile + 1, 0]


def test_a_temperature_below_1e_5_is_greedy_and_1e_5_is_not():
    logits = torch.tensor([[0.0, 1e-6, 0.0]])  # e^-0.1, 1, e^-0.1 at a temperature of 1e-5
    assert drawn_at_many_u(logits, num=5, temperature=0.99e-5) == "11111"
    assert drawn_at_many_u(logits, num=5, temperature=1e-5) == "00122"


def test_an_interval_contains_its_lower_end_and_not_its_upper_end():
    """Equal tokens, whose sums are exact: boundaries at exactly 1/4, 1/2, 3/4, and in a row of
    8,192 at exactly 1/64, where a segment ends, and at 1/64 + 1/8192, inside the next."""
    some_u = [0.0, 0.25 - 2**-24, 0.25, 0.5, BELOW_1]
    assert draw(torch.zeros(1, 4), [row(u) for u in some_u]) == [0, 0, 1, 2, 3]
    some_u = [1 / 64 - 2**-24, 1 / 64, 1 / 64 + 2**-13 - 2**-24, 1 / 64 + 2**-13, BELOW_1]
    assert draw(torch.zeros(1, 8192), [row(u) for u in some_u]) == [127, 128, 128, 129, 8191]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("u", [0.0, 2**-24, 0.5, BELOW_1])
def test_a_token_of_probability_0_is_never_drawn_even_at_the_ends_of_the_line(u, dtype):
    nothing = -math.inf
    logits = torch.tensor([[nothing, nothing, 1.0, nothing, 0.5, 1.5, nothing]], dtype=dtype)
    both = [row(u), row(u, top_k=6, top_p=0.999, min_p=0.001)]
    assert draw(logits, both) == [2 if u < 0.1 else 5] * 2


@pytest.mark.parametrize("num_tiny", [31, 1000], ids=["one segment", "many"])
def test_a_tail_of_tiny_weights_is_added_up_exactly(num_tiny):
    """One token of weight 1, then some of 1.3 / 2**26 each: fp32 sums would not notice them.

    From the end, 2**-24 of a total of little more than 1 is 3.08 tokens: the fourth but last.
    """
    tail = math.log(1.3) - 26 * math.log(2)
    rows = [row(BELOW_1), row(1 - 2 * 2**-24), row(1 - 3 * 2**-24)]
    expected = [num_tiny - 3, num_tiny - 6, num_tiny - 9]
    assert draw(torch.tensor([[0.0] + [tail] * num_tiny]), rows) == expected


# ---- the cut -------------------------------------------------------------------------------------
@EACH_CUT
def test_what_is_left_to_draw_from(cut):
    assert keeping(check_weights(cut.logits.float(), rows_of(cut))) == cut.kept


def test_a_tie_of_thousands_is_cut_at_the_right_id():
    """All weights equal but three: the level is found to its last bit, with the row and without."""
    logits = torch.zeros(1, 5000)
    logits[0, [4000, 4001, 4999]] = 1.0
    for k in (3, 4, 1000, 4002, 4003, 4999):
        ids = kept(logits, top_k=k)
        assert ids == sorted([*range(min(k - 3, 4000)), 4000, 4001, *range(4002, k - 1), 4999])


def test_a_cut_far_below_the_most_likely_token_is_found():
    """One token of weight 1, then 5,000 of 2**-20: the first range of levels is above them."""
    logits = torch.full((1, 5001), -20 * math.log(2))
    logits[0, 7] = 0.0
    assert kept(logits, top_k=3000) == list(range(3000))
    # All weigh 1 + 5000 / 2**20. 4,000 of the 5,000 lift the sum to 1 + 4000 / 2**20.
    p = (1 + 3999.5 / 2**20) / (1 + 5000 / 2**20)
    assert kept(logits, top_p=p) == list(range(4001))
    # In a row that one list could hold, 1,024 tokens are listed too.
    assert kept(logits[:, :1500], top_k=1400) == list(range(1400))


def test_likely_tokens_that_crowd_in_a_few_lanes_are_cut_right():
    """6,000 in 600 lanes of ten: more than a list holds are above the 1,024th peak of a lane."""
    tile = TILE.value
    logits = normal(1, 10 * tile, size=0.1)
    logits.view(10, tile)[:, 600:] -= 2.0
    for params in ({"top_p": 0.01}, {"top_k": 2000, "top_p": 0.02}):
        num_kept = len(kept(logits, **params))
        assert 20 < num_kept < 200


if not ON_GPU:  # only an interpreted kernel can be counted
    WALKS = ("find_peak", "collect", "narrow", "segment_sums")  # each reads a row once

    @pytest.mark.parametrize(
        "params, walks",
        [
            ({"temperature": 0}, ["find_peak"]),
            ({"temperature": 0.7}, ["find_peak", "segment_sums"]),
            ({"top_k": 50}, ["find_peak", "collect"]),
            ({"top_p": 0.9}, ["find_peak", "collect"]),
            ({"top_k": 50, "top_p": 0.9}, ["find_peak", "collect"]),
            # Of 7,000 tokens no list tells enough.
            (
                {"temperature": 2.0, "top_p": 0.9},
                "find_peak collect narrow narrow narrow collect segment_sums".split(),
            ),
        ],
        ids=str,
    )
    def test_most_rows_are_read_twice(params, walks, monkeypatch):
        """GPT-2's vocabulary; 0.9 of the weight are about 600 tokens."""
        seen = []
        for name in WALKS:
            walk = getattr(module, name)

            def counted(*args, name=name, walk=walk):
                seen.append(name)
                return walk(*args)

            monkeypatch.setattr(module, name, counted)
        draw(normal(1, GPT2_VOCAB, size=3.5), [row(**params)])
        assert seen == walks


# ---- any row -------------------------------------------------------------------------------------
CHOICES = {
    "temperature": [0.0, 1e-5, 0.4, 1.0, 1.0, 1.7, 30.0],
    "top_k": [0, 0, -1, 1, 2, 3, 5, 50, 10_000],
    "top_p": [1.0, 1.0, 1e-9, 0.05, 0.31, 0.57, 0.83, 0.97],
    "min_p": [0.0, 0.0, 0.07, 0.43, 1.0],
}


def random_row(choose: random.Random) -> SampleRow:
    params = {name: choose.choice(values) for name, values in CHOICES.items()}
    seed, position = choose.randrange(2**63), choose.randrange(2**12)
    return SampleRow(SamplingParams(**params), seed, position, [0], 1)


def random_logits(choose: random.Random, vocab_size: int) -> list[float]:
    """Multiples of 1/8, so that ties are frequent, and some -inf, but not all."""
    logits = [choose.randrange(-24, 25) / 8 for _ in range(vocab_size)]
    for i in choose.choices(range(1, vocab_size), k=choose.choice([0, 0, 1, vocab_size // 2])):
        logits[i] = -math.inf
    return logits


def check_random_rows(num: int, vocab_size: int) -> None:
    """`num` rows of all kinds in one call: the same tokens, and the same cuts."""
    choose = random.Random(SEED * 100 + vocab_size)
    rows = [random_row(choose) for _ in range(num)]
    logits = torch.tensor([random_logits(choose, vocab_size) for _ in range(num)])
    num_close = check(logits, rows)
    assert num_close <= 1 + num // 20
    settled = [i for i in range(num) if is_settled(logits[i], rows[i])]
    assert len(settled) > num // 2, "or this says little about what is cut"
    drawn = [i for i in settled if not rows[i].params.greedy]
    check_weights(logits[drawn], [rows[i] for i in drawn])


@pytest.mark.parametrize("vocab_size", [pytest.param(7, marks=pytest.mark.oracle), 100, 2_500])
def test_random_rows_of_all_kinds_in_one_call(vocab_size):
    # The interpreter takes its time.
    check_random_rows(200 if ON_GPU else 24 if vocab_size < 1000 else 12, vocab_size)


@needs_gpu
@pytest.mark.parametrize("vocab_size", [5, 6, 8, 65, 99, 128])
def test_a_thousand_random_rows_of_small_vocabularies(vocab_size):
    """What Hypothesis searches where kernels are interpreted: rows so short that all is at an edge.

    The sizes are those that the kernels are compiled for already, for 7 and for 100.
    """
    check_random_rows(1000, vocab_size)


if not ON_GPU:  # where Hypothesis may be missing, and a test that is skipped counts as failed

    def test_hypothesis_finds_no_row_that_is_cut_or_drawn_otherwise():
        from hypothesis import assume, given, settings
        from hypothesis import strategies as st

        eighths = st.integers(-25, 24)  # of 1/8, so that ties are frequent; -25 stands for -inf
        some_params = st.fixed_dictionaries({k: st.sampled_from(v) for k, v in CHOICES.items()})

        @settings(max_examples=40, deadline=None, database=None)
        @given(
            numbers=st.lists(eighths, min_size=0, max_size=40),
            last=st.integers(-24, 24),
            params=some_params,
            seed=st.integers(0, 2**63 - 1),
            position=st.integers(0, 4096),
        )
        def search(numbers, last, params, seed, position):
            values = [-math.inf if x == -25 else x / 8 for x in numbers] + [last / 8]
            logits = torch.tensor([values])
            one = SampleRow(SamplingParams(**params), seed, position, [0], 1)
            assume(is_settled(logits[0], one))
            assert check(logits, [one]) == 0
            if not one.params.greedy:
                check_weights(logits, [one])

        search()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_gpt2s_vocabulary_draw_what_sampling_py_draws(dtype):
    """In 16 bits, of 50,257 tokens thousands are tied: the cut has to look at ids."""
    some = [
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 50},
        {"temperature": 1.3, "top_p": 0.5, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 1000, "top_p": 0.95},
    ]
    rows = [SampleRow(SamplingParams(**p), 11, i, [0], 1) for i, p in enumerate(some)]
    logits = normal(4, GPT2_VOCAB).to(dtype)
    check(logits, rows)
    settled = [i for i in (1, 3) if is_settled(logits[i], rows[i])]
    assert settled, "or this says little about what is cut"
    check_weights(logits.float()[settled], [rows[i] for i in settled])


def test_u_beside_the_end_of_a_token_draws_that_token_below_and_the_next_one_above():
    """Six of GPT-2's vocabulary, whose ends are approached to within the bound."""
    logits = normal(1, GPT2_VOCAB)
    ends, _ = line_of(logits[0], row())
    is_wide = ends.diff(prepend=ends.new_zeros(1)) > 4 * BOUND
    wide = (is_wide[:-1] & is_wide[1:]).nonzero().flatten().tolist()[100:106]
    rows = [row(ends[t].item() + side) for t in wide for side in (-BOUND, BOUND + 2**-24)]
    assert len(wide) == 6
    assert draw(logits, rows) == [t + later for t in wide for later in (0, 1)]


# ---- extremes ------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1e-5, 1e6])
def test_extreme_logits_and_temperatures_keep_all_numbers_finite(temperature):
    logits = torch.tensor([[1e4, -1e4, 9999.0, -math.inf, 3e38, -3e38], [1, 1, 1, 1, 1, 1]])
    rows = [row(BELOW_1, temperature=temperature), row(0.5, temperature=temperature)]
    weights = check_weights(logits, rows)
    assert weights.isfinite().all() and weights.max() == 1
    assert draw(logits, rows) == [4, 3]


def test_half_precision_logits_are_computed_in_fp32():
    logits = torch.zeros(1, 4096, dtype=torch.bfloat16)  # a bf16 sum of ones stops at 256
    assert draw(logits, [row(0.75)]) == [3072]
    assert draw(logits.half(), [row(BELOW_1)]) == [4095]


# ---- a row is drawn by itself --------------------------------------------------------------------
def test_a_row_draws_the_same_token_alone_in_any_order_and_beside_any_others():
    choose, num = random.Random(SEED), 20
    rows, logits = [random_row(choose) for _ in range(num)], normal(num, 100)
    together = draw(logits, rows)
    assert len(set(together)) > 8  # or this proves nothing
    assert [draw(logits[i : i + 1], rows[i : i + 1])[0] for i in range(num)] == together
    order = random.Random(1).sample(range(num), 9)
    assert draw(logits[order], [rows[i] for i in order]) == [together[i] for i in order]


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_something_larger_are_drawn_in_place(dtype, first):
    """Every second row of a padded vocabulary; what lies beside the rows is NaN.

    Rows that begin at multiples of 16 bytes are read 16 bytes at a time.
    """
    choose = random.Random(SEED)
    rows = [random_row(choose) for _ in range(6)]
    logits = normal(6, 333).to(dtype)
    larger = torch.full((12, 512), math.nan, dtype=dtype)
    larger[::2, first : first + 333] = logits
    view = larger.to(DEVICE)[::2, first : first + 333]
    assert group_len(view) == (1 if first else 16 // dtype.itemsize)
    before = view.clone()
    assert draw_tokens_triton(view, rows)[0].tolist() == draw(logits, rows)
    assert torch.equal(view, before), "the logits are only read"


def test_a_bias_and_penalties_are_applied_before_the_launch():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    rows = [
        SampleRow(SamplingParams(temperature=0, logit_bias={2: 1.5}), 0, 1, [0], 1),
        SampleRow(SamplingParams(temperature=0, presence_penalty=2.0), 0, 3, [0, 1, 1], 1),
    ]
    assert draw(logits, rows) == [2, 2] == draw_tokens(logits, rows)[0].tolist()


def test_the_ids_and_the_peaks_go_into_the_tensors_that_are_given():
    logits = torch.tensor([[1.0, 5.0], [7.0, 2.0]], device=DEVICE)
    tensors = row_tensors([row(temperature=0), row(0.0)], 2, logits.device)
    out, peaks = torch.tensor([9, 9], device=DEVICE), torch.zeros(2, device=DEVICE)
    assert sample_triton(logits, *tensors, out=out, peaks=peaks) is out
    assert out.tolist() == [1, 0] and peaks.tolist() == [5.0, 7.0]
    assert sample_triton(logits, *tensors).tolist() == [1, 0]


def test_rows_that_are_kept_from_step_to_step_draw_at_their_new_positions():
    """The other tensors of the rows are made once."""
    params = [{}, {"temperature": 0}, {"temperature": 0.5, "top_k": 20}, {"top_p": 0.6}]
    kept = SampleRows([SampleRow(SamplingParams(**p), 7, 3, [0], 1) for p in params])
    texts = []
    for step in range(4):
        logits = normal(4, 50, seed=step)
        expected = draw_tokens(logits, [replace(each) for each in kept.rows])[0].tolist()
        texts.append(draw(logits, kept))
        assert texts[-1] == expected
        for each in kept.rows:
            each.position += 1
    assert len(set(map(tuple, texts))) == 4 and len(kept.kept) == 1


def test_p_in_32_bits_is_taken_as_it_is():
    """0.3 in 32 bits is 0.30000001: of ten equal tokens a fourth is needed."""
    logits = torch.zeros(2, 10, device=DEVICE)
    tensors = row_tensors([row(BELOW_1, top_p=0.3)] * 2, 10, logits.device)
    assert sample_triton(logits, *tensors).tolist() == [2, 2]
    tensors[4] = tensors[4].float()
    assert sample_triton(logits, *tensors).tolist() == [3, 3]


# ---- rows without an answer, and calls that are refused ------------------------------------------
@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
def test_a_row_without_an_answer_shows_in_its_peak_and_disturbs_no_other(params):
    """NaN, +inf or nothing but -inf: the token is the first such id, so it is one of the model."""
    broken = [[1, math.nan, 2], [math.nan] * 3, [1, 2, math.inf], [-math.inf] * 3]
    logits = torch.tensor([[1.0, 5.0, 1.0], *broken, [6.0, -9.0, -9.0]], device=DEVICE)
    token_ids, peaks = draw_tokens_triton(logits, [row(**params)] * 6)
    assert peaks.isfinite().tolist() == [True, False, False, False, False, True]
    assert token_ids.tolist() == [1, 1, 0, 2, 0, 0]


LOGITS = torch.zeros(2, 5)


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("logits", lambda x: x.double(), r"logits are torch.float64 \(2, 5\): they must be"),
        ("logits", lambda x: x[0], r"logits are torch.float32 \(5,\): they must be \(rows, tokens"),
        ("logits", lambda x: x[:, :0], r"logits are torch.float32 \(2, 0\): they must be"),
        ("logits", lambda x: x.new_zeros(2, 2**20 + 1), r"\(2, 1048577\): they .* at most"),
        ("logits", lambda x: x.long(), "must all be of one type of"),
        ("logits", lambda x: x.t().contiguous().t(), "logits has strides .*: the last one must"),
        ("seeds", lambda x: x.int(), r"seeds is torch.int32 \(2,\) .*: it must be torch.int64"),
        ("positions", lambda x: x[:1], r"positions is torch.int64 \(1,\) .*: it must be .* \(2,\)"),
        ("temperatures", lambda x: x.double(), "temperatures is torch.float64"),
        ("top_ks", lambda x: x.long(), "top_ks is torch.int64"),
        ("top_ps", lambda x: x.half(), "it must be torch.float64 or torch.float32"),
        ("min_ps", lambda x: x[:1].expand(2), r"with strides \(0,\) on .*: it must be .* contig"),
        ("min_ps", lambda x: x.to("meta"), "on meta: it must be"),
        ("out", lambda x: torch.zeros(2), "out is torch.float32"),
        ("peaks", lambda x: torch.zeros(3), r"peaks is torch.float32 \(3,\)"),
    ],
)
def test_tensors_that_cannot_be_meant_are_refused_in_one_sentence(name, change, words):
    names = ("seeds", "positions", "temperatures", "top_ks", "top_ps", "min_ps")
    tensors = dict(zip(names, row_tensors([row()] * 2, 5, torch.device(DEVICE)), strict=True))
    arguments = {"logits": LOGITS.to(DEVICE), **tensors, "out": None, "peaks": None}
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=words) as refusal:
        sample_triton(**arguments)
    assert "\n" not in str(refusal.value)


# ---- only a GPU can say --------------------------------------------------------------------------
@needs_gpu
def test_a_hundred_runs_give_the_same_tokens():
    choose = random.Random(SEED)
    rows, logits = [random_row(choose) for _ in range(256)], normal(256, GPT2_VOCAB).to(DEVICE)
    tensors = row_tensors(rows, GPT2_VOCAB, logits.device)
    first = sample_triton(logits, *tensors)
    for _ in range(100):
        assert torch.equal(sample_triton(logits, *tensors), first)


@needs_gpu
def test_nothing_waits_for_the_device():
    logits = normal(8, GPT2_VOCAB).to(DEVICE)
    tensors = row_tensors([row(top_k=9, top_p=0.9)] * 8, GPT2_VOCAB, logits.device)
    out = sample_triton(logits, *tensors)  # compiled before the watch begins
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample_triton(logits, *tensors, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_recorded_graph_draws_from_what_lies_in_its_tensors_when_it_is_replayed():
    logits = normal(4, GPT2_VOCAB).to(DEVICE)
    rows = [row(0.3), row(temperature=0), row(0.6, top_k=40), row(0.9, top_p=0.8)]
    tensors = row_tensors(rows, GPT2_VOCAB, logits.device)
    out, peaks = torch.zeros(4, dtype=torch.int64, device=DEVICE), torch.zeros(4, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile before recording
        sample_triton(logits, *tensors, out=out, peaks=peaks)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_triton(logits, *tensors, out=out, peaks=peaks)
    for seed in (1, 2, 3):
        logits.copy_(normal(4, GPT2_VOCAB, seed=seed))
        tensors[1] += 1  # the next positions
        graph.replay()
        assert torch.equal(out, sample_triton(logits, *tensors))
        assert torch.equal(peaks, logits.amax(1))


@needs_gpu
def test_rows_beyond_two_to_the_31_elements():
    num = 2**31 // GPT2_VOCAB + 2
    logits = torch.zeros(num, GPT2_VOCAB, dtype=torch.float16, device=DEVICE)
    logits[-1, 777] = logits[-2, 50_000] = 9.0
    tensors = row_tensors([row(temperature=0)], GPT2_VOCAB, logits.device)
    drawn = sample_triton(logits, *(x.repeat(num) for x in tensors))
    assert drawn[-2:].tolist() == [50_000, 777] and drawn[:-2].max() == 0
