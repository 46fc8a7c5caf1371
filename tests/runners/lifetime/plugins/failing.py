"""Tasks that fail on one rank, in the iteration that the environment variable FAIL_AT counts to."""

import os

from minigpt4.common.registry import registry
from minigpt4.tasks import ImageTextPretrainTask


class _FailingTask(ImageTextPretrainTask):
    steps = 0

    def train_step(self, model, samples):
        self.steps += 1
        if self.steps == int(os.environ["FAIL_AT"]) and os.environ.get("RANK") == "1":
            self.fail()
        return super().train_step(model, samples)


@registry.register_task("crashing_once")
class CrashingOnceTask(_FailingTask):
    """The process ends at once, without a word; not again once it is started anew."""

    def fail(self):
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(1)


@registry.register_task("raising")
class RaisingTask(_FailingTask):
    def fail(self):
        raise ValueError("the step of rank 1 is broken")
