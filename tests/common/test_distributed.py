"""Who a process is, from the launcher's variables, and what the processes tell each other."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from minigpt4.common import dist_utils
from minigpt4.common.dist_utils import Processes, start_processes
from minigpt4.common.errors import ConfigError, RunError

REPOSITORY = Path(__file__).parents[2]
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")

TALK = """
import torch
from minigpt4.common.dist_utils import start_processes, stop_processes
p = start_processes("cpu")
sums = p.sum(torch.tensor([1.0, float(p.rank)])).tolist()
flags = [p.any(p.rank == 1), p.any(False), p.any(True)]
shared = p.broadcast({"from": p.rank})
gathered = p.gather({"rank": p.rank})
p.barrier()
stop_processes()
print([p.rank, p.local_rank, p.world_size, p.is_main, sums, flags, shared, gathered], flush=True)
"""


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def _port() -> str:
    """One that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize(
    "names", [("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")]
)
def test_two_processes_talk_when_torchrun_accelerate_or_srun_started_them(names):
    common = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TALK],
            env=common | dict(zip(names, (rank, rank, "2"), strict=True)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    first, second = (process.communicate(timeout=60)[0].strip() for process in processes)
    told = "[2.0, 1.0], [True, False, True], {'from': 0}"
    assert first == f"[0, 0, 2, True, {told}, [{{'rank': 0}}, {{'rank': 1}}]]"
    assert second == f"[1, 1, 2, False, {told}, None]"


def test_without_a_launcher_a_process_is_alone_and_its_calls_need_nobody():
    alone = start_processes("cpu")
    assert alone == Processes(0, 0, 1, torch.device("cpu"))
    assert (alone.is_main, alone.any(True), alone.any(False)) == (True, True, False)
    assert (alone.gather("x"), alone.broadcast("x"), alone.sum(torch.tensor(2.0))) == (["x"], "x", 2)
    alone.barrier()


TWO = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("variables", "distributed", "kind", "text"),
    [
        (TWO, True, RunError, r"rank 0 of 2 waited .* 1/2 clients joined.* MASTER_ADDR \(127\.0\.0\.1\)"),
        (TWO, False, ConfigError, r"run\.distributed: False, but 2 processes"),
        ({**TWO, "WORLD_SIZE": "two"}, True, ConfigError, "RANK, LOCAL_RANK, WORLD_SIZE are incomplete"),
    ],
)
def test_what_the_launcher_did_wrong_is_named(monkeypatch, variables, distributed, kind, text):
    for name, value in {**variables, "MASTER_PORT": _port()}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist_utils, "MEETING_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(kind, match=text):
        start_processes("cpu", distributed=distributed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_goes_on_the_cpu_and_says_so(caplog):
    assert start_processes("cuda").device == torch.device("cpu")
    assert "the run goes on the CPU" in caplog.text
