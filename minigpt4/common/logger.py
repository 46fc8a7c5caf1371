"""What a person at the terminal sees: log lines, and LAVIS's meters with their published lines.

Losses stay on their device until a line is due, the only place where a run waits for its GPU because of the log. Torch
is not imported with this, so that a command's first line need not wait for it.
"""

import logging
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from torch import Tensor


class TqdmHandler(logging.Handler):
    """Writes to stderr, whatever that is at the time, without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def setup_logging(rank: int) -> None:
    """Log lines on stderr as published, `2025-06-08 11:14:42,218 [INFO] text`; of other ranks only warnings."""
    handler = TqdmHandler()
    level, prefix = (logging.WARNING, f"rank {rank}: ") if rank else (logging.INFO, "")
    handler.setFormatter(logging.Formatter(f"%(asctime)s [%(levelname)s] {prefix}%(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def setup_logger() -> None:
    """`setup_logging` for this process's rank."""
    from minigpt4.common.dist_utils import get_rank

    setup_logging(get_rank())


def to_stdout(line: str) -> None:
    """A line beside a progress bar, at once: who follows a file or a pipe wants to see it now."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


class SmoothedValue:
    """Numbers that may still be computed on a device: `value` is the newest, `median`, `avg` and `max` are of the last
    `window_size`, `global_avg` is of all finite ones. NaN without a number; `fmt` of these is for `str`."""

    def __init__(self, window_size: int = 20, fmt: str = "{median:.4f} ({global_avg:.4f})") -> None:
        self.fmt = fmt
        self.deque: deque[float] = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0
        self._unread: list[tuple[Tensor, int]] = []

    def update(self, value: "Tensor | float", n: int = 1) -> None:
        """Take a number that counts n times; a scalar tensor is copied on its device and read later."""
        if hasattr(value, "detach"):
            self._unread.append((value.detach().reshape(()).clone(), n))
        else:
            self.read()
            self._take(float(value), n)

    def read(self) -> None:
        """Fetch what is still on the device, in one transfer."""
        if not self._unread:
            return
        import torch

        values, counts = zip(*self._unread, strict=True)
        self._unread.clear()
        for value, n in zip(torch.stack(values).tolist(), counts, strict=True):
            self._take(value, n)

    def _take(self, value: float, n: int) -> None:
        self.deque.append(value)
        if math.isfinite(value):  # a step that was skipped as not finite must not take the epoch's mean with it
            self.total += value * n
            self.count += n

    def _window(self) -> Sequence[float]:
        self.read()
        return self.deque or [math.nan]

    @property
    def value(self) -> float:
        return self._window()[-1]

    @property
    def median(self) -> float:
        return statistics.median_low(self._window())

    @property
    def avg(self) -> float:
        return statistics.fmean(self._window())

    @property
    def max(self) -> float:
        return max(self._window())

    @property
    def global_avg(self) -> float:
        self.read()
        return self.total / self.count if self.count else math.nan

    def __str__(self) -> str:
        names = ("value", "median", "avg", "max", "global_avg")
        return self.fmt.format(**{name: getattr(self, name) for name in names})


@dataclass
class Lap:
    """Iterations between two lines, at both of which the host has waited for the device, so a lap's mean is right.

    That of the published code over the last 20 iterations is not, where the GPU works asynchronously.
    """

    iterations: int = 0
    samples: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0


class Stopwatch:
    """Time of a loop, lap by lap."""

    def __init__(self) -> None:
        self.lap, self.iterations = Lap(), 0
        self._began = self._mark = time.perf_counter()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.lap.data_seconds += time.perf_counter() - began

    def tick(self, samples: int = 0) -> None:
        now = time.perf_counter()
        self.iterations += 1
        self.lap.iterations += 1
        self.lap.samples += samples
        self.lap.seconds += now - self._mark
        self._mark = now

    def end_lap(self) -> Lap:
        lap, self.lap = self.lap, Lap()
        return lap

    def eta(self, iterations: int) -> str:
        """How long so many take, if they are like those before: `H:MM:SS`."""
        return str(timedelta(seconds=int((self._mark - self._began) / max(1, self.iterations) * iterations)))

    def total_line(self, header: str) -> str:
        """The published line on the time of the whole loop."""
        seconds = time.perf_counter() - self._began
        per_iteration = seconds / max(1, self.iterations)
        return f"{header} Total time: {timedelta(seconds=int(seconds))} ({per_iteration:.4f} s / it)"


class MetricLogger:
    """Meters by name, which are also attributes: `update(loss=2.5)`, then `logger.loss.global_avg`."""

    def __init__(self, delimiter: str = "\t") -> None:
        self.meters: dict[str, SmoothedValue] = {}
        self.delimiter = delimiter

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Use this meter for the name; others are made where needed."""
        self.meters[name] = meter

    def update(self, **values: "Tensor | float") -> None:
        for name, value in values.items():
            self.meters.setdefault(name, SmoothedValue()).update(value)

    def __getattr__(self, name: str) -> SmoothedValue:
        if name != "meters" and name in self.meters:
            return self.meters[name]
        raise AttributeError(f"{type(self).__name__} has neither an attribute nor a meter {name!r}")

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def global_avg(self) -> str:
        """The means of all meters, as `str`."""
        return self.delimiter.join(f"{name}: {meter.global_avg:.4f}" for name, meter in self.meters.items())

    def synchronize_between_processes(self) -> None:
        """Let the means be those of all processes, which must all call it; windows stay as they are."""
        import torch

        from minigpt4.common import dist_utils

        for meter in self.meters.values():
            meter.read()
        sums = torch.tensor([[meter.total, meter.count] for meter in self.meters.values()], dtype=torch.float64)
        for meter, (total, count) in zip(self.meters.values(), dist_utils.all_reduced(sums).tolist(), strict=True):
            meter.total, meter.count = total, int(count)

    def log_every(self, iterable: Sequence[Any], print_freq: int, header: str = "") -> Iterator[Any]:
        """Its items; prints the published line each `print_freq` of them and at the last, and then the time of all."""
        from minigpt4.common.devices import max_memory

        watch, length, items = Stopwatch(), len(iterable), iter(iterable)
        for number in range(length):
            with watch.waiting_for_data():
                item = next(items)
            yield item
            watch.tick()
            if number % print_freq == 0 or number == length - 1:
                to_stdout(self.line(header, number, length, watch, watch.end_lap(), max_memory()))
        to_stdout(watch.total_line(header))

    def line(self, header: str, number: int, length: int, watch: Stopwatch, lap: Lap, memory: float | None) -> str:
        """The published line, `memory` in MiB; times are means over the lap."""
        parts = [header, f"[{number:{len(str(length))}d}/{length}]", f"eta: {watch.eta(length - number)}", str(self)]
        parts += [f"time: {lap.seconds / lap.iterations:.4f}", f"data: {lap.data_seconds / lap.iterations:.4f}"]
        if memory is not None:
            parts.append(f"max mem: {memory:.0f}")
        return self.delimiter.join(parts)
