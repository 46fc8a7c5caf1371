"""CLIP's image processors, as LLaVA uses them."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.processors.blip_processors import SquareImageProcessor, resize


@dataclass
class _ClipImageProcessor(SquareImageProcessor):
    """The shorter side is resized to `image_size`, and the centre cut out.

    Fields:
        image_aspect_ratio: `square`: as it is; `pad`: first filled up to a square in the mean colour, the image in the
            middle, so that nothing is cut off.
    """

    image_aspect_ratio: str = "square"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_aspect_ratio not in ("square", "pad"):
            raise ConfigError(f"image_aspect_ratio must be square or pad, got {self.image_aspect_ratio!r}")

    def square(self, image: Image.Image) -> Image.Image:
        if self.image_aspect_ratio == "pad":
            image = self._padded(image)
        side, shorter = self.image_size, min(image.size)
        width, height = (side * length // shorter for length in image.size)
        left, top = (width - side) // 2, (height - side) // 2
        return resize(image, width, height).crop((left, top, left + side, top + side))

    def _padded(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        canvas = Image.new("RGB", (side, side), tuple(int(255 * value) for value in self.mean))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return canvas

    @property
    def feature_key(self) -> dict[str, Any]:
        """What the pixels depend on besides the image: the same values, the same pixels."""
        return {"kind": "clip"} | vars(self)


@registry.register_processor("clip_image_train")
class ClipImageTrainProcessor(_ClipImageProcessor):
    """Image preprocessing for training, without augmentation: the same as for evaluation."""


@registry.register_processor("clip_image_eval")
class ClipImageEvalProcessor(_ClipImageProcessor):
    """Image preprocessing for evaluation and chat."""
