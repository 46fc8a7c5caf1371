"""Wrong requests get the right status, a message that names the field, and do no harm."""

import base64
import gc
import io
import json
import re
from pathlib import Path

from PIL import Image

MIB = 1 << 20


def url(text):
    return [{"type": "image_url", "image_url": {"url": text}}]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


PLACEHOLDER = "Look at <ImageHere> now"
IMAGE = "messages[0].content[0].image_url.url"
DATA = "data:image/png;base64,"
OUT_OF_RANGE = {
    **{"model": None, "messages": [], "temperature": 2.5, "top_p": 0, "repetition_penalty": 0.0, "max_tokens": 1025},
    **{"max_completion_tokens": 0, "num_beams": 11, "n": 9, "seed": 2**63, "stop": list("abcde")},
    **{"frequency_penalty": 0.5, "tools": [{"type": "function"}]},
}
WRONG_FIELDS = [
    *(({field: value}, field) for field, value in OUT_OF_RANGE.items()),
    ({"temperature": "0.5"}, "temperature"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"n": 9}, "n", "limit, 8"),
    ({"stop": ""}, "stop[0]"),
    ({"stop": ["a", "b" * 201]}, "stop"),
    ({"seed": 1, "num_beams": 2, "temperature": 1}, None),
    ({"stream_options": {}}, None),
    ({"max_tokens": 3, "max_completion_tokens": 4}, None),
    ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"messages": [user(5)]}, "messages[0].content"),
    ({"messages": [user([{"type": "input_audio"}])]}, "messages[0].content[0].type"),
    ({"messages": [user([{"type": "text"}])]}, "messages[0].content[0]"),
    ({"messages": [user([{"type": "text", "cache": {}}])]}, "messages[0].content[0].cache", "Known: image_url, text"),
    ({"messages": [user("a") | {"contents": "a"}]}, "messages[0].contents", "did you mean 'content'"),
    ({"messages": [user([{"type": "image_url", "image_url": "data:"}])]}, "messages[0].content[0].image_url"),
    ({"messages": [user("a"), user(" ")]}, "messages[1]"),
    ({"messages": [user("a"), {"role": "system", "content": "b"}, user("c")]}, None),
    ({"messages": [user("a"), assistant("b")]}, None),
    ({"messages": [assistant(url(DATA)), user("a")]}, "messages[0]"),
    ({"messages": [assistant("a") | {"tool_calls": [{"id": "1"}]}, user("a")]}, "messages[0].tool_calls"),
    ({"messages": [user(PLACEHOLDER)]}, "messages[0].content[0].text"),
    ({"messages": [assistant(PLACEHOLDER), user("a")]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "system", "content": PLACEHOLDER}, user("a")]}, "messages[0].content[0].text"),
    ({"messages": [user("a")] * 1001}, "messages"),
    ({"messages": [user("a" * 20_001)]}, "messages[0].content"),
    ({"messages": [user("a" * 20_000)] * 11}, "messages"),
    ({"messages": [user(url(DATA) * 9)]}, "messages"),
    ({"messages": [user("a " * 5000)]}, None),
    ({"messages": [user(url("http://127.0.0.1/x.png"))]}, IMAGE, "send a data URL"),
    ({"messages": [user(url("file:///etc/passwd"))]}, IMAGE),
    ({"messages": [user(url("data:text/plain;base64,AAAA"))]}, IMAGE),
    ({"messages": [user(url(DATA + "%%%"))]}, IMAGE),
    ({"messages": [user(url(DATA))]}, IMAGE),
    ({"messages": [user(url(DATA + base64.b64encode(b"<html></html>").decode()))]}, IMAGE),
]


def test_a_wrong_field_is_named_and_the_way_out(server):
    for change, param, *way_out in WRONG_FIELDS:
        answer = server.chat(**change)
        assert answer.status == 400, (change, answer.content)
        assert (answer.error["type"], answer.error["param"]) == ("invalid_request_error", param)
        for words in (param or "", *way_out):
            assert words in answer.error["message"]


def test_a_body_that_cannot_be_read_is_an_error_with_its_place(server):
    for body, reason in {
        b"": "no JSON: EOF",
        b'{"model": "first",': "no JSON: EOF while parsing a value at line 1 column 18",
        b"\xff\xfe{}": "no JSON",
        b"[" * 100_000: "no JSON",
        b"[]": "should be an object",
        b'{"model": "first", "temperature": NaN, "messages": [{"role": "user", "content": "a"}]}': "finite",
        rb'{"model": "first", "messages": [{"role": "user", "content": "\ud800"}]}': "no JSON",
    }.items():
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
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": True, "tools": [], "frequency_penalty": 0}
    harmless |= {"logprobs": None, "modalities": ["text"], "response_format": {"type": "text"}}
    answer = server.chat(messages=[message, user("Hello?")], **harmless)
    assert (answer.status, answer.text) == (200, server.chat().text)


def test_an_image_that_cannot_be_used_is_the_clients_fault(server, tools, hostile_images, caplog):
    for name, content in hostile_images.items():
        answer = server.chat([tools.said("This?"), tools.picture(content)])
        assert answer.status == (413 if name == "many pixels" else 400), (name, answer.content)
        assert answer.error["param"] == "messages[0].content[1].image_url.url"
        assert answer.error["message"].startswith(f"{answer.error['param']}: the file")
    assert not [record for record in caplog.records if record.exc_info]


def test_wrong_paths_and_methods_have_errors_of_the_same_form(server):
    assert server.get("/v1/nothing").error["type"] == "invalid_request_error"
    assert server.get("/v1/chat/completions").status == 405
    assert server.get("/docs").status == 404


def peak():
    """Most MiB that this process ever held."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def resident():
    """MiB of this process, which the server runs in."""
    gc.collect()
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def test_after_bad_images_the_server_goes_on_and_their_memory_is_free(server, tools, make_png):
    whole = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(whole, "PNG")
    contents = {
        "are more than 20 MiB": bytes(30_000_000),
        "not an image": bytes(5_000_000),
        "pixels": make_png(20_000, 20_000),
        "damaged": whole.getvalue()[:-100],
    }
    bodies = {name: json.dumps(tools.asked([tools.picture(one)])).encode() for name, one in contents.items()}
    assert server.chat().status == 200
    for turn in range(4):
        if turn == 1:
            before = resident()
        for reason, body in bodies.items():
            assert reason in server.post(body).error["message"]
    assert resident() - before < 80  # two bodies of 40 MB
    assert server.chat().status == 200
