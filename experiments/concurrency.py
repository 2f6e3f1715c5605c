"""The same memory, planned in eight ways: how many requests run at once, and where memory goes.

All contenders get the same requests, the same bytes of K and V, the same scheduler and kernel
(trace.py). First all requests are there at once, and the steps in which some of them wait are
averaged. Then memory decides how many run. (In a pool as large as a GPU's the token budget of a
step decides instead, paging gains nothing, and the output says so.) After that requests come at
random, at a part of the rate that paging sustained, and the goodput is counted: how many a second
got all their tokens within --target milliseconds a token.

The bound is worked out beforehand from the lengths. A request of p prompt tokens that writes g
tokens takes g steps. With a reservation it holds r tokens in each of them. Paged, it holds the
whole blocks of its p, p + 1, .. p + g - 1 tokens. Over all steps of all requests

    bound = sum of g x r / sum of the tokens in those blocks

is how many times as many requests run at once with paging as with a reservation of r, if neither
loses anything else: no gap between slabs, no unused block, nothing computed twice. Azure's
conversations that fit 1,024 tokens have a bound of 2.57 for r = 1,024 ("maximum, perfect fit"), of
1.57 for the power of two that holds prompt and output, and of 1.15 for p + g itself ("oracle,
perfect fit"). The paper's baselines are buddies, which round each slab up to a power of two of
blocks, and r counts that. The paper's "power of two" is the prompt plus a power of two for the
output. Their bounds are 2.57, 1.93 and 1.57. A run may come out a little above its bound:
reservations also lose gaps, and with paging the youngest sequences, which hold least, are computed
twice.

Kwon et al. 2023, "PagedAttention", SOSP, arXiv:2309.06180, figures 2 and 13.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch

from experiments.ceilings import Columns
from experiments.results import Measurement
from experiments.simulate import Arrival, Run, poisson
from experiments.trace import (
    CONTENDERS,
    Figures,
    Machine,
    Workload,
    add_machine_arguments,
    add_workload_arguments,
    make_workload,
    rows_of,
)
from scheduler import Scheduler

# The paper's Fig. 2: the share of KV memory that holds tokens, with OPT-13B and at most 2,048.
PAPER_USED = {
    "maximum, buddies": 20.4,
    "power of two, buddies": 26.8,
    "oracle, buddies": 38.2,
    "paged": 96.3,
}
SHARES = {
    "used": "tokens whose K and V are there",
    "tail": "the unfilled rest of a sequence's last block in use",
    "later": "reserved, and filled later",
    "never": "reserved, and never used",
    "free": "free while requests wait: gaps too small, less than the next needs, or no budget",
}
RUNNING = "running at once, mean", "requests"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add_workload_arguments(parser)
    add_machine_arguments(parser)
    add = parser.add_argument
    add("--policies", nargs="+", choices=[*CONTENDERS], help="beside paged; default all")
    add("--loads", type=float, nargs="*", default=[0.4, 0.9], help="parts of paged's rate, or none")
    add("--target", type=float, help="ms a token from the arrival on; default 10, real engine 50")


# ---- the bound -----------------------------------------------------------------------------------
def tokens_held(name: str, request: Arrival, max_seq_len: int, block_size: int) -> float:
    """Tokens of memory that a request holds, as a mean over its steps.

    Paged, it holds more with each step. All other contenders hold their reservation from the first
    step to the last: a perfect fit exactly that, buddies a power of two of blocks.
    """
    p, g = request.prompt_tokens, request.output_tokens
    if name == "paged":
        return sum(-(-n // block_size) for n in range(p, p + g)) * block_size / g
    contender = CONTENDERS[name]
    seq = SimpleNamespace(num_prompt_tokens=p, max_tokens=g)
    reserved = contender.reserve(max_seq_len)(seq)
    if contender.region is int:  # a perfect fit
        return reserved
    return contender.region(-(-reserved // block_size)) * block_size


def bounds(
    names: list[str], requests: list[Arrival], max_seq_len: int, block_size: int
) -> dict[str, float]:
    """name -> how many times as many can run paged, at most; a request counts once a step."""
    totals = {
        name: sum(
            request.output_tokens * tokens_held(name, request, max_seq_len, block_size)
            for request in requests
        )
        for name in ("paged", *names)
    }
    return {name: totals[name] / totals["paged"] for name in names}


# ---- where the memory went -----------------------------------------------------------------------
class Memory(NamedTuple):
    """The pool in one step, in tokens; `running` counts sequences that still need tokens."""

    running: int
    waiting: int
    held: int  # room in the blocks that tables name: without the blocks that buddies round up to
    used: int
    tail: int
    later: int
    never: int
    free: int


def watcher(name: str, requests: list[Arrival]) -> Callable[[Scheduler], Memory]:
    """A function that looks at the pool in each step of a run on these requests."""
    ends = [r.prompt_tokens + r.output_tokens for r in sorted(requests, key=lambda r: r.arrival_s)]
    region = CONTENDERS[name].region

    def look(scheduler: Scheduler) -> Memory:
        block_size = scheduler.allocator.block_size
        running = held = used = tail = later = taken = 0
        for seq in scheduler.running:
            end, num_blocks = ends[seq.request.arrival], len(seq.block_table)
            room = num_blocks * block_size
            held += room
            taken += region(num_blocks) * block_size
            if len(seq.token_ids) >= end:
                continue  # complete: it only pads a static batch, and its memory is wasted
            running += 1
            filled = seq.num_computed_tokens
            in_use = -(-filled // block_size) * block_size  # tokens in the blocks begun so far
            used += filled
            tail += in_use - filled
            later += max(0, min(end, room) - in_use)
        never = taken - used - tail - later
        pool = scheduler.allocator.num_blocks * block_size
        return Memory(running, scheduler.num_waiting, held, used, tail, later, never, pool - taken)

    return look


def saturated(run: Run) -> list[Memory]:
    """The steps in which requests waited, so that memory was the limit; all, if none ever did."""
    waited = [step.seen for step in run.steps if step.queued or step.seen.waiting]
    return waited or [step.seen for step in run.steps]


def mean(steps: list[Memory], name: str) -> float:
    """The mean over steps of one of the fields of `Memory`."""
    return sum(getattr(step, name) for step in steps) / len(steps)


# ---- figures -------------------------------------------------------------------------------------
def figures_of(run: Run) -> Figures:
    """The figures of a run in which all requests were there at once."""
    steps, end_s = saturated(run), run.steps[-1].end_s
    num_tokens = sum(len(one.token_s) for one in run.served)
    used = 100 * mean(steps, "used") / mean(steps, "held")
    figures = {
        RUNNING: mean(steps, "running"),
        ("running at once, peak", "requests"): max(step.running for step in steps),
        ("generated tokens", "tokens/s"): num_tokens / end_s,
        ("served", "requests/s"): len(run.served) / end_s,
        ("work done", "tokens"): num_tokens,
        ("share of the blocks held that is used", "%"): used,
    }
    pool = sum(getattr(steps[0], name) for name in SHARES)
    for name in SHARES:
        figures[f"share of the pool: {name}", "%"] = 100 * mean(steps, name) / pool
    figures["preempted", "times"] = sum(one.num_preemptions for one in run.served)
    computed = sum(step.new_tokens for step in run.steps)
    needed = sum(one.request.prompt_tokens + len(one.token_s) - 1 for one in run.served)
    figures["computed beyond one time each", "%"] = 100 * (computed / needed - 1)
    return figures


def goodput_of(target_ms: float) -> Callable[[Run], Figures]:
    """A function that counts the requests of a run that met the target: per second, and in %."""

    def figures(run: Run) -> Figures:
        met = sum(1e3 * one.latency_per_token_s <= target_ms for one in run.served)
        last_s = max(one.request.arrival_s for one in run.served)
        return {
            ("goodput", "requests/s"): met / last_s,
            ("share of the requests in time", "%"): 100 * met / len(run.served),
        }

    return figures


def measure_loads(
    names: list[str],
    workload: Workload,
    machine: Machine,
    paged_per_s: float,
    args: argparse.Namespace,
) -> Iterator[tuple[str, str, list[Figures]]]:
    """Open loops at parts of the rate that paging sustained: (load, contender, figures).

    A contender that cannot serve this rate falls more and more behind, and its requests are late.
    """
    target_ms = args.target or (10.0 if args.simulate else 50.0)
    for load in args.loads:
        requests = list(poisson(workload.requests, load * paged_per_s, args.seed))
        name = f"poisson load={load:g} rate={load * paged_per_s:.3g}/s target={target_ms:g}ms"
        for contender, figures in machine.in_turn(names, requests, goodput_of(target_ms)):
            yield name, contender, figures


# ---- the printed summary -------------------------------------------------------------------------
def print_bounds(most: dict[str, float], workload: Workload, block_size: int) -> None:
    """Print what a request holds with each plan, and the bound that follows."""
    steps = sum(request.output_tokens for request in workload.requests)
    weighted = (
        request.output_tokens * tokens_held("paged", request, workload.max_seq_len, block_size)
        for request in workload.requests
    )
    paged = sum(weighted) / steps
    print(f"\na request holds, as a mean over all {steps:,} steps of all requests:")
    print(f"  {'paged':26}{paged:8.1f} tokens, in whole blocks of {block_size}")
    for name, bound in most.items():
        print(f"  {name:26}{paged * bound:8.1f} tokens: paged at most {bound:.2f} x as many run")


def print_shares(found: dict[str, list[Figures]], workload: Workload) -> None:
    """Print where the memory went, the paper's four bars beside ours, and why they differ."""
    print("\n% of the pool, in steps in which requests wait" + "".join(f"{s:>7}" for s in SHARES))
    used = {}
    for name, (first, *_) in found.items():
        shares = [first[f"share of the pool: {share}", "%"] for share in SHARES]
        used[name] = shares[0]
        paper = f"   the paper: {PAPER_USED[name]} used" if name in PAPER_USED else ""
        print(f"  {name:44}" + "".join(f"{share:7.1f}" for share in shares) + paper)
    print("\n".join(f"  {share}: {meaning}" for share, meaning in SHARES.items()))
    if found["paged"][0]["share of the pool: free", "%"] > 20:
        print("paged, much of the pool is free: the budget of a step decides who runs, not memory")
    if not PAPER_USED.keys() <= used.keys():
        return
    requests = workload.requests
    prompt = sum(request.prompt_tokens for request in requests) / len(requests)
    output = sum(request.output_tokens for request in requests) / len(requests)
    here = [used[name] for name in PAPER_USED]
    order = "in the paper's order" if here == sorted(here) else "NOT in the paper's order"
    print(f"{order} (Fig. 2). The paper ran OPT-13B on ShareGPT, with means of 161 tokens in")
    print("and 338 out and slabs of up to 2,048: most of a slab is empty most of the time. Here")
    print(f"a request starts with {prompt:.0f} tokens and writes {output:.0f}, in slabs of up to")
    print(f"{workload.max_seq_len:,}.\n")


def compare(
    paged: list[Figures], figures: list[Figures], bound: float, columns: Columns
) -> Iterator[Measurement]:
    """How many times as many ran paged as with a contender, and the share of the bound.

    Both have run in the same rounds.
    """
    ours = [each[RUNNING] for each in paged]
    theirs = [each[RUNNING] for each in figures]
    bounds_each = [bound] * len(figures)
    ran = {"metric": "as many run at once paged", "unit": "x"}
    yield Measurement.ratio_of(ours, theirs, **ran, **columns)
    possible = {"metric": "as many could run at once paged", "unit": "x"}
    yield Measurement.of(bounds_each, **possible, **columns)
    reached = [a / b for a, b in zip(ours, theirs, strict=True)]
    share = {"metric": "share of that bound", "unit": "%"}
    yield Measurement.ratio_of(reached, bounds_each, 100.0, **share, **columns)


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    if min([*args.loads, 1 if args.target is None else args.target]) <= 0:
        given = f"--loads {args.loads}, --target {args.target}"
        raise ValueError(f"{given}: rates and times are above 0")
    threads_before = torch.get_num_threads()
    workload = make_workload(args)
    names = list(dict.fromkeys(["paged", *(args.policies or CONTENDERS)]))
    try:
        machine = Machine(args, workload.max_seq_len)
        yield from run_on(machine, names, workload, args)
    finally:
        torch.set_num_threads(threads_before)


def run_on(
    machine: Machine, names: list[str], workload: Workload, args: argparse.Namespace
) -> Iterator[Measurement]:
    """All rows of the named contenders on one machine."""
    common = {"experiment": "concurrency"} | machine.columns()
    name_of_run = f"{workload.name}, {machine.description()}"
    reserving = [name for name in names if name != "paged" and not CONTENDERS[name].is_static]
    most = bounds(reserving, workload.requests, workload.max_seq_len, args.block_size)
    print(f"{workload.sentence}\n{machine.clock}")
    print_bounds(most, workload, args.block_size)
    at_once = [request._replace(arrival_s=0.0) for request in workload.requests]
    found: dict[str, list[Figures]] = {}
    look_of = partial(watcher, requests=at_once)
    for name, figures in machine.in_turn(names, at_once, figures_of, look_of):
        found[name] = figures
        columns = common | {"contender": name, "workload": f"{name_of_run}, all at once"}
        yield from rows_of(figures, columns)
        yield Measurement.of([machine.pool_bytes], metric="pool", unit="bytes", **columns)
        if name in most:
            yield from compare(found["paged"], figures, most[name], columns)
    print_shares(found, workload)
    per_s = statistics.median(each["served", "requests/s"] for each in found["paged"])
    for load, name, figures in measure_loads(names, workload, machine, per_s, args):
        columns = common | {"contender": name, "workload": f"{name_of_run}, {load}"}
        yield from rows_of(figures, columns)
