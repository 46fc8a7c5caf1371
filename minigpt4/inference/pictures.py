"""Images as the LLM reads them, each encoded once, for any of several checkpoints.

Shapes: B images, S pixels a side, Q image tokens, V channels before the projection, D channels of the LLM.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minigpt4.common.errors import ConfigError
from minigpt4.conversation.requests import Picture
from minigpt4.processors.base_processor import BaseProcessor
from minigpt4.processors.images import to_rgb


def look(image: Image.Image, processor: BaseProcessor) -> Picture:
    """The image as a model reads it; SampleError if its pixels cannot be read."""
    pixels_3SS = processor(to_rgb(image))
    return Picture(hashlib.sha256(pixels_3SS.numpy().tobytes()).hexdigest()[:16], pixels_3SS)


class PictureEncoder:
    """Image tokens, kept for the images that were asked about last.

    Args:
        model: a `MiniGPT4` in eval mode, with the weights of the first checkpoint.
        checkpoints: further checkpoints by name; all are read now.
        first: name of what `model` holds.
        keep: images that are remembered.

    Raises WeightsError for a checkpoint that does not fit the model.
    """

    def __init__(self, model: Any, first: str, checkpoints: Mapping[str, Path], keep: int) -> None:
        self.model, self._keep = model, keep
        self._weights = {first: self._snapshot()}
        self._loaded = first
        for name, path in checkpoints.items():
            self._load(first)  # what a file may leave out is then the first one's
            model.load_checkpoint(path)
            self._weights[name] = self._snapshot()
            self._loaded = name
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._embeds: OrderedDict[tuple[str, str], Tensor] = OrderedDict()

    @property
    def names(self) -> list[str]:
        """The checkpoints, the first one first."""
        return list(self._weights)

    def name(self, wanted: str | None) -> str:
        """A checkpoint's name, the first one's for None; ConfigError if there is no such checkpoint."""
        if wanted is None:
            return self.names[0]
        if wanted not in self._weights:
            raise ConfigError(f"there is no checkpoint '{wanted}'; there are: {', '.join(self.names)}")
        return wanted

    @torch.inference_mode()
    def embeds(self, pictures: Sequence[Picture], checkpoint: str) -> list[Tensor]:
        """Embeddings (1, Q, D) of each picture."""
        self._load(checkpoint)
        missing = {p.image_id: p for p in pictures if (checkpoint, p.image_id) not in self._embeds}
        own = {p.image_id: self._embeds[checkpoint, p.image_id] for p in pictures if p.image_id not in missing}
        if missing:
            embeds_BQD = self.model.project(self._image_features(list(missing.values())))
            own |= zip(missing, embeds_BQD.split(1), strict=True)
        for image_id, embeds_1QD in own.items():
            _remember(self._embeds, (checkpoint, image_id), embeds_1QD, self._keep)
        return [own[picture.image_id] for picture in pictures]

    def _image_features(self, pictures: Sequence[Picture]) -> Tensor:
        """What the projection reads, (B, Q, V)."""
        if not self.model.vision_is_frozen:
            return self._seen(pictures)
        missing = [picture for picture in pictures if picture.image_id not in self._features]
        own = {p.image_id: self._features[p.image_id] for p in pictures if p not in missing}
        if missing:
            own |= zip((p.image_id for p in missing), self._seen(missing).split(1), strict=True)
        for image_id, features_1QV in own.items():
            _remember(self._features, image_id, features_1QV, self._keep)
        return torch.cat([own[picture.image_id] for picture in pictures])

    def _seen(self, pictures: Sequence[Picture]) -> Tensor:
        return self.model.image_features(torch.stack([picture.pixels_3SS for picture in pictures]))

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.model.trainable_parameters().items()}

    def _load(self, name: str) -> None:
        if name == self._loaded:
            return
        with torch.no_grad():
            for key, parameter in self.model.trainable_parameters().items():
                parameter.copy_(self._weights[name][key])
        self._loaded = name


def _remember(memory: OrderedDict, key: Any, value: Tensor, keep: int) -> None:
    """Put it last; the one that was used longest ago goes if there are too many."""
    memory[key] = value
    memory.move_to_end(key)
    while len(memory) > keep:
        memory.popitem(last=False)
