"""Which checkpoints fill a model; those of other models and vision sides are refused with the reason."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from minigpt4.common.binding import bind
from minigpt4.common.errors import WeightsError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models.loading import CheckpointSwitch, load_trained, load_vision, vision_fingerprints
from minigpt4.models.mini_gpt4 import MiniGPT4

VICUNA_7B, QFORMER = 4096, 768


def projection(llm, vision=QFORMER):
    return {"llama_proj.weight": torch.zeros(llm, vision), "llama_proj.bias": torch.zeros(llm)}


def test_projection_of_another_llm_is_refused_by_the_size_it_was_made_for(tmp_path):
    path = tmp_path / "prerained_minigpt4.pth"
    torch.save({"model": projection(5120)}, path)
    with pytest.raises(WeightsError) as error:
        load_trained(projection(VICUNA_7B), path, MiniGPT4Config(llama_model="weights/vicuna"))
    text = str(error.value)
    assert text.startswith(f"{path}: its projection goes from 768 to 5120 channels, not from 768 to 4096")
    assert "It was trained for a 13B LLaMA, and model.llama_model is weights/vicuna" in text
    assert "docs/weights.md" in text


def test_the_only_numbers_from_no_file_are_the_zero_key_biases_of_the_vit(tiny_section):
    encoder, ln_vision, q_former = load_vision(MiniGPT4Config(**tiny_section()))
    assert [name for name, _ in encoder.model.named_buffers()] == [f"blocks.{i}.attn.k_bias" for i in range(3)]
    assert all(torch.equal(buffer, torch.zeros(64)) for buffer in encoder.model.buffers())
    assert [*ln_vision.buffers(), *q_former.buffers()] == []


# What the card and the keys say


@pytest.mark.parametrize("allowed", [[], ["llama_model.*"]])
@pytest.mark.parametrize("name", ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "prompt_encoder"])
def test_a_file_with_lora_weights_or_a_soft_prompt_is_refused_as_such(tmp_path, name, allowed):
    path = tmp_path / "minigptv2_checkpoint.pth"
    torch.save({"model": {**projection(VICUNA_7B, 5632), f"llama_model.{name}": torch.zeros(8, 4096)}}, path)
    with pytest.raises(WeightsError) as error:
        load_trained(projection(VICUNA_7B), path, MiniGPT4Config(ckpt_allow_keys=allowed))
    assert str(error.value).startswith(f"{path}: holds 1 trained weights of its LLM (such as llama_model.{name})")
    assert "ckpt_allow_keys" not in str(error.value)


@pytest.mark.parametrize(
    "made_with",
    [{"llm_fingerprint": torch.ones(3)}, {"vision_fingerprints": {"vit_weights": torch.ones(3)}}],
    ids=["llm", "vision"],
)
def test_a_checkpoint_with_other_things_for_fingerprints_is_refused(build_model, parity_dir, tmp_path, made_with):
    content = torch.load(parity_dir / "minigpt4_tiny.pth", weights_only=True)
    path = tmp_path / "odd.pth"
    torch.save({"model": content["model"], "state": {"made_with": made_with}}, path)
    with pytest.raises(WeightsError) as error:
        build_model(ckpt=str(path))
    assert str(error.value).startswith(str(path))


@pytest.fixture
def with_card(tmp_path, parity_dir):
    """A copy of the published tiny checkpoint, with a card."""

    def make(**card):
        path = tmp_path / "checkpoint_0.pth"
        shutil.copy(parity_dir / "minigpt4_tiny.pth", path)
        path.with_suffix(".json").write_text(json.dumps({"sha256": "", **card}))
        return str(path)

    return make


VISION = {"vit_weights": "0" * 16}


@pytest.mark.parametrize("waits", [False, True])
def test_a_card_of_another_vision_side_is_refused_loaded_or_waiting(with_card, tiny_section, waits):
    path = with_card(vision_fingerprints=VISION)
    with pytest.raises(WeightsError, match=f"{path}: .*model.vit_weights is .*eva_vit_tiny.*model.ckpt_any_vision"):
        MiniGPT4.from_config(tiny_section(ckpt=path), lazy_vision=waits)
    MiniGPT4.from_config(tiny_section(ckpt=path, ckpt_any_vision=True), lazy_vision=waits)


def test_ckpt_any_llm_is_about_the_llm_alone(with_card, build_model):
    build_model(ckpt=with_card(llm_fingerprint="0" * 16), ckpt_any_llm=True)
    with pytest.raises(WeightsError, match=r"model.llama_model is .*model.ckpt_any_llm: True"):
        build_model(ckpt=with_card(llm_fingerprint="0" * 16), ckpt_any_vision=True)


def test_a_server_does_not_change_to_a_checkpoint_of_another_vision_side(with_card, build_model):
    model = build_model()
    before = model.llama_proj.weight.clone()
    with pytest.raises(WeightsError, match="another vision side"):
        CheckpointSwitch(model).load(with_card(vision_fingerprints=VISION))
    assert torch.equal(model.llama_proj.weight, before)


def test_the_fingerprint_is_that_of_the_numbers_not_of_the_file(tiny_section, tmp_path, parity_dir):
    def fingerprints(**changes):
        return vision_fingerprints(bind(MiniGPT4Config, tiny_section(**changes), section="model", source="test"))

    state = torch.load(parity_dir / "eva_vit_tiny.pth", weights_only=True)
    save_file(state, tmp_path / "vit.safetensors")
    torch.save({"model": {f"module.{name}": t.float() for name, t in state.items()}}, tmp_path / "vit.pth")
    as_published = fingerprints()
    assert fingerprints(freeze_qformer=False).keys() == {"vit_weights"}, (
        "a part that is trained is the checkpoint's own"
    )
    for name in ("vit.safetensors", "vit.pth"):
        assert fingerprints(vit_weights=str(tmp_path / name), vit_precision="bf16", image_size=84) == as_published
    state["blocks.2.mlp.fc2.bias"] += 1
    torch.save(state, tmp_path / "other.pth")
    assert fingerprints(vit_weights=str(tmp_path / "other.pth"))["vit_weights"] != as_published["vit_weights"]


@pytest.mark.parametrize(("allowed", "text"), [([], "of another model"), (["*"], "ckpt_allow_keys leaves nothing")])
def test_a_checkpoint_of_another_model_is_refused_whatever_keys_may_differ(tmp_path, allowed, text):
    torch.save({"mm_projector.weight": torch.ones(2, 2)}, tmp_path / "w.bin")
    with pytest.raises(WeightsError) as error:
        load_trained(projection(8), tmp_path / "w.bin", MiniGPT4Config(ckpt_allow_keys=allowed))
    assert str(error.value).startswith(str(tmp_path / "w.bin"))
    assert text in str(error.value)
    assert allowed or "ckpt_allow_keys" not in str(error.value)


# Checkpoints of this model


@pytest.mark.parametrize(
    ("file", "has_qformer"),
    [("minigpt4_tiny.pth", True), ("train_main_checkpoint_0.pth", True), ("minigpt4_tiny_noqformer.pth", False)],
)
def test_checkpoints_of_the_reference_load(build_model, parity_dir, file, has_qformer):
    path = parity_dir / file
    model = build_model(has_qformer=has_qformer, ckpt=str(path))
    stored = torch.load(path, weights_only=True)["model"]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.trainable_parameters().items())


def test_buffers_of_published_checkpoints_are_not_read(build_model, golden, parity_dir, changed_weights):
    buffers = golden["checkpoints"]["buffers_kept_in_checkpoints"]

    def spoil(state):
        for name in buffers:
            state[name] = torch.zeros(1)

    model = build_model(ckpt=str(changed_weights(parity_dir / "minigpt4_tiny.pth", spoil)))
    inverse = model.llama_model.model.rotary_emb.inv_freq
    torch.testing.assert_close(inverse, 10000 ** (-torch.arange(0, 24, 2) / 24))


@pytest.mark.parametrize("frozen", ["freeze_qformer", "freeze_vit"])
def test_checkpoint_with_more_trained_parts_loads_where_they_are_trained_and_else_says_what_to_set(
    build_model, tmp_path, frozen
):
    state = dict(build_model(ckpt=None, **{frozen: False}).trainable_parameters())
    torch.save({"model": {name: parameter.detach() + 1 for name, parameter in state.items()}}, tmp_path / "more.pth")
    model = build_model(ckpt=str(tmp_path / "more.pth"), **{frozen: False})
    assert all(torch.equal(tensor, state[name] + 1) for name, tensor in model.trainable_parameters().items())
    with pytest.raises(WeightsError) as error:
        build_model(ckpt=str(tmp_path / "more.pth"))
    assert f"{tmp_path / 'more.pth'} does not fit the model.\n  not expected: " in str(error.value)
    assert f"model.{frozen}: False" in str(error.value)


def test_named_keys_may_be_missing_or_left_over(build_model, parity_dir, changed_weights):
    def change(state):
        del state["llama_proj.bias"]
        state["lora.weight"] = torch.ones(1)

    path = changed_weights(parity_dir / "minigpt4_tiny.pth", change)
    text = rf"{path} does not fit.*\n  missing: llama_proj.bias\n  not expected: lora.weight\n.*model.ckpt_allow_keys"
    with pytest.raises(WeightsError, match=text):
        build_model(ckpt=str(path))
    model = build_model(ckpt=str(path), ckpt_allow_keys=["lora.*", "llama_proj.bias"])
    stored = torch.load(path, weights_only=True)["model"]
    assert torch.equal(model.llama_proj.weight, stored["llama_proj.weight"])
