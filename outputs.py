"""Tokens to text, one at a time, without a broken character or a piece of a stop string.

A token of GPT-2 is a run of bytes, and 344 of its 50,256 tokens hold only a part of a character. A
cat emoji takes three tokens. Decoding each of them alone shows three U+FFFD marks ("?" below) where
the cat should be. A stop string may be cut into several tokens too, and text that was sent cannot
be taken back. So text is sent when no later token can change it: its characters are complete, and
it cannot be the beginning of a stop string.

    tokens          |F0 9F|  |90|  |88|  |ST|  |EP|  |ST|  |OP|    with stop=["STOP"]
    each alone         ?      ?     ?     ST    EP    ST    OP
    StreamDecoder      -      -    cat    -    STEP   -     -
                       └ no complete character yet    └ may become "STOP", and then does

Each sequence has a `StreamDecoder`, which sees each token once. The `OutputProcessor` acts twice in
a step. Before the scheduler's update it decodes new tokens where a stop string may end a text.
After the update it builds the outputs of the requests that have ended. All other text is decoded
when somebody reads it (`Delta.text`). vLLM does all this in another process than the scheduler's,
so that decoding text does not delay the next step.

The names and fields are vLLM's (RequestOutput, CompletionOutput, OutputProcessor).
Run: python outputs.py
Try: STOP = "paged " in the demo: the space belongs to it, and the text ends after 13 tokens.
Or `keep = len(window)` in `_advance`: nothing is held back, and "END" is sent in three pieces and
never found, so the assert "the text ends before the stop string" fails.
"""

import codecs
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

from torch import Tensor

from block_allocator import BlockAllocator
from sampling import Logprob, SamplingParams, prompt_logprobs
from scheduler import Scheduler
from sequence import (
    FINISHED,
    Continuation,
    Plan,
    Request,
    RequestMetrics,
    Scheduled,
    Sequence,
)


class Tokenizer(Protocol):
    """What a lesson needs of a vocabulary; `checkpoints/tokenizer.py` has the real ones."""

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text; b"" for a token that adds none."""

    def token_text(self, token_id: int) -> str:
        """One token alone as text, to stand beside its log-probability."""


# ---- one sequence's text -------------------------------------------------------------------------
class StreamDecoder:
    """Turns one sequence's tokens into text as they come, and looks for stop strings.

    Call `push` with each id, then `finish` once. A character is sent with the token that completes
    it. (A character here is a Unicode code point: an accent may still follow its letter.) Text that
    may be the beginning of a stop string is held back. After a match the text ends before the stop
    string, and all later pushes return "". The earliest match wins; of two that begin at the same
    character the one listed first wins. A match must end after the text of the first `min_tokens`
    tokens, but may begin inside it, as in vLLM. Raises ValueError for an empty stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Iterable[str] = (),
        min_tokens: int = 0,
        keeps_stop: bool = False,  # whether a stop string that ends the text is a part of it
    ):
        self._tokenizer = tokenizer
        self._stop = [stop] if isinstance(stop, str) else list(stop)  # "END" is not E, N and D
        if "" in self._stop:
            raise ValueError("a stop string is empty, which every text contains: leave it out")
        self._longest = max(map(len, self._stop), default=0)  # characters
        self._min_tokens = min_tokens
        self._keeps_stop = keeps_stop
        # Python's decoder keeps the bytes of an incomplete character (at most 3) until the rest
        # comes, and gives U+FFFD for bytes that can never become a character. So two parts of the
        # text are held back: bytes in `_utf8`, and complete characters in `_held`.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # complete characters that may begin a stop string: fewer than _longest
        self.pieces: list[str] = []  # the text sent with each token, often ""
        self.tail: str | None = None  # the text sent by `finish`; None before it
        self.stopped: str | None = None  # the stop string that was found

    @property
    def text(self) -> str:
        """All text sent so far; after `finish` the whole text, or what precedes the stop string."""
        return "".join(self.pieces) + (self.tail or "")

    def push(self, token_id: int) -> str:
        """Take one token; return the text that has become final with it, often ""."""
        # With min_tokens 3 the fourth token is the first that may end the text.
        may_stop = len(self.pieces) >= self._min_tokens
        new = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self.pieces.append(self._advance(new, may_stop))
        return self.pieces[-1]

    def finish(self) -> str:
        """No token will follow: return what was held back, an incomplete character as U+FFFD."""
        if self.tail is None:
            new = self._utf8.decode(b"", final=True)
            self.tail = self._advance(new, may_stop=len(self.pieces) > self._min_tokens)
            self.tail += self._held
        return self.tail

    def _advance(self, new: str, may_stop: bool) -> str:
        """The text to send when `new` is decoded. `may_stop`: a stop string may end in it."""
        if self.stopped is not None:
            return ""
        # Text goes from `new` to the window, and from the window to a piece or back to `_held`.
        # No stop string begins before `_held`: that text was searched by earlier calls. So the
        # window is short however long the text is: under `_longest` characters, plus the new ones.
        window = self._held + new
        found = self._find_stops(window) if may_stop else []
        if found:
            start, order = min(found)  # the earliest; of two that begin together the first listed
            self.stopped, self._held = self._stop[order], ""
            return window[: start + self._keeps_stop * len(self.stopped)]
        # "a BUST" with the stop string "STOP": "a BU" is sent, "ST" is held.
        keep = self._first_possible_start(window)
        self._held = window[keep:]
        return window[:keep]

    def _find_stops(self, window: str) -> list[tuple[int, int]]:
        """(first character, order in the list) of each stop string that ends in the new text."""
        found = []
        for order, stop in enumerate(self._stop):
            # A match must end in the new text. One that ends in the held text lies within the first
            # `min_tokens` tokens. "END" may begin in the last 2 held characters, not before them.
            # `max`: a longer stop string may begin anywhere in what is held.
            start = window.find(stop, max(0, len(self._held) - len(stop) + 1))
            if start >= 0:
                found.append((start, order))
        return found

    def _first_possible_start(self, window: str) -> int:
        """Where a stop string may begin that later text completes; len(window) if nowhere.

        Example: with the stop string "STOP", "a BUST" -> 4 and "a BUSTLE" -> 8.
        """
        # Of a stop string of 4 characters that is still incomplete, at most 3 are in the window.
        # The leftmost start is returned: all that may belong to a stop string is held.
        for start in range(max(0, len(window) - self._longest + 1), len(window)):
            if any(stop.startswith(window[start:]) for stop in self._stop):
                return start
        return len(window)


# ---- what a client gets --------------------------------------------------------------------------
@dataclass
class CompletionOutput:
    """One sequence's text. `token_ids` includes the token that ended it, `text` does not."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None  # "stop", "length", "error", or None while it runs
    stop_reason: int | str | None = None  # the stop token or stop string that ended it
    error: str | None = None  # for "error": what happened, in a sentence


@dataclass
class RequestOutput:
    """Everything known about a request, at its end or when somebody asks."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    metrics: RequestMetrics
    finished: bool
    num_cached_tokens: int | None = None  # of the prompt, found in a prefix cache; None: not begun


def likeliest(sequences: list[Sequence], n: int) -> list[Sequence]:
    """The n of the texts of one prompt that have the highest log-probability per token.

    The best comes first. A text with an error comes after all others.
    """

    def rank(seq: Sequence) -> tuple[bool, float]:
        return seq.error is not None, -total_logprob(seq) / max(1, seq.num_generated)

    return sorted(sequences, key=rank)[:n]


def total_logprob(seq: Sequence) -> float:
    """The log-probability of a sequence's generated tokens, whose log-probabilities are kept."""
    chosen = zip(seq.logprobs, seq.token_ids[seq.num_prompt_tokens :], strict=True)
    return sum(entry[token_id].logprob for entry, token_id in chosen)


@dataclass(slots=True)
class Delta:
    """What one step added to one sequence: the tokens [first, end) of `seq.token_ids`."""

    seq: Sequence
    first: int
    end: int
    finish_reason: str | None  # None while the sequence runs
    tokenizer: Tokenizer | None

    @property
    def request_id(self) -> str:
        """The id of the request that the sequence belongs to."""
        return self.seq.request.request_id

    @property
    def index(self) -> int:
        """The sequence's index among those of its request."""
        return self.seq.index

    @property
    def token_ids(self) -> list[int]:
        """The new tokens; of a sequence that was forked in this step all that it has written."""
        return self.seq.token_ids[self.first : self.end]

    @property
    def text(self) -> str:
        """The text that became final with these tokens; "" without a tokenizer.

        It is decoded when this property is read, so text that nobody reads costs nothing. Only the
        thread that calls `step` may read it, because the decoder belongs to the sequence.
        """
        if self.tokenizer is None:
            return ""
        decoder = decode(self.tokenizer, self.seq, self.end)
        num_prompt_tokens = self.seq.num_prompt_tokens
        first, end = self.first - num_prompt_tokens, self.end - num_prompt_tokens
        text = "".join(decoder.pieces[first:end])
        if self.finish_reason is None:
            return text
        if decoder.tail is None:
            self.seq.decoder = None  # as in `decode`: an interruption leaves no decoder
            decoder.finish()
            self.seq.decoder = decoder
        return text + decoder.finish()


class BlockCounts(NamedTuple):
    """Blocks of the pool, counted over some steps."""

    taken: int = 0
    freed: int = 0
    copied: int = 0
    hit: int = 0  # found in the prefix cache
    evicted: int = 0  # dropped from it
    swapped: int = 0  # always 0 without a swap space


class Timings(NamedTuple):
    """Where the time of a step went on the host's clock, in milliseconds.

    On a GPU `forward` is the time to launch the model's kernels; `sample` waits for their result.
    """

    schedule: float = 0.0
    forward: float = 0.0  # the batch is built, the model runs
    sample: float = 0.0
    update: float = 0.0  # stop strings are looked for, tokens applied, outputs built

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(self)


class Clock:
    """Measures the parts of a step, one after the other, in milliseconds; a part may come twice."""

    def __init__(self):
        self.started = self._last = time.monotonic()
        self.laps_ms: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Add the time since the last call to the part of this name."""
        now = time.monotonic()
        self.laps_ms[name] = self.laps_ms.get(name, 0.0) + (now - self._last) * 1e3
        self._last = now


@dataclass
class StepOutput:
    """What one step did: the value that callers of `step` and watchers get."""

    plan: Plan
    finished: list[RequestOutput]  # of the requests that ended in this step
    added: list[Request]  # queued by the scheduler since the step before
    aborted: list[Request]  # removed by an abort since the step before
    blocks: BlockCounts  # since the step before
    timings: Timings
    tokenizer: Tokenizer | None = None  # for the texts of the deltas

    @cached_property
    def deltas(self) -> list[Delta]:
        """One for each sequence that got tokens; built when it is read, like their texts."""
        ended, forked = set(self.plan.ended), set(self.plan.forked)
        return [
            Delta(
                seq,
                # A fork is new to the client: it has sent none of its tokens yet.
                seq.num_prompt_tokens if seq in forked else start,
                end,
                seq.finish_reason if seq in ended else None,
                self.tokenizer,
            )
            for seq, start, end in self.plan.extended
            if not seq.request.is_aborted
        ]


# ---- from a step to its outputs ------------------------------------------------------------------
def decode(tokenizer: Tokenizer, seq: Sequence, end: int) -> StreamDecoder:
    """The decoder of a sequence, after it has seen at least `seq.token_ids` up to `end`."""
    params = seq.request.params
    # A token that ended the text adds nothing to it. The reason is then an int (a stop token) or
    # None (EOS); it is a str for a stop string.
    ended_by_token = seq.finish_reason == "stop" and not isinstance(seq.stop_reason, str)
    if ended_by_token and end == len(seq.token_ids):
        end -= 1
    decoder = seq.decoder or StreamDecoder(
        tokenizer, params.stop, params.min_tokens, params.include_stop_str_in_output
    )
    num_seen = seq.num_prompt_tokens + len(decoder.pieces)
    if num_seen < end:
        # An interruption in this loop leaves no decoder, and the next call begins a new one.
        seq.decoder = None
        for token_id in seq.token_ids[num_seen:end]:
            decoder.push(token_id)
    seq.decoder = decoder
    return decoder


class OutputProcessor:
    """Turns what the scheduler did in a step into what clients see.

    `tokenizer` may be None: then texts stay empty and only token ids come out.
    """

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer | None):
        self.scheduler = scheduler
        self.tokenizer = tokenizer

    # ---- log-probabilities of the prompt ----
    def num_sample_rows(self, entry: Scheduled) -> int:
        """How many of a sequence's new rows need logits: all, only its last, or none.

        All while its prompt is scored. None in the middle of a prompt that nobody wants scored.
        """
        seq, start, num_new_tokens = entry
        scores = seq.request.prompt_logprobs
        if scores is not None and seq.index == 0 and len(scores) < seq.num_prompt_tokens:
            return num_new_tokens
        return int(start + num_new_tokens >= len(seq.token_ids))

    def score_prompts(self, plan: Plan, counts: list[int], logits: Tensor) -> None:
        """Score the prompts of the requests that asked for it, with the step's logits (M, V).

        `counts` are the numbers of rows that `num_sample_rows` gave for the plan's sequences.
        """
        end = 0
        for (seq, start, _), count in zip(plan.scheduled, counts, strict=True):
            end += count  # the sequence's rows are [end - count, end)
            scores = seq.request.prompt_logprobs
            # An error leaves a gap in the scores, so later chunks are not scored.
            if scores is not None and seq.index == 0 and seq.error is None:
                try:
                    self._score_prompt(seq.request, start, logits[end - count : end])
                except ValueError as error:  # NaN: this sequence ends, the others do not
                    seq.error = f"the prompt cannot be scored: {error}"

    def _score_prompt(self, request: Request, start: int, logits: Tensor) -> None:
        """Append the scores of one chunk of a prompt, with the logits (n, V) of its n positions.

        The chunk begins at position `start`. The row of position p scores the token at p + 1.
        """
        # Tokens [0, len(scores)) are scored. After a preemption a chunk may begin before that: its
        # first rows are skipped. 5 scored, start 3 -> the first row that is used is position 4's,
        # which is row 1 of the chunk.
        scores = request.prompt_logprobs
        assert scores is not None
        first = len(scores) - 1
        next_ids = request.prompt_token_ids[first + 1 : start + len(logits) + 1]
        if next_ids:
            rows = logits[first - start : first - start + len(next_ids)]
            new_scores = prompt_logprobs(rows, next_ids, request.params.prompt_logprobs)
            self._name_tokens(new_scores)
            scores += new_scores

    # ---- before the update ----
    def find_stops(self, continuations: list[Continuation]) -> list[Continuation]:
        """Decode the new tokens of requests with stop strings, and cut where one is found.

        A cut continuation ends with the token that completes the stop string.
        """
        if self.tokenizer is None or not any(c.parent.request.params.stop for c in continuations):
            return continuations
        num_children = Counter(c.parent for c in continuations)
        return [
            self._cut(self.tokenizer, c, num_children[c.parent] > 1)
            if c.parent.request.params.stop
            else c
            for c in continuations
        ]

    def _cut(self, tokenizer: Tokenizer, c: Continuation, is_fork: bool) -> Continuation:
        """A continuation that ends with the token that completes a stop string, if one does."""
        seq = c.parent
        decoder = decode(tokenizer, seq, len(seq.token_ids))
        # `update` has not appended these tokens yet. If the step is interrupted, or a forked child
        # gets them, the decoder has seen tokens that are not the sequence's. Then it is dropped,
        # and `decode` begins a new one at the first token.
        seq.decoder = None
        num_kept, reason = self.scheduler.find_end(seq, c.token_ids)
        num_decoded = num_kept - (reason == "stop")  # a stop token adds no text
        for count, token_id in enumerate(c.token_ids[:num_decoded], start=1):
            decoder.push(token_id)
            if decoder.stopped is not None:
                logprobs = None if c.logprobs is None else c.logprobs[:count]
                kept = c.token_ids[:count]
                c = c._replace(token_ids=kept, logprobs=logprobs, stop_string=decoder.stopped)
                break
        if not is_fork:
            seq.decoder = decoder
        return c

    # ---- after the update ----
    def finish_step(self, plan: Plan, started: float) -> list[Request]:
        """Fill in metrics, texts of log-probabilities, stop reasons; returns the ended requests.

        `started` is when the step began, in seconds of `time.monotonic()`.
        """
        now = time.monotonic()
        for seq in plan.preempted:
            seq.request.metrics.num_preemptions += 1
        for seq in plan.started:
            metrics = seq.request.metrics
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = started
        for seq, start, _ in plan.extended:
            if start == seq.num_prompt_tokens and seq.request.metrics.first_token_time is None:
                seq.request.metrics.first_token_time = now
            if seq.logprobs:
                self._name_tokens(seq.logprobs[start - seq.num_prompt_tokens :])
        for seq in plan.ended:
            # EOS is the normal end and needs no reason. Under ignore_eos it is an ordinary token.
            request = seq.request
            if seq.stop_reason in request.eos_token_ids and not request.params.ignore_eos:
                seq.stop_reason = None
        # Each request once, even if several of its sequences have ended: a dict drops repetitions
        # and keeps the order.
        requests = dict.fromkeys(seq.request for seq in plan.ended)
        ended = [r for r in requests if all(seq.status == FINISHED for seq in r.sequences)]
        for request in ended:
            request.metrics.finished_time = now
        return ended

    def request_output(self, request: Request) -> RequestOutput:
        """Everything known about a request now.

        With `best_of` the texts that are not returned are left out at the end, and the others are
        sorted, the best first. Deltas came from all of them: `index` says which text is which.
        """
        # A strategy drops a sequence without a reason: a beam that lost, for example.
        sequences = [
            seq for seq in request.sequences if seq.status != FINISHED or seq.finish_reason
        ]
        finished = all(seq.status == FINISHED for seq in sequences)
        if finished and request.params.num_sampled > request.params.n:
            sequences = likeliest(sequences, request.params.n)
        scores = request.prompt_logprobs
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[self._completion(seq) for seq in sequences],
            prompt_logprobs=None if scores is None else list(scores),
            metrics=request.metrics,
            finished=finished,
            num_cached_tokens=request.num_cached_tokens,
        )

    def _completion(self, seq: Sequence) -> CompletionOutput:
        whole = Delta(
            seq, seq.num_prompt_tokens, len(seq.token_ids), seq.finish_reason, self.tokenizer
        )
        output = CompletionOutput(seq.index, whole.text, whole.token_ids)
        params = seq.request.params
        if params.logprobs is not None:
            output.logprobs = list(seq.logprobs)  # a copy: later steps append to the sequence's
        if params.needs_logprobs:
            output.cumulative_logprob = total_logprob(seq)
        output.finish_reason, output.stop_reason = seq.finish_reason, seq.stop_reason
        output.error = seq.error
        return output

    def _name_tokens(self, entries: list[dict[int, Logprob]]) -> None:
        """Fill in the text of each token in some log-probabilities."""
        if self.tokenizer is not None:
            for entry in entries:
                for token_id, logprob in entry.items():
                    logprob.decoded_token = self.tokenizer.token_text(token_id)


# --------------------------------------------------------------------------------------------------
WRITTEN = "a 🐉 paged END and"  # what the demo's stand-in for a model writes, one byte a token
STOP = "END"


class ByteTokenizer:
    """A vocabulary of 256 tokens, one for each byte."""

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of a text."""
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        """The byte itself."""
        return bytes([token_id])

    def token_text(self, token_id: int) -> str:
        """The byte as text, U+FFFD if it is only a part of a character."""
        return self.token_bytes(token_id).decode(errors="replace")


def demo():
    """Bytes are pushed one by one; the text has no broken character and ends before STOP."""
    tokenizer = ByteTokenizer()
    written = tokenizer.encode(WRITTEN)
    scheduler = Scheduler(BlockAllocator(8, 8), 4, 64, 64)
    processor = OutputProcessor(scheduler, tokenizer)
    request = Request("0", [65], arrival=0, params=SamplingParams(stop=STOP, max_tokens=60))
    request.sequences = [Sequence(request, 0, [65], num_prompt_tokens=1, max_tokens=60)]
    scheduler.add(request)

    texts: list[str] = []  # after each step
    print("step  token  alone  text so far")
    while scheduler.has_unfinished():
        plan = scheduler.schedule()
        token_id = written[len(texts)]
        continuations = [Continuation(seq, [token_id]) for seq in plan.sampled]
        scheduler.update(plan, processor.find_stops(continuations))
        processor.finish_step(plan, time.monotonic())
        texts.append(processor.request_output(request).outputs[0].text)
        alone = tokenizer.token_text(token_id)
        print(f"{len(texts):4}  {token_id:5}  {alone:5}  {texts[-1]!r}")
        if len(texts) == len(written):
            break
    output = processor.request_output(request)
    (completion,) = output.outputs
    print(f"finish_reason {completion.finish_reason!r}, stop_reason {completion.stop_reason!r}")
    before_stop = WRITTEN[: WRITTEN.index(STOP)]
    assert completion.text == texts[-1] == before_stop, "the text ends before the stop string"
    assert all(before_stop.startswith(text) for text in texts)
    assert output.finished and scheduler.allocator.num_free == 8
    print("ok: no character was broken, and the text ends exactly before the stop string")


if __name__ == "__main__":
    demo()
