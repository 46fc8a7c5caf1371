"""`train.py --check`: what a configuration would train and whether it fits on the GPU, without any weights."""

import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minigpt4.common.binding import missing_paths
from minigpt4.common.config import Config
from minigpt4.common.devices import free_memory
from minigpt4.common.errors import ConfigError, errors_as
from minigpt4.common.llava_schema import LlavaConfig
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.common.utils import decode
from minigpt4.conversation.templates import IMAGE_PLACEHOLDER
from minigpt4.models.base_model import DTYPES
from minigpt4.models.loading import feature_shape
from minigpt4.models.memory import CUDA_ALLOWANCE, GIB, Estimate, Lengths, MetaModel, llm_config_for

CHARACTERS_PER_TOKEN = 3
"""Cautious for English prompts; LLaMA's tokenizer makes a token of about 4."""
MOST_GPUS = 8
"""Of one machine: looked at to find a number that suffices."""
DEFAULT_GPU_GIB = 23.6
"""What a card of 24 GB has."""


@dataclass(frozen=True)
class Sizing:
    """A configuration whose training step can be sized."""

    config: Config
    meta: MetaModel
    lengths: Lengths
    gpus: int
    gpu_gib: float

    @property
    def is_sharded(self) -> bool:
        return self.config.run.parallel == "fsdp"

    def estimate(self, batch_size: int, **changes: bool) -> Estimate:
        """A step as the configuration has it, with what `MetaModel.estimate` can change."""
        run = self.config.run
        spread = self.is_sharded and self.gpus > 1
        kept = run.accum_grad_iters > 1 or self.gpus > 1
        changes |= {"keeps_gradients": kept, "sharded": spread}
        estimate = self.meta.estimate(batch_size, self.lengths, **changes)
        return self.meta.sharded_over(estimate, self.gpus) if self.is_sharded else estimate

    def fits(self, estimate: Estimate) -> bool:
        return estimate.total <= self.gpu_gib * GIB


def check(config: Config, gpu_gib: float | None = None, gpus: int | None = None) -> str:
    """The report as text; ConfigError for a configuration that cannot run.

    `gpu_gib`: memory to fit in, None: what is free here, else 23.6; `gpus`: None: as the run or its launcher says.
    """
    with errors_as(ConfigError, f"{config.source}: cannot be sized"):
        run = config.validate(training=False).run
        if run.evaluate:
            config.validate()
        gpus = int(os.environ.get("WORLD_SIZE", run.world_size)) if gpus is None else gpus
        if gpu_gib is None:
            free = free_memory()
            gpu_gib = DEFAULT_GPU_GIB if free is None else free / GIB
        if gpus < 1 or not 0 < gpu_gib < math.inf:
            raise ConfigError(f"--gpus: {gpus} must be at least 1, and --gpu-gib: {gpu_gib} above 0")
        trains = not run.evaluate and run.max_epoch is not None and run.iters_per_epoch is not None
        llm_config, llm_origin = llm_config_for(config.model)
        meta = MetaModel(config.model, llm_config, DTYPES[run.amp_dtype] if run.amp else None)
        sizing = Sizing(config, meta, expected_lengths(config.model), gpus, gpu_gib)
        estimate = sizing.estimate(config.batch_size() if trains else run.batch_size_eval or 1)
        lines = [config.pretty(), *_tables(sizing, estimate, llm_origin), *advice(sizing, estimate)]
        lines += ["", _samples_line(config, trains)]
        if missing := missing_paths(config.sections()):
            lines += ["", "Not on this machine, and needed before training:"]
            lines += [f"  {key}: {path}" for key, path in missing]
            lines += ["  (weights: python scripts/download_weights.py --list)"]
        return "\n".join(lines)


def expected_lengths(cfg: MiniGPT4Config) -> Lengths:
    """Longest sequence of a training batch: the longest prompt of the prompt file and a full answer.

    Of LLaVA as long as it may be.
    """
    path = Path(cfg.prompt_path or "")
    with errors_as(ConfigError, f"model.prompt_path: {path} cannot be read"):
        lines = decode(path.read_bytes()).splitlines() if path.is_file() else []
    lengths = [len(line) - len(IMAGE_PLACEHOLDER) for line in lines if IMAGE_PLACEHOLDER in line]
    answer = cfg.max_txt_len
    if isinstance(cfg, LlavaConfig):  # a limit of the whole sequence
        answer = max(1, cfg.tokenizer_model_max_length - 1 - feature_shape(cfg)[0])
    longest = max(lengths) + len(cfg.prompt_template) if lengths else 0
    return Lengths(prompt=math.ceil(longest / CHARACTERS_PER_TOKEN), answer=answer)


def largest_batch(estimate_of: Callable[[int], Estimate], estimate: Estimate, capacity_gib: float) -> int:
    """Largest batch whose estimate, `estimate_of` its size, stays within the GPU; 0 if not even one sample does.

    Memory grows almost linearly with the batch: from the `estimate` of any, two steps lead near to the answer.
    """
    estimate_of, capacity = functools.cache(estimate_of), capacity_gib * GIB
    slope = (estimate_of(2 * estimate.batch_size).total - estimate.total) / estimate.batch_size
    batch = 0
    for _ in range(2):
        batch = max(batch, estimate.batch_size + math.floor((capacity - estimate.total) / slope))
        if batch <= 0:
            return 0
        estimate = estimate_of(batch)
    while batch and estimate_of(batch).total > capacity:
        batch -= 1
    return batch


def advice(sizing: Sizing, estimate: Estimate) -> Iterator[str]:
    """The largest batch that fits, and where the configured one does not, each switch that helps."""
    largest = largest_batch(sizing.estimate, estimate, sizing.gpu_gib)
    if sizing.fits(estimate):
        yield f"The largest batch that fits is {largest}."
        return
    yield "What changes that:"
    if largest:
        batch = max(n for n in range(1, largest + 1) if estimate.batch_size % n == 0)
        accumulate = estimate.batch_size // batch * sizing.config.run.accum_grad_iters
        text = f"  batch_size: {batch}, run.accum_grad_iters: {accumulate}: fits, with as many samples in an update"
        yield f"{text} (the largest batch that fits is {largest})"
    for keys, other in _switches(sizing, estimate):
        if other.total < estimate.total:
            yield f"  {keys}: {other.total / GIB:.2f} GiB, {'fits' if sizing.fits(other) else 'still too large'}"


def _switches(sizing: Sizing, estimate: Estimate) -> Iterator[tuple[str, Estimate]]:
    """Keys and the step with them: recomputation, bitsandbytes if not sharded, the fewest GPUs over which it fits."""
    meta, recomputing = sizing.meta, sizing.estimate(estimate.batch_size, recompute=True)
    yield "model.llm_grad_checkpoint: True", recomputing
    trained = sizing.config.model.train.llm.trains_own
    if not sizing.is_sharded and not trained:
        for storage in ("int8", "nf4"):
            yield f"model.llm_precision: {storage}", meta.stored_as(estimate, storage)
        yield "model.llm_grad_checkpoint: True, model.llm_precision: nf4", meta.stored_as(recomputing, "nf4")
    if sizing.config.model.llm_storage in ("int8", "nf4"):
        return
    for keys, base in (("", estimate), ("model.llm_grad_checkpoint: True, ", recomputing)):
        for gpus in range(2, MOST_GPUS + 1):
            spread = meta.sharded_over(base, gpus)
            if sizing.fits(spread):
                break
        yield f"{keys}run.parallel: fsdp on {gpus} GPUs", spread
        if sizing.fits(spread):
            return


def _tables(sizing: Sizing, estimate: Estimate, llm_origin: str) -> Iterator[str]:
    yield f"{'part':<28}{'parameters':>16}{'trained':>14}{'GiB':>9}"
    for part in estimate.parts:
        yield f"{part.name:<28}{part.parameters:>16,}{part.trained:>14,}{part.weight_bytes / GIB:>9.2f}"
    total = sum(part.parameters for part in estimate.parts)
    yield f"{'sum':<28}{total:>16,}{estimate.trained:>14,}{estimate.weights / GIB:>9.2f}"
    spread = f", its layers spread over {sizing.gpus} GPUs" if sizing.is_sharded else ""
    if sizing.is_sharded and sizing.gpus == 1:
        spread = ", and one GPU has all of it: --gpus N tells over how many run.parallel: fsdp spreads it"
    yield f"The LLM is sized as {llm_origin}{spread}.\n"

    prompt, answer = sizing.lengths.prompt, sizing.lengths.answer
    parts = f"bos 1, image {estimate.tokens - 1 - prompt - answer}, prompt {prompt}, answer {answer}"
    yield f"Memory of one GPU at batch {estimate.batch_size}, sequences of {estimate.tokens} tokens ({parts}):"
    for name, size in (
        ("weights", estimate.weights),
        ("gradients and AdamW", estimate.optimizer),
        ("activations, logits", estimate.activations),
        ("CUDA and allocator", CUDA_ALLOWANCE),
        ("total", estimate.total),
    ):
        yield f"  {name:<24}{size / GIB:>8.2f} GiB"
    yield f"It {'fits in' if sizing.fits(estimate) else 'does NOT fit in'} {sizing.gpu_gib:.1f} GiB."
    if sizing.config.run.feature_cache:
        cached = sizing.estimate(estimate.batch_size, cached=True)
        yield f"Once run.feature_cache knows all images the vision side is not loaded: {cached.total / GIB:.2f} GiB."


def _samples_line(config: Config, trains: bool) -> str:
    run = config.run
    if run.evaluate:
        weights = run.resume_ckpt_path or getattr(config.model, "ckpt", None) or "no checkpoint"
        data = f"{', '.join(run.test_splits)} of {', '.join(config.datasets)}"
        scored = f", {run.valid_captions} captions scored" if run.valid_captions else ""
        return f"run.evaluate: {weights} is evaluated on {data}{scored}, with less memory than the training step above."
    if not trains:
        return "The file has no max_epoch and iters_per_epoch: sized as one sample."
    iterations, batch = run.max_epoch * run.iters_per_epoch, config.batch_size()
    updates = iterations // run.accum_grad_iters
    text = f"{run.max_epoch} epochs x {run.iters_per_epoch:,} iterations = {updates:,} updates"
    return f"{text}; batch {batch} = {iterations * batch:,} samples on each GPU."
