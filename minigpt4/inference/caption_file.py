"""Captions of many images as JSON lines, written batch by batch, so that a stopped run goes on with what is there.

    captions.jsonl             {"image_id": "1000092795", "image": "1000092795.jpg", "caption": "Two men ..."}
                               {"image_id": "1000092796", "image": "1000092796.jpg", "error": "...: not an image"}
    captions.made_from.json    checkpoint, prompt, decoding, model: what the captions were made from

The lines of a batch are written together; a line that a kill cut off is dropped when the next run begins.
"""

import errno
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError
from minigpt4.common.json_lines import JsonLines
from minigpt4.common.output_files import as_json, refused, write_whole
from minigpt4.common.text import escaped

log = logging.getLogger(__name__)

OPTION = "--output"
SHOWN_CHANGES = 3
LONG = 60
"""Characters of a value in an error."""

Line = Mapping[str, Any]


class CaptionFile:
    """A file of captions.

    Args:
        path: ends in `.jsonl`.

    Raises:
        ConfigError: it does not.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() != ".jsonl":
            raise ConfigError(f"{OPTION}: {path} must end in .jsonl, for it holds a JSON object a line")
        self.path = path
        self.origin = path.with_suffix(".made_from.json")

    def start(self, made_from: Mapping[str, Any], about: Mapping[str, Any], *, retry_failed: bool) -> dict[str, Line]:
        """Begin the file, or mend it and go on with it; the lines that stay, by image.

        Args:
            made_from: everything that the captions must agree in, plain types.
            about: what is only written down.
            retry_failed: drop the lines of images that could not be read.

        Raises:
            ConfigError: the disk refuses, or the file was made from something else, or by something else.
        """
        text = self._text()
        if text:
            self._require_same(made_from)
            lines = self.lines()
            kept = {image: line for image, line in lines.items() if not (retry_failed and "error" in line)}
            mended = _as_text(kept.values())
            if mended != text:
                log.info(
                    "%s: goes on after %d lines; what was cut off or is tried again is dropped", self.path, len(kept)
                )
                write_whole(self.path, mended, OPTION)
            return kept
        self._write_origin({**made_from, "about": about})
        self.add([])
        return {}

    def lines(self) -> dict[str, Line]:
        """The whole lines by image, of several lines of an image the first."""
        found: dict[str, Line] = {}
        for line in JsonLines(self.path).read():
            if isinstance(line.get("image"), str) and ("caption" in line or "error" in line):
                found.setdefault(line["image"], line)
        return found

    def add(self, lines: Iterable[Line]) -> None:
        """Write the lines of a batch, in one write: those of several processes do not mix; ConfigError if the disk
        refuses."""
        text = _as_text(lines).encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                if file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise refused(self.path, error, OPTION) from error

    def _text(self) -> str:
        try:
            if self.path.exists() and not (self.path.is_file() or self.path.is_dir()):
                raise ConfigError(f"{OPTION}: {self.path} is a pipe or a device; captions go into a file")
            return self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise ConfigError(f"{OPTION}: cannot read {self.path}: {error.strerror}") from error

    def _write_origin(self, content: Mapping[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise refused(self.path, error, OPTION) from error
        write_whole(self.origin, as_json(content), OPTION)

    def _require_same(self, made_from: Mapping[str, Any]) -> None:
        try:
            before = dict(json.loads(self.origin.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{OPTION}: {self.path} is there, but {self.origin.name} beside it, which says what it was made from, "
                "cannot be read; choose another file"
            ) from error
        before.pop("about", None)
        changes = list(_changes(before, json.loads(json.dumps(made_from))))
        if changes:
            more = f"; and {len(changes) - SHOWN_CHANGES} more" if len(changes) > SHOWN_CHANGES else ""
            raise ConfigError(
                f"{OPTION}: {self.path} was made from something else:\n  "
                + "\n  ".join(changes[:SHOWN_CHANGES])
                + f"{more}\nChoose another file, or delete this one to begin again."
            )


def _as_text(lines: Iterable[Line]) -> str:
    return "".join(escaped(json.dumps(line, ensure_ascii=False)) + "\n" for line in lines)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], under: str = "") -> Iterator[str]:
    """`decoding.num_beams: 1 then, 5 now` of each value that differs."""
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{under}{name}.")
        elif old != new:
            yield f"{under}{name}: {_short(old)} then, {_short(new)} now"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONG else f"{text[:LONG]} ..."
