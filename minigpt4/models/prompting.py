"""What a training batch says to the LLM: LAVIS's `samples`, checked once; prompts in their template, answers with their
end symbol; both as token sequences."""

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.utils import decode, require_readable, require_whole_characters
from minigpt4.models.sequence import (
    IMAGE_PLACEHOLDER,
    Batch,
    TokenSequence,
    answer_row,
    collate_training,
    conversation_row,
    prompt_row,
    split_prompt,
)
from minigpt4.models.tokenizer import end_symbol_ids, hidden_pad_id, start_ids

log = logging.getLogger(__name__)


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


Span = tuple[int, int]
"""First token and number of tokens of one image in the flat list of the batch."""


@dataclass
class PromptBuilder:
    """How samples become token sequences; the fields are those of the `model:` section."""

    tokenizer: PreTrainedTokenizerBase
    prompt_list: Sequence[str]
    prompt_template: str
    chat_template: bool
    max_txt_len: int
    max_context_len: int
    end_sym: str
    truncate_end_sym: bool

    def __post_init__(self) -> None:
        self.start = start_ids(self.tokenizer)
        self._hidden = hidden_pad_id(self.tokenizer)
        self._end_ids_of: dict[str, list[int]] = {}

    def training_batch(self, samples: Samples, images: Sequence[Sequence[Span]]) -> Batch:
        """Prompts and answers of a batch, on the CPU; `images`: where the image tokens of each sample's images are."""
        conditions, answers = self.condition_rows(samples, images), self.answer_rows(samples)
        return collate_training(conditions, answers, self.start, self.tokenizer.pad_token_id)

    def condition_rows(self, samples: Samples, images: Sequence[Sequence[Span]]) -> list[TokenSequence]:
        """What comes before the answer: the prompt with its images, or in stage 1 the image alone, without tags.

        Raises SampleError where a prompt and the images of its sample do not match.
        """
        prompts = self._prompts(samples)
        if prompts is None:
            return [prompt_row([[]] * (len(own) + 1), own).cut(self.max_context_len) for own in images]
        parts = [split_prompt(prompt) for prompt in prompts]
        ids = iter(self.encode([text for texts in parts for text in texts]))
        rows = []
        for index, (texts, own) in enumerate(zip(parts, images, strict=True)):
            try:
                row = prompt_row([next(ids) for _ in texts], own)
            except ValueError as error:
                raise SampleError(f"{samples.name(index)}: {error}") from error
            rows.append(row.cut(self.max_context_len))
        return rows

    def answer_rows(self, samples: Samples) -> list[TokenSequence]:
        """Answers or conversations as targets; raises SampleError for a sample with nothing to train on."""
        if samples.conversations:
            rows = [self._conversation_row(conversation) for conversation in samples.conversations]
        else:
            rows = self._single_answer_rows(samples.answers)
        for index, row in enumerate(rows):
            if not row.num_targets:
                raise SampleError(f"{samples.name(index)}: nothing to train on, its answer and end_sym are empty")
        return rows

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens around it; SampleError for half a character."""
        texts = [require_whole_characters(text, f"the text {text!r:.60}") for text in texts]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _prompts(self, samples: Samples) -> list[str] | None:
        """One prompt a sample, or None; a prompt of the list is drawn once a batch, as published."""
        if samples.conversations:
            return [apply_template(self.prompt_template, c.questions[0]) for c in samples.conversations]
        if samples.instructions is not None:
            template = self.prompt_template if self.chat_template else ""
            return [apply_template(template, text) for text in samples.instructions]
        if self.prompt_list:
            return [random.choice(self.prompt_list)] * len(samples)
        return None

    def _single_answer_rows(self, answers: Sequence[str]) -> list[TokenSequence]:
        end_ids, hidden = self._end_ids(), self._hidden
        rows = [
            answer_row(ids, end_ids, self.max_txt_len, truncate_end=self.truncate_end_sym)
            for ids in self.encode([answer + self.end_sym for answer in answers])
        ]
        return rows if hidden is None else [row.hide_target(hidden) for row in rows]

    def _conversation_row(self, conversation: Conversation) -> TokenSequence:
        answers = self.encode([answer + self.end_sym for answer in conversation.answers])
        later = [apply_template(self.prompt_template, question) for question in conversation.questions[1:]]
        questions = [self.start + ids for ids in self.encode(later)]
        row = conversation_row(
            answers, questions, self._end_ids(), self.max_txt_len, truncate_end=self.truncate_end_sym
        )
        return row if self._hidden is None else row.hide_from_attention(self._hidden)

    def _end_ids(self) -> list[int]:
        if self.end_sym not in self._end_ids_of:
            self._end_ids_of[self.end_sym] = end_symbol_ids(self.tokenizer, self.end_sym)
        ids = self._end_ids_of[self.end_sym]
        if len(ids) >= self.max_txt_len:
            raise ConfigError(f"model.max_txt_len: {self.max_txt_len} leaves no room beside end_sym {self.end_sym!r}")
        return ids


def read_prompts(path: str | None, template: str) -> list[str]:
    """Training instructions of a file, in the template: its lines with an image placeholder, line ends stripped.

    One is drawn and logged, as the published code does, so that a seed gives the published order of prompts.
    """
    if not path:
        return []
    with errors_as(ConfigError, f"model.prompt_path: {path} cannot be read"):
        lines = decode(Path(path).read_bytes()).splitlines()
    for number, line in enumerate(lines, start=1):
        require_readable(line, f"model.prompt_path: {path}, line {number}")
    prompts = [apply_template(template, line) for line in lines if IMAGE_PLACEHOLDER in line]
    if not prompts:
        raise ConfigError(f"model.prompt_path: no line of {path} contains {IMAGE_PLACEHOLDER}")
    log.info("%d training prompts, for example: %s", len(prompts), random.choice(prompts))
    return prompts


def apply_template(template: str, text: str) -> str:
    """`text` in the place of the template's `{}`; an empty template leaves it as it is."""
    return template.format(text) if template else text
