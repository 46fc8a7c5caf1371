"""The files of the vision side: what is read of them, what is refused, and towers of timm."""

from math import nan

import pytest
import timm
import torch

from minigpt4.common.checkpoint import read_state_dict
from minigpt4.common.errors import WeightsError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models.connectors import build_qformer
from minigpt4.models.loading import load_vision
from minigpt4.models.vision_tower import build_vision_encoder

FILES = {"vit_weights": ("eva", "eva_vit_tiny.pth"), "q_former_model": ("blip2", "blip2_tiny.pth")}
POSITION_IDS = "Qformer.bert.embeddings.position_ids"  # a table of 0, 1, 2, ... that no query needs
LAYER = "Qformer.bert.encoder.layer"


@pytest.fixture(scope="module")
def load(tiny_section):
    """Tower, `ln_vision` and connector of a section with changes, in eval mode."""
    return lambda **changes: [part.eval() for part in load_vision(MiniGPT4Config(**tiny_section(**changes)))]


def tensors(tower, ln_vision, q_former, key):
    """What a file fills, by its names."""
    if key == "vit_weights":
        return dict(tower.model.named_parameters())
    return dict(q_former.lavis_parameters()) | {f"ln_vision.{n}": p for n, p in ln_vision.named_parameters()}


@pytest.mark.parametrize("key", FILES)
def test_keys_that_the_reference_uses_fill_the_module_and_others_have_no_effect(
    load, golden, parity_dir, changed_weights, key
):
    kind, file = FILES[key]
    ignored, stored = golden["checkpoints"][f"{kind}_ignored_by_reference"], read_state_dict(parity_dir / file)
    loaded = tensors(*load(), key)
    assert loaded.keys() == stored.keys() - {*ignored, POSITION_IDS}
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in loaded.items())
    for change in (
        lambda state: [state[name].fill_(torch.nan) for name in ignored],
        lambda state: [state.pop(name, None) for name in (*ignored, POSITION_IDS)],
    ):
        again = tensors(*load(**{key: str(changed_weights(parity_dir / file, change))}), key)
        assert all(torch.equal(again[name], tensor) for name, tensor in loaded.items())


@pytest.mark.parametrize("size", [28, 84])
def test_positions_of_other_image_sizes_meet_the_reference(load, golden_tensors, assert_near, size):
    assert_near(load(image_size=size)[0].model.pos_embed, golden_tensors[f"vision/size{size}/pos_embed"], 5e-6)


@pytest.mark.parametrize(
    ("key", "changes", "text"),
    [
        ("vit_weights", {"blocks.1.attn.q_bias": None}, "missing: blocks.1.attn.q_bias"),
        *(("vit_weights", {"pos_embed": shape}, "pos_embed") for shape in ((2, 10, 64), (17, 64), (1, 0, 64), ())),
        *(("vit_weights", {"pos_embed": (1, n, 64)}, f"pos_embed has {n} positions") for n in (1, 13)),
        ("vit_weights", {"blocks.1.norm1.bias": nan}, "NaN, infinity or numbers beyond the model's type in blocks.1"),
        ("vit_weights", {"blocks.4.norm1.weight": 64}, "not expected: blocks.4.norm1.weight"),
        ("q_former_model", {"query_tokens": None}, "missing: query_tokens\n  Is model.q_former_model BLIP-2's"),
        ("q_former_model", {f"{LAYER}.4.attention.self.key.bias": 48}, f"not expected: {LAYER}.4.attention"),
        ("q_former_model", {"ln_vision.weight": 1408}, "wrong shape: ln_vision.weight"),
    ],
)
def test_file_that_does_not_fit_is_refused_with_the_difference(load, parity_dir, changed_weights, key, changes, text):
    def change(state):
        for name, shape in changes.items():
            if shape is None:
                del state[name]
            else:
                state[name] = state[name].fill_(nan) if shape is nan else torch.ones(shape)

    path = changed_weights(parity_dir / FILES[key][1], change)
    with pytest.raises(WeightsError) as error:
        load(**{key: str(path)})
    assert str(error.value).startswith(str(path))
    assert text in str(error.value)


def test_published_sizes_are_those_of_blip2():
    with torch.device("meta"):
        model = build_vision_encoder(MiniGPT4Config(drop_path_rate=0.2)).model
        q_former = build_qformer(MiniGPT4Config(), vision_width=1408)
    shapes = {name: tuple(p.shape) for name, p in (*model.named_parameters(), *q_former.lavis_parameters())}
    assert len(model.blocks) == 39
    assert model.blocks[0].attn.num_heads == 16
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert sum(parameter.numel() for parameter in model.parameters()) == 985_894_528
    assert shapes["pos_embed"] == (1, 257, 1408)
    assert shapes["blocks.38.mlp.fc1.weight"] == (6144, 1408)
    assert shapes["patch_embed.proj.weight"] == (1408, 3, 14, 14)
    assert shapes["query_tokens"] == (1, 32, 768)
    assert shapes[f"{LAYER}.10.crossattention.self.key.weight"] == (768, 1408)
    assert shapes[f"{LAYER}.11.intermediate_query.dense.weight"] == (3072, 768)
    crossing = {name.split(".")[4] for name in shapes if "crossattention" in name}
    assert crossing == {"0", "2", "4", "6", "8", "10"}


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
        ("swin_tiny_patch4_window7_224", 64, {"img_size": 64}, 4, 768, 0),
    ],
)
@torch.no_grad()
def test_timm_model_becomes_rows_of_patch_tokens(load, timm_file, name, size, arguments, tokens, width, prefix):
    path = timm_file(name, **arguments)
    tower = {"vit_model": name, "vit_config": {}, "vit_weights": path}
    encoder = load(**tower, image_size=size, has_qformer=False)[0]
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
