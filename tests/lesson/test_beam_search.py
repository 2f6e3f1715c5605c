"""Beam search against transformers' `generate(num_beams=...)`, and against all texts there are.

Token ids must be equal, scores to the digits of transformers' float32. Whatever disturbs a search
(other requests, chunks, a small pool, an exception) must change neither.
"""

import functools
import itertools
import math
import random
from collections import Counter

import pytest
import torch
import traffic
from test_engine import build_stub, dense_logits, run
from transformers import GPT2LMHeadModel
from worlds import some

from beam_search import BeamSearch, BeamSearchParams, add_beam_search, best_first
from checkpoints.train_tiny import save_model
from llm import LLM, SamplingParams

WIDTHS = [2, 3, 4, 5, 6, 7, 8]
STOPPING = [True, False, "never"]
PENALTIES = [-1.0, 0.0, 0.5, 1.0, 2.0]
PROMPTS = [[7, 3, 9, 1, 4], [20, 33, 5], [8] * 11, [50]]


def texts_of(output):
    """(token ids, score) of each text, best first."""
    return [(c.token_ids, c.cumulative_logprob) for c in output.outputs]


def assert_same(got, want):
    """The same texts in the same order, and scores equal to seven digits."""
    assert [ids for ids, _ in got] == [ids for ids, _ in want]
    assert [score for _, score in got] == pytest.approx([score for _, score in want], rel=1e-6)


# ---- transformers --------------------------------------------------------------------------------
def transformers_beams(theirs, prompts, params, eos_token_ids):
    """The texts of each prompt, and the number of steps: one batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    output = theirs.generate(
        ids,
        attention_mask=mask,
        num_beams=params.beam_width,
        num_return_sequences=params.num_return_sequences or params.beam_width,
        max_new_tokens=params.max_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        do_sample=False,
        eos_token_id=list(eos_token_ids),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    # A beam index for each generated token, EOS included, and -1 for the padding behind them.
    lengths = (output.beam_indices >= 0).sum(dim=1).tolist()
    rows = output.sequences[:, longest:].tolist()
    texts = [(row[:n], s) for row, n, s in zip(rows, lengths, output.sequences_scores.tolist())]
    num = len(texts) // len(prompts)
    return [texts[i * num : (i + 1) * num] for i in range(len(prompts))], len(output.scores)


@pytest.fixture(scope="module")
def twins(tiny_gpt, tmp_path_factory):
    """A small random model, here and in transformers, in float64."""
    model = tiny_gpt(seed=3, dtype=torch.float64, n_layer=1, n_head=2, n_embd=32)
    folder = tmp_path_factory.mktemp("twin")
    save_model(model, folder, torch.float64)
    return model, GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64).eval()


# EOS ids that end many of the texts; with two or three of them more candidates are looked at.
EOS_IDS = [(36,), (64, 75), (62, 82, 29)]


def test_ids_and_scores_are_those_of_transformers(twins):
    model, theirs = twins
    llm = LLM(model, num_blocks=200, block_size=4)
    lengths = Counter()
    for width, stopping, penalty, eos in some(80, WIDTHS, STOPPING, PENALTIES, EOS_IDS):
        params = BeamSearchParams(width, 10, penalty, stopping)
        llm.engine.eos_token_ids = eos
        want, _ = transformers_beams(theirs, PROMPTS, params, eos)
        for output, texts in zip(llm.beam_search(PROMPTS, params), want, strict=True):
            assert_same(texts_of(output), texts)
            lengths.update(len(ids) for ids, _ in texts)
            ends = ["stop" if ids[-1] in eos else "length" for ids, _ in texts]
            assert [completion.finish_reason for completion in output.outputs] == ends
    assert len(lengths) == 10 and lengths[10] < 3 * (lengths.total() - lengths[10])


def test_a_search_ends_in_the_step_in_which_transformers_ends_it(twins):
    """Two beams of up to 12 tokens; every second token ends a text. Steps by length_penalty."""
    model, theirs = twins
    llm = LLM(model, num_blocks=64, block_size=4)
    llm.engine.eos_token_ids = tuple(range(0, 97, 2))
    steps = []
    llm.engine.watchers.append(steps.append)
    prompt = [8] * 11
    for stopping, expected in (
        (True, {-1.0: 4, 0.25: 4, 0.5: 4, 1.0: 4}),
        (False, {-1.0: 5, 0.25: 5, 0.5: 5, 1.0: 11}),
        ("never", {-1.0: 5, 0.25: 6, 0.5: 8, 1.0: 12}),
    ):
        for penalty, num_steps in expected.items():
            params = BeamSearchParams(2, 12, penalty, stopping)
            steps.clear()
            llm.beam_search(prompt, params)
            _, of_theirs = transformers_beams(theirs, [prompt], params, llm.engine.eos_token_ids)
            assert (len(steps), of_theirs) == (num_steps, num_steps)


def test_one_beam_is_greedy(twins):
    model, theirs = twins
    llm = LLM(model, num_blocks=64, block_size=4)
    for prompt in PROMPTS:
        options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
        want = theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        (output,) = llm.beam_search(prompt, BeamSearchParams(1, 10))
        assert [completion.token_ids for completion in output.outputs] == [want]


def test_the_shipped_model_searches_as_transformers_does(shipped_model_folder):
    llm = LLM(shipped_model_folder, dtype="float64", num_blocks=128)
    theirs = GPT2LMHeadModel.from_pretrained(shipped_model_folder, dtype=torch.float64).eval()
    prompts = ["Once upon a time there was a", '"Who is there?" cried the wolf.']
    ids = [llm.tokenizer.encode(prompt) for prompt in prompts]
    for params in (
        BeamSearchParams(4, 24, num_return_sequences=2),
        BeamSearchParams(3, 12, length_penalty=2.0, early_stopping="never"),
    ):
        want, _ = transformers_beams(theirs, ids, params, llm.engine.eos_token_ids)
        for output, texts in zip(llm.beam_search(prompts, params), want, strict=True):
            assert_same(texts_of(output), texts)
            assert all(c.text in llm.tokenizer.decode(c.token_ids) for c in output.outputs)


# ---- all texts there are -------------------------------------------------------------------------
@torch.inference_mode()
def all_texts(model, prompt, max_tokens, eos, penalty):
    """(token ids, score) of each text, best first; every token is computed without a cache."""
    complete, going_on = [], [([], 0.0)]
    for length in range(1, max_tokens + 1):
        longer = []
        for ids, total in going_on:
            logprobs = dense_logits(model, prompt + ids)[-1].log_softmax(-1).tolist()
            longer += [([*ids, i], total + logprob) for i, logprob in enumerate(logprobs)]
        for ids, total in longer:
            if ids[-1] == eos or length == max_tokens:
                complete.append((ids, total / length**penalty))
        going_on = [text for text in longer if text[0][-1] != eos]
    return sorted(complete, key=lambda text: -text[1])


@pytest.mark.parametrize("block_size, stopping", list(zip([1, 2, 3], STOPPING)))
def test_with_a_beam_for_each_text_all_are_found_in_their_order(tiny_gpt, block_size, stopping):
    """Three tokens, one of which ends a text, and at most four of them: 31 texts."""
    model = tiny_gpt(seed=2, dtype=torch.float64, vocab_size=3, max_seq_len=16)
    llm = LLM(model, num_blocks=600, block_size=block_size)
    llm.engine.eos_token_ids = (2,)
    prompt = [0, 1, 1]
    for penalty in PENALTIES:
        want = all_texts(model, prompt, 4, eos=2, penalty=penalty)
        assert len(want) == 1 + 2 + 4 + 8 * 3
        (output,) = llm.beam_search(prompt, BeamSearchParams(3**4, 4, penalty, stopping))
        assert_same(texts_of(output), want)
        (output,) = llm.beam_search(prompt, BeamSearchParams(3**4, 4, penalty, stopping, 5))
        assert_same(texts_of(output), want[:5])


def test_impossible_tokens_are_in_no_text():
    """Of four tokens two have logits of -inf. So there are two texts of one token, not four."""

    def forward(batch):
        return torch.tensor([[0.0, -math.inf, 1.0, -math.inf]]).repeat(len(batch.sample_rows), 1)

    engine = build_stub(forward, vocab_size=4)
    params = BeamSearchParams(4, 1)
    add_beam_search(engine, [0], params)
    texts = texts_of(best_first(run(engine)["0"], params))
    assert_same(texts, [([2], -0.3132616875), ([0], -1.3132616875)])  # -log(1 + e**-1), and -1


# ---- blocks --------------------------------------------------------------------------------------
def test_beams_share_a_prompt_and_copy_only_the_block_that_they_write_to():
    """Blocks of 3. A prompt of 7 tokens fills two of them and one slot of a third.

    The first step makes three beams, and each block has three holders. In the second step each beam
    writes into the third block: two beams copy it, and the last that still holds it need not.
    """
    engine = traffic.build()
    scheduler = engine.scheduler
    add_beam_search(engine, [1, 2, 3, 4, 5, 6, 7], BeamSearchParams(3, max_tokens=3))
    seen = []
    while engine.has_unfinished():
        step = engine.step()
        scheduler.check_integrity()
        tables = [seq.block_table for seq in scheduler.running]
        counts = [[scheduler.allocator.ref_count(i) for i in table] for table in tables]
        num_held = scheduler.allocator.num_blocks - scheduler.allocator.num_free
        seen.append((counts, num_held, step.blocks.copied))
    assert seen == [
        ([[3, 3, 3]] * 3, 3, 0),
        ([[3, 3, 1]] * 3, 5, 2),
        ([], 0, 0),
    ]


@pytest.mark.parametrize("width", [2, 4, 8])
def test_beams_hold_fewer_blocks_than_they_have_in_their_tables(width):
    """And a step copies at most one block a beam: never a whole text."""
    engine = traffic.build(num_blocks=200, max_num_seqs=8)
    scheduler = engine.scheduler
    add_beam_search(engine, list(range(11)), BeamSearchParams(width, 30, 0.0, "never"))
    num_held, num_unshared, num_copied = 0, 0, 0
    while engine.has_unfinished():
        step = engine.step()
        scheduler.check_integrity()
        num_held += scheduler.allocator.num_blocks - scheduler.allocator.num_free
        num_unshared += sum(len(seq.block_table) for seq in scheduler.running)
        assert step.blocks.copied < width
        num_copied += step.blocks.copied
    assert 0 < num_copied and num_held < 0.7 * num_unshared


# ---- a search among other work -------------------------------------------------------------------
SEARCHES = [  # (prompt, params)
    ([0, 3, 4], BeamSearchParams(3, 9)),
    ([1, 3, 5, 6, 6], BeamSearchParams(4, 12, 0.0, "never", num_return_sequences=2)),
    ([3] * 11, BeamSearchParams(2, 7, 2.0, early_stopping=True)),
    ([9], BeamSearchParams(5, 8, -1.0)),
]


def add_searches(engine):
    """Queue all of SEARCHES; their parameters by the requests' ids."""
    return {add_beam_search(engine, prompt, params): params for prompt, params in SEARCHES}


def finish(engine, after_step=lambda engine: None):
    """Step until nothing is left; the output of each request id."""
    outputs = {}
    for _ in range(2000):
        if not engine.has_unfinished():
            traffic.check_nothing_is_left(engine)
            return outputs
        outputs |= {output.request_id: output for output in engine.step().finished}
        engine.scheduler.check_integrity()
        after_step(engine)
    pytest.fail("2,000 steps, and no end")


@functools.cache
def alone():
    """The texts of each of SEARCHES from an engine of its own with room for all."""
    texts = []
    for prompt, params in SEARCHES:
        engine = traffic.build(num_blocks=200, max_num_seqs=16)
        request_id = add_beam_search(engine, prompt, params)
        texts.append(texts_of(best_first(finish(engine)[request_id], params)))
    assert len({tuple(ids) for found in texts for ids, _ in found}) == 3 + 2 + 2 + 5
    return texts


def assert_as_alone(outputs, params):
    for (request_id, of_request), want in zip(params.items(), alone(), strict=True):
        assert_same(texts_of(best_first(outputs[request_id], of_request)), want)


@pytest.mark.parametrize("kind", traffic.ENGINES)
def test_searches_beside_sampled_requests_change_no_token_of_either(kind):
    engine = traffic.build(kind, num_blocks=300, max_num_seqs=60, budget=200)
    sampled = {traffic.add(engine, spec): i for i, spec in enumerate(traffic.SPECS[:12])}
    params = add_searches(engine)
    outputs = finish(engine)
    assert_as_alone(outputs, params)
    for request_id, index in sampled.items():
        assert traffic.content(outputs[request_id]) == traffic.alone(index)


def test_requests_with_the_same_strategy_are_searched_in_one_call():
    params = BeamSearchParams(3, 9)
    strategy, calls = BeamSearch(params), []

    def counting(sequences, logits):
        calls.append({seq.request.request_id for seq in sequences})
        return strategy(sequences, logits)

    engine = traffic.build(num_blocks=200, max_num_seqs=16)
    prompts = [[0, 3, 4], [9, 9], [0, 3, 4]]
    for prompt in prompts:
        engine.add_request(prompt, params.sampling_params(), strategy=counting)
    outputs = finish(engine)
    assert calls[0] == {"0", "1", "2"} and len(calls) <= 9
    for request_id in ("0", "2"):
        assert_same(texts_of(best_first(outputs[request_id], params)), alone()[0])


@pytest.mark.parametrize("block_size, num_blocks", [(3, 24), (1, 68), (4, 20), (16, 8)])
def test_searches_that_preempt_each_other_find_the_same(block_size, num_blocks):
    """The pool has room for the largest of the searches, and for nothing beside it."""
    engine = traffic.build(num_blocks=num_blocks, block_size=block_size, max_num_seqs=16, budget=60)
    params = add_searches(engine)
    outputs = finish(engine)
    assert engine.scheduler.num_preemptions > 2
    assert_as_alone(outputs, params)


@pytest.mark.parametrize("num_running", [5, 6, 9])
def test_a_search_waits_until_all_of_its_beams_may_run(num_running):
    """The largest search has five beams. With room for six sequences it runs beside one other."""
    engine = traffic.build(num_blocks=200, max_num_seqs=num_running)
    params = add_searches(engine)
    assert_as_alone(finish(engine), params)


@pytest.mark.parametrize("budget", range(5, 21))
def test_a_budget_of_any_size_changes_no_text(budget):
    """Five beams need five tokens a step at least. Prompts, and beams that return after a
    preemption, are computed in chunks."""
    engine = traffic.build(num_blocks=26, max_num_seqs=8, budget=budget)
    params = add_searches(engine)
    assert_as_alone(finish(engine), params)


@pytest.mark.parametrize("kind", traffic.ENGINES)
def test_preemptions_at_any_step_change_no_text(kind):
    numbers = random.Random(5)

    def preempt_one(engine):
        running = engine.scheduler.running
        if running and numbers.random() < 0.4:
            engine.scheduler.preempt(numbers.choice(running))

    engine = traffic.build(kind, num_blocks=60, max_num_seqs=12, budget=30)
    sampled = {traffic.add(engine, spec): i for i, spec in enumerate(traffic.SPECS[:4])}
    params = add_searches(engine)
    outputs = finish(engine, preempt_one)
    assert engine.scheduler.num_preemptions > 20
    assert_as_alone(outputs, params)
    for request_id, index in sampled.items():
        assert traffic.content(outputs[request_id]) == traffic.alone(index)


@pytest.mark.parametrize("kind", traffic.ENGINES)
def test_an_exception_in_a_step_is_undone_and_changes_no_text(kind):
    """In each step once before the forward, and once in the update, when half of it is done."""
    engine = traffic.build(kind, num_blocks=200, max_num_seqs=16, budget=200)
    params = add_searches(engine)
    forward, update = engine.forward, engine.scheduler.update
    calls, num_raised = itertools.count(), 0

    def raising(batch):
        if next(calls) % 3 == 0:
            raise RuntimeError("a device error")
        return forward(batch)

    def raising_halfway(plan, continuations):
        if next(calls) % 3 == 0:
            update(plan, continuations[: len(continuations) // 2])
            raise RuntimeError("an error in the update")
        update(plan, continuations)

    engine.forward, engine.scheduler.update = raising, raising_halfway
    outputs = {}
    while engine.has_unfinished():
        try:
            outputs |= {output.request_id: output for output in engine.step().finished}
        except RuntimeError:
            num_raised += 1
        engine.scheduler.check_integrity()
    assert num_raised > 8
    assert_as_alone(outputs, params)


@pytest.mark.parametrize("num_steps", range(10))
def test_an_abort_frees_all_blocks_and_the_others_go_on(num_steps):
    engine = traffic.build(num_blocks=200, max_num_seqs=16)
    params = add_searches(engine)
    outputs = {}
    for _ in range(num_steps):
        outputs |= {output.request_id: output for output in engine.step().finished}
    is_aborted = engine.abort("1")
    assert is_aborted == ("1" not in outputs)
    outputs |= finish(engine)  # all blocks are free at the end
    assert len(outputs) == 4 - is_aborted
    for request_id, want in zip(params, alone(), strict=True):
        if request_id in outputs:
            assert_same(texts_of(best_first(outputs[request_id], params[request_id])), want)


def test_a_search_that_fails_reports_its_error_alone():
    """The third call of the model gives NaN; two texts have ended by then."""
    calls = itertools.count(1)

    def forward(batch):
        value = math.nan if next(calls) == 3 else 0.0
        return torch.tensor([[value, 1.0, 2.0]]).repeat(len(batch.sample_rows), 1)

    engine = build_stub(forward, vocab_size=3, eos_token_ids=[2])
    params = BeamSearchParams(3, 9)
    add_beam_search(engine, [0], params)
    (failed,) = best_first(run(engine)["0"], params).outputs
    assert failed.finish_reason == "error" and "are NaN, +inf or all -inf" in failed.error


# ---- parameters ----------------------------------------------------------------------------------
REFUSED = [
    ({"beam_width": 0}, "beam_width is 0: it must be an integer from 1 to 1024"),
    ({"beam_width": True}, "beam_width is True: it must be an integer from 1 to 1024"),
    ({"beam_width": 2.0}, "beam_width is 2.0: it must be an integer from 1 to 1024"),
    ({"max_tokens": 0}, "max_tokens is 0: it must be an integer of at least 1"),
    ({"length_penalty": math.nan}, "length_penalty is nan: it must be a number from -10 to 10"),
    ({"length_penalty": 11}, "length_penalty is 11: it must be a number from -10 to 10"),
    ({"length_penalty": "1"}, "length_penalty is '1': it must be a number from -10 to 10"),
    ({"early_stopping": 1}, 'early_stopping is 1: it must be True, False or "never"'),
    ({"early_stopping": "always"}, "early_stopping is 'always': it must be True, False or"),
    ({"num_return_sequences": 5}, "num_return_sequences is 5: it must be from 1 to beam_width, 4"),
    ({"num_return_sequences": 0}, "num_return_sequences is 0: it must be from 1 to beam_width, 4"),
]


@pytest.mark.parametrize("fields, sentence", REFUSED)
def test_a_parameter_that_is_not_allowed_is_refused_in_a_sentence(fields, sentence):
    with pytest.raises(ValueError) as error:
        BeamSearchParams(**fields)
    assert str(error.value).startswith(sentence)


REFUSED_SIZES = [  # 5 beams of up to 12 tokens: 4 blocks of 3 each
    ({"max_num_seqs": 4}, "5 sequences have to run in one step, max_num_seqs is 4"),
    ({"budget": 4}, "5 sequences have to run in one step, max_num_batched_tokens is 4"),
    ({"num_blocks": 19}, "5 sequences that run together may need 20 blocks, the pool has 19"),
]


@pytest.mark.parametrize("options, sentence", REFUSED_SIZES, ids=str)
def test_a_search_whose_beams_can_never_run_together_is_refused(options, sentence):
    engine = traffic.build(**options)
    with pytest.raises(ValueError, match=sentence):
        add_beam_search(engine, [1, 2, 3], BeamSearchParams(5, 9))
    traffic.check_nothing_is_left(engine)


def test_a_search_without_max_tokens_fills_the_context(tiny_gpt):
    model = tiny_gpt(seed=3, dtype=torch.float64, n_layer=1, n_head=2, n_embd=32, max_seq_len=12)
    llm = LLM(model, num_blocks=64, block_size=4)
    (output,) = llm.beam_search([1, 2, 3], BeamSearchParams(3, None))
    assert [len(completion.token_ids) for completion in output.outputs] == [9, 9, 9]


def test_beam_search_takes_its_own_parameters_and_generate_takes_others(tiny_gpt):
    llm = LLM(tiny_gpt(), num_blocks=64, block_size=4)
    with pytest.raises(ValueError, match="params is a SamplingParams: give BeamSearchParams"):
        llm.beam_search([1, 2], SamplingParams())
    with pytest.raises(ValueError, match="params is a BeamSearchParams: give a SamplingParams"):
        llm.generate([1, 2], BeamSearchParams())
    with pytest.raises(ValueError, match="token id 97"):
        llm.beam_search([[1, 2], [97]])
    assert not llm.engine.has_unfinished()
    assert [len(output.outputs) for output in llm.beam_search([[1, 2], [5]])] == [4, 4]
