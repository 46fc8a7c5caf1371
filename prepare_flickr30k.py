"""Make the Flickr30k training file: the five captions of an image joined into one.

    python prepare_flickr30k.py                  # reads and writes below flickr30k/
    python prepare_flickr30k.py --root /data/flickr30k
    python prepare_flickr30k.py --splits all     # as in the published run: training sees val and test, too

Reads `flickr_annotations_30k.csv`, or with `--splits all` Kaggle's `results.csv`, which tells no splits, and looks for
its images in `flickr30k-images/`. Writes
`flickr30k_grounded_detail.json` for training, `[{"image_id": "1000092795", "grounded_caption": "..."}]`, and the splits
kept from it, `flickr30k_grounded_detail_val.json` and `flickr30k_grounded_detail_test.json`, whose entries also hold
the five captions as a list, `captions`. An image whose file is missing is left out and counted.
"""

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minigpt4.common.errors import SampleError
from minigpt4.common.utils import as_json, exit_status, parse_json, replacing, require_readable
from minigpt4.datasets.datasets.image_caption_json import Records

ANNOTATIONS = "flickr_annotations_30k.csv"
RESULTS = "results.csv"
IMAGES = "flickr30k-images"
OUTPUT = "flickr30k_grounded_detail"
COLUMNS = ("raw", "split", "filename")
SPLITS = ("train", "val", "test")
TRAINING_FIELDS = ("image_id", "grounded_caption")

log = logging.getLogger("prepare_flickr30k")


@dataclass(frozen=True)
class Row:
    """One image of the CSV."""

    where: str
    """File and line."""

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
    return exit_status(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Read, and write the files."""
    everything = args.splits == "all"
    prepared = prepare(read_rows(args.root, everything), args.root / IMAGES)
    write_all(prepared, args.root, everything=everything)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("flickr30k"), help="folder of CSV and images (flickr30k)")
    parser.add_argument(
        "--splits", choices=("train", "all"), default="train", help="what goes into the training file (train)"
    )
    return parser.parse_args(argv)


def prepare(rows: Iterable[Row], images: Path) -> Prepared:
    """Join the captions of every image that is there.

    Raises:
        SampleError: a folder is missing, or an image comes twice.
    """
    if not images.is_dir():
        raise SampleError(f"{images}: no such folder; unpack the images there, or name their parent with --root")
    there = {path.name for path in images.iterdir()}
    prepared, seen = Prepared(), {}
    for row in tqdm(rows, desc="Flickr30k", unit=" images"):
        if (where := seen.setdefault(row.filename, row.where)) != row.where:
            raise _wrong(row.where, "filename", f"{row.filename} stands in {where} already")
        if row.filename in there:
            prepared.annotations[row.split].append(row.annotation())
        else:
            prepared.missing.append(row.filename)
    if not any(prepared.annotations.values()):
        raise SampleError(f"{images}: holds none of the {len(prepared.missing)} images of the captions")
    return prepared


def read_rows(root: Path, everything: bool) -> Iterator[Row]:
    """The images of the CSV in `root`, in order; raises SampleError with line and column, ConfigError for a file that
    cannot be read."""
    annotations, results = root / ANNOTATIONS, root / RESULTS
    if annotations.is_file():
        yield from _annotated(Records(annotations))
    elif not results.is_file():
        raise SampleError(f"{annotations}: there is no such file; name its folder with --root")
    elif not everything:
        raise SampleError(f"{results}: tells no splits; put {ANNOTATIONS} beside it, or use --splits all")
    else:
        yield from _kaggle(Records(results))


def _annotated(records: Records) -> Iterator[Row]:
    for index in range(len(records)):
        record, where = records[index], records.where(index)
        missing = [column for column in COLUMNS if column not in record]
        if missing:
            raise SampleError(f"{records.file}: no column {', '.join(missing)}; it has {', '.join(record)}")
        split, filename = record["split"].strip(), record["filename"].strip()
        if split not in SPLITS:
            raise _wrong(where, "split", f"{split!r} is none of {', '.join(SPLITS)}")
        if not filename:
            raise _wrong(where, "filename", "is empty")
        yield Row(where, split, filename, _captions(where, record["raw"]))


def _captions(where: str, raw: str) -> list[str]:
    try:
        captions = parse_json(raw)
    except ValueError as error:
        raise _wrong(where, "raw", f"not JSON ({error}): {raw[:80]}") from error
    if not isinstance(captions, list) or not captions:
        raise _wrong(where, "raw", f"must be a JSON list of captions, is {raw[:80]}")
    for number, caption in enumerate(captions, 1):
        if not isinstance(caption, str):
            raise _wrong(where, "raw", f"caption {number} is {caption!r}, not text")
        require_readable(caption, f"{where}, column raw: caption {number}")
    written = [caption for caption in captions if caption.strip()]
    if not written:
        raise _wrong(where, "raw", "every caption is blank")
    return written


def _kaggle(records: Records) -> Iterator[Row]:
    """The rows, a caption each, of an image together."""
    images: dict[str, Row] = {}
    for index in range(len(records)):
        record, where = records[index], records.where(index)
        if not {"image", "caption"} <= record.keys():
            raise SampleError(f"{where}: no columns image_name and comment; it has {', '.join(record)}")
        filename, caption = record["image"].strip(), record["caption"].strip()
        if not filename or not caption:
            raise _wrong(where, "comment" if filename else "image_name", "is empty")
        row = images.setdefault(filename, Row(where, "train", filename, []))
        row.captions.append(require_readable(caption, f"{where}: the comment"))
    yield from images.values()


def _wrong(where: str, column: str, what: str) -> SampleError:
    return SampleError(f"{where}, column {column}: {what}")


def write_all(prepared: Prepared, root: Path, *, everything: bool) -> None:
    """Write the three files and say what is in them."""
    splits = prepared.annotations
    train = [entry for split in SPLITS for entry in splits[split]] if everything else splits["train"]
    _write(root / f"{OUTPUT}.json", [{key: entry[key] for key in TRAINING_FIELDS} for entry in train])
    if not everything or splits["val"] or splits["test"]:  # Kaggle's file knows none of them
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
