"""The log of a run: console, log.txt and metrics.jsonl on rank 0 and the others, trackers, and the start-up clock."""

import io
import json
import logging
import os
import pty
import re
import socket
import subprocess
import sys
import termios
import time
from contextlib import suppress

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minigpt4.common import dist_utils, start_clock
from minigpt4.common.dist_utils import Processes
from minigpt4.common.errors import ConfigError
from minigpt4.common.run_folder import RunFolder
from minigpt4.common.run_log import RunLog, check_trackers
from minigpt4.common.schemas import RunConfig
from minigpt4.common.start_clock import FIRST_STEP, LLM, VISION, finish, phase

PUBLISHED_LINE = re.compile(
    r"Train: data epoch: \[0\]  \[(\d)/3\]  eta: 0:00:0\d  lr: 0\.000100  loss: \d\.0000"
    r"  time: \d+\.\d{4}  data: \d+\.\d{4}(?:  max mem: \d+)?  samples/s: \d+\.\d  data wait: \d+%"
)


def _run_log(tmp_path, rank=0, world_size=1, **keys) -> RunLog:
    folder = RunFolder(tmp_path / "20250608_111442")
    folder.path.mkdir(exist_ok=True)
    run = RunConfig(**{"init_lr": 1e-4, "max_epoch": 2, "iters_per_epoch": 10, "log_freq": 4} | keys)
    run_log = RunLog(run, folder, Processes(rank, rank, world_size, torch.device("cpu")), {"run": {"seed": 42}})
    run_log.begin()
    return run_log


def _train(run_log, losses, first=0) -> None:
    with run_log.epoch(0, len(losses), first) as epoch_log:
        for loss in losses[first:]:
            epoch_log.step(torch.tensor(loss), 1e-4, num_samples=2)


def _records(tmp_path, name) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "20250608_111442" / name).read_text().splitlines()]


@pytest.fixture
def sums(monkeypatch) -> list[torch.Tensor]:
    """What this rank gave to be summed; another has an lr of 1e-4 twice, and losses of 2 and 4."""
    given: list[torch.Tensor] = []

    def all_reduced(value):
        given.append(value)
        return value + torch.tensor([[2e-4, 2], [6.0, 2]])

    monkeypatch.setattr(dist_utils, "all_reduced", all_reduced)
    return given


@pytest.mark.parametrize("rank", [0, 1])
def test_averages_cover_all_ranks_and_rank_0_alone_writes(tmp_path, sums, capsys, rank):
    run_log = _run_log(tmp_path, rank=rank, world_size=2)
    _train(run_log, [1.0, 2.0])
    run_log.validation(0, 1.5, ["a dog"])
    run_log.close()
    assert len(sums) == 1
    assert bool(capsys.readouterr().out) == bool(list((tmp_path / "20250608_111442").iterdir())) == (rank == 0)
    assert rank or _records(tmp_path, "log.txt")[0]["train_loss"] == "2.250"


def test_losses_wait_on_their_device_until_a_line_is_due(tmp_path):
    with _run_log(tmp_path).epoch(0, 10) as epoch_log:
        epoch_log.step(torch.tensor(1.0, requires_grad=True), 1e-4, num_samples=1)
        value = torch.tensor(2.0)
        epoch_log.step(value, 1e-4, num_samples=1)
        value.fill_(99.0)  # the step's buffer is used again before anyone reads it
        for _ in range(3):
            epoch_log.step(torch.tensor(5.0), 1e-4, num_samples=1)
    assert _records(tmp_path, "metrics.jsonl")[1]["loss_mean"] == pytest.approx((2 + 3 * 5) / 4)


def test_loss_that_is_not_finite_is_shown_and_left_out_of_the_means(tmp_path, capsys):
    _train(_run_log(tmp_path), [1.0, 2.0, float("nan")])
    assert "loss: nan" in capsys.readouterr().out
    assert _records(tmp_path, "log.txt")[0]["train_loss"] == "1.500"
    last = _records(tmp_path, "metrics.jsonl")[-1]
    assert (last["loss"], last["loss_mean"]) == (None, 2.0)


def test_metrics_have_a_line_for_each_log_iteration(tmp_path, sums):
    with _run_log(tmp_path, world_size=3).epoch(1, 10) as epoch_log:
        for i in range(10):
            with epoch_log.waiting_for_data():
                time.sleep(0.002)
            epoch_log.step(torch.tensor(float(i)), 1e-4, num_samples=4)
    lines = _records(tmp_path, "metrics.jsonl")
    assert [(line["step"], line["epoch"], line["iteration"]) for line in lines] == [
        (10 + iteration, 1, iteration) for iteration in (0, 4, 8, 9)
    ]
    second = lines[1]
    assert (second["lr"], second["loss"], second["loss_mean"]) == (1e-4, 4.0, 2.5)
    assert second["samples_per_second"] == pytest.approx(3 * 4 / second["seconds_per_iteration"])
    assert 0.5 < second["data_share"] <= 1
    assert second["max_memory_mib"] is None


@pytest.mark.parametrize("error", [None, "out of memory"])
def test_epoch_that_a_signal_or_an_error_ends_writes_no_means_and_waits_for_nobody(tmp_path, sums, capsys, error):
    with suppress(MemoryError), _run_log(tmp_path, world_size=2).epoch(0, 1 if error else 2) as epoch_log:
        epoch_log.step(1.0, 1e-4, num_samples=1)
        if error:
            raise MemoryError(error)
    assert not sums
    assert "Total time" not in capsys.readouterr().out
    assert not (tmp_path / "20250608_111442/log.txt").exists()


def test_resume_in_mid_epoch_is_noted_and_goes_on_in_its_means(tmp_path):
    losses, checkpoint = [3.0 + i / 8 for i in range(10)], tmp_path / "checkpoint_iter_5.pth"
    (tmp_path / "whole").mkdir()
    _train(_run_log(tmp_path / "whole"), losses)
    stopped = _run_log(tmp_path)
    with stopped.epoch(0, 10) as epoch_log:
        for loss in losses[:5]:
            epoch_log.step(torch.tensor(loss), 1e-4, num_samples=2)
        state = json.loads(json.dumps(stopped.state_dict()))
    resumed = RunLog(stopped.run, stopped.folder, stopped.processes, stopped.config)
    resumed.load_state_dict(state)
    resumed.begin(0, 5, checkpoint)
    _train(resumed, losses, first=5)
    assert _records(tmp_path, "log.txt") == _records(tmp_path / "whole", "log.txt")
    means, whole = (
        [line["loss_mean"] for line in _records(one, "metrics.jsonl")] for one in (tmp_path, tmp_path / "whole")
    )
    assert means == whole
    assert [entry["checkpoint"] for entry in resumed.folder.facts()["resumed"]] == [str(checkpoint)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_terminal_sees_a_bar_and_only_a_file_beside_it_gets_lines(tmp_path, monkeypatch, capsys, is_terminal):
    err, out = Terminal(), Terminal()
    monkeypatch.setattr("sys.stderr", err)
    if is_terminal:
        monkeypatch.setattr("sys.stdout", out)
    _train(_run_log(tmp_path), [1.0, 2.0, 3.0])
    for shown in ("epoch 0", "3/3", "loss 3.0000"):
        assert shown in err.getvalue()
    lines = (out.getvalue() if is_terminal else capsys.readouterr().out).splitlines()
    assert [bool(PUBLISHED_LINE.fullmatch(line)) for line in lines] == ([] if is_terminal else [True, True, False])


# Trackers, of the real packages: they take numbers, wait a bounded time, and never stop a run

ALONE = Processes(0, 0, 1, "cpu")


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "output")


def _log(folder, *numbers: tuple[int, float], first=0, **keys) -> None:
    """Log these losses by step to what `keys` ask for."""
    run_log = RunLog(RunConfig(job_name="stage2", iters_per_epoch=1000, **keys), folder, ALONE, {"run": {"seed": 42}})
    run_log.begin(iteration=first)
    for step, loss in numbers:
        run_log.track({"train/loss": loss}, step)
    run_log.close()


def test_tracker_that_fails_is_left_out_and_the_others_go_on(folder, caplog):
    class Tracker:
        def __init__(self, name):
            self.name, self.logged = name, []

        def log(self, numbers, step):
            self.logged.append((numbers, step))
            if self.name == "failing":
                raise ConnectionError("the service went away")

    _log(folder)
    assert [path.name for path in folder.path.iterdir()] == ["run.json"], "nothing starts unless asked for"
    run_log = RunLog(RunConfig(), folder, ALONE, {})
    failing, listing = run_log.trackers[:] = [Tracker("failing"), Tracker("listing")]
    for step in (0, 1):
        run_log.track({"train/loss": 2.0}, step)
    assert len(failing.logged) == 1
    assert listing.logged == [({"train/loss": 2.0}, 0), ({"train/loss": 2.0}, 1)]
    assert "failing failed and is left out from here on: the service went away" in caplog.text


def test_missing_tensorboard_is_an_error_and_missing_wandb_a_warning(folder, monkeypatch, caplog):
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"run\.tensorboard_log: .*pip install tensorboard"):
        check_trackers(RunConfig(tensorboard_log=True))
    _log(folder, (0, 1.0), wandb_log=True)
    assert re.search("run.wandb_log: did not start .*pip install wandb", caplog.text)


def test_tensorboard_of_a_resumed_run_shows_no_step_twice(folder):
    check_trackers(RunConfig(tensorboard_log=True))
    _log(folder, (0, 0.5), (50, 1.5), (100, 2.5), tensorboard_log=True)
    _log(folder, (50, 3.5), (100, 4.5), first=50, tensorboard_log=True)
    shown = EventAccumulator(str(folder.path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in shown] == [(0, 0.5), (50, 3.5), (100, 4.5)]


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    """A user who never logged in."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.parametrize("has_login", [False, True])
def test_wandb_without_a_login_or_an_answer_writes_offline(folder, no_login, has_login, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("minigpt4.common.run_log.PROBE_SECONDS", 0.5)
    began = time.perf_counter()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and never says a word
        if has_login:
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
            monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        _log(folder, (0, 2.5), wandb_log=True)
    assert time.perf_counter() - began < 60
    assert ("no answer from http://127.0.0.1" if has_login else "no login, writing offline") in caplog.text
    assert len(list(folder.path.glob(f"wandb/offline-run-*-{folder.facts()['id']}/*.wandb"))) == 1


# The console

LINES = """
import logging
from minigpt4.common.logger import setup_logging
setup_logging({rank})
logging.info("number of trainable parameters: %d", 3149824)
logging.warning("slow disk")
logging.getLogger("minigpt4.anything").error("broken")
"""
BAR = """
import logging
from tqdm import tqdm
from minigpt4.common.logger import setup_logging
setup_logging(0)
with tqdm(total=3, desc="epoch 0", dynamic_ncols=True) as bar:
    bar.update()
    logging.warning("in the middle")
    bar.update()
"""
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
PUBLISHED = ["[INFO] number of trainable parameters: 3149824", "[WARNING] slow disk", "[ERROR] broken"]


@pytest.mark.parametrize(
    ("rank", "expected"), [(0, PUBLISHED), (3, ["[WARNING] rank 3: slow disk", "[ERROR] rank 3: broken"])]
)
def test_rank_0_logs_in_the_published_form_and_others_their_warnings_with_their_rank(rank, expected, tmp_path, warm):
    (tmp_path / "lines.py").write_text(LINES.format(rank=rank))
    run = warm.script(tmp_path / "lines.py", cwd=tmp_path, apart=True)
    assert (run.wait(), run.out.read_text()) == ([0], "")
    assert [re.sub(f"^{STAMP}", "", line) for line in run.text().splitlines()] == expected


def test_log_line_does_not_tear_the_bar_apart():
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    subprocess.run([sys.executable, "-c", BAR], stdout=follower, stderr=follower, check=True)
    os.close(follower)
    text = os.read(leader, 1 << 16).decode()
    os.close(leader)
    line = next(line for line in text.split("\n") if "in the middle" in line)
    assert re.fullmatch(STAMP + r"\[WARNING\] in the middle", line.strip().split("\r")[-1].removeprefix("\x1b[A"))
    assert "epoch 0" in text


# The start-up clock

PAUSE = 0.02


@pytest.fixture
def clock():
    start_clock.begin()
    yield
    finish()


def test_parts_of_phases_add_up_an_inner_phase_counts_once_and_errors_pass(clock):
    @phase(LLM)
    def load():
        raise RuntimeError("no weights")

    for _ in range(2):
        with phase(FIRST_STEP), phase(VISION):
            time.sleep(PAUSE)
    with pytest.raises(RuntimeError, match="no weights"):
        load()
    seconds = finish().seconds
    assert seconds[VISION] >= 2 * PAUSE
    assert seconds[FIRST_STEP] < PAUSE
    assert LLM in seconds


def test_time_before_the_clock_began_counts_as_imports(tmp_path, warm):
    (tmp_path / "late.py").write_text(
        f"import time; time.sleep({10 * PAUSE}); from minigpt4.common import start_clock as c; c.begin(); "
        "print(c.finish().seconds['imports'])"
    )
    run = warm.script(tmp_path / "late.py", cwd=tmp_path)
    run.wait()
    assert float(run.text()) >= 9 * PAUSE  # the system counts in hundredths of a second
