"""Questions about images, and answers to them: their files."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import MinLen

from minigpt4.common.binding import checked, fields_of
from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.utils import LINE_END, decode, parse_json

QUESTION_PLACE = "{}"
PROMPT = f"<Img><ImageHere></Img> {QUESTION_PLACE}"
"""LLaVA's templates read it as `<image>` and a line for the question."""
Text = Annotated[str, MinLen(1)]
IMAGE_MARKS = re.compile(r"</?Img>|<ImageHere>")


@dataclass(frozen=True)
class VisualQuestion:
    """A question as files have it."""

    question_id: int | str
    image: Text | None
    """Name of the file; None: text alone."""
    text: Text


Kind = TypeVar("Kind", bound=VisualQuestion)


# What files hold

ANSWER = fields_of(text=str)


# Files


def read_lines(path: Path, key: str | None = "question_id") -> Iterator[tuple[str, dict[str, Any], str]]:
    """(`key` as text, record, place) of each line of JSON lines, whatever the file is called: published ones end in
    .json; without `key` the number of the line. SampleError names the line of a bad one, or a second one of a key."""
    with errors_as(ConfigError, f"{path}: cannot be read"):
        lines = LINE_END.split(decode(path.read_bytes()))
    seen = set()
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise SampleError(f"{where}: not JSON ({error}); the file must hold an object a line") from error
        if not isinstance(record, dict) or not isinstance(record.get(key, None if key else number), int | str):
            raise SampleError(f"{where}: not an object with the field {key!r}, text or a number")
        name = str(record[key] if key else number)
        if name in seen:
            raise SampleError(f"{where}: the {key} {name} comes twice")
        seen.add(name)
        yield name, record, where


def read_questions(path: Path, kind: type[Kind]) -> list[Kind]:
    """The questions of JSON lines, whose fields are those of `kind`; SampleError that names the line of a bad one."""
    found = [checked(kind, record, where) for _, record, where in read_lines(path)]
    if not found:
        raise SampleError(f"{path}: holds no questions")
    return found


def read_json(path: Path) -> Any:
    """The value in a JSON file; ConfigError if it cannot be read or is cut off."""
    with errors_as(ConfigError, f"{path}: cannot be read"):
        return parse_json(path.read_bytes())


def read_answer_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Lines of answers {"question_id": 1, "text": "..."} by question_id as text; `answer`, as POPE's have it, comes
    back as `text`. SampleError names a bad line."""
    answers = {}
    for key, record, where in read_lines(path):
        own = record | {"text": record["answer"]} if "answer" in record else record
        answers[key] = checked(ANSWER, own, where)
    return answers
