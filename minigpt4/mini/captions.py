"""What is said about scenes: alt-texts, detailed descriptions, and five captions in five styles."""

from minigpt4.mini.scenes import ALONE, COLUMN, ROW, Group, Scene
from minigpt4.mini.things import NUMBERS, with_article

_PLACES = {
    (ROW, 2): ("on the left", "on the right"),
    (ROW, 3): ("on the left", "in the middle", "on the right"),
}
_COLUMN_PLACES = {2: ("at the top", "at the bottom"), 3: ("at the top", "in the middle", "at the bottom")}
_RELATIONS = {ROW: "to the left of", COLUMN: "above"}


def places(scene: Scene) -> tuple[str, ...]:
    """Where each group stands, in words."""
    if scene.layout == ALONE:
        return ("in the middle",)
    if scene.layout == ROW:
        return _PLACES[ROW, len(scene.groups)]
    return _COLUMN_PLACES[len(scene.groups)]


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
    """As five people would write them, each in a style of their own: in full, in short, with sizes, as a title, and
    beginning with the background."""
    things = _join([_phrase(group) for group in scene.groups])
    return [
        alt_text(scene),
        f"{_capital(_chain(scene))}.",
        f"{_capital(_chain(scene, sized=True))}.",
        f"A picture of {things}.",
        f"{_capital(with_article(scene.background))} background with {things}.",
    ]


def _chain(scene: Scene, sized: bool = False) -> str:
    """`a cat to the left of two dogs to the left of a bus`."""
    return f" {_RELATIONS.get(scene.layout)} ".join(_phrase(group, sized) for group in scene.groups)


def _phrase(group: Group, sized: bool = False) -> str:
    """`a cat`, `a small cat`, `two cats`."""
    words = f"{group.size} {group.thing.counted(group.count)}" if sized else group.thing.counted(group.count)
    return with_article(words) if group.count == 1 else f"{NUMBERS[group.count]} {words}"


def _join(phrases: list[str]) -> str:
    """`a cat`, `a cat and a dog`, `a cat, a dog and a bus`."""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
