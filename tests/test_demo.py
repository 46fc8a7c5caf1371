"""`demo.py`: its terminal; what is wrong is one clear line and exit status 2, before anything heavy is loaded."""

import importlib.util
import socket
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "demo.py"
PROMPT = ["--prompt", "Hello?"]


@pytest.fixture(scope="module")
def demo(load_script):
    return load_script("demo.py")


def test_answers_about_all_images_are_those_of_the_chat(warm, demo_config, parity_dir, shared_model):
    from minigpt4.conversation.chat import Chat, Decoding
    from minigpt4.inference.engine import Engine
    from minigpt4.processors import Blip2ImageEvalProcessor, open_image

    images = [parity_dir / "images" / name for name in ("img0_rgb_nonsquare.png", "img1_rgba.png")]
    command = [DEMO, "--cli", "--cfg-path", demo_config, "--max-new-tokens", "8", "--num-beams", "2"]
    command += ["--image", images[0], "--image", images[1]]
    once = warm.script(*command, "--prompt", "Which?", cwd=DEMO.parent, apart=True)
    asked = warm.script(*command, cwd=DEMO.parent, apart=True, stdin="Which?\nAnd now?\n")
    model = shared_model(model_type="pretrain_vicuna0", end_sym="###")
    chat = Chat(Engine(model, Blip2ImageEvalProcessor(image_size=56)))
    for image in images:
        chat.show(open_image(image))
    wanted = [chat.ask(question, Decoding(num_beams=2, max_new_tokens=8)) for question in ("Which?", "And now?")]
    for run, answers in ((once, wanted[:1]), (asked, wanted)):
        assert run.wait() == [0], run.text()
        assert run.out.read_text().splitlines() == answers


@pytest.fixture
def fails(demo, demo_config, monkeypatch, capsys):
    """`fails(*arguments)`: what it says; the model must not have been touched."""

    def fails(*arguments):
        monkeypatch.setattr(demo, "load", lambda *_: pytest.fail("the model was loaded"))
        assert demo.main(["--cfg-path", str(demo_config), *map(str, arguments)]) == 2
        return capsys.readouterr().err

    return fails


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--options", "model.llama_model=nowhere"], "model.llama_model: nowhere does not exist"),
        (["--options", "model.ckpt="], "model.ckpt names no checkpoint"),
        (["--port", "70000"], "cannot listen there"),
        (["--server-name", "no.such.host.invalid"], "cannot listen there"),
        (["--auth", "me"], "USER:PASSWORD"),
        (["--auth", "me:"], "USER:PASSWORD"),
        (["--auth", ":secret"], "USER:PASSWORD"),
        (["--ckpt", "x"], "no file x"),
        (["--ckpt", "x=no.pth"], "no file no.pth"),
        (["--ckpt", "minigpt4_tiny={parity}/minigpt4_tiny.pth"], "already"),
        (["--max-image-mib", "0"], "image_bytes: 0 must be above 0"),
        (["--cli", "--image", "{parity}/golden.json"], "golden.json: not an image"),
        ([*PROMPT, "--num-beams", "0"], "must be"),
        ([*PROMPT, "--temperature", "-1"], "must be"),
        ([*PROMPT, "--top-p", "2"], "must be"),
        (["--cfg-path", "nothing.yaml"], "nothing.yaml"),
    ],
)
def test_what_cannot_be_is_told_before_the_model_loads(fails, parity_dir, arguments, reason):
    assert reason in fails(*(argument.format(parity=parity_dir) for argument in arguments))


def test_what_cannot_be_here_is_told_before_the_model_loads(fails, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: cannot listen there" in fails("--port", port)
    monkeypatch.setenv("MINIGPT4_AUTH", "me")
    assert "USER:PASSWORD" in fails()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install -e ".[demo]"' in fails()


def test_images_belong_to_the_terminal(demo, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.parse_args(["--cfg-path", "eval.yaml", "--image", "photo.jpg"])
    assert stopped.value.code == 2
    assert "--cli" in capsys.readouterr().err
