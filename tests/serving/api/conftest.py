"""The server over the tiny model, in a thread of this process: real sockets, real clients."""

import base64
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from minigpt4.inference.engine import Engine
from minigpt4.serving.address import listen
from minigpt4.serving.api.access import Access, ApiLimits
from minigpt4.serving.api.app import build_app, make_server

PATIENCE = 60


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def text(self) -> str:
        return self.json["choices"][0]["message"]["content"]


@dataclass(frozen=True)
class Server:
    """A server that listens, and plain requests to it."""

    engine: Engine
    port: int
    key: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self) -> openai.OpenAI:
        """The official client, which tries once."""
        return openai.OpenAI(base_url=self.url, api_key=self.key or "none", max_retries=0)

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        key = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} | key | (headers or {}))
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post(self, body: dict[str, Any] | bytes, **headers: str) -> Answer:
        """To the chat completions."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", "/v1/chat/completions", content, headers)

    def chat(self, content: Any = "Hello?", **more: Any) -> Answer:
        """One question, answered greedily in a few words unless told otherwise."""
        return self.post(asked(content, **more))


def asked(content: Any = "Hello?", **more: Any) -> dict[str, Any]:
    """The body of a request."""
    default = {"model": "first", "temperature": 0, "max_tokens": 6}
    return default | {"messages": [{"role": "user", "content": content}]} | more


def picture(content: bytes, kind: str = "png") -> dict[str, Any]:
    """A part with an image as a data URL."""
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def said(text: str) -> dict[str, Any]:
    """A part with text."""
    return {"type": "text", "text": text}


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """The functions above, for test modules, which cannot import this one."""
    return SimpleNamespace(asked=asked, picture=picture, said=said)


@pytest.fixture(scope="session")
def images(parity_dir) -> list[bytes]:
    """Two image files."""
    return [(parity_dir / "images" / name).read_bytes() for name in ("img1_rgba.png", "img3_rgb.png")]


@pytest.fixture(scope="session")
def engine(make_engine) -> Engine:
    return make_engine()


@contextmanager
def listening(engine: Engine, limits: ApiLimits, access: Access) -> Iterator[Server]:
    """A server in a thread until the end of the block."""
    bound = listen("127.0.0.1", 0)
    server = make_server(build_app(engine, limits, access), limits)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Server(engine, bound.getsockname()[1], access.key)
    server.should_exit = True
    thread.join(PATIENCE)
    assert not thread.is_alive(), "the server does not end"


@pytest.fixture(scope="session")
def server(engine) -> Iterator[Server]:
    """A server with the default limits, for tests that leave it as it is."""
    with listening(engine, ApiLimits(), Access()) as running:
        yield running


@pytest.fixture
def serve(engine) -> Iterator[Callable[..., Server]]:
    """`serve(limit=..., access=..., engine=...)`: a server of the test's own."""
    with ExitStack() as servers:

        def start(access: Access | None = None, engine: Engine = engine, **limits: Any) -> Server:
            return servers.enter_context(listening(engine, ApiLimits(**limits), access or Access()))

        yield start
