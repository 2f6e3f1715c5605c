"""Four roads to the same tokens, timed: no cache, a contiguous slab a sequence, blocks, and a peer.

Greedy, equal prompts, equal numbers of tokens, one process, the roads (roads.py) in turn and five
times over. The first value of each list (--batches 8 1 32) makes the first workload, and each other
value is tried with the first ones of all other lists. Of the first workload each trial is a row
too. A pool smaller than what all sequences need (--pools 50: half of it) makes the engine preempt:
it gives up speed for memory, and the rows say how much of both. The last workload is one sequence
that gets 500 tokens, for which a cache is worth most. Where paging loses is here too: block_size=1,
a tight pool, and sequences so short and alike that a slab each is no waste.

What is compared did the same work: each road's tokens are checked against the contiguous road's,
and the rows hold the tokens written, the tokens computed and the most KV bytes held. A slab holds
the model's longest length, transformers' cache what it has, at the end of a step. The first step,
which computes the prompts, is the time to first token (the mean of all sequences; some start later
in a tight pool). Latency percentiles are of all later steps of a trial.

Run: python -m experiments.speed
     python -m experiments.speed --full          GPT-2's 124M shape; without a cache, minutes each
"""

import argparse
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from checkpoints.load import load_model, weights_kind
from experiments import roads, transformers_loop
from experiments.results import Measurement, device_name, run_alone
from experiments.roads import CONTIGUOUS, NO_CACHE, PAGED, PEER, Road, Trial
from experiments.transformers_loop import Theirs
from kernels.backends import BACKENDS, DTYPES, resolve_device, resolve_dtype
from kernels.packed_linear import pack
from llm import LLM, SHIPPED_MODEL
from model import GPT

ROADS = {"contiguous": CONTIGUOUS, "paged": PAGED, "no-cache": NO_CACHE, "transformers": PEER}
# What a flag means that is not given: on the shipped model, and with --full.
DEFAULTS = {
    "model": str(SHIPPED_MODEL),
    "batches": [8, 1, 32],
    "prompt_tokens": [64, 256],
    "new_tokens": [64, 256],
    "block_sizes": [16, 1, 128],
    "pools": [100, 50, 25],
}
FULL = DEFAULTS | {"model": "random:gpt2", "new_tokens": [32, 128]}
WARM_UP_TOKENS = 64  # of each sequence in the round that is not counted, at most
LONG_S = 60  # three rounds are enough where a trial takes longer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add = parser.add_argument
    add("--full", action="store_true", help="GPT-2's 124M shape, random weights, fewer tokens")
    add("--model", help="a folder, or random:gpt2; default: the shipped one")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="of weights, K and V")
    add("--backend", default="auto", choices=["auto", *BACKENDS], help="the paged road's kernel")
    add("--threads", type=int, help="of the CPU; default: all, for the shipped model 1")
    add("--roads", nargs="+", choices=[*ROADS], help="default: all that are installed")
    add("--batches", type=int, nargs="+", help="numbers of sequences; default 8 1 32")
    add("--prompt-tokens", type=int, nargs="+", help="of each prompt, at random; default 64 256")
    add("--new-tokens", type=int, nargs="+", help="that each gets; default 64 256, full 32 128")
    add("--block-sizes", type=int, nargs="+", help="of the paged road; default 16 1 128")
    add("--pools", type=int, nargs="+", help="percent of the blocks that all need; 100 50 25")
    add("--long-tokens", type=int, default=500, help="that one sequence gets at last; 0: skip")
    add("--no-cache-rows", type=int, default=60_000, help="most tokens computed without a cache")
    add("--repeats", type=int, default=5, help="trials; 3 where one takes more than a minute")
    add("--seed", type=int, default=0, help="of the prompts")


# ---- what to do ----------------------------------------------------------------------------------
class Workload(NamedTuple):
    """What each road does in a trial; the last two matter to the paged one alone."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    block_size: int
    num_blocks: int

    def __str__(self) -> str:
        sizes = f"batch={self.batch} prompt={self.prompt_tokens} new={self.new_tokens}"
        return f"{sizes} block_size={self.block_size} num_blocks={self.num_blocks}"

    @property
    def rows_without_cache(self) -> int:
        """Tokens that are computed when each step computes all: batch x (P + (P + 1) + ..)."""
        P, N = self.prompt_tokens, self.new_tokens
        return self.batch * (N * P + N * (N - 1) // 2)


def make_workload(batch: int, prompt: int, new: int, block_size: int, percent: int) -> Workload:
    """One whose pool has this share of the blocks that all need, and at least one sequence's."""
    if min(batch, prompt, new, block_size, percent) < 1:
        sizes = f"{batch=}, {prompt=}, {new=}, {block_size=}, pool {percent}%"
        raise ValueError(f"{sizes}: each must be at least 1")
    each = -(-(prompt + new) // block_size)
    return Workload(batch, prompt, new, block_size, max(each, batch * each * percent // 100))


def plan(args: argparse.Namespace) -> dict[Workload, list[str]]:
    """Workload -> the roads that run it: the first one, then one value changed at a time."""
    lists = args.batches, args.prompt_tokens, args.new_tokens, args.block_sizes, args.pools
    firsts = [values[0] for values in lists]
    found: dict[Workload, list[str]] = {}
    for place, values in enumerate(lists):
        for value in values:
            workload = make_workload(*firsts[:place], value, *firsts[place + 1 :])
            # Blocks and pool are the engine's own matter: there it is compared with the slab only.
            allowed = [*ROADS.values()] if place < 3 else [CONTIGUOUS, PAGED]
            if workload.rows_without_cache > args.no_cache_rows:
                allowed = [road for road in allowed if road != NO_CACHE]
            found.setdefault(workload, [road for road in args.roads if road in allowed])
    if args.long_tokens:  # without a cache too, however long it takes: this is what it is for
        long = make_workload(1, args.prompt_tokens[0], args.long_tokens, args.block_sizes[0], 100)
        found[long] = args.roads
    return found


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, with a value for each flag that was not given."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    chosen = argparse.Namespace(**((FULL if args.full else DEFAULTS) | given))
    chosen.is_shipped = chosen.model == str(SHIPPED_MODEL)
    chosen.device = resolve_device(args.device)
    chosen.dtype = resolve_dtype(args.dtype, chosen.device)
    # So small a model that a second thread waits more than it works.
    chosen.threads = args.threads or (1 if chosen.is_shipped else torch.get_num_threads())
    installed = importlib.util.find_spec("transformers") is not None
    names = args.roads or [name for name in ROADS if name != "transformers" or installed]
    chosen.roads = [road for name, road in ROADS.items() if name in names]
    return chosen


# ---- measuring -----------------------------------------------------------------------------------
def make_roads(model: GPT, theirs, names: list[str], workload: Workload, backend: str) -> dict:
    """The named roads for one workload: name -> (road, backend)."""
    llm = LLM(
        model,
        backend=backend,
        block_size=workload.block_size,
        num_blocks=workload.num_blocks,
        max_num_seqs=workload.batch,
        # Whatever is to be computed fits into one step, prompts that come again too.
        max_num_batched_tokens=workload.batch * (workload.prompt_tokens + workload.new_tokens),
    )
    found: dict[str, tuple[Road, str]] = {}
    for name in names:
        if name == PAGED:
            found[name] = roads.paged_road(llm), llm.backend
        elif name == CONTIGUOUS:
            found[name] = roads.contiguous_road(model, workload.batch), "torch"
        elif name == NO_CACHE:
            found[name] = roads.static_road(model, cache=None), "torch"
        else:
            token_bytes = model.config.kv_bytes_per_token(model.wte.weight.dtype)
            found[name] = roads.transformers_road(theirs, token_bytes), "torch"
    return found


def time_rounds(found: dict, workload: Workload, prompts: list, repeats: int) -> dict:
    """Trials of all roads in turn, {road: [Trial, ..]}; a round before them warms up."""
    trials: dict[str, list[Trial]] = {name: [] for name in found}
    bar = {"desc": str(workload), "disable": None, "leave": False, "unit": "trial"}
    with tqdm(total=(repeats + 1) * len(found), **bar) as progress:  # None: only on a terminal
        for number in range(repeats + 1):
            for name, (road, _) in found.items():
                wanted = workload.new_tokens if number else min(workload.new_tokens, WARM_UP_TOKENS)
                trial = roads.time_trial(road, prompts, wanted)
                progress.update()
                if number:
                    trials[name].append(trial)
            if number >= 3 and max(ts[-1].seconds for ts in trials.values()) > LONG_S:
                break
    return trials


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that this share of all values does not exceed: the nearest rank."""
    return sorted(values)[max(math.ceil(percent / 100 * len(values)), 1) - 1]


# ---- rows ----------------------------------------------------------------------------------------
def rows_of_road(trials: list[Trial], equal: float, what: dict) -> Iterator[Measurement]:
    """A road's figures but the ratios: its times, then the work and the memory behind them."""

    def row(metric: str, unit: str, values) -> Measurement:
        return Measurement.of(values, metric=metric, unit=unit, **what)

    written = [sum(map(len, trial.token_ids)) for trial in trials]
    yield row("generation time", "s", (trial.seconds for trial in trials))
    rates = [tokens / trial.seconds for tokens, trial in zip(written, trials, strict=True)]
    yield row("generated tokens", "tokens/s", rates)
    means_ms = [sum(trial.first_ms) / len(trial.first_ms) for trial in trials]
    yield row("time to first token", "ms", means_ms)
    for percent in (50, 90, 99) if trials[0].step_ms else ():
        latencies = [percentile(trial.step_ms, percent) for trial in trials]
        yield row(f"step latency p{percent}", "ms", latencies)
    yield row("tokens written", "tokens", written)
    yield row("tokens computed", "tokens", (trial.computed for trial in trials))
    yield row("tokens equal to the first road's", "%", [equal])
    yield row("KV memory at most", "bytes", (trial.kv_bytes for trial in trials))
    if what["contender"] == PAGED:
        yield row("preempted", "sequences", (trial.preempted for trial in trials))


def ratios(trials: dict[str, list[Trial]], name: str, what: dict) -> Iterator[Measurement]:
    """How many times as fast a road is as the contiguous one, and as the one without a cache."""
    seconds = {road: [trial.seconds for trial in ts] for road, ts in trials.items()}
    for other in (CONTIGUOUS, NO_CACHE):
        if other in trials and other != name:
            against = {"metric": f"speed against {other}", "unit": "x"}
            yield Measurement.ratio_of(seconds[other], seconds[name], **against, **what)


def rows_of_workload(trials: dict, workload: Workload, backends: dict, common: dict) -> Iterator:
    """All roads' figures over all trials. Raises ValueError for one that wrote other tokens."""
    first = next(iter(trials.values()))[0]
    in_16_bits = DTYPES[common["dtype"]].itemsize == 2
    for name, ts in trials.items():
        equal = [roads.check_equal_work(name, trial, first, in_16_bits) for trial in ts]
        what = common | {"contender": name, "workload": str(workload), "backend": backends[name]}
        yield from rows_of_road(ts, min(equal), what)
        yield from ratios(trials, name, what)


def rows_of_trials(trials: dict, workload: Workload, backends: dict, common: dict) -> Iterator:
    """Time and ratios of each trial for itself."""
    for number in range(min(map(len, trials.values()))):
        one = {name: [ts[number]] for name, ts in trials.items()}
        common = common | {"workload": f"{workload} trial={number + 1}"}
        for name, (trial,) in one.items():
            what = common | {"contender": name, "backend": backends[name]}
            yield Measurement.of([trial.seconds], metric="generation time", unit="s", **what)
            yield from ratios(one, name, what)


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    args = complete(args)
    if PEER in args.roads:
        transformers_loop.require_transformers()
    todo = plan(args)
    before = torch.get_num_threads()
    model = load_model(args.model, args.dtype, args.device)
    most, vocab_size = model.config.max_seq_len, model.config.vocab_size
    for workload in todo:
        if workload.prompt_tokens + workload.new_tokens > most:
            raise ValueError(f"{workload}: the model has {most} positions, take fewer tokens")
    theirs = Theirs(transformers_loop.as_transformers(model)) if PEER in args.roads else None
    common = {"experiment": "speed", "dtype": str(args.dtype)[6:], "threads": args.threads}
    common |= {"device": device_name(args.device), "seed": args.seed}
    common |= {"model": Path(args.model).name if args.is_shipped else args.model}
    common |= {"weights": weights_kind(args.model)}
    torch.set_num_threads(args.threads)  # the compiled kernels take as many as PyTorch
    try:
        for number, (workload, names) in enumerate(todo.items()):
            served = pack(load_model(args.model, args.dtype, args.device), workload.batch)
            found = make_roads(served, theirs, names, workload, args.backend)
            generator = torch.Generator().manual_seed(args.seed)
            shape = workload.batch, workload.prompt_tokens
            prompts = torch.randint(vocab_size, shape, generator=generator).tolist()
            trials = time_rounds(found, workload, prompts, args.repeats)
            backends = {name: backend for name, (_, backend) in found.items()}
            yield from rows_of_workload(trials, workload, backends, common)
            if number == 0:
                yield from rows_of_trials(trials, workload, backends, common)
    finally:
        torch.set_num_threads(before)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    run_alone(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    main()
