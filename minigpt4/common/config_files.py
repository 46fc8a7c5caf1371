"""From a YAML file and `--options` to one merged tree, as in LAVIS: default files, then the user's, then the options.

Shipped defaults are `configs/models/{arch}_{model_type}.yaml` and `configs/datasets/{name}/{type}.yaml`. A registered
model or builder may bring its own in `PRETRAINED_MODEL_CONFIG_DICT` or `DATASET_CONFIG_DICT`: {type: path}, the path
absolute or relative to the class's own file or to the package `minigpt4`.
"""

import importlib
import logging
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.errors import ConfigError, MiniGPT4Error, hint, nearest
from minigpt4.common.registry import registry
from minigpt4.common.run_folder import RUN_JSON

log = logging.getLogger(__name__)


# Reading YAML files and `--options` with OmegaConf, every fault as a ConfigError that names its place.


MAX_BYTES = 4 << 20
MAX_DEPTH = 40
MAX_NODES = 10_000
MAX_CHARACTERS = 100_000
"""Far above any real configuration; aliases and `${...}` can ask for more than a memory holds."""

FULL_KEY = re.compile(r"full_key: (\S+)")
REFERENCE = re.compile(r"\$\{([^${}:]+)\}")


def load_yaml(file: Path) -> DictConfig:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML, empty, too large, nested too deep, or not a mapping.
    """
    with yaml_faults(f"{short(file)}: cannot be read as YAML"):
        text = _text(file)
        _check_shape(text)
        config = OmegaConf.create(text) if text.strip() else OmegaConf.create()
        _check_references(config)
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{file}: must hold keys with values, such as `model:`, but holds a list")
    if not config:
        raise ConfigError(f"{file}: is empty")
    return config


def _text(file: Path) -> str:
    if file.is_dir():
        raise ConfigError(f"{file}: is a folder; name a YAML file")
    if not file.is_file():
        raise ConfigError(f"{file}: no such file")
    if file.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{file}: has {file.stat().st_size:,} bytes, which is no configuration")
    return file.read_text(encoding="utf-8-sig")


def _check_shape(text: str) -> None:
    """ValueError if a document is nested too deep, contains itself, or expands to too much by its aliases."""
    anchored: dict[str, int | None] = {}
    sizes, anchors = [0], [None]
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            sizes.append(0)
            anchors.append(event.anchor)
            anchored[event.anchor] = None
            if len(sizes) > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH} levels at line {event.start_mark.line + 1}")
            continue
        size = 1
        if isinstance(event, yaml.CollectionEndEvent):
            size += sizes.pop()
            anchored[anchors.pop()] = size
        elif isinstance(event, yaml.ScalarEvent):
            anchored[event.anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            known = anchored.get(event.anchor, 1)
            if known is None:
                raise ValueError(f"*{event.anchor} contains itself at line {event.start_mark.line + 1}")
            size = known
        sizes[-1] += size
        if sizes[-1] > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES:,} values, those of aliases counted each time")


def parse_options(options: list[str] | None) -> DictConfig:
    """`--options` as a tree: `a.b=1 c=2`, or `a.b 1 c 2` where the first has no `=`.

    Values are parsed as YAML, so `1e-4` is a number, `null` nothing and `'12'` text.

    Raises:
        ConfigError: an option without a key or value, or a value that is not YAML.
    """
    tree = OmegaConf.create()
    for pair in option_pairs(options):
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ConfigError(f"--options {short(pair)}: write KEY=VALUE, for instance run.max_epoch=2")
        quotes = f"put text with special characters in two kinds of quotes: \"{short(key)}='{short(value)}'\""
        with yaml_faults(f"--options {short(pair)}: the value is not YAML", quotes):
            if key.count(".") + key.count("[") >= MAX_DEPTH:
                raise ConfigError(f"--options {short(pair)}: the key has more than {MAX_DEPTH} levels")
            _check_shape(value)
            tree.merge_with_dotlist([pair])
    return tree


def option_pairs(options: list[str] | None) -> list[str]:
    """Options of either form as `KEY=VALUE`."""
    if not options or "=" in options[0]:
        return list(options or [])
    return [f"{key}={value}" for key, value in zip(options[0::2], options[1::2], strict=False)]


def merge(place: str, *layers: Any) -> DictConfig:
    """The layers, later ones over earlier ones; ConfigError with `place` where a list meets a mapping."""
    with yaml_faults(f"{place}: does not fit what lies under it, list or mapping"):
        return OmegaConf.merge(*layers)


def to_plain(config: Any, source: str, options: Collection[str] = ()) -> dict[str, Any]:
    """Dicts, lists and scalars of a config, `${...}` resolved; ConfigError where that fails.

    `options`: keys that `--options` set, to name them.
    """
    with yaml_faults(source, options=options):
        _check_references(config)
        return OmegaConf.to_container(config, resolve=True)


def _check_references(config: Any) -> None:
    """ValueError, before anything is resolved, for `${...}` that lead back to themselves or make too long a text."""
    sizes: dict[str, int | None] = {}

    def size(key: str, value: Any) -> int:
        if key in sizes:
            if sizes[key] is None:
                raise ValueError(f"{key}: its ${{...}} lead back to itself")
            return sizes[key]
        sizes[key] = None
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            total = 1 + sum(size(f"{key}.{name}" if key else str(name), item) for name, item in items)
        else:
            total = len(value) if isinstance(value, str) else 1
            for reference in REFERENCE.findall(value) if isinstance(value, str) else ():
                target = _absolute(reference, key)
                found = _at(tree, target)
                total += size(target, found) if found is not None else 0
        if total > MAX_CHARACTERS:
            raise ValueError(f"{key}: its ${{...}} make a text of more than {MAX_CHARACTERS:,} characters")
        sizes[key] = total
        return total

    tree = OmegaConf.to_container(config, resolve=False)
    size("", tree)


def _absolute(reference: str, key: str) -> str:
    """`.x` and `..x` are seen from where they stand, everything else from the top."""
    reference = re.sub(r"\[([^\]]*)\]", r".\1", reference)
    path = reference.lstrip(".")
    up = len(reference) - len(path)
    parents = key.split(".")[:-up] if up else []
    return ".".join([*parents, path])


def _at(tree: Any, key: str) -> Any:
    """What stands at a dotted key; None if nothing does."""
    for name in key.split("."):
        if isinstance(tree, dict):
            tree = next((value for own, value in tree.items() if str(own) == name), None)
        elif isinstance(tree, list) and name.isdigit() and int(name) < len(tree):
            tree = tree[int(name)]
        else:
            return None
    return tree


def with_option(fault: str, options: Collection[str]) -> str:
    """A fault begins with its key; `--options` goes before it where that is where the value comes from."""
    key = fault.partition(":")[0]
    below = any(key == option or key.startswith((f"{option}.", f"{option}[")) for option in options)
    return f"--options {fault}" if below else fault


@contextmanager
def yaml_faults(place: str, way_out: str = "", options: Collection[str] = ()) -> Iterator[None]:
    """Whatever a library raises becomes a ConfigError: place, key if there is one, what is wrong, the way out."""
    try:
        yield
    except MiniGPT4Error:
        raise
    except Exception as error:
        text = " ".join(str(error).replace('in "<unicode string>", ', "").split()) or type(error).__name__
        key = FULL_KEY.search(text) if isinstance(error, OmegaConfBaseException) else None
        text = text.split(" full_key:")[0]
        fault = with_option(f"{key.group(1)}: {text}" if key else text, options)
        raise ConfigError(f"{place}: {short(fault, 400)}{'; ' * bool(way_out)}{way_out}") from error


def short(text: object, limit: int = 200) -> str:
    """A text that is safe to show: cut where it is very long."""
    shown = str(text)
    return shown if len(shown) <= limit else f"{shown[:limit]} ..."


PACKAGE = Path(__file__).resolve().parents[1]
USER_SECTIONS = ("model", "datasets", "run", "evaluation_datasets", "imports")
OPTION_SECTIONS = ("model", "datasets", "run", "evaluation_datasets", "preprocess")

Catalogue = dict[str, dict[str, Path]]


@dataclass(frozen=True)
class DefaultFiles:
    """Default files by name and type; a name that has none is there with an empty table."""

    models: Catalogue = field(default_factory=dict)
    """{arch: {model_type: file}}"""

    datasets: Catalogue = field(default_factory=dict)
    """{dataset name: {type: file}}"""


def find_default_files() -> DefaultFiles:
    """Everything known now; a registered class's own table goes before the shipped files of that name."""
    files = DefaultFiles()
    for file in sorted((PACKAGE / "configs" / "models").glob("*.yaml")):
        arch = load_yaml(file).model.arch
        files.models.setdefault(arch, {})[file.stem.removeprefix(f"{arch}_")] = file
    for file in sorted((PACKAGE / "configs" / "datasets").glob("*/*.yaml")):
        files.datasets.setdefault(file.parent.name, {})[file.stem] = file
    for arch in registry.list_models():
        _add_class(files.models, arch, registry.get_model_class(arch), "PRETRAINED_MODEL_CONFIG_DICT")
    for name in registry.list_builders():
        _add_class(files.datasets, name, registry.get_builder_class(name), "DATASET_CONFIG_DICT")
    return files


def _add_class(catalogue: Catalogue, name: str, cls: type, attribute: str) -> None:
    own = getattr(cls, attribute, None)
    if not own:
        catalogue.setdefault(name, {})
        return
    module_file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    folder = Path(module_file).resolve().parent if module_file else Path()
    beside = {kind: folder / path for kind, path in own.items()}
    catalogue[name] = {kind: path if path.exists() else PACKAGE / own[kind] for kind, path in beside.items()}


def import_modules(names: Any, source: str) -> None:
    """Import each module of a YAML's `imports:`; the working directory is searched as with `python -m`.

    Raises:
        ConfigError: not a list of names, or an import fails, whatever the reason.
    """
    if names is None:
        return
    if not isinstance(names, list | ListConfig) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{source}: `imports:` must be a list of modules, such as [my_package.my_task]")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    for name in names:
        try:
            importlib.import_module(name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a module may do anything, even call sys.exit
            kind = type(error).__name__
            raise ConfigError(f"{source}: imports: cannot import {short(repr(name))}: {kind}: {error}") from error


class ConfigFile:
    """A user's YAML file, or a run's `run.json`; its `imports:` are imported.

    Raises ConfigError as `Config` does, here and in `merged`.
    """

    def __init__(self, path: str) -> None:
        self.source = path
        self.user = load_yaml(Path(path))
        if Path(path).name == RUN_JSON:
            if not isinstance(self.user.get("config"), DictConfig):
                raise ConfigError(f"{path}: has no `config`, which a run writes into it when it starts")
            self.user = self.user.config
        import_modules(self.user.pop("imports", None), path)

    def merged(self, options: list[str] | None, defaults: DefaultFiles) -> DictConfig:
        """The whole tree: the file over its defaults, and `--options` over both."""
        layers = (
            {"run": self._section("run")},
            self._model(defaults.models),
            self._datasets(defaults.datasets),
            self._evaluation(),
        )
        changes = parse_options(options)
        if options and "=" not in options[0] and len(options) % 2:
            log.warning("--options: the last key %r has no value and is ignored", options[-1])
        self._warn_of_unknown_sections()
        self._check_options(changes)
        for pair in option_pairs(options):  # each alone, so that the one at fault is named
            merge(f"--options {short(pair)} over {self.source}", *layers, parse_options([pair]))
        return merge(f"--options over {self.source}", *layers, changes)

    def _section(self, name: str) -> DictConfig:
        if name not in self.user.keys():  # noqa: SIM118 - without keys(), `???` is not in it
            raise ConfigError(f"{self.source}: has no section `{name}:`")
        return self._mapping(self.user, name, f"`{name}:`")

    def _mapping(self, parent: DictConfig, name: str, key: str) -> DictConfig:
        """What stands below a key; ConfigError for `???`, null, a list or a value, and for ${...} that lead nowhere."""
        try:
            value = parent[name]
        except OmegaConfBaseException:
            value = None
        if not isinstance(value, DictConfig):
            found = OmegaConf.to_container(parent, resolve=False)[name]
            raise ConfigError(
                f"{self.source}: {key} must hold keys with values; write `{name}: {{}}` for none (it is "
                f"{'empty' if found is None else short(repr(found))})"
            )
        return value

    def _model(self, known: Catalogue) -> DictConfig:
        section = self._section("model")
        arch = self._required(section, "arch", known)
        if arch not in known:
            raise self._unknown("model.arch", arch, known)
        model_type = self._required(section, "model_type", known[arch])
        default = self._default("model.model_type", model_type, known[arch])
        return merge(f"{self.source}: model", default, {"model": section})

    def _required(self, section: DictConfig, key: str, known: Iterable[str]) -> str:
        value = "???" if OmegaConf.is_missing(section, key) else section.get(key)
        if value == "???" or not isinstance(value, str):
            fault = "is missing" if value is None else f"cannot be {short(repr(value))}"
            raise ConfigError(
                f"{self.source}: model.{key} {fault}; it chooses the default file and must stand in the "
                f"YAML, not in --options. {hint('', known)}"
            )
        return value

    def _datasets(self, known: Catalogue) -> DictConfig:
        sections = self._section("datasets")
        return OmegaConf.merge({"datasets": {}}, *(self._dataset(sections, name, known) for name in sections))

    def _dataset(self, sections: DictConfig, name: str, known: Catalogue) -> DictConfig:
        key = f"datasets.{name}"
        section = self._mapping(sections, name, key)
        if name not in known and "builder" not in section:
            raise ConfigError(
                f"{self.source}: {key}: unknown dataset; {hint(name, known)}. "
                "Data of your own needs `builder:` with the name of its format."
            )
        if not isinstance(name, str):
            raise ConfigError(f"{self.source}: {key}: the name of a dataset must be text; put it in quotes")
        default = self._default(f"{key}.type", section.get("type", "default"), known.get(name, {}))
        if set(default.get("datasets", {})) - {name}:
            raise ConfigError(f"the default file of dataset {name!r} describes {list(default.datasets)}")
        return merge(f"{self.source}: {key}", default, {"datasets": {name: section}})

    def _evaluation(self) -> dict[str, DictConfig]:
        if self.user.get("evaluation_datasets") is None:
            return {}
        return {"evaluation_datasets": self._section("evaluation_datasets")}

    def _default(self, key: str, kind: Any, files: dict[str, Path]) -> DictConfig:
        """The default file of this type; none at all is fine for a class from outside that brings none."""
        if not files:
            return OmegaConf.create({})
        if str(kind) not in files:
            raise self._unknown(key, kind, files)
        return load_yaml(files[str(kind)])

    def _unknown(self, key: str, value: Any, known: Iterable[str]) -> ConfigError:
        return ConfigError(f"{self.source}: {key}: unknown name {short(repr(value))}; {hint(value, known)}")

    def _warn_of_unknown_sections(self) -> None:
        for name in self.user:
            if name == "preprocess":
                log.warning("%s: `preprocess:` is ignored; it comes from the model's defaults", self.source)
            elif name not in USER_SECTIONS:
                close = nearest(name, USER_SECTIONS)
                question = f"; did you mean `{close}:`?" if close else ""
                log.warning("%s: unknown section `%s:` is ignored%s", self.source, name, question)

    def _check_options(self, options: DictConfig) -> None:
        for name, section in OmegaConf.to_container(options, resolve=False).items():
            if name not in OPTION_SECTIONS:
                raise ConfigError(f"--options {short(name)}: unknown section; {hint(name, OPTION_SECTIONS)}")
            if not isinstance(section, dict):
                raise ConfigError(f"--options {name}={short(section)}: name a key of the section: {name}.KEY=VALUE")
        self._warn_unless_same(options, "model.arch", "model.model_type")
        for name in options.get("datasets", {}):
            if name not in self.user.datasets:
                log.warning("--options datasets.%s: not in %s, so no default file lies under it", name, self.source)
            self._warn_unless_same(options, f"datasets.{name}.type")

    def _warn_unless_same(self, options: DictConfig, *keys: str) -> None:
        """Warn of options that choose a default file in the YAML, but here change no more than the value."""
        for key in keys:
            value = OmegaConf.select(options, key)
            if value is not None and value != OmegaConf.select(self.user, key):
                log.warning(
                    "--options %s=%s: changes the value, but the defaults that were loaded are those of the YAML "
                    "file; set it there to load others",
                    key,
                    value,
                )
