"""A picture of the chat page: taken from an open page, refused with a reason where there is none."""

import functools
import http.server
import importlib.util
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "scripts" / "screenshot_demo.py"
PAGE = """<!DOCTYPE html><meta charset="utf-8"><body style="background: #eee">
<label>number input for Temperature <input id="t"></label>
<div id="image"><input type="file" onchange="image.append(new Image(9, 9))"></div>
<div id="chat"></div><label>Question <input id="q"></label>
<button onclick="answer()">Ask</button><button class="stop" disabled>Stop</button>
<script>
function answer() {
  const said = document.createElement("p");
  said.dataset.testid = "bot";
  said.textContent = q.value;
  said.style = `height: 100px; background: ${t.value === "0.5" ? "#00f" : "#f00"}`;
  chat.append(said);
}
</script>"""


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)  # scripts find each other in their own folder
    spec = importlib.util.spec_from_file_location("screenshot_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def address(tmp_path):
    (tmp_path / "index.html").write_text(PAGE)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("chromium")
def test_picture_shows_the_answers_to_all_questions(main, address, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    questions = ["--question", "What?", "--question", "Why?", "--image", str(tmp_path / "photo.png")]
    arguments = [address, str(tmp_path / "demo.png"), "--width", "700", "--height", "500", "--temperature", "0.5"]
    assert main([*arguments, *questions]) == 0
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.size == (700, 500)
        blue = sum(count for count, colour in picture.convert("RGB").getcolors() if colour == (0, 0, 255))
    assert 2 * 100 * 600 < blue < 2 * 100 * 700


def test_missing_image_is_named(main, tmp_path, capsys):
    assert main(["http://127.0.0.1:9", str(tmp_path / "a.png"), "--image", str(tmp_path / "none.png")]) == 2
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.usefixtures("chromium")
def test_page_that_is_not_there_is_an_error(main, tmp_path, capsys):
    assert main(["http://127.0.0.1:9", str(tmp_path / "a.png")]) == 2
    assert "start demo.py first" in capsys.readouterr().err
