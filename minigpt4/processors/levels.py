"""Images as 8-bit levels on their way to the model: a quarter of the bytes of what the model reads.

Shapes: S pixels a side.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

Channels = tuple[float, float, float]
"""A number each for R, G, B in 0..1."""
WHITE = (255.0, 255.0, 255.0)


@dataclass(frozen=True)
class Levels:
    """One image or a batch of them, and what is still to be done to it: (level / 255 - mean) / std."""

    levels: Tensor
    """(..., 3, S, S) uint8."""
    mean: Channels
    std: Channels

    @classmethod
    def joined(cls, images: Sequence["Levels"]) -> "Levels":
        """The batch of images of one processor."""
        return replace(images[0], levels=torch.stack([image.levels for image in images]))

    @property
    def shape(self) -> torch.Size:
        return self.levels.shape

    def normalised(self) -> Tensor:
        """What the model reads, (..., 3, S, S) float32, on the device of the levels.

        Each step is rounded as IEEE 754 says, so all devices give the same bits: the divisors are tensors because CUDA
        multiplies by the reciprocal of a plain number.
        """
        white, mean, std = (_channels(values, self.levels.device) for values in (WHITE, self.mean, self.std))
        return self.levels.float().div_(white).sub_(mean).div_(std)

    # What loaders do with a tensor of images

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """The same on `device`."""
        return replace(self, levels=self.levels.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in page-locked memory."""
        return replace(self, levels=self.levels.pin_memory())

    def is_pinned(self) -> bool:
        """Whether it is in page-locked memory."""
        return self.levels.is_pinned()


@functools.lru_cache(maxsize=64)  # making a tensor on a GPU out of numbers waits for it
def _channels(values: Channels, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(3, 1, 1)
