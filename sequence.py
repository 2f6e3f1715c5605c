"""What a scheduler works with: requests, their sequences, and the plan of one step.

A `Request` is what a client asked for. It owns one or more `Sequence`s, each a list of tokens with
one block table: three texts for one prompt are three sequences, and a beam that forks becomes two.
Four fields say how far a sequence is. There is no flag for prefill or decode. The number of tokens
that are not computed yet tells the two apart.

    token_ids            [ prompt ............ | generated ...... ]      19 tokens
    num_prompt_tokens    12 ───────────────────┘
    num_computed_tokens  18   their K and V are in the cache; 19 - 18 = 1 behind: a decode
    block_table          [5, 0]   2 blocks of 16 have room for 32

    waiting ──start──> running ──────> finished        waiting: no blocks, nothing computed
       ^                  │                            running: has blocks
       └─────preempt──────┘                            finished: has none, has a reason

A `Plan` says what one step does with the sequences. A `Continuation` holds the tokens that follow a
sequence. These are plain values: no tensor, no tokenizer, no model. vLLM's `Request` also holds
image embeddings, LoRA adapters and the state of a grammar.

Yu et al. 2022, "Orca", OSDI, section 4.2 (a request's state between two iterations).
Run: python sequence.py
Try: CHUNK = 5 in the demo: the prompt of 12 tokens is 7 behind after the first chunk. Or
CHUNK = 12: the whole prompt is computed in one step, and the row of the chunk is missing.
"""

import time
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

# The states of a sequence: see the picture above.
WAITING = "waiting"
RUNNING = "running"
FINISHED = "finished"


@dataclass
class RequestMetrics:
    """When things happened, in seconds of `time.monotonic()`."""

    arrival_time: float = field(default_factory=time.monotonic)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass(eq=False, slots=True)
class Request:
    """What a client asked for; it owns its sequences.

    The scheduler reads only what a policy reads, and `sequences`. The other fields are for the
    sampler, the engine and the outputs; `params` is a `SamplingParams`.
    """

    request_id: str
    prompt_token_ids: list[int]
    arrival: int  # rises with every request
    # A policy may read these three. The one in policies.py reads none of them.
    priority: int = 0
    user: str | None = None
    deadline: float | None = None
    params: Any = None
    strategy: Any = None
    eos_token_ids: tuple[int, ...] = ()  # for the sampler; a sequence ends at its stop_token_ids
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # the tokens of the words it must not write
    seed: int = 0  # of n texts number i draws with the seed `child_seed(seed, i)`
    # One until its prompt is computed. Then it may fork, into n texts for example.
    sequences: list["Sequence"] = field(default_factory=list)
    # The most sequences that it has at once (those that have ended are not counted).
    max_num_sequences: int = 1
    # They get their next tokens in the same step, or none of them does: its strategy needs to see
    # the logits of all of them at once, as a beam search does.
    runs_together: bool = False
    prompt: str | None = None  # its text; None if it came as token ids
    prompt_logprobs: list | None = None  # one entry per prompt token, where asked for
    # What the allocator may remember of it (see prefix_cache.py):
    cache_prefix: bool = True  # whether its blocks may be found later, and whether it looks for any
    cache_salt: str | None = None  # requests with another salt share no block with it
    num_cached_tokens: int | None = None  # of the prompt, found when it started
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    is_queued: bool = False  # the scheduler has it
    # Key "by": what ended it, "step" or an object of the `abort` call; empty while it runs. Threads
    # write it with `setdefault`, which is one operation: only the first of them has ended it.
    end: dict[str, object] = field(default_factory=dict)

    @property
    def is_aborted(self) -> bool:
        """Whether an abort has ended it."""
        return self.end.get("by", "step") != "step"


@dataclass(eq=False, slots=True)
class Sequence:
    """One list of tokens with one block table."""

    request: Request
    index: int  # among its request's sequences
    token_ids: list[int]  # prompt and generated; K and V of the newest are not written yet
    num_prompt_tokens: int
    max_tokens: int  # generated tokens at which it ends
    longest: int = 0  # most tokens it may have, prompt included; `Scheduler.check` sets it
    min_tokens: int = 0  # generated tokens before which no stop token ends it
    stop_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    # Tokens whose K and V are in the cache, or will be after the step that is planned.
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    status: str = WAITING
    key: Any = None  # its place in the order of precedence: (policy's key, arrival, index)
    # "stop", "length", "abort", "error"; None until it ends, and if a strategy dropped it
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop token (not EOS) or stop string that ended it
    error: str | None = None  # what happened, in a sentence; the next update ends it with "error"
    logprobs: list = field(default_factory=list)  # one entry per generated token, where asked for
    num_preemptions: int = 0
    num_lost_tokens: int = 0  # computed before its last preemption
    decoder: Any = None  # turns its tokens into text (outputs.py); the scheduler does not read it

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt."""
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
    # Sequences whose newest token is computed in this step: each gets a next token.
    sampled: list[Sequence] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)  # from waiting to running
    preempted: list[Sequence] = field(default_factory=list)
    # Empty until the lesson on swapping (swap.py) is here: pairs (block id, host block id).
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)  # (host block id, block id)
    # Pairs of block ids (from, to), for copy-on-write.
    copies: list[tuple[int, int]] = field(default_factory=list)
    # What `Scheduler.update` did after the forward; `take_back` undoes it. (sequence, start, end):
    # it got its tokens [start, end). Then sequences that ended, and children that are new.
    extended: list[tuple[Sequence, int, int]] = field(default_factory=list)
    ended: list[Sequence] = field(default_factory=list)
    forked: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences: the rows that the model computes."""
        return sum(map(itemgetter(2), self.scheduled))


class Continuation(NamedTuple):
    """The tokens that follow a sequence. Two continuations with the same parent fork it."""

    parent: Sequence
    token_ids: list[int]
    logprobs: list | None = None  # one entry a token
    seed: int | None = None  # of a forked child; None keeps the parent's
    stop_string: str | None = None  # found in the text of these tokens: the sequence ends
    error: str | None = None  # a sentence: there is no token to append, and the sequence ends


# --------------------------------------------------------------------------------------------------
CHUNK = 8  # tokens of the demo's prompt in its first step


def demo():
    """The life of one sequence: after each event, how many of its tokens are not computed yet."""
    prompt = list(range(12))
    request = Request("0", prompt, arrival=0)
    seq = Sequence(request, 0, list(prompt), num_prompt_tokens=12, max_tokens=3)
    request.sequences.append(seq)
    print("after                     tokens  computed  behind  generated")

    def show(event: str) -> int:
        num_tokens, num_computed = len(seq.token_ids), seq.num_computed_tokens
        behind = num_tokens - num_computed
        print(f"{event:25} {num_tokens:6} {num_computed:9} {behind:7} {seq.num_generated:10}")
        return behind

    behind = [show("arriving: all is behind")]
    seq.num_computed_tokens += CHUNK  # as many as the step's budget allows
    if CHUNK < 12:
        behind.append(show(f"a chunk of {CHUNK}: prefill"))
        seq.num_computed_tokens = 12
    seq.token_ids.append(99)  # drawn from the logits of the prompt's last token
    behind.append(show("the rest, a token drawn"))
    seq.num_computed_tokens += 1
    seq.token_ids.append(42)
    behind.append(show("one step more: decode"))
    seq.num_computed_tokens = 0  # its blocks are gone, its tokens are not
    behind.append(show("preempted: recompute"))
    assert behind[0] == 12 and behind[-3:] == [1, 1, 14]
    print("ok: one number, tokens minus computed, tells prefill, decode and recompute apart")


if __name__ == "__main__":
    demo()
