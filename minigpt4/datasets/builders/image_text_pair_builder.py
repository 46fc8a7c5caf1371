"""Builders of images with texts: of annotation files and of tar shards, also by the published datasets' names."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from webdataset.shardlists import expand_urls

from minigpt4.common.errors import SampleError
from minigpt4.common.registry import registry
from minigpt4.common.remote import is_remote, suffix_of
from minigpt4.common.schemas import CONVERSATIONS
from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from minigpt4.datasets.datasets.base_dataset import TRAIN
from minigpt4.datasets.datasets.columns import ARROW, PARQUET, SPLITS, ColumnRecords
from minigpt4.datasets.datasets.image_caption_json import CAPTIONS, ImageCaptionJson, Records
from minigpt4.datasets.datasets.image_caption_shards import ImageCaptionShards
from minigpt4.datasets.datasets.llava_conversations import LlavaConversations
from minigpt4.datasets.datasets.records import SPLIT_FIELD, tells_split

STORAGE_ANNOTATIONS = "filter_cap.json"
STORAGE_IMAGES = "image"


@registry.register_builder("cc_sbu")
@registry.register_builder("laion")
@registry.register_builder("image_caption_shards")
class ImageCaptionShardsBuilder(BaseDatasetBuilder):
    """Builds `ImageCaptionShards`; `storage`: `laion/{00000..10488}.tar`, or an address."""

    SPLIT_KEYS: ClassVar[dict[str, str]] = {TRAIN: "storage", "val": "val_storage", "test": "test_storage"}

    def build(self, split: str) -> ImageCaptionShards:
        return ImageCaptionShards(
            self.name,
            split,
            expand_urls(self.require_files(split)),
            self.config.build_info.caption_field,
            self.image_reader(split),
            self.text_processor(split),
            self.config.build_info.cache_dir,
        )


@registry.register_builder("flickr30k_grounded_detail")
@registry.register_builder("cc_sbu_align")
@registry.register_builder("image_caption_json")
class ImageCaptionJsonBuilder(BaseDatasetBuilder):
    """Builds `ImageCaptionJson`: a file for each split, or one file with `split_field`, which is read once for all."""

    SPLIT_KEYS: ClassVar[dict[str, str]] = {TRAIN: "ann_path", "val": "val_ann_path", "test": "test_ann_path"}
    dataset_class: ClassVar[type[ImageCaptionJson]] = ImageCaptionJson

    def build(self, split: str) -> ImageCaptionJson:
        info = self.config.build_info
        if info.split_field:
            records, selection = self._common_records, self._by_split.get(split, ())
        else:
            records = self._records(split)
            selection = np.arange(len(records))
            if tells_split(next(_parsed(records), {})):
                raise self.error(
                    f"{records.file} holds all splits; name it by ann_path, and set split_field: {SPLIT_FIELD}"
                )
        if not len(selection):
            raise self.error(f"{records.file} has no records of the split {split!r}")
        if split == TRAIN and info.max_samples:
            drawn = np.random.default_rng(0).permutation(selection)[: info.max_samples]
            selection = np.sort(drawn)
        if records.columns is not None:
            self._require_columns(records)
        elif not info.storage and not info.image_path:
            raise self.error("build_info.image_path: is missing; set ann_path and image_path, or storage")
        images = info.image_path or (f"{info.storage}/{STORAGE_IMAGES}" if info.storage else "")
        images = images if is_remote(images) else Path(images)
        return self.dataset_class(self.name, split, records, selection, images, info, self.image_reader(split))

    def splits(self) -> list[str]:
        info = self.config.build_info
        if info.split_field:
            return sorted(self._by_split)
        return [TRAIN] * bool(info.storage) + super().splits()

    def _records(self, split: str) -> Records | ColumnRecords:
        """Of the file, folder or address with the texts of a split."""
        info = self.config.build_info
        storage = info.storage if split == TRAIN else None
        if storage and not _is_columns(storage):
            file = f"{storage}/{STORAGE_ANNOTATIONS}"
        else:
            file = storage or self.require_files(split)
            if _is_columns(file) or Path(file).is_dir() or (is_remote(file) and not suffix_of(file)):
                return ColumnRecords(file, info.image_field, info.cache_dir)
        if not is_remote(file) and not Path(file).is_file():
            raise self.error(f"{file} does not exist; it holds the captions of the split {split!r}")
        return Records(file, info.cache_dir)

    def _require_columns(self, records: ColumnRecords) -> None:
        """ConfigError, with the columns that there are, if one is missing that a sample needs."""
        info, has, own = self.config.build_info, records.columns, self.dataset_class.TEXTS
        texts = [info.conversation_field] if info.conversation_field else own or [info.caption_field, CAPTIONS]
        text_key = "conversation_field" if own or info.conversation_field else "caption_field"
        is_optional = not records.images and (own or info.id_field in has)
        faults = {
            text_key: has.isdisjoint(texts) and texts[0],
            "image_field": info.image_field not in has and not is_optional and info.image_field,
        }
        for key, name in faults.items():
            if name:
                columns = ", ".join(sorted(has))
                raise self.error(f"build_info.{key}: {records.file} has no column {name!r}; its columns are {columns}")

    @functools.cached_property
    def _common_records(self) -> Records | ColumnRecords:
        """Of the one file that holds all splits."""
        return self._records(TRAIN)

    @functools.cached_property
    def _by_split(self) -> dict[str, np.ndarray]:
        """Of the same file: which records belong to which split; bad ones to that of training."""
        chosen: dict[str, list[int]] = {}
        for index, record in enumerate(_parsed(self._common_records)):
            chosen.setdefault(str(record.get(self.config.build_info.split_field) or TRAIN), []).append(index)
        return {split: np.array(indices, dtype=np.int64) for split, indices in chosen.items()}


@registry.register_builder(CONVERSATIONS)
class LlavaConversationsBuilder(ImageCaptionJsonBuilder):
    """Builds `LlavaConversations`, from files as `ImageCaptionJsonBuilder` takes them."""

    dataset_class = LlavaConversations


def _parsed(records: Records | ColumnRecords) -> Iterator[dict[str, Any]]:
    """All records, {} for a bad one."""
    for index in range(len(records)):
        try:
            yield records[index]
        except SampleError:
            yield {}


def _is_columns(path: str) -> bool:
    """Whether a path is that of Parquet or Arrow files, or of a folder that has them."""
    if suffix_of(path) in (PARQUET, ARROW) or "*" in path:
        return True
    folder = Path(path)
    return folder.is_dir() and any(one.suffix in (PARQUET, ARROW) or one.name == SPLITS for one in folder.iterdir())


# The published builders' names.
CCSBUBuilder = LaionBuilder = ImageCaptionShardsBuilder
CCSBUAlignBuilder = ImageCaptionJsonBuilder
