"""What is said about scenes: alt-texts, detailed descriptions, and five captions in five styles."""

import numpy as np

from minigpt4.mini.scenes import ALONE, ROW, Group, Scene
from minigpt4.mini.things import NUMBERS, with_article

_PLACES = {
    (ROW, 2): ("on the left", "on the right"),
    (ROW, 3): ("on the left", "in the middle", "on the right"),
}
_COLUMN_PLACES = {2: ("at the top", "at the bottom"), 3: ("at the top", "in the middle", "at the bottom")}
_RELATIONS = {ROW: "to the left of", "column": "above"}


def places(scene: Scene) -> tuple[str, ...]:
    """Where each group stands, in words."""
    if scene.layout == ALONE:
        return ("in the middle",)
    if scene.layout == ROW:
        return _PLACES[ROW, len(scene.groups)]
    return _COLUMN_PLACES[len(scene.groups)]


def alt_text(scene: Scene, rng: np.random.Generator) -> str:
    """A short text as on web pages, in one of four forms; stage 1 learns from these."""
    sized, plain = [_phrase(g, sized=True) for g in scene.groups], [_phrase(g) for g in scene.groups]
    placed = ", ".join(f"{words} {place}" for words, place in zip(sized, places(scene), strict=True))
    forms = (
        f"{placed}, {scene.background} background",
        f"{_chain(scene, plain)}, on {scene.background}",
        f"{_join(sized)} on {with_article(scene.background)} background",
        f"{scene.background} picture of {_join(plain)}",
    )
    return forms[rng.choice(4, p=(0.4, 0.3, 0.2, 0.1))]


def detailed_description(scene: Scene) -> str:
    """Several sentences; stage 2 learns from these."""
    shown = _join([_phrase(group) for group in scene.groups])
    sentences = [f"The picture shows {shown} on a plain {scene.background} background."]
    for group, place in zip(scene.groups, places(scene), strict=True):
        verb = "is" if group.count == 1 else "are"
        sentences.append(f"The {group.thing.counted(group.count)} {place} {verb} {group.size}.")
    there = "is only one thing" if scene.count == 1 else f"are {NUMBERS[scene.count]} things"
    return " ".join([*sentences, f"There {there} in the picture."])


def five_captions(scene: Scene) -> list[str]:
    """As five people would write them, each in a style of their own: what, how it is arranged, how large, where in
    short, and how many. The second one holds the order of the things."""
    plain = [_phrase(group) for group in scene.groups]
    sizes = [f"{NUMBERS[g.count]} {g.size} {g.thing.counted(g.count)}" for g in scene.groups]
    short = [f"{g.thing.counted(g.count)} {p.split()[-1]}" for g, p in zip(scene.groups, places(scene), strict=True)]
    things = "thing" if scene.count == 1 else "things"
    return [
        f"{_capital(_join(plain))} on {with_article(scene.background)} background.",
        f"{_capital(_chain(scene, plain))}.",
        f"{_capital(', '.join(sizes))}.",
        f"{_capital(scene.background)} background, {', '.join(short)}.",
        f"{_capital(NUMBERS[scene.count])} {things} on {scene.background}.",
    ]


def _phrase(group: Group, sized: bool = False) -> str:
    """`a cat`, `a small cat`, `two cats`."""
    words = f"{group.size} {group.thing.counted(group.count)}" if sized else group.thing.counted(group.count)
    return with_article(words) if group.count == 1 else f"{NUMBERS[group.count]} {words}"


def _chain(scene: Scene, phrases: list[str]) -> str:
    """`a cat to the left of a dog to the left of a bus`."""
    if scene.layout == ALONE:
        return f"{phrases[0]} in the middle"
    return f" {_RELATIONS[scene.layout]} ".join(phrases)


def _join(phrases: list[str]) -> str:
    """`a cat`, `a cat and a dog`, `a cat, a dog and a bus`."""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
