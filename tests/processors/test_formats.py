"""What is refused before it costs anything: sizes, kinds of files, what is no file, and what a few bytes claim."""

import functools
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigpt4.common.errors import SampleError
from minigpt4.conversation.chat import Picture
from minigpt4.datasets.datasets.base_dataset import ImageReader
from minigpt4.inference.engine import look
from minigpt4.processors import Blip2ImageEvalProcessor, images, open_image, process_image
from minigpt4.serving.uploads import Limits, read_image

REPOSITORY = Path(__file__).parents[2]
BROKEN = REPOSITORY / "tests" / "data" / "images"
SMALL = Blip2ImageEvalProcessor(image_size=8)
TRAINING_READ = functools.partial(ImageReader(SMALL).read, as_uint8=True)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(width: int, height: int) -> Image.Image:
    return Image.new("L", (width, height), 100)


def turned(width: int, height: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(grey(width, height), exif=exif)


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
        (turned(70_000, 400), "65,535"),
        (gif_larger_than_its_screen(), "3 x 700 pixels.*200 times"),
        (icon(encoded(grey(5, 1001))), "5 x 1001 pixels.*200 times"),
        (huge_tile(), "tiles have 196,000,000 pixels"),
    ],
    ids=["tall", "wide", "narrow", "flat", "turned", "frame", "icon", "tile"],
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


@pytest.mark.parametrize("size", [(1080, 60_000), (30_000, 600), (65_535, 328), (1, 200)])
def test_panoramas_and_long_screenshots_are_read(size):
    assert process_image(SMALL, encoded(grey(*size))).shape == (3, 8, 8)


@pytest.mark.parametrize("size", [(1, 70_000), (3, 601), (0, 5)])
def test_pillow_image_of_python_code_has_the_same_limits(size):
    image = Image.new("RGB", size)
    for read in (SMALL, SMALL.uint8, open_image, lambda one: look(one, SMALL)):
        with pytest.raises(SampleError, match=f"{size[0]} x {size[1]} pixels"):
            read(image)
    assert isinstance(look(Image.new("RGB", (9, 5)), SMALL), Picture)


def test_lazy_pillow_image_that_is_damaged_is_called_by_its_file(tmp_path):
    file = tmp_path / "half.png"
    file.write_bytes(encoded(Image.effect_noise((64, 64), 50))[:900])
    with pytest.raises(SampleError, match=r"half\.png: the image is damaged or cut off"):
        SMALL(Image.open(file))


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("MPO", "CMYK")])
def test_jpeg_that_repeats_its_scans_is_not_decoded(kind, mode):
    content = encoded(Image.effect_noise((64, 48), 50).convert(mode), kind, progressive=True)
    start, end = content.rindex(b"\xff\xda"), content.rindex(b"\xff\xd9")
    whole = np.asarray(open_image(content))
    assert whole.std() > 10
    assert np.array_equal(np.asarray(open_image(io.BytesIO(content))), whole)
    with pytest.raises(SampleError, match=f"more than {images.MAX_SCANS} scans"):
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
    with pytest.raises(SampleError, match=f"more than {images.MAX_SCANS} scans"):
        open_image(b"\xff\xd8" + before + frame + after + scans + b"\xff\xd9")


PEAKS = """
import resource, sys
from pathlib import Path
from minigpt4.common.errors import SampleError
from minigpt4.processors import Blip2ImageEvalProcessor, process_image

resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
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
    "deep": (lambda: encoded(Image.new("I;16", (6000, 6000))), 600),
}
"""Content, and MiB that it may take."""


def test_memory_for_an_image_is_bounded(tmp_path):
    for name, (content, _) in BOMBS.items():
        (tmp_path / name).write_bytes(content())
    command = [sys.executable, "-c", PEAKS, *(str(tmp_path / name) for name in BOMBS)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    taken = dict(zip(BOMBS, map(int, done.stdout.split()), strict=True))
    assert {name: mib for name, mib in taken.items() if mib > BOMBS[name][1]} == {}


def test_deep_grey_of_many_strips_is_scaled_as_one(monkeypatch):
    levels = np.random.default_rng(0).integers(0, 2**31 - 1, (50, 30), dtype=np.int32)
    for image in (Image.fromarray(levels), Image.fromarray(levels.astype(np.float32) / 7)):
        whole = np.asarray(open_image(image))
        monkeypatch.setattr("minigpt4.processors.images.STRIP", 70)
        assert np.array_equal(np.asarray(open_image(image)), whole)
        monkeypatch.undo()


# What is no image


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (encoded(grey(8, 8), "EPS"), "EPS"),
        (encoded(grey(8, 8), "PDF"), "PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\xff\x0a\xfa\x1f\x01\x91\x08\x06\x01\x00", "JPEG XL"),
        (b"8BPS\0\1" + bytes(40), "PSD"),
        (encoded(grey(8, 8).convert("RGB"), "DDS"), "DDS"),
        (encoded(Image.new("P", (8, 8)), "BLP"), "BLP"),
        (encoded(grey(64, 64), "ICNS"), "ICNS"),
        (b"SIMPLE  =                    T".ljust(2880), "FITS"),
        (b"<!DOCTYPE html><title>404</title>", "HTML"),
    ],
)
def test_kind_that_is_not_read_is_named(content, kind, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(SampleError, match=rf"a\.jpg: not an image.*{kind}.*PNG or JPEG"):
        open_image(tmp_path / "a.jpg")


def test_no_other_program_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "check_call", None)
    monkeypatch.setattr(subprocess, "Popen", None)
    (tmp_path / "a.jpg").write_bytes(encoded(grey(8, 8), "EPS"))
    with pytest.raises(SampleError, match="EPS"):
        open_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", sorted(set(images.FORMATS) & (Image.init() or set(Image.SAVE))))
def test_every_kind_that_pillow_can_write_is_read(kind):
    image = Image.effect_noise((32, 32), 50)
    content = encoded(image.convert("RGB"), kind)
    assert open_image(content).size == (32, 32)


def test_pipes_devices_and_folders_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    for name, reason in (("pipe", "pipe or a device"), ("folder", "folder"), ("zero", "pipe or a device")):
        for read in (open_image, TRAINING_READ):
            with pytest.raises(SampleError, match=rf"{name}\.jpg: cannot be opened.*{reason}"):
                read(tmp_path / f"{name}.jpg")


def test_names_that_no_file_can_have_are_refused(tmp_path):
    for name in ("a\0.jpg", "a" * 300 + ".jpg", "\ud800.jpg", "file.txt/a.jpg"):
        (tmp_path / "file.txt").write_text("")
        with pytest.raises(SampleError, match="cannot be opened"):
            open_image(tmp_path / name)


def test_file_that_is_too_large_for_an_image_is_not_read(tmp_path):
    file = tmp_path / "huge.webp"
    with file.open("wb") as writing:
        writing.write(encoded(grey(8, 8), "WEBP"))
        writing.truncate(images.MAX_BYTES + 1)
    with pytest.raises(SampleError, match=r"huge\.webp: the file is too large"):
        open_image(file)


# What decoders raise


@pytest.mark.parametrize("file", sorted(BROKEN.iterdir()), ids=lambda file: file.name)
@pytest.mark.parametrize("read", [open_image, TRAINING_READ], ids=["python", "training"])
def test_file_whose_decoder_raises_anything_is_named(file, read):
    with pytest.raises(SampleError, match=file.name):
        read(file)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, MemoryError, struct.error, RecursionError])
@pytest.mark.parametrize(
    "step", ["PngImagePlugin.PngImageFile.load", "Image.Image.draft", "Image.Image.convert", "Image.Image.transpose"]
)
def test_whatever_a_decoder_raises_is_a_bad_sample_with_its_cause(error, step, monkeypatch, tmp_path):
    def fail(*_):
        raise error("of the decoder")

    (tmp_path / "a.jpg").write_bytes(turned(8, 6))
    monkeypatch.setattr(f"PIL.{step}", fail)
    with pytest.raises(SampleError, match=r"a\.jpg: .*of the decoder") as raised:
        process_image(Blip2ImageEvalProcessor(image_size=8, fast_decode=True), tmp_path / "a.jpg")
    assert isinstance(raised.value.__cause__, error)


def test_warnings_of_pillow_stop_nothing_and_say_nothing(tmp_path):
    """In a process of its own, where warnings are errors: too many pixels for its taste, and damaged EXIF."""
    Image.new("1", (10_000, 10_000)).save(tmp_path / "many.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "exif.jpg", exif=tagged([(0x010F, 2, 900, 8)]))
    code = "import sys\nfrom minigpt4.processors import open_image\nfor file in sys.argv[1:]: open_image(file)"
    files = [str(tmp_path / name) for name in ("many.png", "exif.jpg")]
    command = [sys.executable, "-W", "error::UserWarning", "-W", "error::RuntimeWarning", "-c", code, *files]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
