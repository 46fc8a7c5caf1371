"""CHAIR: objects that captions name though the images do not show them.

Source: Rohrbach et al., Object Hallucination in Image Captioning, 2018. Recall and F1 are not part of it; people report
them beside it, for a caption that says nothing hallucinates nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minigpt4.evaluation.hallucination.object_truth import Truth
from minigpt4.evaluation.proportions import wilson
from minigpt4.evaluation.resampling import ratio_interval


@dataclass(frozen=True)
class ImageObjects:
    """One caption beside its image."""

    mentions: list[str]
    """The object of every mention, in order."""

    shown: frozenset[str]
    """Objects of the image."""

    words: int

    @property
    def named(self) -> set[str]:
        return set(self.mentions)

    @property
    def wrong(self) -> list[str]:
        """Mentions of objects that are not there."""
        return [name for name in self.mentions if name not in self.shown]


def compare(captions: Mapping[str, str], truth: Truth) -> dict[str, ImageObjects]:
    """Every caption beside what its image shows; KeyError for an image that the truth does not know."""
    return {
        image_id: ImageObjects(truth.names.mentions(text), truth.objects[image_id], len(text.split()))
        for image_id, text in captions.items()
    }


def chair(images: Mapping[str, ImageObjects]) -> dict[str, Any]:
    """Scores, intervals and counts of all captions, shares from 0 to 1; None where there is nothing to divide by.

    `CHAIR-i`: of the mentions, those of objects that are not there. `CHAIR-s`: of the captions, those with such a
    mention. `CHAIR-i (once)` counts an object once a caption, however often it is mentioned. `recall`: of the
    objects that are there, those that are named. `F1`: harmonic mean of recall and 1 - `CHAIR-i (once)`.
    `words`: mean length of a caption. With `counts`, and 95% `intervals` over images.
    """
    rows = list(images.values())
    mentions, wrong = [len(row.mentions) for row in rows], [len(row.wrong) for row in rows]
    named, hits = [len(row.named) for row in rows], [len(row.named & row.shown) for row in rows]
    misses = [names - right for names, right in zip(named, hits, strict=True)]
    shown, bad = [len(row.shown) for row in rows], sum(map(bool, wrong))
    scores = {
        "CHAIR-i": _share(sum(wrong), sum(mentions)),
        "CHAIR-s": _share(bad, len(rows)),
        "CHAIR-i (once)": _share(sum(misses), sum(named)),
        "recall": _share(sum(hits), sum(shown)),
        "F1": _share(2 * sum(hits), sum(named) + sum(shown)),
        "words": _share(sum(row.words for row in rows), len(rows)),
    }
    intervals = {
        "CHAIR-i": ratio_interval(wrong, mentions),
        "CHAIR-s": wilson(bad, len(rows)) if rows else None,
        "CHAIR-i (once)": ratio_interval(misses, named),
        "recall": ratio_interval(hits, shown),
        "F1": ratio_interval([2 * n for n in hits], [n + m for n, m in zip(named, shown, strict=True)]),
        "words": ratio_interval([row.words for row in rows], [1] * len(rows)),
    }
    counts = {"captions": len(rows), "captions_wrong": bad, "mentions": sum(mentions), "mentions_wrong": sum(wrong)}
    counts |= {"objects_named": sum(named), "objects_right": sum(hits), "objects_shown": sum(shown)}
    return {"scores": scores, "intervals": {k: v for k, v in intervals.items() if v}, "counts": counts}


def listed(images: Mapping[str, ImageObjects], captions: Mapping[str, str]) -> list[dict[str, Any]]:
    """The captions with objects that are not there, for a person to look at."""
    return [
        {
            "image_id": image_id,
            "caption": captions[image_id],
            "wrong": sorted(set(row.wrong)),
            "shown": sorted(row.shown),
        }
        for image_id, row in images.items()
        if row.wrong
    ]


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
