"""Recorded decode steps give the same tokens, and padded rows change no other row.

On a CPU a recording is a plain call, so that everything around it is tested without a GPU: which
steps are replayed, how their inputs are packed and padded, what is copied. The stand-in for the
graphs is as strict as they are: its results lie in the same memory every time, and it notices who
writes to a source before its copy is done. What only graphs can show stands at the end.

Only the tests with an engine need more than torch, numpy and pytest: they import it themselves.
"""

import gc
import random
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from worlds import DEVICE, needs_gpu

from kernels.attention_cpu import paged_attention_cpu, write_kv_cpu
from kernels.device_memory import split_drawn
from kernels.numba_tools import HAS_NUMBA
from kernels.triton_decode import paged_attention_triton
from kernels.triton_prefill import write_kv_triton
from kv_cache import Batch, KVCache, Row, make_batch, write_kv
from model import GPT, GPTConfig
from paged_attention import paged_attention
from sampling import SampleRow, SamplingParams, draw_tokens
from speedups import cuda_graphs
from speedups.cuda_graphs import (
    SIZES,
    Calls,
    GraphForward,
    Graphs,
    plan_layout,
    recorded_sizes,
    rehearse,
    views_of,
)

KERNELS = {"torch": (paged_attention, write_kv)}
if HAS_NUMBA:
    KERNELS["numba"] = (paged_attention_cpu, write_kv_cpu)
EACH_BACKEND = pytest.mark.parametrize("backend", KERNELS)
SHAPE = {"max_seq_len": 64, "n_layer": 2, "n_head": 2, "n_embd": 32}
SHAPE |= {"tie_word_embeddings": False}  # its texts vary more


class StrictCalls(Calls):
    """The CPU's stand-in for graphs, as strict as they are. It keeps count of what it did."""

    def __init__(self):
        self.replays: list[int] = []  # rows of each
        self.sends: list[int] = []  # bytes of each
        self.on_its_way = None

    def record(self, function):
        kept = []

        def replay():
            logits = function()
            kept.append(torch.empty_like(logits)) if not kept else None
            self.replays.append(len(logits))
            return kept[0].copy_(logits)

        return replay

    def send(self, target, source):
        assert self.on_its_way is None, "the copy before was not waited for"
        super().send(target, source)
        self.sends.append(len(source))
        self.on_its_way = source, source.clone()

    def wait(self):
        if self.on_its_way is not None:
            source, sent = self.on_its_way
            assert torch.equal(source, sent), "written to before its copy was done"
        self.on_its_way = None


def plain_forward(model, cache, attention, write, seen=None):
    """The engine's eager forward, spelt out; `seen` collects the batches that come in."""

    def forward(batch):
        if seen is not None:
            seen.append(batch)
        batch = batch.to(cache.pool.device)
        hidden = model(batch.input_ids, batch.positions, cache.attend(batch, attention, write))
        return model.logits(hidden[batch.sample_rows])

    return forward


class Bench:
    """A model over a poisoned pool, its decode steps recorded, and sequences that lie in the pool.

    Sequence i has `lengths[i]` tokens in the cache and one that is not computed yet; its blocks
    are anywhere. What no sequence wrote is NaN.
    """

    def __init__(self, model, lengths, sizes, kernels, block_size=4, max_seq_len=64, launcher=None):
        config, weight = model.config, model.wte.weight
        numbers = random.Random(0)
        needed = [length // block_size + 1 for length in lengths]
        num_blocks = sum(needed) + 3
        shape = (config.n_layer, num_blocks, block_size, config.n_head, config.head_dim)
        self.cache = KVCache(*shape, weight.dtype, weight.device)
        self.cache.pool.fill_(torch.nan)
        free = iter(numbers.sample(range(num_blocks), num_blocks))
        texts = [[numbers.randrange(config.vocab_size) for _ in range(n + 1)] for n in lengths]
        tables = [[next(free) for _ in range(n)] for n in needed]
        self.rows = [Row(text, len(text) - 1, 1, table, 1) for text, table in zip(texts, tables)]
        self.seen = []
        self.forward = plain_forward(model, self.cache, *kernels, self.seen)
        prompts = [Row(text, 0, len(text) - 1, table, 0) for text, table in zip(texts, tables)]
        with torch.inference_mode():
            self.forward(self.batch([prompt for prompt in prompts if prompt.num_new_tokens]))
        self.launcher = StrictCalls() if launcher is None else launcher
        options = sizes, max_seq_len, self.launcher
        self.graphs = GraphForward(self.cache, self.forward, *options)
        self.seen.clear()
        if isinstance(self.launcher, StrictCalls):
            self.launcher.sends.clear()

    def batch(self, rows=None) -> Batch:
        """The decode step of all sequences, or of the rows given, in host memory."""
        rows = self.rows if rows is None else rows
        return make_batch(rows, self.cache.block_size, self.cache.scratch_block)

    def bits(self):
        """The pool's bits, in which a NaN equals itself."""
        width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[self.cache.pool.dtype.itemsize]
        return self.cache.pool.view(width).clone()

    def changed_since(self, bits):
        """The (block, offset) of every slot that holds other bits now, in whatever layer."""
        changed = (self.bits() != bits).flatten(2, 3).any(-1).any(2).any(0)  # (blocks, block_size)
        return {tuple(place) for place in changed.nonzero().tolist()}

    def padded_by_hand(self, size, rows=None) -> Batch:
        """The decode step as it has to look when it runs as `size` rows, on the pool's device."""
        batch, scratch = self.batch(rows), self.cache.scratch_block
        B, (num_seqs, width) = size, batch.block_tables.shape
        zeros = torch.zeros(B - num_seqs, dtype=torch.int64)
        tables = torch.full((B, self.graphs.max_blocks), scratch, dtype=torch.int32)
        tables[:num_seqs, :width] = batch.block_tables
        padded = Batch(
            input_ids=torch.cat([batch.input_ids, zeros]),
            positions=torch.cat([batch.positions, zeros]),
            slot_mapping=torch.cat([batch.slot_mapping, zeros + scratch * self.cache.block_size]),
            block_tables=tables,
            query_start_locs=torch.arange(B + 1, dtype=torch.int32),
            context_lens=torch.cat([batch.context_lens, zeros.int()]),
            sample_rows=torch.arange(B),
            max_query_len=1,
            max_context_len=self.graphs.max_seq_len,
        )
        return padded.to(self.cache.pool.device)


@pytest.fixture(scope="module")
def model(tiny_gpt):
    return tiny_gpt(seed=5, dtype=torch.float64, **SHAPE)


# ---- sizes ---------------------------------------------------------------------------------------
def test_the_sizes_end_with_the_most_sequences_that_may_run():
    assert recorded_sizes(8) == [2, 4, 8]
    assert recorded_sizes(20) == [2, 4, 8, 16, 20]
    assert recorded_sizes(256) == list(SIZES[1:])
    assert recorded_sizes(300) == [*SIZES[1:], 300]


def test_a_step_of_one_sequence_is_recorded_as_two_rows(monkeypatch):
    """In PyTorch a linear layer of one row is two launches: product, then bias."""
    assert recorded_sizes(1) == recorded_sizes(2) == [2]
    monkeypatch.setattr(cuda_graphs, "FEWEST_ROWS", 1)  # what a measurement may decide
    assert recorded_sizes(1) == [1] and recorded_sizes(5) == [1, 2, 4, 5]


def test_sizes_and_lengths_that_cannot_be_are_refused(model):
    with pytest.raises(ValueError, match="max_num_seqs is 0: it must be at least 1"):
        recorded_sizes(0)
    cache = KVCache(2, 4, 4, 2, 16)
    for sizes, max_seq_len in (([], 64), ([0, 1], 64), ([4], 0)):
        with pytest.raises(ValueError, match="give at least one size, and none below 1"):
            GraphForward(cache, None, sizes, max_seq_len)


def test_the_largest_is_recorded_first(model):
    order = []

    def progress(sizes):
        order.extend(sizes)
        return sizes

    cache = KVCache(2, 4, 4, 2, 16, torch.float64)
    forward = plain_forward(model, cache, paged_attention, write_kv)
    GraphForward(cache, forward, [1, 2, 4], 64, progress=progress)
    assert order == [4, 2, 1]


# ---- packed inputs -------------------------------------------------------------------------------


@pytest.mark.parametrize("size, max_blocks", [(1, 1), (1, 64), (3, 5), (256, 64)])
def test_views_share_the_bytes_and_never_each_others(size, max_blocks):
    """And they are of the types that a batch has."""
    layout, num_bytes = plan_layout(size, max_blocks)
    packed = torch.zeros(num_bytes, dtype=torch.uint8)
    views = views_of(packed, layout)
    for number, view in enumerate(views.values(), 1):
        view.fill_(number)
    batch = make_batch([Row([1, 2, 3], 2, 1, [4], 1)], 16, 8)
    for number, (name, view) in enumerate(views.items(), 1):
        assert (view == number).all(), name
        assert view.data_ptr() % 16 == packed.data_ptr() % 16
        assert view.dtype == getattr(batch, name).dtype
    assert vars(batch).keys() - layout.keys() == {"sample_rows", "max_query_len", "max_context_len"}


def test_two_sequences_in_a_step_of_four(model):
    """All that the kernels are given, number by number; four others ran in the step before."""
    bench = Bench(model, [1], [4], KERNELS["torch"], max_seq_len=11)  # 3 blocks of 4
    scratch = bench.cache.scratch_block
    assert scratch == 4
    bench.graphs(bench.batch([Row([9] * 11, 10, 1, [1, 3, 0], 1)] * 4))
    assert bench.launcher.replays == [4]
    rows = [Row([7, 8, 9, 10, 11], 4, 1, [2, 0], 1), Row([5], 0, 1, [3], 1)]
    bench.graphs(bench.batch(rows))
    batch = bench.seen[-1]
    assert batch.input_ids.tolist() == [11, 5, 0, 0]
    assert batch.positions.tolist() == [4, 0, 0, 0]
    assert batch.slot_mapping.tolist() == [0, 12, 16, 16]
    assert batch.context_lens.tolist() == [5, 1, 0, 0]
    assert batch.query_start_locs.tolist() == [0, 1, 2, 3, 4]
    assert batch.block_tables.tolist() == [[2, 0, 4], [3, 4, 4], [4, 4, 4], [4, 4, 4]]
    assert (batch.max_query_len, batch.max_context_len) == (1, 11)


# ---- which steps are replayed --------------------------------------------------------------------
def row(num_cached, num_new, num_sample_rows, table=None):
    """Some sequence that computes `num_new` tokens after `num_cached` ones."""
    total = num_cached + num_new
    table = list(range(-(-total // 4))) if table is None else table
    return Row([1] * total, num_cached, num_new, table, num_sample_rows)


# Rows, and the size that serves them where 1, 2 and 4 rows of 16 tokens are recorded.
STEPS = {
    "a decode": ([row(4, 1, 1)], 1),
    "a prompt of one token": ([row(0, 1, 1)], 1),
    "both": ([row(4, 1, 1), row(0, 1, 1, [2])], 2),
    "four of the longest context": ([row(15, 1, 1)] * 4, 4),
    "a prompt": ([row(0, 5, 1)], None),
    "a decode beside a chunk": ([row(4, 1, 1), row(0, 3, 0, [2])], None),
    "a chunk of one token, which wants no logits": ([row(3, 1, 0)], None),
    "one of two wants no logits": ([row(3, 1, 1), row(3, 1, 0, [2])], None),
    "several rows of one sequence": ([row(4, 3, 3)], None),
    "two tokens of one, none of the other": ([row(4, 2, 2), row(3, 0, 0, [2])], None),
    "five sequences": ([row(4, 1, 1)] * 5, None),
    "a context of 17 tokens": ([row(16, 1, 1)], None),
}


@pytest.mark.parametrize("rows, size", STEPS.values(), ids=STEPS)
def test_a_step_of_one_token_each_is_replayed_and_no_other(model, rows, size):
    bench = Bench(model, [5], [1, 2, 4], KERNELS["torch"], max_seq_len=16)
    batch = bench.batch(rows)
    assert bench.graphs.recorded_size(batch) == size
    logits = bench.graphs(batch)
    assert len(logits) == sum(row.num_sample_rows for row in rows)
    assert bench.launcher.replays == ([] if size is None else [size])
    if size is None:
        (seen,) = bench.seen
        assert seen is batch and bench.launcher.sends == []


def test_sample_rows_in_another_order_are_not_what_was_recorded(model):
    bench = Bench(model, [5, 9], [2], KERNELS["torch"])
    batch = bench.batch()
    swapped = replace(batch, sample_rows=batch.sample_rows.flip(0))
    assert bench.graphs.recorded_size(swapped) is None
    torch.testing.assert_close(bench.graphs(swapped).flip(0), bench.forward(batch))


# ---- padded rows ---------------------------------------------------------------------------------
@EACH_BACKEND
@pytest.mark.parametrize("num_seqs", [1, 5, 8])
def test_a_padded_step_gives_the_bits_of_the_batch_padded_by_hand(model, backend, num_seqs):
    bench = Bench(model, [3, 9, 6, 12, 1, 30, 4, 8][:num_seqs], [8], KERNELS[backend])
    before = bench.cache.pool.clone()
    got = bench.graphs(bench.batch()).clone()
    written = bench.bits()
    bench.cache.pool.copy_(before)
    with torch.inference_mode():
        want = bench.forward(bench.padded_by_hand(8))
    assert got.shape == (num_seqs, 97) and torch.equal(got, want[:num_seqs])
    assert torch.equal(written, bench.bits())
    assert got.isfinite().all() and len(got.unique(dim=0)) == num_seqs


@EACH_BACKEND
@pytest.mark.parametrize("num_seqs", [5, 8])
def test_a_step_writes_its_sequences_slots_and_scratch_and_nothing_else(model, backend, num_seqs):
    """The other blocks are full of NaN, those of sequences that have left among them."""
    bench = Bench(model, [3, 9, 6, 12, 1, 30, 4, 8], [8], KERNELS[backend])
    bench.graphs(bench.batch())  # all eight: their slots and tables lie in the buffers now
    rows, others = bench.rows[:num_seqs], bench.rows[num_seqs:]
    for gone in others:
        bench.cache.pool[:, gone.block_table] = torch.nan
    bench.cache.pool[:, bench.cache.scratch_block] = torch.nan
    for going_on in rows:
        block_id, offset = going_on.block_table[going_on.start // 4], going_on.start % 4
        bench.cache.pool[:, block_id, :, :, offset] = torch.nan
    before = bench.bits()
    logits = bench.graphs(bench.batch(rows))
    assert logits.isfinite().all()
    slots = {(row.block_table[row.start // 4], row.start % 4) for row in rows}
    if num_seqs < 8:
        slots.add((bench.cache.scratch_block, 0))
    assert bench.changed_since(before) == slots


def test_what_a_larger_step_left_behind_is_padding_in_the_next_ones(model):
    """Rows and table columns, also where steps of another size came between."""
    bench = Bench(model, [3, 9, 6, 12, 1, 30, 4, 8], [4, 8], KERNELS["torch"])
    assert [len(row.block_table) for row in bench.rows] == [1, 3, 2, 4, 1, 8, 2, 3]
    orders = [range(8), [0, 4, 1], [5], range(5), [4], [0, 2, 4, 6], range(1, 8), [0, 4]]
    for order in orders * 2:
        rows = [bench.rows[i] for i in order]
        bench.graphs(bench.batch(rows))
        size = 4 if len(rows) <= 4 else 8
        want, got = bench.padded_by_hand(size, rows), bench.seen[-1]
        for name, tensor in vars(want).items():
            if isinstance(tensor, torch.Tensor) and name != "sample_rows":
                assert getattr(got, name).tolist() == tensor.tolist(), (order, name)


def test_a_table_that_reserves_more_than_the_longest_context_is_cut(model):
    bench = Bench(model, [5, 9], [4], KERNELS["torch"], max_seq_len=16)
    want = bench.graphs(bench.batch()).clone()
    scratch = bench.cache.scratch_block
    longer = [r._replace(block_table=r.block_table + [scratch] * 7) for r in bench.rows]
    assert torch.equal(bench.graphs(bench.batch(longer)), want)


# ---- buffers -------------------------------------------------------------------------------------
def test_a_step_is_one_copy_of_no_more_bytes_than_its_size_needs(model):
    bench = Bench(model, [5] * 8, [1, 2, 4, 8], KERNELS["torch"])
    for num_seqs in (8, 1, 3, 2, 5):
        bench.graphs(bench.batch(bench.rows[:num_seqs]))
    assert bench.launcher.replays == [8, 1, 4, 2, 8]
    assert bench.launcher.sends == [plan_layout(size, 16)[1] for size in (8, 1, 4, 2, 8)]
    assert plan_layout(1, 16)[1] == 16 * 5 + 64 and plan_layout(8, 16)[1] < 1000


def test_inputs_never_move(model):
    """Each size is given one and the same batch, whatever ran in between."""
    bench = Bench(model, [3, 9, 6, 12, 1, 30, 4, 8], [1, 2, 4, 8], KERNELS["torch"])
    first = {}
    for num_seqs in [1, 2, 3, 5, 8, 4, 1, 7, 2] * 3:
        bench.graphs(bench.batch(bench.rows[:num_seqs]))
        batch = bench.seen[-1]
        places = {n: x.data_ptr() for n, x in vars(batch).items() if isinstance(x, torch.Tensor)}
        kept = first.setdefault(len(batch.input_ids), (batch, places))
        assert kept[0] is batch and kept[1] == places
    assert first.keys() == {1, 2, 4, 8}
    begins = [places["input_ids"] for _, places in first.values()]
    assert set(begins) == {bench.graphs.packed.data_ptr()}


def test_while_a_step_is_recorded_its_rows_read_and_write_the_scratch_block_alone(model):
    """A recording runs the function several times, over a pool that may be in use already."""

    class Rehearsing(StrictCalls):
        def record(self, function):
            for _ in range(3):
                function()
            return super().record(function)

    bench = Bench(model, [5, 9], [1, 4], KERNELS["torch"])
    before, scratch = bench.bits(), bench.cache.scratch_block

    def forward(batch):
        assert batch.context_lens.tolist() == [1] * len(batch.input_ids)
        assert set(batch.block_tables.flatten().tolist()) == {scratch}
        assert batch.query_start_locs.tolist() == list(range(len(batch.input_ids) + 1))
        return bench.forward(batch)

    GraphForward(bench.cache, forward, [1, 4], 64, Rehearsing())
    assert [len(batch.input_ids) for batch in bench.seen] == [4, 4, 4, 1, 1, 1]
    assert bench.changed_since(before) == {(scratch, 0)}


def test_a_rehearsal_holds_the_largest_step_and_the_logits_of_the_others(model):
    cache = KVCache(2, 1, 4, 2, 16, torch.float64)
    forward = plain_forward(model, cache, paged_attention, write_kv)
    largest, room = rehearse(cache, forward, [1, 2, 4, 8], 64, Calls())
    assert list(largest.steps) == [8]
    assert room.shape == (1 + 2 + 4, 97) and room.dtype == torch.float64
    assert cache.pool[:, 0].abs().sum() == 0  # its one block was never written


def test_a_rehearsal_holds_room_for_rows_of_logits_that_are_padded(model):
    cache = KVCache(2, 1, 4, 2, 16, torch.float64)

    def forward(batch):
        return torch.zeros(len(batch.input_ids), 128)[:, :97]

    _, room = rehearse(cache, forward, [2, 8], 64, Calls())
    assert room.shape == (2, 128)


# ---- the draw ------------------------------------------------------------------------------------
class Sampler:
    """Draws the most likely token, with the arguments of `sample_triton`, and keeps its inputs."""

    def __call__(self, logits, seeds, temperatures, out, peaks, **others):
        self.seeds, self.temperatures = seeds.tolist(), temperatures.tolist()
        torch.max(logits, 1, out=(values := torch.empty_like(logits[:, 0]), out))
        peaks.copy_(values)


def draws(*temperatures):
    """Rows to draw at these temperatures, with the seeds 1, 2, ..."""
    params = [SamplingParams(temperature=temperature) for temperature in temperatures]
    return [SampleRow(p, seed, 9, [0], 1) for seed, p in enumerate(params, start=1)]


def test_one_copy_of_the_bytes_brings_tokens_and_peaks(model, monkeypatch):
    """Of a recorded step, and of one that was not: there are 3 sequences, then 2 and a prompt."""
    monkeypatch.setattr(cuda_graphs, "draw_tokens_triton", draw_tokens)
    bench = Bench(model, [5, 9, 2], [4], KERNELS["torch"])
    options = [4], 64, StrictCalls()
    graphs = GraphForward(bench.cache, bench.forward, *options, sampler=Sampler())
    prompt = Row([3, 1, 4, 1], 0, 4, [bench.cache.scratch_block], 1)
    for rows in (bench.rows, [*bench.rows[:2], prompt]):
        logits = graphs(bench.batch(rows)).clone()
        token_ids, peaks = graphs.decode(bench.batch(rows), draws(0, 0, 0))
        assert token_ids.tolist() == logits.argmax(1).tolist() and len(set(token_ids.tolist())) > 1
        assert peaks.tolist() == logits.amax(1).float().tolist()
        assert graphs.drawn.shape == (4 * 12,) and graphs.drawn.dtype == torch.uint8
        copied_ids, copied_peaks = split_drawn(graphs.drawn.clone())
        assert torch.equal(copied_ids[:3], token_ids) and torch.equal(copied_peaks[:3], peaks)
    assert graphs.launcher.replays == [4, 4]


def test_rows_that_draw_no_token_are_greedy(model):
    """What a larger draw left behind is gone, and a call without a draw leaves nothing either."""
    bench, sampler = Bench(model, [5, 9, 2], [4], KERNELS["torch"]), Sampler()
    options = [4], 64, StrictCalls()
    graphs = GraphForward(bench.cache, bench.forward, *options, sampler=sampler)
    graphs.decode(bench.batch(), draws(0.5, 1, 2))
    assert (sampler.seeds, sampler.temperatures) == ([1, 2, 3, 0], [0.5, 1, 2, 0])
    graphs.decode(bench.batch(bench.rows[:1]), draws(1))
    assert (sampler.seeds, sampler.temperatures) == ([1, 0, 0, 0], [1, 0, 0, 0])
    graphs(bench.batch())
    assert (sampler.seeds, sampler.temperatures) == ([0] * 4, [0] * 4)


# ---- copies --------------------------------------------------------------------------------------
def test_only_a_second_write_to_the_source_waits_for_a_copy_that_is_not_done(monkeypatch):
    log, done = [], [True, False]

    class Event:
        def record(self):
            log.append("copied")

        def query(self):
            return done.pop(0)

        def synchronize(self):
            log.append("the host waits")

    cuda = SimpleNamespace(Event=Event, Stream=object, graph_pool_handle=object)
    monkeypatch.setattr(cuda_graphs, "torch", SimpleNamespace(cuda=cuda))
    target = SimpleNamespace(copy_=lambda source, non_blocking: log.append(non_blocking))
    graphs = Graphs()
    graphs.send(target, None)
    graphs.wait()  # it is done
    assert log == [True, "copied"]
    graphs.wait()
    assert log == [True, "copied", "the host waits"]


# ---- under the engine ----------------------------------------------------------------------------
def build(model, backend, recorded=True, num_blocks=128, max_num_seqs=20, budget=10_000):
    """An engine whose decode steps are recorded, or one that runs eagerly; and what it counted."""
    from block_allocator import BlockAllocator
    from engine import InferenceEngine, eager_forward
    from scheduler import Scheduler

    config = model.config
    shape = (config.n_layer, num_blocks, 4, config.n_head, config.head_dim)
    cache = KVCache(*shape, dtype=model.wte.weight.dtype)
    cache.pool.fill_(torch.nan)
    scheduler = Scheduler(BlockAllocator(num_blocks, 4), max_num_seqs, budget, 64)
    eager, calls, launcher = eager_forward(model, cache, *KERNELS[backend]), [], StrictCalls()

    def counted(batch):
        calls.append(len(batch.input_ids))
        return eager(batch)

    forward = counted
    if recorded:
        forward = GraphForward(cache, counted, recorded_sizes(max_num_seqs), 64, launcher)
        launcher.sends.clear()
    engine = InferenceEngine(forward, cache, scheduler, config.vocab_size)
    return SimpleNamespace(engine=engine, calls=calls, launcher=launcher, scheduler=scheduler)


def serve(built, wanted, arrivals=None, **params):
    """Serve (prompt, max_tokens) pairs; returns their tokens, and the logits of each token.

    After each step it is checked that a recording ran if and only if each sequence added one token.
    `arrivals` says how many requests come before a step (all before the first if it is None).
    """
    from engine import sample_next
    from sampling import SamplingParams

    engine, logits, texts, waiting = built.engine, {}, {}, list(wanted)

    def keep(sequences, rows):
        for seq, logits_row in zip(sequences, rows, strict=True):
            logits[seq.request.request_id, len(seq.token_ids)] = logits_row.clone()
        return sample_next(sequences, rows)

    while waiting or engine.has_unfinished():
        for _ in range(len(waiting) if arrivals is None else min(arrivals, len(waiting))):
            prompt, max_tokens = waiting.pop(0)
            given = SamplingParams(**({"temperature": 0, "max_tokens": max_tokens} | params))
            engine.add_request(prompt, given, strategy=keep)
        num_replays = len(built.launcher.replays)
        step = engine.step()
        built.scheduler.check_integrity()
        counts = [num_new_tokens for _, _, num_new_tokens in step.plan.scheduled]
        if isinstance(engine.forward, GraphForward):
            is_decode = set(counts) == {1} and len(step.plan.sampled) == len(counts)
            fits = min((s for s in engine.forward.sizes if s >= len(counts)), default=None)
            assert built.launcher.replays[num_replays:] == ([fits] if is_decode else [])
        for output in step.finished:
            texts[output.request_id] = output.outputs[0].token_ids
    assert built.scheduler.allocator.num_free == built.scheduler.allocator.num_blocks
    assert len(built.launcher.sends) == len(built.launcher.replays)
    return texts, logits


def some_requests(count, seed=0, shortest=1, longest=9):
    """(prompt, max_tokens) pairs: short and long ones, so that they end at different times."""
    numbers = random.Random(seed)
    lengths = [(numbers.randint(shortest, longest), numbers.randint(2, 9)) for _ in range(count)]
    return [([numbers.randrange(97) for _ in range(length)], most) for length, most in lengths]


def assert_same(got, want):
    """Equal tokens, and logits as near as another shape of the batch allows in float64."""
    (texts, logits), (want_texts, want_logits) = got, want
    assert texts == want_texts and logits.keys() == want_logits.keys()
    errors = [
        (logits[key] - row).abs().max().nan_to_num(torch.inf) for key, row in want_logits.items()
    ]
    assert max(errors) < 1e-9
    written = [token_id for text in texts.values() for token_id in text]
    assert len(set(written)) > min(4, len(written) // 3)


@EACH_BACKEND
@pytest.mark.parametrize("count", [1, 3, 16, 20, 23])
def test_tokens_and_logits_are_the_eager_engines_around_every_size(model, backend, count):
    """23 requests, 20 may run: three wait. Texts end at different times, so the batch shrinks."""
    requests = some_requests(count, seed=count, shortest=2)
    built = build(model, backend)
    assert_same(serve(built, requests), serve(build(model, backend, recorded=False), requests))
    size = next(size for size in recorded_sizes(20) if size >= min(count, 20))
    assert size in built.launcher.replays
    # The first step has all prompts and is eager; with 23 later ones are too.
    num_eager = len(built.calls) - len(built.launcher.replays)
    assert num_eager == 1 if count <= 20 else 1 < num_eager <= 4


@EACH_BACKEND
def test_a_batch_grows_and_shrinks_through_all_sizes(model, backend):
    """A request of one token comes in every step, and stays for 22 steps: nothing runs eagerly."""
    requests = [([number], 22) for number in range(20)]
    built = build(model, backend)
    got = serve(built, requests, arrivals=1)
    assert_same(got, serve(build(model, backend, recorded=False), requests, arrivals=1))
    growing = [2, 2, 4, 4, 8, 8, 8, 8, *[16] * 8, *[20] * 4]
    assert built.launcher.replays == [*growing, 20, 20, *growing[-2::-1]]
    assert len(built.calls) == len(built.launcher.replays)


# Requests, how the engines are built, and how requests come.
TRAFFIC = {
    "requests join and leave in every step": (
        {"count": 30, "seed": 1},
        {"max_num_seqs": 6},
        {"arrivals": 1},
    ),
    "a budget of 1": ({"count": 9, "seed": 3, "longest": 20}, {"budget": 1}, {}),
    "a budget of 3": ({"count": 9, "seed": 3, "longest": 20}, {"budget": 3}, {}),
    "a pool that runs dry": ({"count": 12, "seed": 5}, {"num_blocks": 12}, {}),
    "seeds": ({"count": 5, "seed": 7}, {}, {"temperature": 1.0, "seed": 3, "top_p": 0.95}),
}


@EACH_BACKEND
@pytest.mark.parametrize("requests, options, params", TRAFFIC.values(), ids=TRAFFIC)
def test_traffic_writes_the_same_over_one_pool(model, backend, requests, options, params):
    """Steps with a prompt, or a piece of one, are eager, the others are replayed."""
    requests = some_requests(**requests)
    built = build(model, backend, **options)
    got = serve(built, requests, **params)
    eager = build(model, backend, recorded=False, **(options | {"num_blocks": 128}))
    assert_same(got, serve(eager, requests, **params))
    num_replays = len(built.launcher.replays)
    assert 2 < num_replays < len(built.calls)
    assert (built.scheduler.num_preemptions > 0) == ("num_blocks" in options)
    if options.get("budget") == 1:  # only a prompt's own tokens but the last are no decode
        prompts = sum(len(prompt) - 1 for prompt, _ in requests)
        assert len(built.calls) - num_replays == prompts


# ---- in the house --------------------------------------------------------------------------------
def test_on_a_cpu_an_llm_records_nothing_whatever_is_said(model):
    from llm import LLM

    for said in (True, False):
        llm = LLM(model, num_blocks=16, block_size=4, cuda_graphs=said)
        assert not isinstance(llm.engine.forward, GraphForward)
        assert llm.config.cuda_graphs is said


def test_steps_are_recorded_on_a_gpu_through_tritons_kernels():
    from kernels.backends import can_record

    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert can_record("triton", gpu)
    assert not can_record("triton", cpu) and not can_record("torch", gpu)
    assert not can_record("numba", cpu)


@pytest.fixture
def recording_llm(monkeypatch):
    """LLM as on a GPU: it records its steps."""
    import llm as llm_module

    monkeypatch.setattr(llm_module, "can_record", lambda backend, device: True)
    return llm_module


def test_an_llm_that_records_writes_the_same_texts(recording_llm, model):
    prompts = [prompt for prompt, _ in some_requests(7, seed=9)]
    params = recording_llm.SamplingParams(temperature=0, max_tokens=8)
    texts = []
    for said in (True, False):
        options = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 5, "max_seq_len": 40}
        llm = recording_llm.LLM(model, cuda_graphs=said, **options)
        assert isinstance(llm.engine.forward, GraphForward) is said
        texts.append([o.outputs[0].token_ids for o in llm.generate(prompts, params)])
        if said:
            assert llm.engine.forward.sizes == [2, 4, 5]
            assert llm.engine.forward.max_seq_len == 40
            assert llm.engine.forward.steps[5].batch.block_tables.shape == (5, 10)
    assert texts[0] == texts[1] and len({token for text in texts[0] for token in text}) > 4


def test_a_pool_is_measured_while_a_rehearsal_holds_its_memory(recording_llm, monkeypatch, model):
    """And the rehearsal is gone before the pool is made."""
    happened, rehearsals, launchers = [], [], []
    choose, make = recording_llm.choose_num_blocks, recording_llm.KVCache

    def rehearse_and_tell(cache, *args):
        assert cache.pool.shape[1] == 2 and not happened  # one block, and scratch
        held = rehearse(cache, *args)
        rehearsals.append(weakref.ref(held[0]))
        launchers.append(held[0].launcher)
        happened.append("rehearsed")
        return held

    def choose_and_tell(*args, **kwargs):
        assert rehearsals[0]() is not None, "its memory would be counted as free"
        happened.append("measured")
        return choose(*args, **kwargs)

    def make_and_tell(*args, **kwargs):
        if happened:
            assert rehearsals[0]() is None, (
                "the pool would not find the memory that it was promised"
            )
            happened.append("made")
        return make(*args, **kwargs)

    monkeypatch.setattr("speedups.cuda_graphs.rehearse", rehearse_and_tell)
    monkeypatch.setattr(recording_llm, "choose_num_blocks", choose_and_tell)
    monkeypatch.setattr(recording_llm, "KVCache", make_and_tell)
    llm = recording_llm.LLM(model, block_size=4, max_num_seqs=3)
    assert happened == ["rehearsed", "measured", "made"]
    assert launchers == [llm.engine.forward.launcher]  # one stream and one pool of graphs


@pytest.mark.slow
def test_the_flag_reaches_the_engine(monkeypatch, capsys):
    import generate

    made, make = [], generate.LLM
    monkeypatch.setattr(generate, "LLM", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    for flags, want in (([], True), (["--no-cuda-graphs"], False), (["--cuda-graphs"], True)):
        assert generate.parse_args(["x", *flags]).cuda_graphs is want
        generate.main(["The wolf", "--max-tokens", "1", "--num-blocks", "8", *flags])
        assert made[-1].config.cuda_graphs is want


# ---- only a GPU can say --------------------------------------------------------------------------
GPT2 = {"vocab_size": 1000, "max_seq_len": 1024, "n_layer": 2, "n_head": 12, "n_embd": 768}
LENGTHS = [1, 15, 16, 17, 200, 255, 256, 257, 700, 1000, 3, 40, 90, 512, 31, 64, 500]
ON_GPU = (torch.bfloat16, torch.float16, torch.float32)


def gpu_bench(lengths, sizes, dtype=torch.bfloat16):
    model = GPT(GPTConfig(**GPT2)).init_weights(std=0.2).to(dtype).to(DEVICE)
    kernels = (paged_attention_triton, write_kv_triton)
    options = {"block_size": 16, "max_seq_len": 1024, "launcher": Graphs()}
    return Bench(model.requires_grad_(False).eval(), lengths, sizes, kernels, **options)


@needs_gpu
@pytest.mark.parametrize("dtype", ON_GPU, ids=str)
@pytest.mark.parametrize("num_seqs, size", [(1, 1), (1, 2), (3, 4), (8, 8), (9, 16), (17, 32)])
def test_a_replay_gives_the_bits_of_the_eager_step_of_the_same_size(num_seqs, size, dtype):
    bench = gpu_bench(LENGTHS[:num_seqs], [size], dtype)
    assert bench.graphs.recorded_size(bench.batch()) == size
    got = bench.graphs(bench.batch()).clone()
    with torch.inference_mode():
        want = bench.forward(bench.padded_by_hand(size))
    assert torch.equal(got, want[:num_seqs]) and got.isfinite().all()
    assert len(got.unique(dim=0)) == num_seqs


@pytest.mark.alone
@needs_gpu
def test_ten_thousand_replays_give_the_same_bits_and_take_no_memory():
    bench = gpu_bench(LENGTHS[:9], [1, 8, 16])
    batch = bench.batch()
    first = bench.graphs(batch).clone()
    same = torch.ones((), dtype=torch.bool, device=DEVICE)
    pool = bench.bits()

    def compare(times):
        for _ in range(times):
            same.logical_and_((bench.graphs(batch) == first).all())
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    assert compare(10) == compare(10_000)
    assert same.item() and torch.equal(bench.bits(), pool)


@needs_gpu
def test_replays_of_all_sizes_in_turn_do_not_disturb_each_other():
    """They share memory: what one left there must not be read by the next."""
    bench = gpu_bench(LENGTHS, [1, 2, 4, 8, 16, 17])
    batches = {n: bench.batch(bench.rows[:n]) for n in range(1, 18)}
    alone, places = {}, {}
    for num_seqs, batch in batches.items():
        logits = bench.graphs(batch)
        alone[num_seqs] = logits.clone()
        places[bench.graphs.recorded_size(batch)] = logits.data_ptr()
    numbers = random.Random(0)
    for _ in range(300):
        num_seqs = numbers.randint(1, 17)
        batch = batches[num_seqs]
        got = bench.graphs(batch)
        assert torch.equal(got, alone[num_seqs])
        assert got.data_ptr() == places[bench.graphs.recorded_size(batch)]


@pytest.mark.alone
@needs_gpu
def test_a_decode_step_is_one_copy_one_launch_and_no_synchronisation():
    from torch.profiler import ProfilerActivity, profile

    bench = gpu_bench(LENGTHS[:9], [16])
    batch = bench.batch()
    for _ in range(3):
        bench.graphs(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            bench.graphs(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    names = Counter(event.name for event in profiler.events())
    assert sum(n for name, n in names.items() if "HtoD" in name) == 1, names
    assert sum(n for name, n in names.items() if name == "cudaGraphLaunch") == 1, names
    assert sum(n for name, n in names.items() if name.startswith("cudaLaunchKernel")) == 0, names


@pytest.mark.alone
@needs_gpu
def test_a_launcher_records_again_when_its_graphs_are_gone():
    launcher, x = Graphs(), torch.zeros(4, device=DEVICE)
    for _ in range(3):
        assert launcher.record(lambda: x + 1)().tolist() == [1, 1, 1, 1]
        gc.collect()


@needs_gpu
def test_a_rehearsal_holds_what_recording_takes():
    model = GPT(GPTConfig(**GPT2)).init_weights(std=0.2).bfloat16().to(DEVICE)
    model.requires_grad_(False).eval()
    cache = KVCache(2, 1, 16, 12, 64, torch.bfloat16, DEVICE)
    forward = plain_forward(model, cache, paged_attention_triton, write_kv_triton)

    def free_bytes():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    GraphForward(cache, forward, [256], 1024)  # kernels are loaded, workspaces taken
    before, launcher = free_bytes(), Graphs()
    held = rehearse(cache, forward, recorded_sizes(256), 1024, launcher)
    promised = before - free_bytes()
    del held
    graphs = GraphForward(cache, forward, recorded_sizes(256), 1024, launcher)
    taken = before - free_bytes()
    assert len(graphs.steps) == 13 and 0 < promised
    assert isinstance(graphs.launcher, Graphs)
    assert taken <= promised + 2**26  # the graphs' own lists of kernels, 14 instead of one
