import io
import os

import pytest
from PIL import Image

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.serving.uploads import Limits, TooLargeError, read_image


def test_an_ordinary_image_is_read_from_bytes_and_from_a_file(parity_dir):
    file = parity_dir / "images" / "img0_rgb_nonsquare.png"
    assert read_image(file, Limits()).tobytes() == Image.open(file).convert("RGB").tobytes()
    assert read_image(file.read_bytes(), Limits()).mode == "RGB"


def test_too_many_pixels_and_bytes_are_refused_before_they_are_decoded(make_png, tmp_path):
    for side in (8000, 20000):
        with pytest.raises(TooLargeError, match="pixels"):
            read_image(make_png(side, side), Limits())
    assert read_image(make_png(40, 25), Limits(image_pixels=1000)).size == (40, 25)
    with pytest.raises(TooLargeError, match="41 x 25 pixels"):
        read_image(make_png(41, 25), Limits(image_pixels=1000))
    with pytest.raises(ConfigError, match="images: 0"):  # a limit cannot be switched off
        Limits(images=0)
    (tmp_path / "big.png").write_bytes(bytes(30 << 20))
    with pytest.raises(TooLargeError, match=r"holiday: 30.0 MiB are more than 20 MiB") as error:
        read_image(tmp_path / "big.png", Limits(), "holiday")
    assert str(tmp_path) not in str(error.value)


def image_file(kind):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def test_images_of_the_web_are_read_and_others_refused():
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        assert read_image(image_file(kind), Limits()).size == (64, 64)
    refused = {b"": "the file", b"GIF89a": "the file", image_file("JPEG")[:-40]: "damaged"}
    refused |= {image_file(kind): f"{kind} files are not taken" for kind in ("EPS", "PCX")}
    for content, reason in refused.items():
        with pytest.raises(SampleError, match=reason):
            read_image(content, Limits())


def jpeg_of_many_scans(repeated, between=b"", tail=b""):
    """A progressive JPEG whose last scan comes again and again: the same picture, decoded for as long as one likes."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x010E] = "\xff\xda" * 100
    Image.linear_gradient("L").save(buffer, "JPEG", progressive=True, exif=exif, comment=b"\xff\xda\xff\xd9" * 100)
    content = buffer.getvalue()
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + (between + scan) * repeated + content[-2:] + tail


def test_a_jpeg_that_is_decoded_again_and_again_is_refused_before():
    assert read_image(jpeg_of_many_scans(30, tail=b"\xff\xda" * 1000), Limits()).size == (256, 256)
    for filler in (b"", b"\xff", b"\xff\x01\xff", b"\0"):
        with pytest.raises(SampleError, match="scans"):
            read_image(jpeg_of_many_scans(100, filler), Limits())


def test_what_is_no_regular_file_is_one_error_that_does_not_tell_why(tmp_path, parity_dir):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(parity_dir / "images" / "img3_rgb.png")
    for path in ("/dev/zero", "/dev/stdin", "pipe", ".", "nothing", "link", "a\0b", "\udc80"):
        with pytest.raises(SampleError) as error:
            read_image(tmp_path / path, Limits())
        assert str(error.value) == "the file: cannot be read; give it again", path
