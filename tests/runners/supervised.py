"""Commands that cannot outlive their test: after a timeout their processes print their Python stacks and are killed.

A torchrun puts its ranks into sessions of their own, and a rank that dies leaves its data workers to init: what
belongs to a command is told by a mark in its environment, which all of them inherit (Linux: it is read from /proc).
"""

import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

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

    Files take its output, not pipes: a process that is left over would keep a reader of a pipe waiting.

    Args:
        stdout: file for its standard output; None: together with standard error, as `Supervised.text` gives it.
    """
    mark = uuid.uuid4().hex
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout or errors,
            stderr=errors,
            env={**env, **STACKS, MARK: mark},
            cwd=cwd,
            start_new_session=True,
        )
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
            pass
        return pytest.fail(f"still running after {timeout:.0f} s: {self.abort()}", pytrace=False)

    def abort(self) -> str:
        """End a command that hangs; returns the end of what it wrote, and the stacks of all its processes."""
        written = _text(self.stdout)[-TAIL:] if self.stdout else ""
        stacks = abort(lambda: marked(self.mark), self.errors, self.text)
        return "\n".join([" ".join(self.process.args), written, stacks])


def abort(pids: Callable[[], list[int]], log: IO[bytes], text: Callable[[], str]) -> str:
    """End processes that hang, one after the other, each with its stacks; returns the end of their log with these.

    All are stopped first and the youngest ends first: none reacts to the end of another before its own turn.

    Args:
        pids: the processes, oldest first.
        log: where they write.
        text: what they wrote.
    """
    before = len(text())
    found = [(pid, describe(pid)) for pid in pids()]
    for pid, _ in found:
        _send(pid, signal.SIGSTOP)
    for pid, description in reversed(found):
        os.write(log.fileno(), f"\n== {description}\n".encode())
        _send(pid, signal.SIGABRT)
        _send(pid, signal.SIGCONT)
        _wait_for_end(pid)
    kill(pids)
    whole = text()
    loads = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    return f"{whole[max(0, before - TAIL) :]}\nload of this machine over 1, 5 and 15 minutes: {loads}"


def describe(pid: int) -> str:
    """`process 7, state S, 3.1 s of CPU: python ...`: little CPU tells one that waits from one that is slow."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return f"process {pid} has ended"
    fields = _stat(pid)
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0
    return f"process {pid}, state {fields[0] if fields else '-'}, {seconds:.1f} s of CPU: {command[:300]}"


def kill(pids: Callable[[], list[int]]) -> None:
    """Kill -9, again for those that were being started meanwhile; returns when all have ended."""
    end = time.monotonic() + ANSWER_TIME
    while (left := pids()) and time.monotonic() < end:
        for pid in left:
            _send(pid, signal.SIGKILL)
        for pid in left:
            _wait_for_end(pid)


def marked(mark: str) -> list[int]:
    """Processes of the command with this mark, oldest first."""
    entry = f"{MARK}={mark}".encode()
    return _processes(lambda pid: entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


def in_groups(groups: Sequence[int]) -> list[int]:
    """Processes of these process groups, oldest first."""
    return _processes(lambda pid: os.getpgid(pid) in groups)


def _processes(chosen: Callable[[int], bool]) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is someone else's
            pid = int(path.name)
            if chosen(pid) and _alive(pid):
                found.append((int(_stat(pid)[19]), pid))
    return [pid for _, pid in sorted(found)]


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third (its state) on; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _alive(pid: int) -> bool:
    return _stat(pid)[:1] not in ([], ["Z"], ["X"])


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _wait_for_end(pid: int) -> None:
    end = time.monotonic() + ANSWER_TIME
    while _alive(pid) and time.monotonic() < end:
        time.sleep(0.005)


def _text(file: IO[bytes]) -> str:
    """All of a file that processes still write to: the position, which they share, stays."""
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace")
