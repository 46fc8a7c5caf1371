"""Finds the records of annotation files: JSON, JSON lines, CSV or TSV, and what COCO, Karpathy and Kaggle made of them.

A reader gives number and JSON text of each record; of a row that is bad, what is wrong with it as a JSON string.
"""

import codecs
import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from io import StringIO
from pathlib import PurePosixPath
from typing import Any

from minigpt4.common.utils import decode, parse_json, unique_fields, wrapped
from minigpt4.processors.blip_processors import SUFFIXES

SPLIT_FIELD = "split"
"""Field of a record of a Karpathy file with its split."""
REST = "restval"
"""Split of images of COCO's val2014 that nobody tests on; papers train on them, so they belong to `train` here."""

_BLANKS = re.compile(r"[ \t\n\r]*")
_IMAGE_FILE = rf"(?i:[^\s,;|]+({'|'.join(map(re.escape, SUFFIXES))}))"
_NAMES = (_IMAGE_FILE, r"(?i:https?://\S+)", r"[\w./-]*\d[\w./-]*")
"""What a column may name an image by: file, address, or id with a digit."""

csv.field_size_limit(sys.maxsize)  # a caption may be longer than the 128 KiB that Python takes by default

Numbered = Iterator[tuple[int, bytes]]


def _json(content: bytes, kind: str) -> Numbered:
    try:
        text, content = decode(content, json.detect_encoding(content)), b""  # it may be a gigabyte
        start = _BLANKS.match(text).end()
        if text.startswith("[", start):
            yield from enumerate(_texts_of_list(text, start), start=1)
            return
        records = parse_json(text)
    except json.JSONDecodeError as error:
        lines = "; JSON lines, an object a line, end in .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"not JSON: {error}{lines}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    for number, record in enumerate(_records_of_object(records), start=1):
        yield number, json.dumps(record).encode()


def _texts_of_list(text: str, start: int) -> Iterator[bytes]:
    """The records of the JSON list at `start` as they stand there: all parsed at once would take five times as much."""
    decoder = json.JSONDecoder(object_pairs_hook=unique_fields)
    place = _BLANKS.match(text, start + 1).end()
    goes_on = not text.startswith("]", place)
    while goes_on:
        _, end = decoder.raw_decode(text, place)
        yield text[place:end].encode()
        place = _BLANKS.match(text, end).end()
        if goes_on := text.startswith(",", place):
            place = _BLANKS.match(text, place + 1).end()
    if not text.startswith("]", place):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
    if (place := _BLANKS.match(text, place + 1).end()) < len(text):
        raise json.JSONDecodeError("Extra data", text, place)


def _json_lines(content: bytes, kind: str) -> Numbered:
    if content.lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
        raise ValueError("a list, and not an object a line; JSON lists end in .json")
    encoding = json.detect_encoding(content)
    if what := wrapped(content):
        raise ValueError(what)
    if encoding not in ("utf-8", "utf-8-sig"):
        content = decode(content, encoding).encode()
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        if line.strip():
            yield number, line


def _table(content: bytes, kind: str) -> Numbered:
    """The first row names the fields, and tells the delimiter where that of the file's ending is not in it.

    Blanks after a delimiter belong to it if they follow every delimiter of the first row. A row with too many fields or
    too few is bad, and so is one that takes in the row of another image, as after a stray quotation mark.
    """
    text = decode(content)
    if re.match(r"image_name\| *comment_number\| *comment\s", text):  # Kaggle's: the row of 2199200615.jpg lacks a bar
        text = re.sub(r"(?m)^([^|\n]+\| *\d+)(?= +[^|\n ][^|\n]*$)", r"\1|", text)
    head = text.lstrip("\r\n").partition("\n")[0]
    usual = "\t" if kind == ".tsv" else ","
    delimiter = usual if usual in head else max(";\t|,", key=head.count)
    if excel := re.fullmatch(r'"?sep=(.)"?\s*', head):  # Excel's own first line
        delimiter, text = excel[1], text.replace(head, "", 1)
        head = text.lstrip("\r\n").partition("\n")[0]
    quoted = delimiter in ",;" or _is_quoted(text, delimiter)
    rows = csv.reader(
        StringIO(text, newline=""),
        delimiter=delimiter,
        skipinitialspace=all(part.startswith(" ") for part in head.split(delimiter)[1:]),
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    names: list[str] = []
    end = 0
    try:
        for row in rows:
            line, end = end + 1, rows.line_num
            if not any(field.strip() for field in row):
                continue
            if not names:
                names = [name.strip() for name in row]
                _require_names(names, line)
            else:
                yield line, json.dumps(_fault(row, names, delimiter) or _row_record(row, names)).encode()
    except csv.Error as error:
        raise ValueError(f"line {end + 1}: {error}; is a quotation mark missing, or not doubled?") from error
    if not names:
        raise ValueError("the first line must name the fields")


def _fault(row: list[str], names: list[str], delimiter: str) -> str:
    """What is wrong with a row, "" if nothing is."""
    if len(row) != len(names):
        return f"it has {len(row)} fields, not {len(names)} as the first line names; is it quoted as it should be?"
    if any(field.strip() for name, field in zip(names[1:], row[1:], strict=True) if not name):
        return "a column without a name holds text; is a quotation mark missing?"
    if any(len(field.splitlines()) > 1 for field in row) and _has_row_inside(row, delimiter):
        return "a field takes in a line that looks like a row; is a quotation mark missing?"
    return ""


def _has_row_inside(row: list[str], delimiter: str) -> bool:
    """Whether a line of the row is one by itself: an image's name stands in it where the row has its own."""
    lines = [[part.strip() for part in line.split(delimiter)] for line in delimiter.join(row).splitlines()]
    ends = [(lines[1:], 0), (lines[:-1], -1)]
    for rest, column in ends:
        name = next((name for name in _NAMES if re.fullmatch(name, row[column].strip())), None)
        if name and any(len(parts) >= len(row) and re.fullmatch(name, parts[column]) for parts in rest):
            return True
    mark = re.escape(delimiter)
    inside = re.compile(rf"([\r\n]|{mark} *){_IMAGE_FILE}( *{mark}|[\r\n])")
    return any(inside.search(field) for field in row if len(field.splitlines()) > 1)


def _row_record(row: list[str], names: list[str]) -> dict[str, str]:
    record = {name: field for name, field in zip(names, row, strict=True) if name}
    if {"image_name", "comment"} <= record.keys():  # Kaggle's Flickr30k
        record |= {"image": record["image_name"], "caption": record["comment"]}
    return record


def _is_quoted(text: str, delimiter: str) -> bool:
    """Whether quotation marks between tabs or bars are those of a writer; most such files quote nothing.

    They are text if each line by itself is a row, and no field is quoted as only a writer does it: a name of the first
    row, or a field with its quotation marks doubled.
    """
    lines = [line.split(delimiter) for line in text.splitlines() if line]
    fields = [field.strip(" ") for row in lines for field in row]
    quoted = [field[1:-1] for field in fields if len(field) > 1 and field[0] == field[-1] == '"']
    doubled = any('""' in field and '"' not in field.replace('""', "") for field in quoted)
    return doubled or any(len(row) != len(lines[0]) or lines[0][0].startswith('"') for row in lines)


def _require_names(names: list[str], line: int) -> None:
    if "\0" in "".join(names):
        raise ValueError(f"line {line}: the names hold NUL, as of UTF-16 without its mark; save the file as UTF-8")
    twice = next((name for number, name in enumerate(names) if name and name in names[:number]), None)
    if twice is not None:
        raise ValueError(f"line {line}: two columns are called {twice!r}; give each a name of its own")


# Files of captions that other people made, as records like ours: an image a record, or a caption. The lists of LAVIS's
# files are like ours.
#
# Karpathy  {"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "cocoid": 391895,
#                        "split": "test", "sentences": [{"raw": "A man ..."}, ...]}], "dataset": "coco"}
# COCO      {"images": [{"id": 397133, "file_name": "000000397133.jpg"}],
#            "annotations": [{"image_id": 397133, "caption": "A man ..."}, ...]}
# Kaggle    image_name| comment_number| comment, the `results.csv` of Flickr30k


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


def _token(content: bytes, kind: str) -> Numbered:
    """Flickr's own file, without a first row: `1000092795.jpg#0`, a tab, a caption."""
    for number, line in enumerate(decode(content).splitlines(), start=1):
        name, tab, caption = line.partition("\t")
        image, mark, _ = name.partition("#")
        found = {"image": image, "caption": caption.strip()} if tab and mark else "it has no image#number, tab, caption"
        if line.strip():
            yield number, json.dumps(found).encode()


READERS = {".json": _json, ".jsonl": _json_lines, ".csv": _table, ".tsv": _table, ".token": _token}
"""By the ending of a file, in small letters; each takes its content and that ending."""
