"""GPU memory of a training step, from meta tensors: no weights, no GPU, a second of time.

The real modules run forward and backward on the meta device while every storage that an operation makes is
counted from its birth to its death; so the peak holds what autograd keeps, temporaries and logits, for any LLM
that transformers builds. Attention is counted as a fused kernel (flash or memory-efficient) keeps it.
"""

import re
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from minigpt4.common.errors import ConfigError
from minigpt4.common.schemas.model import MiniGPT4Config
from minigpt4.models.eva_vit import build_vision_encoder
from minigpt4.models.freeze import DTYPES
from minigpt4.models.llm import enable_recomputation, read_llm_config, recomputed
from minigpt4.models.loading import JOINED_PATCHES, build_projection, join_patches, store_frozen
from minigpt4.models.qformer import build_qformer
from minigpt4.models.target_loss import target_losses

GIB = 2**30
OPTIMIZER_BYTES = 4 + 8
"""Per trained parameter: fp32 gradient and AdamW's two fp32 moments."""
CUDA_ALLOWANCE = int(0.8 * GIB)
"""CUDA context, library workspaces and allocator slack; an allowance, not a measurement."""
_QUANTISED_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}  # nf4: one fp32 scale for 64 weights
_LLAMA_SIZES = {
    7: {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    13: {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
}
_ATTENTION = "minigpt4_fused_size"


@dataclass(frozen=True)
class Lengths:
    """Tokens of one training sequence beside the image tokens."""

    prompt: int
    answer: int


@dataclass(frozen=True)
class Part:
    """One row of the table."""

    name: str
    parameters: int
    trained: int
    weight_bytes: int


@dataclass(frozen=True)
class Estimate:
    """Memory of one GPU at one batch size, bytes."""

    parts: tuple[Part, ...]
    batch_size: int
    tokens: int
    """Positions of one sequence, image tokens included."""

    activations: int
    """Peak of everything that a step makes and that autograd keeps."""

    @property
    def weights(self) -> int:
        return sum(part.weight_bytes for part in self.parts)

    @property
    def trained(self) -> int:
        return sum(part.trained for part in self.parts)

    @property
    def optimizer(self) -> int:
        return self.trained * OPTIMIZER_BYTES

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.activations + CUDA_ALLOWANCE


class StorageCounter(TorchDispatchMode):
    """Bytes of all storages made inside the context: `live` now, `peak` so far; `known` tensors do not count."""

    def __init__(self, known: nn.ModuleList) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = weakref.WeakSet(t.untyped_storage() for t in (*known.parameters(), *known.buffers()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, nbytes: int) -> None:
        self.live -= nbytes


class MetaModel:
    """All parts of a configuration on the meta device, ready to be sized at any batch."""

    def __init__(self, cfg: MiniGPT4Config, llm_config: PretrainedConfig) -> None:
        self.cfg = cfg
        with torch.device("meta"):
            self.encoder = build_vision_encoder(cfg)
            self.ln_vision = nn.LayerNorm(self.encoder.num_features)
            self.qformer = build_qformer(cfg, self.encoder.num_features) if cfg.has_qformer else None
            width = self.qformer.hidden_size if self.qformer else self.encoder.num_features * JOINED_PATCHES
            self.projection = build_projection(cfg, width, llm_config.get_text_config().hidden_size)
            self.llm = _build_llm(cfg, llm_config)
        for part, frozen in ((self.encoder, cfg.freeze_vit), (self.ln_vision, cfg.freeze_vit)):
            part.requires_grad_(not frozen)
        if self.qformer is not None:
            self.qformer.requires_grad_(not cfg.freeze_qformer)
        self.parts = self._parts()  # sized as stored, before the 16-bit copies below
        self._to_compute_dtype()

    def estimate(self, batch_size: int, lengths: Lengths, *, recompute: bool | None = None) -> Estimate:
        """Run one training step of `batch_size` on meta tensors; `recompute` overrides `llm_grad_checkpoint`."""
        recompute = self.cfg.llm_grad_checkpoint if recompute is None else recompute
        known = nn.ModuleList(m for m in (self.encoder, self.ln_vision, self.qformer, self.projection, self.llm) if m)
        known.zero_grad(set_to_none=True)
        with StorageCounter(known) as counter:
            tokens = self._step(batch_size, lengths, recompute)
        return Estimate(self.parts, batch_size, tokens, counter.peak)

    def stored_as(self, estimate: Estimate, storage: str) -> Estimate:
        """The same step with the LLM stored in another precision; its activations stay in 16 bits."""
        llm = replace(estimate.parts[-1], weight_bytes=_llm_bytes(self.llm, storage))
        return replace(estimate, parts=(*estimate.parts[:-1], llm))

    def _parts(self) -> tuple[Part, ...]:
        store_frozen(self.encoder, self.cfg.freeze_vit, self.cfg)
        if self.qformer is not None:
            store_frozen(self.qformer, self.cfg.freeze_qformer, self.cfg)
        rows = [_part("vision encoder, ln_vision", self.encoder, self.ln_vision)]
        if self.qformer is not None:
            rows.append(_part("Q-Former", self.qformer))
        rows.append(_part("projection (llama_proj)", self.projection))
        rows.append(replace(_part("LLM", self.llm), weight_bytes=_llm_bytes(self.llm, self.cfg.llm_storage)))
        return tuple(rows)

    def _to_compute_dtype(self) -> None:
        """Meta tensors know no autocast: the vision side computes in its 16 bits throughout."""
        if self.cfg.vit_precision != "fp32":
            for part in (self.encoder, self.ln_vision, self.qformer):
                if part is not None:
                    part.to(DTYPES[self.cfg.vit_precision])
        self.projection.to(self.llm.dtype)

    def _step(self, batch_size: int, lengths: Lengths, recompute: bool) -> int:
        embeds_BTD = self._embeds(batch_size, lengths)
        self._loss(embeds_BTD, lengths.answer, recompute).backward()
        return embeds_BTD.shape[1]

    def _embeds(self, batch_size: int, lengths: Lengths) -> Tensor:
        image_BQD = self.projection(self._vision(batch_size).to(self.llm.dtype))
        length, width = 1 + lengths.prompt + lengths.answer, image_BQD.shape[2]
        text = torch.empty(batch_size, length, width, dtype=self.llm.dtype, device="meta")
        return torch.cat([image_BQD, text], dim=1)

    def _loss(self, embeds_BTD: Tensor, answer: int, recompute: bool) -> Tensor:
        mask = torch.empty(embeds_BTD.shape[:2], dtype=torch.long, device="meta")
        targets = torch.empty(len(embeds_BTD) * answer, dtype=torch.long, device="meta")
        with recomputed(self.llm, recompute):
            inputs = {"inputs_embeds": embeds_BTD, "attention_mask": mask}
            return target_losses(self.llm, inputs, (targets, targets), targets).mean()

    def _vision(self, batch_size: int) -> Tensor:
        size, dtype = self.cfg.image_size, next(self.encoder.parameters()).dtype
        image = torch.empty(batch_size, 3, size, size, dtype=dtype, device="meta")
        trained = not (self.cfg.freeze_vit and (self.qformer is None or self.cfg.freeze_qformer))
        with torch.set_grad_enabled(trained):
            tokens_BNV = self.ln_vision(self.encoder(image))
            if self.qformer is not None:
                return self.qformer(tokens_BNV)
            patches = tokens_BNV[:, self.encoder.num_prefix_tokens :]
            return join_patches(patches)


def llm_config_for(cfg: MiniGPT4Config) -> tuple[PretrainedConfig, str]:
    """The LLM's config.json, or where the directory is not here the LLaMA of the size in its name; and which.

    Raises ConfigError if `llama_model` is not set or neither tells the size.
    """
    directory = cfg.llm_directory()
    if (directory / "config.json").is_file():
        return read_llm_config(directory), f"{directory}/config.json"
    size = re.search(r"(?<!\d)(7|13)b(?![a-z])", directory.name.lower())
    if not size:
        raise ConfigError(
            f"model.llama_model: {cfg.llama_model!r} is not here and its name does not end in a size such as 7b or "
            "13b; put its config.json there to have it sized"
        )
    return LlamaConfig(vocab_size=32000, **_LLAMA_SIZES[int(size[1])]), f"LLaMA {size[1]}B, by the name {directory}"


def _build_llm(cfg: MiniGPT4Config, llm_config: PretrainedConfig) -> nn.Module:
    AttentionInterface.register(_ATTENTION, _sized_attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
    dtype = DTYPES.get(cfg.llm_storage, torch.float16)
    llm = AutoModelForCausalLM.from_config(llm_config, dtype=dtype, attn_implementation=_ATTENTION)
    enable_recomputation(llm)
    return llm.requires_grad_(False).eval()


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


def _sized_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _part(name: str, *modules: nn.Module) -> Part:
    parameters = [p for module in modules for p in module.parameters()]
    return Part(
        name,
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
    )


def _llm_bytes(llm: nn.Module, storage: str) -> int:
    """Stored size; bitsandbytes quantises linear layers except the output layer."""
    sizes = {id(p): p.numel() * p.element_size() for p in llm.parameters()}
    if storage in _QUANTISED_BYTES:
        output = llm.get_output_embeddings()
        for module in llm.modules():
            if isinstance(module, nn.Linear) and module is not output:
                sizes[id(module.weight)] = int(module.weight.numel() * _QUANTISED_BYTES[storage])
    return sum(sizes.values())
