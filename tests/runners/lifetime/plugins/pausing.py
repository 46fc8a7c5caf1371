"""A task that waits where the test wants it: `pause` in the working directory holds the number of iterations after
which every rank waits for a file `go`. Every rank says when it begins to wait, and when a signal has reached it."""

import logging
import os
import signal
import time
from pathlib import Path

from minigpt4.common.registry import registry
from minigpt4.tasks import ImageTextPretrainTask

log = logging.getLogger(__name__)


@registry.register_task("pausing")
class PausingTask(ImageTextPretrainTask):
    steps = 0

    def train_step(self, model, samples):
        pause = Path("pause")
        if pause.exists() and self.steps == int(pause.read_text()):
            wait(os.environ.get("RANK", "0"))
        self.steps += 1
        return super().train_step(model, samples)


@registry.register_task("crashing_once")
class CrashingOnceTask(PausingTask):
    """Rank 1 ends after 4 iterations, without a word; not again once torchrun has started it anew."""

    def train_step(self, model, samples):
        if self.steps == 4 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
            os._exit(1)
        return super().train_step(model, samples)


def wait(rank):
    request = signal.getsignal(signal.SIGTERM).__self__
    log.warning("rank %s pauses", rank)
    said = False
    while not Path("go").exists():
        time.sleep(0.002)
        if request and not said:
            log.warning("rank %s is asked to stop", rank)
            said = True
