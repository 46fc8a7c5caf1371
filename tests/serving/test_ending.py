"""Servers as processes: the page behind a password, and that they end, also while they decode an image for ever."""

import base64
import contextlib
import re
import signal
import threading
from pathlib import Path

import httpx
import pytest

REPOSITORY = Path(__file__).parents[2]
STUCK = """
import runpy, sys, time
import minigpt4.processors

def decode(*arguments):
    print("It decodes", file=sys.stderr, flush=True)
    time.sleep(1_000_000)

minigpt4.processors.open_image = decode
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A command whose decoder never comes back, as it is for a file that was made for that."""


@pytest.fixture
def start(demo_config, tmp_path, warm):
    """`start(command, *arguments, **environment)`: the run, and where it listens."""
    stuck = tmp_path / "stuck.py"
    stuck.write_text(STUCK)

    def start(command, *arguments, **more):
        environment = {"GRADIO_TEMP_DIR": str(tmp_path / "page"), **more}
        run = warm.script(stuck, command, "--cfg-path", demo_config, *arguments, cwd=REPOSITORY, env=environment)
        run.wait_for("Listening on" if command == "serve.py" else "The page is at")
        found = re.search(r"(?:Listening on|The page is at) (http://[^\s;]+)", run.text())
        return run, found[1].rstrip("/")

    return start


def send_in_background(url, **request):
    """The answer may never come."""

    def send():
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(url, timeout=600, **request)

    threading.Thread(target=send, daemon=True).start()


def ends(run):
    """It ends well once it decodes."""
    run.wait_for("It decodes")
    run.send(signal.SIGTERM)
    assert run.wait() == [0], run.text()
    assert "Traceback" not in run.text()


def test_the_api_ends(start, make_png):
    run, url = start("serve.py", "--port", "0", "--limits", "shutdown_seconds=1")
    image = f"data:image/png;base64,{base64.b64encode(make_png(8, 8)).decode()}"
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What is this?"}]
    body = {"model": "minigpt4_tiny", "messages": [{"role": "user", "content": content}]}
    send_in_background(f"{url}/v1/chat/completions", json=body)
    ends(run)


def test_the_page_ends(start, make_png):
    pytest.importorskip("gradio")
    run, url = start("demo.py")
    (path,) = httpx.post(f"{url}/gradio_api/upload", files={"files": ("x.png", make_png(8, 8))}).json()
    config = httpx.get(f"{url}/config").json()
    function = next(function for function in config["dependencies"] if function["api_name"] == "answer")
    values = {component["id"]: component["props"].get("value") for component in config["components"]}
    message = {"text": "What?", "files": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
    call = {"fn_index": function["id"], "data": [message, *(values[name] for name in function["inputs"][1:])]}
    send_in_background(f"{url}/gradio_api/queue/join", json=call | {"session_hash": "somebody"})
    ends(run)


def test_the_page_is_behind_a_password_and_has_every_checkpoint(browser, start, parity_dir):
    second = f"--ckpt=second={parity_dir / 'train_main_checkpoint_0.pth'}"
    run, url = start("demo.py", second, MINIGPT4_AUTH="me:secret")
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(url)
    page.get_by_label("username").fill("me")
    page.get_by_label("password").fill("secret")
    page.get_by_role("button", name="Login").click()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Checkpoint").click()
    page.get_by_role("option", name="second").click()
    page.get_by_label("number input for Maximum of tokens").fill("5")
    page.locator("#question textarea").fill("What is this?")
    page.locator("#question textarea").press("Enter")
    page.get_by_test_id("bot").wait_for()
    page.close()
    run.send(signal.SIGTERM)
    assert run.wait() == [0], run.text()
    assert "Traceback" not in run.text()
