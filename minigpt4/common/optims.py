"""What an update of the weights needs beside torch's optimizer: learning-rate schedules, and the guard that counts,
reports and limits updates whose gradients are not finite.

A schedule is a function of (epoch, step): it remembers nothing, so a resumed run has the rates of an uninterrupted one.
Rates count as in the published recipes, with three traits that users' logs show:

- the cosine runs over all steps, warm-up included, so the rate drops a little where the warm-up ends;
- the warm-up's end is judged by the total step while its ramp follows the step within the epoch, so a
  warm-up longer than an epoch starts again with each epoch;
- the other schedules warm up in epoch 0 only, to its end if need be.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minigpt4.common import devices
from minigpt4.common.errors import RunError
from minigpt4.common.registry import registry
from minigpt4.common.utils import JsonLines

if TYPE_CHECKING:
    from torch.optim import Optimizer

log = logging.getLogger(__name__)

NOT_FINITE = "nonfinite.jsonl"
"""In a run's folder: samples of the updates that were skipped."""


@dataclass
class _Schedule(ABC):
    """What all schedules share; the runner gives each of them the same arguments."""

    optimizer: "Optimizer | None"
    """Its parameter groups get the rate; may be None where only `lr_at` is used."""
    max_epoch: int
    iters_per_epoch: int
    min_lr: float
    init_lr: float
    """Rate that the warm-up leads to."""
    warmup_steps: int = 0
    """Length of the warm-up, iterations."""
    warmup_start_lr: float | None = -1
    """Rate at step 0; negative or None: `init_lr`, which means no ramp."""
    decay_rate: float | None = None
    """Factor an epoch of the step schedule (None: 1)."""
    warmup_ratio: float = 0.0
    """Share of the updates that the warm-up of `cosine_lr` takes."""
    accum_grad_iters: int = 1
    """Iterations of an update, which `cosine_lr` counts."""

    def __post_init__(self) -> None:
        if self.warmup_start_lr is None or self.warmup_start_lr < 0:
            self.warmup_start_lr = self.init_lr
        self.decay_rate = 1.0 if self.decay_rate is None else self.decay_rate

    @abstractmethod
    def lr_at(self, cur_epoch: int, cur_step: int) -> float:
        """Rate at iteration `cur_step` of epoch `cur_epoch`, both counted from 0."""

    def step(self, cur_epoch: int, cur_step: int) -> None:
        """Write the rate to every parameter group; called before each forward pass.

        A group with an `init_lr` of its own, its part's, gets that much more or less.
        """
        lr = self.lr_at(cur_epoch, cur_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["init_lr"] / self.init_lr if "init_lr" in group else lr

    def _warmup_lr(self, cur_step: int) -> float:
        """Straight line from `warmup_start_lr` at step 0 to `init_lr` at `warmup_steps`, level afterwards."""
        rise = (self.init_lr - self.warmup_start_lr) * cur_step / max(self.warmup_steps, 1)
        return min(self.init_lr, self.warmup_start_lr + rise)


@registry.register_lr_scheduler("linear_warmup_cosine_lr")
class LinearWarmupCosineLRScheduler(_Schedule):
    """Linear warm-up, then half a cosine wave over the total steps of the run."""

    def lr_at(self, cur_epoch: int, cur_step: int) -> float:
        total_step = cur_epoch * self.iters_per_epoch + cur_step
        if total_step < self.warmup_steps:
            return self._warmup_lr(cur_step)
        end = self.max_epoch * self.iters_per_epoch
        return (self.init_lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * total_step / end)) + self.min_lr


@registry.register_lr_scheduler("linear_warmup_step_lr")
class LinearWarmupStepLRScheduler(_Schedule):
    """Linear warm-up through epoch 0, then one step down an epoch, never below `min_lr`."""

    def lr_at(self, cur_epoch: int, cur_step: int) -> float:
        if cur_epoch == 0:
            return self._warmup_lr(cur_step)
        return max(self.min_lr, self.init_lr * self.decay_rate**cur_epoch)


@registry.register_lr_scheduler("cosine_lr")
class CosineLRScheduler(_Schedule):
    """LLaVA's (transformers' `cosine`): counted in updates, a warm-up from 0 over `warmup_ratio` of them, rounded up,
    then half a cosine wave over the rest. The first update's rate is 0 where there is a warm-up."""

    def lr_at(self, cur_epoch: int, cur_step: int) -> float:
        an_epoch = -(-self.iters_per_epoch // self.accum_grad_iters)
        update, end = cur_epoch * an_epoch + cur_step // self.accum_grad_iters, self.max_epoch * an_epoch
        warmup = math.ceil(self.warmup_ratio * end)
        if update < warmup:
            return self.init_lr * update / warmup
        wave = 0.5 * (1.0 + math.cos(math.pi * (update - warmup) / max(1, end - warmup)))
        return (self.init_lr - self.min_lr) * wave + self.min_lr


@registry.register_lr_scheduler("constant_lr")
class ConstantLRScheduler(_Schedule):
    """Linear warm-up through epoch 0, then level."""

    def lr_at(self, cur_epoch: int, cur_step: int) -> float:
        return self._warmup_lr(cur_step) if cur_epoch == 0 else self.init_lr


class NonFiniteGuard:
    """Reads each update's flags one update late, so that the host never waits for work it has just queued.

    All ranks see the same gradient flag at the same update and so stop together.
    """

    def __init__(self, folder: Path, limit: int, rank: int) -> None:
        self.lines = JsonLines(folder / NOT_FINITE)
        self.limit = limit
        self.rank = rank
        self.updates = 0
        self.skipped = 0
        self.in_a_row = 0
        self._waiting: tuple[Tensor, Callable[[], None], list[str]] | None = None

    def watch(self, skipped: Tensor, bad_loss: Tensor, empty: Tensor, ids: Sequence[Any]) -> None:
        """Note an update with the image ids of its samples; RunError once `limit` updates in a row were skipped.

        The flags are scalars of bool: `skipped` and `empty`, without targets, the same on all ranks, `bad_loss` this
        rank's.
        """
        self.flush()
        self.updates += 1
        flags, wait = devices.start_copy(torch.stack([skipped, bad_loss, empty]))
        self._waiting = (flags, wait, [str(image_id) for image_id in ids])
        if not devices.is_gpu(skipped.device):
            self.flush()

    def flush(self) -> None:
        """Read what is still on its way."""
        if self._waiting is None:
            return
        (flags, wait, ids), self._waiting = self._waiting, None
        wait()
        skipped, bad_loss, empty = flags.tolist()
        if not skipped:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        what = "answers" if empty else "loss" if bad_loss else "gradient"
        why = "the longest sequence cuts off all its answers" if empty else f"its {what} is not finite"
        log.warning("update %d was skipped: %s (%d so far)", self.updates, why, self.skipped)
        self.lines.append({"update": self.updates, "rank": self.rank, "what": what, "image_ids": ids})
        if self.in_a_row >= self.limit:
            fault, way_out = "not finite", "run.amp_dtype: bf16 in place of fp16, or a lower run.init_lr"
            if empty:
                fault, way_out = "without answers", "a larger model.tokenizer_model_max_length"
            text = f"{self.in_a_row} updates in a row were {fault} and were skipped; their samples are in"
            raise RunError(f"{text} {self.lines.path}. Try {way_out}.")

    def state_dict(self) -> dict[str, int]:
        """Counts so far; flush first."""
        return {"updates": self.updates, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.updates, self.skipped, self.in_a_row = state["updates"], state["skipped"], state["in_a_row"]
