"""Batches on the training device, the next one on its way while the present one is trained on."""

from typing import Any

import torch

from minigpt4.datasets.train_loader import TrainLoader
from minigpt4.processors import Levels


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch of a loader with its image on `device`, and there normalised: (B, 3, S, S) float32, or rows of a cache.

    The copy does not wait where the image is in pinned memory.
    """
    image = batch["image"].to(device, non_blocking=True)
    return {**batch, "image": image.normalised() if isinstance(image, Levels) else image}


class DevicePrefetcher:
    """Batches of a TrainLoader on `device`.

    On CUDA the next batch is fetched and copied, on a stream of its own, before the present one is handed out;
    elsewhere batches are fetched when they are asked for. `state_dict` is the position behind the last batch
    that was handed out, in both cases.
    """

    def __init__(self, loader: TrainLoader, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self._ahead = _Ahead(loader, device) if device.type == "cuda" else None

    def __iter__(self) -> "DevicePrefetcher":
        return self

    def __next__(self) -> dict[str, Any]:
        if self._ahead is not None:
            return self._ahead.next_batch()
        return to_device(next(self.loader), self.device)

    def state_dict(self) -> dict[str, Any]:
        """As `TrainLoader.state_dict`."""
        return self._ahead.state if self._ahead is not None else self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `TrainLoader.load_state_dict`; a batch on its way is dropped."""
        self.loader.load_state_dict(state)
        if self._ahead is not None:
            self._ahead = _Ahead(self.loader, self.device)

    def close(self) -> None:
        """End the loader's workers."""
        self.loader.close()


class _Ahead:
    """One batch ahead of the training step, on a side stream."""

    def __init__(self, loader: TrainLoader, device: torch.device) -> None:
        self.state = loader.state_dict()
        self._loader = loader
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._fetched: tuple[dict[str, Any], dict[str, Any]] | None = None

    def next_batch(self) -> dict[str, Any]:
        batch, self.state = self._fetched or self._fetch()
        training = torch.cuda.current_stream(self._device)
        training.wait_stream(self._stream)
        # Without this the allocator may give the memory away while the training stream still reads it.
        batch["image"].record_stream(training)
        self._fetched = self._fetch()
        return batch

    def _fetch(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The loader's next batch, on its way to the device, and the position behind it."""
        batch = next(self._loader)
        image = batch["image"]
        batch = {**batch, "image": image if image.is_pinned() else image.pin_memory()}
        with torch.cuda.stream(self._stream):
            return to_device(batch, self._device), self._loader.state_dict()
