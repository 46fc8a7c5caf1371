"""Vision towers: an image in, tokens out; what its pixels have to be comes with the tower.

`model.vit_model` is `eva_clip_g` (BLIP-2's, eva_vit.py), a model of timm, or the directory of a CLIP or SigLIP model as
transformers saves it. Shapes: B images, S pixels a side, N tokens (prefix tokens such as the class token first),
V channels.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel
from transformers.image_processing_base import ImageProcessingMixin

from minigpt4.common.checkpoint import copy_strict, find_weights, read_state_dict
from minigpt4.common.errors import ConfigError, errors_as, nearest
from minigpt4.common.hub import local_path
from minigpt4.common.model_schema import EVA_CLIP_G, VIT_FILE, MiniGPT4Config
from minigpt4.common.torch_files import WEIGHT_FILES
from minigpt4.models import eva_vit
from minigpt4.models.llava_weights import TOWER, read_part
from minigpt4.processors.blip_processors import CLIP_MEAN, CLIP_STD

log = logging.getLogger(__name__)

USUAL_SIZE = 224
"""Side of the images of EVA-CLIP, and of a tower of which timm does not know it, pixels."""
_HF_TOWERS = {CLIPVisionConfig: CLIPVisionModel, SiglipVisionConfig: SiglipVisionModel}
_KNOWN = {"clip-vit-large-patch14": 224, "clip-vit-large-patch14-336": 336}
"""Image size of OpenAI's directories, so that LLaVA can be sized before they are there."""


@dataclass(frozen=True)
class Pixels:
    """The images that a tower was trained on."""

    mean: list[float]
    """R, G, B in 0..1."""
    std: list[float]
    image_size: int
    """Side, pixels."""


class VisionTower(nn.Module):
    """Image (B, 3, S, S) -> tokens (B, N, V), the first `num_prefix_tokens` of them before the patches.

    `model`: timm's, or a vision model of transformers; its names after `visual_encoder.` are those of trained
    weights in checkpoints. `image_size`: S; positions are interpolated where the network was made for another.
    """

    def __init__(self, model: nn.Module, image_size: int) -> None:
        super().__init__()
        self.model = model
        self.image_size = image_size
        self._of_transformers = isinstance(model, CLIPVisionModel | SiglipVisionModel)
        if self._of_transformers:
            self.num_features: int = model.config.hidden_size
            self.num_prefix_tokens = int(isinstance(model, CLIPVisionModel))
        else:
            self.num_features = model.num_features
            self.num_prefix_tokens = getattr(model, "num_prefix_tokens", 0)

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """Layers of a transformer; none of a convolutional network."""
        return self.model.encoder.layers if self._of_transformers else getattr(self.model, "blocks", ())

    def forward(self, image_B3SS: Tensor) -> Tensor:
        if self._of_transformers:
            other_size = self.image_size != self.model.config.image_size
            return self.model(image_B3SS, interpolate_pos_encoding=other_size).last_hidden_state
        tokens = self.model.forward_features(image_B3SS)
        if tokens.ndim == 4:  # a convolutional network: (B, V, H, W), or (B, H, W, V) for some timm families
            if tokens.shape[1] != self.num_features:
                tokens = tokens.permute(0, 3, 1, 2)
            tokens = tokens.flatten(2).transpose(1, 2)
        return tokens

    def drop_layers_after(self, layer: int) -> None:
        """Let the tokens be those of another layer: -2 is the one before the last; no norm follows it.

        From the front 0 is what the first layer reads, and 1 its tokens.
        """
        if layer == -1:
            return
        count = len(list(self.blocks))
        if layer not in range(-count, count + 1):
            text = f"{layer} must be from {-max(count, 1)} to -1 for this tower, or from the front 0 to {count}"
            raise ConfigError(f"model.vit_layer: {text}")
        kept = layer if layer >= 0 else count + 1 + layer
        if self._of_transformers:
            self.model.encoder.layers = self.model.encoder.layers[:kept]
            self.model.post_layernorm = nn.Identity()
        else:
            self.model.blocks = self.model.blocks[:kept]
            self.model.norm = nn.Identity()


def is_directory(name: str) -> bool:
    """Whether a `vit_model` names a directory: no name of timm's has a slash or stands on the disk."""
    return "/" in name or name.startswith(("~", ".")) or Path(name).is_dir()


def tower_pixels(name: str) -> Pixels | None:
    """What the images of a `vit_model` are; None if timm does not say.

    ConfigError for a name that timm does not know, or a directory without the files of a CLIP or SigLIP model.
    """
    if name == EVA_CLIP_G:
        return Pixels(list(CLIP_MEAN), list(CLIP_STD), USUAL_SIZE)
    return _directory_pixels(name) if is_directory(name) else _timm_pixels(name)


def build_vision_encoder(cfg: MiniGPT4Config) -> VisionTower:
    """The tower with fresh weights and all its layers; ConfigError for sizes or names that do not work."""
    size = image_size_of(cfg)
    if cfg.vit_model == EVA_CLIP_G:
        return VisionTower(eva_vit.build_eva(cfg, size), size)
    if is_directory(cfg.vit_model):
        return VisionTower(_build_of_directory(cfg), size)
    return VisionTower(_build_timm(cfg, size), size)


def vision_files(cfg: Any) -> list[Path]:
    """Files of the vision side that a section `model:` names, whether they are there or not."""
    keys = ("vit_weights", "q_former_model") if getattr(cfg, "connector", "qformer") == "qformer" else ("vit_weights",)
    files = [local_path(path, f"model.{key}") for key in keys if (path := getattr(cfg, key, None))]
    if is_directory(tower := getattr(cfg, "vit_model", "")):
        files += [local_path(tower, "model.vit_model") / name for name in WEIGHT_FILES]
    return files


def image_size_of(cfg: MiniGPT4Config) -> int:
    """`model.image_size`, or where it is null the tower's own."""
    if cfg.image_size is not None:
        return cfg.image_size
    pixels = tower_pixels(cfg.vit_model)
    return USUAL_SIZE if pixels is None else pixels.image_size


def load_vision_encoder(tower: VisionTower, cfg: MiniGPT4Config) -> None:
    """Fill a tower from `vit_weights` or its directory; WeightsError unless all of it is there and fits."""
    path, state = read_vit_weights(cfg)
    if cfg.vit_model == EVA_CLIP_G:
        eva_vit.fit_position_embedding(state, tower.model, path)
    elif not is_directory(cfg.vit_model):
        classifiers = tower.model.pretrained_cfg.get("classifier") or ()  # of the file, and not of the tower
        names = (classifiers,) if isinstance(classifiers, str) else classifiers
        prefixes = tuple(f"{name}." for name in names)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}
    own = {name: tensor for name, tensor in tower.model.state_dict().items() if not name.endswith("position_ids")}
    copy_strict(own, state, source=path)


def read_vit_weights(cfg: MiniGPT4Config) -> tuple[Path, dict[str, Tensor]]:
    """The tower's file and its tensors, mapped; of larger models' files only what is the tower's."""
    if is_directory(cfg.vit_model):
        prefix = "vision_model."
        path, state = read_part(cfg, TOWER) or (None, {})
        if path is None:
            directory = local_path(cfg.vit_model, "model.vit_model")
            path = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
            if path is None:
                raise ConfigError(f"model.vit_model: {directory} has neither {' nor '.join(WEIGHT_FILES)}")
            state = read_state_dict(path, mapped=True)
        if any(name.startswith(prefix) for name in state):  # a whole CLIP, with its text side
            state = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        return path, {n: t for n, t in state.items() if not n.startswith("head.") and "position_ids" not in n}
    if cfg.vit_model != EVA_CLIP_G and not cfg.vit_weights:
        raise ConfigError(f"model.vit_weights: not set, but vit_model {cfg.vit_model} needs its weights file")
    path = find_weights(cfg.vit_weights, "model.vit_weights", VIT_FILE)
    state = read_state_dict(path, mapped=True)
    return path, eva_vit.own_keys(state, cfg) if cfg.vit_model == EVA_CLIP_G else state


# timm


def _timm_pixels(name: str) -> Pixels | None:
    """A name without the variant (`vit_base_patch16_224`, not `vit_base_patch16_224.dino`) is its first."""
    _require_timm_name(name)
    known = timm.get_pretrained_cfg(name)
    if known is None or len(known.mean) != 3 or len(known.std) != 3:
        return None
    every = {} if "." in name else {one: timm.get_pretrained_cfg(one) for one in timm.list_pretrained(f"{name}.*")}
    if others := [one for one, cfg in every.items() if (cfg.mean, cfg.std) != (known.mean, known.std)]:
        text = "model.vit_model: %s is taken for its variant %s; name it if it is one of %s, of other mean and std"
        log.warning(text, name, known.tag, ", ".join(others))
    return Pixels([float(one) for one in known.mean], [float(one) for one in known.std], known.input_size[-1])


def _require_timm_name(name: str) -> None:
    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:3] or [nearest(name, timm.list_models())]
        near = f"; near: {', '.join(close)}" if close[0] else ""
        raise ConfigError(f"model.vit_model: {name!r} is neither {EVA_CLIP_G} nor a timm model nor a directory{near}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        variants = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise ConfigError(f"model.vit_model: {name!r} is no variant that timm knows: {', '.join(variants)}") from error


def _build_timm(cfg: MiniGPT4Config, image_size: int) -> nn.Module:
    _require_timm_name(cfg.vit_model)
    arguments: dict[str, Any] = {"num_classes": 0, "drop_path_rate": cfg.drop_path_rate, **cfg.vit_config}
    try:
        model = timm.create_model(cfg.vit_model, img_size=image_size, **arguments)
    except TypeError:  # families without position embedding take any size and know no img_size
        with errors_as(ConfigError, f"model.vit_config: {sorted(cfg.vit_config)} for {cfg.vit_model}"):
            model = timm.create_model(cfg.vit_model, **arguments)
    if cfg.use_grad_checkpoint:
        model.set_grad_checkpointing(True)
    return model


# Directories of transformers


def directory_config(name: str | Path) -> CLIPVisionConfig | SiglipVisionConfig:
    """The vision side of the CLIP or SigLIP in a directory; ConfigError for another model."""
    if (size := _missing_clip(Path(name).expanduser())) is not None:
        sizes = {"num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14, "image_size": size}
        return CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, **sizes)
    directory = local_path(str(name), "model.vit_model", ())
    if not directory.is_dir():
        raise ConfigError(f"model.vit_model: there is no directory {directory}")
    with errors_as(ConfigError, f"model.vit_model: {directory}: its config.json is none of a CLIP or SigLIP model"):
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        config = getattr(config, "vision_config", config)
        if not isinstance(config, tuple(_HF_TOWERS)):
            raise ValueError(f"its model_type is {config.model_type!r}; read are CLIP, SigLIP and the names of timm")
        return config


def _missing_clip(directory: Path) -> int | None:
    """Image size of one of OpenAI's CLIPs that is not there yet; its sizes and statistics are known."""
    return None if directory.exists() else _KNOWN.get(directory.name)


def _directory_pixels(name: str) -> Pixels:
    if (size := _missing_clip(Path(name).expanduser())) is not None:
        return Pixels(list(CLIP_MEAN), list(CLIP_STD), size)
    config, directory = directory_config(name), local_path(name, "model.vit_model", ())
    with errors_as(ConfigError, f"model.vit_model: {directory}: its preprocessor_config.json names no mean and std"):
        processor, _ = ImageProcessingMixin.get_image_processor_dict(directory, local_files_only=True)
        mean, std = ([float(one) for one in processor[key]] for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3:
            raise ValueError("image_mean and image_std must have three numbers each")
        return Pixels(mean, std, int(config.image_size))


def _build_of_directory(cfg: MiniGPT4Config) -> nn.Module:
    directory, config = cfg.vit_model, directory_config(cfg.vit_model)
    if cfg.vit_config or cfg.vit_weights or cfg.drop_path_rate:
        unset = "leave vit_config, vit_weights and drop_path_rate unset"
        raise ConfigError(f"model.vit_model: {directory} has sizes and weights of its own; {unset}")
    with errors_as(ConfigError, f"model.vit_model: {directory}/config.json describes no tower"):
        config.vision_use_head = False  # SigLIP's pools, and nobody reads that
        model = _HF_TOWERS[type(config)](config)
    if cfg.use_grad_checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
