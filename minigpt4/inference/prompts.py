"""What is said to the model and how its answers are decoded."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.binding import bind
from minigpt4.common.dist_utils import seed_everything
from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.common.schemas import GenerationSettings
from minigpt4.conversation import prompt_template_from_tokenizer
from minigpt4.conversation.decoding import Answer, Decoding
from minigpt4.models.prompting import apply_template, read_prompts
from minigpt4.models.sequence import IMAGE_PLACEHOLDER
from minigpt4.models.tokenizer import load_tokenizer

# One model, several checkpoints: the trained weights are swapped, the frozen parts stay.


class CheckpointSwitch:
    """Swaps the trained weights of a model, and remembers those that were given a name.

    Args:
        model: a `MiniGPT4` with the trained weights that it starts from.
        start: their name.
    """

    def __init__(self, model: Any, start: str = "start") -> None:
        self.model, self._start = model, start
        self._kept = {start: self._copy()}
        self._current: str | None = start

    @property
    def names(self) -> list[str]:
        """The checkpoints that are remembered, the start first."""
        return list(self._kept)

    def name(self, wanted: str | None) -> str:
        """A checkpoint's name, the start's for None; ConfigError if there is no such checkpoint."""
        if wanted is None:
            return self._start
        if wanted not in self._kept:
            raise ConfigError(f"there is no checkpoint '{wanted}'; there are: {', '.join(self.names)}")
        return wanted

    def load(self, checkpoint: str | Path) -> None:
        """Take the trained weights of a file; WeightsError, and the weights as before, if they do not fit.

        A weight that the file may leave out is that of the start, never that of the checkpoint before.
        """
        before = self._copy()
        try:
            self._restore(self._kept[self._start])
            self.model.load_checkpoint(checkpoint)
        except BaseException:
            self._restore(before)
            raise
        self._current = None

    def keep(self, name: str) -> None:
        """Remember under this name what the model holds now."""
        self._kept[name] = self._copy()
        self._current = name

    def use(self, name: str) -> None:
        """Go back to weights that are remembered."""
        if name != self._current:
            self._restore(self._kept[name])
            self._current = name

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().to("cpu", copy=True) for name, p in self.model.trainable_parameters().items()}

    @torch.no_grad()
    def _restore(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.model.trainable_parameters().items():
            parameter.copy_(weights[name])


DECODING_FIELDS = tuple(field.name for field in dataclasses.fields(Decoding))


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

    @torch.inference_mode()
    def answers(
        self, model: nn.Module, embeds_BQD: Tensor, image_ids: Sequence[str] = (), *, batch: int | None = None
    ) -> list[Answer]:
        """What the model says about the images of a batch, one answer an image.

        Args:
            model: a `MiniGPT4`.
            embeds_BQD: its image tokens, one row an image.
            image_ids: of the images; needed where images have prompts of their own.
            batch: number of the batch, which seeds sampling with `seed`: whichever process draws, and whatever it drew
                before. None: sampling goes on in torch's own random stream.
        """
        if self.decoding.do_sample and batch is not None:
            seed_everything(self.seed + batch)
        images = [[embeds_1QD] for embeds_1QD in embeds_BQD.split(1)]
        prompts = [self.own_prompts.get(image_id, self.prompt) for image_id in image_ids or [""] * len(images)]
        return model.answers_from_embeds(images, prompts, self.decoding, self.stop)

    def facts(self) -> dict[str, Any]:
        """All that answers depend on, plain types; the seed where it matters."""
        own = {"own_prompts": dict(self.own_prompts)} if self.own_prompts else {}
        return own | {
            "decoding": dataclasses.asdict(self.decoding),
            "prompt": self.prompt,
            "stop": self.stop,
            "seed": self.seed if self.decoding.do_sample else None,
        }


def changed_settings(settings: GenerationSettings, changes: Mapping[str, Any], source: str) -> GenerationSettings:
    """`settings` with other values; ConfigError, which names `source`, for an unknown name or a wrong value."""
    return bind(GenerationSettings, dataclasses.asdict(settings) | dict(changes), section="decoding", source=source)


def whole_prompt(model: MiniGPT4Config, instruction: str | None, key: str) -> str:
    """The prompt of all images: `instruction`, or the first of the prompt file, or the image alone."""
    template = model.prompt_template
    if template == "tokenizer":
        template = _template_of(model.llm_directory())
    if instruction is None:
        prompts = read_prompts(model.prompt_path, template)
        return prompts[0] if prompts else IMAGE_PLACEHOLDER
    if instruction.count(IMAGE_PLACEHOLDER) != 1:
        raise ConfigError(
            f"{key}: {instruction!r} must hold {IMAGE_PLACEHOLDER} exactly once, where the image belongs, for instance "
            f"'<Img>{IMAGE_PLACEHOLDER}</Img> What is this?'"
        )
    return apply_template(template, instruction)


@functools.cache  # every call of the Python API asks for it, and a tokenizer takes a while to load
def _template_of(directory: Path) -> str:
    return prompt_template_from_tokenizer(load_tokenizer(directory))
