"""Who may use the API, what a client may cost, how long it may take, and how it is told what is wrong."""

import asyncio
import dataclasses
import hashlib
import hmac
import ipaddress
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import h11
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from minigpt4.common.errors import ConfigError, MiniGPT4Error, RunError, SampleError, hint
from minigpt4.inference import BusyError
from minigpt4.serving.uploads import MIB, Limits, TooLargeError

log = logging.getLogger(__name__)


RETRY_AFTER = {"Retry-After": "5"}
CLIENT_GONE = 499
"""Nobody gets this status; logs and metrics have it."""
SERVER_FAULT = "the server failed to answer this request; its log says why"
SHUTTING_DOWN = "the server is shutting down"
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is answered with an error: a status, and a body `{"error": {...}}` as OpenAI's clients know it.

    Args:
        status: of HTTP.
        param: the field that is wrong, such as `messages[0].content`.
        code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer that carries it."""
        return JSONResponse(self.body, self.status, headers=self.headers)


class ClientGoneError(Exception):
    """The client closed the connection, so nobody waits for an answer."""


def wrong(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's mistake, status 400."""
    return ApiError(400, message, param=param, code=code)


def unknown_model(name: str, known: list[str]) -> ApiError:
    """404 with the names that there are."""
    message = f"there is no model '{name[:100]}'; there are: {', '.join(known)}"
    return ApiError(404, message, param="model", code="model_not_found")


def as_api_error(error: Exception, param: str | None = None) -> ApiError:
    """Any error with the status that tells whose it is; what nobody foresaw is logged and not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TooLargeError):
        return ApiError(413, str(error), param=param, code="too_large")
    if isinstance(error, TimeoutError):
        return ApiError(504, str(error) or "the answer took too long", code="timeout")
    if isinstance(error, BusyError):
        return ApiError(503, str(error), code="busy", headers=RETRY_AFTER)
    if isinstance(error, RunError):
        return ApiError(503, str(error), headers=RETRY_AFTER)
    if isinstance(error, (SampleError, ConfigError)):
        return wrong(str(error), param)
    log.error("A request failed", exc_info=error)
    return ApiError(500, str(error) if isinstance(error, MiniGPT4Error) else SERVER_FAULT)


def install_error_handlers(app: FastAPI) -> None:
    """Every error of the app in OpenAI's form."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = {404: "there is no such path", 405: "this path does not take that method"}
        refused = ApiError(error.status_code, message.get(error.status_code, str(error.detail)), headers=error.headers)
        return refused.response()

    async def gone(request: Request, error: ClientGoneError) -> JSONResponse:
        return JSONResponse(None, CLIENT_GONE)

    for kind in (ApiError, MiniGPT4Error, TimeoutError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientGoneError, gone)


@dataclass(frozen=True)
class ApiLimits(Limits):
    """What a client may cost; none of the limits can be switched off, only raised."""

    body_bytes: int = 64 * MIB
    """Of one request's body; base64 makes an image a third larger."""
    held_bytes: int = 256 * MIB
    """Of all requests' bodies and fetched images together that are not yet turned into the model's input."""
    conversation_chars: int = 200_000
    """Of all messages of a request together."""
    answers: int = 8
    """`n` of one request."""
    stop_chars: int = 200
    """Of one stop string."""
    header_seconds: float = 20.0
    """For a request's first line and headers to come, and for a connection to begin the next request."""
    body_seconds: float = 60.0
    """For a request's body to come."""
    write_seconds: float = 60.0
    """For a client that does not read to go on reading."""
    fetch_seconds: float = 15.0
    """For one remote image to come, redirects and name lookup included."""
    redirects: int = 3
    """Of one remote image."""
    readers: int = 2
    """Requests whose images are decoded at once, and four times as many remote images that are fetched at once."""
    connections: int = 512
    """Open at once; a request on one more is answered with 503."""
    shutdown_seconds: float = 10.0
    """For running answers to end after a signal."""

    @classmethod
    def changed(cls, values: Sequence[str]) -> Self:
        """The defaults with some changed by texts `name=value`; ConfigError for a wrong name or value."""
        changes = {}
        fields = {field.name: field.type for field in dataclasses.fields(cls)}
        for text in values:
            name, _, value = text.partition("=")
            if name not in fields:
                raise ConfigError(f"--limits: there is no limit '{name}'; {hint(name, fields)}")
            try:
                changes[name] = fields[name](value)
            except ValueError:
                raise ConfigError(f"--limits: {text}: {value!r} is no {fields[name].__name__}") from None
        return cls(**changes)


@dataclass(frozen=True)
class Access:
    """Who may use the server."""

    key: str | None = field(default=None, repr=False)
    """What requests bring as `Authorization: Bearer <key>`; None: all are let in."""
    local_only: bool = True
    """It listens on this machine alone."""

    async def check(self, request: Request) -> None:
        """ApiError 401 without the right key; 403 for a web page that tricks a browser into asking this machine."""
        if self.key is None:
            if self.local_only and not _is_this_machine(request.url.hostname or ""):
                message = "without an API key this server answers to localhost only; set MINIGPT4_API_KEY"
                raise ApiError(403, message, code="unknown_host")
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip()), _digest(self.key)):
            message = "the API key is missing or wrong; send Authorization: Bearer <key>"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _digest(text: str) -> bytes:
    """Of one length, so that a comparison tells nothing about a key's."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _is_this_machine(host: str) -> bool:
    """A name that only this machine can have meant; another one may point here by a trick of its owner."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


class GuardedConnection(H11Protocol):
    """uvicorn's connection with two timers, for what uvicorn waits for without an end.

    One runs while no request is worked on: until the next one's headers are there. The other runs while the client does
    not read what it is sent. Bodies are watched where they are read.
    """

    limits = ApiLimits()
    _idle: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None
    _is_lost = False

    @classmethod
    def within(cls, limits: ApiLimits) -> type["GuardedConnection"]:
        """This class with other limits."""
        return type(cls.__name__, (cls,), {"limits": limits})

    def connection_made(self, transport: asyncio.Transport) -> None:
        """The clock runs from the first moment."""
        super().connection_made(transport)
        self._mind()

    def data_received(self, data: bytes) -> None:
        """It stops when a request is there."""
        super().data_received(data)
        self._mind()

    def on_response_complete(self) -> None:
        """It runs again, also where uvicorn closes the connection but the last bytes are not fetched."""
        super().on_response_complete()  # begins the next request, if the client sent it ahead
        self._mind()

    def send_400_response(self, msg: str) -> None:
        """For bytes that are not HTTP; also where a request is worked on already, which then has no other answer."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # it has begun, or had, its answer
            self.transport.close()

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._stuck = self._stuck or self._abort_after(self.limits.write_seconds)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        self._stuck = _cancelled(self._stuck)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for any more."""
        self._is_lost = True
        self._idle, self._stuck = _cancelled(self._idle), _cancelled(self._stuck)
        super().connection_lost(exc)

    def _mind(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._idle = _cancelled(self._idle)
        elif self._idle is None and not self._is_lost:
            self._idle = self._abort_after(self.limits.header_seconds)

    def _abort_after(self, seconds: float) -> asyncio.TimerHandle:
        return self.loop.call_later(seconds, self.transport.abort)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
