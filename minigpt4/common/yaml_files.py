"""Reading YAML files and `--options` with OmegaConf, every fault as a ConfigError that names its place."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.errors import ConfigError


def load_yaml(file: Path) -> DictConfig:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML, empty, or not a mapping.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such file")
    try:
        config = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{file}: must hold keys with values, such as `model:`, but holds a list")
    if not config:
        raise ConfigError(f"{file}: is empty")
    return config


def parse_options(options: list[str] | None) -> DictConfig:
    """`--options` as a tree: `a.b=1 c=2`, or `a.b 1 c 2` where the first has no `=`.

    Values are parsed as YAML, so `1e-4` is a number, `null` nothing and `'12'` text.

    Raises:
        ConfigError: an option without a key or value, or a value that is not YAML.
    """
    pairs = _pairs(options or [])
    for pair in pairs:
        _check_pair(pair)
    return OmegaConf.from_dotlist(pairs)


def dropped_option(options: list[str] | None) -> str | None:
    """The last of an odd number of words in the form `key value key value`; it has no value and no effect."""
    if options and "=" not in options[0] and len(options) % 2:
        return options[-1]
    return None


def _pairs(options: list[str]) -> list[str]:
    if not options or "=" in options[0]:
        return list(options)
    return [f"{key}={value}" for key, value in zip(options[0::2], options[1::2], strict=False)]


def _check_pair(pair: str) -> None:
    key, equals, value = pair.partition("=")
    if not key or not equals:
        raise ConfigError(f"--options {pair}: write KEY=VALUE, for instance run.max_epoch=2")
    try:
        OmegaConf.from_dotlist([pair])
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(
            f"--options {pair}: the value is not YAML ({text}); "
            f"put text with special characters in two kinds of quotes: \"{key}='{value}'\""
        ) from error


def merge(place: str, *layers: Any) -> DictConfig:
    """The layers, later ones over earlier ones; ConfigError with `place` where a list meets a mapping."""
    try:
        return OmegaConf.merge(*layers)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{place}: does not fit what lies under it, list or mapping: {text}") from error


def to_plain(config: Any, source: str) -> dict[str, Any]:
    """Dicts, lists and scalars of a config, `${...}` resolved; ConfigError where that fails."""
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {' '.join(str(error).split())}") from error
