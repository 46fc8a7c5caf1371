"""Tasks by name; importing this package registers the shipped ones."""

from minigpt4.common.config import Config
from minigpt4.common.registry import registry
from minigpt4.tasks.base_task import BaseTask
from minigpt4.tasks.image_text_pretrain import ImageTextPretrainTask

__all__ = ["BaseTask", "ImageTextPretrainTask", "setup_task"]


def setup_task(cfg: Config) -> BaseTask:
    """The task that `run.task` names."""
    return registry.get_task_class(cfg.run.task).setup_task(cfg)
