"""Record a decode step as a CUDA graph once, then replay it with one call.

A decode step of the 124M GPT-2 is about 150 kernels. Python launches them one by one, and with few
sequences a kernel ends sooner than Python launches the next one, so the GPU waits. But each step
launches the same kernels. A CUDA graph is a recorded list of launches with all their arguments; one
call replays it. The arguments include addresses and shapes. So the inputs of each step are copied
to the addresses that they had during the recording, and 5 sequences run as a step of 8 rows:

    5 sequences      host memory, packed     device, packed         recorded for 8 rows
    token ids    ┐       ┌────────┐           ┌────────┐             ┌─────────────┐
    slots        ├ fill  │ 5 rows │ one copy  │ same   │  read there │ 150 kernels │   logits
    block tables ┘ ────> │ 3      │ ────────> │ address│ ──────────> │ one launch  │ ─> [:5]
                         │ padded │           │ always │             └─────────────┘
                         └────────┘           └────────┘
A padded row has a context of 0 tokens, so attention reads nothing for it, and its K and V are
written to the scratch block. Steps with prompts are not recorded: their numbers of tokens differ,
and they give the GPU enough work. The draw of the tokens can be recorded after the logits.

How it is checked: on a CPU, which has no graphs, a recording is a plain call. The same code fills
the same buffers there, and is compared with the plain forward (tests/speedups/test_cuda_graphs.py).
A production engine also keeps the inputs on the device from step to step, and records the steps of
prompts in pieces.

PyTorch: docs.pytorch.org, "CUDA semantics", section "CUDA Graphs".
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.device_memory import split_drawn
from kernels.triton_sampling import ROW_INPUTS, draw_tokens_triton, row_tensors
from kv_cache import Batch, KVCache
from sampling import LOW_32, SampleRows

# Numbers of rows that are recorded. A product takes the same time for 65 rows as for 128, and
# attention skips padded rows, so more sizes would save little. Each size takes a recording.
SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256)
# One sequence runs as 2 rows, one of them padding. PyTorch (up to 2.11) adds the bias and computes
# the GELU in the product's own kernel only for more than one row (`isInputCompliesAddmmCudaLt`).
# With one row a linear layer is two launches, and a step of GPT-2 197 instead of 149.
# `python benchmark.py ceilings` decides: it times a layer's products at 1 row and at 2. If 1 row
# takes no longer, this can be 1.
FEWEST_ROWS = 2
ALIGNMENT = 16  # bytes: from such an address a GPU's thread can load 16 bytes at a time


def recorded_sizes(max_num_seqs: int) -> list[int]:
    """The sizes to record for up to `max_num_seqs` sequences: 20 -> [2, 4, 8, 16, 20], 1 -> [2].

    Raises ValueError for fewer than 1.
    """
    if max_num_seqs < 1:
        raise ValueError(f"max_num_seqs is {max_num_seqs}: it must be at least 1")
    largest = max(max_num_seqs, FEWEST_ROWS)
    return [*(size for size in SIZES if FEWEST_ROWS <= size < largest), largest]


# ---- how to record, and how to copy --------------------------------------------------------------
class Calls:
    """The launcher on a device without graphs: a recorded function is called, a copy blocks."""

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The function to call instead of `function`: here the same one."""
        return function

    def send(self, target: Tensor, source: Tensor) -> None:
        """Copy from host memory to the device; (num_bytes,) uint8 both."""
        target.copy_(source)

    def wait(self) -> None:
        """Return when the source of the last copy may be overwritten."""


class Graphs:
    """The launcher on a GPU. All graphs share one memory pool, because no two run at a time.

    Use one object for `rehearse` and for the recordings after it, because libraries allocate a
    workspace for each stream on which they run. (PyTorch has 32 streams, used in turn.)
    """

    def __init__(self):
        self.memory = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()
        self.sent = torch.cuda.Event()  # recorded after each copy
        # When the last graph in a memory pool is freed, PyTorch refuses to record into that pool
        # again. So one graph is kept until there is another.
        self.last_graph: torch.cuda.CUDAGraph | None = None

    def record(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture the launches of a function; calling the result replays them.

        The function may not read a value from the device, and the tensors that it reads and writes
        must exist as long as the graph. The tensor that it returns lies in the graph's memory: each
        replay overwrites it and returns it again.
        """
        # The function runs twice before the capture: kernels are compiled and libraries allocate
        # workspaces, which they may not do during a capture. A workspace belongs to a stream, so
        # these runs are on the stream that captures.
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                function()
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # During the capture nothing is computed, but temporary tensors get the addresses that every
        # replay will use. "thread_local": calls to the GPU from other threads are no error.
        with torch.cuda.graph(graph, self.memory, self.stream, capture_error_mode="thread_local"):
            result = function()
        assert result.is_cuda, "the pool is on the GPU, the model is not"
        self.last_graph = graph

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def send(self, target: Tensor, source: Tensor) -> None:
        """Copy from pinned host memory in the stream's order; the host does not wait."""
        target.copy_(source, non_blocking=True)
        self.sent.record()

    def wait(self) -> None:
        """Return when the source of the last copy may be overwritten; usually that is at once."""
        if not self.sent.query():
            self.sent.synchronize()


def choose_launcher(device: torch.device) -> Calls | Graphs:
    """What records steps on a device."""
    return Graphs() if device.type == "cuda" else Calls()


# ---- the inputs of a step, packed ----------------------------------------------------------------
class PackedInput(NamedTuple):
    """Where one input lies in the packed bytes."""

    begin: int  # its first byte
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its length in bytes, without the gap to the next input."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_layout(
    size: int, max_blocks: int, draw_inputs: Iterable[str] = ()
) -> tuple[dict[str, PackedInput], int]:
    """Where the inputs of a step lie in packed bytes, by name, and how many bytes they are.

    The step has `size` rows with tables of `max_blocks` blocks. `draw_inputs` are names of
    ROW_INPUTS, the sampler's; here each gets "draw " before its name.
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
    layout: dict[str, PackedInput] = {}
    end = 0
    for name, (dtype, shape) in inputs.items():
        layout[name] = PackedInput(end, dtype, shape)
        end += -(-layout[name].num_bytes // ALIGNMENT) * ALIGNMENT  # 40 bytes take up 48
    return layout, end


def views_of(
    packed: Tensor,  # (num_bytes,) uint8
    layout: dict[str, PackedInput],
) -> dict[str, Tensor]:
    """The inputs as tensors that share the packed bytes; nothing is copied."""
    views = {}
    for name, field in layout.items():
        part = packed[field.begin : field.begin + field.num_bytes]
        views[name] = part.view(field.dtype).view(field.shape)
    return views


@dataclass
class RecordedStep:
    """A recorded decode step of one size."""

    host: dict[str, np.ndarray]  # its inputs in host memory, where each step is written
    batch: Batch  # its inputs on the device, where the recording reads them
    source: Tensor  # (num_bytes,) uint8: the bytes of `host`
    target: Tensor  # (num_bytes,) uint8: the bytes of `batch`
    replay: Callable[[], Tensor]  # -> logits (size, V)
    # How much of `host` the last batch filled. All rows and table columns after that are padding.
    num_rows: int
    num_columns: int


def run_and_draw(
    forward: Callable[[Batch], Tensor],
    batch: Batch,
    sampler: Callable[..., Tensor] | None,
    sampler_arguments: dict[str, Tensor],  # ROW_INPUTS and ROW_OUTPUTS, (size,) each
) -> Tensor:
    """The function that is recorded: logits (size, V), and the tokens if there is a sampler."""
    logits = forward(batch)
    if sampler is not None:
        sampler(logits, **sampler_arguments)
    return logits


class GraphForward:
    """A forward (see engine.py) that replays recorded decode steps and runs all others eagerly.

    `forward` is recorded, and runs the other steps. It must depend only on the batch, the model and
    the pool, and may not read a value from the device. `sizes` are the numbers of rows to record,
    `max_seq_len` is the longest context. The largest size is recorded first, so that the smaller
    ones fit into the memory that it has allocated; `progress` wraps the sizes in that order.
    `sampler`, a function like `sample_triton`, is recorded after the logits, so `decode` launches
    the draw with them; without it `decode` launches the draw separately. `launcher` None: the one
    of `choose_launcher`. Raises ValueError for no sizes, and for sizes or lengths below 1.

    Logits are valid until the next call: a step of any size may overwrite them, because the graphs
    share their memory. `drawn` (12 x the largest size,) uint8, on the device, holds the tokens and
    peaks of the last `decode`, so one copy brings both to the host (see `split_drawn`).
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
        self.forward = forward
        self.sizes = sorted(sizes)
        self.max_seq_len = max_seq_len
        self.max_blocks = -(-max_seq_len // cache.block_size)
        self.launcher = launcher or choose_launcher(device)
        self.sampler = sampler
        self.draw_inputs = tuple(ROW_INPUTS) if sampler else ()
        most_rows = self.sizes[-1]
        # The drawn tokens stay on the device: the next step can read them without the host.
        self.drawn = torch.zeros(12 * most_rows, dtype=torch.uint8, device=device)
        self.token_ids, self.peaks = split_drawn(self.drawn)
        # The inputs of a padded row.
        self.padding = {
            "input_ids": 0,
            "positions": 0,
            "slot_mapping": cache.scratch_block * cache.block_size,
            "context_lens": 0,
            "block_tables": cache.scratch_block,
        }
        # On the device all sizes share one buffer. The inputs of each size begin at its first byte,
        # and a step copies only the bytes that its size needs.
        _, num_bytes = plan_layout(most_rows, self.max_blocks, self.draw_inputs)
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
    def decode(self, batch: Batch, rows: SampleRows) -> tuple[Tensor, Tensor]:
        """The next tokens (M,) of the batch's sample rows, and their peaks (M,), without a wait.

        The result is that of `draw_tokens_triton` on the logits. The draw in a recorded step does
        not edit the logits: for rows with a bias, min_tokens or penalties call the object itself.
        Both tensors are views of `drawn`, which the next step overwrites. (If there are more rows
        than the largest recorded size, they are new tensors.)
        """
        size = self.recorded_size(batch)
        token_ids, peaks = self.token_ids[: len(rows)], self.peaks[: len(rows)]
        if size is not None and self.sampler is not None:
            self._replay(self.steps[size], batch, rows)
            return token_ids, peaks
        drawn = draw_tokens_triton(self(batch), rows)
        if len(rows) > len(token_ids):
            return drawn
        return token_ids.copy_(drawn[0]), peaks.copy_(drawn[1])

    def recorded_size(self, batch: Batch) -> int | None:
        """The size to replay for a batch, or None if it has to run eagerly.

        A recorded step is one in which every sequence adds one token and wants its logits. A batch
        that is on the GPU already runs eagerly: to read its sample rows the host would wait for the
        GPU. Only its token ids may be there, as drawn by the step before.
        """
        num_seqs = len(batch.context_lens)
        is_recorded = (
            # At most one token for each sequence, and as many tokens as sequences.
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
        target = self.packed[:num_bytes]
        source = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=target.is_cuda)
        host = {name: view.numpy() for name, view in views_of(source, layout).items()}
        views = views_of(target, layout)
        sampler_arguments = {name: views.pop(f"draw {name}") for name in self.draw_inputs}
        sampler_arguments |= {"out": self.token_ids[:size], "peaks": self.peaks[:size]}
        batch = Batch(
            **views,
            sample_rows=slice(None),  # all rows; indexing by a slice is a view, not a launch
            max_query_len=1,
            max_context_len=self.max_seq_len,  # an upper bound, the same in every step
        )
        for name, value in self.padding.items():
            host[name].fill(value)
        # A padded row has one query too, so a kernel sees a pure decode step.
        host["query_start_locs"][:] = np.arange(size + 1)
        # The runs before the capture read one token a row, in the scratch block. With a context of
        # 0 tokens they would not run all of the attention kernel.
        host["context_lens"].fill(1)
        self.launcher.wait()
        self.launcher.send(target, source)
        # `run` holds no reference to this object: a cycle would keep its memory from being freed
        # until the garbage collector runs.
        run = partial(run_and_draw, self.forward, batch, self.sampler, sampler_arguments)
        replay = self.launcher.record(run)
        return RecordedStep(host, batch, source, target, replay, num_rows=size, num_columns=0)

    def _replay(self, step: RecordedStep, batch: Batch, rows: SampleRows | None = None) -> Tensor:
        """Fill in a batch and replay: logits (size, V), padded rows too. `rows`: draw for them."""
        self.launcher.wait()  # the copy of the step before may still be reading the host's bytes
        if self.sampler is not None:
            self._fill_draws(step, rows or SampleRows([]))
        self._fill(step, batch)
        self.launcher.send(step.target, step.source)
        if batch.input_ids.device.type != "cpu":  # drawn by the step before, unknown to the host
            step.batch.input_ids[: len(batch.input_ids)] = batch.input_ids
        return step.replay()

    def _fill(self, step: RecordedStep, batch: Batch) -> None:
        """Write a batch's rows to `step.host`, and padding over the other rows of the last batch.

        5 rows after 7: rows 0 to 4 are written, rows 5 and 6 are padded. Row 7 is padded already.
        """
        num_rows = len(batch.context_lens)
        # A `reserve` function may have given a sequence more blocks than max_seq_len needs.
        tables = batch.block_tables.numpy()[:, : self.max_blocks]
        num_columns = tables.shape[1]
        for name in ("input_ids", "positions", "slot_mapping", "context_lens"):
            values = getattr(batch, name)
            if values.device.type == "cpu":
                step.host[name][:num_rows] = values.numpy()
        step.host["block_tables"][:num_rows, :num_columns] = tables
        scratch = self.padding["block_tables"]
        step.host["block_tables"][:num_rows, num_columns : step.num_columns] = scratch
        for name, value in self.padding.items():
            step.host[name][num_rows : step.num_rows] = value
        step.num_rows = num_rows
        step.num_columns = num_columns

    def _fill_draws(self, step: RecordedStep, rows: SampleRows) -> None:
        """Write what the sampler needs. Rows without a draw get zeros: temperature 0 is greedy."""
        # `row_tensors` lowers a top_k above the vocabulary's size. The size is not known here, so
        # the largest int32 takes its place.
        columns = row_tensors(rows, LOW_32 >> 1, torch.device("cpu"))
        for name, column in zip(self.draw_inputs, columns, strict=True):
            values = step.host[f"draw {name}"]
            values[: len(rows)] = column.numpy()
            values[len(rows) : step.num_rows] = 0


@torch.inference_mode()
def rehearse(
    cache: KVCache,
    forward: Callable[[Batch], Tensor],
    sizes: list[int],
    max_seq_len: int,
    launcher: Calls | Graphs,
) -> tuple[GraphForward, Tensor]:
    """Hold the memory that recording all sizes will take, for as long as the result is kept.

    `llm.py` measures the free memory in that time. `cache` may have one block; `launcher` is the
    one that will record. Only the largest size is recorded, because the smaller ones will use the
    memory that it has allocated. But each size keeps its own logits, so the second result has room
    for them: (the sum of the other sizes, V), or the padded V.
    """
    largest = GraphForward(cache, forward, [max(sizes)], max_seq_len, launcher)
    logits = largest.steps[max(sizes)].replay()  # (largest size, V)
    # The row stride is V, or more where the head is padded (kernels/padded_head.py).
    return largest, logits.new_empty(sum(sizes) - max(sizes), logits.stride(0))
