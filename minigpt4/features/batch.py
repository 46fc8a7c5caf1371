"""Images of which the features are known, wholly or in part, on their way from the loaders to the model.

Shapes: B images, M of them unknown, S pixels a side, Q image tokens, V channels before the projection.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minigpt4.processors.levels import Levels


@dataclass(frozen=True)
class ImageRow:
    """One image of a cache: its features, or the pixels to compute them from."""

    folder: str
    """Of the cache."""
    digest: bytes
    features_QV: Tensor
    """In the cache's type; anything where `pixels_3SS` is given."""
    pixels_3SS: Tensor | None = None
    """Float32; None: the features are known."""


def join_images(
    images: "Sequence[Tensor] | Sequence[Levels] | Sequence[ImageRow]",
) -> "Tensor | Levels | PartialFeatures":
    """A batch of images: (B, 3, S, S) float32 or levels, or rows of a cache; an empty tensor for none."""
    if images and isinstance(images[0], ImageRow):
        return PartialFeatures.of(images)
    if images and isinstance(images[0], Levels):
        return Levels.joined(images)
    return torch.stack(list(images)) if images else torch.empty(0)


@dataclass(frozen=True)
class PartialFeatures:
    """A batch of them."""

    folder: str
    features: Tensor
    """(B, Q, V) in the cache's type; rows that are missing hold anything."""
    missing: list[int]
    digests: list[bytes]
    """Of the missing rows."""
    pixels: Tensor
    """Of the missing rows, (M, 3, S, S) float32."""

    @classmethod
    def of(cls, rows: Sequence[ImageRow]) -> "PartialFeatures":
        """The batch of these images, which are of one cache."""
        missing = [number for number, row in enumerate(rows) if row.pixels_3SS is not None]
        pixels = [rows[number].pixels_3SS for number in missing]
        return cls(
            rows[0].folder,
            torch.stack([row.features_QV for row in rows]),
            missing,
            [rows[number].digest for number in missing],
            torch.stack(pixels) if pixels else torch.empty(0),
        )

    def __len__(self) -> int:
        return len(self.features)

    def with_rows(self, rows: Mapping[int, Tensor]) -> "PartialFeatures":
        """The same with features (Q, V) of some that were missing, by their number among those."""
        features = self.features.clone()
        for number, row_QV in rows.items():
            features[self.missing[number]] = row_QV.to(features.device)
        left = [number for number in range(len(self.missing)) if number not in rows]
        return replace(
            self,
            features=features,
            missing=[self.missing[number] for number in left],
            digests=[self.digests[number] for number in left],
            pixels=self.pixels[left],
        )

    # What loaders do with a tensor of images

    def to(self, device: torch.device, non_blocking: bool = False) -> "PartialFeatures":
        """The same on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PartialFeatures":
        """The same in page-locked memory."""
        return self._with(lambda tensor: tensor.pin_memory())

    def is_pinned(self) -> bool:
        """Whether it is in page-locked memory."""
        return self.features.is_pinned()

    def record_stream(self, stream: Any) -> None:
        """Tell the allocator that `stream` reads it."""
        self.features.record_stream(stream)
        self.pixels.record_stream(stream)

    def _with(self, change: Any) -> "PartialFeatures":
        return replace(self, features=change(self.features), pixels=change(self.pixels))
