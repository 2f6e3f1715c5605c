"""Rows that draw a chosen u, and what must come of them: sampling.py and its kernel alike.

Most tests of a sampler choose u, the random number of the draw, instead of searching for a lucky
seed: the hash is a bijection, so a position with any u can be computed (`position_where_u_is`).
Probabilities are given as shares; their logarithms are the logits.

    row(u=0.25, top_k=3)        a row of seed 0 that draws u = 0.25 from the three most likely

`LINES` are rows of logits and the tokens that u leads to on its way from 0 to 1, `CUTS` are rows
and the tokens that a request leaves to draw from. The name of a case is the sentence that it tests.

This file needs nothing but torch, numpy and pytest: the tests of the GPU kernels run on bare
machines.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from sampling import SampleRow, SamplingParams, mix32

BELOW_1 = 1 - 2**-24  # the largest u there is


# ---- rows of a chosen u --------------------------------------------------------------------------
def unmix32(y: int) -> int:
    """mix32 backwards: both multiplications are undone by the inverse factor modulo 2**32."""
    y ^= (y >> 15) ^ (y >> 30)
    y = y * pow(0x735A2D97, -1, 2**32) % 2**32
    y ^= (y >> 15) ^ (y >> 30)
    y = y * pow(0x21F0AAAD, -1, 2**32) % 2**32
    return y ^ (y >> 16)


def position_where_u_is(u: float, seed: int = 0) -> int:
    """The position at which `seed` draws u, rounded down to a multiple of 2**-24."""
    low_key = mix32((seed & 0xFFFFFFFF) ^ 0x9E3779B9)
    high_key = mix32((seed >> 32) ^ low_key)
    return unmix32(unmix32(int(u * 2**24) << 8) ^ low_key) ^ high_key


def row(u: float = 0.5, prompt=(0,), output=(), eos: tuple[int, ...] = (), **params) -> SampleRow:
    """A row of seed 0 that will draw u."""
    token_ids, position = [*prompt, *output], position_where_u_is(u)
    return SampleRow(SamplingParams(**params), 0, position, token_ids, len(prompt), eos)


def rows_at_many_u(num: int, **params) -> list[SampleRow]:
    """Rows that draw 0.5/num, 1.5/num and so on: the middles of `num` equal parts of the line."""
    return [row(u=(i + 0.5) / num, **params) for i in range(num)]


def shares_to_logits(*shares: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits (1, V) of a row whose tokens have these probabilities, up to a factor."""
    return torch.tensor([shares], dtype=dtype).log()


# ---- u -------------------------------------------------------------------------------------------
# (seed, position) -> u * 2**24. Pinned: a change of the hash changes what every seed ever said.
KNOWN_U = {
    (0, 0): 9995386,
    (0, 1): 5966108,
    (1, 0): 7138749,
    (2**63 - 1, 5): 11577445,
    (42, 2**40): 13602651,
}


def random_pairs(num: int, seed: int = 0) -> np.ndarray:
    """Seeds and positions, (2, num) int64: numbers of all lengths, from 0 to 63 bits."""
    rng = np.random.default_rng(seed)
    shorter_by = rng.integers(0, 64, (2, num), dtype=np.uint64)
    return (rng.integers(0, 2**63, (2, num), dtype=np.uint64) >> shorter_by).astype(np.int64)


# ---- lines ---------------------------------------------------------------------------------------
class Line(NamedTuple):
    """A row of logits, and the tokens in the middles of `len(tokens)` equal parts of its line."""

    logits: Tensor  # (1, V) float64
    params: dict
    tokens: str  # one digit each


def line(logits, tokens: str, **params) -> Line:
    return Line(torch.as_tensor(logits, dtype=torch.float64), params, tokens)


FOUR_TO_ONE = shares_to_logits(0.8, 0.2)
LINES = {
    "temperature 0 takes the most likely token whatever u is": line(
        [[1.0, 3.0, 2.0]], "1111111111", temperature=0
    ),
    # 0.5, 0.25, 0.125, 0.125: the places of four tokens on a line of length 1.
    "u is looked up among the cumulated probabilities": line(
        shares_to_logits(0.5, 0.25, 0.125, 0.125), "0000000011112233"
    ),
    "tokens keep their order on the line whatever their probabilities": line(
        shares_to_logits(0.125, 0.5, 0.25, 0.125), "0011111111222233"
    ),
    # 0.4 and 0.2 are left: two thirds and one third.
    "what is kept is scaled up to 1": line(
        shares_to_logits(0.4, 0.2, 0.2, 0.1, 0.1), "0" * 10 + "1" * 5, top_k=2
    ),
    # p ** (1 / T): 4:1 becomes 16:1 at 0.5, and 2:1 at 2.
    "a temperature below 1 favours the likely": line(FOUR_TO_ONE, "0" * 16 + "1", temperature=0.5),
    "a temperature of 1 is the model": line(FOUR_TO_ONE, "0" * 12 + "1" * 3, temperature=1.0),
    "a temperature above 1 favours the unlikely": line(
        FOUR_TO_ONE, "0" * 10 + "1" * 5, temperature=2.0
    ),
}
EACH_LINE = pytest.mark.parametrize("line", LINES.values(), ids=LINES)


# ---- cuts ----------------------------------------------------------------------------------------
class Cut(NamedTuple):
    """A row of logits, and the tokens that each of some parameters leaves to draw from."""

    logits: Tensor  # (1, V) float64
    params: list[dict]
    kept: list[list[int]]  # ids, one list for each of the parameters


def cut(logits, *cases: tuple[dict, list[int]]) -> Cut:
    params, kept = zip(*cases, strict=True)
    return Cut(torch.as_tensor(logits, dtype=torch.float64), list(params), list(kept))


def rows_of(cut: Cut) -> list[SampleRow]:
    """A row for each of its parameters."""
    return [row(**params) for params in cut.params]


def keeping(weights: Tensor) -> list[list[int]]:
    """Of the weights (M, V) of M rows, the ids of those that are not 0."""
    return [one.nonzero().flatten().tolist() for one in weights]


SHUFFLED = shares_to_logits(0.1, 0.4, 0.2, 0.3)
FALLING = shares_to_logits(0.4, 0.3, 0.2, 0.1)
ALL = [0, 1, 2, 3]
TIE_BELOW_ONE = shares_to_logits(0.125, 0.125, 0.25, 0.125, 0.125, 0.125, 0.125)
CUTS = {
    "top_k keeps the k most likely": cut(
        SHUFFLED, ({"top_k": 1}, [1]), ({"top_k": 2}, [1, 3]), ({"top_k": 3}, [1, 2, 3])
    ),
    "top_k of 0 or -1 or of the vocabulary or more keeps all": cut(
        SHUFFLED, *(({"top_k": k}, ALL) for k in (0, -1, 4, 1000, 10**30))
    ),
    "top_k of 0 or -1 or of the vocabulary or more leaves the cut to top_p": cut(
        SHUFFLED, *(({"top_k": k, "top_p": 0.5}, [1, 3]) for k in (0, -1, 4, 1000, 10**30))
    ),
    "top_k among equal tokens keeps the lower ids and never more than k": cut(
        [[1.0, 2.0, 1.0, 1.0, 2.0, 1.0]],
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [0, 1, 4]),
        ({"top_k": 4}, [0, 1, 2, 4]),
    ),
    # In order 0.5, 0.3, 0.15, 0.05: before the third the sum is 0.8.
    "top_p keeps the token that makes the sum reach p": cut(
        shares_to_logits(0.15, 0.5, 0.05, 0.3),
        ({"top_p": 0.45}, [1]),
        ({"top_p": 0.55}, [1, 3]),
        ({"top_p": 0.79}, [1, 3]),
        ({"top_p": 0.81}, [0, 1, 3]),
        ({"top_p": 0.94}, [0, 1, 3]),
        ({"top_p": 0.96}, ALL),
    ),
    "a sum that reaches p exactly needs no further token": cut(
        [[0.0] * 8],  # eight equal tokens: sums of exactly 1/8, 2/8 ...
        ({"top_p": 0.125}, [0]),
        ({"top_p": 0.5}, [0, 1, 2, 3]),
        ({"top_p": 0.5 + 1e-9}, [0, 1, 2, 3, 4]),
    ),
    "0.3 of 10 equal tokens is three, in float64 alone": cut(
        [[0.0] * 10], ({"top_p": 0.3}, [0, 1, 2])
    ),
    # A search by powers of two meets 8 of them one walk before: one more than are wanted.
    "7 of 64 equal tokens are seven": cut([[0.0] * 64], ({"top_p": 7 / 64}, [0, 1, 2, 3, 4, 5, 6])),
    "the smallest top_p still keeps the most likely token": cut(SHUFFLED, ({"top_p": 5e-324}, [1])),
    "the largest top_p below 1 keeps all that the sum notices": cut(
        SHUFFLED, ({"top_p": math.nextafter(1, 0)}, ALL)
    ),
    "top_p of 1 keeps even a token that the sum does not notice": cut(
        [[0.0, -50.0, -60.0]],  # 1 + 2e-22 is 1
        ({"top_p": 1.0}, [0, 1, 2]),
        ({"top_p": 1.0, "top_k": 2}, [0, 1]),
        ({"top_p": 0.5}, [0]),
    ),
    # 0.4, 0.3, 0.2, 0.1: the first two alone are 4/7 and 3/7, and 4/7 is above 0.5.
    "top_p counts what top_k left": cut(
        FALLING,
        ({"top_p": 0.5}, [0, 1]),
        ({"top_p": 0.5, "top_k": 2}, [0]),
        ({"top_p": 0.6, "top_k": 2}, [0, 1]),
    ),
    # Six equal tokens below one of twice their weight; top_k leaves 2 + 1 + 1 + 1 = 5.
    "top_p of a tie that top_k has cut keeps the lower ids": cut(
        TIE_BELOW_ONE,
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_k": 4, "top_p": 0.3}, [2]),
        ({"top_k": 4, "top_p": 0.5}, [0, 2]),
        ({"top_k": 4, "top_p": 0.7}, [0, 1, 2]),
        ({"top_k": 4, "top_p": 0.9}, [0, 1, 2, 3]),
    ),
    "min_p keeps what is at least that fraction of the most likely": cut(
        FALLING,  # fractions 1, 0.75, 0.5, 0.25
        ({"min_p": 0.2}, ALL),
        ({"min_p": 0.3}, [0, 1, 2]),
        ({"min_p": 0.6}, [0, 1]),
        ({"min_p": 0.8}, [0]),
    ),
    "min_p of 1 keeps all of the most likely": cut([[1.0, 1.0, 0.9]], ({"min_p": 1}, [0, 1])),
    # At T = 0.5 the fractions are squared: 1, 0.56, 0.25, 0.06. Of 1.81 0.9 is 1.63: three.
    "min_p comes after the temperature and before top_p": cut(
        FALLING,
        ({"min_p": 0.2, "temperature": 0.5}, [0, 1, 2]),
        ({"min_p": 0.3, "temperature": 0.5}, [0, 1]),
        ({"min_p": 0.2, "temperature": 0.5, "top_p": 0.85}, [0, 1]),
        ({"min_p": 0.2, "temperature": 0.5, "top_p": 0.9}, [0, 1, 2]),
    ),
}
EACH_CUT = pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
