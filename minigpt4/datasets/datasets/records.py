"""Annotation files, JSON, JSON lines, CSV or TSV, as records that are parsed one at a time.

Of JSON lists and JSON lines only the places of the records are kept, 24 bytes each: the text stays in the file, whose
pages all processes of a machine share. Other files become bytes in one block. Millions of Python objects would be
copied into every worker process as soon as their reference counts change.
"""

import codecs
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BytesIO
from json.decoder import WHITESPACE
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

import numpy as np

from minigpt4.common.errors import ConfigError, SampleError, first_line
from minigpt4.common.text import decode, parse_json
from minigpt4.datasets.datasets.delimited import read_table

# Files of captions that other people made, as records like ours: an image a record, or a caption.
#
# Karpathy  {"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "cocoid": 391895,
#                        "split": "test", "sentences": [{"raw": "A man ..."}, ...]}], "dataset": "coco"}
# COCO      {"images": [{"id": 397133, "file_name": "000000397133.jpg"}],
#            "annotations": [{"image_id": 397133, "caption": "A man ..."}, ...]}
# Kaggle    image_name| comment_number| comment, the `results.csv` of Flickr30k
#
# LAVIS's lists need nothing of this: their records are like ours (captions.py).


SPLIT_FIELD = "split"
"""Field of a record of a Karpathy file with its split."""
REST = "restval"
"""Split of images of COCO's val2014 that nobody tests on; papers train on them, so they belong to `train` here."""


def is_karpathy(content: Any) -> bool:
    """Whether the content of a JSON file is one of Karpathy's split files."""
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and any(isinstance(image, dict) and "sentences" in image for image in images)


def tells_split(record: Mapping[str, Any]) -> bool:
    """Whether this is a record of `karpathy_records`, whose file holds all splits."""
    return {"imgid", SPLIT_FIELD, "captions"} <= record.keys()


def karpathy_records(content: Mapping[str, Any]) -> Iterator[Any]:
    """A record an image: `image_id`, `image`, `imgid`, `split`, `captions` and all of them joined, `caption`.

    The id is that of COCO where there is one, else the file's name without its ending, as in our Flickr30k files.
    """
    for image in content["images"]:
        yield _karpathy_record(image) if isinstance(image, dict) else image


def _karpathy_record(image: Mapping[str, Any]) -> dict[str, Any]:
    name, split = str(image.get("filename") or ""), image.get("split")
    sentences = image.get("sentences")
    texts = [s.get("raw") if isinstance(s, dict) else s for s in sentences] if isinstance(sentences, list) else []
    readable = all(isinstance(text, str) for text in texts)  # else the list is kept as it is, for the error
    captions = [text.strip() for text in texts if text.strip()] if readable else texts
    return {
        "image_id": str(image.get("cocoid") or PurePosixPath(name).stem),
        "image": str(PurePosixPath(str(image.get("filepath") or ""), name)) if name else None,
        "imgid": image.get("imgid"),
        SPLIT_FIELD: "train" if split == REST else split,
        "captions": captions,
        "caption": " ".join(captions) if readable else None,
    }


def coco_records(content: Mapping[str, Any]) -> Iterator[Any]:
    """The annotations, each with the file of its image, where `images` names it; ValueError if it names two."""
    images = content.get("images")
    files: dict[str | int, Any] = {}
    for image in images if isinstance(images, list) else []:
        if isinstance(image, dict) and isinstance(image.get("id"), str | int) and "file_name" in image:
            file = files.setdefault(image["id"], image["file_name"])
            if file != image["file_name"]:
                raise ValueError(f"two images have the id {image['id']!r}: {file!r} and {image['file_name']!r}")
    for record in content["annotations"]:
        image_id = record.get("image_id") if isinstance(record, dict) else None
        file = files.get(image_id) if isinstance(image_id, str | int) else None
        yield record if file is None or "image" in record else {**record, "image": file}


def kaggle_text(text: str) -> str:
    """Kaggle's Flickr30k with the bar that its row of 2199200615.jpg lacks; other texts as they are."""
    if not re.match(r"image_name\| *comment_number\| *comment\s", text):
        return text
    return re.sub(r"(?m)^([^|\n]+\| *\d+)(?= +[^|\n ][^|\n]*$)", r"\1|", text)


def kaggle_record(record: Any) -> Any:
    """A record of that file under our names, too."""
    if not isinstance(record, dict) or not {"image_name", "comment"} <= record.keys():
        return record
    return {**record, "image": record["image_name"], "caption": record["comment"]}


Span = tuple[int, int, int]
"""Line or record number, and where its bytes begin and end."""

SPAN = 3
UTF_8 = ("utf-8", "utf-8-sig")


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
    `foreign`; JSON lines hold an object a line; CSV and TSV are those of `delimited`. Texts are those of
    `common.text`. ConfigError when the file as a whole cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._unit, read = _reader(file)
        self.is_table = read is _read_table
        try:
            self._text, spans = read(file)
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error.strerror})") from error
        except Exception as error:  # whatever parsers raise
            raise ConfigError(f"{file}: {first_line(error)}") from error
        self._spans = np.frombuffer(spans, dtype=np.int64).reshape(-1, SPAN)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A record; SampleError that names the line when it is no object."""
        _, start, end = self._spans[index].tolist()
        try:
            record = parse_json(self._text.read(start, end))
        except OSError as error:
            raise SampleError(f"{self.where(index)}: cannot be read ({error.strerror})") from error
        except Exception as error:
            raise SampleError(f"{self.where(index)}: not JSON ({first_line(error)}){self._fault()}") from error
        if isinstance(record, dict):
            return record
        why = record if self.is_table else "as the others are"
        raise SampleError(f"{self.where(index)}: not a record of named fields: {why}{self._fault()}")

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
        ".csv": ("line", _read_table),
        ".tsv": ("line", _read_table),
    }
    if file.suffix.lower() not in readers:
        raise ConfigError(f"{file}: unknown kind of file; annotations are read from {', '.join(readers)}")
    return readers[file.suffix.lower()]


def _spans(text: Text, spans: Iterable[Span]) -> tuple[Text, array]:
    numbers = array("q")
    for span in spans:
        numbers.extend(span)
    return text, numbers


def _in_memory(entries: Iterable[tuple[int, Any]]) -> tuple[Text, array]:
    """Numbered records, or what is in their place."""
    block, numbers = bytearray(), array("q")
    for number, record in entries:
        start = len(block)
        block += json.dumps(record).encode()
        numbers.extend((number, start, len(block)))
    return Block(block), numbers


def _read_json(file: Path) -> tuple[Text, array]:
    source, content = FileText(file), file.read_bytes()  # opened first: a change while it is read is noticed
    encoding = json.detect_encoding(content)
    text, mark = decode(content, encoding), len(codecs.BOM_UTF8) * content.startswith(codecs.BOM_UTF8)
    del content
    if encoding not in UTF_8:
        source = Block(text.encode())
    start = WHITESPACE.match(text).end()
    try:
        if text.startswith("[", start):
            return _spans(source, _as_bytes(text, _list_items(text, start), mark))
        records = _json_records(parse_json(text))
    except json.JSONDecodeError as error:
        lines = "; JSON lines, an object a line, end in .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"not JSON: {error}{lines}") from error
    return _in_memory(enumerate(records, start=1))


def _list_items(text: str, start: int) -> Iterator[tuple[int, int]]:
    """Where the items of the JSON list that begins at `start` begin and end, in characters.

    Each is parsed and dropped: faults of the file are found, and there is never more than one in memory.
    """
    item = json.JSONDecoder(parse_int=str).raw_decode  # a number that Python refuses is a fault of its record
    at = WHITESPACE.match(text, start + 1).end()
    more = not text.startswith("]", at)
    while more:
        _, end = item(text, at)
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


def _as_bytes(text: str, places: Iterable[tuple[int, int]], first: int) -> Iterator[Span]:
    """Numbered spans of the text as UTF-8 that begins at byte `first`."""
    plain, character, byte = text.isascii(), 0, first
    for number, (start, end) in enumerate(places, start=1):
        if plain:
            yield number, first + start, first + end
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
    source = FileText(file)
    with file.open("rb") as lines:
        encoding = json.detect_encoding(lines.read(4))
        lines.seek(0)
        if encoding in UTF_8:
            return _spans(source, _lines(lines))
    content = decode(file.read_bytes(), encoding).encode()
    return _spans(Block(content), _lines(BytesIO(content)))


def _lines(lines: BinaryIO) -> Iterator[Span]:
    start = number = 0
    for line in lines:
        # A file of old Macs is one such line.
        for part in line.split(b"\r") if number == 0 and not line.endswith(b"\n") else (line,):
            number += 1
            if record := part.strip():
                begin = start + len(part) - len(part.lstrip())
                yield number, begin, begin + len(record)
            start += len(part) + (part is not line)


def _read_table(file: Path) -> tuple[Text, array]:
    text = kaggle_text(decode(file.read_bytes()))
    rows = read_table(text, "\t" if file.suffix.lower() == ".tsv" else ",")
    return _in_memory((line, kaggle_record(row)) for line, row in rows)
