"""What `train.py --check` sizes, the largest batch that fits, and what helps where the configured one does not."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from minigpt4.common.errors import ConfigError, errors_as
from minigpt4.common.experiment import Experiment
from minigpt4.common.schemas.model import MiniGPT4Config
from minigpt4.common.text import decode
from minigpt4.models.memory import GIB, Estimate, Lengths, MetaModel
from minigpt4.models.sequence import IMAGE_PLACEHOLDER

CHARACTERS_PER_TOKEN = 3
"""Cautious for English prompts; LLaMA's tokenizer makes a token of about 4."""
MOST_GPUS = 8
"""Of one machine: looked at to find a number that suffices."""


@dataclass(frozen=True)
class Sizing:
    """A configuration whose training step can be sized."""

    experiment: Experiment
    meta: MetaModel
    gpus: int
    """Processes of the run."""

    @cached_property
    def lengths(self) -> Lengths:
        """Of the longest sequence."""
        return expected_lengths(self.experiment.model)

    @property
    def is_sharded(self) -> bool:
        """Whether the configuration spreads the LLM over the GPUs of the run."""
        return self.experiment.run.parallel == "fsdp"

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
        accumulate = estimate.batch_size // batch * sizing.experiment.run.accum_grad_iters
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
    if sizing.experiment.model.llm_storage in ("int8", "nf4"):
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
