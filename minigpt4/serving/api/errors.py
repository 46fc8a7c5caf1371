"""Errors as OpenAI's clients know them: a status, and a body `{"error": {...}}`."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from minigpt4.common.errors import ConfigError, MiniGPT4Error, RunError, SampleError
from minigpt4.inference import BusyError
from minigpt4.serving.limits import TooLargeError

log = logging.getLogger(__name__)

RETRY_AFTER = {"Retry-After": "5"}
CLIENT_GONE = 499
"""Nobody gets this status; logs and metrics have it."""
SERVER_FAULT = "the server failed to answer this request; its log says why"
SHUTTING_DOWN = "the server is shutting down"


class ApiError(Exception):
    """A request that is answered with an error.

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


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


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


def install(app: FastAPI) -> None:
    """Every error of the app in this form."""

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
