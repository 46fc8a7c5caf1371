"""The table of published weights: `minigpt4/configs/weights.yaml` as dataclasses, and as Markdown."""

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import yaml

from minigpt4.common.errors import ConfigError
from minigpt4.common.output_files import human

TABLE = Path(__file__).parents[1] / "configs" / "weights.yaml"
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

    @property
    def is_repository(self) -> bool:
        return self.sources[0].startswith("hf:")


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
                raise ConfigError(f"no weights named {name!r}; {self._hint(name)}")
            names.update(self.presets.get(name, [name]))
        return [entry for name, entry in self.files.items() if name in names]

    def _hint(self, name: str) -> str:
        known = [*self.presets, *self.files]
        close = get_close_matches(name, known, n=1)
        return (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(known)}"


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
    return _grid(rows) + "\n\n" + _presets_markdown(table)


def llms_markdown(table: WeightsTable) -> str:
    """The table of LLMs in docs/weights.md."""
    rows = [
        (
            "LLM",
            "`model_type`",
            "`prompt_template`",
            "`end_sym`",
            "Q-Former",
            "projector",
            "stage 1",
            "aligned",
        )
    ]
    for entry in table.llms:
        rows.append(
            (
                f"`{entry.llm}`",
                f"`{entry.model_type}`",
                f"`'{entry.prompt_template}'`",
                f"`'{entry.end_sym}'`",
                "yes" if entry.qformer else "no",
                f"{entry.projector[0]} -> {entry.projector[1]}",
                f"`{entry.stage1}`" if entry.stage1 else "not published",
                f"`{entry.aligned}`" if entry.aligned else "not published",
            )
        )
    return _grid(rows)


def _presets_markdown(table: WeightsTable) -> str:
    rows = [("preset", "files", "size")]
    for name, files in table.presets.items():
        total = sum(table.files[file].about for file in files)
        rows.append((f"`{name}`", ", ".join(f"`{file}`" for file in files), f"about {human(total)}"))
    return _grid(rows)


def _grid(rows: list[tuple[str, ...]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def _host(source: str) -> str:
    if source.startswith("gdrive:"):
        return "Google Drive"
    return "Hugging Face" if source.startswith(("hf:", "https://huggingface.co")) else source.split("/")[2]
