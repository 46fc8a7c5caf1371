"""Conversations: turns, and the templates that make a prompt of them; the published ones character by character.

conversation = get_template("vicuna0")
conversation.add_image()
conversation.ask("What is this?")
conversation.open_answer()
conversation.get_prompt()  # "...###Human: <Img><ImageHere></Img> What is this?###Assistant: "
"""

import copy
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import Enum, auto
from itertools import cycle
from typing import TYPE_CHECKING, Any, Self

from minigpt4.common.errors import ConfigError, SampleError, errors_as, hint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_PLACEHOLDER = "<ImageHere>"  # where the image's embeddings go
IMAGE_MESSAGE = f"<Img>{IMAGE_PLACEHOLDER}</Img>"
_IMAGES_BEFORE = re.compile(f"^(?:{re.escape(IMAGE_MESSAGE)} ?)*")
_USER, _ASSISTANT = "user", "assistant"


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
        """Tell the LLM this before the first message; SampleError when it holds the image placeholder."""
        if IMAGE_PLACEHOLDER in text:
            raise SampleError(f"a system text must not hold {IMAGE_PLACEHOLDER}, which stands for an image")
        self.system = text

    def add_image(self) -> None:
        """The user shows an image; a question that follows at once joins this message."""
        self.append_message(self.roles[0], IMAGE_MESSAGE)

    def ask(self, text: str) -> None:
        """The user says `text`, joined by one blank to an image shown just before.

        SampleError when it holds the image placeholder: no image would belong to it.
        """
        if IMAGE_PLACEHOLDER in text:
            raise SampleError(f"a question must not hold {IMAGE_PLACEHOLDER}; show an image with add_image() before it")
        self.append_question(text)

    def append_question(self, text: str) -> None:
        """`ask` without its check, for a text that has a place for images of its own."""
        role, last = self.messages[-1] if self.messages else (None, None)
        if role == self.roles[0] and last and last.endswith("</Img>"):
            self.messages[-1][1] = f"{last} {text}"
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

    def fit(self, length: Callable[[str], int], max_new_tokens: int, context: int) -> tuple[Self, int]:
        """The conversation as the LLM can read it, and how many of its oldest turns were left out.

        `length`: positions that a prompt takes, images included; `context`: positions of prompt and answer together.
        SampleError if the last question does not fit by itself.
        """

        def needed(turns: int) -> int:
            return length(self.without_oldest(turns).get_prompt()) + max_new_tokens

        every = range(len(self._answered()) + 1)
        dropped = bisect_left(every, True, key=lambda turns: needed(turns) <= context)
        if dropped == len(every):
            raise SampleError(
                f"the question and its images take {needed(every[-1]) - max_new_tokens} positions and the answer may "
                f"take {max_new_tokens}, but this LLM reads {context} in all: ask or show less, or lower the maximum "
                "of new tokens"
            )
        return self.without_oldest(dropped), dropped

    def without_oldest(self, turns: int) -> Self:
        """A copy without the first `turns` answers, at most those that are given, and what was said before them.

        Images stay: each as a message of its own, the last one joined by the question that follows it.
        """
        if not turns:
            return self.copy()
        first_kept = self._answered()[turns - 1] + 1
        shorter = self.copy()
        shorter.messages = []
        shown = [text or "" for role, text in self.messages[:first_kept] if role == self.roles[0]]
        for _ in range("".join(shown).count(IMAGE_PLACEHOLDER)):
            shorter.add_image()
        for role, text in self.messages[first_kept:]:
            if role == self.roles[0] and _question(text) == text:
                shorter.append_question(text)
            else:
                shorter.append_message(role, text)
        return shorter

    def _answered(self) -> list[int]:
        """Messages that are answers; the last one is still being written and does not count."""
        return [i for i, (role, text) in enumerate(self.messages[:-1]) if role == self.roles[1] and text]

    def take_back(self) -> str | None:
        """Remove the last question and its answer, and return the question; images stay. None: nothing was asked."""
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

    def copy(self) -> Self:
        """The same conversation with messages of its own, to go on independently."""
        twin = copy.copy(self)
        twin.messages = [list(message) for message in self.messages]
        return twin


def _question(text: str | None) -> str:
    """What a user's message says, without the images before it."""
    return _IMAGES_BEFORE.sub("", text or "")


class SeparatorStyle(Enum):
    """What stands after a message: always `sep`, or `sep` after the user and `sep2` after the assistant."""

    SINGLE = auto()
    TWO = auto()


@dataclass
class Conversation(Turns):
    """A template together with what was said so far."""

    system: str
    roles: tuple[str, str]
    """What stands before a user's and before an assistant's message, blanks included."""
    messages: list[list[str | None]] = field(default_factory=list)
    """[role, text] each; text is None or "" where the LLM goes on."""
    offset: int = 0
    """Messages that `to_gradio_chatbot` leaves out at the start."""
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    """Follows the system text and every finished message; with TWO, `sep2` follows the assistant's."""
    sep2: str | None = None
    conv_id: Any = None
    """Free for the caller."""

    def __post_init__(self) -> None:
        if self.sep_style is SeparatorStyle.TWO and self.sep2 is None:
            raise ValueError("sep_style TWO needs sep2, what follows an assistant's message")

    @property
    def answer_start(self) -> str:
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

    def dict(self) -> "dict[str, Any]":  # quoted: in this class, dict is this method
        """The conversation in plain types under the published keys, ready for JSON."""
        plain = asdict(self) | {"roles": list(self.roles)}
        del plain["sep_style"]
        return plain


_VISION_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. "
    "You will be able to see the image once I provide it to you. Please answer my questions."
)

# Shared values: take a copy() before adding messages, or ask get_template for one.
CONV_VISION_Vicuna0 = Conversation(system=_VISION_SYSTEM, roles=("Human: ", "Assistant: "), offset=2, sep="###")
CONV_VISION_LLama2 = Conversation(system=_VISION_SYSTEM, roles=("<s>[INST] ", " [/INST] "), offset=2, sep="")
CONV_VISION_minigptv2 = Conversation(system="", roles=("<s>[INST] ", " [/INST]"), offset=2, sep="")

_TEMPLATES = {"vicuna0": CONV_VISION_Vicuna0, "llama2": CONV_VISION_LLama2, "minigptv2": CONV_VISION_minigptv2}


def get_template(name: str) -> Conversation:
    """A fresh conversation of the template; ConfigError for an unknown name."""
    if name in _TEMPLATES:
        return _TEMPLATES[name].copy()
    raise ConfigError(f"unknown conversation template '{name}'; {hint(str(name), _TEMPLATES)}")


class TemplateConversation(Turns):
    """Turns in the template of training, for models without a published one; a `system` text begins the first.

    `template` has one `{}`, or is "" for the bare instruction; `end_sym` ends answers; `image` stands for an image:
    "###Human: <Img><ImageHere></Img> What is this? ###Assistant: A dog.######Human: Which colour? ###Assistant: "
    """

    roles = (_USER, _ASSISTANT)
    offset = 0
    answer_start = ""

    def __init__(self, template: str, end_sym: str, system: str | None = None, image: str = IMAGE_MESSAGE) -> None:
        self.template = template or "{}"
        self.end_sym = end_sym
        self.system = system
        self.image = image
        self.messages: list[list[str | None]] = []

    @property
    def answer_end(self) -> str:
        return self.end_sym

    def get_prompt(self) -> str:
        """The whole conversation as the LLM reads it; an open answer is where it goes on."""
        parts, system = [], self.system
        for role, text in self.messages:
            if role == _USER:
                text = text.replace(IMAGE_MESSAGE, self.image)
                parts.append(self.template.format(f"{system} {text}" if system else text))
                system = None
            elif text:
                parts.append(f"{text}{self.end_sym}")
        return "".join(parts)


# Stands for the instruction while a template is rendered; letters only, so no template changes it.
_INSTRUCTION = "instructiongoeshere"


def prompt_template_from_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The tokenizer's chat template as one string with `{}` where the user's instruction goes.

    For `str.format`, like `###Human: {} ###Assistant: `: braces of the template itself are doubled. It ends where the
    answer starts; the bos string at its start is left out where the model puts the bos token there itself.
    ConfigError when there is no chat template or it does not hold the user's message exactly once.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"the tokenizer '{name}' has no chat template; write model.prompt_template by hand")
    with errors_as(ConfigError, f"the chat template of '{name}' takes no instruction"):
        chat = [{"role": "user", "content": _INSTRUCTION}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    # ChatML models name their `<|im_start|>` bos and add none to an encoded text
    if tokenizer.bos_token is not None and tokenizer.bos_token_id in tokenizer("")["input_ids"]:
        prompt = prompt.removeprefix(tokenizer.bos_token)
    parts = prompt.split(_INSTRUCTION)
    if len(parts) != 2:
        raise ConfigError(
            f"the chat template of '{name}' holds the user's message {len(parts) - 1} times, not once; write the "
            "prompt template by hand"
        )
    return "{}".join(part.replace("{", "{{").replace("}", "}}") for part in parts)


def conversation_for(model: Any) -> Turns:
    """An empty conversation as this model knows it: its type's published one, else the template of training."""
    if hasattr(model.cfg, "conv_template"):
        from minigpt4.conversation.llava import LlavaConversation  # which imports this module

        return LlavaConversation(model.cfg.conv_template)
    published = {"pretrain_vicuna0": "vicuna0", "pretrain_llama2": "llama2"}.get(model.cfg.model_type)
    if published is not None:
        return get_template(published)
    untagged = model.prompt_list and "<Img>" not in model.prompt_list[0]  # as in training
    image = IMAGE_PLACEHOLDER if untagged else IMAGE_MESSAGE
    return TemplateConversation(model.prompt_template, model.end_sym, image=image)
