"""Worker processes end with the process that started them, however it ends, and it never waits for them."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from minigpt4.datasets.datasets import workers

REPOSITORY = Path(__file__).parents[2]

READER = """
import os, signal, sys, time
from pathlib import Path
from minigpt4.datasets.datasets import workers

def make(worker):
    Path(f"worker{worker}").write_text(str(os.getpid()))
    yield "first batch"
    wait_for_second(worker)

"""

ONE_DIES = """
def wait_for_second(worker):
    while worker == 1 or not Path("read").exists():
        time.sleep(0.01)
    time.sleep(0.2)  # by now the reader waits
    os.kill(os.getpid(), signal.SIGKILL)

batches = workers.read_in_workers(make, source="cats/train", num_workers=2)
print(next(batches), next(batches), flush=True)
Path("read").touch()
next(batches)
"""

PARENT_DIES = """
def wait_for_second(worker):
    Path("hangs").touch()
    time.sleep(3600)

batches = workers.read_in_workers(make, source="cats/train", num_workers=1)
next(batches)
while not Path("hangs").exists():
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""

ONE_HANGS = """
def wait_for_second(worker):
    time.sleep(3600)

workers.LOOK, workers.PATIENCE = 0.6, 2
for batch in workers.read_in_workers(make, source="cats/train", num_workers=1):
    print(batch)
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script that reads batches; returns its result and its workers' process ids."""

    def run(script: str) -> tuple[subprocess.CompletedProcess, list[int]]:
        (tmp_path / "script.py").write_text(READER + script)
        # Files, not pipes: workers that are left over would keep the reader of a pipe waiting.
        with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
            result = subprocess.run(
                [sys.executable, "script.py"], cwd=tmp_path, env=environment, stdout=out, stderr=err, timeout=300
            )
        result.stdout, result.stderr = (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
        return result, _workers(tmp_path)

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    yield run
    for pid in _workers(tmp_path):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _workers(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob("worker?"))]


def _has_ended(pid: int) -> bool:
    """Whether a process is gone within a minute."""
    end = time.monotonic() + 60
    stat = Path(f"/proc/{pid}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_death_of_one_worker_ends_the_process_though_another_hangs(run):
    result, pids = run(ONE_DIES)
    assert result.returncode == 1
    assert result.stdout == "first batch first batch\n"
    assert "is killed by signal: Killed" in result.stderr
    assert "Exception ignored" not in result.stderr
    assert all(map(_has_ended, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does it")
def test_workers_that_hang_die_with_their_process(run):
    result, (worker,) = run(PARENT_DIES)
    assert result.returncode == -9
    assert _has_ended(worker)


def test_worker_that_hangs_is_told_of_and_then_an_error_that_names_the_data(run):
    result, pids = run(ONE_HANGS)
    assert result.returncode == 1
    assert "cats/train: no batch for 0.01 minutes; the data workers are slow" in result.stderr
    assert "RunError: cats/train: no batch for 0.02 minutes: a data worker hangs" in result.stderr
    assert all(map(_has_ended, pids))


def test_reading_goes_on_after_a_wait(tmp_path, monkeypatch, caplog):
    def make(worker):
        while not (tmp_path / "told").exists():
            time.sleep(0.01)
        yield "batch"

    def told(record):
        (tmp_path / "told").touch()
        return True

    monkeypatch.setattr(workers, "LOOK", 0.2)
    monkeypatch.setattr(workers, "PATIENCE", 1000)
    caplog.handler.addFilter(told)
    assert list(workers.read_in_workers(make, source="cats/train", num_workers=1)) == ["batch"]
    assert "cats/train: no batch for 0.00333 minutes; the data workers are slow" in caplog.text
