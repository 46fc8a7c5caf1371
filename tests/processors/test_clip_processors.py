"""CLIP's image processing: the reference's pixels, to the last bit of a byte."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from minigpt4.common.errors import ConfigError
from minigpt4.processors import load_processor, open_image

FOLDER = Path(__file__).parents[1] / "data" / "parity_llava"
FILES = [Path(image["file"]).name for image in json.loads((FOLDER / "model.json").read_text())["images"]["files"]]
GOLDEN = load_file(FOLDER / "golden_images.safetensors")
ATOL = 1e-6


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize(("mode", "ratio"), [("plain", "square"), ("pad", "pad")])
@pytest.mark.parametrize("index", range(len(FILES)), ids=FILES)
def test_pixels_are_those_of_the_reference(parity_dir, index, mode, ratio, split):
    processor = load_processor(f"clip_image_{split}", {"image_size": 56, "image_aspect_ratio": ratio})
    image = open_image(parity_dir / "images" / FILES[index])
    assert torch.equal(processor.uint8(image).pixels, GOLDEN[f"images/{mode}/resized_cropped_uint8"][index])
    torch.testing.assert_close(processor(image), GOLDEN[f"images/{mode}/pixel_values"][index], rtol=0, atol=ATOL)


def test_padding_is_the_mean_of_the_tower():
    processor = load_processor("clip_image_eval", {"image_size": 16, "image_aspect_ratio": "pad", "mean": [0.5, 0, 1]})
    pixels = processor.uint8(Image.new("RGB", (40, 20), "white")).pixels
    assert pixels[:, 0, 0].tolist() == [127, 0, 255]
    assert pixels[:, 8, 0].tolist() == [255, 255, 255]


def test_pixels_depend_on_the_ratio_and_the_key_says_so():
    keys = [load_processor("clip_image_eval", {"image_aspect_ratio": ratio}).feature_key for ratio in ("square", "pad")]
    assert keys[0] != keys[1]


def test_other_ratios_are_refused():
    with pytest.raises(ConfigError, match="image_aspect_ratio must be square or pad, got 'anyres'"):
        load_processor("clip_image_eval", {"image_aspect_ratio": "anyres"})
