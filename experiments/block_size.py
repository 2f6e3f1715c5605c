"""How large a block should be: a small one wastes little memory, a large one needs a short table.

A sequence of 300 tokens fills 98% of its blocks of 16, but only 59% of its two blocks of 256. One
of 40 tokens fills 83% and 16%. Blocks that are held and not full are missing for other sequences,
which are preempted sooner. On the other side, a block of 1 token needs a table with 16 times as
many entries as a block of 16, and the table must be kept and read.

    speed    the engine decodes, one engine a block size, in turn; the pools have room for all
    memory   the same KV bytes for each block size, a seventh of all that the requests need: how
             full the held blocks are, how many requests run at once, how many are preempted
    copies   each prompt forks into 4 texts that share its blocks. Its last block is copied for all
             but one of them if it is not full, and a larger block is a larger copy

Memory and copies come from the real scheduler and allocator without a model: counts that are the
same in every run. Lengths are exponential draws with the means of the paper's two data sets, cut
off at max_seq_len: "ShareGPT" 161 tokens in and 338 out, "Alpaca" 19 in and 58 out. The real ones
are not exponential, so compare the shapes of the curves, not percentages.

The paper (section 7.2, figure 18) found ShareGPT served best with blocks of 16 to 128 tokens and
Alpaca with 16 and 32. Larger blocks "significantly degrade", because sequences become shorter than
a block. vLLM's default is 16. On a GPU small blocks have a second cost: 1 or 2 tokens are too
little for a kernel to read at once.

Kwon et al. 2023, "PagedAttention", SOSP, arXiv:2309.06180, sections 7.2 and 6.1 (figure 11).
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch

from block_allocator import BlockAllocator
from checkpoints.load import load_model
from experiments import speed
from experiments.ceilings import Columns
from experiments.results import Measurement, device_name
from experiments.speed import model_columns, threads_for
from kernels.backends import BACKENDS, DTYPES, resolve_device, resolve_dtype
from kernels.packed_linear import pack
from llm import LLM, SHIPPED_MODEL
from model import GPT, GPTConfig
from scheduler import Scheduler
from sequence import Continuation, Request, Sequence

MEANS = {"ShareGPT": (161.3, 338.0), "Alpaca": (19.3, 58.5)}  # tokens in and out, on average
FORKS = 4  # texts of one prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add = parser.add_argument
    sizes = [16, 1, 2, 4, 8, 32, 64, 128, 256]
    add("--block-sizes", type=int, nargs="+", default=sizes, help="the first is compared with")
    add("--model", default=str(SHIPPED_MODEL), help="speed: a folder, or random:gpt2")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="of weights, K and V")
    add("--backend", default="auto", choices=["auto", *BACKENDS], help="speed: the kernel")
    add("--threads", type=int, help="of the CPU; default: all, for the shipped model 1")
    add("--batch", type=int, default=8, help="speed: sequences; 0: skip")
    add("--prompt-tokens", type=int, default=256, help="speed: of each prompt, at random")
    add("--new-tokens", type=int, default=32, help="speed: that each sequence gets")
    add("--rounds", type=int, default=5, help="speed: rounds, each times every block size")
    add("--requests", type=int, default=256, help="memory, copies: of either data set; 0: skip")
    add("--pool-percent", type=int, default=15, help="memory: pool, of all requests' tokens")
    add("--max-seq-len", type=int, default=1024, help="memory, copies: longest sequence")
    add("--seed", type=int, default=0, help="of prompts and lengths")


# ---- speed ---------------------------------------------------------------------------------------
def time_decode(model: GPT, args: argparse.Namespace) -> tuple[dict[int, list[speed.Trial]], str]:
    """Trials of each block size, block_size -> one a round, all checked, and the backend."""
    ways = {}
    for block_size in args.block_sizes:
        llm = LLM(
            model,
            backend=args.backend,
            enable_prefix_caching=False,  # its share of found tokens depends on block_size
            block_size=block_size,
            num_blocks=args.batch * -(-(args.prompt_tokens + args.new_tokens) // block_size),
            max_num_seqs=args.batch,
            max_num_batched_tokens=args.batch * args.prompt_tokens,
        )
        ways[block_size] = speed.paged_way(llm)
    generator = torch.Generator().manual_seed(args.seed)
    shape = args.batch, args.prompt_tokens
    prompts = torch.randint(model.config.vocab_size, shape, generator=generator).tolist()
    trials: dict[int, list[speed.Trial]] = {block_size: [] for block_size in ways}
    for number in range(args.rounds + 1):
        for block_size, way in ways.items():
            trial = speed.time_trial(way, prompts, args.new_tokens)
            if number > 0:  # the first round warms up
                trials[block_size].append(trial)
    first = trials[args.block_sizes[0]][0]
    for block_size, ts in trials.items():
        for trial in ts:
            itemsize = model.wte.weight.itemsize
            speed.check_equal_work(f"block_size={block_size}", trial, first, itemsize)
    return trials, llm.backend


def rows_of_speed(args: argparse.Namespace, common: Columns) -> Iterator[Measurement]:
    """Rows of decode steps at each block size, and of each size against the first."""
    device = resolve_device(args.device)
    model = pack(load_model(args.model, resolve_dtype(args.dtype, device), device))
    limit = model.config.max_seq_len
    if args.prompt_tokens + args.new_tokens > limit:
        sizes = f"{args.prompt_tokens} prompt tokens and {args.new_tokens} new ones"
        raise ValueError(f"{sizes}: the model has {limit} positions, take fewer tokens")
    trials, backend = time_decode(model, args)
    columns = common | {"dtype": str(model.wte.weight.dtype)[6:], "backend": backend}
    columns |= {"device": device_name(device), "threads": torch.get_num_threads()}
    columns |= model_columns(args.model)
    sizes = f"batch={args.batch} prompt={args.prompt_tokens} new={args.new_tokens}"
    columns |= {"workload": f"speed {sizes}"}
    steps_ms = {size: [median(trial.step_ms) for trial in ts] for size, ts in trials.items()}
    base = args.block_sizes[0]
    for size, times_ms in steps_ms.items():
        row = columns | {"contender": f"block_size={size}"}
        yield Measurement.of(times_ms, metric="time a step", unit="ms", **row)
        rates = [args.batch * 1e3 / time_ms for time_ms in times_ms]
        yield Measurement.of(rates, metric="generated tokens", unit="tokens/s", **row)
        held = [trial.kv_bytes for trial in trials[size]]
        yield Measurement.of(held, metric="KV memory at most", unit="bytes", **row)
        if size != base:
            against = {"metric": f"speed against block_size={base}", "unit": "x"}
            yield Measurement.ratio_of(steps_ms[base], times_ms, **against, **row)


# ---- memory and copies ---------------------------------------------------------------------------
@dataclass
class Tally:
    """The counts of a whole run of the scheduler."""

    steps: int = 0
    scheduled: int = 0  # sequences, over all steps
    tokens: int = 0  # in the cache, over all steps
    held: int = 0  # tokens for which the held blocks have room, over all steps
    copied: int = 0  # blocks
    preempted: int = 0  # sequences
    recomputed: int = 0  # tokens


def draw_lengths(name: str, args: argparse.Namespace) -> list[tuple[int, int]]:
    """(prompt tokens, new tokens) of each request: exponential, within `max_seq_len` together."""
    rng = random.Random(f"{args.seed} {name}")
    longest = args.max_seq_len // 2  # prompt or output: their sum fits into max_seq_len
    prompt_mean, new_mean = MEANS[name]

    def draw(mean: float) -> int:
        return min(max(round(rng.expovariate(1 / mean)), 1), longest)

    return [(draw(prompt_mean), draw(new_mean)) for _ in range(args.requests)]


def play(scheduler: Scheduler, lengths: list[tuple[int, int]], forks: int = 1) -> Tally:
    """Serve all (prompt, new) lengths without a model; each request becomes `forks` texts."""
    for number, (prompt, new) in enumerate(lengths):
        request = Request(str(number), [0] * prompt, arrival=number)
        request.sequences.append(Sequence(request, 0, [0] * prompt, prompt, new))
        scheduler.add(request)
    tally, allocator = Tally(), scheduler.allocator
    while scheduler.has_unfinished():
        plan = scheduler.schedule()
        tally.steps += 1
        tally.scheduled += len(plan.scheduled)
        tally.tokens += sum(seq.num_computed_tokens for seq in scheduler.running)
        tally.held += (allocator.num_blocks - allocator.num_free) * allocator.block_size
        tally.copied += len(plan.copies)
        continuations = []
        for seq in plan.sampled:
            children = forks if seq.num_generated == 0 else 1  # they fork after the prompt
            continuations += [Continuation(seq, [token_id]) for token_id in range(children)]
        scheduler.update(plan, continuations)
    tally.preempted = scheduler.num_preemptions
    tally.recomputed = scheduler.num_recomputed_tokens
    assert allocator.num_free == allocator.num_blocks, "a block leaked"
    return tally


def make_scheduler(block_size: int, num_blocks: int, max_seq_len: int) -> Scheduler:
    """A scheduler with vLLM's limits: 256 sequences and 2,048 tokens in a step."""
    return Scheduler(BlockAllocator(num_blocks, block_size), 256, 2048, max_seq_len)


def rows_of_memory(args: argparse.Namespace, common: Columns) -> Iterator[Measurement]:
    """Both data sets through pools of the same bytes, once for each block size."""
    for name in MEANS:
        lengths = draw_lengths(name, args)
        wanted = sum(prompt + new - 1 for prompt, new in lengths)  # the last token is not computed
        # The longest sequence must fit at every block size.
        minimum = args.max_seq_len + max(args.block_sizes)
        pool_tokens = max(wanted * args.pool_percent // 100, minimum)
        sizes = f"memory {name} requests={args.requests} pool_tokens={pool_tokens}"
        for size in args.block_sizes:
            scheduler = make_scheduler(size, pool_tokens // size, args.max_seq_len)
            tally = play(scheduler, lengths)
            columns = common | {"contender": f"block_size={size}", "workload": sizes}
            yield one("share of held memory filled", 100 * tally.tokens / tally.held, "%", columns)
            yield one(
                "sequences at once", tally.scheduled / tally.steps, "sequences a step", columns
            )
            yield one("steps", tally.steps, "steps", columns)
            yield one("preempted", tally.preempted, "preempted", columns)
            yield one("tokens computed again", tally.recomputed, "tokens computed again", columns)
            again = 100 * tally.recomputed / wanted
            yield one("share of all tokens computed again", again, "%", columns)


def rows_of_copies(args: argparse.Namespace, common: Columns) -> Iterator[Measurement]:
    """Both data sets, four texts for each prompt, in pools with room for all."""
    token_bytes = GPTConfig().kv_bytes_per_token(torch.bfloat16)  # GPT-2 124M's
    for name in MEANS:
        lengths = draw_lengths(name, args)
        sizes = f"copies {name} requests={args.requests} texts={FORKS}"
        for size in args.block_sizes:
            num_blocks = sum(FORKS * -(-(prompt + new) // size) for prompt, new in lengths)
            tally = play(make_scheduler(size, num_blocks, args.max_seq_len), lengths, FORKS)
            assert not tally.preempted
            columns = common | {"contender": f"block_size={size}", "workload": sizes}
            yield one("blocks copied", tally.copied, "blocks copied", columns)
            num_bytes = tally.copied * size * token_bytes
            yield one("bytes copied, GPT-2 124M in 16 bits", num_bytes, "bytes copied", columns)


def one(metric: str, value: float, unit: str, columns: Columns) -> Measurement:
    """The row of a count, which is the same in every run."""
    return Measurement.of([value], metric=metric, unit=unit, **columns)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for sizes that no run can have."""
    if min(args.block_sizes) < 1:
        raise ValueError(f"block_size is {min(args.block_sizes)}: it must be at least 1")
    if args.max_seq_len < 2:
        raise ValueError(f"max_seq_len is {args.max_seq_len}: it must be at least 2")
    if args.batch and args.new_tokens < 2:
        raise ValueError(f"new_tokens is {args.new_tokens}: the first one is no decode, take 2")


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    check(args)
    threads_before = torch.get_num_threads()
    common = {"experiment": "block_size", "seed": args.seed}
    counted = common | {"backend": "none", "dtype": "none", "threads": 1, "device": device_name()}
    torch.set_num_threads(threads_for(args.model, args.threads))
    try:
        if args.batch:
            yield from rows_of_speed(args, common)
    finally:
        torch.set_num_threads(threads_before)
    if args.requests:
        yield from rows_of_memory(args, counted)
        yield from rows_of_copies(args, counted)
