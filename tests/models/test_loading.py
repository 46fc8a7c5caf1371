"""Vision files, projections and checkpoints of other models are refused with the reason."""

import shutil

import pytest
import torch
from torch import nn

from minigpt4.common.errors import WeightsError
from minigpt4.common.schemas.model import QFORMER_FILE, MiniGPT4Config
from minigpt4.models.loading import build_projection, load_trained, load_vision

VICUNA_7B, VICUNA_13B, QFORMER = 4096, 5120, 768


def projection(llm, vision=QFORMER):
    return {"llama_proj.weight": torch.zeros(llm, vision), "llama_proj.bias": torch.zeros(llm)}


def checkpoint(tmp_path, llm, vision=QFORMER):
    path = tmp_path / f"prerained_minigpt4_{llm}.pth"
    torch.save({"model": projection(llm, vision)}, path)
    return path


@pytest.mark.parametrize(
    ("made_for", "llm", "name"), [(VICUNA_13B, VICUNA_7B, "a 13B LLaMA"), (VICUNA_7B, VICUNA_13B, "a 7B LLaMA")]
)
def test_projection_of_another_llm_is_refused_by_the_size_it_was_made_for(tmp_path, made_for, llm, name):
    path = checkpoint(tmp_path, made_for)
    with pytest.raises(WeightsError) as error:
        load_trained(projection(llm), path, MiniGPT4Config(llama_model="weights/vicuna"))
    text = str(error.value)
    assert text.startswith(f"{path}: its projection goes from 768 to {made_for} channels, the model needs 768 to {llm}")
    assert f"It was trained for {name}, and model.llama_model is weights/vicuna" in text
    assert "docs/weights.md has the table of which projection goes with which LLM" in text


def test_projection_of_a_tiny_llm_is_refused_by_its_width(build_model, tmp_path):
    path = checkpoint(tmp_path, 120, vision=48)
    with pytest.raises(WeightsError) as error:
        build_model(ckpt=str(path))
    assert "its projection goes from 48 to 120 channels, the model needs 48 to 96" in str(error.value)
    assert "It was trained for an LLM of that width" in str(error.value)


def test_projection_of_another_vision_side_is_refused(build_model, parity_dir):
    path = parity_dir / "minigpt4_tiny_noqformer.pth"
    with pytest.raises(WeightsError) as error:
        build_model(ckpt=str(path))
    assert f"{path}: its projection goes from 256 to 96 channels, the model needs 48 to 96" in str(error.value)
    assert "check has_qformer, qformer_config, vit_model" in str(error.value)


def test_checkpoint_without_any_trained_weight_is_refused(build_model, parity_dir):
    with pytest.raises(WeightsError, match=r"missing: llama_proj.bias, llama_proj.weight\n  not expected: "):
        build_model(ckpt=str(parity_dir / "eva_vit_tiny.pth"))


@pytest.mark.parametrize("place", ["weights", "torch_home/hub/checkpoints"])
def test_published_names_are_found_where_the_original_code_kept_them(
    tiny_section, parity_dir, tmp_path, monkeypatch, place
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    (tmp_path / place).mkdir(parents=True)
    for source, name in (("eva_vit_tiny.pth", "eva_vit_g.pth"), ("blip2_tiny.pth", QFORMER_FILE)):
        shutil.copy(parity_dir / source, tmp_path / place / name)
    url = f"https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/{QFORMER_FILE}"
    encoder, _, q_former = load_vision(MiniGPT4Config(**tiny_section(vit_weights=None, q_former_model=url)))
    stored = torch.load(parity_dir / "blip2_tiny.pth", weights_only=True)["model"]
    assert torch.equal(q_former.query_tokens, stored["query_tokens"])
    assert encoder.model.cls_token.abs().max() > 0


@pytest.mark.parametrize(
    ("key", "name"), [("vit_weights", "eva_vit_g.pth"), ("q_former_model", "blip2_pretrained_flant5xxl.pth")]
)
def test_unset_file_that_is_nowhere_is_refused_by_key_and_name(tiny_section, tmp_path, monkeypatch, key, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match=rf"model\.{key}: {name} was not found .* set model\.{key} to it"):
        load_vision(MiniGPT4Config(**tiny_section(**{key: None})))


def test_one_layer_is_the_published_projection():
    layer = build_projection(MiniGPT4Config(), QFORMER, VICUNA_7B)
    assert isinstance(layer, nn.Linear)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 3_149_824


def test_three_layers_have_no_activation_between_them():
    layers = build_projection(MiniGPT4Config(proj_layers=3), 48, 96)
    assert [type(layer) for layer in layers] == [nn.Linear] * 3
    assert [tuple(layer.weight.shape) for layer in layers] == [(96, 48), (96, 96), (96, 96)]


def test_ln_vision_without_qformer_keeps_ones_and_zeros(tiny_section):
    _, ln_vision, q_former = load_vision(MiniGPT4Config(**tiny_section(has_qformer=False, q_former_model=None)))
    assert q_former is None
    assert torch.equal(ln_vision.weight, torch.ones(64))
    assert torch.equal(ln_vision.bias, torch.zeros(64))


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_vision_is_filled_in_its_16_bits_and_trained_vision_in_fp32(tiny_section, frozen):
    section = tiny_section(vit_precision="bf16", freeze_vit=frozen, freeze_qformer=frozen)
    encoder, _, q_former = load_vision(MiniGPT4Config(**section))
    expected = torch.bfloat16 if frozen else torch.float32
    for part in (encoder, q_former):
        assert {m.weight.dtype for m in part.modules() if isinstance(m, nn.Linear)} == {expected}


def test_the_only_numbers_from_no_file_are_the_zero_key_biases_of_the_vit(tiny_section):
    encoder, ln_vision, q_former = load_vision(MiniGPT4Config(**tiny_section()))
    assert [name for name, _ in encoder.model.named_buffers()] == [f"blocks.{i}.attn.k_bias" for i in range(3)]
    assert all(torch.equal(buffer, torch.zeros(64)) for buffer in encoder.model.buffers())
    assert [*ln_vision.buffers(), *q_former.buffers()] == []
