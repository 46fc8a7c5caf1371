"""Who may use the API, what a request may cost, and errors in OpenAI's form."""

import hmac
import ipaddress
import logging
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from minigpt4.common.errors import ConfigError, MiniGPT4Error, RunError, SampleError
from minigpt4.inference.engine import BusyError
from minigpt4.serving.uploads import MIB, Limits, TooLargeError

log = logging.getLogger(__name__)

KINDS = {401: "authentication_error", 403: "permission_error"}
STATUS = {TooLargeError: 413, TimeoutError: 504, BusyError: 503, RunError: 503, SampleError: 400, ConfigError: 400}
"""Of errors by type; all others are the server's fault."""


class ApiError(Exception):
    """A request that is answered with an error: a status, and a body `{"error": {...}}` as OpenAI's clients know it.

    `param` is the field that is wrong, such as `messages[0].content`, `code` a word for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer that carries it."""
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}.get(self.status)
        return JSONResponse(self.body, self.status, headers=headers)


def wrong(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's mistake, status 400."""
    return ApiError(400, message, param, code)


def gone() -> ApiError:
    """The client closed the connection; nobody gets this status."""
    return ApiError(499, "the client has gone")


def as_api_error(error: Exception, param: str | None = None) -> ApiError:
    """Any error with the status that tells whose it is; unexpected ones are logged and not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    for kind, status in STATUS.items():
        if isinstance(error, kind):
            return ApiError(status, str(error), param, "busy" if kind is BusyError else None)
    log.error("A request failed", exc_info=error)
    shown = str(error) if isinstance(error, MiniGPT4Error) else "the server failed to answer; its log says why"
    return ApiError(500, shown)


def install_error_handlers(app: FastAPI) -> None:
    """Every error of the app in OpenAI's form."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in (ApiError, MiniGPT4Error, TimeoutError, HTTPException):
        app.add_exception_handler(kind, answer)


@dataclass(frozen=True)
class ApiLimits(Limits):
    """What a client may cost; none of the limits can be switched off, only raised."""

    body_bytes: int = 64 * MIB
    """Of one request's body; base64 makes an image a third larger."""
    held_bytes: int = 256 * MIB
    """Of the bodies of all requests that are being read."""
    conversation_chars: int = 200_000
    """Of all messages of a request together."""
    answers: int = 8
    """`n` of one request."""
    stop_chars: int = 200
    """Of one stop string."""
    body_seconds: float = 60.0
    """For a request's body to come."""
    readers: int = 2
    """Requests that are decoded at once."""
    connections: int = 512
    """Open at once; a request on one more is answered with 503."""
    shutdown_seconds: float = 10.0
    """For running answers to end after a signal."""


@dataclass(frozen=True)
class Access:
    """Who may use the server."""

    key: str | None = field(default=None, repr=False)
    """What requests bring as `Authorization: Bearer <key>`; None: all are let in."""
    local_only: bool = True
    """Whether the server listens on localhost only."""

    async def check(self, request: Request) -> None:
        """ApiError 401 without the right key; 403 for a web page that tricks a browser into asking this machine."""
        if self.key is None:
            if self.local_only and not _is_localhost(request.url.hostname or ""):
                message = "without an API key this server answers to localhost only; set MINIGPT4_API_KEY"
                raise ApiError(403, message, code="unknown_host")
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(_bytes(given.strip()), _bytes(self.key)):
            message = "the API key is missing or wrong; send Authorization: Bearer <key>"
            raise ApiError(401, message, code="invalid_api_key")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _is_localhost(host: str) -> bool:
    """Whether a Host header names this machine; any other name may point here by DNS rebinding."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")
