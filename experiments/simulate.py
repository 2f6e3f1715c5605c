"""The real scheduler and the real allocator under a clock that is only a number: hours in seconds.

How many requests run at once in a pool of 240,000 blocks, and how long does the last of 8,000 wait?
Whoever asks an engine waits as long as the requests do, an hour for an hour, and needs the device.
But who runs in which step depends on lengths and block counts alone. So take the model away: a
request ends after the number of tokens that its trace recorded, and a step only moves the clock.

    requests ──> waiting ──> schedule ──> [ no model ] ──> update ──> finished
                   the scheduler,            clock +=                 at which time
                   the allocator         a + b x tokens + c x KV

a is what any step costs (launches, reading the weights), b what each new token adds, c what each
token of K and V costs that attention reads. `fit` finds the three from measured steps. Every plan
is that of the real engine, since the same lines made it; only times are as good as the three
numbers are. What a production engine does beyond this: measures such a table for each GPU, model
and batch, and plans whole clusters with it.

Agrawal et al. 2024, "Vidur: A Large-Scale Simulation Framework for LLM Inference", MLSys,
arXiv:2405.05465.
Run: python -m experiments.simulate
Try: in the demo, a pool of 400 blocks (who reserves the maximum runs 6 at once, paged?), or a cost
model without its first number: what are large batches good for then?
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


# ---- what arrives, and what becomes of it --------------------------------------------------------
class Arrival(NamedTuple):
    """One request of a trace: when it came, and how many tokens it had and got, 1 at least."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Served:
    """An arrival, and the second in which each of its tokens was there."""

    request: Arrival
    token_s: array = field(default_factory=lambda: array("d"))
    num_preemptions: int = 0

    @property
    def first_token_s(self) -> float:
        return self.token_s[0]

    @property
    def finish_s(self) -> float:
        return self.token_s[-1]

    @property
    def latency_per_token_s(self) -> float:
        """The paper's normalised latency: from arrival to the last token, over the tokens."""
        return (self.finish_s - self.request.arrival_s) / len(self.token_s)


class PoolState(NamedTuple):
    """The scheduler's books between a step's plan and its update."""

    running: int
    waiting: int
    blocks: int  # held by those who run


def pool_state(scheduler: Scheduler) -> PoolState:
    """How many run, how many wait, how many blocks are held."""
    blocks = sum(len(seq.block_table) for seq in scheduler.running)
    return PoolState(len(scheduler.running), scheduler.num_waiting, blocks)


class Step(NamedTuple):
    """One step: its work, its time, and what `look` saw of the scheduler while it ran."""

    end_s: float
    milliseconds: float
    new_tokens: int
    kv_tokens: int  # read by attention: the context of each sequence that ran
    preempted: int
    queued: int  # arrived, but not let in yet
    seen: Any


class Run(NamedTuple):
    """All requests in the order of arrival, and all steps."""

    served: list[Served]
    steps: list[Step]


# ---- the clock -----------------------------------------------------------------------------------
class CostModel(NamedTuple):
    """What a step takes, in milliseconds: base + per_token x tokens + per_kv_token x KV tokens."""

    base_ms: float
    per_token_ms: float
    per_kv_token_ms: float

    def step_ms(self, new_tokens: int, kv_tokens: int) -> float:
        """Milliseconds of one step."""
        return self.base_ms + self.per_token_ms * new_tokens + self.per_kv_token_ms * kv_tokens


def fit(steps: Iterable[tuple[int, int, float]]) -> tuple[CostModel, float]:
    """The cost model nearest to measured steps, and its residual: root mean square, in ms.

    A step is (new tokens, KV tokens, milliseconds). Least squares under the condition that no
    number is negative, for no work gives time back. Raises ValueError for fewer than 3 steps.
    """
    table = np.array(list(steps), dtype=float).reshape(-1, 3)
    if len(table) < 3:
        raise ValueError(f"{len(table)} measured steps for three numbers: give at least 3")
    work = np.column_stack((np.ones(len(table)), table[:, :2]))  # a row: 1, tokens, KV tokens
    scale = work.max(axis=0).clip(1)  # KV tokens are thousands, the 1 is not: solve evenly
    best, least = np.zeros(3), float(np.square(table[:, 2]).sum())
    # The optimum has some of the three at zero and the others where nothing holds them back.
    # There are only seven such choices: try them all.
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
        self.scheduler, self.cost, self.look = scheduler, cost, look
        self.now_s = 0.0
        self._num_requests = 0

    def add(self, prompt_tokens: int, max_tokens: int) -> str:
        """Queue a request for exactly `max_tokens` tokens; returns its id. ValueError as `add`."""
        arrival = self._num_requests
        token_ids = [0] * prompt_tokens  # nobody reads them
        request = Request(str(arrival), token_ids, arrival)
        request.sequences = [Sequence(request, 0, token_ids, prompt_tokens, max_tokens)]
        self.scheduler.add(request)
        self._num_requests += 1
        return request.request_id

    def has_unfinished(self) -> bool:
        """Whether a further `step()` has anything to do."""
        return self.scheduler.has_unfinished()

    def wait_until(self, second: float) -> None:
        """Nothing to do before this second: be there at once."""
        self.now_s = max(self.now_s, second)

    def step(self) -> tuple[Plan, float, Any]:
        """Plan a step, let its time pass, end whoever is complete: plan, ms, what `look` saw."""
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
# admit(arrived, is_busy): takes from those who arrived, says who enters and for how many tokens.
Admit = Callable[[deque[Arrival], bool], list[tuple[Arrival, int]]]


def admit_all(arrived: deque[Arrival], is_busy: bool) -> list[tuple[Arrival, int]]:
    """Continuous batching: everybody is the scheduler's as soon as they are there."""
    admitted = [(request, request.output_tokens) for request in arrived]
    arrived.clear()
    return admitted


def static_batches(batch_size: int) -> Admit:
    """What was before it: a batch starts when the one before has ended, and ends with its longest.

    All write as many tokens as that one, or as the context has room for, which the scheduler sees
    to: who wanted fewer keeps a place until then.
    """

    def admit(arrived: deque[Arrival], is_busy: bool) -> list[tuple[Arrival, int]]:
        if is_busy:
            return []
        batch = [arrived.popleft() for _ in range(min(batch_size, len(arrived)))]
        longest = max((request.output_tokens for request in batch), default=0)
        return [(request, longest) for request in batch]

    return admit


def serve(requests: Iterable[Arrival], engine: Any, admit: Admit = admit_all) -> Run:
    """Let requests arrive at their times, whatever the engine's state: an open loop.

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
            if len(one.token_s) < one.request.output_tokens:  # else a static batch's padding
                one.token_s.append(engine.now_s)
        work = plan.num_tokens, num_kv_tokens(plan), len(plan.preempted), len(arrived)
        steps.append(Step(engine.now_s, milliseconds, *work, seen))
    return Run(list(served.values()), steps)


def poisson(requests: Iterable[Arrival], per_s: float, seed: int = 0) -> Iterator[Arrival]:
    """The same lengths in the same order at random times, `per_s` a second on the average.

    Gaps between arrivals that know nothing of each other are distributed exponentially.
    """
    clock, draw = 0.0, random.Random(seed)
    for request in requests:
        clock += draw.expovariate(per_s)
        yield request._replace(arrival_s=clock)


# --------------------------------------------------------------------------------------------------
def demo():
    """Numbers for the clock from six steps, then 1,000 chats through one pool, planned twice."""
    print("six steps as they may be measured: tokens, KV tokens, ms")
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
    print("1,000 requests, 10 a second; 640 blocks of 16, at most 1,024 tokens each")
    print("                 running: mean  peak   s to first token: p50    p99   preempted")
    started, first_token_s = time.perf_counter(), {}
    for name, reserve in (("reserve maximum", lambda seq: 1024), ("paged", reserve_now)):
        scheduler = Scheduler(BlockAllocator(640, 16), 256, 512, 1024, reserve)
        run = serve(requests, SimulatedEngine(scheduler, cost))
        running = [step.seen.running for step in run.steps]
        waited = sorted(one.first_token_s - one.request.arrival_s for one in run.served)
        figures = f"{sum(running) / len(running):8.1f} {max(running):5} {waited[500]:23.2f}"
        print(f"{name:20} {figures} {waited[990]:6.2f} {scheduler.num_preemptions:11}")
        first_token_s[name] = waited[500]
        assert scheduler.allocator.num_free == 640
        assert all(len(one.token_s) == one.request.output_tokens for one in run.served)
    print(f"\nthe second of them: {run.steps[-1].end_s:.0f} s of traffic, ", end="")
    print(f"both simulated in {time.perf_counter() - started:.1f} s")
    assert first_token_s["paged"] < first_token_s["reserve maximum"] / 10
    print("ok: every request got its tokens, all blocks are free, and paging waits far less")


if __name__ == "__main__":
    demo()
