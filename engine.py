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
(beam search), or several tokens (speculative decoding). `step()` is the same for all of them.
Recorders and progress bars read the `StepOutput` that it returns. vLLM can plan the next step while
the device still runs this one, as speedups/plan_ahead.py does.

Yu et al. 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI,
section 3.
Run: python engine.py
Try: MAX_NUM_BATCHED_TOKENS = 4 in the demo: B's prompt of 14 tokens arrives in pieces. Or
NUM_BLOCKS = 7: B and C are preempted, compute their tokens again, and write the same texts.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

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

Forward = Callable[[Batch], Tensor]  # -> logits (M, V) of the M rows in batch.sample_rows
Strategy = Callable[[list[Sequence], Tensor], list[Continuation]]  # logits: one row a sequence
# logits (M, V), a SampleRow for each -> token ids (M,), largest logits (M,): `draw_tokens`
Draw = Callable[[Tensor, list[SampleRow]], tuple[Tensor, Tensor]]


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


def rows_to_draw(sequences: list[Sequence]) -> list[SampleRow]:
    """What a sampler needs to draw each sequence's next token."""
    return [
        SampleRow(
            params=seq.request.params,
            seed=seq.seed,
            position=len(seq.token_ids),  # of the token that is drawn: 20 tokens -> position 20
            token_ids=seq.token_ids,  # for the penalties and min_tokens; not copied
            num_prompt_tokens=seq.num_prompt_tokens,
            eos_token_id=seq.request.eos_token_id,
        )
        for seq in sequences
    ]


def sample_next(
    sequences: list[Sequence], logits: Tensor, draw: Draw = draw_tokens
) -> list[Continuation]:
    """The strategy of ordinary requests: one token for each sequence, in one vectorised call.

    `logits` is (B, V), one row a sequence.
    """
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
    sampled = set(plan.sampled)  # the sequences in the middle of a prompt are not in it
    groups: dict[Strategy, tuple[list[Sequence], list[int]]] = {}
    end = 0
    for (seq, _, _), count in zip(plan.scheduled, counts, strict=True):
        # Counts 1, 0, 3 -> rows [0, 1), [1, 1) and [1, 4): the logits have no row for the second.
        end += count  # the sequence's rows are [end - count, end)
        if seq in sampled:
            sequences, rows = groups.setdefault(seq.request.strategy, ([], []))
            sequences.append(seq)
            rows.append(end - 1)  # the row of its newest token predicts the next one
    return groups


class BlockCounts(NamedTuple):
    """Totals of the scheduler and its allocator since the start, in blocks."""

    taken: int
    freed: int
    hit: int
    evicted: int


class InferenceEngine:
    """Owns the loop. `llm.py` builds one; the demo below builds one by hand from its parts."""

    steps_overlap = False  # True in an engine that launches a step before it reads the last tokens

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
        # The cache owns the memory of the blocks. The scheduler's allocator decides which sequence
        # holds which block. Only block ids pass between the two, in the plan.
        self.forward = forward
        self.cache = cache
        self.scheduler = scheduler
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        # An id outside the vocabulary is never drawn, so it cannot end a text.
        is_drawable = eos_token_id is not None and 0 <= eos_token_id < vocab_size
        self.eos_token_id = eos_token_id if is_drawable else None
        self.seed = seed
        self.strategy: Strategy = partial(sample_next, draw=draw)
        self.output_processor = OutputProcessor(scheduler, tokenizer)
        self._num_requests = 0  # also the next request's id and arrival
        self._counted = self._count_blocks()  # the totals that were reported so far

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
        # Both checks, of the prompt here and of the pool in `scheduler.add`, come before anything
        # is kept: a refused request leaves no trace.
        request = Request(
            request_id=str(self._num_requests),
            prompt_token_ids=self._check_prompt(prompt, params),
            arrival=self._num_requests,
            priority=priority,
            user=user,
            deadline=deadline,
            params=params,
            strategy=strategy or self.strategy,
            eos_token_id=self.eos_token_id,
        )
        request.sequences = [self._new_sequence(request, index) for index in range(params.n)]
        self.scheduler.add(request)  # raises ValueError if the pool is too small for it
        self._num_requests += 1
        self.output_processor.add(request, prompt if isinstance(prompt, str) else None)
        return request.request_id

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        """The sequence of one of the `n` texts that a request asks for."""
        params, prompt = request.params, request.prompt_token_ids
        stop_token_ids = set(params.stop_token_ids)
        if self.eos_token_id is not None and not params.ignore_eos:
            stop_token_ids.add(self.eos_token_id)
        # A hash, not a sum: with seed + index, text 2 of seed 1 would equal text 1 of seed 2.
        seed = child_seed(self.seed, request.arrival) if params.seed is None else params.seed
        return Sequence(
            request=request,
            index=index,
            token_ids=list(prompt),  # a copy: the sequence appends to it
            num_prompt_tokens=len(prompt),
            max_tokens=params.max_tokens or self.scheduler.max_seq_len - len(prompt),
            min_tokens=params.min_tokens,
            stop_token_ids=frozenset(stop_token_ids),
            seed=child_seed(seed, index),
        )

    def has_unfinished(self) -> bool:
        """Whether a further `step()` has anything to do."""
        return self.scheduler.has_unfinished()

    def abort(self, request_id: str) -> bool:
        """End a request in any state and free its blocks at once; False if it has ended already."""
        request = self.output_processor.remove(request_id)
        if request is None:
            return False
        # A step that is running may still compute these sequences. Its `update` skips those that
        # have ended.
        for seq in request.sequences:
            self.scheduler.finish(seq, "abort")
        return True

    # ---- the loop ----
    @torch.inference_mode()
    def step(self) -> StepOutput:
        """Run one step for the sequences that the scheduler picks."""
        # inference_mode: PyTorch records nothing for gradients, in the whole step.
        started = time.monotonic()
        return self._run(self.scheduler.schedule(), started)

    def _run(self, plan: Plan, started: float) -> StepOutput:
        """Carry out a plan, from the copies of blocks to the outputs."""
        try:
            self.cache.copy_blocks(plan.copies)  # before the forward writes into the copies
            # The plan is empty if `step` is called while nothing waits or runs.
            continuations = self._continue(plan) if plan.scheduled else []
        except BaseException:  # Ctrl-C too
            # `num_computed_tokens` was advanced when the step was planned, but K and V may not have
            # been written. So the planned sequences wait again and are computed from their start.
            self.scheduler.undo(plan)
            raise
        return self._finish(plan, continuations, started)

    def _finish(self, plan: Plan, continuations: list[Continuation], started: float) -> StepOutput:
        """Apply the continuations, decode the new text, and report what the step did."""
        # In this order: the text of a token is decoded after the token was appended. A stop string
        # found in the text ends its sequence inside `process`.
        self.scheduler.update(plan, continuations)
        outputs = self.output_processor.process(plan, started)
        # Totals now minus totals at the last report: a block freed by `abort` between two steps is
        # counted in the later one.
        before = self._counted
        now = self._count_blocks()
        self._counted = now
        return StepOutput(
            plan=plan,
            outputs=outputs,
            blocks_taken=now.taken - before.taken,
            blocks_freed=now.freed - before.freed,
            blocks_copied=len(plan.copies),
            blocks_hit=now.hit - before.hit,
            blocks_evicted=now.evicted - before.evicted,
            blocks_swapped=len(plan.swap_in) + len(plan.swap_out),
            milliseconds=(time.monotonic() - started) * 1e3,
        )

    def _continue(self, plan: Plan) -> list[Continuation]:
        """Run the model, then ask each strategy how its sequences continue."""
        # 1 row of logits for a decode or the end of a prompt, 0 for a chunk before that, and all
        # rows of a prompt whose log-probabilities were asked for.
        counts = [self.output_processor.num_sample_rows(entry) for entry in plan.scheduled]
        logits = self.forward(self._batch_of(plan, counts))  # (M, V), M = sum(counts)
        self.output_processor.collect_prompt_logprobs(plan, counts, logits)
        continuations = []
        for strategy, (sequences, rows) in rows_by_strategy(plan, counts).items():
            # Usually all requests share one strategy, and it needs every row: then none is copied.
            chosen = logits if len(rows) == len(logits) else logits[rows]
            continuations += strategy(sequences, chosen)
        return continuations

    # ---- small parts ----
    def _batch_of(self, plan: Plan, counts: list[int]) -> Batch:
        """A plan's tokens as tensors in host memory; the forward moves them to its device.

        `counts` says how many of each sequence's last rows need logits.
        """
        # Positions [start, start + num_new_tokens) are computed. The block table gives them the
        # slots where their K and V are written. K and V of earlier positions are only read.
        rows = [
            Row(seq.token_ids, start, num_new_tokens, seq.block_table, count)
            for (seq, start, num_new_tokens), count in zip(plan.scheduled, counts, strict=True)
        ]
        return make_batch(rows, self.cache.block_size, self.cache.scratch_block)

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
            raise ValueError(f"the prompt has token id {unknown[0]!r}: {known}")
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
        if self.tokenizer is None and (isinstance(prompt, str) or params.stop):
            asked = "a text prompt" if isinstance(prompt, str) else "a stop string"
            raise ValueError(f"{asked} needs a tokenizer, and this model has none: give token ids")
        if not isinstance(prompt, list):
            kind = type(prompt).__name__
            raise ValueError(f"the prompt is of type {kind}: give text or a list of token ids")
        return prompt

    def _count_blocks(self) -> BlockCounts:
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
        written |= {o.request_id: o.outputs[0].token_ids for o in output.outputs if o.finished}

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
