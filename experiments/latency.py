"""How long a decode step takes, and what each way to run it is worth: the same step, in turn.

    eager                            every kernel asked for by Python, one by one
    recorded                         the same kernels, recorded once, replayed (cuda_graphs.py)
    recorded, fused                  fewer kernels that do more each (kernels/triton_fused.py)
    recorded, fused, small linears   and products of our own, for up to 16 rows
    recorded, contiguous             as recorded, over slabs: what paging is compared with
    transformers DynamicCache        the peer's bare loop
    transformers StaticCache, compiled    the same, its step recorded by torch.compile

A step has two times. "time a step" is the device's: on a GPU replays between two events, one behind
the other, with contexts of just the length that the row names. "token to token" is what a client
sees: the engine's whole step on the host's clock, sampling included, while contexts grow up to that
length; a peer's step keeps its tokens on the device. Beside the first stands its share of the byte
floor: all weights, and K and V of all contexts, at the speed of a plain read (roofline.py). Before
anything is timed the contenders' logits must be equal (steps.py says how nearly).

On a CPU nothing is recorded: the same code calls instead of replaying. Weights are used as they
were loaded, without the CPU's packed ones. The compiled peer comes last and for one shape alone,
because it compiles for a minute.

Then whole workloads: requests of mixed lengths, served one step after the other and planned one
step ahead; prompts alone; and a profile of what a step launches, copies and waits for.
Run: python -m experiments.latency --batches 1 8 --contexts 128
     python -m experiments.latency --contenders recorded contiguous --profile profile.txt
"""

import argparse
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoints.load import load_model, weights_kind
from experiments import peers, transformers_loop
from experiments.ceilings import set_threads, warm_up
from experiments.kernels import parse_shape
from experiments.results import Measurement, device_name, run_alone
from experiments.serving import prefill, profiles, throughput
from experiments.speed import percentile
from experiments.steps import (
    COMPILED,
    CONTIGUOUS,
    DYNAMIC,
    OURS,
    PEERS,
    RECORDED,
    Compiled,
    Contender,
    build,
    check_equal,
    choose,
    fill_and_step,
    make_pools,
    random_ids,
    step_timer,
)
from experiments.transformers_loop import Theirs
from kernels.backends import DTYPES, resolve_backend, resolve_device, resolve_dtype
from kv_cache import Batch
from llm import SHIPPED_MODEL
from model import GPT
from watch.explain import count_launches, weight_bytes
from watch.roofline import read_rate

FLOOR = "byte floor"
# What a flag means that is not given.
DEFAULTS = {
    "cpu": {
        "model": str(SHIPPED_MODEL),
        "contenders": [*OURS],
        "batches": [1, 8],
        "contexts": [128],
        "steps": 8,
        "requests": 0,
        "prefill": [],
    },
    "cuda": {
        "model": "random:gpt2",
        "contenders": [*OURS, *PEERS],
        "batches": [1, 8, 64, 256],
        "contexts": [128, 512, 1024],
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
    add("--batches", type=int, nargs="+", help="sequences in a step; default 1 8, GPU 1 8 64 256")
    add("--contexts", type=int, nargs="+", help="tokens of each; default 128, GPU 128 512 1024")
    add("--steps", type=int, help="timed in a round, of each kind; default 8, on a GPU 32")
    add("--rounds", type=int, default=5, help="each times every contender once")
    add("--block-size", type=int, default=16, help="tokens in a block; slabs have their own")
    add("--requests", type=int, help="mixed ones, served at once; 0: skip; default on a GPU 256")
    add("--lengths", type=int, nargs=2, default=[64, 512], help="of their prompts and texts, a..b")
    add("--prefill", nargs="*", help="prompts x tokens; none: skip; default on a GPU 16x512")
    add("--profile", help="write what a step launches, copies and waits for to this file; GPU only")
    add("--threads", type=int, help="of the CPU; default: all, for the shipped model 1")
    add("--seed", type=int, default=0, help="of prompts, lengths and tables")


# ---- what to do ----------------------------------------------------------------------------------
def complete(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with a value for each flag; ValueError for what no run could do."""
    device = resolve_device(args.device)
    given = {name: value for name, value in vars(args).items() if value is not None}
    args = argparse.Namespace(**({"profile": None} | DEFAULTS[device.type] | given))
    is_shipped = args.model == str(SHIPPED_MODEL)
    args.device, args.dtype = device, resolve_dtype(args.dtype, device)
    args.backend = resolve_backend("auto", device, args.dtype)
    args.threads = given.get("threads") or (1 if is_shipped else torch.get_num_threads())
    args.model_name = Path(args.model).name if is_shipped else args.model
    if args.profile and device.type == "cpu":
        raise ValueError("a profile is of what a GPU does, the device is cpu: leave out --profile")
    if min(*args.batches, args.steps, args.rounds, args.block_size, args.lengths[0]) < 1:
        raise ValueError("batches, steps, rounds, block size and lengths must all be at least 1")
    if args.requests < 0 or args.lengths[0] > args.lengths[1]:
        least, most = args.lengths
        raise ValueError(f"{args.requests} requests of {least}..{most} tokens: that is nothing")
    if min(args.contexts) < args.steps + 2:
        sizes = f"a context of {min(args.contexts)} tokens and {args.steps} steps that lead to it"
        raise ValueError(f"{sizes}: a prompt of at least 1 token comes before, lower --steps")
    return args


def check_lengths(args: argparse.Namespace, model: GPT) -> None:
    """Raise ValueError for more tokens than the model has positions."""
    most = model.config.max_seq_len
    prompts = [parse_shape(text)[1] for text in args.prefill]
    requests = [2 * args.lengths[1]] if args.requests else []
    longest = max(*args.contexts, *[n + 1 for n in prompts], *requests, 0)
    if longest > most:
        raise ValueError(f"{longest} tokens in a sequence: the model has {most} positions")


# ---- steps ---------------------------------------------------------------------------------------
class Times(NamedTuple):
    """Milliseconds of a contender in each round: of a step on the device, of each whole step."""

    step_ms: list[float]
    token_ms: list[list[float]]

    @property
    def medians_ms(self) -> list[float]:
        """Of whole steps, one a round."""
        return [statistics.median(steps) for steps in self.token_ms]


def time_cell(timers: dict, loops: dict, prompts: Tensor, args) -> dict[str, Times]:
    """All contenders in turn; a round before them warms up.

    `loops` write on from the prompts (B, P) until the context is full; some have a timer too.
    """
    times = {name: Times([], []) for name in loops}
    for number in range(args.rounds + 1):
        for name, loop in loops.items():
            step_ms = [timers[name]()] if name in timers else []
            token_ms = peers.time_steps(loop, prompts, args.steps)
            if number:
                times[name].step_ms.extend(step_ms)
                times[name].token_ms.append(token_ms)
    return times


def rows_of_steps(times: dict[str, Times], floor_ms: float, what: dict) -> Iterator[Measurement]:
    """The device's times, beside the floor; and what paging costs: blocks against slabs."""
    floor = what | {"contender": FLOOR, "backend": "torch"}
    yield Measurement.of([floor_ms], metric="time a step", unit="ms", **floor)
    steps = {name: step_ms for name, (step_ms, _) in times.items() if step_ms}
    for name, step_ms in steps.items():
        whose = what | {"contender": name}
        yield Measurement.of(step_ms, metric="time a step", unit="ms", **whose)
        shares = [100 * floor_ms / t for t in step_ms]
        yield Measurement.of(shares, metric="share of the byte floor", unit="%", **whose)
    if RECORDED in steps and CONTIGUOUS in steps:
        against = {"contender": RECORDED, "metric": f"speed against {CONTIGUOUS}", "unit": "x"}
        yield Measurement.ratio_of(steps[CONTIGUOUS], steps[RECORDED], **against, **what)


def rows_of_tokens(name: str, token_ms: list[list[float]], what: dict) -> Iterator[Measurement]:
    """A contender's whole steps: all of them, and of each round the slowest but one percent."""
    what = what | {"contender": name} | ({"backend": "torch"} if name in PEERS.values() else {})
    every = [t for steps in token_ms for t in steps]
    yield Measurement.of(every, metric="token to token", unit="ms", **what)
    tails = [percentile(steps, 99) for steps in token_ms]
    yield Measurement.of(tails, metric="token to token p99", unit="ms", **what)


def rows_against(peer: str, times: dict[str, Times], what: dict) -> Iterator[Measurement]:
    """How many times as fast as a peer ours are, from token to token."""
    for name in (name for name in times if name in OURS.values()):
        against = {"contender": name, "metric": f"speed against {peer}", "unit": "x"}
        both = times[peer].medians_ms, times[name].medians_ms
        yield Measurement.ratio_of(*both, **against, **what)


@torch.inference_mode()
def check_and_prepare(found: dict[str, Contender], ids: Tensor, workload: str, args) -> dict:
    """Each contender's decode step over the same contexts, once all their logits were equal."""
    steps = {name: fill_and_step(c.engine, ids.tolist(), args.seed) for name, c in found.items()}
    check_equal({name: logits for name, (_, logits) in steps.items()}, workload)
    return {name: batch for name, (batch, _) in steps.items()}


@torch.inference_mode()
def launches(contender: Contender, batch: Batch) -> int:
    """What a GPU is asked to do in the forward of a step: kernels, and the copies before them."""
    return count_launches(partial(contender.engine.forward, batch))


def time_shape(
    model: GPT, found: dict[str, Contender], theirs: dict[str, Theirs], B: int, T: int, args
) -> tuple[dict[str, Times], dict[str, Batch], str]:
    """The times of one cell, ours and theirs, their steps, and the cell's name."""
    workload = f"decode batch={B} context={T} block_size={args.block_size}"
    found = {name: contender for name, contender in found.items() if B <= contender.most_rows}
    ids = random_ids(model, B, T, args.seed)
    batches = check_and_prepare(found, ids, workload, args)
    prompts = ids[:, : T - 1 - args.steps]
    loops = {name: peers.Ours(contender, 1 + args.steps) for name, contender in found.items()}
    for peer in theirs.values():
        peers.check_equal_work(next(iter(loops.values())), peer, prompts)
    timers = {
        name: step_timer(found[name].engine, batch, args.steps, args.device)
        for name, batch in batches.items()
    }
    return time_cell(timers, loops | theirs, prompts, args), batches, workload


def floor_ms(model: GPT, B: int, T: int, args: argparse.Namespace) -> float:
    """How long it takes at least to read all weights, and K and V of B contexts of T tokens."""
    kv_bytes = B * T * model.config.kv_bytes_per_token(args.dtype)
    num_bytes = weight_bytes(model, B, B) + kv_bytes
    return num_bytes / read_rate(args.device, num_bytes)


def rows_of_recording(found: dict[str, Contender], common: dict) -> Iterator[Measurement]:
    """What recording took. Of the first, what kernels and libraries take once is part of it."""
    for name, contender in found.items():
        if contender.recording is not None:
            seconds, megabytes = contender.recording
            workload = f"recording sizes=1..{contender.most_rows}"
            what = {"contender": name, "workload": workload} | common
            yield Measurement.of([seconds], metric="recording", unit="s", **what)
            yield Measurement.of([megabytes], metric="memory taken", unit="MB", **what)


def decode(
    model: GPT, ours: list[str], theirs: dict[str, Theirs], args, common: dict
) -> Iterator[Measurement]:
    """Rows of all batches and contexts."""
    pools = make_pools(model, args)
    found = {name: build(name, model, pools[name == CONTIGUOUS], args) for name in ours}
    yield from rows_of_recording(found, common)
    for B in args.batches:
        for T in args.contexts:
            times, batches, workload = time_shape(model, found, theirs, B, T, args)
            what = {"workload": workload} | common
            yield from rows_of_steps(times, floor_ms(model, B, T, args), what)
            for name in times:
                yield from rows_of_tokens(name, times[name].token_ms, what)
            for peer in theirs:
                yield from rows_against(peer, times, what)
            # However long the contexts are, the launches are the same.
            if args.device.type == "cuda" and T == args.contexts[0]:
                for name, batch in batches.items():
                    of = {"contender": name, "metric": "launches a step", "unit": "launches"}
                    yield Measurement.of([launches(found[name], batch)], **of, **what)


def against_compiled(
    model: GPT, ours: list[str], args: argparse.Namespace, common: dict
) -> Iterator[Measurement]:
    """Rows of the compiled peer, and of ours against it, for the first batch and context."""
    B, T = args.batches[0], args.contexts[0]
    args = argparse.Namespace(**(vars(args) | {"batches": [B], "contexts": [T]}))
    pools = make_pools(model, args)
    found = {name: build(name, model, pools[name == CONTIGUOUS], args) for name in ours}
    theirs = {COMPILED: Compiled(transformers_loop.as_transformers(model), T)}
    times, _, workload = time_shape(model, found, theirs, B, T, args)
    what = {"workload": workload} | common
    yield from rows_of_tokens(COMPILED, times[COMPILED].token_ms, what)
    yield from rows_against(COMPILED, times, what)


# ---- the experiment ------------------------------------------------------------------------------
def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    args = complete(args)
    before = torch.get_num_threads()
    set_threads(args.threads)
    try:
        model = load_model(args.model, args.dtype, args.device)
        check_lengths(args, model)
        ours, others = choose(args, model)
        common = {"experiment": "latency", "device": device_name(args.device)}
        common |= {"model": args.model_name, "weights": weights_kind(args.model)}
        common |= {"backend": args.backend, "dtype": str(args.dtype)[6:], "seed": args.seed}
        common |= {"threads": args.threads}
        warm_up(args.device)
        theirs = {}
        if DYNAMIC in others:
            theirs[DYNAMIC] = Theirs(transformers_loop.as_transformers(model))
        yield from decode(model, ours, theirs, args, common)
        if args.requests:
            yield from throughput(model, args, common)
        yield from prefill(model, args, common)
        if args.profile:
            yield from profiles(model, args, common)
        if COMPILED in others:
            yield from against_compiled(model, ours, args, common)
    finally:
        set_threads(before)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    run_alone(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    main()
