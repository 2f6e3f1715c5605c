"""The live page's events: what each step of the engine did, for any browser that looks.

The page (live.html) shows the same view as replay.html. Its lines are not read from a file: they
come from `GET /events` as server-sent events, a recorder's line each (watch/recorder.py).

    engine thread     step ─> Feed ─> |41|42|43|44|45|    a ring of the last frames
                                        ^        ^
    event loop        a slow listener ──┘        └── a fast one

`Feed` is a watcher. It is among the engine's watchers only while somebody listens, so nobody pays
for a page that is not open. The engine appends to the ring and never waits. Each listener remembers
its place. If the ring has moved on past it, the listener has lost frames: it is told how many.

A frame holds the block structure. Texts of tokens are left out for a listener that may not see
them. The tests compare frames with recordings, and let a listener fall behind.
"""

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import NamedTuple

from engine import InferenceEngine
from outputs import BlockCounts, StepOutput, Timings
from sequence import Plan
from serving.replay import inlined, policy
from watch.recorder import Describer

MAX_FRAMES = 256  # in the ring
MAX_LISTENERS = 16
SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_BETWEEN_SIGNS = 15.0  # of life, while no step runs: a proxy would end a silent connection


class Frame(NamedTuple):
    """A step as JSON, for the listeners of each kind; "" if nobody of the kind listened."""

    with_text: str
    without_text: str


class Feed:
    """A watcher that keeps the last steps of an engine, and the listeners that read them.

    `about` are more fields of the header. All methods but `__call__` are for one event loop.
    """

    def __init__(self, engine: InferenceEngine, **about: str):
        self.engine = engine
        self.about = about
        self.num_frames = 0  # since the start
        self.num_listeners = {True: 0, False: 0}  # with text, without
        self._describe = Describer(engine.scheduler)
        self._frames: deque[Frame] = deque(maxlen=MAX_FRAMES)
        self._lock = threading.Lock()  # for the ring and its number
        self._tells_all = False  # the next frame has the texts of all tokens, not only of new ones

    # ---- in the engine's thread ----
    def __call__(self, output: StepOutput) -> None:
        """Put a step into the ring."""
        if self._tells_all:
            self._tells_all = False
            self._describe.num_told.clear()
        line = self._describe(output)
        with_text = without_text = ""
        if self.num_listeners[True]:
            with_text = as_json(line)
        if self.num_listeners[False]:
            without_text = as_json(line | {"tokens": []})
        with self._lock:
            self._frames.append(Frame(with_text, without_text))
            self.num_frames += 1

    # ---- in the event loop ----
    def frames_since(self, number: int) -> tuple[int, list[Frame]]:
        """The frames from a number on, and how many of them are lost."""
        with self._lock:
            num_wanted = self.num_frames - number
            frames = list(self._frames)[-num_wanted:] if num_wanted else []
        return num_wanted - len(frames), frames

    def at_rest(self) -> dict:
        """The line of a pool while no request runs: as after a step that did nothing."""
        nothing = StepOutput(Plan(), [], [], [], BlockCounts(), Timings())
        return Describer(self.engine.scheduler)(nothing)

    @property
    def is_full(self) -> bool:
        """Whether no more listeners should be taken."""
        return sum(self.num_listeners.values()) >= MAX_LISTENERS

    def join(self, has_text: bool) -> int:
        """Count a listener in. Returns the number of its first frame."""
        if self not in self.engine.watchers:
            self.engine.watchers.append(self)
        self.num_listeners[has_text] += 1
        self._tells_all = True
        return self.num_frames

    def leave(self, has_text: bool) -> None:
        """Count a listener out. Without any the engine does not call this watcher."""
        self.num_listeners[has_text] -= 1
        if not any(self.num_listeners.values()) and self in self.engine.watchers:
            self.engine.watchers.remove(self)

    async def events(self, has_text: bool, closing: asyncio.Event) -> AsyncIterator[str]:
        """The events of one listener, until `closing` is set: the header, then the steps.

        A caller that stops reading must close this generator, which counts the listener out.
        """
        next_frame = self.join(has_text)
        try:
            yield as_event(as_json(self._describe.header | self.about), "header")
            if not self.engine.has_unfinished():  # no step may come for a long time
                yield as_event(as_json(self.at_rest()))
            last_sign = time.monotonic()
            while not closing.is_set():
                num_lost, frames = self.frames_since(next_frame)
                next_frame += num_lost + len(frames)
                texts = [frame.with_text if has_text else frame.without_text for frame in frames]
                events = [as_event(text) for text in texts if text]
                if num_lost:
                    self._tells_all = True
                    events.insert(0, as_event(str(num_lost), "lost"))
                if not events and time.monotonic() - last_sign > SECONDS_BETWEEN_SIGNS:
                    events = [": still here\n\n"]
                if events:
                    last_sign = time.monotonic()
                    yield "".join(events)
                await wait(closing, SECONDS_BETWEEN_LOOKS)
        finally:
            self.leave(has_text)


async def wait(event: asyncio.Event, seconds: float) -> None:
    """Wait until an event is set, or for some seconds."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass


def as_json(value: dict) -> str:
    """One line."""
    return json.dumps(value, separators=(",", ":"))


def as_event(data: str, name: str = "message") -> str:
    """One server-sent event; `data` is one line."""
    return f"event: {name}\ndata: {data}\n\n"


def live_page() -> tuple[str, dict[str, str]]:
    """The live page, and the headers that it is sent with."""
    page = inlined("live.html")
    rules = policy(page, connect="'self'")
    return page, {
        "Content-Security-Policy": f"{rules}; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
