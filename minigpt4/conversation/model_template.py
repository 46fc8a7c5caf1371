"""Which conversation template a model speaks."""

from typing import Any

from minigpt4.conversation.prompt_template import TemplateConversation
from minigpt4.conversation.templates import get_template
from minigpt4.conversation.turns import Turns

_PUBLISHED = {"pretrain_vicuna0": "vicuna0", "pretrain_llama2": "llama2"}


def conversation_for(model: Any) -> Turns:
    """An empty conversation as this `MiniGPT4` knows it: its type's published one, else the template of training."""
    published = _PUBLISHED.get(model.cfg.model_type)
    if published is not None:
        return get_template(published)
    return TemplateConversation(model.prompt_template, model.end_sym)
