"""Where a decode step's time goes, and how fast it could be at most: each part timed for itself.

A whole step of the engine and of transformers, in turn, and between them the parts of ours alone,
over the same weights and the same blocks:

    products          the four matrix products of each layer, and the logits: nothing else
    attention         K and V written to their slots and all contexts read, in every layer
    small operations  LayerNorms, activation, residual sums, embeddings
    forward           all of these as the model runs them; what the step has more is the host's

Both sides have to make the same products; ours are the faster ones, from packed weights. So
transformers' step divided by our products alone is what no engine of ours could exceed if attention
were free and the host took no time: the first row "at most". The second adds K and V read once by
the quickest plain read. A goal above both is not reached by a better kernel. The last row says what
is left to gain outside of kernels: products and attention as they are, and nothing else. (Over
blocks anywhere in the pool: a step whose blocks lie in order may take a little less than these.)

Needs transformers. Run: python -m experiments.anatomy --batches 32 --steps 16
"""

import argparse
import statistics
from collections.abc import Callable, Iterator

import torch

from checkpoints.load import load_model, weights_kind
from experiments import peers, transformers_loop
from experiments.ceilings import best_reader, resolve, set_threads, timer
from experiments.results import Measurement, device_name, run_alone
from experiments.transformers_loop import Theirs
from kernels.backends import BACKENDS, DTYPES
from kv_cache import Batch, Row, make_batch
from model import GPT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    peers.add_common_arguments(parser)
    add = parser.add_argument
    add("--batches", type=int, nargs="+", default=[32], help="sequences")
    add("--steps", type=int, default=32, help="steps timed in a round; the parts half as often")
    add("--rounds", type=int, default=5, help="rounds, each times everything once")
    add("--read-mb", type=int, help="buffer to read, in MB; default 1024, on a GPU 8192")


def middle_batch(ours: peers.Ours, batch: int, args: argparse.Namespace) -> Batch:
    """One step's batch half way through the run: every sequence adds a token, tables shuffled."""
    cache = ours.llm.engine.cache
    context = args.prompt_tokens + args.steps // 2  # tokens with the new one
    per_sequence = -(-context // cache.block_size)
    shuffled = torch.randperm(ours.llm.config.num_blocks)[: batch * per_sequence]
    tables = shuffled.view(batch, per_sequence).tolist()
    rows = [Row([0] * context, context - 1, 1, table, 1) for table in tables]
    return make_batch(rows, cache.block_size, cache.scratch_block).to(cache.pool.device)


def parts_of(ours: peers.Ours, batch: Batch) -> dict[str, Callable[[int], object]]:
    """The parts of a step as functions of a number that they ignore, see `timer`."""
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
        "products": products,
        "attention": attention,
        "small operations": small_operations,
        "forward": lambda _: engine.forward(batch),
    }


@torch.inference_mode()
def time_rounds(model: GPT, ours, theirs, batch: int, args: argparse.Namespace) -> dict:
    """Median milliseconds of a step and of each part, one a round; and of reading the KV."""
    prompts = peers.random_prompts(model, batch, args)
    peers.check_equal_work(ours, theirs, prompts)
    theirs.take_over(ours, prompts)
    middle = middle_batch(ours, batch, args)
    device = prompts.device
    timers = {name: timer(part, 1, device) for name, part in parts_of(ours, middle).items()}
    reader = best_reader(device, args.read_mb)
    contenders = {peers.OURS: ours, peers.THEIRS: theirs}
    rounds: dict[str, list[float]] = {name: [] for name in (*contenders, *timers, "KV read once")}
    kv_bytes = model.config.kv_bytes_per_token(model.wte.weight.dtype) * sum(middle.context_lens)
    for number in range(args.rounds + 1):
        taken = {}
        for name, contender in contenders.items():
            peers.time_ms(lambda c=contender: c.start(prompts), device)
            steps = [peers.time_ms(contender.step, device) for _ in range(args.steps)]
            contender.finish()
            taken[name] = statistics.median(steps)
        for name, measure in timers.items():
            taken[name] = statistics.median(measure() for _ in range(args.steps // 2))
        taken["KV read once"] = reader.measure() * float(kv_bytes) / reader.num_bytes
        if number:  # the first round warms up
            for name, time_ms in taken.items():
                rounds[name].append(time_ms)
    return rounds


def rows_of(rounds: dict, what: dict, backend: str) -> Iterator[Measurement]:
    """The times, each part's share of our step, and what is possible at most."""
    step, theirs = rounds[peers.OURS], rounds[peers.THEIRS]
    for name, times_ms in rounds.items():
        ours = name in (peers.OURS, "attention", "forward")
        whose = what | {"contender": name, "backend": backend if ours else "torch"}
        yield Measurement.of(times_ms, metric="time a step", unit="ms", **whose)
        if name not in (peers.OURS, peers.THEIRS):
            share = {"metric": "share of our step", "unit": "%"}
            yield Measurement.ratio_of(times_ms, step, 100.0, **share, **whose)
    against = {"metric": f"speed against {peers.THEIRS}", "unit": "x"}
    what = what | {"backend": backend}
    yield Measurement.ratio_of(theirs, step, contender=peers.OURS, **against, **what)
    # With free attention, with attention at the speed of a plain read, and with attention as it is.
    products, read, attention = (rounds[name] for name in ("products", "KV read once", "attention"))
    without_the_rest = {
        "at most: the products alone": products,
        "at most: products and one read of KV": list(map(sum, zip(products, read))),
        "products and attention alone": list(map(sum, zip(products, attention))),
    }
    for name, least_ms in without_the_rest.items():
        yield Measurement.ratio_of(theirs, least_ms, contender=name, **against, **what)


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    transformers_loop.require_transformers()
    device = resolve(args.device)
    before = torch.get_num_threads()
    common = {"experiment": "anatomy", "device": device_name(device), "seed": args.seed}
    common |= {"model": args.model, "weights": weights_kind(args.model)}
    try:
        for dtype in args.dtypes:
            model = load_model(args.model, DTYPES[dtype], device)
            theirs = Theirs(transformers_loop.as_transformers(model))
            for threads in args.threads or [before]:
                set_threads(threads)
                common |= {"dtype": dtype, "threads": threads}
                for batch in args.batches:
                    served = peers.as_served(model, batch, args)
                    ours = peers.build(served, batch, 1 + args.steps, args)
                    context = f"context={args.prompt_tokens}..{args.prompt_tokens + args.steps}"
                    size = f"decode batch={batch} {context} block_size={args.block_size}"
                    rounds = time_rounds(model, ours, theirs, batch, args)
                    yield from rows_of(rounds, common | {"workload": size}, ours.llm.backend)
    finally:
        set_threads(before)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    run_alone(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    main()
