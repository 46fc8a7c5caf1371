"""Builders of images with texts: of annotation files and of tar shards, also by the published datasets' names."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from webdataset.shardlists import expand_urls

from minigpt4.common.errors import SampleError
from minigpt4.common.registry import registry
from minigpt4.common.schemas import CONVERSATIONS
from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from minigpt4.datasets.datasets.base_dataset import TRAIN
from minigpt4.datasets.datasets.image_caption_json import ImageCaptionJson, Records
from minigpt4.datasets.datasets.image_caption_shards import ImageCaptionShards
from minigpt4.datasets.datasets.llava_conversations import LlavaConversations
from minigpt4.datasets.datasets.records import SPLIT_FIELD, tells_split

STORAGE_ANNOTATIONS = "filter_cap.json"
STORAGE_IMAGES = "image"


@registry.register_builder("cc_sbu")
@registry.register_builder("laion")
@registry.register_builder("image_caption_shards")
class ImageCaptionShardsBuilder(BaseDatasetBuilder):
    """Builds `ImageCaptionShards`; `storage`: `laion/{00000..10488}.tar`, or a URL that webdataset opens."""

    SPLIT_KEYS: ClassVar[dict[str, str]] = {TRAIN: "storage", "val": "val_storage", "test": "test_storage"}

    def build(self, split: str) -> ImageCaptionShards:
        return ImageCaptionShards(
            self.name,
            split,
            expand_urls(self.require_files(split)),
            self.config.build_info.caption_field,
            self.image_reader(split),
            self.text_processor(split),
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
            records = Records(self._annotations(split))
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
        if not info.storage and not info.image_path:
            raise self.error("build_info.image_path: is missing; set ann_path and image_path, or storage")
        images = Path(info.storage) / STORAGE_IMAGES if info.storage else Path(info.image_path)
        return self.dataset_class(self.name, split, records, selection, images, info, self.image_reader(split))

    def splits(self) -> list[str]:
        info = self.config.build_info
        if info.split_field:
            return sorted(self._by_split)
        return [TRAIN] * bool(info.storage) + super().splits()

    def _annotations(self, split: str) -> Path:
        storage = self.config.build_info.storage
        in_storage = storage and split == TRAIN
        file = Path(storage) / STORAGE_ANNOTATIONS if in_storage else Path(self.require_files(split))
        if not file.is_file():
            raise self.error(f"{file} does not exist; it holds the captions of the split {split!r}")
        return file

    @functools.cached_property
    def _common_records(self) -> Records:
        """Of the one file that holds all splits."""
        return Records(self._annotations(TRAIN))

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


def _parsed(records: Records) -> Iterator[dict[str, Any]]:
    """All records, {} for a bad one."""
    for index in range(len(records)):
        try:
            yield records[index]
        except SampleError:
            yield {}


# The published builders' names.
CCSBUBuilder = LaionBuilder = ImageCaptionShardsBuilder
CCSBUAlignBuilder = ImageCaptionJsonBuilder
