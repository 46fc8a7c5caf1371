"""Images without texts: a folder, a list of files, or files by name; read in batches, so that a bad one fails alone."""

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.utils import decode, parse_json
from minigpt4.datasets.datasets.base_dataset import ImageReader, join_images
from minigpt4.datasets.feature_store import CachedBatch, CachedImage
from minigpt4.processors.blip_processors import SUFFIXES, Uint8Image

Item = TypeVar("Item")
MAC_OS = "._"
"""Begins the names of files that macOS puts beside others on foreign disks and in archives."""


@dataclass(frozen=True)
class ImageFile:
    """One image, or the place of a text that has none."""

    image_id: str
    file: Path | None
    name: str = ""
    """As its folder or list calls it."""


@dataclass
class ImageList:
    """Images, and how a model's are read."""

    items: Sequence[ImageFile]
    reader: ImageReader

    def __len__(self) -> int:
        return len(self.items)

    def image(self, number: int) -> Tensor | Uint8Image | CachedImage:
        """One image as the reader gives it; SampleError if it cannot be read."""
        return self.reader.read(self.items[number].file)

    def __getitem__(self, number: int) -> tuple[int, Tensor | Uint8Image | CachedImage | str]:
        """Its number, and the image or why it cannot be read."""
        try:
            return number, self.image(number)
        except SampleError as error:
            return number, str(error)

    def batches(self, batch_size: int) -> list[list[int]]:
        return cut(range(len(self)), batch_size)


def cut(numbers: Sequence[int], batch_size: int) -> list[list[int]]:
    """Numbers in their order, in batches; the last may be smaller."""
    return [list(numbers[start : start + batch_size]) for start in range(0, len(numbers), batch_size)]


def find_images(source: Path, folder: Path | None, limit: int | None, seed: int) -> list[ImageFile]:
    """The images of a folder, its subfolders too, by name; or of a list, in its order, whose files are in `folder`
    (None: beside it). Of more than `limit` so many are drawn by `seed`.

    A list is a text (.txt) with a file a line, or JSON, whose entries are a file or {"image": file, "image_id": name};
    without `image` the file is `<image_id>.jpg`. ConfigError if there is no such folder or list, or it names no image;
    SampleError if an entry is bad, its file is missing, or an image id comes twice.
    """
    found = _in_source(source, folder)
    for where, item in found:
        with errors_as(SampleError, f"{where}: the image {item.file}"):  # there are names that no file system takes
            exists = item.file.is_file()
        if not exists:
            raise SampleError(f"{where}: the image {item.file} does not exist; --image-folder says where images are")
    return drawn([item for _, item in found], limit, seed)


def drawn(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """So many of the items, drawn by `seed`, in their order; all of them without a limit, or with a higher one."""
    chosen = random.Random(seed).sample(range(len(items)), min(limit or len(items), len(items)))
    return [items[number] for number in sorted(chosen)]


def images_to_caption(sources: Sequence[Path], folder: Path | None = None) -> tuple[Path, list[ImageFile]]:
    """Where the names of images begin; and the images of a folder or a list, as in `find_images`, or several files.

    The id of an image is what its list says, else its name without folder and ending, as references call it; names
    that would share one stay whole. Errors are those of `find_images`, but a missing file is found when it is read.
    """
    first = sources[0]
    others = [path for path in sources if path.suffix.lower() not in SUFFIXES or path.is_dir()]
    if others and len(sources) == 1:
        base = first if first.is_dir() else folder or first.parent
        found = _in_source(first, folder)
    else:
        if others:
            raise ConfigError(f"--images: takes one folder, or one list, or image files; {others[0]} is no image file")
        base = Path.cwd()
        found = [(f"--images: {path}", ImageFile(str(path), path, str(path))) for path in sources]
    _refuse_doubles([(where, "image", item.name) for where, item in found])
    items = [item for _, item in found]
    ids = [Path(item.name).stem if item.image_id == item.name else item.image_id for item in items]
    times = Counter(ids)
    pairs = zip(ids, items, strict=True)
    return base.resolve(), [item if times[i] > 1 else dataclasses.replace(item, image_id=i) for i, item in pairs]


def _in_source(source: Path, folder: Path | None) -> list[tuple[str, ImageFile]]:
    """The images of a folder or a list, each with its place for errors."""
    if source.is_dir():
        named = (file for file in source.rglob("*") if file.suffix.lower() in SUFFIXES)
        files = sorted(file for file in named if file.is_file() and not file.name.startswith(MAC_OS))
        found = [(str(file), ImageFile(name := file.relative_to(source).as_posix(), file, name)) for file in files]
    else:
        found = _in_list(source, folder or source.parent)
    if not found:
        raise ConfigError(f"--images: {source} has no images; known endings: {', '.join(sorted(SUFFIXES))}")
    _refuse_doubles([(where, "image id", item.image_id) for where, item in found])
    return found


def _in_list(source: Path, folder: Path) -> list[tuple[str, ImageFile]]:
    with errors_as(ConfigError, f"--images: {source}: cannot be read"):
        if source.exists() and not source.is_file():
            raise OSError("it is neither a folder nor a file")
        text = decode(source.read_bytes())
    if source.suffix.lower() == ".txt":
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
        entries = [(f"{source}, line {number}", line) for number, line in lines if line]
    else:
        with errors_as(ConfigError, f"--images: {source}: neither a folder nor JSON (lists of lines end in .txt)"):
            content = parse_json(text)
        if not isinstance(content, list):
            raise ConfigError(f"--images: {source}: must hold a list of files")
        entries = [(f"{source}, entry {number}", entry) for number, entry in enumerate(content, start=1)]
    return [(where, _entry(where, entry, folder)) for where, entry in entries]


def _entry(where: str, entry: Any, folder: Path) -> ImageFile:
    name, image_id = (entry.get("image"), entry.get("image_id")) if isinstance(entry, dict) else (entry, None)
    if name is None and image_id not in (None, ""):
        name = f"{image_id}.jpg"
    if not isinstance(name, str) or not name:
        raise SampleError(f"{where}: names no image; write a file, or {{'image': file}}")
    return ImageFile(name if image_id in (None, "") else str(image_id), folder / name, name)


def _refuse_doubles(named: Sequence[tuple[str, str, str]]) -> None:
    """SampleError for the first of (place, kind, name) whose name came before."""
    seen: set[str] = set()
    for where, kind, name in named:
        if name in seen:
            raise SampleError(f"{where}: the {kind} {name!r} comes twice")
        seen.add(name)


def read_batches(
    images: ImageList, batches: Sequence[Sequence[int]], num_workers: int
) -> Iterator[tuple[Tensor | Uint8Image | CachedBatch, dict[int, str]]]:
    """Each batch of image numbers in turn: those that can be read, joined, and the errors of the others by number.

    `num_workers`: processes that read; 0: none but this one.
    """
    yield from DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=_joined,
        num_workers=min(num_workers, len(batches)),
        generator=torch.Generator().manual_seed(0),  # the global one belongs to sampling
    )


def _joined(read: Sequence[tuple[int, Any]]) -> tuple[Tensor | Uint8Image | CachedBatch, dict[int, str]]:
    errors = {number: one for number, one in read if isinstance(one, str)}
    return join_images([one for number, one in read if number not in errors]), errors
