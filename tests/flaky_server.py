"""A web server for a folder that fails as networks do: in the order of its plan, over and over."""

import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path
from urllib.parse import unquote, urlsplit

FAULTS = ("503", None, "drop", None, "cut", None, "500", "short", None, "slow", None)
"""Statuses; a connection that ends before or within the answer; fewer bytes of a range than asked; a late answer."""


class FlakyServer:
    """Serves `folder` at `url`; `asked` lists (method, path, fault) of each request, `faults` are those to come."""

    def __init__(self, folder: Path, faults: Sequence[str | None] = FAULTS, ranges: bool = True) -> None:
        self.folder, self.ranges, self.asked = folder, ranges, []
        self.faults, self._lock = cycle(faults), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def next_fault(self, method: str, path: str) -> str | None:
        with self._lock:
            fault = next(self.faults)
            self.asked.append((method, path, fault))
            return fault

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        owner, path = self.server.owner, unquote(urlsplit(self.path).path)
        fault = owner.next_fault(self.command, path)
        if fault == "drop":
            self.close_connection = True
            return
        if fault and fault.isdigit():
            self.send_error(int(fault))
            return
        if fault == "slow":
            time.sleep(0.2)
        file = owner.folder / path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        content, asked = file.read_bytes(), self.headers["Range"]
        start, end = 0, len(content)
        if asked and owner.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(end, int(last) + 1 if last else end)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes" if owner.ranges else "none")
        body = content[start:end]
        if fault == "short" and len(body) < len(content):  # a whole answer would be another file
            body = body[: len(body) // 2]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            cut = fault == "cut"
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass
