"""Datasets: formats as builders, the loaders of training and evaluation; importing this registers the builders.

A dataset is a section under `datasets:` whose `builder` is `image_caption_shards`, `image_caption_json`,
`llava_conversations`, or one that `imports:` brings. The names of the published datasets are registered too.
"""

from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder, build_datasets, builder_of
from minigpt4.datasets.builders.image_text_pair_builder import ImageCaptionJsonBuilder, ImageCaptionShardsBuilder
from minigpt4.datasets.data_utils import first_sample, prepare_sample
from minigpt4.datasets.datasets.base_dataset import BaseDataset, LazySample
from minigpt4.datasets.datasets.dataloader_utils import (
    BadSample,
    BadSampleMonitor,
    DevicePrefetcher,
    EvalLoader,
    TrainLoader,
    TrainSource,
    to_device,
)
from minigpt4.datasets.datasets.image_caption_json import ImageCaptionJson
from minigpt4.datasets.datasets.image_caption_shards import ImageCaptionShards
from minigpt4.datasets.datasets.llava_conversations import LlavaConversations
