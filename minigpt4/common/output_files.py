"""Text and JSON files that commands write for people; a disk that refuses is an error to mend."""

import json
from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError
from minigpt4.common.text import escaped


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
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise refused(path, error, option) from error


def refused(path: Path, error: OSError, option: str) -> ConfigError:
    """The error that names file and option."""
    return ConfigError(f"{option}: cannot write {path}: {error.strerror}")
