"""Replicas: copies of the server on the machines of a Ray cluster, behind one address.

    python -m serving.replicas --num-replicas 2        http://127.0.0.1:8000/v1, as serving.server
    python -m serving.replicas --min-replicas 1 --max-replicas 8 --ray-address auto

Ray Serve starts the copies, watches over them and carries the messages. What is ours is which
replica gets a request. Ray's HTTP proxy shows a router no more of a request than its headers. So a
front reads the body, computes the keys of the prompt's blocks, and calls the replicas with them:

    client ── HTTP ──> Ray's proxy ──> Front ── PrefixRouter ──> Replica 0   app, engine, pool
                                       body -> keys           └> Replica 1   app, engine, pool
                                         ^                          │ every 2 s: keys of its cached
                                         └──────────────────────────┘ blocks, requests, free blocks

Each replica runs the whole application of server.py, so an answer is the same as one server's. The
header X-Replica names the replica. The live page and /metrics tell of one engine, so the front does
not pass them on: Ray has metrics of its own. A replica that dies takes with it the streams that it
was writing: each ends with an error. Requests that had no answer yet are refused with 503, and
OpenAI's client sends them again. Ray starts another replica.

A client of Ray's own ports can run programs: keep them inside a network that you trust. Every
machine needs this folder at the same path and the packages of requirements-ray.txt.

docs.ray.io, "Ray Serve: Custom request routers". The tests kill replicas under load.
Run: python -m serving.replicas --help
"""

import asyncio
import logging
import os
import random
import secrets
import signal
import threading
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import ray
import torch
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from engine import InferenceEngine
from generate import build_llm
from llm import SamplingParams
from outputs import StepOutput
from prefix_cache import PrefixCache
from serving.answers import event
from serving.engine_thread import EngineThread
from serving.openai_api import ApiError, ChatRequest, CompletionRequest
from serving.protection import is_loopback
from serving.routing import Known, block_keys, by_prefix, reported_keys, split_keys
from serving.server import (
    ServerConfig,
    build_parser,
    create_app,
    guarded,
    server_config,
)

logger = logging.getLogger("pagedgpt.replicas")

APP = "pagedgpt"
REPORT_SECONDS = 2.0  # between two reports of a replica
HEALTH_SECONDS = 2.0  # between two questions for its health; Ray ends it after three bad answers
FRONT_REQUESTS = 10_000  # that one front may have at once: it only waits for the replicas
ROUTED_LENGTH = 20_000  # characters or ids of a prompt: the router reads no more
LATER = {"Retry-After": "1"}
FORWARDED = ("type", "method", "path", "raw_path", "query_string", "headers", "scheme", "client")
FORMS = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}
PATHS = {*FORMS, "/health", "/version", "/tokenize", "/detokenize"}  # and /v1/models


# ---- a replica -----------------------------------------------------------------------------------
class Progress:
    """A watcher of the engine that says whether it is stuck.

    An engine that has work and has ended no step for `stuck_s` seconds is stuck: in a kernel that
    never returns, for example. Its thread is alive, so /health says 200.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        stuck_s: float,
        now: Callable[[], float] = time.monotonic,
    ):
        self.engine = engine
        self.stuck_s = stuck_s
        self.now = now
        self._num_steps = 0
        self._seen = (0, now())  # the number of steps at the last progress, and when that was

    def __call__(self, output: StepOutput) -> None:
        """A step has ended."""
        self._num_steps += 1

    def check(self) -> None:
        """Raise RuntimeError if the engine is stuck. It must be asked again and again."""
        num_steps, since = self._seen
        if self._num_steps != num_steps or not self.engine.has_unfinished():
            self._seen = (self._num_steps, self.now())
        elif self.now() - since > self.stuck_s:
            raise RuntimeError(f"the engine has work, and no step has ended for {self.stuck_s} s")


class Replica:
    """One copy of the engine and of the application, in a process of its own."""

    async def __init__(self, args: Namespace, salt: bytes):
        llm = build_llm(args, prefix_salt=salt)
        llm.generate([[0, 0]], SamplingParams(max_tokens=2, ignore_eos=True))  # compiles kernels
        self.llm = llm
        self.app = create_app(llm, server_config(args))
        self.engine_thread: EngineThread = self.app.state.engine_thread
        self.progress = Progress(llm.engine, args.stuck)
        self.engine_thread.watch(self.progress)
        self.name = serve.get_replica_context().replica_id.unique_id
        self._lifespan = self.app.router.lifespan_context(self.app)
        await self._lifespan.__aenter__()

    async def __del__(self):
        await self._lifespan.__aexit__(None, None, None)

    async def check_health(self) -> None:
        """What Ray asks. Raises RuntimeError if no request would ever be answered."""
        if not self.engine_thread.is_alive:
            raise RuntimeError("the engine has stopped: too many steps have failed")
        self.progress.check()

    async def record_routing_stats(self) -> dict[str, Any]:
        """The replica's report, which Ray carries to the routers."""
        scheduler = self.llm.engine.scheduler
        allocator = scheduler.allocator
        return {
            "keys": reported_keys(allocator) if isinstance(allocator, PrefixCache) else b"",
            "requests": len(self.llm.engine.requests),
            "free_blocks": allocator.num_free,
            "blocks": allocator.num_blocks,
        }

    async def reader(self) -> tuple[Any, int]:
        """What a front needs for the keys of a prompt: the tokenizer, and the size of a block."""
        return self.llm.tokenizer, self.llm.config.block_size

    async def answer(
        self, scope: dict, body: bytes, keys: list[bytes]
    ) -> AsyncIterator[list[Message]]:
        """Run the application on one request; its messages, as many at once as there are.

        `keys` are for the router. A caller that stops reading ends the request.
        """
        inbox: asyncio.Queue[Message] = asyncio.Queue()
        inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})
        outbox: asyncio.Queue[Message | None] = asyncio.Queue()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                signature = (b"x-replica", self.name.encode())
                message = message | {"headers": [*message["headers"], signature]}
            outbox.put_nowait(message)

        # After the body the application waits at `inbox`, as at a client that stays connected.
        task = asyncio.ensure_future(self.app(scope, inbox.get, send))
        task.add_done_callback(lambda _: outbox.put_nowait(None))
        try:
            async for messages in batches(outbox):
                yield messages
        finally:
            task.cancel()


async def batches(queue: asyncio.Queue) -> AsyncIterator[list]:
    """What is put into a queue, as many at once as there are; None is the end."""
    found: list = []
    while not found or found[-1] is not None:
        found = [await queue.get()]
        while not queue.empty():
            found.append(queue.get_nowait())
        yield [item for item in found if item is not None]


# ---- the router ----------------------------------------------------------------------------------
class PrefixRouter(FIFOMixin, RequestRouter):
    """Ray's interface for `by_prefix`: Ray asks it for each request that a front has to send.

    It runs in the process of the front. Ray sends the request to the first replica in our order
    that has fewer than `max_ongoing_requests`.
    """

    # Ray asks the first replica how many requests it has. By default it takes the next one if there
    # is no answer for 0.1 s, and then a conversation would leave its cached blocks. A replica that
    # computes on the CPU answers later than that.
    queue_len_response_deadline_s = 2.0

    def initialize_state(self) -> None:
        """Ray calls this once, after the constructor."""
        self._known: dict[ReplicaID, Known] = {}
        self._reports: dict[ReplicaID, dict[str, Any]] = {}
        # What this front, the only one, has at each replica. Ray counts too, but late: it counts a
        # request when it is sent, and then takes what the replica had at some moment before. Of a
        # hundred requests that come at once all would go to one replica.
        self._num_accepted: Counter[ReplicaID] = Counter()
        # Of requests that no replica has taken yet. One that ends so disappears with its future.
        self._chosen: WeakKeyDictionary[asyncio.Future, ReplicaID] = WeakKeyDictionary()
        self._draw = random.Random()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas in groups, the best first: here a group is one replica."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # wait a little if all are full
        # Several of Ray's tasks choose at once. `FIFOMixin` gives what one of them has chosen to
        # the first request in line, so that is the request to choose for. (Without it Ray 2.55
        # loses a request whose task ends early, and its client waits for ever.)
        waiting = (one for one in self._pending_requests_to_fulfill if not one.future.done())
        request = next(waiting, None)
        if request is None:
            return [candidate_replicas]
        keys = request.kwargs.get("keys", ())
        ids = [replica.replica_id for replica in candidate_replicas]
        loads = [self._load(replica_id) for replica_id in ids]
        found = [self._known[i].share(keys) if i in self._known else 0 for i in ids]
        order = by_prefix(loads, found, 0, self._draw)
        self._chosen[request.future] = ids[order[0]]
        return [[candidate_replicas[i]] for i in order]

    def _load(self, replica_id: ReplicaID) -> int:
        """How many requests a replica has, or will have in a moment."""
        chosen = [i for future, i in self._chosen.items() if not future.cancelled()]
        return self._num_accepted[replica_id] + chosen.count(replica_id)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, _) -> None:
        """A replica has taken a request."""
        self._chosen.pop(pending_request.future, None)
        self._num_accepted[replica_id] += 1
        known = self._known.setdefault(replica_id, Known())
        known.send(pending_request.kwargs.get("keys", ()), time.monotonic())

    def decrement_queue_len_cache(self, replica_id: ReplicaID) -> None:
        """A request that a replica had taken has ended: Ray calls this once for each of them."""
        super().decrement_queue_len_cache(replica_id)
        self._num_accepted[replica_id] -= 1

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The replicas that run now, with their last reports."""
        super().update_replicas(replicas)
        reports = {replica.replica_id: replica.routing_stats for replica in replicas}
        for replica_id, report in reports.items():
            if report and report != self._reports.get(replica_id):
                known = self._known.setdefault(replica_id, Known())
                known.report(split_keys(report["keys"]), time.monotonic())
        self._reports = reports
        self._known = {i: known for i, known in self._known.items() if i in reports}


ROUTERS = {
    "prefix": RequestRouterConfig(
        request_router_class=PrefixRouter, request_routing_stats_period_s=REPORT_SECONDS
    ),
    # Ray's own: of two replicas that are drawn at random the one with fewer requests.
    "default": RequestRouterConfig(request_routing_stats_period_s=REPORT_SECONDS),
}


# ---- the front -----------------------------------------------------------------------------------
class Front:
    """An ASGI application that reads a request, lets the router choose, and passes the answer on.

    `salt` is that of the replicas' prefix caches.
    """

    def __init__(self, replicas: serve.handle.DeploymentHandle, salt: bytes):
        self.replicas = replicas
        self.salt = salt
        self._reader: tuple[Any, int] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises ApiError if no replica could begin to."""
        if scope["path"] not in PATHS and not scope["path"].startswith("/v1/models"):
            raise ApiError(f"replicas do not serve {scope['path']}", status=404)
        body = await whole_body(receive)
        request = {name: scope[name] for name in FORWARDED}
        has_begun = False
        try:
            keys = await self.keys(scope["path"], body)
            answer = self.replicas.options(stream=True).answer.remote(request, body, keys=keys)
            try:
                async for messages in answer:
                    for message in messages:
                        has_begun = True
                        await send(message)
            finally:
                answer.cancel()  # if the client went away
        except BackPressureError:
            raise ApiError("all replicas are full: try again later", 429, headers=LATER) from None
        except (RayError, RayServeException) as error:
            logger.warning("a replica failed: %s", type(error).__name__)
            failure = ApiError("the replica has failed: try again", 503, headers=LATER)
            if not has_begun:
                raise failure from None
            # It is a stream: an answer that is whole comes in one piece.
            last = f"{event(failure.body)}data: [DONE]\n\n".encode()
            await send({"type": "http.response.body", "body": last})

    async def keys(self, path: str, body: bytes) -> list[bytes]:
        """The keys of the first prompt of a body; none if it has none, or makes no sense."""
        if path not in FORMS:
            return []
        if self._reader is None:
            self._reader = await self.replicas.reader.remote()
        tokenizer, block_size = self._reader
        with suppress(ValueError, OverflowError, ApiError):  # the replica says what is wrong
            request = FORMS[path].model_validate_json(body)
            prompt = request.prompts()[0][:ROUTED_LENGTH]
            if isinstance(prompt, str):
                prompt = tokenizer.encode(prompt) if tokenizer else []
            return block_keys(prompt, block_size, self.salt, request.cache_salt)
        return []


async def whole_body(receive: Receive) -> bytes:
    """The body of a request. Raises ClientDisconnect if the client leaves before its end."""
    chunks = []
    has_more = True
    while has_more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        has_more = message.get("more_body", False)
    return b"".join(chunks)


def front_app(front: Front, config: ServerConfig) -> FastAPI:
    """The front with the server's limits before it and the server's form of errors."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/", front)
    return guarded(app, config)


# ---- the program ---------------------------------------------------------------------------------
def application(args: Namespace) -> serve.Application:
    """What `serve.run` starts: a front, and the replicas."""
    config = server_config(args)
    salt = secrets.token_bytes(32)
    count: dict[str, Any] = {"num_replicas": args.num_replicas}
    if args.max_replicas:
        bounds = AutoscalingConfig(
            min_replicas=args.min_replicas,
            max_replicas=args.max_replicas,
            target_ongoing_requests=args.target_requests,
        )
        count = {"autoscaling_config": bounds}
    replica = serve.deployment(Replica, name="Replica").options(
        # What does not run yet waits in the engine, which counts it and refuses what is too much.
        max_ongoing_requests=args.max_num_seqs + args.max_waiting,
        max_queued_requests=args.max_waiting,
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=args.drain,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(uses_gpu(args))},
        request_router_config=ROUTERS[args.router],
        **count,
    )

    def build_front() -> FastAPI:
        handle = serve.get_deployment_handle("Replica", APP)
        return front_app(Front(handle, salt), config)

    front = serve.deployment(serve.ingress(build_front)(), name="Front").options(
        max_ongoing_requests=FRONT_REQUESTS,
        graceful_shutdown_timeout_s=args.drain + 5,  # longer: it says that a replica has ended
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(replica.bind(args, salt))


def uses_gpu(args: Namespace) -> bool:
    """Whether a replica needs a GPU of its own."""
    return args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())


def replicas_parser() -> ArgumentParser:
    """The flags of serving.server, and those of the replicas."""
    parser = build_parser()
    parser.prog = "serving.replicas"
    parser.description = __doc__
    group = parser.add_argument_group("replicas")
    group.add_argument("--num-replicas", type=int, default=2, help="copies (default 2)")
    group.add_argument("--min-replicas", type=int, default=1, help="copies at least (default 1)")
    group.add_argument("--max-replicas", type=int, help="copies at most, as many as are needed")
    group.add_argument(
        "--target-requests", type=float, default=32.0, help="requests that a copy should have"
    )
    routers = "prefix: where the prompt's beginning is cached; default: Ray Serve's own"
    group.add_argument("--router", choices=ROUTERS, default="prefix", help=routers)
    group.add_argument("--ray-address", help="of a Ray cluster that runs; none: one of its own")
    stuck = "seconds without a step after which a copy is replaced (default 60)"
    group.add_argument("--stuck", type=float, default=60.0, help=stuck)
    return parser


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The flags, with what only this machine knows made plain for the others. ValueError."""
    args = replicas_parser().parse_args(argv)
    config = server_config(args)
    bounds = (1, args.min_replicas, args.max_replicas or args.min_replicas)
    if args.num_replicas < 1 or sorted(bounds) != list(bounds):
        raise ValueError("replicas: at least 1, and --min-replicas at most --max-replicas")
    if not args.stuck > 0:
        raise ValueError(f"--stuck is {args.stuck}: it must be above 0")
    args.api_key = config.api_key
    args.served_model_name = config.served_model_name
    if Path(args.model).exists():
        args.model = str(Path(args.model).resolve())
    return args


def start(args: Namespace) -> None:
    """Serve on the Ray cluster that this process is connected to; returns when all copies run."""
    serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(application(args), name=APP, route_prefix="/")


def stop() -> None:
    """Take no more requests. Each copy ends what it has begun, for `--drain` seconds at most."""
    serve.delete(APP)
    serve.shutdown()  # Ray's proxies, which have carried the answers until now


def connect(args: Namespace) -> None:
    """Join the cluster of `--ray-address`, or start one on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is sent to anybody
    options: dict[str, Any] = {"address": args.ray_address}
    if args.ray_address is None:
        # Ray counts cores and does not hold anybody to them; the copies may share one.
        cores = max(os.cpu_count() or 1, args.max_replicas or args.num_replicas)
        options = {"num_cpus": cores, "include_dashboard": False}
    ray.init(**options)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, start the copies, and serve until a signal comes."""
    try:
        args = parse_args(argv)
    except ValueError as error:
        raise SystemExit(f"serving.replicas: {error}") from None
    logging.basicConfig(level=logging.INFO, format="%(levelname)s:     %(message)s")
    if not is_loopback(args.host) and args.api_key is None:
        logger.warning("%s can be reached from outside, and there is no --api-key", args.host)
    is_over = threading.Event()
    connect(args)
    # After `connect`, because Ray has handlers of its own, which would end this process at once.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: is_over.set())
    try:
        start(args)
        logger.info("replicas running on http://%s:%d", args.host, args.port)
        is_over.wait()
        stop()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    # Ray's processes import the classes by name, and __main__ is another module there.
    import_module("serving.replicas").main()
