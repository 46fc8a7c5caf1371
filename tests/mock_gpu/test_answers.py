"""Answers on "cuda", and the report of `scripts/first_gpu_run.py`."""

import json
from pathlib import Path

REPOSITORY, ON_MOCK = Path(__file__).parents[2], Path(__file__).with_name("on_mock.py")
ENGINE = """
import sys
from types import SimpleNamespace
import torch
from PIL import Image
from minigpt4.common.config import Config
from minigpt4.conversation.chat import Chat
from minigpt4.conversation.decoding import Decoding
from minigpt4.serving.loading import load_engine

config = Config(SimpleNamespace(cfg_path=sys.argv[1], options=["run.device=cuda"]))
config.validate(training=False)
with load_engine(config, [], 1) as engine:
    chat = Chat(engine)
    chat.show(Image.new("RGB", (80, 60)))
    print("answer", len(chat.ask("What is it?", Decoding(max_new_tokens=8))))
    print("devices", {str(tensor.device) for tensor in engine.model.parameters()})
    print("first", torch.cuda.memory_allocated(0))
"""


def test_the_engine_answers_on_the_second_gpu_alone(mock_gpu, tiny, tmp_path):
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    done = mock_gpu(ON_MOCK, script, tiny.recipe, devices=2, cwd=tiny.folder, MOCK_CUDA_FILL="1")
    assert done.returncode == 0, done.stderr[-6000:]
    assert "devices {'cuda:1'}" in done.stdout
    assert "first 0" in done.stdout


def test_a_token_waits_for_the_gpu_once(mock_gpu):
    arguments = ("benchmarks/gpu_step.py", "train_configs/minigpt4_flickr_finetune.yaml", "--tokens", "8")
    done = mock_gpu(ON_MOCK, *arguments, cwd=REPOSITORY, MOCK_CUDA_FILL="1")
    assert done.returncode == 0, done.stderr[-6000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["waits"][2:]) == {1}
    assert max(result["launches"][2:]) < 1400


def test_the_first_gpu_run_reports_a_kill_and_the_resume(mock_gpu, tmp_path):
    report = tmp_path / "report.md"
    python = f"python {ON_MOCK}"
    arguments = ("scripts/first_gpu_run.py", "--only", "processes", "--report", report)
    done = mock_gpu(ON_MOCK, *arguments, cwd=REPOSITORY, PYTHON=python, FREE_STEPS="100")
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert "| kill -9 of one of 1, resume | ok |" in report.read_text()
