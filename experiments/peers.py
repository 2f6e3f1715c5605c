"""The engine against transformers' DynamicCache: same weights, same prompts, same process, in turn.

Two workloads, both greedy and of a fixed length, so that the work is equal:

    decode   64 tokens are written behind B prompts of 256: the median of those steps; K and V of
             the prompts are computed by our engine, and theirs begins with a copy of them
    prefill  8 prompts of 256 tokens and the first token of each: one step of 2,048 tokens

Ours is counted as a user meets it, `InferenceEngine.step()`: schedule, lay out the batch, forward,
sample, update, detokenise. Theirs is the bare loop of transformers_loop.py. Before anything is
timed both must give the same logits, for a prompt and for a step behind it: fp32 to 1e-3, 16 bits
to 2% of the largest.

With `--also static continuous` two more decode in the same rounds: the same loop over a StaticCache
of just the length that is needed (not compiled: it reads its whole length at every step), and
transformers' own continuous batching, which is paged as ours is (continuous.py). These compute the
prompts themselves.

Contenders run in rounds, A B A B, so a busy minute hits both; a ratio is of the medians of the
rounds, and its spread that of single rounds. Needs transformers.
Run: python -m experiments.peers --batches 8 --steps 16
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from checkpoints.load import load_model, weights_kind
from experiments import transformers_loop
from experiments.ceilings import resolve, set_threads
from experiments.continuous import Continuous, check_equal_tokens
from experiments.results import Measurement, device_name, run_alone
from experiments.transformers_loop import Theirs
from kernels.backends import BACKENDS, DTYPES
from kernels.packed_linear import pack
from kv_cache import Row, make_batch
from llm import LLM, SamplingParams
from model import GPT

OURS, THEIRS = "paged engine", "transformers DynamicCache"
STATIC, CONTINUOUS = "transformers StaticCache", "transformers continuous batching"


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of whatever compares the engine with transformers: what is run, and on what."""
    add = parser.add_argument
    add("--model", default="random:gpt2", help="a folder, or random:gpt2 (its speed is GPT-2's)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=[*DTYPES], help="in turn")
    add("--backend", default="auto", choices=["auto", *BACKENDS], help="our kernel")
    add("--threads", type=int, nargs="+", help="of the CPU, one run each; default: all")
    add("--prompt-tokens", type=int, default=256, help="tokens of each prompt, at random")
    add("--block-size", type=int, default=16, help="tokens in a block of our pool")
    add("--seed", type=int, default=0, help="of the prompts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add_common_arguments(parser)
    add = parser.add_argument
    add("--batches", type=int, nargs="*", default=[32], help="decode: sequences; none: skip")
    add("--steps", type=int, default=64, help="decode: steps timed in a round")
    add("--rounds", type=int, default=5, help="decode: rounds, each times both contenders")
    more = ["static", "continuous"]
    add("--also", nargs="*", default=[], choices=more, help="decode: transformers' other ways too")
    add("--prefill", type=int, default=8, help="prefill: prompts in one step; 0: skip")
    add("--repeats", type=int, default=5, help="prefill: rounds")


# ---- our side ------------------------------------------------------------------------------------
class Ours:
    """The engine, driven step by step."""

    def __init__(self, llm: LLM, new_tokens: int):
        self.llm, self.num_new = llm, new_tokens

    def start(self, prompts: Tensor) -> None:
        """Queue the prompts (B, T) and run the one step that computes them all."""
        params = SamplingParams(temperature=0, max_tokens=self.num_new, ignore_eos=True)
        for prompt in prompts.tolist():
            self.llm.engine.add_request(prompt, params)
        output = self.llm.engine.step()
        assert output.plan.num_tokens == prompts.numel(), "the prompts were not one step"
        self.batch = len(prompts)

    def step(self) -> None:
        """One more token for each."""
        output = self.llm.engine.step()
        assert output.plan.num_tokens == self.batch, "a step of another number of sequences"

    def finish(self) -> None:
        """All have their number of tokens, and the blocks are free again."""
        assert not self.llm.engine.has_unfinished()


def as_served(model: GPT, batch: int, args: argparse.Namespace) -> GPT:
    """The same weights once more, packed as an `LLM` that loads them by their name packs them."""
    weight = model.wte.weight
    return pack(load_model(args.model, weight.dtype, weight.device), batch)


def build(model: GPT, batch: int, new_tokens: int, args: argparse.Namespace) -> Ours:
    """An engine with room for `batch` prompts in one step, and for all that they write."""
    length = args.prompt_tokens + new_tokens
    llm = LLM(
        model,
        backend=args.backend,
        block_size=args.block_size,
        num_blocks=batch * -(-length // args.block_size),
        max_num_seqs=batch,
        max_num_batched_tokens=batch * args.prompt_tokens,
    )
    return Ours(llm, new_tokens)


@torch.inference_mode()
def check_equal_work(ours: Ours, theirs: Theirs, prompts: Tensor) -> None:
    """Raise ValueError unless both give the same logits, for two prompts and for a step more.

    Ours come from the engine's own forward over its pool, which is idle now.
    """
    theirs.begin()
    first = theirs.logits(prompts[:2])
    chosen = first.argmax(-1, keepdim=True)  # both go on with these, or a tie would part them
    second = theirs.logits(chosen)
    cache, B, T = ours.llm.engine.cache, len(first), prompts.shape[1]
    per_sequence = -(-(T + 1) // cache.block_size)
    all_ids = torch.cat((prompts[:2], chosen), 1).tolist()
    tables = torch.arange(B * per_sequence).view(B, per_sequence).tolist()
    for want, start, num_new_tokens in ((first, 0, T), (second, T, 1)):
        rows = [
            Row(token_ids, start, num_new_tokens, block_table, 1)
            for token_ids, block_table in zip(all_ids, tables, strict=True)
        ]
        batch = make_batch(rows, cache.block_size, cache.scratch_block)
        error = (ours.llm.engine.forward(batch).double() - want.double()).abs().max()
        in_16_bits = cache.pool.dtype.itemsize == 2
        bound = 0.02 * want.abs().max() if in_16_bits else 1e-3
        if not error <= bound:  # NaN fails too
            raise ValueError(f"the logits differ by {error:.1e}, {bound:.1e} is allowed")
    del theirs.cache


# ---- measuring -----------------------------------------------------------------------------------
@torch.inference_mode()
def time_ms(work: Callable[[], None], device: torch.device) -> float:
    """Milliseconds until the work is done, on the device too."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def time_steps(contender, prompts: Tensor, steps: int) -> list[float]:
    """Milliseconds of each decode step behind the prompts."""
    time_ms(lambda: contender.start(prompts), prompts.device)
    steps_ms = [time_ms(contender.step, prompts.device) for _ in range(steps)]
    contender.finish()
    return steps_ms


def time_decode(contenders: dict[str, Callable], prompts: Tensor, args) -> dict:
    """Milliseconds of each step, a list a round: {contender: [[step, ..], ..]}.

    A contender is a function(prompts, steps) that gives the steps of one round.
    """
    rounds: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for number in range(args.rounds + 1):
        for name, measure in contenders.items():
            steps_ms = measure(prompts, args.steps)
            if number:
                rounds[name].append(steps_ms)
    return rounds


def time_all(model: GPT, ours: Ours, theirs: Theirs, prompts: Tensor, args) -> tuple[dict, dict]:
    """What `time_decode` gives, of ours, theirs and whoever runs also; and their backends."""
    contenders = {OURS: partial(time_steps, ours), THEIRS: partial(time_steps, theirs)}
    backends = {OURS: ours.llm.backend, THEIRS: "torch"}
    check_equal_work(ours, theirs, prompts)
    theirs.take_over(ours, prompts)
    length = args.prompt_tokens + args.steps + 1
    with ExitStack() as stack:
        if "static" in args.also:
            static = Theirs(theirs.model, length)
            check_equal_work(ours, static, prompts)
            contenders[STATIC], backends[STATIC] = partial(time_steps, static), "torch"
        if "continuous" in args.also:
            # A model of its own: the manager may change how its model attends.
            apart = transformers_loop.as_transformers(model)
            manager = Continuous(apart, len(prompts), length, args.block_size)
            stack.enter_context(manager)
            check_equal_tokens(manager, theirs, prompts)
            contenders[CONTINUOUS], backends[CONTINUOUS] = manager.time_steps, manager.backend
        return time_decode(contenders, prompts, args), backends


def decode(
    model: GPT, theirs: Theirs, batch: int, args: argparse.Namespace, common: dict
) -> Iterator[Measurement]:
    """Rows of the decode steps of one batch size."""
    prompts = random_prompts(model, batch, args)
    ours = build(as_served(model, batch, args), batch, 1 + args.steps, args)
    rounds, backends = time_all(model, ours, theirs, prompts, args)
    context = f"context={args.prompt_tokens}..{args.prompt_tokens + args.steps}"
    what = {"workload": f"decode batch={batch} {context} block_size={args.block_size}"} | common
    for name, backend in backends.items():
        what |= {"contender": name, "backend": backend}
        steps = [step for steps in rounds[name] for step in steps]
        yield Measurement.of(steps, metric="time a step", unit="ms", **what)
        rates = [batch * 1e3 / statistics.median(steps) for steps in rounds[name]]
        yield Measurement.of(rates, metric="generated tokens", unit="tokens/s", **what)
    for name in list(backends)[1:]:
        yield faster(ours, rounds, what, name)


def prefill(
    model: GPT, theirs: Theirs, args: argparse.Namespace, common: dict
) -> Iterator[Measurement]:
    """Rows of a step that computes prompts."""
    prompts = random_prompts(model, args.prefill, args)
    served = as_served(model, args.prefill, args)
    ours = build(served, args.prefill, 1, args)  # one token each, so they end with this step
    check_equal_work(ours, theirs, prompts)
    contenders = {OURS: ours, THEIRS: theirs}
    rounds: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for number in range(args.repeats + 1):
        for name, contender in contenders.items():
            taken_ms = time_ms(lambda c=contender: c.start(prompts), prompts.device)
            contender.finish()
            if number:
                rounds[name].append([taken_ms])
    sizes = f"batch={args.prefill} prompt={args.prompt_tokens} block_size={args.block_size}"
    what = {"workload": f"prefill {sizes}"} | common
    for name in (OURS, THEIRS):
        what |= {"contender": name, "backend": ours.llm.backend if name == OURS else "torch"}
        times = [taken_ms for (taken_ms,) in rounds[name]]
        yield Measurement.of(times, metric="time a step", unit="ms", **what)
        rates = [prompts.numel() * 1e3 / t for t in times]
        yield Measurement.of(rates, metric="prompt tokens", unit="tokens/s", **what)
    yield faster(ours, rounds, what, THEIRS)


def faster(ours: Ours, rounds: dict[str, list[list[float]]], what: dict, peer: str) -> Measurement:
    """The row of the ratio against a peer: of the medians of the rounds."""
    medians = {name: list(map(statistics.median, times)) for name, times in rounds.items()}
    what = what | {"contender": OURS, "backend": ours.llm.backend}
    against = {"metric": f"speed against {peer}", "unit": "x"}
    return Measurement.ratio_of(medians[peer], medians[OURS], **against, **what)


def random_prompts(model: GPT, batch: int, args: argparse.Namespace) -> Tensor:
    """Token ids (batch, prompt_tokens), on the model's device."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = batch, args.prompt_tokens
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    return ids.to(model.wte.weight.device)


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    transformers_loop.require_transformers()
    device = resolve(args.device)
    before = torch.get_num_threads()
    common = {"experiment": "peers", "device": device_name(device), "seed": args.seed}
    common |= {"model": args.model, "weights": weights_kind(args.model)}
    try:
        for dtype in args.dtypes:
            model = load_model(args.model, DTYPES[dtype], device)
            if args.prompt_tokens + args.steps + 1 > model.config.max_seq_len:
                limit = model.config.max_seq_len
                sizes = f"{args.prompt_tokens} prompt tokens and {args.steps} steps"
                raise ValueError(f"{sizes}: the model has {limit} positions")
            theirs = Theirs(transformers_loop.as_transformers(model))
            for threads in args.threads or [before]:
                set_threads(threads)
                common |= {"dtype": dtype, "threads": threads}
                for batch in args.batches:
                    yield from decode(model, theirs, batch, args, common)
                if args.prefill:
                    yield from prefill(model, theirs, args, common)
    finally:
        set_threads(before)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    run_alone(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    main()
