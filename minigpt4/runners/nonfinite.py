"""Optimizer steps that are not finite: counted on the device, reported with their samples, limited."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt4.common.errors import RunError

log = logging.getLogger(__name__)

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
        self._report(flags, "loss" if bad_loss else "gradient")
        if self.in_a_row >= self.limit:
            raise RunError(
                f"{self.in_a_row} updates in a row were not finite and were skipped; their samples are in {self.path}. "
                "With fp16 try run.amp_dtype: bf16; look at the samples; lower run.init_lr."
            )

    def _report(self, flags: _Flags, what: str) -> None:
        log.warning("update %d was skipped: its %s is not finite (%d so far)", flags.update, what, self.skipped)
        record = {"update": flags.update, "rank": self.rank, "what": what, "image_ids": [str(i) for i in flags.ids]}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            log.warning("%s: cannot be written (%s); its samples: %s", self.path, error.strerror, record["image_ids"])

    def state_dict(self) -> dict[str, int]:
        """Counts so far; flush first."""
        return {"updates": self.updates, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Count on from there."""
        self.updates, self.skipped, self.in_a_row = state["updates"], state["skipped"], state["in_a_row"]
