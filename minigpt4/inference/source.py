"""What a model is loaded from: a YAML file, or the folder of a run."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from omegaconf import OmegaConf

from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, WeightsError, errors_as
from minigpt4.common.experiment import Experiment, read_experiment
from minigpt4.common.run_checkpoints import best_checkpoint
from minigpt4.common.run_folder import RunFolder
from minigpt4.common.yaml_files import parse_options

log = logging.getLogger(__name__)

WEIGHTS_ENDINGS = {".pth", ".pt", ".bin", ".safetensors"}


def read_source(source: str | Path, options: Sequence[str] = ()) -> Experiment:
    """The configuration of a YAML file, or of a run's folder with its best checkpoint or else its newest.

    Args:
        options: KEY=VALUE each; they go over the file's. `model.ckpt` goes over the run's own checkpoint, too.

    Raises:
        ConfigError: there is no such file, it is no configuration, or the folder is not that of a run.
        WeightsError: the run has no whole checkpoint.
    """
    with errors_as(ConfigError, str(source)):
        path = Path(source).expanduser()
        is_folder = path.is_dir()
    options = [options] if isinstance(options, str) else list(options)
    if is_folder:
        return _of_run(RunFolder(path), options)
    if path.suffix.lower() in WEIGHTS_ENDINGS:
        raise ConfigError(
            f"{path}: is a weights file; name its YAML, with the option model.ckpt={path}, or the folder of its run"
        )
    return _read(path, options)


def _read(file: Path, options: list[str]) -> Experiment:
    return read_experiment(Config(SimpleNamespace(cfg_path=str(file), options=options)), training=False)


def _of_run(run: RunFolder, options: list[str]) -> Experiment:
    if not run.run_json.is_file():
        raise ConfigError(f"{run.path}: is not the folder of a run, for it has no {run.run_json.name}{_runs_in(run)}")
    experiment = _read(run.run_json, options)
    if OmegaConf.select(parse_options(options), "model.ckpt") is not None:
        return experiment
    checkpoint = best_checkpoint(run.path)
    if checkpoint is None:
        raise WeightsError(f"{run.path}: the run has no whole checkpoint yet")
    log.info("%s: taking its checkpoint %s", run.path, checkpoint.name)
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, ckpt=str(checkpoint)))


def _runs_in(folder: RunFolder) -> str:
    """Words of help: which runs lie one level deeper."""
    runs = sorted(file.parent.name for file in folder.path.glob(f"*/{folder.run_json.name}"))
    return f"; the last of the {len(runs)} runs in it is {folder.path / runs[-1]}" if runs else ""
