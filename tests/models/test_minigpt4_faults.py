"""Wrong sections, files and samples end in an error that says what, where and what to do."""

import pytest
import torch

from minigpt4.common.errors import ConfigError, SampleError, WeightsError
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.models.prompting import read_samples

# Sections


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"llama_model": None}, ConfigError, "model.llama_model: not set"),
        ({"llama_model": ""}, ConfigError, "model.llama_model: not set"),
        ({"llm_precision": "int8"}, WeightsError, "model.llm_precision: int8 needs a CUDA GPU"),
        ({"llm_precision": "nf4"}, WeightsError, "model.llm_precision: nf4 needs a CUDA GPU"),
        ({"low_resource": True}, WeightsError, "low_resource: False"),
        ({"prompt_template": "tokenizer"}, ConfigError, "has no chat template"),
    ],
)
def test_sections_that_do_not_work_are_refused(build_model, changes, kind, text):
    with pytest.raises(kind) as error:
        build_model(**changes)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("key", "name"), [("vit_weights", "eva.pth"), ("q_former_model", "blip2.pth"), ("ckpt", "stage1.pth")]
)
def test_missing_weights_file_names_its_key(build_model, tmp_path, key, name):
    with pytest.raises(WeightsError) as error:
        build_model(**{key: str(tmp_path / name)})
    assert f"model.{key}: there is no file {tmp_path / name}" in str(error.value)
    assert "python scripts/download_weights.py --list" in str(error.value)


@pytest.mark.parametrize(
    "samples", [{"answer": ["a dog"]}, {"conv_q": ["What? "], "conv_a": ["a dog"], "connect_sym": ["!@#"]}], ids=str
)
def test_max_txt_len_without_room_beside_the_end_symbol_is_refused(shared_model, samples):
    with pytest.raises(ConfigError, match=r"model\.max_txt_len: 2 leaves no room beside end_sym '###'"):
        shared_model(max_txt_len=2, end_sym="###")(samples)


# Samples


def sample(pool, **changes):
    entry = {"image": pool[:2], "answer": ["a dog", "a cat"], "image_id": ["41", "42"]}
    return {name: value for name, value in (entry | changes).items() if value is not None}


ONE, TWO = "<Img><ImageHere></Img> What? ", "<Img><ImageHere></Img> and <Img><ImageHere></Img> "


@pytest.mark.parametrize(
    ("instructions", "changes", "text"),
    [
        ([ONE, "What? "], {}, "sample 1 of the batch (image_id 42): the prompt has 0 <ImageHere>, but 1 images"),
        ([TWO, ONE], {"image_id": None}, "sample 0 of the batch: the prompt has 2 <ImageHere>, but 1 images"),
        (ONE, {"image": None}, "sample 0 of the batch (image_id 41): the prompt has 1 <ImageHere>, but 0 images"),
        (TWO, {"length": [2, 1]}, "sample 1 of the batch (image_id 42): the prompt has 2 <ImageHere>, but 1 images"),
    ],
)
def test_placeholders_that_do_not_fit_the_images_name_the_sample(model, pool, instructions, changes, text):
    if "length" in changes:
        changes = {"image": pool.unflatten(0, (2, 3)), "length": torch.tensor(changes["length"])}
    with pytest.raises(SampleError) as error:
        model(sample(pool, instruction_input=instructions, **changes))
    assert str(error.value).startswith(text)


def test_sample_with_nothing_to_train_on_names_its_image(shared_model, pool):
    with pytest.raises(SampleError) as error:
        shared_model(end_sym="")(sample(pool, answer=["a dog", ""]))
    expected = "sample 1 of the batch (image_id 42): nothing to train on, its answer and end_sym are empty"
    assert str(error.value) == expected


# What the reference fails on (forward.reference_failures); generation's are in test_minigpt4_generate.py


def test_conversation_without_template_works_and_takes_questions_as_they_are(shared_model, pool):
    model = shared_model(max_txt_len=160, end_sym="###")
    conversation = {
        "image": pool[:1],
        "conv_q": ["<Img><ImageHere></Img> Who? !@#Why? "],
        "conv_a": ["A man.!@#No idea."],
        "connect_sym": ["!@#"],
    }
    batch, _ = model.training_batch(read_samples(conversation))
    tokens = [model.llama_tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Why? ", "No idea.###")]
    assert batch.ids_BT[0].tolist()[-len(tokens[1]) - len(tokens[0]) - 1 :] == [1, *tokens[0], *tokens[1]]
    assert model(conversation)["loss"].isfinite()


def test_all_answers_empty_with_an_end_symbol_teach_the_end_alone(shared_model, pool):
    model = shared_model(end_sym="###")
    batch, _ = model.training_batch(read_samples(sample(pool, answer=["", ""])))
    end = model.llama_tokenizer("###", add_special_tokens=False)["input_ids"]
    assert [row[row != -100].tolist() for row in batch.targets_BT] == [end, end]


def test_section_may_be_plain_yaml_of_omegaconf(tiny_section):
    from omegaconf import OmegaConf

    model = MiniGPT4.from_config(OmegaConf.create(tiny_section(max_txt_len=77)))
    assert model.max_txt_len == 77
