"""Servers as processes: the page behind a password, and that they end, also while they decode an image for ever."""

import base64
import re
import signal
from concurrent.futures import ThreadPoolExecutor
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


def ends(run):
    """It ends well once it decodes."""
    run.wait_for("It decodes")
    run.send(signal.SIGTERM)
    assert run.wait() == [0], run.text()
    assert "Traceback" not in run.text()


def test_the_api_ends(start, make_png):
    run, url = start("serve.py", "--port", "0", "--limits", "shutdown_seconds=0.1")
    image = f"data:image/png;base64,{base64.b64encode(make_png(8, 8)).decode()}"
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What is this?"}]
    body = {"model": "minigpt4_tiny", "messages": [{"role": "user", "content": content}]}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=120)
        ends(run)
        assert isinstance(asked.exception(), httpx.HTTPError) or asked.result().status_code >= 500


def test_the_page_is_behind_a_password_has_every_checkpoint_and_ends(browser, start, parity_dir):
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
    page.locator("#question .stop-button").wait_for(state="detached")
    page.locator("#question input[type=file]").set_input_files(parity_dir / "images" / "img3_rgb.png")
    page.locator("#question img").wait_for()
    page.locator("#question textarea").fill("And this?")
    page.locator("#question textarea").press("Enter")
    ends(run)
    page.close()
