"""One model, several checkpoints: the trained weights are swapped, the frozen parts stay."""

from pathlib import Path

import torch
from torch import Tensor, nn


class CheckpointSwitch:
    """Swaps the trained weights of a model.

    Args:
        model: a `MiniGPT4`, with the trained weights that it starts from.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._start = self._copy()

    def load(self, checkpoint: str | Path) -> None:
        """Take the trained weights of a checkpoint; WeightsError, and the weights as before, if they do not fit.

        A weight that the file may leave out is that of the start, never that of the checkpoint before.
        """
        before = self._copy()
        try:
            self._restore(self._start)
            self.model.load_checkpoint(checkpoint)
        except BaseException:
            self._restore(before)
            raise

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.trainable_parameters().items()}

    @torch.no_grad()
    def _restore(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.model.trainable_parameters().items():
            parameter.copy_(weights[name])
