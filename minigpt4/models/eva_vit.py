"""The vision encoder: timm's `Eva` as BLIP-2's EVA-CLIP ViT-g, or any timm model as patch tokens.

Shapes: B images, N tokens (class token first), D channels, S pixels a side.
"""

import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from torch import Tensor, nn

from minigpt4.common.checkpoint import copy_strict, find_weights, read_state_dict
from minigpt4.common.errors import ConfigError, WeightsError, nearest
from minigpt4.common.model_schema import EVA_CLIP_G, VIT_FILE, MiniGPT4Config

log = logging.getLogger(__name__)

EVA_CLIP_G_SIZES = {"embed_dim": 1408, "depth": 39, "num_heads": 16, "patch_size": 14, "mlp_ratio": 4.3637}
EVA_NORM_EPS = 1e-6
# What eva_vit_g.pth holds besides the tower of BLIP-2: the blocks after the last used one, norm and head.
EVA_FOREIGN_KEYS = re.compile(r"(norm|fc_norm|head)\.|mask_token$")


class VisionEncoder(nn.Module):
    """Image (B, 3, S, S) -> tokens (B, N, D), `num_prefix_tokens` of them before the patches.

    `model` is timm's network, whose parameters carry the names of the published file; no norm follows the last
    block.
    """

    def __init__(self, model: nn.Module, image_size: int) -> None:
        super().__init__()
        self.model = model
        self.image_size = image_size
        self.num_features: int = model.num_features
        self.num_prefix_tokens: int = getattr(model, "num_prefix_tokens", 0)

    def forward(self, image_B3SS: Tensor) -> Tensor:
        tokens = self.model.forward_features(image_B3SS)
        if tokens.ndim == 4:  # a convolutional network: (B, D, H, W), or (B, H, W, D) for some timm families
            if tokens.shape[1] != self.num_features:
                tokens = tokens.permute(0, 3, 1, 2)
            tokens = tokens.flatten(2).transpose(1, 2)
        return tokens


def build_vision_encoder(cfg: MiniGPT4Config) -> VisionEncoder:
    """The encoder with fresh weights; raises ConfigError for sizes or names that do not work."""
    if cfg.vit_model == EVA_CLIP_G:
        return VisionEncoder(_build_eva(cfg), cfg.image_size)
    return VisionEncoder(_build_timm(cfg), cfg.image_size)


def _build_eva(cfg: MiniGPT4Config) -> Eva:
    sizes = EVA_CLIP_G_SIZES | cfg.vit_config
    if cfg.image_size % sizes["patch_size"]:
        raise ConfigError(
            f"model.image_size: {cfg.image_size} is not a multiple of the patch size {sizes['patch_size']}"
        )
    if sizes["embed_dim"] % sizes["num_heads"]:
        raise ConfigError(f"model.vit_config: embed_dim is not a multiple of num_heads in {sizes}")
    model = Eva(
        img_size=cfg.image_size,
        qkv_bias=True,
        num_classes=0,
        global_pool="",
        drop_path_rate=cfg.drop_path_rate,
        norm_layer=partial(nn.LayerNorm, eps=EVA_NORM_EPS),
        **sizes,
    )
    model.norm = nn.Identity()  # BLIP-2 goes from the last block straight to ln_vision
    model.set_grad_checkpointing(cfg.use_grad_checkpoint)
    return model


def tower_statistics(name: str) -> dict[str, list[float]] | None:
    """`mean` and `std` (R, G, B in 0..1) of the images that a timm model was trained on; None if timm does not say.

    ConfigError for a name that timm does not know. A name without the variant (`vit_base_patch16_224`, not
    `vit_base_patch16_224.dino`) is its first; where others were trained with other images, the log says so.
    """
    _require_timm_name(name)
    own = _statistics(name)
    if "." not in name:
        others = [full for full in timm.list_pretrained(f"{name}.*") if _statistics(full) != own]
        if others:
            log.warning(
                "model.vit_model: %s is taken for %s.%s; weights of %s were trained on images of other mean and std: "
                "name the variant, too, if vit_weights are theirs",
                *(name, name, timm.get_pretrained_cfg(name).tag, ", ".join(others)),
            )
    return own


def _statistics(name: str) -> dict[str, list[float]] | None:
    facts = timm.get_pretrained_cfg(name)
    found = {} if facts is None else {key: [float(one) for one in getattr(facts, key)] for key in ("mean", "std")}
    return found if all(len(numbers) == 3 for numbers in found.values()) and found else None


def _require_timm_name(name: str) -> None:
    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:3] or [nearest(name, timm.list_models())]
        near = f"; near: {', '.join(close)}" if close[0] else ""
        raise ConfigError(f"model.vit_model: {name!r} is neither {EVA_CLIP_G} nor a timm model{near}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        variants = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise ConfigError(f"model.vit_model: {name!r} is no variant that timm knows: {', '.join(variants)}") from error


def _build_timm(cfg: MiniGPT4Config) -> nn.Module:
    _require_timm_name(cfg.vit_model)
    arguments: dict[str, Any] = {"drop_path_rate": cfg.drop_path_rate, **cfg.vit_config}
    try:
        model = timm.create_model(cfg.vit_model, num_classes=0, img_size=cfg.image_size, **arguments)
    except TypeError:  # families without position embedding take any size and know no img_size
        try:
            model = timm.create_model(cfg.vit_model, num_classes=0, **arguments)
        except TypeError as error:
            raise ConfigError(f"model.vit_config: {sorted(cfg.vit_config)} for {cfg.vit_model}: {error}") from error
    if cfg.use_grad_checkpoint:
        model.set_grad_checkpointing(True)
    return model


def load_vision_encoder(encoder: VisionEncoder, cfg: MiniGPT4Config) -> None:
    """Fill the encoder from `vit_weights`; position embeddings are interpolated to the image size."""
    path, state = read_vit_weights(cfg)
    if cfg.vit_model == EVA_CLIP_G:
        _fit_position_embedding(state, encoder.model, path)
    else:
        state = _own_timm_keys(state, encoder.model)
    copy_strict(encoder.model.state_dict(), state, source=path)


def read_vit_weights(cfg: MiniGPT4Config) -> tuple[Path, dict[str, Tensor]]:
    """The file of `vit_weights` and its tensors, mapped; of EVA-CLIP's only those that the model uses."""
    if cfg.vit_model != EVA_CLIP_G and not cfg.vit_weights:
        raise ConfigError(f"model.vit_weights: not set, but vit_model {cfg.vit_model} needs its weights file")
    path = find_weights(cfg.vit_weights, "model.vit_weights", VIT_FILE)
    state = read_state_dict(path, mapped=True)
    depth = (EVA_CLIP_G_SIZES | cfg.vit_config)["depth"]
    return path, _own_eva_keys(state, depth) if cfg.vit_model == EVA_CLIP_G else state


def _own_eva_keys(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The keys of the first `depth` blocks and what comes before them; one surplus block is BLIP-2's dropped
    40th, more of them would be another network."""

    def is_own(name: str) -> bool:
        block = re.match(r"blocks\.(\d+)\.", name)
        return int(block[1]) != depth if block else not EVA_FOREIGN_KEYS.match(name)

    return {name: tensor for name, tensor in state.items() if is_own(name)}


def _own_timm_keys(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The keys without the classifier that the pretrained file has and the tower here has not."""
    classifiers = model.pretrained_cfg.get("classifier") or ()
    names = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    prefixes = tuple(f"{name}." for name in names)
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def _fit_position_embedding(state: dict[str, Tensor], model: Eva, path: Path) -> None:
    """Interpolate `pos_embed` (1, 1 + n*n, D) bicubically in fp32 to the model's grid; class position untouched."""
    stored = state.get("pos_embed")
    if stored is None or stored.shape == model.pos_embed.shape:
        return
    own = model.pos_embed
    if stored.ndim != 3 or stored[:, :1].shape != own[:, :1].shape or not stored.is_floating_point():
        return  # `copy_strict` says what it is
    side = round((stored.shape[1] - 1) ** 0.5)
    if side < 1 or side * side + 1 != stored.shape[1]:
        raise WeightsError(f"{path}: pos_embed has {stored.shape[1]} positions, not a square grid and a class token")
    grid = list(model.patch_embed.grid_size)
    log.info("Interpolating the position embedding of %s from %dx%d to %dx%d", path, side, side, *grid)
    state["pos_embed"] = resample_abs_pos_embed(
        stored.float(), grid, old_size=[side, side], num_prefix_tokens=1, antialias=False, align_corners=False
    ).to(torch.float32)
