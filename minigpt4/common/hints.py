"""Words of help for a misspelt name; used by the errors that have a list of valid names."""

import difflib
from collections.abc import Iterable

LONGEST = 100
FEW = 12  # a longer list hides the nearest name that stands before it


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when none is close."""
    matches = difflib.get_close_matches(str(name)[:LONGEST], list(known), n=1)
    return matches[0] if matches else None


def hint(name: object, known: Iterable[str]) -> str:
    """`did you mean 'x'? Known: a, b, x`, a clause to put behind "unknown ...;"."""
    names = sorted(known)
    close = nearest(name, names)
    if close and len(names) > FEW:
        return f"did you mean {close!r}?"
    question = f"did you mean {close!r}? " if close else ""
    return f"{question}Known: {', '.join(names) or 'none'}"
