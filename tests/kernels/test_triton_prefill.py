"""The GPU's kernel for many queries, and the KV write, against dense attention in float64.

What holds for all attention kernels stands in attention_rules.py. Here are queries that read
different pasts, tiles of queries, and the write against `write_kv` of kv_cache.py.
"""

import math

import pytest
import torch
from attention_rules import ReaderRules, check_compiled
from worlds import (
    ALL_DTYPES,
    DEVICE,
    DTYPES,
    ON_GPU,
    SEED,
    check_on_device,
    needs_gpu,
    needs_triton,
    random_world,
    some,
    world_of,
)

from kernels import triton_prefill as module
from kernels.device_memory import free_memory_bytes
from kernels.triton_prefill import HAS_TRITON, paged_prefill_triton, write_kv_triton
from kv_cache import KVCache, write_kv

pytestmark = [needs_triton(HAS_TRITON), pytest.mark.device]


class TestPrefill(ReaderRules):
    """Up to 17 queries a sequence."""

    kernel = staticmethod(paged_prefill_triton)

    def query_len(self, context_len, number):
        return min(context_len, 17)


def check(world, **changes):
    return check_on_device(paged_prefill_triton, world, **changes)


def run(world, **changes):
    return world.run(paged_prefill_triton, **changes)


# ---- it is attention -----------------------------------------------------------------------------
@needs_gpu
def test_the_kernels_are_compiled_not_interpreted():
    check_compiled(module, "prefill_kernel", "write_kv_kernel")


@pytest.mark.parametrize("tile, dtype", some(8, [16, 32, 64, 128], DTYPES), ids=str)
def test_lengths_around_a_tile_of_queries_and_of_keys(tile, dtype):
    queries = [tile - 1, tile, tile + 1, 1, 2]
    contexts = [tile - 1, tile, 2 * tile, 2 * tile + 1, tile + 1]
    check(world_of(queries, contexts, block_size=16, dtype=dtype))


def test_many_short_sequences_find_their_tiles():
    """Every number of sequences takes another number of steps to search."""
    for n in (1, 2, 3, 4, 5, 7, 8, 9, 33):
        queries = [(i * 7) % 4 for i in range(n)]
        check(world_of(queries, [q + i % 5 for i, q in enumerate(queries)]))


# ---- what may be read ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_padded_rows", [1, 5, 200])
def test_rows_after_the_queries_of_a_prompt_are_zero(num_padded_rows):
    world = world_of([2, 1], [4, 9], num_padded_rows=num_padded_rows)
    world.qkv[3:] = math.nan
    result = check(world)
    assert result[3:].abs().max() == 0


def test_decodes_may_be_left_to_another_kernel():
    world = world_of([6, 1, 0, 2, 1], [6, 9, 4, 7, 1], num_padded_rows=2)
    out = torch.full_like(world.q, 7.0)
    run(world, out=out, skip_decode=True)
    expected = world.expected()
    expected[[6, 9]] = 7.0  # the rows of the two sequences with one query each
    torch.testing.assert_close(out.double(), expected, atol=world.bound(), rtol=0)


# ---- random worlds -------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(SEED, SEED + (3 if ON_GPU else 5)))
def test_any_ragged_batch_equals_dense_attention(seed, dtype):
    # A GPU compiles for each type, block size and head size: few of these, many batches of each.
    first = random_world(seed, dtype=dtype, device=DEVICE)
    shape = {name: getattr(first, name) for name in ("block_size", "group", "head_dim")}
    for batch in range(50 if ON_GPU else 1):
        longest = 700 if ON_GPU else 40
        world = random_world(1000 * batch + seed, longest, dtype=dtype, device=DEVICE, **shape)
        check(world, max_query_len=300, max_context_len=2000)


# ---- writing K and V -----------------------------------------------------------------------------
def written(write, k, v, dtype, slots, block_size=4):
    """A poisoned pool of two layers after a write to its second: all of it, NaN as 99."""
    cache = KVCache(2, 12, block_size, k.shape[1], k.shape[2], dtype=dtype, device=DEVICE)
    cache.pool.fill_(math.nan)
    write(k.to(DEVICE), v.to(DEVICE), *cache.layer(1), slots.to(DEVICE))
    return cache.pool.nan_to_num(99.0)


@pytest.mark.parametrize(
    "shape, block_size, dtype",
    some(24, [(1, 1), (3, 5), (12, 64), (25, 80), (1, 256)], [1, 3, 16, 256], DTYPES),
    ids=str,
)
def test_k_and_v_are_written_where_pytorch_writes_them(shape, block_size, dtype):
    k, v = torch.randn(2, 11, *shape).to(dtype)
    slots = torch.randperm(12 * block_size)[:11]
    want = written(write_kv, k, v, dtype, slots, block_size)
    assert torch.equal(written(write_kv_triton, k, v, dtype, slots, block_size), want)
    assert (want != 99).sum() == 2 * k.numel(), "only these slots"


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(x, marks=[pytest.mark.oracle] * (x == torch.float32)) for x in DTYPES],
    ids=str,
)
def test_k_and_v_may_be_slices_of_the_qkv_product(dtype):
    qkv = torch.randn(9, 3 * 2 * 8, device=DEVICE).to(dtype)
    _, k, v = (x.unflatten(1, (2, 8)) for x in qkv.split(16, dim=1))
    assert not k.is_contiguous()
    slots = torch.tensor([23, 0, 14, 31, 5, 9, 47, 46, 2])
    want = written(write_kv, k, v, dtype, slots)
    assert torch.equal(written(write_kv_triton, k, v, dtype, slots), want)


@pytest.mark.filterwarnings("ignore:overflow")  # 65,504 is 65,536 in bf16, beyond fp16
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.bfloat16])
def test_values_are_rounded_to_the_type_of_the_pool(given, dtype):
    values = [1.0, 1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11, 65504.0, 2.0**-24, 0.1, -0.0]
    k = torch.tensor(values, dtype=given).view(1, 1, 8)
    slots = torch.tensor([5])
    want = written(write_kv, k, -k, dtype, slots)
    assert torch.equal(written(write_kv_triton, k, -k, dtype, slots), want)


def test_no_rows_write_nothing():
    nothing, slots = torch.empty(0, 2, 8), torch.empty(0, dtype=torch.int64)
    assert (written(write_kv_triton, nothing, nothing, torch.float32, slots) == 99).all()


def test_padded_rows_may_all_write_to_scratch():
    k, v = torch.randn(2, 4, 2, 8)
    pool = written(write_kv_triton, k, v, torch.float32, torch.tensor([7, 48, 48, 48])).cpu()
    assert torch.equal(pool[1, 1, 0, :, 3], k[0]) and torch.equal(pool[1, 1, 1, :, 3], v[0])
    assert (pool[:, :12] != 99).sum() == 2 * 2 * 8


# ---- large pools ---------------------------------------------------------------------------------
# Blocks, heads, block size and head size: a layer of GPT-2's, with K beside V, passes 2**31
# elements at block 87,381; in the other pool slots pass 2**31, and elements 2**32.
FAR = [(88_000, 12, 16, 64), (2**23 + 100, 1, 256, 1)]


@pytest.mark.parametrize("num_blocks, num_kv_heads, block_size, head_dim", FAR)
def test_ids_and_slots_beyond_two_to_the_31(num_blocks, num_kv_heads, block_size, head_dim):
    if free_memory_bytes(DEVICE) < 4 * num_blocks * num_kv_heads * block_size * head_dim:
        pytest.skip("the pool is larger than the device's memory")
    shape = {"num_kv_heads": num_kv_heads, "block_size": block_size, "head_dim": head_dim}
    world = world_of([1, 9], [5, 40], dtype=torch.float16, **shape)
    world.move_to_the_end_of(num_blocks)
    assert world.tables[0][0] * world.k_cache.stride(0) > 2**31
    check(world)

    slots = torch.tensor([world.tables[0][0] * block_size + 5, num_blocks * block_size])
    assert block_size < 256 or slots.min() > 2**31
    k, v = torch.randn(2, 2, num_kv_heads, head_dim, device=DEVICE).half()
    write_kv_triton(k, v, world.k_cache, world.v_cache, slots.to(DEVICE))
    for cache, values in ((world.k_cache, k), (world.v_cache, v)):
        assert torch.equal(cache[world.tables[0][0], :, 5], values[0])
        assert torch.equal(cache[num_blocks, :, 0], values[1])


# ---- only a GPU can say --------------------------------------------------------------------------
@needs_gpu
def test_prompts_of_gpt2s_shape():
    sizes = {"num_kv_heads": 12, "head_dim": 64, "block_size": 16}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        check(world_of([512] * 8, [512] * 8, dtype=dtype, **sizes))


@needs_gpu
def test_a_batch_may_have_more_rows_than_a_grids_second_axis():
    """70,000 sequences of one token, and as many slots: only a grid's first axis is that long."""
    n = 70_000
    q, k, v = torch.randn(3, n, 1, 16, device=DEVICE)
    k_cache, v_cache = torch.full((2, n + 1, 1, 1, 16), math.nan, device=DEVICE)
    slots = torch.randperm(n, device=DEVICE)
    write_kv_triton(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache[slots, :, 0], k) and torch.equal(v_cache[slots, :, 0], v)
    ones = torch.ones(n, dtype=torch.int32, device=DEVICE)
    locs = torch.arange(n + 1, dtype=torch.int32, device=DEVICE)
    out = paged_prefill_triton(q, k_cache, v_cache, slots.int()[:, None], locs, ones, 0.25, 1, 1)
    torch.testing.assert_close(out, v, atol=1e-6, rtol=0)  # one position: its value
