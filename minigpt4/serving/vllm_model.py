"""MiniGPT-4 in vLLM: a `blip2` export whose prompts say where each image stands, any number of them (docs/export.md).

    vllm serve DIR --hf-overrides '{"architectures": ["MiniGPT4ForConditionalGeneration"]}' \
        --chat-template-content-format openai

vLLM's own BLIP-2 computes; what differs is how prompts are read. Its BLIP-2 takes one image and puts it first; here
each `<image>` becomes the Q image tokens in its own place, as `LlavaProcessor`, the processor of the folder, has it.
Only vLLM imports this module, by `minigpt4.serving.vllm_plugin`; nothing else here needs that package.
"""

from collections.abc import Mapping, Sequence

from transformers import LlavaProcessor

from minigpt4.common.errors import ConfigError

try:
    from vllm.model_executor.models.blip2 import (
        Blip2DummyInputsBuilder,
        Blip2ForConditionalGeneration,
        Blip2MultiModalProcessor,
        Blip2ProcessingInfo,
    )
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.inputs import MultiModalKwargsItems
    from vllm.multimodal.parse import MultiModalDataItems
    from vllm.multimodal.processing import PromptReplacement, PromptUpdate
except ImportError as error:
    raise ConfigError(f"the model for vLLM needs that package, 0.32 or 0.33: pip install vllm ({error})") from error


class ProcessingInfo(Blip2ProcessingInfo):
    """What vLLM asks about the folder before it loads weights."""

    def get_hf_processor(self, **kwargs: object) -> LlavaProcessor:
        return self.ctx.get_hf_processor(LlavaProcessor, **kwargs)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}


class DummyInputsBuilder(Blip2DummyInputsBuilder):
    """The prompt that vLLM measures memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)


class Processor(Blip2MultiModalProcessor):
    """Prompts and images to ids and pixels."""

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        token = self.info.get_hf_config().image_token_index
        tokens = [token] * self.info.get_num_image_tokens()
        return [PromptReplacement(modality="image", target=[token], replacement=tokens)]


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputsBuilder)
class MiniGPT4ForConditionalGeneration(Blip2ForConditionalGeneration):
    """The tensors and computation of vLLM's BLIP-2."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What stands for an image in a chat that the template does not write itself."""
        return "<image>" if modality.startswith("image") else super().get_placeholder_str(modality, i)
