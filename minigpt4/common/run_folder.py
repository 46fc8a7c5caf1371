"""The folder of one run: unique, never overwritten, one writer at a time, with `run.json` to say what ran."""

import errno
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

from minigpt4.common.errors import ConfigError, RunError
from minigpt4.common.utils import escaped, now, read_facts, write_whole

log = logging.getLogger(__name__)

FILE = "in_use.lock"
"""A lock that the kernel gives back when its process ends, however it ends: one writer for a folder."""
PATIENCE = 5.0
"""Seconds: a process that was killed keeps its locks until its memory has been given back."""
RUN_JSON = "run.json"
FACT_TYPES = {"number": int, "started": str, "id": str, "resumed": list}
"""Of what is read from `run.json`."""
PACKAGES = ("torch", "torchvision", "transformers", "timm", "webdataset", "omegaconf", "safetensors", "pillow")

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_held: dict[Path, int] = {}
"""Open descriptors by folder. A lock lives as long as any process has its descriptor."""


def hold_folder(folder: Path, way_out: str, patience: float = PATIENCE) -> None:
    """Keep other processes out of `folder` until this one ends; to ask again is fine. RunError, with `way_out`, if
    another is in there or it cannot be written; without locks on the disk a warning."""
    folder = folder.resolve()
    if folder in _held:
        return
    path, end = folder / FILE, time.monotonic() + patience
    try:
        path.touch()
        while (descriptor := locked(path)) is None:
            if time.monotonic() >= end:
                holder = path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
                raise RunError(f"{folder}: is in use by {holder}. {way_out}")
            time.sleep(0.1)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise RunError(f"{path}: cannot be written: {error.strerror}. {way_out}") from error
        log.warning("%s: its file system has no locks (%s); nothing keeps a second run out", folder, error.strerror)
        return
    _held[folder] = descriptor
    with suppress(OSError):  # the folder is locked all the same
        since = datetime.now(UTC).isoformat(timespec="seconds")
        path.write_text(f"process {os.getpid()} on {platform.node()}, since {since}\n")


def locked(path: Path) -> int | None:
    """The descriptor of a lock, None if another process has it; opened for writing only where NFS wants it. OSError if
    there is no such file, or with one of NO_LOCKS if its file system has no locks."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, "Windows")
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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


@dataclass(frozen=True)
class RunFolder:
    """`output_dir/<job_id>/`; the job id is the time of the start, to the second, `20250608_111442`."""

    path: Path

    @classmethod
    def create(cls, output_dir: Path) -> Self:
        """Make a new folder, on rank 0; a name that is taken gets a number. ConfigError if that is impossible."""
        path = first = output_dir / now()
        number = 1
        try:
            while path.exists():
                number += 1
                path = first.with_name(f"{first.name}_{number}")
            path.mkdir(parents=True)
        except OSError as error:
            if isinstance(error, FileExistsError) and path.exists():  # of two processes only one can make it
                return cls.create(output_dir)
            text = f"run.output_dir: cannot make {path}: {error.strerror}; choose another folder"
            raise ConfigError(text) from error
        return cls(path)

    @classmethod
    def existing(cls, path: Path) -> Self:
        """The folder of a run to go on with; ConfigError if it is not there."""
        if not path.is_dir():
            raise ConfigError(f"{path}: no such run folder; check run.resume_ckpt_path")
        return cls(path)

    @property
    def job_id(self) -> str:
        return self.path.name

    @property
    def run_json(self) -> Path:
        """Configuration, versions, seed, command."""
        return self.path / RUN_JSON

    def facts(self) -> dict[str, Any]:
        """What `run.json` says; empty if there is none that can be read. What cannot be is left out."""
        facts = read_facts(self.run_json)
        return {key: value for key, value in facts.items() if isinstance(value, FACT_TYPES.get(key, object))}

    def describe(self, config: Mapping[str, Any], *, seed: int, world_size: int) -> None:
        """Write `run.json` at the start of a run; ConfigError if the disk refuses."""
        others = (RunFolder(file.parent).facts() for file in self.path.parent.glob(f"*/{RUN_JSON}"))
        number = 1 + max((facts.get("number", 0) for facts in others), default=0)  # clocks are set back, this is not
        identity = {"id": uuid.uuid4().hex[:12], "job_id": self.job_id, "number": number}
        self._write({**identity, **_start(world_size), "seed": seed, "config": config, "resumed": []})

    def note_resume(self, checkpoint: Path, *, world_size: int) -> None:
        """Add to `run.json` that the run goes on from `checkpoint`; what stood there stays."""
        facts = self.facts()
        resumes = [*facts.get("resumed", []), {"checkpoint": str(checkpoint), **_start(world_size)}]
        self._write({**facts, "resumed": resumes})

    def _write(self, facts: Mapping[str, Any]) -> None:
        text = json.dumps(facts, indent=2, ensure_ascii=False, default=str) + "\n"
        write_whole(self.run_json, escaped(text), "run.output_dir")


def _start(world_size: int) -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "folder": str(Path.cwd()),
        "host": platform.node(),
        "world_size": world_size,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "git": git_state(),
        "versions": versions(),
    }


def versions(*more: str) -> dict[str, str | None]:
    """Of this package, Python, CUDA, the GPU, the packages whose numbers matter, and `more` packages."""
    import torch

    from minigpt4 import __version__
    from minigpt4.common.devices import find_device, is_gpu

    found = {"minigpt4": __version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    for package in (*PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    device = find_device(None)
    found["gpu"] = torch.get_device_module(device.type).get_device_name() if is_gpu(device) else None
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this file belongs to, and whether tracked files differ from it; None without one."""
    here = Path(__file__)

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", here.name)  # an installed copy may lie in another's checkout
        changed = bool(ask("status", "--porcelain", "--untracked-files=no"))
        return {"commit": ask("rev-parse", "HEAD"), "changed": changed}
    except (OSError, subprocess.SubprocessError):
        return None
