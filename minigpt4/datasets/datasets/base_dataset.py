"""What a format has to offer: a dataset of numbered units, and the builder that makes one for each split."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from minigpt4.common.errors import ConfigError, SampleError, errors_as
from minigpt4.common.registry import registry
from minigpt4.common.schemas import DatasetConfig
from minigpt4.datasets.feature_store import CachedImage, FeatureStore, image_digest
from minigpt4.processors import BaseProcessor, Uint8Image, process_image
from minigpt4.processors.images import open_file

if TYPE_CHECKING:
    from minigpt4.models.feature_cache import FeatureCache

log = logging.getLogger(__name__)


# Bad samples: counted for each dataset, written down, and the reason to stop when they are too many.


FILE_NAME = "bad_samples.jsonl"
ENOUGH_TO_JUDGE = 20
"""Bad samples before their share is judged: a few unlucky ones at the start say nothing."""

SHOWN_REASONS = 3


@dataclass(frozen=True)
class BadSample:
    """One sample that could not be used."""

    source: str
    """`name/split` of the dataset."""

    key: str
    """Name of the sample; "" for a whole file."""

    file: str
    """The shard, or the annotation file with line or record."""

    reason: str


@dataclass
class Counts:
    """Samples read from one dataset."""

    good: int = 0
    bad: int = 0

    @property
    def seen(self) -> int:
        return self.good + self.bad


class BadSampleMonitor:
    """Counts, records and limits of one process.

    Args:
        folder: bad samples are appended to `bad_samples.jsonl` there, by every rank; None: not written.
        max_share: share of bad samples of a dataset above which `add` raises; 0: the first one is too many.
        max_in_a_row: bad samples in a row, of one reader, at which `add` raises.
        rank: written beside each sample.
    """

    def __init__(self, folder: Path | None, *, max_share: float, max_in_a_row: int, rank: int = 0) -> None:
        self.file = folder / FILE_NAME if folder else None
        self.max_share = max_share
        self.max_in_a_row = max_in_a_row
        self.rank = rank
        self.at: dict[str, int] = {}
        """Where the run stands, written beside each sample: who goes on from a checkpoint drops what is later."""
        self.counts: dict[str, Counts] = {}

    def add(self, source: str, good: int, bad: Sequence[BadSample], in_a_row: int) -> None:
        """Count what a reader has read; `in_a_row` is its longest run of bad samples in it.

        SampleError, with counts, places and reasons, when a limit is passed.
        """
        counts = self.counts.setdefault(source, Counts())
        counts.good += good
        if not bad:
            return
        before, counts.bad = counts.bad, counts.bad + len(bad)
        self._write(bad)
        if counts.bad.bit_length() > before.bit_length():  # at 1, 2, 4, 8, ... bad samples
            log.warning("%s The last: %s", self._summary(source), bad[-1].reason)
        self._judge(source, bad, in_a_row)

    def describe(self, source: str) -> str:
        """`2 of 3,439 samples are bad (0.06%)`."""
        counts = self.counts.get(source, Counts())
        return f"{counts.bad:,} of {counts.seen:,} samples are bad ({counts.bad / max(counts.seen, 1):.2%})"

    def state_dict(self) -> dict[str, list[int]]:
        """[good, bad] by dataset."""
        return {source: [counts.good, counts.bad] for source, counts in self.counts.items()}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Counts of an earlier run, to count on from."""
        self.counts = {source: Counts(*numbers) for source, numbers in state.items()}

    def _summary(self, source: str) -> str:
        written = f"; all are in {self.file}" if self.file else ""
        return f"{source}: {self.describe(source)}{written}."

    def _write(self, bad: Sequence[BadSample]) -> None:
        if self.file is None:
            return
        lines = "".join(json.dumps({"rank": self.rank, **self.at, **asdict(sample)}) + "\n" for sample in bad)
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(lines)  # one write: lines of several ranks do not mix
        except OSError as error:
            log.warning("%s: cannot be written (%s); bad samples are only counted", self.file, error.strerror)

    def _judge(self, source: str, bad: Sequence[BadSample], in_a_row: int) -> None:
        counts = self.counts[source]
        judged = counts.bad >= ENOUGH_TO_JUDGE or self.max_share == 0
        if in_a_row >= self.max_in_a_row:
            raise self._too_many(source, bad, f"{in_a_row} in a row, the limit run.max_bad_in_a_row")
        if judged and counts.bad > self.max_share * counts.seen:
            raise self._too_many(source, bad, f"more than run.max_bad_share, {self.max_share:.2%}")

    def _too_many(self, source: str, bad: Sequence[BadSample], limit: str) -> SampleError:
        last = "".join(f"\n  {sample.reason}" for sample in bad[-SHOWN_REASONS:])
        return SampleError(
            f"{self._summary(source)} That is {limit}. The last:{last}\n"
            "Mend the data (python -m minigpt4.datasets.check CFG --full lists what is bad) or raise the limit."
        )


# How a dataset reads an image: from a file to pixels, or from a cache of features without decoding anything.


class ImageReader:
    """Reads the images of one split.

    Args:
        processor: PIL image -> (3, S, S).
        features: rows of images that went through `processor`; None: there is no cache.
    """

    def __init__(self, processor: BaseProcessor, features: FeatureStore | None = None) -> None:
        self.processor, self._features = processor, features

    def read(self, source: Path | bytes, name: str | None = None) -> Tensor | CachedImage:
        """Pixels (3, S, S) float32, or the image's row of the cache; SampleError if the image cannot be read.

        `name`: how errors call it, if it is not a file.
        """
        if self._features is None:
            return process_image(self.processor, source, name)
        content = source if isinstance(source, bytes) else _content(source)
        digest, store = image_digest(content), self._features
        row_QV = store.get(digest)
        if row_QV is not None:
            return CachedImage(str(store.folder), digest, torch.from_numpy(row_QV.copy()))
        pixels_3SS = process_image(self.processor, content, name or str(source))
        return CachedImage(str(store.folder), digest, torch.from_numpy(store.shape.empty()), pixels_3SS)

    def read_sample(self, source: Path | bytes, name: str | None = None) -> Tensor | Uint8Image | CachedImage:
        """The same for a batch on its way to the device: a `Uint8Image` (3, S, S) if the processor gives one."""
        if self._features is not None:
            return self.read(source, name)
        return process_image(self.processor, source, name, levels=True)


def _content(file: Path) -> bytes:
    with errors_as(SampleError, f"{file}: cannot be read"), open_file(file) as opened:
        return opened.read()


TRAIN = "train"


@dataclass(frozen=True)
class LazySample:
    """One sample that can be read."""

    key: str
    """Name of the sample, "" where it is a whole file that fails."""

    file: str
    """Where it stands: the shard, or the annotation file with line or record."""

    load: Callable[[], dict[str, Any]]
    """Reads the sample: {"image": Uint8Image (3, S, S), or float32 from a processor without levels, or a row of a
    feature cache, "image_id": str, "answer": str, or in place of the answer "conv_q", "conv_a" and "connect_sym"}.
    SampleError when the data is bad; other errors are bugs."""


class Dataset(ABC):
    """One split of a dataset. It is handed to worker processes, so it must pickle."""

    def __init__(self, name: str, split: str) -> None:
        self.name = name
        self.split = split

    @property
    def label(self) -> str:
        """`name/split`, for logs and states."""
        return f"{self.name}/{self.split}"

    @property
    @abstractmethod
    def size(self) -> int | None:
        """Number of samples, good and bad; None: only reading everything would tell."""

    @abstractmethod
    def units(self, slots: int) -> int:
        """Number of units when so many slots read; at least 1."""

    @abstractmethod
    def open(self, unit: int, slots: int, random: np.random.Generator | None) -> Iterator[LazySample]:
        """The samples of a unit, shuffled where `random` is given; nothing is decoded before `LazySample.load`."""

    @abstractmethod
    def quick_steps(self) -> Iterator[LazySample]:
        """Steps whose loading is a cheap look at the data, for `python -m minigpt4.datasets.check`."""

    @abstractmethod
    def describe(self) -> str:
        """What there is to read, such as `3,439 records`."""


def failing(error: Exception) -> Callable[[], dict[str, Any]]:
    """A `LazySample.load` that raises `error`."""

    def load() -> dict[str, Any]:
        raise error

    return load


class BaseBuilder(ABC):
    """Makes the datasets of one section under `datasets:`.

    Args:
        name: the section's name.
        config: the section; ConfigError if this format needs more than it says.
        cache: features of images that are known already.
    """

    SPLIT_KEYS: ClassVar[dict[str, str]]
    """Key of `build_info` that holds the files of a split."""

    def __init__(self, name: str, config: DatasetConfig, cache: "FeatureCache | None" = None) -> None:
        self.name = name
        self.config = config
        self.cache = cache

    @abstractmethod
    def build(self, split: str) -> Dataset:
        """The dataset of a split; ConfigError when there is none or its files cannot be used."""

    def splits(self) -> list[str]:
        """Splits that the section names files for."""
        return [split for split in self.SPLIT_KEYS if self._files(split)]

    def build_datasets(self, splits: Sequence[str] = (TRAIN,)) -> dict[str, Dataset]:
        """Datasets by split, without the splits that the section says nothing about."""
        known = self.splits()
        return {split: self.build(split) for split in splits if split in known}

    def vis_processor(self, split: str) -> BaseProcessor:
        """The image processor of a split."""
        section = self.config.vis_processor.train if split == TRAIN else self.config.vis_processor.eval
        return registry.get_processor_class(section.name).from_config({"name": section.name, **section.arguments()})

    def image_reader(self, split: str) -> ImageReader:
        """How images of a split are read: decoded, or from `self.cache` where they are known."""
        processor = self.vis_processor(split)
        return ImageReader(processor, self.cache.store(processor) if self.cache is not None else None)

    def text_processor(self, split: str) -> BaseProcessor:
        """The text processor of a split."""
        section = self.config.text_processor.train if split == TRAIN else self.config.text_processor.eval
        return registry.get_processor_class(section.name).from_config({"name": section.name, **section.arguments()})

    def error(self, text: str) -> ConfigError:
        """A ConfigError that names the section."""
        return ConfigError(f"datasets.{self.name}: {text}")

    def _files(self, split: str) -> str | None:
        key = self.SPLIT_KEYS.get(split)
        return getattr(self.config.build_info, key) if key else None

    def require_files(self, split: str) -> str:
        """What `build_info` says about the split; ConfigError if it says nothing."""
        files = self._files(split)
        if files:
            return files
        key = self.SPLIT_KEYS.get(split)
        wanted = f"set build_info.{key}" if key else f"the splits are {', '.join(self.SPLIT_KEYS)}"
        raise self.error(f"has no split {split!r}; {wanted}")
