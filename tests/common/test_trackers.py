"""Trackers with the real packages: they take numbers, wait a bounded time, and never stop a run."""

import logging
import socket
import subprocess
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minigpt4.common.dist_utils import Processes
from minigpt4.common.run_folder import RunFolder
from minigpt4.common.run_log import RunLog, check_trackers
from minigpt4.common.schemas import RunConfig

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


def test_nothing_starts_unless_asked_for(folder):
    check_trackers(RunConfig())
    _log(folder, (0, 1.0))
    assert [path.name for path in folder.path.iterdir()] == ["run.json"]


def test_tracker_that_fails_is_left_out_and_the_others_go_on(folder, caplog):
    class Tracker:
        def __init__(self, name):
            self.name, self.logged = name, []

        def log(self, numbers, step):
            self.logged.append((numbers, step))
            if self.name == "failing":
                raise ConnectionError("the service went away")

    run_log = RunLog(RunConfig(), folder, ALONE, {})
    failing, listing = run_log.trackers[:] = [Tracker("failing"), Tracker("listing")]
    for step in (0, 1):
        run_log.track({"train/loss": 2.0}, step)
    assert len(failing.logged) == 1
    assert listing.logged == [({"train/loss": 2.0}, 0), ({"train/loss": 2.0}, 1)]
    assert "failing failed and is left out from here on: the service went away" in caplog.text


MISSING = """
import sys
from pathlib import Path
sys.modules["tensorboard"] = sys.modules["wandb"] = None
from minigpt4.common.errors import ConfigError
from minigpt4.common.run_folder import RunFolder
from minigpt4.common.run_log import check_trackers, start_trackers
from minigpt4.common.schemas import RunConfig
try:
    check_trackers(RunConfig(tensorboard_log=True))
except ConfigError as error:
    print(error)
print(start_trackers(RunConfig(wandb_log=True), RunFolder(Path(".")), {}))
"""


def test_missing_tensorboard_is_an_error_and_missing_wandb_a_warning(tmp_path):
    done = subprocess.run([sys.executable, "-c", MISSING], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "run.tensorboard_log: needs the package tensorboard; pip install tensorboard\n[]\n"
    assert "run.wandb_log" in done.stderr
    assert "pip install wandb" in done.stderr


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
    began = time.perf_counter()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and never says a word
        if has_login:
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
            monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        _log(folder, (0, 2.5), wandb_log=True)
    assert time.perf_counter() - began < 60
    assert ("no answer from http://127.0.0.1" if has_login else "no login, writing offline") in caplog.text
    assert len(list(folder.path.glob(f"wandb/offline-run-*-{folder.facts()['id']}/*.wandb"))) == 1


def test_wandb_that_does_not_start_is_a_warning(folder, no_login, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    _log(folder, (0, 1.0), wandb_log=True)
    assert "run.wandb_log: did not start" in caplog.text
