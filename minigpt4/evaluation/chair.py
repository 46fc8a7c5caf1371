"""CHAIR: objects that captions name though the images do not show them.

Source: Rohrbach et al., Object Hallucination in Image Captioning, 2018. Recall and F1 are not part of it; people report
them beside it, for a caption that says nothing hallucinates nothing.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.text import decode, parse_json
from minigpt4.evaluation.bootstrap import ratio_interval, wilson

# Which objects a text names: words and double words, singular and plural, of a list of synonyms.
#
# The list is a text file with a line an object, `dog: puppy, hound` (or `dog, puppy, hound`), its name first. A line
# that
# begins with `-` holds words that name no object of the list (`- dog house`), `#` begins a comment.


COCO_OBJECTS = Path(__file__).with_name("coco_objects.txt")
MINI_OBJECTS = Path(__file__).with_name("mini_objects.txt")
IRREGULAR = {
    "calf": "calves",
    "child": "children",
    "foot": "feet",
    "goose": "geese",
    "half": "halves",
    "knife": "knives",
    "leaf": "leaves",
    "loaf": "loaves",
    "mouse": "mice",
    "ox": "oxen",
    "person": "people",
    "scarf": "scarves",
    "shelf": "shelves",
    "tooth": "teeth",
    "wife": "wives",
    "wolf": "wolves",
}
NO_OBJECT = ""
Words = tuple[str, ...]


class ObjectNames:
    """Objects and their synonyms.

    Args:
        synonyms: what else each object is called, by its name.
        others: words that name none of them.

    Raises:
        ConfigError: one word names two objects.
    """

    def __init__(self, synonyms: Mapping[str, Sequence[str]], others: Iterable[str] = ()) -> None:
        self.names = list(synonyms)
        self._of: dict[Words, str] = {}
        for name, more in synonyms.items():
            for phrase in (name, *more):
                self._add(phrase, name)
        for phrase in others:
            self._add(phrase, NO_OBJECT)
        self._longest = max(map(len, self._of), default=0)

    def _add(self, phrase: str, name: str) -> None:
        words = _words(phrase)
        if not words:
            raise ConfigError(f"synonyms: {phrase!r} of {name!r} has no words")
        if self._of.setdefault(words, name) != name:
            raise ConfigError(f"synonyms: {phrase!r} is in two lines, of {self._of[words]!r} and {name!r}")
        for last in plurals(words[-1]):
            self._of.setdefault((*words[:-1], last), name)

    def mentions(self, text: str) -> list[str]:
        """The object of every mention, in the order of the text; of words that overlap, the longest count."""
        words, found, start = _words(text), [], 0
        while start < len(words):
            length = next((n for n in range(self._longest, 0, -1) if words[start : start + n] in self._of), 0)
            name = self._of[words[start : start + length]] if length else NO_OBJECT
            if name:
                found.append(name)
            start += max(length, 1)
        return found

    def name_of(self, phrase: str) -> str | None:
        """The name of the object that a whole phrase names."""
        return self._of.get(_words(phrase)) or None


def plurals(word: str) -> set[str]:
    """What the plural of a word may be; for regular ones more than one where spelling has no rule."""
    if word in IRREGULAR:
        return {IRREGULAR[word], word + "s"}
    if word.endswith("man"):
        return {word[:-3] + "men"}
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return {word[:-1] + "ies"}
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return {word + "es"}
    return {word + "s", word + "es"} if word.endswith("o") else {word + "s"}


def read_synonyms(path: Path) -> ObjectNames:
    """The names of a file; ConfigError if it cannot be read, or says two things of one word."""
    with errors_as(ConfigError, f"{path}: cannot be read as a list of synonyms"):
        lines = decode(path.read_bytes()).splitlines()
    synonyms: dict[str, list[str]] = {}
    others: list[str] = []
    for number, line in enumerate(lines, start=1):
        line = line.partition("#")[0].strip()
        phrases = [phrase.strip() for phrase in re.split(r"[:,]", line.removeprefix("-")) if phrase.strip()]
        if line.startswith("-"):
            others += phrases
        elif phrases and phrases[0] in synonyms:
            raise ConfigError(f"{path}, line {number}: the object {phrases[0]!r} has a line already")
        elif phrases:
            synonyms[phrases[0]] = phrases[1:]
    if not synonyms:
        raise ConfigError(f"{path}: names no object; a line an object, `name, synonym, synonym`")
    try:
        return ObjectNames(synonyms, others)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _words(text: str) -> Words:
    """Words in small letters, without hyphens and possessive endings."""
    return tuple(re.findall(r"[^\W_]+", re.sub(r"['\u2019]s\b", "", text.lower())))


# What images really show, in the forms that people have.
#
#     objects       {"42": ["dog", "cup"], ...}, also as {"42": {"objects": [...], "file": "42.png"}}
#     COCO          instances_val2014.json: categories, images, annotations
#     mini world    scenes_test.json, which the quickstart draws
#
# Image ids are compared as text.


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


@dataclass(frozen=True)
class ImageObjects:
    """One caption beside its image."""

    mentions: list[str]
    """The object of every mention, in order."""

    shown: frozenset[str]
    """Objects of the image."""

    words: int

    @property
    def named(self) -> set[str]:
        return set(self.mentions)

    @property
    def wrong(self) -> list[str]:
        """Mentions of objects that are not there."""
        return [name for name in self.mentions if name not in self.shown]


def compare(captions: Mapping[str, str], truth: Truth) -> dict[str, ImageObjects]:
    """Every caption beside what its image shows; KeyError for an image that the truth does not know."""
    return {
        image_id: ImageObjects(truth.names.mentions(text), truth.objects[image_id], len(text.split()))
        for image_id, text in captions.items()
    }


def chair(images: Mapping[str, ImageObjects]) -> dict[str, Any]:
    """Scores, intervals and counts of all captions, shares from 0 to 1; None where there is nothing to divide by.

    `CHAIR-i`: of the mentions, those of objects that are not there. `CHAIR-s`: of the captions, those with such a
    mention. `CHAIR-i (once)` counts an object once a caption, however often it is mentioned. `recall`: of the
    objects that are there, those that are named. `F1`: harmonic mean of recall and 1 - `CHAIR-i (once)`.
    `words`: mean length of a caption. With `counts`, and 95% `intervals` over images.
    """
    rows = list(images.values())
    mentions, wrong = [len(row.mentions) for row in rows], [len(row.wrong) for row in rows]
    named, hits = [len(row.named) for row in rows], [len(row.named & row.shown) for row in rows]
    misses = [names - right for names, right in zip(named, hits, strict=True)]
    shown, bad = [len(row.shown) for row in rows], sum(map(bool, wrong))
    scores = {
        "CHAIR-i": _share(sum(wrong), sum(mentions)),
        "CHAIR-s": _share(bad, len(rows)),
        "CHAIR-i (once)": _share(sum(misses), sum(named)),
        "recall": _share(sum(hits), sum(shown)),
        "F1": _share(2 * sum(hits), sum(named) + sum(shown)),
        "words": _share(sum(row.words for row in rows), len(rows)),
    }
    intervals = {
        "CHAIR-i": ratio_interval(wrong, mentions),
        "CHAIR-s": wilson(bad, len(rows)) if rows else None,
        "CHAIR-i (once)": ratio_interval(misses, named),
        "recall": ratio_interval(hits, shown),
        "F1": ratio_interval([2 * n for n in hits], [n + m for n, m in zip(named, shown, strict=True)]),
        "words": ratio_interval([row.words for row in rows], [1] * len(rows)),
    }
    counts = {"captions": len(rows), "captions_wrong": bad, "mentions": sum(mentions), "mentions_wrong": sum(wrong)}
    counts |= {"objects_named": sum(named), "objects_right": sum(hits), "objects_shown": sum(shown)}
    return {"scores": scores, "intervals": {k: v for k, v in intervals.items() if v}, "counts": counts}


def listed(images: Mapping[str, ImageObjects], captions: Mapping[str, str]) -> list[dict[str, Any]]:
    """The captions with objects that are not there, for a person to look at."""
    return [
        {
            "image_id": image_id,
            "caption": captions[image_id],
            "wrong": sorted(set(row.wrong)),
            "shown": sorted(row.shown),
        }
        for image_id, row in images.items()
        if row.wrong
    ]


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
