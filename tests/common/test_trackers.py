"""Trackers with the real packages: they take numbers, wait a bounded time, and never stop a run."""

import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minigpt4.common.run_folder import RunFolder
from minigpt4.common.run_log import TrackerGroup, build_tracker, check_trackers
from minigpt4.common.schemas import RunConfig


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder.create(tmp_path / "output")
    folder.describe({"run": {"seed": 42}}, seed=42, world_size=1)
    return folder


class Failing:
    calls = 0

    def log(self, metrics, step):
        self.calls += 1
        raise ConnectionError("the service went away")


class Listing:
    def __init__(self):
        self.logged = []

    def log(self, metrics, step):
        self.logged.append((dict(metrics), step))


def test_nothing_is_built_unless_asked_for(folder):
    assert build_tracker(RunConfig(), folder, {}).trackers == []


def test_tracker_that_fails_is_left_out_and_the_others_go_on(caplog):
    failing, listing = Failing(), Listing()
    group = TrackerGroup([failing, listing])
    group.log({"train/loss": 1.0}, 0)
    group.log({"train/loss": 2.0}, 1)
    assert failing.calls == 1
    assert listing.logged == [({"train/loss": 1.0}, 0), ({"train/loss": 2.0}, 1)]
    assert "Failing failed and is left out from here on: the service went away" in caplog.text


def _without(package: str, tmp_path: Path, code: str) -> subprocess.CompletedProcess:
    """Run `code` in a process where importing `package` fails as if it were not installed."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def test_tensorboard_that_is_not_installed_is_an_error_with_the_command(tmp_path):
    done = _without(
        "tensorboard",
        tmp_path,
        "from minigpt4.common.schemas import RunConfig\n"
        "from minigpt4.common.run_log import check_trackers\n"
        "check_trackers(RunConfig(tensorboard_log=True))",
    )
    assert "ConfigError: run.tensorboard_log: needs the package tensorboard" in done.stderr
    assert "pip install tensorboard" in done.stderr


def test_tensorboard_is_not_looked_for_unless_asked():
    check_trackers(RunConfig(tensorboard_log=False))


def test_wandb_that_is_not_installed_is_a_warning(tmp_path):
    done = _without(
        "wandb",
        tmp_path,
        "from pathlib import Path\n"
        "from minigpt4.common.run_folder import RunFolder\n"
        "from minigpt4.common.schemas import RunConfig\n"
        "from minigpt4.common.run_log import build_tracker\n"
        "tracker = build_tracker(RunConfig(wandb_log=True), RunFolder(Path('.')), {})\n"
        "tracker.log({'train/loss': 1.0}, 0)\n"
        "print('trained')",
    )
    assert done.stdout == "trained\n"
    assert "pip install wandb" in done.stderr


def test_tensorboard_files_hold_the_numbers(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    check_trackers(RunConfig(tensorboard_log=True))
    tracker = build_tracker(RunConfig(tensorboard_log=True), folder, {})
    tracker.log({"train/loss": 2.5, "train/lr": 1e-4}, 0)
    tracker.log({"train/loss": 2.0}, 50)
    tracker.close()
    events = EventAccumulator(str(folder.path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(0, 2.5), (50, 2.0)]
    assert sorted(events.Tags()["scalars"]) == ["train/loss", "train/lr"]


def test_tensorboard_of_a_resumed_run_shows_no_step_twice(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, steps in ((0, (0, 50, 100)), (50, (50, 100, 150))):
        tracker = build_tracker(RunConfig(tensorboard_log=True), folder, {}, first_step)
        for step in steps:
            tracker.log({"train/loss": float(first_step + step)}, step)
        tracker.close()
    events = EventAccumulator(str(folder.path)).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(0, 0.0), (50, 100.0), (100, 150.0), (150, 200.0)]


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    """A user who never logged in."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def _log_offline(folder) -> float:
    began = time.perf_counter()
    tracker = build_tracker(RunConfig(wandb_log=True, job_name="stage2"), folder, {"run": {"seed": 42}})
    tracker.log({"train/loss": 2.5}, 0)
    tracker.close()
    return time.perf_counter() - began


def test_wandb_without_a_login_writes_offline(folder, no_login, caplog):
    caplog.set_level(logging.INFO)
    assert _log_offline(folder) < 60
    assert "no login, writing offline" in caplog.text
    assert len(list(folder.path.glob(f"wandb/offline-run-*-{folder.facts()['id']}/*.wandb"))) == 1


def test_wandb_without_an_answer_from_the_server_writes_offline(folder, no_login, monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and never says a word
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        assert _log_offline(folder) < 60
    assert "no answer from http://127.0.0.1" in caplog.text
    assert list(folder.path.glob("wandb/offline-run-*/*.wandb"))


def test_wandb_that_does_not_start_is_a_warning(folder, no_login, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    tracker = build_tracker(RunConfig(wandb_log=True), folder, {})
    tracker.log({"train/loss": 1.0}, 0)
    tracker.close()
    assert "run.wandb_log: Weights & Biases did not start" in caplog.text
