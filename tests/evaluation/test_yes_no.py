"""Yes and no in what people and models write."""

import pytest

from minigpt4.evaluation.judge import yes_no, yes_no_lines


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("yes", True),
        ("Yes, there is a dog in the image.", True),
        ("**Yes**", True),
        ("No.", False),
        ("no, but there is a cat", False),
        ("Nope", False),
        ("Answer: yes", True),
        ("The answer is no.", False),
        ("There is a dog on the couch.", True),
        ("There is no dog in the image.", False),
        ("There isn\u2019t any dog.", False),
        ("I can see a dog.", True),
        ("I don't see a dog.", False),
        ("The image shows no dog.", False),
        ("The picture does not contain a dog.", False),
        ("<think>No dog? Yes, one.</think>\nYes", True),
        ("<think>Let me look, no", None),
        ("There is a dog, but no cat.", None),
        ("I am not sure, maybe yes.", None),
        ("I cannot tell.", None),
        ("yes and no", True),
        ("It is either yes or no.", None),
        ("A dog.", None),
        ("The snow is nowhere to be noticed.", None),
        ("", None),
    ],
)
def test_one_answer(answer, says):
    assert yes_no(answer) is says


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("1. yes\n2. no\n3. yes", [True, False, True]),
        ("1: Yes\n2: No\n3: Yes", [True, False, True]),
        ("Caption 1: yes\n\nCaption 2: no\n\nCaption 3: yes", [True, False, True]),
        ("- **1.** Yes\n- **2.** No\n- **3.** Yes", [True, False, True]),
        ("2. no\n1. yes\n3. yes", [True, False, True]),
        ("1. yes - the dog is there\n2. no - there is no cat\n3. yes - yes", [True, False, True]),
        ("Here they are:\n1. yes\n2. no\n3. yes\nI hope that helps, no?", [True, False, True]),
        ("yes\nno\nYES", [True, False, True]),
        ("yes, no, yes", [True, False, True]),
        ("<think>no no no no</think>yes\nno\nyes", [True, False, True]),
        ("1. yes\n2. no", None),
        ("1. yes\n2. no\n2. yes", None),
        ("1. yes\n2. no\n4. yes", None),
        ("1. yes\n2. no\n3. yes\n4. no", None),
        ("1. yes\n2. perhaps\n3. yes", None),
        ("yes\nno", None),
        ("All of them are covered.", None),
        ("", None),
    ],
)
def test_three_lines(answer, says):
    assert yes_no_lines(answer, 3) == says


def test_one_line():
    assert yes_no_lines("1. yes", 1) == yes_no_lines("Yes", 1) == [True]
