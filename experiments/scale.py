"""What replicas bring, and what the wire costs: many simulated engines behind one router.

Two parts:

    replicas   the real scheduler and prefix cache, 1 to 1,000 of them under one clock, behind each
               of the routers of serving/routing.py
    wire       the bytes that tensor parallelism sends for a token: arithmetic from a model's shape

A simulated replica computes prompts only, as in a cluster whose answers are written by other
machines: the router decides which blocks are found, and a token of an answer costs the same
everywhere. A token of the simulation is a block of the workload, so that the trace's block hashes
take the place of its tokens (see block_trace.py). A step of n tokens takes a + b n milliseconds,
where both numbers are arithmetic for 70 billion parameters on 8 A100, at half of their peak.

    arrivals ──> route(loads, found) ──> replica i: scheduler, prefix cache, clock
                    ^       what was sent, and every 2 s │ the keys of its cached blocks
                    └────────────────────────────────────┘

The traffic is the same whatever the number of replicas. So few replicas have a queue that grows to
the end, and of 1,000 most do nothing: the question is how many are enough, and what is found again
when the blocks of a conversation may lie in any of 1,000 pools. The conversations are made here;
the recorded trace is read from the folder PAGEDGPT_DATA, and left out without it.

Checked in tests/experiments/test_scale.py with runs that are worked out by hand.
"""

import argparse
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.allocator import counted_columns
from experiments.block_trace import TRACE_NAME, read_requests
from experiments.results import Measurement, percentile
from experiments.simulate import CostModel, SimulatedEngine
from prefix_cache import PrefixCache
from scheduler import Scheduler
from sequence import Request, Sequence
from serving.routing import ROUTERS, Known, block_keys, reported_keys, split_keys

# ---- the machine: arithmetic, not a measurement --------------------------------------------------
PARAMETERS = 70e9
GPUS = 8
# Of an A100 in bfloat16.
FLOPS = 312e12
BYTES_A_SECOND = 2.0e12
GPU_BYTES = 80e9
SHARE_OF_PEAK = 0.5
KV_BYTES = 2 * 80 * 8 * 128 * 2  # of a token: K and V, 80 layers, 8 heads of 128, 2 bytes
MACHINE = "70B parameters on 8 A100, arithmetic"
STEP_MS = 2 * PARAMETERS / (GPUS * BYTES_A_SECOND) * 1e3  # all weights are read once
TOKEN_MS = 2 * PARAMETERS / (GPUS * FLOPS * SHARE_OF_PEAK) * 1e3  # a product and a sum a weight
POOL_TOKENS = int((0.9 * GPUS * GPU_BYTES - 2 * PARAMETERS) / KV_BYTES)
STEP_TOKENS = 8192  # max_num_batched_tokens
REPORT_SECONDS = 2.0


class Prompt(NamedTuple):
    """One request: when it comes, and a number for each of its blocks."""

    arrival_s: float
    blocks: list[int]


# ---- workloads -----------------------------------------------------------------------------------
def conversations(count: int, turns: int, seed: int) -> list[Prompt]:
    """Conversations of `turns` turns that begin within ten minutes, in blocks of 64 tokens.

    Each begins with one of four system prompts of 8 blocks. A turn adds 1 to 4 blocks of a question
    and, before the next one, 2 to 6 of an answer. On average half a minute passes between turns.
    """
    draw = random.Random(seed)
    fresh = iter(range(100, 10**9))  # numbers of blocks that nobody else has
    prompts = []
    for _ in range(count):
        system = draw.randrange(4)
        blocks = [8 * system + i for i in range(8)]
        second = draw.uniform(0, 600)
        for _ in range(turns):
            blocks += [next(fresh) for _ in range(draw.randint(1, 4))]
            prompts.append(Prompt(second, list(blocks)))
            blocks += [next(fresh) for _ in range(draw.randint(2, 6))]
            second += draw.expovariate(1 / 30)
    return sorted(prompts)


def recorded(path: Path) -> list[Prompt]:
    """The requests of the recorded trace, in blocks of 512 tokens."""
    return [Prompt(time_ms / 1e3, blocks) for time_ms, blocks in read_requests(path)]


# ---- one replica ---------------------------------------------------------------------------------
class SimulatedReplica(SimulatedEngine):
    """A simulated engine with a prefix cache, and what the router knows of it."""

    def __init__(self, num_blocks: int, block_tokens: int):
        cost = CostModel(STEP_MS, TOKEN_MS * block_tokens, 0.0)
        self.cache = PrefixCache(num_blocks, block_size=1, salt=b"")
        budget = STEP_TOKENS // block_tokens
        super().__init__(Scheduler(self.cache, 256, budget, 10**6), cost, look=lambda _: None)
        self.known = Known()
        self.first_token_s: dict[int, float] = {}  # request -> when its prompt was complete
        self._num_unfinished = 0
        self._ending: list[float] = []  # when the requests of the last step end

    def ask(self, number: int, prompt: Prompt) -> None:
        """Queue a request for one token. ValueError if the pool is too small for it."""
        self.wait_until(prompt.arrival_s)
        request = Request(str(number), prompt.blocks, number)
        request.sequences = [Sequence(request, 0, list(prompt.blocks), len(prompt.blocks), 1)]
        self.scheduler.add(request)
        self._num_unfinished += 1

    def run_until(self, second: float) -> None:
        """Take all steps that begin before this second."""
        while self.has_unfinished() and self.now_s < second:
            plan, _, _ = self.step()
            for seq in plan.sampled:
                self.first_token_s[int(seq.request.request_id)] = self.now_s
                self._ending.append(self.now_s)
                self._num_unfinished -= 1

    def load(self, second: float) -> int:
        """How many requests it has at this second."""
        # The last step may end later than that.
        self._ending = [end for end in self._ending if end > second]
        return self._num_unfinished + len(self._ending)


# ---- many replicas under one clock ---------------------------------------------------------------
class Cluster:
    """Replicas, and a router that knows of them what a real one knows."""

    def __init__(self, num_replicas: int, router: str, block_tokens: int, seed: int = 0):
        self.block_tokens = block_tokens
        num_blocks = POOL_TOKENS // block_tokens
        self.replicas = [SimulatedReplica(num_blocks, block_tokens) for _ in range(num_replicas)]
        self.route = ROUTERS[router]
        self.reads_keys = router == "prefix"
        self.loads = [0] * num_replicas
        self.chosen: list[int] = []  # of each request: its replica
        self._report_due_s: dict[int, float] = {}
        self._draw = random.Random(seed)

    def send(self, prompt: Prompt, keys: list[bytes]) -> None:
        """Let all replicas run until a prompt comes, and give it to one of them."""
        now_s = prompt.arrival_s
        for i in [i for i, load in enumerate(self.loads) if load]:
            self.replicas[i].run_until(now_s)
            self.loads[i] = self.replicas[i].load(now_s)
        found = self._found(keys, now_s) if self.reads_keys else self.loads
        number = len(self.chosen)
        chosen = self.route(self.loads, found, number, self._draw)[0]
        self.replicas[chosen].ask(number, prompt)
        self.loads[chosen] += 1
        self.chosen.append(chosen)
        if self.reads_keys:
            self.replicas[chosen].known.send(keys, now_s)
            self._report_due_s.setdefault(chosen, now_s + REPORT_SECONDS)

    def _found(self, keys: list[bytes], now_s: float) -> list[float]:
        """Which share of the prompt each replica has, as far as it has told."""
        for i, due_s in list(self._report_due_s.items()):
            if due_s <= now_s:
                replica = self.replicas[i]
                replica.known.report(split_keys(reported_keys(replica.cache)), now_s)
                self._report_due_s[i] = now_s + REPORT_SECONDS
                if not self.loads[i]:
                    del self._report_due_s[i]  # nothing changes until its next request
        return [replica.known.share(keys) for replica in self.replicas]

    def finish(self, prompts: list[Prompt]) -> "Outcome":
        """Let everything end. Each block must be free then."""
        first_token_s: dict[int, float] = {}
        num_found = 0
        for replica in self.replicas:
            replica.run_until(float("inf"))
            assert replica.cache.num_free == replica.cache.num_blocks
            first_token_s |= replica.first_token_s
            num_found += replica.scheduler.num_blocks_hit
        waited_s = [first_token_s[i] - prompt.arrival_s for i, prompt in enumerate(prompts)]
        num_blocks = sum(len(prompt.blocks) for prompt in prompts)
        seconds = max(first_token_s.values()) - prompts[0].arrival_s
        return Outcome(
            found_percent=100 * num_found / num_blocks,
            tokens_per_s=num_blocks * self.block_tokens / seconds,
            median_s=percentile(waited_s, 50),
            p99_s=percentile(waited_s, 99),
        )


class Outcome(NamedTuple):
    """What a cluster did with a workload."""

    found_percent: float  # of the prompts' blocks
    tokens_per_s: float  # of prompts, from the first arrival to the last first token
    median_s: float  # to the first token
    p99_s: float


def serve(
    prompts: list[Prompt], num_replicas: int, router: str, block_tokens: int, seed: int = 0
) -> Outcome:
    """A whole workload through a cluster."""
    cluster = Cluster(num_replicas, router, block_tokens, seed)
    for prompt in prompts:
        keys = block_keys(prompt.blocks, 1, b"") if cluster.reads_keys else []
        cluster.send(prompt, keys)
    return cluster.finish(prompts)


# ---- the rows ------------------------------------------------------------------------------------
FIGURES = {  # field of Outcome -> metric, unit
    "found_percent": ("prompt tokens found", "%"),
    "tokens_per_s": ("prompt tokens", "tokens/s"),
    "median_s": ("time to first token", "s"),
    "p99_s": ("time to first token, 99th percentile", "s"),
}


def workloads(args: argparse.Namespace) -> Iterator[tuple[str, list[Prompt], int]]:
    """Name, requests and tokens a block of each workload that there is."""
    name = f"conversations={args.conversations} turns={args.turns}"
    yield name, conversations(args.conversations, args.turns, args.seed), 64
    folder = os.environ.get("PAGEDGPT_DATA")
    path = Path(folder or ".") / TRACE_NAME
    if folder and path.is_file():
        yield f"trace {path.stem}", recorded(path), 512
    else:
        print(f"the trace is left out: PAGEDGPT_DATA names no folder with {TRACE_NAME}")


def rows_of_replicas(args: argparse.Namespace) -> Iterator[Measurement]:
    """Rows of each router with each number of replicas."""
    common = counted_columns("scale") | {"model": MACHINE, "seed": args.seed}
    for name, prompts, block_tokens in workloads(args):
        for num_replicas in args.replicas:
            workload = f"{name} requests={len(prompts)} replicas={num_replicas}"
            for router in args.routers:
                result = serve(prompts, num_replicas, router, block_tokens, args.seed)
                own = common | {"contender": router, "workload": workload}
                for field, (metric, unit) in FIGURES.items():
                    value = getattr(result, field)
                    yield Measurement.of([value], metric=metric, unit=unit, **own)


def allreduced_bytes(n_layer: int, n_embd: int, ranks: int) -> float:
    """What a rank sends for a token: two sums a layer of C numbers of 2 bytes.

    A ring sends each number 2 (ranks - 1) / ranks times: once to sum it, once to tell the sum.
    """
    return 2 * n_layer * n_embd * 2 * 2 * (ranks - 1) / ranks


SHAPES = {"GPT-2 XL": (48, 1600), "70B": (80, 8192)}  # layers, C
LINKS = {  # bytes a second in one direction
    "NVLink of an H100": 450e9,
    "PCIe 5.0 x16": 64e9,
    "Ethernet, 100 Gbit/s": 12.5e9,
}
MICROSECONDS = {"NVLink of an H100": 10, "PCIe 5.0 x16": 20, "Ethernet, 100 Gbit/s": 50}


def rows_of_wire(args: argparse.Namespace) -> Iterator[Measurement]:
    """Bytes that a rank sends for a token, and the time of a step's sums on three links."""
    for model, (n_layer, n_embd) in SHAPES.items():
        common = counted_columns("scale") | {"model": model, "contender": model}
        for ranks in (2, 4, 8):
            sent = allreduced_bytes(n_layer, n_embd, ranks)
            own = common | {"workload": f"tensor parallel, arithmetic, ranks={ranks}"}
            yield Measurement.of([sent], metric="bytes sent a token", unit="bytes", **own)
            for link, rate in LINKS.items():
                for tokens in (1, 8192):
                    # A sum takes its bytes' time, and never less than the link's latency.
                    sum_us = max(MICROSECONDS[link], sent * tokens / (2 * n_layer) / rate * 1e6)
                    metric = f"sums of a step of {tokens} tokens, {link}"
                    value = 2 * n_layer * sum_us / 1e3
                    yield Measurement.of([value], metric=metric, unit="ms", **own)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Measurement]]] = {
    "replicas": rows_of_replicas,
    "wire": rows_of_wire,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `scale`."""
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which (default all)")
    counts = [1, 4, 16, 64, 250, 1000]
    add("--replicas", nargs="+", type=int, default=counts, help="how many (default 1 to 1000)")
    add("--routers", nargs="+", choices=ROUTERS, default=list(ROUTERS), help="(default all)")
    add("--conversations", type=int, default=2000, help="(default 2000)")
    add("--turns", type=int, default=5, help="of a conversation (default 5)")
    add("--seed", type=int, default=0, help="of the conversations and of the routers' draws")


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of `scale`."""
    if min(args.replicas) < 1:
        raise ValueError(f"--replicas {min(args.replicas)}: at least 1 is needed")
    for part in args.parts:
        yield from PARTS[part](args)
