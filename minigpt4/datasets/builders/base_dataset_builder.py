"""From the sections under `datasets:` to datasets."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from minigpt4.common.errors import ConfigError, RegistryError
from minigpt4.common.registry import registry
from minigpt4.common.schemas import DatasetConfig, TextProcessors, VisProcessors
from minigpt4.datasets.datasets.base_dataset import TRAIN, BaseDataset, ImageReader
from minigpt4.processors import BaseProcessor, load_processor

if TYPE_CHECKING:
    from minigpt4.models.feature_cache import FeatureCache


@dataclass(eq=False)
class BaseDatasetBuilder(ABC):
    """Makes the datasets of one section under `datasets:`."""

    name: str
    """The section's."""
    config: DatasetConfig
    """The section; ConfigError if this format needs more than it says."""
    cache: "FeatureCache | None" = None
    """Features of images that are known already."""

    SPLIT_KEYS: ClassVar[dict[str, str]]
    """Key of `build_info` that holds the files of a split."""

    @abstractmethod
    def build(self, split: str) -> BaseDataset:
        """The dataset of a split; ConfigError when there is none or its files cannot be used."""

    def splits(self) -> list[str]:
        """Splits that the section names files for."""
        return [split for split in self.SPLIT_KEYS if self._files(split)]

    def build_datasets(self, splits: Sequence[str] = (TRAIN,)) -> dict[str, BaseDataset]:
        """Datasets by split, without the splits that the section says nothing about."""
        known = self.splits()
        return {split: self.build(split) for split in splits if split in known}

    def vis_processor(self, split: str) -> BaseProcessor:
        """The image processor of a split: that for training, or for evaluation."""
        return self._processor(self.config.vis_processor, split)

    def text_processor(self, split: str) -> BaseProcessor:
        """The text processor of a split."""
        return self._processor(self.config.text_processor, split)

    def _processor(self, sections: VisProcessors | TextProcessors, split: str) -> BaseProcessor:
        section = sections.train if split == TRAIN else sections.eval
        return load_processor(section.name, section.arguments())

    def image_reader(self, split: str) -> ImageReader:
        """How images of a split are read: decoded, or from `self.cache` where they are known."""
        processor = self.vis_processor(split)
        return ImageReader(processor, self.cache and self.cache.store(processor))

    def require_files(self, split: str) -> str:
        """What `build_info` says about the split; ConfigError if it says nothing."""
        files = self._files(split)
        if files:
            return files
        key = self.SPLIT_KEYS.get(split)
        wanted = f"set build_info.{key}" if key else f"the splits are {', '.join(self.SPLIT_KEYS)}"
        raise self.error(f"has no split {split!r}; {wanted}")

    def error(self, text: str) -> ConfigError:
        """A ConfigError that names the section."""
        return ConfigError(f"datasets.{self.name}: {text}")

    def _files(self, split: str) -> str | None:
        key = self.SPLIT_KEYS.get(split)
        return getattr(self.config.build_info, key) if key else None


def builder_of(name: str, section: DatasetConfig, cache: "FeatureCache | None" = None) -> BaseDatasetBuilder:
    """The builder that the section's `builder` names; RegistryError if there is none of that name."""
    return registry.get_builder_class(section.builder)(name, section, cache)


def build_datasets(
    sections: Mapping[str, DatasetConfig], splits: Sequence[str], cache: "FeatureCache | None" = None
) -> dict[str, dict[str, BaseDataset]]:
    """{dataset name: {split: dataset}}, without the splits that a dataset does not have.

    ConfigError when no dataset has a split, or files cannot be used. `cache`: features that are known already.
    """
    datasets = {}
    for name, section in sections.items():
        try:
            datasets[name] = builder_of(name, section, cache).build_datasets(splits)
        except RegistryError as error:
            raise RegistryError(f"datasets.{name}: {error}") from error
    for split in splits:
        if not any(split in own for own in datasets.values()):
            raise ConfigError(
                f"datasets: {', '.join(sections) or 'none'}: no split {split!r}; set build_info.{split}_ann_path or "
                f"build_info.{split}_storage of a dataset, or leave the split out of run.train_splits, "
                "run.valid_splits and run.test_splits"
            )
    return datasets
