"""Annotation files, JSON, JSON lines, CSV or TSV, as records that are parsed one at a time.

The records are kept as bytes in one block: millions of Python objects would be copied into every worker
process as soon as their reference counts change.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.datasets.foreign import coco_records, is_karpathy, karpathy_records

Entry = tuple[int, bytes]
"""Line or record number, and the record as JSON."""


class Records:
    """The records of an annotation file, by index; `len()` counts the bad ones too.

    JSON holds a list of objects, or an object with such a list under `annotations`, or is one of the forms of
    `foreign`; JSON lines hold an object a line; CSV and TSV begin with a line of names. ConfigError when the file as
    a whole cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._unit, read = _reader(file)
        numbers, texts = [], []
        try:
            for number, text in read(file):
                numbers.append(number)
                texts.append(text)
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error.strerror})") from error
        except (ValueError, csv.Error) as error:
            raise ConfigError(f"{file}: {error}") from error
        self._numbers = np.array(numbers, dtype=np.int64)
        self._ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        self._block = b"".join(texts)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A record; SampleError that names the line when it is no object."""
        start = int(self._ends[index - 1]) if index else 0
        try:
            record = json.loads(self._block[start : int(self._ends[index])])
        except ValueError as error:
            raise SampleError(f"{self.where(index)}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise SampleError(f"{self.where(index)}: not a record of named fields, as the others are")
        return record

    def where(self, index: int) -> str:
        """The place of a record, such as `birds.jsonl, line 12`; lines and records count from 1."""
        return f"{self.file}, {self._unit} {self._numbers[index]}"


def _reader(file: Path) -> tuple[str, Callable[[Path], Iterable[Entry]]]:
    readers = {
        ".json": ("record", _read_json),
        ".jsonl": ("line", _read_lines),
        ".csv": ("line", _read_csv),
        ".tsv": ("line", _read_csv),
    }
    if file.suffix.lower() not in readers:
        raise ConfigError(f"{file}: unknown kind of file; annotations are read from {', '.join(readers)}")
    return readers[file.suffix.lower()]


def _read_json(file: Path) -> Iterator[Entry]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    for number, record in enumerate(_json_records(content), start=1):
        yield number, json.dumps(record).encode()


def _json_records(content: Any) -> Iterable[Any]:
    if isinstance(content, list):
        return content
    if is_karpathy(content):
        return karpathy_records(content)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        return coco_records(content)
    raise ValueError(
        "expected a list of records, an object with such a list under 'annotations', or a Karpathy file with 'images'"
    )


def _read_lines(file: Path) -> Iterator[Entry]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line.strip()


def _read_csv(file: Path) -> Iterator[Entry]:
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
