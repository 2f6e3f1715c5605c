"""Memory of host and device: huge pages for the pool, the free bytes, one copy of drawn tokens.

A pool of 1 GiB is 262,144 ordinary pages of 4 KiB. The processor caches the address translations of
about 2,000 pages (the TLB). The blocks of a shuffled table lie in pages whose translation is not
cached, and each read waits for it. In huge pages of 2 MiB the same pool has 512 pages.

`llm.py` passes `preallocate` to the cache as its allocation function.

What is free is the smaller of what the machine has and what a container's limit leaves.

Checked by tests/kernels/test_device_memory.py, which counts the process's huge pages.
"""

import math
import mmap
import sys
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil
import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20
CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Files of a control group: its limit and its usage, and the name of cached files in memory.stat.
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
V2 = "memory.max", "memory.current", "inactive_file"


def preallocate(
    shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device = "cpu"
) -> Tensor:
    """An uninitialised tensor; in huge pages if it is on a CPU, on Linux, and 2 MiB or larger.

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
    """Bytes of memory that this process may still take on the device now.

    On a CPU that is what the machine has free, or less in a container with a limit. Where the
    operating system does not say it, nothing is known to be too much.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        on_machine = psutil.virtual_memory().available
    except (OSError, NotImplementedError):  # Linux without /proc, for example
        on_machine = sys.maxsize
    return min(on_machine, free_in_container(CGROUPS, MEMBERSHIP))


def free_in_container(root: Path, membership: Path) -> int:
    """Bytes that the control groups (cgroups) of this process leave it: Linux's limits.

    A container is a group. Each group of the path that `membership` names may have a limit, and
    the narrowest one counts. A process beyond it is killed, however much the machine has free.
    """
    room = sys.maxsize
    with suppress(OSError):  # not Linux
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(
                ":", 2
            )  # "4:memory:/docker/5b49" or "0::/docker/5b49"
            if controllers and "memory" not in controllers.split(","):
                continue
            names, mount = (V1, root / "memory") if controllers else (V2, root)
            # Inside a container its own group may be mounted as the root: all parents are tried.
            group = PurePosixPath(path.lstrip("/"))
            for folder in (group, *group.parents):
                room = min(room, _room_in_group(mount / folder, *names))
    return max(room, 0)


def _room_in_group(folder: Path, limit: str, usage: str, cached: str) -> int:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # Cached files that nobody uses now are counted as usage, and given up when memory is short.
        used = int((folder / usage).read_text()) - int(stat.get(cached, 0))
        return int((folder / limit).read_text()) - used
    except (OSError, ValueError):  # no group of this name, or the limit is "max": none
        return sys.maxsize


def split_drawn(buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids (n,) int64 and peaks (n,) float32 that share the bytes of a buffer, (12 n,) uint8.

    The sampler writes both into one buffer, so that one copy brings both to the host.
    """
    num_rows = len(buffer) // 12  # 8 bytes for an id and 4 for a peak
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
    # Both are views made by `split_drawn`. The buffer may have more rows than M: all are copied.
    buffer = torch.empty(0, dtype=torch.uint8, device=token_ids.device).set_(storage)
    all_ids, all_peaks = split_drawn(fetch(buffer))
    return all_ids[: len(token_ids)], all_peaks[: len(peaks)]
