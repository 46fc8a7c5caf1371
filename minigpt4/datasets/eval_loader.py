"""The evaluation batches of one process: every sample once over all ranks, none twice."""

import functools
from collections.abc import Iterator
from typing import Any

from minigpt4.datasets.bad_samples import BadSampleLedger
from minigpt4.datasets.base import Dataset
from minigpt4.datasets.order import Slot
from minigpt4.datasets.packets import Packet, packets, walk_once
from minigpt4.datasets.source_reader import MAX_PATIENCE
from minigpt4.datasets.workers import read_packets


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
        ledger: BadSampleLedger,
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
        for packet in read_packets(self._maker(), source=self.dataset.label, num_workers=self.num_workers):
            self.ledger.add(self.dataset.label, packet.good, packet.bad, packet.longest_bad_run)
            if packet.batch is not None:
                yield packet.batch

    def _maker(self) -> functools.partial[Iterator[Packet]]:
        return functools.partial(
            _make_packets,
            dataset=self.dataset,
            first=self.rank,
            world_size=self.world_size,
            readers=max(1, self.num_workers),
            batch_size=self.batch_size,
            patience=min(self.ledger.max_in_a_row, MAX_PATIENCE),
        )


def _make_packets(
    worker: int, *, dataset: Dataset, first: int, world_size: int, readers: int, batch_size: int, patience: int
) -> Iterator[Packet]:
    """What a worker process runs."""
    slot = Slot.of(first, world_size, worker, readers)
    return packets(dataset, walk_once(dataset, slot), batch_size=batch_size, patience=patience, worker=worker)
