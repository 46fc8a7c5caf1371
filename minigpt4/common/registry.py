"""The registry: classes by kind and name, as YAML files refer to them.

    @registry.register_task("image_text_pretrain")
    class ImageTextPretrainTask: ...

    registry.get_task_class("image_text_pretrain")

A class becomes known when its module is imported; a YAML's top-level `imports: [my_package.my_task]` does
that for code outside this package.
"""

from collections.abc import Callable
from functools import partialmethod
from typing import TypeVar

from minigpt4.common.errors import RegistryError, hint

C = TypeVar("C", bound=type)
KINDS = ("model", "task", "runner", "builder", "processor", "lr_scheduler")


class Registry:
    """Names of classes, one table a kind. All `get_*_class` raise RegistryError for an unknown name."""

    def __init__(self) -> None:
        self._classes: dict[str, dict[str, type]] = {kind: {} for kind in KINDS}

    def _register(self, kind: str, name: str) -> Callable[[C], C]:

        def register(cls: C) -> C:
            known = self._classes[kind].get(name, cls)
            own, other = (f"{one.__module__}.{one.__qualname__}" for one in (cls, known))
            if own != other:  # those of a reloaded module are equal, and the new class replaces the old one
                raise RegistryError(f"{kind} {name!r} is already registered as {other}; give {own} another name")
            self._classes[kind][name] = cls
            return cls

        return register

    def _get(self, kind: str, name: str) -> type:
        if name not in self._classes[kind]:
            text = f"no {kind} is registered as {name!r:.200}; {hint(name, self._classes[kind])}"
            raise RegistryError(f"{text}. A class of your own is found when `imports:` in the YAML names its module.")
        return self._classes[kind][name]

    def _list(self, kind: str) -> list[str]:
        return sorted(self._classes[kind])

    register_model = partialmethod(_register, "model")
    register_task = partialmethod(_register, "task")
    register_runner = partialmethod(_register, "runner")
    register_builder = partialmethod(_register, "builder")
    register_processor = partialmethod(_register, "processor")
    register_lr_scheduler = partialmethod(_register, "lr_scheduler")

    get_model_class = partialmethod(_get, "model")
    get_task_class = partialmethod(_get, "task")
    get_runner_class = partialmethod(_get, "runner")
    get_builder_class = partialmethod(_get, "builder")
    get_processor_class = partialmethod(_get, "processor")
    get_lr_scheduler_class = partialmethod(_get, "lr_scheduler")

    list_models = partialmethod(_list, "model")
    list_tasks = partialmethod(_list, "task")
    list_runners = partialmethod(_list, "runner")
    list_builders = partialmethod(_list, "builder")
    list_processors = partialmethod(_list, "processor")
    list_lr_schedulers = partialmethod(_list, "lr_scheduler")


registry = Registry()
