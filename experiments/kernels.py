"""The kernel ladder: decode attention in several ways over the same bytes, compared with a slab.

Every contender computes the same attention, and each must read K and V of all sequences once:

    gather, then dense       copy the blocks into one tensor, then call PyTorch's kernel
    block by block           paged_attention.py, in PyTorch
    (sequence, head)         one simple program for each, nothing is gathered
    tiles / whole blocks     on a GPU tiles that span several blocks, on a CPU blocks of all heads
    chunks and merge         on a GPU, several programs for one context; the CPU's kernel always
                             does this, so on a CPU the contender before it is the last
    contiguous               PyTorch's kernel on slabs: a cache without blocks

The blocks are shuffled over a pool of all layers, with enough sequences to be larger than the CPU's
or the GPU's caches. The slabs are as large. So each call reads memory that no recent call has read,
like a layer of a model that is read again only after all other layers. The contenders run in turn.
Before anything is timed each result is compared with the oracle, and a wrong one ends the run.
Reported are milliseconds, GB/s (bytes of K and V / time), the share of a plain read's bandwidth
measured in the same rounds, and the speed against the slab.

The same is done for prompts and for the write of K and V. On a GPU a straight line through five
sizes, time = t0 + bytes / bandwidth, separates the cost of a launch from the cost of a byte.

`sweep` times the GPU's decode kernel with other tiles: tokens in a tile, warps, stages and chunks.
A tile holds 32 to 128 tokens of one head. A larger tile has more loads in flight, which hides
memory latency, but fewer programs fit beside it. Which is faster is measured, not looked up by the
device's name.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.ceilings import (
    Columns,
    Reader,
    best_reader,
    in_turn,
    resolve,
    set_threads,
    timer,
    warm_up,
)
from experiments.results import Measurement, device_name
from kernels.device_memory import preallocate
from kernels.numba_tools import HAS_NUMBA
from kv_cache import write_kv
from paged_attention import paged_attention

CONTIGUOUS = "contiguous library kernel"
GATHER, GATHER_ALONE = "gather, then dense", "gather alone"
# The contender whose times become a line, by device: the engine's kernel at those sizes.
BEST = {"cpu": "whole blocks, all heads", "cuda": "tiles over blocks"}
CPU_SHAPES = ["8x256", "32x256", "32x1000"]
GPU_SHAPES = ["1x1024", "8x512", "16x1024", "64x512", "64x1024", "256x512"]
SWEEP_SHAPES = ["1x1024", "16x1024", "64x512", "256x512"]
FIT_SHAPES = ["64x256", "64x512", "64x1024", "256x512", "256x1024"]  # 50 to 805 MB in 16 bits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `kernels`."""
    add = parser.add_argument
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if any")
    add("--shapes", nargs="*", help="decode: sequences x context, 32x256; none: skip")
    add("--prefill", nargs="*", help="prompts: sequences x tokens; none: skip; default by device")
    add("--fit", nargs="*", help="sizes for t0 + bytes / bandwidth; default: five on a GPU")
    add("--dtypes", nargs="+", help="default: float32 bfloat16, on a GPU bfloat16")
    add("--block-sizes", type=int, nargs="+", default=[16], help="tokens a block")
    add("--heads", type=int, default=12, help="of K, V and the queries; GPT-2's 12")
    add("--head-dim", type=int, default=64, help="numbers a head")
    add("--layers", type=int, default=12, help="taken in turn, so that none stays in a cache")
    add("--pool-mb", type=int, help="K and V to cycle through at least; default 1024, GPU 512")
    add("--read-mb", type=int, help="buffer of the plain read; default 1024, on a GPU 8192")
    add("--chunk-len", type=int, help="tokens a chunk, of chunks and merge; default: the engine's")
    add("--only", nargs="+", default=[""], help="contenders whose name has one of these words")
    add("--threads", type=int, nargs="+", help="of the CPU; default: 1 and all")
    add("--repeats", type=int, default=7, help="rounds; each times every contender once")
    add("--seed", type=int, default=0, help="of the numbers and the tables")


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `sweep`."""
    add = parser.add_argument
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="cpu: interpreted")
    add("--shapes", nargs="+", default=SWEEP_SHAPES, help="sequences x context")
    add("--dtype", default="bfloat16", help="of the pool")
    add("--tiles", type=int, nargs="+", default=[32, 64, 128], help="tokens a tile")
    add("--warps", type=int, nargs="+", default=[4, 8], help="32 threads each, of a program")
    add("--stages", type=int, nargs="+", default=[3, 5], help="loads in flight, tables included")
    add("--chunks", type=int, nargs="+", default=[0, 128, 256], help="tokens a chunk; 0: none")
    add("--block-size", type=int, default=16, help="tokens a block")
    add("--heads", type=int, default=12, help="of K, V and the queries")
    add("--head-dim", type=int, default=64, help="numbers a head")
    add("--layers", type=int, default=12, help="taken in turn")
    add("--pool-mb", type=int, default=512, help="K and V to cycle through at least")
    add("--read-mb", type=int, help="buffer of the plain read; default 8192")
    add("--repeats", type=int, default=5, help="rounds; each times every variant once")
    add("--seed", type=int, default=0, help="of the numbers and the tables")


# ---- the memory of a workload --------------------------------------------------------------------
@dataclass(frozen=True)
class Setting:
    """One workload: B sequences of T tokens, of which 1 (decode) or T (a prompt) are queries."""

    B: int
    T: int
    num_queries: int
    block_size: int
    dtype: torch.dtype
    device: torch.device
    H: int
    D: int
    num_layers: int
    seed: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of one layer, which one call must read once."""
        return 2 * self.B * self.T * self.H * self.D * self.dtype.itemsize

    @property
    def scale(self) -> float:
        """What the scores are multiplied by."""
        return self.D**-0.5

    @property
    def workload(self) -> str:
        """The sizes, as the rows write them."""
        sizes = f"batch={self.B} context={self.T} block_size={self.block_size}"
        return sizes if self.num_queries == 1 else f"prefill {sizes}"


class World:
    """The memory of a setting: a pool with shuffled tables, slabs with the same K and V, queries.

    The pool holds `num_sets` sets of B sequences, in every layer. One call reads one set in one
    layer: `parts` lists these pairs. All layers hold the same numbers, so one expected result
    serves a set in all layers.
    """

    def __init__(self, setting: Setting, min_bytes: int, has_slabs: bool = True):
        s = setting
        generator = torch.Generator(s.device).manual_seed(s.seed)
        self.setting = s
        self.num_sets = max(1, -(-min_bytes // (s.kv_bytes * s.num_layers)))
        sets, layers = range(self.num_sets), range(s.num_layers)
        self.parts = [(layer, number) for number in sets for layer in layers]
        self._fill_pool(generator)
        N = s.B * s.num_queries
        # q, k and v are slices of the QKV product, as in the model.
        qkv = torch.empty((N, 3 * s.H * s.D), dtype=s.dtype, device=s.device)
        qkv.normal_(generator=generator)
        self.q, self.k, self.v = qkv.view(N, 3, s.H, s.D).unbind(1)  # (N, H, D) each
        starts = torch.arange(s.B + 1, device=s.device) * s.num_queries
        self.query_start_locs = starts.int()
        self.context_lens = torch.full((s.B,), s.T, device=s.device).int()
        if has_slabs:
            self._fill_slabs()

    def _fill_pool(self, generator: torch.Generator) -> None:
        """Random K and V, the same in each layer, and tables that share no block."""
        s = self.setting
        blocks_each = -(-s.T // s.block_size)
        num_blocks = self.num_sets * s.B * blocks_each
        shape = (s.num_layers, num_blocks + 1, 2, s.H, s.block_size, s.D)
        self.pool = preallocate(shape, dtype=s.dtype, device=s.device)
        self.pool[0].normal_(generator=generator)
        self.pool[1:] = self.pool[0]
        shuffled = torch.randperm(num_blocks, generator=generator, device=s.device).int()
        self.tables = shuffled.view(self.num_sets, s.B, blocks_each)
        in_order = torch.arange(num_blocks, device=s.device, dtype=torch.int32)
        self.tables_in_order = in_order.view_as(self.tables)

    def _fill_slabs(self) -> None:
        """The same K and V as in the shuffled blocks: (layers, 2, sets, B, H, T, D)."""
        s = self.setting
        shape = (s.num_layers, 2, self.num_sets, s.B, s.H, s.T, s.D)
        self.slabs = preallocate(shape, dtype=s.dtype, device=s.device)
        for kv, number in itertools.product(range(2), range(self.num_sets)):
            blocks = self.pool[0, self.tables[number].long(), kv]  # (B, blocks, H, block_size, D)
            self.slabs[0, kv, number] = blocks.transpose(1, 2).flatten(2, 3)[:, :, : s.T]
        self.slabs[1:] = self.slabs[0]

    def part(self, i: int) -> tuple[int, int]:
        """(layer, set) of call i."""
        return self.parts[i % len(self.parts)]

    def caches(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """K, V (num_blocks + 1, H, block_size, D) and the tables (B, blocks) of call i."""
        layer, number = self.part(i)
        return self.pool[layer, :, 0], self.pool[layer, :, 1], self.tables[number]

    @cached_property
    def gathered(self) -> tuple[Tensor, Tensor]:
        """Memory for gathered blocks, (B, blocks, H, block_size, D), and for K and V in one tensor
        each, (2, B, H, blocks, block_size, D).
        """
        s = self.setting
        B, blocks_each = self.tables.shape[1:]
        blocks = self.pool.new_empty(B, blocks_each, s.H, s.block_size, s.D)
        return blocks, self.pool.new_empty(2, B, s.H, blocks_each, s.block_size, s.D)

    def paged(
        self, function: Callable[..., Tensor], i: int, in_order: bool = False, **more: Any
    ) -> Tensor:
        """Call i of a function with the signature of `paged_attention`; returns (N, H, D)."""
        s = self.setting
        k_cache, v_cache, tables = self.caches(i)
        if in_order:
            tables = self.tables_in_order[self.part(i)[1]]
        return function(
            self.q,
            k_cache,
            v_cache,
            tables,
            self.query_start_locs,
            self.context_lens,
            s.scale,
            s.num_queries,
            s.T,
            **more,
        )

    def expected(self, i: int, in_order: bool) -> Tensor:
        """The result that call i must have: the oracle's, in float64."""

        def oracle(q: Tensor, *arguments: Any) -> Tensor:
            return paged_attention(q.double(), *arguments)

        return self.paged(oracle, i, in_order)

    def check(self, name: str, call: Callable[[int], Tensor]) -> None:
        """Raise ValueError if the first or the last call of a contender is not attention.

        The bound is 1e-5 in 32 bits. In 16 bits weights and result are rounded, so the bound is
        eps times the largest number.
        """
        for i in (0, len(self.parts) - 1):
            expected = self.expected(i, in_order="in order" in name)
            bound = torch.tensor(1e-5)
            if self.setting.dtype != torch.float32:
                bound = torch.finfo(self.setting.dtype).eps * expected.abs().max()
            error = (call(i).double() - expected).abs().max()
            if not error <= bound:  # true for NaN as well
                raise ValueError(f"{name} is wrong by {error:.1e}, {self.setting.workload}")


# ---- the contenders ------------------------------------------------------------------------------
Call = Callable[[World, int], Tensor]
Contenders = dict[str, tuple[str, Call]]  # name -> (backend, call)


def gather_blocks(world: World, i: int) -> tuple[Tensor, Tensor]:
    """Copy the blocks of call i into K and V, (B, H, T, D) each.

    Two copies: PyTorch gathers whole blocks, then the heads must come first. Both write into memory
    that exists already. Fresh memory would add page faults to the time.
    """
    k_cache, v_cache, tables = world.caches(i)
    blocks, pieces = world.gathered
    for cache, piece in zip((k_cache, v_cache), pieces, strict=True):
        torch.index_select(cache, 0, tables.flatten(), out=blocks.flatten(0, 1))
        piece.copy_(blocks.transpose(1, 2))
    k, v = pieces.flatten(3, 4)[:, :, :, : world.setting.T]
    return k, v


def dense(world: World, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's kernel on K and V, (B, H, T, D) each; returns (N, H, D)."""
    s = world.setting
    q = world.q.unflatten(0, (s.B, s.num_queries)).transpose(1, 2)  # (B, H, queries, D)
    is_causal = s.num_queries > 1  # a decode query is the last token and reads all of them
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=s.scale)
    return out.transpose(1, 2).flatten(0, 1)


def gather_then_dense(world: World, i: int) -> Tensor:
    """Every byte of K and V is read three times and written twice."""
    return dense(world, *gather_blocks(world, i))


def contiguous(world: World, i: int) -> Tensor:
    """The same bytes in slabs."""
    layer, number = world.part(i)
    return dense(world, *world.slabs[layer, :, number])


def per_head(kernel: Callable[..., Tensor], world: World, i: int) -> Tensor:
    """Call i of a kernel that takes exactly one query for each sequence."""
    return kernel(world.q, *world.caches(i), world.context_lens, world.setting.scale)


def paged_call(function: Callable[..., Tensor], **more: Any) -> Call:
    """A contender that calls a function with the signature of `paged_attention`."""
    return lambda world, i: world.paged(function, i, **more)


def decode_contenders(device: torch.device, chunk_len: int | None) -> Contenders:
    """Everything that can decode on this machine; a `chunk_len` of None is the engine's choice."""
    found: Contenders = {GATHER: ("torch", gather_then_dense)}
    found["block by block in PyTorch"] = "torch", paged_call(paged_attention)
    if device.type == "cuda":
        from kernels.triton_decode import paged_decode_triton
        from paged_attention_triton import paged_attention_triton_simple

        whole = partial(paged_decode_triton, chunk_len=0)  # one program for a whole context
        chunks = partial(paged_decode_triton, chunk_len=chunk_len)
        found["one program per (sequence, head)"] = (
            "triton",
            paged_call(paged_attention_triton_simple),
        )
        found["tiles over blocks"] = "triton", paged_call(whole)
        found["tiles, blocks in order"] = "triton", paged_call(whole, in_order=True)
        found["chunks and merge"] = "triton", paged_call(chunks)
    elif HAS_NUMBA:
        from kernels.attention_cpu import attend_per_head, paged_attention_cpu

        found["one program per (sequence, head)"] = "numba", partial(per_head, attend_per_head)
        found["whole blocks, all heads"] = "numba", paged_call(paged_attention_cpu)
        found["whole blocks in order"] = "numba", paged_call(paged_attention_cpu, in_order=True)
    return found | {CONTIGUOUS: ("torch", contiguous)}


def prefill_contenders(device: torch.device) -> Contenders:
    """Whole prompts: the engine's kernel over blocks, and PyTorch's causal kernel on slabs."""
    found: Contenders = {}
    if device.type == "cuda":
        from kernels.triton_decode import paged_attention_triton

        found["paged"] = "triton", paged_call(paged_attention_triton)
    elif HAS_NUMBA:
        from kernels.attention_cpu import paged_attention_cpu

        found["paged"] = "numba", paged_call(paged_attention_cpu)
    return found | {CONTIGUOUS: ("torch", contiguous)}


def writers(device: torch.device) -> dict[str, tuple[str, Callable]]:
    """All functions that write K and V into their slots, name -> (backend, function)."""
    found: dict[str, tuple[str, Callable]] = {"write, torch": ("torch", write_kv)}
    if device.type == "cuda":
        from kernels.triton_prefill import write_kv_triton

        found["write, triton"] = "triton", write_kv_triton
    elif HAS_NUMBA:
        from kernels.attention_cpu import write_kv_cpu

        found["write, numba"] = "numba", write_kv_cpu
    return found


# ---- measuring -----------------------------------------------------------------------------------
def num_calls(call: Callable[[int], object], world: World) -> int:
    """Calls in a round: on a CPU one for each part of the memory, on a GPU 10 for each layer.

    A contender that would need more than a second for that (on a GPU: whose graph would have many
    thousand nodes) makes fewer calls, at least 2. Its time is far above any noise.
    """
    device = world.setting.device
    on_gpu = device.type == "cuda"
    most = 10 * world.setting.num_layers if on_gpu else len(world.parts)

    def call_and_wait(i: int) -> None:
        call(i)
        if on_gpu:
            torch.cuda.synchronize()

    once_ms = timer(call_and_wait, 1, torch.device("cpu"))()
    limit_ms = 100 if on_gpu else 1000
    return max(2, min(most, int(limit_ms / max(once_ms, 1e-3))))


def is_wanted(name: str, args: argparse.Namespace) -> bool:
    """Whether --only keeps a contender. The slab always stays: all others are compared with it."""
    return name == CONTIGUOUS or any(word in name for word in args.only)


def time_attention(
    setting: Setting,
    contenders: Contenders,
    reader: Reader,
    args: argparse.Namespace,
    common: Columns,
) -> Iterator[Measurement]:
    """All rows of one workload: each contender is checked, then all and a plain read are timed."""
    device = setting.device
    world = World(setting, pool_bytes(args, device))
    wanted = {name: call for name, call in contenders.items() if is_wanted(name, args)}
    calls: dict[str, Callable] = {n: partial(call, world) for n, (_, call) in wanted.items()}
    for name, call in calls.items():
        world.check(name, call)
    is_decode = setting.num_queries == 1
    if is_decode and GATHER in calls:
        calls[GATHER_ALONE] = partial(gather_blocks, world)
    timers = {name: timer(c, num_calls(c, world), device) for name, c in calls.items()}
    timers["read"] = reader.measure
    times_ms = in_turn(timers, args.repeats)
    read_gb_s = [reader.num_bytes / t / 1e6 for t in times_ms.pop("read")]
    columns = common | {"workload": setting.workload, "dtype": str(setting.dtype)[6:]}
    if is_decode:
        read = {"contender": reader.name, "metric": "bandwidth", "backend": reader.backend}
        yield Measurement.of(read_gb_s, unit="GB/s", **read, **columns)
    for name, times in times_ms.items():
        backend = wanted[name][0] if name in wanted else "torch"
        columns |= {"contender": name, "backend": backend}
        yield Measurement.of(times, metric="time a call", unit="ms", **columns)
        if is_decode:
            yield from bandwidth_rows(setting, times, read_gb_s, columns)
        else:
            # Two products of T x T / 2 scores and D numbers a head, two operations each.
            operations = 2 * setting.B * setting.H * setting.T**2 * setting.D
            tflops = [operations / t / 1e9 for t in times]
            yield Measurement.of(tflops, metric="operations", unit="TFLOP/s", **columns)
        if name not in (CONTIGUOUS, GATHER_ALONE):
            against = {"metric": "speed against contiguous", "unit": "x"}
            yield Measurement.ratio_of(times_ms[CONTIGUOUS], times, **against, **columns)


def bandwidth_rows(
    setting: Setting, times_ms: list[float], read_gb_s: list[float], columns: Columns
) -> Iterator[Measurement]:
    """GB/s of K and V, and the share of the plain read's."""
    kv_gb_s = [setting.kv_bytes / t / 1e6 for t in times_ms]
    yield Measurement.of(kv_gb_s, metric="KV bandwidth", unit="GB/s", **columns)
    share = {"metric": "share of the read", "unit": "%"}
    yield Measurement.ratio_of(kv_gb_s, read_gb_s, scale=100, **share, **columns)


def time_write(
    setting: Setting, args: argparse.Namespace, common: Columns
) -> Iterator[Measurement]:
    """Rows of the scatter: K and V of all tokens into shuffled slots, bytes written per second."""
    s = setting
    world = World(s, pool_bytes(args, s.device), has_slabs=False)
    position = torch.arange(s.T, device=s.device)
    slots = []  # of each set, (B * T,)
    for tables in world.tables:
        blocks = tables[:, position // s.block_size].long()
        slots.append((blocks * s.block_size + position % s.block_size).flatten())

    def write(function: Callable, i: int) -> Tensor:
        k_cache, v_cache, _ = world.caches(i)
        function(world.k, world.v, k_cache, v_cache, slots[world.part(i)[1]])
        return k_cache

    functions = {n: pair for n, pair in writers(s.device).items() if is_wanted(n, args)}
    calls = {name: partial(write, function) for name, (_, function) in functions.items()}
    for name, call in calls.items():
        world.pool.zero_()
        call(0)
        k_cache, v_cache, _ = world.caches(0)
        k, v = (cache.transpose(1, 2).flatten(0, 1)[slots[0]] for cache in (k_cache, v_cache))
        if not (torch.equal(k, world.k) and torch.equal(v, world.v)):
            raise ValueError(f"{name} does not write what it is given, {s.workload}")
    timers = {name: timer(c, num_calls(c, world), s.device) for name, c in calls.items()}
    columns = common | {"workload": f"write {s.workload}", "dtype": str(s.dtype)[6:]}
    for name, times in in_turn(timers, args.repeats).items():
        columns |= {"contender": name, "backend": functions[name][0]}
        gb_per_s = [s.kv_bytes / t / 1e6 for t in times]
        yield Measurement.of(times, metric="time a call", unit="ms", **columns)
        yield Measurement.of(gb_per_s, metric="scatter bandwidth", unit="GB/s", **columns)


def fit_line(num_bytes: list[int], times_ms: list[float]) -> tuple[float, float]:
    """Least squares of time = t0 + bytes / bandwidth: t0 in microseconds, bandwidth in GB/s.

    100 MB in 0.11 ms and 300 MB in 0.31 ms are 10 us and 1000 GB/s.
    """
    mean_bytes = statistics.mean(num_bytes)
    mean_ms = statistics.mean(times_ms)
    products = [(b - mean_bytes) * (t - mean_ms) for b, t in zip(num_bytes, times_ms, strict=True)]
    ms_per_byte = sum(products) / sum((b - mean_bytes) ** 2 for b in num_bytes)
    return (mean_ms - ms_per_byte * mean_bytes) * 1e3, 1e-6 / ms_per_byte


def time_fit(
    settings: list[Setting],
    contenders: Contenders,
    reader: Reader,
    args: argparse.Namespace,
    common: Columns,
) -> Iterator[Measurement]:
    """Rows of t0 and bandwidth of the engine's decode kernel: one line through all sizes."""
    if len(settings) < 2:
        return
    device = settings[0].device
    name = BEST[device.type]
    backend, best = contenders[name]
    times_ms = []  # a list of rounds for each size
    for setting in settings:  # one size at a time: all of them would not fit into memory
        world = World(setting, pool_bytes(args, device), has_slabs=False)
        call = partial(best, world)
        world.check(name, call)
        timers = {"best": timer(call, num_calls(call, world), device), "read": reader.measure}
        rounds = in_turn(timers, args.repeats)
        times_ms.append(rounds["best"])
    read_gb_s = [reader.num_bytes / t / 1e6 for t in rounds["read"]]
    sizes = [setting.kv_bytes for setting in settings]
    lines = [fit_line(sizes, list(times)) for times in zip(*times_ms, strict=True)]
    shapes = ",".join(f"{s.B}x{s.T}" for s in settings)
    workload = f"t0 + bytes / bandwidth over {shapes} block_size={settings[0].block_size}"
    columns = common | {"contender": name, "workload": workload, "backend": backend}
    columns |= {"dtype": str(settings[0].dtype)[6:]}
    yield Measurement.of([t0 for t0, _ in lines], metric="t0", unit="us", **columns)
    gb_per_s = [bandwidth for _, bandwidth in lines]
    yield Measurement.of(gb_per_s, metric="bandwidth", unit="GB/s", **columns)
    share = {"metric": "share of the read", "unit": "%"}
    yield Measurement.ratio_of(gb_per_s, read_gb_s, scale=100, **share, **columns)


# ---- the experiment ------------------------------------------------------------------------------
def pool_bytes(args: argparse.Namespace, device: torch.device) -> int:
    """Bytes of K and V to cycle through: more than the caches (L3 of a server: 260 MB) hold."""
    return (args.pool_mb or (512 if device.type == "cuda" else 1024)) << 20


def parse_shape(text: str) -> tuple[int, int]:
    """ "32x256" -> (32, 256). Raises ValueError for anything else."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{text!r} is no shape: write sequences x tokens, as in 32x256")
    return int(parts[0]), int(parts[1])


def settings_of(
    args: argparse.Namespace, device: torch.device, shapes: list[str], is_decode: bool
) -> Iterator[list[Setting]]:
    """A list of settings, one for each shape, for every dtype and block size."""
    on_gpu = device.type == "cuda"
    dtypes = args.dtypes or (["bfloat16"] if on_gpu else ["float32", "bfloat16"])
    for dtype, block_size in itertools.product(dtypes, args.block_sizes):
        yield [
            Setting(
                B,
                T,
                num_queries=1 if is_decode else T,
                block_size=block_size,
                dtype=getattr(torch, dtype),
                device=device,
                H=args.heads,
                D=args.head_dim,
                num_layers=args.layers,
                seed=args.seed,
            )
            for B, T in map(parse_shape, shapes)
        ]


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of `kernels`."""
    device = resolve(args.device)
    on_gpu = device.type == "cuda"

    def given_or(flag: list[str] | None, cpu: list[str], gpu: list[str]) -> list[str]:
        if flag is not None:
            return flag
        return gpu if on_gpu else cpu

    shapes = given_or(args.shapes, CPU_SHAPES, GPU_SHAPES)
    prompts = given_or(args.prefill, ["8x256"], ["16x512"])
    fits = given_or(args.fit, [], FIT_SHAPES)
    threads_before = torch.get_num_threads()
    common = {"experiment": "kernels", "device": device_name(device), "seed": args.seed}
    decode = decode_contenders(device, args.chunk_len)
    prefill = prefill_contenders(device)
    warm_up(device)
    try:
        for threads in args.threads or (
            [threads_before] if on_gpu else sorted({1, threads_before})
        ):
            set_threads(threads)
            common |= {"threads": threads}
            reader = best_reader(device, args.read_mb)
            for settings in settings_of(args, device, shapes, is_decode=True):
                for setting in settings:
                    yield from time_attention(setting, decode, reader, args, common)
            for settings in settings_of(args, device, prompts, is_decode=False):
                for setting in settings:
                    yield from time_attention(setting, prefill, reader, args, common)
                    yield from time_write(setting, args, common)
            for settings in settings_of(args, device, fits, is_decode=True):
                yield from time_fit(settings, decode, reader, args, common)
    finally:
        set_threads(threads_before)


# ---- the sweep over tiles ------------------------------------------------------------------------
def prepare_variant(
    world: World, tiles: dict[str, int], chunk_len: int
) -> Callable[[], float] | None:
    """A timer of the decode kernel with these tiles, or None if they do not fit into the GPU.

    Raises ValueError if the kernel runs and its result is wrong.
    """
    from kernels import triton_decode

    decode = partial(triton_decode.paged_decode_triton, chunk_len=chunk_len)
    call = partial(world.paged, decode)
    # The kernel asks `decode_tiles` for its tiles while it is recorded. A replay asks nothing.
    with mock.patch.object(triton_decode, "decode_tiles", lambda *_: tiles):
        try:
            world.check("the kernel", call)
            return timer(call, num_calls(call, world), world.setting.device)
        except ValueError:
            raise
        except Exception as error:  # triton's exception classes differ between its versions
            print(f"{tiles} left out: {type(error).__name__}: {str(error)[:80]}", file=sys.stderr)
            return None


def run_sweep(args: argparse.Namespace) -> Iterator[Measurement]:
    """All rows of `sweep`."""
    from kernels.triton_decode import ENOUGH_PROGRAMS, INTERPRETED

    device = resolve(args.device)
    if device.type == "cpu" and not INTERPRETED:
        raise ValueError("there is no GPU here, and tiles are a GPU's")
    warm_up(device)
    reader = best_reader(device, args.read_mb)
    common = {"experiment": "sweep", "backend": "triton", "dtype": args.dtype, "seed": args.seed}
    common |= {"device": device_name(device), "threads": torch.get_num_threads()}
    for B, T in map(parse_shape, args.shapes):
        setting = Setting(
            B,
            T,
            num_queries=1,
            block_size=args.block_size,
            dtype=getattr(torch, args.dtype),
            device=device,
            H=args.heads,
            D=args.head_dim,
            num_layers=args.layers,
            seed=args.seed,
        )
        world = World(setting, args.pool_mb << 20, has_slabs=False)
        timers = {"read": reader.measure}
        # Where whole contexts are enough programs, chunks are no candidates.
        chunks = [0] if B * args.heads >= ENOUGH_PROGRAMS else args.chunks
        grid = itertools.product(args.tiles, args.warps, args.stages, chunks)
        for tile, warps, stages, chunk_len in grid:
            tiles = {"TILE_K": tile, "num_warps": warps, "num_stages": stages}
            measure = prepare_variant(world, tiles, chunk_len)
            if measure is not None:
                timers[f"tile={tile} warps={warps} stages={stages} chunk={chunk_len}"] = measure
        times_ms = in_turn(timers, args.repeats)
        read_gb_s = [reader.num_bytes / t / 1e6 for t in times_ms.pop("read")]
        for name, times in times_ms.items():
            columns = common | {"contender": name, "workload": setting.workload}
            yield Measurement.of(times, metric="time a call", unit="ms", **columns)
            gb_per_s = [setting.kv_bytes / t / 1e6 for t in times]
            share = {"metric": "share of the read", "unit": "%"}
            yield Measurement.ratio_of(gb_per_s, read_gb_s, scale=100, **share, **columns)
