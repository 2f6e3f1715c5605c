"""The same tokens written in four ways, timed: no cache, a contiguous cache, blocks, transformers.

    no cache      every step computes all tokens again
    contiguous    a slab of the model's longest length for each sequence, PyTorch's attention
    paged         the engine, `InferenceEngine.step()`: schedule, forward, sample, detokenise
    transformers  a loop around its model and DynamicCache, if transformers is installed

All are greedy, get equal prompts and write equal numbers of tokens, in one process, in turn, in
several rounds. The first value of each list of flags (--batches 8 1) makes the first workload. Each
further value is combined with the first values of all other lists. The first workload has a row for
each round besides. A pool smaller than all sequences need (--pools 50: half of it) makes the engine
preempt. The last workload is one long sequence: there a cache saves most. Paging loses with
block_size=1, with a small pool, and with sequences so short and so alike that slabs waste nothing.

Equal work is checked: tokens must be those of the contiguous way. The rows say how many tokens were
written, how many were computed, and how many bytes of K and V were held at most. A slab holds the
model's longest length; transformers' cache holds the tokens that it has. Time to first token is a
mean over all sequences: in a small pool some of them start later. Latency percentiles are of all
steps of a round but the first.

The default takes about a minute and a half on 2 idle cores. `--full` has GPT-2's 124M shape and
takes minutes for each workload without a cache.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from baselines import ContiguousCache, attend_without_cache, next_logits
from checkpoints.load import load_model, weights_kind
from experiments import transformers_engines
from experiments.ceilings import Columns
from experiments.peers import THEIRS
from experiments.results import Measurement, device_name, percentile
from experiments.transformers_engines import Theirs
from kernels.backends import BACKENDS, DTYPES, resolve_device, resolve_dtype
from kernels.device_memory import preallocate
from kernels.packed_linear import pack
from llm import LLM, SHIPPED_MODEL, SamplingParams
from model import GPT

CONTIGUOUS = "contiguous"
PAGED = "paged"
NO_CACHE = "no cache"
WAYS = {"contiguous": CONTIGUOUS, "paged": PAGED, "no-cache": NO_CACHE, "transformers": THEIRS}
# The values of flags that are not given: with --full, and without it.
FULL = {
    "model": "random:gpt2",
    "batches": [8, 1, 32],
    "prompt_tokens": [64, 256],
    "new_tokens": [32, 128],
    "block_sizes": [16, 1, 128],
    "pools": [100, 50, 25],
    "long_tokens": 500,
}
DEFAULTS = {
    "model": str(SHIPPED_MODEL),
    "batches": [8, 1],
    "prompt_tokens": [64],
    "new_tokens": [32, 128],
    "block_sizes": [16],
    "pools": [100, 50],
    "long_tokens": 256,
}
WARM_UP_TOKENS = 64  # most tokens of each sequence in the round that is not counted
LONG_S = 60  # three rounds are enough if one trial takes longer
# The figures in the terminal's table. The CSV file has all.
SHOWN = ["generation time", "generated tokens", "time to first token", "KV memory at most"]
SHOWN += ["speed against contiguous", "speed against no cache"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add = parser.add_argument
    add("--full", action="store_true", help="GPT-2's 124M shape, random weights, more workloads")
    add("--model", help="a folder, or random:gpt2; default: the shipped one")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="of weights, K and V")
    add("--backend", default="auto", choices=["auto", *BACKENDS], help="the engine's kernel")
    add("--threads", type=int, help="of the CPU; default: all, for the shipped model 1")
    add("--roads", dest="ways", nargs="+", choices=[*WAYS], help="default: all that are installed")
    add("--batches", type=int, nargs="+", help="numbers of sequences; default 8 1, full 8 1 32")
    add("--prompt-tokens", type=int, nargs="+", help="of each prompt; default 64, full 64 256")
    add("--new-tokens", type=int, nargs="+", help="that each gets; default 32 128")
    add("--block-sizes", type=int, nargs="+", help="of the engine; default 16, full 16 1 128")
    add("--pools", type=int, nargs="+", help="percent of all blocks needed; 100 50, full 100 50 25")
    add("--long-tokens", type=int, help="for one sequence at last; 0: skip; 256, full 500")
    add("--no-cache-rows", type=int, default=60_000, help="most tokens computed without a cache")
    add("--repeats", type=int, default=5, help="rounds; 3 if a trial takes more than a minute")
    add("--seed", type=int, default=0, help="of the prompts")


# ---- the ways to write tokens --------------------------------------------------------------------
class Step(NamedTuple):
    """What one step did. It is yielded when its tokens are on the host, as a client sees them."""

    tokens: dict[int, int]  # number of a prompt -> the token that it got
    computed: int  # tokens that went through the model
    kv_bytes: int  # held while the step ran, reserved bytes included
    preempted: int = 0  # sequences that lost their blocks


Way = Callable[[list[list[int]], int], Iterator[Step]]  # (prompts, new_tokens) -> its steps


def static_way(model: GPT, cache: ContiguousCache | None) -> Way:
    """All prompts start and end together: with slabs, or without a cache."""
    attend = cache.attend if cache else attend_without_cache

    def steps(prompts: list[list[int]], new_tokens: int) -> Iterator[Step]:
        sequences = [list(prompt) for prompt in prompts]
        starts = [0] * len(prompts)  # tokens of each sequence that are in the cache
        for _ in range(new_tokens):
            computed = sum(map(len, sequences)) - sum(starts)
            chosen = next_logits(model, attend, sequences, starts).argmax(-1).tolist()
            for token_ids, token_id in zip(sequences, chosen, strict=True):
                token_ids.append(token_id)
            if cache:
                starts = [len(token_ids) - 1 for token_ids in sequences]
            yield Step(dict(enumerate(chosen)), computed, cache.slabs.nbytes if cache else 0)

    return steps


def contiguous_way(model: GPT, batch: int) -> Way:
    """A slab for each sequence, as long as the model allows: lengths are not known beforehand."""
    config, weight = model.config, model.wte.weight
    cache = ContiguousCache(
        config.n_layer,
        batch,
        config.max_seq_len,
        config.n_head,
        config.head_dim,
        weight.dtype,
        weight.device,
        preallocate,
    )
    return static_way(model, cache)


def paged_way(llm: LLM) -> Way:
    """The engine. Sequences that do not fit wait; a preempted one computes its tokens again."""
    allocator = llm.engine.scheduler.allocator
    block_bytes = llm.engine.cache.pool[:, 0].nbytes

    def steps(prompts: list[list[int]], new_tokens: int) -> Iterator[Step]:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        ids = [llm.engine.add_request(prompt, params) for prompt in prompts]
        numbers = {request_id: number for number, request_id in enumerate(ids)}
        while llm.engine.has_unfinished():
            output = llm.engine.step()
            plan = output.plan
            tokens = {numbers[d.request_id]: d.token_ids[-1] for d in output.deltas}
            # Counted from the plan: sequences that ended in this step have freed their blocks.
            held = sum(allocator.blocks_needed(start + n) for _, start, n in plan.scheduled)
            yield Step(tokens, plan.num_tokens, held * block_bytes, len(plan.preempted))

    return steps


def transformers_way(theirs: Theirs, kv_bytes_per_token: int) -> Way:
    """A loop around transformers' model. The prompts must have the same length."""

    def steps(prompts: list[list[int]], new_tokens: int) -> Iterator[Step]:
        B, T = len(prompts), len(prompts[0])
        for number in range(new_tokens):
            if number == 0:
                theirs.start(torch.tensor(prompts, device=theirs.model.device))
            else:
                theirs.step()
            chosen = theirs.next_ids[:, 0].tolist()  # waits for the device
            held_bytes = B * (T + number) * kv_bytes_per_token
            yield Step(dict(enumerate(chosen)), B * T if number == 0 else B, held_bytes)
        theirs.finish()

    return steps


# ---- one trial -----------------------------------------------------------------------------------
@dataclass
class Trial:
    """One way from the prompts to the last token."""

    token_ids: list[list[int]]  # written, a list for each prompt
    seconds: float = 0.0
    first_ms: list[float] = field(default_factory=list)  # until a prompt's first token, one each
    step_ms: list[float] = field(default_factory=list)  # of all steps but the first
    computed: int = 0  # tokens, over all steps
    kv_bytes: int = 0  # most bytes held
    preempted: int = 0


@torch.inference_mode()
def time_trial(way: Way, prompts: list[list[int]], new_tokens: int) -> Trial:
    """Run all steps of a way, and read the clock after each."""
    trial = Trial([[] for _ in prompts])
    started = last = time.perf_counter()
    for number, step in enumerate(way(prompts, new_tokens)):
        now = time.perf_counter()
        for i, token_id in step.tokens.items():
            if not trial.token_ids[i]:
                trial.first_ms.append((now - started) * 1e3)
            trial.token_ids[i].append(token_id)
        if number > 0:
            trial.step_ms.append((now - last) * 1e3)
        trial.computed += step.computed
        trial.kv_bytes = max(trial.kv_bytes, step.kv_bytes)
        trial.preempted += step.preempted
        last = now
    trial.seconds = last - started
    assert {len(token_ids) for token_ids in trial.token_ids} == {new_tokens}
    return trial


def equal_start(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of all tokens, in percent, that come before their sequence's first difference."""
    num_equal = 0
    for a, b in zip(ours, theirs, strict=True):
        differences = (i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        num_equal += next(differences, len(a))
    return 100 * num_equal / sum(map(len, theirs))


def check_equal_work(name: str, trial: Trial, first: Trial, itemsize: int) -> float:
    """Percent of equal tokens. Raises ValueError for a way that wrote other tokens than the first.

    The ways sum in different orders, so two logits that nearly tie may order differently: rarely
    in float32, often in 16 bits. So 90% must be equal in 32 bits; in 16 bits (an `itemsize` of 2)
    40% of the first four tokens. A way that reads wrong memory is wrong from its second token on:
    that one is the first to need the cache.
    """
    ours, theirs = trial.token_ids, first.token_ids
    required = 90
    if itemsize == 2:
        ours, theirs = ([ids[:4] for ids in token_ids] for token_ids in (ours, theirs))
        required = 40
    share = equal_start(ours, theirs)
    if share < required:
        raise ValueError(f"{name} wrote {share:.0f}% as the first way did, {required}% are needed")
    return equal_start(trial.token_ids, first.token_ids)


# ---- what to run ---------------------------------------------------------------------------------
class Workload(NamedTuple):
    """What each way does in a trial; the last two matter to the paged one alone."""

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
        """Tokens computed if each step computes all of them: batch x (P + (P + 1) + ..)."""
        P, N = self.prompt_tokens, self.new_tokens
        return self.batch * (N * P + N * (N - 1) // 2)


def make_workload(batch: int, prompt: int, new: int, block_size: int, percent: int) -> Workload:
    """A workload whose pool has `percent` of the blocks that all sequences need, at least one's."""
    if min(batch, prompt, new, block_size, percent) < 1:
        sizes = f"{batch=}, {prompt=}, {new=}, {block_size=}, pool {percent}%"
        raise ValueError(f"{sizes}: each must be at least 1")
    blocks_each = -(-(prompt + new) // block_size)
    num_blocks = max(blocks_each, batch * blocks_each * percent // 100)
    return Workload(batch, prompt, new, block_size, num_blocks)


def plan(args: argparse.Namespace) -> dict[Workload, list[str]]:
    """Workload -> the ways that run it: the first values, then one value changed at a time."""
    lists = args.batches, args.prompt_tokens, args.new_tokens, args.block_sizes, args.pools
    firsts = [values[0] for values in lists]
    todo: dict[Workload, list[str]] = {}
    for position, values in enumerate(lists):
        for value in values:
            workload = make_workload(*firsts[:position], value, *firsts[position + 1 :])
            # Block size and pool change nothing but the engine: compare it with the slabs only.
            allowed = [*WAYS.values()] if position < 3 else [CONTIGUOUS, PAGED]
            if workload.rows_without_cache > args.no_cache_rows:
                allowed = [way for way in allowed if way != NO_CACHE]
            todo.setdefault(workload, [way for way in args.ways if way in allowed])
    if args.long_tokens:  # without a cache too: the comparison that a cache is for
        long = make_workload(1, args.prompt_tokens[0], args.long_tokens, args.block_sizes[0], 100)
        todo[long] = args.ways
    return todo


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, with a value for each flag that was not given."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    chosen = argparse.Namespace(**((FULL if args.full else DEFAULTS) | given))
    chosen.device = resolve_device(args.device)
    chosen.dtype = resolve_dtype(args.dtype, chosen.device)
    chosen.threads = threads_for(chosen.model, args.threads)
    installed = importlib.util.find_spec("transformers") is not None
    names = args.ways or [name for name in WAYS if name != "transformers" or installed]
    chosen.ways = [way for name, way in WAYS.items() if name in names]
    return chosen


def threads_for(model: str, threads: int | None) -> int:
    """The number of threads given, else 1 for the shipped model, else all.

    The shipped model is so small that a second thread waits longer than it works.
    """
    return threads or (1 if model == str(SHIPPED_MODEL) else torch.get_num_threads())


def model_columns(model: str) -> Columns:
    """The columns `model` and `weights`. The shipped model's folder is given without its path."""
    name = Path(model).name if model == str(SHIPPED_MODEL) else model
    return {"model": name, "weights": weights_kind(model)}


# ---- measuring -----------------------------------------------------------------------------------
def make_ways(
    model: GPT, theirs: Theirs | None, names: list[str], workload: Workload, backend: str
) -> dict[str, tuple[Way, str]]:
    """The named ways for one workload: name -> (way, backend)."""
    llm = LLM(
        model,
        backend=backend,
        enable_prefix_caching=False,  # each trial computes its prompts, as the other ways do
        block_size=workload.block_size,
        num_blocks=workload.num_blocks,
        max_num_seqs=workload.batch,
        # All prompts fit into one step, and so do all tokens of a preempted sequence.
        max_num_batched_tokens=workload.batch * (workload.prompt_tokens + workload.new_tokens),
    )
    ways: dict[str, tuple[Way, str]] = {}
    for name in names:
        if name == PAGED:
            ways[name] = paged_way(llm), llm.backend
        elif name == CONTIGUOUS:
            ways[name] = contiguous_way(model, workload.batch), "torch"
        elif name == NO_CACHE:
            ways[name] = static_way(model, cache=None), "torch"
        elif theirs is not None:
            token_bytes = model.config.kv_bytes_per_token(model.wte.weight.dtype)
            ways[name] = transformers_way(theirs, token_bytes), "torch"
    return ways


Trials = dict[str, list[Trial]]  # of each way, one a round


def time_rounds(
    ways: dict[str, tuple[Way, str]], workload: Workload, prompts: list[list[int]], repeats: int
) -> Trials:
    """Trials of all ways in turn. One round before them warms up."""
    trials: Trials = {name: [] for name in ways}
    # disable=None: a progress bar on a terminal only
    bar = {"desc": str(workload), "disable": None, "leave": False, "unit": "trial"}
    with tqdm(total=(repeats + 1) * len(ways), **bar) as progress:
        for number in range(repeats + 1):
            new_tokens = workload.new_tokens
            if number == 0:
                new_tokens = min(new_tokens, WARM_UP_TOKENS)
            for name, (way, _) in ways.items():
                trial = time_trial(way, prompts, new_tokens)
                progress.update()
                if number > 0:
                    trials[name].append(trial)
            if number >= 3 and max(ts[-1].seconds for ts in trials.values()) > LONG_S:
                break
    return trials


# ---- rows ----------------------------------------------------------------------------------------
def is_shown(row: Measurement) -> bool:
    """Whether a row is in the terminal's table: not one of a single trial, and a chosen figure."""
    return " trial=" not in row.workload and row.metric in SHOWN


def rows_of_way(trials: list[Trial], equal: float, columns: Columns) -> Iterator[Measurement]:
    """The figures of one way without the ratios: times, then work and memory."""

    def row(metric: str, unit: str, values: list) -> Measurement:
        return Measurement.of(values, metric=metric, unit=unit, **columns)

    written = [sum(map(len, trial.token_ids)) for trial in trials]
    yield row("generation time", "s", [trial.seconds for trial in trials])
    rates = [tokens / trial.seconds for tokens, trial in zip(written, trials, strict=True)]
    yield row("generated tokens", "tokens/s", rates)
    means_ms = [sum(trial.first_ms) / len(trial.first_ms) for trial in trials]
    yield row("time to first token", "ms", means_ms)
    for percent in (50, 90, 99) if trials[0].step_ms else ():
        latencies = [percentile(trial.step_ms, percent) for trial in trials]
        yield row(f"step latency p{percent}", "ms", latencies)
    yield row("tokens written", "tokens", written)
    yield row("tokens computed", "tokens", [trial.computed for trial in trials])
    yield row("tokens equal to the first road's", "%", [equal])
    yield row("KV memory at most", "bytes", [trial.kv_bytes for trial in trials])
    if columns["contender"] == PAGED:
        yield row("preempted", "sequences", [trial.preempted for trial in trials])


def ratios(trials: Trials, name: str, columns: Columns) -> Iterator[Measurement]:
    """How many times as fast a way is as the contiguous one, and as the one without a cache."""
    seconds = {way: [trial.seconds for trial in ts] for way, ts in trials.items()}
    for other in (CONTIGUOUS, NO_CACHE):
        if other in trials and other != name:
            against = {"metric": f"speed against {other}", "unit": "x"}
            yield Measurement.ratio_of(seconds[other], seconds[name], **against, **columns)


def rows_of_workload(
    trials: Trials, workload: Workload, backends: dict[str, str], common: Columns
) -> Iterator[Measurement]:
    """The figures of all ways over all trials. Raises ValueError for one with other tokens."""
    first = next(iter(trials.values()))[0]
    itemsize = DTYPES[common["dtype"]].itemsize
    for name, ts in trials.items():
        equal = min(check_equal_work(name, trial, first, itemsize) for trial in ts)
        columns = {"contender": name, "workload": str(workload), "backend": backends[name]}
        yield from rows_of_way(ts, equal, common | columns)
        yield from ratios(trials, name, common | columns)


def rows_of_trials(
    trials: Trials, workload: Workload, backends: dict[str, str], common: Columns
) -> Iterator[Measurement]:
    """Time and ratios of each single trial."""
    for number in range(min(map(len, trials.values()))):
        one_round = {name: [ts[number]] for name, ts in trials.items()}
        common = common | {"workload": f"{workload} trial={number + 1}"}
        for name, (trial,) in one_round.items():
            columns = common | {"contender": name, "backend": backends[name]}
            yield Measurement.of([trial.seconds], metric="generation time", unit="s", **columns)
            yield from ratios(one_round, name, columns)


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    args = complete(args)
    if THEIRS in args.ways:
        transformers_engines.require_transformers()
    todo = plan(args)
    threads_before = torch.get_num_threads()
    model = load_model(args.model, args.dtype, args.device)
    limit = model.config.max_seq_len
    for workload in todo:
        if workload.prompt_tokens + workload.new_tokens > limit:
            raise ValueError(f"{workload}: the model has {limit} positions, take fewer tokens")
    theirs = None
    if THEIRS in args.ways:
        theirs = Theirs(transformers_engines.as_transformers(model))
    common = {"experiment": "speed", "dtype": str(args.dtype)[6:], "threads": args.threads}
    common |= {"device": device_name(args.device), "seed": args.seed} | model_columns(args.model)
    torch.set_num_threads(args.threads)  # the compiled kernels take as many as PyTorch
    try:
        for number, (workload, names) in enumerate(todo.items()):
            served = pack(load_model(args.model, args.dtype, args.device))
            ways = make_ways(served, theirs, names, workload, args.backend)
            generator = torch.Generator().manual_seed(args.seed)
            shape = workload.batch, workload.prompt_tokens
            prompts = torch.randint(model.config.vocab_size, shape, generator=generator).tolist()
            trials = time_rounds(ways, workload, prompts, args.repeats)
            backends = {name: backend for name, (_, backend) in ways.items()}
            yield from rows_of_workload(trials, workload, backends, common)
            if number == 0:
                yield from rows_of_trials(trials, workload, backends, common)
    finally:
        torch.set_num_threads(threads_before)
