"""What happens to an image or a caption before the model sees it; importing this registers all processors."""

from minigpt4.processors.base_processor import BaseProcessor
from minigpt4.processors.blip_processors import (
    Blip2ImageEvalProcessor,
    Blip2ImageTrainProcessor,
    BlipCaptionProcessor,
    Uint8Image,
    takes_mean_and_std,
)
from minigpt4.processors.images import open_image, process_image, to_rgb

__all__ = [
    "BaseProcessor",
    "Blip2ImageEvalProcessor",
    "Blip2ImageTrainProcessor",
    "BlipCaptionProcessor",
    "Uint8Image",
    "open_image",
    "process_image",
    "takes_mean_and_std",
    "to_rgb",
]
