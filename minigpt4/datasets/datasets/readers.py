"""Worker processes that make packets, or none at all, behind one iterator.

No worker outlives the process that started it, and that process never waits for a worker to end: both would leave
a run hanging, on this machine or on those of the other ranks.
"""

import atexit
import ctypes
import functools
import logging
import multiprocessing
import os
import signal
import sys
import traceback
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from minigpt4.common.errors import RunError, SampleError
from minigpt4.datasets.datasets.base_dataset import BadSample, Dataset, LazySample
from minigpt4.datasets.feature_store import join_images

log = logging.getLogger(__name__)


# The order of the data: pure functions of seed, dataset, pass, rank and worker; no global random state.
#
# A dataset is cut into units (a record of a JSON file, a tar shard or a part of one). The units of all passes,
# each pass in an order of its own, make one endless row, and slot `s` of `n` takes places s, s + n, s + 2n, ...
# of it. So slots never share a unit of a pass, none runs dry, and with one slot a rank the first k units of all
# ranks together are the same however many ranks there are.


T = TypeVar("T")


@dataclass(frozen=True)
class ReaderSlot:
    """One reader among all: a worker of a rank."""

    index: int
    count: int

    @classmethod
    def of(cls, rank: int, world_size: int, worker: int, num_workers: int) -> "ReaderSlot":
        """ReaderSlot of a worker; `num_workers` counts per rank, at least 1 (the rank itself when it has none)."""
        return cls(rank + world_size * worker, world_size * num_workers)


def generator(*key: int | str) -> np.random.Generator:
    """A random generator that depends on the key alone, the same in every process."""
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(numbers)))


@dataclass(frozen=True)
class Shuffle:
    """Key of the order of one dataset."""

    seed: int
    label: str
    """The dataset's `name/split`, so that one dataset's order does not depend on the others."""

    era: int = 0
    """Counts how often the row was begun anew, because a resumed run has other slots than the one before."""

    def order(self, units: int, pass_: int) -> np.ndarray:
        """Permutation of the units in this pass, (units,) int64."""
        return generator(self.seed, self.label, self.era, pass_).permutation(units)

    def inside(self, pass_: int, unit: int) -> np.random.Generator:
        """For the order inside a unit."""
        return generator(self.seed, self.label, self.era, pass_, unit)


def shuffled(items: Iterable[T], random: np.random.Generator, size: int) -> Iterator[T]:
    """`items` through a buffer of `size`: each item leaves from a random place, which the next one takes."""
    held: list[T] = []
    for item in items:
        if len(held) < size:
            held.append(item)
            continue
        place = int(random.integers(size))
        yield held[place]
        held[place] = item
    for place in random.permutation(len(held)):
        yield held[place]


def draw(weights: list[float], seed: int, iteration: int) -> int:
    """Index of the source of an iteration, with probability by weight; the same on all ranks."""
    edges = np.cumsum(weights)
    point = generator(seed, "source", iteration).random() * edges[-1]
    return int(min(np.searchsorted(edges, point, side="right"), len(weights) - 1))


# From a dataset to batches: what one slot (a worker of a rank) reads, with its position behind every batch.


@dataclass(frozen=True)
class Cursor:
    """Position of a slot: so many units are behind it, so many samples of the next one are done.

    A batch ends with a good sample, so there is no run of bad ones to remember.
    """

    unit: int = 0
    done: int = 0

    def as_list(self) -> list[int]:
        """Plain, for a state."""
        return [self.unit, self.done]


@dataclass(frozen=True)
class WorkerBatch:
    """What a worker hands over: a batch, and what happened on the way to it."""

    worker: int
    cursor: Cursor
    """Position after the batch."""

    batch: dict[str, Any] | None
    """None when no sample could be read."""

    good: int
    """Samples of the batch; fewer than asked for: the reader gave up, or the data of an evaluation ended."""

    bad: list[BadSample]
    longest_bad_run: int

    def pin_memory(self, device: Any = None) -> "WorkerBatch":
        """Called by torch's DataLoader when it pins."""
        if self.batch is None:
            return self
        return replace(self, batch={**self.batch, "image": self.batch["image"].pin_memory()})


def iter_infinite(
    dataset: Dataset, slot: ReaderSlot, shuffle: Shuffle, cursor: Cursor = Cursor()
) -> Iterator[tuple[Cursor, LazySample]]:
    """The steps of a slot from `cursor` on, each with the position after it; never ends."""
    units = dataset.units(slot.count)
    ordered_pass, order = -1, None
    unit, done = cursor.unit, cursor.done
    while True:
        pass_, place = divmod(slot.index + slot.count * unit, units)
        if pass_ != ordered_pass:
            ordered_pass, order = pass_, shuffle.order(units, pass_)
        chosen = int(order[place])
        steps = dataset.open(chosen, slot.count, shuffle.inside(pass_, chosen))
        for done_now, step in enumerate(islice(steps, done, None), start=done + 1):
            yield Cursor(unit, done_now), step
        unit, done = unit + 1, 0


def iter_once(dataset: Dataset, slot: ReaderSlot) -> Iterator[tuple[Cursor, LazySample]]:
    """The steps of a slot in the data's own order; all slots together read every sample once."""
    for unit in range(slot.index, dataset.units(slot.count), slot.count):
        for done, step in enumerate(dataset.open(unit, slot.count, None), start=1):
            yield Cursor(unit, done), step


def packets(
    dataset: Dataset,
    walk: Iterable[tuple[Cursor, LazySample]],
    *,
    batch_size: int,
    patience: int,
    worker: int = 0,
) -> Iterator[WorkerBatch]:
    """Batches of the steps; bad samples are left out and reported.

    After `patience` bad samples in a row a packet goes out with what there is, so that no reader searches
    for ever. Errors that are no SampleError are bugs and pass through.
    """
    draft = _BatchBuilder(dataset, worker)
    for position, step in walk:
        draft.read(position, step)
        if len(draft.good) == batch_size or (draft.run and draft.run % patience == 0):
            yield draft.packet()
    if draft.good or draft.bad:
        yield draft.packet()


class _BatchBuilder:
    """A packet in the making."""

    def __init__(self, dataset: Dataset, worker: int) -> None:
        self.dataset = dataset
        self.worker = worker
        self.run = 0
        self.position = Cursor()
        self._begin()

    def _begin(self) -> None:
        self.good: list[dict[str, Any]] = []
        self.bad: list[BadSample] = []
        self.longest = 0

    def read(self, position: Cursor, step: LazySample) -> None:
        self.position = position
        try:
            self.good.append(step.load())
            self.run = 0
        except SampleError as error:
            self.bad.append(BadSample(self.dataset.label, step.key, step.file, str(error)))
            self.run += 1
            self.longest = max(self.longest, self.run)

    def packet(self) -> WorkerBatch:
        """What was read since the last packet."""
        batch = collate(self.good, self.dataset.name) if self.good else None
        packet = WorkerBatch(self.worker, self.position, batch, len(self.good), self.bad, self.longest)
        self._begin()
        return packet


def collate(samples: list[dict[str, Any]], source: str) -> dict[str, Any]:
    """{"image": as `join_images` gives it, "source": str, every other key: list of B}."""
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    return {**batch, "image": join_images(batch["image"]), "source": source}


# The batches of one dataset for one rank, and the position behind the last one.


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

    def slot(self, worker: int) -> ReaderSlot:
        return ReaderSlot.of(self.rank, self.world_size, worker, self.readers)


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
        self._packets: Iterator[WorkerBatch] | None = None
        self._begin(era=0)

    @property
    def label(self) -> str:
        return self.source.dataset.label

    def next_worker_batch(self) -> WorkerBatch:
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
        """Position after the last packet that `next_worker_batch` returned."""
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
        log.warning(
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

    def _start(self) -> Iterator[WorkerBatch]:
        geometry = self.geometry
        return read_worker_batches(
            functools.partial(
                _make_worker_batches,
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


def _make_worker_batches(
    worker: int,
    *,
    source: TrainSource,
    geometry: Geometry,
    shuffle: Shuffle,
    cursors: tuple[Cursor, ...],
    patience: int,
) -> Iterator[WorkerBatch]:
    """What a worker process runs."""
    walk = iter_infinite(source.dataset, geometry.slot(worker), shuffle, cursors[worker])
    return packets(source.dataset, walk, batch_size=source.batch_size, patience=patience, worker=worker)


PREFETCH = 2
"""Packets that each worker makes ahead."""

LOOK = 60.0
"""Seconds of waiting for a packet after which a warning tells of it."""

PATIENCE = 30
"""Such waits in a row before it is an error; the other ranks do not wait longer for this one either. They are counted,
not measured, so that a job that a scheduler suspends and wakes up goes on."""

_SAVE_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when the thread that forked it ends."""

_running: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()
os.register_at_fork(after_in_child=_running.clear)


def read_worker_batches(
    make: Callable[[int], Iterator[WorkerBatch]],
    *,
    source: str,
    num_workers: int,
    first: int = 0,
    pin_memory: bool = False,
) -> Iterator[WorkerBatch]:
    """Packets of the readers in turn: first, first + 1, ..., round and round until all have ended.

    Args:
        make: the packets of reader `worker`, 0 <= worker < max(1, num_workers).
        source: what is read, for errors.
        num_workers: processes, which end with the thread that calls this; 0: read here, when asked.
        first: the reader whose turn it is.
        pin_memory: put images into page-locked memory, in a thread.

    An error in a worker is a RuntimeError here, with the worker's traceback; RunError if a worker hangs.
    """
    if num_workers == 0:
        return make(0)
    return _checked(_start(make, num_workers, first, pin_memory), source)


def _start(
    make: Callable[[int], Iterator[WorkerBatch]], num_workers: int, first: int, pin_memory: bool
) -> Iterator["WorkerBatch | _Failure"]:
    loader = DataLoader(
        _Turns(make, first, num_workers),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH,
        timeout=LOOK,
        worker_init_fn=functools.partial(_settle, os.getpid()),
        # torch would draw a seed for the workers from the global generator, which belongs to the model.
        generator=torch.Generator().manual_seed(0),
    )
    # Signals wait until the new process has said what to do with them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SAVE_SIGNALS)
    others = set(multiprocessing.active_children())
    try:
        return iter(loader)
    finally:
        _running.update(set(multiprocessing.active_children()) - others)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _checked(packets: Iterator["WorkerBatch | _Failure"], source: str) -> Iterator[WorkerBatch]:
    for packet in _patiently(packets, source):
        if isinstance(packet, _Failure):
            raise RuntimeError(f"a data worker failed; its traceback:\n{packet.traceback}")
        yield packet


def _patiently(packets: Iterator["WorkerBatch | _Failure"], source: str) -> Iterator["WorkerBatch | _Failure"]:
    looks = 0
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except RuntimeError as error:
            if "timed out after" not in str(error):
                raise
            looks += 1
            waited = f"{source}: no batch for {looks * LOOK / 60:.3g} minutes"
            if looks >= PATIENCE:
                raise RunError(
                    f"{waited}: a data worker hangs. Look whether the storage answers; run.resume_ckpt_path=auto goes "
                    "on from the last checkpoint"
                ) from error
            log.warning("%s; the data workers are slow, or the storage does not answer", waited)
        else:
            looks = 0
            yield packet


@dataclass(frozen=True)
class _Failure:
    """The last word of a worker. A worker that lets torch pass the error on holds its end up by ten seconds."""

    traceback: str


class _Turns(IterableDataset):
    """Gives process i the reader whose turn is i-th; torch asks the processes in turn."""

    def __init__(self, make: Callable[[int], Iterator[WorkerBatch]], first: int, num_workers: int) -> None:
        self._make = make
        self._first = first
        self._num_workers = num_workers

    def __iter__(self) -> Iterator[WorkerBatch | _Failure]:
        try:
            yield from self._make((self._first + get_worker_info().id) % self._num_workers)
        except Exception:
            yield _Failure(traceback.format_exc())


def _unchanged(packet: WorkerBatch | _Failure) -> WorkerBatch | _Failure:
    return packet


def _settle(parent: int, worker: int) -> None:
    """Stay until the process `parent` ends, whatever else happens, and not longer."""
    _outlive_signals()
    _die_with(parent)


def _outlive_signals() -> None:
    """Schedulers and terminals signal every process; the run must be able to save before its workers die."""
    for number in _SAVE_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SAVE_SIGNALS)


def _die_with(parent: int) -> None:
    """Have this process killed when its parent dies.

    A worker that is left over keeps the sockets of its rank open, and the other ranks wait for an answer. By itself
    it looks for its parent only every few seconds, and never while it hangs in a read.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was too fast
        os._exit(1)


@atexit.register
def _kill_workers() -> None:
    """At the end of the process, before multiprocessing asks them by SIGTERM, which they ignore, and waits for ever.

    That a loader has ended its workers before is not certain: the traceback of an error may hold it.
    """
    left = [process for process in _running if process.is_alive()]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report each as a failure
    for process in left:
        process.kill()
