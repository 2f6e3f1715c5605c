"""prompt_cpu.py: what each query reads, bits that no cut and no neighbour changes, where it runs.

test_attention_cpu.py compares the whole function with dense attention, prompts among them. Here are
the edges of this kernel: its panels of queries, its groups of keys, the diagonal between them.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_worlds import Int8World
from parallel import in_new_process
from worlds import World

from kernels import attention_cpu, prompt_cpu
from kernels.attention_cpu import MANY_QUERIES, paged_attention_cpu
from kernels.numba_tools import HAS_NUMBA
from kernels.prompt_cpu import KEYS, LANES, PANEL, can_attend_prompts
from speedups.quantized_kv import scales_of

needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="the kernel needs numba")
needs_kernel = pytest.mark.skipif(not can_attend_prompts(), reason="needs AVX2, numba and OpenMP")
POOLS = {
    "fp32": (World, torch.float32),
    "bf16": (World, torch.bfloat16),
    "int8": (Int8World, torch.float32),
}
EACH_POOL = pytest.mark.parametrize("pool", POOLS)


def world_of(pool, query_lens, context_lens, **options):
    """A world over such a pool."""
    kind, dtype = POOLS[pool]
    return kind(query_lens, context_lens, dtype=dtype, **options)


def check(world):
    """The bound of any world in 32 bits: 1e-6 of an `Int8World` is for fewer tokens."""
    world.check(paged_attention_cpu, bound=World.bound(world))


# ---- the result is attention ---------------------------------------------------------------------
@needs_kernel
@EACH_POOL
def test_lengths_around_the_edges_of_panels_and_of_groups_of_keys(pool):
    edges = [LANES - 1, LANES, LANES + 1, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 3]
    query_lens = [max(n, MANY_QUERIES) for n in edges]
    for before in (0, 1, KEYS - 1, KEYS, KEYS + 1, 3 * KEYS):
        contexts = [n + before for n in query_lens]
        check(world_of(pool, query_lens, contexts, block_size=16))


@needs_kernel
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(list(POOLS)),
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 150), st.integers(0, 200)), max_size=3),
    st.sampled_from([1, 3, 16, 100]),
    st.sampled_from([1, 5, 25, 64, 96]),
    st.sampled_from([1, 2, 5]),
    st.integers(1, 2),
)
def test_any_prompts_equal_dense_attention(pool, lengths, block_size, head_dim, group, heads):
    world = world_of(
        pool,
        [new for new, _, _ in lengths],
        [new + before for new, before, _ in lengths],
        context_starts=[start for _, _, start in lengths],
        block_size=block_size,
        head_dim=head_dim,
        group=group,
        num_kv_heads=heads,
    )
    check(world)


# ---- NaN and infinity ----------------------------------------------------------------------------
@needs_kernel
@EACH_POOL
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
@pytest.mark.parametrize("position", [5, 40, KEYS - 1, KEYS, KEYS + 33, 149])
def test_a_nan_reaches_the_queries_that_read_it_and_no_other(position, cache, group, pool):
    """Some columns of a panel read a key and others do not: 0 times NaN would be NaN."""
    before, start = 20, 3
    world = world_of(pool, [130], [150], context_starts=[start], group=group, block_size=16)
    clean = world.run(paged_attention_cpu)
    values = getattr(world, cache)
    numbers = scales_of(values) if pool == "int8" else values
    numbers[world.tables[0][position // 16], 1, position % 16] = math.nan
    result = world.run(paged_attention_cpu)
    first = max(0, position - before)  # the first query that reads the position
    assert torch.equal(result[:first], clean[:first])
    assert torch.equal(result[:, :group], clean[:, :group])  # another head of K and V
    assert result[first:, group:].isnan().all()


@needs_kernel
def test_an_infinite_value_reaches_the_queries_that_read_it_and_no_other():
    world = world_of("fp32", [100], [100], block_size=16)
    clean = world.run(paged_attention_cpu)
    world.v_cache[world.tables[0][70 // 16], 0, 70 % 16, 2] = math.inf
    result = world.run(paged_attention_cpu)
    assert (result[70:, 0, 2] == math.inf).all()
    result[70:, 0, 2] = clean[70:, 0, 2]
    assert torch.equal(result, clean)


# ---- bits ----------------------------------------------------------------------------------------
@needs_kernel
@EACH_POOL
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("start", [0, 7])
def test_a_prompt_gets_the_same_bits_wherever_it_is_cut(start, group, pool):
    length = 230
    options = {"group": group, "head_dim": 64, "block_size": 16, "context_starts": [start]}
    world = world_of(pool, [length], [length], **options)
    whole = world.run(paged_attention_cpu)
    for cuts in ([100], [64, 128, 192], [10, 20, 33, 147], [219], [65, 129]):
        for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
            chunk = world.run(
                paged_attention_cpu,
                q=world.q[begin:end],
                query_start_locs=torch.tensor([0, end - begin], dtype=torch.int32),
                context_lens=torch.tensor([end], dtype=torch.int32),
                max_query_len=end - begin,
                max_context_len=end,
            )
            assert torch.equal(chunk, whole[begin:end]), (begin, end)


# ---- where it runs -------------------------------------------------------------------------------
@needs_kernel
@pytest.mark.parametrize("pool", [*POOLS, "fp64"])
def test_pytorchs_attention_runs_for_float64_alone(pool, monkeypatch):
    calls = []
    library = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: (calls.append(1), library(*a, **k))[1]
    )
    kind, dtype = (POOLS | {"fp64": (World, torch.float64)})[pool]
    kind([40, 1, 30], [40, 9, 80], dtype=dtype).run(paged_attention_cpu)
    assert len(calls) == (2 if pool == "fp64" else 0)


@needs_numba
@EACH_POOL
def test_other_machines_get_the_same_attention_from_pytorch(pool, monkeypatch):
    monkeypatch.setattr(attention_cpu, "can_attend_prompts", lambda: False)
    monkeypatch.setattr(attention_cpu, "attend_prompts", None)
    query_lens, context_lens, starts = [40, 1, 30, 12], [40, 9, 80, 90], [0, 0, 60, 5]
    world = world_of(pool, query_lens, context_lens, context_starts=starts, group=2)
    check(world)


@needs_numba
@pytest.mark.parametrize(
    ("features", "has_openmp", "want"),
    [
        ({"avx512f": True}, True, True),
        ({"avx2": True, "fma": True}, True, True),
        ({"avx512f": True}, False, False),
        ({"avx512f": False, "avx2": True}, True, False),
        ({"fma": True}, True, False),
        ({"neon": True}, True, False),
    ],
)
def test_it_needs_long_registers_and_openmp(features, has_openmp, want, monkeypatch):
    present = {name for name, is_present in features.items() if is_present}
    monkeypatch.setattr(prompt_cpu, "processor_features", lambda: present)
    monkeypatch.setattr(prompt_cpu, "has_openmp_threads", lambda: has_openmp)
    assert can_attend_prompts.__wrapped__() == want


SHORTER = """
import sys
import llvmlite.binding
llvmlite.binding.get_host_cpu_features = lambda: {"avx2": True, "fma": True}
import pytest
sys.exit(pytest.main([*sys.argv[1:], "-q", "-n", "0", "-p", "no:cacheprovider"]))
"""


@needs_kernel
@pytest.mark.slow
@pytest.mark.skipif(LANES == 8, reason="this processor's registers are the shorter ones")
def test_on_a_processor_with_shorter_registers(tmp_path):
    env = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    which = "edges or read_it_and_no_other or any_prompts or is_cut"
    printed = in_new_process(SHORTER, "tests/kernels/test_prompt_cpu.py", "-k", which, **env)
    assert "passed" in printed and "skipped" not in printed
