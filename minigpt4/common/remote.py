"""Files at addresses that fsspec reads (http, s3, gs, ...): a read that fails is repeated, and copies can be kept."""

import hashlib
import io
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from minigpt4.common.errors import ConfigError, RunError, errors_as, first_line
from minigpt4.common.utils import install_command, replacing

log = logging.getLogger(__name__)

T = TypeVar("T")

TRIES = 8
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds between two tries, doubled each time: about a minute in all."""
SILENCE = 60.0
"""Seconds without a byte after which a web server's answer counts as failed."""
BLOCK = 8 << 20
"""Bytes that are asked for at once where a file is read from its beginning to its end."""
_PASSING = (408, 425, 429)
"""Statuses below 500 after which a server wants to be asked again."""
_given_up: set[str] = set()
"""Hosts that all tries failed at: one try a file, until one answers."""


def is_remote(path: str | Path) -> bool:
    """Whether this is an address that fsspec reads; `pipe:` and `file:` are webdataset's."""
    scheme, mark, _ = str(path).partition("://")
    return bool(mark) and scheme != "file" and ":" not in scheme and "/" not in scheme


def suffix_of(path: str | Path) -> str:
    """Ending of a file's name, in small letters, without what follows `?` in an address."""
    path = urlsplit(path).path if is_remote(path) else path
    return PurePosixPath(path).suffix.lower()


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of an address, which belongs to this process, and the path in it."""
    import fsspec

    options = {}
    try:
        if url.startswith(("http:", "https:")):
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
            options["client_kwargs"] = {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise ConfigError(f"{url}: {first_line(error)}; {install_command('remote')}") from error
    except ValueError as error:
        raise ConfigError(f"{url}: {first_line(error)}") from error


def retried(call: Callable[[], T], url: str) -> T:
    """What `call` returns, tried up to 8 times; RunError with the address after the last one.

    An address that does not exist, or is forbidden, raises as fsspec does, at once. A host that failed so often is
    tried once a file from then on, until it answers.
    """
    host = urlsplit(url).netloc
    tries, number = 1 if host in _given_up else TRIES, 0
    while True:
        number += 1
        try:
            result = call()
            _given_up.discard(host)
            return result
        except Exception as error:
            if _is_final(error):
                raise
            told = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
            if number == tries:
                _given_up.add(host)
                way_out = "run.resume_ckpt_path=auto goes on from the last checkpoint once it answers"
                raise RunError(f"{url}: cannot be read, try {number} of {tries} failed: {told}. {way_out}") from error
            wait = min(FIRST_WAIT * 2 ** (number - 1), LONGEST_WAIT)
            log.warning("%s: %s; try %d of %d in %g s", url, told, number + 1, TRIES, wait)
            time.sleep(wait)


def _is_final(error: Exception) -> bool:
    cause = error.__cause__ or error  # fsspec says "not found" to whatever keeps it from knowing a size
    status = getattr(cause, "status", None)
    if isinstance(status, int) and status >= 400:
        return status < 500 and status not in _PASSING
    if isinstance(cause, ConnectionError | TimeoutError) or type(cause).__module__.startswith("aiohttp."):
        return False
    return isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotImplementedError)


class RemoteFile(io.RawIOBase):
    """The file at an address; each read asks for its own range of bytes, and again from there if it fails.

    FileNotFoundError or PermissionError if it cannot be had, RunError when tries are used up.
    """

    def __init__(self, url: str, size: int | None = None) -> None:
        self.url, self._position = url, 0
        self._files, self._path = file_system(url)
        self._whole: bytes | None = None
        """Of a server that tells no size, or gives no ranges."""
        self.size: int = size if size is not None else retried(lambda: self._files.info(self._path)["size"], url)
        if self.size is None:
            self._whole = retried(lambda: self._files.cat_file(self._path), url)
            self.size = len(self._whole)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        start = self._position
        wanted = max(0, min(len(buffer), self.size - start))
        if wanted and self._whole is None:
            content = retried(lambda: self._range(start, wanted), self.url)
            self._whole = content if len(content) > wanted else None
            buffer[:wanted] = content[:wanted]
        if wanted and self._whole is not None:
            buffer[:wanted] = self._whole[start : start + wanted]
        self._position += wanted
        return wanted

    def _range(self, start: int, wanted: int) -> bytes:
        content = self._files.cat_file(self._path, start=start, end=start + wanted)
        if len(content) not in (wanted, self.size):
            raise ConnectionError(f"{len(content):,} bytes came, {wanted:,} were asked for")
        return content


def open_remote(url: str, cache: str | Path | None = None) -> BinaryIO:
    """The file at an address, to be read in blocks; from a copy in the folder `cache`, where one is named."""
    if cache:
        return local_copy(url, Path(cache)).open("rb")
    return io.BufferedReader(RemoteFile(url), BLOCK)


def local_copy(url: str, folder: Path) -> Path:
    """A copy of the file in `folder`, where it stays until its size changes; RunError if it cannot be written."""
    file = RemoteFile(url)
    known = hashlib.sha256(f"{url} {file.size}".encode()).hexdigest()[:16]
    path = folder / f"{known}-{PurePosixPath(urlsplit(url).path).name[-80:]}"
    if path.is_file():
        return path
    with errors_as(RunError, f"build_info.cache_dir: {folder}: cannot keep a copy of {url}"):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part, part.open("wb") as copy:
            shutil.copyfileobj(io.BufferedReader(file, BLOCK), copy, BLOCK)
    return path
