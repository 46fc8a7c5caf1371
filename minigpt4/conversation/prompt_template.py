"""A conversation written in the template that training used, `model.prompt_template`: one instruction, one answer.

template = "###Human: {} ###Assistant: ", end_sym = "###":
"###Human: <Img><ImageHere></Img> What is this? ###Assistant: A dog.######Human: Which colour? ###Assistant: "
"""

from typing import Any, Self

from minigpt4.conversation.turns import Turns

_USER, _ASSISTANT = "user", "assistant"


class TemplateConversation(Turns):
    """Turns in the words of training; for models that have no published conversation template.

    `template` has one `{}`, or is "" for the bare instruction; `end_sym` is what answers end with. The template of
    training has no place for a `system` text, so it begins the first instruction.
    """

    roles = (_USER, _ASSISTANT)
    offset = 0
    answer_start = ""

    def __init__(self, template: str, end_sym: str, system: str | None = None) -> None:
        self.template = template or "{}"
        self.end_sym = end_sym
        self.system = system
        self.messages: list[list[str | None]] = []

    @property
    def answer_end(self) -> str:
        """The text that ends an answer."""
        return self.end_sym

    def get_prompt(self) -> str:
        """The whole conversation as the LLM reads it; an open answer is where it goes on."""
        parts, system = [], self.system
        for role, text in self.messages:
            if role == _USER:
                parts.append(self.template.format(f"{system} {text}" if system else text))
                system = None
            elif text:
                parts.append(f"{text}{self.end_sym}")
        return "".join(parts)

    def copy(self) -> Self:
        """The same conversation with messages of its own."""
        twin = type(self)(self.template, self.end_sym, self.system)
        twin.messages = self._copied_messages()
        return twin

    def dict(self) -> "dict[str, Any]":  # quoted: in this class, dict is this method
        """The conversation in plain types, ready for JSON."""
        return {
            "system": self.system,
            "template": self.template,
            "end_sym": self.end_sym,
            "roles": list(self.roles),
            "messages": self._copied_messages(),
        }
