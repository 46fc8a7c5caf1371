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


def _talk(*environments: dict[str, str]) -> list[str]:
    """What processes with these variables find out."""
    common = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TALK],
            env={**common, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for env in environments
    ]
    return [process.communicate(timeout=60)[0].strip() for process in processes]


def test_without_a_launcher_a_process_is_alone_and_its_calls_need_nobody():
    alone = start_processes("cpu")
    assert alone == Processes(0, 0, 1, torch.device("cpu"))
    assert alone.is_main
    assert alone.any(True)
    assert not alone.any(False)
    assert alone.gather("x") == ["x"]
    assert alone.broadcast("x") == "x"
    assert alone.sum(torch.tensor(2.0)) == 2
    alone.barrier()


def test_two_processes_talk_when_torchrun_or_accelerate_started_them():
    first, second = _talk(*({"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2"} for r in range(2)))
    told = "[2.0, 1.0], [True, False, True], {'from': 0}"
    assert first == f"[0, 0, 2, True, {told}, [{{'rank': 0}}, {{'rank': 1}}]]"
    assert second == f"[1, 1, 2, False, {told}, None]"


def test_two_processes_talk_when_srun_started_them():
    first, second = _talk(*({"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r), "SLURM_NTASKS": "2"} for r in range(2)))
    assert first.startswith("[0, 0, 2, True, [2.0, 1.0]")
    assert second.startswith("[1, 1, 2, False, [2.0, 1.0]")


def test_process_that_never_comes_ends_the_wait_with_an_error(monkeypatch):
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port()}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist_utils, "MEETING_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(RunError, match=r"rank 0 of 2 waited .* 1/2 clients joined.* MASTER_ADDR \(127\.0\.0\.1\)"):
        start_processes("cpu")


def test_variables_that_do_not_fit_together_are_named(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="RANK, LOCAL_RANK, WORLD_SIZE are incomplete"):
        start_processes("cpu")


def test_several_processes_against_the_configuration_are_refused(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"run\.distributed: False, but 2 processes"):
        start_processes("cpu", distributed=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_goes_on_the_cpu_and_says_so(caplog):
    assert start_processes("cuda").device == torch.device("cpu")
    assert "the run goes on the CPU" in caplog.text
