"""Paths in a configuration: placeholders, and files that are not there.

A schema marks a field with `metadata={"path": kind}`: `file`, `dir`, or `data` for what a dataset reads, a
file or folder, brace-expanded shards such as `shards/{000..099}.tar`, or a URL. URLs are not looked at.
`checkpoint` is a file or the word `auto`; `later` need not exist when a run starts.
"""

import dataclasses
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
    if kind == "later" or REMOTE.match(value):
        return []
    if kind == "checkpoint":
        return [] if value == AUTO or Path(value).is_file() else [value]
    if kind == "file":
        return [] if Path(value).is_file() else [value]
    if kind == "dir":
        return [] if Path(value).is_dir() else [value]
    paths = list(braceexpand(value))
    # The first and the last tell whether the range is right; few people hold every shard in between.
    return [path for path in dict.fromkeys((paths[0], paths[-1])) if not Path(path).exists()]
