"""Pixels travel as 8-bit levels and become on the device, to the bit, what a processor gives."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt4.processors import Blip2ImageTrainProcessor, Uint8Image

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    chance = np.random.default_rng(0)
    return [Image.fromarray(chance.integers(0, 256, (40, 30, 3), dtype=np.uint8)) for _ in range(3)]


def test_normalised_levels_are_value_by_value_the_published_formula():
    processor = Blip2ImageTrainProcessor()
    ramp_311 = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    result = Uint8Image(ramp_311, processor.mean, processor.std).normalised()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.mean, processor.std))
    assert torch.equal(result, (ramp_311.float() / 255 - mean) / std)


@pytest.mark.parametrize("device", DEVICES)
def test_batch_is_normalised_to_the_bits_of_single_images_on_every_device(device, images):
    processor = Blip2ImageTrainProcessor(image_size=8)
    batch = Uint8Image.joined([processor.uint8(image) for image in images])
    assert batch.shape == (3, 3, 8, 8)
    assert batch.pixels.dtype == torch.uint8
    normalised = batch.to(torch.device(device)).normalised()
    assert normalised.device.type == device
    assert torch.equal(normalised.cpu(), torch.stack([processor(image) for image in images]))


def test_levels_on_their_way_take_a_quarter_of_the_bytes(images):
    processor = Blip2ImageTrainProcessor(image_size=64)
    sent, read = len(pickle.dumps(processor.uint8(images[0]).pixels.numpy())), processor(images[0]).nbytes
    assert sent < 0.27 * read


def test_inference_leaves_nothing_behind_that_training_could_not_use(images):
    processor = Blip2ImageTrainProcessor(image_size=8, mean=(0.1, 0.2, 0.3))
    with torch.inference_mode():
        processor(images[0])
    pixels = processor(images[0])
    weight = torch.ones(8, requires_grad=True)
    (pixels * weight).sum().backward()
    torch.testing.assert_close(weight.grad, pixels.sum(dim=(0, 1)))
