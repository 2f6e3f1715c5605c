"""KV memory step by step: the bytes that sequences hold, and how many sequences fit at once.

A contiguous cache reserves memory before the first token. Paging takes a block when the last one is
full. In GPT-2 124M's shape and 16 bits:

    a token     36,864 bytes   12 layers x 2 x 768 x 2 bytes
    a block    589,824 bytes   16 tokens: all that a sequence of 1 to 16 tokens holds
    a slab  18,874,368 bytes   512 tokens, reserved for the sequence's whole life

The default sequences have prompts of 8 tokens and write 100. A sequence holds 18.87 MB against 0.59
MB at the start. 32 of them hold 603.98 MB against 75.50 MB at step 50 (57 tokens, 4 blocks each;
prompts of 1 to 15 tokens give the same). A pool of 512 blocks holds 16 sequences against 512 at the
start and 128 at step 50. Projects of this kind argue with these figures. But paging gains nothing
once a sequence has reached the reserved length, and an exact reservation of 108 tokens halves its
advantage.

Bytes of a token and of a block are arithmetic. Blocks held are counted in the real scheduler, with
a stub that gives each sequence a token a step: with `BlockAllocator` as in the engine, and with
`BuddyAllocator` (adjacent blocks, a power of two of them) under the three reservations of
reservations.py. How many fit is found by filling the same allocators until they refuse. The reuse
of blocks is measured in the engine, with the shipped model: of two batches in a pool twice as large
as needed, the second gets the blocks of the first.

Step s computes the prompt and s - 1 tokens after it. A GB is 10**9 bytes.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from block_allocator import BlockAllocator, NoFreeBlocks
from checkpoints.load import RANDOM_SHAPES
from experiments.ceilings import Columns
from experiments.reservations import (
    BuddyAllocator,
    power_of_two,
    reserve_maximum,
    reserve_oracle,
    reserve_power_of_two,
)
from experiments.results import Measurement, device_name
from kernels.backends import DTYPES
from llm import LLM, SamplingParams
from model import GPTConfig
from scheduler import Scheduler, reserve_now
from sequence import Continuation, Request, Sequence

MAXIMUM, PAGED = "reserve the maximum", "paged"


class Plan(NamedTuple):
    """One way to plan memory."""

    allocator: type[BlockAllocator]
    reserve: Callable[[int], Callable[[Sequence], int]]  # max_seq_len -> the scheduler's function
    held: Callable[[BlockAllocator], int]  # blocks that no other sequence can get


PLANS = {
    MAXIMUM: Plan(BuddyAllocator, reserve_maximum, lambda a: a.num_reserved),
    "reserve a power of two": Plan(BuddyAllocator, reserve_power_of_two, lambda a: a.num_reserved),
    "reserve the exact length": Plan(BuddyAllocator, reserve_oracle, lambda a: a.num_reserved),
    PAGED: Plan(BlockAllocator, lambda _: reserve_now, lambda a: a.num_blocks - a.num_free),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add = parser.add_argument
    add("--shape", default="gpt2", choices=[*RANDOM_SHAPES], help="whose K and V")
    add("--dtype", default="bfloat16", choices=[*DTYPES], help="of K and V")
    add("--block-size", type=int, default=16, help="tokens in a block")
    add("--max-seq-len", type=int, default=512, help="tokens that the maximum is")
    add("--batch", type=int, default=32, help="sequences that run together")
    add("--prompt-tokens", type=int, default=8, help="of each sequence")
    add("--new-tokens", type=int, default=100, help="that each sequence writes")
    steps = [1, 9, 10, 25, 26, 41, 42, 50, 57, 58, 75, 100]  # 9 is the last with one block, 17 > 16
    add("--steps", type=int, nargs="+", default=steps, help="at which memory is looked at")
    add("--pool", type=int, default=512, help="blocks of the pool that is filled with sequences")
    steps = [1, 9, 10, 25, 26, 42, 50, 58, 89, 121, 185, 249, 377, 505]
    add("--pool-steps", type=int, nargs="+", default=steps, help="at which it is filled")
    add("--reuse-batch", type=int, default=4, help="sequences of the two batches; 0: skip")


def make_sequence(
    number: int, args: argparse.Namespace, num_tokens: int, max_tokens: int
) -> Sequence:
    """A sequence that has `num_tokens` tokens and writes `max_tokens` in all."""
    request = Request(str(number), [0] * args.prompt_tokens, arrival=number)
    seq = Sequence(request, 0, [0] * num_tokens, args.prompt_tokens, max_tokens)
    request.sequences.append(seq)
    return seq


# ---- what sequences hold, step by step -----------------------------------------------------------
def held_each_step(plan: Plan, args: argparse.Namespace) -> list[int]:
    """Blocks held while step 1, 2, .. runs: the real scheduler without a model."""
    longest = power_of_two(-(-args.max_seq_len // args.block_size))
    allocator = plan.allocator(args.batch * longest, args.block_size)  # room for all
    scheduler = Scheduler(
        allocator,
        max_num_seqs=args.batch,
        max_num_batched_tokens=args.batch * args.max_seq_len,
        max_seq_len=args.max_seq_len,
        reserve=plan.reserve(args.max_seq_len),
    )
    for number in range(args.batch):
        seq = make_sequence(number, args, args.prompt_tokens, args.new_tokens)
        scheduler.add(seq.request)
    held = []
    while scheduler.has_unfinished():
        step = scheduler.schedule()
        assert len(step.scheduled) == args.batch, "a sequence waits, so the steps differ"
        held.append(plan.held(allocator))
        scheduler.update(step, [Continuation(seq, [0]) for seq in step.sampled])
    assert plan.held(allocator) == 0, "a block leaked"
    return held


def rows_of_steps(
    args: argparse.Namespace, token_bytes: int, common: Columns
) -> Iterator[Measurement]:
    """Memory of a batch at each of the steps, with each plan."""
    block_bytes = token_bytes * args.block_size
    held = {name: held_each_step(plan, args) for name, plan in PLANS.items()}
    sizes = f"batch={args.batch} prompt={args.prompt_tokens} new={args.new_tokens}"
    sizes += f" max_seq_len={args.max_seq_len} block_size={args.block_size}"
    for step in args.steps:
        tokens = args.batch * (args.prompt_tokens + step - 1)
        for name, blocks in held.items():
            num_bytes = blocks[step - 1] * block_bytes
            each = num_bytes / args.batch
            columns = common | {"contender": name, "workload": f"{sizes} step={step}"}
            yield one("KV memory", num_bytes, "bytes", columns)
            yield one("KV memory a sequence", each, "bytes a sequence", columns)
            yield one("sequences in a GB", 1e9 / each, "sequences a GB", columns)
            yield one(
                "share filled with tokens", 100 * tokens * token_bytes / num_bytes, "%", columns
            )


# ---- how many fit at once ------------------------------------------------------------------------
def fill(plan: Plan, args: argparse.Namespace, step: int) -> int:
    """How many sequences at this step fit into a pool until its allocator refuses."""
    allocator = plan.allocator(args.pool, args.block_size)
    reserve = plan.reserve(args.max_seq_len)
    longest = args.max_seq_len - args.prompt_tokens
    seq = make_sequence(0, args, args.prompt_tokens + step - 1, longest)
    needed = allocator.blocks_needed(reserve(seq))
    tables = []
    try:
        while True:
            tables.append(allocator.allocate(needed))
    except NoFreeBlocks:
        allocator.check_integrity(tables)
        return len(tables)


def rows_of_pool(args: argparse.Namespace, common: Columns) -> Iterator[Measurement]:
    """Sequences in a pool of one size at each step: with the maximum reserved, and paged."""
    sizes = f"num_blocks={args.pool} block_size={args.block_size} max_seq_len={args.max_seq_len}"
    for step in args.pool_steps:
        workload = f"{sizes} prompt={args.prompt_tokens} step={step}"
        counts = {name: fill(PLANS[name], args, step) for name in (MAXIMUM, PAGED)}
        for name, count in counts.items():
            columns = common | {"contender": name, "workload": workload}
            yield one("sequences at once", count, "sequences", columns)
        times = counts[PAGED] / counts[MAXIMUM]
        yield one(f"sequences against {MAXIMUM}", times, "x", columns)


# ---- the same blocks again -----------------------------------------------------------------------
def blocks_of_a_batch(llm: LLM, batch: int, first_token: int) -> set[int]:
    """Run the engine to the end. Returns the ids of all blocks held between its steps."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    for number in range(batch):
        llm.engine.add_request([first_token + number] * 20, params)
    block_ids: set[int] = set()
    while llm.engine.has_unfinished():
        llm.engine.step()
        for seq in llm.engine.scheduler.running:
            block_ids.update(seq.block_table)
    return block_ids


def rows_of_reuse(args: argparse.Namespace, common: Columns) -> Iterator[Measurement]:
    """Two batches one after the other in one pool: which blocks each of them gets."""
    batch, per_sequence = args.reuse_batch, -(-44 // args.block_size)  # 20 tokens and 24 more
    llm = LLM(
        num_blocks=2 * batch * per_sequence,
        block_size=args.block_size,
        enable_prefix_caching=False,  # which would keep the first batch's blocks for its prompts
        device="cpu",
    )
    first, second = (blocks_of_a_batch(llm, batch, token) for token in (40, 90))
    pool = llm.engine.cache.pool
    workload = f"two batches batch={batch} prompt=20 new=24 block_size={args.block_size}"
    workload += f" num_blocks={llm.config.num_blocks}"
    columns = common | {"contender": "paged engine", "workload": workload, "backend": llm.backend}
    columns |= {"dtype": str(pool.dtype)[6:], "model": "tiny-gpt2", "weights": llm.weights}
    columns |= {"threads": torch.get_num_threads()}
    yield one("blocks of the first batch", len(first), "blocks", columns)
    yield one("blocks of the second batch", len(second), "blocks", columns)
    share = 100 * len(first & second) / len(second)
    yield one("share of the second's blocks that the first one had", share, "%", columns)
    added = len(second - first) * pool[:, 0].nbytes
    yield one("KV memory that the second batch adds", added, "bytes", columns)


# ---- rows ----------------------------------------------------------------------------------------
def one(metric: str, value: float, unit: str, columns: Columns) -> Measurement:
    """The row of a count, which is the same in every run."""
    return Measurement.of([value], metric=metric, unit=unit, **columns)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for sizes that no run can have."""
    sizes = "block_size", "max_seq_len", "batch", "prompt_tokens", "new_tokens", "pool"
    for name in sizes:
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}: it must be at least 1")
    longest = args.prompt_tokens + args.new_tokens
    if longest > args.max_seq_len:
        raise ValueError(f"{longest} tokens, max_seq_len is {args.max_seq_len}: write fewer")
    last = args.max_seq_len - args.prompt_tokens + 1
    for flag, steps, limit in (
        ("--steps", args.steps, args.new_tokens),
        ("--pool-steps", args.pool_steps, last),
    ):
        if not 1 <= min(steps) <= max(steps) <= limit:
            raise ValueError(f"{flag} from {min(steps)} to {max(steps)}: there are 1 to {limit}")
    if args.pool * args.block_size < args.max_seq_len:
        pool = f"a pool of {args.pool} blocks of {args.block_size}"
        raise ValueError(f"{pool} cannot hold max_seq_len = {args.max_seq_len}: enlarge it")


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    check(args)
    n_layer, n_head, n_embd = RANDOM_SHAPES[args.shape]
    config = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    token_bytes = config.kv_bytes_per_token(DTYPES[args.dtype])
    common = {"experiment": "memory", "backend": "none", "dtype": args.dtype, "threads": 1}
    common |= {"device": device_name(), "model": args.shape}
    columns = common | {"contender": "K and V", "workload": f"block_size={args.block_size}"}
    yield one("KV memory a token", token_bytes, "bytes a token", columns)
    yield one("KV memory a block", token_bytes * args.block_size, "bytes a block", columns)
    yield from rows_of_steps(args, token_bytes, common)
    yield from rows_of_pool(args, common)
    if args.reuse_batch:
        yield from rows_of_reuse(args, common)
