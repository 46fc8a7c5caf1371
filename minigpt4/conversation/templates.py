"""The published conversation templates, character by character.

conversation = get_template("vicuna0")
conversation.add_image()
conversation.ask("What is this?")
conversation.open_answer()
conversation.get_prompt()  # "...###Human: <Img><ImageHere></Img> What is this?###Assistant: "
"""

from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import cycle
from typing import Any, Self

from minigpt4.common.errors import ConfigError
from minigpt4.common.hints import hint
from minigpt4.conversation.turns import Turns


class SeparatorStyle(Enum):
    """What stands after a message: always `sep`, or `sep` after the user and `sep2` after the assistant."""

    SINGLE = auto()
    TWO = auto()


@dataclass
class Conversation(Turns):
    """A template together with what was said so far.

    Fields:
        system: what the LLM is told before the first message.
        roles: what stands before a user's and before an assistant's message, blanks included.
        messages: [role, text] each; text is None or "" where the LLM goes on.
        offset: messages that `to_gradio_chatbot` leaves out at the start.
        sep_style, sep, sep2: what follows the system text and every finished message.
        conv_id: free for the caller.
    """

    system: str
    roles: tuple[str, str]
    messages: list[list[str | None]] = field(default_factory=list)
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    conv_id: Any = None

    def __post_init__(self) -> None:
        if self.sep_style is SeparatorStyle.TWO and self.sep2 is None:
            raise ValueError("sep_style TWO needs sep2, what follows an assistant's message")

    @property
    def answer_start(self) -> str:
        """The text that an answer follows."""
        return self.roles[1].strip()

    @property
    def answer_end(self) -> str:
        """The text that ends an answer; "" where only the end token does."""
        return self.sep if self.sep_style is SeparatorStyle.SINGLE else self.sep2

    def get_prompt(self) -> str:
        """The whole conversation as the LLM reads it; an open message is its role alone."""
        parts = [self.system, self.sep]
        for (role, text), end in zip(self.messages, cycle((self.sep, self.answer_end))):
            parts.append(f"{role}{text}{end}" if text else role)
        return "".join(parts)

    def copy(self) -> Self:
        """The same conversation with messages of its own, to go on independently."""
        return type(self)(
            system=self.system,
            roles=self.roles,
            messages=self._copied_messages(),
            offset=self.offset,
            sep_style=self.sep_style,
            sep=self.sep,
            sep2=self.sep2,
            conv_id=self.conv_id,
        )

    def dict(self) -> "dict[str, Any]":  # quoted: in this class, dict is this method
        """The conversation in plain types under the published keys, ready for JSON."""
        return {
            "system": self.system,
            "roles": list(self.roles),
            "messages": self._copied_messages(),
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
            "conv_id": self.conv_id,
        }


_VISION_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. "
    "You will be able to see the image once I provide it to you. Please answer my questions."
)

# Shared values: take a copy() before adding messages, or ask get_template for one.
CONV_VISION_Vicuna0 = Conversation(system=_VISION_SYSTEM, roles=("Human: ", "Assistant: "), offset=2, sep="###")
CONV_VISION_LLama2 = Conversation(system=_VISION_SYSTEM, roles=("<s>[INST] ", " [/INST] "), offset=2, sep="")
CONV_VISION_minigptv2 = Conversation(system="", roles=("<s>[INST] ", " [/INST]"), offset=2, sep="")

_TEMPLATES = {
    "vicuna0": CONV_VISION_Vicuna0,
    "llama2": CONV_VISION_LLama2,
    "minigptv2": CONV_VISION_minigptv2,
}


def get_template(name: str) -> Conversation:
    """A fresh conversation of the template; ConfigError lists the names when there is no such template."""
    if name in _TEMPLATES:
        return _TEMPLATES[name].copy()
    raise ConfigError(f"unknown conversation template '{name}'; {hint(str(name), _TEMPLATES)}")
