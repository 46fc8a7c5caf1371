"""Which objects a text names: words and double words, singular and plural, of a list of synonyms.

The list is a text file with a line an object, `dog: puppy, hound` (or `dog, puppy, hound`), its name first. A line that
begins with `-` holds words that name no object of the list (`- dog house`), `#` begins a comment.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from minigpt4.common.errors import ConfigError, errors_as
from minigpt4.common.text import decode

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
