"""What a training batch says to the LLM: LAVIS's `samples`, checked, as token sequences.

The four lists of a `TokenSequence` grow together, so that a mask or a target cannot drift from its token.
Shapes: B rows, T positions, D channels of the LLM, M image tokens of the batch.
"""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from minigpt4.common.devices import to_device
from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.common.utils import decode, require_readable, require_whole_characters
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER, prompt_template_from_tokenizer
from minigpt4.models.tokenizer import end_symbol_ids, hidden_pad_id, start_ids

log = logging.getLogger(__name__)

Spans = Sequence[Sequence[tuple[int, int]]]
"""First token and number of tokens, in the flat list of the batch, of each sample's images."""
IGNORE = -100
"""Target of a position that is not trained on."""
NO_IMAGE = -1


@dataclass
class TokenSequence:
    """One sequence: token ids, targets, attention, and which image token (if any) stands at each position."""

    ids: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    attend: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, other: "TokenSequence") -> "TokenSequence":
        for name, values in vars(self).items():
            values += getattr(other, name)
        return self

    def add_text(self, ids: Sequence[int], *, train: bool = False) -> "TokenSequence":
        """Append tokens, as targets if `train`."""
        count = len(ids)
        targets = ids if train else [IGNORE] * count
        return self.add(TokenSequence(ids, targets, [1] * count, [NO_IMAGE] * count))

    def add_image(self, start: int, count: int) -> "TokenSequence":
        """Append image tokens from `start` of the batch's flat list."""
        return self.add(TokenSequence([0] * count, [IGNORE] * count, [1] * count, range(start, start + count)))

    def cut(self, length: int) -> "TokenSequence":
        for values in vars(self).values():
            del values[length:]
        return self

    def hide_target(self, token_id: int) -> "TokenSequence":
        """Do not train on `token_id` (the published rule for single answers)."""
        self.targets = [IGNORE if target == token_id else target for target in self.targets]
        return self

    def hide_from_attention(self, token_id: int) -> "TokenSequence":
        """Do not attend to `token_id` (the published rule for conversations, which keep it as a target)."""
        self.attend = [int(id_ != token_id) for id_ in self.ids]
        return self

    @property
    def num_targets(self) -> int:
        return sum(target != IGNORE for target in self.targets)


@dataclass
class Batch:
    """Rows of one length. All tensors are int64 on the CPU until `to`."""

    ids_BT: Tensor
    attention_mask_BT: Tensor
    targets_BT: Tensor
    image_at: tuple[Tensor, Tensor]
    """Row and column of every position that an image token takes, (M',) each."""
    image_source: Tensor
    """Index of that image token in the flat list, (M',)."""
    lengths_B: Tensor
    """Positions of each row before padding on the right, or after padding on the left."""

    @property
    def num_targets(self) -> int:
        """Positions trained on; reads the targets, so ask before `to` moves them to a GPU."""
        return int((self.targets_BT != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        values = {name: to_device(value, device) for name, value in vars(self).items() if name != "image_at"}
        return Batch(image_at=tuple(to_device(index, device) for index in self.image_at), **values)


def answer_row(
    answers: Sequence[list[int]],
    questions: Sequence[list[int]],
    end_ids: list[int],
    max_len: int,
    *,
    truncate_end: bool,
) -> TokenSequence:
    """answer, question, answer, ... of at most `max_len` tokens, answers as targets.

    Wherever it is cut, it ends in an answer with its end symbol; with `truncate_end`, as published, just there.
    """
    row = TokenSequence()
    for turn, (question, answer) in enumerate(zip([(), *questions], answers, strict=True)):
        room = max_len - len(row) - len(question)
        if turn and not truncate_end and room <= len(end_ids):
            return row
        row.add_text(question)
        if not truncate_end and len(answer) > room:
            return row.add_text(answer[: room - len(end_ids)] + end_ids, train=True)
        row.add_text(answer, train=True)
    return row.cut(max_len)


def collate_training(
    conditions: Sequence[TokenSequence], answers: Sequence[TokenSequence], start: Sequence[int], pad_id: int
) -> Batch:
    """`start` (bos), condition, answer, padding on the right.

    T is len(start) + longest condition + longest answer, as published: it enters the loss with `reduction="none"`.
    """
    width = len(start) + max(map(len, conditions)) + max(map(len, answers))
    pairs = zip(conditions, answers, strict=True)
    rows = [TokenSequence().add_text(start).add(condition).add(answer) for condition, answer in pairs]
    return collate_prompts(rows, pad_id, left=False, width=width)


def collate_prompts(
    rows: Sequence[TokenSequence], pad_id: int, *, left: bool = True, width: int | None = None
) -> Batch:
    """Rows of different lengths, padded to `width`, or the longest, on the left for generation, or on the right."""
    width = width or max(map(len, rows))

    def padded(name: str, fill: int) -> Tensor:
        lists = [getattr(row, name) for row in rows]
        gaps = [[fill] * (width - len(own)) for own in lists]
        full = [gap + own if left else own + gap for own, gap in zip(lists, gaps, strict=True)]
        return torch.tensor(full, dtype=torch.long)

    images_BT = padded("images", NO_IMAGE)
    image_at = (images_BT != NO_IMAGE).nonzero(as_tuple=True)
    texts = padded("ids", pad_id), padded("attend", 0), padded("targets", IGNORE)
    return Batch(*texts, image_at, images_BT[image_at], torch.tensor([len(row) for row in rows]))


def embed(batch: Batch, embedding: nn.Module, image_tokens_MD: Tensor | None) -> Tensor:
    """(B, T, D) in the dtype of the embedding table: token embeddings with the image tokens in their places."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and embedding.weight.requires_grad):
        embeds_BTD = embedding(batch.ids_BT)
    if image_tokens_MD is None or not len(batch.image_source):
        return embeds_BTD
    placed = image_tokens_MD.to(embeds_BTD.dtype)[batch.image_source]
    return embeds_BTD.index_put(batch.image_at, placed)


def target_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """Row and column (N,) of every position whose next token is a target, in order."""
    return (batch.targets_BT[:, 1:] != IGNORE).nonzero(as_tuple=True)


@dataclass(frozen=True)
class ImageFeatures:
    """What the projection reads, in the place of pixels wherever a `MiniGPT4` takes images."""

    features: Tensor
    """(B, Q, V), one image a sample, or with `length` beside it (B, n, Q, V)."""

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, chosen: slice) -> "ImageFeatures":
        return ImageFeatures(self.features[chosen])


@dataclass(frozen=True)
class Samples:
    """A batch for training; exactly one of `answers`, `conversations` and `dialogues` is filled."""

    image: Tensor | ImageFeatures | None
    """(B, 3, S, S) or (B, n, 3, S, S), or features of as many images."""
    lengths: list[int] | None
    """Images that exist in each sample, of n."""
    answers: list[str]
    conversations: list[tuple[list[str], list[str]]]
    """Questions and answers of each sample, as many of one as of the other."""
    instructions: list[str] | None
    image_ids: list[Any] | None
    dialogues: list[Sequence[Mapping[str, Any]]] = field(default_factory=list)
    """Turns of each sample as LLaVA's files have them."""

    def __len__(self) -> int:
        return len(self.dialogues or self.conversations or self.answers)

    def name(self, index: int) -> str:
        if self.image_ids is None:
            return f"sample {index} of the batch"
        return f"sample {index} of the batch (image_id {self.image_ids[index]})"


def read_samples(samples: Mapping[str, Any]) -> Samples:
    """Check a batch; raises SampleError that names the field."""
    image, answers = samples.get("image"), samples.get("answer", [])
    answers = [answers] if isinstance(answers, str) else list(answers)
    conversations = _read_conversations(samples) if "conv_q" in samples else []
    dialogues = list(samples.get("conversations", []))
    if [bool(answers), bool(conversations), bool(dialogues)].count(True) != 1:
        known = "'answer', or 'conv_q' and 'conv_a', or 'conversations'"
        raise SampleError(f"the samples need either {known}; they have {', '.join(sorted(samples))}")
    count = len(dialogues or conversations or answers)
    instructions, lengths = samples.get("instruction_input"), samples.get("length")
    if isinstance(instructions, str):
        instructions = [instructions] * count
    for name, value in {"image": image, "instruction_input": instructions, "length": lengths}.items():
        if value is not None and len(value) != count:
            raise SampleError(f"{name}: {len(value)} entries for {count} samples")
    if lengths is not None:
        lengths = torch.as_tensor(lengths).tolist()
        ndim, stacked = (4, image.features) if isinstance(image, ImageFeatures) else (5, image)
        if not isinstance(stacked, Tensor) or stacked.ndim != ndim:
            raise SampleError("length: needs image of shape (B, n, 3, S, S)")
        room = stacked.shape[1]
        for index, length in enumerate(lengths):
            if not 0 <= length <= room:
                raise SampleError(f"length: {length} images in sample {index} of the batch, but image holds {room}")
    ids = samples.get("image_id")
    ids = ids.tolist() if isinstance(ids, Tensor) else list(ids or [])
    ids = ids if len(ids) == count else None
    return Samples(image, lengths, answers, conversations, instructions, ids, dialogues)


def _read_conversations(samples: Mapping[str, Any]) -> list[tuple[list[str], list[str]]]:
    try:
        mark = samples["connect_sym"]
        mark = mark if isinstance(mark, str) else mark[0]
        pairs = list(zip(samples["conv_q"], samples["conv_a"], strict=True))
    except KeyError as error:
        raise SampleError(f"a batch with 'conv_q' also needs {error}") from error
    except ValueError as error:
        raise SampleError("conv_a: not as many entries as conv_q") from error
    conversations = [(questions.split(mark), answers.split(mark)) for questions, answers in pairs]
    for index, (questions, answers) in enumerate(conversations):
        if len(questions) != len(answers):
            counts = f"{len(questions)} questions in conv_q, {len(answers)} answers in conv_a"
            raise SampleError(f"sample {index} of the batch: {counts}")
    return conversations


class PromptBuilder:
    """How samples become token sequences; attributes with the names of keys of `model:` may be set later."""

    placeholder = IMAGE_PLACEHOLDER
    """What stands for an image in a prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cfg: MiniGPT4Config) -> None:
        template = cfg.prompt_template
        self.prompt_template = prompt_template_from_tokenizer(tokenizer) if template == "tokenizer" else template
        self.prompt_list = read_prompts(cfg.prompt_path, self.prompt_template)
        self.chat_template = cfg.chat_template
        self.max_txt_len, self.max_context_len = cfg.max_txt_len, cfg.max_context_len
        self.end_sym, self.truncate_end_sym = cfg.end_sym, cfg.truncate_end_sym
        self.tokenizer, self.start = tokenizer, start_ids(tokenizer)
        self._hidden = hidden_pad_id(tokenizer)
        self._end_ids_of: dict[str, list[int]] = {}

    def training_batch(self, samples: Samples, images: Spans) -> Batch:
        """Prompts and answers of a batch, on the CPU; `images`: where the image tokens of each sample's images are."""
        if samples.dialogues:
            raise SampleError("'conversations' are read by a model of arch: llava; others take 'conv_q' and 'conv_a'")
        conditions, answers = self.condition_rows(samples, images), self.answer_rows(samples)
        return collate_training(conditions, answers, self.start, self.tokenizer.pad_token_id)

    def condition_rows(self, samples: Samples, images: Spans) -> list[TokenSequence]:
        """What comes before the answer: the prompt with its images, or in stage 1 the image alone, without tags.

        Raises SampleError where a prompt and the images of its sample do not match.
        """
        if (prompts := self._prompts(samples)) is not None:
            rows = self.prompt_rows(prompts, images, samples.name)
        else:
            rows = [TokenSequence() for _ in images]
            for row, own in zip(rows, images, strict=True):
                for image in own:
                    row.add_image(*image)
        return [row.cut(self.max_context_len) for row in rows]

    def prompt_rows(
        self, prompts: Sequence[str], images: Spans, name: Callable[[int], str], start: Sequence[int] = ()
    ) -> list[TokenSequence]:
        """`start`, then the text of each prompt with its images in the places that it has for them.

        Raises SampleError, with the `name` of the prompt, where there are not as many images as places.
        """
        parts = [self.split_images(prompt) for prompt in prompts]
        ids = iter(self.encode([text for texts in parts for text in texts]))
        rows = []
        for index, (texts, own) in enumerate(zip(parts, images, strict=True)):
            if len(texts) != len(own) + 1:
                places = f"the prompt has {len(texts) - 1} {self.placeholder}, but {len(own)} images were given"
                raise SampleError(f"{name(index)}: {places}")
            row = TokenSequence().add_text(start)
            for image in own:
                row.add_text(next(ids)).add_image(*image)
            rows.append(row.add_text(next(ids)))
        return rows

    def split_images(self, prompt: str) -> list[str]:
        """The texts around the images of a prompt, one more than it has places for them."""
        return prompt.split(IMAGE_PLACEHOLDER)

    def answer_rows(self, samples: Samples) -> list[TokenSequence]:
        """Answers or conversations as targets; raises SampleError for a sample with nothing to train on."""
        rows = []
        for questions, answers in samples.conversations or [([""], [answer]) for answer in samples.answers]:
            later = self.encode([apply_template(self.prompt_template, question) for question in questions[1:]])
            ids, ends = self.encode([answer + self.end_sym for answer in answers]), self._end_ids()
            turns = [self.start + own for own in later]
            row = answer_row(ids, turns, ends, self.max_txt_len, truncate_end=self.truncate_end_sym)
            if self._hidden is not None:
                hide = row.hide_from_attention if samples.conversations else row.hide_target
                hide(self._hidden)
            rows.append(row)
        for index, row in enumerate(rows):
            if not row.num_targets:
                raise SampleError(f"{samples.name(index)}: nothing to train on, its answer and end_sym are empty")
        return rows

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens around it; SampleError for half a character."""
        try:
            return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        except (UnicodeEncodeError, TypeError):  # what the two kinds of tokenizers say to a lone surrogate
            for text in texts:
                require_whole_characters(text, f"the text {text!r:.60}")
            raise

    def _prompts(self, samples: Samples) -> list[str] | None:
        """One prompt a sample, or None; a prompt of the list is drawn once a batch, as published."""
        if samples.conversations:
            return [apply_template(self.prompt_template, asked[0]) for asked, _ in samples.conversations]
        if samples.instructions is not None:
            template = self.prompt_template if self.chat_template else ""
            return [apply_template(template, text) for text in samples.instructions]
        if self.prompt_list:
            return [random.choice(self.prompt_list)] * len(samples)
        return None

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
