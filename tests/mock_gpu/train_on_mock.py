"""`train.py` on the mock: from its fourth training step on, whatever waits for the GPU is an error.

python train_on_mock.py --cfg-path FILE --options run.device=cuda ...
"""

import os
import sys

import torch

from minigpt4.runners.runner_base import RunnerBase

FREE = int(os.environ.get("FREE_STEPS", "3"))  # may wait: they keep prefixes, make states, grow pools

torch.backends.cudnn.enabled = False  # the mock has no cuDNN
train_step, steps = RunnerBase.train_step, 0


def without_waiting(self, *arguments, **keys):
    global steps
    steps += 1
    torch.cuda.set_sync_debug_mode("error" if steps > FREE else "default")
    try:
        return train_step(self, *arguments, **keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")


RunnerBase.train_step = without_waiting

import train  # noqa: E402

status = train.main()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)  # at the interpreter's end torch aborts on the mock
