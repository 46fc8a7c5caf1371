"""Datasets: formats as builders, the loaders of training and evaluation; importing this registers the builders.

A dataset is data: a section under `datasets:` whose `builder` is one of the formats here,
`image_caption_shards` or `image_caption_json`, or one that `imports:` brings. The names of the published
datasets are registered too, for those who look a builder up by the dataset's name.
"""

from minigpt4.datasets.builders.base_dataset_builder import build_datasets, builder_of
from minigpt4.datasets.data_utils import first_sample
from minigpt4.datasets.datasets.base_dataset import BadSample, BadSampleMonitor, BaseBuilder, Dataset, LazySample
from minigpt4.datasets.datasets.dataloader_utils import DevicePrefetcher, EvalLoader, TrainLoader, to_device
from minigpt4.datasets.datasets.image_caption_json import ImageCaptionJson, ImageCaptionJsonBuilder
from minigpt4.datasets.datasets.image_caption_shards import ImageCaptionShards, ImageCaptionShardsBuilder
from minigpt4.datasets.datasets.readers import TrainSource

__all__ = [
    "BadSample",
    "BadSampleMonitor",
    "BaseBuilder",
    "Dataset",
    "DevicePrefetcher",
    "EvalLoader",
    "ImageCaptionJson",
    "ImageCaptionJsonBuilder",
    "ImageCaptionShards",
    "ImageCaptionShardsBuilder",
    "LazySample",
    "TrainLoader",
    "TrainSource",
    "build_datasets",
    "builder_of",
    "first_sample",
    "to_device",
]
