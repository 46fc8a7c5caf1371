"""The order of the data: pure functions of seed, dataset, pass, rank and worker; no global random state.

A dataset is cut into units (a record of a JSON file, a tar shard or a part of one). The units of all passes,
each pass in an order of its own, make one endless row, and slot `s` of `n` takes places s, s + n, s + 2n, ...
of it. So slots never share a unit of a pass, none runs dry, and with one slot a rank the first k units of all
ranks together are the same however many ranks there are.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Slot:
    """One reader among all: a worker of a rank."""

    index: int
    count: int

    @classmethod
    def of(cls, rank: int, world_size: int, worker: int, num_workers: int) -> "Slot":
        """Slot of a worker; `num_workers` counts per rank, at least 1 (the rank itself when it has none)."""
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
