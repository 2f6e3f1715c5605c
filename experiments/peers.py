"""The engine against transformers: same weights, same prompts, one process, contenders in turn.

`peers` times two workloads, both greedy and of a fixed length, so that both sides do equal work:

    decode   64 tokens for each of B prompts of 256: the median step. K and V of the prompts are
             computed by our engine; transformers begins with a copy of them
    prefill  8 prompts of 256 tokens and the first token of each: one step of 2,048 tokens

Our time is what a user waits: `InferenceEngine.step()` with schedule, batch, forward, sampling,
update and detokenising. Theirs is the loop in transformers_engines.py. Before anything is timed
both must give the same logits, for a prompt and for one step after it: within 1e-3 in float32,
within 3% of the largest in 16 bits. `--also static continuous` adds transformers' StaticCache (just
long enough, not compiled: each step reads its whole length) and its continuous batching. These two
compute the prompts themselves.

`anatomy` times the parts of our decode step alone, over the same weights and blocks:

    products          the four matrix products of each layer, and the logits
    attention         K and V written to their slots, and all contexts read, in every layer
    small operations  LayerNorms, activation, residual sums, embeddings
    forward           all of these as the model runs them; the rest of the step is the host's

It then states what is possible. Both sides must make the same products, and ours are faster, from
packed weights. So transformers' step divided by our products is more than any engine with our
products can reach: the row "at most: the products alone". The next row adds one plain read of K
and V. No better kernel reaches a goal above these two rows. The row "products and attention alone"
says how much is left to gain outside of the kernels.

A ratio is of the medians of the rounds; its spread is that of single rounds. Needs transformers.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from checkpoints.load import load_model, weights_kind
from experiments import transformers_engines
from experiments.ceilings import Columns, best_reader, resolve, set_threads, timer
from experiments.results import Measurement, device_name
from experiments.transformers_engines import Continuous, Theirs
from kernels.backends import BACKENDS, DTYPES
from kernels.packed_linear import pack
from kv_cache import Batch, Row, make_batch
from llm import LLM, SamplingParams
from model import GPT

OURS, THEIRS = "paged engine", "transformers DynamicCache"
STATIC, CONTINUOUS = "transformers StaticCache", "transformers continuous batching"
FORWARD = "forward"
PRODUCTS = "products"
ATTENTION = "attention"
KV_READ = "KV read once"


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `peers` and `anatomy` share: which model, on which device."""
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
    """The flags of `peers`."""
    add_common_arguments(parser)
    add = parser.add_argument
    add("--batches", type=int, nargs="*", default=[32], help="decode: sequences; none: skip")
    add("--steps", type=int, default=64, help="decode: steps timed in a round")
    add("--rounds", type=int, default=5, help="decode: rounds, each times both contenders")
    more = ["static", "continuous"]
    add("--also", nargs="*", default=[], choices=more, help="decode: transformers' other ways too")
    add("--prefill", type=int, default=8, help="prefill: prompts in one step; 0: skip")
    add("--repeats", type=int, default=5, help="prefill: rounds")


def add_anatomy_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `anatomy`."""
    add_common_arguments(parser)
    add = parser.add_argument
    add("--batches", type=int, nargs="+", default=[32], help="sequences")
    add("--steps", type=int, default=32, help="steps timed in a round; the parts half as often")
    add("--rounds", type=int, default=5, help="rounds, each times everything once")
    add("--read-mb", type=int, help="buffer to read, in MB; default 1024, on a GPU 8192")


# ---- our side ------------------------------------------------------------------------------------
class Ours:
    """The engine, driven step by step: `start`, `step`, .., `finish`, as `Theirs` is."""

    def __init__(self, llm: Any, new_tokens: int):
        """`llm` is an LLM, or anything else that holds an engine as its `engine`."""
        self.llm, self.new_tokens = llm, new_tokens

    def start(self, prompts: Tensor) -> None:
        """Add the prompts (B, T) and run the one step that computes all of them."""
        params = SamplingParams(temperature=0, max_tokens=self.new_tokens, ignore_eos=True)
        for prompt in prompts.tolist():
            self.llm.engine.add_request(prompt, params)
        output = self.llm.engine.step()
        assert output.plan.num_tokens == prompts.numel(), "the prompts were not one step"
        self.batch = len(prompts)

    def step(self) -> None:
        """One more token for each sequence."""
        output = self.llm.engine.step()
        assert output.plan.num_tokens == self.batch, "a step of another number of sequences"

    def finish(self) -> None:
        """All sequences have their tokens and have ended."""
        assert not self.llm.engine.has_unfinished()


def as_served(model: GPT, args: argparse.Namespace) -> GPT:
    """The same weights, loaded again and packed as `LLM` packs a model that it loads by name."""
    weight = model.wte.weight
    return pack(load_model(args.model, weight.dtype, weight.device))


def build(model: GPT, batch: int, new_tokens: int, args: argparse.Namespace) -> Ours:
    """An engine with room for `batch` prompts in one step, and for their `new_tokens`."""
    length = args.prompt_tokens + new_tokens
    llm = LLM(
        model,
        backend=args.backend,
        enable_prefix_caching=False,  # each round computes its prompts, as the peers do
        block_size=args.block_size,
        num_blocks=batch * -(-length // args.block_size),
        max_num_seqs=batch,
        max_num_batched_tokens=batch * args.prompt_tokens,
    )
    return Ours(llm, new_tokens)


def random_ids(model: GPT, B: int, T: int, seed: int) -> Tensor:
    """Token ids (B, T) on the model's device, always the same ones for a seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (B, T), generator=generator)
    return ids.to(model.wte.weight.device)


# ---- equal work ----------------------------------------------------------------------------------
def logits_bound(largest: float, itemsize: int) -> float:
    """How far logits of equal work may differ: other kernels sum in another order.

    3% of the largest in 16 bits, 1e-3 in 32 and 1e-9 in 64. (In bfloat16 each of two ways is up to
    1.1% away from float64 in GPT-2's shape, and the two up to 1.4% from each other.)
    """
    return {2: 0.03 * largest, 4: 1e-3, 8: 1e-9}[itemsize]


@torch.inference_mode()
def check_equal_work(ours: Ours, theirs: Theirs, prompts: Tensor) -> None:
    """Raise ValueError unless both sides give the same logits for two prompts and one step more.

    Ours come from the engine's own forward over its pool, in which nothing runs now.
    """
    theirs.begin()
    first = theirs.logits(prompts[:2])
    chosen = first.argmax(-1, keepdim=True)  # both continue with these: at a tie ours might differ
    second = theirs.logits(chosen)
    cache = ours.llm.engine.cache
    B = len(first)
    T = prompts.shape[1]
    blocks_each = -(-(T + 1) // cache.block_size)
    all_ids = torch.cat((prompts[:2], chosen), 1).tolist()
    tables = torch.arange(B * blocks_each).view(B, blocks_each).tolist()
    for expected, start, num_new_tokens in ((first, 0, T), (second, T, 1)):
        rows = [
            Row(token_ids, start, num_new_tokens, block_table, 1)
            for token_ids, block_table in zip(all_ids, tables, strict=True)
        ]
        batch = make_batch(rows, cache.block_size, cache.scratch_block)
        error = (ours.llm.engine.forward(batch).double() - expected.double()).abs().max()
        bound = logits_bound(expected.abs().max().item(), cache.pool.dtype.itemsize)
        if not error <= bound:  # true for NaN as well
            raise ValueError(f"the logits differ by {error:.1e}, {bound:.1e} is allowed")
    del theirs.cache


@torch.inference_mode()
def check_equal_tokens(continuous: Continuous, theirs: Theirs, prompts: Tensor) -> None:
    """Raise ValueError unless continuous batching chooses the tokens with the best logits.

    Two tokens of two prompts are tried, with the logits of `theirs`. A token whose logit is within
    the bound of the best one is accepted: nearly equal logits may order differently.
    """
    theirs.begin()
    outputs = continuous.generate(prompts[:2], 2)
    chosen = torch.tensor([output.generated_tokens for output in outputs], device=prompts.device)
    ids = prompts[:2]
    for number in range(2):
        logits = theirs.logits(ids)
        ids = chosen[:, number : number + 1]
        error = (logits.max(-1).values - logits.gather(-1, ids)[:, 0]).double().max()
        bound = logits_bound(logits.abs().max().item(), logits.dtype.itemsize)
        if not error <= bound:  # true for NaN as well
            found = f"continuous batching chose a token of which the score is {error:.1e} lower"
            raise ValueError(f"{found} than the best, {bound:.1e} is allowed")
    del theirs.cache


# ---- measuring -----------------------------------------------------------------------------------
@torch.inference_mode()
def time_ms(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds until the work is done, on the device too."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def time_steps(contender: Any, prompts: Tensor, steps: int) -> list[float]:
    """Milliseconds of each decode step after the prompts."""
    time_ms(lambda: contender.start(prompts), prompts.device)
    steps_ms = [time_ms(contender.step, prompts.device) for _ in range(steps)]
    contender.finish()
    return steps_ms


Rounds = dict[str, list[list[float]]]  # contender -> for each round its times in milliseconds


def time_decode(contenders: dict[str, Callable], prompts: Tensor, args: Any) -> Rounds:
    """The decode steps of all contenders in turn. One round before them warms up.

    A contender is a function(prompts, steps) that returns the steps of one round.
    """
    rounds: Rounds = {name: [] for name in contenders}
    for number in range(args.rounds + 1):
        for name, measure in contenders.items():
            steps_ms = measure(prompts, args.steps)
            if number > 0:
                rounds[name].append(steps_ms)
    return rounds


def time_all(
    ours: Ours, theirs: Theirs, model: GPT, prompts: Tensor, args: argparse.Namespace
) -> tuple[Rounds, dict[str, str]]:
    """The rounds of our engine, of theirs and of those that --also names, and their backends."""
    contenders: dict[str, Callable] = {OURS: partial(time_steps, ours)}
    contenders[THEIRS] = partial(time_steps, theirs)
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
            # It needs a model of its own, because it may change how its model attends.
            own_model = transformers_engines.as_transformers(model)
            num_blocks = 2 * len(prompts) * -(-length // args.block_size) + 1
            step_tokens = len(prompts) * length  # all prompts in one step
            manager = Continuous(own_model, num_blocks, step_tokens, args.block_size)
            stack.enter_context(manager)
            check_equal_tokens(manager, theirs, prompts)
            contenders[CONTINUOUS], backends[CONTINUOUS] = manager.time_steps, manager.backend
        return time_decode(contenders, prompts, args), backends


def decode(
    model: GPT, theirs: Theirs, batch: int, args: argparse.Namespace, common: Columns
) -> Iterator[Measurement]:
    """Rows of the decode steps of one batch size."""
    prompts = random_ids(model, batch, args.prompt_tokens, args.seed)
    ours = build(as_served(model, args), batch, 1 + args.steps, args)
    rounds, backends = time_all(ours, theirs, model, prompts, args)
    columns = common | {"workload": decode_workload(batch, args)}
    for name, backend in backends.items():
        columns |= {"contender": name, "backend": backend}
        steps_ms = [step_ms for one_round in rounds[name] for step_ms in one_round]
        yield Measurement.of(steps_ms, metric="time a step", unit="ms", **columns)
        rates = [batch * 1e3 / statistics.median(one_round) for one_round in rounds[name]]
        yield Measurement.of(rates, metric="generated tokens", unit="tokens/s", **columns)
    for name in backends:
        if name != OURS:
            yield ratio_row(ours, rounds, columns, name)


def decode_workload(batch: int, args: argparse.Namespace) -> str:
    """The workload column of decode rows."""
    context = f"context={args.prompt_tokens}..{args.prompt_tokens + args.steps}"
    return f"decode batch={batch} {context} block_size={args.block_size}"


def prefill(
    model: GPT, theirs: Theirs, args: argparse.Namespace, common: Columns
) -> Iterator[Measurement]:
    """Rows of a step that computes prompts."""
    prompts = random_ids(model, args.prefill, args.prompt_tokens, args.seed)
    served = as_served(model, args)
    ours = build(served, args.prefill, 1, args)  # one token each, so they end with this step
    check_equal_work(ours, theirs, prompts)
    contenders: dict[str, Any] = {OURS: ours, THEIRS: theirs}
    rounds: Rounds = {name: [] for name in contenders}
    for number in range(args.repeats + 1):
        for name, contender in contenders.items():
            taken_ms = time_ms(partial(contender.start, prompts), prompts.device)
            contender.finish()
            if number > 0:
                rounds[name].append([taken_ms])
    sizes = f"batch={args.prefill} prompt={args.prompt_tokens} block_size={args.block_size}"
    columns = common | {"workload": f"prefill {sizes}"}
    for name in contenders:
        columns |= {"contender": name, "backend": ours.llm.backend if name == OURS else "torch"}
        times_ms = [taken_ms for (taken_ms,) in rounds[name]]
        yield Measurement.of(times_ms, metric="time a step", unit="ms", **columns)
        rates = [prompts.numel() * 1e3 / t for t in times_ms]
        yield Measurement.of(rates, metric="prompt tokens", unit="tokens/s", **columns)
    yield ratio_row(ours, rounds, columns, THEIRS)


def ratio_row(ours: Ours, rounds: Rounds, columns: Columns, peer: str) -> Measurement:
    """How many times as fast our engine is as a peer: the ratio of the medians of the rounds."""
    medians = {name: list(map(statistics.median, times)) for name, times in rounds.items()}
    columns = columns | {"contender": OURS, "backend": ours.llm.backend}
    against = {"metric": f"speed against {peer}", "unit": "x"}
    return Measurement.ratio_of(medians[peer], medians[OURS], **against, **columns)


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of `peers`."""
    for model, theirs, common in settings("peers", args):
        for batch in args.batches:
            yield from decode(model, theirs, batch, args, common)
        if args.prefill:
            yield from prefill(model, theirs, args, common)


def settings(experiment: str, args: argparse.Namespace) -> Iterator[tuple[GPT, Theirs, Columns]]:
    """For each dtype and number of threads: our model, theirs, and the columns of their rows.

    Raises ValueError if transformers is missing, or if the model has too few positions.
    """
    transformers_engines.require_transformers()
    device = resolve(args.device)
    threads_before = torch.get_num_threads()
    common = {"experiment": experiment, "device": device_name(device), "seed": args.seed}
    common |= {"model": args.model, "weights": weights_kind(args.model)}
    try:
        for dtype in args.dtypes:
            model = load_model(args.model, DTYPES[dtype], device)
            limit = model.config.max_seq_len
            if args.prompt_tokens + args.steps + 1 > limit:
                sizes = f"{args.prompt_tokens} prompt tokens and {args.steps} steps"
                raise ValueError(f"{sizes}: the model has {limit} positions")
            theirs = Theirs(transformers_engines.as_transformers(model))
            for threads in args.threads or [threads_before]:
                set_threads(threads)
                yield model, theirs, common | {"dtype": dtype, "threads": threads}
    finally:
        set_threads(threads_before)


# ---- anatomy: the parts of a step ----------------------------------------------------------------
def middle_batch(ours: Ours, batch: int, args: argparse.Namespace) -> Batch:
    """One step's batch half way through the run: each sequence adds a token, tables shuffled."""
    cache = ours.llm.engine.cache
    context = args.prompt_tokens + args.steps // 2  # tokens, with the new one
    blocks_each = -(-context // cache.block_size)
    shuffled = torch.randperm(ours.llm.config.num_blocks)[: batch * blocks_each]
    tables = shuffled.view(batch, blocks_each).tolist()
    rows = [Row([0] * context, context - 1, 1, table, 1) for table in tables]
    return make_batch(rows, cache.block_size, cache.scratch_block).to(cache.pool.device)


def parts_of(ours: Ours, batch: Batch) -> dict[str, Callable[[int], object]]:
    """The parts of a step, each a function of a call's number (which `timer` passes, unused)."""
    model = ours.llm.model
    B, C = len(batch.input_ids), model.config.n_embd
    engine, kernels = ours.llm.engine, BACKENDS[ours.llm.backend]
    narrow = torch.randn(B, C).to(model.wte.weight)
    wide = torch.randn(B, model.h[0].mlp.c_fc.out_features).to(narrow)
    q, k, v = torch.randn(3, B, model.config.n_head, model.config.head_dim).to(narrow)

    def products(_: int) -> None:
        for layer in model.h:
            for linear in (layer.attn.c_attn, layer.attn.c_proj, layer.mlp.c_fc):
                linear(narrow)
            layer.mlp.c_proj(wide)
        model.logits(narrow)

    def attention(_: int) -> None:
        attend = engine.cache.attend(batch, kernels.paged_attention, write_kv=kernels.write_kv)
        for layer in range(model.config.n_layer):
            attend(layer, q, k, v)

    def small_operations(_: int) -> None:
        x = model.wte(batch.input_ids) + model.wpe(batch.positions)
        for layer in model.h:
            x = x + layer.ln_1(x)
            layer.mlp.activation(wide)
            x = x + layer.ln_2(x)
        model.ln_f(x)

    return {
        PRODUCTS: products,
        ATTENTION: attention,
        "small operations": small_operations,
        FORWARD: lambda _: engine.forward(batch),
    }


@torch.inference_mode()
def time_parts(
    model: GPT, ours: Ours, theirs: Theirs, batch: int, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Median milliseconds of both steps, of each part, and of reading K and V; one a round."""
    prompts = random_ids(model, batch, args.prompt_tokens, args.seed)
    check_equal_work(ours, theirs, prompts)
    theirs.take_over(ours, prompts)
    middle = middle_batch(ours, batch, args)
    device = prompts.device
    timers = {name: timer(part, 1, device) for name, part in parts_of(ours, middle).items()}
    reader = best_reader(device, args.read_mb)
    contenders = {OURS: ours, THEIRS: theirs}
    rounds: dict[str, list[float]] = {name: [] for name in (*contenders, *timers, KV_READ)}
    kv_bytes = model.config.kv_bytes_per_token(model.wte.weight.dtype) * sum(middle.context_lens)
    for number in range(args.rounds + 1):
        taken_ms = {
            name: statistics.median(time_steps(contender, prompts, args.steps))
            for name, contender in contenders.items()
        }
        for name, measure in timers.items():
            taken_ms[name] = statistics.median(measure() for _ in range(args.steps // 2))
        taken_ms[KV_READ] = reader.measure() * float(kv_bytes) / reader.num_bytes
        if number > 0:  # the first round warms up
            for name, part_ms in taken_ms.items():
                rounds[name].append(part_ms)
    return rounds


def anatomy_rows(
    rounds: dict[str, list[float]], common: Columns, backend: str
) -> Iterator[Measurement]:
    """The times, each part's share of our step, and the most that is possible."""
    step_ms, theirs_ms = rounds[OURS], rounds[THEIRS]
    for name, times_ms in rounds.items():
        is_ours = name in (OURS, ATTENTION, FORWARD)
        columns = common | {"contender": name, "backend": backend if is_ours else "torch"}
        yield Measurement.of(times_ms, metric="time a step", unit="ms", **columns)
        if name not in (OURS, THEIRS):
            share = {"metric": "share of our step", "unit": "%"}
            yield Measurement.ratio_of(times_ms, step_ms, 100.0, **share, **columns)
    columns = common | {"backend": backend, "metric": f"speed against {THEIRS}", "unit": "x"}
    yield Measurement.ratio_of(theirs_ms, step_ms, contender=OURS, **columns)
    products_ms = rounds[PRODUCTS]
    with_read_ms = [p + r for p, r in zip(products_ms, rounds[KV_READ], strict=True)]
    with_attention_ms = [p + a for p, a in zip(products_ms, rounds[ATTENTION], strict=True)]
    possible = {
        "at most: the products alone": products_ms,
        "at most: products and one read of KV": with_read_ms,
        "products and attention alone": with_attention_ms,
    }
    for name, times_ms in possible.items():
        yield Measurement.ratio_of(theirs_ms, times_ms, contender=name, **columns)


def run_anatomy(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of `anatomy`."""
    for model, theirs, common in settings("anatomy", args):
        for batch in args.batches:
            ours = build(as_served(model, args), batch, 1 + args.steps, args)
            rounds = time_parts(model, ours, theirs, batch, args)
            columns = common | {"workload": decode_workload(batch, args)}
            yield from anatomy_rows(rounds, columns, ours.llm.backend)
