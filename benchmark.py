"""Measure, and keep what was measured: a table of experiments, one CSV file of rows.

Without arguments it is the comparison that this project is about: the same tokens written without
a cache, with one contiguous slab a sequence, and with blocks, by the shipped model, in turn and
five times over. Each further experiment is a file in `experiments/`, with flags of its own and a
`run(args)` that yields rows; this file only finds it, appends each row as it is measured
(`experiments/results.py`), and shows all of them as a table at the end.

    python benchmark.py                      speed: no cache, contiguous, paged, transformers
    python benchmark.py memory               KV bytes step by step, and how many sequences fit
    python benchmark.py allocator            blocks a second, and whether any is ever lost
    python benchmark.py block-size           1 to 256: speed, memory filled, copies
    python benchmark.py concurrency          how many run at once in equal memory (--simulate)
    python benchmark.py trace                latency against rate, recorded arrivals (--simulate)
    python benchmark.py kernels              the kernel ladder: GB/s of each way to attend
    python benchmark.py ceilings             what the machine can do at most
    python benchmark.py sweep                which tiles are fastest, on a GPU
    python benchmark.py peers                the engine against transformers, same weights
    python benchmark.py anatomy              where a decode step goes, and what is possible
    python benchmark.py latency              a decode step: eager, recorded, joined; its floor
    python benchmark.py bookkeeping          what allocator and scheduler cost
    python benchmark.py verify FILE ...      whether files of rows are whole

`--help` behind any of them explains its flags. Ctrl-C loses no finished row.
Run: python benchmark.py
Try: python benchmark.py --batches 1 --new-tokens 128 (what does no cache cost now?), or
python benchmark.py kernels --block-sizes 1 16 64 --shapes 32x256.
"""

import argparse
import sys
from types import ModuleType

from experiments import (
    allocator,
    anatomy,
    block_size,
    bookkeeping,
    ceilings,
    concurrency,
    kernels,
    latency,
    memory,
    peers,
    speed,
    sweep,
    trace,
)
from experiments.results import read, show

# Each has add_arguments(parser) and run(args), which yields Measurements one by one.
EXPERIMENTS: dict[str, ModuleType] = {
    "speed": speed,
    "memory": memory,
    "allocator": allocator,
    "block-size": block_size,
    "concurrency": concurrency,
    "trace": trace,
    "kernels": kernels,
    "ceilings": ceilings,
    "sweep": sweep,
    "peers": peers,
    "anatomy": anatomy,
    "latency": latency,
    "bookkeeping": bookkeeping,
}
DEFAULT, DEFAULT_OUT = "speed", "benchmark_results.csv"


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line; the first word names the experiment, and may be left out."""
    plain = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **plain)
    commands = parser.add_subparsers(dest="command", metavar="EXPERIMENT")
    for name, module in EXPERIMENTS.items():
        words = module.__doc__
        command = commands.add_parser(name, help=words.split("\n")[0], description=words, **plain)
        module.add_arguments(command)
        command.add_argument("--out", default=DEFAULT_OUT, help=f"CSV file (default {DEFAULT_OUT})")
    verify = commands.add_parser("verify", help="whether CSV files are whole, else line and reason")
    verify.add_argument("files", nargs="+", help="files of rows")
    # A flag before any name belongs to the default experiment, but --help to all of them.
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = [DEFAULT, *argv]
    return parser.parse_args(argv)


def verify(files: list[str]) -> None:
    """Read files whole. Raises ValueError with the line and the reason for the first that isn't."""
    for name in files:
        print(f"{name}: {len(read(name))} rows, whole")


def main(argv: list[str] | None = None) -> None:
    """Run one experiment; a caller's mistake is one sentence and exit code 1."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        if args.command == "verify":
            verify(args.files)
        else:
            show(EXPERIMENTS[args.command].run(args), args.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"benchmark.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
