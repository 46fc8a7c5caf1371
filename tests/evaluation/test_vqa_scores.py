"""Scores of visual questions against what the published scorers say of made-up cases."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from minigpt4.common.errors import SampleError
from minigpt4.evaluation import vqa_scores
from minigpt4.evaluation.vqa import BENCHMARKS
from minigpt4.evaluation.vqa_data import VqaQuestion
from minigpt4.evaluation.vqa_scores import auroc, gqa, gqa_matches, pick

CASES = json.loads((Path(__file__).parents[1] / "data" / "vqa_cases.json").read_text())
NAMES = {"official": "official", "minigpt4": "minigpt4_okvqa", "lavis": "lavis", "lmms": "evalai"}
"""Our scorers, and what the cases call them."""


# VQA rules


def test_texts_are_normalised_as_by_the_official_code():
    for case in CASES["normalisation"]:
        text = case["input"]
        assert vqa_scores.without_signs(vqa_scores.one_line(text)) == case["after_punctuation"], text
        assert vqa_scores.normalised(text) == case["normalised"], text
        assert vqa_scores.evalai_normalised(text) == case["evalai"], text


ENDINGS = {
    "n't": "ai are ca could did does do did had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who you",
}
WHOLE = ["ma'am", "o'clock", "'twas", "y'all", "y'all'll", "y'all'd've", "'ow's'at"]
WHOLE += [f"{stem}{ending}" for ending, stems in ENDINGS.items() for stem in stems.split()]


def test_every_contraction_gets_its_apostrophes_and_rare_texts_keep_the_order_of_the_rules():
    wanted = {"somebody'd": "somebodyd"}
    for whole in WHOLE:
        wanted |= {whole[: at.start()] + whole[at.end() :]: whole for at in re.finditer("'", whole)}
    assert len(vqa_scores.CONTRACTIONS) == 120 - 6  # without those that are never met or change nothing
    wanted |= {"up-to/-date": "up to date", "3.-5 -": "3.5", "3, 5 up-to": "3 5 up to", "five six seven": "5 6 7"}
    wanted |= {"eight": "8", "\u0663,\u0664": "\u0663\u0664", "\u0663.\u0664": "\u0663.\u0664"}
    assert {text: vqa_scores.normalised(text) for text in wanted} == wanted
    assert vqa_scores.evalai_normalised("DOG'S") == "dog 's"


# Each question's score


def scores(name: str, scorer: str, said: dict, records: list[dict], key: str = "question_id") -> dict[str, float]:
    """In percent, as the cases have them."""
    questions = [VqaQuestion(one[key], None, "", one) for one in records]
    return {str(key): 100 * own for key, own in BENCHMARKS[name].score(scorer, said, questions).items()}


@pytest.mark.parametrize("scorer", NAMES)
def test_vqa_scores_of_each_code(scorer):
    case = CASES["vqa"]
    said = {one["question_id"]: one["answer"] for one in case["predictions"]}
    found, wanted = scores("vqav2", scorer, said, case["annotations"]["annotations"]), case["expected"][NAMES[scorer]]
    assert {key: round(own, 2) for key, own in found.items()} == wanted["per_question"]
    assert round(np.mean(list(found.values())), 10) == wanted["overall_10_digits"]


@pytest.mark.parametrize("scorer", ["official", "minigpt4"])
def test_vizwiz_scores_of_each_code(scorer):
    case = CASES["vizwiz"]
    said = {one["image"]: one["answer"] for one in case["predictions"]}
    found = scores("vizwiz", scorer, said, case["annotations"], "image")
    assert {key: round(own, 10) for key, own in found.items()} == case["expected"][scorer]["per_image"]


@pytest.mark.parametrize(("name", "field"), [("aokvqa", "multiple_choice"), ("aokvqa_direct", "direct_answer")])
def test_aokvqa_scores(name, field):
    case = CASES["aokvqa"]
    said = {key: own[field] for key, own in case["predictions"].items() if field in own}
    found = scores(name, "official", said, case["dataset"])
    assert found == pytest.approx(case["expected"]["official"][f"per_question_{field}"], abs=1e-10)
    assert case["expected"]["official_strict"][field].startswith("refused")


# Choices


@pytest.mark.parametrize("rule", ["sum", "mean"])
def test_iconqa_takes_the_likeliest_choice_of_equals_the_first(rule):
    case = CASES["iconqa"]
    picks = [pick(case["token_losses"][one["image_id"]], rule) for one in case["annotations"]]
    wanted = case["expected"][rule]
    assert picks == wanted["picks"]
    right = [own == one["answer"] for own, one in zip(picks, case["annotations"], strict=True)]
    assert 100 * np.mean(right) == wanted["accuracy"]
    assert pick([[0.5, 0.1], [0.5, 0.1]], rule) == 0


# GQA; its figures are those of eval_vqa.py's test


def test_gqa_without_choices_and_unbalanced_questions():
    case = CASES["gqa"]
    said = {one["questionId"]: one["prediction"] for one in case["predictions"]}
    balanced = {key: text for key, text in said.items() if case["questions"][key]["isBalanced"]}
    found = gqa(balanced, case["questions"])
    assert (found["accuracy"], found["consistency"], found["validity"]) == (0.52, None, None)
    del balanced["1001"]
    with pytest.raises(SampleError, match="1 questions have no answer: question_id 1001"):
        gqa(balanced, case["questions"])
    assert gqa_matches("Street!", "street", "lmms")


# Two answers


def test_pope_takes_for_yes_what_has_no_word_of_no_in_front():
    yes = ("Yes, there is.", "I cannot tell", "", "NO", "Nothing. No.", "yes.no", "none", "no\nyes", ". no")
    no = ("No, there is not a dog.", "no", "There is not, I think", "It is yes, no or maybe", "no.yes", "No,")
    assert [vqa_scores.pope(text) for text in yes + no] == [True] * len(yes) + [False] * len(no)


def test_area_under_the_curve_is_the_share_of_ordered_pairs():
    draw = np.random.default_rng(0)
    labels, scores = draw.integers(0, 2, 60), draw.integers(0, 8, 60) / 8
    pairs = [(a, b) for a in scores[labels == 1] for b in scores[labels == 0]]
    wanted = np.mean([(a > b) + (a == b) / 2 for a, b in pairs])
    assert auroc(labels, scores) == pytest.approx(wanted, abs=1e-12)
    assert (auroc([0, 1], [0.1, 0.9]), auroc([0, 1], [0.9, 0.1]), auroc([1, 1], [0.5, 0.6])) == (1, 0, None)
