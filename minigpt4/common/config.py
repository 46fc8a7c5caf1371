"""The configuration of a run: default files, then the user's YAML, then `--options`, merged in that order.

The roots are `model:`, `datasets:` and `run:`, beside `evaluation_datasets:` and, from the model's default
file, `preprocess:`. A top-level `imports: [my_package.my_task]` loads code from outside first. The result is
a plain OmegaConf tree as LAVIS users know it; `schemas.binding.bind` turns a section into its dataclass.
"""

import copy
import dataclasses
import importlib
import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.binding import bind
from minigpt4.common.errors import ConfigError, RegistryError, errors_as, hint, nearest
from minigpt4.common.model_schema import EVA_CLIP_G, MiniGPT4Config
from minigpt4.common.registry import registry
from minigpt4.common.run_folder import RUN_JSON
from minigpt4.common.schemas import DatasetConfig, RunConfig, VisProcessorConfig
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

log = logging.getLogger(__name__)


# Which YAML files lie under the user's: those in `minigpt4/configs`, and those of registered classes.
#
# Shipped: `models/{arch}_{model_type}.yaml` and `datasets/{name}/{type}.yaml`. A registered model or builder
# brings its own in `PRETRAINED_MODEL_CONFIG_DICT` or `DATASET_CONFIG_DICT`: {type: path}, the path absolute or
# relative to the class's own file or to the package `minigpt4`.


PACKAGE = Path(__file__).resolve().parents[1]
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
    models = _shipped_models(PACKAGE / "configs" / "models")
    datasets = _shipped_datasets(PACKAGE / "configs" / "datasets")
    for arch in registry.list_models():
        _add_class(models, arch, registry.get_model_class(arch), "PRETRAINED_MODEL_CONFIG_DICT")
    for name in registry.list_builders():
        _add_class(datasets, name, registry.get_builder_class(name), "DATASET_CONFIG_DICT")
    return DefaultFiles(models, datasets)


def _shipped_models(folder: Path) -> Catalogue:
    models: Catalogue = {}
    for file in sorted(folder.glob("*.yaml")):
        arch = load_yaml(file).model.arch
        models.setdefault(arch, {})[file.stem.removeprefix(f"{arch}_")] = file
    return models


def _shipped_datasets(folder: Path) -> Catalogue:
    datasets: Catalogue = {}
    for file in sorted(folder.glob("*/*.yaml")):
        datasets.setdefault(file.parent.name, {})[file.stem] = file
    return datasets


def _add_class(catalogue: Catalogue, name: str, cls: type, attribute: str) -> None:
    own = getattr(cls, attribute, None)
    if own:
        catalogue[name] = {kind: _class_file(cls, Path(path)) for kind, path in own.items()}
    else:
        catalogue.setdefault(name, {})


def _class_file(cls: type, path: Path) -> Path:
    module_file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    beside = Path(module_file).resolve().parent / path if module_file else path
    return beside if beside.exists() else PACKAGE / path


# Known without importing the model, so that a typo is reported before torch is loaded.
MODEL_SCHEMAS = {"minigpt4": MiniGPT4Config}

STATISTICS = ("mean", "std")
PUBLISHED_PROCESSORS = {"blip2_image_train", "blip2_image_eval"}

USER_SECTIONS = ("model", "datasets", "run", "evaluation_datasets", "imports")
OPTION_SECTIONS = ("model", "datasets", "run", "evaluation_datasets", "preprocess")


class Arguments(Protocol):
    """What the command line gives: `--cfg-path FILE` and `--options ...`."""

    cfg_path: str
    options: list[str] | None


class Config:
    """A run's configuration: the merged tree as LAVIS users know it, and after `validate` its typed sections.

    Attributes after `validate`:
        model: schema of the model's `arch`.
        datasets: a `DatasetConfig` by name.
        run: a `RunConfig`.
        merged: the tree in plain types, for checkpoints and `run.json`.
        image_processor: what is done to images outside of the datasets: as these say for `eval`, where they agree.

    Args:
        args: anything with `cfg_path` and `options`; the path is that of a YAML file or of a run's `run.json`.
        default_files: where defaults come from; unset: the shipped ones and those of registered classes.

    Raises:
        ConfigError: a file cannot be read, a name has no default file, an import or an option fails.
    """

    model: Any
    datasets: dict[str, DatasetConfig]
    run: RunConfig
    merged: dict[str, Any]
    image_processor: VisProcessorConfig

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

    def validate(self, *, training: bool = True) -> "Config":
        """Bind every section to its schema, check them against each other, and return this configuration.

        `training`: the run needs learning rate, epochs and iterations; demo and evaluation files have none.
        ConfigError with key, file and the nearest valid key.
        """
        with errors_as(ConfigError, f"{self.source}: cannot be read as a configuration"):
            self._bind(training)
        return self

    def _bind(self, training: bool) -> None:
        where = {"source": self.source, "options": self.option_keys}
        self.run = bind(RunConfig, self.run_cfg, section="run", **where)
        if training:
            self.run.require_training_keys(self.source)
        self.datasets = {
            name: bind(DatasetConfig, self.datasets_cfg[name], section=f"datasets.{name}", **where)
            for name in self.datasets_cfg
        }
        self.model = bind(_model_schema(self), self.model_cfg, section="model", **where)
        _share_statistics(self.datasets.values())
        self.merged = self.to_dict()
        self.image_processor = _image_processor(self.datasets, self.source)
        if training:
            self.require_batches()
        _set_image_sizes(self)
        _check_parallel(self)
        _check_kernels(self)
        _set_statistics(self)

    def replace(self, **sections: Any) -> "Config":
        """A copy with other bound sections: `config.replace(run=...)`."""
        changed = copy.copy(self)
        vars(changed).update(sections)
        return changed

    def sections(self) -> dict[str, object]:
        """Schemas by section name, as `schemas.paths` takes them."""
        return {"model": self.model, "run": self.run} | {
            f"datasets.{name}": dataset for name, dataset in self.datasets.items()
        }

    def batch_size(self) -> int:
        """Samples of one iteration on one GPU; an iteration reads one dataset, so the largest counts."""
        if not self.datasets:
            raise ConfigError(f"{self.source}: datasets: is empty; name at least one dataset")
        sizes = [d.batch_size or self.run.batch_size_train for d in self.datasets.values()]
        if None in sizes:
            raise ConfigError(f"{self.source}: no batch size; set datasets.NAME.batch_size or run.batch_size_train")
        return max(sizes)

    def require_batches(self) -> None:
        """ConfigError if there is nothing to train on, or with `run.evaluate` nothing to evaluate on."""
        if self.run.evaluate and not self.run.test_splits:
            raise ConfigError(
                f"{self.source}: run.test_splits: is empty, and run.evaluate: True evaluates on nothing else; name "
                "the splits, such as [test]"
            )
        if not (self.run.evaluate and self.run.batch_size_eval):
            self.batch_size()

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
            log.warning("--options: the last key %r has no value and is ignored", dropped)
        for name in user:
            if name == "preprocess":
                log.warning("%s: `preprocess:` is ignored; it comes from the model's defaults", self.source)
            elif name not in USER_SECTIONS:
                close = nearest(name, USER_SECTIONS)
                question = f"; did you mean `{close}:`?" if close else ""
                log.warning("%s: unknown section `%s:` is ignored%s", self.source, name, question)

    def _check_options(self, options: DictConfig, user: DictConfig) -> None:
        for name, section in OmegaConf.to_container(options, resolve=False).items():
            if name not in OPTION_SECTIONS:
                raise ConfigError(f"--options {short(name)}: unknown section; {hint(name, OPTION_SECTIONS)}")
            if not isinstance(section, dict):
                raise ConfigError(f"--options {name}={short(section)}: name a key of the section: {name}.KEY=VALUE")
        _warn_unless_same(options, user, "model.arch", "model.model_type")
        for name in options.get("datasets", {}):
            if name not in user.datasets:
                log.warning("--options datasets.%s: not in %s, so no default file lies under it", name, self.source)
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
            log.warning(
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


# The three sections of a configuration, bound to their schemas and checked against each other.


def _model_schema(config: Config) -> type:
    arch = config.model_cfg.arch
    if not isinstance(arch, str):
        raise ConfigError(f"{config.source}: model.arch: {arch!r:.200} must be a registered name")
    if arch in MODEL_SCHEMAS:
        return MODEL_SCHEMAS[arch]
    try:
        cls = registry.get_model_class(arch)
    except RegistryError as error:
        raise ConfigError(f"{config.source}: model.arch: {error}") from error
    if not dataclasses.is_dataclass(getattr(cls, "config_class", None)):
        raise ConfigError(
            f"model.arch: {arch}: {cls.__qualname__} needs a `config_class`, the dataclass of its section"
        )
    return cls.config_class


def _share_statistics(datasets: Iterable[DatasetConfig]) -> None:
    """A mean or std that stands with one split of a dataset only holds for the others: the model is the same."""
    for dataset in datasets:
        train, other = sections = dataset.vis_processor.train, dataset.vis_processor.eval
        if train.name == other.name or {train.name, other.name} <= PUBLISHED_PROCESSORS:
            for key in STATISTICS:
                given = next((own.kwargs[key] for own in sections if own.kwargs.get(key) is not None), None)
                for own in sections:
                    if given is not None and own.kwargs.get(key) is None:
                        own.kwargs[key] = given


def _image_processor(datasets: Mapping[str, DatasetConfig], source: str) -> VisProcessorConfig:
    sections = [dataset.vis_processor.eval for dataset in datasets.values()]
    usual = VisProcessorConfig("blip2_image_eval")
    if all((own.name, own.kwargs) == (sections[0].name, sections[0].kwargs) for own in sections):
        return dataclasses.replace(sections[0]) if sections else usual
    log.warning("%s: vis_processor.eval of the datasets differ; images of no dataset go through %s", source, usual.name)
    return usual


def _image_sections(config: Config) -> dict[str, VisProcessorConfig]:
    """All image processors by their keys."""
    sections = {
        f"datasets.{name}.vis_processor.{split}": getattr(dataset.vis_processor, split)
        for name, dataset in config.datasets.items()
        for split in ("train", "eval")
    }
    return sections | {"datasets.NAME.vis_processor.eval": config.image_processor}


def _set_image_sizes(config: Config) -> None:
    """Processors take the model's image size; one of its own is an error, which the original finds in step 1 only."""
    wanted = getattr(config.model, "image_size", None)
    if wanted is None:
        if not isinstance(config.model, MiniGPT4Config):
            return
        from minigpt4.models.vision_tower import image_size_of  # timm or a directory knows

        wanted = config.model.image_size = image_size_of(config.model)
    for key, processor in _image_sections(config).items():
        if processor.image_size is None:
            processor.image_size = wanted
        if processor.image_size != wanted:
            raise ConfigError(
                f"{config.source}: {key}.image_size: {processor.image_size} must equal model.image_size: {wanted}"
            )


def _set_statistics(config: Config) -> None:
    """Images are normalised as the tower was trained; a processor with other numbers is an error."""
    if not isinstance(config.model, MiniGPT4Config):
        return
    tower, sections = config.model.vit_model, _image_sections(config)
    if tower == EVA_CLIP_G and all(own.kwargs.get(name) is None for own in sections.values() for name in STATISTICS):
        return  # the processors' default, which is known without torch
    # These load torch and timm, for which an error of the file should not have to wait.
    from minigpt4.models.vision_tower import tower_pixels
    from minigpt4.processors import takes_mean_and_std

    pixels = tower_pixels(tower)
    for key, section in sections.items():
        for name in STATISTICS if takes_mean_and_std(section.name) else ():
            given, own = section.kwargs.get(name), None if pixels is None else getattr(pixels, name)
            if given is None and own is None:
                raise ConfigError(
                    f"{config.source}: {key}.{name}: is missing, and timm does not know with which {name} of "
                    f"images {tower} was trained; set mean and std, three numbers each (R, G, B in 0..1)"
                )
            if given is None:
                section.kwargs[name] = own
            elif own is not None and given != own:
                raise ConfigError(
                    f"{config.source}: {key}.{name}: {given} is not what model.vit_model: {tower} was trained with, "
                    f"{own}; leave it out"
                )


def _check_parallel(config: Config) -> None:
    """bitsandbytes' 8 and 4 bits are no tensors that can be cut into rows."""
    storage = getattr(config.model, "llm_storage", None)
    if config.run.parallel == "fsdp" and storage in ("int8", "nf4"):
        raise ConfigError(
            f"{config.source}: run.parallel: fsdp does not go with an LLM in {storage}; set model.llm_precision to "
            "fp16 or bf16 (and low_resource: False), or run.parallel: ddp, where each GPU holds the whole LLM"
        )


def _check_kernels(config: Config) -> None:
    """torch.compile and Liger replace the same modules."""
    if config.run.compile and getattr(config.model, "llm_kernels", None):
        raise ConfigError(
            f"{config.source}: run.compile and model.llm_kernels: {config.model.llm_kernels} both fuse the "
            "LLM's norms and MLPs; set one of them"
        )
