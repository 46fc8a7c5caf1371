"""What a person at the terminal sees of a run: log lines, and lines or a progress bar for each epoch."""

import logging
import sys
from typing import Protocol

from tqdm import tqdm

from minigpt4.common.metric_logger import Progress

FORMAT = "%(asctime)s [%(levelname)s] %(message)s"


class TqdmHandler(logging.Handler):
    """Writes to stderr, whatever that is at the time, without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def setup_logging(rank: int) -> None:
    """Log lines as published, `2025-06-08 11:14:42,218 [INFO] text`, on stderr.

    Args:
        rank: of this process. Rank 0 logs from INFO on, the others only warnings and errors, with their rank.
    """
    handler = TqdmHandler()
    handler.setFormatter(logging.Formatter(FORMAT if rank == 0 else FORMAT.replace("%(message)s", _named(rank))))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True)


def _named(rank: int) -> str:
    return f"rank {rank}: %(message)s"


class EpochView(Protocol):
    """Shows one epoch."""

    def step(self) -> None:
        """An iteration is done."""

    def show(self, progress: Progress) -> None:
        """A log iteration is done."""

    def end(self, line: str) -> None:
        """The epoch is complete; `line` is the published one on its time."""

    def close(self) -> None:
        """The epoch is over, or the run stops."""


class NullView:
    """Of ranks other than 0."""

    def step(self) -> None:
        """Nothing."""

    def show(self, progress: Progress) -> None:
        """Nothing."""

    def end(self, line: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class LineView(NullView):
    """The published lines on stdout, for files and pipes."""

    def show(self, progress: Progress) -> None:
        self.end(progress.line())

    def end(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()  # who follows a file or a pipe wants to see the line now


class BarView(NullView):
    """A progress bar on stderr."""

    def __init__(self, epoch: int, iterations: int, first: int) -> None:
        self._bar = tqdm(total=iterations, initial=first, desc=f"epoch {epoch}", unit="it", dynamic_ncols=True)

    def step(self) -> None:
        self._bar.update()

    def show(self, progress: Progress) -> None:
        self._bar.set_postfix_str(
            f"lr {progress.lr:.2e}, loss {progress.loss:.4f}, {progress.samples_per_second:.1f} samples/s, "
            f"data {progress.data_share:.0%}"
        )

    def close(self) -> None:
        self._bar.close()


class Views:
    """Several views as one."""

    def __init__(self, *views: EpochView) -> None:
        self._views = views

    def step(self) -> None:
        for view in self._views:
            view.step()

    def show(self, progress: Progress) -> None:
        for view in self._views:
            view.show(progress)

    def end(self, line: str) -> None:
        for view in self._views:
            view.end(line)

    def close(self) -> None:
        for view in self._views:
            view.close()


def epoch_view(epoch: int, iterations: int, first: int) -> EpochView:
    """A bar where stderr is a terminal, lines where it is not; both where the lines go into a file beside the bar."""
    if not sys.stderr.isatty():
        return LineView()
    bar = BarView(epoch, iterations, first)
    return bar if sys.stdout.isatty() else Views(bar, LineView())
