"""The adapter in lmms-eval's own evaluator, on two tasks on disk and tiny weights: the answers are the model's own."""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from minigpt4.common.binding import bind
from minigpt4.common.config import MODEL_SCHEMAS
from minigpt4.common.errors import ConfigError
from minigpt4.models import MiniGPT4
from minigpt4.processors import Blip2ImageEvalProcessor

REPOSITORY = Path(__file__).parents[2]
RUN = Path(__file__).with_name("lmms_eval_run")
REQUIRED = "MINIGPT4_LMMS_EVAL_TESTS"
"""Set to `required`, as `.ci/run` does, a missing lmms-eval is a failure; else the tests are skipped."""
LACK = "lmms-eval or this checkout is not installed: pip install lmms-eval; pip install -e ."
TEMPLATE = "###Human: {} ###Assistant: "
TAG = "<Img><ImageHere></Img>"
DOCUMENTS = [
    {"question": "Which one?", "images": 1, "answer": 1, "choices": ["cat", "two dogs", "a"]},
    {"question": "Is <image> in <image> or not at all, what do you think?", "images": 2, "answer": 0},
    {"question": "Say something.", "images": 0, "answer": 0},
    {"question": "What do these have in common?", "images": 2, "answer": 1},
    {"question": "Why?", "images": 1, "answer": 0},
]
CHOICES = ["no", "yes, it is"]
PROMPTS = [
    f"{TAG} Which one?",
    f"Is {TAG} in {TAG} or not at all, what do you think?",
    "Say something.",
    f"{TAG} {TAG} What do these have in common?",
    f"{TAG} Why?",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, parity_dir, tiny_section) -> Path:
    """Images, documents, tasks and the configuration of a tiny model."""
    folder = tmp_path_factory.mktemp("lmms")
    random = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(random.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    lines = [
        {"choices": CHOICES, **document, "images": [str(folder / f"{n}.png") for n in range(document["images"])]}
        for document in DOCUMENTS
    ]
    (folder / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copytree(RUN, folder / "tasks", ignore=shutil.ignore_patterns("run.py", "__pycache__"))
    for task in (folder / "tasks").glob("*.yaml"):
        task.write_text(task.read_text().replace("DOCUMENTS", str(folder / "documents.jsonl")))
    start = torch.load(parity_dir / "minigpt4_tiny.pth", weights_only=True)["model"]
    torch.save({"model": {name: 1.5 * tensor for name, tensor in start.items()}}, folder / "other.pth")
    model = tiny_section(arch="minigpt4", model_type="pretrain_vicuna0", end_sym="###", prompt_template=TEMPLATE)
    config = {"model": model, "datasets": {}, "run": {"task": "image_text_pretrain"}}
    (folder / "model.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict:
    """What lmms_eval_run/run.py found out."""
    known = importlib.metadata.entry_points(group="lmms_eval.models").names
    if importlib.util.find_spec("lmms_eval") is None or "minigpt4" not in known:
        if os.environ.get(REQUIRED) == "required":
            pytest.fail(f"{REQUIRED} is 'required', but {LACK}")
        pytest.skip(LACK)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "cache")}
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **offline, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(RUN / "run.py"), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert result.returncode == 0, result.stderr[-6000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def models(folder) -> list[MiniGPT4]:
    """The model without lmms-eval, and that with the checkpoint that `--model_args` names."""
    section, models = yaml.safe_load((folder / "model.yaml").read_text())["model"], []
    for own in (section, section | {"ckpt": str(folder / "other.pth")}):
        config = bind(MODEL_SCHEMAS["minigpt4"], own, section="model", source="model.yaml")
        models.append(MiniGPT4.from_config(config).eval())
    return models


@pytest.fixture(scope="module")
def pixels(folder) -> torch.Tensor:
    """Both images, (2, 3, 56, 56)."""
    processor = Blip2ImageEvalProcessor(image_size=56)
    return torch.stack([processor(Image.open(folder / f"{number}.png")) for number in range(2)])


def _images(pixels: torch.Tensor, count: int) -> list[torch.Tensor | None]:
    return [pixels[:count] if count else None]


def _answer(model: MiniGPT4, pixels: torch.Tensor, text: str, **keys) -> str:
    keys = {"max_new_tokens": 6, "stop": ["###"], "top_p": 1.0, **keys}
    return model.generate(_images(pixels, text.count(TAG)), [TEMPLATE.format(text)], **keys)[0]


# In lmms-eval's evaluator


def test_answers_of_a_task_are_those_of_generate_in_the_order_of_the_documents(found, models, pixels):
    wanted = [_answer(models[0], pixels, prompt, max_new_tokens=8, stop=[".", "###"]) for prompt in PROMPTS]
    assert [answer for (answer,) in found["samples"]["tiny_answers"]] == wanted
    assert len(set(wanted)) > 1
    mean = found["results"]["tiny_answers"]["length,none"]
    assert mean == pytest.approx(sum(map(len, wanted)) / len(wanted))


def test_likeliest_choice_of_a_task_is_taken(found, models, pixels):
    right = 0
    for said, document, prompt in zip(found["samples"]["tiny_choices"], DOCUMENTS, PROMPTS, strict=True):
        choices = document.get("choices", CHOICES)
        images = _images(pixels, document["images"]) * len(choices)
        wanted = models[0].log_likelihoods(images, [TEMPLATE.format(prompt)] * len(choices), choices)
        assert [loss for loss, _ in said] == pytest.approx([-score for score, _ in wanted], abs=1e-4)
        right += int(np.argmax([score for score, _ in wanted])) == document["answer"]
    assert found["results"]["tiny_choices"]["acc,none"] == pytest.approx(right / len(DOCUMENTS))


# Single requests


def test_decodings_may_differ_and_images_stand_where_the_text_says_or_before_it(found, models, pixels):
    text, other = f"{TAG} What is it?", models[1]
    assert found["answers"] == {
        "plain": _answer(other, pixels, text),
        "stopped": _answer(other, pixels, text, stop=["e", "###"]),
        "beams": _answer(other, pixels, text, num_beams=2),
        "unknown": _answer(other, pixels, text),
        "marked": _answer(other, pixels, f"First {TAG} then {TAG}?"),
        "before": _answer(other, pixels, f"{TAG} {TAG} Which differ?"),
        "text": _answer(other, pixels, "Say it."),
    }
    first, second = found["drawn"]  # at a temperature above zero
    assert first != second


def test_losses_of_targets_and_of_text_alone(found, models, pixels):
    two, one = TEMPLATE.format(f"{TAG} {TAG} What?"), TEMPLATE.format(f"{TAG} What?")
    wanted = [
        *models[1].log_likelihoods([pixels], [two], ["2 images"]),
        *models[1].log_likelihoods([pixels[:1]], [one], ["no"]),
        *models[1].log_likelihoods(None, [TEMPLATE.format("")], ["no"]),
    ]
    assert [loss for loss, _ in found["losses"]] == pytest.approx([-score for score, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found["losses"]] == [greedy for _, greedy in wanted]


@pytest.mark.parametrize(
    ("attempt", "text"),
    [
        ("sound", "SampleError: drawn, test, document 3: only images"),
        ("marks", "SampleError: drawn, test, document 1: the text has 1 <image>, but there are 2 images"),
        ("rounds", "ConfigError: the adapter for lmms-eval does not support multi-round tasks"),
        ("argument", "ConfigError: --model_args: unknown: chekpoint"),
        ("no file", "ConfigError: --model_args: cfg_path is missing"),
        ("batch", "ConfigError: --batch_size: 'auto'"),
        ("checkpoint", "model.ckpt: gone.pth does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_reason(found, attempt, text):
    assert text in found["errors"][attempt]


def test_missing_lmms_eval_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)  # importing it is an error
    monkeypatch.delitem(sys.modules, "minigpt4.evaluation.lmms_eval_adapter", raising=False)
    with pytest.raises(ConfigError, match=r"the adapter for lmms-eval needs that package, 0.7: pip install lmms-eval"):
        importlib.import_module("minigpt4.evaluation.lmms_eval_adapter")
