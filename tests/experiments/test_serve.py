"""The client that measures servers: what it sends and when, and what it makes of the answers."""

import argparse
import json
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from experiments import serve
from experiments.results import append, read
from experiments.serve import Result, draw_calls, figures


def parse(words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(words.split())


def test_requests_come_at_random_times_with_the_rate_as_their_mean():
    """The same lengths at each rate, and the same times in another unit."""
    args = parse("--requests 2000 --prompt-tokens 3 5 --new-tokens 7 7")
    slow, fast = draw_calls(args, 10.0), draw_calls(args, 40.0)
    assert [call[1:] for call in slow] == [call[1:] for call in fast]
    assert slow[-1].at_s == pytest.approx(4 * fast[-1].at_s)
    assert slow[-1].at_s == pytest.approx(2000 / 10, rel=0.1)
    assert {len(call.prompt) for call in slow} == {3, 4, 5}
    assert {call.num_tokens for call in slow} == {7}
    gaps = [b.at_s - a.at_s for a, b in zip(slow, slow[1:])]
    assert sum(gap > 0.1 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.05)  # 1/e


def test_figures_are_worked_out_by_hand():
    args = parse("--first-ms 200 --between-ms 50")
    results = [
        Result(1.0, 100.0, (10.0, 30.0), 140.0),  # good
        Result(2.0, 250.0, (10.0,), 260.0),  # its first token came too late
        Result(3.0, 100.0, (40.0, 80.0), 220.0),  # 60 ms between tokens, on average
        Result(4.0, error="status 429"),
    ]
    found = figures(results, 2.0, args)
    assert found["errors", "%"] == 25
    assert found["goodput", "requests/s"] == 0.5  # one in two seconds
    assert found["tokens of all texts", "tokens/s"] == (3 + 2 + 3) / 2
    assert found["sent too late p99", "ms"] == 4
    assert found["time to first token p50", "ms"] == 100
    assert found["time to first token p99", "ms"] == 250
    assert found["between tokens p50", "ms"] == 30
    assert found["whole request p90", "ms"] == 260
    only_errors = figures(results[3:], 2.0, args)
    assert only_errors["errors", "%"] == 100 and ("whole request p50", "ms") not in only_errors


class Handler(BaseHTTPRequestHandler):
    """A server that waits 60 ms, then writes a token every 20 ms; every fourth request fails."""

    protocol_version = "HTTP/1.1"
    bodies: list[dict] = []

    def log_message(self, *args):
        pass

    def answer(self, text: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        self.answer(b'{"data": [{"id": "toy"}]}', "application/json")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        if len(self.bodies) % 4 == 0:
            self.answer(b"{}", "application/json", 429)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        time.sleep(0.06)
        for _ in range(body["max_tokens"]):
            self.wfile.write(b'data: {"choices": [{"text": "x"}]}\n\n')
            self.wfile.flush()
            time.sleep(0.02)
        self.wfile.write(b'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n')


@contextmanager
def known_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.bodies = []
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_of_known_times_is_measured(tmp_path):
    flags = "--rates 50 --requests 8 --repeats 2 --new-tokens 3 3 --prompt-tokens 2 2"
    with known_server() as url:
        rows = list(append(tmp_path / "rows.csv", serve.run(parse(f"--url {url} {flags}"))))
    by_metric = {row.metric: row for row in rows}
    assert len(read(tmp_path / "rows.csv")) == len(rows) == 13
    assert by_metric["errors"].median == 25 and by_metric["errors"].repeats == 2
    # Upper bounds would fail on a busy machine.
    assert by_metric["time to first token p50"].min >= 60
    assert by_metric["between tokens p50"].median >= 15
    assert by_metric["whole request p50"].min >= 60 + 2 * 20
    assert by_metric["goodput"].max <= 50
    body = Handler.bodies[0]
    assert body["stream"] and body["ignore_eos"] and len(body["prompt"]) == 2
    assert body["model"] == "toy" and len(Handler.bodies) == 3 * 8  # one round does not count


def test_no_server_is_said_in_a_sentence():
    with pytest.raises(ValueError, match="is a server running there"):
        list(serve.run(parse("--url http://127.0.0.1:9/v1 --requests 1")))
