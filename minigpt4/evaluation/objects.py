"""Objects that texts name, by lists of synonyms, and objects that images show, from several forms of files."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.utils import decode, parse_json
from minigpt4.evaluation.caption_data import first_few

COCO_OBJECTS = Path(__file__).with_name("coco_objects.txt")
MINI_OBJECTS = Path(__file__).with_name("mini_objects.txt")
IRREGULAR_PAIRS = """calf:calves child:children foot:feet goose:geese half:halves knife:knives leaf:leaves loaf:loaves
    mouse:mice ox:oxen person:people scarf:scarves shelf:shelves tooth:teeth wife:wives wolf:wolves"""
IRREGULAR = dict(pair.split(":") for pair in IRREGULAR_PAIRS.split())
NO_OBJECT = ""
Words = tuple[str, ...]


# Objects that a text names


class ObjectNames:
    """Objects by name, with `synonyms`, and `others`: words that name none. ConfigError where a word names two."""

    def __init__(self, synonyms: Mapping[str, Sequence[str]], others: Iterable[str] = ()) -> None:
        self.names = list(synonyms)
        self._of: dict[Words, str] = {}
        named = [(phrase, name) for name, more in synonyms.items() for phrase in (name, *more)]
        for phrase, name in [*named, *((phrase, NO_OBJECT) for phrase in others)]:
            words = _words(phrase)
            if not words:
                raise ConfigError(f"synonyms: {phrase!r} of {name!r} has no words")
            if self._of.setdefault(words, name) != name:
                raise ConfigError(f"synonyms: {phrase!r} is in two lines, of {self._of[words]!r} and {name!r}")
            for last in plurals(words[-1]):
                self._of.setdefault((*words[:-1], last), name)
        self._longest = max(map(len, self._of), default=0)

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
    """The names of a text file with a line an object, `dog: puppy, hound` or `dog, puppy, hound`, its name first.

    A line that begins with `-` holds words that name no object (`- dog house`); `#` begins a comment. ConfigError if
    the file cannot be read, or says two things of one word.
    """
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


# Objects that images show


@dataclass(frozen=True)
class Truth:
    """The objects of every image, under the names of `names`."""

    objects: Mapping[str, frozenset[str]]
    names: ObjectNames
    files: Mapping[str, str] = field(default_factory=dict)
    """Image files by image id, where the file of the truth knows them."""

    def with_captions(self, captions: Mapping[str, Sequence[str]]) -> "Truth":
        """The same, and the objects that people named in their captions of the image.

        SampleError for an image without captions: it would be judged more strictly than the others.
        """
        missing = [image_id for image_id in self.objects if image_id not in captions]
        if missing:
            some = first_few(map(repr, missing))
            raise SampleError(f"{len(missing)} of {len(self.objects)} images have no captions: {some}")
        said = {image_id: self.names.mentions("\n".join(captions[image_id])) for image_id in self.objects}
        return Truth({key: own | frozenset(said[key]) for key, own in self.objects.items()}, self.names, self.files)

    def only(self, image_ids: Iterable[str]) -> "Truth":
        """The truth of these images alone."""
        return Truth({key: self.objects[key] for key in image_ids}, self.names, self.files)


def read_truth(path: Path, synonyms: Path | None = None) -> Truth:
    """What the images show, from a file in one of three forms; image ids are compared as text.

        objects       {"42": ["dog", "cup"], ...}, also as {"42": {"objects": [...], "file": "42.png"}}
        COCO          instances_val2014.json: categories, images, annotations
        mini world    scenes_test.json, which the quickstart draws

    `synonyms` are the names of the objects; without, those of the mini world for its scenes, else of COCO. ConfigError
    where a file cannot be read, or has no truth, or objects that are not in the list; SampleError for a bad entry.
    """
    with errors_as(ConfigError, f"{path}: cannot be read"):
        text = path.read_bytes()
    with errors_as(ConfigError, f"{path}: not JSON"):
        content = parse_json(text)
    if not isinstance(content, dict):
        raise ConfigError(f'{path}: expected {{"image id": ["object", ...]}}, or COCO\'s instances')
    files, default = {}, COCO_OBJECTS
    try:
        if "categories" in content and "annotations" in content:
            objects, files = _coco(content)
        elif any(isinstance(entry, dict) and "groups" in entry for entry in content.values()):
            objects = {key: [group["thing"] for group in scene["groups"]] for key, scene in content.items()}
            default = MINI_OBJECTS
        else:
            objects, files = _lists(content, path)
    except (KeyError, TypeError) as error:
        raise SampleError(f"{path}: an entry lacks {error}; is it a file of captions, or an old mini world?") from error
    if not objects:
        raise ConfigError(f"{path}: holds no image")
    names = read_synonyms(synonyms or default)
    return Truth(_named(objects, names, path), names, files)


def _coco(content: Mapping[str, Any]) -> tuple[dict[str, list[str]], dict[str, str]]:
    names = {category["id"]: category["name"] for category in content["categories"]}
    images = content.get("images", [])
    objects: dict[str, list[str]] = {str(image["id"]): [] for image in images}
    for annotation in content["annotations"]:
        objects.setdefault(str(annotation["image_id"]), []).append(names[annotation["category_id"]])
    return objects, {str(image["id"]): image["file_name"] for image in images if "file_name" in image}


def _lists(content: Mapping[str, Any], path: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    entries = {key: entry if isinstance(entry, dict) else {"objects": entry} for key, entry in content.items()}
    objects = {image_id: entry.get("objects") for image_id, entry in entries.items()}
    for image_id, own in objects.items():
        if not isinstance(own, list) or not all(isinstance(name, str) for name in own):
            raise SampleError(f"{path}: image {image_id}: expected a list of names of objects, not {own!r:.80}")
    files = {key: entry["file"] for key, entry in entries.items() if isinstance(entry.get("file"), str)}
    return objects, files


def _named(objects: Mapping[str, list[str]], names: ObjectNames, path: Path) -> dict[str, frozenset[str]]:
    known: dict[str, str | None] = {name: names.name_of(name) for own in objects.values() for name in own}
    unknown = sorted(name for name, found in known.items() if found is None)
    if unknown:
        raise ConfigError(
            f"{path}: {len(unknown)} of its objects are not in the list of names: {first_few(map(repr, unknown))}; "
            "give --synonyms a file with a line an object: `name, synonym, synonym`"
        )
    return {key: frozenset(known[name] for name in own) for key, own in objects.items()}
