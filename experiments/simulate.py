"""The real scheduler and the real allocator under a simulated clock: hours of traffic in seconds.

How many requests run at once in a pool of 240,000 blocks, and how long does the last of 8,000 wait?
Measured on an engine, an hour of traffic takes an hour and needs the device. But which sequences
run in a step depends on lengths and block counts alone. So the model is left out: a request ends
after the number of tokens that its trace recorded, and a step only advances the clock.

    requests ──> waiting ──> schedule ──> [ no model ] ──> update ──> finished
                   the scheduler,            clock +=                 at which time
                   the allocator         a + b x tokens + c x KV

a is the fixed cost of a step (launches, reading the weights), b the cost of a new token, c the cost
of a token of K and V that attention reads. `fit` finds the three from measured steps. Each plan is
the real engine's, because the same code makes it; the times are as good as the three numbers.

How it is checked: an engine with a model serves the same requests, and every step of both must be
the same. Traces of a few requests are worked out by hand.

Agrawal et al. 2024, "Vidur: A Large-Scale Simulation Framework for LLM Inference", MLSys,
arXiv:2405.05465.
Run: python -m experiments.simulate
Try: in the demo, BLOCKS = 640: then 6 requests run at once if each reserves the maximum, and paging
still serves all of them. Or a cost without its fixed part, CostModel(0, b, c): then a large batch
costs as much per token as a small one.
"""

import random
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from block_allocator import BlockAllocator
from scheduler import Scheduler, reserve_now
from sequence import Continuation, Plan, Request, Sequence


# ---- requests and steps --------------------------------------------------------------------------
class Arrival(NamedTuple):
    """One request of a trace: when it came, and how many tokens it had and got, 1 at least."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Served:
    """An arrival, and the second at which each of its tokens was ready."""

    request: Arrival
    token_s: array = field(default_factory=lambda: array("d"))
    num_preemptions: int = 0

    @property
    def first_token_s(self) -> float:
        """When the first token came, in simulated seconds."""
        return self.token_s[0]

    @property
    def finish_s(self) -> float:
        """When the last token came."""
        return self.token_s[-1]

    @property
    def latency_per_token_s(self) -> float:
        """The paper's normalised latency: from arrival to the last token, over the tokens."""
        return (self.finish_s - self.request.arrival_s) / len(self.token_s)


class PoolState(NamedTuple):
    """Counts of the scheduler between a step's plan and its update."""

    running: int
    waiting: int
    blocks: int  # held by running sequences


def pool_state(scheduler: Scheduler) -> PoolState:
    """The counts of a scheduler."""
    blocks = sum(len(seq.block_table) for seq in scheduler.running)
    return PoolState(len(scheduler.running), scheduler.num_waiting, blocks)


class Step(NamedTuple):
    """One step: its work, its time, and what `look` returned for the scheduler while it ran."""

    end_s: float
    milliseconds: float
    new_tokens: int
    kv_tokens: int  # read by attention: the context of each sequence that ran
    preempted: int
    queued: int  # arrived, but not admitted yet
    seen: Any


class Run(NamedTuple):
    """All requests in the order of arrival, and all steps."""

    served: list[Served]
    steps: list[Step]


# ---- the clock -----------------------------------------------------------------------------------
class CostModel(NamedTuple):
    """Milliseconds of a step: base + per_token x tokens + per_kv_token x KV tokens."""

    base_ms: float
    per_token_ms: float
    per_kv_token_ms: float

    def step_ms(self, new_tokens: int, kv_tokens: int) -> float:
        """Milliseconds of one step."""
        return self.base_ms + self.per_token_ms * new_tokens + self.per_kv_token_ms * kv_tokens


def fit(steps: Iterable[tuple[int, int, float]]) -> tuple[CostModel, float]:
    """The cost model nearest to measured steps, and its residual: root mean square, in ms.

    A step is (new tokens, KV tokens, milliseconds). Least squares under the condition that no
    number is negative, because no work takes negative time. Raises ValueError for fewer than 3
    steps.
    """
    table = np.array(list(steps), dtype=float).reshape(-1, 3)
    if len(table) < 3:
        raise ValueError(f"{len(table)} measured steps for three numbers: give at least 3")
    work = np.column_stack((np.ones(len(table)), table[:, :2]))  # a row: 1, tokens, KV tokens
    scale = work.max(axis=0).clip(1)  # KV tokens are thousands: scale all columns to about 1
    best, least = np.zeros(3), float(np.square(table[:, 2]).sum())
    # At the optimum some of the three numbers are zero, and the others solve the unconstrained
    # problem. There are only seven choices of the others: try all.
    for chosen in (list(c) for n in (1, 2, 3) for c in combinations(range(3), n)):
        found = np.zeros(3)
        found[chosen] = np.linalg.lstsq(work[:, chosen] / scale[chosen], table[:, 2])[0]
        error = float(np.square(work / scale @ found - table[:, 2]).sum())
        if found.min() >= 0 and error < least:
            best, least = found / scale, error
    return CostModel(*best.tolist()), (least / len(table)) ** 0.5


class SimulatedEngine:
    """A scheduler without a model: `add`, `step`, and a clock that starts at 0 s."""

    def __init__(
        self,
        scheduler: Scheduler,
        cost: CostModel,
        look: Callable[[Scheduler], Any] = pool_state,
    ):
        self.scheduler = scheduler
        self.cost = cost
        self.look = look
        self.now_s = 0.0
        self._num_requests = 0

    def add(self, prompt_tokens: int, max_tokens: int) -> str:
        """Queue a request for exactly `max_tokens` tokens; returns its id. ValueError as `add`."""
        arrival = self._num_requests
        token_ids = [0] * prompt_tokens  # their values do not matter
        request = Request(str(arrival), token_ids, arrival)
        request.sequences = [Sequence(request, 0, token_ids, prompt_tokens, max_tokens)]
        self.scheduler.add(request)
        self._num_requests += 1
        return request.request_id

    def has_unfinished(self) -> bool:
        """Whether a further `step()` has work."""
        return self.scheduler.has_unfinished()

    def wait_until(self, second: float) -> None:
        """Move the clock forward to this second; no step runs until then."""
        self.now_s = max(self.now_s, second)

    def step(self) -> tuple[Plan, float, Any]:
        """Plan a step, advance the clock, end complete requests: plan, ms, what `look` returned."""
        plan = self.scheduler.schedule()
        seen = self.look(self.scheduler)
        milliseconds = self.cost.step_ms(plan.num_tokens, num_kv_tokens(plan))
        self.now_s += milliseconds / 1e3
        self.scheduler.update(plan, [Continuation(seq, [0]) for seq in plan.sampled])
        return plan, milliseconds, seen


def num_kv_tokens(plan: Plan) -> int:
    """Tokens of K and V that a step's attention reads: each sequence's context, once."""
    return sum(start + num_new_tokens for _, start, num_new_tokens in plan.scheduled)


# ---- from arrivals to a run ----------------------------------------------------------------------
# admit(arrived, is_busy): removes requests from `arrived`, returns (request, tokens to write).
Admit = Callable[[deque[Arrival], bool], list[tuple[Arrival, int]]]


def admit_all(arrived: deque[Arrival], is_busy: bool) -> list[tuple[Arrival, int]]:
    """Continuous batching: each request goes to the scheduler as soon as it arrives."""
    admitted = [(request, request.output_tokens) for request in arrived]
    arrived.clear()
    return admitted


def static_batches(batch_size: int) -> Admit:
    """Static batching: a batch starts when the last one has ended, and ends with its longest.

    All requests write as many tokens as the longest does, or as the context has room for (the
    scheduler limits that). A shorter request holds its memory until the batch ends.
    """

    def admit(arrived: deque[Arrival], is_busy: bool) -> list[tuple[Arrival, int]]:
        if is_busy:
            return []
        batch = [arrived.popleft() for _ in range(min(batch_size, len(arrived)))]
        longest = max((request.output_tokens for request in batch), default=0)
        return [(request, longest) for request in batch]

    return admit


def serve(requests: Iterable[Arrival], engine: Any, admit: Admit = admit_all) -> Run:
    """An open loop: requests arrive at their times, whatever the engine's state.

    `engine` is a `SimulatedEngine`, or a real one with the same `add`, `step`, `has_unfinished`,
    `now_s` and `wait_until`. Raises ValueError for a request that the engine refuses.
    """
    coming = deque(sorted(requests, key=lambda request: request.arrival_s))
    arrived: deque[Arrival] = deque()
    served: dict[str, Served] = {}
    steps: list[Step] = []
    while coming or arrived or engine.has_unfinished():
        if not arrived and not engine.has_unfinished():
            engine.wait_until(coming[0].arrival_s)
        while coming and coming[0].arrival_s <= engine.now_s:
            arrived.append(coming.popleft())
        for request, num_tokens in admit(arrived, engine.has_unfinished()):
            served[engine.add(request.prompt_tokens, num_tokens)] = Served(request)
        plan, milliseconds, seen = engine.step()
        for seq in plan.preempted:
            served[seq.request.request_id].num_preemptions += 1
        for seq in plan.sampled:
            one = served[seq.request.request_id]
            if (
                len(one.token_s) < one.request.output_tokens
            ):  # more are the padding of a static batch
                one.token_s.append(engine.now_s)
        work = plan.num_tokens, num_kv_tokens(plan), len(plan.preempted), len(arrived)
        steps.append(Step(engine.now_s, milliseconds, *work, seen))
    return Run(list(served.values()), steps)


def poisson(requests: Iterable[Arrival], per_s: float, seed: int = 0) -> Iterator[Arrival]:
    """The same lengths in the same order at random times, with a mean of `per_s` a second.

    The gaps between independent arrivals are distributed exponentially.
    """
    clock = 0.0
    draw = random.Random(seed)
    for request in requests:
        clock += draw.expovariate(per_s)
        yield request._replace(arrival_s=clock)


# --------------------------------------------------------------------------------------------------
def demo():
    """Fit a cost model to six steps, then serve 1,000 chats with two memory plans."""
    BLOCKS = 640
    print("six measured steps (made up here): tokens, KV tokens, ms")
    measured = [(1, 300, 5.5), (8, 2400, 9.2), (32, 9600, 20.1)]
    measured += [(512, 512, 108.0), (32, 19200, 30.2), (64, 16000, 32.8)]
    for new_tokens, kv_tokens, milliseconds in measured:
        print(f"{new_tokens:9} {kv_tokens:10,} {milliseconds:6}")
    cost, residual_ms = fit(measured)
    a, b, c = cost
    print(f"t = {a:.2f} ms + {b:.3f} x tokens + {c:.5f} x KV tokens, off by {residual_ms:.2f} ms\n")

    draw = random.Random(0)
    lengths = [Arrival(0.0, draw.randint(16, 200), draw.randint(8, 200)) for _ in range(1000)]
    requests = list(poisson(lengths, per_s=10))
    print(f"1,000 requests, 10 a second; {BLOCKS} blocks of 16, at most 1,024 tokens each")
    print("                 running: mean  peak   s to first token: p50    p99   preempted")
    started = time.perf_counter()
    first_token_s = {}
    for name, reserve in (("reserve maximum", lambda seq: 1024), ("paged", reserve_now)):
        scheduler = Scheduler(BlockAllocator(BLOCKS, 16), 256, 512, 1024, reserve)
        run = serve(requests, SimulatedEngine(scheduler, cost))
        running = [step.seen.running for step in run.steps]
        waited = sorted(one.first_token_s - one.request.arrival_s for one in run.served)
        figures = f"{sum(running) / len(running):8.1f} {max(running):5} {waited[500]:23.2f}"
        print(f"{name:20} {figures} {waited[990]:6.2f} {scheduler.num_preemptions:11}")
        first_token_s[name] = waited[500]
        assert scheduler.allocator.num_free == BLOCKS
        assert all(len(one.token_s) == one.request.output_tokens for one in run.served)
    seconds = time.perf_counter() - started
    print(f"\npaged: {run.steps[-1].end_s:.0f} s of traffic, both simulated in {seconds:.1f} s")
    assert first_token_s["paged"] < first_token_s["reserve maximum"] / 10
    print("ok: every request got its tokens, all blocks are free, and paging waits far less")


if __name__ == "__main__":
    demo()
