"""A real browser for pages that people open: Debian's Chromium, driven by playwright."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Watched:
    """A page, and what it did that nobody should miss."""

    page: Any
    """Of playwright's sync API."""

    requests: list[str] = field(default_factory=list)
    """Addresses that it asked for, its own among them; everything but its own file was refused."""

    errors: list[str] = field(default_factory=list)
    """Script errors, and whatever the console calls an error or a warning."""

    def open(self, file: Path) -> "Watched":
        """Open a file by its `file://` address."""
        own = file.resolve().as_uri()
        self.page.route("**/*", lambda route: route.continue_() if route.request.url == own else route.abort())
        self.page.goto(own)
        return self


@pytest.fixture
def watched(browser: Any) -> Iterator[Watched]:
    """A fresh page that notes requests and errors."""
    context = browser.new_context()
    context.set_default_timeout(120_000)
    found = Watched(context.new_page())
    found.page.on("request", lambda request: found.requests.append(request.url))
    found.page.on("pageerror", lambda error: found.errors.append(str(error)))
    found.page.on("console", lambda said: found.errors.append(said.text) if said.type in ("error", "warning") else None)
    yield found
    context.close()
