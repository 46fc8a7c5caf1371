"""What happens to an image or a caption before the model sees it; importing this registers all processors."""

from minigpt4.processors.base_processor import BaseProcessor
from minigpt4.processors.blip_processors import (
    Blip2ImageEvalProcessor,
    Blip2ImageTrainProcessor,
    BlipCaptionProcessor,
    Levels,
    takes_statistics,
)
from minigpt4.processors.images import open_image, process_image, to_rgb

__all__ = [
    "BaseProcessor",
    "Blip2ImageEvalProcessor",
    "Blip2ImageTrainProcessor",
    "BlipCaptionProcessor",
    "Levels",
    "open_image",
    "process_image",
    "takes_statistics",
    "to_rgb",
]
