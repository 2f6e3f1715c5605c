"""Memory of a device: how much of it is free, and large pages for large tensors.

A pool of 1 GB is 262,144 ordinary pages of 4 KB. The processor caches the translation of some
2,000 pages (the TLB). Blocks of a shuffled table lie in pages whose translation is not cached, and
each read waits for it. In huge pages of 2 MB the same pool has 512 pages.

`llm.py` gives `preallocate` to the cache as its allocation function.
"""

import math
import mmap
import os
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20  # an ordinary page has 4 KB


def preallocate(
    shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Tensor:
    """Memory for good, its contents undefined; on Linux in huge pages where it is large enough.

    The operating system too has a block table, and the processor remembers some 2,000 of its
    entries. 1 GB is 262,144 ordinary pages: a shuffled block begins in one whose entry is not at
    hand, and reading waits for it. In huge pages the same pool is 512 entries.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    on_cpu = torch.device(device).type == "cpu"
    if not on_cpu or num_bytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: ordinary pages do as well
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)  # given back with the tensor


def free_memory_bytes(device: str | torch.device) -> int:
    """Memory that is free now on the device; on a CPU, of the whole machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:  # what can be had without swapping, caches included
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
