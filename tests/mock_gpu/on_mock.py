"""A script of the repository on the mock: from the fourth training step on, whatever waits for the GPU is an error.

    python on_mock.py train.py --cfg-path FILE --options run.device=cuda ...

The mock has no cuDNN, and its NCCL moves nothing: what DDP would receive from other ranks is not looked at.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel, distributed

from minigpt4.common import dist_utils
from minigpt4.runners.runner_base import RunnerBase

FREE = int(os.environ.get("FREE_STEPS", "3"))  # may wait: they keep prefixes, make states, grow pools


class MockDDP(DistributedDataParallel):
    """Without the order of its buckets that rank 0 would send."""

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys, find_unused_parameters=True)


train_step, steps = RunnerBase.train_step, 0


def without_waiting(self, *arguments, **keys):
    global steps
    steps += 1
    torch.cuda.set_sync_debug_mode("error" if steps > FREE else "default")
    try:
        return train_step(self, *arguments, **keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")


if "--tokens" in sys.argv or Path(sys.argv[1]).parent.name == "pytest":
    os.environ.setdefault("MOCK_CUDA_FILL", "1")  # the flags of finite logits, too, are read as zeros
torch.backends.cudnn.enabled = False
distributed._verify_param_shape_across_processes = lambda *_: True
dist_utils.DistributedDataParallel = MockDDP
RunnerBase.train_step = without_waiting
sys.argv = sys.argv[1:]
status = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    status = end.code or 0
sys.stdout.flush()
sys.stderr.flush()
os._exit(status if isinstance(status, int) else 1)  # at the interpreter's end torch aborts on the mock
