"""The GPU's kernel for one query a sequence, and the dispatch, against dense attention in float64.

As in `test_triton_prefill.py` the kernels are compiled where there is a GPU and interpreted
where not, every pool is poisoned, and `PAGEDGPT_SEED` chooses other random batches.
"""

import math
import random

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
    kernel_marks,
    needs_gpu,
    random_world,
    some,
    world_of,
)

from kernels import triton_decode as module
from kernels.device_memory import free_memory_bytes
from kernels.triton_decode import paged_attention_triton, paged_decode_triton
from kernels.triton_prefill import HAS_TRITON, paged_prefill_triton
from paged_attention import paged_attention

pytestmark = kernel_marks(HAS_TRITON)
CHUNK_LENS = [0, 33, 64, 100]  # no chunks, less than a tile, a tile, more than one
EACH_CHUNK_LEN = pytest.mark.parametrize("chunk_len", CHUNK_LENS)


def decodes(context_lens, context_starts=None, **kwargs):
    """A world of sequences with one query each."""
    return world_of([1] * len(context_lens), context_lens, context_starts, **kwargs)


def shape_of(seed):
    """What a kernel is compiled for, beside its type."""
    choose = random.Random(seed)
    return {
        "block_size": choose.choice([1, 2, 3, 5, 16, 32]),
        "group": choose.choice([1, 2, 3]),
        "head_dim": choose.choice([16, 24, 64]),
    }


def check_decode(world, **changes):
    return check_on_device(paged_decode_triton, world, **changes)


def check_any(world, **changes):
    return check_on_device(paged_attention_triton, world, **changes)


# ---- it is attention -----------------------------------------------------------------------------
@needs_gpu
def test_the_kernels_are_compiled_not_interpreted():
    import triton

    names = [name for name in vars(module) if name.endswith("_kernel")]
    assert set(names) >= {"decode_kernel", "merge_kernel"}
    for name in names:
        assert isinstance(getattr(module, name), triton.runtime.JITFunction), name


@pytest.mark.parametrize("function", [paged_attention_triton, paged_decode_triton])
def test_one_query_reads_its_context_through_the_table(function):
    # Two positions in two blocks of one token; q . k = 0 for both, so it is the mean of the values.
    k_cache = torch.zeros(4, 1, 1, 2, device=DEVICE)
    v_cache = torch.full((4, 1, 1, 2), math.nan, device=DEVICE)
    v_cache[2, 0, 0] = torch.tensor([1.0, 10.0])
    v_cache[0, 0, 0] = torch.tensor([3.0, 30.0])
    out = function(
        torch.tensor([[[5.0, 7.0]]], device=DEVICE),
        k_cache,
        v_cache,
        block_tables=torch.tensor([[2, 0]], dtype=torch.int32, device=DEVICE),
        query_start_locs=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
        context_lens=torch.tensor([2], dtype=torch.int32, device=DEVICE),
        scale=1.0,
        max_query_len=1,
        max_context_len=2,
    )
    assert out.tolist() == [[[2.0, 20.0]]]


@pytest.mark.parametrize(
    "block_size, chunk_len, dtype", some(24, BLOCK_SIZES, [0, 64], DTYPES), ids=str
)
def test_a_decode_equals_dense_attention_whatever_the_block_size(block_size, chunk_len, dtype):
    contexts = sorted({1, 2, block_size + 1, 511 if ON_GPU else 130})
    check_decode(decodes(contexts, block_size=block_size, dtype=dtype), chunk_len=chunk_len)


@pytest.mark.parametrize(
    "query_len, block_size, dtype", some(25, [1, 2, 17, 300], BLOCK_SIZES, DTYPES), ids=str
)
def test_the_dispatch_equals_dense_attention_for_any_query_length(query_len, block_size, dtype):
    contexts = [query_len + block_size + 4] + [query_len, query_len + 510] * ON_GPU
    check_any(world_of([query_len] * len(contexts), contexts, block_size=block_size, dtype=dtype))


@pytest.mark.parametrize("block_size, dtype", some(10, BLOCK_SIZES, DTYPES), ids=str)
def test_contexts_reach_the_1024_tokens_of_gpt2(block_size, dtype):
    check_any(decodes([1024, 1023], block_size=block_size, dtype=dtype))


@pytest.mark.parametrize("chunk_len", [0, 32])
def test_every_context_around_tiles_and_chunks(chunk_len):
    lengths = [1, 2, 31, 32, 33, 63, 64, 65, 96, 97, 127, 128, 129, 191, 192, 193]
    if ON_GPU:
        lengths = list(range(1, 1025))
    check_decode(decodes(lengths, block_size=16, dtype=torch.float32), chunk_len=chunk_len)


@EACH_DTYPE
def test_decodes_prompts_chunks_and_empty_rows_are_one_call_in_any_order(dtype):
    sequences = [(1, 33), (6, 6), (0, 4), (1, 1), (40, 90), (1, 0), (3, 2), (1, 300), (17, 17)]
    for seed in range(3):
        random.Random(seed).shuffle(sequences)
        queries, contexts = zip(*sequences, strict=True)
        world = world_of(list(queries), list(contexts), num_padded_rows=2, dtype=dtype)
        world.qkv[-2:] = math.nan
        result = check_any(world)
        assert result[-2:].abs().max() == 0


@pytest.mark.parametrize(
    "group, num_kv_heads, chunk_len", some(12, [1, 2, 3, 4, 8, 20], [1, 3], [0, 64])
)
def test_a_group_of_query_heads_shares_one_head_of_k_and_v(group, num_kv_heads, chunk_len):
    for dtype in (torch.float32, torch.float16):
        shape = {"group": group, "num_kv_heads": num_kv_heads, "dtype": dtype}
        check_decode(decodes([9, 1, 70], **shape), chunk_len=chunk_len)


@pytest.mark.parametrize(
    "head_dim, chunk_len, dtype",
    some(20, [1, 5, 16, 64, 80, 96, 128, 256], [0, 64], DTYPES),
    ids=str,
)
def test_any_head_size(head_dim, chunk_len, dtype):
    world = decodes([9, 1, 70], head_dim=head_dim, num_kv_heads=2, dtype=dtype)
    check_decode(world, chunk_len=chunk_len)


# ---- values that a softmax may fall over ---------------------------------------------------------
@EACH_CHUNK_LEN
def test_scores_beyond_the_range_of_16_bits_are_summed_in_32(chunk_len):
    world = decodes([20, 150], head_dim=64, dtype=torch.float16, size=100.0)
    q, k = world.q[0, 0].double(), world.kv[0][0][:, 0].double()
    assert (k @ q).abs().max() > 65504, "or the test says nothing"
    # A score of 100,000 is off by its rounding in 32 bits, so are the weights; V is of size 100.
    bound = world.bound(of_weights=1) + 0.5
    world.check(paged_decode_triton, bound=bound, chunk_len=chunk_len)


@pytest.mark.parametrize("chunk_len, dtype", some(8, CHUNK_LENS, DTYPES), ids=str)
def test_very_negative_scores_do_not_divide_by_zero(chunk_len, dtype):
    world = decodes([9, 120], dtype=dtype)
    world.q[:] = 1.0
    for k, _ in world.kv:
        k[:] = -(2.0**15)
    world.write()
    result = check_decode(world, chunk_len=chunk_len)
    assert (result.abs().amax((1, 2)) > 0).all()


@EACH_CHUNK_LEN
@pytest.mark.parametrize("position", [0, 60, 128])
def test_one_position_may_outweigh_all_others(position, chunk_len):
    """The running maximum, or a chunk's, jumps: all other sums shrink to nothing."""
    world = decodes([129], dtype=torch.float32)
    world.kv[0][0][position] = world.q[0] * 60
    world.write()
    result = check_decode(world, chunk_len=chunk_len)
    torch.testing.assert_close(result[0], world.kv[0][1][position], atol=1e-5, rtol=0)


# ---- chunks and their merge ----------------------------------------------------------------------
@pytest.mark.parametrize(
    "chunk_len, dtype", some(14, [7, 16, 64, 100, 129, 130, 131, 1000], DTYPES), ids=str
)
def test_chunks_merge_to_what_a_single_walk_gives(chunk_len, dtype):
    world = decodes([130, 3, 64], group=2, dtype=dtype)
    in_chunks = check_decode(world, chunk_len=chunk_len).double()
    single = check_decode(world, chunk_len=0).double()
    bound = 2 * torch.as_tensor(world.bound(of_result=2, of_weights=1))  # each may be off by one
    assert ((in_chunks - single).abs() <= bound.to(DEVICE)).all()


@pytest.mark.parametrize("head_dim, chunk_len", [(16, 1), (256, 3)])
def test_the_merge_folds_more_chunks_than_it_takes_at_a_time(head_dim, chunk_len):
    """1, 4, 5, 64, 65 and 130 chunks: it takes 64 at a time, or 4 where a head is that wide."""
    chunks = [1, 4, 5, 64, 65, 130] if chunk_len == 1 else [1, 4, 5, 13]
    world = decodes([n * chunk_len for n in chunks], head_dim=head_dim)
    check_decode(world, chunk_len=chunk_len)


def test_chunks_that_are_absent_are_not_merged():
    """Sequences of one chunk beside one of many, and upper bounds that make room for more."""
    world = decodes([1, 150, 0, 8, 9], dtype=torch.float32)
    for max_context_len in (150, 161, 1000):
        check_decode(world, chunk_len=8, max_context_len=max_context_len)


def test_memory_that_held_something_else_does_not_reach_the_merge():
    """Partial results lie in memory that is not cleared: what was there before must not count."""
    world = decodes([1, 70, 0, 8, 9], dtype=torch.float32)
    for poison in (math.nan, math.inf, 1e30):
        for size in (5 * 40, 5 * 40 * 16, 10 * 40, 4096, 2**16):
            several = [torch.full((size,), poison, device=DEVICE) for _ in range(4)]
            del several  # the allocator hands these pieces out again
        check_decode(world, chunk_len=8, max_context_len=320)


def test_contexts_that_start_later_are_cut_from_their_start():
    world = decodes([90, 130, 20, 9, 65], [5, 100, 20, 50, 0], dtype=torch.float32)
    for chunk_len in (0, 33, 64):
        result = check_decode(world, chunk_len=chunk_len)
        assert result[[2, 3]].abs().max() == 0  # they start at or behind their end


@pytest.mark.parametrize("chunk_len, dtype", some(5, [0, 33, 64], DTYPES), ids=str)
def test_chunks_of_fixed_length_give_the_same_bits_alone_and_in_a_batch(chunk_len, dtype):
    contexts = [130, 3, 64, 65, 7]
    world = decodes(contexts, num_kv_heads=2, group=2, dtype=dtype)
    arguments = world.arguments()
    together = check_decode(world, chunk_len=chunk_len)
    for i, context_len in enumerate(contexts):
        alone = {
            "q": world.q[i : i + 1],
            "block_tables": arguments["block_tables"][i : i + 1],
            "query_start_locs": arguments["query_start_locs"][:2],
            "context_lens": arguments["context_lens"][i : i + 1],
            "max_context_len": context_len,
        }
        result = world.run(paged_decode_triton, chunk_len=chunk_len, **alone)
        assert torch.equal(result[0], together[i]), i


def test_rows_beside_it_and_upper_bounds_do_not_change_a_bit_for_a_fixed_chunk_length():
    world = decodes([130, 3], dtype=torch.float32)
    want = check_decode(world, chunk_len=64)
    wider = decodes([130, 3], dtype=torch.float32, num_padded_rows=4, num_padded_columns=3)
    wider.qkv[:2] = world.qkv
    for max_context_len in (130, 500):
        changes = {"chunk_len": 64, "max_context_len": max_context_len}
        assert torch.equal(check_decode(wider, **changes)[:2], want)


# ---- what may be read ----------------------------------------------------------------------------
@EACH_DTYPE
def test_a_context_may_start_later(dtype):
    check_any(world_of([1, 3, 1, 40, 1], [9, 12, 70, 90, 6], [5, 2, 66, 33, 0], dtype=dtype))


@pytest.mark.parametrize("query_len", [1, 20])
def test_starts_of_zero_are_no_starts(query_len):
    starts, none = (world_of([query_len], [70], s, dtype=torch.float32) for s in ([0], None))
    results = [world.run(paged_attention_triton) for world in (starts, none)]
    assert torch.equal(*results)


@pytest.mark.parametrize("start", [9, 10, 50])
@pytest.mark.parametrize("query_len", [1, 2])
def test_a_start_at_or_behind_the_end_gives_zeros(query_len, start):
    result = check_any(world_of([query_len, 1], [9, 5], [start, 0]))
    assert result[:query_len].abs().max() == 0
    assert result[query_len].abs().max() > 0


@EACH_CHUNK_LEN
def test_a_query_over_an_empty_context_is_zero(chunk_len):
    result = check_decode(decodes([0, 6, 0]), chunk_len=chunk_len)  # as a recorded graph's padding
    assert result[[0, 2]].abs().max() == 0


def test_more_queries_than_context_leave_the_first_ones_zero():
    result = check_any(world_of([5, 1], [3, 4]))
    assert result[:2].abs().max() == 0
    assert (result[2:].abs().amax((1, 2)) > 0).all()


@EACH_CHUNK_LEN
def test_sequences_without_a_query_disturb_nobody(chunk_len):
    world = world_of([0, 1, 0, 0, 1, 0], [5, 70, 0, 9, 2, 3])
    check_decode(world, chunk_len=chunk_len)


@pytest.mark.parametrize("query_lens", [[1, 1], [2, 1], [0, 1], [1, 0]])
@pytest.mark.parametrize("num_padded_rows", [1, 5, 70])
def test_rows_behind_the_last_sequence_are_zero(num_padded_rows, query_lens):
    world = world_of(query_lens, [4, 9], num_padded_rows=num_padded_rows)
    world.qkv[sum(query_lens) :] = math.nan
    result = check_any(world)
    assert result[sum(query_lens) :].abs().max() == 0


@EACH_CHUNK_LEN
def test_a_decode_zeroes_the_rows_of_nobody_with_chunks_and_without(chunk_len):
    world = decodes([90, 3], num_kv_heads=2, group=3, num_padded_rows=7)
    out = torch.full_like(world.q, math.nan)
    result = check_decode(world, chunk_len=chunk_len, out=out)
    assert result[2:].tolist() == torch.zeros(7, 6, 16).tolist()


def test_rows_without_any_query_are_zero():
    world = world_of([0, 0], [4, 9], num_padded_rows=3)
    for max_query_len in (0, 1, 4):
        out = torch.full_like(world.q, math.nan)
        check_any(world, max_query_len=max_query_len, out=out)


@pytest.mark.parametrize("max_query_len", [0, 1, 2])
def test_no_sequences_and_no_rows(max_query_len):
    bounds = {"max_query_len": max_query_len, "max_context_len": 4}
    assert world_of([], []).run(paged_attention_triton, **bounds).shape == (0, 1, 16)
    assert world_of([0, 0], [3, 4]).run(paged_attention_triton, **bounds).shape == (0, 1, 16)
    nobody = world_of([], [], num_padded_rows=3)
    out = torch.full_like(nobody.q, math.nan)
    result = nobody.run(paged_attention_triton, out=out, **bounds)
    assert result.tolist() == torch.zeros(3, 1, 16).tolist()


def test_a_decode_leaves_the_rows_of_longer_queries_to_the_other_kernel():
    world = world_of([6, 1, 0, 2, 1], [6, 90, 4, 7, 1])
    for chunk_len in (0, 16):
        out = torch.full_like(world.q, 7.0)
        world.run(paged_decode_triton, out=out, chunk_len=chunk_len)
        expected = world.expected()
        expected[[0, 1, 2, 3, 4, 5, 7, 8]] = 7.0
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


# ---- the arguments -------------------------------------------------------------------------------
@pytest.mark.parametrize("query_lens", [[1, 1, 1], [2, 1, 5]])
def test_upper_bounds_larger_than_needed_change_nothing(query_lens):
    world = world_of(query_lens, [9, 4, 70])
    for max_query_len, max_context_len in ((5, 70), (64, 71), (5, 1000), (1024, 1024)):
        bounds = {"max_query_len": max_query_len, "max_context_len": max_context_len}
        check_any(world, **bounds)


def test_padded_table_columns_hold_the_scratch_block_and_are_not_read():
    check_any(decodes([9, 4, 70], num_padded_columns=3))


def test_tables_may_be_a_view_of_wider_ones():
    world = decodes([9, 4, 12])
    wide = torch.full((3, 40), world.scratch, dtype=torch.int32, device=DEVICE)
    wide[:, 10:13] = world.arguments()["block_tables"]
    check_any(world, block_tables=wide[:, 10:13])


@pytest.mark.parametrize("query_lens", [[1, 0, 1, 1], [2, 0, 1, 30]])
def test_the_result_goes_into_out_and_nowhere_else(query_lens):
    world = world_of(query_lens, [9, 3, 70, 30], num_padded_rows=2, num_kv_heads=2)
    for chunk_len in (None, 0, 16)[: 3 if max(query_lens) == 1 else 1]:
        wide = torch.full((len(world.q), 3 * 32), 7.0, dtype=world.dtype, device=DEVICE)
        out = wide[:, 32:64].unflatten(1, (2, 16))
        if chunk_len is None:
            assert check_any(world, out=out) is out
        else:
            assert check_decode(world, out=out, chunk_len=chunk_len) is out
        out.fill_(7.0)
        assert (wide == 7.0).all()


@pytest.mark.parametrize("chunk_len, dtype", some(6, CHUNK_LENS, DTYPES), ids=str)
def test_q_may_be_a_slice_of_the_qkv_product_and_the_caches_views(chunk_len, dtype):
    world = decodes([7, 90], num_kv_heads=2, dtype=dtype)
    assert not world.q.is_contiguous() and not world.k_cache.is_contiguous()
    views = check_decode(world, chunk_len=chunk_len)
    names = ("q", "k_cache", "v_cache")
    copies = {name: world.arguments()[name].contiguous() for name in names}
    assert torch.equal(views, world.run(paged_decode_triton, chunk_len=chunk_len, **copies))


def test_the_caches_may_have_any_strides_but_the_same_ones():
    world = decodes([7, 90], num_kv_heads=2)
    names = ("k_cache", "v_cache")
    caches = {name: world.arguments()[name] for name in names}  # heads outside, tokens inside
    turned = {name: c.transpose(1, 2).contiguous().transpose(1, 2) for name, c in caches.items()}
    assert turned["k_cache"].stride() != world.k_cache.stride()
    check_decode(world, **turned)
    with pytest.raises(ValueError, match="strides"):
        world.run(paged_decode_triton, v_cache=turned["v_cache"])


def test_the_pool_and_the_queries_are_only_read():
    world = world_of([3, 1, 40], [7, 90, 50], [0, 2, 3])
    pool, qkv = world.pool.clone(), world.qkv.clone()
    world.run(paged_attention_triton)
    assert torch.equal(world.pool.nan_to_num(99.0), pool.nan_to_num(99.0))
    assert torch.equal(world.qkv, qkv)


@EACH_CHUNK_LEN
def test_the_scale_is_an_argument(chunk_len):
    world = decodes([7, 90])
    default = world.run(paged_decode_triton, chunk_len=chunk_len)
    world.scale = 1.0  # a layer's own scale is in q already
    assert (check_decode(world, chunk_len=chunk_len) - default).abs().max() > 1e-3


@pytest.mark.parametrize("query_len", [1, 3])
def test_other_types_are_refused_by_name(query_len):
    world = world_of([query_len], [7], dtype=torch.float32)
    names = ("q", "k_cache", "v_cache")
    others = {name: world.arguments()[name].nan_to_num(0).int() for name in names}
    with pytest.raises((TypeError, ValueError), match="int32"):
        world.run(paged_attention_triton, **others)


# ---- it does depend on the blocks ----------------------------------------------------------------
@pytest.mark.parametrize("chunk_len, dtype", some(6, CHUNK_LENS, DTYPES), ids=str)
def test_where_the_blocks_lie_does_not_change_a_bit(chunk_len, dtype):
    world = decodes([70, 130, 9], dtype=dtype)
    shuffled = world.run(paged_decode_triton, chunk_len=chunk_len)
    ids = iter(range(sum(map(len, world.tables))))
    world.pool.fill_(math.nan)
    world.tables = [[next(ids) for _ in table] for table in world.tables]
    world.write()
    assert torch.equal(world.run(paged_decode_triton, chunk_len=chunk_len), shuffled)


@EACH_CHUNK_LEN
def test_swapping_a_partly_filled_tail_reads_what_was_never_written(chunk_len):
    world = decodes([131])
    table = world.tables[0]
    table[0], table[-1] = table[-1], table[0]
    assert world.run(paged_decode_triton, chunk_len=chunk_len).isnan().all()


@pytest.mark.parametrize(
    "position, chunk_len, dtype", some(6, [0, 70, 128], [0, 64], DTYPES), ids=str
)
def test_one_wrong_value_in_a_block_changes_the_result(position, chunk_len, dtype):
    for cache in ("k_cache", "v_cache"):
        world = decodes([129, 129], num_kv_heads=2, dtype=dtype)
        right = world.run(paged_decode_triton, chunk_len=chunk_len)
        block_id = world.tables[1][position // 4]
        # A key that is the query itself draws weight to it, whatever the dice say.
        change = world.q[1, 1] * 4 if cache == "k_cache" else 40.0
        getattr(world, cache)[block_id, 1, position % 4] = change
        difference = world.run(paged_decode_triton, chunk_len=chunk_len) - right
        changed = difference.abs().amax(2) > 1e-3
        assert changed.tolist() == [[False, False], [False, True]]


@EACH_CHUNK_LEN
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_a_nan_that_may_be_read_is_not_hidden(cache, chunk_len):
    """A model that overflows shows it: zeros in its place would look like an answer."""
    world = decodes([150], dtype=torch.float32)
    getattr(world, cache)[world.tables[0][1], 0, 2] = math.nan
    assert world.run(paged_decode_triton, chunk_len=chunk_len).isnan().all()


@EACH_CHUNK_LEN
@pytest.mark.parametrize("context_len", [11, 130])
def test_a_context_that_is_one_too_long_reads_poison(context_len, chunk_len):
    world = decodes([context_len - 1])
    longer = torch.tensor([context_len], dtype=torch.int32, device=DEVICE)
    changes = {"context_lens": longer, "max_context_len": context_len}
    assert world.run(paged_decode_triton, chunk_len=chunk_len, **changes).isnan().all()


# ---- random worlds -------------------------------------------------------------------------------
# A GPU compiles for each type, block size and head size: few of these, and many batches of each.
SEEDS = range(SEED, SEED + (3 if ON_GPU else 5))
BATCHES = range(50 if ON_GPU else 1)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_any_ragged_batch_equals_dense_attention(seed, dtype):
    fixed = shape_of(seed) | {"dtype": dtype, "device": DEVICE}
    for batch in BATCHES:
        world = random_world(1000 * batch + seed, longest=700 if ON_GPU else 40, **fixed)
        check_any(world, max_query_len=300, max_context_len=2000)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_any_batch_of_decodes_in_any_chunks_equals_dense_attention(seed, dtype):
    longest = 2000 if ON_GPU else 150
    for batch in BATCHES:
        choose = random.Random(1000 * batch + seed)
        num_seqs = choose.randint(1, 5)
        starts = [choose.choice([0, 0, choose.randint(0, longest)]) for _ in range(num_seqs)]
        world = decodes(
            [choose.choice([0, 1, choose.randint(1, longest)]) for _ in range(num_seqs)],
            choose.choice([None, starts]),
            num_padded_rows=choose.choice([0, 3]),
            dtype=dtype,
            seed=seed,
            **shape_of(seed),
        )
        chunk_len = choose.choice([0, 16, 33, 64, 100, 256])
        check_decode(world, chunk_len=chunk_len, max_context_len=2000)


def test_the_kernels_agree_with_each_other():
    """One query a sequence is a prompt of one token, too: three kernels, one answer."""
    world = decodes([70, 9, 200, 1], [5, 4, 63, 0], num_kv_heads=2, group=2, block_size=3)
    want = world.run(paged_attention)
    for function in (paged_decode_triton, paged_prefill_triton, paged_attention_triton):
        torch.testing.assert_close(world.run(function), want, atol=1e-12, rtol=0)


# ---- large pools ---------------------------------------------------------------------------------
GPT2 = {"num_kv_heads": 12, "head_dim": 64, "block_size": 16}


@pytest.mark.parametrize("chunk_len", [0, 64])
def test_block_ids_beyond_two_to_the_31_elements(chunk_len):
    """With K beside V a layer of GPT-2's passes 2**31 elements at block 87,381."""
    if free_memory_bytes(DEVICE) < 2 * 88_000 * 2 * 12 * 16 * 64:
        pytest.skip("the pool is larger than the device's memory")
    world = decodes([70, 1, 5], dtype=torch.float16, **GPT2)
    world.move_to_the_end_of(88_000)
    check_decode(world, chunk_len=chunk_len)


def test_chunks_are_for_batches_that_leave_most_of_the_chip_idle():
    """From 128 programs on, sequences x heads of K and V, each walks its whole context."""
    assert module.choose_chunk_len(num_seqs=1, num_kv_heads=12, max_context_len=1024) == 256
    assert module.choose_chunk_len(num_seqs=10, num_kv_heads=12, max_context_len=257) == 256
    assert module.choose_chunk_len(num_seqs=11, num_kv_heads=12, max_context_len=1024) == 0
    assert module.choose_chunk_len(num_seqs=1, num_kv_heads=12, max_context_len=256) == 0


# ---- only a GPU can say --------------------------------------------------------------------------
@needs_gpu
@EACH_DTYPE
@pytest.mark.parametrize("chunk_len", [None, 0, 64])
def test_a_hundred_runs_give_the_same_bits(chunk_len, dtype):
    world = decodes([1000, 3, 511, 64] * 4, dtype=dtype, **GPT2)
    first = check_decode(world, chunk_len=chunk_len)
    for _ in range(100):
        assert torch.equal(world.run(paged_decode_triton, chunk_len=chunk_len), first)


@needs_gpu
def test_a_batch_may_have_more_rows_than_a_grids_second_axis():
    """70,000 sequences of one token: only a grid's first axis is that long."""
    n = 70_000
    q, v = torch.randn(2, n, 1, 16, device=DEVICE)
    cache = v[:, :, None]  # (num_blocks, H_kv, block_size, D): a block for each
    ids, locs = (torch.arange(n + i, dtype=torch.int32, device=DEVICE) for i in (0, 1))
    ones = torch.ones_like(ids)
    for chunk_len in (0, 1):
        where = (ids[:, None], locs, ones, 0.25, 1, 1)
        out = paged_decode_triton(q, cache, cache, *where, chunk_len=chunk_len)
        torch.testing.assert_close(out, v, atol=1e-6, rtol=0)


@needs_gpu
@EACH_DTYPE
@pytest.mark.parametrize("chunk_len", [None, 0, 256])
def test_64_sequences_of_512_tokens_of_gpt2s_shape(chunk_len, dtype):
    check_decode(decodes([512] * 64, dtype=dtype, **GPT2), chunk_len=chunk_len)


@needs_gpu
@pytest.mark.parametrize("query_lens", [[1] * 6, [1, 30, 1, 0, 5, 1]], ids=["decode", "mixed"])
@pytest.mark.parametrize("context_lens", [[40] * 6, [1, 30, 900, 7, 300, 0]])
def test_a_recorded_graph_gives_the_bits_of_the_eager_call(context_lens, query_lens):
    """A replay reads lengths, tables and queries anew from where they lay when it was recorded."""
    first = world_of(query_lens, [1024] * 6, num_padded_rows=2, dtype=torch.float16)
    arguments = first.arguments()
    out = torch.empty_like(first.q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile before recording
        paged_attention_triton(**arguments, out=out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_attention_triton(**arguments, out=out)

    first.context_lens = context_lens
    first.kv = [kv[:, :n] for kv, n in zip(first.kv, context_lens, strict=True)]
    first.pool.fill_(math.nan)
    first.write()
    first.qkv.copy_(first.qkv.flip(0))
    arguments["context_lens"].copy_(torch.tensor(context_lens))
    out.fill_(math.nan)
    graph.replay()
    replayed = out.clone()
    assert torch.equal(replayed, paged_attention_triton(**arguments))
    assert ((replayed.double() - first.expected()).abs() <= first.bound(of_weights=1)).all()
