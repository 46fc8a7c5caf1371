"""What `train.py` does before the loop: processes, seeds, the run's folder, a look at the data."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from minigpt4 import models, runners
from minigpt4.common.binding import AUTO
from minigpt4.common.checkpoint import newest_checkpoint
from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes, seed_everything, start_processes, stop_processes
from minigpt4.common.errors import ConfigError, MiniGPT4Error, RegistryError, RunError
from minigpt4.common.registry import registry
from minigpt4.common.run_folder import RunFolder, hold_folder
from minigpt4.common.run_log import check_trackers
from minigpt4.common.schemas import RunConfig
from minigpt4.datasets import BaseDataset, first_sample
from minigpt4.evaluation import require_caption_metrics
from minigpt4.tasks import setup_task

__all__ = [
    "check_needs",
    "choose_folder",
    "registry",
    "seed_everything",
    "setup_task",
    "show_first_samples",
    "start_processes",
    "stop_processes",
]

log = logging.getLogger(__name__)

SHIPPED = (models, runners)
"""Importing these registers what a YAML may name; tasks and datasets are imported above."""

IN_USE = (
    "Two runs in one folder would mix their files: wait for it to end or stop it. To branch off beside it, name a "
    "checkpoint by run.resume_ckpt_path, which starts a folder of its own"
)


def check_needs(run: RunConfig) -> None:
    """RegistryError for a name, ConfigError for a package or a Java that the run will need later."""
    for key, find in (
        ("task", registry.get_task_class),
        ("runner", registry.get_runner_class),
        ("lr_sched", registry.get_lr_scheduler_class),
    ):
        try:
            find(getattr(run, key))
        except RegistryError as error:
            raise RegistryError(f"run.{key}: {error}") from error
    check_trackers(run)
    if run.valid_captions and (run.test_splits or (run.valid_splits and not run.evaluate)):
        require_caption_metrics("run.valid_captions")


def choose_folder(config: Config, processes: Processes) -> tuple[Config, RunFolder]:
    """The run's folder, the same on all ranks, and the config with `auto` replaced by what was found.

    Training with `auto` goes on in the folder of the checkpoint it finds; everything else gets a new folder.
    """
    found: tuple[str | None, str] | None = None
    failure = None
    if processes.is_main:
        try:
            found = _choose(config)
        except MiniGPT4Error as error:
            failure = str(error)
    found, failure = processes.broadcast((found, failure))
    if failure is not None:
        raise RunError(failure)
    checkpoint, folder = found
    run = replace(config.run, resume_ckpt_path=checkpoint)
    return config.replace(run=run), RunFolder.existing(Path(folder))


def _choose(config: Config) -> tuple[str | None, str]:
    """Checkpoint and folder; the folder is this process's from here on."""
    run, output = config.run, Path(config.run.output_dir)
    if run.resume_ckpt_path != AUTO:
        return run.resume_ckpt_path, _own(RunFolder.create(output).path)
    newest = newest_checkpoint(output, run.job_name)
    if newest is None:
        if run.evaluate:
            raise ConfigError(
                f"run.resume_ckpt_path: auto: no checkpoint of job {run.job_name} in {output}; to evaluate model.ckpt "
                "set run.resume_ckpt_path: null"
            )
        log.info("No checkpoint of job %s in %s yet: starting from scratch", run.job_name, output)
        return None, _own(RunFolder.create(output).path)
    if run.evaluate:
        return str(newest), _own(RunFolder.create(output).path)
    folder = _own(newest.parent)
    # Who was in there until now may have gone on meanwhile.
    return str(newest_checkpoint(newest.parent.parent, run.job_name, newest.parent.name) or newest), folder


def _own(folder: Path) -> str:
    hold_folder(folder, IN_USE)
    return str(folder)


def show_first_samples(datasets: Mapping[str, Mapping[str, BaseDataset]]) -> None:
    """Read and log one sample of every source, before minutes of loading; SampleError if one has none."""
    for splits in datasets.values():
        for dataset in splits.values():
            log.info("%s", first_sample(dataset))
