"""The images of a caption evaluation, each once, with their references, in batches that depend on the data alone."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minigpt4.common.errors import ConfigError, SampleError, require_same_ids
from minigpt4.common.utils import escaped, require_whole_characters
from minigpt4.datasets import ImageCaptionJson
from minigpt4.datasets.datasets.image_caption_json import CAPTIONS, JOINED, Records, single_captions
from minigpt4.datasets.datasets.records import SPLIT_FIELD
from minigpt4.inference.image_list import ImageFile, ImageList, cut

TEXT_FIELDS = (JOINED, "caption")
FLICKR_COLUMNS = {"raw", SPLIT_FIELD, "filename"}

ReferenceMode = Literal["joined", "separate"]
"""`joined`: the one string that training used; `separate`: each caption of the image is a reference."""


@dataclass(frozen=True)
class CaptionItem(ImageFile):
    """One image with its captions."""

    answer: str = ""
    """The text that training uses."""
    captions: list[str] | None = None
    """The single captions, if the annotations have them."""
    unit: int = 0
    """Which record of the dataset it is, the first where there are several."""


class CaptionData(ImageList):
    """All images of one split, in the order of its file; several records of an image are its single captions.

    SampleError where a record is bad, an image file is missing, or an image id comes twice, with lists of captions or
    with other files: an evaluation on some of the images would be one on other images.
    """

    def __init__(self, dataset: ImageCaptionJson) -> None:
        units: dict[str, list[int]] = {}
        for unit in range(dataset.size):
            units.setdefault(dataset.look(unit)[1]["image_id"], []).append(unit)
        super().__init__([_item(dataset, own) for own in units.values()], dataset.reader)
        self.dataset = dataset

    def batches(self, batch_size: int) -> list[list[int]]:
        """Numbers of images, cut into batches: those with long references first, with others like them.

        A batch runs until its longest caption ends, so images with much to tell should share batches. Whatever
        the number of processes, the batches are the same, and so are the captions to the last bit.
        """
        return cut(sorted(range(len(self)), key=lambda number: -len(self.items[number].answer.split())), batch_size)

    def references(self, mode: ReferenceMode) -> dict[str, list[str]]:
        """References by image id; ConfigError if the annotations have no single captions."""
        if mode == "joined":
            return {item.image_id: [item.answer] for item in self.items}
        bare = next((item for item in self.items if not item.captions), None)
        if bare is not None:
            raise ConfigError(
                f"{_where(self.dataset, bare.unit)}: --reference-mode separate needs the field {CAPTIONS!r}, a list of "
                "texts; prepare_flickr30k.py writes it (run it again), or use --reference-mode joined"
            )
        return {item.image_id: list(item.captions) for item in self.items}


def _item(dataset: ImageCaptionJson, units: Sequence[int]) -> CaptionItem:
    """One image of its records."""
    looks, field = [dataset.look(unit) for unit in units], dataset.info.caption_field
    file, where = dataset.image_file(units[0]), _where(dataset, units[-1])
    if any("answer" not in look for _, look in looks):
        raise SampleError(f"{where}: is a conversation; an evaluation of captions needs captions")
    image_id, captions = looks[0][1]["image_id"], [look["answer"] for _, look in looks]
    text, lists = " ".join(captions), [single_captions(record, field, where) for record, _ in looks]
    if len(units) > 1 and (field == JOINED or any(lists)):
        raise SampleError(f"{where}: the image id {image_id!r} comes twice")
    other = next((other for unit in units if (other := dataset.image_file(unit)) != file), None)
    if other:
        raise SampleError(f"{where}: {other} and {file} have the same id {image_id!r}; give each a field image_id")
    if len(units) == 1 and (field == JOINED or lists[0] is not None):
        captions = lists[0]
    return CaptionItem(image_id, file, "", text, captions or None, units[0])


def _where(dataset: ImageCaptionJson, number: int) -> str:
    return dataset.records.where(int(dataset.selection[number]))


# Files of references and of results


def read_references(
    path: Path, mode: ReferenceMode, split: str = "test", known: Collection[str] = ()
) -> dict[str, list[str]]:
    """References by image id, from JSON, JSON lines, CSV or TSV in the forms that people have:

        COCO         {"annotations": [{"image_id": 42, "caption": "..."}, ...]}, also captions_val2014.json and the like
        Karpathy     {"images": [{"cocoid": 42, "split": "test", "sentences": [{"raw": "..."}, ...]}]}
        ours         [{"image_id": "1000092795", "grounded_caption": "...", "captions": ["...", ...]}]
        LAVIS        [{"image": "val2014/a.jpg", "caption": ["...", "..."]}]
        Flickr30k    flickr_annotations_30k.csv with the columns raw, split, filename; Kaggle's results.csv

    Image ids are compared as text; a record without one has the name of its `image`, without folder and ending, and so
    have all, where none of their ids is among those `known`: COCO numbers images, whose files have names.
    `split` is of a file whose records say theirs; other files are read as a whole. SampleError for a bad record, and
    for one without single captions in the mode `separate`.
    """
    single: dict[str, list[str]] = {}
    texts: dict[str, list[str]] = {}  # of records without a list: single captions, or one that was joined
    joined: set[str] = set()
    records = _records(path)
    by_name = bool(known) and not any(str(record.get("image_id")) in known for record, _ in records)
    for record, where in records:
        if SPLIT_FIELD in record and str(record[SPLIT_FIELD]).strip() != split:
            continue
        if record.keys() >= FLICKR_COLUMNS:
            record = {"image": str(record["filename"]).strip(), CAPTIONS: record["raw"]}
        image_id = _image_id(record, where, by_name)
        name = next((name for name in TEXT_FIELDS if record.get(name)), None)
        listed = single_captions(record, name or JOINED, where)
        single.setdefault(image_id, []).extend(listed or [])
        if name is not None and not isinstance(record[name], list):
            if not isinstance(record[name], str) or not record[name].strip():
                raise SampleError(f"{where}: the field {name!r} must be text with words; it is {record[name]!r:.80}")
            texts.setdefault(image_id, []).append(require_whole_characters(record[name], f"{where}: the caption"))
            joined |= {image_id} if name == JOINED else set()
        elif not listed:
            raise SampleError(f"{where}: no reference; it needs one of {CAPTIONS}, {', '.join(TEXT_FIELDS)}")
    if not single:
        raise SampleError(f"{path}: holds no references (of the split {split!r}, if its records have one)")
    if mode == "joined":
        return {image_id: [" ".join(texts.get(image_id) or own)] for image_id, own in single.items()}
    bare = next((image_id for image_id, own in single.items() if not own and image_id in joined), None)
    if bare is not None:
        raise SampleError(
            f"{path}: image {bare}: has one joined caption, but no list {CAPTIONS!r} for --reference-mode separate; "
            "prepare_flickr30k.py writes it"
        )
    return {image_id: own or texts[image_id] for image_id, own in single.items()}


def read_results(path: Path) -> dict[str, str]:
    """Captions by image id, from [{"image_id": 42, "caption": "..."}] (COCO's form) or a file of scripts/caption.py.

    SampleError for a bad record or an image that comes twice. A record with an `error` in place of the caption is left
    out: the image is one without a caption.
    """
    results: dict[str, str] = {}
    for record, where in _records(path):
        if "error" in record and "caption" not in record:
            continue
        image_id, caption = _image_id(record, where), record.get("caption")
        if not isinstance(caption, str):
            raise SampleError(f"{where}: the field 'caption' must be text; it is {caption!r:.80}")
        require_whole_characters(caption, f"{where}: the caption")
        if image_id in results:
            raise SampleError(f"{where}: the image {image_id} comes twice")
        results[image_id] = caption
    if not results:
        raise SampleError(f"{path}: holds no captions")
    return results


def match(
    results: Mapping[str, str], references: Mapping[str, Sequence[str]], *, partial: bool
) -> dict[str, Sequence[str]]:
    """The references of the images in `results`; SampleError for a missing one and, unless `partial`, an unused one."""
    names = ("images of the references have no caption:", "images have no reference:")
    way_out = "" if partial else "; with --partial images without a caption are left out"
    require_same_ids(references, results, partial=partial, way_out=way_out, names=names)
    return {image_id: references[image_id] for image_id in results}


def _records(path: Path) -> list[tuple[dict[str, Any], str]]:
    records = Records(path)
    return [(records[index], records.where(index)) for index in range(len(records))]


def _image_id(record: Mapping[str, Any], where: str, by_name: bool = False) -> str:
    image_id = record.get("image_id")
    if (image_id is None or by_name) and isinstance(record.get("image"), str):
        image_id = Path(record["image"]).stem
    if isinstance(image_id, bool) or not isinstance(image_id, str | int) or image_id == "":
        raise SampleError(f"{where}: the field 'image_id' must be text or a number; it is {image_id!r:.80}")
    return escaped(str(image_id))
