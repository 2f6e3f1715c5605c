"""What fewer bits cost: the loss on held-out tales, the logits, the tokens, beside the speed.

Each setting computes the same windows of the same tales, and its logits are compared with those of
float32, row by row. The logits come from the engine's own forward: a window is computed in chunks,
each writes its keys and values to the pool, and attention reads them there, in fewer bits.

    loss       nats per character of the tales that the shipped model has never seen
    logits     the root mean square of their distance from float32's, and how often another token is
               the most likely one
    tokens     greedy texts of the tales' beginnings: tokens before a text's first difference
    speed      a decode step of GPT-2's shape, settings in turn: milliseconds, and against float32

The tales are those of `checkpoints/train_tiny.py`: every thirtieth is held out, whole. A tale
longer than the context is read in windows that overlap by half, and each token is counted once,
where it sees more of its past. So the figure of float32 is the one that the training program wrote.

    python benchmark.py quality --text FOLDER    (or PAGEDGPT_DATA, with the texts under text/)
"""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints.train_tiny import split_tales
from experiments.ceilings import Columns
from experiments.results import Measurement, device_name
from experiments.speed import equal_start, model_columns, threads_for
from kernels.backends import BACKENDS
from kv_cache import Row, make_batch
from llm import LLM, SHIPPED_MODEL, SamplingParams

BLOCK_SIZE = 16
BASE = "float32"


class Setting(NamedTuple):
    """One way to keep weights, keys and values."""

    dtype: str
    options: dict[str, Any]  # of LLM


SETTINGS = {
    BASE: Setting("float32", {}),
    "bfloat16": Setting("bfloat16", {}),
    "int8 pool": Setting("float32", {"kv_cache_dtype": "int8"}),
    "bfloat16, int8 pool": Setting("bfloat16", {"kv_cache_dtype": "int8"}),
    "int8 weights": Setting("float32", {"weights": "int8"}),
    "int8 weights, int8 pool": Setting("float32", {"weights": "int8", "kv_cache_dtype": "int8"}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment's flags."""
    add = parser.add_argument
    add("--text", type=Path, help="the tales; default: text/ in the folder PAGEDGPT_DATA")
    add("--settings", nargs="+", choices=[*SETTINGS], default=[*SETTINGS], help="default: all")
    add("--tales", type=int, help="so many of the held-out tales; default: all; 0: speed alone")
    add("--chunk", type=int, default=128, help="tokens of a window that are computed at once")
    add("--new-tokens", type=int, default=64, help="tokens: of each text")
    add("--model", default=str(SHIPPED_MODEL), help="the model of the loss and of the tokens")
    add("--speed-model", default="random:gpt2", help="the model of the speed")
    add("--batches", type=int, nargs="*", default=[1, 8, 32], help="speed: sequences")
    add("--contexts", type=int, nargs="*", default=[1000, 1000, 256], help="speed: tokens of each")
    add("--rounds", type=int, default=7, help="speed: rounds, each times every setting")
    add("--backend", default="auto", choices=["auto", *BACKENDS], help="the kernels")
    add("--threads", type=int, help="of the CPU; default: 1 for the shipped model, else all")


# ---- through the pool ----------------------------------------------------------------------------
def build(name: str, model: str, num_tokens: int, args: argparse.Namespace, **options) -> LLM:
    """An engine of this setting, with room for so many tokens."""
    setting = SETTINGS[name]
    return LLM(
        model,
        device="cpu",
        dtype=setting.dtype,
        backend=args.backend,
        block_size=BLOCK_SIZE,
        num_blocks=-(-num_tokens // BLOCK_SIZE),
        enable_prefix_caching=False,
        **setting.options | options,
    )


@torch.inference_mode()
def logits_of(llm: LLM, window: list[int], chunk: int) -> Tensor:
    """The logits (T, V) of a window of T tokens, in float32, computed `chunk` tokens at a time."""
    cache = llm.engine.cache
    table = list(range(-(-len(window) // BLOCK_SIZE)))
    parts = []
    for start in range(0, len(window), chunk):
        count = min(chunk, len(window) - start)
        batch = make_batch(
            [Row(window, start, count, table, count)], BLOCK_SIZE, cache.scratch_block
        )
        parts.append(llm.engine.forward(batch).float())
    return torch.cat(parts)


class Windows:
    """The held-out tales, cut into windows as the training program cuts them."""

    def __init__(self, llm: LLM, tales: list[str], max_seq_len: int):
        stride = max(1, max_seq_len // 2)
        overlap = max_seq_len - stride
        self.num_characters = sum(map(len, tales))
        # Pairs of token ids and how many of their first targets an earlier window has counted.
        self.pairs: list[tuple[list[int], int]] = []
        for tale in tales:
            ids = [llm.tokenizer.eos_token_id, *llm.tokenizer.encode(tale)]
            for start in range(0, max(1, len(ids) - 1 - overlap), stride):
                self.pairs.append((ids[start : start + max_seq_len + 1], overlap if start else 0))


class Sums:
    """What the windows of one setting add up to."""

    def __init__(self) -> None:
        self.nats = 0.0
        self.squares = 0.0  # of the distances of all logits from float32's
        self.num_logits = 0
        self.num_changed = 0  # rows in which another token is the most likely one
        self.num_rows = 0

    def add(self, logits: Tensor, exact: Tensor, targets: Tensor, num_counted: int) -> None:
        """Add one window; the first `num_counted` targets were counted before."""
        losses = F.cross_entropy(logits, targets, reduction="none")[num_counted:]
        self.nats += losses.double().sum().item()
        distance = (logits - exact)[num_counted:]
        self.squares += distance.double().square().sum().item()
        self.num_logits += distance.numel()
        changed = logits.argmax(-1) != exact.argmax(-1)
        self.num_changed += int(changed[num_counted:].sum())
        self.num_rows += len(distance)


# ---- loss, logits, tokens ------------------------------------------------------------------------
def held_out_tales(args: argparse.Namespace) -> list[str]:
    """The tales that the shipped model was not trained on. Raises ValueError without texts."""
    folder = args.text
    if folder is None:
        data = os.environ.get("PAGEDGPT_DATA")
        folder = Path(data) / "text" if data else None
    if folder is None or not folder.is_dir():
        raise ValueError(f"no tales in {folder}: name their folder with --text, or PAGEDGPT_DATA")
    _, held_out, _ = split_tales(argparse.Namespace(text=folder, skip=["tinyshakespeare.txt"]))
    return held_out[: args.tales]


def rows_of_loss(args: argparse.Namespace, tales: list[str]) -> Iterator[Measurement]:
    """Loss, logits and tokens of each setting."""
    names = [BASE, *(name for name in args.settings if name != BASE)]
    llms = {name: build(name, args.model, 1024, args) for name in names}
    max_seq_len = llms[BASE].max_seq_len
    windows = Windows(llms[BASE], tales, max_seq_len)
    sums = {name: Sums() for name in names}
    for ids, num_counted in windows.pairs:
        targets = torch.tensor(ids[1:])
        exact = logits_of(llms[BASE], ids[:-1], args.chunk)
        for name in names:
            logits = exact if name == BASE else logits_of(llms[name], ids[:-1], args.chunk)
            sums[name].add(logits, exact, targets, num_counted)
    common = {"experiment": "quality", "workload": f"held-out tales={len(tales)}"}
    for name in names:
        total = sums[name]
        columns = common | columns_of(name, llms[name], args.model)
        nats = total.nats / windows.num_characters
        yield one("loss", nats, "nats/character", columns)
        lost = (total.nats - sums[BASE].nats) / windows.num_characters
        yield one(f"loss above {BASE}", lost, "nats/character", columns)
        distance = (total.squares / total.num_logits) ** 0.5
        yield one("distance of the logits", distance, "rms", columns)
        changed = 100 * total.num_changed / total.num_rows
        yield one("most likely token changed", changed, "%", columns)


def rows_of_tokens(args: argparse.Namespace, tales: list[str]) -> Iterator[Measurement]:
    """Greedy texts that continue the tales' first 64 tokens, against float32's."""
    params = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)
    texts: dict[str, list[list[int]]] = {}
    for name in [BASE, *(name for name in args.settings if name != BASE)]:
        llm = build(name, args.model, len(tales) * (80 + args.new_tokens), args)
        prompts = [llm.tokenizer.encode(tale)[:64] for tale in tales]
        texts[name] = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        columns = {"experiment": "quality"} | columns_of(name, llm, args.model)
        columns["workload"] = f"greedy texts={len(tales)} prompt=64 new={args.new_tokens}"
        equal = equal_start(texts[name], texts[BASE])
        yield one("tokens before the first difference", equal, "%", columns)
        changed = sum(a != b for a, b in zip(texts[name], texts[BASE], strict=True))
        yield one("texts that change", changed, "texts", columns)


# ---- speed ---------------------------------------------------------------------------------------
def rows_of_speed(args: argparse.Namespace) -> Iterator[Measurement]:
    """A decode step's forward in each setting, settings in turn; and bytes of a token."""
    shapes = list(zip(args.batches, args.contexts, strict=True))
    if not shapes:
        return
    most = max(batch * context for batch, context in shapes)
    llms = {}
    for name in [BASE, *(name for name in args.settings if name != BASE)]:
        num_tokens = most + BLOCK_SIZE * max(args.batches)
        llms[name] = build(name, args.speed_model, num_tokens, args)
    for batch, context in shapes:
        times: dict[str, list[float]] = {name: [] for name in llms}
        for number in range(args.rounds + 2):
            for name, llm in llms.items():
                ms = time_step(llm, batch, context)
                if number > 1:  # two rounds warm up
                    times[name].append(ms)
        for name, llm in llms.items():
            columns = {"experiment": "quality"} | columns_of(name, llm, args.speed_model)
            columns["workload"] = f"decode batch={batch} context={context}"
            yield Measurement.of(times[name], metric="time a step", unit="ms", **columns)
            if name != BASE:
                against = {"metric": f"speed against {BASE}", "unit": "x"}
                yield Measurement.ratio_of(times[BASE], times[name], **against, **columns)
    for name, llm in llms.items():
        columns = {"experiment": "quality"} | columns_of(name, llm, args.speed_model)
        token_bytes = llm.engine.cache.pool[:, 0].nbytes / BLOCK_SIZE
        yield one("KV of a token", token_bytes, "bytes", columns | {"workload": "pool"})


@torch.inference_mode()
def time_step(llm: LLM, batch: int, context: int) -> float:
    """Milliseconds of one decode step over contexts of so many tokens; the pool is all zeros."""
    blocks_each = -(-context // BLOCK_SIZE)
    tables = torch.arange(batch * blocks_each).view(batch, -1).tolist()
    rows = [Row([1] * context, context - 1, 1, table, 1) for table in tables]
    inputs = make_batch(rows, BLOCK_SIZE, llm.engine.cache.scratch_block)
    begun = time.perf_counter()
    llm.engine.forward(inputs)
    return (time.perf_counter() - begun) * 1e3


# ---- rows ----------------------------------------------------------------------------------------
def columns_of(name: str, llm: LLM, model: str) -> Columns:
    """The columns that name a setting."""
    return {
        "contender": name,
        "backend": llm.backend,
        "dtype": str(llm.dtype)[6:],
        "threads": torch.get_num_threads(),
        "device": device_name("cpu"),
        **model_columns(model),
    }


def one(metric: str, value: float, unit: str, columns: Columns) -> Measurement:
    """The row of a figure that is the same in every run."""
    return Measurement.of([value], metric=metric, unit=unit, **columns)


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of the experiment."""
    if len(args.batches) != len(args.contexts):
        sizes = f"{len(args.batches)} batches and {len(args.contexts)} contexts"
        raise ValueError(f"{sizes}: give a context for each batch")
    tales = [] if args.tales == 0 else held_out_tales(args)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads_for(args.model, args.threads))
    try:
        if tales:
            yield from rows_of_loss(args, tales)
            yield from rows_of_tokens(args, tales)
        yield from rows_of_speed(args)
    finally:
        torch.set_num_threads(threads_before)
