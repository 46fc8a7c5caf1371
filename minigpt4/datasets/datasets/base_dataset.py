"""What a dataset is: shards of samples that are read when asked for, in an order that its keys alone decide."""

import heapq
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from minigpt4.common.errors import ConfigError, SampleError
from minigpt4.common.utils import require_readable
from minigpt4.datasets.feature_store import CachedBatch, CachedImage, FeatureStore, image_digest
from minigpt4.processors.base_processor import BaseProcessor
from minigpt4.processors.blip_processors import Uint8Image, process_image, read_file

T = TypeVar("T")
TRAIN = "train"


@dataclass(frozen=True)
class LazySample:
    """One sample that can be read."""

    key: str
    """Name of the sample, "" where it is a whole file that fails."""
    file: str
    """Where it stands: the shard, or the annotation file with line or record."""
    load: Callable[[], dict[str, Any]]
    """Reads the sample: {"image": as `ImageReader.read` gives it, "image_id": str, "answer": str, or in place
    of the answer "conv_q", "conv_a" and "connect_sym", or "conversations" with a list of images}. SampleError when the
    data is bad; other errors are bugs."""

    @classmethod
    def failing(cls, file: str, error: SampleError) -> "LazySample":
        """A sample that cannot be read."""
        return cls("", file, partial(_raise, error))


def _raise(error: Exception) -> NoReturn:
    raise error


def require_caption(caption: Any, where: str) -> str:
    """The caption; SampleError unless it is text of which nothing was lost."""
    if not isinstance(caption, str):
        raise SampleError(f"{where}: the caption must be text, it is {caption!r:.80}")
    if not caption.strip():
        raise SampleError(f"{where}: the caption is empty")
    return require_readable(caption, f"{where}: the caption")


@dataclass(eq=False)
class BaseDataset(ABC):
    """One split of a dataset. It is handed to worker processes, so it must pickle.

    It is cut into shards, what is opened as a whole: a record of a JSON file, a tar or a part of one.
    """

    name: str
    split: str

    @property
    def label(self) -> str:
        """`name/split`, for logs and states."""
        return f"{self.name}/{self.split}"

    @abstractmethod
    def num_shards(self, readers: int) -> int:
        """Number of shards when so many readers share them; at least 1."""

    @abstractmethod
    def open(self, shard: int, readers: int, random: np.random.Generator | None) -> Iterator[LazySample]:
        """The samples of a shard, shuffled where `random` is given; nothing is decoded before `LazySample.load`."""

    @abstractmethod
    def quick_samples(self) -> Iterator[LazySample]:
        """Samples whose loading is a cheap look at the data, for `python -m minigpt4.datasets.check`."""

    @abstractmethod
    def describe(self) -> str:
        """What there is to read, such as `3,439 records`."""

    def modality_lengths(self) -> np.ndarray:
        """Of each shard, which is a sample then: its length in words, negative without image, never 0; (N,) int64.

        ConfigError where the format does not tell; `group_by_modality_length` needs it.
        """
        raise ConfigError(f"datasets.{self.name}.group_by_modality_length: {type(self).__name__} tells no lengths")

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """{"image": as `join_images` gives it, "source": name of the dataset, every other key: list of B}."""
        batch = {key: [sample[key] for sample in samples] for key in samples[0]}
        return {**batch, "image": join_images(batch["image"]), "source": self.name}


@dataclass
class ImageReader:
    """Reads images as a model takes them."""

    processor: BaseProcessor
    """PIL image -> (3, S, S)."""
    features: FeatureStore | None = None
    """Of images that went through `processor`; None: there is no cache."""

    def read(self, source: Path | bytes, name: str | None = None) -> Tensor | Uint8Image | CachedImage:
        """A `Uint8Image` (3, S, S), or float32 pixels if the processor gives none; where there is a cache, a
        `CachedImage`. SampleError, which calls it `name`, if the image cannot be read."""
        store = self.features
        if store is None:
            return process_image(getattr(self.processor, "uint8", self.processor), source, name)
        if isinstance(source, Path):
            name = name or str(source)
            source = read_file(source, name)
        digest, folder = image_digest(source), str(store.folder)
        features = store.get(digest)
        if features is not None:
            return CachedImage(folder, digest, torch.from_numpy(features.copy()))
        unknown_QV = torch.zeros(store.shape.tokens, store.shape.width, dtype=getattr(torch, store.shape.dtype))
        return CachedImage(folder, digest, unknown_QV, process_image(self.processor, source, name))


def join_images(
    images: Sequence[Tensor] | Sequence[Uint8Image] | Sequence[CachedImage],
) -> Tensor | Uint8Image | CachedBatch:
    """A batch of images: (B, 3, S, S) float32 or uint8, or a batch of a cache; an empty tensor for none."""
    if images and isinstance(images[0], CachedImage):
        return CachedBatch.of(images)
    if images and isinstance(images[0], Uint8Image):
        return Uint8Image.joined(images)
    return torch.stack(list(images)) if images else torch.empty(0)


# The order of the samples: no global random state is read or changed.


class ReaderSlot(NamedTuple):
    """One reader among all: a worker of a rank."""

    index: int
    count: int

    @classmethod
    def of_rank(cls, rank: int, world_size: int, num_workers: int) -> "list[ReaderSlot]":
        """Slots of the workers of a rank, or the one of the rank itself when it has none."""
        workers = max(1, num_workers)
        return [cls(rank + world_size * worker, world_size * workers) for worker in range(workers)]


class Cursor(NamedTuple):
    """Position of a reader: so many of its shards are behind it, and so many samples of the next one."""

    shard: int = 0
    offset: int = 0


def generator(*key: int | str) -> np.random.Generator:
    """A random generator that depends on the key alone, the same in every process."""
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(numbers)))


class Shuffle(NamedTuple):
    """Key of the order of one dataset, whose label (`name/split`) makes it independent of the others.

    `reshuffle_round` counts how often the order was begun anew, because a resumed run has other readers than before.
    """

    seed: int
    label: str
    reshuffle_round: int = 0

    def num_units(self, shards: int) -> int:
        """Entries of `order`."""
        return shards

    def order(self, shards: int, epoch: int) -> np.ndarray:
        """Permutation of the shards in this epoch, (shards,) int64."""
        return generator(*self, epoch).permutation(shards)

    def inside(self, epoch: int, shard: int) -> np.random.Generator:
        """For the order inside a shard."""
        return generator(*self, epoch, shard)


class GroupedShuffle(NamedTuple):
    """LLaVA's order, `group_by_modality_length`: entry u of an epoch holds the samples of a batch of rank u % ranks.

    An epoch that does not end with a batch of every rank takes samples of its beginning once more, as accelerate does.
    A bad sample is made up for by the reader's next one, so its later batches begin one sample later.
    """

    key: Shuffle
    lengths: np.ndarray
    """(N,) int64, those of `BaseDataset.modality_lengths`."""
    batch_size: int
    world_size: int

    def num_units(self, shards: int) -> int:
        """Entries of `order`."""
        return -(-shards // (self.batch_size * self.world_size)) * self.world_size

    def order(self, shards: int, epoch: int) -> np.ndarray:
        """The batches of this epoch, (units, batch_size) int64."""
        seed = int(generator(*self.key, epoch).integers(2**63))
        order = modality_length_order(
            self.lengths, self.batch_size, self.world_size, torch.Generator().manual_seed(seed)
        )
        return np.resize(order, (self.num_units(shards), self.batch_size))

    def inside(self, epoch: int, shard: int) -> np.random.Generator:
        """For the order inside a shard."""
        return self.key.inside(epoch, shard)


def modality_length_order(
    lengths: np.ndarray, batch_size: int, world_size: int, random: torch.Generator | None = None
) -> np.ndarray:
    """LLaVA's permutation of samples: batches of one modality and of similar length, (N,) int64.

    A step (a batch for each rank) takes its samples at random from one modality, the longest first, and deals them so
    that the ranks' sums are alike. Steps come at random; what is left of both modalities makes the last ones.

    Args:
        lengths: (N,), negative for text alone; ValueError for a 0.
        random: None: torch's global generator, whose draws are the original's.
    """
    if not lengths.all():
        raise ValueError("lengths: a sample cannot have length 0")
    size = batch_size * world_size
    with_image, without = (lengths > 0).nonzero()[0], (lengths < 0).nonzero()[0]
    if not (len(with_image) and len(without)):
        return np.concatenate(_length_grouped_steps(lengths, size, world_size, random))
    whole, left = [], []
    for members in (with_image, without):
        steps = [members[step] for step in _length_grouped_steps(abs(lengths[members]), size, world_size, random)]
        whole += steps[:-1]
        left.append(steps[-1])
    mixed = torch.randperm(len(whole), generator=random).tolist()
    return np.concatenate([*(whole[number] for number in mixed), np.sort(np.concatenate(left))])


def _length_grouped_steps(
    lengths: np.ndarray, size: int, world_size: int, random: torch.Generator | None
) -> list[np.ndarray]:
    """A permutation of indices cut into steps of `size` samples, each the batches of its ranks one after another."""
    indices = torch.randperm(len(lengths), generator=random).numpy()
    steps = []
    for start in range(0, len(indices), size):
        step = indices[start : start + size]
        step = step[np.argsort(-lengths[step], kind="stable")]
        room, odd = divmod(len(step), world_size)
        if odd:
            steps.append(np.concatenate([step[rank::world_size] for rank in range(world_size)]))
            continue
        batches: list[list[int]] = [[] for _ in range(world_size)]
        sums = [(0, rank) for rank in range(world_size)]  # a heap
        for index in step.tolist():
            total, rank = heapq.heappop(sums)
            batches[rank].append(index)
            if len(batches[rank]) < room:
                heapq.heappush(sums, (total + int(lengths[index]), rank))
        steps.append(np.array(batches, dtype=np.int64).reshape(-1))
    return steps


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


def iter_infinite(
    dataset: BaseDataset, slot: ReaderSlot, shuffle: Shuffle | GroupedShuffle, cursor: Cursor
) -> Iterator[tuple[Cursor, LazySample]]:
    """The samples of a reader from `cursor` on, each with the position after it; never ends.

    The shards of all epochs, each epoch in an order of its own, make one endless row, of which reader s of n takes
    places s, s + n, s + 2n, ... So readers never share a shard of an epoch, and none runs dry. In a `GroupedShuffle` a
    place holds several shards.
    """
    shards = dataset.num_shards(slot.count)
    units = shuffle.num_units(shards)
    number, offset = cursor
    epoch, order = -1, None
    while True:
        current, place = divmod(slot.index + slot.count * number, units)
        if current != epoch:
            epoch, order = current, shuffle.order(shards, current)
        samples = chain.from_iterable(
            dataset.open(int(shard), slot.count, shuffle.inside(epoch, int(shard)))
            for shard in np.atleast_1d(order[place])
        )
        for done, sample in enumerate(islice(samples, offset, None), start=offset + 1):
            yield Cursor(number, done), sample
        number, offset = number + 1, 0


def iter_once(dataset: BaseDataset, slot: ReaderSlot) -> Iterator[tuple[Cursor, LazySample]]:
    """The samples of a reader in the data's own order; all readers together read every sample once."""
    for shard in range(slot.index, dataset.num_shards(slot.count), slot.count):
        for done, sample in enumerate(dataset.open(shard, slot.count, None), start=1):
            yield Cursor(shard, done), sample


def draw(weights: list[float], seed: int, iteration: int) -> int:
    """Index of the source of an iteration, with probability by weight; the same on all ranks."""
    edges = np.cumsum(weights)
    point = generator(seed, "source", iteration).random() * edges[-1]
    return int(min(np.searchsorted(edges, point, side="right"), len(weights) - 1))
