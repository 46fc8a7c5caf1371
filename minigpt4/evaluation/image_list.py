"""Images without texts: a folder, or a JSON list of files."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.processors import BaseProcessor, open_image

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class ImageFile:
    """One image."""

    image_id: str
    file: Path


class ImageList:
    """Images as a model reads them.

    Args:
        vis_processor: PIL image -> (3, S, S).
    """

    def __init__(self, items: Sequence[ImageFile], vis_processor: BaseProcessor) -> None:
        self.items = items
        self._vis_processor = vis_processor

    def __len__(self) -> int:
        return len(self.items)

    def images(self, numbers: Sequence[int]) -> Tensor:
        """Pixels of several images, (B, 3, S, S) float32; SampleError for one that cannot be read."""
        return torch.stack([self._vis_processor(open_image(self.items[number].file)) for number in numbers])

    def batches(self, batch_size: int) -> list[list[int]]:
        """Numbers of images in their order, cut into batches."""
        numbers = range(len(self))
        return [list(numbers[start : start + batch_size]) for start in range(0, len(self), batch_size)]


def find_images(source: Path, folder: Path | None, limit: int | None, seed: int) -> list[ImageFile]:
    """The images of a folder, its subfolders too, by name; or of a JSON list, in its order.

    An entry of the list is a file, or {"image": file, "image_id": name}; without `image` the file is `<image_id>.jpg`.

    Args:
        folder: where the files of a list are; None: beside it.
        limit: if there are more, so many are drawn by `seed`.

    Raises:
        ConfigError: there is no such folder or list, or it names no image.
        SampleError: an entry is bad, its file is missing, or an image id comes twice.
    """
    found = _in_folder(source) if source.is_dir() else _in_list(source, folder or source.parent)
    if not found:
        raise ConfigError(f"--images: {source} has no images; known endings: {', '.join(sorted(SUFFIXES))}")
    if limit is None or limit >= len(found):
        return found
    chosen = random.Random(seed).sample(range(len(found)), limit)
    return [found[number] for number in sorted(chosen)]


def _in_folder(folder: Path) -> list[ImageFile]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    return [ImageFile(file.relative_to(folder).as_posix(), file) for file in files]


def _in_list(source: Path, folder: Path) -> list[ImageFile]:
    try:
        entries = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--images: {source}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--images: {source}: neither a folder nor JSON: {error}") from error
    if not isinstance(entries, list):
        raise ConfigError(f"--images: {source}: must hold a list of files")
    found: dict[str, ImageFile] = {}
    for number, entry in enumerate(entries, start=1):
        item = _entry(f"{source}, entry {number}", entry, folder)
        if item.image_id in found:
            raise SampleError(f"{source}, entry {number}: the image id {item.image_id!r} comes twice")
        found[item.image_id] = item
    return list(found.values())


def _entry(where: str, entry: Any, folder: Path) -> ImageFile:
    name, image_id = (entry.get("image"), entry.get("image_id")) if isinstance(entry, dict) else (entry, None)
    if name is None and image_id not in (None, ""):
        name = f"{image_id}.jpg"
    if not isinstance(name, str) or not name:
        raise SampleError(f"{where}: names no image; write a file, or {{'image': file}}")
    file = folder / name
    if not file.is_file():
        raise SampleError(f"{where}: the image {file} does not exist; --image-folder says where images are")
    return ImageFile(name if image_id in (None, "") else str(image_id), file)
