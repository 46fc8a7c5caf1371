"""Evaluation, after an epoch or alone: mean loss, and captions that are shown or scored."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from minigpt4.common.dist_utils import Processes
from minigpt4.common.schemas import RunConfig
from minigpt4.datasets import EvalLoader, to_device
from minigpt4.evaluation import score_captions
from minigpt4.models.feature_cache import FeatureEncoder
from minigpt4.models.fsdp import uneven_inputs
from minigpt4.runners.updates import autocast
from minigpt4.tasks import BaseTask

SHOWN = 2


@dataclass
class Validation:
    """What weights are worth."""

    loss: float
    """Mean over all targets of all samples, nats a token."""

    scores: dict[str, float] = field(default_factory=dict)
    """Caption metrics by name, if captions were scored."""

    shown: list[str] = field(default_factory=list)
    """`image_id: caption`, for the log of rank 0."""


@dataclass
class _Said:
    """A caption and what was to be said."""

    image_id: str
    caption: str
    reference: str


@torch.no_grad()
def validate(
    model: nn.Module,
    task: BaseTask,
    loaders: Sequence[EvalLoader],
    run: RunConfig,
    processes: Processes,
    features: FeatureEncoder,
) -> Validation:
    """Run all loaders once, each sample on one rank; every rank must call it.

    Args:
        model: put into eval mode, and back into train mode.
        run: its `valid_captions` images (over all ranks) are captioned and scored; 0: a few are shown, none scored.
        features: makes features of a cache whole.
    """
    model.eval()
    captions = run.valid_captions
    totals = torch.zeros(2, dtype=torch.float64, device=processes.device)
    wanted = -(-captions // processes.world_size) if captions else SHOWN
    said: list[_Said] = []
    with uneven_inputs(model.llama_model):
        for loader in loaders:
            for batch in loader:
                samples = features.complete_batch(to_device(batch, processes.device))
                with autocast(run, processes.device):
                    output = task.valid_step(model, samples)
                    if len(said) < wanted and (captions or processes.is_main):
                        said += _caption(task, model, samples, wanted - len(said))
                tokens = output["num_tokens"]
                totals += torch.stack([output["loss"].double() * tokens, totals.new_full((), float(tokens))])
    model.train()
    loss = (processes.sum(totals)[0] / totals[1]).item()
    shown = [f"{one.image_id}: {one.caption}" for one in said[:SHOWN]]
    return Validation(loss, _scores(said, processes) if captions else {}, shown)


def _caption(task: BaseTask, model: nn.Module, samples: dict[str, Any], count: int) -> list[_Said]:
    """Captions of the first `count` samples of a batch; none if the task or the samples have none to offer."""
    if "answer" not in samples:
        return []
    captions = task.caption(model, samples["image"][:count])
    return [_Said(*entry) for entry in zip(samples["image_id"], captions, samples["answer"], strict=False)]


def _scores(said: Sequence[_Said], processes: Processes) -> dict[str, float]:
    """Metrics over the images of all ranks, the same on every rank; what several samples say of an image are its
    references."""
    gathered = processes.gather([(one.image_id, one.caption, one.reference) for one in said])
    scores: dict[str, float] = {}
    if gathered is not None:
        captions: dict[str, str] = {}
        references: dict[str, list[str]] = {}
        for image_id, caption, reference in itertools.chain(*gathered):
            captions.setdefault(image_id, caption)
            references.setdefault(image_id, []).append(reference)
        if captions:
            scores = score_captions(captions, references)
    return processes.broadcast(scores)
