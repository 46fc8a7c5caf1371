"""The LLM's pass in training: without padding, without prefix and in chunks of logits it gives the same losses."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models import loss
from minigpt4.models.attention import FUSED, MATMUL
from minigpt4.models.loss import (
    LONGEST_PREFIX,
    MOST_PREFIXES,
    LMLoss,
    PrefixStates,
    can_pack,
    shared_prefix,
    target_losses,
)
from minigpt4.models.prompting import TokenSequence, collate_training, target_positions

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
GEMMA = SIZES | {"num_key_value_heads": 4, "head_dim": 8}
BOS, PAD, HIDDEN = 1, 2, 9


def llm_of(config, attention=MATMUL):
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    llm.set_attn_implementation(attention)
    return llm


def batch_of(*, hidden: bool = False):
    """Three rows: the same text, an image of 2 tokens, answers of 4, 1 and 2 tokens."""
    conditions = [TokenSequence().add_text([3, 4]).add_image(2 * n, 2).add_text([5 + n]) for n in range(3)]
    answers = [TokenSequence().add_text(ids, train=True) for ids in ([6, HIDDEN, 7, 8], [8], [HIDDEN, 7])]
    if hidden:
        answers = [answer.hide_from_attention(HIDDEN) for answer in answers]
    return collate_training(conditions, answers, [BOS], PAD)


def losses(llm, batch, image_tokens, **switches):
    """(losses, gradient of the image tokens) with these keys of `model:`."""
    own = image_tokens.clone().requires_grad_()
    lm_loss, zero = LMLoss(MiniGPT4Config(**switches), llm), 0 * own.sum()
    result = lm_loss.losses(llm, batch, target_positions(batch), own, zero)
    result.sum().backward()
    return result.detach(), own.grad


def texts_of(condition, answer):
    rows = [TokenSequence().add_text(condition) for _ in range(2)]
    return collate_training(rows, [TokenSequence().add_text(answer, train=True) for _ in rows], [BOS], PAD)


BATCHES = {
    "images": batch_of(),
    "hidden tokens": batch_of(hidden=True),
    "rows alike up to the answer's first token": texts_of([3, 4, 5], [6, 7]),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attention", [MATMUL, FUSED])
@pytest.mark.parametrize("groups", [4, 2])
def test_losses_and_gradients_are_those_of_the_padded_batch(batch, attention, groups):
    llm, image_tokens = llm_of(LlamaConfig(**SIZES, num_key_value_heads=groups), attention), torch.randn(6, 16)
    batch = BATCHES[batch]
    expected = losses(llm, batch, image_tokens, llm_packing=False)
    for has_prefix in (False, True):
        torch.testing.assert_close(losses(llm, batch, image_tokens, llm_prefix_cache=has_prefix), expected)


def test_shared_prefixes_are_computed_once_and_the_oldest_forgotten():
    lengths = [
        len(shared_prefix(b, target_positions(b))) for b in (batch_of(), texts_of([3] * 2 * LONGEST_PREFIX, [6]))
    ]
    assert lengths == [3, LONGEST_PREFIX]
    llm, states, calls = llm_of(LlamaConfig(**SIZES)), PrefixStates(), []
    llm.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    first = states.of(llm, [BOS, 3])
    assert states.of(llm, [BOS, 3]) is first
    assert len(calls) == 1
    for number in range(MOST_PREFIXES):
        states.of(llm, [BOS, 10 + number])
    states.of(llm, [BOS, 3])
    assert len(calls) == 2 + MOST_PREFIXES


@pytest.mark.parametrize(
    ("config", "attention", "expected"),
    [
        (LlamaConfig(**SIZES), MATMUL, True),
        (LlamaConfig(**SIZES), FUSED, True),
        (LlamaConfig(**SIZES), "sdpa", False),
        (MistralConfig(**SIZES, num_key_value_heads=4, sliding_window=None), MATMUL, True),
        (MistralConfig(**SIZES, num_key_value_heads=4, sliding_window=4), MATMUL, False),
        (Qwen2Config(**SIZES, num_key_value_heads=4), MATMUL, True),
        (Qwen2Config(**SIZES, num_key_value_heads=4, use_sliding_window=True, max_window_layers=0), MATMUL, False),
        (GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2), MATMUL, False),
    ],
)
def test_only_llms_whose_layers_all_see_everything_are_packed(config, attention, expected):
    assert can_pack(llm_of(config, attention)) is expected


# Logits in chunks


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


def with_bias():
    llm = llm_of(LlamaConfig(**SIZES), "eager")
    llm.set_output_embeddings(nn.Linear(16, 50, bias=True))
    return llm.requires_grad_(False)


HEADS = {
    "llama": lambda: llm_of(LlamaConfig(**SIZES), "eager"),
    "a bias": with_bias,
    "gemma": lambda: llm_of(GemmaConfig(**GEMMA), "eager"),
    "gemma2, whose logits are capped": lambda: llm_of(Gemma2Config(**GEMMA, final_logit_softcapping=0.5), "eager"),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rows", [1, 4, 6, 1000])
def test_losses_and_gradients_are_those_of_all_logits(head, inputs, rows, monkeypatch):
    monkeypatch.setattr(loss, "CPU_CHUNK_BYTES", rows * 50 * 4)
    llm = HEADS[head]()
    (losses, gradient), (expected, expected_gradient) = both(llm, inputs)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_keep_the_loss_in_fp32_and_the_gradient_in_their_type(inputs, dtype):
    llm = llm_of(LlamaConfig(**SIZES), "eager")
    (expected, expected_gradient), _ = both(llm, inputs)
    embeds, *others = inputs
    (losses, gradient), _ = both(llm.to(dtype), (embeds.to(dtype), *others))
    assert (losses.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(losses, expected, rtol=0.03, atol=0.03)
    torch.testing.assert_close(gradient.float(), expected_gradient, rtol=0.2, atol=0.02)


def test_a_tiny_weight_on_the_loss_does_not_vanish_in_fp16(inputs):
    llm = llm_of(LlamaConfig(**SIZES), "eager").half()
    embeds, *others = inputs
    (_, gradient), _ = both(llm, (embeds.half(), *others), torch.full((6,), 1e-3))
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
