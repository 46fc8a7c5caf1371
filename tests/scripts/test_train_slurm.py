"""scripts/train_slurm.sh with real torchrun workers; only Slurm's own commands are stood in for."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/train_slurm.sh"

WORKER = """
import os, signal, sys, time
from pathlib import Path
rank = os.environ["RANK"]
Path(f"arguments_{rank}").write_text("\\n".join(sys.argv[1:]))
def save(number, frame):
    Path(f"saved_{rank}").write_text("")
signal.signal(signal.SIGUSR1, save)
Path(f"ready_{rank}").write_text("")
deadline = time.monotonic() + 60
while os.environ["TRAIN"] == "long" and time.monotonic() < deadline:
    if list(Path.cwd().glob("saved_*")):  # the ranks agree to stop as soon as one was asked to
        sys.exit(0)
    time.sleep(0.05)
sys.exit(int(os.environ.get("STATUS", "0")))
"""

# Lists what belongs to the job as Slurm does: every process with this job's number in its environment.
SCONTROL = f"""#!{sys.executable}
import os, sys
from pathlib import Path
if sys.argv[1] == "listpids":
    print("PID      JOBID    STEPID   LOCALID GLOBALID")
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            mine = ("SLURM_JOB_ID=" + sys.argv[2]).encode() in entry.read_bytes().split(b"\\0")
        except OSError:
            continue
        if mine:
            print(entry.parent.name, sys.argv[2], 0, 0, 0)
elif sys.argv[1:3] == ["show", "hostnames"]:
    print("localhost\\nother-node")
elif sys.argv[1] == "requeue":
    Path("requeued").write_text(sys.argv[2])
"""


@pytest.fixture
def job(tmp_path):
    """Starts the script as Slurm would, in a folder with a small train.py."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"srun": '#!/bin/sh\nexec "$@"\n', "scontrol": SCONTROL}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (commands / "torchrun").symlink_to(_torchrun())
    (tmp_path / "train.py").write_text(WORKER)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": f"{os.getpid()}{port}",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "MASTER_PORT": str(port),
    }
    started = []

    def start(*arguments: str, **more: str) -> subprocess.Popen:
        command = ["bash", str(SCRIPT), *arguments]
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment | more, stdout=subprocess.DEVNULL))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def _torchrun() -> Path:
    file = Path(sys.executable).parent / "torchrun"
    if not file.exists():
        pytest.skip("torchrun does not lie beside this Python")
    return file


def _wait_for(tmp_path: Path, *names: str) -> None:
    deadline = time.monotonic() + 60
    while not all((tmp_path / name).exists() for name in names):
        assert time.monotonic() < deadline, f"{names} did not appear"
        time.sleep(0.05)


def test_signal_before_the_limit_reaches_the_workers_and_the_job_is_requeued(job, tmp_path):
    process = job("a.yaml", "run.seed=7", TRAIN="long")
    _wait_for(tmp_path, "ready_0", "ready_1")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    assert (tmp_path / "saved_0").exists()
    assert (tmp_path / "requeued").exists()


def test_every_worker_resumes_in_a_folder_of_the_job_and_a_failure_is_not_requeued(job, tmp_path):
    assert job("a.yaml", "run.seed=7", TRAIN="short", STATUS="3").wait(60) != 0
    for rank in (0, 1):
        arguments = (tmp_path / f"arguments_{rank}").read_text().split("\n")
        assert arguments[:3] == ["--cfg-path", "a.yaml", "--options"]
        assert arguments[3].startswith("run.output_dir=output/slurm-")
        assert arguments[4:] == ["run.resume_ckpt_path=auto", "run.seed=7"]
    assert not (tmp_path / "requeued").exists()


def test_missing_configuration_is_an_error_with_the_usage(tmp_path):
    done = subprocess.run(["bash", str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "usage: sbatch scripts/train_slurm.sh CONFIG" in done.stderr
