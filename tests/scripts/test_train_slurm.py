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
    torchrun, commands = Path(sys.executable).parent / "torchrun", tmp_path / "bin"
    if not torchrun.exists():
        pytest.skip("torchrun does not lie beside this Python")
    commands.mkdir()
    for name, text in {"srun": '#!/bin/sh\nexec "$@"\n', "scontrol": SCONTROL}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (commands / "torchrun").symlink_to(torchrun)
    (tmp_path / "train.py").write_text(WORKER)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    slurm = {"JOB_ID": f"{os.getpid()}{port}", "JOB_NODELIST": "localhost", "JOB_NUM_NODES": "1", "GPUS_ON_NODE": "2"}
    environment = os.environ | {f"SLURM_{key}": value for key, value in slurm.items()}
    environment |= {"PATH": f"{commands}:{os.environ['PATH']}", "MASTER_PORT": port}
    started = []

    def start(**more: str) -> subprocess.Popen:
        command = ["bash", str(SCRIPT), "a.yaml", "run.seed=7"]
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment | more, stdout=subprocess.DEVNULL))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def test_signal_before_the_limit_reaches_the_workers_and_the_job_is_requeued(job, tmp_path):
    process, deadline = job(TRAIN="long"), time.monotonic() + 60
    while not all((tmp_path / f"ready_{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline, "the workers do not come up"
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    assert (tmp_path / "saved_0").exists()
    assert (tmp_path / "requeued").exists()


def test_every_worker_resumes_in_a_folder_of_the_job_and_a_failure_is_not_requeued(job, tmp_path):
    assert job(TRAIN="short", STATUS="3").wait(60) != 0
    for rank in (0, 1):
        arguments = (tmp_path / f"arguments_{rank}").read_text().split("\n")
        assert arguments[:3] == ["--cfg-path", "a.yaml", "--options"]
        assert arguments[3].startswith("run.output_dir=output/slurm-")
        assert arguments[4:] == ["run.resume_ckpt_path=auto", "run.seed=7"]
    assert not (tmp_path / "requeued").exists()
    done = subprocess.run(["bash", str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "usage: sbatch scripts/train_slurm.sh CONFIG" in done.stderr
