"""What one visitor or client may ask for; the page and the API share these."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.processors import open_image

MIB = 1 << 20
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Kinds of files that are decoded; Pillow knows more, and hands some of them to other programs."""


class TooLargeError(SampleError):
    """More bytes or pixels than are accepted."""


@dataclass(frozen=True)
class Limits:
    """Upper bounds; none of them can be switched off, only raised."""

    image_bytes: int = 20 * MIB
    """Of an image's file."""
    image_pixels: int = 50_000_000
    """Width times height; decoded, each takes three or four bytes."""
    images: int = 8
    """In one conversation."""
    new_tokens: int = 1024
    """Of one answer."""
    beams: int = 10
    question_chars: int = 20_000
    """Of one message."""
    turns: int = 1000
    """Messages of one conversation."""
    seconds: float = 300.0
    """From a question to the end of its answer, waiting included."""
    waiting: int = 64
    """Requests that wait, of all visitors together."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ConfigError(f"{name}: {value} must be above 0")


def read_image(source: bytes | Path, limits: Limits, name: str = "the image") -> Image.Image:
    """An image that a stranger sent, as upright RGB; its size is looked at before it is decoded.

    `name` is how errors call it, for a path on this machine is nobody's business.

    Raises:
        TooLargeError: too many bytes or pixels.
        SampleError: no image, damaged, or of a kind that is not among `FORMATS`.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > limits.image_bytes:
        raise TooLargeError(f"{name}: {size / MIB:.1f} MiB are more than {limits.image_bytes / MIB:g} MiB")
    content = source if isinstance(source, bytes) else source.read_bytes()
    _check_head(content, limits, name)
    return open_image(content, name)


def _check_head(content: bytes, limits: Limits, name: str) -> None:
    try:
        with Image.open(BytesIO(content)) as image:
            (width, height), kind = image.size, image.format
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{name}: more pixels than {limits.image_pixels:,}") from error
    except Exception:  # open_image says what is wrong with it
        return
    if kind not in FORMATS:
        raise SampleError(f"{name}: {kind} files are not taken; send PNG or JPEG")
    if width * height > limits.image_pixels:
        raise TooLargeError(f"{name}: {width} x {height} pixels are more than {limits.image_pixels:,}; scale it down")
