"""A server under load: latency against the rate of requests, over HTTP.

An open loop: requests arrive at random times that were drawn beforehand (a Poisson process), and
each is sent at its time, however many are still open, because users do not wait for one another. A
client that sends the next request when the last one has ended can never overload a server: it
measures a queue that it keeps short itself.

    time to first token   from sending a request to its first chunk with a choice: queue and prefill
    between tokens        the time between two such chunks of a stream
    whole request         until the stream has ended
    goodput               requests a second that got their first token within --first-ms, and their
                          other tokens within --between-ms on average

The server is any that speaks OpenAI's completions API and takes token ids (--url); without --url
this program starts its own (`python -m serving.server`) with the shipped model. All requests have
the same lengths in every round; each rate is measured in several rounds, one after the other. The
client runs in one process beside the server: "sent too late" says by how much it missed the times,
and a figure next to a large one says nothing about the server.

The tests run it against a server whose times are known.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import httpx2

from experiments.results import ROOT, Measurement, device_name, percentile
from experiments.simulate import Arrival, poisson

NUM_IDS = 256  # prompts are drawn from the first ids, which every vocabulary has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `serve`."""
    add = parser.add_argument
    add("--url", help="a server that runs, http://host:8000/v1; default: one is started")
    add("--api-key", default="none", help="what the server wants")
    add("--rates", type=float, nargs="+", default=[4, 8, 16], help="requests a second")
    add("--requests", type=int, default=60, help="of a round")
    add("--repeats", type=int, default=5, help="rounds of each rate")
    add("--prompt-tokens", type=int, nargs=2, default=[16, 64], help="least and most, uniform")
    add("--new-tokens", type=int, nargs=2, default=[16, 64], help="least and most, uniform")
    add("--first-ms", type=float, default=200, help="for goodput: to the first token")
    add("--between-ms", type=float, default=50, help="for goodput: between tokens, on average")
    add("--timeout", type=float, default=60, help="seconds until a request has failed")
    add("--seed", type=int, default=0, help="of times and lengths")


# ---- one request ---------------------------------------------------------------------------------
class Call(NamedTuple):
    """A request that will be sent."""

    at_s: float  # after the round's beginning
    prompt: list[int]
    num_tokens: int


class Result(NamedTuple):
    """What became of it; times in milliseconds."""

    late_ms: float  # how much later than planned it was sent
    first_ms: float | None = None
    gaps_ms: tuple[float, ...] = ()
    whole_ms: float | None = None
    error: str | None = None


def draw_calls(args: argparse.Namespace, rate: float) -> list[Call]:
    """The requests of a round; the same lengths at every rate."""
    draw = random.Random(args.seed)
    requests = [
        Arrival(0.0, draw.randint(*args.prompt_tokens), draw.randint(*args.new_tokens))
        for _ in range(args.requests)
    ]
    return [
        Call(at_s, [draw.randrange(NUM_IDS) for _ in range(num_prompt)], num_new)
        for at_s, num_prompt, num_new in poisson(requests, rate, args.seed)
    ]


async def ask(client: httpx2.AsyncClient, call: Call, model: str, started: float) -> Result:
    """Send a request at its time, and note when each of its tokens comes."""
    planned = started + call.at_s
    await asyncio.sleep(max(0.0, planned - time.perf_counter()))
    sent = time.perf_counter()
    late_ms = (sent - planned) * 1e3
    body = {"model": model, "prompt": call.prompt, "max_tokens": call.num_tokens}
    body |= {"stream": True, "ignore_eos": True, "temperature": 1.0, "seed": 1}
    times: list[float] = []
    try:
        async with client.stream("POST", "completions", json=body) as answer:
            if answer.status_code != 200:
                return Result(late_ms, error=f"status {answer.status_code}")
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        return Result(late_ms, error=chunk["error"]["message"])
                    if chunk["choices"]:
                        times.append(time.perf_counter())
    except httpx2.HTTPError as error:
        return Result(late_ms, error=type(error).__name__)
    if not times:
        return Result(late_ms, error="no token")
    gaps_ms = tuple((b - a) * 1e3 for a, b in zip(times, times[1:]))
    return Result(late_ms, (times[0] - sent) * 1e3, gaps_ms, (times[-1] - sent) * 1e3)


async def run_round(args: argparse.Namespace, url: str, rate: float) -> tuple[list[Result], float]:
    """One round at a rate: what became of each request, and the round's seconds."""
    headers = {"Authorization": f"Bearer {args.api_key}"}
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(
        base_url=f"{url}/", headers=headers, limits=limits, timeout=args.timeout
    ) as client:
        answer = await client.get("models")
        answer.raise_for_status()
        model = answer.json()["data"][0]["id"]
        started = time.perf_counter()
        calls = draw_calls(args, rate)
        results = await asyncio.gather(*(ask(client, call, model, started) for call in calls))
        return results, time.perf_counter() - started


# ---- figures -------------------------------------------------------------------------------------
def is_good(result: Result, args: argparse.Namespace) -> bool:
    """Whether a request was answered as fast as --first-ms and --between-ms demand."""
    if result.error is not None or result.first_ms is None:
        return False
    gaps = result.gaps_ms
    mean_gap = sum(gaps) / len(gaps) if gaps else 0.0
    return result.first_ms <= args.first_ms and mean_gap <= args.between_ms


def figures(
    results: list[Result], seconds: float, args: argparse.Namespace
) -> dict[tuple[str, str], float]:
    """(metric, unit) -> its value in one round. Times are of the requests without an error."""
    good = [result for result in results if result.error is None]
    found = {
        ("errors", "%"): 100 * (1 - len(good) / len(results)),
        ("goodput", "requests/s"): sum(is_good(result, args) for result in results) / seconds,
        ("sent too late p99", "ms"): percentile([result.late_ms for result in results], 99),
    }
    tokens = sum(1 + len(result.gaps_ms) for result in good)
    found["tokens of all texts", "tokens/s"] = tokens / seconds
    values = {
        "time to first token": [r.first_ms for r in good if r.first_ms is not None],
        "between tokens": [gap for r in good for gap in r.gaps_ms],
        "whole request": [r.whole_ms for r in good if r.whole_ms is not None],
    }
    for metric, times in values.items():
        for percent in (50, 90, 99):
            if times:
                found[f"{metric} p{percent}", "ms"] = percentile(times, percent)
    return found


@contextmanager
def own_server() -> Iterator[str]:
    """Start the server with the shipped model on a free port; its address, until the block ends."""
    command = [sys.executable, "-m", "serving.server", "--port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log)
        try:
            found = None
            while found is None:
                if process.poll() is not None:
                    raise ValueError("the server did not start: python -m serving.server says why")
                time.sleep(0.1)
                log.seek(0)
                found = re.search(r"running on (http://\S+)", log.read())
            yield f"{found[1]}/v1"
        finally:
            process.terminate()
            process.wait(30)


def run(args: argparse.Namespace) -> Iterator[Measurement]:
    """Measure each rate in several rounds. Raises ValueError if no server answers."""
    with nullcontext(args.url.rstrip("/")) if args.url else own_server() as url:
        try:
            asyncio.run(run_round(args, url, max(args.rates)))  # a round that does not count
        except httpx2.HTTPError as error:
            raise ValueError(f"{url}: {error!r}: is a server running there?") from None
        rounds: dict[float, list[dict]] = {rate: [] for rate in args.rates}
        for _ in range(args.repeats):
            for rate in args.rates:
                results, seconds = asyncio.run(run_round(args, url, rate))
                rounds[rate].append(figures(results, seconds, args))
    for rate, found in rounds.items():
        yield from rows_of(rate, found, args)


def rows_of(rate: float, rounds: list[dict], args: argparse.Namespace) -> Iterator[Measurement]:
    """The rows of one rate: each metric over its rounds."""
    prompt, new = ("-".join(map(str, pair)) for pair in (args.prompt_tokens, args.new_tokens))
    workload = f"rate={rate:g} requests={args.requests} prompt={prompt} new={new}"
    for metric, unit in dict.fromkeys(key for figures_of in rounds for key in figures_of):
        values = [found[metric, unit] for found in rounds if (metric, unit) in found]
        yield Measurement.of(
            values,
            experiment="serve",
            contender=args.url or "own server",
            metric=metric,
            unit=unit,
            workload=workload,
            backend="http",
            dtype="none" if args.url else "float32",
            threads=0 if args.url else 1,
            device=device_name(),
            model="unknown" if args.url else "tiny-gpt2",
            weights="none" if args.url else "trained weights",
            seed=args.seed,
        )
