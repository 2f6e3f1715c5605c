"""Measure and keep what was measured: one command for all experiments, one CSV file of rows.

Without a name it runs `speed`, the comparison that this project is about: the shipped model writes
the same tokens without a cache, with one contiguous slab for each sequence, with blocks, and in
transformers if it is installed. The four take turns (A B A B) in five rounds, so a busy moment of
the machine slows all of them, and each figure is a median with its minimum and maximum. On 2 idle
cores it takes about a minute and a half.

    python benchmark.py                  speed ─> rows ─> benchmark_results.csv ─> the notebook
    python benchmark.py NAME [flags]     another experiment ─┘
    python benchmark.py verify FILE ..   whether files of rows are complete, else line and reason

`python benchmark.py --help` lists the experiments, `python benchmark.py NAME --help` explains one
and its flags. Each is a file of `experiments/` with flags of its own and a function that yields
rows. This file finds it, appends each row as soon as it is measured, and prints tables at the end.
Ctrl-C loses no finished row. Times of different runs are not comparable: other programs run, clocks
change. So each comparison is a row of its own, the ratio of two contenders in the same rounds.

Run: python benchmark.py
Try: python benchmark.py --batches 1 --new-tokens 128: with 128 tokens instead of 32 "no cache"
falls from a quarter of the speed to a seventh, because each step computes all tokens again. Or
python benchmark.py allocator: a million random operations, and no block is lost.
"""

import argparse
import importlib
import sys
from types import ModuleType
from typing import NamedTuple

from experiments.results import read, show


class Experiment(NamedTuple):
    """One experiment: a module of `experiments/`, and the names of its two functions."""

    module: str
    summary: str
    add_arguments: str = "add_arguments"  # (parser) -> None
    run: str = "run"  # (args) -> rows, one by one

    def load(self) -> ModuleType:
        """Import the module. Only the chosen one is imported, with the libraries that it needs."""
        return importlib.import_module(f"experiments.{self.module}")


EXPERIMENTS = {
    "speed": Experiment("speed", "the same tokens: no cache, contiguous, paged, transformers"),
    "memory": Experiment("memory", "KV bytes step by step, and how many sequences fit"),
    "allocator": Experiment("allocator", "blocks per second, and whether one is ever lost"),
    "block-size": Experiment("block_size", "1 to 256 tokens: speed, memory filled, copies"),
    "concurrency": Experiment("concurrency", "how many run at once in equal memory (--simulate)"),
    "trace": Experiment("trace", "latency against rate, recorded arrivals (--simulate)"),
    "kernels": Experiment("kernels", "GB/s of each way to attend, from gathering to in place"),
    "ceilings": Experiment("ceilings", "what the machine can do at most"),
    "sweep": Experiment(
        "kernels", "which tiles are fastest, on a GPU", "add_sweep_arguments", "run_sweep"
    ),
    "peers": Experiment("peers", "the engine against transformers, same weights"),
    "anatomy": Experiment(
        "peers",
        "the parts of a decode step, and what is possible",
        "add_anatomy_arguments",
        "run_anatomy",
    ),
    "engines": Experiment("engines", "the engine against vLLM, OpenVINO, CTranslate2, llama.cpp"),
    "latency": Experiment("latency", "a decode step: eager, recorded, fused; its floor"),
    "serve": Experiment("serve", "a server under load: latency against rate, over HTTP"),
    "ranks": Experiment("ranks", "one model in one process, and cut over two"),
    "bookkeeping": Experiment("bookkeeping", "the host's work in a step, without a model"),
    "hf": Experiment("hf", "transformers' loop with its own caches, and with PagedCache"),
    "scale": Experiment("scale", "1 to 1,000 simulated replicas, four routers; bytes on the wire"),
    "sharing": Experiment("sharing", "prompts that begin alike, texts of one prompt, beams"),
    "quality": Experiment(
        "quality", "what fewer bits cost: loss, logits, tokens, beside the speed"
    ),
    "neighbour": Experiment("neighbour", "a decode step while another process takes a core"),
}
DEFAULT, DEFAULT_OUT = "speed", "benchmark_results.csv"


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line; the first word names the experiment, and may be left out."""
    # A flag before any name belongs to the default experiment; --help belongs to all of them.
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = [DEFAULT, *argv]
    raw = argparse.RawDescriptionHelpFormatter  # keeps the pictures of the docstrings
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", metavar="EXPERIMENT")
    for name, experiment in EXPERIMENTS.items():
        command = commands.add_parser(name, help=experiment.summary, formatter_class=raw)
        if name == argv[0]:
            module = experiment.load()
            command.description = module.__doc__
            getattr(module, experiment.add_arguments)(command)
        command.add_argument("--out", default=DEFAULT_OUT, help=f"CSV file (default {DEFAULT_OUT})")
    verify = commands.add_parser("verify", help="whether CSV files are whole, else line and reason")
    verify.add_argument("files", nargs="+", help="files of rows")
    return parser.parse_args(argv)


def verify(files: list[str]) -> None:
    """Read files whole. Raises ValueError with line and reason for the first spoiled one."""
    for name in files:
        print(f"{name}: {len(read(name))} rows, whole")


def measure(args: argparse.Namespace) -> None:
    """Run the experiment that the command line names, and print its tables."""
    experiment = EXPERIMENTS[args.command]
    module = experiment.load()
    rows = getattr(module, experiment.run)(args)
    if hasattr(module, "is_shown"):  # it chooses the rows of its table
        show(rows, args.out, module.is_shown)
    else:
        show(rows, args.out)


def main(argv: list[str] | None = None) -> None:
    """Run one experiment; a caller's mistake is one sentence and exit code 1."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        if args.command == "verify":
            verify(args.files)
        else:
            measure(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"benchmark.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
