"""How answers are sent: whole, or as a stream of events, and what happens when the client leaves.

A browser and OpenAI's clients read a stream in the form of server-sent events: lines that begin
with `data:`, an empty line behind each event. The connection stays open until the last one.

    data: {"choices": [{"text": " said", ..}], ..}

    data: [DONE]

A client may close its connection at any time. The work for it must stop then, and not when the
next token is there: `unless_disconnected` and `EventStream` listen to the connection while they
work or send. The tests close connections in each state of a request.

html.spec.whatwg.org, "Server-sent events".
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")


def as_json(value: dict) -> str:
    """In ASCII: the answer to a text with half of a surrogate pair can be sent too."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


class AsciiJSONResponse(JSONResponse):
    """An answer that is whole."""

    def render(self, content: Any) -> bytes:
        """The bytes that are sent."""
        return as_json(content).encode()


class EventStream(StreamingResponse):
    """Server-sent events. `at_end` is called once: after the last, or when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], at_end: Callable[[], object]):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send each event. Starlette listens meanwhile, and stops if the client disconnects."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Not in the generator: one that was never asked for an event runs no `finally`.
            self.at_end()


def event(value: dict) -> str:
    """One server-sent event."""
    return f"data: {as_json(value)}\n\n"


async def unless_disconnected(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled if the client goes away: ClientDisconnect then."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(disconnected())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
