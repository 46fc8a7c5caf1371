"""Builders by format and by the published datasets' names; importing this registers them."""

from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder, build_datasets, builder_of
from minigpt4.datasets.builders.image_text_pair_builder import (
    CCSBUAlignBuilder,
    CCSBUBuilder,
    ImageCaptionJsonBuilder,
    ImageCaptionShardsBuilder,
    LaionBuilder,
    LlavaConversationsBuilder,
)
