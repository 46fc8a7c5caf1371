"""Coverage by a judge on this machine, with both protocols, and answers that cannot be read."""

import re

import pytest

from minigpt4.common.errors import SampleError
from minigpt4.evaluation.bootstrap import ratio_interval, wilson
from minigpt4.evaluation.coverage import coverage, score
from minigpt4.evaluation.judge import Judge, JudgeEndpoint

CAPTIONS = {
    "1": ["a dog", "a red dog", "a cat", "two dogs", "an owl", "a sixth caption"],
    "2": ["a cat", "a bus", "a car", "a boat", "a bike"],
    "3": ["a bus", "a bus stop", "a road"],
}
DESCRIPTIONS = {"1": "A red dog.", "2": "A cat, a bus and a car.", "3": "A dog."}


@pytest.fixture
def judge(chat_server, tmp_path):
    return Judge(JudgeEndpoint(chat_server.url, "tiny-judge"), tmp_path / "answers.jsonl")


def _words(request) -> tuple[str, list[str]]:
    """The description and the captions of a question."""
    text = request["messages"][-1]["content"]
    description = re.search(r"<description>\n(.*)\n</description>", text)[1]
    captions = re.findall(r"^\d\. (.*)$", text, re.MULTILINE) or re.findall(r"<caption>\n(.*)\n</caption>", text)
    return description.lower(), captions


def _numbered(request) -> str:
    description, captions = _words(request)
    lines = [f"{n}. {'yes' if caption in description else 'no'}" for n, caption in enumerate(captions, start=1)]
    return "\n".join(lines)


def test_captions_protocol_counts_covered_ones_of_five(chat_server, judge):
    chat_server.answer = _numbered
    judged = coverage(judge, DESCRIPTIONS, CAPTIONS, "captions", at_once=2)
    assert [one["covered"] for one in judged] == [
        [False, True, False, False, False],
        [True, True, True, False, False],
        [False, False, False],
    ]
    found = score(judged, "captions")
    assert found["score"] == pytest.approx(4 / 3)
    assert found["interval"] == ratio_interval([1, 3, 0], [1, 1, 1])
    assert (found["images"], found["images_with_fewer_captions"], found["unparsable"]) == (3, 1, [])


def test_one_request_an_image_with_its_five_captions(chat_server, judge):
    chat_server.answer = _numbered
    coverage(judge, DESCRIPTIONS, CAPTIONS, "captions", at_once=1)
    asked = [_words(request) for request in chat_server.requests]
    assert asked == [(DESCRIPTIONS[key].lower(), CAPTIONS[key][:5]) for key in DESCRIPTIONS]


def test_objects_protocol_is_the_share_that_covers_the_first_caption(chat_server, judge):
    chat_server.answer = lambda request: "Yes." if _words(request)[1][0] in _words(request)[0] else "No."
    judged = coverage(judge, DESCRIPTIONS, CAPTIONS, "objects", at_once=2)
    assert [one["covered"] for one in judged] == [[False], [True], [False]]
    found = score(judged, "objects")
    assert (found["score"], found["interval"], found["covered"]) == (1 / 3, wilson(1, 3), 1)


@pytest.mark.parametrize("protocol", ["captions", "objects"])
def test_answers_that_cannot_be_read_are_left_out_and_named(chat_server, judge, protocol):
    chat_server.answer = lambda request: "Well ..." if "bus and" in request["messages"][-1]["content"] else "no\n" * 5
    captions = {key: [*own, "more", "still more"][:5] for key, own in CAPTIONS.items()}
    found = score(coverage(judge, DESCRIPTIONS, captions, protocol, at_once=1), protocol)
    assert (found["score"], found["images"], found["unparsable"]) == (0, 2, ["2"])


def test_nothing_that_can_be_read_has_no_score(chat_server, judge):
    chat_server.answer = lambda request: "Well ..."
    for protocol in ("captions", "objects"):
        found = score(coverage(judge, DESCRIPTIONS, CAPTIONS, protocol, at_once=1), protocol)
        assert (found["score"], found["interval"], found["unparsable"]) == (None, None, ["1", "2", "3"])


def test_image_without_captions_is_named_before_the_judge_is_asked(chat_server, judge):
    with pytest.raises(SampleError, match="1 images have no captions, such as 3"):
        coverage(judge, DESCRIPTIONS, {**CAPTIONS, "3": []}, "captions", at_once=1)
    assert chat_server.requests == []
