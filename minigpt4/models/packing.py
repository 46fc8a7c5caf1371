"""Rows of a training batch behind each other, without padding and without the beginning that all of them share.

The LLM is frozen, so keys and values of the positions before the first image are the same in each step: they are
computed once for each such beginning and put before the keys of each row.
Shapes: B rows, T columns of the padded batch, N tokens that are left, P positions of the prefix, E channels of a head,
G heads that keys have.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from minigpt4.models.attention import FUSED, PRODUCTS, Grid
from minigpt4.models.freeze import sent
from minigpt4.models.llm import cache_arguments
from minigpt4.models.sequence import Batch

PACKED_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types of transformers whose layers hand what they do not know on to the attention function."""
MOST_PREFIXES = 8
LONGEST_PREFIX = 256
"""Positions; batches of texts alone can share whole prompts."""

States = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values (1, G, P, E) of each layer."""


@dataclass(frozen=True)
class Packed:
    """A batch as one row of N tokens."""

    batch: Batch
    """Of one row; `attention_mask_BT` is the whole batch's and of no use to it."""

    positions_1N: Tensor
    """Position of each token in its own row."""

    at: tuple[Tensor, Tensor]
    """Row (0) and column of the position before each target, in the order of the rows."""

    grid: Grid

    def to(self, device: torch.device) -> "Packed":
        """The same on `device`."""
        positions, *at = (sent(index, device) for index in (self.positions_1N, *self.at))
        return Packed(self.batch.to(device), positions, tuple(at), self.grid.to(device))

    def inputs(self, prefix: States = ()) -> dict[str, object]:
        """Arguments of the LLM's forward pass besides the embeddings."""
        mask = self.grid.cells_BT[
            None, None
        ]  # of four dimensions: transformers makes no mask, and the grid has its own
        grid = replace(self.grid, prefix=prefix)
        return {"attention_mask": mask, "position_ids": self.positions_1N, "grid": grid}


def can_pack(llm: nn.Module) -> bool:
    """Whether the attention functions of `attention.py` serve in all layers of an LLM."""
    config = llm.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    own = config._attn_implementation in (PRODUCTS, FUSED)
    return own and config.model_type in PACKED_TYPES and kinds == {"full_attention"} and not slides


def shared_prefix(batch: Batch, at: tuple[Tensor, Tensor]) -> list[int]:
    """Ids that all rows begin with: text before the first image and before the first position whose loss counts."""
    alike_T = (batch.ids_BT == batch.ids_BT[0]).all(dim=0) & batch.attention_mask_BT.all(dim=0)
    alike_T[batch.image_at[1]] = False
    alike_T[at[1]] = False
    length = int(alike_T.long().cumprod(dim=0).sum())
    return batch.ids_BT[0, : min(length, LONGEST_PREFIX)].tolist()


def pack(batch: Batch, at: tuple[Tensor, Tensor], prefix_length: int = 0) -> Packed:
    """The tokens behind the prefix; all tensors on the CPU.

    Args:
        at: row and column of the position before each target, (M,) each.
        prefix_length: of what `shared_prefix` gave.
    """
    columns_T = torch.arange(prefix_length, int(batch.lengths_B.max()))
    inside_BT = columns_T < batch.lengths_B[:, None]
    row_N, column_N = inside_BT.nonzero(as_tuple=True)
    column_N = column_N + prefix_length
    cells_BT = torch.zeros(inside_BT.shape, dtype=torch.long)
    cells_BT[inside_BT] = torch.arange(len(row_N))
    visible_BT = batch.attention_mask_BT[:, prefix_length:][:, : len(columns_T)]
    grid = Grid(
        cells_BT,
        inside_BT.flatten().nonzero().squeeze(1),
        None if visible_BT[inside_BT].all() else visible_BT,
    )

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
    return Packed(row, column_N[None], place(at), grid)


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
            self._known[key] = _prefix_states(llm, torch.tensor([ids], device=device))
        self._known.move_to_end(key)
        while len(self._known) > MOST_PREFIXES:
            self._known.popitem(last=False)
        return self._known[key]


@torch.no_grad()
def _prefix_states(llm: nn.Module, ids_1P: Tensor) -> States:
    cache = DynamicCache()
    llm.base_model(input_ids=ids_1P, **cache_arguments(llm.base_model, cache))
    return tuple((layer.keys, layer.values) for layer in cache.layers)
