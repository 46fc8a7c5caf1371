"""From a dataset to batches: what one slot (a worker of a rank) reads, with its position behind every batch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from minigpt4.common.errors import SampleError
from minigpt4.datasets.bad_samples import BadSample
from minigpt4.datasets.base import Dataset, Step
from minigpt4.datasets.order import Shuffle, Slot
from minigpt4.features import join_images


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
class Packet:
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

    def pin_memory(self, device: Any = None) -> "Packet":
        """Called by torch's DataLoader when it pins."""
        if self.batch is None:
            return self
        return replace(self, batch={**self.batch, "image": self.batch["image"].pin_memory()})


def walk_forever(
    dataset: Dataset, slot: Slot, shuffle: Shuffle, cursor: Cursor = Cursor()
) -> Iterator[tuple[Cursor, Step]]:
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


def walk_once(dataset: Dataset, slot: Slot) -> Iterator[tuple[Cursor, Step]]:
    """The steps of a slot in the data's own order; all slots together read every sample once."""
    for unit in range(slot.index, dataset.units(slot.count), slot.count):
        for done, step in enumerate(dataset.open(unit, slot.count, None), start=1):
            yield Cursor(unit, done), step


def packets(
    dataset: Dataset,
    walk: Iterable[tuple[Cursor, Step]],
    *,
    batch_size: int,
    patience: int,
    worker: int = 0,
) -> Iterator[Packet]:
    """Batches of the steps; bad samples are left out and reported.

    After `patience` bad samples in a row a packet goes out with what there is, so that no reader searches
    for ever. Errors that are no SampleError are bugs and pass through.
    """
    draft = _Draft(dataset, worker)
    for position, step in walk:
        draft.read(position, step)
        if len(draft.good) == batch_size or (draft.run and draft.run % patience == 0):
            yield draft.packet()
    if draft.good or draft.bad:
        yield draft.packet()


class _Draft:
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

    def read(self, position: Cursor, step: Step) -> None:
        self.position = position
        try:
            self.good.append(step.load())
            self.run = 0
        except SampleError as error:
            self.bad.append(BadSample(self.dataset.label, step.key, step.file, str(error)))
            self.run += 1
            self.longest = max(self.longest, self.run)

    def packet(self) -> Packet:
        """What was read since the last packet."""
        batch = collate(self.good, self.dataset.name) if self.good else None
        packet = Packet(self.worker, self.position, batch, len(self.good), self.bad, self.longest)
        self._begin()
        return packet


def collate(samples: list[dict[str, Any]], source: str) -> dict[str, Any]:
    """{"image": as `join_images` gives it, "source": str, every other key: list of B}."""
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    return {**batch, "image": join_images(batch["image"]), "source": source}
