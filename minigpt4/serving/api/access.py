"""Who may use the server."""

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass, field

from fastapi import Request

from minigpt4.serving.api.errors import ApiError


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
