"""How a dataset reads an image: from a file to pixels, or from a cache of features without decoding anything."""

from pathlib import Path

import torch
from torch import Tensor

from minigpt4.common.errors import SampleError, errors_as
from minigpt4.features import FeatureStore, ImageRow, image_digest
from minigpt4.processors import BaseProcessor, Levels, process_image
from minigpt4.processors.formats import open_file


class ImageReader:
    """Reads the images of one split.

    Args:
        processor: PIL image -> (3, S, S).
        features: rows of images that went through `processor`; None: there is no cache.
    """

    def __init__(self, processor: BaseProcessor, features: FeatureStore | None = None) -> None:
        self.processor, self._features = processor, features

    def read(self, source: Path | bytes, name: str | None = None) -> Tensor | ImageRow:
        """Pixels (3, S, S) float32, or the image's row of the cache; SampleError if the image cannot be read.

        `name`: how errors call it, if it is not a file.
        """
        if self._features is None:
            return process_image(self.processor, source, name)
        content = source if isinstance(source, bytes) else _content(source)
        digest, store = image_digest(content), self._features
        row_QV = store.get(digest)
        if row_QV is not None:
            return ImageRow(str(store.folder), digest, torch.from_numpy(row_QV.copy()))
        pixels_3SS = process_image(self.processor, content, name or str(source))
        return ImageRow(str(store.folder), digest, torch.from_numpy(store.shape.empty()), pixels_3SS)

    def read_sample(self, source: Path | bytes, name: str | None = None) -> Tensor | Levels | ImageRow:
        """The same for a batch on its way to the device: pixels as `Levels` (3, S, S) if the processor gives them."""
        if self._features is not None:
            return self.read(source, name)
        return process_image(self.processor, source, name, levels=True)


def _content(file: Path) -> bytes:
    with errors_as(SampleError, f"{file}: cannot be read"), open_file(file) as opened:
        return opened.read()
