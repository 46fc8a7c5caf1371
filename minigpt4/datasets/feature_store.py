"""Features of images by the hash of their file, kept in append-only files that any number of processes share.

Shapes: B images, M of them unknown, S pixels a side, Q image tokens, V channels before the projection.
"""

import hashlib
import logging
import os
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)


DIGEST_BYTES = 16
ENTRY = np.dtype([("digest", "V16"), ("crc", "<u4")])
SECONDS_BETWEEN_LOOKS = 10.0
ROW_BITS = 40
MERGE_SHARE = 0.05
"""Rows are sorted in when so many are new: looking through the new ones takes time, and so does sorting."""


def image_digest(content: bytes) -> bytes:
    """16 bytes that stand for the bytes of an image file."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True)
class RowShape:
    """What a row is."""

    tokens: int
    width: int
    dtype: str
    """`float16` or `float32`."""

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return self.tokens * self.width * np.dtype(self.dtype).itemsize

    def empty(self) -> np.ndarray:
        """A row of zeros."""
        return np.zeros((self.tokens, self.width), self.dtype)


class FeatureStore:
    """The rows of one folder, to read and to add to; pickles, and each process may go on with a copy.

    The folder holds pairs of files. `NAME.rows`: rows of Q x V numbers, one after the other, nothing else.
    `NAME.index`: for each row 20 bytes, the image's digest (16) and the CRC-32 of the row (4, little-endian). A writer
    has a pair of its own, writes rows first and their index after them; what a kill leaves behind is a row without
    index or a piece of either, and both are passed over.

    Whatever happens to the folder of a running process, deleted, truncated, full or no longer to be written to, costs
    a warning and images that are encoded again, never the run.

    Args:
        folder: made for the first row if it is not there.
        shape: of its rows.
    """

    def __init__(self, folder: Path, shape: RowShape) -> None:
        self.folder, self.shape = folder, shape
        self._parts: list[_Part] = []
        self._places = _Places()
        self._damaged: set[bytes] = set()
        self._looked = 0.0
        self._writer: _Writer | None = None
        self._told: set[str] = set()
        self._keeps = True
        self.look_again()

    def __len__(self) -> int:
        """Rows, those that were written twice counted twice."""
        return sum(len(part) for part in self._parts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_writer": None}

    def get(self, digest: bytes) -> np.ndarray | None:
        """The row (Q, V) of an image; None if there is none, or if its bytes are not what was written."""
        row = self._read(digest)
        if row is None and time.monotonic() - self._looked > SECONDS_BETWEEN_LOOKS:
            self.look_again()  # other processes add rows
            row = self._read(digest)
        return row

    def add(self, digest: bytes, row: np.ndarray) -> None:
        """Keep a row (Q, V), in a new folder if this one was deleted; without one that can be written it is dropped."""
        if row.shape != (self.shape.tokens, self.shape.width):
            raise ValueError(f"row: shape {row.shape} is not {(self.shape.tokens, self.shape.width)}")
        if not self._keeps:
            return
        try:
            if self._writer is not None and not self._writer.is_there():
                self._tell_once("deleted while it was in use; it is made anew, and its images are encoded again")
                self._writer.close()
                self._writer = None
            if self._writer is None:
                self._writer = _Writer(self.folder)
            self._writer.add(digest, np.ascontiguousarray(row, dtype=self.shape.dtype))
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        """Everything that was added can be read by all processes, this one included."""
        if self._writer is None:
            return
        try:
            self._writer.flush()
        except OSError as error:
            self._give_up(error)
        self.look_again()

    def look_again(self) -> None:
        """Take in rows that were added since the last look."""
        self._looked = time.monotonic()
        known = {part.index: number for number, part in enumerate(self._parts)}
        try:
            indices = sorted(self.folder.glob("*.index"))
        except OSError:
            indices = []
        for index in indices:
            if index not in known:
                known[index] = len(self._parts)
                self._parts.append(_Part(index))
            number = known[index]
            try:
                first, digests = self._parts[number].new_digests()
            except OSError:
                continue
            if len(digests):
                self._places.add(digests, number, first)
                self._damaged.difference_update(map(bytes, digests))

    def _give_up(self, error: OSError) -> None:
        """Go on without keeping anything more."""
        self._keeps = False
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._tell_once(f"cannot be written to ({error.strerror}); the run goes on and keeps no more rows")

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            log.warning("Feature cache %s: %s", self.folder, text)
        self._told.add(text)

    def _read(self, digest: bytes) -> np.ndarray | None:
        if digest in self._damaged:
            return None
        for number, row in self._places.of(digest):
            part = self._parts[number]
            if bytes(part.entries["digest"][row]) != digest:  # places know half of a digest only
                continue
            try:
                content = part.row(row, self.shape)
            except OSError as error:
                self._tell_once(
                    f"a file was deleted or cannot be read ({error.strerror}); its images are encoded again"
                )
                continue
            if content is not None and zlib.crc32(content) == part.entries["crc"][row]:
                return content
            log.warning("%s: row %d is damaged; its image is encoded again", part.rows, row)
        if next(self._places.of(digest), None) is not None:
            self._damaged.add(digest)
        return None


class _Places:
    """Part and row of each digest, 16 bytes a row: some caches hold millions."""

    def __init__(self) -> None:
        self._keys = np.empty(0, np.uint64)
        self._places = np.empty(0, np.int64)
        self._new: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_new = 0

    def add(self, digests: np.ndarray, part: int, first: int) -> None:
        """Rows `first`, first + 1, ... of a part."""
        rows = np.arange(first, first + len(digests), dtype=np.int64)
        self._new.append((_keys(digests), (part << ROW_BITS) | rows))
        self._num_new += len(digests)
        if self._num_new > MERGE_SHARE * len(self._keys):
            self._merge()

    def of(self, digest: bytes) -> Iterator[tuple[int, int]]:
        """(part, row) that may be those of a digest, the newest first."""
        key = _keys(np.frombuffer(digest, "V16"))[0]
        for keys, places in reversed(self._new):
            yield from map(_split, places[np.flatnonzero(keys == key)][::-1])
        first, last = np.searchsorted(self._keys, key, "left"), np.searchsorted(self._keys, key, "right")
        yield from map(_split, self._places[first:last][::-1])

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, *(keys for keys, _ in self._new)])
        places = np.concatenate([self._places, *(places for _, places in self._new)])
        order = np.argsort(keys, kind="stable")
        self._keys, self._places, self._new, self._num_new = keys[order], places[order], [], 0


def _keys(digests: np.ndarray) -> np.ndarray:
    """The first half of each digest."""
    return np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 2)[:, 0]


def _split(place: np.int64) -> tuple[int, int]:
    return int(place) >> ROW_BITS, int(place) & ((1 << ROW_BITS) - 1)


class _Part:
    """One pair of files."""

    def __init__(self, index: Path) -> None:
        self.index, self.rows = index, index.with_suffix(".rows")
        self.entries = np.empty(0, ENTRY)
        self._file: BinaryIO | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}

    def __len__(self) -> int:
        return len(self.entries)

    def new_digests(self) -> tuple[int, np.ndarray]:
        """Digests (N,) of entries that are new, and the row of the first of them."""
        known, total = len(self.entries), self.index.stat().st_size // ENTRY.itemsize
        if total > known:
            with self.index.open("rb") as file:
                file.seek(known * ENTRY.itemsize)
                content = file.read((total - known) * ENTRY.itemsize)
            whole = len(content) // ENTRY.itemsize * ENTRY.itemsize
            self.entries = np.concatenate([self.entries, np.frombuffer(content[:whole], ENTRY)])
        return known, self.entries["digest"][known:]

    def row(self, row: int, shape: RowShape) -> np.ndarray | None:
        """The row, or None where the file ends before it. Not mapped: a file that shrinks would kill the process."""
        if self._file is None:
            self._file = self.rows.open("rb", buffering=0)
        content = os.pread(self._file.fileno(), shape.nbytes, row * shape.nbytes)
        if len(content) < shape.nbytes:
            return None
        return np.frombuffer(content, shape.dtype).reshape(shape.tokens, shape.width)


class _Writer:
    """Adds to a pair of files that no one else writes; OSError where the disk refuses."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._rows = stem.with_suffix(".rows").open("xb")
        self._index = stem.with_suffix(".index").open("xb")
        self._entries = b""

    def is_there(self) -> bool:
        """False once someone has deleted the files, which can still be written then."""
        return all(Path(file.name).exists() for file in (self._rows, self._index))

    def add(self, digest: bytes, row: np.ndarray) -> None:
        content = row.tobytes()
        self._rows.write(content)
        self._entries += digest + zlib.crc32(content).to_bytes(4, "little")

    def flush(self) -> None:
        self._rows.flush()
        self._index.write(self._entries)
        self._index.flush()
        self._entries = b""

    def close(self) -> None:
        for file in (self._rows, self._index):
            with suppress(OSError):  # what a full disk did not take
                file.close()


@dataclass(frozen=True)
class CachedImage:
    """One image of a cache: its features, or the pixels to compute them from."""

    folder: str
    """Of the cache."""
    digest: bytes
    features_QV: Tensor
    """In the cache's type; anything where `pixels_3SS` is given."""
    pixels_3SS: Tensor | None = None
    """Float32; None: the features are known."""


@dataclass(frozen=True)
class CachedBatch:
    """A batch of images of a cache."""

    folder: str
    features: Tensor
    """(B, Q, V) in the cache's type; rows that are missing hold anything."""
    missing: list[int]
    digests: list[bytes]
    """Of the missing rows."""
    pixels: Tensor
    """Of the missing rows, (M, 3, S, S) float32."""

    @classmethod
    def of(cls, rows: Sequence[CachedImage]) -> "CachedBatch":
        """The batch of these images, which are of one cache."""
        missing = [number for number, row in enumerate(rows) if row.pixels_3SS is not None]
        pixels = [rows[number].pixels_3SS for number in missing]
        return cls(
            rows[0].folder,
            torch.stack([row.features_QV for row in rows]),
            missing,
            [rows[number].digest for number in missing],
            torch.stack(pixels) if pixels else torch.empty(0),
        )

    def __len__(self) -> int:
        return len(self.features)

    def with_rows(self, rows: Mapping[int, Tensor]) -> "CachedBatch":
        """The same with features (Q, V) of some that were missing, by their number among those."""
        features = self.features.clone()
        for number, row_QV in rows.items():
            features[self.missing[number]] = row_QV.to(features.device)
        left = [number for number in range(len(self.missing)) if number not in rows]
        return replace(
            self,
            features=features,
            missing=[self.missing[number] for number in left],
            digests=[self.digests[number] for number in left],
            pixels=self.pixels[left],
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> "CachedBatch":
        """The same on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "CachedBatch":
        """The same in page-locked memory."""
        return self._with(lambda tensor: tensor.pin_memory())

    def is_pinned(self) -> bool:
        """Whether it is in page-locked memory."""
        return self.features.is_pinned()

    def record_stream(self, stream: Any) -> None:
        """Tell the allocator that `stream` reads it."""
        self.features.record_stream(stream)
        self.pixels.record_stream(stream)

    def _with(self, change: Any) -> "CachedBatch":
        return replace(self, features=change(self.features), pixels=change(self.pixels))
