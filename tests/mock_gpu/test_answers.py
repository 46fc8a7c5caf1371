"""Answers on "cuda", and the report of `scripts/first_gpu_run.py`."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ENGINE = """
import ctypes
import sys
from types import SimpleNamespace
import torch
from PIL import Image
from minigpt4.common.config import Config
from minigpt4.conversation.chat import Chat
from minigpt4.conversation.decoding import Decoding
from minigpt4.serving.loading import load_engine

count = ctypes.CDLL(None).mock_graph_count
config = Config(SimpleNamespace(cfg_path=sys.argv[1], options=["run.device=cuda", *sys.argv[2:]]))
config.validate(training=False)
with load_engine(config, [], 1) as engine:
    chat = Chat(engine)
    chat.show(Image.new("RGB", (80, 60)))
    print("answer", len(chat.ask("What is it?", Decoding(max_new_tokens=24))))
    print("devices", {str(tensor.device) for tensor in engine.model.parameters()})
    graphs = [engine.model.token_graphs, engine.model._vision_graphs]
    print("graphs", [one and one.works for one in graphs], count(1))
    print("first", torch.cuda.memory_allocated(0))
"""


@pytest.mark.parametrize(
    ("options", "graphs"),
    [((), "[None, None] 0"), (("model.vit_cuda_graph=True", "model.llm_cuda_graph=True"), "[True, True] 15")],
    ids=["plain", "graphs"],
)
def test_the_engine_answers_on_the_second_gpu_alone(mock_gpu, tiny, tmp_path, options, graphs):
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    done = mock_gpu(script, tiny.recipe, *options, devices=2, cwd=tiny.folder, MOCK_CUDA_FILL="1")
    assert f"graphs {graphs}" in done.stdout
    assert "devices {'cuda:1'}" in done.stdout
    assert "first 0" in done.stdout


@pytest.mark.parametrize(
    ("options", "launches"),
    [(("--tokens", "8"), 1400), (("--tokens", "12", "--batch", "3", "--options", "model.llm_cuda_graph=True"), 20)],
    ids=["plain", "graph"],
)
def test_a_token_waits_for_the_gpu_once_and_a_graph_reads_it_by_a_handful_of_launches(gpu_step, options, launches):
    result = gpu_step("minigpt4_flickr_finetune", *options, MOCK_CUDA_FILL="1")
    assert set(result["waits"][2:]) == {1}
    assert max(result["launches"][-2:]) < launches


def test_the_first_gpu_run_reports_a_kill_and_the_resume(mock_gpu, tmp_path):
    report = tmp_path / "report.md"
    python = f"python {REPOSITORY / 'tests/mock_gpu/on_mock.py'}"
    mock_gpu("scripts/first_gpu_run.py", "--only", "processes", "--report", report, PYTHON=python, FREE_STEPS="100")
    assert "| kill -9 of one of 1, resume | ok |" in report.read_text()
