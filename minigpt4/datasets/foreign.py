"""JSON files of captions that other people made, as records like ours: an image a record, or a caption.

Karpathy  {"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "cocoid": 391895,
                       "split": "test", "sentences": [{"raw": "A man ..."}, ...]}], "dataset": "coco"}
COCO      {"images": [{"id": 397133, "file_name": "000000397133.jpg"}],
           "annotations": [{"image_id": 397133, "caption": "A man ..."}, ...]}
"""

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
    texts = [s.get("raw") for s in sentences if isinstance(s, dict)] if isinstance(sentences, list) else []
    captions = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    return {
        "image_id": str(image.get("cocoid") or PurePosixPath(name).stem),
        "image": str(PurePosixPath(str(image.get("filepath") or ""), name)) if name else None,
        "imgid": image.get("imgid"),
        SPLIT_FIELD: "train" if split == REST else split,
        "captions": captions,
        "caption": " ".join(captions),
    }


def coco_records(content: Mapping[str, Any]) -> Iterator[Any]:
    """The annotations, each with the file of its image, where `images` names it."""
    images = content.get("images")
    named = [image for image in images if isinstance(image, dict)] if isinstance(images, list) else []
    files = {image["id"]: image["file_name"] for image in named if {"id", "file_name"} <= image.keys()}
    for record in content["annotations"]:
        file = files.get(record.get("image_id")) if isinstance(record, dict) else None
        yield record if file is None or "image" in record else {**record, "image": file}
