"""Files of captions that other people made, as records like ours: an image a record, or a caption.

Karpathy  {"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "cocoid": 391895,
                       "split": "test", "sentences": [{"raw": "A man ..."}, ...]}], "dataset": "coco"}
COCO      {"images": [{"id": 397133, "file_name": "000000397133.jpg"}],
           "annotations": [{"image_id": 397133, "caption": "A man ..."}, ...]}
Kaggle    image_name| comment_number| comment, the `results.csv` of Flickr30k

LAVIS's lists need nothing of this: their records are like ours (captions.py).
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

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
