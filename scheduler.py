"""Every step, choose again who runs: continuous batching, chunked prefill, preemption.

A static batch starts together and ends with its longest member: a request for 5 tokens beside one
for 500 holds its place for 495 steps. Here each step is planned from scratch. There is no "prefill
phase" and no "decode phase" either. A sequence has some tokens and `num_computed_tokens` of them in
the cache, and every step it may catch up within the step's token budget:

    a new prompt of 300 tokens   300 behind  ->  this step 64 of them, then 64, .. (chunked prefill)
    a sequence that is writing     1 behind  ->  this step that one                (decode)
    preempted after 120 tokens   120 behind  ->  later all of them again           (recompute)

    A 5+8  Pddddddd                P  new tokens of a prompt in this step
    B 6+6  Pdddx...Pd              d  one token   .  waits   x  preempted (its blocks went to A)

When the pool is dry the last in the order of precedence gives up all its blocks, waits in front of
all who came later, and computes its tokens again: the first in line never waits, so there is no
livelock. This file touches no tensor and imports no torch: a plan is numbers and block ids. What a
production engine does beyond this: the same, with encoders, adapters, several GPUs and requests
split between them.

Yu et al. 2022, "Orca", OSDI, section 3.1 (iteration-level scheduling); Kwon et al. 2023,
"PagedAttention", arXiv:2309.06180, section 4.5 (preemption); Agrawal et al. 2023, "Sarathi",
arXiv:2308.16369 (chunked prefill).
Run: python scheduler.py
Try: in the demo, max_num_batched_tokens=3 (prompts arrive in pieces), or num_blocks=12 (no
preemption).
"""

import heapq
from bisect import insort
from collections.abc import Callable
from typing import Any

from block_allocator import BlockAllocator, NoFreeBlocks
from policies import first_come_first_served
from sequence import FINISHED, RUNNING, WAITING, Continuation, Plan, Request, Scheduled, Sequence


def reserve_now(seq: Sequence) -> int:
    """Paged: memory for the tokens a sequence has now, none for those it may have later."""
    return len(seq.token_ids)


class Scheduler:
    """Decides who runs, and keeps the books of who holds which blocks.

    `reserve(seq)` says for how many tokens a sequence needs memory, `policy(seq)` its place in
    the order of precedence. Each sequence's blocks belong to it from its start until it ends or
    is preempted.
    """

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
        self.running: list[Sequence] = []  # in the order of precedence
        self._waiting: list[tuple] = []  # a heap of (key, tie-breaker, sequence)
        # Of the heap's entries some may have been aborted meanwhile: num_waiting counts the others.
        self._pushes = self.num_waiting = 0
        self.num_preemptions = self.num_recomputed_tokens = 0  # tokens computed, then lost
        # Blocks; those that were hit were found filled by `match_prefix`.
        self.num_blocks_taken = self.num_blocks_freed = self.num_blocks_hit = 0

    # ---- in and out ----
    def add(self, request: Request) -> None:
        """Queue a request's sequences. ValueError if one could never be finished in this pool."""
        for seq in request.sequences:
            needed = self.allocator.blocks_needed(max(self.longest(seq), self.reserve(seq)))
            if needed > self.allocator.num_blocks:
                raise ValueError(
                    f"{seq.num_prompt_tokens} prompt tokens and up to {seq.max_tokens} more need "
                    f"{needed} blocks of {self.allocator.block_size}, the pool has "
                    f"{self.allocator.num_blocks}: lower max_tokens or enlarge the pool"
                )
        for seq in request.sequences:
            self._push(seq)

    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.running or self.num_waiting)

    def finish(self, seq: Sequence, reason: str | None) -> None:
        """End a sequence in any state; its blocks go back. Ending it twice does nothing."""
        if seq.status == RUNNING:
            self.running.remove(seq)
            self._free(seq)
        elif seq.status == WAITING:
            self.num_waiting -= 1  # its entry in the heap is dropped when it comes up
        else:
            return
        seq.status, seq.finish_reason = FINISHED, reason

    # ---- the plan ----
    def schedule(self) -> Plan:
        """Choose who runs in this step, give them blocks, advance their `num_computed_tokens`."""
        plan = Plan()
        budget = self.max_num_batched_tokens
        for seq in self.running[: self.max_num_seqs]:  # forks may make more than one step takes
            if not budget or seq.status != RUNNING:
                break  # preempted by one before it: so are all behind it
            behind = len(seq.token_ids) - seq.num_computed_tokens
            num_new_tokens = behind if behind < budget else budget
            if num_new_tokens:
                if not self._make_room(seq, num_new_tokens, plan):
                    break  # it was the last in line itself, and gave up its own blocks
                self._advance(seq, num_new_tokens, plan)
                budget -= num_new_tokens
        # Whoever was just preempted must not come back in the same step: the pool is dry.
        while budget and not plan.preempted and len(self.running) < self.max_num_seqs:
            seq = self._next_waiting()
            if seq is None or not self._start(seq):
                break
            num_new_tokens = min(len(seq.token_ids) - seq.num_computed_tokens, budget)
            self._advance(seq, num_new_tokens, plan)
            budget -= num_new_tokens
        return plan

    def _advance(self, seq: Sequence, num_new_tokens: int, plan: Plan) -> None:
        """Enter a sequence's new tokens in the plan."""
        start = seq.num_computed_tokens
        # Scheduled(...) without its Python-level constructor: half the time, 256 times a step.
        plan.scheduled.append(tuple.__new__(Scheduled, (seq, start, num_new_tokens)))
        seq.num_computed_tokens = start + num_new_tokens
        if start + num_new_tokens == len(seq.token_ids):
            plan.sampled.append(seq)

    def _make_room(self, seq: Sequence, num_new_tokens: int, plan: Plan) -> bool:
        """Blocks for a running sequence's next tokens, preempting from the end of the line.

        False where the sequence itself had to be preempted.
        """
        table, allocator, block_size = seq.block_table, self.allocator, self.allocator.block_size
        start, end = seq.num_computed_tokens, seq.num_computed_tokens + num_new_tokens
        first = start // block_size
        if end <= (first + 1) * block_size and first < len(table):
            if allocator.ref_count(table[first]) == 1:
                return True  # nearly always: one block is written, it is there, nobody shares it
        # A comparison of sizes, never a modulo: 17 tokens, block_size 16, 1 block held -> 1 more.
        missing = self._blocks_wanted(seq, end) - len(table) if end > len(table) * block_size else 0
        while True:
            # It may write into any block from the first on; those that a fork shares are copied.
            written = enumerate(table[first : allocator.blocks_needed(end)], first)
            shared = [i for i, block_id in written if allocator.ref_count(block_id) > 1]
            try:
                new_blocks = allocator.allocate(missing + len(shared))
                break
            except NoFreeBlocks:
                victim = self.running[-1]  # if it was a fork, its leaving may end the sharing
                self.preempt(victim)
                plan.preempted.append(victim)
                if victim is seq:
                    return False
        self.num_blocks_taken += len(new_blocks)
        for i in shared:
            new_block = new_blocks.pop()
            plan.copies.append((table[i], new_block))
            allocator.free([table[i]])  # not the last holder: the block lives on
            table[i] = new_block
        table += new_blocks
        return True

    def _blocks_wanted(self, seq: Sequence, num_tokens: int = 0) -> int:
        """Blocks for what a sequence reserves and for `num_tokens`; at most the whole pool."""
        wanted = self.allocator.blocks_needed(max(num_tokens, self.reserve(seq)))
        return min(wanted, self.allocator.num_blocks)

    def _start(self, seq: Sequence) -> bool:
        """Move the first waiting sequence to running if the pool has what it reserves."""
        # At least its last token must be computed: without a query there are no logits to sample.
        table = self.allocator.match_prefix(seq.token_ids[:-1])
        needed = self._blocks_wanted(seq) - len(table)
        try:
            seq.block_table = table + self.allocator.allocate(needed)
        except NoFreeBlocks:
            self.allocator.free(table)
            return False
        self.num_blocks_taken += needed
        self.num_blocks_hit += len(table)
        seq.num_computed_tokens = len(table) * self.allocator.block_size
        heapq.heappop(self._waiting)
        self.num_waiting -= 1
        self._run(seq)
        return True

    def preempt(self, seq: Sequence) -> None:
        """Take a running sequence's blocks and let it wait, to compute its tokens again later."""
        self.running.remove(seq)
        self.num_preemptions += 1
        self.num_recomputed_tokens += seq.num_computed_tokens
        seq.num_preemptions += 1
        seq.num_computed_tokens = 0
        self._free(seq)
        self._push(seq)

    def undo(self, plan: Plan) -> None:
        """A plan was not carried out: nothing it promised is in the cache, so compute it again."""
        for seq, start, _ in reversed(plan.scheduled):
            if seq.status == RUNNING:
                seq.num_computed_tokens = start
                self.preempt(seq)

    # ---- after the forward ----
    def update(self, plan: Plan, continuations: list[Continuation]) -> None:
        """Append the sampled tokens, end what is complete, fork parents of several children.

        A sampled sequence without a continuation is dropped: its strategy saw no future in it.
        """
        for seq, start, num_new_tokens in plan.scheduled:
            if seq.status == RUNNING:
                # What this plan computed: a later plan may have advanced the sequence since.
                self.allocator.publish(seq.block_table, seq.token_ids, start + num_new_tokens)
        first: dict[Sequence, Continuation] = {}
        for future in continuations:
            if first.setdefault(future.parent, future) is not future:
                # One more child of the same parent: fork it before the parent itself grows.
                if future.parent.status == RUNNING:
                    self._extend(self._fork(future.parent, future), future)
        for seq in plan.sampled:
            if seq.status != RUNNING:
                continue  # aborted since the plan was made
            if future := first.get(seq):
                self._extend(seq, future)
            else:
                self.finish(seq, None)

    def _extend(self, seq: Sequence, future: Continuation) -> None:
        """Append a continuation's tokens one by one until one of them ends the sequence."""
        token_ids, before, reason = seq.token_ids, len(seq.token_ids), None
        for token_id in future.token_ids:
            token_ids.append(token_id)
            num_generated = len(token_ids) - seq.num_prompt_tokens
            if token_id in seq.stop_token_ids and num_generated >= seq.min_tokens:
                reason = "stop"
                break
            if len(token_ids) >= self.longest(seq):
                reason = "length"
                break
        if future.logprobs is not None:
            seq.logprobs += future.logprobs[: len(token_ids) - before]
        if reason is not None:
            self.finish(seq, reason)

    def longest(self, seq: Sequence) -> int:
        """Tokens that a sequence may have at most, its prompt included."""
        return min(seq.num_prompt_tokens + seq.max_tokens, self.max_seq_len)

    def _fork(self, parent: Sequence, future: Continuation) -> Sequence:
        """A second sequence with the same past: it shares all blocks until one of both writes."""
        self.allocator.fork(parent.block_table)
        child = Sequence(
            request=parent.request,
            index=len(parent.request.sequences),
            token_ids=list(parent.token_ids),
            num_prompt_tokens=parent.num_prompt_tokens,
            max_tokens=parent.max_tokens,
            min_tokens=parent.min_tokens,
            stop_token_ids=parent.stop_token_ids,
            seed=parent.seed if future.seed is None else future.seed,
            num_computed_tokens=parent.num_computed_tokens,
            block_table=list(parent.block_table),
            logprobs=list(parent.logprobs),
        )
        parent.request.sequences.append(child)
        self._run(child)
        return child

    # ---- the queues ----
    def _run(self, seq: Sequence) -> None:
        seq.status = RUNNING
        insort(self.running, seq, key=self.policy)

    def _push(self, seq: Sequence) -> None:
        seq.status = WAITING
        self._pushes += 1
        heapq.heappush(self._waiting, (self.policy(seq), self._pushes, seq))
        self.num_waiting += 1

    def _next_waiting(self) -> Sequence | None:
        while self._waiting and self._waiting[0][2].status != WAITING:
            heapq.heappop(self._waiting)  # aborted while it waited
        return self._waiting[0][2] if self._waiting else None

    def _free(self, seq: Sequence) -> None:
        counts = [self.allocator.ref_count(block_id) for block_id in seq.block_table]
        self.num_blocks_freed += counts.count(1)  # those that a fork holds too are not free yet
        self.allocator.free(seq.block_table)
        seq.block_table = []

    def check_integrity(self) -> None:
        """Assert that the blocks held are those of the running sequences, and hold their tokens."""
        self.allocator.check_integrity([seq.block_table for seq in self.running])
        for seq in self.running:
            room = len(seq.block_table) * self.allocator.block_size
            assert seq.status == RUNNING and seq.num_computed_tokens <= room
            assert seq.num_computed_tokens <= len(seq.token_ids)
        waiting = [seq for _, _, seq in self._waiting if seq.status == WAITING]
        assert len(waiting) == self.num_waiting
        assert all(not seq.block_table and seq.num_computed_tokens == 0 for seq in waiting)


# --------------------------------------------------------------------------------------------------
def demo():
    """Five requests in a pool of 8 blocks of 4: who runs in which step, as one strip each."""
    wanted = {"A": (6, 9), "B": (10, 12), "C": (3, 4), "D": (5, 6), "E": (8, 5)}
    scheduler = Scheduler(BlockAllocator(8, 4), 4, max_num_batched_tokens=16, max_seq_len=64)
    strips: dict[Sequence, str] = {}
    for arrival, (name, (prompt, generated)) in enumerate(wanted.items()):
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

    print("prompt + generated tokens; at most 4 at once, 16 tokens a step, 8 blocks of 4\n")
    for (name, (prompt, generated)), strip in zip(wanted.items(), strips.values(), strict=True):
        print(f"{name} {prompt:2}+{generated:<2} {strip}")
    print("\nP many tokens of a prompt, d one token, . waits, x preempted")
    print(f"{len(strip)} steps, {scheduler.num_preemptions} preemptions", end=", ")
    print(f"{scheduler.num_recomputed_tokens} tokens computed again")
    # Static: four start together and end with the longest, then the fifth.
    first_four = list(wanted.values())[:4]
    static = max(generated for _, generated in first_four) + wanted["E"][1]
    blocks = sum(scheduler.allocator.blocks_needed(sum(numbers)) for numbers in first_four)
    print(f"a static batch of 4 takes {static} steps, but {blocks} blocks for 4 whole sequences")
    assert scheduler.num_preemptions > 0 and scheduler.allocator.num_free == 8
    assert all(seq.num_generated == seq.max_tokens for seq in strips)
    print("ok: all five finished with every token they asked for, and 8 of 8 blocks are free")


if __name__ == "__main__":
    demo()
