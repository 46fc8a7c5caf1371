"""People judge generated descriptions: who is shown which, what they said, and what that says about the set.

python scripts/curate.py review FOLDER               # the page; 4_filtered.jsonl in, 5_reviews.jsonl out
python scripts/curate.py review FOLDER --summary     # counts, agreement and the share that is good, as JSON
"""

import argparse
import hashlib
import logging
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, Literal, NotRequired

from minigpt4.common.binding import checked, fields_of
from minigpt4.common.errors import ConfigError, RunError, SampleError
from minigpt4.common.run_folder import fcntl
from minigpt4.common.utils import as_json, json_line, parse_json
from minigpt4.curation.records import NAMES, TEXTS, CurationFolder, text_of
from minigpt4.evaluation.bootstrap import agreement, wilson
from minigpt4.serving.address import add_address_arguments, require_address

log = logging.getLogger(__name__)

ACCEPT, EDIT, REJECT = VERDICTS = ("accept", "edit", "reject")
SECONDS = {"seconds": NotRequired[float | None]}
VERDICT = fields_of(id=str | int, reviewer=str, verdict=Literal[VERDICTS], text=TEXTS, reasons=NAMES, **SECONDS)
REASONS = ("wrong about the image", "invented", "repeats", "unfinished", "not English", "other")
"""Of a rejection, in the order of their keys."""
AHEAD = 3
"""Records whose images are loaded before their turn."""
HELD = 600
"""Seconds for which a record that is shown to one is kept from others."""
PAUSE = 120
"""Seconds; a verdict that took longer counts as so long in the pace."""
PACE_OF = 50
"""Last verdicts that the pace is taken from."""

Fields = Mapping[str, Any]


def near_rules(record: Fields) -> list[str]:
    """Rules that the text failed, nearly failed, or has to be reviewed for, the last with what shows it."""
    pile = [f"{one.get('rule')} ({one.get('evidence')})" for one in record.get("review") or ()]
    return [*map(str, record.get("failed_rules") or ()), *map(str, record.get("near_rules") or ()), *pile]


def _objects(content: bytes) -> Iterator[dict[str, Any]]:
    """Of JSON lines. Where files were joined, a line that was cut off may stand before a verdict."""
    for line in content.split(b"\n"):
        for start in (0, max(line.rfind(b'{"id": '), 0)):
            with suppress(ValueError):
                if isinstance(found := parse_json(line[start:]), dict):
                    yield found
                break


def _time(verdict: Fields) -> str:
    return str(verdict.get("time", ""))  # in UTC, so that the order of letters is that of time


class VerdictFile:
    """Verdicts that several processes append to one file; files of several servers may be joined."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.latest: dict[str, dict[str, Fields]] = {}
        """What counts, by record and reviewer: the later verdict of the same reviewer."""
        self._read = 0
        """Bytes of whole lines that are in `latest`."""

    def refresh(self) -> None:
        """Take what was appended since."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        self._read += content.rfind(b"\n") + 1
        for one in _objects(content):
            try:
                checked(VERDICT, one, self.path)
            except SampleError as error:
                log.warning("%s; the line does not count: %.100s", error, one)
                continue
            own = self.latest.setdefault(str(one["id"]), {})
            if _time(one) >= _time(own.get(one["reviewer"], {})):
                own[one["reviewer"]] = one

    def append(self, verdict: Fields) -> None:
        """Write a verdict, on the disk when this returns; RunError if the disk refuses."""
        line = json_line(verdict).encode()
        try:
            with self.path.open("a+b") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)
                if size := file.seek(0, os.SEEK_END):
                    file.seek(size - 1)
                    line = line if file.read(1) == b"\n" else b"\n" + line  # a kill cut the last line off
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror}); give the verdict again") from error


class Review:
    """Which record a reviewer is shown next. Several threads may ask.

    Args:
        records: of `4_filtered.jsonl`; those that left are left out.
        overlap: share of the records, evenly spread, that two people judge.
        order: `hash`, or `worst`: most failed and near rules first.
        sample: so many records, the first by hash, which makes them a random sample; None: all.
        reviewers: names among which the records are dealt by hash, for servers that know nothing of each other; without
            names everybody gets what is open next.
    """

    def __init__(
        self,
        records: Sequence[Fields],
        verdicts: VerdictFile,
        *,
        overlap: float = 0.0,
        order: Literal["hash", "worst"] = "hash",
        sample: int | None = None,
        reviewers: Sequence[str] = (),
    ) -> None:
        by_key = {str(one["id"]): one for one in records if "dropped" not in one}
        keys = sorted(by_key, key=_hash)[:sample]
        self.wanted = {key: 1 + round((n + 1) * overlap) - round(n * overlap) for n, key in enumerate(keys)}
        """Verdicts of different people that a record needs."""
        if order == "worst":
            keys.sort(key=lambda key: -len(near_rules(by_key[key])))
        self.records = {key: by_key[key] for key in keys}
        self.verdicts, self.order, self.reviewers = verdicts, order, list(dict.fromkeys(reviewers))
        self._lock, self._skips = threading.RLock(), count()
        self._skipped: dict[tuple[str, str], int] = {}
        """When, by reviewer and record."""
        self._shown: dict[str, tuple[str, float]] = {}
        """By reviewer, and since when by the monotonic clock."""

    def queue(self, reviewer: str) -> list[str]:
        """What is open to a person, the next first; what they skipped comes last."""
        with self._lock:
            self.verdicts.refresh()
            busy = {key: set(own) for key, own in self.verdicts.latest.items()}
            for name, (key, since) in self._shown.items():
                if name != reviewer and time.monotonic() - since < HELD:
                    busy.setdefault(key, set()).add(name)
            found = [
                key
                for key in self.records
                if reviewer not in (own := busy.get(key, ())) and len(own) < self.wanted[key]
                if not self.reviewers or reviewer in self._dealt_to(key)
            ]
            return sorted(found, key=lambda key: self._skipped.get((reviewer, key), -1))

    def show(self, reviewer: str, key: str | None = None) -> list[str]:
        """The record `key`, or else the next one, and those to load ahead; empty: all is done."""
        with self._lock:
            shown = ([key] if key in self.records else []) + [one for one in self.queue(reviewer) if one != key]
            self._shown[reviewer] = shown[0] if shown else "", time.monotonic()
            return shown[: 1 + AHEAD]

    def judge(self, reviewer: str, key: str, verdict: str, text: str = "", reasons: Sequence[str] = ()) -> None:
        """Write a verdict; an edit that changes nothing is an acceptance. SampleError for one that cannot be."""
        if not reviewer or key not in self.records:
            raise SampleError("there is no such record; reload the page")
        text = text.strip()
        if verdict == EDIT and not text:
            raise SampleError("the text is empty; reject it instead")
        if verdict == EDIT and text == text_of(self.records[key]):
            verdict = ACCEPT
        with self._lock:
            shown, since = self._shown.get(reviewer, ("", 0.0))
            self.verdicts.append(
                {"id": self.records[key]["id"], "reviewer": reviewer, "verdict": verdict}
                | ({"text": text} if verdict == EDIT else {})
                | {"reasons": [one for one in REASONS if one in reasons] if verdict == REJECT else []}
                | {"seconds": round(time.monotonic() - since, 1) if shown == key else 0.0}
                | {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
            )

    def skip(self, reviewer: str, key: str) -> None:
        """Put a record behind all others of this person."""
        self._skipped[reviewer, key] = next(self._skips)

    def back(self, reviewer: str, key: str) -> str:
        """What this person judged before `key`, or last if they did not judge `key`; `key` before the first."""
        given = [str(one["id"]) for one in self._by(reviewer)]
        return ([key] + (given[: given.index(key)] if key in given else given))[-1]

    def progress(self, reviewer: str) -> str:
        """How far a person is, how fast, and what time is left."""
        given, left = self._by(reviewer), len(self.queue(reviewer))
        line = f"{len(given)} of {len(given) + left}"
        if given:
            seconds = [min(max(float(one.get("seconds") or 0), 0.1), PAUSE) for one in given[-PACE_OF:]]
            each = sum(seconds) / len(seconds)
            line += f" · {60 / each:.1f} verdicts a minute · {math.ceil(left * each / 60)} min left"
        return line

    def _by(self, reviewer: str) -> list[Fields]:
        """The verdicts of a person on these records, in the order in which they were given."""
        with self._lock:
            self.verdicts.refresh()
            given = (self.verdicts.latest.get(key, {}).get(reviewer) for key in self.records)
            return sorted((one for one in given if one), key=_time)

    def summary(self) -> dict[str, Any]:
        """Counts, how far reviewers agree, and the share of good texts with its 95% interval.

        A text is good as it is if all who judged it accept it, and with edits if nobody rejects it. The shares are None
        where what was judged is no random sample: nothing, or in part and the worst first.
        """
        with self._lock:
            self.verdicts.refresh()
            given = [dict(own) for key in self.records if (own := self.verdicts.latest.get(key))]
        everything = [one for own in given for one in own.values()]
        names = sorted({one["reviewer"] for one in everything})
        said = [{one["verdict"] for one in own.values()} for own in given]
        good = {"good": sum(own == {ACCEPT} for own in said), "good_with_edits": sum(REJECT not in own for own in said)}
        is_fair = said and (self.order == "hash" or len(said) == len(self.records))
        return {
            "records": len(self.records),
            "reviewed": len(said),
            **{
                name: {"share": number / len(said), "interval": wilson(number, len(said))} if is_fair else None
                for name, number in good.items()
            },
            "reviewers": {n: Counter(one["verdict"] for one in everything if one["reviewer"] == n) for n in names},
            "reasons": Counter(reason for one in everything for reason in one.get("reasons") or ()),
            "agreement": agreement([[own.get(name, {}).get("verdict") for name in names] for own in given]),
        }

    def _dealt_to(self, key: str) -> list[str]:
        """Of `reviewers`, those who are to judge a record."""
        names, digest = self.reviewers, _hash(key)
        first = int.from_bytes(digest[-4:]) % len(names)
        step = 1 + int.from_bytes(digest[-8:-4]) % max(1, len(names) - 1)
        return [names[first], names[(first + step) % len(names)]][: self.wanted[key]]


def _hash(key: str) -> bytes:
    return hashlib.sha256(f"review {key}".encode("utf-8", "surrogatepass")).digest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `main`."""
    parser.add_argument("folder", type=Path, help="of the curation; verdicts go into its 5_reviews.jsonl")
    parser.add_argument("--sample", type=int, metavar="N", help="review a random sample, to estimate the good share")
    parser.add_argument("--overlap", type=float, default=0.0, help="share that two people judge, for agreement (0)")
    parser.add_argument("--order", choices=("hash", "worst"), default="hash", help="worst: most near rules first")
    parser.add_argument("--reviewers", nargs="*", default=[], metavar="NAME", help="deal the records among these names")
    parser.add_argument("--summary", action="store_true", help="print what was found as JSON, and show no page")
    add_address_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Show the page until a signal comes, or print the summary."""
    if not 0 <= args.overlap <= 1:
        raise ConfigError(f"--overlap: {args.overlap} must be between 0 and 1")
    if args.sample is not None and args.sample < 1:
        raise ConfigError(f"--sample: {args.sample} must be above 0")
    settings = {name: getattr(args, name) for name in ("overlap", "order", "sample", "reviewers")}
    folder = CurationFolder(args.folder)
    review = Review(folder.read("filter"), VerdictFile(folder.file("review")), **settings)
    if not review.records:
        raise ConfigError(f"{folder.file('filter')}: no records were kept, so there is nothing to review")
    if args.summary:
        sys.stdout.write(as_json(review.summary()))
        return
    require_address(args)
    from minigpt4.curation.review_page import ReviewPage
    from minigpt4.serving.page_gate import show

    show(ReviewPage(review, args.folder), args)
