"""device_memory.py: tensors in huge pages, freed with their last view."""

import gc
import math
import mmap
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import device_memory
from kernels.device_memory import (
    copy_to_host,
    free_in_container,
    free_memory_bytes,
    preallocate,
    split_drawn,
)
from kv_cache import KVCache
from llm import LLM
from model import GPT, GPTConfig

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


# ---- how much is free ----------------------------------------------------------------------------
GIB = 1 << 30


def groups(tmp_path, membership, **files):
    """A folder of control groups, and the file that says in which of them this process is."""
    for name, text in {"group": membership, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path, tmp_path / "group"


V2_FILES = {
    "box/memory.max": f"{3 * GIB}\n",
    "box/memory.current": f"{2 * GIB}\n",  # a half of it cached files that nobody uses
    "box/memory.stat": f"anon {GIB}\ninactive_file {GIB}\n",
    "box/job/memory.max": "max\n",
    "box/job/memory.current": f"{2 * GIB}\n",
    "box/job/memory.stat": "anon 0\n",
}
V1_FILES = {
    "memory/memory.limit_in_bytes": f"{3 * GIB}\n",
    "memory/memory.usage_in_bytes": f"{2 * GIB}\n",
    "memory/memory.stat": f"cache {GIB}\ntotal_inactive_file {GIB // 2}\n",
}
CONTAINERS = {
    "version 2, a limit of a group above": ("0::/box/job\n", V2_FILES, 2 * GIB),
    "version 2, no limit": ("0::/\n", V2_FILES, sys.maxsize),
    "version 1, mounted as the root": (
        "7:pids:/x\n4:memory:/docker/5b49\n",
        V1_FILES,
        3 * GIB // 2,
    ),
    "version 1, no group with memory": ("7:pids:/x\n", V1_FILES, sys.maxsize),
    "full": ("0::/box", V2_FILES | {"box/memory.current": f"{9 * GIB}"}, 0),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_in_a_container_what_its_limit_leaves_is_free(tmp_path, monkeypatch, name):
    membership, files, expected = CONTAINERS[name]
    root, group = groups(tmp_path, membership, **files)
    assert free_in_container(root, group) == expected
    monkeypatch.setattr(device_memory, "CGROUPS", root)
    monkeypatch.setattr(device_memory, "MEMBERSHIP", group)
    monkeypatch.setattr(device_memory.psutil, "virtual_memory", machine_of(8 * GIB))
    assert free_memory_bytes("cpu") == min(expected, 8 * GIB)


def machine_of(num_bytes):
    return lambda: SimpleNamespace(available=num_bytes)


def test_a_system_without_proc_and_sysconf_says_what_is_free(tmp_path, monkeypatch):
    """Windows has neither; psutil asks it in its own way."""
    monkeypatch.setattr(device_memory, "MEMBERSHIP", tmp_path / "none")
    monkeypatch.setattr(device_memory.psutil, "virtual_memory", machine_of(5 * GIB))
    monkeypatch.delattr("os.sysconf", raising=False)
    assert free_memory_bytes("cpu") == 5 * GIB

    def unknown():
        raise FileNotFoundError("/proc/meminfo")

    monkeypatch.setattr(device_memory.psutil, "virtual_memory", unknown)
    assert free_memory_bytes("cpu") == sys.maxsize  # a pool of a given size can be built
    assert LLM(num_blocks=8).config.num_blocks == 8


def test_a_pool_beyond_the_containers_limit_is_refused_before_its_memory_is_touched(
    tmp_path, monkeypatch
):
    root, group = groups(tmp_path, "0::/box", **V2_FILES | {"box/memory.max": f"{GIB + 10**7}"})
    monkeypatch.setattr(device_memory, "CGROUPS", root)
    monkeypatch.setattr(device_memory, "MEMBERSHIP", group)
    monkeypatch.setattr("llm.preallocate", lambda *args, **kwargs: pytest.fail("allocated"))
    model = GPT(GPTConfig(vocab_size=97, max_seq_len=64, n_layer=2, n_head=2, n_embd=32))
    with pytest.raises(ValueError, match="the pool needs 20 MB, 10 MB are free: lower num_blocks"):
        LLM(model, num_blocks=2441)  # of 8,192 bytes, and one more


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
