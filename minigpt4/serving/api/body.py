"""Reading a request's body: so many bytes, so many seconds, and so much of all clients together."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request
from starlette.requests import ClientDisconnect

from minigpt4.serving.api.errors import RETRY_AFTER, ApiError, ClientGoneError
from minigpt4.serving.api.limits import ApiLimits
from minigpt4.serving.limits import MIB


class Held:
    """Bytes that one request holds."""

    def __init__(self, store: "Store") -> None:
        self._store, self.bytes = store, 0

    def take(self, count: int) -> None:
        """So many more; ApiError 503 if the server holds too many already."""
        if self._store.bytes + count > self._store.limit:
            message = "too many large requests at once; try again later"
            raise ApiError(503, message, code="busy", headers=RETRY_AFTER | {"Connection": "close"})
        self._store.bytes += count
        self.bytes += count


class Store:
    """Bytes that all requests hold together; used in the event loop only."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0

    @contextmanager
    def held(self) -> Iterator[Held]:
        """The account of one request, which is given back at the end."""
        held = Held(self)
        try:
            yield held
        finally:
            self.bytes -= held.bytes


async def read_body(request: Request, limits: ApiLimits, held: Held) -> bytearray:
    """The body, looked at while it comes.

    Raises:
        ApiError: 413 too large, 408 too slow, 415 not JSON, 400 no number in Content-Length, 503 no room.
        ClientGoneError: the client left before it had sent everything.
    """
    _check_headers(request, limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limits.body_bytes:
                    raise _too_large(limits)
                held.take(len(chunk))
                body += chunk
    except TimeoutError:
        message = f"the request's body did not come within {limits.body_seconds:g} s"
        raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ClientGoneError from None
    return body


def _check_headers(request: Request, limits: ApiLimits) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page may send other types anywhere without being asked
        raise ApiError(415, "send the header Content-Type: application/json")
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise ApiError(400, "Content-Length is no number", headers={"Connection": "close"})
    if int(length) > limits.body_bytes:
        raise _too_large(limits)


def _too_large(limits: ApiLimits) -> ApiError:
    message = f"the request's body is larger than {limits.body_bytes / MIB:g} MiB; send smaller images"
    return ApiError(413, message, code="too_large")
