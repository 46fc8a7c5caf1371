"""A task whose loss is never finite."""

from minigpt4.common.registry import registry
from minigpt4.tasks import ImageTextPretrainTask


@registry.register_task("not_finite")
class NotFiniteTask(ImageTextPretrainTask):
    def train_step(self, model, samples):
        output = super().train_step(model, samples)
        return {**output, "loss": output["loss"] * float("nan")}
