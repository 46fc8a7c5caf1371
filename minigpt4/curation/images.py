"""The step `select`: which images, and what tells them apart."""

import hashlib
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import imagehash
import numpy as np

from minigpt4.common.binding import expand_braces
from minigpt4.common.curation_schema import SelectConfig
from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.utils import parse_json, replacing
from minigpt4.curation.records import CurationFolder, Record, digest_of, dropped

FOLDER = "images"
"""Of those that come out of tar shards."""
NO_NAME = re.compile(r"[^\w.-]+")
HASH_BITS = 64


@dataclass(frozen=True)
class SourceImage:
    """An image of a source."""

    key: str
    source: str
    """Where it is from, for people."""
    file: Path | None
    caption: str | None = None
    stored: tuple[Path, int, int] | None = None
    """Tar file, and where in it so many bytes begin; in the place of `file`."""


def select(folder: CurationFolder, settings: SelectConfig, seed: int) -> list[Record]:
    """Write `1_images.jsonl`: id, image (a path from the folder), sha256, width, height, phash, contrast, source and,
    if the source has one, caption.

    An image that cannot be read is dropped. ConfigError for a source without images, SampleError for a bad entry.
    """
    if settings.images is None:
        raise ConfigError("curation.select.images: is missing; name a folder, a list or tar shards, or give --images")
    from minigpt4.inference.image_list import drawn  # loads torch

    found = drawn(find(settings.images, settings.image_folder), settings.limit, seed)
    records, base = [], folder.path.resolve()
    for one in _with_files(folder, found):
        own = one.file.resolve()
        image = own.relative_to(base) if own.is_relative_to(base) else own
        caption = {} if one.caption is None else {"caption": one.caption}
        records.append({"id": one.key, "image": str(image), **describe(own), "source": one.source, **caption})
    made_from = {"images": settings.images, "limit": settings.limit, "seed": seed if settings.limit else None}
    folder.write("select", records, made_from | {"list": digest_of([[one.key, one.source] for one in found])})
    return records


def describe(file: Path) -> Record:
    """sha256, width, height, phash (64 bits, hexadecimal) and contrast of an image file; or why it is dropped."""
    from minigpt4.processors import open_image

    try:
        content = file.read_bytes()
        image = open_image(file)
    except (OSError, SampleError) as error:
        return {"dropped": dropped("select", "unreadable image", str(error))}
    grey = np.asarray(image.convert("L").resize((64, 64)), dtype=np.float32)
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "width": image.width,
        "height": image.height,
        "phash": str(imagehash.phash(image)),
        "contrast": round(float(grey.std()), 2),
    }


def find(images: str, image_folder: str | None) -> list[SourceImage]:
    """The images of a source, ids unique and fit for file names."""
    paths = [Path(path) for path in expand_braces(images)]
    if paths[0].suffix == ".tar":
        found = [one for path in paths for one in _in_tar(path)]
    else:
        found = _in_files(Path(images), image_folder and Path(image_folder))
    if not found:
        raise ConfigError(f"curation.select.images: {images} has no images")
    keys = [NO_NAME.sub("_", one.key) for one in found]
    times = Counter(keys)
    pairs = zip(keys, found, strict=True)  # names of several shards or folders may be the same
    return [replace(one, key=f"{key}_{digest_of(one.source)[:8]}" if times[key] > 1 else key) for key, one in pairs]


def _in_files(source: Path, folder: Path | None) -> list[SourceImage]:
    from minigpt4.inference.image_list import images_to_caption

    _, items = images_to_caption([source], folder)
    captions: dict[str, str] = {}
    if source.suffix.lower() == ".json":
        entries = [one for one in parse_json(source.read_bytes()) if isinstance(one, dict)]
        named = [(one.get("image") or f"{one.get('image_id')}.jpg", one.get("caption")) for one in entries]
        captions = {name: text for name, text in named if isinstance(text, str)}
    return [SourceImage(item.image_id, str(item.file), item.file, captions.get(item.name)) for item in items]


def _in_tar(path: Path) -> Iterator[SourceImage]:
    from minigpt4.processors.blip_processors import SUFFIXES

    with errors_as(ConfigError, f"curation.select.images: {path} cannot be read"), tarfile.open(path, "r:") as file:
        parts: dict[str, dict[str, tarfile.TarInfo]] = {}
        for member in file:
            if member.isfile():
                place, _, name = member.name.removeprefix("./").rpartition("/")
                key, _, ending = name.partition(".")
                parts.setdefault(f"{place}/{key}".removeprefix("/"), {})[ending.lower()] = member
        for key, own in parts.items():
            image = next((member for ending, member in own.items() if f".{ending}" in SUFFIXES), None)
            if image is None:
                continue
            caption = file.extractfile(own["txt"]).read().decode(errors="replace").strip() if "txt" in own else None
            if caption is None and "json" in own:
                card: Any = parse_json(file.extractfile(own["json"]).read())
                caption = card.get("caption") if isinstance(card, dict) else None
            yield SourceImage(key, f"{path}:{image.name}", None, caption, (path, image.offset_data, image.size))


def _with_files(folder: CurationFolder, found: Sequence[SourceImage]) -> Iterator[SourceImage]:
    """Each with its file; those of tar shards are written into the folder."""
    for one in found:
        if one.stored is None:
            yield one
            continue
        (path, start, size), file = one.stored, folder.path / FOLDER / f"{one.key}{Path(one.source).suffix.lower()}"
        if not file.is_file():
            with errors_as(ConfigError, f"{file}: cannot be written from {path}"), path.open("rb") as shard:
                shard.seek(start)
                file.parent.mkdir(exist_ok=True)
                with replacing(file) as part:
                    part.write_bytes(shard.read(size))
        yield replace(one, file=file)
