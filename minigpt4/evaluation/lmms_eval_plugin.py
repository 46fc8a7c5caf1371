"""What lmms-eval reads when it starts, by the entry point `lmms_eval.models` of pyproject.toml; it must be cheap."""

from typing import Any


def manifest() -> Any:
    """lmms-eval's name for `MiniGPT4Lmms`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("minigpt4", simple_class_path="minigpt4.evaluation.lmms_eval_adapter.MiniGPT4Lmms")
