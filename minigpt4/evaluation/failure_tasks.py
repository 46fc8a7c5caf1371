"""The two tasks of the failure rate, each with one fixed instruction."""

from dataclasses import dataclass

from minigpt4.common.errors import ConfigError
from minigpt4.evaluation.failure_rules import Form


@dataclass(frozen=True)
class Task:
    """What every image is asked."""

    name: str
    title: str
    """Of its column."""

    instruction: str
    """Without the image; `run.generation.prompt` says how the two go together."""

    form: Form


TASKS = (
    Task("detail", "detailed description", "Describe this image in detail.", "prose"),
    Task("poem", "poem", "Write a poem about this image.", "verse"),
)


def task_called(name: str) -> Task:
    """The task of that name; ConfigError if there is none."""
    for task in TASKS:
        if task.name == name:
            return task
    raise ConfigError(f"task {name!r}: unknown; known: {', '.join(task.name for task in TASKS)}")
