"""Make the Flickr30k training file: the five captions of an image joined into one.

    python prepare_flickr30k.py                  # reads and writes below flickr30k/
    python prepare_flickr30k.py --root /data/flickr30k
    python prepare_flickr30k.py --splits all     # as in the published run: training sees val and test, too

Reads `flickr_annotations_30k.csv`, or with `--splits all` Kaggle's `results.csv`, which tells no splits, and looks for
its images in `flickr30k-images/`. Writes `flickr30k_grounded_detail.json` for training,
`[{"image_id": "1000092795", "grounded_caption": "..."}]`, and the splits kept from it,
`flickr30k_grounded_detail_val.json` and `flickr30k_grounded_detail_test.json`, whose entries also hold the five
captions as a list, `captions`. An image whose file is missing is left out and counted.
"""

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from minigpt4.common.errors import SampleError
from minigpt4.common.utils import as_json, exit_status, require_readable, write_whole
from minigpt4.datasets.datasets.image_caption_json import CAPTIONS, JOINED, Records, caption_list

ANNOTATIONS = "flickr_annotations_30k.csv"
RESULTS = "results.csv"
IMAGES = "flickr30k-images"
OUTPUT = "flickr30k_grounded_detail"
COLUMNS = ("raw", "split", "filename")
SPLITS = ("train", "val", "test")

log = logging.getLogger("prepare_flickr30k")


class Row(NamedTuple):
    """One image of the CSV; `where` is file and line."""

    where: str
    split: str
    filename: str
    captions: list[str]


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error to read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("flickr30k"), help="folder of CSV and images (flickr30k)")
    splits = "what goes into the training file (train)"
    parser.add_argument("--splits", choices=("train", "all"), default="train", help=splits)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_status(lambda: prepare(args.root, everything=args.splits == "all"))


def prepare(root: Path, *, everything: bool) -> None:
    """Read, and write the three files; SampleError with line and column, ConfigError for a file that cannot be read."""
    annotations, results = root / ANNOTATIONS, root / RESULTS
    has_splits = annotations.is_file()
    if not has_splits and not results.is_file():
        raise SampleError(f"{annotations}: there is no such file; name its folder with --root")
    if not has_splits and not everything:
        raise SampleError(f"{results}: tells no splits; put {ANNOTATIONS} beside it, or use --splits all")
    splits = join_captions(annotated_rows(annotations) if has_splits else kaggle_rows(results), root / IMAGES)
    train = [entry for split in SPLITS for entry in splits[split]] if everything else splits["train"]
    fields = ("image_id", JOINED)
    files = {f"{OUTPUT}.json": [{key: entry[key] for key in fields} for entry in train]}
    if has_splits:
        files |= {f"{OUTPUT}_{split}.json": splits[split] for split in ("val", "test")}
    for name, entries in files.items():
        write_whole(root / name, as_json(entries), "--root")
        log.info("%s: %d images", root / name, len(entries))
    if everything:
        log.warning("The training file holds val and test, too: scores on them will not be those of unseen images.")


def join_captions(rows: Iterable[Row], images: Path) -> dict[str, list[dict[str, Any]]]:
    """The entries, by split, of every image that is there; SampleError: a folder is missing, or an image comes twice.

    An image is called as its file without the ending, as published; the column `img_id` only counts rows.
    """
    if not images.is_dir():
        raise SampleError(f"{images}: no such folder; unpack the images there, or name their parent with --root")
    there = {path.name for path in images.iterdir()}
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    seen: dict[str, str] = {}
    missing = []
    for row in tqdm(rows, desc="Flickr30k", unit=" images"):
        if (where := seen.setdefault(row.filename, row.where)) != row.where:
            raise wrong(row.where, "filename", f"{row.filename} stands in {where} already")
        if row.filename not in there:
            missing.append(row.filename)
            continue
        joined = " ".join(row.captions)
        entry = {"image_id": Path(row.filename).stem, JOINED: joined, CAPTIONS: row.captions}
        splits[row.split].append(entry)
    if not any(splits.values()):
        raise SampleError(f"{images}: holds none of the {len(missing)} images of the captions")
    if missing:
        log.warning("%d images are missing and were left out: %s", len(missing), ", ".join(missing[:5]))
    return splits


def annotated_rows(file: Path) -> Iterator[Row]:
    """The rows of the annotations with their splits."""
    records = Records(file)
    for index in range(len(records)):
        record, where = records[index], records.where(index)
        if missing := [column for column in COLUMNS if column not in record]:
            raise SampleError(f"{file}: no column {', '.join(missing)}; it has {', '.join(record)}")
        split, filename = record["split"].strip(), record["filename"].strip()
        if split not in SPLITS:
            raise wrong(where, "split", f"{split!r} is none of {', '.join(SPLITS)}")
        if not filename:
            raise wrong(where, "filename", "is empty")
        column = f"{where}, column raw"
        captions = [require_readable(caption, column) for caption in caption_list(record["raw"], column)]
        if not captions:
            raise wrong(where, "raw", "holds no caption")
        yield Row(where, split, filename, captions)


def kaggle_rows(file: Path) -> Iterator[Row]:
    """Kaggle's rows, a caption each, of an image together."""
    records = Records(file)
    images: dict[str, Row] = {}
    for index in range(len(records)):
        record, where = records[index], records.where(index)
        if not {"image", "caption"} <= record.keys():
            raise SampleError(f"{where}: no columns image_name and comment; it has {', '.join(record)}")
        filename, caption = record["image"].strip(), record["caption"].strip()
        if not filename or not caption:
            raise wrong(where, "comment" if filename else "image_name", "is empty")
        row = images.setdefault(filename, Row(where, "train", filename, []))
        row.captions.append(require_readable(caption, f"{where}: the comment"))
    yield from images.values()


def wrong(where: str, column: str, what: str) -> SampleError:
    return SampleError(f"{where}, column {column}: {what}")


if __name__ == "__main__":
    sys.exit(main())
