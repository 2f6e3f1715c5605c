"""Attacks on a running server: names, keys, slow and large requests, readers that do not read."""

import asyncio
import base64
import socket
import time

import pytest
from servers import running, wait_for
from starlette.datastructures import Headers

from llm import LLM, SamplingParams
from serving import engine_thread, protection
from serving.openai_api import ApiError
from serving.protection import Guard, SlowClientProtocol, name_in

LONG = {"prompt": "The wolf", "max_tokens": 1000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def llm(shipped_model_folder):
    return LLM(shipped_model_folder, num_blocks=512)


def raw(server, *parts: bytes, until: bytes = b"") -> bytes:
    """What comes back on a new connection, until it contains `until`, or the server closes it.

    The answer to each part is waited for before the next part is sent.
    """
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        found = b""
        for part in parts:
            connection.sendall(part)
            found = connection.recv(65536)
        while (not until or until not in found) and (more := connection.recv(65536)):
            found += more
        return found


# ---- who may ask ---------------------------------------------------------------------------------
def status_of(guard: Guard, path: str = "/v1/models", **headers: bytes | str) -> int:
    raw = [(k.encode(), v if isinstance(v, bytes) else v.encode()) for k, v in headers.items()]
    try:
        guard.check(path, Headers(raw=raw))
        return 200
    except ApiError as error:
        return error.status


@pytest.mark.parametrize(
    "host, listening, status",
    [
        ("127.0.0.1:8000", "127.0.0.1", 200),
        ("localhost:9999", "127.0.0.1", 200),  # another port: through a tunnel
        ("LOCALHOST", "127.0.0.1", 200),
        ("[::1]:8000", "127.0.0.1", 200),
        ("other:80", "127.0.0.1", 200),  # allowed by name
        ("evil.example:8000", "127.0.0.1", 421),  # a name that was made to point to 127.0.0.1
        ("127.0.0.1.evil.example", "127.0.0.1", 421),
        ("localhost@evil.example", "127.0.0.1", 421),
        ("192.168.0.7", "127.0.0.1", 421),
        ("", "127.0.0.1", 421),
        ("[::1", "127.0.0.1", 421),
        ("192.168.0.7:8000", "192.168.0.7", 200),
        # A server for all addresses has no name of its own: numbers cannot be redirected.
        ("192.168.0.7:8000", "0.0.0.0", 200),
        ("evil.example", "0.0.0.0", 421),
    ],
)
def test_a_request_for_another_host_is_refused(host, listening, status):
    guard = Guard(None, listening, allowed_hosts=["other"])
    assert status_of(guard, host=host) == status
    assert name_in("[::1]:8000") == "::1"


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()


@pytest.mark.parametrize(
    "authorization, status",
    [
        ("Bearer schlüssel", 200),
        ("bearer  schlüssel", 200),
        (basic("schlüssel"), 200),  # what a browser sends that has asked its user
        ("", 401),
        ("Bearer", 401),
        ("Bearer schlüssel2", 401),
        ("Bearer schlüsse", 401),
        ("schlüssel", 401),
        (basic("schlüssel2"), 401),
        ("Basic schlüssel", 401),
        ("Basic ", 401),
    ],
)
def test_with_a_key_set_every_path_but_health_wants_it(authorization, status):
    guard = Guard(None, "127.0.0.1", api_key="schlüssel")
    for path in ("/v1/models", "/", "/metrics", "/openapi.json", "/health/x", "/HEALTH"):
        assert status_of(guard, path, host="localhost", authorization=authorization) == status
    assert status_of(guard, "/health", host="localhost") == 200


def test_a_server_with_a_key_tells_who_has_none(llm):
    with running(llm, api_key="secret") as server:
        assert server.client.get("/health").status_code == 200
        answer = server.client.get("/v1/models")
        assert answer.status_code == 401 and "Bearer" in answer.headers["WWW-Authenticate"]
        headers = {"Authorization": "Bearer secret"}
        assert server.client.get("/v1/models", headers=headers).status_code == 200
        headers = {"Host": "evil.example", "Authorization": "Bearer secret"}
        assert server.client.get("/v1/models", headers=headers).status_code == 421


# ---- how much ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def impatient(llm):
    """A server that waits a fifth of a second where the real one waits 10 or 30."""
    patch = pytest.MonkeyPatch()
    for name in ("HEADERS_SECONDS", "BODY_SECONDS", "STALLED_SECONDS"):
        patch.setattr(protection, name, 0.2)
    with running(llm, max_body_bytes=1000) as server:
        yield server
    patch.undo()


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b"GET /health HTTP/1.1\r\nHost: loc"],
        [b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /hea"],
    ],
    ids=["nothing", "half a header", "half a header after an answer"],
)
def test_a_connection_whose_headers_do_not_come_is_closed(impatient, parts):
    started = time.monotonic()
    assert raw(impatient, *parts) == b""
    assert time.monotonic() - started < 2


def test_headers_that_come_byte_by_byte_are_not_waited_for(impatient):
    address = ("127.0.0.1", impatient.port)
    with socket.create_connection(address, timeout=5) as connection:
        started = time.monotonic()
        try:
            for byte in b"GET /health HTTP/1.1\r\nX: " + b"x" * 100:
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
        except OSError:
            pass  # closed
        assert time.monotonic() - started < 2


def test_an_open_connection_that_pauses_between_requests_is_kept(impatient):
    """uvicorn's own limit of five seconds holds there."""
    first = impatient.client.get("/health")
    time.sleep(0.4)
    assert first.status_code == impatient.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "data, status",
    [
        (HEAD + b"Content-Length: 10000000\r\n\r\n", 413),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"3e8\r\n" + b"x" * 1000, 408),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"3e9\r\n" + b"x" * 1001 + b"\r\n", 413),
        (HEAD + b'Content-Length: 100\r\n\r\n{"prompt":', 408),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"X: " + b"x" * 100_000, 400),
        (b"\x16\x03\x01\x02\x00\x01", 400),  # a TLS client
        (b"GET / HTTP/9.9\r\n\r\n", 421),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (HEAD + b"Host: evil.example\r\n\r\n", 400),
    ],
    ids=lambda x: str(x[-30:]) if isinstance(x, bytes) else str(x),
)
def test_what_is_malformed_too_large_or_too_slow_is_answered(impatient, data, status):
    found = raw(impatient, data, until=b"\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 %d" % status), found


def test_ten_megabytes_are_refused_and_the_server_goes_on(impatient):
    body = b'{"prompt": "' + b"x" * 10_000_000 + b'"}'
    try:
        answer = impatient.client.post("/v1/completions", content=body)
        assert answer.status_code == 413
    except Exception as error:  # closed while it was still being sent
        assert "Error" in type(error).__name__
    assert impatient.client.get("/health").status_code == 200


# ---- readers that do not read --------------------------------------------------------------------
def test_a_reader_that_does_not_read_delays_no_other_and_loses_its_request(llm, monkeypatch):
    """Its stream fills the socket's buffers; then it is cut off, and its blocks are free."""
    monkeypatch.setattr(protection, "STALLED_SECONDS", 0.3)
    connect = SlowClientProtocol.connection_made

    def connect_with_a_small_buffer(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connect(self, transport)

    monkeypatch.setattr(SlowClientProtocol, "connection_made", connect_with_a_small_buffer)
    with running(llm) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = b'{"prompt": "x", "n": 4, "max_tokens": 1000, "ignore_eos": true, '
            body += b'"logprobs": 5, "stream": true}'
            slow.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            wait_for(lambda: llm.engine.scheduler.running)
            others = [server.complete(prompt="A", max_tokens=5, seed=i) for i in range(3)]
            assert all(answer["choices"] for answer in others)
            wait_for(lambda: not llm.engine.scheduler.running, 20)
            metrics = server.client.get("/metrics").text
        assert 'request_aborted_total{model_name="tiny-gpt2"} 1.0' in metrics
        server.wait_until_free()


def test_what_a_reader_has_not_taken_is_bounded(llm, monkeypatch):
    monkeypatch.setattr(engine_thread, "MAX_BUFFERED_PIECES", 8)
    with running(llm) as server:
        thread = server.app.state.engine_thread
        jobs = []

        async def submit():
            params = SamplingParams(max_tokens=100, ignore_eos=True)
            jobs.append(thread.submit([[5, 6]], params, timeout_s=60, is_stream=True))

        asyncio.run_coroutine_threadsafe(submit(), thread._loop).result()
        wait_for(lambda: jobs[0].is_done)
        assert "were not read" in jobs[0].outcome and not jobs[0]._pieces
        server.wait_until_free()
        assert thread.num_sequences == 0
