"""`python -m serving.server` as a process: its start, its log, and its end by signals."""

import re
import signal
import socket
import threading
import time

import httpx2
import pytest
from servers import events, program

from serving.server import main

LONG = {"prompt": "The wolf", "max_tokens": 1000, "ignore_eos": True}
SECRET = "the secret of the third fox"


def stream_in_a_thread(url: str, answers: list) -> threading.Thread:
    """Begin a long stream; its whole answer is appended when it ends."""

    def read():
        answers.append(httpx2.post(f"{url}/v1/completions", json=LONG | {"stream": True}))

    thread = threading.Thread(target=read)
    thread.start()
    return thread


FLAGS = ("--drain", "0.5", "--num-blocks", "512", "--backend", "torch")


def test_after_sigkill_it_starts_again_and_after_sigterm_every_stream_ends_properly():
    body = {"prompt": SECRET, "max_tokens": 3, "seed": 1, "model": "wolf"}
    with program(*FLAGS, "--served-model-name", "wolf") as (process, url, lines):
        first = httpx2.post(f"{url}/v1/completions", json=body).json()["choices"]
        with httpx2.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}) as answer:
            next(answer.iter_lines())
            process.send_signal(signal.SIGKILL)
            process.wait(5)
    port = int(url.rsplit(":", 1)[1])
    with program(*FLAGS, "--served-model-name", "wolf", port=port) as (process, again, lines):
        assert again == url
        assert httpx2.post(f"{url}/v1/completions", json=body).json()["choices"] == first
        answers: list[httpx2.Response] = []
        threads = [stream_in_a_thread(url, answers) for _ in range(4)]
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        process.wait(10)
        assert time.monotonic() - started < 5
        for thread in threads:
            thread.join(5)
    assert len(answers) == 4
    for answer in answers:  # each ends with an error that says why, and with [DONE]
        *chunks, last = events(answer)
        assert chunks and last["error"]["message"] == "the server shuts down"
    log = "".join(lines)
    assert len(re.findall(r"cmpl-\w+: prompts 1, tokens \d+ \+ \d+, ", log)) == 5, log
    assert "the server shuts down" in log and SECRET not in log
    assert "Traceback" not in log, log


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--timeout", "0"], "timeout_s is 0.0: it must be at least 0.001"),
        (["--num-blocks", "0"], "num_blocks is 0"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(flags, sentence):
    with pytest.raises(SystemExit, match=f"serving.server: .*{sentence}"):
        main(flags)


def test_a_port_that_is_taken_is_said(capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        main(["--backend", "torch", "--port", str(taken.getsockname()[1])])
    assert "address already in use" in capfd.readouterr().err
