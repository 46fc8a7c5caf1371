"""What scenes are made of: 80 kinds of things, named by the Unicode standard, and eight backgrounds."""

import unicodedata
from dataclasses import dataclass

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
