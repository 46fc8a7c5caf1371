"""What the quickstart tells while it works: the step, how far it is, and how long all of it may still take."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

_PAUSE = 15.0  # seconds between two lines where the output is a file


@dataclass
class Progress:
    """Steps with the seconds that each took on two cores; the estimate follows the speed of this machine."""

    expected: Sequence[float]
    """Seconds of each step; 0 for a step that is done already."""

    out: TextIO = field(default_factory=lambda: sys.stdout)
    _step: int = -1
    _title: str = ""
    _fraction: float = 0.0
    _started: float = field(default_factory=time.monotonic)
    _shown: float = 0.0
    _width: int = 0

    def start(self, title: str) -> None:
        """Begin the next step."""
        self._step, self._title, self._fraction = self._step + 1, title, 0.0
        self._line(f"{self._head()} ...", lasting=not self.out.isatty())

    def skip(self, title: str) -> None:
        """The next step is done already."""
        self._step, self._title = self._step + 1, title
        self._line(f"{self._head()}: done before", lasting=True)

    def at(self, fraction: float, text: str) -> None:
        """The step is `fraction` (0 to 1) done; shown at once on a terminal, now and then in a file."""
        self._fraction = min(max(fraction, 0.0), 1.0)
        now = time.monotonic()
        if not self.out.isatty() and now - self._shown < _PAUSE:
            return
        self._shown = now
        self._line(f"{self._head()}: {text}; {self._left()}", lasting=not self.out.isatty())

    def finish(self, text: str = "done") -> None:
        """The step is done."""
        self._fraction = 1.0
        self._line(f"{self._head()}: {text}", lasting=True)

    def _head(self) -> str:
        return f"[{self._step + 1}/{len(self.expected)}] {self._title}"

    def _left(self) -> str:
        done = sum(self.expected[: self._step]) + self._fraction * self.expected[self._step]
        left = sum(self.expected) - done
        pace = (time.monotonic() - self._started) / done if done > 5 else 1.0
        minutes = left * pace / 60
        return f"about {max(1, round(minutes))} min left"

    def _line(self, text: str, lasting: bool) -> None:
        if self.out.isatty():
            self.out.write("\r" + text.ljust(self._width) + ("\n" if lasting else ""))
            self._width = 0 if lasting else len(text)
        else:
            self.out.write(text + "\n")
        self.out.flush()
