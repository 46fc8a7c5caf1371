"""A chat endpoint on 127.0.0.1 that answers by a rule of the test, and fails when it is told to."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer(ThreadingHTTPServer):
    """`answer` gets the parsed request. `steps` are for one request each, then all is well:

    a number: that status; `garbage`: no JSON; `hang`: nothing, until the end of the test; `half`: a body that breaks
    off; `length`: an answer that the limit cut; a dict or list: that as the body. A `rule` gives the step of each
    request instead, and "answer" where all is well.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: Callable[[dict[str, Any]], str | None] = lambda request: "yes"
        self.steps: list[Any] = []
        self.rule: Callable[[dict[str, Any]], Any] | None = None
        self.usage: dict[str, int] | None = None
        self.clock: Callable[[], float] = time.monotonic
        self.times: list[float] = []
        """Of requests, by the clock."""
        self.content_type = "application/json"
        self.headers: dict[str, str] = {}
        self.error: Any = {"message": "so it is"}
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.released = threading.Event()
        # 0.01 s: how often it looks whether to end; half a second would pass at the end of each test
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up early is what some tests are about."""

    def stop(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


def text_of(request: dict[str, Any]) -> str:
    """What the user says in a request."""
    content = request["messages"][-1]["content"]
    return content if isinstance(content, str) else content[0]["text"]


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.requests.append(request)
        server.times.append(server.clock())
        server.keys.append(self.headers.get("Authorization"))
        if self.path != "/v1/chat/completions":
            return self._send(404, {"error": {"message": f"nothing at {self.path}"}})
        step = server.rule(request) if server.rule else server.steps.pop(0) if server.steps else "answer"
        if isinstance(step, int):
            return self._send(step, {"error": server.error})
        if step == "hang":
            server.released.wait(60)
            return None
        if step == "garbage":
            return self._send(200, b"<html>Sign in</html>")
        if step == "half":
            return self._send(200, b'{"choices"', length=1000)
        if step not in ("answer", "length"):
            return self._send(200, step)
        message = {"role": "assistant", "content": server.answer(request)}
        reason = "length" if step == "length" else "stop"
        usage = {"usage": server.usage} if server.usage else {}
        return self._send(200, {"choices": [{"message": message, "finish_reason": reason}], **usage})

    def _send(self, status: int, content: Any, length: int | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", self.server.content_type)
        self.send_header("Content-Length", str(length or len(body)))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        """Say nothing."""
