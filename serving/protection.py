"""Who may ask, and how much: what stands between the network and the routes.

A server that a program of the same machine talks to is open to more than that program. A web page
in a browser can send requests to 127.0.0.1, and read the answers if its own name is made to point
there (DNS rebinding). A client may send ten megabytes, one byte a minute, or never read what it
asked for. Each of these meets a limit here:

    connection   SlowClientProtocol   headers within 10 s; 30 s without reading end it
    request      Guard                 the Host header, the API key, the size and time of the body
    answer       server.py             too many requests: 429; a request's time; a client that left

There are no CORS headers: a page of another origin cannot read an answer, and cannot send JSON.
`Guard` is plain ASGI and works in front of any application; the protocol is for uvicorn, which has
no limit for slow headers of its own. The tests attack a running server.

CWE-350 (DNS rebinding), CWE-208 (timing), CWE-400 (slow loris).
"""

import asyncio
import base64
import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

import h11
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.openai_api import ApiError

HEADERS_SECONDS = 10.0  # to send the headers of a request
BODY_SECONDS = 30.0  # to send its body
STALLED_SECONDS = 30.0  # without reading what was sent
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
ANY_ADDRESS = {"", "0.0.0.0", "::"}  # a server that listens at all addresses of the machine
OPEN_PATHS = {"/health"}  # with a key set, these are open without it


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach a server that listens at `host`."""
    return host in LOOPBACK


def name_in(host_header: str) -> str:
    """The name or address in a Host header, without the port; "" if it is malformed.

    Example: "[::1]:8000" -> "::1".
    """
    try:
        return urlsplit(f"//{host_header}").hostname or ""
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    """Whether a name is an address in numbers, which no DNS server can redirect."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def sent_key(headers: Headers) -> bytes:
    """The API key of a request: a bearer token, or the password that a browser has asked for."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except ValueError:  # no base64
            return b""
    return value.strip().encode("latin-1") if kind.lower() == "bearer" else b""


class Guard:
    """An ASGI application around another one: it refuses requests before they reach it.

    `host` is what the server listens at, `allowed_hosts` are more names that clients may use.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        allowed_hosts: Iterable[str] = (),
        api_key: str | None = None,
        max_body_bytes: int = 2**21,
    ):
        self.app = app
        self.hosts = {host, *allowed_hosts, *LOOPBACK}
        self.allows_addresses = host in ANY_ADDRESS
        self.api_key = None if api_key is None else api_key.encode()
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an error, or pass the request on with a body that is limited."""
        if scope["type"] != "http":  # the start and the end of the server
            await self.app(scope, receive, send)
            return
        try:
            self.check(scope["path"], Headers(scope=scope))
        except ApiError as error:
            answer = JSONResponse(error.body, error.status, error.headers)
            await answer(scope, receive, send)
            return
        await self.app(scope, self.limited(receive), send)

    def check(self, path: str, headers: Headers) -> None:
        """Raise ApiError for a request that is refused."""
        name = name_in(headers.get("host", ""))
        if name not in self.hosts and not (self.allows_addresses and is_address(name)):
            raise ApiError("the Host header names another server (see --allowed-host)", status=421)
        if self.api_key is not None and path not in OPEN_PATHS:
            # It takes equally long wherever two keys differ, so its time tells nothing.
            if not hmac.compare_digest(sent_key(headers), self.api_key):
                ways = {"WWW-Authenticate": 'Bearer, Basic realm="PagedGPT", charset="UTF-8"'}
                raise ApiError(
                    "the API key is wrong or missing", 401, code="invalid_api_key", headers=ways
                )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.max_body_bytes:
            raise ApiError(self.too_large, status=413)

    @property
    def too_large(self) -> str:
        """What a client reads that has sent too much."""
        return f"the request's body has more than {self.max_body_bytes} bytes"

    def limited(self, receive: Receive) -> Receive:
        """`receive` with a limit for the body's bytes and for the time until it is complete."""
        num_bytes = 0
        is_whole = False
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS

        async def receive_some() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:
                return await receive()  # waits for the client to leave
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the request's body came too slowly") from None
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_body_bytes:  # a body without Content-Length
                raise HTTPException(413, self.too_large)
            is_whole = not message.get("more_body", False)
            return message

        return receive_some


class SlowClientProtocol(H11Protocol):
    """uvicorn's protocol for HTTP/1.1, which also ends connections that keep it waiting."""

    _headers_timer: asyncio.TimerHandle | None = None
    _stalled_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client has connected: its first headers are due."""
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Some bytes have come; perhaps the headers are complete with them."""
        super().data_received(data)
        # IDLE: the next thing that the client has to send is the headers of a request.
        if self.conn.their_state is not h11.IDLE:
            self._headers_timer = _cancel(self._headers_timer)
        elif self._headers_timer is None:
            self._expect_headers()

    def pause_writing(self) -> None:
        """The buffer of what was sent and not read is full."""
        super().pause_writing()
        self._stalled_timer = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read again."""
        super().resume_writing()
        self._stalled_timer = _cancel(self._stalled_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        self._headers_timer = _cancel(self._headers_timer)
        self._stalled_timer = _cancel(self._stalled_timer)
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._headers_timer = self.loop.call_later(HEADERS_SECONDS, self.transport.close)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
