"""Clients that take their time, lie about sizes, or go away."""

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager

import openai
import pytest

from minigpt4.serving import uploads

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LONG = {"max_tokens": 1000, "temperature": 0}
"""To "Hello?" the tiny model answers in 75 tokens: 22 seconds where the engine is slowed."""


@contextmanager
def connected(server):
    """A connection on which a test writes what it likes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        yield client


def answer(client):
    response = http.client.HTTPResponse(client)
    response.begin()
    return response.status, json.loads(response.read())["error"]["message"]


# Sizes


def test_a_body_that_is_said_to_be_too_large_is_refused_before_it_comes(serve):
    with connected(serve(body_bytes=1000)) as client:
        client.sendall(HEAD + b"Content-Length: 1000000000\r\n\r\n")
        status, message = answer(client)
    assert status == 413
    assert "larger than" in message


def test_a_client_that_waits_for_leave_to_send_is_told_no(serve):
    with connected(serve(body_bytes=1000)) as client:
        client.sendall(HEAD + b"Content-Length: 1000000000\r\nExpect: 100-continue\r\n\r\n")
        assert answer(client)[0] == 413


def test_a_body_without_its_length_is_refused(server):
    with connected(server) as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        assert answer(client)[0] == 411


@pytest.mark.parametrize("length", [b"12", b"-5", b"1e3", b"0x10", b"5, 6"])
def test_a_body_that_is_not_as_long_as_said_is_an_error(server, length):
    with connected(server) as client:
        client.sendall(HEAD + b"Content-Length: " + length + b"\r\n\r\n" + json.dumps({"model": "first"}).encode())
        assert client.recv(65536).startswith(b"HTTP/1.1 400")
    assert server.chat().status == 200


def test_too_many_bytes_of_all_clients_together_are_refused_and_given_back(serve, tools):
    server = serve(held_bytes=100_000)
    body = b" " * 50_000
    with connected(server) as slow:
        slow.sendall(HEAD + b"Content-Length: 90000\r\n\r\n")
        tools.wait_until(lambda: server.post(body).status == 503)
        assert int(server.post(body).headers["retry-after"]) > 0
        assert server.chat().status == 200  # and smaller requests are not delayed
    tools.wait_until(lambda: server.post(body).status == 400)


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
    body = json.dumps(tools.asked(**LONG, stream=is_stream, n=2)).encode()
    with engine.slowed():
        with connected(server) as client:
            client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            tools.wait_until(lambda: engine.num_running == 2)
        started = time.monotonic()
        tools.wait_until(lambda: engine.num_running == 0)
        assert time.monotonic() - started < 15


def test_images_of_a_client_that_has_gone_are_not_decoded(serve, tools, images, monkeypatch):
    server = serve()
    begun, go_on, read = [], threading.Event(), uploads.open_image

    def decode(*arguments):
        begun.append(arguments)
        go_on.wait(60)
        return read(*arguments)

    monkeypatch.setattr(uploads, "open_image", decode)
    body = json.dumps(tools.asked([tools.picture(images[0])] * 8)).encode()
    with connected(server) as client:
        client.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        tools.wait_until(lambda: begun)
    time.sleep(0.2)  # for the server to notice
    go_on.set()
    assert server.chat([tools.picture(images[0])]).status == 200
    assert len(begun) == 2


def test_a_client_that_goes_away_while_it_waits_is_forgotten(serve, make_engine, tools):
    body = json.dumps(tools.asked(**LONG)).encode()
    with make_engine(max_rows=1) as engine, engine.slowed():
        server = serve(engine=engine)
        with connected(server) as running:
            running.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            tools.wait_until(lambda: engine.num_running == 1)
            with connected(server) as waiting:
                waiting.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                tools.wait_until(lambda: engine.num_waiting == 1)
        tools.wait_until(lambda: engine.num_running + engine.num_waiting == 0)


def test_the_official_client_may_leave_a_stream(server, engine, tools):
    with engine.slowed():
        stream = server.client().chat.completions.create(**tools.asked(**LONG), stream=True)
        next(iter(stream))
        stream.close()
        started = time.monotonic()
        tools.wait_until(lambda: engine.num_running == 0)
        assert time.monotonic() - started < 15


# Time and room


def test_an_answer_that_takes_too_long_is_an_error(serve, engine, tools):
    server = serve(seconds=0.4)
    with engine.slowed():
        late = server.chat(**LONG)
        assert late.status == 504
        assert "longer than 0.4 s" in late.error["message"]
        tools.wait_until(lambda: engine.num_running == 0)


def test_a_stream_that_takes_too_long_ends_in_an_error(serve, engine, tools):
    client = serve(seconds=1.0).client()
    with engine.slowed(), pytest.raises(openai.APIError, match="longer than 1 s"):
        list(client.chat.completions.create(**tools.asked(**LONG), stream=True))


def test_more_than_may_wait_are_refused_and_the_official_client_comes_again(serve, make_engine, tools):
    with make_engine(max_rows=1, max_waiting=1) as engine:
        server = serve(engine=engine)
        with engine.slowed():
            client = server.client()
            streams = [client.chat.completions.create(**tools.asked(**LONG), stream=True)]
            waiting = threading.Thread(target=lambda: server.chat(max_tokens=2), daemon=True)
            waiting.start()
            tools.wait_until(lambda: engine.num_waiting == 1)
            busy = server.chat()
            assert busy.status == 503
            assert busy.error["code"] == "busy"
            assert int(busy.headers["retry-after"]) > 0
            with pytest.raises(openai.InternalServerError):
                client.chat.completions.create(**tools.asked(n=2))
            streams[0].close()
        waiting.join()
        assert engine.num_waiting == 0
        assert server.chat().status == 200
