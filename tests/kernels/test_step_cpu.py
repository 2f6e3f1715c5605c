"""step_cpu.py: the plain forward in float64 is the oracle, and a row is the same in any batch."""

import copy
import math

import pytest
import torch
from parallel import in_threads
from torch import nn

from engine import eager_forward
from kernels import step_cpu
from kernels.attention_cpu import MANY_QUERIES, paged_attention_cpu, write_kv_cpu
from kernels.int8_linear_cpu import can_multiply_bytes
from kernels.linear_cpu import can_multiply_pairs, can_use_panels
from kernels.packed_linear import pack
from kernels.step_cpu import addresses_in, can_compile_step, step_forward
from kv_cache import KVCache, Row, make_batch
from llm import LLM
from model import GPT, GPTConfig
from sampling import SamplingParams
from speedups.quantized_kv import QuantizedKVCache
from speedups.quantized_weights import quantize

numba = pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(
    not can_use_panels(torch.float32), reason="panels need AVX2, numba and OpenMP's threads"
)
SHAPE = {"vocab_size": 97, "max_seq_len": 600, "n_layer": 3, "n_head": 12, "n_inner": 200}
BLOCK_SIZE, NUM_BLOCKS = 16, 120
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 0.06}  # of the largest logit
# Beside a prompt: a piece of one, two tokens of a text, and texts that decode over several chunks.
SEQUENCES = [(0, 40), (30, MANY_QUERIES), (17, 2), (0, 1), (299, 1), (15, 1), (512, 1)]


needs_pairs = pytest.mark.skipif(not can_multiply_pairs(), reason="no products of pairs")
needs_vnni = pytest.mark.skipif(not can_multiply_bytes(), reason="the processor has no VNNI")
BFLOAT16 = pytest.param(torch.bfloat16, marks=needs_pairs)


def plain_model(width=768, **options):
    """Random weights in all parameters; the layers differ."""
    model = GPT(GPTConfig(**SHAPE | {"n_embd": width} | options)).init_weights(std=0.1).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    return model.requires_grad_(False)


def cache_for(model, dtype, kind=KVCache):
    """A pool, filled with NaN where its numbers can be NaN."""
    config = model.config
    options = {} if kind is QuantizedKVCache else {"dtype": dtype}
    sizes = (config.n_layer, NUM_BLOCKS, BLOCK_SIZE, config.n_head, config.head_dim)
    cache = kind(*sizes, **options)
    if kind is KVCache:
        cache.pool.fill_(math.nan)
    return cache


def rows_of(sequences, all_rows=False):
    """Random texts; a sequence has `start` tokens in the pool and `count` new ones."""
    blocks = iter(torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(5)).tolist())
    rows = []
    for i, (start, count) in enumerate(sequences):
        ids = torch.randint(97, (600,), generator=torch.Generator().manual_seed(i)).tolist()
        table = [next(blocks) for _ in range(-(-(start + count) // BLOCK_SIZE))]
        rows.append(Row(ids, start, count, table, count if all_rows else 1))
    return rows


def batch_of(rows):
    return make_batch(rows, BLOCK_SIZE, NUM_BLOCKS)


def run(forward, rows):
    """The logits of a step, after steps that fill the pool with the earlier tokens."""
    for row in rows:
        if row.start:
            whole = row._replace(start=0, num_new_tokens=row.start, num_sample_rows=0)
            assert forward(batch_of([whole])).shape[0] == 0
    return forward(batch_of(rows))


def relative_error(got, want):
    return (got.double() - want.double()).abs().max() / want.double().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    # The second one's products have padded outputs.
    [{"scale_attn_by_inverse_layer_idx": True}, {"width": 776, "n_head": 8}],
    ids=["scales", "padding"],
)
@torch.inference_mode()
def test_a_step_computes_what_the_plain_forward_does(dtype, options):
    model = plain_model(**options).to(dtype)
    exact = copy.deepcopy(model).double()
    packed = pack(model)
    cache, exact_cache = cache_for(packed, dtype), cache_for(exact, torch.float64)
    rows = rows_of(SEQUENCES, all_rows=True)
    want = run(eager_forward(exact, exact_cache), rows)
    assert can_compile_step(packed, cache)
    got = run(step_forward(packed, cache), rows)
    assert got.dtype == dtype and got.shape == want.shape == (56, 97)
    assert relative_error(got, want) <= BOUNDS[dtype]
    # The same slots are written, in each layer, and no others.
    assert torch.equal(cache.pool.isnan(), exact_cache.pool.isnan())
    written = ~cache.pool.isnan()
    assert relative_error(cache.pool[written], exact_cache.pool[written]) <= BOUNDS[dtype]


@needs_vnni
@torch.inference_mode()
def test_weights_in_eight_bits():
    """The oracle is the eager forward over the same integers: its LayerNorms differ in last bits.

    So a number may become the next integer, and the bound is a few of these steps of 1/127.
    """
    model = quantize(plain_model(n_layer=2))
    cache, others = (cache_for(model, torch.float32) for _ in range(2))
    assert can_compile_step(model, cache)
    rows = rows_of(SEQUENCES)
    got = run(step_forward(model, cache), rows)
    want = run(eager_forward(model, others, paged_attention_cpu, write_kv_cpu), rows)
    assert relative_error(got, want) <= 0.04


@torch.inference_mode()
def test_a_pool_in_eight_bits_holds_what_the_eager_forward_writes():
    model = pack(plain_model())
    cache, others = (cache_for(model, torch.float32, QuantizedKVCache) for _ in range(2))
    rows = rows_of(SEQUENCES)
    got = run(step_forward(model, cache), rows)
    want = run(eager_forward(model, others, paged_attention_cpu, write_kv_cpu), rows)
    assert relative_error(got, want) <= 0.01
    assert (cache.pool != others.pool).float().mean() < 1e-3 < cache.pool.ne(0).float().mean()


@pytest.mark.parametrize(
    ("dtype", "prepare"),
    [
        (torch.float32, pack),
        pytest.param(torch.bfloat16, pack, marks=needs_pairs),
        pytest.param(torch.float32, quantize, marks=needs_vnni),
    ],
    ids=["fp32", "bf16", "int8"],
)
@torch.inference_mode()
def test_a_row_has_the_same_bits_alone_in_any_batch_and_on_any_number_of_threads(
    dtype, prepare, set_threads
):
    model = prepare(plain_model().to(dtype))
    rows = rows_of(SEQUENCES)
    set_threads(1)
    whole = run(step_forward(model, cache_for(model, dtype)), rows)
    assert len(whole.unique(dim=0)) == len(rows)
    for threads in (1, 2):
        set_threads(threads)
        forward = step_forward(model, cache_for(model, dtype))
        assert torch.equal(run(forward, rows), whole)
        for first, last in ((0, 1), (1, 2), (2, 4), (3, 7), (4, 5)):
            assert torch.equal(run(forward, rows[first:last]), whole[first:last])


@torch.inference_mode()
def test_two_engines_in_two_threads_do_not_disturb_each_other(set_threads):
    set_threads(2)
    model = pack(plain_model())

    def work(sequences):
        rows = rows_of(sequences)
        forward = step_forward(model, cache_for(model, torch.float32))
        want = run(forward, rows)

        def decode():
            torch.set_num_threads(2)
            with torch.inference_mode():
                for _ in range(20):
                    assert torch.equal(forward(batch_of(rows)), want)

        return decode

    in_threads(work([(40, 1), (20, 30)]), work([(299, 1)]))


@torch.inference_mode()
def test_a_step_uses_as_many_threads_as_pytorch(set_threads, monkeypatch):
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one core")
    model = pack(plain_model())
    forward = step_forward(model, cache_for(model, torch.float32))
    counts = []
    note = lambda *args: counts.append((numba.get_num_threads(), args[4]))  # noqa: E731
    monkeypatch.setattr(step_cpu, "run_step", note)
    for threads in (2, 1, 2):
        set_threads(threads)
        forward(batch_of(rows_of([(0, 1)])))
    assert counts == [(2, 2), (1, 1), (2, 2)]


def test_the_addresses_are_those_of_all_layers_and_the_engine_keeps_their_memory():
    model = pack(plain_model())
    first, last = (addresses_in(step_cpu.arrays_of(layer)) for layer in (model.h[0], model.h[-1]))
    assert len(first) == len(last) == 12 and not set(first) & set(last)
    assert model.h[0].attn.c_attn.words.ctypes.data == first[2]


def wrapped(model):
    model.h[1].mlp.c_proj = nn.Sequential(model.h[1].mlp.c_proj)  # as the sum over processes


def with_plain_head(model):
    model.lm_head = nn.Linear(768, 97)


@pytest.mark.parametrize(
    ("options", "change", "pool"),
    [
        ({"activation_function": "relu"}, None, torch.float32),
        ({"width": 770, "n_head": 10}, None, torch.float32),  # its inputs are padded
        ({}, None, torch.float64),
        ({}, wrapped, torch.float32),
        ({}, with_plain_head, torch.float32),
        ({}, GPT.train, torch.float32),
    ],
)
def test_other_models_and_pools_are_not_compiled(options, change, pool):
    model = pack(plain_model(**options))
    if change is not None:
        change(model)
    assert not can_compile_step(model, cache_for(model, pool))
    assert not can_compile_step(plain_model(), cache_for(model, torch.float32))


def test_an_engine_on_a_cpu_runs_compiled_steps_alone(monkeypatch):
    """The tokens are those of the plain backend, and each step is one call."""
    steps = []
    run_step = step_cpu.run_step
    monkeypatch.setattr(step_cpu, "run_step", lambda *a: (steps.append(a), run_step(*a)))
    model, params = plain_model(), SamplingParams(temperature=0, max_tokens=9)
    prompts = [[5, 6, 7], [1, 2], list(range(40))]
    sizes = {"num_blocks": 40, "max_num_seqs": 2, "max_num_batched_tokens": 25}

    def tokens(model, backend):
        outputs = LLM(model, backend=backend, **sizes).generate(prompts, params)
        return [output.outputs[0].token_ids for output in outputs]

    got = tokens(pack(copy.deepcopy(model)), "numba")
    num_steps = len(steps)
    assert num_steps > 18  # two sequences at most at once: two rounds of 9 tokens
    want = tokens(model, "torch")
    assert len(steps) == num_steps
    assert got == want and len(set(got[0])) > 2
