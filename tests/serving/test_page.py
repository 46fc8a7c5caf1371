"""The page without a browser: what is asked of the engine, and what its server refuses."""

import json
import socket
import uuid
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.schemas import ChatSettings
from minigpt4.conversation.decoding import GREEDY, PUBLISHED_CHAT
from minigpt4.serving.uploads import Limits

gradio = pytest.importorskip("gradio")

from minigpt4.serving import page_gate  # noqa: E402 - needs gradio
from minigpt4.serving.page import NO_ANSWER, ChatPage, decoding, example_images, sliders  # noqa: E402

IMAGE = "<Img><ImageHere></Img>"
PHOTO = str(Path(__file__).parents[1] / "data" / "parity" / "images" / "img0_rgb_nonsquare.png")
LIMITS = Limits(images=3, turns=6, image_bytes=2 << 20)


@pytest.fixture(scope="module")
def page(make_engine, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        page = ChatPage(make_engine(), LIMITS)
        page.address = page_gate.launch(page, host="127.0.0.1", port=None, auth=None, share=False)
        yield page
        page.blocks.close(verbose=False)


def user(*parts):
    return {"role": "user", "content": list(parts)}


def said(text, **metadata):
    return {"role": "assistant", "content": [{"type": "text", "text": text}], "metadata": metadata}


def text(words):
    return {"type": "text", "text": words}


def file(path):
    return {"type": "file", "file": {"path": path}}


def asked(page, question, history=(), files=()):
    return page.request({"text": question, "files": list(files)}, list(history), None, GREEDY)


LOST = [user(text("First?")), said("Yes."), user(file(PHOTO)), user(text("Lost?"))]
KEPT = ["First?", "Yes.", f"{IMAGE} &lt;?", None]


TALK = [user(file(PHOTO)), user(text("A &lt;b&gt;?")), said("Yes &amp; no")]


@pytest.mark.parametrize(
    ("history", "files", "messages"),
    [
        (TALK, [PHOTO], [f"{IMAGE} A <b>?", "Yes & no", f"{IMAGE} &lt;?", None]),
        (LOST, [], KEPT),
        ([*LOST, said("the queue is full", title=NO_ANSWER)], [], KEPT),
        ([*LOST, said("")], [], KEPT),
        ([user(text("First?")), said("a <ImageHere> b")], [], ["First?", "a  b", "&lt;?", None]),
    ],
    ids=["all so far", "no answer", "an error", "an empty answer", "words that look like an image"],
)
def test_messages_become_one_request_without_unanswered_questions(page, history, files, messages):
    request = asked(page, "&lt;?", history, files)
    assert [text for _, text in request.conversation.messages] == messages
    assert len(request.pictures) == str(messages).count(IMAGE)
    assert request.timeout == LIMITS.seconds


def chosen(index, word):
    return SimpleNamespace(index=index, value=[word, None])


def test_a_word_of_the_last_answer_is_looked_up_and_marked(page):
    history = [*LOST, said("a &lt;b&gt; dog"), said("late", title=NO_ANSWER)]
    words, nothing = page.words(history)
    assert (words, nothing) == ([(word, None) for word in ("a", "<", "b", ">", "dog")], "")
    marked, shown = page.look(history, None, chosen(1, "<"))
    assert [word for word, mark in marked if mark] == ["<"]
    assert "<h3>&lt;</h3>" in shown
    assert shown.count("data:image/png;base64,") == 2
    assert page.look(history, "second", chosen(1, "<"))[1] != shown
    for wrong in ((9, "a"), (0, "dog")):
        assert "another answer" in page.look(history, None, chosen(*wrong))[1]
    assert "there is no checkpoint" in page.look(history, "third", chosen(0, "a"))[1]
    assert "no image was shown" in page.look([user(text("a?")), said("b")], None, chosen(0, "b"))[1]
    assert page.words([]) == ([], "")
    assert "this LLM reads" in page.look([*history[:4], said("dog " * 3000)], None, chosen(0, "dog"))[1]


def test_a_conversation_and_a_question_have_limits(page):
    for history, files in (([user(text("a"))] * 6, 0), ([], 4)):
        with pytest.raises(SampleError):
            asked(page, "What?", history, [PHOTO] * files)
    for question in ("What?", " ", "a" * 20_001, "<ImageHere>"):
        assert page.check({"text": question, "files": []})["is_valid"] == (question == "What?")


def test_an_image_that_cannot_be_read_is_told_without_its_path(page, tmp_path, hostile_images):
    for name, content in hostile_images.items():
        (tmp_path / "x.png").write_bytes(content)
        page.picture.cache_clear()
        checked = page.check({"text": "What?", "files": [str(tmp_path / "x.png")]})
        assert not checked["is_valid"], name
        assert str(tmp_path) not in checked["message"]


def test_the_page_begins_as_the_configuration_says(make_engine):
    page = ChatPage(make_engine(), LIMITS, ChatSettings(temperature=0, hint="Try a scene."))
    parts = [part["props"] for part in page.blocks.get_config_file()["components"]]
    assert next(part["value"] for part in parts if part.get("label") == "Temperature") == 0
    assert any("Try a scene." in str(part.get("value")) for part in parts)


def test_the_sliders_start_as_the_published_demo_and_keep_to_a_small_context():
    assert decoding(Limits(), *(slider.value for slider in sliders(Limits(), context=2048))) == PUBLISHED_CHAT
    tokens = next(slider for slider in sliders(Limits(), context=256) if slider.label == "Maximum of tokens")
    assert (tokens.maximum, tokens.value) == (128, 128)
    assert not decoding(Limits(), 1, 0, 0.9, 20, 1.0).do_sample
    for beyond in ((11, 1, 0.9, 20, 1.0), (1, 1, 0.9, 2000, 1.0), (0, 1, 0.9, 20, 1.0), (1, 1, 0, 20, 1.0)):
        with pytest.raises((SampleError, ConfigError)):
            decoding(Limits(), *beyond)


def test_examples_are_scenes_of_several_things(tmp_path):
    assert example_images(tmp_path) == []
    images = tmp_path / "flickr30k" / "flickr30k-images"
    images.mkdir(parents=True)
    groups = {"1": 1, "2": 2, "3": 3, "4": 2}
    (tmp_path / "scenes_test.json").write_text(json.dumps({n: {"groups": [{}] * k} for n, k in groups.items()}))
    for name in ("1", "2", "3"):
        Image.new("RGB", (8, 8)).save(images / f"{name}.jpg")
    assert [path.name for path in example_images(tmp_path)] == ["2.jpg", "3.jpg"]


# Its server


class Visitor:
    """A browser with one tab, without its good manners."""

    def __init__(self, address):
        self.http = httpx.Client(base_url=address, timeout=60)
        self.tab = uuid.uuid4().hex[:11]

    def upload(self, content, name="picture.png"):
        return self.http.post("gradio_api/upload", files={"files": (name, content)})

    def call(self, function, data, **more):
        call = {"fn_index": function, "data": data, "session_hash": self.tab} | more
        return self.http.post("gradio_api/queue/join", json=call)


@pytest.fixture
def visitor(page, capfd):
    """A client whose faults are no traceback in the log."""
    yield Visitor(page.address)
    assert "Traceback" not in capfd.readouterr().err


def functions(page):
    """Numbers of the functions that take images, and how many inputs they have."""
    kinds = (gradio.MultimodalTextbox, gradio.Chatbot)
    return {n: call.inputs for n, call in page.blocks.fns.items() if any(isinstance(one, kinds) for one in call.inputs)}


def test_what_is_no_upload_is_no_image_and_nothing_is_fetched(page, visitor, monkeypatch):
    fetched = []
    monkeypatch.setattr(gradio.processing_utils, "async_ssrf_protected_download", lambda url, **_: fetched.append(url))
    outside = f"{gradio.utils.get_upload_folder()}/../x.png"
    assert functions(page)
    for path in (
        "http://192.0.2.1/x.png",
        "/etc/passwd",
        outside,
        "README.md",
        "data:image/png;base64,",
        {"path": "x"},
    ):
        image = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
        for number, inputs in functions(page).items():
            values = [
                {"text": "a", "files": [image]} if isinstance(one, gradio.MultimodalTextbox) else [user(file(path))]
                for one in inputs
            ]
            assert visitor.call(number, values).status_code == 400, path
    assert fetched == []


def test_other_paths_of_gradio_do_not_answer(visitor):
    names = ("file=/etc/passwd", "file=http://192.0.2.1/x.png", "proxy=http://192.0.2.1/x.png", "component_server")
    names += ("stream/a/1/1/playlist.m3u8",)
    for path in (*(f"gradio_api/{name}" for name in names), "monitoring", "docs"):
        assert visitor.http.get(path).status_code in (403, 404), path


def test_messages_hold_no_components_and_calls_are_json(page, visitor):
    component = {"component": "image", "value": "http://192.0.2.1/x.png", "constructor_args": {}, "props": {}}
    number = next(n for n, inputs in functions(page).items() if isinstance(inputs[0], gradio.Chatbot))
    assert visitor.call(number, [[user(component)]]).status_code == 400
    for body in (b"", b"{", b"[" * 100_000, b"\xff"):
        assert visitor.http.post("gradio_api/queue/join", content=body).status_code == 400


def test_bodies_and_uploads_have_limits(page, visitor, monkeypatch):
    assert visitor.http.post("gradio_api/queue/join", content=bytes(5 << 20)).status_code == 413
    assert visitor.upload(bytes(3 << 20)).status_code == 413
    assert visitor.upload(bytes(7 << 20)).status_code == 413
    assert visitor.http.post("gradio_api/upload", content=iter([b"x"])).status_code == 411
    assert visitor.upload(b"x").status_code == 200
    monkeypatch.setattr(page_gate, "STORED", 0)
    assert visitor.upload(b"x").status_code == 503


def test_the_browser_is_told_to_ask_nobody_else_and_pieces_of_an_answer_are_sent_at_once(visitor, nodelay):
    for path in ("", "config", "gradio_api/startup-events"):
        assert "default-src 'self'" in visitor.http.get(path).headers["content-security-policy"]
    assert set(nodelay) == {1}


def test_behind_a_password_nothing_is_taken_or_given_out_without_it(page):
    locked = ChatPage(page.engine, LIMITS)
    visitor = Visitor(page_gate.launch(locked, host="127.0.0.1", port=None, auth=("me", "secret"), share=False))

    def statuses():
        return [visitor.upload(b"x").status_code, visitor.call(1, [{"text": "What?", "files": []}]).status_code]

    assert statuses() == [401, 401]
    assert visitor.http.post("login", data={"username": "me", "password": "secret"}).status_code == 200
    assert statuses() == [200, 200]
    locked.blocks.close(verbose=False)


def test_a_port_that_was_taken_meanwhile_is_an_error(page):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            page_gate.launch(ChatPage(page.engine, LIMITS), host="127.0.0.1", port=port, auth=None, share=False)
