"""Runners by name, and the schedules they use; importing this package registers the shipped ones."""

from minigpt4.common.optims import LinearWarmupCosineLRScheduler, LinearWarmupStepLRScheduler
from minigpt4.runners.runner_base import RunnerBase

__all__ = ["LinearWarmupCosineLRScheduler", "LinearWarmupStepLRScheduler", "RunnerBase"]
