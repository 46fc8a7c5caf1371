"""`train.py --check`: what a configuration would train and whether it fits on the GPU, without any weights."""

import math
import os
from collections.abc import Iterator

import torch

from minigpt4.check_advice import Sizing, advice, fits
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, errors_as
from minigpt4.common.experiment import Experiment, read_experiment
from minigpt4.common.schemas.paths import missing_paths
from minigpt4.common.schemas.run import RunConfig
from minigpt4.models.memory import CUDA_ALLOWANCE, GIB, Estimate, MetaModel, llm_config_for

DEFAULT_GPU_GIB = 24.0


def check(config: Config, gpu_gib: float | None = None, gpus: int | None = None) -> str:
    """The report as text; raises ConfigError for a configuration that cannot run.

    Args:
        gpu_gib: memory of the GPU to fit in, GiB; None: the GPU of this machine, else 24.
        gpus: processes of the run, for `run.parallel: fsdp`; None: as the launcher or `run.world_size` says.
    """
    with errors_as(ConfigError, f"{config.source}: cannot be sized"):
        return _report(config, gpu_gib, gpus)


def _report(config: Config, gpu_gib: float | None, gpus: int | None) -> str:
    experiment = read_experiment(config, training=False)
    run = experiment.run
    if run.evaluate:
        experiment.require_batches()
    trains = not run.evaluate and run.max_epoch is not None and run.iters_per_epoch is not None
    batch_size = experiment.batch_size() if trains else run.batch_size_eval or 1
    gpus = _number_of_gpus(gpus, run)
    llm_config, llm_origin = llm_config_for(experiment.model)
    sizing = Sizing(experiment, MetaModel(experiment.model, llm_config), gpus)
    estimate = sizing.estimate(batch_size)
    capacity = _gpu_gib() if gpu_gib is None else gpu_gib
    if not 0 < capacity < math.inf:
        raise ConfigError(f"--gpu-gib: {capacity} must be a number above 0")
    lines = [
        config.pretty(),
        *_parts_table(estimate),
        f"The LLM is sized as {llm_origin}{sizing.spread()}.",
        "",
        *_memory_table(estimate, sizing, capacity),
        *advice(sizing, estimate, capacity),
        "",
        _samples_line(experiment, trains),
        *_missing(experiment),
    ]
    return "\n".join(lines)


def _number_of_gpus(given: int | None, run: RunConfig) -> int:
    number = given if given is not None else int(os.environ.get("WORLD_SIZE", run.world_size))
    if number < 1:
        raise ConfigError(f"--gpus: {number} must be at least 1")
    return number


def _gpu_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return DEFAULT_GPU_GIB


def _parts_table(estimate: Estimate) -> Iterator[str]:
    yield f"{'part':<28}{'parameters':>16}{'trained':>14}{'GiB':>9}"
    for part in estimate.parts:
        yield f"{part.name:<28}{part.parameters:>16,}{part.trained:>14,}{part.weight_bytes / GIB:>9.2f}"
    total = sum(part.parameters for part in estimate.parts)
    yield f"{'sum':<28}{total:>16,}{estimate.trained:>14,}{estimate.weights / GIB:>9.2f}"


def _memory_table(estimate: Estimate, sizing: Sizing, capacity_gib: float) -> Iterator[str]:
    prompt, answer = sizing.lengths.prompt, sizing.lengths.answer
    yield (
        f"Memory of one GPU at batch {estimate.batch_size}, sequences of {estimate.tokens} tokens "
        f"(bos 1, image {estimate.tokens - 1 - prompt - answer}, prompt {prompt}, answer {answer}):"
    )
    for name, size in (
        ("weights", estimate.weights),
        ("gradients and AdamW", estimate.optimizer),
        ("activations, logits", estimate.activations),
        ("CUDA and allocator", CUDA_ALLOWANCE),
        ("total", estimate.total),
    ):
        yield f"  {name:<24}{size / GIB:>8.2f} GiB"
    verdict = "fits in" if fits(estimate, capacity_gib) else "does NOT fit in"
    yield f"It {verdict} {capacity_gib:.1f} GiB."
    if sizing.experiment.run.feature_cache:
        cached = sizing.estimate(estimate.batch_size, cached=True)
        yield f"Once run.feature_cache knows all images the vision side is not loaded: {cached.total / GIB:.2f} GiB."


def _samples_line(experiment: Experiment, trains: bool) -> str:
    run = experiment.run
    if run.evaluate:
        weights = run.resume_ckpt_path or getattr(experiment.model, "ckpt", None) or "no checkpoint"
        scored = f", {run.valid_captions} captions scored" if run.valid_captions else ""
        return (
            f"run.evaluate: {weights} is evaluated on {', '.join(run.test_splits)} of {', '.join(experiment.datasets)}"
            f"{scored}; nothing is trained, which takes less memory than the training step above."
        )
    if not trains:
        return "The file has no max_epoch and iters_per_epoch: sized as one sample."
    iterations = run.max_epoch * run.iters_per_epoch
    updates = iterations // run.accum_grad_iters
    return (
        f"{run.max_epoch} epochs x {run.iters_per_epoch:,} iterations = {updates:,} updates; "
        f"batch {experiment.batch_size()} = {iterations * experiment.batch_size():,} samples on each GPU."
    )


def _missing(experiment: Experiment) -> Iterator[str]:
    missing = missing_paths(experiment.sections())
    if missing:
        yield ""
        yield "Not on this machine, and needed before training:"
        yield from (f"  {key}: {path}" for key, path in missing)
        yield "  (weights: python scripts/download_weights.py --list)"
