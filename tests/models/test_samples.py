"""Batches of loaders become one plain form; faults name the field and the sample."""

import pytest
import torch

from minigpt4.common.errors import SampleError
from minigpt4.models.prompting import Conversation, read_samples


def refusal(**samples) -> str:
    with pytest.raises(SampleError) as error:
        read_samples(samples)
    return str(error.value)


def test_answers_are_read():
    samples = read_samples({"answer": ["a", "b"]})
    assert (len(samples), samples.answers, samples.conversations) == (2, ["a", "b"], [])
    assert samples.image is samples.lengths is samples.instructions is samples.image_ids is None


def test_one_answer_may_be_a_string():
    assert read_samples({"answer": "a dog"}).answers == ["a dog"]


@pytest.mark.parametrize("mark", ["!@#", ["!@#", "ignored"]])
def test_conversations_are_split_at_the_connecting_symbol_of_the_first_sample(mark):
    samples = read_samples({"conv_q": ["q1!@#q2", "q"], "conv_a": ["a1!@#a2", "a"], "connect_sym": mark})
    assert samples.conversations == [Conversation(["q1", "q2"], ["a1", "a2"]), Conversation(["q"], ["a"])]
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


def test_neither_answers_nor_conversations_is_refused_with_what_there_is():
    expected = "the samples need either 'answer' or 'conv_q' and 'conv_a'; they have image_id, text_input"
    assert refusal(text_input=["a"], image_id=[1]) == expected


def test_answers_beside_conversations_are_refused():
    assert "need either 'answer' or" in refusal(answer=["a"], conv_q=["q"], conv_a=["a"], connect_sym=["!"])


@pytest.mark.parametrize("missing", ["conv_a", "connect_sym"])
def test_conversation_with_a_missing_field_names_it(missing):
    samples = {"conv_q": ["q"], "conv_a": ["a"], "connect_sym": ["!"]}
    del samples[missing]
    assert refusal(**samples) == f"a batch with 'conv_q' also needs '{missing}'"


def test_lists_of_questions_and_answers_of_different_length_are_refused():
    assert refusal(conv_q=["q", "q"], conv_a=["a"], connect_sym=["!"]) == "conv_a: not as many entries as conv_q"


def test_more_questions_than_answers_name_the_sample():
    text = refusal(conv_q=["q", "q!q!q"], conv_a=["a", "a!a"], connect_sym=["!"])
    assert text == "sample 1 of the batch: 3 questions in conv_q, 2 answers in conv_a"


@pytest.mark.parametrize(
    ("field", "value"),
    [("image", torch.zeros(3, 3, 4, 4)), ("instruction_input", ["look"]), ("length", [1, 1, 1])],
)
def test_field_of_another_length_than_the_batch_is_named(field, value):
    assert refusal(answer=["a", "b"], **{field: value}) == f"{field}: {len(value)} entries for 2 samples"


@pytest.mark.parametrize("image", [None, torch.zeros(2, 3, 4, 4)])
def test_lengths_without_several_images_a_sample_are_refused(image):
    samples = {"answer": ["a", "b"], "length": [1, 1]} | ({} if image is None else {"image": image})
    assert refusal(**samples) == "length: needs image of shape (B, n, 3, S, S)"


@pytest.mark.parametrize("length", [-1, 3])
def test_length_out_of_range_names_the_sample(length):
    text = refusal(answer=["a", "b"], image=torch.zeros(2, 2, 3, 4, 4), length=[2, length])
    assert text == f"length: {length} images in sample 1 of the batch, but image holds 2"
