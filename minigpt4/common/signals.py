"""Signals ask a run to save and stop: the handler sets a flag, the loop looks at it between two updates."""

import logging
import signal
from types import FrameType

log = logging.getLogger(__name__)

SAVE_AND_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether someone asked this process to stop; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous = {number: signal.getsignal(number) for number in SAVE_AND_STOP}

    def __enter__(self) -> "StopRequest":
        for number in SAVE_AND_STOP:
            signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.name is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
