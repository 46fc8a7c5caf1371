"""From the sections under `datasets:` to datasets."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from minigpt4.common.errors import ConfigError, RegistryError
from minigpt4.common.registry import registry
from minigpt4.common.schemas import DatasetConfig
from minigpt4.datasets.datasets.base_dataset import BaseBuilder, Dataset

if TYPE_CHECKING:
    from minigpt4.models.feature_cache import FeatureCache


def builder_of(name: str, section: DatasetConfig, cache: "FeatureCache | None" = None) -> BaseBuilder:
    """The builder that the section's `builder` names; RegistryError if there is none of that name."""
    return registry.get_builder_class(section.builder)(name, section, cache)


def build_datasets(
    sections: Mapping[str, DatasetConfig], splits: Sequence[str], cache: "FeatureCache | None" = None
) -> dict[str, dict[str, Dataset]]:
    """{dataset name: {split: dataset}}, without the splits that a dataset does not have.

    `cache`: features of images that are known already; those need not be decoded.

    ConfigError when no dataset has a split, or files cannot be used.
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
                f"datasets: {', '.join(sections) or 'none'}: no split {split!r}; set build_info.{split}_ann_path "
                f"(build_info.{split}_storage for shards) of at least one dataset, or leave the split out of "
                "run.train_splits, run.valid_splits and run.test_splits"
            )
    return datasets
