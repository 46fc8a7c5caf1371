"""From a YAML file and `--options` to one merged tree, as in LAVIS: default files, then the user's, then the options.

Shipped defaults are `configs/models/{arch}_{model_type}.yaml` and `configs/datasets/{name}/{type}.yaml`. A registered
model or builder may bring its own in `PRETRAINED_MODEL_CONFIG_DICT` or `DATASET_CONFIG_DICT`: {type: path}, the path
absolute or relative to the class's own file or to the package `minigpt4`.
"""

import importlib
import logging
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.errors import ConfigError, MiniGPT4Error, hint, nearest
from minigpt4.common.registry import registry
from minigpt4.common.run_folder import RUN_JSON

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[1]
OPTION_SECTIONS = ("model", "datasets", "run", "evaluation_datasets", "curation", "preprocess")
FULL_KEY = re.compile(r"full_key: (\S+)")

T = TypeVar("T")
Catalogue = dict[str, dict[str, Path]]


@dataclass(frozen=True)
class DefaultFiles:
    """Default files by name and type; a name that has none is there with an empty table."""

    models: Catalogue = field(default_factory=dict)
    datasets: Catalogue = field(default_factory=dict)


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
    folder = Path(getattr(sys.modules.get(cls.__module__), "__file__", None) or "").resolve().parent
    beside = {kind: folder / path for kind, path in own.items()}
    catalogue[name] = {kind: path if path.exists() else PACKAGE / own[kind] for kind, path in beside.items()}


def load_yaml(file: Path) -> DictConfig:
    """The mapping that a YAML file holds; ConfigError if it is not there, no YAML in UTF-8, empty, or no mapping."""
    with yaml_faults(f"{short(file)}: cannot be read as YAML"):
        if not file.is_file():
            raise ConfigError(f"{short(file)}: no such file")
        text = file.read_text(encoding="utf-8-sig")
        config = OmegaConf.create(text) if text.strip() else OmegaConf.create()
    if not isinstance(config, DictConfig) or not config:
        found = "holds a list" if config else "is empty"
        raise ConfigError(f"{file}: must hold keys with values, such as `model:`, but {found}")
    return config


def parse_options(options: list[str] | None) -> DictConfig:
    """`--options` as a tree: `a.b=1 c=2`, or `a.b 1 c 2` where the first has no `=`; the values are YAML.

    Raises ConfigError for an option without a key or value, or a value that is not YAML.
    """
    tree = OmegaConf.create()
    for pair in option_pairs(options):
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ConfigError(f"--options {short(pair)}: write KEY=VALUE, for instance run.max_epoch=2")
        quotes = f"put text with special characters in two kinds of quotes: \"{short(key)}='{short(value)}'\""
        with yaml_faults(f"--options {short(pair)}: the value is not YAML", quotes):
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
    """Dicts, lists and scalars of a config, `${...}` resolved; ConfigError where that fails."""
    with yaml_faults(source, options=options):
        return OmegaConf.to_container(config, resolve=True)


def below(key: str, options: Collection[str]) -> bool:
    """Whether a key, or one above it, is among `options`."""
    return any(key == option or key.startswith((f"{option}.", f"{option}[")) for option in options)


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
        fault = f"{key[1]}: {text.split(' full_key:')[0]}" if key else text
        option = "--options " if key and below(key[1], options) else ""
        raise ConfigError(f"{place}: {option}{short(fault, 400)}{'; ' * bool(way_out)}{way_out}") from error


def short(text: object, limit: int = 200) -> str:
    """A text that is safe to show: cut where it is very long."""
    shown = str(text)
    return shown if len(shown) <= limit else f"{shown[:limit]} ..."


def import_modules(names: Any, source: str) -> None:
    """Import the modules of `imports:`, also from the working directory; ConfigError if one fails in any way."""
    if names is None:
        return
    if not isinstance(names, ListConfig) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{source}: `imports:` must be a list of modules, such as [my_package.my_task]")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    for name in names:
        try:
            importlib.import_module(name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a module may do anything, even call sys.exit
            raise ConfigError(f"{source}: imports: cannot import {short(repr(name))}: {error!r}") from error


class ConfigFile:
    """A user's YAML file, or a run's `run.json`; its `imports:` are imported. Raises ConfigError as `Config` does."""

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
        layers = [{"run": self._section("run")}, self._model(defaults.models), *self._datasets(defaults.datasets)]
        for name in ("evaluation_datasets", "curation"):
            if self.user.get(name) is not None:
                layers.append({name: self._section(name)})
        self._warn_of_unknown_sections()
        if options and "=" not in options[0] and len(options) % 2:
            log.warning("--options: the last key %r has no value and is ignored", options[-1])
        self._check_options(parse_options(options))
        tree = OmegaConf.merge(*layers)
        for pair in option_pairs(options):  # each alone, so that the one at fault is named
            tree = merge(f"--options {short(pair)} over {self.source}", tree, parse_options([pair]))
        return tree

    def _section(self, name: str) -> DictConfig:
        if name not in self.user.keys():  # noqa: SIM118 - without keys(), `???` is not in it
            raise ConfigError(f"{self.source}: has no section `{name}:`")
        return self._mapping(self.user, name, f"`{name}:`")

    def _mapping(self, parent: DictConfig, name: str, key: str) -> DictConfig:
        """What stands below a key; ConfigError for `???`, null, a list or a value, and for ${...} that lead nowhere."""
        value = None
        with suppress(OmegaConfBaseException):
            value = parent[name]
        if not isinstance(value, DictConfig):
            raise ConfigError(f"{self.source}: {key} must hold keys with values; write `{name}: {{}}` for none")
        return value

    def _model(self, known: Catalogue) -> DictConfig:
        section = self._section("model")
        types = self._known("model.arch", self._required(section, "arch", known), known)
        default = self._default("model.model_type", self._required(section, "model_type", types), types)
        return merge(f"{self.source}: model", default, {"model": section})

    def _required(self, section: DictConfig, key: str, known: Iterable[str]) -> str:
        value = "???" if OmegaConf.is_missing(section, key) else section.get(key)
        if value == "???" or not isinstance(value, str):
            fault = "is missing" if value is None else f"cannot be {short(repr(value))}"
            text = "it chooses the default file and must stand in the YAML, not in --options"
            raise ConfigError(f"{self.source}: model.{key} {fault}; {text}. {hint('', known)}")
        return value

    def _datasets(self, known: Catalogue) -> Iterator[DictConfig]:
        sections = self._section("datasets")
        yield {"datasets": {}}
        for name in sections:
            key = f"datasets.{name}"
            section = self._mapping(sections, name, key)
            if name not in known and "builder" not in section:
                own = "Data of your own needs `builder:` with the name of its format"
                raise ConfigError(f"{self.source}: {key}: unknown dataset; {hint(name, known)}. {own}")
            if not isinstance(name, str):
                raise ConfigError(f"{self.source}: {key}: the name of a dataset must be text; put it in quotes")
            files = known.get(name, {})
            if files and not {"type", "default"} & {*section, *files} and "build_info" in section:
                default = OmegaConf.create({"datasets": {name: {"builder": name}}})  # a format, with data of its own
            else:
                default = self._default(f"{key}.type", section.get("type", "default"), files)
            yield merge(f"{self.source}: {key}", default, {"datasets": {name: section}})

    def _default(self, key: str, kind: Any, files: dict[str, Path]) -> DictConfig:
        """The default file of this type; none at all is fine for a class from outside that brings none. Weights of the
        package (`minigpt4/...`) are found from any folder."""
        default = load_yaml(self._known(key, str(kind), files)) if files else OmegaConf.create({})
        for name, value in default.get("model", {}).items():
            if str(value).startswith(f"{PACKAGE.name}/") and not Path(value).exists():
                default.model[name] = str(PACKAGE.parent / value)
        return default

    def _known(self, key: str, name: str, known: Mapping[str, T]) -> T:
        if name not in known:
            raise ConfigError(f"{self.source}: {key}: unknown name {short(repr(name))}; {hint(name, known)}")
        return known[name]

    def _warn_of_unknown_sections(self) -> None:
        sections = ("model", "datasets", "run", "evaluation_datasets", "curation", "imports")
        for name in set(self.user) - set(sections):
            close = nearest(name, sections)
            question = f"; did you mean `{close}:`?" if close else ""
            log.warning("%s: unknown section `%s:` is ignored%s", self.source, name, question)

    def _check_options(self, options: DictConfig) -> None:
        for name, section in OmegaConf.to_container(options, resolve=False).items():
            if name not in OPTION_SECTIONS:
                raise ConfigError(f"--options {short(name)}: unknown section; {hint(name, OPTION_SECTIONS)}")
            if not isinstance(section, dict):
                raise ConfigError(f"--options {name}={short(section)}: name a key of the section: {name}.KEY=VALUE")
        chosen = ["model.arch", "model.model_type"]
        for name, section in options.get("datasets", {}).items():
            chosen.append(f"datasets.{name}.type")
            if name not in self.user.datasets and "builder" not in section:
                log.warning("--options datasets.%s: not in %s, so no default file lies under it", name, self.source)
        for key in chosen:
            value = OmegaConf.select(options, key)
            if value is not None and value != OmegaConf.select(self.user, key):
                log.warning("--options %s=%s: changes the value only, not the default file that it chooses", key, value)
