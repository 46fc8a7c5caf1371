"""From checkpoints to answers: frozen parts load once, each image is encoded once, projections are swapped.

Shapes: B images of U different files, S pixels a side, Q image tokens, V channels before the projection.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minigpt4.common.errors import SampleError
from minigpt4.features import PartialFeatures
from minigpt4.features.cache import FeatureFiller
from minigpt4.inference.checkpoint_switch import CheckpointSwitch
from minigpt4.inference.image_batches import ImageItem, Images, read_batches
from minigpt4.inference.prompt_rules import PromptRules
from minigpt4.models.generation import Answer


class Answerer:
    """Answers about batches of images, with one checkpoint after the other.

    Args:
        model: a `MiniGPT4` on its device, in eval mode.
        keep_features: keep what the frozen vision part gives, for the checkpoints to come; Q x V numbers an image.
        num_workers: processes that read images; 0: none but this one.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Images,
        batches: Sequence[Sequence[int]],
        *,
        keep_features: bool,
        num_workers: int,
    ) -> None:
        self.model, self.data, self.batches = model, data, batches
        self._num_workers = num_workers
        self._features: dict[int, Tensor] = {}
        self._keep = keep_features and model.vision_is_frozen
        self._switch = CheckpointSwitch(model)
        self._filler = FeatureFiller(model)

    def load(self, checkpoint: Path) -> None:
        """Take the trained weights of a checkpoint; WeightsError if they do not fit."""
        self._switch.load(checkpoint)

    @torch.inference_mode()
    def answers(self, rules: PromptRules, wanted: Sequence[int]) -> Iterator[tuple[int, list[Answer]]]:
        """Number of each batch of `wanted`, and its answers in the order of its images.

        Raises SampleError for an image that cannot be read.
        """
        for number, features_UQV in self._batch_features(wanted):
            batch = [self.data.items[place] for place in self.batches[number]]
            embeds_BQD = self.model.project(features_UQV.to(self.model.device))[_places(batch)]
            yield number, rules.answers(self.model, embeds_BQD, [item.image_id for item in batch], batch=number)

    def _batch_features(self, wanted: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """What the projection reads of the different files of each batch, (U, Q, V)."""
        unknown = [number for number in wanted if number not in self._features]
        images = iter(self._images(unknown))
        for number in wanted:
            if number in self._features:
                yield number, self._features[number]
                continue
            features_UQV = self._filler.features(next(images))
            if self._keep:
                self._features[number] = features_UQV.cpu()
            yield number, features_UQV

    def _images(self, wanted: Sequence[int]) -> Iterator[Tensor | PartialFeatures]:
        """The different files of each batch, as pixels (U, 3, S, S) or rows of a cache."""
        batches = [_firsts(self.data.items, self.batches[number]) for number in wanted]
        for batch in read_batches(self.data, batches, self._num_workers):
            if batch.errors:
                raise SampleError(next(iter(batch.errors.values())))
            yield batch.pixels


def _firsts(items: Sequence[ImageItem], batch: Sequence[int]) -> list[int]:
    """The numbers of a batch without those whose file came before: an image is encoded once, whatever is asked."""
    firsts: dict[Path, int] = {}
    for number in batch:
        firsts.setdefault(items[number].file, number)
    return list(firsts.values())


def _places(batch: Sequence[ImageItem]) -> list[int]:
    """The place of each image's file among the different files of its batch."""
    places: dict[Path, int] = {}
    return [places.setdefault(item.file, len(places)) for item in batch]
