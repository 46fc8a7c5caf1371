"""How good captions are: the published metrics by pycocoevalcap."""

from typing import Any

from minigpt4.evaluation.metrics import METRICS, require_caption_metrics, score_captions

__all__ = ["METRICS", "lmms_eval_manifest", "require_caption_metrics", "score_captions"]


def lmms_eval_manifest() -> Any:
    """What lmms-eval reads when it starts (entry point `lmms_eval.models`): names the adapter without importing it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("minigpt4", simple_class_path="minigpt4.evaluation.lmms_eval_adapter.MiniGPT4Lmms")
