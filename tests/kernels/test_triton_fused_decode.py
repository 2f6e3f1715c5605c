"""Write, attend and merge in one launch, against dense attention in float64, in poisoned pools.

What holds for all attention kernels stands in attention_rules.py. Here the newest token of each
sequence isn't in the pool yet: its slot is NaN, and its k and v are in the QKV product. The
interpreter runs one program after another, so it shows no race; but programs can be run in
any order there.
"""

import math
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from attention_rules import GPT2, AttentionRules, captured, check_compiled, shorten
from conftest import ROOT
from worlds import (
    ALL_DTYPES,
    DEVICE,
    DTYPES,
    ON_GPU,
    SEED,
    check_on_device,
    needs_gpu,
    needs_triton,
    some,
    world_of,
)

from kernels import triton_fused_decode as module
from kernels.device_memory import free_memory_bytes
from kernels.triton_fused_decode import fused_decode_triton, num_arrivals
from kernels.triton_prefill import HAS_TRITON
from kv_cache import write_kv

pytestmark = needs_triton(HAS_TRITON)
CHUNK_LENS = [0, 7, 64, 100]  # no chunks, less than a tile, a tile, more than one
EACH_CHUNK_LEN = pytest.mark.parametrize("chunk_len", CHUNK_LENS)


def decodes(context_lens, **kwargs):
    """A world of sequences with one query each."""
    return world_of([1] * len(context_lens), context_lens, **kwargs)


def newest_of(world):
    """Take the newest token of each sequence out of the pool: its k, v (N, H_kv, D) and slot (N,).

    Its slot becomes NaN, and so do q, k and v of a sequence without tokens: of a padded row.
    """
    H_kv, D, block_size = world.num_kv_heads, world.head_dim, world.block_size
    k, v = world.qkv[:, -2 * H_kv * D :].unflatten(1, (2, H_kv, D)).unbind(1)
    slots = []
    for i, (length, table) in enumerate(zip(world.context_lens, world.tables, strict=True)):
        if length == 0:
            world.qkv[i] = math.nan
            slots.append(world.scratch * block_size)
            continue
        k[i], v[i] = world.kv[i][:, length - 1]
        block_id, offset = table[(length - 1) // block_size], (length - 1) % block_size
        slots.append(block_id * block_size + offset)
        world.k_cache[block_id, :, offset] = world.v_cache[block_id, :, offset] = math.nan
    return {"k": k, "v": v, "slot_mapping": torch.tensor(slots, dtype=torch.int64, device=DEVICE)}


def counters(world, value=0):
    H_kv = world.num_kv_heads
    needed = num_arrivals(len(world.context_lens), H_kv * world.group, H_kv)
    return torch.full((needed,), value, dtype=torch.int32, device=DEVICE)


def arguments_of(world, **changes):
    """The kernel's arguments for a world whose newest tokens were not written yet."""
    arguments = world.arguments() | newest_of(world) | {"arrived": counters(world)}
    for name in ("query_start_locs", "max_query_len", "context_starts"):
        del arguments[name]
    return arguments | changes


def expected_pool(world, arguments):
    """The pool after the newest tokens are written and nothing else."""
    pool = world.pool.clone()
    layer = pool[1] if pool.ndim == 6 else pool
    rows = [i for i, length in enumerate(world.context_lens) if length]
    k, v, slots = (arguments[name][rows] for name in ("k", "v", "slot_mapping"))
    write_kv(k, v, layer[:, 0], layer[:, 1], slots)
    return pool


def check(world, **changes):
    """The result against the oracle, the pool to the last bit, and the counters; returns the first.

    `changes` are arguments that the test wants otherwise.
    """
    arguments = arguments_of(world, **changes)
    after = expected_pool(world, arguments)

    def function(out, **_):
        return fused_decode_triton(**arguments | {"out": arguments.get("out", out)})

    result = check_on_device(function, world)
    assert torch.equal(world.pool.nan_to_num(99.0), after.nan_to_num(99.0))
    assert not arguments["arrived"].any()
    return result


def run(world, **changes):
    return fused_decode_triton(**arguments_of(world, **changes))


class TestFusedDecode(AttentionRules):
    """One query a sequence, in one piece and in chunks. A context of 0 tokens is a padded row."""

    kernel = staticmethod(fused_decode_triton)
    variants = [{"chunk_len": chunk_len} for chunk_len in CHUNK_LENS]

    def query_len(self, context_len, number):
        return 1

    def arguments(self, world):
        return arguments_of(world)

    def check(self, world, **changes):
        return check(world, **changes)


# ---- it is a write and attention -----------------------------------------------------------------
@needs_gpu
def test_the_kernel_is_compiled_not_interpreted():
    check_compiled(module, "fused_decode_kernel")


@pytest.mark.parametrize("chunk_len", [1, 2, 3, 8])
def test_chunks_smaller_than_a_tile(chunk_len):
    """Where a context fills its chunks but for one token, the last chunk is the new token alone."""
    lengths = [n * chunk_len + over for n in (0, 1, 2, 4) for over in (0, 1)]
    check(decodes(lengths, dtype=torch.float32), chunk_len=chunk_len)


# ---- the new token -------------------------------------------------------------------------------
@EACH_CHUNK_LEN
@pytest.mark.parametrize("part", ["k", "v"])
def test_a_nan_of_the_new_token_is_not_hidden(part, chunk_len):
    arguments = arguments_of(decodes([90, 20], dtype=torch.float32), chunk_len=chunk_len)
    arguments[part][0] = math.nan
    result = fused_decode_triton(**arguments)
    assert result[0].isnan().all() and not result[1].isnan().any()


def test_the_new_token_counts_as_later_steps_will_read_it():
    """k = 1 + 2^-12 is 1 in 16 bits: in a score of 60,000 that would be 15 more."""
    world = decodes([2], dtype=torch.float16)
    world.scale = 1.0
    world.q[:] = 60.0
    world.kv[0][0][:] = 62.5  # of both tokens: equal scores
    world.write()
    arguments = arguments_of(world)
    given = {"k": arguments["k"].float() * (1 + 2.0**-12), "v": arguments["v"].float()}
    check(world, **given)
    assert (world.k_cache[world.tables[0][0], 0, 1] == 62.5).all()


def test_a_sequence_grows_step_by_step_over_blocks_and_chunks():
    """What one step wrote the next one reads: 20 steps from the first token on."""
    world = decodes([20], num_kv_heads=2, group=2, block_size=3, dtype=torch.float32)
    k, v = world.kv[0]
    world.pool.fill_(math.nan)
    arrived = counters(world)
    for length in range(1, 21):
        world.context_lens, world.kv = [length], [torch.stack([k[:length], v[:length]])]
        check(world, chunk_len=8, arrived=arrived)


# ---- padded rows ---------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk_len, dtype", some(8, CHUNK_LENS, DTYPES), ids=str)
def test_a_padded_row_is_zero_and_reads_nothing(chunk_len, dtype):
    """Its q, k and v are NaN, and so is the block that its table names: no result may be NaN."""
    world = decodes([0, 60, 0, 0, 1], num_kv_heads=2, dtype=dtype)
    result = check(world, chunk_len=chunk_len)
    assert result[[0, 2, 3]].abs().max() == 0
    assert (result[[1, 4]].abs().amax((1, 2)) > 0).all()


# ---- which program merges ------------------------------------------------------------------------
def test_there_is_a_counter_for_each_program_that_may_merge():
    assert num_arrivals(num_seqs=8, num_heads=12, num_kv_heads=12) == 96
    assert num_arrivals(num_seqs=8, num_heads=32, num_kv_heads=2) == 16  # 16 heads: one product
    assert num_arrivals(num_seqs=8, num_heads=40, num_kv_heads=2) == 32  # 20 heads: two
    assert num_arrivals(num_seqs=0, num_heads=12, num_kv_heads=12) == 0


@pytest.mark.parametrize("group", [1, 20])
def test_a_second_launch_finds_the_counters_as_the_first_did(group):
    world = decodes([40, 3, 0, 17], num_kv_heads=2, group=group, dtype=torch.float32)
    arrived = counters(world)
    first = check(world, chunk_len=16, arrived=arrived)
    for _ in range(2):
        assert torch.equal(check(world, chunk_len=16, arrived=arrived), first)


def test_a_context_of_one_chunk_touches_no_counter():
    world = decodes([16, 17, 1, 0], dtype=torch.float32)
    arrived = torch.tensor([7, 0, 7, 7], dtype=torch.int32, device=DEVICE)
    arguments = arguments_of(world, chunk_len=16, arrived=arrived)
    check_on_device(lambda out, **_: fused_decode_triton(**arguments, out=out), world)
    assert arrived.tolist() == [7, 0, 7, 7]


def test_one_long_context_is_cut_in_chunks_where_no_length_is_given():
    """Two chunks count from -5 on, and neither is the last; up to 128 tokens there is one chunk."""
    for context_len, count in ((128, -5), (129, -3)):
        arrived = torch.tensor([-5], dtype=torch.int32, device=DEVICE)
        run(decodes([context_len], dtype=torch.float32), arrived=arrived)
        assert arrived.tolist() == [count]


def test_a_row_is_merged_by_the_last_program_to_arrive_and_by_no_other():
    """Three chunks that count from -1 on: none of them finds a 2, so the row stays as it was."""
    world = decodes([40, 33], dtype=torch.float32)
    arrived = torch.tensor([-1, 0], dtype=torch.int32, device=DEVICE)
    out = torch.full_like(world.q, 7.0)
    run(world, chunk_len=16, arrived=arrived, out=out)
    assert arrived.tolist() == [2, 0]  # -1 + 3 chunks, and 0 again
    assert (out[0] == 7.0).all() and (out[1] != 7.0).all()


@pytest.mark.parametrize("head_dim, chunk_len", [(16, 1), (256, 3)])
def test_the_merge_folds_more_chunks_than_it_takes_at_a_time(head_dim, chunk_len):
    """It takes 128 at a time, or 8 where a head is that wide."""
    chunks = [1, 129] if chunk_len == 1 else [1, 7, 8, 9, 17]
    world = decodes([n * chunk_len for n in chunks], head_dim=head_dim)
    check(world, chunk_len=chunk_len)


@pytest.fixture
def grid_order(monkeypatch):
    """A function that makes the interpreter run programs in another order: `grid_order(order)`.

    `order` gets the number of programs and returns a permutation of them. The function returns a
    list to which every program adds its place in the grid when its turn comes.
    """
    from triton.runtime.interpreter import interpreter_builder

    place = interpreter_builder.set_grid_idx

    def reorder(order):
        ran = []

        def set_grid_idx(x, y, z):
            across, along, _ = interpreter_builder.grid_dim
            program = order(across * along)[x * along + y]
            place(program // along, program % along, z)
            ran.append(interpreter_builder.grid_idx)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)
        return ran

    return reorder


def backwards(num_programs):
    return range(num_programs)[::-1]


def shuffled(seed):
    def order(num_programs):
        return random.Random(seed).sample(range(num_programs), num_programs)

    return order


@pytest.mark.skipif(ON_GPU, reason="only the interpreter can run them in a chosen order")
@pytest.mark.parametrize("group, dtype", some(4, [2, 17], ALL_DTYPES), ids=str)
def test_the_bits_are_the_same_whichever_program_arrives_last(group, dtype, grid_order):
    shape = {"num_kv_heads": 2, "group": group, "dtype": dtype}
    world = decodes([60, 3, 0, 33], **shape)
    in_order = check(world, chunk_len=16)
    for order in (backwards, *map(shuffled, range(SEED, SEED + 2))):
        ran = grid_order(order)
        assert torch.equal(check(world, chunk_len=16), in_order)
        assert len(set(ran)) == len(ran) and ran != sorted(ran)


@pytest.mark.parametrize("chunk_len, dtype", some(5, [0, 33, 64], DTYPES), ids=str)
def test_chunks_of_fixed_length_give_the_same_bits_alone_and_in_a_batch(chunk_len, dtype):
    contexts = [130, 3, 64, 65, 7]
    world = decodes(contexts, num_kv_heads=2, group=2, dtype=dtype)
    together = check(world, chunk_len=chunk_len)
    arguments = arguments_of(world, chunk_len=chunk_len)
    rows = ("q", "k", "v", "slot_mapping", "block_tables", "context_lens")
    for i, context_len in enumerate(contexts):
        alone = {name: arguments[name][i : i + 1] for name in rows}
        alone["max_context_len"] = context_len
        assert torch.equal(fused_decode_triton(**arguments | alone)[0], together[i]), i


# ---- the arguments -------------------------------------------------------------------------------
def test_q_k_and_v_may_have_strides_of_their_own():
    world = decodes([7, 90], num_kv_heads=2, group=3)
    arguments = arguments_of(world)
    q, k, v = (arguments[name] for name in "qkv")
    turned = {
        "q": q.transpose(0, 1).contiguous().transpose(0, 1),
        "k": k.contiguous(),
        "v": v.repeat(1, 1, 2)[..., :16],
    }
    assert [x.stride() for x in turned.values()] == [(16, 32, 1), (32, 16, 1), (64, 32, 1)]
    check(world, **turned)


def wider(x):
    """One row more."""
    return torch.cat([x, x[:1]])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_tables": wider}, r"2 queries for 3 sequences: .* paged_attention_triton"),
        ({"k": wider}, r"k is \(3, 2, 16\): .* \(2, 2, 16\)"),
        ({"v": lambda v: v[:, :1]}, r"v is \(2, 1, 16\): .* \(2, 2, 16\)"),
        ({"v": lambda v: v[..., :8]}, r"v is \(2, 2, 8\): .* \(2, 2, 16\)"),
        ({"slot_mapping": wider}, r"slot_mapping is \(3,\): .* \(2,\)"),
        ({"context_lens": wider}, r"context_lens is \(3,\): .* \(2,\)"),
        ({"out": lambda q: q.new_empty(2, 4, 8)}, r"out is \(2, 4, 8\): .* \(2, 6, 16\)"),
        ({"q": lambda q: q[:, :5]}, r"5 query heads share 2 of K and V"),
        (
            {"k_cache": lambda c: c[..., :8], "v_cache": lambda c: c[..., :8]},
            r"k_cache is \(\d+, 2, 4, 8\): .* \(\d+, 2, 4, 16\)",
        ),
        ({"v_cache": lambda c: c[:-1]}, r"v_cache is \(\d+, 2, 4, 16\): .* \(\d+, 2, 4, 16\)"),
        ({"arrived": lambda n: n[:3]}, r"arrived is torch.int32 \(3,\), .* 4 zeros or more"),
        ({"arrived": lambda n: n.long()}, r"arrived is torch.int64 \(4,\), .* must be int32"),
        ({"arrived": lambda n: n.repeat(2)[::2]}, r"strides \(2,\): .* contiguous"),
        ({"q": lambda q: q.int()}, "int32"),
    ],
)
def test_shapes_that_contradict_each_other_are_refused_before_anything_is_written(change, message):
    world = decodes([9, 40], num_kv_heads=2, group=3)
    arguments = arguments_of(world, out=torch.empty_like(world.q))
    pool = world.pool.clone()
    arguments |= {name: made(arguments[name]) for name, made in change.items()}
    with pytest.raises(ValueError, match=message):
        fused_decode_triton(**arguments)
    assert torch.equal(world.pool.nan_to_num(99.0), pool.nan_to_num(99.0))


# ---- large pools ---------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk_len", [0, 64])
def test_slots_and_block_ids_beyond_two_to_the_31_elements(chunk_len):
    """With K beside V a layer of GPT-2's passes 2**31 elements at block 87,381."""
    if free_memory_bytes(DEVICE) < 2 * 88_000 * 2 * 12 * 16 * 64:
        pytest.skip("the pool is larger than the device's memory")
    world = decodes([70, 1, 5], dtype=torch.float16, **GPT2)
    world.move_to_the_end_of(88_000)
    used = sum(world.tables, [])
    assert min(used) * world.k_cache.stride(0) > 2**31
    arguments = arguments_of(world, chunk_len=chunk_len)
    want = world.pool[used].clone()
    check_on_device(lambda out, **_: fused_decode_triton(**arguments, out=out), world)
    # Block by block, for a copy of such a pool is as large again.
    index = {block_id: n for n, block_id in enumerate(used)}
    slots = [divmod(slot, 16) for slot in arguments["slot_mapping"].tolist()]
    for i, (block_id, offset) in enumerate(slots):
        want[index[block_id], 0, :, offset] = arguments["k"][i]
        want[index[block_id], 1, :, offset] = arguments["v"][i]
    assert torch.equal(world.pool[used].nan_to_num(99.0), want.nan_to_num(99.0))


# ---- what the compiler made of it ----------------------------------------------------------------
COMPILE = """
import compile_kernels as c, triton
from triton.backends.compiler import GPUTarget
compiled = []
c.record_launches(compiled)
triton.runtime.driver.set_active(c.NoGPU(GPUTarget("cuda", {target}, 32)))
c.call(c.Case("fused_decode", "{dtype}", {head_dim}))
print(compiled[-1].asm["ptx"])
"""


@pytest.mark.parametrize(
    "target, dtype, head_dim", [(90, "bfloat16", 64), (90, "float32", 16), (80, "float32", 16)]
)
def test_partial_results_are_stored_then_all_threads_meet_then_one_counts(target, dtype, head_dim):
    """No interpreter shows a race, and few runs do: the order of the instructions can be read.

    In 32 bits and of size 16 nothing else makes the threads meet there; elsewhere something does.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests/kernels'}"
    script = COMPILE.format(target=target, dtype=dtype, head_dim=head_dim)
    ptx = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=True,
    ).stdout
    kinds = r"\b(st\.global|bar\.sync|atom\.[\w.]*|ld\.global(?:\.cg)?)"
    found = re.findall(kinds, ptx)
    atoms = [name for name in found if name.startswith("atom")]
    assert len(atoms) == 1 and "acq_rel" in atoms[0] and "gpu" in atoms[0], atoms
    count = found.index(atoms[0])
    stores = [n for n, name in enumerate(found[:count]) if name == "st.global"]
    assert "bar.sync" in found[stores[-1] : count], "between the last store and the count"
    reads = [n for n, name in enumerate(found) if n > count and name.startswith("ld")]
    assert {found[n] for n in reads} == {"ld.global.cg"}, "others' results, past the nearest cache"
    assert "bar.sync" in found[count : reads[0]], "all threads wait for the count"


# ---- only a GPU can say --------------------------------------------------------------------------
@needs_gpu
@pytest.mark.parametrize("chunk_len", [None, 16])
def test_ten_thousand_runs_give_the_same_bits(chunk_len):
    """And whatever order their programs came in, every row is written and every counter is 0."""
    world = decodes([1000, 3, 511, 0, 64, 256, 257, 1024], dtype=torch.float16, **GPT2)
    first = check(world, chunk_len=chunk_len)
    arguments = arguments_of(world, chunk_len=chunk_len)
    differences = torch.zeros((), dtype=torch.int64, device=DEVICE)
    out = torch.empty_like(first)
    for _ in range(10_000):
        out.fill_(math.nan)
        fused_decode_triton(**arguments, out=out)
        differences += (out != first).sum()  # NaN is different, too
    assert differences.item() == 0
    assert not arguments["arrived"].any()


@needs_gpu
def test_a_thousand_batches_share_their_counters():
    """Other lengths each time, as steps and layers do: a count left behind would spoil the next."""
    arrived = torch.zeros(num_arrivals(8, 12, 12), dtype=torch.int32, device=DEVICE)
    worlds = []
    for seed in range(20):
        choose = random.Random(seed)
        lengths = [choose.choice([0, 1, choose.randint(1, 1024)]) for _ in range(8)]
        world = decodes(lengths, dtype=torch.float16, seed=seed, **GPT2)
        want = check(world, chunk_len=64, arrived=arrived, max_context_len=1024)
        arguments = arguments_of(world, chunk_len=64, arrived=arrived, max_context_len=1024)
        worlds.append((arguments, want))
    for n in range(1000):
        arguments, want = worlds[n * 7 % 20]
        assert torch.equal(fused_decode_triton(**arguments), want), n
    assert not arrived.any()


@needs_gpu
def test_a_batch_may_have_more_rows_than_a_grids_second_axis():
    """70,000 sequences of one token: only a grid's first axis is that long."""
    n = 70_000
    q, k, v = torch.randn(3, n, 1, 16, device=DEVICE)
    k_cache, v_cache = torch.full((2, n, 1, 1, 16), math.nan, device=DEVICE)
    slots = torch.randperm(n, device=DEVICE)
    ones = torch.ones(n, dtype=torch.int32, device=DEVICE)
    arrived = torch.zeros(n, dtype=torch.int32, device=DEVICE)
    where = (slots, slots.int()[:, None], ones)
    out = fused_decode_triton(q, k, v, k_cache, v_cache, *where, 0.25, 1, arrived)
    torch.testing.assert_close(out, v, atol=1e-6, rtol=0)
    assert torch.equal(k_cache[slots, :, 0], k) and torch.equal(v_cache[slots, :, 0], v)


@needs_gpu
@pytest.mark.parametrize("context_lens", [[40] * 6, [1, 30, 900, 7, 300, 0]])
def test_a_recorded_graph_gives_the_bits_of_the_eager_call(context_lens):
    """A replay reads lengths, tables and slots anew, and finds the counters as it left them."""
    world = decodes([1024] * 6, dtype=torch.float16)
    arguments = arguments_of(world)
    out = torch.empty_like(world.q)
    replay = captured(lambda: fused_decode_triton(**arguments, out=out))
    shorten(world, context_lens)
    arguments["slot_mapping"].copy_(newest_of(world)["slot_mapping"])
    arguments["context_lens"].copy_(torch.tensor(context_lens))
    for _ in range(3):
        out.fill_(math.nan)
        replay()
        replayed = out.clone()
        assert torch.equal(replayed, fused_decode_triton(**arguments))
    assert ((replayed.double() - world.expected()).abs() <= world.bound(of_weights=1)).all()
    assert not arguments["arrived"].any()
