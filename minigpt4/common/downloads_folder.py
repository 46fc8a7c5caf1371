"""A folder of weights and its `manifest.json`: what is there, where it came from, is it still whole."""

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from minigpt4.common.download import PATIENT, Expected, Fetched, Retry, fetch, part_of, replace_durably
from minigpt4.common.downloads_checks import check_opens, digest
from minigpt4.common.downloads_http import drive_url
from minigpt4.common.downloads_table import WeightsEntry
from minigpt4.common.errors import WeightsError
from minigpt4.common.output_files import human

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
BY_HAND = "already there"


@dataclass(frozen=True)
class Record:
    """One file of the manifest; its key there is the path below the weights folder."""

    name: str
    source: str
    bytes: int
    sha256: str


class WeightsFolder:
    """Where the weights of a table lie."""

    def __init__(self, root: Path, retry: Retry = PATIENT) -> None:
        self.root = root
        self.retry = retry
        self.manifest = root / MANIFEST

    def records(self) -> dict[str, Record]:
        """The manifest by path; empty where there is none yet; WeightsError if it cannot be read."""
        if not self.manifest.exists():
            return {}
        try:
            files = json.loads(self.manifest.read_text(encoding="utf-8"))["files"]
            return {path: Record(**record) for path, record in files.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise WeightsError(
                f"{self.manifest}: not a manifest of weights ({error}); delete it, the next run writes it"
            ) from error

    def has(self, entry: WeightsEntry) -> bool:
        """Whether the manifest knows the entry and its files still have their sizes; reads no content."""
        files = {path: record for path, record in self.records().items() if record.name == entry.name}
        return bool(files) and all(_size(self.root / path) == record.bytes for path, record in files.items())

    def missing_bytes(self, entries: list[WeightsEntry]) -> int:
        """Bytes still to come for these entries, by the table's sizes and what an earlier run left."""
        total = 0
        for entry in entries:
            if self.has(entry):
                continue
            target = self.root / entry.path
            kept = _tree_size(target) + (_size(part_of(target)) or 0)
            total += max(0, (entry.bytes or entry.about) - kept)
        return total

    def free_bytes(self) -> int:
        """Free space of the disk on which the folder is, or will be."""
        place = self.root.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def need_room(self, entries: list[WeightsEntry]) -> None:
        """WeightsError if what is still to come does not fit on the disk."""
        missing, free = self.missing_bytes(entries), self.free_bytes()
        if missing > free:
            raise WeightsError(
                f"{self.root}: about {human(missing)} still to come, {human(free)} free on this disk; make "
                "room, or choose another folder with --dir"
            )

    def get(self, entry: WeightsEntry) -> list[Fetched]:
        """Fetch an entry from the first of its sources that gives it, and note it; [] if it was there."""
        if self.has(entry):
            return []
        target = self.root / entry.path
        if not entry.is_repository and target.exists():
            files = [_adopt(entry, target)]
        else:
            files = self._from_sources(entry, target)
        self._note(entry, files)
        return files

    def verify(self, names: set[str]) -> list[str]:
        """Hash the files of these entries again; one line for every one that is missing or has changed."""
        problems = []
        for path, record in self.records().items():
            if record.name not in names:
                continue
            file = self.root / path
            if _size(file) is None:
                problems.append(f"{file}: missing")
            elif _size(file) != record.bytes:
                problems.append(f"{file}: {_size(file)} bytes, {record.bytes} when it was downloaded")
            elif digest(file) != record.sha256:
                problems.append(f"{file}: its content has changed since it was downloaded")
        return problems

    def _from_sources(self, entry: WeightsEntry, target: Path) -> list[Fetched]:
        refusals = []
        for source in entry.sources:
            try:
                return self._from_source(entry, source, target)
            except WeightsError as error:
                logger.warning("%s", error)
                refusals.append(str(error))
        raise WeightsError(f"{entry.name}: no source gave it.\n  " + "\n  ".join(refusals))

    def _from_source(self, entry: WeightsEntry, source: str, target: Path) -> list[Fetched]:
        scheme, _, rest = source.partition(":")
        if scheme == "hf":
            from minigpt4.common.downloads_hub import (
                fetch_repository,
            )  # huggingface_hub takes a second to load

            return fetch_repository(rest, target, entry.ignore, self.retry)
        expected = Expected(entry.bytes, entry.sha256)
        if scheme == "gdrive":
            return [
                fetch(
                    lambda opener, timeout: drive_url(opener, rest, timeout),
                    target,
                    expected,
                    self.retry,
                    source,
                )
            ]
        return [fetch(source, target, expected, self.retry)]

    def _note(self, entry: WeightsEntry, files: list[Fetched]) -> None:
        records = {path: record for path, record in self.records().items() if record.name != entry.name}
        for file in files:
            path = file.path.relative_to(self.root).as_posix()
            records[path] = Record(entry.name, file.source, file.bytes, file.sha256)
        part = part_of(self.manifest)
        content = {"files": {path: asdict(record) for path, record in sorted(records.items())}}
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        replace_durably(part, self.manifest)


def _adopt(entry: WeightsEntry, target: Path) -> Fetched:
    """Take a file that somebody put there, if it is the published one as far as that can be told."""
    size, sha256 = target.stat().st_size, digest(target)
    wrong_size = entry.bytes is not None and size != entry.bytes
    if wrong_size or (entry.sha256 and sha256 != entry.sha256):
        raise WeightsError(
            f"{target}: there already, but not the published {entry.name} ({size} bytes, sha256 {sha256}); "
            "move it away and run the same command again"
        )
    check_opens(target)
    return Fetched(target, BY_HAND, size, sha256)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _tree_size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return _size(path) or 0
