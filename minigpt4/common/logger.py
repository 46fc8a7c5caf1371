"""What a person at the terminal sees of a run: log lines, and lines or a progress bar for each epoch."""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

# Means, times and the published lines of a training epoch.
#
# Losses stay on their device and are read together at the iterations that log: the only place where a run waits for
# its GPU because of the log.


Reduce = Callable[[Tensor], Tensor]


class MeanMeter:
    """Last value and mean of a series whose values may still be computed on a device."""

    def __init__(self) -> None:
        self.last = math.nan
        """The newest value read, finite or not."""

        self.total = 0.0
        self.count = 0
        self._unread: list[Tensor] = []

    def add(self, value: Tensor | float) -> None:
        """Take a scalar; a tensor is copied on its device and read later."""
        if isinstance(value, Tensor):
            self._unread.append(value.detach().reshape(()).clone())
            return
        self.read()
        self._take(float(value))

    def read(self) -> None:
        """Fetch what is still on the device, in one transfer."""
        if not self._unread:
            return
        values = torch.stack(self._unread).tolist()
        self._unread.clear()
        for value in values:
            self._take(value)

    def _take(self, value: float) -> None:
        self.last = value
        if math.isfinite(value):  # a step that was skipped as not finite must not take the epoch's mean with it
            self.total += value
            self.count += 1

    @property
    def mean(self) -> float:
        """Mean of all finite values read; NaN without any."""
        return self.total / self.count if self.count else math.nan


@dataclass
class Stopwatch:
    """Seconds since the last line, and how much of them went into waiting for data.

    The published code averages the last 20 iterations by the host's clock, which a GPU that works asynchronously makes
    wrong. Between two lines the host has waited for the device at both ends, so this mean is right.
    """

    iterations: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    samples: int = 0

    def add(self, other: "Stopwatch") -> None:
        self.iterations += other.iterations
        self.seconds += other.seconds
        self.data_seconds += other.data_seconds
        self.samples += other.samples

    @property
    def per_iteration(self) -> float:
        return self.seconds / max(1, self.iterations)

    @property
    def data_per_iteration(self) -> float:
        return self.data_seconds / max(1, self.iterations)

    @property
    def data_share(self) -> float:
        """Share of the time spent waiting for data, 0 to 1."""
        return self.data_seconds / self.seconds if self.seconds > 0 else 0.0

    @property
    def samples_per_second(self) -> float:
        """Samples of this process a second."""
        return self.samples / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Progress:
    """What a log iteration has to say."""

    epoch: int
    iteration: int
    """0-based, within the epoch."""

    iterations: int
    """Of the whole epoch."""

    eta_seconds: float
    lr: float
    loss: float
    loss_mean: float
    """Over the finite losses since the last line."""

    seconds: float
    """Of one iteration; mean since the last line."""

    data_seconds: float
    """Of it, waiting for data."""

    samples_per_second: float
    """Over all processes."""

    data_share: float
    max_memory: float | None
    """Highest memory allocated on the CUDA device so far, MiB; None without one."""

    def line(self) -> str:
        """The published line; what is new stands behind it."""
        total = str(self.iterations)
        parts = [
            epoch_header(self.epoch),
            f"[{self.iteration:{len(total)}d}/{total}]",
            f"eta: {clock(self.eta_seconds)}",
            f"lr: {self.lr:.6f}",
            f"loss: {self.loss:.4f}",
            f"time: {self.seconds:.4f}",
            f"data: {self.data_seconds:.4f}",
        ]
        if self.max_memory is not None:
            parts.append(f"max mem: {self.max_memory:.0f}")
        return "  ".join([*parts, f"samples/s: {self.samples_per_second:.1f}", f"data wait: {self.data_share:.0%}"])


class MetricLogger:
    """Counts one epoch of one process: `waiting_for_data` around the loader, `update` after the step.

    Args:
        epoch: number of the epoch, 0-based.
        iterations: length of the whole epoch.
        first: iteration that comes first, not 0 when a run goes on in mid-epoch.
        log_freq: a line is due each so many iterations, and at the last.
        world_size: processes, to turn this process's samples into everyone's.
        device: where to ask for memory.
    """

    def __init__(
        self, epoch: int, iterations: int, *, first: int, log_freq: int, world_size: int, device: torch.device
    ) -> None:
        self.epoch = epoch
        self.iterations = iterations
        self.iteration = first - 1
        """The newest iteration done."""

        self.meters = {"lr": MeanMeter(), "loss": MeanMeter()}
        self._log_freq = log_freq
        self._world_size = world_size
        self._device = device
        self._since_line = Stopwatch()
        self._whole = Stopwatch()
        self._at_last_line = (0.0, 0)
        self._began = self._mark = time.perf_counter()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the call that fetches a batch: its time is time spent waiting for data."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since_line.data_seconds += time.perf_counter() - began

    def update(self, *, loss: Tensor | float, lr: float, samples: int) -> Progress | None:
        """An iteration is done.

        Args:
            loss: its loss, scalar, nats; a tensor is read only when a line is due.
            lr: learning rate it used.
            samples: what it trained on in this process.

        Returns:
            What to show, if a line is due.
        """
        self.iteration += 1
        self.meters["lr"].add(lr)
        self.meters["loss"].add(loss)
        due = self._due()
        if due:
            self.meters["loss"].read()
        self._count_time(samples)
        return self._progress() if due else None

    @property
    def complete(self) -> bool:
        """Whether the last iteration is done."""
        return self.iteration >= self.iterations - 1

    def _due(self) -> bool:
        return self.iteration % self._log_freq == 0 or self.complete

    def _count_time(self, samples: int) -> None:
        now = time.perf_counter()
        self._since_line.iterations += 1
        self._since_line.samples += samples
        self._since_line.seconds += now - self._mark
        self._mark = now

    def _progress(self) -> Progress:
        watch, self._since_line = self._since_line, Stopwatch()
        self._whole.add(watch)
        return Progress(
            epoch=self.epoch,
            iteration=self.iteration,
            iterations=self.iterations,
            eta_seconds=self._whole.per_iteration * (self.iterations - self.iteration),
            lr=self.meters["lr"].last,
            loss=self.meters["loss"].last,
            loss_mean=self._loss_since_line(),
            seconds=watch.per_iteration,
            data_seconds=watch.data_per_iteration,
            samples_per_second=watch.samples_per_second * self._world_size,
            data_share=watch.data_share,
            max_memory=_max_memory(self._device),
        )

    def _loss_since_line(self) -> float:
        meter, (total, count) = self.meters["loss"], self._at_last_line
        self._at_last_line = (meter.total, meter.count)
        return (meter.total - total) / (meter.count - count) if meter.count > count else math.nan

    def averages(self, reduce: Reduce) -> dict[str, float]:
        """Means of `lr` and `loss` over the epoch and over all processes; a collective, so every rank calls it.

        Args:
            reduce: adds a `(4,)` tensor up over the processes, and returns it.
        """
        for meter in self.meters.values():
            meter.read()
        kind = torch.float32 if self._device.type == "mps" else torch.float64  # MPS has no float64
        sums = [number for meter in self.meters.values() for number in (meter.total, meter.count)]
        lr, lr_count, loss, loss_count = reduce(torch.tensor(sums, dtype=kind, device=self._device)).tolist()
        return {"lr": _ratio(lr, lr_count), "loss": _ratio(loss, loss_count)}

    def total_line(self) -> str:
        """The published line on the time of the epoch."""
        seconds = time.perf_counter() - self._began
        done = max(1, self._whole.iterations + self._since_line.iterations)
        return f"{epoch_header(self.epoch)} Total time: {clock(seconds)} ({seconds / done:.4f} s / it)"

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
        self._at_last_line = (self.meters["loss"].total, self.meters["loss"].count)


def epoch_header(epoch: int) -> str:
    """How every line of an epoch begins."""
    return f"Train: data epoch: [{epoch}]"


def averages_line(averages: dict[str, float]) -> str:
    """The published line on the means of an epoch."""
    return "Averaged stats: " + "  ".join(f"{name}: {value:.4f}" for name, value in averages.items())


def clock(seconds: float) -> str:
    """Seconds as `H:MM:SS`."""
    return str(timedelta(seconds=int(seconds)))


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan


def _max_memory(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


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
