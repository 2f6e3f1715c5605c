"""The engine in a thread of its own, and the way from there to the requests of a web server.

A web server is an event loop: one thread that waits for many connections at once. A step of the
engine takes milliseconds to seconds, and meanwhile that thread could answer nobody. So a second
thread steps. Only two things cross the border, and neither needs a lock:

    event loop     submit ── engine.add_request ──┐          ┌─> Job ─> one HTTP request
                   abort ─── engine.abort ────────┤          │   (pieces: text, token, end)
    ---------------------------------------------- v -------- | --------------------------
    engine thread                          step ─> step ─> step ── call_soon_threadsafe
                                       (joins the batch at the next one)

`add_request` and `abort` may be called from any thread. What a step has written is posted to the
loop in one call a step, and there it is shared out among the jobs. A `Job` keeps what its reader
has not taken yet, up to a limit: a client that reads too slowly loses its request, and delays no
other. The tests compare each job with the engine alone, and break a step on purpose.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import NamedTuple

from beam_search import BeamSearchParams, add_beam_search
from engine import InferenceEngine
from llm import LLM
from outputs import Delta, RequestOutput, StepOutput
from sampling import Logprobs, SamplingParams

logger = logging.getLogger("pagedgpt.engine")

MAX_BUFFERED_PIECES = 4096  # of one job: what its reader has not taken yet
MAX_FAILURES = 3  # steps that fail one after the other; then the thread ends


class Busy(Exception):
    """Too many requests wait already. Trying again later may help."""


class Closing(Exception):
    """The engine takes no more requests, or has ended the request."""


class TooSlow(Exception):
    """The reader of a job has left too many pieces behind."""


class TooLong(Exception):
    """The request's time is over."""


class StepFailed(Exception):
    """A step raised an exception: a bug, or a device without memory."""


class Piece(NamedTuple):
    """What one step added to one text of a request."""

    prompt_number: int  # of the job's prompts
    index: int  # of the prompt's n texts
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None  # one entry a token, where they were asked for
    # One entry a token of the prompt, in the first piece of a text and where they were asked for.
    prompt_logprobs: list[Logprobs | None] | None
    finish_reason: str | None  # None while the text goes on
    error: str | None


class Job:
    """The requests of the engine that answer one HTTP request: one for each of its prompts.

    It belongs to the event loop. Read it once, with `pieces` or with `outputs`, and close it: if it
    has not ended then, its requests are aborted.
    """

    def __init__(self, num_prompts: int, wants_pieces: bool, deadline: float):
        self.wants_pieces = wants_pieces
        self.deadline = deadline  # in seconds of time.monotonic, which is also the loop's time
        self.request_ids: list[str] = []
        self.num_sequences = 0
        self._outputs: list[RequestOutput | None] = [None] * num_prompts
        self._pieces: deque[Piece] = deque()
        self._failure: Exception | None = None
        self._news = asyncio.Event()

    @property
    def is_done(self) -> bool:
        """Whether the engine has ended all its requests, or it has failed."""
        return self._failure is not None or None not in self._outputs

    @property
    def outcome(self) -> str:
        """How it ended, in a few words for a log."""
        if self._failure is not None:
            return str(self._failure)
        return "done" if self.is_done else "the client went away"

    # ---- what the engine thread's object calls ----
    def add(self, piece: Piece) -> None:
        """Take a piece. Raises TooSlow if too many wait to be read."""
        if self.wants_pieces:
            if len(self._pieces) >= MAX_BUFFERED_PIECES:
                raise TooSlow(f"{MAX_BUFFERED_PIECES} tokens were not read: the request has ended")
            self._pieces.append(piece)
            self._news.set()

    def finish(self, prompt_number: int, output: RequestOutput) -> None:
        """Take the whole output of one prompt."""
        self._outputs[prompt_number] = output
        self._news.set()

    def fail(self, error: Exception) -> None:
        """End it with an error, which its reader gets after the pieces before it."""
        self._failure = self._failure or error
        if isinstance(error, TooSlow):
            self._pieces.clear()
        self._news.set()

    # ---- what its reader calls ----
    async def pieces(self) -> AsyncIterator[Piece]:
        """Each piece as it comes. Raises what the job failed with, and TooLong at its deadline."""
        while True:
            while self._pieces:
                yield self._pieces.popleft()
            if self._failure is not None:
                raise self._failure
            if self.is_done:
                return
            await self._wait()

    async def outputs(self) -> list[RequestOutput]:
        """The whole output of each prompt, when all have ended. Raises as `pieces` does."""
        while not self.is_done:
            await self._wait()
        if self._failure is not None:
            raise self._failure
        return [output for output in self._outputs if output is not None]

    async def _wait(self) -> None:
        """Wait for news; at the deadline the job fails."""
        self._news.clear()
        try:
            # The loop's clock is time.monotonic.
            async with asyncio.timeout_at(self.deadline):
                await self._news.wait()
        except TimeoutError:
            self.fail(TooLong("the request took longer than the server allows: ask for less"))


class EngineThread:
    """Owns the thread that steps. All its methods are for the event loop's thread.

    A request is refused with `Busy` if more than `max_waiting` sequences would wait behind the
    engine's `max_num_seqs`. `watch` adds a watcher of the engine (see engine.py): a function that
    gets the output of each step, in the engine's thread. `closing` is set when no more requests are
    taken: whatever streams without an end must end then.
    """

    def __init__(self, llm: LLM, max_waiting: int = 512):
        self.llm = llm
        self.engine = llm.engine
        self.max_sequences = llm.config.max_num_seqs + max_waiting
        self.num_sequences = 0  # of all jobs
        self.closing = asyncio.Event()
        self._jobs: dict[str, tuple[Job, int]] = {}  # request id -> its job, the prompt's number
        self._wake = threading.Event()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- from start to stop ----
    def start(self) -> None:
        """Begin to step. Call it in the event loop that will read the jobs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread steps. It ends after `MAX_FAILURES` failed steps in a row."""
        return self._thread.is_alive() and not self._is_stopped

    def end_all(self, reason: str) -> None:
        """Take no more requests, and end all that run with the error `Closing`."""
        self.closing.set()
        self._fail_all(Closing(reason))

    async def stop(self) -> None:
        """End everything, and wait for the thread."""
        self.end_all("the server shuts down")
        self._is_stopped = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    # ---- requests ----
    def submit(
        self,
        prompts: list[list[int]],
        params: SamplingParams | BeamSearchParams,
        timeout_s: float,
        is_stream: bool,
        cache_salt: str | None = None,
    ) -> Job:
        """Queue prompts, given as token ids. The job is closed with `close`.

        Raises ValueError, and queues none, if the engine refuses one of them, `Busy` if too many
        requests wait, `Closing` if none are taken any more.
        """
        if self.closing.is_set() or not self.is_alive:
            raise Closing("the server shuts down" if self.is_alive else "the engine has stopped")
        is_search = isinstance(params, BeamSearchParams)
        of_each = params.beam_width if is_search else params.num_sampled
        add = add_beam_search if is_search else InferenceEngine.add_request
        num_sequences = len(prompts) * of_each
        if num_sequences > self.max_sequences:
            found = f"{len(prompts)} prompts with {of_each} texts each are {num_sequences}"
            raise ValueError(f"{found}, the server takes {self.max_sequences}: ask for fewer")
        if self.num_sequences + num_sequences > self.max_sequences:
            raise Busy(f"{self.num_sequences} texts are being written or wait: try again later")
        job = Job(len(prompts), is_stream, time.monotonic() + timeout_s)
        try:
            for number, prompt in enumerate(prompts):
                options = {"deadline": job.deadline, "cache_salt": cache_salt}
                request_id = add(self.engine, prompt, params, **options)
                # The engine may have written tokens already. They are delivered by this thread, so
                # not before this function has ended.
                self._jobs[request_id] = job, number
                job.request_ids.append(request_id)
        except BaseException:
            self.close(job)
            raise
        job.num_sequences = num_sequences
        self.num_sequences += num_sequences
        self._wake.set()
        return job

    def close(self, job: Job) -> None:
        """Forget a job; abort what it has not finished. Its blocks are free after one step."""
        for request_id in job.request_ids:
            if self._jobs.pop(request_id, None) is not None:
                self.engine.abort(request_id)
        self._wake.set()
        self.num_sequences -= job.num_sequences
        job.num_sequences = 0

    def watch(self, watcher) -> None:
        """Add a watcher; it is called in the engine's thread after each step."""
        self.engine.watchers.append(watcher)

    # ---- in the engine's thread ----
    def _run(self) -> None:
        num_failures = 0
        while not self._is_stopped:
            self._wake.clear()  # before the look at the queue, so that no request is overlooked
            if not self.engine.has_unfinished():
                self._wake.wait()
                continue
            try:
                output = self.engine.step()
                if output.plan.scheduled:  # a step that only frees what was aborted proves nothing
                    num_failures = 0
            except Exception as error:
                # The step is undone. What it was for would probably fail again, so all of it ends.
                logger.exception("a step failed")
                num_failures += 1
                self._is_stopped = self._is_stopped or num_failures == MAX_FAILURES
                for request_id in list(self.engine.requests):
                    self.engine.abort(request_id)
                failure = StepFailed(f"the engine failed: {type(error).__name__}")
                self._loop.call_soon_threadsafe(self._fail_all, failure)
                continue
            self._post(output)

    def _post(self, output: StepOutput) -> None:
        """Hand what a step has written to the event loop, in one call."""
        # A delta's text is decoded here: the decoder belongs to the thread that steps.
        pieces = [(delta.request_id, _piece(delta)) for delta in output.deltas]
        if pieces or output.finished:
            self._loop.call_soon_threadsafe(self._deliver, pieces, output.finished)

    # ---- in the event loop again ----
    def _deliver(self, pieces: list[tuple[str, Piece]], finished: list[RequestOutput]) -> None:
        """Share out what a step has written among the jobs."""
        for request_id, piece in pieces:
            job, number = self._jobs.get(request_id, (None, 0))
            if job is not None:  # None: it was closed while the step ran
                try:
                    job.add(piece._replace(prompt_number=number))
                except TooSlow as error:
                    job.fail(error)
                    self.close(job)
        for output in finished:
            job, number = self._jobs.pop(output.request_id, (None, 0))
            if job is not None:
                job.finish(number, output)

    def _fail_all(self, error: Exception) -> None:
        """End all jobs with an error."""
        for job in {job for job, _ in self._jobs.values()}:
            job.fail(error)
            self.close(job)


def _piece(delta: Delta) -> Piece:
    """A delta as a value that no later step changes. `_deliver` knows the prompt's number."""
    seq = delta.seq
    request = seq.request
    logprobs = None
    if request.params.logprobs is not None:
        first, end = delta.first - seq.num_prompt_tokens, delta.end - seq.num_prompt_tokens
        logprobs = seq.logprobs[first:end]
    is_first = delta.first == seq.num_prompt_tokens
    scores = request.prompt_logprobs
    return Piece(
        prompt_number=0,
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=logprobs,
        prompt_logprobs=list(scores) if is_first and scores is not None else None,
        finish_reason=delta.finish_reason,
        error=seq.error,
    )
