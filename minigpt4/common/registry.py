"""The registry: classes by kind and name, as YAML files refer to them.

    @registry.register_task("image_text_pretrain")
    class ImageTextPretrainTask: ...

    registry.get_task_class("image_text_pretrain")

A class becomes known when its module is imported; a YAML's top-level `imports: [my_package.my_task]` does
that for code outside this package.
"""

from collections.abc import Callable
from typing import TypeVar

from minigpt4.common.errors import RegistryError, nearest

C = TypeVar("C", bound=type)
KINDS = ("model", "task", "runner", "builder", "processor", "lr_scheduler")


def _identity(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


class Registry:
    """Names of classes, one table a kind. All `get_*_class` raise RegistryError for an unknown name."""

    def __init__(self) -> None:
        self._classes: dict[str, dict[str, type]] = {kind: {} for kind in KINDS}

    def register_model(self, name: str) -> Callable[[C], C]:
        """Decorator: make the class known as `model.arch: name`."""
        return self._decorator("model", name)

    def register_task(self, name: str) -> Callable[[C], C]:
        """Decorator: make the class known as `run.task: name`."""
        return self._decorator("task", name)

    def register_runner(self, name: str) -> Callable[[C], C]:
        """Decorator: make the class known as `run.runner: name`."""
        return self._decorator("runner", name)

    def register_builder(self, name: str) -> Callable[[C], C]:
        """Decorator: make the class known as a data format (`builder: name`) or a dataset's name."""
        return self._decorator("builder", name)

    def register_processor(self, name: str) -> Callable[[C], C]:
        """Decorator: make the class known as `vis_processor` or `text_processor` `name: name`."""
        return self._decorator("processor", name)

    def register_lr_scheduler(self, name: str) -> Callable[[C], C]:
        """Decorator: make the class known as `run.lr_sched: name`."""
        return self._decorator("lr_scheduler", name)

    def get_model_class(self, name: str) -> type:
        return self._get("model", name)

    def get_task_class(self, name: str) -> type:
        return self._get("task", name)

    def get_runner_class(self, name: str) -> type:
        return self._get("runner", name)

    def get_builder_class(self, name: str) -> type:
        return self._get("builder", name)

    def get_processor_class(self, name: str) -> type:
        return self._get("processor", name)

    def get_lr_scheduler_class(self, name: str) -> type:
        return self._get("lr_scheduler", name)

    def list_models(self) -> list[str]:
        return sorted(self._classes["model"])

    def list_tasks(self) -> list[str]:
        return sorted(self._classes["task"])

    def list_runners(self) -> list[str]:
        return sorted(self._classes["runner"])

    def list_builders(self) -> list[str]:
        return sorted(self._classes["builder"])

    def list_processors(self) -> list[str]:
        return sorted(self._classes["processor"])

    def list_lr_schedulers(self) -> list[str]:
        return sorted(self._classes["lr_scheduler"])

    def _decorator(self, kind: str, name: str) -> Callable[[C], C]:
        def register(cls: C) -> C:
            self._add(kind, name, cls)
            return cls

        return register

    def _add(self, kind: str, name: str, cls: type) -> None:
        known = self._classes[kind].get(name)
        # A reloaded module makes a new class object of the same module and name; that one replaces the old.
        if known is not None and _identity(known) != _identity(cls):
            raise RegistryError(
                f"{kind} {name!r} is already registered as {'.'.join(_identity(known))}; "
                f"give {'.'.join(_identity(cls))} another name"
            )
        self._classes[kind][name] = cls

    def _get(self, kind: str, name: str) -> type:
        classes = self._classes[kind]
        if name in classes:
            return classes[name]
        close = nearest(name, classes)
        question = f"did you mean {close!r}? " if close else ""
        raise RegistryError(
            f"no {kind} is registered as {name!r}; {question}Known: {', '.join(sorted(classes)) or 'none'}. "
            "A class of your own is found when `imports:` in the YAML names its module."
        )


registry = Registry()
