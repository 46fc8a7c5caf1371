"""`train.py --check`: what a configuration would train and whether it fits on the GPU, without any weights."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from minigpt4.common.binding import missing_paths
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, errors_as
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.common.schemas import RunConfig
from minigpt4.common.utils import decode
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER
from minigpt4.models.memory import CUDA_ALLOWANCE, GIB, Estimate, Lengths, MetaModel, llm_config_for

# What `train.py --check` sizes, the largest batch that fits, and what helps where the configured one does not.


CHARACTERS_PER_TOKEN = 3
"""Cautious for English prompts; LLaMA's tokenizer makes a token of about 4."""
MOST_GPUS = 8
"""Of one machine: looked at to find a number that suffices."""


@dataclass(frozen=True)
class Sizing:
    """A configuration whose training step can be sized."""

    config: Config
    meta: MetaModel
    gpus: int
    """Processes of the run."""

    @cached_property
    def lengths(self) -> Lengths:
        """Of the longest sequence."""
        return expected_lengths(self.config.model)

    @property
    def is_sharded(self) -> bool:
        """Whether the configuration spreads the LLM over the GPUs of the run."""
        return self.config.run.parallel == "fsdp"

    def estimate(self, batch_size: int, *, recompute: bool | None = None, cached: bool = False) -> Estimate:
        """A step as the configuration has it, with what `MetaModel.estimate` can change."""
        estimate = self.meta.estimate(batch_size, self.lengths, recompute=recompute, cached=cached)
        return self.meta.sharded_over(estimate, self.gpus) if self.is_sharded else estimate

    def spread(self) -> str:
        """Where the LLM's layers are, for the end of a sentence about its size."""
        if not self.is_sharded:
            return ""
        if self.gpus == 1:
            return ", and one GPU has all of it: --gpus N tells over how many run.parallel: fsdp spreads it"
        return f", its layers spread over {self.gpus} GPUs"


def expected_lengths(cfg: MiniGPT4Config) -> Lengths:
    """Longest sequence of a training batch: the longest prompt of the prompt file and a full answer."""
    path = Path(cfg.prompt_path or "")
    with errors_as(ConfigError, f"model.prompt_path: {path} cannot be read"):
        lines = decode(path.read_bytes()).splitlines() if path.is_file() else []
    prompts = [line for line in lines if IMAGE_PLACEHOLDER in line]
    longest = max((len(line) - len(IMAGE_PLACEHOLDER) for line in prompts), default=0)
    template = len(cfg.prompt_template) if prompts else 0
    return Lengths(prompt=math.ceil((longest + template) / CHARACTERS_PER_TOKEN), answer=cfg.max_txt_len)


def fits(estimate: Estimate, capacity_gib: float) -> bool:
    """Whether a GPU of that size is large enough."""
    return estimate.total <= capacity_gib * GIB


def largest_batch(estimate_of: Callable[[int], Estimate], estimate: Estimate, capacity_gib: float) -> int:
    """Largest batch whose estimate stays within the GPU; 0 if not even one sample does.

    Memory grows almost linearly with the batch: two estimates lead near to the answer, a third one to it.

    Args:
        estimate_of: of a batch size.
        estimate: of any batch size.
    """
    doubled = estimate_of(2 * estimate.batch_size)
    slope = (doubled.total - estimate.total) / estimate.batch_size

    def reached_from(known: Estimate) -> int:
        return max(0, known.batch_size + math.floor((capacity_gib * GIB - known.total) / slope))

    batch = reached_from(estimate)
    if batch:
        batch = max(batch, reached_from(estimate_of(batch)))
    while batch and not fits(estimate_of(batch), capacity_gib):
        batch -= 1
    return batch


def advice(sizing: Sizing, estimate: Estimate, capacity_gib: float) -> Iterator[str]:
    """The largest batch that fits, and where the configured one does not, each switch that helps."""
    largest = largest_batch(sizing.estimate, estimate, capacity_gib)
    if fits(estimate, capacity_gib):
        yield f"The largest batch that fits is {largest}."
        return
    yield "What changes that:"
    if largest:
        batch = max(n for n in range(1, largest + 1) if estimate.batch_size % n == 0)
        accumulate = estimate.batch_size // batch * sizing.config.run.accum_grad_iters
        yield (
            f"  batch_size: {batch}, run.accum_grad_iters: {accumulate}: fits, with as many samples in an update "
            f"(the largest batch that fits is {largest})"
        )
    recomputing = sizing.estimate(estimate.batch_size, recompute=True)
    for keys, other in (
        ("model.llm_grad_checkpoint: True", recomputing),
        *_stored_smaller(sizing, estimate, recomputing),
        *_spread_wider(sizing, estimate, recomputing, capacity_gib),
    ):
        if other.total < estimate.total:
            verdict = "fits" if fits(other, capacity_gib) else "still too large"
            yield f"  {keys}: {other.total / GIB:.2f} GiB, {verdict}"


def _stored_smaller(sizing: Sizing, estimate: Estimate, recomputing: Estimate) -> Iterator[tuple[str, Estimate]]:
    """bitsandbytes' precisions, which a sharded LLM cannot have."""
    if sizing.is_sharded:
        return
    for storage in ("int8", "nf4"):
        yield f"model.llm_precision: {storage}", sizing.meta.stored_as(estimate, storage)
    both = "model.llm_grad_checkpoint: True, model.llm_precision: nf4"
    yield both, sizing.meta.stored_as(recomputing, "nf4")


def _spread_wider(
    sizing: Sizing, estimate: Estimate, recomputing: Estimate, capacity_gib: float
) -> Iterator[tuple[str, Estimate]]:
    """The LLM over as few GPUs as suffice; if none do, also with recomputation."""
    if sizing.config.model.llm_storage in ("int8", "nf4"):
        return
    for keys, base in (("", estimate), ("model.llm_grad_checkpoint: True, ", recomputing)):
        gpus, spread = gpus_needed(sizing.meta, base, capacity_gib)
        yield f"{keys}run.parallel: fsdp on {gpus} GPUs", spread
        if fits(spread, capacity_gib):
            return


def gpus_needed(meta: MetaModel, estimate: Estimate, capacity_gib: float) -> tuple[int, Estimate]:
    """The fewest GPUs over which the LLM fits, at least 2, and what each then needs; MOST_GPUS if none suffice."""
    for gpus in range(2, MOST_GPUS):
        spread = meta.sharded_over(estimate, gpus)
        if fits(spread, capacity_gib):
            return gpus, spread
    return MOST_GPUS, meta.sharded_over(estimate, MOST_GPUS)


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
    config = config.validate(training=False)
    run = config.run
    if run.evaluate:
        config.require_batches()
    trains = not run.evaluate and run.max_epoch is not None and run.iters_per_epoch is not None
    batch_size = config.batch_size() if trains else run.batch_size_eval or 1
    gpus = _number_of_gpus(gpus, run)
    llm_config, llm_origin = llm_config_for(config.model)
    sizing = Sizing(config, MetaModel(config.model, llm_config), gpus)
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
        _samples_line(config, trains),
        *_missing(config),
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
    if sizing.config.run.feature_cache:
        cached = sizing.estimate(estimate.batch_size, cached=True)
        yield f"Once run.feature_cache knows all images the vision side is not loaded: {cached.total / GIB:.2f} GiB."


def _samples_line(config: Config, trains: bool) -> str:
    run = config.run
    if run.evaluate:
        weights = run.resume_ckpt_path or getattr(config.model, "ckpt", None) or "no checkpoint"
        scored = f", {run.valid_captions} captions scored" if run.valid_captions else ""
        return (
            f"run.evaluate: {weights} is evaluated on {', '.join(run.test_splits)} of {', '.join(config.datasets)}"
            f"{scored}; nothing is trained, which takes less memory than the training step above."
        )
    if not trains:
        return "The file has no max_epoch and iters_per_epoch: sized as one sample."
    iterations = run.max_epoch * run.iters_per_epoch
    updates = iterations // run.accum_grad_iters
    return (
        f"{run.max_epoch} epochs x {run.iters_per_epoch:,} iterations = {updates:,} updates; "
        f"batch {config.batch_size()} = {iterations * config.batch_size():,} samples on each GPU."
    )


def _missing(config: Config) -> Iterator[str]:
    missing = missing_paths(config.sections())
    if missing:
        yield ""
        yield "Not on this machine, and needed before training:"
        yield from (f"  {key}: {path}" for key, path in missing)
        yield "  (weights: python scripts/download_weights.py --list)"
