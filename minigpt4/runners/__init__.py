"""Runners by name, and the schedules they use; importing this package registers the shipped ones."""

from minigpt4.common.config import Config
from minigpt4.common.errors import RegistryError
from minigpt4.common.optims import ConstantLRScheduler, LinearWarmupCosineLRScheduler, LinearWarmupStepLRScheduler
from minigpt4.common.registry import registry
from minigpt4.common.run_log import check_trackers
from minigpt4.evaluation import require_caption_metrics
from minigpt4.runners.runner_base import RunnerBase
from minigpt4.runners.state import choose_folder

__all__ = [
    "ConstantLRScheduler",
    "LinearWarmupCosineLRScheduler",
    "LinearWarmupStepLRScheduler",
    "RunnerBase",
    "choose_folder",
    "get_runner_class",
]


def get_runner_class(cfg: Config) -> type[RunnerBase]:
    """The runner that `run.runner` names, once all is known to be there that the run will need later.

    Raises RegistryError for the name of a task, runner or schedule, ConfigError for a package or a Java.
    """
    run = cfg.run
    getters = (registry.get_task_class, registry.get_lr_scheduler_class, registry.get_runner_class)
    for key, get_class in zip(("task", "lr_sched", "runner"), getters, strict=True):
        try:
            found = get_class(getattr(run, key))
        except RegistryError as error:
            raise RegistryError(f"run.{key}: {error}") from error
    check_trackers(run)
    if run.valid_captions and (run.test_splits or (run.valid_splits and not run.evaluate)):
        require_caption_metrics("run.valid_captions")
    return found
