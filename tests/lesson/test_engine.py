"""The engine against one-at-a-time generation without a cache, and against transformers' GPT-2.

Batching, chunks, blocks, preemption, forks and interruptions must not change a token. All
equalities are in float64, where they are exact up to 1e-9: in float32 the shape of a batch changes
the last bits. The models have weights of std 0.2, and their texts are asserted to hold several
distinct tokens: a model that repeats one token would pass every test.
"""

import contextlib
import copy
import math
import random
import threading
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from interrupts import interrupted_at
from transformers import GPT2LMHeadModel
from worlds import SEED

from baselines import generate_no_cache
from beam_search import BeamScheduler
from block_allocator import BlockAllocator
from checkpoints.load import load_model
from checkpoints.tokenizer import load_tokenizer
from checkpoints.train_tiny import save_model
from engine import InferenceEngine, eager_forward, sample_next
from kernels.backends import BACKENDS, resolve_backend
from kv_cache import KVCache
from model import attend_one_sequence
from outputs import ByteTokenizer
from sampling import SamplingParams
from sequence import Continuation

GREEDY = {"temperature": 0}
UNLIMITED = 10_000  # tokens in a step: more than any test has

# The tests run through the backend that a user gets on a CPU; the central equalities run through
# each CPU backend. Triton's kernels are slow on a CPU: test_llm.py has one text of each backend.
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
    scheduler = BeamScheduler(allocator, max_num_seqs, max_num_batched_tokens, config.max_seq_len)
    forward = eager_forward(model, cache, kernels.paged_attention, kernels.write_kv)
    return InferenceEngine(forward, cache, scheduler, config.vocab_size, **kwargs)


def build_stub(forward, vocab_size, num_blocks=32, block_size=4, max_num_seqs=16, **kwargs):
    """An engine around a stand-in for the model, which needs no K and V."""
    cache = KVCache(1, num_blocks, block_size, 1, 1)
    scheduler = BeamScheduler(BlockAllocator(num_blocks, block_size), max_num_seqs, UNLIMITED, 64)
    return InferenceEngine(forward, cache, scheduler, vocab_size, **kwargs)


def run(engine, between_steps=lambda step: None):
    """Step until all requests have ended; returns the output of each request id."""
    finished = {}
    for _ in range(20_000):
        if not engine.has_unfinished():
            assert engine.scheduler.allocator.num_free == engine.scheduler.allocator.num_blocks
            return finished
        step = engine.step()
        engine.scheduler.check_integrity()
        finished |= {output.request_id: output for output in step.finished}
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
    """Each prompt's text and the logits that it was drawn from: one at a time, without a cache."""
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
    num_blocks = 6 * -(-(max(LENGTHS) + NUM_TOKENS) // block_size)
    engine = build(model, num_blocks, block_size, 6, budget, BACKENDS[backend])
    same, error = compare(engine, expected)
    assert same and error < 1e-9
    assert engine.scheduler.num_preemptions == 0


@pytest.mark.parametrize("budget", [5, UNLIMITED])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_preemption_injected_at_every_step_changes_no_token(model, expected, backend, budget):
    """The first in line is never chosen: a long prompt in small chunks would never end."""
    numbers = random.Random(2)
    engine = build(model, max_num_batched_tokens=budget, kernels=BACKENDS[backend])

    def preempt_one(step):
        if len(engine.scheduler.running) > 1:
            engine.scheduler.preempt(numbers.choice(engine.scheduler.running[1:]))
            engine.scheduler.check_integrity()

    same, error = compare(engine, expected, preempt_one)
    assert same and error < 1e-9
    assert engine.scheduler.num_preemptions >= NUM_TOKENS - 2
    assert engine.scheduler.num_recomputed_tokens > 100


@pytest.mark.parametrize("num_blocks, budget", [(12, 8), (13, 64), (16, UNLIMITED)])
def test_a_pool_too_small_for_all_preempts_and_changes_no_token(
    model, expected, num_blocks, budget
):
    """The longest needs 45 tokens, 12 blocks of 4: in a pool of 12 it runs alone at its end."""
    engine = build(model, num_blocks, max_num_batched_tokens=budget)
    same, error = compare(engine, expected)
    assert same and error < 1e-9
    assert engine.scheduler.num_preemptions > 0 and engine.scheduler.num_recomputed_tokens > 0


@pytest.mark.parametrize("budget", [5, UNLIMITED])
def test_a_reservation_that_is_too_small_never_leads_into_the_scratch_block(
    model, expected, budget
):
    engine = build(model, max_num_batched_tokens=budget)
    engine.scheduler.reserve = lambda seq: 1
    same, error = compare(engine, expected)
    assert same and error < 1e-9
    assert engine.cache.pool[:, -1].isnan().all(), "only padded rows write there: no batch has one"


# ---- lengths -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "length, max_tokens, num_written", [(8, None, 24), (8, 25, 24), (8, 100, 24), (31, 5, 1)]
)
def test_a_text_ends_where_the_context_is_full(tiny_gpt, length, max_tokens, num_written):
    model = tiny_gpt(dtype=torch.float64, max_seq_len=32)
    (prompt,) = random_prompts([length])
    engine = build(model, num_blocks=8)  # 8 blocks of 4: just the context
    engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=max_tokens))
    output = run(engine)["0"].outputs[0]
    assert output.token_ids == generate_no_cache(model, [prompt], num_written)[0]
    assert output.finish_reason == "length"


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
    "an id after the last of the vocabulary": (
        [3, 97],
        {},
        "token id 97: ids are integers from 0 to 96",
    ),
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
    assert engine.step().added == []  # nor has it left anything to do


@pytest.mark.parametrize("name", ["policy", "reserve"])
def test_a_function_of_a_caller_that_fails_refuses_its_own_request_only(model, expected, name):
    engine = build(model)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    engine.add_request(PROMPTS[0], params)
    function = getattr(engine.scheduler, name)
    setattr(engine.scheduler, name, lambda seq: None)
    with pytest.raises(ValueError, match="function"):
        engine.add_request(PROMPTS[1], params)
    assert list(engine.requests) == ["0"]
    setattr(engine.scheduler, name, function)
    assert run(engine)["0"].outputs[0].token_ids == expected.tokens[0]


def test_params_of_another_type_are_refused(tiny_gpt):
    engine = build(tiny_gpt(dtype=torch.float64))
    with pytest.raises(ValueError, match="params is a dict: give a SamplingParams"):
        engine.add_request([3], {"max_tokens": 5})


# ---- abort, in every state -----------------------------------------------------------------------
def test_an_abort_at_any_step_frees_the_blocks_and_changes_no_other_text(model, expected):
    """After every fifth step, each of the six requests, in a small pool and in small steps."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    states = set()  # of the aborted: status, was it preempted, has it written
    for at_step in range(0, 40, 5):
        for victim in range(6):
            engine = build(model, num_blocks=13, max_num_batched_tokens=8)
            want = dict(enumerate(expected.tokens))
            for prompt in PROMPTS:
                engine.add_request(prompt, params)
            request = engine.requests[str(victim)]
            (seq,) = request.sequences
            finished, aborted = {}, []
            for _ in range(at_step):
                finished |= {output.request_id: output for output in engine.step().finished}
            states.add((seq.status, seq.num_preemptions > 0, seq.num_generated > 0))
            if str(victim) not in finished:
                table = list(seq.block_table)
                assert engine.abort(str(victim))
                assert seq.block_table == table, "it takes effect when the next step begins"
                del want[victim]
            assert not engine.abort(str(victim))
            finished |= run(engine, lambda step: aborted.extend(step.aborted))
            assert {int(i): o.outputs[0].token_ids for i, o in finished.items()} == want
            # One that was added and aborted before a step came is not reported at all.
            assert aborted == [request] * (victim not in want and at_step > 0)
    assert {("waiting", False, False), ("waiting", True, True)} <= states
    assert {("running", False, False), ("running", False, True)} <= states


def test_an_abort_ends_all_texts_of_a_request_when_the_next_step_begins(model):
    engine = build(model)
    request_id = engine.add_request(PROMPTS[2], SamplingParams(n=3, max_tokens=6))
    engine.step()
    assert engine.abort(request_id) and engine.has_unfinished()
    step = engine.step()
    assert (step.plan.scheduled, step.deltas, step.finished, step.blocks.freed) == ([], [], [], 2)
    assert [request.request_id for request in step.aborted] == ["0"]
    assert not engine.has_unfinished() and not engine.abort("no such id")


def test_an_abort_within_a_step_leaves_no_output_of_the_request(model):
    """From a strategy, in the step that would have ended it: exactly one of the two ends it."""
    engine = build(model)

    def strategy(sequences, logits):
        assert engine.abort("0") and not engine.abort("0")
        return sample_next(sequences, logits)

    engine.add_request(PROMPTS[2], SamplingParams(max_tokens=1), strategy=strategy)
    step = engine.step()
    assert (step.deltas, step.finished) == ([], []) and engine.has_unfinished()
    assert engine.step().aborted and not engine.has_unfinished()


def test_a_request_that_was_added_within_a_step_begins_in_the_next(model, expected):
    engine = build(model)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)

    def add_another(step):
        if len(engine.requests) < 6 and len(step.added) == 1:
            number = int(step.added[0].request_id) + 1
            assert engine.add_request(PROMPTS[number], params) == str(number)
            assert engine.scheduler.num_waiting == 0

    engine.watchers.append(add_another)
    engine.add_request(PROMPTS[0], params)
    finished = run(engine)
    assert [finished[str(i)].outputs[0].token_ids for i in range(6)] == expected.tokens


def test_threads_add_and_abort_while_another_steps(tiny_gpt):
    """Each request either ends with all its tokens or was aborted, and never both."""
    engine = build_stub(lambda batch: torch.zeros(len(batch.sample_rows), 97), 97, num_blocks=200)
    params = SamplingParams(temperature=0, max_tokens=5)
    added, aborted, finished = [], [], {}

    def client(seed):
        numbers = random.Random(seed)
        for _ in range(60):
            added.append(engine.add_request([1, 2, 3], params))
            victim = numbers.choice(added)
            if numbers.random() < 0.5 and engine.abort(victim):
                aborted.append(victim)

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(3)]
    for thread in clients:
        thread.start()
    while any(thread.is_alive() for thread in clients):
        finished |= {output.request_id: output for output in engine.step().finished}
    finished |= run(engine)
    assert len(added) == 180 and aborted
    assert sorted([*finished, *aborted], key=int) == sorted(added, key=int)
    assert all(len(output.outputs[0].token_ids) == 5 for output in finished.values())


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


def test_no_text_of_one_seed_is_a_text_of_another(model):
    """The seed of text i is a hash. With seed + i, text 2 of seed 1 would be text 1 of seed 2."""
    params = [SamplingParams(n=4, seed=seed, max_tokens=NUM_TOKENS) for seed in (1, 2, 3)]
    texts = draws(build(model), [PROMPTS[3]] * 3, params)
    assert len({tuple(text) for each in texts for text in each}) == 12
    # The first texts of a larger n are those of a smaller one.
    fewer = [SamplingParams(n=2, seed=3, max_tokens=NUM_TOKENS)]
    assert draws(build(model), [PROMPTS[3]], fewer) == [texts[2][:2]]


# ---- several sequences under one request ---------------------------------------------------------
@pytest.mark.parametrize("options", [{"max_num_seqs": 2}, {"num_blocks": 6}], ids=str)
def test_n_sequences_that_do_not_fit_at_once_write_the_same(model, options):
    params = [SamplingParams(n=5, seed=1, max_tokens=6)]
    want = draws(build(model), [PROMPTS[2]], params)
    assert draws(build(model, **options), [PROMPTS[2]], params) == want


def test_a_request_ends_with_the_last_of_its_texts(model):
    engine = build(model)
    params = SamplingParams(n=5, seed=4, max_tokens=30, stop_token_ids=list(range(0, 97, 6)))
    engine.add_request(PROMPTS[2], params)
    steps = []
    output = run(engine, steps.append)["0"]
    lengths = [len(o.token_ids) for o in output.outputs]
    assert min(lengths) < max(lengths) == len(steps)  # it is reported when the longest has ended
    assert [step.finished for step in steps] == [[]] * (len(steps) - 1) + [[output]]
    assert [o.index for o in output.outputs] == [0, 1, 2, 3, 4]
    # The deltas of all steps make up the texts, and each text's last one has the reason.
    for o in output.outputs:
        deltas = [d for step in steps for d in step.deltas if d.index == o.index]
        assert [i for d in deltas for i in d.token_ids] == o.token_ids
        assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + [o.finish_reason]


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
    "the stop token 0": ({"stop_token_ids": [0], "logit_bias": {0: 99}}, "", [0], "stop", 0),
    "EOS is allowed after min_tokens": ({"min_tokens": 2}, "ab", [a, b, EOS], "stop", None),
    # EOS would be the third token. It is banned there, and the next best is id 0.
    "min_tokens bans EOS": ({"min_tokens": 3}, "ab\0cd", [a, b, 0, c, d, EOS], "stop", None),
}


@pytest.mark.parametrize("params, text, ids, finish, stop", ENDS.values(), ids=ENDS)
def test_a_text_ends_with_its_reasons_and_without_the_token_that_ended_it(
    params, text, ids, finish, stop
):
    forward = scripted([a, b, EOS, c, d, EOS, a, a, a])
    engine = build_stub(forward, 257, tokenizer=BytesAndEnd(), eos_token_ids=[EOS])
    engine.add_request([0], SamplingParams(**(GREEDY | params)))
    (output,) = run(engine).values()
    completion = output.outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (
        text,
        finish,
        stop,
    )
    assert completion.token_ids == ids


@pytest.mark.parametrize(
    "params, ids, finish",
    [
        ({}, [5], "stop"),
        ({"min_tokens": 2}, [0, 0, 7, 5], "stop"),  # neither 5 nor 6: the next best is 0
        ({"ignore_eos": True, "max_tokens": 4}, [5, 6, 7, 5], "length"),
    ],
)
def test_a_text_may_end_with_any_of_several_tokens(params, ids, finish):
    engine = build_stub(scripted([5, 6, 7, 5]), 257, eos_token_ids=[6, 5])
    engine.add_request([0], SamplingParams(**(GREEDY | params)))
    (completion,) = run(engine)["0"].outputs
    assert (completion.token_ids, completion.finish_reason) == (ids, finish)
    assert completion.stop_reason is None


@pytest.mark.parametrize("eos_token_id", [-1, 257, 50256])
def test_an_eos_outside_the_vocabulary_never_comes(eos_token_id):
    """min_tokens bans EOS by its id: an id outside would ban another token, or crash the step."""
    engine = build_stub(scripted([5, 256, 5, 5]), 257, eos_token_ids=[eos_token_id])
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


PROMPT_LOGPROBS = [  # the step's budget, the request's params
    (1, {}),
    (20, {}),
    (UNLIMITED, {"n": 3, "temperature": 1.0, "seed": 1}),  # they come once, not with each text
]


@pytest.mark.parametrize("budget, params", PROMPT_LOGPROBS, ids=str)
def test_prompt_logprobs_are_collected_across_chunks(model, log_softmax, budget, params):
    engine = build(model, max_num_batched_tokens=budget)
    assert_equal_prompt_logprobs(prompt_logprobs_of(engine, PROMPTS, **params), log_softmax)


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
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("part", ["forward", "draw"])
@pytest.mark.parametrize("at_call", [1, 4, 12])
def test_a_step_that_raises_is_undone_and_repeated(
    model, expected, log_softmax, at_call, part, error
):
    engine = build(model, max_num_batched_tokens=40)
    owner = {"forward": engine, "draw": engine.sampler}[part]
    function, calls = getattr(owner, part), iter(range(1, 10_000))

    def failing(*args):
        if next(calls) == at_call:
            raise error
        return function(*args)

    setattr(owner, part, failing)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, prompt_logprobs=2)
    ids = [engine.add_request(prompt, params) for prompt in PROMPTS]
    finished = {}
    with pytest.raises(type(error)):
        while engine.has_unfinished():
            finished |= {output.request_id: output for output in engine.step().finished}
    engine.scheduler.check_integrity()
    assert engine.has_unfinished() and engine.scheduler.running == []  # all wait
    assert engine.scheduler.allocator.num_free == 64
    finished |= run(engine)
    assert [finished[i].outputs[0].token_ids for i in ids] == expected.tokens
    assert_equal_prompt_logprobs([finished[i].prompt_logprobs for i in ids], log_softmax)


LOOP = ("engine.py", "scheduler.py", "outputs.py", "block_allocator.py", "sequence.py")


def interrupted_run(line):
    """Texts, with each delta as it came, of a run that is interrupted once; and its lines."""
    calls, counter = count(1), [0]

    def forward(batch):
        if next(calls) == 4:
            raise RuntimeError("out of memory")  # so that the repair is interrupted too
        return scripted([*b"abcdefghijklmnopq"])(batch)

    engine = build_stub(forward, 257, num_blocks=9, tokenizer=BytesAndEnd())
    engine.add_request([0], SamplingParams(temperature=0, max_tokens=8))
    engine.add_request([0], SamplingParams(seed=1, top_k=1, max_tokens=9, n=2, stop="gh"))
    fork = SamplingParams(temperature=0, max_tokens=7)
    engine.add_request([0], fork, strategy=two_children(1))
    engine.add_request([0], SamplingParams(temperature=0, max_tokens=12, logprobs=1))
    finished, deltas, aborted = {}, {}, []
    for number in range(100):
        if not engine.has_unfinished():
            assert engine.scheduler.allocator.num_free == 9 and engine.requests == {}
            return finished, deltas, aborted, counter[0]
        if number == 3:
            engine.abort("3")
        with contextlib.suppress(RuntimeError, KeyboardInterrupt):
            with interrupted_at(line, LOOP, counter):
                step = None
                step = engine.step()
        if step is not None:
            engine.scheduler.check_integrity()
            aborted += [request.request_id for request in step.aborted]
            for o in step.finished:
                assert o.request_id not in finished
                finished[o.request_id] = [(t.text, t.token_ids, t.finish_reason) for t in o.outputs]
            for delta in step.deltas:
                key = delta.request_id, delta.index
                deltas[key] = deltas.get(key, "") + delta.text
    pytest.fail("100 steps, and no end")


def test_ctrl_c_at_any_line_of_a_step_loses_no_token_and_reports_none_twice():
    want, texts, aborted, num_lines = interrupted_run(-1)
    assert want["0"] == [("abcdefgh", [*b"abcdefgh"], "length")]
    assert want["1"] == [("abcdef", [*b"abcdefgh"], "stop")] * 2
    assert [text for text, _, _ in want["2"]] == ["abcdefg", "a\0cdefg"]
    assert (sorted(want), aborted) == (["0", "1", "2"], ["3"]) and num_lines > 3000
    texts.pop(("3", 0))  # how far the aborted one came may differ
    for line in random.Random(SEED).sample(range(1, num_lines), 120):
        finished, deltas, aborted_again, _ = interrupted_run(line)
        deltas.pop(("3", 0), None)
        assert (finished, deltas, aborted_again) == (want, texts, aborted), line


# ---- one sequence fails, the others do not -------------------------------------------------------
def test_logits_that_are_nan_end_only_their_own_sequence(model, expected):
    engine = build(model)
    forward = engine.forward

    def poisoned(batch):
        logits = forward(batch)
        if len(logits) == 6 and batch.positions[batch.sample_rows[2]] >= LENGTHS[2] + 4:
            logits[2] = math.nan
        return logits

    engine.forward = poisoned
    for prompt in PROMPTS:
        engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=NUM_TOKENS))
    outputs = [output.outputs[0] for _, output in sorted(run(engine).items())]
    bad = outputs[2]
    assert (bad.token_ids, bad.finish_reason) == (expected.tokens[2][:5], "error")
    assert bad.error == "the logits are NaN, +inf or all -inf: there is no token to choose"
    others = [o.token_ids for o in outputs if o is not bad]
    assert others == expected.tokens[:2] + expected.tokens[3:]
    assert all(o.error is None for o in outputs if o is not bad)


WRONG = {  # a strategy's continuations of `seq` -> what the error says
    "it raises": (lambda seq: 1 / 0, "ZeroDivisionError: division by zero"),
    "no list": (lambda seq: None, "TypeError"),
    "no Continuation": (lambda seq: [(seq, [1])], "is no Continuation"),
    "a stranger's": (lambda seq: [Continuation(copy.copy(seq), [1])], "of one of its sequences"),
    "no token": (lambda seq: [Continuation(seq, [])], "a list of at least one id"),
    "an unknown token": (lambda seq: [Continuation(seq, [97])], "token id 97: ids are integers"),
    "a bool": (lambda seq: [Continuation(seq, [True])], "token id True"),
    "no continuation at all": (lambda seq: [], "no continuation for any sequence"),
    "a logprob too many": (
        lambda seq: [Continuation(seq, [1], [{}, {}])],
        "a list with one entry a token",
    ),
    "a negative seed": (lambda seq: [Continuation(seq, [1], seed=-1)], "seed is -1"),
}


@pytest.mark.parametrize("continuations, message", WRONG.values(), ids=WRONG)
def test_a_strategy_that_fails_ends_its_own_request(model, expected, continuations, message):
    engine = build(model)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    engine.add_request(PROMPTS[0], params, strategy=lambda seqs, logits: continuations(seqs[0]))
    engine.add_request(PROMPTS[1], params)
    finished = run(engine)
    (failed,) = finished["0"].outputs
    assert (failed.token_ids, failed.finish_reason) == ([], "error")
    assert failed.error.startswith("the request's strategy failed") and message in failed.error
    assert finished["1"].outputs[0].token_ids == expected.tokens[1]


# ---- watchers ------------------------------------------------------------------------------------
def test_watchers_see_each_output_once_and_one_that_raises_is_removed(model):
    seen = []
    engine = build(model, watchers=[seen.append])

    def broken(step):
        raise RuntimeError("no disk")

    engine.watchers.append(broken)
    with pytest.warns(UserWarning, match="no disk.*no longer watches"):
        steps = []
        generate(engine, PROMPTS[:2], steps.append, max_tokens=3)
    assert seen == steps and engine.watchers == [seen.append]


# ---- strategies: forks, drops, drafts ------------------------------------------------------------
def two_children(at):
    """A greedy strategy that forks a sequence once, after `at` generated tokens.

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
    """The parent's and the child's text, each computed alone."""
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
    """Blocks of 4. After 6 computed tokens both share a half full block, and one of them must copy
    it before it writes. After 8 both shared blocks are full, and each takes a new one."""
    (prompt,) = random_prompts([length], seed=8)
    engine = build(model)
    params = SamplingParams(temperature=0, max_tokens=10)
    engine.add_request(prompt, params, strategy=two_children(at))
    steps = []
    output = run(engine, steps.append)["0"]
    assert [o.token_ids for o in output.outputs] == fork_oracle(model, prompt, at, 10)
    assert [o.index for o in output.outputs] == [0, 1]
    assert sum(step.blocks.copied for step in steps) == copies


@pytest.mark.parametrize("options", [{"max_num_batched_tokens": 5}, {"num_blocks": 9}], ids=str)
def test_forks_under_preemption_write_the_same_and_all_blocks_are_counted(model, options):
    prompts = random_prompts([6, 9, 14], seed=10)
    numbers = random.Random(11)
    engine = build(model, **options)
    allocator, scheduler = engine.scheduler.allocator, engine.scheduler
    params = SamplingParams(temperature=0, max_tokens=10)
    for prompt in prompts:
        engine.add_request(prompt, params, strategy=two_children(1))
    steps = []

    def preempt_one(step):
        steps.append(step)
        held = sum(step.blocks.taken - step.blocks.freed for step in steps)
        assert held == allocator.num_blocks - allocator.num_free
        if len(scheduler.running) > 1 and numbers.random() < 0.5:
            scheduler.preempt(numbers.choice(scheduler.running))  # the next step counts its blocks

    finished = run(engine, preempt_one)
    for i, prompt in enumerate(prompts):
        got = [output.token_ids for output in finished[str(i)].outputs]
        assert got == fork_oracle(model, prompt, 1, 10)
    assert scheduler.num_preemptions > 3


def test_a_parent_without_a_continuation_is_dropped_and_not_reported(model):
    """Two beams fork at the first token; at the fourth the first of them is dropped."""
    fork = two_children(0)

    def strategy(sequences, logits):
        continuations = fork(sequences, logits)
        return [c for c in continuations if c.parent.num_generated < 3 or c.parent.index == 1]

    (prompt,) = random_prompts([6], seed=8)
    engine = build(model)
    params = SamplingParams(temperature=0, max_tokens=10)
    engine.add_request(prompt, params, strategy=strategy)
    (output,) = run(engine)["0"].outputs
    assert (output.index, output.token_ids) == (1, fork_oracle(model, prompt, 0, 10)[1])


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


# ---- what a step reports -------------------------------------------------------------------------
def test_a_step_names_its_sequences_and_counts_its_blocks(model):
    engine = build(model, max_num_batched_tokens=10)
    params = SamplingParams(temperature=0, max_tokens=2)
    engine.add_request(PROMPTS[2], params)  # 7 tokens
    engine.add_request(PROMPTS[3], params)  # 15 tokens
    got = []

    def look(step):
        plan = step.plan
        spans = [(e.seq.request.request_id, e.start, e.num_new_tokens) for e in plan.scheduled]
        with_token = [delta.request_id for delta in step.deltas]
        assert [seq.request.request_id for seq in plan.sampled] == with_token
        assert min(step.timings) > 0 and step.timings.total == sum(step.timings)
        got.append((spans, with_token, step.blocks.taken, step.blocks.freed))

    run(engine, look)
    assert got == [
        ([("0", 0, 7), ("1", 0, 3)], ["0"], 2 + 4, 0),
        ([("0", 7, 1), ("1", 3, 9)], ["0"], 0, 2),
        ([("1", 12, 3)], ["1"], 0, 0),
        ([("1", 15, 1)], ["1"], 0, 4),
    ]
