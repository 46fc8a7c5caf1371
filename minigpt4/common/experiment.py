"""The three sections of a configuration, bound to their schemas and checked against each other."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, RegistryError, errors_as
from minigpt4.common.registry import registry
from minigpt4.common.schemas.binding import bind
from minigpt4.common.schemas.datasets import DatasetConfig
from minigpt4.common.schemas.model import MiniGPT4Config
from minigpt4.common.schemas.run import RunConfig

# Known without importing the model, so that a typo is reported before torch is loaded.
MODEL_SCHEMAS = {"minigpt4": MiniGPT4Config}


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
    experiment = Experiment(model, datasets, run, config.to_dict(), source)
    if training:
        experiment.require_batches()
    _set_image_sizes(experiment)
    _check_parallel(experiment)
    _check_kernels(experiment)
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


def _set_image_sizes(experiment: Experiment) -> None:
    """Processors take the model's image size; one of its own is an error, which the original finds in step 1 only."""
    wanted = getattr(experiment.model, "image_size", None)
    if wanted is None:
        return
    for name, dataset in experiment.datasets.items():
        for split in ("train", "eval"):
            processor = getattr(dataset.vis_processor, split)
            if processor.image_size is None:
                processor.image_size = wanted
            if processor.image_size != wanted:
                raise ConfigError(
                    f"{experiment.source}: datasets.{name}.vis_processor.{split}.image_size: "
                    f"{processor.image_size} must equal model.image_size: {wanted}"
                )


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
