"""The images of a caption evaluation, each once, with their references, in batches that depend on the data alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.datasets import ImageCaptionJson
from minigpt4.datasets.captions import CAPTIONS, JOINED, single_captions
from minigpt4.features import ImageRow
from minigpt4.processors import Levels

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
    """The single captions, if the annotations have them."""

    unit: int = 0
    """Which record of the dataset it is, the first where there are several."""


class CaptionData:
    """All images of one split, in the order of its file; several records of an image are its single captions.

    Raises:
        SampleError: a record is bad, an image file is missing, or an image id comes twice, with lists of captions or
            with other files. An evaluation on some of the images would be one on other images.
    """

    def __init__(self, dataset: ImageCaptionJson) -> None:
        self.dataset = dataset
        units: dict[str, list[int]] = {}
        for unit in range(dataset.size):
            units.setdefault(dataset.look(unit)[1]["image_id"], []).append(unit)
        self.items = [_item(dataset, own) for own in units.values()]

    def __len__(self) -> int:
        return len(self.items)

    def image(self, number: int) -> Tensor | ImageRow:
        """Pixels of one image as the model reads them, (3, S, S) float32, or its row of a cache."""
        (step,) = self.dataset.open(self.items[number].unit, self.dataset.size, None)
        image = step.load()["image"]
        return image.normalised() if isinstance(image, Levels) else image

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
        for item in self.items:
            if not item.captions:
                raise ConfigError(
                    f"{_where(self.dataset, item.unit)}: --reference-mode separate needs the field {CAPTIONS!r}, a "
                    "list of texts; prepare_flickr30k.py writes it (run it again), or use --reference-mode joined"
                )
        return {item.image_id: list(item.captions or []) for item in self.items}


def _item(dataset: ImageCaptionJson, units: Sequence[int]) -> CaptionItem:
    """One image of its records."""
    looks = [dataset.look(unit) for unit in units]
    file, where = dataset.image_file(units[0]), _where(dataset, units[-1])
    if any("answer" not in look for _, look in looks):
        raise SampleError(f"{where}: is a conversation; an evaluation of captions needs captions")
    image_id, answers = looks[0][1]["image_id"], [look["answer"] for _, look in looks]
    is_joined = dataset.info.caption_field == JOINED
    if len(units) == 1:
        record, _ = looks[0]
        single = single_captions(record, dataset.info.caption_field, where)
        captions = single if single is not None else [] if is_joined else answers
        return CaptionItem(image_id, file, answers[0], captions or None, units[0])
    if is_joined or any(single_captions(record, dataset.info.caption_field, where) for record, _ in looks):
        raise SampleError(f"{where}: the image id {image_id!r} comes twice")
    others = [other for unit in units if (other := dataset.image_file(unit)) != file]
    if others:
        raise SampleError(f"{where}: {others[0]} and {file} have the same id {image_id!r}; give them a field image_id")
    return CaptionItem(image_id, file, " ".join(answers), answers, units[0])


def _where(dataset: ImageCaptionJson, number: int) -> str:
    return dataset.records.where(int(dataset.selection[number]))
