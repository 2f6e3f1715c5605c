"""Paged attention against dense attention in float64, one sequence at a time.

Every test runs in a pool that is NaN wherever no sequence may read: see `worlds.py`.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import worlds
from worlds import SMALL_WORLDS, World

from paged_attention import paged_attention


# ---- it is attention -----------------------------------------------------------------------------
def test_one_query_reads_its_context_through_the_table():
    # Two positions in two blocks of one token; q . k = 0 for both, so it is the mean of the values.
    k_cache = torch.zeros(4, 1, 1, 2)
    v_cache = torch.full((4, 1, 1, 2), math.nan)
    v_cache[2, 0, 0], v_cache[0, 0, 0] = torch.tensor([1.0, 10.0]), torch.tensor([3.0, 30.0])
    out = paged_attention(
        torch.tensor([[[5.0, 7.0]]]),
        k_cache,
        v_cache,
        block_tables=torch.tensor([[2, 0]], dtype=torch.int32),
        query_start_locs=torch.tensor([0, 1], dtype=torch.int32),
        context_lens=torch.tensor([2], dtype=torch.int32),
        scale=1.0,
        max_query_len=1,
        max_context_len=2,
    )
    assert out.tolist() == [[[2.0, 20.0]]]


def test_each_query_of_a_prompt_reads_its_own_past_and_itself():
    # All scores are equal, so query t gives the mean of the values 1, 2, .., t + 1.
    cache = torch.zeros(3, 2, 1, 2, 1)
    cache[[2, 0], 1, 0] = torch.tensor([[[1.0], [2.0]], [[3.0], [math.nan]]])
    out = paged_attention(
        torch.zeros(3, 1, 1),
        cache[:, 0],
        cache[:, 1],
        block_tables=torch.tensor([[2, 0]], dtype=torch.int32),
        query_start_locs=torch.tensor([0, 3], dtype=torch.int32),
        context_lens=torch.tensor([3], dtype=torch.int32),
        scale=1.0,
        max_query_len=3,
        max_context_len=3,
    )
    assert out.flatten().tolist() == [1.0, 1.5, 2.0]


@pytest.mark.parametrize("query_len", [1, 2, 17, 300])
@pytest.mark.parametrize("block_size", [1, 3, 16, 32, 256])
def test_it_equals_dense_attention_whatever_the_block_size(block_size, query_len):
    edges = {1, block_size, block_size + 1, 3 * block_size + 1, 511}
    contexts = sorted({query_len + n - 1 for n in edges})
    World([query_len] * len(contexts), contexts, block_size=block_size, head_dim=4).check(
        paged_attention
    )


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7, 16])
def test_every_length_up_to_three_blocks_and_one(block_size):
    lengths = list(range(1, 3 * block_size + 2))
    World([1] * len(lengths), lengths, block_size=block_size, num_kv_heads=1).check(paged_attention)
    World(lengths, lengths, block_size=block_size, num_kv_heads=1).check(paged_attention)


@pytest.mark.parametrize("block_size", [1, 16, 32])
def test_32_bits(block_size):
    world = World([1, 30, 17], [400, 77, 17], block_size=block_size, dtype=torch.float32)
    world.check(paged_attention, bound=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [3, 16])
def test_16_bits_lose_no_more_than_the_rounding_of_the_result(dtype, block_size):
    world = World([1, 30, 17], [400, 77, 17], block_size=block_size, dtype=dtype)
    result = world.run(paged_attention)
    assert result.dtype == dtype
    half_a_bit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(result.double(), world.expected(), rtol=half_a_bit, atol=1e-5)


def test_scores_beyond_the_range_of_16_bits_are_summed_in_32():
    world = World([1, 3], [20, 9], head_dim=64, dtype=torch.float16, size=100.0)
    q, k = world.q[0, 0].double(), world.kv[0][0][:, 0].double()
    assert (k @ q).abs().max() > 65504, "or the test says nothing"
    half_a_bit = torch.finfo(torch.float16).eps / 2
    torch.testing.assert_close(
        world.run(paged_attention).double(), world.expected(), rtol=half_a_bit, atol=1e-3
    )


def test_very_negative_scores_do_not_divide_by_zero():
    world = World([2], [9])
    world.q[:] = 1.0
    k = world.kv[0][0]
    k[:] = -(10.0**6) - torch.arange(9.0).double()[:, None, None]
    for p in range(9):
        world.k_cache[world.tables[0][p // 4], :, p % 4] = k[p]
    result = world.check(paged_attention)
    assert result.abs().max() > 0


# ---- what may be read ----------------------------------------------------------------------------
@pytest.mark.parametrize("fields", SMALL_WORLDS.values(), ids=SMALL_WORLDS)
def test_what_a_query_may_read_and_which_rows_are_zero(fields):
    World(**fields).check(paged_attention)


# ---- the arguments -------------------------------------------------------------------------------
def test_the_result_goes_into_out_where_it_is_given():
    world = World([2, 0, 1], [9, 3, 4], num_padded_rows=2)
    out = torch.full_like(world.q, math.nan, memory_format=torch.contiguous_format)
    result = world.check(paged_attention, out=out)
    assert result is out


def test_out_is_zeroed_where_there_is_nothing_to_attend():
    for world in (World([], [], num_padded_rows=2), World([0], [3], num_padded_rows=2)):
        out = torch.full(world.q.shape, math.nan, dtype=torch.float64)
        assert world.run(paged_attention, out=out) is out
        assert out.tolist() == torch.zeros(2, 2, 8).tolist()


def test_the_pool_and_the_queries_are_only_read():
    world = World([3, 1], [7, 9], context_starts=[0, 2])
    pool, qkv = world.pool.clone(), world.qkv.clone()
    world.run(paged_attention)
    assert torch.equal(world.pool.nan_to_num(99.0), pool.nan_to_num(99.0))
    assert torch.equal(world.qkv, qkv)


def test_the_scale_is_an_argument():
    world = World([3, 1], [7, 9])
    default = world.run(paged_attention)
    world.scale = 1.0  # a layer's own scale is in q already
    assert (world.check(paged_attention) - default).abs().max() > 1e-3


# ---- it does depend on the blocks ----------------------------------------------------------------
def test_swapping_two_table_entries_changes_a_prompt():
    world = World([12], [12])
    right = world.run(paged_attention)
    table = world.tables[0]
    table[0], table[2] = table[2], table[0]
    assert (world.run(paged_attention) - right).abs().max() > 1e-3


def test_swapping_whole_blocks_does_not_change_one_decoded_token():
    """One query reads the whole context, and a sum does not care about its order.

    So no test of single-token decoding can notice a table whose full blocks are in the wrong order:
    such a test needs several queries at once, or a tail that is partly filled.
    """
    world = World([1], [12])
    right = world.run(paged_attention)
    table = world.tables[0]
    table[0], table[2] = table[2], table[0]
    torch.testing.assert_close(world.run(paged_attention), right, atol=1e-12, rtol=0)


@pytest.mark.parametrize("query_len", [1, 12])
def test_one_wrong_value_in_a_block_changes_the_result(query_len):
    for cache in ("k_cache", "v_cache"):
        world = World([query_len], [12])
        right = world.run(paged_attention)
        getattr(world, cache)[world.tables[0][1], 0, 2, 3] += 1.0
        changed = (world.run(paged_attention) - right).abs().amax((1, 2)) > 1e-6
        # Position 6 was changed, and queries before it do not read it.
        assert changed.tolist() == [p >= 6 for p in range(12 - query_len, 12)]


def test_the_poison_works():
    world = World([1], [10])
    world.check(paged_attention)
    assert (
        world.run(
            paged_attention, context_lens=torch.tensor([11], dtype=torch.int32), max_context_len=11
        )
        .isnan()
        .all()
    )


# ---- random worlds -------------------------------------------------------------------------------
@settings(max_examples=300, deadline=None)
@given(world=worlds(), more_queries=st.integers(0, 9), more_context=st.integers(0, 20))
def test_any_ragged_batch_equals_dense_attention(world, more_queries, more_context):
    world.check(
        paged_attention,
        max_query_len=max(world.query_lens, default=0) + more_queries,
        max_context_len=max(world.context_lens, default=0) + more_context,
    )
