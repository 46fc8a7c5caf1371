"""Files with one JSON object a line that survive what happens to runs."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minigpt4.common.output_files import replacing

log = logging.getLogger(__name__)


class JsonLines:
    """Appends objects to a file. A full disk costs lines, with one warning, and never the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; numbers that JSON does not know (NaN, infinity) become null."""
        line = json.dumps({key: _finite(value) for key, value in record.items()}, ensure_ascii=False, allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            log.warning(
                "%s: cannot be written (%s); its lines are lost until that is mended", self.path, error.strerror
            )
        self._warned = True

    def read(self) -> list[Mapping[str, Any]]:
        """The whole lines; none if there is no file."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        return [record for line in text.split("\n") if (record := _parse(line)) is not None]

    def keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drop the lines that `wanted` refuses, and one that a kill cut off; a missing file is fine.

        A run that goes on from a checkpoint writes again what came after it.
        """
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        lines = [line for line in text.split("\n") if (record := _parse(line)) is not None and wanted(record)]
        try:
            with replacing(self.path) as part:
                part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        except OSError as error:
            self._warn(error)


def _parse(line: str) -> Mapping[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
