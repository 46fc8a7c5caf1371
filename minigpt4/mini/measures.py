"""Whether captions of mini scenes are true: the scenes are drawn, so what they show is known exactly.

A text makes claims: it names things and backgrounds, and says who stands left of or above whom. Measures are shares,
0 to 1.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from minigpt4.mini.scenes import COLUMN, ROW
from minigpt4.mini.things import BACKGROUNDS, THINGS

_NAMES = {word: thing.name for thing in THINGS for word in (thing.name, thing.plural)}
_NAME = "|".join(sorted(map(re.escape, _NAMES), key=len, reverse=True))
_NAME_PATTERN = re.compile(rf"\b({_NAME})\b")
_COLOUR_PATTERN = re.compile(rf"\b({'|'.join(BACKGROUNDS)})\b")
_RELATIONS = {ROW: "to the left of", COLUMN: "above"}
_RANKS = {ROW: ("left", "middle", "right"), COLUMN: ("top", "middle", "bottom")}
Pair = tuple[str, str]


@dataclass(frozen=True)
class Measures:
    """Over all captions of one checkpoint; NaN where no scene has anything of the kind."""

    things_named: float
    """Of the things that are there, those that the text names."""

    things_wrong: float
    """Of the things that the text names, those that are not there."""

    background: float
    """Of the texts, those that name the background's colour and no other."""

    left_right: float
    """Of the scenes in a row, those whose text says who is left of whom, all of it true."""

    above_below: float
    """The same for scenes in a column."""


def named_things(text: str) -> set[str]:
    """Names (singular) of the kinds of things that a text names."""
    return {_NAMES[word] for word in _NAME_PATTERN.findall(text.lower())}


def stated_order(text: str, layout: str) -> set[Pair]:
    """Pairs (first, second) that a text claims: first is left of (`row`) or above (`column`) second.

    Read from `A to the left of B to the left of C`, and from things that are said to be left, middle or right.
    """
    pairs: set[Pair] = set()
    for sentence in re.split(r"[.;]", text.lower()):
        if _RELATIONS[layout] in sentence:
            pairs |= set(pairwise(_NAMES[word] for word in _NAME_PATTERN.findall(sentence)))
    ranks = _RANKS[layout]
    place = re.compile(rf"\b({_NAME}) (?:(?:on|in|at) the )?({'|'.join(ranks)})\b")
    placed = [(_NAMES[word], ranks.index(rank)) for word, rank in place.findall(text.lower())]
    pairs |= {(one, other) for one, first in placed for other, second in placed if first < second}
    return pairs


def measure(captions: Mapping[str, str], truth: Mapping[str, dict]) -> Measures:
    """Judge captions by image id against `scenes_test.json`; both must have the same ids."""
    if captions.keys() != truth.keys():
        raise ValueError(f"{len(captions)} captions for {len(truth)} scenes: the image ids must be the same")
    there, named, hits, colours = 0, 0, 0, []
    orders: dict[str, list[bool]] = {ROW: [], COLUMN: []}
    for image_id, scene in truth.items():
        text = captions[image_id]
        things = [group["thing"] for group in scene["groups"]]
        said = named_things(text)
        there, named, hits = there + len(things), named + len(said), hits + len(said & set(things))
        colours.append(set(_COLOUR_PATTERN.findall(text.lower())) == {scene["background"]})
        if scene["layout"] in orders:
            true = {(one, other) for index, one in enumerate(things) for other in things[index + 1 :]}
            stated = stated_order(text, scene["layout"])
            orders[scene["layout"]].append(bool(stated) and stated <= true)
    return Measures(
        things_named=_share(hits, there),
        things_wrong=_share(named - hits, named),
        background=_share(sum(colours), len(colours)),
        left_right=_share(sum(orders[ROW]), len(orders[ROW])),
        above_below=_share(sum(orders[COLUMN]), len(orders[COLUMN])),
    )


def shuffled(captions: Mapping[str, str]) -> dict[str, str]:
    """Every image gets the caption of another one, as if the images had been shuffled: captions depend on nothing else.

    Raises ValueError for a single image.
    """
    if len(captions) < 2:
        raise ValueError("one image cannot be shuffled")
    ids = sorted(captions)
    half = len(ids) // 2
    return {image_id: captions[ids[(index + half) % len(ids)]] for index, image_id in enumerate(ids)}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
