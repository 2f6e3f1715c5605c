"""One model in one process and cut over two: tokens a second, bytes that the ranks send, memory.

All contenders have the same machine. Two ranks on its two cores read the weights no faster than one
process with two threads, and they wait for each other 25 times a step (GPT-2, 124M). So on the
cores of one machine tensor parallel loses. The figures say what the sums cost, and what memory is
gained.

Each contender is a group of processes that is started once and keeps its model. The contenders run
in turn: one generates, the others wait. A rate counts the output tokens; the time has the prompts
of 8 tokens, too. The ranks count the bytes themselves, where they call the collectives.

How it is checked: tests/experiments/test_ranks.py counts the bytes by hand.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch.distributed as dist

from checkpoints.load import weights_kind
from experiments.results import Measurement, device_name
from llm import LLM, SamplingParams
from speedups.ranks import Ranks
from speedups.tensor_parallel import follow

PROMPT_TOKENS = 8
BLOCK_SIZE = 16


class Contender(NamedTuple):
    """A group of processes that serve one model."""

    size: int  # ranks
    threads: int  # of each

    @property
    def name(self) -> str:
        """For the rows: "2 ranks, 1 thread each"."""
        ranks = "1 process" if self.size == 1 else f"{self.size} ranks"
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{ranks}, {threads}{' each' * (self.size > 1)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add = parser.add_argument
    add("--model", default="random:gpt2", help="a folder, or random:gpt2")
    add("--ranks", type=int, nargs="+", default=[2], help="processes")
    add("--batches", type=int, nargs="+", default=[1, 16], help="requests at once")
    add("--new-tokens", type=int, default=16, help="of each text")
    add("--rounds", type=int, default=5, help="repeats, the contenders in turn")


# ---- in the processes ----------------------------------------------------------------------------
def prompts_of(batch: int) -> list[list[int]]:
    """So many prompts of `PROMPT_TOKENS` tokens, no two of which begin alike."""
    return [[1 + i, *range(100, 100 + PROMPT_TOKENS - 1)] for i in range(batch)]


def serve(wire: Connection, rank: int, contender: Contender, args, store: str) -> None:
    """One process of a contender. Its rank 0 gets numbers of requests, and answers with figures."""
    is_cut = contender.size > 1
    if is_cut:
        options: dict = {"rank": rank, "world_size": contender.size}
        dist.init_process_group("gloo", init_method=f"file://{store}", **options)
    most = max(args.batches)
    llm = LLM(
        args.model,
        device="cpu",
        threads=contender.threads,
        num_blocks=most * -(-(PROMPT_TOKENS + args.new_tokens) // BLOCK_SIZE),
        max_num_seqs=most,
        enable_prefix_caching=False,
        tensor_parallel=is_cut,
    )
    if rank > 0:
        follow(llm.engine)
        return
    weight_bytes = sum(parameter.nbytes for parameter in set(llm.model.parameters()))
    wire.send((llm.backend, str(llm.dtype)[6:], weight_bytes, llm.engine.cache.pool.nbytes))
    params = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)
    while (batch := wire.recv()) is not None:
        before = sent_bytes(llm.ranks)
        started = time.perf_counter()
        llm.generate(prompts_of(batch), params)
        seconds = time.perf_counter() - started
        wire.send((seconds, *(b - a for a, b in zip(before, sent_bytes(llm.ranks)))))


def sent_bytes(ranks: Ranks | None) -> tuple[int, int]:
    """What the collectives of this rank have added up and gathered so far."""
    return (ranks.bytes_summed, ranks.bytes_gathered) if ranks is not None else (0, 0)


# ---- the rows ------------------------------------------------------------------------------------
class Group:
    """The processes of a contender, and the connection to its rank 0."""

    def __init__(self, contender: Contender, args: argparse.Namespace, folder: str):
        context = multiprocessing.get_context("spawn")  # a fork would inherit PyTorch's threads
        self.wire, theirs = context.Pipe()
        store = f"{folder}/{contender.size}.{contender.threads}"
        self.processes = [
            context.Process(target=serve, args=(theirs, rank, contender, args, store), daemon=True)
            for rank in range(contender.size)
        ]
        for process in self.processes:
            process.start()
        theirs.close()
        self.backend, self.dtype, self.weight_bytes, self.pool_bytes = self.wire.recv()

    def generate(self, batch: int) -> tuple[float, int, int]:
        """Seconds for one round, the bytes added up in it, and the bytes gathered."""
        self.wire.send(batch)
        return self.wire.recv()

    def end(self) -> None:
        """Let the processes end."""
        self.wire.send(None)
        for process in self.processes:
            process.join(30)


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """The rows of all contenders: memory, then each batch."""
    most = max(args.ranks)
    contenders = [Contender(1, 1), Contender(1, most), *(Contender(n, 1) for n in args.ranks)]
    with tempfile.TemporaryDirectory() as folder:
        groups = {contender: Group(contender, args, folder) for contender in contenders}
        for contender, group in groups.items():
            figures = {"weights a rank": group.weight_bytes, "pool a rank": group.pool_bytes}
            columns = columns_of(contender, group, args, f"blocks of {BLOCK_SIZE}")
            for metric, num_bytes in figures.items():
                yield Measurement.of([num_bytes], metric=metric, unit="bytes", **columns)
        for batch in args.batches:
            yield from rows_of_batch(batch, groups, args)
        for group in groups.values():
            group.end()


def rows_of_batch(batch: int, groups: dict[Contender, Group], args) -> Iterator[Measurement]:
    """The rows of so many requests at once. The contenders run in turn."""
    workload = f"batch={batch} prompt={PROMPT_TOKENS} new={args.new_tokens}"
    figures: dict[Contender, list] = {contender: [] for contender in groups}
    for round_number in range(args.rounds + 1):
        for contender, group in groups.items():
            figure = group.generate(batch)
            if round_number > 0:  # the first warms up
                figures[contender].append(figure)
    num_tokens = batch * args.new_tokens
    rates = {c: [num_tokens / seconds for seconds, *_ in of] for c, of in figures.items()}
    first = next(iter(groups))
    for contender, group in groups.items():
        columns = columns_of(contender, group, args, workload)
        rate = {"metric": "output tokens", "unit": "tokens/s"}
        yield Measurement.of(rates[contender], **rate, **columns)
        if contender != first:
            speed = {"metric": f"speed against {first.name}", "unit": "x"}
            yield Measurement.ratio_of(rates[contender], rates[first], **speed, **columns)
        if contender.size > 1:
            for i, name in ((1, "added up"), (2, "gathered")):
                each = [figure[i] / num_tokens for figure in figures[contender]]
                yield Measurement.of(
                    each, metric=f"bytes {name} an output token", unit="bytes", **columns
                )


def columns_of(contender: Contender, group: Group, args, workload: str) -> dict[str, Any]:
    """The columns that all rows of a contender have."""
    return {
        "experiment": "ranks",
        "contender": contender.name,
        "workload": workload,
        "backend": group.backend,
        "dtype": group.dtype,
        "threads": contender.size * contender.threads,
        "device": device_name("cpu"),
        "model": args.model,
        "weights": weights_kind(args.model),
    }
