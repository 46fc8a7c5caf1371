"""Images as the LLM reads them, each encoded once, for any of several checkpoints.

Shapes: B images, S pixels a side, Q image tokens, V channels before the projection, D channels of the LLM.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minigpt4.conversation.requests import Picture
from minigpt4.inference.checkpoint_switch import CheckpointSwitch
from minigpt4.processors.base_processor import BaseProcessor
from minigpt4.processors.images import process_image


def look(image: Image.Image, processor: BaseProcessor) -> Picture:
    """The image as a model reads it; SampleError if its pixels cannot be read."""
    pixels_3SS = process_image(processor, image)
    return Picture(hashlib.sha256(pixels_3SS.numpy().tobytes()).hexdigest()[:16], pixels_3SS)


class PictureEncoder:
    """Image tokens, kept for the images that were asked about last.

    Args:
        switch: the checkpoints of a `MiniGPT4` in eval mode.
        keep: images that are remembered.
    """

    def __init__(self, switch: CheckpointSwitch, keep: int) -> None:
        self.switch, self.model, self._keep = switch, switch.model, keep
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._embeds: OrderedDict[tuple[str, str], Tensor] = OrderedDict()

    @torch.inference_mode()
    def embeds(self, pictures: Sequence[Picture], checkpoint: str) -> list[Tensor]:
        """Embeddings (1, Q, D) of each picture."""
        self.switch.use(checkpoint)
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


def _remember(memory: OrderedDict, key: Any, value: Tensor, keep: int) -> None:
    """Put it last; the one that was used longest ago goes if there are too many."""
    memory[key] = value
    memory.move_to_end(key)
    while len(memory) > keep:
        memory.popitem(last=False)
