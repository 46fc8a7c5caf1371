"""The log of a training run: console, `log.txt`, `metrics.jsonl` and trackers behind one object.

Every rank does the same; rank 0 alone shows and writes.
"""

import logging
import math
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from minigpt4.common.errors import ConfigError
from minigpt4.common.logger import MetricLogger, SmoothedValue, Stopwatch, to_stdout
from minigpt4.common.run_folder import RunFolder
from minigpt4.common.schemas import RunConfig
from minigpt4.common.utils import JsonLines, is_before

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from torch import Tensor

    from minigpt4.common.dist_utils import Processes

log = logging.getLogger(__name__)

WANDB_LIMITS = {"init_timeout": 30.0, "login_timeout": 30.0, "finish_timeout": 60.0}
"""Seconds that Weights & Biases may take, as far as its version knows them."""
PROBE_SECONDS = 5
"""Longest wait for any answer from its server."""


# Trackers


def check_trackers(run: RunConfig) -> None:
    """ConfigError if TensorBoard is asked for and not installed; to call on every rank before anything heavy."""
    from accelerate.utils import is_tensorboard_available

    if run.tensorboard_log and not is_tensorboard_available():
        raise ConfigError("run.tensorboard_log: needs the package tensorboard; pip install tensorboard")


def start_trackers(
    run: RunConfig, folder: RunFolder, config: Mapping[str, Any], first_step: int = 0
) -> list["GeneralTracker"]:
    """What `run.wandb_log` and `run.tensorboard_log` ask for, on rank 0; one that does not start costs a warning."""
    trackers: list[GeneralTracker] = []
    for name, wanted, make in (
        ("tensorboard", run.tensorboard_log, lambda: _tensorboard(folder, first_step)),
        ("wandb", run.wandb_log, lambda: _wandb(run, folder, config)),
    ):
        try:
            if wanted:
                tracker = make()
                tracker.start()
                trackers.append(tracker)
        except Exception as error:  # whatever a service throws, the training is worth more
            text = "run.%s_log: did not start (%s). Going on without it; pip install %s if it is missing"
            log.warning(text, name, error, name)
    return trackers


def _tensorboard(folder: RunFolder, first_step: int) -> "GeneralTracker":
    """Event files in the run's folder; those of `first_step` and later are hidden, for they come again."""
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker(folder.path.name, folder.path.parent, purge_step=first_step or None)


def _wandb(run: RunConfig, folder: RunFolder, config: Mapping[str, Any]) -> "GeneralTracker":
    """A Weights & Biases run under the run's identity, so that a resumed run goes on in the same chart; offline, never
    asking anything, without a login or an answer from the server."""
    import wandb
    from accelerate.tracking import WandBTracker

    address, mode = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"), os.environ.get("WANDB_MODE")
    if not (mode or os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        mode = "offline"
        log.info("Weights & Biases: no login, writing offline; `wandb login` before a run, or `wandb sync` after it")
    elif not (mode or _answers(address)):
        mode = "offline"
        log.warning("Weights & Biases: no answer from %s within %d s, writing offline", address, PROBE_SECONDS)
    return WandBTracker(
        os.environ.get("WANDB_PROJECT", "minigpt4"),
        name=f"{run.job_name}-{folder.job_id}",
        id=folder.facts().get("id"),
        resume=None if mode == "offline" else "allow",
        dir=str(folder.path),
        config=dict(config),
        mode=mode or "online",
        settings={name: limit for name, limit in WANDB_LIMITS.items() if name in wandb.Settings.model_fields},
    )


def _answers(address: str) -> bool:
    """Does a server answer, in whatever words?"""
    try:
        urllib.request.urlopen(address, timeout=PROBE_SECONDS).close()
    except (OSError, ValueError) as error:
        return isinstance(error, urllib.error.HTTPError)
    return True


# The log


class EpochLog(MetricLogger):
    """One epoch on one rank. Rank 0 shows a bar where stderr is a terminal, and the published lines on stdout where not
    both are one."""

    def __init__(self, run_log: "RunLog", epoch: int, iterations: int, first: int) -> None:
        super().__init__("  ")
        self.add_meter("lr", SmoothedValue(1, "{value:.6f}"))
        self.add_meter("loss", SmoothedValue(1, "{value:.4f}"))
        self.run_log, self.epoch, self.iterations, self.iteration = run_log, epoch, iterations, first - 1
        self.header = f"Train: data epoch: [{epoch}]"
        self.watch = Stopwatch()
        self.waiting_for_data = self.watch.waiting_for_data
        self.at_last_line = (0.0, 0)
        has_bar = run_log.is_main and sys.stderr.isatty()
        keys = {"total": iterations, "initial": first, "desc": f"epoch {epoch}", "disable": not has_bar}
        self.bar = tqdm(**keys, unit="it", dynamic_ncols=True)
        self.shows_lines = run_log.is_main and not (has_bar and sys.stdout.isatty())

    @property
    def complete(self) -> bool:
        return self.iteration >= self.iterations - 1

    def step(self, loss: "Tensor | float", lr: float, *, num_samples: int) -> None:
        """An iteration is done, with `num_samples` on this rank. `loss`: scalar, nats; a tensor stays on its device
        until a line is due, and what is not finite is shown, but does not enter the means."""
        self.iteration += 1
        self.update(lr=lr, loss=loss)
        due = self.iteration % self.run_log.run.log_freq == 0 or self.complete
        if due:
            self.loss.read()  # before the clock is read
        self.watch.tick(num_samples)
        self.bar.update()
        if due and self.run_log.is_main:
            self._report()

    def _report(self) -> None:
        """The published line, what is new behind it; a line of `metrics.jsonl`, and its numbers for the trackers."""
        from minigpt4.common.devices import max_memory

        lap, memory = self.watch.end_lap(), max_memory(self.run_log.processes.device)
        (total, count), self.at_last_line = self.at_last_line, (self.loss.total, self.loss.count)
        new = self.loss.count - count
        numbers = {
            "lr": self.lr.value,
            "loss": self.loss.value,
            "loss_mean": (self.loss.total - total) / new if new else math.nan,  # since the last line
            "seconds_per_iteration": lap.seconds / lap.iterations,
            "samples_per_second": lap.samples * self.run_log.processes.world_size / lap.seconds,  # of all ranks
            "data_share": lap.data_seconds / lap.seconds,
            "max_memory_mib": memory,
        }
        speed, data_share = numbers["samples_per_second"], numbers["data_share"]
        shown = f"lr {self.lr.value:.2e}, loss {self.loss.value:.4f}"
        self.bar.set_postfix_str(f"{shown}, {speed:.1f} samples/s, data {data_share:.0%}")
        line = self.line(self.header, self.iteration, self.iterations, self.watch, lap, memory)
        self.write(f"{line}  samples/s: {speed:.1f}  data wait: {data_share:.0%}")
        step = self.epoch * self.iterations + self.iteration
        at = {"step": step, "epoch": self.epoch, "iteration": self.iteration}
        self.run_log.metrics.append(at | numbers)
        self.run_log.track({f"train/{name}": value for name, value in numbers.items() if value is not None}, step)

    def write(self, line: str) -> None:
        if self.shows_lines:
            to_stdout(line)


class RunLog:
    """What the runner talks to: `begin`, then `epoch` and `validation`, and `close`, on every rank.

    `config`: the merged configuration, plain types; rank 0 writes it into `run.json` if there is none yet.
    """

    def __init__(self, run: RunConfig, folder: RunFolder, processes: "Processes", config: Mapping[str, Any]) -> None:
        self.run, self.folder, self.processes, self.config = run, folder, processes, config
        self.is_main = processes.rank == 0
        self.log_txt, self.metrics = JsonLines(folder.path / "log.txt"), JsonLines(folder.path / "metrics.jsonl")
        self.trackers: list[GeneralTracker] = []
        self._epoch: EpochLog | None = None
        self._unfinished: dict[str, list[float]] | None = None
        if self.is_main and not folder.facts():
            folder.describe(config, seed=run.seed, world_size=processes.world_size)

    def begin(
        self, epoch: int = 0, iteration: int = 0, checkpoint: Path | None = None, validated: int | None = None
    ) -> None:
        """Training starts here: drop what the files say of later steps, and of validations from epoch `validated` on
        (None: `epoch`), and start the trackers."""
        if not self.is_main:
            return
        step, validated = epoch * (self.run.iters_per_epoch or 0) + iteration, epoch if validated is None else validated
        self.log_txt.keep(lambda line: is_before(line, "epoch", epoch if "train_loss" in line else validated))
        self.metrics.keep(lambda line: is_before(line, "step", step))
        if checkpoint is not None:
            self.folder.note_resume(checkpoint, world_size=self.processes.world_size)
        self.trackers = start_trackers(self.run, self.folder, self.config, first_step=step)

    @contextmanager
    def epoch(self, epoch: int, iterations: int, first: int = 0) -> Iterator[EpochLog]:
        """Log an epoch from iteration `first` on. Left after the last iteration it writes the means of all ranks; left
        before, by an error or a signal, it writes nothing and waits for nobody."""
        epoch_log = EpochLog(self, epoch, iterations, first)
        if first and self._unfinished is not None:
            for name, (total, count) in self._unfinished.items():
                epoch_log.meters[name].total, epoch_log.meters[name].count = total, int(count)
            epoch_log.at_last_line = (epoch_log.loss.total, epoch_log.loss.count)
        self._unfinished, self._epoch = None, epoch_log
        with epoch_log.bar:
            yield epoch_log
            if epoch_log.complete:
                epoch_log.synchronize_between_processes()
                epoch_log.write(epoch_log.watch.total_line(epoch_log.header))
                log.info("Averaged stats: %s", epoch_log.global_avg())
                means = {name: meter.global_avg for name, meter in epoch_log.meters.items()}
                self._write_epoch("train", epoch, epoch, {name: f"{mean:.3f}" for name, mean in means.items()}, means)

    def validation(
        self,
        epoch: int,
        loss: float,
        captions: Sequence[str] = (),
        split: str = "val",
        after: int | None = None,
        **more: float,
    ) -> None:
        """Log what the weights of `epoch` are worth on a split: `loss` in nats a token, other scores, captions to show.

        `after`: the last epoch that was trained before it, if that is not `epoch`.
        """
        scores = {"loss": loss, **more}
        log.info("Validation (%s): %s", split, "  ".join(f"{name}: {value:.4f}" for name, value in scores.items()))
        for caption in captions:
            log.info("  %s", caption)
        self._write_epoch(split, epoch, epoch if after is None else after, scores, scores)

    def _write_epoch(
        self, split: str, epoch: int, after: int, shown: Mapping[str, float | str], tracked: Mapping[str, float]
    ) -> None:
        if self.is_main:
            self.log_txt.append({f"{split}_{name}": value for name, value in shown.items()} | {"epoch": epoch})
            step = max(0, (after + 1) * (self.run.iters_per_epoch or 0) - 1)
            self.track({f"{split}/epoch_{name}": value for name, value in tracked.items()}, step)

    def track(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers of iteration `step`, counted over the whole run, for the trackers."""
        for tracker in list(self.trackers):
            try:
                tracker.log(dict(numbers), step)
            except Exception as error:  # as at the start
                log.warning("%s failed and is left out from here on: %s", tracker.name, error)
                self.trackers.remove(tracker)

    def state_dict(self) -> dict[str, list[float]] | None:
        """Sums of this rank over an unfinished epoch; None between epochs. Waits for the device."""
        if self._epoch is None or self._epoch.complete:
            return None
        for meter in self._epoch.meters.values():
            meter.read()
        return {name: [meter.total, float(meter.count)] for name, meter in self._epoch.meters.items()}

    def load_state_dict(self, state: dict[str, list[float]] | None) -> None:
        """Take the sums of `state_dict` into the epoch that comes next, if that one goes on in its middle."""
        self._unfinished = state

    def close(self) -> None:
        """The run ends: trackers send what they have, within their time limits."""
        for tracker in self.trackers:
            try:
                tracker.finish()
            except Exception as error:  # as at the start
                log.warning("%s failed at its end: %s", tracker.name, error)
