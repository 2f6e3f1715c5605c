"""The same attention as several backends, and which of them this machine can run.

The oracle is written in PyTorch and runs everywhere. Numba compiles a version for the CPU, Triton
two versions for the GPU. Each backend has a kernel that reads the pool and one that writes to it.
Each has limits: the kind of device, the types, a library that may be missing. The backend is chosen
once, when an engine is built, so no loop asks for it:

    backend         runs on    computes in                  needs
    triton          cuda       float16, 32, 64, bfloat16    triton    "auto" takes the first line
    triton-simple   cuda       the same                     triton    that runs on this machine, and
    numba           cpu        float32, 64, bfloat16        numba     warns if it skipped a faster
    torch           all        all of them                  nothing   one

A kernel is imported only when its backend is used: on a CPU no file of Triton's kernels is loaded.
Triton can also interpret its kernels on a CPU. That is slow and only for tests, so "auto" never
takes an interpreted kernel.

vLLM's own table: docs.vllm.ai, "Attention Backend Feature Support".
Run: python -m kernels.backends
"""

import os
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Triton reads this variable when it is imported, and accepts these values.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


# ---- the kernels: each function imports those of one backend -------------------------------------
class Kernels(NamedTuple):
    """The two functions of a backend, with the signatures of the oracle's."""

    paged_attention: Callable[..., Tensor]
    write_kv: Callable[..., None]


def triton_kernels() -> Kernels:
    """Kernels for a GPU."""
    from kernels.triton_decode import paged_attention_triton
    from kernels.triton_prefill import write_kv_triton

    return Kernels(paged_attention_triton, write_kv_triton)


def triton_simple_kernels() -> Kernels:
    """The lesson's kernels for a GPU."""
    from paged_attention_triton import paged_attention_triton_simple, write_kv_triton_simple

    return Kernels(paged_attention_triton_simple, write_kv_triton_simple)


def numba_kernels() -> Kernels:
    """Kernels for a CPU."""
    from kernels.attention_cpu import paged_attention_cpu, write_kv_cpu

    return Kernels(paged_attention_cpu, write_kv_cpu)


def torch_kernels() -> Kernels:
    """The oracle."""
    from kv_cache import write_kv
    from paged_attention import paged_attention

    return Kernels(paged_attention, write_kv)


class Backend(NamedTuple):
    """One way to read and to write the pool, and where it can be used."""

    load: Callable[[], Kernels]  # imports the kernels
    library: str | None  # the package that they need
    device: str | None  # the only kind of device that they run on; None: all
    dtypes: tuple[torch.dtype, ...]

    @property
    def paged_attention(self) -> Callable[..., Tensor]:
        """The kernel that reads the pool."""
        return self.load().paged_attention

    @property
    def write_kv(self) -> Callable[..., None]:
        """The kernel that writes new keys and values to the pool."""
        return self.load().write_kv

    @property
    def missing(self) -> str | None:
        """The name of the library that the kernels need, if it cannot be imported; else None."""
        try:
            if self.library is not None:
                import_module(self.library)
        except ImportError:  # not installed, or it does not fit the installed NumPy
            return self.library
        return None


# The fastest first: "auto" takes the first that runs.
BACKENDS = {
    "triton": Backend(
        triton_kernels,
        "triton",
        "cpu" if INTERPRETED else "cuda",
        (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    ),
    # Slower than the one above, with the same limits: "auto" never gets here.
    "triton-simple": Backend(
        triton_simple_kernels,
        "triton",
        "cpu" if INTERPRETED else "cuda",
        (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    ),
    "numba": Backend(
        numba_kernels,
        "numba",
        "cpu",
        (torch.bfloat16, torch.float32, torch.float64),
    ),
    "torch": Backend(torch_kernels, None, None, tuple(DTYPES.values())),
}


def _why_unusable(name: str, device: torch.device) -> str | None:
    """The reason why a backend cannot run on a device; None if it can."""
    backend = BACKENDS[name]
    # The device is compared first, because that imports nothing.
    if backend.device not in (None, device.type):
        return f"runs on {backend.device}, the model is on {device.type}"
    if missing := backend.missing:
        return f"needs {missing}, which is not installed"
    return None


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that was named, or the fastest for the device; the next one if it lacks `dtype`.

    A warning says that a backend was skipped because it lacks `dtype`. Raises ValueError for a
    backend that is unknown or cannot run on this machine and device.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: choose auto, {', '.join(BACKENDS)}")
    names = list(BACKENDS)
    first = 0 if backend == "auto" else names.index(backend)
    lacks_dtype = None  # the first backend that was skipped because it lacks `dtype`
    for name in names[first:]:
        reason = _why_unusable(name, device)
        if reason and name == backend:
            raise ValueError(f"backend {name!r} {reason}: choose another, or auto")
        is_interpreted = INTERPRETED and BACKENDS[name].library == "triton"
        if reason or (is_interpreted and name != backend):
            continue
        if dtype in BACKENDS[name].dtypes:
            if lacks_dtype:
                warnings.warn(f"backend {lacks_dtype!r} has no {str(dtype)[6:]}: {name!r} is used")
            return name
        lacks_dtype = lacks_dtype or name
    raise AssertionError("the last backend runs everywhere and has every dtype")


def resolve_device(device: str) -> torch.device:
    """ "auto" is the GPU where PyTorch sees one. Raises ValueError for one that is not there."""
    device = str(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}: choose auto, cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but PyTorch sees no GPU: use device='cpu'")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" is float32 on a CPU, bfloat16 on a GPU that has it, else float16."""
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: choose auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def can_record(backend: str, device: torch.device) -> bool:
    """Whether decode steps can be recorded: on a GPU, with kernels that never wait for the host."""
    return backend == "triton" and device.type == "cuda"


# --------------------------------------------------------------------------------------------------
def demo():
    """Print what this machine can run and what "auto" chooses; check that all results agree."""
    device = resolve_device("auto")
    print(f"PyTorch sees {'a GPU' if device.type == 'cuda' else 'no GPU'}\n")
    print("backend         runs on   missing   computes in")
    for name, backend in BACKENDS.items():
        dtypes = ", ".join(str(dtype)[6:] for dtype in backend.dtypes)
        print(f"{name:15} {backend.device or 'all':9} {backend.missing or '-':9} {dtypes}")
    print()
    for name in DTYPES:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            chosen = resolve_backend("auto", device, DTYPES[name])
        messages = [str(warning.message) for warning in caught]
        print(f"auto, {device.type}, {name:8} -> {chosen:7}", *messages)

    torch.manual_seed(0)
    pool = torch.randn(9, 2, 2, 4, 16, device=device)  # 8 blocks of 4 tokens, and scratch
    q = torch.randn(2, 2, 16, device=device)  # one query of each of two sequences
    block_tables = torch.tensor([[5, 0, 7], [2, 3, 8]], dtype=torch.int32, device=device)
    query_start_locs = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    context_lens = torch.tensor([10, 6], dtype=torch.int32, device=device)
    results = [
        backend.paged_attention(
            q,
            pool[:, 0],
            pool[:, 1],
            block_tables,
            query_start_locs,
            context_lens,
            scale=16**-0.5,
            max_query_len=1,
            max_context_len=10,
        )
        for name, backend in BACKENDS.items()
        if _why_unusable(name, device) is None
    ]
    error = max((result - results[-1]).abs().max().item() for result in results)
    print(f"\nlargest difference among the {len(results)} that run here: {error:.1e}")
    assert error < 1e-5
    print("ok: all backends that run here give the same attention")


if __name__ == "__main__":
    demo()
