"""From logits to a token: greedy, temperature, top-k, top-p, min-p, penalties, seeds, log-probs.

A model gives each of 50,257 tokens a score, and nearly all of them would be wrong here. Suppose
that these unlikely tokens have 1% of the probability together. Then 63% of all texts of 100 tokens
contain one (1 - 0.99**100), and one odd token can spoil the rest. So the scores are edited and the
unlikely tokens are cut off before the draw. The draw itself is one random number u: the weights lie
side by side on a line, and u points at one of them.

    logits ─> logit_bias, min_tokens ─> penalties ─> / temperature ─> min_p ─> top_k ─> top_p ─┐
       └─> log_softmax ─> logprobs (of the model, before all edits)                            v
    hash(seed, position) ─> u = 0.53    0 |aaaaaaaaaaaaaaaaaaaabbbbbbbbbbbbbccccccc| 1  ─>  "b"
                                                                ^
There is no random state. u is a pure function of (seed, position), so a request gets the same text
in any batch, after a preemption and in a recorded CUDA graph. A generator object for each sequence
would have to be saved, copied and advanced with it.

Fan et al. 2018, arXiv:1805.04833 (top-k). Holtzman et al. 2020, arXiv:1904.09751, section 3.1
(top-p). Nguyen et al. 2024, arXiv:2407.01082 (min-p). Salmon et al. 2011, "Parallel Random Numbers:
As Easy as 1, 2, 3", SC11 (random numbers from counters).
Run: python sampling.py
Try: EXTRA = {"min_p": 0.3} above the demo (one more strip, without d, e and f), or TOP_P = 0.6: the
strip of top_p then has no c, because a and b reach 0.65 together.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Temperatures below this are greedy, as in vLLM: a logit divided by less could overflow.
GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen. Names, meanings and defaults are vLLM's.

    Special tokens leave no text, as with vLLM's default `skip_special_tokens=True`. One differs:
    `include_stop_str_in_output` is about strings alone. Fields that are not here do not exist.
    `best_of` is that of vLLM's first engine: of so many texts the n with the highest
    log-probability per token are returned, the best first. (A stream has the tokens of all.)
    A value that is not allowed raises ValueError with the name, the value and what is allowed.
    """

    n: int = 1  # texts for this prompt
    best_of: int | None = None  # texts that are sampled; None: n
    temperature: float = 1.0  # logits are divided by it: 0 is greedy, 1 the model, above 1 bolder
    top_k: int = 0  # only the k most likely tokens; 0 or -1: all
    top_p: float = 1.0  # only the most likely tokens that together reach probability p
    min_p: float = 0.0  # only tokens at least this fraction as likely as the most likely one
    presence_penalty: float = 0.0  # subtracted once from each token that the output has
    frequency_penalty: float = 0.0  # subtracted once for each time that the output has it
    repetition_penalty: float = 1.0  # divides positive logits of tokens in prompt or output
    logit_bias: dict[int, float] | None = None  # token id -> what is added to its logit
    allowed_token_ids: list[int] | tuple[int, ...] | None = None  # no others; None: all
    bad_words: list[str] | tuple[str, ...] | None = None  # never written, as far as tokens tell
    seed: int | None = None  # None or -1: the engine picks one
    max_tokens: int | None = 16  # None: until max_seq_len is reached
    min_tokens: int = 0  # EOS and stop tokens are forbidden until the output has this many
    stop: str | list[str] | tuple[str, ...] | None = None  # strings that end the text
    stop_token_ids: list[int] | tuple[int, ...] | None = None  # tokens that end the text
    include_stop_str_in_output: bool = False  # whether the text ends with the stop string
    ignore_eos: bool = False  # continue after EOS, for benchmarks of a fixed length
    logprobs: int | None = None  # so many log-probabilities a token, and its own; -1: all
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt

    def __post_init__(self):
        check_params(self)
        # Each field is stored in one form. (A frozen dataclass can be changed only in this way.)
        # A bias is clamped as in vLLM: +-100 already means "always" and "never" for real logits.
        bias = (self.logit_bias or {}).items()
        clamped = {int(token_id): max(-100.0, min(100.0, x)) for token_id, x in bias}
        object.__setattr__(self, "logit_bias", clamped)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", tuple(stop or ()))
        for name in ("stop_token_ids", "bad_words", "allowed_token_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        object.__setattr__(self, "seed", None if self.seed == -1 else self.seed)

    @property
    def greedy(self) -> bool:
        """The most likely token is always taken; top_k, top_p, min_p and seed have no effect."""
        return self.temperature < GREEDY_BELOW

    @property
    def num_sampled(self) -> int:
        """How many texts are sampled for the prompt, those that are not returned included."""
        return self.best_of or self.n

    @property
    def needs_logprobs(self) -> bool:
        """Whether each token's log-probability is computed: for the client, or to compare texts."""
        return self.logprobs is not None or self.num_sampled > self.n

    @property
    def penalises(self) -> bool:
        """Whether the tokens of prompt and output change the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError for a token id that the model does not have."""
        stop_ids = set(self.stop_token_ids or ())
        in_range = f"ids below {vocab_size}"
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            require(self, name, all(t < vocab_size for t in getattr(self, name)), in_range)
        # While min_tokens forbids the stop tokens and EOS, at least one other token must exist.
        one_remains = not self.min_tokens or len(stop_ids) < vocab_size - 1
        require(self, "stop_token_ids", one_remains, "fewer than all ids while min_tokens is set")


# ---- What SamplingParams may hold (a first reading can skip this part) ---------------------------
# name: (type, smallest, largest, in words). The bounds of temperature and repetition_penalty keep
# scores in 32 bits finite. math.ulp(0.0) is the smallest number above 0. NaN fails each comparison.
RULES: dict[str, tuple[Any, float, float, str]] = {
    "n": (int, 1, 1024, "an integer from 1 to 1024"),
    "best_of": (int | None, 1, 1024, "an integer from 1 to 1024, or None"),
    "temperature": (int | float, 0, 1e6, "a number from 0 (greedy) to 1e6"),
    "top_k": (int, -1, math.inf, "an integer of at least 1, or 0 or -1 for all tokens"),
    "top_p": (int | float, math.ulp(0.0), 1, "a number above 0 and at most 1 (1 is all tokens)"),
    "min_p": (int | float, 0, 1, "a number from 0 to 1"),
    "presence_penalty": (int | float, -2, 2, "a number from -2 to 2"),
    "frequency_penalty": (int | float, -2, 2, "a number from -2 to 2"),
    "repetition_penalty": (int | float, 1e-6, 1e6, "a number above 0, from 1e-6 to 1e6"),
    "seed": (int | None, -1, 2**63 - 1, "an integer from 0 to 2**63 - 1, or None or -1"),
    "max_tokens": (int | None, 1, math.inf, "an integer of at least 1, or None for all that fits"),
    "min_tokens": (int, 0, math.inf, "an integer of at least 0"),
    "logprobs": (int | None, -1, math.inf, "an integer of at least 0, -1 for all, or None"),
    "prompt_logprobs": (int | None, -1, math.inf, "an integer of at least 0, -1 for all, or None"),
}


def require(params: SamplingParams, name: str, is_allowed: bool, words: str) -> None:
    """Raise ValueError if a field has a value that is not allowed; `words` say what is."""
    if not is_allowed:
        raise ValueError(f"{name} is {short_repr(getattr(params, name))}: it must be {words}")


def check_params(params: SamplingParams) -> None:
    """Raise ValueError for the first field whose value is not allowed."""
    for name, (kind, smallest, largest, words) in RULES.items():
        value = getattr(params, name)
        is_allowed = _is(value, kind) and (value is None or smallest <= value <= largest)
        require(params, name, is_allowed, words)
    for name in ("ignore_eos", "include_stop_str_in_output"):
        require(params, name, isinstance(getattr(params, name), bool), "True or False")
    limit = params.max_tokens or math.inf
    require(params, "min_tokens", params.min_tokens <= limit, f"at most max_tokens, {limit}")
    require(params, "n", params.n == 1 or not params.greedy, "1 when using greedy sampling")
    require(params, "best_of", params.num_sampled >= params.n, f"at least n, {params.n}")
    one = params.num_sampled == 1 or not params.greedy
    require(params, "best_of", one, "1 when using greedy sampling")

    stop = [params.stop] if isinstance(params.stop, str) else params.stop
    is_allowed = _is_list_of(stop, lambda string: isinstance(string, str) and string != "")
    require(params, "stop", is_allowed, "a string or a list, none empty")
    is_allowed = _is_list_of(params.bad_words, lambda x: isinstance(x, str) and x.strip() != "")
    require(params, "bad_words", is_allowed, "a list of strings, none blank")
    for name in ("stop_token_ids", "allowed_token_ids"):
        is_allowed = _is_list_of(getattr(params, name), _is_token_id)
        require(params, name, is_allowed, "a list of integers of at least 0")
    require(params, "allowed_token_ids", params.allowed_token_ids != [], "not empty")
    bias = {} if params.logit_bias is None else params.logit_bias
    is_allowed = isinstance(bias, dict) and all(
        (_is_token_id(token_id) or (isinstance(token_id, str) and token_id.isdecimal()))
        and (_is(x, int | float) and -math.inf < x < math.inf)
        for token_id, x in bias.items()
    )
    require(params, "logit_bias", is_allowed, "a dict from token ids to finite numbers")


def _is(value, kind) -> bool:
    # In Python True is also the integer 1. Here it is a caller's mistake.
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_token_id(value) -> bool:
    return _is(value, int) and value >= 0


def _is_list_of(values, item_is_allowed: Callable[[Any], bool]) -> bool:
    return values is None or isinstance(values, list | tuple) and all(map(item_is_allowed, values))


# ---- The random number u -------------------------------------------------------------------------
LOW_32 = 0xFFFFFFFF
CHILD = 1 << 63  # a bit of the counter that no position has: child seeds and draws never coincide


def mix32(x):
    """Scramble 32 bits: if one bit of x changes, each bit of the result changes in half the cases.

    It is a bijection of [0, 2**32), for Python ints and for int64 tensors and arrays. Both factors
    are below 2**31, so a product stays below 2**63 and a signed 64-bit integer cannot overflow. The
    results are those of uint32 arithmetic. The constants come from a search for the least bias
    (github.com/skeeto/hash-prospector, issue 19).
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & LOW_32
    x = (x ^ (x >> 15)) * 0x735A2D97 & LOW_32
    return x ^ (x >> 15)


def hash32(seed, counter):
    """32 random bits as a pure function of a seed and a counter, both of up to 64 bits.

    The seed gives two keys of 32 bits. The counter is mixed with one key, then with the other. With
    a single key, two seeds whose keys differ in low bits only would draw the same numbers in
    another order. Among 1,000 sequences of 1,024 tokens the chance of such a pair is one in nine.
    """
    # mix32(0) is 0. Without the constant, seed 0 would have two keys of 0.
    low_key = mix32((seed & LOW_32) ^ 0x9E3779B9)
    high_key = mix32((seed >> 32) ^ low_key)
    # The counter has to be mixed with high_key first. If low_key came first, the result would be
    # mix32(mix32(counter ^ low_key) ^ mix32((seed >> 32) ^ low_key)). For counter == seed >> 32
    # that is mix32(0) = 0: every seed below 2**32 would draw u = 0 at position 0.
    mixed = mix32((counter & LOW_32) ^ high_key)
    return mix32(mixed ^ (counter >> 32) ^ low_key)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) for each (seed, position): two int64 tensors (M,) -> float32 (M,).

    These are the upper 24 bits of the hash. A float32 holds 24 bits exactly, so nothing is rounded
    up to 1.0 and all devices get the same bits. (u is a multiple of 2**-24, so a token less likely
    than that is drawn too often or never.)
    """
    return (hash32(seeds, positions) >> 8).to(torch.float32) * 2.0**-24


def child_seed(seed: int, index: int) -> int:
    """The seed in [0, 2**63) of child `index` of a sequence. Text i of n > 1 texts has child i.

    All children of one parent differ: for one seed, hash32 is a bijection of the counter's lower 32
    bits, and all 32 bits of `low` are kept.
    """
    low = hash32(seed, CHILD | 2 * index)
    high = hash32(seed, CHILD | 2 * index + 1)
    return (high >> 1) << 32 | low  # 63 bits, so that the seed fits into an int64


# ---- The draw ------------------------------------------------------------------------------------
@dataclass(slots=True)
class SampleRow:
    """What one row of the logits needs to become a token."""

    params: SamplingParams
    seed: int  # of the sequence, in [0, 2**63)
    position: int  # the index that the drawn token will have in its sequence
    token_ids: list[int]  # prompt and output so far; only read
    num_prompt_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # the tokens of each of bad_words

    def additions(self) -> list[tuple[int, float]]:
        """(token id, what is added to its logit): logit_bias, and -inf for forbidden tokens.

        EOS (all its ids, even if ignored) and stop tokens are forbidden up to min_tokens; a bad
        word's last token where the output ends with those before it.
        """
        params = self.params
        biases = (params.logit_bias or {}).items()
        num_written = len(self.token_ids) - self.num_prompt_tokens
        is_short = num_written < params.min_tokens
        forbidden = {*(params.stop_token_ids or ()), *self.eos_token_ids} if is_short else set()
        for *before, last in self.bad_words_ids:
            start = len(self.token_ids) - len(before)
            if len(before) <= num_written and self.token_ids[start:] == before:
                forbidden.add(last)
        return [*biases, *((token_id, -math.inf) for token_id in forbidden)]


class SampleRows:
    """M rows, and what stays the same while the same sequences are drawn in step after step.

    Between two draws only `position` and `token_ids` of a row may change.
    """

    def __init__(self, rows: list[SampleRow]):
        self.rows = rows
        # Indices of the rows that draw at random, whose logits may be edited (`biased` and
        # `penalised`), and that ask for log-probabilities.
        self.drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
        pairs = [(row.bad_words_ids, row.params) for row in rows]
        edits = [w or p.logit_bias or p.min_tokens or p.allowed_token_ids for w, p in pairs]
        self.biased = [i for i, is_edited in enumerate(edits) if is_edited]
        self.penalised = [i for i, row in enumerate(rows) if row.params.penalises]
        self.asking = [i for i, row in enumerate(rows) if row.params.needs_logprobs]
        self.seeds = np.array([row.seed for row in rows], dtype=np.int64)  # (M,)
        self.kept: dict = {}  # tensors that a sampler has made from these rows, for its next draw

    def __len__(self) -> int:
        return len(self.rows)

    def positions(self) -> np.ndarray:
        """The positions of the tokens that are drawn now, (M,) int64."""
        return np.fromiter((row.position for row in self.rows), np.int64, len(self.rows))


def as_rows(rows: "SampleRows | list[SampleRow]") -> SampleRows:
    """The rows as `SampleRows`."""
    return rows if isinstance(rows, SampleRows) else SampleRows(rows)


def sample(logits: Tensor, rows: list[SampleRow]) -> tuple[Tensor, list["Logprobs | None"]]:
    """Draw one token for each of M rows of logits (M, V), which are only read.

    Returns int64 ids (M,) on the logits' device, and for each row its log-probabilities, or None if
    the row asked for none. Raises ValueError for a row without a token to choose: one with NaN or
    +inf, or nothing but -inf. It waits for the device to find that out.
    """
    token_ids, peaks = draw_tokens(logits, rows)
    refuse(~peaks.isfinite())
    return token_ids, collect_logprobs(logits, rows, token_ids, peaks)


def draw_tokens(
    logits: Tensor,  # (M, V)
    rows: SampleRows | list[SampleRow],
) -> tuple[Tensor, Tensor]:
    """Draw without waiting for the device: token ids (M,) and peaks (M,).

    A peak is the largest edited logit of its row. If it is not finite, the row had no token to
    choose and its token id means nothing. The caller checks that when it reads the tokens.
    """
    rows = as_rows(rows)
    assert logits.ndim == 2 and len(rows) == logits.shape[0], (logits.shape, len(rows))
    scores = edit_logits(logits, rows)
    # The arg max, of equal logits the lowest id. For greedy rows this is the result.
    peaks, token_ids = scores.max(dim=-1)
    drawn = rows.drawn
    if drawn:
        weights = draw_weights(scores[drawn], [rows.rows[i] for i in drawn])
        # Hashed on the host, which has both numbers: on a GPU it would be about forty launches.
        u = uniform(torch.from_numpy(rows.seeds), torch.from_numpy(rows.positions()))
        token_ids[drawn] = _draw(weights, u[drawn], token_ids[drawn])
    return token_ids, peaks


def edit_logits(
    logits: Tensor,  # (M, V)
    rows: SampleRows | list[SampleRow],
) -> Tensor:
    """What is allowed and added, then penalties: a new (M, V), or `logits` if no row has any.

    They can change the arg max, so greedy rows need them too.
    """
    rows = as_rows(rows)
    added = [(i, *pair) for i in rows.biased for pair in rows.rows[i].additions()]
    penalised = [(i, rows.rows[i]) for i in rows.penalised]
    allowed = [i for i in rows.biased if rows.rows[i].params.allowed_token_ids]
    scores = logits.to(_wide(logits), copy=True) if added or penalised or allowed else logits
    for row in allowed:
        kept = torch.tensor(rows.rows[row].params.allowed_token_ids, device=scores.device)
        scores[row] = torch.full_like(scores[row], -math.inf).index_copy(0, kept, scores[row, kept])
    if added:  # (row, token id, value) of each addition -> three tensors
        i, ids, values = (torch.as_tensor(np.array(c), device=scores.device) for c in zip(*added))
        # accumulate: a token may have a bias and be forbidden too, and x + -inf is -inf.
        scores.index_put_((i, ids), values.to(scores.dtype), accumulate=True)
    if penalised:
        _penalise(scores, penalised)
    return scores


def _wide(x: Tensor) -> torch.dtype:
    # 16-bit logits are computed in float32; float64, which the equality tests use, stays float64.
    return torch.promote_types(x.dtype, torch.float32)


def _penalise(scores: Tensor, rows: list[tuple[int, SampleRow]]) -> None:
    """Lower the logits of the tokens that prompt and output hold, in place.

    repetition_penalty counts prompt and output. It divides a positive logit and multiplies a
    negative one, so that both go down. (Keskar et al. 2019, arXiv:1909.05858, always divides.) The
    other two penalties count the output only, as OpenAI defines them.
    """
    columns = []
    for i, row in rows:
        p = row.params
        # seen: each token id once. which: for each token of the sequence its index in `seen`.
        seen, which = np.unique(row.token_ids, return_inverse=True)
        counts = np.bincount(which[row.num_prompt_tokens :], minlength=len(seen))  # in the output
        subtract = p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
        columns.append(np.stack(np.broadcast_arrays(i, seen, p.repetition_penalty, subtract)))
    # One copy to the device for all rows: (4, tokens seen) float64, which holds ids exactly.
    table = torch.from_numpy(np.concatenate(columns, axis=1)).to(scores.device)
    row_ids, token_ids = table[:2].long()
    factor, subtracted = table[2:].to(scores.dtype)
    value = scores[row_ids, token_ids]
    value = torch.where(value > 0, value / factor, value * factor) - subtracted
    scores[row_ids, token_ids] = value


def draw_weights(scores: Tensor, rows: list[SampleRow]) -> Tensor:
    """The weight of each token in the draw, (M, V): proportional to its probability in the row.

    The row's largest score is subtracted first, so the most likely token has weight 1 and no
    exponential overflows. min_p is a fraction of the largest probability, so here it is a plain
    threshold.
    """
    params = [row.params for row in rows]
    scores = scores.to(_wide(scores))
    # A temperature of 0 would divide by 0. (The demo asks for the weights of such a row.)
    temperature = _column([max(p.temperature, GREEDY_BELOW) for p in params], scores)
    weights = ((scores - scores.amax(dim=-1, keepdim=True)) / temperature).exp_()
    if any(p.min_p > 0 for p in params):
        weights.masked_fill_(weights < _column([p.min_p for p in params], weights), 0)
    cut = [i for i, p in enumerate(params) if p.top_p < 1 or 0 < p.top_k < weights.shape[1]]
    if cut:  # sort only the rows that need it
        weights[cut] = _cut_tail(weights[cut], [params[i] for i in cut])
    return weights


def _column(values: list, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)[:, None]  # (M, 1)


def _cut_tail(weights: Tensor, params: list[SamplingParams]) -> Tensor:
    """Set weights outside top_k to 0, then weights outside the top_p of the remaining ones: (M, V).

    Of equal weights those with lower ids are kept, so exactly k tokens stay, and the same ones in
    every batch. Only the values are sorted, without their ids: the number of kept tokens and the
    smallest kept weight decide which tokens stay.
    """
    vocab_size = weights.shape[1]
    ks = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    ordered = _descending(weights)[:, : max(ks)]
    k = _column(ks, weights, torch.int64)
    ordered = ordered * (torch.arange(ordered.shape[1], device=weights.device) < k)
    # inf for top_p = 1: it keeps all tokens, also those too rare to change the sum.
    p = _column([p.top_p if p.top_p < 1 else math.inf for p in params], weights, torch.float64)
    cumulated = ordered.cumsum(dim=-1, dtype=torch.float64)
    # A token stays if the tokens before it have not reached p together. So the token that makes the
    # sum reach p stays too. Weights 0.5, 0.3, 0.2, p = 0.6: the sums before are 0, 0.5, 0.8, so two
    # tokens stay.
    in_nucleus = cumulated - ordered < p * cumulated[:, -1:]
    count = in_nucleus.sum(dim=-1, keepdim=True).minimum(k).clamp(min=1)  # 0 only in a row of NaN
    return weights.masked_fill(~_largest(weights, ordered.gather(1, count - 1), count), 0)


def _descending(weights: Tensor) -> Tensor:
    # torch.sort also sorts the ids: 6 ms for 50,257 weights on a CPU. NumPy's takes 0.5 ms.
    if weights.device.type == "cpu":
        return torch.from_numpy(np.sort(weights.detach().numpy(), axis=-1)).flip(-1)
    return weights.sort(dim=-1, descending=True).values


def _largest(values: Tensor, smallest_kept: Tensor, count: Tensor | int) -> Tensor:
    """Mask (M, V) of each row's `count` largest values, given the smallest of these, (M, 1).

    Of the values equal to it, those with lower ids are kept. Ties are common: bf16 has 8
    significant bits, so many unlikely tokens have equal logits.
    """
    larger, equal = values > smallest_kept, values == smallest_kept
    num_equal_kept = count - larger.sum(dim=-1, keepdim=True)
    return larger | (equal & (equal.cumsum(dim=-1) <= num_equal_kept))


def _draw(weights: Tensor, u: Tensor, best: Tensor) -> Tensor:
    """The first token at which the cumulated weights (M, V) exceed u times their total: (M,).

    `u` (M,) is in host memory; `best` (M,) is the most likely token of each row.
    """
    u = u.to(weights.device, torch.float64)[:, None]  # (M, 1)
    # float64, so that a device which adds in another order does not draw another token.
    cumulated = weights.cumsum(dim=-1, dtype=torch.float64)
    # u <= 1 - 2**-24, so the target is below the total. The clamp is for a row of NaN.
    target = u * cumulated[:, -1:]
    picked = torch.searchsorted(cumulated, target, right=True).clamp(max=weights.shape[1] - 1)
    # A GPU adds in parallel, and rounding may make the sum grow at a token of weight 0, which must
    # never be drawn: take the most likely token instead.
    return torch.where(weights.gather(1, picked) > 0, picked, best[:, None]).squeeze(1)


# ---- Log-probabilities ---------------------------------------------------------------------------
@dataclass
class Logprob:
    """The model's log-probability of one token, before all edits."""

    logprob: float
    rank: int  # 1 = most likely
    decoded_token: str | None = None  # its text, added by the code that has a tokenizer


Logprobs = dict[int, Logprob]  # token id -> Logprob, best rank first


def collect_logprobs(
    logits: Tensor, rows: SampleRows | list[SampleRow], token_ids: Tensor, peaks: Tensor
) -> list[Logprobs | None]:
    """The log-probabilities of each row that asked for them, None for the others: M entries.

    `token_ids` and `peaks` (M,) come from `draw_tokens`. An entry always holds the drawn token. A
    row without a token to choose (its peak is not finite) gets None. Waits for the device if a row
    asked.
    """
    rows = as_rows(rows)
    answers: list[Logprobs | None] = [None] * len(rows)
    if rows.asking:
        is_finite = peaks.isfinite().tolist()
        asked = [i for i in rows.asking if is_finite[i]]
        counts = [rows.rows[i].params.logprobs or 0 for i in asked]
        found = token_logprobs(logits[asked], token_ids[asked].to(logits.device), counts)
        for i, answer in zip(asked, found, strict=True):
            answers[i] = answer
    return answers


def token_logprobs(logits: Tensor, token_ids: Tensor, counts: list[int]) -> list[Logprobs]:
    """For each row the log-probability of its token and of its most likely tokens, best first.

    `logits` (M, V) are unedited, `token_ids` (M,) are the tokens that the rows led to, `counts` say
    how many of the most likely tokens each row gets. Of equally likely tokens the lower id ranks
    first. Raises ValueError for a row of NaN. Waits for the device.
    """
    counts = [logits.shape[1] if count < 0 else count for count in counts]  # -1: all
    logprobs = logits.log_softmax(dim=-1, dtype=_wide(logits))
    own = logprobs.gather(1, token_ids[:, None])  # (M, 1)
    refuse(own.isnan().squeeze(1))
    # A token's rank is 1 + the number of tokens that rank before it.
    is_lower_id = torch.arange(logits.shape[1], device=logits.device) < token_ids[:, None]
    ranks = ((logprobs > own) | ((logprobs == own) & is_lower_id)).sum(dim=-1) + 1
    top_ids = _most_likely(logprobs, max(1, min(max(counts, default=1), logits.shape[1])))
    of_top = zip(top_ids.tolist(), logprobs.gather(1, top_ids).tolist())
    of_own = zip(token_ids.tolist(), own.squeeze(1).tolist(), ranks.tolist())
    answers = []
    for count, (ids, values), (token_id, value, rank) in zip(counts, of_top, of_own):
        answer = {t: Logprob(p, r) for r, (t, p) in enumerate(zip(ids[:count], values), start=1)}
        # A token that is not among the `count` best has a larger rank, so it comes last.
        answer.setdefault(token_id, Logprob(value, rank))
        answers.append(answer)
    return answers


def prompt_logprobs(logits: Tensor, next_token_ids: list[int], k: int) -> list[Logprobs]:
    """The same for a prompt: row i of the logits (M, V) is followed by next_token_ids[i].

    A prompt's first token has no row, because no token comes before it.
    """
    ids = torch.tensor(next_token_ids, dtype=torch.int64, device=logits.device)
    return token_logprobs(logits, ids, [k] * len(next_token_ids))


def _most_likely(logprobs: Tensor, k: int) -> Tensor:
    # topk finds the k-th largest value fast, but of several equal ones it may return any.
    kept = _largest(logprobs, logprobs.topk(k).values[:, -1:], k)
    ids = kept.nonzero()[:, 1].view(-1, k)  # exactly k in each row, in ascending order
    order = logprobs.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(1, order)  # (M, k)


def refuse(bad: Tensor) -> None:  # (M,) bool
    """Raise ValueError that names the bad rows, if there are any. Waits for the device."""
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        raise ValueError(f"rows {rows} of the logits are NaN, +inf or all -inf: no token to choose")


# --------------------------------------------------------------------------------------------------
TOP_P = 0.8
EXTRA: dict[str, Any] = {}  # one more setting to draw


def demo():
    """One distribution under six settings; the same draw alone and in a batch; frequencies."""
    logits = torch.tensor([[0.40, 0.25, 0.15, 0.10, 0.06, 0.04]]).log()

    def letters(ids) -> str:
        return "".join("abcdef"[i] for i in ids)

    u = uniform(torch.tensor([11]), torch.tensor([3])).item()
    print(f"Six tokens, a to f. Seed 11, position 3: u = {u:.3f}, whatever the setting.")
    settings: list[dict[str, Any]] = [{"temperature": t} for t in (0, 0.5, 1, 1.5)]
    settings += [{"top_k": 2}, {"top_p": TOP_P}]
    for setting in settings + ([EXTRA] if EXTRA else []):
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
    assert (shares - logits[0].exp()).abs().max() < 0.015, shares  # more than four sigma
    print("ok: a token depends on its logits, its seed and its position, not on its neighbours")


if __name__ == "__main__":
    demo()
