"""The `samples` dictionary that LAVIS-style loaders give to a model, checked once and made plain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigpt4.common.errors import SampleError


@dataclass(frozen=True)
class ImageFeatures:
    """What the projection reads, in the place of pixels wherever a `MiniGPT4` takes images, one image a sample."""

    features: Tensor
    """(B, Q, V)."""

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, chosen: slice) -> "ImageFeatures":
        return ImageFeatures(self.features[chosen])


@dataclass(frozen=True)
class Conversation:
    """Questions and answers of one sample, as many of one as of the other."""

    questions: list[str]
    answers: list[str]


@dataclass(frozen=True)
class Samples:
    """A batch for training; exactly one of `answers` and `conversations` is filled."""

    image: Tensor | ImageFeatures | None
    """(B, 3, S, S) or (B, n, 3, S, S), or features of one image a sample."""

    lengths: list[int] | None
    """Images that exist in each sample, of n."""

    answers: list[str]
    conversations: list[Conversation]
    instructions: list[str] | None
    image_ids: list[Any] | None

    def __len__(self) -> int:
        return len(self.conversations or self.answers)

    @property
    def max_images(self) -> int:
        """Images that `image` has room for in each sample."""
        return self.image.shape[1] if isinstance(self.image, Tensor) and self.image.ndim == 5 else 1

    def name(self, index: int) -> str:
        """What to call a sample in an error."""
        if self.image_ids is None:
            return f"sample {index} of the batch"
        return f"sample {index} of the batch (image_id {self.image_ids[index]})"


def read_samples(samples: Mapping[str, Any]) -> Samples:
    """Check a batch; raises SampleError that names the field."""
    image = samples.get("image")
    answers, conversations = _read_answers(samples), _read_conversations(samples)
    if bool(answers) == bool(conversations):
        raise SampleError(
            f"the samples need either 'answer' or 'conv_q' and 'conv_a'; they have {', '.join(sorted(samples))}"
        )
    count = len(conversations or answers)
    instructions = samples.get("instruction_input")
    if isinstance(instructions, str):
        instructions = [instructions] * count
    fields = {"image": image, "instruction_input": instructions, "length": samples.get("length")}
    for name, value in fields.items():
        if value is not None and len(value) != count:
            raise SampleError(f"{name}: {len(value)} entries for {count} samples")
    lengths = _read_lengths(samples, image, count)
    image_ids = _read_image_ids(samples.get("image_id"), count)
    return Samples(image, lengths, answers, conversations, instructions, image_ids)


def _read_answers(samples: Mapping[str, Any]) -> list[str]:
    answers = samples.get("answer", [])
    return [answers] if isinstance(answers, str) else list(answers)


def _read_conversations(samples: Mapping[str, Any]) -> list[Conversation]:
    if "conv_q" not in samples:
        return []
    try:
        mark = _first(samples["connect_sym"])
        pairs = list(zip(samples["conv_q"], samples["conv_a"], strict=True))
    except KeyError as error:
        raise SampleError(f"a batch with 'conv_q' also needs {error}") from error
    except ValueError as error:
        raise SampleError("conv_a: not as many entries as conv_q") from error
    return [
        _read_conversation(index, questions.split(mark), answers.split(mark))
        for index, (questions, answers) in enumerate(pairs)
    ]


def _read_conversation(index: int, questions: list[str], answers: list[str]) -> Conversation:
    if len(questions) != len(answers):
        raise SampleError(
            f"sample {index} of the batch: {len(questions)} questions in conv_q, {len(answers)} answers in conv_a"
        )
    return Conversation(questions, answers)


def _first(value: str | Sequence[str]) -> str:
    return value if isinstance(value, str) else value[0]


def _read_lengths(samples: Mapping[str, Any], image: Tensor | ImageFeatures | None, count: int) -> list[int] | None:
    if samples.get("length") is None:
        return None
    if not isinstance(image, Tensor) or image.ndim != 5:
        raise SampleError("length: needs image of shape (B, n, 3, S, S)")
    lengths = torch.as_tensor(samples["length"]).tolist()
    for index, length in enumerate(lengths):
        if not 0 <= length <= image.shape[1]:
            raise SampleError(
                f"length: {length} images in sample {index} of the batch, but image holds {image.shape[1]}"
            )
    return lengths


def _read_image_ids(value: Any, count: int) -> list[Any] | None:
    if value is None:
        return None
    ids = value.tolist() if isinstance(value, Tensor) else list(value)
    return ids if len(ids) == count else None
