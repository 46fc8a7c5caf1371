"""Who a process is and what processes tell each other, random state over a restart, and signals that ask to stop."""

import io
import os
import random
import signal
import socket
from datetime import timedelta

import numpy as np
import pytest
import torch

from minigpt4.common import dist_utils
from minigpt4.common.dist_utils import (
    SAVE_AND_STOP,
    Processes,
    StopRequest,
    rng_state,
    seed_everything,
    set_rng_state,
    start_processes,
)
from minigpt4.common.errors import ConfigError, RunError

SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")

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
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", *SLURM):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port() -> str:
    """One that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


def test_two_processes_of_srun_talk(tmp_path, warm, port):
    """Those of torchrun do in test_published_names.py."""
    (tmp_path / "talk.py").write_text(TALK)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environments = [common | dict(zip(SLURM, (rank, rank, "2"), strict=True)) for rank in "01"]
    runs = [warm.script(tmp_path / "talk.py", cwd=tmp_path, env=own, apart=True) for own in environments]
    assert [run.wait() for run in runs] == [[0], [0]], runs[0].text()
    told = "[2.0, 1.0], [True, False, True], {'from': 0}"
    assert runs[0].out.read_text() == f"[0, 0, 2, True, {told}, [{{'rank': 0}}, {{'rank': 1}}]]\n"
    assert runs[1].out.read_text() == f"[1, 1, 2, False, {told}, None]\n"


def test_a_process_alone_needs_no_launcher_no_local_rank_and_nobody(monkeypatch):
    alone = start_processes("cpu")
    monkeypatch.setattr(os, "environ", {**os.environ, "RANK": "0", "WORLD_SIZE": "1"})
    assert alone == start_processes("cpu") == Processes(0, 0, 1, torch.device("cpu"))
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
        ({**TWO, "MASTER_PORT": "a"}, True, ConfigError, "the launcher's variables: invalid literal .*MASTER_ADDR is"),
        (dict(zip(SLURM, "002", strict=True)), True, ConfigError, "MASTER_ADDR expected.*scontrol show hostnames"),
    ],
)
def test_what_the_launcher_did_wrong_is_named(monkeypatch, port, variables, distributed, kind, text):
    monkeypatch.setattr(os, "environ", {**os.environ, "MASTER_PORT": port, **variables})
    monkeypatch.setattr(dist_utils, "MEETING_TIMEOUT", timedelta(seconds=0.2))
    with pytest.raises(kind, match=text):
        start_processes("cpu", distributed=distributed)


@pytest.mark.parametrize("of_step", [{}, {"SLURM_STEP_ID": "0"}])
def test_slurm_tells_what_srun_did_not_start_and_one_node_needs_no_address(monkeypatch, caplog, port, of_step):
    monkeypatch.setattr(dist_utils, "MEETING_TIMEOUT", timedelta(seconds=0.2))
    variables = dict(zip(SLURM, "002", strict=True)) | {"SLURM_NNODES": "1", "MASTER_PORT": port, **of_step}
    monkeypatch.setattr(os, "environ", {**os.environ, **variables})
    with pytest.raises(RunError, match=r"rank 0 of 2 waited .* MASTER_ADDR \(127\.0\.0\.1\)"):
        start_processes("cpu")
    assert ("no srun started this process" in caplog.text) == (not of_step)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_goes_on_the_cpu_and_says_so(caplog):
    assert start_processes("cuda").device == torch.device("cpu")
    assert "the run goes on the CPU" in caplog.text


# Random state


def _draw() -> list:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.rand(3).tolist()]


def _through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_same_seed_same_numbers_in_all_generators():
    draws = []
    for seed in (3, 3, 4):
        seed_everything(seed)
        draws.append(_draw())
    assert draws[0] == draws[1]
    assert not set(draws[0]) & set(draws[2])


def test_state_read_from_a_file_goes_on_exactly():
    seed_everything(5)
    _draw()
    np.random.randn()  # both generators of normal numbers now hold the second of a pair
    random.gauss(0, 1)
    before = rng_state()
    state = _through_a_file(before)
    wanted = [_draw(), _draw()]
    for saved in (state, before):
        seed_everything(6)
        set_rng_state(saved)
        assert [_draw(), _draw()] == wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_state_of_the_gpu_goes_on_exactly():
    seed_everything(8)
    state = _through_a_file(rng_state())
    wanted = torch.rand(3, device="cuda")
    set_rng_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), wanted)


def test_state_saved_on_a_gpu_machine_is_taken_up_without_one(monkeypatch):
    state = {**rng_state(), "cuda": torch.zeros(16, dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wanted = _draw()
    set_rng_state(state)
    assert _draw() == wanted


# Signals


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_gives_the_flag_its_name(second):
    with StopRequest() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(second)
        assert stop
    assert stop.name == second.name


def test_second_ctrl_c_interrupts_and_handlers_are_restored():
    def handlers():
        return [signal.getsignal(number) for number in SAVE_AND_STOP]

    def twice():
        with StopRequest():
            assert not set(handlers()) & set(before)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = handlers()
    with pytest.raises(KeyboardInterrupt):
        twice()
    assert handlers() == before
