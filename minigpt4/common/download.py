"""Fetch one file over HTTP: resumed after a break, checked before it gets its name.

The bytes go to `NAME.part` (`NAME.part.json` beside it remembers what they belong to). Only a complete and
checked file is renamed to `NAME`: what has its right name is good; a killed download goes on where it was.
"""

import fcntl
import http.client
import json
import logging
import os
import random
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from minigpt4.common.downloads_checks import CHUNK, check_not_text, check_opens, digest
from minigpt4.common.downloads_http import Remote, describe, make_opener, range_start
from minigpt4.common.errors import WeightsError
from minigpt4.common.output_files import human

logger = logging.getLogger(__name__)

BUSY_STATUS = {408, 425, 429, 500, 502, 503, 504}
REFUSALS = {401: "needs a login", 403: "is forbidden, or no longer shared", 404: "is not there"}
FAULTS = (OSError, http.client.HTTPException)  # URLError, resets, time-outs and short reads are among them

Address = str | Callable[[urllib.request.OpenerDirector, float], str]
"""A URL, or what finds a short-lived one, given the opener and a time-out in seconds."""


@dataclass(frozen=True)
class Expected:
    """What is known about a file before it is fetched."""

    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Fetched:
    """A file that is in place, complete and checked."""

    path: Path
    source: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Retry:
    """How often, and how patiently, a fault of the connection is answered by another try."""

    tries: int = 8
    """Tries in a row that bring no byte before giving up."""
    first_wait: float = 1.0
    """Seconds before the second try; doubled each time, with up to 25 % added at random."""
    longest_wait: float = 60.0
    timeout: float = 60.0
    """Seconds without any byte after which the connection counts as lost."""

    def wait(self, failures: int, asked: float | None = None) -> float:
        """Seconds to wait after so many failures in a row; `asked` is the server's own wish."""
        wait = asked if asked is not None else self.first_wait * 2 ** (failures - 1)
        return min(wait, self.longest_wait) * (1 + random.random() / 4)


PATIENT = Retry()


class _BrokenOffError(Exception):
    """The transfer broke off; `wait` is how long the server asks to be left alone, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def fetch(
    address: Address,
    target: Path,
    expected: Expected = Expected(),
    retry: Retry = PATIENT,
    source: str | None = None,
) -> Fetched:
    """Download a file to `target`, going on with what an earlier try left.

    Args:
        source: what the file is known by, where `address` is not a lasting URL.
    Raises:
        WeightsError: the server refuses, the link stays broken, the disk is full, or the file is not the one
            expected. A part that failed a check is deleted; one whose link broke stays.
    """
    source = source or str(address)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(part_of(target)):
        job = _Job(address, target, source, expected, retry)
        job.transfer()
        sha256 = job.check()
        job.publish()
    return Fetched(target, source, target.stat().st_size, sha256)


def part_of(target: Path) -> Path:
    """Where the bytes of an unfinished download lie."""
    return target.with_name(target.name + ".part")


def replace_durably(part: Path, target: Path) -> None:
    """Rename `part` to `target`, on the disk before anything says so."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _lock(part: Path) -> Iterator[None]:
    """Two processes must not write into the same part; the lock goes with the process, even a killed one."""
    with part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WeightsError(f"{part}: another process is downloading it; wait for that one") from None
        try:
            yield
        finally:
            if part.exists() and part.stat().st_size == 0:
                part.unlink()


class _Job:
    """One file on its way."""

    def __init__(self, address: Address, target: Path, source: str, expected: Expected, retry: Retry) -> None:
        self.address, self.target, self.source = address, target, source
        self.expected, self.retry, self.opener = expected, retry, make_opener()
        self.part = part_of(target)
        self.notes = self.part.with_name(self.part.name + ".json")
        self.remote = self._recall()

    @property
    def have(self) -> int:
        """Bytes of the part."""
        return self.part.stat().st_size

    def transfer(self) -> None:
        """Fill the part, trying again after faults for as long as bytes keep coming."""
        failures = 0
        while not (self.have and self.have == self.remote.total):
            before = self.have
            try:
                return self._attempt()
            except _BrokenOffError as fault:
                failures = 1 if self.have > before else failures + 1
                self._wait(fault, failures)
        return None

    def check(self) -> str:
        """The sha256 of the complete part; WeightsError, and nothing left, if it is not the file expected."""
        try:
            sha256 = self._check()
        except WeightsError as error:
            self._forget()
            raise WeightsError(f"{error} (from {self.source}; nothing was kept)") from error
        return sha256

    def publish(self) -> None:
        """Give the part its name."""
        replace_durably(self.part, self.target)
        self.notes.unlink(missing_ok=True)

    def _check(self) -> str:
        name, size = self.target.name, self.expected.bytes
        check_opens(self.part, name)
        if size is not None and self.have != size:
            raise WeightsError(f"{name}: {self.have} bytes came, expected {size}")
        sha256 = digest(self.part)
        wanted = self.expected.sha256 or self.remote.sha256
        if wanted and sha256 != wanted:
            raise WeightsError(f"{name}: its sha256 is {sha256}, expected {wanted}")
        if not wanted and self.remote.md5 and (md5 := digest(self.part, "md5")) != self.remote.md5:
            raise WeightsError(f"{name}: its md5 is {md5}, the server says {self.remote.md5}")
        return sha256

    def _wait(self, fault: _BrokenOffError, failures: int) -> None:
        if failures >= self.retry.tries:
            raise WeightsError(
                f"{self.target.name} from {self.source}: {fault}, {failures} times in a row. "
                f"{human(self.have)} are kept; run the same command again to go on"
            ) from fault
        wait = self.retry.wait(failures, fault.wait)
        logger.warning("%s: %s; trying again in %.0f s", self.target.name, fault, wait)
        time.sleep(wait)

    def _attempt(self) -> None:
        try:
            request = self._request()
            response = self.opener.open(request, timeout=self.retry.timeout)
        except urllib.error.HTTPError as error:
            with error:
                return self._refused(error)
        except FAULTS as error:
            raise _BrokenOffError(f"no connection ({getattr(error, 'reason', error)})") from error
        with response:
            return self._receive(response, describe(response, request, self.source))

    def _request(self) -> urllib.request.Request:
        address = self.address
        url = address if isinstance(address, str) else address(self.opener, self.retry.timeout)
        request = urllib.request.Request(url)
        if self.have:
            request.add_header("Range", f"bytes={self.have}-")
            if self.remote.etag:
                request.add_header("If-Range", self.remote.etag)
        return request

    def _refused(self, error: urllib.error.HTTPError) -> None:
        """An answer that is not the file: the part is whole already, worth another try, or final."""
        if error.code == 416 and self.have:
            if (error.headers.get("Content-Range") or "").endswith(f"/{self.have}"):
                return
            self._restart("the part does not fit the file on the server")
        if error.code in BUSY_STATUS:
            asked = error.headers.get("Retry-After") or ""
            raise _BrokenOffError(f"HTTP {error.code} {error.reason}", float(asked) if asked.isdigit() else None)
        reason = REFUSALS.get(error.code, error.reason)
        raise WeightsError(f"{self.target.name}: {self.source} {reason} (HTTP {error.code})")

    def _receive(self, response: http.client.HTTPResponse, remote: Remote) -> None:
        start = 0
        if response.status == 206:
            start = self.have
            if range_start(response) != start or (self.remote.total and remote.total != self.remote.total):
                self._restart("the file on the server has changed")
            earlier = self.remote
            remote = replace(remote, md5=remote.md5 or earlier.md5, sha256=remote.sha256 or earlier.sha256)
        self._agree(response, remote)
        self._need_room(remote)
        self.remote = remote
        self.notes.write_text(json.dumps(asdict(remote)))
        with self.part.open("r+b", buffering=0) as file:
            file.truncate(start)  # a server that ignores Range sends the whole file again
            file.seek(start)
            self._copy(response, file)
        if remote.total is not None and self.have != remote.total:
            raise _BrokenOffError(f"the connection closed at {human(self.have)} of {human(remote.total)}")

    def _copy(self, response: http.client.HTTPResponse, file: BinaryIO) -> None:
        with tqdm(
            total=self.remote.total,
            initial=file.tell(),
            desc=self.target.name,
            unit="B",
            unit_scale=True,
            disable=None,  # shows nothing where the output is not a terminal
        ) as bar:
            while chunk := self._read(response):
                self._write(file, chunk)
                bar.update(len(chunk))

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.read1(CHUNK)
        except FAULTS as error:
            raise _BrokenOffError(f"the connection broke at {human(self.have)} ({error})") from error

    def _write(self, file: BinaryIO, chunk: bytes) -> None:
        rest = memoryview(chunk)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            raise WeightsError(
                f"{self.part}: cannot write ({error.strerror}). {human(self.have)} are kept; run the "
                "same command again to go on"
            ) from error

    def _agree(self, response: http.client.HTTPResponse, remote: Remote) -> None:
        """Raise before anything is written if the server has something else than the file expected."""
        if response.headers.get_content_type() == "text/html":
            check_not_text(b"<html", f"{self.target.name} from {self.source}")
        size = self.expected.bytes
        if size is not None and remote.total not in (None, size):
            raise WeightsError(
                f"{self.target.name}: {self.source} has {remote.total} bytes, expected {size}: another file"
            )

    def _need_room(self, remote: Remote) -> None:
        missing = (remote.total or 0) - self.have
        free = shutil.disk_usage(self.part.parent).free
        if missing > free:
            raise WeightsError(
                f"{self.target}: {human(missing)} still to come, {human(free)} free on this disk; make "
                "room, or choose another folder"
            )

    def _recall(self) -> Remote:
        """What an earlier try noted, if its part is of the same source; else the part is emptied."""
        try:
            remote = Remote(**json.loads(self.notes.read_text()))
        except (OSError, ValueError, TypeError):
            remote = None
        if remote is None or remote.source != self.source:
            os.truncate(self.part, 0)
            return Remote(self.source)
        return remote

    def _restart(self, reason: str) -> None:
        os.truncate(self.part, 0)
        self.remote = Remote(self.source)
        raise _BrokenOffError(f"{reason}; starting again", wait=0)

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)
