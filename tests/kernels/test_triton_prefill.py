"""The GPU's kernel for many queries against dense attention in float64, in poisoned pools.

On a machine with a GPU the kernels are compiled and run there; elsewhere Triton interprets them in
Python, which proves the arithmetic and the addresses, but neither races nor what a compiler does.
`PAGEDGPT_SEED` chooses other random batches.
"""

import math

import pytest
import torch
from worlds import (
    ALL_DTYPES,
    BLOCK_SIZES,
    DEVICE,
    DTYPES,
    EACH_DTYPE,
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
from paged_attention import paged_attention

pytestmark = needs_triton(HAS_TRITON)


def check(world, **changes):
    return check_on_device(paged_prefill_triton, world, **changes)


def run(world, **changes):
    return world.run(paged_prefill_triton, **changes)


# ---- it is attention -----------------------------------------------------------------------------
@needs_gpu
def test_the_kernels_are_compiled_not_interpreted():
    import triton

    names = [name for name in vars(module) if name.endswith("_kernel")]
    assert set(names) >= {"prefill_kernel", "write_kv_kernel"}
    for name in names:
        assert isinstance(getattr(module, name), triton.runtime.JITFunction), name


def test_each_query_of_a_prompt_reads_its_own_past_and_itself():
    # All scores are equal, so query t gives the mean of the values 1, 2, .., t + 1.
    cache = torch.zeros(3, 2, 1, 2, 1, device=DEVICE)
    cache[[2, 0], 1, 0] = torch.tensor([[[1.0], [2.0]], [[3.0], [math.nan]]], device=DEVICE)
    out = paged_prefill_triton(
        torch.zeros(3, 1, 1, device=DEVICE),
        cache[:, 0],
        cache[:, 1],
        block_tables=torch.tensor([[2, 0]], dtype=torch.int32, device=DEVICE),
        query_start_locs=torch.tensor([0, 3], dtype=torch.int32, device=DEVICE),
        context_lens=torch.tensor([3], dtype=torch.int32, device=DEVICE),
        scale=1.0,
        max_query_len=3,
        max_context_len=3,
    )
    assert out.flatten().tolist() == pytest.approx([1.0, 1.5, 2.0], abs=1e-6)


@pytest.mark.parametrize(
    "query_len, block_size, dtype", some(40, [1, 2, 17, 300], BLOCK_SIZES, DTYPES), ids=str
)
def test_it_equals_dense_attention_whatever_the_block_size(query_len, block_size, dtype):
    edges = {1, 3 * block_size + 1, 511} if ON_GPU else {min(block_size + 1, 70)}
    contexts = sorted({query_len + n - 1 for n in edges})
    check(world_of([query_len] * len(contexts), contexts, block_size=block_size, dtype=dtype))


@pytest.mark.parametrize("block_size, dtype", some(10, BLOCK_SIZES, DTYPES), ids=str)
def test_contexts_reach_the_1024_tokens_of_gpt2(block_size, dtype):
    check(world_of([1, 17], [1024, 1023], block_size=block_size, dtype=dtype))


@pytest.mark.parametrize("tile, dtype", some(8, [16, 32, 64, 128], DTYPES), ids=str)
def test_lengths_around_a_tile_of_queries_and_of_keys(tile, dtype):
    queries = [tile - 1, tile, tile + 1, 1, 2]
    contexts = [tile - 1, tile, 2 * tile, 2 * tile + 1, tile + 1]
    check(world_of(queries, contexts, block_size=16, dtype=dtype))


@EACH_DTYPE
def test_prompts_chunks_and_decodes_are_one_call(dtype):
    queries, contexts = [6, 4, 1, 3, 1, 1, 40, 1], [6, 9, 33, 3, 1, 16, 90, 200]
    check(world_of(queries, contexts, num_kv_heads=2, dtype=dtype))


def test_many_short_sequences_find_their_tiles():
    """Every number of sequences takes another number of steps to search."""
    for n in (1, 2, 3, 4, 5, 7, 8, 9, 33):
        queries = [(i * 7) % 4 for i in range(n)]
        check(world_of(queries, [q + i % 5 for i, q in enumerate(queries)]))


@pytest.mark.parametrize(
    "group, num_kv_heads, dtype",
    some(8, [1, 2, 3, 4, 8], [1, 3], [torch.float32, torch.float16]),
    ids=str,
)
def test_a_group_of_query_heads_shares_one_head_of_k_and_v(group, num_kv_heads, dtype):
    shape = {"group": group, "num_kv_heads": num_kv_heads, "dtype": dtype}
    check(world_of([5, 1, 9], [9, 7, 40], **shape))


@pytest.mark.parametrize(
    "head_dim, dtype", some(16, [1, 5, 16, 64, 80, 96, 128, 256], DTYPES), ids=str
)
def test_any_head_size(head_dim, dtype):
    check(world_of([5, 1, 70], [9, 7, 100], head_dim=head_dim, num_kv_heads=2, dtype=dtype))


# ---- values that a softmax may fall over ---------------------------------------------------------
def test_scores_beyond_the_range_of_16_bits_are_summed_in_32():
    world = world_of([1, 3], [20, 9], head_dim=64, dtype=torch.float16, size=100.0)
    q, k = world.q[0, 0].double(), world.kv[0][0][:, 0].double()
    assert (k @ q).abs().max() > 65504, "or the test says nothing"
    # A score of 100,000 is off by its rounding in 32 bits, so are the weights; V is of size 100.
    world.check(paged_prefill_triton, bound=world.bound(of_weights=1) + 0.5)


@EACH_DTYPE
def test_very_negative_scores_do_not_divide_by_zero(dtype):
    world = world_of([3], [9], dtype=dtype)
    world.q[:] = 1.0
    world.kv[0][0][:] = -(2.0**15)
    world.write()
    result = check(world)
    assert result.abs().max() > 0


@EACH_DTYPE
def test_the_running_maximum_may_jump_at_the_end(dtype):
    """All that was summed before shrinks to nothing."""
    world = world_of([5], [137], dtype=dtype)
    world.kv[0][0][-1] = world.q[-1] * 60
    world.write()
    result = check(world)
    torch.testing.assert_close(result[-1], world.kv[0][1][-1], atol=1e-5, rtol=1e-2)


# ---- what may be read ----------------------------------------------------------------------------
@EACH_DTYPE
def test_a_context_may_start_later(dtype):
    check(world_of([1, 3, 2, 40, 100], [9, 12, 7, 90, 100], [5, 2, 0, 33, 70], dtype=dtype))


@EACH_DTYPE
def test_starts_of_zero_are_no_starts(dtype):
    starts, none = (world_of([20], [70], s, dtype=dtype) for s in ([0], None))
    assert torch.equal(run(starts), run(none))


def test_queries_before_the_start_are_zero():
    result = check(world_of([6], [6], [4]))  # two tokens behind four of padding
    assert result[:4].abs().max() == 0
    assert (result[4:].abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("start", [9, 10, 50])
def test_a_start_at_or_behind_the_end_gives_zeros(start):
    result = check(world_of([2, 1], [9, 5], [start, 0]))
    assert result[:2].abs().max() == 0
    assert result[2].abs().max() > 0


def test_a_sequence_without_queries_disturbs_nobody():
    check(world_of([0, 3, 0, 0, 1, 0, 65, 0], [5, 7, 0, 9, 2, 3, 65, 0]))


def test_a_query_over_an_empty_context_is_zero():
    result = check(world_of([1, 2, 1], [0, 6, 0]))  # as a padded row of a recorded graph
    assert result[[0, 3]].abs().max() == 0


@pytest.mark.parametrize("query_len", [5, 100])
def test_more_queries_than_context_leave_the_first_ones_zero(query_len):
    result = check(world_of([query_len], [3]))
    assert result[:-3].abs().max() == 0
    assert (result[-3:].abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("num_padded_rows", [1, 5, 200])
def test_rows_behind_the_last_sequence_are_zero(num_padded_rows):
    world = world_of([2, 1], [4, 9], num_padded_rows=num_padded_rows)
    world.qkv[3:] = math.nan
    result = check(world)
    assert result[3:].abs().max() == 0


def test_rows_without_any_query_are_zero():
    world = world_of([0, 0], [4, 9], num_padded_rows=3)
    for max_query_len in (0, 1, 4):
        check(world, max_query_len=max_query_len)


def test_no_sequences_and_no_rows():
    assert run(world_of([], [])).shape == (0, 1, 16)
    assert run(world_of([0, 0], [3, 4])).shape == (0, 1, 16)
    nobody = world_of([], [], num_padded_rows=3)
    result = run(nobody, max_query_len=1, max_context_len=4)
    assert result.shape == (3, 1, 16) and result.abs().max() == 0


# ---- the arguments -------------------------------------------------------------------------------
def test_upper_bounds_larger_than_needed_change_nothing():
    world = world_of([2, 1, 5], [9, 4, 5])
    want = check(world)
    for max_query_len, max_context_len in ((6, 9), (64, 12), (5, 1000), (1024, 1024)):
        bounds = {"max_query_len": max_query_len, "max_context_len": max_context_len}
        torch.testing.assert_close(check(world, **bounds), want, atol=1e-14, rtol=0)


def test_padded_table_columns_hold_the_scratch_block_and_are_not_read():
    check(world_of([2, 1, 5], [9, 4, 5], num_padded_columns=3))


def test_tables_may_be_a_view_of_wider_ones():
    world = world_of([2, 1, 5], [9, 4, 5])
    wide = torch.full((3, 40), world.scratch, dtype=torch.int32, device=DEVICE)
    wide[:, 10:13] = world.arguments()["block_tables"]
    check(world, block_tables=wide[:, 10:13])


@EACH_DTYPE
def test_the_result_goes_into_out_where_it_is_given(dtype):
    world = world_of([2, 0, 1, 30], [9, 3, 4, 30], num_padded_rows=2, dtype=dtype)
    out = torch.full(world.q.shape, math.nan, dtype=dtype, device=DEVICE)
    assert check(world, out=out) is out


def test_out_may_be_a_view_and_its_neighbours_are_left_alone():
    world = world_of([2, 0, 1, 30], [9, 3, 4, 30], num_padded_rows=2, num_kv_heads=2)
    wide = torch.full((len(world.q), 3 * 32), 7.0, dtype=world.dtype, device=DEVICE)
    out = wide[:, 32:64].unflatten(1, (2, 16))
    assert check(world, out=out) is out
    out.fill_(7.0)
    assert (wide == 7.0).all()


def test_out_is_zeroed_where_there_is_nothing_to_attend():
    for world in (world_of([], [], num_padded_rows=2), world_of([0], [3], num_padded_rows=2)):
        out = torch.full_like(world.q, math.nan)
        assert run(world, out=out) is out
        assert out.tolist() == torch.zeros(2, 1, 16).tolist()


@EACH_DTYPE
def test_q_may_be_a_slice_of_the_qkv_product_and_the_caches_views_of_the_pool(dtype):
    world = world_of([3, 1, 40], [7, 9, 50], num_kv_heads=2, dtype=dtype)
    assert not world.q.is_contiguous() and not world.k_cache.is_contiguous()
    views = check(world)
    names = ("q", "k_cache", "v_cache")
    copies = {name: world.arguments()[name].contiguous() for name in names}
    assert torch.equal(views, run(world, **copies))


def test_the_caches_may_have_any_strides_but_the_same_ones():
    world = world_of([3, 1, 40], [7, 9, 50], num_kv_heads=2)
    names = ("k_cache", "v_cache")
    caches = {name: world.arguments()[name] for name in names}  # heads outside, tokens inside
    turned = {name: c.transpose(1, 2).contiguous().transpose(1, 2) for name, c in caches.items()}
    assert turned["k_cache"].stride() != world.k_cache.stride()
    check(world, **turned)
    with pytest.raises(ValueError, match="strides"):
        run(world, v_cache=turned["v_cache"])


def test_the_pool_and_the_queries_are_only_read():
    world = world_of([3, 1, 40], [7, 9, 50], [0, 2, 3])
    pool, qkv = world.pool.clone(), world.qkv.clone()
    run(world)
    assert torch.equal(world.pool.nan_to_num(99.0), pool.nan_to_num(99.0))
    assert torch.equal(world.qkv, qkv)


def test_the_scale_is_an_argument():
    world = world_of([3, 1], [7, 9])
    default = run(world)
    world.scale = 1.0  # a layer's own scale is in q already
    assert (check(world) - default).abs().max() > 1e-3


def test_decodes_may_be_left_to_another_kernel():
    world = world_of([6, 1, 0, 2, 1], [6, 9, 4, 7, 1], num_padded_rows=2)
    out = torch.full_like(world.q, 7.0)
    run(world, out=out, skip_decode=True)
    expected = world.expected()
    expected[[6, 9]] = 7.0  # the rows of the two sequences with one query each
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.int32])
def test_other_types_are_refused_by_name(dtype):
    world = world_of([3, 1], [7, 9], dtype=torch.float32)
    names = ("q", "k_cache", "v_cache")
    others = {name: world.arguments()[name].nan_to_num(0).to(dtype) for name in names}
    with pytest.raises((TypeError, ValueError), match="int32"):
        run(world, **others)


# ---- it does depend on the blocks ----------------------------------------------------------------
@EACH_DTYPE
def test_where_the_blocks_lie_does_not_change_a_bit(dtype):
    world = world_of([30, 1, 2], [70, 100, 9], dtype=dtype)
    shuffled = run(world)
    ids = iter(range(sum(map(len, world.tables))))
    world.pool.fill_(math.nan)
    world.tables = [[next(ids) for _ in table] for table in world.tables]
    world.write()
    assert torch.equal(run(world), shuffled)


@EACH_DTYPE
def test_swapping_two_table_entries_changes_a_prompt(dtype):
    world = world_of([12], [12], dtype=dtype)
    right = run(world)
    table = world.tables[0]
    table[0], table[2] = table[2], table[0]
    assert (run(world) - right).abs().max() > 1e-2


def test_swapping_a_partly_filled_tail_reads_what_was_never_written():
    world = world_of([2], [11])
    table = world.tables[0]
    table[0], table[2] = table[2], table[0]
    assert run(world).isnan().all()


@EACH_DTYPE
@pytest.mark.parametrize("query_len", [1, 12])
def test_one_wrong_value_in_a_block_changes_the_result(query_len, dtype):
    for cache in ("k_cache", "v_cache"):
        world = world_of([query_len], [12], dtype=dtype)
        right = run(world)
        getattr(world, cache)[world.tables[0][1], 0, 2] += 8.0
        changed = (run(world) - right).abs().amax((1, 2)) > 1e-6
        # Position 6 was changed: whoever came before it did not read it.
        assert changed.tolist() == [p >= 6 for p in range(12 - query_len, 12)]


@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_a_nan_that_may_be_read_is_not_hidden(cache):
    """A model that overflows shows it: zeros in its place would look like an answer."""
    world = world_of([3], [150], dtype=torch.float32)
    getattr(world, cache)[world.tables[0][1], 0, 2] = math.nan
    assert run(world).isnan().all()


@pytest.mark.parametrize("context_len", [11, 150])
def test_a_context_that_is_one_too_long_reads_poison(context_len):
    world = world_of([2], [context_len - 1])
    longer = torch.tensor([context_len], dtype=torch.int32, device=DEVICE)
    result = run(world, context_lens=longer, max_context_len=context_len)
    assert result[-1].isnan().all()


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


@EACH_DTYPE
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
@EACH_DTYPE
def test_a_hundred_runs_give_the_same_bits(dtype):
    world = world_of([300, 1, 17, 64], [511, 1000, 17, 640], num_kv_heads=12, dtype=dtype)
    first = check(world)
    assert all(torch.equal(run(world), first) for _ in range(100))


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
    torch.testing.assert_close(out, v, atol=1e-6, rtol=0)  # who reads one position gets its value


def test_the_plain_kernel_and_this_one_agree():
    """The oracle of oracles: `paged_attention` in float64, over one more ragged batch."""
    world = world_of([1, 90, 3, 1], [70, 90, 64, 200], [5, 40, 63, 0], block_size=3)
    torch.testing.assert_close(run(world), world.run(paged_attention), atol=1e-12, rtol=0)
