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

Every rank does the same; rank 0 alone shows and writes.
"""

import importlib
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from minigpt4.common import start_clock
from minigpt4.common.errors import ConfigError
from minigpt4.common.logger import EpochMeters, EpochView, Progress
from minigpt4.common.run_folder import RunFolder
from minigpt4.common.schemas import RunConfig
from minigpt4.common.utils import JsonLines, is_before

if TYPE_CHECKING:
    from torch import Tensor

    from minigpt4.common.dist_utils import Processes

log = logging.getLogger(__name__)

START_SECONDS = 30
"""Longest wait for Weights & Biases at the start."""

FINISH_SECONDS = 60
"""Longest wait for its uploads at the end."""

PROBE_SECONDS = 5
"""Longest wait for any answer from its server."""


class Tracker(Protocol):
    """Takes numbers by name. None of its methods may stop a run."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of iteration `step`, counted over the whole run."""

    def close(self) -> None:
        """The run ends."""


class TrackerGroup:
    """Any number of trackers as one; one that fails is left out from then on, with a warning."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._each("log", metrics, step)

    def close(self) -> None:
        self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        for tracker in list(self.trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # whatever a service throws, the training is worth more
                log.warning("%s failed and is left out from here on: %s", type(tracker).__name__, error)
                self.trackers.remove(tracker)


class TensorBoardTracker:
    """Event files in the run's folder."""

    def __init__(self, folder: RunFolder, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events after the checkpoint that a run goes on from are hidden: they come again.
        self._writer = SummaryWriter(str(folder.path), purge_step=first_step or None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run under the run's identity, so that a resumed run goes on in the same chart.

    Never asks anything: without a login, or without an answer from the server, it writes its files offline, to be sent
    later by `wandb sync`.
    """

    def __init__(self, folder: RunFolder, job_name: str, config: Mapping[str, Any]) -> None:
        import wandb

        mode = _wandb_mode(wandb)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "minigpt4"),
            name=f"{job_name}-{folder.job_id}",
            id=folder.facts().get("id"),
            resume="allow" if mode == "online" else None,
            dir=str(folder.path),
            config=dict(config),
            mode=mode,
            settings=wandb.Settings(**_settings(wandb)),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def check_trackers(run: RunConfig) -> None:
    """To call on every rank before anything heavy.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """
    if not run.tensorboard_log:
        return
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise ConfigError(
            f"run.tensorboard_log: needs the package tensorboard ({error}); pip install tensorboard"
        ) from error


def build_tracker(run: RunConfig, folder: RunFolder, config: Mapping[str, Any], first_step: int = 0) -> TrackerGroup:
    """What `run.wandb_log` and `run.tensorboard_log` ask for; on rank 0 only.

    Args:
        run: the section `run:`.
        folder: of this run, with its `run.json` written.
        config: the merged configuration, plain types, to show beside the curves.
        first_step: iteration that a resumed run goes on with.
    """
    trackers: list[Tracker] = []
    if run.tensorboard_log:
        try:
            trackers.append(TensorBoardTracker(folder, first_step))
        except OSError as error:
            log.warning("run.tensorboard_log: %s cannot be written to (%s). Going on without it.", folder.path, error)
    if run.wandb_log:
        try:
            trackers.append(WandbTracker(folder, run.job_name, config))
        except ImportError as error:
            log.warning("run.wandb_log: Weights & Biases is not installed (%s); pip install wandb. Going on.", error)
        except Exception as error:  # a service that does not start is no reason not to train
            log.warning("run.wandb_log: Weights & Biases did not start (%s). Going on without it.", error)
    return TrackerGroup(trackers)


def _wandb_mode(wandb: Any) -> str:
    """`WANDB_MODE` where it is set; else online with a login and a server that answers, and offline without."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        log.info("Weights & Biases: no login, writing offline; `wandb login` before a run, or `wandb sync` after it")
        return "offline"
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not _answers(address):
        log.warning("Weights & Biases: no answer from %s within %d s, writing offline", address, PROBE_SECONDS)
        return "offline"
    return "online"


def _answers(address: str) -> bool:
    """Does a server answer, in whatever words? Asked in a thread, for a name lookup knows no time limit."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(address, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer, too
        except (OSError, ValueError):
            return
        answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(PROBE_SECONDS)


def _settings(wandb: Any) -> dict[str, Any]:
    """Time limits, as far as this version knows them."""
    wanted = {"init_timeout": START_SECONDS, "finish_timeout": FINISH_SECONDS, "login_timeout": START_SECONDS}
    known = wandb.Settings.model_fields
    return {name: float(value) for name, value in wanted.items() if name in known}


class EpochLog:
    """One epoch on one rank; `RunLog.epoch` makes it."""

    def __init__(self, run_log: "RunLog", meters: EpochMeters, view: EpochView | None) -> None:
        self._run_log, self._meters, self._view = run_log, meters, view
        self.waiting_for_data = meters.waiting_for_data

    def step(self, loss: "Tensor | float", lr: float, *, num_samples: int, **extra: float | int | str | None) -> None:
        """An iteration is done.

        Args:
            loss: scalar, nats; a tensor stays on its device until a line is due. Values that are not finite are shown,
                but do not enter the means.
            lr: learning rate that the iteration used.
            num_samples: what this rank trained on in it.
            **extra: more for `metrics.jsonl` and the trackers, host values: a tensor here would make every step wait.
        """
        progress = self._meters.step(loss, lr, num_samples)
        if self._view is not None:
            self._view.step()
            if progress is not None:
                self._view.show(progress)
                self._run_log.write_progress(progress, extra)


class RunLog:
    """What the runner talks to.

    Args:
        run: the section `run:`.
        folder: of this run, the same on every rank; rank 0 writes `run.json` there if there is none yet.
        processes: this process among the run's.
        config: the merged configuration, plain types.
    """

    def __init__(self, run: RunConfig, folder: RunFolder, processes: "Processes", config: Mapping[str, Any]) -> None:
        self._run, self._folder, self._processes, self._config = run, folder, processes, config
        self._is_main = processes.rank == 0
        self._iterations = run.iters_per_epoch or 0
        self._log_txt, self._metrics = JsonLines(folder.log_txt), JsonLines(folder.metrics)
        self._trackers = TrackerGroup([])
        self._meters: EpochMeters | None = None
        self._unfinished: dict[str, list[float]] | None = None
        if self._is_main and not folder.facts():
            folder.describe(config, seed=run.seed, world_size=processes.world_size)

    def facts(self) -> dict[str, Any]:
        """What `run.json` says; a resume changes neither `started` nor `number` in it."""
        return self._folder.facts()

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
        if not self._is_main:
            return
        step, validated = epoch * self._iterations + iteration, epoch if validated is None else validated
        self._log_txt.keep(lambda line: is_before(line, "epoch", epoch if "train_loss" in line else validated))
        self._metrics.keep(lambda line: is_before(line, "step", step))
        if checkpoint is not None:
            self._folder.note_resume(checkpoint, world_size=self._processes.world_size)
        self._trackers = build_tracker(self._run, self._folder, self._config, first_step=step)

    def started_up(self) -> None:
        """An iteration is done. After the first, the log and `run.json` say how long it took to come so far."""
        start = start_clock.finish()
        if start is not None and self._is_main:
            log.info(start.line())
            self._folder.note_start_up(start.facts())

    @contextmanager
    def epoch(self, epoch: int, iterations: int, first: int = 0) -> Iterator[EpochLog]:
        """Log an epoch from iteration `first` on. Left after the last iteration it writes the means, for which every
        rank must come here; left before, by an error or a signal, it writes nothing and waits for nobody."""
        processes = self._processes
        meters = EpochMeters(
            epoch,
            iterations,
            first=first,
            log_freq=self._run.log_freq,
            world_size=processes.world_size,
            device=processes.device,
        )
        if first and self._unfinished is not None:
            meters.load_state_dict(self._unfinished)
        self._unfinished, self._meters = None, meters
        view = EpochView(epoch, iterations, first) if self._is_main else None
        try:
            yield EpochLog(self, meters, view)
            if meters.complete:
                meters.synchronize_between_processes(processes.sum)
                if view is not None:
                    view.write(meters.total_line())
                log.info("Averaged stats: %s", meters.global_avg())
                averages = {name: meter.global_avg for name, meter in meters.meters.items()}
                published = {name: f"{value:.3f}" for name, value in averages.items()}
                self._write_epoch("train", epoch, self._last_step(epoch), published, averages)
        finally:
            if view is not None:
                view.close()

    def write_progress(self, progress: Progress, extra: Mapping[str, float | int | str | None]) -> None:
        """A line of `metrics.jsonl`, and its numbers for the trackers."""
        facts = {
            "lr": progress.lr,
            "loss": progress.loss,
            "loss_mean": progress.loss_mean,
            "seconds_per_iteration": progress.lap.seconds / max(1, progress.lap.iterations),
            "samples_per_second": progress.samples_per_second,
            "data_share": progress.lap.data_share,
            "max_memory_mib": progress.max_memory,
            **extra,
        }
        step = progress.epoch * progress.iterations + progress.iteration
        self._metrics.append({"step": step, "epoch": progress.epoch, "iteration": progress.iteration, **facts})
        numbers = {f"train/{name}": value for name, value in facts.items() if isinstance(value, int | float)}
        self._trackers.log(numbers, step)

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
        self._write_epoch(split, epoch, self._last_step(epoch if after is None else after), scores, scores)

    def _write_epoch(
        self, split: str, epoch: int, step: int, shown: Mapping[str, float | str], tracked: Mapping[str, float]
    ) -> None:
        if self._is_main:
            self._log_txt.append({f"{split}_{name}": value for name, value in shown.items()} | {"epoch": epoch})
            self._trackers.log({f"{split}/epoch_{name}": value for name, value in tracked.items()}, step)

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
        self._trackers.close()
