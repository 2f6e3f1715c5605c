"""The scheduler without a model: who runs, who waits, and who holds which blocks.

A stand-in replaces model and cache. For each token it writes the text up to that token into the
token's slot, because K and V depend on that text. It checks every slot that a step reads. So a step
that reads a block that was not copied, not computed again or is another sequence's fails. The next
token is a function of the text: a preempted sequence must write what it would have written alone.
"""

import math
import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from block_allocator import BlockAllocator
from prefix_cache import PrefixCache
from scheduler import Scheduler, reserve_now
from sequence import Continuation, Request, Sequence


def next_token(token_ids):
    """What the stand-in writes after a text."""
    return hash(tuple(token_ids)) % 1000


def written_alone(prompt_token_ids, num_tokens):
    """The oracle: one token after the other, alone."""
    token_ids = list(prompt_token_ids)
    for _ in range(num_tokens):
        token_ids.append(next_token(token_ids))
    return token_ids


def name(seq):
    """`A` for the first sequence of request A, `A1` for its second."""
    return f"{seq.request.request_id}{seq.index or ''}"


def names(sequences):
    return [name(seq) for seq in sequences]


def rows(plan):
    """A plan as (name, start, number of new tokens)."""
    return [(name(seq), start, num_new_tokens) for seq, start, num_new_tokens in plan.scheduled]


class Loop:
    """A scheduler and the stand-in for model and cache; counts are checked before every step."""

    scheduler_class = Scheduler

    def __init__(
        self,
        num_blocks=8,
        block_size=4,
        *,
        max_num_seqs=8,
        budget=64,
        max_seq_len=128,
        allocator=BlockAllocator,
        **kwargs,
    ):
        self.allocator = allocator(num_blocks, block_size)
        limits = max_num_seqs, budget, max_seq_len
        self.scheduler = self.scheduler_class(self.allocator, *limits, **kwargs)
        self.slots = {}  # slot -> the text up to its token, this token included
        self.requests = []

    def add(self, request_id, num_prompt_tokens, max_tokens, *, n=1, like=None, **fields):
        """Queue a request of tokens that no other has; returns its sequence or sequences.

        With `like` its tokens begin like those of the request of this number.
        """
        arrival = len(self.requests)
        first = 1000 * ((arrival if like is None else like) + 1)
        prompt = [first + i for i in range(num_prompt_tokens)]
        request = Request(request_id, prompt, arrival)
        request.sequences = [
            Sequence(request, i, list(prompt), num_prompt_tokens, max_tokens, **fields)
            for i in range(n)
        ]
        self.scheduler.add(request)
        self.requests.append(request)
        return request.sequences[0] if n == 1 else request.sequences

    def schedule(self):
        """Plan a step and carry it out: copies, then writes, then reads of all tokens so far."""
        plan = self.scheduler.schedule()
        self.check()
        block_size = self.allocator.block_size

        def slot(seq, position):
            return seq.block_table[position // block_size] * block_size + position % block_size

        copied = {
            target * block_size + i: self.slots.get(source * block_size + i)
            for source, target in plan.copies
            for i in range(block_size)
        }
        self.slots |= copied
        for seq, start, num_new_tokens in plan.scheduled:
            for position in range(start, start + num_new_tokens):
                self.slots[slot(seq, position)] = tuple(seq.token_ids[: position + 1])
        for seq, start, num_new_tokens in plan.scheduled:
            for position in range(start + num_new_tokens):
                found = self.slots.get(slot(seq, position))
                assert found == tuple(seq.token_ids[: position + 1]), (name(seq), position)
        return plan

    def update(self, plan, continuations=None):
        """Apply continuations; if none are given, each sampled sequence writes its next token."""
        if continuations is None:
            continuations = [Continuation(s, [next_token(s.token_ids)]) for s in plan.sampled]
        self.scheduler.update(plan, continuations)
        self.check()
        self.forget()

    def forget(self):
        """Drop what is in free blocks: their next owner must write before it reads."""
        free = {i for i in range(self.allocator.num_blocks) if self.allocator.ref_count(i) == 0}
        free -= set(getattr(self.allocator, "_unused", ()))  # what a prefix cache still remembers
        block_size = self.allocator.block_size
        self.slots = {k: v for k, v in self.slots.items() if k // block_size not in free}

    def step(self):
        plan = self.schedule()
        self.update(plan)
        return plan

    def check(self):
        """Check the block tables, and the counts of taken and freed blocks."""
        self.scheduler.check_integrity()
        used = self.allocator.num_blocks - self.allocator.num_free
        if not isinstance(self.allocator, RememberingAllocator):  # which holds blocks itself
            assert self.scheduler.num_blocks_taken - self.scheduler.num_blocks_freed == used

    def run_to_the_end(self):
        """Step until all have ended; returns the number of steps, and fails if it never ends.

        The first in line computes at least one token a step, and at most one step is lost when it
        has to wait. So all steps are fewer than all tokens that were asked for, plus two for each.
        """
        sequences = [seq for request in self.requests for seq in request.sequences]
        bound = sum(seq.num_prompt_tokens + seq.max_tokens + 2 for seq in sequences)
        for number in range(bound + 1):
            if not self.scheduler.has_unfinished():
                preemptions = sum(seq.num_preemptions for seq in sequences)
                assert self.scheduler.num_preemptions == preemptions
                return number
            self.step()
        pytest.fail(f"{bound} steps, and {len(self.scheduler.running)} still run")

    def all_blocks_are_free(self):
        self.check()
        return self.allocator.num_free == self.allocator.num_blocks


# ---- which tokens a step computes ----------------------------------------------------------------
@pytest.mark.parametrize(
    "budget, chunks",
    [
        (1, [(p, 1) for p in range(12)]),
        (5, [(0, 5), (5, 5), (10, 2)]),
        (6, [(0, 6), (6, 6)]),
        (64, [(0, 12)]),
    ],
)
def test_a_long_prompt_arrives_in_chunks_of_the_budget(budget, chunks):
    loop = Loop(budget=budget)
    loop.add("A", 12, 2)
    plans = [loop.step() for _ in chunks]
    assert [rows(plan) for plan in plans] == [[("A", start, n)] for start, n in chunks]
    # A token is drawn after the last chunk only: it computes the prompt's last token.
    assert [names(plan.sampled) for plan in plans] == [[]] * (len(chunks) - 1) + [["A"]]
    assert rows(loop.step()) == [("A", 12, 1)]


def test_prefill_and_decode_share_one_step():
    loop = Loop(budget=5)
    loop.add("A", 3, 9)
    loop.step()
    loop.add("B", 9, 9)
    assert rows(loop.step()) == [("A", 3, 1), ("B", 0, 4)]
    plan = loop.step()
    assert rows(plan) == [("A", 4, 1), ("B", 4, 4)]
    assert names(plan.sampled) == ["A"]
    plan = loop.step()
    assert rows(plan) == [("A", 5, 1), ("B", 8, 1)]
    assert names(plan.sampled) == ["A", "B"]
    assert plan.num_tokens == 2


def test_a_sequence_whose_token_has_not_come_back_has_nothing_to_compute():
    loop = Loop()
    loop.add("A", 3, 4)
    first = loop.schedule()
    assert rows(loop.schedule()) == []
    loop.update(first)
    assert rows(loop.step()) == [("A", 3, 1)]


# ---- blocks --------------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [3, 64])
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7, 16])
def test_every_prompt_length_up_to_three_blocks_and_one_fits_in_just_its_blocks(block_size, budget):
    for length in range(1, 3 * block_size + 2):
        max_tokens = block_size + 1
        num_blocks = -(-(length + max_tokens) // block_size)
        loop = Loop(num_blocks, block_size, budget=budget)
        seq = loop.add("A", length, max_tokens)
        while loop.scheduler.has_unfinished():
            plan = loop.schedule()
            assert len(seq.block_table) == -(-len(seq.token_ids) // block_size)
            assert plan.scheduled, "it is alone: it computes something in every step"
            loop.update(plan)
        assert seq.token_ids == written_alone(range(1000, 1000 + length), max_tokens)
        assert loop.scheduler.num_preemptions == 0 and loop.all_blocks_are_free()


def test_a_request_larger_than_the_pool_is_refused_at_once_with_both_numbers():
    loop = Loop(num_blocks=4, block_size=4)
    for n in (1, 3):
        message = "10 prompt tokens and up to 7 more need 5 blocks of 4, the pool has 4"
        with pytest.raises(ValueError, match=message):
            loop.add("A", 10, 7, n=n)
    assert loop.scheduler.num_waiting == 0 and not loop.scheduler.has_unfinished()
    loop.add("A", 10, 6)
    with pytest.raises(ValueError, match="need 16 blocks of 4, the pool has 8"):
        Loop(num_blocks=8, block_size=4, reserve=lambda seq: 64).add("A", 5, 4)
    # At most max_seq_len tokens are written, so no more must fit into the pool.
    Loop(num_blocks=4, block_size=4, max_seq_len=16).add("A", 10, 1000)


@pytest.mark.parametrize("limits", [{"max_num_seqs": 0}, {"budget": 0}], ids=str)
def test_limits_below_one_are_refused(limits):
    with pytest.raises(ValueError, match="both must be at least 1"):
        Loop(**limits)


def test_what_a_sequence_reserves_is_an_argument():
    assert reserve_now(Loop().add("A", 7, 4)) == 7
    loop = Loop(num_blocks=8, block_size=4, reserve=lambda seq: 16)
    one, two, three = (loop.add(request_id, 5, 4) for request_id in "ABC")
    loop.step()
    assert (one.block_table, two.block_table) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert three.status == "waiting"
    loop.run_to_the_end()
    assert loop.scheduler.num_preemptions == 0


def test_a_reservation_that_grows_beyond_the_pool_gets_the_whole_pool():
    """Without that limit the sequence would preempt itself in each step, and never end."""
    loop = Loop(num_blocks=3, block_size=4, reserve=lambda seq: len(seq.token_ids) + 5)
    one, two = loop.add("A", 3, 8), loop.add("B", 3, 8)  # 8 tokens reserved, and at 9 tokens 14
    loop.run_to_the_end()
    assert [seq.num_generated for seq in (one, two)] == [8, 8]


# ---- who comes next ------------------------------------------------------------------------------
def test_no_more_sequences_run_than_max_num_seqs():
    loop = Loop(max_num_seqs=2)
    for request_id, max_tokens in (("A", 2), ("B", 4), ("C", 2)):
        loop.add(request_id, 3, max_tokens)
    assert rows(loop.step()) == [("A", 0, 3), ("B", 0, 3)]
    assert rows(loop.step()) == [("A", 3, 1), ("B", 3, 1)]
    assert rows(loop.step()) == [("B", 4, 1), ("C", 0, 3)]


def test_no_sequence_overtakes_one_that_waits_for_memory():
    loop = Loop(num_blocks=4, block_size=4)
    loop.add("A", 10, 2)  # 3 of 4 blocks
    loop.add("B", 8, 1)  # 2 blocks: has to wait
    loop.add("C", 2, 1)  # 1 block: would fit, but came later
    assert rows(loop.step()) == [("A", 0, 10)]
    assert rows(loop.step()) == [("A", 10, 1)]
    assert rows(loop.step()) == [("B", 0, 8), ("C", 0, 2)]


@pytest.mark.parametrize("seed", range(5))
def test_first_come_first_served_starts_in_the_order_of_arrival(seed):
    rng = random.Random(seed)
    loop = Loop(num_blocks=9, max_num_seqs=3, budget=rng.choice([5, 16, 64]))
    started = []
    for i in range(30):
        loop.add(str(i), rng.randint(1, 18), rng.randint(1, 18))
        for _ in range(rng.randint(0, 4)):
            plan = loop.step()
            started += [seq for seq, start, _ in plan.scheduled if seq not in started]
            running = [seq.request.arrival for seq in loop.scheduler.running]
            waiting = [s.request.arrival for r in loop.requests for s in r.sequences]
            waiting = [i for i in waiting if loop.requests[i].sequences[0].status == "waiting"]
            assert running == sorted(running)
            assert max(running, default=-1) < min(waiting, default=99)
    while loop.scheduler.has_unfinished():
        started += [seq for seq, _, _ in loop.step().scheduled if seq not in started]
    assert names(started) == [str(i) for i in range(30)]
    assert loop.scheduler.num_preemptions > 0


def test_the_policy_is_an_argument():
    loop = Loop(max_num_seqs=1, policy=lambda seq: (seq.num_prompt_tokens, seq.request.arrival))
    for request_id, length in (("A", 9), ("B", 3), ("C", 5)):
        loop.add(request_id, length, 1)
    assert [rows(loop.step())[0][0] for _ in range(3)] == ["B", "C", "A"]


# ---- preemption ----------------------------------------------------------------------------------
def test_in_a_full_pool_the_newest_is_preempted_and_then_returns_before_all_later_ones():
    loop = Loop(num_blocks=4, block_size=4)
    one, two = loop.add("A", 7, 4), loop.add("B", 7, 3)
    loop.add("C", 1, 1)
    assert rows(loop.step()) == [("A", 0, 7), ("B", 0, 7)]  # the pool is full: C waits
    assert rows(loop.step()) == [("A", 7, 1), ("B", 7, 1)]
    plan = loop.schedule()  # both fill 2 blocks, and their ninth token needs a third
    assert names(plan.preempted) == ["B"]
    assert rows(plan) == [("A", 8, 1)]  # C doesn't take B's place
    assert (two.status, two.block_table, two.num_computed_tokens) == ("waiting", [], 0)
    assert two.token_ids == written_alone(range(2000, 2007), 2), "its tokens are not lost"
    assert (one.num_preemptions, two.num_preemptions) == (0, 1)
    assert (loop.scheduler.num_preemptions, loop.scheduler.num_recomputed_tokens) == (1, 8)
    loop.update(plan)
    assert rows(loop.step()) == [("A", 9, 1)]  # A holds 3 of 4 blocks: too few for B's 9 tokens
    assert rows(loop.step()) == [("B", 0, 9), ("C", 0, 1)]  # B computes all its tokens again
    assert loop.all_blocks_are_free()


def test_a_sequence_that_comes_back_takes_its_old_place_in_the_line():
    loop = Loop()
    one, *_ = [loop.add(request_id, 3, 9) for request_id in "ABC"]
    loop.step()
    loop.scheduler.preempt(one)
    assert rows(loop.step()) == [("B", 3, 1), ("C", 3, 1), ("A", 0, 4)]
    assert names(loop.scheduler.running) == ["A", "B", "C"]  # if need be, C is preempted first
    assert rows(loop.step()) == [("A", 4, 1), ("B", 4, 1), ("C", 4, 1)]


@pytest.mark.parametrize("seed", range(10))
def test_there_is_never_a_livelock(seed):
    rng = random.Random(seed)
    num_blocks, block_size = rng.randint(3, 12), rng.choice([1, 2, 3, 4, 7])
    budget, max_num_seqs = rng.choice([1, 2, 5, 64]), rng.randint(1, 9)
    loop = Loop(num_blocks, block_size, budget=budget, max_num_seqs=max_num_seqs)
    for i in range(20):
        prompt = rng.randint(1, num_blocks * block_size - 1)
        loop.add(str(i), prompt, rng.randint(1, num_blocks * block_size - prompt))
    loop.run_to_the_end()
    assert loop.all_blocks_are_free()
    for request in loop.requests:
        (seq,) = request.sequences
        assert seq.token_ids == written_alone(request.prompt_token_ids, seq.max_tokens)


# ---- how a sequence ends -------------------------------------------------------------------------
def ended_by(continuations, num_prompt_tokens=3, max_tokens=5, max_seq_len=64, **fields):
    """Feed a sequence one list of tokens a step; returns what it wrote, and why it ended."""
    loop = Loop(max_seq_len=max_seq_len)
    seq = loop.add("A", num_prompt_tokens, max_tokens, **fields)
    for token_ids in continuations:
        loop.update(loop.schedule(), [Continuation(seq, token_ids)])
        if seq.status == "finished":
            break
    assert loop.all_blocks_are_free() == (seq.status == "finished")
    return seq.token_ids[num_prompt_tokens:], seq.finish_reason


EOS = frozenset({50})
STOP = {"stop_token_ids": EOS}
ENDS = {  # the continuations of each step, fields of the sequence -> what it wrote, why it ended
    "not yet": ([[7], [8]], {}, [7, 8], None),
    "max_tokens": ([[7], [8], [9]], {"max_tokens": 3}, [7, 8, 9], "length"),
    "max_seq_len": ([[7], [8]], {"max_seq_len": 5}, [7, 8], "length"),
    "a stop token": ([[7], [50]], STOP, [7, 50], "stop"),
    "one of several stop tokens": ([[7], [9]], {"stop_token_ids": {8, 9}}, [7, 9], "stop"),
    "only in the prompt": ([[7]], {"stop_token_ids": {1000, 1001}}, [7], None),
    "not before min_tokens": ([[50]] * 3, STOP | {"min_tokens": 3}, [50] * 3, "stop"),
    "the context's last place": ([[7], [50]], STOP | {"max_seq_len": 5}, [7, 50], "stop"),
    "in the middle of several": ([[7, 50, 8]], STOP, [7, 50], "stop"),
    "several beyond max_tokens": ([[7, 8, 9]], {"max_tokens": 2}, [7, 8], "length"),
    "several and min_tokens": ([[50, 50, 7]], STOP | {"min_tokens": 2}, [50, 50], "stop"),
}


@pytest.mark.parametrize("continuations, fields, written, reason", ENDS.values(), ids=ENDS)
def test_a_sequence_ends_with_a_reason(continuations, fields, written, reason):
    assert ended_by(continuations, **fields) == (written, reason)


def test_the_log_probabilities_end_where_the_tokens_end():
    loop = Loop()
    seq = loop.add("A", 3, 8, stop_token_ids=EOS)
    loop.update(loop.schedule(), [Continuation(seq, [7], [-0.5])])
    loop.update(loop.schedule(), [Continuation(seq, [8, 50, 9], [-0.1, -0.2, -0.3])])
    assert seq.logprobs == [-0.5, -0.1, -0.2]


def test_abort_between_a_plan_and_its_results():
    loop = Loop()
    one, two = loop.add("A", 3, 9), loop.add("B", 3, 9)
    plan = loop.schedule()
    loop.scheduler.finish(one, "abort")
    loop.check()
    assert (one.status, one.finish_reason, one.block_table) == ("finished", "abort", [])
    loop.update(plan)  # the forward had it in its batch: its token is dropped
    assert len(one.token_ids) == 3 and len(two.token_ids) == 4
    assert rows(loop.step()) == [("B", 3, 1)]


# ---- forks ---------------------------------------------------------------------------------------
def fork(loop, seq, *token_lists):
    """One step in which a sequence has several futures; returns the children."""
    plan = loop.schedule()
    futures = [Continuation(seq, token_ids) for token_ids in token_lists]
    others = [Continuation(s, [next_token(s.token_ids)]) for s in plan.sampled if s is not seq]
    known = len(seq.request.sequences)
    loop.update(plan, futures + others)
    return seq.request.sequences[known:]


def test_two_continuations_of_one_parent_fork_it():
    loop = Loop()
    seq = loop.add("A", 6, 4, min_tokens=1, stop_token_ids=EOS, seed=5)
    plan = loop.schedule()
    futures = [Continuation(seq, [11], [-0.1]), Continuation(seq, [12], [-0.2], seed=77)]
    loop.update(plan, futures)
    child = seq.request.sequences[1]
    assert seq.token_ids[6:] == [11] and child.token_ids[6:] == [12]
    assert child.token_ids[:6] == seq.token_ids[:6]
    assert (seq.logprobs, child.logprobs) == ([-0.1], [-0.2])
    assert (seq.seed, child.seed) == (5, 77)
    assert seq.block_table == child.block_table == [0, 1]
    assert [loop.allocator.ref_count(i) for i in (0, 1)] == [2, 2]
    assert seq.request.sequences == [seq, child] and names([seq, child]) == ["A", "A1"]
    assert (child.num_prompt_tokens, child.num_computed_tokens) == (6, 6)
    assert (child.max_tokens, child.min_tokens, child.stop_token_ids) == (4, 1, EOS)
    assert names(loop.scheduler.running) == ["A", "A1"]


def test_a_partly_filled_tail_is_copied_for_all_holders_but_one():
    loop = Loop()
    seq = loop.add("A", 5, 4)
    children = fork(loop, seq, [11], [12], [13])
    plan = loop.schedule()
    # A and A1 get copies of block 1. Then A2 is its only holder, and needs no copy.
    assert plan.copies == [(1, 2), (1, 3)]
    assert [s.block_table for s in (seq, *children)] == [[0, 2], [0, 3], [0, 1]]
    assert [loop.allocator.ref_count(i) for i in range(4)] == [3, 1, 1, 1]
    loop.update(plan)
    assert loop.schedule().copies == []


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7])
def test_a_fork_at_every_length_reads_its_tokens_and_not_the_other_s(block_size):
    for length in range(1, 3 * block_size + 2):
        loop = Loop(num_blocks=40, block_size=block_size)
        seq = loop.add("A", length, 2 * block_size + 2)
        (child,) = fork(loop, seq, [11], [12])
        plan = loop.step()
        assert len(plan.copies) == (length % block_size > 0)
        loop.run_to_the_end()  # the stand-in checks every slot that is read
        for s, first in ((seq, 11), (child, 12)):
            prompt = [*range(1000, 1000 + length), first]
            assert s.token_ids == written_alone(prompt, 2 * block_size + 1)


def test_a_parent_without_a_continuation_is_dropped():
    loop = Loop()
    one, two = loop.add("A", 6, 4), loop.add("B", 6, 4)
    loop.update(loop.schedule(), [Continuation(two, [7])])
    assert (one.status, one.finish_reason, one.block_table) == ("finished", None, [])
    assert names(loop.scheduler.running) == ["B"]
    assert loop.allocator.num_free == 6


def test_the_first_in_line_is_not_preempted_for_a_copy_that_is_no_longer_needed():
    """No block is free for the copy, so the fork that shares the tail is preempted. Then the tail
    has one holder, and needs no copy. A scheduler that still made it would preempt A too."""
    loop = Loop(num_blocks=2)
    seq = loop.add("A", 6, 2)
    (child,) = fork(loop, seq, [11], [12])
    plan = loop.schedule()
    assert names(plan.preempted) == ["A1"] and plan.copies == []
    assert rows(plan) == [("A", 6, 1)] and seq.block_table == [0, 1]
    loop.update(plan)
    loop.run_to_the_end()
    assert (seq.num_generated, child.num_generated, child.num_preemptions) == (2, 2, 1)


def test_reserved_blocks_that_a_fork_shares_are_copied_too_before_several_tokens_are_written():
    loop = Loop(num_blocks=12, reserve=lambda seq: 16)
    seq = loop.add("A", 6, 9)
    (child,) = fork(loop, seq, [11, 12, 13], [21, 22, 23])  # positions 6, 7 and 8
    assert seq.block_table == child.block_table == [0, 1, 2, 3]
    plan = loop.schedule()
    assert rows(plan) == [("A", 6, 3), ("A1", 6, 3)]
    assert sorted(source for source, _ in plan.copies) == [1, 2]
    assert seq.block_table[0] == 0 and not {1, 2} & set(seq.block_table)
    assert child.block_table == [0, 1, 2, 3]


def test_a_preempted_parent_is_not_forked():
    loop = Loop()
    seq = loop.add("A", 6, 4)
    plan = loop.schedule()
    loop.scheduler.preempt(seq)
    loop.update(plan, [Continuation(seq, [11]), Continuation(seq, [12])])
    assert seq.request.sequences == [seq] and len(seq.token_ids) == 6
    assert rows(loop.step()) == [("A", 0, 6)]  # its tokens are computed again


def test_forks_beyond_max_num_seqs_take_their_turns():
    loop = Loop(num_blocks=30, max_num_seqs=2)
    seq = loop.add("A", 5, 3)
    children = fork(loop, seq, [11], [12], [13], [14])
    plan = loop.step()
    assert rows(plan) == [("A", 5, 1), ("A1", 5, 1)]
    loop.run_to_the_end()
    assert [s.num_generated for s in (seq, *children)] == [3, 3, 3, 3]


# ---- a step that is planned while the one before runs --------------------------------------------
def test_a_step_planned_ahead_computes_the_tokens_that_are_in_flight():
    """A and B decode and C is in the middle of its prompt. A's next token is its last one."""
    loop = Loop(budget=6)
    one, two, three = loop.add("A", 2, 2), loop.add("B", 3, 9), loop.add("C", 7, 9)
    loop.step()  # A [0, 2), B [0, 3) and one token of C; A and B have one generated token each
    first = loop.scheduler.schedule()
    assert rows(first) == [("A", 2, 1), ("B", 3, 1), ("C", 1, 4)]
    # Nothing has come back. B's token at position 4 is unknown and is computed all the same.
    second = loop.scheduler.schedule(in_flight=1)
    assert rows(second) == [("B", 4, 1), ("C", 5, 2)]
    assert names(second.sampled) == ["B", "C"]
    assert len(two.token_ids) == 4 and two.num_computed_tokens == 5
    assert (two.block_table, three.block_table) == ([1, 4], [2, 3])
    loop.scheduler.update(first, [Continuation(one, [7]), Continuation(two, [8])])
    assert (one.finish_reason, two.token_ids[4:]) == ("length", [8])
    loop.scheduler.update(second, [Continuation(two, [9]), Continuation(three, [9])])
    assert rows(loop.scheduler.schedule()) == [("B", 5, 1), ("C", 7, 1)]


# ---- a step that is taken back -------------------------------------------------------------------
def scramble(scheduler):
    """What an interruption may leave behind, and worse: no book is right."""
    scheduler.running[:] = scheduler.running[1:] * 2
    scheduler._waiting.clear()
    scheduler.num_waiting = 99
    scheduler.allocator._free.clear()
    scheduler.allocator._ref_counts[:] = [7] * scheduler.allocator.num_blocks


def undo(loop, plan):
    """What the engine does after an exception."""
    loop.scheduler.take_back(plan)
    loop.scheduler.rebuild(loop.requests)
    loop.slots.clear()
    loop.check()


@pytest.mark.parametrize("is_updated", [False, True])
def test_a_step_is_taken_back_and_all_books_are_made_again_from_the_tokens(is_updated):
    loop = Loop(budget=9)
    one, two, three = loop.add("A", 3, 5), loop.add("B", 12, 2), loop.add("C", 3, 1)
    loop.update(loop.schedule(), [Continuation(one, [next_token(one.token_ids)], [-0.9])])
    plan = loop.scheduler.schedule()
    assert rows(plan) == [("A", 3, 1), ("B", 6, 6), ("C", 0, 2)]
    if is_updated:  # A forks and its child ends
        futures = [Continuation(one, [7], [-0.5]), Continuation(one, [8] * 9, [-0.5] * 9)]
        loop.scheduler.update(plan, futures)
        assert names(plan.ended) == ["A1", "B"] and names(plan.forked) == ["A1"]
    scramble(loop.scheduler)
    undo(loop, plan)
    assert [s.status for s in (one, two, three)] == ["waiting"] * 3
    assert one.request.sequences == [one] and (one.logprobs, two.finish_reason) == ([-0.9], None)
    assert loop.scheduler.running == [] and loop.all_blocks_are_free()
    assert rows(loop.step()) == [("A", 0, 4), ("B", 0, 5)]  # in their old order
    loop.run_to_the_end()
    assert one.token_ids == written_alone(range(1000, 1003), 5)
    assert two.token_ids == written_alone(range(2000, 2012), 2)


def test_a_sequence_that_was_aborted_meanwhile_is_not_brought_back():
    loop = Loop()
    one, two = loop.add("A", 3, 5), loop.add("B", 3, 2)
    plan = loop.schedule()
    loop.scheduler.finish(one, "abort")
    undo(loop, plan)
    assert (one.status, two.status) == ("finished", "waiting")
    loop.run_to_the_end()
    assert two.num_generated == 2 and loop.all_blocks_are_free()


# ---- functions of a caller -----------------------------------------------------------------------
def returns(value):
    return lambda seq: value


def raises(seq):
    raise KeyError("user")


REFUSED = {  # of the second request: policy, reserve -> the error
    "a key without an order": (returns(None), reserve_now, "the policy .* failed: TypeError"),
    "a key that is no number": (returns((math.nan, 1)), reserve_now, "nan has no order"),
    "a string beside numbers": (returns("b"), reserve_now, "key 'b' cannot be compared"),
    "a longer key": (returns((1, 2)), reserve_now, r"key \(1, 2\) cannot be compared"),
    "a policy that raises": (raises, reserve_now, r"failed: KeyError\('user'\)"),
    "no reservation": (returns(1), returns(None), "the reserve function returned None"),
    "half a token": (returns(1), returns(2.5), "the reserve function returned 2.5"),
    "a reserve that raises": (returns(1), raises, r"failed: KeyError\('user'\)"),
}


@pytest.mark.parametrize("policy, reserve, message", REFUSED.values(), ids=REFUSED)
def test_a_policy_or_reserve_that_cannot_be_used_is_refused_and_leaves_nothing(
    policy, reserve, message
):
    loop = Loop(policy=returns(0))
    first = loop.add("A", 3, 4)
    loop.scheduler.policy, loop.scheduler.reserve = policy, reserve
    with pytest.raises(ValueError, match=message):
        loop.add("B", 3, 4)
    loop.scheduler.policy, loop.scheduler.reserve = returns(0.5), reserve_now
    assert loop.scheduler.num_waiting == 1
    loop.add("C", 3, 4)  # 0.5 and 0 are numbers: they can be compared
    loop.run_to_the_end()
    assert first.token_ids == written_alone(range(1000, 1003), 4)


def test_the_policy_is_asked_once_for_each_request():
    asked = []

    def policy(seq):
        asked.append(name(seq))
        return seq.request.arrival, seq.index

    loop = Loop(policy=policy)
    seq = loop.add("A", 3, 6)
    loop.add("B", 3, 6)
    fork(loop, seq, [11], [12])
    loop.scheduler.preempt(seq)
    loop.run_to_the_end()
    assert asked == ["A", "B"]


@pytest.mark.parametrize("reserve", [returns(1), returns(-5)])
def test_a_reservation_below_what_a_sequence_has_is_raised_to_that(reserve):
    """The loop's slots lie in the block table only, and each is written before it is read."""
    loop = Loop(budget=5, reserve=reserve)
    one, two = loop.add("A", 7, 6), loop.add("B", 9, 6)
    loop.run_to_the_end()
    assert one.token_ids == written_alone(range(1000, 1007), 6)
    assert two.token_ids == written_alone(range(2000, 2009), 6)


def test_a_function_that_fails_later_ends_its_own_sequence_with_an_error():
    loop = Loop(num_blocks=12)
    one, two, three = (loop.add(request_id, 4, 6) for request_id in "ABC")
    loop.step()

    def reserve(seq):
        return 1 / 0 if seq is one else len(seq.token_ids)

    loop.scheduler.reserve = reserve
    loop.run_to_the_end()
    assert (one.finish_reason, one.num_generated) == ("error", 2)
    assert one.error.startswith("the reserve function failed: ZeroDivisionError")
    assert [seq.finish_reason for seq in (two, three)] == ["length", "length"]


def test_entries_of_aborted_sequences_leave_the_queue_when_they_outnumber_the_others():
    loop = Loop()
    sequences = [loop.add(str(i), 3, 2) for i in range(100)]
    for i, seq in enumerate(sequences):
        if i % 10:
            loop.scheduler.finish(seq, "abort")
            assert len(loop.scheduler._waiting) <= 2 * loop.scheduler.num_waiting + 8
    assert loop.scheduler.num_waiting == 10
    started = [name(seq) for _ in range(9) for seq in loop.step().started]
    assert started == [str(i) for i in range(0, 100, 10)]


# ---- an allocator that finds computed blocks again -----------------------------------------------
class RememberingAllocator(BlockAllocator):
    """Keeps every full block that was ever published, and throws none out."""

    def __init__(self, num_blocks, block_size):
        super().__init__(num_blocks, block_size)
        self.asked = []
        self.published = []

    def reset(self):
        super().reset()
        self.known = {}  # the text up to the end of a block -> the block

    def match_prefix(self, token_ids, salt=None):
        self.asked.append(list(token_ids))
        hit = []
        for end in range(self.block_size, len(token_ids) + 1, self.block_size):
            if tuple(token_ids[:end]) not in self.known:
                break
            hit.append(self.known[tuple(token_ids[:end])])
        self.fork(hit)
        return hit

    def publish(self, block_table, token_ids, num_computed_tokens, salt=None):
        self.published.append((list(block_table), num_computed_tokens))
        for i in range(num_computed_tokens // self.block_size):
            text = tuple(token_ids[: (i + 1) * self.block_size])
            if text not in self.known:
                self.fork([block_table[i]])
                self.known[text] = block_table[i]

    def check_integrity(self, block_tables):
        super().check_integrity([*block_tables, list(self.known.values())])


def test_what_a_later_plan_will_compute_is_not_published_yet():
    loop = Loop(budget=5, allocator=RememberingAllocator)
    seq = loop.add("A", 12, 2)
    first, second = loop.schedule(), loop.schedule()
    assert seq.num_computed_tokens == 10
    loop.update(first, [])
    assert loop.allocator.published == [([0, 1, 2], 5)]
    loop.update(second, [])
    assert loop.allocator.published[1:] == [([0, 1, 2], 10)]


@pytest.mark.parametrize("length, start", [(8, 4), (9, 8), (4, 0), (5, 4), (12, 8)])
def test_a_prompt_that_is_wholly_found_still_computes_its_last_token(length, start):
    loop = Loop(allocator=RememberingAllocator)
    for request_id in "AB":
        loop.add(request_id, length, 3).token_ids[:] = range(length)
        loop.run_to_the_end()
    assert loop.scheduler.num_blocks_hit == start // 4, "B found A's blocks"
    third = loop.add("C", length, 3)
    third.token_ids[:] = range(length)
    plan = loop.schedule()
    assert rows(plan) == [("C", start, length - start)] and names(plan.sampled) == ["C"]
    assert loop.allocator.asked[-1] == list(range(length - 1)), "the last is never asked for"
    assert [loop.allocator.ref_count(i) for i in third.block_table[: start // 4]] == (
        [2] * (start // 4)
    )
    loop.update(plan)
    loop.run_to_the_end()
    assert third.token_ids == written_alone(range(length), 3)


def test_blocks_that_were_found_are_given_back_if_the_rest_does_not_fit():
    loop = Loop(num_blocks=6, allocator=RememberingAllocator)
    loop.add("A", 8, 1)
    loop.run_to_the_end()  # its two full blocks stay known: 4 of 6 are free
    loop.add("B", 9, 4)  # takes three of them
    other = loop.add("C", 12, 4)
    other.token_ids[:] = [*range(1000, 1008), 1, 2, 3, 4, 5, 6, 7, 8]  # finds 2, needs 2 more
    assert rows(loop.step()) == [("B", 0, 9)]
    assert (other.status, other.block_table) == ("waiting", [])
    assert [loop.allocator.ref_count(i) for i in (0, 1)] == [1, 1]
    assert loop.scheduler.num_blocks_hit == 0


# ---- random games --------------------------------------------------------------------------------
class SchedulerGame(RuleBasedStateMachine):
    """Random add, step, fork, abort, preempt, interruption; the loop checks all that is read."""

    @initialize(
        num_blocks=st.integers(2, 10),
        block_size=st.sampled_from([1, 2, 3, 4]),
        budget=st.sampled_from([1, 3, 8, 64]),
        max_num_seqs=st.integers(1, 5),
        allocator=st.sampled_from([BlockAllocator, PrefixCache]),
    )
    def start(self, num_blocks, block_size, budget, max_num_seqs, allocator):
        self.room = num_blocks * block_size
        limits = {"budget": budget, "max_num_seqs": max_num_seqs}
        self.loop = Loop(num_blocks, block_size, allocator=allocator, **limits)

    def sequences(self):
        return [seq for request in self.loop.requests for seq in request.sequences]

    @rule(data=st.data())
    def add(self, data):
        prompt = data.draw(st.integers(1, self.room))
        max_tokens = data.draw(st.integers(1, 9))
        needed = self.loop.allocator.blocks_needed(prompt + max_tokens)
        if needed > self.loop.allocator.num_blocks:
            with pytest.raises(ValueError, match=f"need {needed} blocks"):
                self.loop.add("X", prompt, max_tokens)
        else:
            stop_token_ids = frozenset(data.draw(st.sets(st.integers(0, 9), max_size=2)))
            name = str(len(self.loop.requests))
            like = data.draw(st.sampled_from([None, 0, 1]))
            self.loop.add(name, prompt, max_tokens, like=like, stop_token_ids=stop_token_ids)

    @rule(
        data=st.data(),
        interruption=st.sampled_from(["none", "none", "preempt", "abort", "before", "after"]),
    )
    def step(self, data, interruption):
        loop = self.loop
        plan = loop.schedule()
        assert plan.num_tokens <= loop.scheduler.max_num_batched_tokens
        assert len(plan.scheduled) <= loop.scheduler.max_num_seqs
        assert not set(plan.preempted) & {seq for seq, _, _ in plan.scheduled}
        futures = []
        for seq in plan.sampled:
            for i in range(data.draw(st.sampled_from([1, 1, 1, 2, 3, 0]))):
                length = data.draw(st.sampled_from([1, 1, 3]))
                if i == 0 or len(seq.request.sequences) < 6:
                    futures.append(Continuation(seq, [next_token(seq.token_ids) % 20 + i] * length))
        if interruption in ("before", "after"):  # of the update, which is then taken back
            token_ids = {seq: list(seq.token_ids) for seq in self.sequences()}
            if interruption == "after":
                loop.scheduler.update(plan, futures)
            scramble(loop.scheduler)
            undo(loop, plan)
            assert {seq: seq.token_ids for seq in self.sequences()} == token_ids
            return
        running = list(loop.scheduler.running)
        if running and interruption == "preempt":
            loop.scheduler.preempt(data.draw(st.sampled_from(running)))
        if running and interruption == "abort":
            loop.scheduler.finish(data.draw(st.sampled_from(running)), "abort")
        loop.update(plan, futures)

    @precondition(lambda self: self.sequences())
    @rule(data=st.data())
    def abort(self, data):
        seq = data.draw(st.sampled_from(self.sequences()))
        over, reason = seq.status == "finished", seq.finish_reason
        self.loop.scheduler.finish(seq, "abort")
        assert (seq.status, seq.finish_reason) == ("finished", reason if over else "abort")

    @precondition(lambda self: self.loop.scheduler.running)
    @rule(data=st.data())
    def preempt(self, data):
        self.loop.scheduler.preempt(data.draw(st.sampled_from(self.loop.scheduler.running)))

    @invariant()
    def every_sequence_waits_runs_or_has_ended(self):
        if not hasattr(self, "loop"):
            return
        self.loop.check()
        counts = Counter(seq.status for seq in self.sequences())
        assert counts["running"] == len(self.loop.scheduler.running)
        assert counts["waiting"] == self.loop.scheduler.num_waiting
        for seq in self.sequences():
            assert seq.num_generated <= seq.max_tokens
            assert seq.status == "running" or not seq.block_table

    def teardown(self):
        if hasattr(self, "loop"):
            self.loop.run_to_the_end()
            assert self.loop.all_blocks_are_free()


TestSchedulerGame = SchedulerGame.TestCase
TestSchedulerGame.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
