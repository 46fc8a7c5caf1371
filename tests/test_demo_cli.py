"""`python demo.py --cli` on tiny weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path, tiny_section):
    model = tiny_section(arch="minigpt4", model_type="pretrain_vicuna0", end_sym="###")
    path = tmp_path / "eval.yaml"
    path.write_text(yaml.safe_dump({"model": model, "datasets": {}, "run": {"task": "image_text_pretrain"}}))
    return path


def demo(config, image, *arguments, questions=""):
    command = [sys.executable, "demo.py", "--cli", "--cfg-path", str(config), "--image", str(image), *arguments]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, input=questions, capture_output=True, text=True, check=False
    )


def test_one_question_gets_one_answer_on_standard_output(config, parity_dir):
    image = parity_dir / "images" / "img0_rgb_nonsquare.png"
    done = demo(config, image, "--prompt", "What is this?", "--max-new-tokens", "5")
    assert done.returncode == 0, done.stderr
    again = demo(config, image, "--max-new-tokens", "5", questions="What is this?\n\n")
    assert again.returncode == 0, again.stderr
    assert done.stdout.strip()
    assert done.stdout.strip() in again.stdout


@pytest.mark.parametrize("name", ["nothing.png", "golden.json"])
def test_what_is_no_image_is_an_error_that_names_it(config, parity_dir, name):
    done = demo(config, parity_dir / name, "--prompt", "What is this?")
    assert done.returncode == 2
    assert name in done.stderr
    assert "Traceback" not in done.stderr
