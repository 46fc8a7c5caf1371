"""Runs the project's own commands for the quickstart: output goes to a log file, progress to the screen."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

from minigpt4.common.errors import MiniGPT4Error

TRAIN_LINE = re.compile(r"epoch: \[(?P<epoch>\d+)\]\s+\[\s*(?P<it>\d+)/(?P<its>\d+)\].*? loss: (?P<loss>\S+)")
ANSWER_LINE = re.compile(r"\[INFO\] (?P<name>.+): \d+ answers in ")
_LAUNCHER_LINE = re.compile(r"[EW]\d{4} .*torch/distributed")
_KEPT_LINES, _SHOWN_LINES = 200, 15
_GRACE = 60.0  # seconds that a command gets to save and stop


def torchrun(processes: int, *command: str) -> list[str]:
    """The command line of a script under torchrun, with this Python."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, *command]


def run_command(command: Sequence[str], log: Path, on_line: Callable[[str], None] = lambda line: None) -> None:
    """Run to the end; each line goes to `log` and to `on_line`.

    Ctrl-C asks the command to save and stop, waits for that, and goes on as KeyboardInterrupt. Raises MiniGPT4Error
    with the last lines of the log if the command fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last: list[str] = []
    with log.open("a", encoding="utf-8") as file:
        # A session of its own: Ctrl-C reaches the command once, from here, not a second time from the terminal.
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        process = subprocess.Popen(command, **pipe, start_new_session=True)
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                last = [*last, line.rstrip()][-_KEPT_LINES:]
                on_line(line)
        except KeyboardInterrupt:
            _stop(process)
            raise
        status = process.wait()
    if status:
        raise MiniGPT4Error(
            f"{_script(command)} failed (exit {status}); all that it said is in {log}:\n{_reason(last)}"
        )


def _script(command: Sequence[str]) -> str:
    return next((part for part in command if part.endswith(".py")), command[0])


def _reason(lines: Sequence[str]) -> str:
    """The last lines of the script itself, without what the launcher says about its end."""
    own = list(takewhile(lambda line: not _LAUNCHER_LINE.match(line), lines)) or list(lines)
    return "\n".join(own[-_SHOWN_LINES:])


def _stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
