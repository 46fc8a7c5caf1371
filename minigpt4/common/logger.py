"""What a person at the terminal sees of a run: log lines, means, the published lines of an epoch, a progress bar.

Losses stay on their device and are read together where a line is due: the only place where a run waits for its GPU
because of the log. Importing this loads no torch, so that a command's first line need not wait for it.
"""

import logging
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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
    named = FORMAT if rank == 0 else FORMAT.replace("%(message)s", f"rank {rank}: %(message)s")
    handler = TqdmHandler()
    handler.setFormatter(logging.Formatter(named))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True)


def setup_logger() -> None:
    """`setup_logging` for this process's rank."""
    from minigpt4.common.dist_utils import get_rank

    setup_logging(get_rank())


class SmoothedValue:
    """A series of numbers that may still be computed on a device: the last ones, and the mean of all finite ones.

    Args:
        window_size: how many of the last numbers `median`, `avg` and `max` are of.
        fmt: for `str`, of `value`, `median`, `avg`, `max` and `global_avg`.
    """

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
            return
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

    def _window(self, summary: Callable[[Sequence[float]], float]) -> float:
        self.read()
        return summary(self.deque) if self.deque else math.nan

    @property
    def value(self) -> float:
        """The newest, finite or not; NaN without any, as for all others."""
        return self._window(lambda numbers: numbers[-1])

    @property
    def median(self) -> float:
        """Of the window; the lower of two in the middle."""
        return self._window(statistics.median_low)

    @property
    def avg(self) -> float:
        """Mean of the window."""
        return self._window(statistics.fmean)

    @property
    def max(self) -> float:
        """Of the window."""
        return self._window(max)

    @property
    def global_avg(self) -> float:
        """Mean of all finite numbers so far."""
        self.read()
        return self.total / self.count if self.count else math.nan

    def __str__(self) -> str:
        names = ("value", "median", "avg", "max", "global_avg")
        return self.fmt.format(**{name: getattr(self, name) for name in names})


class MetricLogger:
    """Meters by name, which are also attributes: `update(loss=2.5)`, then `logger.loss.global_avg`.

    Args:
        delimiter: between the meters in `str`.
        device: where `synchronize_between_processes` adds up; None: a GPU where the processes talk by nccl.
    """

    def __init__(self, delimiter: str = "\t", device: "torch.device | None" = None) -> None:
        self.meters: dict[str, SmoothedValue] = {}
        self.delimiter = delimiter
        self.device = device

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Use this meter for the name; others are made as they are needed."""
        self.meters[name] = meter

    def update(self, **values: "Tensor | float") -> None:
        """A number for each of these meters."""
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

    def synchronize_between_processes(self, add_up: "Callable[[Tensor], Tensor] | None" = None) -> None:
        """Let the means be those of all processes, which must all call it; windows stay as they are.

        Args:
            add_up: adds a vector up over the processes, and returns it; None: over torch's default group, if there is
                one.
        """
        import torch

        from minigpt4.common.dist_utils import all_reduced

        for meter in self.meters.values():
            meter.read()
        sums = [float(number) for meter in self.meters.values() for number in (meter.total, meter.count)]
        kind = torch.float32 if self.device and self.device.type == "mps" else torch.float64  # MPS has no float64
        sums = (add_up or all_reduced)(torch.tensor(sums, dtype=kind, device=self.device)).tolist()
        for meter, total, count in zip(self.meters.values(), sums[::2], sums[1::2], strict=True):
            meter.total, meter.count = total, int(count)

    def log_every(self, iterable: Sequence[Any], print_freq: int, header: str = "") -> Iterator[Any]:
        """Its items; prints the published line each `print_freq` of them and at the last, and then the time of all."""
        watch, length, items = Stopwatch(), len(iterable), iter(iterable)
        for number in range(length):
            with watch.waiting_for_data():
                item = next(items)
            yield item
            watch.tick()
            if number % print_freq == 0 or number == length - 1:
                lap, eta = watch.end_lap(), watch.seconds_for(length - number)
                _to_stdout(progress_line(header, number, length, eta, self, lap, _max_memory(None)))
        _to_stdout(watch.total_line(header))


@dataclass
class Lap:
    """Iterations between two lines, their seconds, and how much of them went into waiting for data.

    The published code averages the last 20 iterations by the host's clock, which a GPU that works asynchronously makes
    wrong. Between two lines the host has waited for the device at both ends, so a lap's mean is right.
    """

    iterations: int = 0
    samples: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0

    @property
    def data_share(self) -> float:
        """Share of the time spent waiting for data, 0 to 1."""
        return self.data_seconds / self.seconds if self.seconds > 0 else 0.0

    @property
    def samples_per_second(self) -> float:
        """Samples of this process a second."""
        return self.samples / self.seconds if self.seconds > 0 else 0.0


class Stopwatch:
    """Time of a loop, lap by lap."""

    def __init__(self) -> None:
        self._lap, self._iterations, self._seconds = Lap(), 0, 0.0
        self._began = self._mark = time.perf_counter()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the call that fetches a batch: its time is time spent waiting for data."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._lap.data_seconds += time.perf_counter() - began

    def tick(self, samples: int = 0) -> None:
        """An iteration is done."""
        now = time.perf_counter()
        self._lap.iterations += 1
        self._lap.samples += samples
        self._lap.seconds += now - self._mark
        self._mark = now

    def end_lap(self) -> Lap:
        """The lap so far; the next one begins."""
        lap, self._lap = self._lap, Lap()
        self._iterations += lap.iterations
        self._seconds += lap.seconds
        return lap

    def seconds_for(self, iterations: int) -> float:
        """How long so many take, if they are like those of all laps that ended."""
        return self._seconds / max(1, self._iterations) * iterations

    def total_line(self, header: str) -> str:
        """The published line on the time of the whole loop."""
        seconds = time.perf_counter() - self._began
        done = max(1, self._iterations + self._lap.iterations)
        return f"{header} Total time: {_clock(seconds)} ({seconds / done:.4f} s / it)"


@dataclass(frozen=True)
class Progress:
    """What an iteration that logs has to say."""

    epoch: int
    iteration: int
    """0-based, within the epoch."""

    iterations: int
    """Of the whole epoch."""

    lr: float
    loss: float
    loss_mean: float
    """Over the finite losses since the last line."""

    lap: Lap
    """Since the last line."""

    samples_per_second: float
    """Over all processes."""

    max_memory: float | None
    """Highest memory allocated on the CUDA device so far, MiB; None without one."""

    line: str
    """The published line; what is new stands behind it."""


def progress_line(
    header: str, iteration: int, iterations: int, eta: float, meters: MetricLogger, lap: Lap, max_memory: float | None
) -> str:
    """The published line: `eta` in seconds, means over the lap."""
    done = max(1, lap.iterations)
    parts = [
        header,
        f"[{iteration:{len(str(iterations))}d}/{iterations}]",
        f"eta: {_clock(eta)}",
        str(meters),
        f"time: {lap.seconds / done:.4f}",
        f"data: {lap.data_seconds / done:.4f}",
        *([] if max_memory is None else [f"max mem: {max_memory:.0f}"]),
    ]
    return meters.delimiter.join(parts)


def _clock(seconds: float) -> str:
    """`H:MM:SS`."""
    return str(timedelta(seconds=int(seconds)))


def _to_stdout(line: str) -> None:
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()  # who follows a file or a pipe wants to see the line now


def _max_memory(device: "torch.device | None") -> float | None:
    import torch

    on_cuda = torch.cuda.is_initialized() if device is None else device.type == "cuda"
    return torch.cuda.max_memory_allocated(device) / 2**20 if on_cuda else None


class EpochMeters(MetricLogger):
    """Counts one epoch of one process: `waiting_for_data` around the loader, `step` after the training step.

    Args:
        epoch: number of the epoch, 0-based.
        iterations: length of the whole epoch.
        first: iteration that comes first, not 0 when a run goes on in mid-epoch.
        log_freq: a line is due each so many iterations, and at the last.
        world_size: processes, to turn this process's samples into everyone's.
        device: of the run.
    """

    def __init__(
        self, epoch: int, iterations: int, *, first: int, log_freq: int, world_size: int, device: "torch.device"
    ) -> None:
        super().__init__("  ", device)
        self.add_meter("lr", SmoothedValue(1, "{value:.6f}"))
        self.add_meter("loss", SmoothedValue(1, "{value:.4f}"))
        self.epoch = epoch
        self.iterations = iterations
        self.iteration = first - 1
        """The newest iteration done."""

        self._log_freq = log_freq
        self._world_size = world_size
        self._watch = Stopwatch()
        self._at_last_line = (0.0, 0)
        self.waiting_for_data = self._watch.waiting_for_data

    def step(self, loss: "Tensor | float", lr: float, num_samples: int) -> Progress | None:
        """An iteration is done.

        Args:
            loss: its loss, scalar, nats; a tensor is read only when a line is due.
            lr: learning rate it used.
            num_samples: what it trained on in this process.

        Returns:
            What to show, if a line is due.
        """
        self.iteration += 1
        self.update(lr=lr, loss=loss)
        due = self.iteration % self._log_freq == 0 or self.complete
        if due:
            self.loss.read()  # before the clock is read
        self._watch.tick(num_samples)
        return self._progress() if due else None

    @property
    def complete(self) -> bool:
        """Whether the last iteration is done."""
        return self.iteration >= self.iterations - 1

    @property
    def header(self) -> str:
        """How every line of the epoch begins."""
        return f"Train: data epoch: [{self.epoch}]"

    def _progress(self) -> Progress:
        lap, max_memory = self._watch.end_lap(), _max_memory(self.device)
        eta = self._watch.seconds_for(self.iterations - self.iteration)
        line = progress_line(self.header, self.iteration, self.iterations, eta, self, lap, max_memory)
        samples_per_second = lap.samples_per_second * self._world_size
        (total, count), now = self._at_last_line, (self.loss.total, self.loss.count)
        self._at_last_line = now
        return Progress(
            self.epoch,
            self.iteration,
            self.iterations,
            lr=self.lr.value,
            loss=self.loss.value,
            loss_mean=(now[0] - total) / (now[1] - count) if now[1] > count else math.nan,
            lap=lap,
            samples_per_second=samples_per_second,
            max_memory=max_memory,
            line=f"{line}  samples/s: {samples_per_second:.1f}  data wait: {lap.data_share:.0%}",
        )

    def total_line(self) -> str:
        """The published line on the time of the epoch."""
        return self._watch.total_line(self.header)

    def state_dict(self) -> dict[str, list[float]]:
        """Sums so far, plain numbers, for a checkpoint in mid-epoch; waits for the device."""
        for meter in self.meters.values():
            meter.read()
        return {name: [meter.total, float(meter.count)] for name, meter in self.meters.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go on from the sums of `state_dict`, so that the epoch's means cover all of it."""
        for name, meter in self.meters.items():
            total, count = state[name]
            meter.total, meter.count = total, int(count)
        self._at_last_line = (self.loss.total, self.loss.count)


class EpochView:
    """Shows one epoch: as a bar where stderr is a terminal, as the published lines on stdout where it is not; as both
    where the lines go into a file beside the bar."""

    def __init__(self, epoch: int, iterations: int, first: int) -> None:
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=iterations, initial=first, desc=f"epoch {epoch}", unit="it", dynamic_ncols=True)
        self._lines = self._bar is None or not sys.stdout.isatty()

    def step(self) -> None:
        """An iteration is done."""
        if self._bar is not None:
            self._bar.update()

    def show(self, progress: Progress) -> None:
        """An iteration that logs is done."""
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"lr {progress.lr:.2e}, loss {progress.loss:.4f}, {progress.samples_per_second:.1f} samples/s, "
                f"data {progress.lap.data_share:.0%}"
            )
        self.write(progress.line)

    def write(self, line: str) -> None:
        """A line on stdout, if lines are shown."""
        if self._lines:
            _to_stdout(line)

    def close(self) -> None:
        """The epoch is over, or the run stops."""
        if self._bar is not None:
            self._bar.close()
