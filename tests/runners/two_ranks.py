"""What two processes do together; `torchrun --nproc-per-node 2 two_ranks.py RECIPE FOLDER` runs all of it.

Every function named `scenario_...` and every entry of the tables is one run, of the real runner; what it returns is
saved by rank for the tests.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from building import CONSTANT_RATE, WITHOUT_PROMPTS, batch, build, cut, digests, fed, gradients, trained
from torch import Tensor, nn

from minigpt4.common.dist_utils import Processes, start_processes, stop_processes
from minigpt4.tasks import ImageTextPretrainTask

UPDATES = 3
ACCUMULATED = {"two_micro_batches": 2, "double_batch": 1}
"""Micro-batches of an update."""
FAULTY = 2
"""Iteration at which rank 1 fails, of 5."""


class FaultyTask(ImageTextPretrainTask):
    """One iteration goes wrong on rank 1."""

    def __init__(self, rank: int, fault: Callable[[Tensor, nn.Module], Tensor], at: int = FAULTY) -> None:
        self.rank, self.fault, self.at = rank, fault, at
        self.done = 0

    def train_step(self, model: nn.Module, samples: Mapping[str, Any]) -> dict[str, Any]:
        output = super().train_step(model, samples)
        if self.done == self.at and (self.rank == 1 or self.fault is none_on_both):
            tokens = 0 if self.fault in (none_on_one, none_on_both) else output["num_tokens"]
            output = {"num_tokens": tokens, "loss": self.fault(output["loss"], model)}
        self.done += 1
        return output


def nan_loss(loss: Tensor, model: nn.Module) -> Tensor:
    return loss * float("nan")


def nan_added(loss: Tensor, model: nn.Module) -> Tensor:
    """The gradient of this loss is finite."""
    return loss + float("nan")


def none_on_one(loss: Tensor, model: nn.Module) -> Tensor:
    """All answers of rank 1 are cut off."""
    return loss * 0.0


def none_on_both(loss: Tensor, model: nn.Module) -> Tensor:
    return loss * 0.0


def infinite_gradient(loss: Tensor, model: nn.Module) -> Tensor:
    """The loss stays as it is."""
    weight = model.module.llama_proj.weight
    handle = weight.register_hook(lambda gradient: (handle.remove(), gradient * float("inf"))[1])
    return loss


def _accumulated(recipe: Path, processes: Processes, accumulation: int) -> dict[str, Any]:
    """Runs `UPDATES` updates and notes the gradient exchanges of every iteration."""
    options = [*CONSTANT_RATE, WITHOUT_PROMPTS, "run.max_epoch=1", f"run.iters_per_epoch={UPDATES * accumulation}"]
    options.append(f"run.accum_grad_iters={accumulation}")
    given = fed(cut(processes.rank, processes.world_size, accumulation, UPDATES))
    runner = build(recipe, *options, runner=given, processes=processes)
    exchanged: list[tuple[int, list[list[int]]]] = []

    def exchange(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        exchanged.append((runner.position.iteration, [list(p.shape) for p in bucket.parameters()]))
        average = bucket.buffer().div_(processes.world_size)
        return dist.all_reduce(average, async_op=True).get_future().then(lambda done: done.value()[0])

    runner.wrapped_model.register_comm_hook(None, exchange)
    before, steps = digests(runner.model), gradients(runner)
    with collectives() as counted:
        original, per_iteration = runner.train_step, []

        def train_step(*arguments: Any) -> Tensor:
            count = len(counted)
            loss = original(*arguments)
            per_iteration.append(counted[count:])
            return loss

        runner.train_step = train_step
        runner.train()
    return {
        "weights": trained(runner),
        "gradients": steps,
        "exchanged": exchanged,
        "collectives": per_iteration,
        "changed": [name for name, digest in digests(runner.model).items() if digest != before[name]],
    }


@contextmanager
def collectives() -> Any:
    """The calls of `dist.all_reduce` in this block."""
    calls, original = [], dist.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **keys: Any) -> Any:
        calls.append(tensor.numel())
        return original(tensor, *arguments, **keys)

    dist.all_reduce = counting
    try:
        yield calls
    finally:
        dist.all_reduce = original


def scenario_prompts_by_rank(recipe: Path, processes: Processes) -> dict[str, Any]:
    """Prompts are drawn: what each rank drew."""
    drawn = []

    class Noting(ImageTextPretrainTask):
        def train_step(self, model: nn.Module, samples: Mapping[str, Any]) -> dict[str, Any]:
            import random

            state = random.getstate()
            drawn.append(random.choice(model.module.prompt_list))
            random.setstate(state)
            return super().train_step(model, samples)

    given = fed([batch(0, 2)] * 8)
    runner = build(recipe, "run.max_epoch=1", "run.iters_per_epoch=8", runner=given, task=Noting(), processes=processes)
    runner.train()
    return {"drawn": drawn, "weights": trained(runner)}


def scenario_start(recipe: Path, processes: Processes) -> dict[str, Any]:
    """Rank 1 begins with other weights, trained and frozen: which of them does rank 0 replace?"""

    class Perturbed(ImageTextPretrainTask):
        def build_model(self, *arguments: Any) -> nn.Module:
            model = super().build_model(*arguments)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(processes.rank)
            return model

    return digests(build(recipe, task=Perturbed(), processes=processes).model)


def _five(recipe: Path, processes: Processes, batches: list, task: Any, *options: str) -> dict[str, Any]:
    lengths = ("run.max_epoch=1", f"run.iters_per_epoch={len(batches)}", WITHOUT_PROMPTS, *CONSTANT_RATE)
    runner = build(recipe, *lengths, *options, runner=fed(batches), task=task, processes=processes)
    original, scales, weights = runner.guard.watch, [runner.scaler.get_scale()], [trained(runner)]

    def watch(*arguments: Any) -> None:
        scales.append(runner.scaler.get_scale())
        weights.append(trained(runner))
        original(*arguments)

    runner.guard.watch = watch  # once an update, after it
    runner.train()
    return {
        "weights": weights,
        "scales": scales,
        "skipped": runner.guard.skipped,
        "folder": str(runner.folder),
        "adam_steps": [int(state["step"]) for state in runner.optimizer.state.values()],
    }


FAULTS = {
    "nan_loss": (nan_loss,),
    "nan_added": (nan_added,),
    "infinite_gradient": (infinite_gradient,),
    "nan_in_first_micro_batch": (nan_loss, "run.accum_grad_iters=2"),
    "nan_with_published_sum": (nan_loss, "run.accum_loss=sum"),
    "nan_fp16": (nan_loss, "run.amp=True"),
    "none_on_one": (none_on_one,),
    "none": (none_on_both,),
    "none_fp16": (none_on_both, "run.amp=True"),
    "none_with_published_sum": (none_on_both, "run.accum_loss=sum"),
    "none_with_mean_of_means": (none_on_both, "run.accum_loss=mean_of_means"),
}


def faulty(recipe: Path, processes: Processes) -> dict[str, dict[str, Any]]:
    """5 iterations, the third of them bad on rank 1, and without it: what a skipped update must equal."""
    batches = [batch(100 * processes.rank + 2 * number, 2) for number in range(5)]
    results = {}
    for name, (fault, *options) in FAULTS.items():
        results[name] = _five(recipe, processes, batches, FaultyTask(processes.rank, fault), *options)
    others = [one for number, one in enumerate(batches) if number != FAULTY]
    return results | {"without_the_faulty_batch": _five(recipe, processes, others, ImageTextPretrainTask())}


def scenario_validation(recipe: Path, processes: Processes) -> dict[str, Any]:
    """5 validation samples in batches of 2: three on rank 0, two on rank 1."""
    runner = build(recipe, "run.valid_splits=[val]", "run.iters_per_epoch=2", processes=processes)
    runner.train()
    return {"folder": str(runner.folder), "seen": [len(list(loader)) for loader in runner.valid_loaders]}


def main(recipe: str, folder: str) -> None:
    """Run the scenarios one after another and save what they return."""
    processes = start_processes("cpu")
    results = {
        name.removeprefix("scenario_"): scenario(Path(recipe), processes)
        for name, scenario in list(globals().items())  # warnings add a name
        if name.startswith("scenario_")
    }
    results |= {name: _accumulated(Path(recipe), processes, n) for name, n in ACCUMULATED.items()}
    results |= faulty(Path(recipe), processes)
    torch.save(results, Path(folder) / f"rank{processes.rank}.pt")
    processes.barrier()
    stop_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])
