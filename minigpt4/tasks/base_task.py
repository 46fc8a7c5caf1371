"""What a run does with a batch; the runner owns the loop, a task owns the steps."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.config import Config
from minigpt4.datasets import BaseDataset, build_datasets
from minigpt4.evaluation import score_captions
from minigpt4.models.feature_cache import build_model, feature_cache
from minigpt4.models.fsdp import sharding


class BaseTask:
    """The steps of training and validation; subclass it and register the subclass under a name of your own."""

    @classmethod
    def setup_task(cls, cfg: Config) -> "BaseTask":
        """The task of a configuration."""
        return cls()

    def build_datasets(self, cfg: Config) -> dict[str, dict[str, BaseDataset]]:
        """Datasets by name and split, for the splits that the run names; nothing is decoded yet."""
        return build_datasets(cfg.datasets, cfg.run.splits(), feature_cache(cfg))

    def build_model(self, cfg: Config, device: torch.device | str = "cpu") -> nn.Module:
        """The registered model of `model.arch` with its weights, on `device`."""
        return build_model(cfg, device, **sharding(cfg.run))

    def train_step(self, model: nn.Module, samples: Mapping[str, Any]) -> dict[str, Any]:
        """Forward pass of a training batch: "loss" (mean over targets, nats) and "num_tokens" (targets)."""
        return model(samples)

    @torch.no_grad()
    def valid_step(self, model: nn.Module, samples: Mapping[str, Any]) -> dict[str, Any]:
        """The same for a validation batch."""
        return model(samples)

    def caption(self, model: nn.Module, images: Tensor) -> list[str]:
        """What the model says to images (B, 3, S, S), for the log and the metrics; nothing by default."""
        return []

    def score(self, said: Iterable[tuple[str, str, str]]) -> dict[str, float]:
        """Caption metrics of (image id, caption, reference); an image may have several references."""
        captions: dict[str, str] = {}
        references: dict[str, list[str]] = {}
        for image_id, caption, reference in said:
            captions.setdefault(image_id, caption)
            references.setdefault(image_id, []).append(reference)
        return score_captions(captions, references) if captions else {}
