"""The configuration of a run: default files, then the user's YAML, then `--options`, merged in that order.

The roots are `model:`, `datasets:` and `run:`, beside `evaluation_datasets:` and, from the model's default
file, `preprocess:`. A top-level `imports: [my_package.my_task]` loads code from outside first. The result is
a plain OmegaConf tree as LAVIS users know it; `schemas.binding.bind` turns a section into its dataclass.
"""

import importlib
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.default_files import Catalogue, DefaultFiles, find_default_files
from minigpt4.common.errors import ConfigError
from minigpt4.common.hints import hint, nearest
from minigpt4.common.run_folder import RUN_JSON
from minigpt4.common.yaml_files import (
    dropped_option,
    load_yaml,
    merge,
    option_pairs,
    parse_options,
    short,
    to_plain,
    yaml_faults,
)

logger = logging.getLogger(__name__)

USER_SECTIONS = ("model", "datasets", "run", "evaluation_datasets", "imports")
OPTION_SECTIONS = ("model", "datasets", "run", "evaluation_datasets", "preprocess")


class Arguments(Protocol):
    """What the command line gives: `--cfg-path FILE` and `--options ...`."""

    cfg_path: str
    options: list[str] | None


class Config:
    """The merged configuration.

    Args:
        args: anything with `cfg_path` and `options`; the path is that of a YAML file or of a run's `run.json`.
        default_files: where defaults come from; unset: the shipped ones and those of registered classes.

    Raises:
        ConfigError: a file cannot be read, a name has no default file, an import or an option fails.
    """

    def __init__(self, args: Arguments, default_files: DefaultFiles | None = None) -> None:
        self.source = str(args.cfg_path)
        self.option_keys = [pair.partition("=")[0] for pair in option_pairs(args.options)]
        with yaml_faults(f"{self.source}: cannot be read as a configuration", options=self.option_keys):
            self.config = self._read(args, default_files)
        self.to_dict()  # an unresolvable ${...} fails here, not in the middle of a run

    def _read(self, args: Arguments, default_files: DefaultFiles | None) -> DictConfig:
        user = _user_file(Path(args.cfg_path))
        import_modules(user.pop("imports", None), self.source)
        defaults = default_files or find_default_files()
        layers = (
            {"run": self._section(user, "run")},
            self._model(user, defaults.models),
            self._datasets(user, defaults.datasets),
            self._evaluation(user),
        )
        options = parse_options(args.options)
        self._warn_about_dropped(user, args.options)
        self._check_options(options, user)
        for pair in option_pairs(args.options):  # each alone, so that the one at fault is named
            merge(f"--options {short(pair)} over {self.source}", *layers, parse_options([pair]))
        return merge(f"--options over {self.source}", *layers, options)

    @property
    def run_cfg(self) -> DictConfig:
        return self.config.run

    @property
    def model_cfg(self) -> DictConfig:
        return self.config.model

    @property
    def datasets_cfg(self) -> DictConfig:
        """One mapping per dataset, by name."""
        return self.config.datasets

    @property
    def evaluation_datasets_cfg(self) -> DictConfig:
        """One mapping per evaluation set, by name; empty if the file has none."""
        return self.config.get("evaluation_datasets", OmegaConf.create({}))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, `${...}` resolved: what checkpoints and `run.json` keep."""
        return to_plain(self.config, self.source, self.option_keys)

    def pretty(self) -> str:
        """The merged configuration as YAML, for the log."""
        return OmegaConf.to_yaml(self.config, resolve=True)

    def _section(self, config: DictConfig, name: str) -> DictConfig:
        if name not in config.keys():  # noqa: SIM118 - without keys(), `???` is not in it
            raise ConfigError(f"{self.source}: has no section `{name}:`")
        return self._mapping(config, name, f"`{name}:`")

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

    def _model(self, user: DictConfig, known: Catalogue) -> DictConfig:
        section = self._section(user, "model")
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

    def _datasets(self, user: DictConfig, known: Catalogue) -> DictConfig:
        sections = self._section(user, "datasets")
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

    def _evaluation(self, user: DictConfig) -> dict[str, DictConfig]:
        if user.get("evaluation_datasets") is None:
            return {}
        return {"evaluation_datasets": self._section(user, "evaluation_datasets")}

    def _default(self, key: str, kind: Any, files: dict[str, Path]) -> DictConfig:
        """The default file of this type; none at all is fine for a class from outside that brings none."""
        if not files:
            return OmegaConf.create({})
        if str(kind) not in files:
            raise self._unknown(key, kind, files)
        return load_yaml(files[str(kind)])

    def _unknown(self, key: str, value: Any, known: Iterable[str]) -> ConfigError:
        return ConfigError(f"{self.source}: {key}: unknown name {short(repr(value))}; {hint(value, known)}")

    def _warn_about_dropped(self, user: DictConfig, options: list[str] | None) -> None:
        dropped = dropped_option(options)
        if dropped is not None:
            logger.warning("--options: the last key %r has no value and is ignored", dropped)
        for name in user:
            if name == "preprocess":
                logger.warning("%s: `preprocess:` is ignored; it comes from the model's defaults", self.source)
            elif name not in USER_SECTIONS:
                close = nearest(name, USER_SECTIONS)
                question = f"; did you mean `{close}:`?" if close else ""
                logger.warning("%s: unknown section `%s:` is ignored%s", self.source, name, question)

    def _check_options(self, options: DictConfig, user: DictConfig) -> None:
        for name, section in OmegaConf.to_container(options, resolve=False).items():
            if name not in OPTION_SECTIONS:
                raise ConfigError(f"--options {short(name)}: unknown section; {hint(name, OPTION_SECTIONS)}")
            if not isinstance(section, dict):
                raise ConfigError(f"--options {name}={short(section)}: name a key of the section: {name}.KEY=VALUE")
        _warn_unless_same(options, user, "model.arch", "model.model_type")
        for name in options.get("datasets", {}):
            if name not in user.datasets:
                logger.warning("--options datasets.%s: not in %s, so no default file lies under it", name, self.source)
            _warn_unless_same(options, user, f"datasets.{name}.type")


def _user_file(file: Path) -> DictConfig:
    """What a YAML file says, or the merged configuration of the run whose `run.json` this is."""
    content = load_yaml(file)
    if file.name != RUN_JSON:
        return content
    if not isinstance(content.get("config"), DictConfig):
        raise ConfigError(f"{file}: has no `config`, which a run writes into it when it starts")
    return content.config


def _warn_unless_same(options: DictConfig, user: DictConfig, *keys: str) -> None:
    """Warn of options that choose a default file in the YAML, but here change no more than the value."""
    for key in keys:
        value = OmegaConf.select(options, key)
        if value is not None and value != OmegaConf.select(user, key):
            logger.warning(
                "--options %s=%s: changes the value, but the defaults that were loaded are those of the YAML "
                "file; set it there to load others",
                key,
                value,
            )


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
