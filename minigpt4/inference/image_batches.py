"""Reading images in batches, in processes of their own, so that a bad one spoils nothing but itself.

Shapes: B images that could be read, S pixels a side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from minigpt4.common.errors import SampleError
from minigpt4.features import ImageRow, PartialFeatures, join_images


class ImageItem(Protocol):
    """One image that is asked about."""

    @property
    def image_id(self) -> str: ...

    @property
    def file(self) -> Path: ...


class Images(Protocol):
    """What can be asked about, such as `ImageList`."""

    @property
    def items(self) -> Sequence[ImageItem]: ...

    def image(self, number: int) -> Tensor | ImageRow:
        """Pixels of one image, (3, S, S) float32, or its row of a cache; SampleError if it cannot be read."""


@dataclass(frozen=True)
class ImageBatch:
    """The images of a batch that could be read, and why others could not."""

    numbers: list[int]
    """Of the images that could be read, in the order of the batch."""

    pixels: Tensor | PartialFeatures
    """(B, 3, S, S) float32, or rows of a cache; empty if no image could be read."""

    errors: dict[int, str] = field(default_factory=dict)
    """By number of the image; the text names the file."""


def read_batches(images: Images, batches: Sequence[Sequence[int]], num_workers: int) -> Iterator[ImageBatch]:
    """Each batch of image numbers in turn.

    Args:
        num_workers: processes that read; 0: none but this one.
    """
    reader = _Reader(images, batches)
    yield from DataLoader(
        reader,
        batch_size=None,
        num_workers=min(num_workers, len(reader)),
        collate_fn=_unchanged,
        generator=torch.Generator().manual_seed(0),  # the global one belongs to sampling
    )


class _Reader(torch.utils.data.Dataset):
    """Batches by index."""

    def __init__(self, images: Images, batches: Sequence[Sequence[int]]) -> None:
        self.images, self.batches = images, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> ImageBatch:
        pixels: dict[int, Tensor | ImageRow] = {}
        errors: dict[int, str] = {}
        for number in self.batches[index]:
            try:
                pixels[number] = self.images.image(number)
            except SampleError as error:
                errors[number] = str(error)
        return ImageBatch(list(pixels), join_images(list(pixels.values())), errors)


def _unchanged(batch: ImageBatch) -> ImageBatch:
    return batch
