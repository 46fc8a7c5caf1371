"""From a training batch to the losses of its targets, by the ways that the configuration chooses.

Shapes: B rows, T positions, N targets, M image tokens of the batch, D channels of the LLM.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.schemas.model import MiniGPT4Config
from minigpt4.models import llm as llms
from minigpt4.models.freeze import compute_as_stored, sent
from minigpt4.models.packing import Packed, PrefixStates, can_pack, pack, shared_prefix
from minigpt4.models.sequence import Batch, embed
from minigpt4.models.sharded_llm import is_sharded
from minigpt4.models.target_loss import target_losses


class TargetPass:
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
        anchor: Tensor | None = None,
    ) -> Tensor:
        """Loss of each target, nats, (N,) fp32 on the LLM's device.

        Args:
            batch: on the CPU, so that nothing here waits for a GPU.
            at: row and column of the position before each target, (N,) each.
            anchor: a zero that is added to the embeddings for the sake of its graph.
        """
        recompute = self.cfg.llm_grad_checkpoint and torch.is_grad_enabled()
        with compute_as_stored(llm):
            batch, at, columns_K, inputs = self._inputs(llm, batch, at)
            embeds_BTD = embed(batch, llm.get_input_embeddings(), image_tokens_MD)
            inputs["inputs_embeds"] = embeds_BTD if anchor is None else embeds_BTD + anchor
            with llms.recomputed(llm, recompute):
                if self.cfg.llm_logits == "targets":
                    return target_losses(llm, inputs, at, batch.targets_BT[:, 1:][at], columns_K)
                return _losses_of_all(llm, inputs, batch)[at]

    def _inputs(
        self, llm: nn.Module, batch: Batch, at: tuple[Tensor, Tensor]
    ) -> tuple[Batch, tuple[Tensor, Tensor], Tensor, dict[str, Any]]:
        """Batch, positions and their columns on the LLM's device, and the arguments of its forward pass."""
        device = llm.get_input_embeddings().weight.device
        if not (self.cfg.llm_packing and can_pack(llm)):
            batch, columns_K, at = batch.to(device), _columns(at, device), tuple(sent(index, device) for index in at)
            return batch, at, columns_K, {"attention_mask": batch.attention_mask_BT}
        keeps_prefix = self.cfg.llm_prefix_cache and not is_sharded(llm)  # a pass of one process alone would hang
        prefix = shared_prefix(batch, at) if keeps_prefix else []
        packed: Packed = pack(batch, at, len(prefix))
        columns_K, packed = _columns(packed.at, device), packed.to(device)
        return packed.batch, packed.at, columns_K, packed.inputs(self._prefixes.of(llm, prefix))


def _columns(at: tuple[Tensor, Tensor], device: torch.device) -> Tensor:
    """(K,), each column once, in order; found on the CPU, because how many there are is a number that a GPU would be
    asked for."""
    return sent(at[1].unique(), device)


def _losses_of_all(llm: nn.Module, inputs: Mapping[str, Any], batch: Batch) -> Tensor:
    """(B, T - 1), from logits at all positions, as the original makes them."""
    logits_BVT = llm(**inputs, use_cache=False).logits[:, :-1].transpose(1, 2).float()
    return nn.functional.cross_entropy(logits_BVT, batch.targets_BT[:, 1:], reduction="none")
