"""Many streams at once, of which nearly a third are closed by their clients at a random moment.

In float64, so that every text that ends is the text of the lone run. The ordinary run is short;
PAGEDGPT_LOAD="200 120" is 200 streams at once for two minutes.
"""

import asyncio
import json
import os
import random
import time

import httpx2
import psutil
from servers import running

from llm import LLM, SamplingParams

NUM_STREAMS, SECONDS = map(int, os.environ.get("PAGEDGPT_LOAD", "12 2").split())
SHARE_CLOSED = 0.3
OPENINGS = ["The wolf", "Once upon a time there was", "A fox", '"Who is there?"', "The king's son"]
NUM_BLOCKS = NUM_STREAMS  # a text takes up to five: some are preempted


def cases() -> list[dict]:
    """Bodies of requests: greedy and drawn ones, several texts, stop strings, log-probabilities."""
    choose = random.Random(1)
    bodies = []
    for seed in range(8):
        body = {"prompt": choose.choice(OPENINGS), "max_tokens": choose.randint(1, 40)}
        body |= {"temperature": choose.choice([0.0, 0.7, 1.0]), "seed": seed}
        if body["temperature"] and choose.random() < 0.3:
            body["n"] = 2
        body |= choose.choice([{}, {"stop": [" the"]}, {"logprobs": 1}, {"top_p": 0.9}])
        bodies.append(body)
    return bodies


def lone_texts(folder, bodies) -> list[list[str]]:
    """What the engine writes for each body alone."""
    llm = LLM(folder, dtype="float64", num_blocks=64)
    found = []
    for body in bodies:
        params = {name: value for name, value in body.items() if name != "prompt"}
        (output,) = llm.generate(body["prompt"], SamplingParams(**params))
        found.append([completion.text for completion in output.outputs])
    return found


class Clients:
    """Clients that ask again and again until the time is over."""

    def __init__(self, url: str, bodies: list[dict], texts: list[list[str]]):
        self.url, self.bodies, self.texts = url, bodies, texts
        self.until = time.monotonic() + SECONDS
        self.num_finished = self.num_closed = 0
        self.problems: list[str] = []

    async def run(self) -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=NUM_STREAMS)
        async with httpx2.AsyncClient(base_url=self.url, limits=limits, timeout=120) as client:
            await asyncio.gather(*(self.ask(client, i) for i in range(NUM_STREAMS)))

    async def ask(self, client: httpx2.AsyncClient, number: int) -> None:
        choose = random.Random(number)
        while time.monotonic() < self.until:
            case = choose.randrange(len(self.bodies))
            is_closed = choose.random() < SHARE_CLOSED
            num_read = choose.randint(0, self.bodies[case]["max_tokens"]) if is_closed else 10**6
            try:
                await self.read(client, case, num_read)
            except Exception as error:
                self.problems.append(f"{self.bodies[case]}: {error!r}")

    async def read(self, client: httpx2.AsyncClient, case: int, num_read: int) -> None:
        """Read a stream, whole or only so many chunks of it."""
        body = self.bodies[case] | {"stream": True}
        texts = [""] * body.get("n", 1)
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            lines = [line async for line in first_lines(answer, num_read)]
        if not lines or lines[-1] != "data: [DONE]":
            assert len(lines) == num_read, f"ended after {len(lines)} chunks"
            self.num_closed += 1
            return
        for line in lines[:-1]:
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            texts[choice["index"]] += choice["text"]
        assert texts == self.texts[case], f"{texts} is not {self.texts[case]}"
        self.num_finished += 1


async def first_lines(answer, count: int):
    """The first lines of a stream that are not empty."""
    if count == 0:
        return
    async for line in answer.aiter_lines():
        if line:
            yield line
            count -= 1
            if count == 0:
                return


def number(server, name: str) -> float:
    """A number of the server's /metrics."""
    lines = server.client.get("/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith(f"vllm:{name}{{")]
    return float(line.split()[-1])


def test_under_load_every_finished_stream_is_the_lone_run_and_nothing_is_lost(
    shipped_model_folder, caplog
):
    bodies = cases()
    texts = lone_texts(shipped_model_folder, bodies)
    llm = LLM(shipped_model_folder, dtype="float64", num_blocks=NUM_BLOCKS)
    with running(llm) as server:
        warm = Clients(server.url, bodies, texts)
        warm.until = time.monotonic() + SECONDS / 6
        asyncio.run(warm.run())
        rss_before = psutil.Process().memory_info().rss
        clients = Clients(server.url, bodies, texts)
        asyncio.run(clients.run())
        server.wait_until_free()
        grown_mb = (psutil.Process().memory_info().rss - rss_before) / 1e6
        num_aborted = number(server, "request_aborted_total")
        num_preempted = number(server, "num_preemptions_total")
        assert number(server, "num_requests_running") == number(server, "kv_cache_usage_perc") == 0
        assert server.app.state.engine_thread.num_sequences == 0
    counts = f"{clients.num_finished} finished, {clients.num_closed} closed, {num_aborted} aborted"
    print(f"{counts}, {num_preempted} preempted, {grown_mb:.1f} MB more")
    assert warm.problems + clients.problems == []
    assert clients.num_finished > NUM_STREAMS / 2 and clients.num_closed > 0
    assert num_aborted > 0 and num_preempted > 0
    assert grown_mb < 40
    assert not [record for record in caplog.records if record.exc_info]
