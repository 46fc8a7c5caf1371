"""Opening image files of every kind as upright 8-bit RGB, with errors that name the file."""

import functools
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag

from minigpt4.common.errors import SampleError, first_line

ImageSource = str | Path | bytes | BinaryIO | Image.Image

# What a file may cost before its pixels are looked at: a few bytes can claim gigabytes of memory. Pillow guards the
# number of pixels, this module the rest.
MAX_SIDE = 65_535
"""Pixels of the longer side, JPEG's own limit. Resizing takes memory by the longer side, however short the other is."""
MAX_RATIO = 200
"""Longer side to shorter. The longest panoramas and screenshots have 50; of a line, a square shows nothing."""
MAX_BYTES = 2 << 30
"""Of a file. The pixels that Pillow takes need less, uncompressed and with 16 bits a channel."""
MAX_TILE = 1 << 24
"""Pixels of a tile of a TIFF that is smaller than its tiles."""
MAX_SCANS = 50
"""Of a JPEG. Encoders of progressive ones write a dozen; each takes time for all pixels, and may have 14 bytes."""
MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)
"""Of a JPEG, also between the bytes of a scan."""
FORMATS = (
    *("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "JPEG2000", "PPM", "DIB", "ICO", "PCX", "QOI", "SGI", "SUN"),
    *("HEIF", "JXL"),  # by plugins of Pillow, where they are registered
    "TGA",  # has no signature, so it comes last
)
"""What is decoded, by Pillow's names. It knows more, which nobody's data is; for EPS it runs another program."""
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".jp2")
"""Endings of files that are taken for images where nothing else says so."""

TILE_WIDTH, TILE_LENGTH = 322, 323
"""Tags of a TIFF."""

STRIP = 1 << 20
"""Pixels of deep grey that are scaled at once; each takes 8 bytes, several times over."""

# How files of other kinds begin, or go on after 4 bytes.
_OTHERS = {
    b"%!PS": "EPS",
    b"\xc5\xd0\xd3\xc6": "EPS",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<?xml": "SVG or other XML",
    b"<!DOCTYPE": "HTML",
    b"<!doctype": "HTML",
    b"<html": "HTML",
    b"ftyphei": "HEIC",
    b"ftypmif1": "HEIC",
    b"ftypavi": "AVIF",
    b"\xff\x0a": "JPEG XL",
    b"JXL ": "JPEG XL",
    b"8BPS": "PSD",
    b"DDS ": "DDS",
    b"BLP": "BLP",
    b"icns": "ICNS",
    b"SIMPLE": "FITS",
    b"\xd7\xcd\xc6\x9a": "WMF",
}

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

# Pillow warns of what is read all the same, or is refused here: nothing to tell of a million files, nor to stop for.
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_file(path: str | Path, label: str | None = None) -> BinaryIO:
    """An image's file, open to be read; SampleError, which calls it `label`, if it is missing or has over MAX_BYTES.

    Only regular files: to open a pipe is to wait for its writer, and a device may never end.
    """
    label = label or str(path)
    try:
        status = Path(path).stat()
        is_file = stat.S_ISREG(status.st_mode)
        if is_file and status.st_size <= MAX_BYTES:
            return Path(path).open("rb")
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise SampleError(f"{label}: cannot be opened ({reason}); check the image path") from error
    if is_file:
        raise SampleError(f"{label}: the file is too large; {status.st_size:,} bytes are more than {MAX_BYTES:,}")
    kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
    raise SampleError(f"{label}: cannot be opened (it is {kind}, no file); check the image path")


def opened(file: BinaryIO, label: str) -> Image.Image:
    """The image of a file, not yet decoded; SampleError if it is of another kind. A decoder may raise anything else."""
    Image.init()
    try:
        image = Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])
    except UnidentifiedImageError as error:
        raise SampleError(f"{label}: {_other(file)}") from error
    tags = getattr(image, "tag_v2", {})
    tile = int(tags.get(TILE_WIDTH, 0)) * int(tags.get(TILE_LENGTH, 0))
    if tile > max(MAX_TILE, image.width * image.height):
        raise SampleError(f"{label}: the image is too large; its tiles have {tile:,} pixels; save it without tiles")
    if image.format in ("JPEG", "MPO") and _scans(image.fp) > MAX_SCANS:
        raise SampleError(f"{label}: the image has more than {MAX_SCANS} scans; save it anew, as PNG or JPEG")
    return image


def require_size(image: Image.Image, label: str) -> None:
    """SampleError unless the image has pixels, and sides within MAX_SIDE and MAX_RATIO."""
    shorter, longer = sorted(image.size)
    size = f"{image.width} x {image.height} pixels"
    if shorter < 1:
        raise SampleError(f"{label}: no picture; it has {size}")
    if longer > MAX_SIDE:
        raise SampleError(f"{label}: the image is too large; {size}, and a side may have {MAX_SIDE:,}; scale it down")
    if longer > MAX_RATIO * shorter:
        raise SampleError(
            f"{label}: the image is too narrow; {size}, and a side may be {MAX_RATIO} times the other; cut it in pieces"
        )


def _scans(file: BinaryIO) -> int:
    """How often a JPEG's decoder will go over its pixels, by the markers that it will find."""
    file.seek(0)  # decoders begin at a place of their own
    content, at, scans, in_scan = file.read(MAX_BYTES), 2, 0, False
    while (marker := MARKER.search(content, at)) and marker[1] != b"\xd9":  # its end, though a film may follow
        at = marker.end()
        if in_scan and marker[1] < b"\xc0":
            continue  # no marker: the decoder looks for the next one byte by byte
        in_scan = marker[1] == b"\xda"
        scans += in_scan
        at += int.from_bytes(content[at : at + 2], "big")
    return scans


def _other(file: BinaryIO) -> str:
    """What is wrong with a file that no decoder takes."""
    file.seek(0)
    head = file.read(16)
    kind = next((kind for start, kind in _OTHERS.items() if head.startswith(start) or head[4:].startswith(start)), None)
    if kind:
        return f"not an image that is read: it is {kind}; save it as PNG or JPEG"
    return f"not an image, or its beginning is damaged; kinds that are read: {', '.join(FORMATS)}"


class _Metered:
    """A file of which only so many bytes can be read."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self._file, self._left = file, left
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise OSError("the tags claim more bytes than there are")  # Pillow goes on with those that it has
        return self._file.read(size)


def _metered(load: Callable[[Any, BinaryIO], None]) -> Callable[[Any, BinaryIO], None]:
    """Tags of TIFF and EXIF. Pillow copies what each claims, and each of 65,535 may claim the same megabyte."""

    @functools.wraps(load)
    def load_metered(directory: Any, file: BinaryIO) -> None:
        here = file.tell()
        length = file.seek(0, 2)
        file.seek(here)
        load(directory, _Metered(file, 2 * length))  # an honest file has room for all of its tags

    return load_metered


TiffImagePlugin.ImageFileDirectory_v2.load = _metered(TiffImagePlugin.ImageFileDirectory_v2.load)


def open_image(source: ImageSource, name: str | None = None) -> Image.Image:
    """Read a whole image as upright RGB, 8 bits a channel (the first frame of an animation).

    `source` is a path, the bytes of a file, an open binary file, which stays open, or a Pillow image. `name` is
    how errors call the image where the source does not tell, for instance "shard.tar/000012.jpg".
    SampleError when the file is missing, damaged, cut off, of a kind that is not read, or larger than the limits
    here or Pillow's limit of pixels.
    """
    image = _read_rgb(source, name, at_least=None)
    # A copy of its own lets go of the decoder and the compressed bytes that it may hold.
    return image if type(image) is Image.Image and image is not source else image.copy()


def process_image(
    processor: Callable[[Image.Image], Any], source: ImageSource, name: str | None = None, *, as_uint8: bool = False
) -> Any:
    """What `processor` makes of an image that nobody else needs; `source`, `name` and errors are `open_image`'s.

    It spares the copy, which for a large photo takes as long as decoding: fresh memory pages are slow. A processor's
    `decode_at_least` (pixels, or None) lets a JPEG file be decoded at a half, a quarter or an eighth of its size as
    long as both sides keep so many pixels: faster, and not the same picture.

    Args:
        as_uint8: give the processor's `uint8` of it, if it has that, in place of what the model reads.
    """
    image = _read_rgb(source, name, getattr(processor, "decode_at_least", None))
    return getattr(processor, "uint8", processor)(image) if as_uint8 else processor(image)


def _read_rgb(source: ImageSource, name: str | None, at_least: int | None) -> Image.Image:
    """The image as upright RGB; it may be `source`, or hold on to its decoder."""
    label = name or _label(source)
    if isinstance(source, Image.Image):
        return to_rgb(source, label)
    # Pillow never sees a path: from a path it maps uncompressed TIFFs into memory, and scrambles those
    # that are to be turned by 90 degrees.
    if isinstance(source, str | Path):
        binary = open_file(source, label)
    else:
        binary = BytesIO(source) if isinstance(source, bytes) else nullcontext(source)
    with binary as file, _decoding(label), opened(file, label) as image:
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
    try:
        yield
    except SampleError:
        raise
    except Image.DecompressionBombError as error:
        raise SampleError(f"{label}: the image is too large; {error}") from error
    except Exception as error:
        raise SampleError(f"{label}: the image is damaged or cut off; fetch it again: {first_line(error)}") from error


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


def _label(source: ImageSource) -> str:
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, bytes):
        return f"<image of {len(source)} bytes>"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", None) or f"<image of {source.width} x {source.height} pixels>")
    return str(getattr(source, "name", "<image from an open file>"))
