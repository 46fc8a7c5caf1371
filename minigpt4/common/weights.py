"""The table of published weights, and a folder of them with its `manifest.json`: from where, and is it still whole."""

import json
import logging
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from minigpt4.common.download import (
    PATIENT,
    Expected,
    Fetched,
    Retry,
    drive_url,
    fetch,
    fetch_repository,
    part_of,
    replace_durably,
)
from minigpt4.common.errors import ConfigError, WeightsError, hint
from minigpt4.common.torch_files import check_opens, digest
from minigpt4.common.utils import human

log = logging.getLogger(__name__)


TABLE = Path(__file__).parents[1] / "configs" / "weights.yaml"
MANIFEST = "manifest.json"
BY_HAND = "already there"
SCHEMES = ("https:", "http:", "gdrive:", "hf:")


@dataclass(frozen=True)
class WeightsEntry:
    """One published file, or one Hugging Face repository."""

    name: str
    path: str
    """Below the weights folder; a folder for a repository."""
    sources: tuple[str, ...]
    """Tried in order: `https://...`, `gdrive:<file id>` or `hf:<owner>/<repository>`."""
    about: int
    """Bytes, good enough to judge whether the disk has room."""
    size: str
    """Where `about` comes from."""
    goes_with: str
    bytes: int | None = None
    """Exact size; the download must have it."""
    sha256: str | None = None
    """The download must have it."""
    ignore: tuple[str, ...] = ()
    """Patterns of a repository's files that are not fetched."""
    gated: bool = False
    """The repository asks for an accepted licence and a token."""

    def __post_init__(self) -> None:
        unknown = [source for source in self.sources if not source.startswith(SCHEMES)]
        if unknown or not self.sources:
            raise ConfigError(f"weights table, {self.name}.sources: {unknown or 'empty'}; known: {SCHEMES}")
        if Path(self.path).is_absolute() or ".." in Path(self.path).parts:
            raise ConfigError(f"weights table, {self.name}.path: {self.path} must lie below the weights folder")


@dataclass(frozen=True)
class LLMEntry:
    """Which template and which projector an LLM takes."""

    llm: str
    model_type: str
    prompt_template: str
    end_sym: str
    qformer: bool
    projector: tuple[int, int]
    """Width of an image token, width of the LLM."""
    stage1: str | None
    aligned: str | None


@dataclass(frozen=True)
class WeightsTable:
    files: dict[str, WeightsEntry]
    llms: tuple[LLMEntry, ...] = ()
    presets: dict[str, list[str]] = field(default_factory=dict)

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
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable weights table: {error}") from error
    if not isinstance(raw, dict) or not raw.get("files"):
        raise ConfigError(f"{path}: not a weights table: no `files` in it")
    try:
        table = WeightsTable(
            files={name: WeightsEntry(name=name, **_tuples(entry)) for name, entry in raw["files"].items()},
            llms=tuple(LLMEntry(**_tuples(entry)) for entry in raw.get("llms", [])),
            presets=raw.get("presets", {}),
        )
    except TypeError as error:
        raise ConfigError(f"{path}: {error}") from error
    for preset, names in table.presets.items():
        if missing := set(names) - set(table.files):
            raise ConfigError(f"{path}: preset {preset} names {sorted(missing)}, not among `files`")
    return table


def _tuples(entry: dict) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def web_page(source: str) -> str:
    """The address at which a browser shows or fetches a source."""
    scheme, _, rest = source.partition(":")
    pages = {"gdrive": "https://drive.google.com/file/d/{}/view", "hf": "https://huggingface.co/{}"}
    return pages[scheme].format(rest) if scheme in pages else source


def files_markdown(table: WeightsTable) -> str:
    """The tables of files and presets in docs/weights.md."""
    rows = [("name", "file", "from", "size", "sha256", "goes with")]
    for entry in table.files.values():
        links = ", ".join(f"[{_host(source)}]({web_page(source)})" for source in entry.sources)
        digest = f"`{entry.sha256[:12]}...`" if entry.sha256 else "not published"
        size = f"{human(entry.bytes or entry.about)} ({entry.size})"
        rows.append((f"`{entry.name}`", f"`{entry.path}`", links, size, digest, entry.goes_with))
    presets = [("preset", "files", "size")]
    for name, files in table.presets.items():
        total = sum(table.files[file].about for file in files)
        presets.append((f"`{name}`", ", ".join(f"`{file}`" for file in files), f"about {human(total)}"))
    return _grid(rows) + "\n\n" + _grid(presets)


def llms_markdown(table: WeightsTable) -> str:
    """The table of LLMs in docs/weights.md."""
    rows = [("LLM", "`model_type`", "`prompt_template`", "`end_sym`", "Q-Former", "projector", "stage 1", "aligned")]
    for entry in table.llms:
        files = [f"`{name}`" if name else "not published" for name in (entry.stage1, entry.aligned)]
        template, end = f"`'{entry.prompt_template}'`", f"`'{entry.end_sym}'`"
        width = f"{entry.projector[0]} -> {entry.projector[1]}"
        qformer = "yes" if entry.qformer else "no"
        rows.append((f"`{entry.llm}`", f"`{entry.model_type}`", template, end, qformer, width, *files))
    return _grid(rows)


def _grid(rows: list[tuple[str, ...]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def _host(source: str) -> str:
    if source.startswith("gdrive:"):
        return "Google Drive"
    return "Hugging Face" if source.startswith(("hf:", "https://huggingface.co")) else source.split("/")[2]


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
        if not entry.sources[0].startswith("hf:") and target.exists():
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
                log.warning("%s", error)
                refusals.append(str(error))
        raise WeightsError(f"{entry.name}: no source gave it.\n  " + "\n  ".join(refusals))

    def _from_source(self, entry: WeightsEntry, source: str, target: Path) -> list[Fetched]:
        scheme, _, rest = source.partition(":")
        if scheme == "hf":
            return fetch_repository(rest, target, entry.ignore, self.retry)
        expected = Expected(entry.bytes, entry.sha256)
        address = (lambda opener, timeout: drive_url(opener, rest, timeout)) if scheme == "gdrive" else source
        return [fetch(address, target, expected, self.retry, source)]

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
