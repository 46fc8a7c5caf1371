"""Runners by name; importing this package registers the shipped one."""

from minigpt4.runners.runner_base import RunnerBase

__all__ = ["RunnerBase"]
