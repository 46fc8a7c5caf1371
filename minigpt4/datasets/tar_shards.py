"""Reading tar shards: the files of each sample together, and what is wrong with a shard as one error."""

import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO

from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext

from minigpt4.common.errors import SampleError, first_line
from minigpt4.processors.formats import SUFFIXES


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
        yield from _named_members(stream)
    finally:
        # A pipe complains about its command when it is closed early, or again after its read has failed.
        with suppress(OSError):
            stream.close()


def _named_members(stream: BinaryIO) -> Iterator[tuple[str, str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictHeader) as tar:
        for member in tar:
            tar.members = []  # tarfile would keep them all
            key, suffix = base_plus_ext(member.name)
            if member.isreg() and key is not None:
                yield key, suffix.lower(), tar.extractfile(member).read()


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
