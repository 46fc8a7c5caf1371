"""From files to modules: vision side, LLM, projection, and the trained weights of a checkpoint."""

import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from minigpt4.common.checkpoint import (
    copy_strict,
    drop_keys,
    read_card,
    read_state_dict,
    read_weights,
    require_fit,
    state_dict_of,
)
from minigpt4.common.errors import ConfigError, MiniGPT4Error, WeightsError, errors_as
from minigpt4.common.llava_schema import LlavaConfig
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.common.start_clock import LLM, VISION, phase
from minigpt4.models.base_model import DTYPES, store_matmuls
from minigpt4.models.connectors import Connector, build_connector, own_blip2_keys, qformer_file
from minigpt4.models.fsdp import copy_weights, whole
from minigpt4.models.llava_weights import (
    ADAPTERS,
    NOT_LORA,
    PROJECTOR,
    projector_names,
    read_lora,
    read_part,
    warn_of_other_pixels,
)
from minigpt4.models.llm import add_tokens, bf16_bytes, check_llm, load_llm, set_token_ids
from minigpt4.models.tokenizer import load_tokenizer
from minigpt4.models.vision_tower import VisionTower, build_vision_encoder, load_vision_encoder, read_vit_weights

log = logging.getLogger(__name__)

VisionSide = tuple[VisionTower, nn.Module, Connector]
"""Tower, the norm behind it (`ln_vision`, or an identity), connector."""

# Buffers that published checkpoints hold beside the trained weights; the numbers come from the architecture.
PUBLISHED_BUFFERS = ("llama_model.*rotary_emb.inv_freq", "Qformer.bert.embeddings.position_ids")
PART_OF_LLM = re.compile(r"(^|\.)lora_|\.base_model\.model\.|^llama_model\.")
FINGERPRINT_NUMBERS = 64
_LLM_OF_WIDTH = {4096: "a 7B LLaMA", 5120: "a 13B LLaMA"}


def build_vision(cfg: MiniGPT4Config) -> VisionSide:
    """Tower, `ln_vision` and connector with fresh weights, as the section describes them."""
    tower = build_vision_encoder(cfg)
    tower.drop_layers_after(cfg.vit_layer)
    connector = build_connector(cfg, tower)
    return tower, nn.LayerNorm(tower.num_features) if connector.has_norm else nn.Identity(), connector


@phase(VISION)
def load_vision(cfg: MiniGPT4Config, device: torch.device | str = "cpu") -> VisionSide:
    """Tower, `ln_vision` and connector on `device` with the weights of their files, stored as they stay.

    The files are mapped and read straight into place: several processes of a machine share them.
    Without Q-Former no file holds `ln_vision`, and it keeps its initial ones and zeros, as published.
    """
    tower = _unfilled(lambda: store_frozen(build_vision_encoder(cfg), cfg.freeze_vit, cfg), device)
    load_vision_encoder(tower, cfg)
    tower.drop_layers_after(cfg.vit_layer)
    connector = _unfilled(lambda: store_frozen(build_connector(cfg, tower), cfg.freeze_qformer, cfg), device)
    ln_vision = (nn.LayerNorm(tower.num_features) if connector.has_norm else nn.Identity()).to(device)
    connector.load_weights(cfg, ln_vision)
    return tower, ln_vision, connector


def meta_vision(cfg: MiniGPT4Config) -> VisionSide:
    """The same modules without weights, on the meta device."""
    with torch.device("meta"):
        return build_vision(cfg)


def feature_shape(cfg: MiniGPT4Config) -> tuple[int, int]:
    """(Q, H) of what the projection reads of an image, asked of the parts on the meta device."""
    tower, ln_vision, connector = meta_vision(cfg)
    with torch.device("meta"), torch.no_grad():
        image = torch.empty(1, 3, tower.image_size, tower.image_size)
        return tuple(connector(ln_vision(tower(image))).shape[1:])


@phase(LLM)
def load_language_side(
    cfg: MiniGPT4Config, directory: Path, device: torch.device, shard: bool = False
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The LLM, tried on a sentence, and its tokenizer; `shard`: as in `load_llm`."""
    tokenizer = load_tokenizer(directory, **cfg.TOKENIZER)
    nf4_dtype = torch.bfloat16 if cfg.vit_precision == "bf16" else torch.float16
    switches = {"attention": cfg.llm_attention, "grad_checkpoint": cfg.llm_grad_checkpoint, "nf4_dtype": nf4_dtype}
    model = load_llm(directory, cfg.llm_storage, device, sharded=shard, rule=cfg.train.llm, **switches)
    with errors_as(WeightsError, f"model.llama_model: {directory} loads, but does not run"):
        set_token_ids(model, tokenizer, beams_count_bos=cfg.BEAMS_COUNT_BOS)
        if cfg.llm_sanity_check:
            check_llm(model, tokenizer, directory)
    if cfg.new_tokens:
        if shard:
            raise ConfigError("model.mm_use_im_start_end, mm_use_im_patch_token: not with run.parallel: fsdp")
        add_tokens(model, tokenizer, cfg.new_tokens)
    return model, tokenizer


def store_frozen(module: nn.Module, frozen: bool, cfg: MiniGPT4Config) -> nn.Module:
    """A frozen part of the vision side in `vit_precision`, before its 4 GB are read; what is trained stays in fp32."""
    return store_matmuls(module, DTYPES[cfg.vit_precision]) if frozen else module


def _unfilled(build: Callable[[], nn.Module], device: torch.device | str) -> Any:
    """A module whose parameters wait for a strict load: no random initialisation of a billion numbers. Its buffers are
    those that it computed."""
    with init_empty_weights(include_buffers=False):
        module = build()
    buffers = dict(module.named_buffers())
    if any(buffer.is_meta for buffer in buffers.values()):  # some of timm's are made beside their parameters
        return build().to(device)
    module.to_empty(device=device)
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])
    return module


def vision_fingerprints(cfg: MiniGPT4Config) -> dict[str, str]:
    """Short hashes of what the frozen vision side takes from its files, by key: of names and the first numbers of each
    tensor in bf16, so the same for all formats of a file. One that cannot be read is left out: a cache may serve."""
    readers = {}
    if cfg.freeze_vit:
        readers["vit_weights"] = lambda: read_vit_weights(cfg)[1]
    if cfg.connector == "qformer" and cfg.freeze_qformer:
        readers["q_former_model"] = lambda: own_blip2_keys(read_state_dict(qformer_file(cfg), mapped=True))
    fingerprints = {}
    for key, read in readers.items():
        digest = hashlib.sha256()
        try:
            for name, tensor in sorted(read().items()):
                digest.update(name.encode(errors="backslashreplace"))
                digest.update(bf16_bytes(tensor.reshape(-1)[:FINGERPRINT_NUMBERS]))
            fingerprints[key] = digest.hexdigest()[:16]
        except MiniGPT4Error as error:
            log.warning("Whether checkpoints were trained with the same model.%s cannot be told: %s", key, error)
    return fingerprints


def load_trained(
    target: Mapping[str, Tensor], path: Path, cfg: MiniGPT4Config, made_with: Mapping[str, Any] | None = None
) -> None:
    """Copy the trained weights of a MiniGPT-4 checkpoint into `target`, as `trained_weights` finds them."""
    weights = trained_weights(target, path, cfg, made_with or {})
    copy_weights(target, weights)
    log.info("Loaded %d trained tensors from %s", len(weights), path)


def load_whole(model: nn.Module, cfg: MiniGPT4Config) -> Path | None:
    """Fill the projection from the whole LLaVA that `model.llama_model` may be; its file, or None for an LLM alone."""
    found = read_part(cfg, PROJECTOR)
    if found is None:
        return None
    path, state = found
    copy_strict(dict(model.llama_proj.named_parameters()), state, source=path, hint="Check model.projection.")
    warn_of_other_pixels(cfg)
    log.info("Loaded the projection of %s", path)
    return path


def trained_weights(
    target: Mapping[str, Tensor],
    path: Path,
    cfg: MiniGPT4Config,
    made_with: Mapping[str, Any],
    content: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """The weights of a checkpoint, or of LLaVA's adapter file, that go into `target`, trained parameters by name; for
    `model.ckpt`, a resume, an evaluation, a server's change, an export. `content`: of the file, where it was read.

    WeightsError with the difference of the keys, or where the card names other parts than `made_with`.
    """
    if content is None:
        content = read_lora(path) if path.name in ADAPTERS else read_weights(path)
    with errors_as(WeightsError, f"{path}: is no checkpoint of this program"):
        refuse_other_parts(path, content, made_with, cfg)
        state = weights_of(content, path, cfg)
        of_llm = [name for name in state if PART_OF_LLM.search(name)]
        if of_llm and cfg.is_frozen("llama_model"):
            text = (
                f"{path}: holds {len(of_llm)} trained weights of its LLM (such as {of_llm[0]}), LoRA or a soft prompt"
            )
            raise WeightsError(f"{text}; model.train.llm says what this model has, docs/weights.md which ones fit")
        _refuse_other_projection(state, target, path, cfg)
        trained, tolerated = target.keys(), cfg.ckpt_allow_keys
        state = drop_keys(state, tolerated) | {name: state[name] for name in target if name in state}
        target = drop_keys(target, tolerated) | {name: target[name] for name in target if name in state}
        if not state.keys() & target.keys():
            hint = "It holds nothing that is trained here: is it of another model?"
            if any(name.startswith("llama_proj.") for name in state):
                hint = f"Its projection is another one than model.projection: {cfg.projection}."
            require_fit(target, state, source=path, hint=hint)
            raise WeightsError(f"{path}: model.ckpt_allow_keys leaves nothing of it that is trained here")
        require_fit(target, state, source=path, hint=_frozen_hint(state, path, cfg))
        if absent := {name.partition(".")[0] for name in trained - state.keys()}:
            text = "%s: lacks trained weights of %s, which stay as their own files have them (model.ckpt_allow_keys)"
            log.warning(text, path, ", ".join(sorted(absent)))
        return state


def weights_of(content: Mapping[str, Any], path: Path, cfg: MiniGPT4Config) -> dict[str, Tensor]:
    """All weights in the content of a checkpoint, under the names of this program."""
    state = state_dict_of(content, path)
    return drop_keys(projector_names(state) if isinstance(cfg, LlavaConfig) else state, PUBLISHED_BUFFERS)


def refuse_other_parts(
    path: Path, content: Mapping[str, Any], made_with: Mapping[str, Any], cfg: MiniGPT4Config
) -> None:
    """WeightsError if a checkpoint or the card beside it names another LLM or vision side; published ones name none."""
    card, state = read_card(path) or {}, content.get("state")
    inside = state.get("made_with") if isinstance(state, Mapping) else None
    if isinstance(inside, Mapping):  # also where the file was copied without its card
        card = card | inside
    there, here = card.get("llm_fingerprint"), made_with.get("llm_fingerprint")
    if there and here and there != here and not cfg.ckpt_any_llm:
        other = f"was trained with the LLM {card.get('llm', 'of another run')} (fingerprint {there})"
        way_out = f"model.llama_model is {cfg.llama_model} ({here}). model.ckpt_any_llm: True loads it all the same"
        raise WeightsError(f"{path}: {other}, but {way_out}")
    there, here = card.get("lora_alpha"), made_with.get("lora_alpha", {})
    for part in here.keys() & (there if isinstance(there, Mapping) else {}).keys():
        if there[part] != here[part]:
            other = f"its adapters were trained with alpha {there[part]}"
            raise WeightsError(f"{path}: {other}, and model.train.{part}.alpha is {here[part]}; set it to the same")
    there, here = card.get("vision_fingerprints"), made_with.get("vision_fingerprints", {})
    there = there if isinstance(there, Mapping) else {}
    other = [key for key in here if key in there and here[key] != there[key]]
    if other and not cfg.ckpt_any_vision:
        files = [f"model.{key} is {getattr(cfg, key)} ({here[key]}, not {there[key]})" for key in other]
        way_out = "model.ckpt_any_vision: True loads it all the same"
        raise WeightsError(f"{path}: was trained with another vision side: {'; '.join(files)}. {way_out}")


def _refuse_other_projection(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor], path: Path, cfg: MiniGPT4Config
) -> None:
    name = "llama_proj.weight"
    if name not in state or name not in target or state[name].ndim != 2 or state[name].shape == target[name].shape:
        return  # what else is wrong of it, `require_fit` says
    (found_llm, found_vision), (llm, vision) = state[name].shape, target[name].shape
    text = f"{path}: its projection goes from {found_vision} to {found_llm} channels, not from {vision} to {llm}."
    if found_llm == llm:
        raise WeightsError(f"{text} Its vision side was another one: check has_qformer, qformer_config, vit_model.")
    made_for = f"{_LLM_OF_WIDTH.get(found_llm, 'an LLM of that width')}, and model.llama_model is {cfg.llama_model}"
    raise WeightsError(f"{text} It was trained for {made_for}; docs/weights.md says which projection goes with it.")


def _frozen_hint(state: Mapping[str, Tensor], path: Path, cfg: MiniGPT4Config) -> str:
    if not any(name.startswith("llama_proj.") for name in state) and path.name in ADAPTERS:
        way_out = "model.ckpt_allow_keys: ['llama_proj.*'] takes that of a whole LLaVA as model.llama_model"
        return f"It has no projection without {NOT_LORA} beside it; {way_out}."
    if not cfg.is_frozen("llama_model") and not any(name.startswith("llama_model.") for name in state):
        return "To start the trained LLM from model.llama_model, set model.ckpt_allow_keys: ['llama_model.*']."
    if cfg.freeze_qformer and any(name.startswith(("Qformer.", "query_tokens")) for name in state):
        return "It also holds a trained Q-Former: set model.freeze_qformer: False."
    if cfg.freeze_vit and any(name.startswith("visual_encoder.") for name in state):
        return "It also holds a trained vision encoder: set model.freeze_vit: False."
    if any(name.startswith(("model.layers.", "model.vision_tower.")) for name in state):
        return "It is a whole LLaVA: name its folder as model.llama_model, and leave model.ckpt out."
    return "Keys that may differ can be named in model.ckpt_allow_keys."


class CheckpointSwitch:
    """One `MiniGPT4`, several checkpoints: swaps the trained weights, and remembers those that were given a name.

    `start` is the name of those that the model begins with.
    """

    def __init__(self, model: Any, start: str = "start") -> None:
        self.model, self._start = model, start
        self._kept = {start: self._copy()}
        self._current: str | None = start

    @property
    def names(self) -> list[str]:
        """The checkpoints that are remembered, the start first."""
        return list(self._kept)

    def name(self, wanted: str | None) -> str:
        """A checkpoint's name, the start's for None; ConfigError if there is no such checkpoint."""
        if wanted is None:
            return self._start
        if wanted not in self._kept:
            raise ConfigError(f"there is no checkpoint '{wanted}'; there are: {', '.join(self.names)}")
        return wanted

    def load(self, checkpoint: str | Path, name: str | None = None) -> None:
        """Take the trained weights of a file, and remember them under `name`.

        A weight that the file may leave out is that of the start, never that of the checkpoint before. WeightsError,
        and the weights as before, if they do not fit.
        """
        if name is not None and not self.model.cfg.is_frozen("llama_model"):
            raise ConfigError(
                f"{checkpoint}: was trained with its LLM, and answers of all checkpoints go through one LLM together; "
                "serve it alone, as model.ckpt"
            )
        before = self._copy()
        try:
            self._restore(self._kept[self._start])
            self.model.load_checkpoint(checkpoint)
        except BaseException:
            self._restore(before)
            raise
        self._current = name
        if name is not None:
            self._kept[name] = self._copy()

    def use(self, name: str) -> None:
        if name != self._current:
            self._restore(self._kept[name])
            self._current = name

    def _copy(self) -> dict[str, Tensor]:
        return {name: whole(p) for name, p in self.model.stored_parameters().items()}

    def _restore(self, weights: dict[str, Tensor]) -> None:
        copy_weights(self.model.stored_parameters(), weights)
