"""`image_text_pretrain`: the model learns to say the text that belongs to an image; all three recipes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from minigpt4.common.registry import registry
from minigpt4.tasks.base_task import BaseTask

SHOWN = 2
SHOWN_TOKENS = 60


@registry.register_task("image_text_pretrain")
class ImageTextPretrainTask(BaseTask):
    """Next-token loss on the answers; after each epoch a few greedy captions of validation images."""

    def sample_outputs(self, model: nn.Module, samples: Mapping[str, Any]) -> list[str]:
        """`image_id: caption` for the first images of a batch, decoded greedily with the first prompt."""
        if samples.get("image") is None:
            return []
        images = samples["image"][:SHOWN]
        prompt = model.prompt_list[0] if model.prompt_list else "<ImageHere>"
        stop = [model.end_sym] if model.end_sym.strip() else []
        captions = model.generate(images, [prompt] * len(images), max_new_tokens=SHOWN_TOKENS, stop=stop)
        names = samples.get("image_id") or range(len(captions))
        return [f"{name}: {caption}" for name, caption in zip(names, captions, strict=False)]
