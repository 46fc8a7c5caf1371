"""`train.py --check`: what a configuration would train and whether it fits on the GPU, without any weights."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from minigpt4.common.config import Config
from minigpt4.common.experiment import Experiment, read_experiment
from minigpt4.common.schemas.model import MiniGPT4Config
from minigpt4.common.schemas.paths import missing_paths
from minigpt4.models.memory import CUDA_ALLOWANCE, GIB, Estimate, Lengths, MetaModel, llm_config_for
from minigpt4.models.sequence import IMAGE_PLACEHOLDER

DEFAULT_GPU_GIB = 24.0
CHARACTERS_PER_TOKEN = 3
"""Cautious for English prompts; LLaMA's tokenizer makes a token of about 4."""


def check(config: Config, gpu_gib: float | None = None) -> str:
    """The report as text; raises ConfigError for a configuration that cannot run.

    `gpu_gib`: memory of the GPU to fit in, GiB; unset: the GPU of this machine, else 24.
    """
    experiment = read_experiment(config, training=False)
    trains = experiment.run.max_epoch is not None and experiment.run.iters_per_epoch is not None
    batch_size = experiment.batch_size() if trains else 1
    model = experiment.model
    llm_config, llm_origin = llm_config_for(model)
    meta = MetaModel(model, llm_config)
    lengths = expected_lengths(model)
    estimate = meta.estimate(batch_size, lengths)
    capacity = gpu_gib or _gpu_gib()
    lines = [
        config.pretty(),
        *_parts_table(estimate),
        f"The LLM is sized as {llm_origin}.",
        "",
        *_memory_table(estimate, model, lengths, capacity),
        *_advice(experiment, meta, lengths, estimate, capacity),
        "",
        _samples_line(experiment) if trains else "The file has no max_epoch and iters_per_epoch: sized as one sample.",
        *_missing(experiment),
    ]
    return "\n".join(lines)


def expected_lengths(cfg: MiniGPT4Config) -> Lengths:
    """Longest sequence of a training batch: the longest prompt of the prompt file and a full answer."""
    path = Path(cfg.prompt_path or "")
    prompts = [line for line in _lines(path) if IMAGE_PLACEHOLDER in line]
    longest = max((len(line) - len(IMAGE_PLACEHOLDER) for line in prompts), default=0)
    template = len(cfg.prompt_template) if prompts else 0
    return Lengths(prompt=math.ceil((longest + template) / CHARACTERS_PER_TOKEN), answer=cfg.max_txt_len)


def largest_batch(meta: MetaModel, lengths: Lengths, estimate: Estimate, capacity_gib: float) -> int:
    """Largest batch whose estimate stays within the GPU; 0 if not even one sample does.

    Memory grows linearly with the batch, so two estimates give the answer and a third one confirms it.
    """
    doubled = meta.estimate(2 * estimate.batch_size, lengths)
    slope = (doubled.total - estimate.total) / estimate.batch_size
    batch = max(0, estimate.batch_size + math.floor((capacity_gib * GIB - estimate.total) / slope))
    while batch and not _fits(meta.estimate(batch, lengths), capacity_gib):
        batch -= 1
    return batch


def _fits(estimate: Estimate, capacity_gib: float) -> bool:
    return estimate.total <= capacity_gib * GIB


def _gpu_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return DEFAULT_GPU_GIB


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _parts_table(estimate: Estimate) -> Iterator[str]:
    yield f"{'part':<28}{'parameters':>16}{'trained':>14}{'GiB':>9}"
    for part in estimate.parts:
        yield f"{part.name:<28}{part.parameters:>16,}{part.trained:>14,}{part.weight_bytes / GIB:>9.2f}"
    total = sum(part.parameters for part in estimate.parts)
    yield f"{'sum':<28}{total:>16,}{estimate.trained:>14,}{estimate.weights / GIB:>9.2f}"


def _memory_table(estimate: Estimate, model: MiniGPT4Config, lengths: Lengths, capacity_gib: float) -> Iterator[str]:
    image = estimate.tokens - 1 - lengths.prompt - lengths.answer
    yield (
        f"Memory of one GPU at batch {estimate.batch_size}, sequences of {estimate.tokens} tokens "
        f"(bos 1, image {image}, prompt {lengths.prompt}, answer {lengths.answer}):"
    )
    for name, size in (
        ("weights", estimate.weights),
        ("gradients and AdamW", estimate.optimizer),
        ("activations, logits", estimate.activations),
        ("CUDA and allocator", CUDA_ALLOWANCE),
        ("total", estimate.total),
    ):
        yield f"  {name:<24}{size / GIB:>8.2f} GiB"
    verdict = "fits in" if _fits(estimate, capacity_gib) else "does NOT fit in"
    yield f"It {verdict} {capacity_gib:.1f} GiB."


def _advice(
    experiment: Experiment, meta: MetaModel, lengths: Lengths, estimate: Estimate, capacity_gib: float
) -> Iterator[str]:
    """The largest batch that fits, and where the configured one does not, each switch that helps."""
    largest = largest_batch(meta, lengths, estimate, capacity_gib)
    if _fits(estimate, capacity_gib):
        yield f"The largest batch that fits is {largest}."
        return
    yield "What changes that:"
    if largest:
        batch = max(n for n in range(1, largest + 1) if estimate.batch_size % n == 0)
        accumulate = estimate.batch_size // batch * experiment.run.accum_grad_iters
        yield (
            f"  batch_size: {batch}, run.accum_grad_iters: {accumulate}: fits, with as many samples in an update "
            f"(the largest batch that fits is {largest})"
        )
    recomputing = meta.estimate(estimate.batch_size, lengths, recompute=True)
    for keys, other in (
        ("model.llm_grad_checkpoint: True", recomputing),
        ("model.llm_precision: int8", meta.stored_as(estimate, "int8")),
        ("model.llm_precision: nf4", meta.stored_as(estimate, "nf4")),
        ("model.llm_grad_checkpoint: True, model.llm_precision: nf4", meta.stored_as(recomputing, "nf4")),
    ):
        if other.total < estimate.total:
            verdict = "fits" if _fits(other, capacity_gib) else "still too large"
            yield f"  {keys}: {other.total / GIB:.2f} GiB, {verdict}"


def _samples_line(experiment: Experiment) -> str:
    run = experiment.run
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
