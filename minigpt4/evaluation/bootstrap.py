"""How sure scores are: bootstrap over images, with intervals and a paired test between checkpoints.

Images are drawn with replacement and the corpus scores computed anew, from per-image counts (BLEU, METEOR) or scores
(CIDEr, ROUGE-L). The weights of words in CIDEr stay those of all references. Everyone is scored on the same
draws, so the test is paired.
Shapes: R draws, N images, K counts of an image.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from minigpt4.evaluation.metrics import FAMILIES, CaptionScores

Z_95 = 1.959963984540054
"""The 97.5% point of the normal distribution."""
T_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
"""The same of Student's t with 1 to 10 degrees of freedom."""
DRAWS = 1000
SEED = 0

# METEOR 1.5's parameters for English, and its weights of exact, stem, synonym and paraphrase matches.
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
MATCH_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
# pycocoevalcap's guards against division by zero in BLEU.
TINY, SMALL = 1e-15, 1e-9


def wilson(count: int, of: int) -> tuple[float, float]:
    """The 95% Wilson score interval of the share `count / of`, both ends in 0 to 1.

    Source: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927. Raises ValueError
    for a share of nothing or a count outside 0 to `of`.
    """
    if of < 1 or not 0 <= count <= of:
        raise ValueError(f"{count} of {of} is no share")
    share, square = count / of, Z_95**2
    centre = share + square / (2 * of)
    half = Z_95 * math.sqrt(share * (1 - share) / of + square / (4 * of * of))
    low, high = ((centre + side * half) / (1 + square / of) for side in (-1, 1))
    return max(0.0, low), min(1.0, high)


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided p of McNemar's exact test: how often a fair coin splits the pairs where one alone passes so unevenly.

    1 without such pairs. Source: Q. McNemar, Note on the Sampling Error of the Difference Between Correlated
    Proportions or Percentages, 1947, with the binomial distribution in place of chi-square.
    """
    pairs, least = first_only + second_only, min(first_only, second_only)
    return min(1.0, 2 * sum(math.comb(pairs, count) for count in range(least + 1)) / 2**pairs)


def agreement(ratings: Sequence[Sequence[Hashable | None]]) -> dict[str, Any] | None:
    """How far judges agree beyond chance: Cohen's kappa of two, Krippendorff's (nominal) alpha of more.

    Args:
        ratings: of each thing a verdict a judge, of any number of kinds, None where there is none.

    Returns:
        `measure`, its `value` (None where all verdicts are the same), its bootstrap `interval` over the draws that have
        a value, the number of things `judged` by two or more, and the share of them that all judge the `same`. None
        where there are no such things.
    """
    rows = [own for row in ratings if len(own := [one for one in row if one is not None]) > 1]
    if not rows:
        return None
    kinds = list(dict.fromkeys(one for row in rows for one in row))
    if len(ratings[0]) == 2:
        name, measure = "Cohen's kappa", _kappa
        counts = [[len(set(row)) == 1, *(one == kind for one in row for kind in kinds)] for row in rows]
    else:
        name, measure, counts = "Krippendorff's alpha", _alpha, []
        for row in rows:
            given = [row.count(kind) for kind in kinds]
            counts.append([(len(row) ** 2 - sum(count**2 for count in given)) / (len(row) - 1), *given])
    counts_NK = np.array(counts, dtype=np.float64)
    value, drawn_R = measure(counts_NK.sum(axis=0)[None])[0], measure(_draw(len(rows), DRAWS) @ counts_NK)
    known = not math.isnan(value)
    return {
        "measure": name,
        "value": float(value) if known else None,
        "interval": _interval(drawn_R[~np.isnan(drawn_R)]) if known and len(rows) > 1 else None,
        "judged": len(rows),
        "same": sum(len(set(row)) == 1 for row in rows) / len(rows),
    }


def _kappa(counts_RK: np.ndarray) -> np.ndarray:
    """(R,) from sums of: same verdicts, those of each kind by the first judge, by the second."""
    first_RC, second_RC = np.split(counts_RK[:, 1:], 2, axis=1)
    things_R = first_RC.sum(axis=1)
    chance_R = (first_RC * second_RC).sum(axis=1) / things_R**2
    return _chance_corrected(1 - counts_RK[:, 0] / things_R, 1 - chance_R)


def _alpha(counts_RK: np.ndarray) -> np.ndarray:
    """(R,) from sums of: pairs within a thing that differ over one less than its verdicts, verdicts of each kind."""
    given_RC = counts_RK[:, 1:]
    verdicts_R = given_RC.sum(axis=1)
    expected_R = (verdicts_R**2 - (given_RC**2).sum(axis=1)) / (verdicts_R - 1)
    return _chance_corrected(counts_RK[:, 0], expected_R)


def _chance_corrected(observed_R: np.ndarray, expected_R: np.ndarray) -> np.ndarray:
    """1 - observed / expected disagreement; NaN where none is expected."""
    nothing_R = np.full_like(expected_R, np.nan)
    return 1 - np.divide(observed_R, expected_R, out=nothing_R, where=expected_R > 1e-12)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of the mean of independent runs by Student's t; None for fewer than two."""
    freedom = len(values) - 1
    if freedom < 1:
        return None
    mean, z = sum(values) / len(values), Z_95
    # Beyond the table the expansion of Cornish and Fisher, right to three digits.
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    series = z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))
    t = T_95[freedom - 1] if freedom <= len(T_95) else series
    half = t * math.sqrt(sum((value - mean) ** 2 for value in values) / freedom / len(values))
    return mean - half, mean + half


class Bootstrap:
    """Scores of several sets of captions of the same N > 1 images, on the same draws.

    Raises ValueError for a single image, which says nothing about others.
    """

    def __init__(self, scores: Sequence[CaptionScores], images: int, draws: int = DRAWS) -> None:
        if images < 2:
            raise ValueError("a bootstrap needs more than one image")
        self.scores, times_RN = scores, _draw(images, draws)
        self._drawn = []
        for own in scores:  # of each metric the scores on each draw, (R,)
            found = {name: times_RN @ values / images for name, values in own.per_image.items()}
            if "BLEU" in own.counts:
                found |= dict(zip(FAMILIES["BLEU"], bleu(times_RN @ own.counts["BLEU"]).T, strict=True))
            if "METEOR" in own.counts:
                found["METEOR"] = meteor(times_RN @ own.counts["METEOR"])
            if "accuracy" in own.counts:
                right_R, asked_R = (times_RN @ own.counts["accuracy"]).T
                found["accuracy"] = right_R / asked_R
            self._drawn.append({name: found[name] for name in own.corpus})

    def intervals(self, index: int) -> dict[str, tuple[float, float]]:
        """95% interval of every metric of one set."""
        return {name: _interval(values) for name, values in self._drawn[index].items()}

    def compare(self, index: int, baseline: int) -> dict[str, dict[str, Any]]:
        """`difference` of every metric of one set from that of another, 95% `interval` of the draws' differences, `p`.

        p is two-sided: how often the draws contradict the sign of the difference, doubled; never 0.
        """
        corpus, base = self.scores[index].corpus, self.scores[baseline].corpus
        found = {}
        for name, values in self._drawn[index].items():
            drawn_R = values - self._drawn[baseline][name]
            against = min((drawn_R <= 0).sum(), (drawn_R >= 0).sum())
            p = min(1.0, 2 * (float(against) + 1) / (len(drawn_R) + 1))
            found[name] = {"difference": corpus[name] - base[name], "interval": _interval(drawn_R), "p": p}
        return found


def _draw(images: int, draws: int) -> np.ndarray:
    """How often each draw holds each image, (R, N) float64."""
    random = np.random.Generator(np.random.PCG64(SEED))
    return random.multinomial(images, np.full(images, 1 / images), size=draws).astype(np.float64)


def bleu(counts_RK: np.ndarray) -> np.ndarray:
    """BLEU-1 to 4, (R, 4), of summed counts (R, 10), as pycocoevalcap computes them."""
    correct_R4, guess_R4, said_R1, wanted_R1 = np.split(counts_RK, [4, 8, 9], axis=1)
    precision_R4 = np.cumprod((correct_R4 + TINY) / (guess_R4 + SMALL), axis=1) ** (1 / np.arange(1, 5))
    ratio_R1 = (said_R1 + TINY) / (wanted_R1 + SMALL)
    return precision_R4 * np.exp(np.minimum(0, 1 - 1 / ratio_R1))


def meteor(counts_RK: np.ndarray) -> np.ndarray:
    """METEOR, (R,), of summed counts (R, 23), as METEOR 1.5 computes it."""
    said, wanted, said_function, wanted_function = counts_RK[:, :4].T
    matches_R44 = counts_RK[:, 4:20].reshape(-1, 4, 4)  # by stage: content said, wanted; function words said, wanted
    chunks, said_matched, wanted_matched = counts_RK[:, 20:].T
    content, function = matches_R44[:, :, :2], matches_R44[:, :, 2:]
    weighted_R2 = ((DELTA * content + (1 - DELTA) * function) * MATCH_WEIGHTS[:, None]).sum(axis=1)
    precision = _ratio(weighted_R2[:, 0], DELTA * (said - said_function) + (1 - DELTA) * said_function)
    recall = _ratio(weighted_R2[:, 1], DELTA * (wanted - wanted_function) + (1 - DELTA) * wanted_function)
    mean = _ratio(precision * recall, ALPHA * precision + (1 - ALPHA) * recall)
    fragmentation = _ratio(2 * chunks, said_matched + wanted_matched)
    return mean * (1 - GAMMA * fragmentation**BETA)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _interval(values_R: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values_R, (2.5, 97.5))
    return float(low), float(high)


def ratio_interval(above_N: Sequence[float], below_N: Sequence[float]) -> tuple[float, float] | None:
    """95% interval of sum(above) / sum(below) over images; a mean where `below_N` is all ones.

    None for fewer than two images, or where a draw has nothing below: so few images say nothing.
    """
    if len(above_N) < 2:
        return None
    above_R, below_R = (_draw(len(above_N), DRAWS) @ np.array([above_N, below_N], dtype=np.float64).T).T
    return _interval(above_R / below_R) if below_R.all() else None
