"""GPU memory of a training step, from meta tensors: no weights, no GPU, a second of time.

The real modules run forward and backward on the meta device while every storage that an operation makes is counted
from its birth to its death; so the peak holds what autograd keeps, temporaries and logits. Attention is counted as a
fused kernel (flash or memory-efficient) keeps it, unless `llm_attention` is `eager`. Meta tensors know no autocast: the
linear layers of a trained LLM in fp32, and adapters, cast what they multiply themselves, as autocast would.

Of layers that are alike only the first and the last two are run: memory grows, or shrinks, from each to the next by as
much, so the peak is at one of the ends; what is between them keeps as many bytes as the second.
"""

import copy
import functools
import re
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from minigpt4.common.errors import ConfigError, WeightsError, errors_as
from minigpt4.common.model_schema import EVA_CLIP_G, PARTS, MiniGPT4Config
from minigpt4.models.attention import LLAMA_LIKE, activation_checkpointing, enable_activation_checkpointing
from minigpt4.models.base_model import DTYPES, is_trained
from minigpt4.models.connectors import build_projection
from minigpt4.models.fsdp import decoder_layers
from minigpt4.models.llm import read_llm_config
from minigpt4.models.loading import build_vision, feature_shape, store_frozen
from minigpt4.models.loss import target_losses
from minigpt4.models.train_rules import apply_rule
from minigpt4.models.vision_tower import is_directory

_FUSED = "minigpt4_fused_size"


def _fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    query, key = query.to(value.dtype), key.to(value.dtype)  # of a residual stream in fp32, under autocast
    output = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, is_causal=True)[0]
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_FUSED, _fused)
AttentionMaskInterface.register(_FUSED, lambda *args, **kwargs: None)

GIB = 2**30
COPIES = 3
"""Of what is trained, beside the weights: gradient and AdamW's two moments, in the type of the weight."""
CUDA_ALLOWANCE = int(1.3 * GIB)
"""CUDA context, library workspaces and allocator slack; an allowance, not a measurement."""
_QUANTISED_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}  # nf4: one fp32 scale for 64 weights
_LLAMA_SIZES = {
    7: {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    13: {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
}
GATHERED_LAYERS = 3.2
"""Of a sharded LLM at a time, by torch's allocator: one computes, one arrives, one is copied into place."""
_LLM = "LLM"


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
    optimizer_bytes: int = 0
    """Gradients and AdamW's moments."""


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
        return sum(part.optimizer_bytes for part in self.parts)

    @property
    def allocated(self) -> int:
        """What a GPU's allocator counts."""
        return self.weights + self.optimizer + self.activations

    @property
    def total(self) -> int:
        return self.allocated + CUDA_ALLOWANCE


class StorageCounter(TorchDispatchMode):
    """Bytes of all storages made inside the context: `live` now, `peak` so far; `known` tensors do not count."""

    def __init__(self, known: nn.ModuleList) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen = weakref.WeakSet(t.untyped_storage() for t in (*known.parameters(), *known.buffers()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and (storage := value.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._release, storage.nbytes())
        return output

    def _release(self, nbytes: int) -> None:
        self.live -= nbytes


class _Alike(torch.autograd.Function):
    """In the place of a layer: keeps so many bytes for its backward pass, which makes the gradients of `trained`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, nbytes: int, *trained: Tensor) -> Tensor:
        ctx.kept = [hidden, hidden.new_empty(max(0, nbytes - hidden.nbytes), dtype=torch.uint8)]
        ctx.trained = trained
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        ctx.kept.clear()
        return torch.empty_like(outer), None, *map(torch.empty_like, ctx.trained)


class MetaModel:
    """All parts of a configuration on the meta device, ready to be sized at any batch."""

    def __init__(self, cfg: MiniGPT4Config, llm_config: PretrainedConfig, amp: torch.dtype | None = None) -> None:
        """`amp`: type of the run's autocast, None without."""
        self.cfg = cfg
        with torch.device("meta"):
            self.encoder, self.ln_vision, self.connector = build_vision(cfg)
            llm_width = llm_config.get_text_config().hidden_size
            self.projection = build_projection(cfg, self.connector.feature_width, llm_width)
            with errors_as(WeightsError, f"model.llama_model: no LLM can be built as {cfg.llama_model} describes it"):
                self.llm = AutoModelForCausalLM.from_config(
                    copy.deepcopy(llm_config),  # the model writes its attention into it
                    dtype=DTYPES.get(cfg.llm_storage, torch.float16),
                    attn_implementation="eager" if cfg.llm_attention == "eager" else _FUSED,
                )
                enable_activation_checkpointing(self.llm)
        self.llm.requires_grad_(False).eval()
        vision = (self.encoder, self.ln_vision, self.connector)
        names = ("visual_encoder", "ln_vision", "Qformer", "llama_proj", "llama_model")
        with torch.device("meta"):
            for name, module in zip(names, (*vision, self.projection, self.llm), strict=True):
                self._apply(name, module)
        store_frozen(self.encoder, cfg.freeze_vit, cfg)
        store_frozen(self.connector, cfg.freeze_qformer, cfg)
        llm = replace(_part(_LLM, self.llm), weight_bytes=_llm_bytes(self.llm, cfg.llm_storage))
        parts = [_part("vision encoder, ln_vision", *vision[:2]), _part("Q-Former", self.connector)]
        parts += [_part("projection (llama_proj)", self.projection), llm]
        self.parts = tuple(part for part in parts if part.parameters)
        # Sized as stored. Meta tensors know no autocast: from here on the vision side computes in its 16 bits.
        for part in vision if cfg.vit_precision != "fp32" else ():
            part.to(DTYPES[cfg.vit_precision])
        self.projection.to(self.llm.dtype)
        self._casts: list[Tensor] | None = []
        """What autocast keeps to the end of the forward pass; None: nothing."""
        computing = amp if self.llm.dtype == torch.float32 else self.llm.dtype
        for layer in self.llm.modules() if is_trained(self.llm) and computing else ():
            if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32 != computing:
                layer.forward = functools.partial(self._cast_linear, layer, computing)
        for layer in self.llm.modules():
            if isinstance(layer, nn.Dropout) and layer.training:  # of adapters; a GPU keeps a byte a number of it
                layer.forward = lambda hidden, p=layer.p: torch.native_dropout(hidden, p, True)[0]
        if not is_trained(*vision):
            known_tower = cfg.vit_model == EVA_CLIP_G or is_directory(cfg.vit_model)
            _pass_alike([*(self.encoder.blocks if known_tower else ()), *self.connector.blocks])
        if self.llm.config.model_type in LLAMA_LIKE:
            for _, layers in groupby(decoder_layers(self.llm), _kind):
                self._run_ends(list(layers))

    def _apply(self, name: str, module: nn.Module) -> None:
        rule = self.cfg.rule_of(name)
        module.requires_grad_(rule.rule == "full")
        blocks = list(decoder_layers(module) if module is self.llm else getattr(module, "blocks", ()))
        if blocks and rule.rule not in ("frozen", "full"):
            apply_rule(module, rule, f"model.train.{PARTS[name]}", blocks)
        for part in module.modules() if rule.is_lora else ():
            part.training = isinstance(part, nn.Dropout)  # alone: layers would recompute

    def _run_ends(self, layers: list[nn.Module]) -> None:
        """Of alike layers run the first and the last two."""
        before: list[tuple[int, int]] = []  # the second, and behind it: what lives, how many casts

        def measure(layer: nn.Module, _: Any) -> None:
            if layer is layers[1]:
                before.clear()
            before.append((self._counter.live, len(self._casts or ())))

        def stand_in(layer: nn.Module, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            (live, casts), (live_after, casts_after) = before[:2]
            nbytes = live_after - live
            if self._casts and (self._recomputes or not hidden.requires_grad):  # else autograd keeps them, too
                self._casts.append(hidden.new_empty(_bytes(self._casts[casts:casts_after]), dtype=torch.uint8))
                nbytes -= self._casts[-1].nbytes
            trained = [p for p in layer.parameters() if p.requires_grad and not self._drops_gradients]
            return _Alike.apply(hidden, nbytes, *trained)

        for layer in layers[1:3] if len(layers) > 4 else ():
            layer.register_forward_pre_hook(measure)
        for layer in layers[2:-2]:
            layer.forward = functools.partial(stand_in, layer)

    def _cast_linear(self, layer: nn.Linear, dtype: torch.dtype, inputs: Tensor) -> Tensor:
        weight = layer.weight.to(dtype)
        if self._casts is not None:
            self._casts.append(weight)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return nn.functional.linear(inputs.to(dtype), weight, bias)

    def estimate(
        self,
        batch_size: int,
        lengths: Lengths,
        *,
        recompute: bool | None = None,
        cached: bool = False,
        keeps_gradients: bool = False,
        sharded: bool = False,
    ) -> Estimate:
        """Run one training step of `batch_size` on meta tensors.

        `recompute` overrides `llm_grad_checkpoint`; with `cached` features the vision side is not loaded;
        `keeps_gradients`: the LLM's from a micro-batch to the next, or in DDP's buckets; `sharded`: its layers are.
        """
        recompute = self.cfg.llm_grad_checkpoint if recompute is None else recompute
        known = nn.ModuleList((self.encoder, self.ln_vision, self.connector, self.projection, self.llm))
        known.zero_grad(set_to_none=True)
        shape = feature_shape(self.cfg) if cached else None
        trained = [p for p in self.llm.parameters() if p.requires_grad]
        keeps_gradients = keeps_gradients or sharded
        self._recomputes, self._drops_gradients = recompute, keeps_gradients
        hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in trained if keeps_gradients]
        odd = errors_as(
            WeightsError, f"model.llama_model: no step is possible with what {self.cfg.llama_model} describes"
        )
        with odd, StorageCounter(known) as counter:
            self._counter = counter
            embeds_BTD = self._embeds(batch_size, lengths, shape)
            own_pool = counter.peak if self.cfg.vit_cuda_graph and not cached else 0  # a graph keeps what it works in
            self._casts = None if sharded else []
            loss = self._loss(embeds_BTD, lengths.answer, recompute)
            self._casts = None
            loss.backward()
        for hook in hooks:
            hook.remove()
        parts = self.parts[-2:] if cached else self.parts
        activations = counter.peak + own_pool - (0 if keeps_gradients else _bytes(trained))
        return Estimate(parts, batch_size, embeds_BTD.shape[1], activations)

    def stored_as(self, estimate: Estimate, storage: str) -> Estimate:
        """The same step with the LLM stored in another precision; its activations stay in 16 bits."""
        return _with_llm(estimate, replace(_part(_LLM, self.llm), weight_bytes=_llm_bytes(self.llm, storage)))

    def sharded_over(self, estimate: Estimate, gpus: int) -> Estimate:
        """The same step with the LLM spread over so many GPUs (`run.parallel: fsdp`), on the fullest of them."""
        if gpus == 1:
            return estimate
        layers = [
            [p for name, p in layer.named_parameters() if p.ndim > 1 and ".lora_" not in name]
            for layer in decoder_layers(self.llm)
        ]
        spread = [p for layer in layers for p in layer]
        saved = {id(p): (len(p) - -(-len(p) // gpus)) * p[0].numel() * p.element_size() for p in spread}
        part, of_trained = _part(_LLM, self.llm), sum(saved[id(p)] for p in spread if p.requires_grad)
        weights, optimizer = part.weight_bytes - sum(saved.values()), part.optimizer_bytes - COPIES * of_trained
        gathered = Part("LLM, gathered layers", 0, 0, int(GATHERED_LAYERS * max(map(_bytes, layers))))
        return _with_llm(estimate, replace(part, weight_bytes=weights, optimizer_bytes=optimizer), gathered)

    def _embeds(self, batch_size: int, lengths: Lengths, shape: tuple[int, int] | None) -> Tensor:
        """What the LLM reads; `shape`: of cached features, in the place of the images."""
        dtype = self.llm.dtype
        if shape:
            features_BQV = torch.empty(batch_size, *shape, dtype=dtype, device="meta")
        else:
            size, vision_dtype = self.encoder.image_size, next(self.encoder.parameters()).dtype
            image = torch.empty(batch_size, 3, size, size, dtype=vision_dtype, device="meta")
            with torch.set_grad_enabled(is_trained(self.encoder, self.ln_vision, self.connector)):
                features_BQV = self.connector(self.ln_vision(self.encoder(image)))
        image_BQD = self.projection(features_BQV.to(dtype))
        length = 1 + lengths.prompt + lengths.answer
        embedding = self.llm.get_input_embeddings()
        if embedding.weight.requires_grad:
            text = embedding(torch.empty(batch_size, length, dtype=torch.long, device="meta"))
        else:
            text = torch.empty(batch_size, length, image_BQD.shape[2], dtype=dtype, device="meta")
        return torch.cat([image_BQD, text], dim=1)

    def _loss(self, embeds_BTD: Tensor, answer: int, recompute: bool) -> Tensor:
        mask_BT = torch.empty(embeds_BTD.shape[:2], dtype=torch.long, device="meta")
        targets_N = torch.empty(len(embeds_BTD) * answer, dtype=torch.long, device="meta")
        inputs = {"inputs_embeds": embeds_BTD, "attention_mask": mask_BT}
        with activation_checkpointing(self.llm, recompute):
            if self.cfg.llm_logits == "targets":
                return target_losses(self.llm, inputs, (targets_N, targets_N), targets_N, targets_N[:answer]).mean()
            logits_BTV = self.llm(**inputs, use_cache=False).logits
            logits_BVT = logits_BTV[:, :-1].transpose(1, 2).float()
        return nn.functional.cross_entropy(logits_BVT, mask_BT[:, 1:], reduction="none").mean()


def llm_config_for(cfg: MiniGPT4Config) -> tuple[PretrainedConfig, str]:
    """The LLM's config.json, or where the directory is not here the LLaMA of the size in its name; and which.

    Raises ConfigError if `llama_model` is not set or neither tells the size.
    """
    fault = None
    try:
        directory = cfg.llm_directory(weights=())
    except WeightsError as error:  # of the hub
        directory, fault = Path(cfg.llama_model), error
    if (directory / "config.json").is_file():
        return read_llm_config(directory), f"{directory}/config.json"
    size = re.search(r"(?<!\d)(7|13)b(?![a-z])", directory.name.lower())
    if not size:
        text = fault or f"model.llama_model: {cfg.llama_model!r} is not here"
        way_out = "its name ends in no size such as 7b or 13b; put its config.json there to have it sized"
        raise ConfigError(f"{text}, and {way_out}") from fault
    origin = f"LLaMA {size[1]}B, by the name {directory}"
    return LlamaConfig(vocab_size=32000, **_LLAMA_SIZES[int(size[1])]), f"{origin} ({fault})" if fault else origin


def _with_llm(estimate: Estimate, *llm: Part) -> Estimate:
    """The estimate with these parts in the place of the LLM."""
    return replace(estimate, parts=(*(part for part in estimate.parts if not part.name.startswith(_LLM)), *llm))


def _pass_alike(blocks: Iterable[nn.Module]) -> None:
    """Without gradients two blocks of a kind have the peak of all: the others hand on what they read."""
    seen: Counter[str] = Counter()
    for block in blocks:
        seen[kind := str(block)] += 1
        if seen[kind] > 2:
            block.forward = lambda hidden, *_, **__: hidden


def _kind(layer: nn.Module) -> list[tuple]:
    return [(name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def _part(name: str, *modules: nn.Module) -> Part:
    parameters = [p for module in modules for p in module.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    counts = [sum(p.numel() for p in some) for some in (parameters, trained)]
    return Part(name, *counts, _bytes(parameters), COPIES * _bytes(trained))


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _llm_bytes(llm: nn.Module, storage: str) -> int:
    """Stored size; bitsandbytes quantises linear layers except the output layer."""
    sizes = {id(p): p.nbytes for p in llm.parameters()}
    for module in llm.modules() if storage in _QUANTISED_BYTES else ():
        quantised = isinstance(module, nn.Linear) and not module.weight.requires_grad
        if quantised and module is not llm.get_output_embeddings():
            sizes[id(module.weight)] = int(module.weight.numel() * _QUANTISED_BYTES[storage])
    return sum(sizes.values())
