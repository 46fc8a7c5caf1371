"""Text that others wrote: from bytes to characters, from JSON to values, and what nothing may be trained on.

Text is UTF-8, with a byte order mark or without one, or UTF-16 or UTF-32 with theirs. Nothing is guessed and nothing is
replaced: bytes that are no text are an error.
"""

import codecs
import json
import re
from typing import Any

from minigpt4.common.errors import SampleError

LINE_END = re.compile(r"\r\n?|\n")

_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_HALF = re.compile("[\ud800-\udfff]")
_LOST = re.compile("[\0-\x08\x0e-\x1f\x7f\ufffd\ud800-\udfff]")
_MEANING = {"\0": "NUL, as of UTF-16 without its mark", "\ufffd": "U+FFFD, which stands for a character that was lost"}


def decode(content: bytes, encoding: str | None = None) -> str:
    """The text without its byte order mark; ValueError that says where there is none.

    `encoding`: where it is known, as JSON's is by `json.detect_encoding`.
    """
    if encoding is None:
        encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8-sig")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        place = f"byte {content[error.start]:#04x} in line {line}" if encoding.startswith("utf-8") else error.reason
        raise ValueError(f"not {encoding.removesuffix('-sig').upper()} text ({place}); save it as UTF-8") from error


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text; ValueError for whatever is wrong with it, a field that stands twice, too."""
    text = content if isinstance(content, str) else decode(content, json.detect_encoding(content))
    try:
        return json.loads(text, object_pairs_hook=unique_fields)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a JSON object; ValueError if one stands twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return fields


def require_readable(text: str, name: str) -> str:
    """The text; SampleError that begins with `name` if something of it was lost before it came here.

    A lone surrogate is half a character and no tokenizer takes it; U+FFFD and control characters, but for blanks such
    as tabs and form feeds, are what a wrong decoding leaves.
    """
    return _without(_LOST, text, name)


def require_whole_characters(text: str, name: str) -> str:
    """The same for text that is only compared, where a model or a published file may hold NUL or U+FFFD."""
    return _without(_HALF, text, name)


def _without(unreadable: re.Pattern[str], text: str, name: str) -> str:
    found = unreadable.search(text)
    if found is None:
        return text
    kind = "half a character" if _HALF.match(found[0]) else "a control character, as of another encoding"
    meaning = _MEANING.get(found[0], f"{found[0]!r}, {kind}")
    raise SampleError(
        f"{name} cannot be read: character {found.start() + 1} is {meaning}; write it anew or leave it out"
    )


def escaped(text: str) -> str:
    r"""Text that every file takes: lone surrogates, as of file names that are not UTF-8, as `\udce9`, JSON's escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
