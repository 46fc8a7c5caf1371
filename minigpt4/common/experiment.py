"""The three sections of a configuration, bound to their schemas and checked against each other."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, RegistryError, errors_as
from minigpt4.common.registry import registry
from minigpt4.common.schemas.binding import bind
from minigpt4.common.schemas.datasets import DatasetConfig, VisProcessorConfig
from minigpt4.common.schemas.model import EVA_CLIP_G, MiniGPT4Config
from minigpt4.common.schemas.run import RunConfig

log = logging.getLogger(__name__)

# Known without importing the model, so that a typo is reported before torch is loaded.
MODEL_SCHEMAS = {"minigpt4": MiniGPT4Config}

STATISTICS = ("mean", "std")
PUBLISHED_PROCESSORS = {"blip2_image_train", "blip2_image_eval"}


@dataclass(frozen=True)
class Experiment:
    """A whole configuration, typed."""

    model: Any
    """The schema of the model's `arch`."""

    datasets: dict[str, DatasetConfig]
    run: RunConfig
    merged: dict[str, Any]
    """The merged configuration in plain types, for checkpoints and `run.json`."""

    source: str
    """The user's YAML file, for errors."""

    image_processor: VisProcessorConfig
    """What is done to images outside of the datasets: as these say for `eval`, where they agree."""

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


def read_experiment(config: Config, *, training: bool = True) -> Experiment:
    """Bind every section; raises ConfigError with key, file and the nearest valid key.

    `training`: the run needs learning rate, epochs and iterations; demo and evaluation files have none.
    """
    with errors_as(ConfigError, f"{config.source}: cannot be read as an experiment"):
        return _read(config, training)


def _read(config: Config, training: bool) -> Experiment:
    source = config.source
    where = {"source": source, "options": config.option_keys}
    run = bind(RunConfig, config.run_cfg, section="run", **where)
    if training:
        run.require_training_keys(source)
    datasets = {
        name: bind(DatasetConfig, config.datasets_cfg[name], section=f"datasets.{name}", **where)
        for name in config.datasets_cfg
    }
    model = bind(_model_schema(config), config.model_cfg, section="model", **where)
    _share_statistics(datasets.values())
    experiment = Experiment(model, datasets, run, config.to_dict(), source, _image_processor(datasets, source))
    if training:
        experiment.require_batches()
    _set_image_sizes(experiment)
    _check_parallel(experiment)
    _check_kernels(experiment)
    _set_statistics(experiment)
    return experiment


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


def _image_sections(experiment: Experiment) -> dict[str, VisProcessorConfig]:
    """All image processors by their keys."""
    sections = {
        f"datasets.{name}.vis_processor.{split}": getattr(dataset.vis_processor, split)
        for name, dataset in experiment.datasets.items()
        for split in ("train", "eval")
    }
    return sections | {"datasets.NAME.vis_processor.eval": experiment.image_processor}


def _set_image_sizes(experiment: Experiment) -> None:
    """Processors take the model's image size; one of its own is an error, which the original finds in step 1 only."""
    wanted = getattr(experiment.model, "image_size", None)
    if wanted is None:
        return
    for key, processor in _image_sections(experiment).items():
        if processor.image_size is None:
            processor.image_size = wanted
        if processor.image_size != wanted:
            raise ConfigError(
                f"{experiment.source}: {key}.image_size: {processor.image_size} must equal model.image_size: {wanted}"
            )


def _set_statistics(experiment: Experiment) -> None:
    """Processors without mean and std take those of the tower's training; CLIP's, their default, are EVA-CLIP's."""
    tower = getattr(experiment.model, "vit_model", EVA_CLIP_G)
    if tower == EVA_CLIP_G or not isinstance(experiment.model, MiniGPT4Config):
        return
    # These load torch and timm, for which an error of the file should not have to wait.
    from minigpt4.models.eva_vit import tower_statistics
    from minigpt4.processors import takes_statistics

    own = tower_statistics(tower)
    log.info("model.vit_model %s: images are normalised with its own %s where the file sets no other", tower, own)
    other = []
    for key, section in _image_sections(experiment).items():
        for name in STATISTICS if takes_statistics(section.name) else ():
            given = section.kwargs.get(name)
            if given is None and own is None:
                raise ConfigError(
                    f"{experiment.source}: {key}.{name}: is missing, and timm does not know with which {name} of "
                    f"images {tower} was trained; set mean and std, three numbers each (R, G, B in 0..1)"
                )
            if given is None:
                section.kwargs[name] = own[name]
            elif own is not None and given != own[name]:
                other.append(f"{key}.{name}: {given}")
    if other:
        log.warning("%s: %s; %s was trained with %s", experiment.source, "; ".join(other), tower, own)


def _check_parallel(experiment: Experiment) -> None:
    """bitsandbytes' 8 and 4 bits are no tensors that can be cut into rows."""
    storage = getattr(experiment.model, "llm_storage", None)
    if experiment.run.parallel == "fsdp" and storage in ("int8", "nf4"):
        raise ConfigError(
            f"{experiment.source}: run.parallel: fsdp does not go with an LLM in {storage}; set model.llm_precision to "
            "fp16 or bf16 (and low_resource: False), or run.parallel: ddp, where each GPU holds the whole LLM"
        )


def _check_kernels(experiment: Experiment) -> None:
    """torch.compile and Liger replace the same modules."""
    if experiment.run.compile and getattr(experiment.model, "llm_kernels", None):
        raise ConfigError(
            f"{experiment.source}: run.compile and model.llm_kernels: {experiment.model.llm_kernels} both fuse the "
            "LLM's norms and MLPs; set one of them"
        )
