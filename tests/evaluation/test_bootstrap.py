"""Intervals and paired tests: exact corpus scores, known distributions, the same in every run."""

import numpy as np
import pytest

from minigpt4.evaluation.bootstrap import Bootstrap, bleu, meteor, wilson
from minigpt4.evaluation.metrics import CaptionScorer, CaptionScores

REFERENCES = {
    "1": ["A brown dog sleeps on a red blanket.", "A dog is sleeping."],
    "2": ["Two people walk along the river.", "A couple takes a walk by the water."],
    "3": ["The table is set for dinner!", "Plates and glasses on a table."],
    "4": ["A red bus stops."],
}
PREDICTIONS = {
    "1": "A dog sleeps on a blanket.",
    "2": "Two persons are walking by a river.",
    "3": "",
    "4": "A red bus stops.",
}


@pytest.fixture(scope="module")
def scores() -> CaptionScores:
    return CaptionScorer(REFERENCES, ["BLEU", "CIDEr", "ROUGE-L", "METEOR"]).score(PREDICTIONS)


def _known(values: np.ndarray) -> CaptionScores:
    return CaptionScores({"CIDEr": float(values.mean())}, {"CIDEr": values}, {})


def test_scores_of_summed_counts_are_the_corpus_scores(scores):
    wanted = [scores.corpus[f"BLEU-{order}"] for order in range(1, 5)]
    assert bleu(scores.counts["BLEU"].sum(axis=0, keepdims=True))[0].tolist() == pytest.approx(wanted, rel=1e-12)
    total = meteor(scores.counts["METEOR"].sum(axis=0, keepdims=True))
    assert total == pytest.approx(scores.corpus["METEOR"], rel=1e-12)
    assert meteor(np.array([[0.0, 5, 0, 2, *[0] * 19], [4.0, 5, 1, 2, *[0] * 19]])).tolist() == [0, 0]


def test_interval_of_a_mean_is_about_two_standard_errors_wide_and_the_same_in_every_run():
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    first, second = (Bootstrap([_known(values)], 400).intervals(0)["CIDEr"] for _ in range(2))
    error = values.std() / np.sqrt(400)
    assert first[0] == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert first[1] == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)
    assert first == second
    with pytest.raises(ValueError, match="more than one image"):
        Bootstrap([_known(values[:1])], 1)


def test_test_is_paired_over_images():
    images = np.random.default_rng(2).normal(0.5, 0.3, 200)  # images differ much more than checkpoints do
    compared = Bootstrap([_known(images), _known(images + 0.01)], 200).compare(1, 0)["CIDEr"]
    assert compared["difference"] == pytest.approx(0.01)
    assert compared["interval"] == pytest.approx((0.01, 0.01))
    assert compared["p"] == pytest.approx(2 / 1001)


def test_no_difference_is_never_significant(scores):
    for compared in Bootstrap([scores, scores], 4).compare(1, 0).values():
        assert compared == {"difference": 0, "interval": (0, 0), "p": 1}


def test_p_of_unrelated_sets_is_rarely_small():
    random = np.random.default_rng(3)
    small = 0
    for _ in range(60):
        pair = [_known(random.normal(size=60)) for _ in range(2)]
        small += Bootstrap(pair, 60, draws=200).compare(1, 0)["CIDEr"]["p"] < 0.05
    assert small <= 9  # 3 expected


def test_direction_of_a_difference_does_not_change_p(scores):
    better = CaptionScorer(REFERENCES, ["BLEU"]).score({key: texts[0] for key, texts in REFERENCES.items()})
    corpus = {name: score for name, score in scores.corpus.items() if name in better.corpus}
    bootstrap = Bootstrap([CaptionScores(corpus, {}, {"BLEU": scores.counts["BLEU"]}), better], 4)
    up, down = bootstrap.compare(1, 0)["BLEU-1"], bootstrap.compare(0, 1)["BLEU-1"]
    assert up["difference"] == -down["difference"] > 0
    assert up["p"] == down["p"]


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [  # worked out by hand with z = 1.96: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n)
        (35, 100, 0.2636, 0.4475),
        (2, 100, 0.0055, 0.0700),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_wilson_interval_of_known_shares(count: int, of: int, low: float, high: float) -> None:
    assert wilson(count, of) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("count", "of"), [(0, 0), (-1, 5), (6, 5)])
def test_a_count_outside_the_whole_is_no_share(count: int, of: int) -> None:
    with pytest.raises(ValueError, match="is no share"):
        wilson(count, of)
