"""What a conversation asks of whoever runs the model, and what it gets back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from minigpt4.conversation.decoding import Decoding
from minigpt4.conversation.turns import Turns

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
