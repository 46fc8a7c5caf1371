"""Scores of visual questions against what the published scorers say of made-up cases."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from minigpt4.common.errors import SampleError
from minigpt4.evaluation import vqa_scores
from minigpt4.evaluation.vqa import BENCHMARKS
from minigpt4.evaluation.vqa_data import VqaQuestion
from minigpt4.evaluation.vqa_scores import GQA_ANSWERS, auroc, gqa, gqa_matches, pick

CASES = json.loads((Path(__file__).parents[1] / "data" / "vqa_cases.json").read_text())
NAMES = {"official": "official", "minigpt4": "minigpt4_okvqa", "lavis": "lavis", "lmms": "evalai"}
"""Our scorers, and what the cases call them."""


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
    wrong = {
        key: (case["pins"][key], own) for key, own in found.items() if wanted["per_question"][key] != round(own, 2)
    }
    assert not wrong
    assert round(np.mean(list(found.values())), 10) == wanted["overall_10_digits"]
    for kind in ("answer_type", "question_type"):
        if f"per_{kind}" in wanted:
            own = {}
            for one in case["annotations"]["annotations"]:
                own.setdefault(one[kind], []).append(found[str(one["question_id"])])
            assert {value: round(np.mean(group), 2) for value, group in own.items()} == wanted[f"per_{kind}"]


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


# The normalisation read a second time, sign by sign; nothing here is taken from vqa_scores.py


TEXTS = 11_000
GOES = ';/[]"{}()=+\\_-><@`,?!'
WORDS_OF_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who you",
}
WHOLE = [f"{stem}{ending}" for ending, stems in ENDINGS.items() for stem in stems.split()]
WHOLE += ["ma'am", "o'clock", "'twas", "y'all", "y'all'll", "y'all'd've", "'ow's'at"]
WRITTEN = {"somebody'd": "somebodyd"}
for whole in WHOLE:
    places = [found.start() for found in re.finditer("'", whole)]
    WRITTEN |= {whole[:place] + whole[place + 1 :]: whole for place in places}


def stripped(text: str) -> str:
    spaced = "".join(" " if sign in "\n\t" else sign for sign in text)
    return re.sub(r"\A\s+|\s+\Z", "", spaced)


def unsigned(text: str) -> str:
    """One pass over the signs; then one over the periods, with a count of those that went."""
    pairs = list(zip(text, text[1:], strict=False))
    beside_blank = {a for a, b in pairs if b == " "} | {b for a, b in pairs if a == " "}
    number = any(
        b == "," and a.isdecimal() and c.isdecimal() for a, b, c in zip(text, text[1:], text[2:], strict=False)
    )
    kept = [sign if sign not in GOES else "" if number or sign in beside_blank else " " for sign in text]
    text, gone, out = "".join(kept), 0, []
    for place, sign in enumerate(text):
        follows = text[place + 1 : place + 2]
        if sign == "." and not follows.isdecimal() and gone < 32:
            gone += 1
        else:
            out.append(sign)
    return "".join(out)


def worded(text: str) -> str:
    out = []
    for word in text.lower().split():
        if word == "none":
            word = "0"
        elif word in WORDS_OF_NUMBERS:
            word = str(WORDS_OF_NUMBERS.index(word))
        if word not in {"a", "an", "the"}:
            out.append(WRITTEN.get(word, word))
    return " ".join(out)


def usual(text: str) -> str:
    return worded(unsigned(stripped(text)))


def evalai(text: str) -> str:
    text = re.sub("[,?]", "", text.lower())
    return usual(re.sub("'s", " 's", text))


PIECES = "dog Dog two Two none ten eleven a the An yes no Yes. unanswerable tea 3.5 .5 10,000 1,5 3. a.m. no.5 <unk>"
PIECES += " dog.cat U.S.A. \u0663,\u0664 caf\u00e9 #1 50% dont cant im let's lets dog's somebody'd yall'd've y'alld've"
PIECES = [*PIECES.split(), "ow's'at", *WHOLE, *WRITTEN]
JOINTS = [" ", " ", " ", "  ", "", "\n", "\t", "\r", "\u00a0", "_", *GOES, " - ", ", ", "? ", "/", "...", ". "]


def generated(draw: random.Random) -> str:
    text = "".join(draw.choice(PIECES) + draw.choice(JOINTS) for _ in range(draw.randint(1, 4)))
    if draw.random() < 0.02:
        text += draw.choice(["." * 40, ". " * 40, ".x" * 40])
    return text if draw.random() < 0.5 else text.strip()


def test_texts_become_the_same():
    draw = random.Random(20)
    texts = [generated(draw) if draw.random() < 0.8 else draw.choice(PIECES) for _ in range(TEXTS)]
    wrong = [text for text in texts if vqa_scores.normalised(text) != usual(text)]
    wrong += [text for text in texts if vqa_scores.evalai_normalised(text) != evalai(text)]
    assert not wrong, f"{len(wrong)} of {2 * len(texts)}: {wrong[:5]!r}"
