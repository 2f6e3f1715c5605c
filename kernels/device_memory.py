"""Memory of host and device: huge pages for the pool, what is free, one copy for what was drawn.

A pool of 1 GB is 262,144 ordinary pages of 4 KB. The processor caches the translation of some
2,000 pages (the TLB). Blocks of a shuffled table lie in pages whose translation is not cached, and
each read waits for it. In huge pages of 2 MB the same pool has 512 pages.

`llm.py` passes `preallocate` to the cache as its allocation function.

Checked by tests/kernels/test_device_memory.py, which counts the process's huge pages.
"""

import math
import mmap
import os
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20


def preallocate(
    shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Tensor:
    """An uninitialised tensor; in huge pages where it is on a CPU, on Linux, and 2 MB or larger.

    The memory is freed with the last tensor that is a view of it.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    on_cpu = torch.device(device).type == "cpu"
    if not on_cpu or num_bytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages: ordinary ones work too
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)  # keeps `memory` alive


def free_memory_bytes(device: str | torch.device) -> int:
    """Bytes of memory that are free now on the device; on a CPU, on the whole machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def split_drawn(buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (n,) int64 and peaks (n,) float32 that share the bytes of a buffer, (12 n,) uint8.

    The sampler writes both into one buffer, so that one copy brings both to the host.
    """
    num_rows = len(buffer) // 12
    return buffer[: 8 * num_rows].view(torch.int64), buffer[8 * num_rows :].view(torch.float32)


def copy_to_host(
    token_ids: Tensor,  # (M,) int64
    peaks: Tensor,  # (M,)
    non_blocking: bool = False,
) -> tuple[Tensor, Tensor]:
    """Copies of both in host memory; one copy if they are parts of one buffer.

    With `non_blocking` a copy from a GPU may still be under way when this returns.
    """

    def fetch(x: Tensor) -> Tensor:
        return x.to("cpu", non_blocking=non_blocking, copy=True)

    storage = token_ids.untyped_storage()
    if storage.data_ptr() != peaks.untyped_storage().data_ptr():
        return fetch(token_ids), fetch(peaks)
    buffer = torch.empty(0, dtype=torch.uint8, device=token_ids.device).set_(storage)
    all_ids, all_peaks = split_drawn(fetch(buffer))
    return all_ids[: len(token_ids)], all_peaks[: len(peaks)]
