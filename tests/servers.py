"""A server in a thread of the test's process, or in one of its own, on a free port of 127.0.0.1.

    with running(llm, max_waiting=2) as server:
        httpx2.post(f"{server.url}/v1/completions", json={"prompt": "The wolf"})

It is uvicorn with the same application and protocol as `python -m serving.server` has.
"""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2
import uvicorn
from conftest import ROOT
from fastapi import FastAPI

from llm import LLM
from serving.protection import SlowClientProtocol
from serving.server import Server, ServerConfig, create_app


@dataclass
class Running:
    """A server that runs: its address, its application, a client, and the engine behind it."""

    url: str
    port: int
    app: FastAPI
    llm: LLM
    client: httpx2.Client

    def post(self, path: str, **body) -> httpx2.Response:
        return self.client.post(path, json=body)

    def complete(self, **body) -> dict:
        """The answer to a completion that must not fail."""
        answer = self.post("/v1/completions", **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait_until_free(self, seconds: float = 10.0) -> None:
        """Wait until no block is held, and check that none was lost."""
        allocator = self.llm.engine.scheduler.allocator
        wait_for(lambda: allocator.num_free == allocator.num_blocks, seconds)
        wait_for(lambda: not self.llm.engine.requests, seconds)
        self.llm.engine.scheduler.check_integrity()


def wait_for(condition, seconds: float = 10.0) -> None:
    """Wait until a condition holds; a test fails where it does not."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.005)


@contextmanager
def program(*flags: str, port: int = 0):
    """The program on a free port, its address, and the lines that it has written so far."""
    command = [sys.executable, "-m", "serving.server", "--port", str(port), *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    lines: list[str] = []
    thread = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    try:
        address = None
        while address is None:
            line = process.stderr.readline()
            lines.append(line)
            assert line, "".join(lines)
            address = re.search(r"running on (http://\S+)", line)
        thread.start()
        yield process, address[1], lines
    finally:
        process.kill()
        process.wait()
        thread.join(5)


@contextmanager
def running(llm: LLM, **config) -> Iterator[Running]:
    """Serve `llm` until the block ends; `config` are fields of ServerConfig."""
    settings = ServerConfig(**({"port": 0, "drain_s": 0.2, "timeout_s": 60.0} | config))
    app = create_app(llm, settings)
    server = Server(
        uvicorn.Config(app, port=0, http=SlowClientProtocol, ws="none", log_level="warning")
    )
    server.engine_thread, server.drain_s = app.state.engine_thread, settings.drain_s
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        with httpx2.Client(base_url=url, timeout=60) as client:
            yield Running(url, port, app, llm, client)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def events(answer: httpx2.Response) -> list[dict]:
    """The chunks of a whole stream, which must end with [DONE]."""
    assert answer.headers["Content-Type"].startswith("text/event-stream"), answer.text
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
