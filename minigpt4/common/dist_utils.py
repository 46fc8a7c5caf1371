"""The processes of a run, their random state, and signals that ask them to save and stop.

A run is one process, or several launched by torchrun, accelerate or srun, known by their environment variables.
"""

import functools
import logging
import os
import random
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import check_cuda_p2p_ib_support, set_seed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minigpt4.common import devices
from minigpt4.common.errors import ConfigError, MiniGPT4Error, RunError

log = logging.getLogger(__name__)
T = TypeVar("T")

MEETING_TIMEOUT = timedelta(minutes=10)
"""Processes are launched together, and only imports lie before they meet; torchrun waits as long for its nodes."""

START_TIMEOUT = timedelta(minutes=30)
"""Ranks load their weights at different speeds; afterwards a step never takes this long."""

SLURM_NAMES = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}

SAVE_AND_STOP = tuple(filter(None, (getattr(signal, name, None) for name in ("SIGTERM", "SIGINT", "SIGUSR1"))))
"""Windows has no SIGUSR1."""


# LAVIS's names for what a process is


def is_dist_avail_and_initialized() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Processes of the run, 1 if this one is alone."""
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def get_rank() -> int:
    """Number of this process, 0 if it is alone."""
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def is_main_process() -> bool:
    """Whether this is rank 0, which writes files."""
    return get_rank() == 0


def main_process(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: on ranks other than 0 the function does nothing and returns None."""

    @functools.wraps(function)
    def on_main(*arguments: Any, **keys: Any) -> Any:
        return function(*arguments, **keys) if is_main_process() else None

    return on_main


def all_reduced(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes of the run, on CPU or GPU."""
    total = value.clone()
    if is_dist_avail_and_initialized():
        dist.all_reduce(total)
    return total


def init_distributed_mode(args: Any) -> None:
    """`start_processes` with what `args` has of `device`, `distributed` and `dist_url`; `rank`, `gpu`, `world_size` and
    `distributed` are written into it."""
    wanted = {name: getattr(args, name) for name in ("device", "distributed", "dist_url") if hasattr(args, name)}
    processes = start_processes(**wanted)
    args.rank, args.gpu, args.world_size = processes.rank, processes.local_rank, processes.world_size
    args.distributed = processes.world_size > 1


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. Every rank must call the methods."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0, which writes files."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, in place; on the value's device, without waiting on the host."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; hosts wait for each other, not for their GPUs."""
        return flag if self.world_size == 1 else bool(self.sum(torch.tensor(float(flag))))

    def gather(self, value: Any) -> list[Any] | None:
        """Plain objects of all ranks on rank 0, None elsewhere; they travel between hosts, not through GPUs."""
        gathered = [value] * self.world_size if self.is_main else None
        if self.world_size > 1:
            dist.gather_object(value, gathered)
        return gathered

    def broadcast(self, value: Any) -> Any:
        """Rank 0's plain object on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def on_main(self, call: Callable[[], T]) -> T:
        """What the call returns on rank 0, the only one that makes it, on all ranks; its MiniGPT4Error on all, too."""
        found = failure = None
        if self.is_main:
            try:
                found = call()
            except MiniGPT4Error as error:
                failure = error
        found, failure = self.broadcast((found, failure))
        if failure is not None:
            raise failure
        return found

    def barrier(self) -> None:
        PartialState().wait_for_everyone()


def start_processes(device: str = "cuda", distributed: bool = True, dist_url: str = "env://") -> Processes:
    """Join the processes that the launcher started, or be alone; NCCL or XCCL for tensors on GPUs, gloo for all others.

    Raises ConfigError if the launcher's variables do not fit together, RunError if a process does not come.
    """
    rank, local_rank, world_size = _from_environment()
    chosen = devices.device_of_rank(device, local_rank, world_size)
    on_gpu = devices.is_gpu(chosen)
    devices.use_device(chosen)
    if world_size > 1:
        if not distributed:
            text = f"run.distributed: False, but {world_size} processes were launched; start one or set it True"
            raise ConfigError(text)
        if chosen.type == "cuda" and not check_cuda_p2p_ib_support():
            os.environ.update(NCCL_P2P_DISABLE="1", NCCL_IB_DISABLE="1")  # RTX 40 cards under old drivers
        dist.init_process_group(
            f"cpu:gloo,{chosen.type}:{devices.BACKENDS[chosen.type]}" if on_gpu else "gloo",
            store=_store(dist_url, rank, world_size),
            rank=rank,
            world_size=world_size,
            timeout=START_TIMEOUT,
            device_id=chosen if on_gpu else None,
        )
    PartialState(cpu=world_size == 1 or not on_gpu)  # for accelerate's trackers and barrier
    return Processes(rank, local_rank, world_size, chosen)


def stop_processes() -> None:
    """Leave the group; no collective, so it is safe after an error on one rank."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _store(dist_url: str, rank: int, world_size: int) -> dist.Store:
    """Where the processes find each other.

    torchrun keeps one store over all its restarts, with the addresses of the dead, so each restart needs names of its
    own. Nodes count restarts differently: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has to make a new store.
    """
    try:
        store, _, _ = next(dist.rendezvous(dist_url, rank, world_size, timeout=MEETING_TIMEOUT))
    except ValueError as error:  # of a variable that is not set, or no number
        way_out = "on several nodes MASTER_ADDR is the first of `scontrol show hostnames`, or the host of rank 0"
        raise ConfigError(f"the launcher's variables: {error}; {way_out}") from error
    except dist.DistError as error:
        where = " and ".join(f"{name} ({os.environ.get(name)})" for name in ("MASTER_ADDR", "MASTER_PORT"))
        text = f"rank {rank} of {world_size} waited for the other processes in vain: {error}"
        raise RunError(f"{text}. Look whether all were started, none has died, and all can reach {where}") from error
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(world_size)
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"
    return dist.PrefixStore(f"start_{restarts}", store)


def _from_environment() -> tuple[int, int, int]:
    """Rank, local rank and number of processes; srun's variables get torchrun's names, which accelerate reads."""
    tasks = os.environ.get("SLURM_NTASKS", "")
    if "RANK" not in os.environ and tasks.isdecimal() and int(tasks) > 1:
        if not any(name.startswith("SLURM_STEP") for name in os.environ):
            text = "SLURM_NTASKS is %s, but no srun started this process: start it by srun, or unset SLURM_NTASKS"
            log.warning(text, tasks)
        if os.environ.get("SLURM_NNODES") == "1":
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        os.environ |= {name: os.environ[of_slurm] for name, of_slurm in SLURM_NAMES.items() if of_slurm in os.environ}
    is_only_one = os.environ.get("WORLD_SIZE") == "1" and "LOCAL_RANK" not in os.environ  # Kubernetes' operators
    if "RANK" not in os.environ or is_only_one:
        return 0, 0, 1
    try:
        rank, local_rank, world_size = (int(os.environ[name]) for name in SLURM_NAMES)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"the launcher's variables {', '.join(SLURM_NAMES)} are incomplete: {error}") from error
    return rank, local_rank, world_size


def distribute(model: nn.Module, processes: Processes, trained: Mapping[str, nn.Parameter]) -> nn.Module:
    """The model as DDP over its trained parameters only, which else sends 15 GB around; as is in a single process."""
    if processes.world_size == 1:
        return model
    own = {id(parameter) for parameter in trained.values()}
    ignored = [name for name, parameter in model.named_parameters() if id(parameter) not in own]
    ignored += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    own = [processes.device] if devices.is_gpu(processes.device) else None
    return DistributedDataParallel(model, device_ids=own, gradient_as_bucket_view=True)


# Random state of a process

seed_everything = set_seed
"""Seed python, numpy and torch on all devices."""


def rng_state() -> dict[str, Any]:
    """State of all generators, as plain types and tensors."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        **devices.rng_state(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Go on from `rng_state()`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    devices.set_rng_state(state)


class StopRequest:
    """Whether a signal asked this process to stop, to be looked at between iterations; a second Ctrl-C interrupts."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous = {number: signal.getsignal(number) for number in SAVE_AND_STOP}

    def __enter__(self) -> "StopRequest":
        for number in SAVE_AND_STOP:
            signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.name is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
