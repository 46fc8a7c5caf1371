"""Wrong requests get the right status, a message that names the field, and do no harm."""

import base64
import gc
import io
import json
import re
import socket
import zlib
from pathlib import Path

import openai
import pytest
from PIL import Image

MIB = 1 << 20


def png(width, height):
    """A valid PNG of one grey bit a pixel, made row by row so that the test needs no memory for it."""

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    packer = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join([packer.compress(row) for _ in range(height)]) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def url(text):
    return [{"type": "image_url", "image_url": {"url": text}}]


def user(content):
    return {"role": "user", "content": content}


PLACEHOLDER = "Look at <ImageHere> now"
WRONG_FIELDS = {
    "no model": ({"model": None}, "model", "string"),
    "no messages": ({"messages": []}, "messages", "at least 1"),
    "a role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'user'"),
    "a text for a number": ({"temperature": "0.5"}, "temperature", "number"),
    "a temperature": ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    "top_p": ({"top_p": 0}, "top_p", "greater than 0"),
    "a penalty": ({"repetition_penalty": 0.0}, "repetition_penalty", "0.1"),
    "max_tokens": ({"max_tokens": 1025}, "max_tokens", "limit, 1024"),
    "no tokens": ({"max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
    "beams": ({"num_beams": 11}, "num_beams", "limit, 10"),
    "n": ({"n": 9}, "n", "limit, 8"),
    "five stops": ({"stop": list("abcde")}, "stop", "at most 4"),
    "an empty stop": ({"stop": ""}, "stop[0]", "at least 1"),
    "a long stop": ({"stop": ["a", "b" * 201]}, "stop[1]", "200"),
    "a seed": ({"seed": 2**63}, "seed", "less than"),
    "a seed without effect": ({"seed": 1, "num_beams": 2, "temperature": 1}, "seed", "several beams"),
    "stream_options": ({"stream_options": {}}, None, "stream: true"),
    "two lengths": ({"max_tokens": 3, "max_completion_tokens": 4}, None, "different numbers"),
    "an unknown field": ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    "a field that would matter": ({"frequency_penalty": 0.5}, "frequency_penalty", "leave the field out"),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "leave the field out"),
    "json_schema": ({"response_format": {"type": "json_object"}}, "response_format", "leave the field out"),
    "content": ({"messages": [user(5)]}, "messages[0].content", "array"),
    "an audio part": ({"messages": [user([{"type": "input_audio"}])]}, "messages[0].content[0].type", "'image_url'"),
    "an empty part": ({"messages": [user([{"type": "text"}])]}, "messages[0].content[0]", "needs the field 'text'"),
    "image_url a text": (
        {"messages": [user([{"type": "image_url", "image_url": "data:"}])]},
        "messages[0].content[0].image_url",
        "object",
    ),
    "an empty message": ({"messages": [user("a"), user(" ")]}, "messages[1].content", "empty"),
    "a late system message": (
        {"messages": [user("a"), {"role": "system", "content": "b"}, user("c")]},
        "messages[1].role",
        "before all others",
    ),
    "an answer at the end": (
        {"messages": [user("a"), {"role": "assistant", "content": "b"}]},
        "messages[1].role",
        "must be the user's",
    ),
    "an image of the assistant": (
        {"messages": [{"role": "assistant", "content": url("data:,")}, user("a")]},
        "messages[0].content",
        "only a user's",
    ),
    "a tool call": (
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}, user("a")]},
        "messages[0].tool_calls",
        "role, content and name",
    ),
    "a placeholder": ({"messages": [user(PLACEHOLDER)]}, "messages[0].content", "must not hold <ImageHere>"),
    "a placeholder in a part": (
        {"messages": [user([{"type": "text", "text": "a"}, {"type": "text", "text": PLACEHOLDER}])]},
        "messages[0].content[1]",
        "must not hold <ImageHere>",
    ),
    "a placeholder of the assistant": (
        {"messages": [{"role": "assistant", "content": PLACEHOLDER}, user("a")]},
        "messages[0].content",
        "must not hold <ImageHere>",
    ),
    "a placeholder of the system": (
        {"messages": [{"role": "system", "content": PLACEHOLDER}, user("a")]},
        "messages[0].content",
        "must not hold <ImageHere>",
    ),
    "too many messages": ({"messages": [user("a")] * 1001}, "messages", "1001 messages are more than 1000"),
    "a long message": ({"messages": [user("a" * 20_001)]}, "messages[0].content", "20,001 characters"),
    "a long talk": ({"messages": [user("a" * 20_000)] * 11}, "messages", "220,000 characters"),
    "nine images": ({"messages": [user(url("data:,") * 9)]}, "messages", "9 images are more than 8"),
    "more than the context": ({"messages": [user("a " * 5000)]}, None, "reads 2048 in all"),
    "an image by URL": (
        {"messages": [user(url("http://127.0.0.1/x.png"))]},
        "messages[0].content[0].image_url.url",
        "switched off",
    ),
    "a file": (
        {"messages": [user(url("file:///etc/passwd"))]},
        "messages[0].content[0].image_url.url",
        "switched off",
    ),
    "no image in a data URL": (
        {"messages": [user(url("data:text/plain;base64,AAAA"))]},
        "messages[0].content[0].image_url.url",
        "no image in base64",
    ),
    "no base64": (
        {"messages": [user(url("data:image/png;base64,%%%"))]},
        "messages[0].content[0].image_url.url",
        "no valid base64",
    ),
    "no image": (
        {"messages": [user(url("data:image/png;base64,"))]},
        "messages[0].content[0].image_url.url",
        "not an image",
    ),
    "a text as image": (
        {"messages": [user(url("data:image/png;base64," + base64.b64encode(b"<html></html>").decode()))]},
        "messages[0].content[0].image_url.url",
        "not an image",
    ),
}


@pytest.mark.parametrize("case", WRONG_FIELDS)
def test_a_wrong_field_is_named(server, case):
    change, param, reason = WRONG_FIELDS[case]
    answer = server.chat(**change)
    assert answer.status == 400, answer.content
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["param"] == param
    assert reason in answer.error["message"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "the body is no JSON: EOF"),
        (b'{"model": "first",', "the body is no JSON: EOF while parsing a value at line 1 column 18"),
        (b"\xff\xfe{}", "the body is no JSON"),
        (b"[" * 100_000, "the body is no JSON"),
        (b"[]", "should be an object"),
        (b'{"model": "first", "temperature": NaN, "messages": [{"role": "user", "content": "a"}]}', "finite"),
        (rb'{"model": "first", "messages": [{"role": "user", "content": "\ud800"}]}', "the body is no JSON"),
        (
            b'{"model": "first", "model": "second", "messages": [{"role": "user", "content": "a"}]}',
            "model: given twice",
        ),
        (b'{"model": "first", "messages": [{"role": "user", "content": "a", "content": "b"}]}', "content: given twice"),
    ],
)
def test_a_body_that_cannot_be_read_is_an_error_with_its_place(server, body, reason):
    answer = server.post(body)
    assert answer.status == 400
    assert reason in answer.error["message"]


def test_a_body_of_millions_of_values_is_refused_without_their_memory(server):
    many = b'{"model": "first", "metadata": [' + b"[]," * 20_000_000 + b'[]], "messages": []}'
    before = peak()
    answer = server.post(many)
    assert (answer.status, answer.error["message"]) == (400, "the body has more than 500,000 values")
    assert peak() - before < 400


def test_harmless_fields_and_those_at_their_neutral_values_change_nothing(server):
    message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [], "name": "x"}
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "tools": [],
        "frequency_penalty": 0,
        "logprobs": None,
    }
    answer = server.chat(messages=[user("Hello?"), message], **harmless)
    assert answer.status == 400  # the last message is the assistant's
    answer = server.chat(messages=[message, user("Hello?")], response_format={"type": "text"}, **harmless)
    assert (answer.status, answer.text) == (200, server.chat().text)


def test_signs_that_mean_something_to_the_machine_are_answered(server):
    for text in ("\0", "{}{0}%s", "</s><s>", "$$", "\N{ZERO WIDTH SPACE}", "### Human: ###Assistant:", "<Img></Img>"):
        assert server.chat(f"What is {text}?").status == 200


def test_an_unknown_model_is_answered_with_the_names(server):
    client = server.client()
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4o'; there are: first, second"):
        client.chat.completions.create(model="gpt-4o", messages=[user("Hello?")])


def test_an_image_of_too_many_pixels_is_refused_with_its_place(server, tools):
    answer = server.chat([tools.said("This?"), tools.picture(png(20_000, 20_000))])
    assert answer.status == 413
    assert answer.error["param"] == "messages[0].content[1].image_url.url"
    assert "pixels" in answer.error["message"]


def test_an_image_that_cannot_be_used_is_the_clients_fault(server, tools, hostile_images, caplog):
    for name, content in hostile_images.items():
        answer = server.chat([tools.said("This?"), tools.picture(content)])
        assert answer.status == (413 if name == "many pixels" else 400), (name, answer.content)
        assert answer.error["param"] == "messages[0].content[1].image_url.url"
        assert answer.error["message"] != answer.error["param"]
    assert not [record for record in caplog.records if record.exc_info]


def test_wrong_paths_and_methods_have_errors_of_the_same_form(server):
    assert server.get("/v1/nothing").error["message"] == "there is no such path"
    assert server.get("/v1/chat/completions").status == 405
    assert server.get("/docs").status == 404


@pytest.mark.parametrize("waits", [False, True])
def test_a_body_that_is_not_http_is_answered_once(server, caplog, waits):
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n"
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        client.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + (b"" if waits else b"no chunk\r\n"))
        if waits:
            answer = client.recv(1 << 16)
            client.sendall(b"no chunk\r\n")
        answer += b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 415" if waits else b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1
    assert server.chat().status == 200  # by then the first request was worked on, too
    assert not [record for record in caplog.records if record.exc_info]


def peak():
    """Most MiB that this process ever held."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def resident():
    """MiB of this process, which the server runs in."""
    gc.collect()
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def test_after_thirty_bad_images_the_server_goes_on_and_its_memory_is_free(server, tools):
    whole = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(whole, "PNG")
    contents = {
        "30 MB": (bytes(30_000_000), 413, "are more than 20 MiB"),
        "5 MB of nothing": (bytes(5_000_000), 400, "not an image"),
        "20,000 x 20,000": (png(20_000, 20_000), 413, "pixels"),
        "cut off": (whole.getvalue()[:-100], 400, "damaged"),
    }
    bodies = {
        name: json.dumps(tools.asked([tools.picture(content)])).encode() for name, (content, _, _) in contents.items()
    }

    def send(name):
        answer = server.post(bodies[name])
        assert answer.status == contents[name][1], name
        assert contents[name][2] in answer.error["message"], name

    assert server.chat().status == 200
    for name in bodies:
        send(name)
    before = resident()
    for name in [*bodies] * 3 + ["cut off"] * 18:
        send(name)
    assert resident() - before < 80  # two bodies of 40 MB
    assert server.chat().status == 200
