"""`demo.py` when something is wrong: one clear line and exit status 2, before anything heavy is loaded."""

import importlib.util
import socket
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", REPOSITORY / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(demo_config):
    return demo_config


@pytest.fixture
def fails(demo, monkeypatch, capsys):
    """`fails(*arguments)`: what it says; the model must not have been touched."""

    def fails(*arguments):
        monkeypatch.setattr(demo, "load", lambda *_: pytest.fail("the model was loaded"))
        assert demo.main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    return fails


def test_a_configuration_that_is_not_there(fails, tmp_path):
    assert "nothing.yaml" in fails("--cfg-path", tmp_path / "nothing.yaml")


def test_weights_that_are_not_there(fails, config):
    message = fails("--cfg-path", config, "--options", "model.llama_model=nowhere")
    assert "model.llama_model: nowhere does not exist" in message


def test_a_port_in_use(fails, config):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: cannot listen there" in fails("--cfg-path", config, "--port", port)


@pytest.mark.parametrize("options", [("--port", "70000"), ("--server-name", "no.such.host.invalid")])
def test_an_address_that_cannot_be(fails, config, options):
    assert "cannot listen there" in fails("--cfg-path", config, *options)


@pytest.mark.parametrize("auth", ["me", "me:", ":secret"])
def test_a_password_that_is_none(fails, config, auth, monkeypatch):
    assert "USER:PASSWORD" in fails("--cfg-path", config, "--auth", auth)
    monkeypatch.setenv("MINIGPT4_AUTH", auth)
    assert "USER:PASSWORD" in fails("--cfg-path", config)


@pytest.mark.parametrize(
    ("value", "reason"), [("x", "no file x"), ("x=no.pth", "no file no.pth"), ("minigpt4_tiny={ckpt}", "already")]
)
def test_a_further_checkpoint_that_cannot_be(fails, config, value, reason, parity_dir):
    value = value.format(ckpt=parity_dir / "minigpt4_tiny.pth")
    assert reason in fails("--cfg-path", config, "--ckpt", value)


def test_a_configuration_without_checkpoint_is_no_model_to_talk_to(fails, config):
    assert "model.ckpt names no checkpoint" in fails("--cfg-path", config, "--options", "model.ckpt=")


def test_limits_that_are_none(fails, config):
    assert "image_bytes: 0 must be above 0" in fails("--cfg-path", config, "--max-image-mib", "0")


def test_without_gradio_the_page_says_what_to_install(demo, fails, config, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert 'pip install -e ".[demo]"' in fails("--cfg-path", config)


def test_images_belong_to_the_terminal(demo, config, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.parse_args(["--cfg-path", str(config), "--image", "photo.jpg"])
    assert stopped.value.code == 2
    assert "--cli" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_found_before_the_model_loads(fails, config, tmp_path):
    (tmp_path / "photo.jpg").write_text("<html>")
    assert "photo.jpg: not an image" in fails("--cfg-path", config, "--cli", "--image", tmp_path / "photo.jpg")


@pytest.mark.parametrize("options", [("--num-beams", "0"), ("--temperature", "-1"), ("--top-p", "2")])
def test_a_decoding_that_cannot_be(fails, config, options):
    assert "must be" in fails("--cfg-path", config, "--prompt", "Hello?", *options)
