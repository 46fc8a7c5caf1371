"""EVA-CLIP ViT-g/14 as BLIP-2 uses it: timm's `Eva` under the parameter names of `eva_vit_g.pth`.

40 blocks there, 39 here: BLIP-2 drops the last one and the norm, and goes on with `ln_vision`.
"""

import logging
import re
from functools import partial
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from torch import Tensor, nn

from minigpt4.common.errors import ConfigError, WeightsError
from minigpt4.common.model_schema import MiniGPT4Config

log = logging.getLogger(__name__)

EVA_CLIP_G_SIZES = {"embed_dim": 1408, "depth": 39, "num_heads": 16, "patch_size": 14, "mlp_ratio": 4.3637}
EVA_NORM_EPS = 1e-6
# What eva_vit_g.pth holds besides the tower of BLIP-2: the blocks after the last used one, norm and head.
EVA_FOREIGN_KEYS = re.compile(r"(norm|fc_norm|head)\.|mask_token$")


def build_eva(cfg: MiniGPT4Config, image_size: int) -> Eva:
    """The network with fresh weights; ConfigError for sizes that do not work."""
    sizes = EVA_CLIP_G_SIZES | cfg.vit_config
    if image_size % sizes["patch_size"]:
        raise ConfigError(f"model.image_size: {image_size} is not a multiple of the patch size {sizes['patch_size']}")
    if sizes["embed_dim"] % sizes["num_heads"]:
        raise ConfigError(f"model.vit_config: embed_dim is not a multiple of num_heads in {sizes}")
    switches = {"qkv_bias": True, "num_classes": 0, "global_pool": "", "drop_path_rate": cfg.drop_path_rate}
    model = Eva(img_size=image_size, norm_layer=partial(nn.LayerNorm, eps=EVA_NORM_EPS), **switches, **sizes)
    model.norm = nn.Identity()  # BLIP-2 goes from the last block straight to ln_vision
    model.set_grad_checkpointing(cfg.use_grad_checkpoint)
    return model


def own_keys(state: dict[str, Tensor], cfg: MiniGPT4Config) -> dict[str, Tensor]:
    """The keys of the blocks that are used and what comes before them; one surplus block is BLIP-2's dropped 40th,
    more of them would be another network."""
    dropped = f"blocks.{(EVA_CLIP_G_SIZES | cfg.vit_config)['depth']}."
    own = (name for name in state if not name.startswith(dropped) and not EVA_FOREIGN_KEYS.match(name))
    return {name: state[name] for name in own}


def fit_position_embedding(state: dict[str, Tensor], model: Eva, path: Path) -> None:
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
