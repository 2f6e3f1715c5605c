"""The same memory, planned in eight ways: how many run at once, what it brings, where it goes.

All get the same requests, the same KV bytes, the same scheduler and kernel (`contenders.py`). First
everybody is there at once, and the steps in which somebody waits are averaged: memory decides who
runs (or, in a pool as large as a GPU's, the token budget of a step; then paging gains nothing, and
the output says so). Then the requests come at random, at a part of the rate that paging sustained,
and the goodput is counted: how many a second got all their tokens within --target ms a token.

The bound is worked out beforehand, from the lengths alone. A request of p tokens that gets g more
takes g steps. Each step it holds what was reserved for it, r tokens; paged, the whole blocks of the
p, p + 1, .. p + g - 1 tokens it has by then. Over all steps of all requests

    bound = sum of g x r / sum of the tokens in those blocks

is how many times as many run at once paged as with a reservation of r, if neither loses anything
else: no hole between slabs, no block unused, nothing computed twice. For Azure's conversations that
fit 1,024 tokens: 2.57 for r = 1,024 ("maximum, perfect fit"), 1.57 for the power of two that holds
prompt and output, 1.15 for p + g itself ("oracle, perfect fit"). Buddies, the paper's baselines,
round each slab up to a power of two of blocks; r counts that, and the paper's "power of two" is the
prompt and a power of two for the output: 2.57, 1.93 and 1.57. A run may come out a little above its
bound: reservations lose holes too, and paged the youngest, who hold the least, run parts twice.

Kwon et al. 2023, "PagedAttention", SOSP, arXiv:2309.06180, figures 2 and 13.
Run: python -m experiments.concurrency --simulate
     python -m experiments.concurrency --simulate --workload short
     python -m experiments.concurrency
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch

from experiments.contenders import CONTENDERS, Machine, add_machine_arguments
from experiments.results import Measurement, run_alone
from experiments.simulate import Arrival, Run, poisson
from experiments.trace import Workload, add_workload_arguments, make_workload
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
    "free": "free while somebody waits: holes too small, less than the next needs, or no budget",
}


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
    """Tokens of memory that a request holds on the average of its steps, see the top.

    Paged it is more with each step. All others hold what they reserve from the first step to the
    last: a perfect fit no more than that, buddies a power of two of blocks.
    """
    p, g = request.prompt_tokens, request.output_tokens
    if name == "paged":
        return sum(-(-n // block_size) for n in range(p, p + g)) * block_size / g
    contender = CONTENDERS[name]
    seq = SimpleNamespace(num_prompt_tokens=p, max_tokens=g)
    reserved = contender.reserve(max_seq_len)(seq)
    if contender.region is int:
        return reserved
    return contender.region(-(-reserved // block_size)) * block_size


def bounds(names: list[str], requests: list[Arrival], max_seq_len: int, block_size: int) -> dict:
    """name -> how many times as many can run paged, at most; longer requests weigh more."""
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
    """The pool in one step, in tokens; `running` counts those who still want tokens."""

    running: int
    waiting: int
    held: int  # room in the blocks that tables name: without what buddies rounded up
    used: int
    tail: int
    later: int
    never: int
    free: int


def watcher(name: str, requests: list[Arrival]) -> Callable[[Scheduler], Memory]:
    """What to look at in each step of a run on these requests."""
    ends = [r.prompt_tokens + r.output_tokens for r in sorted(requests, key=lambda r: r.arrival_s)]
    region = CONTENDERS[name].region

    def look(scheduler: Scheduler) -> Memory:
        size = scheduler.allocator.block_size
        running = held = used = tail = later = taken = 0
        for seq in scheduler.running:
            end, num_blocks = ends[seq.request.arrival], len(seq.block_table)
            room = num_blocks * size
            held += room
            taken += region(num_blocks) * size
            if len(seq.token_ids) >= end:
                continue  # complete, and pads a static batch: what it holds is no use to anybody
            running += 1
            filled = seq.num_computed_tokens
            in_use = -(-filled // size) * size
            used += filled
            tail += in_use - filled
            later += max(0, min(end, room) - in_use)
        never = taken - used - tail - later
        pool = scheduler.allocator.num_blocks * size
        return Memory(running, scheduler.num_waiting, held, used, tail, later, never, pool - taken)

    return look


def saturated(run: Run) -> list[Memory]:
    """The steps in which somebody waited, so that memory was the limit; all, if nobody ever did."""
    waited = [step.seen for step in run.steps if step.queued or step.seen.waiting]
    return waited or [step.seen for step in run.steps]


def mean(seen: list[Memory], name: str) -> float:
    """The average over steps of one of the fields of `Memory`."""
    return sum(getattr(each, name) for each in seen) / len(seen)


# ---- figures -------------------------------------------------------------------------------------
def figures_of(run: Run) -> dict[tuple[str, str], float]:
    """What a run with everybody there at once says: {(metric, unit): value}."""
    seen, end_s = saturated(run), run.steps[-1].end_s
    tokens = sum(len(one.token_s) for one in run.served)
    pool = sum(seen[0][3:])
    figures = {
        ("running at once, mean", "requests"): mean(seen, "running"),
        ("running at once, peak", "requests"): max(each.running for each in seen),
        ("generated tokens", "tokens/s"): tokens / end_s,
        ("served", "requests/s"): len(run.served) / end_s,
        ("work done", "tokens"): tokens,
        ("share of the blocks held that is used", "%"): 100
        * mean(seen, "used")
        / mean(seen, "held"),
    }
    for name in SHARES:
        figures[f"share of the pool: {name}", "%"] = 100 * mean(seen, name) / pool
    figures["preempted", "times"] = sum(one.num_preemptions for one in run.served)
    computed = sum(step.new_tokens for step in run.steps)
    wanted = sum(one.request.prompt_tokens + len(one.token_s) - 1 for one in run.served)
    figures["computed beyond one time each", "%"] = 100 * (computed / wanted - 1)
    return figures


def goodput_of(target_ms: float) -> Callable[[Run], dict[tuple[str, str], float]]:
    """Requests a second that were answered within the target, of those that come in a second."""

    def figures(run: Run) -> dict[tuple[str, str], float]:
        met = sum(1e3 * one.latency_per_token_s <= target_ms for one in run.served)
        last_s = max(one.request.arrival_s for one in run.served)
        return {
            ("goodput", "requests/s"): met / last_s,
            ("share of the requests in time", "%"): 100 * met / len(run.served),
        }

    return figures


def measure_loads(
    names: list[str], workload: Workload, machine: Machine, paged_per_s: float, args
) -> Iterator[tuple[str, str, list[dict]]]:
    """Open loops at parts of the rate that paging sustained: what for the workload, who, figures.

    A contender that cannot serve such a rate falls behind more and more, and late is not in time.
    """
    target_ms = args.target or (10.0 if args.simulate else 50.0)
    for load in args.loads:
        requests = list(poisson(workload.requests, load * paged_per_s, args.seed))
        words = f"poisson load={load:g} rate={load * paged_per_s:.3g}/s target={target_ms:g}ms"
        for name, figures in machine.in_turn(names, requests, goodput_of(target_ms)):
            yield words, name, figures


# ---- what is said of it --------------------------------------------------------------------------
def say_bounds(most: dict[str, float], workload: Workload, block_size: int) -> None:
    """The bound, worked out."""
    steps = sum(request.output_tokens for request in workload.requests)
    weighted = (
        request.output_tokens * tokens_held("paged", request, workload.max_seq_len, block_size)
        for request in workload.requests
    )
    paged = sum(weighted) / steps
    print(f"\na request holds, on the average of all {steps:,} steps of all requests:")
    print(f"  {'paged':26}{paged:8.1f} tokens, in whole blocks of {block_size}")
    for name, bound in most.items():
        print(f"  {name:26}{paged * bound:8.1f} tokens: paged at most {bound:.2f} x as many run")


def say_shares(found: dict[str, list[dict]], workload: Workload) -> None:
    """Where the memory went, the paper's four bars beside ours, and why they differ."""
    print("\n% of the pool, steps in which somebody waits" + "".join(f"{s:>7}" for s in SHARES))
    used = {}
    for name, (first, *_) in found.items():
        shares = [first[f"share of the pool: {share}", "%"] for share in SHARES]
        used[name] = shares[0]
        paper = f"   the paper: {PAPER_USED[name]} used" if name in PAPER_USED else ""
        print(f"  {name:42}" + "".join(f"{share:7.1f}" for share in shares) + paper)
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
    print(f"{order} (Fig. 2). There it was OPT-13B on ShareGPT, 161 tokens in and 338 out on the")
    print("average, slabs of up to 2,048: most of a slab is empty for most of its life. Here a")
    print(
        f"request has {prompt:.0f} tokens from its first step on and {output:.0f} to come, ", end=""
    )
    print(f"in slabs of up to {workload.max_seq_len:,}.\n")


def rows_of(figures: list[dict], what: dict) -> Iterator[Measurement]:
    """A row for each figure of a contender's runs."""
    for metric, unit in figures[0]:
        values = [each[metric, unit] for each in figures]
        yield Measurement.of(values, metric=metric, unit=unit, **what)


def compare(
    paged: list[dict], figures: list[dict], most: float, what: dict
) -> Iterator[Measurement]:
    """How many times as many ran paged as with this contender, and what part of the bound that is.

    Both have run in the same rounds.
    """
    ours, theirs = (
        [each["running at once, mean", "requests"] for each in f] for f in (paged, figures)
    )
    bound = [most] * len(figures)
    many = {"metric": "as many run at once paged", "unit": "x"}
    yield Measurement.ratio_of(ours, theirs, **many, **what)
    many = {"metric": "as many could run at once paged", "unit": "x"}
    yield Measurement.of(bound, **many, **what)
    reached = [a / b for a, b in zip(ours, theirs, strict=True)]
    share = {"metric": "share of that bound", "unit": "%"}
    yield Measurement.ratio_of(reached, bound, 100.0, **share, **what)


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    before = torch.get_num_threads()
    if min([*args.loads, 1 if args.target is None else args.target]) <= 0:
        given = f"--loads {args.loads}, --target {args.target}"
        raise ValueError(f"{given}: rates and times are above 0")
    workload = make_workload(args)
    names = list(dict.fromkeys(["paged", *(args.policies or CONTENDERS)]))
    try:
        machine = Machine(args, workload.max_seq_len)
        common = {"experiment": "concurrency"} | machine.columns()
        words = f"{workload.words}, {machine.words()}"
        planned = [name for name in names if name != "paged" and not CONTENDERS[name].is_static]
        most = bounds(planned, workload.requests, workload.max_seq_len, args.block_size)
        print(f"{workload.sentence}\n{machine.clock}")
        say_bounds(most, workload, args.block_size)
        at_once = [request._replace(arrival_s=0.0) for request in workload.requests]
        found: dict[str, list[dict]] = {}
        watch = partial(watcher, requests=at_once)
        for name, figures in machine.in_turn(names, at_once, figures_of, watch):
            found[name] = figures
            what = common | {"contender": name, "workload": f"{words}, all at once"}
            yield from rows_of(figures, what)
            yield Measurement.of([machine.pool_bytes], metric="pool", unit="bytes", **what)
            if name in most:
                yield from compare(found["paged"], figures, most[name], what)
        say_shares(found, workload)
        per_s = statistics.median(each["served", "requests/s"] for each in found["paged"])
        for load, name, figures in measure_loads(names, workload, machine, per_s, args):
            yield from rows_of(
                figures, common | {"contender": name, "workload": f"{words}, {load}"}
            )
    finally:
        torch.set_num_threads(before)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    run_alone(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    main()
