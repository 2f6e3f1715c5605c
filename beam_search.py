"""Sequences that fork share blocks until one of them writes: beam search.

Greedy decoding takes the likeliest token in each step, and a likely token may lead to a text of
unlikely ones. A beam search keeps the `beam_width` best unfinished texts, its beams. In each step
it scores all continuations of all beams and keeps the best, so one beam goes on in two ways and
another in none. With one slab per beam, K and V of a whole text would be copied for each fork.
With block tables a fork copies a list of block ids, and all blocks are shared until one writes:

    tokens in blocks of 2              block table       shared by
    |ab|cd|e.| ─┬─ |ef|gh|             [0, 1, 2, 4]      0 and 1: 3 beams
                ├─ |ef|ga|             [0, 1, 2, 5]      2: 2 beams
                └─ |eb|b.|             [0, 1, 3, 6]      the others: 1

The search is a strategy (see engine.py): it gets the logits of all beams of a request and returns
their continuations. A text that ends is a fork that ends at once. `BeamScheduler` plans the beams
of a request together. Cache and kernels know nothing of all this, so beams run in one batch with
all other requests. The paper measured that sharing saves 37.6% of the blocks with 2 beams and 55.2%
with 6. vLLM's V1 has no forks: each beam is a new request in each step, and its prefix cache finds
the full blocks again. The picture docs/beam_tree.svg shows four beams in the middle of a search.

Kwon et al. 2023, "PagedAttention", arXiv:2309.06180, sections 4.4 and 6.3; Wu et al. 2016, "GNMT",
arXiv:1609.08144, section 7 (length). The rules of the search are those of transformers' `generate`.
Run: python beam_search.py
Try: BEAM_WIDTH = 1 in the demo: that is greedy, and the assert "the best of all texts" fails. Or
BLOCK_SIZE = 1: nothing is copied, because a block of one token is never written twice.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from reprlib import repr as short_repr
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from block_allocator import BlockAllocator
from engine import InferenceEngine, eager_forward
from kv_cache import KVCache
from model import GPT, GPTConfig
from outputs import CompletionOutput, RequestOutput
from sampling import Logprob, SamplingParams, refuse
from scheduler import Scheduler
from sequence import FINISHED, RUNNING, WAITING, Continuation, Plan, Request, Sequence


@dataclass(frozen=True)
class BeamSearchParams:
    """How one request is searched. Names and meanings are transformers'; `beam_width` is vLLM's.

    A text's score is the sum of its tokens' log-probabilities / its length ** `length_penalty`. The
    length counts the generated tokens, also the EOS that ends them. Raises ValueError for a value
    that is not allowed.
    """

    beam_width: int = 4  # texts that go on after each step
    max_tokens: int | None = 16  # None: until max_seq_len is reached
    length_penalty: float = 1.0  # above 0 it helps long texts, below 0 short ones
    # When `beam_width` texts have ended, the search ends: True: at once. False: if no beam has a
    # better score at its length now than the worst of them. "never": if none could at any length.
    early_stopping: bool | str = False
    num_return_sequences: int | None = None  # the best of the texts; None: all

    def __post_init__(self):
        width, num = self.beam_width, self.num_return_sequences
        penalty = self.length_penalty
        is_number = isinstance(penalty, int | float) and type(penalty) is not bool
        stops = type(self.early_stopping) is bool or self.early_stopping == "never"
        self._require("beam_width", _is_count(width, 1024), "an integer from 1 to 1024")
        self._require("length_penalty", is_number and abs(penalty) <= 10, "a number from -10 to 10")
        self._require("early_stopping", stops, 'True, False or "never"')
        is_allowed = num is None or _is_count(num, width)
        self._require("num_return_sequences", is_allowed, f"from 1 to beam_width, {width}, or None")
        self.sampling_params()  # it checks max_tokens

    def _require(self, name: str, is_allowed: bool, words: str) -> None:
        if not is_allowed:
            raise ValueError(f"{name} is {short_repr(getattr(self, name))}: it must be {words}")

    def sampling_params(self) -> SamplingParams:
        """What the engine needs to know: nothing is drawn, and each token's score is kept."""
        return SamplingParams(temperature=0, max_tokens=self.max_tokens, logprobs=0)


def _is_count(value, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


# ---- the strategy --------------------------------------------------------------------------------
@dataclass
class BeamLogprob(Logprob):
    """A token's log-probability, and the sum of the text's up to this token.

    The sums stand in the sequences' own `logprobs`. So a fork gets its parent's, and a step that is
    undone takes back those that it added. The search itself remembers nothing between two steps.
    """

    total: float = 0.0


class Candidate(NamedTuple):
    """A beam and a token that may follow it."""

    beam: Sequence
    token_id: int
    logprob: BeamLogprob
    ends: bool  # the text is complete with this token

    def continuation(self) -> Continuation:
        """What the engine applies. Of two with the same beam, the first is the beam itself."""
        return Continuation(self.beam, [self.token_id], [{self.token_id: self.logprob}])


def total_of(seq: Sequence) -> float:
    """The sum of the log-probabilities of a beam's generated tokens; 0.0 before the first."""
    return seq.logprobs[-1][seq.token_ids[-1]].total if seq.logprobs else 0.0


class BeamSearch:
    """The strategy of the requests that are searched with the same parameters.

    A request has one sequence until its prompt is computed, and up to `beam_width` from then on. A
    sequence that has ended with "stop" or "length" is a complete text.
    """

    runs_together = True  # all unfinished sequences of a request are in one call, or none of them

    def __init__(self, params: BeamSearchParams):
        self.params = params
        self.max_num_sequences = params.beam_width

    def __call__(self, sequences: list[Sequence], logits: Tensor) -> list[Continuation]:
        """`logits` (B, V) has one row a beam; each request's unfinished beams are all here."""
        width = self.params.beam_width
        # Each beam has at most as many candidates that end as there are stop tokens. With so many
        # more, `width` that go on are always among the best.
        num_stops = max(len(seq.stop_token_ids) for seq in sequences)
        num_best = (1 + max(1, num_stops)) * width
        # One log-softmax and one top-k for all beams. Only a beam's own best can be among the best
        # of all. 16 bits are widened, float64 stays as it is.
        logprobs = logits.log_softmax(-1, torch.promote_types(logits.dtype, torch.float32))
        values, token_ids = logprobs.topk(min(num_best, logits.shape[1]))  # (B, k) each, best first
        refuse(values[:, 0].isnan())
        candidates: dict[Request, list[Candidate]] = {}
        for seq, *best in zip(sequences, token_ids.tolist(), values.tolist(), strict=True):
            candidates.setdefault(seq.request, []).extend(candidates_of(seq, *best))
        continuations = []
        for request, found in candidates.items():
            beams = {seq for seq in sequences if seq.request is request}
            assert beams == {seq for seq in request.sequences if seq.status != FINISHED}
            found.sort(key=lambda c: c.logprob.total, reverse=True)
            continuations += self._choose(request, found[:num_best])
        return continuations

    def _choose(self, request: Request, candidates: list[Candidate]) -> list[Continuation]:
        """The continuations of one request's beams, from its candidates, best first."""
        width = self.params.beam_width
        going_on = [c for c in candidates if not c.ends][:width]
        # A text ends only if it is among the `width` best candidates; those behind them are there
        # to replace the ones that end.
        ending = [c for c in candidates[:width] if c.ends]
        complete = [seq for seq in request.sequences if seq.finish_reason in ("stop", "length")]
        scores = [self.score(total_of(seq), seq.num_generated) for seq in complete]
        scores += [self._score_of(c) for c in ending]
        scores = sorted(scores, reverse=True)[:width]
        if self._is_over(going_on, scores):
            going_on = []  # a beam without a continuation is dropped
        # A text that is worse than `width` others needs no sequence.
        ending = [c for c in ending if self._score_of(c) >= scores[-1]]
        return [c.continuation() for c in going_on + ending]

    def _is_over(self, going_on: list[Candidate], scores: list[float]) -> bool:
        """Whether to stop, given the scores of the complete texts, best first."""
        if not going_on or len(scores) < self.params.beam_width:
            return not going_on
        if self.params.early_stopping is True:
            return True
        # A longer text has a lower sum. With length_penalty above 0 its score may rise.
        best = going_on[0]
        if self.params.early_stopping == "never" and self.params.length_penalty > 0:
            length = best.beam.longest - best.beam.num_prompt_tokens
        else:
            length = best.beam.num_generated + 1
        return self.score(best.logprob.total, length) <= scores[-1]

    def _score_of(self, candidate: Candidate) -> float:
        return self.score(candidate.logprob.total, candidate.beam.num_generated + 1)

    def score(self, total: float, length: int) -> float:
        """The score of a text of `length` tokens whose log-probabilities have this sum."""
        return total / length**self.params.length_penalty


def candidates_of(seq: Sequence, token_ids: list[int], logprobs: list[float]) -> list[Candidate]:
    """A beam with each of its likely next tokens, best first; those of -inf are left out."""
    total = total_of(seq)
    fills_up = len(seq.token_ids) + 1 >= seq.longest
    return [
        Candidate(
            seq,
            token_id,
            BeamLogprob(logprob, rank, total=total + logprob),
            ends=fills_up or token_id in seq.stop_token_ids,
        )
        for rank, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True), start=1)
        if logprob > float("-inf")
    ]


# ---- the scheduler -------------------------------------------------------------------------------
class BeamScheduler(Scheduler):
    """A scheduler for requests whose sequences run together (`Request.runs_together`), as beams do.

    A search compares all its beams in each step. So they get their next tokens in the same step, or
    none of them does. They start and are preempted together, too: if only some of them ran, they
    would hold blocks and wait for the others, which may wait for those blocks. All other requests
    are planned as in `Scheduler`.
    """

    can_run_together = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._together: set[Request] = set()  # those that run together, and perhaps some ended ones

    def check(self, request: Request) -> None:
        """As in `Scheduler`; ValueError too if no step could hold all sequences of the request."""
        super().check(request)
        if not request.runs_together:
            return
        most, num_blocks = request.max_num_sequences, self.allocator.num_blocks
        limits = {
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
        }
        for name, limit in limits.items():
            if most > limit:
                found = f"{most} sequences have to run in one step, {name} is {limit}"
                raise ValueError(f"{found}: ask for fewer or raise it")
        # After a preemption each of them computes its tokens again, in blocks of its own.
        first = request.sequences[0]  # before it runs a request that is searched has only one
        needed = most * super()._blocks_wanted(first, first.longest)
        if needed > num_blocks:
            found = f"{most} sequences that run together may need {needed} blocks"
            advice = "ask for fewer, lower max_tokens or enlarge the pool"
            raise ValueError(f"{found}, the pool has {num_blocks}: {advice}")

    def enqueue(self, request: Request) -> None:
        """As in `Scheduler`."""
        super().enqueue(request)
        if request.runs_together:
            self._together.add(request)

    def _continue_running(self, plan: Plan, budget: int, in_flight: int) -> int:
        if not self._together:  # the common case
            return super()._continue_running(plan, budget, in_flight)
        self._together = {
            request
            for request in self._together
            if any(seq.status != FINISHED for seq in request.sequences)
        }
        # The sequences of a request stand side by side in `running`.
        turns = self.running[: self.max_num_seqs]
        for request, group in groupby(turns, key=attrgetter("request")):
            if request.runs_together:
                budget -= self._continue_together(list(group), plan, budget)
            else:
                budget = self._continue_each(list(group), plan, budget, in_flight)
        return budget

    def _continue_together(self, siblings: list[Sequence], plan: Plan, budget: int) -> int:
        """Plan running sequences of a request; returns how many tokens they compute."""
        if any(seq.status != RUNNING for seq in siblings):  # preempted for an earlier request
            return 0
        chunks = self._chunks(siblings, budget)
        if not self._make_room(chunks, plan):
            return 0
        for seq, num_new_tokens in chunks:
            self._advance(seq, num_new_tokens, plan)
        return sum(num_new_tokens for _, num_new_tokens in chunks)

    def _chunks(self, group: list[Sequence], budget: int) -> list[tuple[Sequence, int]]:
        """How many tokens each sequence computes now. Those that compute none are left out.

        Example: beams are 1, 1 and 6 behind. With a budget of 8 all of them compute all of it, and
        get their next tokens. With a budget of 5 only the third one computes, and is 1 behind, too.
        """
        request = group[0].request
        if not request.runs_together:
            return super()._chunks(group, budget)
        behind = [len(seq.token_ids) - seq.num_computed_tokens for seq in group]
        if 0 in behind:  # their next tokens are in flight
            return []
        # If max_num_seqs has cut the group off, some of its running sequences are missing here.
        if len(group) == len(self._running_sequences(request)) and sum(behind) <= budget:
            return list(zip(group, behind, strict=True))
        chunks = []
        for seq, num_tokens in zip(group, behind, strict=True):
            num_new_tokens = min(num_tokens - 1, budget)  # the last one only with its siblings
            if num_new_tokens:
                chunks.append((seq, num_new_tokens))
                budget -= num_new_tokens
        return chunks

    def _next_waiting(self) -> list[Sequence]:
        """The sequence that comes first and those that run together with it; [] if none can run."""
        group = super()._next_waiting()
        if group and group[0].request.runs_together:
            group = [seq for seq in group[0].request.sequences if seq.status == WAITING]
        return group if len(self.running) + len(group) <= self.max_num_seqs else []

    def _blocks_wanted(self, seq: Sequence, num_tokens: int) -> int:
        """As in `Scheduler`; of those that run together each gets at most its share of the pool."""
        wanted = super()._blocks_wanted(seq, num_tokens)
        request = seq.request
        share = self.allocator.num_blocks // request.max_num_sequences
        return min(wanted, share) if request.runs_together else wanted

    def _preempt_last(self, plan: Plan, keeper: Request | None = None) -> None:
        # A request that runs together never keeps a part of its sequences for itself.
        is_together = self.running[-1].request.runs_together
        super()._preempt_last(plan, None if is_together else keeper)

    def preempt(self, seq: Sequence) -> None:
        """Take the blocks of a running sequence, and of those that run together with it."""
        request = seq.request
        for victim in self._running_sequences(request) if request.runs_together else [seq]:
            super().preempt(victim)

    def update(self, plan: Plan, continuations: list[Continuation]) -> None:
        """As in `Scheduler`; a request with more sequences than can run together ends then."""
        super().update(plan, continuations)
        forked = dict.fromkeys(child.request for child in plan.forked)  # a set has no fixed order
        for request in [request for request in forked if request.runs_together]:
            running = self._running_sequences(request)
            if len(running) > request.max_num_sequences:
                found = f"{len(running)} sequences, max_num_sequences {request.max_num_sequences}"
                for seq in running:
                    seq.error = f"the request's strategy made too many children: {found}"
                    self._end(seq, "error", plan)


# ---- in and out of the engine --------------------------------------------------------------------
def add_beam_search(
    engine: InferenceEngine, prompt: str | list[int], params: BeamSearchParams, **options
) -> str:
    """Queue a prompt, text or token ids, to be searched; returns the request's id.

    `options` are those of `engine.add_request`, and what it refuses is refused here. Hand the
    request's output to `best_first`.
    """
    strategy = BeamSearch(params)
    return engine.add_request(prompt, params.sampling_params(), strategy=strategy, **options)


def best_first(output: RequestOutput, params: BeamSearchParams) -> RequestOutput:
    """A search's output with the best texts, best first, each with its score.

    The score is in `cumulative_logprob`. If the search failed, the output has only the text with
    the error: those that were complete before need not be the best.
    """
    failed = [completion for completion in output.outputs if completion.error is not None]
    if failed:
        return replace(output, outputs=failed[:1])
    scored = [replace(c, cumulative_logprob=_score(c, params)) for c in output.outputs]
    scored.sort(key=lambda c: c.cumulative_logprob or 0.0, reverse=True)
    best = scored[: params.num_return_sequences or params.beam_width]
    return replace(output, outputs=[replace(c, index=i) for i, c in enumerate(best)])


def _score(completion: CompletionOutput, params: BeamSearchParams) -> float:
    assert completion.cumulative_logprob is not None  # `sampling_params` asked for it
    length = len(completion.token_ids)
    return BeamSearch(params).score(completion.cumulative_logprob, length)


# --------------------------------------------------------------------------------------------------
BEAM_WIDTH = 3
BLOCK_SIZE = 2
MAX_TOKENS = 5
LETTERS = "abcdef."  # the model's 7 tokens; the last one ends a text
PROMPT = [0, 1, 2, 3, 4]


def demo():
    """Three beams of a tiny model: their tree of blocks in each step, then all texts there are."""
    config = GPTConfig(len(LETTERS), max_seq_len=16, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config).init_weights(std=0.2, seed=114).double().eval()
    print("held      sum     beam      |tokens in a block|reference count; _ is an unfilled slot")
    params = BeamSearchParams(BEAM_WIDTH, MAX_TOKENS)
    found, num_held, num_unshared = search(model, params, show_tree)
    greedy, _, _ = search(model, BeamSearchParams(1, MAX_TOKENS), lambda scheduler: None)
    best, num_texts = best_of_all_texts(model, params)
    print(f"blocks held / blocks without sharing, in all steps: {num_held} / {num_unshared}\n")

    for name, texts in (("beams", found), ("greedy", greedy), (f"best of {num_texts}", [best])):
        print(f"{name:12}", ", ".join(f"{letters(ids)} {score:.3f}" for score, ids in texts))
    assert found[0][1] == best[1], "the best of all texts"
    assert num_held < num_unshared
    print(
        "ok: the beams found the best of all texts, in fewer blocks than they have in their tables"
    )


def search(
    model: GPT, params: BeamSearchParams, show: Callable[[Scheduler], None]
) -> tuple[list[tuple[float, list[int]]], int, int]:
    """(score, token ids) of each text found, then two sums over all steps.

    They are the blocks held, and the blocks that the beams would hold if none were shared. `show`
    is called with the scheduler after each step.
    """
    cache = KVCache(2, 32, BLOCK_SIZE, num_kv_heads=2, head_dim=16, dtype=torch.float64)
    allocator = BlockAllocator(32, BLOCK_SIZE)
    scheduler = BeamScheduler(allocator, 8, 32, max_seq_len=16)
    forward = eager_forward(model, cache)
    engine = InferenceEngine(forward, cache, scheduler, len(LETTERS), eos_token_ids=[6])
    add_beam_search(engine, PROMPT, params)
    num_held, num_unshared = 0, 0
    while engine.has_unfinished():
        step = engine.step()
        num_held += allocator.num_blocks - allocator.num_free
        num_unshared += sum(len(seq.block_table) for seq in scheduler.running)
        show(scheduler)
    (output,) = step.finished
    texts = best_first(output, params).outputs
    return [(c.cumulative_logprob or 0.0, c.token_ids) for c in texts], num_held, num_unshared


def letters(token_ids: list[int]) -> str:
    """Tokens of the demo as text."""
    return "".join(LETTERS[token_id] for token_id in token_ids)


def show_tree(scheduler: Scheduler) -> None:
    """One line for each beam. A block that it shares with the beam above is drawn only there."""
    allocator = scheduler.allocator
    step = f"{allocator.num_blocks - allocator.num_free} blocks"
    above: list[int] = []
    for seq in sorted(scheduler.running, key=lambda seq: seq.block_table):
        cells = ""
        for i, block_id in enumerate(seq.block_table):
            start, end = i * BLOCK_SIZE, min((i + 1) * BLOCK_SIZE, seq.num_computed_tokens)
            stored = letters(seq.token_ids[start:end]).ljust(BLOCK_SIZE, "_")
            cell = f" |{stored}|{allocator.ref_count(block_id)}"
            cells += " " * len(cell) if above[i : i + 1] == [block_id] else cell
        print(f"{step:8}  {total_of(seq):6.3f}  {letters(seq.token_ids):10}{cells}")
        step, above = "", seq.block_table


def next_logprobs(model: GPT, texts: list[list[int]]) -> list[list[float]]:
    """The log-probability of each token after each text; all texts are equally long."""
    B, T = len(texts), len(texts[0])

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # (B * T, H, D) -> (B, H, T, D): a text sees its own tokens only
        q, k, v = (x.unflatten(0, (B, T)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)

    hidden = model(torch.tensor(texts).flatten(), torch.arange(T).repeat(B), attend)
    return model.logits(hidden[T - 1 :: T]).log_softmax(-1).tolist()


@torch.inference_mode()
def best_of_all_texts(model: GPT, params: BeamSearchParams) -> tuple[tuple[float, list[int]], int]:
    """(score, token ids) of the best text, and how many texts there are: no search, no cache."""
    complete, going_on = [], [(0.0, list[int]())]
    for length in range(1, MAX_TOKENS + 1):
        rows = next_logprobs(model, [PROMPT + ids for _, ids in going_on])
        longer = [
            (total + logprob, [*ids, token_id])
            for (total, ids), row in zip(going_on, rows, strict=True)
            for token_id, logprob in enumerate(row)
        ]
        ended = [(t, ids) for t, ids in longer if ids[-1] == 6 or length == MAX_TOKENS]
        complete += [(total / length**params.length_penalty, ids) for total, ids in ended]
        going_on = [(t, ids) for t, ids in longer if ids[-1] != 6]
    return max(complete), len(complete)


if __name__ == "__main__":
    demo()
