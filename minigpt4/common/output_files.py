"""Files that appear whole or not at all, and the text and JSON that commands write for people."""

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError
from minigpt4.common.text import escaped


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write; at the end of the block it takes its place, after an error it is deleted.

    Its name is new in each call, so any number of processes on any number of machines may write the same file. OSError
    if the disk refuses.
    """
    part = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def as_json(content: Any) -> str:
    """Plain types as readable JSON with a line end."""
    return escaped(json.dumps(content, indent=1, ensure_ascii=False)) + "\n"


def write_json(path: Path, content: Any, option: str = "--output") -> None:
    """Write `content` as JSON; ConfigError naming `option` if the disk refuses."""
    try:
        path.write_text(as_json(content), encoding="utf-8")
    except OSError as error:
        raise refused(path, error, option) from error


def write_whole(path: Path, text: str, option: str = "--save_path") -> None:
    """Write a whole file or none; ConfigError naming `option` if the disk refuses."""
    try:
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise refused(path, error, option) from error


def refused(path: Path, error: OSError, option: str) -> ConfigError:
    """The error that names file and option."""
    return ConfigError(f"{option}: cannot write {path}: {error.strerror}")


def human(size: int | None) -> str:
    """Bytes as a person reads them, in units of 1000: `433.5 MB`."""
    if size is None:
        return "?"
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
