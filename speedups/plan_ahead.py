"""Launch the next step before the tokens of this one were read: their number is known.

All weights of the 124M GPT-2 pass through a GPU's memory of 4 TB/s in 0.06 ms. Before each step the
host chooses who runs, finds blocks, fills tables, turns the last tokens into text; Python takes
longer for that, and the GPU waits. But nothing of it needs to know those tokens. A sequence that
decodes is one token longer after each step, whichever token it is; its next block, its next slot
follow from that, and the token itself is on the device already, where the next step wants it:

    host     plan 1 .......... read 1, plan 2 ......... read 2       one after the other
    device          [ step 1 ]               [ step 2 ]

    host     plan 1  plan 2 .. read 1, plan 3 . read 2, plan 4       the host is one step ahead
    device          [ step 1 ][ step 2        ][ step 3        ]

What is learned too late is the end of a text. A sequence that drew EOS has a row in the step that
was launched meanwhile: one token is computed for nobody, dropped, and its block is free again. (The
block may be given away while that step still runs: whoever writes to it next does so in a later
step.) Only requests that need nothing but their newest token go ahead. A penalty counts tokens, a
log-probability is read by the host, a beam chooses: while such a request is here, steps run one
after the other. What a production engine does beyond this: does the same for those too, with
penalties and masks of grammars on the device.

vLLM's "async scheduling"; Zheng et al., "SGLang v0.4: Zero-Overhead Batch Scheduler", 2024.
Run: python -m speedups.plan_ahead
Try: logprobs=1 for one request in the demo, and see who waits for whom.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from block_allocator import BlockAllocator
from engine import Draw, InferenceEngine, eager_forward, rows_to_draw
from kv_cache import Batch, KVCache, to_device
from model import GPT, GPTConfig
from outputs import StepOutput
from sampling import SampleRow, SamplingParams, draw_tokens, refuse
from scheduler import Scheduler
from sequence import FINISHED, RUNNING, Continuation, Plan, Sequence

Decode = Callable[[Batch, list[SampleRow]], tuple[Tensor, Tensor]]  # -> what `draw_tokens` returns


# A step planned ahead is launched before the host has read the last tokens. These fields of
# SamplingParams allow that with one value only: with others the draw depends on tokens that are not
# known yet, or the host reads probabilities after each step, or the logits are edited first.
ONLY_VALUE_AHEAD = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
}
# These allow it with any value. (A new field belongs into one of the two: a test compares them with
# the dataclass.)
ANY_VALUE_AHEAD = {
    *("n", "temperature", "top_k", "top_p", "min_p", "seed"),  # the draw needs no earlier token
    *("max_tokens", "ignore_eos", "stop", "stop_token_ids"),  # a text may end: one token is wasted
}


def needs_no_past(params: SamplingParams) -> bool:
    """Whether a token can be drawn before the host has read the token before it."""
    return all(getattr(params, name) == value for name, value in ONLY_VALUE_AHEAD.items())


class InFlight(NamedTuple):
    """A step that was launched and not read."""

    plan: Plan
    sampled: list[Sequence]  # whose tokens it draws, in this order
    token_ids: Tensor  # (M,) on the device, where the next step takes them from
    arriving: tuple[Tensor, Tensor]  # the same and their peaks, (M,) each, on the way to the host
    arrival: torch.cuda.Event | None  # when they are there; None: they are


class AheadEngine(InferenceEngine):
    """An engine whose `step()` launches the next step before it reads the tokens of this one.

    A call returns the output of the older of the two. What `InferenceEngine` takes, it takes too.
    `decode(batch, rows) -> token ids (M,), peaks (M,)` runs the model and draws without waiting for
    the device, as `GraphForward.decode` does; None draws from what `forward` returns. Of what it
    returns the token ids may be overwritten by the next call, not before.
    """

    steps_overlap = True

    def __init__(self, *args, draw: Draw = draw_tokens, decode: Decode | None = None, **kwargs):
        super().__init__(*args, draw=draw, **kwargs)
        self.decode = decode or (lambda batch, rows: draw(self.forward(batch), rows))
        self.num_wasted_tokens = 0  # computed for sequences that had ended
        self._in_flight: InFlight | None = None
        self._waited_for: set[str] = set()  # requests whose tokens are needed before the next step

    # ---- requests ----
    def add_request(
        self, prompt: str | list[int], params: SamplingParams | None = None, **options
    ) -> str:
        """As `InferenceEngine.add_request`."""
        request_id = super().add_request(prompt, params, **options)
        if options.get("strategy") or not needs_no_past(params or SamplingParams()):
            self._waited_for.add(request_id)
        return request_id

    def abort(self, request_id: str) -> bool:
        """As `InferenceEngine.abort`; what a step in flight computes for it is dropped."""
        self._waited_for.discard(request_id)
        return super().abort(request_id)

    # ---- the loop ----
    @torch.inference_mode()
    def step(self) -> StepOutput:
        """Launch the next step where it can be planned ahead, then read the one before it."""
        started = time.monotonic()
        flight, self._in_flight = self._still_wanted(self._in_flight), None  # some were aborted
        if flight is None:
            plan = self.scheduler.schedule()
            if self._waited_for or not plan.scheduled:
                return self._forget_ended(self._run(plan, started))
            flight = self._launch(plan)
        try:
            self._in_flight = self._launch_next(flight)
            continuations = self._read(flight)
        except BaseException:  # interrupted: what is in flight is computed again
            launched, self._in_flight = (self._in_flight, flight), None
            for one in filter(None, launched):
                self.scheduler.undo(one.plan)
            raise
        self._still_wanted(flight)  # who was preempted for the step ahead draws again when back
        output = self._finish(flight.plan, continuations, started)
        self._in_flight = self._still_wanted(self._in_flight)  # some have just ended
        return self._forget_ended(output)

    def _launch(self, plan: Plan, before: InFlight | None = None) -> InFlight:
        """Run the model over a plan without waiting; some tokens may be those of the step before.

        If that fails the plan is undone.
        """
        try:
            self.cache.copy_blocks(plan.copies)
            counts = [self.output_processor.num_sample_rows(entry) for entry in plan.scheduled]
            batch = self._batch_of(plan, counts)
            if before is not None:
                batch = self._take_tokens(batch, plan, before)
            token_ids, peaks = self.decode(batch, rows_to_draw(plan.sampled))
            # To pinned memory, in the order of the stream: behind this step, before the next one.
            arriving = [x.to("cpu", non_blocking=True, copy=True) for x in (token_ids, peaks)]
            arrival = torch.cuda.Event() if token_ids.is_cuda else None
            if arrival is not None:
                arrival.record(torch.cuda.current_stream(token_ids.device))
            return InFlight(plan, plan.sampled, token_ids, tuple(arriving), arrival)
        except BaseException:
            self.scheduler.undo(plan)
            raise

    def _launch_next(self, flight: InFlight) -> InFlight | None:
        """Plan and launch the step behind one that nobody has read; None where that has to wait."""
        scheduler, running = self.scheduler, self.scheduler.running
        all_decode = len(running) == len(flight.plan.sampled)
        # A block each, as a rule: nobody should be preempted for a step that could have waited.
        has_room = scheduler.allocator.num_free >= len(running)
        # Who ends with the token in flight, whichever it is, has no step behind it.
        sampled = flight.plan.sampled
        growing = [seq for seq in sampled if len(seq.token_ids) + 1 < scheduler.longest(seq)]
        if self._waited_for or not (all_decode and has_room and growing):
            return None
        for seq in growing:
            seq.token_ids.append(0)  # a place for the token that nobody has seen yet
        try:
            plan = scheduler.schedule()
            return self._launch(plan, flight) if plan.scheduled else None
        finally:
            for seq in growing:
                seq.token_ids.pop()

    def _take_tokens(self, batch: Batch, plan: Plan, before: InFlight) -> Batch:
        """Fill the places of unseen tokens with those that the step before drew, on the device."""
        kept = set(before.plan.sampled)  # without those who have left it since
        place = {seq: i for i, seq in enumerate(before.sampled) if seq in kept}
        sources = [place[seq] for seq, _, _ in plan.scheduled if seq in place]
        drawn = before.token_ids
        if sources != list(range(len(drawn))):
            drawn = drawn[to_device(torch.tensor(sources), drawn.device)]
        if len(sources) < len(plan.scheduled):  # prompts joined: they bring tokens of their own
            unseen = torch.tensor([entry.seq in place for entry in plan.scheduled])
            rows = batch.query_start_locs[:-1][unseen].long()
            input_ids = to_device(batch.input_ids, drawn.device)
            input_ids[to_device(rows, drawn.device)] = drawn
            drawn = input_ids
        return replace(batch, input_ids=drawn)

    def _read(self, flight: InFlight) -> list[Continuation]:
        """Wait for a step's tokens: one for each sequence that still runs."""
        if flight.arrival is not None:
            flight.arrival.synchronize()
        token_ids, peaks = flight.arriving
        kept = [seq.status == RUNNING for seq in flight.sampled]
        refuse(~peaks.isfinite() & torch.tensor(kept, dtype=torch.bool))
        drawn = zip(flight.sampled, token_ids.tolist(), kept, strict=True)
        return [Continuation(seq, [token_id]) for seq, token_id, wanted in drawn if wanted]

    # ---- small parts ----
    def _still_wanted(self, flight: InFlight | None) -> InFlight | None:
        """Take out of a plan who no longer runs since it was made; None where nobody is left."""
        if flight is None:
            return None
        plan = flight.plan
        ended = [entry for entry in plan.scheduled if entry.seq.status == FINISHED]
        self.num_wasted_tokens += sum(entry.num_new_tokens for entry in ended)
        plan.scheduled = [entry for entry in plan.scheduled if entry.seq.status == RUNNING]
        plan.sampled = [seq for seq in plan.sampled if seq.status == RUNNING]
        plan.preempted = [seq for seq in plan.preempted if seq.status != FINISHED]
        return flight if plan.scheduled else None

    def _forget_ended(self, output: StepOutput) -> StepOutput:
        self._waited_for -= {o.request_id for o in output.outputs if o.finished}
        return output


# --------------------------------------------------------------------------------------------------
def demo():
    """Three requests, one of which meets its stop token: what is launched and read in each call."""
    config = GPTConfig(vocab_size=64, max_seq_len=64, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config).init_weights(std=0.2, seed=1).double().eval()
    num_blocks, block_size = 16, 4

    def build(kind: type[InferenceEngine], stop_token_ids: list[int]) -> InferenceEngine:
        cache = KVCache(2, num_blocks, block_size, 2, 16, torch.float64)
        scheduler = Scheduler(BlockAllocator(num_blocks, block_size), 8, 32, 64)
        engine = kind(eager_forward(model, cache), cache, scheduler, vocab_size=64)
        for prompt, num in (([7, 3, 9], 8), ([5, 5], 6), ([20, 21, 22, 23], 9)):
            stops = stop_token_ids if len(prompt) == 3 else None
            params = SamplingParams(temperature=0, max_tokens=num, stop_token_ids=stops)
            engine.add_request(prompt, params)
        return engine

    def run(engine: InferenceEngine, show: Callable[[StepOutput], None]) -> dict[str, list[int]]:
        done = {}
        while engine.has_unfinished():
            output = engine.step()
            show(output)
            done |= {o.request_id: o.outputs[0].token_ids for o in output.outputs if o.finished}
        return done

    def names(sequences: list[Sequence]) -> str:
        return "".join("ABC"[int(seq.request.request_id)] for seq in sequences)

    whole = run(build(InferenceEngine, []), lambda output: None)["0"]
    stop = next(i for i in range(3, 8) if whole[i] not in whole[:i])
    expected = run(build(InferenceEngine, [whole[stop]]), lambda output: None)
    engine = build(AheadEngine, [whole[stop]])
    print(f"A stops after {stop + 1} tokens, and nobody knows it before; B writes 6, C 9\n")
    print("call   read   launched before that   free blocks")

    launched: list[str] = []  # in each call, before its tokens were read

    def show(output: StepOutput) -> None:
        launched.append(names(engine._in_flight.sampled if engine._in_flight else []))
        read, free = names(output.plan.sampled), engine.scheduler.allocator.num_free
        print(f"{len(launched):4}   {read:4}   {launched[-1]:20} {free:13}")

    assert run(engine, show) == expected
    print(f"\n{engine.num_wasted_tokens} token was computed for nobody: A had stopped already")
    assert engine.num_wasted_tokens == 1 and engine.scheduler.allocator.num_free == num_blocks
    assert all(launched[:-1]) and not launched[-1]
    print("ok: the same tokens, and no step but the first was launched when all had been read")


if __name__ == "__main__":
    demo()
