"""The processors give the reference's numbers and words, on every device, and refuse wrong configuration by name."""

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
    Uint8Image,
    blip_processors,
)

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture
def reference(parity_dir, golden):
    """The images of the reference."""
    return [Image.open(parity_dir / entry["file"]).convert("RGB") for entry in golden["images"]["files"]]


@pytest.fixture
def image():
    return Image.fromarray(np.arange(75, dtype=np.uint8).reshape(5, 5, 3))


@pytest.mark.parametrize("name", ["train", "eval"])
def test_image_tensors_meet_the_reference(reference, golden, golden_tensors, name):
    processor_class = registry.get_processor_class(f"blip2_image_{name}")
    assert processor_class is {"train": Blip2ImageTrainProcessor, "eval": Blip2ImageEvalProcessor}[name]
    processor = processor_class.from_config({"image_size": golden["images"]["image_size"]})
    for index, image in enumerate(reference):
        result = processor(image)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, golden_tensors[f"images/img{index}/{name}"], atol=1e-6, rtol=0)
        resized = processor.uint8(image).pixels.permute(1, 2, 0)
        assert torch.equal(resized, golden_tensors[f"images/img{index}/resized_uint8"])
    default = processor_class.from_config(None)(Image.new("RGB", (31, 77)))
    assert list(default.shape) == golden["images"]["default_config_shape"]
    assert default.is_contiguous()
    custom = processor_class.from_config(OmegaConf.create(golden["images"]["custom"]))(reference[0])
    torch.testing.assert_close(custom, golden_tensors["images/img0/eval_28_custom_mean_std"], atol=1e-6, rtol=0)


def test_normalised_levels_are_value_by_value_the_published_formula():
    processor = Blip2ImageTrainProcessor()
    ramp_311 = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    result = Uint8Image(ramp_311, processor.mean, processor.std).normalised()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.mean, processor.std))
    assert torch.equal(result, (ramp_311.float() / 255 - mean) / std)


@pytest.mark.parametrize("device", DEVICES)
def test_batch_is_normalised_to_the_bits_of_single_images_on_every_device(device, image):
    processor = Blip2ImageTrainProcessor(image_size=8)
    images = [image, image.rotate(90), image.rotate(180)]
    batch = Uint8Image.joined([processor.uint8(one) for one in images])
    assert (batch.shape, batch.pixels.dtype) == ((3, 3, 8, 8), torch.uint8)
    normalised = batch.to(torch.device(device)).normalised()
    assert normalised.device.type == device
    assert torch.equal(normalised.cpu(), torch.stack([processor(one) for one in images]))


def test_inference_leaves_nothing_behind_that_training_could_not_use(image):
    processor = Blip2ImageTrainProcessor(image_size=8, mean=(0.1, 0.2, 0.3))
    with torch.inference_mode():
        processor(image)
    pixels = processor(image)
    weight = torch.ones(8, requires_grad=True)
    (pixels * weight).sum().backward()
    torch.testing.assert_close(weight.grad, pixels.sum(dim=(0, 1)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_every_pillow_mode_is_taken(mode):
    result = Blip2ImageEvalProcessor(image_size=8)(Image.new(mode, (5, 3)))
    assert result.shape == (3, 8, 8)
    assert torch.isfinite(result).all()


def test_processor_travels_to_a_worker_and_leaves_the_image_as_it_was(image):
    processor = Blip2ImageTrainProcessor(image_size=5)
    before = image.tobytes()
    pixels = processor(image)
    assert torch.equal(pickle.loads(pickle.dumps(processor))(image), pixels)
    pixels.zero_()
    processor.uint8(image).pixels.zero_()
    assert image.tobytes() == before


def test_published_scale_keys_change_nothing_and_are_said_to(image, caplog):
    blip_processors._warn_that_scale_is_ignored.cache_clear()
    cfg = {"name": "blip2_image_train", "image_size": 8, "min_scale": 0.5, "max_scale": 1.0}
    with caplog.at_level(logging.WARNING):
        results = [Blip2ImageTrainProcessor.from_config(cfg)(image) for _ in range(2)]
    assert [record.getMessage() for record in caplog.records if "min_scale" in record.getMessage()] == [
        "min_scale and max_scale have no effect: images are resized without cropping, as published"
    ]
    assert all(torch.equal(result, Blip2ImageTrainProcessor(image_size=8)(image)) for result in results)


@pytest.mark.parametrize("index", [0, 1])
def test_captions_are_cleaned_as_in_the_reference(golden, index):
    assert registry.get_processor_class("blip_caption") is BlipCaptionProcessor
    section = golden["text_processor"][index]
    processor = BlipCaptionProcessor.from_config(section["config"])
    assert [processor(case["in"]) for case in section["cases"]] == [case["out"] for case in section["cases"]]


def test_what_is_no_image_or_no_text_is_refused():
    with pytest.raises(SampleError, match="takes a PIL image, got str"):
        Blip2ImageEvalProcessor()("picture.jpg")
    with pytest.raises(SampleError, match="a caption must be text, got NoneType"):
        BlipCaptionProcessor()(None)
    with pytest.raises(ConfigError, match="expected a section of keys and values"):
        BlipCaptionProcessor.from_config("blip_caption")


# Configuration


def test_section_of_the_yaml_has_nulls_and_interpolations_and_stays_as_it_was():
    root = OmegaConf.create(
        "{size: 28, train: {name: blip2_image_train, image_size: '${size}', mean: null, std: null}}"
    )
    before = OmegaConf.to_yaml(root)
    assert Blip2ImageTrainProcessor.from_config(root.train) == Blip2ImageTrainProcessor(image_size=28)
    assert OmegaConf.to_yaml(root) == before


@pytest.mark.parametrize(
    ("kind", "section", "complaint"),
    [
        ("blip2_image_eval", {"img_size": 224}, r"unknown key 'img_size'; did you mean 'image_size'\?"),
        ("blip_caption", {"zzz": 1}, "unknown key 'zzz'; Known: max_words, name, prompt"),
        *(("blip2_image_train", {"image_size": value}, "image_size must be ") for value in (0, "224", True)),
        *(("blip2_image_train", {"mean": value}, "mean must be ") for value in ([0.5, 0.5], "0.5")),
        *(("blip2_image_train", {"std": value}, "std must be ") for value in ([1, 0, 1], ["1", 1, 1])),
        ("blip_caption", {"max_words": -1}, "max_words must be "),
        ("blip_caption", {"prompt": 7}, "prompt must be "),
    ],
)
def test_wrong_key_or_value_names_processor_and_key(kind, section, complaint):
    with pytest.raises(ConfigError, match=f"^my_name: {complaint}"):
        registry.get_processor_class(kind).from_config({"name": "my_name", **section})
