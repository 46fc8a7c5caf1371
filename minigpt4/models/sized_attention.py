"""Attention of an LLM on meta tensors: it computes nothing and keeps for the backward pass what the real one keeps.

Shapes: B rows, H heads, T positions, E channels of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

_FUSED, _EAGER = "minigpt4_fused_size", "minigpt4_eager_size"


def sized_attention(llm_attention: str | None) -> str:
    """The name to build an LLM with; `llm_attention` as in the section `model:`."""
    AttentionInterface.register(_FUSED, _fused)
    AttentionMaskInterface.register(_FUSED, lambda *args, **kwargs: None)
    AttentionInterface.register(_EAGER, _eager)
    AttentionMaskInterface.register(_EAGER, _eager_mask)
    return _EAGER if llm_attention == "eager" else _FUSED


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: queries, keys, values, output, and one fp32 number per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        log_sum = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """(B, H, T, T) scores, their sum with the mask, probabilities in fp32 and in the LLM's type."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores_BHTT = torch.matmul(query, key.transpose(2, 3)) * scaling + mask
    shares_BHTT = nn.functional.softmax(scores_BHTT, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(shares_BHTT, value).transpose(1, 2).contiguous(), None


def _eager_mask(batch_size: int, q_length: int, kv_length: int, dtype: torch.dtype, **kwargs: Any) -> Tensor:
    return torch.empty(batch_size, 1, q_length, kv_length, dtype=dtype, device="meta")
