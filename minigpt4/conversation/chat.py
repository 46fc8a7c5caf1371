"""Talking about images: one conversation, the images that were shown, and whoever runs the model.

chat = Chat(engine)
chat.show(image)
print(chat.ask("What is unusual about this image?"))
for piece in chat.stream("Tell me more."):
    print(piece, end="")
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER, Turns

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


# How an answer is searched for, and what came of it; plain data, without torch.


@dataclass(frozen=True)
class Decoding:
    """How an answer is searched for; the defaults are those of the published `generate`."""

    num_beams: int = 1
    max_new_tokens: int = 20
    min_length: int = 1
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    temperature: float = 1.0
    do_sample: bool = False

    def __post_init__(self) -> None:
        for name in ("num_beams", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.do_sample and self.temperature <= 0:
            raise ConfigError("temperature: must be above 0; for the most likely answer set do_sample to False")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: {self.top_p} must be in (0, 1]")
        if self.repetition_penalty <= 0:
            raise ConfigError(f"repetition_penalty: {self.repetition_penalty} must be above 0")


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    ended: bool | None
    """True: an end token or a stop string came; False: the token limit did; None: nobody wrote it down."""


# What a conversation asks of whoever runs the model, and what it gets back.


@dataclass(frozen=True, eq=False)
class Picture:
    """An image that was shown."""

    image_id: str
    """Hash of its pixels: the same image has the same id, and is encoded once."""
    pixels_3SS: "Tensor"
    """Float32, as the model reads them."""


@dataclass(frozen=True)
class Request:
    """An answer that is wanted."""

    conversation: Turns
    """Ends in an open answer."""
    pictures: Sequence[Picture]
    """One for each placeholder of the conversation, in their order."""
    decoding: Decoding
    stop: Sequence[str] = ()
    """Ends of the answer besides the conversation's own."""
    checkpoint: str | None = None
    """Name of the checkpoint that answers; None: the first."""
    seed: int | None = None
    """Of this answer's sampling; None: unlike any other."""
    timeout: float | None = None
    """Seconds from the request to the last word; None: as long as it takes."""


class Reply(Protocol):
    """An answer in the making; iterate over its pieces, which joined are the answer."""

    prompt_tokens: int
    """Positions that the prompt takes, images included; 0 until it was read."""
    completion_tokens: int
    dropped_turns: int
    """Oldest turns that did not fit into the LLM's context."""
    finish_reason: str | None
    """None while it goes on; "stop": the model ended it; "length": the token limit did; "cancelled"."""

    def __iter__(self) -> Iterator[str]: ...

    def close(self) -> None:
        """No further words are wanted; returns at once, and does nothing to an answer that has ended."""


class Backend(Protocol):
    """Who runs the model."""

    @property
    def context_length(self) -> int:
        """Positions that the LLM reads, prompt and answer together."""

    def look(self, image: "Image.Image") -> Picture:
        """The image as the model reads it."""

    def new_conversation(self) -> Turns:
        """An empty conversation in the model's template."""

    def submit(self, request: Request) -> Reply:
        """Ask for an answer. Errors of the request come when the reply is read."""


# From what the LLM generated to the answer that a person reads; pure functions on text.


def clean_generated(text: str) -> str:
    """The answer in decoded text of `model.generate`.

    What follows `</s>` is cut off, `<s>` is removed, of a prompt that was repeated only what follows the
    last `[/INST]` stays, and blanks at both ends go.
    """
    return _after_last(_before_first(text, "</s>").replace("<s>", ""), "[/INST]").strip()


def clean_answer(text: str, end: str = "###", start: str = "Assistant:") -> str:
    """The assistant's turn in decoded text of a chat.

    What follows the first `end` is cut off, of a prompt that was repeated only what follows the last
    `start` stays, and blanks at both ends go. An empty mark cuts nothing. A conversation's marks are its
    `answer_end` and `answer_start`; the defaults are those of Vicuna v0.
    """
    return _after_last(_before_first(text, end), start).strip()


def _before_first(text: str, mark: str) -> str:
    return text.split(mark, 1)[0] if mark else text


def _after_last(text: str, mark: str) -> str:
    return text.rsplit(mark, 1)[-1] if mark else text


# An answer as it is read while it grows: nothing that was said is taken back.


_END, _BEGIN = "</s>", "<s>"  # LLMs also write these two as plain text
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Cuts growing text into pieces that are final.

    The pieces joined are the answer: up to the first stop string or `</s>`, without `<s>`, without a repeated
    `answer_start` at the beginning and blanks at both ends. What may still become part of a mark waits, and so do
    characters of which some bytes are missing.
    """

    def __init__(self, stop: Sequence[str] = (), answer_start: str = "") -> None:
        self.said = ""
        self._ends = [*filter(None, stop), _END]
        self._answer_start = answer_start

    def feed(self, text: str) -> str:
        """The new piece, possibly "", now that the whole text so far is `text`."""
        return self._say(self._certain(text))

    def finish(self, text: str) -> str:
        """The last piece; `text` is whole."""
        return self._say(self._without_start(self._cut(text).replace(_BEGIN, "").strip()).strip())

    def _say(self, readable: str) -> str:
        piece = readable[len(self.said) :]
        self.said += piece
        return piece

    def _certain(self, text: str) -> str:
        cut = self._cut(text)
        if len(cut) == len(text):
            cut = _without_beginning_of(cut.rstrip(_INCOMPLETE), [*self._ends, _BEGIN])
        readable = cut.replace(_BEGIN, "").strip()
        if self._answer_start.startswith(readable):
            return ""
        return self._without_start(readable).strip()

    def _cut(self, text: str) -> str:
        return text[: min((text.find(end) for end in self._ends if end in text), default=len(text))]

    def _without_start(self, text: str) -> str:
        return text.removeprefix(self._answer_start)


def _without_beginning_of(text: str, marks: Sequence[str]) -> str:
    """`text` without the longest ending that begins one of the marks."""
    longest = max((n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
    return text[: len(text) - longest]


# Conversations that outgrow the LLM's context: the oldest turns go, images stay.


def fit(conversation: Turns, length: Callable[[str], int], max_new_tokens: int, context: int) -> tuple[Turns, int]:
    """The conversation as the LLM can read it, and how many of its oldest turns were left out.

    Args:
        length: positions that a prompt takes, images included.
        context: positions that prompt and answer may take together.

    Raises SampleError if the last question does not fit by itself.
    """

    def needed(turns: int) -> int:
        return length(conversation.without_oldest(turns).get_prompt()) + max_new_tokens

    every = range(conversation.num_answered + 1)
    dropped = bisect_left(every, True, key=lambda turns: needed(turns) <= context)
    if dropped == len(every):
        raise SampleError(
            f"the question and its images take {needed(every[-1]) - max_new_tokens} positions and the answer may take "
            f"{max_new_tokens}, but this LLM reads {context} in all: ask a shorter question, show fewer images, or "
            "lower the maximum of new tokens"
        )
    return conversation.without_oldest(dropped), dropped


PUBLISHED_CHAT = Decoding(max_new_tokens=300, do_sample=True, top_p=0.9, repetition_penalty=1.05)
"""How the published demo answers."""

GREEDY = Decoding(max_new_tokens=300)


@dataclass
class Chat:
    """One conversation.

    Fields:
        backend: runs the model, such as an `Engine`.
        conversation: what was said; by default empty, in the model's template.
        pictures: the images that were shown, in the order of the conversation's placeholders.
        checkpoint: name of the checkpoint that answers; None: the backend's first.
        timeout: seconds that an answer may take, waiting included; then reading it raises a TimeoutError.
        reply: the answer that was asked for last: tokens, turns that were left out, how it ended.
    """

    backend: Backend
    conversation: Turns | None = None
    pictures: list[Picture] = field(default_factory=list)
    checkpoint: str | None = None
    timeout: float | None = None
    reply: Reply | None = None

    def __post_init__(self) -> None:
        if self.conversation is None:
            self.conversation = self.backend.new_conversation()

    def show(self, image: "Image.Image") -> str:
        """The user shows an image; the next question is about it, and about those before. Returns its id."""
        picture = self.backend.look(image)
        self.pictures.append(picture)
        self.conversation.add_image()
        return picture.image_id

    def ask(self, question: str, decoding: Decoding = GREEDY) -> str:
        """The whole answer of `stream`."""
        return "".join(self.stream(question, decoding))

    def stream(self, question: str, decoding: Decoding = GREEDY, seed: int | None = None) -> Iterator[str]:
        """The answer, piece by piece; joined it becomes part of the conversation.

        A caller that stops reading ends the answer there: what was said so far stays in the conversation. Where
        nothing was said the question is not kept either.

        Raises:
            SampleError: the question is empty, holds an image's placeholder, or does not fit into the LLM's context.
                The conversation is as before.
        """
        if not question.strip():
            raise SampleError("the question is empty")
        return self._answer(question.strip(), decoding, seed, before=self.conversation.copy())

    def regenerate(self, decoding: Decoding = GREEDY, seed: int | None = None) -> Iterator[str]:
        """Another answer to the last question, in place of the one there is; SampleError if nothing was asked."""
        before = self.conversation.copy()
        question = self.take_back()
        if question is None:
            raise SampleError("nothing was asked yet, so there is no answer to give anew")
        return self._answer(question, decoding, seed, before)

    def take_back(self) -> str | None:
        """Forget the last question and its answer, and return the question; images stay. None: nothing was asked."""
        return self.conversation.take_back()

    def restart(self) -> None:
        """Forget everything."""
        self.conversation, self.pictures, self.reply = self.backend.new_conversation(), [], None

    def _answer(self, question: str, decoding: Decoding, seed: int | None, before: Turns) -> Iterator[str]:
        said = ""
        try:
            self.conversation.ask(question)
            self.conversation.open_answer()
            self.reply = self.backend.submit(
                Request(
                    self.conversation.copy(),
                    tuple(self.pictures),
                    decoding,
                    checkpoint=self.checkpoint,
                    seed=seed,
                    timeout=self.timeout,
                )
            )
            with closing(self.reply):
                for piece in self.reply:
                    said += piece
                    yield piece
        finally:
            if said:  # the model's words must not open a place for an image
                self.conversation.fill_answer(said.replace(IMAGE_PLACEHOLDER, ""))
            else:
                self.conversation = before
