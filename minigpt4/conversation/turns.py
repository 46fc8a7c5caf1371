"""The turns of a conversation and how they join, the same for every kind of template."""

import re
from typing import Any, Self

from minigpt4.common.errors import SampleError

IMAGE_PLACEHOLDER = "<ImageHere>"  # where the image's embeddings go
IMAGE_MESSAGE = f"<Img>{IMAGE_PLACEHOLDER}</Img>"
_IMAGES_BEFORE = re.compile(f"^(?:{re.escape(IMAGE_MESSAGE)} ?)*")


class Turns:
    """Messages [role, text] in the order they were said; role is one of `roles` (user, assistant).

    A subclass has the attributes below and says in `get_prompt` how they become one string.
    """

    roles: tuple[str, str]
    system: str | None
    messages: list[list[str | None]]
    offset: int

    def append_message(self, role: str, message: str | None) -> None:
        """Add a message as it is; None leaves it open, to be written by the LLM."""
        self.messages.append([role, message])

    def set_system(self, text: str) -> None:
        """What the LLM is told before the first message, in place of what the template says there.

        SampleError when the text holds the image placeholder.
        """
        if IMAGE_PLACEHOLDER in text:
            raise SampleError(f"a system text must not hold {IMAGE_PLACEHOLDER}, which stands for an image")
        self.system = text

    def add_image(self) -> None:
        """The user shows an image; a question that follows at once joins this message."""
        self.append_message(self.roles[0], IMAGE_MESSAGE)

    def ask(self, text: str) -> None:
        """The user says `text`, joined by one blank to an image shown just before.

        SampleError when the text holds the image placeholder: no image would belong to it.
        """
        if IMAGE_PLACEHOLDER in text:
            raise SampleError(
                f"a question must not hold {IMAGE_PLACEHOLDER}, which stands for an image; "
                "show the image with add_image() before the question"
            )
        if self._image_was_just_shown():
            self.messages[-1][1] = f"{self.messages[-1][1]} {text}"
        else:
            self.append_message(self.roles[0], text)

    def open_answer(self) -> None:
        """Leave the next turn to the assistant: the prompt now ends where the LLM goes on."""
        self.append_message(self.roles[1], None)

    def fill_answer(self, text: str) -> None:
        """Write what the LLM said into the open (or last) answer; ValueError when there is none."""
        if not self.messages or self.messages[-1][0] != self.roles[1]:
            raise ValueError("there is no answer to fill in; call open_answer() first")
        self.messages[-1][1] = text

    @property
    def num_answered(self) -> int:
        """Answers that were given; the last message is still being answered and does not count."""
        return len(self._answered())

    def without_oldest(self, turns: int) -> Self:
        """A copy without the first `turns` answers, at most `num_answered`, and what was said before them.

        Images stay: each as a message of its own, the last one joined by the question that follows it.
        """
        if not turns:
            return self.copy()
        first_kept = self._answered()[turns - 1] + 1
        shorter = self.copy()
        shorter.messages = []
        for _ in range(sum(_num_images(text) for role, text in self.messages[:first_kept] if role == self.roles[0])):
            shorter.add_image()
        for role, text in self.messages[first_kept:]:
            if role == self.roles[0] and _question(text) == text and shorter._image_was_just_shown():
                shorter.messages[-1][1] = f"{shorter.messages[-1][1]} {text}"
            else:
                shorter.append_message(role, text)
        return shorter

    def _answered(self) -> list[int]:
        return [i for i, (role, text) in enumerate(self.messages[:-1]) if role == self.roles[1] and text]

    def take_back(self) -> str | None:
        """Remove the last question and its answer, if there is one, and return the question; images stay.

        None, and nothing changes, where no question was asked.
        """
        asked = [i for i, (role, text) in enumerate(self.messages) if role == self.roles[0] and _question(text)]
        if not asked:
            return None
        last = asked[-1]
        text = self.messages[last][1]
        shown = text.removesuffix(_question(text)).rstrip()
        later = [message for message in self.messages[last + 1 :] if message[0] == self.roles[0]]
        self.messages[last:] = ([[self.roles[0], shown]] if shown else []) + later
        return _question(text)

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """Pairs [question, answer] of the messages after the first `offset`, as published."""
        shown = [text for _, text in self.messages[self.offset :]]
        answers = shown[1::2] + [None] * (len(shown) % 2)
        return [list(pair) for pair in zip(shown[::2], answers, strict=True)]

    def _image_was_just_shown(self) -> bool:
        if not self.messages:
            return False
        role, text = self.messages[-1]
        return role == self.roles[0] and bool(text) and text.endswith("</Img>")

    def _copied_messages(self) -> list[list[Any]]:
        return [list(message) for message in self.messages]


def _num_images(text: str | None) -> int:
    return (text or "").count(IMAGE_PLACEHOLDER)


def _question(text: str | None) -> str:
    """What a user's message says, without the images before it."""
    return _IMAGES_BEFORE.sub("", text or "")
