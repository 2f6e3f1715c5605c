"""Whole workloads of the engine: mixed requests, prompts alone, a prompt that joins, a profile.

`latency` yields these rows after its own.

Mixed requests are all there at the start. They are served in each way in turn: one step after the
other, planned one step ahead (speedups/plan_ahead.py), and planned ahead with fused kernels if the
GPU has them. The last way is also tried with a smaller token budget, or against transformers'
continuous batching. Each must write as many tokens as were asked for, and nearly the same tokens.

A prompt joins running sequences: a step computes their next tokens and as much of the prompt as the
token budget allows. A large budget makes this step long, and every running sequence waits for it.
A small budget cuts the prompt into many steps (chunked prefill): the largest gap between two tokens
shrinks, and the prompt's own first token comes later.

A profile counts what a step asks of a GPU. A step that should be one launch, one copy and one wait
may copy seven times and wait three times, and its tokens are right nevertheless. PyTorch's profiler
lists all that the host called and the device did, with start and end:

    host     |mark .................................................|   calls within the mark count:
                 copy  launch        wait                               copies, launches, waits
    device           [copy][kernel][kernel]  .  [kernel]  .  [copy]     the gaps are idle time

Kernels of a recorded graph are listed one by one.
"""

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments import peers
from experiments.ceilings import Columns
from experiments.kernels import parse_shape
from experiments.names import AHEAD, AHEAD_FUSED, FEW, FEW_STEP_TOKENS, SERIAL, STEP_TOKENS
from experiments.peers import CONTINUOUS, random_ids
from experiments.results import Measurement
from experiments.speed import Trial, check_equal_work
from experiments.transformers_engines import Continuous, as_transformers
from kernels.triton_fused import can_fuse
from llm import LLM, SamplingParams
from model import GPT
from watch.files import replacing

PROFILED_STEPS = 20
NUM_LONGEST = 10  # kernels that a profile names
MARK = "the steps that are counted"
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
ALLOCATIONS = ("cudaMalloc", "cudaMallocAsync", "cudaFree", "cudaFreeAsync")
# The fields of a profile that become rows: the field, the row's metric and its unit.
PROFILE_ROWS = [
    ("kernels", "kernels a step", "launches"),
    ("copies_to_device", "copies to the device a step", "copies"),
    ("waits", "waits a step", "waits"),
    ("allocations", "device allocations a step", "calls"),
    ("idle_percent", "device idle", "%"),
]


# ---- mixed requests ------------------------------------------------------------------------------
def ways_to_serve(model: GPT, device: torch.device) -> dict[str, dict[str, Any]]:
    """The options of `LLM`, by contender."""
    ways: dict[str, dict[str, Any]] = {SERIAL: {}, AHEAD: {"plan_ahead": True}}
    if device.type == "cuda" and can_fuse(model) is None:
        ways[AHEAD_FUSED] = {"plan_ahead": True, "fused": True}
    return ways


def mixed_requests(vocab_size: int, args: argparse.Namespace) -> list[tuple[list[int], int]]:
    """(prompt, tokens to write) pairs; both lengths are uniform within --lengths."""
    draw = random.Random(args.seed)
    shortest, longest = args.lengths
    requests = []
    for _ in range(args.requests):
        length = draw.randint(shortest, longest)
        prompt = [draw.randrange(vocab_size) for _ in range(length)]
        requests.append((prompt, draw.randint(shortest, longest)))
    return requests


def serve(llm: LLM, requests: list[tuple[list[int], int]]) -> Trial:
    """Serve (prompt, tokens to write) pairs that are all there at the start."""
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for _, n in requests]
    prompts = [prompt for prompt, _ in requests]
    trial = Trial([])

    def work() -> None:
        outputs = llm.generate(prompts, params)
        trial.token_ids = [output.outputs[0].token_ids for output in outputs]

    trial.seconds = peers.time_ms(work, llm.engine.cache.pool.device) / 1e3
    assert [len(token_ids) for token_ids in trial.token_ids] == [n for _, n in requests]
    return trial


def serve_theirs(manager: Continuous, requests: list[tuple[list[int], int]]) -> Trial:
    """Serve (prompt, tokens to write) pairs by transformers' continuous batching."""
    trial = Trial([])

    def work() -> None:
        trial.token_ids = [output.generated_tokens for output in manager.serve(requests)]

    trial.seconds = peers.time_ms(work, torch.device("cpu")) / 1e3  # the tokens are on the host
    assert [len(token_ids) for token_ids in trial.token_ids] == [n for _, n in requests]
    return trial


def throughput(
    model: GPT, args: argparse.Namespace, common: Columns, has_peer: bool = False
) -> Iterator[Measurement]:
    """Rows of mixed requests, served in each way in turn; with a peer, only the last way and it."""
    requests = mixed_requests(model.config.vocab_size, args)
    blocks = sum(-(-(len(prompt) + n) // args.block_size) for prompt, n in requests)
    ways = ways_to_serve(model, args.device)
    fastest = list(ways)[-1]
    small = {"max_num_batched_tokens": FEW_STEP_TOKENS}
    ways = {fastest: ways[fastest]} if has_peer else ways | {fastest + FEW: ways[fastest] | small}
    servers: dict[str, Callable[[], Trial]] = {}
    for name, options in ways.items():
        sizes = {
            "block_size": args.block_size,
            # A step is planned ahead only if there is a free block for each sequence.
            "num_blocks": blocks + len(requests),
            "max_num_seqs": min(256, len(requests)),
            "max_num_batched_tokens": STEP_TOKENS,
        }
        # Every round computes all prompts.
        llm = LLM(model, enable_prefix_caching=False, **(sizes | options))
        servers[name] = partial(serve, llm, requests)
    with ExitStack() as stack:
        columns = dict.fromkeys(servers, common)
        if has_peer:
            manager = Continuous(as_transformers(model), 2 * blocks, STEP_TOKENS, args.block_size)
            servers[CONTINUOUS] = partial(serve_theirs, stack.enter_context(manager), requests)
            columns[CONTINUOUS] = common | {"backend": manager.backend}
        trials: dict[str, list[Trial]] = {name: [] for name in servers}
        for _ in range(args.rounds + 1):  # the first round warms up
            for name, server in servers.items():
                trials[name].append(server())
                first = next(iter(trials.values()))[0]
                check_equal_work(name, trials[name][-1], first, args.dtype.itemsize)
    yield from rows_of_requests(trials, columns, args)


def rows_of_requests(
    trials: dict[str, list[Trial]], columns: dict[str, Columns], args: argparse.Namespace
) -> Iterator[Measurement]:
    """Output tokens a second of each way; its speed against the first, or the peer's against it."""
    shortest, longest = args.lengths
    workload = f"requests={args.requests} prompts and texts of {shortest}..{longest} tokens"
    seconds = {name: [trial.seconds for trial in ts[1:]] for name, ts in trials.items()}
    first, *others = seconds
    num_tokens = sum(map(len, trials[first][0].token_ids))
    for name, taken in seconds.items():
        rates = [num_tokens / s for s in taken]
        own = columns[name] | {"workload": workload, "contender": name}
        yield Measurement.of(rates, metric="output tokens", unit="tokens/s", **own)
    for name in others:
        slower, faster = (name, first) if name == CONTINUOUS else (first, name)
        against = {"contender": faster, "metric": f"speed against {slower}", "unit": "x"}
        own = columns[faster] | {"workload": workload} | against
        yield Measurement.ratio_of(seconds[slower], seconds[faster], **own)


# ---- prompts -------------------------------------------------------------------------------------
def prefill(model: GPT, args: argparse.Namespace, common: Columns) -> Iterator[Measurement]:
    """Rows of steps that compute prompts and the first token of each."""
    for B, T in map(parse_shape, args.prefill):
        llm = LLM(
            model,
            enable_prefix_caching=False,  # every round computes all prompts
            block_size=args.block_size,
            num_blocks=B * -(-(T + 1) // args.block_size),
            max_num_seqs=B,
            max_num_batched_tokens=B * T,
            cuda_graphs=False,  # only decode steps are recorded, and there is none
        )
        ours, prompts = peers.Ours(llm, 1), random_ids(model, B, T, args.seed)
        rates = []
        for number in range(args.rounds + 1):
            taken_ms = peers.time_ms(partial(ours.start, prompts), args.device)
            ours.finish()  # each has the one token that it asked for
            if number > 0:
                rates.append(B * T * 1e3 / taken_ms)
        columns = common | {"contender": SERIAL, "workload": f"prefill batch={B} prompt={T}"}
        yield Measurement.of(rates, metric="prompt tokens", unit="tokens/s", **columns)


class Gaps(NamedTuple):
    """Milliseconds around a prompt that joins running sequences."""

    before_ms: float  # the median step before the prompt came
    largest_ms: float  # the longest step until the prompt's first token
    first_token_ms: float  # until the prompt's first token


def time_joining(llm: LLM, prompts: Tensor, long_prompt: list[int], new_tokens: int) -> Gaps:
    """Let one prompt join sequences that decode. Each step is a gap between two of their tokens."""
    engine, num_running = llm.engine, len(prompts)
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    for prompt in prompts.tolist():
        engine.add_request(prompt, params)
    while len(engine.step().plan.sampled) < num_running:
        pass  # some prompts are not complete yet

    def time_step() -> tuple[float, set[str]]:
        started = time.perf_counter()
        sampled = engine.step().plan.sampled
        taken_ms = (time.perf_counter() - started) * 1e3
        assert len(sampled) >= num_running, "a running sequence got no token"
        return taken_ms, {seq.request.request_id for seq in sampled}

    before_ms = median(time_step()[0] for _ in range(4))
    joined = engine.add_request(long_prompt, SamplingParams(temperature=0, max_tokens=1))
    gaps_ms, has_token = [], False
    while not has_token:
        gap_ms, sampled_ids = time_step()
        gaps_ms.append(gap_ms)
        has_token = joined in sampled_ids
    while engine.has_unfinished():
        engine.step()
    return Gaps(before_ms, max(gaps_ms), sum(gaps_ms))


def joining(model: GPT, args: argparse.Namespace, common: Columns) -> Iterator[Measurement]:
    """Rows of a prompt that joins running sequences, for each token budget in turn."""
    B = max(batch for batch, _ in args.shapes)
    T = args.shapes[0][1]
    P = args.join
    if not args.budgets:
        return
    if min(args.budgets) <= B:
        raise ValueError(f"a budget of {min(args.budgets)} tokens, {B} sequences: raise --budgets")
    # So many that all still run when the prompt is complete: steps that compute their own prompts,
    # four that are timed before, and those that compute the long prompt.
    new_tokens = -(-(B * T + P) // (min(args.budgets) - B)) + 1 + 4 + 2
    length = T + new_tokens
    if max(length, P + 2) > model.config.max_seq_len:
        limit = model.config.max_seq_len
        raise ValueError(f"{max(length, P + 2)} tokens: the model has {limit} positions")
    blocks = B * -(-length // args.block_size) + -(-(P + 2) // args.block_size)
    llms = {
        budget: LLM(
            model,
            enable_prefix_caching=False,
            block_size=args.block_size,
            num_blocks=blocks,
            max_num_seqs=B + 1,
            max_num_batched_tokens=budget,
        )
        for budget in args.budgets
    }
    prompts = random_ids(model, B, T, args.seed)
    long_prompt = random_ids(model, 1, P, args.seed + 1)[0].tolist()
    rounds: dict[int, list[Gaps]] = {budget: [] for budget in llms}
    for number in range(args.rounds + 1):
        for budget, llm in llms.items():
            gaps = time_joining(llm, prompts, long_prompt, new_tokens)
            if number > 0:
                rounds[budget].append(gaps)
    columns = common | {"workload": f"joining batch={B} context={T} prompt={P}", "unit": "ms"}
    for budget, all_gaps in rounds.items():
        columns |= {"contender": f"budget={budget}"}
        largest_ms = [gaps.largest_ms for gaps in all_gaps]
        yield Measurement.of(largest_ms, metric="largest gap between tokens", **columns)
        before_ms = [gaps.before_ms for gaps in all_gaps]
        yield Measurement.of(before_ms, metric="gap before the prompt joins", **columns)
        first_ms = [gaps.first_token_ms for gaps in all_gaps]
        yield Measurement.of(first_ms, metric="time to first token", **columns)


# ---- a profile -----------------------------------------------------------------------------------
class Event(NamedTuple):
    """A call of the host, or some work of the device."""

    name: str
    on_device: bool
    start_us: float
    end_us: float


class Profile(NamedTuple):
    """Counts and times of some steps; all are per step."""

    kernels: float
    graphs: float  # launches of a whole graph
    copies_to_device: float
    copies_to_host: float
    waits: float
    allocations: float  # calls to the driver that take memory or give it back
    step_us: float  # of the device's time, from its first work to its last
    idle_percent: float  # of that time
    longest: list[tuple[float, float, str]]  # microseconds a step, times a step, kernel


def busy_us(events: list[Event]) -> float:
    """Time in which at least one of the events was going on: (0, 5), (3, 8), (20, 21) are 9."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start_us):
        total += max(0.0, event.end_us - max(event.start_us, end))
        end = max(end, event.end_us)
    return total


def count(events: list[Event], num_steps: int) -> Profile:
    """The profile of the events. Raises ValueError if there is no mark, or no work of a device."""
    marks = [event for event in events if event.name == MARK and not event.on_device]
    done = [event for event in events if event.on_device and event.name != MARK]
    if not marks or not done:
        raise ValueError(f"{len(marks)} marks, {len(done)} events of a device: nothing to count")
    begin, end = marks[0].start_us, marks[0].end_us
    called = [e.name for e in events if not e.on_device and begin <= e.start_us <= end]
    kernels = [e for e in done if not e.name.startswith(("Memcpy", "Memset"))]

    def per_step(names: list[str], start: str) -> float:
        return sum(name.startswith(start) for name in names) / num_steps

    by_name: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        by_name[event.name].append(event.end_us - event.start_us)
    longest = [(sum(t) / num_steps, len(t) / num_steps, name) for name, t in by_name.items()]
    span_us = max(e.end_us for e in done) - min(e.start_us for e in done)
    names = [event.name for event in done]
    return Profile(
        kernels=len(kernels) / num_steps,
        graphs=per_step(called, "cudaGraphLaunch"),
        copies_to_device=per_step(names, "Memcpy HtoD"),
        copies_to_host=per_step(names, "Memcpy DtoH"),
        waits=sum(name in WAITS for name in called) / num_steps,
        allocations=sum(name in ALLOCATIONS for name in called) / num_steps,
        step_us=span_us / num_steps,
        idle_percent=100 * (1 - busy_us(done) / span_us) if span_us else 0.0,
        longest=sorted(longest, reverse=True)[:NUM_LONGEST],
    )


def lines_of(title: str, profile: Profile) -> list[str]:
    """A profile as text, at most one screen."""
    counts = [
        ("kernels", profile.kernels),
        ("graphs launched", profile.graphs),
        ("copies to the device", profile.copies_to_device),
        ("copies to the host", profile.copies_to_host),
        ("waits of the host", profile.waits),
        ("device allocations", profile.allocations),
        ("us of the device", profile.step_us),
        ("% of them idle", profile.idle_percent),
    ]
    lines = [title, *(f"  {number:10.2f}  {name}" for name, number in counts)]
    lines.append("     us a step   times   kernel")
    for time_us, times, name in profile.longest:
        lines.append(f"  {time_us:10.2f}  {times:7.2f}   {name[:76]}")
    return lines


def profile_steps(step: Callable[[], object], num_steps: int) -> Profile:
    """Call a step so many times under the profiler; needs a GPU."""
    kinds = torch.profiler.ProfilerActivity
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profiler:
        with torch.profiler.record_function(MARK):
            for _ in range(num_steps):
                step()
        torch.cuda.synchronize()  # outside of the mark, so it is not counted
    on_gpu = torch.autograd.DeviceType.CUDA
    events = [
        Event(e.name, e.device_type == on_gpu, e.time_range.start, e.time_range.end)
        for e in profiler.events()
    ]
    return count(events, num_steps)


def profile_llm(llm: LLM, prompts: Tensor) -> Profile:
    """The profile of steps in which all prompts (B, T) decode: none joins and none ends."""
    ours = peers.Ours(llm, PROFILED_STEPS + 8)
    ours.start(prompts)
    for _ in range(4):  # so that no work of the prompts is left
        ours.step()
    profile = profile_steps(ours.step, PROFILED_STEPS)
    while llm.engine.has_unfinished():
        llm.engine.step()
    return profile


def profiles(model: GPT, args: argparse.Namespace, common: Columns) -> Iterator[Measurement]:
    """Rows of a step's profile, for the smallest and the largest batch; its text in a file."""
    batches = [batch for batch, _ in args.shapes]
    T, max_batch = args.shapes[0][1], max(batches)
    prompt_len = max(1, T - PROFILED_STEPS - 8)
    blocks = -(-(prompt_len + PROFILED_STEPS + 8) // args.block_size) + 1  # one stays free
    lines: list[str] = []
    for name, options in ways_to_serve(model, args.device).items():
        llm = LLM(
            model,
            enable_prefix_caching=False,
            block_size=args.block_size,
            num_blocks=max_batch * blocks,
            max_num_seqs=max_batch,
            max_num_batched_tokens=max_batch * prompt_len,
            **options,
        )
        for B in sorted({min(batches), max_batch}):
            profile = profile_llm(llm, random_ids(model, B, prompt_len, args.seed))
            workload = f"profile batch={B} context={T}"
            lines += [*lines_of(f"{name}, {workload}, {PROFILED_STEPS} steps", profile), ""]
            with replacing(Path(args.profile)) as (part,):
                part.write_text("\n".join(lines), encoding="utf-8")
            columns = common | {"contender": name, "workload": workload}
            for field, metric, unit in PROFILE_ROWS:
                value = getattr(profile, field)
                yield Measurement.of([value], metric=metric, unit=unit, **columns)
