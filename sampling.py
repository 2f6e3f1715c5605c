"""From logits to a token: greedy, temperature, top-k, top-p, min-p, penalties, seeds, log-probs.

A model gives each of 50,257 tokens a score, and most of them are nonsense here. Say that the long
tail holds 1% of the probability: drawn as it is, it is hit in 63% of all texts of 100 tokens
(1 - 0.99**100), and one odd token can derail the rest. So the scores are edited, cut, and only
then drawn from. The draw is one random number u: lay the weights side by side and see where u is.

    logits ─> logit_bias, min_tokens ─> penalties ─> / temperature ─> min_p ─> top_k ─> top_p ─┐
       └─> log_softmax ─> logprobs (of the model, before all edits)                            v
    hash(seed, position) ─> u = 0.53    0 |aaaaaaaaaaaaaaaaaaaabbbbbbbbbbbbbccccccc| 1  ─>  "b"
                                                                ^
There is no random state. u is a pure function of (seed, position), so a request says the same in
any batch, after a preemption, in a fork, under a graph; a generator object per sequence would have
to be saved, copied and advanced with it. What a production engine does beyond this: the whole chain
in one GPU kernel that finds the cut by bisection, without a sort; grammars that forbid tokens.

Fan et al. 2018, arXiv:1805.04833 (top-k). Holtzman et al. 2020, arXiv:1904.09751, section 3.1
(top-p). Nguyen et al. 2024, arXiv:2407.01082 (min-p). Salmon et al. 2011, "Parallel Random Numbers:
As Easy as 1, 2, 3", SC11 (random numbers from counters).
Run: python sampling.py
Try: {"min_p": 0.3} as one more setting in the demo (which tokens go?), or let `hash32` ignore the
seed: every assert here still holds, yet all requests draw the same numbers.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

GREEDY_BELOW = 1e-5  # vLLM's bound: dividing by less would overflow long before it changed a token

# name: (type, smallest, largest, in words). The bounds of temperature and repetition_penalty keep
# fp32 scores finite. math.ulp(0.0) is the smallest number above 0. NaN fails every comparison.
RULES = {
    "n": (int, 1, math.inf, "an integer of at least 1"),
    "temperature": (int | float, 0, 1e6, "a number from 0 (greedy) to 1e6"),
    "top_k": (int, -1, math.inf, "an integer of at least 1, or 0 or -1 for all tokens"),
    "top_p": (int | float, math.ulp(0.0), 1, "a number above 0 and at most 1 (1 is all tokens)"),
    "min_p": (int | float, 0, 1, "a number from 0 to 1"),
    "presence_penalty": (int | float, -2, 2, "a number from -2 to 2"),
    "frequency_penalty": (int | float, -2, 2, "a number from -2 to 2"),
    "repetition_penalty": (int | float, 1e-6, 1e6, "a number above 0, from 1e-6 to 1e6"),
    "seed": (int | None, 0, 2**63 - 1, "an integer from 0 to 2**63 - 1, or None"),
    "max_tokens": (int | None, 1, math.inf, "an integer of at least 1, or None for all that fits"),
    "min_tokens": (int, 0, math.inf, "an integer of at least 0"),
    "logprobs": (int | None, 0, math.inf, "an integer of at least 0, or None"),
    "prompt_logprobs": (int | None, 0, math.inf, "an integer of at least 0, or None"),
}


def _is(value, kind) -> bool:
    # To Python True is the integer 1; to a caller it is a mistake.
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_token_id(value) -> bool:
    return _is(value, int) and value >= 0


def _is_bias(item) -> bool:
    return _is_token_id(item[0]) and _is(item[1], int | float) and -math.inf < item[1] < math.inf


@dataclass(frozen=True)
class SamplingParams:
    """How one request wants its tokens, in vLLM's names, meanings and defaults.

    A value that cannot be meant is a ValueError with the name, the value and what is allowed.
    """

    n: int = 1  # texts for this prompt
    temperature: float = 1.0  # logits are divided by it: 0 is greedy, 1 the model, above 1 bolder
    top_k: int = 0  # only the k most likely tokens; 0 or -1: all
    top_p: float = 1.0  # only the most likely tokens that together reach probability p
    min_p: float = 0.0  # only tokens at least this fraction as likely as the most likely one
    presence_penalty: float = 0.0  # taken once from a token that the output already has
    frequency_penalty: float = 0.0  # taken as often as the output has it
    repetition_penalty: float = 1.0  # divides a positive logit of a token in prompt or output
    logit_bias: dict[int, float] | None = None  # token id -> what is added; kept as a dict
    seed: int | None = None  # None: whoever runs the request picks one
    max_tokens: int | None = 16  # None: up to the context's end
    min_tokens: int = 0  # before that, neither EOS nor a stop token may come
    stop: str | list[str] | tuple[str, ...] | None = None  # kept as a tuple
    stop_token_ids: list[int] | tuple[int, ...] | None = None  # kept as a tuple
    ignore_eos: bool = False  # go on after EOS, for benchmarks of a fixed length
    logprobs: int | None = None  # this many per token, and the drawn token's; None: not computed
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt

    def __post_init__(self):
        for name, (kind, smallest, largest, words) in RULES.items():
            value = getattr(self, name)
            holds = _is(value, kind) and (value is None or smallest <= value <= largest)
            self._require(name, holds, words)
        self._require("ignore_eos", isinstance(self.ignore_eos, bool), "True or False")
        limit = self.max_tokens or math.inf
        self._require("min_tokens", self.min_tokens <= limit, f"at most max_tokens, {limit}")
        self._require("n", self.n == 1 or not self.greedy, "1 when using greedy sampling")
        self._keep_tuple("stop", lambda s: _is(s, str) and s, "a string or a list, none empty")
        self._keep_tuple("stop_token_ids", _is_token_id, "a list of integers of at least 0")
        bias = {} if self.logit_bias is None else self.logit_bias
        holds = isinstance(bias, dict) and all(map(_is_bias, bias.items()))
        self._require("logit_bias", holds, "a dict from token ids to finite numbers")
        # Clamped, not refused, as in vLLM: +-100 is "always" and "never" for every real logit.
        # (A frozen dataclass may do this to itself once, before anybody has seen it.)
        bias = {t: max(-100.0, min(100.0, value)) for t, value in bias.items()}
        object.__setattr__(self, "logit_bias", bias)

    def _require(self, name: str, holds: bool, words: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {words}")

    def _keep_tuple(self, name: str, item_holds, words: str) -> None:
        value = getattr(self, name)
        given = (value,) if isinstance(value, str) else () if value is None else value
        self._require(name, isinstance(given, list | tuple) and all(map(item_holds, given)), words)
        object.__setattr__(self, name, tuple(given))

    @property
    def greedy(self) -> bool:
        """Always the most likely token: top_k, top_p, min_p and the seed have no effect then."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalises(self) -> bool:
        """Whether the tokens seen so far change the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError for a token id that the model does not have; before the first step."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            self._require(name, all(t < vocab_size for t in ids), f"ids below {vocab_size}")
        # Under min_tokens they may not come, nor may EOS: something else has to be left to draw.
        is_left = not self.min_tokens or len(set(self.stop_token_ids)) < vocab_size - 1
        self._require("stop_token_ids", is_left, "fewer than all ids while min_tokens is set")


# ---- Random numbers without a state --------------------------------------------------------------
LOW_32 = 0xFFFFFFFF
CHILD = 1 << 63  # set in the counter of a child's seed and in no position: the two never meet


def mix32(x):
    """Scramble 32 bits so that each bit of x flips each bit of the result in half of all cases.

    A bijection. Works on Python ints and on int64 tensors and arrays that hold [0, 2**32), and is
    the same arithmetic as on uint32: both factors are below 2**31, so that a product stays below
    2**63 and a signed 64-bit integer never overflows. The constants were found by searching for the
    least bias (github.com/skeeto/hash-prospector, issue 19).
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & LOW_32
    x = (x ^ (x >> 15)) * 0x735A2D97 & LOW_32
    return x ^ (x >> 15)


def hash32(seed, counter):
    """32 random bits as a pure function of a seed and a counter, both of up to 64 bits.

    The seed becomes two keys of 32 bits; the counter is mixed under one, then under the other. With
    a single key, two seeds whose keys differ in low bits only would draw the same numbers in
    another order: among 1,000 sequences of 1,024 tokens that happens one time in nine.
    """
    # mix32(0) is 0: without the constant, seed 0 would have two keys that do nothing.
    low_key = mix32((seed & LOW_32) ^ 0x9E3779B9)
    high_key = mix32((seed >> 32) ^ low_key)
    # high_key first. The other way round, seed >> 32 and counter meet the same function with the
    # same key, and cancel where they are equal: position 0 would draw u = 0 from each small seed.
    mixed = mix32((counter & LOW_32) ^ high_key)
    return mix32(mixed ^ (counter >> 32) ^ low_key)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) for each (seed, position): two int64 tensors (M,) -> float32 (M,).

    The upper 24 bits of the hash: as many as fp32 holds, so that no rounding ever makes a 1.0 and
    all devices agree to the last bit. (A token less likely than 2**-24 is drawn too rarely or too
    often by that; nobody will see it.)
    """
    return (hash32(seeds, positions) >> 8).to(torch.float32) * 2.0**-24


def child_seed(seed: int, index: int) -> int:
    """The seed in [0, 2**63) of child `index` of a sequence; n > 1 gives text i the child i.

    Children of one parent all differ: for one seed, hash32 is a bijection of the counter's low
    half, and one of its results is kept whole.
    """
    low, high = (hash32(seed, CHILD | 2 * index + half) for half in (0, 1))
    return (high >> 1) << 32 | low


# ---- From logits to tokens -----------------------------------------------------------------------
class SampleRow(NamedTuple):
    """What one row of the logits needs to become a token."""

    params: SamplingParams
    seed: int  # of the sequence, in [0, 2**63)
    position: int  # the index that the drawn token will have in its sequence
    token_ids: list[int]  # prompt and output so far; only read
    num_prompt_tokens: int
    eos_token_id: int | None = None

    def additions(self) -> list[tuple[int, float]]:
        """What is added to single logits: logit_bias, and -inf to tokens that may not come yet."""
        early = len(self.token_ids) - self.num_prompt_tokens < self.params.min_tokens
        ends = {*self.params.stop_token_ids, self.eos_token_id} - {None}  # EOS if ignored as well
        banned = dict.fromkeys(ends if early else (), -math.inf)
        return [*self.params.logit_bias.items(), *banned.items()]


@dataclass
class Logprob:
    """What the model thought of one token."""

    logprob: float
    rank: int  # 1 = most likely
    decoded_token: str | None = None  # filled in by whoever has the tokenizer


Logprobs = dict[int, Logprob]  # token id -> Logprob, best rank first


def sample(logits: Tensor, rows: list[SampleRow]) -> tuple[Tensor, list[Logprobs | None]]:
    """Draw one token for each of M rows of logits (M, V), which are only read.

    Returns int64 ids (M,) on the logits' device, and M answers about log-probabilities: None for a
    row that did not ask, otherwise a dict that holds the drawn token whatever its rank, so that
    `logprobs[i][token_id].logprob` is what a cumulative_logprob adds up.
    Raises ValueError for a row without an answer (NaN, +inf, or nothing but -inf); to know that, it
    waits for the device.
    """
    token_ids, peaks = draw_tokens(logits, rows)
    return token_ids, collect_logprobs(logits, rows, token_ids, peaks)


def collect_logprobs(
    logits: Tensor, rows: list[SampleRow], token_ids: Tensor, peaks: Tensor
) -> list:
    """The part of `sample` behind the draw: M answers about log-probabilities, Logprobs or None.

    `token_ids` and `peaks` (M,) are those of `draw_tokens`. Raises as `sample` does.
    """
    refuse(~peaks.isfinite())
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    counts = [rows[i].params.logprobs for i in asked]
    answers = iter(token_logprobs(logits[asked], token_ids[asked], counts) if asked else ())
    return [None if row.params.logprobs is None else next(answers) for row in rows]


def draw_tokens(logits: Tensor, rows: list[SampleRow]) -> tuple[Tensor, Tensor]:
    """The part of `sample` that never waits for the device: token ids (M,) and peaks (M,).

    A peak is the largest edited logit of its row. One that is not finite says that the row had no
    answer and its token means nothing; an engine that reads its tokens a step later checks then.
    """
    assert logits.ndim == 2 and len(rows) == logits.shape[0], (logits.shape, len(rows))
    scores = edit_logits(logits, rows)
    peaks, token_ids = scores.max(dim=-1)  # of equal logits the lowest id; greedy rows are done
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        some = [rows[i] for i in drawn]
        token_ids[drawn] = _draw(draw_weights(scores[drawn], some), some, token_ids[drawn])
    return token_ids, peaks


def edit_logits(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """logit_bias, then min_tokens, then penalties: a new (M, V), or `logits` if no row has any.

    They come before the temperature and can change the arg max: greedy rows need them as well.
    """
    added = [(i, *pair) for i, row in enumerate(rows) for pair in row.additions()]
    penalised = [(i, row) for i, row in enumerate(rows) if row.params.penalises]
    scores = logits.to(_wide(logits), copy=True) if added or penalised else logits
    if added:
        i, ids, values = (torch.as_tensor(np.array(c), device=scores.device) for c in zip(*added))
        scores.index_put_((i, ids), values.to(scores.dtype), accumulate=True)
    if penalised:
        _penalise(scores, penalised)
    return scores


def _wide(x: Tensor) -> torch.dtype:
    # 16-bit logits are computed in fp32; float64 (the equality tests) stays what it is.
    return torch.promote_types(x.dtype, torch.float32)


def _penalise(scores: Tensor, rows: list[tuple[int, SampleRow]]) -> None:
    """Change the logits of the tokens seen so far, in place, and touch no others.

    repetition_penalty looks at prompt and output: a positive logit is divided, a negative one
    multiplied, so that both go down (Keskar et al. 2019, arXiv:1909.05858, divides always). The
    other two look at the output only, as OpenAI defines them.
    """
    columns = []
    for i, row in rows:
        p = row.params
        seen, which = np.unique(row.token_ids, return_inverse=True)
        counts = np.bincount(which[row.num_prompt_tokens :], minlength=len(seen))
        subtract = p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
        columns.append(np.stack(np.broadcast_arrays(i, seen, p.repetition_penalty, subtract)))
    table = torch.from_numpy(np.concatenate(columns, axis=1)).to(scores.device)  # (4, tokens seen)
    (i, seen), (factor, subtract) = table[:2].long(), table[2:].to(scores.dtype)
    value = scores[i, seen]
    scores[i, seen] = torch.where(value > 0, value / factor, value * factor) - subtract


def draw_weights(scores: Tensor, rows: list[SampleRow]) -> Tensor:
    """The weight of each token in the draw, (M, V): its probability up to one factor a row.

    With the row's largest score subtracted first, the most likely token weighs exactly 1. No
    exponential overflows, and min_p, a fraction of the largest probability, is a plain threshold.
    """
    params = [row.params for row in rows]
    scores = scores.to(_wide(scores))
    # A greedy row, drawn by nobody, shows what the smallest temperature would do.
    temperature = _column([max(p.temperature, GREEDY_BELOW) for p in params], scores)
    weights = ((scores - scores.amax(dim=-1, keepdim=True)) / temperature).exp_()
    if any(p.min_p > 0 for p in params):
        weights.masked_fill_(weights < _column([p.min_p for p in params], weights), 0)
    cut = [i for i, p in enumerate(params) if p.top_p < 1 or 0 < p.top_k < weights.shape[1]]
    if cut:  # only these rows pay for a sort
        weights[cut] = _cut_tail(weights[cut], [params[i] for i in cut])
    return weights


def _column(values: list, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)[:, None]  # (M, 1)


def _cut_tail(weights: Tensor, params: list[SamplingParams]) -> Tensor:
    """Zero what is outside top_k, and then what is outside the top_p of what remains: (M, V).

    Equal weights are kept by lower id first, so that k means k and a row is cut the same in every
    batch. Only values are sorted; how many are kept, and the smallest of them, say which.
    """
    vocab_size = weights.shape[1]
    k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    ordered = _descending(weights)[:, : max(k)]
    k = _column(k, weights, torch.int64)
    ordered = ordered * (torch.arange(ordered.shape[1], device=weights.device) < k)
    # top_p = 1 keeps all, also tokens so rare that the sum no longer notices them.
    p = _column([p.top_p if p.top_p < 1 else math.inf for p in params], weights, torch.float64)
    cumulated = ordered.cumsum(dim=-1, dtype=torch.float64)
    # A token stays if those before it have not reached p: the one that makes the sum reach p, the
    # boundary, is still in. Worked: 0.5, 0.3, 0.2 and p = 0.6: before them 0, 0.5, 0.8: two stay.
    in_nucleus = cumulated - ordered < p * cumulated[:, -1:]
    count = in_nucleus.sum(dim=-1, keepdim=True).minimum(k).clamp(min=1)  # 0 only in a row of NaN
    return weights.masked_fill(~_largest(weights, ordered.gather(1, count - 1), count), 0)


def _descending(weights: Tensor) -> Tensor:
    # torch.sort always carries the ids along: 6 ms for 50,257 weights on a CPU against numpy's 0.5.
    if weights.device.type == "cpu":
        return torch.from_numpy(np.sort(weights.detach().numpy(), axis=-1)).flip(-1)
    return weights.sort(dim=-1, descending=True).values


def _largest(values: Tensor, smallest_kept: Tensor, count: Tensor | int) -> Tensor:
    """Mask (M, V) of each row's `count` largest; of those equal to the last one, lower ids first.

    Ties are no rarity: bf16 has 8 significant bits, and the tail of a row is full of equal logits.
    """
    above, level = values > smallest_kept, values == smallest_kept
    room = count - above.sum(dim=-1, keepdim=True)
    return above | (level & (level.cumsum(dim=-1) <= room))


def _draw(weights: Tensor, rows: list[SampleRow], best: Tensor) -> Tensor:
    """The inverse of the cumulated weights: the first token whose sum exceeds u times the total."""
    # Hashed on the host, which knows both numbers: on a GPU it would be forty tiny launches.
    seeds, positions = torch.tensor([(row.seed, row.position) for row in rows]).unbind(dim=1)
    u = uniform(seeds, positions).to(weights.device, torch.float64)[:, None]  # (M, 1)
    # float64, so that the order in which a device adds up cannot move a boundary across a u.
    cumulated = weights.cumsum(dim=-1, dtype=torch.float64)
    # u <= 1 - 2**-24, so the target is below the total. Only a row of NaN runs past the end.
    target = u * cumulated[:, -1:]
    picked = torch.searchsorted(cumulated, target, right=True).clamp(max=weights.shape[1] - 1)
    # A GPU adds in parallel, and rounding may lift the sum at a token of weight 0. Never draw it.
    return torch.where(weights.gather(1, picked) > 0, picked, best[:, None]).squeeze(1)


# ---- Log-probabilities ---------------------------------------------------------------------------
def token_logprobs(logits: Tensor, token_ids: Tensor, counts: list[int]) -> list[Logprobs]:
    """What the model thought of each row's token and of its most likely ones, in order of rank.

    `logits` (M, V) unedited, `token_ids` (M,) what each row led to, `counts` how many of the most
    likely each row wants. Of equally likely tokens the lower id ranks first. Waits for the device.
    """
    logprobs = logits.log_softmax(dim=-1, dtype=_wide(logits))
    own = logprobs.gather(1, token_ids[:, None])  # (M, 1)
    refuse(own.isnan().squeeze(1))
    lower_id = torch.arange(logits.shape[1], device=logits.device) < token_ids[:, None]
    ranks = ((logprobs > own) | ((logprobs == own) & lower_id)).sum(dim=-1) + 1
    top_ids = _most_likely(logprobs, max(1, min(max(counts, default=1), logits.shape[1])))
    top = zip(top_ids.tolist(), logprobs.gather(1, top_ids).tolist())
    own = zip(token_ids.tolist(), own.squeeze(1).tolist(), ranks.tolist())
    answers = []
    for count, (ids, values), (token_id, value, rank) in zip(counts, top, own):
        answer = {t: Logprob(p, r) for r, (t, p) in enumerate(zip(ids[:count], values), start=1)}
        answer.setdefault(token_id, Logprob(value, rank))  # behind the others: its rank is > count
        answers.append(answer)
    return answers


def prompt_logprobs(logits: Tensor, next_token_ids: list[int], k: int) -> list[Logprobs]:
    """The same for a prompt: row i of the logits (M, V) is the one that led to next_token_ids[i].

    A prompt's first token has no row: nothing comes before it.
    """
    ids = torch.tensor(next_token_ids, dtype=torch.int64, device=logits.device)
    return token_logprobs(logits, ids, [k] * len(next_token_ids))


def _most_likely(logprobs: Tensor, k: int) -> Tensor:
    # topk finds the k-th value fast, but which of several equal ids it returns is undefined.
    kept = _largest(logprobs, logprobs.topk(k).values[:, -1:], k)
    ids = kept.nonzero()[:, 1].view(-1, k)  # ascending, and exactly k in each row
    order = logprobs.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(1, order)  # (M, k)


def refuse(bad: Tensor) -> None:  # (M,) bool
    """Raise ValueError with the numbers of the rows that are bad, if any is."""
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        raise ValueError(f"rows {rows} of the logits are NaN, +inf or all -inf: no token to choose")


# --------------------------------------------------------------------------------------------------
def demo():
    """One distribution under six settings; the same draw alone and in a batch; frequencies."""
    logits = torch.tensor([[0.40, 0.25, 0.15, 0.10, 0.06, 0.04]]).log()

    def letters(ids) -> str:
        return "".join("abcdef"[i] for i in ids)

    u = uniform(torch.tensor([11]), torch.tensor([3])).item()
    print(f"Six tokens, a to f. Seed 11, position 3: u = {u:.3f}, whatever the setting.")
    for setting in (*({"temperature": t} for t in (0, 0.5, 1, 1.5)), {"top_k": 2}, {"top_p": 0.8}):
        row = SampleRow(SamplingParams(**setting), 11, 3, [0, 0, 0], 3)
        cumulated = draw_weights(logits, [row])[0].cumsum(0)
        grid = (torch.arange(60) + 0.5) / 60 * cumulated[-1]  # the draw itself, for 60 values of u
        strip = letters(torch.searchsorted(cumulated, grid, right=True))
        print(f"  {str(setting):20} |{strip}|  ->  {letters(sample(logits, [row])[0])}")
    print(" " * (24 + int(60 * u)) + "^ u\n")

    rows = [SampleRow(SamplingParams(), 11, position, [0], 1) for position in range(20_000)]
    together = sample(logits.expand(20_000, -1), rows)[0]
    alone = [sample(logits, [row])[0].item() for row in rows[:60]]
    shares = torch.bincount(together, minlength=6) / 20_000
    print("20,000 positions at temperature 1:", *(f"{share:.3f}" for share in shares))
    print("the probabilities:                ", *(f"{p:.3f}" for p in logits[0].exp()))
    print(f"  drawn in one call    |{letters(together[:60])}...")
    print(f"  one call for each    |{letters(alone)}...")
    assert alone == together[:60].tolist()
    assert (shares - logits[0].exp()).abs().max() < 0.015, shares  # over four sigma
    print("ok: a token depends on its logits, its seed and its position, not on its neighbours")


if __name__ == "__main__":
    demo()
