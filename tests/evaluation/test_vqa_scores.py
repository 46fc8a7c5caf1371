"""Scores of visual questions against what the published scorers say of made-up cases."""

import json
from pathlib import Path

import numpy as np
import pytest

from minigpt4.common.errors import SampleError
from minigpt4.evaluation import vqa_scores
from minigpt4.evaluation.vqa_scores import (
    GQA_ANSWERS,
    VIZWIZ,
    VQA,
    aokvqa_choices,
    aokvqa_direct,
    auroc,
    breakdown,
    gqa,
    gqa_matches,
    hateful,
    pick,
    vsr,
)

CASES = json.loads((Path(__file__).parents[1] / "data" / "vqa_cases.json").read_text())
NAMES = {"official": "official", "minigpt4": "minigpt4_okvqa", "lavis": "lavis", "lmms": "evalai"}
"""Our scorers, and what the cases call them."""


def percents(scores: dict, digits: int = 2) -> dict[str, float]:
    return {str(key): round(100 * score, digits) for key, score in scores.items()}


# VQA rules


@pytest.mark.parametrize("rule", sorted({case["rule"] for case in CASES["normalisation"]}))
def test_texts_are_normalised_as_by_the_official_code(rule):
    for case in (case for case in CASES["normalisation"] if case["rule"] == rule):
        text = case["input"]
        assert vqa_scores.without_signs(vqa_scores.one_line(text)) == case["after_punctuation"], text
        assert vqa_scores.normalised(text) == case["normalised"], text
        assert vqa_scores.evalai_normalised(text) == case["evalai"], text


def test_the_table_of_contractions_has_the_official_size():
    assert len(vqa_scores.CONTRACTIONS) == 120 - 6  # without those that are never met or change nothing


# VQAv2, OK-VQA, VizWiz


def vqa_case() -> tuple[dict, list[dict]]:
    case = CASES["vqa"]
    predictions = {one["question_id"]: one["answer"] for one in case["predictions"]}
    return predictions, case["annotations"]["annotations"]


@pytest.mark.parametrize("scorer", NAMES)
def test_vqa_scores_of_each_code(scorer):
    predictions, annotations = vqa_case()
    wanted, found = CASES["vqa"]["expected"][NAMES[scorer]], breakdown(predictions, annotations, VQA[scorer])
    pins = CASES["vqa"]["pins"]
    wrong = {
        key: (pins[key], own) for key, own in percents(found.per_question).items() if wanted["per_question"][key] != own
    }
    assert not wrong
    assert round(100 * found.overall, 10) == wanted["overall_10_digits"]
    for name in ("answer_type", "question_type"):
        if f"per_{name}" in wanted:
            assert percents(found.groups[name]) == wanted[f"per_{name}"]


@pytest.mark.parametrize("scorer", ["official", "minigpt4"])
def test_vizwiz_scores_of_each_code(scorer):
    case = CASES["vizwiz"]
    predictions = {one["image"]: one["answer"] for one in case["predictions"]}
    found, wanted = breakdown(predictions, case["annotations"], VIZWIZ[scorer], "image"), case["expected"][scorer]
    assert percents(found.per_question, 10) == wanted["per_image"]
    assert 100 * found.overall == pytest.approx(wanted["overall"], abs=0.005 if scorer == "official" else 1e-10)
    if "per_answer_type" in wanted:
        assert percents(found.groups["answer_type"]) == wanted["per_answer_type"]


def test_ids_must_be_the_same_and_are_compared_as_they_are():
    predictions, annotations = vqa_case()
    few = {key: predictions[key] for key in (7001, 7004)}
    with pytest.raises(SampleError, match="40 questions have no answer: question_id 7002, 7003, 7005, "):
        breakdown(few, annotations, VQA["official"])
    assert breakdown(few, annotations, VQA["official"], partial=True).overall == 1
    for wrong, words in (({"7001": "yes"}, "; 1 answers have no question: question_id '7001'$"), ({}, "42 questions")):
        with pytest.raises(SampleError, match=words):
            breakdown(wrong, annotations, VQA["official"], partial=True)


# Choices


def aokvqa_case(name: str) -> dict[str, str]:
    predictions = CASES["aokvqa"]["predictions"]
    return {key: own[name] for key, own in predictions.items() if name in own}


@pytest.mark.parametrize(
    ("name", "score"), [("multiple_choice", aokvqa_choices), ("direct_answer", aokvqa_direct)], ids=["choice", "direct"]
)
def test_aokvqa_scores(name, score):
    case, predictions = CASES["aokvqa"], aokvqa_case(name)
    wanted, found = case["expected"]["official"], score(predictions, case["dataset"], strict=False)
    assert {key: 100 * own for key, own in found.items()} == pytest.approx(wanted[f"per_question_{name}"], abs=1e-10)
    assert 100 * np.mean(list(found.values())) == pytest.approx(wanted[name], abs=1e-10)
    assert case["expected"]["official_strict"][name].startswith("refused")
    with pytest.raises(SampleError, match="1 questions have no answer: question_id devQ0"):
        score(predictions, case["dataset"])


def test_lavis_counts_difficult_direct_answers_and_a_choice_must_be_one():
    dataset = CASES["aokvqa"]["dataset"]
    found = aokvqa_direct(aokvqa_case("direct_answer"), dataset, "lavis", strict=False)
    assert 100 * np.mean(list(found.values())) == pytest.approx(CASES["aokvqa"]["expected"]["lavis_direct_answer"])
    choices = {one["question_id"]: one["choices"][0] for one in dataset}
    assert len(aokvqa_choices(choices, dataset)) == 20
    with pytest.raises(SampleError, match="1 predictions are none of the choices: devQ000000000000000001"):
        aokvqa_choices(choices | {"devQ000000000000000001": "A"}, dataset)


@pytest.mark.parametrize("rule", ["sum", "mean"])
def test_iconqa_takes_the_likeliest_choice(rule):
    case = CASES["iconqa"]
    picks = [pick(case["token_losses"][one["image_id"]], rule) for one in case["annotations"]]
    wanted = case["expected"][rule]
    assert picks == wanted["picks"]
    right = [own == one["answer"] for own, one in zip(picks, case["annotations"], strict=True)]
    assert 100 * np.mean(right) == wanted["accuracy"]


def test_of_equal_choices_the_first_is_taken():
    assert (pick([[0.5, 0.1], [0.5, 0.1]]), pick([[0.5, 0.5], [0.5]], "mean")) == (0, 0)


# GQA

FIGURES = ("accuracy", "binary", "open", "consistency", "validity", "plausibility", "distribution")


def gqa_predictions(scorer: str = "official") -> dict[str, str]:
    clean = GQA_ANSWERS[scorer]
    return {one["questionId"]: clean(one["prediction"]) for one in CASES["gqa"]["predictions"]}


@pytest.mark.parametrize(("name", "scorer"), [("official", "official"), ("official_after_llava_cleaning", "llava")])
def test_gqa_figures(name, scorer):
    case = CASES["gqa"]
    wanted, found = case["expected"][name], gqa(gqa_predictions(scorer), case["questions"], case["choices"])
    figures = {key: found[key] if key == "distribution" else 100 * found[key] for key in FIGURES}
    assert {key: round(own, 2) for key, own in figures.items()} == {key: wanted[key] for key in FIGURES}
    for ours, theirs in (
        ("structural", "structural type"),
        ("semantic", "semantic type"),
        ("steps", "steps number"),
        ("words", "words number"),
    ):
        if f"Accuracy / {theirs}" in wanted:
            group = {str(value): [round(100 * mean, 2), n] for value, (mean, n) in found["groups"][ours].items()}
            assert group == wanted[f"Accuracy / {theirs}"]


@pytest.mark.parametrize("scorer", ["minigpt4", "lavis"])
def test_gqa_by_others(scorer):
    case = CASES["gqa"]
    said = {one["questionId"]: one["prediction"] for one in case["predictions"]}
    right = [gqa_matches(said[one["question_id"]], one["answer"], scorer) for one in case["list_form"]]
    assert 100 * np.mean(right) == case["expected"][scorer]


def test_gqa_without_choices_and_unbalanced_questions():
    case = CASES["gqa"]
    balanced = {key: text for key, text in gqa_predictions().items() if case["questions"][key]["isBalanced"]}
    found = gqa(balanced, case["questions"])
    assert (found["accuracy"], found["consistency"], found["validity"]) == (0.52, None, None)
    del balanced["1001"]
    with pytest.raises(SampleError, match="1 questions have no answer: question_id 1001"):
        gqa(balanced, case["questions"])
    assert gqa_matches("Street!", "street", "lmms")


# Two answers


def test_vsr_and_hateful_memes():
    case = CASES["vsr"]
    right = [vsr(said, one["label"]) for said, one in zip(case["predictions"], case["annotations"], strict=True)]
    assert 100 * np.mean(right) == case["expected"]["minigpt4"]
    case = CASES["hateful_memes"]
    said = list(map(hateful, case["predictions"]))
    right = [own == one["label"] for own, one in zip(said, case["annotations"], strict=True)]
    assert 100 * np.mean(right) == case["expected"]["minigpt4"]
    assert said.count(None) == 2


def test_pope_takes_for_yes_what_has_no_word_of_no_in_front():
    yes = ("Yes, there is.", "I cannot tell", "", "NO", "Nothing. No.", "yes.no", "none", "no\nyes", ". no")
    no = ("No, there is not a dog.", "no", "There is not, I think", "It is yes, no or maybe", "no.yes", "No,")
    assert [vqa_scores.pope(text) for text in yes + no] == [True] * len(yes) + [False] * len(no)


def test_area_under_the_curve_is_the_share_of_ordered_pairs():
    random = np.random.default_rng(0)
    labels, scores = random.integers(0, 2, 60), random.integers(0, 8, 60) / 8
    pairs = [(a, b) for a in scores[labels == 1] for b in scores[labels == 0]]
    wanted = np.mean([(a > b) + (a == b) / 2 for a, b in pairs])
    assert auroc(labels, scores) == pytest.approx(wanted, abs=1e-12)
    assert (auroc([0, 1], [0.1, 0.9]), auroc([0, 1], [0.9, 0.1]), auroc([1, 1], [0.5, 0.6])) == (1, 0, None)
