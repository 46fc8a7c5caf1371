"""Replies of a judge: what they find, and which of them cannot be read."""

import pytest

from minigpt4.evaluation.failure_rate import read_reply


def _kinds(reply: str) -> list[str]:
    return [failure.kind for failure in read_reply(reply)]


@pytest.mark.parametrize(
    ("reply", "kinds"),
    [
        ("IMAGE: yes - a dog\nINSTRUCTION: yes - detailed", []),
        ("IMAGE: no - there is no dog\nINSTRUCTION: yes", ["off the image"]),
        ("1. **IMAGE**: Yes.\n2. **INSTRUCTION**: No, it is prose.", ["off the instruction"]),
        ("Let me see.\n\nimage: NO\n\ninstruction - no", ["off the image", "off the instruction"]),
    ],
)
def test_reply_is_read_in_the_forms_that_models_use(reply, kinds):
    assert _kinds(reply) == kinds


def test_reason_of_the_judge_is_the_evidence():
    (failure,) = read_reply("**IMAGE:** no - it is a cat.\nINSTRUCTION: yes")
    assert failure.evidence == "the judge: it is a cat."
    (failure,) = read_reply("IMAGE: no\nINSTRUCTION: yes")
    assert failure.evidence == "the judge: no reason given"


@pytest.mark.parametrize("reply", ["", "yes", "IMAGE: yes", "IMAGE: maybe\nINSTRUCTION: yes", "IMAGE: yesterday"])
def test_reply_that_leaves_a_question_open_cannot_be_read(reply):
    assert read_reply(reply) is None
