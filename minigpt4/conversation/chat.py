"""Talking about images: one conversation, the images that were shown, and whoever runs the model.

chat = Chat(engine)
chat.show(image)
print(chat.ask("What is unusual about this image?"))
for piece in chat.stream("Tell me more."):
    print(piece, end="")
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minigpt4.common.errors import SampleError
from minigpt4.conversation.decoding import GREEDY, Decoding
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER, Turns

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


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


@dataclass
class Chat:
    """One conversation."""

    engine: Any
    """An `Engine`, which lies a layer above."""
    checkpoint: str | None = None
    """Name of the checkpoint that answers; None: the engine's first."""
    pictures: list[Picture] = field(default_factory=list)
    """The images that were shown, in the order of the conversation's placeholders."""
    reply: Any = None
    """The `EngineReply` that was asked for last: tokens, turns that were left out, how it ended."""

    def __post_init__(self) -> None:
        self.conversation: Turns = self.engine.new_conversation()

    def show(self, image: "Image.Image") -> str:
        """The user shows an image; the next question is about it, and about those before. Returns its id."""
        picture = self.engine.preprocess(image)
        self.pictures.append(picture)
        self.conversation.add_image()
        return picture.image_id

    def ask(self, question: str, decoding: Decoding = GREEDY) -> str:
        return "".join(self.stream(question, decoding))

    def stream(self, question: str, decoding: Decoding = GREEDY, seed: int | None = None) -> Iterator[str]:
        """The answer, piece by piece; joined it becomes part of the conversation.

        A caller that stops reading ends the answer there: what was said so far stays, or the question goes, too.
        SampleError, and the conversation as before, if the question is empty, holds an image's placeholder, or does not
        fit into the LLM's context.
        """
        if not question.strip():
            raise SampleError("the question is empty")
        return self._answer(question.strip(), decoding, seed, before=self.conversation.copy())

    def regenerate(self, decoding: Decoding = GREEDY, seed: int | None = None) -> Iterator[str]:
        """Another answer to the last question, in place of the one there is; SampleError if nothing was asked."""
        before = self.conversation.copy()
        question = self.take_back()
        if question is None:
            raise SampleError("nothing was asked yet: there is no answer to regenerate")
        return self._answer(question, decoding, seed, before)

    def take_back(self) -> str | None:
        """Forget the last question and its answer, and return the question; images stay. None: nothing was asked."""
        return self.conversation.take_back()

    def restart(self) -> None:
        self.conversation, self.pictures, self.reply = self.engine.new_conversation(), [], None

    def _answer(self, question: str, decoding: Decoding, seed: int | None, before: Turns) -> Iterator[str]:
        said = ""
        try:
            self.conversation.ask(question)
            self.conversation.open_answer()
            talk, pictures = self.conversation.copy(), tuple(self.pictures)
            self.reply = self.engine.submit(Request(talk, pictures, decoding, checkpoint=self.checkpoint, seed=seed))
            with closing(self.reply):
                for piece in self.reply:
                    said += piece
                    yield piece
        finally:
            if said:  # the model's words must not open a place for an image
                self.conversation.fill_answer(said.replace(IMAGE_PLACEHOLDER, ""))
            else:
                self.conversation = before
