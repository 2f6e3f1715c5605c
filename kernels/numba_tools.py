"""Plain Python loops at the speed of the memory: Numba, and the three words that it lacks.

A loop over tokens, heads and dimensions in Python runs at a few million numbers a second; memory
delivers billions. Numba translates such a loop to machine code at its first call and keeps the
result on disk. What is left is to say things that NumPy has no word for:

    widen(x)          a bfloat16 is a float32 without its lower half:  0x3fc0 -> 0x3fc00000 = 1.5
    prefetch(a, i)    fetch 256 numbers early: a jump to the next block costs 100 ns if one waits
    touch(a, i)       fetch one line earlier still, so that its page has been looked up by then

and to hand it a view of the pool as a flat array, because only elements known to be adjacent are
loaded 8 or 16 at a time. Without Numba this file is imported all the same, and nothing is compiled.
What a production engine does beyond this: the same in C++ with intrinsics, a version for each kind
of processor.

Lam, Pitrou and Seibert 2015, "Numba: a LLVM-based Python JIT compiler", LLVM-HPC.
Run: python -m kernels.numba_tools
Try: take "reassoc" out of FASTMATH (a sum must keep its order, and vector registers stay empty), or
leave out every second line in prefetch, and watch the speed of shuffled blocks.
"""

import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

try:
    import numba
    from llvmlite import ir
    from numba import njit, prange, types
    from numba.core import cgutils
    from numba.extending import intrinsic, overload

    HAS_NUMBA = True
except ImportError:
    HAS_NUMBA, prange = False, range

# Sums may be reordered and products fused, which vector registers need; infinity stays infinity.
FASTMATH = {"reassoc", "contract", "arcp", "nsz"}
CACHE_LINE = 64  # bytes that the memory delivers at a time
PREFETCHED = 256  # numbers at a time, four tokens of a head of 64: a loop around each line is slow


def compiled(function: Callable) -> Callable:
    """Numba's compiler, its result kept on disk; without Numba the function stays as it is.

    The interpreter's lock is released while it runs, so that threads run side by side. What is on
    disk is renewed when the function's own file changes, not when one that it imports does: after
    changing something here, delete __pycache__.
    """
    return njit(cache=True, nogil=True, fastmath=FASTMATH)(function) if HAS_NUMBA else function


def compiled_parallel(function: Callable) -> Callable:
    """The same for a function with a loop over `prange`, shared out among threads."""
    options = {"parallel": True, "cache": True, "nogil": True, "fastmath": FASTMATH}
    return njit(**options)(function) if HAS_NUMBA else function


@functools.cache
def has_openmp_team() -> bool:
    """Whether loops over `prange` run on OpenMP's threads, those that multiply PyTorch's matrices.

    They stay awake for a moment after each product, ready for the next piece of work; a thread of
    any other kind would have to share a processor with one that waits. Numba chooses its threads
    once a process, before it starts them. (The kind it brings itself is no help: it ends the
    process when two threads use it at a time.)
    """
    if numba.config.THREADING_LAYER == "default":
        numba.config.THREADING_LAYER = "omp"
    before = torch.get_num_threads()
    try:
        numba.get_num_threads()  # starts them
    except ValueError:  # no OpenMP on this machine
        return False
    finally:
        torch.set_num_threads(before)  # Numba's start has set it to the number of processors
    return numba.threading_layer() == "omp"


team = threading.local()  # how many of them each of Python's threads has asked for


def use_openmp_team(num_threads: int) -> bool:
    """Have this thread's next loops over `prange` run on so many of OpenMP's threads, or say no."""
    if not has_openmp_team():
        return False
    if getattr(team, "num_threads", None) != num_threads:  # saying it takes as long as a small loop
        numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
        team.num_threads = num_threads
    return True


@functools.cache
def workers(process: int, num_threads: int) -> ThreadPoolExecutor:
    """Threads that sleep between calls: one team a process, because a fork does not copy it."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="attention")


def inlined(function: Callable) -> Callable:
    """The same for a function that is worth pasting into its caller."""
    return njit(inline="always", fastmath=FASTMATH)(function) if HAS_NUMBA else function


# ---- three small things that Numba has no word for -----------------------------------------------
def widen(x):
    """A pool's number as one that can be computed with: bfloat16 is the upper half of a float32."""


def prefetch(array, index):
    """Ask for PREFETCHED numbers from array[index] on and do not wait; any index is harmless."""


def touch(array, index):
    """The same for a single line of the memory."""


if HAS_NUMBA:

    @overload(widen)
    def _widen(x):
        if x == types.uint16:  # NumPy has no bfloat16: its bits come as integers
            return lambda x: np.uint32(np.uint32(x) << 16).view(np.float32)
        return lambda x: x

    def fetch(context, builder, array, args, num_bytes):
        """Prefetch instructions for some lines from array[index] on."""
        pointer, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        data = context.make_array(array)(context, builder, args[0]).data
        kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        first = builder.bitcast(builder.gep(data, [args[1]]), pointer)
        # Into the second cache, whose queue is longer; numbers that take longer to compute with
        # than to read (to widen and multiply 16 bits) into the first.
        closeness = i32(2 if array.dtype.bitwidth >= 32 else 3)
        for offset in range(0, num_bytes, CACHE_LINE):
            address = builder.gep(first, [i32(offset)])
            builder.call(function, [address, i32(0), closeness, i32(1)])  # to read, as data
        return context.get_dummy_value()

    @intrinsic
    def prefetch(typingctx, array, index):  # noqa: F811
        num_bytes = PREFETCHED * array.dtype.bitwidth // 8

        def generate(context, builder, signature, args):
            return fetch(context, builder, array, args, num_bytes)

        return types.void(array, types.int64), generate

    @intrinsic
    def touch(typingctx, array, index):  # noqa: F811
        def generate(context, builder, signature, args):
            return fetch(context, builder, array, args, CACHE_LINE)

        return types.void(array, types.int64), generate


# ---- a tensor as Numba likes it ------------------------------------------------------------------
def flat(tensor: Tensor) -> np.ndarray:
    """All that lies from a tensor's first element to the end of its memory as a flat array.

    Nothing is copied. Numba's loops are fast on an array whose elements are known to be adjacent; a
    view of the pool is not, so the strides are passed beside it.
    """
    begin, num_bytes = tensor.storage_offset(), tensor.untyped_storage().nbytes()
    span = num_bytes // tensor.itemsize - begin
    return bits(torch.as_strided(tensor.detach(), (span,), (1,), begin))


def bits(tensor: Tensor) -> np.ndarray:
    """A tensor as an array of the same memory; NumPy has no bfloat16, so it comes as its bits."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(np.uint16)


# --------------------------------------------------------------------------------------------------
@compiled
def sum_blocks(flat_pool, block_ids, block_len, fetch_early):
    """The sum of some blocks of a flat pool, asking for the next block's lines or not."""
    total = np.float32(0)
    for i in range(len(block_ids)):
        begin = block_ids[i] * block_len
        ahead = block_ids[min(i + 1, len(block_ids) - 1)] * block_len
        for j in range(0, block_len, PREFETCHED):
            if fetch_early:
                prefetch(flat_pool, ahead + j)
            for x in range(np.uint64(begin + j), np.uint64(begin + j + PREFETCHED)):
                total += widen(flat_pool[x])
    return total


def demo():
    """A bfloat16 widened, a jump hidden."""
    if not HAS_NUMBA:
        print("ok: nothing to compile without numba")
        return
    halves = flat(torch.full((512,), 1.5).bfloat16())
    print(f"1.5 in bfloat16 is {halves[0]:#06x}, in float32 {int(halves[0]) << 16:#010x}")
    assert sum_blocks(halves, np.arange(2), 256, False) == 768.0

    pool = torch.ones(8192, 1536)  # 50 MB in blocks of 6 KB, read in a shuffled order
    shuffled = torch.randperm(8192, generator=torch.Generator().manual_seed(0)).numpy()
    for fetch_early in (False, True):
        seconds = []
        for _ in range(7):
            begun = time.perf_counter()
            total = sum_blocks(flat(pool), shuffled, 1536, fetch_early)
            seconds.append(time.perf_counter() - begun)
        speed = pool.nbytes / min(seconds) / 1e9
        print(f"shuffled blocks {'with' if fetch_early else 'without'} prefetch: {speed:.1f} GB/s")
        assert total == pool.numel()
    print("ok: bits widened, every block summed")


if __name__ == "__main__":
    demo()
