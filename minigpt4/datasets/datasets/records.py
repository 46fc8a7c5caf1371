"""Finds the records of annotation files: JSON, JSON lines, CSV or TSV, and what COCO, Karpathy and Kaggle made of them.

A reader gives the text, None where it is the file's as it stands, and the place of each record in it: the number of
its line or record, and where its bytes begin and end.
"""

import codecs
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BytesIO
from itertools import chain
from json.decoder import WHITESPACE
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from minigpt4.common.errors import ConfigError
from minigpt4.common.utils import decode, parse_json
from minigpt4.datasets.datasets.delimited import read_rows

Found = tuple[bytes | bytearray | None, array]
Read = Callable[[Path], Found]

SPAN = 3
"""64-bit numbers of a place."""
UTF_8 = ("utf-8", "utf-8-sig")
SPLIT_FIELD = "split"
"""Field of a record of a Karpathy file with its split."""
REST = "restval"
"""Split of images of COCO's val2014 that nobody tests on; papers train on them, so they belong to `train` here."""


def annotation_reader(file: Path) -> tuple[str, Read]:
    """What the places of a file are called, and its reader; ConfigError for a kind of file that has none."""
    readers: dict[str, tuple[str, Read]] = {
        ".json": ("record", read_json),
        ".jsonl": ("line", read_json_lines),
        ".csv": ("line", read_table),
        ".tsv": ("line", read_table),
    }
    if file.suffix.lower() not in readers:
        raise ConfigError(f"{file}: unknown kind of file; annotations are read from {', '.join(readers)}")
    return readers[file.suffix.lower()]


def read_json(file: Path) -> Found:
    """A list of records stays in the file; of other forms the records are written anew. ValueError if it is neither."""
    content = file.read_bytes()
    encoding = json.detect_encoding(content)
    text, mark = decode(content, encoding), len(codecs.BOM_UTF8) * content.startswith(codecs.BOM_UTF8)
    del content
    start = WHITESPACE.match(text).end()
    try:
        if text.startswith("[", start):
            spans = array("q", chain.from_iterable(_as_bytes(text, _list_items(text, start), mark)))
            return None if encoding in UTF_8 else text.encode(), spans
        records = _records_of_object(parse_json(text))
    except json.JSONDecodeError as error:
        lines = "; JSON lines, an object a line, end in .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"not JSON: {error}{lines}") from error
    return _written(enumerate(records, start=1))


def read_json_lines(file: Path) -> Found:
    """An object a line; blank lines are passed over."""
    with file.open("rb") as lines:
        encoding = json.detect_encoding(lines.read(4))
        lines.seek(0)
        if encoding in UTF_8:
            return None, array("q", chain.from_iterable(_lines(lines)))
    content = decode(file.read_bytes(), encoding).encode()
    return content, array("q", chain.from_iterable(_lines(BytesIO(content))))


def read_table(file: Path) -> Found:
    """CSV or TSV; a row that is bad is text in place of a record, what is wrong with it."""
    rows = read_rows(kaggle_text(decode(file.read_bytes())), "\t" if file.suffix.lower() == ".tsv" else ",")
    return _written((line, kaggle_record(row)) for line, row in rows)


def _written(entries: Iterable[tuple[int, Any]]) -> Found:
    """Numbered records, or what is in their place, as text."""
    block, numbers = bytearray(), array("q")
    for number, record in entries:
        start = len(block)
        block += json.dumps(record).encode()
        numbers.extend((number, start, len(block)))
    return block, numbers


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


def _as_bytes(text: str, places: Iterable[tuple[int, int]], first: int) -> Iterator[tuple[int, int, int]]:
    """Numbered places in the text as UTF-8 that begins at byte `first`."""
    plain, character, byte = text.isascii(), 0, first
    for number, (start, end) in enumerate(places, start=1):
        if plain:
            yield number, first + start, first + end
            continue
        begin = byte + len(text[character:start].encode())
        character, byte = end, begin + len(text[start:end].encode())
        yield number, begin, byte


def _lines(lines: BinaryIO) -> Iterator[tuple[int, int, int]]:
    start = number = 0
    for line in lines:
        # A file of old Macs is one such line.
        for part in line.split(b"\r") if number == 0 and not line.endswith(b"\n") else (line,):
            number += 1
            if record := part.strip():
                begin = start + len(part) - len(part.lstrip())
                yield number, begin, begin + len(record)
            start += len(part) + (part is not line)


# Files of captions that other people made, as records like ours: an image a record, or a caption.
#
# Karpathy  {"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "cocoid": 391895,
#                        "split": "test", "sentences": [{"raw": "A man ..."}, ...]}], "dataset": "coco"}
# COCO      {"images": [{"id": 397133, "file_name": "000000397133.jpg"}],
#            "annotations": [{"image_id": 397133, "caption": "A man ..."}, ...]}
# Kaggle    image_name| comment_number| comment, the `results.csv` of Flickr30k
#
# The lists of LAVIS's files are like ours.


def _records_of_object(content: Any) -> Iterable[Any]:
    images = content.get("images") if isinstance(content, dict) else None
    if isinstance(images, list) and any(isinstance(image, dict) and "sentences" in image for image in images):
        return (_karpathy_record(image) if isinstance(image, dict) else image for image in images)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        return _coco_records(content)
    raise ValueError(
        "expected a list of records, an object with such a list under 'annotations', or a Karpathy file with 'images'"
    )


def _karpathy_record(image: Mapping[str, Any]) -> dict[str, Any]:
    """`image_id`, `image`, `imgid`, `split`, `captions` and all of them joined, `caption`.

    The id is that of COCO where there is one, else the file's name without its ending, as in our Flickr30k files.
    """
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


def tells_split(record: Mapping[str, Any]) -> bool:
    """Whether this is a record of a Karpathy file, which holds all splits."""
    return {"imgid", SPLIT_FIELD, "captions"} <= record.keys()


def _coco_records(content: Mapping[str, Any]) -> Iterator[Any]:
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
