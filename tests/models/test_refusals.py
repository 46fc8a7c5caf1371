"""Sections and samples that cannot work are refused by key, file or sample, with what to do."""

from pathlib import Path

import pytest
import torch

from minigpt4.common.errors import ConfigError, MiniGPT4Error, SampleError
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.models.prompting import read_samples

MINIGPT4, LLAVA = (Path(__file__).parents[1] / "data" / name for name in ("parity", "parity_llava"))
LORA = {"rule": "lora", "r": 4}
RESNET = {"vit_model": "resnet10t", "vit_config": {}}
SECTIONS = [
    ({"llama_model": None}, "model.llama_model: not set"),
    ({"vit_weights": "gone.pth"}, "model.vit_weights: there is no file gone.pth"),
    ({"q_former_model": "gone.pth"}, "model.q_former_model: there is no file gone.pth"),
    ({"ckpt": "gone.pth"}, "model.ckpt: there is no file gone.pth"),
    ({"ckpt": "gone.pth"}, "python scripts/download_weights.py --list"),
    ({"vit_weights": None}, "model.vit_weights: eva_vit_g.pth was not found"),
    ({"q_former_model": None}, "model.q_former_model: blip2_pretrained_flant5xxl.pth was not found"),
    ({"llm_precision": "int8"}, "model.llm_precision: int8 needs a CUDA GPU"),
    ({"train": {"llm": "qlora"}, "llm_precision": "fp16"}, "model.llm_precision: nf4 needs a CUDA GPU"),
    ({"low_resource": True}, "low_resource: False"),
    ({"prompt_template": "tokenizer"}, "has no chat template"),
    # The vision side
    ({"image_size": 60}, "model.image_size: 60 is not a multiple of the patch size 14"),
    ({"vit_config": {"embed_dim": 64, "depth": 3, "num_heads": 5}}, "model.vit_config: embed_dim"),
    ({"vit_layer": -4}, "model.vit_layer: -4 must be from -3 to -1"),
    ({"qformer_config": {"hidden_size": 50, "num_attention_heads": 4}}, "model.qformer_config: hidden_size 50"),
    ({"vit_model": "vit_tinny_patch16_224", "vit_config": {}}, "near: vit_tiny_patch16_224"),
    (RESNET | {"vit_config": {"depth": 3}}, "model.vit_config: ['depth'] for resnet10t"),
    (RESNET | {"vit_weights": None}, "model.vit_weights: not set"),
    ({"connector": "qformer", "has_qformer": False}, "model.connector: qformer does not go with has_qformer: False"),
    ({"vit_prefix": "drop"}, "model.vit_prefix: drop does not go with a Q-Former"),
    ({"proj_layers": 3, "projection": "linear"}, "model.projection: linear does not go with proj_layers: 3"),
    # CUDA graphs
    ({"vit_cuda_graph": True, "freeze_vit": False}, "model.vit_cuda_graph: True needs a frozen vision side"),
    ({"vit_cuda_graph": True, "freeze_qformer": False}, "model.vit_cuda_graph: True needs a frozen vision side"),
    ({"llm_cuda_graph": True, "llm_precision": "int8"}, "model.llm_cuda_graph: int8 waits for the GPU"),
    ({"llm_cuda_graph": True, "low_resource": True}, "model.llm_cuda_graph: int8 waits for the GPU"),
    # What is trained
    ({"train": {"llm": {"rule": "last", "blocks": 4}}}, "model.train.llm.blocks: 4, but there are only 3"),
    ({"train": {"vision": {"rule": "last", "blocks": 9}}}, "model.train.vision.blocks: 9, but there are only 3"),
    ({"train": {"llm": LORA | {"target_modules": ["query"]}}}, "model.train.llm.target_modules"),
    ({"train": {"projection": {"rule": "frozen", "lr": 1e-3}}}, "model.train.projection.lr: it is frozen"),
    ({"train": {"connector": {"lr": 1e-3}}}, "model.train.connector.lr: it is frozen"),
    ({"train": {"vision": "frozen"}, "freeze_vit": False}, "model.train.vision: frozen, but freeze_vit: False"),
    ({"train": {"llm": LORA}, "lora_r": 8}, "model.lora_r: cannot stand beside train.llm"),
    ({"train": {"llm": {"rule": "full", "r": 8}}}, "model.train.llm.r: r, alpha, dropout, target_modules go with"),
    ({"train": {"llm": LORA | {"alhpa": 8}}}, "model.train.llm.alhpa: unknown key; did you mean 'alpha'"),
    ({"train": {"vision": "head"}}, "model.train.vision: head is for the LLM; take last"),
    ({"train": {"llm": "head"}, "llm_precision": "fp16"}, "set it to fp32 (master weights) or bf16"),
    ({"train": {"llm": "full"}, "llm_precision": "nf4"}, "set it to fp32 (master weights) or bf16"),
    # Checkpoints of other parts
    ({"train": {"llm": "full"}}, "model.ckpt_allow_keys: ['llama_model.*']"),
    ({"ckpt": str(MINIGPT4 / "minigpt4_tiny_noqformer.pth")}, "tiny_noqformer.pth: its projection goes from 256"),
    ({"ckpt": str(MINIGPT4 / "eva_vit_tiny.pth")}, "missing: llama_proj.bias, llama_proj.weight\n  not expected: "),
]
LLAVA_SECTIONS = [
    ({"conv_template": "v2"}, "model.conv_template: 'v2' should be 'plain'"),
    ({"conv_template": "mpt", "reference_masks": True}, "model.reference_masks: not with ChatML templates"),
    ({"end_sym": "###"}, "model.end_sym: conv_template says it"),
    ({"prompt_template": "{}"}, "model.prompt_template: conv_template says it"),
    ({"projection": "mlp_gelu"}, "model.projection: 'mlp_gelu' must be linear, linear3, identity or mlpNx_gelu"),
    ({"projection": "identity"}, "model.projection: identity does not fit: the image features have 32 channels"),
    ({"projection": "mlp3x_gelu", "ckpt": str(LLAVA / "projector_linear.bin")}, "missing: llama_proj.0.bias"),
    ({"ckpt": str(LLAVA / "stage2_linear/model.safetensors")}, "name its folder as model.llama_model"),
]


@pytest.mark.parametrize(
    ("build", "section", "text"),
    [
        *(("build_model", section, text) for section, text in SECTIONS),
        *(("build_llava", section, text) for section, text in LLAVA_SECTIONS),
    ],
)
def test_a_section_that_cannot_work_is_refused(request, tmp_path, monkeypatch, build, section, text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MiniGPT4Error) as error:
        request.getfixturevalue(build)(**section)
    assert text in str(error.value)


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
