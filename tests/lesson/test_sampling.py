"""sampling.py: from one row of logits to one token, and a number that depends on nothing else.

Most tests choose u, the random number of the draw. How that is done, and the cases that the GPU's
kernel is held to as well, stand in `draws.py`.
"""

import math
import random
from collections import Counter
from dataclasses import FrozenInstanceError, asdict, replace

import numpy as np
import pytest
import torch
from draws import (
    BELOW_1,
    EACH_CUT,
    EACH_LINE,
    KNOWN_U,
    keeping,
    position_where_u_is,
    random_pairs,
    row,
    rows_at_many_u,
    rows_of,
    shares_to_logits,
)

import sampling
from sampling import (
    Logprob,
    SampleRow,
    SampleRows,
    SamplingParams,
    child_seed,
    collect_logprobs,
    draw_tokens,
    draw_weights,
    edit_logits,
    hash32,
    prompt_logprobs,
    sample,
    uniform,
)


def seeded(seed: int, position: int, **params) -> SampleRow:
    return SampleRow(SamplingParams(**params), seed, position, [0], 1)


def draw(logits: torch.Tensor, **kwargs) -> int:
    return sample(logits, [row(**kwargs)])[0].item()


def allowed(logits: torch.Tensor, rows: list[SampleRow]) -> list[list[int]]:
    """The tokens that have a weight in the draw, of each row."""
    logits = logits.expand(len(rows), -1)
    return keeping(draw_weights(edit_logits(logits, rows), rows))


# ---- The concept ---------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@EACH_LINE
def test_u_leads_along_the_line(line, dtype):
    num = len(line.tokens)
    rows = rows_at_many_u(num, **line.params)
    token_ids = sample(line.logits.to(dtype).expand(num, -1), rows)[0].tolist()
    assert "".join(map(str, token_ids)) == line.tokens


def test_an_interval_contains_its_lower_end_and_not_its_upper_end():
    logits = torch.zeros(1, 4)  # four equal tokens: boundaries at exactly 0.25, 0.5, 0.75
    assert draw(logits, u=0.0) == 0
    assert draw(logits, u=0.25 - 2**-24) == 0
    assert draw(logits, u=0.25) == 1
    assert draw(logits, u=0.5) == 2
    assert draw(logits, u=BELOW_1) == 3


def test_a_temperature_below_1e_5_is_greedy_and_1e_5_is_not():
    assert SamplingParams(temperature=0.99e-5).greedy
    assert not SamplingParams(temperature=1e-5).greedy


# ---- Cutting the tail ----------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@EACH_CUT
def test_what_is_left_to_draw_from(cut, dtype):
    logits = cut.logits.to(dtype)
    assert [allowed(logits, [one])[0] for one in rows_of(cut)] == cut.kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@EACH_CUT
def test_rows_of_other_cuts_leave_a_row_its_own(cut, dtype):
    """All parameters of a case in one call: those that cut nothing beside those that do."""
    rows = rows_of(cut)
    assert allowed(cut.logits.to(dtype), rows) == cut.kept
    assert allowed(cut.logits.to(dtype), rows[::-1]) == cut.kept[::-1]


# ---- Editing the logits --------------------------------------------------------------------------
REPEATED = {"prompt": [0, 0, 1], "output": [1, 2, 2, 2]}
EDITS = {  # (logits, the row, edited logits)
    "logit_bias is added": (
        [1.0, 3.0, 2.0],
        {"logit_bias": {0: 0.5, 2: -4}},
        [1.5, 3.0, -2.0],
    ),
    "a bias keeps all digits of float64": ([0.0, 0.0], {"logit_bias": {1: 0.1}}, [0.0, 0.1]),
    "min_tokens holds EOS back even when EOS is ignored, and when it is a stop token too": (
        [1.0, 9.0],
        {"min_tokens": 1, "eos": (1,), "ignore_eos": True, "stop_token_ids": [1]},
        [1.0, -math.inf],
    ),
    "min_tokens outweighs a bias": (
        [0.0, 0.0],
        {"min_tokens": 1, "eos": (1,), "logit_bias": {1: 100, 0: 1}},
        [1.0, -math.inf],
    ),
    "the frequency penalty counts the output only": (
        [4.0, 4.0, 4.0, 4.0],
        REPEATED | {"frequency_penalty": 0.5},
        [4.0, 3.5, 2.5, 4.0],
    ),
    "the presence penalty asks only whether the output has it": (
        [4.0, 4.0, 4.0, 4.0],
        REPEATED | {"presence_penalty": 0.5},
        [4.0, 3.5, 3.5, 4.0],
    ),
    "the repetition penalty divides a positive and multiplies a negative logit": (
        [4.0, -4.0, 0.0, 6.0, 6.0],
        {"prompt": [0, 2], "output": [1, 3, 3], "repetition_penalty": 2},
        [2.0, -8.0, 0.0, 3.0, 6.0],
    ),
    "bias, then repetition, then the others: (-1 + 3) / 2 - 0.25 - 0.5": (
        [-1.0, 0.0],
        {
            "prompt": [],
            "output": [0],
            "logit_bias": {0: 3},
            "repetition_penalty": 2,
            "frequency_penalty": 0.25,
            "presence_penalty": 0.5,
        },
        [0.25, 0.0],
    ),
}


@pytest.mark.parametrize("logits, fields, expected", EDITS.values(), ids=EDITS)
def test_logits_are_edited(logits, fields, expected):
    logits = torch.tensor([logits, logits], dtype=torch.float64)
    edited = edit_logits(logits, [row(**fields), row()])
    assert edited.tolist() == [expected, logits[1].tolist()]  # and the next row is left alone


def test_eos_and_stop_tokens_cannot_come_before_min_tokens():
    logits = torch.tensor([[1.0, 9.0, 8.0, 7.0, 8.5]])
    params = {"temperature": 0, "min_tokens": 2, "stop_token_ids": [2], "eos": (1, 4)}
    assert [draw(logits, output=[0] * n, **params) for n in range(4)] == [3, 3, 1, 1]


def test_nothing_is_copied_when_nothing_is_edited():
    logits = torch.randn(2, 5)
    assert edit_logits(logits, [row(), row(temperature=0, min_tokens=3)]) is logits


# ---- A random number without a state -------------------------------------------------------------
def test_u_is_a_function_of_seed_and_position_and_these_are_its_values():
    """Pinned: a change of the hash changes what every seed ever said."""
    seeds, positions = torch.tensor(list(KNOWN_U)).unbind(1)
    assert (uniform(seeds, positions) * 2**24).tolist() == list(KNOWN_U.values())
    children = [child_seed(0, 0), child_seed(0, 1), child_seed(2**63 - 1, 7)]
    assert children == [440298976299996016, 8595386069833728630, 4585217771885319932]


def numpy_hash32(seed: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """The same in unsigned 32-bit arithmetic that wraps around, as a GPU kernel has it."""

    def mix(x):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x735A2D97)
        return x ^ (x >> np.uint32(15))

    seed_low, seed_high = seed.astype(np.uint32), (seed >> np.uint64(32)).astype(np.uint32)
    low, high = counter.astype(np.uint32), (counter >> np.uint64(32)).astype(np.uint32)
    low_key = mix(seed_low ^ np.uint32(0x9E3779B9))
    high_key = mix(seed_high ^ low_key)
    return mix(mix(low ^ high_key) ^ high ^ low_key)


def test_torch_numpy_and_python_agree_to_the_last_bit_on_10_000_pairs():
    pairs = random_pairs(10_000)
    seeds, positions = pairs.astype(np.uint64)
    expected = numpy_hash32(seeds, positions)
    tensors = [torch.from_numpy(x) for x in pairs]
    assert hash32(*tensors).tolist() == expected.tolist()
    assert list(map(hash32, seeds.tolist(), positions.tolist())) == expected.tolist()
    as_fp32 = (expected >> 8).astype(np.float32) * np.float32(2**-24)
    assert uniform(*tensors).numpy().tobytes() == as_fp32.tobytes()


def test_u_lies_in_0_to_1_and_any_of_its_2_to_the_24_values_can_come():
    for u in (0.0, 2**-24, 0.25, 0.5, 1 - 2**-23, BELOW_1):
        for seed in (0, 7, 2**62 + 12345):
            position = torch.tensor([position_where_u_is(u, seed)])
            assert uniform(torch.tensor([seed]), position).item() == u < 1


def grid_of_u(first_seed: int, step: int) -> np.ndarray:
    """320 seeds by 320 positions: 102,400 numbers."""
    seeds = first_seed + step * torch.arange(320).repeat_interleave(320)
    return uniform(seeds, torch.arange(320).repeat(320)).double().numpy().reshape(320, 320)


@pytest.mark.parametrize("first_seed, step", [(0, 1), (0, 2**32), (12345, 1000), (0, 2**20)])
def test_neighbouring_seeds_and_positions_draw_uncorrelated_numbers(first_seed, step):
    u = grid_of_u(first_seed, step)  # the standard error of a correlation is 0.003
    assert abs(u.mean() - 1 / 2) < 0.005
    assert abs(u.var() - 1 / 12) < 0.002
    pairs = {
        "next position": (u[:, :-1], u[:, 1:]),
        "one but next": (u[:, :-2], u[:, 2:]),
        "next seed": (u[:-1], u[1:]),
        "seed and position exchanged": (u[np.triu_indices(320, 1)], u.T[np.triu_indices(320, 1)]),
    }
    for name, (a, b) in pairs.items():
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02, name
    cells = np.histogram2d(u[:, :-1].ravel(), u[:, 1:].ravel(), bins=16)[0]
    expected = cells.sum() / 256
    assert ((cells - expected) ** 2 / expected).sum() < 255 + 6 * math.sqrt(2 * 255)


def test_each_bit_of_seed_and_position_flips_each_bit_of_the_number_half_the_time():
    rng = torch.Generator().manual_seed(0)
    seeds = torch.randint(2**63 - 1, (2_000,), generator=rng)
    positions = torch.randint(2**12, (2_000,), generator=rng)  # a context's positions: small
    for bit in range(63):
        for others in ((seeds ^ (1 << bit), positions), (seeds, positions ^ (1 << bit))):
            changed = (hash32(seeds, positions) ^ hash32(*others)).numpy().astype(np.uint32)
            flipped = np.unpackbits(changed.view(np.uint8)).reshape(2_000, 32).mean(axis=0)
            assert abs(flipped - 0.5).max() < 0.07, bit  # a standard error is 0.011


def test_no_seed_and_position_of_everyday_size_draw_conspicuous_numbers():
    """A hash of several words can cancel where two of them are equal, most of all where all are 0.

    Here the first draft drew u = 0 at position 0 from every seed below 2**32, the most likely of
    all seeds and positions, and passed all tests that began at position 7.
    """
    small = torch.arange(300)
    for shift in (0, 32):
        bits = hash32((small << shift)[:, None], small[None, :])  # (300, 300)
        assert len(bits.unique()) > 300 * 300 - 10
        assert (bits.double().mean(dim=0) / 2**32 - 0.5).abs().max() < 0.1  # over all seeds
        assert (bits.double().mean(dim=1) / 2**32 - 0.5).abs().max() < 0.1  # over all positions


def test_a_thousand_sequences_do_not_share_a_stretch_of_numbers():
    """1,024,000 numbers of 32 bits: about 122 equal pairs by chance, 1,024 from one shared key."""
    seeds = torch.arange(1000).repeat_interleave(1024)
    bits = hash32(seeds, torch.arange(1024).repeat(1000))
    assert 60 < len(bits) - len(bits.unique()) < 200


def test_children_of_one_parent_all_differ_and_are_seeds():
    for parent in (0, 2**63 - 1):
        children = {child_seed(parent, index) for index in range(10_000)}
        assert len(children) == 10_000
        assert all(0 <= child < 2**63 for child in children)


def test_children_of_different_parents_and_of_children_differ():
    """Also from their parents: child 0 is not the parent."""
    family = set(range(100))
    children = [child_seed(parent, index) for parent in range(100) for index in range(50)]
    grandchildren = [child_seed(child, index) for child in children[::10] for index in range(10)]
    family.update(children, grandchildren)
    assert len(family) == 100 + 5_000 + 5_000


# ---- A row is drawn by itself --------------------------------------------------------------------
VARIETY = [
    {"temperature": 0},
    {},
    {"temperature": 0.7, "top_k": 5},
    {"top_p": 0.6},
    {"temperature": 1.3, "min_p": 0.05},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "logprobs": 2},
    {"frequency_penalty": 1.0, "repetition_penalty": 1.3, "presence_penalty": -0.5},
    {"temperature": 0, "repetition_penalty": 1.5, "logprobs": 0},
    {"logit_bias": {3: 4.0}, "min_tokens": 9},
]


def varied_rows(num: int) -> list[SampleRow]:
    choose = random.Random(0)
    return [
        SampleRow(
            SamplingParams(**VARIETY[i % len(VARIETY)]),
            seed=choose.randrange(2**63),
            position=choose.randrange(1024),
            token_ids=[choose.randrange(50) for _ in range(choose.randrange(4, 12))],
            num_prompt_tokens=3,
            eos_token_ids=(2,),
        )
        for i in range(num)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_row_draws_the_same_token_alone_in_any_order_and_beside_any_others(dtype):
    rows = varied_rows(36)
    logits = (torch.randn(36, 50, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    token_ids, logprobs = sample(logits, rows)
    assert len(set(token_ids.tolist())) > 10  # or this proves nothing
    for i in range(36):
        alone, alone_logprobs = sample(logits[i : i + 1], rows[i : i + 1])
        assert alone.item() == token_ids[i]
        assert alone_logprobs == logprobs[i : i + 1]
    for seed in range(5):
        order = torch.randperm(36, generator=torch.Generator().manual_seed(seed))[: 36 - 6 * seed]
        some, some_logprobs = sample(logits[order], [rows[i] for i in order])
        assert some.tolist() == token_ids[order].tolist()
        assert some_logprobs == [logprobs[i] for i in order]


def test_rows_that_are_kept_from_step_to_step_draw_what_new_rows_draw():
    """Only the position and the text change: the same 12 sequences, four tokens on."""
    kept = SampleRows(varied_rows(12))
    for step in range(4):
        logits = torch.randn(12, 50, generator=torch.Generator().manual_seed(step)) * 2
        token_ids, logprobs = sample(logits, [replace(each) for each in kept.rows])
        again, peaks = draw_tokens(logits, kept)
        assert again.tolist() == token_ids.tolist()
        assert collect_logprobs(logits, kept, again, peaks) == logprobs
        for each, token_id in zip(kept.rows, again.tolist(), strict=True):
            each.token_ids.append(token_id)
            each.position += 1


@pytest.mark.parametrize("params", VARIETY, ids=str)
def test_the_callers_logits_and_token_ids_are_only_read(params):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    rows = [SampleRow(SamplingParams(**params), 5, i, [1, 2, 3, 4], 3, (2,)) for i in range(3)]
    before = logits.clone()
    sample(logits, rows)
    assert torch.equal(logits, before)
    assert [one.token_ids for one in rows] == [[1, 2, 3, 4]] * 3


def test_logits_may_be_a_view_of_something_larger():
    """A padded vocabulary, every second row, transposed memory, one row for all."""
    padded = torch.randn(12, 64, generator=torch.Generator().manual_seed(4))
    rows = varied_rows(6)
    expected = sample(padded[::2, :50].contiguous(), rows)
    assert sample(padded[::2, :50], rows)[0].tolist() == expected[0].tolist()
    assert sample(padded[::2, :50].t().contiguous().t(), rows)[0].tolist() == expected[0].tolist()
    thrice = sample(padded[:1, :50].expand(3, -1), [rows[1]] * 3)[0].tolist()
    assert thrice == sample(padded[:1, :50], rows[1:2])[0].tolist() * 3


def test_ids_are_int64_one_per_row_and_no_rows_are_no_tokens():
    token_ids, logprobs = sample(torch.randn(4, 9), [seeded(i, i) for i in range(4)])
    assert token_ids.shape == (4,) and token_ids.dtype == torch.int64
    assert logprobs == [None] * 4
    token_ids, logprobs = sample(torch.empty(0, 9), [])
    assert token_ids.tolist() == [] and logprobs == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_tokens_that_a_cpu_draws():
    rows = varied_rows(90)
    logits = torch.randn(90, 5000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    token_ids, logprobs = sample(logits, rows)
    gpu_ids, gpu_logprobs = sample(logits.cuda(), rows)
    assert gpu_ids.is_cuda and gpu_ids.tolist() == token_ids.tolist()
    assert [x and list(x) for x in gpu_logprobs] == [x and list(x) for x in logprobs]


# ---- The frequencies are the probabilities -------------------------------------------------------
SHARES = (0.30, 0.02, 0.18, 0.10, 0.25, 0.05, 0.01, 0.09)


@pytest.mark.parametrize(
    "vary, params, expected",
    [
        ("seed", {}, SHARES),
        ("child", {}, SHARES),
        ("position", {}, SHARES),
        ("position", {"temperature": 2.0}, [math.sqrt(share) for share in SHARES]),
        ("position", {"temperature": 0.5}, [share**2 for share in SHARES]),
        ("position", {"top_k": 3}, (0.30, 0, 0.18, 0, 0.25, 0, 0, 0)),
        ("position", {"top_p": 0.8}, (0.30, 0, 0.18, 0.10, 0.25, 0, 0, 0)),
        ("seed", {"min_p": 0.25}, (0.30, 0, 0.18, 0.10, 0.25, 0, 0, 0.09)),
    ],
)
def test_20_000_draws_have_the_wanted_frequencies(vary, params, expected):
    num, shared = 20_000, SamplingParams(**params)
    pairs = {
        "seed": [(i, 7) for i in range(num)],
        "position": [(7, i) for i in range(num)],
        "child": [(child_seed(3, i), 7) for i in range(num)],
    }[vary]
    rows = [SampleRow(shared, seed, position, [0], 1) for seed, position in pairs]
    logits = shares_to_logits(*SHARES, dtype=torch.float32).expand(num, -1)
    counts = Counter(sample(logits, rows)[0].tolist())
    wanted = {t: num * x / sum(expected) for t, x in enumerate(expected) if x}
    assert set(counts) == set(wanted)
    # Chi square with at most 7 degrees of freedom exceeds 45 once in ten million times.
    assert sum((counts[t] - x) ** 2 / x for t, x in wanted.items()) < 45


# ---- The oracle: one row at a time, in plain Python ----------------------------------------------
class CloseCall(Exception):
    """Two numbers nearer than 1e-9 decide: rounding may, so the example says nothing."""


def compare(a: float, b: float) -> bool:
    """a < b, or CloseCall. (Equal numbers of a tie are compared as numbers, not by this.)"""
    if abs(a - b) <= 1e-9 * max(abs(a), abs(b)):
        raise CloseCall
    return a < b


def oracle_scores(logits: list[float], one: SampleRow) -> list[float]:
    p, scores = one.params, list(logits)
    output = one.token_ids[one.num_prompt_tokens :]
    for token_id, bias in p.logit_bias.items():
        scores[token_id] += bias
    if len(output) < p.min_tokens:
        for token_id in [*p.stop_token_ids, *one.eos_token_ids]:
            scores[token_id] = -math.inf
    for token_id in set(one.token_ids):
        if scores[token_id] > 0:
            scores[token_id] /= p.repetition_penalty
        else:
            scores[token_id] *= p.repetition_penalty
    for token_id, count in Counter(output).items():
        scores[token_id] -= p.frequency_penalty * count + p.presence_penalty
    return scores


def oracle_weights(scores: list[float], p: SamplingParams) -> list[float]:
    peak = max(scores)
    weights = [math.exp((score - peak) / p.temperature) for score in scores]
    if p.min_p:
        weights = [0.0 if w < 1 and compare(w, p.min_p) else w for w in weights]
    order = sorted(range(len(weights)), key=lambda t: (-weights[t], t))
    for a, b in zip(order, order[1:]):
        if scores[a] != scores[b] and weights[b]:
            compare(scores[b] - 1000, scores[a] - 1000)  # a tie for one of the two, perhaps
    if p.top_k > 0:
        for token_id in order[p.top_k :]:
            weights[token_id] = 0.0
    if p.top_p < 1:
        total, before = math.fsum(weights), 0.0
        for token_id in order:
            share, weights[token_id] = weights[token_id], 0.0
            if before == 0 or compare(before, p.top_p * total):
                weights[token_id] = share
            before += share
    return weights


def oracle_draw(weights: list[float], u: float) -> int:
    total, cumulated = math.fsum(weights), 0.0
    for token_id, weight in enumerate(weights):
        cumulated += weight
        if weight and (token_id == len(weights) - 1 or compare(u * total, cumulated)):
            return token_id
    return max(t for t, weight in enumerate(weights) if weight)


def oracle(logits: list[float], one: SampleRow) -> tuple[list[int], int]:
    """Which tokens may come, and which one does."""
    scores = oracle_scores(logits, one)
    if one.params.temperature < 1e-5:
        best = scores.index(max(scores))
        for token_id, score in enumerate(scores):
            if token_id != best and score > -math.inf and score != scores[best]:
                compare(score - 1000, scores[best] - 1000)
        return [best], best
    weights = oracle_weights(scores, one.params)
    seed, position = (np.array([x], dtype=np.uint64) for x in (one.seed, one.position))
    u = (int(numpy_hash32(seed, position)[0]) >> 8) / 2**24
    return [t for t, w in enumerate(weights) if w], oracle_draw(weights, u)


CHOICES = {
    "temperature": [0.0, 0.4, 1.0, 1.0, 1.7],
    "top_k": [0, 0, -1, 1, 2, 3, 5, 50],
    "top_p": [1.0, 1.0, 0.05, 0.31, 0.57, 0.83, 0.97],
    "min_p": [0.0, 0.0, 0.07, 0.43, 1.0],
    "presence_penalty": [0.0, 0.0, 0.3, -0.7, 1.9],
    "frequency_penalty": [0.0, 0.0, 0.3, -0.7, 1.9],
    "repetition_penalty": [1.0, 1.0, 1.3, 0.6],
    "min_tokens": [0, 0, 2],
    "logit_bias": [None, None, {0: -100, 1: 0.7}, {1: -1.5, 2: 3}],
    "stop_token_ids": [[], [0], [1, 0]],
}


def assert_equal_to_the_oracle(matrix: list[list[float]], rows: list[SampleRow]) -> None:
    expected = [oracle(logits, one) for logits, one in zip(matrix, rows)]
    logits = torch.tensor(matrix, dtype=torch.float64)
    assert sample(logits, rows)[0].tolist() == [token_id for _, token_id in expected]
    drawn = [i for i, one in enumerate(rows) if not one.params.greedy]
    weights = draw_weights(edit_logits(logits, rows)[drawn], [rows[i] for i in drawn])
    support = [weight.nonzero().flatten().tolist() for weight in weights]
    assert support == [expected[i][0] for i in drawn]


def test_a_thousand_rows_of_all_kinds_in_one_call_equal_the_oracle():
    rng, matrix, rows = random.Random(0), [], []
    while len(rows) < 1000:
        # Eighths, so that ties are frequent. The last token is never -inf and never forbidden.
        logits = [rng.choice([rng.randrange(-24, 24) / 8] * 20 + [-math.inf]) for _ in range(11)]
        logits.append(rng.randrange(-24, 24) / 8)
        params = SamplingParams(**{k: rng.choice(v) for k, v in CHOICES.items()})
        num_prompt_tokens, num_tokens = rng.randrange(4), rng.randrange(4, 9)
        token_ids = [rng.randrange(12) for _ in range(num_tokens)]
        seed, position = rng.randrange(2**63), rng.randrange(1024)
        one = SampleRow(params, seed, position, token_ids, num_prompt_tokens, (1,))
        try:
            oracle(logits, one)
        except CloseCall:
            continue
        matrix.append(logits)
        rows.append(one)
    assert_equal_to_the_oracle(matrix, rows)


# ---- Log-probabilities ---------------------------------------------------------------------------
def test_logprobs_are_the_most_likely_tokens_in_order_of_rank():
    logits = shares_to_logits(0.125, 0.5, 0.25, 0.125)
    (answer,) = sample(logits, [row(u=0.3, logprobs=2)])[1]  # u = 0.3 is token 1
    assert answer == {
        1: Logprob(pytest.approx(math.log(0.5)), rank=1, decoded_token=None),
        2: Logprob(pytest.approx(math.log(0.25)), rank=2),
    }
    assert list(answer) == [1, 2]


def test_logprobs_0_is_the_drawn_token_alone_and_none_is_nothing():
    logits = shares_to_logits(0.1, 0.5, 0.25, 0.15).expand(3, -1)
    rows = [row(u=0.7, logprobs=0), row(u=0.7), row(u=0.7, logprobs=1)]
    assert sample(logits, rows)[1] == [
        {2: Logprob(pytest.approx(math.log(0.25)), 2)},
        None,
        {1: Logprob(pytest.approx(math.log(0.5)), 1), 2: Logprob(pytest.approx(math.log(0.25)), 2)},
    ]


def test_more_logprobs_than_tokens_are_all_tokens():
    (answer,) = sample(shares_to_logits(0.2, 0.5, 0.3), [row(logprobs=20)])[1]
    assert [(t, x.rank) for t, x in answer.items()] == [(1, 1), (2, 2), (0, 3)]


def test_equal_tokens_rank_by_id_so_no_rank_comes_twice():
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]])
    for token_id, rank in ((0, 3), (1, 1), (2, 4), (3, 2), (4, 5)):
        (answer,) = prompt_logprobs(logits, [token_id], 3)
        assert list(answer)[:3] == [1, 3, 0] and answer[token_id].rank == rank
        assert len(answer) == (3 if rank <= 3 else 4)


def test_logprobs_are_those_of_the_model_before_all_edits():
    """Whatever the request does to the logits, it learns what the model thought: vLLM's default."""
    logits = shares_to_logits(0.5, 0.25, 0.25)
    params = {"temperature": 0.3, "top_k": 1, "logit_bias": {1: 50}, "repetition_penalty": 3}
    token_ids, (answer,) = sample(logits, [row(logprobs=1, **params)])
    assert token_ids.tolist() == [1]
    assert [(t, x.rank, round(math.exp(x.logprob), 9)) for t, x in answer.items()] == [
        (0, 1, 0.5),
        (1, 2, 0.25),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logprobs_equal_log_softmax_and_ranks_equal_a_stable_sort(dtype):
    logits = (torch.randn(20, 300, generator=torch.Generator().manual_seed(6)) * 3).to(dtype)
    rows = [seeded(i, 3, logprobs=i % 7, temperature=i % 3) for i in range(20)]
    token_ids, answers = sample(logits, rows)
    exact = logits.log_softmax(-1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    order = exact.sort(dim=-1, descending=True, stable=True).indices
    for i, (token_id, answer) in enumerate(zip(token_ids.tolist(), answers)):
        expected = list(dict.fromkeys([*order[i, : i % 7].tolist(), token_id]))
        assert list(answer) == expected
        for t, entry in answer.items():
            assert entry.logprob == exact[i, t].item()
            assert order[i, entry.rank - 1] == t


def test_a_prompts_logprobs_say_how_likely_each_next_token_was():
    logits = torch.cat([shares_to_logits(0.5, 0.25, 0.25), shares_to_logits(0.1, 0.2, 0.7)])
    first, second = prompt_logprobs(logits, [1, 2], 1)
    assert [(t, x.rank) for t, x in first.items()] == [(0, 1), (1, 2)]
    assert second == {2: Logprob(pytest.approx(math.log(0.7)), 1)}
    assert prompt_logprobs(logits, [1, 2], 0)[0] == {1: Logprob(pytest.approx(math.log(0.25)), 2)}
    assert prompt_logprobs(torch.empty(0, 3), [], 5) == []


def test_a_prompt_token_that_was_impossible_has_logprob_minus_infinity():
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    assert prompt_logprobs(logits, [1], 0) == [{1: Logprob(-math.inf, 3)}]


# ---- Corner cases --------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("u", [0.0, 2**-24, 0.5, BELOW_1])
def test_a_token_of_probability_0_is_never_drawn_even_at_the_ends_of_the_line(u, dtype):
    nothing = -math.inf
    logits = torch.tensor([[nothing, nothing, 1.0, nothing, 0.5, 1.5, nothing]], dtype=dtype)
    expected = 2 if u < 0.1 else 5
    assert draw(logits, u=u) == expected
    assert draw(logits, u=u, top_k=6, top_p=0.999, min_p=0.001) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("vocab_size", [1000, 50257])
def test_u_just_below_1_ends_at_the_last_token_that_has_a_weight(vocab_size, dtype):
    """Rounding in a sum of 50,257 terms must not push u past the end, nor into the empty tail."""
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(7)).to(dtype)
    logits[:, vocab_size - 300 :] = -math.inf
    logits[:, vocab_size - 301] = 12.0  # heavy, so that all u near 1 are its own
    rows = [row(u=u) for u in (BELOW_1, 1 - 2**-20, 1 - 2**-16, 0.999)]
    assert sample(logits, rows)[0].tolist() == [vocab_size - 301] * 4


def test_a_long_tail_of_tiny_weights_is_added_up_exactly():
    """One token of weight 1, then 1,000 of 1.3 / 2**26 each: below fp32's steps of 1 / 2**23.

    From the end, 2**-24 of a total of 1.00002 is 3.08 tokens: the fourth but last is drawn.
    """
    tail = math.log(1.3) - 26 * math.log(2)
    logits = torch.tensor([[0.0] + [tail] * 1000], dtype=torch.float32)
    assert draw(logits, u=BELOW_1) == 997
    assert draw(logits, u=1 - 2 * 2**-24) == 994
    assert draw(logits, u=1 - 3 * 2**-24) == 991


def test_extreme_parameters_keep_all_numbers_finite():
    logits = torch.tensor([[1e4, -1e4, 9999.0, -math.inf]])
    for params in (
        {"temperature": 1e-5},
        {"temperature": 1e6},
        {"repetition_penalty": 1e-6},
        {"repetition_penalty": 1e6},
    ):
        one = row(prompt=[0, 1, 2, 3], **params)
        weights = draw_weights(edit_logits(logits, [one]), [one])[0]
        assert weights.isfinite().all() and weights.max() == 1 and weights[3] == 0
    assert draw(logits, temperature=1e-5, u=BELOW_1) == 0


def test_half_precision_logits_are_computed_in_fp32():
    logits = torch.zeros(1, 4096, dtype=torch.bfloat16)  # a bf16 sum of ones stops at 256
    assert draw(logits, u=0.75) == 3072
    assert draw(logits.half(), u=BELOW_1) == 4095
    assert draw_weights(logits, [row()]).dtype == torch.float32
    assert edit_logits(logits, [row(logit_bias={0: 1})]).dtype == torch.float32


def test_a_vocabulary_of_one_token_leaves_no_choice():
    for params in ({}, {"temperature": 0}, {"top_k": 1}, {"top_p": 0.1, "min_p": 1, "logprobs": 3}):
        assert draw(torch.tensor([[-7.0]]), u=BELOW_1, **params) == 0


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("broken", [[math.nan, 1, 2], [1, math.inf, 2], [-math.inf] * 3], ids=str)
def test_a_row_without_an_answer_is_refused_by_its_number(broken, params):
    """NaN logits would silently draw nonsense: argmax calls NaN the largest number."""
    logits = torch.tensor([[1.0, 2.0, 3.0], broken, [1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match=r"rows \[1\] of the logits are NaN, \+inf or all -inf"):
        sample(logits, [row(**params)] * 3)
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        prompt_logprobs(logits, [0, 0, 0], 1)


def test_draw_tokens_reports_a_broken_row_without_raising_and_draws_the_others():
    logits = torch.tensor([[1.0, 5.0], [math.nan, 1.0], [-math.inf, -math.inf]])
    rows = [row(temperature=0, logprobs=0), row(top_p=0.5, logprobs=0), row()]
    token_ids, peaks = draw_tokens(logits, rows)
    (good, *broken) = collect_logprobs(logits, rows, token_ids, peaks)
    assert list(good) == [1] and broken == [None, None]
    assert peaks.isfinite().tolist() == [True, False, False]
    assert token_ids[0] == 1 and all(0 <= token_id < 2 for token_id in token_ids.tolist())


def test_forbidding_every_token_is_refused():
    with pytest.raises(ValueError, match=r"rows \[0\]"):
        draw(torch.tensor([[1.0, 2.0]]), min_tokens=1, eos=(0,), stop_token_ids=[1])


# ---- SamplingParams ------------------------------------------------------------------------------
def test_the_defaults_are_vllms():
    assert asdict(SamplingParams()) == {
        "n": 1,
        "best_of": None,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "allowed_token_ids": (),
        "bad_words": (),
        "include_stop_str_in_output": False,
        "seed": None,
        "max_tokens": 16,
        "min_tokens": 0,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "logprobs": None,
        "prompt_logprobs": None,
    }


def test_a_single_stop_string_becomes_a_tuple():
    assert SamplingParams(stop="\n").stop == ("\n",)
    assert SamplingParams(stop=["a", "bc"]).stop == ("a", "bc")
    assert SamplingParams(stop_token_ids=[3, 1]).stop_token_ids == (3, 1)


def test_a_logit_bias_is_clamped_to_100_as_in_vllm_and_is_a_copy():
    given_bias = {3: 1000, 4: -1e9, 5: 0.5}
    params = SamplingParams(logit_bias=given_bias)
    given_bias[5] = 7
    assert params.logit_bias == {3: 100.0, 4: -100.0, 5: 0.5}


def test_params_cannot_be_changed_but_replaced():
    params = SamplingParams(stop="x", stop_token_ids=[1], logit_bias={2: 1.0})
    with pytest.raises(FrozenInstanceError):
        params.temperature = 0.5
    assert replace(params, seed=3) == SamplingParams(
        stop="x", stop_token_ids=[1], logit_bias={2: 1.0}, seed=3
    )


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0, "top_k": -1, "top_p": 1, "min_p": 1},
        {"temperature": 5.0, "n": 100, "seed": 2**63 - 1},
        {"max_tokens": None, "min_tokens": 10**6},
        {"max_tokens": 5, "min_tokens": 5},
        {"presence_penalty": -2, "frequency_penalty": 2.0, "repetition_penalty": 0.01},
        {"stop": [], "stop_token_ids": (), "logit_bias": {}, "logprobs": 0, "prompt_logprobs": 0},
    ],
    ids=str,
)
def test_the_edges_of_what_is_allowed_are_allowed(params):
    SamplingParams(**params)


NAN, INF = math.nan, math.inf
REFUSED = [
    ({"temperature": NAN}, "temperature is nan: it must be a number from 0 (greedy) to 1e6"),
    ({"temperature": INF}, "temperature is inf: it must be a number from 0 (greedy) to 1e6"),
    ({"temperature": -0.1}, "temperature is -0.1: it must be a number from 0"),
    ({"temperature": True}, "temperature is True: it must be a number from 0"),
    ({"top_p": 0}, "top_p is 0: it must be a number above 0 and at most 1"),
    ({"top_p": 1.01}, "top_p is 1.01: it must be a number above 0 and at most 1"),
    ({"top_k": -2}, "top_k is -2: it must be an integer of at least 1, or 0 or -1 for all"),
    ({"top_k": 2.0}, "top_k is 2.0: it must be an integer"),
    ({"min_p": -0.01}, "min_p is -0.01: it must be a number from 0 to 1"),
    ({"min_p": 1.01}, "min_p is 1.01: it must be a number from 0 to 1"),
    ({"presence_penalty": 2.01}, "presence_penalty is 2.01: it must be a number from -2 to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty is -3: it must be a number from -2 to 2"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0: it must be a number above 0"),
    ({"repetition_penalty": INF}, "repetition_penalty is inf: it must be a number above 0"),
    ({"n": 0}, "n is 0: it must be an integer from 1 to 1024"),
    ({"n": 1025}, "n is 1025: it must be an integer from 1 to 1024"),
    ({"n": True}, "n is True: it must be an integer from 1 to 1024"),
    ({"n": 2, "temperature": 0}, "n is 2: it must be 1 when using greedy sampling"),
    ({"seed": -2}, "seed is -2: it must be an integer from 0 to 2**63 - 1, or None"),
    ({"seed": 2**63}, "seed is 9223372036854775808: it must be an integer from 0 to 2**63 - 1"),
    ({"max_tokens": 0}, "max_tokens is 0: it must be an integer of at least 1, or None"),
    ({"min_tokens": -1}, "min_tokens is -1: it must be an integer of at least 0"),
    ({"min_tokens": 17}, "min_tokens is 17: it must be at most max_tokens, 16"),
    ({"stop": ""}, "stop is '': it must be a string or a list, none empty"),
    ({"stop": ["a", ""]}, "stop is ['a', '']: it must be a string or a list, none empty"),
    ({"stop": ["a", 3]}, "stop is ['a', 3]: it must be a string or a list, none empty"),
    ({"stop_token_ids": 3}, "stop_token_ids is 3: it must be a list of integers of at least 0"),
    ({"stop_token_ids": [1, -1]}, "stop_token_ids is [1, -1]: it must be a list of integers"),
    ({"stop_token_ids": [True]}, "stop_token_ids is [True]: it must be a list of integers"),
    ({"ignore_eos": 1}, "ignore_eos is 1: it must be True or False"),
    ({"logprobs": -2}, "logprobs is -2: it must be an integer of at least 0, -1 for all"),
    ({"prompt_logprobs": -2}, "prompt_logprobs is -2: it must be an integer of at least 0"),
    ({"logit_bias": [1, 2]}, "logit_bias is [1, 2]: it must be a dict from token ids to finite"),
    ({"logit_bias": {"-3": 1}}, "logit_bias is {'-3': 1}: it must be a dict from token ids to"),
    ({"logit_bias": {-3: 1}}, "logit_bias is {-3: 1}: it must be a dict from token ids to"),
    (
        {"logit_bias": {3: NAN}},
        "logit_bias is {3: nan}: it must be a dict from token ids to finite",
    ),
    (
        {"logit_bias": {3: INF}},
        "logit_bias is {3: inf}: it must be a dict from token ids to finite",
    ),
]


@pytest.mark.parametrize("params, words", REFUSED, ids=lambda x: str(x) if type(x) is dict else "")
def test_a_value_that_cannot_be_meant_is_refused_in_one_clear_sentence(params, words):
    with pytest.raises(ValueError) as refusal:
        SamplingParams(**params)
    assert str(refusal.value).startswith(words)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 120


def test_every_number_has_a_rule():
    fields = set(asdict(SamplingParams()))
    others = {"stop", "stop_token_ids", "ignore_eos", "logit_bias"}
    others |= {"allowed_token_ids", "bad_words", "include_stop_str_in_output"}
    assert set(sampling.RULES) == fields - others


def test_a_token_that_the_model_does_not_have_is_refused_before_the_first_step():
    params = SamplingParams(stop_token_ids=[4, 9], logit_bias={9: 1.0})
    params.check_vocabulary(10)
    with pytest.raises(ValueError, match=r"stop_token_ids is \(4, 9\): it must be ids below 9"):
        params.check_vocabulary(9)
    with pytest.raises(ValueError, match="logit_bias is {9: 1.0}: it must be ids below 9"):
        SamplingParams(logit_bias={9: 1.0}).check_vocabulary(9)


def test_under_min_tokens_something_has_to_be_left_to_draw():
    """All ids as stop tokens, held back by min_tokens, would leave a row of -inf: a request that
    every step fails on, and everybody else's with it."""
    with pytest.raises(ValueError, match="fewer than all ids while min_tokens is set"):
        SamplingParams(min_tokens=1, stop_token_ids=list(range(7))).check_vocabulary(8)
    SamplingParams(min_tokens=1, stop_token_ids=list(range(6))).check_vocabulary(8)
    SamplingParams(stop_token_ids=list(range(8))).check_vocabulary(8)
