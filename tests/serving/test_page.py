"""The page's own parts, without a browser."""

import socket

import httpx
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from minigpt4.common.errors import ConfigError
from minigpt4.serving.uploads import Limits

gradio = pytest.importorskip("gradio")

from minigpt4.serving import page as page_module  # noqa: E402 - needs gradio
from minigpt4.serving.page_gate import launch  # noqa: E402


@pytest.fixture(scope="module")
def page(make_engine):
    page = page_module.ChatPage(make_engine(), Limits())
    page.address = launch(page, host="127.0.0.1", port=None, auth=None, share=False)
    yield page
    page.close()


def test_an_address_in_place_of_an_image_is_not_fetched(page, monkeypatch):
    fetched, address = [], "http://192.0.2.1/x.png"
    monkeypatch.setattr(gradio.processing_utils, "async_ssrf_protected_download", lambda url, **_: fetched.append(url))
    image = {"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}
    taking = {number: call.inputs for number, call in page.blocks.fns.items() if page.image in call.inputs}
    assert len(taking) == 2
    for number, inputs in taking.items():
        for value in (image, [image], {"path": image}, image | {"more": image}):
            data = ["What?", value][-len(inputs) :]
            call = {"data": data, "fn_index": number, "session_hash": "a"}
            if httpx.post(f"{page.address}gradio_api/queue/join", json=call).status_code == 200:
                assert "completed" in httpx.get(f"{page.address}gradio_api/queue/data?session_hash=a", timeout=60).text
    assert fetched == []


def test_the_browser_is_told_to_ask_nobody_else(page):
    for path in ("", "config", "gradio_api/startup-events"):
        assert "default-src 'self'" in httpx.get(page.address + path).headers["content-security-policy"]


def test_a_caller_without_a_session_gets_no_conversation(page):
    put = next(number for number, call in page.blocks.fns.items() if call.fn.__name__ == "_put")
    before = len(page.visitors)
    reply = httpx.post(f"{page.address}gradio_api/run/predict", json={"data": ["Hello?", None], "fn_index": put})
    assert reply.status_code >= 400
    assert "Traceback" not in reply.text
    assert len(page.visitors) == before


def test_pieces_of_an_answer_are_sent_at_once(page, monkeypatch):
    options, made = [], H11Protocol.connection_made

    def watched(protocol, transport):
        made(protocol, transport)
        options.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(H11Protocol, "connection_made", watched)
    httpx.get(page.address)
    assert options
    assert all(options)


def test_a_file_that_is_too_large_is_refused_by_the_server_too(page):
    reply = httpx.post(f"{page.address}gradio_api/upload", files={"files": ("heavy.png", bytes(30 << 20))})
    assert reply.status_code == 413


def test_behind_a_password_nothing_is_taken_or_given_out_without_it(page):
    locked = page_module.ChatPage(page.engine, Limits())
    address = launch(locked, host="127.0.0.1", port=None, auth=("me", "secret"), share=False)
    example = next(iter(locked.uploads.examples))
    with httpx.Client(base_url=address) as visitor:

        def statuses():
            call = {"fn_index": 1, "data": ["What?", None], "session_hash": "x"}
            replies = [
                visitor.post("gradio_api/upload", files={"files": b"x"}),
                visitor.get(f"gradio_api/file={example}"),
                visitor.post("gradio_api/queue/join", json=call),
            ]
            return [reply.status_code for reply in replies]

        assert statuses() == [401, 401, 401]
        assert visitor.post("login", data={"username": "me", "password": "secret"}).status_code == 200
        assert statuses() == [200, 200, 200]
    locked.close()


def test_a_port_that_is_taken_is_an_error(page):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = page_module.ChatPage(page.engine, Limits())
        with pytest.raises(ConfigError, match=str(port)):
            launch(other, host="127.0.0.1", port=port, auth=None, share=False)
        other.close()


@pytest.mark.parametrize("text", ["a <b>c</b>", "1 < 2 & 3", "![x](y)", "<!-- -->", "one!"])
def test_a_question_is_edited_as_it_was_written(text):
    assert page_module._written(page_module._literal(text)) == text


def test_tags_are_words_except_in_code_where_they_are_so_anyway():
    answer = "A <b>cat</b>:\n```html\n<b>cat</b>\n```\n<i>"
    assert page_module._literal(answer) == "A &lt;b>cat&lt;/b>:\n```html\n<b>cat</b>\n```\n&lt;i>"
    assert page_module._literal("```html\n<b>still being wr") == "```html\n<b>still being wr"
