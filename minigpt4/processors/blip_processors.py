"""The processors of the published recipes, and how image files of every kind become upright 8-bit RGB."""

import functools
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import BytesIO
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from minigpt4.common.errors import ConfigError, SampleError, errors_as, first_line
from minigpt4.common.registry import registry
from minigpt4.common.utils import wrapped
from minigpt4.processors.base_processor import BaseProcessor

log = logging.getLogger(__name__)

ImageSource = str | Path | bytes | Image.Image

# CLIP's channel statistics (RGB, of pixel values in 0..1), which EVA-CLIP was trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
WHITE = (255.0, 255.0, 255.0)

FORMATS = (
    *("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "JPEG2000", "PPM", "DIB", "ICO", "PCX", "QOI", "SGI", "SUN"),
    *("HEIF", "JXL"),  # by plugins of Pillow, where they are registered
    "TGA",  # has no signature, so it comes last
)
"""Formats that are decoded, by Pillow's names; for EPS, Pillow would run another program."""
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".jp2")
"""Endings of image files where nothing else tells them."""

# Limits that hold before anything is decoded: a few bytes can claim gigabytes. Pillow limits the number of pixels.
MAX_SIDE = 65_535
"""Of the longer side, JPEG's own limit: resizing takes memory by the longer side, however short the other is."""
MAX_RATIO = 200
"""Longer side to shorter; the longest panoramas and screenshots have 50."""
MAX_BYTES = 2 << 30
"""Of a file."""
MAX_TILE = 1 << 24
"""Pixels of a tile of a TIFF that is smaller than its tiles."""
MAX_SCANS = 50
"""Of a JPEG; progressive ones have a dozen. Each takes time for all pixels, and may have 14 bytes."""

_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_PUNCTUATION = re.compile(r'[.!"()*#:;~]')
_WHITESPACE_RUN = re.compile(r"\s{2,}")

# Pillow warns about files that are read all the same, or refused here.
warnings.filterwarnings("ignore", module=r"PIL\.")


class _MeteredFile:
    """A file of TIFF or EXIF tags. Pillow copies what each claims, and each of 65,535 may claim the same megabyte."""

    def __init__(self, file: BinaryIO) -> None:
        here = file.tell()
        self._left = 2 * file.seek(0, 2)  # an honest file has room for all of its tags
        file.seek(here)
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise OSError("the tags claim more bytes than there are")  # Pillow goes on with those that it has
        return self._file.read(size)


_load_tags = TiffImagePlugin.ImageFileDirectory_v2.load
TiffImagePlugin.ImageFileDirectory_v2.load = lambda tags, file: _load_tags(tags, _MeteredFile(file))


# Image files


def open_image(source: ImageSource, name: str | None = None) -> Image.Image:
    """Read a whole image as upright RGB, 8 bits a channel (the first frame of an animation).

    `source` is a path, the bytes of a file, or a Pillow image; errors call it `name`, or by its path. SampleError when
    it is missing, damaged, cut off, of a format that is not read, or larger than the limits.
    """
    image = _upright_rgb(source, name)
    # A copy lets go of the decoder and of the compressed bytes that it may hold.
    return image if type(image) is Image.Image and image is not source else image.copy()


def process_image(processor: Callable[[Image.Image], Any], source: ImageSource, name: str | None = None) -> Any:
    """`processor(open_image(source, name))` without the copy, which for a large photo takes as long as decoding."""
    return processor(_upright_rgb(source, name))


def read_file(path: str | Path, name: str | None = None) -> bytes:
    """The bytes of an image file; SampleError, which calls it `name`, if it is missing or has over MAX_BYTES.

    Only regular files: opening a pipe would wait for its writer, and a device may never end.
    """
    name, path = name or str(path), Path(path)
    with errors_as(SampleError, f"{name}: cannot be opened; check the image path"):
        size = path.stat().st_size
        if not path.is_file():
            raise OSError("a folder, pipe or device")
        if size > MAX_BYTES:
            raise SampleError(f"{name}: the file is too large; {size:,} bytes are more than {MAX_BYTES:,}")
        return path.read_bytes()


def to_rgb(image: Image.Image, name: str | None = None) -> Image.Image:
    """Any Pillow image as upright 8-bit RGB; the image itself where it already is that.

    Transparency is dropped, as published; grey levels of more than 8 bits are scaled to 0..255. SampleError, which
    calls it `name`, when it cannot be decoded or is too large.
    """
    name = name or str(getattr(image, "filename", None) or f"<image of {image.width} x {image.height} pixels>")
    with _sample_errors(name):
        _require_size(image, name)
        image.load()
        _require_size(image, name)  # an icon says one size and may hold another
        with suppress(Exception):  # damaged metadata beside good pixels is common on the web
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                image = ImageOps.exif_transpose(image)  # after decoding: Pillow rotates TIFFs while it loads them
        if image.mode.startswith("I") or image.mode == "F":
            image = _eight_bits(image)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours as directly, without Pillow's warning
        return image if image.mode == "RGB" else image.convert("RGB")


def _upright_rgb(source: ImageSource, name: str | None) -> Image.Image:
    """The image of `source`; it may be `source` itself, or hold on to its decoder."""
    if isinstance(source, Image.Image):
        return to_rgb(source, name)
    # Pillow never sees a path: it maps uncompressed TIFFs into memory, and scrambles those that are to be turned.
    name = name or (f"<image of {len(source)} bytes>" if isinstance(source, bytes) else str(source))
    content = source if isinstance(source, bytes) else read_file(source, name)
    Image.init()
    if what := wrapped(content):
        raise SampleError(f"{name}: not an image: {what}")
    with _sample_errors(name), Image.open(BytesIO(content), formats=[f for f in FORMATS if f in Image.OPEN]) as image:
        tags = getattr(image, "tag_v2", {})
        tile = int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_LENGTH, 0))
        if tile > max(MAX_TILE, image.width * image.height):
            raise SampleError(f"{name}: the image is too large; its tiles have {tile:,} pixels; save it without tiles")
        if image.format in ("JPEG", "MPO") and _count_scans(content) > MAX_SCANS:
            raise SampleError(f"{name}: the image has more than {MAX_SCANS} scans; save it anew, as PNG or JPEG")
        return to_rgb(image, name)


@contextmanager
def _sample_errors(name: str) -> Iterator[None]:
    """Whatever decoders raise becomes a SampleError."""
    try:
        yield
    except SampleError:
        raise
    except UnidentifiedImageError as error:
        raise SampleError(f"{name}: not an image, or of a format that is not read; save it as PNG or JPEG") from error
    except Image.DecompressionBombError as error:
        raise SampleError(f"{name}: the image is too large; {error}") from error
    except Exception as error:
        raise SampleError(f"{name}: the image is damaged or cut off; fetch it again: {first_line(error)}") from error


def _require_size(image: Image.Image, name: str) -> None:
    shorter, longer = sorted(image.size)
    if not 0 < longer <= min(MAX_SIDE, MAX_RATIO * shorter):
        limits = f"a side may have {MAX_SIDE:,} and be {MAX_RATIO} times the other; scale it down"
        raise SampleError(f"{name}: the image is too large or narrow; {image.width} x {image.height} pixels, {limits}")


def _count_scans(content: bytes) -> int:
    """How often a JPEG's decoder will go over its pixels, by the markers that it will find."""
    at, scans, in_scan = 2, 0, False
    while (marker := _JPEG_MARKER.search(content, at)) and marker[1] != b"\xd9":  # its end, though a film may follow
        at = marker.end()
        if in_scan and marker[1] < b"\xc0":
            continue  # no marker: the decoder looks for the next one byte by byte
        in_scan = marker[1] == b"\xda"
        scans += in_scan
        at += int.from_bytes(content[at : at + 2], "big")
    return scans


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey levels of mode I;16*, I or F scaled to mode L, where Pillow would clip; black if not finite.

    White is the end of the smallest usual range that holds the brightest pixel.
    """
    levels = np.array(image, dtype=np.float64)
    np.nan_to_num(levels, copy=False, posinf=0.0, neginf=0.0)
    brightest = float(levels.max(initial=0.0))
    usual = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    levels *= 255.0 / next((white for white in usual if brightest <= white), brightest)
    return Image.fromarray(np.rint(levels, out=levels).clip(0, 255, out=levels).astype(np.uint8))


# Processors


@dataclass(frozen=True)
class Uint8Image:
    """One image or a batch on its way to the model, a quarter of its bytes: still to be (pixel / 255 - mean) / std."""

    pixels: Tensor
    """(..., 3, S, S) uint8."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def joined(cls, images: Sequence["Uint8Image"]) -> "Uint8Image":
        """The batch of images of one processor."""
        return replace(images[0], pixels=torch.stack([image.pixels for image in images]))

    @property
    def shape(self) -> torch.Size:
        return self.pixels.shape

    def normalised(self) -> Tensor:
        """What the model reads, (..., 3, S, S) float32, on the device of the pixels."""
        # Divisors are tensors because CUDA multiplies by the reciprocal of a plain number, which gives other bits.
        white, mean, std = (_channels(values, self.pixels.device) for values in (WHITE, self.mean, self.std))
        return self.pixels.float().div_(white).sub_(mean).div_(std)

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        return replace(self, pixels=self.pixels.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return replace(self, pixels=self.pixels.pin_memory())


@functools.lru_cache(maxsize=64)  # making a tensor on a GPU out of numbers waits for it
def _channels(values: tuple[float, float, float], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(3, 1, 1)


@dataclass
class SquareImageProcessor(BaseProcessor):
    """PIL image of any mode and size -> normalised float32 tensor (3, image_size, image_size).

    A subclass says in `square` how an image becomes a square; then (pixel / 255 - mean) / std for each channel.

    Fields:
        image_size: side of the output in pixels.
        mean, std: three numbers each for R, G, B in 0..1; CLIP's by default.
    """

    image_size: int = 224
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD

    def __post_init__(self) -> None:
        _require_positive_int("image_size", self.image_size)
        for key in ("mean", "std"):
            value = getattr(self, key)
            if not (isinstance(value, Sequence) and len(value) == 3 and all(isinstance(v, Real) for v in value)):
                raise ConfigError(f"{key} must be three numbers (R, G, B), got {value!r}")
            setattr(self, key, tuple(float(v) for v in value))
        if min(self.std) <= 0:
            raise ConfigError(f"std must be above zero, got {list(self.std)}")

    def __call__(self, item: Image.Image) -> Tensor:
        return self.uint8(item).normalised()

    def uint8(self, item: Image.Image) -> Uint8Image:
        """The same before it is normalised, (3, image_size, image_size) uint8."""
        if not isinstance(item, Image.Image):
            raise SampleError(f"an image processor takes a PIL image, got {type(item).__name__}")
        pixels_HWC = np.asarray(self.square(to_rgb(item)))
        return Uint8Image(torch.from_numpy(pixels_HWC.transpose(2, 0, 1).copy()), self.mean, self.std)

    def square(self, image: Image.Image) -> Image.Image:
        """An RGB image as one of `image_size` x `image_size`."""
        raise NotImplementedError


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic, by Pillow, as published.

    Width first, then height: newer Pillow releases choose the order of the two passes by the shape of the image, which
    moves pixels by one level.
    """
    widened = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return widened.resize((width, height), Image.Resampling.BICUBIC)


@dataclass
class _Blip2ImageProcessor(SquareImageProcessor):
    """The image is resized to a square, uncropped and whatever its aspect ratio.

    Fields:
        min_scale, max_scale: accepted because published files hold them; as published, they have no effect.
    """

    min_scale: float | None = None
    max_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.min_scale, self.max_scale) != (None, None):
            _warn_that_scale_is_ignored()

    def square(self, image: Image.Image) -> Image.Image:
        return resize(image, self.image_size, self.image_size)

    @property
    def feature_key(self) -> dict[str, Any]:
        """What the pixels depend on besides the image: the same values, the same pixels."""
        return {"kind": "blip2", "image_size": self.image_size, "mean": self.mean, "std": self.std}


@registry.register_processor("blip2_image_train")
class Blip2ImageTrainProcessor(_Blip2ImageProcessor):
    """Image preprocessing for training: as published, the same as for evaluation, without augmentation."""


@registry.register_processor("blip2_image_eval")
class Blip2ImageEvalProcessor(_Blip2ImageProcessor):
    """Image preprocessing for evaluation and chat: the same as for training."""


@dataclass
class _ClipImageProcessor(SquareImageProcessor):
    """CLIP's, as LLaVA uses it: the shorter side is resized to `image_size`, and the centre cut out.

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


def takes_mean_and_std(name: str) -> bool:
    """Whether a registered processor normalises as these do, by a `mean` and a `std`."""
    return issubclass(registry.get_processor_class(name), SquareImageProcessor)


@registry.register_processor("blip_caption")
@dataclass
class BlipCaptionProcessor(BaseProcessor):
    """Caption text -> lower case, without most punctuation, at most `max_words` words, after `prompt`.

    Each of . ! " ( ) * # : ; ~ becomes a blank, a run of whitespace one blank, and the ends are trimmed of newlines and
    blanks. Words are what single blanks separate.

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


@functools.cache  # once a process: the same section is often read for several datasets
def _warn_that_scale_is_ignored() -> None:
    log.warning("min_scale and max_scale have no effect: images are resized without cropping, as published")
