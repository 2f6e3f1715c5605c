"""Replicas: the four routers by hand, what a replica reports, and two real ones on Ray.

The test with Ray starts a cluster of two nodes on this machine. It is skipped where Ray is not
installed. The replicas run in float64, so that a text is that of the lone run in any batch.
"""

import asyncio
import pickle
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import openai
import psutil
import pytest
from servers import running, wait_for

from llm import LLM, SamplingParams
from prefix_cache import PrefixCache
from serving import routing
from serving.routing import BUSY, KEY_BYTES, Known, block_keys, reported_keys, split_keys

NAME = "tiny-gpt2"


# ---- routers -------------------------------------------------------------------------------------
def order(router: str, loads: list[int], found: list[float] | None = None, number: int = 0):
    found = [0] * len(loads) if found is None else found
    return routing.ROUTERS[router](loads, found, number, random.Random(0))


def test_round_robin_goes_from_one_to_the_next():
    assert [order("round-robin", [0, 0, 0], number=n)[0] for n in range(5)] == [0, 1, 2, 0, 1]


def test_least_loaded_asks_the_replica_with_the_fewest_requests():
    assert order("least-loaded", [3, 0, 2]) == [1, 2, 0]


def test_the_longest_prefix_wins_and_of_equal_ones_the_least_loaded():
    assert order("prefix", [5, 0, 4], found=[0.75, 0.5, 0.75]) == [2, 0, 1]


def test_a_prefix_of_less_than_half_of_the_prompt_does_not_count():
    assert order("prefix", [2, 0, 1], found=[0.49, 0.0, 0.0]) == [1, 2, 0]


def test_an_overloaded_replica_comes_last_whatever_it_has_cached():
    # The mean of 12, 0 and 3 is 5: with 10 requests or more a replica is overloaded.
    assert order("prefix", [12, 0, 3], found=[0.9, 0.0, 0.5]) == [2, 1, 0]
    # Up to BUSY requests never are: the mean of 7, 0 and 0 is 2.3.
    assert order("prefix", [BUSY - 1, 0, 0], found=[0.9, 0.0, 0.0])[0] == 0


def test_equal_replicas_share_the_requests():
    draw = random.Random(1)
    for router in ("random", "least-loaded", "prefix"):
        route = routing.ROUTERS[router]
        firsts = Counter(route([0] * 4, [0] * 4, 0, draw)[0] for _ in range(400))
        assert min(firsts[i] for i in range(4)) > 60, router


# ---- what is known of a replica ------------------------------------------------------------------
def test_a_report_names_the_cached_blocks_by_the_keys_of_the_prompts_that_find_them():
    cache = PrefixCache(8, block_size=4, salt=b"s")
    prompt = list(range(11))
    table = cache.allocate(3)
    cache.publish(table, prompt, 11)  # two full blocks
    keys = block_keys([*prompt, 11, 12], 4, b"s")  # its third block has other tokens
    assert len(keys) == 3 and sorted(keys[:2]) == sorted(split_keys(reported_keys(cache)))
    for other in (block_keys(prompt, 4, b"t"), block_keys(prompt, 4, b"s", cache_salt="t")):
        assert not set(other) & set(keys), "another salt, other keys"


def test_the_last_token_is_always_computed_so_the_block_that_it_fills_is_not_looked_for():
    assert [len(block_keys([7] * n, 4, b"s")) for n in (4, 5, 8, 9)] == [0, 1, 1, 2]


def test_a_router_believes_what_it_has_sent_until_the_report_that_is_later():
    a, b, c = (bytes([i]) * KEY_BYTES for i in range(3))
    known = Known(remember_s=10.0)
    known.send([a, b], now_s=0.0)
    known.report([c], now_s=5.0)
    assert known.share([a, b]) == known.share([c, a, b]) == 1
    known.report([a], now_s=11.0)  # b was evicted, or never computed
    assert known.share([a, b]) == 0.5 and known.share([b, a]) == known.share([c]) == 0


def test_a_front_gets_a_copy_of_the_replicas_tokenizer(shipped_model_folder):
    tokenizer = LLM(shipped_model_folder, num_blocks=8).tokenizer
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "The wolf said: \u201cÜber\u201d <|endoftext|>"
    ids = tokenizer.encode(text)
    assert copy.encode(text) == ids and copy.decode(ids) == tokenizer.decode(ids)


# ---- a stuck engine ------------------------------------------------------------------------------
def test_an_engine_whose_step_never_ends_fails_its_health_check(tiny_gpt):
    pytest.importorskip("ray")
    from serving.replicas import Progress

    llm = LLM(tiny_gpt(), num_blocks=32)
    clock = [0.0]
    progress = Progress(llm.engine, stuck_s=60.0, now=lambda: clock[0])
    forward, goes_on = llm.engine.forward, threading.Event()

    def stuck_forward(batch):
        assert goes_on.wait(60)
        return forward(batch)

    with running(llm) as server:
        server.app.state.engine_thread.watch(progress)
        clock[0] = 100.0
        progress.check()  # no work: no step is due
        llm.engine.forward = stuck_forward
        asked = threading.Thread(
            target=server.post, args=["/v1/completions"], kwargs={"prompt": [1, 2], "max_tokens": 2}
        )
        asked.start()
        wait_for(llm.engine.has_unfinished)
        clock[0] = 159.0
        progress.check()
        clock[0] = 161.0
        with pytest.raises(RuntimeError, match="no step has ended for 60.0 s"):
            progress.check()
        assert server.client.get("/health").status_code == 200, "its thread is alive"
        goes_on.set()
        asked.join(30)
        progress.check()


# ---- the program ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--num-replicas", "0"], "at least 1"),
        (["--min-replicas", "3", "--max-replicas", "2"], "--min-replicas at most --max-replicas"),
        (["--stuck", "0"], "--stuck is 0.0: it must be above 0"),
        (["--timeout", "0"], "timeout_s is 0.0: it must be at least 0.001"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(flags, sentence):
    pytest.importorskip("ray")
    from serving.replicas import main

    with pytest.raises(SystemExit, match=f"serving.replicas: .*{sentence}"):
        main(flags)


# ---- Ray -----------------------------------------------------------------------------------------
FLAGS = [
    "--num-replicas",
    "2",
    "--drain",
    "60",
    "--dtype",
    "float64",
    "--backend",
    "torch",
    "--num-blocks",
    "640",
    "--max-num-seqs",
    "64",
]
OPENINGS = ["The wolf", "Once upon a time there was", "A fox", "The king's son"]
SWALLOWS = "Far away, where the swallows fly when we have winter, there lived a king. " * 3
LONG = {"prompt": "The wolf", "seed": 1, "max_tokens": 250, "extra_body": {"ignore_eos": True}}


def free_port() -> int:
    """A port that no process listens on.

    The system gives ports from 32,768 on to outgoing connections, and Ray's own workers take 10,002
    to 19,999: one of those might be taken before Ray's proxy listens on it.
    """
    while True:
        port = random.randint(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextmanager
def two_nodes(monkeypatch):
    """A cluster of two nodes; `start(router) -> url` starts a replica on each. All end with it."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as top:
        Path(top, "ray").mkdir()
        monkeypatch.setenv(
            "RAY_TMPDIR", top
        )  # pytest's own folders have names too long for sockets
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        monkeypatch.setenv("RAY_worker_niceness", "0")  # other tests run beside this one
        import ray
        from ray.cluster_utils import Cluster

        from serving import replicas

        node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
        cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
        try:
            cluster.add_node(**node)

            def start(router: str) -> str:
                port = free_port()
                flags = ["--port", str(port), "--ray-address", cluster.address, "--router", router]
                args = replicas.parse_args([*FLAGS, *flags])
                if not ray.is_initialized():
                    replicas.connect(args)
                replicas.start(args)
                return f"http://127.0.0.1:{port}/v1"

            yield start
        finally:
            ray.shutdown()
            cluster.shutdown()


def actors() -> dict:
    """The processes of the replicas that run, by name."""
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    start = "SERVE_REPLICA::pagedgpt#Replica#"
    return {
        one["name"].removeprefix(start): ray.get_actor(one["name"], one["namespace"])
        for one in named
        if one["name"].startswith(start)
    }


def reports() -> list[dict]:
    import ray

    return ray.get([actor.record_routing_stats.remote() for actor in actors().values()], timeout=60)


def all_free() -> bool:
    return all(one["free_blocks"] == one["blocks"] and not one["requests"] for one in reports())


def ray_processes() -> set[int]:
    """The processes of Ray on this machine."""
    found = psutil.process_iter(["pid", "cmdline"])
    commands = {one.info["pid"]: " ".join((one.info["cmdline"] or [])[:2]) for one in found}
    return {pid for pid, command in commands.items() if "ray::" in command or "/ray/" in command}


class Stream:
    """A stream that is read to its end: which replica wrote it, its text, its error."""

    def __init__(self, client: openai.AsyncOpenAI, body: dict):
        self.client, self.body = client, body
        self.replica, self.text, self.error = None, "", None
        self.has_begun = asyncio.Event()

    async def read(self) -> "Stream":
        create = self.client.completions.with_raw_response.create
        answer = await create(model=NAME, stream=True, **self.body)
        self.replica = answer.headers["x-replica"]
        try:
            async for chunk in answer.parse():
                self.text += chunk.choices[0].text
                self.has_begun.set()
        except openai.APIError as error:
            self.error = error
        return self


async def all_200_streams_get_the_text_of_the_lone_run(client, alone):
    bodies = [
        {"prompt": OPENINGS[i % 4], "seed": i % 8, "max_tokens": 10 + i % 3} for i in range(200)
    ]
    streams = await asyncio.gather(*(Stream(client, body).read() for body in bodies))
    for stream in streams:
        assert stream.error is None and stream.text == alone(stream.body)
    shares = Counter(stream.replica for stream in streams)
    assert len(shares) == 2 and min(shares.values()) >= 80, shares


async def turns_of_a_conversation(client, number: int) -> list[str]:
    """Four turns, each with all that was said before: the replica of each."""
    # Longer than what follows: a prefix of less than half of a prompt does not count.
    first = f"I am traveller {number}, {'very ' * (30 + number)}old, and I tell you of my journey."
    messages, found = [{"role": "user", "content": first}], []
    for _ in range(4):
        create = client.chat.completions.with_raw_response.create
        answer = await create(model=NAME, messages=messages, max_tokens=20, seed=number)
        found.append(answer.headers["x-replica"])
        text = answer.parse().choices[0].message.content
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And?"}]
    return found


async def conversations_stay_where_they_began(client):
    turns = await asyncio.gather(*(turns_of_a_conversation(client, i) for i in range(12)))
    stayed = sum(replica == of_one[0] for of_one in turns for replica in of_one[1:])
    assert stayed >= 0.9 * 12 * 3, turns
    begun = Counter(of_one[0] for of_one in turns)
    assert len(begun) == 2 and min(begun.values()) >= 4, begun


async def a_full_replica_hands_its_conversations_on(client):
    """BUSY long streams with one beginning go to one replica; the next goes to the other."""
    body = LONG | {"prompt": SWALLOWS, "max_tokens": 600}
    first = Stream(client, body | {"max_tokens": 1})
    await first.read()
    tasks = []
    for _ in range(BUSY):
        stream = Stream(client, body)
        tasks.append(asyncio.ensure_future(stream.read()))
        await asyncio.wait_for(stream.has_begun.wait(), 60)
        assert stream.replica == first.replica
    last = Stream(client, body | {"max_tokens": 1})
    await last.read()
    assert last.replica != first.replica
    for task in tasks:  # the clients leave
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.to_thread(wait_for, all_free, 60)


async def a_killed_replica_takes_only_its_own_streams_and_comes_back(client, alone):
    import ray

    streams = [Stream(client, LONG) for _ in range(30)]
    tasks = [asyncio.ensure_future(stream.read()) for stream in streams]
    await asyncio.wait_for(asyncio.gather(*(one.has_begun.wait() for one in streams)), 60)
    before = actors()
    killed = streams[0].replica
    assert 5 <= sum(stream.replica == killed for stream in streams) <= 25
    ray.kill(before[killed])
    fresh = await asyncio.gather(
        *(Stream(client, LONG | {"max_tokens": 5}).read() for _ in range(10))
    )
    assert {(one.error, one.text) for one in fresh} == {(None, alone(LONG | {"max_tokens": 5}))}
    assert killed not in {one.replica for one in fresh}
    await asyncio.wait_for(asyncio.gather(*tasks), 120)
    for stream in streams:
        if stream.replica == killed:
            assert "the replica has failed" in str(stream.error)
            assert alone(LONG).startswith(stream.text) and stream.text != alone(LONG)
        else:
            assert stream.error is None and stream.text == alone(LONG)
    until = time.monotonic() + 90
    while {one.replica for one in fresh} <= before.keys():
        assert time.monotonic() < until, "the replica has not come back"
        fresh = [await Stream(client, LONG | {"max_tokens": 1}).read() for _ in range(4)]
    await asyncio.to_thread(wait_for, all_free, 60)
    assert len(actors()) == 2


async def what_runs_is_finished_when_all_stop(client, alone):
    from serving.replicas import stop

    stream = Stream(client, LONG)
    reading = asyncio.ensure_future(stream.read())
    await asyncio.wait_for(stream.has_begun.wait(), 60)
    await asyncio.wait_for(asyncio.to_thread(stop), 90)
    await asyncio.wait_for(reading, 60)
    assert stream.error is None and stream.text == alone(LONG)


async def rays_own_router_shares_streams_with_one_beginning(client, alone):
    """Fewer than BUSY, each begun while the others run: ours would send all to one replica."""
    body = LONG | {"prompt": SWALLOWS, "max_tokens": 80}
    streams = [Stream(client, body | {"seed": i}) for i in range(BUSY - 1)]
    tasks = []
    for stream in streams:
        tasks.append(asyncio.ensure_future(stream.read()))
        await asyncio.wait_for(stream.has_begun.wait(), 60)
    await asyncio.wait_for(asyncio.gather(*tasks), 120)
    for stream in streams:
        assert stream.error is None and stream.text == alone(stream.body)
    shares = Counter(stream.replica for stream in streams)
    assert len(shares) == 2 and min(shares.values()) >= 2, shares


@pytest.mark.slow
def test_two_replicas_on_two_nodes_share_the_streams_and_one_may_die(
    monkeypatch, shipped_model_folder
):
    pytest.importorskip("ray")
    llm = LLM(shipped_model_folder, dtype="float64", backend="torch", num_blocks=64)
    texts: dict[str, str] = {}

    def alone(body: dict) -> str:
        """What the engine writes for a body alone."""
        if str(body) not in texts:
            params = body | body.get("extra_body", {})
            params = {k: v for k, v in params.items() if k not in ("prompt", "extra_body")}
            (output,) = llm.generate(body["prompt"], SamplingParams(**params))
            texts[str(body)] = output.outputs[0].text
        return texts[str(body)]

    def client_of(url: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=url, api_key="none", timeout=120)

    async def run(url: str) -> None:
        async with client_of(url) as client:
            await all_200_streams_get_the_text_of_the_lone_run(client, alone)
            await conversations_stay_where_they_began(client)
            await a_full_replica_hands_its_conversations_on(client)
            await a_killed_replica_takes_only_its_own_streams_and_comes_back(client, alone)
            await what_runs_is_finished_when_all_stop(client, alone)

    async def run_default(url: str) -> None:
        async with client_of(url) as client:
            await rays_own_router_shares_streams_with_one_beginning(client, alone)

    alone(LONG)
    before = ray_processes()
    with two_nodes(monkeypatch) as start:
        asyncio.run(run(start("prefix")))
        asyncio.run(run_default(start("default")))
    wait_for(lambda: ray_processes() <= before, 30)
