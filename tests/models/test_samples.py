"""Batches of loaders become one plain form; faults name the field and the sample."""

import pytest
import torch

from minigpt4.common.errors import SampleError
from minigpt4.models.prompting import read_samples


@pytest.mark.parametrize("mark", ["!@#", ["!@#", "ignored"]])
def test_conversations_are_split_at_the_connecting_symbol_of_the_first_sample(mark):
    samples = read_samples({"conv_q": ["q1!@#q2", "q"], "conv_a": ["a1!@#a2", "a"], "connect_sym": mark})
    assert samples.conversations == [(["q1", "q2"], ["a1", "a2"]), (["q"], ["a"])]
    assert len(samples) == 2


def test_an_instruction_may_be_one_for_all():
    assert read_samples({"answer": ["a", "b"], "instruction_input": "look"}).instructions == ["look", "look"]


@pytest.mark.parametrize("lengths", [torch.tensor([1, 2]), [1, 2]])
def test_lengths_become_a_list(lengths):
    image = torch.zeros(2, 2, 3, 4, 4)
    assert read_samples({"answer": ["a", "b"], "image": image, "length": lengths}).lengths == [1, 2]


@pytest.mark.parametrize(("ids", "name"), [(["x7", "x8"], "x8"), (torch.tensor([7, 8]), "8")])
def test_samples_are_named_by_their_image(ids, name):
    assert read_samples({"answer": ["a", "b"], "image_id": ids}).name(1) == f"sample 1 of the batch (image_id {name})"


def test_samples_without_usable_image_ids_are_named_by_their_index():
    assert read_samples({"answer": ["a", "b"]}).name(1) == "sample 1 of the batch"
    assert read_samples({"answer": ["a", "b"], "image_id": ["one"]}).name(1) == "sample 1 of the batch"


def test_answers_are_read():
    samples = read_samples({"answer": ["a", "b"]})
    assert (len(samples), samples.answers, samples.conversations) == (2, ["a", "b"], [])
    assert samples.image is samples.lengths is samples.instructions is samples.image_ids is None
    assert read_samples({"answer": "a dog"}).answers == ["a dog"]


TALK = {"conv_q": ["q", "q!q"], "conv_a": ["a", "a!a"], "connect_sym": ["!"]}
IMAGES = torch.zeros(2, 2, 3, 4, 4)


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        ({"text_input": ["a"], "image_id": [1]}, "need either 'answer' or 'conv_q' and 'conv_a'; they have image_id,"),
        ({"answer": ["a", "b"]} | TALK, "need either 'answer' or"),
        ({"conv_q": ["q"], "connect_sym": ["!"]}, "a batch with 'conv_q' also needs 'conv_a'"),
        ({"conv_q": ["q"], "conv_a": ["a"]}, "a batch with 'conv_q' also needs 'connect_sym'"),
        (TALK | {"conv_a": ["a"]}, "conv_a: not as many entries as conv_q"),
        (TALK | {"conv_a": ["a", "a"]}, "sample 1 of the batch: 2 questions in conv_q, 1 answers in conv_a"),
        ({"answer": ["a", "b"], "image": torch.zeros(3, 3, 4, 4)}, "image: 3 entries for 2 samples"),
        ({"answer": ["a", "b"], "instruction_input": ["look"]}, "instruction_input: 1 entries for 2 samples"),
        ({"answer": ["a", "b"], "image": IMAGES, "length": [1, 1, 1]}, "length: 3 entries for 2 samples"),
        ({"answer": ["a", "b"], "length": [1, 1]}, "length: needs image of shape"),
        ({"answer": ["a", "b"], "image": IMAGES[0], "length": [1, 1]}, "length: needs image of shape"),
        ({"answer": ["a", "b"], "image": IMAGES, "length": [2, -1]}, "length: -1 images in sample 1 of the batch"),
        ({"answer": ["a", "b"], "image": IMAGES, "length": [2, 3]}, "length: 3 images in sample 1 of the batch"),
    ],
)
def test_batches_that_are_not_read_name_field_and_sample(samples, text):
    with pytest.raises(SampleError) as error:
        read_samples(samples)
    assert text in str(error.value)
