"""The model: vision tower -> connector -> projection -> soft prompt of an LLM, as its section of the YAML says.

MiniGPT-4 (Zhu et al., arXiv 2304.10592, section 3): a frozen EVA-ViT and Q-Former, one trained linear layer, a
frozen Vicuna; other values of the same keys give the variants. Shapes: B samples, S pixels a side, N vision tokens of
width V, Q image tokens of width H, D channels of the LLM, M image tokens of a batch, T positions.
"""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from minigpt4.common import start_clock
from minigpt4.common.binding import bind
from minigpt4.common.checkpoint import find_weights
from minigpt4.common.config import MODEL_SCHEMAS
from minigpt4.common.devices import is_available
from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.llava_schema import LlavaConfig
from minigpt4.common.model_schema import PARTS, MiniGPT4Config, TrainRule
from minigpt4.common.registry import registry
from minigpt4.common.start_clock import phase
from minigpt4.models import llm, prompting
from minigpt4.models.attention import is_batch_invariant, one_by_one
from minigpt4.models.base_model import DTYPES, BaseModel, freeze, is_trained
from minigpt4.models.batch_decoder import token_graphs
from minigpt4.models.connectors import Connector, build_projection
from minigpt4.models.cuda_graph import GraphedEncoder
from minigpt4.models.fsdp import decoder_layers
from minigpt4.models.generation import GenerationMixin
from minigpt4.models.llava_prompting import LlavaPrompts
from minigpt4.models.loading import (
    load_language_side,
    load_trained,
    load_vision,
    load_whole,
    meta_vision,
    vision_fingerprints,
)
from minigpt4.models.loss import LMLoss
from minigpt4.models.prompting import ImageFeatures, PromptBuilder, Samples, read_samples
from minigpt4.models.train_rules import apply_rule, trained_weights_of
from minigpt4.models.vision_tower import VisionTower

log = logging.getLogger(__name__)


def _of_prompting(name: str) -> property:
    """An attribute that LAVIS users know and may set, which the prompt builder keeps."""
    return property(
        lambda model: getattr(model.prompting, name), lambda model, value: setattr(model.prompting, name, value)
    )


@registry.register_model("llava")
@registry.register_model("minigpt4")
class VisionLanguageModel(GenerationMixin, BaseModel):
    """A vision-language model; build it with `from_config`.

    Attributes that LAVIS users know: `visual_encoder`, `ln_vision`, `Qformer` (the connector: a Q-Former, or what the
    section puts in its place), `query_tokens`, `llama_proj`, `llama_model`, `llama_tokenizer`, `prompt_list`,
    `prompt_template`, `end_sym`, `max_txt_len`, `max_context_len`.
    """

    config_class = MiniGPT4Config

    prompt_list, prompt_template = _of_prompting("prompt_list"), _of_prompting("prompt_template")
    end_sym, max_txt_len, max_context_len = map(_of_prompting, ("end_sym", "max_txt_len", "max_context_len"))

    def __init__(
        self,
        cfg: MiniGPT4Config,
        visual_encoder: VisionTower,
        ln_vision: nn.Module,
        connector: Connector,
        llama_model: nn.Module,
        llama_tokenizer: Any,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.visual_encoder, self.ln_vision, self.Qformer = visual_encoder, ln_vision, connector
        self.llama_model, self.llama_tokenizer = llama_model, llama_tokenizer
        llm_width = llama_model.get_input_embeddings().weight.shape[1]
        self.llama_proj = build_projection(cfg, connector.feature_width, llm_width)
        self._freeze_vision()
        if self.cfg.is_frozen("llama_proj"):
            freeze(self.llama_proj)
        rule = self.cfg.train.llm
        if rule.rule != "frozen":
            apply_rule(llama_model, rule, "model.train.llm", decoder_layers(llama_model) if rule.blocks else ())
        self.prompting = (LlavaPrompts if isinstance(cfg, LlavaConfig) else PromptBuilder)(llama_tokenizer, cfg)
        self.lm_loss = LMLoss(cfg, llama_model)
        self._vision_graphs = GraphedEncoder("model.vit_cuda_graph") if cfg.vit_cuda_graph else None
        self._token_graphs = token_graphs(cfg, llama_model)
        self._made_with: dict[str, Any] | None = None
        self.whole_file: Path | None = None
        """Of the projection that came with the LLM."""

    @classmethod
    def from_config(
        cls,
        cfg: MiniGPT4Config | Mapping[str, Any] | DictConfig,
        device: torch.device | str = "cpu",
        *,
        lazy_vision: bool = False,
        shard_llm: bool = False,
    ) -> "VisionLanguageModel":
        """Build the model of a `model:` section on `device` and load every weights file that it names.

        `lazy_vision`: read the frozen vision side when an image has to be encoded, for a cache may know them all.
        `shard_llm`: spread the LLM's layers over the processes of the run, all of which must call this.

        Raises ConfigError for a wrong section, WeightsError for files that are missing, broken or do not fit.
        """
        if not isinstance(cfg, cls.config_class):
            schema = MODEL_SCHEMAS.get(cfg.get("arch"), cls.config_class)
            cfg = bind(schema, cfg, section="model", source="the configuration")
        directory = cfg.llm_directory()
        if cfg.ckpt:  # what is cheap to find wrong comes first
            find_weights(cfg.ckpt, "model.ckpt", Path(cfg.ckpt).name)
        device = _llm_device(cfg, torch.device(device))
        vision_side = meta_vision(cfg) if lazy_vision else load_vision(cfg, device)
        model = cls(cfg, *vision_side, *load_language_side(cfg, directory, device, shard_llm))
        model.llama_proj.to(device)
        if lazy_vision:
            start_clock.not_needed(start_clock.VISION, "cache")
        whole = load_whole(model, cfg)  # before a checkpoint, which may lack the projection
        if cfg.ckpt:
            model.load_checkpoint(cfg.ckpt)
        else:
            model.whole_file = whole
        return model

    # One step: images -> token sequences -> the LLM -> loss

    def forward(self, samples: Mapping[str, Any], reduction: str = "mean") -> dict[str, Any]:
        """The "loss" of the answers, nats a token, and "num_tokens": how many targets the batch has (int).

        Args:
            samples: `answer` (list of str), or `conv_q`, `conv_a`, `connect_sym` (lists of str), or for LLaVA
                `conversations` (turns {"from": "human" or "gpt", "value": text} of each sample); optionally `image`
                (B, 3, S, S) or (B, n, 3, S, S) with `length` (B,), `instruction_input` and `image_id`.
            reduction: "mean" over the targets of the batch, or "none": per sample (B,), the sum over its targets
                divided by the padded length, as published.

        SampleError for a sample without targets, or whose placeholders and images do not match.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction: {reduction!r} is neither 'mean' nor 'none'")
        batch, image_tokens_MD = self.training_batch(read_samples(samples))
        dummy_loss = None
        if not len(batch.image_source):  # text alone: what is trained is in the graph, or other ranks wait
            before_llm = self._trained_before_llm().values()
            dummy_loss = 0.0 * sum(p.sum() for p in before_llm) if before_llm else None
        num_tokens = batch.num_targets
        if not num_tokens:  # one that counts for nothing, or other ranks wait
            batch.targets_BT[batch.lengths_B.argmax(), -1] = 0
        at = prompting.target_positions(batch)  # on the CPU: no wait for the GPU
        losses_N = self.lm_loss.losses(self.llama_model, batch, at, image_tokens_MD, dummy_loss)
        if not num_tokens:
            losses_N = losses_N * 0.0
        if reduction == "mean":
            return {"loss": losses_N.mean(), "num_tokens": num_tokens}
        rows, columns = batch.ids_BT.shape
        row_N = at[0].to(losses_N.device, non_blocking=True)
        loss_B = losses_N.new_zeros(rows).index_add(0, row_N, losses_N) / (columns - 1)
        return {"loss": loss_B, "num_tokens": num_tokens}

    def training_batch(self, samples: Samples) -> tuple[prompting.Batch, Tensor | None]:
        """Token sequences of a batch, on the CPU, and the image tokens (M, D) that go into them."""
        if samples.image is None or (samples.lengths is not None and not any(samples.lengths)):
            return self.prompting.training_batch(samples, [[] for _ in range(len(samples))]), None
        embeds_BQD, _ = self.encode_img(samples.image)
        count, room = embeds_BQD.shape[1], len(embeds_BQD) // len(samples)
        images = [
            [((index * room + n) * count, count) for n in range(length)]
            for index, length in enumerate(samples.lengths or [room] * len(samples))
        ]
        return self.prompting.training_batch(samples, images), embeds_BQD.flatten(0, 1)

    def encode_img(self, image: Tensor | ImageFeatures) -> tuple[Tensor, Tensor]:
        """Image tokens of the LLM (B, Q, D), in the projection's compute dtype, and a mask (B, Q) of ones, int64.

        `image`: normalised pixels, (B, 3, S, S) or (B, n, 3, S, S), whose leading dimensions are flattened; or what
        `image_features` gave.
        """
        known = isinstance(image, ImageFeatures)
        features_BQH = image.features.flatten(0, -3).to(self.device) if known else self.image_features(image)
        embeds_BQD = self.project(features_BQH)
        return embeds_BQD, torch.ones(embeds_BQD.shape[:2], dtype=torch.long, device=embeds_BQD.device)

    def image_features(self, image: Tensor) -> Tensor:
        """What the projection reads, (B, Q, H): vision tower, norm and connector. `image` is that of `encode_img`.

        With `vision_is_frozen` the same for all checkpoints, so it can be kept.
        """
        self.ensure_vision_loaded()
        image_B3SS = self._checked(image)
        if image.requires_grad or not self.vision_is_frozen:
            return self._encode(image_B3SS)
        with torch.no_grad():
            if self._vision_graphs is None:
                return self._encode(image_B3SS)
            return self._vision_graphs(self._encode, image_B3SS, next(self.visual_encoder.parameters()))

    def _encode(self, image_B3SS: Tensor) -> Tensor:
        if is_batch_invariant(self.llama_model) and len(image_B3SS) > 1:
            return one_by_one(self._encode, image_B3SS)
        return self.connect(self.vision_tokens(image_B3SS))

    def vision_tokens(self, image_B3SS: Tensor) -> Tensor:
        """What the connector reads, (B, N, V) float32: the tower's tokens after the norm."""
        with self._vision_autocast(self.visual_encoder):
            tokens_BNV = self.visual_encoder(image_B3SS)
        return self.ln_vision(tokens_BNV.float())

    def connect(self, tokens_BNV: Tensor, attentions: list[Tensor] | None = None) -> Tensor:
        """Image features (B, Q, H) from `vision_tokens`; `attentions` as in `Connector.forward`."""
        with self._vision_autocast(self.Qformer):
            return self.Qformer(tokens_BNV, attentions)

    def project(self, features_BQH: Tensor) -> Tensor:
        """Image tokens of the LLM (B, Q, D) from `image_features`."""
        if not torch.is_autocast_enabled(self.device.type):
            features_BQH = features_BQH.float()
        if is_batch_invariant(self.llama_model) and not self.training:
            return one_by_one(self.llama_proj, features_BQH)
        return self.llama_proj(features_BQH)

    def _checked(self, image: Tensor) -> Tensor:
        size = self.visual_encoder.image_size
        if image.ndim not in (4, 5) or image.shape[-3:] != (3, size, size):
            shapes = f"(B, 3, {size}, {size}) or (B, n, 3, {size}, {size})"
            expected = f"expected {shapes} from model.image_size: {size}"
            raise SampleError(f"image: shape {tuple(image.shape)} does not fit; {expected}")
        return image.flatten(0, -4).to(self.device, non_blocking=True)

    def _vision_autocast(self, part: nn.Module) -> AbstractContextManager:
        """A frozen part computes in `vit_precision`, whatever the caller has set; a trained one follows the caller.

        A trained part is in fp32 and so follows `run.amp_dtype`: under bf16 there is no gradient scaler, and fp16
        here would lose small gradients.
        """
        kind, precision = self.device.type, self.cfg.vit_precision
        if part in self._trained or (precision == "fp32" and not torch.is_autocast_enabled(kind)):
            return nullcontext()
        return torch.autocast(kind, DTYPES[precision], enabled=precision != "fp32")

    # Parts, and what is trained of them

    @property
    def device(self) -> torch.device:
        return next(self.llama_proj.parameters(), self.llama_model.get_input_embeddings().weight).device

    @property
    def query_tokens(self) -> nn.Parameter:
        """Learned queries of the Q-Former, (1, Q, H)."""
        return self.Qformer.query_tokens

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {**self._trained_before_llm(), **trained_weights_of(self.llama_model, self.cfg.train.llm)}

    def stored_parameters(self) -> dict[str, nn.Parameter]:
        """With a frozen projection, too, which no other file holds."""
        return self.trainable_parameters() | {f"llama_proj.{n}": p for n, p in self.llama_proj.named_parameters()}

    def _trained_before_llm(self) -> dict[str, nn.Parameter]:
        named = dict(self.Qformer.lavis_parameters())
        named |= {f"visual_encoder.{n}": p for n, p in self.visual_encoder.model.named_parameters()}
        named |= {f"ln_vision.{n}": p for n, p in self.ln_vision.named_parameters()}
        named |= {f"llama_proj.{n}": p for n, p in self.llama_proj.named_parameters()}
        return {name: parameter for name, parameter in named.items() if parameter.requires_grad}

    def rule_of(self, name: str) -> TrainRule:
        return self.cfg.rule_of(name)

    @property
    def vision_is_frozen(self) -> bool:
        """Whether everything before the projection is as its files have it."""
        return not self._trained

    def _freeze_vision(self) -> None:
        for name in _VISION_SIDE:
            part, rule = getattr(self, name), self.cfg.rule_of(name)
            if rule.rule == "frozen" or (rule.rule != "full" and not hasattr(part, "blocks")):
                freeze(part)
            elif rule.rule != "full":
                apply_rule(part, rule, f"model.train.{PARTS[name]}", list(part.blocks))
        # Asked in each step: not by a walk over a billion parameters.
        self._trained = [part for name in _VISION_SIDE if is_trained(part := getattr(self, name))]

    def ensure_vision_loaded(self) -> None:
        if next(self.visual_encoder.parameters()).device.type != "meta":
            return
        log.info("An image is to be encoded: loading the vision encoder now")
        with torch.random.fork_rng(devices=[]):  # of a run, whose dropout goes on as if it had been there
            self.visual_encoder, self.ln_vision, self.Qformer = load_vision(self.cfg, self.device)
        self._freeze_vision()

    @phase(start_clock.CHECKPOINT)
    def load_checkpoint(self, path: str | Path) -> None:
        """Load trained weights from a checkpoint; its keys must be those that this run trains. `whole_file` has those
        that came with the LLM.

        Raises WeightsError with the difference, and with the reason where it is another LLM's projection.
        """
        if Path(path) == self.whole_file:
            load_whole(self, self.cfg)
            return
        file = find_weights(str(path), "model.ckpt", Path(path).name)
        load_trained(self.stored_parameters(), file, self.cfg, self.made_with())

    def made_with(self) -> dict[str, Any]:
        if self._made_with is None:
            self._made_with = {
                "llm_fingerprint": llm.fingerprint(self.llama_model),
                "vision_fingerprints": vision_fingerprints(self.cfg),
            }
            if alpha := {part: rule.alpha for part, rule in vars(self.cfg.train).items() if rule.is_lora}:
                self._made_with["lora_alpha"] = alpha
        return self._made_with


MiniGPT4 = VisionLanguageModel
"""The published name."""

_VISION_SIDE = ("visual_encoder", "ln_vision", "Qformer")


def _llm_device(cfg: MiniGPT4Config, device: torch.device) -> torch.device:
    if not is_available(device):
        raise ConfigError(f"the model is to go to {device}, but torch sees no GPU: python -m minigpt4.doctor says why")
    if device.type == "cpu" and cfg.llm_storage == "fp16":
        log.info("On a CPU model.llm_precision: bf16 or fp32 is faster than fp16")
    if cfg.llm_storage in ("int8", "nf4") and device.type == "cuda" and device.index is None:
        return torch.device("cuda", cfg.device_8bit)
    return device
