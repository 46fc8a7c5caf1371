"""The task of the three recipes: which prompt a step uses, and the captions it shows."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minigpt4.common.errors import RegistryError, SampleError
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.tasks import BaseTask, ImageTextPretrainTask, setup_task

TASK = ImageTextPretrainTask()


@pytest.fixture(scope="module")
def model(parity_dir: Path, tiny_section: Callable) -> MiniGPT4:
    """The reference's tiny model with its four prompts."""
    prompts = str(parity_dir / "prompts_tiny.txt")
    section = tiny_section(prompt_path=prompts, prompt_template="###Human: {} ###Assistant: ", end_sym="###")
    return MiniGPT4.from_config(section).eval()


@pytest.fixture(scope="module")
def samples(golden_tensors) -> dict:
    images = torch.stack([golden_tensors[f"images/img{index}/train"] for index in range(2)])
    return {"image": images, "answer": ["A cat looks out of the window.", "Snow."], "image_id": ["0", "1"]}


def _loss(model, samples, prompt: str) -> float:
    with torch.no_grad():
        return model({**samples, "instruction_input": [prompt] * 2})["loss"].item()


def test_task_is_found_by_the_recipes_name_and_another_name_is_told_the_known_ones():
    assert type(setup_task(SimpleNamespace(run=SimpleNamespace(task="image_text_pretrain")))) is ImageTextPretrainTask
    with pytest.raises(RegistryError, match="image_text_pretrain"):
        setup_task(SimpleNamespace(run=SimpleNamespace(task="image_text_pretrian")))


def test_training_draws_from_all_prompts(model, samples):
    expected = {round(_loss(model, samples, prompt), 4) for prompt in model.prompt_list}
    assert len(expected) == 4
    random.seed(0)
    drawn = {round(TASK.train_step(model, samples)["loss"].item(), 4) for _ in range(16)}
    assert drawn == expected


def test_validation_uses_the_first_prompt_without_gradients_and_leaves_the_prompts(model, samples):
    prompts = list(model.prompt_list)
    outputs = [TASK.valid_step(model, samples) for _ in range(8)]
    assert {output["loss"].item() for output in outputs} == {_loss(model, samples, prompts[0])}
    assert not outputs[0]["loss"].requires_grad
    with pytest.raises(SampleError):
        TASK.valid_step(model, {**samples, "image": samples["image"][..., :-1]})
    assert model.prompt_list == prompts


def test_number_of_targets_is_told(model, samples):
    tokenizer = model.llama_tokenizer
    answers = [tokenizer(answer + "###", add_special_tokens=False)["input_ids"] for answer in samples["answer"]]
    assert TASK.train_step(model, samples)["num_tokens"] == sum(map(len, answers))


@pytest.mark.parametrize("has_prompts", [True, False])
def test_captions_are_greedy_answers_to_the_first_prompt_or_to_the_image(model, samples, monkeypatch, has_prompts):
    monkeypatch.setattr(model, "prompt_list", model.prompt_list if has_prompts else [])
    prompt = model.prompt_list[0] if has_prompts else "<ImageHere>"
    expected = model.generate(samples["image"], [prompt] * 2, max_new_tokens=100, stop=["###"])
    assert TASK.caption(model, samples["image"]) == expected
    assert BaseTask().caption(model, samples["image"]) == []
