"""Every step, choose again who runs: continuous batching, chunked prefill, preemption.

A static batch starts together and ends with its longest member: a request for 5 tokens beside one
for 500 keeps its place, unused, for 495 steps. Here each step is planned from scratch. There is no
"prefill phase" and no "decode phase" either: `num_computed_tokens` says how many of a sequence's
tokens are in the cache, and in every step it may catch up, within the step's token budget:

    a new prompt of 300 tokens   300 behind  ->  64 now, 64 in the next step, .. (chunked prefill)
    a sequence that is writing     1 behind  ->  1 now                           (decode)
    preempted after 120 tokens   120 behind  ->  all of them again, later        (recompute)

    F  5+9     ..Pdddddddd    P  new tokens of a prompt    d  one new token    .  waits
    G  5+5     ......PdddxP   x  preempted: C and F take its blocks; then all tokens again

When the pool is full the last in the order of precedence gives up all its blocks and waits. It
stays ahead of all requests that came after it. The first in line is never preempted for another,
so it always finishes, and there is no livelock. This file touches no tensor: a plan is numbers and
block ids. The picture docs/batching.svg shows a static and a continuous batch side by side.

Yu et al. 2022, "Orca", OSDI, section 3.1 (iteration-level scheduling); Kwon et al. 2023,
"PagedAttention", arXiv:2309.06180, section 4.5 (preemption); Agrawal et al. 2023, "Sarathi",
arXiv:2308.16369 (chunked prefill).
Run: python scheduler.py
Try: MAX_NUM_BATCHED_TOKENS = 4 in the demo: prompts arrive in pieces (PP), and it takes 20 steps.
Or NUM_BLOCKS = 12: nothing is preempted, so the assert "one preemption" fails.
"""

import heapq
import numbers
from bisect import insort
from collections.abc import Callable
from itertools import islice
from operator import attrgetter
from typing import Any

from block_allocator import BlockAllocator, NoFreeBlocks
from policies import first_come_first_served
from sequence import FINISHED, RUNNING, WAITING, Continuation, Plan, Request, Scheduled, Sequence


def reserve_now(seq: Sequence) -> int:
    """Paged: memory for the tokens a sequence has now, none for those it may have later."""
    return len(seq.token_ids)


def key_shape(key: Any) -> Any:
    """The form of a key; keys of one form are comparable. (3, "a") -> (Real, str).

    Raises TypeError for anything but numbers, strings, and tuples of them, and for a NaN.
    """
    if isinstance(key, tuple):
        return tuple(key_shape(part) for part in key)
    if isinstance(key, str):
        return str
    if not isinstance(key, numbers.Real) or key != key:  # a NaN is not even equal to itself
        raise TypeError(f"the key {key!r} has no order: numbers, strings and tuples of them have")
    return numbers.Real


class Scheduler:
    """Decides which sequences run, and which blocks each of them holds.

    `reserve(seq)` says for how many tokens a sequence needs memory, `policy(seq)` its place in
    the order of precedence (see policies.py). The policy is asked once for each request: its forks
    stand in line behind their parent. A sequence holds its blocks from its start until it ends or
    is preempted. Raises ValueError for a limit below 1.
    """

    can_run_together = False  # beam_search.py has a scheduler for `Request.runs_together`

    def __init__(
        self,
        allocator: BlockAllocator,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_seq_len: int,
        reserve: Callable[[Sequence], int] = reserve_now,
        policy: Callable[[Sequence], Any] = first_come_first_served,
    ):
        if min(max_num_seqs, max_num_batched_tokens) < 1:
            limits = f"{max_num_seqs=}, {max_num_batched_tokens=}"
            raise ValueError(f"{limits}: both must be at least 1")
        self.allocator = allocator
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_seq_len = max_seq_len
        self.reserve = reserve
        self.policy = policy
        # A sequence that has not ended is either in `running` or in the heap. `running` is sorted
        # by `seq.key`, so its last entry is the next one to be preempted, and the sequences of a
        # request stand side by side.
        self.running: list[Sequence] = []
        self._waiting: list[tuple] = []  # a heap of (key, tie-breaker, sequence)
        # The tie-breaker: of two equal keys the earlier push comes first. Without it the heap would
        # compare two Sequences, which have no order.
        self._pushes = 0
        # Under "of all" the form of the first key, which all others must have. A dict, because
        # several threads may call `check`, and `setdefault` is one operation.
        self._key_shape: dict[str, Any] = {}
        self.num_waiting = 0  # the heap's entries without those that were aborted while they waited
        self._last_plan = Plan()
        # Totals, for statistics:
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0  # tokens that were computed, and lost to a preemption
        self.num_blocks_taken = 0  # that got their first holder
        self.num_blocks_freed = 0  # that lost their last one
        self.num_blocks_hit = 0  # found already filled, by the allocator's `match_prefix`

    # ---- in and out ----
    def check(self, request: Request) -> None:
        """Set `key` and `longest` of a request's sequences, and refuse what can never be served.

        Raises ValueError if the pool is too small for one sequence, if `reserve` or the policy
        fails, or if a key cannot be compared with the others. It changes no queue, so any thread
        may call it.
        """
        if request.runs_together and not self.can_run_together:
            raise ValueError("sequences that run together need the scheduler of beam_search.py")
        for seq in request.sequences:
            seq.longest = min(seq.num_prompt_tokens + seq.max_tokens, self.max_seq_len)
        try:
            key = self.policy(request.sequences[0])
            shape = key_shape(key)
            reserved = [self.reserve(seq) for seq in request.sequences]
        except Exception as error:
            raise ValueError(f"the policy or reserve function failed: {error!r}") from error
        for seq, num_reserved in zip(request.sequences, reserved, strict=True):
            # Of equal keys of the policy the earlier arrival comes first.
            seq.key = (key, request.arrival, seq.index)
            self._check_size(seq, num_reserved)
        if self._key_shape.setdefault("of all", shape) != shape:
            raise ValueError(f"the policy's key {key!r} cannot be compared with other keys")

    def _check_size(self, seq: Sequence, num_reserved: int) -> None:
        """Raise ValueError if a sequence needs more blocks at its end than the pool has."""
        if type(num_reserved) is not int:
            raise ValueError(f"the reserve function returned {num_reserved!r}: an int is needed")
        # Alone in the pool, a sequence must be able to reach its end. Then a running sequence
        # that has preempted all others always gets its blocks.
        needed = self.allocator.blocks_needed(max(seq.longest, num_reserved))
        if needed > self.allocator.num_blocks:
            raise ValueError(
                f"{seq.num_prompt_tokens} prompt tokens and up to {seq.max_tokens} more need "
                f"{needed} blocks of {self.allocator.block_size}, the pool has "
                f"{self.allocator.num_blocks}: lower max_tokens or enlarge the pool"
            )

    def enqueue(self, request: Request) -> None:
        """Put the sequences of a request into the waiting queue. Call `check` before it."""
        for seq in request.sequences:
            self._push(seq)

    def add(self, request: Request) -> None:
        """Check a request and queue it. Raises ValueError as `check` does, and then queues none."""
        self.check(request)
        self.enqueue(request)

    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.running or self.num_waiting)

    def finish(self, seq: Sequence, reason: str | None) -> None:
        """End a sequence in any state and free its blocks. Ending it twice does nothing."""
        if seq.status == RUNNING:
            self.running.remove(seq)
            self._free(seq)
        elif seq.status == WAITING:
            self.num_waiting -= 1
        else:
            return
        seq.status, seq.finish_reason = FINISHED, reason
        # If a waiting sequence is aborted its entry stays in the heap, because it is slow to find.
        # When more than half of all entries are of that kind, the heap is built again without them.
        if len(self._waiting) > 2 * self.num_waiting + 8:
            self._waiting = [entry for entry in self._waiting if entry[2].status == WAITING]
            heapq.heapify(self._waiting)

    # ---- the plan ----
    def schedule(self, in_flight: int = 0) -> Plan:
        """Choose who runs in this step, give them blocks, advance their `num_computed_tokens`.

        `in_flight` is 1 if the step before is launched and its tokens are not read yet: a sequence
        that is 0 tokens behind then has one more token, which the host does not know. (See
        speedups/plan_ahead.py.)
        """
        plan = Plan()
        budget = self._continue_running(plan, self.max_num_batched_tokens, in_flight)
        # After a preemption nothing starts. The first that waits is the preempted sequence, and it
        # could only take back blocks that the running ones need in the next steps.
        if not plan.preempted:
            self._start_waiting(plan, budget, in_flight)
        self._last_plan = plan
        return plan

    def _continue_running(self, plan: Plan, budget: int, in_flight: int) -> int:
        """Plan the running sequences in their order; returns what is left of the token budget."""
        # A copy of the list (a slice), because preemption shortens the list itself, from its end.
        # Forks may make `running` longer than max_num_seqs.
        return self._continue_each(self.running[: self.max_num_seqs], plan, budget, in_flight)

    def _continue_each(
        self, sequences: list[Sequence], plan: Plan, budget: int, in_flight: int
    ) -> int:
        """Plan some running sequences, each as far as it can go; returns the budget's rest."""
        block_size, ref_count = self.allocator.block_size, self.allocator.ref_count
        for seq in sequences:
            # If this sequence was preempted for an earlier one, then all that follow it were too.
            if budget == 0 or seq.status != RUNNING:
                break
            start, table = seq.num_computed_tokens, seq.block_table
            num_new_tokens = len(seq.token_ids) - start  # 1: a decode
            if num_new_tokens > budget:  # (`min` takes 0.1 us longer, 256 times a step)
                num_new_tokens = budget
            if num_new_tokens == 0:
                # Its next token is in flight. Does the sequence end with it? Then it needs no row.
                if not in_flight or len(seq.token_ids) + in_flight >= seq.longest:
                    continue
                # Nor if it forks with it: of its n next tokens only the first would be computed.
                if seq.request.max_num_sequences > 1 and seq.num_generated == 0:
                    continue
                num_new_tokens = in_flight
            # The common case: one token is written, to a block that the sequence has and shares
            # with no other. Position 18, block_size 16 -> logical block 1.
            first = start // block_size
            has_room = first < len(table) and ref_count(table[first]) == 1
            if not (num_new_tokens == 1 and has_room):
                if not self._make_room([(seq, num_new_tokens)], plan):
                    break  # it was the last in line, and gave up its own blocks
            self._advance(seq, num_new_tokens, plan)
            budget -= num_new_tokens
        return budget

    def _start_waiting(self, plan: Plan, budget: int, in_flight: int) -> None:
        """Start waiting sequences in their order, until one does not fit or the budget is used."""
        # The first that does not fit stops the loop, even if a shorter one behind it would fit.
        # Otherwise short prompts could overtake a long one for ever.
        while budget and len(self.running) < self.max_num_seqs:
            group = self._next_waiting()
            num_free = self.allocator.num_free
            tables = [self._find_blocks(seq) for seq in group]
            is_early = group and self._is_being_filled(group[0], len(tables[0]), plan, in_flight)
            if not group or is_early or not self._start(group, tables):
                for table in tables:
                    self.allocator.free(table)
                break
            # A found block that nobody held is taken, too.
            self.num_blocks_taken += num_free - self.allocator.num_free
            plan.started += group
            for seq, num_new_tokens in self._chunks(group, budget):
                self._advance(seq, num_new_tokens, plan)
                budget -= num_new_tokens

    def _chunks(self, group: list[Sequence], budget: int) -> list[tuple[Sequence, int]]:
        """How many tokens each of the sequences that have just started computes now."""
        return [(seq, min(len(seq.token_ids) - seq.num_computed_tokens, budget)) for seq in group]

    def _advance(self, seq: Sequence, num_new_tokens: int, plan: Plan) -> None:
        """Enter a sequence's new tokens in the plan."""
        start = seq.num_computed_tokens
        # The same as Scheduled(seq, start, num_new_tokens) in half the time, 256 times a step.
        plan.scheduled.append(tuple.__new__(Scheduled, (seq, start, num_new_tokens)))
        seq.num_computed_tokens = start + num_new_tokens
        # A prompt of 300 tokens, 64 a step: only the fifth chunk, [256, 300), leads to a token.
        # (With a token in flight, the end is one more than the tokens that are known.)
        if start + num_new_tokens >= len(seq.token_ids):
            plan.sampled.append(seq)  # its newest token is computed, so the next can be drawn

    # ---- blocks for running sequences ----
    def _make_room(self, chunks: list[tuple[Sequence, int]], plan: Plan) -> bool:
        """Give sequences the blocks that their next tokens are written to; none of them is shared.

        `chunks` are sequences of one request, and how many tokens each of them computes. All blocks
        are counted, then taken at once. If the pool has too few, the last in line is preempted,
        again and again, until it has enough. Returns False if that was one of these sequences.
        """
        new_blocks = [self._num_new_blocks(seq, num_new_tokens) for seq, num_new_tokens in chunks]
        while True:
            # Counted anew after each preemption. If the last in line was a fork, the blocks that it
            # shared may have no second holder any more, and need no copy.
            shared = self._shared_blocks(chunks)
            try:
                block_ids = self.allocator.allocate(sum(new_blocks) + len(shared))
                break
            except NoFreeBlocks:
                self._preempt_last(plan, chunks[0][0].request)
                if any(seq.status != RUNNING for seq, _ in chunks):
                    return False
        self.num_blocks_taken += len(block_ids)
        taken = iter(block_ids)
        for (seq, _), count in zip(chunks, new_blocks, strict=True):
            seq.block_table += islice(taken, count)
        for (seq, i), copy in zip(shared, taken, strict=True):
            self._copy_on_write(seq.block_table, i, copy, plan)
        return True

    def _num_new_blocks(self, seq: Sequence, num_new_tokens: int) -> int:
        """How many blocks its table lacks for its next tokens."""
        end = seq.num_computed_tokens + num_new_tokens
        num_held = len(seq.block_table)
        # A comparison of sizes, never a modulo: 17 tokens, block_size 16, 1 block held -> 1 more.
        if end <= num_held * self.allocator.block_size:
            return 0
        return self._blocks_wanted(seq, end) - num_held

    def _shared_blocks(self, chunks: list[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
        """Which blocks must be copied before they are written: (sequence, index in its table).

        Of a block that nobody else holds one of the writers needs no copy: the last of them.
        """
        allocator = self.allocator
        num_holders: dict[int, int] = {}  # of a block, without those that will have copied it
        shared = []
        for seq, num_new_tokens in chunks:
            start, table = seq.num_computed_tokens, seq.block_table
            # Positions 6 to 8 in blocks of 4: the logical blocks 1 and 2 are written, [1, 3).
            end_block = min(allocator.blocks_needed(start + num_new_tokens), len(table))
            for i in range(start // allocator.block_size, end_block):
                count = num_holders.get(table[i], allocator.ref_count(table[i]))
                if count > 1:
                    shared.append((seq, i))
                    num_holders[table[i]] = count - 1
        return shared

    def _copy_on_write(self, table: list[int], i: int, copy: int, plan: Plan) -> None:
        """Replace a shared block in a table by a copy of its own."""
        # The copy is only planned here. The engine makes all copies of a step in one call before
        # the forward, and only the forward writes into blocks, so the source still has its content.
        plan.copies.append((table[i], copy))
        self.allocator.free([table[i]])  # the fork that shares it still holds it
        table[i] = copy

    def _preempt_last(self, plan: Plan, keeper: Request | None = None) -> None:
        """The last request in line gives up the blocks of all its sequences.

        If it is the `keeper`, the request that needs the blocks, only its last sequence does:
        otherwise a request that is alone in the pool would lose everything again and again.
        """
        last = self.running[-1]
        is_alone = last.request is keeper
        victims = [last] if is_alone else self._running_sequences(last.request)
        for seq in victims:
            if seq.status == RUNNING:  # (beam_search.py preempts them all with the first)
                self.preempt(seq)
        plan.preempted += victims

    def _running_sequences(self, request: Request) -> list[Sequence]:
        """Those of one request, in the order of precedence."""
        return [seq for seq in self.running if seq.request is request]

    def _blocks_wanted(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks for `num_tokens` and for what the sequence reserves; at most the whole pool."""
        try:
            reserved = self.reserve(seq)
            if type(reserved) is not int:
                raise TypeError(f"it returned {reserved!r}: an int is needed")
            wanted = self.allocator.blocks_needed(max(num_tokens, reserved))
        except Exception as error:  # the caller's function failed: only this sequence ends
            seq.error = f"the reserve function failed: {error!r}"
            wanted = self.allocator.blocks_needed(num_tokens)
        return min(wanted, self.allocator.num_blocks)

    def _start(self, group: list[Sequence], tables: list[list[int]]) -> bool:
        """Move the first in line from waiting to running if the pool has what it reserves.

        `tables` are the blocks that were found for each of the group.
        """
        wanted = [self._blocks_wanted(seq, len(seq.token_ids)) for seq in group]
        if sum(wanted) - sum(map(len, tables)) > self.allocator.num_free:
            return False
        for seq, table, num_blocks in zip(group, tables, wanted, strict=True):
            seq.block_table = table + self.allocator.allocate(num_blocks - len(table))
            self._use_found(seq, len(table))
            heapq.heappop(self._waiting)
            self.num_waiting -= 1
            self._run(seq)
        return True

    # ---- blocks that were computed before, or are being computed ----
    def _find_blocks(self, seq: Sequence) -> list[int]:
        """Blocks that already hold the sequence's first tokens, with one more holder each."""
        request = seq.request
        # The logits of a prompt that is scored are needed at all of its positions.
        if not request.cache_prefix or request.prompt_logprobs is not None:
            return []
        # Its last token is always computed, even if a cache has it: the next token is drawn from
        # the logits of that token's query.
        return self.allocator.match_prefix(seq.token_ids[:-1], request.cache_salt)

    def _use_found(self, seq: Sequence, num_found: int) -> None:
        """A sequence starts with this many blocks that are computed already."""
        # Found blocks are full: 2 of 16 -> tokens [0, 32). The plain allocator finds none.
        seq.num_computed_tokens = num_found * self.allocator.block_size
        self.num_blocks_hit += num_found
        # Tokens that a preemption cost it, and that it finds again, are not computed again.
        self.num_recomputed_tokens -= min(seq.num_lost_tokens, seq.num_computed_tokens)
        seq.num_lost_tokens = 0
        if seq.index == 0 and seq.num_generated == 0 and seq.num_preemptions == 0:
            seq.request.num_cached_tokens = seq.num_computed_tokens

    def _is_being_filled(self, seq: Sequence, num_found: int, plan: Plan, in_flight: int) -> bool:
        """Whether this step fills the first block that was not found for a waiting sequence.

        Then the sequence starts a step later and finds it, instead of computing the same tokens.
        """
        request, end = seq.request, (num_found + 1) * self.allocator.block_size
        is_reader = request.cache_prefix and request.prompt_logprobs is None
        if not self.allocator.keeps_contents or not is_reader or end >= len(seq.token_ids):
            return False
        # What a step in flight has filled cannot be found yet either.
        entries = plan.scheduled + (self._last_plan.scheduled if in_flight else [])
        return any(
            # Block 2 of 16 tokens is [32, 48): the step that reaches 48 fills it.
            start < end <= start + num_new_tokens
            and other.request.cache_prefix
            and other.request.cache_salt == request.cache_salt
            and other.token_ids[:end] == seq.token_ids[:end]
            for other, start, num_new_tokens in entries
        )

    def preempt(self, seq: Sequence) -> None:
        """Take a running sequence's blocks and let it wait, to compute its tokens again later."""
        self.running.remove(seq)
        self.num_preemptions += 1
        # Only K and V are lost. Its tokens stay, so the next prefill computes prompt and output.
        # vLLM recomputes too; its first engine could also swap the blocks to host memory.
        seq.num_preemptions += 1
        self._lose_tokens(seq)
        self._free(seq)
        self._push(seq)

    # ---- after the forward ----
    def update(self, plan: Plan, continuations: list[Continuation]) -> None:
        """Append the sampled tokens, end what is complete, fork parents of several children.

        A sampled sequence without a continuation ends: its strategy (a beam search) dropped it.
        This is the only place where a sequence ends, except for `abort`.
        """
        block_size = self.allocator.block_size
        for seq, start, num_new_tokens in plan.scheduled:
            # What this plan computed; a later plan may have advanced the sequence already. If it
            # filled no block there is nothing to publish: 33 + 1 tokens of 16, 2 full blocks.
            end = start + num_new_tokens
            if end // block_size > start // block_size and seq.status == RUNNING:
                request = seq.request
                if request.cache_prefix:
                    self.allocator.publish(seq.block_table, seq.token_ids, end, request.cache_salt)
        # parent -> its first child: reversed, because a dict keeps the last of equal keys. The
        # parent itself goes on as its first child.
        first = {c.parent: c for c in reversed(continuations)}
        if len(first) < len(continuations):
            seen: set[Sequence] = set()
            for c in continuations:
                # The others are forked now, before the parent itself gets its new tokens.
                if c.parent in seen and c.parent.status == RUNNING:
                    self._extend(self._fork(c.parent, c, plan), c, plan)
                seen.add(c.parent)
        for seq in plan.sampled:
            if seq.status == RUNNING:  # otherwise it was preempted since the plan was made
                continuation = first.get(seq)
                if continuation is None:
                    self._end(seq, None, plan)
                else:
                    self._extend(seq, continuation, plan)

    def _extend(self, seq: Sequence, continuation: Continuation, plan: Plan) -> None:
        """Append a continuation's tokens. If one of them ends the sequence, drop those after it."""
        new_token_ids = continuation.token_ids
        num_before = len(seq.token_ids)
        num_kept, reason = self.find_end(seq, new_token_ids)
        plan.extended.append((seq, num_before, num_before + num_kept))
        seq.token_ids += new_token_ids[:num_kept]
        if continuation.logprobs is not None:
            seq.logprobs += continuation.logprobs[:num_kept]
        if continuation.error or seq.error:
            seq.error = continuation.error or seq.error
            reason = "error"
        elif continuation.stop_string is not None:
            # The last token completes the stop string. If that token ends the sequence too, at
            # max_tokens for example, the reason is still the stop string.
            reason, seq.stop_reason = "stop", continuation.stop_string
        elif reason == "stop":
            seq.stop_reason = seq.token_ids[-1]
        if reason is not None:
            self._end(seq, reason, plan)

    def find_end(self, seq: Sequence, new_token_ids: list[int]) -> tuple[int, str | None]:
        """How many of a sequence's new tokens are kept, and why it ends with the last of them.

        The token that ends a text is kept in `token_ids`; outputs.py leaves it out of the text.
        The reason is None if the sequence goes on.
        """
        num_tokens = len(seq.token_ids)
        for token_id in new_token_ids:
            num_tokens += 1
            if token_id in seq.stop_token_ids:
                if num_tokens - seq.num_prompt_tokens >= seq.min_tokens:
                    return num_tokens - len(seq.token_ids), "stop"
            if num_tokens >= seq.longest:
                return num_tokens - len(seq.token_ids), "length"
        return len(new_token_ids), None

    def _end(self, seq: Sequence, reason: str | None, plan: Plan) -> None:
        """End a sequence, and note it in the plan first."""
        plan.ended.append(seq)
        self.finish(seq, reason)

    def _fork(self, parent: Sequence, continuation: Continuation, plan: Plan) -> Sequence:
        """A second sequence with the same tokens. It shares all blocks until one of them writes."""
        self.allocator.fork(parent.block_table)
        child = Sequence(
            request=parent.request,
            index=len(parent.request.sequences),
            token_ids=list(parent.token_ids),
            num_prompt_tokens=parent.num_prompt_tokens,
            max_tokens=parent.max_tokens,
            longest=parent.longest,
            min_tokens=parent.min_tokens,
            stop_token_ids=parent.stop_token_ids,
            seed=parent.seed if continuation.seed is None else continuation.seed,
            num_computed_tokens=parent.num_computed_tokens,
            block_table=list(parent.block_table),  # the same block ids in a list of its own
            logprobs=list(parent.logprobs),
        )
        policy_key, arrival, _ = parent.key
        child.key = (policy_key, arrival, child.index)
        plan.forked.append(child)
        parent.request.sequences.append(child)
        self._run(child)
        return child

    # ---- after an interruption ----
    def take_back(self, plan: Plan) -> None:
        """Remove the tokens and forks that `update` made, even if it was interrupted half-way.

        It does not repair the queues and block tables: call `rebuild` after it.
        """
        for seq, num_before, _ in plan.extended:
            del seq.token_ids[num_before:]
            del seq.logprobs[max(0, num_before - seq.num_prompt_tokens) :]
        for seq in plan.ended:
            seq.status = WAITING
            seq.finish_reason = seq.stop_reason = seq.error = None
        for child in plan.forked:
            if child in child.request.sequences:
                child.request.sequences.remove(child)

    def rebuild(self, requests: list[Request]) -> None:
        """Empty the pool and the queues, then queue each unfinished sequence, with no blocks.

        An exception in the middle of a step (Ctrl-C, for example) may leave the queues, the block
        tables and the allocator's counts half changed. The tokens of the sequences are intact, and
        a sequence that waits computes its tokens again.
        """
        self.allocator.reset()
        self.num_blocks_freed = self.num_blocks_taken
        self.running = []
        self._waiting = []
        self.num_waiting = 0
        for request in requests:
            for seq in request.sequences:
                if seq.status != FINISHED:
                    self._lose_tokens(seq)
                    seq.block_table = []
                    self._push(seq)

    # ---- the queues ----
    def _run(self, seq: Sequence) -> None:
        """Enter a sequence among the running ones, at its place in the order of precedence."""
        seq.status = RUNNING
        insort(self.running, seq, key=attrgetter("key"))

    def _push(self, seq: Sequence) -> None:
        """Enter a sequence in the waiting queue."""
        seq.status = WAITING
        self._pushes += 1
        heapq.heappush(self._waiting, (seq.key, self._pushes, seq))
        self.num_waiting += 1

    def _next_waiting(self) -> list[Sequence]:
        """The waiting sequence that comes first, in a list; empty if none waits.

        It stays in the queue. (With beams there may be several, see beam_search.py.)
        """
        # `finish` leaves the entry of an aborted sequence in the heap: it is dropped at the top.
        while self._waiting and self._waiting[0][2].status != WAITING:
            heapq.heappop(self._waiting)
        return [entry[2] for entry in self._waiting[:1]]

    def _free(self, seq: Sequence) -> None:
        """Give back a sequence's blocks."""
        num_free = self.allocator.num_free
        self.allocator.free(seq.block_table)
        # a block that another sequence holds too is not free yet
        self.num_blocks_freed += self.allocator.num_free - num_free
        seq.block_table = []

    def _lose_tokens(self, seq: Sequence) -> None:
        """Count a sequence's computed tokens as lost."""
        self.num_recomputed_tokens += seq.num_computed_tokens
        seq.num_lost_tokens, seq.num_computed_tokens = seq.num_computed_tokens, 0

    def check_integrity(self) -> None:
        """Assert that running sequences hold all used blocks, with room for their tokens."""
        self.allocator.check_integrity([seq.block_table for seq in self.running])
        for seq in self.running:
            room = len(seq.block_table) * self.allocator.block_size
            assert seq.status == RUNNING and seq.num_computed_tokens <= room
            assert seq.num_computed_tokens <= len(seq.token_ids)
        waiting = [seq for _, _, seq in self._waiting if seq.status == WAITING]
        assert len(waiting) == self.num_waiting
        assert all(not seq.block_table and seq.num_computed_tokens == 0 for seq in waiting)


# --------------------------------------------------------------------------------------------------
NUM_BLOCKS = 8
MAX_NUM_BATCHED_TOKENS = 16
MAX_NUM_SEQS = 4
WANTED = {  # name: (prompt tokens, generated tokens)
    **{"A": (3, 2), "B": (6, 2), "C": (3, 12), "D": (3, 6)},
    **{"E": (5, 4), "F": (5, 9), "G": (5, 5)},
}


def demo():
    """Seven requests in a pool of 8 blocks of 4: who runs in which step, as one strip each."""
    scheduler = Scheduler(
        BlockAllocator(NUM_BLOCKS, block_size=4), MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, 64
    )
    strips: dict[Sequence, str] = {}
    for arrival, (name, (prompt, generated)) in enumerate(WANTED.items()):
        request = Request(name, list(range(prompt)), arrival)
        request.sequences = [Sequence(request, 0, list(range(prompt)), prompt, generated)]
        scheduler.add(request)
        strips[request.sequences[0]] = ""

    while scheduler.has_unfinished():
        plan = scheduler.schedule()
        scheduler.check_integrity()
        marks = {seq: "x" for seq in plan.preempted}
        marks |= {seq: "P" if num_new > 1 else "d" for seq, _, num_new in plan.scheduled}
        for seq in strips:
            strips[seq] += marks.get(seq, " " if seq.status == FINISHED else ".")
        scheduler.update(plan, [Continuation(seq, [0]) for seq in plan.sampled])

    print(f"prompt + generated tokens; at most {MAX_NUM_SEQS} at once, ", end="")
    print(f"{MAX_NUM_BATCHED_TOKENS} tokens a step, {NUM_BLOCKS} blocks of 4\n")
    for (name, (prompt, generated)), strip in zip(WANTED.items(), strips.values(), strict=True):
        print(f"{name} {prompt:2}+{generated:<2} {strip}")
    print("\nP several tokens of a prompt, d one token, . waits, x preempted")
    print(f"{scheduler.num_preemptions} preemption, ", end="")
    print(f"{scheduler.num_recomputed_tokens} tokens computed again")
    num_steps = len(strip)
    static_steps, static_blocks = static_batches(list(WANTED.values()), scheduler.allocator)
    print(f"continuous batching: {num_steps} steps in {NUM_BLOCKS} blocks")
    print(f"static batches:      {static_steps} steps, and up to {static_blocks} blocks at once")
    assert all(seq.num_generated == seq.max_tokens for seq in strips), "every token was written"
    assert scheduler.allocator.num_free == NUM_BLOCKS and num_steps < static_steps
    assert scheduler.num_preemptions == 1, "one preemption"
    print("ok: all tokens of all requests in fewer steps and fewer blocks than static batches")


def static_batches(wanted: list[tuple[int, int]], allocator: BlockAllocator) -> tuple[int, int]:
    """Steps, and blocks at most, of batches of `MAX_NUM_SEQS` that start and end together."""
    batches = [wanted[i : i + MAX_NUM_SEQS] for i in range(0, len(wanted), MAX_NUM_SEQS)]
    # The prefill gives the first token. Each batch lasts as long as its longest text.
    steps = sum(max(generated for _, generated in batch) for batch in batches)
    blocks = [sum(allocator.blocks_needed(p + g) for p, g in batch) for batch in batches]
    return steps, max(blocks)


if __name__ == "__main__":
    demo()
