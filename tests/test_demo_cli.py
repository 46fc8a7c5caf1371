"""`python demo.py --cli` on tiny weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path, parity_dir):
    model = {
        "arch": "minigpt4",
        "model_type": "pretrain_vicuna0",
        "image_size": 56,
        "vit_weights": str(parity_dir / "eva_vit_tiny.pth"),
        "vit_config": {"embed_dim": 64, "depth": 3, "num_heads": 4},
        "vit_precision": "fp32",
        "q_former_model": str(parity_dir / "blip2_tiny.pth"),
        "qformer_config": {
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 96,
        },
        "num_query_token": 8,
        "llama_model": str(parity_dir / "vicuna_tiny"),
        "llm_precision": "fp32",
        "ckpt": str(parity_dir / "minigpt4_tiny.pth"),
        "end_sym": "###",
    }
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
