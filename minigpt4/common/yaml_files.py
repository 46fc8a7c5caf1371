"""Reading YAML files and `--options` with OmegaConf, every fault as a ConfigError that names its place."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.errors import ConfigError, MiniGPT4Error

MAX_BYTES = 4 << 20
MAX_DEPTH = 40
MAX_NODES = 10_000
MAX_CHARACTERS = 100_000
"""Far above any real configuration; aliases and `${...}` can ask for more than a memory holds."""

FULL_KEY = re.compile(r"full_key: (\S+)")
REFERENCE = re.compile(r"\$\{([^${}:]+)\}")


def load_yaml(file: Path) -> DictConfig:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML, empty, too large, nested too deep, or not a mapping.
    """
    with yaml_faults(f"{short(file)}: cannot be read as YAML"):
        text = _text(file)
        _check_shape(text)
        config = OmegaConf.create(text) if text.strip() else OmegaConf.create()
        _check_references(config)
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{file}: must hold keys with values, such as `model:`, but holds a list")
    if not config:
        raise ConfigError(f"{file}: is empty")
    return config


def _text(file: Path) -> str:
    if file.is_dir():
        raise ConfigError(f"{file}: is a folder; name a YAML file")
    if not file.is_file():
        raise ConfigError(f"{file}: no such file")
    if file.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{file}: has {file.stat().st_size:,} bytes, which is no configuration")
    return file.read_text(encoding="utf-8-sig")


def _check_shape(text: str) -> None:
    """ValueError if a document is nested too deep, contains itself, or expands to too much by its aliases."""
    anchored: dict[str, int | None] = {}
    sizes, anchors = [0], [None]
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            sizes.append(0)
            anchors.append(event.anchor)
            anchored[event.anchor] = None
            if len(sizes) > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH} levels at line {event.start_mark.line + 1}")
            continue
        size = 1
        if isinstance(event, yaml.CollectionEndEvent):
            size += sizes.pop()
            anchored[anchors.pop()] = size
        elif isinstance(event, yaml.ScalarEvent):
            anchored[event.anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            known = anchored.get(event.anchor, 1)
            if known is None:
                raise ValueError(f"*{event.anchor} contains itself at line {event.start_mark.line + 1}")
            size = known
        sizes[-1] += size
        if sizes[-1] > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES:,} values, those of aliases counted each time")


def parse_options(options: list[str] | None) -> DictConfig:
    """`--options` as a tree: `a.b=1 c=2`, or `a.b 1 c 2` where the first has no `=`.

    Values are parsed as YAML, so `1e-4` is a number, `null` nothing and `'12'` text.

    Raises:
        ConfigError: an option without a key or value, or a value that is not YAML.
    """
    tree = OmegaConf.create()
    for pair in option_pairs(options):
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ConfigError(f"--options {short(pair)}: write KEY=VALUE, for instance run.max_epoch=2")
        quotes = f"put text with special characters in two kinds of quotes: \"{short(key)}='{short(value)}'\""
        with yaml_faults(f"--options {short(pair)}: the value is not YAML", quotes):
            if key.count(".") + key.count("[") >= MAX_DEPTH:
                raise ConfigError(f"--options {short(pair)}: the key has more than {MAX_DEPTH} levels")
            _check_shape(value)
            tree.merge_with_dotlist([pair])
    return tree


def option_pairs(options: list[str] | None) -> list[str]:
    """Options of either form as `KEY=VALUE`."""
    if not options or "=" in options[0]:
        return list(options or [])
    return [f"{key}={value}" for key, value in zip(options[0::2], options[1::2], strict=False)]


def merge(place: str, *layers: Any) -> DictConfig:
    """The layers, later ones over earlier ones; ConfigError with `place` where a list meets a mapping."""
    with yaml_faults(f"{place}: does not fit what lies under it, list or mapping"):
        return OmegaConf.merge(*layers)


def to_plain(config: Any, source: str, options: Collection[str] = ()) -> dict[str, Any]:
    """Dicts, lists and scalars of a config, `${...}` resolved; ConfigError where that fails.

    `options`: keys that `--options` set, to name them.
    """
    with yaml_faults(source, options=options):
        _check_references(config)
        return OmegaConf.to_container(config, resolve=True)


def _check_references(config: Any) -> None:
    """ValueError, before anything is resolved, for `${...}` that lead back to themselves or make too long a text."""
    sizes: dict[str, int | None] = {}

    def size(key: str, value: Any) -> int:
        if key in sizes:
            if sizes[key] is None:
                raise ValueError(f"{key}: its ${{...}} lead back to itself")
            return sizes[key]
        sizes[key] = None
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            total = 1 + sum(size(f"{key}.{name}" if key else str(name), item) for name, item in items)
        else:
            total = len(value) if isinstance(value, str) else 1
            for reference in REFERENCE.findall(value) if isinstance(value, str) else ():
                target = _absolute(reference, key)
                found = _at(tree, target)
                total += size(target, found) if found is not None else 0
        if total > MAX_CHARACTERS:
            raise ValueError(f"{key}: its ${{...}} make a text of more than {MAX_CHARACTERS:,} characters")
        sizes[key] = total
        return total

    tree = OmegaConf.to_container(config, resolve=False)
    size("", tree)


def _absolute(reference: str, key: str) -> str:
    """`.x` and `..x` are seen from where they stand, everything else from the top."""
    reference = re.sub(r"\[([^\]]*)\]", r".\1", reference)
    path = reference.lstrip(".")
    up = len(reference) - len(path)
    parents = key.split(".")[:-up] if up else []
    return ".".join([*parents, path])


def _at(tree: Any, key: str) -> Any:
    """What stands at a dotted key; None if nothing does."""
    for name in key.split("."):
        if isinstance(tree, dict):
            tree = next((value for own, value in tree.items() if str(own) == name), None)
        elif isinstance(tree, list) and name.isdigit() and int(name) < len(tree):
            tree = tree[int(name)]
        else:
            return None
    return tree


def with_option(fault: str, options: Collection[str]) -> str:
    """A fault begins with its key; `--options` goes before it where that is where the value comes from."""
    key = fault.partition(":")[0]
    below = any(key == option or key.startswith((f"{option}.", f"{option}[")) for option in options)
    return f"--options {fault}" if below else fault


@contextmanager
def yaml_faults(place: str, way_out: str = "", options: Collection[str] = ()) -> Iterator[None]:
    """Whatever a library raises becomes a ConfigError: place, key if there is one, what is wrong, the way out."""
    try:
        yield
    except MiniGPT4Error:
        raise
    except Exception as error:
        text = " ".join(str(error).replace('in "<unicode string>", ', "").split()) or type(error).__name__
        key = FULL_KEY.search(text) if isinstance(error, OmegaConfBaseException) else None
        text = text.split(" full_key:")[0]
        fault = with_option(f"{key.group(1)}: {text}" if key else text, options)
        raise ConfigError(f"{place}: {short(fault, 400)}{'; ' * bool(way_out)}{way_out}") from error


def short(text: object, limit: int = 200) -> str:
    """A text that is safe to show: cut where it is very long."""
    shown = str(text)
    return shown if len(shown) <= limit else f"{shown[:limit]} ..."
