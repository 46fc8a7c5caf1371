"""What asking an endpoint may cost, and did: requests and tokens a minute, money, faults by name."""

import logging
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError, RunError
from minigpt4.common.schemas import EndpointConfig
from minigpt4.common.utils import JsonLines, require_packages

MINUTE = 60_000
"""Milliseconds."""
CHARACTERS_PER_TOKEN = 4
"""Of English; nobody knows the tokenizer of an endpoint."""
TIME_OUT, NO_CONNECTION, BROKEN_CONNECTION = "time-out", "no connection", "broken connection"


def estimated_tokens(text: str) -> int:
    """Tokens that a text may have, at least."""
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


class Account:
    """Counts every request, and holds back those that a limit of the endpoint forbids. For any number of threads.

    `ledger`: a JSON line for each request, so that those of killed runs count, too; None: this run's alone.
    """

    def __init__(self, endpoint: EndpointConfig, ledger: Path | None = None) -> None:
        self.endpoint, self._lock, self._own = endpoint, threading.Lock(), threading.local()
        self._ledger, self._reserved = JsonLines(ledger) if ledger else None, 0.0
        self._sums: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        """By name: of requests, and of answers that were refused."""
        for line in self._ledger.read() if self._ledger else ():
            self._count(line)
        self._limiters = _limiters(endpoint)
        if endpoint.cost_limit and None in (endpoint.price_in, endpoint.price_out):
            raise ConfigError("cost_limit: needs price_in and price_out, each for a million tokens")

    def totals(self) -> dict[str, Any]:
        """Requests, those that were repeats, tokens, faults by name, and the price, None without prices."""
        own = {name: self._sums[name] for name in ("requests", "retries", "tokens_in", "tokens_out")}
        return own | {"faults": dict(sorted(self.faults.items())), "price": self.price()}

    def price(self, tokens_in: int | None = None, tokens_out: int = 0) -> float | None:
        """Of so many tokens, or of all so far."""
        if None in (self.endpoint.price_in, self.endpoint.price_out):
            return None
        if tokens_in is None:
            tokens_in, tokens_out = self._sums["tokens_in"], self._sums["tokens_out"]
        return (tokens_in * self.endpoint.price_in + tokens_out * self.endpoint.price_out) / 1e6

    @contextmanager
    def asking(self, tokens_in: int, tokens_out: int) -> Iterator[None]:
        """For the length of a request and its repeats, of about so many tokens; RunError if they may cost too much."""
        most = self.price(tokens_in, tokens_out) or 0.0
        with self._lock:
            limit = self.endpoint.cost_limit
            if limit and (spent := self.price() + self._reserved) + most > limit:
                text = f"the next request may cost {most:.6f}, after {spent:.6f}; what was answered is kept"
                raise RunError(f"cost_limit: {limit:g} would be exceeded: {text}; raise it to go on")
            self._reserved += most
        self._own.tokens, self._own.sent = tokens_in + tokens_out, 0
        try:
            yield
        finally:
            with self._lock:
                self._reserved -= most

    def sending(self) -> None:
        """Wait until a request of this thread may go out, and count it."""
        for limiter, weight in self._limiters:
            limiter.try_acquire("endpoint", weight=min(weight or self._own.tokens, limiter.buckets()[0].rates[0].limit))
        self.note(requests=1, retries=int(self._own.sent > 0))
        self._own.sent += 1

    def note(self, fault: str = "", **counts: int) -> None:
        """Count, and write down: `requests`, `retries`, `tokens_in`, `tokens_out`, and a fault by its name."""
        line = {"fault": fault, **counts} if fault else counts
        with self._lock:
            self._count(line)
            if self._ledger:
                self._ledger.append(line)

    def _count(self, line: Any) -> None:
        self._sums.update({name: value for name, value in line.items() if isinstance(value, int)})
        if line.get("fault"):
            self.faults[line["fault"]] += 1


def _limiters(endpoint: EndpointConfig) -> list[tuple[Any, int]]:
    """Limiters of pyrate-limiter, and what a request weighs in each; 0: its tokens."""
    if not (endpoint.requests_per_minute or endpoint.tokens_per_minute):
        return []
    require_packages("requests_per_minute", "curation", "pyrate_limiter")
    from pyrate_limiter import Limiter, Rate

    logging.getLogger("pyrate_limiter").setLevel(logging.WARNING)
    found = []
    if endpoint.requests_per_minute:
        interval = math.ceil(MINUTE / endpoint.requests_per_minute)
        found.append((Limiter(Rate(1, interval), buffer_ms=1), 1))
    if endpoint.tokens_per_minute:
        found.append((Limiter(Rate(endpoint.tokens_per_minute, MINUTE), buffer_ms=1), 0))
    return found


def counted_client(account: Account, **options: Any) -> Any:
    """The HTTP client of `openai`, whose every request, a repeat, too, waits for the limits and is counted."""
    import openai

    class Client(openai.DefaultHttpxClient):
        def send(self, *args: Any, **kwargs: Any) -> Any:
            account.sending()
            try:
                response = super().send(*args, **kwargs)
            except Exception as error:
                account.note(fault_of(error))
                raise
            if response.status_code >= 300:
                account.note(f"status {response.status_code}")
            return response

    return Client(**options)


def fault_of(error: BaseException | None) -> str:
    """The name of what kept an answer from arriving; there are several generations of httpx."""
    name = type(error).__name__
    return TIME_OUT if "Timeout" in name else NO_CONNECTION if name == "ConnectError" else BROKEN_CONNECTION


def refused_parameter(error: Any) -> str | None:
    """The parameter that an `openai.APIStatusError` is about; gateways quote a refusal without its field `param`."""
    quoted = re.search(r"""['"`](max_tokens|temperature)['"`]""", str(error.message))
    return error.param or (quoted and quoted[1])
