"""A run's runner inside this process, for tests that look into it; also used by `two_ranks.py`."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from minigpt4.common.config import Config
from minigpt4.common.dist_utils import Processes, seed_everything
from minigpt4.models.fsdp import whole
from minigpt4.runners import RunnerBase, choose_folder
from minigpt4.tasks import BaseTask, setup_task

ALONE = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
CONSTANT_RATE = ("run.lr_sched=linear_warmup_step_lr", "run.warmup_steps=0", "run.warmup_lr=-1")
WITHOUT_PROMPTS = "model.prompt_path=null"
TEXT = "a small brown dog runs along the quiet river and two people watch it from the old bridge"


def read(recipe: Path, *options: str) -> Config:
    """The typed configuration of a recipe with options."""
    return Config(SimpleNamespace(cfg_path=str(recipe), options=list(options))).validate()


def build(
    recipe: Path,
    *options: str,
    runner: type[RunnerBase] = RunnerBase,
    task: BaseTask | None = None,
    processes: Processes = ALONE,
) -> RunnerBase:
    """What `train.py` builds, with another runner or task in its place."""
    torch.set_num_threads(1)
    cfg, folder = choose_folder(read(recipe, *options), processes)
    seed_everything(cfg.run.seed + processes.rank)
    task = task or setup_task(cfg)
    datasets = task.build_datasets(cfg)
    return runner(cfg, folder.job_id, task, task.build_model(cfg, processes.device), datasets, processes)


class GivenBatches:
    """A loader of chosen batches, once, in their order."""

    def __init__(self, batches: Sequence[dict[str, Any]]) -> None:
        self.batches = batches
        self.next = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        self.next += 1
        return self.batches[self.next - 1]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]

    def close(self) -> None:
        self.batches = ()


def fed(batches: Sequence[dict[str, Any]]) -> type[RunnerBase]:
    """`RunnerBase`, but these batches come in place of a loader's."""

    class Fed(RunnerBase):
        def build_train_loader(self, datasets: Any) -> GivenBatches:
            return GivenBatches(batches)

    return Fed


def batch(first: int, count: int, size: int = 56) -> dict[str, Any]:
    """The samples `first`, `first + 1`, ...: images that depend on the number, answers of very different lengths."""
    numbers = range(first, first + count)
    images = [torch.randn(3, size, size, generator=torch.Generator().manual_seed(number)) for number in numbers]
    answers = [TEXT[: 3 + number * 29 % len(TEXT)] for number in numbers]
    return {"image": torch.stack(images), "answer": answers, "image_id": [str(number) for number in numbers]}


def trained(runner: RunnerBase) -> dict[str, torch.Tensor]:
    """Copies of the trained weights."""
    return {name: whole(p) for name, p in runner.model.trainable_parameters().items()}


def gradients(runner: RunnerBase) -> list[dict[str, torch.Tensor]]:
    """The gradients of every optimizer step, filled while the runner trains."""
    steps: list[dict[str, torch.Tensor]] = []

    def note(*_: Any) -> None:
        steps.append({name: p.grad.clone() for name, p in runner.parameters.items()})

    runner.optimizer.register_step_pre_hook(note)
    return steps


def digests(model: nn.Module) -> dict[str, str]:
    """A hash of every parameter and buffer."""
    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
        if tensor.ndim
    }


def cut(rank: int, world_size: int, accumulation: int, updates: int, per_update: int = 8) -> list[dict[str, Any]]:
    """Micro-batches of one rank, so that update `n` of all ranks together sees samples 8 n to 8 n + 7."""
    size = per_update // (world_size * accumulation)
    return [
        batch(update * per_update + (micro * world_size + rank) * size, size)
        for update in range(updates)
        for micro in range(accumulation)
    ]
