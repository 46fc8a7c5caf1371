"""The server's paths: chat completions, models, health, metrics."""

import ipaddress
import logging
import os
import socket
import time
from functools import partial
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from minigpt4.common.errors import ConfigError
from minigpt4.conversation.chat import Decoding
from minigpt4.conversation.chat import Request as Asked
from minigpt4.inference import Engine
from minigpt4.serving.api.access import Access, ApiLimits, GuardedConnection, install_error_handlers, unknown_model
from minigpt4.serving.api.answers import (
    Answers,
    Completion,
    EventStream,
    Metrics,
    RequestStats,
    StatsMiddleware,
    while_connected,
)
from minigpt4.serving.api.images import AllowedHosts, RemoteImages, RequestImages
from minigpt4.serving.api.schema import (
    ByteBudget,
    ChatInput,
    ChatRequest,
    Reservation,
    read_body,
    read_conversation,
    read_decoding,
    read_request,
)

log = logging.getLogger(__name__)


GRACE = 5.0
"""Seconds beyond `limits.seconds` after which an engine that does not end an answer is given up."""
SEEDS = 2**63
KEY_VARIABLE = "MINIGPT4_API_KEY"


class Service:
    """Answers chat completions.

    Args:
        engine: answers; its thread runs.
        remote: where images by URL come from.
    """

    def __init__(self, engine: Engine, limits: ApiLimits, remote: RemoteImages) -> None:
        self.engine, self.limits = engine, limits
        self.budget = ByteBudget(limits.held_bytes)
        self.images = RequestImages(engine.look, limits, remote)

    async def chat(self, request: Request) -> Response:
        """The answer to a request, whole or as a stream."""
        stats: RequestStats = request.state.stats
        with self.budget.reserve() as reserved:
            wanted, requests = await self._read(request, reserved)
        stats.model = wanted.model
        answers = Answers(self.engine, requests)
        options = wanted.stream_options
        completion = Completion(wanted.model, answers, bool(options and options.include_usage))
        response = None
        try:
            response = await self._answered(request, completion, stats, bool(wanted.stream))
            return response
        finally:
            if not isinstance(response, EventStream):  # which ends the answers itself
                answers.close()
                stats.count(answers)

    async def _read(self, request: Request, reserved: Reservation) -> tuple[ChatRequest, list[Asked]]:
        """The request without its messages, and what it asks of the engine, one for each answer."""
        body = await read_body(request, self.limits, reserved)
        async with while_connected(request.receive, self.limits.seconds):
            wanted, decoding, chat_input = await self.images.run(partial(self._parse, body))
            pictures = await self.images.read(chat_input.images, reserved)
        asked = partial(
            Asked,
            pictures=pictures,
            decoding=decoding,
            stop=wanted.stop or (),
            checkpoint=wanted.model,
            timeout=self.limits.seconds,
        )
        wanted.messages.clear()  # image files are not kept while the answer is written
        seeds = [None if wanted.seed is None else (wanted.seed + n) % SEEDS for n in range(wanted.n or 1)]
        return wanted, [asked(chat_input.conversation.copy(), seed=seed) for seed in seeds]

    def _parse(self, body: bytearray) -> tuple[ChatRequest, Decoding, ChatInput]:
        """All checks that need no image."""
        wanted = read_request(body)
        if wanted.model not in self.engine.checkpoints:
            raise unknown_model(wanted.model, self.engine.checkpoints)
        decoding = read_decoding(wanted, self.limits)
        return wanted, decoding, read_conversation(wanted, self.engine.new_conversation, self.limits)

    async def _answered(
        self, request: Request, completion: Completion, stats: RequestStats, is_stream: bool
    ) -> Response:
        answers, texts = completion.answers, [""] * len(completion.answers.replies)
        async with while_connected(request.receive, self.limits.seconds + GRACE):
            await answers.begin()  # errors before the first words still have a status of their own
            stats.heard()
            if is_stream:
                return EventStream(completion, stats, self.limits.seconds + GRACE)
            async for index, text in answers:
                texts[index] += text or ""
        return JSONResponse(completion.whole(texts))


def build_app(
    engine: Engine, limits: ApiLimits | None = None, access: Access | None = None, remote: RemoteImages | None = None
) -> FastAPI:
    """The app over an engine whose thread runs."""
    limits, access = limits or ApiLimits(), access or Access()
    service = Service(engine, limits, remote or RemoteImages(AllowedHosts([]), limits))
    metrics, started = Metrics(engine), int(time.time())
    app = FastAPI(title="MiniGPT-4", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(StatsMiddleware, metrics=metrics)
    install_error_handlers(app)
    checked = [Depends(access.check)]

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "minigpt4"}

    @app.post("/v1/chat/completions", dependencies=checked)
    async def chat(request: Request) -> Response:
        return await service.chat(request)

    @app.get("/v1/models", dependencies=checked)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in engine.checkpoints]}

    @app.get("/v1/models/{name:path}", dependencies=checked)
    async def model(name: str) -> dict[str, Any]:
        if name not in engine.checkpoints:
            raise unknown_model(name, engine.checkpoints)
        return described(name)

    @app.get("/healthz")
    async def health() -> Response:
        state = {"waiting": engine.num_waiting, "running": engine.num_running}
        if engine.is_alive:
            return JSONResponse({"status": "ok", **state})
        return JSONResponse({"status": "the engine stopped", **state}, 503)

    @app.get("/metrics", dependencies=checked)
    async def numbers() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


# Listening, and ending well


def api_key() -> str | None:
    """The key of the environment, None where there is none; ConfigError, which does not show it, for a useless one."""
    key = os.environ.get(KEY_VARIABLE)
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{KEY_VARIABLE}: is empty, or holds blanks or signs that no key has; set it again or unset it"
        )
    return key


def bind(host: str, port: int) -> socket.socket:
    """A socket with its address, which does not listen yet; ConfigError if the address is taken or not ours."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With its protocol said, or asyncio leaves Nagle's algorithm on, which holds pieces of a stream back for 40 ms.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}; choose another --port or --host") from error
    return bound


def is_local(bound: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def address_of(bound: socket.socket) -> str:
    """Its URL."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: FastAPI, limits: ApiLimits) -> uvicorn.Server:
    """A server; `run(sockets=[...])` returns when a signal came and the running answers ended, or had their time."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=GuardedConnection.within(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=limits.connections,
            timeout_graceful_shutdown=limits.shutdown_seconds,
        )
    )
