"""Where the seconds go between the start of a process and its first training step.

    begin()                                 the command, first of all
    with phase("LLM"):                      wherever that is done
        ...
    not_needed("vision side", "cache")
    breakdown = finish()                    after the first step

Without a running clock the phases cost nothing and say nothing: a model is also built in chats and tests.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Breakdown:
    """The start of a process."""

    total: float
    """Seconds since the process began."""

    seconds: dict[str, float]
    """By phase; a phase that did not occur is missing."""

    notes: dict[str, str]
    """Why a phase was not needed, by phase."""

    def line(self) -> str:
        """For the log: all phases, and what belongs to none."""
        other = max(0.0, self.total - sum(self.seconds.values()))
        shown = [f"{name} {self._shown(name)}" for name in PHASES]
        return f"Start-up took {self.total:.1f} s: {', '.join(shown)}, other {other:.1f}"

    def _shown(self, name: str) -> str:
        if name in self.notes:
            return f"not needed: {self.notes[name]}"
        return f"{self.seconds[name]:.1f}" if name in self.seconds else "none"

    def facts(self) -> dict[str, float]:
        """For files: seconds by phase, and in all."""
        return {"total": round(self.total, 3), **{name: round(value, 3) for name, value in self.seconds.items()}}


class StartClock:
    """Adds up the seconds of phases. What a phase within another takes counts for the inner one only."""

    def __init__(self) -> None:
        age = process_age()
        self._began = time.perf_counter() - age
        self._seconds = {IMPORTS: age}
        self._notes: dict[str, str] = {}
        self._inner = [0.0]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of a phase, which may have several."""
        self._notes.pop(name, None)
        self._inner.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            own = elapsed - self._inner.pop()
            self._inner[-1] += elapsed
            self._seconds[name] = self._seconds.get(name, 0.0) + own

    def not_needed(self, name: str, why: str) -> None:
        """A phase is left out, unless it comes later after all."""
        self._notes[name] = why

    def breakdown(self) -> Breakdown:
        """Up to now."""
        return Breakdown(time.perf_counter() - self._began, dict(self._seconds), dict(self._notes))


_running: ContextVar[StartClock | None] = ContextVar("start_clock", default=None)


def begin() -> None:
    """Start the clock of this process; until now it was importing."""
    _running.set(StartClock())


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A phase of the clock that runs, if one does; also a decorator."""
    clock = _running.get()
    if clock is None:
        yield
        return
    with clock.phase(name):
        yield


def not_needed(name: str, why: str) -> None:
    """Tell the clock that runs, if one does, why a phase is left out."""
    clock = _running.get()
    if clock is not None:
        clock.not_needed(name, why)


def finish() -> Breakdown | None:
    """Stop the clock; None if none runs, and so from the second time on."""
    clock = _running.get()
    _running.set(None)
    return clock.breakdown() if clock is not None else None


def process_age() -> float:
    """Seconds since this process began; 0 where the system does not tell (it is not Linux)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of the whole line, in ticks since boot
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, ValueError, AttributeError):
        return 0.0
