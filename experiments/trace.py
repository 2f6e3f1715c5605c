"""Requests come when they come: latency against rate, for a recorded trace or a drawn one.

An open loop: each request arrives at its time, however long the queue is, as from people who know
nothing of each other. At a low rate every policy looks alike; where the curve of the normalised
latency (from arrival to the last token, over the tokens: the paper's figure) turns upwards is the
rate that a policy can serve. Beside it the times to the first token and between tokens (p50, p90,
p99), and how many run, on the average of each tenth of the run.

The trace is a CSV file with TIMESTAMP, ContextTokens and GeneratedTokens, as Azure publishes them
(github.com/Azure/AzurePublicDataset; Patel et al. 2024, "Splitwise", ISCA), named by --trace, or
found in the folder that PAGEDGPT_DATA names, under traces/. Without one, lengths are drawn: two
independent lognormals with the published medians of conversations, 1,020 tokens in and 129 out, and
the spread of the public trace's logarithms, 0.985 and 0.859. The trace itself has peaks, and short
answers to short prompts, so figures of drawn lengths are others. Which of both it was stands in the
output and in the workload of each row.

With --simulate the model is left out (`simulate.py`); the real engine runs the shipped model, and
there all lengths are divided by 4 (--shrink).
Run: python -m experiments.trace --simulate
     python -m experiments.trace --factors 1 4 --requests 64
"""

import argparse
import csv
import math
import os
import random
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import torch

from experiments.contenders import CONTENDERS, Machine, add_machine_arguments
from experiments.results import Measurement, run_alone
from experiments.simulate import Arrival, Run, poisson

HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
TRACE_NAME = Path("traces") / "AzureLLMInferenceTrace_conv_2023.csv"
DRAWN = (1020, 0.985), (129, 0.859)  # median, deviation of the logarithm; of prompts, of outputs
DRAWN_PER_S = 5.5  # requests, as in the hour that the trace recorded
SHORT = (16, 64), (16, 256)  # tokens in and out, any number in between as likely


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """Which requests."""
    add = parser.add_argument
    add("--trace", help=f"a CSV file; default: {TRACE_NAME} in the folder PAGEDGPT_DATA, if any")
    add(
        "--workload",
        default="chats",
        choices=["chats", "short"],
        help="short: 16-64 in, 16-256 out",
    )
    add("--fit", default="filter", choices=["filter", "scale"], help="what becomes of longer ones")
    add("--max-seq-len", type=int, default=1024, help="longest sequence, prompt and output")
    add("--shrink", type=int, help="divide all lengths by this; default 1, the real engine 4")
    add("--requests", type=int, help="only the first so many; default all, the real engine 48")
    add("--repeats", type=int, default=5, help="rounds of the real engine; a simulation needs one")
    add("--seed", type=int, default=0, help="of all that is drawn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add_workload_arguments(parser)
    add_machine_arguments(parser)
    add = parser.add_argument
    add("--arrivals", default="poisson", choices=["poisson", "recorded"], help="when they come")
    add("--factors", type=float, nargs="+", help="rates, as multiples of the trace's own")
    add("--policies", nargs="+", choices=[*CONTENDERS], help="who plans the memory; default paged")


# ---- which requests ------------------------------------------------------------------------------
def read_trace(path: str | Path) -> list[Arrival]:
    """The requests of a CSV file in the order of arrival, the first at 0 s.

    Raises ValueError with the file, the line and the reason for anything that is not a trace.
    """
    found: list[tuple[float, int, int]] = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            try:
                if (header := next(lines, None)) != HEADER:
                    raise ValueError(f"the header is {header}, a trace has {','.join(HEADER)}")
                found.extend(map(_parse, lines))
                if not found:
                    raise ValueError("there is no request behind the header")
            except (ValueError, csv.Error) as error:
                raise ValueError(f"{path}, line {max(lines.line_num, 1)}: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    found.sort()
    return [Arrival(second - found[0][0], *lengths) for second, *lengths in found]


def _parse(cells: list[str]) -> tuple[float, int, int]:
    """Seconds since 1970 and two numbers of tokens, or ValueError with the reason."""
    if len(cells) != len(HEADER):
        raise ValueError(f"{len(cells)} cells, {len(HEADER)} are needed: {','.join(HEADER)}")
    stamp, *numbers = cells
    # Seven decimals: more than a datetime has room for, so they are added behind it.
    whole, _, decimals = stamp.partition(".")
    try:
        second = (datetime.fromisoformat(whole) - datetime(1970, 1, 1)).total_seconds()
        if not (decimals or "0").isdigit():
            raise ValueError
        second += float(f"0.{decimals or 0}")
    except (ValueError, TypeError):
        raise ValueError(f"TIMESTAMP is {stamp!r}: as in 2023-11-16 18:15:46.6805900") from None
    for name, number in zip(HEADER[1:], numbers, strict=True):
        if not (number.isascii() and number.isdigit() and int(number)):
            raise ValueError(f"{name} is {number!r}: it must be an integer of at least 1")
    return second, int(numbers[0]), int(numbers[1])


def draw_chats(count: int, seed: int) -> list[Arrival]:
    """Lengths from the published distribution, see the top; arrivals at the trace's rate."""
    draw = random.Random(seed)

    def length(median: int, spread: float) -> int:
        return max(1, round(median * math.exp(draw.gauss(0, spread))))

    chats = [Arrival(0.0, *(length(*each) for each in DRAWN)) for _ in range(count)]
    return list(poisson(chats, DRAWN_PER_S, seed))


def draw_short(count: int, seed: int) -> list[Arrival]:
    """Short prompts and answers, uniform; arrivals at the trace's rate."""
    draw = random.Random(seed)
    lengths = [Arrival(0.0, *(draw.randint(*each) for each in SHORT)) for _ in range(count)]
    return list(poisson(lengths, DRAWN_PER_S, seed))


def fit_context(requests: list[Arrival], max_seq_len: int, how: str) -> tuple[list[Arrival], str]:
    """Requests of at most `max_seq_len` tokens, and a sentence: which were longer, and what of it.

    "filter" leaves the longer ones out; "scale" shrinks prompt and output of each of them by one
    factor. Raises ValueError if nothing is left.
    """
    fits = [r.prompt_tokens + r.output_tokens <= max_seq_len for r in requests]
    counts = f"{sum(fits):,} of {len(fits):,} requests fit {max_seq_len:,} tokens"
    if how == "filter":
        kept = [request for request, is_short in zip(requests, fits, strict=True) if is_short]
        if not kept:
            raise ValueError(f"{counts}: raise --max-seq-len, or --fit scale")
        return kept, f"{counts}, the others are left out"
    kept = []
    for request, is_short in zip(requests, fits, strict=True):
        total = request.prompt_tokens + request.output_tokens
        kept.append(request if is_short else scale(request, max_seq_len, total, max_seq_len))
    return kept, f"{counts}, the others are scaled down to that"


def scale(request: Arrival, numerator: int, denominator: int, most: int) -> Arrival:
    """Both lengths times a fraction, rounded down to 1 at least; `most` tokens together."""
    prompt_tokens = max(1, request.prompt_tokens * numerator // denominator)
    prompt_tokens = min(prompt_tokens, most - 1)
    output_tokens = max(1, request.output_tokens * numerator // denominator)
    return Arrival(request.arrival_s, prompt_tokens, min(output_tokens, most - prompt_tokens))


class Workload(NamedTuple):
    """The requests, and what is to be said of them."""

    requests: list[Arrival]  # in the order of arrival
    words: str  # for the row's workload
    sentence: str  # for the reader: where they come from, which were left out or scaled
    max_seq_len: int


def make_workload(args: argparse.Namespace) -> Workload:
    """What the flags ask for. ValueError for a file that is no trace, or a flag out of range."""
    _check_flags(args)
    folder = os.environ.get("PAGEDGPT_DATA")
    path = args.trace or (folder and Path(folder) / TRACE_NAME)
    if args.workload == "short":
        found, source = draw_short(args.requests or 4000, args.seed), "short chats, drawn uniformly"
    elif path:
        found, source = read_trace(path), Path(path).stem
    else:
        found, source = draw_chats(20_000, args.seed), "drawn from the published lengths"
    requests, sentence = fit_context(found, args.max_seq_len, args.fit)
    requests = requests[: args.requests or (None if args.simulate else 48)]
    longest, shrink = args.max_seq_len, args.shrink or (1 if args.simulate else 4)
    words = f"{source}, {args.fit} {longest}"
    if shrink > 1:
        longest //= shrink
        if longest < 2:
            raise ValueError(f"--shrink {shrink} leaves {longest} tokens of context: lower it")
        requests = [scale(request, 1, shrink, longest) for request in requests]
        words, sentence = f"{words} / {shrink}", f"{sentence}; all lengths divided by {shrink}"
    sentence = f"{source}: {sentence}; {len(requests):,} are served"
    return Workload(requests, f"{words}, requests={len(requests)}", sentence, longest)


def _check_flags(args: argparse.Namespace) -> None:
    least = {"max_seq_len": 2, "shrink": 1, "requests": 2, "blocks": 1, "block_size": 1}
    for name, minimum in (least | {"budget": 1, "repeats": 1}).items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {value}: it must be at least {minimum}")


# ---- at which rate -------------------------------------------------------------------------------
def at_rate(requests: list[Arrival], arrivals: str, factor: float, seed: int) -> list[Arrival]:
    """The same requests `factor` times as fast: as recorded, or at random at that mean rate."""
    span_s = requests[-1].arrival_s - requests[0].arrival_s
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"--factors has {factor}: a rate is a number above 0")
    if span_s <= 0:
        raise ValueError("all requests arrive at once: there is no rate to multiply")
    if arrivals == "poisson":
        return list(poisson(requests, factor * (len(requests) - 1) / span_s, seed))
    first_s = requests[0].arrival_s
    return [r._replace(arrival_s=(r.arrival_s - first_s) / factor) for r in requests]


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that is not below `percent` of all: of 1 to 100, p90 is 90."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


def figures_of(run: Run) -> dict[tuple[str, str], float]:
    """What a run says about its rate: {(metric, unit): value}."""
    first_ms = [1e3 * (one.token_s[0] - one.request.arrival_s) for one in run.served]
    gaps_ms = [
        1e3 * (b - a) for one in run.served for a, b in zip(one.token_s, one.token_s[1:])
    ]  # fmt: skip
    each_s = [one.latency_per_token_s for one in run.served]
    figures = {("normalised latency, mean", "s/token"): sum(each_s) / len(each_s)}
    for name, values in (("time to first token", first_ms), ("time between tokens", gaps_ms)):
        if values:  # with one token each there is no second
            figures |= {(f"{name}, p{p}", "ms"): percentile(values, p) for p in (50, 90, 99)}
    tokens = sum(len(one.token_s) for one in run.served)
    figures["generated tokens", "tokens/s"] = tokens / run.steps[-1].end_s
    preempted = sum(one.num_preemptions for one in run.served)
    figures["preempted", "times"] = preempted
    for tenth, running in enumerate(running_over_time(run, 10), 1):
        figures[f"running, mean of tenth {tenth} of the run", "requests"] = running
    return figures


def running_over_time(run: Run, parts: int) -> list[float]:
    """Requests that run, on the average of each of so many equal parts of the run's time."""
    width_s = run.steps[-1].end_s / parts
    totals = [0.0] * parts  # request-seconds
    for step in run.steps:
        start_s = step.end_s - step.milliseconds / 1e3
        for part in range(max(0, int(start_s / width_s)), parts):
            overlap_s = min(step.end_s, (part + 1) * width_s) - max(start_s, part * width_s)
            if overlap_s <= 0:
                break
            totals[part] += step.seen.running * overlap_s
    return [total / width_s for total in totals]


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    before = torch.get_num_threads()
    workload = make_workload(args)
    # Of the trace's own rate: of its 5.5 requests a second 2.3 fit 1,024 tokens.
    factors = args.factors or ([32, 64, 128, 192, 256] if args.simulate else [1, 2, 4])
    policies = list(dict.fromkeys(args.policies or ["paged"]))
    try:
        machine = Machine(args, workload.max_seq_len)
        print(f"{workload.sentence}\n{machine.clock}")
        for factor in factors:
            requests = at_rate(workload.requests, args.arrivals, factor, args.seed)
            per_s = len(requests) / (requests[-1].arrival_s - requests[0].arrival_s)
            rate = f"{args.arrivals} factor={factor:g} rate={per_s:.3g}/s"
            words = f"{workload.words}, {rate}, {machine.words()}"
            common = {"experiment": "trace", "workload": words} | machine.columns()
            for name, figures in machine.in_turn(policies, requests, figures_of):
                for metric, unit in figures[0]:
                    values = [each[metric, unit] for each in figures]
                    what = common | {"contender": name, "metric": metric, "unit": unit}
                    yield Measurement.of(values, **what)
    finally:
        torch.set_num_threads(before)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    run_alone(__doc__, add_arguments, run, argv)


if __name__ == "__main__":
    main()
