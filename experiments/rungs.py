"""The workloads and the rungs of the kernel ladder: the same bytes, attended to in several ways.

A `Setting` is numbers, a `World` the memory that goes with them, and a rung a function of the two
that answers one call. What kernels.py times is these calls and nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.device_memory import preallocate
from kernels.numba_tools import HAS_NUMBA
from kv_cache import write_kv
from paged_attention import paged_attention

CONTIGUOUS = "contiguous library kernel"
# The kernel that the engine takes for decoding, by device: the rung that the goals are about.
BEST = {"cpu": "whole blocks, all heads", "cuda": "tiles over blocks"}


@dataclass(frozen=True)
class Setting:
    """One workload: B sequences of T tokens, and how many of them are queries: 1 or T."""

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
        """K and V of one layer, which a call must read once."""
        return 2 * self.B * self.T * self.H * self.D * self.dtype.itemsize

    @property
    def scale(self) -> float:
        return self.D**-0.5

    @property
    def workload(self) -> str:
        what = f"batch={self.B} context={self.T} block_size={self.block_size}"
        return what if self.num_queries == 1 else f"prefill {what}"


class World:
    """The memory of a setting: a pool with shuffled tables, slabs with the same K and V, queries.

    There are `num_layers * num_sets` places, each with all B sequences in a layer of its own part
    of the memory. All layers hold the same numbers, so one expected result serves a whole set.
    """

    def __init__(self, setting: Setting, least_bytes: int, slabs: bool = True):
        s, generator = setting, torch.Generator(setting.device).manual_seed(setting.seed)
        self.setting = s
        self.num_sets = max(1, -(-least_bytes // (s.kv_bytes * s.num_layers)))
        per_sequence = -(-s.T // s.block_size)
        num_blocks = self.num_sets * s.B * per_sequence
        options = {"dtype": s.dtype, "device": s.device}
        shape = (s.num_layers, num_blocks + 1, 2, s.H, s.block_size, s.D)
        self.pool = preallocate(shape, **options)
        self.pool[0].normal_(generator=generator)
        self.pool[1:] = self.pool[0]
        ids = torch.randperm(num_blocks, generator=generator, device=s.device).int()
        self.tables = ids.view(self.num_sets, s.B, per_sequence)  # shuffled over the whole pool
        in_order = torch.arange(num_blocks, device=s.device, dtype=torch.int32)
        self.tables_in_order = in_order.view_as(self.tables)
        N = s.B * s.num_queries
        # As the model hands it over: a slice of the QKV product.
        qkv = torch.empty((N, 3 * s.H * s.D), **options).normal_(generator=generator)
        self.q, self.k, self.v = qkv.view(N, 3, s.H, s.D).unbind(1)
        locs = torch.arange(s.B + 1, device=s.device) * s.num_queries
        self.locs, self.lens = locs.int(), torch.full((s.B,), s.T, device=s.device).int()
        slab_shape = (s.num_layers, 2, self.num_sets, s.B, s.H, s.T, s.D)
        self.slabs = preallocate(slab_shape if slabs else (0,), **options)
        if slabs:
            for number in range(self.num_sets):
                for which in range(2):
                    self.slabs[0, which, number] = self.gather(which, number)
            self.slabs[1:] = self.slabs[0]
        self.places = [
            (layer, number) for number in range(self.num_sets) for layer in range(s.num_layers)
        ]

    def caches(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Place i's K, V and tables (call i of a chain)."""
        layer, number = self.places[i % len(self.places)]
        return self.pool[layer, :, 0], self.pool[layer, :, 1], self.tables[number]

    @cached_property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Where gathered blocks go, (B, blocks, H, block_size, D), and then K and V in one piece
        each, (2, B, H, blocks, block_size, D).
        """
        s, (B, per_sequence) = self.setting, self.tables.shape[1:]
        blocks = self.pool.new_empty(B, per_sequence, s.H, s.block_size, s.D)
        return blocks, self.pool.new_empty(2, B, s.H, per_sequence, s.block_size, s.D)

    def gather(self, which: int, number: int) -> Tensor:
        """K (0) or V (1) of a set, gathered: (B, H, T, D)."""
        blocks = self.pool[0, self.tables[number].long(), which]  # (B, blocks, H, block_size, D)
        return blocks.transpose(1, 2).flatten(2, 3)[:, :, : self.setting.T]

    def paged(self, function: Callable[..., Tensor], i: int, in_order=False, **more) -> Tensor:
        """Call any function of the common signature on place i."""
        s = self.setting
        k_cache, v_cache, table = self.caches(i)
        if in_order:
            table = self.tables_in_order[self.places[i % len(self.places)][1]]
        where = table, self.locs, self.lens, s.scale, s.num_queries, s.T
        return function(self.q, k_cache, v_cache, *where, **more)

    def expected(self, i: int, in_order: bool) -> Tensor:
        """What place i must give: the oracle, in float64."""
        oracle = partial(_oracle, self.q.double())
        return self.paged(oracle, i, in_order)

    def check(self, name: str, call: Callable[[int], Tensor]) -> None:
        """Raise ValueError if a contender's result is not attention, in the first and last place.

        In 32 bits the bound is 1e-5; in 16 bits weights and result are rounded, so an eps of the
        largest number.
        """
        for i in (0, len(self.places) - 1):
            want = self.expected(i, in_order="in order" in name)
            is_32 = self.setting.dtype == torch.float32
            bound = 1e-5 if is_32 else torch.finfo(self.setting.dtype).eps * want.abs().max()
            error = (call(i).double() - want).abs().max()
            if not error <= bound:  # NaN fails too
                raise ValueError(f"{name} is wrong by {error:.1e}, {self.setting.workload}")


def _oracle(q: Tensor, _, *arguments) -> Tensor:
    return paged_attention(q, *arguments)


# ---- the rungs -----------------------------------------------------------------------------------
def gather_only(world: World, i: int) -> tuple[Tensor, Tensor]:
    """Copy place i's blocks into one piece: K and V, (B, H, T, D) each.

    Two copies: a library gathers whole blocks, and then the heads have to come to the front. Both
    go into memory that is there already, or the page faults of fresh memory would be timed too.
    """
    k_cache, v_cache, table = world.caches(i)
    blocks, pieces = world.buffers
    for cache, piece in zip((k_cache, v_cache), pieces, strict=True):
        torch.index_select(cache, 0, table.flatten(), out=blocks.flatten(0, 1))
        piece.copy_(blocks.transpose(1, 2))
    k, v = pieces.flatten(3, 4)[:, :, :, : world.setting.T]
    return k, v


def dense(world: World, k: Tensor, v: Tensor) -> Tensor:
    """The library's kernel on K and V (B, H, T, D); returns (N, H, D)."""
    s = world.setting
    q = world.q.unflatten(0, (s.B, s.num_queries)).transpose(1, 2)  # (B, H, queries, D)
    is_causal = s.num_queries > 1  # whole prompts; one query reads all there is
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=s.scale)
    return out.transpose(1, 2).flatten(0, 1)


def gather_then_dense(world: World, i: int) -> Tensor:
    """The lowest rung: every byte of K and V is read three times and written twice."""
    return dense(world, *gather_only(world, i))


def contiguous(world: World, i: int) -> Tensor:
    """What blocks are measured against: the same bytes in slabs."""
    layer, number = world.places[i % len(world.places)]
    return dense(world, *world.slabs[layer, :, number])


def per_head(kernel: Callable[..., Tensor], world: World, i: int) -> Tensor:
    """The plain kernel of rungs_numba.py or rungs_triton.py on place i."""
    return kernel(world.q, *world.caches(i), world.lens, world.setting.scale)


Rungs = dict[str, tuple[str, Callable[[World, int], Tensor]]]  # name -> (backend, call)


def decode_rungs(device: torch.device, chunk_len: int) -> Rungs:
    """The ladder for one query a sequence, as far as this machine can climb it."""

    def paged(function: Callable, **more) -> Callable[[World, int], Tensor]:
        return lambda world, i: world.paged(function, i, **more)

    rungs: Rungs = {"gather, then dense": ("torch", gather_then_dense)}
    rungs["block by block in PyTorch"] = "torch", paged(paged_attention)
    if device.type == "cuda":
        from experiments.rungs_triton import per_head_triton
        from kernels.triton_decode import paged_decode_triton

        decode = partial(paged_decode_triton, chunk_len=0)  # never split
        chunks = partial(paged_decode_triton, chunk_len=chunk_len)
        rungs["one program per (sequence, head)"] = "triton", partial(per_head, per_head_triton)
        rungs["tiles over blocks"] = "triton", paged(decode)
        rungs["tiles, blocks in order"] = "triton", paged(decode, in_order=True)
        rungs["chunks and merge"] = "triton", paged(chunks)
    elif HAS_NUMBA:
        from experiments.rungs_numba import per_head_numba
        from kernels.attention_cpu import paged_attention_cpu

        rungs["one program per (sequence, head)"] = "numba", partial(per_head, per_head_numba)
        rungs["whole blocks, all heads"] = "numba", paged(paged_attention_cpu)
        rungs["whole blocks in order"] = "numba", paged(paged_attention_cpu, in_order=True)
    return rungs | {CONTIGUOUS: ("torch", contiguous)}


def prefill_rungs(device: torch.device) -> Rungs:
    """Whole prompts: the engine's kernel, and the library's causal one on slabs."""
    rungs: Rungs = {}
    if device.type == "cuda":
        from kernels.triton_decode import paged_attention_triton

        rungs["paged"] = "triton", lambda world, i: world.paged(paged_attention_triton, i)
    elif HAS_NUMBA:
        from kernels.attention_cpu import paged_attention_cpu

        rungs["paged"] = "numba", lambda world, i: world.paged(paged_attention_cpu, i)
    return rungs | {CONTIGUOUS: ("torch", contiguous)}


def writers(device: torch.device) -> dict[str, tuple[str, Callable]]:
    """Ways to write K and V into their slots."""
    found = {"write, torch": ("torch", write_kv)}
    if device.type == "cuda":
        from kernels.triton_prefill import write_kv_triton

        found["write, triton"] = "triton", write_kv_triton
    elif HAS_NUMBA:
        from kernels.attention_cpu import write_kv_cpu

        found["write, numba"] = "numba", write_kv_cpu
    return found
