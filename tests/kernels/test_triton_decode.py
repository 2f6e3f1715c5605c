"""The GPU's kernel for one query a sequence, and the dispatch, against dense attention in float64.

What holds for all attention kernels stands in attention_rules.py. Here are chunks and their merge,
and batches of which each kernel takes a part.
"""

import math

import pytest
import torch
from attention_rules import GPT2, ReaderRules, check_compiled
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

from kernels import triton_decode as module
from kernels.device_memory import free_memory_bytes
from kernels.triton_decode import paged_attention_triton, paged_decode_triton
from kernels.triton_prefill import HAS_TRITON

pytestmark = [needs_triton(HAS_TRITON), pytest.mark.device]
CHUNK_LENS = [0, 33, 64, 100]  # no chunks, less than a tile, a tile, more than one


class TestDecode(ReaderRules):
    """One query a sequence, in one piece and in chunks."""

    kernel = staticmethod(paged_decode_triton)
    variants = [{"chunk_len": chunk_len} for chunk_len in CHUNK_LENS]


class TestDispatch(ReaderRules):
    """Decodes and prompts in one call: every other sequence has one query."""

    kernel = staticmethod(paged_attention_triton)

    def query_len(self, context_len, number):
        return min(context_len, 1 if number % 2 else 17)


def decodes(context_lens, context_starts=None, **kwargs):
    """A world of sequences with one query each."""
    return world_of([1] * len(context_lens), context_lens, context_starts, **kwargs)


def check_decode(world, **changes):
    return check_on_device(paged_decode_triton, world, **changes)


def check_any(world, **changes):
    return check_on_device(paged_attention_triton, world, **changes)


@needs_gpu
def test_the_kernels_are_compiled_not_interpreted():
    check_compiled(module, "decode_kernel", "merge_kernel")


# ---- chunks and their merge ----------------------------------------------------------------------


@pytest.mark.parametrize("head_dim, chunk_len", [(16, 1), (256, 3)])
def test_the_merge_folds_more_chunks_than_it_takes_at_a_time(head_dim, chunk_len):
    """1, 4, 5, 64, 65 and 130 chunks: it takes 64 at a time, or 4 where a head is that wide."""
    chunks = [1, 4, 5, 64, 65, 130] if chunk_len == 1 else [1, 4, 5, 13]
    check_decode(decodes([n * chunk_len for n in chunks], head_dim=head_dim), chunk_len=chunk_len)


def test_contexts_that_start_later_are_cut_from_their_start():
    world = decodes([90, 130, 20, 9, 65], [5, 100, 20, 50, 0], dtype=torch.float32)
    for chunk_len in (0, 33, 64):
        result = check_decode(world, chunk_len=chunk_len)
        assert result[[2, 3]].abs().max() == 0  # they start at or after their end


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


def test_chunks_are_for_batches_that_leave_part_of_the_chip_idle():
    """From 450 programs on, sequences x heads of K and V, each walks its whole context."""
    chosen = [module.choose_chunk_len(num_seqs, 12, 1024) for num_seqs in (1, 9, 10, 16, 37, 38)]
    assert chosen == [128, 128, 256, 256, 256, 0]
    assert module.choose_chunk_len(num_seqs=16, num_kv_heads=12, max_context_len=257) == 256
    assert module.choose_chunk_len(num_seqs=16, num_kv_heads=12, max_context_len=256) == 0
    assert module.choose_chunk_len(num_seqs=1, num_kv_heads=12, max_context_len=128) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_result_does_not_depend_on_how_long_the_other_contexts_are(dtype):
    """70 tokens are one chunk beside 300 tokens, and no chunk where none is longer than 128."""
    world = decodes([70, 300], dtype=dtype)
    long = world.run(paged_decode_triton)
    shorter = world.arguments()["context_lens"].clamp(max=128)
    short = world.run(paged_decode_triton, context_lens=shorter, max_context_len=128)
    assert torch.equal(long[0], short[0]) and not torch.equal(long[1], short[1])


# ---- batches for both kernels --------------------------------------------------------------------


def test_a_decode_leaves_the_rows_of_longer_queries_to_the_other_kernel():
    world = world_of([6, 1, 0, 2, 1], [6, 90, 4, 7, 1])
    expected = world.expected()
    expected[[0, 1, 2, 3, 4, 5, 7, 8]] = 7.0
    for chunk_len in (0, 16):
        out = torch.full_like(world.q, 7.0)
        world.run(paged_decode_triton, out=out, chunk_len=chunk_len)
        torch.testing.assert_close(out.double(), expected, atol=world.bound(), rtol=0)


@pytest.mark.parametrize("query_lens", [[2, 1], [2, 0]])
def test_rows_after_prompts_are_zeroed_by_the_other_kernel(query_lens):
    world = world_of(query_lens, [4, 9], num_padded_rows=5)
    world.qkv[sum(query_lens) :] = math.nan
    assert check_any(world)[sum(query_lens) :].abs().max() == 0
    no_query = world_of([0, 0], [4, 9], num_padded_rows=3)
    check_any(no_query, max_query_len=4)  # an upper bound sends it to both


# ---- any batch -----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(SEED, SEED + (3 if ON_GPU else 5)))
def test_any_ragged_batch_equals_dense_attention(seed, dtype):
    first = random_world(seed)
    shape = {name: getattr(first, name) for name in ("block_size", "group", "head_dim")}
    for batch in range(50 if ON_GPU else 1):
        fixed = shape | {"dtype": dtype, "device": DEVICE}
        world = random_world(1000 * batch + seed, longest=700 if ON_GPU else 40, **fixed)
        check_any(world, max_query_len=300, max_context_len=2000)


@pytest.mark.parametrize("chunk_len", [0, 64])
def test_block_ids_beyond_two_to_the_31_elements(chunk_len):
    """With K beside V a layer of GPT-2's passes 2**31 elements at block 87,381."""
    if free_memory_bytes(DEVICE) < 2 * 88_000 * 2 * 12 * 16 * 64:
        pytest.skip("the pool is larger than the device's memory")
    world = decodes([70, 1, 5], dtype=torch.float16, **GPT2)
    world.move_to_the_end_of(88_000)
    check_decode(world, chunk_len=chunk_len)


@needs_gpu
def test_a_batch_may_have_more_rows_than_a_grids_second_axis():
    """70,000 sequences of one token: only a grid's first axis is that long."""
    n = 70_000
    q, v = torch.randn(2, n, 1, 16, device=DEVICE)
    cache = v[:, :, None]  # (num_blocks, H_kv, block_size, D): a block for each
    ids, locs = (torch.arange(n + i, dtype=torch.int32, device=DEVICE) for i in (0, 1))
    ones = torch.ones_like(ids)
    for chunk_len in (0, 1):
        out = paged_decode_triton(
            q, cache, cache, ids[:, None], locs, ones, 0.25, 1, 1, chunk_len=chunk_len
        )
        torch.testing.assert_close(out, v, atol=1e-6, rtol=0)
