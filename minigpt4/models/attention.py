"""The LLM's attention: over rows whose padding nobody else computes, and in a form that is fast on CPUs.

Three functions are registered with transformers: `FUSED` is torch's fused kernel; `MATMUL` is two batched matrix
products and a softmax, for the fused kernel of CPUs is several times slower in its backward pass; `BY_ROW` is either of
them, for each row of new tokens by itself (`run.batch_invariant`). All also take a `PadMap`: then the LLM sees one row
with the tokens of all rows behind each other, and only here do they stand in rows.
Shapes: B rows, T columns, N tokens of all rows, P positions of a prefix, S = P + T, E channels of a head, H heads in
G groups that share keys.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from minigpt4.common.devices import is_gpu, to_device
from minigpt4.common.errors import ConfigError, errors_as
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.models.fsdp import is_sharded

log = logging.getLogger(__name__)

MATMUL, FUSED, BY_ROW = "minigpt4_products", "minigpt4_fused", "minigpt4_by_row"
LLAMA_LIKE = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types of transformers that are LLaMA's layers: they hand what they do not know on to the attention function,
and their logits are the output layer's, without scale or cap."""


def attention_for(device: torch.device) -> str:
    """Name of the function that is fast on `device`."""
    return MATMUL if device.type == "cpu" else FUSED


def is_batch_invariant(llm: nn.Module) -> bool:
    """Whether a row's numbers must not depend on the other rows, to the bit."""
    return llm.config._attn_implementation == BY_ROW


def make_batch_invariant(llm: nn.Module, cfg: MiniGPT4Config) -> None:
    """`run.batch_invariant`, for the process: on a CPU it computes with one thread from now on, for products in several
    are split in other ways by other numbers of them. ConfigError for an LLM that mixes its rows."""
    own = cfg.llm_attention is None and not cfg.llm_cuda_graph and cfg.llm_storage != "int8"
    if llm.config.model_type not in LLAMA_LIKE or not own:
        types = f"{', '.join(sorted(LLAMA_LIKE))} (not {llm.config.model_type})"
        switches = "llm_attention: null, llm_cuda_graph: False, and not with int8"
        raise ConfigError(f"run.batch_invariant: goes with LLMs of the types {types}, {switches}")
    llm.set_attn_implementation(BY_ROW)
    if llm.device.type == "cpu":
        torch.set_num_threads(1)


@dataclass(frozen=True)
class PadMap:
    """Rows and columns of tokens that the LLM sees as one row."""

    cells_BT: Tensor
    """Which token is in a cell; any number where there is none, int64."""
    tokens_N: Tensor
    """The cell of each token, counted row by row, int64."""
    visible_BT: Tensor | None = None
    """1 for cells that later ones may attend to; None: all of them. Cells without a token lie behind their row."""
    prefix: tuple[tuple[Tensor, Tensor], ...] = ()
    """Keys and values (1, G, P, E) of each layer, of positions before the first column."""

    def to(self, device: torch.device) -> "PadMap":
        """The same on `device`; the prefix is there already."""
        visible = None if self.visible_BT is None else to_device(self.visible_BT, device)
        cells, tokens = to_device(self.cells_BT, device), to_device(self.tokens_N, device)
        return replace(self, cells_BT=cells, tokens_N=tokens, visible_BT=visible)

    @property
    def prefix_length(self) -> int:
        return self.prefix[0][0].shape[2] if self.prefix else 0

    def rows(self, states_1HNE: Tensor) -> Tensor:
        """(B, H, T, E); cells without a token hold some other one."""
        states_NHE = states_1HNE[0].transpose(0, 1)
        cells = _Cells.apply(states_NHE.flatten(1), self.cells_BT.flatten(), self.tokens_N)
        return cells.view(*self.cells_BT.shape, *states_NHE.shape[1:]).transpose(1, 2)

    def tokens(self, states_BHTE: Tensor) -> Tensor:
        """(1, N, H, E)."""
        states_MHE = states_BHTE.transpose(1, 2).flatten(0, 1)
        return _Tokens.apply(states_MHE.flatten(1), self.tokens_N).view(1, -1, *states_MHE.shape[1:])

    def states(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries (B, H, T, E) in their rows; keys and values behind those of the prefix, (B, G, S, E) each."""
        own = [self.rows(key), self.rows(value)]
        if self.prefix:
            shape = (len(self.cells_BT), -1, -1, -1)
            before = [states.to(key.dtype).expand(shape) for states in self.prefix[layer]]
            own = [torch.cat(pair, dim=2) for pair in zip(before, own, strict=True)]
        return self.rows(query), *own

    @cached_property
    def mask(self) -> Tensor:
        """True where a column may look, (1, 1, T, S), or (B, 1, T, S) if some cells are not visible."""
        columns, device = self.cells_BT.shape[1], self.cells_BT.device
        shape = (columns, self.prefix_length + columns)
        mask_TS = torch.ones(shape, dtype=torch.bool, device=device).tril(self.prefix_length)
        if self.visible_BT is None:
            return mask_TS[None, None]
        visible_BS = nn.functional.pad(self.visible_BT.bool(), (self.prefix_length, 0), value=True)
        return mask_TS & visible_BS[:, None, None]


class _Cells(torch.autograd.Function):
    """Tokens (N, C) to cells (M, C). Cells without a token get no gradient, so gathering is enough both ways."""

    @staticmethod
    def forward(ctx: Any, tokens_NC: Tensor, cells_M: Tensor, tokens_N: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_N)
        return tokens_NC.index_select(0, cells_M)

    @staticmethod
    def backward(ctx: Any, outer_MC: Tensor) -> tuple[Tensor, None, None]:
        (tokens_N,) = ctx.saved_tensors
        return outer_MC.index_select(0, tokens_N), None, None


class _Tokens(torch.autograd.Function):
    """Cells (M, C) to tokens (N, C)."""

    @staticmethod
    def forward(ctx: Any, cells_MC: Tensor, tokens_N: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_N)
        ctx.cells = len(cells_MC)
        return cells_MC.index_select(0, tokens_N)

    @staticmethod
    def backward(ctx: Any, outer_NC: Tensor) -> tuple[Tensor, None]:
        (tokens_N,) = ctx.saved_tensors
        cells_MC = outer_NC.new_zeros(ctx.cells, outer_NC.shape[1])
        return cells_MC.index_copy_(0, tokens_N, outer_NC), None


def _fused(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BGSE: Tensor,
    value_BGSE: Tensor,
    attention_mask: Tensor | None,
    grid: PadMap | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if grid is None:
        states = (query_BHTE, key_BGSE, value_BGSE)
        return sdpa_attention_forward(module, *states, attention_mask, scaling=scaling, **kwargs)
    query, key, value = grid.states(module.layer_idx, query_BHTE, key_BGSE, value_BGSE)
    groups = getattr(module, "num_key_value_groups", 1)  # heads that share keys
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if grid.visible_BT is not None:
        output_BHTE = nn.functional.scaled_dot_product_attention(query, key, value, grid.mask, scale=scaling)
        return grid.tokens(output_BHTE), None
    before = grid.prefix_length  # columns without query in front make a square, whose mask fused kernels know
    query = nn.functional.pad(query, (0, 0, before, 0))
    output_BHSE = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return grid.tokens(output_BHSE[:, :, before:]), None


def _products(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BGSE: Tensor,
    value_BGSE: Tensor,
    attention_mask: Tensor | None,
    grid: PadMap | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if grid is None:
        output_BHTE = _attend(query_BHTE, key_BGSE, value_BGSE, attention_mask, scaling)
        return output_BHTE.transpose(1, 2).contiguous(), None
    query, key, value = grid.states(module.layer_idx, query_BHTE, key_BGSE, value_BGSE)
    # Half the lowest number of a type; that of fp32 stays finite in bf16, which autocast may make of the scores.
    bias = torch.zeros((), dtype=query.dtype).where(grid.mask, torch.finfo(query.dtype).min / 2)
    return grid.tokens(_attend(query, key, value, bias, scaling)), None


def _attend(
    query_BHTE: Tensor, key_BGSE: Tensor, value_BGSE: Tensor, bias: Tensor | None, scaling: float | None
) -> Tensor:
    """(B, H, T, E); `bias` (1 or B, 1, T, S) is added to the scores. Heads of a group share keys without copies."""
    rows, heads, columns, channels = query_BHTE.shape
    groups = key_BGSE.shape[1]
    query_FQE = query_BHTE.reshape(rows * groups, -1, channels)
    key_FSE, value_FSE = key_BGSE.flatten(0, 1), value_BGSE.flatten(0, 1)
    scale = channels**-0.5 if scaling is None else scaling
    scores = torch.baddbmm(query_FQE.new_empty(()), query_FQE, key_FSE.transpose(1, 2), beta=0, alpha=scale)
    scores = scores.view(rows, heads, columns, -1)
    if bias is not None:
        scores += bias
    shares_FQS = scores.softmax(dim=-1).view(rows * groups, query_FQE.shape[1], -1)
    return torch.bmm(shares_FQS.to(value_FSE.dtype), value_FSE).view(query_BHTE.shape)


def _by_row(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BGSE: Tensor,
    value_BGSE: Tensor,
    attention_mask: Tensor | list[int] | None,
    grid: PadMap | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if not isinstance(attention_mask, list):
        attend = _products if query_BHTE.device.type == "cpu" else _fused
        return attend(module, query_BHTE, key_BGSE, value_BGSE, attention_mask, grid, scaling, **kwargs)
    output_BH1E = torch.zeros_like(query_BHTE)  # of rows without keys, too
    for row, first in zip(range(len(key_BGSE)), attention_mask, strict=False):
        states = query_BHTE[row], key_BGSE[row, :, first:], value_BGSE[row, :, first:]
        # In fp32: a CPU's 16-bit kernels are built anew for each length, which takes longer than they run.
        states = (apart(one, torch.float32) for one in states)
        output_BH1E[row] = nn.functional.scaled_dot_product_attention(*states, scale=scaling, enable_gqa=True)[0]
    return output_BH1E.transpose(1, 2), None


def _first_positions(*args: Any, **kwargs: Any) -> Tensor | list[int]:
    """What `BY_ROW` gets as a mask: where one new token a row begins to look, else the usual mask."""
    mask_B1TS = eager_mask(*args, **kwargs)
    return (mask_B1TS[:, 0, 0] < 0).sum(dim=1).tolist() if mask_B1TS.shape[2] == 1 else mask_B1TS


def apart(row: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A batch of one row, in memory of its own: what a kernel does may depend on where its numbers lie."""
    return row[None].to(dtype or row.dtype, copy=True, memory_format=torch.contiguous_format)


def one_by_one(function: Callable[[Tensor], Tensor], rows_B: Tensor) -> Tensor:
    """`function` of each row by itself, as a batch of all."""
    return torch.cat([function(apart(row)) for row in rows_B])


AttentionInterface.register(MATMUL, _products)
AttentionMaskInterface.register(MATMUL, eager_mask)
AttentionInterface.register(FUSED, _fused)
AttentionMaskInterface.register(FUSED, sdpa_mask)
AttentionInterface.register(BY_ROW, _by_row)
AttentionMaskInterface.register(BY_ROW, _first_positions)


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Inside, a model of transformers can return its attention (`output_attentions`)."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


# The types and memory of an LLM's pass


def native_dtype(model: nn.Module) -> AbstractContextManager:
    """Inside, a 16-bit LLM computes in its own type; one in fp32 follows the caller's autocast.

    Autocast to the other 16-bit type (`run.amp_dtype`) would copy every weight and keep the copies for the backward
    pass: the LLM's memory once more. Adapters in fp32 (LoRA) compute in its type, too.
    """
    weight = model.get_input_embeddings().weight
    if weight.dtype == torch.float32:
        device = weight.device.type
        if not (torch.is_autocast_enabled(device) and weight.requires_grad and is_sharded(model)):
            return nullcontext()
        # It would keep a copy of each layer that was gathered, to the end of the forward pass.
        return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)
    has_adapters = hasattr(model, "peft_config")
    return torch.autocast(weight.device.type, weight.dtype if has_adapters else None, enabled=has_adapters)


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Prepare the layers for `activation_checkpointing`; by itself it changes nothing."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # renamed in transformers 5, positional in both


@contextmanager
def activation_checkpointing(model: nn.Module, active: bool) -> Iterator[None]:
    """Inside, layers keep no activations for the backward pass but compute them again.

    transformers does so in train mode only, and then refuses a key-value cache; a frozen one is put into it without
    what it contains, so no dropout is switched on.
    """
    layers = [part for part in model.modules() if hasattr(part, "gradient_checkpointing")] if active else []
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training


# `run.compile`: one compilation serves the norms and MLPs of all layers, whereas attention knows its layer's number and
# would be compiled for each. Blocks of the vision side are compiled whole. Batches differ in length: dynamic shapes.


def require_compiler(device: torch.device) -> None:
    """ConfigError if torch.compile has nothing to compile with."""
    from torch._inductor import cpp_builder  # seconds to import, for a switch that is off by default
    from torch.utils._triton import has_triton

    if not is_gpu(device):
        with errors_as(ConfigError, "run.compile: needs a C++ compiler such as g++ (or CXX); or set it to False"):
            cpp_builder.get_cpp_compiler()
    elif not has_triton():
        raise ConfigError("run.compile: needs Triton, which comes with torch for GPUs; or set it to False")


def compile_parts(model: nn.Module) -> None:
    """Let the parts of a `MiniGPT4` compile themselves when they first run; ConfigError without compiler."""
    require_compiler(model.device)
    parts = list(llm_parts(model.llama_model))
    if next(model.visual_encoder.parameters()).device.type != "meta":  # one that waits encodes each image only once
        parts += [*model.visual_encoder.blocks, *model.Qformer.blocks]
    for part in parts:
        part.compile(dynamic=True)
    log.info("run.compile: %d parts; the first step takes up to minutes longer", len(parts))


def llm_parts(llm: nn.Module) -> Iterator[nn.Module]:
    """Norms and MLPs of the LLM's layers."""
    for layer in getattr(llm.base_model, "layers", []):
        yield from (part for part in layer.children() if not hasattr(part, "layer_idx"))
