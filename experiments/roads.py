"""Three roads to the same tokens, timed: no cache, a contiguous slab per sequence, paged.

Greedy, equal prompts, equal numbers of tokens, one process, the roads in turn and five times over;
what counts are the ratios of the medians. A road that writes other tokens than the first one fails
the run, so nothing is compared that is not the same work. Without a cache every step computes all
tokens again; that road is left out where it would take minutes (--no-cache-up-to).

Run: python experiments/roads.py
     python experiments/roads.py --model random:gpt2 --batches 1 8 --new-tokens 32
"""

import argparse
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere

import torch  # noqa: E402

from baselines import generate_contiguous, generate_no_cache  # noqa: E402
from llm import BACKENDS, DTYPES, LLM, SHIPPED_MODEL, SamplingParams  # noqa: E402
from results import Measurement, device_name, run_alone  # noqa: E402


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add = parser.add_argument
    add("--model", default=str(SHIPPED_MODEL), help="a folder, or random:gpt2")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="of weights, K and V")
    add("--backend", default="auto", choices=["auto", *BACKENDS], help="the paged road's kernel")
    add("--threads", type=int, help="of the CPU; default: all, for the shipped model 1")
    add("--batches", type=int, nargs="+", default=[1, 8, 32], help="numbers of sequences to try")
    add("--prompt-tokens", type=int, default=64, help="tokens of each prompt, at random")
    add("--new-tokens", type=int, default=64, help="tokens that each sequence gets")
    add("--block-size", type=int, default=16, help="tokens in a block of the paged road")
    add("--no-cache-up-to", type=int, default=8, help="largest batch that runs without a cache")
    add("--repeats", type=int, default=5, help="rounds; each times every road once")
    add("--seed", type=int, default=0, help="of the prompts")


def generate_paged(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """The engine, greedy, to the full length."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def time_batch(llm: LLM, batch: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each repeat on all roads, for one number of sequences."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = batch, args.prompt_tokens
    prompts = torch.randint(llm.model.config.vocab_size, shape, generator=generator).tolist()
    roads = {
        "contiguous": partial(generate_contiguous, llm.model),
        "paged": partial(generate_paged, llm),
    }
    if batch <= args.no_cache_up_to:
        roads["no cache"] = partial(generate_no_cache, llm.model)
    seconds: dict[str, list[float]] = {road: [] for road in roads}
    for repeat in range(args.repeats + 1):
        for road, generate in roads.items():
            started = time.perf_counter()
            tokens = generate(prompts, args.new_tokens)  # its ids are on the host: all is done
            if repeat:  # the first round warms up and is checked
                seconds[road].append(time.perf_counter() - started)
            elif road == "contiguous":
                first = tokens
            else:
                same = sum(a == b for a, b in zip(tokens, first, strict=True))
                if same < 0.9 * batch:
                    raise ValueError(f"{road} wrote {batch - same} of {batch} differently")
    return seconds


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    blocks = -(-(args.prompt_tokens + args.new_tokens) // args.block_size) * max(args.batches)
    chosen = {name: getattr(args, name) for name in ("device", "dtype", "backend", "block_size")}
    is_shipped = args.model == str(SHIPPED_MODEL)
    before = torch.get_num_threads()
    # So small a model that a second thread waits more than it works.
    threads = args.threads or (1 if is_shipped else None)
    llm = LLM(args.model, num_blocks=blocks, threads=threads, **chosen)
    weight = llm.model.wte.weight
    common = {"experiment": "roads", "dtype": str(weight.dtype)[6:], "seed": args.seed}
    common |= {"threads": torch.get_num_threads(), "device": device_name(weight.device)}
    model = Path(args.model).name if is_shipped else args.model
    common |= {"model": model, "weights": llm.weights}
    try:
        for batch in args.batches:
            seconds = time_batch(llm, batch, args)
            sizes = f"prompt={args.prompt_tokens} new={args.new_tokens}"
            what = {"workload": f"batch={batch} {sizes} block_size={args.block_size}"} | common
            for road, times in seconds.items():
                what |= {"contender": road, "backend": llm.backend if road == "paged" else "torch"}
                rates = [batch * args.new_tokens / t for t in times]
                yield Measurement.of(rates, metric="generated tokens", unit="tokens/s", **what)
                if road != "contiguous":
                    against = {"metric": "speed against contiguous", "unit": "x"}
                    yield Measurement.ratio_of(seconds["contiguous"], times, **against, **what)
    finally:
        torch.set_num_threads(before)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    run_alone(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    main()
