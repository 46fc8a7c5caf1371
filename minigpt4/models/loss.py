"""The LLM's pass over a training batch, and the loss of its targets.

The batch goes through the LLM packed (rows behind each other, without padding). A frozen LLM reads the beginning that
all rows share once, for its keys and values are kept from step to step, and a frozen output layer makes no logits of
all targets at once. Each is a switch of the section `model:`.
Shapes: B rows, T positions, N targets, M image tokens of the batch, P positions of the shared beginning, D channels,
V vocabulary, G heads that keys have, E channels of a head.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from minigpt4.common.devices import to_device
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models.attention import (
    BY_ROW,
    FUSED,
    LLAMA_LIKE,
    MATMUL,
    PadMap,
    activation_checkpointing,
    native_dtype,
)
from minigpt4.models.base_model import is_trained
from minigpt4.models.fsdp import is_sharded
from minigpt4.models.llm import cache_arguments
from minigpt4.models.prompting import Batch, embed

MOST_PREFIXES = 8
LONGEST_PREFIX = 256
"""Positions; batches of texts alone can share whole prompts."""

States = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values (1, G, P, E) of each layer."""

CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 16 << 20, 64 << 20
"""Of fp32 logits that exist at a time: on a CPU few enough to stay in its cache, on a GPU enough to fill it."""


class LMLoss:
    """Runs the LLM over batches; remembers the beginnings that they share, of a frozen one."""

    def __init__(self, cfg: MiniGPT4Config, llm: nn.Module) -> None:
        self.cfg = cfg
        self._prefixes = PrefixStates()
        # Of a sharded LLM a pass of one process alone would hang; of a trained one the states change.
        self._keeps_prefix = cfg.llm_prefix_cache and not is_sharded(llm) and not is_trained(llm)

    def losses(
        self,
        llm: nn.Module,
        batch: Batch,
        at: tuple[Tensor, Tensor],
        image_tokens_MD: Tensor | None,
        dummy_loss: Tensor | None = None,
    ) -> Tensor:
        """Loss of each target, nats, (N,) fp32 on the LLM's device.

        `at`: row and column of the position before each target, (N,) each. They and `batch` are on the CPU, so that
        nothing here waits for a GPU. `dummy_loss`: a zero that is added to the embeddings for the sake of its graph.
        """
        recompute = self.cfg.llm_grad_checkpoint and torch.is_grad_enabled()
        with native_dtype(llm):
            batch, at, columns_K, inputs = self._inputs(llm, batch, at)
            embeds_BTD = embed(batch, llm.get_input_embeddings(), image_tokens_MD)
            inputs["inputs_embeds"] = embeds_BTD if dummy_loss is None else embeds_BTD + dummy_loss
            with activation_checkpointing(llm, recompute):
                if self.cfg.llm_logits == "targets":
                    return target_losses(llm, inputs, at, batch.targets_BT[:, 1:][at], columns_K)
                logits_BVT = llm(**inputs, use_cache=False).logits[:, :-1].transpose(1, 2).float()  # as the original
                return nn.functional.cross_entropy(logits_BVT, batch.targets_BT[:, 1:], reduction="none")[at]

    def _inputs(
        self, llm: nn.Module, batch: Batch, at: tuple[Tensor, Tensor]
    ) -> tuple[Batch, tuple[Tensor, Tensor], Tensor, dict[str, Any]]:
        """Batch, positions and their columns on the LLM's device, and the arguments of its forward pass."""
        device = llm.get_input_embeddings().weight.device
        if not (self.cfg.llm_packing and can_pack(llm)):
            columns_K = to_device(at[1].unique(), device)  # found on the CPU: a GPU would be asked how many there are
            batch, at = batch.to(device), tuple(to_device(index, device) for index in at)
            return batch, at, columns_K, {"attention_mask": batch.attention_mask_BT}
        prefix = shared_prefix(batch, at) if self._keeps_prefix else []
        row, at, positions_1N, grid = pack(batch, at, len(prefix))
        columns_K, *at = (to_device(index, device) for index in (at[1].unique(), *at))
        grid = replace(grid.to(device), prefix=self._prefixes.of(llm, prefix))
        mask = grid.cells_BT[None, None]  # of four dimensions: transformers makes none, and the grid has its own
        inputs = {"attention_mask": mask, "position_ids": to_device(positions_1N, device), "grid": grid}
        return row.to(device), tuple(at), columns_K, inputs


# Packing


def can_pack(llm: nn.Module) -> bool:
    """Whether the attention functions of `attention.py` serve in all layers of an LLM."""
    config = llm.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    own = config._attn_implementation in (MATMUL, FUSED, BY_ROW)
    return own and config.model_type in LLAMA_LIKE and kinds == {"full_attention"} and not slides


def shared_prefix(batch: Batch, at: tuple[Tensor, Tensor]) -> list[int]:
    """Ids that all rows begin with: text before the first image and before the first position whose loss counts."""
    alike_T = (batch.ids_BT == batch.ids_BT[0]).all(dim=0) & batch.attention_mask_BT.all(dim=0)
    alike_T[batch.image_at[1]] = False
    alike_T[at[1]] = False
    length = int(alike_T.long().cumprod(dim=0).sum())
    return batch.ids_BT[0, : min(length, LONGEST_PREFIX)].tolist()


def pack(
    batch: Batch, at: tuple[Tensor, Tensor], prefix_length: int
) -> tuple[Batch, tuple[Tensor, Tensor], Tensor, PadMap]:
    """A batch behind its shared prefix as one row of N tokens, on the CPU; `at`: as in `LMLoss.losses`.

    Returns the row, whose `attention_mask_BT` is the whole batch's, `at` in that row, the position (1, N) of each token
    in its own row, and where the tokens stand in rows and columns.
    """
    columns_T = torch.arange(prefix_length, int(batch.lengths_B.max()))
    inside_BT = columns_T < batch.lengths_B[:, None]
    row_N, column_N = inside_BT.nonzero(as_tuple=True)
    column_N = column_N + prefix_length
    cells_BT = torch.zeros(inside_BT.shape, dtype=torch.long)
    cells_BT[inside_BT] = torch.arange(len(row_N))
    visible_BT = batch.attention_mask_BT[:, prefix_length:][:, : len(columns_T)]
    tokens_N = inside_BT.flatten().nonzero().squeeze(1)
    grid = PadMap(cells_BT, tokens_N, None if visible_BT[inside_BT].all() else visible_BT)

    def place(index: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        token = cells_BT[index[0], index[1] - prefix_length]
        return torch.zeros_like(token), token

    row = Batch(
        ids_BT=batch.ids_BT[row_N, column_N][None],
        attention_mask_BT=batch.attention_mask_BT,
        targets_BT=batch.targets_BT[row_N, column_N][None],
        image_at=place(batch.image_at),
        image_source=batch.image_source,
        lengths_B=torch.tensor([len(row_N)]),
    )
    return row, place(at), column_N[None], grid


class PrefixStates:
    """Keys and values of the beginnings that were met last."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple, States] = OrderedDict()

    def of(self, llm: nn.Module, ids: list[int]) -> States:
        """Those of `ids`, as a frozen LLM computes them under the precision in force."""
        if not ids:
            return ()
        device = llm.get_input_embeddings().weight.device
        amp = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = (tuple(ids), device, amp)
        if key not in self._known:
            cache = DynamicCache()
            with torch.no_grad():
                llm.base_model(input_ids=torch.tensor([ids], device=device), **cache_arguments(llm.base_model, cache))
            self._known[key] = tuple((layer.keys, layer.values) for layer in cache.layers)
        self._known.move_to_end(key)
        while len(self._known) > MOST_PREFIXES:
            self._known.popitem(last=False)
        return self._known[key]


# The frozen output layer: its input's gradient is all that the backward pass needs of it, and that is known as soon as
# the logits are, so each chunk of positions is multiplied, turned into losses and a gradient, and forgotten.


def target_losses(
    llm: nn.Module, inputs: Mapping[str, Any], at: tuple[Tensor, Tensor], targets_N: Tensor, columns_K: Tensor
) -> Tensor:
    """Loss of each target, nats, (N,) fp32.

    `inputs`: arguments of the LLM's forward pass. `at`: row and column of the position before each target, (N,) each.
    `columns_K`: those columns, each once, in order.
    """
    inputs = {**inputs, "use_cache": False}
    head = llm.get_output_embeddings()
    is_plain = llm.config.model_type in LLAMA_LIKE and isinstance(head, nn.Linear) and head.weight.is_floating_point()
    if not is_plain or head.weight.requires_grad:
        logits_BKV = llm(**inputs, logits_to_keep=columns_K).logits
        logits_ND = logits_BKV[at[0], torch.searchsorted(columns_K, at[1])]
        return nn.functional.cross_entropy(logits_ND.float(), targets_N, reduction="none")
    hidden_BTD = llm.base_model(**inputs).last_hidden_state
    hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, at[0] * hidden_BTD.shape[1] + at[1])
    return _FrozenHeadLoss.apply(hidden_ND, head.weight, head.bias, targets_N)


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
