"""Files of every kind become upright 8-bit RGB; damaged ones an error that names them."""

import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigpt4.common.errors import SampleError
from minigpt4.processors import open_image, process_image, to_rgb

EXIF_ORIENTATION = 0x0112
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
UPRIGHT = np.array([[1, 2, 3], [4, 5, 6]]) * 40


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def save_with_orientation(file: Path, orientation: int, **options) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    stored = np.array(STORED[orientation], dtype=np.uint8) * 40
    Image.fromarray(stored).save(file, exif=exif, **options)


@pytest.mark.parametrize("orientation", sorted(STORED))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_open_image_applies_exif_orientation(tmp_path, orientation, suffix):
    file = tmp_path / f"turned{suffix}"
    save_with_orientation(file, orientation, **({"lossless": True} if suffix == ".webp" else {}))
    assert np.array_equal(pixels(open_image(file))[..., 0], UPRIGHT)


def test_open_image_applies_exif_orientation_of_a_jpeg(tmp_path):
    file = tmp_path / "phone.jpg"
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # the camera was held upright: the file lies on its left side
    stored = np.zeros((32, 64, 3), dtype=np.uint8)
    stored[:, :32] = (255, 0, 0)
    Image.fromarray(stored).save(file, exif=exif, quality=95)
    upright = open_image(file)
    assert upright.size == (32, 64)
    top, bottom = upright.getpixel((16, 8)), upright.getpixel((16, 56))
    assert top[0] > 240
    assert bottom[0] < 15


def test_orientation_is_applied_once(tmp_path):
    file = tmp_path / "turned.png"
    save_with_orientation(file, 6)
    assert np.array_equal(pixels(to_rgb(open_image(file)))[..., 0], UPRIGHT)


def test_damaged_exif_leaves_the_pixels(tmp_path):
    file = tmp_path / "odd.png"
    colours = noise((5, 7, 3))
    Image.fromarray(colours).save(file, exif=b"Exif\x00\x00no TIFF header in here")
    assert np.array_equal(pixels(open_image(file)), colours)


def test_grey_becomes_three_equal_channels(tmp_path):
    grey = noise((6, 9))
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(pixels(open_image(tmp_path / "grey.png")), np.stack([grey] * 3, axis=-1))


def test_one_bit_becomes_black_and_white(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bit.png")
    assert pixels(open_image(tmp_path / "bit.png")).tolist() == [[[255] * 3, [0] * 3]]


def test_alpha_is_dropped_not_blended(tmp_path):
    rgba = noise((6, 9, 4))
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert np.array_equal(pixels(open_image(tmp_path / "rgba.png")), rgba[..., :3])


def test_grey_with_alpha_keeps_its_grey(tmp_path):
    grey_alpha = noise((6, 9, 2))
    image = Image.merge("LA", [Image.fromarray(grey_alpha[..., band]) for band in range(2)])
    image.save(tmp_path / "la.png")
    assert np.array_equal(pixels(open_image(tmp_path / "la.png"))[..., 1], grey_alpha[..., 0])


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"])
def test_palette_gives_its_colours_without_a_warning(tmp_path, transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "palette.png", **({} if transparency is None else {"transparency": transparency}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_image(tmp_path / "palette.png")
    assert pixels(opened).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    red, green, blue = open_image(tmp_path / "print.jpg").getpixel((8, 8))
    assert (red > 250, green < 5, blue < 5) == (True, True, True)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    levels = np.array([[0, 257, 257 * 100, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / f"deep{suffix}")
    assert pixels(open_image(tmp_path / f"deep{suffix}"))[0, :, 0].tolist() == [0, 1, 100, 255]


def test_sixteen_bit_big_endian_grey_is_scaled(tmp_path):
    image = Image.frombytes("I;16B", (2, 1), np.array([[257 * 7, 65535]], dtype=">u2").tobytes())
    image.save(tmp_path / "deep.tif")
    assert pixels(open_image(tmp_path / "deep.tif"))[0, :, 0].tolist() == [7, 255]


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([0, 100, 255], [0, 100, 255]),
        ([0, 257, 65535], [0, 1, 255]),
        ([0, 1_000_000, 2_000_000], [0, 128, 255]),
        ([-5, 0, 255], [0, 0, 255]),
    ],
)
def test_wide_integer_grey_is_scaled_by_its_range(tmp_path, levels, expected):
    Image.fromarray(np.array([levels], dtype=np.int32)).save(tmp_path / "wide.tif")
    assert pixels(open_image(tmp_path / "wide.tif"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([0.0, 0.2, 1.0], [0, 51, 255]),
        ([0.0, 51.0, 255.0], [0, 51, 255]),
        ([0.0, float("nan"), 1.0], [0, 0, 255]),
    ],
)
def test_float_grey_is_scaled_by_its_range(tmp_path, levels, expected):
    Image.fromarray(np.array([levels], dtype=np.float32)).save(tmp_path / "float.tif")
    assert pixels(open_image(tmp_path / "float.tif"))[0, :, 0].tolist() == expected


def test_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


def test_open_image_reads_paths_strings_bytes_and_open_files(tmp_path):
    file = tmp_path / "same.png"
    colours = noise((5, 7, 3))
    Image.fromarray(colours).save(file)
    with file.open("rb") as handle:
        results = [open_image(source) for source in (file, str(file), file.read_bytes(), handle)]
        assert not handle.closed
    assert all(np.array_equal(pixels(result), colours) for result in results)


def test_opened_image_lets_go_of_its_decoder(tmp_path):
    Image.fromarray(noise((5, 7, 3))).save(tmp_path / "plain.png")
    assert type(open_image(tmp_path / "plain.png")) is Image.Image


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "MPO"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_processed_images_have_the_pixels_of_opened_ones_in_every_format(kind, mode):
    file = io.BytesIO()
    Image.fromarray(noise((40, 30, 3))).convert(mode).save(file, kind)
    content = file.getvalue()
    processed = process_image(lambda image: pixels(to_rgb(image)).copy(), content)
    assert np.array_equal(processed, pixels(open_image(content)))


def test_processor_gets_no_copy_and_its_errors_are_its_own():
    file = io.BytesIO()
    Image.fromarray(noise((5, 7, 3))).save(file, "JPEG")
    assert process_image(lambda image: image.format, file.getvalue()) == "JPEG"
    with pytest.raises(ValueError, match="of the processor"):
        process_image(lambda image: int("of the processor"), file.getvalue())


def test_image_that_somebody_has_is_not_handed_on_or_decoded_smaller():
    class Halving:
        decode_at_least = 8

        def __call__(self, image: Image.Image) -> tuple[int, int]:
            return image.size

    file = io.BytesIO()
    Image.fromarray(noise((64, 64, 3))).save(file, "JPEG")
    own = Image.open(file)
    assert process_image(Halving(), own) == (64, 64)
    assert process_image(Halving(), file.getvalue()) == (8, 8)
    assert open_image(own) is not own


def test_reference_rgb_pixels_are_met(parity_dir, golden, golden_tensors):
    for index, entry in enumerate(golden["images"]["files"]):
        expected = golden_tensors[f"images/img{index}/rgb_uint8"].numpy()
        assert np.array_equal(np.asarray(open_image(parity_dir / entry["file"])), expected)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(SampleError, match=r"gone\.jpg: cannot be opened \(No such file"):
        open_image(tmp_path / "gone.jpg")


def test_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(SampleError, match="cannot be opened"):
        open_image(tmp_path)


@pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>"])
def test_file_that_is_no_image_is_named(tmp_path, content):
    (tmp_path / "page.jpg").write_bytes(content)
    with pytest.raises(SampleError, match=r"page\.jpg: not an image"):
        open_image(tmp_path / "page.jpg")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
def test_file_that_is_cut_off_is_named(tmp_path, suffix):
    file = tmp_path / f"half{suffix}"
    Image.fromarray(noise((64, 64, 3))).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(SampleError, match=rf"half\{suffix}: the image is damaged or cut off"):
        open_image(file)


def test_image_beyond_the_pixel_limit_is_refused_by_name(tmp_path):
    side = 14_000  # 196 million pixels: more than twice Pillow's limit
    assert side * side > 2 * Image.MAX_IMAGE_PIXELS
    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    with pytest.raises(SampleError, match=r"bomb\.png: the image is too large"):
        open_image(tmp_path / "bomb.png")


def test_bytes_are_named_by_the_caller():
    with pytest.raises(SampleError, match=r"^00012\.tar/000123\.jpg: not an image"):
        open_image(b"nothing", name="00012.tar/000123.jpg")


def test_bytes_without_a_name_are_told_by_their_length():
    with pytest.raises(SampleError, match="^<image of 7 bytes>: not an image"):
        open_image(b"nothing")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_random_damage_gives_an_image_or_a_sample_error(file_format):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    options = {"exif": exif} if file_format not in ("GIF", "BMP") else {}
    Image.fromarray(noise((20, 30, 3))).save(buffer, file_format, **options)
    choose = random.Random(file_format)
    refused = 0
    for _ in range(300):
        damaged = bytearray(buffer.getvalue())
        for _ in range(choose.choice((1, 2, 8))):
            damaged[choose.randrange(len(damaged))] = choose.randrange(256)
        try:
            assert open_image(bytes(damaged)).mode == "RGB"
        except SampleError:
            refused += 1
    assert refused > 0
