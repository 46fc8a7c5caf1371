"""The format `image_caption_shards`: tar shards of image and caption, as img2dataset writes them."""

import functools
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys

from minigpt4.common.errors import MiniGPT4Error, SampleError, errors_as, first_line
from minigpt4.common.remote import is_remote, open_remote
from minigpt4.common.utils import decode, escaped, parse_json
from minigpt4.datasets.datasets.base_dataset import BaseDataset, ImageReader, LazySample, require_caption, shuffled
from minigpt4.processors import BaseProcessor
from minigpt4.processors.blip_processors import SUFFIXES

SHUFFLE_BUFFER = 1000
"""Samples, still encoded, among which the next one is drawn."""


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


def read_tar(url: str, faults: list[Exception], cache: str | None = None) -> Iterator[dict[str, Any]]:
    """webdataset's samples of a shard, {"__key__": str, suffix: bytes, ...}; of paths, addresses, commands (`pipe:`).

    Where it would end, be silent or raise, what is wrong goes to `faults`, and what can be read still comes. `cache`:
    folder for copies of shards at addresses, which give RunError when they do not answer.
    """
    return group_by_keys(_members(url, faults, cache), handler=lambda error: faults.append(error) is None)


def _members(url: str, faults: list[Exception], cache: str | None) -> Iterator[dict[str, Any]]:
    """`webdataset.tariterators.tar_file_expander` of one shard, with headers that must be whole."""
    try:
        stream = open_remote(url, cache) if is_remote(url) else gopen(url)
        try:
            with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictHeader) as tar:
                for member in tar:
                    tar.members = []  # tarfile would keep them all
                    if member.isreg():
                        yield {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": url}
        finally:
            # A pipe complains about its command when it is closed early, or again after its read has failed.
            with suppress(OSError):
                stream.close()
    except MiniGPT4Error:
        raise
    except Exception as error:  # whatever gopen, tarfile and the decompressors raise
        faults.append(error)


@dataclass(eq=False)
class ImageCaptionShards(BaseDataset):
    """Samples of a list of tars; a shard is a tar, or a part of one where readers outnumber tars.

    A sample is NAME.jpg (or .png, .webp, ...) beside NAME.json, whose field `caption_field` is the caption, or
    NAME.txt, which is read where the JSON has no caption.
    """

    urls: list[str]
    """The tars."""
    caption_field: str
    """Of the `.json` members."""
    reader: ImageReader
    text_processor: BaseProcessor
    """Caption -> answer."""
    cache: str | None = None
    """Folder for copies of tars at addresses."""

    def num_shards(self, readers: int) -> int:
        return len(self.urls) * self._parts(readers)

    def _parts(self, readers: int) -> int:
        return max(1, -(-readers // len(self.urls)))

    def open(self, shard: int, readers: int, random: np.random.Generator | None) -> Iterator[LazySample]:
        """Every n-th sample of a tar of n parts; its faults, if it has any, last and in the first part only."""
        parts = self._parts(readers)
        number, part = divmod(shard, parts)
        url, faults, seen = self.urls[number], [], 0

        def own() -> Iterator[dict[str, Any]]:
            nonlocal seen
            for seen, sample in enumerate(read_tar(url, faults, self.cache), start=1):
                if (seen - 1) % parts == part:
                    yield sample

        for sample in own() if random is None else shuffled(own(), random, SHUFFLE_BUFFER):
            yield LazySample(escaped(sample["__key__"]), url, functools.partial(self._load, sample, url))
        if not seen and not faults:
            faults.append(ValueError("it holds no samples"))
        for fault in faults if part == 0 else ():
            text = f"{url}: the shard is cut off, damaged or no tar: {first_line(fault)}, after {seen} samples"
            yield LazySample.failing(url, SampleError(f"{text}; fetch it again"))

    def quick_samples(self) -> Iterator[LazySample]:
        yield from self.open(0, 1, None)
        for url in self.urls[1:]:
            if "://" not in url and not url.startswith("pipe:") and not Path(url).is_file():
                yield LazySample.failing(url, SampleError(f"{url}: the shard does not exist"))

    def describe(self) -> str:
        return f"{len(self.urls):,} shards, number of samples unknown"

    def _load(self, sample: dict[str, Any], url: str) -> dict[str, Any]:
        key = escaped(sample["__key__"])
        where = f"{url}/{key}"
        suffix = next((suffix for suffix in sample if f".{suffix}" in SUFFIXES), None)
        if suffix is None:
            has = ", ".join(suffix for suffix in sample if not suffix.startswith("__"))
            raise SampleError(f"{where}: no image; the sample has {has}")
        answer = self.text_processor(self._caption(sample, where))
        if not answer.strip():
            raise SampleError(f"{where}: nothing is left of the caption once it is cleaned")
        image = self.reader.read(sample[suffix], f"{where}.{suffix}")
        return {"image": image, "image_id": key, "answer": answer}

    def _caption(self, sample: dict[str, Any], where: str) -> str:
        """The raw caption; SampleError when there is none, it is empty or the JSON is wrong."""
        caption = None
        if "json" in sample:
            with errors_as(SampleError, f"{where}.json"):
                fields = parse_json(sample["json"])
                if not isinstance(fields, dict):
                    raise ValueError(f"must be an object with the field {self.caption_field!r}")
                caption = fields.get(self.caption_field)
        if caption is None and "txt" in sample:
            with errors_as(SampleError, f"{where}.txt"):
                caption = decode(sample["txt"])
        if caption is None:
            raise SampleError(f"{where}: no caption; neither a .json with the field {self.caption_field!r} nor a .txt")
        return require_caption(caption, where)
