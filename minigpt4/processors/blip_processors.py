"""The processors of the published recipes: BLIP-2's image preprocessing and BLIP's caption cleaning."""

import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.registry import registry
from minigpt4.processors.base_processor import BaseProcessor
from minigpt4.processors.images import to_rgb

log = logging.getLogger(__name__)


Channels = tuple[float, float, float]
"""A number each for R, G, B in 0..1."""
WHITE = (255.0, 255.0, 255.0)

# CLIP's channel statistics (RGB, of pixel values in 0..1), which EVA-CLIP was trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

FAST = ("fast_resize", "fast_decode")
"""Switches whose pixels are not to the bit those of the published code."""
DECODED_PER_OUTPUT = 2
"""Pixels that fast decoding keeps for each of the output, along a side."""

_PUNCTUATION = re.compile(r'[.!"()*#:;~]')
_WHITESPACE_RUN = re.compile(r"\s{2,}")


@dataclass(frozen=True)
class Uint8Image:
    """One image or a batch on its way to the model, a quarter of the bytes that the model reads.

    What is still to be done to it is (pixel / 255 - mean) / std.
    """

    pixels: Tensor
    """(..., 3, S, S) uint8, S pixels a side."""
    mean: Channels
    std: Channels

    @classmethod
    def joined(cls, images: Sequence["Uint8Image"]) -> "Uint8Image":
        """The batch of images of one processor."""
        return replace(images[0], pixels=torch.stack([image.pixels for image in images]))

    @property
    def shape(self) -> torch.Size:
        return self.pixels.shape

    def normalised(self) -> Tensor:
        """What the model reads, (..., 3, S, S) float32, on the device of the pixels.

        Each step is rounded as IEEE 754 says, so all devices give the same bits: the divisors are tensors because CUDA
        multiplies by the reciprocal of a plain number.
        """
        white, mean, std = (_channels(values, self.pixels.device) for values in (WHITE, self.mean, self.std))
        return self.pixels.float().div_(white).sub_(mean).div_(std)

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """The same on `device`."""
        return replace(self, pixels=self.pixels.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in page-locked memory."""
        return replace(self, pixels=self.pixels.pin_memory())

    def is_pinned(self) -> bool:
        """Whether it is in page-locked memory."""
        return self.pixels.is_pinned()


@functools.lru_cache(maxsize=64)  # making a tensor on a GPU out of numbers waits for it
def _channels(values: Channels, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(3, 1, 1)


@dataclass
class _Blip2ImageProcessor(BaseProcessor):
    """PIL image of any mode and size -> normalised float32 tensor (3, image_size, image_size).

    The image is resized to a square with bicubic interpolation: nothing is cropped, the aspect ratio is
    not kept. Then (pixel / 255 - mean) / std for each channel.

    Fields:
        image_size: side of the output in pixels.
        mean, std: three numbers each for R, G, B in 0..1; CLIP's by default. A configuration with another vision
            encoder than EVA-CLIP sets its own.
        min_scale, max_scale: accepted because published files hold them; like in the published code they
            have no effect, since there is no random crop.
        fast_resize: resize by torch's 8-bit kernel in place of Pillow's, which takes several times as long. On photos
            0.2 to 0.5% of the values are off by one grey level, fewer than one in 100,000 by two.
        fast_decode: let the JPEG decoder halve, quarter or eighth an image while it stays at least twice as large as
            the output on both sides: from 896 x 896 for an output of 224. On photos of 1600 x 1200 the values are
            off by 0.2 to 0.5 grey levels on average and by 5 at most, up to 2% by more than one.
    """

    image_size: int = 224
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    min_scale: float | None = None
    max_scale: float | None = None
    fast_resize: bool = False
    fast_decode: bool = False

    def __post_init__(self) -> None:
        _require_positive_int("image_size", self.image_size)
        self.mean = _three_numbers("mean", self.mean)
        self.std = _three_numbers("std", self.std)
        if min(self.std) <= 0:
            raise ConfigError(f"std must be above zero, got {list(self.std)}")
        if (self.min_scale, self.max_scale) != (None, None):
            _warn_that_scale_is_ignored()
        for key in FAST:
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"{key} must be True or False, got {getattr(self, key)!r}")

    def __call__(self, item: Image.Image) -> Tensor:
        return self.uint8(item).normalised()

    def uint8(self, item: Image.Image) -> Uint8Image:
        """The same before it is normalised, (3, image_size, image_size) uint8."""
        if not isinstance(item, Image.Image):
            raise SampleError(f"an image processor takes a PIL image, got {type(item).__name__}")
        resized_3SS = (self._resize_fast if self.fast_resize else self._resize)(to_rgb(item))
        return Uint8Image(resized_3SS, self.mean, self.std)

    @property
    def decode_at_least(self) -> int | None:
        """Pixels that both sides of an image need when it comes here; None: all that the file has."""
        return DECODED_PER_OUTPUT * self.image_size if self.fast_decode else None

    @property
    def feature_key(self) -> dict[str, Any]:
        """What the pixels depend on besides the image: the same values, the same pixels."""
        fast = {key: True for key in FAST if getattr(self, key)}
        return {"kind": "blip2", "image_size": self.image_size, "mean": self.mean, "std": self.std, **fast}

    def _resize_fast(self, image: Image.Image) -> Tensor:
        pixels_HW3 = torch.from_numpy(np.array(image))
        size = (self.image_size, self.image_size)
        # Channels that vary fastest, as here, are what the 8-bit kernel is fast for.
        pixels_1CHW = pixels_HW3.permute(2, 0, 1)[None]
        return functional.interpolate(pixels_1CHW, size, mode="bicubic", antialias=True)[0].contiguous()

    def _resize(self, image: Image.Image) -> Tensor:
        # Width first, then height: newer Pillow releases choose the order of the two passes by the shape
        # of the image, which moves pixels by one level against the published preprocessing.
        size = self.image_size
        widened = image.resize((size, image.height), Image.Resampling.BICUBIC)
        pixels_HWC = np.asarray(widened.resize((size, size), Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels_HWC.transpose(2, 0, 1).copy())


@registry.register_processor("blip2_image_train")
class Blip2ImageTrainProcessor(_Blip2ImageProcessor):
    """Image preprocessing for training: the same as for evaluation, without augmentation.

    That every epoch sees the same pixels is the published behaviour, and is why the features of the
    frozen vision encoder can be cached.
    """


@registry.register_processor("blip2_image_eval")
class Blip2ImageEvalProcessor(_Blip2ImageProcessor):
    """Image preprocessing for evaluation and chat: the same as for training."""


def takes_mean_and_std(name: str) -> bool:
    """Whether a registered processor normalises as these do, by a `mean` and a `std`."""
    return issubclass(registry.get_processor_class(name), _Blip2ImageProcessor)


@registry.register_processor("blip_caption")
@dataclass
class BlipCaptionProcessor(BaseProcessor):
    """Caption text -> lower case, without most punctuation, at most `max_words` words, after `prompt`.

    Each of . ! " ( ) * # : ; ~ becomes a blank, a run of whitespace one blank, and the ends are trimmed
    of newlines and blanks. Words are what single blanks separate.

    Fields:
        prompt: put before every caption as it is; not cleaned, not counted.
        max_words: words kept of the caption.
    """

    prompt: str = ""
    max_words: int = 50

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise ConfigError(f"prompt must be text, got {self.prompt!r}")
        _require_positive_int("max_words", self.max_words)

    def __call__(self, item: str) -> str:
        if not isinstance(item, str):
            raise SampleError(f"a caption must be text, got {type(item).__name__}: {item!r:.80}")
        text = _PUNCTUATION.sub(" ", item.lower())
        text = _WHITESPACE_RUN.sub(" ", text).rstrip("\n").strip(" ")
        return self.prompt + " ".join(text.split(" ")[: self.max_words])


def _require_positive_int(key: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key} must be a whole number above zero, got {value!r}")


def _three_numbers(key: str, value: Any) -> tuple[float, float, float]:
    if isinstance(value, Sequence) and len(value) == 3 and all(isinstance(v, Real) for v in value):
        return tuple(float(v) for v in value)
    raise ConfigError(f"{key} must be three numbers (R, G, B), got {value!r}")


@functools.cache  # once a process: the same section is often read for several datasets
def _warn_that_scale_is_ignored() -> None:
    log.warning("min_scale and max_scale have no effect: images are resized without cropping, as published")
