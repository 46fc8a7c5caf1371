"""The batches of one dataset for one rank, and the position behind the last one."""

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minigpt4.datasets.base import Dataset
from minigpt4.datasets.order import Shuffle, Slot
from minigpt4.datasets.packets import Cursor, Packet, packets, walk_forever
from minigpt4.datasets.workers import read_packets

logger = logging.getLogger(__name__)

MAX_PATIENCE = 10_000
"""Bad samples in a row after which a reader gives up even if the run's limit is higher."""


@dataclass(frozen=True)
class TrainSource:
    """One dataset of the mix."""

    dataset: Dataset
    batch_size: int
    ratio: float = 1.0
    """Its weight among the sources."""


@dataclass(frozen=True)
class Geometry:
    """What the order of the data depends on, beside the data."""

    seed: int
    rank: int
    world_size: int
    num_workers: int

    @property
    def readers(self) -> int:
        """Slots of this rank."""
        return max(1, self.num_workers)

    def slot(self, worker: int) -> Slot:
        return Slot.of(self.rank, self.world_size, worker, self.readers)


class SourceReader:
    """Packets of one source, for ever, from any position.

    Args:
        source: dataset and batch size.
        geometry: seed, rank and workers.
        max_in_a_row: bad samples in a row after which a reader gives up.
        pin_memory: for the workers' images.
    """

    def __init__(self, source: TrainSource, geometry: Geometry, *, max_in_a_row: int, pin_memory: bool) -> None:
        self.source = source
        self.geometry = geometry
        self._patience = min(max_in_a_row, MAX_PATIENCE)
        self._pin_memory = pin_memory
        self._packets: Iterator[Packet] | None = None
        self._begin(era=0)

    @property
    def label(self) -> str:
        return self.source.dataset.label

    def next_packet(self) -> Packet:
        """The next packet; its workers start with the first one."""
        if self._packets is None:
            self._packets = self._start()
        packet = next(self._packets)
        self._cursors[packet.worker] = packet.cursor
        self._turn = (packet.worker + 1) % self.geometry.readers
        return packet

    def close(self) -> None:
        """End the workers; the position stays, and reading may go on from it."""
        self._packets = None

    def state_dict(self) -> dict[str, Any]:
        """Position after the last packet that `next_packet` returned."""
        return {
            "order": self._order(),
            "era": self._era,
            "turn": self._turn,
            "cursors": [cursor.as_list() for cursor in self._cursors],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, exactly; in a new order, with a warning, if the run is cut otherwise than before."""
        self.close()
        if state["order"] == self._order():
            self._era, self._turn = state["era"], state["turn"]
            self._cursors = [Cursor(*numbers) for numbers in state["cursors"]]
            return
        changed = [key for key, value in self._order().items() if state["order"].get(key) != value]
        logger.warning(
            "%s: %s changed since the checkpoint, so its data goes on with a new pass in a new order",
            self.label,
            ", ".join(f"{key} ({state['order'].get(key)} -> {self._order()[key]})" for key in changed),
        )
        self._begin(era=state["era"] + 1)

    def _begin(self, era: int) -> None:
        self._era = era
        self._turn = 0
        self._cursors = [Cursor()] * self.geometry.readers

    def _order(self) -> dict[str, int]:
        geometry = self.geometry
        units = self.source.dataset.units(geometry.slot(0).count)
        return {
            "seed": geometry.seed,
            "world_size": geometry.world_size,
            "num_workers": geometry.num_workers,
            "units": units,
        }

    def _start(self) -> Iterator[Packet]:
        geometry = self.geometry
        return read_packets(
            functools.partial(
                _make_packets,
                source=self.source,
                geometry=geometry,
                shuffle=Shuffle(geometry.seed, self.label, self._era),
                cursors=tuple(self._cursors),
                patience=self._patience,
            ),
            source=self.label,
            num_workers=geometry.num_workers,
            first=self._turn,
            pin_memory=self._pin_memory,
        )


def _make_packets(
    worker: int,
    *,
    source: TrainSource,
    geometry: Geometry,
    shuffle: Shuffle,
    cursors: tuple[Cursor, ...],
    patience: int,
) -> Iterator[Packet]:
    """What a worker process runs."""
    walk = walk_forever(source.dataset, geometry.slot(worker), shuffle, cursors[worker])
    return packets(source.dataset, walk, batch_size=source.batch_size, patience=patience, worker=worker)
