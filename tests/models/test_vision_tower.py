"""Towers from CLIP and SigLIP directories and of timm, any layer, every connector: against transformers and by hand."""

import json

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models.loading import feature_shape, load_vision
from minigpt4.models.vision_tower import tower_pixels

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"patch_size": 14, "image_size": 56}
MEAN = [0.48, 0.46, 0.41]


@pytest.fixture
def directory(tmp_path):
    """`directory(kind)`: a tiny model as transformers saves it, and the vision model itself."""

    def make(kind: str):
        torch.manual_seed(0)
        if kind == "siglip":
            vision = model = SiglipVisionModel(SiglipVisionConfig(**SIZES))
        elif kind == "clip vision":
            vision = model = CLIPVisionModel(CLIPVisionConfig(**SIZES))
        else:
            text = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
            settings = CLIPVisionConfig(**SIZES).to_dict()
            model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=settings))
            vision = model.vision_model
        path = tmp_path / kind.replace(" ", "_")
        model.save_pretrained(path)
        processor = {"image_mean": MEAN, "image_std": [0.27, 0.26, 0.28]}
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
        return path, vision.eval()

    return make


def vision_of(path, **changes):
    section = {"vit_model": str(path), "vit_precision": "fp32", "connector": "identity"}
    cfg = MiniGPT4Config(**section | changes)
    tower, ln_vision, connector = load_vision(cfg)
    return cfg, lambda image: connector(ln_vision(tower.eval()(image)))


@pytest.mark.parametrize("kind", ["clip", "clip vision", "siglip"])
@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_tokens_of_a_directory_are_those_of_transformers(directory, kind, layer):
    path, model = directory(kind)
    cfg, features = vision_of(path, vit_layer=layer)
    image = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(image, output_hidden_states=True)
        expected = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        expected = expected[:, 0 if kind == "siglip" else 1 :]
        torch.testing.assert_close(features(image), expected, rtol=0, atol=1e-6)
    assert feature_shape(cfg) == expected.shape[1:] == (16, 32)
    assert (tower_pixels(str(path)).mean, tower_pixels(str(path)).image_size) == (MEAN, 56)


def test_other_image_size_interpolates_the_positions_and_the_class_token_is_kept_where_asked_for(directory):
    path, model = directory("clip")
    cfg, features = vision_of(path, image_size=84, vit_prefix="keep")
    image = torch.randn(1, 3, 84, 84)
    with torch.no_grad():
        expected = model(image, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(features(image), expected, rtol=0, atol=1e-6)
    assert feature_shape(cfg) == expected.shape[1:] == (37, 32)


def test_layer_of_timm_is_that_of_its_blocks(tiny_section):
    image = torch.randn(1, 3, 56, 56)
    towers = [load_vision(MiniGPT4Config(**tiny_section(vit_layer=layer)))[0].eval() for layer in (-1, -2)]
    seen = []
    towers[0].blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        towers[0](image)
        torch.testing.assert_close(towers[1](image), seen[0], rtol=0, atol=0)


def test_squares_of_patches_are_joined(directory):
    path, model = directory("clip")
    _, features = vision_of(path, connector="join2x2")
    image = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        patches = torch.nn.functional.layer_norm(model(image).last_hidden_state, (32,))[0, 1:].view(4, 4, 32)
        expected = torch.stack(
            [patches[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(-1) for r in range(2) for c in range(2)]
        )
        torch.testing.assert_close(features(image)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda path: (path / "config.json").unlink(), "config.json"),
        (lambda path: (path / "config.json").write_text('{"model_type": "vit"}'), "its model_type is 'vit'"),
        (lambda path: (path / "config.json").write_text("["), "config.json is none of a CLIP"),
        (lambda path: (path / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
        (lambda path: (path / "model.safetensors").unlink(), "neither model.safetensors nor pytorch_model.bin"),
    ],
)
def test_directory_that_is_no_tower_is_refused_by_name(directory, break_it, reason):
    path, _ = directory("clip")
    break_it(path)
    with pytest.raises(ConfigError, match=rf"{path.name}.*{reason}"):
        vision_of(path)
