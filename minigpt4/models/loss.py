"""From a training batch to the losses of its targets, by the ways that the configuration chooses.

Shapes: B rows, T positions, N targets, M image tokens of the batch, D channels of the LLM.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models import llm as llms
from minigpt4.models.base_model import native_dtype, to_device
from minigpt4.models.fsdp import is_sharded
from minigpt4.models.sequence import Batch, Packed, PrefixStates, can_pack, embed, pack, shared_prefix

# The loss of target tokens, without the logits of all of them in memory at once.
#
# The output layer is frozen, so its input's gradient is all that the backward pass needs of it, and that is known as
# soon
# as the logits are: each chunk of positions is multiplied, turned into losses and a gradient, and forgotten.
# Shapes: B rows, T positions, N targets, D channels, V vocabulary.


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


class LMLoss:
    """Runs a frozen LLM over batches; remembers the beginnings that they share."""

    def __init__(self, cfg: MiniGPT4Config) -> None:
        self.cfg = cfg
        self._prefixes = PrefixStates()

    def losses(
        self,
        llm: nn.Module,
        batch: Batch,
        at: tuple[Tensor, Tensor],
        image_tokens_MD: Tensor | None,
        dummy_loss: Tensor | None = None,
    ) -> Tensor:
        """Loss of each target, nats, (N,) fp32 on the LLM's device.

        Args:
            batch: on the CPU, so that nothing here waits for a GPU.
            at: row and column of the position before each target, (N,) each.
            dummy_loss: a zero that is added to the embeddings for the sake of its graph.
        """
        recompute = self.cfg.llm_grad_checkpoint and torch.is_grad_enabled()
        with native_dtype(llm):
            batch, at, columns_K, inputs = self._inputs(llm, batch, at)
            embeds_BTD = embed(batch, llm.get_input_embeddings(), image_tokens_MD)
            inputs["inputs_embeds"] = embeds_BTD if dummy_loss is None else embeds_BTD + dummy_loss
            with llms.activation_checkpointing(llm, recompute):
                if self.cfg.llm_logits == "targets":
                    return target_losses(llm, inputs, at, batch.targets_BT[:, 1:][at], columns_K)
                return _losses_of_all(llm, inputs, batch)[at]

    def _inputs(
        self, llm: nn.Module, batch: Batch, at: tuple[Tensor, Tensor]
    ) -> tuple[Batch, tuple[Tensor, Tensor], Tensor, dict[str, Any]]:
        """Batch, positions and their columns on the LLM's device, and the arguments of its forward pass."""
        device = llm.get_input_embeddings().weight.device
        if not (self.cfg.llm_packing and can_pack(llm)):
            batch, columns_K, at = (
                batch.to(device),
                _columns(at, device),
                tuple(to_device(index, device) for index in at),
            )
            return batch, at, columns_K, {"attention_mask": batch.attention_mask_BT}
        keeps_prefix = self.cfg.llm_prefix_cache and not is_sharded(llm)  # a pass of one process alone would hang
        prefix = shared_prefix(batch, at) if keeps_prefix else []
        packed: Packed = pack(batch, at, len(prefix))
        columns_K, packed = _columns(packed.at, device), packed.to(device)
        return packed.batch, packed.at, columns_K, packed.inputs(self._prefixes.of(llm, prefix))


def _columns(at: tuple[Tensor, Tensor], device: torch.device) -> Tensor:
    """(K,), each column once, in order; found on the CPU, because how many there are is a number that a GPU would be
    asked for."""
    return to_device(at[1].unique(), device)


def _losses_of_all(llm: nn.Module, inputs: Mapping[str, Any], batch: Batch) -> Tensor:
    """(B, T - 1), from logits at all positions, as the original makes them."""
    logits_BVT = llm(**inputs, use_cache=False).logits[:, :-1].transpose(1, 2).float()
    return nn.functional.cross_entropy(logits_BVT, batch.targets_BT[:, 1:], reduction="none")
