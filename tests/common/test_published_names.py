"""The names that forks of LAVIS and MiniGPT-4 import from `common`, `runners` and `tasks`, and how they call them; the
schedules give the reference's rates, step by step."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minigpt4.common.dist_utils import (
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_dist_avail_and_initialized,
    is_main_process,
    main_process,
)
from minigpt4.common.logger import MetricLogger, SmoothedValue, setup_logger
from minigpt4.common.optims import ConstantLRScheduler, LinearWarmupCosineLRScheduler, LinearWarmupStepLRScheduler
from minigpt4.common.registry import registry
from minigpt4.common.utils import get_abs_path, is_url, now
from minigpt4.runners.runner_base import RunnerBase
from minigpt4.tasks import setup_task
from minigpt4.tasks.base_task import BaseTask

TWO_RANKS = """
from types import SimpleNamespace
from minigpt4.common.dist_utils import get_rank, get_world_size, init_distributed_mode, main_process, stop_processes
from minigpt4.common.logger import MetricLogger

args = SimpleNamespace(distributed=True, device="cpu", dist_url="env://")
init_distributed_mode(args)
logger = MetricLogger(delimiter="  ")
for loss in ([1.0, 2.0], [6.0])[get_rank()]:
    logger.update(loss=loss)
logger.synchronize_between_processes()
main_process(print)(args.rank, args.world_size, args.distributed, get_world_size(), logger.global_avg(), flush=True)
stop_processes()
"""


def test_alone():
    args = SimpleNamespace(distributed=True, dist_url="env://", device="cpu")
    init_distributed_mode(args)
    assert (args.distributed, args.rank, args.world_size) == (False, 0, 1)
    assert (get_rank(), get_world_size(), is_main_process(), is_dist_avail_and_initialized()) == (0, 1, True, False)
    assert main_process(lambda value: value + 1)(1) == 2


def test_two_ranks(tmp_path, warm):
    (tmp_path / "script.py").write_text(TWO_RANKS)
    run = warm.script(tmp_path / "script.py", cwd=tmp_path, processes=2, apart=True)
    assert run.wait() == [0, 0], run.text()
    assert run.out.read_text() == "0 2 True 2 loss: 3.0000\n"


def test_smoothed_value():
    meter = SmoothedValue(window_size=3, fmt="{median:.1f} {avg:.2f} {max:.1f} {value:.1f} {global_avg:.1f}")
    for value in (10.0, 1.0, 2.0, torch.tensor(6.0)):
        meter.update(value)
    assert (meter.median, meter.avg, meter.max, meter.value, meter.global_avg) == (2.0, 3.0, 6.0, 6.0, 4.75)
    assert str(meter) == "2.0 3.00 6.0 6.0 4.8"
    meter.update(0.25, n=4)
    assert (meter.count, meter.total, meter.global_avg) == (8, 20.0, 2.5)
    assert math.isnan(SmoothedValue().global_avg)


def test_metric_logger():
    logger = MetricLogger(delimiter="  ")
    logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.6f}"))
    logger.add_meter("loss", SmoothedValue(window_size=1, fmt="{value:.4f}"))
    logger.update(loss=torch.tensor(2.0), lr=1e-4)
    logger.update(loss=3.0)
    logger.synchronize_between_processes()
    assert str(logger) == "lr: 0.000100  loss: 3.0000"
    assert logger.global_avg() == "lr: 0.0001  loss: 2.5000"
    assert logger.loss.global_avg == logger.meters["loss"].global_avg == 2.5
    with pytest.raises(AttributeError, match="speed"):
        _ = logger.speed


def test_log_every(capsys):
    logger = MetricLogger(delimiter="  ")
    logger.add_meter("loss", SmoothedValue(window_size=1, fmt="{value:.4f}"))
    for number in logger.log_every(range(12), 5, "Evaluation"):
        logger.update(loss=float(number))
    *lines, total = capsys.readouterr().out.splitlines()
    starts = [f"Evaluation  [{number:2}/12]  eta: 0:00:00  loss: {number}.0000  time: 0." for number in (0, 5, 10, 11)]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
    assert total.startswith("Evaluation Total time: 0:00:00 (0.")


def test_utils(monkeypatch):
    given = {}
    monkeypatch.setattr("logging.basicConfig", lambda **keys: given.update(keys))
    setup_logger()
    assert given["level"] == 20
    assert now().replace("_", "").isdigit()
    assert is_url("https://host/file.pth")
    assert not is_url("weights/file.pth")
    assert get_abs_path("configs").endswith("/minigpt4/configs")


def test_schedules():
    for name, kind in (
        ("linear_warmup_step_lr", LinearWarmupStepLRScheduler),
        ("linear_warmup_cosine_lr", LinearWarmupCosineLRScheduler),
        ("constant_lr", ConstantLRScheduler),
    ):
        assert registry.get_lr_scheduler_class(name) is kind
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=1.0)
    keys = {"max_epoch": 2, "iters_per_epoch": 3, "min_lr": 0.0, "init_lr": 1.0, "warmup_steps": 2}
    schedule = ConstantLRScheduler(optimizer=optimizer, **keys, warmup_start_lr=0.0, decay_rate=0.5)
    for epoch, step, rate in ((0, 0, 0.0), (0, 1, 0.5), (0, 2, 1.0), (1, 1, 1.0)):
        schedule.step(cur_epoch=epoch, cur_step=step)
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate]
    for start in (None, -1):  # no ramp and no decay
        unset = LinearWarmupStepLRScheduler(None, **keys, warmup_start_lr=start, decay_rate=None)
        assert unset.lr_at(0, 0) == unset.lr_at(1, 0) == 1.0


LR = json.loads((Path(__file__).parents[1] / "data/parity/golden.json").read_text())["lr"]


@pytest.mark.parametrize("case", LR, ids=lambda case: case["name"])
def test_every_rate_written_to_the_optimizer_is_the_references(case, golden_tensors):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = registry.get_lr_scheduler_class(case["scheduler"])(optimizer, **case["args"])
    rates = []
    for epoch in range(case["args"]["max_epoch"]):
        for step in range(case["args"]["iters_per_epoch"]):
            schedule.step(cur_epoch=epoch, cur_step=step)
            rates.append(optimizer.param_groups[0]["lr"])
    expected = golden_tensors[f"lr/{case['name']}"]
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), expected, rtol=1e-12, atol=0)
    epoch = case["args"]["max_epoch"] - 1  # without the steps before
    assert type(schedule)(None, **case["args"]).lr_at(epoch, step) == rates[-1]


def test_tasks_and_runners():
    cfg = SimpleNamespace(run=SimpleNamespace(task="image_text_pretrain"))
    assert isinstance(setup_task(cfg), BaseTask)
    assert registry.get_runner_class("runner_base") is RunnerBase
