"""What images really show, in the forms that people have.

    objects       {"42": ["dog", "cup"], ...}, also as {"42": {"objects": [...], "file": "42.png"}}
    COCO          instances_val2014.json: categories, images, annotations
    mini world    scenes_test.json, which the quickstart draws

Image ids are compared as text.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.text import parse_json
from minigpt4.evaluation.hallucination.object_names import COCO_OBJECTS, MINI_OBJECTS, ObjectNames, read_synonyms

SHOWN = 3


@dataclass(frozen=True)
class Truth:
    """The objects of every image, under the names of `names`."""

    objects: Mapping[str, frozenset[str]]
    names: ObjectNames
    files: Mapping[str, str] = field(default_factory=dict)
    """Image files by image id, where the file of the truth knows them."""

    def with_captions(self, captions: Mapping[str, Sequence[str]]) -> "Truth":
        """The same, and the objects that people named in their captions of the image.

        Raises SampleError for an image without captions: it would be judged more strictly than the others.
        """
        missing = [image_id for image_id in self.objects if image_id not in captions]
        if missing:
            raise SampleError(f"{len(missing)} of {len(self.objects)} images have no captions: {_some(missing)}")
        said = {image_id: self.names.mentions("\n".join(captions[image_id])) for image_id in self.objects}
        return Truth({key: own | frozenset(said[key]) for key, own in self.objects.items()}, self.names, self.files)

    def only(self, image_ids: Iterable[str]) -> "Truth":
        """The truth of these images alone."""
        return Truth({key: self.objects[key] for key in image_ids}, self.names, self.files)


def read_truth(path: Path, synonyms: Path | None = None) -> Truth:
    """What the images show.

    Args:
        synonyms: names of the objects; without, those of the mini world for its scenes, else of COCO.

    Raises:
        ConfigError: a file cannot be read, or holds no truth, or names of objects that are not in the list.
        SampleError: an entry is bad.
    """
    content = _read(path)
    if "categories" in content and "annotations" in content:
        objects, files, default = *_coco(content, path), COCO_OBJECTS
    elif any(isinstance(entry, dict) and "groups" in entry for entry in content.values()):
        objects, files, default = _scenes(content, path), {}, MINI_OBJECTS
    else:
        objects, files, default = *_lists(content, path), COCO_OBJECTS
    if not objects:
        raise ConfigError(f"{path}: holds no image")
    names = read_synonyms(synonyms or default)
    return Truth(_named(objects, names, path), names, files)


def _read(path: Path) -> dict[str, Any]:
    with errors_as(ConfigError, f"{path}: cannot be read"):
        text = path.read_bytes()
    with errors_as(ConfigError, f"{path}: not JSON"):
        content = parse_json(text)
    if not isinstance(content, dict):
        raise ConfigError(f'{path}: expected {{"image id": ["object", ...]}}, or COCO\'s instances')
    return content


def _coco(content: Mapping[str, Any], path: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        images = content.get("images", [])
        objects: dict[str, list[str]] = {str(image["id"]): [] for image in images}
        files = {str(image["id"]): image["file_name"] for image in images if "file_name" in image}
        for annotation in content["annotations"]:
            objects.setdefault(str(annotation["image_id"]), []).append(names[annotation["category_id"]])
    except (KeyError, TypeError) as error:
        raise SampleError(f"{path}: an entry of COCO's instances lacks {error}; is it a file of captions?") from error
    return objects, files


def _scenes(content: Mapping[str, Any], path: Path) -> dict[str, list[str]]:
    try:
        return {key: [group["thing"] for group in scene["groups"]] for key, scene in content.items()}
    except (KeyError, TypeError) as error:
        raise SampleError(f"{path}: a scene lacks {error}; draw the mini world again") from error


def _lists(content: Mapping[str, Any], path: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    objects, files = {}, {}
    for image_id, entry in content.items():
        own = entry.get("objects") if isinstance(entry, dict) else entry
        if not isinstance(own, list) or not all(isinstance(name, str) for name in own):
            raise SampleError(f"{path}: image {image_id}: expected a list of names of objects, not {entry!r:.80}")
        objects[image_id] = own
        if isinstance(entry, dict) and isinstance(entry.get("file"), str):
            files[image_id] = entry["file"]
    return objects, files


def _named(objects: Mapping[str, list[str]], names: ObjectNames, path: Path) -> dict[str, frozenset[str]]:
    known: dict[str, str | None] = {name: names.name_of(name) for own in objects.values() for name in own}
    unknown = sorted(name for name, found in known.items() if found is None)
    if unknown:
        raise ConfigError(
            f"{path}: {len(unknown)} of its objects are not in the list of names: {_some(unknown)}; give --synonyms a "
            "file with a line an object: `name, synonym, synonym`"
        )
    return {key: frozenset(known[name] for name in own) for key, own in objects.items()}


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
