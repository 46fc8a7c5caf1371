"""Answers of an engine, read in an event loop while the client is there; what is sent, counted and logged of them."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4.conversation.chat import Request
from minigpt4.inference import Engine
from minigpt4.inference.engine import EngineReply
from minigpt4.serving.api.access import (
    CLIENT_GONE,
    SERVER_FAULT,
    SHUTTING_DOWN,
    ApiError,
    ClientGoneError,
    as_api_error,
)

log = logging.getLogger(__name__)

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
NO_ROUTE = "other"
DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not collect the pieces


class Answers:
    """One request's answers, all asked for at once; iterate over what is said.

    Raises what `Engine.submit` raises; then none is asked for.
    """

    def __init__(self, engine: Engine, requests: Iterable[Request]) -> None:
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._unread: list[tuple[int, str | None]] = []
        self.replies: list[EngineReply] = []
        try:
            for request in requests:
                self.replies.append(engine.submit(request, self._notify))
        except Exception:
            self.close()
            raise

    def _notify(self) -> None:
        """Called in the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed, so nobody reads any more
            self._loop.call_soon_threadsafe(self._news.set)

    async def begin(self) -> None:
        """Wait for the first words; an error of the engine is raised."""
        while not self._unread:
            self._unread = await self._next()

    async def __aiter__(self) -> AsyncIterator[tuple[int, str | None]]:
        """(which answer, its next piece), or (which answer, None) at its end; an error of the engine is raised."""
        open_answers = set(range(len(self.replies)))
        while open_answers:
            news, self._unread = self._unread or await self._next(), []
            for index, text in news:
                if text is None:
                    open_answers.discard(index)
                yield index, text

    async def _next(self) -> list[tuple[int, str | None]]:
        await self._news.wait()
        self._news.clear()
        news = [(index, one) for index, reply in enumerate(self.replies) for one in reply.waiting_news()]
        for _, one in news:
            if isinstance(one, Exception):
                raise one
        return news

    def close(self) -> None:
        """No further words are wanted; the engine has room for others before its next token."""
        for reply in self.replies:
            reply.close()

    @property
    def prompt_tokens(self) -> int:
        """Positions of the prompt, images included."""
        return self.replies[0].prompt_tokens

    @property
    def completion_tokens(self) -> int:
        """Of all answers together."""
        return sum(reply.completion_tokens for reply in self.replies)

    @property
    def dropped_turns(self) -> int:
        """Oldest turns that did not fit into the context."""
        return self.replies[0].dropped_turns


@asynccontextmanager
async def while_connected(receive: Receive, seconds: float | None = None) -> AsyncIterator[None]:
    """What is inside ends when the client goes, with ClientGoneError, or when it takes too long, with TimeoutError.

    The body of the request must have been read.
    """
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        scope.reschedule(0)  # long ago: it is over now

    try:
        async with asyncio.timeout(seconds) as scope:
            watcher = asyncio.create_task(watch())
            try:
                yield
            finally:
                watcher.cancel()
    except TimeoutError:
        if gone:
            raise ClientGoneError from None
        raise


# Metrics for Prometheus, and a line of the log for each request without a word of its contents


@dataclass
class RequestStats:
    """What is known of a request."""

    started: float = field(default_factory=time.monotonic)
    status: int | None = None
    """None until an answer begins."""
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_word: float | None = None
    """Seconds until the first piece of an answer was there."""
    client_is_gone: bool = False
    failed: bool = False
    """The answer broke off after it had begun."""

    def count(self, answers: Answers) -> None:
        """Remember how much was read and said."""
        self.prompt_tokens, self.completion_tokens = answers.prompt_tokens, answers.completion_tokens

    def heard(self) -> None:
        """A piece of an answer is there."""
        if self.first_word is None:
            self.first_word = time.monotonic() - self.started

    @property
    def outcome(self) -> int:
        """The status that tells how it went."""
        if self.client_is_gone:
            return CLIENT_GONE
        return 500 if self.failed or self.status is None else self.status


class Metrics:
    """Numbers since the start of the server."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("minigpt4_requests", "Requests by path and status", ["path", "status"], **own)
        self.prompt_tokens = Counter("minigpt4_prompt_tokens", "Tokens read, those of images included", **own)
        self.completion_tokens = Counter("minigpt4_completion_tokens", "Tokens said", **own)
        self.seconds = Histogram("minigpt4_request_seconds", "Time of answered chats", buckets=SECONDS, **own)
        self.first_word = Histogram(
            "minigpt4_first_token_seconds", "Time to the first words of an answer", buckets=SECONDS, **own
        )
        Gauge("minigpt4_waiting", "Answers that wait", **own).set_function(lambda: engine.num_waiting)
        Gauge("minigpt4_running", "Answers in the making", **own).set_function(lambda: engine.num_running)

    def record(self, path: str, stats: RequestStats, seconds: float) -> None:
        """A request is over."""
        self.requests.labels(path, str(stats.outcome)).inc()
        self.prompt_tokens.inc(stats.prompt_tokens)
        self.completion_tokens.inc(stats.completion_tokens)
        if stats.first_word is not None:
            self.first_word.observe(stats.first_word)
            if stats.outcome == 200:
                self.seconds.observe(seconds)


class StatsMiddleware:
    """Middleware that gives every request a `RequestStats` and sees to it that every one ends with an answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stats = RequestStats()
        scope.setdefault("state", {})["stats"] = stats

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                stats.status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except asyncio.CancelledError:
            await _refuse(ApiError(503, SHUTTING_DOWN), stats, scope, receive, noting)
        except Exception:
            log.exception("A request failed")
            stats.failed = True
            await _refuse(ApiError(500, SERVER_FAULT), stats, scope, receive, noting)
        finally:
            self._record(scope, stats)

    def _record(self, scope: Scope, stats: RequestStats) -> None:
        seconds = time.monotonic() - stats.started
        route = getattr(scope.get("route"), "path", NO_ROUTE)  # never the path itself, which may hold anything
        self.metrics.record(route, stats, seconds)
        said = ""
        if stats.model is not None:
            said = f" model={stats.model} tokens={stats.prompt_tokens}+{stats.completion_tokens}"
        client = (scope.get("client") or ("-",))[0]
        log.info("%s %s %s %d %.3f s%s", client, scope["method"][:10], route, stats.outcome, seconds, said)


async def _refuse(error: ApiError, stats: RequestStats, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error, unless an answer has begun."""
    if stats.status is None:
        await error.response()(scope, receive, send)


# What the server sends: whole completions, and streams of server-sent events


@dataclass(frozen=True)
class Completion:
    """The parts of a reply that do not depend on what is said."""

    model: str
    answers: Answers
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, texts: list[str]) -> dict[str, Any]:
        """The reply to a request that is not streamed."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": self.answers.replies[index].finish_reason,
            }
            for index, text in enumerate(texts)
        ]
        return self._framed("chat.completion", choices) | self._dropped() | {"usage": self.usage()}

    def first(self, index: int) -> bytes:
        """The event that opens an answer."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str | None) -> bytes:
        """The event for a piece of an answer, or for its end."""
        if text is not None:
            return self._chunk(index, {"content": text})
        return self._chunk(index, {}, self.answers.replies[index].finish_reason)

    def last(self) -> bytes:
        """What follows all answers."""
        if not self.include_usage:
            return DONE
        return event(self._framed("chat.completion.chunk", []) | {"usage": self.usage()}) + DONE

    def usage(self) -> dict[str, int]:
        """Tokens; those of images count."""
        prompt, completion = self.answers.prompt_tokens, self.answers.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _chunk(self, index: int, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        content = self._framed("chat.completion.chunk", [choice])
        if self.include_usage:
            content["usage"] = None
        return event(content | (self._dropped() if finish_reason else {}))

    def _framed(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _dropped(self) -> dict[str, int]:
        return {"dropped_turns": self.answers.dropped_turns}


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A stream of answers that ends when the client goes, and leaves no answer in the making behind.

    `seconds` is how long it may take.
    """

    media_type = "text/event-stream"

    def __init__(self, completion: Completion, stats: RequestStats, seconds: float) -> None:
        super().__init__(None, headers=STREAM_HEADERS)
        del self.headers["content-length"]
        self._completion, self._stats, self._seconds = completion, stats, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            last = await self._spoken(receive, send)
            await send({"type": "http.response.body", "body": last})
        except ClientGoneError:
            self._stats.client_is_gone = True
        finally:
            self._completion.answers.close()
            self._stats.count(self._completion.answers)

    async def _spoken(self, receive: Receive, send: Send) -> bytes:
        """Send all but the last events, which are returned: those of an end, or of an error."""
        completion = self._completion
        try:
            async with while_connected(receive, self._seconds):
                for index in range(len(completion.answers.replies)):
                    await _send_on(send, completion.first(index))
                async for index, text in completion.answers:
                    await _send_on(send, completion.piece(index, text))
            return completion.last()
        except ClientGoneError:
            raise
        except asyncio.CancelledError:
            self._stats.failed = True
            return event(ApiError(503, SHUTTING_DOWN).body)
        except Exception as error:  # the status is sent already, so that clients learn it from the event
            self._stats.failed = True
            return event(as_api_error(error).body)


async def _send_on(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
