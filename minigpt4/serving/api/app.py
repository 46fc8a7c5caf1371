"""The server's paths: chat completions, models, health."""

import asyncio
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.conversation.chat import Picture
from minigpt4.conversation.chat import Request as EngineRequest
from minigpt4.inference.engine import Engine, EngineReply
from minigpt4.serving.api.access import Access, ApiError, ApiLimits, as_api_error, gone, install_error_handlers
from minigpt4.serving.api.schema import ChatRequest, decoded, read_request
from minigpt4.serving.uploads import MIB, read_image

log = logging.getLogger(__name__)
T = TypeVar("T")

SEEDS = 2**63
KEY_VARIABLE = "MINIGPT4_API_KEY"
DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not collect the pieces
GRACE = 5.0
"""Seconds from the end of the answers to that of the connections."""


class Service:
    """Answers chat completions with an engine whose thread runs."""

    def __init__(self, engine: Engine, limits: ApiLimits) -> None:
        self.engine, self.limits, self.held = engine, limits, 0
        self.readers = ThreadPoolExecutor(limits.readers, thread_name_prefix="reader")

    async def chat(self, request: Request) -> Response:
        """The answer to a request, whole or as a stream."""
        size = self._size(request)
        self.held += size
        try:
            wanted, requests = await unless_gone(request, self._read(await self._body(request)))
        finally:
            self.held -= size
        replies: list[EngineReply] = []
        end = partial(_end, request.client, wanted.model, replies, time.monotonic())
        response = None
        try:
            for one in requests:
                replies.append(self.engine.submit(one))
            response = await unless_gone(request, self._answer(wanted, replies, end))
            return response
        finally:
            if not isinstance(response, StreamingResponse):
                end()

    def _size(self, request: Request) -> int:
        """Bytes of the body; ApiError unless there is room for it."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a web page may send other types anywhere without being asked
            raise ApiError(415, "send the header Content-Type: application/json")
        if "content-length" not in request.headers:
            raise ApiError(411, "send the header Content-Length")
        size, most = int(request.headers["content-length"]), self.limits.body_bytes
        if size > most:
            raise ApiError(413, f"the request's body is larger than {most / MIB:g} MiB; send smaller images")
        if self.held + size > self.limits.held_bytes:
            raise ApiError(503, "too many large requests at once; try again later", code="busy")
        return size

    async def _body(self, request: Request) -> bytes:
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                return b"".join([chunk async for chunk in request.stream()])
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self.limits.body_seconds:g} s") from None
        except ClientDisconnect:
            raise gone() from None

    async def _read(self, body: bytes) -> tuple[ChatRequest, list[EngineRequest]]:
        """The request without its messages, and what it asks of the engine, one for each answer."""
        wanted = await self._in_thread(partial(read_request, body, self.limits))
        _require_model(self.engine, wanted.model)
        conversation = wanted.conversation(self.engine.new_conversation)
        pictures = [await self._in_thread(partial(self._picture, *image)) for image in wanted.images()]
        wanted.messages.clear()
        seeds = [None if wanted.seed is None else (wanted.seed + n) % SEEDS for n in range(wanted.n)]
        decoding = wanted.decoding(self.limits)
        asked = partial(EngineRequest, conversation, pictures, decoding, wanted.stop, wanted.model)
        return wanted, [asked(seed, self.limits.seconds) for seed in seeds]

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.readers, work)

    def _picture(self, field: str, url: str) -> Picture:
        try:
            return self.engine.preprocess(read_image(decoded(url, self.limits), self.limits))
        except (SampleError, ApiError) as error:
            told = as_api_error(error)
            raise ApiError(told.status, f"{field}: {told.message}", field) from None

    async def _answer(self, wanted: ChatRequest, replies: list[EngineReply], end: Callable[[], None]) -> Response:
        pieces = [aiter(reply) for reply in replies]
        first = await anext(pieces[0], "")  # errors before the first words still have a status of their own
        frame = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": wanted.model}
        if wanted.stream:
            events = _events(frame, replies, pieces, first, wanted.stream_options.include_usage)
            ends = BackgroundTask(end)
            return StreamingResponse(events, headers=STREAM_HEADERS, media_type="text/event-stream", background=ends)
        texts = ["".join([piece async for piece in one]) for one in pieces]
        texts[0] = first + texts[0]
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": replies[index].finish_reason,
            }
            for index, text in enumerate(texts)
        ]
        return JSONResponse(
            {**frame, "object": "chat.completion", "choices": choices, **_dropped(replies), "usage": _usage(replies)}
        )


async def _events(
    frame: dict[str, Any], replies: list[EngineReply], pieces: list[AsyncIterator[str]], first: str, counts: bool
) -> AsyncIterator[bytes]:
    """A stream: the answers one after the other, though all are written at once."""

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        content = {**frame, "object": "chat.completion.chunk", "choices": choices, **more}
        return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

    def chunk(index: int, delta: dict[str, str], reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event([choice], **({"usage": None} if counts else {}), **(_dropped(replies) if reason else {}))

    try:
        for index, reply in enumerate(replies):
            yield chunk(index, {"role": "assistant", "content": "" if index else first})
            async for piece in pieces[index]:
                yield chunk(index, {"content": piece})
            yield chunk(index, {}, reply.finish_reason)
        if counts:
            yield event([], usage=_usage(replies))
        yield DONE
    except Exception as error:  # the status is sent already, so that clients learn it from the event
        yield b"data: " + json.dumps(as_api_error(error).body).encode() + b"\n\n"


def _usage(replies: Sequence[EngineReply]) -> dict[str, int]:
    """Tokens; those of images count."""
    prompt, completion = replies[0].prompt_tokens, sum(reply.completion_tokens for reply in replies)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _dropped(replies: Sequence[EngineReply]) -> dict[str, int]:
    return {"dropped_turns": replies[0].dropped_turns}


def _end(client: Any, model: str, replies: Sequence[EngineReply], started: float) -> None:
    """Free the engine's places, and log the request without its content."""
    for reply in replies:
        reply.close()
    if replies:
        tokens = "{prompt_tokens}+{completion_tokens}".format(**_usage(replies))
        reasons = ",".join(str(reply.finish_reason) for reply in replies)
        seconds = time.monotonic() - started
        log.info("%s model=%s tokens=%s %.3f s %s", client and client.host, model, tokens, seconds, reasons)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which ends when the client leaves; the body was read before."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise gone()
        return task.result()
    except asyncio.CancelledError:
        raise ApiError(503, "the server is shutting down") from None
    finally:
        task.cancel()
        left.cancel()


def _require_model(engine: Engine, name: str) -> None:
    if name not in engine.checkpoints:
        message = f"there is no model '{name[:100]}'; there are: {', '.join(engine.checkpoints)}"
        raise ApiError(404, message, "model", "model_not_found")


def build_app(engine: Engine, limits: ApiLimits, access: Access) -> FastAPI:
    """The app over an engine whose thread runs."""
    service, checked, started = Service(engine, limits), [Depends(access.check)], int(time.time())
    app = FastAPI(title="MiniGPT-4", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.engine = engine
    install_error_handlers(app)

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
        _require_model(engine, name)
        return described(name)

    @app.get("/healthz")
    async def health() -> Response:
        state = {"waiting": engine.num_waiting, "running": engine.num_running}
        if engine.is_alive:
            return JSONResponse({"status": "ok", **state})
        return JSONResponse({"status": "the engine stopped", **state}, 503)

    return app


# Listening, and ending well


def api_key() -> str | None:
    """The key of the environment, None where there is none; ConfigError, which does not show it, for a useless one."""
    key = os.environ.get(KEY_VARIABLE)
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise ConfigError(f"{KEY_VARIABLE}: is empty, or has characters that no key has; set it again or unset it")
    return key


class Server(uvicorn.Server):
    """Gives running answers `shutdown_seconds` after a signal; then they end with an error."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, with an engine that stops."""
        stop = threading.Thread(target=self.config.app.state.engine.stop, daemon=True).start
        timer = asyncio.get_running_loop().call_later(self.config.timeout_graceful_shutdown - GRACE, stop)
        await super().shutdown(sockets)
        timer.cancel()


def make_server(app: FastAPI, limits: ApiLimits) -> Server:
    """A server; `run(sockets=[...])` returns when a signal came and the running answers ended, or had their time."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    return Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=limits.connections,
            timeout_graceful_shutdown=limits.shutdown_seconds + GRACE,
        )
    )
