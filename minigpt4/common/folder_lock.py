"""One writer for a folder: a lock that the kernel gives back when its process ends, however it ends."""

import errno
import fcntl
import json
import logging
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

from minigpt4.common.errors import RunError

log = logging.getLogger(__name__)

FILE = "in_use.lock"
PATIENCE = 5.0
"""Seconds: a process that was killed keeps its locks until its memory has been given back."""

_held: dict[Path, int] = {}
"""Open descriptors by folder. A lock lives as long as any process has its descriptor."""


def hold_folder(folder: Path, way_out: str, patience: float = PATIENCE) -> None:
    """Keep other processes out of `folder` until this one ends; to ask again is fine.

    RunError, which says who is in there and then `way_out`, if another one is; also if the folder cannot be written to.
    A file system without locks costs a warning.
    """
    folder = folder.resolve()
    if folder in _held:
        return
    path, end = folder / FILE, time.monotonic() + patience
    try:
        path.touch()
        while (descriptor := _locked(path)) is None:
            if time.monotonic() >= end:
                raise RunError(f"{folder}: is in use by {_holder(path)}. {way_out}")
            time.sleep(0.1)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise RunError(f"{path}: cannot be written: {error.strerror}. {way_out}") from error
        log.warning("%s: its file system has no locks (%s); nothing keeps a second run out", folder, error.strerror)
        return
    _held[folder] = descriptor
    _sign(path)


def _locked(path: Path) -> int | None:
    """The descriptor of a lock, None if another process has it.

    Opened for reading, so that the disk can still be made read-only; NFS wants it opened for writing.
    """
    for mode in (os.O_RDONLY, os.O_RDWR):
        descriptor = os.open(path, mode)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            if error.errno != errno.EBADF or mode == os.O_RDWR:
                raise
    return None


def _leave_to_parent() -> None:
    """In a forked worker: the lock is to end with the parent."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def _holder(path: Path) -> str:
    try:
        by = json.loads(path.read_text(encoding="utf-8"))
        return f"process {by['pid']} on {by['host']}, since {by['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _sign(path: Path) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        path.write_text(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since}) + "\n")
    except OSError as error:
        log.warning("%s: cannot be written (%s); the folder is locked all the same", path, error.strerror)
