"""The training batches of one process: endless, mixed from several datasets, resumable to the sample."""

import logging
from collections.abc import Sequence
from typing import Any

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.datasets.bad_samples import BadSampleLedger
from minigpt4.datasets.order import draw
from minigpt4.datasets.packets import Packet
from minigpt4.datasets.source_reader import Geometry, SourceReader, TrainSource

logger = logging.getLogger(__name__)


class TrainLoader:
    """Iterates for ever over batches.

    A batch is {"image": Levels (B, 3, S, S), "image_id": [str], "source": name of its dataset, "answer": [str]},
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
        ledger: BadSampleLedger,
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
        packet = reader.next_packet()
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
                logger.warning("%s: not in the checkpoint; its data is read from the start", reader.label)

    def close(self) -> None:
        """End all worker processes."""
        for reader in self._readers:
            reader.close()


def _gave_up(label: str, packet: Packet) -> SampleError:
    last = packet.bad[-1].reason
    return SampleError(f"{label}: nothing could be read, {packet.longest_bad_run:,} samples in a row are bad. {last}")
