"""A task that fails on one rank, in its third iteration."""

import os

from minigpt4.common.registry import registry
from minigpt4.tasks import ImageTextPretrainTask


@registry.register_task("raising")
class RaisingTask(ImageTextPretrainTask):
    steps = 0

    def train_step(self, model, samples):
        self.steps += 1
        if self.steps == 3 and os.environ["RANK"] == "1":
            raise ValueError("the step of rank 1 is broken")
        return super().train_step(model, samples)
