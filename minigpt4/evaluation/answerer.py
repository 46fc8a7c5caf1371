"""From checkpoints to answers: frozen parts load once, each image is encoded once, projections are swapped.

Shapes: B images of U different files, S pixels a side, Q image tokens, V channels before the projection.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.rng import seed_everything
from minigpt4.common.schemas.generation import GenerationSettings
from minigpt4.common.schemas.model import MiniGPT4Config
from minigpt4.conversation import prompt_template_from_tokenizer
from minigpt4.models.generation import Answer, Decoding
from minigpt4.models.sequence import IMAGE_PLACEHOLDER
from minigpt4.models.tokenizer import load_tokenizer
from minigpt4.models.training_text import apply_template, read_prompts

log = logging.getLogger(__name__)

DECODING_FIELDS = tuple(field.name for field in dataclasses.fields(Decoding))


class ImageItem(Protocol):
    """One image that is asked about."""

    @property
    def image_id(self) -> str: ...

    @property
    def file(self) -> Path: ...


class Images(Protocol):
    """What can be asked about, such as `CaptionData`."""

    @property
    def items(self) -> Sequence[ImageItem]: ...

    def images(self, numbers: Sequence[int]) -> Tensor:
        """Pixels of several images, (B, 3, S, S) float32; SampleError for one that cannot be read."""


@dataclass(frozen=True)
class PromptRules:
    """What is said to the model and how its answers are decoded, the same for all checkpoints."""

    decoding: Decoding
    prompt: str
    """The whole prompt, in the model's template."""

    stop: list[str]
    seed: int
    """Of sampling."""

    own_prompts: Mapping[str, str] = field(default_factory=dict)
    """Prompts, in the model's template, of images that have one of their own, by image id."""

    @classmethod
    def of(
        cls, model: MiniGPT4Config, settings: GenerationSettings, seed: int, key: str = "run.generation.prompt"
    ) -> "PromptRules":
        """The rules of a configuration; ConfigError, which names `key`, for a prompt without an image."""
        stop = settings.stop if settings.stop is not None else [model.end_sym] if model.end_sym else []
        decoding = Decoding(**{name: getattr(settings, name) for name in DECODING_FIELDS})
        return cls(decoding, whole_prompt(model, settings.prompt, key), list(stop), seed)


def whole_prompt(model: MiniGPT4Config, instruction: str | None, key: str) -> str:
    """The prompt of all images: `instruction`, or the first of the prompt file, or the image alone."""
    template = model.prompt_template
    if template == "tokenizer":
        template = prompt_template_from_tokenizer(load_tokenizer(model.llm_directory()))
    if instruction is None:
        prompts = read_prompts(model.prompt_path, template)
        return prompts[0] if prompts else IMAGE_PLACEHOLDER
    if instruction.count(IMAGE_PLACEHOLDER) != 1:
        raise ConfigError(f"{key}: {instruction!r} must hold {IMAGE_PLACEHOLDER} exactly once")
    return apply_template(template, instruction)


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
        self._start = {name: p.detach().clone() for name, p in model.trainable_parameters().items()}

    def load(self, checkpoint: Path) -> None:
        """Take the trained weights of a checkpoint; WeightsError if they do not fit."""
        with torch.no_grad():  # a tensor that this file may leave out must not be that of the file before
            for name, parameter in self.model.trainable_parameters().items():
                parameter.copy_(self._start[name])
        self.model.load_checkpoint(checkpoint)

    @torch.inference_mode()
    def answers(self, rules: PromptRules, wanted: Sequence[int]) -> Iterator[tuple[int, list[Answer]]]:
        """Number of each batch of `wanted`, and its answers in the order of its images.

        Raises SampleError for an image that cannot be read.
        """
        for number, features_UQV in self._batch_features(wanted):
            batch = [self.data.items[place] for place in self.batches[number]]
            embeds_BQD = self.model.project(features_UQV.to(self.model.device))[_places(batch)]
            if rules.decoding.do_sample:
                seed_everything(rules.seed + number)  # whichever process draws, and whatever it drew before
            images = [[embeds_1QD] for embeds_1QD in embeds_BQD.split(1)]
            prompts = [rules.own_prompts.get(item.image_id, rules.prompt) for item in batch]
            yield number, self.model.answers_from_embeds(images, prompts, rules.decoding, rules.stop)

    def _batch_features(self, wanted: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """What the projection reads of the different files of each batch, (U, Q, V)."""
        unknown = [number for number in wanted if number not in self._features]
        images = iter(self._images(unknown))
        for number in wanted:
            if number in self._features:
                yield number, self._features[number]
                continue
            features_UQV = self.model.image_features(next(images))
            if self._keep:
                self._features[number] = features_UQV.cpu()
            yield number, features_UQV

    def _images(self, wanted: Sequence[int]) -> Iterator[Tensor]:
        """Pixels of the different files of each batch, (U, 3, S, S)."""
        sheets = _Sheets(self.data, [_firsts(self.data.items, self.batches[number]) for number in wanted])
        loader = DataLoader(
            sheets,
            batch_size=None,
            num_workers=min(self._num_workers, len(sheets)),
            collate_fn=_unchanged,
            generator=torch.Generator().manual_seed(0),  # the global one belongs to sampling
        )
        for images in loader:
            if isinstance(images, str):
                raise SampleError(images)
            yield images


class _Sheets(torch.utils.data.Dataset):
    """Batches of images by index; the text of the error in place of a batch that cannot be read."""

    def __init__(self, data: Images, batches: Sequence[Sequence[int]]) -> None:
        self.data, self.batches = data, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.data.images(self.batches[index])
        except SampleError as error:
            return str(error)


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


def _unchanged(images: Tensor | str) -> Tensor | str:
    return images
