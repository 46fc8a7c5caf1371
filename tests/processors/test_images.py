"""Image files of every kind become upright 8-bit RGB; what is damaged, too large or no image is refused by name."""

import functools
import io
import os
import struct
import subprocess
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from minigpt4.common.errors import SampleError
from minigpt4.conversation.chat import Picture
from minigpt4.datasets.datasets.base_dataset import ImageReader
from minigpt4.inference.engine import Engine
from minigpt4.processors import Blip2ImageEvalProcessor, blip_processors, open_image, process_image, to_rgb
from minigpt4.serving.uploads import Limits, read_image

REPOSITORY = Path(__file__).parents[2]
BROKEN = REPOSITORY / "tests" / "data" / "images"
SMALL = Blip2ImageEvalProcessor(image_size=8)
LOOK = functools.partial(Engine.preprocess, SimpleNamespace(processor=SMALL))
TRAINING_READ = ImageReader(SMALL).read
ORIENTATION = 0x0112
# Stored pixels that show the upright picture [[1, 2, 3], [4, 5, 6]] once each orientation is undone;
# written out by hand from the EXIF standard (where row 0 and column 0 of the file are in the picture).
STORED = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[3, 6], [2, 5], [1, 4]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[4, 1], [5, 2], [6, 3]],
}


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(width: int, height: int) -> Image.Image:
    return Image.new("L", (width, height), 100)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


# Pixels


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_exif_orientation_is_applied_once(kind, options):
    for orientation, rows in STORED.items():
        image = open_image(
            encoded(Image.fromarray(np.array(rows, dtype=np.uint8) * 40), kind, exif=exif(orientation), **options)
        )
        for upright in (image, to_rgb(image)):
            assert np.array_equal(pixels(upright)[..., 0], np.array(STORED[1]) * 40), orientation


def test_exif_orientation_of_a_jpeg_is_applied_and_a_damaged_one_leaves_the_pixels():
    stored = np.zeros((32, 64, 3), dtype=np.uint8)
    stored[:, :32] = (255, 0, 0)  # the camera was held upright: the file lies on its left side
    upright = open_image(encoded(Image.fromarray(stored), "JPEG", exif=exif(6), quality=95))
    assert upright.size == (32, 64)
    assert upright.getpixel((16, 8))[0] > 240 > 15 > upright.getpixel((16, 56))[0]
    content = encoded(Image.fromarray(stored), exif=b"Exif\x00\x00no TIFF header in here")
    assert np.array_equal(pixels(open_image(content)), stored)


def test_alpha_is_dropped_not_blended_and_grey_becomes_three_equal_channels():
    rgba = noise((6, 9, 4))
    assert np.array_equal(pixels(open_image(encoded(Image.fromarray(rgba)))), rgba[..., :3])
    grey_alpha = Image.merge("LA", [Image.fromarray(rgba[..., band]) for band in range(2)])
    assert np.array_equal(pixels(open_image(encoded(grey_alpha))), np.stack([rgba[..., 0]] * 3, axis=-1))
    bit = open_image(encoded(Image.fromarray(np.array([[True, False]]))))
    assert pixels(bit).tolist() == [[[255] * 3, [0] * 3]]
    red, *others = open_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")).getpixel((8, 8))
    assert (red > 250, max(others) < 5) == (True, True)


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"])
def test_palette_gives_its_colours_without_a_warning(transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    content = encoded(image, **({} if transparency is None else {"transparency": transparency}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_image(content)
    assert pixels(opened).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]


@pytest.mark.parametrize(
    ("dtype", "levels", "expected"),
    [
        ("uint16", [0, 257, 257 * 100, 65535], [0, 1, 100, 255]),
        (">u2", [0, 257 * 7, 65535], [0, 7, 255]),
        ("int32", [0, 100, 255], [0, 100, 255]),
        ("int32", [0, 257, 65535], [0, 1, 255]),
        ("int32", [0, 1_000_000, 2_000_000], [0, 128, 255]),
        ("int32", [-5, 0, 255], [0, 0, 255]),
        ("float32", [0.0, 0.2, 1.0], [0, 51, 255]),
        ("float32", [0.0, 51.0, 255.0], [0, 51, 255]),
        ("float32", [0.0, float("nan"), 1.0], [0, 0, 255]),
    ],
)
def test_deep_grey_is_scaled_by_its_range_not_clipped(dtype, levels, expected):
    row = np.array([levels], dtype=dtype)
    image = Image.frombytes("I;16B", row.shape[::-1], row.tobytes()) if dtype == ">u2" else Image.fromarray(row)
    assert pixels(open_image(encoded(image, "TIFF")))[0, :, 0].tolist() == expected
    if dtype == "uint16":
        assert pixels(open_image(encoded(image, "PNG")))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("kind", sorted(set(blip_processors.FORMATS) & (Image.init(), set(Image.SAVE))[1]) + ["MPO"])
def test_every_kind_is_read_from_everywhere_without_its_decoder_and_processed_alike(kind, tmp_path):
    content = encoded(Image.fromarray(noise((40, 30, 3))), kind)
    (tmp_path / "image").write_bytes(content)
    first, *others = [open_image(source) for source in (content, tmp_path / "image", str(tmp_path / "image"))]
    assert (type(first), first.mode) == (Image.Image, "RGB")
    assert all(np.array_equal(pixels(other), pixels(first)) for other in others)
    assert np.array_equal(process_image(lambda image: pixels(to_rgb(image)).copy(), content), pixels(first))


def test_image_that_somebody_has_is_copied_a_film_is_its_first_frame_and_errors_of_a_processor_are_its_own():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    film = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(film).getpixel((0, 0)) == (255, 0, 0)
    content = encoded(Image.fromarray(noise((5, 7, 3))), "JPEG")
    own = open_image(content)
    assert open_image(own) is not own
    assert process_image(lambda image: image.format, content) == "JPEG"
    with pytest.raises(ValueError, match="of the processor"):
        process_image(lambda image: int("of the processor"), content)


def test_reference_rgb_pixels_are_met(parity_dir, golden, golden_tensors):
    for index, entry in enumerate(golden["images"]["files"]):
        expected = golden_tensors[f"images/img{index}/rgb_uint8"].numpy()
        assert np.array_equal(np.asarray(open_image(parity_dir / entry["file"])), expected)


# Sizes, and what a few bytes claim


def icon(inside: bytes) -> bytes:
    """An icon that says it has 16 x 16 pixels."""
    head = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHLL", 16, 16, 0, 0, 1, 32, len(inside), 22)
    return head + inside


def gif_larger_than_its_screen() -> bytes:
    content = bytearray(encoded(grey(3, 700), "GIF"))
    content[6:10] = struct.pack("<HH", 3, 3)
    return bytes(content)


def tagged(entries: list[tuple[int, int, int, int]], after: bytes = b"") -> bytes:
    """A TIFF of these (tag, type, count, value); `after` stands behind its tags."""
    rows = b"".join(struct.pack("<HHLL", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<LH", 8, len(entries)) + rows + b"\0\0\0\0" + after


def greedy_tags(count: int = 3000, size: int = 500_000) -> bytes:
    """Tags that claim the same bytes, `count` times `size` together."""
    tags = tagged([(number, 7, size - 8, 8) for number in range(1, count + 1)])
    return tags.ljust(size, b"\0")


@functools.cache
def huge_tile(side: int = 14_000) -> bytes:
    """A TIFF of 16 x 16 pixels in one tile of `side` x `side`."""
    packed = zlib.compress(bytes(side * side), 1)
    values = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 0, 325: len(packed)}
    start = len(tagged([(tag, 4, 1, value) for tag, value in values.items()]))
    return tagged([(tag, 4, 1, value) for tag, value in (values | {324: start}).items()], packed)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded(grey(1, 100_000)), "1 x 100000 pixels.*65,535"),
        (encoded(grey(80_000, 600)), "80000 x 600 pixels.*65,535"),
        (encoded(grey(2, 401)), "2 x 401 pixels.*200 times"),
        (encoded(grey(401, 2), "JPEG"), "401 x 2 pixels.*200 times"),
        (encoded(grey(70_000, 400), exif=exif(6)), "65,535"),
        (encoded(Image.new("1", (14_000, 14_000))), "pixels|exceeds"),
        (gif_larger_than_its_screen(), "3 x 700 pixels.*200 times"),
        (icon(encoded(grey(5, 1001))), "5 x 1001 pixels.*200 times"),
        (huge_tile(), "tiles have 196,000,000 pixels"),
    ],
    ids=["tall", "wide", "narrow", "flat", "turned", "bomb", "frame", "icon", "tile"],
)
def test_size_beyond_the_limits_is_refused_with_file_size_and_limit(content, reason, tmp_path):
    file = tmp_path / "odd.jpg"
    file.write_bytes(content)
    for read in (
        lambda: open_image(file),
        lambda: TRAINING_READ(file),
        lambda: read_image(content, Limits(), "odd.jpg"),
    ):
        with pytest.raises(SampleError, match=rf"odd\.jpg: .*({reason}|files are not taken)"):
            read()


@pytest.mark.parametrize("size", [(30_000, 600), (65_535, 328), (1, 200)])
def test_panoramas_and_long_screenshots_are_read(size):
    assert process_image(SMALL, encoded(grey(*size))).shape == (3, 8, 8)


@pytest.mark.parametrize("size", [(1, 70_000), (3, 601), (0, 5)])
def test_pillow_image_of_python_code_has_the_same_limits(size, tmp_path):
    image = Image.new("RGB", size)
    for read in (SMALL, SMALL.uint8, open_image, LOOK):
        with pytest.raises(SampleError, match=f"{size[0]} x {size[1]} pixels"):
            read(image)
    assert isinstance(LOOK(Image.new("RGB", (9, 5))), Picture)
    (tmp_path / "half.png").write_bytes(encoded(Image.effect_noise((64, 64), 50))[:900])
    with pytest.raises(SampleError, match=r"half\.png: the image is damaged or cut off"):
        SMALL(Image.open(tmp_path / "half.png"))


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("MPO", "CMYK")])
def test_jpeg_that_repeats_its_scans_is_not_decoded(kind, mode):
    content = encoded(Image.effect_noise((64, 48), 50).convert(mode), kind, progressive=True)
    start, end = content.rindex(b"\xff\xda"), content.rindex(b"\xff\xd9")
    assert np.asarray(open_image(content)).std() > 10
    with pytest.raises(SampleError, match="more than 50 scans"):
        open_image(content[:end] + content[start:end] * 100 + content[end:])


def test_scans_hidden_behind_a_marker_that_the_decoder_passes_over_are_counted():
    """After a restart interval a decoder looks byte by byte for the next marker it knows."""
    plain = encoded(Image.new("L", (16, 16), 99), "JPEG")
    tables = plain[2 : plain.index(b"\xff\xda")]
    before, after = tables.split(b"\xff\xc0", 1)
    after = after[int.from_bytes(after[:2], "big") :]

    def segment(marker: int, content: bytes) -> bytes:
        return bytes([255, marker]) + (len(content) + 2).to_bytes(2, "big") + content

    frame = segment(0xC2, bytes([8, 0, 64, 0, 64, 1, 1, 0x11, 0])) + segment(0xDD, b"\0\1")
    scans = segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + segment(0x02, segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) * 100)
    with pytest.raises(SampleError, match="more than 50 scans"):
        open_image(b"\xff\xd8" + before + frame + after + scans + b"\xff\xd9")


PEAKS = """
import resource, sys, warnings
from pathlib import Path
from minigpt4.common.errors import SampleError
from minigpt4.processors import Blip2ImageEvalProcessor, process_image

resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
for kind in (UserWarning, RuntimeWarning):
    warnings.simplefilter("error", kind)
def peak():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])
for file in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    try:
        process_image(Blip2ImageEvalProcessor(), file)
    except SampleError:
        pass
    print((peak() - before) // 1024)
"""
BOMBS = {
    "tall": (lambda: encoded(grey(1, 600_000)), 100),
    "tags of a TIFF": (greedy_tags, 100),
    "EXIF of a PNG": (lambda: encoded(grey(8, 8), exif=greedy_tags()), 100),
    "EXIF of a WebP": (lambda: encoded(grey(8, 8), "WEBP", exif=greedy_tags()), 100),
    "tile": (huge_tile, 100),
    "deep": (lambda: encoded(Image.new("I;16", (3000, 3000))), 150),
    # Pillow warns about these, and the warnings are errors here.
    "many pixels": (lambda: encoded(Image.new("1", (10_000, 10_000))), 600),
    "damaged EXIF": (lambda: encoded(grey(9, 9), "JPEG", exif=tagged([(0x010F, 2, 900, 8)])), 100),
}
"""Content, and MiB that it may take."""


def test_memory_for_an_image_is_bounded_and_warnings_of_pillow_stop_nothing(tmp_path, warm):
    for name, (content, _) in BOMBS.items():
        (tmp_path / name).write_bytes(content())
    (tmp_path / "peaks.py").write_text(PEAKS)
    run = warm.script(tmp_path / "peaks.py", *(tmp_path / name for name in BOMBS), cwd=tmp_path, apart=True)
    assert (run.wait(), run.text()) == ([0], "")
    taken = dict(zip(BOMBS, map(int, run.out.read_text().split()), strict=True))
    assert {name: mib for name, mib in taken.items() if mib > BOMBS[name][1]} == {}


# What is no image


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!DOCTYPE html><title>404</title>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"8BPS\0\1" + bytes(40),
        encoded(grey(8, 8), "EPS"),
        encoded(grey(8, 8), "PDF"),
        encoded(grey(8, 8).convert("RGB"), "DDS"),
        encoded(grey(64, 64), "ICNS"),
    ],
    ids=["empty", "HTML", "SVG", "PSD", "EPS", "PDF", "DDS", "ICNS"],
)
def test_kind_that_is_not_read_is_refused_and_no_other_program_started(content, monkeypatch):
    monkeypatch.setattr(subprocess, "check_call", None)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(SampleError, match=r"^a\.tar/b\.jpg: not an image.*PNG or JPEG"):
        open_image(content, name="a.tar/b.jpg")
    with pytest.raises(SampleError, match=f"^<image of {len(content)} bytes>: not an image"):
        open_image(content)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "file.txt").write_text("")
    special = ["pipe.jpg", "folder.jpg", "zero.jpg"]
    for name in (*special, "gone.jpg", "a\0.jpg", "a" * 300 + ".jpg", "\ud800.jpg", "file.txt/a.jpg"):
        for read in (open_image, TRAINING_READ):
            with pytest.raises(SampleError, match=f"{name}: cannot be opened"):
                read(tmp_path / name)


def test_file_that_is_too_large_for_an_image_is_not_read(tmp_path):
    file = tmp_path / "huge.webp"
    with file.open("wb") as writing:
        writing.write(encoded(grey(8, 8), "WEBP"))
        writing.truncate(blip_processors.MAX_BYTES + 1)
    with pytest.raises(SampleError, match=r"huge\.webp: the file is too large"):
        open_image(file)


# What decoders raise


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_file_that_is_cut_off_is_named(kind):
    content = encoded(Image.fromarray(noise((64, 64, 3))), kind)
    with pytest.raises(SampleError, match=r"half\.jpg: the image is damaged or cut off"):
        open_image(content[: len(content) // 2], "half.jpg")


@pytest.mark.parametrize("file", sorted(BROKEN.iterdir()), ids=lambda file: file.name)
def test_file_whose_decoder_raises_anything_is_named(file):
    for read in (open_image, TRAINING_READ):
        with pytest.raises(SampleError, match=file.name):
            read(file)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, struct.error])
@pytest.mark.parametrize("step", ["PngImagePlugin.PngImageFile.load", "Image.Image.convert"])
def test_whatever_a_decoder_raises_is_a_bad_sample_with_its_cause(error, step, monkeypatch, tmp_path):
    def fail(*_):
        raise error("of the decoder")

    (tmp_path / "a.jpg").write_bytes(encoded(grey(8, 6), exif=exif(6)))
    monkeypatch.setattr(f"PIL.{step}", fail)
    with pytest.raises(SampleError, match=r"a\.jpg: .*of the decoder") as raised:
        process_image(SMALL, tmp_path / "a.jpg")
    assert isinstance(raised.value.__cause__, error)
