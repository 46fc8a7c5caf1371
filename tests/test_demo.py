"""`demo.py` when something is wrong: one clear line and exit status 2, before anything heavy is loaded."""

import importlib.util
import socket

import pytest

PROMPT = ["--prompt", "Hello?"]


@pytest.fixture(scope="module")
def demo(load_script):
    return load_script("demo.py")


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
