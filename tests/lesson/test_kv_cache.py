"""A block table turns a token's position into a slot: by hand, then for every length.

The pool is filled with NaN before anything is written: zeros would hide a slot that was missed, or
one that was written and should not have been.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from block_allocator import BlockAllocator
from kv_cache import KVCache, Row, advance, make_batch, write_kv

BLOCK_SIZES = [1, 2, 3, 4, 7, 16]


def poisoned_cache(num_layers=2, num_blocks=8, block_size=4, num_kv_heads=2, head_dim=3, **kwargs):
    """A cache in which every slot holds NaN, because none was written yet."""
    cache = KVCache(num_layers, num_blocks, block_size, num_kv_heads, head_dim, **kwargs)
    cache.pool.fill_(math.nan)
    return cache


def random_kv(num_tokens, num_kv_heads=2, head_dim=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, num_tokens, num_kv_heads, head_dim, generator=generator).unbind()


def shuffled_blocks(num_blocks, seed=0):
    return torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()


# ---- from a position to a slot -------------------------------------------------------------------
def test_a_block_table_turns_a_position_into_a_slot():
    batch = make_batch([Row(list(range(10)), 0, 10, [5, 0, 7], 1)], block_size=4, scratch_block=8)
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert batch.slot_mapping.tolist() == [20, 21, 22, 23, 0, 1, 2, 3, 28, 29]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_position_of_every_length_finds_its_slot(block_size):
    for length in range(1, 3 * block_size + 2):
        table = shuffled_blocks(9, seed=length)[: -(-length // block_size)]
        slots = [table[p // block_size] * block_size + p % block_size for p in range(length)]
        prompt = make_batch([Row([0] * length, 0, length, table, 1)], block_size, 9)
        assert prompt.slot_mapping.tolist() == slots
        newest = make_batch([Row([0] * length, length - 1, 1, table, 1)], block_size, 9)
        assert newest.slot_mapping.tolist() == slots[-1:]
        assert newest.positions.tolist() == [length - 1]


# ---- one step's inputs ---------------------------------------------------------------------------
MIXED = [
    Row([10, 11, 12, 13, 14, 15], 0, 6, [2, 5], 1),  # a whole prompt
    Row(list(range(20, 40)), 5, 4, [0, 7, 3, 1, 6], 0),  # a chunk in the middle of a prompt
    Row([40, 41, 42, 43, 44], 4, 1, [8, 4], 1),  # a decode
    Row([50, 51, 52], 0, 3, [9], 3),  # a prompt all of whose rows are wanted
]


def test_a_ragged_batch_is_laid_end_to_end():
    batch = make_batch(MIXED, block_size=4, scratch_block=10)
    lists = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()}
    assert lists == {
        "input_ids": [10, 11, 12, 13, 14, 15, 25, 26, 27, 28, 44, 50, 51, 52],
        "positions": [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 4, 0, 1, 2],
        "slot_mapping": [8, 9, 10, 11, 20, 21, 29, 30, 31, 12, 16, 36, 37, 38],
        "block_tables": [
            [2, 5, 10, 10, 10],
            [0, 7, 3, 1, 6],
            [8, 4, 10, 10, 10],
            [9, 10, 10, 10, 10],
        ],
        "query_start_locs": [0, 6, 10, 11, 14],
        "context_lens": [6, 9, 5, 3],
        "sample_rows": [5, 10, 11, 12, 13],
        "max_query_len": 6,
        "max_context_len": 9,
    }


def test_slots_are_64_bits_wide_and_tables_32():
    batch = make_batch(MIXED, block_size=4, scratch_block=10)
    wide = (batch.input_ids, batch.positions, batch.slot_mapping, batch.sample_rows)
    assert {tensor.dtype for tensor in wide} == {torch.int64}
    narrow = (batch.block_tables, batch.query_start_locs, batch.context_lens)
    assert {tensor.dtype for tensor in narrow} == {torch.int32}
    assert type(batch.max_query_len) is int and type(batch.max_context_len) is int


def test_a_step_of_nothing_but_chunks_samples_nothing():
    rows = [Row([1] * 9, 0, 4, [0, 1, 2], 0), Row([2] * 9, 4, 4, [3, 4, 5], 0)]
    batch = make_batch(rows, block_size=4, scratch_block=8)
    assert batch.sample_rows.tolist() == [] and batch.sample_rows.dtype == torch.int64
    assert batch.context_lens.tolist() == [4, 8]


def test_the_last_rows_are_sampled_wherever_the_sequence_lies_in_the_batch():
    rows = [Row([7] * 5, 0, 5, [0, 1], n) for n in (0, 2, 5, 0, 1)]
    batch = make_batch(rows, block_size=4, scratch_block=8)
    assert batch.sample_rows.tolist() == [8, 9, 10, 11, 12, 13, 14, 24]


def test_a_table_may_be_longer_than_its_tokens():
    row = Row([1, 2], 0, 2, [3, 1, 2], 1)  # memory reserved for later
    batch = make_batch([row], block_size=2, scratch_block=4)
    assert batch.block_tables.tolist() == [[3, 1, 2]]
    assert batch.slot_mapping.tolist() == [6, 7]


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    block_size=st.integers(1, 7),
    num_steps=st.integers(1, 40),
    reserved=st.integers(0, 3),
    is_known=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_a_decode_step_that_is_advanced_is_the_batch_made_anew(
    lengths, block_size, num_steps, reserved, is_known
):
    """Tables grow by random blocks, some before they are needed; so does the width of all."""
    free = iter(shuffled_blocks(500, seed=num_steps))
    sequences = [list(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths)]
    tables = [[] for _ in lengths]

    def batch_of_now():
        for table, token_ids in zip(tables, sequences, strict=True):
            while len(table) * block_size < len(token_ids):
                table += [next(free) for _ in range(1 + (reserved if len(table) % 2 else 0))]
        rows = [Row(ids, len(ids) - 1, 1, t, 1) for ids, t in zip(sequences, tables, strict=True)]
        return make_batch(rows, block_size, scratch_block=500)

    batch = batch_of_now()
    for step in range(num_steps):
        for token_ids in sequences:
            token_ids.append(1000 + step)
        fresh, before = vars(batch_of_now()), batch.input_ids.clone()
        ids = [token_ids[-1] for token_ids in sequences]
        advance(batch, ids if is_known else None, tables, block_size, 500)
        fresh["input_ids"] = fresh["input_ids"] if is_known else before
        for name, value in vars(batch).items():
            if name == "block_tables":  # it may be wider or narrower, but in scratch blocks only
                for got, table, token_ids in zip(value.tolist(), tables, sequences, strict=True):
                    num_blocks = -(-len(token_ids) // block_size)
                    assert got[:num_blocks] == table[:num_blocks]
                    assert set(got[num_blocks:]) <= {500, *table[num_blocks:]}
            elif isinstance(value, torch.Tensor):
                assert torch.equal(value, fresh[name]) and value.dtype == fresh[name].dtype, name
            else:
                assert value == fresh[name], name


@pytest.mark.parametrize(
    "block_id, slots",
    [
        (134_217_727, [2_147_483_646, 2_147_483_647]),  # the last slots below 2**31
        (134_217_728, [2_147_483_662, 2_147_483_663]),
        (2_147_483_647, [34_359_738_366, 34_359_738_367]),  # the largest block id
    ],
)
def test_slots_beyond_two_to_the_31_stay_right(block_id, slots):
    row = Row([0] * 16, start=14, num_new_tokens=2, block_table=[block_id], num_sample_rows=1)
    batch = make_batch([row], block_size=16, scratch_block=2**31 - 1)
    assert batch.slot_mapping.tolist() == slots
    assert batch.block_tables.tolist() == [[block_id]]


# ---- writing and reading -------------------------------------------------------------------------
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_what_is_written_comes_back_in_order_for_every_length(block_size):
    for length in range(1, 3 * block_size + 2):
        cache = poisoned_cache(num_blocks=9, block_size=block_size)
        table = shuffled_blocks(9, seed=length)[: -(-length // block_size)]
        k, v = random_kv(length, seed=length)
        batch = make_batch([Row([0] * length, 0, length, table, 1)], block_size, 9)
        write_kv(k, v, *cache.layer(1), batch.slot_mapping)
        got_k, got_v = cache.gather(1, table, length)
        assert torch.equal(got_k, k) and torch.equal(got_v, v)


def test_a_write_leaves_every_other_slot_untouched():
    cache = poisoned_cache()
    k, v = random_kv(6)
    slots = [23, 0, 14, 31, 5, 9]
    write_kv(k, v, *cache.layer(1), torch.tensor(slots))
    for layer in range(2):
        for half, values in enumerate((k, v)):
            rows = cache.pool[layer, :, half].transpose(1, 2).reshape(36, 2, 3)
            for slot in range(36):
                if layer == 1 and slot in slots:
                    assert torch.equal(rows[slot], values[slots.index(slot)])
                else:
                    assert rows[slot].isnan().all(), (layer, half, slot)


def test_values_are_rounded_to_the_type_of_the_cache():
    cache = poisoned_cache(dtype=torch.bfloat16)
    k, v = random_kv(3)
    write_kv(k, v, *cache.layer(0), torch.tensor([4, 5, 6]))
    got_k, got_v = cache.gather(0, [1], 3)
    assert torch.equal(got_k, k.bfloat16()) and torch.equal(got_v, v.bfloat16())


# ---- the pool ------------------------------------------------------------------------------------
def test_the_pool_is_one_tensor_with_k_and_v_of_a_block_side_by_side():
    cache = KVCache(
        num_layers=3, num_blocks=8, block_size=4, num_kv_heads=2, head_dim=5, dtype=torch.float64
    )
    assert cache.pool.shape == (3, 9, 2, 2, 4, 5)
    assert cache.pool.dtype == torch.float64 and cache.pool.is_contiguous()
    k_cache, v_cache = cache.layer(1)
    assert k_cache.shape == v_cache.shape == (9, 2, 4, 5)
    assert k_cache.stride() == v_cache.stride() == (80, 20, 5, 1)  # a block is K's 40 and V's 40
    begin = cache.pool.data_ptr()
    assert k_cache.data_ptr() - begin == 9 * 80 * 8  # bytes: past the first layer
    assert v_cache.data_ptr() - k_cache.data_ptr() == 40 * 8


def test_a_layers_caches_are_views_of_the_pool():
    cache = KVCache(num_layers=2, num_blocks=3, block_size=4, num_kv_heads=2, head_dim=3)
    k_cache, v_cache = cache.layer(1)
    k_cache[2, 1, 3] = 7.0
    v_cache[0, 0, 1] = 8.0
    assert cache.pool[1, 2, 0, 1, 3].tolist() == [7.0, 7.0, 7.0]
    assert cache.pool[1, 0, 1, 0, 1].tolist() == [8.0, 8.0, 8.0]
    assert cache.pool.sum() == 3 * 7.0 + 3 * 8.0


def test_scratch_is_the_block_after_the_last_and_never_handed_out():
    cache = KVCache(num_layers=1, num_blocks=8, block_size=4, num_kv_heads=1, head_dim=2)
    assert cache.scratch_block == 8
    assert cache.pool.shape[1] == 9
    assert cache.scratch_block not in BlockAllocator(num_blocks=8, block_size=4).allocate(8)


def test_copying_a_block_copies_all_layers_and_k_and_v():
    cache = poisoned_cache(num_layers=3)
    cache.pool[:, 5] = torch.arange(3 * 2 * 2 * 4 * 3).view(3, 2, 2, 4, 3).float()
    cache.copy_blocks([(5, 2)])
    assert torch.equal(cache.pool[:, 2], cache.pool[:, 5])
    others = [0, 1, 3, 4, 6, 7, 8]
    assert cache.pool[:, others].isnan().all()


def test_copies_of_one_step_read_before_any_of_them_writes():
    cache = KVCache(num_layers=1, num_blocks=4, block_size=1, num_kv_heads=1, head_dim=1)
    cache.pool[0, :, :, 0, 0, 0] = torch.tensor([0.0, 1, 2, 3, 4])[:, None]
    cache.copy_blocks([(0, 1), (1, 2), (0, 3)])
    assert cache.pool[0, :, 0, 0, 0, 0].tolist() == [0, 0, 1, 0, 4]
    assert cache.pool[0, :, 1, 0, 0, 0].tolist() == [0, 0, 1, 0, 4]


# ---- the plug ------------------------------------------------------------------------------------
def test_the_plug_writes_first_and_then_reads_through_the_tables():
    cache = poisoned_cache(head_dim=16, num_blocks=10)
    batch = make_batch(MIXED, block_size=4, scratch_block=10)
    k, v = random_kv(14, head_dim=16)
    q = torch.randn(14, 4, 16)
    calls = []

    def kernel(q, k_cache, v_cache, tables, locs, lens, scale, max_query_len, max_context_len):
        assert not k_cache[4, :, 0].isnan().any(), "the newest token is written before it is read"
        calls.append((k_cache, v_cache, tables, locs, lens, scale, max_query_len, max_context_len))
        return q + 1

    out = cache.attend(batch, kernel)(1, q, k, v)
    assert torch.equal(out, q + 1)
    (call,) = calls
    k_cache, v_cache, tables, locs, lens, *rest = call
    assert k_cache.data_ptr() == cache.pool[1, :, 0].data_ptr()
    assert v_cache.data_ptr() == cache.pool[1, :, 1].data_ptr()
    assert k_cache.stride() == cache.pool[1, :, 0].stride()
    assert tables is batch.block_tables and locs is batch.query_start_locs
    assert lens is batch.context_lens
    assert rest == [0.25, 6, 9]  # 16 ** -0.5, and the host's two numbers
    assert cache.pool[0].isnan().all(), "another layer's cache is another layer's"
