"""CIDEr with kept references: the numbers of pycocoevalcap to the last bit, its references weighed once."""

import random

import pytest

from minigpt4.evaluation import metrics

WORDS = ["a", "the", "brown", "dog", "sleeps", "on", "two", "people", "walk", "along", "river", "boats", "to", "pier"]


def text(chance: random.Random, most: int) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(0, most)))


@pytest.fixture(scope="module")
def references() -> list[list[str]]:
    chance = random.Random(0)
    return [[text(chance, 40) + " end" for _ in range(chance.randint(1, 5))] for _ in range(60)]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_scores_are_those_of_pycocoevalcap_to_the_last_bit(references, seed):
    from pycocoevalcap.cider.cider import Cider

    chance = random.Random(seed)
    captions = [text(chance, 50) for _ in references]
    captions[:2] = ["", references[1][0]]
    _, wanted = Cider().compute_score(dict(enumerate(references)), {n: [said] for n, said in enumerate(captions)})
    assert metrics.CiderReferences(references).scores(captions).tolist() == wanted.tolist()


def test_a_single_image_says_nothing():
    assert metrics.CiderReferences([["a dog"]]).scores(["a dog"]).tolist() == [0]


def test_another_set_of_captions_weighs_itself_alone(references, monkeypatch):
    weighed, count = [], metrics._ngrams
    monkeypatch.setattr(metrics, "_ngrams", lambda said: weighed.append(said) or count(said))
    kept = metrics.CiderReferences(references)
    assert len(weighed) == sum(map(len, references))
    weighed.clear()
    captions = ["a dog"] * len(references)
    kept.scores(captions)
    assert weighed == captions
