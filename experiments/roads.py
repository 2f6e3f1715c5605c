"""Three roads to the same tokens, timed: no cache, a contiguous slab per sequence, paged.

Greedy, equal prompts, equal numbers of tokens, one process, the roads in turn and five times over;
what counts are the ratios of the medians. A road that writes other tokens than the first one fails
the run, so nothing is compared that is not the same work. Without a cache every step computes all
tokens again; that road is left out where it would take minutes (--no-cache-up-to).

Run: python experiments/roads.py
     python experiments/roads.py --model random:gpt2 --batches 1 8 --new-tokens 32
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, from anywhere

import torch  # noqa: E402

from baselines import generate_contiguous, generate_no_cache  # noqa: E402
from llm import LLM, SHIPPED_MODEL, SamplingParams  # noqa: E402


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    parser.add_argument("--model", default=str(SHIPPED_MODEL), help="a folder, or random:gpt2")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="sequences")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--no-cache-up-to", type=int, default=8, help="sequences")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)


def generate_paged(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """The engine, greedy, to the full length."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def run_batch(llm: LLM, batch: int, args: argparse.Namespace) -> list[dict]:
    """All roads for one number of sequences: seconds of each repeat."""
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
            tokens = generate(prompts, args.new_tokens)
            if repeat:  # the first round warms up and is checked
                seconds[road].append(time.perf_counter() - started)
            elif road == "contiguous":
                first = tokens
            else:
                same = sum(a == b for a, b in zip(tokens, first, strict=True))
                assert same >= 0.9 * batch, f"{road} wrote {batch - same} of {batch} differently"
    return [{"batch": batch, "road": road, "seconds": times} for road, times in seconds.items()]


def run(args: argparse.Namespace) -> list[dict]:
    """All rows of the experiment."""
    blocks = -(-(args.prompt_tokens + args.new_tokens) // 16) * max(args.batches)
    llm = LLM(args.model, num_blocks=blocks)
    dtype = str(llm.model.wte.weight.dtype)[6:]
    print(f"{llm.model_name}, {llm.weights}, {dtype}, {torch.get_num_threads()} threads")
    return [row for batch in args.batches for row in run_batch(llm, batch, args)]


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    args = parser.parse_args(argv)
    base = 0.0
    for row in run(args):
        tokens = row["batch"] * args.new_tokens
        rates = sorted(tokens / seconds for seconds in row["seconds"])
        rate = statistics.median(rates)
        base = rate if row["road"] == "contiguous" else base
        print(
            f"batch {row['batch']:3}  {row['road']:10} {rate:8.1f} tokens/s "
            f"({rates[0]:.1f} to {rates[-1]:.1f})  {rate / base:5.2f} x contiguous"
        )


if __name__ == "__main__":
    main()
