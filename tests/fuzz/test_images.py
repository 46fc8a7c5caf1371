"""Damaged image files of every kind that Pillow writes: each is an image, or a SampleError that names it."""

import io
import random
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigpt4.common.errors import SampleError
from minigpt4.processors import Blip2ImageEvalProcessor, open_image, process_image

MODES = ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16", "I", "F")
MORE = {
    "GIF": ({"save_all": True},),
    "PNG": ({"save_all": True}, {"exif": True}),
    "WEBP": ({"save_all": True}, {"exif": True}, {"lossless": True}),
    "JPEG": ({"progressive": True, "exif": True}, {"icc_profile": b"profile" * 999, "comment": b"!" * 999}),
    "TIFF": tuple({"compression": one} for one in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4")),
    "BMP": ({"compression": 1},),
}
SMALL = Blip2ImageEvalProcessor(image_size=8)
PIXELS = 1 << 22
"""Pillow's limit here: twice as many are refused."""
MEMORY = 400
"""MiB that a file may take under this limit."""
ONLY = {"group4": ("1",), "jpeg": ("RGB", "L")}
"""Compressions of TIFFs, in other modes of which the process dies."""
NUMBERS = (0, 1, 2, 3, 255, 256, 999, 2048, 65_535, 65_536, 4_000_000, 2**31 - 1, 2**31, 2**32 - 1)


@pytest.fixture(scope="module")
def valid() -> list[bytes]:
    """Files of all kinds and modes."""
    Image.init()
    colours = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    exif, files = Image.Exif(), []
    exif[0x0112] = 6
    for kind, mode in product(sorted(Image.SAVE), MODES):
        image = Image.fromarray(colours).convert("L" if mode == "I;16" else mode).convert(mode)
        for options in ({}, *MORE.get(kind, ())):
            more = {"append_images": [image.copy()]} if "save_all" in options else {}
            more |= {"exif": exif} if "exif" in options else {}
            file = io.BytesIO()
            if mode in ONLY.get(options.get("compression"), MODES):
                with suppress(Exception):  # the kind has no such mode
                    image.save(file, kind, **options | more)
                    files.append(file.getvalue())
    return files


def damaged(files: list[bytes], choose: random.Random) -> bytes:
    """One of the files, changed in up to three ways."""
    content = bytearray(choose.choice(files))
    for _ in range(choose.randint(1, 3)):
        place = choose.randrange(max(1, choose.choice((len(content), min(len(content), 64)))))
        change = choose.choice(("flip", "flip", "number", "number", "cut", "drop", "repeat", "splice", "fill"))
        if change == "flip":
            for _ in range(choose.choice((1, 2, 8))):
                content[place : place + 1] = bytes([choose.randrange(256)])
                place = choose.randrange(max(1, len(content)))
        elif change == "number":  # a size, a count or an offset, as most headers have them
            size, order = choose.choice((2, 4)), choose.choice(("little", "big"))
            number = choose.choice(NUMBERS) % (1 << 8 * size)
            content[place : place + size] = number.to_bytes(size, order)
        elif change == "cut":
            del content[place:]
        elif change == "drop":
            del content[place : place + choose.randint(1, 40)]
        elif change == "repeat":
            content[place:place] = content[place : place + choose.randint(1, 400)] * choose.choice((1, 2, 50))
        elif change == "splice":
            content[place:] = choose.choice(files)[place:]
        else:
            content[place : place + 20] = bytes([choose.choice((0, 255))]) * choose.choice((20, 5000))
    return checked(bytes(content)) if choose.random() < 0.7 else bytes(content)


def checked(content: bytes) -> bytes:
    """A PNG with the checksums that its chunks have now, without which no decoder looks into them."""
    if not content.startswith(b"\x89PNG"):
        return content
    place, chunks = 8, [content[:8]]
    while place + 12 <= len(content):
        size = min(int.from_bytes(content[place : place + 4], "big"), len(content) - place - 12)
        body = content[place + 4 : place + 8 + size]
        chunks += [content[place : place + 4], body, zlib.crc32(body).to_bytes(4, "big")]
        place += 12 + size
    return b"".join([*chunks, content[place:]])


def peak_mib() -> int:
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024


@pytest.fixture
def bounded(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PIXELS)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_mib()
    yield
    assert peak_mib() - before < MEMORY


def refusal(source: bytes | Path, name: str | None = None) -> str:
    """Why it cannot be read, "" if it can."""
    try:
        image = open_image(source, name)
        assert (image.mode, process_image(SMALL, source, name).shape) == ("RGB", (3, 8, 8))
        return ""
    except SampleError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore")
def test_damaged_image_is_an_image_or_an_error_that_names_it(valid, random_cases, bounded, tmp_path):
    refusals = []
    for name, choose in random_cases(1000):
        content = damaged(valid, choose)
        file = tmp_path / f"a{choose.choice(('.jpg', '.png', '.tif', '.webp', '.avif', '.eps', ''))}"
        file.write_bytes(content)
        refusals.append(refusal(file) if choose.random() < 0.5 else refusal(content, str(file)))
        assert not refusals[-1] or refusals[-1].startswith(f"{file}: "), name
    assert 0.1 < sum(map(bool, refusals)) / len(refusals) < 0.9


def test_undamaged_images_are_read_or_of_a_kind_that_is_not(valid):
    refused = [reason for reason in map(refusal, valid) if reason]
    assert 0 < len(refused) < 0.5 * len(valid)
    assert all("not an image" in reason for reason in refused)
