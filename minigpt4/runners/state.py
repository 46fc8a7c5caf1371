"""What a checkpoint holds of a run, and how a run takes it up again, exactly."""

import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.checkpoint import copy_strict, drop_keys
from minigpt4.common.errors import WeightsError
from minigpt4.common.run_checkpoints import read_checkpoint
from minigpt4.models.llm import fingerprint
from minigpt4.models.loading import PUBLISHED_BUFFERS

log = logging.getLogger(__name__)


@dataclass
class Position:
    """Where a run stands."""

    epoch: int = 0
    iteration: int = 0
    """Iterations done in this epoch."""

    best: float | None = None
    """Lowest validation loss so far, nats a token."""


@dataclass(frozen=True)
class Resumed:
    """A checkpoint as a run needs it."""

    position: Position
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None
    rank: dict[str, Any] | None
    """This rank's random state, pending gradients and log; None if the file has none or has other ranks."""

    data: dict[str, Any] | None
    """Position in the data, None if the file has none; the loader finds out itself whether it is of other ranks."""


def content(
    model: nn.Module, updates: Mapping[str, Any], config: Mapping[str, Any], position: Position, ranks: list[Any]
) -> dict[str, Any]:
    """A checkpoint in the published layout, with a `state` entry beside it for exact resume."""
    return {
        "model": {name: p.detach().cpu().clone() for name, p in model.trainable_parameters().items()},
        **updates,
        "config": dict(config),
        "epoch": position.epoch - 1,  # the last whole one, as published
        "state": {"position": asdict(position), "ranks": ranks},
    }


def card(
    model: nn.Module, config: Mapping[str, Any], position: Position, iteration: int, **more: Any
) -> dict[str, Any]:
    """What anyone may want to know of a 12 MB file without opening it."""
    section = dict(config["model"])
    return {
        "arch": section.get("arch"),
        "model_type": section.get("model_type"),
        "llm": section.get("llama_model"),
        "llm_fingerprint": fingerprint(model.llama_model),
        "vision": section.get("vit_model", "eva_clip_g"),
        "trained": {name: list(p.shape) for name, p in model.trainable_parameters().items()},
        "epoch": position.epoch - 1,
        "iteration": iteration,
        "best_loss": position.best,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "config": dict(config),
        **more,
    }


def resume(path: Path, model: nn.Module, rank: int, world_size: int) -> Resumed:
    """Load a checkpoint's weights into `model` and return the rest; raises WeightsError if it does not fit.

    A file of the original code has no `state`: the run then goes on at its next epoch, as it did there.
    """
    saved = _load(path, model)
    state, position = saved.get("state"), _position(saved)
    if state is None:
        log.warning("%s holds no random state and no data position: the run goes on at the next epoch", path)
        return Resumed(position, saved["optimizer"], saved.get("scaler"), None, None)
    ranks = state["ranks"]
    same = len(ranks) == world_size
    if not same:
        log.warning(
            "%s was saved by %d processes, this run has %d: it goes on with the same weights and optimizer, but the "
            "order of the samples changes, and gradients that waited for an update are lost",
            path,
            len(ranks),
            world_size,
        )
    own = ranks[rank] if same else None
    data = ranks[rank if same else 0]["data"]
    return Resumed(position, saved["optimizer"], saved.get("scaler"), own, data)


def load_weights(path: Path, model: nn.Module) -> Position:
    """Load a checkpoint's weights alone into `model`; where the run stood. WeightsError if it does not fit."""
    return _position(_load(path, model))


def _load(path: Path, model: nn.Module) -> dict[str, Any]:
    """The content of a checkpoint whose weights are now in `model`."""
    saved = read_checkpoint(path)
    missing = [key for key in ("model", "optimizer", "epoch") if key not in saved]
    if missing:
        raise WeightsError(
            f"{path}: has no {', '.join(missing)}, so a run cannot go on from it. To start a new run from its weights "
            "set model.ckpt instead of run.resume_ckpt_path."
        )
    weights: dict[str, Tensor] = drop_keys(saved["model"], PUBLISHED_BUFFERS)
    copy_strict(model.trainable_parameters(), weights, source=path)
    return saved


def _position(saved: Mapping[str, Any]) -> Position:
    return Position(**saved["state"]["position"]) if saved.get("state") is not None else Position(saved["epoch"] + 1)
