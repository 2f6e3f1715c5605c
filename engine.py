"""schedule, forward, sample, repeat: the loop that every serving engine comes down to.

Ten requests served one after the other read all of the model's weights once for each token of each
request. Served together, one reading gives a token to each of the ten, and decoding is bound by
just that reading. So the engine runs whoever the scheduler picks as one flat batch, step after
step, and requests join and leave between any two steps:

    add_request ─> waiting ─┐                                     ┌─> finished: blocks back, output
                            └─> schedule ─> forward ─> sample ─> update ─┐
                                   ^       (all sequences at once)       │
                                   └─────────────────────────────────────┘

Two things come from outside. `forward(batch) -> logits` runs the model: here eagerly, elsewhere as
a recorded graph. And each request has a strategy, which turns the logits of its sequences into
their continuations: one token each (sampling), several children (beams), several tokens (an
accepted draft). `step()` knows neither, and hosts no guests: recorders, metrics and progress bars
live on the `StepOutput` it returns. What a production engine does beyond this: plans the next step
while the device still runs this one (`plan_ahead.py`), and serves from processes of their own.

Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI.
Run: python engine.py
Try: max_num_batched_tokens=4 in the demo (watch the long prompt arrive in pieces), or
num_blocks=7 (somebody is preempted, and writes the same text all the same).
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from block_allocator import BlockAllocator
from kv_cache import Batch, KVCache, Row, make_batch, write_kv
from model import GPT, GPTConfig, attend_one_sequence
from outputs import OutputProcessor, StepOutput, Tokenizer
from paged_attention import paged_attention
from sampling import SampleRow, SamplingParams, child_seed, collect_logprobs, draw_tokens
from scheduler import Scheduler
from sequence import Continuation, Plan, Request, Sequence

Forward = Callable[[Batch], Tensor]  # -> logits (M, V) of batch.sample_rows
Strategy = Callable[[list[Sequence], Tensor], list[Continuation]]  # logits: one row a sequence
Draw = Callable[[Tensor, list[SampleRow]], tuple[Tensor, Tensor]]  # see `sampling.draw_tokens`


def eager_forward(
    model: GPT, cache: KVCache, attention: Callable = paged_attention, write: Callable = write_kv
) -> Forward:
    """The plain forward: every layer in turn, logits of the sample rows only."""

    def forward(batch: Batch) -> Tensor:
        batch = batch.to(cache.pool.device)
        attend = cache.attend(batch, attention, write)
        return model.logits(model(batch.input_ids, batch.positions, attend, batch.sample_rows))

    return forward


def rows_to_draw(sequences: list[Sequence]) -> list[SampleRow]:
    """What a sampler has to know of each sequence, to draw its next token."""
    return [
        SampleRow(
            params=seq.request.params,
            seed=seq.seed,
            position=len(seq.token_ids),
            token_ids=seq.token_ids,
            num_prompt_tokens=seq.num_prompt_tokens,
            eos_token_id=seq.request.eos_token_id,
        )
        for seq in sequences
    ]


def sample_next(
    sequences: list[Sequence], logits: Tensor, draw: Draw = draw_tokens
) -> list[Continuation]:
    """The strategy of ordinary requests: a token for each sequence, all in one vectorised call."""
    rows = rows_to_draw(sequences)
    token_ids, peaks = draw(logits, rows)
    logprobs = collect_logprobs(logits, rows, token_ids, peaks)
    return [
        Continuation(seq, [token_id], None if logprob is None else [logprob])
        for seq, token_id, logprob in zip(sequences, token_ids.tolist(), logprobs, strict=True)
    ]


def rows_by_strategy(
    plan: Plan, counts: list[int]
) -> dict[Strategy, tuple[list[Sequence], list[int]]]:
    """Each strategy's sequences that get a token, and which of the M rows of logits it comes from.

    `counts` are the numbers of rows that the plan's sequences have among the M.
    """
    sampled = set(plan.sampled)
    groups: dict[Strategy, tuple[list[Sequence], list[int]]] = {}
    end = 0
    for (seq, _, _), count in zip(plan.scheduled, counts, strict=True):
        end += count  # the sequence's rows are [end - count, end)
        if seq in sampled:
            sequences, rows = groups.setdefault(seq.request.strategy, ([], []))
            sequences.append(seq)
            rows.append(end - 1)  # the row of its newest token predicts the next one
    return groups


class InferenceEngine:
    """Owns the loop. Built by `llm.py`, or by hand from its parts as in the demo below."""

    steps_overlap = False  # True where a step is launched before the last one was read

    def __init__(
        self,
        forward: Forward,
        cache: KVCache,
        scheduler: Scheduler,
        vocab_size: int,
        tokenizer: Tokenizer | None = None,
        eos_token_id: int | None = None,
        seed: int = 0,
        draw: Draw = draw_tokens,
    ):
        self.forward = forward
        self.cache = cache
        self.scheduler = scheduler
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        known = eos_token_id is not None and 0 <= eos_token_id < vocab_size
        self.eos_token_id = eos_token_id if known else None  # an id it has not never comes
        self.seed = seed
        self.strategy: Strategy = partial(sample_next, draw=draw)
        self.output_processor = OutputProcessor(scheduler, tokenizer)
        self._num_requests = 0
        self._counted = self._count_blocks()

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
    ) -> str:
        """Queue a prompt, text or token ids; returns the request's id.

        `strategy` None is sampling. `priority`, `user` and `deadline` are for a policy to read;
        first come first served reads none of them. Raises ValueError, and keeps nothing, if the
        prompt is empty, has unknown ids, leaves no room in the context, or could never fit into
        the pool.
        """
        params = SamplingParams() if params is None else params
        prompt_token_ids = self._check_prompt(prompt, params)
        arrival = self._num_requests
        request = Request(
            request_id=str(arrival),
            prompt_token_ids=prompt_token_ids,
            arrival=arrival,
            priority=priority,
            user=user,
            deadline=deadline,
            params=params,
            strategy=strategy or self.strategy,
            eos_token_id=self.eos_token_id,
        )
        max_seq_len = self.scheduler.max_seq_len
        stop_token_ids = set(params.stop_token_ids)
        if self.eos_token_id is not None and not params.ignore_eos:
            stop_token_ids.add(self.eos_token_id)
        seed = child_seed(self.seed, arrival) if params.seed is None else params.seed
        for index in range(params.n):
            seq = Sequence(
                request=request,
                index=index,
                token_ids=list(prompt_token_ids),
                num_prompt_tokens=len(prompt_token_ids),
                max_tokens=params.max_tokens or max_seq_len - len(prompt_token_ids),
                min_tokens=params.min_tokens,
                stop_token_ids=frozenset(stop_token_ids),
                seed=child_seed(seed, index),
            )
            request.sequences.append(seq)
        self.scheduler.add(request)
        self._num_requests += 1
        self.output_processor.add(request, prompt if isinstance(prompt, str) else None)
        return request.request_id

    def has_unfinished(self) -> bool:
        """Whether a further `step()` has anything to do."""
        return self.scheduler.has_unfinished()

    def abort(self, request_id: str) -> bool:
        """End a request in whatever state it is, free its blocks at once; False if it is gone."""
        request = self.output_processor.remove(request_id)
        if request is None:
            return False
        for seq in request.sequences:
            self.scheduler.finish(seq, "abort")
        return True

    # ---- the loop ----
    @torch.inference_mode()
    def step(self) -> StepOutput:
        """Run one step for whoever the scheduler picks."""
        started = time.monotonic()
        return self._run(self.scheduler.schedule(), started)

    def _run(self, plan: Plan, started: float) -> StepOutput:
        """Carry a plan out from the first copy to the last text."""
        try:
            self.cache.copy_blocks(plan.copies)
            continuations = self._continue(plan) if plan.scheduled else []
        except BaseException:
            self.scheduler.undo(plan)  # interrupted: whatever was planned is computed again
            raise
        return self._finish(plan, continuations, started)

    def _finish(self, plan: Plan, continuations: list[Continuation], started: float) -> StepOutput:
        """Apply what the strategies said, and say what the step did."""
        self.scheduler.update(plan, continuations)
        outputs = self.output_processor.process(plan, started)
        before, self._counted = self._counted, self._count_blocks()
        taken, freed, hit, evicted = (b - a for a, b in zip(before, self._counted, strict=True))
        swapped = len(plan.swap_in) + len(plan.swap_out)
        milliseconds = (time.monotonic() - started) * 1e3
        counts = (taken, freed, len(plan.copies), hit, evicted, swapped)
        return StepOutput(plan, outputs, *counts, milliseconds)

    def _continue(self, plan: Plan) -> list[Continuation]:
        """Run the model, then ask each strategy how its sequences continue."""
        counts = [self.output_processor.num_sample_rows(entry) for entry in plan.scheduled]
        logits = self.forward(self._batch_of(plan, counts))  # (M, V), M = sum(counts)
        self.output_processor.collect_prompt_logprobs(plan, counts, logits)
        continuations = []
        for strategy, (sequences, rows) in rows_by_strategy(plan, counts).items():
            # Nearly always one strategy needs every row: then none is copied.
            chosen = logits if len(rows) == len(logits) else logits[rows]
            continuations += strategy(sequences, chosen)
        return continuations

    # ---- small parts ----
    def _batch_of(self, plan: Plan, counts: list[int]) -> Batch:
        """A plan's tokens as tensors in host memory: how they get to the model, a forward knows.

        `counts` says how many of each sequence's last rows want logits.
        """
        rows = [
            Row(seq.token_ids, start, num_new_tokens, seq.block_table, count)
            for (seq, start, num_new_tokens), count in zip(plan.scheduled, counts, strict=True)
        ]
        return make_batch(rows, self.cache.block_size, self.cache.scratch_block)

    def _check_prompt(self, prompt: str | list[int], params: SamplingParams) -> list[int]:
        """Token ids of a prompt that can be served, or a ValueError in one sentence."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params is a {type(params).__name__}: give a SamplingParams")
        if self.tokenizer is None and (isinstance(prompt, str) or params.stop):
            what = "a text prompt" if isinstance(prompt, str) else "a stop string"
            raise ValueError(f"{what} needs a tokenizer, and this model has none: give token ids")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not isinstance(ids, list):
            kind = type(ids).__name__
            raise ValueError(f"the prompt is of type {kind}: give text or a list of token ids")
        if not ids:
            raise ValueError("the prompt is empty: give at least one token")
        unknown = [i for i in ids if type(i) is not int or not 0 <= i < self.vocab_size]
        if unknown:
            known = f"ids are integers from 0 to {self.vocab_size - 1}"
            raise ValueError(f"the prompt has token id {unknown[0]!r}: {known}")
        params.check_vocabulary(self.vocab_size)
        if len(ids) >= self.scheduler.max_seq_len:
            limit = self.scheduler.max_seq_len
            raise ValueError(f"prompt has {len(ids)} tokens, max_seq_len is {limit}: shorten it")
        return list(ids)

    def _count_blocks(self) -> tuple[int, int, int, int]:
        scheduler = self.scheduler
        taken, freed = scheduler.num_blocks_taken, scheduler.num_blocks_freed
        return taken, freed, scheduler.num_blocks_hit, scheduler.allocator.num_evicted


# --------------------------------------------------------------------------------------------------
def demo():
    """Three prompts through one pool, one line a step; then each alone and without any cache."""
    config = GPTConfig(vocab_size=64, max_seq_len=64, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config).init_weights(std=0.2).double().eval()
    num_blocks, block_size = 9, 4
    cache = KVCache(2, num_blocks, block_size, 2, 16, torch.float64)
    scheduler = Scheduler(BlockAllocator(num_blocks, block_size), 8, 12, 64)
    engine = InferenceEngine(eager_forward(model, cache), cache, scheduler, vocab_size=64)
    prompts = [[7, 3, 9, 1, 4], list(range(20, 34)), [5, 5]]
    wanted = [8, 5, 9]
    for prompt, num in zip(prompts, wanted, strict=True):
        engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=num))

    print("step  rows  computed in this step [start, end)            pool, 9 blocks of 4")
    done, number = {}, 0
    while engine.has_unfinished():
        output = engine.step()
        spans = {
            f"{'ABC'[int(seq.request.request_id)]}[{start},{start + n})"
            for seq, start, n in output.plan.scheduled
        }
        cells = ["."] * num_blocks
        for seq in scheduler.running:
            for block_id in seq.block_table:
                cells[block_id] = "ABC"[int(seq.request.request_id)]
        number += 1
        pool = "".join(cells)
        print(f"{number:4} {output.plan.num_tokens:5}  {'  '.join(sorted(spans)):48} |{pool}|")
        done |= {o.request_id: o.outputs[0].token_ids for o in output.outputs if o.finished}

    for i, (prompt, num) in enumerate(zip(prompts, wanted, strict=True)):
        ids = list(prompt)  # the oracle: no cache, no batch
        for _ in range(num):
            everything = torch.tensor(ids), torch.arange(len(ids))
            hidden = model(*everything, attend_one_sequence)
            ids.append(model.logits(hidden[-1:]).argmax().item())
        assert done[str(i)] == ids[len(prompt) :]
        print(f"{'ABC'[i]} wrote {done[str(i)]}")
    assert scheduler.allocator.num_free == num_blocks
    print("ok: batched and paged, the tokens are those of one-at-a-time without a cache")


if __name__ == "__main__":
    demo()
