"""Sequences that share blocks: forks, copies before writes, and requests of several sequences.

The first part has no model: `Loop` of test_scheduler.py carries out each plan, and checks every
token that is read. `Forks` adds what must hold for shared blocks after every plan and every update.
"""

import random
from collections import Counter

import pytest
from test_scheduler import Loop, name, names, next_token, rows, scramble, undo, written_alone

from sequence import FINISHED, Continuation, Request, Sequence


class Forks(Loop):
    """A loop whose requests have several sequences: n texts of one prompt, or beams."""

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
