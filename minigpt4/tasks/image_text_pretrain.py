"""`image_text_pretrain`: the model learns to say the text that belongs to an image; all three recipes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.registry import registry
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER
from minigpt4.tasks.base_task import BaseTask

CAPTION_TOKENS = 100


@registry.register_task("image_text_pretrain")
class ImageTextPretrainTask(BaseTask):
    """Next-token loss on the answers; greedy captions of validation images with the first prompt."""

    @torch.no_grad()
    def valid_step(self, model: nn.Module, samples: Mapping[str, Any]) -> dict[str, Any]:
        """Loss with the first prompt, not one drawn at random: the same for any number of processes."""
        prompts = model.prompt_list
        model.prompt_list = prompts[:1]
        try:
            return model(samples)
        finally:
            model.prompt_list = prompts

    def caption(self, model: nn.Module, images: Tensor) -> list[str]:
        """Greedy captions of images (B, 3, S, S), at most CAPTION_TOKENS tokens each."""
        prompt = model.prompt_list[0] if model.prompt_list else IMAGE_PLACEHOLDER
        stop = [model.end_sym] if model.end_sym else []
        return model.generate(images, [prompt] * len(images), max_new_tokens=CAPTION_TOKENS, stop=stop)
