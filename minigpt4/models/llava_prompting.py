"""LLaVA's conversations as token sequences: where the images stand, what is learned.

A mask is built beside the ids, piece by piece. It rests on what holds for LLaMA's tokenizer: pieces never reach over a
blank or a line's end, and the blank that it puts before a text is the one between a role and its words.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.llava_schema import LlavaConfig
from minigpt4.conversation.llava import IMAGE_TOKEN, LLAVA_TEMPLATES, SPEAKERS
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER
from minigpt4.models.prompting import Batch, PromptBuilder, Samples, Spans, TokenSequence, collate_prompts

log = logging.getLogger(__name__)

IMAGE_TOKEN_INDEX = -200
"""In the place of an image among token ids, as published."""
HASHES = "###"

Tokens = tuple[list[int], list[bool]]
"""Ids, an image being one, and whether each is trained on."""
Turn = tuple[str, str]
"""Who speaks and what."""


class LlavaPrompts(PromptBuilder):
    """Prompts and training sequences in one of LLaVA's templates.

    Samples that are no `conversations` become question and answer of the template.
    """

    placeholder = IMAGE_TOKEN

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cfg: LlavaConfig) -> None:
        super().__init__(tokenizer, cfg)
        self._hidden = None
        self.template, self.reference_masks = LLAVA_TEMPLATES[cfg.conv_template], cfg.reference_masks
        self.max_length, self.pads_left = cfg.tokenizer_model_max_length, cfg.tokenizer_padding_side == "left"
        self.as_read, self.image = cfg.as_read, cfg.as_read(IMAGE_PLACEHOLDER)
        word, words, blank = self.encode(["a", "a a", "a "])
        self._gap, self._blank = "" if words == word * 2 else " ", blank[len(word) :]
        self._added = set(tokenizer.get_added_vocab().values())
        line, hashes, self._first_hashes = self.encode(["\n", f"\n{HASHES}", HASHES])
        self._hashes = hashes[len(line) :]
        self._end = self.encode([self.template.end])[0]
        self._alternates = self.template.style in ("two", "llama_2", "mpt")
        if self._alternates and len(self._end) != 1:
            end, name = self.template.end, cfg.conv_template
            raise ConfigError(f"model.conv_template: {name} ends answers with {end}, no token of model.llama_model's")

    def split_images(self, prompt: str) -> list[str]:
        """The texts around the images: `<image>`, or what stands for them elsewhere in this program."""
        return self.as_read(prompt).split(IMAGE_TOKEN)

    def training_batch(self, samples: Samples, images: Spans) -> Batch:
        """Conversations, cut to `tokenizer_model_max_length` with their images, on the CPU."""
        if not samples.dialogues:
            return super().training_batch(samples, images)
        rows = [
            self.dialogue_row(turns, own, lambda index=index: samples.name(index))
            for index, (turns, own) in enumerate(zip(samples.dialogues, images, strict=True))
        ]
        if empty := [samples.name(index) for index, row in enumerate(rows) if not row.num_targets]:
            log.warning("Nothing to train on: no answer within tokenizer_model_max_length in %s", ", ".join(empty))
        return collate_prompts(rows, self.tokenizer.pad_token_id, left=self.pads_left)

    def dialogue_row(
        self, dialogue: Sequence[Mapping[str, Any]], images: Sequence[tuple[int, int]], name: Callable[[], str]
    ) -> TokenSequence:
        """One conversation; each of its placeholders is one of the images, or a single one all of them.

        SampleError, with the `name()` of the sample, for turns or placeholders that make no conversation.
        """
        try:
            turns = self._turns(dialogue, len(images))
            ids, train = self.tokens(turns, bool(images))
        except SampleError as error:
            raise SampleError(f"{name()}: {error}") from None
        places = ids.count(IMAGE_TOKEN_INDEX)
        is_unseen = self.reference_masks and not places
        if places not in (len(images), min(1, len(images))) and not is_unseen:
            raise SampleError(f"{name()}: {places} of its turns hold {IMAGE_TOKEN}, but it has {len(images)} images")
        runs = iter([[image] for image in images] if places == len(images) else [images])
        row = TokenSequence().add_text(self.start)
        padding = self.tokenizer.unk_token_id if self.reference_masks else None
        tokens = [token for token in zip(ids, train, strict=True) if token[0] != padding]
        for (is_image, is_trained), group in groupby(tokens, lambda token: (token[0] == IMAGE_TOKEN_INDEX, token[1])):
            own = [token for token, _ in group]
            if not is_image:
                row.add_text(own, train=is_trained)
            for image in (image for _ in own for image in next(runs)) if is_image else ():
                row.add_image(*image)
        return row.cut(self.max_length)

    def tokens(self, turns: Sequence[Turn], has_image: bool) -> Tokens:
        """Ids of a conversation, without what the tokenizer puts before a text, and which of them are trained on."""
        style = self.template.style
        if style != "plain":
            return self._hash_tokens(turns, has_image) if style == "single" else self._chat_tokens(turns, has_image)
        if len(turns) != 2 or IMAGE_TOKEN not in turns[0][1] or not has_image:
            raise SampleError(f"plain takes an image and a caption: two turns, the first with {IMAGE_TOKEN}")
        ids = self._ids(turns[1][1] + self.template.sep, False)
        return [IMAGE_TOKEN_INDEX, *ids], [False] + [True] * len(ids)

    def _turns(self, dialogue: Sequence[Mapping[str, Any]], images: int) -> list[Turn]:
        """Turns that are fit for the template, the image of a question at its front.

        Several places in one question stay among its words, if each place of the conversation is one of several images.
        """
        turns, has_image = [], images > 0
        places = sum(str(turn.get("value")).count(IMAGE_TOKEN) for turn in dialogue if isinstance(turn, Mapping))
        is_interleaved = images > 1 and places == images and not self.reference_masks
        for number, turn in enumerate(dialogue):
            role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
            if not isinstance(role, str) or not isinstance(text, str):
                raise SampleError(f"turn {number} of its conversation must have 'from' and 'value', both texts")
            if role not in SPEAKERS and (self._alternates or not self.reference_masks):
                raise SampleError(f"turn {number} of its conversation is from {role!r:.40}, neither human nor gpt")
            if has_image and IMAGE_TOKEN in text:
                if role == "gpt":
                    raise SampleError(f"turn {number} of its conversation is an answer, and holds {IMAGE_TOKEN}")
                if not is_interleaved or text.count(IMAGE_TOKEN) == 1:
                    text = f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()
                text = text.replace(IMAGE_TOKEN, self.image)
            turns.append((role, text))
        if not self._alternates:
            return turns
        if turns and turns[0][0] == "gpt":
            del turns[0]
        if not turns or any(role != SPEAKERS[number % 2] for number, (role, _) in enumerate(turns)):
            raise SampleError("human and gpt must speak in turn in its conversation")
        return turns

    def _ids(self, text: str, has_image: bool) -> list[int]:
        first, *later = self.encode(text.split(IMAGE_TOKEN) if has_image else [text])
        return first + [token for ids in later for token in (IMAGE_TOKEN_INDEX, *ids)]

    def _answer(self, text: str) -> list[int]:
        """What follows a role, a blank between them included."""
        if not self.template.gap:
            return self._ids(text, False)
        ids = self._ids(self._gap + text, False)
        return self._blank + ids if not self._gap and ids[0] in self._added else ids

    def _chat_tokens(self, turns: Sequence[Turn], has_image: bool) -> Tokens:
        """v1, LLaMA-2, ChatML: answers and their ends are learned; an empty answer and an open end are not."""
        template, ids, train = self.template, [], []

        def add(own: list[int], trained: int) -> None:
            ids.extend(own)
            train.extend([True] * trained + [False] * (len(own) - trained))

        text, ends = template.opening, 0
        for number, (role, value) in enumerate(turns):
            if role == "human":
                text += template.asked(value, number == 0)
                continue
            text += template.answer_role
            if value:
                add(self._ids(text, has_image), ends)
                answer = self._answer(value + template.before_end)
                add(answer, len(answer))
                text, ends = template.end, 1  # the end belongs to the answer
        add(self._ids(text, has_image), ends)
        if self.reference_masks:
            train = self._published_mask(template.prompt([(role == "gpt", text) for role, text in turns]), ids, train)
            if not has_image:
                del ids[self.max_length :], train[self.max_length :]
        return ids, train

    def _published_mask(self, prompt: str, ids: Sequence[int], train: list[bool]) -> list[bool]:
        """The mask where the published code finds as many tokens as there are; else it trains on none.

        It reads rounds, between ends of answers, up to the first that has not exactly one question and answer, and
        compares only where these are shorter than `tokenizer_model_max_length`.
        """
        template = self.template
        mark = "[/INST] " if template.style == "llama_2" else f"{template.sep}{template.answer_role} "
        rounds = prompt.split(template.end)
        good = next((n for n, text in enumerate(rounds) if len(text.split(mark)) != 2), len(rounds))
        ends = [place + 1 for place, token in enumerate(ids) if token == self._end[0]]
        counted = [0, *ends, len(ids) + 1][good]  # an end is counted for the last round, whether or not it has one
        is_compared = len(self.start) + counted < self.max_length
        if is_compared and (counted != len(ids) or self.tokenizer.unk_token_id in ids):
            return [False] * len(ids)
        return [is_trained and place < counted for place, is_trained in enumerate(train)]

    def _hash_tokens(self, turns: Sequence[Turn], has_image: bool) -> Tokens:
        """v0. As published, the mask counts the start token once a message, and so drifts against the ids.

        A question is masked from the third token of where it is thought to be; all else behind the system text is
        learned.
        """
        names = dict(zip(SPEAKERS, self.template.roles, strict=True))
        ids = self._ids(f"{self.template.system}\n\n", False)
        place, masked = len(ids), [(0, len(ids))]
        for role, value in turns:
            text = f"{HASHES} {names.get(role.lower(), 'unknown')}: {value}\n"
            own = self._ids(text, has_image)
            ids += self._hashes + own[len(self._first_hashes) :]
            after = place + len(self.start) + len(own)
            if role == "human":
                masked.append((place + 2, after))
            place = after
        ids += self._hashes + self._ids(f"{HASHES} ", False)[len(self._first_hashes) :]
        return ids, [not any(first <= place < last for first, last in masked) for place in range(len(ids))]
