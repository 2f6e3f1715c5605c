"""The GPU's kernels over a pool of int8: against dense attention over the rounded keys and values.

The layout and the rounding are those of speedups/quantized_kv.py, whose tests compare them with
literals; here its plain functions are the oracle. Without a GPU the kernels are interpreted.
"""

import math

import pytest
import torch
from int8_worlds import POISON, Int8World, in_int8
from worlds import DEVICE, DTYPES, ON_GPU, SEED, needs_triton, random_world, some

from kernels.triton_decode import paged_attention_triton, paged_decode_triton
from kernels.triton_fused_decode import fused_decode_triton
from kernels.triton_prefill import HAS_TRITON, write_kv_triton
from speedups.quantized_kv import QuantizedKVCache, scales_of, write_kv_int8

pytestmark = [needs_triton(HAS_TRITON), pytest.mark.device]
CONTEXTS = [70, 1, 130, 33, 0]


def int8_world(query_lens, context_lens, **kwargs):
    kwargs = {"num_kv_heads": 2, "head_dim": 16, "device": DEVICE, "dtype": torch.float32} | kwargs
    return Int8World(query_lens, context_lens, **kwargs)


def check(kernel, world, **changes):
    """Weights of 16 bits are multiplied by the scale of V and rounded: half an eps more."""
    interpreted_bf16 = world.dtype == torch.bfloat16 and not ON_GPU
    halves = {"of_result": 2} if interpreted_bf16 else {"of_weights": 1}
    bound = world.bound(**halves)
    if world.dtype == torch.float32:
        bound = max(bound, 1e-5 if ON_GPU else bound)
    return world.check(kernel, bound=bound, **changes)


@pytest.mark.oracle
@pytest.mark.parametrize("chunk_len", [0, 33, 64])
def test_one_query_a_sequence_equals_dense_attention(chunk_len):
    world = int8_world([1, 1, 1, 1, 0], CONTEXTS, group=2, block_size=16)
    check(paged_decode_triton, world, chunk_len=chunk_len)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompts_and_decodes_of_gpt2s_head_size_equal_dense_attention(dtype):
    world = int8_world([17, 1, 1, 33, 0], CONTEXTS, head_dim=64, block_size=16, dtype=dtype)
    check(paged_attention_triton, world)


@pytest.mark.parametrize("seed", range(SEED, SEED + (20 if ON_GPU else 6)))
def test_any_ragged_batch_equals_dense_attention(seed):
    """Any block size, odd ones too: the scales then begin after a byte of padding."""
    dtype = DTYPES[seed % len(DTYPES)]
    world = in_int8(random_world(seed, dtype=dtype, device=DEVICE))
    check(paged_attention_triton, world, max_query_len=300, max_context_len=2000)


@pytest.mark.parametrize("query_len", [1, 17])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_a_row_that_overflowed_is_not_hidden(cache, query_len):
    world = int8_world([query_len], [150], num_kv_heads=1)
    scales_of(getattr(world, cache))[world.tables[0][1], 0, 2] = math.nan
    assert world.run(paged_attention_triton).isnan().all()


@pytest.mark.parametrize(
    "shape, dtype", some(5, [(16, 64, 12), (3, 5, 2), (1, 1, 1)], DTYPES), ids=str
)
def test_the_write_leaves_the_bytes_of_the_plain_one(shape, dtype):
    torch.manual_seed(SEED)
    block_size, head_dim, num_heads = shape
    k, v = (torch.randn(2, 30, num_heads, head_dim, dtype=torch.float64) * 3).to(dtype)
    largest = 3 if dtype == torch.float16 else 37  # NumPy warns where float64 overflows float32
    # From 1e-30: the interpreter widens bfloat16 below 2^-126 to other numbers.
    k *= torch.logspace(-30, largest, 30, dtype=torch.float64)[:, None, None].to(dtype)
    v[3, 0] = 0
    v[6] = 1e-37  # its scale would have too few digits: the row is 0
    v[4, 0, 0] = math.inf
    v[5, :, -1] = math.nan
    slots = torch.randperm(30 * block_size)[:30]
    pools = []
    for write in (write_kv_int8, write_kv_triton):
        cache = QuantizedKVCache(2, 30, block_size, num_heads, head_dim, device=DEVICE)
        cache.pool.fill_(POISON)
        write(k.to(DEVICE), v.to(DEVICE), *cache.layer(1), slots.to(DEVICE))
        pools.append(cache.pool)
    assert torch.equal(*pools)


def test_the_fused_kernel_refuses_such_a_pool():
    world = int8_world([1], [9])
    k = torch.zeros(1, 2, 16, device=DEVICE)
    slots = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    tables = torch.zeros(1, 3, dtype=torch.int32, device=DEVICE)
    lens = torch.ones(1, dtype=torch.int32, device=DEVICE)
    caches = (world.k_cache, world.v_cache)
    with pytest.raises(ValueError, match="k_cache is int8"):
        fused_decode_triton(world.q, k, k, *caches, slots, tables, lens, 1.0, 9, lens.zero_())


def test_views_without_scales_behind_their_values_are_refused():
    world = int8_world([1], [9])
    bare = torch.zeros(world.k_cache.shape, dtype=torch.int8, device=DEVICE)
    with pytest.raises(ValueError, match="scales must follow"):
        world.run(paged_attention_triton, k_cache=bare, v_cache=bare)
