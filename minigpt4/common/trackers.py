"""Where metrics go beside the run's own files: Weights & Biases, TensorBoard, or nowhere."""

import importlib
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Protocol

from minigpt4.common.errors import ConfigError
from minigpt4.common.run_folder import RunFolder
from minigpt4.common.schemas.run import RunConfig

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


class NullTracker:
    """Takes everything and does nothing."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class TrackerGroup:
    """Several trackers as one; one that fails is left out from then on, with a warning."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._each("log", metrics, step)

    def close(self) -> None:
        self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        for tracker in list(self._trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # whatever a service throws, the training is worth more
                log.warning("%s failed and is left out from here on: %s", type(tracker).__name__, error)
                self._trackers.remove(tracker)


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


def build_tracker(run: RunConfig, folder: RunFolder, config: Mapping[str, Any], first_step: int = 0) -> Tracker:
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
        trackers += _started_wandb(folder, run.job_name, config)
    return TrackerGroup(trackers) if trackers else NullTracker()


def _started_wandb(folder: RunFolder, job_name: str, config: Mapping[str, Any]) -> list[Tracker]:
    try:
        return [WandbTracker(folder, job_name, config)]
    except ImportError as error:
        log.warning("run.wandb_log: Weights & Biases is not installed (%s); pip install wandb. Going on.", error)
    except Exception as error:  # a service that does not start is no reason not to train
        log.warning("run.wandb_log: Weights & Biases did not start (%s). Going on without it.", error)
    return []


def _wandb_mode(wandb: Any) -> str:
    """`WANDB_MODE` where it is set; else online with a login and a server that answers, and offline without."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if not _has_login(wandb):
        log.info("Weights & Biases: no login, writing offline; `wandb login` before a run, or `wandb sync` after it")
        return "offline"
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not _answers(address):
        log.warning("Weights & Biases: no answer from %s within %d s, writing offline", address, PROBE_SECONDS)
        return "offline"
    return "online"


def _has_login(wandb: Any) -> bool:
    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)


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
