"""What the kinds of devices differ in: cuda, xpu (Intel), mps (Apple), cpu. Other rooms of the core ask here.

Training and answers need nothing that xpu and mps lack, but have never run on them. CUDA alone has graphs
(`*_cuda_graph`), LLMs in int8 and nf4, and memory that grows in place.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from minigpt4.common.errors import ConfigError, RunError

log = logging.getLogger(__name__)

BACKENDS = {"cuda": "nccl", "xpu": "xccl"}
"""By the kinds of GPUs that processes share work over, and that have page-locked memory, events and Triton."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables with settings of torch's allocator, today's name first."""


def is_gpu(device: torch.device) -> bool:
    """Whether it works beside the host (cuda, xpu), which need not wait for it."""
    return device.type in BACKENDS


def is_available(device: torch.device) -> bool:
    """Whether this machine has such a device."""
    return device.type not in (*BACKENDS, "mps") or torch.get_device_module(device.type).is_available()


def find_device(wanted: str | torch.device | None) -> torch.device:
    """The device of that name; None: the first accelerator, or the CPU where there is none."""
    if wanted is None:
        wanted = f"{torch.accelerator.current_accelerator().type}:0" if torch.accelerator.is_available() else "cpu"
    try:
        return torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"device: {wanted!r} must be cuda, cuda:N, xpu, xpu:N, mps or cpu") from error


def device_of_rank(wanted: str, local_rank: int, world_size: int) -> torch.device:
    """`run.device` for one of the processes of a machine; the CPU, with a warning, where there is no GPU."""
    device = torch.device(wanted)
    if not is_available(device):
        log.warning("run.device is %s, but there is no GPU: the run goes on the CPU", wanted)
        return torch.device("cpu")
    if not is_gpu(device):
        if device.type == "mps" and world_size > 1:
            raise ConfigError(f"run.device: mps takes one process, and {world_size} were launched")
        return device
    if world_size == 1 and ":" in wanted:
        return device
    count = torch.get_device_module(device.type).device_count()
    if local_rank >= count:
        visible = f"{count} GPUs are visible"
        raise ConfigError(f"local rank {local_rank} has no GPU of its own: {visible}; lower --nproc-per-node")
    return torch.device(device.type, local_rank)


def use_device(device: torch.device) -> None:
    """Make a GPU the current one. CUDA's allocator then grows segments in place, for texts of changing length leave
    gaps in others; unless CUDA has started, or the user has settings of their own."""
    can_expand = torch.version.cuda is not None and not torch.cuda.is_initialized()
    if device.type == "cuda" and can_expand and not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
        try:
            with warnings.catch_warnings(action="ignore"):  # a GPU that is not in a cluster has no fabric
                torch.empty(1, device=device)
        except RuntimeError as error:  # a virtual GPU whose driver does not map memory
            log.info("The allocator cannot expand segments here: %s", str(error).split("\n")[0])
            os.environ[ALLOCATOR[0]] = "expandable_segments:False"
            torch._C._accelerator_setAllocatorSettings(os.environ[ALLOCATOR[0]])
    if is_gpu(device):
        torch.get_device_module(device.type).set_device(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on `device`; from page-locked memory to a GPU, for then the host need not wait."""
    return (tensor.pin_memory() if is_gpu(device) else tensor).to(device, non_blocking=True)


def start_copy(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A tensor on its way to the CPU, and what waits for its arrival; other devices than GPUs are waited for here."""
    if not is_gpu(tensor.device):
        return tensor.to("cpu"), lambda: None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    arrived = torch.get_device_module(tensor.device.type).Event()
    arrived.record()
    return copy, arrived.synchronize


@contextmanager
def memory_advice(text: str) -> Iterator[None]:
    """A GPU whose memory is full is a RunError with `text`, which says what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(f"{error}\n{text}") from error


def sum_dtype(device: torch.device) -> torch.dtype:
    """Type of exact sums; mps has no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def max_memory(device: torch.device | None = None) -> float | None:
    """Highest memory allocated on a GPU so far, MiB; None: the current one, if CUDA runs. mps does not count it."""
    if device is None and torch.cuda.is_initialized():
        device = torch.device("cuda")
    if device is None or not is_gpu(device):
        return None
    return torch.get_device_module(device.type).max_memory_allocated(device) / 2**20


def free_memory() -> int | None:
    """Bytes that are free on the first GPU; None where there is none."""
    device = find_device(None)
    return torch.get_device_module(device.type).mem_get_info(device)[0] if is_gpu(device) else None


def rng_state() -> dict[str, Tensor | None]:
    """State of the accelerator's generator, by its kind; `cuda` where there is none."""
    kind = find_device(None).type
    return {"cuda": None} if kind == "cpu" else {kind: torch.get_device_module(kind).get_rng_state()}


def set_rng_state(state: dict[str, Tensor | None]) -> None:
    """Go on from `rng_state()`, if it is of this machine's kind of accelerator."""
    kind = find_device(None).type
    if kind != "cpu" and state.get(kind) is not None:
        torch.get_device_module(kind).set_rng_state(state[kind])
