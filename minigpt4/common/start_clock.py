"""Where the seconds go between the start of a process and its first training step; the log says so in one line.

The command calls `begin`, whatever takes long is a `phase`, and `finish` comes after the first step. Without a running
clock phases cost and say nothing: a model is also built in chats and tests.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

IMPORTS = "imports"
CONFIGURATION = "configuration"
PROCESSES = "processes"
DATA = "data"
LLM = "LLM"
VISION = "vision side"
CHECKPOINT = "checkpoint"
FIRST_BATCH = "first batch"
FIRST_STEP = "first step"
PHASES = (IMPORTS, CONFIGURATION, PROCESSES, DATA, LLM, VISION, CHECKPOINT, FIRST_BATCH, FIRST_STEP)
"""In the order of the log line. Processes: waiting until those of the run have found each other."""


class StartClock:
    """Adds up the seconds of phases; those of a phase within another count for the inner one only."""

    def __init__(self) -> None:
        age = time.time() - psutil.Process().create_time()
        self.began = time.perf_counter() - age
        self.seconds = {IMPORTS: age}
        self.notes: dict[str, str] = {}
        self.inner = [0.0]

    def __str__(self) -> str:
        total = time.perf_counter() - self.began
        shown = {name: f"{self.seconds[name]:.1f}" if name in self.seconds else "none" for name in PHASES} | self.notes
        shown["other"] = f"{max(0.0, total - sum(self.seconds.values())):.1f}"
        return f"Start-up took {total:.1f} s: {', '.join(f'{name} {text}' for name, text in shown.items())}"


_clock: StartClock | None = None


def begin() -> None:
    """Start the clock of this process; until now it was importing."""
    global _clock
    _clock = StartClock()


def finish() -> StartClock | None:
    """Stop the clock; None if none runs, and so from the second time on."""
    global _clock
    clock, _clock = _clock, None
    return clock


def not_needed(name: str, why: str) -> None:
    """A phase is left out, unless it comes later after all."""
    if _clock is not None:
        _clock.notes[name] = f"not needed: {why}"


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A part of a phase, which may have several; also a decorator."""
    clock = _clock
    if clock is None:
        yield
        return
    clock.notes.pop(name, None)
    clock.inner.append(0.0)
    start = time.perf_counter()
    try:
        yield
    finally:
        elapsed = time.perf_counter() - start
        clock.seconds[name] = clock.seconds.get(name, 0.0) + elapsed - clock.inner.pop()
        clock.inner[-1] += elapsed
