"""The log of a training run: console, `log.txt`, `metrics.jsonl` and trackers behind one object.

    run_log = RunLog(run, folder, processes, config)
    run_log.begin(epoch, iteration)
    with run_log.epoch(epoch, iterations) as epoch_log:
        for _ in range(iterations):
            with epoch_log.waiting_for_data():
                samples = next(batches)
            ...
            epoch_log.step(loss, lr, num_samples=12)
    run_log.validation(epoch, loss, captions)
    run_log.close()

Every rank does the same. Only on rank 0 are there outputs that write; the others have null objects in their place.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from minigpt4.common import start_clock
from minigpt4.common.console import EpochView, NullView, epoch_view
from minigpt4.common.json_lines import JsonLines, is_before
from minigpt4.common.metric_logger import MetricLogger, Progress, averages_line
from minigpt4.common.run_folder import RunFolder
from minigpt4.common.schemas.run import RunConfig
from minigpt4.common.start_clock import Breakdown
from minigpt4.common.trackers import NullTracker, Tracker, build_tracker

log = logging.getLogger(__name__)

Facts = Mapping[str, float | int | str | None]


class Group(Protocol):
    """What the log asks of the processes of a run."""

    rank: int
    world_size: int
    device: torch.device

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the processes; a collective."""


class NullOutputs:
    """Of ranks other than 0: takes everything and writes nothing."""

    def facts(self) -> dict[str, Any]:
        return {}

    def begin(self, epoch: int, iteration: int, checkpoint: Path | None, validated: int) -> None:
        """Nothing."""

    def started_up(self, start: Breakdown) -> None:
        """Nothing."""

    def view(self, epoch: int, iterations: int, first: int) -> EpochView:
        return NullView()

    def progress(self, step: int, progress: Progress, extra: Facts) -> None:
        """Nothing."""

    def epoch_facts(self, split: str, epoch: int, step: int, shown: Facts, tracked: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Outputs(NullOutputs):
    """Of rank 0: the run's files and trackers."""

    def __init__(self, run: RunConfig, folder: RunFolder, config: Mapping[str, Any], world_size: int) -> None:
        self._run, self._folder, self._config, self._world_size = run, folder, config, world_size
        self._log_txt = JsonLines(folder.log_txt)
        self._metrics = JsonLines(folder.metrics)
        self._tracker: Tracker = NullTracker()
        if not folder.facts():
            folder.describe(config, seed=run.seed, world_size=world_size)

    def facts(self) -> dict[str, Any]:
        return self._folder.facts()

    def begin(self, epoch: int, iteration: int, checkpoint: Path | None, validated: int) -> None:
        step = epoch * (self._run.iters_per_epoch or 0) + iteration
        self._log_txt.keep(lambda line: is_before(line, "epoch", epoch if "train_loss" in line else validated))
        self._metrics.keep(lambda line: is_before(line, "step", step))
        if checkpoint is not None:
            self._folder.note_resume(checkpoint, world_size=self._world_size)
        self._tracker = build_tracker(self._run, self._folder, self._config, first_step=step)

    def started_up(self, start: Breakdown) -> None:
        log.info(start.line())
        self._folder.note_start_up(start.facts())

    def view(self, epoch: int, iterations: int, first: int) -> EpochView:
        return epoch_view(epoch, iterations, first)

    def progress(self, step: int, progress: Progress, extra: Facts) -> None:
        facts = {
            "lr": progress.lr,
            "loss": progress.loss,
            "loss_mean": progress.loss_mean,
            "seconds_per_iteration": progress.seconds,
            "samples_per_second": progress.samples_per_second,
            "data_share": progress.data_share,
            "max_memory_mib": progress.max_memory,
            **extra,
        }
        self._metrics.append({"step": step, "epoch": progress.epoch, "iteration": progress.iteration, **facts})
        numbers = {f"train/{name}": value for name, value in facts.items() if isinstance(value, int | float)}
        self._tracker.log(numbers, step)

    def epoch_facts(self, split: str, epoch: int, step: int, shown: Facts, tracked: Mapping[str, float]) -> None:
        self._log_txt.append({f"{split}_{name}": value for name, value in shown.items()} | {"epoch": epoch})
        self._tracker.log({f"{split}/epoch_{name}": value for name, value in tracked.items()}, step)

    def close(self) -> None:
        self._tracker.close()


class EpochLog:
    """One epoch on one rank; `RunLog.epoch` makes it."""

    def __init__(self, meters: MetricLogger, view: EpochView, outputs: NullOutputs) -> None:
        self._meters, self._view, self._outputs = meters, view, outputs

    def waiting_for_data(self) -> AbstractContextManager[None]:
        """Around the call that fetches a batch, to count the share of time spent waiting."""
        return self._meters.waiting_for_data()

    def step(self, loss: Tensor | float, lr: float, *, num_samples: int, **extra: float | int | str | None) -> None:
        """An iteration is done.

        Args:
            loss: scalar, nats; a tensor stays on its device until a line is due. Values that are not finite are shown,
                but do not enter the means.
            lr: learning rate that the iteration used.
            num_samples: what this rank trained on in it.
            **extra: more for `metrics.jsonl` and the trackers, host values: a tensor here would make every step wait.
        """
        progress = self._meters.update(loss=loss, lr=lr, samples=num_samples)
        self._view.step()
        if progress is not None:
            self._view.show(progress)
            self._outputs.progress(progress.epoch * progress.iterations + progress.iteration, progress, extra)


class RunLog:
    """What the runner talks to.

    Args:
        run: the section `run:`.
        folder: of this run, the same on every rank; rank 0 writes `run.json` there if there is none yet.
        processes: this process among the run's.
        config: the merged configuration, plain types.
    """

    def __init__(self, run: RunConfig, folder: RunFolder, processes: Group, config: Mapping[str, Any]) -> None:
        self._log_freq, self._processes = run.log_freq, processes
        self._outputs = NullOutputs() if processes.rank else Outputs(run, folder, config, processes.world_size)
        self._iterations = run.iters_per_epoch or 0
        self._meters: MetricLogger | None = None
        self._unfinished: dict[str, list[float]] | None = None

    def facts(self) -> dict[str, Any]:
        """What `run.json` says; a resume changes neither `started` nor `number` in it. Empty on ranks other than 0."""
        return self._outputs.facts()

    def begin(
        self, epoch: int = 0, iteration: int = 0, checkpoint: Path | None = None, validated: int | None = None
    ) -> None:
        """Training starts here: drop what the files say of later steps, and start the trackers.

        Args:
            epoch: first epoch of this start.
            iteration: first iteration in it.
            checkpoint: what the run goes on from.
            validated: epochs whose validation is not done again; as many as were trained, if that is not given.
        """
        self._outputs.begin(epoch, iteration, checkpoint, epoch if validated is None else validated)

    def started_up(self) -> None:
        """An iteration is done. After the first, the log and `run.json` say how long it took to come so far."""
        start = start_clock.finish()
        if start is not None:
            self._outputs.started_up(start)

    @contextmanager
    def epoch(self, epoch: int, iterations: int, first: int = 0) -> Iterator[EpochLog]:
        """Log an epoch from iteration `first` on. Left after the last iteration it writes the means, for which every
        rank must come here; left before, by an error or a signal, it writes nothing and waits for nobody."""
        meters = self._new_meters(epoch, iterations, first)
        view = self._outputs.view(epoch, iterations, first)
        try:
            yield EpochLog(meters, view, self._outputs)
            if meters.complete:
                self._finish(meters, view)
        finally:
            view.close()

    def _new_meters(self, epoch: int, iterations: int, first: int) -> MetricLogger:
        processes = self._processes
        meters = MetricLogger(
            epoch,
            iterations,
            first=first,
            log_freq=self._log_freq,
            world_size=processes.world_size,
            device=processes.device,
        )
        if first and self._unfinished is not None:
            meters.load_state_dict(self._unfinished)
        self._unfinished, self._meters = None, meters
        return meters

    def _finish(self, meters: MetricLogger, view: EpochView) -> None:
        averages = meters.averages(self._processes.sum)
        view.end(meters.total_line())
        log.info(averages_line(averages))
        published = {name: f"{value:.3f}" for name, value in averages.items()}
        self._outputs.epoch_facts("train", meters.epoch, self._last_step(meters.epoch), published, averages)

    def validation(
        self,
        epoch: int,
        loss: float,
        captions: Sequence[str] = (),
        split: str = "val",
        after: int | None = None,
        **more: float,
    ) -> None:
        """Log what the weights of an epoch are worth.

        Args:
            epoch: the epoch that it follows.
            loss: nats a token.
            captions: sample outputs, for the console.
            split: name of the split, as it begins the keys of `log.txt`.
            after: the last epoch that was trained before it; None: `epoch`.
            **more: other scores by name.
        """
        scores = {"loss": loss, **more}
        log.info("Validation (%s): %s", split, "  ".join(f"{name}: {value:.4f}" for name, value in scores.items()))
        for caption in captions:
            log.info("  %s", caption)
        self._outputs.epoch_facts(split, epoch, self._last_step(epoch if after is None else after), scores, scores)

    def _last_step(self, epoch: int) -> int:
        return max(0, (epoch + 1) * self._iterations - 1)

    def state_dict(self) -> dict[str, list[float]] | None:
        """Sums of this rank over an unfinished epoch, plain numbers; None between epochs. Waits for the device."""
        unfinished = self._meters is not None and not self._meters.complete
        return self._meters.state_dict() if unfinished else None

    def load_state_dict(self, state: dict[str, list[float]] | None) -> None:
        """Take the sums of `state_dict` into the epoch that comes next, if that one goes on in its middle."""
        self._unfinished = state

    def close(self) -> None:
        """The run ends: trackers send what they have, within their time limits."""
        self._outputs.close()
