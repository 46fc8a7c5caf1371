"""From a configuration to an engine, for the page, the terminal and the server."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minigpt4.common.config import Config
from minigpt4.common.devices import find_device, is_gpu
from minigpt4.common.errors import ConfigError
from minigpt4.evaluation.generate import read_checkpoint_list
from minigpt4.inference.engine import Engine
from minigpt4.inference.pipeline import image_processor
from minigpt4.models.feature_cache import build_model
from minigpt4.models.llava_weights import whole_llava


def checkpoints(cfg: Config, further: Sequence[str]) -> tuple[str, dict[str, Path]]:
    """What `model.ckpt`, or a whole LLaVA, is called, after its file, and the further checkpoints by name.

    Nothing is loaded.

    `further`: PATH or NAME=PATH each, beside those of `run.chat.ckpt` that are there. ConfigError where `model.ckpt` is
    not set, or a name is taken; WeightsError for a missing file.
    """
    trained = cfg.model.ckpt or whole_llava(cfg.model)
    if not trained:
        raise ConfigError(f"{cfg.source}: model.ckpt names no checkpoint; set it with --options model.ckpt=FILE")
    first = Path(trained).stem if cfg.model.ckpt else trained.name
    own = [one for one in cfg.run.chat.ckpt if Path(one.partition("=")[2] or one).is_file()]
    others = {checkpoint.name: checkpoint.path for checkpoint in read_checkpoint_list([*own, *further])}
    if first in others:
        raise ConfigError(f"--ckpt: '{first}' is the name of model.ckpt already; give another one: NAME=FILE")
    return first, others


def load_engine(cfg: Config, further: Sequence[str], gpu_id: int, **settings: Any) -> Engine:
    """The engine of a configuration, not started; `further` as in `checkpoints`, `settings` as in `Engine`."""
    name, others = checkpoints(cfg, further)
    device = find_device(None)
    model = build_model(cfg, torch.device(device.type, gpu_id) if is_gpu(device) else device).eval()
    return Engine(model, image_processor(cfg), others, name, **settings)
