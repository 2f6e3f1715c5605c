"""Requests that arrive over time: latency against rate, for a recorded trace or drawn lengths.

An open loop: each request arrives at its time, however long the queue is, because clients know
nothing of each other. The normalised latency is the time from arrival to the last token, divided by
the tokens, as in the paper. At a low rate it is the same for all memory plans. From some rate on it
rises steeply: that is the rate that a plan can serve. Other figures are the times to the first
token and between tokens (p50, p90, p99) and how many requests run, as a mean over each tenth of the
run.

The trace is a CSV file with TIMESTAMP, ContextTokens and GeneratedTokens, as Azure publishes them
(github.com/Azure/AzurePublicDataset; Patel et al. 2024, "Splitwise", ISCA). It is named by --trace,
or found under traces/ in the folder that PAGEDGPT_DATA names. Without one, lengths are drawn from
two independent lognormal distributions with the published medians of conversations, 1,020 tokens in
and 129 out, and the public trace's spreads of the logarithms, 0.985 and 0.859. The real trace has
peaks, and its short prompts tend to have short answers, so drawn lengths give other figures. The
output and the workload of each row say which of the two it was.

Each contender is an allocator, a reservation and a rule of admission under the same scheduler, in
a pool of the same bytes, with the same kernel. What differs is which blocks a sequence gets and how
many are kept free for it. They run in the real engine, with the shipped model and all lengths
divided by 4 (--shrink), or in the simulated one (--simulate, simulate.py), where a step takes

    a + b x tokens + c x KV tokens      --cost a b c, or fitted to a recording by --cost-from

milliseconds. The default cost is worked out, not measured, for GPT-2 124M on an H200 in 16 bits:
1.5 ms for about 140 launches by a host in Python, 0.25 GFLOP a token at 500 TFLOP/s, 36,864 bytes
of K and V a token at 4.3 TB/s.
"""

import argparse
import csv
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from block_allocator import BlockAllocator
from checkpoints.load import load_model
from engine import InferenceEngine, eager_forward
from experiments.ceilings import Columns
from experiments.reservations import (
    BuddyAllocator,
    power_of_two,
    reserve_maximum,
    reserve_oracle,
    reserve_power_of_two,
)
from experiments.results import Measurement, device_name, percentile
from experiments.simulate import (
    Arrival,
    CostModel,
    Run,
    SimulatedEngine,
    admit_all,
    fit,
    poisson,
    pool_state,
    serve,
    static_batches,
)
from experiments.speed import model_columns, threads_for
from kernels.backends import BACKENDS, DTYPES, resolve_backend, resolve_device, resolve_dtype
from kernels.device_memory import preallocate
from kernels.packed_linear import pack
from kv_cache import Batch, KVCache
from llm import SHIPPED_MODEL
from model import GPT
from sampling import SamplingParams
from scheduler import Scheduler, reserve_now
from sequence import Plan
from watch.recorder import read_recording

HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
TRACE_NAME = Path("traces") / "AzureLLMInferenceTrace_conv_2023.csv"
DRAWN = (1020, 0.985), (129, 0.859)  # median, deviation of the logarithm; of prompts, of outputs
DRAWN_PER_S = 5.5  # requests, as in the hour that the trace recorded
SHORT = (16, 64), (16, 256)  # tokens in and out, uniform
H200 = CostModel(1.5, 0.0005, 8.6e-6)
GPT2_KV_BYTES = 36_864  # a token, in 16 bits: 12 layers x 2 x 768 x 2 bytes


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose the requests."""
    add = parser.add_argument
    add("--trace", help=f"a CSV file; default: {TRACE_NAME} in the folder PAGEDGPT_DATA, if any")
    workloads = ["chats", "short"]
    add("--workload", default="chats", choices=workloads, help="short: 16-64 in, 16-256 out")
    add("--fit", default="filter", choices=["filter", "scale"], help="what becomes of longer ones")
    add("--max-seq-len", type=int, default=1024, help="longest sequence, prompt and output")
    add("--shrink", type=int, help="divide all lengths by this; default 1, the real engine 4")
    add("--requests", type=int, help="only the first so many; default all, the real engine 48")
    add("--repeats", type=int, default=5, help="rounds of the real engine; a simulation needs one")
    add("--seed", type=int, default=0, help="of all that is drawn")


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that choose the pool, and the model or the cost of its steps."""
    add = parser.add_argument
    add("--simulate", action="store_true", help="no model, only its time: hours in seconds")
    add("--cost", type=float, nargs=3, metavar="MS", help="of a step, a token, a KV token")
    add("--cost-from", metavar="FILE", help="fit the cost to a recording (generate.py --record)")
    add("--blocks", type=int, help="pool size; default 4096, the real engine 8 longest sequences")
    add("--block-size", type=int, default=16, help="tokens in a block")
    add("--budget", type=int, default=2048, help="tokens in one step, at most")
    add("--model", default=str(SHIPPED_MODEL), help="the real engine's: a folder, or random:gpt2")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="of weights, K and V")
    add("--backend", default="auto", choices=["auto", *BACKENDS], help="the real engine's kernel")
    add("--threads", type=int, help="of the CPU; default: all, for the shipped model 1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `trace`."""
    add_workload_arguments(parser)
    add_machine_arguments(parser)
    add = parser.add_argument
    add("--arrivals", default="poisson", choices=["poisson", "recorded"], help="when they come")
    add("--factors", type=float, nargs="+", help="rates, as multiples of the trace's own")
    add("--policies", nargs="+", choices=[*CONTENDERS], help="memory plans; default paged")


# ---- which requests ------------------------------------------------------------------------------
def read_trace(path: str | Path) -> list[Arrival]:
    """The requests of a CSV file in the order of arrival, the first at 0 s.

    Raises ValueError with the file, the line and the reason for anything that is not a trace.
    """
    found: list[tuple[float, int, int]] = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            try:
                header = next(lines, None)
                if header != HEADER:
                    raise ValueError(f"the header is {header}, a trace has {','.join(HEADER)}")
                found.extend(map(_parse, lines))
                if not found:
                    raise ValueError("there is no request after the header")
            except (ValueError, csv.Error) as error:
                raise ValueError(f"{path}, line {max(lines.line_num, 1)}: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    found.sort()
    return [Arrival(second - found[0][0], *lengths) for second, *lengths in found]


def _parse(cells: list[str]) -> tuple[float, int, int]:
    """Seconds since 1970 and two numbers of tokens, or ValueError with the reason."""
    if len(cells) != len(HEADER):
        raise ValueError(f"{len(cells)} cells, {len(HEADER)} are needed: {','.join(HEADER)}")
    stamp, *numbers = cells
    # A datetime holds six decimals and the trace has seven, so they are added as a number.
    whole, _, decimals = stamp.partition(".")
    try:
        second = (datetime.fromisoformat(whole) - datetime(1970, 1, 1)).total_seconds()
        if not (decimals or "0").isdigit():
            raise ValueError
        second += float(f"0.{decimals or 0}")
    except (ValueError, TypeError):
        raise ValueError(f"TIMESTAMP is {stamp!r}: as in 2023-11-16 18:15:46.6805900") from None
    for name, number in zip(HEADER[1:], numbers, strict=True):
        if not (number.isascii() and number.isdigit() and int(number)):
            raise ValueError(f"{name} is {number!r}: it must be an integer of at least 1")
    return second, int(numbers[0]), int(numbers[1])


def draw_chats(num_requests: int, seed: int) -> list[Arrival]:
    """Lengths from the published distribution (see the top), arrivals at the trace's rate."""
    draw = random.Random(seed)

    def length(median: int, spread: float) -> int:
        return max(1, round(median * math.exp(draw.gauss(0, spread))))

    chats = [Arrival(0.0, *(length(*each) for each in DRAWN)) for _ in range(num_requests)]
    return list(poisson(chats, DRAWN_PER_S, seed))


def draw_short(num_requests: int, seed: int) -> list[Arrival]:
    """Short prompts and answers, uniform, arrivals at the trace's rate."""
    draw = random.Random(seed)
    chats = [Arrival(0.0, *(draw.randint(*each) for each in SHORT)) for _ in range(num_requests)]
    return list(poisson(chats, DRAWN_PER_S, seed))


def fit_context(
    requests: list[Arrival], max_seq_len: int, method: str
) -> tuple[list[Arrival], str]:
    """Requests of at most `max_seq_len` tokens, and a sentence about the longer ones.

    The method "filter" leaves longer ones out; "scale" shrinks prompt and output of each by one
    factor. Raises ValueError if no request is left.
    """
    fits = [r.prompt_tokens + r.output_tokens <= max_seq_len for r in requests]
    counts = f"{sum(fits):,} of {len(fits):,} requests fit {max_seq_len:,} tokens"
    if method == "filter":
        kept = [request for request, is_short in zip(requests, fits, strict=True) if is_short]
        if not kept:
            raise ValueError(f"{counts}: raise --max-seq-len, or --fit scale")
        return kept, f"{counts}, the others are left out"
    kept = []
    for request, is_short in zip(requests, fits, strict=True):
        total = request.prompt_tokens + request.output_tokens
        kept.append(request if is_short else scale(request, max_seq_len, total, max_seq_len))
    return kept, f"{counts}, the others are scaled down to that"


def scale(request: Arrival, numerator: int, denominator: int, max_tokens: int) -> Arrival:
    """Both lengths times a fraction, rounded down to at least 1, together at most `max_tokens`."""
    prompt_tokens = max(1, request.prompt_tokens * numerator // denominator)
    prompt_tokens = min(prompt_tokens, max_tokens - 1)
    output_tokens = max(1, request.output_tokens * numerator // denominator)
    return Arrival(request.arrival_s, prompt_tokens, min(output_tokens, max_tokens - prompt_tokens))


class Workload(NamedTuple):
    """The requests, and a description of them."""

    requests: list[Arrival]  # in the order of arrival
    name: str  # for the row's workload
    sentence: str  # for the reader: their source, and how many were left out or scaled
    max_seq_len: int


def make_workload(args: argparse.Namespace) -> Workload:
    """The requests that the flags ask for. Raises ValueError for a bad file or a bad flag."""
    _check_flags(args)
    folder = os.environ.get("PAGEDGPT_DATA")
    path = args.trace or (folder and Path(folder) / TRACE_NAME)
    if args.workload == "short":
        found, source = draw_short(args.requests or 4000, args.seed), "short chats, drawn uniformly"
    elif path:
        found, source = read_trace(path), Path(path).stem
    else:
        found, source = draw_chats(20_000, args.seed), "drawn from the published lengths"
    requests, sentence = fit_context(found, args.max_seq_len, args.fit)
    requests = requests[: args.requests or (None if args.simulate else 48)]
    longest, shrink = args.max_seq_len, args.shrink or (1 if args.simulate else 4)
    name = f"{source}, {args.fit} {longest}"
    if shrink > 1:
        longest //= shrink
        if longest < 2:
            raise ValueError(f"--shrink {shrink} leaves {longest} tokens of context: lower it")
        requests = [scale(request, 1, shrink, longest) for request in requests]
        name, sentence = f"{name} / {shrink}", f"{sentence}; all lengths divided by {shrink}"
    sentence = f"{source}: {sentence}; {len(requests):,} are served"
    return Workload(requests, f"{name}, requests={len(requests)}", sentence, longest)


def _check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for a number that is too small."""
    minima = {"max_seq_len": 2, "shrink": 1, "requests": 2, "blocks": 1, "block_size": 1}
    minima |= {"budget": 1, "repeats": 1}
    for name, minimum in minima.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {value}: it must be at least {minimum}")


def at_rate(requests: list[Arrival], arrivals: str, factor: float, seed: int) -> list[Arrival]:
    """The same requests `factor` times as fast: as recorded, or at random with that mean rate."""
    span_s = requests[-1].arrival_s - requests[0].arrival_s
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"--factors has {factor}: a rate is a number above 0")
    if span_s <= 0:
        raise ValueError("all requests arrive at once: there is no rate to multiply")
    if arrivals == "poisson":
        return list(poisson(requests, factor * (len(requests) - 1) / span_s, seed))
    first_s = requests[0].arrival_s
    return [r._replace(arrival_s=(r.arrival_s - first_s) / factor) for r in requests]


# ---- the contenders ------------------------------------------------------------------------------
class Contender(NamedTuple):
    """A memory plan."""

    allocator: type[BlockAllocator]
    reserve: Callable[[int], Callable]  # max_seq_len -> tokens that a sequence reserves
    region: Callable[[int], int] = int  # blocks asked for -> blocks taken
    is_static: bool = False


def reserve_power_of_two_in_all(max_seq_len: int) -> Callable[..., int]:
    """Prompt and output together, rounded up to a power of two: 20 + 5 tokens -> room for 32."""
    return lambda seq: min(power_of_two(seq.num_prompt_tokens + seq.max_tokens), max_seq_len)


# The paper's contiguous memory comes from buddies. "Perfect fit" reserves as much, but in blocks
# anywhere in the pool: the best that a reservation could do if no gap between slabs was ever lost.
CONTENDERS = {
    "paged": Contender(BlockAllocator, lambda max_seq_len: reserve_now),
    "oracle, perfect fit": Contender(BlockAllocator, reserve_oracle),
    "power of two, perfect fit": Contender(BlockAllocator, reserve_power_of_two_in_all),
    "maximum, perfect fit": Contender(BlockAllocator, reserve_maximum),
    "oracle, buddies": Contender(BuddyAllocator, reserve_oracle, power_of_two),
    "power of two, buddies": Contender(BuddyAllocator, reserve_power_of_two, power_of_two),
    "maximum, buddies": Contender(BuddyAllocator, reserve_maximum, power_of_two),
    "static batches": Contender(BuddyAllocator, reserve_maximum, power_of_two, is_static=True),
}


def cost_model(args: argparse.Namespace) -> tuple[CostModel, str]:
    """The cost of a step that the flags ask for, and a sentence that says its source.

    The first step of a recording is left out, because kernels may be compiled in it. Raises
    ValueError for a negative cost, or a recording of too few steps.
    """
    if args.cost_from:
        steps = [
            (
                sum(s["new_tokens"] for s in step["sequences"]),
                sum(s["num_computed_tokens"] for s in step["sequences"] if s["new_tokens"]),
                step["milliseconds"],
            )
            for step in read_recording(args.cost_from)[1][1:]
        ]
        cost, residual_ms = fit(steps)
        source = f"fitted to {len(steps)} steps of {args.cost_from}, off by {residual_ms:.3g} ms"
    elif args.cost:
        cost, source = CostModel(*args.cost), "given"
    else:
        cost, source = H200, "H200, worked out"
    if min(cost) < 0 or max(cost) == 0:
        raise ValueError(f"--cost {' '.join(map(str, cost))}: none below 0, one above it")
    a, b, c = cost
    return cost, f"a step takes {a:.3g} ms + {b:.3g} a token + {c:.3g} a KV token: {source}"


class RealEngine:
    """A model's engine with the interface of `SimulatedEngine`, on the real clock.

    It has a new pool and random prompts. `look` is called in each step between plan and update.
    """

    def __init__(self, model: GPT, backend: str, scheduler: Scheduler, look: Callable, seed: int):
        config, weight = model.config, model.wte.weight
        cache = KVCache(
            config.n_layer,
            scheduler.allocator.num_blocks,
            scheduler.allocator.block_size,
            config.n_head,
            config.head_dim,
            weight.dtype,
            weight.device,
            preallocate,
        )
        kernels = BACKENDS[backend]
        forward = eager_forward(model, cache, kernels.paged_attention, kernels.write_kv)
        self._seen: Any = None

        def look_and_forward(batch: Batch) -> torch.Tensor:
            self._seen = look(scheduler)
            return forward(batch)

        self.engine = InferenceEngine(look_and_forward, cache, scheduler, config.vocab_size)
        self._draw = random.Random(seed)
        self._started = time.perf_counter()

    @property
    def now_s(self) -> float:
        """Seconds since this engine was made."""
        return time.perf_counter() - self._started

    def wait_until(self, second: float) -> None:
        """Sleep until then."""
        while self.now_s < second:
            time.sleep(max(0.0, second - self.now_s))

    def add(self, prompt_tokens: int, max_tokens: int) -> str:
        """Add a request with a random prompt, for exactly `max_tokens` tokens; returns its id."""
        prompt = [self._draw.randrange(self.engine.vocab_size) for _ in range(prompt_tokens)]
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        return self.engine.add_request(prompt, params)

    def has_unfinished(self) -> bool:
        """Whether a further `step()` has work."""
        return self.engine.has_unfinished()

    def step(self) -> tuple[Plan, float, Any]:
        """Run one step: its plan, its milliseconds, and what `look` returned."""
        output = self.engine.step()
        return output.plan, output.timings.total, self._seen


class Machine:
    """What all contenders run on: one model or one cost model, and pools of one size."""

    def __init__(self, args: argparse.Namespace, max_seq_len: int):
        self.args, self.max_seq_len = args, max_seq_len
        slab = power_of_two(-(-max_seq_len // args.block_size))  # blocks of the longest sequence
        self.num_blocks = args.blocks or (4096 if args.simulate else 8 * slab)
        self.batch_size = self.num_blocks // slab  # of a static batch: every slab is taken
        if self.batch_size < 1:
            raise ValueError(f"--blocks {self.num_blocks}: one slab alone needs {slab}, raise it")
        if args.simulate:
            self.cost, self.clock = cost_model(args)
            token_bytes = GPT2_KV_BYTES
        else:
            self._load(args)
            self.clock = f"the engine on {device_name(self.device)}"
            token_bytes = self.model.config.kv_bytes_per_token(self.model.wte.weight.dtype)
        self.pool_bytes = token_bytes * args.block_size * self.num_blocks

    def _load(self, args: argparse.Namespace) -> None:
        """Load the model of the real engine."""
        self.device = resolve_device(args.device)
        torch.set_num_threads(threads_for(args.model, args.threads))
        model = load_model(args.model, resolve_dtype(args.dtype, self.device), self.device)
        self.model = pack(model)
        limit = self.model.config.max_seq_len
        if self.max_seq_len > limit:
            found = f"sequences of {self.max_seq_len} tokens, the model has {limit} positions"
            raise ValueError(f"{found}: raise --shrink or lower --max-seq-len")
        self.backend = resolve_backend(args.backend, self.device, self.model.wte.weight.dtype)

    def serve(self, name: str, requests: list[Arrival], look: Callable = pool_state) -> Run:
        """Serve all requests with the contender of this name, in a new pool.

        Asserts that runs are comparable: every request got all its tokens, no block was lost.
        """
        contender, args = CONTENDERS[name], self.args
        scheduler = Scheduler(
            contender.allocator(self.num_blocks, args.block_size),
            max_num_seqs=len(requests),  # no limit: memory alone decides how many run
            max_num_batched_tokens=args.budget,
            max_seq_len=self.max_seq_len,
            reserve=contender.reserve(self.max_seq_len),
        )
        engine: Any
        if args.simulate:
            engine = SimulatedEngine(scheduler, self.cost, look)
        else:
            engine = RealEngine(self.model, self.backend, scheduler, look, args.seed)
        admit = static_batches(self.batch_size) if contender.is_static else admit_all
        run = serve(requests, engine, admit)
        assert all(len(one.token_s) == one.request.output_tokens for one in run.served)
        scheduler.allocator.check_integrity([])
        return run

    def in_turn(
        self,
        names: list[str],
        requests: list[Arrival],
        figures_of: Callable[[Run], dict],
        look_of: Callable[[str], Callable] = lambda name: pool_state,
    ) -> Iterator[tuple[str, list[dict]]]:
        """Each contender with the figures of its runs, in the order A B A B after a warm-up.

        A simulation gives the same figures each time, so one run is enough.
        """
        if self.args.simulate:
            for name in names:
                yield name, [figures_of(self.serve(name, requests, look_of(name)))]
            return
        self.serve(names[0], [request._replace(arrival_s=0.0) for request in requests[:4]])
        rounds: dict[str, list[dict]] = {name: [] for name in names}
        for _ in range(self.args.repeats):
            for name in names:
                rounds[name].append(figures_of(self.serve(name, requests, look_of(name))))
        yield from rounds.items()

    def columns(self) -> Columns:
        """The columns that all rows of a run share."""
        args = self.args
        if args.simulate:
            clock = {"device": "a simulated clock", "model": "gpt2's KV bytes"}
            return {"backend": "none", "dtype": "none", "threads": 1, "seed": args.seed} | clock
        return {
            "backend": self.backend,
            "dtype": str(self.model.wte.weight.dtype)[6:],
            "threads": torch.get_num_threads(),
            "device": device_name(self.device),
            "seed": args.seed,
        } | model_columns(args.model)

    def description(self) -> str:
        """Memory and clock, for the workload column."""
        pool = f"blocks={self.num_blocks} block_size={self.args.block_size}"
        if not self.args.simulate:
            return pool
        a, b, c = self.cost
        return f"{pool} cost={a:.3g}+{b:.3g}+{c:.3g}"


# ---- the experiment ------------------------------------------------------------------------------
Figures = dict[tuple[str, str], float]  # (metric, unit) -> value


def figures_of(run: Run) -> Figures:
    """The latencies of a run and how many requests ran."""
    first_ms = [1e3 * (one.token_s[0] - one.request.arrival_s) for one in run.served]
    gaps_ms = [
        1e3 * (b - a)
        for one in run.served
        for a, b in zip(one.token_s, one.token_s[1:], strict=False)
    ]
    latencies_s = [one.latency_per_token_s for one in run.served]
    figures = {("normalised latency, mean", "s/token"): sum(latencies_s) / len(latencies_s)}
    for name, values in (("time to first token", first_ms), ("time between tokens", gaps_ms)):
        if values:  # requests of one token have no gap
            figures |= {(f"{name}, p{p}", "ms"): percentile(values, p) for p in (50, 90, 99)}
    num_tokens = sum(len(one.token_s) for one in run.served)
    figures["generated tokens", "tokens/s"] = num_tokens / run.steps[-1].end_s
    figures["preempted", "times"] = sum(one.num_preemptions for one in run.served)
    for tenth, running in enumerate(running_over_time(run, 10), 1):
        figures[f"running, mean of tenth {tenth} of the run", "requests"] = running
    return figures


def running_over_time(run: Run, num_parts: int) -> list[float]:
    """Requests that run, as a mean over each of so many equal parts of the run's time."""
    width_s = run.steps[-1].end_s / num_parts
    request_seconds = [0.0] * num_parts
    for step in run.steps:
        start_s = step.end_s - step.milliseconds / 1e3
        for part in range(max(0, int(start_s / width_s)), num_parts):
            overlap_s = min(step.end_s, (part + 1) * width_s) - max(start_s, part * width_s)
            if overlap_s <= 0:
                break
            request_seconds[part] += step.seen.running * overlap_s
    return [total / width_s for total in request_seconds]


def rows_of(figures: list[Figures], columns: Columns) -> Iterator[Measurement]:
    """A row for each figure of a contender's runs."""
    for metric, unit in figures[0]:
        values = [each[metric, unit] for each in figures]
        yield Measurement.of(values, metric=metric, unit=unit, **columns)


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of `trace`."""
    threads_before = torch.get_num_threads()
    workload = make_workload(args)
    # Of the trace's own rate: 2.3 of its 5.5 requests a second fit 1,024 tokens.
    factors = args.factors or ([32, 64, 128, 192, 256] if args.simulate else [1, 2, 4])
    policies = list(dict.fromkeys(args.policies or ["paged"]))
    try:
        machine = Machine(args, workload.max_seq_len)
        print(f"{workload.sentence}\n{machine.clock}")
        for factor in factors:
            requests = at_rate(workload.requests, args.arrivals, factor, args.seed)
            per_s = len(requests) / (requests[-1].arrival_s - requests[0].arrival_s)
            rate = f"{args.arrivals} factor={factor:g} rate={per_s:.3g}/s"
            name = f"{workload.name}, {rate}, {machine.description()}"
            common = {"experiment": "trace", "workload": name} | machine.columns()
            for contender, figures in machine.in_turn(policies, requests, figures_of):
                yield from rows_of(figures, common | {"contender": contender})
    finally:
        torch.set_num_threads(threads_before)
