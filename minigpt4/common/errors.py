"""Errors for the person at the terminal: what is wrong, where (file, key, sample), and the way out.

Commands catch `MiniGPT4Error`, print its text without a traceback and exit with status 2. What comes from
outside (configurations, weights, LLM directories, images, annotations) is read inside `errors_as`.
"""

import difflib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

LONGEST = 100
FEW = 12  # known names; a longer list hides the nearest one that stands before it


class MiniGPT4Error(Exception):
    """Base of every error that a user can fix."""


class ConfigError(MiniGPT4Error, ValueError):
    """A YAML file or an option is wrong; the text names file, key and the nearest valid key."""


class RegistryError(MiniGPT4Error, KeyError):
    """A name is not registered, or is registered twice; the text lists the known names."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class WeightsError(MiniGPT4Error, RuntimeError):
    """A weights file is missing, broken, unsafe or made for another model; the text names the file."""


class SampleError(MiniGPT4Error, ValueError):
    """A sample given to the model cannot be used; the text names the sample and the field."""


class RunError(MiniGPT4Error, RuntimeError):
    """A run cannot go on; the text says why, and how to go on."""


@contextmanager
def errors_as(kind: type[MiniGPT4Error], text: str) -> Iterator[None]:
    """Inside, any exception that is not ours becomes `kind`: `text`, a colon, the first line of what went wrong.

    For code that reads what others made: a library may raise anything on it. The original is chained. Also a decorator.
    """
    try:
        yield
    except MiniGPT4Error:
        raise
    except Exception as error:
        raise kind(f"{text}: {first_line(error)}") from error


def first_line(error: BaseException, limit: int = 300) -> str:
    """First line of an exception's text, at most `limit` characters; its type where it has no text."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


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


def first_few(names: Iterable[str], shown: int = 3) -> str:
    """`a, b, c, ...`, for errors."""
    names = list(names)
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def require_same_ids(
    questions: Collection[int | str],
    answers: Collection[int | str],
    where: str = "",
    *,
    partial: bool = False,
    way_out: str = "",
    names: tuple[str, str] = ("questions have no answer: question_id", "answers have no question: question_id"),
) -> None:
    """SampleError, which names the first five, for answers without a question and, unless `partial`, questions without
    an answer; also where there is no answer at all. Ids are compared as they are: 1 is not "1"."""
    known, given, faults = set(questions), set(answers), []
    missing, unknown = ([key for key in questions if key not in given], [key for key in answers if key not in known])
    missing = [] if partial and len(missing) < len(known) else missing
    shown = str if all(isinstance(key, str) for key in known | given) else repr
    for wrong, what in zip((missing, unknown), names, strict=True):
        if wrong:
            faults.append(f"{len(wrong)} {what} {first_few(map(shown, wrong), 5)}")
    if faults:
        raise SampleError(f"{where}{'; '.join(faults)}{way_out}")
