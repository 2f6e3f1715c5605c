"""Launch the next step before the tokens of this one are read, so that the GPU does not wait.

Reading the weights of the 124M GPT-2 takes a memory of 4 TB/s 0.06 ms a step. Between two steps the
host schedules, allocates blocks, fills tables and decodes the last tokens into text. In Python that
takes longer, and the GPU waits. But the host needs only the number of new tokens, not their ids, to
plan the next step: a decoding sequence becomes one token longer, and its next block and slot follow
from its length. The ids are on the GPU, where the next step reads them:

    host     plan 1 .......... read 1, plan 2 ......... read 2       one after the other
    device          [ step 1 ]               [ step 2 ]

    host     plan 1  plan 2 .. read 1, plan 3 . read 2, plan 4       the host is one step ahead
    device          [ step 1 ][ step 2        ][ step 3        ]

The host learns too late that a text has ended. If a sequence drew EOS in step 1 it still has a row
in step 2. That token is computed for nothing and dropped, and the sequence's blocks are freed. They
may be given to another sequence while step 2 still runs. That is safe: the other sequence writes to
them in a later step, and the device runs steps in order.

Steps overlap only while no unfinished request needs the host between two steps. A penalty counts
the tokens so far, the host reads log-probabilities, and a strategy chooses tokens on the host. As
long as the engine has such a request, steps run one after the other.

How it is checked: every text, step by step, against the engine that waits, also in random traffic
with aborts, preemptions and exceptions (tests/speedups/test_plan_ahead.py). A production engine
overlaps steps with penalties and grammars too: it applies them on the device.

vLLM's "async scheduling"; Zheng et al., "SGLang v0.4: Zero-Overhead Batch Scheduler", 2024.
Run: python -m speedups.plan_ahead
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from block_allocator import BlockAllocator
from engine import Draw, InferenceEngine, eager_forward, one_token_each
from kernels.device_memory import copy_to_host
from kv_cache import Batch, KVCache, to_device
from model import GPT, GPTConfig
from outputs import Clock, StepOutput
from sampling import SampleRows, SamplingParams, draw_tokens
from scheduler import Scheduler
from sequence import FINISHED, RUNNING, Continuation, Plan, Request, Sequence

# A batch and its rows -> token ids (M,) and peaks (M,), as `draw_tokens` returns them.
Decode = Callable[[Batch, SampleRows], tuple[Tensor, Tensor]]


# A step planned ahead is launched before the host has read the last tokens. These fields of
# SamplingParams allow that only at the value given here. At any other value the draw depends on
# tokens that are not known yet, or the host reads or edits numbers in each step.
ONLY_VALUE_AHEAD = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "allowed_token_ids": (),
    "bad_words": (),
    "min_tokens": 0,
    "best_of": None,
    "logprobs": None,
    "prompt_logprobs": None,
}
# These fields allow it at any value. (A new field must be entered in one of the two: a test
# compares them with the dataclass.)
ANY_VALUE_AHEAD = {
    *("n", "temperature", "top_k", "top_p", "min_p", "seed"),  # the draw needs no earlier token
    # an end wastes one token at most
    *("max_tokens", "ignore_eos", "stop", "stop_token_ids", "include_stop_str_in_output"),
}


def needs_no_past(params: SamplingParams) -> bool:
    """Whether a token can be drawn before the host has read the token before it."""
    return all(getattr(params, name) == value for name, value in ONLY_VALUE_AHEAD.items())


class InFlight(NamedTuple):
    """A step that is launched and whose tokens are not read yet."""

    plan: Plan
    sequences: list[Sequence]  # who gets each of the M tokens: n times the same one if it forks
    rows: SampleRows  # the M rows
    token_ids: Tensor  # (M,) on the device, where the next step reads them
    on_host: tuple[Tensor, Tensor]  # token ids and peaks, (M,) each; valid after `copied`
    copied: torch.cuda.Event | None  # recorded after the copy to the host; None on a CPU


class AheadEngine(InferenceEngine):
    """An engine whose `step()` launches the next step before it reads the tokens of this one.

    `step()` returns the output of the step that it has read, the older of the two. The arguments
    are those of `InferenceEngine`, and `decode(batch, rows) -> token ids (M,), peaks (M,)`. It runs
    the model and draws without waiting for the device, as `GraphForward.decode` does; None calls
    `forward` and `draw`. The token ids must stay valid until the next call of `decode`.
    """

    def __init__(self, *args, draw: Draw = draw_tokens, decode: Decode | None = None, **kwargs):
        super().__init__(*args, draw=draw, **kwargs)
        self.decode = decode or (lambda batch, rows: draw(self.forward(batch), rows))
        self.num_wasted_tokens = 0  # computed for sequences that had ended
        self._flight: InFlight | None = None
        self._must_wait_for: set[str] = set()  # ids of the requests that forbid a step ahead

    # ---- requests ----
    def _queue(self, request: Request) -> None:
        # The id is added first. After Ctrl-C between the two lines `_queue` is called again, and a
        # set does not change if an id is added twice.
        if request.strategy is not self.sampler or not needs_no_past(request.params):
            self._must_wait_for.add(request.request_id)
        super()._queue(request)

    def _repair(self) -> None:
        # The step in flight is forgotten, and its tokens are computed again. What it still writes
        # to the pool is overwritten, because the device runs steps in order.
        self._flight = None
        super()._repair()

    # ---- the loop ----
    def run_step(self) -> StepOutput:
        """Launch the next step if it can be planned ahead, then read the one before it."""
        self._take_requests()
        self._must_wait_for &= self.requests.keys()
        clock = Clock()
        flight, self._flight = self._flight, None
        if flight is not None:
            self._drop_ended(flight.plan)  # a request may have been aborted since the launch
        if flight is None or not flight.plan.scheduled:
            # Nothing is in flight, or all of it was aborted: a step is planned and launched now.
            if self._must_wait_for:
                return super().run_step()
            plan = self._plan = self.scheduler.schedule()
            clock.lap("schedule")
            if not plan.scheduled:
                return self._report(plan, clock)
            flight = self._launch(plan)
            clock.lap("forward")
        self._plan = flight.plan
        scheduler = self.scheduler
        # Each running sequence needs at most one new block for its next token. With fewer free
        # blocks than sequences, a plan made now might preempt one. But the step in flight may end
        # a sequence and free its blocks, so its tokens are read first.
        if not self._must_wait_for and scheduler.allocator.num_free >= len(scheduler.running):
            plan = scheduler.schedule(in_flight=1)
            if plan.preempted:  # they lose the token in flight, and draw it again later
                self._drop_ended(flight.plan)
            clock.lap("schedule")
            self._flight = self._launch(plan, flight) if plan.scheduled else None
        clock.lap("forward")
        continuations = self._read(flight)
        clock.lap("sample")
        scheduler.update(flight.plan, self.output_processor.find_stops(continuations))
        if self._flight is not None and flight.plan.ended:
            self._drop_ended(self._flight.plan)
        return self._report(flight.plan, clock)

    def _launch(self, plan: Plan, before: InFlight | None = None) -> InFlight:
        """Run the model over a plan without waiting for the device.

        `before` is the step that is still in flight: its tokens are inputs of this one.
        """
        self.cache.copy_blocks(plan.copies)
        inputs = self._inputs_of(plan, in_flight=before is not None)
        batch = inputs.batch
        if before is not None:
            batch = take_tokens(batch, plan, before)
        # All requests share one strategy, the sampler. There is no group if no prompt ends.
        sequences, wanted = inputs.groups.get(self.sampler, ([], None))
        if wanted is not None:  # a sequence forks: its row of logits is computed n times
            batch = replace(batch, sample_rows=batch.sample_rows[wanted])
        rows = self.sampler.rows(sequences)
        token_ids, peaks = self.decode(batch, rows)
        # The device copies in the stream's order: after this step and before the next one.
        on_host = copy_to_host(token_ids, peaks, non_blocking=True)
        copied = torch.cuda.Event() if token_ids.is_cuda else None
        if copied is not None:
            copied.record(torch.cuda.current_stream(token_ids.device))
        return InFlight(plan, sequences, rows, token_ids, on_host, copied)

    def _read(self, flight: InFlight) -> list[Continuation]:
        """Wait for a step's tokens: a continuation for each sequence that still runs."""
        if flight.copied is not None:
            flight.copied.synchronize()
        continuations = one_token_each(flight.sequences, flight.rows, *flight.on_host)
        # `_drop_ended` may have made the plan's list shorter since the launch.
        if flight.plan.sampled == flight.sequences:
            return continuations
        still_running = set(flight.plan.sampled)
        return [c for c in continuations if c.parent in still_running]

    def _drop_ended(self, plan: Plan) -> None:
        """Remove the sequences that have ended or were preempted from a step's plan."""
        ended = [entry for entry in plan.scheduled if entry.seq.status == FINISHED]
        self.num_wasted_tokens += sum(entry.num_new_tokens for entry in ended)
        plan.scheduled = [entry for entry in plan.scheduled if entry.seq.status == RUNNING]
        plan.sampled = [seq for seq in plan.sampled if seq.status == RUNNING]


def take_tokens(batch: Batch, plan: Plan, before: InFlight) -> Batch:
    """The batch with the tokens that the step before has drawn, which only the device has.

    Example: the step before drew for [A, B, C]. This one decodes A and C and computes 3 tokens of a
    prompt, 5 rows: rows 0 and 1 get the drawn tokens 0 and 2, rows 2 to 4 keep their known tokens.
    """
    # (M,). If a row's logits were NaN its id may be any: the sequence ends when the step is read.
    drawn = before.token_ids
    is_same = plan.sampled == before.sequences and not plan.started
    if is_same and len(plan.scheduled) == len(plan.sampled):  # the same sequences decode again
        return replace(batch, input_ids=drawn)
    row_before = {seq: row for row, seq in enumerate(before.sequences)}
    # 20 tokens are known, [0, 20). A row for position 20 is for the token in flight.
    is_unknown = [start >= len(seq.token_ids) for seq, start, _ in plan.scheduled]
    sources = [row_before[e.seq] for e, unknown in zip(plan.scheduled, is_unknown) if unknown]
    rows = batch.query_start_locs[:-1][torch.tensor(is_unknown)].long()
    input_ids = to_device(batch.input_ids, drawn.device)
    source_rows = to_device(torch.tensor(sources, dtype=torch.int64), drawn.device)
    input_ids[to_device(rows, drawn.device)] = drawn[source_rows]
    return replace(batch, input_ids=input_ids)


# --------------------------------------------------------------------------------------------------
def demo():
    """Three requests, one of which meets its stop token: what each call launches and reads."""
    config = GPTConfig(vocab_size=64, max_seq_len=64, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config).init_weights(std=0.2, seed=1).double().eval()
    num_blocks, block_size = 16, 4

    def build(kind: type[InferenceEngine], stop_token_ids: list[int]) -> InferenceEngine:
        cache = KVCache(2, num_blocks, block_size, 2, 16, torch.float64)
        scheduler = Scheduler(BlockAllocator(num_blocks, block_size), 8, 32, 64)
        engine = kind(eager_forward(model, cache), cache, scheduler, vocab_size=64)
        stop = SamplingParams(temperature=0, max_tokens=8, stop_token_ids=stop_token_ids)
        engine.add_request([7, 3, 9], stop)
        engine.add_request([5, 5], SamplingParams(temperature=0, max_tokens=6))
        engine.add_request([20, 21, 22, 23], SamplingParams(temperature=0, max_tokens=9))
        return engine

    def run(engine: InferenceEngine, after_step: Callable[[StepOutput], None]):
        """The token ids of each request, by its id."""
        texts = {}
        while engine.has_unfinished():
            output = engine.step()
            after_step(output)
            texts |= {o.request_id: o.outputs[0].token_ids for o in output.finished}
        return texts

    def names(sequences: list[Sequence]) -> str:
        return "".join("ABC"[int(seq.request.request_id)] for seq in sequences)

    # A stops at the first token of its text that was not there before, from the fourth on.
    whole = run(build(InferenceEngine, []), lambda output: None)["0"]
    stop = next(i for i in range(3, 8) if whole[i] not in whole[:i])
    expected = run(build(InferenceEngine, [whole[stop]]), lambda output: None)
    engine = build(AheadEngine, [whole[stop]])
    print(f"A stops after {stop + 1} tokens, which the host cannot foresee; B writes 6, C 9\n")
    print("call   read   launched before that   free blocks")
    launched: list[str] = []  # the steps that a call launched before it read tokens

    def show(output: StepOutput) -> None:
        launched.append(names(engine._flight.plan.sampled if engine._flight else []))
        num_free = engine.scheduler.allocator.num_free
        row = f"{len(launched):4}   {names(output.plan.sampled):4}   {launched[-1]:20}"
        print(f"{row} {num_free:13}")

    assert run(engine, show) == expected
    print(f"\n{engine.num_wasted_tokens} token was computed for nothing: A had stopped already")
    assert engine.num_wasted_tokens == 1 and engine.scheduler.allocator.num_free == num_blocks
    assert all(launched[:-1]) and not launched[-1]
    print("ok: the same tokens, and each step but the first was launched before the last was read")


if __name__ == "__main__":
    demo()
