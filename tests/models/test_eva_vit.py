"""The vision encoder gives the reference's hidden states and refuses files and sizes that do not fit."""

import pytest
import timm
import torch

from minigpt4.common.errors import ConfigError, WeightsError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models.vision_tower import VisionTower, build_vision_encoder, load_vision_encoder

POS_EMBED_ATOL = 5e-6


@pytest.fixture(scope="module")
def load(tiny_section):
    """The encoder of a section with changes, loaded, in eval mode."""

    def load_encoder(**changes) -> VisionTower:
        cfg = MiniGPT4Config(**tiny_section(**changes))
        encoder = build_vision_encoder(cfg)
        load_vision_encoder(encoder, cfg)
        return encoder.eval()

    return load_encoder


@pytest.fixture(scope="module")
def encoder(load):
    return load()


@pytest.mark.parametrize("size", [28, 84])
@torch.no_grad()
def test_positions_of_other_image_sizes_meet_the_reference(load, golden_tensors, assert_near, size):
    encoder = load(image_size=size)
    assert_near(encoder.model.pos_embed.data, golden_tensors[f"vision/size{size}/pos_embed"], POS_EMBED_ATOL)


def test_keys_that_the_reference_ignores_have_no_effect(load, encoder, golden, parity_dir, changed_weights):
    ignored = golden["checkpoints"]["eva_ignored_by_reference"]
    path = changed_weights(
        parity_dir / "eva_vit_tiny.pth", lambda state: [state[name].fill_(float("nan")) for name in ignored]
    )
    loaded = load(vit_weights=str(path)).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in encoder.model.state_dict().items())


def test_every_other_key_is_used(load, golden, parity_dir):
    stored = torch.load(parity_dir / "eva_vit_tiny.pth", weights_only=True)
    used = stored.keys() - set(golden["checkpoints"]["eva_ignored_by_reference"])
    loaded = dict(load().model.named_parameters())
    assert loaded.keys() == used
    assert all(torch.equal(loaded[name], stored[name].float()) for name in used)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.pop("blocks.1.attn.q_bias"), "missing: blocks.1.attn.q_bias"),
        (
            lambda state: state.update({"pos_embed": torch.ones(1, 13, 64)}),
            "pos_embed has 13 positions, not a square grid and a class token",
        ),
        (
            lambda state: state.update({"blocks.4.norm1.weight": torch.ones(64)}),
            "not expected: blocks.4.norm1.weight",
        ),
    ],
    ids=["missing", "grid", "more_blocks"],
)
def test_file_that_does_not_fit_is_refused_with_the_difference(load, parity_dir, changed_weights, change, text):
    path = changed_weights(parity_dir / "eva_vit_tiny.pth", change)
    with pytest.raises(WeightsError) as error:
        load(vit_weights=str(path))
    assert str(path) in str(error.value)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"image_size": 60}, "model.image_size: 60 is not a multiple of the patch size 14"),
        ({"vit_config": {"embed_dim": 64, "depth": 3, "num_heads": 5}}, "model.vit_config: embed_dim"),
        ({"vit_model": "vit_tinny_patch16_224", "vit_config": {}}, "near: vit_tiny_patch16_224"),
        ({"vit_model": "resnet10t", "vit_config": {"depth": 3}}, "model.vit_config: ['depth'] for resnet10t"),
        ({"vit_model": "resnet10t", "vit_config": {}, "vit_weights": None}, "model.vit_weights: not set"),
    ],
)
def test_sizes_and_names_that_do_not_work_are_refused(load, changes, text):
    with pytest.raises(ConfigError) as error:
        load(**changes)
    assert text in str(error.value)


def test_published_sizes_are_those_of_blip2():
    with torch.device("meta"):
        model = build_vision_encoder(MiniGPT4Config(drop_path_rate=0.2)).model
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert len(model.blocks) == 39
    assert shapes["pos_embed"] == (1, 257, 1408)
    assert shapes["blocks.38.mlp.fc1.weight"] == (6144, 1408)
    assert shapes["patch_embed.proj.weight"] == (1408, 3, 14, 14)
    assert model.blocks[0].attn.num_heads == 16
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert sum(map(torch.Size.numel, map(torch.Size, shapes.values()))) == 985_894_528


# Other timm models


@pytest.fixture
def timm_file(tmp_path):
    """Weights file of a timm model with its classifier, as pretrained files have it."""

    def save(name: str, **arguments) -> str:
        torch.manual_seed(0)
        path = tmp_path / f"{name}.pth"
        torch.save(timm.create_model(name, **arguments).state_dict(), path)
        return str(path)

    return save


@pytest.mark.parametrize(
    ("name", "size", "arguments", "tokens", "width", "prefix"),
    [
        ("vit_tiny_patch16_224", 32, {"img_size": 32}, 5, 192, 1),
        ("resnet10t", 64, {}, 4, 512, 0),
        ("swin_tiny_patch4_window7_224", 224, {}, 49, 768, 0),
    ],
)
@torch.no_grad()
def test_timm_model_becomes_rows_of_patch_tokens(load, timm_file, name, size, arguments, tokens, width, prefix):
    path = timm_file(name, **arguments)
    encoder = load(vit_model=name, vit_config={}, vit_weights=path, image_size=size)
    image = torch.randn(2, 3, size, size)
    output = encoder(image)
    assert output.shape == (2, tokens, width)
    assert (encoder.num_features, encoder.num_prefix_tokens) == (width, prefix)
    reference = timm.create_model(name, **arguments)
    reference.load_state_dict(torch.load(path, weights_only=True))
    features = reference.eval().forward_features(image)
    if features.ndim == 4:
        features = features.flatten(2).mT if features.shape[1] == width else features.flatten(1, 2)
    assert torch.equal(output, features)


def test_timm_model_with_the_weights_of_another_is_refused(load, timm_file):
    path = timm_file("resnet10t")
    with pytest.raises(WeightsError, match="does not fit the model") as error:
        load(vit_model="vit_tiny_patch16_224", vit_config={}, vit_weights=path, image_size=32)
    assert path in str(error.value)
