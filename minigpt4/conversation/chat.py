"""Talking about images: a conversation, its images' embeddings, and a model that answers."""

from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minigpt4.common.errors import SampleError
from minigpt4.conversation.prompt_template import TemplateConversation
from minigpt4.conversation.templates import get_template
from minigpt4.conversation.turns import Turns
from minigpt4.models.generation import Decoding
from minigpt4.processors.base_processor import BaseProcessor
from minigpt4.processors.images import to_rgb

_PUBLISHED = {"pretrain_vicuna0": "vicuna0", "pretrain_llama2": "llama2"}


def conversation_for(model: Any) -> Turns:
    """An empty conversation as this model knows it: the published one of its type, else the template of training."""
    published = _PUBLISHED.get(model.cfg.model_type)
    if published is not None:
        return get_template(published)
    return TemplateConversation(model.prompt_template, model.end_sym)


@dataclass
class Chat:
    """One conversation with one model.

    Fields:
        model: a `MiniGPT4`.
        processor: PIL image -> (3, S, S).
        conversation: what was said; empty at first.
        images: embeddings (1, Q, D) of the images that were shown, each encoded once.
    """

    model: Any
    processor: BaseProcessor
    conversation: Turns
    images: list[Tensor] = field(default_factory=list)

    def show(self, image: Image.Image) -> None:
        """The user shows an image; the next question is about it, and about those before."""
        pixels_13SS = self.processor(to_rgb(image)).unsqueeze(0)
        with torch.no_grad():
            self.images.append(self.model.encode_img(pixels_13SS)[0])
        self.conversation.add_image()

    def ask(self, question: str, decoding: Decoding) -> str:
        """The model's answer, which becomes part of the conversation; SampleError for an empty question."""
        if not question.strip():
            raise SampleError("the question is empty")
        self.conversation.ask(question.strip())
        self.conversation.open_answer()
        prompt, stop = self.conversation.get_prompt(), [self.conversation.answer_end]
        answer = self.model.generate_from_embeds([self.images], [prompt], decoding, list(filter(None, stop)))[0]
        self.conversation.fill_answer(answer)
        return answer
