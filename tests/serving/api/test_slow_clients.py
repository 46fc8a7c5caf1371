"""Clients that take their time, lie about sizes, or go away."""

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager

import openai
import pytest

from minigpt4 import processors

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LONG = {"max_tokens": 1000, "temperature": 0}
"""To "Hello?" the tiny model answers in 75 tokens."""
FEW = 20
"""Tokens that are enough for the first piece of a stream."""


@contextmanager
def connected(server):
    """A connection on which a test writes what it likes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        yield client


def send(client, body):
    """A whole request."""
    content = json.dumps(body).encode()
    client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content)


def answer(client):
    response = http.client.HTTPResponse(client)
    response.begin()
    return response.status, json.loads(response.read())["error"]["message"]


# Sizes


@pytest.mark.parametrize(
    ("head", "status", "reason"),
    [
        (b"Content-Length: 1000000000", 413, "larger than"),
        (b"Content-Length: 1000000000\r\nExpect: 100-continue", 413, "larger than"),
        (b"Transfer-Encoding: chunked", 411, "Content-Length"),
    ],
)
def test_a_body_too_large_or_of_no_length_is_refused_before_it_comes(server, head, status, reason):
    with connected(server) as client:
        client.sendall(HEAD + head + b"\r\n\r\n")
        found, message = answer(client)
    assert found == status
    assert reason in message


def test_a_body_that_is_not_as_long_as_said_is_an_error(server):
    for length in (b"12", b"-5", b"5, 6"):
        with connected(server) as client:
            client.sendall(HEAD + b"Content-Length: " + length + b"\r\n\r\n" + b'{"model": "first"}')
            assert client.recv(65536).startswith(b"HTTP/1.1 400")
    assert server.chat().status == 200


def test_too_many_bytes_of_all_clients_together_are_refused_and_given_back(serve, wait_until):
    server = serve(held_bytes=100_000)
    body = b" " * 50_000
    with connected(server) as slow:
        slow.sendall(HEAD + b"Content-Length: 90000\r\n\r\n")
        wait_until(lambda: server.post(body).status == 503)
        assert int(server.post(body).headers["retry-after"]) > 0
        assert server.chat().status == 200  # and smaller requests are not delayed
    wait_until(lambda: server.post(body).status == 400)


def test_a_client_that_never_ends_its_body_is_told_and_holds_no_place(serve, engine):
    with connected(serve(body_seconds=0.4)) as client:
        client.sendall(HEAD + b"Content-Length: 100000\r\n\r\n ")
        assert engine.num_waiting + engine.num_running == 0
        status, message = answer(client)
    assert status == 408
    assert "did not come within 0.4 s" in message


# Going away


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(server, engine, tools, is_stream):
    with engine.held(FEW if is_stream else 0):
        with connected(server) as client:
            send(client, tools.asked(**LONG, stream=is_stream, n=2))
            engine.wait_for(running=2)
            assert not is_stream or client.recv(4096).startswith(b"HTTP/1.1 200")
        engine.wait_for(running=0)


def test_images_of_a_client_that_has_gone_are_not_decoded(serve, tools, wait_until, images, monkeypatch):
    server = serve()
    begun, go_on, read = [], threading.Event(), processors.open_image

    def decode(*arguments):
        begun.append(arguments)
        go_on.wait(60)
        return read(*arguments)

    monkeypatch.setattr(processors, "open_image", decode)
    with connected(server) as client:
        send(client, tools.asked([tools.picture(images[0])] * 8))
        wait_until(lambda: begun)
    time.sleep(0.2)  # for the server to notice
    go_on.set()
    assert server.chat([tools.picture(images[0])]).status == 200
    assert len(begun) == 2


# Time and room


def test_an_answer_that_takes_too_long_is_an_error(serve, engine, tools):
    server = serve(seconds=1.0)
    with engine.held():
        late = server.chat(**LONG)
        assert late.status == 504
        assert "longer than 1 s" in late.error["message"]
    with engine.held(FEW), pytest.raises(openai.APIError, match="longer than 1 s"):
        list(server.client().chat.completions.create(**tools.asked(**LONG), stream=True))
    engine.wait_for(running=0)


def test_more_than_may_wait_are_refused(serve, make_engine, tools):
    server = serve(engine=make_engine(max_rows=1, max_waiting=1))
    client, engine = server.client(), server.engine
    with engine.held(FEW):
        stream = client.chat.completions.create(**tools.asked(**LONG), stream=True)
        waiting = threading.Thread(target=lambda: server.chat(max_tokens=2), daemon=True)
        waiting.start()
        engine.wait_for(running=1, waiting=1)
        busy = server.chat()
        assert (busy.status, busy.error["code"]) == (503, "busy")
        assert int(busy.headers["retry-after"]) > 0
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(**tools.asked(n=2))
        stream.close()
    waiting.join()
    engine.wait_for(running=0)
    assert server.chat().status == 200
