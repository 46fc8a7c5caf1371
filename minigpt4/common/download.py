"""Fetch a file over HTTP, or a repository of Hugging Face: resumed after a break, checked before it gets its name.

The bytes go to `NAME.part` (`NAME.part.json` beside it remembers what they belong to). Only a complete and
checked file is renamed to `NAME`: what has its right name is good; a killed download goes on where it was.
"""

import base64
import fcntl
import html.parser
import http.client
import http.cookiejar
import json
import logging
import os
import random
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import filter_repo_objects
from tqdm import tqdm

from minigpt4.common.errors import WeightsError
from minigpt4.common.torch_files import CHUNK, WEIGHTS_SUFFIXES, check_not_text, check_opens, digest
from minigpt4.common.utils import human

log = logging.getLogger(__name__)

T = TypeVar("T")

DRIVE = "https://drive.usercontent.google.com/download"
BUSY_STATUS = {408, 425, 429, 500, 502, 503, 504}
REFUSALS = {401: "needs a login", 403: "is forbidden, or no longer shared", 404: "is not there"}
FAULTS = (OSError, http.client.HTTPException)  # URLError, resets, time-outs and short reads are among them

Address = str | Callable[[urllib.request.OpenerDirector, float], str]
"""A URL, or what finds a short-lived one, given the opener and a time-out in seconds."""

# OSError, the base of the HTTP library that this huggingface_hub uses, and what its storage client raises.
HUB_FAULTS = (*HfHubHTTPError.__bases__, RuntimeError)
IGNORED = (".gitattributes", "*.msgpack", "*.h5", "original/*")  # other frameworks' copies of the weights


@dataclass(frozen=True)
class Remote:
    """What the server said of the file; kept beside a part, to see whether the rest still belongs to it."""

    source: str
    etag: str | None = None
    total: int | None = None
    md5: str | None = None
    sha256: str | None = None


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
        replace_durably(job.part, target)
        job.notes.unlink(missing_ok=True)
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
                if failures >= self.retry.tries:
                    raise WeightsError(
                        f"{self.target.name} from {self.source}: {fault}, {failures} times in a row. "
                        f"{human(self.have)} are kept; run the same command again to go on"
                    ) from fault
                wait = self.retry.wait(failures, fault.wait)
                log.warning("%s: %s; trying again in %.0f s", self.target.name, fault, wait)
                time.sleep(wait)
        return None

    def check(self) -> str:
        """The sha256 of the complete part; WeightsError, and nothing left, if it is not the file expected."""
        name, size = self.target.name, self.expected.bytes
        try:
            check_opens(self.part, name)
            if size is not None and self.have != size:
                raise WeightsError(f"{name}: {self.have} bytes came, expected {size}")
            sha256 = digest(self.part)
            wanted = self.expected.sha256 or self.remote.sha256
            if wanted and sha256 != wanted:
                raise WeightsError(f"{name}: its sha256 is {sha256}, expected {wanted}")
            if not wanted and self.remote.md5 and (md5 := digest(self.part, "md5")) != self.remote.md5:
                raise WeightsError(f"{name}: its md5 is {md5}, the server says {self.remote.md5}")
        except WeightsError as error:
            self.part.unlink(missing_ok=True)
            self.notes.unlink(missing_ok=True)
            raise WeightsError(f"{error} (from {self.source}; nothing was kept)") from error
        return sha256

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
            while True:
                try:
                    chunk = response.read1(CHUNK)
                except FAULTS as error:
                    raise _BrokenOffError(f"the connection broke at {human(self.have)} ({error})") from error
                if not chunk:
                    return
                self._write(file, memoryview(chunk))
                bar.update(len(chunk))

    def _write(self, file: BinaryIO, rest: memoryview) -> None:
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


# What servers say of a file, and the ways there: redirects, Google Drive's forms.


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Remembers, on the first request, the hash that Hugging Face names while it redirects to its storage."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None:
            following.first = getattr(req, "first", req)
            if linked := headers.get("X-Linked-ETag"):
                following.first.linked_etag = linked
        return following


def make_opener() -> urllib.request.OpenerDirector:
    """An opener that follows redirects, keeps cookies and honours the proxy variables of the environment."""
    cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
    opener = urllib.request.build_opener(_Redirects, cookies)
    opener.addheaders = [("User-Agent", "minigpt4-download"), ("Accept-Encoding", "identity")]
    return opener


def describe(response: http.client.HTTPResponse, request: urllib.request.Request, source: str) -> Remote:
    """Length and hashes of the whole file, as far as the answer (also a partial one) tells them."""
    headers = response.headers
    if response.status == 206:
        total = (headers.get("Content-Range") or "").rpartition("/")[2]
    else:
        total = headers.get("Content-Length") or ""
    etag = headers.get("ETag") or ""
    return Remote(
        source=source,
        etag=etag if etag.startswith('"') else None,  # a weak one (W/"...") may not be used with If-Range
        total=int(total) if total.isdigit() else None,
        md5=_reported_md5(response),
        sha256=_reported_sha256(response, request),
    )


def range_start(response: http.client.HTTPResponse) -> int | None:
    """The offset at which a partial answer (206) begins."""
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    return int(found[1]) if found else None


def _reported_md5(response: http.client.HTTPResponse) -> str | None:
    """Hex MD5 of the whole file: Google's `x-goog-hash`, or Content-MD5 of a full answer."""
    goog = ",".join(response.headers.get_all("x-goog-hash", []))
    found = re.search(r"\bmd5=([A-Za-z0-9+/]{22}==)", goog)
    value = found[1] if found else None
    if value is None and response.status == 200:
        value = response.headers.get("Content-MD5")
    try:
        return base64.b64decode(value, validate=True).hex() if value else None
    except ValueError:
        return None


def _reported_sha256(response: http.client.HTTPResponse, request: urllib.request.Request) -> str | None:
    """Hugging Face's ETag of a large file is its sha256; other servers' ETags mean nothing."""
    headers = response.headers
    linked = getattr(request, "linked_etag", None) or headers.get("X-Linked-ETag")
    if linked is None and headers.get("X-Repo-Commit"):
        linked = headers.get("ETag")
    found = re.fullmatch(r'"?([0-9a-f]{64})"?', linked or "")
    return found[1] if found else None


def drive_url(opener: urllib.request.OpenerDirector, file_id: str, timeout: float, base: str = DRIVE) -> str:
    """Where the bytes of a shared Google Drive file come from, past the page that large files put before it.

    Raises:
        WeightsError: the page offers no download (quota used up, or not shared any more).
        urllib.error.HTTPError, OSError: as the server or the connection has it.
    """
    url = f"{base}?{urllib.parse.urlencode({'id': file_id, 'export': 'download', 'confirm': 't'})}"
    with opener.open(url, timeout=timeout) as response:
        if response.headers.get_content_type() != "text/html":
            return url
        form = _DownloadForm()
        form.feed(response.read(1 << 20).decode("utf-8", "replace"))
    if not form.action:
        raise WeightsError(
            f"Google Drive sends a web page in place of the file {file_id}: its download quota is used up, "
            "or it is no longer shared. Try again in a day, or open "
            f"https://drive.google.com/file/d/{file_id}/view in a browser and put the file into the folder"
        )
    action = urllib.parse.urljoin(url, form.action)
    return f"{action}?{urllib.parse.urlencode(form.fields)}" if form.fields else action


class _DownloadForm(html.parser.HTMLParser):
    """The form `download-form` of the virus scan page: its address and its hidden fields (with the token)."""

    def __init__(self) -> None:
        super().__init__()
        self.action = ""
        self.fields: dict[str, str] = {}
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if tag == "form" and found.get("id") == "download-form":
            self._inside, self.action = True, found.get("action", "")
        if tag == "input" and self._inside and "name" in found:
            self.fields[found["name"]] = found.get("value", "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._inside = False


# Repositories of Hugging Face, fetched by huggingface_hub; each file is compared with what the Hub says of it.


def fetch_repository(
    repository: str, folder: Path, ignore: tuple[str, ...] = (), retry: Retry = PATIENT
) -> list[Fetched]:
    """Bring `owner/name` into `folder`; every file has the size and, where the Hub knows it, the sha256.

    A stopped download goes on where it was. HF_ENDPOINT, HF_TOKEN and `hf auth login` work as everywhere.

    Raises:
        WeightsError: no access, no connection, no room, or a file that is not what the Hub says it is.
    """
    info = _patiently(
        repository, retry, lambda: HfApi().model_info(repository, files_metadata=True, timeout=retry.timeout)
    )
    skipped = [*IGNORED, *ignore]
    files = list(filter_repo_objects(info.siblings or [], ignore_patterns=skipped, key=lambda file: file.rfilename))
    _need_room(folder, files)
    _patiently(
        repository,
        retry,
        lambda: snapshot_download(repository, revision=info.sha, local_dir=folder, ignore_patterns=skipped),
    )
    return [_check(folder, file, f"hf:{repository}@{info.sha}") for file in files]


def _patiently(repository: str, retry: Retry, call: Callable[[], T]) -> T:
    """Call the Hub, again after faults of the connection; WeightsError where that cannot help."""
    failures = 0
    while True:
        try:
            return call()
        except (GatedRepoError, RepositoryNotFoundError) as error:
            raise WeightsError(_no_access(repository, error)) from error
        except HUB_FAULTS as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            lasting = status is not None and 400 <= status < 500 and status not in (408, 429)
            local = isinstance(error, OSError) and error.errno and not isinstance(error, LocalEntryNotFoundError)
            failures += 1
            if lasting or local or failures >= retry.tries:
                raise WeightsError(f"Hugging Face repository {repository}: {error}") from error
            wait = retry.wait(failures)
            log.warning("%s: %s; trying again in %.0f s", repository, error, wait)
            time.sleep(wait)


def _no_access(repository: str, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return (
            f"Hugging Face repository {repository} is gated: accept its licence at "
            f"https://huggingface.co/{repository}, then run `hf auth login` (or set HF_TOKEN) and try again"
        )
    return (
        f"Hugging Face has no repository {repository}, or hides it from you: look at "
        f"https://huggingface.co/{repository}; if it is private, run `hf auth login` (or set HF_TOKEN)"
    )


def _need_room(folder: Path, files: list[RepoSibling]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    missing = sum(file.size or 0 for file in files if not (folder / file.rfilename).exists())
    # What an interrupted run left lies in the library's own folder below.
    kept = sum(part.stat().st_size for part in (folder / ".cache").rglob("*.incomplete"))
    free = shutil.disk_usage(folder).free
    if missing - kept > free:
        raise WeightsError(
            f"{folder}: {human(missing - kept)} still to come, {human(free)} free on this disk; make room, "
            "or choose another folder"
        )


def _check(folder: Path, file: RepoSibling, source: str) -> Fetched:
    path = folder / file.rfilename
    size = path.stat().st_size
    sha256 = digest(path)
    wanted = file.lfs.sha256 if file.lfs else None
    try:
        if file.size is not None and size != file.size:
            raise WeightsError(f"{path}: {size} bytes, the Hub says {file.size}")
        if wanted and sha256 != wanted:
            raise WeightsError(f"{path}: its sha256 is {sha256}, the Hub says {wanted}")
        if path.suffix in WEIGHTS_SUFFIXES:
            check_opens(path)
    except WeightsError as error:
        path.unlink()
        raise WeightsError(f"{error} (from {source}; the file was deleted, run the same command again)") from error
    return Fetched(path, source, size, sha256)
