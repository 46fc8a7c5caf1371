"""Words of help for a misspelt name; used by every error that has a list of valid names."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return matches[0] if matches else None


def hint(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? Known: ...`, one clause to put behind "unknown ...;"."""
    names = sorted(known)
    close = nearest(name, names)
    question = f"did you mean {close!r}? " if close else ""
    return f"{question}Known: {', '.join(names) or 'none'}"
