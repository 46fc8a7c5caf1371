"""The schedules give the reference's rates, step by step."""

import json
from pathlib import Path

import pytest
import torch

from minigpt4.common.optims import LinearWarmupCosineLRScheduler, LinearWarmupStepLRScheduler
from minigpt4.common.registry import registry

GOLDEN = json.loads((Path(__file__).parents[1] / "data/parity/golden.json").read_text())["lr"]


def _optimizer(groups: int = 1) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1)]} for _ in range(groups)], lr=1.0)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_every_rate_written_to_the_optimizer_is_the_references(case, golden_tensors):
    optimizer = _optimizer()
    scheduler = registry.get_lr_scheduler_class(case["scheduler"])(optimizer, **case["args"])
    rates = []
    for epoch in range(case["args"]["max_epoch"]):
        for step in range(case["args"]["iters_per_epoch"]):
            scheduler.step(cur_epoch=epoch, cur_step=step)
            rates.append(optimizer.param_groups[0]["lr"])
    expected = golden_tensors[f"lr/{case['name']}"]
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), expected, rtol=1e-12, atol=0)
    epoch = case["args"]["max_epoch"] - 1  # without the steps before
    assert type(scheduler)(None, **case["args"]).lr_at(epoch, step) == rates[-1]


@pytest.mark.parametrize("unset", [None, -1])
def test_unset_values_mean_no_ramp_and_no_decay_and_every_group_gets_the_rate(unset):
    keys = {"max_epoch": 5, "iters_per_epoch": 500, "min_lr": 0.0, "init_lr": 3e-5}
    schedule = LinearWarmupCosineLRScheduler(_optimizer(), **keys, warmup_start_lr=unset, warmup_steps=200)
    assert schedule.lr_at(0, 0) == 3e-5
    optimizer = _optimizer(groups=2)
    LinearWarmupStepLRScheduler(optimizer, **keys, decay_rate=None).step(2, 0)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-5, 3e-5]
