"""Bad samples: counted for each dataset, written down, and the reason to stop when they are too many."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from minigpt4.common.errors import SampleError

logger = logging.getLogger(__name__)

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


class BadSampleLedger:
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
            logger.warning("%s The last: %s", self._summary(source), bad[-1].reason)
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
            logger.warning("%s: cannot be written (%s); bad samples are only counted", self.file, error.strerror)

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
