"""What comes out of an engine: text a token at a time, its reasons, its times, its probabilities.

The scheduler deals in tokens, a client in text, and the way from one to the other has a memory:
half an emoji waits for its other half, and text that may be the beginning of a stop string is held
back. So each sequence has a decoder that sees each token once, and this file is where they live,
between the engine's loop and whoever waits for its outputs:

    sequence.token_ids  ...  83  1212  197 | 30   <- one new token a step
    decoder                  pushed ───────┘ └─> text grows by what is now certain
    request  ─> RequestOutput([CompletionOutput(text, token_ids, finish_reason, ...)], metrics, ...)

A stop string is found here, after the scheduler has counted the token that completed it, and ends
the sequence. What a production engine does beyond this: all of it in a process of its own, so that
decoding text never delays the next step.

The names and fields are vLLM's (RequestOutput, CompletionOutput; its V1 engine has an
OutputProcessor).
Run: python outputs.py
Try: give the demo the stop string "paged " (with the blank: where is the text cut now?).
"""

import codecs
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from block_allocator import BlockAllocator
from sampling import Logprob, SamplingParams, prompt_logprobs
from scheduler import Scheduler
from sequence import FINISHED, Continuation, Plan, Request, Scheduled, Sequence


class Tokenizer(Protocol):
    """What a lesson needs of a vocabulary; `checkpoints/tokenizer.py` has the real ones."""

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text; b"" for one that adds none."""

    def token_text(self, token_id: int) -> str:
        """How one token looks alone, beside its log-probability."""


class StreamDecoder:
    """Turns one sequence's tokens into text as they come, and looks for stop strings.

    `push` each id, then `finish` once. A character is sent by the token that completes it (a code
    point: an accent may still follow its letter). Nothing is sent that may be the start of one of
    the `stop` strings; after a match the text ends before it and all later pushes return "". The
    earliest match wins, and of two at the same place the one listed first. A match has to end
    after the text of the first `min_tokens` tokens, though it may begin inside it, as in vLLM.
    Raises ValueError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = (), min_tokens: int = 0):
        self._tokenizer = tokenizer
        self._stop = [stop] if isinstance(stop, str) else list(stop)  # "END" is not E, N and D
        if "" in self._stop:
            raise ValueError("a stop string is empty, which every text contains: leave it out")
        self._longest = max(map(len, self._stop), default=0)  # characters
        self._min_tokens = min_tokens
        self._num_tokens = 0
        # Keeps the bytes of an unfinished character, up to 3, and gives U+FFFD where none can come.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # whole characters that may begin a stop string: fewer than the longest has
        self._sent: list[str] = []  # joined on demand: adding to one string would copy it each time
        self._stopped: str | None = None

    @property
    def text(self) -> str:
        """All text sent so far; after `finish` the whole text, or what stands before the stop."""
        if len(self._sent) > 1:
            self._sent = ["".join(self._sent)]  # asked for after every token: join only once
        return self._sent[0] if self._sent else ""

    @property
    def stopped(self) -> str | None:
        """The stop string that was found, or None."""
        return self._stopped

    def push(self, token_id: int) -> str:
        """Take one token, return the text that has become final with it, often ""."""
        self._num_tokens += 1
        return self._advance(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """No token will follow: return what was held back, an unfinished character as U+FFFD."""
        last = self._advance(self._utf8.decode(b"", final=True))
        held, self._held = self._held, ""
        return last + self._send(held)

    def _advance(self, new: str) -> str:
        if self._stopped is not None:
            return ""
        # All text before `_held` is known to begin no stop string, so the window is short whatever
        # the length of the text: fewer characters than the longest stop string, plus the new ones.
        window = self._held + new
        found = self._find_stops(window) if self._num_tokens > self._min_tokens else []
        if found:
            at, order = min(found)  # the earliest; at the same place, the one listed first
            self._stopped, self._held = self._stop[order], ""
            return self._send(window[:at])
        keep = self._first_possible_start(window)
        self._held = window[keep:]
        return self._send(window[:keep])

    def _find_stops(self, window: str) -> list[tuple[int, int]]:
        """(place, order in the list) of each stop string that ends in the window's new text."""
        found = []
        for order, stop in enumerate(self._stop):
            # What ends within the held text came too early to count: `min_tokens`.
            at = window.find(stop, max(0, len(self._held) - len(stop) + 1))
            if at >= 0:
                found.append((at, order))
        return found

    def _first_possible_start(self, window: str) -> int:
        """Where a stop string may have begun that later text completes; len(window) if nowhere.

        Example: with the stop string "STOP", "a BUST" -> 4 and "a BUSTLE" -> 8.
        """
        # A stop string of 4 characters that is not complete has shown at most its first 3.
        for start in range(max(0, len(window) - self._longest + 1), len(window)):
            if any(stop.startswith(window[start:]) for stop in self._stop):
                return start
        return len(window)

    def _send(self, text: str) -> str:
        if text:
            self._sent.append(text)
        return text


@dataclass
class CompletionOutput:
    """One sequence's text so far. `token_ids` includes the token that ended it, `text` does not."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None  # "stop", "length", or None while it runs
    stop_reason: int | str | None = None  # the stop token or stop string that ended it


@dataclass
class RequestMetrics:
    """When things happened, in seconds of `time.monotonic()`."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass
class RequestOutput:
    """All that is known of a request after a step."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    metrics: RequestMetrics
    finished: bool


@dataclass
class StepOutput:
    """What one step did. The counts of blocks include what happened since the step before."""

    plan: Plan
    outputs: list[RequestOutput]  # of the requests that got a token in this step
    blocks_taken: int
    blocks_freed: int
    blocks_copied: int
    blocks_hit: int  # found in a prefix cache
    blocks_evicted: int  # thrown out of one
    blocks_swapped: int
    milliseconds: float


@dataclass
class _Live:
    """What is kept of a request until it ends, beside the scheduler's books."""

    request: Request
    prompt: str | None
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    decoders: dict[int, StreamDecoder] = field(default_factory=dict)  # by sequence index
    num_pushed: dict[int, int] = field(default_factory=dict)  # tokens that each decoder has seen


class OutputProcessor:
    """Turns what the scheduler did in a step into what clients see.

    `tokenizer` may be None: then texts stay empty and only token ids come out.
    """

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer | None):
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self._live: dict[str, _Live] = {}

    def add(self, request: Request, prompt: str | None) -> None:
        """Begin to follow a request; `prompt` is its text, where it came as one."""
        wants = request.params.prompt_logprobs is not None
        metrics = RequestMetrics(arrival_time=time.monotonic())
        # Nothing comes before a prompt's first token, so nothing predicts it.
        self._live[request.request_id] = _Live(request, prompt, metrics, [None] if wants else None)

    def remove(self, request_id: str) -> Request | None:
        """Forget a request; None if it has ended or never was."""
        live = self._live.pop(request_id, None)
        return None if live is None else live.request

    # ---- the prompt's own probabilities ----
    def num_sample_rows(self, entry: Scheduled) -> int:
        """How many of a sequence's new rows want logits: its last, none mid-prompt, or all."""
        seq, start, num_new_tokens = entry
        collected = self._live[seq.request.request_id].prompt_logprobs
        if collected is not None and seq.index == 0 and len(collected) < seq.num_prompt_tokens:
            return num_new_tokens
        return int(start + num_new_tokens == len(seq.token_ids))

    def collect_prompt_logprobs(self, entry: Scheduled, logits: Tensor) -> None:
        """Score the prompt's tokens with the logits (n, V) of a chunk's n rows.

        The row of position p scores the token at p + 1. Without wish for it this does nothing.
        """
        seq, start, _ = entry
        collected = self._live[seq.request.request_id].prompt_logprobs
        if collected is None or seq.index != 0:
            return
        first = len(collected) - 1  # a chunk computed again after a preemption was scored before
        next_ids = seq.token_ids[first + 1 : min(start + len(logits) + 1, seq.num_prompt_tokens)]
        if next_ids:
            rows = logits[first - start : first - start + len(next_ids)]
            scored = prompt_logprobs(rows, next_ids, seq.request.params.prompt_logprobs)
            self._name_tokens(scored)
            collected += scored

    # ---- after each step ----
    def process(self, plan: Plan, started: float) -> list[RequestOutput]:
        """Decode the new tokens, look for stop strings, report each request that got a token.

        `started` is when the step began, in seconds of `time.monotonic()`.
        """
        now = time.monotonic()
        for seq in plan.preempted:
            self._live[seq.request.request_id].metrics.num_preemptions += 1
        for seq, _, _ in plan.scheduled:
            metrics = self._live[seq.request.request_id].metrics
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = started
        outputs = []
        for request_id in dict.fromkeys(seq.request.request_id for seq in plan.sampled):
            live = self._live[request_id]
            if live.metrics.first_token_time is None:
                live.metrics.first_token_time = now
            for seq in live.request.sequences:
                self._decode(live, seq)
            finished = all(seq.status == FINISHED for seq in live.request.sequences)
            if finished:
                live.metrics.finished_time = now
                del self._live[request_id]
            outputs.append(self._request_output(live, finished))
        return outputs

    def _decode(self, live: _Live, seq: Sequence) -> None:
        """Push a sequence's new tokens through its decoder; a stop string ends the sequence."""
        pushed = live.num_pushed.get(seq.index, seq.num_prompt_tokens)
        new_ids = seq.token_ids[pushed:]
        live.num_pushed[seq.index] = len(seq.token_ids)
        if live.request.params.logprobs is not None and new_ids:
            self._name_tokens(seq.logprobs[-len(new_ids) :])
        # EOS needs no further reason; under ignore_eos it can only have been a stop token.
        eos_token_id = None if live.request.params.ignore_eos else live.request.eos_token_id
        if seq.finish_reason == "stop" and seq.token_ids[-1] != eos_token_id:
            seq.stop_reason = seq.token_ids[-1] if seq.stop_reason is None else seq.stop_reason
        if self.tokenizer is None or not new_ids:
            return
        params = live.request.params
        if seq.index not in live.decoders:
            decoder = StreamDecoder(self.tokenizer, params.stop, params.min_tokens)
            live.decoders[seq.index] = decoder
        decoder = live.decoders[seq.index]
        # What ended the sequence is no text. Only the scheduler can have said "stop" by now.
        for token_id in new_ids[:-1] if seq.finish_reason == "stop" else new_ids:
            decoder.push(token_id)
        if decoder.stopped is not None:
            self.scheduler.finish(seq, "stop")
            seq.finish_reason, seq.stop_reason = "stop", decoder.stopped
        elif seq.status == FINISHED:
            decoder.finish()

    def _request_output(self, live: _Live, finished: bool) -> RequestOutput:
        outputs = []
        for seq in live.request.sequences:
            if seq.status == FINISHED and seq.finish_reason is None:
                continue  # dropped by its strategy
            decoder = live.decoders.get(seq.index)
            generated = seq.token_ids[seq.num_prompt_tokens :]
            output = CompletionOutput(seq.index, decoder.text if decoder else "", generated)
            if live.request.params.logprobs is not None:
                output.logprobs = list(seq.logprobs)
                chosen = zip(seq.logprobs, generated, strict=True)
                output.cumulative_logprob = sum(entry[i].logprob for entry, i in chosen)
            output.finish_reason, output.stop_reason = seq.finish_reason, seq.stop_reason
            outputs.append(output)
        return RequestOutput(
            request_id=live.request.request_id,
            prompt=live.prompt,
            prompt_token_ids=live.request.prompt_token_ids,
            outputs=outputs,
            prompt_logprobs=None if live.prompt_logprobs is None else list(live.prompt_logprobs),
            metrics=live.metrics,
            finished=finished,
        )

    def _name_tokens(self, entries: list[dict[int, Logprob]]) -> None:
        if self.tokenizer is not None:
            for entry in entries:
                for token_id, logprob in entry.items():
                    logprob.decoded_token = self.tokenizer.token_text(token_id)


# --------------------------------------------------------------------------------------------------
def demo():
    """A stand-in for the model writes bytes; text comes out whole, and a stop string is cut."""

    class ByteTokenizer:  # 256 tokens, one a byte
        def encode(self, text):
            return list(text.encode())

        def token_bytes(self, token_id):
            return bytes([token_id])

        def token_text(self, token_id):
            return repr(bytes([token_id]))

    tokenizer = ByteTokenizer()
    written = tokenizer.encode("a 🐉 in paged memory END and more")
    scheduler = Scheduler(BlockAllocator(8, 8), 4, 64, 64)
    processor = OutputProcessor(scheduler, tokenizer)
    request = Request("0", [65], arrival=0, params=SamplingParams(stop="END", max_tokens=60))
    request.sequences = [Sequence(request, 0, [65], 1, max_tokens=60)]
    scheduler.add(request)
    processor.add(request, "A")

    texts = []
    print("step  token   text so far")
    while scheduler.has_unfinished():
        plan = scheduler.schedule()
        token_id = written[len(texts)]
        scheduler.update(plan, [Continuation(seq, [token_id]) for seq in plan.sampled])
        output = processor.process(plan, time.monotonic())[0]
        texts.append(output.outputs[0].text)
        if len(texts) in (2, 3, 5, 6, 20, 21, 23, 24):
            print(f"{len(texts):4}  {token_id:5}   {texts[-1]!r}")
    final = output.outputs[0]
    print(f"finish_reason {final.finish_reason!r}, stop_reason {final.stop_reason!r}")
    print(f"{len(final.token_ids)} tokens, of which the last {len('END')} are no text")
    assert final.text == "a 🐉 in paged memory " and output.finished
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)
    assert scheduler.allocator.num_free == 8
    print("ok: no character was broken, and the text ends exactly before the stop string")


if __name__ == "__main__":
    demo()
