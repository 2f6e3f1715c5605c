"""The prefix cache: which blocks are found, published and evicted, and that no token changes.

Block ids and counts are literals, as for the allocator. Games against a dict follow, then the
scheduler with the stand-in of test_scheduler.py, which checks every slot that a step reads. The
last part compares warm runs of real models with cold ones.
"""

import ast
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from test_scheduler import Loop, names, rows, written_alone
from traffic import ENGINES, Ledger, build, draw_traffic

from block_allocator import NoFreeBlocks
from engine import sample_next
from kernels import backends
from kernels.backends import BACKENDS
from llm import LLM
from prefix_cache import PrefixCache, sha256_digest
from sampling import SamplingParams

TEXT = list(range(100, 130))  # thirty tokens


def always_equal(data):
    """A hash that collides for all blocks."""
    return b"the same"


def one_bit(data):
    """A hash that collides for half of them."""
    return bytes([sha256_digest(data)[0] % 2])


def compute(cache, token_ids, salt=None):
    """A whole life up to the end of the prefill: look up, allocate, publish. The block table."""
    table = cache.match_prefix(token_ids[:-1], salt)
    table = table + cache.allocate(cache.blocks_needed(len(token_ids)) - len(table))
    cache.publish(table, token_ids, len(token_ids), salt)
    return table


def found(cache, token_ids, salt=None):
    """The blocks that are found for these tokens, as they were before."""
    table = cache.match_prefix(token_ids, salt)
    cache.free(table)
    return table


# ---- what is found -------------------------------------------------------------------------------
def test_the_blocks_of_an_equal_beginning_are_found_and_no_others():
    cache = PrefixCache(8, block_size=4)
    assert compute(cache, TEXT[:13]) == [0, 1, 2, 3]
    assert found(cache, TEXT[:13]) == [0, 1, 2]
    assert found(cache, TEXT) == [0, 1, 2]
    assert found(cache, TEXT[:11]) == [0, 1]
    assert found(cache, TEXT[:3]) == []
    assert found(cache, [*TEXT[:7], 0, *TEXT[8:13]]) == [0]
    assert found(cache, TEXT[4:13]) == []  # the same tokens after another beginning
    assert found(cache, [0, *TEXT[1:13]]) == []


def test_a_found_block_has_one_more_holder():
    cache = PrefixCache(8, block_size=4)
    first = compute(cache, TEXT[:9])
    second = compute(cache, [*TEXT[:8], 7])
    assert (first, second) == ([0, 1, 2], [0, 1, 3])
    assert [cache.ref_count(i) for i in range(4)] == [2, 2, 1, 1]
    cache.check_integrity([first, second])
    cache.free(first)
    assert [cache.ref_count(i) for i in range(4)] == [1, 1, 0, 1]
    cache.free(second)
    assert cache.num_free == 8
    cache.check_integrity([])


def test_a_partial_block_is_never_published():
    for num_computed in range(13):
        cache = PrefixCache(8, block_size=4)
        table = cache.allocate(3)
        cache.publish(table, TEXT[:12], num_computed)
        assert found(cache, TEXT) == [0, 1, 2][: num_computed // 4]
        cache.check_integrity([table])


def test_a_salt_separates_callers_and_none_is_not_the_word_none():
    cache = PrefixCache(16, block_size=4)
    tables = {salt: compute(cache, TEXT[:5], salt) for salt in (None, "None", "", "a")}
    assert tables == {None: [0, 1], "None": [2, 3], "": [4, 5], "a": [6, 7]}
    assert found(cache, TEXT, "a") == [6] and found(cache, TEXT, "b") == []


def test_each_cache_has_keys_of_its_own_unless_its_salt_is_given():
    def keys(**options):
        cache = PrefixCache(4, block_size=4, **options)
        compute(cache, TEXT[:8])
        return list(cache._nodes)

    assert len(keys()[0]) == 32 and keys() != keys()
    assert keys(salt=b"x") == keys(salt=b"x") != keys(salt=b"y")


def test_a_hash_that_always_collides_finds_no_wrong_block():
    cache = PrefixCache(8, block_size=2, digest=always_equal)
    table = compute(cache, [5, 5, 5, 5, 5])  # two full blocks of the same tokens
    assert found(cache, [5, 5, 5, 5, 5]) == [0]  # the key is taken, so the second is not published
    assert found(cache, [6, 6, 6]) == [] and found(cache, [5, 5], "a") == []
    other = compute(cache, [6, 6, 6])
    assert other == [3, 4] and found(cache, [6, 6, 6]) == []
    cache.check_integrity([table, other])


# ---- what is evicted -----------------------------------------------------------------------------
def test_freed_blocks_are_found_until_the_pool_needs_them():
    cache = PrefixCache(6, block_size=4)
    cache.free(compute(cache, TEXT[:13]))  # [0, 1, 2] are full, 3 is blank again
    assert cache.num_free == 6
    assert sorted(cache.allocate(3)) == [3, 4, 5] and cache.num_evicted == 0
    assert found(cache, TEXT) == [0, 1, 2]
    assert cache.allocate(1) == [2] and cache.num_evicted == 1  # the leaf
    assert found(cache, TEXT) == [0, 1]
    with pytest.raises(NoFreeBlocks, match="3 blocks asked for, 2 of 6 free"):
        cache.allocate(3)
    assert found(cache, TEXT) == [0, 1]
    assert cache.allocate(2) == [0, 1] and cache.num_evicted == 3
    assert found(cache, TEXT) == []


def test_the_least_recently_used_is_evicted_first():
    cache = PrefixCache(4, block_size=4)
    old, new = compute(cache, TEXT[:4]), compute(cache, TEXT[4:8])
    cache.free(old)
    cache.free(new)
    assert found(cache, TEXT) == [0]  # used again: now the other one is older
    cache.allocate(3)
    assert found(cache, TEXT) == [0] and found(cache, TEXT[4:]) == []


def test_a_fork_and_a_hit_keep_leaves_older_than_their_parents():
    cache = PrefixCache(6, block_size=2)
    first = compute(cache, TEXT[:6])  # [0, 1, 2]
    cache.fork(first[:2])
    fork = first[:2] + cache.allocate(1)
    cache.publish(fork, [*TEXT[:4], 1, 2], 6)  # 3 is a second child of 1
    cache.free(first)
    hit = cache.match_prefix(TEXT[:2])
    cache.free(fork)
    cache.check_integrity([hit])
    cache.free(hit)
    cache.check_integrity([])
    order = []
    for _ in range(6):
        order += cache.allocate(1)
        cache.check_integrity([[block_id] for block_id in order])
    assert order == [4, 5, 2, 3, 1, 0]


def test_a_block_that_is_found_is_not_evicted_by_the_allocation_that_follows():
    cache = PrefixCache(3, block_size=4)
    cache.free(compute(cache, TEXT[:12]))
    table = cache.match_prefix(TEXT[:8])
    assert table + cache.allocate(1) == [0, 1, 2]
    assert cache.num_evicted == 1 and cache.num_free == 0
    with pytest.raises(NoFreeBlocks):
        cache.allocate(1)


def test_reset_forgets_all_contents():
    cache = PrefixCache(4, block_size=4)
    compute(cache, TEXT[:9])
    cache.reset()
    assert cache.num_free == 4 and found(cache, TEXT) == []
    assert cache.allocate(4) == [0, 1, 2, 3] and cache.num_evicted == 0


# ---- one key, one block --------------------------------------------------------------------------
def test_of_two_equal_blocks_with_holders_the_first_is_the_cached_one():
    cache = PrefixCache(8, block_size=4)
    one, two = cache.allocate(2), cache.allocate(3)
    cache.publish(one, TEXT[:8], 8)
    cache.publish(two, TEXT[:12], 12)  # nor is the block behind them: it would have no parent
    assert found(cache, TEXT) == [0, 1]
    cache.check_integrity([one, two])
    cache.free(one)
    cache.publish(two, TEXT[:12], 12)  # now the first has no holder, and the second takes its place
    assert found(cache, TEXT) == [2, 3, 4]
    cache.check_integrity([two])
    assert cache.num_free == 5 and sorted(cache.allocate(5)) == [0, 1, 5, 6, 7]
    assert cache.num_evicted == 0


def test_a_prompt_of_exactly_two_blocks_goes_on_where_it_was_found():
    """Its second block is computed again, for the last token; what follows it is published."""
    cache = PrefixCache(8, block_size=4)
    cache.free(compute(cache, TEXT[:8]))
    table = compute(cache, TEXT[:8])
    assert table == [0, 2]
    table += cache.allocate(1)
    cache.publish(table, TEXT[:12], 12)
    assert found(cache, TEXT) == table
    cache.check_integrity([table])


# ---- random games --------------------------------------------------------------------------------
class CacheGame(RuleBasedStateMachine):
    """Sequences of two letters arrive, grow, fork, write, end and are lost, against a dict.

    The model knows which text each cached block stands for, who holds each block, and in which
    order blocks lost their last holder. With a hash that collides fewer blocks are cached: then
    only what is found is checked, against the texts that were written.
    """

    NUM_BLOCKS = 7

    @initialize(
        block_size=st.sampled_from([1, 2, 3]),
        digest=st.sampled_from([sha256_digest, sha256_digest, one_bit, always_equal]),
    )
    def start(self, block_size, digest):
        self.size = block_size
        self.is_exact = digest is sha256_digest
        # A fixed salt: the digests that collide must be the same ones when a failure is repeated.
        self.cache = PrefixCache(self.NUM_BLOCKS, block_size, b"salt", digest=digest)
        self.sequences = []  # of the fields table, text, num_computed, salt
        self.written = {}  # (block, offset) -> the salt and the text up to this token
        self.forget()

    def forget(self):
        self.cached = {}  # (salt, text) -> block
        self.unused = []  # cached blocks without holder, the oldest first

    def holders(self, block_id):
        return sum(seq.table.count(block_id) for seq in self.sequences)

    def text_of(self, seq, end):
        return seq.salt, tuple(seq.text[:end])

    def allocate(self, n):
        """In both: blank blocks first, then the oldest. None if there are too few."""
        used = sum(self.holders(i) > 0 for i in range(self.NUM_BLOCKS))
        num_blank = self.NUM_BLOCKS - used - len(self.unused)
        if n > num_blank + len(self.unused):
            with pytest.raises(NoFreeBlocks):
                self.cache.allocate(n)
            return None
        block_ids = self.cache.allocate(n)
        num_evicted = max(0, n - num_blank)
        evicted, self.unused = self.unused[:num_evicted], self.unused[num_evicted:]
        if self.is_exact:
            assert set(evicted) <= set(block_ids) and not set(self.unused) & set(block_ids)
            self.cached = {k: i for k, i in self.cached.items() if i not in evicted}
        return block_ids

    def compute(self, seq, end):
        """Write positions up to `end`; every block that is written must be the writer's own."""
        for position in range(seq.num_computed, end):
            block_id = seq.table[position // self.size]
            assert self.cache.ref_count(block_id) == 1
            assert self.cache._node_of[block_id] is None, "a published block is written"
            self.written[block_id, position % self.size] = self.text_of(seq, position + 1)
        seq.num_computed = end
        self.cache.publish(seq.table, seq.text, end, seq.salt)
        if not self.is_exact:
            return
        for i in range(end // self.size):
            text, block_id = self.text_of(seq, (i + 1) * self.size), seq.table[i]
            other = self.cached.get(text, block_id)
            if other != block_id:
                if self.holders(other):
                    break
                self.unused.remove(other)
            self.cached[text] = block_id

    def let_go(self, seq):
        self.cache.free(seq.table)
        self.sequences.remove(seq)
        cached = set(self.cached.values())
        for block_id in reversed(seq.table):
            if self.holders(block_id) == 0 and block_id in cached:
                self.unused.append(block_id)

    @rule(
        text=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        salt=st.sampled_from([None, None, "a"]),
        data=st.data(),
    )
    def arrive(self, text, salt, data):
        seq = SimpleNamespace(text=text, salt=salt)
        seq.table = self.cache.match_prefix(text[:-1], salt)
        ends = range(self.size, len(text), self.size)
        texts = [self.text_of(seq, end) for end in ends]
        for text_found, block_id in zip(texts, seq.table):
            assert self.written[block_id, self.size - 1] == text_found
        if self.is_exact:
            known = [self.cached.get(text) for text in texts] + [None]
            assert seq.table == known[: known.index(None)]
        self.unused = [i for i in self.unused if i not in seq.table]
        seq.num_computed = len(seq.table) * self.size
        self.sequences.append(seq)
        new = self.allocate(self.cache.blocks_needed(len(text)) - len(seq.table))
        if new is None:
            self.let_go(seq)
            return
        seq.table += new
        self.compute(seq, data.draw(st.integers(seq.num_computed, len(text))))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), max_size=4))
    def go_on(self, data, tokens):
        """A chunk of the prompt, or a few new tokens; shared blocks are copied before."""
        seq = data.draw(st.sampled_from(self.sequences))
        first = seq.num_computed // self.size
        shared = [i for i in range(first, len(seq.table)) if self.holders(seq.table[i]) > 1]
        lacking = self.cache.blocks_needed(len(seq.text) + len(tokens)) - len(seq.table)
        new = self.allocate(lacking + len(shared))
        if new is None:
            return
        for i, copy in zip(shared, new):
            for offset in range(self.size):
                self.written[copy, offset] = self.written.get((seq.table[i], offset))
            self.cache.free([seq.table[i]])
            seq.table[i] = copy
        seq.table += new[len(shared) :]
        seq.text = seq.text + tokens
        self.compute(seq, data.draw(st.integers(seq.num_computed, len(seq.text))))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data):
        seq = data.draw(st.sampled_from(self.sequences))
        self.cache.fork(seq.table)
        fields = vars(seq) | {"table": list(seq.table), "text": list(seq.text)}
        self.sequences.append(SimpleNamespace(**fields))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end_or_be_aborted_or_preempted(self, data):
        self.let_go(data.draw(st.sampled_from(self.sequences)))

    @rule()
    def be_interrupted(self):
        self.cache.reset()
        self.sequences = []
        self.forget()

    @invariant()
    def the_books_agree(self):
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        cache.check_integrity([seq.table for seq in self.sequences])
        holders = [self.holders(i) for i in range(self.NUM_BLOCKS)]
        assert [cache.ref_count(i) for i in range(self.NUM_BLOCKS)] == holders
        used = sum(count > 0 for count in holders)
        assert used + len(cache._unused) + len(cache._free) == self.NUM_BLOCKS
        assert cache.num_free == self.NUM_BLOCKS - used
        for seq in self.sequences:  # what a sequence will read is its own text
            for position in range(seq.num_computed):
                slot = seq.table[position // self.size], position % self.size
                assert self.written[slot] == self.text_of(seq, position + 1)
        if self.is_exact:
            assert list(cache._unused) == self.unused
            cached = {i for i, node in enumerate(cache._node_of) if node is not None}
            assert cached == set(self.cached.values()) and len(cached) == len(self.cached)


TestCacheGame = CacheGame.TestCase
TestCacheGame.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


# ---- the scheduler -------------------------------------------------------------------------------
def cached_loop(num_blocks=32, block_size=4, **options):
    return Loop(num_blocks, block_size, allocator=PrefixCache, **options)


def serve(loop, request_id, num_prompt_tokens, max_tokens, like=0):
    """Add a request, and run it to its end."""
    seq = loop.add(request_id, num_prompt_tokens, max_tokens, like=like)
    loop.run_to_the_end()
    return seq


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_a_prompt_of_exactly_k_blocks_that_is_wholly_found_computes_its_last_block(num_blocks):
    loop, length = cached_loop(), 4 * num_blocks
    first = serve(loop, "A", length, 6)
    second = loop.add("B", length, 6, like=0)
    plan = loop.step()
    assert rows(plan) == [("B", length - 4, 4)] and names(plan.sampled) == ["B"]
    loop.run_to_the_end()
    assert second.token_ids == first.token_ids == written_alone(first.token_ids[:length], 6)
    # The text that B wrote is found too: `length` tokens and one block of those that follow.
    third = loop.add("C", length, 1, like=0)
    third.token_ids[:] = first.token_ids
    assert rows(loop.step()) == [("C", length + 4, 2)]


def test_blocks_found_while_a_step_is_planned_leave_its_budget_to_others():
    loop = cached_loop(budget=10)
    serve(loop, "A", 13, 1)
    loop.add("B", 13, 2, like=0)  # 12 of its tokens are found
    loop.add("C", 9, 2)
    assert rows(loop.step()) == [("B", 12, 1), ("C", 0, 9)]
    cold = Loop(32, 4, budget=10)
    cold.add("B", 13, 2)
    cold.add("C", 9, 2)
    assert rows(cold.step()) == [("B", 0, 10)]


def test_a_preempted_sequence_that_comes_back_finds_its_own_blocks():
    loop = cached_loop()
    seq = loop.add("A", 10, 8)
    for _ in range(4):
        loop.step()
    assert (seq.num_computed_tokens, len(seq.token_ids)) == (13, 14)
    loop.scheduler.preempt(seq)
    assert loop.scheduler.num_recomputed_tokens == 13
    assert rows(loop.step()) == [("A", 12, 2)]
    assert loop.scheduler.num_recomputed_tokens == 1 and loop.scheduler.num_blocks_hit == 3
    loop.run_to_the_end()
    assert seq.token_ids == written_alone(range(1000, 1010), 8)
    assert seq.request.num_cached_tokens == 0  # of its prompt, when it came


def test_a_block_that_is_evicted_in_the_same_step_is_not_found():
    loop = cached_loop(num_blocks=7)
    serve(loop, "A", 12, 1)  # its blocks 0, 1 and 2 are cached
    serve(loop, "B", 8, 1, like=1)  # and 3 and 4 of another text
    running = loop.add("C", 8, 4)  # takes the blank ones
    loop.step()
    assert sorted(running.block_table) == [5, 6] and loop.allocator.num_evicted == 0
    again = loop.add("D", 12, 2, like=0)
    plan = loop.step()  # C needs a block for its 9th token: A's third, so D finds only two
    assert rows(plan) == [("C", 8, 1), ("D", 8, 4)]
    assert running.block_table[2] == 2 and again.block_table == [0, 1, 4]
    loop.run_to_the_end()
    assert again.token_ids == written_alone(range(1000, 1012), 2)
    assert running.token_ids == written_alone(range(3000, 3008), 4)


def test_the_start_of_a_sequence_does_not_evict_what_was_found_for_it():
    loop = cached_loop(num_blocks=4)
    serve(loop, "A", 13, 1)  # three blocks are cached, one is blank
    seq = loop.add("B", 13, 3, like=0)
    assert rows(loop.step()) == [("B", 12, 1)] and loop.allocator.num_evicted == 0
    loop.run_to_the_end()
    other = loop.add("C", 15, 1)
    other.token_ids[:] = [*range(1000, 1008), *range(7)]  # finds two, evicts the third
    assert rows(loop.step()) == [("C", 8, 7)] and loop.allocator.num_evicted == 1
    assert seq.token_ids == written_alone(range(1000, 1013), 3)


@pytest.mark.parametrize("reason", ["abort", "preempt"])
def test_a_shared_block_stays_when_one_of_its_holders_leaves(reason):
    loop = cached_loop()
    one = loop.add("A", 13, 9)
    loop.step()
    two = loop.add("B", 13, 9, like=0)
    loop.step()
    shared = two.block_table[:3]
    assert one.block_table[:3] == shared
    assert [loop.allocator.ref_count(i) for i in shared] == [2, 2, 2]
    if reason == "abort":
        loop.scheduler.finish(one, "abort")
    else:
        loop.scheduler.preempt(one)
    assert [loop.allocator.ref_count(i) for i in shared] == [1, 1, 1]
    loop.run_to_the_end()
    assert two.token_ids == written_alone(range(1000, 1013), 9)
    assert loop.all_blocks_are_free()


@pytest.mark.parametrize("budget", range(1, 41))
def test_a_chunked_prefill_over_a_cached_prefix_writes_the_same(budget):
    loop = cached_loop(budget=budget)
    serve(loop, "A", 18, 1)  # 16 tokens are cached
    sequences = [loop.add(name, length, 3, like=0) for name, length in zip("BCD", (40, 18, 29))]
    assert rows(loop.step())[0] == ("B", 16, min(24, budget))
    loop.run_to_the_end()
    assert loop.scheduler.num_blocks_hit >= 3 * 4
    for seq in sequences:
        assert seq.token_ids == written_alone(range(1000, 1000 + seq.num_prompt_tokens), 3)


def test_a_filled_block_is_published_after_the_forward_and_not_before():
    loop = cached_loop()
    seq = loop.add("A", 8, 4)
    plan = loop.schedule()
    assert found(loop.allocator, seq.token_ids) == []
    loop.update(plan)
    assert found(loop.allocator, seq.token_ids) == seq.block_table[:2]


# ---- requests that come together -----------------------------------------------------------------
def test_the_same_prompt_twice_in_one_step_is_computed_once():
    loop = cached_loop()
    sequences = [loop.add(name, 9, 3, like=0) for name in "ABC"]
    assert rows(loop.step()) == [("A", 0, 9)]
    assert rows(loop.step()) == [("A", 9, 1), ("B", 8, 1), ("C", 8, 1)]
    loop.run_to_the_end()
    assert len({tuple(seq.token_ids) for seq in sequences}) == 1


def test_a_prompt_follows_another_one_chunk_by_chunk():
    """It waits in each step that fills the block it needs next, and starts behind the last."""
    loop = cached_loop(budget=8)
    loop.add("A", 20, 2)
    loop.add("B", 23, 2, like=0)
    plans = [rows(loop.step()) for _ in range(4)]
    assert plans[:2] == [[("A", 0, 8)], [("A", 8, 8)]]  # no budget is left for B
    assert plans[2] == [("A", 16, 4)]  # 4 tokens are left, but B waits for the block [16, 20)
    assert plans[3] == [("A", 20, 1), ("B", 20, 3)]


@pytest.mark.parametrize(
    "change",
    [
        lambda one, two: setattr(one, "cache_prefix", False),
        lambda one, two: setattr(two, "cache_prefix", False),
        lambda one, two: setattr(two, "cache_salt", "a"),
        lambda one, two: setattr(two, "prompt_logprobs", [None]),
    ],
    ids=["the first is not cached", "the second is not", "another salt", "log-probabilities"],
)
def test_a_request_that_could_not_find_the_block_does_not_wait_for_it(change):
    loop = cached_loop()
    one, two = (loop.add(name, 9, 3, like=0) for name in "AB")
    change(one.request, two.request)
    assert rows(loop.step()) == [("A", 0, 9), ("B", 0, 9)]
    assert rows(loop.step()) == [("A", 9, 1), ("B", 9, 1)]


def test_a_block_whose_writer_is_aborted_is_waited_for_one_step_and_no_longer():
    loop = cached_loop()
    one, two = (loop.add(name, 9, 3, like=0) for name in "AB")
    plan = loop.schedule()
    assert rows(plan) == [("A", 0, 9)]
    loop.scheduler.finish(one, "abort")  # before its blocks are published
    loop.update(plan)
    assert rows(loop.step()) == [("B", 0, 9)]
    loop.run_to_the_end()
    assert two.token_ids == written_alone(range(1000, 1009), 3)


def test_those_behind_one_that_waits_for_a_block_start_a_step_later():
    """The order is kept, as for one that does not fit: nothing of it is taken by a later one."""
    loop = cached_loop()
    for name, like in [("A", 0), ("B", 0), ("C", None)]:
        loop.add(name, 9, 3, like=like)
    assert rows(loop.step()) == [("A", 0, 9)]
    assert rows(loop.step()) == [("A", 9, 1), ("B", 8, 1), ("C", 0, 9)]


def test_a_step_in_flight_is_waited_for_until_it_is_read():
    loop = cached_loop()
    loop.add("A", 9, 4)
    first = loop.schedule()
    loop.add("B", 9, 4, like=0)
    second = loop.scheduler.schedule(in_flight=1)  # A's blocks are computed, and not read yet
    assert rows(second) == [("A", 9, 1)]
    loop.update(first)
    third = loop.scheduler.schedule(in_flight=1)
    assert rows(third) == [("A", 10, 1), ("B", 8, 1)]


# ---- the engine ----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ENGINES, ids=["plain", "ahead"])
@pytest.mark.parametrize("digest", [sha256_digest, one_bit, always_equal])
def test_random_traffic_over_blocks_that_are_shared_changes_no_token(kind, digest):
    """All requests come twice, from the same client: most are found, whatever the hash."""
    num_hits = 0
    for seed in range(6):
        engine = build(kind, num_blocks=30, allocator=partial(PrefixCache, digest=digest))
        ledger = Ledger(engine)
        traffic = draw_traffic(seed)
        later = [(step + delay, *act) for step, *act in traffic for delay in (3, 11)]
        ledger.play(traffic + [act for act in later if act[1] == "add"])
        ledger.check()
        num_hits += engine.scheduler.num_blocks_hit
    assert num_hits > 0


# Two turns of a chat, a common beginning of 21 tokens, and one prompt of exactly five blocks of 4.
COMMON = [(7 * i + 3) % 97 for i in range(21)]
CHATS = [[*COMMON, 5, 6, 7], COMMON[:20], [*COMMON, 9], [1, 2, 3], [*COMMON, 5, 6, 7, 8, 9, 10]]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
WARM_RUNS = [("torch", False), ("torch", True), ("numba", False), ("numba", True)]
WARM_RUNS += [("triton", False), ("triton-simple", False)]


@pytest.mark.parametrize("backend, plan_ahead", WARM_RUNS)
def test_warm_runs_write_what_cold_runs_write(monkeypatch, tiny_gpt, backend, plan_ahead):
    """In float64 a sum in another order changes no token. Each backend's own kernels must run."""
    if BACKENDS[backend].missing or BACKENDS[backend].device not in (None, "cpu"):
        pytest.skip(f"{backend} is not installed, or does not run on a CPU")
    kernels = BACKENDS[backend].load()
    calls = []

    def counted(*args, **kwargs):
        calls.append(backend)
        return kernels.paged_attention(*args, **kwargs)

    replaced = backends.Kernels(counted, kernels.write_kv)
    monkeypatch.setitem(BACKENDS, backend, BACKENDS[backend]._replace(load=lambda: replaced))
    prompts, params, num_layers = CHATS, GREEDY, 2
    if "triton" in backend:  # its kernels are slow on a CPU
        prompts, params, num_layers = [COMMON[:9], COMMON[:8]], replace(GREEDY, max_tokens=5), 1
    model = tiny_gpt(seed=5, dtype=torch.float64, n_layer=num_layers)
    options = {"backend": backend, "block_size": 4, "num_blocks": 64, "plan_ahead": plan_ahead}
    options |= {"max_num_batched_tokens": 16}

    def texts_of(llm):
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    cold = texts_of(LLM(model, enable_prefix_caching=False, **options))
    assert len({token for text in cold for token in text}) >= 4
    llm, num_calls = LLM(model, **options), len(calls)
    num_hits = []
    for _ in range(2):  # in the first run some wait for the blocks of the first prompt
        assert texts_of(llm) == cold
        num_hits.append(llm.engine.scheduler.num_blocks_hit)
    full = [(len(prompt) - 1) // 4 for prompt in prompts]  # the last token is always computed
    assert num_hits[0] >= sum(full[1:]) - 2 and num_hits[1] - num_hits[0] >= sum(full)
    assert len(calls) > num_calls > 0 and set(calls) == {llm.backend}


def test_in_float32_a_warm_run_changes_logits_in_their_last_digits_only(tiny_gpt):
    """Logits here are between -10 and 10, and a wrong block changes them by more than 1."""

    def logits_of(llm):  # (10, V)
        rows = []

        def strategy(sequences, logits):
            rows.append(logits[0].clone())
            return sample_next(sequences, logits)

        llm.engine.add_request(CHATS[0], GREEDY, strategy=strategy)
        while llm.engine.has_unfinished():
            llm.engine.step()
        return torch.stack(rows)

    model = tiny_gpt(seed=5)
    options = {"backend": "torch", "block_size": 4, "num_blocks": 64}
    cold = logits_of(LLM(model, enable_prefix_caching=False, **options))
    llm = LLM(model, **options)
    logits_of(llm)
    warm = logits_of(llm)
    assert llm.engine.scheduler.num_blocks_hit == 5
    assert (warm - cold).abs().max() < 1e-4


# ---- requests and their options ------------------------------------------------------------------
def test_options_of_a_request_say_what_it_shares(tiny_gpt):
    llm = LLM(tiny_gpt(), block_size=4, num_blocks=64)
    prompt = COMMON[:14]

    def cached(params=GREEDY, **options):
        return llm.generate(prompt, params, **options)[0].num_cached_tokens

    assert cached(cache_prefix=False) == 0  # and it leaves nothing
    assert cached() == 0
    assert cached() == 12
    assert cached(cache_prefix=False) == 0
    assert cached(cache_salt="a") == 0
    assert cached(cache_salt="a") == 12 and cached(cache_salt="b") == 0
    scored = replace(GREEDY, prompt_logprobs=0)
    assert cached(scored) == 0  # the logits of all of its prompt are needed
    assert cached(scored, cache_salt="c") == 0 and cached(cache_salt="c") == 12  # but it publishes
    off = LLM(tiny_gpt(), block_size=4, num_blocks=64, enable_prefix_caching=False)
    assert [off.generate(prompt, GREEDY)[0].num_cached_tokens for _ in range(2)] == [0, 0]


@pytest.mark.parametrize(
    "options", [{"cache_prefix": None}, {"cache_prefix": 1}, {"cache_salt": 5}]
)
def test_an_option_of_another_type_is_refused(tiny_gpt, options):
    llm = LLM(tiny_gpt(), num_blocks=8)
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is {options[name]}: it must be"):
        llm.generate([1, 2, 3], **options)
    with pytest.raises(ValueError, match="enable_prefix_caching is 1: it must be True or False"):
        LLM(tiny_gpt(), num_blocks=8, enable_prefix_caching=1)


def test_a_step_reports_blocks_that_were_found_and_evicted(tiny_gpt):
    llm = LLM(tiny_gpt(), block_size=4, num_blocks=8)
    reports = []
    llm.engine.watchers.append(lambda output: reports.append(output.blocks))
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for prompt in (COMMON[:13], COMMON[:13], [5] * 20):
        llm.generate(prompt, params)
    assert sum(blocks.hit for blocks in reports) == 3
    # 4 full blocks of the first two are cached; the last one takes 6 of 8 blocks.
    assert sum(blocks.evicted for blocks in reports) == 2
    assert sum(blocks.taken - blocks.freed for blocks in reports) == 0


def test_every_experiment_says_whether_its_engines_share_blocks():
    """The cache is on by default: a figure that was measured without it must not profit from it."""
    paths = set((ROOT / "experiments").glob("*.py"))
    for path in paths - {ROOT / "experiments" / "sharing.py"}:  # it measures the cache itself
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "LLM":
                said = {keyword.arg for keyword in node.keywords}
                assert "enable_prefix_caching" in said, f"{path.name}:{node.lineno}"
