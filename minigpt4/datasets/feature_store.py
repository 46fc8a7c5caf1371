"""Features of images by the hash of their file, a file each, in a folder that any number of processes share.

Shapes: B images, M of them unknown, S pixels a side, Q image tokens, V channels before the projection.
"""

import hashlib
import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigpt4.common.utils import replacing

log = logging.getLogger(__name__)

CRC_BYTES = 4


def image_digest(content: bytes) -> str:
    """32 letters that stand for the bytes of an image file."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@dataclass(frozen=True)
class RowShape:
    """The features of one image: tokens x width numbers of `dtype`, `float16` or `float32`."""

    tokens: int
    width: int
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.tokens * self.width * np.dtype(self.dtype).itemsize


class FeatureStore:
    """The features of one folder: `ab/abcd...`, named by the image's digest, holds Q x V numbers and their CRC-32.

    A file appears whole or not at all. Whatever happens to the folder of a running process, deleted, truncated, full or
    no longer to be written to, costs a warning and images that are encoded again, never the run.
    """

    def __init__(self, folder: Path, shape: RowShape) -> None:
        self.folder, self.shape = folder, shape
        self._keeps = True

    def get(self, digest: str) -> np.ndarray | None:
        """The features (Q, V) of an image; None if there are none, or not as they were written."""
        file = self._file(digest)
        try:
            content = file.read_bytes()
            row, crc = content[:-CRC_BYTES], content[-CRC_BYTES:]
            if len(row) != self.shape.nbytes or zlib.crc32(row).to_bytes(CRC_BYTES, "little") != crc:
                raise OSError("is damaged")
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s: %s; its image is encoded again", file, error.strerror or error)
            return None
        return np.frombuffer(row, self.shape.dtype).reshape(self.shape.tokens, self.shape.width)

    def add(self, digest: str, row: np.ndarray) -> None:
        """Keep features (Q, V); they are dropped, with one warning, once the folder cannot be written to."""
        if row.shape != (self.shape.tokens, self.shape.width):
            raise ValueError(f"row: shape {row.shape} is not {(self.shape.tokens, self.shape.width)}")
        if not self._keeps:
            return
        file, content = self._file(digest), np.ascontiguousarray(row, self.shape.dtype).tobytes()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as part:
                part.write_bytes(content + zlib.crc32(content).to_bytes(CRC_BYTES, "little"))
        except FileNotFoundError:  # the folder was deleted just now: the next features make it anew
            pass
        except OSError as error:
            self._keeps = False
            text = "Feature cache %s: cannot be written to (%s); the run goes on and keeps no more features"
            log.warning(text, self.folder, error.strerror)

    def _file(self, digest: str) -> Path:
        return self.folder / digest[:2] / digest


@dataclass(frozen=True)
class CachedImage:
    """One image of the cache in `folder`: its features in the cache's type, or float32 pixels to compute them from."""

    folder: str
    digest: str
    features_QV: Tensor
    """Anything where `pixels_3SS` is given."""
    pixels_3SS: Tensor | None = None


@dataclass(frozen=True)
class CachedBatch:
    """A batch of images of the cache in `folder`.

    `features`: (B, Q, V) in the cache's type, anything in the rows `missing`; `digests` and `pixels`, (M, 3, S, S)
    float32, are those of the missing rows.
    """

    folder: str
    features: Tensor
    missing: list[int]
    digests: list[str]
    pixels: Tensor

    @classmethod
    def of(cls, images: Sequence[CachedImage]) -> "CachedBatch":
        """The batch of these images, which are of one cache."""
        missing = [number for number, image in enumerate(images) if image.pixels_3SS is not None]
        features = torch.stack([image.features_QV for image in images])
        pixels = torch.stack([images[number].pixels_3SS for number in missing]) if missing else torch.empty(0)
        return cls(images[0].folder, features, missing, [images[number].digest for number in missing], pixels)

    def __len__(self) -> int:
        return len(self.features)

    def to(self, device: torch.device, non_blocking: bool = False) -> "CachedBatch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "CachedBatch":
        return self._map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: Any) -> None:
        """Tell the allocator that `stream` reads it."""
        self.features.record_stream(stream)
        self.pixels.record_stream(stream)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "CachedBatch":
        return replace(self, features=change(self.features), pixels=change(self.pixels))
