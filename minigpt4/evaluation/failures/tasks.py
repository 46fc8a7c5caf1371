"""The tasks of the failure rate; `run.failure_prompts` has the fixed prompt of each."""

from dataclasses import dataclass

from minigpt4.common.errors import ConfigError
from minigpt4.evaluation.failures.rules import Form


@dataclass(frozen=True)
class Task:
    """What is asked for."""

    name: str
    """As on the command line and in `run.failure_prompts`."""

    title: str
    """Of its column."""

    form: Form
    """Of a good answer."""


TASKS = (
    Task("detail", "detailed description", "prose"),
    Task("poem", "poem", "verse"),
)


def task_called(name: str) -> Task:
    """The task of that name; ConfigError if there is none."""
    for task in TASKS:
        if task.name == name:
            return task
    raise ConfigError(f"task {name!r}: unknown; known: {', '.join(task.name for task in TASKS)}")
