"""CIDEr-D of several sets of captions against the same references, whose side is computed once.

The numbers are pycocoevalcap's to the last bit, so every sum keeps its order and every logarithm and power is numpy's.
That package computes the weights of all references anew for each set; with five references an image that is most of
its work. Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", 2015.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ORDERS = 4
"""N-grams of one to so many words."""
SIGMA = 6.0
"""Words by which caption and reference may differ in length."""

NGram = tuple[str, ...]


@dataclass(frozen=True)
class _Weighted:
    """One text, by the length of its n-grams."""

    weights: list[dict[NGram, float]]
    """Each n-gram's count times its rarity."""

    norms: list[float]
    pairs: int
    """Pairs of words: what the package takes for the length."""


class CiderReferences:
    """The references of N images.

    Args:
        references: words joined by blanks, one or more texts an image.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        counted = [[_ngrams(text) for text in texts] for texts in references]
        self._images = Counter(ngram for texts in counted for ngram in set().union(*texts))
        self._log_total = np.log(float(len(references)))
        self._logs: dict[int, np.float64] = {}
        self._weighted = [[self._weigh(ngrams) for ngrams in texts] for texts in counted]

    def scores(self, captions: Sequence[str]) -> np.ndarray:
        """CIDEr of one caption an image, words joined by blanks: (N,) float64, 0 to 10; the mean is the corpus's."""
        return np.array([self._score(*pair) for pair in zip(captions, self._weighted, strict=True)])

    def _score(self, caption: str, references: Sequence[_Weighted]) -> np.float64:
        said = self._weigh(_ngrams(caption))
        total = np.zeros(ORDERS)
        for reference in references:
            total += _similarity(said, reference)
        score = np.mean(total)
        score /= len(references)
        score *= 10.0
        return score

    def _weigh(self, ngrams: Counter[NGram]) -> _Weighted:
        weights: list[dict[NGram, float]] = [{} for _ in range(ORDERS)]
        squares = [0.0] * ORDERS
        for ngram, count in ngrams.items():
            weight = float(count) * (self._log_total - self._log(self._images[ngram]))
            weights[len(ngram) - 1][ngram] = float(weight)
            squares[len(ngram) - 1] += pow(weight, 2)
        pairs = sum(count for ngram, count in ngrams.items() if len(ngram) == 2)
        return _Weighted(weights, [float(np.sqrt(square)) for square in squares], pairs)

    def _log(self, images: int) -> np.float64:
        """Logarithm of the number of images whose references have an n-gram, of 1 for one that none has."""
        if images not in self._logs:
            self._logs[images] = np.log(max(1.0, float(images)))
        return self._logs[images]


def _ngrams(text: str) -> Counter[NGram]:
    """Short ones first: sums of floats depend on their order."""
    words = text.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


def _similarity(said: _Weighted, wanted: _Weighted) -> np.ndarray:
    """Clipped cosine by the length of the n-grams, (4,), less for texts of different lengths."""
    delta = float(said.pairs - wanted.pairs)
    penalty = math.e ** (-(delta**2) / (2 * SIGMA**2))
    found = np.zeros(ORDERS)
    for n in range(ORDERS):
        own, other = said.weights[n], wanted.weights[n]
        cosine = 0.0
        for ngram, weight in own.items():
            if ngram in other:
                cosine += min(weight, other[ngram]) * other[ngram]
        if said.norms[n] != 0 and wanted.norms[n] != 0:
            cosine /= said.norms[n] * wanted.norms[n]
        found[n] = cosine * penalty
    return found
