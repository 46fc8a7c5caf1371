"""Requests to an OpenAI-compatible endpoint: retries, time limits, and errors that never show the key."""

import email.utils
import http.client
import json
import logging
import os
import random
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minigpt4.common.errors import ConfigError, RunError

log = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
LATER = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""Statuses of servers that may answer the same question a little later."""
LONGEST_WAIT = 120
"""Seconds."""
SHOWN = 300
"""Characters of what a server says."""


@dataclass(frozen=True)
class JudgeEndpoint:
    """Where the judge is, and how it is asked.

    `url` is that of a server (`http://localhost:8000`), of its API (`https://api.openai.com/v1`) or of
    `.../chat/completions` itself. ConfigError for a URL that is none, or one that holds a password or a query.
    """

    url: str
    model: str
    key_variable: str = KEY_VARIABLE
    """Environment variable with the key; where it is not set, requests go without one, as local servers want it."""

    timeout: float = 120.0
    """Seconds for one answer."""

    attempts: int = 6
    max_tokens: int = 1024
    """Of one answer."""

    temperature: float = 0.0
    first_wait: float = 1.0
    """Seconds before the second attempt; doubled before each later one, where the server names no time."""

    def __post_init__(self) -> None:
        if "@" in self.url or "?" in self.url:
            raise ConfigError("--judge-url: give the key in the environment, not in the URL; see --judge-key-variable")
        if not _is_url(self.url):
            raise ConfigError(f"--judge-url: {self.url!r} is no URL such as http://localhost:8000/v1")
        if not self.model:
            raise ConfigError("--judge-model: name the model that the endpoint is to answer with")
        if self.attempts < 1 or self.max_tokens < 1 or self.timeout <= 0 or self.first_wait < 0:
            raise ConfigError("the judge needs attempts and tokens of at least 1, and times above 0")

    @property
    def address(self) -> str:
        """The URL of requests."""
        url = self.url.rstrip("/")
        if url.endswith("/chat/completions"):
            return url
        return f"{url}/chat/completions" if urllib.parse.urlsplit(url).path else f"{url}/v1/chat/completions"

    def key(self) -> str | None:
        """The key, or None; ConfigError, which does not show it, for one that cannot be sent."""
        key = os.environ.get(self.key_variable, "").strip()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"{self.key_variable}: holds spaces or signs that no key has; set it again")
        return key or None


class _Later(Exception):
    """An attempt failed in a way that may pass; `wait` are the seconds that the server asked for."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class Refused(Exception):
    """Status 400: the server dislikes the request. `field` is the one that it names, if any."""

    def __init__(self, field: str | None, text: str) -> None:
        super().__init__(text)
        self.field = field


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class JudgeServer:
    """Sends requests to one endpoint; any number of threads may do so at once."""

    def __init__(self, endpoint: JudgeEndpoint) -> None:
        self.endpoint = endpoint
        self._key = endpoint.key()
        host = urllib.parse.urlsplit(endpoint.url).hostname
        direct = [urllib.request.ProxyHandler({})] if host in LOOPBACK else []
        self._opener = urllib.request.build_opener(_NoRedirects, *direct)
        self._stopped = threading.Event()

    def start(self) -> None:
        """Ask again after failures, from now on."""
        self._stopped.clear()

    def stop(self) -> None:
        """Let the threads that wait for another attempt give up."""
        self._stopped.set()

    def post(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of the endpoint as JSON.

        Raises:
            RunError: there is no answer, or none that can be used; the text names endpoint and way out.
            Refused: status 400.
        """
        body = json.dumps(payload).encode()
        for attempt in range(self.endpoint.attempts):
            try:
                return self._parse(self._send(body))
            except _Later as error:
                last = error
            if attempt + 1 < self.endpoint.attempts:
                self._wait(attempt, last)
        raise self._error(f"{last}, in each of {self.endpoint.attempts} attempts; what was answered before is kept")

    def _wait(self, attempt: int, error: _Later) -> None:
        seconds = self.endpoint.first_wait * 2**attempt * random.uniform(0.75, 1.25)
        seconds = min(LONGEST_WAIT, seconds if error.wait is None else error.wait)
        log.warning("%s: %s; asking again in %.1f s", self.endpoint.address, error, seconds)
        if self._stopped.wait(seconds):
            raise self._error("stopped")

    def _send(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "minigpt4"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.endpoint.address, body, headers, method="POST")
        end = time.monotonic() + self.endpoint.timeout
        try:
            with self._opener.open(request, timeout=self.endpoint.timeout) as response:
                return _read(response, end)
        except urllib.error.HTTPError as error:
            raise self._of_status(error) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._of_connection(error) from error

    def _of_status(self, error: urllib.error.HTTPError) -> Exception:
        said, field, code = self._said(error)
        if code == "insufficient_quota":
            return self._error(f"the account's quota is used up ({said})")
        if error.code in LATER:
            return _Later(f"status {error.code} ({said})", _retry_after(error.headers.get("Retry-After")))
        if error.code == 400:
            return Refused(field, said)
        if error.code in (401, 403):
            state = "is not accepted" if self._key else "is not set"
            return self._error(f"status {error.code} ({said}); the key in {self.endpoint.key_variable} {state}")
        if error.code == 404:
            return self._error(
                f"status 404 ({said}); check --judge-url, which most often ends in /v1, and whether the server has the "
                f"model {self.endpoint.model!r}"
            )
        if 300 <= error.code < 400:
            return self._error(f"sends requests on to {error.headers.get('Location')}; give that as --judge-url")
        return self._error(f"status {error.code} ({said})")

    def _of_connection(self, error: Exception) -> Exception:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            return _Later(f"no answer within {self.endpoint.timeout:g} s (--judge-timeout)")
        if isinstance(cause, socket.gaierror):
            return self._error(f"its host is not known ({cause.strerror}); check --judge-url")
        return _Later(f"no connection, or one that broke ({cause!r:.{SHOWN}})")

    def _said(self, error: urllib.error.HTTPError) -> tuple[str, str | None, str | None]:
        """What the server says, the field that it complains of, and its code for that."""
        try:
            text = error.read(100_000).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            text = ""
        try:
            detail = json.loads(text)
        except ValueError:
            detail = None
        detail = detail.get("error") if isinstance(detail, dict) else None
        if not isinstance(detail, dict):
            detail = {"message": detail or text or error.reason}
        said = " ".join(str(detail.get("message")).split())
        said = said.replace(self._key, "***") if self._key else said
        return said[:SHOWN], detail.get("param"), detail.get("code")

    def _parse(self, body: bytes) -> dict[str, Any]:
        try:
            content = json.loads(body)
        except ValueError as error:
            start = body[:80].decode(errors="replace")
            raise self._error(f"its answer is not JSON but {start!r}; check --judge-url") from error
        if not isinstance(content, dict):
            raise self._error(f"its answer is not an object but {content!r:.80}; check --judge-url")
        return content

    def _error(self, what: str) -> RunError:
        return RunError(f"judge {self.endpoint.address}: {what}")


def _is_url(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in text
    except ValueError:  # of a port that is no number, for instance
        return False


def _read(response: http.client.HTTPResponse, end: float) -> bytes:
    """The whole body; TimeoutError if it is not there at `end`, however the server drips."""
    parts = []
    while part := response.read1(1 << 16):
        parts.append(part)
        if time.monotonic() > end:
            raise TimeoutError
    if response.length:  # read1 does not mind a body that ends too early
        raise http.client.IncompleteRead(b"".join(parts), response.length)
    return b"".join(parts)


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
