"""Annotation files, JSON, JSON lines, CSV or TSV, as records that are parsed one at a time.

Of JSON lists and JSON lines only the places of the records are kept, 24 bytes each: the text stays in the file, whose
pages all processes of a machine share. Other files become bytes in one block. Millions of Python objects would be
copied into every worker process as soon as their reference counts change.
"""

import csv
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from json.decoder import WHITESPACE
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.datasets.foreign import coco_records, is_karpathy, karpathy_records

Entry = tuple[int, bytes]
"""Line or record number, and the record as JSON."""

Span = tuple[int, int, int]
"""Line or record number, and where its bytes begin and end."""

SPAN = 3
BYTE_ORDER_MARK = "\ufeff"


class Text(Protocol):
    """The bytes that spans are of."""

    def read(self, start: int, end: int) -> bytes:
        """A part; OSError when the file system refuses."""

    def has_changed(self) -> bool:
        """Whether it is another text than the one that the spans were found in."""


class Block:
    """Bytes in memory."""

    def __init__(self, content: bytes | bytearray) -> None:
        self._content = content

    def read(self, start: int, end: int) -> bytes:
        return bytes(self._content[start:end])

    def has_changed(self) -> bool:
        return False


class FileText:
    """Bytes that stay in their file. Reads at a place of their own, so processes may share what is open here."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._open = file.open("rb", buffering=0)
        self._stamp = self._now()

    def read(self, start: int, end: int) -> bytes:
        return os.pread(self._open.fileno(), end - start, start)

    def has_changed(self) -> bool:
        return self._now() != self._stamp

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._open.fileno())
        return status.st_size, status.st_mtime_ns

    def __getstate__(self) -> dict[str, Any]:
        return {"_file": self._file, "_stamp": self._stamp}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = self._file.open("rb", buffering=0)


class Records:
    """The records of an annotation file, by index; `len()` counts the bad ones too.

    JSON holds a list of objects, or an object with such a list under `annotations`, or is one of the forms of
    `foreign`; JSON lines hold an object a line; CSV and TSV begin with a line of names. ConfigError when the file as
    a whole cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._unit, read = _reader(file)
        try:
            self._text, spans = read(file)
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error.strerror})") from error
        except (ValueError, csv.Error) as error:
            raise ConfigError(f"{file}: {error}") from error
        self._spans = np.frombuffer(spans, dtype=np.int64).reshape(-1, SPAN)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A record; SampleError that names the line when it is no object."""
        _, start, end = self._spans[index].tolist()
        try:
            record = json.loads(self._text.read(start, end))
        except OSError as error:
            raise SampleError(f"{self.where(index)}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise SampleError(f"{self.where(index)}: not JSON ({error}){self._fault()}") from error
        if not isinstance(record, dict):
            raise SampleError(f"{self.where(index)}: not a record of named fields, as the others are{self._fault()}")
        return record

    def where(self, index: int) -> str:
        """The place of a record, such as `birds.jsonl, line 12`; lines and records count from 1."""
        return f"{self.file}, {self._unit} {self._spans[index, 0]}"

    def _fault(self) -> str:
        return ". The file was changed after it was opened; start again" if self._text.has_changed() else ""


Read = Callable[[Path], tuple[Text, array]]
"""The text of a file and the numbers of its spans, one after the other, 64-bit."""


def _reader(file: Path) -> tuple[str, Read]:
    readers: dict[str, tuple[str, Read]] = {
        ".json": ("record", _read_json),
        ".jsonl": ("line", _read_lines),
        ".csv": ("line", _read_csv),
        ".tsv": ("line", _read_csv),
    }
    if file.suffix.lower() not in readers:
        raise ConfigError(f"{file}: unknown kind of file; annotations are read from {', '.join(readers)}")
    return readers[file.suffix.lower()]


def _in_file(file: Path, spans: Iterable[Span]) -> tuple[Text, array]:
    text, numbers = FileText(file), array("q")  # opened first: a change while the spans are looked for is noticed
    for span in spans:
        numbers.extend(span)
    return text, numbers


def _in_memory(entries: Iterable[Entry]) -> tuple[Text, array]:
    block, numbers = bytearray(), array("q")
    for number, record in entries:
        numbers.extend((number, len(block), len(block) + len(record)))
        block += record
    return Block(block), numbers


def _read_json(file: Path) -> tuple[Text, array]:
    with file.open(encoding="utf-8", newline="") as lines:  # line ends as they are, for places to be right
        text = lines.read()
    start = WHITESPACE.match(text, len(BYTE_ORDER_MARK) * text.startswith(BYTE_ORDER_MARK)).end()
    try:
        if text.startswith("[", start):
            return _in_file(file, _as_bytes(text, _list_items(text, start)))
        content = json.loads(text[start:])
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    records = enumerate(_json_records(content), start=1)
    return _in_memory((number, json.dumps(record).encode()) for number, record in records)


def _list_items(text: str, start: int) -> Iterator[tuple[int, int]]:
    """Where the items of the JSON list that begins at `start` begin and end, in characters.

    Each is parsed and dropped: faults of the file are found, and there is never more than one in memory.
    """
    decode, at = json.JSONDecoder().raw_decode, WHITESPACE.match(text, start + 1).end()
    more = not text.startswith("]", at)
    while more:
        _, end = decode(text, at)
        yield at, end
        at = WHITESPACE.match(text, end).end()
        more = text.startswith(",", at)
        if more:
            at = WHITESPACE.match(text, at + 1).end()
        elif not text.startswith("]", at):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    rest = WHITESPACE.match(text, at + 1).end()
    if rest < len(text):
        raise json.JSONDecodeError("Extra data", text, rest)


def _as_bytes(text: str, places: Iterable[tuple[int, int]]) -> Iterator[Span]:
    """Numbered spans of the text as UTF-8."""
    plain, character, byte = text.isascii(), 0, 0
    for number, (start, end) in enumerate(places, start=1):
        if plain:
            yield number, start, end
            continue
        begin = byte + len(text[character:start].encode())
        character, byte = end, begin + len(text[start:end].encode())
        yield number, begin, byte


def _json_records(content: Any) -> Iterable[Any]:
    if is_karpathy(content):
        return karpathy_records(content)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        return coco_records(content)
    raise ValueError(
        "expected a list of records, an object with such a list under 'annotations', or a Karpathy file with 'images'"
    )


def _read_lines(file: Path) -> tuple[Text, array]:
    return _in_file(file, _lines(file))


def _lines(file: Path) -> Iterator[Span]:
    start = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if record := line.strip():
                begin = start + len(line) - len(line.lstrip())
                yield number, begin, begin + len(record)
            start += len(line)


def _read_csv(file: Path) -> tuple[Text, array]:
    return _in_memory(_rows(file))


def _rows(file: Path) -> Iterator[Entry]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    with file.open(encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter=delimiter)
        names = next(rows, None)
        if not names:
            raise ValueError("the first line must name the fields")
        number = rows.line_num + 1
        for row in rows:
            # A row of another length stays a list, which `Records` refuses by its line when it is asked for it.
            record = dict(zip(names, row, strict=True)) if len(row) == len(names) else row
            if row:
                yield number, json.dumps(record).encode()
            number = rows.line_num + 1
