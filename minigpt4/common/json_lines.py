"""Files with one JSON object a line that survive what happens to runs."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minigpt4.common.output_files import replacing
from minigpt4.common.text import escaped, parse_json

log = logging.getLogger(__name__)


class JsonLines:
    """Appends objects to a file. A full disk costs lines, with one warning, and never the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; numbers that JSON does not know (NaN, infinity) become null."""
        values = {key: _finite(value) for key, value in record.items()}
        line = escaped(json.dumps(values, ensure_ascii=False, allow_nan=False))
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            self._warn("written", error)

    def _warn(self, what: str, error: OSError) -> None:
        if not self._warned:
            log.warning(
                "%s: cannot be %s (%s); its lines are lost until that is fixed", self.path, what, error.strerror
            )
        self._warned = True

    def read(self) -> list[Mapping[str, Any]]:
        """The whole lines; none, with a warning, if there is no file that can be read."""
        return [record for _, record in self._lines() or []]

    def keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drop the lines that `wanted` refuses, and one that a kill cut off; a missing file is fine.

        A run that goes on from a checkpoint writes again what came after it.
        """
        lines = self._lines()
        if lines is None:
            return
        try:
            with replacing(self.path) as part:
                part.write_bytes(b"".join(line + b"\n" for line, record in lines if wanted(record)))
        except OSError as error:
            self._warn("written", error)

    def _lines(self) -> list[tuple[bytes, Mapping[str, Any]]] | None:
        """Lines and what they hold; None if the file cannot be read."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn("read", error)
            return None
        return [(line, record) for line in content.split(b"\n") if (record := _parse(line)) is not None]


def is_before(line: Mapping[str, Any], key: str, end: int) -> bool:
    """Whether a line belongs to what came before `end`; one without the key always does."""
    at = line.get(key, -1)
    return isinstance(at, int | float) and at < end


def _parse(line: bytes) -> Mapping[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
