"""A look at the data before anything heavy loads."""

from itertools import islice
from typing import Any

from torch import Tensor

from minigpt4.common.errors import SampleError
from minigpt4.datasets.datasets.base_dataset import Dataset
from minigpt4.datasets.datasets.image_caption_json import SEPARATOR
from minigpt4.datasets.datasets.readers import ReaderSlot, iter_once
from minigpt4.datasets.feature_store import CachedImage
from minigpt4.processors import Uint8Image

TRIES = 100
TEXT_SHOWN = 60


def first_sample(dataset: Dataset) -> str:
    """One line that describes the dataset and its first good sample.

    SampleError when none of its first 100 samples can be read.
    """
    errors = []
    for _, step in islice(iter_once(dataset, ReaderSlot(0, 1)), TRIES):
        try:
            return f"{dataset.label}: {dataset.describe()}; first: {describe_sample(step.load())}"
        except SampleError as error:
            errors.append(error)
    raise SampleError(
        f"{dataset.label}: nothing to train on or evaluate; none of the first {len(errors)} samples can be "
        f"read ({dataset.describe()}). The first: {errors[0]}"
    )


def describe_sample(sample: dict[str, Any]) -> str:
    """`image_id 2, image 224 x 224, 'The image shows a man fishing ...'`."""
    text = sample["answer"] if "answer" in sample else sample["conv_a"].replace(SEPARATOR, " | ")
    shown = text if len(text) <= TEXT_SHOWN else text[:TEXT_SHOWN].rstrip() + " ..."
    return f"image_id {sample['image_id']}, {_shown_image(sample['image'])}, {shown!r}"


def _shown_image(image: Tensor | Uint8Image | CachedImage) -> str:
    if isinstance(image, CachedImage) and image.pixels_3SS is None:
        return "image known to the feature cache"
    height, width = (image.pixels_3SS if isinstance(image, CachedImage) else image).shape[-2:]
    return f"image {width} x {height}"
