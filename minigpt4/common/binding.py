"""From a YAML section to its dataclass, with every fault of the section in one ConfigError.

Types are checked here because OmegaConf's structured configs turn `True` into the text "True", refuse `1e3` for an
integer, and stop at the first fault. A schema's field may have metadata:
    {"path": "file" | "dir"}           must exist; ~ is the home directory
    {"path": "checkpoint"}             a file, or the word `auto`
    {"path": "data"}                   a file, a folder, shards such as `shards/{000..099}.tar`, or a URL
    {"path": "later" | "data later"}   need not exist when a run starts
    {"training": True}                 beside a path: not looked for with `run.evaluate`
    {"extra": True}                    a dict that takes the keys which no other field has
`REFUSED_KEYS: ClassVar = {key: reason}` of a schema names keys known from elsewhere, which are refused with the reason
unless their value is empty, zero or false.
"""

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from braceexpand import braceexpand
from omegaconf import DictConfig

from minigpt4.common.config_files import short, to_plain, with_option
from minigpt4.common.errors import ConfigError, hint

T = TypeVar("T")

MOST_FAULTS = 30
"""Shown of one section."""
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


def bind(
    schema: type[T],
    node: Mapping[str, Any] | DictConfig,
    *,
    section: str,
    source: str,
    options: Collection[str] = (),
) -> T:
    """An instance of `schema` holding the values of `node`, checked.

    Args:
        schema: a dataclass; a ValueError of its `__post_init__` becomes part of the ConfigError.
        node: the section.
        section: where it stands in the YAML, such as `run` or `datasets.laion`.
        source: the file to name in errors.
        options: keys that `--options` set, to name them in errors.

    Raises:
        ConfigError: all faults found: unknown, missing or refused keys, wrong types, ranges, placeholders.
    """
    values = to_plain(node, source, options) if isinstance(node, DictConfig) else node
    try:
        return _bind(schema, values, section, source)
    except _SectionError as faults:
        shown = [f"  - {with_option(fault, options)}" for fault in faults.args[:MOST_FAULTS]]
        more = len(faults.args) - MOST_FAULTS
        listed = "\n".join([*shown, f"  and {more} more"] if more > 0 else shown)
        raise ConfigError(f"{source}:\n{listed}") from None


class _SectionError(ValueError):
    """One text per fault, each beginning with its key."""


def _bind(schema: type[T], values: Any, section: str, source: str) -> T:
    if not isinstance(values, Mapping):
        raise _SectionError(f"{section}: {_show(values)} must be keys with values")
    fields = {field.name: field for field in dataclasses.fields(schema) if field.init}
    extra = next((name for name, field in fields.items() if field.metadata.get("extra")), None)
    named = {name: field for name, field in fields.items() if name != extra}
    unnamed = {str(key): value for key, value in values.items() if not isinstance(key, str) or key not in named}
    faults = [] if extra else _unknown_keys(schema, unnamed, list(named), section)
    arguments = {extra: unnamed} if extra else {}
    kinds = typing.get_type_hints(schema)
    for name, field in named.items():
        key = f"{section}.{name}"
        try:
            if name in values:
                is_path = "path" in field.metadata
                value = _convert(kinds[name], values[name], key, source)
                for text in value if isinstance(value, list) else [value]:
                    if isinstance(text, str | Path) and is_placeholder(str(text), is_path=is_path):
                        raise _SectionError(f"{key}: {_show(str(text))} is a placeholder; {_how_to_set(key, source)}")
                arguments[name] = _path(value, field.metadata["path"], key) if is_path and value else value
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise _SectionError(f"{key}: is missing; {_how_to_set(key, source)}")
        except _SectionError as inner:
            faults.extend(inner.args)
    if faults:
        raise _SectionError(*faults)
    try:
        return schema(**arguments)
    except ValueError as error:
        text = str(error)
        names_field = re.split(r"\W", text, maxsplit=1)[0] in fields
        raise _SectionError(f"{section}.{text}" if names_field else f"{section}: {text}") from error


def _unknown_keys(schema: type, unnamed: Mapping[str, Any], known: list[str], section: str) -> list[str]:
    refused = getattr(schema, "REFUSED_KEYS", {})
    faults = []
    for key, value in unnamed.items():
        if key not in refused:
            known_hint = hint(key, known) if len(faults) < MOST_FAULTS else ""
            faults.append(f"{section}.{key:.100}: unknown key; {known_hint}")
        elif value:
            faults.append(f"{section}.{key}: {refused[key]}")
    return faults


def _path(value: str | Path, kind: str, key: str) -> str | Path:
    """A path below the home directory in full, or _SectionError if no file can have this name."""
    try:
        check_name(str(value), kind)
        return expand_home(value)
    except (ValueError, RuntimeError) as error:
        raise _SectionError(f"{key}: {_show(value)}: {error}") from error


def _how_to_set(key: str, source: str) -> str:
    return f"set it in {source} or with --options {key}=..."


def _convert(kind: Any, value: Any, key: str, source: str) -> Any:
    """`value` as `kind`, or _SectionError. Numbers may stand in quotes, as some YAML writers put them."""
    origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, key, source)
    if origin is Literal:  # 1 == True in Python, but not in a YAML file
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        raise _SectionError(f"{key}: {_show(value)} must be one of {', '.join(map(str, args))}")
    if origin is list:
        if not isinstance(value, list | tuple):
            raise _SectionError(f"{key}: {_show(value)} must be a list, such as [a, b]")
        kind = args[0] if args else Any
        return [_convert(kind, item, f"{key}[{index}]", source) for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _SectionError(f"{key}: {_show(value)} must be keys with values")
        kind = args[1] if args else Any
        return {name: _convert(kind, item, f"{key}.{name}", source) for name, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _bind(kind, value, key, source)
    wanted, read = _SCALARS[kind]
    converted = read(value)
    if converted is None:
        raise _SectionError(f"{key}: {_show(value)} must be {wanted}")
    return converted


def _convert_union(kinds: tuple[Any, ...], value: Any, key: str, source: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    faults = []
    for kind in kinds:
        if kind is types.NoneType:
            continue
        try:
            return _convert(kind, value, key, source)
        except _SectionError as inner:
            faults.extend(inner.args)
    raise _SectionError(*faults)


def _show(value: Any) -> str:
    return "no value" if value is None else short(repr(value))


def _read_int(value: Any) -> int | None:
    number = _read_float(value)
    if number is None or not number.is_integer():
        return None
    whole = value if isinstance(value, int) else int(number)
    return whole if abs(whole) < 2**63 else None


def _read_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


# What a scalar must be, and its value, None if it is something else.
_SCALARS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    bool: ("true or false", lambda value: value if isinstance(value, bool) else None),
    int: ("a whole number below 2^63", _read_int),
    float: ("a number", _read_float),
    str: ("text (numbers and true/false in quotes)", lambda value: value if isinstance(value, str) else None),
    Path: ("a path", lambda value: Path(value) if isinstance(value, str | Path) else None),
}


# Paths: names that a file can have, shards in braces, and what is not there.


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
