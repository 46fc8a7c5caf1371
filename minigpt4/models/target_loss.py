"""The loss of target tokens, without the logits of all of them in memory at once.

The output layer is frozen, so its input's gradient is all that the backward pass needs of it, and that is known as soon
as the logits are: each chunk of positions is multiplied, turned into losses and a gradient, and forgotten.
Shapes: B rows, T positions, N targets, D channels, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 16 << 20, 64 << 20
"""Of fp32 logits that exist at a time: on a CPU few enough to stay in its cache, on a GPU enough to fill it."""
PLAIN_HEADS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types of transformers whose logits are the output layer's, without scale or cap."""


def target_losses(
    llm: nn.Module, inputs: Mapping[str, Any], at: tuple[Tensor, Tensor], targets_N: Tensor, columns_K: Tensor
) -> Tensor:
    """Loss of each target, nats, (N,) fp32.

    Args:
        llm: a frozen causal LM of transformers.
        inputs: arguments of its forward pass, `inputs_embeds` (B, T, D) among them.
        at: row and column of the position before each target, (N,) each.
        columns_K: the columns of `at`, each once, in order.
    """
    inputs = {**inputs, "use_cache": False}
    head = llm.get_output_embeddings()
    if not _is_plain(llm, head):
        logits_BKV = llm(**inputs, logits_to_keep=columns_K).logits
        logits_ND = logits_BKV[at[0], torch.searchsorted(columns_K, at[1])]
        return nn.functional.cross_entropy(logits_ND.float(), targets_N, reduction="none")
    hidden_BTD = llm.base_model(**inputs).last_hidden_state
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, at[0] * hidden_BTD.shape[1] + at[1])
    return _FrozenHeadLoss.apply(hidden_ND, head.weight, head.bias, targets_N)


def _is_plain(llm: nn.Module, head: nn.Module) -> bool:
    return (
        llm.config.model_type in PLAIN_HEADS
        and isinstance(head, nn.Linear)
        and head.weight.is_floating_point()
        and not head.weight.requires_grad
    )


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross entropy of a frozen linear layer's logits, chunk by chunk; the gradient is made on the way."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Tensor:
        losses_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradient_ND = torch.empty_like(hidden_ND) if needs_gradient else None
        chunk_bytes = CPU_CHUNK_BYTES if hidden_ND.device.type == "cpu" else GPU_CHUNK_BYTES
        size = max(1, chunk_bytes // (4 * len(weight_VD)))
        for start in range(0, len(hidden_ND), size):
            chunk = slice(start, start + size)
            logits_CV = nn.functional.linear(hidden_ND[chunk], weight_VD, bias_V)
            share_CV, target_C1 = logits_CV.log_softmax(dim=-1, dtype=torch.float32), targets_N[chunk, None]
            losses_N[chunk] = -share_CV.gather(1, target_C1).squeeze(1)
            if needs_gradient:
                share_CV.exp_().scatter_add_(1, target_C1, share_CV.new_full((), -1.0).expand(target_C1.shape))
                gradient_ND[chunk] = share_CV.to(weight_VD.dtype) @ weight_VD
        ctx.save_for_backward(gradient_ND)
        return losses_N

    @staticmethod
    def backward(ctx: Any, outer_N: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND.float() * outer_N[:, None]).to(gradient_ND.dtype), None, None, None
