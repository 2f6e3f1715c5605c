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
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import NamedTuple

from engine import InferenceEngine
from outputs import BlockCounts, StepOutput, Timings
from sequence import Plan
from serving.answers import as_json
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
    """A watcher that keeps the last steps of an engine for its listeners.

    `about` are more fields of the header. All methods but `__call__` are for one event loop.
    """

    def __init__(self, engine: InferenceEngine, **about: str):
        self.engine = engine
        self.about = about
        self.num_frames = 0  # since the start
        self.listeners: list[Listener] = []
        self._describe = Describer(engine.scheduler)
        self._frames: deque[Frame] = deque(maxlen=MAX_FRAMES)
        self._lock = threading.Lock()  # for the ring and its number
        self._tells_all = False  # the next frame has all tokens, not only new ones

    @property
    def header(self) -> dict:
        """What a listener gets first."""
        return self._describe.header | self.about

    # ---- in the engine's thread ----
    def __call__(self, output: StepOutput) -> None:
        """Put a step into the ring."""
        if self._tells_all:
            self._tells_all = False
            self._describe.tell_all_again()
        line = self._describe(output)
        kinds = {listener.has_text for listener in list(self.listeners)}
        frame = Frame(
            with_text=as_json(line) if True in kinds else "",
            without_text=as_json(line | {"tokens": []}) if False in kinds else "",
        )
        with self._lock:
            self._frames.append(frame)
            self.num_frames += 1

    # ---- in the event loop ----
    def join(self, has_text: bool) -> "Listener":
        """A new listener, which gets what comes from now on. It must `leave`."""
        listener = Listener(self, has_text, self.num_frames)
        self.listeners.append(listener)
        self.tell_all()
        if self not in self.engine.watchers:
            self.engine.watchers.append(self)
        return listener

    def leave(self, listener: "Listener") -> None:
        """Forget a listener. Without any the engine does not call this watcher."""
        self.listeners.remove(listener)
        if not self.listeners and self in self.engine.watchers:
            self.engine.watchers.remove(self)

    def tell_all(self) -> None:
        """Let the next frame have all that a new listener needs."""
        self._tells_all = True

    def frames_since(self, number: int) -> tuple[int, list[Frame]]:
        """How many frames from a number on are lost, and the others."""
        with self._lock:
            num_wanted = self.num_frames - number
            frames = list(self._frames)[-num_wanted:] if num_wanted else []
        return num_wanted - len(frames), frames

    def at_rest(self) -> dict:
        """The line of a pool while no request runs: as after a step that did nothing."""
        nothing = StepOutput(Plan(), [], [], [], BlockCounts(), Timings())
        return Describer(self.engine.scheduler)(nothing)


class Listener:
    """One page that is open. `has_text`: it may see the texts of tokens."""

    def __init__(self, feed: Feed, has_text: bool, next_frame: int):
        self.feed = feed
        self.has_text = has_text
        self.next_frame = next_frame

    def leave(self) -> None:
        """The page is closed."""
        self.feed.leave(self)

    async def events(self, closing: asyncio.Event) -> AsyncIterator[str]:
        """The header, then each step, until `closing` is set."""
        feed = self.feed
        yield as_event(feed.header, "header")
        if not feed.engine.has_unfinished():  # no step may come for a long time
            yield as_event(feed.at_rest())
        last_sign = time.monotonic()
        while not closing.is_set():
            events = self.new_events()
            if not events and time.monotonic() - last_sign > SECONDS_BETWEEN_SIGNS:
                events = ": still here\n\n"
            if events:
                last_sign = time.monotonic()
                yield events  # waits until the client has read enough of what was sent before
            await wait(closing, SECONDS_BETWEEN_LOOKS)

    def new_events(self) -> str:
        """The events of the steps since the last call; "" if there was none."""
        num_lost, frames = self.feed.frames_since(self.next_frame)
        self.next_frame += num_lost + len(frames)
        texts = [frame.with_text if self.has_text else frame.without_text for frame in frames]
        events = "".join(f"data: {text}\n\n" for text in texts if text)
        if not num_lost:
            return events
        self.feed.tell_all()
        return as_event({"frames": num_lost}, "lost") + events


async def wait(event: asyncio.Event, seconds: float) -> None:
    """Wait until an event is set, or for some seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def as_event(value: dict, name: str = "message") -> str:
    """One server-sent event. ("message" is the name of those without one.)"""
    return f"event: {name}\ndata: {as_json(value)}\n\n"


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
