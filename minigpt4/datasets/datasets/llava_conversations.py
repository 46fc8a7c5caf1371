"""The format `llava_conversations`: LLaVA's files of conversations about one image, several, or none.

Turns reach the model as they stand in the file, `<image>` included: which are left out, and where the images go, is a
matter of the prompt (`models/prompting.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from minigpt4.common.errors import SampleError, errors_as
from minigpt4.common.utils import parse_json, require_readable
from minigpt4.conversation.llava import IMAGE_TOKEN, SPEAKERS
from minigpt4.datasets.datasets.base_dataset import join_images
from minigpt4.datasets.datasets.columns import StoredImage
from minigpt4.datasets.datasets.image_caption_json import ImageCaptionJson
from minigpt4.datasets.feature_store import CachedImage
from minigpt4.processors.blip_processors import Uint8Image

TURNS = "conversations"
"""Field of the turns, and key of them in a batch."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Fields that records are known to have of what is shown; a record without its images is no text alone."""


@dataclass(eq=False)
class LlavaConversations(ImageCaptionJson):
    """Samples by index; each is a shard of its own.

    {"id": "33471", "image": "coco/33471.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                                 {"from": "gpt", "value": "A bus."}, ...]}
    "image": ["a.jpg", "b.jpg"]   several images; `require_trainable` says where their `<image>` may stand
    no "image"                    text alone
    """

    TEXTS: ClassVar[list[str]] = [TURNS]

    def modality_lengths(self) -> np.ndarray:
        """Words of all turns of each sample, (N,) int64; negative without image, and never 0."""
        lengths = np.ones(self.size, dtype=np.int64)
        for index in range(self.size):
            try:
                record, where = self._record(index)
                turns = self._turns(record, where)
            except SampleError:  # counted when it is read
                continue
            words = max(1, sum(len(turn["value"].split()) for turn in turns))
            lengths[index] = words if record.get(self.info.image_field) else -words
        return lengths

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """{"conversations": B lists of turns, "image_id", "source"} and "image" as `join_images` gives it.

        Where each sample has one image it is (B, 3, S, S); where none has one there is no "image"; else (B, n, 3, S, S)
        with "length" (B,) int64: how many of the n are the sample's, the others being blank. A batch of a feature cache
        has them behind each other, B * n.
        """
        batch = {key: [sample[key] for sample in samples] for key in (TURNS, "image_id")}
        batch["source"] = self.name
        images = [sample["image"] for sample in samples]
        length_B = torch.tensor([len(own) for own in images])
        n = int(length_B.max())
        if n == 0:
            return batch
        blank = _blank(next(own[0] for own in images if own))
        joined = join_images([image for own in images for image in [*own, *[blank] * (n - len(own))]])
        if length_B.eq(1).all():
            return {**batch, "image": joined}
        if isinstance(joined, Uint8Image):
            joined = replace(joined, pixels=joined.pixels.unflatten(0, (-1, n)))
        elif isinstance(joined, Tensor):
            joined = joined.unflatten(0, (-1, n))
        return {**batch, "image": joined, "length": length_B}

    def _read(self, files: list[Path | StoredImage]) -> list[Any]:
        return [self._read_image(file) for file in files]

    def _texts(self, record: dict[str, Any], where: str) -> dict[str, Any]:
        turns = self._turns(record, where)
        require_trainable(turns, len(self._image_files(record, where)), where)
        return {TURNS: turns}

    def _turns(self, record: Mapping[str, Any], where: str) -> list[dict[str, str]]:
        """The turns of a record, of who says what; SampleError for anything else."""
        field = self.info.conversation_field or TURNS
        turns = record.get(field)
        if isinstance(turns, str):
            with errors_as(SampleError, f"{where}: the field {field!r} is not JSON"):
                turns = parse_json(turns)
        if not isinstance(turns, list) or not turns:
            raise SampleError(f"{where}: no turns; the field {field!r} must be a list of them")
        for number, turn in enumerate(turns, start=1):
            place = f"{where}: turn {number}"
            if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
                raise SampleError(f'{place} must be {{"from": who, "value": text}}')
            if turn.get("from") not in SPEAKERS:
                raise SampleError(f"{place} is from {turn.get('from')!r:.40}, neither {' nor '.join(SPEAKERS)}")
        return [{"from": turn["from"], "value": turn["value"]} for turn in turns]

    def _image_files(self, record: dict[str, Any], where: str) -> list[Path | StoredImage]:
        names = record.get(self.info.image_field)
        if not names and (other := next((name for name in MEDIA if record.get(name)), None)):
            text = "is not read; build_info.image_field names the field of the images, and videos are left out"
            raise SampleError(f"{where}: the field {other!r} {text}")
        names = [] if names is None else names if isinstance(names, list) else [names]
        if not all(isinstance(name, StoredImage) or _is_name(name) for name in names):
            raise SampleError(f"{where}: the field {self.info.image_field!r} must be a path, or a list of them")
        return [self._located(name, where) if isinstance(name, str) else name for name in names]


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name) and "\0" not in name


def require_trainable(turns: list[dict[str, str]], images: int, where: str) -> None:
    """SampleError unless each question has an answer, and each image a place in a question.

    A first turn of the assistant answers nothing, and is no part of this. Each `<image>` is one of the images, or a
    single one is all of them; of one image all those in a question are one place, as for LLaVA's own reader.
    """
    first = int(turns[0]["from"] == SPEAKERS[1])
    for number, turn in enumerate(turns[first:]):
        place, speaker, text = f"{where}: turn {first + number + 1}", SPEAKERS[number % 2], turn["value"]
        if turn["from"] != speaker:
            raise SampleError(f"{place} must be from {speaker!r}; question and answer alternate")
        require_readable(text, place)
        if not text.strip():
            raise SampleError(f"{place} is empty")
        if speaker == SPEAKERS[1] and IMAGE_TOKEN in text:
            raise SampleError(f"{place} is an answer with {IMAGE_TOKEN}; images stand in questions")
    if len(turns) - first < 2 or (len(turns) - first) % 2:
        raise SampleError(f"{where}: the last question has no answer")
    counts = [count for turn in turns[first:] if (count := turn["value"].count(IMAGE_TOKEN))]
    if sum(counts) != images and not (images > 1 and counts == [1]) and not (images == 1 and len(counts) == 1):
        found = " + ".join(map(str, counts)) or 0
        raise SampleError(f"{where}: {IMAGE_TOKEN} in the questions: {found}, images of the record: {images}")


def _blank(image: Tensor | Uint8Image | CachedImage) -> Tensor | Uint8Image | CachedImage:
    """What stands for no image, in the form of `image`."""
    if isinstance(image, CachedImage):
        return replace(image, features_QV=torch.zeros_like(image.features_QV), pixels_3SS=None)
    if isinstance(image, Uint8Image):
        return replace(image, pixels=torch.zeros_like(image.pixels))
    return torch.zeros_like(image)
