"""What every Triton attention kernel must do: tests that its own file inherits.

A test file makes a subclass for each kernel, named `Test...`, and says how the kernel is called.
`World` (tests/worlds.py) is a random batch in a pool full of NaN; its `check` compares with dense
attention in float64. On a machine with a GPU the kernels are compiled and run there. Elsewhere
Triton interprets them in Python: that tests the arithmetic and the addresses, but neither races nor
the compiler. PAGEDGPT_SEED chooses other random batches.
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
    needs_gpu,
    some,
    world_of,
)

GPT2 = {"num_kv_heads": 12, "head_dim": 64, "block_size": 16}
HEAD_SIZES = [1, 5, 16, 64, 80, 96, 128, 256]
# What a kernel is compiled for. A GPU compiles for each: so few shapes, and many batches of each.
RANDOM_SHAPES = {
    "block_size": [1, 2, 3, 5, 16, 32],
    "group": [1, 2, 3],
    "head_dim": [16, 24, 64],
    "num_kv_heads": [1, 2],
}
SEEDS = range(SEED, SEED + (3 if ON_GPU else 5))
BATCHES = range(50 if ON_GPU else 1)


def check_compiled(module, *names):
    """The kernels of a module are compiled ones, and these are among them."""
    import triton

    kernels = {name for name in vars(module) if name.endswith("_kernel")}
    assert kernels >= set(names)
    for name in kernels:
        assert isinstance(getattr(module, name), triton.runtime.JITFunction), name


class AttentionRules:
    """For kernels that compute attention and may also write the newest token."""

    kernel = None  # the function under test, as a staticmethod
    variants = [{}]  # arguments that choose how it works, and may not change what it computes

    # ---- a subclass may say otherwise ----
    def query_len(self, context_len, number):
        """Queries of sequence `number`."""
        return min(1, context_len)

    def arguments(self, world):
        """The kernel's arguments, for a world that is not used again."""
        return world.arguments()

    def check(self, world, **changes):
        """Compare with the oracle; `changes` are arguments that the test wants otherwise."""
        return check_on_device(self.kernel, world, **changes)

    # ---- parts of tests ----
    def world(self, context_lens, context_starts=None, **kwargs):
        query_lens = [self.query_len(n, i) for i, n in enumerate(context_lens)]
        return world_of(query_lens, context_lens, context_starts, **kwargs)

    def run(self, world, **changes):
        return self.kernel(**(self.arguments(world) | changes))

    def check_all(self, context_lens, context_starts=None, **kwargs):
        """The same world for each variant; returns the results."""
        return [
            self.check(self.world(context_lens, context_starts, **kwargs), **variant)
            for variant in self.variants
        ]

    # ---- it is attention -------------------------------------------------------------------------
    @pytest.mark.oracle
    def test_a_ragged_batch_equals_dense_attention(self):
        self.check_all([70, 1, 9, 33], dtype=torch.float32, num_kv_heads=2, group=2, block_size=16)

    @pytest.mark.parametrize("block_size, dtype", some(12, BLOCK_SIZES, DTYPES), ids=str)
    def test_any_block_size(self, block_size, dtype):
        contexts = sorted({1, 2, block_size, block_size + 1, 511 if ON_GPU else 130})
        self.check_all(contexts, block_size=block_size, dtype=dtype)

    @pytest.mark.parametrize("block_size, dtype", some(6, BLOCK_SIZES, DTYPES), ids=str)
    def test_contexts_reach_the_1024_tokens_of_gpt2(self, block_size, dtype):
        """No variant: the kernel itself chooses how to work."""
        self.check(self.world([1024, 1023, 257, 256], block_size=block_size, dtype=dtype))

    @pytest.mark.slow
    def test_every_context_around_tiles_and_chunks(self):
        lengths = [1, 2, 31, 32, 33, 34, 63, 64, 65, 66, 96, 97, 127, 128, 129, 130, 192, 193]
        lengths = list(range(1, 1025)) if ON_GPU else lengths
        self.check_all(lengths, block_size=16, dtype=torch.float32)

    @pytest.mark.filterwarnings("error")  # rows of the tile that are no heads compute on numbers
    @pytest.mark.parametrize(
        "group, num_kv_heads, dtype",
        some(10, [1, 2, 3, 4, 8, 16, 17, 20, 33], [1, 3], [torch.float32, torch.float16]),
        ids=str,
    )
    def test_a_group_of_query_heads_shares_one_head_of_k_and_v(self, group, num_kv_heads, dtype):
        """More than 16 of them are several programs of the decode kernels."""
        shape = {"group": group, "num_kv_heads": num_kv_heads, "dtype": dtype}
        self.check_all([9, 1, 50], **shape)

    @pytest.mark.parametrize("head_dim, dtype", some(16, HEAD_SIZES, DTYPES), ids=str)
    def test_any_head_size(self, head_dim, dtype):
        self.check_all([9, 1, 70], head_dim=head_dim, num_kv_heads=2, dtype=dtype)

    # ---- values that a softmax may fall over -----------------------------------------------------
    @EACH_DTYPE
    def test_very_negative_scores_do_not_divide_by_zero(self, dtype):
        for variant in self.variants:
            world = self.world([1, 9, 120], dtype=dtype)
            world.q[:] = 1.0
            for k, _ in world.kv:
                k[:] = -(2.0**15)
            world.write()
            assert (self.check(world, **variant).abs().amax((1, 2)) > 0).all()

    @pytest.mark.parametrize("position", [0, 60, 127, 128])
    def test_one_position_may_outweigh_all_others(self, position):
        """The running maximum jumps, or a chunk's: all other sums shrink to nothing."""
        for variant in self.variants:
            world = self.world([129], dtype=torch.float32)
            world.kv[0][0][position] = world.q[-1] * 60
            world.write()
            result = self.check(world, **variant)[-1]
            torch.testing.assert_close(result, world.kv[0][1][position], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
    def test_a_nan_that_may_be_read_is_not_hidden(self, cache):
        """A model that overflows shows it: zeros in its place would look like an answer."""
        for variant in self.variants:
            world = self.world([150], dtype=torch.float32)
            getattr(world, cache)[world.tables[0][1], 0, 2] = math.nan
            assert self.run(world, **variant).isnan().all()

    # ---- it depends on the blocks, not on where they lie -----------------------------------------

    # ---- the arguments ---------------------------------------------------------------------------
    def test_upper_bounds_larger_than_needed_change_nothing(self):
        for bound in (70, 71, 256, 257, 1000):
            self.check(self.world([9, 4, 70]), max_context_len=bound)

    def test_chunks_that_are_absent_are_not_merged(self):
        """Sequences of one chunk beside one of many, and upper bounds that make room for more.

        Memory is handed out that holds something else: partial results are not cleared.
        """
        for poison in (math.nan, math.inf, 1e30):
            for size in (5 * 40, 5 * 40 * 16, 10 * 40, 4096, 2**16):
                several = [torch.full((size,), poison, device=DEVICE) for _ in range(4)]
                del several  # the allocator gives these pieces to the next call
            for variant in self.variants:
                world = self.world([1, 70, 0, 8, 9], dtype=torch.float32)
                self.check(world, max_context_len=320, **variant)

    def test_tables_may_be_a_view_of_wider_ones(self):
        world = self.world([9, 4, 12])
        wide = torch.full((3, 40), world.scratch, dtype=torch.int32, device=DEVICE)
        wide[:, 10:13] = world.arguments()["block_tables"]
        self.check(world, block_tables=wide[:, 10:13])

    def test_the_result_goes_into_out_and_nowhere_else(self):
        for variant in self.variants:
            world = self.world([9, 0, 70, 30], num_kv_heads=2)
            wide = torch.full((len(world.q), 3 * 32), 7.0, dtype=world.dtype, device=DEVICE)
            out = wide[:, 32:64].unflatten(1, (2, 16))
            assert self.check(world, out=out, **variant) is out
            out.fill_(7.0)
            assert (wide == 7.0).all()

    def test_the_caches_may_have_any_strides_but_the_same_ones(self):
        world = self.world([7, 90], num_kv_heads=2)
        arguments = self.arguments(world)
        turned = {  # heads outside, tokens inside
            name: arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
            for name in ("k_cache", "v_cache")
        }
        want = self.kernel(**arguments)
        assert turned["k_cache"].stride() != world.k_cache.stride()
        assert torch.equal(self.kernel(**arguments | turned), want)
        for name, cache in turned.items():  # a kernel that writes wrote the same
            assert torch.equal(cache.nan_to_num(99.0), arguments[name].nan_to_num(99.0))
        with pytest.raises(ValueError, match="strides"):
            self.kernel(**arguments | {"v_cache": turned["v_cache"]})

    def test_the_scale_is_an_argument(self):
        for variant in self.variants:
            default = self.run(self.world([7, 90]), **variant)
            world = self.world([7, 90])
            world.scale = 1.0  # a layer's own scale is in q already
            assert (self.check(world, **variant) - default).abs().max() > 1e-3

    def test_other_types_are_refused_by_name(self):
        arguments = self.arguments(self.world([7], dtype=torch.float32))
        others = {name: arguments[name].nan_to_num(0).int() for name in ("q", "k_cache", "v_cache")}
        with pytest.raises(ValueError, match="int32"):
            self.kernel(**arguments | others | {"out": None})

    # ---- any batch -------------------------------------------------------------------------------
    @pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
    @pytest.mark.parametrize("seed", SEEDS)
    def test_any_batch_of_any_shape_equals_dense_attention(self, seed, dtype):
        choose = random.Random(seed)
        shape = {name: choose.choice(values) for name, values in RANDOM_SHAPES.items()}
        longest = 2000 if ON_GPU else 150
        for batch in BATCHES:
            choose = random.Random(1000 * batch + seed)
            num_seqs = choose.randint(1, 5)
            lengths = [choose.choice([0, 1, choose.randint(1, longest)]) for _ in range(num_seqs)]
            columns = choose.choice([0, 2])
            world = self.world(lengths, num_padded_columns=columns, dtype=dtype, seed=seed, **shape)
            variant = choose.choice([{}, *self.variants])
            self.check(world, max_context_len=choose.choice([longest, 2000]), **variant)

    # ---- only a GPU can say ----------------------------------------------------------------------
    @needs_gpu
    @EACH_DTYPE
    def test_a_hundred_runs_give_the_same_bits(self, dtype):
        for variant in self.variants:
            world = self.world([1000, 3, 511, 64] * 4, dtype=dtype, **GPT2)
            first = self.check(world, **variant)
            arguments = self.arguments(world) | variant
            for _ in range(100):
                assert torch.equal(self.kernel(**arguments), first)

    @needs_gpu
    @EACH_DTYPE
    def test_64_sequences_of_512_tokens_of_gpt2s_shape(self, dtype):
        self.check_all([512] * 64, dtype=dtype, **GPT2)


class ReaderRules(AttentionRules):
    """For kernels of the common signature, which read the pool and write only `out`."""

    def test_scores_beyond_the_range_of_16_bits_are_summed_in_32(self):
        for variant in self.variants:
            world = self.world([20, 150], head_dim=64, dtype=torch.float16, size=100.0)
            q, k = world.q[0, 0].double(), world.kv[0][0][:, 0].double()
            assert (k @ q).abs().max() > 65504, "or the test says nothing"
            # A score of 100,000 is off by its rounding in 32 bits, so are the weights; V is 100.
            world.check(self.kernel, bound=world.bound(of_weights=1) + 0.5, **variant)

    @EACH_DTYPE
    def test_a_context_may_start_later(self, dtype):
        self.check_all([9, 12, 70, 90, 130], [5, 2, 66, 33, 100], dtype=dtype)

    @pytest.mark.parametrize("start", [9, 10, 50])
    def test_a_start_at_or_after_the_end_gives_zeros(self, start):
        for result in self.check_all([9, 5], [start, 0]):
            assert result[:-1].abs().max() == 0 or len(result) > 2
            assert result[-1].abs().max() > 0 and result[0].abs().max() == 0

    def test_a_query_over_an_empty_context_is_zero(self):
        for variant in self.variants:
            world = world_of([1, 1, 1], [0, 6, 0])  # as a padded row of a recorded graph
            result = self.check(world, **variant)
            assert result[[0, 2]].abs().max() == 0 and result[1].abs().max() > 0

    def test_sequences_without_a_query_disturb_no_other(self):
        for variant in self.variants:
            self.check(world_of([0, 1, 0, 0, 1, 0], [5, 70, 0, 9, 2, 3]), **variant)

    @pytest.mark.parametrize("num_padded_rows", [1, 40])
    def test_rows_after_the_last_sequence_are_zero(self, num_padded_rows):
        for query_lens in ([1, 1], [0, 1], [1, 0], [0, 0]):
            for variant in self.variants:
                world = world_of(query_lens, [4, 90], num_padded_rows=num_padded_rows, group=3)
                world.qkv[sum(query_lens) :] = math.nan
                assert self.check(world, **variant)[sum(query_lens) :].abs().max() == 0

    @pytest.mark.parametrize("max_query_len", [0, 1])
    def test_no_sequences_and_no_rows(self, max_query_len):
        bounds = {"max_query_len": max_query_len, "max_context_len": 4}
        assert self.run(world_of([], []), **bounds).shape == (0, 1, 16)
        assert self.run(world_of([0, 0], [3, 4]), **bounds).shape == (0, 1, 16)
        result = self.check(world_of([], [], num_padded_rows=3), **bounds)
        assert result.abs().max() == 0

    def test_the_pool_and_the_queries_are_only_read(self):
        world = self.world([7, 90, 50], [0, 2, 3])
        pool, qkv = world.pool.clone(), world.qkv.clone()
        self.run(world)
        assert torch.equal(world.pool.nan_to_num(99.0), pool.nan_to_num(99.0))
        assert torch.equal(world.qkv, qkv)

    @needs_gpu
    @pytest.mark.parametrize("context_lens", [[40] * 6, [1, 30, 900, 7, 300, 0]])
    def test_a_recorded_graph_gives_the_bits_of_the_eager_call(self, context_lens):
        """A replay reads lengths, tables and queries anew from the recorded addresses."""
        world = self.world([1024] * 6, num_padded_rows=2, dtype=torch.float16)
        arguments = world.arguments()
        out = torch.empty_like(world.q)
        replay = captured(lambda: self.kernel(**arguments, out=out))
        shorten(world, context_lens)
        world.qkv.copy_(world.qkv.flip(0))
        arguments["context_lens"].copy_(torch.tensor(context_lens))
        out.fill_(math.nan)
        replay()
        replayed = out.clone()
        assert torch.equal(replayed, self.kernel(**arguments))
        assert ((replayed.double() - world.expected()).abs() <= world.bound(of_weights=1)).all()


def captured(function):
    """A CUDA graph of one call; returns what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile before recording
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def shorten(world, context_lens):
    """Let a world's sequences have fewer tokens, in the same blocks."""
    world.context_lens = context_lens
    world.kv = [kv[:, :n] for kv, n in zip(world.kv, context_lens, strict=True)]
    world.pool.fill_(math.nan)
    world.write()
