"""How large a block should be: small ones waste nothing and cost bookkeeping, large ones reversed.

A sequence of 300 tokens fills 98% of its blocks of 16, but only 59% of its two blocks of 256; one
of 40 tokens fills 83% and 16%. What is held and not filled is missing for somebody else, who is
preempted sooner. On the other side a table with 16 times as many entries has to be kept and read.

    speed    the engine decodes, one engine a block size, in turn; pools with room for all
    memory   the same KV bytes for each block size, a seventh of what all requests come to: how full
             the held blocks are, how many run at once, how many are preempted and start again
    copies   each prompt forks into 4 texts, which share its blocks: the tail that is not full is
             copied for all but one of them, and a larger block is a larger tail

Memory and copies are the real scheduler and allocator with a stub for the model: counts, the same
every time. Lengths are exponential draws with the means of the two data sets of the paper, cut off
at max_seq_len: "ShareGPT" 161 tokens in and 338 out, "Alpaca" 19 in and 58 out. The real ones are
no exponentials, so compare the shape of the curves, not a percent.

What the paper found (section 7.2, figure 18): ShareGPT is served best with blocks of 16 to 128
tokens, Alpaca with 16 and 32; larger ones "significantly degrade", as sequences become shorter than
a block; vLLM's default is 16. On a GPU the lower end has a second reason: a block of 1 or 2 tokens
leaves a kernel too little to read at once.

Kwon et al. 2023, "PagedAttention", SOSP, arXiv:2309.06180, sections 7.2 and 6.1 (figure 11).
Run: python -m experiments.block_size
     python -m experiments.block_size --model random:gpt2 --block-sizes 1 16 256
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from block_allocator import BlockAllocator
from checkpoints.load import load_model, weights_kind
from experiments import roads
from experiments.results import Measurement, device_name, run_alone
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
def time_decode(model: GPT, args: argparse.Namespace) -> tuple[dict, str]:
    """Trials of each block size, {block_size: [Trial, ..]}, all checked, and the backend."""
    found = {}
    for block_size in args.block_sizes:
        llm = LLM(
            model,
            backend=args.backend,
            block_size=block_size,
            num_blocks=args.batch * -(-(args.prompt_tokens + args.new_tokens) // block_size),
            max_num_seqs=args.batch,
            max_num_batched_tokens=args.batch * args.prompt_tokens,
        )
        found[block_size] = roads.paged_road(llm)
    generator = torch.Generator().manual_seed(args.seed)
    shape = args.batch, args.prompt_tokens
    prompts = torch.randint(model.config.vocab_size, shape, generator=generator).tolist()
    trials: dict[int, list[roads.Trial]] = {block_size: [] for block_size in found}
    for number in range(args.rounds + 1):
        for block_size, road in found.items():
            trial = roads.time_trial(road, prompts, args.new_tokens)
            if number:  # the first round warms up
                trials[block_size].append(trial)
    first = trials[args.block_sizes[0]][0]
    for block_size, ts in trials.items():
        for trial in ts:
            in_16_bits = model.wte.weight.itemsize == 2
            roads.check_equal_work(f"block_size={block_size}", trial, first, in_16_bits)
    return trials, llm.backend


def rows_of_speed(args: argparse.Namespace, common: dict) -> Iterator[Measurement]:
    """Decode steps at each block size, and each against the first."""
    device = resolve_device(args.device)
    model = pack(load_model(args.model, resolve_dtype(args.dtype, device), device), args.batch)
    if args.prompt_tokens + args.new_tokens > (most := model.config.max_seq_len):
        sizes = f"{args.prompt_tokens} prompt tokens and {args.new_tokens} new ones"
        raise ValueError(f"{sizes}: the model has {most} positions, take fewer tokens")
    trials, backend = time_decode(model, args)
    is_shipped = args.model == str(SHIPPED_MODEL)
    what = common | {"dtype": str(model.wte.weight.dtype)[6:], "backend": backend}
    what |= {"device": device_name(device), "weights": weights_kind(args.model)}
    what |= {"model": Path(args.model).name if is_shipped else args.model}
    what |= {"threads": torch.get_num_threads()}
    sizes = f"batch={args.batch} prompt={args.prompt_tokens} new={args.new_tokens}"
    what |= {"workload": f"speed {sizes}"}
    steps_ms = {size: [median(trial.step_ms) for trial in ts] for size, ts in trials.items()}
    base = args.block_sizes[0]
    for size, times_ms in steps_ms.items():
        row = what | {"contender": f"block_size={size}"}
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
    """What a whole run of the scheduler came to."""

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
    longest = args.max_seq_len // 2  # of either; their sum fits, whatever is drawn
    means = MEANS[name]
    draw = [[rng.expovariate(1 / mean) for mean in means] for _ in range(args.requests)]
    return [tuple(min(max(round(tokens), 1), longest) for tokens in both) for both in draw]


def play(scheduler: Scheduler, lengths: list[tuple[int, int]], forks: int = 1) -> Tally:
    """Serve all requests with a stub for the model; each becomes `forks` texts."""
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
        futures = []
        for seq in plan.sampled:
            children = forks if seq.num_generated == 0 else 1  # behind the prompt they part
            futures += [Continuation(seq, [token_id]) for token_id in range(children)]
        scheduler.update(plan, futures)
    tally.preempted = scheduler.num_preemptions
    tally.recomputed = scheduler.num_recomputed_tokens
    assert allocator.num_free == allocator.num_blocks, "a block leaked"
    return tally


def make_scheduler(block_size: int, num_blocks: int, max_seq_len: int) -> Scheduler:
    """One with vLLM's limits: 256 sequences and 2,048 tokens in a step."""
    return Scheduler(BlockAllocator(num_blocks, block_size), 256, 2048, max_seq_len)


def rows_of_memory(args: argparse.Namespace, common: dict) -> Iterator[Measurement]:
    """Both data sets through pools of the same bytes, once for each block size."""
    for name in MEANS:
        lengths = draw_lengths(name, args)
        wanted = sum(prompt + new - 1 for prompt, new in lengths)  # the last token is not computed
        # At least so much that the longest sequence fits, at every block size.
        least = args.max_seq_len + max(args.block_sizes)
        pool_tokens = max(wanted * args.pool_percent // 100, least)
        sizes = f"memory {name} requests={args.requests} pool_tokens={pool_tokens}"
        for size in args.block_sizes:
            scheduler = make_scheduler(size, pool_tokens // size, args.max_seq_len)
            tally = play(scheduler, lengths)
            what = common | {"contender": f"block_size={size}", "workload": sizes}
            yield one("share of held memory filled", 100 * tally.tokens / tally.held, "%", what)
            yield one("sequences at once", tally.scheduled / tally.steps, "sequences a step", what)
            yield one("steps", tally.steps, "steps", what)
            yield one("preempted", tally.preempted, "preempted", what)
            yield one("tokens computed again", tally.recomputed, "tokens computed again", what)
            again = 100 * tally.recomputed / wanted
            yield one("share of all tokens computed again", again, "%", what)


def rows_of_copies(args: argparse.Namespace, common: dict) -> Iterator[Measurement]:
    """Both data sets, each prompt for four texts, in pools with room for everybody."""
    token_bytes = GPTConfig().kv_bytes_per_token(torch.bfloat16)  # GPT-2 124M's
    for name in MEANS:
        lengths = draw_lengths(name, args)
        sizes = f"copies {name} requests={args.requests} texts={FORKS}"
        for size in args.block_sizes:
            num_blocks = sum(FORKS * -(-(prompt + new) // size) for prompt, new in lengths)
            tally = play(make_scheduler(size, num_blocks, args.max_seq_len), lengths, FORKS)
            assert not tally.preempted
            what = common | {"contender": f"block_size={size}", "workload": sizes}
            yield one("blocks copied", tally.copied, "blocks copied", what)
            num_bytes = tally.copied * size * token_bytes
            yield one("bytes copied, GPT-2 124M in 16 bits", num_bytes, "bytes copied", what)


def one(metric: str, value: float, unit: str, what: dict) -> Measurement:
    """A row of a count: it comes out the same every time."""
    return Measurement.of([value], metric=metric, unit=unit, **what)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for sizes of which no run can be made."""
    if min(args.block_sizes) < 1:
        raise ValueError(f"block_size is {min(args.block_sizes)}: it must be at least 1")
    if args.max_seq_len < 2:
        raise ValueError(f"max_seq_len is {args.max_seq_len}: it must be at least 2")
    if args.batch and args.new_tokens < 2:
        raise ValueError(f"new_tokens is {args.new_tokens}: the first one is no decode, take 2")


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    check(args)
    before = torch.get_num_threads()
    is_shipped = args.model == str(SHIPPED_MODEL)
    common = {"experiment": "block_size", "seed": args.seed}
    counted = common | {"backend": "none", "dtype": "none", "threads": 1, "device": device_name()}
    # So small a model as the shipped one runs fastest on one thread.
    torch.set_num_threads(args.threads or (1 if is_shipped else before))
    try:
        if args.batch:
            yield from rows_of_speed(args, common)
    finally:
        torch.set_num_threads(before)
    if args.requests:
        yield from rows_of_memory(args, counted)
        yield from rows_of_copies(args, counted)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    run_alone(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    main()
