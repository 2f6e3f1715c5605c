"""What a scheduler moves about: requests, their sequences, and the plan of one step.

A `Request` is what a client asked for. It owns one or more `Sequence`s, each a list of tokens with
one block table; n texts for one prompt are n sequences, and a beam that forks becomes two.
Everything that says where a sequence stands is in four fields, and there is no flag for prefill or
decode:

    token_ids            [ prompt ............ | generated ...... ]      19 tokens
    num_prompt_tokens    12 ───────────────────┘
    num_computed_tokens  18   their K and V are in the cache; 19 - 18 = 1 behind: a decode
    block_table          [5, 0]   2 blocks of 16 have room for 32

    waiting ──start──> running ──────> finished        waiting: no blocks, nothing computed
       ^                  │                            running: has blocks
       └─────preempt──────┘                            finished: has none, has a reason

Plain values only: no tensor, no tokenizer, no model. What a production engine does beyond this:
keeps image embeddings, adapters and the state of structured output here too.

Run: python sequence.py
Try: print a `Sequence` of the scheduler's demo while it runs, and find the step in which it is
prefilled.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

WAITING, RUNNING, FINISHED = "waiting", "running", "finished"


@dataclass(eq=False, slots=True)
class Request:
    """What a client asked for; it owns its sequences. `params` and `strategy` pass through."""

    request_id: str
    prompt_token_ids: list[int]
    arrival: int  # rises with every request
    priority: int = 0
    user: str | None = None
    deadline: float | None = None
    params: Any = None
    strategy: Callable | None = None
    eos_token_id: int | None = None  # for the strategy; what ends a sequence is its stop_token_ids
    sequences: list["Sequence"] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Sequence:
    """One list of tokens with one block table."""

    request: Request
    index: int  # among its request's sequences
    token_ids: list[int]  # prompt and generated; K and V of the newest are not written yet
    num_prompt_tokens: int
    max_tokens: int  # generated tokens at which it ends
    min_tokens: int = 0  # generated tokens before which no stop token ends it
    stop_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    num_computed_tokens: int = 0  # tokens whose K and V are in the cache, or will be after the plan
    block_table: list[int] = field(default_factory=list)
    status: str = WAITING
    finish_reason: str | None = None  # "stop", "length", "abort", or None while it runs
    stop_reason: int | str | None = None  # the stop token (not EOS) or stop string that ended it
    logprobs: list = field(default_factory=list)  # one entry per generated token, where asked for
    num_preemptions: int = 0

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


class Scheduled(NamedTuple):
    """Positions [start, start + num_new_tokens) of a sequence are computed in this step."""

    seq: Sequence
    start: int
    num_new_tokens: int


@dataclass
class Plan:
    """What one step does. In this order: swap out, swap in, copies, then the forward."""

    scheduled: list[Scheduled] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)  # those whose newest token is computed
    preempted: list[Sequence] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)  # (block id, host block id)
    swap_in: list[tuple[int, int]] = field(default_factory=list)  # (host block id, block id)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (from, to), for copy-on-write

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_new_tokens for entry in self.scheduled)


class Continuation(NamedTuple):
    """One future of a sequence: the tokens that follow. Two with the same parent fork it."""

    parent: Sequence
    token_ids: list[int]
    logprobs: list | None = None  # one entry a token
    seed: int | None = None  # of a forked child; None keeps the parent's


# --------------------------------------------------------------------------------------------------
def demo():
    """One sequence through its life: how far behind it is says what a step must do."""
    request = Request("0", list(range(12)), arrival=0)
    seq = Sequence(request, 0, list(range(12)), num_prompt_tokens=12, max_tokens=3)
    request.sequences.append(seq)
    print("after                     tokens  computed  behind  generated")

    def show(event: str):
        behind = len(seq.token_ids) - seq.num_computed_tokens
        counts = (
            f"{len(seq.token_ids):6} {seq.num_computed_tokens:9} {behind:7} {seq.num_generated:10}"
        )
        print(f"{event:25} {counts}")
        return behind

    behind = [show("arriving: all is behind")]
    seq.num_computed_tokens += 8  # a chunk of the prompt, as the step's budget allows
    behind.append(show("a chunk of 8: prefill"))
    seq.num_computed_tokens += 4
    seq.token_ids.append(99)
    behind.append(show("the rest, a token drawn"))
    seq.num_computed_tokens += 1
    seq.token_ids.append(42)
    behind.append(show("one step more: decode"))
    seq.num_computed_tokens = 0
    behind.append(show("preempted: recompute"))
    assert behind == [12, 4, 1, 1, 14]
    print("ok: one number, tokens minus computed, tells prefill, decode and recompute apart")


if __name__ == "__main__":
    demo()
