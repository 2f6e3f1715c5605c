"""device_memory.py: tensors in huge pages, freed with their last view."""

import gc
import math
import mmap
import re
from pathlib import Path

import pytest
import torch

from kernels import device_memory
from kernels.device_memory import copy_to_host, preallocate, split_drawn
from kv_cache import KVCache

LARGE = (33, 1 << 20)  # 132 MiB of float32
HAS_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_large_memory_is_of_the_shape_and_type_asked_for():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        memory = preallocate((3, 5, 1 << 18), dtype)
        assert memory.shape == (3, 5, 1 << 18) and memory.dtype == dtype
        assert memory.is_contiguous() and memory.device.type == "cpu"
        memory[2, 4, -1] = 1.5
        assert memory[2, 4, -1] == 1.5 and memory.flatten()[-1] == 1.5


@pytest.mark.skipif(
    not HAS_HUGE_PAGES.exists() or "[never]" in HAS_HUGE_PAGES.read_text(),
    reason="this system has no huge pages",
)
def test_a_large_pool_lies_in_huge_pages():
    def in_huge_pages() -> int:
        kilobytes = re.findall(r"AnonHugePages: +(\d+)", Path("/proc/self/smaps").read_text())
        return sum(map(int, kilobytes)) * 1024

    before = in_huge_pages()
    cache = KVCache(
        2, num_blocks=671, block_size=16, num_kv_heads=12, head_dim=64, allocate=preallocate
    )
    gained = in_huge_pages() - before
    # All but the two ends; and a busy machine may lack free pieces of 2 MB.
    assert gained > cache.pool.nbytes / 2, f"{gained} of {cache.pool.nbytes} bytes"
    assert not cache.pool.any()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own count")
def test_large_memory_is_freed_with_its_last_view():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    num_bytes = math.prod(LARGE) * 4
    before = resident()
    memory = preallocate(LARGE, torch.float32).zero_()
    assert resident() - before > 0.9 * num_bytes
    view = memory[3]
    del memory
    assert resident() - before > 0.9 * num_bytes, "a view still reads it"
    del view
    gc.collect()
    assert resident() - before < 0.5 * num_bytes


def test_a_system_without_huge_pages_gives_ordinary_ones(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(device_memory.mmap, "mmap", Refusing)
    assert preallocate(LARGE, torch.float32).zero_().shape == LARGE
    monkeypatch.setattr(device_memory.mmap, "mmap", None)  # without the advice: not called
    monkeypatch.delattr(device_memory.mmap, "MADV_HUGEPAGE", raising=False)
    assert preallocate(LARGE, torch.float32).zero_().shape == LARGE


def test_small_tensors_are_not_mapped(monkeypatch):
    monkeypatch.setattr(device_memory.mmap, "mmap", None)
    assert preallocate((2, 3), torch.float32).shape == (2, 3)
    assert preallocate((0,), torch.float32).numel() == 0


def test_on_another_device_nothing_is_mapped(monkeypatch):
    monkeypatch.setattr(device_memory.mmap, "mmap", None)
    assert preallocate(LARGE, torch.bfloat16, "meta").is_meta
    assert preallocate(LARGE, torch.bfloat16, torch.device("meta")).dtype == torch.bfloat16


def test_what_was_drawn_comes_by_one_copy_if_it_lies_in_one_buffer(monkeypatch):
    copied = []
    whole = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda x, *a, **k: copied.append(x) or whole(x, *a, **k)
    )
    token_ids, peaks = split_drawn(torch.zeros(12 * 5, dtype=torch.uint8))
    token_ids[:] = torch.tensor([7, 50256, 0, 3, 9])
    peaks[:] = torch.tensor([1.5, float("nan"), -2.0, 0.25, 4.0])
    ids, largest = copy_to_host(token_ids[:3], peaks[:3])
    assert ids.tolist() == [7, 50256, 0] and largest[::2].tolist() == [1.5, -2.0]
    assert largest[1].isnan() and len(copied) == 1
    apart = copy_to_host(token_ids[:3], peaks[:3].clone())
    assert torch.equal(apart[0], ids) and len(copied) == 3
    token_ids.zero_()  # the next draw
    assert ids.tolist() == [7, 50256, 0]
