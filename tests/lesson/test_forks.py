"""Sequences that share blocks: forks, copies before writes, and requests of several sequences.

The first part has no model: `Loop` of test_scheduler.py carries out each plan, and checks every
token that is read. `Forks` adds what must hold for shared blocks after every plan and every update.
In the second part an engine serves the stand-in of traffic.py, whose next token depends on every
token that it reads through the block table. The oracle draws one text after the other, without an
engine.
"""

import random
from collections import Counter

import pytest
import torch
import traffic
from test_scheduler import Loop, name, names, next_token, rows, scramble, undo, written_alone

from beam_search import BeamScheduler
from engine import InferenceEngine
from kernels.backends import BACKENDS
from llm import LLM
from model import attend_one_sequence
from sampling import SampleRow, SamplingParams, child_seed, sample, token_logprobs
from sequence import FINISHED, Continuation, Request, Sequence
from speedups.plan_ahead import AheadEngine


class Forks(Loop):
    """A loop whose requests have several sequences: n texts of one prompt, or beams."""

    scheduler_class = BeamScheduler

    def add_texts(self, request_id, num_prompt_tokens, max_tokens, n):
        """A request that forks into n texts with its first token."""
        return self.queue(request_id, num_prompt_tokens, max_tokens, n, False)

    def add_beams(self, request_id, num_prompt_tokens, max_tokens, width):
        """A request whose strategy sees all of its sequences at once."""
        return self.queue(request_id, num_prompt_tokens, max_tokens, width, True)

    def queue(self, request_id, num_prompt_tokens, max_tokens, most, runs_together):
        arrival = len(self.requests)
        prompt = [1000 * (arrival + 1) + i for i in range(num_prompt_tokens)]
        request = Request(
            request_id, prompt, arrival, max_num_sequences=most, runs_together=runs_together
        )
        request.sequences = [Sequence(request, 0, list(prompt), num_prompt_tokens, max_tokens)]
        self.scheduler.add(request)
        self.requests.append(request)
        return request

    def schedule(self):
        plan = super().schedule()
        self.check_plan(plan)
        return plan

    def check_plan(self, plan):
        """A block that is written has one holder, and those that run together are sampled so."""
        block_size, written = self.allocator.block_size, Counter()
        for seq, start, num_new_tokens in plan.scheduled:
            end = start + num_new_tokens
            held = seq.block_table[start // block_size : self.allocator.blocks_needed(end)]
            assert all(self.allocator.ref_count(block_id) == 1 for block_id in held)
            written.update(held)
        assert all(count == 1 for count in written.values())
        targets = [target for _, target in plan.copies]
        assert len(set(targets)) == len(targets) and not set(targets) - set(written)
        for request in {seq.request for seq in plan.sampled}:
            if request.runs_together:
                assert set(unfinished(request)) <= set(plan.sampled)

    def check(self):
        super().check()
        for request in self.requests:
            states = {seq.status for seq in unfinished(request)}
            assert len(states) < 2 or not request.runs_together, "one runs, and one waits"

    def continuations(self, plan):
        """What the stand-ins for a sampler and for a beam search say."""
        futures, seen = [], set()
        for seq in plan.sampled:
            request = seq.request
            if request.runs_together and request not in seen:
                seen.add(request)
                futures += best_children(unfinished(request), request.max_num_sequences)
            elif not request.runs_together:
                num_children = request.max_num_sequences if seq.num_generated == 0 else 1
                token_id = next_token(seq.token_ids)
                futures += [Continuation(seq, [token_id + i]) for i in range(num_children)]
        return futures

    def update(self, plan, continuations=None):
        super().update(plan, self.continuations(plan) if continuations is None else continuations)

    def run_to_the_end(self):
        for _ in range(5000):
            if not self.scheduler.has_unfinished():
                assert self.all_blocks_are_free()
                return
            self.step()
        pytest.fail("5,000 steps, and no end")


def unfinished(request):
    return [seq for seq in request.sequences if seq.status != FINISHED]


def best_children(parents, width):
    """A beam search over two tokens: of all children the `width` with the smallest hashes."""
    found = []
    for parent in parents:
        token_id = next_token(parent.token_ids)
        for child in (token_id, token_id + 1):
            found.append((hash((*parent.token_ids, child)), parent, child))
    found.sort(key=lambda entry: entry[0])
    return [Continuation(parent, [child]) for _, parent, child in found[:width]]


def beams_alone(prompt, num_tokens, width):
    """The same search without a scheduler: the last beams, as sorted texts."""
    beams = [list(prompt)]
    for _ in range(num_tokens):
        parents = [Sequence(None, 0, token_ids, 1, 1) for token_ids in beams]
        children = best_children(parents, width)
        beams = [[*c.parent.token_ids, *c.token_ids] for c in children]
    return sorted(beams)


def texts_alone(prompt, num_tokens, n):
    """n texts that differ in their first token, each written alone."""
    first = next_token(prompt)
    return [written_alone([*prompt, first + i], num_tokens - 1) for i in range(n)]


def check_texts(request):
    """All of a request's texts are those of the oracle."""
    num_tokens = request.sequences[0].max_tokens
    texts = [seq.token_ids for seq in request.sequences if seq.finish_reason == "length"]
    prompt, most = request.prompt_token_ids, request.max_num_sequences
    if request.runs_together:
        assert sorted(texts) == beams_alone(prompt, num_tokens, most)
    else:
        assert texts == texts_alone(prompt, num_tokens, most)


# ---- sequences that run together -----------------------------------------------------------------
def test_beams_get_their_tokens_in_one_step_or_none_of_them_does():
    """Three beams and the single sequence before them: a budget of 3 is too small for all four."""
    loop = Forks(num_blocks=20, budget=3)
    one = loop.add("A", 3, 3)
    request = loop.add_beams("B", 2, 4, width=3)
    assert rows(loop.step()) == [("A", 0, 3)]
    assert rows(loop.step()) == [("A", 3, 1), ("B", 0, 2)]
    assert len(unfinished(request)) == 2  # of one prompt there are two children, of these four
    assert rows(loop.step()) == [("A", 4, 1), ("B", 2, 1), ("B1", 2, 1)]
    assert one.status == FINISHED and len(unfinished(request)) == 3
    loop.add("C", 3, 1)
    plan = loop.step()
    assert sorted(rows(plan))[0][1:] == (3, 1) and plan.num_tokens == 3
    assert plan.sampled == unfinished(request)
    loop.run_to_the_end()
    check_texts(request)


def test_beams_wait_while_their_places_or_the_budget_are_used_by_those_before_them():
    for limits in ({"budget": 4}, {"max_num_seqs": 4}):
        loop = Forks(num_blocks=30, **limits)
        loop.add_beams("A", 1, 5, width=2)
        request = loop.add_beams("B", 1, 5, width=3)
        while len(unfinished(request)) < 3:
            loop.step()
        plan = loop.step()
        assert {seq.request.request_id for seq in plan.sampled} == {"A"}
        loop.run_to_the_end()
        check_texts(request)


def test_beams_are_preempted_together_and_start_together():
    loop = Forks(num_blocks=9, block_size=2)
    first = loop.add("A", 2, 12)
    request = loop.add_beams("B", 3, 5, width=2)
    preempted, started = [], []
    for _ in range(6):
        plan = loop.step()
        preempted.append(names(plan.preempted))
        started.append(names(plan.started))
    (both,) = [found for found in preempted if found]
    assert len(both) == 2 and set(both) <= {"B", "B1", "B2", "B3", "B4", "B5"}
    loop.run_to_the_end()
    check_texts(request)
    assert first.token_ids == written_alone(range(1000, 1002), 12)


def test_beams_that_come_back_compute_all_but_their_last_token_in_pieces():
    loop = Forks(num_blocks=20, budget=4)
    request = loop.add_beams("A", 6, 9, width=2)
    while len(unfinished(request)) < 2 or request.sequences[0].num_generated < 2:
        loop.step()
    one, two = unfinished(request)
    assert len(one.token_ids) == len(two.token_ids) == 8
    loop.scheduler.preempt(two)
    assert loop.scheduler.running == [] and loop.scheduler.num_preemptions == 2
    spans = [rows(loop.step()) for _ in range(4)]
    assert [span for step in spans[:3] for span in step] == [
        (name(one), 0, 4),
        (name(one), 4, 3),  # 1 behind: it waits for the other
        (name(two), 0, 1),
        (name(two), 1, 4),
    ]
    assert spans[3] == [(name(one), 7, 1), (name(two), 5, 3)]  # a budget of 4 is enough for both
    loop.run_to_the_end()
    check_texts(request)


@pytest.mark.parametrize(
    "limits, width, message",
    [
        ({"max_num_seqs": 3}, 4, "4 sequences have to run in one step, max_num_seqs is 3"),
        ({"budget": 2}, 3, "3 sequences have to run in one step, max_num_batched_tokens is 2"),
        (
            {"num_blocks": 11},
            4,
            "4 sequences that run together may need 12 blocks, the pool has 11",
        ),
    ],
    ids=str,
)
def test_beams_that_could_never_run_together_are_refused(limits, width, message):
    loop = Forks(**{"num_blocks": 30} | limits)
    with pytest.raises(ValueError, match=message):
        loop.add_beams("A", 6, 5, width)
    assert not loop.scheduler.has_unfinished()
    loop.add_beams("A", 6, 5, width - 1)
    loop.add_texts("B", 6, 5, width)  # these may take turns
    loop.run_to_the_end()


def test_a_strategy_that_makes_more_children_than_it_promised_ends_its_own_request():
    loop = Forks()
    request, other = loop.add_beams("A", 3, 5, width=2), loop.add("B", 3, 2)
    plan = loop.schedule()
    futures = [Continuation(request.sequences[0], [i]) for i in range(3)]
    loop.update(plan, [*futures, Continuation(other, [next_token(other.token_ids)])])
    assert [seq.finish_reason for seq in request.sequences] == ["error"] * 3
    assert "3 sequences, max_num_sequences 2" in request.sequences[1].error
    loop.run_to_the_end()
    assert other.finish_reason == "length"


# ---- n texts, in the scheduler -------------------------------------------------------------------
def test_a_step_planned_ahead_leaves_out_a_sequence_that_forks_with_the_token_in_flight():
    loop = Forks()
    loop.add_texts("A", 3, 4, n=2)
    one = loop.add("B", 5, 4)
    first = loop.schedule()
    assert names(first.sampled) == ["A", "B"]
    second = loop.scheduler.schedule(in_flight=1)
    assert rows(second) == [("B", 5, 1)]
    loop.update(first)
    assert rows(loop.scheduler.schedule(in_flight=1)) == [("A", 3, 1), ("A1", 3, 1), ("B", 6, 1)]
    assert len(one.token_ids) == 6 and one.num_computed_tokens == 7


def test_all_texts_of_a_request_are_preempted_for_another_request():
    """Blocks of 4. Of 9 blocks A holds 2; the texts share 1, and each holds 2 of its own."""
    loop = Forks(num_blocks=9)
    one = loop.add("A", 4, 14)
    request = loop.add_texts("B", 7, 9, n=3)
    plans = [loop.step() for _ in range(6)]
    assert [names(plan.preempted) for plan in plans] == [[]] * 5 + [["B", "B1", "B2"]]
    assert rows(plans[-1]) == [("A", 8, 1)]
    loop.run_to_the_end()
    check_texts(request)
    assert one.num_preemptions == 0


def test_a_request_alone_in_the_pool_preempts_only_its_last_text():
    """Otherwise it would lose everything whenever the pool is full, and begin again."""
    loop = Forks(num_blocks=5)
    request = loop.add_texts("A", 6, 9, n=3)
    preempted = []
    while not preempted:
        preempted = loop.step().preempted
    assert names(preempted) == ["A2"]
    loop.run_to_the_end()
    check_texts(request)
    assert request.sequences[0].num_preemptions == 0


def test_blocks_and_copies_are_counted_before_the_first_is_taken():
    """Each of two texts writes positions 3 and 4: it needs a new block, and one of them a copy.

    Of 3 blocks 2 are free. The first text takes both. The second one needs one, and is preempted.
    """
    loop = Loop(num_blocks=3)
    one = loop.add("A", 3, 9)
    loop.update(loop.schedule(), [Continuation(one, [11, 12]), Continuation(one, [21, 22])])
    two = one.request.sequences[1]
    assert one.block_table == two.block_table == [0]
    plan = loop.schedule()
    assert rows(plan) == [("A", 3, 2)] and names(plan.preempted) == ["A1"]
    assert plan.copies == [(0, 2)] and one.block_table == [2, 1]
    assert (two.block_table, loop.scheduler.num_blocks_taken) == ([], 3)


# ---- random games --------------------------------------------------------------------------------
def play(seed):
    """Requests of all kinds come, are aborted, preempted and interrupted; counts what happened."""
    numbers = random.Random(seed)
    block_size = numbers.choice([1, 2, 3, 4, 7])
    loop = Forks(
        num_blocks=numbers.choice([8, 12, 16, 40]),
        block_size=block_size,
        max_num_seqs=numbers.choice([3, 4, 8]),
        budget=numbers.choice([4, 7, 64]),
        policy=numbers.choice(
            [lambda seq: seq.request.arrival, lambda seq: -seq.request.arrival, lambda seq: 0]
        ),
    )
    happened, aborted = Counter(), set()

    def add():
        prompt, max_tokens = numbers.randint(1, 9), numbers.randint(1, 8)
        kind = numbers.choice([loop.add_texts, loop.add_beams])
        try:
            kind(str(len(loop.requests)), prompt, max_tokens, numbers.choice([1, 2, 3, 4]))
        except ValueError:
            happened["refused"] += 1

    for number in range(60):
        if number < 40 and numbers.random() < 0.25:
            add()
        plan = loop.schedule()
        happened["copies"] += len(plan.copies)
        happened["preempted"] += len(plan.preempted)
        happened["shared"] += any(loop.allocator.ref_count(i) > 1 for i in range(8))
        act = numbers.random()
        if act < 0.05:  # an interruption, before or after the update
            if numbers.random() < 0.5:
                loop.update(plan)
            scramble(loop.scheduler)
            undo(loop, plan)
            happened["undone"] += 1
            continue
        loop.update(plan)
        if act > 0.9 and loop.scheduler.running:
            loop.scheduler.preempt(numbers.choice(loop.scheduler.running))
        elif act > 0.87 and loop.requests:
            request = numbers.choice(loop.requests)
            for seq in request.sequences:
                loop.scheduler.finish(seq, "abort")
            aborted.add(request)
            happened["aborted"] += 1
        loop.check()
        loop.forget()
    loop.run_to_the_end()
    for request in loop.requests:
        if request not in aborted:
            check_texts(request)
            happened["beams" if request.runs_together else "texts"] += 1
    return happened


def test_random_games_share_blocks_and_no_block_is_written_by_two():
    happened = Counter()
    for seed in range(150):
        happened += play(seed)
    wanted = ["copies", "preempted", "shared", "undone", "aborted", "refused", "beams", "texts"]
    assert all(happened[name] > 100 for name in wanted), happened


# ---- n texts, in an engine -----------------------------------------------------------------------
BOTH = pytest.mark.parametrize("kind", [InferenceEngine, AheadEngine], ids=["plain", "ahead"])
BLOCK_SIZE = 3  # of traffic.build
SAMPLED = {"seed": 3, "max_tokens": 7, "ignore_eos": True}


def text_alone(prompt, params, i, logits_after=lambda ids: traffic.TABLE[[traffic.next_row(ids)]]):
    """The tokens of text i, one after the other, and the log-probability of each."""
    seed, ids, logprobs = child_seed(params.seed, i), list(prompt), []
    for _ in range(params.max_tokens):
        logits = logits_after(ids)
        token_ids, _ = sample(logits, [SampleRow(params, seed, len(ids), ids, len(prompt))])
        (entry,) = token_logprobs(logits, token_ids, [params.logprobs or 0])
        ids.append(token_ids.item())
        logprobs.append(entry[ids[-1]].logprob)
    return ids[len(prompt) :], logprobs


def serve(engine, *requests, after_step=lambda step: None):
    """Serve (prompt, params) pairs; returns the outputs by request id, and all steps."""
    for prompt, params in requests:
        engine.add_request(prompt, params)
    finished, steps = {}, []
    while engine.has_unfinished():
        steps.append(engine.step())
        engine.scheduler.check_integrity()
        finished |= {output.request_id: output for output in steps[-1].finished}
        after_step(steps[-1])
        assert len(steps) < 500
    traffic.check_nothing_is_left(engine)
    return finished, steps


def check_output(output, n):
    """An output has n texts, and they are those of the oracle."""
    prompt, params = output.prompt_token_ids, SamplingParams(**SAMPLED)
    texts = [completion.token_ids for completion in output.outputs]
    assert texts == [text_alone(prompt, params, i)[0] for i in range(n)]
    assert [completion.index for completion in output.outputs] == list(range(n))


def prompt_of(length):
    return [(5 * i + length) % 11 for i in range(length)]


@BOTH
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7])
def test_four_texts_compute_the_prompt_once_and_copy_a_partly_filled_block_three_times(
    kind, length
):
    """Blocks of 3 tokens. After 3 or 6 tokens no block is partly filled."""
    engine = traffic.build(kind)
    calls, copy_blocks = [], engine.cache.copy_blocks
    engine.cache.copy_blocks = lambda copies: (calls.append(list(copies)), copy_blocks(copies))
    finished, steps = serve(engine, (prompt_of(length), SamplingParams(n=4, **SAMPLED)))
    check_output(finished["0"], 4)
    # The last of 7 tokens is never computed.
    assert sum(step.plan.num_tokens for step in steps) == length + 4 * 6
    assert [len(copies) for copies in calls if copies] == [3] * (length % BLOCK_SIZE > 0)
    assert sum(step.blocks.copied for step in steps) == 3 * (length % BLOCK_SIZE > 0)


@BOTH
def test_the_texts_share_the_blocks_of_the_prompt(kind):
    """7 tokens in blocks of 3: two shared blocks, and a third one for each text."""
    engine = traffic.build(kind)
    engine.add_request(prompt_of(7), SamplingParams(n=4, **SAMPLED))
    while len(engine.scheduler.running) < 4:
        engine.step()
    engine.step()
    tables = [seq.block_table for seq in engine.scheduler.running]
    assert len({tuple(table[:2]) for table in tables}) == 1
    assert len({table[2] for table in tables}) == 4
    assert [engine.scheduler.allocator.ref_count(i) for i in tables[0]] == [4, 4, 1]


@BOTH
def test_texts_in_a_pool_without_a_free_block_for_the_copies_are_preempted_and_the_same(kind):
    engine = traffic.build(kind, num_blocks=4)
    finished, _ = serve(engine, (prompt_of(4), SamplingParams(n=3, **SAMPLED)))
    check_output(finished["0"], 3)
    assert engine.scheduler.num_preemptions > 0


@BOTH
@pytest.mark.parametrize("limits", [{"max_num_seqs": 4}, {"max_num_seqs": 1}], ids=str)
def test_more_texts_than_max_num_seqs_take_their_turns(kind, limits):
    engine = traffic.build(kind, num_blocks=60, **limits)
    finished, steps = serve(engine, (prompt_of(5), SamplingParams(n=9, **SAMPLED)))
    check_output(finished["0"], 9)
    assert max(len(step.plan.scheduled) for step in steps) == limits["max_num_seqs"]


@BOTH
@pytest.mark.parametrize("budget", [1, 2, 3, 4, 7])
def test_the_prompt_of_n_texts_may_arrive_in_chunks(kind, budget):
    engine = traffic.build(kind, budget=budget)
    requests = [(prompt_of(length), SamplingParams(n=3, **SAMPLED)) for length in (7, 9)]
    finished, steps = serve(engine, *requests)
    for output in finished.values():
        check_output(output, 3)
    assert sum(step.plan.num_tokens for step in steps) == 7 + 9 + 2 * 3 * 6


@BOTH
@pytest.mark.parametrize("at_step", range(0, 9, 2))
def test_an_abort_frees_the_blocks_of_all_texts_and_of_no_other_request(kind, at_step):
    engine = traffic.build(kind)
    params = SamplingParams(n=3, **SAMPLED)
    doomed = engine.add_request(prompt_of(7), params)
    for _ in range(at_step):
        engine.step()
    assert engine.abort(doomed) == (at_step < 8)  # it is done after 7 steps
    finished, _ = serve(engine, (prompt_of(4), params))
    assert list(finished) == ["1"]
    check_output(finished["1"], 3)


@BOTH
def test_a_block_that_a_preempted_text_shared_stays_with_the_others(kind):
    engine = traffic.build(kind)
    scheduler, counts = engine.scheduler, []

    def preempt_the_second(step):
        if len(scheduler.running) == 3 and not scheduler.num_preemptions:
            first = scheduler.running[0].block_table[0]
            counts.append(scheduler.allocator.ref_count(first))
            scheduler.preempt(scheduler.running[1])
            counts.append(scheduler.allocator.ref_count(first))

    request = prompt_of(7), SamplingParams(n=3, **SAMPLED)
    finished, _ = serve(engine, request, after_step=preempt_the_second)
    check_output(finished["0"], 3)
    assert counts == [3, 2]


@BOTH
def test_the_prompt_of_n_texts_is_scored_once_and_each_text_has_its_log_probabilities(kind):
    params = SamplingParams(n=3, prompt_logprobs=2, logprobs=1, **SAMPLED)
    alone = SamplingParams(prompt_logprobs=2, **SAMPLED)
    requests = [(prompt_of(7), params), (prompt_of(7), alone)]
    finished, _ = serve(traffic.build(kind, budget=4), *requests)
    check_output(finished["0"], 3)
    assert finished["0"].prompt_logprobs == finished["1"].prompt_logprobs
    assert len(finished["0"].prompt_logprobs) == 7
    for i, completion in enumerate(finished["0"].outputs):
        _, logprobs = text_alone(prompt_of(7), params, i)
        chosen = zip(completion.logprobs, completion.token_ids, strict=True)
        assert [entry[token_id].logprob for entry, token_id in chosen] == logprobs
        assert completion.cumulative_logprob == pytest.approx(sum(logprobs), abs=1e-12)


@BOTH
def test_each_text_is_streamed_under_its_index(kind):
    streams = {}
    finished, steps = serve(traffic.build(kind), (prompt_of(4), SamplingParams(n=3, **SAMPLED)))
    for delta in [delta for step in steps for delta in step.deltas]:
        streams.setdefault(delta.index, []).append((delta.token_ids, delta.text))
    for completion in finished["0"].outputs:
        ids, texts = zip(*streams.pop(completion.index))
        assert [i for part in ids for i in part] == completion.token_ids
        assert all(len(part) == 1 for part in ids) and "".join(texts) == completion.text
    assert streams == {}


def test_several_greedy_texts_are_refused():
    for params in ({"n": 2}, {"best_of": 2}):
        with pytest.raises(ValueError, match="is 2: it must be 1 when using greedy sampling"):
            SamplingParams(temperature=0, **params)


@BOTH
def test_a_step_that_forks_and_fails_is_undone_and_forks_again(kind):
    engine = traffic.build(kind)
    engine.add_request(prompt_of(5), SamplingParams(n=3, **SAMPLED))
    (request,) = engine.requests.values()
    finish_step = engine.output_processor.finish_step

    def failing(plan, started):
        if len(request.sequences) == 3:
            engine.output_processor.finish_step = finish_step
            raise KeyboardInterrupt
        return finish_step(plan, started)

    engine.output_processor.finish_step = failing
    with pytest.raises(KeyboardInterrupt):
        while True:
            engine.step()
    assert len(request.sequences) == 1 and request.sequences[0].num_generated == 0
    engine.scheduler.check_integrity()
    finished, _ = serve(engine)
    check_output(finished["0"], 3)


# ---- best_of -------------------------------------------------------------------------------------
@BOTH
@pytest.mark.parametrize("logprobs", [None, 1])
def test_of_best_of_texts_the_n_likeliest_per_token_are_returned_the_best_first(kind, logprobs):
    """The texts end at different lengths, so the sum and the mean rank them differently."""
    params = {"seed": 1, "max_tokens": 9, "stop_token_ids": [0, 2]}
    prompts = [prompt_of(length) for length in (2, 3, 4, 5, 6, 7)]
    orders = set()
    for prompt in prompts:
        every, _ = serve(traffic.build(kind), (prompt, SamplingParams(n=5, logprobs=0, **params)))
        texts = {completion.index: completion for completion in every["0"].outputs}

        def mean(i):
            return texts[i].cumulative_logprob / len(texts[i].token_ids)

        wanted = SamplingParams(n=2, best_of=5, logprobs=logprobs, **params)
        finished, _ = serve(traffic.build(kind), (prompt, wanted))
        best = finished["0"].outputs
        assert [o.index for o in best] == sorted(texts, key=mean, reverse=True)[:2]
        assert [o.token_ids for o in best] == [texts[o.index].token_ids for o in best]
        assert all(o.cumulative_logprob == texts[o.index].cumulative_logprob for o in best)
        assert [o.logprobs is None for o in best] == [logprobs is None] * 2
        by_sum = sorted(texts, key=lambda i: texts[i].cumulative_logprob, reverse=True)[:2]
        orders.add([o.index for o in best] == by_sum)
    assert orders == {True, False}


def test_best_of_is_at_least_n():
    with pytest.raises(ValueError, match="best_of is 2: it must be at least n, 3"):
        SamplingParams(n=3, best_of=2)
    assert SamplingParams(n=3, best_of=3).needs_logprobs is False


def test_a_text_with_an_error_is_returned_only_if_there_are_no_others():
    """The stand-in spoils the logits of a sequence after four tokens, if its last one is odd."""
    engine = traffic.build()
    forward = engine.forward

    def spoiled(batch):
        logits = forward(batch)
        is_late = batch.positions[batch.sample_rows] >= 4
        logits[is_late & (batch.input_ids[batch.sample_rows] % 2 == 1), 3] = float("nan")
        return logits

    engine.forward = spoiled
    params = SamplingParams(n=2, best_of=6, seed=2, max_tokens=3, ignore_eos=True)
    finished, _ = serve(engine, (prompt_of(3), params))
    assert [o.error for o in finished["0"].outputs] == [None, None]
    params = SamplingParams(n=6, seed=2, max_tokens=3, ignore_eos=True)
    finished, _ = serve(engine, (prompt_of(3), params))
    assert 0 < sum(o.error is not None for o in finished["1"].outputs) <= 4


# ---- a real model --------------------------------------------------------------------------------
ON_CPU = [
    name
    for name, backend in BACKENDS.items()
    if "triton" not in name and backend.missing is None and backend.device in (None, "cpu")
]


@pytest.mark.parametrize("plan_ahead", [False, True])
@pytest.mark.parametrize("backend", ON_CPU)
def test_n_texts_of_a_real_model_are_those_of_dense_attention(tiny_gpt, backend, plan_ahead):
    """In float64, in a pool so small that texts are preempted; blocks of 4 tokens."""
    model = tiny_gpt(seed=5, dtype=torch.float64)

    @torch.inference_mode()
    def dense(ids):
        hidden = model(torch.tensor(ids), torch.arange(len(ids)), attend_one_sequence)
        return model.logits(hidden[-1:])

    llm = LLM(model, block_size=4, num_blocks=9, backend=backend, plan_ahead=plan_ahead)
    prompts = [[11, 5, 7, 2, 9, 1], [3, 1, 4, 1, 5, 9, 2, 6]]
    params = SamplingParams(n=3, seed=4, max_tokens=8)
    for output in llm.generate(prompts, params):
        texts = [completion.token_ids for completion in output.outputs]
        prompt = output.prompt_token_ids
        assert texts == [text_alone(prompt, params, i, dense)[0] for i in range(3)]
    assert llm.engine.scheduler.num_preemptions > 0
