"""Numba, and seven operations that it lacks: widen and narrow numbers, scales, 2^x and others.

Numba translates a loop over tokens, heads and dimensions from Python to machine code at its first
call and keeps the result on disk. Python itself would compute a few million products a second; a
core computes billions. The CPU kernels of this wing need seven operations that NumPy and Numba do
not have:

    widen(x)               bfloat16 to float32:  0x3fc0 -> 0x3fc00000 = 1.5
    narrow(x, out)         float32 to the dtype of out: bfloat16 is rounded, ties to even
    token_scale(pool, i)   the scale of a token in a pool of int8; 1 in any other pool
    power_of_two(x)        2^x as ten instructions that LLVM can apply to 16 numbers at a time
    prefetch(a, i)         start loading 256 numbers from a[i] on, without waiting for them
    prefetch_line(a, i)    start loading the cache line of a[i]
    arrays_at(t, places)   arrays like those in the tuple t, which begin at other addresses

`flat_memory` gives a tensor to Numba as a one-dimensional array, because LLVM uses vector
instructions only where it knows that elements are adjacent. Without Numba this file can be imported
and the decorators return the plain Python function. Shuffled blocks of 6 KB are summed at 23 GB/s
without prefetch and at 34 GB/s with it (one AVX-512 core).

Checked by tests/kernels/test_numba_tools.py.
Lam, Pitrou and Seibert 2015, "Numba: a LLVM-based Python JIT compiler", LLVM-HPC.
"""

import functools
import itertools
import math
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

try:
    import numba
    from llvmlite import binding, ir
    from numba import njit, prange, types
    from numba.core import cgutils
    from numba.extending import intrinsic, overload

    HAS_NUMBA = True
except ImportError:
    HAS_NUMBA, prange = False, range

# Vector instructions add in another order than the loop says ("reassoc") and fuse a product with a
# sum ("contract"). "nnan" and "ninf" are left out: NaN and infinity keep their meaning.
FASTMATH = {"reassoc", "contract", "arcp", "nsz"}
CACHE_LINE_BYTES = 64
PREFETCHED = 256  # numbers in one `prefetch`: four tokens of a head of 64


# ---- the compiler --------------------------------------------------------------------------------
def compiled(function: Callable, **options) -> Callable:
    """Compile a function with Numba and keep the result on disk.

    The function releases the interpreter's lock (GIL) while it runs, so that threads run in
    parallel. Numba compiles it again when the function's own file changes, but not when a file
    that it imports changes: after an edit in this file, or in another one whose compiled functions
    others call, delete kernels/__pycache__.
    """
    if not HAS_NUMBA:
        return function
    # "numpy": x / 0 is infinite or NaN. Python's error would be a branch in the loop, and LLVM does
    # not vectorise such a loop.
    options = {"nogil": True, "fastmath": FASTMATH, "error_model": "numpy"} | options
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for the result: a read-only installation, no home folder
        warn_of_no_cache()
        return njit(**options)(function)


def compiled_parallel(function: Callable) -> Callable:
    """`compiled` for a function whose loops over `prange` run on several threads."""
    return compiled(function, parallel=True)


def compiled_in_order(function: Callable) -> Callable:
    """`compiled` for a function whose sums are added in the order of its loops.

    A compiled caller contains a copy of each function that it calls, and LLVM optimises that copy
    again. With FASTMATH it may then add in another order, and the copy's last bits may differ from
    the function's own. Which of the two runs depends on what the process has compiled before.
    """
    return compiled(function, fastmath=False)


@functools.cache  # said once
def warn_of_no_cache() -> None:
    """Say why each process takes some seconds more, and what changes that."""
    places = "neither beside the code nor in a home folder a file can be written"
    slow = "each process compiles the CPU's kernels again"
    warnings.warn(f"{places}: {slow}; set NUMBA_CACHE_DIR to a folder", stacklevel=3)


def inlined(function: Callable) -> Callable:
    """Compile a function as a part of each function that calls it."""
    return njit(inline="always", fastmath=FASTMATH)(function) if HAS_NUMBA else function


# ---- threads -------------------------------------------------------------------------------------
@functools.cache
def has_openmp_threads() -> bool:
    """Whether loops over `prange` run on OpenMP's threads, which PyTorch's operators also use.

    OpenMP's threads wait for their next task in a busy loop for some milliseconds. Threads of
    another library would compete with them for the cores. Numba chooses its threading library once
    a process, before it starts the first thread. (Numba's own library, "workqueue", aborts the
    process when two Python threads use it at the same time.)
    """
    if numba.config.THREADING_LAYER == "default":
        numba.config.THREADING_LAYER = "omp"
    before = torch.get_num_threads()
    try:
        numba.get_num_threads()  # starts the threads
    except ValueError:  # no OpenMP on this machine
        return False
    finally:
        torch.set_num_threads(before)  # Numba's start has set it to the number of cores
    return numba.threading_layer() == "omp"


requested = threading.local()  # .num_threads: what this Python thread has last asked Numba for


def use_openmp_threads(num_threads: int) -> bool:
    """Run this Python thread's next `prange` loops on `num_threads` threads of OpenMP.

    Returns False, and changes nothing, where OpenMP is missing.
    """
    if not has_openmp_threads():
        return False
    if getattr(requested, "num_threads", None) != num_threads:  # the call takes some microseconds
        numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
        requested.num_threads = num_threads
    return True


@functools.cache
def worker_threads(process_id: int, num_threads: int) -> ThreadPoolExecutor:
    """A pool of threads that sleep between calls, for machines without OpenMP.

    The process id is a part of the cache's key because threads do not survive a fork.
    """
    return ThreadPoolExecutor(num_threads, thread_name_prefix="attention")


# ---- seven operations that Numba lacks -----------------------------------------------------------
def widen(x):
    """A number of the pool as float32 or float64; bfloat16 is the upper half of a float32."""


def narrow(x, out):
    """A float32 as a number of the array `out`; for bfloat16 (uint16) rounded, ties to even."""


def token_scale(pool, index):
    """The bfloat16 at byte `index` of a pool of int8, as float32; 1 for a pool of another type.

    For another type the compiler sees a product with the constant 1, and removes it.
    """


def power_of_two(x):
    """2^x for x up to 127: in float32 with an error below 2 eps, 0 for x below -126.5."""


def prefetch(array, index):
    """Start loading PREFETCHED numbers from array[index] on; harmless at any index."""


def prefetch_line(array, index):
    """Start loading the cache line of array[index]; harmless at any index."""


def arrays_at(arrays, addresses):
    """The same arrays, in tuples of tuples, but array i begins at addresses[i] (int64).

    The caller keeps alive what lies there.
    """


# The Taylor series of e^(f ln 2) = 2^f: its coefficients are ln(2)^i / i!.
C1, C2, C3, C4, C5, C6, C7 = (math.log(2) ** i / math.factorial(i) for i in range(1, 8))


def power_of_two_float32(x):
    """2^x = 2^n 2^f: n is the integer next to x, and f, in [-1/2, 1/2], goes into the series.

    2^n is made by writing n + 127 into the exponent of a float32 (bits 23 to 30).
    """
    is_zero = x <= np.float32(-127)
    # x + 127.5 is positive, so the cast rounds down. For NaN the exponent is 0, and f is NaN.
    exponent = np.int32(x + np.float32(127.5)) if x > np.float32(-127) else np.int32(0)
    n = np.int32(exponent - 127)  # Numba would subtract in 64 bits and fill half a register
    f = np.float32(0) if is_zero else x - np.float32(n)
    series = np.float32(C6) + f * np.float32(C7)
    series = np.float32(C5) + f * series
    series = np.float32(C4) + f * series
    series = np.float32(C3) + f * series
    series = np.float32(C2) + f * series
    series = np.float32(C1) + f * series
    series = np.float32(1) + f * series
    return series * np.int32(exponent << np.int32(23)).view(np.float32)


if HAS_NUMBA:

    @overload(widen)
    def _widen(x):
        if x == types.uint16:  # NumPy has no bfloat16: its 16 bits come as an integer
            return lambda x: np.uint32(np.uint32(x) << 16).view(np.float32)
        if x == types.int8:
            return lambda x: np.float32(x)
        return lambda x: x

    @overload(narrow)
    def _narrow(x, out):
        if out.dtype != types.uint16:
            return lambda x, out: x

        def rounded(x, out):
            bits = np.float32(x).view(np.uint32)
            # Half of the last kept digit, minus one if that digit is even.
            half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            upper = np.uint32(bits + half) >> np.uint32(16)
            return np.uint16(upper) if x == x else np.uint16(0x7FC0)

        return rounded

    @intrinsic
    def token_scale(typingctx, pool, index):  # noqa: F811, D103
        def generate(context, builder, signature, args):
            if pool.dtype != types.int8:
                return ir.Constant(ir.FloatType(), 1.0)
            data = context.make_array(pool)(context, builder, args[0]).data
            pointer = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(16).as_pointer())
            bits = builder.zext(builder.load(pointer, align=2), ir.IntType(32))
            return builder.bitcast(builder.shl(bits, ir.IntType(32)(16)), ir.FloatType())

        return types.float32(pool, types.int64), generate

    @overload(power_of_two)
    def _power_of_two(x):
        if x == types.float32:
            return power_of_two_float32
        return lambda x: np.exp2(x)

    def emit_prefetch(context, builder, array, args, num_bytes):
        """Write one prefetch instruction for each cache line of `num_bytes` from array[index]."""
        pointer, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        data = context.make_array(array)(context, builder, args[0]).data
        signature = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
        first = builder.bitcast(builder.gep(data, [args[1]]), pointer)
        # 2 is the second-level cache, whose queue of pending loads is longer; 3 is the first-level
        # cache, better for bfloat16, which takes longer to widen and multiply than to load.
        cache_level = i32(2 if array.dtype.bitwidth >= 32 else 3)
        for offset in range(0, num_bytes, CACHE_LINE_BYTES):
            address = builder.gep(first, [i32(offset)])
            builder.call(function, [address, i32(0), cache_level, i32(1)])  # 0: read, 1: data
        return context.get_dummy_value()

    @intrinsic
    def prefetch(typingctx, array, index):  # noqa: F811, D103
        num_bytes = PREFETCHED * array.dtype.bitwidth // 8

        def generate(context, builder, signature, args):
            return emit_prefetch(context, builder, array, args, num_bytes)

        return types.void(array, types.int64), generate

    @intrinsic
    def prefetch_line(typingctx, array, index):  # noqa: F811, D103
        def generate(context, builder, signature, args):
            return emit_prefetch(context, builder, array, args, CACHE_LINE_BYTES)

        return types.void(array, types.int64), generate

    @intrinsic
    def arrays_at(typingctx, arrays, addresses):  # noqa: F811, D103
        def generate(context, builder, signature, args):
            table = context.make_array(addresses)(context, builder, args[1]).data
            index = itertools.count()

            def move(kind, value):
                if isinstance(kind, types.BaseTuple):
                    items = cgutils.unpack_tuple(builder, value)
                    return context.make_tuple(builder, kind, list(map(move, kind.types, items)))
                if not isinstance(kind, types.Array):
                    return value
                array = context.make_array(kind)(context, builder, value)
                address = builder.load(builder.gep(table, [ir.IntType(64)(next(index))]))
                array.data = builder.inttoptr(address, array.data.type)
                array.meminfo = cgutils.get_null_value(array.meminfo.type)
                array.parent = cgutils.get_null_value(array.parent.type)
                return array._getvalue()

            return move(arrays, args[0])

        return arrays(arrays, addresses), generate


# ---- intrinsics: functions that write LLVM's language --------------------------------------------
def processor_features() -> set[str]:
    """The processor's features by LLVM's names; empty without Numba."""
    features = binding.get_host_cpu_features() if HAS_NUMBA else {}
    return {name for name, is_present in features.items() if is_present}


def data_of_arrays(context, builder, signature, args) -> list:
    """An intrinsic's arguments as LLVM's values; an array is the address of its numbers."""
    return [
        context.make_array(kind)(context, builder, value).data
        if isinstance(kind, types.Array)
        else value
        for kind, value in zip(signature.args, args, strict=True)
    ]


def in_all_lanes(builder, number, lanes: int):
    """A vector of `lanes` numbers of 32 bits, all equal to an LLVM value."""
    undefined = ir.VectorType(number.type, lanes)(ir.Undefined)
    i32 = ir.IntType(32)
    first = builder.insert_element(undefined, number, i32(0))
    return builder.shuffle_vector(first, undefined, ir.VectorType(i32, lanes)([0] * lanes))


# ---- tensors for Numba ---------------------------------------------------------------------------
def flat_memory(tensor: Tensor) -> np.ndarray:
    """A tensor's memory, from its first element to the end of its storage, as a 1-D array.

    Nothing is copied. A view of the pool is not contiguous, and LLVM vectorises loops only over
    arrays that are. So a kernel gets this array and the tensor's strides, and computes the indices.
    """
    begin, num_bytes = tensor.storage_offset(), tensor.untyped_storage().nbytes()
    length = num_bytes // tensor.itemsize - begin
    return as_numpy(torch.as_strided(tensor.detach(), (length,), (1,), begin))


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor as a NumPy array of the same memory; bfloat16 comes as uint16."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(np.uint16)
