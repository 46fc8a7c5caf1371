"""The schedules give the reference's rates, step by step, and the published table."""

import json
from pathlib import Path

import pytest
import torch

from minigpt4.common.optims import LinearWarmupCosineLRScheduler, LinearWarmupStepLRScheduler
from minigpt4.common.registry import registry

GOLDEN = json.loads((Path(__file__).parents[1] / "data/parity/golden.json").read_text())["lr"]

# Flickr30k recipe: rate by step, as published to four digits.
FLICKR_TABLE = {
    0: 1.000e-6,
    50: 8.25e-6,
    100: 1.55e-5,
    150: 2.275e-5,
    200: 2.969e-5,
    300: 2.930e-5,
    2000: 1.191e-5,
}


def _optimizer(groups: int = 1) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1)]} for _ in range(groups)], lr=1.0)


def _flickr(**changes) -> LinearWarmupCosineLRScheduler:
    args = {
        "max_epoch": 5,
        "iters_per_epoch": 500,
        "init_lr": 3e-5,
        "min_lr": 1e-5,
        "warmup_start_lr": 1e-6,
        "warmup_steps": 200,
    }
    return LinearWarmupCosineLRScheduler(_optimizer(), **{**args, **changes})


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


@pytest.mark.parametrize(("step", "rate"), FLICKR_TABLE.items())
def test_flickr_recipe_has_the_published_rates(step, rate):
    assert _flickr().lr_at(step // 500, step % 500) == pytest.approx(rate, rel=2e-4)


def test_rate_does_not_depend_on_the_steps_before():
    walked = _flickr()
    for step in range(500):
        walked.step(0, step)
    assert walked.lr_at(3, 17) == _flickr().lr_at(3, 17)


def test_every_parameter_group_gets_the_rate():
    optimizer = _optimizer(groups=2)
    LinearWarmupStepLRScheduler(optimizer, 2, 10, min_lr=0.0, init_lr=0.5).step(0, 0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize("unset", [None, -1])
def test_unset_warmup_rate_means_no_ramp(unset):
    assert _flickr(warmup_start_lr=unset).lr_at(0, 0) == 3e-5


def test_decay_rate_none_keeps_the_rate_of_the_step_schedule():
    scheduler = LinearWarmupStepLRScheduler(_optimizer(), 3, 10, min_lr=0.0, init_lr=0.5, decay_rate=None)
    assert scheduler.lr_at(2, 0) == 0.5
