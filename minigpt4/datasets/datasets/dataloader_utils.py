"""Batches on the training device, the next one on its way while the present one is trained on."""

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.datasets.datasets.base_dataset import BadSampleMonitor, Dataset
from minigpt4.datasets.datasets.readers import (
    MAX_PATIENCE,
    Geometry,
    ReaderSlot,
    SourceReader,
    TrainSource,
    WorkerBatch,
    draw,
    iter_once,
    packets,
    read_worker_batches,
)
from minigpt4.processors import Uint8Image

log = logging.getLogger(__name__)


# The training batches of one process: endless, mixed from several datasets, resumable to the sample.


class TrainLoader:
    """Iterates for ever over batches.

    A batch is {"image": Uint8Image (B, 3, S, S), "image_id": [str], "source": name of its dataset, "answer": [str]},
    or with "conv_q", "conv_a" and "connect_sym" in place of "answer"; `to_device` makes of it what a model takes.
    Each iteration draws its dataset by the ratios, the same one on all ranks. The order depends on seed, rank, number
    of ranks and workers alone; no global random state is read or changed.

    Bad samples are left out and go to the ledger; SampleError when it says that they are too many.

    Args:
        sources: the mix.
        num_workers: processes for each source; 0: samples are read when they are asked for.
        seed: the same on all ranks.
        rank, world_size: which part of the data is read here.
        ledger: counts bad samples and judges them.
        pin_memory: have the workers' batches put into page-locked memory.
    """

    def __init__(
        self,
        sources: Sequence[TrainSource],
        *,
        num_workers: int,
        seed: int,
        ledger: BadSampleMonitor,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if not sources:
            raise ConfigError("datasets: there is nothing to train on; name at least one dataset")
        geometry = Geometry(seed, rank, world_size, num_workers)
        self.ledger = ledger
        self._seed = seed
        self._ratios = [source.ratio for source in sources]
        self._readers = [
            SourceReader(source, geometry, max_in_a_row=ledger.max_in_a_row, pin_memory=pin_memory)
            for source in sources
        ]
        self._iteration = 0

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> dict[str, Any]:
        reader = self._readers[draw(self._ratios, self._seed, self._iteration)]
        packet = reader.next_worker_batch()
        self.ledger.at = {"batch": self._iteration}
        self.ledger.add(reader.label, packet.good, packet.bad, packet.longest_bad_run)
        if packet.good < reader.source.batch_size:
            raise _gave_up(reader.label, packet)
        self._iteration += 1
        return packet.batch

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch that was handed out, in ints, strings, lists and dicts.

        It belongs to this rank: bad samples let ranks drift apart. Where the number of ranks changes, every new
        rank takes the state of the same old one.
        """
        return {
            "iteration": self._iteration,
            "sources": {reader.label: reader.state_dict() for reader in self._readers},
            "counts": self.ledger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind that batch: with exactly the next one, if seed, ranks, workers and data are the same.

        Otherwise a warning says what changed, and the data concerned goes on with a new pass.
        """
        self._iteration = state["iteration"]
        self.ledger.load_state_dict(state["counts"])
        for reader in self._readers:
            if reader.label in state["sources"]:
                reader.load_state_dict(state["sources"][reader.label])
            else:
                log.warning("%s: not in the checkpoint; its data is read from the start", reader.label)

    def close(self) -> None:
        """End all worker processes."""
        for reader in self._readers:
            reader.close()


def _gave_up(label: str, packet: WorkerBatch) -> SampleError:
    last = packet.bad[-1].reason
    return SampleError(f"{label}: nothing could be read, {packet.longest_bad_run:,} samples in a row are bad. {last}")


# The evaluation batches of one process: every sample once over all ranks, none twice.


class EvalLoader:
    """A finite pass over one dataset, the same each time; the last batches may be smaller, nothing is padded.

    Ranks get different numbers of batches, down to none, so nothing inside the loop may wait for other ranks.
    Batches and bad samples are those of `TrainLoader`.

    Args:
        dataset: what to read.
        batch_size: samples of a batch.
        num_workers: processes; 0: read here.
        rank, world_size: which part is read here; 0 and 1 for all of it.
        ledger: counts bad samples and judges them; its counts add up over the passes.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        num_workers: int,
        ledger: BadSampleMonitor,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.ledger = ledger
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for packet in read_worker_batches(self._maker(), source=self.dataset.label, num_workers=self.num_workers):
            self.ledger.add(self.dataset.label, packet.good, packet.bad, packet.longest_bad_run)
            if packet.batch is not None:
                yield packet.batch

    def _maker(self) -> functools.partial[Iterator[WorkerBatch]]:
        return functools.partial(
            _make_worker_batches,
            dataset=self.dataset,
            first=self.rank,
            world_size=self.world_size,
            readers=max(1, self.num_workers),
            batch_size=self.batch_size,
            patience=min(self.ledger.max_in_a_row, MAX_PATIENCE),
        )


def _make_worker_batches(
    worker: int, *, dataset: Dataset, first: int, world_size: int, readers: int, batch_size: int, patience: int
) -> Iterator[WorkerBatch]:
    """What a worker process runs."""
    slot = ReaderSlot.of(first, world_size, worker, readers)
    return packets(dataset, iter_once(dataset, slot), batch_size=batch_size, patience=patience, worker=worker)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch of a loader with its image on `device`, and there normalised: (B, 3, S, S) float32, or rows of a cache.

    The copy does not wait where the image is in pinned memory.
    """
    image = batch["image"].to(device, non_blocking=True)
    return {**batch, "image": image.normalised() if isinstance(image, Uint8Image) else image}


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
