"""From micro-batches to optimizer updates: accumulation, all-reduce, mixed precision, skipping what is not finite.

Nothing here waits for a GPU except `NonFiniteGuard`, which reads the flag of the update before the last.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minigpt4.common.dist_utils import Processes
from minigpt4.common.errors import RunError
from minigpt4.common.schemas import RunConfig

log = logging.getLogger(__name__)


# Losses and gradients that are not finite: counted on the device, reported with their samples, limited.


FILE = "nonfinite.jsonl"


@dataclass
class _Flags:
    """What is known of one update, on its way to the host."""

    update: int
    values: Tensor
    """(2,) bool on the host: bad gradient, bad loss on this rank."""

    arrived: torch.cuda.Event | None
    ids: list[Any]


class NonFiniteGuard:
    """Reads each update's flags one update late, so that the host never waits for work it has just queued.

    All ranks see the same gradient flag at the same update and so stop together.
    """

    def __init__(self, folder: Path, limit: int, rank: int) -> None:
        self.path = folder / FILE
        self.limit = limit
        self.rank = rank
        self.updates = 0
        self.skipped = 0
        self.in_a_row = 0
        self._waiting: _Flags | None = None

    def watch(self, bad_gradient: Tensor, bad_loss: Tensor, ids: Sequence[Any]) -> None:
        """Note an update; raises RunError once `limit` updates in a row were skipped."""
        self.flush()
        flags = torch.stack([bad_gradient, bad_loss])
        self.updates += 1
        if flags.device.type != "cuda":
            self._waiting = _Flags(self.updates, flags, None, list(ids))
            self.flush()
            return
        host = torch.empty(2, dtype=torch.bool, pin_memory=True).copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting = _Flags(self.updates, host, event, list(ids))

    def flush(self) -> None:
        """Read what is still on its way."""
        flags, self._waiting = self._waiting, None
        if flags is None:
            return
        if flags.arrived is not None:
            flags.arrived.synchronize()
        bad_gradient, bad_loss = flags.values.tolist()
        if not bad_gradient:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        self._report(flags, bad_loss)
        if self.in_a_row >= self.limit:
            raise RunError(
                f"{self.in_a_row} updates in a row were not finite and were skipped; their samples are in {self.path}. "
                "With fp16 try run.amp_dtype: bf16; look at the samples; lower run.init_lr."
            )

    def state_dict(self) -> dict[str, int]:
        """Counts so far; settle first."""
        return {"updates": self.updates, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Count on from there."""
        self.updates, self.skipped, self.in_a_row = state["updates"], state["skipped"], state["in_a_row"]

    def _report(self, flags: _Flags, bad_loss: bool) -> None:
        where = "loss" if bad_loss else "gradient"
        log.warning("update %d was skipped: its %s is not finite (%d so far)", flags.update, where, self.skipped)
        record = {"update": flags.update, "rank": self.rank, "what": where, "image_ids": [str(i) for i in flags.ids]}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            log.warning("%s: cannot be written (%s); its samples: %s", self.path, error.strerror, record["image_ids"])


AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ADAM_EPS = 1e-8
TOKEN_UNIT = 1024
"""Losses are weighted by tokens / TOKEN_UNIT until the tokens of the whole update are known; about 1 in practice,
so that fp16 gradients keep their range, and a power of two, so that nothing is rounded."""


class Updater:
    """Owns optimizer, gradient scaler and the gradients of one update, which may span several micro-batches.

    With `accum_loss: mean` an update follows the mean loss over all supervised tokens of its micro-batches on all
    ranks, however they are cut; with `sum` the mean losses of the micro-batches are added and averaged over ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        run: RunConfig,
        processes: Processes,
        finite: NonFiniteGuard,
        step: Callable[[nn.Module, Mapping[str, Any]], dict[str, Any]],
    ) -> None:
        self.run = run
        self.processes = processes
        self.finite = finite
        self.step = step
        self.parameters: dict[str, nn.Parameter] = model.trainable_parameters()
        self.optimizer = torch.optim.AdamW(
            model.get_optimizer_params(run.weight_decay),
            lr=run.init_lr,
            betas=(0.9, run.beta2),
            eps=ADAM_EPS,
            fused=True,  # the implementation that can skip an update without asking the host
        )
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=run.amp and run.amp_dtype == "fp16")
        self.model = distribute(model, processes, self.parameters)
        self._start_update()

    @property
    def pending(self) -> bool:
        """Whether gradients wait for an update."""
        return self._tokens > 0

    def backward(self, samples: Mapping[str, Any], *, sync_gradients: bool) -> Tensor:
        """Add the gradient of one micro-batch; returns its mean loss, on the device.

        Ranks exchange gradients only in the micro-batch that closes the update.
        """
        with self._exchange(sync_gradients):
            with autocast(self.run, self.processes.device):
                output = self.step(self.model, samples)
            loss, tokens = output["loss"], output["num_tokens"]
            detached = loss.detach()
            weight = tokens / TOKEN_UNIT if self.run.accum_loss == "mean" else 1.0
            # NaN if the loss is not finite, else 0: such a loss can have a finite gradient, and every rank must skip it
            poison = detached - detached
            self.scaler.scale(loss * (weight + poison)).backward()
        self._tokens += tokens
        self._bad_losses += (~detached.isfinite()).float()
        self._ids += samples.get("image_id") or []
        return detached

    def update(self) -> None:
        """One optimizer step from the gradients so far; skipped on all ranks if any of them is not finite."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        self.scaler.unscale_(self.optimizer)
        if self.run.accum_loss == "mean":
            torch._foreach_mul_(gradients, self._mean_factor())
        norm = nn.utils.get_total_norm(gradients)
        if self.run.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.run.max_grad_norm, norm)
        bad_gradient = ~norm.isfinite()  # the same on all ranks, for they have the same gradients
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = bad_gradient.float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.finite.watch(bad_gradient, self._bad_losses > 0, self._ids)
        self.optimizer.zero_grad(set_to_none=True)
        self._start_update()

    def state(self) -> dict[str, Any]:
        """Optimizer and scaler in the published layout."""
        scaler = self.scaler.state_dict() if self.scaler.is_enabled() else None
        return {"optimizer": self.optimizer.state_dict(), "scaler": scaler}

    def load_state(self, optimizer: dict[str, Any], scaler: dict[str, Any] | None) -> None:
        """Go on from `state()` or from a published checkpoint."""
        own = self.optimizer.state_dict()["param_groups"]
        for group, ours in zip(optimizer["param_groups"], own, strict=True):
            group["fused"], group["foreach"] = ours["fused"], ours["foreach"]
        self.optimizer.load_state_dict(optimizer)
        if scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)

    def pending_state(self) -> dict[str, Any] | None:
        """This rank's gradients between two updates, None if there are none."""
        if not self.pending:
            return None
        gradients = {name: p.grad.cpu() for name, p in self.parameters.items() if p.grad is not None}
        return {"gradients": gradients, "tokens": self._tokens, "ids": [str(id_) for id_ in self._ids]}

    def load_pending(self, state: Mapping[str, Any] | None) -> None:
        """Take up `pending_state()`."""
        if state is None:
            return
        for name, gradient in state["gradients"].items():
            self.parameters[name].grad = gradient.to(self.processes.device)
        self._tokens, self._ids = state["tokens"], list(state["ids"])

    def _start_update(self) -> None:
        self._tokens = 0
        self._bad_losses = torch.zeros((), device=self.processes.device)
        self._ids: list[Any] = []

    def _exchange(self, sync_gradients: bool) -> AbstractContextManager:
        if sync_gradients or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _mean_factor(self) -> Tensor:
        """From the ranks' averaged, TOKEN_UNIT-weighted sums to the mean over all tokens of the update."""
        tokens = torch.full((), float(self._tokens), device=self.processes.device)  # a tensor from a number would wait
        return TOKEN_UNIT * self.processes.world_size / self.processes.sum(tokens)


def autocast(run: RunConfig, device: torch.device) -> AbstractContextManager:
    """The run's mixed precision."""
    return torch.autocast(device.type, AMP_DTYPES[run.amp_dtype], enabled=run.amp)


def distribute(model: nn.Module, processes: Processes, trained: Mapping[str, nn.Parameter]) -> nn.Module:
    """The model as DDP over its trained parameters only; as it is in a single process.

    DDP would otherwise send 15 GB of frozen weights around at the start.
    """
    if processes.world_size == 1:
        return model
    own = {id(parameter) for parameter in trained.values()}
    ignored = [name for name, parameter in model.named_parameters() if id(parameter) not in own]
    ignored += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    devices = [processes.device] if processes.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
