"""Untrusted images: their limits, and how they are read."""

import os
import stat
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from minigpt4.common.errors import ConfigError, SampleError

MIB = 1 << 20
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Kinds of files that are decoded; Pillow knows more, and hands some of them to other programs."""


class TooLargeError(SampleError):
    """More bytes or pixels than are accepted."""


@dataclass(frozen=True)
class Limits:
    """Upper bounds of the page and the API; none of them can be switched off, only raised."""

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


def read_image(source: bytes | Path, limits: Limits, name: str = "the file") -> Image.Image:
    """An untrusted image as upright RGB; its size is checked before it is decoded.

    `name` is how errors call it, so that they do not show a path of this machine: TooLargeError for too many bytes or
    pixels, SampleError for no image, a damaged one, or a kind that is not among `FORMATS`.
    """
    from minigpt4.processors import open_image  # brings torch, which nothing else here needs

    content = source if isinstance(source, bytes) else _content(source, limits, name)
    _check_bytes(len(content), limits, name)
    try:
        with Image.open(BytesIO(content)) as image:
            (width, height), kind = image.size, image.format
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{name}: more pixels than {limits.image_pixels:,}") from error
    except Exception:
        return open_image(content, name)  # which says what is wrong with it
    if kind not in FORMATS:
        raise SampleError(f"{name}: {kind} files are not taken; send PNG or JPEG")
    if width * height > limits.image_pixels:
        raise TooLargeError(f"{name}: {width} x {height} pixels are more than {limits.image_pixels:,}; scale it down")
    return open_image(content, name)


def _content(path: Path, limits: Limits, name: str) -> bytes:
    """Of a regular file; the same error for whatever else a path may name."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:  # a pipe would wait
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode):
                _check_bytes(status.st_size, limits, name)
                return file.read(limits.image_bytes + 1)
    except TooLargeError:
        raise
    except (OSError, ValueError):
        pass
    raise SampleError(f"{name}: cannot be read; give it again")


def _check_bytes(size: int, limits: Limits, name: str) -> None:
    if size > limits.image_bytes:
        raise TooLargeError(f"{name}: {size / MIB:.1f} MiB are more than {limits.image_bytes / MIB:g} MiB")
