"""Batches of one process: for training endless, mixed and resumable to the sample, for evaluation each sample once."""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minigpt4.common.devices import is_gpu
from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.utils import JsonLines
from minigpt4.datasets.datasets.base_dataset import (
    BaseDataset,
    Cursor,
    GroupedShuffle,
    LazySample,
    ReaderSlot,
    Shuffle,
    draw,
    iter_infinite,
    iter_once,
)
from minigpt4.datasets.datasets.workers import read_in_workers
from minigpt4.processors import Uint8Image

log = logging.getLogger(__name__)

BAD_SAMPLES = "bad_samples.jsonl"
"""File in a run's folder."""
ENOUGH_TO_JUDGE = 20
"""Bad samples before their share is judged: a few unlucky ones at the start say nothing."""
SHOWN_REASONS = 3
MAX_BAD_IN_A_ROW = 10_000
"""Bad samples in a row after which a reader gives up even if the run's limit is higher."""


# Bad samples: counted for each dataset, written down, and the reason to stop when they are too many.


class BadSample(NamedTuple):
    """A sample that could not be used: `name/split` of its dataset, its name ("" for a whole file), its place."""

    source: str
    key: str
    file: str
    reason: str


class BadSampleMonitor:
    """Counts, records and limits of one process.

    Args:
        folder: bad samples are appended to `bad_samples.jsonl` there, by every rank; None: not written.
        max_share: share of bad samples of a dataset above which `add` raises; 0: the first one is too many.
        max_in_a_row: bad samples in a row, of one reader, at which `add` raises.
        rank: written beside each sample.
    """

    def __init__(self, folder: Path | None, *, max_share: float, max_in_a_row: int, rank: int = 0) -> None:
        self._file = JsonLines(folder / BAD_SAMPLES) if folder else None
        self.max_share, self.max_in_a_row, self.rank = max_share, max_in_a_row, rank
        self.at: dict[str, int] = {}
        """Where the run stands, written beside each sample: who goes on from a checkpoint drops what is later."""
        self.counts: dict[str, list[int]] = {}
        """[good, bad] by dataset."""

    def add(self, source: str, good: int, bad: Sequence[BadSample], in_a_row: int) -> None:
        """Count what a reader has read; `in_a_row` is its longest run of bad samples in it.

        SampleError, with counts, places and reasons, when a limit is passed.
        """
        counts = self.counts.setdefault(source, [0, 0])
        before = counts[1]
        counts[0] += good
        counts[1] += len(bad)
        if not bad:
            return
        for sample in bad if self._file else ():
            self._file.append({"rank": self.rank, **self.at, **sample._asdict()})
        share = counts[1] / sum(counts)
        summary = f"{source}: {counts[1]:,} of {sum(counts):,} samples are bad ({share:.2%})"
        summary += f"; all are in {self._file.path}." if self._file else "."
        if counts[1].bit_length() > before.bit_length():  # at 1, 2, 4, 8, ... bad samples
            log.warning("%s The last: %s", summary, bad[-1].reason)
        if in_a_row >= self.max_in_a_row:
            limit = f"{in_a_row} in a row, the limit run.max_bad_in_a_row"
        elif share > self.max_share and (counts[1] >= ENOUGH_TO_JUDGE or self.max_share == 0):
            limit = f"more than run.max_bad_share, {self.max_share:.2%}"
        else:
            return
        last = "\n  ".join(sample.reason for sample in bad[-SHOWN_REASONS:])
        raise SampleError(
            f"{summary} That is {limit}. The last:\n  {last}\n"
            "Fix the data (python -m minigpt4.datasets.check CFG --full lists what is bad) or raise the limit."
        )

    def state_dict(self) -> dict[str, list[int]]:
        """[good, bad] by dataset."""
        return {source: list(counts) for source, counts in self.counts.items()}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Counts of an earlier run, to count on from."""
        self.counts = {source: list(counts) for source, counts in state.items()}


# What one reader makes, in a worker process or here.


class WorkerBatch(NamedTuple):
    """What a worker hands over: a batch, and what happened on the way to it. torch pins what of it is in memory."""

    worker: int
    cursor: Cursor
    """Position after the batch. A batch ends with a good sample, so there is no run of bad ones to remember."""
    batch: dict[str, Any] | None
    """None when no sample could be read."""
    good: int
    """Samples of the batch; fewer than asked for: the reader gave up, or the data of an evaluation ended."""
    bad: list[BadSample]
    longest_bad_run: int


Read = Callable[[], Iterable[tuple[Cursor, LazySample]]]
"""Begins to read the samples of one reader, each with the position after it."""


def worker_batches(
    worker: int, *, dataset: BaseDataset, readers: Sequence[Read], batch_size: int, max_in_a_row: int
) -> Iterator[WorkerBatch]:
    """Batches of the samples of `readers[worker]`; bad samples are left out and reported.

    After `max_in_a_row` bad samples in a row a batch goes out with what there is, so that no reader searches for ever.
    """
    give_up = min(max_in_a_row, MAX_BAD_IN_A_ROW)
    good, bad, in_a_row, longest = [], [], 0, 0

    def made(cursor: Cursor) -> WorkerBatch:
        batch = dataset.collater(good) if good else None
        return WorkerBatch(worker, cursor, batch, len(good), bad, longest)

    for cursor, sample in readers[worker]():
        try:
            good.append(sample.load())
            in_a_row = 0
        except SampleError as error:
            bad.append(BadSample(dataset.label, sample.key, sample.file, str(error)))
            in_a_row += 1
            longest = max(longest, in_a_row)
        if len(good) == batch_size or (in_a_row and in_a_row % give_up == 0):
            yield made(cursor)
            good, bad, longest = [], [], 0
    if good or bad:
        yield made(cursor)


def read_batches(
    dataset: BaseDataset, readers: Sequence[Read], batch_size: int, *, max_in_a_row: int, num_workers: int, **keys: Any
) -> Iterator[WorkerBatch]:
    """`worker_batches` of all readers in turn, in worker processes if there are any; `keys` as of `read_in_workers`."""
    make = functools.partial(
        worker_batches, dataset=dataset, readers=readers, batch_size=batch_size, max_in_a_row=max_in_a_row
    )
    return read_in_workers(make, source=dataset.label, num_workers=num_workers, **keys) if num_workers else make(0)


@dataclass(frozen=True)
class TrainSource:
    """One dataset of the mix."""

    dataset: BaseDataset
    batch_size: int
    ratio: float = 1.0
    """Its weight among the sources."""
    group_by_modality_length: bool = False
    """Whether its order is a `GroupedShuffle`."""


class SourceReader:
    """Batches of one source, for ever, from any position; `options`: of `read_batches`.

    `order` is what the order depends on, beside the data and the slots: "seed", "world_size", "num_workers".
    """

    def __init__(self, source: TrainSource, slots: list[ReaderSlot], order: dict[str, int], **options: Any) -> None:
        self.source, self.label = source, source.dataset.label
        self._slots, self._options = slots, options
        self._lengths = source.dataset.modality_lengths() if source.group_by_modality_length else None
        shards = source.dataset.num_shards(slots[0].count)
        self._order = order | {"units": self._shuffle(order, 0).num_units(shards)}
        self._batches: Iterator[WorkerBatch] | None = None
        self._begin(reshuffle_round=0)

    def next_worker_batch(self) -> WorkerBatch:
        """The next batch; the workers start with the first one."""
        if self._batches is None:
            self._batches = self._start()
        batch = next(self._batches)
        self._cursors[batch.worker] = batch.cursor
        self._turn = (batch.worker + 1) % len(self._slots)
        return batch

    def close(self) -> None:
        """End the workers; the position stays, and reading may go on from it."""
        self._batches = None

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch that `next_worker_batch` returned."""
        return {
            "order": dict(self._order),
            "era": self._reshuffle_round,
            "turn": self._turn,
            "cursors": [list(cursor) for cursor in self._cursors],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, exactly; in a new order, with a warning, if the run is cut otherwise than before."""
        self.close()
        before, now = state["order"], self._order
        if before == now:
            self._reshuffle_round, self._turn = state["era"], state["turn"]
            self._cursors = [Cursor(*numbers) for numbers in state["cursors"]]
            return
        changed = [f"{key} ({before.get(key)} -> {now[key]})" for key in now if before.get(key) != now[key]]
        text = "%s: %s changed since the checkpoint, so its data goes on with a new epoch in a new order"
        log.warning(text, self.label, ", ".join(changed))
        self._begin(reshuffle_round=state["era"] + 1)

    def _begin(self, reshuffle_round: int) -> None:
        self._reshuffle_round, self._turn = reshuffle_round, 0
        self._cursors = [Cursor()] * len(self._slots)

    def _start(self) -> Iterator[WorkerBatch]:
        dataset, shuffle = self.source.dataset, self._shuffle(self._order, self._reshuffle_round)
        places = zip(self._slots, self._cursors, strict=True)
        return read_batches(
            dataset,
            [functools.partial(iter_infinite, dataset, slot, shuffle, cursor) for slot, cursor in places],
            self.source.batch_size,
            num_workers=self._order["num_workers"],
            first=self._turn,
            **self._options,
        )

    def _shuffle(self, order: dict[str, int], reshuffle_round: int) -> Shuffle | GroupedShuffle:
        key = Shuffle(order["seed"], self.label, reshuffle_round)
        if self._lengths is None:
            return key
        return GroupedShuffle(key, self._lengths, self.source.batch_size, order["world_size"])


class TrainLoader:
    """Iterates for ever over batches.

    A batch is {"image": Uint8Image (B, 3, S, S), "image_id": [str], "source": name of its dataset, "answer": [str]},
    or with "conv_q", "conv_a" and "connect_sym" in place of "answer"; `to_device` makes of it what a model takes.
    Each iteration draws its dataset by the ratios, the same one on all ranks. The order depends on seed, rank, number
    of ranks and workers alone; no global random state is read or changed. Bad samples are left out and go to the
    monitor; SampleError when it says that they are too many.

    Args:
        num_workers: processes for each source; 0: samples are read when they are asked for.
        seed: the same on all ranks.
        rank, world_size: which part of the data is read here.
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
        self._ledger, self._seed = ledger, seed
        self._ratios = [source.ratio for source in sources]
        slots = ReaderSlot.of_rank(rank, world_size, num_workers)
        order = {"seed": seed, "world_size": world_size, "num_workers": num_workers}
        options = {"max_in_a_row": ledger.max_in_a_row, "pin_memory": pin_memory}
        self._readers = [SourceReader(source, slots, order, **options) for source in sources]
        self._iteration = 0

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> dict[str, Any]:
        reader = self._readers[draw(self._ratios, self._seed, self._iteration)]
        read = reader.next_worker_batch()
        self._ledger.at = {"batch": self._iteration}
        self._ledger.add(reader.label, read.good, read.bad, read.longest_bad_run)
        if read.good < reader.source.batch_size:
            raise SampleError(
                f"{reader.label}: nothing could be read, {read.longest_bad_run:,} samples in a row are bad. "
                f"{read.bad[-1].reason}"
            )
        self._iteration += 1
        return read.batch

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch that was handed out, in plain types."""
        return {
            "iteration": self._iteration,
            "sources": {reader.label: reader.state_dict() for reader in self._readers},
            "counts": self._ledger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the next batch; where seed, ranks, workers or data changed, with a warning and a new epoch."""
        self._iteration = state["iteration"]
        self._ledger.load_state_dict(state["counts"])
        for reader in self._readers:
            if reader.label in state["sources"]:
                reader.load_state_dict(state["sources"][reader.label])
            else:
                log.warning("%s: not in the checkpoint; its data is read from the start", reader.label)

    def close(self) -> None:
        """End all worker processes."""
        for reader in self._readers:
            reader.close()


@dataclass(eq=False)
class EvalLoader:
    """Every sample of one dataset once over all ranks, the same each time; the last batches may be smaller.

    Ranks get different numbers of batches, down to none, so nothing inside the loop may wait for other ranks.
    Batches, bad samples and arguments are those of `TrainLoader`; counts add up over the evaluations.
    """

    dataset: BaseDataset
    batch_size: int
    _: KW_ONLY
    num_workers: int
    ledger: BadSampleMonitor
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        slots = ReaderSlot.of_rank(self.rank, self.world_size, self.num_workers)
        for read in read_batches(
            self.dataset,
            [functools.partial(iter_once, self.dataset, slot) for slot in slots],
            self.batch_size,
            max_in_a_row=self.ledger.max_in_a_row,
            num_workers=self.num_workers,
        ):
            self.ledger.add(self.dataset.label, read.good, read.bad, read.longest_bad_run)
            if read.batch is not None:
                yield read.batch


# To the training device.


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch of a loader with its image on `device`, and there normalised: (B, 3, S, S) float32, or rows of a cache.

    The copy does not wait where the image is in pinned memory. A batch of texts alone has none.
    """
    if "image" not in batch:
        return batch
    image = batch["image"].to(device, non_blocking=True)
    return {**batch, "image": image.normalised() if isinstance(image, Uint8Image) else image}


class DevicePrefetcher:
    """Batches of a TrainLoader on `device`.

    On a GPU the next batch is fetched and copied, on a stream of its own, before the present one is handed out;
    `state_dict` is always the position behind the last batch that was handed out.
    """

    def __init__(self, loader: TrainLoader, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self._streams = torch.get_device_module(device.type)
        self._stream = self._streams.Stream(device) if is_gpu(device) else None
        self._ahead: tuple[dict[str, Any], dict[str, Any]] | None = None
        """On a GPU, the batch that comes next and the position behind it."""
        self._state = loader.state_dict()

    def __iter__(self) -> "DevicePrefetcher":
        return self

    def __next__(self) -> dict[str, Any]:
        if self._stream is None:
            return to_device(next(self.loader), self.device)
        batch, self._state = self._ahead or self._fetch()
        training = self._streams.current_stream(self.device)
        training.wait_stream(self._stream)
        # Without this the allocator may give the memory away while the training stream still reads it.
        if "image" in batch:
            batch["image"].record_stream(training)
        self._ahead = self._fetch()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """As `TrainLoader.state_dict`."""
        return self.loader.state_dict() if self._stream is None else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `TrainLoader.load_state_dict`; a batch on its way is dropped."""
        self.loader.load_state_dict(state)
        self._ahead, self._state = None, self.loader.state_dict()

    def close(self) -> None:
        """End the loader's workers."""
        self.loader.close()

    def _fetch(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The loader's next batch, on its way to the device, and the position behind it."""
        batch = next(self.loader)
        if "image" in batch:
            batch = {**batch, "image": batch["image"].pin_memory()}
        with self._streams.stream(self._stream):
            return to_device(batch, self.device), self.loader.state_dict()
