"""The simple kernels of the lesson, in poisoned pools: compiled on a GPU, else interpreted.

What only a compiler can refuse is tested by `tests/kernels/compile_kernels.py`.
"""

import math
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from worlds import (
    ALL_DTYPES,
    DEVICE,
    DTYPES,
    SMALL_WORLDS,
    check_on_device,
    random_world,
    world_of,
)

import paged_attention_triton as module
from baselines import generate_no_cache
from block_allocator import BlockAllocator
from engine import InferenceEngine, eager_forward
from kernels.backends import BACKENDS, resolve_backend
from kv_cache import KVCache, write_kv
from paged_attention_triton import paged_attention_triton_simple, write_kv_triton_simple
from sampling import SamplingParams
from scheduler import Scheduler

pytestmark = pytest.mark.device
needs_triton = pytest.mark.skipif(not module.HAS_TRITON, reason="triton exists for Linux only")


def check(world, **changes):
    return check_on_device(paged_attention_triton_simple, world, **changes)


# ---- attention -----------------------------------------------------------------------------------
@needs_triton
@pytest.mark.parametrize("fields", SMALL_WORLDS.values(), ids=SMALL_WORLDS)
def test_it_equals_dense_attention(fields):
    check(world_of(**fields, dtype=DTYPES[0]))


@needs_triton
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_every_type_is_summed_in_32_bits_or_more(dtype):
    check(world_of([1, 9], [70, 9], dtype=dtype, block_size=16))


@needs_triton
@pytest.mark.parametrize("seed", range(4))
def test_random_batches_with_bounds_larger_than_needed(seed):
    world = random_world(seed, longest=12, device=DEVICE, dtype=torch.float32)
    arguments = world.arguments()
    check(world, max_query_len=arguments["max_query_len"] + 3, max_context_len=100)


@needs_triton
def test_a_decode_over_the_1024_tokens_of_gpt2():
    check(world_of([1, 2], [1024, 1023], block_size=16, dtype=torch.float32))


# ---- the write -----------------------------------------------------------------------------------
@needs_triton
@pytest.mark.parametrize("kv_dtype", [torch.float64, torch.float32])
def test_the_write_kernel_equals_write_kv(kv_dtype):
    """Slices of a QKV product, head size 6, padded rows that share the scratch slot, no row."""
    qkv = torch.randn(5, 2 + 3 + 3, 6, dtype=kv_dtype, device=DEVICE)
    k, v = qkv[:, 2:5], qkv[:, 5:]
    slots = torch.tensor([7, 0, 11, 12, 12], device=DEVICE)  # blocks of 3 tokens, scratch is 4
    k[4], v[4] = k[3], v[3]  # which of two equal rows comes last makes no difference
    pools = torch.full((2, 5, 2, 3, 3, 6), 99.0, device=DEVICE)
    for pool, write in zip(pools, (write_kv, write_kv_triton_simple), strict=True):
        write(k, v, pool[:, 0], pool[:, 1], slots)
        write(k[:0], v[:0], pool[:, 0], pool[:, 1], slots[:0])
    assert torch.equal(pools[0], pools[1]) and (pools[1] != 99).sum() == 4 * 2 * 3 * 6


@needs_triton
def test_block_ids_beyond_two_to_the_31_elements():
    num_blocks = 88_000  # a layer of GPT-2's, K beside V, passes 2**31 elements at block 87,381
    world = world_of([1], [20], num_kv_heads=12, block_size=16, head_dim=64, dtype=torch.float16)
    world.move_to_the_end_of(num_blocks)
    assert world.tables[0][0] * world.k_cache.stride(0) > 2**31
    check(world)
    k, v = torch.randn(2, 1, 12, 64, device=DEVICE).half()
    slot = torch.tensor([world.tables[0][0] * 16 + 5], device=DEVICE)
    write_kv_triton_simple(k, v, world.k_cache, world.v_cache, slot)
    assert torch.equal(world.v_cache[world.tables[0][0], :, 5], v[0])


# ---- refusals ------------------------------------------------------------------------------------
@needs_triton
def test_tensors_that_the_kernels_would_misread_are_refused():
    world = world_of([2], [5], num_kv_heads=2)
    with pytest.raises(ValueError, match="q has strides .*: the last one must be 1"):
        world.run(paged_attention_triton_simple, q=world.q.mT.contiguous().mT)
    with pytest.raises(ValueError, match="different strides: take both from one pool"):
        world.run(paged_attention_triton_simple, v_cache=world.v_cache.contiguous())


def test_without_triton_the_file_is_imported_and_says_why_it_cannot_run():
    code = "import sys; sys.modules['triton'] = None; import runpy, torch\n"
    code += "names = runpy.run_path('paged_attention_triton.py'); names['demo']()\n"
    code += "names['check_tensors'](q=torch.zeros(1))"
    options = {"cwd": ROOT, "env": os.environ, "capture_output": True, "encoding": "utf-8"}
    run = subprocess.run([sys.executable, "-c", code], **options)
    assert run.stdout.startswith("ok: Triton is not installed")
    assert run.stderr.splitlines()[-1].startswith("RuntimeError: triton is not installed")


# ---- the backend ---------------------------------------------------------------------------------
@needs_triton
def test_the_backend_runs_only_where_it_is_named():
    device = torch.device(DEVICE)
    assert resolve_backend("triton-simple", device, torch.float32) == "triton-simple"
    assert resolve_backend("auto", device, torch.float32) != "triton-simple"


@needs_triton
def test_an_engine_on_this_backend_writes_the_tokens_of_generation_without_a_cache(
    tiny_gpt, monkeypatch
):
    """Prefill, chunks of a prompt, decoding and both in one step; the kernels that ran are ours."""
    model = tiny_gpt(seed=5, dtype=torch.float64, n_layer=1, n_head=2, n_embd=32).to(DEVICE)
    calls = []

    def counted(name):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: calls.append(name) or kernel(*a, **k))

    counted("paged_attention_triton_simple")
    counted("write_kv_triton_simple")
    kernels = BACKENDS["triton-simple"]
    cache = KVCache(1, 32, 4, 2, 16, dtype=torch.float64, device=DEVICE)
    cache.pool.fill_(math.nan)
    forward = eager_forward(model, cache, kernels.paged_attention, kernels.write_kv)
    scheduler = Scheduler(BlockAllocator(32, 4), 8, 8, 64)
    engine = InferenceEngine(forward, cache, scheduler, vocab_size=97)
    numbers = random.Random(1)
    prompts = [[numbers.randrange(97) for _ in range(length)] for length in (3, 14, 1)]
    params = SamplingParams(temperature=0, max_tokens=6)
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    texts, steps = {}, 0
    while engine.has_unfinished():
        step = engine.step()
        steps += 1
        texts |= {o.request_id: o.outputs[0].token_ids for o in step.finished}
    assert [texts[i] for i in ids] == generate_no_cache(model, prompts, 6)
    assert len({token for text in texts.values() for token in text}) > 4
    assert calls == ["write_kv_triton_simple", "paged_attention_triton_simple"] * steps
