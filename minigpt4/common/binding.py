"""From a YAML section to its dataclass with pydantic, reporting every fault of the section at once; records of files.

Beside pydantic's own rules: unknown keys come with the nearest known one, true and false are no numbers, placeholders
such as `/path/to/x` are refused, and `PathTo` marks paths. `REFUSED_KEYS: ClassVar = {key: reason}` of a schema names
keys known from elsewhere, which are refused with the reason unless their value is empty, zero or false.
"""

import dataclasses
import functools
import glob
import os
import re
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le
from braceexpand import braceexpand
from omegaconf import DictConfig
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import core_schema
from typing_extensions import TypedDict, is_typeddict

from minigpt4.common.config_files import below, short, to_plain
from minigpt4.common.errors import ConfigError, SampleError, hint
from minigpt4.common.hub import hub_name

T = TypeVar("T")

MOST_FAULTS = 30
PLACEHOLDER = re.compile(
    r"please set this value|^\?\?\?$|(^|/)path/to(/|$)|^todo\b|^<\s*(your|path|set|fill)\b", re.IGNORECASE
)
ANGLE_BRACKETS = re.compile(r"^<.*>$")
REMOTE = re.compile(r"^(pipe:|[a-z][a-z0-9+.-]*://)")
AUTO = "auto"
"""In place of a checkpoint: the newest one."""
MOST_SHARDS = 1_000_000
RANGE = re.compile(r"(\d+)\.\.-?(\d+)", re.ASCII)


def _number(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 2**63):
        raise ValueError("must be a number below 2^63")
    return value


Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
PositiveInt = Annotated[Int, Ge(1)]
NonNegativeInt = Annotated[Int, Ge(0)]
PositiveFloat = Annotated[Float, Gt(0)]
NonNegativeFloat = Annotated[Float, Ge(0)]
BatchSize = Annotated[PositiveInt, Le(1_000_000)]


@dataclasses.dataclass(frozen=True)
class PathTo:
    """Marks a field as a path: `Annotated[str | None, PathTo("file")]`; `~` becomes the home directory."""

    kind: Literal["file", "dir", "checkpoint", "data"]
    """`checkpoint`: a file, or `auto`; `data`: a file, a folder, shards such as `x/{000..099}.tar`, a pattern with `*`,
    or a URL."""
    later: bool = False
    """Need not exist when a run starts."""
    training: bool = False
    """Need not exist with `run.evaluate`."""
    hub: bool = False
    """Also a name on the Hugging Face Hub, which is looked up when it is loaded."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.read, handler(source))

    def read(self, value: str | None) -> str | None:
        """The path in full; ValueError if no file can have this name."""
        if not value:
            return value
        path = os.path.expanduser(value)  # noqa: PTH111 - Path would join the slashes of URLs
        if ANGLE_BRACKETS.search(value):
            raise ValueError("is a placeholder")
        if path.startswith("~"):
            raise ValueError("there is no such home directory")
        if self.kind == "data":
            expand_braces(path)
        elif not REMOTE.match(path):
            with suppress(OSError):
                os.lstat(path)  # ValueError for NUL and for half characters
        return path

    def missing(self, path: str) -> list[str]:
        """What does not exist of a path, as seen from the working directory."""
        if self.later or REMOTE.match(path) or (self.kind == "checkpoint" and path == AUTO):
            return []
        if self.hub and hub_name(path):
            return []
        paths = expand_braces(path) if self.kind == "data" else [path]
        exists = {"dir": os.path.isdir, "data": matching_paths}.get(self.kind, os.path.isfile)
        # The first and the last tell whether the range is right; few people hold every shard in between.
        return [one for one in dict.fromkeys((paths[0], paths[-1])) if not exists(one)]


def matching_paths(pattern: str) -> list[str]:
    """What a path with `*` stands for, sorted; itself if it is there."""
    return [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))  # noqa: PTH110, PTH207


def refuse(*rules: tuple[Any, str]) -> None:
    """ValueError with the text of every broken rule, for `__post_init__`: pairs of (is it broken, `key: text`)."""
    broken = [text for is_broken, text in rules if is_broken]
    if broken:
        raise ValueError("\n".join(broken))


def bind(schema: type[T], node: Mapping[str, Any] | DictConfig, *, section: str, source: str) -> T:
    """The values of `node` as the dataclass `schema`; ConfigError with all faults, those of its `__post_init__` too.

    `section`: where it stands in the YAML, such as `datasets.laion`; `source`: the file.
    """
    bound, faults = read(schema, to_plain(node, source) if isinstance(node, DictConfig) else node, section)
    raise_faults(source, faults)
    return bound


def raise_faults(source: str, faults: Collection[str], options: Collection[str] = ()) -> None:
    """One ConfigError with all `key: text` of `faults`, if there are any."""
    if not faults:
        return
    named = [f"--options {fault}" if below(fault.partition(":")[0], options) else fault for fault in faults]
    more = [f"and {len(named) - MOST_FAULTS} more"] if len(named) > MOST_FAULTS else []
    raise ConfigError("\n  - ".join([f"{source}:", *named[:MOST_FAULTS], *more]))


def read(schema: type[T], values: Any, section: str) -> tuple[T | None, list[str]]:
    """The section as its dataclass, None if that is impossible; and its faults, each beginning with its key."""
    placeholders = list(_placeholders(values, section))
    faults = [f"{key}: {short(repr(text))} is a placeholder; {_way_out(key)}" for key, text in placeholders]
    faults += islice(_unknown_keys(schema, values, section), MOST_FAULTS)
    try:
        return _adapter(schema).validate_python({section: values})[section], faults
    except ValidationError as error:
        known = {key for key, _ in placeholders}
        for detail in error.errors(include_url=False):
            key = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in detail["loc"])[1:]
            if key not in known and detail["type"] != "invalid_key":  # which is an unknown key too
                faults += _fault(key, detail)
        return None, faults


@functools.cache
def _adapter(schema: type) -> TypeAdapter:
    return TypeAdapter(dict[str, schema], config=ConfigDict(allow_inf_nan=False))


def _placeholders(values: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(values, str) and PLACEHOLDER.search(values):
        yield key, values
    elif isinstance(values, Mapping):
        for name, value in values.items():
            yield from _placeholders(value, f"{key}.{name}")
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _placeholders(value, f"{key}[{index}]")


def _unknown_keys(schema: type, values: Any, section: str) -> Iterator[str]:
    hints, refused = typing.get_type_hints(schema), getattr(schema, "REFUSED_KEYS", {})
    kinds = {name: kind for name, kind in hints.items() if typing.get_origin(kind) is not typing.ClassVar}
    for key, value in values.items() if isinstance(values, Mapping) else ():
        if key in refused:
            if value:
                yield f"{section}.{key}: {refused[key]}"
        elif key not in kinds:
            if not hasattr(schema, "collect_kwargs"):
                yield f"{section}.{short(key, 100)}: unknown key; {hint(key, kinds)}"
        elif dataclasses.is_dataclass(kinds[key]) or is_typeddict(kinds[key]):
            yield from _unknown_keys(kinds[key], value, f"{section}.{key}")


def _fault(key: str, detail: Mapping[str, Any]) -> Iterator[str]:
    """What pydantic found, in words of a YAML file."""
    text, value = detail["msg"].removeprefix("Value error, ").removeprefix("Input "), detail["input"]
    if detail["type"] == "missing":
        yield f"{key}: is missing; {_way_out(key)}"
    elif detail["type"] == "value_error" and isinstance(value, Mapping):  # of a `__post_init__`
        for line in text.splitlines():
            yield f"{key}.{line}" if re.match(r"[\w.]+:", line) else f"{key}: {line}"
    elif detail["type"] in ("dataclass_type", "dict_type"):
        yield f"{key}: {short(repr(value))} must be keys with values"
    else:
        yield f"{key}: {'no value' if value is None else short(repr(value))} {text}"


def _way_out(key: str) -> str:
    return f"set it in the file or with --options {key}=..."


def expand_braces(pattern: str) -> list[str]:
    """The names of `a{00..99}.tar`, as in a shell; ValueError for unbalanced braces, for more than MOST_SHARDS, and
    for more than 4 pairs of braces."""
    if pattern.count("{") > 4:
        raise ValueError("has more than 4 pairs of braces")
    largest = max((int(number) for pair in RANGE.findall(pattern) for number in pair), default=0)
    names = list(islice(braceexpand(pattern), MOST_SHARDS + 1)) if largest < MOST_SHARDS else None
    if names is None or len(names) > MOST_SHARDS:
        raise ValueError(f"stands for more than {MOST_SHARDS:,} names")
    return names


def missing_paths(sections: Mapping[str, object]) -> list[tuple[str, str]]:
    """Keys and paths that do not exist, in bound schemas by section name; with `run.evaluate` none of training."""
    evaluates = getattr(sections.get("run"), "evaluate", False)
    return [
        (key, missing)
        for section, schema in sections.items()
        for key, mark, path in _paths(schema, section)
        for missing in mark.missing(path)
        if not (evaluates and mark.training)
    ]


def require_paths(sections: Mapping[str, object], source: str) -> None:
    """Raise one ConfigError that lists every key whose path does not exist."""
    missing = []
    for key, path in missing_paths(sections):
        kinds = {"a folder, not a file": os.path.isdir, "a file, not a folder": os.path.isfile}
        what = next((f"is {kind}" for kind, holds in kinds.items() if holds(path)), "does not exist")
        missing.append(f"{key}: {path} {what}; {_way_out(key)}")
    raise_faults(f"{source}: not found from {Path.cwd()}", missing)


def _paths(schema: object, section: str) -> Iterator[tuple[str, PathTo, str]]:
    """(key, mark, path) of every path field that is set, nested schemas included."""
    for name, kind in typing.get_type_hints(type(schema), include_extras=True).items():
        value = getattr(schema, name)
        if dataclasses.is_dataclass(value):
            yield from _paths(value, f"{section}.{name}")
        for mark in getattr(kind, "__metadata__", ()):
            if isinstance(mark, PathTo) and value:
                yield f"{section}.{name}", mark, value


# Records of files


def fields_of(**kinds: Any) -> Any:
    """An object with these fields; it may have others."""
    return TypedDict("Fields", kinds)


_record_adapter = functools.cache(TypeAdapter)


def checked(kind: Any, content: Any, where: object) -> Any:
    """`content` as it is, or as the dataclass that `kind` is; SampleError that names record and field of a fault."""
    try:
        found = _record_adapter(kind).validate_python(content, strict=not dataclasses.is_dataclass(kind))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in fault["loc"])
        raise SampleError(f"{where}{place and f', {place.lstrip(chr(46))}'}: {fault['msg']}") from None
    return found if dataclasses.is_dataclass(kind) else content
