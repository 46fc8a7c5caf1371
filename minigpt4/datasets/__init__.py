"""Datasets: formats as builders, the loaders of training and evaluation; importing this registers the builders.

A dataset is data: a section under `datasets:` whose `builder` is one of the formats here,
`image_caption_shards` or `image_caption_json`, or one that `imports:` brings. The names of the published
datasets are registered too, for those who look a builder up by the dataset's name.
"""

from minigpt4.datasets.bad_samples import BadSample, BadSampleLedger
from minigpt4.datasets.base import BaseBuilder, Dataset, Step
from minigpt4.datasets.building import build_datasets, builder_of
from minigpt4.datasets.eval_loader import EvalLoader
from minigpt4.datasets.image_caption_json import ImageCaptionJson, ImageCaptionJsonBuilder
from minigpt4.datasets.image_caption_shards import ImageCaptionShards, ImageCaptionShardsBuilder
from minigpt4.datasets.prefetch import DevicePrefetcher, to_device
from minigpt4.datasets.preview import first_sample
from minigpt4.datasets.source_reader import TrainSource
from minigpt4.datasets.train_loader import TrainLoader

__all__ = [
    "BadSample",
    "BadSampleLedger",
    "BaseBuilder",
    "Dataset",
    "DevicePrefetcher",
    "EvalLoader",
    "ImageCaptionJson",
    "ImageCaptionJsonBuilder",
    "ImageCaptionShards",
    "ImageCaptionShardsBuilder",
    "Step",
    "TrainLoader",
    "TrainSource",
    "build_datasets",
    "builder_of",
    "first_sample",
    "to_device",
]
