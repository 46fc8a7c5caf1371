import io
import zlib

import pytest
from PIL import Image

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.serving.limits import Limits, TooLargeError, read_image


def png(width, height):
    """A valid PNG of one grey bit a pixel, made row by row so that the test needs no memory for it."""

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    packer = zlib.compressobj()
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join([packer.compress(row) for _ in range(height)]) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_an_ordinary_image_is_read_from_bytes_and_from_a_file(parity_dir):
    file = parity_dir / "images" / "img0_rgb_nonsquare.png"
    assert read_image(file, Limits()).tobytes() == Image.open(file).convert("RGB").tobytes()
    assert read_image(file.read_bytes(), Limits()).mode == "RGB"


@pytest.mark.parametrize("side", [8000, 20000])
def test_too_many_pixels_are_refused_before_they_are_decoded(side):
    with pytest.raises(TooLargeError, match="pixels"):
        read_image(png(side, side), Limits())


def test_an_image_of_exactly_as_many_pixels_is_read():
    assert read_image(png(40, 25), Limits(image_pixels=1000)).size == (40, 25)
    with pytest.raises(TooLargeError, match="41 x 25 pixels"):
        read_image(png(41, 25), Limits(image_pixels=1000))


def test_too_many_bytes_are_refused(tmp_path):
    (tmp_path / "big.png").write_bytes(bytes(30 << 20))
    with pytest.raises(TooLargeError, match=r"holiday: 30.0 MiB are more than 20 MiB") as error:
        read_image(tmp_path / "big.png", Limits(), "holiday")
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"<html></html>", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_named_without_a_path(content):
    with pytest.raises(SampleError, match="the image"):
        read_image(content, Limits())


def test_a_damaged_image_is_an_error():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "JPEG")
    with pytest.raises(SampleError, match="damaged"):
        read_image(buffer.getvalue()[:-40], Limits())


def test_a_limit_cannot_be_switched_off():
    with pytest.raises(ConfigError, match="images: 0"):
        Limits(images=0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_images_of_the_web_are_read(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind)
    assert read_image(buffer.getvalue(), Limits()).size == (8, 8)


@pytest.mark.parametrize("kind", ["EPS", "PCX"])
def test_kinds_that_are_not_of_the_web_are_refused_before_they_are_decoded(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind)
    with pytest.raises(SampleError, match=f"{kind} files are not taken"):
        read_image(buffer.getvalue(), Limits())
