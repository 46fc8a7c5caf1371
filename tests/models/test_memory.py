"""The memory estimate: its counter, the published sizes, and a real step of a small model."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Gemma2Config

from minigpt4.common.binding import bind
from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models import memory
from minigpt4.models.attention import FUSED
from minigpt4.models.llm import read_llm_config
from minigpt4.models.memory import GIB, Estimate, Lengths, MetaModel, StorageCounter, llm_config_for
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.models.prompting import ImageFeatures

ANSWER = 40
FLICKR = Lengths(prompt=35, answer=160)
PUBLISHED_FLICKR_MIB = 18202
"""Peak of the published Flickr30k run at batch 2, as its log lines give it."""


@pytest.fixture(scope="module")
def seven_b() -> MetaModel:
    cfg = MiniGPT4Config(llama_model="weights/vicuna-7b")
    return MetaModel(cfg, llm_config_for(cfg)[0])


@pytest.fixture(scope="module")
def tiny(tiny_section):
    """`tiny(**changes)`: the section of the tiny model, without what a first step alone makes."""
    return lambda **changes: MiniGPT4Config(
        **tiny_section(ckpt=None, max_txt_len=ANSWER, llm_prefix_cache=False, **changes)
    )


def estimated(cfg: MiniGPT4Config, batch_size: int, length: int, amp=None, **changes: bool) -> Estimate:
    """The estimate of a step whose sequences have `length` positions."""
    prompt = length - 1 - ANSWER - (8 if cfg.has_qformer else 4)
    meta = MetaModel(cfg, read_llm_config(Path(cfg.llama_model)), amp)
    return meta.estimate(batch_size, Lengths(prompt, ANSWER), **changes)


def real_peak(cfg: MiniGPT4Config, batch_size: int, cached: bool = False, amp=None, micro: int = 1) -> tuple[int, int]:
    """Peak bytes and tokens of a sequence of a training step on real tensors, the last of `micro`."""
    model = MiniGPT4.from_config(cfg).train()
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
        for _ in range(micro):
            with torch.autocast("cpu", amp, enabled=amp is not None):
                loss = model(samples)["loss"]
            loss.backward()
    return counter.peak, tokens[0] // batch_size


EAGER, ALL, PADDED = {"llm_attention": "eager"}, {"llm_logits": "all"}, {"llm_packing": False}
FULL, LORA = {"train": {"llm": "full"}}, {"train": {"llm": {"rule": "lora", "r": 4, "dropout": 0}}}
LAST = {"train": {"llm": {"rule": "last", "blocks": 1}, "projection": "frozen"}}


@pytest.mark.parametrize(
    ("changes", "amp", "micro"),
    [
        (FULL, None, 1),
        (PADDED | FULL, None, 2),
        (EAGER | ALL | FULL, None, 1),
        (PADDED | FULL, torch.bfloat16, 2),
        (PADDED | FULL | {"llm_precision": "bf16"}, None, 1),
        (FULL | {"llm_grad_checkpoint": True}, None, 2),
        (PADDED | LAST, None, 1),
        (LORA, None, 1),
        (LORA | {"llm_precision": "bf16"}, None, 2),
    ],
)
def test_estimate_of_a_trained_llm_is_what_a_real_step_allocates(tiny_section, changes, amp, micro):
    section = tiny_section(ckpt=None, max_txt_len=ANSWER, vit_precision="fp32", **changes)
    cfg = bind(MiniGPT4Config, section, section="model", source="user.yaml")
    peak, length = real_peak(cfg, 6, amp=amp, micro=micro)
    estimate = estimated(cfg, 6, length, amp, keeps_gradients=micro > 1)
    llm = estimate.parts[-1]
    tolerance = 0.1 if cfg.llm_grad_checkpoint else 0.06 if cfg.llm_packing else 0.03  # rows are copied for packing
    assert estimate.activations + llm.optimizer_bytes // 3 == pytest.approx(peak, rel=tolerance)
    assert llm.optimizer_bytes == 3 * llm.trained * (
        2 if changes.get("llm_precision") and changes["train"] == FULL["train"] else 4
    )


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


NO_QFORMER = {"has_qformer": False}


@pytest.mark.parametrize(
    ("changes", "batch_size", "cached"),
    [
        ({}, 6, False),
        ({}, 6, True),
        ({"freeze_qformer": False}, 6, False),
        (NO_QFORMER, 6, False),
        (NO_QFORMER, 6, True),
        (EAGER, 6, False),
        (EAGER | ALL, 24, False),
        ({"llm_packing": False}, 6, False),
        *((changes | {"llm_grad_checkpoint": True}, 16, False) for changes in ({}, EAGER, ALL)),
    ],
)
def test_estimate_is_what_a_real_step_allocates(tiny, changes, batch_size, cached):
    cfg = tiny(**changes)
    peak, length = real_peak(cfg, batch_size, cached)
    estimate = estimated(cfg, batch_size, length, cached=cached)
    assert estimate.tokens == length
    assert estimate.activations == pytest.approx(peak, rel=0.1 if cfg.llm_grad_checkpoint else 0.02)
    assert [part.name for part in estimate.parts][-2:] == ["projection (llama_proj)", "LLM"]
    assert cached == (len(estimate.parts) == 2)


@pytest.mark.parametrize(
    ("changes", "amp"),
    [(FULL, torch.bfloat16), (LORA | {"llm_precision": "bf16"}, None), (LAST | EAGER, None)],
)
def test_ends_of_alike_layers_give_the_peak_of_all_to_the_byte(tiny_section, changes, amp, monkeypatch):
    deep = {"vit_config": tiny_section()["vit_config"] | {"depth": 4}}
    cfg = bind(MiniGPT4Config, tiny_section(ckpt=None, **deep, **changes), section="model", source="user.yaml")
    llm = read_llm_config(Path(cfg.llama_model))
    llm.num_hidden_layers = 6

    def sized() -> list[Estimate]:
        meta, hows = MetaModel(cfg, llm, amp), ((False, False), (True, False), (False, True))
        return [meta.estimate(8, FLICKR, recompute=recompute, keeps_gradients=keeps) for recompute, keeps in hows]

    ends = sized()
    monkeypatch.setattr(MetaModel, "_run_ends", lambda *_: None)
    monkeypatch.setattr(memory, "_pass_alike", lambda _: None)
    assert sized() == ends


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


def test_llm_that_is_not_here_is_sized_by_its_name_or_an_error_says_what_to_do():
    for name, width in {"vicuna-13b-v0": 5120, "llama-2-7b-chat-hf": 4096, "Vicuna_7B": 4096}.items():
        config, origin = llm_config_for(MiniGPT4Config(llama_model=f"somewhere/{name}"))
        assert config.hidden_size == width
        assert name in origin
    for name in ("mymodel", "phi-17b"):
        with pytest.raises(ConfigError, match=r"model.llama_model.*config.json"):
            llm_config_for(MiniGPT4Config(llama_model=f"somewhere/{name}"))


def test_weights_of_the_estimate_are_those_of_the_built_model(tiny, parity_dir):
    cfg = tiny(vit_precision="bf16", llm_precision="bf16")
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


def test_llm_whose_logits_are_capped_is_sized(tiny):
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    llm = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=2)
    meta = MetaModel(tiny(), llm)
    assert meta.estimate(4, Lengths(5, 7)).activations > 1.5 * meta.estimate(2, Lengths(5, 7)).activations
