"""What happens to an image or a caption before the model sees it; importing this registers all processors."""

from collections.abc import Mapping
from typing import Any

from minigpt4.common.registry import registry
from minigpt4.processors.base_processor import BaseProcessor
from minigpt4.processors.blip_processors import (
    Blip2ImageEvalProcessor,
    Blip2ImageTrainProcessor,
    BlipCaptionProcessor,
    ClipImageEvalProcessor,
    ClipImageTrainProcessor,
    Uint8Image,
    open_image,
    process_image,
    takes_mean_and_std,
    to_rgb,
)


def load_processor(name: str, cfg: Mapping[str, Any] | None = None) -> BaseProcessor:
    """The processor registered as `name` with the keys of its section; RegistryError or ConfigError."""
    return registry.get_processor_class(name).from_config({**(cfg or {}), "name": name})
