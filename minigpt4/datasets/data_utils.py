"""A batch for the model, and a look at the data before anything heavy loads."""

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from minigpt4.common.errors import SampleError
from minigpt4.conversation.llava import SPEAKERS
from minigpt4.datasets.datasets.base_dataset import BaseDataset, ReaderSlot, iter_once
from minigpt4.datasets.datasets.dataloader_utils import to_device
from minigpt4.datasets.datasets.image_caption_json import SEPARATOR
from minigpt4.datasets.feature_store import CachedImage
from minigpt4.processors import Uint8Image

TRIES = 100
TEXT_SHOWN = 60


def prepare_sample(samples: dict[str, Any], cuda_enabled: bool = True) -> dict[str, Any]:
    """`to_device` on the current GPU, or on the CPU."""
    return to_device(samples, torch.device("cuda" if cuda_enabled else "cpu"))


def first_sample(dataset: BaseDataset) -> str:
    """One line that describes the dataset and its first good sample.

    SampleError when none of its first 100 samples can be read.
    """
    errors = []
    for _, sample in islice(iter_once(dataset, ReaderSlot(0, 1)), TRIES):
        try:
            return f"{dataset.label}: {dataset.describe()}; first: {_described(sample.load())}"
        except SampleError as error:
            errors.append(error)
    what = f"none of the first {len(errors)} samples can be read ({dataset.describe()})"
    raise SampleError(f"{dataset.label}: nothing to train on or evaluate; {what}. The first: {errors[0]}")


def _described(sample: dict[str, Any]) -> str:
    """`image_id 2, image 224 x 224, 'The image shows a man fishing ...'`."""
    if "conversations" in sample:
        text = " | ".join(turn["value"] for turn in sample["conversations"] if turn["from"] == SPEAKERS[1])
    else:
        text = sample["answer"] if "answer" in sample else sample["conv_a"].replace(SEPARATOR, " | ")
    shown = text if len(text) <= TEXT_SHOWN else text[:TEXT_SHOWN].rstrip() + " ..."
    images = sample["image"] if isinstance(sample["image"], list) else [sample["image"]]
    parts = [f"image_id {sample['image_id']}", *(f"image {_size(image)}" for image in images), repr(shown)]
    return ", ".join(parts)


def _size(image: Tensor | Uint8Image | CachedImage) -> str:
    pixels = image.pixels_3SS if isinstance(image, CachedImage) else image
    return f"{pixels.shape[-1]} x {pixels.shape[-2]}" if pixels is not None else "known to the feature cache"
