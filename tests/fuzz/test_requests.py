"""Requests that no client should send get a 4xx with the reason over real HTTP, and the server goes on."""

import base64
import http.client
import io
import json
import logging
import random
import re
import socket
import threading
import time

import pytest
import torch
from PIL import Image

from minigpt4.inference.engine import Engine
from minigpt4.processors import Blip2ImageEvalProcessor
from minigpt4.serving.address import listen
from minigpt4.serving.api.access import Access, ApiLimits
from minigpt4.serving.api.app import build_app, make_server

RAW = "raw JSON: "
"""Begins a text that stands for itself, without quotes."""
RAW_TEXTS = [
    *("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" * 5000, "0" * 50, "01", "+1", '"', "'x'", "nul", "."),
    *(r'"\ud800"', r'"\udc00\ud800"', r'"\u0000"', r'"\x"', '"\t"'),
    *("[" * depth + "]" * depth for depth in (3, 150, 1000, 100_000)),
    *('{"a":' * depth + "1" + "}" * depth for depth in (3, 150, 1000, 100_000)),
]
VALUES = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e-320, 1e308, [], {}, "", " ", "\0"),
    *("x" * 30_000, "</s>###", "{}%s{0}", "\u202e", "\N{GRINNING FACE}" * 50, "e\N{COMBINING ACUTE ACCENT}"),
    *("user", "text", "image_url", "first", "none", "data:", "http://[", "http://127.0.0.1/", "file:///etc/passwd"),
    *("data:image/png;base64,", "data:image/png;base64,=", "data:;base64,AA", "data:image/svg+xml;base64,PHN2Zz4="),
    *(RAW + text for text in RAW_TEXTS),
]
FIELDS = [
    *("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p"),
    *("repetition_penalty", "num_beams", "stop", "seed", "n", "logit_bias", "tools", "user", "response_format", "a b"),
    *("", "role", "content", "name", "type", "text", "image_url", "url", "detail", "__class__", "0"),
]
HEADERS = [
    *(("Content-Type", value) for value in ("text/plain", "application/json; charset=\xff", "")),
    *(("Content-Length", value) for value in ("-1", "5, 5", "9" * 5000, "\xb2")),
    *(("Transfer-Encoding", value) for value in ("chunked", "gzip")),
    *(("Host", value) for value in ("a b", "", "[::1", "x" * 3000)),
    *(("Expect", "101"), ("Upgrade", "websocket"), ("Connection", "upgrade, close"), ("X" * 200, "x" * 60_000)),
    *(("Authorization", "Bearer \xff"), ("X-Forwarded-For", "1.1.1.1, \xff"), ("Accept-Encoding", "\xff")),
    ("Origin", "null"),
]
CHAT = "/v1/chat/completions"
PATHS = [f"{CHAT}/", f"{CHAT}?x=%ff", "/v1/models/%ff%00", "/v1/models/../../x", "//", "/%2e%2e/"]
IMAGES = {}
"""A file of each kind that is read."""
for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(buffer := io.BytesIO(), kind)
    IMAGES[kind.lower()] = buffer.getvalue()


@pytest.fixture(scope="module")
def port(shared_model):
    """Of the API over the tiny model, in a thread of this process."""
    threads, limits = torch.get_num_threads(), ApiLimits(shutdown_seconds=0.5, body_seconds=1)
    torch.set_num_threads(1)
    model = shared_model(model_type="pretrain_vicuna0", end_sym="###")
    with (
        Engine(model, Blip2ImageEvalProcessor(image_size=56), None, "first") as engine,
        listen("127.0.0.1", 0) as bound,
    ):
        server = make_server(build_app(engine, limits, Access()), limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield bound.getsockname()[1]
        server.should_exit = True
        thread.join(60)
    torch.set_num_threads(threads)


def send(port, head, body):
    """Status and body of the answer; None where the connection was just closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        try:
            client.sendall(head + b"\r\n\r\n" + body)
            response = http.client.HTTPResponse(client)
            response.begin()
            return response.status, response.read()
        except (ConnectionError, http.client.BadStatusLine):
            return None


def image_part(kind, content):
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def request(rng):
    """A body that is right."""
    parts = [{"type": "text", "text": "What is this?"}]
    if rng.random() < 0.5:
        parts.append(image_part(*rng.choice([*IMAGES.items()])))
    return {"model": "first", "max_tokens": 1, "temperature": 0, "messages": [{"role": "user", "content": parts}]}


def places(node):
    """Every (container, key) of a body."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield node, key
        if isinstance(value, dict | list):
            yield from places(value)


def written(body):
    return re.sub(rf'"{RAW}((?:[^"\\]|\\.)*)"', lambda raw: json.loads(f'"{raw[1]}"'), json.dumps(body))


def with_wrong_values(rng):
    body = request(rng)
    for _ in range(rng.choice([1, 1, 2, 4])):
        container, key = rng.choice(list(places(body)))
        if isinstance(container, list):
            container[key] = rng.choice(VALUES)
        else:
            container[rng.choice([key, key, rng.choice(FIELDS)])] = rng.choice(VALUES)
    return written(body).encode()


def with_a_key_twice(rng):
    key, value = rng.choice(FIELDS), json.dumps(rng.choice([None, 1, "first", [], {}, True]))
    return written(request(rng)).replace("{", f'{{"{key}": {value}, ', rng.choice([1, 3])).encode()


def with_other_bytes(rng):
    body = bytearray(written(request(rng)).encode())
    for _ in range(rng.randint(1, 5)):
        start = rng.randrange(len(body))
        body[start : start + rng.choice([0, 1, 1, 20])] = rng.randbytes(rng.choice([0, 1, 1, 20]))
    return bytes(body)


def with_a_damaged_image(rng):
    kind, content = rng.choice([*IMAGES.items()])
    content = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        content[min(int(rng.expovariate(1 / 60)), len(content) - 1)] = rng.randrange(256)
    if rng.random() < 0.3:
        del content[rng.randrange(len(content)) :]
    parts = [image_part(kind, content), {"type": "text", "text": "What?"}]
    return written(request(rng) | {"messages": [{"role": "user", "content": parts}]}).encode()


MAKE = [with_wrong_values, with_a_key_twice, with_other_bytes, with_a_damaged_image]


def head(rng, body, *, is_strange):
    lines = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(body))}
    lines["Connection"], path, more = "close", CHAT, []
    if is_strange:
        path = rng.choice([path] * 3 + PATHS)
        for name, value in rng.sample(HEADERS, rng.randint(1, 3)):
            if rng.random() < 0.3:
                more.append((name, value))
            else:
                lines[name] = value
    text = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in [*lines.items(), *more])]
    return "\r\n".join(text).encode("latin-1")


def test_every_request_is_answered_or_refused_with_the_reason(port, random_cases, caplog):
    caplog.set_level(logging.WARNING)
    for name, rng in random_cases(400):
        body = rng.choice(MAKE)(rng)
        answer = send(port, head(rng, body, is_strange=rng.random() < 0.2), body)
        if answer is None:
            continue
        status, content = answer
        assert status < 500, (name, status, content[:300])
        if status != 200 and content.startswith(b"{"):
            assert json.loads(content)["error"]["message"], name
        wrong = [record for record in caplog.records if record.exc_info or record.name.startswith("minigpt4")]
        assert not wrong, (name, wrong)
    body = json.dumps(request(random.Random(0))).encode()
    assert send(port, head(random.Random(0), body, is_strange=False), body)[0] == 200
