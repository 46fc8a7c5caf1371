"""What a format has to offer: a dataset of numbered units, and the builder that makes one for each split."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.common.schemas.datasets import DatasetConfig
from minigpt4.datasets.images import ImageReader
from minigpt4.processors import BaseProcessor

if TYPE_CHECKING:
    from minigpt4.features.cache import FeatureCache

TRAIN = "train"


@dataclass(frozen=True)
class Step:
    """One sample that can be read."""

    key: str
    """Name of the sample, "" where it is a whole file that fails."""

    file: str
    """Where it stands: the shard, or the annotation file with line or record."""

    load: Callable[[], dict[str, Any]]
    """Reads the sample: {"image": Levels (3, S, S), or float32 from a processor without levels, or a row of a
    feature cache, "image_id": str, "answer": str, or in place of the answer "conv_q", "conv_a" and "connect_sym"}.
    SampleError when the data is bad; other errors are bugs."""


class Dataset(ABC):
    """One split of a dataset. It is handed to worker processes, so it must pickle."""

    def __init__(self, name: str, split: str) -> None:
        self.name = name
        self.split = split

    @property
    def label(self) -> str:
        """`name/split`, for logs and states."""
        return f"{self.name}/{self.split}"

    @property
    @abstractmethod
    def size(self) -> int | None:
        """Number of samples, good and bad; None: only reading everything would tell."""

    @abstractmethod
    def units(self, slots: int) -> int:
        """Number of units when so many slots read; at least 1."""

    @abstractmethod
    def open(self, unit: int, slots: int, random: np.random.Generator | None) -> Iterator[Step]:
        """The samples of a unit, shuffled where `random` is given; nothing is decoded before `Step.load`."""

    @abstractmethod
    def quick_steps(self) -> Iterator[Step]:
        """Steps whose loading is a cheap look at the data, for `python -m minigpt4.datasets.check`."""

    @abstractmethod
    def describe(self) -> str:
        """What there is to read, such as `3,439 records`."""


def failing(error: Exception) -> Callable[[], dict[str, Any]]:
    """A `Step.load` that raises `error`."""

    def load() -> dict[str, Any]:
        raise error

    return load


class BaseBuilder(ABC):
    """Makes the datasets of one section under `datasets:`.

    Args:
        name: the section's name.
        config: the section; ConfigError if this format needs more than it says.
        cache: features of images that are known already.
    """

    SPLIT_KEYS: ClassVar[dict[str, str]]
    """Key of `build_info` that holds the files of a split."""

    def __init__(self, name: str, config: DatasetConfig, cache: "FeatureCache | None" = None) -> None:
        self.name = name
        self.config = config
        self.cache = cache

    @abstractmethod
    def build(self, split: str) -> Dataset:
        """The dataset of a split; ConfigError when there is none or its files cannot be used."""

    def splits(self) -> list[str]:
        """Splits that the section names files for."""
        return [split for split in self.SPLIT_KEYS if self._files(split)]

    def build_datasets(self, splits: Sequence[str] = (TRAIN,)) -> dict[str, Dataset]:
        """Datasets by split, without the splits that the section says nothing about."""
        known = self.splits()
        return {split: self.build(split) for split in splits if split in known}

    def vis_processor(self, split: str) -> BaseProcessor:
        """The image processor of a split."""
        section = self.config.vis_processor.train if split == TRAIN else self.config.vis_processor.eval
        return registry.get_processor_class(section.name).from_config({"name": section.name, **section.arguments()})

    def image_reader(self, split: str) -> ImageReader:
        """How images of a split are read: decoded, or from `self.cache` where they are known."""
        processor = self.vis_processor(split)
        return ImageReader(processor, self.cache.store(processor) if self.cache is not None else None)

    def text_processor(self, split: str) -> BaseProcessor:
        """The text processor of a split."""
        section = self.config.text_processor.train if split == TRAIN else self.config.text_processor.eval
        return registry.get_processor_class(section.name).from_config({"name": section.name, **section.arguments()})

    def error(self, text: str) -> ConfigError:
        """A ConfigError that names the section."""
        return ConfigError(f"datasets.{self.name}: {text}")

    def _files(self, split: str) -> str | None:
        key = self.SPLIT_KEYS.get(split)
        return getattr(self.config.build_info, key) if key else None

    def require_files(self, split: str) -> str:
        """What `build_info` says about the split; ConfigError if it says nothing."""
        files = self._files(split)
        if files:
            return files
        key = self.SPLIT_KEYS.get(split)
        wanted = f"set build_info.{key}" if key else f"the splits are {', '.join(self.SPLIT_KEYS)}"
        raise self.error(f"has no split {split!r}; {wanted}")
