"""The task of the three recipes: which prompt a step uses, and the captions it shows."""

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


def test_name_of_the_recipes_gives_the_task():
    assert type(setup_task(SimpleNamespace(run=SimpleNamespace(task="image_text_pretrain")))) is ImageTextPretrainTask


def test_unknown_name_names_the_known_ones():
    with pytest.raises(RegistryError, match="image_text_pretrain"):
        setup_task(SimpleNamespace(run=SimpleNamespace(task="image_text_pretrian")))


def test_training_draws_from_all_prompts(model, samples):
    expected = {round(_loss(model, samples, prompt), 4) for prompt in model.prompt_list}
    assert len(expected) == 4
    drawn = {round(TASK.train_step(model, samples)["loss"].item(), 4) for _ in range(60)}
    assert drawn == expected


def test_validation_always_uses_the_first_prompt(model, samples):
    losses = {TASK.valid_step(model, samples)["loss"].item() for _ in range(8)}
    assert losses == {_loss(model, samples, model.prompt_list[0])}


def test_validation_needs_no_gradient_and_leaves_the_prompts(model, samples):
    prompts = list(model.prompt_list)
    assert not TASK.valid_step(model, samples)["loss"].requires_grad
    assert model.prompt_list == prompts


def test_prompts_are_back_after_a_validation_batch_that_fails(model, samples):
    prompts = list(model.prompt_list)
    with pytest.raises(SampleError):
        TASK.valid_step(model, {**samples, "image": samples["image"][..., :-1]})
    assert model.prompt_list == prompts


def test_number_of_targets_is_told(model, samples):
    tokenizer = model.llama_tokenizer
    answers = [tokenizer(answer + "###", add_special_tokens=False)["input_ids"] for answer in samples["answer"]]
    assert TASK.train_step(model, samples)["num_tokens"] == sum(map(len, answers))


def test_captions_are_greedy_answers_to_the_first_prompt_up_to_the_end_symbol(model, samples):
    expected = model.generate(samples["image"], model.prompt_list[:1] * 2, max_new_tokens=100, stop=["###"])
    assert TASK.caption(model, samples["image"]) == expected


def test_captions_of_a_model_without_prompts_follow_the_image(model, samples):
    prompts, model.prompt_list = model.prompt_list, []
    try:
        captions = TASK.caption(model, samples["image"])
    finally:
        model.prompt_list = prompts
    assert captions == model.generate(samples["image"], ["<ImageHere>"] * 2, max_new_tokens=100, stop=["###"])


def test_task_of_ones_own_that_captions_nothing_shows_nothing(model, samples):
    assert BaseTask().caption(model, samples["image"]) == []
