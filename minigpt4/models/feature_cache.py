"""`run.feature_cache`: what a frozen vision side gives for each image, kept on disk and keyed by what it depends on.

The folder has a folder for each key: a hash of the vision settings, samples of the weights' files, and the image
processor. Features of other weights or settings are therefore never found.
Shapes: B images, S pixels a side, Q image tokens, V channels before the projection.
"""

import dataclasses
import hashlib
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.common.registry import registry
from minigpt4.common.utils import as_json, quick_hash, replacing
from minigpt4.datasets.feature_store import CachedBatch, FeatureStore, RowShape
from minigpt4.models.attention import make_batch_invariant
from minigpt4.models.llava_weights import TOWER, read_part
from minigpt4.models.loading import feature_shape
from minigpt4.models.prompting import ImageFeatures
from minigpt4.models.vision_tower import is_directory, vision_files
from minigpt4.processors import BaseProcessor

log = logging.getLogger(__name__)

VISION_KEYS = ("vit_model", "vit_config", "image_size", "vit_precision", "vit_layer", "vit_prefix", "connector")
VISION_KEYS += ("num_query_token", "qformer_config")
VERSION = 2
"""Raise it when the same files and settings give other features, or the files of the cache change."""
KEY_FILE = "key.json"


class FeatureCache:
    """The features of one vision side in `root`; ConfigError if it is trained, for then its features change."""

    def __init__(self, root: Path, cfg: MiniGPT4Config, batch_invariant: bool = False) -> None:
        for key in ("freeze_vit", "freeze_qformer"):
            if not getattr(cfg, key):
                raise ConfigError(f"run.feature_cache: model.{key} is False; only frozen features can be kept")
        self._root, self._cfg, self._batch_invariant = root, cfg, batch_invariant
        self._shape = RowShape(*feature_shape(cfg), _dtype(cfg))

    def store(self, processor: BaseProcessor) -> FeatureStore:
        """Of images that went through this processor; ConfigError for one whose output may change, or a bad folder."""
        metadata = self._metadata(processor)
        folder = self._root / hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / KEY_FILE).exists():
                with suppress(FileNotFoundError), replacing(folder / KEY_FILE) as part:  # deleted just now
                    part.write_text(as_json(metadata), encoding="utf-8")
        except OSError as error:
            text = f"{folder} cannot be made or written to ({error.strerror}); name another folder, or null for none"
            raise ConfigError(f"run.feature_cache: {text}") from error
        log.info("Feature cache %s: %.1f KiB an image", folder, self._shape.nbytes / 1024)
        return FeatureStore(folder, self._shape)

    def _metadata(self, processor: BaseProcessor) -> dict[str, Any]:
        if not hasattr(processor, "feature_key"):
            text = f"{type(processor).__name__} does not say that it gives the same pixels each time: it lacks the"
            raise ConfigError(f"run.feature_cache: {text} property `feature_key`, values that its output depends on")
        cfg, files = dataclasses.asdict(self._cfg), vision_files(self._cfg)
        if is_directory(cfg["vit_model"]):
            files += (read_part(self._cfg, TOWER) or ())[:1]
        return {
            **({"batch_invariant": True} if self._batch_invariant else {}),
            "version": VERSION,
            "vision": {key: cfg[key] for key in VISION_KEYS},
            "weights": [quick_hash(path) for path in files if path.is_file()],
            "processor": processor.feature_key,
            "row": dataclasses.asdict(self._shape),
        }


def feature_cache(cfg: Config) -> FeatureCache | None:
    """The cache of `run.feature_cache`, if there is to be one."""
    if not cfg.run.feature_cache:
        return None
    return FeatureCache(Path(cfg.run.feature_cache), cfg.model, cfg.run.batch_invariant)


def build_model(cfg: Config, device: torch.device | str = "cpu", **switches: Any) -> nn.Module:
    """The registered model of `model.arch` with its weights, on `device`, for training, evaluation and inference.

    `switches`: of `from_config`, such as `shard_llm`. Where a cache may know all images, the vision side waits.
    """
    if cfg.run.feature_cache:
        switches["lazy_vision"] = True
    model = registry.get_model_class(cfg.model.arch).from_config(cfg.model, device=device, **switches)
    if cfg.run.batch_invariant:
        make_batch_invariant(model.llama_model, cfg.model)
    return model


def cached_numbers(cfg: Config) -> dict[str, str]:
    """What is to be told of answers whose features a cache rounded; nothing without one."""
    return {"features": _dtype(cfg.model)} if cfg.run.feature_cache else {}


def _dtype(cfg: MiniGPT4Config) -> str:
    return "float32" if cfg.vit_precision == "fp32" else "float16"


class FeatureEncoder:
    """Makes features whole: what is missing is computed by a `MiniGPT4`, and kept."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._stores: dict[str, FeatureStore] = {}

    def complete_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`complete` for the "image" of a loader's batch; one of texts alone has none, and with "length" features are
        (B, n, Q, V)."""
        if "image" not in batch:
            return batch
        image = self.complete(batch["image"])
        if "length" in batch and isinstance(image, ImageFeatures):
            image = ImageFeatures(image.features.unflatten(0, (len(batch["length"]), -1)))
        return {**batch, "image": image}

    @torch.no_grad()
    def complete(self, image: Tensor | CachedBatch) -> Tensor | ImageFeatures:
        """Features of images of which some are known already; pixels (B, 3, S, S) as they are.

        A feature is the same to the bit whether it was just computed or read: both went through the cache's type.
        """
        if not isinstance(image, CachedBatch):
            return image
        features_BQV = image.features
        if image.missing:
            store = self._store(image)
            rows = [store.get(digest) for digest in image.digests]  # some were made since the loader looked
            left = [number for number, row in enumerate(rows) if row is None]
            if left:
                new_QVs = self.model.image_features(image.pixels[left]).cpu().to(features_BQV.dtype).numpy()
                for number, row_QV in zip(left, new_QVs, strict=True):
                    rows[number] = row_QV
                    store.add(image.digests[number], row_QV)
            features_BQV = features_BQV.clone()
            features_BQV[image.missing] = torch.from_numpy(np.stack(rows)).to(features_BQV.device)
        return ImageFeatures(features_BQV.to(self.model.device, non_blocking=True))

    def features(self, image: Tensor | CachedBatch) -> Tensor:
        """What the projection reads of a batch, (B, Q, V), whatever is known of it."""
        known = self.complete(image)
        return known.features if isinstance(known, ImageFeatures) else self.model.image_features(known)

    def _store(self, image: CachedBatch) -> FeatureStore:
        if image.folder not in self._stores:
            _, tokens, width = image.features.shape
            dtype = str(image.features.dtype).removeprefix("torch.")
            self._stores[image.folder] = FeatureStore(Path(image.folder), RowShape(tokens, width, dtype))
        return self._stores[image.folder]
