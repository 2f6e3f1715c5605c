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

Each sequence has a `StreamDecoder`, which sees each token once. The `OutputProcessor` keeps the
decoders. After each step it gives them the new tokens, ends the sequences whose stop string was
found, and reports to each client its text, reasons, times and log-probabilities. vLLM does this in
another process than the scheduler's, so that decoding text does not delay the next step.

The names and fields are vLLM's (RequestOutput, CompletionOutput, OutputProcessor).
Run: python outputs.py
Try: STOP = "paged " in the demo: the space belongs to it, and the text ends after 13 tokens.
Or `keep = len(window)` in `_advance`: nothing is held back, and "END" is sent in three pieces and
never found, so the assert "the text ends before the stop string" fails.
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

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = (), min_tokens: int = 0):
        self._tokenizer = tokenizer
        self._stop = [stop] if isinstance(stop, str) else list(stop)  # "END" is not E, N and D
        if "" in self._stop:
            raise ValueError("a stop string is empty, which every text contains: leave it out")
        self._longest = max(map(len, self._stop), default=0)  # characters
        self._min_tokens = min_tokens
        self._num_tokens = 0
        # Python's decoder keeps the bytes of an incomplete character (at most 3) until the rest
        # comes, and gives U+FFFD for bytes that can never become a character. So two parts of the
        # text are held back: bytes in `_utf8`, and complete characters in `_held`.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # complete characters that may begin a stop string: fewer than _longest
        self._sent: list[str] = []  # pieces, joined on demand: `text += piece` would copy each time
        self._stopped: str | None = None

    @property
    def text(self) -> str:
        """All text sent so far; after `finish` the whole text, or what precedes the stop string."""
        if len(self._sent) > 1:
            self._sent = ["".join(self._sent)]  # the next call joins only what is new
        return self._sent[0] if self._sent else ""

    @property
    def stopped(self) -> str | None:
        """The stop string that was found, or None."""
        return self._stopped

    def push(self, token_id: int) -> str:
        """Take one token; return the text that has become final with it, often ""."""
        self._num_tokens += 1
        return self._advance(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """No token will follow: return what was held back, an incomplete character as U+FFFD."""
        last = self._advance(self._utf8.decode(b"", final=True))
        held, self._held = self._held, ""
        return last + self._send(held)

    def _advance(self, new: str) -> str:
        if self._stopped is not None:
            return ""
        # Text goes from `new` to the window, and from the window to `_sent` or back to `_held`.
        # No stop string begins before `_held`: that text was searched by earlier calls. So the
        # window is short however long the text is: under `_longest` characters, plus the new ones.
        window = self._held + new
        # `push` has counted this token already: with min_tokens 3 the fourth token is the first
        # that may end the text.
        found = self._find_stops(window) if self._num_tokens > self._min_tokens else []
        if found:
            start, order = min(found)  # the earliest; of two that begin together the first listed
            self._stopped, self._held = self._stop[order], ""
            return self._send(window[:start])
        # "a BUST" with the stop string "STOP": "a BU" is sent, "ST" is held.
        keep = self._first_possible_start(window)
        self._held = window[keep:]
        return self._send(window[:keep])

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

    def _send(self, text: str) -> str:
        if text:
            self._sent.append(text)
        return text


# ---- what a client gets --------------------------------------------------------------------------
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
    """Everything known about a request after a step."""

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
    outputs: list[RequestOutput]  # of the requests that got a token in this step, not of all
    blocks_taken: int
    blocks_freed: int
    blocks_copied: int
    # The next three are 0 here. A prefix cache or a swap space would count them.
    blocks_hit: int  # found in the prefix cache
    blocks_evicted: int  # dropped from it
    blocks_swapped: int
    milliseconds: float


# ---- from a step to its outputs ------------------------------------------------------------------
@dataclass
class _RequestState:
    """What the processor keeps of a request until it ends."""

    request: Request
    prompt: str | None
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None  # None if the request did not ask
    decoders: dict[int, StreamDecoder] = field(default_factory=dict)  # by sequence index
    num_pushed: dict[int, int] = field(default_factory=dict)  # tokens that each decoder has seen


class OutputProcessor:
    """Turns what the scheduler did in a step into what clients see.

    `tokenizer` may be None: then texts stay empty and only token ids come out.
    """

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer | None):
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self._states: dict[str, _RequestState] = {}  # by request id

    def add(self, request: Request, prompt: str | None) -> None:
        """Register a request; `prompt` is its text, None if it came as token ids."""
        metrics = RequestMetrics(arrival_time=time.monotonic())
        # The first entry is None: nothing precedes a prompt's first token, so nothing predicts it.
        scores: list | None = [None] if request.params.prompt_logprobs is not None else None
        self._states[request.request_id] = _RequestState(request, prompt, metrics, scores)

    def remove(self, request_id: str) -> Request | None:
        """Forget a request; None if it has ended or never was."""
        state = self._states.pop(request_id, None)
        return None if state is None else state.request

    # ---- log-probabilities of the prompt ----
    def num_sample_rows(self, entry: Scheduled) -> int:
        """How many of a sequence's new rows need logits: all, only its last, or none.

        All while its prompt is scored. None in the middle of a prompt that nobody wants scored.
        """
        seq, start, num_new_tokens = entry
        scores = self._states[seq.request.request_id].prompt_logprobs
        if scores is not None and seq.index == 0 and len(scores) < seq.num_prompt_tokens:
            return num_new_tokens
        return int(start + num_new_tokens == len(seq.token_ids))

    def collect_prompt_logprobs(self, plan: Plan, counts: list[int], logits: Tensor) -> None:
        """Score the prompts of the requests that asked for it, with the step's logits (M, V).

        `counts` are the numbers of rows that `num_sample_rows` gave for the plan's sequences.
        """
        end = 0
        for (seq, start, _), count in zip(plan.scheduled, counts, strict=True):
            end += count  # the sequence's rows are [end - count, end)
            state = self._states[seq.request.request_id]
            if state.prompt_logprobs is not None and seq.index == 0:
                rows = logits[end - count : end]
                self._score_prompt(seq.request, state.prompt_logprobs, start, rows)

    def _score_prompt(self, request: Request, scores: list, start: int, logits: Tensor) -> None:
        """Append to `scores` those of one chunk, with the logits (n, V) of its n positions.

        The chunk begins at position `start`. The row of position p scores the token at p + 1.
        """
        # Tokens [0, len(scores)) are scored. After a preemption a chunk may begin before that: its
        # first rows are skipped. 5 scored, start 3 -> the first row that is used is position 4's,
        # which is row 1 of the chunk.
        first = len(scores) - 1
        next_ids = request.prompt_token_ids[first + 1 : start + len(logits) + 1]
        if next_ids:
            rows = logits[first - start : first - start + len(next_ids)]
            new_scores = prompt_logprobs(rows, next_ids, request.params.prompt_logprobs)
            self._name_tokens(new_scores)
            scores += new_scores

    # ---- after each step ----
    def process(self, plan: Plan, started: float) -> list[RequestOutput]:
        """Decode the new tokens, look for stop strings, report each request that got a token.

        `started` is when the step began, in seconds of `time.monotonic()`.
        """
        self._record_times(plan, started)
        now = time.monotonic()
        outputs = []
        # By request, because several sequences of one request may have got a token. The dict keeps
        # their order and drops repetitions.
        for request_id in dict.fromkeys(seq.request.request_id for seq in plan.sampled):
            state = self._states[request_id]
            metrics, sequences = state.metrics, state.request.sequences
            if metrics.first_token_time is None:
                metrics.first_token_time = now
            for seq in sequences:
                self._update_sequence(state, seq)
            # Only now: a stop string that was found in the text has ended its sequence above.
            finished = all(seq.status == FINISHED for seq in sequences)
            if finished:
                metrics.finished_time = now
                del self._states[request_id]
            outputs.append(self._request_output(state, finished))
        return outputs

    def _record_times(self, plan: Plan, started: float) -> None:
        """Enter preemptions and first steps in the metrics of the requests."""
        for seq in plan.preempted:
            self._states[seq.request.request_id].metrics.num_preemptions += 1
        for seq, _, _ in plan.scheduled:
            metrics = self._states[seq.request.request_id].metrics
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = started

    def _update_sequence(self, state: _RequestState, seq: Sequence) -> None:
        """Decode a sequence's new tokens; set its stop reason and the texts of its logprobs."""
        num_pushed = state.num_pushed.get(seq.index, seq.num_prompt_tokens)
        # Usually one token. None for a sequence that ended in an earlier step than its request.
        new_ids = seq.token_ids[num_pushed:]
        state.num_pushed[seq.index] = len(seq.token_ids)
        params = state.request.params
        if params.logprobs is not None and new_ids:
            self._name_tokens(seq.logprobs[-len(new_ids) :])
        # EOS is the normal end and needs no reason. Under ignore_eos it is an ordinary stop token.
        eos_token_id = None if params.ignore_eos else state.request.eos_token_id
        if seq.finish_reason == "stop" and seq.stop_reason is None:
            if seq.token_ids[-1] != eos_token_id:
                seq.stop_reason = seq.token_ids[-1]
        if self.tokenizer is not None and new_ids:
            self._decode(self.tokenizer, state, seq, new_ids)

    def _decode(
        self, tokenizer: Tokenizer, state: _RequestState, seq: Sequence, new_ids: list[int]
    ) -> None:
        """Push new tokens through the sequence's decoder; a stop string ends the sequence."""
        decoder = state.decoders.get(seq.index)
        if decoder is None:
            params = state.request.params
            decoder = StreamDecoder(tokenizer, params.stop, params.min_tokens)
            state.decoders[seq.index] = decoder
        # A stop token adds no text. If the reason is "stop" here, the scheduler has ended the
        # sequence at a stop token, which is the last one: stop strings are found only below.
        ended_by_token = seq.finish_reason == "stop"
        for token_id in new_ids[:-1] if ended_by_token else new_ids:
            decoder.push(token_id)
        if decoder.stopped is not None:
            self.scheduler.finish(seq, "stop")
            # If the scheduler has ended it in this step too, at max_tokens for example, `finish`
            # does nothing. The stop string came first, so its reasons replace the others.
            seq.finish_reason, seq.stop_reason = "stop", decoder.stopped
        elif seq.status == FINISHED:  # what was held back can become no stop string any more
            decoder.finish()

    def _request_output(self, state: _RequestState, finished: bool) -> RequestOutput:
        request, scores = state.request, state.prompt_logprobs
        outputs = []
        for seq in request.sequences:
            # A strategy drops a sequence without a reason: a beam that lost, for example.
            dropped_by_strategy = seq.status == FINISHED and seq.finish_reason is None
            if not dropped_by_strategy:
                outputs.append(self._completion(state, seq))
        return RequestOutput(
            request_id=request.request_id,
            prompt=state.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=outputs,
            prompt_logprobs=None if scores is None else list(scores),
            metrics=state.metrics,
            finished=finished,
        )

    def _completion(self, state: _RequestState, seq: Sequence) -> CompletionOutput:
        decoder = state.decoders.get(seq.index)
        generated = seq.token_ids[seq.num_prompt_tokens :]
        output = CompletionOutput(seq.index, decoder.text if decoder else "", generated)
        if state.request.params.logprobs is not None:
            output.logprobs = list(seq.logprobs)  # a copy: later steps append to the sequence's
            chosen = zip(seq.logprobs, generated, strict=True)
            output.cumulative_logprob = sum(entry[i].logprob for entry, i in chosen)
        output.finish_reason, output.stop_reason = seq.finish_reason, seq.stop_reason
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
    processor.add(request, "A")

    texts: list[str] = []  # after each step
    print("step  token  alone  text so far")
    while scheduler.has_unfinished():
        plan = scheduler.schedule()
        token_id = written[len(texts)]
        scheduler.update(plan, [Continuation(seq, [token_id]) for seq in plan.sampled])
        (output,) = processor.process(plan, time.monotonic())
        texts.append(output.outputs[0].text)
        alone = tokenizer.token_text(token_id)
        print(f"{len(texts):4}  {token_id:5}  {alone:5}  {texts[-1]!r}")
        if len(texts) == len(written):
            break
    (completion,) = output.outputs
    print(f"finish_reason {completion.finish_reason!r}, stop_reason {completion.stop_reason!r}")
    before_stop = WRITTEN[: WRITTEN.index(STOP)]
    assert completion.text == before_stop, "the text ends before the stop string"
    assert all(before_stop.startswith(text) for text in texts)
    assert output.finished and scheduler.allocator.num_free == 8
    print("ok: no character was broken, and the text ends exactly before the stop string")


if __name__ == "__main__":
    demo()
