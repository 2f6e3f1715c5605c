"""How long a decode step takes, and what each way to run it gains: the same step, in turn.

    eager                            Python launches every kernel, one by one
    recorded                         the same kernels, recorded once and replayed (cuda_graphs.py)
    recorded, fused                  fewer kernels that do more each (kernels/triton_fused.py)
    recorded, fused, small linears   and matrix products of our own, for up to 16 rows
    recorded, contiguous             as recorded, over slabs: the price of paging
    .., ahead                        an engine that launches a step before it reads the last one
    transformers DynamicCache        a loop around transformers' model
    transformers generate            its own loop
    transformers StaticCache, compiled    the first loop, its step recorded by torch.compile

Each of ours is an engine, and only its forward differs, or its loop. A slab is a block as long as
the longest sequence, read by the same kernel through a table with one entry, so the difference
between blocks and slabs is paging alone. All contenders share two pools: they run one after the
other, and each begins with prompts.

A step has two times. "time a step" is the device's: on a GPU several replays between two events,
with contexts of exactly the length that the row names. "token to token" is what a client waits: the
host's clock over many whole steps, sampling included, divided by their number, while the contexts
grow up to that length. It is no sum of parts: an engine that is ahead overlaps them. A step of
transformers keeps its tokens on the device, and only its last step is waited for. The first time
has its share of the byte floor beside it: all weights, and K and V of all contexts, at the speed of
a plain read.

Equal work is checked before anything is timed: prompts are computed into a pool full of NaN, then
one step. The logits of the first contender must be near those of the same weights in float64, and
all others at most three times as far away. One that is wrong is left out, and the run fails at its
end.

On a CPU nothing is recorded, and the same code calls instead of replaying. Weights are used as they
were loaded, without the CPU's packed form. The compiled step comes last and for one shape alone,
because it compiles for a minute. After the steps come whole workloads and a profile (workloads.py).
"""

import argparse
import copy
import importlib.util
import sys
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from block_allocator import BlockAllocator
from checkpoints.load import load_model
from engine import Forward, InferenceEngine, eager_forward
from experiments import peers, transformers_engines, workloads
from experiments.ceilings import Columns, set_threads, warm_up
from experiments.kernels import parse_shape
from experiments.names import AHEAD_OF, CONTIGUOUS, FUSED, RECORDED, SMALL
from experiments.peers import logits_bound, random_ids
from experiments.results import Measurement, device_name, percentile
from experiments.speed import model_columns, threads_for
from experiments.transformers_engines import Compiled, Generate, Theirs
from kernels.backends import (
    BACKENDS,
    DTYPES,
    can_record,
    resolve_backend,
    resolve_device,
    resolve_dtype,
)
from kernels.device_memory import preallocate
from kernels.triton_fused import can_fuse, fused_forward
from kernels.triton_sampling import draw_tokens_triton, sample_triton
from kernels.triton_small_linear import MOST_ROWS
from kv_cache import Batch, KVCache, Row, make_batch
from llm import SHIPPED_MODEL
from model import GPT, attend_one_sequence
from sampling import draw_tokens
from scheduler import Scheduler
from speedups.cuda_graphs import GraphForward, recorded_sizes
from speedups.plan_ahead import AheadEngine
from watch.explain import count_launches, weight_bytes
from watch.roofline import read_rate

EAGER = "eager"
DYNAMIC, COMPILED = peers.THEIRS, "transformers StaticCache, compiled"
GENERATE = "transformers generate"
# The names on the command line: engines of ours, and transformers'.
OURS = {"eager": EAGER, "recorded": RECORDED, "fused": FUSED, "small": SMALL}
OURS |= {"contiguous": CONTIGUOUS, "ahead": AHEAD_OF[RECORDED], "fused-ahead": AHEAD_OF[FUSED]}
OURS |= {"small-ahead": AHEAD_OF[SMALL]}
PEERS = {"transformers": DYNAMIC, "generate": GENERATE, "compiled": COMPILED}
PEERS |= {"continuous": peers.CONTINUOUS}  # serves the requests, and has no steps of its own
FLOOR = "byte floor"
MOST_PROMPT_TOKENS = 2**16  # in one forward that fills the pool
EDGE_STEPS = 2  # before and after the timed ones: an engine that is ahead begins and ends alone
NUM_EXACT = 4  # sequences of a batch that are computed in float64 too
WORSE = 3  # times as far from float64 as the first contender: what another one may be
# The values of flags that are not given.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "model": str(SHIPPED_MODEL),
        "contenders": [*OURS],
        "shapes": ["1x128", "8x128"],
        "steps": 8,
        "requests": 0,
        "prefill": [],
    },
    "cuda": {
        "model": "random:gpt2",
        "contenders": [*OURS, *PEERS],
        "shapes": [f"{B}x{T}" for B in (1, 8, 64, 256) for T in (128, 512, 1024)],
        "steps": 32,
        "requests": 256,
        "prefill": ["16x512"],
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add = parser.add_argument
    add("--model", help="a folder, or random:gpt2; default: that on a GPU, else the shipped one")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="of weights, K and V")
    names = [*OURS, *PEERS]
    add("--contenders", nargs="+", choices=names, help="default: all; on a CPU without the peers")
    add("--shapes", nargs="+", help="sequences in a step x tokens of each, as in 64x512")
    add("--steps", type=int, help="timed in a round, of each kind; default 8, on a GPU 32")
    add("--rounds", type=int, default=5, help="each times every contender once")
    add("--block-size", type=int, default=16, help="tokens in a block; slabs have their own")
    add("--requests", type=int, help="mixed ones, served at once; 0: skip; default on a GPU 256")
    add("--lengths", type=int, nargs=2, default=[64, 512], help="of their prompts and texts, a..b")
    add("--prefill", nargs="*", help="prompts x tokens; none: skip; default on a GPU 16x512")
    add("--budgets", type=int, nargs="*", default=[], help="tokens a step while a prompt joins")
    add("--join", type=int, default=768, help="tokens of the prompt that joins, with --budgets")
    add("--profile", help="write what a step launches, copies and waits for to this file; GPU only")
    add("--threads", type=int, help="of the CPU; default: all, for the shipped model 1")
    add("--seed", type=int, default=0, help="of prompts, lengths and tables")


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with a value for each flag; ValueError for values that no run can have."""
    device = resolve_device(args.device)
    given = {name: value for name, value in vars(args).items() if value is not None}
    args = argparse.Namespace(**({"profile": None} | DEFAULTS[device.type] | given))
    args.device, args.dtype = device, resolve_dtype(args.dtype, device)
    args.backend = resolve_backend("auto", device, args.dtype)
    args.threads = threads_for(args.model, given.get("threads"))
    if args.profile and device.type == "cpu":
        raise ValueError("a profile is of what a GPU does, the device is cpu: leave out --profile")
    args.shapes = [parse_shape(text) for text in args.shapes]
    if min(args.steps, args.rounds, args.block_size, args.lengths[0]) < 1:
        raise ValueError("steps, rounds, block size and lengths must all be at least 1")
    shortest, longest = args.lengths
    if args.requests < 0 or shortest > longest:
        raise ValueError(f"{args.requests} requests of {shortest}..{longest} tokens: impossible")
    shortest_context = min(T for _, T in args.shapes)
    if prompt_len(shortest_context, args) < 1:
        sizes = f"a context of {shortest_context} tokens, {args.steps} steps that lead to it"
        untimed = f"and {2 * EDGE_STEPS} that are not timed"
        raise ValueError(f"{sizes} {untimed}: a prompt comes before, lower --steps")
    return args


def most_sequences(args: argparse.Namespace) -> int:
    """The largest batch of all shapes."""
    return max(B for B, _ in args.shapes)


def num_steps(args: argparse.Namespace) -> int:
    """Steps of a round, with those that are not timed."""
    return args.steps + 2 * EDGE_STEPS


def prompt_len(T: int, args: argparse.Namespace) -> int:
    """Tokens of the prompts from which a round's steps lead to contexts of T tokens."""
    return T - 1 - num_steps(args)


def check_lengths(args: argparse.Namespace, model: GPT) -> None:
    """Raise ValueError for more tokens than the model has positions."""
    limit = model.config.max_seq_len
    prompts = [parse_shape(text)[1] for text in args.prefill]
    requests = [2 * args.lengths[1]] if args.requests else []
    longest = max(*[T for _, T in args.shapes], *[n + 1 for n in prompts], *requests, 0)
    if longest > limit:
        raise ValueError(f"{longest} tokens in a sequence: the model has {limit} positions")


# ---- the contenders ------------------------------------------------------------------------------
def why_not(name: str, model: GPT, device: torch.device) -> str | None:
    """Why a contender can't run here, in a few words; None if it can."""
    if name.startswith(FUSED):
        return can_fuse(model)
    if name in PEERS.values() and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if name == COMPILED and device.type == "cpu":
        return "what torch.compile records are a GPU's graphs"
    return None


def choose(args: argparse.Namespace, model: GPT) -> tuple[list[str], list[str]]:
    """Ours and transformers' contenders that were asked for and run here.

    For each that cannot run the reason is printed. Raises ValueError if none of ours is left that
    can run all batches.
    """
    ours, others = [], []
    for flag in args.contenders:
        name = (OURS | PEERS)[flag]
        reason = why_not(name, model, args.device)
        if reason is not None:
            leave_out(name, reason)
        else:
            (ours if flag in OURS else others).append(name)
    if not ours:
        raise ValueError(f"{', '.join(args.contenders)}: none of ours is among them and runs here")
    if all(name.startswith(SMALL) for name in ours) and most_sequences(args) > MOST_ROWS:
        limits = f"small linears serve {MOST_ROWS} rows, a batch has {most_sequences(args)}"
        raise ValueError(f"{limits}: name another contender too")
    return ours, others


class Contender(NamedTuple):
    """An engine of ours. `peers.Ours` drives it through `engine`, as it drives an `LLM`."""

    engine: InferenceEngine
    most_rows: int  # sequences in a step
    recording: tuple[float, float] | None  # seconds and MB that recording took, on a GPU


def make_pools(model: GPT, args: argparse.Namespace) -> dict[bool, KVCache]:
    """The pool of blocks (False) and that of slabs (True), for all batches and contexts."""
    config, pools = model.config, {}
    for has_slabs in (False, True):
        block_size = config.max_seq_len if has_slabs else args.block_size
        num_blocks = max(B * -(-T // block_size) for B, T in args.shapes)
        # A step is planned ahead only if there is a free block for each sequence.
        num_blocks += 0 if has_slabs else most_sequences(args)
        pools[has_slabs] = KVCache(
            config.n_layer,
            num_blocks,
            block_size,
            config.n_head,
            config.head_dim,
            args.dtype,
            args.device,
            preallocate,
        )
    return pools


@torch.inference_mode()
def build(name: str, model: GPT, cache: KVCache, args: argparse.Namespace) -> Contender:
    """An engine over a pool with the contender's forward, recorded here for all batch sizes."""
    kernels, max_seq_len = BACKENDS[args.backend], model.config.max_seq_len
    most_rows, recording = most_sequences(args), None
    # As in `LLM`: the GPU's sampling kernel has no 64-bit form.
    on_device = can_record(args.backend, args.device) and args.dtype != torch.float64
    is_ahead = name in AHEAD_OF.values()
    sampler = sample_triton if is_ahead and on_device else None
    forward: Forward = eager_forward(model, cache, kernels.paged_attention, kernels.write_kv)
    if name.startswith(FUSED):
        few_rows = MOST_ROWS if name.startswith(SMALL) else 0
        forward = fused_forward(model, cache, forward, few_rows)
        most_rows = min(most_rows, MOST_ROWS) if few_rows else most_rows
    if name != EAGER:
        free = free_bytes(args.device)
        started = time.perf_counter()
        sizes = recorded_sizes(most_rows)
        forward = GraphForward(cache, forward, sizes, max_seq_len, sampler=sampler)
        if args.device.type == "cuda":  # on a CPU nothing is recorded
            taken = free - free_bytes(args.device)  # waits for the device
            recording = time.perf_counter() - started, taken / 1e6
    allocator = BlockAllocator(cache.scratch_block, cache.block_size)
    budget = max(B * T for B, T in args.shapes)  # all prompts in one step
    scheduler = Scheduler(allocator, most_rows, budget, max_seq_len)
    arguments = {"vocab_size": model.config.vocab_size}
    arguments |= {"draw": draw_tokens_triton if on_device else draw_tokens}
    if sampler is not None:
        arguments |= {"decode": forward.decode}
    kind = AheadEngine if is_ahead else InferenceEngine
    return Contender(kind(forward, cache, scheduler, **arguments), most_rows, recording)


def build_all(names: list[str], model: GPT, args: argparse.Namespace) -> dict[str, Contender]:
    """The named engines, over their pools. One that cannot be recorded here is left out."""
    pools, built = make_pools(model, args), {}
    for name in names:
        try:
            built[name] = build(name, model, pools[name == CONTIGUOUS], args)
        except Exception as error:  # triton's exception classes differ between its versions
            leave_out(name, f"{type(error).__name__}: {str(error)[:200]}")
    if not built:
        raise ValueError(f"{', '.join(names)}: none of them could be recorded")
    return built


def leave_out(name: str, reason: str) -> None:
    """Say why a contender is not timed."""
    print(f"{name} is left out: {reason}", file=sys.stderr)


def free_bytes(device: torch.device) -> int:
    """Free bytes of a GPU after its work, with PyTorch's own reserve given back; 0 for a CPU."""
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


# ---- equal work ----------------------------------------------------------------------------------
@torch.inference_mode()
def fill_and_step(
    engine: InferenceEngine, token_ids: list[list[int]], seed: int
) -> tuple[Batch, Tensor]:
    """A decode step over contexts computed just before, and its logits (B, V).

    Each sequence has T tokens, and the step computes the last one. The blocks are shuffled, the
    same ones for all contenders with such blocks. Every slot that was not written is NaN, the one
    that the step must write included, so no contender can use what an earlier one has written.
    """
    cache = engine.cache
    B = len(token_ids)
    T = len(token_ids[0])
    cache.pool.fill_(torch.nan)
    blocks_each = -(-T // cache.block_size)
    ids = torch.randperm(cache.scratch_block, generator=torch.Generator().manual_seed(seed))
    tables = ids[: B * blocks_each].view(B, blocks_each).tolist()
    pairs = list(zip(token_ids, tables, strict=True))
    at_once = max(1, MOST_PROMPT_TOKENS // T)
    for first in range(0, B, at_once):
        rows = [Row(text, 0, T - 1, table, 0) for text, table in pairs[first : first + at_once]]
        engine.forward(make_batch(rows, cache.block_size, cache.scratch_block))
    rows = [Row(text, T - 1, 1, table, 1) for text, table in pairs]
    batch = make_batch(rows, cache.block_size, cache.scratch_block)
    return batch, engine.forward(batch).clone()  # a replay would overwrite the logits


@torch.inference_mode()
def exact_logits(model: GPT, token_ids: list[list[int]]) -> Tensor:
    """Logits (B, V) after each text, in float64, nothing cached, from the model's own weights."""
    exact = copy.deepcopy(model).double()
    device = model.wte.weight.device
    logits = []
    for ids in token_ids:
        positions = torch.arange(len(ids), device=device)
        hidden = exact(torch.tensor(ids, device=device), positions, attend_one_sequence)
        logits.append(exact.logits(hidden[-1:]))
    return torch.cat(logits)


def check_near(name: str, found: Tensor, other: str, expected: Tensor, bound: float) -> float:
    """How far two tensors of logits (n, V) are apart. Raises ValueError if beyond the bound."""
    error = (found.double() - expected.double()).abs().max().item()
    if not error <= bound:  # true for NaN as well
        reason = f"differ from {other} by {error:.1e}, {bound:.1e} is allowed"
        raise ValueError(f"the logits of {name!r} {reason}")
    return error


def check_equal(logits: dict[str, Tensor], exact: Tensor) -> None:
    """Raise ValueError unless all logits (B, V) are finite and right.

    `exact` (n, V) are those of the first n rows in float64. The first contender may be away from
    them by `peers.logits_bound`. Another one sums in another order, and rounds elsewhere if it is
    joined: it may be 3 times as far away as the first, and a quarter of that bound. All its rows
    may differ from the first contender's by twice that.
    """
    for name, found in logits.items():
        if not found.isfinite().all():
            raise ValueError(f"the logits of {name!r} are not all numbers")
    n = len(exact)
    (first, expected), *others = logits.items()
    bound = logits_bound(exact.abs().max().item(), expected.dtype.itemsize)
    error = check_near(first, expected[:n], "float64", exact, bound)
    for name, found in others:
        allowed = WORSE * error + bound / 4
        check_near(name, found[:n], "float64", exact, allowed)
        check_near(name, found, f"those of {first!r}", expected, 2 * allowed)


@torch.inference_mode()
def check_and_prepare(
    model: GPT, contenders: dict[str, Contender], ids: Tensor, workload: str, seed: int
) -> dict[str, Batch]:
    """The decode step of each contender over the same contexts (B, T), once their logits agree.

    A contender whose logits are wrong is left out; it is a ValueError if it is the first one.
    """
    texts = ids.tolist()
    steps = {
        name: fill_and_step(contender.engine, texts, seed) for name, contender in contenders.items()
    }
    logits = {name: logits for name, (_, logits) in steps.items()}
    exact = exact_logits(model, texts[:NUM_EXACT])
    first = next(iter(logits))
    for name in logits:
        try:
            check_equal({first: logits[first], name: logits[name]}, exact)
        except ValueError as error:
            if name == first:
                raise ValueError(f"{error}: {workload}") from None
            leave_out(name, f"{error}: {workload}")
            del steps[name]
    return {name: batch for name, (batch, _) in steps.items()}


# ---- timing --------------------------------------------------------------------------------------
def step_timer(
    engine: InferenceEngine, batch: Batch, num_steps: int, device: torch.device
) -> Callable[[], float]:
    """A function that runs a decode step `num_steps` times and returns milliseconds of one.

    On a GPU a recorded step is replayed, and an eager one is launched by Python, kernel by kernel.
    Both run between two events, so no single step is waited for.
    """
    forward = engine.forward

    @torch.inference_mode()
    def on_cpu() -> float:
        started = time.perf_counter()
        for _ in range(num_steps):
            forward(batch)
        return (time.perf_counter() - started) * 1e3 / num_steps

    @torch.inference_mode()
    def on_gpu() -> float:
        if isinstance(forward, GraphForward):
            forward(batch)  # puts the inputs where the recording reads them
            call = forward.steps[forward.recorded_size(batch)].replay
        else:
            call = partial(forward, batch.to(device))
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(num_steps):
            call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / num_steps

    return on_cpu if device.type == "cpu" else on_gpu


class Times(NamedTuple):
    """Milliseconds of a contender in each round."""

    step_ms: list[float]  # a step on the device
    token_ms: list[float]  # from token to token: the mean of whole steps
    gaps_ms: list[list[float]]  # each single gap between two tokens, where the host reads them


@torch.inference_mode()
def time_tokens(loop: Any, prompts: Tensor, steps: int) -> tuple[float, list[float]]:
    """The mean milliseconds from token to token over many steps, and each gap between two tokens.

    A step of ours returns with tokens that the host has read, and the next step may be running.
    The tokens of transformers' steps stay on the device: the last of them is waited for, and there
    are no single gaps.
    """
    if isinstance(loop, Generate):
        return loop.ms_a_token(prompts, steps), []
    is_ours = isinstance(loop, peers.Ours)
    must_wait = prompts.device.type == "cuda" and not is_ours
    loop.start(prompts)
    for _ in range(EDGE_STEPS):
        loop.step()
    if must_wait:
        torch.cuda.synchronize()
    stamps = [time.perf_counter()]
    for _ in range(steps):
        loop.step()
        stamps.append(time.perf_counter())
    if must_wait:
        torch.cuda.synchronize()
    mean_ms = (time.perf_counter() - stamps[0]) * 1e3 / steps
    for _ in range(EDGE_STEPS):
        loop.step()
    loop.finish()
    gaps_ms = [(after - before) * 1e3 for before, after in pairwise(stamps)]
    return mean_ms, gaps_ms if is_ours else []


def time_in_turn(
    timers: dict[str, Callable[[], float]],
    loops: dict[str, Any],
    prompts: Tensor,
    args: argparse.Namespace,
) -> dict[str, Times]:
    """All contenders in turn. One round before them warms up.

    The `loops` decode from the prompts (B, P) until the context is full. Ours that wait for their
    tokens have a timer as well.
    """
    times = {name: Times([], [], []) for name in loops}
    for number in range(args.rounds + 1):
        for name, loop in loops.items():
            step_ms = [timers[name]()] if name in timers else []
            token_ms, gaps_ms = time_tokens(loop, prompts, args.steps)
            if number > 0:
                times[name].step_ms.extend(step_ms)
                times[name].token_ms.append(token_ms)
                times[name].gaps_ms.append(gaps_ms)
    return times


def time_shape(
    model: GPT,
    contenders: dict[str, Contender],
    theirs: dict[str, Theirs],
    B: int,
    T: int,
    args: argparse.Namespace,
) -> tuple[dict[str, Times], dict[str, Batch], str]:
    """Times of all contenders for one batch and context, ours' batches, and the workload's name."""
    workload = f"decode batch={B} context={T} block_size={args.block_size}"
    able = {name: one for name, one in contenders.items() if B <= one.most_rows}
    ids = random_ids(model, B, T, args.seed)
    batches = check_and_prepare(model, able, ids, workload, args.seed)
    for name in able.keys() - batches.keys():  # wrong: out of this shape and of all later ones
        del able[name], contenders[name]
    prompts = ids[:, : prompt_len(T, args)]
    ours = {name: peers.Ours(contender, 1 + num_steps(args)) for name, contender in able.items()}
    for peer in theirs.values():
        peers.check_equal_work(next(iter(ours.values())), peer, prompts)
    # The device does the same for an engine that is ahead.
    timers = {
        name: step_timer(able[name].engine, batch, args.steps, args.device)
        for name, batch in batches.items()
        if name not in AHEAD_OF.values()
    }
    return time_in_turn(timers, {**ours, **theirs}, prompts, args), batches, workload


def floor_ms(model: GPT, B: int, T: int, args: argparse.Namespace) -> float:
    """The time of a plain read of all weights, and of K and V of B contexts of T tokens."""
    kv_bytes = B * T * model.config.kv_bytes_per_token(args.dtype)
    num_bytes = weight_bytes(model, B, B) + kv_bytes
    return num_bytes / read_rate(args.device, num_bytes)


# ---- rows ----------------------------------------------------------------------------------------
def rows_of_steps(times: dict[str, Times], floor: float, common: Columns) -> Iterator[Measurement]:
    """Rows of the device's times and of their floor; and of blocks against slabs."""
    columns = common | {"contender": FLOOR, "backend": "torch"}
    yield Measurement.of([floor], metric="time a step", unit="ms", **columns)
    steps = {name: found.step_ms for name, found in times.items() if found.step_ms}
    for name, step_ms in steps.items():
        columns = common | {"contender": name}
        yield Measurement.of(step_ms, metric="time a step", unit="ms", **columns)
        shares = [100 * floor / t for t in step_ms]
        yield Measurement.of(shares, metric="share of the byte floor", unit="%", **columns)
    if RECORDED in steps and CONTIGUOUS in steps:
        against = {"contender": RECORDED, "metric": f"speed against {CONTIGUOUS}", "unit": "x"}
        yield Measurement.ratio_of(steps[CONTIGUOUS], steps[RECORDED], **against, **common)


def rows_of_tokens(name: str, times: Times, common: Columns) -> Iterator[Measurement]:
    """A contender's whole steps: their mean, and the 99th percentile of each round's gaps."""
    columns = common | {"contender": name}
    if name in PEERS.values():
        columns |= {"backend": "torch"}
    yield Measurement.of(times.token_ms, metric="token to token", unit="ms", **columns)
    if all(times.gaps_ms):
        p99_ms = [percentile(gaps, 99) for gaps in times.gaps_ms]
        yield Measurement.of(p99_ms, metric="token to token p99", unit="ms", **columns)


def rows_against(peer: str, times: dict[str, Times], common: Columns) -> Iterator[Measurement]:
    """How many times as fast as transformers each of ours is, from token to token."""
    for name in (name for name in times if name in OURS.values()):
        against = {"contender": name, "metric": f"speed against {peer}", "unit": "x"}
        theirs_ms, ours_ms = times[peer].token_ms, times[name].token_ms
        yield Measurement.ratio_of(theirs_ms, ours_ms, **against, **common)


def rows_of_recording(contenders: dict[str, Contender], common: Columns) -> Iterator[Measurement]:
    """Time and memory of recording. The first contender's include one-time costs of libraries."""
    for name, contender in contenders.items():
        if contender.recording is not None:
            seconds, megabytes = contender.recording
            workload = f"recording sizes=1..{contender.most_rows}"
            columns = common | {"contender": name, "workload": workload}
            yield Measurement.of([seconds], metric="recording", unit="s", **columns)
            yield Measurement.of([megabytes], metric="memory taken", unit="MB", **columns)


@torch.inference_mode()
def launches(contender: Contender, batch: Batch) -> int:
    """Launches of a step's forward: kernels, and the copies before them. On a GPU only."""
    return count_launches(partial(contender.engine.forward, batch))


def decode(
    model: GPT,
    ours: list[str],
    theirs: dict[str, Theirs],
    args: argparse.Namespace,
    common: Columns,
) -> Generator[Measurement, None, list[str]]:
    """Rows of all batches and contexts; returns the contenders that were left out."""
    contenders = build_all(ours, model, args)
    yield from rows_of_recording(contenders, common)
    counted: set[int] = set()  # the number of launches depends on the batch alone
    for B, T in args.shapes:
        times, batches, workload = time_shape(model, contenders, theirs, B, T, args)
        columns = common | {"workload": workload}
        yield from rows_of_steps(times, floor_ms(model, B, T, args), columns)
        for name in times:
            yield from rows_of_tokens(name, times[name], columns)
        for peer in theirs:
            yield from rows_against(peer, times, columns)
        if args.device.type == "cuda" and B not in counted:
            counted.add(B)
            for name, batch in batches.items():
                count = {"contender": name, "metric": "launches a step", "unit": "launches"}
                yield Measurement.of([launches(contenders[name], batch)], **count, **columns)
    return [name for name in ours if name not in contenders]


def against_compiled(
    model: GPT, ours: list[str], args: argparse.Namespace, common: Columns
) -> Iterator[Measurement]:
    """Rows of the compiled step, and of ours against it, for the first shape."""
    B, T = args.shapes[0]
    args = argparse.Namespace(**(vars(args) | {"shapes": [(B, T)]}))
    contenders = build_all(ours, model, args)
    theirs: dict[str, Theirs] = {COMPILED: Compiled(transformers_engines.as_transformers(model), T)}
    times, _, workload = time_shape(model, contenders, theirs, B, T, args)
    columns = common | {"workload": workload}
    yield from rows_of_tokens(COMPILED, times[COMPILED], columns)
    yield from rows_against(COMPILED, times, columns)


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    args = complete(args)
    threads_before = torch.get_num_threads()
    set_threads(args.threads)
    try:
        model = load_model(args.model, args.dtype, args.device)
        check_lengths(args, model)
        ours, others = choose(args, model)
        common = {"experiment": "latency", "device": device_name(args.device)}
        common |= model_columns(args.model)
        common |= {"backend": args.backend, "dtype": str(args.dtype)[6:], "seed": args.seed}
        common |= {"threads": args.threads}
        warm_up(args.device)
        kinds = {DYNAMIC: Theirs, GENERATE: Generate}
        theirs = {
            name: kind(transformers_engines.as_transformers(model))
            for name, kind in kinds.items()
            if name in others
        }
        left_out = yield from decode(model, ours, theirs, args, common)
        if args.requests:
            has_peer = peers.CONTINUOUS in others
            yield from workloads.throughput(model, args, common, has_peer)
        yield from workloads.prefill(model, args, common)
        yield from workloads.joining(model, args, common)
        if args.profile:
            yield from workloads.profiles(model, args, common)
        if COMPILED in others:
            yield from against_compiled(model, ours, args, common)
        if left_out:  # time on a GPU is short, so the run fails at its end
            raise ValueError(f"wrong and left out, for the reasons above: {'; '.join(left_out)}")
    finally:
        set_threads(threads_before)
