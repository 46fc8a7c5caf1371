"""One model, several checkpoints: the trained weights are swapped, the frozen parts stay."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt4.common.errors import ConfigError


class CheckpointSwitch:
    """Swaps the trained weights of a model, and remembers those that were given a name.

    Args:
        model: a `MiniGPT4` with the trained weights that it starts from.
        start: their name.
    """

    def __init__(self, model: Any, start: str = "start") -> None:
        self.model, self._start = model, start
        self._kept = {start: self._copy()}
        self._current: str | None = start

    @property
    def names(self) -> list[str]:
        """The checkpoints that are remembered, the start first."""
        return list(self._kept)

    def name(self, wanted: str | None) -> str:
        """A checkpoint's name, the start's for None; ConfigError if there is no such checkpoint."""
        if wanted is None:
            return self._start
        if wanted not in self._kept:
            raise ConfigError(f"there is no checkpoint '{wanted}'; there are: {', '.join(self.names)}")
        return wanted

    def load(self, checkpoint: str | Path) -> None:
        """Take the trained weights of a file; WeightsError, and the weights as before, if they do not fit.

        A weight that the file may leave out is that of the start, never that of the checkpoint before.
        """
        before = self._copy()
        try:
            self._restore(self._kept[self._start])
            self.model.load_checkpoint(checkpoint)
        except BaseException:
            self._restore(before)
            raise
        self._current = None

    def keep(self, name: str) -> None:
        """Remember under this name what the model holds now."""
        self._kept[name] = self._copy()
        self._current = name

    def use(self, name: str) -> None:
        """Go back to weights that are remembered."""
        if name != self._current:
            self._restore(self._kept[name])
            self._current = name

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().to("cpu", copy=True) for name, p in self.model.trainable_parameters().items()}

    @torch.no_grad()
    def _restore(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.model.trainable_parameters().items():
            parameter.copy_(weights[name])
