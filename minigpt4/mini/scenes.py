"""Scenes as data: what stands where. Seeded: the same seed gives the same scenes on every machine.

Some combinations are reserved: about one pair of kinds in eight, and one background for each kind. Scenes for
training (of the vision weights as well) never hold a reserved combination; every scene for validation and test holds at
least one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from zlib import crc32

import numpy as np

from minigpt4.mini.things import BACKGROUNDS, THINGS, Thing

ALONE, ROW, COLUMN = "alone", "row", "column"
SMALL, LARGE = "small", "large"
SPLITS = ("train", "val", "test")
_RESERVED_SHARE = 8  # one pair in this many


@dataclass(frozen=True)
class Group:
    """`count` things of one kind and one size."""

    thing: Thing
    count: int
    size: str


@dataclass(frozen=True)
class Scene:
    """One to three groups on a plain background, from left to right (row) or from top to bottom (column).

    `seed` fixes what the words do not say: exact places, sizes and shades.
    """

    background: str
    layout: str
    groups: tuple[Group, ...]
    seed: int

    @property
    def count(self) -> int:
        return sum(group.count for group in self.groups)

    def record(self) -> dict:
        """The scene as plain types, for a JSON file."""
        groups = [{"thing": g.thing.name, "count": g.count, "size": g.size} for g in self.groups]
        return {"background": self.background, "layout": self.layout, "groups": groups}


def is_reserved_pair(one: Thing, other: Thing) -> bool:
    first, second = sorted((one.name, other.name))
    return crc32(f"{first}|{second}".encode()) % _RESERVED_SHARE == 0


def reserved_background(thing: Thing) -> str:
    return list(BACKGROUNDS)[crc32(thing.name.encode()) % len(BACKGROUNDS)]


def has_reserved_combination(scene: Scene) -> bool:
    things = [group.thing for group in scene.groups]
    return any(reserved_background(thing) == scene.background for thing in things) or any(
        is_reserved_pair(one, other) for one, other in combinations(things, 2)
    )


def is_new_combination(scene: Scene) -> bool:
    """What a test scene must have: a pair of kinds, or for one kind a background, that no training scene has."""
    things = [group.thing for group in scene.groups]
    if len(things) == 1:
        return reserved_background(things[0]) == scene.background
    return any(is_reserved_pair(one, other) for one, other in combinations(things, 2))


def sample_scenes(split: str, count: int, seed: int, first: int = 0) -> Iterator[Scene]:
    """`count` scenes of `train`, `val` or `test`, from number `first` on."""
    return (sample_scene(split, index, seed) for index in range(first, first + count))


def sample_scene(split: str, index: int, seed: int) -> Scene:
    """Scene number `index` of a split; it depends on (seed, split, index) alone.

    The number of groups is drawn first: then splits differ in combinations alone, not in how full scenes are.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    groups = int(rng.choice((1, 2, 3), p=(0.2, 0.4, 0.4)))
    while True:
        scene = _draw_scene(rng, groups)
        fits = not has_reserved_combination(scene) if split == "train" else is_new_combination(scene)
        if fits:
            return scene


def _draw_scene(rng: np.random.Generator, groups: int) -> Scene:
    most = {1: 3, 2: 2, 3: 1}[groups]
    kinds = rng.choice(len(THINGS), size=groups, replace=False)
    return Scene(
        background=list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))],
        layout=ALONE if groups == 1 else (ROW, COLUMN)[rng.integers(2)],
        groups=tuple(
            Group(THINGS[kind], int(rng.integers(1, most + 1)), (SMALL, LARGE)[rng.integers(2)]) for kind in kinds
        ),
        seed=int(rng.integers(2**31)),
    )
