"""Traffic for tests that disturb an engine: requests of every kind, and what must be true after.

The model is a stand-in whose logits are a pure function of a sequence's tokens. It keeps the token
ids themselves in the K cache, and reads a sequence's tokens back through its block table. So a
wrong slot, table entry or copy changes the next token, and a slot that was never written is found.
"""

import functools
import random
from types import SimpleNamespace

import numpy as np
import torch

from beam_search import BeamScheduler, BeamSearch, BeamSearchParams
from block_allocator import BlockAllocator
from engine import InferenceEngine, sample_next
from kv_cache import KVCache
from prefix_cache import PrefixCache
from sampling import SamplingParams
from sequence import FINISHED, Continuation
from speedups.plan_ahead import AheadEngine

ENGINES = [InferenceEngine, AheadEngine]
PIECES = [b"a", b"b", b"ab", b"c", b" ", b"\xc3", b"\xa9", b"ca", b"\xe7\x8c", b"\xab", b"d", b""]
VOCAB_SIZE = len(PIECES)
EOS = VOCAB_SIZE - 1
MAX_SEQ_LEN = 48

_numbers = np.random.default_rng(7)
TABLE = torch.from_numpy(2 * _numbers.standard_normal((997, VOCAB_SIZE)))  # float64
TABLE[:, EOS] -= 2  # a text has a chance to end, and not at once
POWERS = _numbers.integers(1, 2**40, MAX_SEQ_LEN)


class Pieces:
    """A tokenizer of twelve pieces, some of which are parts of a character."""

    def encode(self, text):
        return [PIECES.index(letter.encode()) for letter in text]

    def token_bytes(self, token_id):
        return PIECES[token_id]

    def token_text(self, token_id):
        return PIECES[token_id].decode(errors="replace")


def next_row(token_ids):
    """Which row of TABLE follows these tokens: any change of one of them changes it."""
    ids = np.asarray(token_ids, dtype=np.int64) + 1
    return int(ids @ POWERS[: len(ids)] % len(TABLE))


def stand_in(cache, poison=None):
    """A forward that remembers tokens in the cache. `poison` {first token: logit} spoils rows."""
    memory = cache.pool.numpy()[0, :, 0, 0, :, 0]  # (num_blocks + 1, block_size), a view

    def forward(batch):
        slots, tables = batch.slot_mapping.numpy(), batch.block_tables.numpy()
        memory[slots // cache.block_size, slots % cache.block_size] = batch.input_ids.numpy()
        starts = batch.query_start_locs.numpy()
        rows, spoiled = [], []
        for row in batch.sample_rows.tolist():
            sequence = np.searchsorted(starts, row, side="right") - 1
            length = batch.positions[row].item() + 1
            context = memory[tables[sequence]].reshape(-1)[:length]
            assert not np.isnan(context).any(), "a slot is read that was never written"
            if poison and int(context[0]) in poison:
                spoiled.append((len(rows), poison[int(context[0])]))
            rows.append(next_row(context))
        logits = TABLE[rows]
        for row, value in spoiled:
            logits[row, 3] = value
        return logits

    return forward


def build(
    kind=InferenceEngine,
    num_blocks=40,
    block_size=3,
    max_num_seqs=6,
    budget=20,
    poison=None,
    scheduling=None,  # policy=, reserve=
    allocator=BlockAllocator,
    **kwargs,
):
    """An engine around the stand-in."""
    cache = KVCache(1, num_blocks, block_size, 1, 1, dtype=torch.float64)
    cache.pool.fill_(float("nan"))
    limits = max_num_seqs, budget, MAX_SEQ_LEN
    blocks = allocator(num_blocks, block_size)
    scheduler = BeamScheduler(blocks, *limits, **(scheduling or {}))
    forward = stand_in(cache, poison)
    options = {"tokenizer": Pieces(), "eos_token_ids": [EOS]} | kwargs
    return kind(forward, cache, scheduler, VOCAB_SIZE, **options)


# ---- strategies ----------------------------------------------------------------------------------
def fork_once(sequences, logits):
    """Greedy; a first sequence forks after two tokens, and its child takes the second best."""
    continuations = []
    for seq, (best, second) in zip(sequences, logits.topk(2).indices.tolist(), strict=True):
        continuations.append(Continuation(seq, [best]))
        if seq.num_generated == 2 and seq.index == 0:
            continuations.append(Continuation(seq, [second]))
    return continuations


def fork_and_drop(sequences, logits):
    """As above; after five tokens the first sequence is dropped."""
    return [c for c in fork_once(sequences, logits) if c.parent.index or c.parent.num_generated < 5]


def two_at_once(sequences, logits):
    """Two tokens a step, the second of them a function of the first."""
    best = logits.argmax(-1).tolist()
    pairs = zip(sequences, best, strict=True)
    return [Continuation(seq, [i, (3 * i + 1) % (VOCAB_SIZE - 1)]) for seq, i in pairs]


class TwoBeams:
    """Of all children of a request's two beams the two with the largest logits go on."""

    max_num_sequences, runs_together = 2, True

    def __call__(self, sequences, logits):
        continuations = []
        for request in dict.fromkeys(seq.request for seq in sequences):
            rows = [row for row, seq in enumerate(sequences) if seq.request is request]
            beams = [seq for seq in request.sequences if seq.status != FINISHED]
            assert len(beams) == len(rows) <= 2, "it is asked about all beams at once"
            for child in logits[rows].flatten().topk(2).indices.tolist():
                beam, token_id = divmod(child, VOCAB_SIZE)
                continuations.append(Continuation(sequences[rows[beam]], [token_id]))
        return continuations


def sampling_of_its_own(sequences, logits):
    return sample_next(sequences, logits)


# ---- requests ------------------------------------------------------------------------------------
def spec(prompt, strategy=None, **params):
    return SimpleNamespace(prompt=prompt, params=SamplingParams(**params), strategy=strategy)


AHEAD = [  # these let the overlapping engine plan ahead
    spec([0, 3, 4], temperature=0, max_tokens=9),
    spec([1, 3], seed=1, top_k=4, max_tokens=12, ignore_eos=True),
    spec([1, 3, 5, 6], seed=2, n=2, max_tokens=7),
    spec([10, 0], seed=3, stop=["ab", "é"], max_tokens=14),
    spec([4], seed=4, stop_token_ids=[1, 2], max_tokens=10),
    spec([i % 11 for i in range(17)], seed=5, max_tokens=4),
    spec([7, 7], seed=6, max_tokens=1),
    spec([3] * 11, seed=7, top_p=0.8, max_tokens=13, ignore_eos=True),
    spec("cab", seed=8, stop="猫", max_tokens=16, ignore_eos=True),
    spec([6, 5], seed=9, min_p=0.1, n=3, max_tokens=6, ignore_eos=True),
]
OTHERS = [  # and these do not
    spec([2, 4], seed=10, logprobs=2, max_tokens=8),
    spec([5] * 9, seed=11, prompt_logprobs=1, max_tokens=5),
    spec([8, 1], seed=12, n=2, frequency_penalty=1.0, repetition_penalty=1.5, max_tokens=9),
    spec([9], seed=13, min_tokens=6, logit_bias={EOS: 9.0}, max_tokens=9),
    spec([2, 8], fork_once, max_tokens=8),
    spec([4, 4, 4, 4], fork_and_drop, max_tokens=9, ignore_eos=True),
    spec([3, 9, 10], two_at_once, max_tokens=9, ignore_eos=True),
    spec([0, 10], fork_once, stop=["c"], max_tokens=12),
    spec([1, 10], sampling_of_its_own, seed=14, logprobs=0, max_tokens=6),
    spec([5, 1], seed=15, n=2, best_of=3, max_tokens=6),
    spec([7, 2, 2], TwoBeams(), max_tokens=8),
    spec([6, 1], sampling_of_its_own, seed=16, n=2, max_tokens=5),
    spec([9, 2], BeamSearch(BeamSearchParams(2)), temperature=0, logprobs=0, max_tokens=6),
]
SPECS = AHEAD + OTHERS


def add(engine, request):
    # Without `**`: Python looks for signals after such a call, and Ctrl-C there would lose the id.
    return engine.add_request(request.prompt, request.params, strategy=request.strategy)


def content(output):
    """What a client may compare: everything but ids and times."""
    texts = [vars(completion) for completion in output.outputs]
    return output.prompt_token_ids, output.prompt_logprobs, texts


@functools.cache
def alone(index):
    """What request SPECS[index] gets from an engine that serves nothing else."""
    engine = build()
    add(engine, SPECS[index])
    finished = []
    while engine.has_unfinished():
        finished += engine.step().finished
    (output,) = finished
    return content(output)


class Ledger:
    """What a client did and got; `check` compares it with what it must have got.

    `call(function)` makes each call of the engine: one that interrupts it makes it again.
    """

    def __init__(self, engine, call=lambda function: function()):
        self.engine = engine
        self.call = call
        self.index = {}  # of each added request, in SPECS, by its id
        self.aborted = set()  # ids whose abort returned True
        self.outputs = []  # in the order in which `step` returned them
        self.seen = []  # outputs that the watcher got
        self.streams = {}  # (request id, sequence): the tokens and the text of all deltas
        engine.watchers.append(self.seen.append)

    def add(self, index):
        request_id = self.call(lambda: add(self.engine, SPECS[index]))
        self.index[request_id] = index

    def abort(self, request_id):
        if self.call(lambda: self.engine.abort(request_id)):
            self.aborted.add(request_id)

    def step(self):
        """One step; its deltas are read as a server reads them."""
        output = self.call(self.engine.step)
        self.outputs.append(output)
        for delta in self.call(lambda: output.deltas):
            key = delta.request_id, delta.index
            token_ids, text = self.streams.get(key, ([], ""))
            new_text = self.call(lambda: delta.text)
            self.streams[key] = (token_ids + delta.token_ids, text + new_text)

    def play(self, traffic):
        """Run traffic to its end."""
        acts = sorted(traffic, reverse=True)  # pop() takes the first
        for number in range(3000):
            while acts and acts[-1][0] <= number:
                _, name, value = acts.pop()
                if name == "add":
                    self.add(value)
                elif value < len(self.index):
                    self.abort(list(self.index)[value])
            if not acts and not self.engine.has_unfinished():
                return
            self.step()
        raise AssertionError("3,000 steps, and no end: a livelock")

    # ---- what must be true ----
    def finished(self):
        """Each request's output, by its id. A request has one at most."""
        outputs = [finished for output in self.outputs for finished in output.finished]
        by_id = {output.request_id: output for output in outputs}
        assert len(by_id) == len(outputs), "a request was handed over twice"
        return by_id

    def check(self, guilty=(), watchers=True):
        """Every request ended as it must, and nothing is left. `guilty` ones may have an error."""
        finished = self.finished()
        assert finished.keys() | self.aborted == self.index.keys(), "a request was lost"
        assert not finished.keys() & self.aborted, "an aborted request was handed over"
        for request_id, output in finished.items():
            if request_id not in guilty:
                assert content(output) == alone(self.index[request_id])
                for completion in output.outputs:
                    streamed = self.streams[request_id, completion.index]
                    assert streamed == (completion.token_ids, completion.text)
        if watchers:
            assert len(self.seen) == len(self.outputs), "an output was missed, or seen twice"
            assert all(a is b for a, b in zip(self.seen, self.outputs))
        self.check_reports()
        check_nothing_is_left(self.engine)

    def check_reports(self):
        """What the outputs say of arrivals, aborts and blocks, each counted once."""
        added = [request.request_id for output in self.outputs for request in output.added]
        aborted = [request.request_id for output in self.outputs for request in output.aborted]
        assert len(set(added)) == len(added) and len(set(aborted)) == len(aborted)
        assert self.index.keys() - set(added) <= self.aborted  # aborted before the first step
        assert set(aborted) == self.aborted & set(added)
        blocks = [output.blocks for output in self.outputs]
        assert sum(b.taken for b in blocks) == sum(b.freed for b in blocks)


def check_nothing_is_left(engine):
    scheduler = engine.scheduler
    scheduler.check_integrity()
    assert not engine.has_unfinished() and not engine.requests
    assert not scheduler.has_unfinished() and not scheduler.running
    assert scheduler.allocator.num_free == scheduler.allocator.num_blocks
    assert not torch.is_inference_mode_enabled()


# ---- random runs ---------------------------------------------------------------------------------
def draw_traffic(seed):
    """Requests and aborts: (before which step, "add", index) or (.., "abort", which of the added).

    Half of the runs hold only requests that let the overlapping engine plan ahead.
    """
    numbers = random.Random(seed)
    indices = range(len(AHEAD) if numbers.random() < 0.5 else len(SPECS))
    added = numbers.choices(indices, k=numbers.randint(3, 8))
    traffic = [(numbers.choice([0, 0, 0, 1, 2, 5, 9]), "add", index) for index in added]
    for _ in range(numbers.choice([0, 0, 1, 2])):
        traffic.append((numbers.randint(0, 12), "abort", numbers.randrange(9)))
    return traffic


def draw_engine(kind, seed):
    """An engine with a pool and limits drawn from a seed; often the pool is small.

    With an even seed it has a prefix cache. It then often finds blocks: of a request that came
    before, of a sequence of the same request, and of itself before a preemption.
    """
    numbers = random.Random(seed)
    return build(
        kind,
        num_blocks=numbers.choice([9, 12, 16, 40]),
        max_num_seqs=numbers.choice([2, 4, 6]),
        budget=numbers.choice([4, 8, 20]),
        allocator=BlockAllocator if seed % 2 else PrefixCache,
    )
