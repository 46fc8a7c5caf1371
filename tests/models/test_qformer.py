"""The Q-Former gives the reference's hidden states, and those of transformers' own BLIP-2."""

import pytest
import torch

from minigpt4.common.errors import ConfigError, WeightsError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models.connectors import build_qformer
from minigpt4.models.loading import load_vision

POSITION_IDS = "Qformer.bert.embeddings.position_ids"  # a table of 0, 1, 2, ... that no query needs


@pytest.fixture(scope="module")
def load(tiny_section):
    """Vision encoder, `ln_vision` and Q-Former of a section with changes, in eval mode."""

    def load_parts(**changes):
        parts = load_vision(MiniGPT4Config(**tiny_section(**changes)))
        return tuple(part.eval() for part in parts)

    return load_parts


@pytest.fixture(scope="module")
def parts(load):
    return load()


def lavis_tensors(ln_vision, q_former):
    """What a BLIP-2 file fills, by its names."""
    return dict(q_former.lavis_parameters()) | {f"ln_vision.{n}": p for n, p in ln_vision.named_parameters()}


def test_keys_that_the_reference_uses_fill_the_module_of_that_name(parts, golden, parity_dir):
    stored = torch.load(parity_dir / "blip2_tiny.pth", weights_only=True)["model"]
    loaded = lavis_tensors(*parts[1:])
    assert loaded.keys() == set(golden["checkpoints"]["blip2_used_by_reference"]) - {POSITION_IDS}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize("absent", [False, True])
def test_keys_that_the_reference_ignores_have_no_effect(load, parts, golden, parity_dir, changed_weights, absent):
    ignored = golden["checkpoints"]["blip2_ignored_by_reference"]

    def change(state):
        for name in [*ignored, POSITION_IDS] if absent else ignored:
            _ = state.pop(name) if absent else state[name].fill_(torch.nan)

    path = changed_weights(parity_dir / "blip2_tiny.pth", change)
    loaded = lavis_tensors(*load(q_former_model=str(path))[1:])
    assert all(torch.equal(loaded[name], tensor) for name, tensor in lavis_tensors(*parts[1:]).items())


LAYER = "Qformer.bert.encoder.layer"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.pop("query_tokens"), "missing: query_tokens"),
        (
            lambda state: state.update({f"{LAYER}.4.attention.self.key.bias": torch.ones(48)}),
            f"not expected: {LAYER}.4.attention.self.key.bias",
        ),
        (lambda state: state.update({"ln_vision.weight": torch.ones(1408)}), "wrong shape: ln_vision.weight"),
    ],
    ids=["missing", "more_layers", "other_vit"],
)
def test_file_that_does_not_fit_is_refused_with_the_difference(load, parity_dir, changed_weights, change, text):
    path = changed_weights(parity_dir / "blip2_tiny.pth", change)
    with pytest.raises(WeightsError) as error:
        load(q_former_model=str(path))
    assert str(error.value).startswith(f"{path} does not fit the model")
    assert text in str(error.value)
    assert "num_query_token, qformer_config" in str(error.value)


def test_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match="hidden_size 50 is not a multiple of num_attention_heads 4"):
        build_qformer(MiniGPT4Config(qformer_config={"hidden_size": 50, "num_attention_heads": 4}), 64)


def test_published_sizes_are_those_of_blip2():
    with torch.device("meta"):
        q_former = build_qformer(MiniGPT4Config(), vision_width=1408)
    shapes = {name: tuple(parameter.shape) for name, parameter in q_former.lavis_parameters()}
    assert shapes["query_tokens"] == (1, 32, 768)
    assert shapes[f"{LAYER}.10.crossattention.self.key.weight"] == (768, 1408)
    assert shapes[f"{LAYER}.11.intermediate_query.dense.weight"] == (3072, 768)
    crossing = {name.split(".")[4] for name in shapes if "crossattention" in name}
    assert crossing == {"0", "2", "4", "6", "8", "10"}
