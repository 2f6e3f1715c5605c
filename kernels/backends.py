"""The same function in three dialects: which of them this machine can run.

The oracle is written in PyTorch and runs everywhere; one translation is compiled for the CPU, one
for the GPU. Each brings the kernel that reads the pool and the one that writes it, and each has its
limits: a kind of device, the types that it computes in, a library that may be missing. Somebody has
to choose, once, when an engine is built, so that no loop ever asks again:

    backend   runs on    computes in                  needs
    triton    cuda       float16, 32, 64, bfloat16    triton       "auto" takes the first line
    numba     cpu        float32, 64, bfloat16        numba        that holds on this machine,
    torch     all        all of them                  nothing      and says so where it is slower

A kernel that Triton interprets is for tests: it runs on the CPU, slowly, and only if it was named.
What a production engine does beyond this: a dozen attention backends, chosen by the chip's
generation, the head size and the type of the cache.

vLLM's own table: docs.vllm.ai, "Attention Backend Feature Support".
Run: python -m kernels.backends
Try: resolve_backend("numba", torch.device("cpu"), torch.float16), and read the warning.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention_cpu import HAS_NUMBA, paged_attention_cpu, write_kv_cpu
from kernels.triton_decode import INTERPRETED, paged_attention_triton
from kernels.triton_prefill import HAS_TRITON, write_kv_triton
from kv_cache import write_kv
from paged_attention import paged_attention

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Backend(NamedTuple):
    """One way to write and to read the pool, and where it can be used."""

    paged_attention: Callable[..., Tensor]  # of the common signature
    write_kv: Callable[..., None]
    device: str | None  # the only kind of device that it runs on
    dtypes: tuple[torch.dtype, ...]
    missing: str | None  # what it needs and does not find on this machine


# The fastest first: "auto" takes the first that runs.
BACKENDS = {
    "triton": Backend(
        paged_attention_triton,
        write_kv_triton,
        "cpu" if INTERPRETED else "cuda",
        (torch.float16, torch.bfloat16, torch.float32, torch.float64),
        None if HAS_TRITON else "triton",
    ),
    "numba": Backend(
        paged_attention_cpu,
        write_kv_cpu,
        "cpu",
        (torch.bfloat16, torch.float32, torch.float64),
        None if HAS_NUMBA else "numba",
    ),
    "torch": Backend(paged_attention, write_kv, None, tuple(DTYPES.values()), None),
}


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that was named, or the fastest for the device; the next one if it lacks `dtype`.

    That is said once, in a warning. Kernels that Triton interprets are slow and run only if they
    are named. Raises ValueError for a backend that this machine or device cannot have.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: choose auto, {', '.join(BACKENDS)}")
    names, lacking = list(BACKENDS), None
    for name in names[0 if backend == "auto" else names.index(backend) :]:
        candidate = BACKENDS[name]
        usable = candidate.missing is None and candidate.device in (None, device.type)
        if not usable and name == backend:
            fault = f"needs {candidate.missing}, which is not installed"
            if candidate.missing is None:
                fault = f"runs on {candidate.device}, the model is on {device.type}"
            raise ValueError(f"backend {name!r} {fault}: choose another, or auto")
        if not usable or (name == "triton" and INTERPRETED and name != backend):
            continue
        if dtype in candidate.dtypes:
            if lacking:
                warnings.warn(f"backend {lacking!r} has no {str(dtype)[6:]}: {name!r} is used")
            return name
        lacking = lacking or name
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
    """Whether decode steps can be recorded: on a GPU, by kernels that ask the host for nothing."""
    return backend == "triton" and device.type == "cuda"


# --------------------------------------------------------------------------------------------------
def demo():
    """What this machine can run, what "auto" chooses, and that all it can run agree."""
    device = resolve_device("auto")
    print(f"PyTorch sees {'a GPU' if device.type == 'cuda' else 'no GPU'}\n")
    print("backend   runs on   missing   computes in")
    for name, backend in BACKENDS.items():
        dtypes = ", ".join(str(dtype)[6:] for dtype in backend.dtypes)
        print(f"{name:9} {backend.device or 'all':9} {backend.missing or '-':9} {dtypes}")
    print()
    for name in DTYPES:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            chosen = resolve_backend("auto", device, DTYPES[name])
        print(f"auto, {device.type}, {name:8} -> {chosen:7}", *(str(w.message) for w in said))

    torch.manual_seed(0)
    pool = torch.randn(9, 2, 2, 4, 16, device=device)  # 8 blocks of 4 tokens, and scratch
    q = torch.randn(2, 2, 16, device=device)
    tables, lens = [[5, 0, 7], [2, 3, 8]], [10, 6]
    where = (torch.tensor(x, dtype=torch.int32, device=device) for x in (tables, [0, 1, 2], lens))
    call = (q, pool[:, 0], pool[:, 1], *where, 16**-0.5, 1, 10)
    usable = [b for b in BACKENDS.values() if not b.missing and b.device in (None, device.type)]
    results = [backend.paged_attention(*call) for backend in usable]
    error = max((result - results[-1]).abs().max().item() for result in results)
    print(f"\nlargest difference among the {len(usable)} that run here: {error:.1e}")
    assert error < 1e-5
    print("ok: whichever is chosen, attention is the same")


if __name__ == "__main__":
    demo()
