"""Paths in a configuration: placeholders, and files that are not there.

A schema marks a field with `metadata={"path": kind}`: `file`, `dir`, or `data` for what a dataset reads, a
file or folder, brace-expanded shards such as `shards/{000..099}.tar`, or a URL. URLs are not looked at.
`checkpoint` is a file or the word `auto`; `later` and `data later` need not exist when a run starts.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from braceexpand import braceexpand

from minigpt4.common.errors import ConfigError

PLACEHOLDER = re.compile(
    r"please set this value|^\?\?\?$|(^|/)path/to(/|$)|^todo\b|^<\s*(your|path|set|fill)\b", re.IGNORECASE
)
AUTO = "auto"
"""In place of a checkpoint: the newest one."""
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?", re.ASCII)
MOST_SHARDS = 1_000_000
MOST_CHARACTERS = 200_000_000
MOST_BRACES = 50
LETTERS = 58
"""Of the alphabet of `{a..e}`, at most."""
MAX_NAME, MAX_PATH = 255, 4095
"""Bytes; of Linux and most others."""
THERE = {"file": os.path.isfile, "checkpoint": os.path.isfile, "dir": os.path.isdir, "data": os.path.exists}
"""Unlike those of Path these are also False for names that no file can have."""
ANGLE_BRACKETS = re.compile(r"^<.*>$")
REMOTE = re.compile(r"^(pipe:|[a-z][a-z0-9+.-]*://)")


def is_placeholder(text: str, *, is_path: bool = False) -> bool:
    """True for `/path/to/x`, `please set this value ...`, `TODO`; for a path also for any `<...>`.

    Other texts may well be `<...>`: the end symbol `</s>` is.
    """
    return bool(PLACEHOLDER.search(text) or (is_path and ANGLE_BRACKETS.search(text)))


def expand_home(path: str | Path) -> str | Path:
    """`~/x` below the home directory, of the same type; everything else, URLs and braces too, as it is."""
    return type(path)(Path(path).expanduser()) if str(path).startswith("~") else path


def check_name(path: str, kind: str) -> None:
    """ValueError if the system can have no file of this name, or braces stand for too many."""
    if "\0" in path:
        raise ValueError("holds a NUL character")
    try:
        size = len(os.fsencode(path))
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which no file name can") from error
    if kind.startswith("data"):
        expand_braces(path)
    elif size > MAX_PATH or any(len(os.fsencode(name)) > MAX_NAME for name in path.split("/")):
        raise ValueError(f"is too long; names have at most {MAX_NAME} bytes, paths {MAX_PATH}")


def expand_braces(pattern: str) -> list[str]:
    """The paths or URLs of `a{00..99}.tar` and `{a,b}.tar`, as a shell expands them.

    ValueError for braces that do not go together, and for those that stand for too many or too long names, which is
    found out before any is made.
    """
    count, characters = _expanded(pattern)
    if count > MOST_SHARDS or characters > MOST_CHARACTERS:
        raise ValueError(f"stands for more than {MOST_SHARDS:,} names, or for too long ones")
    return list(braceexpand(pattern))


def _expanded(pattern: str) -> tuple[int, int]:
    """How many names a pattern stands for and how many characters they have: as many or more, never fewer."""
    groups: list[tuple[int, list[list[int]]]] = [(0, [[1, 0]])]  # where it starts; names and characters of each branch

    def close(end: int) -> None:
        start, branches = groups.pop()
        count, size = (sum(numbers) for numbers in zip(*branches, strict=True))
        numbers = RANGE.fullmatch(pattern, start, end)
        if numbers:
            first, last, step = (int(number) if number else 1 for number in numbers.groups())
            count = abs(last - first) // max(1, abs(step)) + 1
            size = count * (end - start)
        elif ".." in pattern[start:end] and len(branches) == 1:
            count, size = max(count, LETTERS), size + LETTERS
        before = groups[-1][1][-1]
        before[1] = before[1] * count + before[0] * (size + 2 * count)
        before[0] *= count

    skip = False
    for position, character in enumerate(pattern):
        if character == "{" and not skip:
            groups.append((position + 1, [[1, 0]]))
            if len(groups) > MOST_BRACES:
                raise ValueError(f"has braces within braces, more than {MOST_BRACES} deep")
        elif character == "}" and len(groups) > 1 and not skip:
            close(position)
        elif character == "," and len(groups) > 1 and not skip:
            groups[-1][1].append([1, 0])
        else:
            branch = groups[-1][1][-1]
            branch[1] += branch[0]
        skip = character == "\\" and not skip
    while len(groups) > 1:  # not closed: nothing but characters, the braces within apart
        for count, size in groups.pop()[1]:
            before = groups[-1][1][-1]
            before[1] = before[1] * count + before[0] * (size + count)
            before[0] *= count
    return groups[0][1][0][0], groups[0][1][0][1]


def missing_paths(sections: Mapping[str, object]) -> list[tuple[str, str]]:
    """Keys and paths that do not exist, relative paths seen from the working directory.

    With `run.evaluate` nobody looks for the files of the training splits, which have `{"training": True}` beside.

    Args:
        sections: bound schemas by section name, such as {"model": ..., "datasets.laion": ...}.
    """
    unread = "training" if getattr(sections.get("run"), "evaluate", False) else None
    marked = (entry for section, schema in sections.items() for entry in _marked(schema, section, unread))
    return [(key, path) for key, kind, value in marked for path in _missing(kind, value)]


def require_paths(sections: Mapping[str, object], source: str) -> None:
    """Raise one ConfigError that lists every key whose path does not exist."""
    missing = missing_paths(sections)
    if missing:
        listed = "\n".join(f"  - {key}: {path} does not exist" for key, path in missing)
        raise ConfigError(
            f"{source}: not found from {Path.cwd()}:\n{listed}\n"
            f"Set them in {source} or with --options {missing[0][0]}=..."
        )


def _marked(schema: object, section: str, unread: str | None) -> Iterator[tuple[str, str, str]]:
    """(key, kind, path) of every path field that is set and not `unread`, nested schemas included."""
    for field in dataclasses.fields(schema):
        value = getattr(schema, field.name)
        key = f"{section}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _marked(value, key, unread)
        elif "path" in field.metadata and unread not in field.metadata and value:
            yield key, field.metadata["path"], str(value)


def _missing(kind: str, value: str) -> list[str]:
    if kind.endswith("later") or REMOTE.match(value) or (kind == "checkpoint" and value == AUTO):
        return []
    paths = expand_braces(value) if kind == "data" else [value]
    # The first and the last tell whether the range is right; few people hold every shard in between.
    return [path for path in dict.fromkeys((paths[0], paths[-1])) if not THERE[kind](path)]
