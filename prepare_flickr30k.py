"""Make the Flickr30k training file: the five captions of an image joined into one.

    python prepare_flickr30k.py                  # reads and writes below flickr30k/
    python prepare_flickr30k.py --root /data/flickr30k
    python prepare_flickr30k.py --splits all     # as in the published run: training sees val and test, too

Reads `flickr_annotations_30k.csv` and looks for its images in `flickr30k-images/`. Writes
`flickr30k_grounded_detail.json` for training, `[{"image_id": "1000092795", "grounded_caption": "..."}]`, and the splits
kept from it, `flickr30k_grounded_detail_val.json` and `flickr30k_grounded_detail_test.json`, whose entries also hold
the five captions as a list, `captions`. An image whose file is missing is left out and counted.
"""

import argparse
import csv
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minigpt4.common.errors import SampleError
from minigpt4.common.output_files import as_json, replacing

ANNOTATIONS = "flickr_annotations_30k.csv"
IMAGES = "flickr30k-images"
OUTPUT = "flickr30k_grounded_detail"
COLUMNS = ("raw", "split", "filename")
SPLITS = ("train", "val", "test")
TRAINING_FIELDS = ("image_id", "grounded_caption")

log = logging.getLogger("prepare_flickr30k")


@dataclass(frozen=True)
class Row:
    """One image of the CSV."""

    line: int
    """Where its record ends in the CSV, 1-based."""

    split: str
    filename: str
    captions: list[str]

    @property
    def image_id(self) -> str:
        """The file's name without its ending, as the published file has it; the column `img_id` only counts rows."""
        return Path(self.filename).stem

    def annotation(self) -> dict[str, Any]:
        """The entry of an evaluation file; that of the training file is without `captions`."""
        joined = " ".join(self.captions)
        return {"image_id": self.image_id, "grounded_caption": joined, "captions": self.captions}


@dataclass
class Prepared:
    """What the CSV and the image folder gave."""

    annotations: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    """By split."""

    missing: list[str] = field(default_factory=list)
    """Names of image files that are not there."""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        prepared = prepare(args.root / ANNOTATIONS, args.root / IMAGES)
        write_all(prepared, args.root, everything=args.splits == "all")
    except SampleError as error:
        log.error("error: %s", error)
        return 2
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("flickr30k"), help="folder of CSV and images (flickr30k)")
    parser.add_argument(
        "--splits", choices=("train", "all"), default="train", help="what goes into the training file (train)"
    )
    return parser.parse_args(argv)


def prepare(annotations: Path, images: Path) -> Prepared:
    """Read the CSV and join the captions of every image that is there.

    Raises:
        SampleError: a file or folder is missing, or a record is wrong; the text names line and column.
    """
    if not images.is_dir():
        raise SampleError(f"{images}: no such folder; unpack the images there, or name their parent with --root")
    there = {path.name for path in images.iterdir()}
    prepared, seen = Prepared(), {}
    for row in tqdm(read_rows(annotations), desc="Flickr30k", unit=" images"):
        if (line := seen.setdefault(row.filename, row.line)) != row.line:
            raise _wrong(annotations, row.line, "filename", f"{row.filename} stands in line {line} already")
        if row.filename in there:
            prepared.annotations[row.split].append(row.annotation())
        else:
            prepared.missing.append(row.filename)
    if not any(prepared.annotations.values()):
        raise SampleError(f"{images}: holds none of the {len(prepared.missing)} images of {annotations}")
    return prepared


def read_rows(path: Path) -> Iterator[Row]:
    """The records of the CSV, in order; raises SampleError with line and column."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            _check_columns(path, reader.fieldnames or ())
            for record in reader:
                yield _row(path, reader.line_num, record)
    except OSError as error:
        raise SampleError(f"{path}: {error.strerror}; name its folder with --root") from error
    except UnicodeDecodeError as error:
        raise SampleError(f"{path}: is not UTF-8 text ({error}); download it again") from error
    except csv.Error as error:
        raise SampleError(f"{path}: the record after line {reader.line_num} is not CSV: {error}") from error


def _check_columns(path: Path, found: list[str]) -> None:
    missing = [column for column in COLUMNS if column not in found]
    if missing:
        names = ", ".join(missing)
        raise SampleError(f"{path}: line 1: no column {names}; it has {', '.join(found) or 'nothing at all'}")


def _row(path: Path, line: int, record: dict[str | None, str | None]) -> Row:
    lacking = [str(column) for column, value in record.items() if value is None]
    if lacking:
        raise _wrong(path, line, lacking[0], "is missing; the record has too few fields")
    if None in record:
        raise SampleError(f"{path}: line {line}: more fields than columns; is a quotation mark missing?")
    split, filename = record["split"].strip(), record["filename"].strip()
    if split not in SPLITS:
        raise _wrong(path, line, "split", f"{split!r} is none of {', '.join(SPLITS)}")
    if not filename:
        raise _wrong(path, line, "filename", "is empty")
    return Row(line, split, filename, _captions(path, line, record["raw"]))


def _captions(path: Path, line: int, raw: str) -> list[str]:
    try:
        captions = json.loads(raw)
    except ValueError as error:
        raise _wrong(path, line, "raw", f"not JSON ({error}): {raw[:80]}") from error
    if not isinstance(captions, list) or not captions:
        raise _wrong(path, line, "raw", f"must be a JSON list of captions, is {raw[:80]}")
    for number, caption in enumerate(captions, 1):
        if not isinstance(caption, str):
            raise _wrong(path, line, "raw", f"caption {number} is {json.dumps(caption)}, not text")
    written = [caption for caption in captions if caption.strip()]
    if not written:
        raise _wrong(path, line, "raw", "every caption is blank")
    return written


def _wrong(path: Path, line: int, column: str, what: str) -> SampleError:
    return SampleError(f"{path}: line {line}, column {column}: {what}")


def write_all(prepared: Prepared, root: Path, *, everything: bool) -> None:
    """Write the three files and say what is in them."""
    splits = prepared.annotations
    train = [entry for split in SPLITS for entry in splits[split]] if everything else splits["train"]
    _write(root / f"{OUTPUT}.json", [{key: entry[key] for key in TRAINING_FIELDS} for entry in train])
    for split in ("val", "test"):
        _write(root / f"{OUTPUT}_{split}.json", splits[split])
    if everything:
        log.warning("The training file holds val and test, too: scores on them will not be those of unseen images.")
    if prepared.missing:
        more = ", ..." if len(prepared.missing) > 5 else ""
        examples = ", ".join(prepared.missing[:5]) + more
        log.warning("%d images are missing and were left out: %s", len(prepared.missing), examples)


def _write(path: Path, annotations: list[dict[str, Any]]) -> None:
    try:
        with replacing(path) as part:
            part.write_text(as_json(annotations), encoding="utf-8")
    except OSError as error:
        raise SampleError(f"{path}: cannot be written: {error.strerror}") from error
    log.info("%s: %d images", path, len(annotations))


if __name__ == "__main__":
    sys.exit(main())
