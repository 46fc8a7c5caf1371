"""Images that strangers send: what they may cost, how they are read, and where the page keeps them."""

import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from PIL import Image

from minigpt4.common.errors import ConfigError, MiniGPT4Error, SampleError
from minigpt4.processors import open_image

MIB = 1 << 20
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Kinds of files that are decoded; Pillow knows more, and hands some of them to other programs."""


VISITORS = 8
"""Visitors who may have sent as much as they may; then there is no room for others."""
STEP = 64 << 10
"""Bytes by which a file grows, so that even the smallest counts so much."""
KEEP = 600.0
"""Seconds without use after which a file makes room for others."""


class TooLargeError(SampleError):
    """More bytes or pixels than are accepted."""


@dataclass(frozen=True)
class Limits:
    """Upper bounds of the page and the API; none of them can be switched off, only raised."""

    image_bytes: int = 20 * MIB
    """Of an image's file."""
    image_pixels: int = 50_000_000
    """Width times height; decoded, each takes three or four bytes."""
    images: int = 8
    """In one conversation."""
    new_tokens: int = 1024
    """Of one answer."""
    beams: int = 10
    question_chars: int = 20_000
    """Of one message."""
    turns: int = 1000
    """Messages of one conversation."""
    seconds: float = 300.0
    """From a question to the end of its answer, waiting included."""
    waiting: int = 64
    """Requests that wait, of all visitors together."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ConfigError(f"{name}: {value} must be above 0")


def read_image(source: bytes | Path, limits: Limits, name: str = "the file") -> Image.Image:
    """An image that a stranger sent, as upright RGB; its size is looked at before it is decoded.

    `name` is how errors call it, for a path on this machine is nobody's business.

    Raises:
        TooLargeError: too many bytes or pixels.
        SampleError: no image, damaged, or of a kind that is not among `FORMATS`.
    """
    content = source if isinstance(source, bytes) else _content(source, limits, name)
    _check_bytes(len(content), limits, name)
    _check_head(content, limits, name)
    return open_image(content, name)


def _content(path: Path, limits: Limits, name: str) -> bytes:
    """Of a regular file, not much more than is accepted; for whatever else a path may name there is one error."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:  # a pipe would wait
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode):
                _check_bytes(status.st_size, limits, name)
                return file.read(limits.image_bytes + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, TooLargeError):
            raise
    raise SampleError(f"{name}: cannot be read; give it again")


def _check_bytes(size: int, limits: Limits, name: str) -> None:
    if size > limits.image_bytes:
        raise TooLargeError(f"{name}: {size / MIB:.1f} MiB are more than {limits.image_bytes / MIB:g} MiB")


def _check_head(content: bytes, limits: Limits, name: str) -> None:
    try:
        with Image.open(BytesIO(content)) as image:
            (width, height), kind = image.size, image.format
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{name}: more pixels than {limits.image_pixels:,}") from error
    except Exception:  # open_image says what is wrong with it
        return
    if kind not in FORMATS:
        raise SampleError(f"{name}: {kind} files are not taken; send PNG or JPEG")
    if width * height > limits.image_pixels:
        raise TooLargeError(f"{name}: {width} x {height} pixels are more than {limits.image_pixels:,}; scale it down")


class NoRoomError(MiniGPT4Error):
    """No room for one more file; `is_own`: the visitor's own files take it."""

    def __init__(self, text: str, is_own: bool) -> None:
        super().__init__(text)
        self.is_own = is_own


@dataclass(eq=False)
class _File:
    visitor: str
    bytes: int = 0
    is_whole: bool = False
    tab: str | None = None
    used: float = field(default_factory=time.monotonic)


class Uploads:
    """Files in `folder`; one belongs to the visitor who sent it, and from its first use on to one tab.

    A path that a client names is only ever looked up here, never opened.
    """

    def __init__(self, folder: Path, limits: Limits, keep: float = KEEP) -> None:
        self.most_of_one = limits.images * limits.image_bytes
        self.most = VISITORS * self.most_of_one
        self.examples: set[str] = set()
        """Files of everybody."""
        self._folder, self._keep = folder, keep
        self._files: dict[str, _File] = {}
        self._lock = threading.RLock()

    @contextmanager
    def room(self, visitor: str) -> Iterator[tuple[Path, Callable[[int], None]]]:
        """A path to write a new file to, and what is to be called with its bytes so far; an error inside forgets it.

        What did not come yet takes no room. NoRoomError from the call when the visitor, or all together, would have
        too much here.
        """
        path, file = self._folder / secrets.token_hex(16), _File(visitor)

        def grow(size: int) -> None:
            with self._lock:
                more = -(-size // STEP) * STEP - file.bytes
                if more > 0:
                    self._make_room(visitor, more)
                    file.bytes += more

        with self._lock:
            self._files[str(path)] = file
        try:
            yield path, grow
            file.used, file.is_whole = time.monotonic(), True
        except BaseException:
            self._drop(str(path))
            raise

    def take(self, path: str, visitor: str, tab: str) -> Path:
        """The file that `path` names; SampleError, the same for all others, unless this tab may use it."""
        with self._lock:
            file = self._files.get(path)
            if file is not None and file.visitor == visitor and file.tab in (None, tab):
                file.tab, file.used = tab, time.monotonic()
            elif path not in self.examples:
                raise SampleError("the image is not here, or not any more; give it again")
        return Path(path)

    def may_see(self, path: str, visitor: str) -> bool:
        """Whether a visitor may be shown a file."""
        file = self._files.get(path)
        return path in self.examples or (file is not None and file.visitor == visitor)

    def forget(self, path: Path) -> None:
        """Delete a file, unless it is an example."""
        self._drop(str(path))

    def leave(self, visitor: str, tab: str) -> None:
        """Delete what this tab used, and what the visitor sent and did not use yet."""
        with self._lock:
            own = [(path, file) for path, file in self._files.items() if file.visitor == visitor and file.is_whole]
            self._drop(*(path for path, file in own if file.tab in (None, tab)))

    def _make_room(self, visitor: str, size: int) -> None:
        for is_own, most in ((True, self.most_of_one), (False, self.most)):
            files = {path: file for path, file in self._files.items() if not is_own or file.visitor == visitor}
            need = sum(file.bytes for file in files.values()) + size - most
            for path, file in files.items():  # the oldest first
                if need > 0 and file.is_whole and time.monotonic() - file.used > self._keep:
                    need -= file.bytes
                    self._drop(path)
            if need > 0 and is_own:
                text = f"{most / MIB:g} MiB of images are the most at once; Restart, or reload the page, and send less"
                raise NoRoomError(text, is_own)
            if need > 0:
                raise NoRoomError("there is no room for more images just now; try again later", is_own)

    def _drop(self, *paths: str) -> None:
        with self._lock:
            for path in paths:
                if self._files.pop(path, None) is not None:
                    Path(path).unlink(missing_ok=True)
