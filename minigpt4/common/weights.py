"""The published weights: a table of files, and a folder into which they are downloaded, with its `manifest.json`.

huggingface_hub transfers all of them, so HF_ENDPOINT, HF_TOKEN and the proxy variables work as everywhere. A file grows
as `NAME.part`, and a later call resumes it; what has its right name is complete and checked.
"""

import html
import logging
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import filter_repo_objects

from minigpt4.common.errors import ConfigError, WeightsError, errors_as, hint
from minigpt4.common.run_folder import hold_folder
from minigpt4.common.torch_files import check_whole, file_sha256
from minigpt4.common.utils import human, parse_json, replace_durably, write_json

log = logging.getLogger(__name__)

TABLE = Path(__file__).parents[1] / "configs" / "weights.yaml"
MANIFEST = "manifest.json"
PAGES = {
    "https": "https:{}",
    "http": "http:{}",
    "gdrive": "https://drive.google.com/file/d/{}/view",
    "hf": "https://huggingface.co/{}",
}
"""By the scheme of a source: where a browser shows it."""
DRIVE = "https://drive.usercontent.google.com/download"
HIDDEN_FIELD = re.compile(r'<input type="hidden" name="([^"]+)" value="([^"]*)"')
IGNORED = (".gitattributes", "*.msgpack", "*.h5", "original/*")
"""Files of a repository with the same weights for other frameworks."""


@dataclass(frozen=True)
class WeightsEntry:
    """One published file, or one Hugging Face repository; configs/weights.yaml says what the fields mean."""

    name: str
    path: str
    sources: list[str]
    about: int
    size: str
    goes_with: str
    bytes: int | None = None
    sha256: str | None = None
    ignore: list[str] = field(default_factory=list)
    gated: bool = False

    def __post_init__(self) -> None:
        if not self.sources or any(source.partition(":")[0] not in PAGES for source in self.sources):
            raise ConfigError(f"weights table, {self.name}.sources: {self.sources}; known: {', '.join(PAGES)}")
        if Path(self.path).is_absolute() or ".." in Path(self.path).parts:
            raise ConfigError(f"weights table, {self.name}.path: {self.path} must lie below the weights folder")


@dataclass(frozen=True)
class WeightsTable:
    """Entries by name, and names by preset."""

    files: dict[str, WeightsEntry]
    presets: dict[str, list[str]]

    def select(self, wanted: list[str]) -> list[WeightsEntry]:
        """The entries of names and presets, each once, in table order; ConfigError for an unknown one."""
        names = set()
        for name in wanted:
            if name not in self.files and name not in self.presets:
                raise ConfigError(f"no weights named {name!r}; {hint(name, [*self.presets, *self.files])}")
            names.update(self.presets.get(name, [name]))
        return [entry for name, entry in self.files.items() if name in names]


def load_table(path: Path = TABLE) -> WeightsTable:
    """Read a table of weights; ConfigError names the file and the key that is wrong."""
    with errors_as(ConfigError, f"{path}: not a table of weights"):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        files = {name: WeightsEntry(name=name, **entry) for name, entry in raw["files"].items()}
        presets = raw.get("presets", {})
        for preset, names in presets.items():
            if missing := set(names) - set(files):
                raise ConfigError(f"{path}: preset {preset} names {sorted(missing)}, not among `files`")
    return WeightsTable(files, presets)


def web_page(source: str) -> str:
    """The address at which a browser shows or fetches a source."""
    scheme, _, rest = source.partition(":")
    return PAGES[scheme].format(rest)


def fetch(source: str, target: Path, expected: WeightsEntry) -> str:
    """Download a plain address or a shared file of Google Drive to `target`, resuming an earlier call; its sha256.

    WeightsError if the link or the disk fails (the part stays), or it is not the file expected (nothing stays).
    """
    scheme, _, rest = source.partition(":")
    fields = {"id": rest, "export": "download", "confirm": "t"}
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    while True:
        resumed = bool(_size(part))
        with errors_as(WeightsError, f"{target.name} from {source}"):
            _transfer(f"{DRIVE}?{urlencode(fields)}" if scheme == "gdrive" else source, part)
        token = _hidden_fields(part) if scheme == "gdrive" else {}
        if token.keys() - fields.keys():  # the page with a button that Drive puts before large files
            fields |= token
            part.unlink()
            continue
        try:
            sha256 = check_expected(part, target.name, expected)
            break
        except WeightsError as error:
            part.unlink()
            if not resumed:
                raise WeightsError(f"{error} (from {source}; nothing was kept)") from error
            log.warning("%s; its beginning was of an earlier download, starting again", error)
    replace_durably(part, target)
    return sha256


def _transfer(url: str, part: Path) -> None:
    """Append to `part` what the server has beyond it."""
    with part.open("ab") as file:
        try:
            http_get(url, file, resume_size=file.tell(), displayed_filename=part.stem)
        except HfHubHTTPError as error:
            if error.response.status_code != 416:  # asked for bytes after the last one
                raise


def _hidden_fields(part: Path) -> dict[str, str]:
    with part.open("rb") as file:
        page = file.read(1 << 16).decode("utf-8", "replace")
    return {name: html.unescape(value) for name, value in HIDDEN_FIELD.findall(page)}


def check_expected(path: Path, name: str, expected: WeightsEntry) -> str:
    """The sha256 of a whole file of weights; WeightsError if it is cut short or not the one expected."""
    check_whole(path, name)
    size, sha256 = path.stat().st_size, file_sha256(path)
    if size != (expected.bytes or size):
        raise WeightsError(f"{name}: {size} bytes, expected {expected.bytes}")
    if sha256 != (expected.sha256 or sha256):
        raise WeightsError(f"{name}: its sha256 is {sha256}, expected {expected.sha256}")
    return sha256


def fetch_repository(repository: str, folder: Path, entry: WeightsEntry) -> tuple[str, dict[Path, str]]:
    """Bring `owner/name` of Hugging Face into `folder`; its source with the commit, and the sha256 of its files.

    WeightsError: no access, no connection, no room, or a file that is not what the Hub says, which is then deleted.
    """
    skipped = [*IGNORED, *entry.ignore]
    with errors_as(WeightsError, f"Hugging Face repository {repository}"):
        try:
            info = HfApi().model_info(repository, files_metadata=True)
        except RepositoryNotFoundError as error:  # or gated
            way_out = f"accept its licence at https://huggingface.co/{repository}, then run `hf auth login`"
            raise WeightsError(f"Hugging Face does not show the repository {repository}: {way_out}") from error
        snapshot_download(repository, revision=info.sha, local_dir=folder, ignore_patterns=skipped)
    found = {}
    for file in filter_repo_objects(info.siblings or [], ignore_patterns=skipped, key=lambda file: file.rfilename):
        path = folder / file.rfilename
        found[path] = file_sha256(path)
        wanted = file.lfs.sha256 if file.lfs else found[path]
        if path.stat().st_size != file.size or found[path] != wanted:
            path.unlink()
            raise WeightsError(f"{path}: not what the Hub says ({file.size} bytes, sha256 {wanted}); it was deleted")
    return f"hf:{repository}@{info.sha}", found


class WeightsFolder:
    """Where the weights of a table lie."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = root / MANIFEST

    def records(self) -> dict[str, dict[str, Any]]:
        """name, source, bytes and sha256 by path below the folder; WeightsError if the manifest cannot be read."""
        if not self.manifest.exists():
            return {}
        with errors_as(WeightsError, f"{self.manifest}: broken; delete it, the next download writes it"):
            files = parse_json(self.manifest.read_bytes())["files"]
            keys = ("name", "source", "bytes", "sha256")
            return {path: {key: record[key] for key in keys} for path, record in files.items()}

    def has(self, entry: WeightsEntry) -> bool:
        """Whether the manifest knows the entry and its files still have their sizes; reads no content."""
        files = {path: record for path, record in self.records().items() if record["name"] == entry.name}
        return bool(files) and all(_size(self.root / path) == record["bytes"] for path, record in files.items())

    def missing_bytes(self, entries: list[WeightsEntry]) -> int:
        """Bytes still to come for these entries, by the table's sizes and what an earlier run left."""
        total = 0
        for entry in entries:
            if not self.has(entry):
                target = self.root / entry.path
                files = (target, target.with_name(target.name + ".part"), *target.rglob("*"))
                total += max(0, (entry.bytes or entry.about) - sum(_size(file) or 0 for file in files))
        return total

    def free_bytes(self) -> int:
        """Free space of the disk on which the folder is, or will be."""
        root = self.root.absolute()
        return shutil.disk_usage(next(place for place in (root, *root.parents) if place.exists())).free

    def need_room(self, entries: list[WeightsEntry]) -> None:
        """WeightsError if what is still to come does not fit on the disk."""
        missing, free = self.missing_bytes(entries), self.free_bytes()
        if missing > free:
            text = f"{self.root}: about {human(missing)} still to come, {human(free)} free on this disk"
            raise WeightsError(f"{text}; make room, or choose another folder with --dir")

    def get(self, entry: WeightsEntry) -> None:
        """Fetch what is missing of an entry from the first source that gives it; a file put there is taken."""
        if self.has(entry):
            return
        self.root.mkdir(parents=True, exist_ok=True)
        hold_folder(self.root, "Wait for that download.")
        target = self.root / entry.path
        if target.is_file():
            try:
                self._note(entry, "already there", {target: check_expected(target, str(target), entry)})
            except WeightsError as error:
                raise WeightsError(f"{error}: not the published {entry.name}; move it away and start again") from error
            return
        refusals = []
        for source in entry.sources:
            try:
                if source.startswith("hf:"):
                    self._note(entry, *fetch_repository(source.removeprefix("hf:"), target, entry))
                else:
                    self._note(entry, source, {target: fetch(source, target, entry)})
                return
            except WeightsError as error:
                log.warning("%s", error)
                refusals.append(f"{error}. By hand: {web_page(source)}")
        raise WeightsError(f"{entry.name}: no source gave it.\n  " + "\n  ".join(refusals))

    def _note(self, entry: WeightsEntry, source: str, files: dict[Path, str]) -> None:
        records = {path: record for path, record in self.records().items() if record["name"] != entry.name}
        for file, sha256 in files.items():
            facts = {"name": entry.name, "source": source, "bytes": file.stat().st_size, "sha256": sha256}
            records[file.relative_to(self.root).as_posix()] = facts
        write_json(self.manifest, {"files": dict(sorted(records.items()))}, "--dir")

    def verify(self, names: set[str]) -> list[str]:
        """Hash the files of these entries again; one line for every one that is missing or has changed."""
        records = {path: record for path, record in self.records().items() if record["name"] in names}
        known = {record["name"] for record in records.values()}
        problems = [f"{name}: not downloaded" for name in sorted(names - known)]
        for path, record in records.items():
            file = self.root / path
            if not file.is_file():
                problems.append(f"{file}: missing")
            elif file_sha256(file) != record["sha256"]:
                problems.append(f"{file}: its content has changed since it was downloaded")
        return problems


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
