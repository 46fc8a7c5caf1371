"""LLaVA's conversations as the model takes them."""

import json

import pytest

from minigpt4.common.errors import SampleError
from minigpt4.datasets.datasets.image_caption_json import conversation_fields
from minigpt4.models.prompting import read_samples


def _turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


@pytest.mark.parametrize("first", ["<image>\nWhat is it?", "What is it?\n<image>", "What is it?"])
def test_model_reads_questions_and_answers_with_the_image_first(first):
    fields = conversation_fields(_turns(first, "A cat.", "Its colour?", "Black."))
    questions, answers = read_samples({key: [value] for key, value in fields.items()}).conversations[0]
    assert questions == ["<Img><ImageHere></Img> What is it?", "Its colour?"]
    assert answers == ["A cat.", "Black."]


def test_turns_may_be_json_text():
    turns = _turns("<image> Hm?", "Yes.")
    assert conversation_fields(json.dumps(turns)) == conversation_fields(turns)


@pytest.mark.parametrize(
    ("turns", "complaint"),
    [
        ([], "it has 0 turns"),
        (_turns("a", "b", "c"), "it has 3 turns"),
        (_turns("a", "b", "c", " "), "turn 4 is empty"),
        (_turns("<image>", "b"), "turn 1 is empty"),
        (_turns("a", "b")[::-1], 'turn 1 must be {"from": "human"'),
        (_turns("<image><image> a", "b"), "turn 1: a conversation has one image"),
        (_turns("a", "b", "<image> c", "d"), "turn 3: a conversation has one image"),
        (_turns("<ImageHere> a", "b"), "turn 1 holds"),
        ("[", "not JSON"),
        ({"from": "human"}, "must be a list of turns"),
    ],
)
def test_wrong_conversation_is_refused_by_its_turn(turns, complaint):
    with pytest.raises(SampleError, match=complaint):
        conversation_fields(turns)
