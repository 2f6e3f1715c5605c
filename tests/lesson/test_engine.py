"""The engine against one-at-a-time generation without a cache, and against transformers' GPT-2.

Batching, chunks, blocks, preemption, forks and interruptions must not change a token. All
equalities are in float64, where they are exact up to 1e-9: in float32 the shape of a batch changes
the last bits. The models have weights of std 0.2, and their texts are asserted to hold several
distinct tokens: a model that repeats one token would pass every test.
"""

import math
import random
import threading
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2LMHeadModel

from baselines import generate_no_cache
from block_allocator import BlockAllocator
from checkpoints.load import load_model, save_model
from checkpoints.tokenizer import load_tokenizer
from engine import InferenceEngine, eager_forward, sample_next
from kernels.backends import BACKENDS, resolve_backend
from kv_cache import KVCache
from model import attend_one_sequence
from outputs import ByteTokenizer
from sampling import SamplingParams
from scheduler import Scheduler
from sequence import WAITING, Continuation

GREEDY = {"temperature": 0}
UNLIMITED = 10_000  # tokens in a step: more than any test has

# The tests run through the backend that a user gets on a CPU; the central equalities run through
# each CPU backend. Triton's kernels are interpreted on a CPU, which is slow: they get a test of
# their own here, and on a GPU their own files.
DEFAULT_BACKEND = resolve_backend("auto", torch.device("cpu"), torch.float64)
CPU_BACKENDS = [
    name
    for name, backend in BACKENDS.items()
    if "triton" not in name and backend.missing is None and backend.device in (None, "cpu")
]


def random_prompts(lengths, vocab_size=97, seed=1):
    """One prompt of each length."""
    numbers = random.Random(seed)
    return [[numbers.randrange(vocab_size) for _ in range(length)] for length in lengths]


def build(
    model,
    num_blocks=64,
    block_size=4,
    max_num_seqs=16,
    max_num_batched_tokens=UNLIMITED,
    kernels=BACKENDS[DEFAULT_BACKEND],
    **kwargs,
):
    """An engine made by hand from its parts, in the model's dtype."""
    config = model.config
    shape = (config.n_layer, num_blocks, block_size, config.n_head, config.head_dim)
    cache = KVCache(*shape, dtype=model.wte.weight.dtype)
    cache.pool.fill_(math.nan)  # zeros would hide a read of what was never written
    allocator = BlockAllocator(num_blocks, block_size)
    scheduler = Scheduler(allocator, max_num_seqs, max_num_batched_tokens, config.max_seq_len)
    forward = eager_forward(model, cache, kernels.paged_attention, kernels.write_kv)
    return InferenceEngine(forward, cache, scheduler, config.vocab_size, **kwargs)


def build_stub(forward, vocab_size, num_blocks=32, block_size=4, max_num_seqs=16, **kwargs):
    """An engine around a stand-in for the model, which needs no K and V."""
    cache = KVCache(1, num_blocks, block_size, 1, 1)
    scheduler = Scheduler(BlockAllocator(num_blocks, block_size), max_num_seqs, UNLIMITED, 64)
    return InferenceEngine(forward, cache, scheduler, vocab_size, **kwargs)


def run(engine, between_steps=lambda step: None):
    """Step until all is done; the books are checked after every step. request_id -> its output."""
    finished = {}
    for _ in range(20_000):
        if not engine.has_unfinished():
            assert engine.scheduler.allocator.num_free == engine.scheduler.allocator.num_blocks
            return finished
        step = engine.step()
        engine.scheduler.check_integrity()
        finished |= {output.request_id: output for output in step.outputs if output.finished}
        between_steps(step)
    pytest.fail("20,000 steps, and no end: a livelock")


def generate(engine, prompts, between_steps=lambda step: None, **params):
    """The token ids of each prompt's first text, greedily if nothing else is asked for."""
    params = SamplingParams(**(GREEDY | params))
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    finished = run(engine, between_steps)
    return [finished[request_id].outputs[0].token_ids for request_id in ids]


@torch.inference_mode()
def dense_logits(model, ids):
    """All logits (T, V) of one sequence, by the dense attention that keeps nothing."""
    return model.logits(model(torch.tensor(ids), torch.arange(len(ids)), attend_one_sequence))


class CountingKernels:
    """A backend's kernels that count their calls: one that never ran would pass every test."""

    def __init__(self, backend):
        self.kernels, self.calls, self.writes = BACKENDS[backend], 0, 0

    def paged_attention(self, *args, **kwargs):
        self.calls += 1
        return self.kernels.paged_attention(*args, **kwargs)

    def write_kv(self, *args):
        self.writes += 1
        return self.kernels.write_kv(*args)


class Recorder:
    """A strategy that samples as usual and keeps each row of the logits."""

    def __init__(self):
        self.rows = {}  # (request_id, position of the token that they led to): (V,)

    def __call__(self, sequences, logits):
        for seq, row in zip(sequences, logits, strict=True):
            self.rows[seq.request.request_id, len(seq.token_ids)] = row.clone()
        return sample_next(sequences, logits)

    def of_request(self, request_id, num_prompt_tokens, num_tokens):
        """The rows of its generated tokens, (num_tokens, V)."""
        positions = range(num_prompt_tokens, num_prompt_tokens + num_tokens)
        return torch.stack([self.rows[request_id, position] for position in positions])


# ---- the same tokens, however they are computed --------------------------------------------------
LENGTHS = [1, 2, 7, 15, 16, 33]
NUM_TOKENS = 12
PROMPTS = random_prompts(LENGTHS)


@pytest.fixture(scope="module")
def model(tiny_gpt):
    return tiny_gpt(seed=5, dtype=torch.float64, max_seq_len=256)


@pytest.fixture(scope="module")
def expected(model):
    """What each prompt's text is, and the logits that led to it: one at a time, without a cache."""
    tokens = [generate_no_cache(model, [prompt], NUM_TOKENS)[0] for prompt in PROMPTS]
    whole = zip(PROMPTS, tokens, strict=True)
    logits = [dense_logits(model, [*p, *t])[len(p) - 1 : -1] for p, t in whole]
    return SimpleNamespace(tokens=tokens, logits=logits)


def compare(engine, expected, between_steps=lambda step: None):
    """Serve the prompts: do the tokens equal the expected ones, and how far off are the logits?"""
    recorder = Recorder()
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    ids = [engine.add_request(p, params, strategy=recorder) for p in PROMPTS]
    finished = run(engine, between_steps)
    tokens = [finished[request_id].outputs[0].token_ids for request_id in ids]
    errors = [0.0]
    for request_id, length, want in zip(ids, LENGTHS, expected.logits, strict=True):
        got = recorder.of_request(request_id, length, NUM_TOKENS)
        errors.append((got - want).abs().nan_to_num(math.inf).max().item())
    return tokens == expected.tokens, max(errors)


def test_the_model_of_these_tests_writes_several_distinct_tokens(expected):
    assert [len(tokens) for tokens in expected.tokens] == [NUM_TOKENS] * 6
    assert all(len(set(tokens)) >= 4 for tokens in expected.tokens), expected.tokens
    assert len({tuple(tokens) for tokens in expected.tokens}) == 6  # and no two texts are the same


@pytest.mark.parametrize(
    "block_size, budget", [(1, 64), (2, 5), (7, 1), (16, UNLIMITED), (64, 5), (256, UNLIMITED)]
)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_paged_tokens_and_logits_are_those_without_a_cache(
    model, expected, backend, block_size, budget
):
    kernels = CountingKernels(backend)
    num_blocks = 6 * -(-(max(LENGTHS) + NUM_TOKENS) // block_size)
    engine = build(model, num_blocks, block_size, 6, budget, kernels)
    same, error = compare(engine, expected)
    assert same and error < 1e-9
    assert engine.scheduler.num_preemptions == 0
    # One call for each layer and step, and with a budget of 1 a step for each token but the last.
    assert kernels.writes == kernels.calls >= model.config.n_layer * NUM_TOKENS
    if budget == 1:
        tokens = sum(LENGTHS) + 6 * (NUM_TOKENS - 1)
        assert kernels.calls == model.config.n_layer * tokens


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_tokens_are_the_same_through_interpreted_triton_kernels(tiny_gpt, dtype):
    """Prefill, chunks of a prompt, decoding and both in one step: few tokens, for it is slow."""
    if BACKENDS["triton"].missing:
        pytest.skip("triton is not installed")
    if BACKENDS["triton"].device == "cuda":
        pytest.skip("triton compiles for a GPU here: the tests of its kernels run there")
    model = tiny_gpt(seed=5, dtype=dtype, n_layer=1, n_head=2, n_embd=32)
    prompts = random_prompts([3, 14, 1])
    texts = []
    for backend in ("torch", "triton"):
        kernels = CountingKernels(backend)
        engine = build(model, max_num_batched_tokens=8, kernels=kernels)
        texts.append(generate(engine, prompts, max_tokens=6))
        assert kernels.calls == kernels.writes >= 6
    assert texts[0] == texts[1] and len({token for text in texts[0] for token in text}) > 4


@pytest.mark.parametrize("max_num_seqs", [1, 2])
def test_a_sequence_writes_the_same_alone_and_in_any_batch(model, expected, max_num_seqs):
    same, error = compare(build(model, max_num_seqs=max_num_seqs), expected)
    assert same and error < 1e-9


def test_a_request_that_joins_in_the_middle_of_others_writes_the_same(model, expected):
    engine = build(model)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    to_come = list(PROMPTS)

    def one_more(step):
        if to_come:
            engine.add_request(to_come.pop(0), params)

    one_more(None)
    finished = run(engine, one_more)
    assert [finished[str(i)].outputs[0].token_ids for i in range(6)] == expected.tokens


@pytest.mark.parametrize("budget", [5, UNLIMITED])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_preemption_injected_at_every_step_changes_no_token(model, expected, backend, budget):
    """One sequence loses all blocks between any two steps.

    Under a small budget a long prompt would never end if it could be the victim every time. There
    the first in line is spared, as the scheduler spares it.
    """
    numbers = random.Random(2)
    kernels = CountingKernels(backend)
    engine = build(model, max_num_batched_tokens=budget, kernels=kernels)
    steps = []

    def preempt_one(step):
        running = engine.scheduler.running
        if len(running) > 1 or (running and budget == UNLIMITED):
            victims = running[1:] if budget == 5 else running
            engine.scheduler.preempt(numbers.choice(victims))
            engine.scheduler.check_integrity()
        steps.append(step)

    same, error = compare(engine, expected, preempt_one)
    assert same and error < 1e-9
    assert len(steps) >= NUM_TOKENS and engine.scheduler.num_preemptions > len(steps) // 2
    assert engine.scheduler.num_recomputed_tokens > 100
    assert kernels.calls == kernels.writes == model.config.n_layer * len(steps)


@pytest.mark.parametrize("index", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_preemption_in_any_one_step_changes_no_token(model, expected, index):
    """One sequence, preempted once: after its 1st step, or its 2nd, and so on to its last but one.

    A chunk of 5 tokens of the prompts of up to 33: some preemptions fall into the prompt.
    """
    prompt, want = PROMPTS[index], expected.tokens[index]
    num_steps = -(-len(prompt) // 5) + NUM_TOKENS - 1
    for preempted_after in range(1, num_steps):
        engine = build(model, max_num_batched_tokens=5)
        numbers = iter(range(1, 10_000))

        def preempt_once(step):
            if next(numbers) == preempted_after:
                engine.scheduler.preempt(engine.scheduler.running[0])

        assert generate(engine, [prompt], preempt_once, max_tokens=NUM_TOKENS) == [want]
        assert engine.scheduler.num_preemptions == 1
        assert engine.scheduler.num_recomputed_tokens >= 1


@pytest.mark.parametrize("num_blocks, budget", [(12, 8), (13, 64), (16, UNLIMITED)])
def test_a_pool_too_small_for_all_preempts_and_changes_no_token(
    model, expected, num_blocks, budget
):
    """The longest needs 45 tokens, 12 blocks of 4: in a pool of 12 it runs alone at its end."""
    engine = build(model, num_blocks, max_num_batched_tokens=budget)
    same, error = compare(engine, expected)
    assert same and error < 1e-9
    assert engine.scheduler.num_preemptions > 0 and engine.scheduler.num_recomputed_tokens > 0


# ---- lengths -------------------------------------------------------------------------------------
@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_every_prompt_length_up_to_three_blocks_and_one_token(model, block_size):
    """Off-by-ones live where a prompt ends with its block, and where the next token begins one."""
    prompts = random_prompts(range(1, 3 * block_size + 2), seed=3)
    want = generate_no_cache(model, prompts, 5)
    num_blocks = sum(-(-(len(prompt) + 5) // block_size) for prompt in prompts)
    engine = build(model, num_blocks, block_size, max_num_seqs=64)
    assert generate(engine, prompts, max_tokens=5) == want
    assert engine.scheduler.num_preemptions == 0
    assert len({token for tokens in want for token in tokens}) > 4


@pytest.fixture(scope="module")
def long_model(tiny_gpt):
    return tiny_gpt(dtype=torch.float64, max_seq_len=1024, n_layer=1, n_head=2, n_embd=32)


def test_a_prompt_of_1023_tokens_generates_the_one_that_fits_into_1024(long_model):
    (prompt,) = random_prompts([1023])
    engine = build(long_model, num_blocks=64, block_size=16)
    request_id = engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=5))
    output = run(engine)[request_id].outputs[0]
    assert output.token_ids == [dense_logits(long_model, prompt)[-1].argmax().item()]
    assert output.finish_reason == "length"


@pytest.mark.parametrize("length", [1024, 1025])
def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(long_model, length):
    engine = build(long_model, num_blocks=128, block_size=16)
    with pytest.raises(ValueError, match=f"prompt has {length} tokens, max_seq_len is 1024"):
        engine.add_request(random_prompts([length])[0])
    assert not engine.has_unfinished()


@pytest.mark.parametrize("max_tokens", [None, 25, 100])
def test_max_tokens_beyond_the_context_ends_with_length(tiny_gpt, max_tokens):
    model = tiny_gpt(dtype=torch.float64, max_seq_len=32)
    (prompt,) = random_prompts([8])
    engine = build(model, num_blocks=8)  # 8 blocks of 4: just the context
    engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=max_tokens))
    output = run(engine)["0"].outputs[0]
    assert output.token_ids == generate_no_cache(model, [prompt], 24)[0]
    assert (len(output.token_ids), output.finish_reason) == (24, "length")


# ---- transformers' GPT-2 -------------------------------------------------------------------------
def transformers_twin(folder, model=None):
    """The same weights in transformers, in float64; it never stops at an end of text."""
    if model is not None:
        save_model(model, folder, torch.float64)
    theirs = GPT2LMHeadModel.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    )
    theirs.generation_config.eos_token_id = None
    return theirs.eval()


def transformers_tokens(theirs, prompts, num_tokens):
    """Their greedy tokens: one batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    options = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
    return theirs.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()


RAGGED = [1, 2, 3, 15, 16, 17, 31, 40, 64, 100, 127, 128, 150, 199, 256, 300]  # 16 prompts


def test_greedy_tokens_are_those_of_transformers_for_16_ragged_prompts(tiny_gpt, tmp_path):
    model = tiny_gpt(seed=5, dtype=torch.float64, max_seq_len=384)
    prompts = random_prompts(RAGGED)
    want = transformers_tokens(transformers_twin(tmp_path, model), prompts, 32)
    engine = build(model, num_blocks=160, block_size=16, max_num_batched_tokens=64)
    assert generate(engine, prompts, max_tokens=32) == want
    assert all(len(set(tokens)) >= 4 for tokens in want)


@pytest.mark.slow
def test_greedy_tokens_of_the_shipped_model_are_those_of_transformers(shipped_model_folder):
    model = load_model(shipped_model_folder, torch.float64)
    tokenizer = load_tokenizer(shipped_model_folder)
    text = "Once upon a time there lived in a great forest an old woman and her three goats. " * 16
    prompts = [tokenizer.encode(text)[:length] for length in RAGGED]
    assert [len(prompt) for prompt in prompts] == RAGGED
    want = transformers_tokens(transformers_twin(shipped_model_folder), prompts, 64)
    engine = build(model, num_blocks=160, block_size=16, max_num_batched_tokens=256)
    got = generate(engine, prompts, max_tokens=64, ignore_eos=True)
    assert got == want
    assert all(len(set(tokens)) >= 4 for tokens in want)


# ---- refusals ------------------------------------------------------------------------------------
# The engine of these tests: a vocabulary of 97, no tokenizer, 64 positions, 8 blocks of 4 tokens.
REFUSED = {
    "an empty prompt": ([], {}, "the prompt is empty"),
    "an id behind the vocabulary": ([3, 97], {}, "token id 97: ids are integers from 0 to 96"),
    "a negative id": ([3, -1], {}, "token id -1: ids are integers from 0 to 96"),
    "an id beyond 64 bits": ([2**70], {}, f"token id {2**70}: ids are integers"),
    "a bool among the ids": ([3, True], {}, "token id True: ids are integers"),
    "a float among the ids": ([3.0], {}, "token id 3.0: ids are integers"),
    "a prompt of another type": (7, {}, "the prompt is of type int: give text or a list"),
    "no prompt at all": (None, {}, "the prompt is of type NoneType"),
    "text without a tokenizer": ("hello", {}, "a text prompt needs a tokenizer"),
    "a stop string without one": ([3], {"stop": "END"}, "a stop string needs a tokenizer"),
    "a prompt as long as the context": ([3] * 64, {}, "prompt has 64 tokens, max_seq_len is 64"),
    "more than the pool": ([3] * 20, {"max_tokens": 13}, "need 9 blocks of 4, the pool has 8"),
    "max_tokens=None in this pool": ([3] * 20, {"max_tokens": None}, "need 16 blocks of 4, the"),
    "an unknown stop token": ([3], {"stop_token_ids": [97]}, "stop_token_ids.*97"),
    "an unknown biased token": ([3], {"logit_bias": {97: 1.0}}, "logit_bias.*97"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_in_one_sentence_and_leaves_nothing(tiny_gpt, case):
    prompt, params, message = REFUSED[case]
    engine = build(tiny_gpt(dtype=torch.float64), num_blocks=8)
    with pytest.raises(ValueError, match=message) as refusal:
        engine.add_request(prompt, SamplingParams(**params))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 200
    assert not engine.has_unfinished() and engine.scheduler.num_waiting == 0
    assert engine.scheduler.allocator.num_free == 8
    assert engine.step().outputs == []  # nor has it left anything to do


@pytest.mark.parametrize("params", [{"max_tokens": 5}, SamplingParams])
def test_params_of_another_type_are_refused(tiny_gpt, params):
    engine = build(tiny_gpt(dtype=torch.float64))
    with pytest.raises(ValueError, match="give a SamplingParams"):
        engine.add_request([3], params)
    assert not engine.has_unfinished()


# ---- abort, in every state -----------------------------------------------------------------------
def stub_logits(token_id, position, vocab_size=31):
    """Pseudo-random logits (V,) as a pure function of the last token and its position."""
    generator = torch.Generator().manual_seed(token_id * 1_000 + position)
    return torch.randn(vocab_size, generator=generator)


TABLE = torch.stack([torch.stack([stub_logits(t, p) for p in range(64)]) for t in range(31)])


def stub_forward(batch):
    """The stand-in for a model in the tests of many requests: one look-up a row."""
    rows = batch.sample_rows
    return TABLE[batch.input_ids[rows], batch.positions[rows]]


def stub_greedy(prompt, num_tokens):
    """What it writes greedily."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + num_tokens, 64):
        ids.append(TABLE[ids[-1], len(ids) - 1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.slow
def test_1000_requests_with_aborts_in_every_state_leave_every_block_free():
    numbers = random.Random(5)
    cache = KVCache(1, 24, 4, 1, 1)
    engine = InferenceEngine(
        stub_forward, cache, Scheduler(BlockAllocator(24, 4), 8, 16, 64), vocab_size=31
    )
    scheduler = engine.scheduler
    prompts, unfinished, ever_run, preempted = {}, set(), set(), set()
    aborted = {"waiting": 0, "mid-prompt": 0, "decoding": 0, "preempted": 0}
    finished = {}

    def add():
        prompt = [numbers.randrange(31) for _ in range(numbers.randint(1, 40))]
        n = numbers.choice([1, 1, 1, 3])
        params = SamplingParams(temperature=0 if n == 1 else 1.0, n=n, max_tokens=20)
        request_id = engine.add_request(prompt, params)
        prompts[request_id] = prompt
        unfinished.add(request_id)

    def states():
        """Each state, with the ids of unfinished requests that have a sequence in it."""
        running = [(s.request.request_id, s) for s in scheduler.running]
        return {
            "waiting": unfinished - ever_run,
            "mid-prompt": {i for i, s in running if s.num_computed_tokens < s.num_prompt_tokens},
            "decoding": {i for i, s in running if s.num_generated > 0},
            "preempted": {s.request.request_id for s in preempted if s.status == WAITING},
        }

    def abort_one():
        state = numbers.choice(list(aborted))
        candidates = sorted(states()[state] & unfinished)
        if candidates:
            request_id = numbers.choice(candidates)
            free = scheduler.allocator.num_free
            assert engine.abort(request_id)
            assert scheduler.allocator.num_free > free or state in ("waiting", "preempted")
            assert not engine.abort(request_id)  # it is gone
            unfinished.discard(request_id)
            aborted[state] += 1

    while len(prompts) < 1000 or engine.has_unfinished():
        for _ in range(numbers.choice([0, 0, 2, 4])):
            if len(prompts) < 1000:
                add()
        step = engine.step()
        ever_run |= {entry.seq.request.request_id for entry in step.plan.scheduled}
        preempted |= set(step.plan.preempted)
        for output in step.outputs:
            assert output.request_id in unfinished
            if output.finished:
                finished[output.request_id] = output
                unfinished.discard(output.request_id)
        scheduler.check_integrity()
        if numbers.random() < 0.2:
            abort_one()
            scheduler.check_integrity()

    assert unfinished == set() and len(finished) + sum(aborted.values()) == 1000
    assert scheduler.allocator.num_free == 24 and scheduler.running == []
    assert min(aborted.values()) >= 10, aborted
    assert scheduler.num_preemptions > 100
    greedy = [i for i, output in finished.items() if len(output.outputs) == 1]
    assert len(greedy) > 300
    for request_id in greedy:
        want = stub_greedy(prompts[request_id], 20)
        assert finished[request_id].outputs[0].token_ids == want


def test_an_aborted_request_never_shows_up_again(model):
    engine = build(model)
    params = SamplingParams(temperature=0, max_tokens=6)
    first, second = (engine.add_request(prompt, params) for prompt in PROMPTS[:2])
    engine.step()
    assert engine.abort(first)
    assert set(run(engine)) == {second}
    assert not engine.abort(first) and not engine.abort(second) and not engine.abort("no such id")


# ---- seeds ---------------------------------------------------------------------------------------
def draws(engine, prompts, params, between_steps=lambda step: None):
    """All texts of all prompts, as token ids."""
    ids = [engine.add_request(p, q) for p, q in zip(prompts, params, strict=True)]
    finished = run(engine, between_steps)
    return [[output.token_ids for output in finished[i].outputs] for i in ids]


SEEDED = [SamplingParams(seed=seed, max_tokens=NUM_TOKENS) for seed in range(6)]


@pytest.fixture(scope="module")
def seeded(model):
    """What each seeded request draws, alone."""
    pairs = zip(PROMPTS, SEEDED, strict=True)
    return [draws(build(model), [prompt], [params])[0] for prompt, params in pairs]


@pytest.mark.parametrize(
    "options", [{}, {"max_num_batched_tokens": 5}, {"num_blocks": 13}], ids=str
)
def test_seeded_requests_draw_the_same_whatever_else_is_in_the_batch(model, seeded, options):
    engine = build(model, **options)
    assert draws(engine, PROMPTS, SEEDED) == seeded
    assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in options)
    assert all(len(set(texts[0])) > 4 for texts in seeded)


def test_seeded_requests_draw_the_same_after_preemption_at_every_step(model, seeded):
    numbers = random.Random(6)
    engine = build(model)

    def preempt_one(step):
        if engine.scheduler.running:
            engine.scheduler.preempt(numbers.choice(engine.scheduler.running))

    assert draws(engine, PROMPTS, SEEDED, preempt_one) == seeded
    assert engine.scheduler.num_preemptions >= NUM_TOKENS - 1


def test_a_draw_depends_on_seed_and_position_and_not_on_where_the_prompt_ends(model, seeded):
    """Five drawn tokens handed back as part of the prompt: the same seed goes on as before."""
    (drawn,) = seeded[3]
    params = SamplingParams(seed=3, max_tokens=NUM_TOKENS - 5)
    again = draws(build(model), [[*PROMPTS[3], *drawn[:5]]], [params])
    assert again == [[drawn[5:]]]


def test_the_engines_seed_makes_unseeded_requests_reproducible(model):
    params = [SamplingParams(max_tokens=NUM_TOKENS)] * 2
    prompts = [PROMPTS[3]] * 2
    first, again, other = (draws(build(model, seed=s), prompts, params) for s in (7, 7, 8))
    assert first == again != other
    assert first[0] != first[1]  # two requests of one engine are two draws


def test_the_children_of_one_request_are_different_texts(model):
    params = [SamplingParams(n=8, seed=3, max_tokens=NUM_TOKENS)]
    (texts,) = draws(build(model), [PROMPTS[3]], params)
    assert len({tuple(text) for text in texts}) == 8
    # The first children of a larger n are those of a smaller one.
    fewer = [SamplingParams(n=3, seed=3, max_tokens=NUM_TOKENS)]
    assert draws(build(model), [PROMPTS[3]], fewer) == [texts[:3]]


def test_no_text_of_one_seed_is_a_text_of_another(model):
    """The seed of text i is a hash. With seed + i, text 2 of seed 1 would be text 1 of seed 2."""
    params = [SamplingParams(n=4, seed=seed, max_tokens=NUM_TOKENS) for seed in (1, 2, 3)]
    texts = draws(build(model), [PROMPTS[3]] * 3, params)
    assert len({tuple(text) for each in texts for text in each}) == 12


# ---- several sequences under one request ---------------------------------------------------------
def test_n_sequences_have_their_own_blocks_and_outputs_in_order(model):
    engine = build(model)
    engine.add_request(PROMPTS[2], SamplingParams(n=5, seed=1, max_tokens=6))
    most = 0

    def look(step):
        nonlocal most
        held = [block_id for s in engine.scheduler.running for block_id in s.block_table]
        assert len(set(held)) == len(held)
        most = max(most, len(held))

    output = run(engine, look)["0"]
    assert most == 5 * 3  # 7 prompt tokens and 5 of 6 new ones: 3 blocks of 4 each
    assert [o.index for o in output.outputs] == [0, 1, 2, 3, 4]
    assert [o.finish_reason for o in output.outputs] == ["length"] * 5


@pytest.mark.parametrize("options", [{"max_num_seqs": 2}, {"num_blocks": 6}], ids=str)
def test_n_sequences_that_do_not_fit_at_once_write_the_same(model, options):
    params = [SamplingParams(n=5, seed=1, max_tokens=6)]
    want = draws(build(model), [PROMPTS[2]], params)
    assert draws(build(model, **options), [PROMPTS[2]], params) == want


def test_a_request_is_finished_when_the_last_of_its_sequences_is():
    """Two texts, of which one meets the stop token first: the request lives until both ended."""
    engine = build_stub(stub_forward, 31)
    params = SamplingParams(n=2, seed=4, max_tokens=30, stop_token_ids=[5])
    engine.add_request([1, 2], params)
    seen = []
    output = run(engine, lambda step: seen.extend(step.outputs))["0"]
    lengths = sorted(len(o.token_ids) for o in output.outputs)
    assert lengths[0] < lengths[1] == len(seen)  # one output a step, to the end of the longer
    assert [o.finished for o in seen] == [False] * (len(seen) - 1) + [True]


# ---- how a text ends -----------------------------------------------------------------------------
def scripted(script, vocab_size=257, num_prompt_tokens=1):
    """A forward whose next token after i generated ones is script[i]."""

    def forward(batch):
        positions = batch.positions[batch.sample_rows] - num_prompt_tokens + 1
        logits = torch.zeros(len(positions), vocab_size)
        logits[range(len(positions)), torch.tensor(script)[positions]] = 9.0
        return logits

    return forward


class BytesAndEnd(ByteTokenizer):
    """256 bytes, and id 256: the end of text, which adds none."""

    def token_bytes(self, token_id):
        return b"" if token_id == 256 else super().token_bytes(token_id)


a, b, c, d, EOS = *b"abcd", 256
ENDS = {  # what the model writes is "ab", EOS, "cd", EOS: params -> text, ids, reasons
    "at the end of text": ({}, "ab", [a, b, EOS], "stop", None),
    "ignore_eos": (
        {"ignore_eos": True, "max_tokens": 5},
        "abcd",
        [a, b, EOS, c, d],
        "length",
        None,
    ),
    "a stop token": ({"stop_token_ids": [b]}, "a", [a, b], "stop", b),
    "EOS as a stop token": (
        {"ignore_eos": True, "stop_token_ids": [EOS]},
        "ab",
        [a, b, EOS],
        "stop",
        EOS,
    ),
    "EOS is allowed after min_tokens": ({"min_tokens": 2}, "ab", [a, b, EOS], "stop", None),
    # EOS would be the third token. It is banned there, and the next best is id 0.
    "min_tokens bans EOS": ({"min_tokens": 3}, "ab\0cd", [a, b, 0, c, d, EOS], "stop", None),
}


@pytest.mark.parametrize("params, text, ids, finish, stop", ENDS.values(), ids=ENDS)
def test_a_text_ends_with_its_reasons_and_without_the_token_that_ended_it(
    params, text, ids, finish, stop
):
    forward = scripted([a, b, EOS, c, d, EOS, a, a, a])
    engine = build_stub(forward, 257, tokenizer=BytesAndEnd(), eos_token_id=EOS)
    engine.add_request([0], SamplingParams(**(GREEDY | params)))
    (output,) = run(engine).values()
    completion = output.outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (
        text,
        finish,
        stop,
    )
    assert completion.token_ids == ids


def test_the_stop_token_0_is_a_stop_reason_too():
    engine = build_stub(scripted([5, 0, 5]), 257, tokenizer=BytesAndEnd(), eos_token_id=EOS)
    engine.add_request([0], SamplingParams(temperature=0, stop_token_ids=[0]))
    completion = run(engine)["0"].outputs[0]
    assert (completion.token_ids, completion.stop_reason) == ([5, 0], 0)


@pytest.mark.parametrize("eos_token_id", [-1, 257, 50256])
def test_an_eos_that_the_vocabulary_has_not_never_comes(eos_token_id):
    """min_tokens bans EOS by its id: one outside would ban another token, or crash the step."""
    engine = build_stub(scripted([5, 256, 5, 5]), 257, eos_token_id=eos_token_id)
    engine.add_request([1], SamplingParams(temperature=0, max_tokens=3, min_tokens=2))
    (output,) = run(engine).values()
    assert output.outputs[0].finish_reason == "length"


# ---- log-probabilities ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def log_softmax(model, tmp_path_factory):
    """transformers' log-probabilities (T, V) of a sequence."""
    theirs = transformers_twin(tmp_path_factory.mktemp("twin"), model)

    @torch.inference_mode()
    def of(ids):
        return theirs(torch.tensor([ids])).logits[0].log_softmax(-1)

    return of


@pytest.mark.parametrize("params", [GREEDY, {"seed": 5, "temperature": 1.5, "top_k": 20}], ids=str)
def test_logprobs_are_the_log_softmax_of_transformers_logits(model, log_softmax, params):
    """Of the model, before temperature and top_k: what vLLM reports too."""
    engine = build(model, max_num_batched_tokens=7)
    params = SamplingParams(**params, max_tokens=NUM_TOKENS, logprobs=3)
    for prompt in PROMPTS:
        engine.add_request(prompt, params)
    for output in run(engine).values():
        prompt, completion = output.prompt_token_ids, output.outputs[0]
        want = log_softmax([*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
        assert len(completion.logprobs) == NUM_TOKENS
        total = 0.0
        for row, token_id, entry in zip(want, completion.token_ids, completion.logprobs):
            assert set(row.topk(3).indices.tolist()) <= set(entry)
            assert len(entry) == 3 + (entry[token_id].rank > 3)
            for each, logprob in entry.items():
                assert logprob.logprob == pytest.approx(row[each].item(), abs=1e-6)
                assert logprob.rank == (row > row[each]).sum() + 1
            total += row[token_id].item()
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-5)


def test_logprobs_0_gives_the_drawn_token_alone(model):
    engine = build(model)
    engine.add_request([5, 6], SamplingParams(max_tokens=6, seed=1, logprobs=0))
    engine.add_request([5, 6], SamplingParams(max_tokens=6, seed=1))
    finished = run(engine)
    output, unasked = finished["0"].outputs[0], finished["1"].outputs[0]
    assert [list(entry) for entry in output.logprobs] == [[i] for i in output.token_ids]
    assert finished["1"].prompt_logprobs is None
    assert unasked.logprobs is None and unasked.cumulative_logprob is None


def prompt_logprobs_of(engine, prompts, between_steps=lambda step: None, **params):
    params = SamplingParams(**(GREEDY | {"max_tokens": 4, "prompt_logprobs": 2} | params))
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    finished = run(engine, between_steps)
    return [finished[request_id].prompt_logprobs for request_id in ids]


def assert_equal_prompt_logprobs(got, log_softmax):
    """`got` for PROMPTS against transformers."""
    assert [len(entries) for entries in got] == LENGTHS
    for prompt, entries in zip(PROMPTS, got, strict=True):
        assert entries[0] is None  # nothing comes before the first token, so nothing predicts it
        want = log_softmax(prompt)[:-1]
        for row, token_id, entry in zip(want, prompt[1:], entries[1:], strict=True):
            assert set(row.topk(2).indices.tolist()) | {token_id} == set(entry)
            for each, logprob in entry.items():
                assert logprob.logprob == pytest.approx(row[each].item(), abs=1e-6)


@pytest.mark.parametrize("budget", [1, 20])
def test_prompt_logprobs_are_collected_across_chunks(model, log_softmax, budget):
    engine = build(model, max_num_batched_tokens=budget)
    assert_equal_prompt_logprobs(prompt_logprobs_of(engine, PROMPTS), log_softmax)


def test_a_preemption_while_prompt_logprobs_are_collected_duplicates_none(model, log_softmax):
    """The second run over the prompt is cut into other chunks: the other requests have changed."""
    engine = build(model, max_num_batched_tokens=3)
    numbers = random.Random(7)
    in_the_middle = []

    def preempt_in_a_prompt(step):
        behind = [
            s for s in engine.scheduler.running if s.num_computed_tokens < s.num_prompt_tokens
        ]
        if behind and numbers.random() < 0.3:
            seq = numbers.choice(behind)
            in_the_middle.append(seq.num_computed_tokens)
            engine.scheduler.preempt(seq)

    got = prompt_logprobs_of(engine, PROMPTS, preempt_in_a_prompt)
    assert len(in_the_middle) > 2
    assert_equal_prompt_logprobs(got, log_softmax)


def test_prompt_logprobs_of_n_texts_come_once(model, log_softmax):
    got = prompt_logprobs_of(build(model), PROMPTS, n=3, temperature=1.0, seed=1)
    assert_equal_prompt_logprobs(got, log_softmax)


def test_prompt_logprobs_beside_a_request_that_wants_none(model, expected):
    engine = build(model, max_num_batched_tokens=6)
    wanted = [
        SamplingParams(temperature=0, max_tokens=NUM_TOKENS, prompt_logprobs=i % 2 or None)
        for i in range(6)
    ]
    ids = [engine.add_request(p, q) for p, q in zip(PROMPTS, wanted, strict=True)]
    finished = run(engine)
    assert [finished[i].outputs[0].token_ids for i in ids] == expected.tokens
    assert [finished[i].prompt_logprobs is None for i in ids] == [True, False] * 3


# ---- interruptions -------------------------------------------------------------------------------
def fail_once(engine, at_call, error):
    """Let the engine's forward raise at its n-th call."""
    forward, calls = engine.forward, iter(range(1, 10_000))

    def failing(batch):
        if next(calls) == at_call:
            raise error
        return forward(batch)

    engine.forward = failing


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("at_call", [1, 4, 12])
def test_an_exception_in_the_forward_loses_nothing(model, log_softmax, at_call, error):
    engine = build(model, max_num_batched_tokens=40)
    fail_once(engine, at_call, error)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, prompt_logprobs=2)
    ids = [engine.add_request(prompt, params) for prompt in PROMPTS]
    finished = {}
    with pytest.raises(type(error)):
        while engine.has_unfinished():
            step = engine.step()
            finished |= {output.request_id: output for output in step.outputs if output.finished}
    engine.scheduler.check_integrity()
    assert engine.has_unfinished()
    finished |= run(engine)
    want = [generate_no_cache(model, [prompt], NUM_TOKENS)[0] for prompt in PROMPTS]
    assert [finished[i].outputs[0].token_ids for i in ids] == want
    assert_equal_prompt_logprobs([finished[i].prompt_logprobs for i in ids], log_softmax)


def test_an_exception_in_a_strategy_loses_nothing(model, expected):
    failures = iter([False, True, False, False, True] + [False] * 100)

    def strategy(sequences, logits):
        if next(failures):
            raise RuntimeError("a bad strategy")
        return sample_next(sequences, logits)

    engine = build(model)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    ids = [engine.add_request(p, params, strategy=strategy) for p in PROMPTS]
    finished = {}
    failed = 0
    while engine.has_unfinished():
        try:
            step = engine.step()
            finished |= {output.request_id: output for output in step.outputs if output.finished}
        except RuntimeError:
            failed += 1
        engine.scheduler.check_integrity()
    assert failed == 2
    assert [finished[i].outputs[0].token_ids for i in ids] == expected.tokens


# ---- strategies: forks, drops, drafts ------------------------------------------------------------
def two_children(at):
    """A strategy: after `at` generated tokens the sequence goes on as two, greedy before and after.

    The parent takes the likeliest token, the child the second.
    """

    def strategy(sequences, logits):
        futures = []
        for seq, (best, second) in zip(sequences, logits.topk(2).indices.tolist(), strict=True):
            futures.append(Continuation(seq, [best]))
            if seq.num_generated == at and seq.index == 0:
                futures.append(Continuation(seq, [second]))
        return futures

    return strategy


def fork_oracle(model, prompt, at, num_tokens):
    """The two texts, each alone from the prefix at which they part."""
    (parent,) = generate_no_cache(model, [prompt], num_tokens)
    prefix = [*prompt, *parent[:at]]
    second = dense_logits(model, prefix)[-1].topk(2).indices[1].item()
    (rest,) = generate_no_cache(model, [[*prefix, second]], num_tokens - at - 1)
    return [parent, [*parent[:at], second, *rest]]


@pytest.mark.parametrize(
    ("length", "at", "copies"),
    [(6, 0, 1), (7, 0, 1), (8, 0, 0), (8, 1, 1), (5, 2, 1), (5, 3, 0), (1, 0, 1)],
)
def test_a_fork_copies_one_block_if_its_tail_is_partly_filled_and_none_if_it_is_full(
    model, length, at, copies
):
    """Blocks of 4: after 6 computed tokens the second block is shared half full, so one of the two
    has to copy it before it writes; after 8 both begin a block of their own."""
    (prompt,) = random_prompts([length], seed=8)
    engine = build(model)
    params = SamplingParams(temperature=0, max_tokens=10)
    engine.add_request(prompt, params, strategy=two_children(at))
    steps = []
    output = run(engine, steps.append)["0"]
    assert [o.token_ids for o in output.outputs] == fork_oracle(model, prompt, at, 10)
    assert [o.index for o in output.outputs] == [0, 1]
    assert sum(step.blocks_copied for step in steps) == copies


@pytest.mark.parametrize("options", [{"max_num_batched_tokens": 5}, {"num_blocks": 9}], ids=str)
def test_forks_under_preemption_write_the_same(model, options):
    """A preempted child computes its past again, into blocks of its own."""
    prompts = random_prompts([6, 9, 14], seed=10)
    numbers = random.Random(11)
    engine = build(model, **options)
    params = SamplingParams(temperature=0, max_tokens=10)
    for prompt in prompts:
        engine.add_request(prompt, params, strategy=two_children(1))

    def preempt_one(step):
        if len(engine.scheduler.running) > 1 and numbers.random() < 0.5:
            engine.scheduler.preempt(numbers.choice(engine.scheduler.running))

    finished = run(engine, preempt_one)
    for i, prompt in enumerate(prompts):
        got = [output.token_ids for output in finished[str(i)].outputs]
        assert got == fork_oracle(model, prompt, 1, 10)
    assert engine.scheduler.num_preemptions > 3


def test_a_parent_without_a_future_is_dropped_and_its_blocks_are_free(model):
    """Two beams part at the first token; at the fourth the first of them is given up."""
    fork = two_children(0)

    def strategy(sequences, logits):
        futures = fork(sequences, logits)
        return [f for f in futures if f.parent.num_generated < 3 or f.parent.index == 1]

    (prompt,) = random_prompts([6], seed=8)
    engine = build(model)
    params = SamplingParams(temperature=0, max_tokens=10)
    engine.add_request(prompt, params, strategy=strategy)
    held = []

    def look(step):
        tables = [s.block_table for s in engine.scheduler.running]
        held.append(len({block_id for table in tables for block_id in table}))

    output = run(engine, look)["0"]
    assert [(o.index, o.token_ids) for o in output.outputs] == [
        (1, fork_oracle(model, prompt, 0, 10)[1])
    ]
    # Computed after each step: 6, 7, 8, 9 tokens and on. Two sequences share the first block of 4;
    # with the parent's drop its own second block, and a third for its ninth token, are gone.
    assert held == [2, 3, 3, 3, 3, 3, 3, 4, 4, 0]


def test_a_strategy_may_append_several_tokens_at_once(model, expected):
    """An accepted draft: one to three of the right tokens a step, cut where max_tokens says."""
    prompt, want = PROMPTS[3], expected.tokens[3]

    def strategy(sequences, logits):
        (seq,) = sequences
        done = seq.num_generated
        assert logits.argmax(-1).tolist() == want[done : done + 1]
        return [Continuation(seq, want[done : done + 1 + done % 3] or [0])]

    for max_tokens in range(1, NUM_TOKENS + 1):
        engine = build(model)
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        engine.add_request(prompt, params, strategy=strategy)
        assert run(engine)["0"].outputs[0].token_ids == want[:max_tokens]


def test_a_strategy_is_called_once_a_step_for_all_requests_that_share_it(model):
    calls = {"a": [], "b": []}

    def counting(name):
        def strategy(sequences, logits):
            assert len(sequences) == len(logits)
            calls[name].append(sorted(seq.request.request_id for seq in sequences))
            return sample_next(sequences, logits)

        return strategy

    a, b = counting("a"), counting("b")
    engine = build(model)
    params = SamplingParams(temperature=0, max_tokens=3)
    for prompt, strategy in zip(PROMPTS, [a, b, a, b, a, a]):
        engine.add_request(prompt, params, strategy=strategy)
    run(engine)
    assert calls == {"a": [["0", "2", "4", "5"]] * 3, "b": [["1", "3"]] * 3}


# ---- two engines ---------------------------------------------------------------------------------
def test_two_engines_in_two_threads_write_what_they_write_one_after_the_other(model, expected):
    engines = [build(model, num_blocks=18), build(model, max_num_batched_tokens=5)]
    got = [None, None]

    def work(i):
        got[i] = compare(engines[i], expected)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [same for same, _ in got] == [True, True]


# ---- mutations: the tests above would notice -----------------------------------------------------
def after_step(number, action):
    numbers = iter(range(1, 10_000))

    def between_steps(step):
        if next(numbers) == number:
            action()

    return between_steps


def test_a_corrupted_block_is_noticed(model, expected):
    engine = build(model)

    def flip_the_keys_of_one_block():
        block_id = engine.scheduler.running[-1].block_table[2]
        engine.cache.pool[:, block_id, 0] *= -1

    same, error = compare(engine, expected, after_step(3, flip_the_keys_of_one_block))
    assert not same and error > 1e-3


def test_a_swapped_table_entry_is_noticed_where_a_block_is_partly_filled(model, expected):
    """Among full blocks no query can tell the order (positions are baked into K and V), and even a
    broken engine passes: what tells is the tail, where masks and the next write depend on it."""

    def compare_with_swapped(first, second):
        engine = build(model)
        engine.cache.pool.zero_()  # with NaN in it the step itself would refuse to go on

        def swap():
            table = engine.scheduler.running[-1].block_table
            table[first], table[second] = table[second], table[first]

        return compare(engine, expected, after_step(1, swap))

    same, error = compare_with_swapped(0, 3)
    assert same and error < 1e-9
    same, error = compare_with_swapped(0, -1)
    assert not same and error > 1e-3


# ---- what a step says of itself ------------------------------------------------------------------
@pytest.mark.parametrize(
    "options", [{}, {"num_blocks": 13}, {"max_num_batched_tokens": 5}], ids=str
)
@pytest.mark.parametrize("strategy", [sample_next, two_children(1)], ids=["sampling", "forks"])
def test_blocks_taken_minus_freed_are_the_blocks_held_after_every_step(model, options, strategy):
    engine = build(model, **options)
    allocator = engine.scheduler.allocator
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    for prompt in PROMPTS:
        engine.add_request(prompt, params, strategy=strategy)
    taken = freed = 0

    def add_up(step):
        nonlocal taken, freed
        taken += step.blocks_taken
        freed += step.blocks_freed
        assert taken - freed == allocator.num_blocks - allocator.num_free
        assert step.blocks_hit == step.blocks_evicted == step.blocks_swapped == 0

    run(engine, add_up)
    assert taken == freed > 20


def test_a_step_names_who_ran_who_was_sampled_and_how_long_it_took(model):
    engine = build(model, max_num_batched_tokens=10)
    params = SamplingParams(temperature=0, max_tokens=2)
    engine.add_request(PROMPTS[2], params)  # 7 tokens
    engine.add_request(PROMPTS[3], params)  # 15 tokens
    steps = []
    run(engine, steps.append)
    spans = [
        [(e.seq.request.request_id, e.start, e.num_new_tokens) for e in step.plan.scheduled]
        for step in steps
    ]
    assert spans == [
        [("0", 0, 7), ("1", 0, 3)],
        [("0", 7, 1), ("1", 3, 9)],
        [("1", 12, 3)],
        [("1", 15, 1)],
    ]
    assert [[s.request.request_id for s in step.plan.sampled] for step in steps] == [
        ["0"],
        ["0"],
        ["1"],
        ["1"],
    ]
    assert [[o.request_id for o in step.outputs] for step in steps] == [["0"], ["0"], ["1"], ["1"]]
    assert all(step.milliseconds > 0 for step in steps)
    assert [step.blocks_taken for step in steps] == [2 + 4, 0, 0, 0]
    assert [step.blocks_freed for step in steps] == [0, 2, 0, 4]
