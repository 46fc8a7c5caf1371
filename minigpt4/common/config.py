"""The configuration of a run: the merged YAML tree that LAVIS users know, and its sections as dataclasses.

The roots are `model:`, `datasets:` and `run:`, beside `evaluation_datasets:`, `curation:` and, from the model's default
file, `preprocess:`. A top-level `imports: [my_package.my_task]` loads code from outside first.
"""

import copy
import dataclasses
import logging
from collections.abc import Collection, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from minigpt4.common.binding import raise_faults, read
from minigpt4.common.config_files import (
    ConfigFile,
    DefaultFiles,
    find_default_files,
    option_pairs,
    to_plain,
    yaml_faults,
)
from minigpt4.common.errors import ConfigError, RegistryError, errors_as
from minigpt4.common.llava_schema import LlavaConfig
from minigpt4.common.model_schema import EVA_CLIP_G, MiniGPT4Config
from minigpt4.common.registry import registry
from minigpt4.common.schemas import CONVERSATIONS, JSON, DatasetConfig, ProcessorConfig, RunConfig

log = logging.getLogger(__name__)

MODEL_SCHEMAS = {"minigpt4": MiniGPT4Config, "llava": LlavaConfig}
"""Known without importing the model, so that a typo is reported before torch is loaded."""
STATISTICS = ("mean", "std")
PUBLISHED_PROCESSORS = {"blip2_image_train", "blip2_image_eval"}
CLIP_PROCESSORS = {"clip_image_train", "clip_image_eval"}


class Config:
    """A run's configuration: the merged tree, and after `validate` its typed sections; `run.init_lr` of the file is
    `config.run_cfg.init_lr` as in LAVIS, and then `config.run.init_lr`.

    Args:
        args: anything with `cfg_path`, of a YAML file or of a run's `run.json`, and `options`.
        default_files: where defaults come from; unset: the shipped ones and those of registered classes.

    Raises ConfigError if a file cannot be read, a name has no default file, an import or an option fails.
    """

    # After `validate`:
    model: Any
    """Of the `config_class` of the model's `arch`."""
    datasets: dict[str, DatasetConfig]
    run: RunConfig
    merged: dict[str, Any]
    """Of `to_dict`."""
    image_processor: ProcessorConfig
    """Of images of no dataset: as the datasets say for `eval`, where they agree."""

    def __init__(self, args: Any, default_files: DefaultFiles | None = None) -> None:
        self.source = str(args.cfg_path)
        self.option_keys = [pair.partition("=")[0] for pair in option_pairs(args.options)]
        with yaml_faults(f"{self.source}: cannot be read as a configuration", options=self.option_keys):
            file = ConfigFile(self.source)
            self.config = file.merged(args.options, default_files or find_default_files())
        self.to_dict()  # an unresolvable ${...} fails here, not in the middle of a run

    @property
    def run_cfg(self) -> DictConfig:
        return self.config.run

    @property
    def model_cfg(self) -> DictConfig:
        return self.config.model

    @property
    def datasets_cfg(self) -> DictConfig:
        return self.config.datasets

    @property
    def evaluation_datasets_cfg(self) -> DictConfig:
        """One mapping per evaluation set, by name; empty if the file has none."""
        return self.config.get("evaluation_datasets", OmegaConf.create({}))

    def to_dict(self) -> dict[str, Any]:
        """The tree in plain types, `${...}` resolved: what checkpoints and `run.json` keep."""
        return to_plain(self.config, self.source, self.option_keys)

    def pretty(self) -> str:
        return OmegaConf.to_yaml(self.config, resolve=True)

    def validate(self, *, training: bool = True) -> "Config":
        """Bind every section to its schema, check them against each other, and return this configuration; ConfigError
        with every fault. `training`: learning rate, epochs and iterations are needed."""
        with errors_as(ConfigError, f"{self.source}: cannot be read as a configuration"):
            self.merged = self.to_dict()
            faults: list[str] = []

            def section(schema: type, values: Any, name: str) -> Any:
                bound, found = read(schema, values, name)
                faults.extend(found)
                return bound

            self.run = section(RunConfig, self.merged["run"], "run")
            self.datasets = {
                name: section(DatasetConfig, values, f"datasets.{name}")
                for name, values in self.merged["datasets"].items()
            }
            self.model = section(self._model_schema(), self.merged["model"], "model")
            if self.run and training:
                faults += self.run.training_faults()
                faults += self._batch_faults() if all(self.datasets.values()) else ()
            if self.run and self.model:
                faults += _contradictions(self)
            self._raise(faults)
            usual = getattr(self.model, "IMAGE_PROCESSOR", MiniGPT4Config.IMAGE_PROCESSOR)
            for name, dataset in self.datasets.items():  # what a dataset does not name follows the model
                given = self.merged["datasets"][name].get("vis_processor") or {}
                for split in ("train", "eval"):
                    if not given.get(split):
                        getattr(dataset.vis_processor, split).name = f"{usual}_{split}"
            self.image_processor = _image_processor(self.datasets.values(), f"{usual}_eval", self.source)
            try:
                faults = [*_image_size_faults(self), *_statistics_faults(self)]
            except ConfigError as error:  # of the tower, which knows no file
                faults = [str(error)]
            self._raise(faults)
        return self

    def _raise(self, faults: Collection[str]) -> None:
        raise_faults(self.source, faults, self.option_keys)

    def replace(self, **sections: Any) -> "Config":
        """A copy with other bound sections: `config.replace(run=...)`."""
        changed = copy.copy(self)
        vars(changed).update(sections)
        return changed

    def sections(self) -> dict[str, object]:
        """Schemas by section name, as `binding.require_paths` takes them."""
        return {"model": self.model, "run": self.run} | {
            f"datasets.{name}": dataset for name, dataset in self.datasets.items()
        }

    def batch_size(self) -> int:
        """Samples of one iteration on one GPU; an iteration reads one dataset, so the largest counts."""
        self._raise(list(self._no_batch()))
        return max(dataset.batch_size or self.run.batch_size_train for dataset in self.datasets.values())

    def _batch_faults(self) -> Iterator[str]:
        """Where there is nothing to train on, or with `run.evaluate` nothing to evaluate on."""
        if self.run.evaluate and not self.run.test_splits:
            yield "run.test_splits: is empty, and run.evaluate evaluates on nothing else; name them, such as [test]"
        elif not (self.run.evaluate and self.run.batch_size_eval):
            yield from self._no_batch()

    def _no_batch(self) -> Iterator[str]:
        if not self.datasets:
            yield "datasets: is empty; name at least one dataset"
        elif not (self.run.batch_size_train or all(dataset.batch_size for dataset in self.datasets.values())):
            yield "run.batch_size_train: no batch size; set it or datasets.NAME.batch_size"

    def _model_schema(self) -> type:
        arch = self.merged["model"]["arch"]
        if arch in MODEL_SCHEMAS:
            return MODEL_SCHEMAS[arch]
        try:
            cls = registry.get_model_class(arch)
        except RegistryError as error:
            raise ConfigError(f"{self.source}: model.arch: {error}") from error
        if not dataclasses.is_dataclass(getattr(cls, "config_class", None)):
            raise ConfigError(f"model.arch: {arch}: {cls.__qualname__} needs a `config_class`, a dataclass")
        return cls.config_class


def _contradictions(config: Config) -> Iterator[str]:
    """Faults between sections: what FSDP cannot shard or scale, and data in a format that the model does not read."""
    storage = getattr(config.model, "llm_storage", None)
    if config.run.parallel == "fsdp" and storage in ("int8", "nf4"):
        yield f"run.parallel: fsdp does not go with an LLM in {storage}; set model.llm_precision, or run.parallel: ddp"
    trains_llm = isinstance(config.model, MiniGPT4Config) and config.model.train.llm.trains_own
    if trains_llm and config.run.parallel == "fsdp" and config.run.amp and config.run.amp_dtype == "fp16":
        yield "run.amp_dtype: fp16 does not go with run.parallel: fsdp and a trained LLM; set it to bf16"
    for name, dataset in config.datasets.items():
        if dataset and dataset.builder == CONVERSATIONS and type(config.model) is MiniGPT4Config:
            own = f"builder: {JSON} and build_info.conversation_field: conversations"
            yield f"datasets.{name}.builder: {CONVERSATIONS} goes with arch: llava; MiniGPT-4 reads such files by {own}"


def _image_processor(datasets: Collection[DatasetConfig], usual: str, source: str) -> ProcessorConfig:
    """That of images of no dataset; a mean or std that one split of a dataset sets holds for its others too."""
    for dataset in datasets:
        train, other = sections = dataset.vis_processor.train, dataset.vis_processor.eval
        if train.name == other.name or {train.name, other.name} in (PUBLISHED_PROCESSORS, CLIP_PROCESSORS):
            for key in STATISTICS:
                given = next((own.kwargs[key] for own in sections if own.kwargs.get(key) is not None), None)
                for own in sections:
                    if given is not None and own.kwargs.get(key) is None:
                        own.kwargs[key] = given
    sections = [dataset.vis_processor.eval for dataset in datasets]
    if all((own.name, own.kwargs) == (sections[0].name, sections[0].kwargs) for own in sections):
        return dataclasses.replace(sections[0]) if sections else ProcessorConfig(usual)
    log.warning("%s: vis_processor.eval of the datasets differ; images of no dataset go through %s", source, usual)
    return ProcessorConfig(usual)


def _image_sections(config: Config) -> dict[str, ProcessorConfig]:
    """All image processors by their keys."""
    sections = {
        f"datasets.{name}.vis_processor.{split}": getattr(dataset.vis_processor, split)
        for name, dataset in config.datasets.items()
        for split in ("train", "eval")
    }
    return sections | {"datasets.NAME.vis_processor.eval": config.image_processor}


def _image_size_faults(config: Config) -> Iterator[str]:
    """Processors take the model's image size, another one of their own being an error, and its aspect ratio."""
    wanted = getattr(config.model, "image_size", None)
    if wanted is None:
        if not isinstance(config.model, MiniGPT4Config):
            return
        from minigpt4.models.vision_tower import image_size_of  # timm or a directory knows

        wanted = config.model.image_size = image_size_of(config.model)
    for key, processor in _image_sections(config).items():
        processor.image_size = processor.image_size or wanted
        if processor.image_size != wanted:
            yield f"{key}.image_size: {processor.image_size} must equal model.image_size: {wanted}"
        if processor.name in CLIP_PROCESSORS:
            processor.kwargs.setdefault("image_aspect_ratio", getattr(config.model, "image_aspect_ratio", "square"))


def _statistics_faults(config: Config) -> Iterator[str]:
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
                yield f"{key}.{name}: is missing, and timm does not know {tower}'s; set mean and std (R, G, B in 0..1)"
            elif given is None:
                section.kwargs[name] = own
            elif own is not None and given != own:
                yield f"{key}.{name}: {given}, but model.vit_model: {tower} was trained with {own}; leave it out"
