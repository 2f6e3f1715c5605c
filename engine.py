"""schedule, forward, sample, repeat: the loop of a serving engine.

Decoding is bound by reading the model's weights. Ten requests served one after the other read all
weights once for each token of each request. Served together, one reading gives a token to each of
the ten. So the engine runs the sequences that the scheduler picks as one flat batch, step after
step, and requests join and leave between any two steps:

    add_request ─> waiting ─┐                                     ┌─> finished: blocks back, output
                            └─> schedule ─> forward ─> sample ─> update ─┐
                                   ^       (all sequences at once)       │
                                   └─────────────────────────────────────┘

Two functions are passed in. `forward(batch) -> logits` runs the model: layer by layer in this file,
as a recorded CUDA graph in speedups/cuda_graphs.py. And each request has a strategy, which turns
the logits of its sequences into their continuations: one token each (sampling), several children
(beam search), or several tokens (speculative decoding). The loop is the same for all of them: see
`run_step`. `step` calls it and gives its `StepOutput` to the watchers (a recorder, for example). An
exception or Ctrl-C undoes the whole step, so no request is lost. vLLM can plan the next step while
the device still runs this one, as speedups/plan_ahead.py does.

Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI,
section 3.
Run: python engine.py
Try: MAX_NUM_BATCHED_TOKENS = 4 in the demo: B's prompt of 14 tokens arrives in pieces. Or
NUM_BLOCKS = 7: B and C are preempted, compute their tokens again, and write the same texts.
"""

import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable
from itertools import count
from reprlib import repr as short_repr
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from block_allocator import BlockAllocator
from kv_cache import Batch, KVCache, Row, advance, make_batch, write_kv
from model import GPT, GPTConfig, attend_one_sequence
from outputs import BlockCounts, Clock, OutputProcessor, StepOutput, Timings, Tokenizer
from paged_attention import paged_attention
from sampling import (
    SampleRow,
    SampleRows,
    SamplingParams,
    child_seed,
    collect_logprobs,
    draw_tokens,
)
from scheduler import Scheduler
from sequence import FINISHED, Continuation, Plan, Request, Sequence

Forward = Callable[[Batch], Tensor]  # -> logits (M, V) of the M rows in batch.sample_rows
Strategy = Callable[[list[Sequence], Tensor], list[Continuation]]  # logits: one row a sequence
# logits (M, V), their M rows -> token ids (M,), largest logits (M,): `draw_tokens`
Draw = Callable[[Tensor, SampleRows], tuple[Tensor, Tensor]]


def eager_forward(
    model: GPT, cache: KVCache, attention: Callable = paged_attention, write: Callable = write_kv
) -> Forward:
    """The plain forward: every layer in turn, logits of the sample rows only.

    `attention` and `write` are the two kernels of a backend (see kv_cache.py).
    """

    def forward(batch: Batch) -> Tensor:
        batch = batch.to(cache.pool.device)
        # A new `attend` for each step: it holds this batch's slots and block tables. The model gets
        # only this function, and knows neither the cache nor the batch.
        attend = cache.attend(batch, attention, write)
        return model.logits(model(batch.input_ids, batch.positions, attend, batch.sample_rows))

    return forward


# ---- strategies ----------------------------------------------------------------------------------
def num_children(seq: Sequence) -> int:
    """How many sequences the next token of a sequence makes of it: usually 1, itself.

    The first token after a prompt makes n of it if the request asks for n texts.
    """
    request = seq.request
    if request.max_num_sequences == 1 or seq.num_generated or len(request.sequences) > 1:
        return 1
    return request.params.num_sampled


def seeds_of(sequences: list[Sequence]) -> list[int]:
    """The seed of each sequence's draw. One that stands there n times draws for n children."""
    counts: Counter[Sequence] = Counter()
    seeds = []
    for seq in sequences:
        i = counts[seq]
        counts[seq] += 1
        seeds.append(child_seed(seq.request.seed, i) if i else seq.seed)
    return seeds


def rows_to_draw(sequences: list[Sequence]) -> SampleRows:
    """What a sampler needs to draw each sequence's next token."""
    return SampleRows(
        [
            SampleRow(
                params=seq.request.params,
                seed=seed,
                position=len(seq.token_ids),  # of the token that is drawn: 20 tokens -> position 20
                token_ids=seq.token_ids,  # for the penalties and min_tokens; not copied
                num_prompt_tokens=seq.num_prompt_tokens,
                eos_token_ids=seq.request.eos_token_ids,
                bad_words_ids=seq.request.bad_words_ids,
            )
            for seq, seed in zip(sequences, seeds_of(sequences), strict=True)
        ]
    )


def sample_next(
    sequences: list[Sequence],
    logits: Tensor,  # (B, V), one row a sequence
    draw: Draw = draw_tokens,
    rows: SampleRows | None = None,
) -> list[Continuation]:
    """The strategy of ordinary requests: one token for each sequence, in one vectorised call.

    A sequence that stands there n times, with n equal rows of logits, forks into n.
    """
    rows = rows or rows_to_draw(sequences)
    token_ids, peaks = draw(logits, rows)
    logprobs = collect_logprobs(logits, rows, token_ids, peaks)
    return one_token_each(sequences, rows, token_ids, peaks, logprobs)


def one_token_each(
    sequences: list[Sequence],
    rows: SampleRows,  # B rows, whose seeds the children of a fork keep
    token_ids: Tensor,  # (B,) int64
    peaks: Tensor,  # (B,), each row's largest logit
    logprobs: list | None = None,
) -> list[Continuation]:
    """A continuation for each sequence: its token, or an error if its logits were not finite."""
    is_finite = np.isfinite(peaks.double().cpu().numpy())  # (B,)
    ids, seeds = token_ids.tolist(), rows.seeds.tolist()
    if is_finite.all() and not any(logprobs or ()):
        # The same as Continuation(seq, [token_id], seed=seed) in half the time, 256 times a step.
        new = tuple.__new__
        drawn = zip(sequences, ids, seeds, strict=True)
        return [new(Continuation, (seq, [i], None, seed, None, None)) for seq, i, seed in drawn]
    error = "the logits are NaN, +inf or all -inf: there is no token to choose"
    each_logprobs = logprobs or [None] * len(ids)
    each = zip(sequences, ids, seeds, each_logprobs, is_finite, strict=True)
    return [
        Continuation(seq, [token_id], logprob and [logprob], seed)
        if can_draw
        else Continuation(seq, [], seed=seed, error=error)
        for seq, token_id, seed, logprob, can_draw in each
    ]


def check_strategy(strategy: Strategy) -> None:
    """Raise ValueError unless this can be called, and can be a key of a dict (see `Groups`).

    A strategy may have two attributes, which `Request` explains: `max_num_sequences`, at least 1,
    and `runs_together`, a bool.
    """
    sentence = f"strategy is {strategy!r}: it must be callable and hashable"
    if not callable(strategy):
        raise ValueError(sentence)
    try:
        hash(strategy)
        most, together = most_sequences(strategy), runs_together(strategy)
    except Exception as error:
        raise ValueError(sentence) from error
    if type(most) is not int or most < 1 or type(together) is not bool:
        found = f"max_num_sequences is {most!r}, runs_together {together!r}"
        raise ValueError(f"{found}: the strategy needs an int of at least 1 and a bool")


def most_sequences(strategy: Strategy) -> int:
    """How many sequences a strategy makes of a request at most; 1 if it does not say so."""
    return getattr(strategy, "max_num_sequences", 1)


def runs_together(strategy: Strategy) -> bool:
    """Whether a strategy is called with all sequences of a request, or with none of them."""
    return getattr(strategy, "runs_together", False)


def check_sharing(cache_prefix: bool, cache_salt: str | None) -> None:
    """Raise ValueError for a `cache_prefix` or a `cache_salt` of another type."""
    if type(cache_prefix) is not bool:
        raise ValueError(f"cache_prefix is {cache_prefix!r}: it must be True or False")
    if not isinstance(cache_salt, str | None):
        raise ValueError(f"cache_salt is {cache_salt!r}: it must be text or None")


def ask_strategy(
    strategy: Strategy, sequences: list[Sequence], logits: Tensor, vocab_size: int
) -> list[Continuation]:
    """The checked continuations of a strategy that came with a request. `logits` is (B, V).

    If it raises, or returns what cannot be applied, these B sequences end with an error, and no
    others.
    """
    try:
        # A copy of the list, because the strategy may change it and the engine needs it again.
        continuations = list(strategy(list(sequences), logits))
        check_continuations(continuations, sequences, vocab_size)
        return continuations
    except Exception as error:
        sentence = f"the request's strategy failed: {type(error).__name__}: {error}"
        return [Continuation(seq, [], error=sentence) for seq in sequences]


def check_logprobs(c: Continuation) -> None:
    """Raise ValueError unless each token of a continuation has a dict in which it stands itself."""
    if not isinstance(c.logprobs, list) or len(c.logprobs) != len(c.token_ids):
        raise ValueError(f"logprobs is {c.logprobs!r}: a list with one entry a token is needed")
    for token_id, entry in zip(c.token_ids, c.logprobs):
        is_right = isinstance(entry, dict) and token_id in entry
        if not is_right or not all(hasattr(value, "decoded_token") for value in entry.values()):
            raise ValueError(f"logprobs has {entry!r}: a dict of Logprob with {token_id} is needed")


def check_continuations(
    continuations: list[Continuation], sequences: list[Sequence], vocab_size: int
) -> None:
    """Raise ValueError unless continuations can be applied to the sequences that were asked for.

    Each must continue one of them with at least one known token, or end it with an error. A
    sequence without a continuation is dropped, but a request must keep at least one text.
    """
    parents = set(sequences)
    for c in continuations:
        if not isinstance(c, Continuation) or c.parent not in parents:
            raise ValueError(f"{c!r} is no Continuation of one of its sequences")
        if not isinstance(c.error, str | None) or c.stop_string is not None:
            raise ValueError(f"error is {c.error!r}, stop_string {c.stop_string!r}: text, and None")
        if not isinstance(c.token_ids, list) or not (c.token_ids or c.error):
            raise ValueError(f"token_ids is {c.token_ids!r}: a list of at least one id is needed")
        unknown = [i for i in c.token_ids if type(i) is not int or not 0 <= i < vocab_size]
        if unknown:
            raise ValueError(f"token id {unknown[0]!r}: ids are integers below {vocab_size}")
        if c.logprobs is not None:
            check_logprobs(c)
        if c.logprobs is None and c.parent.request.params.needs_logprobs and not c.error:
            raise ValueError("logprobs is None, and the request asked for them")
        if c.seed is not None and (type(c.seed) is not int or not 0 <= c.seed < 2**63):
            raise ValueError(f"seed is {c.seed!r}: it must be an integer from 0 to 2**63 - 1")
    continued = {c.parent.request for c in continuations}
    for request in {seq.request for seq in sequences} - continued:
        # Another of its sequences may wait: the strategy is asked about that one in a later step.
        waits = any(seq.status != FINISHED and seq not in parents for seq in request.sequences)
        if not waits and not any(seq.finish_reason for seq in request.sequences):
            raise ValueError("it returned no continuation for any sequence of the request")


class Sampler:
    """The engine's own strategy: `sample_next`, with rows kept while the sequences are the same."""

    def __init__(self, draw: Draw = draw_tokens):
        self.draw = draw
        self._kept: tuple[list[Sequence], SampleRows] = ([], SampleRows([]))

    def rows(self, sequences: list[Sequence]) -> SampleRows:
        """What the draw needs of each sequence. Call it before the next step is planned."""
        if self._kept[0] != sequences:
            self._kept = (list(sequences), rows_to_draw(sequences))
        rows = self._kept[1]
        for row, seq in zip(rows.rows, sequences, strict=True):
            # After this step tokens [0, 20) are computed -> the drawn token has position 20.
            # (len(token_ids) is 19 if token 19 is still in flight: see speedups/plan_ahead.py.)
            row.position = seq.num_computed_tokens
        return rows

    def __call__(self, sequences: list[Sequence], logits: Tensor) -> list[Continuation]:
        """The strategy: `logits` (B, V) has one row a sequence."""
        return sample_next(sequences, logits, self.draw, self.rows(sequences))


# strategy -> its sequences that get a token, and for each the row of logits (M, V) that it is drawn
# from. None: all M rows in their order.
Groups = dict[Strategy, tuple[list[Sequence], list[int] | None]]


def rows_by_strategy(plan: Plan, counts: list[int]) -> Groups:
    """Which rows of the logits (M, V) each strategy gets.

    `counts` has one number for each entry of `plan.scheduled`: how many of the M rows are its own.
    A sequence that forks into n with its next token stands n times, each time with the same row.
    """
    sampled = set(plan.sampled)  # without the sequences whose prompt is not computed to its end
    groups: dict[Strategy, tuple[list[Sequence], list[int]]] = {}
    end = 0
    for (seq, _, _), num_rows in zip(plan.scheduled, counts, strict=True):
        # Counts 1, 0, 3 -> rows [0, 1), [1, 1) and [1, 4): the logits have no row for the second.
        end += num_rows  # the sequence's rows are [end - num_rows, end)
        if seq in sampled:
            sequences, rows = groups.setdefault(seq.request.strategy, ([], []))
            num = num_children(seq)
            sequences += [seq] * num
            rows += [end - 1] * num  # the row of its newest token predicts the next one
    # Usually all requests share one strategy, and it needs every row: then none is copied.
    whole = list(range(end))
    return {
        strategy: (sequences, None if rows == whole else rows)
        for strategy, (sequences, rows) in groups.items()
    }


# ---- the engine ----------------------------------------------------------------------------------
class Inputs(NamedTuple):
    """A plan, prepared for the forward and the strategies."""

    sequences: list[Sequence]  # those that get a token, each once
    batch: Batch
    groups: Groups
    counts: list[int] | None  # rows of logits of each sequence; None: one each, for its next token


Watcher = Callable[[StepOutput], object]


class InferenceEngine:
    """Owns the loop. `llm.py` builds one; the demo below builds one by hand from its parts.

    One thread calls `step`. Any thread may call `add_request` and `abort` at any time, also while a
    step runs: both take effect when the next step begins. `watchers` are functions that get the
    output of each step, in the thread that steps; one that raises is removed, with a warning. A
    watcher or a strategy may call `add_request` and `abort` too, but not `step`.
    """

    def __init__(
        self,
        forward: Forward,
        cache: KVCache,
        scheduler: Scheduler,
        vocab_size: int,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Iterable[int] = (),
        seed: int = 0,
        draw: Draw = draw_tokens,
        watchers: Iterable[Watcher] = (),
    ):
        # The cache owns the memory of the blocks. The scheduler's allocator decides which sequence
        # holds which block. Only block ids pass between the two, in the plan.
        self.forward = forward
        self.cache = cache
        self.scheduler = scheduler
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        # An id outside the vocabulary is never drawn, so it cannot end a text.
        self.eos_token_ids = tuple(i for i in eos_token_ids if 0 <= i < vocab_size)
        self.seed = seed
        self.sampler = Sampler(draw)
        self.output_processor = OutputProcessor(scheduler, tokenizer)
        self.watchers: list[Watcher] = list(watchers)
        # Requests by id, until their output is handed over or an abort takes effect.
        self.requests: dict[str, Request] = {}
        # New and aborted requests, for the next step. Other threads write to the dict and the deque
        # too. Each write is one operation of the interpreter, so no lock is needed.
        self._inbox: deque[Request] = deque()
        self._numbers = count()  # of requests: the next id and arrival
        # What the next output reports. They are dicts, because a step that was interrupted enters a
        # request twice.
        self._added: dict[Request, None] = {}
        self._aborted: dict[Request, None] = {}
        # Blocks counted since the start: at the last output that was handed over, and now.
        self._reported_totals = self._totals = self._count_blocks()
        # What `step` needs to undo an interrupted step:
        self._is_whole = True  # False in a step, and after an exception until the repair is done
        self._plan: Plan | None = None  # of the step that runs
        self._output: StepOutput | None = None  # of a step that is done and not handed over
        self._watchers_left: list[Watcher] = []  # those that have not got this output yet
        # Inputs of the last decode step. The next one changes them in place.
        self._carried: Inputs | None = None

    # ---- the loop ----
    def run_step(self) -> StepOutput:
        """The loop's body: one step for the sequences that the scheduler picks. `step` calls it."""
        clock = Clock()
        self._take_requests()
        plan = self._plan = self.scheduler.schedule()
        clock.lap("schedule")
        if plan.scheduled:  # empty if nothing waits or runs
            self.cache.copy_blocks(plan.copies)  # before the forward writes into the copies
            inputs = self._inputs_of(plan)
            logits = self.forward(inputs.batch)  # (M, V), one row for each of batch.sample_rows
            clock.lap("forward")
            continuations = self._continuations(plan, inputs, logits)
            clock.lap("sample")
            continuations = self.output_processor.find_stops(continuations)
            self.scheduler.update(plan, continuations)
        return self._report(plan, clock)

    def _inputs_of(self, plan: Plan, in_flight: bool = False) -> Inputs:
        """A plan's tokens as tensors in host memory; the forward moves them to its device.

        While the same sequences decode step after step, the batch of the step before is changed in
        place. `in_flight`: the tokens of that step are not known yet. The batch has any id in their
        place, and the caller replaces them (see speedups/plan_ahead.py).
        """
        sequences = plan.sampled
        block_size, scratch_block = self.cache.block_size, self.cache.scratch_block
        # Each sequence computes one token and gets a next one.
        is_decode = plan.num_tokens == len(sequences) == len(plan.scheduled)
        inputs = self._carried
        is_same = inputs is not None and inputs.sequences == sequences
        if inputs is not None and is_same and is_decode and not (plan.started or plan.copies):
            token_ids = None if in_flight else [seq.token_ids[-1] for seq in sequences]
            tables = [seq.block_table for seq in sequences]
            advance(inputs.batch, token_ids, tables, block_size, scratch_block)
            return inputs
        self._carried = None
        # 1 row of logits for a decode or the end of a prompt, 0 for a chunk before that, and all
        # rows of a prompt whose log-probabilities were asked for.
        counts = [self.output_processor.num_sample_rows(entry) for entry in plan.scheduled]
        rows = []
        for (seq, start, num_new_tokens), num_rows in zip(plan.scheduled, counts, strict=True):
            # Positions [start, start + num_new_tokens) are computed. The block table gives them the
            # slots where their K and V are written. K and V of earlier positions are only read.
            # If all known tokens are computed, the new one is in flight: 0 stands for it.
            ids = [*seq.token_ids, 0] if start == len(seq.token_ids) else seq.token_ids
            rows.append(Row(ids, start, num_new_tokens, seq.block_table, num_rows))
        batch = make_batch(rows, block_size, scratch_block)
        groups = rows_by_strategy(plan, counts)
        forks = sum(len(group) for group, _ in groups.values()) > len(sequences)
        if is_decode and not forks:
            self._carried = Inputs(sequences, batch, groups, None)
        return Inputs(sequences, batch, groups, counts)

    def _continuations(self, plan: Plan, inputs: Inputs, logits: Tensor) -> list[Continuation]:
        """Ask each strategy how its sequences continue."""
        if inputs.counts is not None:
            self.output_processor.score_prompts(plan, inputs.counts, logits)
        continuations = []
        for strategy, (sequences, rows) in inputs.groups.items():
            chosen = logits if rows is None else logits[rows]
            if strategy is self.sampler:
                continuations += self.sampler(sequences, chosen)
            else:
                continuations += ask_strategy(strategy, sequences, chosen, self.vocab_size)
        return continuations

    def _report(self, plan: Plan, clock: Clock) -> StepOutput:
        """The output of a step after its update."""
        processor = self.output_processor
        finished = [
            processor.request_output(request)
            for request in processor.finish_step(plan, clock.started)
            # If another thread has aborted it in this moment, "by" is set and there is no output.
            if request.end.setdefault("by", "step") == "step"
        ]
        # A difference of totals: blocks that an abort freed before this step are counted too.
        self._totals = self._count_blocks()
        pairs = zip(self._totals, self._reported_totals, strict=True)
        blocks = BlockCounts(*(now - before for now, before in pairs))
        blocks = blocks._replace(
            copied=len(plan.copies), swapped=len(plan.swap_in) + len(plan.swap_out)
        )
        clock.lap("update")
        return StepOutput(
            plan=plan,
            finished=finished,
            added=list(self._added),
            aborted=list(self._aborted),
            blocks=blocks,
            timings=Timings(**clock.laps_ms),
            tokenizer=self.tokenizer,
        )

    # ---- a step is done as a whole, or not at all ----
    def step(self) -> StepOutput:
        """Run one step and call the watchers. Only one thread may step, and no watcher or strategy.

        An exception, or Ctrl-C at any line, undoes the whole step: its tokens are removed, and all
        running sequences go back to the waiting queue. The next call repeats the step and draws the
        same tokens, because a draw has no random state. If the exception comes after `run_step`, in
        a watcher for example, the step is done: the next call returns its output.
        """
        if not self._is_whole:  # Ctrl-C has interrupted the repair, too
            self._repair()
        self._is_whole = False
        output = None
        try:
            if self._output is None:
                # What torch.inference_mode() does: nothing is recorded for gradients. But that is a
                # Python function, and Ctrl-C in the middle of it would leave the mode switched on.
                with torch._C._InferenceMode(True):
                    self._watchers_left, self._output = list(self.watchers), self.run_step()
            self._call_watchers(self._output)
            self._commit(self._output)
            self._is_whole = True
            # Python handles a signal only at a call or when a loop repeats. From here to the
            # caller's assignment there is neither, so the output cannot be lost.
            output, self._output = self._output, None
            return output
        except BaseException as error:
            self._output = self._output or output
            self._repair()
            # Ctrl-C in a function of Numba arrives as the cause of a SystemError, or of several.
            while isinstance(error, SystemError) and error.__cause__ is not None:
                error = error.__cause__
            raise error

    def _commit(self, output: StepOutput) -> None:
        """Remove what an output has reported, so that no later one does. Twice is harmless."""
        self._plan = None
        for finished in output.finished:
            self.requests.pop(finished.request_id, None)
        for request in output.added:
            self._added.pop(request, None)
        for request in output.aborted:
            self._aborted.pop(request, None)
        self._reported_totals = self._totals

    def _call_watchers(self, output: StepOutput) -> None:
        """Call each watcher once with an output, even if Ctrl-C interrupts one of them."""
        while self._watchers_left:
            # No signal is handled between this line and the call of the watcher: see `step`.
            watcher, *self._watchers_left = self._watchers_left
            try:
                watcher(output)
            except Exception as error:
                self.watchers[:] = [other for other in self.watchers if other is not watcher]
                warnings.warn(f"{watcher} raised {error!r}: it no longer watches", stacklevel=2)

    def _repair(self) -> None:
        """Put everything in order after an exception. Running it twice is harmless.

        The requests and their tokens are kept. The queues, the block tables and the decoders of
        texts may be half changed, so they are made again from the tokens.
        """
        self._is_whole = False
        if self._output is None and self._plan is not None:
            self.scheduler.take_back(self._plan)
        self._plan = self._carried = None
        # Another thread may add a request during the loop. `list` copies in one operation.
        requests = [request for request in list(self.requests.values()) if request.is_queued]
        for request in requests:
            if request.end.get("by") == "step" and self._output is None:
                request.end.clear()  # the step that ended it is undone
            for seq in request.sequences:
                seq.decoder = None
        self.scheduler.rebuild(requests)
        self._is_whole = True

    # ---- requests ----
    def add_request(
        self,
        prompt: str | list[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        user: str | None = None,
        deadline: float | None = None,
        strategy: Strategy | None = None,
        cache_prefix: bool = True,
        cache_salt: str | None = None,
    ) -> str:
        """Queue a prompt, text or token ids; returns the request's id.

        `strategy` None is sampling; `check_strategy` says what another may be. `priority`, `user`
        and `deadline` are for a policy to read; first come first served reads none of them. If the
        allocator is a prefix cache, the request shares blocks with those that have the same
        `cache_salt`; with `cache_prefix=False` it finds none and leaves none. Raises ValueError,
        and keeps nothing, if the prompt is empty, has unknown ids, leaves no room in the context,
        or could never fit into the pool; if another argument is not what it must be; if the policy
        or reserve function fails. These two are called here first, in the caller's thread.
        """
        params = SamplingParams() if params is None else params
        if strategy is None:
            strategy = self.sampler
        else:
            check_strategy(strategy)
        check_sharing(cache_prefix, cache_salt)
        prompt_token_ids = self._check_prompt(prompt, params)
        number = next(self._numbers)
        request = Request(
            request_id=str(number),
            prompt_token_ids=prompt_token_ids,
            arrival=number,
            priority=priority,
            user=user,
            deadline=deadline,
            params=params,
            strategy=strategy,
            max_num_sequences=max(params.num_sampled, most_sequences(strategy)),
            runs_together=runs_together(strategy),
            eos_token_ids=self.eos_token_ids,
            bad_words_ids=self._encode_bad_words(params),
            seed=child_seed(self.seed, number) if params.seed is None else params.seed,
            prompt=prompt if isinstance(prompt, str) else None,
            cache_prefix=cache_prefix,
            cache_salt=cache_salt,
        )
        if params.prompt_logprobs is not None:
            # Nothing precedes a prompt's first token, so nothing predicts it.
            request.prompt_logprobs = [None]
        request.sequences = [self._new_sequence(request)]
        self.scheduler.check(request)
        try:
            self.requests[request.request_id] = request
            self._inbox.append(request)
            return request.request_id
        except BaseException:  # Ctrl-C: the caller gets no id, so nothing is kept
            request.end["by"] = "abort"  # a step in another thread may have queued it already
            self._inbox.append(request)
            self.requests.pop(request.request_id, None)
            raise

    def _new_sequence(self, request: Request) -> Sequence:
        """A request's first sequence; if it asks for n texts, the others are forks of this one."""
        params, prompt = request.params, request.prompt_token_ids
        stop_token_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_token_ids.update(self.eos_token_ids)
        return Sequence(
            request=request,
            index=0,
            token_ids=list(prompt),  # a copy: the sequence appends to it
            num_prompt_tokens=len(prompt),
            max_tokens=params.max_tokens or self.scheduler.max_seq_len - len(prompt),
            min_tokens=params.min_tokens,
            stop_token_ids=frozenset(stop_token_ids),
            # A hash, not a sum: with seed + index, text 2 of seed 1 would equal text 1 of seed 2.
            seed=child_seed(request.seed, 0),
        )

    def has_unfinished(self) -> bool:
        """Whether a further `step()` has anything to do."""
        return bool(self.requests or self._inbox or self._output)

    def abort(self, request_id: str) -> bool:
        """End a request in any state. False if it has ended or is not known: nothing changes then.

        After True the engine returns no output of it. Its blocks are freed when the next step
        begins. Of several calls for one request only one returns True.
        """
        request = self.requests.get(request_id)
        if request is None:
            return False
        # The step, or another abort (of a thread, of a signal handler), may end this request at the
        # same moment. `setdefault` is one operation: the first to call it has ended the request.
        claim = object()
        try:
            is_first = request.end.setdefault("by", claim) is claim
            if is_first:
                self._inbox.append(request)
            return is_first
        except BaseException:  # Ctrl-C: the caller gets no answer, so the request goes on
            if request.end.get("by") is claim:
                request.end.clear()
            raise

    def _take_requests(self) -> None:
        """Give the scheduler the requests that were added or aborted. A step begins with it."""
        for _ in range(len(self._inbox)):  # requests added during this loop wait for the next step
            # Ctrl-C may come at any line. The entry is removed at the end, so that the next step
            # handles it again. To queue or to drop a request twice is harmless.
            request = self._inbox[0]
            if request.is_aborted:
                self._drop(request)
            elif not request.is_queued:
                self._queue(request)
            self._inbox.popleft()

    def _queue(self, request: Request) -> None:
        self.scheduler.enqueue(request)
        self._added[request] = None
        request.is_queued = True

    def _drop(self, request: Request) -> None:
        if request.is_queued:  # otherwise the scheduler does not know it
            for seq in request.sequences:
                self.scheduler.finish(seq, "abort")
            self._aborted[request] = None
        self.requests.pop(request.request_id, None)

    # ---- small parts ----
    def _check_prompt(self, prompt: str | list[int], params: SamplingParams) -> list[int]:
        """A prompt's token ids, if it can be served; otherwise a ValueError in one sentence."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params is a {type(params).__name__}: give a SamplingParams")
        params.check_vocabulary(self.vocab_size)
        ids = self._encode(prompt, params)
        if not ids:
            raise ValueError("the prompt is empty: give at least one token")
        # `type(i) is not int`, because to Python True is the integer 1.
        unknown = [i for i in ids if type(i) is not int or not 0 <= i < self.vocab_size]
        if unknown:
            known = f"ids are integers from 0 to {self.vocab_size - 1}"
            raise ValueError(f"the prompt has token id {short_repr(unknown[0])}: {known}")
        max_seq_len = self.scheduler.max_seq_len
        # `>=`: a prompt that fills the context leaves no position for a generated token.
        if len(ids) >= max_seq_len:
            found = f"prompt has {len(ids)} tokens, max_seq_len is {max_seq_len}"
            raise ValueError(f"{found}: shorten it")
        return list(ids)

    def _encode(self, prompt: str | list[int], params: SamplingParams) -> list[int]:
        """The token ids of a text; a list as it is. ValueError where a tokenizer is missing."""
        if self.tokenizer is not None and isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        asks_for_text = params.stop or params.bad_words
        if self.tokenizer is None and (isinstance(prompt, str) or asks_for_text):
            asked = "a stop string" if params.stop else "a bad word"
            asked = "a text prompt" if isinstance(prompt, str) else asked
            raise ValueError(f"{asked} needs a tokenizer, and this model has none: give token ids")
        if not isinstance(prompt, list):
            kind = type(prompt).__name__
            raise ValueError(f"the prompt is of type {kind}: give text or a list of token ids")
        return prompt

    def _encode_bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """The tokens of each bad word, at the beginning of a text and, as vLLM, after a space.

        The form after a space counts if it is another first token and as long.
        """
        words: list[tuple[int, ...]] = []
        for word in params.bad_words or ():
            assert self.tokenizer is not None  # `_encode` has refused it
            plain, spaced = (tuple(self.tokenizer.encode(s + word.lstrip())) for s in ("", " "))
            words.append(plain)
            if len(spaced) == len(plain) and spaced[0] != plain[0]:
                words.append(spaced)
        return tuple(words)

    def _count_blocks(self) -> BlockCounts:
        """Totals of the scheduler and its allocator since the start."""
        scheduler = self.scheduler
        return BlockCounts(
            taken=scheduler.num_blocks_taken,
            freed=scheduler.num_blocks_freed,
            hit=scheduler.num_blocks_hit,
            evicted=scheduler.allocator.num_evicted,
        )


# --------------------------------------------------------------------------------------------------
NUM_BLOCKS = 9
MAX_NUM_BATCHED_TOKENS = 12
PROMPTS = [[7, 3, 9, 1, 4], list(range(20, 34)), [5, 5]]  # of A, B and C: 5, 14 and 2 tokens
MAX_TOKENS = [8, 5, 9]


def demo():
    """Three prompts through one pool, one line a step; then each alone and without any cache."""
    config = GPTConfig(vocab_size=64, max_seq_len=64, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config).init_weights(std=0.2).double().eval()
    # In float64 the order of a sum changes digits that are too small to change a token.
    cache = KVCache(2, NUM_BLOCKS, 4, num_kv_heads=2, head_dim=16, dtype=torch.float64)
    allocator = BlockAllocator(NUM_BLOCKS, block_size=4)
    scheduler = Scheduler(allocator, 8, MAX_NUM_BATCHED_TOKENS, max_seq_len=64)
    engine = InferenceEngine(eager_forward(model, cache), cache, scheduler, vocab_size=64)
    for prompt, max_tokens in zip(PROMPTS, MAX_TOKENS, strict=True):
        engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=max_tokens))

    print(f"step  rows  computed in this step [start, end)            {NUM_BLOCKS} blocks of 4")
    written: dict[str, list[int]] = {}
    num_steps = 0
    while engine.has_unfinished():
        output = engine.step()
        num_steps += 1
        show_step(num_steps, output, scheduler)
        written |= {o.request_id: o.outputs[0].token_ids for o in output.finished}

    for i, (prompt, max_tokens) in enumerate(zip(PROMPTS, MAX_TOKENS, strict=True)):
        assert written[str(i)] == write_alone(model, prompt, max_tokens)
        print(f"{'ABC'[i]} wrote {written[str(i)]}")
    assert allocator.num_free == NUM_BLOCKS
    print("ok: the batch wrote the same tokens as each prompt alone without a cache")


def show_step(number: int, output: StepOutput, scheduler: Scheduler) -> None:
    """One line: what each sequence computed, and which blocks it holds afterwards."""

    def name(seq: Sequence) -> str:
        return "ABC"[int(seq.request.request_id)]

    spans = [f"{name(seq)}[{start},{start + n})" for seq, start, n in output.plan.scheduled]
    cells = ["."] * NUM_BLOCKS
    for seq in scheduler.running:
        for block_id in seq.block_table:
            cells[block_id] = name(seq)
    print(f"{number:4} {output.plan.num_tokens:5}  {'  '.join(spans):48} |{''.join(cells)}|")


def write_alone(model: GPT, prompt: list[int], max_tokens: int) -> list[int]:
    """The oracle: no cache and no batch, all tokens computed again for each new one."""
    ids = list(prompt)
    for _ in range(max_tokens):
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), attend_one_sequence)
        ids.append(int(model.logits(hidden[-1:]).argmax()))
    return ids[len(prompt) :]


if __name__ == "__main__":
    demo()
