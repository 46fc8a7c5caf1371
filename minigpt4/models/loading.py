"""From files to modules: vision side, LLM, projection, and the trained weights of a checkpoint."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from minigpt4.common.checkpoint import copy_strict, drop_keys, find_weights, read_state_dict
from minigpt4.common.errors import WeightsError, errors_as
from minigpt4.common.run_checkpoints import read_card
from minigpt4.common.schemas.model import EVA_CLIP_G, QFORMER_FILE, MiniGPT4Config
from minigpt4.common.start_clock import LLM, VISION, phase
from minigpt4.models.eva_vit import VisionEncoder, build_vision_encoder, load_vision_encoder
from minigpt4.models.freeze import DTYPES, store_matmuls
from minigpt4.models.liger import require_liger, use_liger
from minigpt4.models.llm import check_llm, load_llm, set_token_ids
from minigpt4.models.qformer import QFormer, build_qformer, load_blip2
from minigpt4.models.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

# Buffers that published checkpoints hold beside the trained weights; the numbers come from the architecture.
PUBLISHED_BUFFERS = ("llama_model.*rotary_emb.inv_freq", "Qformer.bert.embeddings.position_ids")
JOINED_PATCHES = 4
"""Neighbouring patch tokens that become one image token without Q-Former."""
_LLM_OF_WIDTH = {4096: "a 7B LLaMA", 5120: "a 13B LLaMA"}


@phase(VISION)
def load_vision(cfg: MiniGPT4Config) -> tuple[VisionEncoder, nn.LayerNorm, QFormer | None]:
    """Vision encoder, `ln_vision` and Q-Former with the weights of their files, on the CPU, stored as they stay.

    Without Q-Former no file holds `ln_vision`, and it keeps its initial ones and zeros, as published.
    """
    # Other timm models may compute buffers when they are built.
    build = _unfilled if cfg.vit_model == EVA_CLIP_G else _built
    encoder = build(lambda: store_frozen(build_vision_encoder(cfg), cfg.freeze_vit, cfg))
    load_vision_encoder(encoder, cfg)
    ln_vision = nn.LayerNorm(encoder.num_features)
    if not cfg.has_qformer:
        return encoder, ln_vision, None
    path = find_weights(cfg.q_former_model, "model.q_former_model", QFORMER_FILE)
    q_former = _unfilled(lambda: store_frozen(build_qformer(cfg, encoder.num_features), cfg.freeze_qformer, cfg))
    load_blip2(q_former, ln_vision, read_state_dict(path, mapped=True), path)
    return encoder, ln_vision, q_former


@phase(LLM)
def load_language_side(
    cfg: MiniGPT4Config, directory: Path, device: torch.device, shard: bool = False
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The LLM, tried on a sentence, and its tokenizer; `shard`: as in `load_llm`."""
    tokenizer = load_tokenizer(directory)
    switches = {"attention": cfg.llm_attention, "grad_checkpoint": cfg.llm_grad_checkpoint, "sharded": shard}
    if cfg.llm_kernels == "liger":
        require_liger(device)
    model = load_llm(directory, cfg.llm_storage, device, **switches)
    if cfg.llm_kernels == "liger":
        use_liger(model)
    with errors_as(WeightsError, f"model.llama_model: {directory} loads, but does not run"):
        set_token_ids(model, tokenizer)
        if cfg.llm_sanity_check:
            check_llm(model, tokenizer, directory)
    return model, tokenizer


def vision_to_come(cfg: MiniGPT4Config) -> tuple[VisionEncoder, nn.LayerNorm, QFormer | None]:
    """The same modules without weights, on the meta device."""
    with torch.device("meta"):
        encoder = build_vision_encoder(cfg)
        q_former = build_qformer(cfg, encoder.num_features) if cfg.has_qformer else None
        return encoder, nn.LayerNorm(encoder.num_features), q_former


def vision_shape(cfg: MiniGPT4Config) -> tuple[int, int]:
    """(Q, V) of what the projection reads of an image, without weights."""
    encoder, _, q_former = vision_to_come(cfg)
    if q_former is not None:
        return cfg.num_query_token, q_former.hidden_size
    with torch.device("meta"):
        tokens_1NV = encoder(torch.empty(1, 3, cfg.image_size, cfg.image_size))
    return join_patches(tokens_1NV[:, encoder.num_prefix_tokens :]).shape[1:]


def join_patches(patches_BNV: Tensor) -> Tensor:
    """(B, N // 4, 4 V): four neighbours in the place of each; what is left over at the end is dropped."""
    usable = patches_BNV.shape[1] // JOINED_PATCHES * JOINED_PATCHES
    return patches_BNV[:, :usable].unflatten(1, (-1, JOINED_PATCHES)).flatten(2)


def store_frozen(module: nn.Module, frozen: bool, cfg: MiniGPT4Config) -> nn.Module:
    """A frozen part of the vision side in `vit_precision`; what is trained stays in fp32.

    Done before the weights are read, so that no process holds a fp32 copy of a billion numbers (4 GB).
    """
    return store_matmuls(module, DTYPES[cfg.vit_precision]) if frozen else module


def _built(build: Callable[[], Any]) -> Any:
    return build()


def _unfilled(build: Callable[[], Any]) -> Any:
    """A module whose parameters wait for a strict load: no random initialisation of a billion numbers."""
    with torch.device("meta"):
        module = build()
    module.to_empty(device="cpu")
    for buffer in module.buffers():  # Eva's key bias, which is zero
        buffer.zero_()
    return module


def build_projection(cfg: MiniGPT4Config, vision_width: int, llm_width: int) -> nn.Module:
    """One linear layer (published), or three in a row without activation between them (Table 5, variant b)."""
    if cfg.proj_layers == 1:
        return nn.Linear(vision_width, llm_width)
    widths = [vision_width] + [llm_width] * cfg.proj_layers
    return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)))


def refuse_other_llm(path: Path, fingerprint: str, cfg: MiniGPT4Config) -> None:
    """WeightsError if the card beside a checkpoint names another LLM; published files have no card."""
    card = read_card(path) or {}
    if card.get("llm_fingerprint", fingerprint) != fingerprint:
        raise WeightsError(
            f"{path}: was trained with the LLM {card.get('llm')} (fingerprint {card['llm_fingerprint']}), but "
            f"model.llama_model is {cfg.llama_model} ({fingerprint}). A projection speaks one LLM's language; set "
            "model.ckpt_any_llm: True to load it all the same."
        )


def load_trained(target: Mapping[str, Tensor], path: Path, cfg: MiniGPT4Config) -> None:
    """Copy the trained weights of a MiniGPT-4 checkpoint into `target`, whose keys must be the file's.

    Raises WeightsError with the difference, and with the reason where it is another LLM's projection.
    """
    state = drop_keys(read_state_dict(path), PUBLISHED_BUFFERS)
    _refuse_other_projection(state, target, path, cfg)
    tolerated = cfg.ckpt_allow_keys
    optional = target.keys() - drop_keys(target, tolerated).keys()
    state = {name: tensor for name, tensor in state.items() if name in target or drop_keys({name: tensor}, tolerated)}
    target = {name: tensor for name, tensor in target.items() if name in state or name not in optional}
    copy_strict(target, state, source=path, hint=_frozen_hint(state, cfg))
    log.info("Loaded %d trained tensors from %s", len(target), path)


def _refuse_other_projection(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor], path: Path, cfg: MiniGPT4Config
) -> None:
    name = "llama_proj.weight"
    if name not in state or name not in target or state[name].shape == target[name].shape:
        return
    (found_llm, found_vision), (llm, vision) = state[name].shape, target[name].shape
    text = (
        f"{path}: its projection goes from {found_vision} to {found_llm} channels, the model needs {vision} to {llm}."
    )
    if found_llm != llm:
        made_for = _LLM_OF_WIDTH.get(found_llm, "an LLM of that width")
        raise WeightsError(
            f"{text} It was trained for {made_for}, and model.llama_model is {cfg.llama_model}; "
            "docs/weights.md has the table of which projection goes with which LLM."
        )
    raise WeightsError(f"{text} It was trained with another vision side: check has_qformer, qformer_config, vit_model.")


def _frozen_hint(state: Mapping[str, Tensor], cfg: MiniGPT4Config) -> str:
    if cfg.freeze_qformer and any(name.startswith(("Qformer.", "query_tokens")) for name in state):
        return "It also holds a trained Q-Former: set model.freeze_qformer: False."
    if cfg.freeze_vit and any(name.startswith("visual_encoder.") for name in state):
        return "It also holds a trained vision encoder: set model.freeze_vit: False."
    return "Keys that may differ can be named in model.ckpt_allow_keys."
