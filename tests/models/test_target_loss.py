"""The loss in chunks is the loss of all logits, and so is its gradient."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GemmaConfig, LlamaConfig

from minigpt4.models import loss
from minigpt4.models.loss import target_losses

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "gemma": GemmaConfig(**SIZES, **HEADS),
    "gemma2, whose logits are capped": Gemma2Config(**SIZES, **HEADS, final_logit_softcapping=0.5),
}


@pytest.fixture(params=CONFIGS)
def llm(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).requires_grad_(False).eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    at = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([3, 4, 1, 0, 2, 4])
    return torch.randn(3, 6, 16), torch.ones(3, 6, dtype=torch.long), at, torch.tensor([4, 0, 49, 7, 7, 12])


def losses_of(llm, embeds, mask, at, targets):
    return target_losses(llm, {"inputs_embeds": embeds, "attention_mask": mask}, at, targets, at[1].unique())


def both(llm, inputs, weights=None):
    """(losses, gradient) of the function, and of the logits that the LLM itself gives."""
    embeds, mask, at, targets = inputs
    results = []
    for compute in (
        lambda e: losses_of(llm, e, mask, at, targets),
        lambda e: nn.functional.cross_entropy(
            llm(inputs_embeds=e, attention_mask=mask).logits[at], targets, reduction="none"
        ),
    ):
        own = embeds.clone().requires_grad_()
        losses = compute(own)
        (losses * (torch.arange(1.0, 7) if weights is None else weights)).sum().backward()
        results.append((losses.detach(), own.grad))
    return results


@pytest.mark.parametrize("rows", [1, 4, 6, 1000])
def test_losses_and_gradients_are_those_of_all_logits(llm, inputs, rows, monkeypatch):
    monkeypatch.setattr(loss, "CPU_CHUNK_BYTES", rows * 50 * 4)
    (losses, gradient), (expected, expected_gradient) = both(llm, inputs)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert gradient.abs().sum() > 0


def test_an_output_layer_with_bias(inputs):
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    llm.set_output_embeddings(nn.Linear(16, 50, bias=True))
    (losses, gradient), (expected, expected_gradient) = both(llm.requires_grad_(False), inputs)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_an_output_layer_that_is_trained_gets_its_gradient(inputs):
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    losses_of(llm, *inputs).sum().backward()
    assert llm.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_keep_the_loss_in_fp32_and_the_gradient_in_their_type(inputs, dtype):
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(CONFIGS["llama"]).requires_grad_(False).eval()
    (expected, expected_gradient), _ = both(llm, inputs)
    embeds, *others = inputs
    (losses, gradient), _ = both(llm.to(dtype), (embeds.to(dtype), *others))
    assert (losses.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(losses, expected, rtol=0.03, atol=0.03)
    torch.testing.assert_close(gradient.float(), expected_gradient, rtol=0.2, atol=0.02)


def test_a_tiny_weight_on_the_loss_does_not_vanish_in_fp16(inputs):
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(CONFIGS["llama"]).requires_grad_(False).eval().half()
    embeds, *others = inputs
    (_, gradient), _ = both(llm, (embeds.half(), *others), torch.full((6,), 1e-3))
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_without_gradients_none_is_made(inputs):
    llm = AutoModelForCausalLM.from_config(CONFIGS["llama"]).requires_grad_(False).eval()
    with torch.no_grad():
        assert not losses_of(llm, *inputs).requires_grad
