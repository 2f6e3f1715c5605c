"""The ways to run a decode step that latency.py times: engines of ours, and a compiled peer.

Each of ours is an engine built from its parts, and only its forward differs: what Python asks for
kernel by kernel, or a recording of it; the model as it is written, or joined into fewer launches;
blocks, or slabs. A slab is a block as long as a sequence may get, read by the same kernel through a
table with one entry: what then differs is paging alone. All contenders share two pools, because
they run one after the other and each begins with prompts.

Equal work is checked before anything is timed: `fill_and_step` computes prompts into a pool full of
NaN and then one step, and `check_equal` holds the logits of all contenders against the first one's.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from block_allocator import BlockAllocator
from engine import Forward, InferenceEngine, eager_forward
from experiments import peers
from experiments.transformers_loop import Theirs
from kernels.backends import BACKENDS, can_record
from kernels.device_memory import preallocate
from kernels.triton_fused import can_fuse, fused_forward
from kernels.triton_sampling import draw_tokens_triton
from kernels.triton_small_linear import MOST_ROWS
from kv_cache import Batch, KVCache, Row, make_batch
from model import GPT
from sampling import draw_tokens
from scheduler import Scheduler
from speedups.cuda_graphs import GraphForward, recorded_sizes

EAGER, RECORDED, FUSED = "eager", "recorded", "recorded, fused"
SMALL, CONTIGUOUS = "recorded, fused, small linears", "recorded, contiguous"
DYNAMIC, COMPILED = peers.THEIRS, "transformers StaticCache, compiled"
# What the flag calls them: each is an engine of ours, or another one's.
OURS = {"eager": EAGER, "recorded": RECORDED, "fused": FUSED, "small": SMALL}
OURS |= {"contiguous": CONTIGUOUS}
PEERS = {"transformers": DYNAMIC, "compiled": COMPILED}
MOST_PROMPT_TOKENS = 2**16  # in one forward that fills the pool


# ---- who runs ------------------------------------------------------------------------------------
def why_not(name: str, model: GPT, device: torch.device) -> str | None:
    """Why a contender can't run here, in a few words; None if it can."""
    if name in (FUSED, SMALL):
        return can_fuse(model)
    if name in PEERS.values() and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if name == COMPILED and device.type == "cpu":
        return "what torch.compile records are a GPU's graphs"
    return None


def choose(args: argparse.Namespace, model: GPT) -> tuple[list[str], list[str]]:
    """Ours and the peers that were asked for and run here; of the others it is said why not.

    Raises ValueError where nobody of ours is left to run all batches.
    """
    ours, others = [], []
    for word in args.contenders:
        name = (OURS | PEERS)[word]
        if reason := why_not(name, model, args.device):
            print(f"{name} is left out: {reason}", file=sys.stderr)
        else:
            (ours if word in OURS else others).append(name)
    if not ours:
        raise ValueError(f"{', '.join(args.contenders)}: none of ours is among them and runs here")
    if ours == [SMALL] and max(args.batches) > MOST_ROWS:
        limits = f"small linears serve {MOST_ROWS} rows, a batch has {max(args.batches)}"
        raise ValueError(f"{limits}: name another contender too")
    return ours, others


# ---- ours ----------------------------------------------------------------------------------------
class Contender(NamedTuple):
    """An engine of ours; `peers.Ours` drives it as it drives an `LLM`, through `engine`."""

    engine: InferenceEngine
    most_rows: int  # sequences in a step
    recording: tuple[float, float] | None  # seconds and MB that recording took, on a GPU


def make_pools(model: GPT, args: argparse.Namespace) -> dict[bool, KVCache]:
    """The pool of blocks (False) and that of slabs (True), for all batches and contexts."""
    shape, pools = model.config, {}
    for slabs in (False, True):
        block_size = shape.max_seq_len if slabs else args.block_size
        num_blocks = max(args.batches) * -(-max(args.contexts) // block_size)
        sizes = shape.n_layer, num_blocks, block_size, shape.n_head, shape.head_dim
        pools[slabs] = KVCache(*sizes, args.dtype, args.device, preallocate)
    return pools


@torch.inference_mode()
def build(name: str, model: GPT, cache: KVCache, args: argparse.Namespace) -> Contender:
    """An engine over a pool, with the contender's forward: recorded here, in all sizes."""
    kernels, max_seq_len = BACKENDS[args.backend], model.config.max_seq_len
    most_rows, recording = max(args.batches), None
    forward: Forward = eager_forward(model, cache, kernels.paged_attention, kernels.write_kv)
    if name in (FUSED, SMALL):
        few_rows = MOST_ROWS if name == SMALL else 0
        forward = fused_forward(model, cache, forward, few_rows)
        most_rows = min(most_rows, MOST_ROWS) if name == SMALL else most_rows
    if name != EAGER:
        free, started = free_bytes(args.device), time.perf_counter()
        forward = GraphForward(cache, forward, recorded_sizes(most_rows), max_seq_len)
        if args.device.type == "cuda":  # elsewhere nothing was recorded
            taken = free - free_bytes(args.device)  # which waits for the device
            recording = time.perf_counter() - started, taken / 1e6
    allocator = BlockAllocator(cache.scratch_block, cache.block_size)
    budget = most_rows * max(args.contexts)  # all prompts in one step
    scheduler = Scheduler(allocator, most_rows, budget, max_seq_len)
    # As `LLM` chooses it: the kernel that draws has no use for 64 bits.
    drawn_there = can_record(args.backend, args.device) and args.dtype != torch.float64
    draw = draw_tokens_triton if drawn_there else draw_tokens
    engine = InferenceEngine(forward, cache, scheduler, model.config.vocab_size, draw=draw)
    return Contender(engine, most_rows, recording)


def free_bytes(device: torch.device) -> int:
    """What a GPU has free once its work is done and PyTorch keeps nothing back; 0 for a CPU."""
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


# ---- a peer --------------------------------------------------------------------------------------
class Compiled(Theirs):
    """The peer's loop over a StaticCache, its decode step compiled and recorded by PyTorch.

    A cache is made once for each number of sequences, because a recording knows its address.
    Prompts run uncompiled.
    """

    def __init__(self, model: torch.nn.Module, length: int):
        super().__init__(model, length)
        self.compiled = torch.compile(model, mode="reduce-overhead")
        self.kept = {}

    def begin(self) -> None:
        """An empty cache, found when it is known for how many sequences."""
        self.cache = None

    def logits(self, input_ids: Tensor) -> Tensor:
        """Scores (B, V) of each sequence's next token; what K and V they have is kept."""
        if self.cache is None:
            return self._first_logits(input_ids)
        torch.compiler.cudagraph_mark_step_begin()  # the last step's result may be overwritten
        options = {"past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1}
        return self.compiled(input_ids, **options).logits[:, -1]

    def _first_logits(self, prompts: Tensor) -> Tensor:
        B = len(prompts)
        if B in self.kept:
            self.cache = self.kept[B]
            self.cache.reset()
        else:
            super().begin()
            self.kept[B] = self.cache
        return super().logits(prompts)


# ---- equal work ----------------------------------------------------------------------------------
def random_ids(model: GPT, B: int, T: int, seed: int) -> Tensor:
    """Token ids (B, T) on the model's device, the same ones for a seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (B, T), generator=generator)
    return ids.to(model.wte.weight.device)


@torch.inference_mode()
def fill_and_step(
    engine: InferenceEngine, token_ids: list[list[int]], seed: int
) -> tuple[Batch, Tensor]:
    """A decode step over contexts that were just computed, and its logits (B, V).

    Each sequence has T tokens, and the step computes the last. Blocks lie anywhere in the pool, the
    same ones for each contender that has such blocks. What nobody wrote is NaN, and so is the slot
    that the step itself must write: what an earlier contender left there helps no later one.
    """
    cache, B, T = engine.cache, len(token_ids), len(token_ids[0])
    cache.pool.fill_(torch.nan)
    per_sequence = -(-T // cache.block_size)
    ids = torch.randperm(cache.scratch_block, generator=torch.Generator().manual_seed(seed))
    tables = ids[: B * per_sequence].view(B, per_sequence).tolist()
    pairs = list(zip(token_ids, tables, strict=True))
    at_once = max(1, MOST_PROMPT_TOKENS // T)
    for first in range(0, B, at_once):
        rows = [Row(text, 0, T - 1, table, 0) for text, table in pairs[first : first + at_once]]
        engine.forward(make_batch(rows, cache.block_size, cache.scratch_block))
    rows = [Row(text, T - 1, 1, table, 1) for text, table in pairs]
    batch = make_batch(rows, cache.block_size, cache.scratch_block)
    return batch, engine.forward(batch).clone()  # a recording writes to the same place again


def check_equal(logits: dict[str, Tensor], workload: str) -> None:
    """Raise ValueError unless all contenders' logits (B, V) are numbers, and the first one's.

    They may differ by 2% of the largest in 16 bits, by 1e-3 in 32 and 1e-9 in 64: other kernels
    sum in other orders, and joined ones round less often.
    """
    first, want = next(iter(logits.items()))
    largest = want.double().abs().max().item()
    bound = {2: 0.02 * largest, 4: 1e-3, 8: 1e-9}[want.dtype.itemsize]
    for name, got in logits.items():
        if not got.isfinite().all():
            raise ValueError(f"the logits of {name!r} are not all numbers: {workload}")
        error = (got.double() - want.double()).abs().max().item()
        if error > bound:
            how = f"differ from those of {first!r} by {error:.1e}, {bound:.1e} is allowed"
            raise ValueError(f"the logits of {name!r} {how}: {workload}")


# ---- the device's clock --------------------------------------------------------------------------
def step_timer(
    engine: InferenceEngine, batch: Batch, num_steps: int, device: torch.device
) -> Callable[[], float]:
    """A function that runs a decode step `num_steps` times and returns milliseconds of one.

    On a GPU what was recorded is replayed, and what was not is asked for by Python, one kernel
    after the other; between two events either way, so that nobody waits for a single step.
    """
    forward = engine.forward

    @torch.inference_mode()
    def on_cpu() -> float:
        started = time.perf_counter()
        for _ in range(num_steps):
            forward(batch)
        return (time.perf_counter() - started) * 1e3 / num_steps

    @torch.inference_mode()
    def on_gpu() -> float:
        if isinstance(forward, GraphForward):
            forward(batch)  # now its inputs lie where the recording reads them
            call = forward.steps[forward.recorded_size(batch)].replay
        else:
            there = batch.to(device)
            call = lambda: forward(there)  # noqa: E731
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(num_steps):
            call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / num_steps

    return on_cpu if device.type == "cpu" else on_gpu
