"""The chat template that an LLM's own tokenizer brings along, used like the published templates.

The image's placeholder is ordinary text inside the user's message; whoever builds the model's input cuts
the prompt there. The bos string is left out at the start, for the model puts the bos token there itself.
"""

from itertools import groupby
from typing import TYPE_CHECKING, Any, Self

from minigpt4.common.errors import ConfigError
from minigpt4.conversation.turns import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER, _ASSISTANT = "user", "assistant"
# Stands for the instruction while a template is rendered; letters only, so no template changes it.
_INSTRUCTION = "instructiongoeshere"


class TokenizerConversation(Turns):
    """A conversation written in the tokenizer's chat template; `system` None leaves that message out.

    ConfigError when the tokenizer has no chat template.
    """

    roles = (_USER, _ASSISTANT)
    offset = 0
    # An answer ends with the tokenizer's own end token, and no text marks where it starts.
    answer_start = ""
    answer_end = ""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", system: str | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"the tokenizer '{_name(tokenizer)}' has no chat template; "
                "choose a conversation template by name (such as vicuna0) instead"
            )
        self.tokenizer = tokenizer
        self.system = system
        self.messages: list[list[str | None]] = []

    def get_prompt(self) -> str:
        """The whole conversation as the LLM reads it, ready for its answer if the last message is open.

        Messages that one side sent in a row are one message to the template, joined by a blank.
        ConfigError when the template refuses the messages (some know no system role).
        """
        is_open = bool(self.messages) and self.messages[-1][0] == _ASSISTANT and not self.messages[-1][1]
        chat = self._chat()
        return _render(self.tokenizer, chat, add_generation_prompt=is_open) if chat else ""

    def copy(self) -> Self:
        """The same conversation with messages of its own; the tokenizer is shared."""
        twin = type(self)(self.tokenizer, self.system)
        twin.messages = self._copied_messages()
        return twin

    def dict(self) -> "dict[str, Any]":  # quoted: in this class, dict is this method
        """The conversation in plain types, ready for JSON; the tokenizer by its name."""
        return {
            "system": self.system,
            "roles": list(self.roles),
            "messages": self._copied_messages(),
            "offset": self.offset,
            "tokenizer": _name(self.tokenizer),
        }

    def _chat(self) -> "list[dict[str, str]]":
        said = [(role, text) for role, text in self.messages if text]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + [
            {"role": role, "content": " ".join(text for _, text in turn)}
            for role, turn in groupby(said, key=lambda message: message[0])
        ]


def prompt_template_from_tokenizer(tokenizer: "PreTrainedTokenizerBase", system: str | None = None) -> str:
    """The tokenizer's chat template as one string with `{}` where the user's instruction goes.

    For `str.format`, like `###Human: {} ###Assistant: `: braces of the template itself are doubled. The
    string ends where the assistant's answer starts. ConfigError when there is no chat template or it does
    not hold the user's message exactly once.
    """
    conversation = TokenizerConversation(tokenizer, system)
    conversation.ask(_INSTRUCTION)
    conversation.open_answer()
    parts = conversation.get_prompt().split(_INSTRUCTION)
    if len(parts) != 2:
        raise ConfigError(
            f"the chat template of '{_name(tokenizer)}' holds the user's message {len(parts) - 1} times, "
            "not once; write the prompt template by hand"
        )
    return "{}".join(part.replace("{", "{{").replace("}", "}}") for part in parts)


def _render(tokenizer: "PreTrainedTokenizerBase", chat: list[dict[str, str]], add_generation_prompt: bool) -> str:
    # Only needed here, where the tokenizer needs it as well.
    from jinja2.exceptions import TemplateError

    try:
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise ConfigError(f"the chat template of '{_name(tokenizer)}' refuses this conversation: {error}") from error
    return prompt.removeprefix(tokenizer.bos_token) if _adds_bos(tokenizer) else prompt


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether bos comes with every encoded text; ChatML models name their `<|im_start|>` bos and add none."""
    return tokenizer.bos_token is not None and tokenizer.bos_token_id in tokenizer("")["input_ids"]


def _name(tokenizer: "PreTrainedTokenizerBase") -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
