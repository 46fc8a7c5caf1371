"""The format `image_caption_shards`: tar shards of image and caption, as img2dataset writes them."""

import functools
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext

from minigpt4.common.errors import SampleError, first_line
from minigpt4.common.utils import decode, escaped, parse_json, require_readable
from minigpt4.datasets.datasets.base_dataset import BaseDataset, ImageReader, LazySample, failing, shuffled
from minigpt4.processors import BaseProcessor
from minigpt4.processors.images import SUFFIXES

SHUFFLE_BUFFER = 1000
"""Samples, still encoded, among which the next one is drawn."""


@dataclass(frozen=True)
class RawSample:
    """The files of a tar that share a name up to the first dot."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    """Content by suffix, in small letters, without the dot."""

    def image_suffix(self) -> str | None:
        """The first suffix of an image, None if there is no image."""
        return next((suffix for suffix in self.files if f".{suffix}" in SUFFIXES), None)

    def is_whole(self) -> bool:
        """True when there is an image and something that may hold its caption."""
        return self.image_suffix() is not None and ("json" in self.files or "txt" in self.files)


def read_tar(url: str) -> Iterator[RawSample]:
    """The samples of a shard, in its order; local paths and every URL that webdataset opens.

    SampleError at the end, after the samples that could be read, when the shard is missing, empty, cut off or
    no tar.
    """
    count, fault = 0, None
    held: RawSample | None = None
    try:
        for key, suffix, content in _members(url):
            if held is None or key != held.key or suffix in held.files:
                if held is not None:
                    count += 1
                    yield held
                held = RawSample(key)
            held.files[suffix] = content
    except Exception as error:  # whatever gopen, tarfile and the decompressors raise
        fault = error
        held = held if held is not None and held.is_whole() else None
    if held is not None:
        count += 1
        yield held
    if fault is not None and count:
        raise SampleError(
            f"{url}: the shard is cut off or damaged after {count} samples ({first_line(fault)}); fetch it again"
        )
    if fault is not None:
        raise SampleError(f"{url}: the shard cannot be read ({first_line(fault)}); look whether it exists and is a tar")
    if not count:
        raise SampleError(f"{url}: the shard holds no samples")


def _members(url: str) -> Iterator[tuple[str, str, bytes]]:
    """(key, suffix, content) of each file in the tar that has a suffix."""
    stream = gopen(url)
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictHeader) as tar:
            for member in tar:
                tar.members = []  # tarfile would keep them all
                key, suffix = base_plus_ext(member.name)
                if member.isreg() and key is not None:
                    yield key, suffix.lower(), tar.extractfile(member).read()
    finally:
        # A pipe complains about its command when it is closed early, or again after its read has failed.
        with suppress(OSError):
            stream.close()


class _StrictHeader(tarfile.TarInfo):
    """Anything but a header or the mark at the end is an error; tarfile takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tarfile_.offset}") from error


class ImageCaptionShards(BaseDataset):
    """Samples of a list of tars; a shard is a tar, or a part of one where readers outnumber tars.

    A sample is NAME.jpg (or .png, .webp, ...) beside NAME.json, whose field `caption_field` is the caption, or
    NAME.txt, which is read where the JSON has no caption.

    Args:
        urls: the tars.
        caption_field: field of the caption in the `.json` members.
        reader: reads an image file's bytes.
        text_processor: caption -> answer.
    """

    def __init__(
        self,
        name: str,
        split: str,
        urls: list[str],
        caption_field: str,
        reader: ImageReader,
        text_processor: BaseProcessor,
    ) -> None:
        super().__init__(name, split)
        self.urls = urls
        self.caption_field = caption_field
        self.reader = reader
        self.text_processor = text_processor

    @property
    def size(self) -> None:
        return None

    def num_shards(self, readers: int) -> int:
        return len(self.urls) * self._parts(readers)

    def _parts(self, readers: int) -> int:
        return max(1, -(-readers // len(self.urls)))

    def open(self, shard: int, readers: int, random: np.random.Generator | None) -> Iterator[LazySample]:
        """Every n-th sample of a tar of n parts; its fault, if it has one, last and in the first part only."""
        parts = self._parts(readers)
        number, part = divmod(shard, parts)
        url, faults = self.urls[number], []
        raws = (raw for index, raw in enumerate(_until_fault(url, faults)) if index % parts == part)
        for raw in raws if random is None else shuffled(raws, random, SHUFFLE_BUFFER):
            yield LazySample(escaped(raw.key), url, functools.partial(self._load, raw, url))
        if faults and part == 0:
            yield LazySample("", url, failing(faults[0]))

    def quick_samples(self) -> Iterator[LazySample]:
        yield from self.open(0, 1, None)
        for url in self.urls[1:]:
            if "://" not in url and not url.startswith("pipe:") and not Path(url).is_file():
                yield LazySample("", url, failing(SampleError(f"{url}: the shard does not exist")))

    def describe(self) -> str:
        return f"{len(self.urls):,} shards, number of samples unknown"

    def _load(self, raw: RawSample, url: str) -> dict[str, Any]:
        key = escaped(raw.key)
        where = f"{url}/{key}"
        suffix = raw.image_suffix()
        if suffix is None:
            raise SampleError(f"{where}: no image; the sample has {', '.join(raw.files)}")
        answer = self.text_processor(self._caption(raw, where))
        if not answer.strip():
            raise SampleError(f"{where}: nothing is left of the caption once it is cleaned")
        image = self.reader.read(raw.files[suffix], f"{where}.{suffix}", as_uint8=True)
        return {"image": image, "image_id": key, "answer": answer}

    def _caption(self, raw: RawSample, where: str) -> str:
        """The raw caption; SampleError when there is none, it is empty or the JSON is wrong."""
        caption = self._json_caption(raw.files["json"], where) if "json" in raw.files else None
        if caption is None and "txt" in raw.files:
            try:
                caption = decode(raw.files["txt"])
            except ValueError as error:
                raise SampleError(f"{where}.txt: {first_line(error)}") from error
        if caption is None:
            raise SampleError(f"{where}: no caption; neither a .json with the field {self.caption_field!r} nor a .txt")
        if not isinstance(caption, str):
            raise SampleError(f"{where}: the caption must be text, it is {caption!r:.80}")
        if not caption.strip():
            raise SampleError(f"{where}: the caption is empty")
        return require_readable(caption, f"{where}: the caption")

    def _json_caption(self, content: bytes, where: str) -> Any:
        try:
            record = parse_json(content)
        except ValueError as error:
            raise SampleError(f"{where}.json: not JSON: {first_line(error)}") from error
        if not isinstance(record, dict):
            raise SampleError(f"{where}.json: must be an object with the field {self.caption_field!r}")
        return record.get(self.caption_field)


def _until_fault(url: str, faults: list[SampleError]) -> Iterator[RawSample]:
    """The samples of a tar; its fault goes to `faults`."""
    try:
        yield from read_tar(url)
    except SampleError as error:
        faults.append(error)
