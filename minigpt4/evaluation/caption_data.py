"""The images of a caption evaluation, each once, with their references, in batches that depend on the data alone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.datasets import ImageCaptionJson

CAPTIONS = "captions"
"""Field of an annotation with the single captions of its image."""

ReferenceMode = Literal["joined", "separate"]
"""`joined`: the one string that training used; `separate`: each caption of the image is a reference."""


@dataclass(frozen=True)
class CaptionItem:
    """One image."""

    image_id: str
    file: Path
    answer: str
    """The text that training would use."""

    captions: list[str] | None
    """The single captions, if the annotation has them."""


class CaptionData:
    """All images of one split, in the order of its file.

    Raises:
        SampleError: a record is bad, an image file is missing or an image id comes twice. An evaluation on some
            of the images would be one on other images.
    """

    def __init__(self, dataset: ImageCaptionJson) -> None:
        self.dataset = dataset
        self.items = [_item(dataset, number) for number in range(dataset.size)]
        seen: dict[str, int] = {}
        for number, item in enumerate(self.items):
            first = seen.setdefault(item.image_id, number)
            if first != number:
                raise SampleError(f"{_where(dataset, number)}: the image id {item.image_id!r} comes twice")

    def __len__(self) -> int:
        return len(self.items)

    def image(self, number: int) -> Tensor:
        """Pixels of one image as the model reads them, (3, S, S) float32."""
        (step,) = self.dataset.open(number, len(self), None)
        return step.load()["image"]

    def images(self, numbers: Sequence[int]) -> Tensor:
        """Pixels of several images, (B, 3, S, S) float32."""
        return torch.stack([self.image(number) for number in numbers])

    def batches(self, batch_size: int) -> list[list[int]]:
        """Numbers of images, cut into batches: those with long references first, with others like them.

        A batch runs until its longest caption ends, so images with much to tell should share batches. Whatever
        the number of processes, the batches are the same, and so are the captions to the last bit.
        """
        order = sorted(range(len(self)), key=lambda number: (-len(self.items[number].answer.split()), number))
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def references(self, mode: ReferenceMode) -> dict[str, list[str]]:
        """References by image id; ConfigError if the annotations have no single captions."""
        if mode == "joined":
            return {item.image_id: [item.answer] for item in self.items}
        for number, item in enumerate(self.items):
            if not item.captions:
                raise ConfigError(
                    f"{_where(self.dataset, number)}: --reference-mode separate needs the field {CAPTIONS!r}, a list "
                    "of texts; prepare_flickr30k.py writes it (run it again), or score with --reference-mode joined"
                )
        return {item.image_id: list(item.captions or []) for item in self.items}


def _item(dataset: ImageCaptionJson, number: int) -> CaptionItem:
    record, look = dataset.look(number)
    captions = record.get(CAPTIONS)
    if isinstance(captions, str) and captions.startswith("["):  # a CSV file holds the list as JSON
        try:
            captions = json.loads(captions)
        except ValueError:
            captions = None
    texts = [text for text in captions if isinstance(text, str) and text.strip()] if isinstance(captions, list) else []
    if "answer" not in look:
        raise SampleError(f"{_where(dataset, number)}: is a conversation; an evaluation of captions needs captions")
    return CaptionItem(look["image_id"], dataset.image_file(number), look["answer"], texts or None)


def _where(dataset: ImageCaptionJson, number: int) -> str:
    return dataset.records.where(int(dataset.selection[number]))
