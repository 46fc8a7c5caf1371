"""Bootstrap intervals and paired tests: exact corpus scores, known distributions, the same in every run."""

import numpy as np
import pytest

from minigpt4.evaluation.bootstrap import Bootstrap, bleu, intervals_of, meteor
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


def test_bleu_of_summed_counts_is_the_corpus_score(scores):
    total = scores.counts["BLEU"].sum(axis=0, keepdims=True)
    assert bleu(total)[0].tolist() == pytest.approx(
        [scores.corpus[f"BLEU-{order}"] for order in range(1, 5)], rel=1e-12
    )


def test_meteor_of_summed_counts_is_the_corpus_score(scores):
    assert meteor(scores.counts["METEOR"].sum(axis=0, keepdims=True)) == pytest.approx(
        scores.corpus["METEOR"], rel=1e-12
    )


def test_meteor_without_any_match_is_zero():
    assert meteor(np.array([[0.0, 5, 0, 2, *[0] * 19], [4.0, 5, 1, 2, *[0] * 19]])).tolist() == [0, 0]


def test_interval_of_a_mean_is_about_two_standard_errors_wide():
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    low, high = intervals_of(_known(values), 400)["CIDEr"]
    error = values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_test_is_paired_over_images():
    images = np.random.default_rng(2).normal(0.5, 0.3, 200)  # images differ much more than checkpoints do
    compared = Bootstrap([_known(images), _known(images + 0.01)], 200).compare(1, 0)["CIDEr"]
    assert compared.difference == pytest.approx(0.01)
    assert compared.interval == pytest.approx((0.01, 0.01))
    assert compared.p == pytest.approx(2 / 1001)


def test_no_difference_is_never_significant(scores):
    for comparison in Bootstrap([scores, scores], 4).compare(1, 0).values():
        assert (comparison.difference, comparison.interval, comparison.p) == (0, (0, 0), 1)


def test_p_of_unrelated_sets_is_rarely_small():
    random = np.random.default_rng(3)
    trials = [
        Bootstrap([_known(random.normal(size=60)), _known(random.normal(size=60))], 60, draws=200) for _ in range(60)
    ]
    small = sum(trial.compare(1, 0)["CIDEr"].p < 0.05 for trial in trials)
    assert small <= 9  # 3 expected


def test_direction_of_a_difference_does_not_change_p(scores):
    better = CaptionScorer(REFERENCES, ["BLEU"]).score({key: texts[0] for key, texts in REFERENCES.items()})
    worse = CaptionScores(
        {n: s for n, s in scores.corpus.items() if n in better.corpus}, {}, {"BLEU": scores.counts["BLEU"]}
    )
    bootstrap = Bootstrap([worse, better], 4)
    up, down = bootstrap.compare(1, 0)["BLEU-1"], bootstrap.compare(0, 1)["BLEU-1"]
    assert up.difference == -down.difference > 0
    assert up.p == down.p


def test_intervals_are_the_same_in_every_run(scores):
    assert intervals_of(scores, 4) == intervals_of(scores, 4)


def test_one_image_has_no_interval(scores):
    assert intervals_of(scores, 1) == {}
    with pytest.raises(ValueError, match="more than one image"):
        Bootstrap([scores], 1)
