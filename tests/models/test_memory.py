"""The memory estimate: its counter, the published sizes, and a real step of a small model."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Gemma2Config

from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models.attention import FUSED
from minigpt4.models.llm import read_llm_config
from minigpt4.models.memory import GIB, Estimate, Lengths, MetaModel, StorageCounter, llm_config_for
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.models.prompting import ImageFeatures

FLICKR = Lengths(prompt=35, answer=160)
PUBLISHED_FLICKR_MIB = 18202
"""Peak of the published Flickr30k run at batch 2, as its log lines give it."""


@pytest.fixture(scope="module")
def seven_b() -> MetaModel:
    cfg = MiniGPT4Config(llama_model="weights/vicuna-7b")
    return MetaModel(cfg, llm_config_for(cfg)[0])


def tiny_config(parity_dir: Path, **changes) -> MiniGPT4Config:
    settings = {
        "image_size": 56,
        "vit_weights": str(parity_dir / "eva_vit_tiny.pth"),
        "vit_config": {"embed_dim": 64, "depth": 3, "num_heads": 4},
        "q_former_model": str(parity_dir / "blip2_tiny.pth"),
        "num_query_token": 8,
        "qformer_config": {
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 96,
        },
        "llama_model": str(parity_dir / "vicuna_tiny"),
        "vit_precision": "fp32",
        "llm_precision": "fp32",
        "max_txt_len": 40,
    }
    return MiniGPT4Config(**(settings | changes))


def estimated(cfg: MiniGPT4Config, batch_size: int, length: int, **changes: bool) -> Estimate:
    """The estimate of a step whose sequences have `length` positions, 40 of them an answer."""
    prompt = length - 1 - 40 - (8 if cfg.has_qformer else 4)
    meta = MetaModel(cfg, read_llm_config(Path(cfg.llama_model)))
    return meta.estimate(batch_size, Lengths(prompt=prompt, answer=40), **changes)


def real_peak(cfg: MiniGPT4Config, batch_size: int, cached: bool = False) -> tuple[int, int]:
    """Peak bytes and tokens of a sequence of a training step on real tensors."""
    model = MiniGPT4.from_config(cfg)
    if cfg.llm_attention is None:
        model.llama_model.set_attn_implementation(FUSED)  # what is estimated, also on a CPU
    pixels = torch.randn(batch_size, 3, 56, 56)
    samples = {
        "image": ImageFeatures(model.image_features(pixels)) if cached else pixels,
        "answer": ["several wooden boats are tied to the pier " * 8] * batch_size,
    }
    tokens = []
    model.llama_model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    with StorageCounter(nn.ModuleList([model])) as counter:
        model(samples)["loss"].backward()
    return counter.peak, tokens[0] // batch_size


def test_counter_follows_storages_from_birth_to_death():
    with StorageCounter(nn.ModuleList()) as counter:
        first = torch.empty(1000, dtype=torch.uint8, device="meta")
        view = first[:10]
        second = torch.empty(500, dtype=torch.uint8, device="meta")
        assert counter.live == 1500
        del first
        assert counter.live == 1500, "a view keeps its storage"
        del view, second
        assert (counter.live, counter.peak) == (0, 1500)


def test_counter_leaves_known_weights_out():
    layer = nn.Linear(10, 10, bias=False, device="meta")
    with StorageCounter(nn.ModuleList([layer])) as counter:
        layer(torch.empty(1, 10, device="meta"))
    assert counter.peak == 2 * 10 * 4


@pytest.mark.parametrize(
    ("changes", "batch_size"),
    [
        ({}, 6),
        ({"freeze_qformer": False}, 6),
        ({"has_qformer": False}, 6),
        ({"llm_logits": "all"}, 6),
        ({"llm_attention": "eager"}, 6),
        ({"llm_attention": "eager", "llm_logits": "all"}, 24),
        ({}, 24),
        ({"llm_packing": False}, 6),
    ],
)
def test_estimate_is_what_a_real_step_allocates(parity_dir, changes, batch_size):
    cfg = tiny_config(parity_dir, llm_prefix_cache=False, **changes)
    peak, length = real_peak(cfg, batch_size)
    estimate = estimated(cfg, batch_size, length)
    assert estimate.tokens == length
    assert estimate.activations == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("changes", [{}, {"llm_attention": "eager"}, {"llm_logits": "all"}])
def test_estimate_with_recomputation_is_what_a_real_step_allocates(parity_dir, changes):
    cfg = tiny_config(parity_dir, llm_prefix_cache=False, llm_grad_checkpoint=True, **changes)
    peak, length = real_peak(cfg, batch_size=16)
    assert estimated(cfg, 16, length).activations == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("changes", [{}, {"has_qformer": False}])
def test_estimate_with_cached_features_is_what_a_real_step_allocates(parity_dir, changes):
    cfg = tiny_config(parity_dir, llm_prefix_cache=False, **changes)
    peak, length = real_peak(cfg, batch_size=6, cached=True)
    estimate = estimated(cfg, 6, length, cached=True)
    assert estimate.activations == pytest.approx(peak, rel=0.02)
    assert [part.name for part in estimate.parts] == ["projection (llama_proj)", "LLM"]


def test_7b_has_the_published_sizes(seven_b):
    parts = {part.name: part for part in seven_b.parts}
    assert parts["projection (llama_proj)"].trained == 3_149_824
    assert parts["LLM"].parameters == 6_738_415_616
    assert parts["LLM"].weight_bytes == 2 * 6_738_415_616
    assert sum(part.trained for part in seven_b.parts) == 3_149_824


def test_flickr_batch_needs_less_than_the_published_run(seven_b):
    estimate = seven_b.estimate(2, FLICKR)
    allocated = (estimate.weights + estimate.optimizer + estimate.activations) / 2**20
    assert 0.85 * PUBLISHED_FLICKR_MIB < allocated < PUBLISHED_FLICKR_MIB


def test_quantised_llm_is_smaller_by_its_linear_layers(seven_b):
    estimate = seven_b.estimate(1, FLICKR)
    linear = 6_738_415_616 - 2 * 32000 * 4096 - 65 * 4096
    fp16, int8, nf4 = (seven_b.stored_as(estimate, s).parts[-1].weight_bytes for s in ("fp16", "int8", "nf4"))
    assert fp16 - int8 == linear
    assert fp16 - nf4 == pytest.approx((2 - 0.5625) * linear, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "width"), [("vicuna-13b-v0", 5120), ("llama-2-7b-chat-hf", 4096), ("Vicuna_7B", 4096)]
)
def test_llm_that_is_not_here_is_sized_by_its_name(name, width):
    config, origin = llm_config_for(MiniGPT4Config(llama_model=f"somewhere/{name}"))
    assert config.hidden_size == width
    assert name in origin


@pytest.mark.parametrize("name", ["somewhere/mymodel", "somewhere/phi-17b"])
def test_llm_of_unknown_size_is_an_error_that_says_what_to_do(name):
    with pytest.raises(ConfigError, match=r"model.llama_model.*config.json"):
        llm_config_for(MiniGPT4Config(llama_model=name))


def test_weights_of_the_estimate_are_those_of_the_built_model(parity_dir):
    cfg = tiny_config(parity_dir, vit_precision="bf16", llm_precision="bf16")
    model = MiniGPT4.from_config(cfg)
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    estimate = MetaModel(cfg, read_llm_config(parity_dir / "vicuna_tiny")).estimate(1, Lengths(4, 4))
    assert estimate.weights == stored
    assert estimate.total > estimate.weights + 0.5 * GIB


# Spread over GPUs


def test_sharded_llm_is_a_share_of_its_layers_and_all_of_the_rest(seven_b):
    estimate = seven_b.estimate(1, FLICKR)
    whole = estimate.parts[-1].weight_bytes
    layer = 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    outside = whole - 32 * layer
    for gpus in (2, 4, 8):
        llm, gathered = seven_b.sharded_over(estimate, gpus).parts[-2:]
        assert llm.weight_bytes == outside + 32 * layer // gpus
        assert 3 * layer < gathered.weight_bytes < 3.5 * layer
    assert seven_b.sharded_over(estimate, 1) == estimate


def test_llm_whose_logits_are_capped_is_sized(parity_dir):
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    llm = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=2)
    meta = MetaModel(tiny_config(parity_dir), llm)
    assert meta.estimate(4, Lengths(5, 7)).activations > 1.5 * meta.estimate(2, Lengths(5, 7)).activations
