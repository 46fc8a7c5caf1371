"""One writer for a folder: a lock that the kernel gives back when its process ends, however it ends.

It is a POSIX record lock: those of a process are not passed on to the workers that it forks, so after a kill -9 of the
process none stays behind, and NFS knows them.
"""

import errno
import fcntl
import json
import logging
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from minigpt4.common.errors import RunError

log = logging.getLogger(__name__)

FILE = "in_use.lock"
PATIENCE = 5.0
"""Seconds: a process that was killed keeps its locks until its memory has been given back."""

_held: dict[tuple[int, Path], IO[str]] = {}
"""By process and folder, open until the process ends: closing any handle of a file would give its lock back."""


def hold_folder(folder: Path, way_out: str, patience: float = PATIENCE) -> None:
    """Keep other processes out of `folder` until this one ends; once is enough.

    RunError, which says who is in there and then `way_out`, if another one is; also if the folder cannot be written to.
    A file system without locks costs a warning.
    """
    folder = folder.resolve()
    if (os.getpid(), folder) in _held:
        return
    try:
        file = (folder / FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{folder / FILE}: cannot be written: {error.strerror}. {way_out}") from error
    if _locked(file, folder, way_out, patience):
        _held[os.getpid(), folder] = file
        _sign(file)


def _locked(file: IO[str], folder: Path, way_out: str, patience: float) -> bool:
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning(
                    "%s: its file system has no locks (%s), so nothing keeps a second run out of it",
                    folder,
                    error.strerror,
                )
                return False
            if time.monotonic() >= end:
                raise RunError(f"{folder}: is in use by {_holder(file)}. {way_out}") from error
        time.sleep(0.1)


def _holder(file: IO[str]) -> str:
    try:
        file.seek(0)
        by = json.loads(file.read())
        return f"process {by['pid']} on {by['host']}, since {by['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _sign(file: IO[str]) -> None:
    by = {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        file.truncate(0)
        file.write(json.dumps(by) + "\n")
        file.flush()
    except OSError as error:
        log.warning("%s: cannot be written (%s); the folder is locked all the same", file.name, error.strerror)
