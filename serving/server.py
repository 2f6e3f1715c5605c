"""The server: OpenAI's API over HTTP, for one model, on this machine.

    python -m serving.server                      http://127.0.0.1:8000/v1, the shipped model
    python -m serving.server --model gpt2 --port 8080 --max-num-seqs 64

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.completions.create(model="tiny-gpt2", prompt="The wolf", stream=True)

http://127.0.0.1:8000/ shows the pool, live, and sends prompts (live.py).
Each request joins the batch that runs, at the engine's next step, and leaves it when its text ends
or its client goes away. This file has the routes and the program. The engine's thread is in
engine_thread.py, the forms of requests and answers are in openai_api.py, limits in protection.py.

The server listens at 127.0.0.1 unless `--host` says otherwise. After SIGTERM it takes no new
requests, finishes those that run within `--drain` seconds, and ends the others with an error.
The log has a line for each request, without its text unless `--log-prompts` is given.

Run: python -m serving.server --help
"""

import asyncio
import logging
import os
import time
import tomllib
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from beam_search import BeamSearchParams, best_first
from generate import add_engine_flags, build_llm, follows_rank_0
from llm import LLM, SHIPPED_MODEL, SamplingParams
from serving.answers import AsciiJSONResponse, EventStream, event, unless_disconnected
from serving.engine_thread import Busy, Closing, EngineThread, Job, StepFailed, TooLong, TooSlow
from serving.live import MAX_LISTENERS, Feed, live_page
from serving.openai_api import (
    Answer,
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from serving.protection import Guard, SlowClientProtocol, is_loopback
from watch.metrics import Metrics

logger = logging.getLogger("pagedgpt.server")

ROOT = Path(__file__).resolve().parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
STATUS_OF = {Busy: 429, Closing: 503, TooLong: 408, TooSlow: 408, StepFailed: 500}


@dataclass(frozen=True)
class ServerConfig:
    """What the server allows; see the help texts of the flags in `build_parser`."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    served_model_name: str = SHIPPED_MODEL.name
    max_waiting: int = 512
    max_body_bytes: int = 2**21
    timeout_s: float = 600.0
    drain_s: float = 10.0
    log_prompts: bool = False

    def __post_init__(self):
        limits = {"max_waiting": 0, "max_body_bytes": 1, "timeout_s": 0.001, "drain_s": 0}
        for name, least in limits.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")

    @property
    def shows_text(self) -> bool:
        """Whether a client may see all texts: it is on this machine, or it has sent the key."""
        is_private = is_loopback(self.host) and not self.allowed_hosts
        return is_private or self.api_key is not None


# ---- errors --------------------------------------------------------------------------------------
@contextmanager
def refusals() -> Iterator[None]:
    """Within it a ValueError is a client's mistake: a prompt or a parameter is refused."""
    try:
        yield
    except ValueError as error:
        raise ApiError(str(error)) from None


def to_api_error(error: Exception) -> ApiError:
    """What a client reads of an error."""
    if isinstance(error, ApiError):
        return error
    status = STATUS_OF.get(type(error), 500)
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    message = str(error) if type(error) in STATUS_OF else "the server failed"
    return ApiError(message, status, headers=headers)


async def on_error(request: Request, error: Exception) -> Response:
    """The answer to an exception, in OpenAI's form."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        error = ApiError(f"{short_repr(place)}: {first['msg']}", param=place[:200] or None)
    elif isinstance(error, HTTPException):
        error = ApiError(str(error.detail), error.status_code, headers=error.headers)
    error = to_api_error(error)
    return AsciiJSONResponse(error.body, error.status, error.headers)


def texts_of(params: SamplingParams | BeamSearchParams) -> int:
    """How many texts answer each prompt."""
    if isinstance(params, BeamSearchParams):
        return params.num_return_sequences or params.beam_width
    return params.n


# ---- one request ---------------------------------------------------------------------------------
class Service:
    """What the routes share: the engine's thread, the model's name, and how a request is served."""

    def __init__(self, llm: LLM, engine_thread: EngineThread, config: ServerConfig):
        self.llm = llm
        self.tokenizer = llm.tokenizer
        self.engine_thread = engine_thread
        self.config = config
        self.started = int(time.time())
        self.metrics = Metrics(llm.engine.scheduler, config.served_model_name)
        engine_thread.watch(self.metrics)
        self.feed = Feed(llm.engine, model=config.served_model_name)

    def check_model(self, name: str | None) -> None:
        """Raise ApiError unless this is the model's name, or no name at all."""
        if name not in (None, self.config.served_model_name):
            served = f"the model here is {self.config.served_model_name!r}"
            message = f"there is no model {short_repr(name)}: {served}"
            raise ApiError(message, 404, param="model", code="model_not_found")

    def model_card(self) -> dict:
        """The model as /v1/models lists it."""
        return {
            "id": self.config.served_model_name,
            "object": "model",
            "created": self.started,
            "owned_by": "pagedgpt",
            "root": self.llm.model_name,
            "parent": None,
            "max_model_len": self.llm.max_seq_len,
        }

    def encode(self, prompt: str | list[int]) -> list[int]:
        """The ids of a prompt. Raises ValueError for a text that cannot be written in tokens."""
        if isinstance(prompt, list):
            return prompt
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: give the prompt as token ids")
        # No token has more characters than bytes: a text that is much too long is not encoded.
        most = self.llm.max_seq_len * self.longest_token
        if len(prompt) > most:
            found = f"the prompt has {len(prompt)} characters"
            raise ValueError(f"{found}, more than {self.llm.max_seq_len} tokens can hold")
        return self.tokenizer.encode(prompt)

    @cached_property
    def longest_token(self) -> int:
        """The bytes of the longest token."""
        ids = range(self.llm.model.config.vocab_size)
        return max(len(self.tokenizer.token_bytes(i)) for i in ids)

    async def complete(self, body: CompletionRequest | ChatRequest, request: Request) -> Response:
        """Serve a completion or a chat, whole or as a stream."""
        self.check_model(body.model)
        is_stream = bool(body.stream)
        with refusals():
            params = body.params()
            prompts = body.prompts()
            prompt_ids = []
            for prompt in prompts:
                prompt_ids.append(self.encode(prompt))
                self.check_length(prompt_ids[-1], params.max_tokens)
                await asyncio.sleep(0)  # other requests may go on between two prompts
            job = self.engine_thread.submit(
                prompt_ids, params, self.config.timeout_s, is_stream, body.cache_salt
            )
        name = self.config.served_model_name
        answer = Answer(body, name, self.tokenizer, prompts, prompt_ids, texts_of(params))
        end = partial(self.end, job, answer)
        if is_stream:
            stream = EventStream(self.events(job, answer), at_end=end)
            stream.headers["X-Engine-Requests"] = ",".join(job.request_ids)  # for the live page
            return stream
        try:
            outputs = await unless_disconnected(request, job.outputs())
            if isinstance(params, BeamSearchParams):
                outputs = [best_first(output, params) for output in outputs]
            return AsciiJSONResponse(answer.whole(outputs))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        finally:
            end()

    def check_length(self, prompt_ids: list[int], max_tokens: int | None) -> None:
        """Raise ApiError if a prompt and what may follow it are longer than the context."""
        most = self.llm.max_seq_len
        if len(prompt_ids) + (max_tokens or 1) > most:
            found = f"the prompt has {len(prompt_ids)} tokens, max_tokens is {max_tokens}"
            message = f"{found}, and the context has {most}: shorten one of them"
            raise ApiError(message, param="max_tokens", code="context_length_exceeded")

    async def events(self, job: Job, answer: Answer) -> AsyncIterator[str]:
        """The events of a stream, with an error as the last one if it breaks off."""
        try:
            for chunk in answer.openings():
                yield event(chunk)
            async for piece in job.pieces():
                if piece.error is not None:
                    raise ApiError(piece.error, status=500)
                yield event(answer.chunk(piece))
            for chunk in answer.closing(await job.outputs()):
                yield event(chunk)
        except tuple(STATUS_OF) + (ApiError,) as error:
            yield event(to_api_error(error).body)
        yield "data: [DONE]\n\n"

    def end(self, job: Job, answer: Answer) -> None:
        """Close a job, and write its line into the log."""
        outcome = job.outcome
        self.engine_thread.close(job)
        text = f": {answer.prompts!r}" if self.config.log_prompts else ""
        counts = len(answer.prompts), answer.num_prompt_tokens, answer.num_written
        line = "%s: prompts %d, tokens %d + %d, %s%s"
        logger.info(line, answer.head["id"], *counts, outcome, text)


# ---- the routes ----------------------------------------------------------------------------------
router = APIRouter()


def service_of(request: Request) -> Service:
    """The service of the application that a request came to."""
    return request.app.state.service


@router.get("/health")
async def health(request: Request) -> Response:
    """Whether the engine runs: 200, or 503."""
    return Response(status_code=200 if service_of(request).engine_thread.is_alive else 503)


@router.get("/version")
async def version() -> dict:
    """The version of this program."""
    return {"version": VERSION}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """The engine's numbers for Prometheus."""
    text = service_of(request).metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/")
async def live(request: Request) -> Response:
    """The page that shows the pool, live."""
    page, headers = live_page()
    return HTMLResponse(page, headers=headers)


@router.get("/events")
async def events(request: Request) -> Response:
    """What each step does, for the live page."""
    service = service_of(request)
    if len(service.feed.listeners) >= MAX_LISTENERS:
        raise ApiError(f"{MAX_LISTENERS} windows show the live page: close one", status=429)
    listener = service.feed.join(service.config.shows_text)
    closing = service.engine_thread.closing
    return EventStream(listener.events(closing), at_end=listener.leave)


@router.get("/v1/models")
async def models(request: Request) -> dict:
    """The one model that is served."""
    return {"object": "list", "data": [service_of(request).model_card()]}


@router.get("/v1/models/{model_id:path}")
async def model(model_id: str, request: Request) -> dict:
    """The model of this name."""
    service_of(request).check_model(model_id)
    return service_of(request).model_card()


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue one or more prompts."""
    return await service_of(request).complete(body, request)


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Write the next message of a conversation."""
    return await service_of(request).complete(body, request)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict:
    """The token ids of a text."""
    service = service_of(request)
    with refusals():
        ids = service.encode(body.prompt)
    return {"count": len(ids), "max_model_len": service.llm.max_seq_len, "tokens": ids}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids."""
    service = service_of(request)
    vocab_size = service.llm.model.config.vocab_size
    if service.tokenizer is None or not all(0 <= i < vocab_size for i in body.tokens):
        raise ApiError(f"tokens: ids from 0 to {vocab_size - 1} are needed", param="tokens")
    return AsciiJSONResponse({"prompt": service.tokenizer.decode(body.tokens)})


EXPECTED_ERRORS = (ApiError, RequestValidationError, HTTPException, *STATUS_OF)


def guarded(app: FastAPI, config: ServerConfig) -> FastAPI:
    """The same application with the server's limits before it, and all errors in OpenAI's form."""
    for kind in (*EXPECTED_ERRORS, Exception):
        app.add_exception_handler(kind, on_error)
    app.add_middleware(
        Guard,
        host=config.host,
        allowed_hosts=config.allowed_hosts,
        api_key=config.api_key,
        max_body_bytes=config.max_body_bytes,
    )
    return app


def create_app(llm: LLM, config: ServerConfig = ServerConfig()) -> FastAPI:
    """The application. It owns the engine's thread from its start to its end."""
    engine_thread = EngineThread(llm, config.max_waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        engine_thread.start()
        yield
        await engine_thread.stop()

    # The pages that describe the API would load scripts from another server.
    app = FastAPI(
        title="PagedGPT", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.engine_thread = engine_thread
    app.state.service = Service(llm, engine_thread, config)
    app.include_router(router)
    return guarded(app, config)


# ---- the program ---------------------------------------------------------------------------------
class Server(uvicorn.Server):
    """uvicorn's server, which gives what runs `drain_s` seconds after SIGTERM, then ends it."""

    engine_thread: EngineThread
    drain_s: float

    async def shutdown(self, sockets=None) -> None:
        """Stop listening, and wait until all requests have ended."""
        self.engine_thread.closing.set()
        reason = "the server shuts down"
        timer = asyncio.get_running_loop().call_later(
            self.drain_s, self.engine_thread.end_all, reason
        )
        await super().shutdown(sockets)
        timer.cancel()


def build_parser() -> ArgumentParser:
    """The flags of the server, then those of the engine."""
    parser = ArgumentParser(
        prog="serving.server", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    default = ServerConfig()
    flags: dict[str, tuple[type, Any, str]] = {
        "host": (str, default.host, "the address to listen at"),
        "port": (int, default.port, "the port; 0 is any that is free"),
        "served-model-name": (str, None, "the model's name for clients; its last part by default"),
        "api-key": (str, None, "what clients must send; PAGEDGPT_API_KEY by default"),
        "max-waiting": (int, default.max_waiting, "texts that wait at most; more are refused, 429"),
        "max-body-bytes": (int, default.max_body_bytes, "of a request"),
        "timeout": (float, default.timeout_s, "seconds for a request, its waiting included"),
        "drain": (float, default.drain_s, "seconds for what runs when the server is stopped"),
    }
    for name, (kind, value, help) in flags.items():
        shown = "" if value is None else f" (default {value})"
        parser.add_argument(f"--{name}", type=kind, default=value, help=help + shown)
    parser.add_argument("--allowed-host", action="append", default=[], help="one more name for it")
    parser.add_argument("--log-prompts", action="store_true", help="write prompts into the log")
    add_engine_flags(parser)
    return parser


def public_name(model: str) -> str:
    """What clients call a model: a folder by its last part, another one as it is."""
    return Path(model).resolve().name if Path(model).exists() else model


def server_config(args: Namespace) -> ServerConfig:
    """The server's options of the command line."""
    return ServerConfig(
        host=args.host,
        port=args.port,
        api_key=args.api_key or os.environ.get("PAGEDGPT_API_KEY") or None,
        allowed_hosts=tuple(args.allowed_host),
        served_model_name=args.served_model_name or public_name(args.model),
        max_waiting=args.max_waiting,
        max_body_bytes=args.max_body_bytes,
        timeout_s=args.timeout,
        drain_s=args.drain,
        log_prompts=args.log_prompts,
    )


def main(argv: list[str] | None = None) -> None:
    """Read the command line, load the model, and serve until a signal comes."""
    args = build_parser().parse_args(argv)
    try:
        config = server_config(args)
        if follows_rank_0(args):
            return
        llm = build_llm(args)
        # The first request would wait for kernels to be compiled: do that before clients come.
        llm.generate([[0, 0]], SamplingParams(max_tokens=2, ignore_eos=True))
    except (ValueError, OSError) as error:
        raise SystemExit(f"serving.server: {error}") from None
    logging.basicConfig(level=logging.INFO, format="%(levelname)s:     %(message)s")
    if not is_loopback(config.host) and config.api_key is None:
        logger.warning("%s can be reached from outside, and there is no --api-key", config.host)
    app = create_app(llm, config)
    server = Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            http=SlowClientProtocol,
            loop="asyncio",  # whose clock is time.monotonic, as the deadlines are
            ws="none",
            proxy_headers=False,  # who asks is the connection's other end
            server_header=False,
            timeout_graceful_shutdown=int(config.drain_s) + 5,
        )
    )
    server.engine_thread = app.state.engine_thread
    server.drain_s = config.drain_s
    with suppress(KeyboardInterrupt):
        server.run()


if __name__ == "__main__":
    main()
