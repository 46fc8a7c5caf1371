"""Metrics for Prometheus, and one line of the log for a request, without a word of its contents."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4.inference import Engine
from minigpt4.serving.api.answers import Answers
from minigpt4.serving.api.errors import CLIENT_GONE, SERVER_FAULT, SHUTTING_DOWN, ApiError

log = logging.getLogger(__name__)

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
NO_ROUTE = "other"


@dataclass
class Trace:
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
        self._gauge("minigpt4_waiting", "Answers that wait", lambda: engine.num_waiting)
        self._gauge("minigpt4_running", "Answers in the making", lambda: engine.num_running)

    def _gauge(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        Gauge(name, meaning, registry=self.registry).set_function(value)

    def record(self, path: str, trace: Trace, seconds: float) -> None:
        """A request is over."""
        self.requests.labels(path, str(trace.outcome)).inc()
        self.prompt_tokens.inc(trace.prompt_tokens)
        self.completion_tokens.inc(trace.completion_tokens)
        if trace.first_word is not None:
            self.first_word.observe(trace.first_word)
            if trace.outcome == 200:
                self.seconds.observe(seconds)


class Observed:
    """Middleware that gives every request a `Trace` and sees to it that every one ends with an answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trace = Trace()
        scope.setdefault("state", {})["trace"] = trace

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except asyncio.CancelledError:
            await _refuse(ApiError(503, SHUTTING_DOWN), trace, scope, receive, noting)
        except Exception:
            log.exception("A request failed")
            trace.failed = True
            await _refuse(ApiError(500, SERVER_FAULT), trace, scope, receive, noting)
        finally:
            self._record(scope, trace)

    def _record(self, scope: Scope, trace: Trace) -> None:
        seconds = time.monotonic() - trace.started
        route = getattr(scope.get("route"), "path", NO_ROUTE)  # never the path itself, which may hold anything
        self.metrics.record(route, trace, seconds)
        said = ""
        if trace.model is not None:
            said = f" model={trace.model} tokens={trace.prompt_tokens}+{trace.completion_tokens}"
        client = (scope.get("client") or ("-",))[0]
        log.info("%s %s %s %d %.3f s%s", client, scope["method"][:10], route, trace.outcome, seconds, said)


async def _refuse(error: ApiError, trace: Trace, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error, unless an answer has begun."""
    if trace.status is None:
        await error.response()(scope, receive, send)
