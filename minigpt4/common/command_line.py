"""What commands share: errors for people, and JSON files that are asked for by an option."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError, MiniGPT4Error


def exit_status(run: Callable[[], None]) -> int:
    """0 when `run` is done; 2 after an error that the user can mend, whose text goes to stderr."""
    try:
        run()
    except MiniGPT4Error as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def write_json(path: Path, content: Mapping[str, Any], option: str = "--output") -> None:
    """Write `content` as JSON; ConfigError naming `option` if the disk refuses."""
    try:
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option}: cannot write {path}: {error.strerror}") from error
