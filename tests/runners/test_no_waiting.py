"""Between two lines of the log the loop reads nothing from the device; for the model see tests/models."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch.overrides import TorchFunctionMode

from minigpt4.tasks import ImageTextPretrainTask

READS = {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "equal", "tensor"}
READS |= {"__bool__", "__int__", "__float__", "__index__"}
"""What a GPU is waited for: its numbers and places, and tensors made there out of numbers."""
FLAGS = Counter(tolist=1)
"""Of an update, by `NonFiniteGuard`: on GPUs it reads a copy on the host, of the update before."""


class Watch(TorchFunctionMode):
    """Counts calls by iteration, outside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.iteration, self.in_model = -1, False
        self.seen: dict[int, Counter[str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS and not self.in_model:
            self.seen.setdefault(self.iteration, Counter())[name] += 1
        return func(*args, **(kwargs or {}))


class WatchedTask(ImageTextPretrainTask):
    """Tells the watch where the loop is."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def train_step(self, model: Any, samples: Mapping[str, Any]) -> dict[str, Any]:
        self.watch.iteration += 1
        self.watch.in_model = True
        output = super().train_step(model, samples)
        self.watch.in_model = False
        return output


def test_loop_reads_losses_only_where_a_line_of_the_log_is_due(building, tiny):
    watch, batches = Watch(), building.cut(0, 1, 2, 4)
    options = ("run.max_epoch=1", f"run.iters_per_epoch={len(batches)}", "run.log_freq=4", "run.accum_grad_iters=2")
    runner = building.build(
        tiny.recipe, *options, "run.max_grad_norm=1.0", runner=building.fed(batches), task=WatchedTask(watch)
    )
    with watch:
        runner.train()
    assert watch.iteration == 7
    lines, updates = {0, 4, 7}, {1, 3, 5, 7}
    assert set(watch.seen) == lines | updates
    assert all(watch.seen[update] == FLAGS for update in updates - lines)
