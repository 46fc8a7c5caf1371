"""Commands that cannot outlive their test: after a timeout their processes print their Python stacks and are killed.

A torchrun puts its ranks into sessions of their own, and a rank that dies leaves its data workers to init: what
belongs to a command is told by a mark in its environment, which all of them inherit.
"""

import os
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
import pytest

MARK = "MINIGPT4_TEST_COMMAND"
STACKS = {"PYTHONFAULTHANDLER": "1"}
"""With this in its environment a Python process answers SIGABRT with the stacks of its threads, on stderr."""
ANSWER_TIME = 3.0
"""Seconds for a process to print its stacks and to end."""
TAIL = 6000
"""Characters of what a command wrote that a failure shows; stacks are shown whole."""


def run(
    command: Sequence[str], *, env: dict[str, str], cwd: Path, timeout: float
) -> "subprocess.CompletedProcess[str]":
    """As `subprocess.run` with captured text; the test fails, with stacks, when it takes longer than `timeout` s."""
    with tempfile.TemporaryFile() as out, started(command, env=env, cwd=cwd, stdout=out) as process:
        status = process.wait(timeout)
        return subprocess.CompletedProcess(command, status, _text(out), process.text())


@contextmanager
def started(
    command: Sequence[str], *, env: dict[str, str], cwd: Path, stdout: IO[bytes] | None = None
) -> Iterator["Supervised"]:
    """A command in the background, killed with all that it started at the end of the block.

    Files take its output, not pipes: a process that is left over would keep a reader of a pipe waiting. Without
    `stdout` both streams go to `Supervised.text`.
    """
    mark = uuid.uuid4().hex
    with tempfile.TemporaryFile() as errors:
        streams = {"stdin": subprocess.DEVNULL, "stdout": stdout or errors, "stderr": errors}
        process = subprocess.Popen(command, **streams, env={**env, **STACKS, MARK: mark}, cwd=cwd)
        try:
            yield Supervised(process, mark, errors, stdout)
        finally:
            kill(lambda: marked(mark))
            process.wait()


@dataclass(frozen=True)
class Supervised:
    """A running command."""

    process: subprocess.Popen
    mark: str
    errors: IO[bytes]
    stdout: IO[bytes] | None

    def text(self) -> str:
        """What it wrote so far, to standard error or to both."""
        return _text(self.errors)

    def wait(self, timeout: float) -> int:
        """Its exit status; the test fails, with the stacks of all its processes, if it takes longer."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return pytest.fail(f"still running after {timeout:.0f} s: {self.abort()}", pytrace=False)

    def abort(self) -> str:
        """End a command that hangs; returns the end of what it wrote, and the stacks of all its processes."""
        written = _text(self.stdout)[-TAIL:] if self.stdout else ""
        return "\n".join([written, abort(lambda: marked(self.mark), self.errors, self.text)])


def abort(find: Callable[[], list[psutil.Process]], log: IO[bytes], text: Callable[[], str]) -> str:
    """End processes that hang, one after the other, each with its stacks; returns the end of their log with these.

    All are stopped first and the youngest ends first: none reacts to the end of another before its own turn.
    """
    before, found = len(text()), find()
    for process in found:
        with suppress(psutil.Error):
            process.suspend()
    for process in reversed(found):
        with suppress(psutil.Error):
            seconds, command = sum(process.cpu_times()[:2]), " ".join(process.cmdline())[:300]
            os.write(log.fileno(), f"\n== process {process.pid}, {seconds:.1f} s of CPU: {command}\n".encode())
            process.send_signal(signal.SIGABRT)
            process.resume()
        psutil.wait_procs([process], ANSWER_TIME)
    kill(find)
    loads = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    return f"{text()[max(0, before - TAIL) :]}\nload of this machine over 1, 5 and 15 minutes: {loads}"


def kill(find: Callable[[], list[psutil.Process]]) -> None:
    """Kill -9, again for those that were being started meanwhile; returns when all have ended."""
    while left := find():
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, ANSWER_TIME)


def marked(mark: str) -> list[psutil.Process]:
    """Processes of the command with this mark, oldest first."""
    return _processes(lambda process: process.environ().get(MARK) == mark)


def in_groups(groups: Sequence[int]) -> list[psutil.Process]:
    """Processes of these process groups, oldest first."""
    return _processes(lambda process: os.getpgid(process.pid) in groups)


def _processes(chosen: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # it has ended, or is someone else's
            if process.status() != psutil.STATUS_ZOMBIE and chosen(process):
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def _text(file: IO[bytes]) -> str:
    """All of a file that processes still write to: the position, which they share, stays."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")
