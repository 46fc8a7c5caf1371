"""Opening image files of every kind as upright 8-bit RGB, with errors that name the file."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.ExifTags import Base as ExifTag

from minigpt4.common.errors import SampleError, errors_as
from minigpt4.processors.formats import open_file, opened, require_size

ImageSource = str | Path | bytes | BinaryIO | Image.Image

STRIP = 1 << 20
"""Pixels of deep grey that are scaled at once; each takes 8 bytes, several times over."""

# EXIF orientation -> what puts the picture upright (1, and values outside the standard, need nothing).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Everywhere that Pillow looks for an orientation once an image is loaded.
_ORIENTATION_CARRIERS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


def open_image(source: ImageSource, name: str | None = None) -> Image.Image:
    """Read a whole image as upright RGB, 8 bits a channel (the first frame of an animation).

    `source` is a path, the bytes of a file, an open binary file, which stays open, or a Pillow image. `name` is
    how errors call the image where the source does not tell, for instance "shard.tar/000012.jpg".
    SampleError when the file is missing, damaged, cut off, of a kind that is not read, or larger than the limits
    in `formats` or Pillow's limit of pixels.
    """
    image = _read_rgb(source, name, at_least=None)
    # A copy of its own lets go of the decoder and the compressed bytes that it may hold.
    return image if type(image) is Image.Image and image is not source else image.copy()


def process_image(
    processor: Callable[[Image.Image], Any], source: ImageSource, name: str | None = None, *, levels: bool = False
) -> Any:
    """What `processor` makes of an image that nobody else needs; `source`, `name` and errors are `open_image`'s.

    It spares the copy, which for a large photo takes as long as decoding: fresh memory pages are slow. A processor's
    `decode_at_least` (pixels, or None) lets a JPEG file be decoded at a half, a quarter or an eighth of its size as
    long as both sides keep so many pixels: faster, and not the same picture.

    Args:
        levels: give the processor's `levels`, if it has them, in place of what the model reads.
    """
    image = _read_rgb(source, name, getattr(processor, "decode_at_least", None))
    return getattr(processor, "levels", processor)(image) if levels else processor(image)


def _read_rgb(source: ImageSource, name: str | None, at_least: int | None) -> Image.Image:
    """The image as upright RGB; it may be `source`, or hold on to its decoder."""
    label = name or _label(source)
    if isinstance(source, Image.Image):
        return to_rgb(source, label)
    with _binary(source, label) as file, _decoding(label), opened(file, label) as image:
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        return to_rgb(image, label)


def to_rgb(image: Image.Image, name: str | None = None) -> Image.Image:
    """Any Pillow image as upright 8-bit RGB; the image itself where it already is that.

    Transparency is dropped, not blended, as in the published preprocessing. Grey levels of more than
    8 bits are scaled to 0..255. SampleError, which calls it `name`, when it cannot be decoded or is too large.
    """
    label = name or _label(image)
    with _decoding(label):
        require_size(image, label)
        image.load()
        require_size(image, label)  # an icon says one size and may hold another
        # Pillow rotates TIFFs while it loads them, so the orientation is only right afterwards.
        image = _upright(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _eight_bits(image)
        if image.mode == "P" and "transparency" in image.info:
            # The same colours as a direct conversion, without Pillow's warning about it.
            image = image.convert("RGBA")
        return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _decoding(label: str) -> Iterator[None]:
    """Whatever decoders raise becomes a SampleError."""
    with errors_as(SampleError, f"{label}: the image is damaged or cut off; fetch it again"):
        try:
            yield
        except Image.DecompressionBombError as error:
            raise SampleError(f"{label}: the image is too large; {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF or XMP orientation says, which is then forgotten."""
    try:
        orientation = image.getexif().get(ExifTag.Orientation)
        method = _UPRIGHT.get(orientation)
    except Exception:  # damaged metadata beside good pixels is common on the web
        return image
    if method is None:
        return image
    turned = image.transpose(method)
    for key in _ORIENTATION_CARRIERS:
        turned.info.pop(key, None)
    return turned


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey levels of mode I;16*, I or F scaled to mode L, where Pillow would clip; black if not finite."""
    white = 65535.0 if image.mode.startswith("I;16") else _white_level(image)
    rows = [np.rint(levels * (255.0 / white)).clip(0, 255).astype(np.uint8) for levels in _strips(image)]
    return Image.fromarray(np.concatenate(rows))


def _white_level(image: Image.Image) -> float:
    """The value that stands for white: the smallest usual range that holds the brightest pixel."""
    brightest = max(float(levels.max(initial=0.0)) for levels in _strips(image))
    usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    return next((white for white in usual if brightest <= white), brightest)


def _strips(image: Image.Image) -> Iterator[np.ndarray]:
    """Grey levels (rows, width) float64, from top to bottom."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        yield np.nan_to_num(np.asarray(strip, dtype=np.float64), posinf=0.0, neginf=0.0)


def _binary(source: str | Path | bytes | BinaryIO, label: str) -> AbstractContextManager[BinaryIO]:
    # Pillow never sees a path: from a path it maps uncompressed TIFFs into memory, and scrambles those
    # that are to be turned by 90 degrees.
    if isinstance(source, str | Path):
        return open_file(source, label)
    return BytesIO(source) if isinstance(source, bytes) else nullcontext(source)


def _label(source: ImageSource) -> str:
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, bytes):
        return f"<image of {len(source)} bytes>"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", None) or f"<image of {source.width} x {source.height} pixels>")
    return str(getattr(source, "name", "<image from an open file>"))
