"""The processors give the reference's numbers and words, and refuse wrong configuration by name."""

import io
import logging
import pickle

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.registry import registry
from minigpt4.processors import (
    Blip2ImageEvalProcessor,
    Blip2ImageTrainProcessor,
    BlipCaptionProcessor,
    blip_processors,
    process_image,
)
from minigpt4.processors.blip_processors import FAST

IMAGE_PROCESSORS = [Blip2ImageTrainProcessor, Blip2ImageEvalProcessor]


def reference_image(parity_dir, entry: dict) -> Image.Image:
    return Image.open(parity_dir / entry["file"]).convert("RGB")


@pytest.mark.parametrize(
    ("name", "processor_class"),
    [
        ("blip2_image_train", Blip2ImageTrainProcessor),
        ("blip2_image_eval", Blip2ImageEvalProcessor),
        ("blip_caption", BlipCaptionProcessor),
    ],
)
def test_importing_the_package_registers_the_published_names(name, processor_class):
    assert registry.get_processor_class(name) is processor_class


@pytest.mark.parametrize("name", ["train", "eval"])
def test_image_tensors_meet_the_reference(parity_dir, golden, golden_tensors, name):
    processor_class = registry.get_processor_class(f"blip2_image_{name}")
    processor = processor_class.from_config({"image_size": golden["images"]["image_size"]})
    for index, entry in enumerate(golden["images"]["files"]):
        result = processor(reference_image(parity_dir, entry))
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, golden_tensors[f"images/img{index}/{name}"], atol=1e-6, rtol=0)


def test_resized_pixels_equal_the_reference(parity_dir, golden, golden_tensors):
    # Neutral mean and std leave pixel / 255; scaled back, that must be the reference's bytes.
    size = golden["images"]["image_size"]
    processor = Blip2ImageEvalProcessor(image_size=size, mean=(0, 0, 0), std=(1, 1, 1))
    for index, entry in enumerate(golden["images"]["files"]):
        result = processor(reference_image(parity_dir, entry)).mul(255).round().byte().permute(1, 2, 0)
        assert torch.equal(result, golden_tensors[f"images/img{index}/resized_uint8"])


def test_custom_size_mean_and_std_meet_the_reference(parity_dir, golden, golden_tensors):
    processor = Blip2ImageEvalProcessor.from_config(OmegaConf.create(golden["images"]["custom"]))
    result = processor(reference_image(parity_dir, golden["images"]["files"][0]))
    expected = golden_tensors["images/img0/eval_28_custom_mean_std"]
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("processor_class", IMAGE_PROCESSORS)
def test_default_config_gives_the_published_shape(golden, processor_class):
    result = processor_class.from_config(None)(Image.new("RGB", (31, 77)))
    assert list(result.shape) == golden["images"]["default_config_shape"]
    assert result.is_contiguous()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_every_pillow_mode_is_taken(mode):
    result = Blip2ImageEvalProcessor(image_size=8)(Image.new(mode, (5, 3)))
    assert result.shape == (3, 8, 8)
    assert torch.isfinite(result).all()


def test_sixteen_bit_grey_keeps_its_levels():
    levels = np.full((4, 4), 257 * 100, dtype=np.uint16)
    processor = Blip2ImageEvalProcessor(image_size=4, mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(processor(Image.fromarray(levels)), torch.full((3, 4, 4), 100 / 255))


def test_result_does_not_share_memory_with_the_image():
    image = Image.new("RGB", (4, 4), (10, 20, 30))
    Blip2ImageEvalProcessor(image_size=4)(image).zero_()
    assert image.getpixel((0, 0)) == (10, 20, 30)


def test_image_processor_travels_to_a_worker():
    processor = Blip2ImageTrainProcessor(image_size=8)
    image = Image.fromarray(np.arange(75, dtype=np.uint8).reshape(5, 5, 3))
    assert torch.equal(pickle.loads(pickle.dumps(processor))(image), processor(image))


def test_what_is_no_image_is_refused():
    with pytest.raises(SampleError, match="takes a PIL image, got str"):
        Blip2ImageEvalProcessor()("picture.jpg")


def test_published_scale_keys_change_nothing_and_are_said_to(caplog):
    blip_processors._warn_that_scale_is_ignored.cache_clear()
    image = Image.fromarray(np.arange(75, dtype=np.uint8).reshape(5, 5, 3))
    cfg = {"name": "blip2_image_train", "image_size": 8, "min_scale": 0.5, "max_scale": 1.0}
    with caplog.at_level(logging.WARNING):
        results = [Blip2ImageTrainProcessor.from_config(cfg)(image) for _ in range(2)]
    assert [record.getMessage() for record in caplog.records if "min_scale" in record.getMessage()] == [
        "min_scale and max_scale have no effect: images are resized without cropping, as published"
    ]
    assert all(torch.equal(result, Blip2ImageTrainProcessor(image_size=8)(image)) for result in results)


def test_null_in_the_yaml_means_the_default():
    cfg = OmegaConf.create("{name: blip2_image_train, image_size: null, mean: null, std: null}")
    assert Blip2ImageTrainProcessor.from_config(cfg) == Blip2ImageTrainProcessor()


def test_interpolations_in_the_yaml_are_resolved():
    root = OmegaConf.create("{size: 28, train: {image_size: '${size}'}}")
    assert Blip2ImageTrainProcessor.from_config(root.train).image_size == 28


def test_from_config_leaves_the_config_as_it_was():
    cfg = {"name": "blip_caption", "max_words": 3}
    BlipCaptionProcessor.from_config(cfg)
    assert cfg == {"name": "blip_caption", "max_words": 3}


def test_unknown_key_is_named_with_the_nearest_valid_one():
    with pytest.raises(ConfigError, match=r"blip2_image_eval: unknown key 'img_size'; did you mean 'image_size'\?"):
        Blip2ImageEvalProcessor.from_config({"name": "blip2_image_eval", "img_size": 224})


def test_unknown_key_without_a_near_one_lists_the_valid_keys():
    with pytest.raises(ConfigError, match="unknown key 'zzz'; Known: max_words, name, prompt"):
        BlipCaptionProcessor.from_config({"zzz": 1})


@pytest.mark.parametrize(
    ("processor_class", "key", "value"),
    [
        (Blip2ImageTrainProcessor, "image_size", 0),
        (Blip2ImageTrainProcessor, "image_size", "224"),
        (Blip2ImageTrainProcessor, "image_size", True),
        (Blip2ImageTrainProcessor, "mean", [0.5, 0.5]),
        (Blip2ImageTrainProcessor, "mean", "0.5"),
        (Blip2ImageTrainProcessor, "std", [1, 0, 1]),
        (Blip2ImageTrainProcessor, "std", ["1", 1, 1]),
        (BlipCaptionProcessor, "max_words", -1),
        (BlipCaptionProcessor, "prompt", 7),
    ],
)
def test_wrong_value_names_processor_and_key(processor_class, key, value):
    with pytest.raises(ConfigError, match=f"^my_name: {key} must be "):
        processor_class.from_config({"name": "my_name", key: value})


def test_section_that_is_no_mapping_is_refused():
    with pytest.raises(ConfigError, match="expected a section of keys and values"):
        BlipCaptionProcessor.from_config("blip_caption")


@pytest.mark.parametrize("index", [0, 1])
def test_captions_are_cleaned_as_in_the_reference(golden, index):
    section = golden["text_processor"][index]
    processor = BlipCaptionProcessor.from_config(section["config"])
    assert [processor(case["in"]) for case in section["cases"]] == [case["out"] for case in section["cases"]]


def test_caption_that_is_not_text_is_refused():
    with pytest.raises(SampleError, match="a caption must be text, got NoneType"):
        BlipCaptionProcessor()(None)


# The fast ways


def photo(width: int, height: int) -> Image.Image:
    """As in photos, a detail is the weaker the finer it is, and the channels are alike."""
    chance = np.random.default_rng(0)
    shape = (height, width)
    fine = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]).clip(1 / max(width, height))
    planes = [
        np.fft.irfft2(
            chance.normal(size=fine.shape) * np.exp(2j * np.pi * chance.random(fine.shape)) / fine**1.2, shape
        )
        for _ in range(4)
    ]
    grey, *colours = (50 * plane / plane.std() for plane in planes)
    levels = [128 + grey + 0.3 * colour for colour in colours]
    return Image.fromarray(np.stack(levels, axis=-1).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def levels(source, **switches) -> torch.Tensor:
    """Grey levels (3, 224, 224) int16 of an image file's bytes."""
    processor = Blip2ImageEvalProcessor(**switches)
    return process_image(processor, source, as_uint8=True).pixels.short()


def test_fast_resizing_is_within_one_grey_level_of_the_reference(parity_dir, golden, golden_tensors):
    size = golden["images"]["image_size"]
    processor = Blip2ImageTrainProcessor(image_size=size, fast_resize=True)
    for index, entry in enumerate(golden["images"]["files"]):
        result = processor.uint8(reference_image(parity_dir, entry)).pixels.permute(1, 2, 0).short()
        off = (result - golden_tensors[f"images/img{index}/resized_uint8"].short()).abs()
        assert off.max() <= 1
        assert (off > 0).float().mean() < 0.02


@pytest.mark.parametrize("size", [(900, 700), (60, 80), (230, 1500), (2, 3)])
def test_fast_resizing_is_off_by_one_grey_level_here_and_there_at_every_shape(size):
    content = jpeg(photo(*size))
    off = (levels(content, fast_resize=True) - levels(content)).abs().float()
    assert off.mean() < 0.01
    assert (off > 1).float().mean() < 1e-4


def test_fast_decoding_leaves_images_alone_that_are_not_twice_as_large():
    content = jpeg(photo(900, 895))
    assert torch.equal(levels(content, fast_decode=True), levels(content))


def test_fast_decoding_of_a_large_photo_differs_as_little_as_documented():
    content = jpeg(photo(1600, 1200))
    off = (levels(content, fast_decode=True) - levels(content)).abs().float()
    assert 0 < off.mean() < 0.5
    assert off.max() <= 5
    assert (off > 1).float().mean() < 0.02


@pytest.mark.parametrize("switch", FAST)
def test_fast_ways_are_off_by_default_and_have_caches_of_their_own(switch):
    plain, fast = Blip2ImageTrainProcessor(), Blip2ImageTrainProcessor.from_config({switch: True})
    assert not getattr(plain, switch)
    assert plain.feature_key != fast.feature_key
    assert switch not in plain.feature_key


@pytest.mark.parametrize("switch", FAST)
def test_fast_ways_take_true_or_false_only(switch):
    with pytest.raises(ConfigError, match=f"{switch} must be True or False, got 'yes'"):
        Blip2ImageTrainProcessor.from_config({"name": "blip2_image_train", switch: "yes"})
