"""Record a decode step once, replay it without Python.

A decode step of the 124M GPT-2 is about 150 small kernels. Python asks the GPU for them one by one,
and with few sequences each is done sooner than the next is asked for. But it is the same list every
time. A CUDA graph is that list, recorded with all arguments and launched by one call. So nothing
may move: the inputs have to lie where they lay when they were recorded, which takes one copy a
step, and there are as many rows as there were then:

    5 sequences      host memory, packed     device, packed         recorded for 8 rows
    token ids    ┐       ┌────────┐           ┌────────┐             ┌─────────────┐
    slots        ├ fill  │ 5 rows │ one copy  │ always │  read there │ 150 kernels │   logits
    block tables ┘ ────> │ 3      │ ────────> │ in one │ ──────────> │ one launch  │ ─> [:5]
                         │ padded │           │ place  │             └─────────────┘
                         └────────┘           └────────┘
A padded row has a context of 0 tokens, so it reads nothing, and writes to the scratch block. Steps
with prompts in them are not recorded: they have any number of tokens, and give the GPU so much to
do that Python keeps up. A recording is only a faster call: on a CPU, which has no graphs, the same
code fills the same buffers and calls the function. The draw of the tokens can be recorded behind
the logits, and then a step can begin before the host has seen the tokens of the one before. What a
production engine does beyond this: keeps all inputs on the device from step to step, records the
steps of prompts in pieces.

PyTorch: docs.pytorch.org, "CUDA semantics", section "CUDA Graphs".
Run: python -m speedups.cuda_graphs
Try: SIZES = (1, 64) (fewer recordings, more padded rows); or let `_clear` pass over slot_mapping
and see in the tests whose tokens the padded rows then overwrite.
"""

import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.triton_decode import paged_attention_triton
from kernels.triton_prefill import write_kv_triton
from kernels.triton_sampling import ROW_INPUTS, draw_tokens_triton, row_tensors
from kv_cache import Batch, KVCache, Row, make_batch, write_kv
from model import GPT, GPTConfig
from paged_attention import paged_attention
from sampling import LOW_32, SampleRow

# Rows that are recorded. Products cost the same between multiples of 64, and a padded row leaves
# attention at once: sizes closer to each other would win little, and each takes a recording.
SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256)
ALIGNMENT = 16  # bytes: from such an address on, a GPU's thread loads as many at once


def recorded_sizes(max_num_seqs: int) -> list[int]:
    """The sizes for steps of up to `max_num_seqs` sequences: 20 -> [1, 2, 4, 8, 16, 20].

    Raises ValueError for fewer than 1.
    """
    if max_num_seqs < 1:
        raise ValueError(f"max_num_seqs is {max_num_seqs}: it must be at least 1")
    return [*(size for size in SIZES if size < max_num_seqs), max_num_seqs]


# ---- how to record, and how to copy --------------------------------------------------------------
class Calls:
    """Where there are no graphs: a recorded function is the function, a copy is done on return."""

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What to call instead of the function."""
        return function

    def send(self, target: Tensor, source: Tensor) -> None:
        """Copy from host memory to the device."""
        target.copy_(source)

    def wait(self) -> None:
        """Return when the last copy's source may be written again."""


class Graphs:
    """CUDA's graphs. All share one pool of memory: no two of them ever run at the same time."""

    def __init__(self):
        self.memory = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()
        self.sent = torch.cuda.Event()

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record what a function launches; calling the result launches it again.

        The function may read no value from the device, and the tensors that it works on must
        outlive the recording. What it returned lies in the recording's own memory: each replay
        returns the same tensor, written anew.
        """
        # Beforehand it runs twice as it is: kernels are compiled and libraries take their
        # workspaces, which they may not do while recording. Those belong to a stream, so it is
        # the stream that records.
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                function()
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # Nothing is computed in here. Temporary tensors get addresses all the same, and keep them.
        # "thread_local": what other threads ask of the GPU meanwhile is no mistake.
        with torch.cuda.graph(graph, self.memory, self.stream, capture_error_mode="thread_local"):
            result = function()
        assert result.is_cuda, "the pool is on the GPU, the model is not"

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def send(self, target: Tensor, source: Tensor) -> None:
        """Copy from pinned host memory, in the order of the stream; the host does not wait."""
        target.copy_(source, non_blocking=True)
        self.sent.record()

    def wait(self) -> None:
        """Return when the last copy's source may be written again: as a rule at once."""
        if not self.sent.query():
            self.sent.synchronize()


# ---- the inputs of a step, packed ----------------------------------------------------------------
def plan_layout(
    size: int, max_blocks: int, draw_inputs: Iterable[str] = ()
) -> tuple[dict[str, tuple], int]:
    """Where the inputs of a step lie in packed bytes, and how many bytes they are together.

    name -> (first byte, dtype, shape), for `size` rows with tables of `max_blocks` blocks.
    `draw_inputs` are the names of what a sampler wants to know of each row.
    """
    inputs = {
        "input_ids": (torch.int64, (size,)),
        "positions": (torch.int64, (size,)),
        "slot_mapping": (torch.int64, (size,)),
        "context_lens": (torch.int32, (size,)),
        "query_start_locs": (torch.int32, (size + 1,)),
        "block_tables": (torch.int32, (size, max_blocks)),
    }
    inputs |= {f"draw {name}": (ROW_INPUTS[name][0], (size,)) for name in draw_inputs}
    layout, end = {}, 0
    for name, (dtype, shape) in inputs.items():
        layout[name] = (end, dtype, shape)
        end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return layout, end


def views_of(packed: Tensor, layout: dict[str, tuple]) -> dict[str, Tensor]:
    """The inputs as tensors in packed bytes (num_bytes,) uint8: nothing is copied."""
    views = {}
    for name, (begin, dtype, shape) in layout.items():
        part = packed[begin : begin + math.prod(shape) * dtype.itemsize]
        views[name] = part.view(dtype).view(shape)
    return views


class RecordedStep(NamedTuple):
    """A decode step of one size."""

    host: dict[str, np.ndarray]  # its inputs in host memory, where each step is written
    batch: Batch  # the same on the device, where the recording reads them
    source: Tensor  # (num_bytes,) uint8: the bytes of `host`, one copy
    target: Tensor  # (num_bytes,) uint8: the bytes of `batch`
    replay: Callable[[], Tensor]  # -> logits (size, V)


def run_and_draw(
    forward: Callable[[Batch], Tensor],
    batch: Batch,
    sampler: Callable[..., Tensor] | None,
    to_draw: dict[str, Tensor],
) -> Tensor:
    """What is recorded: logits (size, V), and the tokens drawn from them if there is a sampler."""
    logits = forward(batch)
    if sampler is not None:
        sampler(logits, **to_draw)
    return logits


class GraphForward:
    """A forward (see `engine.py`) that replays decode steps and hands all others on.

    `forward` is both what is recorded and what runs the rest; any function of a batch will do that
    reads nothing but the batch, the model and the pool, and asks the device for no value.
    `sizes` are the numbers of rows to record and `max_seq_len` is the longest context; `progress`
    wraps the sizes while they are recorded, largest first, so that the smaller ones find room in
    the memory that it took. `sampler`, a function like `sample_triton`, is recorded behind the
    logits, for `decode`. Raises ValueError for sizes or lengths below 1.

    On a GPU the logits of a replay are overwritten by the next step of the same size.
    """

    @torch.inference_mode()
    def __init__(
        self,
        cache: KVCache,
        forward: Callable[[Batch], Tensor],
        sizes: list[int],
        max_seq_len: int,
        launcher: Calls | Graphs | None = None,
        progress: Callable[[list[int]], Iterable[int]] = iter,
        sampler: Callable[..., Tensor] | None = None,
    ):
        if not sizes or min(*sizes, max_seq_len) < 1:
            given = f"sizes are {sizes}, max_seq_len is {max_seq_len}"
            raise ValueError(f"{given}: give at least one size, and none below 1")
        device = cache.pool.device
        on_gpu = device.type == "cuda"
        self.forward, self.sizes, self.max_seq_len = forward, sorted(sizes), max_seq_len
        self.launcher = launcher or (Graphs() if on_gpu else Calls())
        self.max_blocks = -(-max_seq_len // cache.block_size)
        self.sampler, self.draw_inputs = sampler, tuple(ROW_INPUTS) if sampler else ()
        # What was drawn: the next step may take its tokens from here without asking the host.
        self.token_ids = torch.zeros(self.sizes[-1], dtype=torch.int64, device=device)
        self.peaks = torch.zeros(self.sizes[-1], dtype=torch.float32, device=device)
        # What a padded row holds: it reads nothing, and writes its K and V to scratch.
        self.padding = {
            "input_ids": 0,
            "positions": 0,
            "slot_mapping": cache.scratch_block * cache.block_size,
            "context_lens": 0,
            "block_tables": cache.scratch_block,
        }
        # All sizes share one buffer, each from its first byte on: a step copies what it needs.
        num_bytes = plan_layout(self.sizes[-1], self.max_blocks, self.draw_inputs)[1]
        self.packed_host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self.packed = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.steps = {size: self._record(size) for size in progress(self.sizes[::-1])}

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        """Logits (M, V) of the batch's sample rows."""
        size = self.recorded_size(batch)
        if size is None:
            return self.forward(batch)
        return self._replay(self.steps[size], batch)[: len(batch.context_lens)]

    @torch.inference_mode()
    def decode(self, batch: Batch, rows: list[SampleRow]) -> tuple[Tensor, Tensor]:
        """The next tokens (M,) of the batch's sample rows, and their peaks (M,), without a wait.

        As `draw_tokens_triton` of the logits; where the step was recorded, so was the draw. It
        takes logits as they are: rows with a bias or penalties are for `__call__`. What it returns
        is overwritten by the next step.
        """
        size = self.recorded_size(batch)
        if size is None or self.sampler is None:
            return draw_tokens_triton(self(batch), rows)
        self._replay(self.steps[size], batch, rows)
        return self.token_ids[: len(rows)], self.peaks[: len(rows)]

    def recorded_size(self, batch: Batch) -> int | None:
        """The size whose recording serves a batch; None for one that has to run as it is.

        What was recorded is a step in which every sequence adds one token and wants its logits. (A
        batch that somebody took to a GPU already runs as it is: looking into it would stop both.
        The token ids alone may be there, drawn by the step before.)
        """
        num_seqs = len(batch.context_lens)
        is_recorded = (
            # One row for each at most, and as many rows as sequences: one for each.
            batch.max_query_len == 1
            and len(batch.input_ids) == num_seqs <= self.sizes[-1]
            and batch.max_context_len <= self.max_seq_len
            and batch.positions.device.type == "cpu"
            and np.array_equal(batch.sample_rows.numpy(), np.arange(num_seqs))
        )
        # 5 sequences -> size 8
        return self.sizes[bisect_left(self.sizes, num_seqs)] if is_recorded else None

    def _record(self, size: int) -> RecordedStep:
        layout, num_bytes = plan_layout(size, self.max_blocks, self.draw_inputs)
        source, target = self.packed_host[:num_bytes], self.packed[:num_bytes]
        host = {name: view.numpy() for name, view in views_of(source, layout).items()}
        views = views_of(target, layout)
        to_draw = {name: views.pop(f"draw {name}") for name in self.draw_inputs}
        batch = Batch(
            **views,
            sample_rows=slice(None),  # all of them; a slice is a view, an index one more launch
            max_query_len=1,
            max_context_len=self.max_seq_len,  # upper bounds are allowed, and this one never moves
        )
        self.launcher.wait()
        self._clear(host)
        # The runs before the recording read one token a row, of the scratch block: with contexts of
        # 0 tokens they would prove little.
        host["context_lens"].fill(1)
        self.launcher.send(target, source)
        to_draw |= {"out": self.token_ids[:size], "peaks": self.peaks[:size]}
        # Bound to what it needs and not to this object, which would then never be freed by itself.
        run = partial(run_and_draw, self.forward, batch, self.sampler, to_draw)
        return RecordedStep(host, batch, source, target, self.launcher.record(run))

    def _replay(self, step: RecordedStep, batch: Batch, rows: list[SampleRow] | None = None):
        """Logits (size, V) of a batch's rows and the padded ones; `rows` if tokens are wanted."""
        self.launcher.wait()  # the step before may be the GPU's still, and its inputs on their way
        self._fill(step.host, batch)
        if rows is not None:
            columns = row_tensors(rows, LOW_32 >> 1, torch.device("cpu"))
            for name, column in zip(self.draw_inputs, columns, strict=True):
                step.host[f"draw {name}"][: len(rows)] = column.numpy()
        self.launcher.send(step.target, step.source)
        if batch.input_ids.device.type != "cpu":  # drawn a step ago, and never on the host
            step.batch.input_ids[: len(batch.input_ids)] = batch.input_ids
        return step.replay()

    def _clear(self, host: dict[str, np.ndarray]) -> None:
        """Make all rows padded ones."""
        for name, value in self.padding.items():
            host[name].fill(value)
        for name in self.draw_inputs:
            host[f"draw {name}"].fill(0)  # greedy: a temperature of 0
        # They too have one query each: as many rows as sequences means a pure decode step.
        host["query_start_locs"][:] = np.arange(len(host["query_start_locs"]))

    def _fill(self, host: dict[str, np.ndarray], batch: Batch) -> None:
        """Write a batch's rows over the first rows of cleared inputs."""
        self._clear(host)
        for name in ("input_ids", "positions", "slot_mapping", "context_lens"):
            values = getattr(batch, name)
            if values.device.type == "cpu":
                host[name][: len(values)] = values.numpy()
        # A reservation may have given a sequence more blocks than it can ever read.
        tables = batch.block_tables.numpy()[:, : self.max_blocks]
        host["block_tables"][: tables.shape[0], : tables.shape[1]] = tables


@torch.inference_mode()
def rehearse(
    cache: KVCache, forward: Callable[[Batch], Tensor], sizes: list[int], max_seq_len: int
) -> tuple[GraphForward, Tensor]:
    """Hold as much memory as recording all sizes will take, for as long as the result is kept.

    `cache` may be of one block. Only the largest size is recorded, because the others will work in
    the memory that it took; but each keeps its own logits, and room for them is held too.
    """
    largest = GraphForward(cache, forward, [max(sizes)], max_seq_len)
    logits = largest.steps[max(sizes)].replay()  # (largest size, V)
    return largest, logits.new_empty(sum(sizes) - max(sizes), logits.shape[1])


# --------------------------------------------------------------------------------------------------
def median_ms(forward: Callable[[Batch], Tensor], batch: Batch) -> float:
    """Milliseconds of a step until its logits are there, the median of 30."""
    taken = []
    for _ in range(30):
        started = time.perf_counter()
        forward(batch)[0, 0].item()  # asks for a value, and so waits for the device
        taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(taken)


def demo():
    """Sequences join and leave: which steps are replayed, what is copied, and the same logits."""
    from engine import eager_forward  # for the demo alone: recording needs no engine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    kernels = (paged_attention_triton, write_kv_triton) if on_gpu else (paged_attention, write_kv)
    model = GPT(GPTConfig(vocab_size=97, max_seq_len=64, n_layer=2, n_head=2, n_embd=32))
    model.init_weights(std=0.2).double().to(device).requires_grad_(False).eval()
    caches = [KVCache(2, 40, 4, 2, 16, torch.float64, device) for _ in range(2)]
    eager, recorded = (eager_forward(model, cache, *kernels) for cache in caches)
    graphs = GraphForward(caches[1], recorded, recorded_sizes(8), max_seq_len=64)

    texts = {name: list(range(7 * i + 1, 9 * i + 4)) for i, name in enumerate("ABCDE")}
    tables = {name: list(range(i, 40, 5)) for i, name in enumerate(texts)}  # 8 blocks of 4 each
    computed = dict.fromkeys(texts, 0)
    print("step  sequences  tokens   runs as          bytes copied   next tokens")
    steps = ["ABC"] * 3 + ["ABCDE"] * 4 + ["BDE"] * 2 + ["E"] * 2
    for number, names in enumerate(steps, 1):
        starts = [(n, computed[n]) for n in names]  # the whole prompt, or the newest token
        rows = [Row(texts[n], start, len(texts[n]) - start, tables[n], 1) for n, start in starts]
        batch = make_batch(rows, block_size=4, scratch_block=40)
        want, got = eager(batch), graphs(batch)  # (B, 97) both
        assert (want - got).abs().max() < 1e-9
        chosen = got.argmax(-1).tolist()
        for name, token_id in zip(names, chosen, strict=True):
            computed[name] = len(texts[name])
            texts[name].append(token_id)
        size = graphs.recorded_size(batch)
        how = "eager" if size is None else f"replay, rows: {size}"
        copied = "-" if size is None else len(graphs.steps[size].source)
        print(f"{number:4}  {names:9}  {len(batch.input_ids):6}   {how:18}{copied:>8}     {chosen}")

    if on_gpu:  # elsewhere a recording is a plain call, and there is nothing to win
        taken = [median_ms(forward, batch) for forward in (eager, graphs)]
        print(f"one sequence: {taken[0]:.3f} ms eagerly, {taken[1]:.3f} ms replayed")
    assert {step.target.data_ptr() for step in graphs.steps.values()} == {graphs.packed.data_ptr()}
    print("ok: the same tokens, from inputs that never move")


if __name__ == "__main__":
    demo()
