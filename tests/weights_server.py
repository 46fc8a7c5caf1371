"""A web server on 127.0.0.1 that can do what the servers of weights do, their faults included."""

import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


@dataclass
class Page:
    """What lies at a path, and how the next requests for it go wrong."""

    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    """Whether a Range request is honoured."""
    steps: list[str] = field(default_factory=list)
    """For one request each: `drop` (half, then close), `stall` (half, then nothing), `503`; then `send`."""
    query: dict[str, str] | None = None
    """What the query must hold; else `page` is sent as HTML, as Google Drive does before a large file."""
    page: bytes = b""


class WeightsServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages: dict[str, Page] = {}
        self.log: list[tuple[str, str | None]] = []
        self.stalled = threading.Event()
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def put(self, path: str, body: bytes = b"", **how) -> str:
        """Serve `body` at `path`; returns its URL."""
        self.pages[path] = Page(body, **how)
        return self.url(path)

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def ranges(self, path: str) -> list[str | None]:
        """The Range header of each request for `path`, in order."""
        return [asked for where, asked in self.log if where == path]

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up early is what some tests are about."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: WeightsServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        where = urlsplit(self.path)
        self.server.log.append((where.path, self.headers.get("Range")))
        page = self.server.pages.get(where.path)
        if page is None:
            return self.send_error(404)
        given = {key: values[0] for key, values in parse_qs(where.query).items()}
        if page.query is not None and not page.query.items() <= given.items():
            return self.answer(200, page.page, {"Content-Type": "text/html; charset=utf-8"})
        step = page.steps.pop(0) if page.steps else "send"
        if step.isdigit():
            return self.answer(int(step), b"{}", {"Retry-After": "0", **page.headers})
        if "Location" in page.headers:
            return self.answer(302, b"", page.headers)
        return self.send_body(page, step)

    def send_body(self, page: Page, step: str) -> None:
        start, size = self.start_of(page), len(page.body)
        if start >= size > 0:
            return self.answer(416, b"", {"Content-Range": f"bytes */{size}"})
        headers = dict(page.headers)
        if start or self.headers.get("Range") and page.ranges and self.fits(page):
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            return self.answer(206, page.body[start:], headers, step)
        return self.answer(200, page.body, headers, step)

    def start_of(self, page: Page) -> int:
        asked = self.headers.get("Range")
        if not asked or not page.ranges or not self.fits(page):
            return 0
        return int(asked.removeprefix("bytes=").partition("-")[0])

    def fits(self, page: Page) -> bool:
        return self.headers.get("If-Range") in (None, page.headers.get("ETag"))

    def answer(self, status: int, body: bytes, headers: dict[str, str], step: str = "send") -> None:
        self.send_response(status)
        if headers.get("Content-Length") != "unknown":
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            if name != "Content-Length":
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if step == "send" else body[: len(body) // 2])
        if step == "stall":
            self.server.stalled.set()
            self.server.released.wait(60)

    def log_message(self, *args) -> None:
        """Say nothing; `log` has it."""
