"""Packed batches: no padding, no prefix, the same losses; and what is not packed."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from minigpt4.models.attention import FUSED, MATMUL
from minigpt4.models.loss import (
    LONGEST_PREFIX,
    MOST_PREFIXES,
    PrefixStates,
    can_pack,
    pack,
    shared_prefix,
    target_losses,
)
from minigpt4.models.prompting import TokenSequence, collate_training, embed, target_positions

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
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


def losses(llm, batch, image_tokens, prefix_length=None):
    """(losses, gradient of the image tokens); padded if `prefix_length` is None."""
    own = image_tokens.clone().requires_grad_()
    at = target_positions(batch)
    targets = batch.targets_BT[:, 1:][at]
    inputs = {"attention_mask": batch.attention_mask_BT}
    if prefix_length is not None:
        prefix = shared_prefix(batch, at)[:prefix_length]
        packed = pack(batch, at, len(prefix))
        inputs = packed.inputs(PrefixStates().of(llm, prefix))
        batch, at = packed.batch, packed.at
    inputs["inputs_embeds"] = embed(batch, llm.get_input_embeddings(), own)
    result = target_losses(llm, inputs, at, targets, at[1].unique())
    result.sum().backward()
    return result.detach(), own.grad


@pytest.mark.parametrize("prefix_length", [0, 1, 3])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("attention", [MATMUL, FUSED])
@pytest.mark.parametrize("groups", [4, 2])
def test_losses_and_gradients_are_those_of_the_padded_batch(prefix_length, hidden, attention, groups):
    llm, image_tokens = llm_of(LlamaConfig(**SIZES, num_key_value_heads=groups), attention), torch.randn(6, 16)
    batch = batch_of(hidden=hidden)
    expected, expected_gradient = losses(llm, batch, image_tokens)
    actual, gradient = losses(llm, batch, image_tokens, prefix_length)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert len(actual) == 7


def test_a_batch_is_its_tokens_in_the_order_of_the_rows():
    batch = batch_of()
    packed = pack(batch, target_positions(batch))
    assert packed.batch.ids_BT.tolist() == [
        [BOS, 3, 4, 0, 0, 5, 6, HIDDEN, 7, 8] + [BOS, 3, 4, 0, 0, 6, 8] + [BOS, 3, 4, 0, 0, 7, HIDDEN, 7]
    ]
    assert packed.positions_1N.tolist() == [[*range(10), *range(7), *range(8)]]
    assert packed.batch.image_at[1].tolist() == [3, 4, 13, 14, 20, 21]
    assert packed.at[1].tolist() == [5, 6, 7, 8, 15, 22, 23]
    assert packed.grid.visible_BT is None


def test_the_prefix_ends_before_the_first_image():
    batch = batch_of()
    assert shared_prefix(batch, target_positions(batch)) == [BOS, 3, 4]


def test_the_prefix_of_texts_ends_before_the_first_position_whose_loss_counts():
    rows = [TokenSequence().add_text([3, 4, 5]) for _ in range(2)]
    answers = [TokenSequence().add_text([6, 7], train=True) for _ in range(2)]
    batch = collate_training(rows, answers, [BOS], PAD)
    assert shared_prefix(batch, target_positions(batch)) == [BOS, 3, 4]


def test_a_long_prefix_is_cut():
    rows = [TokenSequence().add_text([3] * 400) for _ in range(2)]
    answers = [TokenSequence().add_text([6], train=True) for _ in range(2)]
    batch = collate_training(rows, answers, [BOS], PAD)
    assert len(shared_prefix(batch, target_positions(batch))) == LONGEST_PREFIX


def test_prefix_states_are_computed_once_and_the_oldest_forgotten():
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
