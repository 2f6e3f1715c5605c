"""A pool in eight bits: rounding, the layout, both CPU backends, and engines over such a pool.

The oracle rounds each key and value by itself and then attends densely. How Triton's kernels read
and write such a pool is tested beside their other tests, in tests/kernels.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_worlds import POISON, Int8World, in_int8
from parallel import in_new_process
from strategies import worlds

from beam_search import BeamSearchParams
from kernels.attention_cpu import HAS_NUMBA, paged_attention_cpu, write_kv_cpu
from kv_cache import KVCache
from llm import LLM, SamplingParams
from speedups.quantized_kv import (
    QuantizedKVCache,
    dequantize,
    head_bytes,
    int8_kernels,
    paged_attention_int8,
    quantize,
    scales_of,
    write_kv_int8,
)

needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="the kernel of the CPU needs numba")
BACKENDS = [pytest.param("numba", marks=needs_numba), "torch"]
READERS = {"numba": paged_attention_cpu, "torch": paged_attention_int8}
WRITERS = {"numba": write_kv_cpu, "torch": write_kv_int8}
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "bf16"])


# ---- a row of numbers ----------------------------------------------------------------------------
def test_a_row_becomes_integers_and_one_scale():
    """The largest of 254 numbers becomes 127, and 127 * 2 = 254: the scale is 2."""
    values, scale = quantize(torch.tensor([254.0, -254.0, 2.0, 0.9, 0.0, -100.0]))
    assert values.tolist() == [127, -127, 1, 0, 0, -50] and values.dtype == torch.int8
    assert scale.item() == 2.0 and scale.dtype == torch.bfloat16
    assert dequantize(values, scale).tolist() == [254.0, -254.0, 2.0, 0.0, 0.0, -100.0]


def test_halves_are_rounded_to_the_even_integer():
    values, _ = quantize(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]))
    assert values.tolist() == [127, 0, 2, 2, 0, -2, -2]


def test_numbers_are_divided_by_the_scale_that_is_stored():
    """127 * 1.003: the scale is rounded to 1, so that 100 stays 100 (and 99.7 would be 99.4)."""
    values, scale = quantize(torch.tensor([127 * 1.003, 100.0, 50.45]))
    assert scale.item() == 1.0 and values.tolist() == [127, 100, 50]


def test_no_number_is_clipped_whatever_the_scales_last_digit():
    """All 32 bits of mantissa of the largest number, in 2**14 steps, and some exponents."""
    for exponent in (-118, -20, 0, 20, 100, 127):
        largest = torch.linspace(1, 2, 2**14 + 1)[:-1, None] * 2.0**exponent
        row = largest * torch.tensor([1.0, -1.0, 0.7, 0.3])
        values, scales = quantize(row)
        assert (values[:, 0] == -values[:, 1]).all() and values.amax() == 127
        step = scales.float()[:, None]
        assert ((dequantize(values, scales) - row).abs() <= step / 2 * (1 + 1e-6)).all()


def test_a_row_without_a_size_is_zero_and_a_row_with_an_infinity_is_not_hidden():
    rows = torch.tensor([[0.0, -0.0], [1e-40, 0.0], [1.0, math.inf], [math.nan, 2.0]])
    values, scales = quantize(rows)
    assert values[:2].tolist() == [[0, 0], [0, 0]] and scales[:2].tolist() == [0, 0]
    assert dequantize(values, scales)[2:].isnan().all()


# ---- the pool ------------------------------------------------------------------------------------
@EACH_DTYPE
@pytest.mark.parametrize("block_size, head_dim", [(16, 64), (3, 5), (1, 1), (4, 3)])
@needs_numba
def test_the_compiled_write_leaves_the_bytes_of_the_plain_one(block_size, head_dim, dtype):
    torch.manual_seed(0)
    k, v = (torch.randn(2, 60, 2, head_dim, dtype=torch.float64) * 3).to(dtype)
    k *= torch.logspace(-45, 37, 60, dtype=torch.float64)[:, None, None].to(dtype)
    v[3, 1] = 0
    v[4, 0, 0] = math.inf
    v[5, :, -1] = math.nan
    slots = torch.randperm(60 * block_size)[:60]
    pools = []
    for write in WRITERS.values():
        cache = QuantizedKVCache(2, 60, block_size, 2, head_dim)
        cache.pool.fill_(POISON)
        write(k, v, *cache.layer(1), slots)
        pools.append(cache.pool)
    assert torch.equal(*pools)
    # (D integers and a scale of 2 bytes) for K and V of 2 heads of 60 tokens, at most
    changed = (pools[0] != POISON).sum()
    assert 0 < changed <= 60 * 2 * 2 * (head_dim + 2) and (pools[0][0] == POISON).all()


@EACH_BACKEND
def test_a_token_has_the_same_bytes_alone_and_in_any_chunk(backend):
    k, v = torch.randn(2, 40, 2, 64)
    slots = torch.arange(7, 47)
    pools = []
    for cuts in ([40], [1] * 40, [17, 3, 20]):
        cache = QuantizedKVCache(1, 4, 16, 2, 64)
        for rows in torch.arange(40).split(cuts):
            WRITERS[backend](k[rows], v[rows], *cache.layer(0), slots[rows])
        pools.append(cache.pool)
    assert torch.equal(pools[0], pools[1]) and torch.equal(pools[0], pools[2])


@EACH_BACKEND
def test_k_and_v_may_be_slices_of_one_product(backend):
    qkv = torch.randn(5, 3 * 2 * 8)
    _, k, v = (x.unflatten(1, (2, 8)) for x in qkv.split(16, dim=1))
    cache = QuantizedKVCache(1, 2, 4, 2, 8)
    WRITERS[backend](k, v, *cache.layer(0), torch.arange(1, 6))
    for got, want in zip(cache.gather(0, [0, 1], 6), (k, v), strict=True):
        assert torch.equal(got[1:], dequantize(*quantize(want)))


def test_a_copied_block_brings_its_scales_along():
    cache = QuantizedKVCache(2, 6, 4, 2, 8)
    k, v = torch.randn(2, 4, 2, 8)
    write_kv_int8(k, v, *cache.layer(1), torch.arange(4))
    cache.copy_blocks([(0, 5)])
    for copied, original in zip(cache.gather(1, [5], 4), cache.gather(1, [0], 4), strict=True):
        assert torch.equal(copied, original) and original.abs().max() > 0
    assert (scales_of(cache.layer(1)[0])[5] > 0).all()


def test_scales_begin_behind_the_values_of_their_own_head():
    cache = QuantizedKVCache(1, 2, 3, num_kv_heads=2, head_dim=5)
    assert head_bytes(block_size=3, head_dim=5) == 15 + 1 + 6 and cache.pool.shape[-1] == 22
    k_cache, v_cache = cache.layer(0)
    scales_of(v_cache)[1, 1, 2] = 1.5  # 0x3fc0
    assert cache.pool[0, 1, 1, 1].tolist() == [0] * 20 + [-64, 0x3F]
    assert k_cache.shape == (3, 2, 3, 5) and k_cache.count_nonzero() == 0


def test_a_pool_of_the_same_bytes_holds_1_9_times_the_tokens_of_bfloat16(tiny_gpt):
    """Heads of 64, as in GPT-2: 66 bytes a token where bfloat16 has 128."""
    model = tiny_gpt(dtype=torch.bfloat16, n_head=1)
    sizes = [
        LLM(model, kv_cache_mb=2, backend="torch", kv_cache_dtype=dtype).config.num_blocks
        for dtype in ("auto", "int8")
    ]
    assert sizes == [244, 473] and sizes[1] / sizes[0] > 1.9
    llm = LLM(model, num_blocks=10, backend="torch", kv_cache_dtype="int8")
    assert llm.engine.cache.pool[:, 0].nbytes == llm._block_bytes() == 2 * 2 * 16 * 66


# ---- attention -----------------------------------------------------------------------------------
MIXED = ([1, 1, 90, 1, 3, 1, 40, 1], [700, 3, 90, 64, 65, 300, 400, 1000])


@EACH_DTYPE
@EACH_BACKEND
@pytest.mark.oracle
def test_a_mixed_batch_equals_dense_attention_over_the_rounded_tokens(backend, dtype):
    shape = {"num_kv_heads": 3, "head_dim": 64, "block_size": 16, "dtype": dtype}
    Int8World(*MIXED, **shape).check(READERS[backend])


@settings(max_examples=100, deadline=None)
@given(
    world=worlds(DTYPES), backend=st.sampled_from(["numba", "torch"] if HAS_NUMBA else ["torch"])
)
def test_any_ragged_batch_equals_dense_attention_over_the_rounded_tokens(world, backend):
    in_int8(world).check(READERS[backend])


@EACH_BACKEND
def test_the_pool_is_only_read(backend):
    world = Int8World([3, 1, 40], [7, 9, 50], context_starts=[0, 2, 3])
    before = world.pool.clone()
    world.run(READERS[backend])
    assert torch.equal(world.pool, before)


@EACH_BACKEND
@pytest.mark.parametrize("query_len", [1, 40])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_a_row_that_overflowed_is_not_hidden(cache, query_len, backend):
    world = Int8World([query_len], [300], num_kv_heads=1)
    scales_of(getattr(world, cache))[world.tables[0][1], 0, 2] = math.nan
    assert world.run(READERS[backend]).isnan().all()


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["fp32", "bf16"])
def test_bits_depend_neither_on_the_threads_nor_on_the_batch(dtype, set_threads):
    world = Int8World(*MIXED, block_size=16, dtype=dtype)
    together = world.run(paged_attention_cpu)
    for threads in (2, 3):
        set_threads(threads)
        assert torch.equal(world.run(paged_attention_cpu), together)
    arguments = world.arguments()
    for i, (n, length) in enumerate(zip(*MIXED, strict=True)):
        row = sum(MIXED[0][:i])
        alone = {
            "q": world.q[row : row + n],
            "block_tables": arguments["block_tables"][i : i + 1],
            "query_start_locs": torch.tensor([0, n], dtype=torch.int32),
            "context_lens": torch.tensor([length], dtype=torch.int32),
            "max_query_len": n,
            "max_context_len": length,
        }
        assert torch.equal(world.run(paged_attention_cpu, **alone), together[row : row + n]), i


TWO_THREADS_AND_THEN_ONE = """
import torch
from kernels.attention_cpu import paged_attention_cpu
from int8_worlds import Int8World
world = Int8World([1] * 8, {context_lens}, block_size=16)
torch.set_num_threads(2)
expected = world.run(paged_attention_cpu)
torch.set_num_threads(1)
assert torch.equal(world.run(paged_attention_cpu), expected)
"""


@needs_numba
@pytest.mark.slow
def test_kernels_that_are_loaded_from_disk_give_the_same_bits_too(set_threads):
    set_threads(2)
    Int8World([1] * 8, MIXED[1], block_size=16).run(paged_attention_cpu)  # now they are on disk
    in_new_process(TWO_THREADS_AND_THEN_ONE.format(context_lens=MIXED[1]))


@needs_numba
def test_block_ids_beyond_two_to_the_31_bytes():
    """A block of GPT-2's layer has 25,344 bytes: 2**31 lie before block 84,734."""
    world = Int8World([1, 70], [40, 300], block_size=16, num_kv_heads=12, head_dim=64)
    shape = (88_001, *world.pool.shape[2:])
    world.pool = torch.empty(shape, dtype=torch.int8)
    values = world.pool[..., : 16 * 64].unflatten(-1, (16, 64))
    world.k_cache, world.v_cache = values[:, 0], values[:, 1]
    ids = iter(range(87_999, 0, -1))
    world.tables = [[next(ids) for _ in table] for table in world.tables]
    world.scratch = 88_000
    world.pool[sum(world.tables, [88_000])] = POISON
    world.write()
    assert world.tables[0][0] * world.k_cache.stride(0) > 2**31
    world.check(paged_attention_cpu)


@needs_numba
def test_views_without_scales_behind_their_values_are_refused():
    world = Int8World([1], [9])
    bare = torch.zeros(5, 2, 4, 8, dtype=torch.int8)
    for call in (
        lambda: world.run(paged_attention_cpu, k_cache=bare, v_cache=bare),
        lambda: write_kv_cpu(torch.ones(1, 2, 8), torch.ones(1, 2, 8), bare, bare, torch.arange(1)),
    ):
        with pytest.raises(ValueError, match="scales must follow"):
            call()


# ---- engines over such a pool --------------------------------------------------------------------
def build(model, backend, **options) -> LLM:
    options = {"block_size": 4, "num_blocks": 200, "kv_cache_dtype": "int8"} | options
    return LLM(model, backend=backend, **options)


def greedy_by_hand(model, prompt, num_tokens, rounded):
    """The oracle of the tokens: the whole text again for each token, K and V through `rounded`."""

    def attend(layer, q, k, v):
        q, k, v = (x.transpose(0, 1) for x in (q, rounded(k), rounded(v)))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)

    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            hidden = model(torch.tensor(ids), torch.arange(len(ids)), attend)
            ids.append(model.logits(hidden[-1:]).argmax().item())
    return ids[len(prompt) :]


PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 8, 9, 10, 11, 12, 40, 41], [60, 61]]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


@EACH_BACKEND
def test_an_engine_writes_what_a_loop_over_rounded_keys_and_values_writes(tiny_gpt, backend):
    model = tiny_gpt(dtype=torch.float64)
    llm = build(model, backend)
    assert llm.backend == backend and llm.engine.cache.pool.dtype == torch.int8
    tokens = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]

    def rounded(x):
        return dequantize(*quantize(x), torch.float64)

    assert tokens == [greedy_by_hand(model, prompt, 20, rounded) for prompt in PROMPTS]
    assert len(set(sum(tokens, []))) > 10
    exact = [greedy_by_hand(model, prompt, 20, lambda x: x) for prompt in PROMPTS]
    assert tokens != exact, "the rounding changes a token here, or this test compares nothing"


@EACH_BACKEND
def test_sharing_copying_chunks_and_preemption_change_no_token(tiny_gpt, backend):
    """Log-probabilities too: a block whose scales stayed behind would move them."""
    model = tiny_gpt(dtype=torch.float64)
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=20, ignore_eos=True, logprobs=1, n=n)
        for i, n in enumerate((1, 3, 1))
    ]
    wide = build(model, backend, enable_prefix_caching=False)
    want = [wide.generate(prompt, p)[0] for prompt, p in zip(PROMPTS, params, strict=True)]

    tight = build(model, backend, num_blocks=20, max_num_batched_tokens=7)
    copies = []
    tight.engine.watchers.append(lambda step: copies.extend(step.plan.copies))
    for _ in range(2):  # in the second round the prompts are found in the cache
        for got, one in zip(tight.generate(PROMPTS, params), want, strict=True):
            for mine, its in zip(got.outputs, one.outputs, strict=True):
                assert mine.token_ids == its.token_ids
                assert mine.cumulative_logprob == pytest.approx(its.cumulative_logprob, abs=1e-9)
    scheduler = tight.engine.scheduler
    assert scheduler.num_preemptions > 0 and scheduler.num_blocks_hit > 0
    assert copies


@EACH_BACKEND
def test_beams_fork_blocks_and_find_the_same_texts_in_a_tight_pool(tiny_gpt, backend):
    model = tiny_gpt(dtype=torch.float64)
    params = BeamSearchParams(beam_width=3, max_tokens=12)
    found = []
    for options in ({}, {"num_blocks": 24, "max_num_batched_tokens": 5}):
        outputs = build(model, backend, **options).beam_search(PROMPTS, params)
        found.append([[beam.token_ids for beam in output.outputs] for output in outputs])
    assert found[0] == found[1]


@EACH_BACKEND
def test_prompt_logprobs_do_not_depend_on_how_the_prompt_was_cut(tiny_gpt, backend):
    prompt = list(range(3, 53))
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    found = [
        build(tiny_gpt(dtype=torch.float64), backend, max_num_batched_tokens=budget)
        .generate([prompt], params)[0]
        .prompt_logprobs
        for budget in (64, 7)
    ]
    for whole, cut in zip(found[0][1:], found[1][1:], strict=True):
        assert {i: x.logprob for i, x in whole.items()} == pytest.approx(
            {i: x.logprob for i, x in cut.items()}, abs=1e-9
        )


def test_what_does_not_go_together_is_refused_with_a_sentence(tiny_gpt, monkeypatch):
    for options, sentence in (
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype is 'int4': choose auto or int8"),
        ({"fused": True}, "fused has no kernel for a pool in int8"),
    ):
        with pytest.raises(ValueError, match=sentence):
            build(tiny_gpt(), "torch", **options)
    with pytest.raises(ValueError, match="'triton-simple' reads no pool in int8"):
        int8_kernels("triton-simple", torch.float32)
    monkeypatch.setattr("speedups.quantized_kv.INTERPRETED", False)
    with pytest.raises(ValueError, match="'triton' reads no pool in int8 in float64"):
        int8_kernels("triton", torch.float64)


def test_the_plain_pool_is_the_default(tiny_gpt):
    llm = LLM(tiny_gpt(), num_blocks=4)
    assert type(llm.engine.cache) is KVCache and llm.engine.cache.pool.dtype == torch.float32
