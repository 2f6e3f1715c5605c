"""The compiled kernels of the CPU against dense attention in float64, in poisoned pools.

`test_paged_attention.py` specifies the signature. This file tests the same for a kernel that is
compiled, has three dtypes and runs on several threads. `World.check` compares every row, also those
that read nothing and have to be zero, and writes the result into memory full of NaN.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel import in_new_process, in_threads
from strategies import worlds
from worlds import World

from kernels import attention_cpu
from kernels.attention_cpu import (
    HAS_NUMBA,
    attend_per_head,
    paged_attention_cpu,
    write_kv_cpu,
)
from kernels.device_memory import free_memory_bytes
from kernels.numba_tools import use_openmp_threads
from kv_cache import KVCache, write_kv

pytestmark = pytest.mark.skipif(not HAS_NUMBA, reason="the kernel of the CPU needs numba")

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "bf16"])


def marked_in_fp32(mark):
    """Each dtype, float32 with a mark: `make test` runs it alone, each dtype compiles for 10 s."""
    dtypes = [DTYPES[0], pytest.param(DTYPES[1], marks=mark), DTYPES[2]]
    return pytest.mark.parametrize("dtype", dtypes, ids=["fp64", "fp32", "bf16"])


def check(query_lens, context_lens, **kwargs):
    """A world of these sequences, checked; returns its (N, H, D)."""
    return World(query_lens, context_lens, **kwargs).check(paged_attention_cpu)


# ---- the result is attention ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, marks=pytest.mark.oracle), torch.bfloat16],
    ids=["fp32", "bf16"],
)
def test_the_plain_loop_one_sequence_and_head_at_a_time_equals_dense_attention(dtype):
    world = World([1] * 4, [1, 16, 40, 0], block_size=16, head_dim=64, dtype=dtype)
    names = ("q", "k_cache", "v_cache", "block_tables", "context_lens", "scale")
    call = world.arguments()
    result = attend_per_head(*(call[name] for name in names))
    world.check(lambda **_: result)


@marked_in_fp32(pytest.mark.oracle)
def test_prompts_chunks_and_decodes_of_gpt2s_head_size_are_one_call(dtype):
    shape = {"block_size": 16, "head_dim": 64, "dtype": dtype}
    check([6, 4, 1, 3, 1, 1, 40, 1], [6, 9, 33, 3, 1, 16, 90, 700], **shape)


@EACH_DTYPE
@pytest.mark.parametrize("query_len", [1, 2, 17, 300])
@pytest.mark.parametrize("block_size", [1, 3, 16, 32, 256])
def test_it_equals_dense_attention_whatever_the_block_size(block_size, query_len, dtype):
    edges = {1, block_size, block_size + 1, 3 * block_size + 1, 511}
    contexts = sorted({query_len + n - 1 for n in edges})
    check([query_len] * len(contexts), contexts, block_size=block_size, head_dim=64, dtype=dtype)


MANY = ([5, 1, 2, 70, 1], [9, 7, 2, 100, 333])  # queries, contexts
RAGGED = {
    "contexts that start later": ([1, 3, 2, 40], [9, 12, 7, 90], {"context_starts": [5, 2, 0, 33]}),
    "a start before some queries, at the end, and after it": (
        [6, 2, 2, 1],
        [6, 9, 9, 5],
        {"context_starts": [4, 9, 50, 0]},
    ),
    "sequences without queries": ([0, 3, 0, 0, 1, 0], [5, 7, 0, 9, 2, 3], {}),
    "empty contexts, as in padded rows": ([1, 2, 1], [0, 6, 0], {}),
    "more queries than context": ([5, 200], [3, 3], {}),
    "no queries at all": ([0, 0], [4, 9], {"num_padded_rows": 3}),
    "padded columns of the tables": (*MANY, {"num_padded_columns": 3}),
    "GPT-2's 12 heads": ([1] * 4, [256, 1000] * 2, {"num_kv_heads": 12, "head_dim": 64}),
    **{
        f"{group} query heads for each of {heads}": (*MANY, {"group": group, "num_kv_heads": heads})
        for group, heads in ((2, 1), (3, 1), (8, 1), (2, 3), (4, 3))
    },
    **{
        f"head size {head_dim}": (*MANY, {"head_dim": head_dim})
        for head_dim in (1, 2, 5, 16, 80, 96, 128, 256)
    },
}


@EACH_DTYPE
@pytest.mark.parametrize("name", RAGGED)
def test_a_ragged_batch_equals_dense_attention(name, dtype):
    query_lens, context_lens, options = RAGGED[name]
    check(query_lens, context_lens, dtype=dtype, **options)


@EACH_DTYPE
def test_rows_after_the_last_sequence_are_zero_whatever_their_queries_are(dtype):
    world = World([2, 1], [4, 9], num_padded_rows=5, dtype=dtype)
    world.qkv[3:] = math.nan
    for max_query_len in (2, 64):
        assert world.check(paged_attention_cpu, max_query_len=max_query_len)[3:].abs().max() == 0


@EACH_DTYPE
def test_no_sequences_and_no_rows(dtype):
    assert World([], [], dtype=dtype).run(paged_attention_cpu).shape == (0, 2, 8)
    assert World([0, 0], [3, 4], dtype=dtype).run(paged_attention_cpu).shape == (0, 2, 8)
    no_sequences = World([], [], num_padded_rows=3, dtype=dtype)
    no_sequences.check(paged_attention_cpu, max_query_len=1, max_context_len=4)


# ---- values at which a softmax could overflow ----------------------------------------------------


@marked_in_fp32(pytest.mark.regression)
def test_chunks_with_far_apart_maxima_are_merged_under_the_largest(dtype):
    """Inputs of size 20: scores of several hundred, and each chunk of 256 tokens has its own."""
    world = World([1, 2, 1, 30], [700, 1000, 513, 600], head_dim=16, dtype=dtype, size=20.0)
    # Scores s of 2,000 carry an error of a few s eps, and so do the weights; V is of size 20.
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    result = world.check(paged_attention_cpu, bound=world.bound() + 16 * 2000 * eps * 80)
    assert result.isfinite().all()


# ---- what may be read ----------------------------------------------------------------------------
# Blocks, heads, block size and head size: a layer of GPT-2's, with K beside V, passes 2**31
# elements at block 87,381; in the other pool slots pass 2**31, and elements 2**32.
FAR = [(88_000, 12, 16, 64), (2**23 + 100, 1, 256, 1)]


@pytest.mark.parametrize("num_blocks, num_kv_heads, block_size, head_dim", FAR)
def test_ids_and_slots_beyond_two_to_the_31(num_blocks, num_kv_heads, block_size, head_dim):
    if free_memory_bytes("cpu") < 4 * num_blocks * num_kv_heads * block_size * head_dim:
        pytest.skip("the pool is larger than this machine's memory")
    shape = {"num_kv_heads": num_kv_heads, "block_size": block_size, "head_dim": head_dim}
    world = World([1, 70], [40, 300], dtype=torch.bfloat16, **shape)
    world.move_to_the_end_of(num_blocks)
    assert world.tables[0][0] * world.k_cache.stride(0) > 2**31
    world.check(paged_attention_cpu)

    slots = torch.tensor([world.tables[0][0] * block_size + 5, num_blocks * block_size])
    assert block_size < 256 or slots.min() > 2**31
    k, v = torch.randn(2, 2, num_kv_heads, head_dim).bfloat16()
    write_kv_cpu(k, v, world.k_cache, world.v_cache, slots)
    for cache, values in ((world.k_cache, k), (world.v_cache, v)):
        assert torch.equal(cache[world.tables[0][0], :, 5], values[0])
        assert torch.equal(cache[num_blocks, :, 0], values[1])


# ---- the arguments -------------------------------------------------------------------------------


def test_tables_may_be_a_view_of_wider_ones():
    world = World([2, 1, 5], [9, 4, 5])
    wide = torch.full((3, 40), world.scratch, dtype=torch.int32)
    wide[:, 10:13] = world.arguments()["block_tables"]
    world.check(paged_attention_cpu, block_tables=wide[:, 10:13])


@EACH_DTYPE
def test_out_may_be_a_view_and_its_neighbours_are_left_alone(dtype):
    world = World([2, 0, 1, 30], [9, 3, 4, 30], num_padded_rows=2, dtype=dtype)
    N, H, D = world.q.shape
    for wide, out in (
        ((wide := torch.full((N, 3 * H * D), 7.0, dtype=dtype)), wide[:, H * D : 2 * H * D]),
        ((wide := torch.full((2 * N, H * D), 7.0, dtype=dtype)), wide[::2]),
    ):
        out = out.unflatten(1, (H, D))
        assert world.check(paged_attention_cpu, out=out) is out
        out.fill_(7.0)
        assert (wide == 7.0).all()


def test_the_caches_may_have_any_strides_but_the_same_ones():
    world = World([3, 1, 40], [7, 9, 50])
    names = ("k_cache", "v_cache")
    caches = {name: world.arguments()[name] for name in names}  # heads outside, tokens inside
    turned = {name: c.transpose(1, 2).contiguous().transpose(1, 2) for name, c in caches.items()}
    assert turned["k_cache"].stride() != world.k_cache.stride()
    world.check(paged_attention_cpu, **turned)
    with pytest.raises(ValueError, match="strides"):
        world.run(paged_attention_cpu, v_cache=turned["v_cache"])


@EACH_DTYPE
def test_the_pool_and_the_queries_are_only_read(dtype):
    world = World([3, 1, 40], [7, 9, 50], context_starts=[0, 2, 3], dtype=dtype)
    arguments = {k: v for k, v in world.arguments().items() if isinstance(v, torch.Tensor)}
    before = {name: value.clone() for name, value in arguments.items()}
    pool, qkv = world.pool.clone(), world.qkv.clone()
    paged_attention_cpu(**world.arguments() | arguments)
    assert torch.equal(world.pool.nan_to_num(99.0), pool.nan_to_num(99.0))
    assert torch.equal(world.qkv, qkv)
    for name in ("block_tables", "query_start_locs", "context_lens", "context_starts"):
        assert torch.equal(arguments[name], before[name])


def test_the_scale_is_an_argument():
    world = World([3, 1], [7, 9])
    default = world.run(paged_attention_cpu)
    world.scale = 1.0  # a layer's own scale is in q already
    assert (world.check(paged_attention_cpu) - default).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_other_types_are_refused_by_name(dtype):
    world = World([3, 1], [7, 9], dtype=torch.float32)
    names = ("q", "k_cache", "v_cache")
    others = {name: world.arguments()[name].nan_to_num(0).to(dtype) for name in names}
    with pytest.raises((TypeError, ValueError), match=str(dtype).removeprefix("torch.")):
        world.run(paged_attention_cpu, **others)


@EACH_DTYPE
@pytest.mark.parametrize("query_lens", [[1], [3], [40]])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_a_nan_that_may_be_read_is_not_hidden(cache, query_lens, dtype):
    """An overflow in the model has to be visible in its output."""
    world = World(query_lens, [300], num_kv_heads=1, dtype=dtype)
    getattr(world, cache)[world.tables[0][1], 0, 2] = math.nan
    assert world.run(paged_attention_cpu).isnan().all()


# ---- random worlds -------------------------------------------------------------------------------
@settings(max_examples=300, deadline=None)
@given(world=worlds(DTYPES), more_queries=st.integers(0, 9), more_context=st.integers(0, 20))
def test_any_ragged_batch_equals_dense_attention(world, more_queries, more_context):
    world.check(
        paged_attention_cpu,
        max_query_len=max(world.query_lens, default=0) + more_queries,
        max_context_len=max(world.context_lens, default=0) + more_context,
    )


# ---- threads -------------------------------------------------------------------------------------
@pytest.fixture(params=["OpenMP's threads", "Python's threads"])
def openmp_answers(request, monkeypatch):
    """Runs the test with both kinds of threads; yields what each call got: OpenMP's or not."""
    has_openmp = request.param == "OpenMP's threads"
    answers = []

    def use(num_threads):
        answers.append(has_openmp and use_openmp_threads(num_threads))
        return answers[-1]

    monkeypatch.setattr(attention_cpu, "use_openmp_threads", use)
    yield answers
    assert set(answers) <= {has_openmp}, "the other kind of threads was used"


MIXED = ([1, 1, 90, 1, 3, 1, 40, 1], [700, 3, 90, 64, 65, 300, 400, 1000])


@EACH_DTYPE
@pytest.mark.parametrize("query_lens", [[1] * 8, MIXED[0]], ids=["decode", "mixed"])
def test_any_number_of_threads_gives_the_same_bits(query_lens, dtype, set_threads, openmp_answers):
    world = World(query_lens, MIXED[1], block_size=16, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 64, 1):
        set_threads(threads)
        results.append(world.run(paged_attention_cpu))
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert len(openmp_answers) == 3  # asked whenever there is more than one thread
    world.check(paged_attention_cpu)


@EACH_DTYPE
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 7])
def test_threads_that_share_the_heads_of_few_chunks_give_the_same_bits(
    num_kv_heads, dtype, set_threads
):
    options = {"block_size": 16, "group": 2, "num_kv_heads": num_kv_heads, "dtype": dtype}
    for query_lens, context_lens in (([1], [290]), ([1], [5]), ([3, 1, 1], [70, 600, 256])):
        world = World(query_lens, context_lens, **options)
        results = []
        for threads in (1, 2, 3, 64):
            set_threads(threads)
            results.append(world.run(paged_attention_cpu))
            world.check(paged_attention_cpu)
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_only_while_chunks_are_few_do_threads_share_the_heads(monkeypatch, set_threads):
    groups = []
    monkeypatch.setattr(attention_cpu, "attend_on_openmp", lambda number, *_: groups.append(number))
    monkeypatch.setattr(attention_cpu, "use_openmp_threads", lambda number: True)
    for threads, num_kv_heads, sequences in ((2, 12, 1), (2, 1, 3), (3, 2, 1), (2, 12, 16)):
        set_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            options = {"num_kv_heads": num_kv_heads, "dtype": dtype}
            World([1] * sequences, [9] * sequences, **options).run(paged_attention_cpu)
    # One chunk of bfloat16 is one task: it needs no second thread.
    assert groups == [2, 1, 1, 2, 1, 1]


TWO_THREADS_AND_THEN_ONE = """
import torch
from kernels.attention_cpu import paged_attention_cpu
from worlds import World
world = World([1] * 8, {context_lens}, block_size=16)
torch.set_num_threads(2)
expected = world.run(paged_attention_cpu)
torch.set_num_threads(1)
assert torch.equal(world.run(paged_attention_cpu), expected)
"""


def test_kernels_that_are_loaded_from_disk_give_the_same_bits_too(set_threads):
    """OpenMP's threads run copies of the functions that one thread runs.

    In the process that compiles both, the two may be one function. A new process loads the copies
    first, and keeps them apart.
    """
    context_lens = MIXED[1]
    set_threads(2)
    World([1] * 8, context_lens, block_size=16).run(paged_attention_cpu)  # now they are on disk
    in_new_process(TWO_THREADS_AND_THEN_ONE.format(context_lens=context_lens))


FIRST_CALL = """
import torch
torch.set_num_threads({threads})
from kernels.attention_cpu import demo
demo()
assert torch.get_num_threads() == {threads}, torch.get_num_threads()
import numba
print("threads of", numba.threading_layer())
"""


@pytest.mark.parametrize("threads", [2, 3])
def test_the_first_call_of_a_process_leaves_the_number_of_threads_alone(threads):
    """Numba's start sets OpenMP's number of threads to the number of cores."""
    code = FIRST_CALL.format(threads=threads)
    assert in_new_process(code).splitlines()[-1] == "threads of omp"


def test_without_openmp_the_answer_is_no_and_nothing_is_changed():
    code = """
import torch
torch.set_num_threads(2)
import numba.np.ufunc.parallel as threads
def no_layer(): raise ValueError("No threading layer could be loaded.")
threads._launch_threads = no_layer
from kernels.numba_tools import use_openmp_threads
assert not use_openmp_threads(2)
from kernels.attention_cpu import demo
demo()
assert torch.get_num_threads() == 2
"""
    assert in_new_process(code).splitlines()[-1].startswith("ok:")


@EACH_DTYPE
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sequence_gets_the_same_bits_alone_and_in_a_batch(threads, dtype, set_threads):
    set_threads(threads)
    world = World(*MIXED, block_size=16, dtype=dtype)
    together = world.run(paged_attention_cpu)
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


def test_each_python_thread_has_its_own_number_of_openmp_threads():
    """The number is remembered for each thread, and a change takes effect."""
    numba = pytest.importorskip("numba")

    def ask(*wanted):
        for num_threads in wanted:
            if use_openmp_threads(num_threads):
                assert numba.get_num_threads() == min(num_threads, most)

    most = numba.config.NUMBA_NUM_THREADS
    for _ in range(20):
        in_threads(lambda: ask(2, 1, 1, 2), lambda: ask(1, 2, 2, 1))
    ask(2, 1, most, 1000, 1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtypes", [DTYPES[:1] * 2, DTYPES[1:]], ids=["same type", "two types"])
def test_two_threads_may_call_it_at_the_same_time(dtypes, threads, set_threads, openmp_answers):
    """Catches scratch memory that calls share, and a pool of threads that serves one caller."""
    set_threads(threads)

    def many_times(dtype, seed):
        worlds = [World(*MIXED, block_size=16, dtype=dtype, seed=seed)]
        worlds += [World([1] * 9, [50 * seed] * 9, dtype=dtype, seed=seed)]
        want = [world.check(paged_attention_cpu) for world in worlds]

        def work():
            torch.set_num_threads(threads)  # OpenMP keeps this number for each thread
            for _ in range(100):
                for world, result in zip(worlds, want, strict=True):
                    assert torch.equal(world.run(paged_attention_cpu), result)

        return work

    in_threads(many_times(dtypes[0], seed=1), many_times(dtypes[1], seed=2))


def test_two_threads_may_write_to_one_pool_at_the_same_time():
    cache = KVCache(1, 64, 4, num_kv_heads=2, head_dim=8)
    k, v = torch.randn(2, 256, 2, 8)
    slots = torch.randperm(256)

    def half(rows):
        def work():
            for _ in range(100):
                write_kv_cpu(k[rows], v[rows], *cache.layer(0), slots[rows])

        return work

    in_threads(half(slice(0, 128)), half(slice(128, 256)))
    got_k, got_v = cache.gather(0, list(range(64)), 256)
    assert torch.equal(got_k[slots], k) and torch.equal(got_v[slots], v)


# ---- writing K and V -----------------------------------------------------------------------------
def written(write, k, v, dtype, slots, block_size=4):
    """A poisoned pool of two layers after a write to its second: all of it, NaN as 99."""
    cache = KVCache(2, 12, block_size, k.shape[1], k.shape[2], dtype=dtype)
    cache.pool.fill_(math.nan)
    write(k, v, *cache.layer(1), slots)
    return cache.pool.nan_to_num(99.0)


@EACH_DTYPE
@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
@pytest.mark.parametrize("head_dim", [1, 5, 64])
def test_k_and_v_are_written_where_pytorch_writes_them(head_dim, block_size, dtype):
    k, v = torch.randn(2, 11, 3, head_dim).to(dtype)
    slots = torch.randperm(12 * block_size)[:11]
    want = written(write_kv, k, v, dtype, slots, block_size)
    assert torch.equal(written(write_kv_cpu, k, v, dtype, slots, block_size), want)
    assert (want != 99).sum() == 2 * 11 * 3 * head_dim, "only these slots"


@EACH_DTYPE
def test_k_and_v_may_be_views_each_with_its_own_strides(dtype):
    qkv = torch.randn(9, 3 * 2 * 8).to(dtype)
    _, k, v = (x.unflatten(1, (2, 8)) for x in qkv.split(16, dim=1))
    slots = torch.tensor([23, 0, 14, 31, 5, 9, 47, 46, 2])
    want = written(write_kv, k, v, dtype, slots)
    assert k.stride() != v.contiguous().stride()
    for views in ((k, v), (k.contiguous(), v), (k, v.contiguous())):
        assert torch.equal(written(write_kv_cpu, *views, dtype, slots), want)


@EACH_DTYPE
@pytest.mark.parametrize("given", DTYPES, ids=["of fp64", "of fp32", "of bf16"])
def test_values_are_rounded_to_the_type_of_the_pool(given, dtype):
    values = [1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1e-40, 3.3895e38, math.inf, -0.0]
    k = torch.tensor(values, dtype=given).view(1, 1, 8)
    slots = torch.tensor([5])
    want = written(write_kv, k, -k, dtype, slots)
    assert torch.equal(written(write_kv_cpu, k, -k, dtype, slots), want)


def test_a_pool_of_another_type_is_refused_by_name():
    k, v = torch.zeros(2, 3, 2, 8).half()
    with pytest.raises((TypeError, ValueError), match="float16"):
        written(write_kv_cpu, k, v, torch.float16, torch.tensor([0, 1, 2]))


# ---- in new processes ----------------------------------------------------------------------------
COUNT_COMPILATIONS = """
import torch
from numba.core import event
with event.install_recorder("numba:compile") as compiled:
    from kernels.attention_cpu import paged_attention_cpu, write_kv_cpu
    from worlds import World
    for query_lens in ([1, 1], [40, 1]):
        world = World(query_lens, [40, 9], dtype=torch.float32)
        world.check(paged_attention_cpu)
    k, v = torch.randn(2, 3, 2, 8)
    write_kv_cpu(k, v, world.k_cache, world.v_cache, torch.tensor([0, 1, 2]))
print(len(compiled.buffer))
"""


@pytest.mark.slow
def test_what_one_process_compiled_the_next_one_loads(tmp_path):
    folder = {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert int(in_new_process(COUNT_COMPILATIONS, **folder)) > 0
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb[ic]")}
    assert files
    assert int(in_new_process(COUNT_COMPILATIONS, **folder)) == 0
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb[ic]")}
