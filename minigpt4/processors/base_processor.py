"""The common part of all processors: a callable built from a section of the YAML."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from omegaconf import DictConfig, OmegaConf

from minigpt4.common.errors import ConfigError, hint


@dataclass
class BaseProcessor(ABC):
    """Turns one raw item (an image, a caption) into what the model is given.

    A subclass is a dataclass: its fields are the keys that its YAML section may hold, their defaults the
    only defaults, and `__post_init__` checks the values and raises ConfigError.
    """

    @abstractmethod
    def __call__(self, item: Any) -> Any:
        """Process one item; SampleError when the item cannot be used."""

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | DictConfig | None = None) -> Self:
        """Build from a section such as `{name: blip2_image_eval, image_size: 224}`.

        `name` only chooses the class; a key set to null takes its default, as in the published files. ConfigError names
        a wrong value, or a wrong key with the nearest valid one.
        """
        section = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg or {}
        if not isinstance(section, Mapping):
            raise ConfigError(f"{cls.__name__}: expected a section of keys and values, got {cfg!r}")
        title = section.get("name") or cls.__name__
        known = [field.name for field in fields(cls)]
        values = {key: value for key, value in section.items() if key != "name"}
        for key in (key for key in values if key not in known):
            raise ConfigError(f"{title}: unknown key '{key}'; {hint(str(key), ['name', *known])}")
        try:
            return cls(**{key: value for key, value in values.items() if value is not None})
        except ConfigError as error:
            raise ConfigError(f"{title}: {error}") from None
